/**
 * What all kernels over rows share. One workgroup processes a row; its threads take four columns at a time. A loop over the row is written once, as
 * `each(body)`. A plan determines how a body becomes code: unrolled copies for the part of the row that the workgroup keeps in registers, which is read once,
 * and, if the row is longer, a loop over the rest, which reads memory again every time.
 */
import { type Element, lanes, numbers, vectorOf } from "./elementwise.ts";
import type { GpuInfo } from "./gpu/device.ts";
import { gpu } from "./gpu/gpu.ts";
import type { BufferType } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { overrides, type RowLimits, type RowWork } from "./gpu/tuning.ts";

/** How a row is processed. */
export interface RowPlan {
  threads: number;
  /** How many vec4s of each stream a thread keeps in registers. It reads one per turn. */
  quads: number;
  /** In how many of those turns every thread reads a whole vec4 of the row, in any row. */
  sure: number;
  /** Whether the row is longer than what registers keep. Every loop reads the rest again. */
  more: boolean;
  /** Whether the row's length is a multiple of 4. Then it consists of whole vec4s; otherwise it shares its first and its last vec4 with its neighbours. */
  wide: boolean;
  /**
   * For a row that is not `wide`: threads begin at its first vec4 whose place in memory is a multiple of so many columns. The vec4s before that one come last.
   */
  align: number;
  /** Whether sums and maxima over the workgroup use subgroups rather than a tree in workgroup memory. */
  subgroups: boolean;
  /**
   * Whether the threads are one subgroup, which needs neither workgroup memory nor barriers: distillation of 1,048,576×10 takes an H100 4.1 ms instead of 6.3,
   * cross-entropy of 262,144×96 0.36 ms instead of 0.48.
   */
  alone: boolean;
}

/**
 * The limits of an adapter that was not measured. They suit an H100 and rows of 32,000, which take the least time there with 1,024 threads of 64 registers
 * each:
 *
 * - of one matrix a thread keeps 8 vec4s, so that together they keep the whole row (cross-entropy 0.36 ms, the speed of a copy)
 * - of two matrices it keeps 5 vec4s each and reads the rest from the nearest cache (forwardKl 0.54 ms, with 4 vec4s 0.58; jsd 0.58 ms, with 4 vec4s 0.79,
 *   with 6 0.62, as registers spill)
 */
function defaultRowLimits({ isSoftware, subgroupSize }: GpuInfo): Record<RowWork, RowLimits> {
  if (isSoftware) {
    // A CPU core runs subgroups one after the other and saves the registers of each at a barrier, code that takes long to compile: with one subgroup of 8, 32 and
    // 256 threads distillation of 500 rows of 1,000 takes 18, 25 and 29 ms, of 12,500 rows of 40 22, 81 and 91 ms; its kernel compiles in 0.7, 1.2 and 1.8 s
    const limits = { threads: subgroupSize || 32, quads: 0 };
    return { one: limits, two: limits };
  }
  return { one: { threads: 1024, quads: 8 }, two: { threads: 1024, quads: 5 } };
}

/**
 * The plan for rows of `columns`. What the options mean, with times of an H100:
 *
 * - `halves`: registers keep f16 unconverted, twice as many numbers. Half the threads are then enough, so that more groups run concurrently: forwardKl of
 *   16384×8192 in f16 takes 0.28 ms instead of 0.34 with f32 in registers. This pays even if half of two matrices is read again (distillation of 4096×32000
 *   in f16 0.33 ms, 0.42 if one group keeps the whole row), but not if most of the row is read again (forwardKl of 2048×128256 in f16 0.79 ms with all
 *   threads, 0.86 with half).
 * - `extra`, with `halves`: registers also keep an f32 vec4 beside the two of f16, half as many numbers again. Rows up to 16,384 take a quarter of the threads,
 *   longer ones 5 vec4s instead of 8, so that as many groups run concurrently: jsd in f16, 128 million logits, rows of 12,288 0.38 ms (0.41 without, 0.54 if
 *   half the threads keep the whole row), of 16,384 0.38 (0.41), of 24,576 0.40 (0.43), of 32,000 0.41 (0.42).
 * - `busy`, for a kernel with much arithmetic: if registers keep less than half of a row, half the threads keep half as much each, for the same reason
 *   (cross-entropy of 2048×128256 with every option 1.11 ms instead of 1.20).
 */
