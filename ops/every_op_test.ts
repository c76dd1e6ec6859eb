/** What holds for every op, whatever it computes: what it keeps until its gradient has read it, and what it leaves in memory. */
import { assert, assertEquals } from "@std/assert";
import {
  conv2d,
  cosineSimilarity,
  crossEntropy,
  distillation,
  dropout,
  embedding,
  entropy,
  expectNoLeaks,
  forwardKl,
  init,
  jsd,
  klDiv,
  layerNorm,
  linear,
  linearCrossEntropy,
  linearDistillation,
  manualSeed,
  matmul,
  maximum,
  maxPool2d,
  nllLoss,
  pow,
  rand,
  rmsNorm,
  scaledDotProductAttention,
  Scope,
  smoothL1Loss,
  stack,
  stats,
  Tape,
  type Tensor,
  tensor,
  where,
} from "@limbeck/limbeck";
import { normals } from "../testing/loss_reference.ts";

/** An op over floats, which get gradients, and other inputs. Several results are given as one array. */
interface Op {
  floats: number[][];
  others?: () => Tensor[];
  run: (...inputs: Tensor[]) => Tensor | Tensor[];
  /** Whether it consists of other ops, whose results an open scope frees. */
  composed?: boolean;
}

const labels = () => tensor(new Int32Array([1, 0])), weight = () => tensor([0.5, 2, 1]);
const ROWS = [2, 3], HEADS = [1, 2, 4], IMAGE = [1, 1, 3, 4];
const OPS: Record<string, Op> = {
  add: { floats: [ROWS, [3]], run: (x, y) => x.add(y) },
  mul: { floats: [ROWS, [3]], run: (x, y) => x.mul(y) },
  div: { floats: [ROWS, [1]], run: (x, y) => x.div(y) },
  pow: { floats: [ROWS], run: (x) => pow(x, 3) },
  maximum: { floats: [ROWS, ROWS], run: (x, y) => maximum(x, y) },
  exp: { floats: [ROWS], run: (x) => x.exp() },
  gelu: { floats: [ROWS], run: (x) => x.gelu() },
  clamp: { floats: [ROWS], run: (x) => x.clamp({ min: 0 }) },
  where: { composed: true, floats: [ROWS], others: () => [tensor([1, 0, 1])], run: (x, c) => where(c, x, 2) },
  cast: { floats: [ROWS], run: (x) => x.cast("f32") },
  sum: { floats: [[2, 3, 2]], run: (x) => x.sum({ dim: [0, 2] }) },
  mean: { floats: [ROWS], run: (x) => x.mean() },
  "mean over runs": { floats: [[2, 3, 2]], run: (x) => x.mean({ dim: [0, 2] }) },
  max: { floats: [ROWS], run: (x) => x.max({ dim: 1, keepDim: true }) },
  variance: { floats: [ROWS], run: (x) => x.variance() },
  logSumExp: { floats: [ROWS], run: (x) => x.logSumExp({ dim: 1 }) },
  softmax: { floats: [ROWS], run: (x) => x.softmax(0) },
  logSoftmax: { floats: [ROWS], run: (x) => x.logSoftmax(1) },
  entropy: { composed: true, floats: [ROWS], run: (x) => entropy(x, { reduction: "none" }) },
  rmsNorm: { floats: [ROWS, [3]], run: (x, w) => rmsNorm(x, w) },
  layerNorm: { floats: [ROWS, [3], [3]], run: (x, w, b) => layerNorm(x, w, b) },
  matmul: { floats: [[2, 1, 2, 2], [1, 2, 2, 2]], run: (a, b) => matmul(a, b) },
  "matrix · vector": { floats: [[3, 4, 5], [5]], run: (a, b) => matmul(a, b) },
  "vector · vector": { floats: [[5], [5]], run: (a, b) => matmul(a, b) },
  "batch · matrix": { floats: [[3, 4, 5], [5, 2]], run: (a, b) => matmul(a, b) },
  "vector · matrix": { floats: [[2], [2, 1]], run: (a, b) => matmul(a, b) },
  linear: { floats: [ROWS, [2, 3], [2]], run: (x, w, b) => linear(x, w, b) },
  conv2d: { floats: [IMAGE, [2, 1, 2, 2], [2]], run: (x, w, b) => conv2d(x, w, b) },
  maxPool2d: { floats: [IMAGE], run: (x) => maxPool2d(x, { kernel: 2 }) },
  attention: { floats: [HEADS, HEADS, HEADS], run: (q, k, v) => scaledDotProductAttention(q, k, v) },
  "attention with a mask": {
    floats: [HEADS, HEADS, HEADS],
    others: () => [tensor([[1, 0], [1, 1]], { dtype: "i32" })],
    run: (q, k, v, mask) => scaledDotProductAttention(q, k, v, { mask }),
  },
  "attention with dropout": {
    floats: [HEADS, HEADS, HEADS],
    others: () => [tensor([[0.5, -1], [0, 1]])],
    run: (q, k, v, mask) => scaledDotProductAttention(q, k, v, { mask, dropout: 0.5 }),
  },
  dropout: { floats: [ROWS], run: (x) => dropout(x) },
  embedding: { floats: [ROWS], others: () => [labels()], run: (w, i) => embedding(w, i) },
  gather: { floats: [ROWS], others: () => [tensor([[2], [0]], { dtype: "i32" })], run: (x, i) => x.gather(1, i) },
  stack: { floats: [ROWS, ROWS], run: (x, y) => stack([x, y]) },
  slice: { floats: [ROWS], run: (x) => x.slice([[0, 2], [1, 3]]) },
  triu: { floats: [ROWS], run: (x) => x.triu() },
  permute: { floats: [ROWS], run: (x) => x.permute([1, 0]) },
  smoothL1Loss: { composed: true, floats: [ROWS, ROWS], run: (x, y) => smoothL1Loss(x, y) },
  klDiv: { composed: true, floats: [ROWS, ROWS], run: (x, y) => klDiv(x, y, { reduction: "sum" }) },
  cosineSimilarity: { composed: true, floats: [ROWS, ROWS], run: (x, y) => cosineSimilarity(x, y) },
  nllLoss: {
    floats: [ROWS],
    others: () => [labels(), weight()],
    run: (x, y, weight) => nllLoss(x, y, { weight, reduction: "none" }),
  },
  crossEntropy: { floats: [ROWS], others: () => [labels()], run: (x, y) => crossEntropy(x, y) },
  "crossEntropy of each row": {
    floats: [ROWS],
    others: () => [labels(), weight()],
    run: (x, y, weight) => crossEntropy(x, y, { weight, reduction: "none" }),
  },
  "crossEntropy with its accuracy": {
    floats: [ROWS],
    others: () => [labels()],
    run: (x, y) => {
      const { loss, accuracy } = crossEntropy(x, y, { returnAccuracy: true });
      return [loss, accuracy!];
    },
  },
  jsd: { floats: [ROWS, ROWS], run: (x, y) => jsd(x, y) },
  "forwardKl of each row": {
    floats: [ROWS, ROWS],
    others: () => [labels()],
    run: (x, y, labels) => forwardKl(x, y, { labels, reduction: "none" }),
  },
  distillation: { floats: [ROWS, ROWS], others: () => [labels()], run: (x, y, t) => distillation(x, y, t) },
  linearCrossEntropy: {
    floats: [ROWS, [4, 3]],
    others: () => [labels()],
    run: (h, w, t) => linearCrossEntropy(h, w, t, { chunkSize: 1 }),
  },
  linearDistillation: {
    floats: [ROWS, [4, 3], ROWS, [4, 3]],
    others: () => [labels()],
    run: (h, w, g, v, labels) => linearDistillation(h, w, g, v, { labels, chunkSize: 1 }),
  },
};

