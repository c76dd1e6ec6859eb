import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  abs,
  add,
  cast,
  clamp,
  cos,
  div,
  exp,
  full,
  gelu,
  init,
  log,
  maximum,
  minimum,
  mul,
  neg,
  ones,
  pow,
  relu,
  rsqrt,
  Scope,
  sigmoid,
  silu,
  sin,
  softplus,
  sqrt,
  square,
  sub,
  tanh,
  Tape,
  type Tensor,
  tensor,
  where,
  zeros,
} from "@limbeck/limbeck";
import { checkOps, checkValues, type OpCase } from "../testing/op.ts";
import { elementwise } from "../testing/reference.ts";

/** erf by its series: 40 terms are float64's last digit for |x| ≤ 3. */
function erf(x: number): number {
  let term = x, sum = x;
  for (let n = 1; n < 60; n++) {
    term *= -x * x / n;
    sum += term / (2 * n + 1);
  }
  return 2 / Math.sqrt(Math.PI) * sum;
}

const logistic = (x: number) => 1 / (1 + Math.exp(-x));
const geluTanh = (x: number) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

const UNARY: Record<string, [op: (x: Tensor) => Tensor, f: (x: number) => number, range?: [number, number]]> = {
  neg: [neg, (x) => -x],
  abs: [abs, Math.abs],
  exp: [exp, Math.exp],
  log: [log, Math.log, [0.1, 3]],
  sqrt: [sqrt, Math.sqrt, [0.1, 3]],
  rsqrt: [rsqrt, (x) => 1 / Math.sqrt(x), [0.1, 3]],
  square: [square, (x) => x * x],
  sin: [sin, Math.sin],
  cos: [cos, Math.cos],
  tanh: [tanh, Math.tanh],
  sigmoid: [sigmoid, logistic],
  relu: [relu, (x) => Math.max(x, 0)],
  silu: [silu, (x) => x * logistic(x)],
  softplus: [softplus, (x) => Math.log1p(Math.exp(x))],
  gelu: [(x) => gelu(x), (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)), [-4, 4]],
  "gelu tanh": [(x) => gelu(x, { approximate: "tanh" }), geluTanh, [-4, 4]],
  clamp: [(x) => clamp(x, { min: -0.5, max: 1 }), (x) => Math.min(Math.max(x, -0.5), 1)],
  "clamp min": [(x) => clamp(x, { min: 0.25 }), (x) => Math.max(x, 0.25)],
  "clamp max": [(x) => clamp(x, { max: 0.25 }), (x) => Math.min(x, 0.25)],
  "x + 3": [(x) => add(x, 3), (x) => x + 3],
  "3 + x": [(x) => add(3, x), (x) => 3 + x],
  "x - 3": [(x) => sub(x, 3), (x) => x - 3],
  "3 - x": [(x) => sub(3, x), (x) => 3 - x],
  "x * 3": [(x) => mul(x, 3), (x) => x * 3],
  "3 * x": [(x) => mul(3, x), (x) => 3 * x],
  "x / 3": [(x) => div(x, 3), (x) => x / 3],
  "3 / x": [(x) => div(3, x), (x) => 3 / x, [0.2, 3]],
  "x ** 3": [(x) => pow(x, 3), (x) => x ** 3],
  "x ** 2": [(x) => pow(x, 2), (x) => x ** 2],
  "x ** 1": [(x) => pow(x, 1), (x) => x],
  "x ** 0.5": [(x) => pow(x, 0.5), (x) => x ** 0.5, [0.1, 3]],
  "x ** -1": [(x) => pow(x, -1), (x) => 1 / x, [0.2, 3]],
  "x ** -1.5": [(x) => pow(x, -1.5), (x) => x ** -1.5, [0.2, 3]],
  "3 ** x": [(x) => pow(3, x), (x) => 3 ** x],
  "max(x, 0.5)": [(x) => maximum(x, 0.5), (x) => Math.max(x, 0.5)],
  "min(0.5, x)": [(x) => minimum(0.5, x), (x) => Math.min(x, 0.5)],
};

