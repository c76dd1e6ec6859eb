/**
 * The loops for the rows of `kernels/divergence.ts` that the fast loops (`kernels/divergence_fast.ts`) cannot be trusted with, such as those in which almost
 * equal gradients cancel in the likely classes, or that have infinite logits on one side; for short rows; and for divergences of mixtures without a gradient.
 */
import { SIDES, times } from "./divergence_formulas.ts";
import { MANY, POLYNOMIAL, SCALES, type Way } from "./divergence_variant.ts";

/**
 * A WGSL function for a side's `centred` h: of z, given `top`, which has ρ, ρ', 1, and the largest z whose exponential is taken (beyond it, x is practically
 * infinite). If the other side has next to nothing in the likeliest class, h is centred on its limit instead: then z is the logarithm of the other probability
 * over the own, and `top` has the ratio of their weights in m, 1 and 0, so that x is that ratio times eᶻ.
 */
export function centring(name: "student" | "teacher", kind: "log" | "ratio" | "both"): string {
  return `fn ${name}_centred_(z: vec4f, top: vec4f) -> vec4f {
  let e4 = exp(min(z, vec4f(top.w)));
  let x4 = top.x * select(e4 - top.z, expm1_series4_(z), (abs(z) < vec4f(1.0)) & vec4<bool>(top.z == 1.0));
  let f4 = top.y + top.x * e4;
  ${kind === "ratio" ? "" : `let log4 = log_of_sum4_(f4, x4) + max(z - top.w, vec4f(0.0));`}
  return ${
    {
      log: "-log4",
      ratio: `-top.y / params.${name}_ratio * (x4 / f4)`,
      both: "select(top.y * (x4 / f4) - log4, log_gap4_(x4, log4) - x4 * (top.x * e4 / f4), x4 < vec4f(0.4))",
    }[kind]
  };
}
`;
}

