/**
 * What all kernels over rows share. One workgroup takes a row; its threads take four columns at a time. Loops over the row are written once, as `each(body)`. A
 * plan says how a body becomes code: unrolled copies for the part of the row that the workgroup keeps in registers, which is read once, and, if the row is
 * longer, a loop for the rest, which reads memory each time.
 */
import { type Element, lanes, numbers, vectorOf } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import type { BufferType } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import type { RowLimits, RowWork } from "./gpu/tuning.ts";

/** How a row is walked. */
export interface RowPlan {
  threads: number;
  /** vec4s of each stream that a thread keeps in registers: it reads one a turn. */
  quads: number;
  /** How many of those turns read nothing but whole vec4s of the row, whichever row it is. */
  sure: number;
  /** Whether the row is longer than what registers keep. Every loop reads the rest again. */
  more: boolean;
  /** Whether the row's length is a multiple of 4. Then it is made of whole vec4s; else it shares its first and its last vec4 with its neighbours. */
  wide: boolean;
  /**
   * For a row that is not `wide`: threads begin at its first vec4 that lies at a multiple of so many columns in memory. The vec4s in front of that
   * come last.
   */
  align: number;
  /** Whether threads meet through subgroups rather than a tree in workgroup memory. */
  subgroups: boolean;
}

/** Overrides for tests: how rows are walked, and whether threads meet through subgroups where there are any. */
export const rowTuning: { limits: RowLimits | null; subgroups: boolean | null } = { limits: null, subgroups: null };

/**
 * The limits of an adapter that was not measured. They fit an H100 (copy 2.92 TB/s) and its rows of 32,000, which take the least time with 1,024
 * threads of 64 registers each:
 *
 * - of one matrix a thread keeps 8 vec4s, together the whole row (cross-entropy 0.36 ms, a copy's speed)
 * - of two matrices it keeps 5 vec4s of each and reads the rest from the nearest cache (forwardKl 0.54 ms, with 4 of them 0.58; jsd 0.58, with 4 of
 *   them 0.79, with 6 0.62, as registers spill)
 */
function defaultRowLimits(isSoftware: boolean): Record<RowWork, RowLimits> {
  if (isSoftware) {
    // a CPU takes threads one after the other: forwardKl of 512×1000 costs it 9 ms so, 12 with 64 threads, 20 with 256; of 64×8192 5.3, 5.6 and 8.6
    const limits = { threads: 32, quads: 0 };
    return { one: limits, two: limits };
  }
  return { one: { threads: 1024, quads: 8 }, two: { threads: 1024, quads: 5 } };
}

/**
 * The plan for rows of `columns`. What the options do, with times of an H100:
 *
 * - `halves`: registers keep f16 as it is, twice as much. Half the threads then do, so that more groups run beside each other: forwardKl of 16384×8192
 *   in f16 takes 0.28 ms so, 0.34 from registers of f32. This pays even where half of two matrices is read again (distillation of 4096×32000 in f16
 *   0.36 ms, 0.40 where one group keeps its row whole), but not where most of the row is (forwardKl of 2048×128256 in f16 0.79 ms with all threads,
 *   0.86 with half).
 * - `busy`, a kernel of much arithmetic: where registers keep less than half of a row, half the threads keep half as much each, for the same reason
 *   (cross-entropy of 2048×128256 with every option 1.11 ms, else 1.20).
 * - `lean`, a kernel with registers to spare beside a loop over the rest: a thread keeps more (forwardKl of 4096×32000 in f16 0.31 ms with 9 vec4s a
 *   thread, 0.33 with 7; of reverseKl, which is not lean, it is 0.40 and 0.33).
 */
