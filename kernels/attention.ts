/**
 * Scaled dot-product attention without the T×S score matrix: O = softmax(scale·Q·Kᵀ + mask)·V. A workgroup keeps a tile of queries and loops over tiles of
 * keys, with a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). The forward pass keeps one number per query, the log-sum-exp `lse`, from
 * which the backward pass recomputes the weights. One backward kernel loops over the keys for dQ, another over the queries for dK and dV, so that every sum
 * has a fixed order and one writer.
 *
 * A thread computes 2×4 or 4×4 scores of a tile. It holds two or four rows of the result, and of each row one vec4 in every few. Tiles are in workgroup
 * memory row by row: first every thread's first row, then every thread's second one, and so on. A row is an odd number of vec4s long, so that neighbouring
 * threads read from different banks.
 */
import { type Element, lanes, numbers, vec4f, vectorOf } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { type BufferType, spans, u32s, variants } from "./gpu/kernel.ts";
import { type Key, type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { overrides } from "./gpu/tuning.ts";
import { PCG4D } from "./random.ts";

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

/** The tiles of a kernel. */
interface Tiles {
  /** Rows of the tile that a workgroup keeps, and of the tiles that it loops over. */
  rows: number;
  others: number;
  /** The vec4s of a row that they hold at a time. */
  part: number;
}

/** Compile-time choices. */
interface Shape extends Tiles {
  element: Element;
  /** vec4s in a row. */
  quads: number;
  /** Whether memory is read and written as whole vec4s. */
  wide: boolean;
  mask: boolean;
  dropout: boolean;
  /** Whether loops are unrolled, up to four iterations at a time: compilers for GPUs do not unroll them, those for CPUs are slow on long bodies. */
  unrolled: boolean;
  /**
   * Rows per thread. A multiprocessor of an H100 has 48 KiB of workgroup memory, and one group with heads of 64 takes all of it, so that a group should have
   * many threads: the backward pass of 96 heads of 256×256 takes 0.23 ms with 128 threads of two rows, 0.40 with 64 threads of four.
   */
  high: 2 | 4;
}

const quadsOf = (s: AttentionSizes) => Math.ceil(s.depth / 4);
const stride = (quads: number) => quads | 1;

/**
 * The largest tiles that fit, with `sides` tiles of each kind and `tables` tables of scores in workgroup memory. In the backward pass, which has two sides,
 * they hold 64 features at a time: of 8 heads of 4096×128 it takes an H100 14.5 ms, with whole rows in tiles a quarter as large 90.
 */
function tilesFor(quads: number, sides: number, tables: number): Tiles {
  const { maxComputeWorkgroupStorageSize: most } = gpu().info.limits, part = sides === 1 ? quads : Math.min(16, quads);
  for (const [rows, others] of [[32, 32], [32, 16], [16, 16], [16, 8], [8, 8]]) {
    const vec4s = sides * (rows + others) * stride(part) + tables * rows * (others / 4 + 1) + rows * others / 16 + rows;
    if (16 * vec4s <= most) return { rows, others, part };
  }
  throw new RangeError(
    `scaledDotProductAttention: heads of ${
      4 * quads
    } features need more than the ${most} bytes of workgroup memory of this device`,
  );
}

/**
 * Throws if the loop over so many rows, in tiles, is longer than what software drivers run: they would stop without a word. `copies`: in how many loops a tile
 * is copied; rows in parts are copied `again`. Two others are those of `products` and `gather`.
 */
function checkLength(
  what: "keys" | "queries",
  s: AttentionSizes,
  { rows, others, part }: Tiles,
  copies: 1 | 2,
): void {
  const count = s[what], quads = quadsOf(s), across = others / 4, threads = rows / 4 * across;
  const parts = Math.ceil(quads / part), again = parts === 1 ? 0 : (rows + others) * quads / threads + 6 * parts;
  const turns = 2 + copies * (2 + others * quads / threads) + again + (parts + quads) + parts * (1 + across);
  const most = spans(Math.ceil(count / others), turns)[0][1] * others;
  if (most >= count) return;
  throw new RangeError(
    `scaledDotProductAttention: a software adapter takes at most ${most} ${what} with heads of ${s.depth} features, got ${count}`,
  );
}

function shapeOf(element: Element, s: AttentionSizes, b: AttentionBuffers, tiles: Tiles): Shape {
  const unrolled = overrides.unrolled ?? !gpu().info.isSoftware;
  return {
    element,
    quads: quadsOf(s),
    wide: [s.q, s.k, s.v, s.o].every((r) => (r.offset | r.batch | r.head | r.row) % 4 === 0) && s.depth % 4 === 0,
    mask: b.mask !== null,
    dropout: s.dropout > 0,
    ...tiles,
    unrolled,
    high: unrolled ? 2 : 4,
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

const each = (n: number, text: (i: number) => string) => numbers(n).map(text).join(" ");
// for each array: whether its rows are queries or keys, whose strides it has, and whose offset
const LAYOUT: Record<string, ["queries" | "keys", "q" | "k" | "o", "q" | "k" | "v" | "o"]> = {
  q: ["queries", "q", "q"],
  d_q: ["queries", "q", "q"],
  k: ["keys", "k", "k"],
  d_k: ["keys", "k", "k"],
  v: ["keys", "k", "v"],
  d_v: ["keys", "k", "v"],
  o: ["queries", "o", "o"],
  d_o: ["queries", "o", "o"],
};

/** Functions that the kernels share: `load_NAME` and `store_NAME` of a quad of a row (0 outside), the mask, dropout. */
function common(
  { element, quads, wide, mask, dropout }: Shape,
  loads: string[],
  stores: Record<string, string>,
): string {
  const at = (name: string) => `base + row * (params.${LAYOUT[name][1]}_row${wide ? " / 4u) + quad" : ") + quad * 4u"}`;
  return `const QUADS = ${quads}u;
const LOW = -3.4e38;
${
    loads.map((name) => `
fn load_${name}(base: u32, wanted: u32, quad: u32) -> vec4f {
  let row = min(wanted, params.${LAYOUT[name][0]} - 1u);
  let at = ${at(name)};
  ${
      wide
        ? `let x = vec4f(${name}[at]); let inside = vec4<bool>(row == wanted);`
        : `let left = params.depth - quad * 4u;
  let x = ${vec4f((_, j) => `f32(${name}[at + min(${j}u, left - 1u)])`)};
  let inside = vec4<bool>(row == wanted) & (vec4u(0u, 1u, 2u, 3u) < vec4u(left));`
    }
  return select(vec4f(0.0), x, inside);
}`).join("")
  }
${
    Object.entries(stores).map(([name, buffer]) => `
fn store_${name}(base: u32, row: u32, quad: u32, x: vec4f) {
  if (row >= params.${LAYOUT[name][0]} || quad >= QUADS) { return; }
  let at = ${at(name)};
  ${
      wide
        ? `${buffer}[at] = ${vectorOf[element]}(x);`
        : lanes.map((l, j) => `if (quad * 4u + ${j}u < params.depth) { ${buffer}[at + ${j}u] = ${element}(x.${l}); }`)
          .join(" ")
    }
}`).join("")
  }
// the scaled score of a query and a key, LOW if it is masked; keeps NaN
fn masked_(score: f32, head: u32, query: u32, key: u32) -> f32 {
  if (query >= params.queries || key >= params.keys || (params.causal == 1u && key > query)) { return LOW; }
  let s = score * params.scale${mask ? " + mask[head * params.mask_stride + query * params.keys + key]" : ""};
  return select(max(LOW, s), s, (bitcast<u32>(s) & 0x7fffffffu) > 0x7f800000u);
}
${
    dropout
      ? `${PCG4D}
// the factor of a weight: 0 or 1/(1 − p)
fn kept_(head: u32, query: u32, key: u32) -> f32 {
  let bits = pcg4d(vec4u(query * params.keys + key, params.op, state[0] ^ (head * 2654435769u), state[1])); // an odd factor: every head has its own seed
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

const buffer = (access: "read" | "write", { element, wide }: Shape): BufferType =>
  `${access} ${wide ? vectorOf[element] : element}`;

/**
 * Pieces of WGSL for a tile of `rows` rows that stays and tiles of `others` rows that pass; a thread has the `high` rows from high·r on and the others 4c …
 * 4c + 3.
 */
function tiles({ quads, part, wide, rows, others, unrolled, high }: Shape) {
  const across = others / 4, threads = rows / high * across, long = stride(part), mine = Math.ceil(quads / across);
  const parts = numbers(Math.ceil(quads / part)).map((i): Part => ({
    at: i * part,
    quads: Math.min(part, quads - i * part),
  }));
  const row = (i: number) => `first + r * ${high}u + ${i}u`, column = (j: number) => `start + c * 4u + ${j}u`;
  const own = (i: number, at: string) => `(${i * rows / high}u + ${at})`,
    other = (j: number, at: string) => `(${j * others / 4}u + ${at})`;
  const loop = (count: number, body: (at: string) => string) => {
    const step = !unrolled || count % 2 ? 1 : count % 4 ? 2 : 4;
    return `for (var at = 0u; at < ${count}u; at += ${step}u) { ${each(step, (i) => `{ ${body(`(at + ${i}u)`)} }`)} }`;
  };
  return {
    threads,
    across,
    parts,
    /** The numbers of the thread's rows in the tile that stays, and in the one that passes. */
    row,
    column,
    declare: (name: string, count: number) => `var<workgroup> ${name}: array<array<vec4f, ${long}>, ${count}>;`,
    table: (name: string) => `var<workgroup> ${name}: array<vec4f, ${rows * (across + 1)}>;`,
    /**
     * Copies rows, or a part of them, of which a thread has `together` neighbours, into tiles: `fetch(first)` starts reading the rows from `first` on,
     * `put(first)` writes them to the tiles; `now(first)` does both.
     */
    copy: (names: string[], to: string[], count: number, together: number, { at, quads }: Part = parts[0]) => {
      const load = (unit: string, n: number, first: string) =>
        `load_${names[n]}(base_${names[n]}, ${first} + ${unit} / ${quads}u, ${unit} % ${quads}u${
          at ? ` + ${at}u` : ""
        })`;
      const store = (unit: string, n: number, x: string) =>
        `${to[n]}[${unit} / ${quads}u % ${together}u * ${
          count / together
        }u + ${unit} / ${quads}u / ${together}u][${unit} % ${quads}u] = ${x};`;
      const rounds = count * quads / threads, unit = (i: number) => `(lane + ${threads * i}u)`;
      const all = (text: (i: number, n: number, x: string) => string) =>
        each(rounds, (i) => each(names.length, (n) => text(i, n, `next_${names[n]}${i}`)));
      // if registers can hold them all, they are read while something else is computed
      const isAhead = unrolled && Number.isInteger(rounds) && rounds * names.length <= 16;
      const declare = isAhead ? all((_i, _n, x) => `var ${x}: vec4f;`) : "";
      const fetch = (first: string) => isAhead ? all((i, n, x) => `${x} = ${load(unit(i), n, first)};`) : "";
      const put = (first: string) =>
        isAhead
          ? all((i, n, x) => store(unit(i), n, x))
          : `for (var unit = lane; unit < ${count * quads}u; unit += ${threads}u) { ${
            each(names.length, (n) => store("unit", n, load("unit", n, first)))
          } }`;
      return { declare, fetch, put, now: (first: string) => `{ ${declare} ${fetch(first)} ${put(first)} }` };
    },
    /**
     * Defines NAME0, NAME1, …: for each of the thread's rows in one tile, its products with the thread's four rows in another. `before` is code that fills
     * the tiles with a part of the rows.
     */
    products: (of: [string, string, string][], before: (part: Part) => string = () => "") =>
      `${of.map(([name]) => each(high, (i) => `var ${name}${i} = vec4f(0.0);`)).join(" ")}
    ${
        parts.map((part) =>
          `${before(part)}
    ${
            loop(part.quads, (d) =>
              of.map(([name, a, b]) =>
                `{ ${each(4, (j) => `let y${j} = ${b}[${other(j, "c")}][${d}];`)}
        ${
                  each(high, (i) =>
                    `{ let x = ${a}[${own(i, "r")}][${d}]; ${
                      lanes.map((l) => `${name}${i} += x.${l} * vec4f(y0.${l}, y1.${l}, y2.${l}, y3.${l});`).join(" ")
                    } }`)
                } }`
              ).join("\n      "))
          }`
        ).join("\n    ")
      }`,
    put: (table: string, i: number, x: string) => `${table}[${own(i, "r")} * ${across + 1}u + c] = ${x};`,
    /**
     * Adds the sum of table·tile over the other rows to the thread's rows NAMEi_m: first within the tile, so that roundings do not grow with the length. The
     * tiles have the last part of the rows; `before` is code that fills them with another.
     */
    gather: (of: [string, string, string][], before: (part: Part) => string = () => "") =>
      parts.toReversed().map((part, p) => {
        const ms = numbers(Math.ceil(part.quads / across)).map((m) => part.at / across + m);
        return `${p === 0 ? "" : before(part)}
    { ${
          of.map(([name]) => each(high, (i) => ms.map((m) => `var of_${name}${i}_${m} = vec4f(0.0);`).join(" "))).join(
            " ",
          )
        }
    ${
          loop(
            across,
            (k) =>
              of.map(([name, table, tile]) =>
                `{ ${each(high, (i) => `let w${i} = ${table}[${own(i, "r")} * ${across + 1}u + ${k}];`)}
        ${
                  numbers(4).map((j) =>
                    ms.map((m, n) =>
                      `{ let y = ${tile}[${other(j, k)}][min(c + ${across * n}u, ${part.quads - 1}u)]; ${
                        each(high, (i) => `of_${name}${i}_${m} += w${i}.${lanes[j]} * y;`)
                      } }`
                    ).join(" ")
                  ).join("\n        ")
                } }`
              ).join("\n      "),
          )
        }
    ${
          of.map(([name]) => each(high, (i) => ms.map((m) => `${name}${i}_${m} += of_${name}${i}_${m};`).join(" ")))
            .join(" ")
        } }`;
      }).join("\n    "),
    zero: (name: string) => each(high, (i) => each(mine, (m) => `var ${name}${i}_${m} = vec4f(0.0);`)),
    scale: (name: string, factor: (i: number) => string) =>
      each(high, (i) => each(mine, (m) => `${name}${i}_${m} *= ${factor(i)};`)),
    store: (name: string, sums: string, factor: (i: number) => string = () => "") =>
      each(
        high,
        (i) =>
          each(
            mine,
            (m) => `store_${name}(base_${name}, ${row(i)}, c + ${across * m}u, ${sums}${i}_${m}${factor(i)});`,
          ),
      ),
    /** Writes a number of each of the thread's rows, which are queries; one of the threads that share them does. */
    storePerQuery: (to: string, x: string) =>
      `if (c == 0u) {
    ${
        each(
          high,
          (i) => `if (${row(i)} < params.queries) { ${to}[head * params.queries + ${row(i)}] = ${x}.${lanes[i]}; }`,
        )
      }
  }`,
    /** Determines a workgroup's head and rows. Those with the most work come first: with a causal mask the last queries and the first keys. */
    start: (total: "queries" | "keys", names: string[]) =>
      `let tiles = (params.${total} + ${rows - 1}u) / ${rows}u;
  let all_heads = params.batches * params.heads;
  let head = group % all_heads; // of all batches
  let tile = group / all_heads;
  if (tile >= tiles) { return; }
  let first = ${total === "queries" ? "(tiles - 1u - tile)" : "tile"} * ${rows}u;
  ${
        names.map((name) => {
          const [, s, offset] = LAYOUT[name];
          return `let base_${name} = (params.${offset}_offset + head / params.heads * params.${s}_batch + head % params.heads * params.${s}_head)${
            wide ? " / 4u" : ""
          };`;
        }).join("\n  ")
      }
  let r = lane / ${across}u;
  let c = lane % ${across}u;`,
  };
}

/** So many vec4s of a row, from one on, which tiles hold at a time. */
interface Part {
  at: number;
  quads: number;
}

/** Combines `x`, which has a number for each of a thread's rows, over the threads that share the rows. */
const meet = ({ rows, others, high }: Shape, x: string, join: (a: string, b: string) => string) =>
  `workgroupBarrier();
    meeting[c * ${rows / high}u + r] = ${x};
    workgroupBarrier();
    ${x} = ${numbers(others / 4).map((i) => `meeting[${i * rows / high}u + r]`).reduce(join)};`;

/** The type of one number for each row of a thread. */
const perRow = (high: number) => high === 4 ? "vec4f" : "vec2f";
const meetings = ({ rows, others, high }: Shape) =>
  `var<workgroup> meeting: array<${perRow(high)}, ${rows / high * others / 4}>;`;

const forwardKernel = variants((shape: Shape) => {
  const { rows, others, high } = shape, t = tiles(shape), V = perRow(high);
  const [k, v] = ["k", "v"].map((name) => t.copy([name], ["key_tile"], others, 4));
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
${t.declare("query_tile", rows)} ${t.declare("key_tile", others)} // the keys, then the values
${t.table("weights")}
${meetings(shape)}`,
    main: `${t.start("queries", ["q", "k", "v", "o"])}
  ${t.copy(["q"], ["query_tile"], rows, high).now("first")}
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
    ${t.products([["score", "query_tile", "key_tile"]])}
    ${
      each(high, (i) =>
        `score${i} = ${vec4f((l, j) => `masked_(score${i}.${l}, head, ${t.row(i)}, ${t.column(j)})`)};`)
    }
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
      ${t.put("weights", i, `w * ${vec4f((_, j) => `kept_(head, ${t.row(i)}, ${t.column(j)})`)}`)}
      }`)
    }
    ${t.scale("sum", (i) => `factor.${lanes[i]}`)}
    ${v.put("start")}
    ${k.fetch(`start + ${others}u`)}
    workgroupBarrier();
    ${t.gather([["sum", "weights", "key_tile"]])}
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
    const tiles = tilesFor(quadsOf(s), 1, 1);
    checkLength("keys", s, tiles, 2);
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
const backwardKernel = variants((shape: Shape & { forQueries: boolean; packed: boolean }) => {
  const { forQueries, packed, rows, others, high } = shape, t = tiles(shape);
  const sides = [["q", "d_o"], ["k", "v"]], [ownNames, otherNames] = forQueries ? sides : sides.toReversed();
  const V = perRow(high), whole = t.parts.length === 1;
  const ownOf = (part?: Part) => t.copy(ownNames, ["own_a", "own_b"], rows, high, part);
  const otherOf = (names: string[], part?: Part) => t.copy(names, ["other_a", "other_b"], others, 4, part);
  const other = otherOf(otherNames);
  // rows in parts: tiles are filled where they are read, for the scores and, but for the last part, for the sums
  const filled = (...copies: string[]) => `workgroupBarrier(); ${copies.join(" ")} workgroupBarrier();`;
  const forScores = whole
    ? undefined
    : (part: Part) => filled(ownOf(part).now("first"), otherOf(otherNames, part).now("start"));
  const summed = forQueries ? otherNames.slice(0, 1) : otherNames;
  const forSums = (part: Part) => filled(otherOf(summed, part).now("start"));
  const loads = ["q", "k", "v", "d_o", ...forQueries ? ["o"] : []];
  const stores: Record<string, string> = forQueries ? { d_q: "d_q" } : { d_k: "d_k", d_v: packed ? "d_k" : "d_v" };
  // the query and the key of a score
  const at = (i: number, j: number) => forQueries ? `${t.row(i)}, ${t.column(j)}` : `${t.column(j)}, ${t.row(i)}`;
  // a number for each of the queries from `query` on
  const perQuery = (name: string, query: string, count: number) =>
    `${perRow(count)}(${
      numbers(count).map((i) => `${name}[head * params.queries + min(${query} + ${i}u, params.queries - 1u)]`).join(
        ", ",
      )
    })`;
  const slope = (i: number) => {
    const q = forQueries ? `.${lanes[i]}` : "";
    return `{ let s = ${vec4f((l, j) => `masked_(score${i}.${l}, head, ${at(i, j)})`)};
      let w = select(exp(s - lse4${q}), vec4f(0.0), s <= vec4f(LOW));
      let kept = ${vec4f((_, j) => `kept_(head, ${at(i, j)})`)};
      ${t.put("slopes", i, `w * (kept * reach${i} - delta4${q}) * params.scale`)}
      ${forQueries ? "" : t.put("weights", i, "w * kept")} }`;
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
${t.declare("own_a", rows)} ${t.declare("own_b", rows)} ${t.declare("other_a", others)} ${t.declare("other_b", others)}
${t.table("slopes")} ${forQueries ? meetings(shape) : t.table("weights")}`,
    main: `${t.start(forQueries ? "queries" : "keys", [...loads, ...Object.keys(stores)])}
  ${whole ? ownOf().now("first") : ""}
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
    ${t.products([["score", "own_a", "other_a"], ["reach", "own_b", "other_b"]], forScores)}
    ${each(high, slope)}
    workgroupBarrier();
    ${
      t.gather([
        ["a", "slopes", "other_a"],
        ...forQueries ? [] : [["b", "weights", "other_b"] as [string, string, string]],
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
  const launch = (forQueries: boolean) => {
    const tiles = tilesFor(quadsOf(s), 2, forQueries ? 1 : 2);
    checkLength(forQueries ? "keys" : "queries", s, tiles, 1);
    const kernel = backwardKernel({ ...shapeOf(element, s, b, tiles), forQueries, packed: packed && !forQueries });
    const groups = s.batches * s.heads * Math.ceil((forQueries ? s.queries : s.keys) / tiles.rows);
    return launchOf(kernel, parameters(s), groups);
  };
  // both before the first runs: one of them may throw
  const queries = ofQueries(key, () => launch(true)), keys = d.dK && ofKeys(key, () => launch(false));
  const buffers = { ...b, ...d };
  runLaunch(queries, buffers);
  if (keys) runLaunch(keys, buffers);
}