Deno.test("elementwise: ops of one input", async () => {
  await checkOps(
    Object.entries(UNARY).map(([name, [op, f, range]]) => ({
      name,
      op,
      reference: elementwise(f),
      shapes: [[7]],
      range,
    })),
  );
});

Deno.test("elementwise: sizes around a vector and a workgroup", async () => {
  // 1,021 = 4·255 + 1: 256 threads of four elements and one behind them
  const shapes = [[], [1], [2], [3], [4], [5], [255], [257], [1000], [1021], [1025], [0], [3, 0], [5, 1, 3], [
    2,
    3,
    4,
    5,
  ]];
  await checkOps(shapes.map((shape) => ({
    name: "tanh",
    op: tanh,
    reference: elementwise(Math.tanh),
    shapes: [shape],
  })));
});

type Binary = [op: (a: Tensor, b: Tensor) => Tensor, f: (a: number, b: number) => number];
const BINARY: Record<string, Binary> = {
  add: [add, (a, b) => a + b],
  sub: [sub, (a, b) => a - b],
  mul: [mul, (a, b) => a * b],
  div: [div, (a, b) => a / b],
  pow: [pow, (a, b) => a ** b],
  maximum: [maximum, Math.max],
  minimum: [minimum, Math.min],
};

Deno.test("elementwise: ops of two inputs", async () => {
  const table = Object.entries(BINARY);
  await checkOps(
    table.flatMap(([name, [op, f]]): OpCase[] =>
      [[[7], [7]], [[3, 2], [2]], [[2, 1], [1, 3]]].map((shapes) => ({
        name,
        op,
        reference: elementwise(f),
        shapes,
        range: [0.3, 2],
      }))
    ),
  );
});

Deno.test("elementwise: broadcasting", async () => {
  const pairs = [
    [[3, 5], []], // a scalar
    [[], [3, 5]],
    [[1], [255]],
    [[257], [1, 1]], // the scalar brings a dimension
    [[5, 3], [3]], // a row
    [[3], [5, 3]],
    [[5, 3], [5, 1]], // a column
    [[5, 1], [1, 3]], // both sides
    [[2, 3, 4], [3, 1]],
    [[2, 1, 4], [3, 1]],
    [[2, 1, 3, 1], [1, 5, 1, 4]], // interleaved
    [[2, 1, 3, 1, 2], [4, 1, 3, 1]],
    [[1000, 3], [3]],
    [[3, 257], [3, 1]],
    [[0, 3], [3]], // nothing
    [[2, 0], [2, 1]],
    [[1], [0]],
  ];
  await checkOps(pairs.map((shapes) => ({
    name: "a * b",
    op: mul,
    reference: elementwise((a, b) => a * b),
    shapes,
  })));
});

Deno.test("elementwise: one tensor on both sides", async () => {
  await checkOps([
    { name: "x + x", op: (x) => add(x, x), reference: elementwise((x) => x + x), shapes: [[5]] },
    { name: "x * x", op: (x) => mul(x, x), reference: elementwise((x) => x * x), shapes: [[5]] },
    // the gradient of x / x, which is nothing but rounding, beside one of 1
    {
      name: "x / x + x",
      op: (x) => div(x, x).add(x),
      reference: elementwise((x) => 1 + x),
      shapes: [[5]],
      range: [0.5, 2],
    },
  ]);
});

Deno.test("elementwise: the gradient of a divisor overflows only where it is too large itself, as in PyTorch", async () => {
  await init();
  using _tape = new Tape();
  const b = tensor(1e30, { requiresGrad: true }), upstream = tensor(-1e35);
  for (const a of [tensor(1e38), 1e38]) {
    b.grad = null;
    div(a, b).backward(upstream);
    await checkValues("-dY * a / b ** 2", b.grad!, [1e13], 1e-6);
  }
});

