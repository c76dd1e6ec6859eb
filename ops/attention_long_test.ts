import { assert } from "@std/assert";
import { init, manualSeed, randn, scaledDotProductAttention, softmax, Tape, type Tensor } from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";
import { largestError } from "../testing/compare.ts";

// what GPUs get takes a compiler for CPUs some seconds a kernel
Deno.test("attention: loops that are written out give what loops give", async () => {
  await init();
  try {
    // the last one takes tiles of 64 queries
    for (const [heads, T, D, causal] of [[2, 70, 20, true], [2, 33, 10, false], [256, 70, 20, true]] as const) {
      const results: Float32Array[][] = [];
      for (const unrolled of [false, true]) {
        overrides.unrolled = unrolled;
        manualSeed(T);
        using _tape = new Tape();
        const inputs = [0, 1, 2].map(() => randn([1, heads, T, D], { requiresGrad: true }));
        const o = scaledDotProductAttention(inputs[0], inputs[1], inputs[2], { causal });
        o.backward(randn(o.shape));
        results.push(
          await Promise.all([o, ...inputs.map((x) => x.grad!)].map((x) => x.data() as Promise<Float32Array>)),
        );
      }
      results[0].forEach((want, i) =>
        assert(largestError(results[1][i], want) < 2e-6, `result ${i} of [${heads}, ${T}, ${D}]`)
      );
    }
  } finally {
    overrides.unrolled = null;
  }
});

Deno.test("attention: heads of every size give what primitive ops give", async () => {
  await init();
  const T = 33, S = 65;
  for (const D of [1, 8, 15, 16, 40, 64, 65, 100, 128]) {
    const results: Float32Array[][] = [];
    const primitive = (q: Tensor, k: Tensor, v: Tensor) =>
      softmax(q.matmul(k.permute([0, 2, 1])).mul(1 / Math.sqrt(D))).matmul(v);
    for (const op of [primitive, scaledDotProductAttention]) {
      manualSeed(D);
      using _tape = new Tape();
      const inputs = [T, S, S].map((rows) => randn([2, rows, D], { requiresGrad: true })),
        o = op(...inputs as [Tensor, Tensor, Tensor]);
      o.backward(randn(o.shape));
      results.push(await Promise.all([o, ...inputs.map((x) => x.grad!)].map((x) => x.data() as Promise<Float32Array>)));
    }
    results[0].forEach((want, i) => assert(largestError(results[1][i], want) < 5e-6, `result ${i}, heads of ${D}`));
  }
});