export function planRow(
  columns: number,
  work: RowWork,
  { halves = false, busy = false, lean = false }: { halves?: boolean; busy?: boolean; lean?: boolean } = {},
): RowPlan {
  const { isSoftware, limits, subgroups: able, tuning } = gpu().info;
  let { threads, quads } = rowTuning.limits ??
    (tuning?.rows ?? defaultRowLimits(isSoftware))[halves ? "one" : work];
  const wide = columns % 4 === 0;
  const inRow = wide ? columns / 4 : Math.floor(columns / 4) + 2; // vec4s, at most two of them shared with the neighbours
  if (halves && quads > 0 && threads > 32) {
    const full = work === "one" ? Math.min(16, 2 * quads) : quads;
    [threads, quads] = inRow > threads * quads
      ? [threads, full]
      // a loop over the rest takes registers too
      : [threads / 2, 2 * inRow <= threads * full ? full : lean ? full + 1 : Math.max(1, full - 1)];
  } else if (busy && inRow > 2 * threads * quads && quads > 1 && threads > 32) {
    [threads, quads] = [threads / 2, Math.ceil(quads / 2)];
  }
  // software drivers end a thread's loops at 65,535 turns in all: the longest rows take all threads
  if (isSoftware && columns > 2 ** 19) threads = 1024;
  const most = Math.min(threads, limits.maxComputeInvocationsPerWorkgroup);
  // Four vec4s a thread (of f16 eight) are enough reads under way, and more threads meet more slowly: jsd of 16384×8192 takes 0.54 ms with 512 threads, 0.62
  // with 1,024. A vec4 or two beyond are no reason for twice as many threads (cross-entropy of 16384×8191 0.37 ms, else 0.57).
  let n = 32;
  while (n < most && Math.floor(columns / 4) > (quads === 0 ? 2 : halves ? 8 : 4) * n) n *= 2;
  // reads of neighbouring threads begin at lines of the cache: distillation of 4096×32003 takes an H100 0.57 ms so, else 0.60
  const align = wide || quads === 0 || columns < 1024 ? 4 : 32;
  const each = Math.max(1, Math.ceil(inRow / n)),
    inside = Math.floor((wide ? inRow : Math.max(0, (columns - align + 1) / 4)) / n);
  const kept = each <= quads ? each : Math.min(quads, inside);
  return {
    threads: n,
    quads: kept,
    sure: Math.min(kept, inside),
    more: kept < each,
    wide,
    align,
    subgroups: able && (rowTuning.subgroups ?? true),
  };
}

/** A WGSL function NAME_at: reads four elements, at `columns4`, of a vector with one element a column. Unless the plan is `wide` they may begin inside a vec4. */
export function columnReader(name: string, plan: RowPlan): string {
  return `fn ${name}_at(c: vec4u) -> vec4f {
  ${
    plan.wide ? `return vec4f(${name}[c.x / 4u]);` : `let i = bitcast<i32>(c.x) >> 2u;
  let a = vec4f(${name}[max(i, 0)]);
  let b = vec4f(${name}[min(u32(i + 1), (params.columns - 1u) / 4u)]);
  var w = a;
  var next = b.x;
  if ((c.x & 2u) != 0u) { w = vec4f(a.zw, b.xy); next = b.z; } // alike in all of a row
  if ((c.x & 1u) != 0u) { w = vec4f(w.yzw, next); }
  return w;`
  }
}`;
}

/** Upstream gradients that the rows' gradients are multiplied by: one for all rows (stride 0), or one a row (1). */
export interface Upstream {
  memory: Memory;
  stride: 0 | 1;
}

/** How a buffer of rows is declared. */
export function rowBuffer(access: "read" | "write", element: Element): BufferType {
  return `${access} ${vectorOf[element]}`;
}

/**
 * One softmax normaliser of a row: of k·x, where `value` is x, a vec4f in the body of `each`. It defines NAME_max and NAME_rest with
 * log Σ eᵏˣ = k·max + log1p(rest); what `normalise` does `also` sees x as NAME4.
 */
export interface Normaliser {
  name: string;
  value: string;
  k: string;
  /** A stream. Its value where `value` is largest is then defined too, as NAME_at. */
  at?: string;
  /** Only where registers keep the whole row: a function of `value`. It is what is normalised, and registers keep it in the place of the stream's values. */
  becomes?: string;
}