Deno.test("elementwise: cast", async () => {
  const { f16 } = await init();
  using _tape = new Tape();
  const values = async (x: Tensor) => [x.dtype, Array.from(await x.data())];
  const index = tensor([-3, 2 ** 24], { dtype: "i32" }), large = tensor([2 ** 32 - 1], { dtype: "u32" });
  assertEquals(await values(cast(index, "f32")), ["f32", [-3, 2 ** 24]]);
  assertEquals(await values(cast(large, "f32")), ["f32", [2 ** 32]]);
  const w = tensor([0.1, -2, NaN], { requiresGrad: true });
  cast(w, "f32").mul(tensor([3, 0.1, 1])).sum().backward();
  assertEquals(await values(w.grad!), ["f32", [3, Math.fround(0.1), 1]]); // a copy: w.grad is not rounded
  // deno-lint-ignore no-explicit-any
  assertThrows(() => cast(w, "i32" as any), TypeError, 'cast: dtype must be f32 or f16, got "i32"');
  if (!f16) return assertThrows(() => cast(w, "f16"), TypeError, "cast: this adapter has no shader-f16");
  assertEquals(await values(cast(w, "f16")), ["f16", [Math.f16round(0.1), -2, NaN]]);
  const back = tensor([0.1, 2], { dtype: "f16", requiresGrad: true });
  cast(back, "f32").mul(tensor([3, 0.1])).sum().backward(); // there and back: each gradient in the dtype of its input
  assertEquals(await values(back.grad!), ["f16", [3, Math.f16round(0.1)]]);
  w.grad = null;
  cast(w, "f16").square().sum().backward();
  const [first, second] = await w.grad!.data();
  assertEquals([w.grad!.dtype, first, second], ["f32", Math.f16round(2 * Math.f16round(0.1)), -4]);
});

Deno.test("elementwise: where", async () => {
  await init();
  const condition = tensor(new Int32Array([1, 0, -1, 0, 2, 0]), [2, 3]), row = tensor([0, 1, 0.5]);
  const chosen = [true, false, true, false, true, false];
  await checkValues("NaN is not 0", where(tensor([NaN, 0]), tensor([1, 1]), tensor([2, 2])), [1, 2]);
  await checkOps([
    {
      name: "where",
      op: (a, b) => where(condition, a, b),
      reference: (a, b) => ({ shape: [2, 3], data: a.data.map((x, i) => chosen[i] ? x : b.data[i]) }),
      shapes: [[2, 3], [2, 3]],
    },
    {
      name: "where with a broadcast condition",
      op: (a, b) => where(row, a, b),
      reference: (a, b) => ({ shape: [2, 3], data: a.data.map((x, i) => i % 3 > 0 ? x : b.data[Math.floor(i / 3)]) }),
      shapes: [[2, 3], [2, 1]],
    },
    {
      name: "where of a number",
      op: (a) => where(row, a, 7),
      reference: (a) => ({ shape: [2, 3], data: a.data.map((x, i) => i % 3 > 0 ? x : 7) }),
      shapes: [[2, 3]],
    },
  ]);
});

Deno.test("elementwise: where of integers keeps every bit", async () => {
  await init();
  using _scope = new Scope();
  for (const array of [Int32Array, Uint32Array]) {
    const most = array === Int32Array ? 2 ** 31 - 1 : 2 ** 32 - 1,
      values = array.of(2 ** 24 + 1, most, 3, 2 ** 30 + 1, 5);
    const a = tensor(values), b = full([1], 7, { dtype: a.dtype }); // as masked labels are
    for (const mask of [tensor([0.5, -1, 0, 1, 0]), tensor(new Int32Array([1, 2, 0, 3, 0]))]) {
      const want = [values[0], most, 7, values[3], 7];
      assertEquals(Array.from(await where(mask, a, b).data()), want);
      const rows = where(mask, a, b.expand([2, 1])); // by strides
      assertEquals([rows.dtype, await rows.array()], [a.dtype, [want, want]]);
    }
  }
});

