import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  binaryCrossEntropyWithLogits,
  cosineEmbeddingLoss,
  cosineSimilarity,
  crossEntropy,
  crossEntropyOfDistributions,
  entropy,
  forwardKl,
  gaussianKl,
  init,
  jsd,
  klDiv,
  l1Loss,
  logSoftmax,
  mseLoss,
  nllLoss,
  Scope,
  smoothL1Loss,
  softmax,
  stats,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import {
  assertSmall,
  combinations,
  f16Errors,
  type Input,
  integers,
  labelsOf,
  logSoftmax as logSoftmaxOf,
  measure,
  normals,
  rowError,
  rowsOf,
} from "../testing/loss_reference.ts";
import { assertAllThrow } from "../testing/op.ts";
import { differences } from "../testing/reference.ts";

// Shares of the largest number: some 15 and 40 roundings of f32 (6e-8). Gradients come from central differences in float64, good to 1e-9.
const VALUE = 1e-6, GRADIENT = 2.5e-6;
const REDUCTIONS = ["mean", "sum", "none"] as const;
type Reduction = typeof REDUCTIONS[number];

/** What a loss of rows or elements becomes. */
function reduce(values: number[], reduction: Reduction, count = values.length): number[] {
  if (reduction === "none") return values;
  const sum = values.reduce((a, b) => a + b, 0);
  return [reduction === "sum" ? sum : sum / count];
}

/** Compares an op with a float64 function of the same inputs, gradients for all of them. */
async function check(
  name: string,
  op: (...x: Tensor[]) => Tensor,
  reference: (...x: number[][]) => number[],
  inputs: Input[],
  { gradient = GRADIENT, step = 1e-5 } = {},
): Promise<void> {
  const values = inputs.map((x) => Array.from(x.values)), want = reference(...values);
  const upstream = normals(want.length, 1, 99);
  const weighed = () => reference(...values).reduce((sum, v, i) => sum + v * upstream[i], 0);
  const { loss, gradients } = await measure(op, inputs, upstream);
  assertSmall([
    [`${name}: value`, rowError(loss, want, want.length), VALUE],
    ...values.flatMap((x, i): [string, number, number][] =>
      inputs[i].requiresGrad === false
        ? []
        : [[`${name}: gradient ${i}`, rowError(gradients[i], differences(weighed, x, step), x.length, 1e-6), gradient]]
    ),
  ]);
}

const SHAPE = [3, 5], COUNT = 15;
const A = normals(COUNT, 2, 1), B = normals(COUNT, 2, 2), C = normals(COUNT, 1, 3), D = normals(COUNT, 1, 4);
const as = (values: number[], more: Partial<Input> = {}): Input => ({ values, shape: SHAPE, ...more });
const PROBABILITIES = rowsOf(B, 5).flatMap((row) => logSoftmaxOf(row).log.map((v) => Math.fround(Math.exp(v))));

Deno.test("elementwise losses: value and gradients", async () => {
  await init();
  const huber = (beta: number) => (d: number) => Math.abs(d) < beta ? d * d / (2 * beta) : Math.abs(d) - beta / 2;
  const softplus = (x: number) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  for (const reduction of REDUCTIONS) {
    const o = { reduction };
    const of = (f: (a: number, b: number) => number) => (a: number[], b: number[]) =>
      reduce(a.map((v, i) => f(v, b[i])), reduction);
    await check(`mseLoss ${reduction}`, (a, b) => mseLoss(a, b, o), of((a, b) => (a - b) ** 2), [as(A), as(B)]);
    await check(`l1Loss ${reduction}`, (a, b) => l1Loss(a, b, o), of((a, b) => Math.abs(a - b)), [as(A), as(B)]);
    for (const beta of [0.5, 1, 3]) {
      await check(
        `smoothL1Loss ${beta} ${reduction}`,
        (a, b) => smoothL1Loss(a, b, { ...o, beta }),
        of((a, b) => huber(beta)(a - b)),
        [as(A), as(B)],
      );
    }
    await check(
      `binaryCrossEntropyWithLogits ${reduction}`,
      (a, b) => binaryCrossEntropyWithLogits(a, b, o),
      of((x, t) => softplus(x) - x * t),
      [as(A), as(PROBABILITIES)],
    );
  }
  // kinks and ends: no difference has gradient 0; β = 0 is the absolute error
  const same = [as(A), as(A)];
  for (const op of [mseLoss, l1Loss, smoothL1Loss]) {
    const { loss, gradients } = await measure((a, b) => op(a, b), same);
    assert([...loss, ...gradients.flat()].every((v) => v === 0), op.name);
  }
  const inputs = [as(A), as(B)];
  assertEquals(
    await measure((a, b) => smoothL1Loss(a, b, { beta: 0 }), inputs),
    await measure((a, b) => l1Loss(a, b), inputs),
  );
});

