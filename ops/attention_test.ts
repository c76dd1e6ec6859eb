import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import {
  type AttentionOptions,
  full,
  gradcheck,
  init,
  manualSeed,
  ones,
  optim,
  randn,
  scaledDotProductAttention,
  Scope,
  slice,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import { largestError } from "../testing/compare.ts";
import { random } from "../testing/op.ts";
import { type Array64, at, indexed, sizeOf } from "../testing/reference.ts";
import { packedAttention } from "./attention.ts";

type Name = "q" | "k" | "v" | "dO";

interface Case {
  /** Leading dimensions; [2, 2] unless given. */
  lead?: number[];
  T: number;
  S: number;
  D: number;
  causal?: boolean;
  scale?: number;
  mask?: { shape: number[]; dtype: "i32" | "f32"; data: number[] };
  dtype?: "f32" | "f16";
}

/** O = W·V with W = softmax(scale·Q·Kᵀ + mask)∘kept, composed step by step in float64, and the gradients by the chain rule. */
function reference(x: Record<Name, Array64>, { causal = false, scale, mask, kept }: Case & { kept?: Float64Array }) {
  const [T, D] = x.q.shape.slice(-2), S = x.k.shape.at(-2)!, heads = sizeOf(x.q.shape.slice(0, -2));
  const factor = scale ?? 1 / Math.sqrt(D), { q, k, v, dO } = x;
  const masks = mask && indexed([...x.q.shape.slice(0, -2), T, S], (i) =>
    at({
      shape: mask.shape,
      data: Float64Array.from(mask.data, (m) => mask.dtype === "f32" ? m : m ? 0 : -Infinity),
    }, i));
  const [o, dQ, dK, dV] = [q, q, k, v].map(({ data }) => new Float64Array(data.length));
  const dot = (a: Float64Array, i: number, b: Float64Array, j: number) => {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += a[i * D + d] * b[j * D + d];
    return sum;
  };
  const add = (to: Float64Array, i: number, share: number, from: Float64Array, j: number) => {
    for (let d = 0; d < D; d++) to[i * D + d] += share * from[j * D + d];
  };
  for (let row = 0; row < heads * T; row++) {
    const first = Math.floor(row / T) * S;
    const scores = Array.from(
      { length: S },
      (_, j) =>
        causal && j > row % T
          ? -Infinity
          : factor * dot(q.data, row, k.data, first + j) + (masks ? masks.data[row * S + j] : 0),
    );
    const largest = Math.max(...scores);
    if (largest === -Infinity) continue; // sees no key
    const weights = scores.map((s) => Math.exp(s - largest)), total = weights.reduce((a, b) => a + b, 0);
    // the gradient of a softmax: w·(dW − Σ w·dW)
    const w = weights.map((e) => e / total), share = w.map((p, j) => p * (kept ? kept[row * S + j] : 1));
    const dW = w.map((_, j) => dot(dO.data, row, v.data, first + j) * (kept ? kept[row * S + j] : 1));
    const mean = w.reduce((sum, p, j) => sum + p * dW[j], 0);
    for (let j = 0; j < S; j++) {
      const slope = w[j] * (dW[j] - mean) * factor;
      add(o, row, share[j], v.data, first + j);
      add(dQ, row, slope, k.data, first + j);
      add(dK, first + j, slope, q.data, row);
      add(dV, first + j, share[j], dO.data, row);
    }
  }
  return { o, dQ, dK, dV };
}

const ARRAYS = { f32: Float32Array, f16: Float16Array };

/** Inputs between −2 and 2 as the dtype holds them. */
function inputs({ lead = [2, 2], T, S, D, dtype = "f32" }: Case, seed = 1): Record<Name, Array64> {
  const draw = random(seed), Numbers = ARRAYS[dtype];
  const make = (n: number): Array64 => {
    const shape = [...lead, n, D];
    return {
      shape,
      data: Float64Array.from(Numbers.from(Array.from({ length: sizeOf(shape) }, () => 4 * draw() - 2))),
    };
  };
  return { q: make(T), k: make(S), v: make(S), dO: make(T) };
}

/** Runs the op and compares value and gradients; `limit` is the largest deviation as a share of the largest number. */
async function complaints(c: Case, limit: number, more: AttentionOptions = {}, kept?: Float64Array): Promise<string[]> {
  const { causal, scale, mask, dtype = "f32" } = c, x = inputs(c), want = reference(x, { ...c, kept });
  using _tape = new Tape();
  const leaf = ({ data, shape }: Array64) => tensor(ARRAYS[dtype].from(data), shape, { requiresGrad: true });
  const q = leaf(x.q), k = leaf(x.k), v = leaf(x.v), options: AttentionOptions = { ...more };
  if (causal !== undefined) options.causal = causal;
  if (scale !== undefined) options.scale = scale;
  if (mask) options.mask = tensor(mask.data, mask.shape, { dtype: mask.dtype });
  const o = scaledDotProductAttention(q, k, v, options);
  o.backward(tensor(ARRAYS[dtype].from(x.dO.data), x.dO.shape));
  const found: string[] = [];
  const got: [string, Tensor, Float64Array][] = [
    ["o", o, want.o],
    ["dQ", q.grad!, want.dQ],
    ["dK", k.grad!, want.dK],
    ["dV", v.grad!, want.dV],
  ];
  for (const [name, tensor, wanted] of got) {
    // dQ and dK of a query with one key are 0, the difference of numbers below 10
    const error = largestError(await tensor.data(), wanted, 1);
    const { T, S, D } = c;
    if (!(error <= limit)) {
      found.push(`T ${T} S ${S} D ${D} causal ${causal} ${name}: off by ${error.toExponential(1)}`);
    }
  }
  return found;
}

/** Some 80 roundings of f32 (6e-8): sums of up to 128 terms in exponents, and sums of up to 65 behind them. */
const CLOSE = 5e-6;

const LENGTHS = [1, 7, 31, 32, 33, 65];

Deno.test("attention: lengths on and off the tiles' edges, causal and not", async () => {
  await init();
  const wrong: string[] = [];
  for (const T of LENGTHS) {
    for (const S of LENGTHS) {
      for (const causal of [false, true]) wrong.push(...await complaints({ lead: [2], T, S, D: 8, causal }, CLOSE));
    }
  }
  assertEquals(wrong, []);
});

Deno.test("attention: sizes of heads", async () => {
  await init();
  const wrong: string[] = [];
  for (const D of [1, 16, 40]) { // the others are in the long tests: each takes three pipelines
    wrong.push(...await complaints({ T: 33, S: 65, D }, CLOSE));
    wrong.push(...await complaints({ lead: [], T: 40, S: 40, D, causal: true }, CLOSE));
  }
  assertEquals(wrong, []);
});

Deno.test("attention: scale", async () => {
  await init();
  const wrong: string[] = [];
  for (const scale of [0, 1, -0.5]) wrong.push(...await complaints({ T: 9, S: 10, D: 8, scale }, CLOSE));
  // scores of ±400 make one weight nearly 1: errors of the scores, 400 roundings, become relative errors of the weights
  wrong.push(...await complaints({ T: 9, S: 10, D: 8, scale: 12 }, 12 * 400 * 6e-8));
  assertEquals(wrong, []);
});

Deno.test("attention: masks and how they broadcast", async () => {
  await init();
  const T = 7, S = 33, draw = random(5), wrong: string[] = [];
  for (
    const shape of [[T, S], [1, S], [T, 1], [S], [1, 1, T, S], [3, 1, 1, S], [2, T, S], [3, 2, T, S], [3, 1, T, S]]
  ) {
    for (const dtype of ["i32", "f32"] as const) {
      const data = Array.from(
        { length: sizeOf(shape) },
        dtype === "f32" ? () => Math.fround(4 * draw() - 2) : () => draw() < 0.7 ? 1 : 0,
      );
      for (const causal of [false, true]) {
        const found = await complaints({ lead: [3, 2], T, S, D: 8, causal, mask: { shape, dtype, data } }, CLOSE);
        wrong.push(...found.map((complaint) => `mask ${dtype} [${shape}]: ${complaint}`));
      }
    }
  }
  assertEquals(wrong, []);
});

Deno.test("attention: a query that sees no key gives 0 and finite gradients", async () => {
  await init();
  const T = 5, S = 40, wrong: string[] = [];
  for (const dtype of ["i32", "f32"] as const) {
    const [seen, hidden] = dtype === "i32" ? [1, 0] : [0, -Infinity];
    const data = Array.from({ length: T * S }, (_, i) => {
      const query = Math.floor(i / S), key = i % S;
      return query === 1 || (query === 3 && key < 35) ? hidden : seen; // query 3 sees nothing in its first tile
    });
    wrong.push(...await complaints({ T, S, D: 8, mask: { shape: [T, S], dtype, data } }, CLOSE));
  }
  wrong.push(...await complaints({ T, S: 0, D: 8 }, CLOSE)); // no keys at all
  assertEquals(wrong, []);
});

Deno.test("attention: roundings do not grow with the number of keys", async () => {
  await init();
  using _tape = new Tape();
  const T = 4096, [q, k, v] = [0, 0, 0.1].map((x) => full([1, 1, T, 4], x, { requiresGrad: true }));
  const o = scaledDotProductAttention(q, k, v), dO = full([1, 1, T, 4], 0.1);
  o.backward(dO);
  for (const mean of [o, v.grad!]) { // of equal numbers; 64 sums of tiles err by at most 64 half units, 4096 numbers by 3e-5
    assertAlmostEquals((await mean.data())[0] / Math.fround(0.1), 1, 64 * 2 ** -24);
  }
});

Deno.test("attention: NaN in a query, a key or the mask reaches every result that sees it", async () => {
  await init();
  const nan = tensor([[NaN, 0], [0, 1]]), one = tensor([[1, 0], [0, 1]]), v = tensor([[1, 2], [3, 4]]);
  const missing = async (y: Tensor) => Array.from(await y.data(), Number.isNaN);
  assertEquals(await missing(scaledDotProductAttention(nan, one, v)), [true, true, false, false]);
  assertEquals(await missing(scaledDotProductAttention(one, nan, v)), [true, true, true, true]);
  assertEquals(await missing(scaledDotProductAttention(one, one, v, { mask: nan })), [true, true, false, false]);
});

Deno.test("attention: f16", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const wrong: string[] = [];
  // sums are f32: what is left is the rounding of results (2⁻¹¹) and of the stored o in the gradient's Σ dO·O, twice that
  for (const causal of [false, true]) {
    wrong.push(...await complaints({ T: 33, S: 40, D: 15, causal, dtype: "f16" }, 1e-3));
  }
  assertEquals(wrong, []);
});

