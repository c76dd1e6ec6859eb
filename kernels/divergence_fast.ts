/** The loops with which `kernels/divergence.ts` processes most rows, near ones and far ones. `kernels/divergence_careful.ts` has those for all others. */
import { FORMULAS, type Near, type Side } from "./divergence_formulas.ts";
import { inHalves, keepsH, LOG2E, POLYNOMIAL, SCALES, TERMS, type Way } from "./divergence_variant.ts";
import { fit, horner } from "./math.ts";
import type { RowCode } from "./row.ts";

// A row is far if its KL (or total variation) is at least FAR: a |d| of about 0.35; for a mixture, if scale·Var d is at least FAR_SPREAD and the value then
// comes out as at least FAR_VALUE, and more in a peaked row, where errors of 1e-7 in the built-in logarithm do not cancel
const FAR = 0.06, FAR_SPREAD = 0.1, FAR_VALUE = 0.03;
// where one side's probability is computed from the other's and d, that one must not underflow: up to these differences of the exponents of two (in near rows
// and in far ones) what is lost is nothing beside the value
const FURTHEST_NEAR = 60, FURTHEST_FAR = 100;
// the far loops also need that no logit is so far above the first ones that it lost digits
const SHARP = "max(totals.x, totals.y) <= 4096.0 + 2.0 * f32(params.columns)";
// (eʸ − 1)/y and (eᵈ − 1 − d)/d² for |y|, |d| < 0.35; the value over p·d² for β = ½ and |d| < 1
const ODDS = horner("y4", fit((y) => Math.expm1(y) / y, -0.35, 0.35, 6));
const EXCESS = horner("d4", fit((d) => (Math.expm1(d) - d) / (d * d), -0.35, 0.35, 6));
const HALF_VALUE = horner("d4", fit((d) => (FORMULAS.jsd.near as Near)(d, 0.5) / (d * d), -1, 1, TERMS));

/**
 * The loops that are enough for most rows. They end the kernel if their result can be trusted. The first loop sums 2ˢ and 2ᵗ, which also shows whether the two
 * distributions are near each other. If they are far apart, the formulas are used as written. Otherwise the loops keep the digits of d, however small it is:
 * they start from the difference of the logits, which is exact, and use series for eᵈ − 1 and for the value. H100, 4096×32000, near rows (before, when all of
 * them took the careful loops): forwardKl 0.62 ms (1.01), reverseKl 0.65 (1.25), jsd 0.74 (1.63), distillation 0.65 (1.13).
 */
export function fast(way: Way): string {
  const { v, formula, row } = way, code = columnCode(way);
  const { fused, nears, below, e1, hasE1 } = code;
  const sums = firstLoop(way, code);

  const labelLoss = !v.crossEntropy
    ? ""
    : `let above = ${fused ? `fma(given[1].z, k2, -base.x) * (temperature * ${Math.LN2})` : "given[1].z - top.x"};
  var ce = select(log_(totals.w) - above, 0.0, given_label == IGNORED);`;
  // if the label is likely, cross-entropy comes from the sum over the other classes, so that it keeps its digits
  const likely = `ce < 0.03 * (1.0 + abs(above)) && given_label < params.columns`;
  const labelAgain = () =>
    `part = vec4f(0.0);
  ${
      row.fork().each(
        `${below("s")} ${
          hasE1 ? "let es4 = exp2(s4);" : ""
        } part.x += sum_of(select(${e1}, vec4f(0.0), columns4 == vec4u(label)));`,
        null,
      )
    }
  ce = log1p_(${row.sum("part.x", "f32")} / exp(above));
  ${row.once("given_ce = ce;")}
  ${row.wait}`;

  // What the sums show: whether the distributions are near each other, and whether the label is likely
  const far = formula.mean
    ? `estimate >= ${FAR}`
    : `(${formula.scale}) * spread >= max(${FAR_SPREAD}, 0.5 * peak) && params.share >= 0.05`;
  const nearOrFar = nears ? `select(NEAR, 0u, ${far})` : "0u";
  // what the label shows is the same for all threads, too, but a compiler that checks this can't see it behind other memory
  const finding = !v.crossEntropy ? `let row_is = ${nearOrFar};` : `${
    row.once(`let is_likely = ${likely};
    findings = ${nearOrFar} | select(0u, LIKELY, is_likely);
    given_ce = ce;`)
  }
  let row_is = ${row.value("findings")};`;
  const rest = (near: boolean) => loopsOf(way, code, near);
  return `
  ${sums}
  ${labelLoss}
  ${finding}
  ${v.crossEntropy ? `if ((row_is & LIKELY) != 0u) { ${labelAgain()} }` : ""}
  ${nears ? `if ((row_is & NEAR) != 0u) { ${rest(true)} } else { ${rest(false)} }` : rest(false)}`;
}

