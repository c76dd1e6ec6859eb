/** What takes too long for every run: all class counts under all row plans, the longest rows, and more rows than one dimension dispatches. */
import { assert, assertEquals } from "@std/assert";
import {
  crossEntropy,
  distillation,
  type DivergenceName,
  init,
  jsd,
  linearCrossEntropy,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";
import {
  assertSmall,
  crossEntropy as crossEntropyReference,
  distillation as distillationReference,
  divergence as divergenceReference,
  DIVERGENCE_NAMES,
  DIVERGENCES,
  f16Errors,
  Head,
  integers,
  labelsOf,
  measure,
  normals,
  rowError,
  underAllPlans,
} from "../testing/loss_reference.ts";

// Shares of the largest number of the loss and of each row's gradient: some 30 and 80 roundings of f32 (6e-8).
const VALUE = 2e-6, GRADIENT = 6e-6;

const COUNTS = [1, 2, 3, 4, 5, 7, 31, 32, 33, 127, 256, 257, 1023, 4099];

/** Every loss on rows of V classes. The floors: of a loss 1e-2, and of a row's gradient `floor`, where 1 is the most. */
async function checkAll(rows: number, V: number, what: string, names = DIVERGENCE_NAMES, floor = 1e-4): Promise<void> {
  const student = normals(rows * V, 2, V), teacher = normals(rows * V, 2, V + 1), labels = integers(rows, V, V + 2);
  const shape = [rows, V], one = { values: student, shape }, two = [one, { values: teacher, shape }];
  const errors: [string, number, number][] = [];
  const add = (name: string, got: { loss: number[]; gradients: number[][] }, loss: number[], gradients: number[][]) => {
    errors.push([`${name} of ${what}: loss`, rowError(got.loss, loss, 1, 1e-2), VALUE]);
    gradients.forEach((g, i) =>
      errors.push([`${name} of ${what}: gradient ${i}`, rowError(got.gradients[i], g, V, floor / rows), GRADIENT])
    );
  };
  const o = { labelSmoothing: 0.1, zLoss: 1e-3 }, ce = crossEntropyReference(student, labels, V, o);
  add("crossEntropy", await measure((x) => crossEntropy(x, labelsOf(labels), o), [one]), ce.loss, [ce.dLogits]);
  for (const name of names) {
    const want = divergenceReference(name, student, teacher, V);
    add(name, await measure((s, t) => DIVERGENCES[name](s, t), two), want.loss, [want.dStudent, want.dTeacher]);
  }
  const both = distillationReference(student, teacher, labels, V);
  add("distillation", await measure((s, t) => distillation(s, t, labelsOf(labels)), two), both.loss, [
    both.dStudent,
    both.dTeacher,
  ]);
  assertSmall(errors);
}

Deno.test("losses: all class counts under all row plans", async () => {
  await init();
  await underAllPlans(async (plan) => {
    for (const V of COUNTS) await checkAll(2, V, `${V} classes, ${plan}`);
  }, [4, 1, 0]);
});

Deno.test("losses: rows that several subgroups share", async () => {
  await init();
  try {
    for (const quads of [2, 4]) { // registers keep a part of a row, and all of it
      overrides.rows = { threads: 64, quads };
      await checkAll(2, 603, `603 classes, ${quads} vec4s`, ["forwardKl", "jsd"]);
    }
  } finally {
    overrides.rows = null;
  }
});

Deno.test("divergences: f16 rows that registers keep whole or in part", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const round = (x: number[]) => Array.from(Float16Array.from(x));
  try {
    // kept whole, in vec4s that are the row's alone and not; of the others, one as a GPU has it and two, some turns and a part are read again, two at a time
    for (const [threads, quads, V] of [[8, 4, 124], [8, 4, 123], [64, 8, 1612], [8, 2, 244], [8, 2, 1101]]) {
      overrides.rows = { threads, quads };
      const shape = [2, V], [student, teacher] = [1, 2].map((seed) => round(normals(2 * V, 2, seed)));
      const input = (values: number[], requiresGrad: boolean) => ({
        values,
        shape,
        dtype: "f16" as const,
        requiresGrad,
      });
      for (const masked of [false, true]) {
        if (masked) { // both rows have no third class; the second student has no fifth either
          for (const c of [2, V + 2, V + 4]) student[c] = -Infinity;
          for (const c of [2, V + 2]) teacher[c] = -Infinity;
        }
        // each is a pipeline: what takes seconds to compile
        const some: [DivergenceName, side: 0 | 1][] = V === 1612
          ? [["jsd", 0]]
          : V % 4 === 0
          ? [["forwardKl", 0]]
          : [["forwardKl", 0], ["reverseKl", 0], ["jsd", 0], ["jsd", 1]];
        for (const [name, side] of some) {
          const what = `${name} ${V}${masked ? ", masked" : ""}, gradient ${side}`;
          const want = divergenceReference(name, student, teacher, V, { reduction: "none" }, [1, 1]);
          const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t, { reduction: "none" }), [
            input(student, side === 0),
            input(teacher, side === 1),
          ], [1, 1]);
          const rows = masked && name === "forwardKl" ? 1 : 2;
          if (rows === 1) assertEquals(loss[1], Infinity, what);
          assert(rowError(loss.slice(0, rows), want.loss.slice(0, rows), 1) <= 1e-6, `${what}: ${loss}`);
          const got = gradients[side].slice(0, rows * V), wanted = side === 0 ? want.dStudent : want.dTeacher;
          assertEquals(f16Errors(got, wanted.slice(0, rows * V), V, 5e-6), [], what);
        }
      }
    }
  } finally {
    overrides.rows = null;
  }
});

