// Values over many steps are among the reference cases (testing/golden_test.ts); here are the rules around them.
import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import {
  expand,
  full,
  init,
  matmul,
  nn,
  noGrad,
  optim,
  record,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  where,
} from "@limbeck/limbeck";
import { gpu } from "../kernels/gpu/gpu.ts";
import { largestError } from "../testing/compare.ts";
import { assertAllThrow, random } from "../testing/op.ts";

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

Deno.test("optim: segments, where one binding cannot hold all parameters, change nothing", async () => {
  const { limits } = await init(), draw = random(1);
  const [small, large] = [3, 100].map((n) => Array.from({ length: n }, () => draw() - 0.5));
  const run = async (most: number) => {
    const given = [small, large, small].map(leaf);
    gpu().info.limits = { ...limits, maxStorageBufferBindingSize: most };
    const optimizer = new optim.Adam([{ params: given.slice(0, 2) }, { params: [given[2]], lr: 0.1 }]);
    gpu().info.limits = limits;
    step(optimizer, given, [small, null, small]);
    const state = optimizer.stateDict();
    step(optimizer, given, [small, large, null]);
    optimizer.loadStateDict(state);
    const before = stats().dispatches;
    optimizer.step();
    const launches = stats().dispatches - before, values = await Promise.all(given.map(read));
    for (const x of [...given, optimizer, ...Object.values(state.tensors)]) x.dispose();
    return { launches, rest: [state.steps, Object.keys(state.tensors).sort(), values] };
  };
  const [one, three] = [await run(limits.maxStorageBufferBindingSize), await run(256)];
  assertEquals([one.launches, three.launches], [1, 2]); // the last segment has no gradient
  assertEquals(three.rest, one.rest);
});

Deno.test("optim: groups have rates and decays of their own", async () => {
  await init();
  const [a, b, c, d] = [leaf([1, 1]), leaf([1, 1]), leaf([1, 1]), leaf([1, 1])];
  const groups = [{ params: [a], lr: 0.5 }, { params: [b], weightDecay: 0 }, { params: [c] }, { params: [d], lr: 0 }];
  const optimizer = new optim.SGD(groups, { lr: 0.25, weightDecay: 1 });
  const ones = [[1, 2], [1, 2], [1, 2]];
  step(optimizer, [a, b, c, d], [...ones, [1, 2]]);
  assertEquals(await read(d), [1, 1]); // 0 is a rate as well
  assertEquals(await read(a), [0, -0.5]); // 1 − ½(g + 1)
  assertEquals(await read(b), [0.75, 0.5]); // 1 − ¼g
  assertEquals(await read(c), [0.5, 0.25]); // 1 − ¼(g + 1)
  optimizer.lr = 0.5; // a has its own
  step(optimizer, [a, b, c], ones);
  assertEquals(await read(b), [0.25, -0.5]);
  assertEquals(await read(a), [-0.5, -1.25]);
});

Deno.test("optim: the gradient of one parameter may be read where that of another is computed", async () => {
  await init();
  const [a, b] = [[1, 2, 3, 4], [5, 6, 7, 8]].map((x) => tensor(x, [2, 2], { requiresGrad: true }).keep());
  using _optimizer = new optim.SGD([a, b], { lr: 1 }); // one buffer holds both gradients
  using _tape = new Tape();
  b.mul(tensor([[1, 2], [3, 4]])).sum().backward();
  matmul(a, b.grad!).sum().backward(); // the product of its backward rule would write into the buffer that it reads
  assertEquals(await read(a.grad!), [3, 7, 3, 7]);
  const spec = { op: "given", inputs: [a], output: a.detach(), backward: () => [b.grad!] };
  record(spec).sum().backward();
  assertEquals(await read(a.grad!), [4, 9, 6, 11]);
  a.grad = b.grad = null;
  const y = matmul(b, tensor([[2, 0], [0, 2]])), output = noGrad(() => a.add(y));
  record({ // y's gradient is in the place of a's
    op: "shared",
    inputs: [a, y],
    output,
    backward: (dOut, _, gradientOf) => {
      const d = gradientOf(0).assign(dOut);
      return [d, d];
    },
  }).sum().backward();
  assertEquals([await read(a.grad!), await read(b.grad!)], [[1, 1, 1, 1], [2, 2, 2, 2]]);
  for (const x of [a, b]) x.dispose();
});

