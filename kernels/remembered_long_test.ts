/** Launches are remembered by all that they depend on: after any other launch, each has the results that it has without the caches. */
import { assertEquals } from "@std/assert";
import { dispose, full, init, type Tensor, tensor, zeros } from "@limbeck/limbeck";
import { attention, attentionBackward } from "./attention.ts";
import { crossEntropyRows } from "./cross_entropy.ts";
import { divergenceRows } from "./divergence.ts";
import { map } from "./elementwise.ts";
import { overrides } from "./gpu/tuning.ts";
import { matmul } from "./matmul.ts";
import { normRows, normRowsBackward } from "./norm.ts";
import { reduce } from "./reduce.ts";
import { softmaxRows, softmaxRowsBackward } from "./softmax.ts";

// deno-lint-ignore no-explicit-any
type Any = any;
const SIZE = 4096;
const values = (seed: number) => Float32Array.from({ length: SIZE }, (_, i) => ((i * 37 + seed * 101) % 61) / 32 - 0.9);
const input = (seed: number, element = "f32") =>
  tensor(element === "f16" ? new Float16Array(values(seed)) : values(seed));
const output = (dtype: Any = "f32") => full([SIZE], 0.25, { dtype });
const ids = () => tensor(Int32Array.from({ length: SIZE }, (_, i) => i % 5));
const writable = (seed: number, element: Any) => {
  const { memory } = output(element);
  map("copy", "a", [{ memory: input(seed).memory, shape: [SIZE], element: "f32" }], { memory, element }, [SIZE]);
  return memory;
};

/** The base and, for each field, the base with other values of it. */
const each = (base: Any, others: Any): Any[] => [
  base,
  ...Object.entries(others).flatMap(([name, other]) =>
    (Array.isArray(other) ? other : [other]).map((v) => ({ ...base, [name]: v }))
  ),
];

function check(name: string, cases: Any[], run: (c: Any) => Tensor[]): void {
  Deno.test(`remembered: ${name}`, async () => {
    const { f16 } = await init();
    const all = async () => {
      const results: string[] = [];
      for (const c of cases) {
        if (!f16 && JSON.stringify(c).includes("f16")) continue;
        for (const t of run(c)) results.push(`${JSON.stringify(c)}: ${(await t.data()).join()}`);
      }
      return results;
    };
    overrides.gather = false; // an override bypasses the caches; this one changes nothing else
    let want: string[];
    try {
      want = await all();
    } finally {
      overrides.gather = null;
    }
    await dispose(); // empties the caches
    await init();
    assertEquals(await all(), want);
    assertEquals(await all(), want);
  });
}

check(
  "norms",
  each({ layer: true, element: "f32", rows: 4, columns: 8, eps: 0.5, plus: false, weight: true, bias: true }, {
    layer: false,
    element: "f16",
    rows: 5,
    columns: 12,
    eps: 0.25,
    plus: true,
    weight: false,
    bias: false,
  }),
  (c) => {
    const [x, weight, b, dY] = [1, 2, 3, 4].map((i) => input(i, c.element).memory), stats = output();
    const [y, dX, dWeight, dBias] = [0, 1, 2, 3].map(() => output(c.element));
    normRows(
      { x, weight, bias: c.layer ? b : null, y: y.memory, stats: stats.memory },
      c.element,
      c.rows,
      c.columns,
      c.eps,
    );
    normRowsBackward(
      {
        x,
        weight,
        stats: stats.memory,
        dY,
        plus: c.plus ? b : null,
        dX: dX.memory,
        dWeight: c.weight ? dWeight.memory : null,
        dBias: c.bias && c.layer ? dBias.memory : null,
      },
      c.layer,
      c.element,
      c.rows,
      c.columns,
      () => () => {},
    );
    return [y, stats, dX, dWeight, dBias];
  },
);

check(
  "softmax",
  each({ kind: "softmax", element: "f32", rows: 4, columns: 8 }, {
    kind: "logSoftmax",
    element: "f16",
    rows: 5,
    columns: 12,
  }),
  (c) => {
    const y = output(c.element), dX = output(c.element);
    softmaxRows(c.kind, input(1, c.element).memory, y.memory, c.element, c.rows, c.columns);
    softmaxRowsBackward(
      c.kind,
      input(2, c.element).memory,
      input(3, c.element).memory,
      dX.memory,
      c.element,
      c.rows,
      c.columns,
    );
    return [y, dX];
  },
);

check(
  "reductions",
  each({ kind: "sum", input: "f32", output: "f32", outer: 4, length: 8, inner: 3 }, {
    kind: "max",
    input: "f16",
    output: "f16",
    outer: 5,
    length: 9,
    inner: 4,
  }),
  (c) => {
    const results = output(c.output);
    reduce(c.kind, { values: input(1, c.input).memory, input: c.input, results: results.memory, output: c.output }, c);
    return [results];
  },
);

