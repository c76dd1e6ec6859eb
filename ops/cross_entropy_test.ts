import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  argmax,
  crossEntropy,
  type CrossEntropyOptions,
  type CrossEntropyResult,
  flush,
  full,
  init,
  ones,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";
import {
  assertSmall,
  combinations,
  crossEntropy as reference,
  type CrossEntropyNumbers,
  f16Errors,
  integers,
  labelsOf,
  measure,
  normals,
  rowError,
  underAllPlans,
} from "../testing/loss_reference.ts";
import { assertAllThrow } from "../testing/op.ts";
import { differences } from "../testing/reference.ts";

// Shares of the largest number of the loss and of each row's gradient: some 15 and 40 roundings of f32 (6e-8).
const VALUE = 1e-6, GRADIENT = 2.5e-6;

const REDUCTIONS = ["mean", "sum", "none"] as const;
const ROWS = 5, CLASSES = 7;
const LOGITS = normals(ROWS * CLASSES, 3, 1), TARGET = [3, 0, -100, 6, 1];
const WEIGHT = [0.5, 2, 1, 0.25, 0, 3, 1.5].map(Math.fround);
const UPSTREAM = [0.5, -2, 3, 1, 0.25];

/** A probability matrix: positive numbers whose rows sum to 1, and one row that is one-hot. */
function probabilities(rows: number, columns: number, seed: number): number[] {
  return Array.from({ length: rows }, (_, r) => {
    const e = normals(columns, 1, seed + r).map(Math.exp), sum = e.reduce((a, b) => a + b, 0);
    return e.map((v, c) => Math.fround(r === 0 ? (c === 0 ? 1 : 0) : v / sum));
  }).flat();
}

const OPTIONS = combinations({
  softcap: [undefined, 2],
  weight: [undefined, WEIGHT],
  zLoss: [0, 0.01],
  labelSmoothing: [0, 0.1, 1],
  temperature: [1, 0.7],
  reduction: REDUCTIONS,
  ignoreIndex: [-100, 1],
});
const SOFT_OPTIONS = OPTIONS.filter((o) => o.ignoreIndex === -100).map(({ ignoreIndex: _, ...o }) => o);
// every label must be a class or ignored
const targetFor = (ignoreIndex: number) => TARGET.map((y) => y === -100 ? ignoreIndex : y);

/** The op's own options from those of the reference. */
type Plain = Omit<CrossEntropyOptions, "returnZLoss" | "returnAccuracy" | "returnPredictions">;
function gpuOptions({ weight, softcap, ...others }: CrossEntropyNumbers): Plain {
  return {
    ...others,
    ...softcap === undefined ? {} : { softcap },
    ...weight ? { weight: tensor(Float32Array.from(weight)) } : {},
  };
}

const text = (o: object) => JSON.stringify(o);

Deno.test("crossEntropy: the reference's gradient is that of its value", () => {
  const soft = probabilities(ROWS, CLASSES, 9);
  const cases = [...OPTIONS.map((o) => ({ ...o, soft: false })), ...SOFT_OPTIONS.map((o) => ({ ...o, soft: true }))];
  for (const o of cases as (CrossEntropyNumbers & { soft: boolean })[]) {
    const x = [...LOGITS];
    const target = o.soft ? soft : targetFor(o.ignoreIndex!), upstream = o.reduction === "none" ? UPSTREAM : [1.5];
    const weighed = () => reference(x, target, CLASSES, o).loss.reduce((sum, v, i) => sum + v * upstream[i], 0);
    const { dLogits } = reference(x, target, CLASSES, o, upstream);
    assert(rowError(dLogits, differences(weighed, x), x.length) < 1e-7, text(o));
  }
});

for (const soft of [false, true]) {
  Deno.test(`crossEntropy: every combination of options, ${soft ? "soft targets" : "class indices"}`, async () => {
    await init();
    const probability = probabilities(ROWS, CLASSES, 9), errors: [string, number, number][] = [];
    const shape = [ROWS, CLASSES];
    for (const options of soft ? SOFT_OPTIONS : OPTIONS) {
      for (const returns of [false, true]) {
        const o = options as CrossEntropyNumbers;
        const target = soft ? probability : targetFor(o.ignoreIndex!);
        const upstream = o.reduction === "none" ? UPSTREAM : undefined;
        const want = reference(LOGITS, target, CLASSES, { ...o, soft }, upstream);
        const seen: Record<string, Tensor> = {};
        const { loss, gradients } = await measure(
          (logits) => {
            const t = soft ? tensor(Float32Array.from(target), shape) : labelsOf(target);
            const asked = { returnZLoss: returns, returnPredictions: returns, returnAccuracy: returns && !soft };
            const result = crossEntropy(logits, t, { ...gpuOptions(o), ...asked }) as CrossEntropyResult | Tensor;
            if (!returns) return result as Tensor;
            const { loss, ...others } = result as CrossEntropyResult;
            for (const [name, x] of Object.entries(others)) seen[name] = x.keep();
            return loss;
          },
          [{ values: LOGITS, shape }],
          upstream,
        );
        const add = (what: string, error: number, limit: number) =>
          errors.push([`${what} of ${text({ ...o, returns })}`, error, limit]);
        add("loss", rowError(loss, want.loss, want.loss.length), VALUE);
        add("dLogits", rowError(gradients[0], want.dLogits, CLASSES), GRADIENT);
        if (!returns) continue;
        const [z, predictions, accuracy] = await Promise.all(
          [seen.zLoss, seen.predictions, seen.accuracy].map((x) => x?.data()),
        );
        add("zLoss", rowError(z, want.zLoss, want.zLoss.length), VALUE);
        add("predictions", rowError(predictions, want.predictions, ROWS), 0);
        if (!soft) add("accuracy", rowError(accuracy, [want.accuracy], 1), VALUE);
        assertEquals(Object.values(seen).some((x) => x.requiresGrad), false);
        for (const x of Object.values(seen)) x.dispose();
      }
    }
    assertSmall(errors);
  });
}

