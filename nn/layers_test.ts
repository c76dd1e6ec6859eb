import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import {
  conv2d,
  gelu,
  init,
  manualSeed,
  nn,
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

Deno.test("layers: Conv2d is conv2d with parameters of its own", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(3);
  const layer = new nn.Conv2d(2, 3, 3, { stride: 2, padding: 1 });
  assertEquals(layer.namedParameters().map(([name, p]) => `${name} [${p.shape}]`), ["weight [3,2,3,3]", "bias [3]"]);
  const bound = 1 / Math.sqrt(2 * 3 * 3);
  for (const p of layer.parameters()) assert((await p.data()).every((v) => Math.abs(v) <= bound));
  const x = randn([2, 2, 5, 4]);
  {
    using _tape = new Tape();
    const y = layer.forward(x);
    assertEquals(y.shape, [2, 3, 3, 2]);
    assertEquals(await y.data(), await conv2d(x, layer.weight, layer.bias, { stride: 2, padding: 1 }).data());
    y.sum().backward();
    assert(layer.parameters().every((p) => p.grad !== null));
  }
  const bare = new nn.Conv2d(2, 3, 3, { bias: false });
  assertEquals([bare.bias, bare.stride, bare.padding], [null, 1, 0]);
  assertEquals(bare.forward(x).shape, [2, 3, 3, 2]);
  layer.dispose();
  bare.dispose();
});

Deno.test("layers: a Sequential calls a layer's own forward, between layers that become one kernel too", async () => {
  await init();
  using _scope = new Scope();
  const layer = () => new nn.Linear(2, 2), x = randn([3, 2]);
  for (const at of [0, 2, 4]) {
    const model = new nn.Sequential(layer(), relu, layer(), relu, layer());
    let calls = 0;
    (model.steps[at] as nn.Linear).forward = (y) => {
      calls++;
      return y;
    };
    model.forward(x);
    assertEquals(calls, 1, `step ${at}`);
    model.dispose();
  }
});

Deno.test("layers: a Sequential gives what its steps give one by one, whichever ends it", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(4);
  const layer = () => new nn.Linear(2, 2), steps = [layer(), gelu, gelu, layer(), relu, layer(), gelu, layer()];
  const x = randn([3, 2]);
  for (let from = 0; from < 4; from++) {
    for (let end = from + 1; end <= steps.length; end++) {
      const part = steps.slice(from, end),
        alone = part.reduce((y: Tensor, f) => f instanceof nn.Module ? f.forward(y) : f(y), x);
      const want = await alone.data(), got = await new nn.Sequential(...part).forward(x).data();
      got.forEach((v, i) => assertAlmostEquals(v, want[i], 1e-6, `steps ${from} to ${end}`)); // products in another order
    }
  }
});

Deno.test("layers: Dropout drops while training only", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(3);
  const dropout = new nn.Dropout(0.25), x = ones([10_000]);
  const kept = await dropout.forward(x).data();
  const share = kept.filter((v) => v !== 0).length / kept.length;
  assert(Math.abs(share - 0.75) < 5 * Math.sqrt(0.75 * 0.25 / kept.length), `${share} of 0.75 stayed`);
  assert(kept.every((v) => v === 0 || Math.abs(v - 4 / 3) < 1e-6));
  dropout.eval();
  assertEquals(await dropout.forward(x).data(), await x.data());
  assertEquals(await new nn.Dropout(1).forward(ones([3])).data(), Float32Array.of(0, 0, 0)); // as in PyTorch
  using _tape = new Tape();
  const w = ones([2], { requiresGrad: true }), { dispatches } = stats();
  const y = dropout.forward(w);
  assertEquals(stats().dispatches, dispatches); // a view
  y.mul(3).sum().backward();
  y.dispose(); // as in training, w stays
  assertEquals([await w.array(), await w.grad!.array()], [[1, 1], [3, 3]]);
});

Deno.test("layers: what they refuse", async () => {
  await init();
  assertThrows(() => new nn.Linear(0, 1), RangeError, "Linear: inFeatures must be");
  assertThrows(() => new nn.Linear(1, 1.5), RangeError, "Linear: outFeatures must be");
  assertThrows(() => new nn.Conv2d(1, 0, 3), RangeError, "Conv2d: outChannels must be");
  assertThrows(() => new nn.Conv2d(1, 1, 0), RangeError, "Conv2d: kernel must be");
  assertThrows(() => new nn.Dropout(1.1), RangeError, "Dropout: p must be");
  const linear = new nn.Linear(784, 10), images = zeros([4, 28, 28]);
  const narrow = "linear: x must have shape [..., 784] for a weight of shape [10, 784], got [4, 28";
  assertThrows(() => linear.forward(images), TypeError, `${narrow}, 28]`);
  const pair = new nn.Sequential(new nn.Linear(28, 2), relu, linear);
  assertThrows(() => pair.forward(images), TypeError, `${narrow}, 2]`); // in their one kernel too
  for (const layer of [linear, pair]) layer.dispose();
  const forgetful = new nn.Sequential(relu, () => undefined as unknown as Tensor);
  assertThrows(() => forgetful.forward(ones([1])), TypeError, "Sequential: step 1 must return a Tensor, got undefined");
  assertThrows(() => new nn.Sequential(3 as unknown as nn.Module), TypeError, "Sequential: step 0 must be a Module");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.Linear(1, 1, { bias: 0 } as any), TypeError, "Linear: bias must be true or false");
  assertThrows(() => new nn.Conv2d(1, 1, 1, { stride: 0 }), RangeError, "Conv2d: stride must be");
  assertThrows(() => new nn.Conv2d(1, 1, 1, { padding: -1 }), RangeError, "Conv2d: padding must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.Dropout().train(1 as any), TypeError, "train: on must be true or false, got 1");
});

Deno.test("RMSNorm: its own eps, and a weight that outlives the scope in which it was made", async () => {
  await init();
  let norm: nn.RMSNorm;
  {
    using _scope = new Scope();
    norm = new nn.RMSNorm(2, 9);
  }
  const y = norm.forward(tensor([[4, 4]])); // 4/√(16 + 9)
  for (const value of await y.data()) assertAlmostEquals(value, 0.8, 1e-6);
  for (const x of [norm, y]) x.dispose();
});