check(
  "elementwise",
  each({ expression: "a + 2.0 * b", output: "f32", shape: [3, 4], a: [3, 1], b: [4], ofA: "f32", ofB: "f32" }, {
    expression: "a * b",
    output: "f16",
    shape: [[3, 3, 4]],
    a: [[1]],
    b: [[3, 4]],
    ofA: "f16",
    ofB: "f16",
  }),
  (c) => {
    const y = output(c.output),
      operand = (i: number, shape: Any, element: Any) => ({ memory: input(i, element).memory, shape, element });
    map(
      "test",
      c.expression,
      [operand(1, c.a, c.ofA), operand(2, c.b, c.ofB)],
      { memory: y.memory, element: c.output },
      c.shape,
    );
    return [y];
  },
);

check(
  "cross-entropy",
  each(
    {
      logits: "f32",
      target: "index",
      weight: false,
      gradient: true,
      inPlace: false,
      extras: false,
      stride: null,
      rows: 4,
      firstRow: 0,
      allRows: 16,
      columns: 8,
      mean: false,
      ignoreIndex: -100,
      smoothing: 0,
      zLoss: 0,
      temperature: 1,
      softcap: 0,
    },
    {
      logits: "f16",
      target: ["f32", "f16"],
      weight: true,
      gradient: false,
      inPlace: true,
      extras: true,
      stride: [0, 1],
      rows: 5,
      firstRow: 3,
      columns: 12,
      mean: true,
      ignoreIndex: 2,
      smoothing: [0.1, 0.2],
      zLoss: 0.3,
      temperature: 2,
      softcap: [3, 4],
    },
  ).flatMap((c) => c.target === "f32" ? [c, { ...c, mean: true }, { ...c, mean: true, allRows: 17 }] : [c]),
  (c) => {
    const logits = writable(1, c.logits), loss = output(), d = output(c.logits);
    const zRows = output(), hits = output(), predictions = zeros([SIZE], { dtype: "i32" });
    crossEntropyRows(c.logits, c.target, {
      logits,
      target: (c.target === "index" ? ids() : input(2, c.target)).memory,
      counts: tensor([3, 4, 5]).memory,
      weight: c.weight ? input(3).memory : null,
      upstream: c.stride === null ? null : { memory: input(4).memory, stride: c.stride },
      loss: loss.memory,
      extras: c.extras ? { zRows: zRows.memory, predictions: predictions.memory, hits: hits.memory } : null,
      dLogits: c.inPlace ? logits : c.gradient ? d.memory : null,
    }, c);
    return [loss, d, zRows, hits, predictions];
  },
);

check(
  "divergences",
  each(
    {
      name: "jsd",
      student: "f32",
      teacher: "f32",
      dStudent: true,
      dTeacher: true,
      inPlace: false,
      parts: false,
      stride: null,
      rows: 4,
      firstRow: 0,
      allRows: 16,
      columns: 8,
      mean: true,
      drop: false,
      ignoreIndex: 2,
      temperature: 1,
      beta: 0.25,
      ceFactor: 0.5,
      divergenceFactor: 0.5,
      partFactor: 1,
    },
    {
      name: "skewForwardKl",
      student: "f16",
      teacher: "f16",
      dStudent: false,
      dTeacher: false,
      inPlace: true,
      parts: true,
      stride: [0, 1],
      rows: 5,
      firstRow: 3,
      allRows: 17,
      columns: 12,
      mean: false,
      drop: true,
      temperature: 2,
      beta: 0.375,
      divergenceFactor: 0.75,
    },
  ).flatMap((c) => c.parts ? each(c, { ceFactor: 0.75, partFactor: 2 }) : c.drop ? each(c, { ignoreIndex: 3 }) : [c]),
  (c) => {
    const student = writable(1, c.student),
      teacher = writable(2, c.teacher),
      loss = output(),
      ce = output(),
      d = output();
    const dStudent = output(c.student), dTeacher = output(c.teacher);
    divergenceRows(c.name, c.student, c.teacher, {
      student,
      teacher,
      labels: ids().memory,
      counts: tensor([3, 4, 5]).memory,
      upstream: c.stride === null ? null : { memory: input(4).memory, stride: c.stride },
      loss: loss.memory,
      parts: c.parts ? { ceRows: ce.memory, divergenceRows: d.memory } : null,
      dStudent: c.inPlace ? student : c.dStudent ? dStudent.memory : null,
      dTeacher: c.inPlace ? teacher : c.dTeacher ? dTeacher.memory : null,
    }, c);
    return [loss, dStudent, dTeacher, ce, d];
  },
);