// the rest of the counts are in the long tests: each takes a pipeline or two
Deno.test("crossEntropy: class counts under both row plans", async () => {
  await init();
  const errors: [string, number, number][] = [], rows = 3;
  await underAllPlans(async (plan) => {
    for (const V of [1, 3, 4, 33, 256, 1025]) {
      const logits = normals(rows * V, 3, V), target = integers(rows, V, V + 1);
      const o = { labelSmoothing: 0.1, zLoss: 1e-3 }, want = reference(logits, target, V, o);
      const inputs = [{ values: logits, shape: [rows, V] }];
      const { loss, gradients } = await measure((x) => crossEntropy(x, labelsOf(target), o), inputs);
      const name = `${V} classes, ${plan}`;
      errors.push([name, rowError(loss, want.loss, 1, 1e-3), VALUE]);
      errors.push([name, rowError(gradients[0], want.dLogits, V, 1e-6), GRADIENT]);
    }
  });
  assertSmall(errors);
});

Deno.test("crossEntropy: rows that several subgroups share, or less than one", async () => {
  await init();
  const V = 1025, logits = normals(V, 3, V), target = [V - 2], inputs = [{ values: logits, shape: [1, V] }];
  const o = { labelSmoothing: 0.1, zLoss: 1e-3 }, want = reference(logits, target, V, o);
  try {
    for (const [threads, quads] of [[256, 0], [64, 2], [64, 8]]) { // read again, in registers in part, as a whole
      overrides.rows = { threads, quads };
      const { loss, gradients } = await measure((x) => crossEntropy(x, labelsOf(target), o), inputs);
      assertSmall([
        [`${quads} vec4s`, rowError(loss, want.loss, 1), VALUE],
        [`${quads} vec4s: gradient`, rowError(gradients[0], want.dLogits, V), GRADIENT],
      ]);
    }
    overrides.rows = { threads: 4, quads: 0 }; // with predictions, for which threads meet in workgroup memory
    const { loss, predictions } = crossEntropy(tensor([logits]), labelsOf(target), { ...o, returnPredictions: true });
    assertSmall([["4 threads", rowError([await loss.item()], want.loss, 1), VALUE]]);
    assertEquals([...await predictions!.data()], want.predictions);
  } finally {
    overrides.rows = null;
  }
});

Deno.test("crossEntropy: class weights over many rows, and over many classes", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const [rows, V] of [[5000, 3], [2, 5003]]) { // kept rows and weights are counted in blocks of 2,048
    const logits = normals(rows * V, 3, V), weight = normals(V, 1, 7).map((w) => Math.fround(0.1 + w * w));
    const target = integers(rows, V, V + 1).map((y, i) => i % 5 === 4 ? -100 : y);
    const o = { labelSmoothing: 0.1, zLoss: 1e-3 }, want = reference(logits, target, V, { ...o, weight });
    const { loss, gradients } = await measure(
      (x) => crossEntropy(x, labelsOf(target), { ...o, weight: tensor(weight) }),
      [{ values: logits, shape: [rows, V] }],
    );
    const name = `${rows}×${V}`;
    errors.push([name, rowError(loss, want.loss, 1, 1e-3), VALUE]);
    errors.push([name, rowError(gradients[0], want.dLogits, V, 0.1 / rows), GRADIENT]); // sure rows' are small
  }
  assertSmall(errors);
});

Deno.test("crossEntropy: a softcap of rows that registers keep, as on a GPU", async () => {
  await init();
  const errors: [string, number, number][] = [], V = 251, softcap = 30;
  const weight = normals(V, 1, 7).map((w) => Math.fround(0.1 + w * w)), target = [250, -100, 7];
  const logits = normals(3 * V, 3, V);
  [logits[250], logits[3], logits[2 * V + 5]] = [145, 150, -150]; // where tanh is all but ±1, its slope is not told from it
  try {
    overrides.rows = { threads: 8, quads: 8 };
    for (const o of [{}, { weight, labelSmoothing: 0.1, zLoss: 1e-3, temperature: 1.5 }] as CrossEntropyNumbers[]) {
      const options = { ...o, softcap, reduction: "none" as const };
      const want = reference(logits, target, V, options, [1, 2, 3]);
      const inputs = [{ values: logits, shape: [3, V] }];
      const got = await measure((x) => crossEntropy(x, labelsOf(target), gpuOptions(options)), inputs, [1, 2, 3]);
      errors.push([`loss of ${Object.keys(o)}`, rowError(got.loss, want.loss, 1, 1e-3), VALUE]);
      errors.push([`gradient of ${Object.keys(o)}`, rowError(got.gradients[0], want.dLogits, V, 1e-12), 1e-5]); // 30 in f32
    }
  } finally {
    overrides.rows = null;
  }
  assertSmall(errors);
});

