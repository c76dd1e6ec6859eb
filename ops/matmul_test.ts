import { assertEquals, assertThrows } from "@std/assert";
import {
  conv2d,
  div,
  gelu,
  init,
  linear,
  matmul,
  mul,
  ones,
  randn,
  relu,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import { largestError } from "../testing/compare.ts";
import { integers } from "../testing/loss_reference.ts";
import { checkOps, type OpCase } from "../testing/op.ts";
import { type Array64, elementwise, product, transposed } from "../testing/reference.ts";
import { overrides } from "../kernels/gpu/tuning.ts";
import { type Layer, perceptron } from "./matmul.ts";

/** Sums of k products err by k roundings at worst and by about √k in fact; values are below 4k. */
const CLOSE = { value: 2e-6, gradient: 5e-6, samples: 12 };

const swapped = (shape: number[]) => [...shape.slice(0, -2), shape.at(-1)!, shape.at(-2)!];

/** a · b for operands of these shapes, with each stored transposed or not. */
function multiplied(a: number[], b: number[], transposeA = false, transposeB = false): OpCase {
  return {
    name: `matmul ${transposeA ? "Aᵀ" : "A"}${transposeB ? "Bᵀ" : "B"}`,
    op: (x, y) => matmul(x, y, { transposeA, transposeB }),
    reference: (x, y) => product(transposeA ? transposed(x) : x, transposeB ? transposed(y) : y),
    shapes: [transposeA ? swapped(a) : a, transposeB ? swapped(b) : b],
    ...CLOSE,
  };
}

Deno.test("matmul: sizes around the edges of tiles", async () => {
  const sizes = [ // m, k, n
    [1, 1, 1],
    [1, 7, 1],
    [2, 3, 4],
    [15, 16, 17],
    [16, 17, 16],
    [17, 15, 31],
    [31, 33, 32],
    [32, 32, 33],
    [33, 31, 63],
    [63, 64, 65],
    [65, 63, 64],
    [64, 65, 15],
    [257, 3, 5],
    [5, 257, 3],
    [3, 5, 257],
    [1, 100, 255],
    [255, 100, 1],
  ];
  await checkOps(sizes.map(([m, k, n]) => multiplied([m, k], [k, n])));
});

Deno.test("matmul: transposes and batches", async () => {
  const batches: [number[], number[]][] = [
    [[], []],
    [[2], [2]],
    [[2], []], // one matrix for all
    [[], [2]],
    [[1], [3]],
    [[2, 1], [1, 3]], // both sides broadcast
    [[2, 3], [3]],
  ];
  const flags = [[false, false], [true, false], [false, true], [true, true]];
  await checkOps(
    batches.flatMap(([a, b]) => flags.map(([tA, tB]) => multiplied([...a, 3, 5], [...b, 5, 2], tA, tB))),
  );
  await checkOps(flags.map(([tA, tB]) => multiplied([2, 33, 17], [2, 17, 20], tA, tB)));
});

Deno.test("matmul: vectors count as a row or a column", async () => {
  const row = (x: Array64): Array64 => ({ shape: [1, x.data.length], data: x.data });
  const column = (x: Array64): Array64 => ({ shape: [x.data.length, 1], data: x.data });
  const dot: OpCase = {
    name: "vector · vector",
    op: (a, b) => matmul(a, b),
    reference: (a, b) => ({ ...product(row(a), column(b)), shape: [] }),
    shapes: [[5], [5]],
  };
  const left: OpCase = {
    name: "vector · matrices",
    op: (a, b) => matmul(a, b),
    reference: (a, b) => ({ ...product(row(a), b), shape: [2, 3] }),
    shapes: [[4], [2, 4, 3]],
  };
  const right: OpCase = {
    name: "matrices · vector",
    op: (a, b) => matmul(a, b),
    reference: (a, b) => ({ ...product(a, column(b)), shape: [2, 3] }),
    shapes: [[2, 3, 4], [4]],
  };
  await checkOps([dot, left, right]);
});

Deno.test("matmul: empty operands", async () => {
  await init();
  assertEquals(matmul(zeros([0, 3]), zeros([3, 2])).shape, [0, 2]);
  assertEquals(matmul(zeros([2, 0, 3]), zeros([3, 0])).shape, [2, 0, 0]);
  // a sum over nothing is 0, also where the pool hands out used memory
  zeros([4]).add(7).dispose();
  assertEquals(await matmul(zeros([2, 0]), zeros([0, 2])).array(), [[0, 0], [0, 0]]);
  await checkOps([{ ...multiplied([2, 0], [0, 3]) }, { ...multiplied([0, 2], [2, 3]) }]);
});

Deno.test("matmul: f16 by elements, by vec4s and by eights, in every layout", async () => {
  const { f16 } = await init();
  if (!f16) return void assertThrows(() => zeros([1], { dtype: "f16" }), Error, "shader-f16");
  using _scope = new Scope();
  const whole = (size: number, seed: number) => integers(size, 9, seed).map((x) => x - 4);
  const matrix = (rows: number, columns: number): Array64 => ({
    data: Float64Array.from(whole(rows * columns, rows)),
    shape: [rows, columns],
  });
  const stored = ({ data, shape }: Array64) => tensor(Float16Array.from(data), [...shape]);
  try {
    for (const [m, k, n, scalar] of [[36, 28, 44, true], [36, 28, 44, false], [40, 24, 72, false]] as const) {
      overrides.scalar = scalar;
      const a = matrix(m, k), b = matrix(k, n), want = Array.from(product(a, b).data); // sums of so small integers are exact
      for (const [transposeA, transposeB] of [[false, false], [false, true], [true, false], [true, true]]) {
        const x = stored(transposeA ? transposed(a) : a), y = stored(transposeB ? transposed(b) : b);
        const got = await matmul(x, y, { transposeA, transposeB }).data();
        assertEquals(
          Array.from(got),
          want,
          `${m}×${k}×${n}, ${scalar ? "elements" : "vectors"}, ${transposeA}, ${transposeB}`,
        );
      }
    }
  } finally {
    overrides.scalar = null;
  }
});

Deno.test("matmul: NaN and infinities reach only what they belong to", async () => {
  await init();
  const a = tensor([[NaN, 1], [2, 3], [Infinity, 1]]), b = tensor([[1, 0], [1, 1]]);
  // the third row: ∞·0 is NaN
  assertEquals(await matmul(a, b).array(), [[NaN, NaN], [5, 3], [Infinity, NaN]]);
});

Deno.test("linear: with and without a bias", async () => {
  const shapes = [ // leading dimensions, in, out
    [[3], 5, 4],
    [[], 5, 4],
    [[2, 3], 7, 1],
    [[1], 1, 1],
    [[65], 33, 17],
    [[17], 16, 64],
    [[64], 20, 65],
    [[0], 3, 2],
    [[2, 0], 3, 2],
  ] as [number[], number, number][];
  const apply = (x: Array64, weight: Array64): Array64 => {
    const rows = x.shape.slice(0, -1).reduce((p, n) => p * n, 1);
    const y = product({ shape: [rows, x.shape.at(-1)!], data: x.data }, transposed(weight));
    return { shape: [...x.shape.slice(0, -1), weight.shape[0]], data: y.data };
  };
  await checkOps(shapes.flatMap(([lead, ins, outs]): OpCase[] => [
    {
      name: "linear",
      op: (x, w) => linear(x, w),
      reference: apply,
      shapes: [[...lead, ins], [outs, ins]],
      ...CLOSE,
    },
    {
      name: "linear with bias",
      op: (x, w, b) => linear(x, w, b),
      reference: (x, w, b) => elementwise((y, c) => y + c)(apply(x, w), b),
      shapes: [[...lead, ins], [outs, ins], [outs]],
      ...CLOSE,
    },
  ]));
});

Deno.test("matmul, linear: what they throw", async () => {
  await init();
  const a = zeros([2, 3]);
  assertThrows(() => matmul(a, zeros([2, 3])), TypeError, "matmul: inner sizes must agree, got a of shape [2, 3]");
  assertThrows(() => matmul(a, a, { transposeA: true, transposeB: true }), TypeError, "[2, 3] transposed");
  assertThrows(
    () => matmul(zeros([2, 2, 3]), zeros([3, 3, 2])),
    TypeError,
    "matmul: shapes [2] and [3] do not broadcast",
  );
  assertThrows(() => matmul(zeros([3]), zeros([2, 2])), TypeError, "got a of shape [3] and b of shape [2, 2]");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => linear(a, zeros([4, 3]), 0 as any), TypeError, "linear: bias must be a Tensor, got 0");
  assertThrows(() => matmul(zeros([]), a), TypeError, "matmul: a must have at least 1 dimension");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => matmul(a, a, { transposedB: true } as any), TypeError, "did you mean transposeB?");
  const narrow = "linear: x must have shape [..., 2] for a weight of shape [4, 2], got [2, 3]";
  assertThrows(() => linear(a, zeros([4, 2])), TypeError, narrow);
  assertThrows(() => linear(a, zeros([3])), TypeError, "linear: weight must have shape [out, 3], got [3]");
  assertThrows(() => linear(a, zeros([4, 3]), zeros([3])), TypeError, "linear: bias must have shape [4], got [3]");
});

