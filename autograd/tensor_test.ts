import { assert, assertEquals, assertRejects, assertStrictEquals, assertThrows } from "@std/assert";
import { inspect } from "node:util";
import { dispose, init, optim, Scope, stats, Tape, Tensor, tensor, zeros } from "@limbeck/limbeck";

Deno.test("tensor: shape, dtype and reads", async () => {
  await init();
  using _scope = new Scope();
  const x = tensor([[1, 2, 3], [4, 5, 6]]);
  assertEquals([x.shape, x.dtype, x.size, x.rank, x.requiresGrad, x.grad], [[2, 3], "f32", 6, 2, false, null]);
  assertEquals(await x.data(), new Float32Array([1, 2, 3, 4, 5, 6]));
  assertEquals(await x.array(), [[1, 2, 3], [4, 5, 6]]);
  assertEquals(await tensor(7).item(), 7);
  assertEquals(await tensor([[[7]]]).item(), 7);
  assertEquals(await tensor(7).array(), 7);
  assertEquals(await zeros([2, 0]).array(), [[], []]);
  assertEquals(await tensor(new Uint32Array([2 ** 32 - 1])).data(), new Uint32Array([2 ** 32 - 1]));
  await assertRejects(() => x.item(), TypeError, "item: the tensor must have one element, got shape [2, 3]");
  assertEquals(String(x), "Tensor([2, 3], f32)");
});

Deno.test("tensor: later writes to the source do not reach it", async () => {
  await init();
  using _scope = new Scope();
  for (const size of [3, 100_000]) { // through the arena and directly
    const source = new Float32Array(size).fill(1), x = tensor(source);
    source.fill(2);
    assertEquals((await x.data())[size - 1], 1);
  }
});

Deno.test("tensor: dispose twice, and what a closed tensor says", async () => {
  await init();
  const x = tensor([1, 2]);
  x.dispose();
  x.dispose();
  assert(x.closed);
  assertEquals(String(x), "Tensor([2], f32, closed)");
  const message = "this tensor of shape [2] was closed by dispose(); keep() it if it must live longer";
  for (const op of ["data", "array"] as const) await assertRejects(() => x[op](), TypeError, `${op}: ${message}`);
  for (const op of ["keep", "detach"] as const) assertThrows(() => x[op](), TypeError, `${op}: ${message}`);
  assertThrows(() => x.mul(2), TypeError, "mul: a (shape [2]) was closed");
  assertThrows(() => tensor([1, 2]).mul(x), TypeError, "mul: b (shape [2]) was closed");
});

Deno.test("tensor: new says where tensors come from", () => {
  // deno-lint-ignore no-explicit-any
  const Made = Tensor as any;
  assertThrows(() => new Made([1]), TypeError, "Tensor: tensors are made by tensor(values, shape)");
});

Deno.test("tensor: keep returns the tensor and takes it out of its scope", async () => {
  await init();
  const scope = new Scope(), x = tensor([1]);
  assertStrictEquals(x.keep(), x);
  scope.close();
  assertEquals(await x.item(), 1);
  x.dispose();
});

Deno.test("tensor: views and detach share one storage, freed with its last owner", async () => {
  await init();
  const before = stats().liveBytes;
  const x = tensor([1, 2, 3, 4]), live = stats().liveBytes;
  const view = x.reshape([2, 2]), detached = view.detach();
  assertEquals(stats().liveBytes, live);
  x.assign(tensor([5, 6, 7, 8]));
  assertEquals(await detached.array(), [[5, 6], [7, 8]]);
  x.dispose();
  view.dispose();
  assertEquals(await detached.array(), [[5, 6], [7, 8]]);
  assert(stats().liveBytes > before);
  detached.dispose();
});

Deno.test("tensor: detach stops the gradient", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([2, 3], { requiresGrad: true });
  x.mul(x.detach()).sum().backward();
  assertEquals(await x.grad!.array(), [2, 3]); // not 2x
  assertEquals(x.detach().requiresGrad, false);
});

Deno.test("tensor: assign", async () => {
  await init();
  using _scope = new Scope();
  const uploaded = tensor([1, 2]), view = uploaded.reshape([2, 1]), made = zeros([2]);
  assertStrictEquals(uploaded.assign(tensor([3, 4])), uploaded); // host-written memory, which no kernel writes
  assertEquals(await view.array(), [[3], [4]]);
  made.assign(uploaded);
  uploaded.assign(tensor([5, 6]));
  assertEquals([await made.array(), await view.array()], [[3, 4], [[5], [6]]]);
  view.assign(tensor([[7], [8]]));
  assertEquals(await uploaded.array(), [7, 8]);
  uploaded.assign(uploaded).assign(view.reshape([2]));
  assertEquals(await uploaded.array(), [7, 8]);
  assertThrows(() => uploaded.assign(tensor([1])), TypeError, "assign: other must have shape [2], got [1]");
  assertThrows(() => uploaded.assign(tensor(new Int32Array(2))), TypeError, "assign: other must have dtype f32");
  assertEquals(await zeros([0]).assign(zeros([0])).array(), []);
});