Deno.test("crossEntropy: shapes", async () => {
  await init();
  const x = LOGITS.slice(0, CLASSES), want = reference(x, [3], CLASSES);
  const one = await measure((l) => crossEntropy(l, labelsOf([3], [])), [{ values: x, shape: [CLASSES] }]);
  assert(rowError(one.loss, want.loss, 1) <= VALUE && rowError(one.gradients[0], want.dLogits, CLASSES) <= GRADIENT);

  // [2, 2, V] is four rows; `none` has the shape of the target
  const four = LOGITS.slice(0, 4 * CLASSES), target = targetFor(-100).slice(0, 4);
  using _tape = new Tape();
  const logits = tensor(four, [2, 2, CLASSES], { requiresGrad: true });
  const loss = crossEntropy(logits, labelsOf(target, [2, 2]), { reduction: "none" });
  assertEquals(loss.shape, [2, 2]);
  loss.backward(tensor([1, 1, 1, 1], [2, 2]));
  const rows = reference(four, target, CLASSES, { reduction: "none" });
  assert(rowError(await loss.data(), rows.loss, 4) <= VALUE);
  assert(rowError(await logits.grad!.data(), rows.dLogits, CLASSES) <= GRADIENT);
  assertEquals(logits.grad!.shape, [2, 2, CLASSES]);
});

Deno.test("crossEntropy: no row, no kept row, one class", async () => {
  await init();
  for (const reduction of REDUCTIONS) {
    const none = reduction === "none";
    const empty = await measure(
      (x) => crossEntropy(x, labelsOf([]), { reduction, zLoss: 1, labelSmoothing: 0.1 }),
      [{ values: [], shape: [0, CLASSES] }],
      none ? [] : undefined,
    );
    assertEquals(empty, { loss: none ? [] : [0], gradients: [[]] });
    const ignored = await measure(
      (x) => crossEntropy(x, labelsOf([-100, -100]), { reduction, zLoss: 1, labelSmoothing: 0.1 }),
      [{ values: LOGITS.slice(0, 2 * CLASSES), shape: [2, CLASSES] }],
      none ? [1, 1] : undefined,
    );
    assertEquals(ignored, { loss: none ? [0, 0] : [0], gradients: [Array(2 * CLASSES).fill(0)] });
    const single = await measure(
      (x) => crossEntropy(x, labelsOf([0, 0]), { reduction }),
      [{ values: [1e4, -3], shape: [2, 1] }],
      none ? [1, 1] : undefined,
    );
    // -0 is as good as 0
    assert([...single.loss, ...single.gradients[0]].every((v) => v === 0), text(single));
  }
  const { accuracy } = crossEntropy(zeros([1, 2]), labelsOf([-100]), { returnAccuracy: true });
  assertEquals(await accuracy!.item(), 0);
});

Deno.test("crossEntropy: large logits, temperatures, and −∞", async () => {
  await init();
  const I = Infinity;
  const rows = [
    [1e4, -1e4, 0, 1, 2],
    [-1e4, 1e4, 1e4, 1e4 - 1, 9e3],
    [1e4, 1e4, 1e4, 1e4, 1e4],
    [-1e4, -1e4 + 2, -1e4 + 1, -1e4, -1e4 + 3],
    [-I, 1, 2, -I, 3],
    [-I, -I, -I, 5, -I], // all the mass in one class
    [0, -I, 1e4, 1, -I],
  ];
  const target = [1, 0, 4, 2, 2, 3, 2], values = rows.flat(), shape = [rows.length, 5];
  for (const temperature of [0.05, 0.5, 1, 7, 100]) {
    for (const more of [{}, { softcap: 30 }, { zLoss: 1e-4 }]) {
      const o: CrossEntropyNumbers = { temperature, reduction: "none", ...more };
      const want = reference(values, target, 5, o);
      const got = await measure(
        (x) => crossEntropy(x, labelsOf(target), gpuOptions(o)),
        [{ values, shape }],
        [1, 1, 1, 1, 1, 1, 1],
      );
      // 1/T rounded to f32 and a product with it: each logit is off by 1e-7 of itself, which the exponent feels as an absolute error
      // (so is one of 30 by a step of f32 there)
      const spread = 3e-7 * 4 / temperature + (o.softcap ?? 0) * 2 ** -23;
      assert(rowError(got.loss, want.loss, 1, 1) <= VALUE + spread, `${text(o)}: ${got.loss} ${want.loss}`);
      const error = rowError(got.gradients[0], want.dLogits, 5, 1e-30);
      assert(error <= GRADIENT + spread, `${text(o)}: gradient ${error}`);
    }
  }
  // the target's logit is −∞: the loss +∞, the gradient finite
  const values2 = [-I, 1, 2];
  for (const o of [{}, { labelSmoothing: 0.1 }, { temperature: 0.5 }]) {
    const want = reference(values2, [0], 3, o);
    const got = await measure((x) => crossEntropy(x, labelsOf([0]), o), [{ values: values2, shape: [1, 3] }]);
    assertEquals(got.loss, [I], text(o));
    assert(rowError(got.gradients[0], want.dLogits, 3) <= GRADIENT, text(o) + got.gradients[0]);
  }
  // without a z-loss lse may be more than f32 holds
  const far = { values: [1e30, 0, 1], shape: [1, 3] };
  const sure = await measure((x) => crossEntropy(x, labelsOf([0]), { temperature: 1e-10 }), [far]);
  assertEquals(sure, { loss: [0], gradients: [[0, 0, 0]] });
  // a probability of 0 at a logit of −∞ counts 0
  const soft = await measure(
    (x) => crossEntropy(x, tensor([[0, 0.25, 0.75]])),
    [{ values: values2, shape: [1, 3] }],
  );
  const softWant = reference(values2, [0, 0.25, 0.75], 3, { soft: true });
  assert(rowError(soft.loss, softWant.loss, 1) <= VALUE);
  // differences of numbers near 0.25 and 0.75, off by a rounding of those
  assert(rowError(soft.gradients[0], softWant.dLogits, 3, 0.25) <= GRADIENT);
});

