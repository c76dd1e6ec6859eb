import { assertEquals, assertThrows } from "@std/assert";
import { concat, defineKernel, embedding, gather, init, oneHot, Scope, Tape, tensor } from "@limbeck/limbeck";
import { checkOps, random } from "../testing/op.ts";
import { at, indexed, sizeOf } from "../testing/reference.ts";

/** Indices below `size` in which values repeat. */
const indices = (count: number, size: number) =>
  Int32Array.from({ length: count }, (_, i) => (i * i + Math.floor(i / 3)) % size);

Deno.test("indexing: what a kernel wrote over the host's indices is what counts", async () => {
  await init();
  using _scope = new Scope();
  const write = defineKernel({
    name: "newIndices",
    buffers: { y: "write i32" },
    params: { size: "u32" },
    main: "if (thread < params.size) { y[thread] = i32(thread % 2u); }",
  });
  const size = 20_000, index = tensor(new Int32Array(size).fill(7)), table = tensor([[3], [4]]); // too large for the arena
  assertThrows(() => embedding(table, index), RangeError, "got 7 at element 0");
  write.run({ y: index.memory }, { size }, Math.ceil(size / 256));
  const got = await embedding(table, index).data();
  assertEquals([got[0], got[1], got[size - 1]], [3, 4, 4]);
});

Deno.test("indexing: embedding", async () => {
  const cases: [number[], number[]][] = [ // weight, index
    [[1, 1], [1]],
    [[5, 3], [7]],
    [[7, 1], [2, 3]],
    [[3, 257], [2, 1, 2]],
    [[4, 5], []],
    [[2, 3], [0]],
    [[300, 2], [5]], // most rows are not named: their gradient is 0
  ];
  await checkOps(cases.map(([weight, shape]) => {
    const index = indices(sizeOf(shape), weight[0]);
    return {
      name: `embedding by [${shape}]`,
      op: (w) => embedding(w, tensor(index, shape)),
      reference: (w) =>
        indexed([...shape, weight[1]], (i) => {
          const n = i.slice(0, -1).reduce((sum, k, d) => sum * shape[d] + k, 0);
          return at(w, [index[n], i.at(-1)!]);
        }),
      shapes: [weight],
    };
  }));
});

Deno.test("indexing: gather", async () => {
  const cases: [shape: number[], dim: number, taken: number, to?: number[]][] = [
    [[1], 0, 1],
    [[5], 0, 9],
    [[3, 4], 1, 2],
    [[3, 4], -2, 5],
    [[2, 3, 7], 1, 4],
    [[2, 3, 7], 2, 1],
    [[17, 5], 0, 33],
    [[2, 3], 1, 0],
    [[3, 4], 0, 5, [5, 2]], // smaller elsewhere
    [[2, 3, 7], 1, 4, [1, 4, 6]],
  ];
  await checkOps(cases.map(([shape, dim, taken, to = shape.toSpliced(dim, 1, taken)]) => {
    const along = dim < 0 ? dim + shape.length : dim;
    const index = indices(sizeOf(to), shape[along]);
    const which = { shape: to, data: Float64Array.from(index) };
    return {
      name: `gather ${taken} along ${dim}`,
      op: (x) => gather(x, dim, tensor(index, to)),
      reference: (x) => indexed(to, (i) => at(x, i.map((n, d) => d === along ? at(which, i) : n))),
      shapes: [shape],
    };
  }));
});

Deno.test("indexing: gradients of repeated indices add up in order, the same bits each time", async () => {
  await init();
  // few rows; many, of which a workgroup has several, with more than one block of positions and of columns
  for (const [count, rows, width] of [[2000, 3, 5], [2500, 2100, 130]]) {
    const draw = random(1);
    const index = Int32Array.from({ length: count }, () => Math.floor(rows * draw() ** 3));
    const dY = Float32Array.from({ length: count * width }, () => draw() - 0.5);
    // f32 sums in the order of the positions: nothing else gives these bits
    const want = new Float32Array(rows * width);
    for (let n = 0; n < count; n++) for (let c = 0; c < width; c++) want[index[n] * width + c] += dY[n * width + c];
    for (let run = 0; run < 3; run++) {
      using _tape = new Tape();
      const weight = tensor(new Float32Array(rows * width), [rows, width], { requiresGrad: true });
      embedding(weight, tensor(index)).backward(tensor(dY, [count, width]));
      assertEquals(await weight.grad!.data(), want, `embedding of ${rows} rows, run ${run}`);
      if (rows > 3) continue; // a gather's gradient looks at every position for every element
      const x = tensor(new Float32Array(rows * width), [rows, width], { requiresGrad: true });
      const columns = Int32Array.from({ length: count * width }, (_, i) => index[Math.floor(i / width)]);
      gather(x, 0, tensor(columns, [count, width])).backward(tensor(dY, [count, width]));
      assertEquals(await x.grad!.data(), want, `gather, run ${run}`);
    }
  }
});