Deno.test("elementwise losses: large arguments", async () => {
  await init();
  const x = [1e4, -1e4, 1e4, -1e4, 100], t = [1, 0, 0, 1, 0.5], shape = [5], o = { reduction: "none" } as const;
  const { loss, gradients } = await measure((a, b) => binaryCrossEntropyWithLogits(a, b, o), [
    { values: x, shape },
    { values: t, shape },
  ], [1, 1, 1, 1, 1]);
  assertSmall([
    ["loss", rowError(loss, [0, 0, 1e4, 1e4, 50], 1), VALUE],
    ["dLogits", rowError(gradients[0], [0, 0, 1, -1, 0.5], 1), GRADIENT],
    ["dTarget", rowError(gradients[1], x.map((v) => -v), 1), GRADIENT],
  ]);
  // the small losses keep their digits: log(1 + e⁻²⁰); exp errs by 3 + 2·20 ulp
  const small = await measure((x) => binaryCrossEntropyWithLogits(x, tensor([1])), [{ values: [20], shape: [1] }]);
  const [wantLoss, wantGradient] = [Math.log1p(Math.exp(-20)), -1 / (1 + Math.exp(20))];
  assert(rowError(small.loss, [wantLoss], 1) <= 43 * 2 ** -24, `${small.loss}, not ${wantLoss}`);
  assert(rowError(small.gradients[0], [wantGradient], 1) <= 43 * 2 ** -24, `${small.gradients}, not ${wantGradient}`);
  const [y, z] = [[0.999, 0.9999, 0.99999].map(Math.fround), [10, 10, 30]];
  const nearly = await binaryCrossEntropyWithLogits(tensor(z), tensor(y), o).data();
  const wanted = z.map((x, i) => (1 - y[i]) * x + Math.log1p(Math.exp(-x)));
  assert(rowError(nearly, wanted, 1) <= 63 * 2 ** -24, `${nearly}, not ${wanted}`);
  const ends = await binaryCrossEntropyWithLogits(tensor([-Infinity, Infinity, Infinity]), tensor([0, 1, 0]), o).data();
  assertEquals([...ends], [0, 0, Infinity]);
  const far = [{ values: [1e10, -1e10], shape: [2] }, { values: [-1e10, 1e10], shape: [2] }];
  assert(rowError((await measure((a, b) => mseLoss(a, b), far)).loss, [4e20], 1) <= VALUE);
  assertEquals((await measure((a, b) => smoothL1Loss(a, b, { reduction: "sum" }), far)).gradients, [[1, -1], [-1, 1]]);
  const unknown = await measure((a) => smoothL1Loss(a, zeros([1])), [{ values: [NaN], shape: [1] }]);
  assertEquals(unknown, { loss: [NaN], gradients: [[NaN]] });
});

Deno.test("nllLoss: weights, ignored rows, reductions", async () => {
  await init();
  const target = [3, -100, 1], weight = [0.5, 2, 1, 0.25, 3].map(Math.fround), rows = (x: number[]) => rowsOf(x, 5);
  for (const o of combinations({ reduction: REDUCTIONS, weight: [undefined, weight], ignoreIndex: [-100, 3] })) {
    const labels = target.map((y) => y === -100 ? o.ignoreIndex : y), w = o.weight ?? Array(5).fill(1);
    const kept = labels.map((y) => y === o.ignoreIndex ? 0 : w[y]), sum = kept.reduce((a, b) => a + b, 0);
    await check(
      `nllLoss ${JSON.stringify(o)}`,
      (x) =>
        nllLoss(x, labelsOf(labels), {
          reduction: o.reduction,
          ignoreIndex: o.ignoreIndex,
          ...o.weight ? { weight: tensor(weight) } : {},
        }),
      (x) => reduce(rows(x).map((row, r) => kept[r] === 0 ? 0 : -kept[r] * row[labels[r]]), o.reduction, sum),
      [as(A)],
    );
  }
  // it is the second half of crossEntropy; two f32 ways of one sum
  const fused = await measure((x) => crossEntropy(x, labelsOf(target)), [as(A)]);
  const composed = await measure((x) => nllLoss(logSoftmax(x), labelsOf(target)), [as(A)]);
  assert(rowError(composed.loss, fused.loss, 1) <= 2 * VALUE);
  assert(rowError(composed.gradients[0], fused.gradients[0], 5) <= 2 * GRADIENT);
  // no kept row, no row, −∞ at the target, −∞ elsewhere
  const ignored = await measure((x) => nllLoss(x, labelsOf([-100, -100, -100])), [as(A)]);
  assert([...ignored.loss, ...ignored.gradients[0]].every((v) => v === 0), `${ignored.loss} ${ignored.gradients}`);
  assertEquals(await nllLoss(zeros([0, 4]), labelsOf([])).item(), 0);
  const weightless = await measure((x) => nllLoss(x, labelsOf(target), { weight: zeros([5]) }), [as(A)]);
  assert([...weightless.loss, ...weightless.gradients[0]].every((v) => v === 0), `${weightless.loss}`);
  const infinite = { values: [-Infinity, -1, -1, -Infinity, -Infinity, -1], shape: [3, 2] };
  const rowsOfIt = await measure(
    (x) => nllLoss(x, labelsOf([0, 0, -100]), { reduction: "none" }), // an ignored row is one of class 0 and weight 0
    [infinite],
    [1, Infinity, Infinity], // an infinite upstream gradient reaches the label's column alone
  );
  assertEquals(rowsOfIt, { loss: [Infinity, 1, 0], gradients: [[-1, 0, -Infinity, 0, 0, 0]] });
  // labels
  assertThrows(() => nllLoss(zeros([2, 3]), labelsOf([0, 3])), RangeError, "nllLoss: target must be a class in [0, 3)");
  const poisoned = await measure(
    (x) => nllLoss(x, labelsOf([0, 0, 0]).assign(labelsOf([0, 7, 1])), { reduction: "none" }),
    [as(A)],
    [1, 1, 1],
  );
  assertEquals(poisoned.loss.map(Number.isNaN), [false, true, false]);
  assertEquals(poisoned.gradients[0].map(Number.isNaN), Array.from({ length: 15 }, (_, i) => Math.floor(i / 5) === 1));
});