Deno.test("elementwise: infinities, NaN and large arguments", async () => {
  await init();
  const { NaN: nan } = Number, inf = Infinity;
  const x = [nan, inf, -inf, 1e4, -1e4, 100, -100, 0];
  const table: [string, (x: Tensor) => Tensor, number[]][] = [
    ["abs", abs, [nan, inf, inf, 1e4, 1e4, 100, 100, 0]],
    ["exp", exp, [nan, inf, 0, inf, 0, inf, Math.exp(-100), 1]],
    ["log", log, [nan, inf, nan, Math.log(1e4), nan, Math.log(100), nan, -inf]],
    ["sqrt", sqrt, [nan, inf, nan, 100, nan, 10, nan, 0]],
    ["tanh", tanh, [nan, 1, -1, 1, -1, 1, -1, 0]],
    ["sigmoid", sigmoid, [nan, 1, 0, 1, 0, 1, Math.exp(-100), 0.5]],
    ["relu", relu, [nan, inf, 0, 1e4, 0, 100, 0, 0]],
    ["softplus", softplus, [nan, inf, 0, 1e4, 0, 100, Math.exp(-100), Math.LN2]],
    ["gelu", (t) => gelu(t), [nan, inf, nan, 1e4, 0, 100, 0, 0]],
    ["maximum with 0", (t) => maximum(t, 0), [nan, inf, 0, 1e4, 0, 100, 0, 0]],
    ["minimum with 0", (t) => minimum(t, 0), [nan, 0, -inf, 0, -1e4, 0, -100, 0]],
    ["maximum of tensors", (t) => maximum(zeros([8]), t), [nan, inf, 0, 1e4, 0, 100, 0, 0]],
    ["clamp", (t) => clamp(t, { min: -1, max: 1 }), [nan, 1, -1, 1, -1, 1, -1, 0]],
    ["pow 0", (t) => pow(t, 0), [1, 1, 1, 1, 1, 1, 1, 1]],
    ["pow 3", (t) => pow(t, 3), [nan, inf, -inf, 1e12, -1e12, 1e6, -1e6, 0]],
    ["pow 1.5", (t) => pow(t, 1.5), [nan, inf, inf, 1e6, nan, 1e3, nan, 0]],
    ["pow -0.5", (t) => pow(t, -0.5), [nan, 0, 0, 0.01, nan, 0.1, nan, inf]],
  ];
  // e⁻¹⁰⁰ is a subnormal f32, which drivers may flush to 0; the exponent's own rounding leaves 3 + 2·100 ulp
  const flushed = (values: number[]) => values.map((v) => v === Math.exp(-100) ? 0 : v);
  const wrong: string[] = [];
  for (const [name, op, want] of table) {
    const got = Array.from(await op(tensor(x)).data()).map((v) => Math.abs(v) < 1e-37 ? 0 : v);
    flushed(want).forEach((w, i) => {
      const right = Object.is(got[i], w) || Math.abs(got[i] - w) <= 2e-6 * Math.abs(w);
      if (!right) wrong.push(`${name}(${x[i]}): wanted ${w}, got ${got[i]}`);
    });
  }
  assertEquals(wrong, []);
});

Deno.test("elementwise: gradients at large arguments stay finite", async () => {
  await init();
  const table: [string, (x: Tensor) => Tensor, number[]][] = [
    ["tanh", tanh, [0, 0, 4 * Math.exp(-40)]],
    ["sigmoid", sigmoid, [0, 0, Math.exp(-20)]],
    ["softplus", softplus, [1, 0, 1]],
    ["silu", silu, [1, 0, 1]],
    ["gelu", (x) => gelu(x), [1, 0, 1]],
    ["gelu tanh", (x) => gelu(x, { approximate: "tanh" }), [1, 0, 1]],
  ];
  for (const [name, op, want] of table) {
    using _tape = new Tape();
    const x = tensor([1e4, -1e4, 20, 1e20, -1e20], { requiresGrad: true });
    op(x).sum().backward();
    await checkValues(name, x.grad!, [...want, want[0], want[1]], 4e-6); // exp errs by 3 + 2·40 ulp
  }
});