Deno.test("optim: the gradient of a broadcast parameter is summed where the optimizer keeps it", async () => {
  await init();
  const bias = leaf([1, 2]), x = tensor([[1, 2], [3, 4], [5, 6]]).keep();
  using _optimizer = new optim.SGD([bias], { lr: 1 });
  const ways: [string, () => Tensor, number][] = [
    ["add", () => x.add(bias), 1], // the sum alone: no copy to its place
    ["mul", () => x.mul(bias), 2], // dY·x, and its sum
    ["where", () => where(x, bias, x), 2],
    ["expand", () => expand(bias, [3, 2]), 1],
    ["twice", () => x.mul(bias).add(bias), 4], // one sum there, dY·x, its sum, and that added
  ];
  for (const [name, forward, launches] of ways) {
    using _tape = new Tape();
    const y = forward(), dY = tensor([[1, 2], [3, 4], [5, 6]]);
    bias.grad = null;
    const before = stats().dispatches;
    y.backward(dY);
    assertEquals(stats().dispatches - before, launches, name);
    const sums = [9, 12], products = [35, 56];
    const want = name === "mul" ? products : name === "twice" ? sums.map((n, i) => n + products[i]) : sums;
    assertEquals(await read(bias.grad!), want, name);
  }
  for (const tensor of [bias, x]) tensor.dispose();
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

Deno.test("optim: Adam forgets a large gradient as fast as its first decay says", async () => {
  await init();
  for (const beta of [0, 0.25]) {
    const a = leaf([1]), optimizer = new optim.Adam([a], { lr: 0.1, betas: [beta, 0] });
    let p = 1, m = 0;
    for (const [i, g] of [1e4, ...Array.from({ length: 12 }, () => 1e-4)].entries()) {
      step(optimizer, [a], [[g]]);
      m = beta * m + (1 - beta) * g;
      p -= 0.1 * m / (1 - beta ** (i + 1)) / (g + 1e-8);
    }
    assertAlmostEquals(await a.item() / p, 1, 1e-6);
  }
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
  a.assign(tensor([1, 2]));
  for (let i = 0; i < 2; i++) {
    using _tape = new Tape();
    a.square().sum().backward();
    noGrad(() => {
      a.grad = a.grad!.mul(0.25);
    });
    optimizer.step();
    optimizer.zeroGrad();
  }
  assertEquals(await read(a), [0.25, 0.5]); // halved by each step
  const [c, d, e] = [leaf([1, 2]), leaf([3, 4]), leaf([5, 6])];
  c.grad = c.detach(); // decay alone
  d.grad = c.detach();
  e.grad = e;
  new optim.SGD([c, d, e], { lr: 0.5 }).step();
  assertEquals([await read(c), await read(d), await read(e)], [[0.5, 1], [2.5, 3], [2.5, 3]]);
});

Deno.test("optim: a step that throws has changed nothing", async () => {
  await init();
  const [a, b] = [leaf([1]), leaf([1])], optimizer = new optim.Adam([a, b], { lr: 1 }), other = leaf([1]);
  new optim.SGD([b, other]);
  using _tape = new Tape();
  const late = a.square().sum();
  [a.grad, b.grad] = [tensor([1]), tensor([1])];
  assertThrows(() => optimizer.step(), Error, "was handed to another optimizer since");
  late.backward(); // a was not changed in place
  assertEquals([await read(a), optimizer.stateDict().steps], [[1], [0, 0]]);
});

Deno.test("optim: a rate that is none is refused where it is set, and changes nothing", async () => {
  await init();
  // deno-lint-ignore no-explicit-any
  const a = leaf([1]), b = leaf([1]), group: any = { params: [b], lr: 0.5 };
  const optimizer = new optim.SGD([{ params: [a] }, group], { lr: 0.1 });
  for (const wrong of [NaN, -1, Infinity]) {
    assertThrows(() => optimizer.lr = wrong, RangeError, "SGD: lr must be a finite number, at least 0, got");
  }
  assertThrows(() => optimizer.lr = "0.1" as unknown as number, TypeError, 'SGD: lr must be a number, got "0.1"');
  assertEquals(optimizer.lr, 0.1);
  for (const x of [a, b]) x.grad = tensor([1]).keep();
  for (const wrong of [{ lr: NaN }, { weightDecay: -1 }]) {
    Object.assign(group, { lr: 0.5, weightDecay: 0 }, wrong);
    assertThrows(() => optimizer.step(), RangeError, `SGD: ${Object.keys(wrong)[0]} must be`);
  }
  Object.assign(group, { lr: 0.25, weightDecay: 0 });
  optimizer.step();
  assertEquals([await read(a), await read(b)], [[Math.fround(0.9)], [0.75]]);
  const mixed = [a, { params: [b] }] as Tensor[];
  assertThrows(() => new optim.SGD(mixed), TypeError, "SGD: params must hold Tensors or groups alone, got a Tensor");
  optimizer.dispose();
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
  const held = a.grad!.keep();
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

Deno.test("optim: two parameters over one memory are refused", async () => {
  await init();
  const a = leaf([1, 2]), view = a.reshape([2, 1]).detach().keep();
  view.requiresGrad = true;
  const message = "SGD: a parameter of shape [2, 1] shares its memory with another one";
  for (const params of [[a, view], [{ params: [a] }, { params: [view] }]]) {
    assertThrows(() => new optim.SGD(params as Tensor[]), RangeError, message);
  }
  for (const x of [a, view]) x.dispose();
});

Deno.test("optim: a frozen parameter sits out until it is thawed", async () => {
  await init();
  const model = new nn.Linear(1, 1), { weight, bias } = model;
  weight.requiresGrad = false;
  const optimizer = new optim.SGD(model.parameters(), { lr: 1, weightDecay: 0.5 }), x = tensor([[1]]).keep();
  const change = async () => {
    using _tape = new Tape();
    const before = [await weight.item(), await bias!.item()];
    optimizer.zeroGrad();
    model.forward(x).sum().backward();
    optimizer.step();
    return [await weight.item() !== before[0], await bias!.item() !== before[1]];
  };
  assertEquals(await change(), [false, true]);
  weight.requiresGrad = true;
  assertEquals(await change(), [true, true]);
  for (const used of [optimizer, model, x]) used.dispose();
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
    const next = new optim.SGD(model.parameters()); // takes the gradients' places
    for (const x of modelFirst ? [model, optimizer, next] : [optimizer, next, model]) x.dispose();
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

Deno.test("optim: a replaced optimizer that goes leaves the gradients of the next alone", async () => {
  await init();
  const w = leaf([1, 2]);
  const first = new optim.SGD([w], { lr: 1 }), next = new optim.SGD([w], { lr: 1 });
  {
    using _tape = new Tape();
    w.mul(3).sum().backward();
  }
  first.dispose();
  next.step();
  assertEquals(await read(w), [-2, -1]);
  next.dispose();
  assertEquals(w.grad, null);
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
  const { Adagrad, Adam, AdamW, RMSprop, SGD } = optim, a = leaf([1]);
  // deno-lint-ignore no-explicit-any
  const wrong = (value: unknown) => value as any;
  const damped = { nesterov: true, momentum: 0.9, dampening: 0.5 };
  assertAllThrow([
    [() => new SGD([]), RangeError, "SGD: params must hold at least one parameter"],
    [() => new SGD(wrong(a)), TypeError, "SGD: params must be an array of Tensors or of groups"],
    [() => new SGD(wrong([{ params: 5 }])), TypeError, "SGD: params must be an array of"],
    [() => new SGD([a], wrong({ learningRate: 1 })), TypeError, "unknown option"],
    [() => new SGD([a], { nesterov: true }), RangeError, "got momentum 0 and dampening 0"],
    [() => new SGD([a], damped), RangeError, "got momentum 0.9 and dampening 0.5"],
    [() => new Adam([a], { lr: -1 }), RangeError, "Adam: lr must be"],
    [() => new Adam([a], { betas: [0.9, 1] }), RangeError, "Adam: betas[1] must be"],
    [() => new AdamW([a], { weightDecay: NaN }), RangeError, "AdamW: weightDecay must be"],
    [() => new RMSprop([a], { alpha: 1.5 }), RangeError, "RMSprop: alpha must be"],
    [() => new RMSprop([a], { momentum: -1 }), RangeError, "RMSprop: momentum must be"],
    [() => new RMSprop([a], { eps: -1 }), RangeError, "RMSprop: eps must be"],
    [() => new Adagrad([a], { lrDecay: -1 }), RangeError, "Adagrad: lrDecay must be"],
    [() => new Adagrad([a], { initialAccumulatorValue: -1 }), RangeError, "Adagrad: initialAccumulatorValue must be"],
    [() => new Adagrad([a], wrong({ alpha: 1 })), TypeError, 'Adagrad: unknown option "alpha"'],
  ]);
  using _tape = new Tape();
  const made = a.mul(2);
  assertThrows(() => new SGD([made]), TypeError, "SGD: params must be leaves, got Tensor([1], f32, requiresG");
});

// ---- values of the optimizers that the reference cases leave out

type Update = (p: number, g: number, step: number) => number; // from step 1

/** RMSprop as torch.optim.RMSprop writes it, for one number. */
function rmsprop({ lr = 0.01, alpha = 0.99, eps = 1e-8, weightDecay = 0, momentum = 0, centered = false }): Update {
  let square = 0, mean = 0, buffer = 0;
  return (p, g) => {
    g += weightDecay * p;
    square = alpha * square + (1 - alpha) * g * g;
    mean = alpha * mean + (1 - alpha) * g;
    const root = Math.sqrt(centered ? square - mean * mean : square) + eps;
    if (momentum === 0) return p - lr * g / root;
    buffer = momentum * buffer + g / root;
    return p - lr * buffer;
  };
}

/** Adagrad likewise. */
function adagrad({ lr = 0.01, lrDecay = 0, weightDecay = 0, initialAccumulatorValue = 0, eps = 1e-10 }): Update {
  let sum = initialAccumulatorValue;
  return (p, g, step) => {
    g += weightDecay * p;
    sum += g * g;
    return p - lr / (1 + (step - 1) * lrDecay) * g / (Math.sqrt(sum) + eps);
  };
}

Deno.test("optim: decays so near to 1 that f32 cannot tell them from it", async () => {
  await init();
  const near = 1 - 1e-8;
  // the first step of Adam is lr·sign(g) whatever the decays are; RMSprop's is lr/√(1 − α), and centred lr/√((1 − α)·α)
  const cases: [want: number, (p: Tensor[]) => optim.Optimizer][] = [
    [-1, (p) => new optim.Adam(p, { lr: 1, betas: [near, 0.999] })],
    [-1, (p) => new optim.AdamW(p, { lr: 1, betas: [0.9, near], weightDecay: 0, eps: 0 })],
    [-1, (p) => new optim.Adam(p, { lr: 1, betas: [near, near], amsgrad: true, eps: 0 })],
    [-1, (p) => new optim.RMSprop(p, { lr: 1e-4, alpha: near, eps: 0 })],
    [-1, (p) => new optim.RMSprop(p, { lr: 1e-4, alpha: near, eps: 0, centered: true })],
  ];
  for (const [i, [want, make]] of cases.entries()) {
    const a = leaf([0, 0]);
    using optimizer = make([a]);
    step(optimizer, [a], [[1, 3]]);
    (await read(a)).forEach((got) => assertAlmostEquals(got, want, 1e-5, `case ${i}`));
  }
});

Deno.test("optim: RMSprop and Adagrad against float64", async () => {
  await init();
  const rms = [
    {},
    { lr: 0.1, alpha: 0.9 },
    { eps: 0.1 },
    { weightDecay: 0.3 },
    { momentum: 0.9 },
    { centered: true, eps: 1e-3 },
    { lr: 0.02, alpha: 0.8, momentum: 0.5, centered: true, weightDecay: 0.1, eps: 1e-3 },
  ];
  const ada = [
    {},
    { lr: 0.1 },
    { lr: 0.1, lrDecay: 0.2 },
    { weightDecay: 0.3 },
    { initialAccumulatorValue: 0.5 },
    { lr: 0.1, lrDecay: 0.1, weightDecay: 0.1, initialAccumulatorValue: 1, eps: 0.01 },
  ];
  const cases: [string, () => Update, (p: Tensor[]) => optim.Optimizer][] = [
    ...rms.map((o): typeof cases[0] => [
      `RMSprop ${JSON.stringify(o)}`,
      () => rmsprop(o),
      (p) => new optim.RMSprop(p, o),
    ]),
    ...ada.map((o): typeof cases[0] => [
      `Adagrad ${JSON.stringify(o)}`,
      () => adagrad(o),
      (p) => new optim.Adagrad(p, o),
    ]),
  ];
  const SIZE = 5, STEPS = 12, wrong: string[] = [];
  for (const [name, makeUpdate, makeOptimizer] of cases) {
    const draw = random(1), start = Array.from({ length: SIZE }, () => Math.fround(2 * draw() - 1));
    const a = leaf(start), optimizer = makeOptimizer([a]);
    const want = [...start], updates = start.map(makeUpdate);
    for (let t = 1; t <= STEPS; t++) {
      const g = start.map((_, i) => Math.fround((i - 2) * (2 * draw() - 1) + 0.1));
      step(optimizer, [a], [g]);
      want.forEach((p, i) => want[i] = updates[i](p, g[i], t));
      const error = largestError(await read(a), want);
      // a few roundings a step; the difference under a centred root loses a digit
      if (!(error < (name.includes("centered") ? 1e-5 : 2e-6))) wrong.push(`${name}, step ${t}: off by ${error}`);
    }
    optimizer.dispose();
    a.dispose();
  }
  assertEquals(wrong, []);
});

Deno.test("optim: defaults, and the first step of a momentum, are PyTorch's", async () => {
  await init();
  const { Adagrad, Adam, AdamW, RMSprop, SGD } = optim;
  const cases: [(x: Tensor[]) => optim.Optimizer, gradients: number[], want: number][] = [
    [(x) => new SGD(x), [1], 0.999],
    [(x) => new SGD(x, { lr: 0.1, momentum: 0.9, dampening: 0.5 }), [1, 1], 1 - 0.1 * (1 + (0.9 + 0.5))],
    [(x) => new AdamW(x), [1], 1 - 1e-5 - 1e-3], // decays by lr · 0.01
    [(x) => new Adam(x), [1e-8], 1 - 1e-3 / 2], // a gradient of ε
    [(x) => new RMSprop(x), [1e-8], 1 - 0.01 / (0.1 + 1)], // √(1 − 0.99) and ε
    [(x) => new Adagrad(x), [1e-10], 1 - 0.01 / 2],
  ];
  for (const [make, gradients, want] of cases) {
    const x = leaf([1]), optimizer = make([x]);
    for (const g of gradients) step(optimizer, [x], [[g]]);
    assertAlmostEquals((await read(x))[0], want, 2e-7, optimizer.name); // a few roundings near 1
    optimizer.dispose();
    x.dispose();
  }
});

// ---- clipping

/** Parameters with these gradients; null for none. */
function withGradients(gradients: (number[] | null)[]): Tensor[] {
  return gradients.map((g) => {
    const parameter = leaf((g ?? [0, 0]).map(() => 1));
    if (g) parameter.grad = tensor(g).keep();
    return parameter;
  });
}

Deno.test("optim: clipGradNorm scales all gradients by one factor", async () => {
  await init();
  using _scope = new Scope();
  const usual = [[3, -1, 2], [4], [0.5, 0.25]], small = usual.map((g) => g.map((x) => x * 2 ** -21)); // beside 1e-6
  for (const [maxNorm, gradients] of [[1, usual], [0.01, usual], [5, usual], [0, usual], [1e-6, small]] as const) {
    const norm = Math.hypot(...gradients.flat());
    const parameters = withGradients([gradients[0], null, gradients[1], gradients[2]]);
    const got = optim.clipGradNorm(parameters, maxNorm);
    assertEquals(got.shape, []);
    assert(Math.abs(await got.item() / norm - 1) < 1e-6);
    const want = gradients.map((g) => g.map((x) => x * Math.min(1, maxNorm / (norm + 1e-6)))); // as torch's
    const clipped = await Promise.all([0, 2, 3].map((i) => read(parameters[i].grad!)));
    assert(largestError(clipped.flat(), want.flat(), 1e-30) < 1e-6, `${maxNorm}: ${clipped}`);
    assertEquals(parameters[1].grad, null);
    for (const p of parameters) p.dispose();
  }
});

Deno.test("optim: clipGradNorm leaves short gradients as they are, to the bit", async () => {
  await init();
  using _scope = new Scope();
  const draw = random(3), gradient = Array.from({ length: 1000 }, () => Math.fround(draw() - 0.5));
  const norm = Math.hypot(...gradient);
  for (const maxNorm of [norm * 1.001, 1e6, 3e38]) {
    const [p] = withGradients([gradient]);
    assert(Math.abs(await optim.clipGradNorm([p], maxNorm).item() / norm - 1) < 1e-6);
    assertEquals(await read(p.grad!), gradient);
    p.dispose();
  }
  const [zero] = withGradients([[0, -0]]);
  assertEquals(await optim.clipGradNorm([zero], 1).item(), 0);
  assertEquals(await read(zero.grad!), [0, -0]);
  assertEquals(await optim.clipGradNorm([], 1).item(), 0);
  assertEquals(await optim.clipGradNorm(withGradients([null]), 1).item(), 0);
  zero.dispose();
});

Deno.test("optim: clipGradNorm only measures where the bound is infinite", async () => {
  await init();
  for (const [gradient, norm] of [[[3, 4], 5], [[0, -0], 0], [[1, Infinity], Infinity], [[1, NaN], NaN]] as const) {
    const [p] = withGradients([[...gradient]]);
    assertEquals(await optim.clipGradNorm([p], Infinity).item(), norm);
    assertEquals(await read(p.grad!), [...gradient]);
    p.dispose();
  }
});

Deno.test("optim: clipGradNorm takes three launches a gradient, and an empty one", async () => {
  await init();
  using _scope = new Scope();
  const launches = (gradients: number[][]) => {
    const before = stats().dispatches;
    optim.clipGradNorm(withGradients(gradients), 1);
    return stats().dispatches - before;
  };
  const few = launches([[1, 2], [3]]); // sum of squares, its place beside the others, and the factor
  assertEquals(launches([[1, 2], [3], [4], [5, 6]]) - few, 6);
  assertEquals(await optim.clipGradNorm(withGradients([[], [3, 4]]), 1).item(), 5);
});

Deno.test("optim: clipGradNorm of gradients that are not finite, as torch's", async () => {
  await init();
  for (const [gradient, want] of [[[1, -Infinity], [0, NaN]], [[1, NaN], [NaN, NaN]]]) {
    const [p, q] = withGradients([gradient, [2]]);
    optim.clipGradNorm([p, q], 1).dispose();
    assertEquals([await read(p.grad!), await read(q.grad!)], [want, [want[0]]]);
    for (const x of [p, q]) x.dispose();
  }
});

Deno.test("optim: clipGradNorm of f16 gradients", async () => {
  const { f16 } = await init();
  if (!f16) return;
  using _scope = new Scope();
  // the squares, 1e8, do not fit f16: the norm must not pass through it
  const half = tensor([1, 1], { dtype: "f16", requiresGrad: true }), [single] = withGradients([[10_000]]);
  half.grad = tensor([10_000, -20_000], { dtype: "f16" }).keep();
  const norm = await optim.clipGradNorm([half, single], 6).item();
  assertAlmostEquals(norm / Math.sqrt(6e8), 1, 1e-6);
  const scale = 6 / Math.sqrt(6e8);
  assert(largestError(await read(half.grad), [10_000 * scale, -20_000 * scale]) < 2 ** -11); // one rounding to f16
  assert(largestError(await read(single.grad!), [10_000 * scale]) < 1e-6);
  assertEquals(half.grad.dtype, "f16");
});

Deno.test("optim: clipGradNorm reaches gradients in an optimizer's block, and the step takes them", async () => {
  await init();
  const [a, b, c] = [leaf([0, 0]), leaf([0]), leaf([5])];
  const optimizer = new optim.SGD([a, b, c], { lr: 1 });
  for (let i = 0; i < 2; i++) {
    using _tape = new Tape();
    optimizer.zeroGrad();
    a.mul(tensor([2, 0])).sum().add(b.mul(tensor([2])).sum()).add(a.mul(tensor([0, 1])).sum()).backward();
    assertEquals(await optim.clipGradNorm([a, b, c], 1.5).item(), 3);
    optimizer.step();
  }
  // two steps of half the gradient; 1e-6 is what the norm in the denominator is raised by
  assertAlmostEquals((await read(a))[0], -2, 2e-6);
  assertAlmostEquals((await read(a))[1], -1, 2e-6);
  assertAlmostEquals(await b.item(), -2, 2e-6);
  assertEquals(await read(c), [5]);
});

Deno.test("optim: what clipGradNorm throws", async () => {
  await init();
  const [p] = withGradients([[1]]);
  assertThrows(() => optim.clipGradNorm([p], -1), RangeError, "clipGradNorm: maxNorm must be");
  for (const wrong of [NaN, -Infinity]) {
    assertThrows(() => optim.clipGradNorm([p], wrong), RangeError, "clipGradNorm: maxNorm must be");
  }
  const mixed = [p, 5] as Tensor[];
  assertThrows(() => optim.clipGradNorm(mixed, 1), TypeError, "clipGradNorm: params[1] must be a Tensor, got 5");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => optim.clipGradNorm(5 as any, 1), TypeError, "clipGradNorm: params must be an array of Tensors");
  assertEquals(await read(p.grad!), [1]);
});

// ---- state

Deno.test("optim: a state dict, there and back", async () => {
  await init();
  const [a, b] = [leaf([1, 2]), leaf([3])];
  const first = new optim.AdamW([a, b], { lr: 0.1 });
  step(first, [a, b], [[1, -2], [3]]);
  step(first, [a, b], [[2, 1], null]);
  const inner = new Scope(), state = first.stateDict();
  inner.close(); // what the caller asked for is his
  assertEquals([state.name, state.lr, state.steps], ["AdamW", 0.1, [2, 1]]);
  assertEquals(Object.entries(state.tensors).map(([name, x]) => `${name} [${x.shape}]`).sort(), [
    "0.a [2]",
    "0.b [2]",
    "1.a [1]",
    "1.b [1]",
  ]);
  // m = β₁m + (1 − β₁)g over both steps
  assertAlmostEquals((await read(state.tensors["0.a"]))[0], 0.9 * 0.1 + 0.1 * 2, 1e-6);
  const [c, d] = [leaf(await read(a)), leaf(await read(b))];
  step(first, [a, b], [[1, 1], [1]]); // the state holds copies
  const second = new optim.AdamW([c, d]);
  second.loadStateDict(state);
  for (const x of Object.values(state.tensors)) x.dispose();
  step(second, [c, d], [[1, 1], [1]]);
  assertEquals([await read(c), await read(d)], [await read(a), await read(b)]);
  assertEquals(second.lr, 0.1);
});

Deno.test("optim: a state dict holds the groups' own numbers", async () => {
  await init();
  const make = (...rates: { lr?: number; weightDecay?: number }[]) => {
    const groups = rates.map((own) => ({ ...own, params: [leaf([1])] }));
    return { groups, optimizer: new optim.SGD(groups, { lr: 1 }) };
  };
  const saved = make({ lr: 0.5 }, {}, { weightDecay: 0.1 }), state = saved.optimizer.stateDict();
  const rates = ({ groups }: typeof saved) => groups.map(({ lr, weightDecay }) => [lr, weightDecay]);
  saved.groups[0].lr = 0.25;
  const want = [[0.5, undefined], [undefined, undefined], [undefined, 0.1]];
  for (const [groups, loaded] of [[state.groups, want], [undefined, [[7, 7], [8, undefined], [undefined, 9]]]]) {
    const into = make({ lr: 7, weightDecay: 7 }, { lr: 8 }, { weightDecay: 9 });
    into.optimizer.loadStateDict({ ...state, groups } as typeof state);
    assertEquals(rates(into), loaded);
  }
});

Deno.test("optim: a state dict goes into an optimizer whose groups were frozen", async () => {
  await init();
  const groups = (lr: number) => [Object.freeze({ params: [leaf([1])], lr })];
  const from = new optim.SGD(groups(0.5)), to = new optim.SGD(groups(0.25));
  to.loadStateDict(from.stateDict());
  assertEquals(to.stateDict().groups, [{ lr: 0.5, weightDecay: undefined }]);
});

Deno.test("optim: a state dict that does not fit changes nothing", async () => {
  await init();
  const [a, b] = [leaf([1, 2]), leaf([3])];
  const optimizer = new optim.RMSprop([a, b], { lr: 0.5 });
  step(optimizer, [a, b], [[1, -2], [3]]);
  const before = optimizer.stateDict();
  const zero = (...shape: number[]) => tensor(new Float32Array(shape.reduce((x, y) => x * y, 1)), shape);
  const good = { name: "RMSprop", lr: 9, steps: [7, 8], tensors: { "0.a": zero(2), "1.a": zero(1) } };
  const cases: [unknown, string][] = [
    [{ ...good, name: "Adam" }, "RMSprop: state must be of RMSprop with 2 parameters, got Adam with 2"],
    [{ ...good, steps: [1] }, "RMSprop: state must be of RMSprop with 2 parameters, got RMSprop with 1"],
    [{ ...good, steps: undefined }, "RMSprop: state must be of RMSprop"],
    [null, "RMSprop: state must be what stateDict() gave, got null"],
    [{ ...good, name: Symbol("s") }, "RMSprop: state must be of RMSprop with 2 parameters, got Symbol(s) with 2"],
    [{ ...good, lr: "1" }, 'RMSprop: state.lr must be a number, got "1"'],
    [{ ...good, steps: [7, -1] }, "RMSprop: state.steps[1] must be an integer, at least 0, got -1"],
    [{ ...good, tensors: null }, "RMSprop: state.tensors must be an object of tensors, got null"],
    [{ ...good, tensors: { "0.a": zero(2) } }, "RMSprop: tensors[1.a] must be a Tensor, got undefined"],
    [{ ...good, tensors: { "0.a": zero(2), "1.a": zero(2) } }, "RMSprop: tensors[1.a] must have shape [1], got [2]"],
    [
      { ...good, tensors: { ...good.tensors, "0.b": zero(2), "1.b": zero(1) } },
      "RMSprop: state must be of an optimizer with the same options, got also 0.b, 1.b",
    ],
    [
      { ...good, groups: [{}, {}] },
      "RMSprop: state.groups must hold one object a group, 1 in all, got [an Object, an Object]",
    ],
    [{ ...good, groups: [null] }, "RMSprop: state.groups must hold one object a group, 1 in all, got [null]"],
    [{ ...good, groups: [{ lr: -1 }] }, "RMSprop: state.groups[0]: lr must be a finite number, at least 0, got -1"],
    [
      { ...good, tensors: { "0.a": zero(2), "1.a": tensor(new Int32Array(1)) } },
      "RMSprop: tensors[1.a] must have dtype f32, got i32",
    ],
  ];
  for (const [state, message] of cases) {
    // deno-lint-ignore no-explicit-any
    const { constructor } = assertThrows(() => optimizer.loadStateDict(state as any), Error, message);
    assert(constructor === TypeError || constructor === RangeError);
  }
  const after = optimizer.stateDict();
  assertEquals([after.lr, after.groups, after.steps], [before.lr, before.groups, before.steps]);
  for (const name in before.tensors) {
    assertEquals(await read(after.tensors[name]), await read(before.tensors[name]), name);
  }
});

Deno.test("optim: a gradient that somebody holds outlives the optimizer, its parameter and the next optimizer", async () => {
  await init();
  const ways: Record<string, (w: Tensor, optimizer: optim.Optimizer) => void> = {
    "the optimizer is disposed of": (_, optimizer) => optimizer.dispose(),
    "the parameter is disposed of": (w) => w.dispose(),
    "both, the parameter first": (w, optimizer) => [w, optimizer].forEach((x) => x.dispose()),
    "another optimizer comes": (w, optimizer) => {
      optimizer.zeroGrad();
      new optim.Adam([w]).dispose();
    },
  };
  for (const [what, end] of Object.entries(ways)) {
    using _scope = new Scope();
    const w = leaf([1, 2, 3]), optimizer = new optim.SGD([w], { lr: 0.1 }), before = stats().liveTensors;
    step(optimizer, [w], [[5, 6, 7]]);
    const kept = w.grad!.keep();
    w.grad = null;
    step(optimizer, [w], [[1, 1, 1]]);
    const view = w.grad!.detach();
    end(w, optimizer);
    const others = [5, 6, 7, 8].map((value) => full([3], value));
    assertEquals(await read(kept), [5, 6, 7], what);
    assertEquals(await read(view), [1, 1, 1], what);
    view.assign(tensor([0, 0, 0]));
    for (const [i, x] of others.entries()) assertEquals(await read(x), Array(3).fill(5 + i), what);
    kept.dispose();
    assert(stats().liveTensors < before + 8);
  }
});

Deno.test("optim: a gradient that was kept stays when zeroGrad or the parameter goes", async () => {
  await init();
  const w = leaf([1, 2]), optimizer = new optim.SGD([w], { lr: 0.5 });
  step(optimizer, [w], [[3, 4]]);
  const kept = w.grad!.keep();
  optimizer.zeroGrad();
  assertEquals(w.grad, null);
  assertEquals(await read(kept), [3, 4]);
  step(optimizer, [w], [[1, 1]]);
  const last = w.grad!.keep();
  w.dispose();
  assertEquals([await read(kept), await read(last)], [[3, 4], [1, 1]]);
});

Deno.test("optim: without decay an infinite element stays what it is", async () => {
  await init();
  for (const name of ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"] as const) {
    const w = leaf([1, -Infinity]), optimizer = new optim[name]([w], { lr: 0.1, weightDecay: 0 });
    step(optimizer, [w], [[1, 0]]);
    const [moved, masked] = await read(w);
    assert(moved < 1 && masked === -Infinity, `${name}: ${moved}, ${masked}`);
  }
});

Deno.test("optimizer: dispose where parameters are each other's gradients", async () => {
  await init();
  const before = stats(), [a, b, c] = [1, 2, 3].map((x) => tensor([x, x], { requiresGrad: true }));
  const optimizer = new optim.Adam([a, b, c]);
  a.grad = b;
  b.grad = a;
  optimizer.dispose();
  [a, b, c].forEach((x) => x.dispose());
  const { liveTensors, liveBytes } = stats();
  assertEquals([liveTensors, liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("optim: a gradient that the user keeps is not overwritten when another one is assigned", async () => {
  await init();
  const w = leaf([1]), optimizer = new optim.SGD([w], { lr: 1 });
  {
    using _tape = new Tape();
    w.mul(3).sum().backward();
  }
  const kept = w.grad!.keep();
  w.grad = tensor([7]);
  optimizer.step();
  assertEquals([await kept.item(), await w.item()], [3, -6]);
  optimizer.dispose();
  for (const x of [w, kept]) x.dispose();
});

Deno.test("optim: betas are copied, and numbers out of range are refused by name", async () => {
  await init();
  const betas: [number, number] = [0.9, 0.999], w = leaf([1]), adam = new optim.Adam([w], { betas, lr: 0.1 });
  betas[0] = betas[1] = 0.5;
  step(adam, [w], [[1]]);
  step(adam, [w], [[0]]);
  assertAlmostEquals(await w.item(), 1 - 0.1 - 0.1 * (0.09 / 0.19) / Math.sqrt(0.000999 / 0.001999), 1e-5);
  adam.dispose();
  assertThrows(() => new optim.SGD([w], { momentum: -1 }), RangeError, "momentum");
  assertThrows(() => new optim.SGD([w], { momentum: 1, dampening: NaN }), RangeError, "dampening");
  assertThrows(() => new optim.Adam([w], { eps: -1 }), RangeError, "eps");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new optim.Adam([w], { betas: [0.9] as any }), TypeError, "betas must be two numbers");
  w.dispose();
});

Deno.test("RMSprop: centered, constant gradients keep the parameters finite", async () => {
  await init();
  const w = tensor(new Float32Array(4096), { requiresGrad: true }).keep();
  const optimizer = new optim.RMSprop([w], { lr: 1e-3, alpha: 0.5, centered: true });
  w.grad = tensor(Float32Array.from({ length: 4096 }, (_, i) => 0.1 + i / 700));
  for (let i = 0; i < 100; i++) optimizer.step();
  assert((await w.data()).every(Number.isFinite));
  optimizer.dispose();
  w.dispose();
});