Deno.test("crossEntropy: a small loss keeps its digits", async () => {
  await init();
  // one class has nearly all the mass: 1 − prob is e⁻³⁰ and less
  const values = [30, 0, -1, 80, 0, 0, 15, -4, 0].map(Math.fround), o = { reduction: "none" } as const;
  const want = reference(values, [0, 0, 0], 3, o), shape = [3, 3];
  const got = await measure((x) => crossEntropy(x, labelsOf([0, 0, 0]), o), [{ values, shape }], [1, 1, 1]);
  // exp errs by 3 + 2|x| ulp
  assert(rowError(got.loss, want.loss, 1) <= 163 * 2 ** -24, `${got.loss} ${want.loss}`);
  assert(rowError(got.gradients[0], want.dLogits, 3) <= 163 * 2 ** -24, `${got.gradients} ${want.dLogits}`);
  const soft = [1, 0, 0, 1, 0, 0, 1, 0, 0], weighed = { ...o, weight: [2.3, 1, 1].map(Math.fround) };
  const softWant = reference(values, soft, 3, { ...weighed, soft: true });
  const softGot = await measure(
    (x) => crossEntropy(x, tensor(soft, [3, 3]), gpuOptions(weighed)),
    [{ values, shape }],
    [1, 1, 1],
  );
  assert(rowError(softGot.loss, softWant.loss, 1) <= 163 * 2 ** -24, `${softGot.loss} ${softWant.loss}`);
  assert(rowError(softGot.gradients[0], softWant.dLogits, 3) <= 163 * 2 ** -24, `${softGot.gradients}`);
  // of a target that is as sure of the class, all others together keep theirs
  const sure = [0.9999, 0.00005, 0.00003, 3, 0.0005, 0, 0.3, 0.00002, 0.00001].map(Math.fround);
  const sureWant = reference(values, sure, 3, { ...o, soft: true });
  const sureGot = await measure((x) => crossEntropy(x, tensor(sure, [3, 3]), o), [{ values, shape }], [1, 1, 1]);
  assert(rowError(sureGot.gradients[0], sureWant.dLogits, 3) <= GRADIENT, `${sureGot.gradients} ${sureWant.dLogits}`);
});

Deno.test("crossEntropy: labels outside the classes", async () => {
  await init();
  const logits = tensor(LOGITS, [ROWS, CLASSES]);
  for (const bad of [CLASSES, -1, 2 ** 31 - 1]) {
    assertThrows(
      () => crossEntropy(logits, labelsOf([0, 1, bad, 2, 3])),
      RangeError,
      `crossEntropy: target must be a class in [0, ${CLASSES}) or ignoreIndex -100, got ${bad} at row 2`,
    );
  }
  assertThrows(() => crossEntropy(logits, labelsOf([0, 1, -100, 2, 3]), { ignoreIndex: 5 }), RangeError, "at row 2");

  // labels that only the GPU has seen poison their own row, and the mean
  for (const bad of [CLASSES, -1, 123456]) {
    for (const more of [{}, { weight: tensor(WEIGHT) }, { labelSmoothing: 0.1, zLoss: 0.1 }, { softcap: 5 }]) {
      using _tape = new Tape();
      const x = tensor(LOGITS, [ROWS, CLASSES], { requiresGrad: true });
      const target = labelsOf([0, 1, 2, 2, 3]).assign(labelsOf([0, 1, bad, 2, 3]));
      const loss = crossEntropy(x, target, { reduction: "none", ...more });
      loss.backward(tensor([1, 1, 1, 1, 1]));
      const [rows, gradient] = [await loss.data(), await x.grad!.data()];
      assertEquals(Array.from(rows, Number.isNaN), [false, false, true, false, false], text([bad, more]));
      Array.from(gradient).forEach((g, i) =>
        assertEquals(Number.isNaN(g), Math.floor(i / CLASSES) === 2, `${bad} ${text(more)}: gradient ${i} is ${g}`)
      );
    }
    const mean = crossEntropy(logits, full([ROWS], bad, { dtype: "i32" }), { returnAccuracy: true });
    assertEquals([await mean.loss.item(), await mean.accuracy!.item()], [NaN, 0]);
  }
  // and those that are classes are taken
  const target = argmax(logits, { dim: -1 });
  const { accuracy } = crossEntropy(logits, target, { returnAccuracy: true });
  assertEquals(await accuracy!.item(), 1);
  for (const rows of [71, 95]) { // as many 71sts or 95ths add up to no whole number
    const all = crossEntropy(zeros([rows, 3]), zeros([rows], { dtype: "i32" }), { returnAccuracy: true });
    assertEquals(await all.accuracy!.item(), 1);
  }
});

Deno.test("crossEntropy: predictions are the first of the largest", async () => {
  await init();
  for (const V of [3, 8, 300]) {
    const rows = 6, values = integers(rows * V, 3, V); // many ties
    values.fill(-Infinity, 0, V - 1); // the only finite logit is the last
    const want = reference(values, integers(rows, V, 5), V);
    await underAllPlans(async () => {
      const labels = zeros([rows], { dtype: "i32" });
      const { predictions } = crossEntropy(tensor(values, [rows, V]), labels, { returnPredictions: true });
      assertEquals(predictions!.dtype, "i32");
      assertEquals(Array.from(await predictions!.data()), want.predictions, `${V} classes`);
    });
  }
});

