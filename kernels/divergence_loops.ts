/**
 * The two ways in which `kernels/divergence.ts` processes a row: fast loops for most rows, and careful ones for rows that are close or have nearly all
 * probability in one class.
 */
import {
  type DivergenceName,
  type Formula,
  FORMULAS,
  MIXTURE,
  type Near,
  type Side,
  SIDES,
  times,
} from "./divergence_formulas.ts";
import type { Element } from "./elementwise.ts";
import { fit, horner } from "./math.ts";
import type { RowCode, RowPlan } from "./row.ts";

/** Terms of a fitted polynomial: enough for an error of at most 1e-7 for any β. The number is even, so that d = 0 is not among the points. */
export const TERMS = 10;
/** The names of its coefficients. */
export const coefficients = (name: string): string[] => Array.from({ length: TERMS }, (_, i) => `${name}${i}`);
const polynomial = (name: string) =>
  coefficients(name).map((c) => `params.${c}`).reduceRight((inner, c) => `(${c} + d4 * ${inner})`);

/** A side whose weight in a mixture is below this counts as `slight`. Above it a gradient's relative error is at most 3e-6. */
export const SLIGHT = 0.02;

/** Compile-time choices. */
export interface Variant {
  name: DivergenceName | "halfJsd";
  student: Element;
  teacher: Element;
  dStudent: boolean;
  dTeacher: boolean;
  /** Whether cross-entropy at T = 1 is added: distillation. */
  crossEntropy: boolean;
  /** Whether gradients overwrite the logits. */
  inPlace: boolean;
  /** Whether β > ½, for what has a mixture. */
  flip: boolean;
  /** Whether the other side's weight in the mixture is so small that gradients need `slight` formulas. */
  slight: boolean;
  /** T if it is 1 or 2 and cross-entropy is added: then the exponentials of cross-entropy, which is at T = 1, are powers of the divergence's. Else null. */
  power: 1 | 2 | null;
}

// not for a mixture: registers keep its logarithms for the third loop, rather than computing them twice, and registers of halves must not be replaced
export const inHalves = ({ name, student, teacher }: Variant): boolean =>
  FORMULAS[name].first !== MIXTURE && student === "f16" && teacher === "f16";

/** Whether a gradient is ±(q − p). */
export function differs({ name, dStudent, dTeacher }: Variant): boolean {
  const { student, teacher } = FORMULAS[name];
  return dStudent && student === null || dTeacher && teacher === null;
}

/** The polynomials in d that a variant needs. */
export function polynomials({ name, dStudent, dTeacher }: Variant): { name: string; near: Near; power: number }[] {
  const { near, student, teacher } = FORMULAS[name];
  return [
    { name: "value", near, power: 2 },
    { name: "student", near: dStudent && student && student.near, power: 1 },
    { name: "teacher", near: dTeacher && teacher && teacher.near, power: 1 },
  ].filter((x): x is { name: string; near: Near; power: number } => typeof x.near === "function");
}

// The least value, as a multiple of the formula's scale, for which the fast loops are trusted. It corresponds to a |d| of about 0.35; in a mixture to 0.14,
// because there eᵈ − 1 keeps d's digits: close rows then take an H100 a third of the time. For β = ½, where that would cost other rows a tenth, it
// corresponds to 0.5
const TRUSTED = 0.06, TRUSTED_MIXTURE = 0.01, TRUSTED_HALF = 0.15;
// the least number of columns for the fast loops: with so many terms, the terms' roundings are small compared to those of the sum
export const MANY = 64;
export const LOG2E = "1.44269504089";
// the scales of the gradients, which the loops that write them read from workgroup memory
const SCALES = "let student_scale = given[0].x; let teacher_scale = given[0].y;";