/** The pieces of a kernel over rows. */
export interface RowCode {
  head: string;
  /** Defines `row_first` and reads what registers keep. Needs `row`. */
  begin: string;
  /**
   * A loop over the row. The body sees `at4` (u32: the index of a vec4), `columns4` (vec4u: its columns), `live4` (which of them are in the row: of a
   * vec4 that it shares not all are) and for each stream `NAME4` (vec4f), which is LOW where there is no column. Loops run forward and backward by
   * turns: what was read last is in the cache. `kept` is the body for what registers keep, if it is another one: it may leave something else in a
   * stream's place for the next loop, `kept_NAME = x`.
   */
  each: (body: string, kept?: string) => string;
  /** The first turn of a loop. */
  first: (body: string) => string;
  /**
   * Touches the vec4s behind those that registers keep, 4 a thread, so that they are on their way to the cache already: a loop waits for the memory at
   * every turn. jsd of 4096×32000 takes an H100 0.58 ms so, 0.63 without. The body sees one NAME4 (f32) of each 32 bytes. Nothing where registers keep none.
   */
  peek: (body: string) => string;
  /** Writes one column of an output once more, by the thread that wrote it before: the f32 `x`, in which names from `body` may stand. */
  overwrite: (output: string, column: string, body: string, x: string) => string;
  /** The sum or maximum of an f32, vec2f or vec4f over the workgroup, which every thread gets. Not inside a branch. */
  sum: (x: string, type?: Meeting) => string;
  max: (x: string, type?: Meeting) => string;
  /** Of a vec4f the sum of the first and the largest of the others, in one meeting: forwardKl of 4096×32000 took an H100 0.56 ms so, with two 0.57. */
  sumAndMost: (x: string) => string;
  /** The normalisers of the row; `also` is done in the first loop over it. */
  normalise: (of: Normaliser[], also?: string) => string;
}

type Meeting = "f32" | "vec2f" | "vec4f";
const MEETINGS: Meeting[] = ["f32", "vec2f", "vec4f"];

/**
 * The code for rows of `params.columns` columns. `streams` are read and `outputs` written, by `store_NAME(at4, live4, x)`; names are WGSL's. An output may
 * be a stream. `halves`: registers keep vec4h, of streams of f16; then no loop may leave anything else in them. `finite`: what is less than LEAST, −∞ too,
 * reads as LEAST, but not from registers that keep `halves`.
 */