/** The loops for close rows, and for rows with nearly all probability in one class. */
export function careful({ v, formula, exact, student, teacher, writeStudent, writeTeacher, finish }: Way): string {
  // First the code that loop bodies have for four columns
  const fixed = formula.mean === undefined;
  const distance = (fix: string) =>
    `let dead4 = max(student4, teacher4) < vec4f(-1e38);
    let d4 = select((apart4_(student4, teacher4, shift) * k - c)${fix}, vec4f(0.0), dead4);
    let near4 = abs(d4) < vec4f(1.0);`;
  const terms = `
    ${distance(fixed ? " - error_of_d" : "")}
    ${formula.first ?? ""}
    ${formula.sides ?? SIDES}
    let excess4 = excess_series4_(d4);
    let odds4 = d4 + excess4; // eᵈ − 1
    ${formula.mean ? "let e4 = odds4 + 1.0; let small4 = near4;" : ""}
    let diff4 = select(q4 - p4, p4 * odds4, near4);`;
  const { value, near } = formula;
  const nearValue = typeof near === "string" ? near : near && `p4 * (d4 * d4 * ${POLYNOMIAL})`;
  // h minus that of the side's likeliest class, since h − E h would lose its digits if one class has nearly all the weight. If h is ±d, or depends on it through
  // the ratio of p and q in m, the difference of the logits is centred instead: with logits of 1e4, d itself has too few digits
  const centred = (side: "student" | "teacher") =>
    formula.mean
      ? `(apart4_(student4, teacher4, centre) * ${side === "student" ? "k" : "-k"})`
      : formula[side]!.centred
      ? `${side}_centred_(${
        side === "student" ? "-" : ""
      }(apart4_(student4, teacher4, ${side}_from) * k - ${side}_offset), ${side}_top)`
      : `(${formula[side]!.h} - ${side}_h)`;
  const weighed = (weight: string, x: string) => formula.bounded ? `${weight} * (${x})` : times(weight, x);
  const counted = (gradient: string) => `select(vec4f(0.0), ${gradient}, counts_here)`;
  // a gradient that needs no sum is written by the first loop, unless that would overwrite what the next loop reads
  const lateStudent = student || (v.inPlace && teacher), lateTeacher = teacher || (v.inPlace && student);
  const isLate = v.dStudent && lateStudent || v.dTeacher && lateTeacher;

  // Then the steps, in order. The normalisers, and whether there is a NaN, which exp need not keep
  const normalisers = `var nan_part = 0.0;
  ${
    exact.normalise(
      [
        { name: "s", value: "student4", k: "k", at: isLate ? "teacher" : undefined },
        { name: "t", value: "teacher4", k: "k", at: isLate ? "student" : undefined },
        ...v.crossEntropy ? [{ name: "s1", value: "student4", k: "1.0" }] : [],
      ],
      "if (any(is_nan4_(student4) | is_nan4_(teacher4))) { nan_part = 1.0; }",
    )
  }
  let log_s = log1p_(s_rest);
  let log_t = log1p_(t_rest);
  let shift = apart_(s_max, t_max);
  if (${
    exact.max("nan_part", "f32")
  } > 0.0 || min(s_rest, t_rest) < -0.5) { // with a NaN, or without any class, the row is NaN
    ${exact.once("given[0] = vec4f(nan_());")}
  }`;

  // c of d = (student − teacher)/T − c is log_s − log_t, or, if that errs less, log(1 + Σ p·(eˣ − 1)) with x = (student − teacher)/T without the offset between
  // the sides: close rows have small x, at least in all classes that are not negligible
  const normaliserOfD = `var close_part = vec2f(0.0);
  ${
    exact.each(
      `let x4 = select(vec4f(0.0), apart4_(student4, teacher4, shift) * k, live4 & (max(student4, teacher4) >= vec4f(-1e38)));
    let p4 = exp((teacher4 - t_max) * k - log_t);
    let q4 = exp((student4 - s_max) * k - log_t); // p·eˣ
    let close4 = abs(x4) < vec4f(1.0);
    let added4 = select(select(q4 - p4, p4 * expm1_series4_(x4), close4), vec4f(0.0), x4 == vec4f(0.0));
    close_part += vec2f(sum_of(added4), sum_of(select(p4 + q4, abs(added4), close4)));`,
    )
  }
  let closes = ${exact.sum("close_part", "vec2f")};
  let close_error = closes.y / (1.0 + closes.x);
  let close = closes.x > -1.0 && close_error < log_s + log_t;
  let c = select(log_s - log_t, log1p_(closes.x), close);
  let blur = 3e-7 * select(log_s + log_t, close_error, close); // the error of c`;

  // The roundings of c, and those of x that all classes share, are an error of every d, which shows in Σ p·eᵈ − Σ p, and in values of many classes. KLs do not
  // need it: the sum of their terms hardly changes with it
  const errorOfD = !fixed ? "" : `var error_of_d = 0.0;
  if (params.columns >= ${MANY}u) {
    var error_part = vec2f(0.0);
    ${
    exact.each(`${distance("")}
    ${SIDES}
    let diff4 = select(q4 - p4, p4 * (d4 + excess_series4_(d4)), near4);
    error_part += vec2f(sum_of(diff4), sum_of(select(vec4f(0.0), p4, near4)));`)
  }
    let errors = ${exact.sum("error_part", "vec2f")};
    if (errors.y > 0.5) { error_of_d = errors.x / errors.y; }
  }`;

  const labelLoss = !v.crossEntropy ? "" : `let log_s1 = log1p_(s1_rest);
  let label = given_label;
  let ce = select(log_s1 - (given[1].z - s_max), 0.0, label == IGNORED);
  let label_excess = expm1_(-ce);
  let ce_slope = given[1].x * params.ce_factor * given[1].y;
  ${exact.once("given_ce = ce;")}`;

  // what `centred` needs
  const centreOf = (side: "student" | "teacher", s: string, t: string, sign: string) =>
    `let ${side}_d = apart4_(vec4f(${s}), vec4f(${t}), shift).x * k - c - error_of_d;
  let ${side}_odds = min(params.${side}_ratio * exp(${sign}${side}_d), 1e37); // ρ/ρ'
  let ${side}_share = ${side}_odds / (1.0 + ${side}_odds);
  let ${side}_fades = !(${side}_odds > 1e-33);
  let ${side}_from = select(apart_(${s}, ${t}), shift, ${side}_fades);
  let ${side}_offset = select(0.0, c + error_of_d, ${side}_fades);
  var ${side}_top = select(vec4f(${side}_share, 1.0 / (1.0 + ${side}_odds), 1.0, 0.0), vec4f(params.${side}_ratio, 1.0, 0.0, 0.0), ${side}_fades);
  ${side}_top.w = min(87.0, 69.0 - log(${side}_top.x));`;
  const centre = formula.mean === "student" ? "s_max, s_at" : "t_at, t_max";
  const centres = !isLate
    ? ""
    : formula.mean
    ? `let centre = apart_(${centre});`
    : formula.mixes
    ? (student ? centreOf("student", "s_max", "s_at", "-") : "") +
      (teacher ? centreOf("teacher", "t_at", "t_max", "") : "")
    : `var student_h = 0.0;
  var teacher_h = 0.0;
  {
    let d4 = apart4_(vec4f(s_max, t_at, 0.0, 0.0), vec4f(s_at, t_max, 0.0, 0.0), shift) * k - c - error_of_d; // the same bits as in the loops
    ${student ? `student_h = (${student.h}).x;` : ""}
    ${teacher ? `teacher_h = (${teacher.h}).y;` : ""}
  }`;

  // the value and each side's E h, and the gradients
  const add = `part += vec4f(sum_of(${nearValue ? `select(${value}, ${nearValue}, near4)` : value}), ${
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
  // most late gradients need no d: what is centred has a difference of its own
  const lateTerms = formula.bounded || v.inPlace && formula.mean ? terms : SIDES;

  return `${normalisers}
  ${normaliserOfD}
  ${errorOfD}
  let counts_here = params.divergence_factor != 0.0; // with a weight of 0, even an infinite divergence has no gradient
  ${labelLoss}
  ${SCALES}

  ${centres}
  var part = vec4f(0.0);
  ${exact.each(`${terms}\n    ${add}\n    ${early}`)}
  let all_sums = ${exact.sum("part")};
  let value = ${formula.bound ? "select(all_sums.x, params.bound, all_sums.x > params.bound)" : "all_sums.x"};
  let sums = select(all_sums, vec4f(value), is_nan_(value)); // a NaN of one side makes the other NaN as well
  ${finish}
  ${late ? exact.each(`${lateTerms}\n    ${late}`) : ""}`;
}
