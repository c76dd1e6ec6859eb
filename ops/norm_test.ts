import { assert, assertEquals, assertThrows } from "@std/assert";
import { full, init, layerNorm, ones, rmsNorm, Scope, Tape, tensor, zeros } from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";
import { largestError } from "../testing/compare.ts";
import { checkOps, random } from "../testing/op.ts";
import { elementwise, lines, product } from "../testing/reference.ts";

type Op = "layerNorm" | "rmsNorm";

const sum = (n: number, f: (i: number) => number) => {
  let total = 0;
  for (let i = 0; i < n; i++) total += f(i);
  return total;
};

/** Value and gradients in float64: with h = (x − mean)·rstd and g = dY·weight, dX = rstd·(g − mean(g) − h·mean(g·h)). */
function reference(op: Op, width: number, x: number[], weight: number[], bias: number[], dY: number[], eps: number) {
  const y: number[] = [], dX: number[] = [], dWeight = weight.map(() => 0), dBias = bias.map(() => 0);
  for (let at = 0; at < x.length; at += width) {
    const layer = op === "layerNorm", mean = layer ? sum(width, (c) => x[at + c]) / width : 0;
    const rstd = 1 / Math.sqrt(sum(width, (c) => (x[at + c] - mean) ** 2) / width + eps);
    const h = (c: number) => (x[at + c] - mean) * rstd, g = (c: number) => dY[at + c] * weight[c];
    const meanG = layer ? sum(width, g) / width : 0, meanGH = sum(width, (c) => g(c) * h(c)) / width;
    for (let c = 0; c < width; c++) {
      y.push(h(c) * weight[c] + (layer ? bias[c] : 0));
      dX.push(rstd * (g(c) - meanG - h(c) * meanGH));
      dWeight[c] += dY[at + c] * h(c);
      dBias[c] += dY[at + c];
    }
  }
  return { y, dX, dWeight, dBias };
}

/** What is off by more than the limits, for one op and shape. */
async function complaints(
  op: Op,
  rows: number,
  width: number,
  { offset = 0, eps = 1e-5, value = 2e-6, gradient = 5e-6 } = {}, // some 30 roundings of f32 (6e-8), and twice as many
): Promise<string[]> {
  const draw = random(rows + width);
  const numbers = (n: number, middle = 0) => Array.from({ length: n }, () => Math.fround(middle + 4 * draw() - 2));
  const x = numbers(rows * width, offset), weight = numbers(width), bias = numbers(width), dY = numbers(rows * width);
  const want = reference(op, width, x, weight, bias, dY, eps);
  using _tape = new Tape();
  const leaf = (values: number[], shape: number[]) => tensor(values, shape, { requiresGrad: true });
  const [tx, tw, tb] = [leaf(x, [rows, width]), leaf(weight, [width]), leaf(bias, [width])];
  const y = op === "layerNorm" ? layerNorm(tx, tw, tb, { eps }) : rmsNorm(tx, tw, { eps });
  y.backward(tensor(dY, [rows, width]));
  const found: string[] = [];
  const compare = (what: string, got: ArrayLike<number>, wanted: number[], limit: number, floor = 1e-30) => {
    const error = largestError(got, wanted, floor);
    if (!(error <= limit)) found.push(`${op} [${rows},${width}] ${what} is off by ${error.toExponential(1)}`);
  };
  compare("value", await y.data(), want.y, value);
  // the gradient of one or two numbers is nearly 0, a difference of terms as large as rstd·g, g at most 4: deviations are shares of that
  compare("dX", await tx.grad!.data(), want.dX, gradient, width < 3 ? 4 * (width === 1 ? eps ** -0.5 : 1) : 1e-30);
  compare("dWeight", await tw.grad!.data(), want.dWeight, gradient, 1);
  if (op === "layerNorm") compare("dBias", await tb.grad!.data(), want.dBias, gradient, 1);
  return found;
}