Deno.test("perceptron: layers, activations and a residual in the products' kernels give what the ops one by one give", async () => {
  const { f16 } = await init();
  const composed = (x: Tensor, layers: Layer[], residual?: Tensor) => {
    const y = layers.reduce((h, { weight, bias, activation }) => {
      const z = matmul(h, weight, { transposeB: true }), y = bias ? z.add(bias) : z;
      return activation === "relu" ? relu(y) : activation === "gelu" ? gelu(y) : y;
    }, x);
    return residual ? y.add(residual) : y;
  };
  const wrong: string[] = [];
  const check = async (
    widths: number[],
    lead: number[],
    activations: Layer["activation"][],
    options: { biases?: boolean; residual?: boolean; dtype?: "f16"; frozen?: string[] } = {},
  ) => {
    using _scope = new Scope();
    const { biases = true, dtype = "f32", frozen = [] } = options;
    const make = async (shape: number[], scale: number) => {
      const values = await randn(shape).mul(scale).data() as Float32Array;
      return dtype === "f16" ? tensor(Float16Array.from(values), shape) : tensor(values, shape);
    };
    const parts: Record<string, Tensor> = { x: await make([...lead, widths[0]], 1) };
    for (let i = 1; i < widths.length; i++) {
      parts[`weight ${i}`] = await make([widths[i], widths[i - 1]], widths[i - 1] ** -0.5);
      if (biases) parts[`bias ${i}`] = await make([widths[i]], 1);
    }
    if (options.residual) parts.residual = await make([...lead, widths.at(-1)!], 1);
    const upstream = await make([...lead, widths.at(-1)!], 1);
    const results = [];
    for (const f of [composed, perceptron]) {
      using _tape = new Tape();
      const leaves = Object.fromEntries(
        Object.entries(parts).map(([name, x]) => {
          const leaf = x.detach();
          leaf.requiresGrad = !frozen.includes(name);
          return [name, leaf];
        }),
      );
      const layers = activations.map((activation, i): Layer => ({
        weight: leaves[`weight ${i + 1}`],
        bias: leaves[`bias ${i + 1}`] ?? null,
        activation,
      }));
      const y = f(leaves.x, layers, leaves.residual);
      const result: Record<string, number[] | null> = { value: Array.from(await y.data(), Number) };
      y.backward(upstream);
      for (const [name, leaf] of Object.entries(leaves)) {
        result[name] = leaf.grad && Array.from(await leaf.grad.data(), Number);
        leaf.grad?.dispose();
      }
      results.push(result);
    }
    const [want, got] = results;
    for (const name of Object.keys(want)) {
      const error = want[name] && got[name] ? largestError(got[name], want[name], 1e-30) : +(want[name] !== got[name]);
      // f16: intermediate results are rounded at other places, 2⁻¹¹ each
      if (!(error <= (dtype === "f16" ? 4e-3 : 3e-6))) {
        wrong.push(`${JSON.stringify([widths, lead, activations, options])} ${name}: ${error}`);
      }
    }
  };
  await check([5, 7], [3], [undefined], { residual: true });
  await check([20, 33, 18], [2, 9], ["gelu", undefined], { residual: true });
  await check([8, 16, 12, 4], [6], ["relu", "relu", undefined]);
  await check([8, 16, 12, 4], [6], ["relu", "gelu", undefined], { biases: false });
  for (const widths of f16 ? [[6, 5, 4], [64, 48, 32]] : []) {
    await check(widths, [70], ["gelu", undefined], { dtype: "f16", residual: true });
  }
  await check([8, 16, 4], [6], ["gelu", undefined], { frozen: ["x", "weight 1", "bias 1"], residual: true });
  await check([8, 16, 4], [6], ["relu", undefined], { frozen: ["weight 1", "weight 2", "bias 1"] });
  await check([8, 16, 4], [6], ["relu", undefined], { frozen: ["weight 1", "weight 2", "bias 2"] });
  await check([4, 8, 3], [0], ["gelu", undefined], { residual: true });
  assertEquals(wrong, []);
});

