import { assert, assertEquals } from "@std/assert";

const EXAMPLE = new URL("./distill_digits.ts", import.meta.url);

Deno.test("distill_digits: at the default size every gain exceeds two standard errors", async () => {
  const out = await Deno.makeTempDir();
  const { code, stderr } = await new Deno.Command("deno", {
    args: ["run", "--frozen", "--no-prompt", `--allow-write=${out}`, EXAMPLE.pathname, "--out", out],
  }).output();
  assertEquals(code, 0, new TextDecoder().decode(stderr));
  const { rows } = JSON.parse(await Deno.readTextFile(`${out}/distill_digits.json`));
  const [, , ...distilled] = rows;
  assertEquals(distilled.length, 5);
  for (const { method, gain, gainError } of distilled) {
    assert(gain > 2 * gainError, `${method}: ${gain} ± ${gainError}`);
  }
  await Deno.remove(out, { recursive: true });
});