const WIDTHS = [1, 2, 3, 7, 8, 255, 256, 257, 1000, 1027];

for (const [threads, quads] of [[256, 8], [8, 1], [256, 0]]) {
  Deno.test(`norm: widths, ${quads} vec4s of rows in registers of ${threads} threads`, async () => {
    await init();
    const wrong: string[] = [];
    overrides.rows = { threads, quads };
    try {
      for (const width of WIDTHS) {
        for (const rows of [1, 5]) wrong.push(...await complaints("layerNorm", rows, width));
        if (width % 2 === 1) wrong.push(...await complaints("rmsNorm", 5, width)); // the same loops without the mean
      }
      wrong.push(...await complaints("rmsNorm", 2, 256));
    } finally {
      overrides.rows = null;
    }
    assertEquals(wrong, []);
  });
}

Deno.test("norm: gradients of parameters over several pieces of rows", async () => {
  await init();
  const wrong: string[] = [];
  for (const [rows, width] of [[129, 17], [300, 20], [4097, 8], [9000, 5]]) { // 4096 rows are one piece
    wrong.push(...await complaints("layerNorm", rows, width), ...await complaints("rmsNorm", rows, width));
  }
  assertEquals(wrong, []);
});

Deno.test("norm: far from 0", async () => {
  await init();
  // 10⁴ ± 2: neighbouring f32 are 1e-3 apart there. The values take the mean in two parts; the gradients in one, which is off by half of that: h = (x − mean)/1.15
  // by 4e-4, twice with what it is multiplied by. A variance as E x² − (E x)² would be off by 10 (1e8·6e-8·…)
  const limits = { offset: 1e4, gradient: 1e-3 };
  const wrong: string[] = [];
  for (const width of [8, 257, 1000]) wrong.push(...await complaints("layerNorm", 5, width, limits));
  // the square is no difference: nothing is lost
  wrong.push(...await complaints("rmsNorm", 5, 257, { offset: 1e4 }));
  assertEquals(wrong, []);
});

Deno.test("norm: eps, more dimensions, and gradcheck", async () => {
  const { f16 } = await init();
  assertEquals(await complaints("layerNorm", 3, 7, { eps: 0.5 }), []);
  assertEquals(await complaints("rmsNorm", 3, 7, { eps: 0.5 }), []);
  // by default that of PyTorch
  const half = f16 ? [[Float16Array.of(2 ** -5, 2 ** -5), 2 ** -5 / Math.sqrt(2 ** -10 + 2 ** -10)] as const] : [];
  for (
    const [row, want] of [
      [Float32Array.of(2 ** -12, 2 ** -12), 2 ** -12 / Math.sqrt(2 ** -24 + 2 ** -23)] as const,
      ...half,
    ]
  ) {
    const x = tensor(row, [1, 2]), [y] = await rmsNorm(x, ones([2], { dtype: x.dtype })).data();
    assert(Math.abs(y - want) < (x.dtype === "f16" ? 1e-3 : 1e-6), `${y}`);
  }
  const times = elementwise((a, b) => a * b), plus = elementwise((a, b) => a + b);
  const normed = (mean: boolean) =>
    lines((row) => {
      const n = row.length, m = mean ? sum(n, (i) => row[i]) / n : 0;
      const rstd = 1 / Math.sqrt(sum(n, (i) => (row[i] - m) ** 2) / n + (mean ? 1e-5 : 2 ** -23));
      return row.map((v) => (v - m) * rstd);
    }, -1);
  await checkOps([
    {
      name: "layerNorm",
      op: (x, w, b) => layerNorm(x, w, b),
      reference: (x, w, b) => plus(times(normed(true)(x), w), b),
      shapes: [[2, 2, 3], [3], [3]],
    },
    {
      name: "rmsNorm",
      op: (x, w) => rmsNorm(x, w),
      reference: (x, w) => times(normed(false)(x), w),
      shapes: [[2, 1, 4], [4]],
    },
    {
      name: "layerNorm behind a product", // a gradient that arrives from further on
      op: (x, w, b, m) => layerNorm(x, w, b).matmul(m),
      reference: (x, w, b, m) => product(plus(times(normed(true)(x), w), b), m),
      shapes: [[2, 3], [3], [3], [3, 2]],
    },
  ]);
});

