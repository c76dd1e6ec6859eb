import { assertEquals, assertThrows } from "@std/assert";
import {
  arange,
  argmax,
  full,
  init,
  logSumExp,
  max,
  mean,
  min,
  ones,
  Scope,
  sum,
  Tape,
  type Tensor,
  tensor,
  variance,
  zeros,
} from "@limbeck/limbeck";
import { checkOps, checkValues, type OpCase, random } from "../testing/op.ts";
import { reduction } from "../testing/reference.ts";

type Options = { dim?: number | number[]; keepDim?: boolean };
type Op = (x: Tensor, options?: Options) => Tensor;

const total = (v: number[]) => v.reduce((a, b) => a + b, 0);
const average = (v: number[]) => total(v) / v.length;
const OPS: Record<string, [op: Op, f: (values: number[]) => number]> = {
  sum: [sum, total],
  mean: [mean, average],
  max: [max, (v) => v.reduce((a, b) => Math.max(a, b))],
  min: [min, (v) => v.reduce((a, b) => Math.min(a, b))],
  logSumExp: [logSumExp, (v) => Math.log(v.reduce((a, x) => a + Math.exp(x), 0))],
  variance: [variance, (v) => total(v.map((x) => (x - average(v)) ** 2)) / (v.length - 1)],
};

function cases(names: string[], shapes: number[][], options: Options[]): OpCase[] {
  return names.flatMap((name) =>
    shapes.flatMap((shape) =>
      options.map((o) => ({
        name: `${name} ${JSON.stringify(o)}`,
        op: (x: Tensor) => OPS[name][0](x, o),
        reference: reduction(OPS[name][1], o),
        shapes: [shape],
      }))
    )
  );
}

Deno.test("reduce: every op over one, several and all dimensions", async () => {
  await checkOps(
    cases(Object.keys(OPS), [[3, 2, 4]], [
      {},
      { keepDim: true },
      { dim: 0 },
      { dim: 1, keepDim: true },
      { dim: -1 },
      { dim: [0, 1] },
      { dim: [-1, 0] }, // not neighbours
      { dim: [2, 1, 0], keepDim: true },
    ]),
  );
});

Deno.test("reduce: lengths around a workgroup", async () => {
  const names = ["sum", "max", "logSumExp"];
  await checkOps(cases(names, [[1], [2], [7], [255], [257], [1000]], [{}]));
  await checkOps(cases(names, [[255, 3], [257, 17], [3, 33]], [{ dim: 0 }, { dim: 1 }])); // 16 columns a workgroup
});

Deno.test("reduce: scalars, and where no dimension is named all of them", async () => {
  await checkOps([
    ...cases(["sum", "mean", "max", "logSumExp"], [[]], [{}]),
    ...cases(["sum", "max", "logSumExp"], [[2, 3]], [{ dim: [] }, { dim: [], keepDim: true }]),
  ]);
  // a scalar has one dimension, as in PyTorch
  for (const op of [sum, mean, max, variance]) assertEquals(op(tensor(3), { dim: -1 }).shape, []);
  await checkValues("mean", mean(tensor(3), { dim: 0 }), [3]);
  assertEquals(await argmax(tensor(3), { dim: 0 }).item(), 0);
});

Deno.test("reduce: f16 sums in float32, and rounds results alone", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const x = tensor(Float16Array.from({ length: 4000 }, (_, i) => i < 2000 ? 100 : -100), [2, 2, 1000]);
  await checkValues("over two runs of dimensions", sum(x, { dim: [0, 2] }), [0, 0]);
  const z = tensor([8, 8.75, 8, 8.75], [2, 1, 2], { dtype: "f16" });
  const exact = Math.f16round(Math.log(2 * Math.exp(8) + 2 * Math.exp(8.75)));
  await checkValues("and logSumExp", logSumExp(z, { dim: [0, 2] }), [exact], 0);
  const y = tensor(Float16Array.from({ length: 1000 }, (_, i) => i === 0 ? 7000 : i % 2 ? 20 : -20));
  const values = Array.from(await y.data()), centre = average(values);
  const want = total(values.map((v) => (v - centre) ** 2)) / 999;
  await checkValues("variance", variance(y), [Math.fround(want)], 2 ** -10);
  await checkValues("of few", variance(tensor([0, 0.25, 100.375], { dtype: "f16" })), [3350], 0); // 3350.04
});

Deno.test("reduce: lengths that are cut into pieces", async () => {
  await init();
  // 16,384 elements a workgroup: one, two pieces and a bit; along columns 1,024
  const shapes: [number[], Options][] = [[[16385], {}], [[2, 40001], { dim: 1 }], [[2049, 3], { dim: 0 }]];
  const draw = random(3);
  for (const [shape, options] of shapes) {
    const x = Float32Array.from({ length: shape[0] * (shape[1] ?? 1) }, () => draw() - 0.25);
    for (const name of ["sum", "max", "logSumExp"]) {
      const [op, f] = OPS[name];
      const want = reduction(f, options)({ shape, data: Float64Array.from(x) }).data;
      await checkValues(`${name} of [${shape}]`, op(tensor(x, shape), options), want, 2e-6);
    }
  }
});

