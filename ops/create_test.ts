import { assert, assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import {
  arange,
  type DType,
  embedding,
  eye,
  full,
  init,
  manualSeed,
  ones,
  rand,
  randint,
  randn,
  Scope,
  stack,
  Tape,
  tensor,
  zeros,
} from "@limbeck/limbeck";

Deno.test("create: tensor takes numbers, nested and typed arrays", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  assertEquals(tensor(3).shape, []);
  assertEquals(await tensor(3).data(), new Float32Array([3]));
  assertEquals(tensor([]).shape, [0]);
  assertEquals(tensor([[], []]).shape, [2, 0]);
  assertEquals(tensor([[[1, 2]], [[3, 4]]]).shape, [2, 1, 2]);
  assertEquals(await tensor([[1, 2], [3, 4]]).data(), new Float32Array([1, 2, 3, 4]));
  assertEquals(tensor([1, 2, 3, 4], [2, 2]).shape, [2, 2]);
  assertEquals(tensor([1, 2], { requiresGrad: true }).requiresGrad, true);
  // from a part of a larger buffer, at an odd place
  const part = new Float32Array([9, 1, 2, 9]).subarray(1, 3);
  assertEquals(await tensor(part).data(), new Float32Array([1, 2]));
  for (
    const values of [new Float32Array([1, -2]), new Int32Array([-1, 2]), new Uint32Array([4294967295, 2])]
  ) {
    assertEquals(await tensor(values).data(), values);
  }
  assertEquals((["f32", "i32", "u32"] as DType[]).map((dtype) => tensor([1], { dtype }).dtype), ["f32", "i32", "u32"]);
  assertEquals(await tensor(new Int32Array([-7, 7]), { dtype: "f32" }).data(), new Float32Array([-7, 7]));
  if (!f16) return;
  const halves = new Float16Array([0.5, -65504, 1 / 3]); // three elements: the last word is half full
  assertEquals(await tensor(halves).data(), halves);
});

Deno.test("create: what tensor refuses", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  // deno-lint-ignore no-explicit-any
  const bad = (value: any) => value;
  assertThrows(() => tensor([[1, 2], [3]]), TypeError, "tensor: values must be nested evenly: 2 at depth 1 at first");
  assertThrows(() => tensor([1, [2]]), TypeError, "tensor: values must be nested evenly");
  assertThrows(() => tensor([[1], 2]), TypeError, "tensor: values must be nested evenly, got a number at depth 1");
  assertThrows(() => tensor(bad(["a"])), TypeError, "tensor: values must be numbers, nested arrays or a typed array");
  assertThrows(() => tensor(bad(new Float64Array(2))), TypeError, "(Float32Array, Float16Array, Int32Array or Uint32");
  assertThrows(() => tensor([1, 2, 3], [2, 2]), TypeError, "tensor: shape [2, 2] needs 4 values, got 3");
  assertThrows(() => tensor([1], [-1]), RangeError, "tensor: shape[0] must be");
  assertThrows(() => tensor([1], bad({ dtpye: "f32" })), TypeError, "dtpye");
  assertThrows(
    () => tensor([1], bad({ dtype: "f32" }), { requiresGrad: true }),
    TypeError,
    "tensor: shape must be an array of sizes if options follow, got an Object",
  );
  assertThrows(() => tensor([1], { dtype: bad("f64") }), TypeError, "tensor: dtype must be one of f32, f16, i32, u32");
  assertThrows(() => tensor([1], { requiresGrad: bad(1) }), TypeError, "tensor: requiresGrad must be");
  assertThrows(
    () => tensor(new Int32Array(1), { requiresGrad: true }),
    TypeError,
    "tensor: only f32 and f16 tensors can require a gradient, got dtype i32",
  );
  assertThrows(() => tensor([1], { dtype: "u32", requiresGrad: true }), TypeError, "got dtype u32");
  if (!f16) assertThrows(() => tensor([1], { dtype: "f16" }), TypeError, "this adapter has no shader-f16");
});