// s and t, and d up to a constant, from the logits minus one near the row's largest
const SCALED_GAP = "let s4 = below_s4 * k2; let t4 = below_t4 * k2; let gap4 = (below_s4 - below_t4) * k2;";
// (eʸ − 1)/y for |y| < 0.35
const ODDS = horner("y4", fit((y) => Math.expm1(y) / y, -0.35, 0.35, 6));

/** What the fast and the careful loops share. */
export interface Way {
  v: Variant;
  plan: RowPlan;
  formula: Formula;
  /** The row's code by the plan, which reads −∞ as a finite number; and code that reads the row again in each loop, unchanged. */
  row: RowCode;
  exact: RowCode;
  /** The gradients that are wanted and are not ±(q − p). */
  student: Side | null;
  teacher: Side | null;
  /** Code that writes a gradient; `beside` is that of cross-entropy. */
  writeStudent: (gradient: string, beside: string) => string;
  writeTeacher: (gradient: string) => string;
  /** Code that writes the loss. */
  finish: string;
}

/** The loops that are enough for most rows. They end the kernel if their result can be trusted. */
export function fast({ v, plan, formula, row, student, teacher, writeStudent, writeTeacher, finish }: Way): string {
  const { mean, first = "" } = formula;
  const { first: firstOf = first, value, drift }: Formula["fast"] & object = formula.fast ??
    { first, value: formula.value };
  const halves = inHalves(v), half = v.name === "halfJsd", mixes = formula.first === MIXTURE;

  // First the code that loop bodies have for four columns. s and t are the logits as exponents of two, minus one near the row's largest: q = 2ˢ/Σ2ˢ, p =
  // 2ᵗ/Σ2ᵗ. With three loops, registers keep what the first one has computed from the logits; with two loops they would spill
  const scaled = mixes
    ? `let below_s4 = student4 - top.x; let below_t4 = teacher4 - top.y; ${SCALED_GAP}`
    : "let s4 = (student4 - top.x) * k2; let t4 = (teacher4 - top.y) * k2; let gap4 = s4 - t4;";
  const powers = `${scaled} let es4 = exp2(s4); let et4 = exp2(t4);`;
  // the exponential at T = 1, if possible as a power of another one: distillation of 4096×32003 at T = 2 took an H100 0.555 ms instead of 0.577
  const e1 = v.power === 1 ? "es4" : v.power === 2 ? "(es4 * es4)" : "exp2(s4 * temperature)";
  const hasE1 = !v.crossEntropy || v.power !== null;
  // In a mixture the power of the side with the smaller weight is computed from the other's and d: one exponential fewer, and p, q and d agree to the last
  // digit
  const [own, other, y4] = v.flip ? ["et4", "es4", "d4"] : ["es4", "et4", "-d4"];
  const mixing = `let y4 = ${y4};
    let e4 = exp2(${v.flip ? "b4" : "-b4"});
    let odds4 = select(e4 - 1.0, y4 * ${ODDS}, abs(y4) < vec4f(0.35));
    let ${other} = ${own} * (e4 * totals.${v.flip ? "x / totals.y" : "y / totals.x"});`;
  const termsOf = (powers: string) =>
    `${powers}
    let b4 = gap4 - log_ratio * ${LOG2E};
    let d4 = b4 * ${Math.LN2};
    ${mixes ? mixing : ""}
    let q4 = es4 * q_scale;
    let p4 = et4 * p_scale;
    let diff4 = ${!mixes ? "q4 - p4" : v.flip ? "p4 * odds4" : "-q4 * odds4"};
    ${firstOf}`;
  const ownPower = `let ${own} = exp2(${v.flip ? "t4" : "s4"});`;
  const terms = termsOf(mixes ? `${scaled} ${ownPower}` : powers);
  const kept = mean || halves ? null : !mixes ? ["s4", "t4"] : hasE1 ? [own, "gap4"] : ["below_s4", "below_t4"];
  const termsKept = !kept ? terms : termsOf(
    `let ${kept[0]} = student4; let ${kept[1]} = teacher4; ${
      !mixes ? "let gap4 = s4 - t4; let es4 = exp2(s4); let et4 = exp2(t4);" : hasE1 ? "" : `${SCALED_GAP} ${ownPower}`
    }`,
  );
  const gradientOf = (side: Side | null, weight: string, sum: string, difference: string) =>
    side ? `${weight} * (${side.h} - ${sum})` : difference;
  const studentGradient = gradientOf(student, "q4", "sums.y", "diff4");
  const teacherGradient = gradientOf(teacher, "p4", "sums.z", "-diff4");

  // and what they call the parts of a side; `widest` is explained where it is used
  const of = (side: Side | null) => {
    const [x, name, scale, mean, most, size] = side === student
      ? ["s4", "student", "q_scale", "y", "x", "y"]
      : ["t4", "teacher", "p_scale", "z", "z", "w"];
    const parts = { log: x, power: `e${x}`, h: `of_${name}4`, scale, mean: `sums.${mean}`, at: `d_${name}` };
    return { ...parts, most: `widest.${most}`, size: `widest.${size}` };
  };
  const raise = (most: string, x4: string) => `${most} = max(${most}, max_of(${x4}));`;

  // Then the steps, in order. A logit near the largest of each side:
  const tops = `var top_part = vec2f(LEAST);
  ${row.first(`top_part = max(top_part, vec2f(max_of(student4), max_of(teacher4)));`)}
  var seen = 0.0;
  ${row.peek("seen = max(seen, max(student4, teacher4));")}
  let top = ${row.max("top_part", "vec2f")};`;

  // Σ2ˢ, Σ2ᵗ, the sum for the mean of d, and its square's or cross-entropy's
  const weight4 = mean === "teacher" ? "et4" : "es4", field = mean === "teacher" ? "y" : "x";
  const squares = mean && (mean === "student" ? student : teacher) !== null;
  const square = squares ? `dot(${weight4} * gap4, gap4)` : "0.0";
  const largest = (side: Side | null) => side?.slope && !side.split ? raise(of(side).size, of(side).power) : "";
  const gather = `${powers}
    ${largest(student)} ${largest(teacher)}
    ${squares && v.crossEntropy ? `squares += ${square};` : ""}
    part += vec4f(sum_of(es4), sum_of(et4), ${mean ? `dot(${weight4}, gap4)` : "0.0"}, ${
    v.crossEntropy ? `sum_of(${e1})` : square
  });`;
  const normalisers = `var part = vec4f(0.0);
  var squares = 0.0;
  ${row.each(gather, kept ? `${gather} kept_student = ${kept[0]}; kept_teacher = ${kept[1]};` : gather)}
  // logits far above the first ones may have lost digits: an infinite sum is not trusted
  var infinity = 0x7f800000u;
  if (max(part.x, part.y) > 4096.0 || seen > 1e37) { part.x = bitcast<f32>(infinity); }
  let totals = ${row.sum("part")};
  let q_scale = 1.0 / totals.x;
  let p_scale = 1.0 / totals.y;
  let log_ratio = log_(totals.x / totals.y);
  let blur = 1e-6;`;

  // an error of the logarithm shifts every d: the first columns show by how much their p·eᵈ exceed their q
  const drifting = !drift ? "" : `var drift_part = vec2f(0.0);
  ${
    row.first(`${scaled} let q4 = exp2(s4) * q_scale;
    drift_part += vec2f(sum_of(exp2(s4 - log_ratio * ${LOG2E}) * p_scale - q4), sum_of(q4));`)
  }
  let drifts = ${row.sum("drift_part", "vec2f")};
  if (lane == 0u) { drift = ${drift} * (drifts.x / drifts.y); } // in memory: registers are scarce`;

  const labelLoss = !v.crossEntropy ? "" : `let above = given[1].z - top.x;
  let ce = select(log_(totals.w) - above, 0.0, given_label == IGNORED);`;

  // A value that is a mean of d: first an estimate, as the difference of two logarithms; the loop with the gradient sums it again, from terms that do not
  // cancel
  const valueOfMean = () =>
    `let mean_d = totals.z / totals.${field} * ${Math.LN2};
  let value = ${mean === "teacher" ? "log_ratio - mean_d" : "mean_d - log_ratio"};
  let sums = vec4f(value);
  ${
      squares
        ? `let square = ${v.crossEntropy ? row.sum("squares", "f32") : "totals.w"} / totals.${field} * ${Math.LN2 ** 2};
  let variance = square - mean_d * mean_d;
  let certain = 50.0 * value >= abs(mean_d) + abs(log_ratio) && variance >= 0.2 * square && variance >= 0.2 * value * value;`
        : "let certain = 50.0 * value >= abs(mean_d) + abs(log_ratio);"
    }`;

  // Otherwise the value comes from a second loop, with each side's E h, which the gradients need. If only one gradient is `left` after it, registers keep its
  // power and its h. For columns that registers do not keep, h `waits` where the gradient will be (not in rows that share vec4s: there that takes more
  // registers than it saves)
  const left = !kept || v.crossEntropy && !(mixes && hasE1) || v.dStudent && v.dTeacher ? null : student ?? teacher;
  const ofLeft = of(left);
  const gradientOfLeft = (h: string) => `${ofLeft.power} * (${ofLeft.scale} * ${h} - ${ofLeft.scale} * ${ofLeft.mean})`;
  const writeLeft = (power: string, h: string) =>
    `let ${ofLeft.power} = ${power}; ${measureOf(left, gradientOfLeft(h))} ${
      left === student ? writeStudent(gradientOfLeft(h), `ce_slope1 * ${e1}`) : writeTeacher(gradientOfLeft(h))
    }`;
  const waits = left && !v.inPlace && (left === student ? v.student : v.teacher) === "f32" && plan.wide;
  const both = !value; // the value is α·E h of the student and β·E h of the teacher
  const [ofStudent, ofTeacher] = both ? [formula.student, formula.teacher] : [student, teacher];
  const weigh = (side: Side | null, weight: string, name: string) =>
    side ? `let ${name}4 = ${side.h}; ${half ? `let ${name}_weighed4 = ${weight} * ${name}4;` : ""}` : "";
  const weighed = (side: Side | null, weight: string, name: string) =>
    !side ? "0.0" : half ? `sum_of(${name}_weighed4)` : `dot(${weight}, ${name}4)`;
  const splits = (side: Side | null) =>
    side?.split ? raise(of(side).size, `${of(side).power} * (${side.split} + ${side.slope})`) : "";
  // the fourth sum: for β = ½ E h², which shows whether h varies enough around its mean; in a mixture the other side's total probability, which must come
  // out as 1
  const last = half
    ? student ? "dot(of_student_weighed4, of_student4)" : "dot(of_teacher_weighed4, of_teacher4)"
    : mixes
    ? `sum_of(${other})`
    : "0.0";
  const add = `${weigh(ofStudent, "es4", "of_student")} ${weigh(ofTeacher, "et4", "of_teacher")}
    part += vec4f(${both ? "0.0" : `sum_of(${value})`}, ${weighed(ofStudent, "es4", "of_student")}, ${
    weighed(ofTeacher, "et4", "of_teacher")
  }, ${last});
    ${half && student && teacher ? "squares += dot(of_teacher_weighed4, of_teacher4);" : ""}
    ${splits(student)} ${splits(teacher)}`;
  const varies = (side: Side | null, square: string, mean: string) =>
    half && side ? ` && 0.25 * ${square} >= ${mean} * ${mean}` : "";
  const sizeOf = (side: Side | null) =>
    side?.slope
      ? `${of(side).size} *= ${of(side).scale}${
        side.split ? "" : ` * (2.0 * (abs(${of(side).mean}) + ${side.slope}))`
      };`
      : "";
  const valueOfLoop = () =>
    `part = vec4f(0.0);
  ${
      row.each(
        `${terms}\n    ${add} ${waits ? `store_${ofLeft.at}(at4, live4, ${ofLeft.h});` : ""}`,
        `${termsKept}\n    ${add} ${left ? `kept_student = ${ofLeft.power}; kept_teacher = ${ofLeft.h};` : ""}`,
      )
    }
  var sums = ${row.sum("part")} * vec4f(1.0, q_scale, p_scale, ${
      (mixes ? other === "es4" : student) ? "q_scale" : "p_scale"
    });
  ${half && student && teacher ? `let square = ${row.sum("squares", "f32")} * p_scale;` : ""}
  let value = ${both ? "alpha * sums.y + beta * sums.z" : "sums.x"};
  ${mixes ? `sums.${other === "es4" ? "y" : "z"} /= sums.w;` : ""}
  ${sizeOf(student)} ${sizeOf(teacher)}
  let certain = ${mixes ? "abs(sums.w - 1.0) <= 1.5e-6" : "true"}${varies(student, "sums.w", "sums.y")}${
      varies(teacher, student ? "square" : "sums.w", "sums.z")
    };`;
  const valued = mean ? valueOfMean() : valueOfLoop();

  // whether all of that can be trusted
  const trusting = `if (lane == 0u) {
    ${v.crossEntropy ? "given_ce = ce;" : ""}
    let finite = min(top.x, top.y) > 0.1 * LEAST && totals.x < 1e38 && totals.y < 1e38; // nor is all −∞
    trusted = select(0u, 1u, finite && certain && value >= ${
    mixes ? TRUSTED_MIXTURE : half ? TRUSTED_HALF : TRUSTED
  } * (${formula.scale}) && value <= ${formula.most ?? "1e6"}${
    v.crossEntropy
      ? " && (given_label == IGNORED || (given_label < params.columns && ce >= 0.03 * (1.0 + abs(above)) && ce <= 1e30))"
      : ""
  });
  }`;

  // A gradient ±(q − p) has the rounding errors of q and p, one with an h those of its mean, of d and of the terms of a `split` h. If h is nearly the same in
  // all likely classes, these errors are too large compared to the row's largest gradient, and the row takes the careful loops. `widest`: the student's
  // largest gradient, and its largest error; then the teacher's. Gradients that overwrite the logits wait for this check; others are written, and again if
  // necessary
  const ofH = !mean && !half && (student ?? teacher) !== null;
  const measured = differs(v) || ofH;
  const measureOf = (side: Side | null, gradient: string) =>
    ofH && side ? raise(of(side).most, `abs(${gradient})`) : "";
  const measure = ofH
    ? measureOf(student, studentGradient) + measureOf(teacher, teacherGradient)
    : measured
    ? "widest = max(widest, vec4f(max_of(abs(diff4)), max_of(p4), 0.0, 0.0));"
    : "";
  const ifWide = (widest: string) =>
    `if (lane == 0u) { trusted = select(0u, 1u, all(16.0 * ${widest}.xz >= ${widest}.yw)); } if (workgroupUniformLoad(&trusted) == 1u) {`;
  const widestFirst = measured && v.inPlace
    ? `${
      row.each(
        `${terms} ${measure}`,
        left
          ? `let ${ofLeft.power} = student4; ${measureOf(left, gradientOfLeft("teacher4"))}`
          : `${termsKept} ${measure}`,
      )
    } let row_widest = ${row.max("widest")}; ${ifWide("row_widest")}`
    : "";

  // the loop that writes the gradients, and then the label's column again
  const late = (terms: string) =>
    `${terms}
    ${mean ? `part.x += sum_of(${value});` : ""} ${v.inPlace ? "" : measure}
    ${writeStudent(studentGradient, `ce_slope1 * ${e1}`)}
    ${writeTeacher(teacherGradient)}`;
  const gradients = mean || v.dStudent || v.dTeacher
    ? row.each(
      waits ? `${scaled} ${writeLeft(`exp2(${ofLeft.log})`, `load_${ofLeft.at}(at4, live4)`)}` : late(terms),
      left ? writeLeft("student4", "teacher4") : late(termsKept),
    )
    : "";
  const labelColumn = !v.crossEntropy || !v.dStudent ? "" : `if (label < params.columns) { ${
    row.overwrite(
      v.inPlace ? "student" : "d_student",
      "label",
      `let student4 = at_least(vec4f(given[1].z)); let teacher4 = at_least(vec4f(given[1].w));
      ${terms}
      let g4 = student_scale * (${studentGradient}) + ce_slope * expm1_(-given_ce);`,
      "g4.x",
    )
  } }`;
  // and after it the value of a mean, and `widest`
  const ends = !mean
    ? measured && !v.inPlace ? `let met = ${row.max("widest")};` : ""
    : `${measured ? `let met = ${row.sumAndMost("vec4f(part.x, widest.xy, 0.0)")};` : ""}
    let value = ${measured ? "met.x" : row.sum("part.x", "f32")}${drift ? " + drift" : ""};
    ${finish}`;

  return `
  ${tops}
  ${measured ? "var widest = vec4f(0.0);" : ""}
  ${normalisers}
  ${drifting}
  ${labelLoss}
  ${valued}
  ${trusting}
  if (workgroupUniformLoad(&trusted) == 1u) {
    ${SCALES}
    ${
    v.crossEntropy
      ? "let label = given_label; let ce_slope = given[1].x * params.ce_factor * given[1].y; let ce_slope1 = ce_slope / totals.w;"
      : ""
  }
    ${mean ? "part = vec4f(0.0);" : finish}
    ${widestFirst}
    ${gradients}
    ${labelColumn}
    ${ends}
    ${!measured ? "return;" : v.inPlace ? "return; }" : `${ifWide(mean ? "vec4f(met.yz, 0.0, 0.0)" : "met")} return; }`}
  }`;
}

