import { assert, assertEquals, assertStringIncludes } from "@std/assert";

const EXAMPLE = `${import.meta.dirname}/distill_digits.ts`;

Deno.test("distill_digits: at the default size every gain exceeds two standard errors", async () => {
  const out = await Deno.makeTempDir();
  const { code, stderr } = await new Deno.Command("deno", {
    args: ["run", "--frozen", "--no-prompt", `--allow-write=${out}`, EXAMPLE, "--out", out],
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

Deno.test("distill_digits: the same seed gives the same numbers, and what Ctrl-C stopped goes on to them", async () => {
  const out = await Deno.makeTempDir();
  const leave = [`--allow-read=${out}`, `--allow-write=${out}`];
  const start = (...more: string[]) =>
    new Deno.Command("deno", {
      args: [
        "run",
        "--frozen",
        "--no-prompt",
        ...leave,
        EXAMPLE,
        "--out",
        out,
        "--seeds",
        "1",
        "--epochs",
        "1",
        ...more,
      ],
      stdout: "piped",
      stderr: "piped",
    }).spawn();
  const whole = await start().output();
  assertEquals(whole.code, 0);
  const numbers = async () => {
    const { runs } = JSON.parse(await Deno.readTextFile(`${out}/distill_digits.json`));
    return runs.map(({ stepsPerSecond: _, ...run }: Record<string, unknown>) => run); // all but the clock's
  };
  const unbroken = await numbers();
  assertEquals(unbroken.length, 7);
  const stopped = start();
  const said = stopped.stderr.getReader();
  await said.read(); // the first line of progress: it is training
  said.releaseLock();
  stopped.kill("SIGINT");
  const { code, stdout } = await stopped.output();
  assertEquals(code, 130);
  assertStringIncludes(new TextDecoder().decode(stdout), "Go on with: ./run distill --out");
  assertEquals((await start("--resume").output()).code, 0);
  assertEquals(await numbers(), unbroken);
  assert(![...Deno.readDirSync(out)].some(({ name }) => name.endsWith(".safetensors")), "nobody needs the checkpoint");
  await Deno.remove(out, { recursive: true });
});
