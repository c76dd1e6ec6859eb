/**
 * Scaled dot-product attention without the T×S score matrix: O = softmax(scale·Q·Kᵀ + mask)·V. A workgroup keeps a tile of queries and loops over tiles of
 * keys, with a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). The forward pass keeps one number per query, the log-sum-exp `lse`, from
 * which the backward pass recomputes the weights. One backward kernel loops over the keys for dQ, another over the queries for dK and dV, so that every sum
 * has a fixed order and one writer.
 *
 * A thread computes 2×4 or 4×4 scores of a tile. It holds two or four rows of the result, and of each row one vec4 in every few. The rows that stay are read
 * where they are, since the cache next to a multiprocessor holds them; those that pass are in workgroup memory, every thread's first row before every thread's
 * second one, and so on. A row there is an odd number of vec4s long, so that neighbouring threads read from different banks.
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
  /** Rows per thread. With more, it reads less; with fewer, more threads run concurrently. */
  high: 2 | 4;
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
  /** Whether loops are unrolled, up to four iterations at a time. */
  unrolled: boolean;
}

const quadsOf = (s: AttentionSizes) => Math.ceil(s.depth / 4);
const stride = (quads: number) => quads | 1;

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
// the scaled scores of queries and keys, LOW where a query does not see a key
fn scaled_(scores: vec4f, seen: vec4<bool>, head: u32, query: vec4u, key: vec4u) -> vec4f {
  ${
    mask
      ? `let at = head * params.mask_stride + query * params.keys + key;
  let s = scores * params.scale + ${vec4f((l) => `mask[at.${l}]`)};`
      : "let s = scores * params.scale;"
  }
  return select(vec4f(LOW), s, seen);
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
function tiles({ quads, part, wide, rows, others, unrolled, high }: Shape, stays: "queries" | "keys") {
  const across = others / 4, threads = rows / high * across, long = stride(part), mine = Math.ceil(quads / across);
  const parts = numbers(Math.ceil(quads / part)).map((i): Part => ({
    at: i * part,
    quads: Math.min(part, quads - i * part),
  }));
  // the numbers of the thread's rows among those that stay, and among those that pass
  const row = (i: number) => `first + r * ${high}u + ${i}u`, column = (j: number) => `start + c * 4u + ${j}u`;
  // a quad of the thread's rows, of which each is read by the threads of a row of the tile
  const mineOf = (name: string, i: number, quad: string) =>
    wide ? `vec4f(${name}[at_${name}${i} + ${quad}])` : `load_${name}(base_${name}, ${row(i)}, ${quad})`;
  const own = (i: number, at: string) => `(${i * rows / high}u + ${at})`,
    other = (j: string, at: string) => `(${j} * ${others / 4}u + ${at})`;
  const loop = (count: number, body: (at: string) => string) => {
    const step = !unrolled || count % 2 ? 1 : count % 4 ? 2 : 4;
    return `for (var at = 0u; at < ${count}u; at += ${step}u) { ${each(step, (i) => `{ ${body(`(at + ${i}u)`)} }`)} }`;
  };
  return {
    threads,
    across,
    parts,
    row,
    /** Where the thread's own rows begin; what lies beyond the last row is not used. */
    places: (names: string[]) =>
      !wide
        ? ""
        : names.map((name) =>
          each(high, (i) =>
            `let at_${name}${i} = base_${name} + min(${row(i)}, params.${stays} - 1u) * (params.${
              LAYOUT[name][1]
            }_row / 4u);`)
        ).join(" "),
    /** Which of the others each of the thread's rows sees, if it exists: `seen_count` ones from `seen_from` on. */
    sight: each(
      high,
      (i) =>
        stays === "queries"
          ? `let seen_from${i} = 0u; let seen_count${i} = select(params.keys, min(params.keys, ${
            row(i)
          } + 1u), params.causal == 1u);`
          : `let seen_from${i} = select(0u, min(params.queries, ${
            row(i)
          }), params.causal == 1u); let seen_count${i} = params.queries - seen_from${i};`,
    ),
    /** The thread's scores NAMEi, scaled and masked. */
    scaled: (name: string, i: number) => {
      const mine = `vec4u(${row(i)})`, others = `(start + c * 4u + vec4u(0u, 1u, 2u, 3u))`;
      const [query, key] = stays === "queries" ? [mine, others] : [others, mine];
      return `scaled_(${name}${i}, ${others} - seen_from${i} < vec4u(seen_count${i}), head, ${query}, ${key})`;
    },
    /** The factors of a row of the thread's weights. */
    factors: (i: number) =>
      vec4f((_, j) => `kept_(head, ${stays === "queries" ? `${row(i)}, ${column(j)}` : `${column(j)}, ${row(i)}`})`),
    declare: (name: string) => `var<workgroup> ${name}: array<array<vec4f, ${long}>, ${others}>;`,
    table: `var<workgroup> weights: array<vec4f, ${rows * (across + 1)}>;`,
    /**
     * Copies rows of the others, or a part of them, into tiles: `fetch(first)` starts reading the rows from `first` on, `put(first)` writes them to the tiles;
     * `now(first)` does both.
     */
    copy: (names: string[], to: string[], { at, quads }: Part = parts[0]) => {
      const load = (unit: string, n: number, first: string) =>
        `load_${names[n]}(base_${names[n]}, ${first} + ${unit} / ${quads}u, ${unit} % ${quads}u${
          at ? ` + ${at}u` : ""
        })`;
      const store = (unit: string, n: number, x: string) =>
        `${to[n]}[${other(`${unit} / ${quads}u % 4u`, `${unit} / ${quads}u / 4u`)}][${unit} % ${quads}u] = ${x};`;
      const rounds = others * quads / threads, unit = (i: number) => `(lane + ${threads * i}u)`;
      const all = (text: (i: number, n: number, x: string) => string) =>
        each(rounds, (i) => each(names.length, (n) => text(i, n, `next_${names[n]}${i}`)));
      // if registers can hold them all, they are read while something else is computed
      const isAhead = unrolled && Number.isInteger(rounds) && rounds * names.length <= 16;
      const declare = isAhead ? all((_i, _n, x) => `var ${x}: vec4f;`) : "";
      const fetch = (first: string) => isAhead ? all((i, n, x) => `${x} = ${load(unit(i), n, first)};`) : "";
      const put = (first: string) =>
        isAhead
          ? all((i, n, x) => store(unit(i), n, x))
          : `for (var unit = lane; unit < ${others * quads}u; unit += ${threads}u) { ${
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
                `{ ${each(4, (j) => `let y${j} = ${b}[${other(`${j}u`, "c")}][${d}];`)}
        ${
                  each(high, (i) =>
                    `{ let x = ${mineOf(a, i, part.at ? `${d} + ${part.at}u` : d)}; ${
                      lanes.map((l) => `${name}${i} += x.${l} * vec4f(y0.${l}, y1.${l}, y2.${l}, y3.${l});`).join(" ")
                    } }`)
                } }`
              ).join("\n      "))
          }`
        ).join("\n    ")
      }`,
    /**
     * For each [NAME, X, TILE] adds to the thread's rows NAMEi_m the sums over the other rows of Xi, which becomes a row of the table of weights, times TILE:
     * first within the tile, so that roundings do not grow with the length. The tiles have the last part of the rows; `before` is code that fills them with
     * another.
     */
    gather: (of: [string, string, string][], before: (part: Part) => string = () => "") => {
      let inTable = "";
      const fill = (x: string) => {
        if (inTable === x) return "";
        const wait = inTable ? "workgroupBarrier();" : "";
        inTable = x;
        return `${wait} ${
          each(high, (i) => `weights[${own(i, "r")} * ${across + 1}u + c] = ${x}${i};`)
        } workgroupBarrier();`;
      };
      return parts.toReversed().map((part, p) => {
        const ms = numbers(Math.ceil(part.quads / across)).map((m) => part.at / across + m);
        const rows = (text: (i: number, m: number) => string) => each(high, (i) => ms.map((m) => text(i, m)).join(" "));
        return `${p === 0 ? "" : before(part)}
    ${
          (p % 2 ? of.toReversed() : of).map(([name, x, tile]) =>
            `${fill(x)}
    { ${rows((i, m) => `var of_${name}${i}_${m} = vec4f(0.0);`)}
    ${
              loop(across, (k) =>
                `{ ${each(high, (i) => `let w${i} = weights[${own(i, "r")} * ${across + 1}u + ${k}];`)}
        ${
                  numbers(4).map((j) =>
                    ms.map((m, n) =>
                      `{ let y = ${tile}[${other(`${j}u`, k)}][min(c + ${across * n}u, ${part.quads - 1}u)]; ${
                        each(high, (i) => `of_${name}${i}_${m} += w${i}.${lanes[j]} * y;`)
                      } }`
                    ).join(" ")
                  ).join("\n        ")
                } }`)
            }
    ${rows((i, m) => `${name}${i}_${m} += of_${name}${i}_${m};`)} }`
          ).join("\n    ")
        }`;
      }).join("\n    ");
    },
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
    start: (names: string[]) =>
      `let tiles = (params.${stays} + ${rows - 1}u) / ${rows}u;
  let all_heads = params.batches * params.heads;
  let head = group % all_heads; // of all batches
  let tile = group / all_heads;
  if (tile >= tiles) { return; }
  let first = ${stays === "queries" ? "(tiles - 1u - tile)" : "tile"} * ${rows}u;
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