/** Code that raises a maximum. */
const raise = (most: string, x4: string) => `${most} = max(${most}, max_of(${x4}));`;

/** The code that loop bodies have for four columns. */
function columnCode({ v, plan, formula, student, teacher }: Way) {
  const { mean } = formula;
  const halves = inHalves(v), mixes = formula.mixes === true, nears = mixes || mean !== undefined;
  // logits become exponents of two by one fma, except on software drivers, where fma rounds twice: forwardKl of 4096×32000 takes an H200 0.43 ms instead of 0.45
  const { fused } = v;

  // s and t are the logits as exponents of two, minus one near the row's largest: q = 2ˢ/Σ2ˢ, p = 2ᵗ/Σ2ᵗ. In mixtures registers keep what the first
  // loop has computed from the logits; in KLs, which have fewer loops, they would spill
  const gap = "let gap4 = student4 - teacher4;";
  const below = (x: "s" | "t", raw = "") => {
    const [logits, side] = x === "s" ? [`${raw}student4`, "x"] : [`${raw}teacher4`, "y"];
    return `let ${x}4 = ${
      fused ? `fma(${logits}, vec4f(k2), vec4f(-base.${side}))` : `(${logits} - top.${side}) * k2`
    };`;
  };
  const both = (raw = "") => `${below("s", raw)} ${below("t", raw)}`;
  const powersOf = "let es4 = exp2(s4); let et4 = exp2(t4);";
  // at T = 1; if possible a power of the others: distillation of 4096×32003 at T = 2 took an H100 0.555 ms instead of 0.577
  const e1 = v.power === 1 ? "es4" : v.power === 2 ? "(es4 * es4)" : "exp2(s4 * temperature)";
  const hasE1 = !v.crossEntropy || v.power !== null;

  // In a mixture the exponential of the side with the smaller weight is computed from the other's and d: one exponential fewer, and p, q and d agree to the last
  // digit. Far rows use the built-in logarithm, whose error is absolute
  const [own, other, y4] = v.flip ? ["et4", "es4", "d4"] : ["es4", "et4", "-d4"];
  const mixture = (near: boolean) =>
    `let y4 = ${y4};
    let e4 = exp2(${v.flip ? "b4" : "-b4"});
    let odds4 = ${near ? `select(e4 - 1.0, y4 * ${ODDS}, abs(y4) < vec4f(0.35))` : "e4 - 1.0"};
    let x4 = params.share * odds4;
    let m4 = ${near ? "1.0 + x4" : "(1.0 - params.share) + params.share * e4"}; // over the side with the larger weight
    let log4 = ${near ? "log_of_any4_(m4, x4)" : "log(m4)"};
    let ${other} = ${own} * (e4 * totals.${v.flip ? "x / totals.y" : "y / totals.x"});
    let q4 = es4 * q_scale;
    let p4 = et4 * p_scale;
    let diff4 = ${v.flip ? "p4 * odds4" : "-q4 * odds4"};
    let u4 = select(log4 + d4, log4, flip);
    let v4 = select(log4, log4 - d4, flip);
    let r4 = select(-odds4, odds4, flip) / m4;`;
  const twoSides = (near: boolean) =>
    near
      ? `let e4 = exp2(b4);
    let small4 = abs(d4) < vec4f(0.35);
    let excess4 = select((e4 - 1.0) - d4, d4 * d4 * ${EXCESS}, small4); // eᵈ − 1 − d
    let odds4 = select(e4 - 1.0, d4 + excess4, small4);
    let p4 = et4 * p_scale;
    let q4 = p4 * e4;
    let diff4 = p4 * odds4;`
      : `let q4 = es4 * q_scale;
    let p4 = et4 * p_scale;
    let diff4 = q4 - p4;`;
  // For far rows of f16 each exponential comes from its own logit, which takes fewer instructions. The logarithms then have the roundings of s and t, 5e-7
  // where these are 16, which is nothing beside those of f16. (jsd of 4096×32000 0.43 ms instead of 0.45)
  const apart = mixes && halves && plan.quads > 0;
  const halfMixture = `${both()} ${powersOf}
    let q4 = es4 * q_scale;
    let p4 = et4 * p_scale;
    let log4 = log2(max(es4 + et4 * (totals.x / totals.y), vec4f(1e-37))); // of m/q_scale, plus 1
    let v4 = (log4 - s4) * ${Math.LN2} - ${Math.LN2};
    let u4 = (log4 - t4) * ${Math.LN2} - (${Math.LN2} + log_ratio);`;
  // d / log 2. gap0 is the gap at which d is 0, times k2 if `fused`; `ease` is what a first loop over near rows finds d to be off by
  const gaps = `${fused ? "fma(gap4, vec4f(k2), vec4f(-gap0))" : "(gap4 - gap0) * k2"}${mixes ? "" : " - ease"}`;
  const termsOf = (near: boolean, powers: string) =>
    `${powers}
    ${near || mixes ? `let b4 = ${gaps}; let d4 = b4 * ${Math.LN2};` : `let d4 = gap4 * ${Math.LN2} - log_ratio;`}
    ${(mixes ? mixture : twoSides)(near)}`;
  const ownPower = v.flip ? `${below("t")} let et4 = exp2(t4);` : `${below("s")} let es4 = exp2(s4);`;
  const terms = (near: boolean) =>
    apart && !near ? halfMixture : termsOf(
      near,
      mixes
        ? `${gap} ${ownPower}${v.crossEntropy && v.flip && !hasE1 ? below("s") : ""}`
        : near
        ? `${gap} ${below("t")} let et4 = exp2(t4);${v.crossEntropy ? `${below("s")} let es4 = exp2(s4);` : ""}`
        : `${both()} let gap4 = s4 - t4; ${powersOf}`,
    );
  const kept = mean || halves || mixes && !hasE1 ? null : mixes ? [own, "gap4"] : ["s4", "t4"];
  const keep = ([student, teacher]: string[]) => `kept_student = ${student}; kept_teacher = ${teacher};`;
  const termsKept = (near: boolean) =>
    !kept ? terms(near) : termsOf(
      near,
      `let ${kept[0]} = student4; let ${kept[1]} = teacher4; ${mixes ? "" : `let gap4 = s4 - t4; ${powersOf}`}`,
    );
  const gradientOf = (side: Side | null, weight: string, sum: string, difference: string) =>
    side ? `${weight} * (${side.h} - ${sum})` : difference;
  const studentGradient = gradientOf(student, "q4", "sums.y", "diff4");
  const teacherGradient = gradientOf(teacher, "p4", "sums.z", "-diff4");

  // the names for the parts of a side; `measuring` explains `widest`
  const of = (name: "student" | "teacher") => {
    const [side, x, weight, scale, mean, most, size] = name === "student"
      ? [student, "s4", "q4", "q_scale", "y", "x", "y"] as const
      : [teacher, "t4", "p4", "p_scale", "z", "z", "w"] as const;
    const parts = {
      log: x,
      exponents: below(name === "student" ? "s" : "t"),
      power: `e${x}`,
      h: `of_${name}4`,
      scale,
      mean: `sums.${mean}`,
      at: `d_${name}`,
    };
    return { ...parts, side, weight, most: `widest.${most}`, size: `widest.${size}` };
  };
  return {
    halves,
    mixes,
    nears,
    fused,
    apart,
    own,
    other,
    e1,
    hasE1,
    gap,
    below,
    both,
    powersOf,
    terms,
    kept,
    keep,
    termsKept,
    studentGradient,
    teacherGradient,
    of,
  };
}
type ColumnCode = ReturnType<typeof columnCode>;

