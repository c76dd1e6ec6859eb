import { assertEquals, assertMatch, assertStringIncludes } from "@std/assert";

const run = (...args: string[]) =>
  new Deno.Command("deno", {
    args: ["run", "--frozen", "--no-prompt", "--allow-read=examples", "--allow-run=deno", "tasks/examples.ts", ...args],
  }).output();

Deno.test("examples: each is listed with what it is", async () => {
  const { code, stdout } = await run();
  assertEquals(code, 0);
  assertEquals((await run("--help")).stdout, stdout);
  const list = new TextDecoder().decode(stdout);
  assertStringIncludes(list, "./run examples NAME runs one"); // deno itself may be in .limbeck/ only
  const files = [...Deno.readDirSync("examples")].map(({ name }) => name);
  for (const file of files.filter((name) => name.endsWith(".ts") && !name.endsWith("_test.ts"))) {
    assertMatch(list, new RegExp(`^${file.slice(0, -3)} +[A-Z].*\\.$`, "m"));
  }
});

Deno.test("examples: an example gets its options and gives its exit code; an unknown name is one too", async () => {
  const help = await run("asymmetry", "--help");
  assertEquals(help.code, 0);
  assertStringIncludes(new TextDecoder().decode(help.stdout), "asymmetry.svg");
  assertEquals((await run("--", "asymmetry", "--help")).stdout, help.stdout);
  assertEquals((await run("asymmetry", "--", "--help")).stdout, help.stdout);
  assertEquals((await run("asymmetry", "--sede", "3")).code, 2);
  assertEquals((await run("asymetry")).code, 2);
  const parted = await run("asymmetry", "--", "--out", "here,there");
  assertEquals(parted.code, 2);
  assertStringIncludes(new TextDecoder().decode(parted.stderr), "wanted paths without commas");
});