Deno.test("crossEntropy: the upstream gradient, two losses on a tape, two tapes, unchanged logits", async () => {
  await init();
  const target = labelsOf(TARGET), shape = [ROWS, CLASSES];
  for (const reduction of ["mean", "sum"] as const) {
    for (const up of [2, 0, -1]) {
      const want = reference(LOGITS, TARGET, CLASSES, { reduction }, [up]);
      const got = await measure((x) => crossEntropy(x, target, { reduction }), [{ values: LOGITS, shape }], [up]);
      assert(rowError(got.gradients[0], want.dLogits, CLASSES) <= GRADIENT, `${reduction} ${up}`);
      assert(rowError(got.loss, want.loss, 1) <= VALUE); // the value has nothing to do with it
    }
  }
  const logits = tensor(LOGITS, shape, { requiresGrad: true });
  const first = reference(LOGITS, TARGET, CLASSES), second = reference(LOGITS, TARGET, CLASSES, { softcap: 2 }, [3]);
  const both = first.dLogits.map((g, i) => g + second.dLogits[i]);
  for (const times of [1, 2]) {
    using _tape = new Tape();
    crossEntropy(logits, target).add(crossEntropy(logits, target, { softcap: 2 }).mul(3)).backward();
    const got = await logits.grad!.data();
    assert(rowError(got, both.map((g) => times * g), CLASSES) <= GRADIENT, `${times} tapes`);
  }
  assertEquals(Array.from(await logits.data()), LOGITS);
  logits.dispose();
});

Deno.test("crossEntropy: equals its twin of primitive ops", async () => {
  await init();
  const shape = [ROWS, CLASSES], kept = TARGET.map((y) => y === -100 ? 0 : 1);
  const oneHot = tensor(TARGET.flatMap((y) => Array.from({ length: CLASSES }, (_, c) => c === y ? 1 : 0)), shape);
  const mask = tensor(kept), count = kept.filter((k) => k === 1).length;
  const soft = tensor(probabilities(ROWS, CLASSES, 9), shape), weight = tensor(WEIGHT);
  const nll = (x: Tensor, t = oneHot) => x.logSoftmax().mul(t).sum({ dim: -1 }).neg();
  const keptWeight = TARGET.reduce((sum, y) => sum + (y === -100 ? 0 : WEIGHT[y]), 0);
  const twins: [name: string, fused: (x: Tensor) => Tensor, composed: (x: Tensor) => Tensor][] = [
    ["plain", (x) => crossEntropy(x, labelsOf(TARGET)), (x) => nll(x).sum().div(count)],
    ["sum", (x) => crossEntropy(x, labelsOf(TARGET), { reduction: "sum" }), (x) => nll(x).sum()],
    ["none", (x) => crossEntropy(x, labelsOf(TARGET), { reduction: "none" }), (x) => nll(x)],
    [
      "temperature",
      (x) => crossEntropy(x, labelsOf(TARGET), { temperature: 3 }),
      (x) => nll(x.div(3)).sum().div(count),
    ],
    [
      "softcap",
      (x) => crossEntropy(x, labelsOf(TARGET), { softcap: 4 }),
      (x) => nll(x.div(4).tanh().mul(4)).sum().div(count),
    ],
    [
      "weight",
      (x) => crossEntropy(x, labelsOf(TARGET), { weight }),
      (x) => nll(x, oneHot.mul(weight)).sum().div(keptWeight),
    ],
    [
      "labelSmoothing",
      (x) => crossEntropy(x, labelsOf(TARGET), { labelSmoothing: 0.2 }),
      (x) => nll(x, oneHot.mul(0.8).add(0.2 / CLASSES)).mul(mask).sum().div(count),
    ],
    [
      "zLoss",
      (x) => crossEntropy(x, labelsOf(TARGET), { zLoss: 0.1 }),
      (x) => nll(x).add(x.logSumExp({ dim: -1 }).square().mul(0.1).mul(mask)).sum().div(count),
    ],
    ["soft", (x) => crossEntropy(x, soft), (x) => nll(x, soft).mean()],
    [
      "soft, weight and smoothing",
      (x) => crossEntropy(x, soft, { weight, labelSmoothing: 0.2 }),
      (x) => nll(x, soft.mul(0.8).add(0.2 / CLASSES).mul(weight)).mean(),
    ],
  ];
  for (const [name, fused, composed] of twins) {
    const upstream = name === "none" ? UPSTREAM : undefined, inputs = [{ values: LOGITS, shape }];
    const a = await measure(fused, inputs, upstream), b = await measure(composed, inputs, upstream);
    // two f32 ways of the same sum: each may be off by what this file allows against float64, the composed one by twice that
    assert(rowError(a.loss, b.loss, a.loss.length) <= 3 * VALUE, `${name}: ${a.loss} ${b.loss}`);
    assert(rowError(a.gradients[0], b.gradients[0], CLASSES, 1e-3) <= 3 * GRADIENT, `${name}: gradients`);
  }
});

