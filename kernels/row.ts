/**
 * What kernels that work a row at a time share: a workgroup takes a row, its threads take columns four at a time, and loops over the row
 * are written once as `each(body)`. A plan says how a body becomes code: a real loop that reads memory again each time, or, where the row
 * fits the registers of the workgroup, one read and unrolled copies of the body.
 */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import type { BufferType } from "./gpu/kernel.ts";

/** How a row is walked. `quads` vec4s a thread stay in registers; 0: every loop reads the row again. */
export interface RowPlan {
  threads: number;
  quads: number;
  /** Whether memory is read by whole vec4s: the row's length is a multiple of 4. */
  wide: boolean;
  /** Whether threads meet through subgroups rather than a tree in workgroup memory. */
  subgroups: boolean;
}

/** Overrides for tests and tuning: `registers` forces rows into registers or never does, `subgroups` likewise (where there are any). */
export const rowTuning: { registers: boolean | null; subgroups: boolean | null } = { registers: null, subgroups: null };

/**
 * The plan for rows of `columns`, of which `streams` inputs are read.
 *
 * One stream stays in registers up to 32,768 columns: cross-entropy of 4096×32000 took 0.40 ms on an H100 so, 0.55 ms reading its rows again from the
 * cache (512 threads, 16 vec4s each; 1,024 threads with 8 took 0.48). Two do not: their unrolled bodies spill registers (forward KL 2.6 ms against 0.87).
 */
export function planRow(columns: number, streams: number): RowPlan {
  const { isSoftware, limits, subgroups: able } = gpu().info;
  const subgroups = able && (rowTuning.subgroups ?? true);
  const wide = columns % 4 === 0;
  const inRow = Math.ceil(columns / 4);
  if (rowTuning.registers ?? (!isSoftware && streams === 1)) {
    for (const threads of [32, 64, 128, 256, 512]) {
      const quads = 2 ** Math.ceil(Math.log2(Math.max(1, inRow / threads)));
      const most = threads === 512 ? 16 : 8;
      if (threads <= limits.maxComputeInvocationsPerWorkgroup && quads <= most) {
        return { threads, quads, wide, subgroups };
      }
    }
  }
  return { threads: inRow <= 64 ? 32 : 256, quads: 0, wide, subgroups };
}

/** A short text that names a plan, for keys of kernel variants. */
export function planKey({ threads, quads, wide, subgroups }: RowPlan): string {
  return `${threads},${quads},${wide ? "wide" : "narrow"},${subgroups ? "subgroups" : "tree"}`;
}

/** The plan that `planKey` named. */
export function parsePlan(key: string): RowPlan {
  const [threads, quads, wide, subgroups] = key.split(",");
  return {
    threads: Number(threads),
    quads: Number(quads),
    wide: wide === "wide",
    subgroups: subgroups === "subgroups",
  };
}

/** How a buffer of rows is declared under a plan. */
export function rowBuffer(access: "read" | "write", element: Element, plan: RowPlan): BufferType {
  const vector = { f32: "vec4f", f16: "vec4h", i32: "vec4i", u32: "vec4u" } as const;
  return `${access} ${plan.wide ? vector[element] : element}`;
}

/** One softmax normaliser of a row: of `value` (a vec4f in the body of `each`) times `k`. Defines NAME_max and NAME_rest: log Σ eᵏˣ = k·max + log1p(rest). */
export interface Normaliser {
  name: string;
  value: string;
  k: string;
  /** A stream whose value at the row's largest `value` is wanted too, as NAME_at. */
  at?: string;
}

/** The pieces of a kernel over rows. */
export interface RowCode {
  head: string;
  /** Defines `row_base` and reads the row where registers keep it. Needs `row`. */
  begin: string;
  /** A loop over the row. The body sees `columns4` (vec4u), `live4` (whether those exist) and one `NAME4` (vec4f) a stream; a column past the end reads LOW. */
  each: (body: string) => string;
  /** The sum or maximum of a vec4f over the workgroup, which every thread gets. Not inside a branch. */
  sum: (x: string) => string;
  max: (x: string) => string;
  /** The normalisers of the row; `also` is done in the first loop over it. */
  normalise: (of: Normaliser[], also?: string) => string;
}