/** The first loop, which sums 2ˢ and 2ᵗ, and what its sums show of the row. */
function firstLoop({ v, formula, row, student, teacher, given }: Way, code: ColumnCode): string {
  const { mean } = formula;
  const { halves, mixes, nears, fused, e1, gap, both, powersOf, kept, keep, of } = code;
  // A logit near the largest of each side; rounded, so that differences from it are exact, to multiples of at most T, so that its exponential does
  // not underflow; if `fused`, its exponent is rounded
  const tops = `var top_part = vec2f(LEAST);
  ${row.first(`top_part = max(top_part, vec2f(max_of(student4), max_of(teacher4)));`)}
  ${fused ? "" : "let grid = max(1.0, bitcast<f32>((bitcast<u32>(k) + 0x7fffffu) & 0x7f800000u)); // a power of two"}
  let top = ${fused ? row.max("top_part", "vec2f") : `round(${row.max("top_part", "vec2f")} * grid) / grid`};
  ${fused ? "let base = round(top * k2);" : ""}
  ${given}`;

  // Σ2ˢ and Σ2ᵗ; sums for the mean of d, or for its variance; and Σeˣ of cross-entropy
  const ofMean = mean ?? (mixes ? student || !teacher ? "student" : "teacher" : null);
  const weight4 = ofMean === "teacher" ? "et4" : "es4", field = ofMean === "teacher" ? "y" : "x";
  const square = `dot(${weight4} * part4, part4)`;
  const largest = (name: "student" | "teacher") => {
    const { side, size, power } = of(name);
    return side?.slope && !side.split ? raise(size, power) : "";
  };
  // Of a KL, how far the side that weighs is above the other at most, which shows classes that only the other side lacks. Of a mixture, how far that side is above
  // whose probability is computed from the other's. That shares a register with what was touched (jsd of 4096×32000 takes an H200 0.51 ms, with one of its own
  // 0.54), times a number that makes it 1e37 where no loop can be trusted; KLs have one of their own (distillation of 4096×32003 0.50 ms, without 0.53)
  const isolated = mixes
    ? `seen = max(seen, max_of(${v.flip ? "part4" : "-part4"}) * ${(1e37 / FURTHEST_FAR).toExponential()});`
    : mean && !halves
    ? raise("isolated", mean === "teacher" ? "-part4" : "part4")
    : "";
  const [raw, part4] = halves ? ["", "s4 - t4"] : ["raw_", "at_least(s4) - at_least(t4)"];
  const gather = `${both(raw)} ${powersOf} ${mixes ? gap : ""} ${ofMean ? `let part4 = ${part4};` : ""}
    ${largest("student")} ${largest("teacher")} ${isolated}
    part += vec4f(sum_of(es4), sum_of(et4), ${
    mixes ? v.crossEntropy ? square : `dot(${weight4}, ${weight4})` : mean ? `dot(${weight4}, part4)` : "0.0"
  }, ${v.crossEntropy ? `sum_of(${e1})` : mixes ? square : "0.0"});`;
  const keeping = halves
    ? ""
    : keep(!kept ? ["student4", "teacher4"] : mixes ? kept : kept.map((x) => `at_least(${x})`));
  const loop = row.each(gather, `${gather} ${keeping}`, "seen");

  return `${tops}
  var widest = vec4f(0.0);
  var part = vec4f(0.0);
  var isolated = 0.0;
  var seen = 0.0;
  ${loop}
  // logits far above the first ones have lost digits: if too many, the sum is made infinite, which is not trusted
  if (max(part.x, part.y) > 1e9 || seen > 1e37 || isolated > 1e29) { part.x = infinity_(); }
  ${
    !mixes ? "" : `// by an infinite spread a row does not count as near
  if (seen > ${(1e37 * FURTHEST_NEAR / FURTHEST_FAR).toExponential()}) { part.${
      v.crossEntropy ? "z" : "w"
    } = infinity_(); }`
  }
  let totals = ${row.sum("part")};
  ${v.crossEntropy ? "let label = given_label;" : ""}
  let q_scale = 1.0 / totals.x;
  let p_scale = 1.0 / totals.y;
  let log_ratio = log_(totals.x / totals.y);
  // nor is all −∞, nor, of f16, a column outside of the row, which reads as −65504
  let finite = totals.x < 1e38 && totals.y < 1e38 && ${
    halves ? "(min(top.x, top.y) + 65504.0) * k > 110.0" : "min(top.x, top.y) > 0.1 * LEAST"
  };
  let blur = 1e-6;
  ${
    !mean ? "" : `let mean_d = totals.z / totals.${field} * ${Math.LN2};
  let estimate = ${mean === "teacher" ? "log_ratio - mean_d" : "mean_d - log_ratio"};`
  }
  ${
    !mixes
      ? ""
      : `// almost the variance of d, if that is small; and how peaked the distribution is: 1 if all probability is in one class
  let spread = ${v.crossEntropy ? "totals.z" : "totals.w"} / totals.${field} * ${Math.LN2 ** 2} - log_ratio * log_ratio;
  let peak = ${v.crossEntropy ? "0.6" : `sqrt(totals.z) / totals.${field}`};`
  }
  ${
    !nears ? "" : `// the gap at which d is 0; and the least value at which roundings of gaps of that size do not matter
  let gap0 = ${fused ? `log_ratio * ${LOG2E} + (base.x - base.y)` : "log_ratio / k + (top.x - top.y)"};
  let offset = gap0 * ${fused ? Math.LN2 : "k"};
  let least = 1e-4 * offset * offset * (${formula.scale});`
  }`;
}