Deno.test("klDiv: probabilities and logarithms, all reductions", async () => {
  await init();
  const x = rowsOf(A, 5).flatMap((row) => logSoftmaxOf(row).log.map(Math.fround));
  const logs = rowsOf(B, 5).flatMap((row) => logSoftmaxOf(row).log.map(Math.fround));
  for (const reduction of [...REDUCTIONS, "batchmean"] as const) {
    const of = (f: (x: number, t: number) => number) => (x: number[], t: number[]) =>
      reduction === "batchmean"
        ? [x.reduce((sum, v, i) => sum + f(v, t[i]), 0) / 3]
        : reduce(x.map((v, i) => f(v, t[i])), reduction);
    const o = { reduction };
    await check(`klDiv ${reduction}`, (a, b) => klDiv(a, b, o), of((x, t) => t * (Math.log(t) - x)), [
      as(x),
      as(PROBABILITIES),
    ], { step: 1e-7 }); // some probabilities are 1e-4
    await check(
      `klDiv logTarget ${reduction}`,
      (a, b) => klDiv(a, b, { ...o, logTarget: true }),
      of((x, t) => Math.exp(t) * (t - x)),
      [as(x), as(logs)],
    );
  }
  // batchmean is the divergence: the fused op's mean, from f32 logarithms
  const batchmean = klDiv(tensor(x, SHAPE), tensor(PROBABILITIES, SHAPE), { reduction: "batchmean" });
  const [a, b] = [await batchmean.item(), await forwardKl(tensor(A, SHAPE), tensor(B, SHAPE)).item()];
  assert(Math.abs(a - b) <= 5 * VALUE * b, `${a}, not ${b}`);

  // a zero target contributes 0, also where the logarithm is −∞; p > 0 there is +∞
  const I = Infinity, none = { reduction: "none" } as const, shape = [4], up = [1, 1, 1, 1];
  const zero = await measure((x, t) => klDiv(x, t, none), [
    { values: [-I, -1, -I, -2], shape },
    { values: [0, 0, 0.5, 1], shape, requiresGrad: false },
  ], up);
  assertEquals(zero.loss, [0, 0, I, 2]);
  assertEquals(zero.gradients[0].map((v) => v + 0), [0, 0, -0.5, -1]);
  const zeroLog = await measure((x, t) => klDiv(x, t, { ...none, logTarget: true }), [
    { values: [-I, -1, -I, -2], shape },
    { values: [-I, -I, 0, 0], shape },
  ], up);
  assertEquals(zeroLog.loss, [0, 0, I, 2]);
  assertEquals(zeroLog.gradients[0].map((v) => v + 0), [0, 0, -1, -1]);
  assertEquals(zeroLog.gradients[1].slice(0, 2), [0, 0]);
});

