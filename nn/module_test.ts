import { assert, assertEquals, assertThrows } from "@std/assert";
import { init, manualSeed, nn, optim, relu, Scope, stats, Tape, type Tensor, tensor, zeros } from "@limbeck/limbeck";

class Inner extends nn.Module {
  outProj: nn.Linear = new nn.Linear(2, 2);
  scale: Tensor = tensor([2], undefined, { requiresGrad: true }).keep();
  override forward(x: Tensor): Tensor {
    return this.outProj.forward(x).mul(this.scale);
  }
}

class Outer extends nn.Module {
  blocks: Inner[] = [new Inner(), new Inner()];
  head: nn.Linear = new nn.Linear(2, 1, { bias: false });
  readonly width = 2;
  override forward(x: Tensor): Tensor {
    return this.head.forward(this.blocks.reduce((y, block) => block.forward(y), x));
  }
}

Deno.test("module: names are PyTorch's", async () => {
  await init();
  const model = new Outer();
  assertEquals(model.namedParameters().map(([name, p]) => `${name} [${p.shape}]`), [
    "blocks.0.scale [1]",
    "blocks.0.out_proj.weight [2,2]",
    "blocks.0.out_proj.bias [2]",
    "blocks.1.scale [1]",
    "blocks.1.out_proj.weight [2,2]",
    "blocks.1.out_proj.bias [2]",
    "head.weight [1,2]",
  ]);
  const sequential = new nn.Sequential(new nn.Linear(2, 3), relu, new nn.Dropout(0.1), new nn.Linear(3, 1));
  assertEquals(Object.keys(sequential.stateDict()), ["0.weight", "0.bias", "3.weight", "3.bias"]);
  model.dispose();
  sequential.dispose();
});

Deno.test("module: arrays and plain objects hold children and parameters", async () => {
  await init();
  class Branches extends nn.Module {
    heads: Record<string, nn.Module> = { a: new nn.Linear(2, 1), B: new nn.Dropout(0.5) };
    gates: Tensor[] = [tensor([1], { requiresGrad: true }).keep()];
    sizes = { width: 2 };
    override forward(x: Tensor): Tensor {
      return this.heads.a.forward(this.heads.B.forward(x)).mul(this.gates[0]);
    }
  }
  const live = stats().liveTensors, model = new Branches();
  assertEquals(model.namedParameters().map(([name]) => name), ["gates.0", "heads.a.weight", "heads.a.bias"]);
  assertEquals(model.eval().children().map(([name, { training }]) => [name, training]), [["heads.a", false], [
    "heads.B",
    false,
  ]]);
  model.dispose();
  assertEquals(stats().liveTensors, live);
});

Deno.test("module: names of PyTorch's that are no camelCase stay as they are", async () => {
  await init();
  class Mixer extends nn.Module {
    A_log: Tensor = tensor([1]);
    D: Tensor = tensor([1]);
    W_q: nn.Linear = new nn.Linear(1, 1, { bias: false });
    linear1Norm: Tensor = tensor([1]);
    qKV: Tensor = tensor([1]);
    override forward = (x: Tensor): Tensor => x;
  }
  const model = new Mixer();
  assertEquals(Object.keys(model.stateDict()), ["A_log", "D", "linear1_norm", "q_k_v", "W_q.weight"]);
  model.dispose();
});

Deno.test("module: a Sequential's own modules are children beside its steps", async () => {
  await init();
  class Wide extends nn.Sequential {
    extra: nn.Linear = new nn.Linear(2, 2, { bias: false });
    more: nn.Dropout[] = [new nn.Dropout()];
  }
  const model = new Wide(new nn.Linear(2, 2, { bias: false }), relu);
  assertEquals(Object.keys(model.stateDict()), ["0.weight", "extra.weight"]);
  model.eval();
  assertEquals([model.extra.training, model.more[0].training], [false, false]);
  model.dispose();
  assert(model.extra.weight.closed);
});