Deno.test("matmul: more steps than a software driver runs iterations in one thread", async () => {
  await init();
  using _tape = new Tape();
  const rows = 1_200_000, x = zeros([rows, 1]).add(1), w = zeros([1, 1], { requiresGrad: true });
  assertEquals(await matmul(x, x, { transposeA: true }).item(), rows);
  linear(x, w).sum().backward();
  assertEquals(await w.grad!.item(), rows);
});

Deno.test("linear: without input features the bias has its gradient all the same", async () => {
  await init();
  using _tape = new Tape();
  const weight = zeros([3, 0], { requiresGrad: true }), bias = tensor([1, 2, 3], { requiresGrad: true });
  const y = linear(zeros([2, 0]), weight, bias);
  assertEquals(await y.array(), [[1, 2, 3], [1, 2, 3]]);
  y.sum().backward();
  assertEquals(await bias.grad!.array(), [2, 2, 2]);
  assertEquals(weight.grad!.shape, [3, 0]);
});

Deno.test("matmul, linear, conv2d, mul, div: what no wanted gradient needs may change before the backward pass", async () => {
  await init();
  using _scope = new Scope();
  const ops: [string, number[], number[], (x: Tensor, w: Tensor) => Tensor][] = [
    ["matmul", [2, 3], [3, 2], matmul],
    ["linear", [2, 3], [2, 3], linear],
    ["conv2d", [1, 1, 3, 3], [1, 1, 2, 2], conv2d],
    ["mul", [2, 2], [2, 2], mul],
    ["div", [2, 2], [2, 2], (x, w) => div(w, x)],
  ];
  for (const [name, shapeX, shapeW, op] of ops) {
    const x = randn(shapeX).keep(), w = randn(shapeW).keep(), one = zeros([1]).add(1);
    for (const [leaf, other] of [[w, x], [x, w]]) {
      if (name === "div" && leaf === x) continue; // which the divisor's gradient needs
      leaf.requiresGrad = true;
      const gradient = async (meanwhile: () => void) => {
        leaf.grad = null;
        using _tape = new Tape();
        const y = op(x, w);
        meanwhile();
        y.backward(one.expand(y.shape));
        return await leaf.grad!.data();
      };
      const want = await gradient(() => {});
      const values = leaf.detach().mul(1);
      assertEquals(await gradient(() => leaf.assign(values.mul(2))), want, name);
      leaf.assign(values);
      assertThrows(
        () => {
          using _tape = new Tape();
          const y = op(x, w);
          other.assign(other.mul(1));
          y.backward(one.expand(y.shape));
        },
        Error,
        "changed in place",
      );
      leaf.requiresGrad = false;
    }
  }
});

