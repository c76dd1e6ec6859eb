/** The arguments of what is no op: start and memory, files, methods, modules and optimizers, added to the table of testing/fuzz_table.ts. */
import * as limbeck from "@limbeck/limbeck";
import { nn, optim, Scope, Tape, Tensor } from "@limbeck/limbeck";
import { are, type Argument, type Bad, type Draw, listed, not, wrong } from "./fuzz.ts";
import { eps, probability, row, table } from "./fuzz_table.ts";

// start, memory and watching
row("init", (d) => [d.options({
  device: { good: undefined, bad: not() },
  adapter: { good: undefined, bad: not() },
  powerPreference: d.oneOf("low-power", "high-performance"),
  features: { good: undefined, bad: wrong(["array", "strings"], [5], [null]) },
  memoryLimit: { good: undefined, bad: wrong(["number"], 0, -1, NaN, -Infinity) },
  debug: { good: undefined, bad: not("boolean") },
  autotune: { good: undefined, bad: are(5, "on", {}, { rows: {}, tiles: [] }, { rows: null, tiles: [1] }) },
})]);
row("flush stats resetPeak trimPool", () => []);
const returning = (d: Draw) => {
  const x = d.tensor([2]);
  return d.pick<unknown>(() => x.add(1), () => 5, () => ({ x: x.mul(2), list: [x] }));
};
row("expectNoLeaks", (d) => [d.fn(returning(d))]);
const rejecting = are(() => Promise.resolve(5), () => Promise.reject(new Error("nobody hears this")));
row("noGrad", (d) => [{ good: returning(d), bad: [...d.fn(0).bad, ...rejecting] }]);
row("checkpoint", (d) => [
  { good: (y: Tensor) => y.square().mul(2), bad: [...d.fn(0).bad, ...rejecting, ...are(() => 5, () => undefined)] },
  d.x([2, 3], { wrong: [] }),
]);
row("profile", (d) => [d.fn(() => d.tensor([2, 3]).add(1))]);
row("gradcheck", (d) => [
  { good: (y: Tensor) => y.mul(2), bad: [...d.fn(0).bad, ...are(() => 5, () => undefined)] },
  { good: [d.tensor([d.int(1, 2)])], bad: [...not("array"), ...are(undefined), ...d.x([2]).tensors!.map(listed)] },
  d.options({ step: d.number([1e-2], [0, -1]), tolerance: d.number([0.1], [0, -1]) }),
]);
row("manualSeed", (d) => [d.integer([0, 99], [-1, 2 ** 32], true)]);
/** A record with one wrong entry. */
const spoilt = (good: Record<string, unknown>, entries: Record<string, Bad[]>): Bad[] => [
  ...not(),
  ...are(undefined, { ...good, zzz: 1 }),
  ...Object.entries(entries).flatMap(([k, bad]) => bad.map(({ make }) => ({ make: () => ({ ...good, [k]: make() }) }))),
];
row("record", (d) => {
  const x = d.tensor([2, 3], "f32", 3, true), lists = [...not("array"), ...d.gone([2]).map(listed)];
  const good = { op: "mine", inputs: [x], output: x.detach(), saved: [x], backward: (dY: Tensor) => [dY] };
  const bad = {
    op: wrong(["string"], undefined),
    inputs: [...lists, ...are(undefined)],
    output: d.x([2, 3], { wrong: [] }).bad,
    saved: lists,
    hidden: lists,
    backward: d.fn(0).bad,
  };
  return [{ good, bad: spoilt(good, bad) }];
});
const kernel = () => ({
  name: "fuzzed",
  buffers: { x: "read f32", y: "write f32" },
  params: { size: "u32" },
  main: "if (thread < params.size) { y[thread] = x[thread]; }",
});
row("defineKernel", () => {
  const required = are(undefined), good = kernel();
  const bad = {
    name: [...not("string"), ...required],
    buffers: [...not("object"), ...required, ...are({ "2": "read f32" }, { x: "read" }, { x: 5 })],
    params: wrong(["object"], { x: "u32" }, { s: "f64" }),
    workgroup: wrong(["number"], 0, 0.5, NaN, Infinity),
    subgroups: not("boolean"),
    head: wrong(["string"], "fn g() { var s: S; f(&s.x); }"), // on which the compiler would abort
    main: [...not("string"), ...required, ...are("var a: array<f32, 4>; f(&a[1]);")],
  };
  return [{ good, bad: spoilt(good, bad) }];
});
const copy = limbeck.defineKernel(kernel() as limbeck.KernelSpec);
row("Kernel.run", (d) => {
  const x = d.tensor([4]).memory, y = d.tensor([4], "f32", 3, true).memory;
  return [
    { good: copy, bad: [] },
    { good: { x, y }, bad: wrong([], undefined, { x }, { x: 5, y }, { x: y, y }, { x: null, y }) },
    { good: { size: 4 }, bad: wrong([], undefined, { size: "4" }, { size: null }) },
    d.integer([1, 2], [-1, 2 ** 33], true),
  ];
});

