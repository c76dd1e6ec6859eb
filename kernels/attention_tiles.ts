/**
 * The pieces of WGSL that attention's kernels share: tiles of rows that stay and of rows that pass, their products, and their sums.
 *
 * A thread computes 2×4 or 4×4 scores of a tile. It holds two or four rows of the result, and of each row one vec4 in every few. The rows that stay are read
 * where they are, since the cache next to a multiprocessor holds them; those that pass are in workgroup memory, every thread's first row before every thread's
 * second one, and so on. A row there is an odd number of vec4s long, so that neighbouring threads read from different banks.
 */
import { type Element, lanes, numbers, vec4f, vectorOf } from "./elementwise.ts";
import type { BufferType } from "./gpu/kernel.ts";
import { PCG4D } from "./random.ts";

/** The tiles of a kernel. */
export interface Tiles {
  /** Rows of the tile that a workgroup keeps, and of the tiles that it loops over. */
  rows: number;
  others: number;
  /** The vec4s of a row that they hold at a time. */
  part: number;
  /** Rows per thread. With more, it reads less; with fewer, more threads run concurrently. */
  high: 2 | 4;
}

/** Compile-time choices. */
export interface Shape extends Tiles {
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

/** So many vec4s of a row, from one on, which tiles hold at a time. */
export interface Part {
  at: number;
  quads: number;
}

export const stride = (quads: number): number => quads | 1;

/** The texts for 0 to n − 1. */
export const each = (n: number, text: (i: number) => string): string => numbers(n).map(text).join(" ");
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
export function common(
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
export const optional = ({ mask, dropout }: Shape): Record<string, BufferType> => ({
  ...mask ? { mask: "read f32" } : {},
  ...dropout ? { state: "read u32" } : {},
});

export const buffer = (access: "read" | "write", { element, wide }: Shape): BufferType =>
  `${access} ${wide ? vectorOf[element] : element}`;

/** The pieces of a kernel. NAMEi is a value of the thread's row i, NAMEi_m the m-th vec4 of the result that it holds of that row. */
export interface TileCode {
  threads: number;
  /** Threads that share a row. */
  across: number;
  parts: Part[];
  /** The number of the thread's row i among those that stay. */
  row: (i: number) => string;
  /** Determines a workgroup's head and rows. Those with the most work come first: with a causal mask the last queries and the first keys. */
  start: (names: string[]) => string;
  /** Where the thread's own rows begin; what lies beyond the last row is not used. */
  places: (names: string[]) => string;
  /** Which of the others each of the thread's rows sees, if it exists: `seen_count` ones from `seen_from` on. */
  sight: string;
  /** Declares a tile of the others. */
  declare: (name: string) => string;
  /** Declares the table of weights. */
  table: string;
  /**
   * Copies rows of the others, or a part of them, into tiles: `fetch(first)` starts reading the rows from `first` on, into what `declare` declares, and
   * `put(first)` writes them to the tiles; `now(first)` does both.
   */
  copy: (names: string[], to: string[], part?: Part) => {
    declare: string;
    fetch: (first: string) => string;
    put: (first: string) => string;
    now: (first: string) => string;
  };
  /**
   * For each [NAME, X, TILE] defines NAMEi: the products of the thread's row i of X with its four rows in TILE. `before` is code that fills the tiles with a
   * part of the rows.
   */
  products: (of: [string, string, string][], before?: (part: Part) => string) => string;
  /** The thread's scores NAMEi, scaled and masked. */
  scaled: (name: string, i: number) => string;
  /** The factors of a row of the thread's weights. */
  factors: (i: number) => string;
  /**
   * For each [NAME, X, TILE] adds to NAMEi_m the sums over the other rows of Xi, which becomes a row of the table of weights, times TILE: first within the tile,
   * so that roundings do not grow with the length. The tiles have the last part of the rows; `before` is code that fills them with another.
   */
  gather: (of: [string, string, string][], before?: (part: Part) => string) => string;
  zero: (name: string) => string;
  scale: (name: string, factor: (i: number) => string) => string;
  store: (name: string, sums: string, factor?: (i: number) => string) => string;
  /** Writes a number of each of the thread's rows, which are queries; one of the threads that share them does. */
  storePerQuery: (to: string, x: string) => string;
}

/**
 * Pieces of WGSL for a tile of `rows` rows that stays and tiles of `others` rows that pass; a thread has the `high` rows from high·r on and the others 4c …
 * 4c + 3.
 */
export function tiles(
  { quads, part, wide, rows, others, unrolled, high }: Shape,
  stays: "queries" | "keys",
): TileCode {
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
    places: (names: string[]) =>
      !wide
        ? ""
        : names.map((name) =>
          each(high, (i) =>
            `let at_${name}${i} = base_${name} + min(${row(i)}, params.${stays} - 1u) * (params.${
              LAYOUT[name][1]
            }_row / 4u);`)
        ).join(" "),
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
    scaled: (name: string, i: number) => {
      const mine = `vec4u(${row(i)})`, others = `(start + c * 4u + vec4u(0u, 1u, 2u, 3u))`;
      const [query, key] = stays === "queries" ? [mine, others] : [others, mine];
      return `scaled_(${name}${i}, ${others} - seen_from${i} < vec4u(seen_count${i}), head, ${query}, ${key})`;
    },
    factors: (i: number) =>
      vec4f((_, j) => `kept_(head, ${stays === "queries" ? `${row(i)}, ${column(j)}` : `${column(j)}, ${row(i)}`})`),
    declare: (name: string) => `var<workgroup> ${name}: array<array<vec4f, ${long}>, ${others}>;`,
    table: `var<workgroup> weights: array<vec4f, ${rows * (across + 1)}>;`,
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
    storePerQuery: (to: string, x: string) =>
      `if (c == 0u) {
    ${
        each(
          high,
          (i) => `if (${row(i)} < params.queries) { ${to}[head * params.queries + ${row(i)}] = ${x}.${lanes[i]}; }`,
        )
      }
  }`,
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

/** Combines `x`, which has a number for each of a thread's rows, over the threads that share the rows. */
export const meet = ({ rows, others, high }: Shape, x: string, join: (a: string, b: string) => string): string =>
  `workgroupBarrier();
    meeting[c * ${rows / high}u + r] = ${x};
    workgroupBarrier();
    ${x} = ${numbers(others / 4).map((i) => `meeting[${i * rows / high}u + r]`).reduce(join)};`;

/** The type of one number for each row of a thread, and the memory in which they meet. */
export const perRow = (high: number): string => high === 4 ? "vec4f" : "vec2f";
export const meetings = ({ rows, others, high }: Shape): string =>
  `var<workgroup> meeting: array<${perRow(high)}, ${rows / high * others / 4}>;`;
