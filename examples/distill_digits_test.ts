import { assert, assertEquals, assertStringIncludes } from "@std/assert";

const EXAMPLE = `${import.meta.dirname}/distill_digits.ts`;

/** Runs the example as its task does, with no more than leave to write where the results go (by a path in which no comma parts the list). */
async function distill(out: string, ...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const command = new Deno.Command("deno", {
    cwd: out,
    args: ["run", "--frozen", "--no-prompt", "--allow-write=.", EXAMPLE, "--out", out, ...args],
  });
  const { code, stdout, stderr } = await command.output();
  const text = new TextDecoder();
  return { code, stdout: text.decode(stdout), stderr: text.decode(stderr) };
}

Deno.test("distill_digits: the quick run", async (t) => {
  const out = await Deno.makeTempDir();
  const { code, stdout, stderr } = await distill(out, "--quick");
  assertEquals(code, 0, stderr);
  const { rows } = JSON.parse(await Deno.readTextFile(`${out}/distill_digits.json`));

  await t.step("every student gains over its label-only twin", () => {
    const [, baseline, ...distilled] = rows;
    assertEquals(baseline.method, "labels alone");
    assertEquals(distilled.length, 5);
    for (const { method, gain } of distilled) assert(gain > 0, `${method} gained ${gain}`);
  });

  await t.step("the teacher is the best", () => {
    const [teacher, ...students] = rows;
    for (const student of students) assert(teacher.accuracy > student.accuracy, student.method);
  });

  await t.step("a table and a picture come out", async () => {
    assertStringIncludes(stdout, "| labels alone |");
    assert((await Deno.readTextFile(`${out}/distill_digits.svg`)).startsWith("<svg"));
  });

  await Deno.remove(out, { recursive: true });
});

Deno.test("distill_digits: a bad option is named, with exit code 2", async () => {
  const out = await Deno.makeTempDir();
  // a folder that can be made and not written, by root either: its path leaves no room for a file's
  const full = `${out}${`/${"x".repeat(200)}`.repeat(21)}`.slice(0, 4090);
  for (
    const [args, said] of [
      [
        ["--sedes", "3"],
        'one of --student, --seed, --seeds, --epochs, --quick, --out, --resume, --help, got "--sedes"',
      ],
      [["--seeds", "few"], '--seeds: wanted a whole number of at least 1, got "few"'],
      [["--epochs", "0"], '--epochs: wanted a whole number of at least 1, got "0"'],
      [["--quick=maybe"], '--quick: wanted no value, got "maybe"'],
      [["--seed", "-5"], '--seed: wanted a whole number of at least 0, got "-5"'],
      [["--seed"], "--seed: wanted a whole number of at least 0, got nothing"],
      [["--out", ""], "--out: wanted a value, got nothing"],
      [["--out", full, "--seeds", "1", "--epochs", "1"], `--out: wanted a folder that can be written, got "${full}": `],
      [["digits"], 'got "digits"'],
      [["--quick", "--", "--seeds", "3"], 'got "--seeds"'],
    ] as const
  ) {
    const { code, stderr } = await distill(out, ...args);
    assertEquals(code, 2, said);
    assertStringIncludes(stderr, said);
  }
  await Deno.remove(out, { recursive: true });
});

Deno.test("distill_digits: --help", async () => {
  const { code, stdout } = await distill(".", "--help");
  assertEquals(code, 0);
  for (const option of ["--seed N", "--seeds N", "--epochs N", "--quick", "--out DIR"]) {
    assertStringIncludes(stdout, option);
  }
});