/** The code for rows of `params.columns` columns: `streams` are read, `outputs` written (by WGSL name: `store_NAME`). An output may be a stream. */
export function rowCode(plan: RowPlan, streams: Record<string, Element>, outputs: Record<string, Element>): RowCode {
  const { threads, quads, wide, subgroups } = plan;
  const width = wide ? 4 : 1;
  const lanes = [..."xyzw"];
  const load = Object.keys(streams).map((name) =>
    wide
      ? `fn load_${name}(base: u32, c: vec4u) -> vec4f {
  // no branch, so that many loads are in flight
  return select(vec4f(LOW), vec4f(${name}[base + min(c.x, params.columns - 4u) / 4u]), c.x < params.columns);
}`
      : `fn load_${name}(base: u32, c: vec4u) -> vec4f {
  let last = params.columns - 1u;
  let x = vec4f(${lanes.map((l) => `f32(${name}[base + min(c.${l}, last)])`).join(", ")});
  return select(vec4f(LOW), x, c < vec4u(params.columns));
}`
  ).join("\n");
  const store = Object.entries(outputs).map(([name, element]) =>
    wide
      ? `fn store_${name}(base: u32, c: vec4u, x: vec4f) { if (c.x < params.columns) { ${name}[base + c.x / 4u] = ${
        element === "f16" ? "vec4h" : "vec4f"
      }(x); } }`
      : `fn store_${name}(base: u32, c: vec4u, x: vec4f) {
  ${lanes.map((l) => `if (c.${l} < params.columns) { ${name}[base + c.${l}] = ${element}(x.${l}); }`).join("\n  ")}
}`
  ).join("\n");
  const columns = (step: string) =>
    wide
      ? `(${step} * ${threads}u + lane) * 4u + vec4u(0u, 1u, 2u, 3u)`
      : `${step} * ${4 * threads}u + lane + vec4u(0u, ${threads}u, ${2 * threads}u, ${3 * threads}u)`;
  const names = Object.keys(streams);
  const kept = Array.from({ length: quads }, (_, q) => q);
  const each = (body: string) =>
    quads > 0
      ? kept.map((q) =>
        `{
    let columns4 = ${columns(`${q}u`)};
    let live4 = columns4 < vec4u(params.columns);
    ${names.map((name) => `let ${name}4 = ${name}_${q};`).join(" ")}
    ${body}
  }`
      ).join("\n  ")
      : `for (var step = 0u; step * ${4 * threads}u < params.columns; step++) {
    let columns4 = ${columns("step")};
    let live4 = columns4 < vec4u(params.columns);
    ${names.map((name) => `let ${name}4 = load_${name}(row_base, columns4);`).join(" ")}
    ${body}
  }`;
  let meetings = 0;
  // two regions by turns, so that one barrier a meeting is enough
  const meet = (kind: "sum" | "max") => (x: string) =>
    subgroups ? `all_${kind}(lane, ${x}, ${meetings++ % 2}u)` : `all_${kind}(lane, ${x})`;
  const sum = meet("sum"), max = meet("max");
  return {
    head: `const LOW = -3.40282346638528859812e38; // the least finite number
const THREADS = ${threads}u;
${load}
${store}
${subgroups ? subgroupMeetings(threads) : ""}
${treeMeetings(threads, subgroups)}`,
    begin: `let row_base = row * (params.columns / ${width}u);
  ${
      kept.map((q) =>
        names.map((name) => `let ${name}_${q} = load_${name}(row_base, ${columns(`${q}u`)});`).join("\n  ")
      ).join("\n  ")
    }`,
    each,
    sum,
    max,
    normalise: (of, also = "") => quads > 0 ? normaliseKept(of, also, each, sum, max) : normaliseOnline(of, also, each),
  };
}

const pairs = <T>(all: T[]): T[][] => all.flatMap((_, i) => i % 2 === 0 ? [all.slice(i, i + 2)] : []);