Deno.test("cosineSimilarity and cosineEmbeddingLoss", async () => {
  await init();
  const dot = (a: number[], b: number[]) => a.reduce((sum, v, i) => sum + v * b[i], 0);
  const cosine = (a: number[], b: number[], eps = 1e-8) =>
    dot(a, b) / (Math.max(Math.sqrt(dot(a, a)), eps) * Math.max(Math.sqrt(dot(b, b)), eps));
  const cosines = (a: number[], b: number[]) => rowsOf(a, 5).map((row, r) => cosine(row, rowsOf(b, 5)[r]));
  await check("cosineSimilarity", (a, b) => cosineSimilarity(a, b), cosines, [as(A), as(B)]);
  await check("cosineSimilarity, last", (a, b) => cosineSimilarity(a, b, { dim: -1 }), cosines, [as(A), as(B)]);
  const columns = (x: number[]) => Array.from({ length: 5 }, (_, c) => rowsOf(x, 5).map((row) => row[c]));
  await check(
    "cosineSimilarity over columns",
    (a, b) => cosineSimilarity(a, b, { dim: 0 }),
    (a, b) => columns(a).map((x, c) => cosine(x, columns(b)[c])),
    [as(A), as(B)],
  );
  await check(
    "cosineSimilarity, broadcast",
    (a, b) => cosineSimilarity(a, b),
    (a, b) => rowsOf(a, 5).map((row) => cosine(row, b)),
    [as(A), { values: B.slice(0, 5), shape: [5] }],
  );
  // a vector of zeros: 0/(eps·‖b‖) = 0
  for (const eps of [1e-8, 1e-25]) { // of the latter the square is 0 in f32
    for (const other of [tensor([[1, 2, 3]]), zeros([1, 3])]) {
      assertEquals(await cosineSimilarity(zeros([1, 3]), other, { eps }).item(), 0);
    }
  }

  const y = [1, -1, -1];
  for (const reduction of REDUCTIONS) {
    for (const margin of [0, 0.3, -0.5]) {
      await check(
        `cosineEmbeddingLoss ${reduction} ${margin}`,
        (a, b) => cosineEmbeddingLoss(a, b, labelsOf(y), { reduction, margin }),
        (a, b) => reduce(cosines(a, b).map((c, r) => y[r] === 1 ? 1 - c : Math.max(0, c - margin)), reduction),
        [as(A), as(B)],
      );
    }
  }
  for (const one of [tensor([[2]]), tensor([2])]) { // broadcast along dim: as if it stood there three times
    const cosine = await cosineSimilarity(tensor([[1], [1], [1]]), one, { dim: 0 }).array() as number[];
    assert(Math.abs(cosine[0] - 1) < 2 * VALUE, `${cosine}`);
  }
  const floats = cosineEmbeddingLoss(tensor(A, SHAPE), tensor(B, SHAPE), tensor(y));
  const strange = await cosineEmbeddingLoss(tensor(A, SHAPE), tensor(B, SHAPE), tensor([1, 0, 5]), {
    reduction: "none",
  })
    .data();
  assertEquals([...strange].map(Number.isNaN), [false, true, true]); // neither alike nor unlike
  const want = cosines(A, B).reduce((sum, c, r) => sum + (y[r] === 1 ? 1 - c : Math.max(0, c)) / 3, 0);
  assert(rowError([await floats.item()], [want], 1) <= VALUE);
});

Deno.test("gaussianKl: against N(0, 1) and against another Gaussian; identical ones give 0", async () => {
  await init();
  const term = (m: number, v: number, n = 0, w = 0) => (Math.expm1(v - w) - (v - w) + (m - n) ** 2 * Math.exp(-w)) / 2;
  const mean = (terms: number[]) => [terms.reduce((a, b) => a + b, 0) / 3];
  await check("gaussianKl", (m, v) => gaussianKl(m, v), (m, v) => mean(m.map((x, i) => term(x, v[i]))), [as(A), as(B)]);
  await check(
    "gaussianKl of two",
    (m, v, n, w) => gaussianKl(m, v, n, w),
    (m, v, n, w) => mean(m.map((x, i) => term(x, v[i], n[i], w[i]))),
    [as(A), as(C), as(B), as(D)],
  );
  await check(
    "gaussianKl with another mean",
    (m, v, n) => gaussianKl(m, v, n),
    (m, v, n) => mean(m.map((x, i) => term(x, v[i], n[i]))),
    [as(A), as(C), as(B)],
  );
  for (const narrow of [0, 100, 1000]) { // e^89 is more than f32 holds
    const v = as(B.map((b) => b - narrow));
    const same = await measure((m, v, n, w) => gaussianKl(m, v, n, w), [as(A), v, as(A), v]);
    assert([...same.loss, ...same.gradients.flat()].every((v) => v === 0), `${same.loss} ${same.gradients}`);
  }
  // ½(1e-15·e⁵⁰)², from an e^100 that f32 does not hold
  const tiny = await gaussianKl(tensor([1e-15]), tensor([-100]), tensor([0]), tensor([-100])).item();
  assert(Math.abs(tiny / (5e-31 * Math.exp(100)) - 1) <= 2e-5, `${tiny}`); // exp errs by 3 + 2·50 ulp
  // close ones: ½Σ δ²/2 keeps its digits
  const delta = C.map((v) => Math.fround(v * 1e-4));
  await check("gaussianKl of close ones", (v) => gaussianKl(zeros(SHAPE), v), (v) => mean(v.map((x) => term(0, x))), [
    as(delta),
  ]);
});

