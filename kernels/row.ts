/**
 * What kernels that work a row at a time share: a workgroup takes a row, its threads take columns four at a time, and loops over the row
 * are written once as `each(body)`. A plan says how a body becomes code: a real loop that reads memory again each time, or, where the row
 * fits the registers of the workgroup, one read and unrolled copies of the body.
 */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import type { BufferType } from "./gpu/kernel.ts";
import type { RowLimits, RowWork } from "./gpu/tuning.ts";

/** How a row is walked. `quads` vec4s a thread of each stream stay in registers, the whole row; 0: every loop reads the row again. */
export interface RowPlan {
  threads: number;
  quads: number;
  /** Whether memory is read by whole vec4s: the row's length is a multiple of 4. */
  wide: boolean;
  /** Whether threads meet through subgroups rather than a tree in workgroup memory. */
  subgroups: boolean;
}

/** Overrides for tests and tuning: `registers` forces rows into registers or never does, `subgroups` likewise (where there are any), `plan` single numbers. */
export const rowTuning: { registers: boolean | null; subgroups: boolean | null; plan: Partial<RowPlan> } = {
  registers: null,
  subgroups: null,
  plan: {},
};

/**
 * What an adapter gets that was not measured. On an H200 (copy 3.98 TB/s) cross-entropy of 4096×32000 took 0.29 ms, 91 % of a copy's speed, with rows in registers
 * of 512 threads; forwardKl 0.64 ms reading rows again, 0.66 with 16 vec4s of each matrix a thread, which spill, and 0.70 or more with a part of the row in registers
 * or in workgroup memory; jsd 0.95, 1.75 and 1.08 ms.
 */
export function defaultRowLimits(isSoftware: boolean): Record<RowWork, RowLimits> {
  if (isSoftware) {
    const limits = { threads: 512, quads: 0, again: 256 };
    return { one: limits, two: limits };
  }
  return { one: { threads: 512, quads: 16, again: 1024 }, two: { threads: 512, quads: 8, again: 256 } };
}