Deno.test("module: a tensor of integers is a buffer: saved, loaded and freed, but no parameter", async () => {
  await init();
  class Masked extends nn.Module {
    mask: Tensor = tensor(new Int32Array([1, 0])).keep();
    linear: nn.Linear = new nn.Linear(2, 2, { bias: false });
    override forward = (x: Tensor): Tensor => x;
  }
  const model = new Masked(), other = new Masked();
  assertEquals(model.namedParameters().map(([name]) => name), ["linear.weight"]);
  new optim.SGD(model.parameters()).dispose();
  model.mask.assign(tensor(new Int32Array([0, 7])));
  other.loadStateDict(model.stateDict());
  assertEquals(await other.mask.array(), [0, 7]);
  const { weight } = model.linear;
  assertThrows(() => other.loadStateDict({ "linear.weight": weight }), RangeError, "missing mask; unexpected nothing");
  for (const x of [model, other]) x.dispose();
  assert(model.mask.closed);
});

Deno.test("module: a shared parameter comes once, under its first name", async () => {
  await init();
  const model = new Outer();
  model.blocks[1].outProj.weight.dispose();
  model.blocks[1].outProj.weight = model.blocks[0].outProj.weight;
  assertEquals(model.parameters().length, 6);
  assert(!model.namedParameters().some(([name]) => name === "blocks.1.out_proj.weight"));
  model.dispose();
});

Deno.test("module: a shared module's parameters come once, its states under both names", async () => {
  await init();
  const make = (shared = new nn.Linear(1, 1, { bias: false })) => new nn.Sequential(shared, relu, shared);
  const [from, to] = [make(), make()], state = from.stateDict();
  assertEquals(from.namedParameters(), [["0.weight", from.parameters()[0]]]);
  assertEquals(Object.keys(state), ["0.weight", "2.weight"]);
  for (const name of ["0.weight", "2.weight"]) {
    nn.init.constant(to.parameters()[0], NaN);
    to.loadStateDict({ [name]: state[name] }); // a file may hold it once
    assertEquals(await to.parameters()[0].data(), await from.parameters()[0].data());
  }
  to.loadStateDict({ "0.weight": tensor([[1]]), "2.weight": tensor([[2]]) });
  assertEquals(await to.parameters()[0].item(), 2);
  assertThrows(() => to.loadStateDict({}), RangeError, "loadStateDict: missing 0.weight; unexpected nothing");
  for (const model of [from, to]) model.dispose();
});

Deno.test("module: a reference back to the parent is no child", async () => {
  await init();
  class Child extends Inner {
    parent?: nn.Module;
  }
  const child = new Child(), model = new nn.Sequential(child);
  child.parent = model;
  assertEquals(Object.keys(model.stateDict()), ["0.scale", "0.out_proj.weight", "0.out_proj.bias"]);
  assertEquals(model.parameters().length, 3);
  model.eval();
  assertEquals([model, child, child.outProj].map((module) => module.training), [false, false, false]);
  assert(model.train().training && child.outProj.training); // each walk begins anew
  model.dispose();
});

Deno.test("module: two parameters of one state name are refused", async () => {
  await init();
  class Twice extends nn.Module {
    aB = tensor([1]);
    a_b: Tensor | nn.Module = this.aB;
    override forward = (x: Tensor): Tensor => x;
  }
  const model = new Twice();
  assertEquals(Object.keys(model.stateDict()), ["a_b"]); // one tensor: nothing is lost
  model.a_b = tensor([2]);
  for (const walk of [() => model.parameters(), () => model.stateDict(), () => model.loadStateDict({})]) {
    assertThrows(walk, RangeError, "Twice: two parameters have the state name a_b; rename one");
  }
});

Deno.test("module: parameters outlive the scope that they were made in", async () => {
  await init();
  const tape = new Tape(), model = new Outer();
  tape.close();
  assert(model.parameters().every((p) => !p.closed && p.requiresGrad));
  model.dispose();
});

