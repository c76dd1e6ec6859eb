// Values over many steps are among the reference cases (testing/golden_test.ts); here are the rules around them.
import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { init, matmul, nn, optim, Scope, stats, Tape, type Tensor, tensor } from "@limbeck/limbeck";

const leaf = (values: number[]) => tensor(values, undefined, { requiresGrad: true }).keep();
const read = async (x: Tensor) => Array.from(await x.data());

/** One step with these gradients; null leaves a parameter out. */
function step(optimizer: optim.Optimizer, parameters: Tensor[], gradients: (number[] | null)[]): void {
  using _tape = new Tape();
  optimizer.zeroGrad();
  parameters.forEach((p, i) => {
    if (gradients[i]) p.mul(tensor(gradients[i])).sum().backward();
  });
  optimizer.step();
}

Deno.test("optim: groups have rates and decays of their own", async () => {
  await init();
  const [a, b, c] = [leaf([1, 1]), leaf([1, 1]), leaf([1, 1])];
  const optimizer = new optim.SGD([{ params: [a], lr: 0.5 }, { params: [b], weightDecay: 0 }, { params: [c] }], {
    lr: 0.25,
    weightDecay: 1,
  });
  const ones = [[1, 2], [1, 2], [1, 2]];
  step(optimizer, [a, b, c], ones);
  assertEquals(await read(a), [0, -0.5]); // 1 − ½(g + 1)
  assertEquals(await read(b), [0.75, 0.5]); // 1 − ¼g
  assertEquals(await read(c), [0.5, 0.25]); // 1 − ¼(g + 1)
  optimizer.lr = 0.5; // a has its own
  step(optimizer, [a, b, c], ones);
  assertEquals(await read(b), [0.25, -0.5]);
  assertEquals(await read(a), [-0.5, -1.25]);
});

Deno.test("optim: a parameter without a gradient sits the step out, decay and step count included", async () => {
  await init();
  const [a, b] = [leaf([1]), leaf([1])];
  const optimizer = new optim.AdamW([a, b], { lr: 0.1, weightDecay: 0.5 });
  for (let i = 0; i < 3; i++) step(optimizer, [a, b], [[1], null]);
  assertEquals(await read(b), [1]);
  step(optimizer, [a, b], [null, [1]]);
  // b's first step: p·(1 − lr·λ) − lr, since the bias corrections begin with it
  assertAlmostEquals(await b.item(), 0.95 - 0.1, 1e-6);
  // a's moments stood still: the fourth step of a constant gradient is lr too
  const before = await a.item();
  step(optimizer, [a, b], [[1], null]);
  assertAlmostEquals(await a.item(), before * 0.95 - 0.1, 1e-6);
  const standing = await read(a);
  optimizer.zeroGrad();
  optimizer.step(); // nobody has a gradient
  assertEquals(await read(a), standing);
});

Deno.test("optim: Adam moves by lr a step where the gradient is constant", async () => {
  await init();
  const a = leaf([1]), optimizer = new optim.Adam([a], { lr: 0.125 });
  for (let i = 0; i < 8; i++) step(optimizer, [a], [[3]]);
  // m̂ = g and v̂ = g² whatever β is, so that only roundings are left: 8 steps of at most 1e-7
  assertAlmostEquals(await a.item(), 0, 1e-6);
});

Deno.test("optim: gradients set by hand", async () => {
  await init();
  const [a, b] = [leaf([1, 1]), leaf([1, 1])];
  a.grad = tensor([1, 2]).keep(); // before the optimizer exists
  const optimizer = new optim.SGD([a, b], { lr: 1 });
  b.grad = tensor([3, 4]).keep();
  optimizer.step();
  assertEquals([await read(a), await read(b)], [[0, -1], [-2, -3]]);
  optimizer.zeroGrad();
  assertEquals([a.grad, b.grad], [null, null]);
  a.grad = tensor([[1, 2]]).keep();
  assertThrows(() => optimizer.step(), TypeError, "SGD: grad must have shape [2], got [1, 2]");
  optimizer.zeroGrad();
});

Deno.test("optim: backward adds to gradients that are there", async () => {
  await init();
  const a = leaf([1, 1]), optimizer = new optim.SGD([a], { lr: 1 });
  a.grad = tensor([10, 20]).keep();
  {
    using _tape = new Tape();
    a.mul(2).sum().backward();
    a.mul(3).sum().backward();
    optimizer.step();
  }
  assertEquals(await read(a), [-14, -24]);
});

Deno.test("optim: zeroGrad leaves a gradient that somebody holds readable", async () => {
  await init();
  const a = leaf([1, 2]), optimizer = new optim.SGD([a], { lr: 1 });
  step(optimizer, [a], [[3, 4]]);
  const held = a.grad!.detach();
  step(optimizer, [a], [[5, 6]]);
  assertEquals([await read(held), await read(a.grad!)], [[3, 4], [5, 6]]);
  held.dispose();
});

Deno.test("optim: a gradient that somebody holds stays, also where .grad was set to null by hand", async () => {
  await init();
  const a = leaf([1, 2]), optimizer = new optim.SGD([a], { lr: 1 });
  step(optimizer, [a], [[3, 4]]);
  const held = a.grad!;
  a.grad = null;
  step(optimizer, [a], [[5, 6]]);
  assertEquals([await read(held), await read(a.grad!)], [[3, 4], [5, 6]]);
  held.dispose();
});

Deno.test("optim: two models with two optimizers", async () => {
  await init();
  using _scope = new Scope();
  const [a, b] = [leaf([1]), leaf([1])];
  const first = new optim.SGD([a], { lr: 1 }), second = new optim.SGD([b], { lr: 0.5 });
  for (let i = 0; i < 2; i++) {
    using _tape = new Tape();
    first.zeroGrad();
    second.zeroGrad();
    a.mul(2).add(b.mul(4)).sum().backward(); // one loss for both
    first.step();
    second.step();
  }
  assertEquals([await read(a), await read(b)], [[-3], [-3]]);
});

