/**
 * Divergences of rows of student logits from rows of teacher logits at temperature T, alone or with cross-entropy beside them
 * (distillation): values and gradients from one trip over both.
 *
 *   p = softmax(teacher/T), q = softmax(student/T), d = log q − log p, m = βp + (1−β)q, u = log(m/p), v = log(m/q), r = (q−p)/m
 *
 * Nothing is a difference of logarithms. d comes from (student − teacher)/T and a normaliser c; for close rows
 * c = log1p(Σ p·expm1(…)), so that d keeps its digits and identical rows give exactly 0. Every term of a sum is p·F(d) ≥ 0, as a KL is Σ p·(eᵈ − 1 − d)
 * (the added eᵈ − 1 sums to Σq − Σp = 0). Where |d| < 1, F(d)/d² and the like are polynomials in d that the host fits for the β at hand: no logarithm, and
 * nothing that cancels. Beyond, the formulas are taken as they stand.
 */
import type { Element } from "./elementwise.ts";
import { type BufferType, type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { fit, horner, MATH, MATH4 } from "./math.ts";
import { parsePlan, planKey, planRow, rowBuffer, rowCode } from "./row.ts";

/** The divergences that have a kernel. */
export type DivergenceName = "forwardKl" | "reverseKl" | "jsd" | "skewForwardKl" | "skewReverseKl" | "totalVariation";

/** A function of d and β. */
type Near = (d: number, beta: number) => number;

/** A gradient: weight·w·(h − E_w h), where w is q for the student and p for the teacher and h a function of d alone, for |d| < 1 `near` (null: `h` all the same). */
interface Side {
  weight: string;
  h: string;
  near: Near | null;
}

/**
 * One divergence: WGSL of p4, q4, d4, excess4 (eᵈ − 1 − d, where |d| < 1), diff4 (q − p), beta and alpha = 1 − β. `near` is the value where |d| < 1, in WGSL or as a
 * function that gives it as a multiple of p (null: `value` all the same).
 */
interface Formula {
  value: string;
  near: Near | string | null;
  /** null stands for a gradient of ±(q − p). */
  student: Side | null;
  teacher: Side | null;
  /** What is computed of d4 before anything else: u4, v4 and r4 for what has a mixture. */
  first?: string;
  /** p4 and q4, unless they are computed by themselves. */
  sides?: string;
  /** Whether h has a bound, so that no weight of 0 meets an infinity. */
  bounded?: true;
}

// weight·x, where 0·∞ = 0
const times = (weight: string, x: string) => `select(${weight} * (${x}), vec4f(0.0), ${weight} == vec4f(0.0))`;
const { exp, expm1, log1p } = Math;
const u: Near = (d, beta) => log1p((1 - beta) * expm1(d)), v: Near = (d, beta) => log1p(beta * expm1(-d));
const r: Near = (d, beta) => expm1(d) / (1 + (1 - beta) * expm1(d));

// `share` ≤ ½ is the smaller weight in the mixture, y the log of its side over the other: log(m/other) = log(1 − share + share·eʸ), which does
// not cancel while share·(eʸ − 1) ≤ 1, that is y ≤ gentle; beyond, log(m/side) = log(share + (1 − share)·e⁻ʸ). One exponential and one logarithm do
const MIXTURE = `let flip = beta > 0.5; // then q's side has the smaller weight
  let y4 = select(-d4, d4, flip);
  let gentle4 = y4 <= vec4f(params.gentle);
  let e4 = exp(min(select(-y4, y4, gentle4), vec4f(60.0)));
  let w4 = select(vec4f(1.0 - params.share), vec4f(params.share), gentle4);
  let m4 = (1.0 - w4) + w4 * e4;
  let x4 = w4 * (e4 - 1.0);
  let log4 = log_of_sum4_(m4, x4);
  let by4 = select(log4, log4 - y4, gentle4); // log of m over the side with the smaller weight, and over the other
  let other4 = select(log4 + y4, log4, gentle4);
  let u4 = select(by4, other4, flip);
  let v4 = select(other4, by4, flip);
  let over_p4 = gentle4 == vec4<bool>(flip); // whether m4 is m/p, else it is m/q
  let gap4 = log_gap4_(x4, log4);
  let r4 = select(1.0 - e4, e4 - 1.0, over_p4) / m4;`;

const SIDES = `let p4 = select(vec4f(0.0), exp((teacher4 - t_max) * k - log_t), live4);
    let q4 = select(vec4f(0.0), exp((student4 - s_max) * k - log_s), live4);`;

// f(x) for x in [0, to], by a polynomial
const series = (f: (x: number) => number, x: string, to: number, terms: number) => horner(x, fit(f, 0, to, terms));
const { cosh, sinh, sqrt, LN2 } = Math;
const logCosh = (x: number) => log1p(2 * sinh(x / 2) ** 2);

// β = ½, D = d/2, a = |D|: u = log cosh D + D, v = log cosh D − D, where log cosh D = a + λ with λ = log1p(e) − log 2 and e = e⁻²ᵃ; the value is
// √pq·(D·sinh D − cosh D·log cosh D). What is even in D is a series in D². One exponential gives the larger of p and q, one the other: jsd of
// 16384×8192 takes 0.74 ms on an H200, and 0.91 by way of the mixture
const HALF = `let half4 = 0.5 * d4;
  let a4 = select(abs(half4), vec4f(100.0), abs(half4) > vec4f(100.0)); // where e is 0
  let square4 = half4 * half4;
  let root4 = exp(-a4);
  let e4 = root4 * root4;
  let lambda4 = e4 * ${series((e) => log1p(e) / e, "e4", exp(-1), 8)} - ${LN2};
  let log_cosh4 = square4 * ${series((z) => logCosh(sqrt(z)) / z, "square4", 0.25, 6)}; // where |d| < 1
  let rising4 = d4 > vec4f(0.0);`;

const HALF_SIDES =
  `let larger4 = select(vec4f(0.0), exp(max((teacher4 - t_max) * k - log_t, (student4 - s_max) * k - log_s)), live4);
    let p4 = larger4 * select(vec4f(1.0), e4, rising4);
    let q4 = larger4 * select(e4, vec4f(1.0), rising4);`;

const FORMULAS: Record<DivergenceName | "halfJsd", Formula> = {
  forwardKl: {
    value: `diff4 - ${times("p4", "d4")}`,
    near: "p4 * excess4",
    student: null,
    teacher: { weight: "1.0", h: "-d4", near: null },
  },
  reverseKl: {
    value: `${times("q4", "d4")} - diff4`,
    near: "p4 * (d4 * (d4 + excess4) - excess4)",
    student: { weight: "1.0", h: "d4", near: null },
    teacher: null,
  },
  jsd: { // β·(m − p − p·u) + (1 − β)·(m − q − q·v), where all but the logarithms adds up to nothing
    value: `-beta * ${times("p4", "u4")} - alpha * ${times("q4", "v4")}`,
    near: (d, beta) => -beta * u(d, beta) - (1 - beta) * exp(d) * v(d, beta),
    student: { weight: "alpha", h: "-v4", near: (d, beta) => -v(d, beta) },
    teacher: { weight: "beta", h: "-u4", near: (d, beta) => -u(d, beta) },
    first: MIXTURE,
  },
  halfJsd: {
    value: "larger4 * (-e4 * a4 - (0.5 + 0.5 * e4) * lambda4)",
    near: `larger4 * root4 * square4 * ${
      series((z) => (sqrt(z) * sinh(sqrt(z)) - cosh(sqrt(z)) * logCosh(sqrt(z))) / z, "square4", 0.25, 6)
    }`,
    student: {
      weight: "alpha",
      h: "select(select(-2.0 * a4 - lambda4, -lambda4, rising4), half4 - log_cosh4, near4)",
      near: null,
    },
    teacher: {
      weight: "beta",
      h: "select(select(-lambda4, -2.0 * a4 - lambda4, rising4), -half4 - log_cosh4, near4)",
      near: null,
    },
    first: HALF,
    sides: HALF_SIDES,
    bounded: true,
  },
  skewForwardKl: { // m = αp + (1−α)q: β = α; m − p − p·u, from m/p where that is at hand
    value: `select(alpha * diff4 - ${times("p4", "u4")}, ${times("p4", "gap4")}, over_p4)`,
    near: (d, beta) => (1 - beta) * expm1(d) - u(d, beta),
    student: {
      weight: "1.0",
      h: "alpha * alpha * r4",
      near: (d, beta) => (1 - beta) ** 2 * r(d, beta),
    },
    teacher: {
      weight: "1.0",
      h: "-u4 + beta * alpha * r4",
      near: (d, beta) => -u(d, beta) + beta * (1 - beta) * r(d, beta),
    },
    first: MIXTURE,
  },
  skewReverseKl: { // m = (1−α)p + αq: β = 1−α; m − q − q·v, likewise
    value: `select(${times("q4", "gap4")}, -beta * diff4 - ${times("q4", "v4")}, over_p4)`,
    near: (d, beta) => -beta * expm1(d) - exp(d) * v(d, beta),
    student: {
      weight: "1.0",
      h: "-v4 - beta * alpha * r4",
      near: (d, beta) => -v(d, beta) - beta * (1 - beta) * r(d, beta),
    },
    teacher: { weight: "1.0", h: "-beta * beta * r4", near: (d, beta) => -beta * beta * r(d, beta) },
    first: MIXTURE,
  },
  totalVariation: {
    value: "0.5 * abs(diff4)",
    near: null,
    student: { weight: "1.0", h: "0.5 * sign(d4)", near: null },
    teacher: { weight: "1.0", h: "-0.5 * sign(d4)", near: null },
    bounded: true,
  },
};

const TERMS = 10; // of a fitted polynomial: 1e-7 at worst, whatever β; even, as an odd number would have d = 0 among the points
const coefficients = (name: string) => Array.from({ length: TERMS }, (_, i) => `${name}${i}`);
const polynomial = (name: string) =>
  coefficients(name).map((c) => `params.${c}`).reduceRight((inner, c) => `(${c} + d4 * ${inner})`);

/** Compile-time choices. */
interface Variant {
  name: DivergenceName | "halfJsd";
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

/** What a variant needs of its formula as polynomials in d. */
function polynomials({ name, dStudent, dTeacher }: Variant): { name: string; near: Near; power: number }[] {
  const { near, student, teacher } = FORMULAS[name];
  return [
    { name: "value", near, power: 2 },
    { name: "student", near: dStudent && student && student.near, power: 1 },
    { name: "teacher", near: dTeacher && teacher && teacher.near, power: 1 },
  ].filter((x): x is { name: string; near: Near; power: number } => typeof x.near === "function");
}

const kernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const v = JSON.parse(key) as Variant;
  const plan = parsePlan(v.plan), formula = FORMULAS[v.name], { first = "" } = formula;
  const outputs: Record<string, Element> = {};
  const [dStudentName, dTeacherName] = v.inPlace ? ["student", "teacher"] : ["d_student", "d_teacher"];
  if (v.dStudent) outputs[dStudentName] = v.student;
  if (v.dTeacher) outputs[dTeacherName] = v.teacher;
  const { head, begin, each, leaves, sum, max, normalise } = rowCode(
    plan,
    { student: v.student, teacher: v.teacher },
    outputs,
  );
  const weighed = (weight: string, x: string) => formula.bounded ? `${weight} * (${x})` : times(weight, x);
  const h = (side: "student" | "teacher") => {
    const { h, near } = formula[side]!;
    return near ? `select(${h}, d4 * ${polynomial(side)}, near4)` : h;
  };
  const nearValue = typeof formula.near === "function" ? `p4 * (d4 * d4 * ${polynomial("value")})` : formula.near;
  const value = nearValue ? `select(${formula.value}, ${nearValue}, near4)` : formula.value;
  const terms = `
    let dead4 = max(student4, teacher4) < vec4f(-1e38);
    let d4 = select(((student4 - teacher4) - shift) * k - c, vec4f(0.0), dead4);
    let near4 = abs(d4) < vec4f(1.0);
    ${first}
    ${formula.sides ?? SIDES}
    let excess4 = excess_series4_(d4);
    let diff4 = select(q4 - p4, p4 * (d4 + excess4), near4);`;
  const studentMean = v.dStudent && formula.student, teacherMean = v.dTeacher && formula.teacher;
  const centred = (side: "student" | "teacher") => `(${h(side)} - ${side}_h)`;
  // where registers keep both rows and one gradient is all that is left to do, they take what it is made of
  const left = leaves && !v.crossEntropy
    ? studentMean && !v.dTeacher ? "student" : teacherMean && !v.dStudent ? "teacher" : null
    : null;
  const leave = left ? `kept_student = ${left === "student" ? "q4" : "p4"}; kept_teacher = ${centred(left)};` : "";
  const add = `part += vec4f(sum_of(${value}), ${
    studentMean ? `sum_of(${weighed("q4", centred("student"))})` : "0.0"
  }, ${teacherMean ? `sum_of(${weighed("p4", centred("teacher"))})` : "0.0"}, 0.0);`;
  const ceGradient = v.crossEntropy
    ? ` + ce_scale * select(exp(student4 - s_max - log_s1), vec4f(label_excess), columns4 == vec4u(label))`
    : "";
  const dStudent = studentMean
    ? `${studentMean.weight} * ${
      left
        ? weighed("student4", "settled4_(teacher4) - sums.y")
        : weighed("q4", `settled4_(${centred("student")}) - sums.y`)
    }`
    : "diff4";
  const dTeacher = teacherMean
    ? `${teacherMean.weight} * ${
      left
        ? weighed("student4", "settled4_(teacher4) - sums.z")
        : weighed("p4", `settled4_(${centred("teacher")}) - sums.z`)
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
    name: v.crossEntropy ? "distillation" : v.name === "halfJsd" ? "jsd" : v.name,
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
      alpha: "f32",
      ceFactor: "f32",
      divergenceFactor: "f32",
      ...first === MIXTURE ? { share: "f32" as const, gentle: "f32" as const } : {},
      ...Object.fromEntries(polynomials(v).flatMap(({ name }) => coefficients(name).map((c) => [c, "f32" as const]))),
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
  let alpha = params.alpha;
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
        `if ((range_part.x + range_part.y) * k <= 1.0) { // a wide range only grows
      let used4 = live4 & (max(student4, teacher4) >= vec4f(-1e38));
      let gap4 = student4 - teacher4;
      range_part = max(range_part, vec2f(max_of(select(vec4f(LOW), gap4, used4)), max_of(select(vec4f(LOW), -gap4, used4))));
    }`,
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
    let near4 = abs(d4) < vec4f(1.0);
    ${first}
    ${studentMean ? `student_h = (${h("student")}).x;` : ""}
    ${teacherMean ? `teacher_h = (${h("teacher")}).y;` : ""}
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
    name: name === "jsd" && n.beta === 0.5 ? "halfJsd" : name,
    student,
    teacher,
    dStudent: dStudent !== null,
    dTeacher: dTeacher !== null,
    crossEntropy: parts !== null,
    inPlace,
    plan: planKey(planRow(n.columns, "two")),
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
  const share = Math.min(n.beta, 1 - n.beta), fitted: Record<string, number> = {};
  for (const { name, near, power } of polynomials(variant)) {
    fit((d) => near(d, n.beta) / d ** power, -1, 1, TERMS).forEach((c, i) => fitted[name + i] = c);
  }
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
    alpha: 1 - n.beta, // of float64: 1 − 0.9 in float32 errs by 2e-7
    ceFactor: n.ceFactor,
    divergenceFactor: n.divergenceFactor,
    share,
    gentle: share > 0 ? Math.log(1 / share + 1) : 1e38,
    ...fitted,
  }, n.rows);
}