export function planRow(
  columns: number,
  work: RowWork,
  { halves = false, extra = false, busy = false }: { halves?: boolean; extra?: boolean; busy?: boolean } = {},
): RowPlan {
  const { info } = gpu(), { limits, tuning } = info;
  let { threads, quads } = overrides.rows ?? (tuning?.rows ?? defaultRowLimits(info))[halves ? "one" : work];
  const wide = columns % 4 === 0;
  const inRow = wide ? columns / 4 : Math.floor(columns / 4) + 2; // vec4s, at most two of which are shared with the neighbours
  if (halves && quads > 0 && threads > 32) {
    const full = work === "one" ? Math.min(16, 2 * quads) : quads;
    const held = threads * quads;
    quads = full;
    if (inRow <= held && extra) {
      [threads, quads] = 2 * inRow <= held ? [Math.max(32, threads / 4), full] : [threads / 2, Math.ceil(0.6 * full)];
    } else if (inRow <= held) {
      // vec4s that are not the row's alone take registers: forwardKl of 4096×32003 in f16 would take 0.40 ms instead of 0.33
      if (2 * inRow > threads * full && !(wide && work === "two")) quads = Math.max(1, full - 1);
      threads /= 2;
    }
  } else if (busy && inRow > 2 * threads * quads && quads > 1 && threads > 32) {
    [threads, quads] = [threads / 2, Math.ceil(quads / 2)];
  }
  // No thread takes more than 256 turns: the roundings of longer sums show (forwardKl of rows of 32,000, 8 threads: 1.5e-6 of the value, 32 threads: 4e-7), and
  // software drivers stop a thread after 65,535 iterations in all
  while (threads < columns / 1024) threads *= 2;
  const most = Math.min(threads, limits.maxComputeInvocationsPerWorkgroup);
  // Four vec4s per thread (of f16 eight) are enough reads under way, and sums over more threads take longer: jsd of 16384×8192 takes 0.54 ms with 512 threads,
  // 0.62 with 1,024. One or two vec4s too many do not double the threads (cross-entropy of 16384×8191 0.37 ms instead of 0.57).
  let n = Math.min(32, most);
  while (n < most && Math.floor(columns / 4) > (quads === 0 ? 2 : halves ? 8 : 4) * n) n *= 2;
  // with this the reads of neighbouring threads begin at cache lines: distillation of 4096×32003 takes an H100 0.57 ms instead of 0.60
  const align = wide || quads === 0 || columns < 1024 ? 4 : 32;
  const each = Math.max(1, Math.ceil(inRow / n)),
    inside = Math.floor((wide ? inRow : Math.max(0, (columns - align + 1) / 4)) / n);
  const kept = each <= quads ? each : Math.min(quads, inside);
  const subgroups = info.subgroups && (overrides.subgroups ?? true), alone = subgroups && n <= info.subgroupSize;
  return { threads: n, quads: kept, sure: Math.min(kept, inside), more: kept < each, wide, align, subgroups, alone };
}

/**
 * A WGSL function NAME_at that reads four elements, at `columns4`, of a vector with one element per column. Unless the plan is `wide` they may begin inside a
 * vec4.
 */
export function columnReader(name: string, plan: RowPlan): string {
  return `fn ${name}_at(c: vec4u) -> vec4f {
  ${
    plan.wide
      ? `return vec4f(${name}[c.x / 4u]);`
      : `let i = u32(bitcast<i32>(c.x) >> 2u); // what lies outside of the vector is not used
  let a = vec4f(${name}[i]);
  let b = vec4f(${name}[i + 1u]);
  var w = a;
  var next = b.x;
  if ((c.x & 2u) != 0u) { w = vec4f(a.zw, b.xy); next = b.z; } // the same in a whole row
  if ((c.x & 1u) != 0u) { w = vec4f(w.yzw, next); }
  return w;`
  }
}`;
}

/** Upstream gradients, which multiply the rows' gradients: one for all rows (stride 0), or one per row (1). */
export interface Upstream {
  memory: Memory;
  stride: 0 | 1;
}

/** The type of a buffer of rows. */
export function rowBuffer(access: "read" | "write", element: Element): BufferType {
  return `${access} ${vectorOf[element]}`;
}