Deno.test("entropy and crossEntropyOfDistributions", async () => {
  await init();
  const H = (row: number[], T: number) => {
    const { log } = logSoftmaxOf(row.map((v) => v / T));
    return log.reduce((sum, v) => sum - Math.exp(v) * v, 0);
  };
  const cross = (s: number[], t: number[], T: number) => {
    const { log: X } = logSoftmaxOf(s.map((v) => v / T)), { log: Y } = logSoftmaxOf(t.map((v) => v / T));
    return Y.reduce((sum, v, c) => sum - Math.exp(v) * X[c], 0);
  };
  for (const reduction of REDUCTIONS) {
    for (const temperature of [1, 0.5, 4]) {
      const o = { reduction, temperature };
      await check(
        `entropy ${JSON.stringify(o)}`,
        (x) => entropy(x, o),
        (x) => reduce(rowsOf(x, 5).map((row) => H(row, temperature)), reduction),
        [as(A)],
      );
      await check(
        `crossEntropyOfDistributions ${JSON.stringify(o)}`,
        (s, t) => crossEntropyOfDistributions(s, t, o),
        (s, t) => reduce(rowsOf(s, 5).map((row, r) => cross(row, rowsOf(t, 5)[r], temperature)), reduction),
        [as(A), as(B)],
        { gradient: 4 * GRADIENT }, // the teacher's is the sum of two
      );
    }
  }
  // far from 0 a division by T would round what sets the row's classes apart
  const far = [1000.1, 1000.5, 999.8, 1000.3], exact = far.map(Math.fround);
  await check("entropy far from 0", (x) => entropy(x, { temperature: 0.1 }), (x) => [H(x, Math.fround(0.1))], [
    { values: exact, shape: [1, 4] },
  ]);
  // large logits, and −∞: 0·ln 0 = 0
  const I = Infinity, peaks = { values: [1e4, -1e4, 0, -I, 2, 2, -I, -I, 7], shape: [3, 3] };
  const { loss, gradients } = await measure((x) => entropy(x, { reduction: "none" }), [peaks], [1, 1, 1]);
  assert(rowError(loss, [0, Math.LN2, 0], 1, 1) <= VALUE, `${loss}`);
  assert(rowError(gradients[0], Array(9).fill(0), 9, 1) <= GRADIENT, `${gradients}`);
  // of peaked rows and nearly uniform ones the gradient keeps its digits: −p·(ln p + H)
  const peaked = [15, 0, 0, 0, 30, 1, 0, 1e-5, -1e-5].map(Math.fround),
    slopes = rowsOf(peaked, 3).flatMap((row) => {
      const { log } = logSoftmaxOf(row), h = H(row, 1);
      return log.map((v) => -Math.exp(v) * (v + h));
    });
  const sharp = await measure((x) => entropy(x, { reduction: "none" }), [{ values: peaked, shape: [3, 3] }], [
    1,
    1,
    1,
  ]);
  assert(rowError(sharp.gradients[0], slopes, 3) <= 40 * 2 ** -23, `${sharp.gradients}`); // exp errs by 3 + 2·30 ulp

  // a class that neither knows counts nowhere; one that only the student lacks is +∞
  const masked = await measure((s, t) => crossEntropyOfDistributions(s, t), [
    { values: [0, 1, -I], shape: [1, 3] },
    { values: [1, 0, -I], shape: [1, 3] },
  ]);
  const plain = await measure((s, t) => crossEntropyOfDistributions(s, t), [
    { values: [0, 1], shape: [1, 2] },
    { values: [1, 0], shape: [1, 2] },
  ]);
  assertEquals(masked.gradients.map((g) => g[2] + 0), [0, 0]);
  assert(rowError(masked.loss, plain.loss, 1) <= VALUE);
  masked.gradients.forEach((g, i) => assert(rowError(g.slice(0, 2), plain.gradients[i], 2) <= GRADIENT));
  assertEquals(await crossEntropyOfDistributions(tensor([[0, -I]]), tensor([[0, 0]])).item(), I);
  // it is crossEntropy with soft targets
  const [s, t] = [tensor(A, SHAPE), tensor(B, SHAPE)];
  const soft = await crossEntropy(s, softmax(t)).item();
  assert(Math.abs(await crossEntropyOfDistributions(s, t).item() / soft - 1) <= 2 * VALUE);

  // no row
  const none = { values: [], shape: [0, 3] };
  for (const op of [entropy, crossEntropyOfDistributions, gaussianKl] as ((...x: Tensor[]) => Tensor)[]) {
    const two = op === entropy ? [none] : [none, none];
    assertEquals(await measure((...x) => op(...x), two), { loss: [0], gradients: two.map(() => []) }, op.name);
  }
});