export function rowCode(
  plan: RowPlan,
  streams: Record<string, Element>,
  outputs: Record<string, Element>,
  { finite = false, halves = false }: { finite?: boolean; halves?: boolean } = {},
): RowCode {
  const { threads, quads, more, wide, subgroups } = plan;
  const names = Object.keys(streams);
  const load = [...new Set([...names, ...Object.keys(outputs)])].map((name) =>
    `fn load_${name}(at: u32, live: vec4<bool>) -> vec4f { return ${
      wide ? `vec4f(${name}[at])` : `select(vec4f(LOW), vec4f(${name}[at]), live)`
    }; }`
  ).join("\n");
  // of a vec4 that two rows share each writes its own components, which no other thread does
  const store = Object.entries(outputs).map(([name, element]) => {
    const whole = `${name}[at] = ${vectorOf[element]}(x);`;
    const parts = lanes.map((l) => `if (live.${l}) { ${name}[at].${l} = ${element}(x.${l}); }`).join(" ");
    return `fn store_${name}(at: u32, live: vec4<bool>, x: vec4f) { ${
      wide ? whole : `if (all(live)) { ${whole} } else { ${parts} }`
    } }`;
  }).join("\n");
  const held = numbers(quads);
  const sure = (q: number) => q < plan.sure;
  // the vec4 of a turn, its columns, and which of them exist; behind the `inner` vec4s come the one at the row's end and then, backward, those of its lead
  const place = (step: string, sure: boolean) => {
    const unit = `let unit = ${step} * ${threads}u + lane;`, four = "vec4u(0u, 1u, 2u, 3u)";
    return wide || sure
      ? `${unit} let at4 = row_first + unit; let columns4 = ${
        wide ? "" : "lead + "
      }4u * unit + ${four}; let live4 = vec4<bool>(true);`
      : `${unit} let at4 = select(row_first + unit, row_first - min(row_first, unit - inner), unit > inner);
    let columns4 = 4u * at4 - row_start + ${four}; // in front of the row: more than any column
    let live4 = columns4 < vec4u(params.columns);`;
  };
  const exists = wide ? "4u * unit < params.columns" : "unit < units";
  const turn = (step: string, sure: boolean, from: (name: string) => string, body: string) =>
    `{ ${place(step, sure)} ${sure ? "" : `if (${exists}) `}{
    ${names.map((name) => `let ${name}4 = ${from(name)};`).join(" ")}
    ${body} } }`;
  const floored = (x: string) => finite ? `at_least(${x})` : x;
  const read = (name: string, at: string) => floored(`load_${name}(${at}, live4)`);
  const readHalf = (name: string, at: string) =>
    wide ? `${name}[${at}]` : `select(vec4h(-65504.0), ${name}[${at}], live4)`;
  const reading = (step: string, sure: boolean, body: string) =>
    turn(`(${step})`, sure, (name) => read(name, "at4"), body);
  const steps = wide
    ? `(params.columns + ${4 * threads - 1}u) / ${4 * threads}u`
    : `(units + ${threads - 1}u) / ${threads}u`;
  // Each turn stands in a branch that is always taken: else compilers move one turn's work into another's, and registers do not suffice. The last turn,
  // which may reach beyond the row, is a loop of one turn, so that its place takes no registers between loops: cross-entropy of 4096×32003 in f16 takes an
  // H100 58 registers and 0.20 ms so, else 84 and 0.25. (Not of cross-entropy in f32, where every option would take 0.47 ms instead of 0.43.)
  const keeping = (body: string, turns = held) =>
    turns.map((q) => {
      const alone = (finite || halves) && !sure(q) && q === quads - 1;
      const when = sure(q)
        ? `if (${4 * threads * q}u < params.columns) `
        : alone
        ? `for (var turn = ${q}u; turn < ${steps}; turn++) `
        : "";
      const kept = body.replaceAll(/\bkept_(\w+)/g, `$1_${q}`);
      return `${when}{
    ${turn(alone ? "turn" : `${q}u`, sure(q), (name) => `vec4f(${name}_${q})`, kept)}
  }`;
    }).join("\n  ");
  let loops = 0;
  const each = (body: string, kept = body) => {
    const backward = loops++ % 2 === 1;
    if (!more) return keeping(kept);
    const step = (from: string, to: string, i = 0) =>
      backward ? `${from} + (${to} - ${i + 1}u - turn)` : i ? `turn + ${i}u` : "turn";
    const loop = (from: string, to: string, sure: boolean) =>
      `for (var turn = ${from}; turn < ${to}; turn++) {
    ${reading(step(from, to), sure, body)}
  }`;
    // the reads of two turns at once, where no vec4 is shared: forwardKl of 2048×128256 in f16 takes an H100 0.79 ms so, else 0.86
    const byTwo = (from: string, to: string) =>
      `for (var turn = ${from}; turn < ${to}; turn += 2u) {
    ${
        [0, 1].map((i) =>
          names.map((name) =>
            `let ${name}_ahead${i} = ${name}[row_first + (${step(from, to, i)}) * ${threads}u + lane];`
          ).join(" ")
        ).join("\n    ")
      }
    ${
        [0, 1].map((i) => turn(`(${step(from, to, i)})`, true, (name) => floored(`vec4f(${name}_ahead${i})`), body))
          .join("\n    ")
      }
  }`;
    const inside = `max(${wide ? "params.columns / 4u" : "inner"} / ${threads}u, ${quads}u)`;
    const even = `(${inside} - (${inside} - ${quads}u) % 2u)`;
    const parts = halves
      ? [byTwo(`${quads}u`, even), loop(even, steps, false)]
      : wide
      ? [loop(`${quads}u`, steps, false)]
      : [loop(`${quads}u`, inside, true), loop(inside, steps, false)];
    const rest = (backward ? parts.reverse() : parts).join("\n  ");
    return backward ? `${rest}\n  ${keeping(kept)}` : `${keeping(kept)}\n  ${rest}`;
  };
  let meetings = 0;
  // meetings use two regions of memory by turns, so that one barrier each is enough
  const meet = (kind: "sum" | "max" | "mixed") => (x: string, type: Meeting = "vec4f") =>
    subgroups ? `all_${kind}_${type}(lane, ${x}, ${meetings++ % 2}u)` : `all_${kind}_${type}(lane, ${x})`;
  const sum = meet("sum"), max = meet("max"), sumAndMost = meet("mixed");
  return {
    head: `const LOW = -3.40282346638528859812e38; // the least finite number
const LEAST = -1e30;
const THREADS = ${threads}u;
fn at_least(x: vec4f) -> vec4f { return select(x, vec4f(LEAST), x < vec4f(LEAST)); } // keeps NaN
${load}
${store}
${subgroups ? subgroupMeetings(threads) : treeMeetings(threads)}
${ROW_FUNCTIONS}`,
    begin: `${
      wide ? "let row_first = row * (params.columns / 4u);" : `let row_start = row * params.columns;
  let lead = (0u - row_start) % ${plan.align}u; // columns
  let row_first = (row_start + lead) / 4u;
  let inner = (max(params.columns, lead) - lead) / 4u; // vec4s that are the row's alone, from row_first on
  let units = inner + 1u + (lead + 3u) / 4u;`
    }
  ${names.flatMap((name) => held.map((q) => `var ${name}_${q}: ${halves ? "vec4h" : "vec4f"};`)).join(" ")}
  ${
      held.map((q) =>
        `{ ${place(`${q}u`, sure(q))} let from4 = ${wide && !sure(q) ? `select(row_first, at4, ${exists})` : "at4"};
    ${names.map((name) => `${name}_${q} = ${halves ? readHalf(name, "from4") : read(name, "from4")};`).join(" ")} }`
      ).join("\n  ")
    }`,
    each,
    overwrite: (output, c, body, x) =>
      `{
    let home = row * params.columns + ${c};
    let home4 = home / 4u;
    let unit = ${wide ? `${c} / 4u` : "select(home4 - row_first, inner + row_first - home4, home4 < row_first)"};
    if (lane == unit % ${threads}u) {
      ${body}
      ${output}[home4][home % 4u] = ${outputs[output]}(${x});
    }
  }`,
    peek: (body) =>
      quads === 0 || !more ? "" : [0, 1].map((j) => {
        const at = (name: string) => {
          const vectors = streams[name] === "f16" ? 4 : 2; // in 32 bytes
          return `${name}[row_first + min(${(quads + vectors * j) * threads}u + ${vectors}u * lane, ${
            wide ? "params.columns / 4u" : "inner"
          } - 1u)]`;
        };
        return `{ ${names.map((name) => `let ${name}4 = f32(${at(name)}.x);`).join(" ")} ${body} }`;
      }).join("\n  "),
    first: (body) => quads > 0 ? keeping(body, held.slice(0, 1)) : `{ ${reading("0u", false, body)} }`,
    sum,
    max,
    sumAndMost,
    normalise: (of, also = "") => {
      const kept = quads > 0 && !more && of.length === 1 && !of[0].at;
      return (kept ? normaliseKept : normaliseOnline)(of, also, each, sum, max);
    },
  };
}