Deno.test("elementwise: small arguments keep their digits", async () => {
  await init();
  const x = [1e-3, -1e-5, 1e-10, 1e-30];
  await checkValues("tanh", tanh(tensor(x)), x.map((v) => Math.tanh(Math.fround(v))), 5e-7);
  await checkValues("log near 1", log(tensor(x.slice(0, 2)).add(1)), [
    Math.log(Math.fround(1 + 1e-3)),
    Math.log(Math.fround(1 - 1e-5)),
  ], 5e-7);
  await checkValues(
    "gelu",
    gelu(tensor(x)),
    x.map((v) => 0.5 * Math.fround(v)).map((v, i) => v * (1 + erf(x[i] / Math.SQRT2))),
    5e-7,
  );
});

Deno.test("elementwise: gelu and its slope keep their digits where they are small", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([-2, -4, -6, -10], { requiresGrad: true }), y = gelu(x);
  y.sum().backward();
  // x·Φ(x) and Φ(x) + x·φ(x), as SciPy's ndtr gives them
  const values = [-0.0455002639, -0.0001266849673, -5.91952587e-09, -7.619853024e-23],
    slopes = [-0.08523180108, -0.0005036496612, -3.546870945e-08, -7.618400096e-22];
  for (const [name, got, wanted] of [["value", y, values], ["slope", x.grad!, slopes]] as const) {
    const found = await got.data();
    wanted.forEach((w, i) => assert(Math.abs(found[i] / w - 1) < 5e-6, `${name} ${i}: ${found[i]}, wanted ${w}`));
  }
});

Deno.test("elementwise: ties share the gradient, kinks have gradient 0", async () => {
  await init();
  using _tape = new Tape();
  const leaf = () => tensor([1, 0, -1], { requiresGrad: true });
  const gradient = async (f: (x: Tensor) => Tensor) => {
    const x = leaf();
    f(x).sum().backward();
    return Array.from(await x.grad!.data());
  };
  assertEquals(await gradient((x) => maximum(x, tensor([1, 1, -1]))), [0.5, 0, 0.5]);
  assertEquals(await gradient((x) => minimum(tensor([1, 1, -1]), x)), [0.5, 1, 0.5]);
  assertEquals(await gradient((x) => maximum(x, 0)), [1, 0.5, 0]);
  assertEquals(await gradient((x) => minimum(0, x)), [0, 0.5, 1]);
  assertEquals(await gradient(relu), [1, 0, 0]);
  assertEquals(await gradient(abs), [1, 0, -1]);
  assertEquals(await gradient((x) => clamp(x, { min: 0, max: 1 })), [1, 1, 0]); // at the ends it is 1
  assertEquals(await gradient((x) => clamp(x, { min: 2, max: -2 })), [0, 0, 0]);
  assertEquals(await gradient((x) => pow(x, 2)), [2, 0, -2]);
  // an infinite gradient stays out of what was not taken
  assertEquals(await gradient((x) => maximum(x, tensor([0.25, 1, 0])).sqrt()), [0.5, 0, 0]);
  assertEquals(await gradient((x) => minimum(x, tensor([0, 4, 4])).add(1).sqrt()), [0, 0.5, Infinity]);
});