Deno.test("jsd: divided by β(1−β) it tends to forward KL, however small β is", async () => {
  await init();
  const tends = await measure((s, t) => forwardKl(s, t), [as(A), as(B)]);
  for (const beta of [1e-29, 1e-39, 1e-46, 5e-324]) {
    const { loss, gradients } = await measure((s, t) => jsd(s, t, { beta, normalize: true }), [as(A), as(B)]);
    assert(rowError(loss, tends.loss, 1) <= VALUE, `${beta}: ${loss}`);
    gradients.forEach((g, i) => assert(rowError(g, tends.gradients[i], 5) <= GRADIENT, `${beta}: ${g}`));
  }
});

Deno.test("losses: f16", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const round = (x: number[]) => Array.from(Float16Array.from(x)), half = { dtype: "f16" as const };
  const x = round(A), target = [3, -100, 1];
  for (const reduction of REDUCTIONS) {
    const kept = target.map((y) => y === -100 ? 0 : 1), up = [1, -2, 3];
    const scale = reduction === "mean" ? 1 / 2 : 1;
    const want = x.map((_, i) =>
      target[Math.floor(i / 5)] === i % 5
        ? -scale * kept[Math.floor(i / 5)] * (reduction === "none" ? up[Math.floor(i / 5)] : 3)
        : 0
    );
    const { gradients } = await measure(
      (a) => nllLoss(a, labelsOf(target), { reduction }),
      [as(x, half)],
      reduction === "none" ? up : [3],
    );
    assertEquals(f16Errors(gradients[0], want, 5, 0), [], reduction);
  }
  // the arithmetic and the loss are f32, the gradient is rounded once
  const other = round(B), logs = round(logSoftmaxOf(A).log);
  const ops: [string, (...x: Tensor[]) => Tensor, ...number[][]][] = [
    ["mseLoss", (a, b) => mseLoss(a, b), x, other],
    ["l1Loss", (a, b) => l1Loss(a, b), x, other],
    ["smoothL1Loss", (a, b) => smoothL1Loss(a, b), x, other],
    ["binaryCrossEntropyWithLogits", (a, b) => binaryCrossEntropyWithLogits(a, b), x, round(PROBABILITIES)],
    ["klDiv", (a, b) => klDiv(a, b), logs, round(PROBABILITIES)],
    ["klDiv logTarget", (a, b) => klDiv(a, b, { logTarget: true }), logs, logs.toReversed()],
    ["cosineSimilarity", (a, b) => cosineSimilarity(a, b).sum(), x, other],
    ["cosineEmbeddingLoss", (a, b) => cosineEmbeddingLoss(a, b, labelsOf([1, -1, 1])), x, other],
    ["entropy", (a) => entropy(a, { temperature: 2 }), x],
    ["crossEntropyOfDistributions", (a, b) => crossEntropyOfDistributions(a, b), x, other],
    ["gaussianKl", (a, b) => gaussianKl(a, b), x, other],
    ["gaussianKl of two", (a, b, c, d) => gaussianKl(a, b, c, d), x, other, other, x],
  ];
  for (const [name, op, ...values] of ops) {
    const [f16, f32] = [
      await measure(op, values.map((v) => as(v, half)), [3]),
      await measure(op, values.map((v) => as(v)), [3]),
    ];
    assertSmall([[name, rowError(f16.loss, f32.loss, 1), VALUE]]);
    f16.gradients.forEach((g, i) =>
      assertEquals(f16Errors(g, f32.gradients[i], COUNT, GRADIENT), [], `${name}: gradient ${i}`)
    );
  }
  // f16 ends at 65,504, and 1e-8² is 0 in it
  const huge = tensor([[300, 400]], undefined, half), none = tensor([[0, 0]], undefined, half);
  assertEquals(await mseLoss(huge, none).item(), 125_000);
  assertEquals(await gaussianKl(huge, none).item(), 125_000);
  const rows = tensor([[300, 400], [0, 0]], undefined, half), others = tensor([[300, 400], [1, 2]], undefined, half);
  assert(rowError(await cosineSimilarity(rows, others).data(), [1, 0], 2) <= VALUE);
});