/**
 * One softmax normaliser of a row, over k·x, where `value` is x, a vec4f in the body of `each`. It defines NAME_max and NAME_rest with
 * log Σ eᵏˣ = k·max + log1p(rest). The code `also` of `normalise` sees x as NAME4.
 */
export interface Normaliser {
  name: string;
  value: string;
  k: string;
  /** A stream whose value where `value` is largest is defined as well, as NAME_at. Of the first two normalisers both have one, or neither has. */
  at?: string;
  /**
   * A function of `value` that is normalised in its place, and that registers then keep instead of the stream's values. Only if registers keep the whole row.
   */
  becomes?: string;
}

/** The pieces of a kernel over rows. */
export interface RowCode {
  head: string;
  /** Defines `row_first` and reads what registers keep. Needs `row`. */
  begin: string;
  /**
   * A loop over the row. The body sees `at4` (u32: the index of a vec4), `columns4` (vec4u: its columns), `live4` (which of them are in the row; of a vec4
   * shared with a neighbour not all are) and for each stream `NAME4` (vec4f), which is LOW outside of the row. Loops alternate between forward and backward,
   * because what was read last is in the cache. `kept` is the body for what registers keep, if it differs: it may replace a stream's values for the next
   * loop, with `kept_NAME = x`. If it is null, the loop reads the whole row from memory. With `finite` the body also sees `raw_NAME4`.
   *
   * With `seen`, the name of an f32 variable, the loop touches the vec4s after those that registers keep, 4 per thread, two turns before it needs them: then they
   * are in the cache where it would wait for memory in every turn. The variable becomes the largest of what was touched, so that compilers keep the reads.
   * forwardKl of 4096×32000 takes an H200 0.45 ms, 0.50 without it.
   */
  each: (body: string, kept?: string | null, seen?: string) => string;
  /** The first turn of a loop, or so many that they are 128 columns or all that registers keep. */
  first: (body: string) => string;
  /** Overwrites one column of an output, in the thread that wrote it before, with the f32 `x`, which may use names from `body`. */
  overwrite: (output: string, column: string, body: string, x: string) => string;
  /** The sum or maximum of an f32, vec2f or vec4f over the workgroup; every thread gets it. Not inside a branch. */
  sum: (x: string, type?: Meeting) => string;
  max: (x: string, type?: Meeting) => string;
  /** Declares a variable that the workgroup shares. */
  shared: (name: string, type: string) => string;
  /** Code that writes shared variables, for one thread to run. What it writes can be read after a sum, a maximum, `wait` or `value`. */
  once: (write: string) => string;
  wait: string;
  /** Waits, then reads a shared variable: a value that compilers take to be the same in all threads. */
  value: (name: string) => string;
  /** The same code for a branch: its loops continue to alternate from here on, those of another branch do too. */
  fork: () => RowCode;
  /** The normalisers of the row. The code `also` runs in the first loop over it. */
  normalise: (of: Normaliser[], also?: string) => string;
}

type Meeting = "f32" | "vec2f" | "vec4f";
const MEETINGS: Meeting[] = ["f32", "vec2f", "vec4f"];

/**
 * The code for rows of `params.columns` columns. `streams` are read and `outputs` are written, with `store_NAME(at4, live4, x)`; names are WGSL's. An output
 * may be a stream. `halves`: registers keep streams of f16 as vec4h; then no loop may replace them, and columns outside of the row read as −65504. `finite`: a
 * number below LEAST, such as −∞, reads as LEAST, and NaN may as well (some compilers make a maximum of a comparison), so that the first loop has to look for
 * NaN in `raw_NAME4`. Registers keep what was read until that loop replaces it. `extra`: names of further vec4f that they keep beside it, as `kept_NAME`, which a
 * loop writes and a later one reads. `loops` is the number of those that precede this code.
 */