Deno.test("elementwise: gradients where NaN is compared, and f16 that equals a bound", async () => {
  const info = await init();
  using _tape = new Tape();
  const gradient = async (x: Tensor, f: (x: Tensor) => Tensor) => {
    x.requiresGrad = true;
    f(x).sum().backward();
    return Array.from(await x.grad!.data());
  };
  for (const op of [maximum, minimum]) { // as in PyTorch
    const nan = tensor([NaN]);
    assertEquals(await gradient(tensor([NaN, 2]), (x) => op(x, 2)), [1, 0.5]);
    assertEquals(await gradient(tensor([1, 2]), (x) => op(nan, x)), [1, 1]);
    assertEquals(await gradient(tensor([1, NaN]), (x) => op(x, nan)), [1, 1]);
  }
  assertEquals(await gradient(tensor([NaN, 0, -1]), relu), [1, 0, 0]);
  if (!info.f16) return;
  const tenth = () => tensor([0.1], { dtype: "f16" }); // 0.0999756
  assertEquals(await gradient(tenth(), (x) => clamp(x, { min: 0.1 })), [1]);
  assertEquals(await gradient(tensor([0.3], { dtype: "f16" }), (x) => clamp(x, { max: 0.3 })), [1]);
  assertEquals(await gradient(tenth(), (x) => maximum(x, 0.1)), [0.5]);
  assertEquals(await gradient(tenth(), (x) => minimum(0.1, x)), [0.5]);
});

Deno.test("elementwise: powers of negative bases and of 0", async () => {
  await init();
  const a = tensor([-2, -2, -2, 0, 0, 2]), b = tensor([3, 2, 0.5, 0, 2, -1]);
  await checkValues("pow", pow(a, b), [-8, 4, NaN, 1, 0, 0.5]);
  // the derivative by the exponent, aᵇ·ln a, is 0 where the base is 0, unless the power is infinite
  using _tape = new Tape();
  const base = tensor([0, 2, 0, 0], { requiresGrad: true }), e = tensor([2, 3, -1, 0], { requiresGrad: true });
  pow(base, e).sum().backward();
  await checkValues("by the base", base.grad!, [0, 12, -Infinity, 0]);
  await checkValues("by the exponent", e.grad!, [0, 8 * Math.LN2, -Infinity, 0]);
  const f = tensor([0, 2, -1], { requiresGrad: true });
  pow(0, f).sum().backward();
  await checkValues("by the exponent of a number", f.grad!, [0, 0, -Infinity]);
});

Deno.test("elementwise: x⁰ is constant, also at 0", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([0, 2], undefined, { requiresGrad: true });
  pow(x, 0).sum().backward();
  await checkValues("a number", x.grad!, [0, 0]);
  const y = tensor([0, 2], undefined, { requiresGrad: true });
  pow(y, tensor([0, 0])).sum().backward();
  await checkValues("a tensor", y.grad!, [0, 0]);
});

Deno.test("elementwise: a clamp with one bound leaves the other side alone", async () => {
  await init();
  await checkValues("min", clamp(tensor([Infinity, -Infinity]), { min: 0 }), [Infinity, 0]);
  await checkValues("max", clamp(tensor([Infinity, -Infinity]), { max: 0 }), [0, -Infinity]);
  await checkValues("bounds that cross", clamp(tensor([0, 2, 4, NaN]), { min: 3, max: 1 }), [1, 1, 1, NaN]);
  await checkValues("an infinite one", clamp(tensor([-1, 9]), { min: 0, max: Infinity }), [0, 9]);
  await checkValues("only infinity is above", clamp(tensor([-1, NaN]), { min: Infinity }), [Infinity, NaN]);
});

Deno.test("elementwise: what they throw", async () => {
  await init();
  const x = tensor([1, 2, 3]), index = tensor(new Int32Array(3));
  assertThrows(() => add(x, tensor([1, 2])), TypeError, "add: shapes [3] and [2] do not broadcast");
  assertThrows(() => mul(x, index), TypeError, "mul: b must have dtype");
  assertThrows(() => where(x, index, x), TypeError, "where: b must have dtype i32, got f32");
  assertThrows(() => where(x, index, 0.5), RangeError, "where: b must be an integer");
  assertThrows(() => exp(index), TypeError, 'exp: x must have dtype f32 or f16, got i32 (cast(x, "f32") makes f32)');
  assertThrows(() => add(1, 2), TypeError, "add: one of a and b must be a Tensor");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => add(x, "1" as any), TypeError, 'add: b must be a Tensor or a number, got "1"');
  assertThrows(() => clamp(x, {}), TypeError, "clamp: min or max must be given");
  assertThrows(() => clamp(x, { min: 1, max: NaN }), RangeError, "clamp: max must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => gelu(x, { aproximate: "tanh" } as any), TypeError, "did you mean approximate?");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => gelu(x, { approximate: "erf" } as any), RangeError, "gelu: approximate must be one of none, tanh");
  await assertRejects(() => x.item(), TypeError, "item: the tensor must have one element");
});