/** The other loops, for near or for far rows: the value, whether all can be trusted, and the gradients. */
function loopsOf(way: Way, code: ColumnCode, near: boolean): string {
  const { v, plan, formula, row, writeStudent, writeTeacher, finish } = way, { mean, fast: value, drift } = formula;
  const { halves, e1, terms, termsKept, studentGradient, teacherGradient, of } = code;
  const branch = row.fork(), { sum, max } = branch;
  const again = near && halves && plan.more; // loops that read the whole row again: otherwise registers would spill, in far rows too
  const each = (body: string, kept = body) => branch.each(body, again ? null : kept);

  // A gradient ±(q − p) has the rounding errors of q and p; that of an h has those of its mean, of d and of the terms of a `split` h. If h is almost equal in
  // all likely classes, these errors are too large compared to the row's largest gradient, and the row takes the careful loops. `widest`: the student's
  // largest gradient, and 16 times the largest that its errors stand for; then the teacher's. Gradients that overwrite the logits wait for this test; others
  // are written first, and again if it fails
  const measuring = (name: "student" | "teacher", gradient: string) => {
    const { side, weight, most, size } = of(name);
    if (!side && near) return ""; // the q − p of near rows is as exact as d
    const what = side
      ? mean ? near ? `2.0 * abs(${weight} * d4)` : `${weight} * (4.0 * abs(d4) + of_mean)` : null
      : "p4"; // for other formulas from the loop that sums
    return raise(most, `abs(${gradient})`) + (what ? raise(size, what) : "");
  };
  const measure = (v.dStudent ? measuring("student", studentGradient) : "") +
    (v.dTeacher ? measuring("teacher", teacherGradient) : "");
  const measured = measure !== "";
  const ifWide = (widest: string) => `if (all(16.0 * ${widest}.xz >= ${widest}.yw)) {`;

  const left = mean ? null : leftOf(way, code, near);
  const writeLeft = (h: string) => {
    const gradient = left!.gradient(h);
    return `${measuring(left!.name, gradient)} ${
      left!.name === "student" ? writeStudent(gradient, `ce_slope1 * ${e1}`) : writeTeacher(gradient)
    }`;
  };
  const widestFirst = () =>
    measured && v.inPlace
      ? `${
        each(
          `${terms(near)} ${measure}`,
          left ? `${left.power} ${measuring(left.name, left.gradient(left.h))}` : `${termsKept(near)} ${measure}`,
        )
      } let row_widest = ${max("widest")}; ${ifWide("row_widest")}`
      : "";

  // the loop that writes the gradients, then the label's column again
  const late = (terms: string) =>
    `${terms}
    ${mean ? `part.x += sum_of(${near ? formula.near : value});` : ""} ${v.inPlace ? "" : measure}
    ${writeStudent(studentGradient, `ce_slope1 * ${e1}`)}
    ${writeTeacher(teacherGradient)}`;
  const gradients = () =>
    mean || v.dStudent || v.dTeacher
      ? each(
        left?.waits ? `${left.powerAgain} ${writeLeft(`load_${left.at}(at4, live4)`)}` : late(terms(near)),
        left ? `${left.power} ${writeLeft(left.h)}` : late(termsKept(near)),
      )
      : "";
  const labelColumn = !v.crossEntropy || !v.dStudent ? "" : `if (label < params.columns) { ${
    branch.overwrite(
      v.inPlace ? "student" : "d_student",
      "label",
      `let student4 = at_least(vec4f(given[1].z)); let teacher4 = at_least(vec4f(given[1].w));
      ${terms(near)}
      let g4 = student_scale * (${studentGradient}) + ce_slope * expm1_(-given_ce);`,
      "g4.x",
    )
  } }`;
  // and at the end the value if it is a mean, and `widest`
  const ends = () =>
    !mean ? measured && !v.inPlace ? `let met = ${max("widest")};` : "" : `let all_parts = ${sum("part")};
    let value = all_parts.x${drift && !near ? ` + ${drift} * (all_parts.y / all_parts.z)` : ""};
    ${measured ? `let met = ${max("widest")};` : ""}
    ${finish}`;

  return `${
    mean ? valueOfMean(way, code, near, branch, each) : valueOfLoop(way, code, near, branch, each, left, measured)
  }
  if (finite && certain && value <= ${formula.bound ? "0.999 * params.bound" : "1e6"}) {
    ${SCALES}
    ${
    v.crossEntropy
      ? "let ce_slope = given[1].x * params.ce_factor * given[1].y; let ce_slope1 = ce_slope / totals.w;"
      : ""
  }
    ${mean ? `part = vec4f(0.0); ${drift && !near ? drifting(code, branch) : ""}` : finish}
    ${widestFirst()}
    ${gradients()}
    ${labelColumn}
    ${ends()}
    ${!measured ? "return;" : v.inPlace ? "return; }" : `${ifWide("met")} return; }`}
  }`;
}

