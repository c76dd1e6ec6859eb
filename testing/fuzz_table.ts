/** The arguments of every public function: how valid ones are drawn, and what must be refused. Shapes and options vary little, because each new kernel is compiled. */
import * as limbeck from "@limbeck/limbeck";
import { nn, optim, Scope, Tape, Tensor, tensor } from "@limbeck/limbeck";
import { absent, are, type Argument, type Bad, type Draw, listed, not, wrong } from "./fuzz.ts";
import { sizeOf } from "./reference.ts";

/** The arguments of a function; for a method the object comes first. */
export const table: Record<string, (d: Draw) => Argument[]> = {};
const row = (names: string, draw: (d: Draw) => Argument[]) =>
  names.split(/(?<!new) /).forEach((name) => table[name] = draw);

// tensors
const creation = (d: Draw, ...wrong: string[]) =>
  d.options({ dtype: { good: "f32", bad: are("f64", "", 5, null, "F32", [], {}, ...wrong) }, requiresGrad: d.flag() });
row("zeros ones", (d) => [d.sizes(d.shape(0, 3)), creation(d)]);
row("rand randn", (d) => [d.sizes(d.shape(0, 3)), creation(d, "i32", "u32")]);
row("full", (d) => [
  d.sizes(d.shape(0, 3)),
  { good: d.pick(0.5, NaN, -Infinity), bad: wrong(["number"], undefined) },
  creation(d),
]);
row("arange", (d) => {
  const end = d.number([4, 7.5], [-1, 1e12, 1e300], true);
  if (d.chance()) return [end];
  return [d.number([0, 3], [1e12]), d.number([4, 9.5], [-1e12, 1e12]), d.number([1, 0.5], [0, -1, 1e-12]), creation(d)];
});
row("eye", (d) => [d.integer([0, 1, 5], [-1, 1e5, 1e9], true), creation(d)]);
row("randint", (d) => {
  const dtype = d.pick("i32", "u32"),
    low = dtype === "u32" ? d.integer([0, 3], [-1], true) : d.integer([0, -5], [], true);
  return [
    { ...low, bad: [...low.bad, ...are(-(2 ** 40), 2 ** 40)] },
    d.integer([6, 9], [-6, 2 ** 40], true),
    d.sizes(d.shape(0, 3)),
    d.options({ dtype: { good: dtype, bad: are("f64", null, 5) } }, "dtype"),
  ];
});
row("tensor", (d) => {
  const shape = d.shape(1, 3, false), size = sizeOf(shape), numbers = new Array(size).fill(0.5);
  const ragged = are([1, [2, 3]], [[1], 2], [[1, 2], [3]], [1, "2"], [undefined], [null], [5n], new Array(size + 2));
  const foreign = are(undefined, new Float64Array(size), new Float32Array(size + 1), new ArrayBuffer(4));
  const wrongShapes = d.sizes(shape).bad.filter(({ make }) => Array.isArray(make()) && (make() as []).length > 0);
  return [
    {
      good: d.pick<unknown>(new Float32Array(size), new Float16Array(size), numbers),
      bad: [...not("number", "array", "nested"), ...ragged, ...foreign],
    },
    { good: shape, bad: [...wrongShapes, ...are([...shape, 2], [size + 1])] },
    creation(d),
  ];
});

// elementwise
row("abs cos exp log neg relu rsqrt sigmoid silu sin softplus sqrt square tanh", (d) => [d.x(d.shape(0, 3))]);
row("gelu", (d) => [d.x(d.shape(0, 3)), d.options({ approximate: d.oneOf("none", "tanh") })]);
row("cast", (d) => [
  d.x(d.shape(0, 3), { dtype: d.pick("f32", "i32", "u32"), wrong: [] }),
  { good: "f32", bad: wrong([], undefined, "i32", "f64") },
]);
row("clamp", (d) => {
  const bound = (good: number[], ...outside: number[]) => ({
    good: d.pick(...good),
    bad: [...not("number"), ...are(NaN, ...outside)],
  });
  const [min, max] = [bound([0.5, -Infinity], Infinity), bound([1, Infinity], -Infinity)];
  return [d.x(d.shape(0, 3)), d.options({ min, max }, "min")];
});
row("add sub mul div pow maximum minimum", (d) => {
  const shape = d.shape(0, 3), narrower = d.narrower(shape), wide = (narrower.at(-1) ?? 1) > 1;
  const a = d.x(shape, { or: ["number"] }), number = { good: d.pick(2, 0.5, -1), bad: not("number") };
  if (d.chance()) return d.chance() ? [a, number] : [number, a];
  return [a, d.x(narrower, { or: ["number"], shapes: wide ? [[narrower.at(-1)! + 7]] : [] })];
});
row("where", (d) => {
  const shape = d.shape(0, 3), [of, dtype] = [0, 1].map(() => d.pick("f32", "i32", "u32"));
  return [
    d.x(d.narrower(shape), { dtype: of, wrong: [] }),
    d.x(shape, { dtype, wrong: [], or: ["number"] }),
    d.x(d.narrower(shape), { dtype, or: ["number"] }),
  ];
});

