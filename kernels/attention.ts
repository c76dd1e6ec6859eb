/**
 * Scaled dot-product attention without the T×S matrix: O = softmax(scale·Q·Kᵀ + mask)·V, a tile of queries against a tile of keys at a time, with a running
 * maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). The forward pass keeps one number a query, lse; the backward pass computes
 * the weights again from it: one kernel walks the keys for dQ, one walks the queries for dK and dV, so that every sum has a fixed order and one writer.
 *
 * Four threads share a row of a tile: each computes every fourth score and holds every fourth vec4 of the row's result.
 */
import type { Element } from "./elementwise.ts";
import { type BufferType, type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { PCG4D } from "./random.ts";

/** The longest head that the kernels take: tiles of it fit the workgroup's memory. */
export const LONGEST_HEAD = 128;

/** Sizes and options of one launch. */
export interface AttentionSizes {
  /** Batch times heads. */
  heads: number;
  queries: number;
  keys: number;
  depth: number;
  scale: number;
  causal: boolean;
  /** Elements between the masks of two heads: 0 where all share one. */
  maskStride: number;
  /** Probability that a weight is dropped, and the op's number in its tape. */
  dropout: number;
  op: number;
}

/** What one launch binds. `state` is the random state where weights are dropped. */
export interface AttentionBuffers {
  q: Memory;
  k: Memory;
  v: Memory;
  mask: Memory | null;
  state: Memory | null;
  o: Memory;
  lse: Memory;
}

interface Shape {
  element: Element;
  /** vec4s of a padded row. */
  quads: number;
  mask: boolean;
  dropout: boolean;
}

const shapeKey = (element: Element, s: AttentionSizes, b: AttentionBuffers) =>
  [element, Math.ceil(s.depth / 16) * 4, b.mask ? "mask" : "", b.state ? "dropout" : ""].join();

function parseShape(key: string): Shape {
  const [element, quads, mask, dropout] = key.split(",");
  return { element: element as Element, quads: Number(quads), mask: mask !== "", dropout: dropout !== "" };
}

const PARAMS = {
  heads: "u32",
  queries: "u32",
  keys: "u32",
  depth: "u32",
  scale: "f32",
  causal: "u32",
  maskStride: "u32",
  dropout: "f32",
  op: "u32",
} as const;

/** Functions that all three kernels use; `arrays` are loaded from. */
function common({ quads, mask, dropout }: Shape, arrays: string[]): string {
  return `const QUADS = ${quads}u;
const LOW = -3.4e38;
${
    arrays.map((name) => `
fn load_${name}(head: u32, rows: u32, row: u32, quad: u32) -> vec4f {
  let d = quad * 4u;
  if (row >= rows || d >= params.depth) { return vec4f(0.0); }
  let at = (head * rows + row) * params.depth + d;
  let last = (head * rows + row + 1u) * params.depth - 1u;
  let x = vec4f(${[0, 1, 2, 3].map((j) => `f32(${name}[min(at + ${j}u, last)])`).join(", ")});
  return select(vec4f(0.0), x, d + vec4u(0u, 1u, 2u, 3u) < vec4u(params.depth));
}`).join("")
  }
// the scaled score of a query and a key, LOW where it is masked
fn masked_(score: f32, head: u32, query: u32, key: u32) -> f32 {
  if (query >= params.queries || key >= params.keys || (params.causal == 1u && key > query)) { return LOW; }
  return max(LOW, score * params.scale${mask ? " + mask[head * params.mask_stride + query * params.keys + key]" : ""});
}
${
    dropout
      ? `${PCG4D}
// what a weight is multiplied by: 0 or 1/(1 − p)
fn kept_(head: u32, query: u32, key: u32) -> f32 {
  let bits = pcg4d(vec4u((head * params.queries + query) * params.keys + key, params.op, state[0], state[1]));
  return select(0.0, 1.0 / (1.0 - params.dropout), unit_(bits.x) >= params.dropout);
}`
      : "fn kept_(head: u32, query: u32, key: u32) -> f32 { return 1.0; }"
  }
`;
}

/** The optional bindings of a shape. */
const optional = ({ mask, dropout }: Shape): Record<string, BufferType> => ({
  ...mask ? { mask: "read f32" } : {},
  ...dropout ? { state: "read u32" } : {},
});

const present = (b: AttentionBuffers): Record<string, Memory> => ({
  ...b.mask ? { mask: b.mask } : {},
  ...b.state ? { state: b.state } : {},
});

const each = (n: number, text: (i: number) => string) => Array.from({ length: n }, (_, i) => text(i)).join(" ");

const forwardKernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const shape = parseShape(key), { element, quads } = shape;
  const rows = 32, keys = quads <= 16 ? 32 : 16, threads = rows * 4, mine = quads / 4;
  return {
    name: "attention",
    buffers: {
      q: `read ${element}`,
      k: `read ${element}`,
      v: `read ${element}`,
      ...optional(shape),
      o: `write ${element}`,
      lse: "write f32",
    },
    params: PARAMS,
    workgroup: threads,
    head: `${common(shape, ["q", "k", "v"])}
var<workgroup> query_tile: array<vec4f, ${rows * quads}>;
var<workgroup> key_tile: array<vec4f, ${keys * quads}>; // then the values
var<workgroup> weights: array<f32, ${rows * keys}>;
var<workgroup> meeting: array<f32, ${threads}>;`,
    main: `let tiles = (params.queries + ${rows - 1}u) / ${rows}u;
  let head = group / tiles;
  if (head >= params.heads) { return; }
  let first = (group % tiles) * ${rows}u;
  let r = lane / 4u;
  let part = lane % 4u;
  let query = first + r;
  for (var unit = lane; unit < ${rows}u * QUADS; unit += ${threads}u) {
    query_tile[unit] = load_q(head, params.queries, first + unit / QUADS, unit % QUADS);
  }
  ${each(mine, (c) => `var sum${c} = vec4f(0.0);`)}
  var largest = LOW;
  var total = 0.0;
  let end = select(params.keys, min(params.keys, first + ${rows}u), params.causal == 1u);
  for (var key0 = 0u; key0 < end; key0 += ${keys}u) {
    workgroupBarrier();
    for (var unit = lane; unit < ${keys}u * QUADS; unit += ${threads}u) {
      key_tile[unit] = load_k(head, params.keys, key0 + unit / QUADS, unit % QUADS);
    }
    workgroupBarrier();
    ${each(keys / 4, (j) => `var score${j} = 0.0;`)}
    for (var d = 0u; d < QUADS; d++) {
      let x = query_tile[r * QUADS + d];
      ${each(keys / 4, (j) => `score${j} += dot(x, key_tile[(part + ${4 * j}u) * QUADS + d]);`)}
    }
    ${each(keys / 4, (j) => `score${j} = masked_(score${j}, head, query, key0 + part + ${4 * j}u);`)}
    meeting[lane] = ${Array.from({ length: keys / 4 }, (_, j) => `score${j}`).reduce((a, b) => `max(${a}, ${b})`)};
    workgroupBarrier();
    let old = largest;
    largest = max(max(max(largest, meeting[r * 4u]), meeting[r * 4u + 1u]), max(meeting[r * 4u + 2u], meeting[r * 4u + 3u]));
    let factor = exp(old - largest);
    total *= factor;
    ${
      each(keys / 4, (j) =>
        `{ let w = select(exp(score${j} - largest), 0.0, score${j} <= LOW); total += w;
      weights[r * ${keys}u + part + ${4 * j}u] = w * kept_(head, query, key0 + part + ${4 * j}u); }`)
    }
    ${each(mine, (c) => `sum${c} *= factor;`)}
    for (var unit = lane; unit < ${keys}u * QUADS; unit += ${threads}u) {
      key_tile[unit] = load_v(head, params.keys, key0 + unit / QUADS, unit % QUADS);
    }
    workgroupBarrier();
    for (var j = 0u; j < ${keys}u; j++) {
      let w = weights[r * ${keys}u + j];
      ${each(mine, (c) => `sum${c} += w * key_tile[j * QUADS + part + ${4 * c}u];`)}
    }
  }
  workgroupBarrier();
  meeting[lane] = total;
  workgroupBarrier();
  total = meeting[r * 4u] + meeting[r * 4u + 1u] + meeting[r * 4u + 2u] + meeting[r * 4u + 3u];
  if (query >= params.queries) { return; }
  let scale = select(0.0, 1.0 / total, total > 0.0); // a query without keys gives 0
  if (part == 0u) { lse[head * params.queries + query] = select(0.0, largest + log(total), total > 0.0); }
  let base = (head * params.queries + query) * params.depth;
  ${
      each(mine, (c) =>
        `for (var i = 0u; i < 4u; i++) {
    let d = (part + ${4 * c}u) * 4u + i;
    if (d < params.depth) { o[base + d] = ${element}(sum${c}[i] * scale); }
  }`)
    }`,
  };
});

