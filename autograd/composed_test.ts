import { assert, assertEquals } from "@std/assert";
import * as limbeck from "@limbeck/limbeck";
import { init, nn, noGrad, optim, stats, tensor } from "@limbeck/limbeck";
import { gpu } from "../kernels/gpu/gpu.ts";
import { tensorsIn } from "./tensor.ts";

Deno.test("composed: without a scope an op leaves its result alone, and nothing where memory is refused in its middle", async () => {
  const { f16: hasHalves } = await init();
  const inputs = noGrad(() => ({
    x: limbeck.rand([4, 6]),
    y: limbeck.rand([4, 6]),
    v: limbeck.rand([6]),
    w: limbeck.rand([6, 6]),
    q: limbeck.rand([2, 4, 6]),
    several: limbeck.rand([2, 1, 4, 6]),
    mask: limbeck.ones([2, 1, 4]),
    image: limbeck.rand([1, 2, 4, 6]),
    index: tensor(new Int32Array([0, 5, 2, 3])),
    tokens: tensor(new Int32Array([0, 5, 2, 3]), [1, 4]),
    sign: tensor([1, -1, 1, -1]),
    bound: tensor([1, 2, 3], { requiresGrad: true }),
    halves: hasHalves ? limbeck.rand([4, 6], { dtype: "f16" }) : null,
  }));
  const { x, y, v, w, q, several, mask, image, index, tokens, sign, bound, halves } = inputs;
  const linear = new nn.Linear(6, 6), attention = new nn.MultiHeadAttention(6, 2);
  const block = new nn.TransformerBlock(6, 2, { dropout: 0.5 });
  const gpt = new nn.Gpt({ vocabulary: 6, context: 4, layers: 1, width: 6, heads: 2 });
  const mlp = new nn.Sequential(linear, limbeck.gelu, linear, limbeck.relu, linear);
  const steps = new nn.Sequential(linear, (x: limbeck.Tensor) => x.mul(2).add(1), new nn.Dropout(), linear);
  const sides = [[x, y], ...halves ? [[halves, halves]] : []];
  const losses: [string, () => unknown][] = sides.flatMap(([x, y]) =>
    ([
      ["mseLoss", () => limbeck.mseLoss(x, y)],
      ["l1Loss", () => limbeck.l1Loss(x, y, { reduction: "sum" })],
      ["binaryCrossEntropyWithLogits", () => limbeck.binaryCrossEntropyWithLogits(x, y)],
      ["smoothL1Loss", () => limbeck.smoothL1Loss(x, y)],
      ["klDiv", () => limbeck.klDiv(x, y, { reduction: "batchmean" })],
      ["nllLoss", () => limbeck.nllLoss(x, index)],
      ["cosineSimilarity", () => limbeck.cosineSimilarity(x, y)],
      ["cosineEmbeddingLoss", () => limbeck.cosineEmbeddingLoss(x, y, sign)],
      ["entropy", () => limbeck.entropy(x, { temperature: 2 })],
      ["crossEntropyOfDistributions", () => limbeck.crossEntropyOfDistributions(x, y)],
      ["gaussianKl", () => limbeck.gaussianKl(x, y)],
      ["gaussianKl of four", () => limbeck.gaussianKl(x, y, y, x)],
      ["crossEntropy", () => limbeck.crossEntropy(x, index, { returnAccuracy: true, returnZLoss: true })],
      ["forwardKl", () => limbeck.forwardKl(x, y)],
      ["distillation", () => limbeck.distillation(x, y, index, { returnParts: true })],
    ] as [string, () => unknown][]).map(([name, fn]): [string, () => unknown] => [`${name} of ${x.dtype}`, fn])
  );
  const ops: [string, () => unknown][] = [
    ...losses,
    ["linearCrossEntropy", () => limbeck.linearCrossEntropy(x, w, index, { chunkSize: 2, returnPredictions: true })],
    ["linearDistillation", () => limbeck.linearDistillation(x, w, y, w, { chunkSize: 2 })],
    ["softmax", () => limbeck.softmax(x, 0)],
    ["logSoftmax", () => limbeck.logSoftmax(q, 1)],
    ["variance", () => limbeck.variance(q, { dim: [0, 2] })],
    ["mean", () => limbeck.mean(q, { dim: [0, 2] })],
    ["max", () => limbeck.max(q, { dim: [0, 2] })],
    ["stack", () => limbeck.stack([x, y])],
    ["concat", () => limbeck.concat([x, y])],
    ["triu", () => limbeck.triu(x)],
    ["oneHot", () => limbeck.oneHot(index, 6)],
    ["matmul of vectors", () => limbeck.matmul(v, v)],
    ["matmul of one for all", () => limbeck.matmul(q, w)],
    ["matmul, broadcast", () => limbeck.matmul(several, q, { transposeB: true })],
    ["layerNorm", () => limbeck.layerNorm(x, v, v)],
    ["attention", () => limbeck.scaledDotProductAttention(q, q, q, { mask, dropout: 0.5 })],
    ["maxPool2d", () => limbeck.maxPool2d(image, { kernel: 2 })],
    ["dropout", () => limbeck.dropout(x)],
    ["randn", () => limbeck.randn([4])],
    ["clipGradNorm", () => {
      bound.grad = bound;
      try {
        return optim.clipGradNorm([bound], 1);
      } finally {
        bound.grad = null;
      }
    }],
    ["Sequential", () => mlp.forward(x)],
    ["Sequential of steps", () => steps.forward(x)],
    ["MultiHeadAttention", () => attention.forward(q)],
    ["its project", () => attention.project(q)],
    ["TransformerBlock", () => block.forward(q)],
    ["its feedForward", () => block.feedForward(q)],
    ["Gpt", () => gpt.forward(tokens)],
    ["its hiddenStates", () => gpt.hiddenStates(tokens)],
  ];
  const { pool } = gpu(), take = pool.take.bind(pool), wrong: string[] = [];
  for (const [name, fn] of ops) {
    const live = () => [stats().liveTensors, stats().liveBytes], first = live();
    let done = false;
    for (let allowed = 0; !done; allowed++) {
      let left = allowed;
      pool.take = (...of) => {
        if (left-- === 0) throw new RangeError("refused");
        return take(...of);
      };
      try {
        for (const x of tensorsIn(fn())) x.dispose();
        done = true;
      } catch (error) {
        assert(error instanceof RangeError && error.message === "refused", `${name}: ${error}`);
      } finally {
        pool.take = take;
      }
      if (`${live()}` !== `${first}`) {
        wrong.push(`${name}, ${done ? "done" : `after ${allowed}`}: ${live()} for ${first}`);
        break;
      }
    }
  }
  for (const x of [linear, attention, block, gpt, ...tensorsIn(inputs)]) x.dispose();
  assertEquals(wrong, []);
});