Deno.test("crossEntropy: f16 logits", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const round = (x: number[]) => Array.from(Float16Array.from(x));
  const values = round(LOGITS), shape = [ROWS, CLASSES];
  for (const reduction of REDUCTIONS) {
    for (const more of [{}, { softcap: 3, zLoss: 0.01, weight: WEIGHT, labelSmoothing: 0.1 }]) {
      const o = { reduction, ...more }, upstream = reduction === "none" ? UPSTREAM : [3];
      const want = reference(values, TARGET, CLASSES, o, upstream);
      const { loss, gradients } = await measure(
        (x) => crossEntropy(x, labelsOf(TARGET), gpuOptions(o)),
        [{ values, shape, dtype: "f16" }],
        upstream,
      );
      assert(rowError(loss, want.loss, loss.length) <= VALUE, text(o));
      assertEquals(f16Errors(gradients[0], want.dLogits, CLASSES, GRADIENT), [], text(o));
    }
  }
  // soft targets of either element
  const soft = round(probabilities(ROWS, CLASSES, 9)), want = reference(values, soft, CLASSES, { soft: true });
  for (const [x, t] of [["f16", "f16"], ["f32", "f16"], ["f16", "f32"]] as const) {
    const { loss, gradients } = await measure(
      (l) => crossEntropy(l, tensor(soft, shape, { dtype: t })),
      [{ values, shape, dtype: x }],
    );
    assert(rowError(loss, want.loss, 1) <= VALUE, `${x} ${t}`);
    if (x === "f16") assertEquals(f16Errors(gradients[0], want.dLogits, CLASSES, GRADIENT), [], `${x} ${t}`);
    else assert(rowError(gradients[0], want.dLogits, CLASSES) <= GRADIENT);
  }
  // class weights are f32 whatever the logits
  const weight = tensor(WEIGHT, undefined, { dtype: "f16" });
  assertThrows(
    () => crossEntropy(tensor(values, shape, { dtype: "f16" }), labelsOf(TARGET), { weight }),
    TypeError,
    "crossEntropy: weight must have dtype f32",
  );
});

Deno.test("crossEntropy: f16 rows that registers keep whole or in part", async () => {
  const { f16 } = await init();
  if (!f16) return;
  try {
    // kept whole; of the others five turns and a part, and thirty, are read again, two at a time
    for (const [threads, quads, V] of [[64, 8, 999], [8, 4, 308], [8, 4, 1101]]) {
      overrides.rows = { threads, quads };
      const shape = [3, V], values = Array.from(Float16Array.from(normals(3 * V, 2, V))), target = [V - 1, 0, -100];
      for (const c of [1, V + 1, V + 3]) values[c] = -Infinity;
      const want = reference(values, target, V, { reduction: "none" }, [1, 2, 3]);
      const { loss, gradients } = await measure(
        (x) => crossEntropy(x, labelsOf(target), { reduction: "none" }),
        [{ values, shape, dtype: "f16" }],
        [1, 2, 3],
      );
      assert(rowError(loss, want.loss, 1) <= VALUE, `${V}: ${loss}`);
      assertEquals(f16Errors(gradients[0], want.dLogits, V, GRADIENT), [], `${V}`);
    }
  } finally {
    overrides.rows = null;
  }
});

Deno.test("crossEntropy: f16 gradients are scaled before they are rounded", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const rows = 4096, V = 8, shape = [rows, V];
  const values = Array.from(Float16Array.from(normals(rows * V, 2, 3))), target = integers(rows, V, 4);
  const want = reference(values, target, V, {}, [1024]);
  const { gradients } = await measure(
    (x) => crossEntropy(x, labelsOf(target)),
    [{ values, shape, dtype: "f16" }],
    [1024],
  );
  assertEquals(f16Errors(gradients[0], want.dLogits, V, GRADIENT), []);
  // rounded first they would be lost: the bound above would be 1024 times the smallest step
  const small = want.dLogits.filter((g) => Math.abs(g) / 1024 < 2 ** -25);
  assert(small.length > 100, `${small.length} gradients would have become 0`);
});

Deno.test("crossEntropy: property: value, gradient, shift, bounds", async () => {
  await init();
  const row = fc.record({
    rows: fc.integer({ min: 1, max: 6 }),
    columns: fc.integer({ min: 1, max: 40 }),
    seed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
    deviation: fc.constantFrom(0.01, 1, 5, 20),
    temperature: fc.constantFrom(0.5, 1, 2, 10),
    labelSmoothing: fc.constantFrom(0, 0.1, 0.5),
    zLoss: fc.constantFrom(0, 1e-3),
    reduction: fc.constantFrom(...REDUCTIONS),
    ignored: fc.nat(6),
    shift: fc.constantFrom(-64, 32, 128), // a multiple of every step of f32 at that size, so that x + shift is nearly exact
  });
  await fc.assert(
    fc.asyncProperty(row, async ({ rows, columns, seed, deviation, ignored, shift, ...o }) => {
      const values = normals(rows * columns, deviation, seed), shape = [rows, columns];
      const target = integers(rows, columns, seed + 1).map((y, r) => r === ignored ? -100 : y);
      const upstream = o.reduction === "none" ? normals(rows, 1, seed + 2) : undefined;
      const want = reference(values, target, columns, o, upstream);
      const run = (x: number[]) =>
        measure((l) => crossEntropy(l, labelsOf(target), o), [{ values: x, shape }], upstream);
      const got = await run(values), kept = target.filter((y) => y !== -100).length;
      // an exponent of size x is off by 2⁻²⁴·x twice over
      const x = 4 * deviation / o.temperature * 2 ** -23;
      const size = Math.max(1, ...want.loss.map(Math.abs));
      assert(rowError(got.loss, want.loss, want.loss.length, size) <= VALUE + x, `loss ${got.loss}, not ${want.loss}`);
      // with smoothing the gradient is a difference of probabilities, which may be as good as equal
      const floor = (o.labelSmoothing > 0 ? 1 : 1e-4) / (rows * o.temperature);
      assert(rowError(got.gradients[0], want.dLogits, columns, floor) <= GRADIENT + x, "gradient");
      if (o.zLoss > 0) return;
      assert(got.loss.every((v) => v >= 0), "the loss is negative");
      // a row's gradient sums to 0: each of V terms, none above |upstream|/T, is off by some 2⁻²⁴ of itself
      const scale = Math.max(o.labelSmoothing > 0 ? floor : 0, ...got.gradients[0].map(Math.abs));
      for (let r = 0; r < rows; r++) {
        const sum = got.gradients[0].slice(r * columns, (r + 1) * columns).reduce((a, b) => a + b, 0);
        assert(Math.abs(sum) <= columns * scale * (GRADIENT + x), `row ${r} sums to ${sum}`);
      }
      // log-softmax knows no shift; the truth is the reference of the shifted numbers, which were rounded again
      const moved = values.map((v) => Math.fround(v + shift));
      const shifted = await run(moved), wantShifted = reference(moved, target, columns, o, upstream);
      assert(rowError(shifted.loss, wantShifted.loss, want.loss.length, size) <= VALUE + x, "shifted loss");
      assert(
        Math.abs(shifted.loss[0] - got.loss[0]) <= size * rows * (2 ** -16 + VALUE) / o.temperature,
        `${kept} kept`,
      );
    }),
    { numRuns: 200 },
  );
});