Deno.test("losses: property: elementwise losses and entropies against float64", async () => {
  await init();
  const drawn = fc.record({
    rows: fc.integer({ min: 1, max: 5 }),
    columns: fc.integer({ min: 1, max: 33 }),
    seed: fc.nat(),
    deviation: fc.constantFrom(0.1, 1, 10),
    temperature: fc.constantFrom(0.5, 1, 5),
  });
  await fc.assert(
    fc.asyncProperty(drawn, async ({ rows, columns, seed, deviation, temperature }) => {
      using _scope = new Scope();
      const n = rows * columns, a = normals(n, deviation, seed), b = normals(n, deviation, seed + 1);
      const [x, y] = [tensor(a, [rows, columns]), tensor(b, [rows, columns])];
      const labels = integers(rows, columns, seed + 2);
      const logs = rowsOf(a, columns).map((row) => logSoftmaxOf(row.map((v) => v / temperature)).log);
      const mean = (values: number[]) => values.reduce((sum, v) => sum + v, 0) / values.length;
      const all: [string, Tensor, number, number][] = [
        ["mseLoss", mseLoss(x, y), mean(a.map((v, i) => (v - b[i]) ** 2)), 1],
        ["l1Loss", l1Loss(x, y), mean(a.map((v, i) => Math.abs(v - b[i]))), 1],
        ["nllLoss", nllLoss(x, labelsOf(labels)), -mean(labels.map((c, r) => a[r * columns + c])), 1 + 4 * deviation],
        [
          "entropy",
          entropy(x, { temperature }),
          mean(logs.map((row) => row.reduce((sum, v) => sum - Math.exp(v) * v, 0))),
          1 + 8 * deviation / temperature, // logarithms of that size
        ],
      ];
      const got = await Promise.all(all.map(([, loss]) => loss.item()));
      assertSmall(all.map(([name, , want, size], i) => [name, rowError([got[i]], [want], 1, size), VALUE]));
      const H = got[3];
      assert(H >= 0 && H <= Math.log(columns) + VALUE * all[3][3], `the entropy ${H} of ${columns} classes`);
    }),
    { numRuns: 200 },
  );
});

Deno.test("losses: what they throw", async () => {
  await init();
  // deno-lint-ignore no-explicit-any
  type Anything = any;
  const x: Anything = tensor(A, SHAPE),
    y: Anything = tensor(B, SHAPE),
    other = zeros([5, 3]),
    labels = labelsOf([0, 1, 2]);
  assertAllThrow([
    [() => mseLoss(x, other), TypeError, "mseLoss: target must have shape [3"],
    [() => mseLoss(x, 1 as Anything), TypeError, "mseLoss: target must be a Tensor, got 1"],
    [
      () => mseLoss(x, y, { reductoin: "sum" } as Anything),
      TypeError,
      'mseLoss: unknown option "reductoin"; did you mean reduction?',
    ],
    [
      () => mseLoss(x, y, { reduction: "avg" as Anything }),
      RangeError,
      'mseLoss: reduction must be one of mean, sum, none, got "avg"',
    ],
    [() => l1Loss(labels as Anything, y), TypeError, "l1Loss: prediction must have dtype"],
    [() => binaryCrossEntropyWithLogits(labels, y), TypeError, "binaryCrossEntropyWithLogits: logits must have dtype"],
    [
      () => smoothL1Loss(x, y, { beta: -1 }),
      RangeError,
      "smoothL1Loss: beta must be a finite number, at least 0, got -1",
    ],
    [() => smoothL1Loss(x, other), TypeError, "smoothL1Loss: target must have shape [3"],
    [
      () => binaryCrossEntropyWithLogits(x, other),
      TypeError,
      "binaryCrossEntropyWithLogits: target must have shape [3",
    ],
    [() => nllLoss(x, labelsOf([0])), TypeError, "nllLoss: target must have shape [3], got [1]"],
    [() => nllLoss(x, labels, { weight: zeros([4]) }), TypeError, "nllLoss: weight must have shape [5], got [4]"],
    [() => nllLoss(x, labels, { weight: [1] as Anything }), TypeError, "nllLoss: weight must be a Tensor, got [1]"],
    [() => klDiv(x, other), TypeError, "klDiv: target must have shape [3"],
    [
      () => klDiv(x, y, { reduction: "avg" as Anything }),
      RangeError,
      "klDiv: reduction must be one of mean, sum, none, batchmean",
    ],
    [() => klDiv(x, y, { log_target: true } as Anything), TypeError, "did you mean logTarget?"],
    [() => klDiv(x, y, { logTarget: 1 as Anything }), TypeError, "klDiv: logTarget must be true or false, got 1"],
    [() => cosineSimilarity(x, zeros([4, 5])), TypeError, "cosineSimilarity: shapes [3"],
    [() => cosineSimilarity(x, y, { dim: 2 }), RangeError, "cosineSimilarity: dim must be"],
    [
      () => cosineSimilarity(x, y, { eps: 0 }),
      RangeError,
      "cosineSimilarity: eps must be a finite number, above 0, got 0",
    ],
    [
      () => cosineEmbeddingLoss(zeros([]), zeros([]), zeros([])),
      TypeError,
      "cosineEmbeddingLoss: a must have at least",
    ],
    [() => cosineEmbeddingLoss(x, y, labelsOf([1])), TypeError, "cosineEmbeddingLoss: y must have shape [3], got [1]"],
    [() => cosineEmbeddingLoss(x, y, labelsOf([1, -1, 0])), RangeError, "y must be 1 or -1, got 0 at row 2"],
    [() => cosineEmbeddingLoss(x, y, labels, { margin: 2 }), RangeError, "cosineEmbeddingLoss: margin must be"],
    [() => gaussianKl(x, other), TypeError, "gaussianKl: logVariance must have shape [3"],
    [() => gaussianKl(x, undefined as Anything), TypeError, "gaussianKl: logVariance must be a Tensor, got undefined"],
    [() => entropy(x, { temperature: 0 }), RangeError, "entropy: temperature must be a finite number, above 0, got 0"],
    [() => entropy(1 as Anything), TypeError, "entropy: logits must be a Tensor, got 1"],
    [() => crossEntropyOfDistributions(x, other), TypeError, "crossEntropyOfDistributions: teacher must have shape [3"],
  ]);
  assert(Number.isFinite(await mseLoss(x, y).item()));
  const two = tensor([[1, 2]]), closed = tensor([1]);
  closed.dispose();
  // deno-lint-ignore no-explicit-any
  assertThrows(() => cosineSimilarity(two, two, { dim: null } as any), TypeError, "cosineSimilarity: dim must be");
  assertThrows(() => smoothL1Loss(closed, closed, { beta: 0 }), TypeError, "smoothL1Loss: prediction");
  assertThrows(() => cosineEmbeddingLoss(closed, two, two), TypeError, "cosineEmbeddingLoss: a ");
  const { dispatches } = stats(), u32 = tensor(new Uint32Array(3));
  assertThrows(() => cosineEmbeddingLoss(x, y, u32), TypeError, "cosineEmbeddingLoss: y must have dtype f32");
  assertEquals(stats().dispatches, dispatches); // nothing is computed before all is checked
});