export function rowCode(
  plan: RowPlan,
  streams: Record<string, Element>,
  outputs: Record<string, Element>,
  { finite = false, halves = false, extra = [], loops = 0 }: {
    finite?: boolean;
    halves?: boolean;
    extra?: string[];
    loops?: number;
  } = {},
): RowCode {
  const { threads, quads, more, wide, subgroups, alone } = plan;
  const names = Object.keys(streams);
  const load = [...new Set([...names, ...Object.keys(outputs)])].map((name) =>
    `fn load_${name}(at: u32, live: vec4<bool>) -> vec4f { return ${
      wide ? `vec4f(${name}[at])` : `select(vec4f(LOW), vec4f(${name}[at]), live)`
    }; }`
  ).join("\n");
  // of a vec4 that two rows share, each row's thread writes only its own components
  const store = Object.entries(outputs).map(([name, element]) => {
    const whole = `${name}[at] = ${vectorOf[element]}(x);`;
    const parts = lanes.map((l) => `if (live.${l}) { ${name}[at].${l} = ${element}(x.${l}); }`).join(" ");
    return `fn store_${name}(at: u32, live: vec4<bool>, x: vec4f) { ${
      wide ? whole : `if (all(live)) { ${whole} } else { ${parts} }`
    } }`;
  }).join("\n");
  const held = numbers(quads), firsts = Math.ceil(32 / threads);
  const sure = (q: number) => q < plan.sure;
  // the vec4 of a turn, its columns, and which of them exist; after the `inner` vec4s come the one at the row's end and then, backward, those of its lead
  const place = (step: string, sure: boolean) => {
    const unit = `let unit = ${step} * ${threads}u + lane;`, four = "vec4u(0u, 1u, 2u, 3u)";
    return wide || sure
      ? `${unit} let at4 = row_first + unit; let columns4 = ${
        wide ? "" : "lead + "
      }4u * unit + ${four}; let live4 = vec4<bool>(true);`
      : `${unit} let at4 = select(row_first + unit, row_first - min(row_first, unit - inner), unit > inner);
    let columns4 = 4u * at4 - row_start + ${four}; // before the row: larger than any column
    let live4 = columns4 < vec4u(params.columns);`;
  };
  const exists = wide ? "4u * unit < params.columns" : "unit < units";
  const turn = (step: string, sure: boolean, from: (name: string) => string, body: string, floor = true) =>
    `{ ${place(step, sure)} ${sure ? "" : `if (${exists}) `}{
    ${
      names.map((name) =>
        finite
          ? `let raw_${name}4 = ${from(name)}; let ${name}4 = ${floor ? `at_least(raw_${name}4)` : `raw_${name}4`};`
          : `let ${name}4 = ${from(name)};`
      ).join(" ")
    }
    ${body} } }`;
  const readHalf = (name: string, at: string) =>
    wide ? `${name}[${at}]` : `select(vec4h(-65504.0), ${name}[${at}], live4)`;
  const read = (name: string, at: string) => halves ? `vec4f(${readHalf(name, at)})` : `load_${name}(${at}, live4)`;
  const reading = (step: string, sure: boolean, body: string) =>
    turn(`(${step})`, sure, (name) => read(name, "at4"), body);
  const steps = wide
    ? `(params.columns + ${4 * threads - 1}u) / ${4 * threads}u`
    : `(units + ${threads - 1}u) / ${threads}u`;
  // Each turn is inside a branch that is always taken: otherwise compilers mix the work of several turns and run out of registers. The last turn, which may
  // extend beyond the row, is a loop of one turn, so that its place takes no registers between loops: cross-entropy of 4096×32003 in f16 takes an H100 58
  // registers and 0.20 ms instead of 84 and 0.25. (Not for cross-entropy in f32, which with every option would take 0.47 ms instead of 0.43.)
  const keeping = (body: string, floor = false, turns = held, before: string[] = [], after: string[] = []) =>
    turns.map((q) => {
      const alone = (finite || halves) && !sure(q) && q === quads - 1;
      const when = sure(q)
        ? `if (${4 * threads * q}u < params.columns) `
        : alone
        ? `for (var turn = ${q}u; turn < ${steps}; turn++) `
        : "";
      const kept = `${before[q] ?? ""} ${body.replaceAll(/\bkept_(\w+)/g, `$1_${q}`)} ${after[q] ?? ""}`;
      return `${when}{
    ${turn(alone ? "turn" : `${q}u`, sure(q), (name) => `vec4f(${name}_${q})`, kept, floor)}
  }`;
    }).join("\n  ");
  // what the first two turns touch, one number in every 32 bytes, is used two turns later
  const touching = (seen: string) => {
    const last = `${wide ? "params.columns / 4u" : "inner"} - 1u`, before: string[] = [], after: string[] = [];
    for (const [i, name] of [...names, ...names].entries()) {
      const round = Math.floor(i / names.length), vectors = streams[name] === "f16" ? 4 : 2;
      const at = `row_first + min(${(quads + vectors * round) * threads}u + ${vectors}u * lane, ${last})`;
      const [from, to] = [round, round + 2].map((q) => Math.min(q, quads - 1));
      before[from] = `${before[from] ?? ""} touched${i} = f32(${name}[${at}].x);`;
      after[to] = `${after[to] ?? ""} ${seen} = max(${seen}, touched${i});`;
    }
    return { before, after, variables: numbers(2 * names.length).map((i) => `var touched${i} = 0.0;`).join(" ") };
  };
  const walk = (loop: number, body: string, kept: string | null = body, seen = "") => {
    const backward = loop % 2 === 1, touches = seen !== "" && more && quads > 0 ? touching(seen) : null;
    const keep = (kept: string) => keeping(kept, loop === 0, held, touches?.before, touches?.after);
    if (!more && kept !== null) return keep(kept);
    const first = kept === null ? 0 : quads;
    const step = (from: string, to: string, i = 0) =>
      backward ? `${from} + (${to} - ${i + 1}u - turn)` : i ? `turn + ${i}u` : "turn";
    const reread = (from: string, to: string, sure: boolean) =>
      `for (var turn = ${from}; turn < ${to}; turn++) {
    ${reading(step(from, to), sure, body)}
  }`;
    // reads two turns at once, where no vec4 is shared: forwardKl of 2048×128256 in f16 takes an H100 0.79 ms instead of 0.86
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
        [0, 1].map((i) => turn(`(${step(from, to, i)})`, true, (name) => `vec4f(${name}_ahead${i})`, body)).join(
          "\n    ",
        )
      }
  }`;
    const inside = `max(${wide ? "params.columns / 4u" : "inner"} / ${threads}u, ${first}u)`;
    const even = `(${inside} - (${inside} - ${first}u) % 2u)`;
    const parts = halves
      ? [byTwo(`${first}u`, even), reread(even, steps, false)]
      : wide
      ? [reread(`${first}u`, steps, false)]
      : [reread(`${first}u`, inside, true), reread(inside, steps, false)];
    const rest = (backward ? parts.reverse() : parts).join("\n  ");
    return kept === null
      ? rest
      : backward
      ? `${rest}\n  ${keep(kept)}`
      : `${touches?.variables ?? ""}\n  ${keep(kept)}\n  ${rest}`;
  };
  const each = (body: string, kept?: string | null, seen?: string) => walk(loops++, body, kept, seen);
  const meet = (kind: "sum" | "max") => (x: string, type: Meeting = "vec4f") => `all_${kind}_${type}(lane, ${x})`;
  const sum = meet("sum"), max = meet("max");
  return {
    head: `const LOW = -3.40282346638528859812e38; // the least finite number