Deno.test("create: constants of every dtype", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  for (const dtype of ["f32", ...f16 ? ["f16"] : [], "i32", "u32"] as DType[]) {
    assertEquals([...await full([3, 1], 7, { dtype }).data()], [7, 7, 7], dtype);
    assertEquals([...await zeros([3], { dtype }).data()], [0, 0, 0], dtype);
    assertEquals([...await ones([3], { dtype }).data()], [1, 1, 1], dtype);
    assertEquals(ones([2, 0], { dtype }).size, 0);
  }
  assertEquals(await full([], 2.5).item(), 2.5);
  assertEquals([...await full([2], -3, { dtype: "i32" }).data()], [-3, -3]);
  assertEquals(await full([1], -Infinity).item(), -Infinity);
  assertEquals(Number.isNaN(await full([1], NaN).item()), true);
  assertThrows(() => full([1], "1" as unknown as number), TypeError, 'full: value must be a number, got "1"');
  assertThrows(() => zeros([1.5]), RangeError, "zeros: shape[0] must be");
  assertThrows(() => zeros(3 as unknown as number[]), TypeError, "zeros: shape must be an array of sizes, got 3");
  assertThrows(() => ones([2 ** 16, 2 ** 16]), RangeError, "ones: shape [65536, 65536] has 2³¹ elements or more");
});

Deno.test("create: arange and eye", async () => {
  await init();
  using _scope = new Scope();
  assertEquals([...await arange(3).data()], [0, 1, 2]);
  assertEquals([...await arange(2, 5).data()], [2, 3, 4]);
  assertEquals([...await arange(5, 1, -2).data()], [5, 3]);
  assertEquals([...await arange(0, 1, 0.25).data()], [0, 0.25, 0.5, 0.75]);
  assertEquals(arange(0).shape, [0]);
  assertEquals(arange(3, 0, -1, { dtype: "i32" }).dtype, "i32");
  assertThrows(() => arange(0, 5, 0), RangeError, "arange: step must lead from 0 to 5, got 0");
  assertThrows(() => arange(0, 5, -1), RangeError, "arange: step must lead from 0 to 5, got -1");
  assertThrows(() => arange(-1), RangeError, "arange: step must lead from 0 to -1, got 1");
  assertThrows(() => arange(0, 5, -7), RangeError, "arange: step must lead from 0 to 5, got -7");
  assertThrows(() => arange(0.5, 0), RangeError, "arange: step must lead from 0.5 to 0, got 1");
  assertEquals(arange(5, 5, -1).shape, [0]);
  assertThrows(() => arange(0, 1e12), RangeError, "arange: the number of elements must be a finite number, below 2147");
  assertThrows(() => eye(1e12), RangeError, "eye: n must be an integer, at least 0, below 2147483648");
  assertEquals([...await eye(3).data()], [1, 0, 0, 0, 1, 0, 0, 0, 1]);
  assertEquals(eye(0).shape, [0, 0]);
  assertThrows(() => eye(1.5), RangeError, "eye: n must be");
  // deno-lint-ignore no-explicit-any
  for (const [name, make] of Object.entries({ zeros, rand, randn } as Record<string, any>)) {
    assertThrows(() => make(2, 3), TypeError, `${name}: shape must be an array of sizes, got 2`);
  }
  // deno-lint-ignore no-explicit-any
  assertThrows(() => tensor([1, 2, 3], 3 as any), TypeError, "tensor: shape must be an array of sizes, got 3");
  const huge = "are more than this adapter binds at once";
  assertThrows(() => eye(30_000), RangeError, `eye: 3600000000 bytes (shape [30000, 30000]) ${huge}`); // before the host takes them
  assertThrows(() => arange(2 ** 30), RangeError, `arange: 4294967296 bytes (shape [1073741824]) ${huge}`);
  assertThrows(() => eye(2, { dtype: "f64" as "f32" }), TypeError, "eye: dtype must be one of");
});

