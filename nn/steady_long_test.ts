import { assert, assertEquals } from "@std/assert";

Deno.test("10,000 steps: live bytes, pooled bytes and the process stay as large as they are", async () => {
  const { success, stdout } = await new Deno.Command("deno", {
    args: ["run", "--quiet", "--no-prompt", "--v8-flags=--expose-gc", "nn/testdata/steady.ts"],
    stderr: "inherit",
  }).output();
  assert(success);
  const seen = new TextDecoder().decode(stdout).trim().split("\n").map((line) => JSON.parse(line));
  const [first, last] = [seen[0], seen.at(-1)];
  assertEquals(seen.map(({ device }) => device), seen.map(() => first.device));
  // 8,000 steps: 1 KiB lost a step would be 8 MiB
  for (const kind of ["native", "heapUsed"]) {
    assert(last[kind] - first[kind] < 8 * 2 ** 20, `${kind} memory grew from ${first[kind]} to ${last[kind]} bytes`);
  }
});
