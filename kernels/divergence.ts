/**
 * Divergences of rows of student logits from rows of teacher logits at temperature T, alone or with cross-entropy beside them
 * (distillation): values and gradients from one trip over both.
 *
 *   p = softmax(teacher/T), q = softmax(student/T), d = log q − log p, m = βp + (1−β)q, u = log(m/p), v = log(m/q), r = (q−p)/m
 *
 * Nothing is a difference of logarithms. d comes from (student − teacher)/T and a normaliser c; for close rows
 * c = log1p(Σ p·expm1(…)), so that d keeps its digits and identical rows give exactly 0. A KL is Σ p·(eᵈ − 1 − d), every
 * term of which is ≥ 0 (the added eᵈ − 1 sums to Σq − Σp = 0).
 */
import type { Element } from "./elementwise.ts";
import { type BufferType, type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { MATH, MATH4 } from "./math.ts";
import { parsePlan, planKey, planRow, rowBuffer, rowCode } from "./row.ts";

/** The divergences that have a kernel. */
export type DivergenceName = "forwardKl" | "reverseKl" | "jsd" | "skewForwardKl" | "skewReverseKl" | "totalVariation";

/**
 * One divergence in WGSL, of p4, q4, d4, diff4 (q − p), beta and near4 (|d| < 1). A gradient is weight·w·(h − E_w h), where w is q for the
 * student and p for the teacher and h a function of d alone; null stands for ±(q − p).
 */
interface Formula {
  value: string;
  student: { weight: string; h: string } | null;
  teacher: { weight: string; h: string } | null;
  /** Whether u, v and r are used. */
  mixture: boolean;
}

// weight·x, where 0·∞ = 0
const times = (weight: string, x: string) => `select(${weight} * (${x}), vec4f(0.0), ${weight} == vec4f(0.0))`;
// p·(eᵈ − 1 − d) and q·(e⁻ᵈ − 1 + d): near 0 by excess = eᵈ − 1 − d, of which the second is p·(d² − excess·(1 − d))
const FORWARD = `select(diff4 - ${times("p4", "d4")}, p4 * excess4, near4)`;
const REVERSE = `select(-diff4 + ${times("q4", "d4")}, p4 * (d4 * d4 - excess4 * (1.0 - d4)), near4)`;
// p·(eᵘ − 1 − u) and q·(eᵛ − 1 − v): the terms of KL(p‖m) and KL(q‖m)
const KL_PM = `select((1.0 - beta) * diff4 - ${times("p4", "u4")}, p4 * excess_series4_(u4), near4)`;
const KL_QM = `select(-beta * diff4 - ${times("q4", "v4")}, q4 * excess_series4_(v4), near4)`;

// `share` ≤ ½ is the smaller weight in the mixture, y the log of its side over the other: log(m/other) = log1p(share·(eʸ − 1)), which does
// not cancel while share·(eʸ − 1) ≤ 1; beyond, log(m/side) = log(share + (1 − share)·e⁻ʸ), a sum of positives
const MIXTURE = `
  let flip = beta > 0.5;
  let share = select(beta, 1.0 - beta, flip);
  let y4 = select(-d4, d4, flip);
  let g4 = share * expm14_(min(y4, vec4f(60.0)));
  let gentle4 = g4 <= vec4f(1.0);
  // one logarithm for both: of m/other where that does not cancel, of m/side elsewhere
  let log_whole4 = log4_(select(share + (1.0 - share) * exp(-y4), 1.0 + g4, gentle4));
  let log4 = select(log_whole4, log1p_series4_(g4), (g4 > vec4f(-0.29)) & (g4 < vec4f(0.41)));
  let log_other4 = select(log4 + y4, log4, gentle4);
  let by_side4 = select(log4, log4 - y4, gentle4);
  let u4 = select(by_side4, log_other4, flip);
  let v4 = select(log_other4, by_side4, flip);
  let r4 = select(-1.0, 1.0, flip) * (expm14_(min(y4, vec4f(60.0))) / (1.0 + g4));`;

const FORMULAS: Record<DivergenceName, Formula> = {
  forwardKl: {
    value: FORWARD,
    student: null,
    teacher: { weight: "1.0", h: "-d4" },
    mixture: false,
  },
  reverseKl: {
    value: REVERSE,
    student: { weight: "1.0", h: "d4" },
    teacher: null,
    mixture: false,
  },
  jsd: {
    value: `beta * ${KL_PM} + (1.0 - beta) * ${KL_QM}`,
    student: { weight: "(1.0 - beta)", h: "-v4" },
    teacher: { weight: "beta", h: "-u4" },
    mixture: true,
  },
  skewForwardKl: { // m = αp + (1−α)q: β = α
    value: KL_PM,
    student: { weight: "1.0", h: "(1.0 - beta) * (1.0 - beta) * r4" },
    teacher: { weight: "1.0", h: "-u4 + beta * (1.0 - beta) * r4" },
    mixture: true,
  },
  skewReverseKl: { // m = (1−α)p + αq: β = 1−α
    value: KL_QM,
    student: { weight: "1.0", h: "-v4 - beta * (1.0 - beta) * r4" },
    teacher: { weight: "1.0", h: "-beta * beta * r4" },
    mixture: true,
  },
  totalVariation: {
    value: "0.5 * abs(diff4)",
    student: { weight: "1.0", h: "0.5 * sign(d4)" },
    teacher: { weight: "1.0", h: "-0.5 * sign(d4)" },
    mixture: false,
  },
};

/** Compile-time choices. */
interface Variant {
  name: DivergenceName;
  student: Element;
  teacher: Element;
  dStudent: boolean;
  dTeacher: boolean;
  /** Whether cross-entropy at T = 1 is added: distillation. */
  crossEntropy: boolean;
  /** Whether gradients overwrite the logits. */
  inPlace: boolean;
  plan: string;
}

const kernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const v = JSON.parse(key) as Variant;
  const plan = parsePlan(v.plan), formula = FORMULAS[v.name];
  const outputs: Record<string, Element> = {};
  const [dStudentName, dTeacherName] = v.inPlace ? ["student", "teacher"] : ["d_student", "d_teacher"];
  if (v.dStudent) outputs[dStudentName] = v.student;
  if (v.dTeacher) outputs[dTeacherName] = v.teacher;
  const { head, begin, each, sum, max, normalise } = rowCode(plan, { student: v.student, teacher: v.teacher }, outputs);
  const mixture = formula.mixture ? MIXTURE : "";
  const terms = `
    let p4 = select(vec4f(0.0), exp((teacher4 - t_max) * k - log_t), live4);
    let q4 = select(vec4f(0.0), exp((student4 - s_max) * k - log_s), live4);
    let dead4 = max(student4, teacher4) < vec4f(-1e38);
    let d4 = select(((student4 - teacher4) - shift) * k - c, vec4f(0.0), dead4);
    let near4 = abs(d4) < vec4f(1.0);
    let excess4 = excess_series4_(d4);
    let diff4 = select(q4 - p4, p4 * (d4 + excess4), near4);
    ${mixture}`;
  const studentMean = v.dStudent && formula.student, teacherMean = v.dTeacher && formula.teacher;
  const centred = (side: "student" | "teacher") => `(${formula[side]!.h} - ${side}_h)`;
  // where registers keep both rows and one gradient is all that is left to do, they take what it is made of
  const left = plan.quads > 0 && !v.crossEntropy
    ? studentMean && !v.dTeacher ? "student" : teacherMean && !v.dStudent ? "teacher" : null
    : null;
  const leave = left ? `kept_student = ${left === "student" ? "q4" : "p4"}; kept_teacher = ${centred(left)};` : "";
  const add = `part += vec4f(sum_of(${formula.value}), ${
    studentMean ? `sum_of(${times("q4", centred("student"))})` : "0.0"
  }, ${teacherMean ? `sum_of(${times("p4", centred("teacher"))})` : "0.0"}, 0.0);`;
  const ceGradient = v.crossEntropy
    ? ` + ce_scale * select(exp(student4 - s_max - log_s1), vec4f(label_excess), columns4 == vec4u(label))`
    : "";
  const dStudent = studentMean
    ? `${studentMean.weight} * ${
      left
        ? times("student4", "settled4_(teacher4) - sums.y")
        : times("q4", `settled4_(${centred("student")}) - sums.y`)
    }`
    : "diff4";
  const dTeacher = teacherMean
    ? `${teacherMean.weight} * ${
      left
        ? times("student4", "settled4_(teacher4) - sums.z")
        : times("p4", `settled4_(${centred("teacher")}) - sums.z`)
    }`
    : "-diff4";
  const writeStudent = v.dStudent
    ? `store_${dStudentName}(row_base, columns4, live4, up * (divergence_scale * k * (${dStudent})${ceGradient}));`
    : "";
  const writeTeacher = v.dTeacher
    ? `store_${dTeacherName}(row_base, columns4, live4, up * divergence_scale * k * (${dTeacher}));`
    : "";
  // a gradient that needs no sum is written in the loop that sums, unless that would overwrite what the next loop reads
  const lateStudent = studentMean || (v.inPlace && teacherMean),
    lateTeacher = teacherMean || (v.inPlace && studentMean);
  const early = (lateStudent ? "" : writeStudent) + (lateTeacher ? "" : writeTeacher);
  const late = (lateStudent ? writeStudent : "") + (lateTeacher ? writeTeacher : "");
  const zero = Object.keys(outputs).map((name) => `store_${name}(row_base, columns4, live4, vec4f(0.0));`).join(" ");
  return {
    name: v.crossEntropy ? "distillation" : v.name,
    buffers: {
      student: rowBuffer(v.inPlace && v.dStudent ? "write" : "read", v.student, plan),
      teacher: rowBuffer(v.inPlace && v.dTeacher ? "write" : "read", v.teacher, plan),
      labels: "read i32",
      counts: "read f32",
      upstream: "read f32",
      loss: "write f32",
      ...v.crossEntropy ? { ceRows: "write f32" as BufferType, divergenceRows: "write f32" as BufferType } : {},
      ...v.dStudent && !v.inPlace ? { dStudent: rowBuffer("write", v.student, plan) } : {},
      ...v.dTeacher && !v.inPlace ? { dTeacher: rowBuffer("write", v.teacher, plan) } : {},
    },
    params: {
      rows: "u32",
      columns: "u32",
      firstRow: "u32",
      allRows: "u32",
      mean: "u32",
      drop: "u32",
      ignoreIndex: "i32",
      scaled: "u32",
      upstreamStride: "u32",
      inverseTemperature: "f32",
      beta: "f32",
      ceFactor: "f32",
      divergenceFactor: "f32",
    },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: `${MATH}${MATH4}${head}
// x, in a form that compilers do not reassociate: (h − centre) − mean must not become h − (centre + mean)
fn settled4_(x: vec4f) -> vec4f { return select(x, vec4f(0.0), x == vec4f(0.0)); }
${
      v.crossEntropy
        ? `fn element(row: u32, c: u32) -> f32 {
  let at = row * params.columns + c;
  return f32(student[at${plan.wide ? " / 4u][at % 4u]" : "]"});
}`
        : ""
    }`,
    main: `let row = group;
  if (row >= params.rows) { return; }
  let at = params.first_row + row; // of the whole batch, of which the logits may be a chunk
  let k = params.inverse_temperature;
  let beta = params.beta;
  let is_mean = params.mean == 1u;
  ${begin}
  let ignored = labels[at] == params.ignore_index;
  let dropping = params.drop == 1u;
  if (ignored && dropping) {
    if (lane == 0u) { loss[at] = 0.0; ${v.crossEntropy ? "ce_rows[at] = 0.0; divergence_rows[at] = 0.0;" : ""} }
    ${zero ? each(zero) : ""}
    return;
  }
  let kept_scale = select(0.0, 1.0 / counts[0], counts[0] != 0.0);
  let row_scale = select(1.0, select(1.0 / f32(params.all_rows), kept_scale, dropping), is_mean);
  let divergence_scale = params.divergence_factor * row_scale;
  let up = select(1.0, upstream[at * params.upstream_stride], params.scaled == 1u);

  // the normalisers, and the range of student − teacher
  var range_part = vec2f(LOW, LOW);
  ${
      normalise(
        [
          { name: "s", value: "student4", k: "k", at: late ? "teacher" : undefined },
          { name: "t", value: "teacher4", k: "k", at: late ? "student" : undefined },
          ...v.crossEntropy ? [{ name: "s1", value: "student4", k: "1.0" }] : [],
        ],
        `let used4 = live4 & (max(student4, teacher4) >= vec4f(-1e38));
    let gap4 = student4 - teacher4;
    range_part = max(range_part, vec2f(max_of(select(vec4f(LOW), gap4, used4)), max_of(select(vec4f(LOW), -gap4, used4))));`,
      )
    }
  let log_s = log1p_(s_rest);
  let log_t = log1p_(t_rest);
  let shift = s_max - t_max;
  let range = ${max("range_part", "vec2f")};
  let close = (range.x + range.y) * k <= 1.0;
  var close_part = 0.0;
  if (close) {
    ${
      each(`let close4 = exp((teacher4 - t_max) * k - log_t) * expm1_series4_(((student4 - teacher4) - shift) * k);
    close_part += sum_of(select(vec4f(0.0), close4, live4 & (max(student4, teacher4) >= vec4f(-1e38))));`)
    }
  }
  let c = select(log_s - log_t, log1p_(${sum("close_part", "f32")}), close);
  ${
      v.crossEntropy
        ? `let log_s1 = log1p_(s1_rest);
  let label = select(u32(labels[at]), 0xffffffffu, ignored);
  let known = label < params.columns;
  var nan_bits = 0x7fc00000u;
  let poison = select(bitcast<f32>(nan_bits), 0.0, known || ignored);
  let ce = select(log_s1 - (element(row, select(0u, label, known)) - s_max), 0.0, ignored) + poison;
  let label_excess = expm1_(-ce);
  let ce_row_scale = select(select(1.0, kept_scale, is_mean), 0.0, ignored);
  let ce_scale = params.ce_factor * ce_row_scale + poison;`
        : ""
    }

  ${
      late
        ? `// h of the likeliest class of each side: h is centred on it, since h − E h would lose its digits where one class has all the weight
  var student_h = 0.0;
  var teacher_h = 0.0;
  {
    let d4 = (vec4f(s_max - s_at, t_at - t_max, 0.0, 0.0) - shift) * k - c; // as in the loops, to the last bit
    ${mixture}
    ${studentMean ? `student_h = (${studentMean.h}).x;` : ""}
    ${teacherMean ? `teacher_h = (${teacherMean.h}).y;` : ""}
  }`
        : ""
    }
  var part = vec4f(0.0);
  ${each(`${terms}\n    ${add}\n    ${early}\n    ${leave}`)}
  let sums = ${sum("part")};
  let value = sums.x;
  if (lane == 0u) {
    ${
      v.crossEntropy
        ? `ce_rows[at] = ce * ce_row_scale;
    divergence_rows[at] = value * row_scale;
    loss[at] = select(ce_scale * ce, poison, ce_scale == 0.0) + select(divergence_scale * value, 0.0, divergence_scale == 0.0);`
        : "loss[at] = divergence_scale * value;"
    }
  }
  ${late ? each(`${left ? "" : terms}\n    ${late}`) : ""}`,
  };
});