Deno.test("create: random numbers lie where they should, and repeat with the seed", async () => {
  const info = await init();
  using _scope = new Scope();
  const count = 100_000;
  manualSeed(7);
  const [uniform, normal, whole] = await Promise.all(
    [rand([count]), randn([count]), randint(-3, 4, [count])].map((x) => x.data()),
  );
  const mean = (x: ArrayLike<number>, power = 1) => Array.from(x).reduce((sum, v) => sum + v ** power, 0) / x.length;
  // 5 standard errors of each mean
  const near = (got: number, want: number, deviation: number) =>
    assert(Math.abs(got - want) < 5 * deviation / Math.sqrt(count), `${got}, not ${want}`);
  assert(uniform.every((v) => v >= 0 && v < 1));
  near(mean(uniform), 1 / 2, Math.sqrt(1 / 12));
  near(mean(uniform, 2), 1 / 3, Math.sqrt(4 / 45));
  near(mean(normal), 0, 1);
  near(mean(normal, 2), 1, Math.sqrt(2));
  near(mean(normal, 4), 3, Math.sqrt(96));
  assertEquals([...new Set(whole)].sort((a, b) => a - b), [-3, -2, -1, 0, 1, 2, 3]);
  near(mean(whole), 0, 2);

  manualSeed(7);
  assertEquals(await rand([count]).data(), uniform);
  assertNotEquals(await rand([count]).data(), uniform);
  assertEquals(randint(0, 2, [2]).dtype, "i32");
  assertEquals(randint(0, 2, [2], { dtype: "f32" }).dtype, "f32");
  assertThrows(() => randint(2, 2, [1]), RangeError, "randint: high must be");
  assertThrows(() => randint(0.5, 2, [1]), RangeError, "randint: low must be");
  // what a dtype would round to the next
  for (const [dtype, most] of [["f32", 2 ** 24], ["f16", 2 ** 11]] as const) {
    if (dtype === "f16" && !info.f16) continue;
    assertThrows(
      () => randint(0, most + 2, [1], { dtype }),
      RangeError,
      `randint: high must be an integer, above 0, at`,
    );
    assertThrows(
      () => randint(-most - 1, 0, [1], { dtype }),
      RangeError,
      "randint: low must be an integer, at least -",
    );
    assertEquals(await randint(most, most + 1, [1], { dtype }).array(), [most]);
  }
  const last = await randint(2 ** 32 - 2, 2 ** 32, [99], { dtype: "u32" }).data();
  assertEquals([...new Set(last)].sort(), [2 ** 32 - 2, 2 ** 32 - 1]);
  if (info.f16) assert((await rand([count], { dtype: "f16" }).data()).every((v) => v >= 0 && v < 1));
});

Deno.test("create: integers that a dtype does not hold are refused", async () => {
  await init();
  using _scope = new Scope();
  assertEquals([...await tensor([1.5, -0.5, 2 ** 31 - 1], { dtype: "i32" }).data()], [1, 0, 2 ** 31 - 1]);
  for (const value of [NaN, Infinity, 2 ** 31, -(2 ** 31) - 1]) {
    assertThrows(() => tensor([value], { dtype: "i32" }), RangeError, `tensor: values must fit i32, got ${value}`);
  }
  assertThrows(() => tensor(new Int32Array([-1]), { dtype: "u32" }), RangeError, "tensor: values must fit u32, got -1");
  assertThrows(() => full([1], -1, { dtype: "u32" }), RangeError, "full: value must be an integer, at least 0");
  assertThrows(() => full([1], NaN, { dtype: "i32" }), RangeError, "full: value must be an integer");
  assertThrows(() => zeros(new Array(2)), TypeError, "zeros: shape[0] must be a number, got undefined"); // holes
});

Deno.test("create: what would come out as other numbers than were asked for is refused", async () => {
  await init();
  using _scope = new Scope();
  const options = (dtype: string) => ({ dtype: dtype as DType });
  assertThrows(() => arange(2 ** 31 - 2, 2 ** 31 + 2, 1, options("i32")), RangeError, "arange: values must fit i32");
  assertThrows(() => arange(-1, 2, 1, options("u32")), RangeError, "arange: values must fit u32, got -1");
  assertThrows(() => randint(-5, 3, [2], options("u32")), RangeError, "randint: low must be an integer, at least 0");
  assertEquals(randint(0, 3, [2], { dtype: undefined }).dtype, "i32");
  for (const draw of [rand, randn]) {
    assertThrows(() => draw([2], options("i32")), TypeError, `${draw.name}: dtype must be one of f32, f16, got "i32"`);
  }
  const detached = new Float32Array(4), buffer = new ArrayBuffer(16, { maxByteLength: 16 });
  const cut = new Float32Array(buffer, 0, 4);
  structuredClone(detached, { transfer: [detached.buffer] });
  buffer.resize(8);
  for (const gone of [detached, cut]) {
    assertThrows(
      () => tensor(gone),
      TypeError,
      "tensor: values must be there, got a Float32Array of 0 whose buffer was",
    );
  }
  assertEquals(tensor(new Float32Array(0)).shape, [0]);
});