const pairs = <T>(all: T[]): T[][] => all.flatMap((_, i) => i % 2 === 0 ? [all.slice(i, i + 2)] : []);

type Normalise = (
  of: Normaliser[],
  also: string,
  each: RowCode["each"],
  sum: RowCode["sum"],
  max: RowCode["max"],
) => string;

/** Rows in registers, of one normaliser without a companion: the largest first, then the terms. */
const normaliseKept: Normalise = ([{ name, value, k, becomes }], also, each, sum, max) => {
  const stream = value.replace(/4$/, ""), isMax = `(${value} == vec4f(${name}_max))`;
  const term = `exp2((${value} - ${name}_max) * ${name}_k)`;
  return `let ${name}_k = ${k} * ${Math.LOG2E};
  var ${name}_top = LOW;
  ${
    each(
      `let ${name}4 = ${
        becomes ?? value
      }; ${name}_top = max(${name}_top, max_of(select(vec4f(LOW), ${name}4, live4))); ${
        becomes ? `kept_${stream} = ${name}4;` : ""
      } ${also}`,
    )
  }
  let ${name}_max = ${max(`${name}_top`, "f32")};
  var ${name}_terms = vec2f(0.0);
  if (${name}_top < ${name}_max) {
    ${each(`${name}_terms.x += sum_of(select(vec4f(0.0), ${term}, live4));`)}
  } else { // the largest terms are counted, and left out of the sum of the others, so that it keeps its digits
    ${
    each(
      `${name}_terms += vec2f(sum_of(select(${term}, vec4f(0.0), ${isMax} | !live4)), sum_of(select(vec4f(0.0), vec4f(1.0), live4 & ${isMax})));`,
    )
  }
  }
  let ${name}_sums = ${sum(`${name}_terms`, "vec2f")};
  let ${name}_rest = ${name}_sums.x + (${name}_sums.y - 1.0);`;
};