// files
export const directory: string = Deno.makeTempDirSync();
export const file: string = `${directory}/a.safetensors`;
const notPath = wrong(["string"], undefined);
row("loadSafetensors loadSafetensorsMetadata", () => {
  const bytes = Deno.readFileSync(file);
  const huge = bytes.map((b, i) => i < 8 ? 255 : b), damaged = [bytes.subarray(0, 20), new Uint8Array(9), huge];
  return [{ good: bytes, bad: wrong(["string", "strings"], undefined, ...damaged) }];
});
row("saveSafetensors", (d) => {
  const x = d.tensor([2]), good = { x, y: d.tensor([d.int(0, 3)], "i32") };
  return [
    { good: `${directory}/b.safetensors`, bad: notPath },
    {
      good,
      bad: [
        ...not("object"),
        ...are(undefined, { x: 5 }, { x: null }, { __metadata__: x }),
        ...d.gone([2]).map(({ make }) => ({ make: () => ({ gone: make() }) })),
      ],
    },
    { good: { a: "b" }, bad: wrong(["object"], { a: 5 }, { a: null }) },
  ];
});
const model = (d: Draw) => d.own(new nn.Linear(2, 3));
const adam = (d: Draw, parameters: Tensor[]) => d.own(new optim.Adam(parameters, { lr: 0.1 }));
const checkpointed = (d: Draw) => {
  const linear = model(d);
  return { model: linear, optimizer: adam(d, linear.parameters()) };
};
row("saveCheckpoint", (d) => {
  const good = { ...checkpointed(d), step: d.int(0, 9) };
  const bad = { model: wrong([], undefined), optimizer: not(), step: d.integer([0], [-1]).bad, extra: are(5n) };
  return [
    { good: `${directory}/c`, bad: notPath },
    { good, bad: spoilt(good, bad) },
    d.options({ overwrite: { good: true, bad: not("boolean") } }, "overwrite"),
  ];
});
row("loadCheckpoint", (d) => {
  const good = checkpointed(d);
  return [{ good: `${directory}/d`, bad: notPath }, {
    good,
    bad: spoilt(good, { model: wrong([], undefined), optimizer: not(), step: are(1) }),
  }];
});

// objects
row("new Scope new Tape new Meter", () => []);
const itself = (good: unknown): Argument => ({ good, bad: [] });
const ending = (d: Draw, object: Scope) => {
  d.after(() => object.close());
  return [itself(object)];
};
row("Scope.close Scope.[Symbol.dispose]", (d) => ending(d, new Scope()));
row("Tape.[Symbol.dispose]", (d) => ending(d, new Tape()));
const meter = (d: Draw) => itself(d.own(new limbeck.Meter()));
row("Meter.read Meter.dispose Meter.[Symbol.dispose]", (d) => [meter(d)]);
row("Meter.add", (d) => [meter(d), { good: "loss", bad: notPath }, d.x([], { grad: false, shapes: [[2], [0]] })]);
const self = (d: Draw, shape: number[]): Argument => ({ good: d.tensor(shape), bad: d.gone(shape) });
row("Tensor.data Tensor.array", (d) => [self(d, [2])]);
row("Tensor.item", (d) => {
  const several: Bad[] = [{ make: () => d.tensor([2]) }, { make: () => d.tensor([0]) }];
  return [{ ...self(d, [1]), bad: [...d.gone([1]), ...several] }];
});
row("Tensor.detach", (d) => [self(d, [2])]);
row("Tensor.keep", (d) => [{ ...self(d, [2]), good: d.own(d.tensor([2])) }]);
row("Tensor.dispose Tensor.[Symbol.dispose] Tensor.toString", (d) => [itself(d.tensor([2]))]);
row("Tensor.assign", (d) => [self(d, [2, 3]), d.x([2, 3], { exact: true, grad: false })]);
row("Tensor.backward", (d) => {
  const tape = new Tape();
  d.after(() => tape.close());
  const y = d.tensor([2], "f32", 3, true).square();
  return [{ good: y, bad: d.gone([2]) }, d.x([2], { exact: true, grad: false })];
});
/** Methods that are also functions: the first argument is the tensor itself. */
const methodNames = Object.getOwnPropertyNames(Tensor.prototype).filter((name) => name !== "where");
for (const name of methodNames.filter((name) => Object.hasOwn(table, name))) {
  row(`Tensor.${name}`, (d) => {
    for (;;) {
      const [x, ...rest] = table[name](d);
      if (x.good instanceof Tensor) return [{ good: x.good, bad: x.tensors! }, ...rest];
    }
  });
}