Deno.test("create: arrays that hold themselves, no sizes and too many dimensions", async () => {
  await init();
  using _scope = new Scope();
  // deno-lint-ignore no-explicit-any
  const endless: any[] = [], deep = (n: number): any => n === 0 ? 1 : [deep(n - 1)];
  endless.push(endless);
  assertThrows(() => tensor(endless), RangeError, "tensor: values must be nested at most 12 deep");
  assertThrows(() => zeros([endless as unknown as number]), TypeError, "zeros: shape[0] must be a number, got [[");
  assertThrows(() => tensor([1, [2]]), TypeError, "nested evenly: a number at depth 1 at first, then an array of 1");
  assertThrows(() => tensor(Object.create(Float32Array.prototype)), TypeError, "tensor: values must be numbers");
  assertThrows(() => zeros([0, 2 ** 40]), RangeError, "zeros: shape[1] must be an integer, at least 0, below");
  assertThrows(() => zeros(new Array(13).fill(1)), RangeError, "zeros: a tensor has at most 12 dimensions, got 13");
  const most = tensor(deep(12));
  assertThrows(() => stack([most, most]), RangeError, "stack: a tensor has at most 12 dimensions, got 13");
  assertThrows(() => most.reshape(new Array(13).fill(1)), RangeError, "reshape: a tensor has at most 12 dimensions");
  const empty = [
    zeros([-0]),
    zeros([0]).reshape([-0]),
    tensor([], [-0]),
    zeros([1]).expand([-0]),
    zeros([1]).slice([[0, -0]]),
  ];
  for (const { shape } of empty) assert(Object.is(shape[0], 0)); // which assertEquals does not tell from −0
  // four operands of as many dimensions as there may be, none of which merge
  const shape = Array.from({ length: 12 }, (_, i) => i % 2 ? 2 : 1), other = shape.map((n) => 3 - n);
  const a = full(shape, 6, { requiresGrad: true }), b = full(other, 2, { requiresGrad: true });
  using _tape = new Tape();
  const y = a.div(b);
  y.sum().backward();
  assertEquals([y.size, await a.grad!.sum().item(), await b.grad!.sum().item()], [4096, 2048, -6144]);
  assertEquals(await y.permute(y.shape.map((_, i) => 11 - i)).sum().item(), 3 * 4096);
});

Deno.test("create: randint draws every number of a range equally often", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(3);
  for (const range of [3, 1000, 40_000, 65_537]) {
    const draws = 20 * range, counts = new Float64Array(range);
    for (const n of await randint(0, range, [draws]).data()) counts[n]++;
    const spread = counts.reduce((sum, n) => sum + (n - 20) ** 2 / 20, 0) / range; // χ² a number: 1 ± √(2/range)
    assert(Math.abs(spread - 1) < 5 * Math.sqrt(2 / range), `${range}: ${spread}`);
  }
});

Deno.test("tensor: later changes of the caller's array change nothing", async () => {
  await init();
  using _scope = new Scope();
  const array = new Int32Array([1]), index = tensor(array), x = tensor(new Float32Array(array));
  array[0] = 9;
  assertEquals(await embedding(tensor([[3], [4]]), index).array(), [[4]]); // which also checks what the host wrote
  assertEquals(await x.array(), [1]);
});

Deno.test("manualSeed takes every u32, randint no range beyond one", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(2 ** 32 - 1);
  rand([1]);
  assertThrows(() => randint(-(2 ** 31), 2 ** 31, [1]), RangeError, "randint: high");
});