Deno.test("attention: dropout keeps the expectation", async () => {
  await init();
  manualSeed(1);
  using _scope = new Scope();
  const T = 64, S = 100, D = 8, p = 0.3;
  // equal weights 1/S and values 1: each query's result is its share of kept keys over 1 − p
  const o = scaledDotProductAttention(zeros([2, T, D]), zeros([2, S, D]), ones([2, S, D]), { dropout: p });
  const data = Array.from(await o.data()), shares = data.filter((_, i) => i % D === 0);
  const mean = shares.reduce((a, b) => a + b) / shares.length;
  const deviation = Math.sqrt(p / (1 - p) / S); // of one query's share
  assert(Math.abs(mean - 1) < 5 * deviation / Math.sqrt(shares.length), `${mean}`);
  const spread = Math.sqrt(shares.reduce((sum, x) => sum + (x - 1) ** 2, 0) / shares.length);
  // 128 shares give their spread to 1/√256 = 6 %; masks of equal queries or heads would be far off
  assert(Math.abs(spread / deviation - 1) < 5 / 16, `${spread}, wanted ${deviation}`);
  assert(shares.slice(0, T).some((x, i) => x !== shares[T + i]), "heads have masks of their own");
});

Deno.test("attention: with all weights dropped values and gradients are 0", async () => {
  await init();
  using _tape = new Tape();
  const inputs = [3, 5, 5].map((rows) => randn([2, rows, 8], { requiresGrad: true })), [q, k, v] = inputs;
  const o = scaledDotProductAttention(q, k, v, { dropout: 1 });
  o.sum().backward();
  for (const x of [o, ...inputs.map((x) => x.grad!)]) assertEquals((await x.data()).findIndex((y) => y !== 0), -1);
});