Deno.test("crossEntropy: what lies behind the last class's weight is no weight", async () => {
  await init();
  {
    using _scope = new Scope();
    for (let i = 0; i < 64; i++) full([64], NaN); // for the pool to give again
    await flush();
  }
  for (const V of [1, 2, 3, 5, 7]) {
    const logits = zeros([2, V]), weight = ones([V]), labels = labelsOf([0, 0]);
    const loss = crossEntropy(logits, labels, { weight, labelSmoothing: 0.1 });
    assert(Math.abs(await loss.item() - Math.log(V)) < 1e-6, `${V} classes: ${await loss.item()}`);
    assert(Number.isFinite(await crossEntropy(logits, full([2, V], 1 / V), { weight }).item()), `${V} classes, soft`);
  }
});

Deno.test("crossEntropy: −∞ and its finite stand-ins beside small weights", async () => {
  await init();
  const ce = (row: number[], target: Tensor, o: CrossEntropyOptions) =>
    (crossEntropy(tensor([row]), target, o) as Tensor).item();
  for (const t of [1e-15, 1e-37]) {
    assertEquals(await ce([0, 0, -Infinity], tensor([[0.5, 0.5, t]]), {}), Infinity, `${t}`);
  }
  assertEquals(await ce([0, 0, -Infinity], tensor([[0.5, 0.5, 0]]), {}), Math.fround(Math.LN2));
  const smooth = await ce([0, 0, -1e30], labelsOf([0]), { labelSmoothing: 0.3 });
  assert(Math.abs(smooth / 1e29 - 1) < 1e-6, `${smooth}`);
  assertEquals(await ce([0, 0, -Infinity], labelsOf([2]), { labelSmoothing: 1 }), Infinity);
  // no kept row has a weight
  assertEquals(await ce([0, -Infinity], labelsOf([0]), { weight: tensor([0, 1]), labelSmoothing: 0.1 }), 0);
});

Deno.test("crossEntropy: predictions are argmax's", async () => {
  await init();
  const I = -Infinity, logits = tensor([[NaN, 1, 2], [I, I, I], [1, NaN, NaN], [0, 3, 3], [2, 1, I]]);
  const { predictions } = crossEntropy(logits, labelsOf([0, 0, 0, 0, 0]), { returnPredictions: true });
  assertEquals(await predictions!.array(), await argmax(logits, { dim: 1 }).array());
});

Deno.test("crossEntropy: what it throws", async () => {
  await init();
  const logits = tensor(LOGITS, [ROWS, CLASSES]), target = labelsOf(targetFor(-100));
  const soft = tensor(probabilities(ROWS, CLASSES, 9), [ROWS, CLASSES]);
  // deno-lint-ignore no-explicit-any
  const call = (o: any, x: any = logits, t: any = target) => () => crossEntropy(x, t, o);
  assertAllThrow([
    [
      call({ labelSmooting: 0.1 }),
      TypeError,
      'crossEntropy: unknown option "labelSmooting"; did you mean labelSmoothing?',
    ],
    [call(null), TypeError, "crossEntropy: options must be an object, got null"],
    [call({ reduction: "avg" }), RangeError, 'crossEntropy: reduction must be one of mean, sum, none, got "avg"'],
    [call({ reduction: 1 }), TypeError, "crossEntropy: reduction must be one of mean, sum, none, got 1"],
    [
      call({ labelSmoothing: 1.5 }),
      RangeError,
      "crossEntropy: labelSmoothing must be a finite number, at least 0, at most 1",
    ],
    [call({ labelSmoothing: "0" }), TypeError, 'crossEntropy: labelSmoothing must be a number, got "0"'],
    [call({ zLoss: -1 }), RangeError, "crossEntropy: zLoss must be a finite number, at least 0, got -1"],
    [call({ softcap: 0 }), RangeError, "crossEntropy: softcap must be a finite number, above 0, got 0"],
    [call({ temperature: 0 }), RangeError, "crossEntropy: temperature must be a finite number, above 0, got 0"],
    [call({ temperature: NaN }), RangeError, "crossEntropy: temperature must be a finite number, above 0, got NaN"],
    [call({ ignoreIndex: 0.5 }), RangeError, "crossEntropy: ignoreIndex must be an integer"],
    [call({ returnZLoss: 1 }), TypeError, "crossEntropy: returnZLoss must be true or false, got 1"],
    [call({ weight: [1, 2] }), TypeError, "crossEntropy: weight must be a Tensor, got [1, 2]"],
    [call({ weight: tensor([1, 2]) }), TypeError, `crossEntropy: weight must have shape [${CLASSES}], got [2]`],
    [call({}, [1, 2]), TypeError, "crossEntropy: logits must be a Tensor, got [1, 2]"],
    [call({}, tensor(1)), TypeError, "crossEntropy: logits must have"],
    [call({}, target), TypeError, "crossEntropy: logits must have dtype"],
    [call({}, zeros([2, 0])), RangeError, "crossEntropy: logits must have at least one class, got shape [2, 0]"],
    [call({}, logits, labelsOf([0, 1])), TypeError, "crossEntropy: target must have shape [5], got [2]"],
    [
      call({}, logits, labelsOf(targetFor(0), [5, 1])),
      TypeError,
      "crossEntropy: target must have shape [5], got [5",
    ],
    [
      call({}, logits, zeros([5])),
      TypeError,
      `target must have dtype i32 or u32 as class indices (or shape [5, ${CLASSES}] as probabilities), got f32 of shape [5] (tensor(values, { dtype: "i32" }) makes i32)`,
    ],
    [call({}, logits, zeros([5, 1])), TypeError, `crossEntropy: target must have shape [5, ${CLASSES}], got [5, 1]`],
    [
      call({ ignoreIndex: 0 }, logits, soft),
      TypeError,
      "crossEntropy: ignoreIndex does not go with soft targets, got 0",
    ],
    [call({ returnAccuracy: true }, logits, soft), TypeError, "crossEntropy: returnAccuracy needs class indices"],
  ]);
  assert(Number.isFinite(await crossEntropy(logits, target).item()));
});

