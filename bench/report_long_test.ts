import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { init } from "@limbeck/limbeck";
import type { Report } from "./report_page.ts";

const PROGRAM = `${import.meta.dirname}/report.ts`;

async function run(args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const { code, stdout, stderr } = await new Deno.Command("deno", { args, env: { NO_COLOR: "1" } }).output();
  const text = new TextDecoder();
  return { code, stdout: text.decode(stdout), stderr: text.decode(stderr) };
}

async function report(out: string, ...args: string[]) {
  const leave = [`--allow-read=${out}`, `--allow-write=${out}`];
  return await run(["run", "--frozen", "--no-prompt", ...leave, PROGRAM, "--out", out, ...args]);
}

Deno.test("report: the quick run writes a page, numbers and a picture", async (t) => {
  const { adapter, timestamps, f16 } = await init();
  if (!timestamps) return;
  const out = await Deno.makeTempDir();
  const { code, stdout, stderr } = await report(out, "--quick", "--commit", "abc123", "--driver", "a driver");
  assertEquals(code, 0, stderr);
  const files = Array.from(Deno.readDirSync(out), ({ name }) => name).sort();
  const name = files[0].replace(/\.json$/, "");
  assertEquals(files, [".json", ".md", ".svg"].map((ending) => name + ending));
  const page = await Deno.readTextFile(`${out}/${name}.md`);
  const numbers: Report = JSON.parse(await Deno.readTextFile(`${out}/${name}.json`));

  await t.step("it says where it was taken", () => {
    const { version } = Deno;
    const notice = "Not the whole report: tiny sizes, to see whether it runs.";
    for (const text of [adapter, notice, "a driver", version.deno, numbers.date, "abc123", `](${name}.svg)`]) {
      assertStringIncludes(page, text);
    }
    assertEquals(stdout.trim(), page.trim());
  });

  await t.step("every loss has been timed in every way", () => {
    const plain = numbers.losses.filter(({ variant }) => variant === "plain");
    assertEquals(plain.map(({ name }) => name), ["crossEntropy", "forwardKl", "reverseKl", "jsd", "distillation"]);
    const counted = (variant: string) => numbers.losses.filter((loss) => loss.variant === variant).length;
    for (const variant of ["every option", ...f16 ? ["f16"] : []]) {
      assertEquals(counted(variant), plain.length, variant);
    }
    assertEquals(counted("close rows"), plain.length - 1, "cross-entropy has one side");
    for (const { rows, classes, mustMove, milliseconds, rate, share, gradientBytes, extraBytes, name } of plain) {
      const elements = rows * classes;
      assertEquals(mustMove, 4 * elements * (name === "crossEntropy" ? 2 : 3));
      assert(milliseconds > 0);
      assertEquals(rate, mustMove / (milliseconds / 1000));
      assertEquals(share, rate / numbers.bandwidth.best);
      assert(extraBytes >= gradientBytes, `${name}: ${extraBytes} bytes cannot hold the gradient`);
    }
  });

  await t.step("products, heads and steps have been timed", () => {
    for (const { m, k, n, flops, milliseconds, rate } of numbers.products) {
      assertEquals(flops, 2 * m * k * n);
      assertEquals(rate, flops / (milliseconds / 1000));
    }
    assertEquals(numbers.products.length, f16 ? 8 : 4);
    assertEquals(numbers.heads.map(({ name }) => name), ["linearCrossEntropy", "linearDistillation"]);
    for (const { fused, unfused } of numbers.heads) assert(fused.extraBytes < unfused.extraBytes);
    assertEquals(numbers.steps.map(({ loss }) => loss), [
      "crossEntropy",
      "jsd",
      "linearCrossEntropy",
      "linearDistillation, jsd",
    ]);
    for (const { wall, kernels } of numbers.steps) {
      assert(wall > 0 && kernels.length > 5);
      for (const { launches, milliseconds } of kernels) assert(Number.isInteger(launches) && milliseconds > 0);
    }
  });

  await t.step("there is a point in the picture for each", async () => {
    const picture = await Deno.readTextFile(`${out}/${name}.svg`);
    assertStringIncludes(picture, "<svg");
    assertStringIncludes(picture, "matmul");
  });
  await Deno.remove(out, { recursive: true });
});

Deno.test("report: a part alone, and options that are wrong", async () => {
  const { timestamps } = await init();
  if (!timestamps) return;
  const out = await Deno.makeTempDir();
  const { code, stdout, stderr } = await report(out, "--quick", "--only", "matmul");
  assertEquals(code, 0, stderr);
  assertStringIncludes(stdout, "## Matrix products");
  assertStringIncludes(stdout, "Not the whole report: tiny sizes, to see whether it runs; only matmul.");
  assert(!stdout.includes("## Losses"));
  const wrong = await report(out, "--only", "lasses");
  assertEquals(wrong.code, 2);
  assertStringIncludes(wrong.stderr, '--only: wanted losses,matmul,linear,steps, got "lasses"');
  const elsewhere = await report(out, "--quick", "--out", `${out}/../elsewhere`);
  assertEquals(elsewhere.code, 2);
  const refused = `--out: wanted a folder that can be written, got "${out}/../elsewhere": Requires write access`;
  assertStringIncludes(elsewhere.stderr, refused);
  await Deno.remove(out, { recursive: true });
});