/** Rows of which loops read some again: maxima and terms in one loop. */
const normaliseOnline: Normalise = (of, also, each, sum, max) =>
  `${of.map(({ name }) => `var ${name}_part = vec3f(LOW, 0.0, 0.0);`).join(" ")}
  ${of.filter(({ at }) => at).map(({ name }) => `var ${name}_beside = LOW;`).join(" ")}
  ${
    each(
      of.map(({ name, value, k, at }) =>
        `let ${name}4 = ${value};
    { let x = select(vec4f(LOW), ${name}4, live4); let top = max_of(x);
      if (top >= ${name}_part.x) {
        ${at ? `${name}_beside = beside(${name}_beside, top > ${name}_part.x, x, top, ${at}4);` : ""}
        ${name}_part = raised_normaliser(${name}_part, x, top, live4, ${k});
      }
      ${name}_part.y += sum_of(select(exp((x - ${name}_part.x) * ${k}), vec4f(0.0), (x == vec4f(${name}_part.x)) | !live4)); }`
      ).join("\n    ") + ` ${also}`,
    )
  }
  ${
    pairs(of).map((pair, p) => {
      const [a, b] = [pair[0], pair[1] ?? pair[0]];
      const best = (x: Normaliser) => x.at ? `select(LOW, ${x.name}_beside, ${x.name}_part.x == ${x.name}_max)` : "LOW";
      return `let tops${p} = ${max(`vec2f(${a.name}_part.x, ${b.name}_part.x)`, "vec2f")};
  ${pair.map(({ name }, i) => `let ${name}_max = tops${p}.${lanes[i]};`).join(" ")}
  let sums${p} = ${
        sum(
          `vec4f(${
            [a, b].map(({ name, k }, i) => `moved_normaliser(${name}_part, tops${p}.${lanes[i]}, ${k})`).join(", ")
          })`,
        )
      };
  ${
        pair.map(({ name }, i) => `let ${name}_rest = sums${p}.${lanes[2 * i]} + (sums${p}.${lanes[2 * i + 1]} - 1.0);`)
          .join(" ")
      }
  ${
        pair.some(({ at }) => at)
          ? `let besides${p} = ${max(`vec2f(${best(a)}, ${pair[1] ? best(b) : "LOW"})`, "vec2f")};`
          : ""
      }
  ${pair.map(({ name, at }, i) => at ? `let ${name}_at = besides${p}.${lanes[i]};` : "").join(" ")}`;
    }).join("\n  ")
  }`;

