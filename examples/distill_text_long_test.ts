import { assertEquals, assertStringIncludes } from "@std/assert";

const EXAMPLE = `${import.meta.dirname}/distill_text.ts`;

function command(out: string, ...args: string[]): Deno.Command {
  const leave = [`--allow-read=${out}`, `--allow-write=${out}`];
  return new Deno.Command("deno", {
    args: ["run", "--frozen", "--no-prompt", ...leave, EXAMPLE, "--out", out, "--quick", ...args],
    stdout: "piped",
    stderr: "piped",
  });
}

async function distill(out: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await command(out, ...args).output();
  assertEquals(code, 0, new TextDecoder().decode(stderr));
  return new TextDecoder().decode(stdout);
}

/** Every number but those of the clock: parameters (as a hash), curves, held-out figures, samples. */
async function readNumbers(out: string): Promise<unknown> {
  const { runs } = JSON.parse(await Deno.readTextFile(`${out}/distill_text.json`));
  // deno-lint-ignore no-explicit-any
  return runs.map(({ tokensPerSecond: _, bytes: __, ...run }: any) => run);
}

const checkpoints = (out: string) =>
  [...Deno.readDirSync(out)].map(({ name }) => name).filter((name) => name.endsWith(".safetensors"));

Deno.test("distill_text: a run that is stopped, twice, and resumed repeats the unbroken run bit for bit", async () => {
  const unbroken = await Deno.makeTempDir();
  const broken = await Deno.makeTempDir();
  const options = ["--steps", "30", "--on-policy", "0.2"]; // batches that the student writes must repeat too
  await distill(unbroken, ...options);

  assertStringIncludes(
    await distill(broken, ...options, "--stop-after", "10"),
    "stopped after step 10 of 30 of teacher",
  );
  const said = await distill(broken, ...options, "--stop-after", "65", "--resume"); // 20 of the teacher, 30, 15
  assertStringIncludes(said, "stopped after step 15 of 30 of forward KL");
  assertStringIncludes(
    said,
    `Go on with: ./run distill-text --out ${broken} --quick --steps 30 --on-policy 0.2 --resume`,
  );
  await distill(broken, "--steps", "1"); // another setting: the checkpoint stays
  await distill(broken, ...options, "--resume");
  assertEquals(await readNumbers(broken), await readNumbers(unbroken));
  assertEquals(checkpoints(broken), [], "nobody needs the checkpoint");

  for (const out of [unbroken, broken]) await Deno.remove(out, { recursive: true });
});

Deno.test("distill_text: Ctrl-C saves a checkpoint and says how to go on", async () => {
  const out = await Deno.makeTempDir();
  const child = command(out).spawn();
  const said = child.stderr.getReader();
  await said.read(); // the first line of progress: it is training
  said.releaseLock();
  child.kill("SIGINT");
  const { code, stdout } = await child.output();
  assertEquals(code, 130);
  assertStringIncludes(new TextDecoder().decode(stdout), "--quick --resume");
  assertStringIncludes(await distill(out, "--resume", "--stop-after", "1"), "stopped after step "); // it can be resumed
  assertEquals(checkpoints(out), ["distill_text_checkpoint.safetensors"]);
  await Deno.remove(out, { recursive: true });
});