/** Rows in registers: the maxima first, then the terms, without a branch. */
function normaliseKept(
  of: Normaliser[],
  also: string,
  each: RowCode["each"],
  sum: RowCode["sum"],
  max: RowCode["max"],
): string {
  return pairs(of).map((pair, p) => {
    const field = (i: number) => "xyzw"[i];
    const companions = pair.map(({ at }) => at);
    return `var top${p} = vec4f(LOW);
  ${
      each(`${
        pair.map(({ value }, i) =>
          `top${p}.${field(i)} = max(top${p}.${field(i)}, max_of(select(vec4f(LOW), ${value}, live4)));`
        ).join(" ")
      } ${p === 0 ? also : ""}`)
    }
  let tops${p} = ${max(`top${p}`)};
  ${pair.map(({ name }, i) => `let ${name}_max = tops${p}.${field(i)};`).join(" ")}
  var terms${p} = vec4f(0.0);
  ${companions.some(Boolean) ? `var beside${p} = vec4f(LOW);` : ""}
  ${
      // the largest terms are counted, so that the sum of the others keeps its digits
      each(
        pair.map(({ name, value, k, at }, i) =>
          `{ let is_max4 = ${value} == vec4f(${name}_max);
      terms${p}.${
            field(2 * i)
          } += sum_of(select(vec4f(0.0), select(exp((${value} - ${name}_max) * ${k}), vec4f(0.0), is_max4), live4));
      terms${p}.${field(2 * i + 1)} += sum_of(select(vec4f(0.0), vec4f(1.0), live4 & is_max4));
      ${
            at
              ? `beside${p}.${field(i)} = max(beside${p}.${
                field(i)
              }, max_of(select(vec4f(LOW), ${at}4, live4 & is_max4)));`
              : ""
          } }`
        ).join("\n    "),
      )}
  let sums${p} = ${sum(`terms${p}`)};
  ${
      pair.map(({ name }, i) => `let ${name}_rest = sums${p}.${field(2 * i)} + (sums${p}.${field(2 * i + 1)} - 1.0);`)
        .join(" ")
    }
  ${companions.some(Boolean) ? `let besides${p} = ${max(`beside${p}`)};` : ""}
  ${pair.map(({ name, at }, i) => at ? `let ${name}_at = besides${p}.${field(i)};` : "").join(" ")}`;
  }).join("\n  ");
}

/** Rows that are read again by every loop: maxima and terms in one loop. */
function normaliseOnline(of: Normaliser[], also: string, each: RowCode["each"]): string {
  const companions = of.filter(({ at }) => at);
  return `${of.map(({ name }) => `var ${name}_part = vec2f(LOW, -1.0);`).join(" ")}
  ${companions.map(({ name }) => `var ${name}_best = vec2f(LOW, 0.0);`).join(" ")}
  ${
    each(`${
      of.map(({ name, value, k }) =>
        `${name}_part = add_normaliser(${name}_part, select(vec4f(LOW), ${value}, live4), live4, ${k});`
      ).join(" ")
    }
    ${
      companions.map(({ name, value, at }) =>
        `{ let best = max_of(${value}); if (best > ${name}_best.x) { ${name}_best = vec2f(best, where_equal(${value}, best, ${at}4)); } }`
      ).join(" ")
    } ${also}`)
  }
  ${
    pairs(of).map((pair, p) => {
      const [a, b] = [pair[0], pair[1] ?? pair[0]];
      return `let whole${p} = all_normalisers(lane, vec4f(${a.name}_part, ${b.name}_part), vec2f(${a.k}, ${b.k}));
  ${
        pair.map(({ name }, i) => `let ${name}_max = whole${p}.${"xz"[i]}; let ${name}_rest = whole${p}.${"yw"[i]};`)
          .join(" ")
      }`;
    }).join("\n  ")
  }
  ${
    pairs(companions).map((pair, p) => {
      const [a, b] = [pair[0], pair[1] ?? pair[0]];
      return `let best${p} = all_best(lane, vec4f(${a.name}_best, ${b.name}_best));
  ${pair.map(({ name }, i) => `let ${name}_at = best${p}.${"yw"[i]};`).join(" ")}`;
    }).join("\n  ")
  }`;
}