row("Tensor.where", (d) => {
  const [condition, x, other] = table.where(d);
  return [{ good: x.good, bad: x.tensors! }, condition, other];
});

// modules
const size = (d: Draw, ...good: number[]) => d.integer(good, [0, -1, 2 ** 40], true);
const count = (d: Draw, ...good: number[]) => d.integer(good, [0, -1], true);
// deno-lint-ignore no-explicit-any
const layer = (name: string, draw: (d: Draw) => Argument[], input: (d: Draw, made: any) => Argument[]) => {
  row(`new nn.${name}`, draw);
  row(`nn.${name}.forward`, (d) => {
    const made = d.own<nn.Module>(Reflect.construct(Reflect.get(nn, name), draw(d).map((a) => a.good)));
    return [itself(made), ...input(d, made)];
  });
};
layer(
  "Linear",
  (d) => [size(d, 1, 5), size(d, 1, 5), d.options({ bias: d.flag() })],
  (d, m) => [d.x([2, m.weight.shape[1]])],
);
layer(
  "Conv2d",
  (d) => [
    size(d, 1, 3),
    size(d, 1, 3),
    size(d, 1, 3),
    d.options({ stride: d.integer([1, 2], [0, -1]), padding: d.integer([0, 1], [-1]), bias: d.flag() }),
  ],
  (d, m) => [d.x([2, m.weight.shape[1], 4, 4])],
);
layer("Dropout", (d) => [probability(d)], (d) => [d.x([2, 3])]);
layer("Embedding", (d) => [size(d, 2, 5), size(d, 1, 5)], (d, m) => [d.labels([2, 3], m.weight.shape[0])]);
layer("LayerNorm", (d) => [size(d, 1, 5), eps(d)], (d, m) => [d.x([2, m.weight.shape[0]])]);
layer("RMSNorm", (d) => [size(d, 1, 5), eps(d)], (d, m) => [d.x([2, m.weight.shape[0]])]);
const tokens = (d: Draw) => d.x([2, 3, 4], { shapes: [[2, 3, 5]] });
const call = (d: Draw) => {
  const mask = d.x([3], { dtype: "i32", wrong: ["u32"], grad: false });
  return d.options({ causal: d.flag(), ...d.chance() && { mask: { good: mask.good, bad: mask.bad.slice(1) } } });
};
const heads = (d: Draw) => d.integer([2], [0, -1, 3], true);
layer("MultiHeadAttention", (d) => [size(d, 4), heads(d), probability(d)], (d) => [tokens(d), call(d)]);
layer(
  "TransformerBlock",
  (d) => [size(d, 4), heads(d), d.options({ hidden: d.integer([3], [0, -1, 2 ** 40]), dropout: probability(d) })],
  (d) => [tokens(d), call(d)],
);
const GPT = { vocabulary: 5, context: 6, layers: 1, width: 4, heads: 2 };
layer("Gpt", (d) => [d.options({
  vocabulary: size(d, 5),
  context: size(d, 6),
  layers: d.integer([0, 1], [-1, 2 ** 40], true),
  width: size(d, 4),
  heads: heads(d),
  hidden: d.integer([3], [0, 2 ** 40]),
  dropout: probability(d),
  tied: d.flag(),
}, ...Object.keys(GPT))], (d) => [d.labels([2, 3], 5)]);
const gpt = (d: Draw) => itself(d.own(new nn.Gpt(GPT)));
row("nn.Gpt.hiddenStates", (d) => [gpt(d), d.labels([2, 3], 5)]);
row("nn.Gpt.logits", (d) => [gpt(d), tokens(d)]);
const attention = (d: Draw) => itself(d.own(new nn.MultiHeadAttention(4, 2)));
row("nn.MultiHeadAttention.project", (d) => [attention(d), tokens(d)]);
row("nn.MultiHeadAttention.attend", (d) => [attention(d), tokens(d), call(d)]);
row("nn.MultiHeadAttention.merge", (d) => [attention(d), d.x([2, 2, 3, 2], { shapes: [[4], [2, 2, 3, 3]] })]);
row("nn.TransformerBlock.feedForward", (d) => [itself(d.own(new nn.TransformerBlock(4, 2))), tokens(d)]);
row("new nn.Sequential", (d) => {
  const step = () => ({ good: d.pick<unknown>(limbeck.relu, model(d)), bad: wrong(["function"], undefined) });
  return [step(), step()];
});
row("nn.Sequential.forward", (d) => [itself(new nn.Sequential(model(d), limbeck.relu)), d.x([4, 2])]);
row("nn.Sequential.children", (d) => [itself(new nn.Sequential(model(d)))]);
row("nn.Module.children nn.Module.namedParameters nn.Module.parameters nn.Module.eval", (d) => [itself(model(d))]);
row("nn.Module.stateDict nn.Module.dispose", (d) => [itself(model(d))]);
row("nn.Module.train", (d) => [itself(model(d)), d.flag()]);
row("nn.Module.loadStateDict", (d) => {
  const good = { weight: d.tensor([3, 2]), bias: d.tensor([3]) }, exact = { exact: true };
  const bad = { weight: d.x([3, 2], exact).bad, bias: d.x([3], exact).bad };
  return [
    itself(model(d)),
    { good, bad: spoilt(good, bad) },
    d.options({ strict: { good: true, bad: not("boolean") } }),
  ];
});
row("nn.generate", (d) => {
  const lists = [[[1, 2]], ...[[[]], [[1], [1, 2]], [[5]], [[-1]]].map((list) => list.map((x) => new Int32Array(x)))];
  return [
    { good: gpt(d).good, bad: wrong([], undefined, model(d)) },
    { good: [new Int32Array([1, d.int(0, 4)])], bad: wrong([], undefined, ...lists) },
    d.options({
      length: d.integer([0, 2], [-1, 5, 1e9], true),
      temperature: d.number([0, 1], [-1]),
      topK: d.integer([2], [0, -1]),
      topP: d.number([0.5], [0, 1.1]),
      seed: d.integer([3]),
      stop: d.integer([3], [-1, 5]),
    }, "length"),
  ];
});
row("nn.batches", (d) => {
  const rows = d.int(1, 5), x = { data: new Float32Array(rows * 2), shape: [rows, 2] };
  const columns = [
    ...[5, null, {}, { data: [1, 2], shape: [1, 2] }, { data: new Float32Array(3), shape: [rows, 2] }],
    ...[{ data: new Float32Array(4), shape: 4 }, { data: new Float64Array(2), shape: [1, 2] }],
    ...[{ data: new Float32Array(1), shape: [] }, { data: new Float32Array(2), shape: [-1, -2] }],
  ];
  const unequal = { x, y: { data: new Float32Array(rows + 1), shape: [rows + 1] } };
  return [
    { good: { x }, bad: wrong([], undefined, unequal, ...columns.map((x) => ({ x }))) },
    d.options({ batchSize: count(d, 1, 3), shuffle: d.flag(), seed: d.integer([3]), dropLast: d.flag() }, "batchSize"),
  ];
});
const INITIAL: Record<string, (d: Draw) => Argument[]> = {
  constant: () => [{ good: 0.5, bad: wrong(["number"], undefined) }],
  uniform: (d) => [d.number([-1]), d.number([1], [-2])],
  normal: (d) => [d.number([0]), d.number([1], [-1])],
};
for (
  const name of ["constant", "uniform", "normal", "xavierUniform", "xavierNormal", "kaimingUniform", "kaimingNormal"]
) {
  row(`nn.init.${name}`, (d) => [d.x([2, 3], { grad: false }), ...(INITIAL[name]?.(d) ?? [d.number([1], [-1])])]);
}