Deno.test("elementwise: sine and cosine keep their digits far from 0", async () => {
  await init();
  using _scope = new Scope();
  const angles = Float32Array.from({ length: 4001 }, (_, i) => 12_000 * ((i - 2000) / 2000) ** 3);
  angles.set([Math.PI, Math.PI / 2, -Math.PI / 4, 1e-20, -0, 3.4e38, 1e5, -1e5, 1e10, 16367173 * 2 ** 72], 0); // the last is next to a multiple of π/2
  for (let i = 10; i < 400; i++) angles[i] = (-1.24) ** i;
  for (const [op, exact] of [[sin, Math.sin], [cos, Math.cos]] as const) {
    const got = await op(tensor(angles)).data();
    const worst = Math.max(...Array.from(got, (v, i) => Math.abs(v - exact(angles[i]))));
    assert(worst < 1.5e-7, `${exact.name} is off by ${worst}`); // one rounding of a number below 1, and some
    const beyond = await op(tensor([Infinity, -Infinity, NaN])).data();
    assert(Array.from(beyond).every(Number.isNaN), `${beyond}`);
  }
  assertEquals(await sin(tensor([1e-20])).data(), new Float32Array([1e-20]));
});

Deno.test("elementwise: powers keep their digits", async () => {
  await init();
  using _scope = new Scope();
  // base, exponent
  const ranges = [[0.5, 20, 3], [0.5, 20, 20], [0.5, 20, -7.3], [1.35, 1.5, -200.3], [0.99, 1.01, 5000], [
    1e-20,
    1e20,
    1.8,
  ]];
  for (const [low, high, exponent] of ranges) {
    const x = Float32Array.from({ length: 500 }, (_, i) => low + (high - low) * ((i * 0.6180339887) % 1));
    const want = Array.from(x, (v) => v ** Math.fround(exponent));
    for (const e of [exponent, tensor([exponent])]) {
      await checkValues(`x ** ${exponent}`, pow(tensor(x), e), want, 4e-7);
    }
  }
  assertEquals(
    await pow(tensor([10, 3, -2, 2 ** -120]), tensor([5, 4, 127, 0.5])).data(),
    new Float32Array([1e5, 81, -(2 ** 127), 2 ** -60]),
  );
});

Deno.test("elementwise: a NaN with a sign stays NaN", async () => {
  await init();
  using _scope = new Scope();
  const signed = neg(abs(tensor([NaN])));
  for (const op of [exp, log, sqrt, tanh, sigmoid, softplus, sin, cos, gelu]) {
    assertEquals(await op(signed).data(), new Float32Array([NaN]), op.name);
  }
});

Deno.test("pow: signs of zeros, and infinite and large powers, as in C", async () => {
  await init();
  using _scope = new Scope();
  const I = Infinity, bases = [-0, -0, -0, -0, 0, -1, -1, -2], powers = [-1, 3, -3, 2, -3, I, -I, 0.5];
  const got = Array.from(await pow(tensor(bases), tensor(powers)).data());
  assertEquals(got, [-I, -0, -I, 0, I, 1, 1, NaN]); // assertEquals tells −0 from 0
  assertEquals(Array.from(await pow(tensor([-0, -0]), tensor([-1.5, 1.5])).data()), [I, 0]); // odd are whole powers only
  const large = pow(tensor([2, 2, 0.5, 0.5, -1, -2]), tensor([I, -I, I, -I, 2 ** 33, 2 ** 33]));
  assertEquals(Array.from(await large.data()), [I, 0, 0, I, 1, I]);
});