Deno.test("norm: a constant row, and no rows", async () => {
  await init();
  using _scope = new Scope();
  const [weight, bias] = [tensor([1, 2, 3]), tensor([5, 6, 7])];
  assertEquals(await layerNorm(tensor([[4, 4, 4]]), weight, bias).array(), [[5, 6, 7]]);
  const width = 768; // whose sum rounds: a mean that is off by 3e-5 (an ulp) would be divided by √eps = 3e-3
  const y = await layerNorm(full([1, width], 1000.3), ones([width]), zeros([width])).data();
  assert(y.every((v) => Math.abs(v) < 1e-6), `${y[0]}`);
  assertEquals(await rmsNorm(zeros([1, 3]), weight).array(), [[0, 0, 0]]);
  assertEquals(await layerNorm(zeros([0, 3]), weight, bias).array(), []);
});

Deno.test("norm: gradients only where they are wanted", async () => {
  await init();
  const values = [[1, 2, 4], [-1, 0, 3]], dY = [[1, -2, 3], [4, 5, -6]];
  const all = async (wants: boolean[]) => {
    using _tape = new Tape();
    const [x, weight, bias] = [values, [1, 2, 3], [0, 1, 2]].map((v, i) => tensor(v, { requiresGrad: wants[i] }));
    layerNorm(x, weight, bias).backward(tensor(dY));
    return await Promise.all([x, weight, bias].map((t) => t.grad?.array() ?? null));
  };
  const whole = await all([true, true, true]);
  for (const i of [0, 1, 2]) {
    assertEquals(await all([0, 1, 2].map((j) => j === i)), whole.map((g, j) => j === i ? g : null));
  }
});

Deno.test("norm: what they throw", async () => {
  await init();
  using _scope = new Scope();
  const x = zeros([2, 3]), three = ones([3]), two = ones([2]);
  assertThrows(() => layerNorm(x, two, three), TypeError, "layerNorm: x must have shape [..., 2] for a weight");
  assertThrows(() => layerNorm(x, three, two), TypeError, "layerNorm: bias must have shape [3], got [2]");
  assertThrows(() => rmsNorm(x, two), TypeError, "rmsNorm: x must have shape [..., 2] for a weight of shape [2]");
  assertThrows(() => rmsNorm(x, three, { eps: -1 }), RangeError, "rmsNorm: eps must be");
  assertThrows(() => rmsNorm(zeros([]), three), TypeError, "rmsNorm: x must have");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => layerNorm(x, three, null as any), TypeError, "layerNorm: bias must be a Tensor, got null");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => layerNorm(x, three, three, { epsilon: 1 } as any), TypeError, "did you mean eps?");
});

Deno.test("layerNorm: gradients of its parameters in pieces do not read behind the rows", async () => {
  await init();
  for (const x of Array.from({ length: 3 }, () => tensor(new Float32Array(40_960).fill(NaN)))) x.dispose();
  const rows = 4097, shape = [rows, 8], values = Float32Array.from({ length: rows * 8 }, (_, i) => i % 7);
  const [x, dY] = [tensor(values, shape), tensor(new Float32Array(rows * 8).fill(1), shape)];
  const [w, b] = [1, 0].map((value) => full([8], value, { requiresGrad: true }));
  {
    using _tape = new Tape();
    layerNorm(x, w, b).backward(dY);
  }
  assertEquals(new Set(await b.grad!.data()), new Set([rows]));
  for (const x of [w, b]) x.dispose();
});