Deno.test("perceptron: a weight before which nothing takes a gradient may change before the backward pass", async () => {
  await init();
  using _scope = new Scope();
  const [x, w1, b1, w2] = [[2, 3], [4, 3], [4], [3, 4]].map((shape) => randn(shape));
  const layers: Layer[] = [{ weight: w1, bias: b1, activation: "relu" }, { weight: w2 }];
  for (const [trained, changeable] of [[[w2], [x, w1, w2]], [[b1], [x, w1]], [[w1], [w1]], [[x], [x]]]) {
    for (const leaf of trained) leaf.requiresGrad = true;
    for (const changed of [x, w1, w2]) {
      using _tape = new Tape();
      const y = perceptron(x, layers).sum();
      changed.assign(changed.mul(1));
      if (changeable.includes(changed)) y.backward();
      else assertThrows(() => y.backward(), Error, "changed in place");
    }
    for (const leaf of trained) leaf.requiresGrad = false;
  }
});

Deno.test("matmul: a sum that a software adapter would not finish is cut into pieces, or an error where it cannot be", async () => {
  const { isSoftware } = await init(), depth = 1_060_000, x = ones([1, depth]), bias = zeros([1]);
  assertEquals(await linear(x, x).item(), depth);
  if (isSoftware) assertThrows(() => linear(x, x, bias), RangeError, "sums at most 960000 products");
  else assertEquals(await linear(x, x, bias).item(), depth);
});

Deno.test("matmul: a transposed vector is the vector", async () => {
  await init();
  using _scope = new Scope();
  assertEquals(await matmul(tensor([1, 2]), tensor([[1], [1]]), { transposeA: true }).array(), [3]);
});

Deno.test("matmul: long and narrow products, which may be cut, and what they leave", async () => {
  await init();
  const depth = 20_000, [a, b] = [ones([2, depth]), ones([depth, 2])];
  matmul(a, b).dispose();
  const before = stats().liveBytes, y = matmul(a, b);
  assertEquals(await y.array(), [[depth, depth], [depth, depth]]);
  y.dispose();
  assertEquals(stats().liveBytes, before);
  const [c, d] = [ones([2, 1, depth]), ones([2, depth, 3])], z = matmul(c, d);
  assertEquals(new Set(await z.data()), new Set([depth]));
  for (const x of [a, b, c, d, z]) x.dispose();
});