Deno.test("indexing: an index out of range that the host wrote", async () => {
  await init();
  using _scope = new Scope();
  const weight = tensor([[1, 2], [3, 4], [5, 6]]), below = tensor(new Int32Array([0, 2, -1])).reshape([3, 1]);
  const indexOf = (...k: number[]) => tensor(new Int32Array(k));
  assertThrows(
    () => embedding(weight, indexOf(0, 3)),
    RangeError,
    "embedding: index must be in [0, 3), got 3 at element 1",
  );
  assertThrows(() => embedding(weight, below), RangeError, "got -1 at element 2");
  assertThrows(() => embedding(weight, tensor(new Uint32Array([2 ** 32 - 1]))), RangeError, "got 4294967295");
  assertThrows(
    () => gather(weight, 0, tensor(new Int32Array([0, 1, 2, 3]), [2, 2])),
    RangeError,
    "gather: index must be in [0, 3), got 3 at element 3",
  );
  assertThrows(() => gather(weight, 1, below), RangeError, "gather: index must be in [0, 2), got 2 at element 1");
});

Deno.test("indexing: an index out of range that only the GPU has seen gives NaN and no gradient", async () => {
  await init();
  using _tape = new Tape();
  const onGpu = (k: number[]) => concat([tensor(new Int32Array(k))]);
  const weight = tensor([[1, 2], [3, 4]], { requiresGrad: true }), x = tensor([1, 2], { requiresGrad: true });
  const y = embedding(weight, onGpu([1, 2, -1, 0, 2 ** 31 - 1]));
  assertEquals(await y.array(), [[3, 4], [NaN, NaN], [NaN, NaN], [1, 2], [NaN, NaN]]);
  y.backward(tensor([[1, 1], [10, 10], [20, 20], [2, 2], [30, 30]]));
  assertEquals(await weight.grad!.array(), [[2, 2], [1, 1]]);
  const z = gather(x, 0, onGpu([2, 1, -(2 ** 31)]));
  assertEquals(await z.array(), [NaN, 2, NaN]);
  z.backward(tensor([1, 2, 3]));
  assertEquals(await x.grad!.array(), [0, 2]);
});

Deno.test("indexing: integers through gather, exact beyond 2²⁴", async () => {
  await init();
  using _scope = new Scope();
  const index = tensor(new Int32Array([2, 0, 1, 2]));
  const signed = [2 ** 24 + 1, -(2 ** 31), 2 ** 31 - 1], unsigned = [2 ** 24 + 1, 2 ** 32 - 1, 2 ** 31 + 1];
  assertEquals(await gather(tensor(new Int32Array(signed)), 0, index).array(), [2, 0, 1, 2].map((k) => signed[k]));
  const u = tensor(new Uint32Array(unsigned)), byU32 = tensor(new Uint32Array([2, 0, 1, 2]));
  assertEquals(await gather(u, 0, byU32).array(), [2, 0, 1, 2].map((k) => unsigned[k]));
});

Deno.test("indexing: oneHot", async () => {
  await init();
  using _scope = new Scope();
  const hot = oneHot(tensor(new Int32Array([2, 0, -1, 3]), [2, 2]), 3);
  assertEquals(hot.dtype, "f32");
  assertEquals(await hot.array(), [[[0, 0, 1], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]);
  assertEquals(await oneHot(tensor(new Uint32Array([1])), 2).array(), [[0, 1]]);
  assertEquals(await oneHot(tensor(new Int32Array([0]), []), 1).array(), [1]);
});

Deno.test("indexing: what they throw", async () => {
  await init();
  using _scope = new Scope();
  const weight = tensor([[1, 2], [3, 4]]), index = tensor(new Int32Array([0, 1])), floats = tensor([0, 1]);
  assertThrows(() => embedding(floats, index), TypeError, "embedding: weight must have shape [rows, width], got [2]");
  assertThrows(
    () => embedding(weight, floats),
    TypeError,
    'embedding: index must have dtype i32 or u32, got f32 (tensor(values, { dtype: "i32" }) makes i32)',
  );
  assertThrows(() => embedding(index, index), TypeError, "embedding: weight must have dtype f32 or f16, got i32");
  assertThrows(
    () => gather(weight, 0, index),
    TypeError,
    "gather: index must have at most shape [2, 2] but for dimension 0",
  );
  assertThrows(() => gather(weight, 2, index), RangeError, "gather: dim must be");
  assertThrows(() => gather(weight, 0, weight), TypeError, "gather: index must have dtype");
  assertThrows(() => oneHot(floats, 2), TypeError, "oneHot: index must have dtype");
  assertThrows(() => oneHot(index, 0), RangeError, "oneHot: classes must be");
});

Deno.test("indexing: gradients of more equal indices than a software driver's loops have turns", async () => {
  await init();
  using _tape = new Tape();
  const count = 70_000, index = tensor(Int32Array.from({ length: count }, (_, i) => i % 7 === 0 ? 1 : 0));
  const weight = tensor([[1, 2, 3], [4, 5, 6]], { requiresGrad: true }), x = tensor([1, 2], { requiresGrad: true });
  embedding(weight, index).sum().add(gather(x, 0, index).sum()).backward();
  const ones = count / 7, zeros = count - ones;
  assertEquals(await weight.grad!.array(), [Array(3).fill(zeros), Array(3).fill(ones)]);
  assertEquals(await x.grad!.array(), [zeros, ones]);
});

Deno.test("gather: an index of unknown values that is out of range gives 0 in integers", async () => {
  await init();
  using _scope = new Scope();
  const index = tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).argmax({ dim: 1 });
  assertEquals(await gather(tensor(Int32Array.of(7, 8, 9)), 0, index).array(), [8, 0]);
});