Deno.test("attention: backward drops the weights that forward dropped", async () => {
  await init();
  const T = 33, S = 40, D = 8, lead = [2], wrong: string[] = [];
  for (const p of [0.25, 0.9]) {
    // with equal weights and unit vectors for values the result is the mask itself, D keys at a time; the seed gives it again
    const kept = new Float64Array(2 * T * S);
    for (let first = 0; first < S; first += D) {
      using _scope = new Scope();
      manualSeed(3);
      const units = indexed([...lead, S, D], ([, key, d]) => key === first + d ? 1 : 0);
      const v = tensor(Float32Array.from(units.data), units.shape);
      const part = await scaledDotProductAttention(zeros([...lead, T, D]), zeros(units.shape), v, { dropout: p })
        .data();
      part.forEach((x, i) => kept[Math.floor(i / D) * S + first + i % D] = x * S);
    }
    assertEquals(new Set(Array.from(kept, (x) => x.toFixed(4))), new Set(["0.0000", (1 / (1 - p)).toFixed(4)]));
    manualSeed(3);
    wrong.push(...await complaints({ lead, T, S, D }, CLOSE, { dropout: p }, kept));
  }
  assertEquals(wrong, []);
});

Deno.test("attention: gradcheck, also with dropout", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(4);
  const [q, k, v] = [randn([1, 3, 2]), randn([1, 2, 2]), randn([1, 2, 2])];
  for (const dropout of [0, 0.5]) {
    const { ok, errors } = await gradcheck((q, k, v) => {
      manualSeed(9); // the same mask each time
      return scaledDotProductAttention(q, k, v, { dropout });
    }, [q, k, v]);
    assert(ok, `dropout ${dropout}: ${errors}`);
  }
});

