/**
 * Divergences between rows of student logits and rows of teacher logits at temperature T, alone or with cross-entropy added (distillation). One kernel
 * computes values and gradients.
 *
 *   p = softmax(teacher/T), q = softmax(student/T), d = log q − log p, m = βp + (1−β)q, u = log(m/p), v = log(m/q), r = (q−p)/m
 *
 * The careful formulas do not subtract logarithms. d is (student − teacher)/T minus a normaliser c. For close rows (nearly equal distributions)
 * c = log1p(Σ p·expm1(…)), so that d keeps its digits and identical rows give exactly 0. Every term of a sum is p·F(d) ≥ 0. A KL, for example, is
 * Σ p·(eᵈ − 1 − d); the added eᵈ − 1 sums to Σq − Σp = 0. For |d| < 1, F(d)/d² is a polynomial in d, which the host fits for the given β: it needs no
 * logarithm, and nothing cancels. For larger |d| the formulas are used as written.
 *
 * Few rows need all of this care. So the first loops over a row (the fast ones) take sums relative to the largest of the first logits instead of the row's
 * largest. For rows that are far apart they use the formulas as written, for near ones they keep the digits of d. If the result can be trusted, they write the
 * gradient and end. Otherwise the careful loops read the row again. With this, forwardKl of 4096×32000 takes an H100 0.54 ms (the speed of a copy) instead of
 * 0.91, jsd 0.60 instead of 1.58.
 */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { type BufferType, variants } from "./gpu/kernel.ts";