/** The plan for rows of `columns`. */
export function planRow(columns: number, work: RowWork): RowPlan {
  const { isSoftware, limits, subgroups: able, tuning } = gpu().info;
  const more = { wide: columns % 4 === 0, subgroups: able && (rowTuning.subgroups ?? true), ...rowTuning.plan };
  const inRow = Math.ceil(columns / 4), fit = limits.maxComputeInvocationsPerWorkgroup;
  const { threads, quads, again } = (tuning?.rows ?? defaultRowLimits(isSoftware))[work];
  const most = Math.min(threads, fit), registers = rowTuning.registers ?? quads > 0;
  for (let n = 32; registers && n <= most; n *= 2) {
    const each = Math.max(1, Math.ceil(inRow / n));
    if (each <= (n === most ? quads || 8 : Math.min(quads || 8, 8))) return { threads: n, quads: each, ...more };
  }
  return { threads: inRow <= 64 ? 32 : Math.min(again, fit), quads: 0, ...more };
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

/** The vector that an element is read as. */
const kindOf = (element: Element) => element === "f16" ? "vec4h" : "vec4f";

/** One softmax normaliser of a row: of `value` (a vec4f in the body of `each`) times `k`. Defines NAME_max and NAME_rest: log Σ eᵏˣ = k·max + log1p(rest). */
export interface Normaliser {
  name: string;
  value: string;
  k: string;
  /** A stream whose value at the row's largest `value` is wanted too, as NAME_at. */
  at?: string;
  /** What `value` is a growing function of, and that function of an f32: then the largest is looked for without it. */
  grows?: { from: string; by: string };
}

/** The pieces of a kernel over rows. */
export interface RowCode {
  head: string;
  /** Defines `row_base` and reads what registers keep. Needs `row`. */
  begin: string;
  /**
   * A loop over the row. The body sees `columns4` (vec4u), `live4` (whether those exist), `step` (which columns the workgroup is at: those from
   * step·4·THREADS on) and one `NAME4` (vec4f) a stream; a column past the end reads LOW, or, where rows are
   * read by whole vec4s, is not seen at all. Loops run forward and backward by turns: what was read last is in the cache.
   */
  each: (body: string) => string;
  /** Whether a body may leave something else in a stream's place for the next loop: `kept_NAME = x`. */
  leaves: boolean;
  /** The sum or maximum of an f32, vec2f or vec4f over the workgroup, which every thread gets. Not inside a branch. */
  sum: (x: string, type?: Meeting) => string;
  max: (x: string, type?: Meeting) => string;
  /** The normalisers of the row; `also` is done in the first loop over it. */
  normalise: (of: Normaliser[], also?: string) => string;
}

type Meeting = "f32" | "vec2f" | "vec4f";
const MEETINGS: Meeting[] = ["f32", "vec2f", "vec4f"];

/**
 * The code for rows of `params.columns` columns: `streams` are read, `outputs` written (by WGSL name: `store_NAME(row_base, columns4, live4, x)`). An output may be a stream.
 */
export function rowCode(plan: RowPlan, streams: Record<string, Element>, outputs: Record<string, Element>): RowCode {
  const { threads, quads, wide, subgroups } = plan;
  const width = wide ? 4 : 1;
  const lanes = [..."xyzw"];
  // a column that does not exist reads the row's first, so that there is no branch and many reads are under way
  const load = Object.entries(streams).map(([name, element]) => {
    const to = kindOf(element);
    return `fn load_${name}(base: u32, c: vec4u, live: vec4<bool>) -> ${to} {
  return ${to}(${
      wide
        ? `${name}[base + select(0u, c.x / 4u, live.x)]`
        : lanes.map((l) => `${name}[base + select(0u, c.${l}, live.${l})]`).join(", ")
    });
}`;
  }).join("\n");
  const store = Object.entries(outputs).map(([name, element]) =>
    `fn store_${name}(base: u32, c: vec4u, live: vec4<bool>, x: vec4f) {
  ${
      wide
        ? `if (live.x) { ${name}[base + c.x / 4u] = ${element === "f16" ? "vec4h" : "vec4f"}(x); }`
        : lanes.map((l) => `if (live.${l}) { ${name}[base + c.${l}] = ${element}(x.${l}); }`).join(" ")
    }
}`
  ).join("\n");
  const columns = (step: string) =>
    wide
      ? `(${step} * ${threads}u + lane) * 4u + vec4u(0u, 1u, 2u, 3u)`
      : `${step} * ${4 * threads}u + lane + vec4u(0u, ${threads}u, ${2 * threads}u, ${3 * threads}u)`;
  const names = Object.keys(streams), floats = names.every((name) => kindOf(streams[name]) === "vec4f");
  // halves take half the registers, unless there are enough
  const kindKept = (name: string) => quads > 8 ? kindOf(streams[name]) : "vec4f";
  const kept = Array.from({ length: quads }, (_, q) => q);
  // whether all columns of a turn exist, as of all but the row's last
  const sure = (q: number) => q < quads - 1;
  const live = (sure: boolean) => sure ? "vec4<bool>(true)" : "(columns4 < vec4u(params.columns))";
  // a turn over four columns: where they are neighbours, all of them exist or none
  const turn = (step: string, sure: boolean, from: (name: string) => string, body: string) =>
    `let step = ${step}; let columns4 = ${columns("step")};
    ${wide && !sure ? "if (columns4.x < params.columns) " : ""}{ let live4 = ${live(wide || sure)};
    ${names.map((name) => `let ${name}4 = select(vec4f(LOW), vec4f(${from(name)}), live4);`).join(" ")}
    ${body} }`;
  let loops = 0;
  const each = (body: string) => {
    const backward = loops++ % 2 === 1;
    // a branch that is always taken keeps compilers from moving one turn's work into another's: they run out of registers
    const turns = kept.map((q) =>
      `${sure(q) ? `if (${4 * threads * q}u < params.columns) ` : ""}{
    ${turn(`${q}u`, sure(q), (name) => `${name}_${q}`, body.replaceAll(/\bkept_(\w+)/g, `$1_${q}`))}
  }`
    );
    if (quads > 0) return turns.join("\n  ");
    const steps = `(params.columns + ${4 * threads - 1}u) / ${4 * threads}u`;
    return `for (var turn = 0u; turn < ${steps}; turn++) {
    ${
      turn(
        backward ? `${steps} - 1u - turn` : "turn",
        false,
        (name) => `load_${name}(row_base, columns4, live4)`,
        body,
      )
    }
  }`;
  };
  let meetings = 0;
  // two regions by turns, so that one barrier a meeting is enough
  const meet = (kind: "sum" | "max") => (x: string, type: Meeting = "vec4f") =>
    subgroups ? `all_${kind}_${type}(lane, ${x}, ${meetings++ % 2}u)` : `all_${kind}_${type}(lane, ${x})`;
  const sum = meet("sum"), max = meet("max");
  return {
    head: `const LOW = -3.40282346638528859812e38; // the least finite number
const THREADS = ${threads}u;
${load}
${store}
${subgroups ? subgroupMeetings(threads) : treeMeetings(threads)}
${ROW_FUNCTIONS}`,
    begin: `let row_base = row * (params.columns / ${width}u);
  ${names.flatMap((name) => kept.map((q) => `var ${name}_${q}: ${kindKept(name)};`)).join(" ")}
  ${
      kept.map((q) =>
        `{ let columns4 = ${columns(`${q}u`)}; ${
          names.map((name) => `${name}_${q} = ${kindKept(name)}(load_${name}(row_base, columns4, ${live(sure(q))}));`)
            .join(" ")
        } }`
      ).join("\n  ")
    }`,
    each,
    leaves: quads > 0 && (floats || quads <= 8),
    sum,
    max,
    normalise: (of, also = "") => (quads > 0 ? normaliseKept : normaliseOnline)(of, also, each, sum, max),
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

const lanes = [..."xyzw"];

/** Rows in registers: the maxima first, then the terms, without a branch. */
const normaliseKept: Normalise = (of, also, each, sum, max) =>
  pairs(of).map((pair, p) => {
    const type = pair.length === 1 ? "f32" : "vec2f", field = (i: number) => pair.length === 1 ? "" : `.${lanes[i]}`;
    const companions = pair.map(({ at }) => at).some(Boolean);
    const key = ({ value, grows }: Normaliser) => grows?.from ?? value;
    // this thread's largest is among the row's: of a function, two that came out alike need not both be
    const mine = ({ name }: Normaliser, i: number) => `(own${p}${field(i)} == ${name}_max)`;
    const isMax = (n: Normaliser, i: number) =>
      n.grows
        ? `(vec4<bool>${mine(n, i)} & (${key(n)} == vec4f(top${p}${field(i)})))`
        : `(${n.value} == vec4f(${n.name}_max))`;
    return `var top${p} = ${type}(LOW);
  ${
      each(
        `${
          pair.map((n, i) =>
            `top${p}${field(i)} = max(top${p}${field(i)}, max_of(select(vec4f(LOW), ${key(n)}, live4)));`
          ).join(" ")
        } ${p === 0 ? also : ""}`,
      )
    }
  let own${p} = ${type}(${
      pair.map(({ grows }, i) => grows ? `${grows.by}(top${p}${field(i)})` : `top${p}${field(i)}`).join(", ")
    });
  let tops${p} = ${max(`own${p}`, type)};
  ${pair.map(({ name }, i) => `let ${name}_max = tops${p}${field(i)};`).join(" ")}
  var terms${p} = vec4f(0.0);
  ${companions ? `var beside${p} = vec2f(LOW);` : ""}
  ${
      // without the largest terms, so that the sum of the others keeps its digits
      each(
        pair.map((n, i) =>
          `terms${p}.${lanes[2 * i]} += sum_of(select(exp((${n.value} - ${n.name}_max) * ${n.k}), vec4f(0.0), ${
            isMax(n, i)
          } | !live4));`
        ).join("\n    "),
      )}
  // those are counted by the threads that have them
  if (${pair.map(mine).join(" || ")}) {
    ${
      each(
        pair.map((n, i) =>
          `{ let is_max4 = live4 & ${isMax(n, i)};
      terms${p}.${lanes[2 * i + 1]} += sum_of(select(vec4f(0.0), vec4f(1.0), is_max4));
      ${
            n.at
              ? `beside${p}.${lanes[i]} = max(beside${p}.${lanes[i]}, max_of(select(vec4f(LOW), ${n.at}4, is_max4)));`
              : ""
          } }`
        ).join("\n    "),
      )
    }
  }
  let sums${p} = ${sum(`terms${p}`)};
  ${
      pair.map(({ name }, i) => `let ${name}_rest = sums${p}.${lanes[2 * i]} + (sums${p}.${lanes[2 * i + 1]} - 1.0);`)
        .join(" ")
    }
  ${companions ? `let besides${p} = ${max(`beside${p}`, "vec2f")};` : ""}
  ${pair.map(({ name, at }, i) => at ? `let ${name}_at = besides${p}.${lanes[i]};` : "").join(" ")}`;
  }).join("\n  ");

/** Rows that loops read again: maxima and terms in one loop. */
const normaliseOnline: Normalise = (of, also, each, sum, max) =>
  `${of.map(({ name }) => `var ${name}_part = vec3f(LOW, 0.0, 0.0);`).join(" ")}
  ${of.filter(({ at }) => at).map(({ name }) => `var ${name}_beside = LOW;`).join(" ")}
  ${
    each(
      of.map(({ name, value, k, at }) =>
        `{ let x = select(vec4f(LOW), ${value}, live4); let top = max_of(x);
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
`;
}

const wider = (type: Meeting, x: string) => ({ f32: `vec4f(${x})`, vec2f: `vec4f(${x}, ${x})`, vec4f: x })[type];
const narrower = (type: Meeting) => ({ f32: ".x", vec2f: ".xy", vec4f: "" })[type];

/** Meetings by a tree in workgroup memory, where there are no subgroups. */
function treeMeetings(threads: number): string {
  const tree = (kind: string, type: Meeting, join: string) => `
fn all_${kind}_${type}(lane: u32, x: ${type}) -> ${type} {
  meeting[lane] = ${wider(type, "x")};
  for (var half = ${threads / 2}u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) { ${join} }
  }
  let result = workgroupUniformLoad(&meeting[0]);
  return result${narrower(type)};
}`;
  return `var<workgroup> meeting: array<vec4f, ${threads}>;
${
    MEETINGS.map((type) =>
      tree("sum", type, "meeting[lane] += meeting[lane + half];") +
      tree("max", type, "meeting[lane] = max(meeting[lane], meeting[lane + half]);")
    ).join("")
  }`;
}

const ROW_FUNCTIONS = `
fn sum_of(x: vec4f) -> f32 { return (x.x + x.y) + (x.z + x.w); }
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