Deno.test("attention: one tensor for q, k and v, a parameter of an optimizer", async () => {
  await init();
  const { q } = inputs({ lead: [2], T: 9, S: 9, D: 8 });
  const x = { q, k: q, v: q, dO: indexed(q.shape, () => 1) }, { dQ, dK, dV } = reference(x, { T: 9, S: 9, D: 8 });
  const leaf = tensor(Float32Array.from(q.data), q.shape, { requiresGrad: true }).keep();
  const optimizer = new optim.SGD([leaf], { lr: 1 });
  {
    using _tape = new Tape();
    scaledDotProductAttention(leaf, leaf, leaf).sum().backward();
    const error = largestError(await leaf.grad!.data(), dQ.map((g, i) => g + dK[i] + dV[i]));
    assert(error <= CLOSE, `${error}`);
  }
  optimizer.dispose();
  leaf.dispose();
});

Deno.test("attention: gradients only where they are wanted", async () => {
  await init();
  const x = inputs({ lead: [2], T: 5, S: 6, D: 8 });
  const all = async (wants: boolean[]) => {
    using _tape = new Tape();
    const leaves = [x.q, x.k, x.v].map(({ data, shape }, i) =>
      tensor(Float32Array.from(data), shape, { requiresGrad: wants[i] })
    );
    const [q, k, v] = leaves;
    scaledDotProductAttention(q, k, v).sum().backward();
    return await Promise.all(leaves.map((t) => t.grad?.array() ?? null));
  };
  const whole = await all([true, true, true]);
  for (const i of [0, 1, 2]) {
    assertEquals(await all([0, 1, 2].map((j) => j === i)), whole.map((g, j) => j === i ? g : null));
  }
});

Deno.test("attention: no buffer as large as the weights", async () => {
  await init();
  const T = 1024, D = 16; // the weights would take 4 MiB, q 64 KiB
  const original = GPUDevice.prototype.createBuffer;
  let largest = 0;
  GPUDevice.prototype.createBuffer = function (this: GPUDevice, descriptor: GPUBufferDescriptor) {
    largest = Math.max(largest, descriptor.size);
    return original.call(this, descriptor);
  };
  try {
    using _tape = new Tape();
    const [q, k, v] = [0, 1, 2].map(() => tensor(new Float32Array(T * D), [1, T, D], { requiresGrad: true }));
    scaledDotProductAttention(q, k, v, { causal: true, dropout: 0.1 }).sum().backward();
    await v.grad!.data();
  } finally {
    GPUDevice.prototype.createBuffer = original;
  }
  assert(largest >= 4 * T * D, "buffers were made"); // else this shows nothing
  assert(largest < 2 * 4 * T * D, `${largest} bytes`);
});