const LEAST = -1e30;
const THREADS = ${threads}u;
fn at_least(x: vec4f) -> vec4f { return max(x, vec4f(LEAST)); }
${load}
${store}
${alone ? aloneMeetings() : subgroups ? subgroupMeetings(threads) : treeMeetings(threads)}
${ROW_FUNCTIONS}`,
    begin: `${
      wide ? "let row_first = row * (params.columns / 4u);" : `let row_start = row * params.columns;
  let lead = (0u - row_start) % ${plan.align}u; // columns before the first aligned vec4
  let row_first = (row_start + lead) / 4u;
  let inner = (max(params.columns, lead) - lead) / 4u; // vec4s from row_first on that belong to the row alone
  let units = inner + 1u + (lead + 3u) / 4u;`
    }
  ${names.flatMap((name) => held.map((q) => `var ${name}_${q}: ${halves ? "vec4h" : "vec4f"};`)).join(" ")}
  ${extra.flatMap((name) => held.map((q) => `var ${name}_${q}: vec4f;`)).join(" ")}
  ${
      held.map((q) =>
        `{ ${place(`${q}u`, sure(q))} let from4 = ${wide && !sure(q) ? `select(row_first, at4, ${exists})` : "at4"};
    ${names.map((name) => `${name}_${q} = ${halves ? readHalf(name, "from4") : read(name, "from4")};`).join(" ")} }`
      ).join("\n  ")
    }`,
    each,
    fork: () => rowCode(plan, streams, outputs, { finite, halves, loops }),
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
    first: (body) =>
      quads > 0
        ? keeping(body, false, held.slice(0, firsts))
        : `for (var turn = 0u; turn < ${firsts}u; turn++) { ${reading("turn", false, body)} }`,
    sum,
    max,
    // in a subgroup alone each thread has its own copy
    shared: (name, type) => `var<${alone ? "private" : "workgroup"}> ${name}: ${type};`,
    once: (write) => `${alone ? "" : "if (lane == 0u) "}{ ${write} }`,
    value: (name) => alone ? name : `workgroupUniformLoad(&${name})`,
    wait: alone ? "" : "workgroupBarrier();",
    normalise: (of, also = "") => {
      const kept = quads > 0 && !more && of.length === 1 && !of[0].at;
      return (kept ? normaliseKept : normaliseOnline)(of, also, { each, sum, max });
    },
  };
}

const pairs = <T>(all: T[]): T[][] => all.flatMap((_, i) => i % 2 === 0 ? [all.slice(i, i + 2)] : []);

type Normalise = (of: Normaliser[], also: string, row: Pick<RowCode, "each" | "sum" | "max">) => string;

/** For rows in registers, with one normaliser without `at`: the maximum first, then the terms. */
const normaliseKept: Normalise = ([{ name, value, k, becomes }], also, { each, sum, max }) => {
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
  } else { // the largest terms are counted and left out of the sum of the others, which keeps its digits that way
    ${
    each(
      `${name}_terms += vec2f(sum_of(select(${term}, vec4f(0.0), ${isMax} | !live4)), sum_of(select(vec4f(0.0), vec4f(1.0), live4 & ${isMax})));`,
    )
  }
  }
  let ${name}_sums = ${sum(`${name}_terms`, "vec2f")};
  let ${name}_rest = ${name}_sums.x + (${name}_sums.y - 1.0);`;
};

