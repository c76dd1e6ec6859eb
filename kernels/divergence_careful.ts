/**
 * The loops for the rows of `kernels/divergence.ts` that the fast loops (`kernels/divergence_fast.ts`) cannot be trusted with, such as those in which almost
 * equal gradients cancel in the likely classes, or that have infinite logits on one side; for short rows; and for divergences of mixtures without a gradient.
 */
import { type Near, SIDES, times } from "./divergence_formulas.ts";
import { polynomial, SCALES, type Way } from "./divergence_variant.ts";

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
  const fixed = formula.mean === undefined;
  const distance = (fix: string) =>
    `let dead4 = max(student4, teacher4) < vec4f(-1e38);
    let d4 = select((apart4_(student4, teacher4, shift) * k - c)${fix}, vec4f(0.0), dead4);
    let near4 = abs(d4) < vec4f(1.0);`;
  const terms = `
    ${distance(fixed ? " - error_of_d" : "")}
    ${first}
    ${firstNear}
    ${formula.sides ?? SIDES}
    let excess4 = excess_series4_(d4);
    let odds4 = d4 + excess4; // eᵈ − 1
    let diff4 = select(q4 - p4, p4 * odds4, near4);`;
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

  // The roundings of c, and those of x that all classes share, are an error of every d, which shows in Σ p·eᵈ − Σ p. KLs do not need it: the sum of their
  // terms hardly changes with it
  const errorOfD = !fixed ? "" : `var error_part = vec2f(0.0);
  ${
    exact.each(`${distance("")}
    ${SIDES}
    let diff4 = select(q4 - p4, p4 * (d4 + excess_series4_(d4)), near4);
    error_part += vec2f(sum_of(diff4), sum_of(select(vec4f(0.0), p4, near4)));`)
  }
  let errors = ${exact.sum("error_part", "vec2f")};
  let error_of_d = select(0.0, errors.x / errors.y, errors.y > 0.5);`;

  const labelLoss = !v.crossEntropy ? "" : `let log_s1 = log1p_(s1_rest);
  let label = given_label;
  let ce = select(log_s1 - (given[1].z - s_max), 0.0, label == IGNORED);
  let label_excess = expm1_(-ce);
  let ce_slope = given[1].x * params.ce_factor * given[1].y;
  ${exact.once("given_ce = ce;")}`;

  // h of the likeliest class of each side: h is centred on it, since h − E h would lose its digits if one class has nearly all the weight. If h is ±d, the
  // difference of the logits is centred instead: with logits of 1e4, d itself has too few digits, and gradients were off by 2e-4
  const centre = formula.mean === "student" ? "s_max, s_at" : "t_at, t_max";
  const centres = !isLate ? "" : formula.mean ? `let centre = apart_(${centre});` : `var student_h = 0.0;
  var teacher_h = 0.0;
  {
    let d4 = apart4_(vec4f(s_max, t_at, 0.0, 0.0), vec4f(s_at, t_max, 0.0, 0.0), shift) * k - c - error_of_d; // the same bits as in the loops
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
  let value = ${formula.bound ? "select(all_sums.x, params.bound, all_sums.x > params.bound)" : "all_sums.x"};
  let sums = select(all_sums, vec4f(value), is_nan_(value)); // a NaN of one side makes the other NaN as well
  ${finish}
  ${late ? exact.each(`${terms}\n    ${late}`) : ""}`;
  };
  const flags = [student?.faded && "student_fades", teacher?.faded && "teacher_fades"].filter(Boolean);

  return `${normalisers}
  ${normaliserOfD}
  ${errorOfD}
  let counts_here = params.divergence_factor != 0.0; // with a weight of 0, even an infinite divergence has no gradient
  ${labelLoss}
  ${SCALES}

  var student_fades = false;
  var teacher_fades = false;
  ${formula.limits ? `var student_limit = ${formula.limits}; var teacher_limit = ${formula.limits};` : ""}
  ${centres}
  ${
    formula.fadesApart && flags.length > 0
      ? `${
        exact.once(`trusted = select(0u, 1u, ${flags.join(" || ")});`)
      } // through memory, so that control flow is uniform
  if (${exact.value("trusted")} == 1u) { ${loops(true)} } else { ${loops(false)} }`
      : loops(true)
  }`;
}