/**
 * h minus its limit, and `odds`, the other side's probability over the own: for classes whose probability on the other side is negligible. If the likeliest
 * class is one of these, h is almost equal to its limit in every likely class, and the gradient comes from the small difference: without this a gradient of
 * 1e-5 (at d = 12) had a relative error of 1e-3, one of 1e-8 (at d = 20) was noise.
 */
export function fading(side: "student" | "teacher", faded: string): string {
  const y4 = side === "student" ? "-d4" : "d4";
  return `fn ${side}_odds_(d4: vec4f) -> vec4f { return exp(min(${y4}, vec4f(80.0))); }
fn ${side}_faded_(d4: vec4f) -> vec4f {
  let y4 = ${y4};
  let ratio = params.${side}_ratio;
  let most = min(87.0, 69.0 - log(ratio)); // beyond that, x4 is practically infinite
  let x4 = ratio * exp(min(y4, vec4f(most)));
  let log4 = log1p4_(x4) + max(y4 - most, vec4f(0.0));
  return ${faded};
}
`;
}

/** The loops for close rows, and for rows with nearly all probability in one class. */
export function careful({ v, formula, exact, student, teacher, writeStudent, writeTeacher, finish }: Way): string {
  const { first = "", firstNear = "" } = formula;

  // First the code that loop bodies have for four columns
  const terms = `
    let dead4 = max(student4, teacher4) < vec4f(-1e38);
    let d4 = select(apart4_(student4, teacher4, shift) * k - c, vec4f(0.0), dead4);
    let near4 = abs(d4) < vec4f(1.0);
    ${first}
    ${firstNear}
    ${formula.sides ?? SIDES}
    let excess4 = excess_series4_(d4);
    let diff4 = select(q4 - p4, p4 * (d4 + excess4), near4);`;
  const weighed = (weight: string, x: string) => formula.bounded ? `${weight} * (${x})` : times(weight, x);
  const polynomialOr = (near: Near | string, name: string) =>
    typeof near === "string"
      ? near
      : name === "value"
      ? `p4 * (d4 * d4 * ${polynomial(name)})`
      : `d4 * ${polynomial(name)}`;
  const carefully = (far: string, near: Near | string | null, name: string) =>
    near ? `select(${far}, ${polynomialOr(near, name)}, near4)` : far;
  const h = (side: "student" | "teacher", fades: boolean) => {
    const { h, slight = h, near, faded } = formula[side]!, h4 = carefully(v.slight ? slight : h, near, side);
    return fades && faded ? `select(${h4}, ${side}_faded_(d4), ${side}_fades)` : h4;
  };
  const counted = (gradient: string) => `select(vec4f(0.0), ${gradient}, counts_here)`;
  // a gradient that needs no sum is written by the first loop, unless that would overwrite what the next loop reads
  const lateStudent = student || (v.inPlace && teacher), lateTeacher = teacher || (v.inPlace && student);
  const isLate = v.dStudent && lateStudent || v.dTeacher && lateTeacher;

  // Then the steps, in order. The normalisers, and the range of student − teacher
  const normalisers = `var range_part = vec2f(LOW, LOW);
  ${
    exact.normalise(
      [
        { name: "s", value: "student4", k: "k", at: isLate ? "teacher" : undefined },
        { name: "t", value: "teacher4", k: "k", at: isLate ? "student" : undefined },
        ...v.crossEntropy ? [{ name: "s1", value: "student4", k: "1.0" }] : [],
      ],
      `if ((range_part.x + range_part.y) * k <= 1.0) { // once too wide, the range stays too wide
      let used4 = live4 & (max(student4, teacher4) >= vec4f(-1e38));
      let gap4 = apart4_(student4, teacher4, vec2f(0.0));
      range_part = max(range_part, vec2f(max_of(select(vec4f(LOW), gap4, used4)), max_of(select(vec4f(LOW), -gap4, used4))));
    }`,
    )
  }
  let log_s = log1p_(s_rest);
  let log_t = log1p_(t_rest);
  let shift = apart_(s_max, t_max);
  let range = ${exact.max("range_part", "vec2f")};`;

  // c of d = (student − teacher)/T − c; for close rows from their differences. With an offset of 4e7 or more between the sides the range shows nothing, only
  // the differences without the offset do
  const normaliserOfD = `let level = (range.x + range.y) * k <= 1.0;
  var close_part = vec4f(0.0);
  if (level) {
    ${
    exact.each(
      `let x4 = select(vec4f(0.0), apart4_(student4, teacher4, shift) * k, live4 & (max(student4, teacher4) >= vec4f(-1e38)));
    let close4 = exp((teacher4 - t_max) * k - log_t) * expm1_series4_(x4);
    let added4 = select(close4, vec4f(0.0), x4 == vec4f(0.0));
    close_part += vec4f(sum_of(added4), sum_of(abs(added4)), sum_of(select(vec4f(0.0), vec4f(1.0), abs(x4) > vec4f(1.01))), 0.0);`,
    )
  }
  }
  let closes = ${exact.sum("close_part")};
  let close = level && closes.z == 0.0;
  let c = select(log_s - log_t, log1p_(closes.x), close);
  let blur = 3e-7 * select(log_s + log_t, closes.y, close); // the error of c`;

  const labelLoss = !v.crossEntropy ? "" : `let log_s1 = log1p_(s1_rest);
  let label = given_label;
  let ce = select(log_s1 - (given[1].z - s_max), 0.0, label == IGNORED);
  let label_excess = expm1_(-ce);
  let ce_slope = given[1].x * params.ce_factor * given[1].y;
  if (lane == 0u) { given_ce = ce; }`;

  // h of the likeliest class of each side: h is centred on it, since h − E h would lose its digits if one class has nearly all the weight. If h is ±d, the
  // difference of the logits is centred instead: with logits of 1e4, d itself has too few digits, and gradients were off by 2e-4
  const centre = formula.mean === "student" ? "s_max, s_at" : "t_at, t_max";
  const centres = !isLate ? "" : formula.mean ? `let centre = apart_(${centre});` : `var student_h = 0.0;
  var teacher_h = 0.0;
  {
    let d4 = apart4_(vec4f(s_max, t_at, 0.0, 0.0), vec4f(s_at, t_max, 0.0, 0.0), shift) * k - c; // the same bits as in the loops
    let near4 = abs(d4) < vec4f(1.0);
    student_fades = d4.x >= 1.0 ${student?.faded ? "&& params.student_ratio * student_odds_(d4).x <= 1.0" : ""};
    teacher_fades = d4.y <= -1.0 ${teacher?.faded ? "&& params.teacher_ratio * teacher_odds_(d4).y <= 1.0" : ""};
    ${formula.limits ? "if (student_fades) { student_limit = 0.0; } if (teacher_fades) { teacher_limit = 0.0; }" : ""}
    ${first}
    ${firstNear}
    ${student ? `student_h = (${h("student", true)}).x;` : ""}
    ${teacher ? `teacher_h = (${h("teacher", true)}).y;` : ""}
  }`;

  // the value and each side's E h, and the gradients
  const loops = (fades: boolean) => {
    const centred = (side: "student" | "teacher") =>
      formula.mean
        ? `(apart4_(student4, teacher4, centre) * ${side === "student" ? "k" : "-k"})`
        : `(${h(side, fades)} - ${side}_h)`;
    const add = `part += vec4f(sum_of(${carefully(formula.value, formula.near, "value")}), ${
      student ? `sum_of(${weighed("q4", centred("student"))})` : "0.0"
    }, ${teacher ? `sum_of(${weighed("p4", centred("teacher"))})` : "0.0"}, 0.0);`;
    const studentWriting = writeStudent(
      counted(student ? weighed("q4", `opaque4_(${centred("student")}) - sums.y`) : "diff4"),
      "ce_slope * select(exp(student4 - s_max - log_s1), vec4f(label_excess), columns4 == vec4u(label))",
    );
    const teacherWriting = writeTeacher(
      counted(teacher ? weighed("p4", `opaque4_(${centred("teacher")}) - sums.z`) : "-diff4"),
    );
    const early = (lateStudent ? "" : studentWriting) + (lateTeacher ? "" : teacherWriting);
    const late = (lateStudent ? studentWriting : "") + (lateTeacher ? teacherWriting : "");
    return `var part = vec4f(0.0);
  ${exact.each(`${terms}\n    ${add}\n    ${early}`)}
  let all_sums = ${exact.sum("part")};
  let value = all_sums.x;
  let sums = select(all_sums, vec4f(value), is_nan_(value)); // a NaN of one side makes the other NaN as well
  ${finish}
  ${late ? exact.each(`${terms}\n    ${late}`) : ""}`;
  };
  const flags = [student?.faded && "student_fades", teacher?.faded && "teacher_fades"].filter(Boolean);

  return `${normalisers}
  ${normaliserOfD}
  let counts_here = params.divergence_factor != 0.0; // with a weight of 0, even an infinite divergence has no gradient
  ${labelLoss}
  ${SCALES}

  var student_fades = false;
  var teacher_fades = false;
  ${formula.limits ? `var student_limit = ${formula.limits}; var teacher_limit = ${formula.limits};` : ""}
  ${centres}
  ${
    formula.fadesApart && flags.length > 0
      ? `if (lane == 0u) { trusted = select(0u, 1u, ${
        flags.join(" || ")
      }); } // through memory, so that control flow is uniform
  if (workgroupUniformLoad(&trusted) == 1u) { ${loops(true)} } else { ${loops(false)} }`
      : loops(true)
  }`;
}