/** For rows that loops read again, at least in part: maximum and terms in one loop. */
const normaliseOnline: Normalise = (of, also, { each, sum, max }) =>
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
      const [a, b = a] = pair;
      const best = ({ name }: Normaliser) => `select(LOW, ${name}_beside, ${name}_part.x == ${name}_max)`;
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
        !a.at ? "" : `let besides${p} = ${max(`vec2f(${best(a)}, ${best(b)})`, "vec2f")};
  ${pair.map(({ name }, i) => `let ${name}_at = besides${p}.${lanes[i]};`).join(" ")}`
      }`;
    }).join("\n  ")
  }`;

/** Sums and maxima of threads that are one subgroup. */
function aloneMeetings(): string {
  const meeting = (kind: string, type: Meeting, operation: string) =>
    `fn all_${kind}_${type}(lane: u32, x: ${type}) -> ${type} { return ${operation}(x); }\n`;
  return MEETINGS.map((type) => meeting("sum", type, "subgroupAdd") + meeting("max", type, "subgroupMax")).join("");
}

/**
 * Sums and maxima by subgroups: first within each, then the first subgroup joins the results of all. Lanes that meet exchange the components that the other one
 * keeps, so that a vec4f takes 6 shuffles instead of 20. Compilers know the result to be the same in all threads, so that decisions by it need no barrier:
 * forwardKl of 16384×8192 takes an H200 0.40 ms instead of 0.42, distillation 0.42 instead of 0.46.
 */