import { type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { type DivergenceName, FORMULAS } from "./divergence_formulas.ts";
import { careful, centring } from "./divergence_careful.ts";
import { fast } from "./divergence_fast.ts";
import {
  COEFFICIENTS,
  inHalves,
  keepsH,
  LOG2E,
  MANY,
  SLIGHT,
  TERMS,
  type Variant,
  type Way,
} from "./divergence_variant.ts";
import { fit, MATH, MATH4 } from "./math.ts";
import { planRow, rowBuffer, rowCode, type RowPlan, type Upstream } from "./row.ts";

const keepingNothing = (plan: RowPlan): RowPlan => ({ ...plan, quads: 0, sure: 0, more: true });

const kernel = variants(({ plan, ...v }: Variant & { plan: RowPlan }) => {
  const formula = FORMULAS[v.name];
  const outputs: Record<string, Element> = {};
  const [dStudentName, dTeacherName] = v.inPlace ? ["student", "teacher"] : ["d_student", "d_teacher"];
  if (v.dStudent) outputs[dStudentName] = v.student;
  if (v.dTeacher) outputs[dTeacherName] = v.teacher;
  const streams = { student: v.student, teacher: v.teacher };
  const exact = rowCode(keepingNothing(plan), streams, outputs),
    row = v.fast
      ? rowCode(plan, streams, outputs, { finite: !inHalves(v), halves: inHalves(v), extra: keepsH(v) ? ["h"] : [] })
      : exact;
  const student = v.dStudent ? formula.student : null, teacher = v.dTeacher ? formula.teacher : null;
  const write = (name: string, scale: string, gradient: string) => `store_${name}(at4, live4, ${scale} * (${gradient})`;
  const writeStudent = (gradient: string, beside: string) =>
    v.dStudent ? `${write(dStudentName, "student_scale", gradient)}${v.crossEntropy ? ` + ${beside}` : ""});` : "";
  const writeTeacher = (gradient: string) => v.dTeacher ? `${write(dTeacherName, "teacher_scale", gradient)});` : "";
  const zero = Object.keys(outputs).map((name) => `store_${name}(at4, live4, vec4f(0.0));`).join(" ");
  const finish = `if (lane == 0u) {
    ${
    v.crossEntropy
      ? `let ce_scale = params.ce_factor * given[1].y;
    ce_rows[at] = given_ce * given[1].y;
    divergence_rows[at] = value * given[0].w * params.part_factor;
    loss[at] = select(ce_scale * given_ce, 0.0, ce_scale == 0.0) + select(given[0].z * value, 0.0, given[0].z == 0.0);`
      : "loss[at] = given[0].z * value;"
  }
  }`;
  // Without labels there is nothing to read, and to wait for, that only rows with labels need. What is needed late one thread computes behind the fast loops'
  // first maximum, which would otherwise wait for what this thread reads
  const ifLabels = v.crossEntropy ? "" : "if (dropping) ";
  const given = row.once(`var kept_scale = 1.0;
    ${ifLabels}{ kept_scale = select(0.0, 1.0 / counts[0], counts[0] != 0.0); }
    let row_scale = select(1.0, select(1.0 / f32(params.all_rows), kept_scale, dropping), is_mean);
    let divergence_scale = params.divergence_factor * row_scale;
    var up = 1.0;
    if (params.scaled == 1u) { up = upstream[at * params.upstream_stride]; }
    let scale = up * divergence_scale * k;
    given[0] = vec4f(scale * ${student ? student.weight : "1.0"}, scale * ${
    teacher ? teacher.weight : "1.0"
  }, divergence_scale, row_scale);
    ${
    v.crossEntropy
      ? `let label = u32(labels[at]);
    // a label that is not a class makes its row NaN: it came from the GPU, so the host could not check it
    let ce_scale = select(select(nan_(), select(1.0, kept_scale, is_mean), label < params.columns), 0.0, ignored);
    given[1] = vec4f(up, ce_scale, logits(row, min(label, params.columns - 1u)));
    given_label = select(label, IGNORED, ignored);`
      : ""
  }`);
  const way: Way = { v, plan, formula, row, exact, student, teacher, writeStudent, writeTeacher, finish, given };
  return {
    name: v.crossEntropy ? "distillation" : v.name === "halfJsd" ? "jsd" : v.name,
    buffers: {
      student: rowBuffer(v.inPlace && v.dStudent ? "write" : "read", v.student),
      teacher: rowBuffer(v.inPlace && v.dTeacher ? "write" : "read", v.teacher),
      labels: "read i32",
      counts: "read f32",
      upstream: "read f32",
      loss: "write f32",
      ...v.crossEntropy ? { ceRows: "write f32" as BufferType, divergenceRows: "write f32" as BufferType } : {},
      ...v.dStudent && !v.inPlace ? { dStudent: rowBuffer("write", v.student) } : {},
      ...v.dTeacher && !v.inPlace ? { dTeacher: rowBuffer("write", v.teacher) } : {},
    },
    params: {
      rows: "u32",
      columns: "u32",
      firstRow: "u32",
      allRows: "u32",
      ones: "u32",
      mean: "u32",
      drop: "u32",
      ignoreIndex: "i32",
      scaled: "u32",
      upstreamStride: "u32",
      inverseTemperature: "f32",
      beta: "f32",
      alpha: "f32",
      ceFactor: "f32",
      divergenceFactor: "f32",
      partFactor: "f32",
      ...formula.bound ? { bound: "f32" as const } : {},
      ...formula.mixes ? { share: "f32" as const, gentle: "f32" as const } : {},
      ...student?.centred ? { studentRatio: "f32" as const } : {},
      ...teacher?.centred ? { teacherRatio: "f32" as const } : {},
      ...typeof formula.near === "function" ? Object.fromEntries(COEFFICIENTS.map((c) => [c, "f32" as const])) : {},
    },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: `${MATH}${MATH4}${row.head}
${student?.centred ? centring("student", student.centred) : ""}${
      teacher?.centred ? centring("teacher", teacher.centred) : ""
    }
const flip = ${v.flip}; // whether the student's side has the smaller weight in the mixture
const NEAR = 1u;
const LIKELY = 2u;
// values that are used late, kept here because registers are scarce (distillation of 4096×32000 took an H100 0.62 ms with them in registers, now 0.57): the
// scales of the student's gradient, the teacher's gradient, the loss, and the row of the divergence
${row.shared("given", `array<vec4f, ${v.crossEntropy ? 2 : 1}>`)}
${
      v.crossEntropy
        ? `// then the upstream gradient, the scale of cross-entropy, the label's logits; the label or IGNORED, and its cross-entropy
${row.shared("given_label", "u32")}
${row.shared("findings", "u32")}
${row.shared("given_ce", "f32")}
const IGNORED = 0xffffffffu;`
        : ""
    }
// s − t and its rounding error (Møller 1965, Knuth 1969), so that an offset of all logits of one side costs no digits
fn apart_(s: f32, t: f32) -> vec2f {
  let gap = opaque_(s - t);
  let less = opaque_(gap - s);
  return vec2f(gap, (s - opaque_(gap - less)) - (t + less));
}
fn apart4_(s: vec4f, t: vec4f, from_: vec2f) -> vec4f {
  let gap = opaque4_(s - t);
  let less = opaque4_(gap - s);
  let rest = (s - opaque4_(gap - less)) - (t + less);
  return select((gap - from_.x) + (rest - from_.y), gap - from_.x, abs(gap) > vec4f(1e30)); // infinities have no rounding error
}
// x, hidden from the compiler: it must not simplify (a + b) − a to b, or (h − centre) − mean to h − (centre + mean)
fn opaque_(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) & params.ones); }
fn opaque4_(x: vec4f) -> vec4f { return bitcast<vec4f>(bitcast<vec4u>(x) & vec4u(params.ones)); }
${
      v.crossEntropy
        ? `fn logits(row: u32, c: u32) -> vec2f {
  let at = row * params.columns + c;
  return vec2f(f32(student[at / 4u][at % 4u]), f32(teacher[at / 4u][at % 4u]));
}`
        : ""
    }`,
    main: `let row = group;
  if (row >= params.rows) { return; }
  let at = params.first_row + row; // in the whole batch, of which the logits may be a chunk
  let k = params.inverse_temperature;
  let k2 = k * ${LOG2E}; // exponentials are powers of two
  ${v.crossEntropy ? "let temperature = 1.0 / k;" : ""}
  let beta = params.beta;
  let alpha = params.alpha;
  let is_mean = params.mean == 1u;
  ${row.begin}
  let dropping = params.drop == 1u;
  var ignored = false;
  ${ifLabels}{ ignored = labels[at] == params.ignore_index; }
  if (ignored && dropping) {
    if (lane == 0u) { loss[at] = 0.0; ${v.crossEntropy ? "ce_rows[at] = 0.0; divergence_rows[at] = 0.0;" : ""} }
    ${zero ? exact.each(zero) : ""}
    return;
  }
  ${v.fast ? `{ ${fast(way)} }` : given}

  ${careful(way)}`,
  };
});

/** The memories of one launch. */
export interface DivergenceBuffers {
  student: Memory;
  teacher: Memory;
  labels: Memory | null;
  /** From `countRows` if there are labels; else any memory that is not used otherwise here. */
  counts: Memory;
  upstream: Upstream | null;
  loss: Memory;
  /** For distillation: the rows of its two parts. */
  parts: { ceRows: Memory; divergenceRows: Memory } | null;
  /** May be the student's own memory; then `dTeacher` is the teacher's or null. */
  dStudent: Memory | null;
  dTeacher: Memory | null;
}

/** The numbers of one launch. */
export interface DivergenceNumbers {
  /** The rows of these logits: those from `firstRow` on of a batch with `allRows` rows. */
  rows: number;
  firstRow: number;
  allRows: number;
  columns: number;
  mean: boolean;
  /** Whether rows with an ignored label are left out; false if there are no labels. */
  drop: boolean;
  ignoreIndex: number;
  temperature: number;
  /** Weight of p in the mixture. */
  beta: number;
  ceFactor: number;
  divergenceFactor: number;
  /** Factor of the divergence's rows in `parts`; 1 by default. */
  partFactor?: number;
}

/** The largest f32 that is not above x > 0. */
function floorOfF32(x: number): number {
  const bits = new Uint32Array(1), f32 = new Float32Array(bits.buffer);
  f32[0] = x;
  if (f32[0] > x) bits[0]--;
  return f32[0];
}

const fits = new Map<string, Record<string, number>>();

/** The coefficients of a divergence's `POLYNOMIAL`. Those of a jsd take the host 50 µs, so that they are kept. */
function fitted(name: Variant["name"], beta: number): Record<string, number> {
  const { near } = FORMULAS[name], key = `${name} ${beta}`;
  if (typeof near !== "function") return {};
  let found = fits.get(key);
  if (!found) {
    const coefficients = fit((d) => near(d, beta) / (d * d), -1, 1, TERMS);
    found = Object.fromEntries(COEFFICIENTS.map((name, i) => [name, coefficients[i]]));
    if (fits.size >= 1000) fits.clear(); // β may change in every step
    fits.set(key, found);
  }
  return found;
}

const ofRows = remembered<Launch>();

/** Computes the loss of each row (scaled for the mean), and the gradients if `dStudent` or `dTeacher` is given. */
export function divergenceRows(
  name: DivergenceName,
  student: Element,
  teacher: Element,
  b: DivergenceBuffers,
  n: DivergenceNumbers,
): void {
  const { parts, dStudent, dTeacher, upstream, ...rest } = b,
    inPlace = dStudent === b.student || dTeacher === b.teacher;
  // deno-fmt-ignore
  const key = [
    name, student, teacher, dStudent !== null, dTeacher !== null, inPlace, parts !== null, upstream?.stride, n.rows, n.firstRow, n.allRows, n.columns, n.mean,
    n.drop, n.ignoreIndex, n.temperature, n.beta, n.ceFactor, n.divergenceFactor, n.partFactor,
  ];
  const launch = ofRows(key, () => {
    const share = Math.min(n.beta, 1 - n.beta),
      { student: ofStudent, teacher: ofTeacher, mixes, bound } = FORMULAS[name];
    const isHalf = name === "jsd" && n.beta === 0.5;
    // h of the fast loops would cancel where nearly all of the mixture is the own side's
    const isSlight = dStudent !== null && ofStudent?.centred === "both" && n.beta < SLIGHT ||
      dTeacher !== null && ofTeacher?.centred === "both" && 1 - n.beta < SLIGHT;
    // without a gradient, rows in which a mixture's logarithm is tiny compared to d could not be detected
    const isFast = n.columns >= MANY && n.temperature >= 1e-6 && !isSlight &&
      (!mixes || isHalf || dStudent !== null || dTeacher !== null);
    const variant: Variant = {
      name: isHalf ? "halfJsd" : name,
      student,
      teacher,
      dStudent: dStudent !== null,
      dTeacher: dTeacher !== null,
      crossEntropy: parts !== null,
      inPlace,
      flip: mixes === true && n.beta > 0.5,
      fast: isFast,
      power: isFast && parts && (n.temperature === 1 || n.temperature === 2) ? n.temperature : null,
      fused: !gpu().info.isSoftware,
    };
    const walk = planRow(n.columns, "two", { halves: inHalves(variant), extra: keepsH(variant) !== null });
    const plan = isFast ? walk : keepingNothing(walk);
    const params = {
      ...n,
      ones: 2 ** 32 - 1,
      mean: n.mean ? 1 : 0,
      drop: n.drop ? 1 : 0,
      scaled: upstream ? 1 : 0,
      upstreamStride: upstream?.stride ?? 0,
      inverseTemperature: 1 / n.temperature,
      alpha: 1 - n.beta, // in float64: 1 − 0.9 in float32 is off by 2e-7
      partFactor: n.partFactor ?? 1,
      bound: bound ? floorOfF32(bound(n.beta)) : 0,
      share,
      gentle: share > 0 ? Math.log(1 / share + 1) : Infinity,
      studentRatio: n.beta / (1 - n.beta),
      teacherRatio: (1 - n.beta) / n.beta,
      ...fitted(variant.name, n.beta),
    };
    return launchOf(kernel({ ...variant, plan }), params, n.rows);
  });
  // bindings that are not read need some memory, too
  const unread = { labels: b.labels ?? b.counts, upstream: upstream?.memory ?? b.counts };
  runLaunch(launch, { ...rest, ...parts, dStudent, dTeacher, ...unread });
}