// reductions
row("sum mean max min logSumExp", (d) => {
  const shape = d.shape(0, 3, false);
  return [d.x(shape), d.options({ dim: d.dim(shape.length, { several: true }), keepDim: d.flag() })];
});
row("variance", (d) => {
  const shape = d.shape(0, 3, false), dim = d.dim(shape.length, { several: true });
  return [d.x(shape), d.options({ dim, keepDim: d.flag(), correction: d.number([0, 1]) })];
});
row("argmax", (d) => {
  const shape = d.shape(0, 3, false);
  return [d.x(shape), d.options({ dim: d.dim(shape.length), keepDim: d.flag() })];
});

// shape
const any = (d: Draw, shape: number[]) => d.x(shape, { dtype: d.pick("f32", "i32", "u32"), wrong: [] });
row("reshape", (d) => {
  const shape = d.shape(0, 3, false), size = sizeOf(shape), good = d.pick([size], [1, size], [-1], [size, -1]);
  const bad = d.sizes(good).bad.filter(({ make }) => !(Array.isArray(make()) && (make() as []).length === 0));
  return [any(d, shape), { good, bad: [...bad, ...are([size + 1], [-1, -1], [-2], [size, 2, 2], [-1, 0])] }];
});
row("transpose", (d) => {
  const shape = d.shape(1, 3);
  return [any(d, shape), d.dim(shape.length, { required: true }), d.dim(shape.length, { required: true })];
});
row("permute", (d) => {
  const shape = d.shape(1, 3), rank = shape.length, order = shape.map((_, i) => (i + 1) % rank), rest = order.slice(1);
  const lists = [new Array(rank), [...order, 0], order.map(() => rank), [...rest, NaN], [...rest, "0"], [...rest, 0.5]];
  return [any(d, shape), { good: order, bad: wrong([], undefined, ...lists) }];
});
row("expand", (d) => {
  const shape = d.shape(1, 3, false), from = d.narrower(shape);
  const bad = d.sizes(shape).bad.filter(({ make }) => from.length > 0 || (make() as [])?.length !== 0);
  return [any(d, from), { good: shape, bad: from.at(-1)! > 1 ? [...bad, ...are([...shape, from.at(-1)! + 1])] : bad }];
});
row("slice", (d) => {
  const shape = d.shape(1, 3), n = shape[0], good = shape.map((n): [number, number] => [d.int(0, n), n]);
  const pairs = [[0, n + 1], [-n - 1, 0], [0.5, 1], [NaN, 1], ["0", 1], [0], [0, 1, 2], null, [0, null], [0, 1e300]];
  const lists = [...pairs.map((pair) => [pair, ...good.slice(1)]), [...good, [0, 0]], [5]];
  return [any(d, shape), { good, bad: wrong(["array"], undefined, ...lists) }];
});
const listOf = (d: Draw, shapes: number[][]): Argument => {
  const xs = shapes.map((shape) => d.x(shape)), good = xs.map((x) => x.good);
  const last = xs.at(-1)!.bad.slice(0, -2).map(({ make }) => ({ make: () => [...good.slice(0, -1), make()] }));
  const misfits: Bad[] = [
    { make: () => [...good, d.tensor([...shapes[0], 2])] },
    { make: () => [...good, d.tensor(shapes[0], "i32")] },
  ];
  return { good, bad: [...not(), ...are(undefined, good[0]), ...last, ...misfits] };
};
row("concat", (d) => {
  const shape = d.shape(1, 3), dim = d.int(0, shape.length - 1);
  const shapes = Array.from({ length: d.int(1, 3) }, () => shape.map((n, i) => i === dim ? d.int(0, 3) : n));
  return [listOf(d, shapes), { ...d.dim(shape.length), good: dim }];
});
row("stack", (d) => {
  const shape = d.shape(0, 2);
  return [listOf(d, Array.from({ length: d.int(1, 3) }, () => shape)), d.dim(shape.length + 1)];
});
row("triu tril", (d) => {
  const dtype = d.pick("f32", "i32", "u32");
  return [d.x(d.shape(2, 3), { dtype, wrong: [], shapes: [[], [3]] }), d.integer([undefined, 0, 1, -2])];
});