/**
 * The value if it is a mean of d. Near rows need a loop, which also finds by how much every d is off, because q − p must sum to 0. Far rows have it as the
 * difference of two logarithms.
 */
function valueOfMean(
  { formula }: Way,
  { terms }: ColumnCode,
  near: boolean,
  branch: RowCode,
  each: Each,
): string {
  return near
    ? `var ease = 0.0;
  part = vec4f(0.0);
  ${
      each(
        // where p might underflow in p·eᵈ the value becomes too large to be trusted (a maximum would take a register: distillation of 4096×32003 0.54 ms, not 0.50)
        `${
          terms(true)
        } part += vec4f(sum_of(diff4), sum_of(select(${formula.near}, vec4f(1e38), b4 > vec4f(${FURTHEST_NEAR}.0))), 0.0, 0.0);`,
      )
    }
  let found = ${branch.sum("part")};
  ease = found.x * ${LOG2E};
  let value = found.y;
  let certain = abs(found.x) < 1e-4 && value >= least;
  let sums = vec4f(value);`
    : `let value = estimate;
  let of_mean = abs(mean_d) + abs(log_ratio);
  let certain = 50.0 * value >= of_mean && ${SHARP};
  let sums = vec4f(value);`;
}

/** The first columns show by how much p·eᵈ exceeds q in a far row, which is an error of the logarithm and of every d. */
function drifting({ both }: ColumnCode, branch: RowCode): string {
  return branch.first(`${both()} let q4 = exp2(s4) * q_scale;
    part += vec4f(0.0, sum_of(exp2(s4 - log_ratio * ${LOG2E}) * p_scale - q4), sum_of(q4), 0.0);`);
}