Deno.test("module: train and eval reach all children", async () => {
  await init();
  const dropout = new nn.Dropout(0.5), model = new nn.Sequential(new nn.Sequential(dropout), relu);
  const x = tensor(new Float32Array(1000).fill(1));
  assert(model.training && dropout.training);
  const zeros = (y: number[]) => y.filter((v) => v === 0).length;
  const trained = Array.from(await model.forward(x).data());
  assert(zeros(trained) > 400 && zeros(trained) < 600, `${zeros(trained)} of 1000 dropped`); // 6 deviations of 16
  assert(trained.every((v) => v === 0 || v === 2));
  assertEquals(model.eval(), model);
  assert(!dropout.training);
  assertEquals(zeros(Array.from(await model.forward(x).data())), 0);
  assert(model.train().training && dropout.training);
});

Deno.test("module: state dict, there and back", async () => {
  await init();
  manualSeed(1);
  const from = new Outer(), to = new Outer(), x = tensor([[1, -2]]);
  const before = [await from.forward(x).item(), await to.forward(x).item()];
  assert(before[0] !== before[1]);
  const state = from.stateDict();
  assert(state["head.weight"] === from.head.weight, "the live tensors");
  to.loadStateDict(state);
  assertEquals(await to.forward(x).item(), before[0]);
  from.head.weight.assign(tensor([[0, 0]])); // a copy was taken
  assertEquals(await to.forward(x).item(), before[0]);
  from.dispose();
  to.dispose();
});

Deno.test("module: a state dict that does not fit copies nothing", async () => {
  await init();
  const model = new nn.Sequential(new nn.Linear(2, 2), new nn.Linear(2, 1));
  const values = async () => (await Promise.all(model.parameters().map((p) => p.data()))).map((d) => Array.from(d));
  const before = await values();
  const good = (): Record<string, Tensor> =>
    Object.fromEntries(model.namedParameters().map(([name, p]) => [name, p.detach().mul(0)]));
  const { "1.bias": _, ...missing } = good();
  assertThrows(() => model.loadStateDict(missing), Error, "loadStateDict: missing 1.bias; unexpected nothing");
  const unexpected = { ...good(), "2.weight": tensor([1]) };
  assertThrows(() => model.loadStateDict(unexpected), Error, "loadStateDict: missing nothing; unexpected 2.weight");
  const renamed = { a: tensor([1]) }, missed = ["0.weight", "0.bias", "1.weight", "1.bias"];
  assertEquals(model.loadStateDict(renamed, { strict: false }), { missing: missed, unexpected: ["a"] });
  const misshapen = { ...good(), "1.bias": tensor([1, 2]) }; // the last one, behind good ones
  assertThrows(() => model.loadStateDict(misshapen), TypeError, "loadStateDict: 1.bias must have shape [1], got [2]");
  const integers = { ...good(), "1.bias": tensor(new Int32Array(1)) };
  assertThrows(() => model.loadStateDict(integers), TypeError, "1.bias must have dtype f32 or f16, got i32");
  const { bias } = model.steps[1] as nn.Linear, state = good(), closed = tensor([1]);
  closed.dispose();
  Object.assign(model.steps[1], { bias: closed });
  const gone = "loadStateDict: the module's 1.bias (shape [1]) was closed";
  assertThrows(() => model.loadStateDict(state), TypeError, gone);
  Object.assign(model.steps[1], { bias });
  assertEquals(await values(), before);
  model.loadStateDict(missing, { strict: false });
  assertEquals(await values(), [[0, 0, 0, 0], [0, 0], [0, 0], before[3]]);
  model.dispose();
});

Deno.test("module: a state dict in f16 goes into f32 parameters, and back", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const values = [[0.1, -65504], [6e-8, NaN]], expected = Float16Array.from(values.flat());
  const single = new nn.Linear(2, 2, { bias: false }), half = new nn.Linear(2, 2, { bias: false });
  half.weight.dispose();
  half.weight = tensor(expected, [2, 2]).keep();
  single.loadStateDict(half.stateDict());
  assertEquals(await single.weight.data(), Float32Array.from(expected));
  half.loadStateDict({ weight: tensor(values) }); // rounded
  assertEquals(await half.weight.data(), expected);
  for (const model of [single, half]) model.dispose();
});