// indexing and linear algebra
row("embedding", (d) => {
  const rows = d.int(1, 5);
  return [d.x([rows, d.int(1, 4)], { shapes: [[3], [2, 3, 4]] }), d.labels(d.shape(0, 2), rows)];
});
row("gather", (d) => {
  const shape = d.shape(1, 3, false), dim = d.int(0, shape.length - 1);
  const index = d.labels(shape.map((n, i) => i === dim ? d.int(1, 4) : n), shape[dim]);
  return [any(d, shape), { ...d.dim(shape.length, { required: true }), good: dim }, index];
});
row("oneHot", (d) =>
  [d.labels(d.shape(0, 2), 3), d.integer([3, 5], [0, -1, 2 ** 40], true)].map((a, i) => ({
    ...a,
    bad: i === 0
      ? a.bad.filter(({ make }) => !(make() instanceof Tensor && (make() as Tensor).dtype === "i32"))
      : a.bad,
  })));
row("matmul", (d) => {
  const [m, k, n] = [d.int(1, 5), d.int(1, 5), d.int(1, 5)], batch = d.shape(0, 2), [ta, tb] = [d.flag(), d.flag()];
  const shapes = [[], [9, 9], [2, 7, 9, 9]];
  return [
    d.x([...batch, ...ta.good ? [k, m] : [m, k]], { shapes }),
    d.x([...d.narrower(batch), ...tb.good ? [n, k] : [k, n]], { shapes }),
    d.options({ transposeA: ta, transposeB: tb }, "transposeA", "transposeB"),
  ];
});
const maybe = (d: Draw, shape: number[], o = {}) =>
  d.chance() ? d.x(shape, { exact: true, optional: true, ...o }) : absent;
row("linear", (d) => {
  const [ins, outs] = [d.int(1, 5), d.int(1, 5)];
  return [
    d.x([...d.shape(0, 2), ins], { shapes: [[]] }),
    d.x([outs, ins], { shapes: [[outs], [outs, ins + 1], [1, outs, ins]] }),
    maybe(d, [outs], { or: ["null"] }),
  ];
});
row("softmax logSoftmax", (d) => {
  const shape = d.shape(1, 3);
  return [d.x(shape, { shapes: [[]] }), d.dim(shape.length)];
});
const eps = (d: Draw) => d.number([1e-5, 0.1], [-1]);
row("layerNorm", (d) => {
  const n = d.int(1, 9), affine = () => d.x([n], { exact: true });
  return [d.x([...d.shape(0, 2), n], { shapes: [[]] }), affine(), affine(), d.options({ eps: eps(d) })];
});
row("rmsNorm", (d) => {
  const n = d.int(1, 9);
  return [d.x([...d.shape(0, 2), n], { shapes: [[]] }), d.x([n], { exact: true }), d.options({ eps: eps(d) })];
});
const probability = (d: Draw) => d.number([0, 0.3], [-0.1, 1, 2]);
row("dropout", (d) => [d.x(d.shape(0, 3)), d.options({ p: probability(d), training: d.flag() })]);
row("conv2d", (d) => {
  const [ins, outs, kernel] = [d.int(1, 3), d.int(1, 3), d.int(1, 3)];
  return [
    d.x([d.int(1, 2), ins, d.int(3, 6), d.int(3, 6)], { shapes: [[3, 3], [1, ins, 0, 3], [1, ins + 1, 4, 4]] }),
    d.x([outs, ins, kernel, kernel], { shapes: [[3], [outs, ins + 1, 1, 1]] }),
    maybe(d, [outs], { or: ["null"] }),
    d.options({ stride: d.integer([1, 2], [0, -1]), padding: d.integer([0, 1], [-1, 1e9, 2 ** 40]) }),
  ];
});
row("maxPool2d", (d) => [
  d.x([d.int(0, 2), d.int(1, 3), d.int(3, 6), d.int(3, 6)], { shapes: [[3, 3], [1, 1, 0, 3]] }),
  d.options({ kernel: d.integer([1, 2, 3], [0, -1, 7, 1e9], true), stride: d.integer([1, 2], [0, -1]) }, "kernel"),
]);
row("scaledDotProductAttention", (d) => {
  const lead = d.shape(0, 2), [queries, keys, depth] = [d.int(1, 5), d.int(1, 5), 2];
  const mask = d.x([queries, keys], { dtype: d.pick("f32", "i32"), wrong: ["u32"], grad: false });
  return [
    d.x([...lead, queries, depth], { shapes: [[depth], [queries, 100_000]] }),
    d.x([...lead, keys, depth], { shapes: [[depth], [...lead, keys, depth + 1]] }),
    d.x([...lead, keys, depth], { exact: true }),
    d.options({
      causal: d.flag(),
      scale: d.number([0.3]),
      ...d.chance() ? { mask: { good: mask.good, bad: mask.bad.slice(1) } } : { dropout: probability(d) }, // less to compile
    }),
  ];
});