/** Otherwise it comes from a second loop, with each side's E h for the gradients. */
function valueOfLoop(
  { v, formula, student, teacher }: Way,
  { mixes, own, other, apart, terms, termsKept, of }: ColumnCode,
  near: boolean,
  branch: RowCode,
  each: Each,
  left: Left | null,
  measured: boolean,
): string {
  const value = formula.fast, fromSides = !value; // the value is α·E h of the student and β·E h of the teacher
  const summed = near
    ? `select(${
      fromSides ? `alpha * q4 * (${formula.student!.h}) + beta * p4 * (${formula.teacher!.h})` : value
    }, p4 * (d4 * d4 * ${v.name === "halfJsd" ? HALF_VALUE : POLYNOMIAL}), abs(d4) < vec4f(1.0))`
    : value;
  const [ofStudent, ofTeacher] = fromSides && !near ? [formula.student, formula.teacher] : [student, teacher];
  const weigh = (side: Side | null, name: string) => side ? `let ${name}4 = ${side.h};` : "";
  const weighed = (side: Side | null, weight: string, name: string) => side ? `dot(${weight}, ${name}4)` : "0.0";
  // the change of a far row's h with d, which bounds its error
  const slopeOf = (side: Side) => mixes ? `2.0 * max(${side.slope}, 0.4)` : `2.0 * (${side.slope})`;
  // the sizes of h's terms, which bound its rounding errors; in near rows that is h itself
  const sizes = (name: "student" | "teacher") => {
    const { side, size, power, h } = of(name);
    if (!side?.slope || !near && !side.split) return "";
    return raise(
      size,
      `${power} * (${near ? side.split ?? `abs(${h})` : `2.0 * (${side.split}) + ${slopeOf(side)}`})`,
    );
  };
  const sizeOf = (name: "student" | "teacher") => {
    const { side, size, scale, mean } = of(name);
    if (!side?.slope) return "";
    return `${size} *= ${scale}${near || side.split ? "" : ` * (2.0 * abs(${mean}) + ${slopeOf(side)})`};`;
  };
  const add = `${weigh(ofStudent, "of_student")} ${weigh(ofTeacher, "of_teacher")}
    part += vec4f(${summed ? `sum_of(${summed})` : "0.0"}, ${weighed(ofStudent, "es4", "of_student")}, ${
    weighed(ofTeacher, "et4", "of_teacher")
  }, ${!mixes || apart && !near ? "0.0" : near ? `dot(${own}, odds4)` : `sum_of(${other})`});
    ${sizes("student")} ${sizes("teacher")}`;

  return `part = vec4f(0.0); ${near && measured ? "widest = vec4f(0.0);" : ""}
  ${
    each(
      `${terms(near)}\n    ${add} ${left?.waits ? `store_${left.at}(at4, live4, ${left.hNow});` : ""}`,
      `${termsKept(near)}\n    ${add} ${left ? left.keep : ""}`,
    )
  }
  var sums = ${branch.sum("part")} * vec4f(1.0, q_scale, p_scale, ${
    (other === "es4") === near ? "p_scale" : "q_scale"
  });
  ${
    !mixes
      ? ""
      : apart && !near
      ? "let excess = 0.0;"
      : `// the other side's probabilities must sum to 1; their excess is an error of every d
  let excess = sums.w${near ? "" : " - 1.0"};
  sums.${other === "es4" ? "y" : "z"} /= 1.0 + excess;`
  }
  let value = ${
    summed ? `sums.x${near ? ` - 0.5 * (${formula.scale}) * excess * excess` : ""}` : "alpha * sums.y + beta * sums.z"
  };
  ${sizeOf("student")} ${sizeOf("teacher")}
  let certain = ${
    mixes
      ? `abs(excess) <= 3e-6 && value >= ${
        near
          ? `max(least, (${formula.scale}) * excess * excess) && spread < 1e30`
          : `max(least, max(${FAR_VALUE}, 0.15 * peak)) && ${SHARP}`
      }`
      : `value >= ${FAR} && ${SHARP}`
  };`;
}