/** What one launch binds. */
export interface DivergenceBuffers {
  student: Memory;
  teacher: Memory;
  labels: Memory | null;
  /** From `countRows` where there are labels; else any memory that nothing else here is. */
  counts: Memory;
  upstream: Memory | null;
  loss: Memory;
  /** Rows of the two parts: distillation. */
  parts: { ceRows: Memory; divergenceRows: Memory } | null;
  /** May be the student's own memory; then `dTeacher` is the teacher's or null. */
  dStudent: Memory | null;
  dTeacher: Memory | null;
}

/** Numbers of one launch. */
export interface DivergenceNumbers {
  /** Rows of the logits, of which there are `allRows` in the batch, from `firstRow` on. */
  rows: number;
  firstRow: number;
  allRows: number;
  columns: number;
  mean: boolean;
  /** Whether rows with an ignored label count nowhere; false where there are no labels. */
  drop: boolean;
  ignoreIndex: number;
  upstreamStride: number;
  temperature: number;
  /** Weight of p in the mixture. */
  beta: number;
  ceFactor: number;
  divergenceFactor: number;
}

/** Loss of each row (scaled for the mean), and the gradients where `dStudent` or `dTeacher` is given. */
export function divergenceRows(
  name: DivergenceName,
  student: Element,
  teacher: Element,
  b: DivergenceBuffers,
  n: DivergenceNumbers,
): void {
  const { labels, counts, upstream, parts, dStudent, dTeacher } = b;
  const inPlace = dStudent === b.student || dTeacher === b.teacher;
  const variant: Variant = {
    name,
    student,
    teacher,
    dStudent: dStudent !== null,
    dTeacher: dTeacher !== null,
    crossEntropy: parts !== null,
    inPlace,
    plan: planKey(planRow(n.columns, 2)),
  };
  const buffers: Record<string, Memory> = {
    student: b.student,
    teacher: b.teacher,
    labels: labels ?? counts,
    counts,
    upstream: upstream ?? counts,
    loss: b.loss,
  };
  if (parts) Object.assign(buffers, parts);
  if (dStudent && !inPlace) buffers.dStudent = dStudent;
  if (dTeacher && !inPlace) buffers.dTeacher = dTeacher;
  kernel(JSON.stringify(variant)).run(buffers, {
    rows: n.rows,
    columns: n.columns,
    firstRow: n.firstRow,
    allRows: n.allRows,
    mean: n.mean ? 1 : 0,
    drop: n.drop ? 1 : 0,
    ignoreIndex: n.ignoreIndex,
    scaled: upstream ? 1 : 0,
    upstreamStride: n.upstreamStride,
    inverseTemperature: 1 / n.temperature,
    beta: n.beta,
    ceFactor: n.ceFactor,
    divergenceFactor: n.divergenceFactor,
  }, n.rows);
}