Deno.test("reduce: a sum of three million ones is exact", async () => {
  await init();
  // more than 65,535 additions in one loop are cut off by some drivers, silently
  using x = ones([3_000_000]);
  assertEquals(await x.sum().item(), 3_000_000);
  assertEquals(await x.mean().item(), 1);
  assertEquals(Array.from(await x.reshape([1_000_000, 3]).sum({ dim: 0 }).data()), [1e6, 1e6, 1e6]);
});

Deno.test("reduce: sums over nothing", async () => {
  await init();
  assertEquals(await sum(zeros([0])).item(), 0);
  assertEquals(await sum(zeros([3, 0]), { dim: 1 }).array(), [0, 0, 0]);
  assertEquals(await sum(zeros([0, 3]), { dim: 0 }).array(), [0, 0, 0]);
  assertEquals(await sum(zeros([0, 3]), { dim: 1 }).array(), []);
  assertEquals(await mean(zeros([0])).item(), NaN);
  for (const [name, op] of Object.entries({ max, min, logSumExp, argmax })) {
    assertThrows(() => op(zeros([3, 0]), { dim: 1 }), RangeError, `${name}: x must have an element to reduce`);
    assertEquals(await op(zeros([3, 0]), { dim: 0 }).array(), [], name); // three rows of nothing
  }
});

Deno.test("reduce: the gradient of an empty sum is empty", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor(new Float32Array(0), [3, 0], { requiresGrad: true });
  sum(x, { dim: 1 }).sum().backward();
  assertEquals(x.grad!.shape, [3, 0]);
});

Deno.test("reduce: ties share the gradient", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([[1, 3, 3], [2, 2, 2]], { requiresGrad: true });
  max(x, { dim: 1 }).sum().backward();
  await checkValues("max", x.grad!, [0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]);
  const y = tensor([5, 5, 7], { requiresGrad: true });
  min(y).backward();
  await checkValues("min", y.grad!, [0.5, 0.5, 0]);
});

Deno.test("reduce: what is not the largest has gradient 0, also beside a NaN and of an infinite gradient", async () => {
  await init();
  for (const [values, upstream, want] of [[[NaN, 1, NaN], 1, [0.5, 0, 0.5]], [[0, -1], Infinity, [Infinity, 0]]]) {
    using _tape = new Tape();
    const x = tensor(values as number[], { requiresGrad: true });
    max(x).backward(tensor(upstream as number));
    assertEquals(await x.grad!.array(), want);
  }
});

Deno.test("reduce: infinities, NaN and large arguments", async () => {
  await init();
  const { NaN: nan } = Number, inf = Infinity;
  const x = tensor([[1, nan, 2], [1, inf, 2], [-inf, 1, 2], [-inf, -inf, -inf], [1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]]);
  const rows = { dim: 1 }, wide = 1e4 + Math.LN2;
  await checkValues("max", max(x, rows), [nan, inf, 2, -inf, 1e4, -1e4]);
  await checkValues("min", min(x, rows), [nan, 1, -inf, -inf, -1e4, -1e4]);
  await checkValues("sum", sum(x, rows), [nan, inf, -inf, -inf, 1e4, -3e4]);
  const third = Math.log(Math.exp(1) + Math.exp(2));
  await checkValues("logSumExp", logSumExp(x, rows), [nan, inf, third, -inf, wide, Math.log(3) - 1e4]);
  for (const more of [[inf], [-inf], [1, 2]]) await checkValues("logSumExp", logSumExp(tensor([nan, ...more])), [nan]);
});

Deno.test("reduce: the gradient of logSumExp at large and infinite arguments", async () => {
  const { f16 } = await init();
  using _tape = new Tape();
  const rows = [[1e4, 1e4, -1e4], [-Infinity, 0, 0], [-1e4, -1e4, -1e4]];
  const want = [0.5, 0.5, 0, 0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3];
  // logSumExp is itself rounded: 1e4 in f32 to 5e-4, in f16 to 4
  for (const [dtype, tolerance] of [["f32", 1e-6], ["f16", 2 ** -11]] as const) {
    if (dtype === "f16" && !f16) continue;
    const x = tensor(rows, { dtype, requiresGrad: true });
    logSumExp(x, { dim: 1 }).sum().backward();
    await checkValues(`gradient of ${dtype}`, x.grad!, want, tolerance);
  }
});

Deno.test("reduce: logSumExp keeps small differences", async () => {
  await init();
  // ln(1 + e⁻²⁰): one of 2e-9 behind a largest of 0
  await checkValues("logSumExp", logSumExp(tensor([0, -20])), [Math.log1p(Math.exp(-20))], 4e-6); // exp errs by 3 + 2·20 ulp
});