/** o and lse [heads, queries]. */
export function attention(element: Element, b: AttentionBuffers, s: AttentionSizes): void {
  const { q, k, v, o, lse } = b;
  forwardKernel(shapeKey(element, s, b)).run(
    { q, k, v, o, lse, ...present(b) },
    numbers(s),
    s.heads * Math.ceil(s.queries / 32),
  );
}

function numbers({ causal, ...s }: AttentionSizes): Record<string, number> {
  return { ...s, causal: causal ? 1 : 0 };
}

const deltaKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "attention delta",
  buffers: { o: `read ${element}`, dO: `read ${element}`, delta: "write f32" },
  params: { rows: "u32", depth: "u32" },
  main: `if (thread >= params.rows) { return; }
  var sum = 0.0;
  for (var d = thread * params.depth; d < (thread + 1u) * params.depth; d++) { sum += f32(o[d]) * f32(d_o[d]); }
  delta[thread] = sum;`,
}));

/**
 * One backward kernel: a tile of own rows (queries for dQ, keys for dK and dV) stays, tiles of the other side pass. With
 * w = exp(score − lse), the gradient of a score is w·(kept·dO·v − delta)·scale, delta = Σ dO·O.
 */
const backwardKernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [side, ...rest] = key.split(":"), shape = parseShape(rest[0]), { element, quads } = shape;
  const forQueries = side === "queries";
  const rows = 16, others = quads <= 16 ? 16 : 8, threads = rows * 4, mine = quads / 4;
  const tile = (name: string, count: number) => `var<workgroup> ${name}: array<vec4f, ${count * quads}>;`;
  const [own, other] = forQueries ? [["q", "d_o"], ["k", "v"]] : [["k", "v"], ["q", "d_o"]];
  const [ownRows, otherRows] = forQueries ? ["params.queries", "params.keys"] : ["params.keys", "params.queries"];
  const fill = (names: string[], tiles: string[], count: number, first: string, total: string) => `
    for (var unit = lane; unit < ${count}u * QUADS; unit += ${threads}u) {
      ${
    names.map((name, i) => `${tiles[i]}[unit] = load_${name}(head, ${total}, ${first} + unit / QUADS, unit % QUADS);`)
      .join(" ")
  }
    }`;
  const [query, keyOf] = forQueries ? ["(first + r)", "(start + j)"] : ["(start + j)", "(first + r)"];
  return {
    name: `attention backward (${side})`,
    buffers: {
      q: `read ${element}`,
      k: `read ${element}`,
      v: `read ${element}`,
      ...optional(shape),
      dO: `read ${element}`,
      lse: "read f32",
      delta: "read f32",
      ...forQueries
        ? { dQ: `write ${element}` as BufferType }
        : { dK: `write ${element}` as BufferType, dV: `write ${element}` as BufferType },
    },
    params: PARAMS,
    workgroup: threads,
    head: `${common(shape, ["q", "k", "v", "d_o"])}
${tile("own_a", rows)} ${tile("own_b", rows)} ${tile("other_a", others)} ${tile("other_b", others)}
var<workgroup> slopes: array<f32, ${rows * others}>;
${forQueries ? "" : `var<workgroup> weights: array<f32, ${rows * others}>;`}`,
    main: `let tiles = (${ownRows} + ${rows - 1}u) / ${rows}u;
  let head = group / tiles;
  if (head >= params.heads) { return; }
  let first = (group % tiles) * ${rows}u;
  let r = lane / 4u;
  let part = lane % 4u;
  ${fill(own, ["own_a", "own_b"], rows, "first", ownRows)}
  ${each(mine, (c) => `var a${c} = vec4f(0.0); ${forQueries ? "" : `var b${c} = vec4f(0.0);`}`)}
  ${
      forQueries
        ? `let begin = 0u; let end = select(params.keys, min(params.keys, first + ${rows}u), params.causal == 1u);`
        : `let begin = select(0u, first / ${others}u * ${others}u, params.causal == 1u); let end = params.queries;`
    }
  for (var start = begin; start < end; start += ${others}u) {
    workgroupBarrier();
    ${fill(other, ["other_a", "other_b"], others, "start", otherRows)}
    workgroupBarrier();
    for (var j = part; j < ${others}u; j += 4u) {
      var score = 0.0;
      var slope = 0.0;
      for (var d = 0u; d < QUADS; d++) {
        score += dot(own_a[r * QUADS + d], other_a[j * QUADS + d]);
        slope += dot(own_b[r * QUADS + d], other_b[j * QUADS + d]);
      }
      let query = ${query};
      let key = ${keyOf};
      let s = masked_(score, head, query, key);
      let at = head * params.queries + min(query, params.queries - 1u);
      let w = select(exp(s - lse[at]), 0.0, s <= LOW);
      let kept = kept_(head, query, key);
      slopes[r * ${others}u + j] = w * (kept * slope - delta[at]) * params.scale;
      ${forQueries ? "" : `weights[r * ${others}u + j] = w * kept;`}
    }
    workgroupBarrier();
    for (var j = 0u; j < ${others}u; j++) {
      let slope = slopes[r * ${others}u + j];
      ${each(mine, (c) => `a${c} += slope * other_a[j * QUADS + part + ${4 * c}u];`)}
      ${
      forQueries
        ? ""
        : `let w = weights[r * ${others}u + j]; ${
          each(mine, (c) => `b${c} += w * other_b[j * QUADS + part + ${4 * c}u];`)
        }`
    }
    }
  }
  if (first + r >= ${ownRows}) { return; }
  let base = (head * ${ownRows} + first + r) * params.depth;
  ${
      each(mine, (c) =>
        `for (var i = 0u; i < 4u; i++) {
    let d = (part + ${4 * c}u) * 4u + i;
    if (d < params.depth) { ${
          forQueries
            ? `d_q[base + d] = ${element}(a${c}[i]);`
            : `d_k[base + d] = ${element}(a${c}[i]); d_v[base + d] = ${element}(b${c}[i]);`
        } }
  }`)
    }`,
  };
});

/** Gradients of q, k and v from dO; `delta` [heads, queries] is scratch. */
export function attentionBackward(
  element: Element,
  b: AttentionBuffers,
  d: { dO: Memory; delta: Memory; dQ: Memory | null; dK: Memory | null; dV: Memory | null },
  s: AttentionSizes,
): void {
  const { q, k, v, o, lse } = b, { dO, delta, dQ, dK, dV } = d;
  const rows = s.heads * s.queries;
  deltaKernel(element).run({ o, dO, delta }, { rows, depth: s.depth }, Math.ceil(rows / 256));
  const inputs = { q, k, v, dO, lse, delta, ...present(b) }, key = shapeKey(element, s, b);
  if (dQ) backwardKernel(`queries:${key}`).run({ ...inputs, dQ }, numbers(s), s.heads * Math.ceil(s.queries / 16));
  if (dK && dV) backwardKernel(`keys:${key}`).run({ ...inputs, dK, dV }, numbers(s), s.heads * Math.ceil(s.keys / 16));
}