// optimizers
const leaf = (d: Draw) => d.tensor(d.shape(0, 2, false), "f32", 3, true);
const parameters = (d: Draw): Argument => {
  const [a, b] = [leaf(d), leaf(d)];
  const groups = [{ params: 5 }, {}, { params: [a], lr: -1 }, { params: [a], lr: "1" }, { params: [a], momentum: 1 }];
  const lists = [a, [a, 5], [null], [a, { params: [b] }], [{ params: [a] }, { params: [a] }]];
  return {
    good: d.pick<unknown>([a, b], [{ params: [a], lr: 0.5 }, { params: [b], weightDecay: 0 }]),
    bad: [...not(), ...are(undefined, ...lists, ...groups.map((g) => [g])), ...d.x([2]).tensors!.map(listed)],
  };
};
const positive = (d: Draw, ...good: number[]) => d.number(good, [-1]);
const rate = (d: Draw) => ({ lr: positive(d, 0.1), weightDecay: positive(d, 0.1) });
const adamOptions = (d: Draw) => ({
  ...rate(d),
  betas: { good: [0.9, 0.99], bad: wrong([], [0.9], [0.9, 1], [-1, 0.9], ["0", 0.9], [NaN, 0]) },
  eps: positive(d, 1e-6),
  amsgrad: d.flag(),
});
const OPTIMIZERS: Record<string, (d: Draw) => Record<string, Argument>> = {
  SGD: (d) => ({
    ...rate(d),
    momentum: positive(d, 0.9),
    dampening: d.number([0.1]),
    nesterov: { good: undefined, bad: not("boolean") },
  }),
  Adam: adamOptions,
  AdamW: adamOptions,
  RMSprop: (d) => ({
    ...rate(d),
    alpha: d.number([0.9], [-0.1, 1.1]),
    eps: positive(d, 1e-6),
    momentum: positive(d, 0.5),
    centered: d.flag(),
  }),
  Adagrad: (d) => ({
    ...rate(d),
    lrDecay: positive(d, 0.1),
    initialAccumulatorValue: positive(d, 0.1),
    eps: positive(d, 1e-6),
  }),
};
for (const [name, options] of Object.entries(OPTIMIZERS)) {
  row(`new optim.${name}`, (d) => [parameters(d), d.options(options(d))]);
}
/** A leaf with a gradient. */
const trained = (d: Draw) => {
  const x = d.own(leaf(d).keep());
  x.grad = d.tensor(x.shape);
  return x;
};
const optimizer = (d: Draw) => itself(adam(d, [trained(d)]));
row("optim.Optimizer.step optim.Optimizer.zeroGrad", (d) => [optimizer(d)]);
row("optim.Optimizer.stateDict optim.Optimizer.dispose optim.Optimizer.[Symbol.dispose]", (d) => [optimizer(d)]);
row("optim.Optimizer.loadStateDict", (d) => {
  const object = optimizer(d), good = { ...(object.good as optim.Optimizer).stateDict() };
  for (const x of Object.values(good.tensors)) d.own(x);
  const bad = {
    name: wrong([], "SGD"),
    steps: wrong([], ["1"], [-1]),
    lr: d.number([1], [-1]).bad,
    tensors: wrong([], {}),
  };
  return [object, { good, bad: spoilt(good, bad).filter(({ make }) => !("zzz" in Object(make()))) }];
});
row("optim.clipGradNorm", (d) => {
  const x = trained(d), gone = d.gone([2]).map(listed);
  return [
    { good: [x], bad: [...not("array"), ...are(undefined, [5], [null], x), ...gone] },
    { good: d.pick(1, Infinity), bad: [...not("number"), ...are(NaN, -1, -Infinity)] },
  ];
});
row(
  "optim.cosine optim.linear",
  (d) => [d.options({ steps: count(d, 5, 9), warmup: d.integer([2], [-1, 100]), final: positive(d, 0.1) }, "steps")],
);
row("optim.warmup", (d) => [d.options({ steps: count(d, 5) }, "steps")]);
row("optim.step", (d) => [d.options({ every: count(d, 5), gamma: d.number([0.5], [0, -1]) }, "every")]);

/** Marked @internal, abstract, or (dispose) the end of the run. */
export const INTERNAL: string[] = [
  "dispose Scope.adopt Tape.add Tape.walk Tape.walkAgain Tensor.sameMemory Tensor.closeWith Tensor.save Tensor.unsave Tensor.empty",
  "Tensor.owned Tensor.leaveScope nn.TransformerBlock.forwardCached optim.Optimizer.checkState",
  ...Object.keys(OPTIMIZERS).map((name) => `optim.${name}.settings`),
].flatMap((names) => names.split(" ")).concat("new Tensor", "new nn.Module", "new optim.Optimizer");

/** What a message may begin with besides the name of the function, class or method. */
export const SAYS: [RegExp, string[]][] = [
  [/^(new )?nn\./, [...Object.keys(limbeck), "MultiHeadAttention"]], // a module consists of ops
  [/^Tensor\./, ["tensor"]],
  [/^optim\.Optimizer\./, ["Adam"]],
  [/^Kernel\./, ["fuzzed"]],
];
