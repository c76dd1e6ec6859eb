/**
 * Scaled dot-product attention without the T×S score matrix: O = softmax(scale·Q·Kᵀ + mask)·V. A workgroup keeps a tile of queries and loops over tiles of
 * keys, with a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). The forward pass keeps one number per query, the log-sum-exp `lse`, from
 * which the backward pass recomputes the weights. One backward kernel loops over the keys for dQ, another over the queries for dK and dV, so that every sum
 * has a fixed order and one writer.
 */
import {
  buffer,
  common,
  each,
  meet,
  meetings,
  optional,
  type Part,
  perRow,
  type Shape,
  stride,
  type Tiles,
  tiles,
} from "./attention_tiles.ts";
import { type Element, lanes, numbers } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { spans, u32s, variants } from "./gpu/kernel.ts";
import { type Key, type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { overrides } from "./gpu/tuning.ts";

/** The largest head that the kernels support: its tiles fit into workgroup memory. */
export const LONGEST_HEAD = 128;

/** Where the rows of a head are: the offset of the first element, and the strides from one batch, head of a batch, and row to the next, in elements. */
export interface Rows {
  offset: number;
  batch: number;
  head: number;
  row: number;
}

/** Sizes and options of one launch. */
export interface AttentionSizes {
  batches: number;
  /** Heads of a batch. */
  heads: number;
  queries: number;
  keys: number;
  depth: number;
  /** Where q (and dQ), k (and dK), v (and dV), o (and dO) are. k and v differ only in their offsets. */
  q: Rows;
  k: Rows;
  v: Rows;
  o: Rows;
  scale: number;
  causal: boolean;
  /** Elements from one head's mask to the next; 0 if all heads share one. */
  maskStride: number;
  /** The probability of dropping a weight, and the op's number in its tape. */
  dropout: number;
  op: number;
}

/** The memories of one launch. `state` is the random state if weights are dropped. q, k and v may be the same memory. */
export interface AttentionBuffers {
  q: Memory;
  k: Memory;
  v: Memory;
  mask: Memory | null;
  state: Memory | null;
  o: Memory;
  lse: Memory;
}

const quadsOf = (s: AttentionSizes) => Math.ceil(s.depth / 4);
/** Compilers for GPUs do not unroll loops, those for CPUs are slow on long bodies. */
const isUnrolled = () => overrides.unrolled ?? !gpu().info.isSoftware;

/**
 * The largest tiles that fit, for a kernel in which queries or keys stay, and `sides` kinds of the others pass through workgroup memory, of which a
 * multiprocessor of an H100 has 48 KiB. In the backward pass, which has two, they hold 64 features at a time. Tiles of queries have 64 rows if there are enough
 * of them to keep the GPU busy, although causal ones differ in length (8 heads of 4096×64: forward 0.72 ms instead of 0.94, dQ 1.21 instead of 1.34; 96 of
 * 256×64, of fewer groups, 64 and 107 µs instead of 61 and 93).
 */
function tilesFor(stays: "queries" | "keys", s: AttentionSizes, sides: 1 | 2): Tiles {
  const quads = quadsOf(s), part = sides === 1 ? quads : Math.min(16, quads);
  const { maxComputeWorkgroupStorageSize: most } = gpu().info.limits;
  const isLarge = isUnrolled() && stays === "queries" && quads <= 16 &&
    s.batches * s.heads * Math.ceil(s.queries / 64) >= 512;
  for (const [rows, others] of [...isLarge ? [[64, 32]] : [], [32, 32], [32, 16], [16, 16], [16, 8], [8, 8]]) {
    const vec4s = sides * others * stride(part) + rows * (others / 4 + 1) + rows * others / 16 + rows;
    if (16 * vec4s <= most) return { rows, others, part, high: rows < 64 && isUnrolled() ? 2 : 4 };
  }
  throw new RangeError(
    `scaledDotProductAttention: heads of ${s.depth} features need more than the ${most} bytes of workgroup memory of this device`,
  );
}

/**
 * Throws if the loop over so many rows, in tiles, is longer than what software drivers run: they would stop without a word. `copies`: in how many loops a tile
 * is copied; rows in parts are copied `again`. The others are those of `products` and, for each of the `sums`, of `gather`.
 */
function checkLength(
  what: "keys" | "queries",
  s: AttentionSizes,
  { rows, others, part }: Tiles,
  copies: 1 | 2,
  sums: 1 | 2,
): void {
  const count = s[what], quads = quadsOf(s), across = others / 4, threads = rows / 4 * across;
  const parts = Math.ceil(quads / part), again = parts === 1 ? 0 : others * quads / threads + 4 * parts;
  const turns = 2 + copies * (2 + others * quads / threads) + again + (parts + quads) + sums * parts * (1 + across);
  const most = spans(Math.ceil(count / others), turns)[0][1] * others;
  if (most >= count) return;
  throw new RangeError(
    `scaledDotProductAttention: a software adapter takes at most ${most} ${what} with heads of ${s.depth} features, got ${count}`,
  );
}

function shapeOf(element: Element, s: AttentionSizes, b: AttentionBuffers, tiles: Tiles): Shape {
  return {
    element,
    quads: quadsOf(s),
    wide: [s.q, s.k, s.v, s.o].every((r) => (r.offset | r.batch | r.head | r.row) % 4 === 0) && s.depth % 4 === 0,
    mask: b.mask !== null,
    dropout: s.dropout > 0,
    ...tiles,
    unrolled: isUnrolled(),
  };
}

// deno-fmt-ignore
const PARAMS = {
  ...u32s("batches", "heads", "queries", "keys", "depth", "qOffset", "qBatch", "qHead", "qRow", "kOffset", "kBatch", "kHead", "kRow", "vOffset"),
  ...u32s("oOffset", "oBatch", "oHead", "oRow"),
  scale: "f32",
  ...u32s("causal", "maskStride"),
  dropout: "f32",
  op: "u32",
} as const;

const forwardKernel = variants((shape: Shape) => {
  const { rows, others, high } = shape, t = tiles(shape, "queries"), V = perRow(high);
  const [k, v] = ["k", "v"].map((name) => t.copy([name], ["key_tile"]));
  return {
    name: "attention",
    buffers: {
      q: buffer("read", shape),
      k: buffer("read", shape),
      v: buffer("read", shape),
      ...optional(shape),
      o: buffer("write", shape),
      lse: "write f32",
    },
    params: PARAMS,
    workgroup: t.threads,
    head: `${common(shape, ["q", "k", "v"], { o: "o" })}
${t.declare("key_tile")} // the keys, then the values
${t.table}
${meetings(shape)}`,
    main: `${t.start(["q", "k", "v", "o"])}
  ${t.places(["q"])}
  ${t.sight}
  ${t.zero("sum")}
  var largest = ${V}(LOW); // of the thread's queries
  var total = ${V}(0.0);
  let end = select(params.keys, min(params.keys, first + ${rows}u), params.causal == 1u);
  ${k.declare} ${v.declare} ${k.fetch("0u")}
  for (var start = 0u; start < end; start += ${others}u) {
    workgroupBarrier();
    ${k.put("start")}
    workgroupBarrier();
    ${v.fetch("start")}
    ${t.products([["score", "q", "key_tile"]])}
    ${each(high, (i) => `score${i} = ${t.scaled("score", i)};`)}
    var highest = ${V}(${
      numbers(high).map((i) => `max(max(score${i}.x, score${i}.y), max(score${i}.z, score${i}.w))`).join(", ")
    });
    ${meet(shape, "highest", (a, b) => `max(${a}, ${b})`)}
    let old = largest;
    largest = max(largest, highest);
    let factor = exp(old - largest);
    total *= factor;
    ${
      each(high, (i) =>
        `{ let w = select(exp(score${i} - largest.${lanes[i]}), vec4f(0.0), score${i} <= vec4f(LOW));
      total.${lanes[i]} += (w.x + w.y) + (w.z + w.w);
      score${i} = w * ${t.factors(i)}; }`)
    }
    ${t.scale("sum", (i) => `factor.${lanes[i]}`)}
    ${v.put("start")}
    ${k.fetch(`start + ${others}u`)}
    ${t.gather([["sum", "score", "key_tile"]])}
  }
  ${meet(shape, "total", (a, b) => `${a} + ${b}`)}
  let some = total > ${V}(0.0); // a query without keys gives 0
  let scale = select(${V}(0.0), 1.0 / total, some);
  let logs = select(${V}(0.0), largest + log(total), some);
  ${t.storePerQuery("lse", "logs")}
  ${t.store("o", "sum", (i) => ` * scale.${lanes[i]}`)}`,
  };
});

const forward = remembered<Launch>(), ofQueries = remembered<Launch>(), ofKeys = remembered<Launch>();

/** All that a launch depends on. */
const keyOf = (element: Element, b: AttentionBuffers, s: AttentionSizes, packed: boolean): Key => {
  const { q, k, v, o } = s;
  // deno-fmt-ignore
  return [
    element, b.mask !== null, packed, s.batches, s.heads, s.queries, s.keys, s.depth, s.scale, s.causal, s.maskStride, s.dropout, s.op,
    q.offset, q.batch, q.head, q.row, k.offset, k.batch, k.head, k.row, v.offset, o.offset, o.batch, o.head, o.row,
  ];
};

/** Computes o and lse [batches, heads, queries]. */
export function attention(element: Element, b: AttentionBuffers, s: AttentionSizes): void {
  const launch = forward(keyOf(element, b, s, false), () => {
    const tiles = tilesFor("queries", s, 1);
    checkLength("keys", s, tiles, 2, 1);
    const groups = s.batches * s.heads * Math.ceil(s.queries / tiles.rows);
    return launchOf(forwardKernel(shapeOf(element, s, b, tiles)), parameters(s), groups);
  });
  runLaunch(launch, { ...b });
}

function parameters({ q, k, v, o, causal, ...s }: AttentionSizes): Record<string, number> {
  return {
    ...s,
    causal: causal ? 1 : 0,
    qOffset: q.offset,
    qBatch: q.batch,
    qHead: q.head,
    qRow: q.row,
    kOffset: k.offset,
    kBatch: k.batch,
    kHead: k.head,
    kRow: k.row,
    vOffset: v.offset,
    oOffset: o.offset,
    oBatch: o.batch,
    oHead: o.head,
    oRow: o.row,
  };
}

/**
 * A backward kernel: it keeps a tile of its own rows (queries for dQ, keys for dK and dV) and loops over tiles of the other side. With w = exp(score − lse),
 * the gradient of a score is w·(kept·dO·v − delta)·scale, where delta = Σ dO·O. The queries' kernel computes delta, the keys' kernel reads it.
 */
const backwardKernel = variants((shape: Shape & { stays: "queries" | "keys"; packed: boolean }) => {
  const { stays, packed, rows, others, high } = shape, t = tiles(shape, stays), forQueries = stays === "queries";
  const sides = [["q", "d_o"], ["k", "v"]], [ownNames, otherNames] = forQueries ? sides : sides.toReversed();
  const V = perRow(high), whole = t.parts.length === 1;
  const otherOf = (names: string[], part?: Part) => t.copy(names, ["other_a", "other_b"], part);
  const other = otherOf(otherNames);
  // rows in parts: tiles are filled where they are read, for the scores and, but for the last part, for the sums
  const filled = (copy: string) => `workgroupBarrier(); ${copy} workgroupBarrier();`;
  const forScores = whole ? undefined : (part: Part) => filled(otherOf(otherNames, part).now("start"));
  const summed = forQueries ? otherNames.slice(0, 1) : otherNames;
  const forSums = (part: Part) => filled(otherOf(summed, part).now("start"));
  const loads = ["q", "k", "v", "d_o", ...forQueries ? ["o"] : []];
  const stores: Record<string, string> = forQueries ? { d_q: "d_q" } : { d_k: "d_k", d_v: packed ? "d_k" : "d_v" };
  // a number for each of the queries from `query` on
  const perQuery = (name: string, query: string, count: number) =>
    `${perRow(count)}(${
      numbers(count).map((i) => `${name}[head * params.queries + min(${query} + ${i}u, params.queries - 1u)]`).join(
        ", ",
      )
    })`;
  const slope = (i: number) => {
    const q = forQueries ? `.${lanes[i]}` : "";
    return `{ let s = ${t.scaled("score", i)};
      let w = select(exp(s - lse4${q}), vec4f(0.0), s <= vec4f(LOW));
      let kept = ${t.factors(i)};
      score${i} = w * (kept * reach${i} - delta4${q}) * params.scale; // its slope
      reach${i} = w * kept; }`;
  };
  return {
    name: `attention backward (${forQueries ? "queries" : "keys"})`,
    buffers: {
      q: buffer("read", shape),
      k: buffer("read", shape),
      v: buffer("read", shape),
      ...optional(shape),
      dO: buffer("read", shape),
      lse: "read f32",
      ...forQueries
        ? { o: buffer("read", shape), delta: "write f32" as const, dQ: buffer("write", shape) }
        : { delta: "read f32" as const, dK: buffer("write", shape), ...packed ? {} : { dV: buffer("write", shape) } },
    },
    params: PARAMS,
    workgroup: t.threads,
    head: `${common(shape, loads, stores)}
${t.declare("other_a")} ${t.declare("other_b")}
${t.table} ${forQueries ? meetings(shape) : ""}`,
    main: `${t.start([...loads, ...Object.keys(stores)])}
  ${t.places(ownNames)}
  ${t.sight}
  ${t.zero("a")} ${forQueries ? "" : t.zero("b")}
  ${
      forQueries
        ? `var delta4 = ${V}(0.0);
  for (var d = c; d < QUADS; d += ${t.across}u) {
    ${
          each(high, (i) =>
            `delta4.${lanes[i]} += dot(load_d_o(base_d_o, ${t.row(i)}, d), load_o(base_o, ${t.row(i)}, d));`)
        }
  }
  ${
          meet(shape, "delta4", (a, b) => `${a} + ${b}`)
        }
  ${t.storePerQuery("delta", "delta4")}
  let lse4 = ${perQuery("lse", `first + r * ${high}u`, high)};
  let begin = 0u;
  let end = select(params.keys, min(params.keys, first + ${rows}u), params.causal == 1u);`
        : `let begin = select(0u, first / ${others}u * ${others}u, params.causal == 1u);
  let end = params.queries;`
    }
  ${whole ? `${other.declare} ${other.fetch("begin")}` : ""}
  for (var start = begin; start < end; start += ${others}u) {
    ${
      !whole ? "" : `workgroupBarrier();
    ${other.put("start")}
    workgroupBarrier();
    ${other.fetch(`start + ${others}u`)}`
    }
    ${
      forQueries
        ? ""
        : `let lse4 = ${perQuery("lse", "start + c * 4u", 4)}; let delta4 = ${perQuery("delta", "start + c * 4u", 4)};`
    }
    ${t.products([["score", ownNames[0], "other_a"], ["reach", ownNames[1], "other_b"]], forScores)}
    ${each(high, slope)}
    ${
      t.gather([
        ["a", "score", "other_a"],
        ...forQueries ? [] : [["b", "reach", "other_b"] as [string, string, string]],
      ], forSums)
    }
  }
  ${forQueries ? t.store("d_q", "a") : t.store("d_k", "a") + t.store("d_v", "b")}`,
  };
});

/** Gradients of q, k and v from dO; `delta` [batches, heads, queries] is scratch. dK and dV may be the same memory. */
export function attentionBackward(
  element: Element,
  b: AttentionBuffers,
  d: { dO: Memory; delta: Memory; dQ: Memory; dK: Memory | null; dV: Memory | null },
  s: AttentionSizes,
): void {
  const packed = d.dK === d.dV, key = keyOf(element, b, s, packed);
  const launch = (stays: "queries" | "keys") => {
    const tiles = tilesFor(stays, s, 2);
    if (stays === "queries") checkLength("keys", s, tiles, 1, 1);
    else checkLength("queries", s, tiles, 1, 2);
    const kernel = backwardKernel({ ...shapeOf(element, s, b, tiles), stays, packed: packed && stays === "keys" });
    const groups = s.batches * s.heads * Math.ceil(s[stays] / tiles.rows);
    return launchOf(kernel, parameters(s), groups);
  };
  // both before the first runs: one of them may throw
  const queries = ofQueries(key, () => launch("queries")), keys = d.dK && ofKeys(key, () => launch("keys"));
  const buffers = { ...b, ...d };
  runLaunch(queries, buffers);
  if (keys) runLaunch(keys, buffers);
}