/** Sums and maxima by subgroups: within each, then over what each has put into workgroup memory. */
function subgroupMeetings(threads: number): string {
  const meeting = (name: string, operation: string, start: string, join: (a: string, b: string) => string) => `
fn all_${name}(lane: u32, x: vec4f, turn: u32) -> vec4f {
  let own = ${operation}(x);
  let region = turn * ${threads / 4}u;
  if (subgroup_lane == 0u) { subgroup_results[region + lane / subgroup_size] = own; }
  workgroupBarrier();
  var part = vec4f(${start});
  for (var i = subgroup_lane; i < ${threads}u / subgroup_size; i += subgroup_size) { part = ${
    join("part", "subgroup_results[region + i]")
  }; }
  return ${operation}(part);
}`;
  return `var<workgroup> subgroup_results: array<vec4f, ${threads / 2}>; // two regions, subgroups of at least 4
${meeting("sum", "subgroupAdd", "0.0", (a, b) => `${a} + ${b}`)}
${meeting("max", "subgroupMax", "LOW", (a, b) => `max(${a}, ${b})`)}
`;
}

/** Meetings by a tree in workgroup memory: sums and maxima where there are no subgroups, and the online softmax normaliser. */
function treeMeetings(threads: number, subgroups: boolean): string {
  const tree = (join: string) => `
  meeting[lane] = x;
  for (var half = ${threads / 2}u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) { ${join} }
  }
  let result = workgroupUniformLoad(&meeting[0]);
  return result;`;
  return `
var<workgroup> meeting: array<vec4f, ${threads}>;

${
    subgroups ? "" : `fn all_sum(lane: u32, x: vec4f) -> vec4f {${tree("meeting[lane] += meeting[lane + half];")}
}

fn all_max(lane: u32, x: vec4f) -> vec4f {${tree("meeting[lane] = max(meeting[lane], meeting[lane + half]);")}
}`
  }

// of two (value, companion) pairs at once, those with the largest values; of equal ones the lowest lane's
fn all_best(lane: u32, x: vec4f) -> vec4f {${
    tree(`let a = meeting[lane]; let b = meeting[lane + half];
      meeting[lane] = vec4f(select(a.xy, b.xy, b.x > a.x), select(a.zw, b.zw, b.z > a.z));`)
  }
}

// y where x is m, at the first such place
fn where_equal(x: vec4f, m: f32, y: vec4f) -> f32 {
  return select(select(select(y.w, y.z, x.z == m), y.y, x.y == m), y.x, x.x == m);
}

fn sum_of(x: vec4f) -> f32 { return (x.x + x.y) + (x.z + x.w); }
fn max_of(x: vec4f) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// A normaliser (m, r) of x/T, with k = 1/T, stands for eᵐᵏ·(1 + r): r is the sum of all but the largest term relative to it, so that a
// peaked row keeps its digits: log Σ = mk + log1p(r). m is not scaled, so that x − m is exact for near ones. The empty one is (LOW, −1).
fn join_normaliser(a: vec2f, b: vec2f, k: f32) -> vec2f {
  let larger = select(b, a, a.x >= b.x);
  let smaller = select(a, b, a.x >= b.x);
  let e = select(exp((smaller.x - larger.x) * k), 1.0, smaller.x == larger.x);
  return vec2f(larger.x, larger.y + (smaller.y + 1.0) * e);
}

// adds the terms that are live
fn add_normaliser(n: vec2f, x: vec4f, live: vec4<bool>, k: f32) -> vec2f {
  let m = max_of(x);
  if (m > n.x) { // the old largest becomes one of the others
    let e = select(vec4f(0.0), exp((x - m) * k), live);
    // all four but one instance of the largest
    return vec2f(m, (n.y + 1.0) * exp((n.x - m) * k) + rest_of(e));
  }
  return vec2f(n.x, n.y + sum_of(select(vec4f(0.0), exp((x - n.x) * k), live)));
}

// the sum of four numbers without one that is exactly 1
fn rest_of(e: vec4f) -> f32 {
  if (e.x == 1.0) { return e.y + e.z + e.w; }
  if (e.y == 1.0) { return e.x + e.z + e.w; }
  if (e.z == 1.0) { return e.x + e.y + e.w; }
  return e.x + e.y + e.z;
}

// two normalisers at once: (xy) and (zw)
fn all_normalisers(lane: u32, x: vec4f, k: vec2f) -> vec4f {${
    tree(`let a = meeting[lane]; let b = meeting[lane + half];
      meeting[lane] = vec4f(join_normaliser(a.xy, b.xy, k.x), join_normaliser(a.zw, b.zw, k.y));`)
  }
}
`;
}