function subgroupMeetings(threads: number): string {
  const most = threads / 4; // subgroups have at least 4 lanes
  const meeting = (kind: string, type: Meeting, start: string, join: (a: string, b: string) => string) => {
    const count = { f32: 1, vec2f: 2, vec4f: 4 }[type], x2 = count === 4 ? "x2" : "x";
    const exchange = (low: string, high: string, lanes: number) =>
      `let upper${lanes} = (subgroup_lane & ${lanes}u) != 0u;
  ${lanes === 2 ? "let x2" : "own"} = ${
        join(
          `select(${low}, ${high}, upper${lanes})`,
          `subgroupShuffleXor(select(${high}, ${low}, upper${lanes}), ${lanes}u)`,
        )
      };`;
    const steps = [1, 2, 4, 8, 16, 32, 64].filter((d) => d >= count && d < threads).map((d) =>
      `if (subgroup_size > ${d}u) { own = ${join("own", `subgroupShuffleXor(own, ${d}u)`)}; }`
    );
    return `
fn own_${kind}_${type}(x: ${type}) -> f32 { // of the component with the lane's number, modulo ${count}
  var own = 0.0;
  ${count === 4 ? exchange("x.xy", "x.zw", 2) : ""}
  ${count > 1 ? exchange(`${x2}.x`, `${x2}.y`, 1) : "own = x;"}
  ${steps.join("\n  ")}
  return own;
}
fn all_${kind}_${type}(lane: u32, x: ${type}) -> ${type} {
  let own = own_${kind}_${type}(x);
  if (subgroup_lane < ${count}u) { subgroup_results[${most}u * subgroup_lane + lane / subgroup_size] = own; }
  workgroupBarrier();
  if (lane < subgroup_size) {
    var part = ${type}(${start});
    for (var i = lane; i < max(1u, ${threads}u / subgroup_size); i += subgroup_size) {
      part = ${join("part", `${type}(${numbers(count).map((c) => `subgroup_results[${most * c}u + i]`).join(", ")})`)};
    }
    let all = own_${kind}_${type}(part);
    if (lane < ${count}u) { meeting[lane] = all; }
  }
  let result = workgroupUniformLoad(&meeting);
  return ${type}(${numbers(count).map((c) => `result[${c}]`).join(", ")});
}`;
  };
  return `var<workgroup> subgroup_results: array<f32, ${threads}>;
var<workgroup> meeting: array<f32, 4>;
${
    MEETINGS.map((type) =>
      meeting("sum", type, "0.0", (a, b) => `${a} + ${b}`) + meeting("max", type, "LOW", (a, b) => `max(${a}, ${b})`)
    ).join("")
  }
`;
}

const wider = (type: Meeting, x: string) => ({ f32: `vec4f(${x})`, vec2f: `vec4f(${x}, ${x})`, vec4f: x })[type];
const narrower = (type: Meeting) => ({ f32: ".x", vec2f: ".xy", vec4f: "" })[type];

/** Sums and maxima by a tree in workgroup memory that joins eight at a time, since a barrier costs more than eight loads. */
function treeMeetings(threads: number): string {
  const widths: number[] = [];
  for (let width = threads; width > 1;) widths.push(width = Math.max(1, width / 8));
  const tree = (kind: string, type: Meeting, join: (a: string, b: string) => string) => `
fn all_${kind}_${type}(lane: u32, x: ${type}) -> ${type} {
  meeting[lane] = ${wider(type, "x")};
  ${
    widths.map((width, i) => {
      const of = numbers((widths[i - 1] ?? threads) / width).map((j) => `meeting[lane + ${j * width}u]`);
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
  }`;
}

const ROW_FUNCTIONS = `
fn sum_of(x: vec4f) -> f32 { return (x.x + x.y) + (x.z + x.w); }
fn max_of(x: vec4f) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// A normaliser (m, r, n) of x/T, with k = 1/T, stands for eᵐᵏ·(r + n): m is the largest x, n counts the terms that equal the largest, and r is the sum of the
// others relative to it. With log Σ = mk + log1p(r + n − 1) a peaked row keeps its digits. m is not scaled, so that x − m is exact for x near m. Without any x
// it is (LOW, 0, 0). This function gives what it adds to r and n of a normaliser with another m.
fn moved_normaliser(n: vec3f, m: f32, k: f32) -> vec2f {
  return select(vec2f((n.y + n.z) * exp((n.x - m) * k), 0.0), n.yz, n.x == m);
}

// for \`top\`, the largest of x, that is at least m: the normaliser with m = top, and with x's elements that equal it counted in n
fn raised_normaliser(n: vec3f, x: vec4f, top: f32, live: vec4<bool>, k: f32) -> vec3f {
  let moved = moved_normaliser(n, top, k);
  return vec3f(top, moved.x, moved.y + sum_of(select(vec4f(0.0), vec4f(1.0), live & (x == vec4f(top)))));
}

// the largest y where x equals m, or \`before\` if that is larger and not outdated (\`fresh\`)
fn beside(before: f32, fresh: bool, x: vec4f, m: f32, y: vec4f) -> f32 {
  return max(select(before, LOW, fresh), max_of(select(vec4f(LOW), y, x == vec4f(m))));
}
`;