Deno.test("attention: what it throws", async () => {
  const { isSoftware } = await init();
  using _scope = new Scope();
  const op = "scaledDotProductAttention", q = zeros([2, 3, 4]), k = zeros([2, 5, 4]);
  for (const x of [zeros([1, 129]), zeros([1, 0])]) {
    assertThrows(() => scaledDotProductAttention(x, x, x), RangeError, `${op}: q must have 1 to 128 features`);
  }
  for (const shape of [[2, 5, 3], [3, 5, 4], [5, 4], [1, 5, 4], [2, 1, 5, 4]]) {
    assertThrows(() => scaledDotProductAttention(q, zeros(shape), k), TypeError, `${op}: k must have shape [2, `);
    assertThrows(() => scaledDotProductAttention(q, k, zeros(shape)), TypeError, `${op}: v must have shape [2, 5, 4]`);
  }
  assertThrows(
    () => scaledDotProductAttention(q, k, zeros([2, 6, 4])),
    TypeError,
    `${op}: v must have shape [2, 5, 4]`,
  );
  assertThrows(
    () => scaledDotProductAttention(zeros([4]), k, k),
    TypeError,
    `${op}: q must have at least 2 dimensions`,
  );
  const mask = (shape: number[]) => () => scaledDotProductAttention(q, k, k, { mask: zeros(shape) });
  for (const shape of [[5, 3], [3, 4], [3, 3, 5], [2, 1, 3, 5], [5, 2, 3], [30]]) {
    assertThrows(mask(shape), TypeError, op);
  }
  if (isSoftware) { // where a longer loop would stop without a word
    const longest = zeros([1, 30_000, 128]), one = zeros([1, 1, 128], { requiresGrad: true });
    const most = `${op}: a software adapter takes at most `;
    assertThrows(() => scaledDotProductAttention(one, longest, longest), RangeError, `${most}24`);
    using _tape = new Tape();
    const y = scaledDotProductAttention(longest, one, one).sum();
    assertThrows(() => y.backward(), RangeError, `${most}16`);
  }
  const u32 = zeros([3, 5], { dtype: "u32" });
  assertThrows(
    () => scaledDotProductAttention(q, k, k, { mask: u32 }),
    TypeError,
    `${op}: mask must have dtype f32 or i32`,
  );
  assertThrows(() => scaledDotProductAttention(q, k, k, { dropout: 1.1 }), RangeError, `${op}: dropout must be`);
  assertThrows(() => scaledDotProductAttention(q, k, k, { scale: NaN }), RangeError, `${op}: scale must be`);
  // deno-lint-ignore no-explicit-any
  assertThrows(() => scaledDotProductAttention(q, k, k, { causal: 1 } as any), TypeError, `${op}: causal must be`);
  // deno-lint-ignore no-explicit-any
  assertThrows(() => scaledDotProductAttention(q, k, k, { isCausal: true } as any), TypeError, "unknown option");
});

Deno.test("packedAttention: queries, keys and values side by side give what three tensors give", async () => {
  await init();
  for (
    const [batches, length, heads, depth, causal, dropout] of [[2, 5, 2, 4, true, 0], [1, 40, 3, 5, false, 0], [
      2,
      9,
      1,
      8,
      true,
      0.4,
    ]] as const
  ) {
    using _scope = new Scope();
    const width = heads * depth, packed = randn([batches, length, 3 * width]), dO = randn([batches, length, width]);
    const both = [];
    for (const fused of [false, true]) {
      manualSeed(7);
      using _tape = new Tape();
      const all = packed.detach();
      all.requiresGrad = true;
      const moved = all.reshape([batches, length, 3, heads, depth]).permute([2, 0, 3, 1, 4]);
      const part = (i: number) => slice(moved, [[i, i + 1]]).reshape([batches, heads, length, depth]);
      const o = fused
        ? packedAttention(all, heads, { causal, dropout })
        : scaledDotProductAttention(part(0), part(1), part(2), { causal, dropout }).permute([0, 2, 1, 3]).reshape([
          batches,
          length,
          width,
        ]);
      o.backward(dO);
      both.push([await o.data(), await all.grad!.data()] as [Float32Array, Float32Array]);
      all.grad!.dispose();
    }
    const [[o, d], [fusedO, fusedD]] = both;
    assert(largestError(fusedO, o) < 2e-6, `value, ${[batches, length, heads, depth]}`);
    assert(largestError(fusedD, d) < 5e-6, `gradient, ${[batches, length, heads, depth]}`);
  }
});

Deno.test("attention: rows behind the last query give nothing, whatever lies there", async () => {
  await init();
  const q = tensor([[-200, -200, -200, -200]], { requiresGrad: true });
  const [k, v] = [1, 2].map(() => ones([3, 4], { requiresGrad: true }));
  for (const causal of [false, true]) {
    using _tape = new Tape();
    const loss = scaledDotProductAttention(q, k, v, { causal }).sum();
    for (const x of Array.from({ length: 12 }, () => full([64], NaN))) x.dispose();
    loss.backward();
  }
  for (const { grad } of [q, k, v]) assert((await grad!.data()).every(Number.isFinite), `${await grad!.data()}`);
  for (const x of [q, k, v]) x.dispose();
});