Deno.test("tensor: assign sees the value of the other at the time of the call", async () => {
  await init();
  using _scope = new Scope();
  const a = tensor([1]), b = tensor([2]), swap = zeros([1]);
  swap.assign(a);
  a.assign(b);
  b.assign(swap);
  assertEquals([await a.item(), await b.item()], [2, 1]);
});

Deno.test("tensor: assign between two parameters of one optimizer", async () => {
  await init();
  using _scope = new Scope();
  const a = tensor([1, 2], { requiresGrad: true }), b = tensor([3, 4], { requiresGrad: true });
  using _optimizer = new optim.SGD([a, b]); // both lie in one buffer now
  using _tape = new Tape();
  const y = a.square().sum();
  a.assign(b);
  b.assign(tensor([5, 6]));
  assertEquals([await a.array(), await b.array()], [[3, 4], [5, 6]]);
  assertThrows(() => y.backward(), Error, "an input of square (shape [2]) was changed in place");
});

Deno.test("tensor: assign does not touch the memory of whoever takes the slot next", async () => {
  await init();
  using _scope = new Scope();
  const x = tensor([1, 2]);
  x.assign(tensor([3, 4])); // its slot of host-written data is free again
  const next = Array.from({ length: 10 }, (_, i) => tensor([i, i]));
  assertEquals(await x.array(), [3, 4]);
  assertEquals(await Promise.all(next.map((t) => t.array())), next.map((_, i) => [i, i]));
});

Deno.test("tensor: many live tensors without a scope warn once and name the op", async () => {
  await init();
  const { warn } = console, said: string[] = [];
  console.warn = (message: string) => said.push(message);
  const made: Tensor[] = [];
  try {
    for (let i = 0; i < 600; i++) tensor([i]);
    await dispose(); // they are gone
    await init();
    const x = tensor([1]);
    for (let i = 0; i < 600; i++) made.push(x.neg());
    for (let i = 0; i < 600; i++) x.neg().dispose();
    assertEquals(said, []);
    for (let i = 0; i < 500; i++) made.push(x.neg());
    made.push(x);
  } finally {
    console.warn = warn;
    for (const t of made) t.dispose();
  }
  assertEquals(said.length, 1);
  assert(said[0].includes("more than 1000 live tensors") && said[0].includes("neg"), said[0]);
});

Deno.test("tensor: what the console shows", async () => {
  await init();
  using _tape = new Tape();
  const y = tensor([[1, 2]], { requiresGrad: true }).square();
  assertEquals(Deno.inspect([y]), "[ Tensor([1, 2], f32, requiresGrad) ]");
  y.dispose();
  assertEquals(inspect(y), "Tensor([1, 2], f32, requiresGrad, closed)");
});

Deno.test("tensor: what is set by hand must fit", async () => {
  await init();
  using _scope = new Scope();
  {
    using _tape = new Tape();
    const y = tensor([1], { requiresGrad: true }).mul(2);
    assertThrows(() => y.requiresGrad = false, TypeError, "only leaves can be frozen");
  }
  // deno-lint-ignore no-explicit-any
  const x = tensor([1, 2], { requiresGrad: true }) as any, whole = tensor(new Int32Array(2)) as any;
  const set = (value: unknown) => () => x.grad = value;
  assertThrows(set(5), TypeError, "grad: the value must be a Tensor, got 5");
  assertThrows(set(0), TypeError, "grad: the value must be a Tensor, got 0");
  assertThrows(set(tensor([1])), TypeError, "grad: the value must have shape [2], got [1]");
  assertThrows(set(tensor([[1, 2], [3, 4]])), TypeError, "grad: the value must have shape [2], got [2, 2]");
  const matrix = tensor([[1, 2], [3, 4]], { requiresGrad: true });
  assertThrows(() => matrix.grad = tensor([1, 2]), TypeError, "grad: the value must have shape [2, 2], got [2]");
  assertThrows(set(whole), TypeError, "grad: the value must have dtype f32, got i32");
  set(tensor([3, 4]))();
  assertEquals(await x.grad.array(), [3, 4]);
  set(undefined)();
  assertEquals(x.grad, null);
  x.dispose();
  assertThrows(set(tensor([3, 4])), TypeError, "grad: this tensor of shape [2] was closed by dispose()");
  assertThrows(() => whole.requiresGrad = true, TypeError, "only f32 and f16 tensors can require a gradient, got");
  assertThrows(() => x.requiresGrad = 1, TypeError, "requiresGrad: the value must be true or false, got 1");
});