/**
 * If one gradient is all that is left after the loop of the value: registers keep its exponential and its h (of f16 only h, beside the logits), with the code
 * `keep`. Then `power` and `h` have them. For other columns h `waits` where the gradient will be (not in rows that share vec4s, where that takes more registers
 * than it saves), and the exponential is computed again.
 */
function leftOf(
  { v, plan, student, teacher }: Way,
  { halves, mixes, apart, kept, keep, of }: ColumnCode,
  near: boolean,
) {
  const isLeft = kept && !(v.crossEntropy && !mixes) && !(v.dStudent && v.dTeacher);
  const name = apart && !near ? keepsH(v) : !isLeft ? null : student ? "student" : teacher ? "teacher" : null;
  if (!name) return null;
  const { exponents, power, log, h, scale, mean, at } = of(name);
  const powerAgain = `${exponents} let ${power} = exp2(${log});`;
  return {
    name,
    at,
    hNow: h,
    keep: halves ? `kept_h = ${h};` : keep([power, h]),
    power: halves ? powerAgain : `let ${power} = student4;`,
    h: halves ? "kept_h" : "teacher4",
    powerAgain,
    gradient: (h: string) => `${power} * (${scale} * ${h} - ${scale} * ${mean})`,
    waits: !v.inPlace && v[name] === "f32" && plan.wide,
  };
}
type Left = NonNullable<ReturnType<typeof leftOf>>;
type Each = (body: string, kept?: string) => string;