// losses
const reduction = (d: Draw) => d.oneOf("mean", "sum", "none");
const temperature = (d: Draw) => d.number([1, 2], [0, -1]);
const fraction = (d: Draw) => d.number([0, 0.3, 1], [-0.1, 1.1]);
const rowOptions = (d: Draw) => ({ reduction: reduction(d), temperature: temperature(d) });
const shared = (d: Draw) => ({ ...rowOptions(d), ignoreIndex: d.integer([-100, -5], [2 ** 31]) });
const logits = (d: Draw, shape: number[]) => d.x(shape, { shapes: [[], [...shape.slice(0, -1), 0]] });
const rowsOf = (d: Draw): [number[], number, number[]] => {
  const rows = d.shape(0, 2), columns = d.pick(1, 5);
  return [rows, columns, [...rows, columns]];
};
const classWeight = (d: Draw, columns: number) => maybe(d, [columns], { grad: false });
const crossEntropyOptions = (d: Draw, columns: number) => ({
  ...shared(d),
  labelSmoothing: d.number([0, 0.1], [-0.1, 1.1]),
  zLoss: d.number([0, 0.1], [-0.1]),
  softcap: d.number([30], [0, -1]),
  weight: classWeight(d, columns),
  returnZLoss: d.flag(),
  returnAccuracy: d.flag(),
  returnPredictions: d.flag(),
});
row("crossEntropy", (d) => {
  const [rows, columns, shape] = rowsOf(d);
  return [
    logits(d, shape),
    d.labels(rows, columns, { exact: true }),
    d.options(crossEntropyOptions(d, columns)),
  ];
});
const DIVERGENCES = ["forwardKl", "reverseKl", "jsd", "skewForwardKl", "skewReverseKl", "totalVariation"];
/** The options of a divergence that has its own. */
const ofDivergence = (d: Draw, name: string, alpha = "alpha"): Record<string, Argument> =>
  name === "jsd" ? { beta: fraction(d), normalize: d.flag() } : name.startsWith("skew") ? { [alpha]: fraction(d) } : {};
