/** Lists the examples, runs one, or runs them all. An example is a file in examples/; the first line of its first comment says what it is. */
import { parseArgs } from "@std/cli/parse-args";

const names = [...Deno.readDirSync("examples")].map(({ name }) => name)
  .filter((file) => file.endsWith(".ts") && !file.endsWith("_test.ts")).map((file) => file.slice(0, -3)).sort();
const [chosen, ...options] = Deno.args.filter((argument, i) => argument !== "--" || i > 1); // npm puts a -- before options

if (chosen === undefined || chosen === "--help" || chosen === "-h") {
  const width = Math.max(...names.map(({ length }) => length));
  for (const name of names) {
    const [, about] = /^\/\*\*\s+(?:\* )?(.*)/.exec(Deno.readTextFileSync(`examples/${name}.ts`))!;
    console.log(`${name.padEnd(width)}  ${about}`);
  }
  console.log("\n./run examples NAME runs one (--help lists its options), ./run examples all runs every one.");
} else if (chosen === "all") {
  for (const name of names) {
    console.log(`\n${name}\n`);
    await run(name);
  }
} else if (names.includes(chosen)) {
  await run(chosen);
} else {
  console.error(`examples: wanted all or one of ${names.join(", ")}, got "${chosen}"`);
  Deno.exit(2);
}

/** Runs an example, which may read only the project and the files that its options name, and write only to its folder. */
async function run(name: string): Promise<void> {
  const { out = "out", ...files } = parseArgs(options, { string: ["out", "text", "teacher-logits"] });
  const reads = [".", out, files.text, files["teacher-logits"]].filter(Boolean);
  const parted = reads.find((path) => path.includes(","));
  if (parted !== undefined) {
    console.error(`examples: wanted paths without commas, which part Deno's list of permissions, got "${parted}"`);
    Deno.exit(2);
  }
  const permissions = ["--no-prompt", `--allow-read=${reads.join()}`, `--allow-write=${out || "out"}`];
  const leave = () => {}; // leaves Ctrl-C to the example, which saves its state
  Deno.addSignalListener("SIGINT", leave);
  const { code } = await new Deno.Command("deno", {
    args: ["run", ...permissions, `examples/${name}.ts`, ...options],
    stdin: "inherit",
    stdout: "inherit",
    stderr: "inherit",
  }).spawn().status;
  Deno.removeSignalListener("SIGINT", leave);
  if (code !== 0) Deno.exit(code);
}