Deno.test("optim: a parameter that another optimizer took says so", async () => {
  await init();
  const a = leaf([1]), first = new optim.SGD([a], { lr: 1 }), second = new optim.SGD([a], { lr: 1 });
  using _tape = new Tape();
  a.mul(2).sum().backward();
  assertThrows(() => first.step(), Error, "was handed to another optimizer since");
  second.step();
  assertEquals(await read(a), [-1]);
});

Deno.test("optim: a shared parameter counts once", async () => {
  await init();
  const a = leaf([1]), optimizer = new optim.SGD([a, a], { lr: 1 });
  step(optimizer, [a], [[1]]);
  assertEquals(await read(a), [0]);
  assertThrows(() => new optim.SGD([{ params: [a] }, { params: [a] }]), RangeError, "is in two groups");
});

Deno.test("optim: a product of a parameter with itself", async () => {
  await init();
  const a = tensor([[1, 2], [3, 4]], undefined, { requiresGrad: true }).keep(),
    optimizer = new optim.SGD([a], { lr: 1 });
  using _tape = new Tape();
  matmul(a, a).sum().backward(); // two gradients for one place
  assertEquals(await a.grad!.array(), [[7, 11], [9, 13]]);
  optimizer.step();
  assertEquals(await a.array(), [[-6, -9], [-6, -9]]);
});

Deno.test("optim: parameters keep values, and views of them stay views", async () => {
  await init();
  const a = leaf([1, 2, 3, 4]), view = a.reshape([2, 2]).detach();
  const b = leaf(Array.from({ length: 100 }, (_, i) => i)); // more than one slot of 64
  const optimizer = new optim.SGD([a, b], { lr: 1 });
  assertEquals(await view.array(), [[1, 2], [3, 4]]);
  step(optimizer, [a, b], [[1, 1, 1, 1], Array.from({ length: 100 }, (_, i) => i)]);
  assertEquals(await view.array(), [[0, 1], [2, 3]]);
  assertEquals(await read(b), new Array(100).fill(0));
});

Deno.test("optim: disposed parameters", async () => {
  await init();
  const before = stats().liveBytes;
  const [a, b] = [leaf([1]), leaf([1])], optimizer = new optim.Adam([a, b], { lr: 1 });
  step(optimizer, [a, b], [[1], [1]]);
  a.dispose();
  step(optimizer, [b], [[1]]);
  assertAlmostEquals(await b.item(), -1, 1e-4);
  optimizer.dispose();
  optimizer.dispose();
  assertThrows(() => optimizer.step(), Error, "Adam: the optimizer was disposed");
  assertAlmostEquals(await b.item(), -1, 1e-4); // the others live on
  b.dispose();
  assertEquals(stats().liveBytes, before);
});

Deno.test("optim: all bytes come back, in whichever order things are disposed of", async () => {
  await init();
  const before = stats().liveBytes;
  for (const modelFirst of [true, false]) {
    const model = new nn.Linear(3, 2), optimizer = new optim.AdamW(model.parameters());
    {
      using _tape = new Tape();
      model.forward(tensor([[1, 2, 3]])).sum().backward();
      optimizer.step();
    }
    for (const x of modelFirst ? [model, optimizer] : [optimizer, model]) x.dispose();
    assertEquals(stats().liveBytes, before, `model ${modelFirst ? "first" : "last"}`);
  }
});

Deno.test("optim: training goes on after an optimizer was replaced", async () => {
  await init();
  const a = leaf([1]);
  const first = new optim.SGD([a], { lr: 1 });
  step(first, [a], [[1]]);
  first.dispose();
  const second = new optim.SGD([a], { lr: 2 });
  step(second, [a], [[1]]);
  assertEquals(await read(a), [-2]);
});

Deno.test("optim: a step is an in-place change that backward finds", async () => {
  await init();
  const a = leaf([1, 2]), optimizer = new optim.SGD([a], { lr: 1 });
  using _tape = new Tape();
  const late = a.square().sum();
  a.mul(1).sum().backward();
  optimizer.step();
  assertThrows(() => late.backward(), Error, "changed in place after it was used");
});

Deno.test("optim: f16 parameters are refused", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const half = tensor([1], undefined, { dtype: "f16", requiresGrad: true });
  assertThrows(() => new optim.SGD([half]), TypeError, "SGD: params must have dtype f32, got f16");
});

Deno.test("optim: what constructors throw", async () => {
  await init();
  const a = leaf([1]);
  assertThrows(() => new optim.SGD([]), RangeError, "SGD: params must hold at least one parameter");
  assertThrows(() => new optim.SGD([tensor([1])]), TypeError, "SGD: params must be leaves that require a gradient");
  assertThrows(() => new optim.Adam([a], { lr: -1 }), RangeError, "Adam: lr must be");
  assertThrows(() => new optim.Adam([a], { betas: [0.9, 1] }), RangeError, "Adam: betas[1] must be");
  assertThrows(() => new optim.AdamW([a], { weightDecay: NaN }), RangeError, "AdamW: weightDecay must be");
  assertThrows(() => new optim.SGD([a], { nesterov: true }), RangeError, "SGD: nesterov needs a momentum");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new optim.SGD([a], { learningRate: 1 } as any), TypeError, "unknown option");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new optim.SGD(a as any), TypeError, "SGD: params must be an array of Tensors or of groups");
  using _tape = new Tape();
  assertThrows(() => new optim.SGD([a.mul(2)]), TypeError, "SGD: params must be leaves");
});