for (const name of DIVERGENCES) {
  row(name, (d) => {
    const [rows, columns, shape] = rowsOf(d), labels = d.labels(rows, columns, { exact: true, optional: true });
    const options = { ...shared(d), labels, ...ofDivergence(d, name) };
    return [logits(d, shape), d.x(shape, { exact: true }), d.options(options)];
  });
}
row("distillation", (d) => {
  const [rows, columns, shape] = rowsOf(d), divergence = d.oneOf("forwardKl", "jsd", "skewReverseKl");
  const flags = { temperatureSquared: d.flag(), dropIgnored: d.flag(), returnParts: d.flag() };
  return [
    logits(d, shape),
    d.x(shape, { exact: true }),
    d.labels(rows, columns, { exact: true }),
    d.options({
      ...shared(d),
      ...flags,
      alpha: fraction(d),
      divergence,
      ...ofDivergence(d, divergence.good as string, "skewAlpha"),
    }, "divergence"),
  ];
});
const head = (d: Draw, rows: number[], depth: number, columns: number) => [
  d.x([...rows, depth], { shapes: [[]] }),
  d.x([columns, depth], { shapes: [[columns], [columns, depth + 2], [0, depth]] }),
];
const chunkSize = (d: Draw) => d.integer([1, 2, 100], [0, -1]);
row("linearCrossEntropy", (d) => {
  const [rows, columns] = rowsOf(d), options = crossEntropyOptions(d, columns);
  return [
    ...head(d, rows, d.int(1, 5), columns),
    d.labels(rows, columns, { exact: true }),
    d.options({ ...options, bias: maybe(d, [columns], { or: ["null"] }), chunkSize: chunkSize(d) }),
  ];
});
row("linearDistillation", (d) => {
  const [rows, columns] = rowsOf(d), depth = d.int(1, 5), divergence = d.oneOf("forwardKl", "jsd", "skewReverseKl");
  return [
    ...head(d, rows, depth, columns),
    ...head(d, rows, depth + 1, columns),
    d.options({
      ...shared(d),
      divergence,
      ...ofDivergence(d, divergence.good as string),
      labels: d.labels(rows, columns, { exact: true, optional: true }),
      bias: maybe(d, [columns], { or: ["null"] }),
      teacherBias: maybe(d, [columns], { or: ["null"] }),
      chunkSize: chunkSize(d),
    }, "divergence"),
  ];
});
const LOSSES: Record<string, (d: Draw) => Record<string, Argument>> = {
  mseLoss: (d) => ({ reduction: reduction(d) }),
  l1Loss: (d) => ({ reduction: reduction(d) }),
  binaryCrossEntropyWithLogits: (d) => ({ reduction: reduction(d) }),
  smoothL1Loss: (d) => ({ reduction: reduction(d), beta: d.number([0, 0.5], [-1]) }),
  klDiv: (d) => ({ reduction: d.oneOf("batchmean", "mean", "sum", "none"), logTarget: d.flag() }),
  crossEntropyOfDistributions: rowOptions,
};
for (const [name, options] of Object.entries(LOSSES)) {
  row(name, (d) => {
    const shape = d.shape(1, 3, false);
    return [d.x(shape), d.x(shape, { exact: true }), d.options(options(d))];
  });
}
row("nllLoss", (d) => {
  const [rows, columns, shape] = rowsOf(d), { reduction, ignoreIndex } = shared(d);
  return [
    logits(d, shape),
    d.labels(rows, columns, { exact: true }),
    d.options({ reduction, ignoreIndex, weight: classWeight(d, columns) }),
  ];
});
row("cosineSimilarity", (d) => {
  const shape = d.shape(2, 3, false);
  return [d.x(shape), d.x(shape), d.options({ dim: d.dim(shape.length), eps: d.number([1e-6], [0, -1]) })];
});
row("cosineEmbeddingLoss", (d) => {
  const [rows, columns] = [d.int(1, 4), d.int(1, 5)];
  const y = d.x([rows], { dtype: d.pick("f32", "i32"), exact: true, wrong: ["u32"], grad: false });
  const signs = (sign: number) => tensor(new Int32Array(rows).fill(sign));
  y.good = signs(d.pick(1, -1));
  y.bad.push({ make: () => signs(0) });
  const options = d.options({ reduction: reduction(d), margin: d.number([0.5], [-2, 2]) });
  return [d.x([rows, columns]), d.x([rows, columns]), y, options];
});
row("entropy", (d) => [logits(d, rowsOf(d)[2]), d.options(rowOptions(d))]);
row("gaussianKl", (d) => {
  const [, , shape] = rowsOf(d),
    more = Array.from({ length: d.int(0, 2) }, () => d.x(shape, { exact: true, optional: true }));
  return [logits(d, shape), d.x(shape, { exact: true }), ...more];
});

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
row("Kernel.run", (d) => {
  const x = d.tensor([4]).memory, y = d.tensor([4], "f32", 3, true).memory;
  return [
    { good: copy, bad: [] },
    { good: { x, y }, bad: wrong([], undefined, { x }, { x: 5, y }, { x: y, y }, { x: null, y }) },
    { good: { size: 4 }, bad: wrong([], undefined, { size: "4" }, { size: null }) },
    d.integer([1, 2], [-1, 2 ** 33], true),
  ];
});
const copy = limbeck.defineKernel(kernel() as limbeck.KernelSpec);

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
row(
  "Tensor.item",
  (d) => [{ ...self(d, [1]), bad: [...d.gone([1]), { make: () => d.tensor([2]) }, { make: () => d.tensor([0]) }] }],
);
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
  "dispose Scope.adopt Tape.add Tape.walk Tape.walkAgain Tensor.view Tensor.closeWith Tensor.save Tensor.unsave Tensor.empty",
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