Deno.test("module: Linear starts within ±1/√in and dispose frees all", async () => {
  await init();
  const before = stats();
  const layer = new nn.Linear(100, 50);
  const weight = Array.from(await layer.weight.data()), largest = weight.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  assert(largest <= 0.1 && largest > 0.099, `${largest}`); // 5,000 draws come within a hundredth of the end
  {
    using _tape = new Tape();
    layer.forward(tensor([new Array(100).fill(1)])).sum().backward();
  }
  layer.dispose();
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
  assertThrows(() => new nn.Linear(0, 1), RangeError, "Linear: inFeatures must be");
  assertThrows(() => new nn.Dropout(1.1), RangeError, "Dropout: p must be");
  assertThrows(
    // deno-lint-ignore no-explicit-any
    () => new nn.Sequential(5 as any),
    TypeError,
    "Sequential: step 0 must be a Module or a function, got 5",
  );
});

Deno.test("init: moments of the random initialisations", async () => {
  await init();
  manualSeed(2);
  const { constant, kaimingNormal, kaimingUniform, normal, uniform, xavierNormal, xavierUniform } = nn.init;
  const x = tensor(new Float32Array(20_000), [100, 200]);
  const deviation = async (of = x) => {
    const data = Array.from(await of.data());
    return Math.sqrt(data.reduce((sum, v) => sum + v * v, 0) / data.length);
  };
  // the deviation of 20,000 draws is right to 1/√40,000 = 0.5 %; 2 % is four times that
  const near = (got: number, want: number) => assert(Math.abs(got / want - 1) < 0.02, `${got}, wanted ${want}`);
  uniform(x, -1, 1);
  near(await deviation(), Math.sqrt(1 / 3));
  normal(x, 0, 3);
  near(await deviation(), 3);
  xavierUniform(x);
  near(await deviation(), Math.sqrt(2 / 300));
  xavierNormal(x, 2);
  near(await deviation(), 2 * Math.sqrt(2 / 300));
  kaimingUniform(x);
  near(await deviation(), Math.sqrt(2 / 200));
  kaimingNormal(x, 1);
  near(await deviation(), Math.sqrt(1 / 200));
  const conv = x.reshape([10, 20, 10, 10]); // of a convolution's weight the field counts to both fans
  near(await deviation(xavierUniform(conv)), Math.sqrt(2 / 3000));
  near(await deviation(kaimingNormal(conv, 1)), Math.sqrt(1 / 2000));
  for (const shape of [[0, 0], [3, 0], [0, 3]]) {
    const empty = zeros(shape);
    for (const fill of [xavierUniform, xavierNormal, kaimingUniform, kaimingNormal]) assertEquals(fill(empty), empty);
  }
  assertEquals(constant(x, 0.5), x);
  assertEquals(new Set(await x.data()), new Set([0.5]));
  assertThrows(() => xavierNormal(tensor([1])), TypeError, "init.xavierNormal: x must have at least 2 dimensions");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => xavierNormal(x, "2" as any), TypeError, 'init.xavierNormal: gain must be a number, got "2"');
  // deno-lint-ignore no-explicit-any
  assertThrows(() => constant(x, "1" as any), TypeError, 'init.constant: value must be a number, got "1"');
  const linear = new nn.Linear(1, 1);
  // deno-lint-ignore no-explicit-any
  assertThrows(() => linear.loadStateDict([] as any), TypeError, "loadStateDict: state must be an object of tensors");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => linear.loadStateDict({}, { strict: 1 } as any), TypeError, "loadStateDict: strict must be");
  assertThrows(() => linear.loadStateDict({}), RangeError, "loadStateDict: missing weight, bias");
  linear.dispose();
});

Deno.test("nn.init: bounds are checked, and f16 tensors are filled, too", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  assertThrows(() => nn.init.uniform(zeros([1]), 2, 1), RangeError, "high");
  assertThrows(() => nn.init.normal(zeros([1]), 0, -1), RangeError, "deviation");
  if (f16) assertEquals(await nn.init.constant(zeros([2], { dtype: "f16" }), 0.5).array(), [0.5, 0.5]);
});