Deno.test("pow: the largest float", async () => {
  await init();
  using _scope = new Scope();
  const most = 2 ** 128 - 2 ** 104, x = tensor([most, -most, most, most]);
  await checkValues("powers of it", pow(x, tensor([1, 1, 0.5, -0.5])), [most, -most, most ** 0.5, most ** -0.5], 4e-7);
});

Deno.test("maximum and minimum: equal inputs share the gradient", async () => {
  await init();
  for (const op of [maximum, minimum]) {
    using _tape = new Tape();
    const [a, b] = [1, 2].map(() => tensor([1], { requiresGrad: true }));
    op(a, b).sum().backward();
    assertEquals([await a.grad!.item(), await b.grad!.item()], [0.5, 0.5], op.name);
  }
});

Deno.test("mul: what no gradient reads may change", async () => {
  await init();
  using _tape = new Tape();
  const w = tensor([1], { requiresGrad: true }), loss = tensor([2]).mul(w).sum();
  w.assign(tensor([5]));
  loss.backward();
  assertEquals(await w.grad!.item(), 2);
});

Deno.test("elementwise: both inputs have one dtype", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  assertThrows(() => ones([1]).add(tensor(new Int32Array(1))), TypeError, "add: b must have dtype f32 or f16, got i32");
  if (f16) {
    assertThrows(
      () => ones([1]).add(ones([1], { dtype: "f16" })),
      TypeError,
      "add: b must have dtype f32 as a, got f16",
    );
  }
});

Deno.test("log: infinity, and numbers below the least normal one", async () => {
  await init();
  const x = [Infinity, 2 ** -126, 3 * 2 ** -130, 2 ** -149];
  const y = log(tensor(x)), got = await y.data();
  // a device may take subnormal numbers for 0
  const want = x.map((v, i) => got[i] === -Infinity && v < 2 ** -126 ? -Infinity : Math.log(v));
  await checkValues("log", y, want, 5e-7);
});

Deno.test("tanh: relative error on both sides of where its series ends", async () => {
  await init();
  const x = Array.from({ length: 200 }, (_, i) => Math.fround(0.005 * (i + 1)));
  await checkValues("tanh", tanh(tensor(x)), x.map(Math.tanh), 6e-7);
});

Deno.test("sine and cosine: next to multiples of π/2 they keep their digits, too", async () => {
  await init();
  // cos of the first is −1.6e-9, sin of the second (its double) 3.2e-9
  const x = [16367173 * 2 ** 72, 16367173 * 2 ** 73, 16367173 * 2 ** 74, 1e10, 3e20, 1e30, 3.4e38].map(Math.fround);
  for (const [op, exact] of [[sin, Math.sin], [cos, Math.cos]] as const) {
    await checkValues(exact.name, op(tensor(x)), x.map(exact));
  }
});

Deno.test("sine: many angles beyond the three-part reduction, where products of words carry", async () => {
  await init();
  const x = Array.from({ length: 20_000 }, (_, i) => Math.fround(12_000 * 3000 ** (i / 20_000)));
  const got = await sin(tensor(x)).data(), error = Math.max(...x.map((v, i) => Math.abs(got[i] - Math.sin(v))));
  assert(error < 1.5e-7, `${error}`);
});

Deno.test("pow: large odd powers of negative bases; results and bases below the least normal number", async () => {
  await init();
  const bases = [-1, -1, -1, -1.0005, -1.0005].map(Math.fround), powers = [2001, 2002, 2 ** 24 - 1, 3001, 3002];
  await checkValues("pow", pow(tensor(bases), tensor(powers)), bases.map((b, i) => b ** powers[i]));
  const small = await pow(tensor([2, 2, 3 * 2 ** -130]), tensor([-145, -200, 0.5])).data();
  const root = Math.sqrt(3 * 2 ** -130);
  assert([0, 2 ** -145].includes(small[0]) && small[1] === 0, `${small}`); // 0 where a device has no subnormal numbers
  assert(small[2] === 0 || Math.abs(small[2] / root - 1) < 1e-6, `${small[2]}, not ${root}`);
});