Deno.test("reduce: argmax takes the first of several and NaN before all", async () => {
  await init();
  const x = tensor([[1, 3, 3], [-1, NaN, Infinity], [-Infinity, -Infinity, -Infinity]]);
  const far = new Float32Array(200);
  far[130] = far[5] = NaN; // whose threads meet late
  assertEquals(await argmax(tensor(far)).item(), 5);
  assertEquals(await argmax(x, { dim: 1 }).array(), [1, 1, 0]);
  assertEquals(await argmax(x, { dim: 0, keepDim: true }).array(), [[0, 1, 1]]);
  assertEquals(await argmax(x).array(), 4);
  assertEquals(await argmax(tensor([1, 3, 0, 3])).item(), 1); // a tie of which the first is in hand
  assertEquals(argmax(x).dtype, "i32");
  const long = new Float32Array(70_001);
  long[70_000] = 1;
  assertEquals(await argmax(tensor(long)).item(), 70_000);
  // more turns than a software driver's loops have, with 16 lanes a column
  using rising = arange(2 ** 24), columns = rising.reshape([-1, 2]);
  assertEquals(await argmax(columns, { dim: 0 }).array(), [2 ** 23 - 1, 2 ** 23 - 1]);
});

Deno.test("reduce: the variance's correction, and of values far from 0", async () => {
  await init();
  await checkValues("biased", variance(tensor([1, 2, 3, 4]), { correction: 0 }), [1.25]);
  await checkValues("unbiased", variance(tensor([1, 2, 3, 4])), [5 / 3]);
  await checkValues("far from 0", variance(tensor([10001, 10002, 10003, 10004])), [5 / 3]);
  assertEquals(await variance(tensor([3])).item(), NaN); // 0/0
  assertEquals(await variance(tensor([1, 3]), { correction: 3 }).item(), Infinity); // no divisor below 0
  assertEquals(await variance(zeros([0])).item(), NaN);
  using _tape = new Tape();
  const x = tensor([1, 2, 3], { requiresGrad: true });
  variance(x, { correction: 5 }).backward();
  await checkValues("its gradient has the divisor as it is", x.grad!, [1, 0, -1]);
});

Deno.test("reduce: what they throw", async () => {
  await init();
  const x = zeros([2, 3]);
  assertThrows(() => sum(x, { dim: 2 }), RangeError, "sum: dim must be");
  assertThrows(() => sum(x, { dim: -3 }), RangeError, "sum: dim must be");
  assertThrows(() => mean(x, { dim: [0, -2] }), RangeError, "mean: dim must not name a dimension twice");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => max(x, { dim: "0" } as any), TypeError, "max: dim must be a number or an array");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => sum(x, { keepdim: true } as any), TypeError, "did you mean keepDim?");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => argmax(x, { dim: [0] } as any), TypeError, "argmax: dim must be a number");
  for (const options of [new Date(0), new Uint8Array(2), () => 5, x]) {
    // deno-lint-ignore no-explicit-any
    assertThrows(() => sum(x, options as any), TypeError, "sum: options must be an object, got");
  }
  // deno-lint-ignore no-explicit-any
  assertThrows(() => argmax(undefined as any), TypeError, "argmax: x must be a Tensor, got undefined");
});

Deno.test("variance: a large mean costs no digits", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([0, 8, 16, 24].map((d) => 1e8 + d), { requiresGrad: true }), y = variance(x);
  y.backward();
  // (differences of 8 are exact there; the rest are some 10 roundings)
  await checkValues("variance", y, [320 / 3], 1e-6);
  await checkValues("its gradient", x.grad!, [-8, -8 / 3, 8 / 3, 8], 1e-6);
});

Deno.test("logSumExp: the gradient of very large numbers is their softmax", async () => {
  await init();
  for (const [values, want] of [[[2e38, 1], [1, 0]], [[-2e38, -3e38], [1, 0]], [[-Infinity, -Infinity], [0, 0]]]) {
    using _tape = new Tape();
    const x = tensor(values, { requiresGrad: true });
    logSumExp(x).backward();
    assertEquals(Array.from(await x.grad!.data()), want);
  }
});

Deno.test("mean: the sum may be beyond f16", async () => {
  const { f16 } = await init();
  if (!f16) return; // no f16 on this adapter
  using _scope = new Scope();
  assertEquals(await full([4], 40000, { dtype: "f16" }).mean().item(), 40000);
});

Deno.test("reductions in pieces: squares are squared once, and f16 is rounded once", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  const signs = tensor(Float32Array.from({ length: 50_000 }, (_, i) => i % 2 ? 3 : -3));
  assertEquals(await variance(signs, { correction: 0 }).item(), 9);
  if (f16) assertEquals(await sum(ones([20_000], { dtype: "f16" })).item(), 20_000);
});