Deno.test("crossEntropy: value and gradient take three launches, and none to hand the gradient over", async () => {
  await init();
  using _scope = new Scope();
  const logits = tensor([[1, 2, 3]], { requiresGrad: true }), labels = tensor(new Int32Array(1));
  using _tape = new Tape();
  const before = stats().dispatches;
  crossEntropy(logits, labels).backward();
  assertEquals(stats().dispatches - before, 3); // kept rows, the rows, their sum
});

Deno.test("crossEntropy: the label's column where the label itself weighs nothing", async () => {
  await init();
  const V = 4096, x = Array.from({ length: V }, (_, i) => Math.fround(Math.sin(i * 1.7)));
  const sum = x.reduce((total, x) => total + Math.exp(x), 0), probability = Math.exp(x[3]) / sum, lse = Math.log(sum);
  const weights = (own: number) => Float32Array.from(x, (_, c) => c === 3 ? own : 1);
  const cases: [Plain, number, number][] = [
    [{ labelSmoothing: 0.1 }, 0, 0.1 / V * (V - 1) * probability],
    [{ zLoss: 1e-4 }, 0, 2e-4 * lse * probability],
    [{ labelSmoothing: 1 }, 1, probability - 1 / V],
  ];
  for (const [options, own, want] of cases) {
    using _tape = new Tape();
    const logits = tensor([x], { requiresGrad: true });
    crossEntropy(logits, labelsOf([3]), { ...options, weight: tensor(weights(own)), reduction: "sum" }).backward();
    const got = (await logits.grad!.data())[3];
    assert(Math.abs(got - want) < 2e-6 * Math.max(want, 1 / V), `${JSON.stringify(options)}: ${got}, not ${want}`);
  }
});

Deno.test("crossEntropy: soft targets, the gradient of a likely class that has nearly all of the target", async () => {
  await init();
  const cases: [number[], number[], number[], number][] = [ // logits, target, weight, smoothing
    [[0, -40], [1, 1e-7], [1, 1], 0],
    [[0, -40], [0.3, 1e-7], [1, 1], 0],
    [[0, -8], [0.7713, 0.0003], [1, 1], 0],
    [[0, -19.5], [1, 0], [1, 0.0131], 1e-6],
    [[0, -40], [1, 0], [97.3, 0.02], 1e-6],
  ];
  const errors: [string, number, number][] = [];
  for (
    const [x, t, w, labelSmoothing] of cases.map((c) =>
      c.map((v) => typeof v === "number" ? v : v.map(Math.fround)) as typeof c
    )
  ) {
    using _tape = new Tape();
    const logits = tensor(x, [1, 2], { requiresGrad: true });
    crossEntropy(logits, tensor(t, [1, 2]), { weight: tensor(w), labelSmoothing, reduction: "sum" }).backward();
    const want = reference(x, t, 2, { weight: w, labelSmoothing, reduction: "sum", soft: true });
    errors.push([`${x} ${t}`, rowError(await logits.grad!.data(), want.dLogits, 2), 1e-5]);
  }
  assertSmall(errors);
});

Deno.test("crossEntropy: a sure label keeps its digits where a row is in registers in part; no mass, no loss", async () => {
  await init();
  using _scope = new Scope();
  try {
    overrides.rows = { threads: 8, quads: 2 };
    const logits = tensor(Float32Array.from({ length: 31 }, (_, i) => i === 0 ? 24 : 0), [1, 31]);
    const loss = await crossEntropy(logits, tensor(Int32Array.of(0))).item();
    assertAlmostEquals(loss / Math.log1p(30 * Math.exp(-24)), 1, 1e-5);
  } finally {
    overrides.rows = null;
  }
  assertEquals(await crossEntropy(tensor([[-Infinity, -Infinity]]), tensor([[0, 0]])).item(), 0);
});
