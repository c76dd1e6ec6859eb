/**
 * The arguments of every op: how valid ones are drawn, and what must be refused. Shapes and options vary little, because each new kernel is compiled.
 * testing/fuzz_objects.ts adds everything else that is public.
 */
import { Tensor, tensor } from "@limbeck/limbeck";
import { absent, are, type Argument, type Bad, type Draw, not, wrong } from "./fuzz.ts";
import { sizeOf } from "./reference.ts";

/** The arguments of a function; for a method the object comes first. */
export const table: Record<string, (d: Draw) => Argument[]> = {};
/** Adds functions with the same arguments, by their names. */
export const row = (names: string, draw: (d: Draw) => Argument[]): void =>
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
  const bound = (...good: number[]) => ({ good: d.pick(...good), bad: [...not("number"), ...are(NaN)] });
  const min = bound(0.5, -Infinity, Infinity), max = bound(1, Infinity, -Infinity);
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
export const eps = (d: Draw): Argument => d.number([1e-5, 0.1], [-1]);
row("layerNorm", (d) => {
  const n = d.int(1, 9), affine = () => d.x([n], { exact: true });
  return [d.x([...d.shape(0, 2), n], { shapes: [[]] }), affine(), affine(), d.options({ eps: eps(d) })];
});
row("rmsNorm", (d) => {
  const n = d.int(1, 9);
  return [d.x([...d.shape(0, 2), n], { shapes: [[]] }), d.x([n], { exact: true }), d.options({ eps: eps(d) })];
});
export const probability = (d: Draw): Argument => d.number([0, 0.3, 1], [-0.1, 1.1, 2]);
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