Deno.test("losses: corners of their formulas", async () => {
  await init();
  using _scope = new Scope();
  const gradient = async (x: Tensor, loss: () => Tensor) => {
    using _tape = new Tape();
    loss().backward();
    return await x.grad!.array();
  };
  // a short vector counts as long as √(max(x·x, eps²))
  const cosine = await cosineSimilarity(tensor([[1e-5, 0]]), tensor([[1, 0]])).item();
  assert(Math.abs(cosine - 1) < 1e-5, `${cosine}`);
  // β = 0 is the L1 loss, whose slope is 0 where both are equal
  const x = tensor([1, 2], { requiresGrad: true });
  const smooth = () => smoothL1Loss(x, tensor([1, 0]), { beta: 0, reduction: "sum" });
  assertEquals(await gradient(x, smooth), [0, 1]);
  // t·ln t − t·x has the slope −∞ at t = 0, where its value is 0: the gradient there is 0 (PyTorch's is NaN)
  const t = tensor([0, 1], { requiresGrad: true });
  assertEquals(await gradient(t, () => klDiv(tensor([-1, -2]), t, { reduction: "sum" })), [0, 3]);
  assertEquals(await klDiv(tensor(-1), tensor(1), { reduction: "batchmean" }).item(), 1); // a batch of one
});

Deno.test("nllLoss: an ignored row has no gradient, even an infinite upstream one", async () => {
  await init();
  const x = tensor([[-1, -2], [-3, -4]], { requiresGrad: true });
  using _tape = new Tape();
  nllLoss(x, tensor(Int32Array.of(0, 1)), { ignoreIndex: 1, reduction: "none" }).backward(tensor([1, Infinity]));
  assertEquals(await x.grad!.array(), [[-1, 0], [0, 0]]);
});

Deno.test("gaussianKl: a gradient between nearly equal variances keeps its digits", async () => {
  await init();
  using _tape = new Tape();
  const v = [0.011, -0.013, 0.05, -0.3, 0.7, 0.98, 1.1].map(Math.fround);
  const logVariance = tensor([v], { requiresGrad: true });
  gaussianKl(tensor([v.map(() => 0)]), logVariance).sum().backward();
  const got = await logVariance.grad!.data();
  for (const [i, x] of v.entries()) assertAlmostEquals(got[i] / (Math.expm1(x) / 2), 1, 1e-6);
});