/** The gradients of Σ results·(1, −2, 3, …), after `change`, which gets the op's inputs and its results. */
async function gradients(
  { floats, others, run }: Op,
  change: (inputs: Tensor[], results: Tensor[]) => unknown,
): Promise<(number[] | null)[]> {
  manualSeed(1);
  const leaves = floats.map((shape, i) =>
    tensor(normals(shape.reduce((a, b) => a * b, 1), 1, 10 + i), shape, { requiresGrad: true })
  );
  {
    using _tape = new Tape();
    const inputs = [...leaves.map((x) => x.mul(1)), ...others?.() ?? []], results = [run(...inputs)].flat();
    const signs = tensor(
      Float32Array.from({ length: results[0].size }, (_, i) => (-1) ** i * (i + 1)),
      results[0].shape,
    );
    const loss = results[0].mul(signs).sum();
    change(inputs, results);
    loss.backward();
  }
  return await Promise.all(leaves.map(async ({ grad }) => grad && [...await grad.data()]));
}

for (const [name, op] of Object.entries(OPS)) {
  Deno.test(`${name}: its gradient does not depend on what becomes of its inputs and its result`, async () => {
    await init();
    let count = 0;
    const wanted = await gradients(op, (inputs) => count = inputs.length);
    for (let i = 0; i <= count; i++) { // the last is the result
      const which = (inputs: Tensor[], results: Tensor[]) => i < count ? inputs[i] : results[0];
      assertEquals(await gradients(op, (...all) => which(...all).dispose()), wanted, `without ${i}`);
      const changed = await gradients(op, (...all) => {
        const x = which(...all);
        x.assign(
          x.dtype === "i32" ? tensor(new Int32Array(x.size), x.shape) : tensor(new Float32Array(x.size), x.shape),
        );
      }).catch((error) => error.message);
      if (typeof changed === "string") {
        assert(/was changed in place after it was used|shares its memory with a view/.test(changed), changed);
      } else assertEquals(changed, wanted, `with another ${i}`);
    }
  });

  Deno.test(`${name}: nothing but its result stays`, async () => {
    await init();
    const inputs = [...op.floats.map((shape) => rand(shape, { requiresGrad: true })), ...op.others?.() ?? []];
    const run = () => [op.run(...inputs)].flat();
    for (const x of run()) x.dispose(); // the first one may keep more: kernels, the random state
    expectNoLeaks(() => {
      for (const x of run()) x.dispose();
    });
    if (!op.composed) {
      using _scope = new Scope();
      const before = stats().liveTensors, results = run();
      assertEquals(stats().liveTensors, before + results.length, "in a scope");
    }
    for (const x of inputs) x.dispose();
  });
}