/** Sums and maxima by subgroups: within each, then over what each has put into workgroup memory. */
function subgroupMeetings(threads: number): string {
  const meeting = (
    kind: string,
    type: Meeting,
    operation: string,
    start: string,
    join: (a: string, b: string) => string,
  ) => `
fn all_${kind}_${type}(lane: u32, x: ${type}, turn: u32) -> ${type} {
  let own = ${operation}(x);
  let region = turn * ${threads / 4}u;
  if (subgroup_lane == 0u) { subgroup_results[region + lane / subgroup_size] = ${wider(type, "own")}; }
  workgroupBarrier();
  var part = ${type}(${start});
  for (var i = subgroup_lane; i < ${threads}u / subgroup_size; i += subgroup_size) { part = ${
    join("part", `subgroup_results[region + i]${narrower(type)}`)
  }; }
  return ${operation}(part);
}`;
  return `var<workgroup> subgroup_results: array<vec4f, ${threads / 2}>; // two regions, subgroups of at least 4
${
    MEETINGS.map((type) =>
      meeting("sum", type, "subgroupAdd", "0.0", (a, b) => `${a} + ${b}`) +
      meeting("max", type, "subgroupMax", "LOW", (a, b) => `max(${a}, ${b})`)
    ).join("")
  }
fn mixed_of_all_(x: vec4f) -> vec4f { return vec4f(subgroupAdd(x.x), subgroupMax(x.yzw)); }
${meeting("mixed", "vec4f", "mixed_of_all_", "0.0, LOW, LOW, LOW", mixed)}
`;
}

const mixed = (a: string, b: string) => `mixed_(${a}, ${b})`;
const wider = (type: Meeting, x: string) => ({ f32: `vec4f(${x})`, vec2f: `vec4f(${x}, ${x})`, vec4f: x })[type];
const narrower = (type: Meeting) => ({ f32: ".x", vec2f: ".xy", vec4f: "" })[type];

/** Meetings by a tree in workgroup memory: eight by eight, since a barrier costs more than eight loads. */
function treeMeetings(threads: number): string {
  const widths: number[] = [];
  for (let width = threads; width > 1;) widths.push(width = Math.max(1, width / 8));
  const tree = (kind: string, type: Meeting, join: (a: string, b: string) => string) => `
fn all_${kind}_${type}(lane: u32, x: ${type}) -> ${type} {
  meeting[lane] = ${wider(type, "x")};
  ${
    widths.map((width, i) => {
      const of = Array.from({ length: (widths[i - 1] ?? threads) / width }, (_, j) => `meeting[lane + ${j * width}u]`);
      return `workgroupBarrier();
  if (lane < ${width}u) { meeting[lane] = ${of.reduce(join)}; }`;
    }).join("\n  ")
  }
  let result = workgroupUniformLoad(&meeting[0]);
  return result${narrower(type)};
}`;
  return `var<workgroup> meeting: array<vec4f, ${threads}>;
${
    MEETINGS.map((type) => tree("sum", type, (a, b) => `${a} + ${b}`) + tree("max", type, (a, b) => `max(${a}, ${b})`))
      .join("")
  }${tree("mixed", "vec4f", mixed)}`;
}

const ROW_FUNCTIONS = `
fn sum_of(x: vec4f) -> f32 { return (x.x + x.y) + (x.z + x.w); }
fn mixed_(a: vec4f, b: vec4f) -> vec4f { return vec4f(a.x + b.x, max(a.yzw, b.yzw)); }
fn max_of(x: vec4f) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// A normaliser (m, r, n) of x/T, with k = 1/T, stands for eᵐᵏ·(r + n): r is the sum of the terms below the largest relative to it, n how many are as large, so that a
// peaked row keeps its digits: log Σ = mk + log1p(r + n − 1). m is not scaled, so that x − m is exact for near ones. The empty one is (LOW, 0, 0).
// What it adds to (m, ·, ·) of the whole row: to r and to n.
fn moved_normaliser(n: vec3f, m: f32, k: f32) -> vec2f {
  return select(vec2f((n.y + n.z) * exp((n.x - m) * k), 0.0), n.yz, n.x == m);
}

// where the largest of x, \`top\`, is no less than m: m is that, and n counts it
fn raised_normaliser(n: vec3f, x: vec4f, top: f32, live: vec4<bool>, k: f32) -> vec3f {
  let moved = moved_normaliser(n, top, k);
  return vec3f(top, moved.x, moved.y + sum_of(select(vec4f(0.0), vec4f(1.0), live & (x == vec4f(top)))));
}

// the largest y of those where x is m, and, unless \`fresh\`, of an earlier one
fn beside(before: f32, fresh: bool, x: vec4f, m: f32, y: vec4f) -> f32 {
  return max(select(before, LOW, fresh), max_of(select(vec4f(LOW), y, x == vec4f(m))));
}
`;