Deno.test("losses: rows of 262,144 classes", async () => {
  await init();
  // a software driver ends a thread's loops at 65,535 turns in all: each of these takes 256
  await checkAll(2, 262_144, "262,144 classes", ["forwardKl", "jsd"]);
});

Deno.test("losses: a row of 16 million classes", async () => {
  await init();
  using _tape = new Tape();
  const V = 2 ** 24, few = [1, 2].map((seed) => normals(4, 1, seed)); // again and again: as if there were these four classes
  const want = divergenceReference("jsd", few[0], few[1], 4);
  const [student, teacher] = few.map((row) => tensor(Float32Array.from({ length: V }, (_, i) => row[i % 4]), [1, V]));
  student.requiresGrad = true;
  const loss = jsd(student, teacher);
  loss.backward();
  const end = await student.grad!.slice([[0, 1], [V - 4, V]]).mul(V / 4).data();
  assertSmall([
    ["loss", rowError([await loss.item()], want.loss, 1), 1e-4], // sums of 4,096 terms a thread
    ["gradient", rowError(Array.from(end), want.dStudent, 4), 1e-4],
  ]);
});

Deno.test("losses: 70,000 rows, more than one dimension of a dispatch", async () => {
  await init();
  const rows = 70_000;
  // among so many rows of three some are close without being so by the kernel's measure: 1e-7 of a gradient is left in them
  await checkAll(rows, 3, "70,000 rows", ["forwardKl", "reverseKl"], 3e-2);
  // and in chunks, of which one is that large
  const hidden = normals(rows * 2, 1, 1), weight = normals(6, 1, 2), target = integers(rows, 3, 3);
  const head = new Head(hidden, weight, 2), want = crossEntropyReference(head.logits, target, 3);
  const d = head.backward(want.dLogits);
  for (const chunkSize of [66_000, 20_000]) {
    const { loss, gradients } = await measure(
      (h, w) => linearCrossEntropy(h, w, labelsOf(target), { chunkSize }),
      [{ values: hidden, shape: [rows, 2] }, { values: weight, shape: [3, 2] }],
    );
    assertSmall([
      ["loss", rowError(loss, want.loss, 1), VALUE],
      ["dHidden", rowError(gradients[0], d.dHidden, rows * 2), GRADIENT],
      // the weights' gradient sums 70,000 terms of both signs: √70,000 roundings of the largest, and it is their remainder
      ["dWeight", rowError(gradients[1], d.dWeight, 6), 20 * GRADIENT],
    ]);
  }
  // accuracy counts them all
  const all = crossEntropy(labelsAsLogits(target), labelsOf(target), { returnAccuracy: true, returnPredictions: true });
  assertSmall([["accuracy", rowError([await all.accuracy!.item()], [1], 1), VALUE]]);
  assertEquals(Array.from(await all.predictions!.data()), target);
});

/** Logits whose largest is the label's. */
function labelsAsLogits(labels: number[]): Tensor {
  return tensor(Float32Array.from(labels.flatMap((y) => [0, 1, 2].map((c) => c === y ? 1 : 0))), [labels.length, 3]);
}