check(
  "products",
  each(
    {
      rows: 6,
      columns: 7,
      depth: 5,
      batches: 1,
      aOffset: 0,
      aBatch: 40,
      aRow: 8,
      aColumn: 1,
      bOffset: 0,
      bBatch: 40,
      bRow: 8,
      bColumn: 1,
      cOffset: 0,
      a: "f32",
      b: "f32",
      c: "f32",
      bias: null,
      activation: null,
      before: false,
      slope: null,
      plus: false,
      add: false,
      sums: null,
    },
    {
      rows: 5,
      columns: 6,
      depth: 4,
      batches: [2, 3],
      aOffset: 3,
      aRow: 9,
      aColumn: 2,
      bOffset: 3,
      bRow: 9,
      bColumn: 2,
      cOffset: 4,
      a: "f16",
      b: "f16",
      c: "f16",
      bias: ["f32", "f16"],
      activation: ["relu", "gelu"],
      slope: ["relu", "gelu"],
      plus: true,
      add: true,
      sums: ["f32", "f16"],
    },
  ).flatMap((c) =>
    c.batches === 2 ? each(c, { aBatch: 50, bBatch: 50 }) : c.activation ? each(c, { before: true }) : [c]
  ),
  (c) => {
    const y = output(c.c), z = output(c.c), before = output(c.c), sums = output(c.sums ?? "f32");
    const product: Any = {
      a: {
        memory: input(1, c.a).memory,
        element: c.a,
        offset: c.aOffset,
        batch: c.aBatch,
        row: c.aRow,
        column: c.aColumn,
      },
      b: {
        memory: input(2, c.b).memory,
        element: c.b,
        offset: c.bOffset,
        batch: c.bBatch,
        row: c.bRow,
        column: c.bColumn,
      },
      c: { memory: y.memory, element: c.c, offset: c.cOffset },
      rows: c.rows,
      columns: c.columns,
      depth: c.depth,
      batches: c.batches,
      epilogue: {
        bias: c.bias ? { memory: input(3, c.bias).memory, element: c.bias } : undefined,
        activation: c.activation ? { name: c.activation, before: c.before ? before.memory : null } : undefined,
        slope: c.slope ? { name: c.slope, of: input(4, c.c).memory } : undefined,
        plus: c.plus ? input(5, c.c).memory : undefined,
        add: c.add,
        sums: c.sums ? { memory: sums.memory, element: c.sums } : undefined,
      },
    };
    matmul(product);
    matmul({ ...product, epilogue: {} }, { ...product, c: { ...product.c, memory: z.memory }, epilogue: {} });
    return [y, z, before, sums];
  },
);

check(
  "attention",
  each(
    {
      element: "f32",
      mask: false,
      packed: false,
      batches: 2,
      heads: 2,
      queries: 3,
      keys: 4,
      depth: 4,
      scale: 0.5,
      causal: false,
      maskStride: 0,
      dropout: 0,
      op: 1,
      qOffset: 0,
      qBatch: 256,
      qHead: 64,
      qRow: 4,
      kOffset: 0,
      kBatch: 256,
      kHead: 64,
      kRow: 4,
      vOffset: 0,
      oOffset: 0,
      oBatch: 256,
      oHead: 64,
      oRow: 4,
    },
    {
      element: "f16",
      mask: true,
      packed: true,
      batches: 3,
      heads: 3,
      queries: 4,
      keys: 5,
      depth: 3,
      scale: 0.25,
      causal: true,
      dropout: [0.5, 0.25],
      qOffset: 4,
      qBatch: 260,
      qHead: 68,
      qRow: 8,
      kOffset: 4,
      kBatch: 260,
      kHead: 68,
      kRow: 8,
      vOffset: 4,
      oOffset: 4,
      oBatch: 260,
      oHead: 68,
      oRow: 8,
    },
  ).flatMap((c) => c.mask ? each(c, { maskStride: 12 }) : c.dropout === 0.5 ? each(c, { op: 2 }) : [c]),
  (c) => {
    const [o, dQ, dK, dV] = [0, 1, 2, 3].map(() => output(c.element)), lse = output();
    const rows = (x: string) => ({
      offset: c[`${x}Offset`],
      batch: c[`${x}Batch`],
      head: c[`${x}Head`],
      row: c[`${x}Row`],
    });
    const s = { ...c, q: rows("q"), k: rows("k"), v: { ...rows("k"), offset: c.vOffset }, o: rows("o") };
    const [q, k, v] = [1, 2, 3].map((i) => input(i, c.element).memory);
    const b = {
      q,
      k,
      v,
      mask: c.mask ? input(4).memory : null,
      state: c.dropout ? ids().memory : null,
      o: o.memory,
      lse: lse.memory,
    };
    attention(c.element, b, s);
    attentionBackward(c.element, b, {
      dO: input(5, c.element).memory,
      delta: output().memory,
      dQ: dQ.memory,
      dK: dK.memory,
      dV: (c.packed ? dK : dV).memory,
    }, s);
    return [o, lse, dQ, dK, dV];
  },
);
