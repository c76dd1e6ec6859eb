/**
 * The divergences of rows as WGSL expressions: values and gradients in terms of p, q and d. `kernels/divergence_fast.ts` and `kernels/divergence_careful.ts`
 * put them into loops.
 *
 *   p = softmax(teacher/T), q = softmax(student/T), d = log q − log p, m = βp + (1−β)q, u = log(m/p), v = log(m/q), r = (q−p)/m
 */
import { fit, horner } from "./math.ts";

/** The divergences that have a kernel. */
export type DivergenceName = "forwardKl" | "reverseKl" | "jsd" | "skewForwardKl" | "skewReverseKl" | "totalVariation";

/** A function of d and β. */
export type Near = (d: number, beta: number) => number;

/** A gradient weight·w·(h − E_w h), where w is q for the student and p for the teacher, and h is a function of d alone. */
export interface Side {
  weight: string;
  h: string;
  /**
   * In mixtures, how the careful loops compute h − h', where h' is h in the side's likeliest class. Let ρ and ρ' be the parts of m that come from the other and
   * from this side in that class, and eᶻ the factor by which other/own is larger in another one. There m/own is larger by the factor f = ρ' + ρ·eᶻ = 1 + x
   * with x = ρ·(eᶻ − 1), and so h = −log(m/own) is smaller by log(1 + x) (`log`), and h = own weight²·(±r) by ρ'·x/f over the ratio of the weights, other to own
   * (`ratio`); `both` is ρ'·x/f − log(1 + x). Nothing cancels, however small z or ρ is.
   */
  centred?: "log" | "ratio" | "both";
  /** dh/dd near 0, if whether the fast loops are trusted depends on the resulting gradient. */
  slope?: string;
  /** If h is the difference of two terms that nearly cancel: how large they are. */
  split?: string;
}

/** One divergence, as WGSL of p4, q4, d4, odds4 and excess4 (eᵈ − 1 and eᵈ − 1 − d, where |d| < 1), diff4 (q − p), beta and alpha = 1 − β. */
export interface Formula {
  value: string;
  /**
   * The value for |d| < 1: as WGSL, for KLs also of e4 (eᵈ) and small4 (whether excess4 holds), or as a function of d and β whose result is multiplied by p. null:
   * `value` holds there, too.
   */
  near: Near | string | null;
  /** null stands for a gradient of ±(q − p). */
  student: Side | null;
  teacher: Side | null;
  /** Set if the value is a mean of d: E d over the student's distribution, or −E d over the teacher's. */
  mean?: "student" | "teacher";
  /** The value at which rows are no longer close, as a multiple of a KL's. */
  scale: string;
  /** The largest value, as a function of β: that of rows with nothing in common. */
  bound?: (beta: number) => number;
  /** Whether there is a mixture m. */
  mixes?: true;
  /** What `value` and `near` need to be computed from d4 first. */
  first?: string;
  /**
   * `value` for rows that are not close, with finite numbers only; it may use odds4 in a mixture. Without it, the value is α·E_q h of the
   * student plus β·E_p h of the teacher.
   */
  fast?: string;
  /** An error of d that all columns share makes Σ p·eᵈ differ from Σ q. This times that excess is added to the value. */
  drift?: string;
  /** Computes p4 and q4; `SIDES` by default. */
  sides?: string;
  /** Whether h is bounded, so that a weight of 0 never multiplies an infinity. */
  bounded?: true;
}

// weight·x, where 0·∞ = 0
export const times = (weight: string, x: string): string =>
  `select(${weight} * (${x}), vec4f(0.0), ${weight} == vec4f(0.0))`;
const { exp, expm1, log1p } = Math;
const u: Near = (d, beta) => log1p((1 - beta) * expm1(d)), v: Near = (d, beta) => log1p(beta * expm1(-d));

/** H(β). */
const entropyOf = (beta: number) => -beta * Math.log(beta) - (1 - beta) * log1p(-beta);

// `share` ≤ ½ is the smaller weight in the mixture, y the logarithm of its side over the other: log(m/other) = log(1 − share + share·eʸ), which does not cancel
// while share·(eʸ − 1) ≤ 1, that is y ≤ gentle; beyond that, log(m/side) = log(share + (1 − share)·e⁻ʸ). It takes one exponential and one logarithm
const MIXTURE: string = `let y4 = select(-d4, d4, flip);
  let gentle4 = y4 <= vec4f(params.gentle);
  let z4 = select(-y4, y4, gentle4);
  let e4 = exp4_(select(min(z4, vec4f(80.0)), z4, is_nan4_(z4)));
  let w4 = select(vec4f(1.0 - params.share), vec4f(params.share), gentle4);
  let m4 = select(vec4f(params.share), vec4f(1.0 - params.share), gentle4) + w4 * e4;
  let x4 = w4 * (e4 - 1.0);
  let log4 = log_of_sum4_(m4, x4);
  let by4 = select(log4, log4 - y4, gentle4); // log of m over the side with the smaller weight, and over the other
  let other4 = select(log4 + y4, log4, gentle4);
  let u4 = select(by4, other4, flip);
  let v4 = select(other4, by4, flip);
  let over_p4 = gentle4 == vec4<bool>(flip); // whether m4 is m/p, else it is m/q
  let gap4 = log_gap4_(x4, log4);`;

export const SIDES: string = `let p4 = select(vec4f(0.0), exp((teacher4 - t_max) * k - log_t), live4);
    let q4 = select(vec4f(0.0), exp((student4 - s_max) * k - log_s), live4);`;

// f(x) for x in [0, to], by a polynomial
const series = (f: (x: number) => number, x: string, to: number, terms: number) => horner(x, fit(f, 0, to, terms));
const { cosh, sinh, sqrt, LN2 } = Math;
const logCosh = (x: number) => log1p(2 * sinh(x / 2) ** 2);

// β = ½, D = d/2, a = |D|: log cosh D = a + λ with λ = log1p(e) − log 2 and e = e⁻²ᵃ; the value is √pq·(D·sinh D − cosh D·log cosh D). Even functions of D
// are series in D². One exponential gives the larger of p and q, another one the other
const HALF = `let half4 = 0.5 * d4;
  let square4 = half4 * half4;
  let root4 = exp(-abs(half4));
  let e4 = root4 * root4;
  let rising4 = d4 > vec4f(0.0);
  let a4 = 0.5 * min(abs(d4), vec4f(200.0)); // where e is 0
  let lambda4 = e4 * ${series((e) => log1p(e) / e, "e4", 1, 9)} - ${LN2};`;

const HALF_SIDES =
  `let larger4 = select(vec4f(0.0), exp(max((teacher4 - t_max) * k - log_t, (student4 - s_max) * k - log_s)), live4);
    let p4 = larger4 * select(vec4f(1.0), e4, rising4);
    let q4 = larger4 * select(e4, vec4f(1.0), rising4);`;

// a d within `blur`, the error of a row's d, counts as 0
const SIGN = "sign(select(d4, vec4f(0.0), abs(d4) < vec4f(blur)))";

export const FORMULAS: Record<DivergenceName | "halfJsd", Formula> = {
  forwardKl: {
    value: `diff4 - ${times("p4", "d4")}`,
    near: "p4 * excess4",
    mean: "teacher",
    fast: "diff4 - p4 * d4",
    drift: "1.0",
    scale: "1.0",
    student: null,
    teacher: { weight: "1.0", h: "-d4" },
  },
  reverseKl: {
    value: `${times("q4", "d4")} - diff4`,
    // of q·d − (q − p), where d is small without its cancellation, and where it is not without that of the other form
    near: "p4 * select(d4 * e4 - odds4, d4 * odds4 - excess4, small4)",
    mean: "student",
    fast: "q4 * d4 - diff4",
    drift: "-1.0",
    scale: "1.0",
    student: { weight: "1.0", h: "d4" },
    teacher: null,
  },
  jsd: { // β·(m − p − p·u) + (1 − β)·(m − q − q·v), in which everything but the logarithms adds up to 0
    value: `-beta * ${times("p4", "u4")} - alpha * ${times("q4", "v4")}`,
    near: (d, beta) => -beta * u(d, beta) - (1 - beta) * exp(d) * v(d, beta),
    student: { weight: "alpha", h: "-v4", slope: "beta", centred: "log" },
    teacher: { weight: "beta", h: "-u4", slope: "alpha", centred: "log" },
    scale: "alpha * beta",
    bound: entropyOf,
    mixes: true,
    first: MIXTURE,
  },
  halfJsd: {
    value: "larger4 * (-e4 * a4 - (0.5 + 0.5 * e4) * lambda4)",
    near: `larger4 * root4 * square4 * ${
      series((z) => (sqrt(z) * sinh(sqrt(z)) - cosh(sqrt(z)) * logCosh(sqrt(z))) / z, "square4", 0.25, 6)
    }`,
    student: { weight: "alpha", h: "-v4", slope: "beta", centred: "log" },
    teacher: { weight: "beta", h: "-u4", slope: "alpha", centred: "log" },
    scale: "0.25",
    bound: entropyOf,
    mixes: true,
    first: HALF,
    sides: HALF_SIDES,
  },
  skewForwardKl: { // m = αp + (1−α)q: β = α; m − p − p·u, from m/p if that is what `MIXTURE` has computed
    value: `select(alpha * diff4 - ${times("p4", "u4")}, ${times("p4", "gap4")}, over_p4)`,
    near: (d, beta) => (1 - beta) * expm1(d) - u(d, beta),
    student: { weight: "1.0", h: "alpha * alpha * r4", slope: "alpha * alpha", centred: "ratio" },
    teacher: {
      weight: "1.0",
      h: "-u4 + beta * alpha * r4",
      slope: "alpha * alpha",
      split: "abs(u4) + beta * alpha * abs(r4)",
      centred: "both",
    },
    scale: "alpha * alpha",
    mixes: true,
    first: MIXTURE,
    // if p has the larger weight, m/p is 1 + x4
    fast: "select(alpha * diff4 - p4 * u4, p4 * log_gap4_(x4, log4), vec4<bool>(flip) & (x4 < vec4f(1.0)))",
  },
  skewReverseKl: { // m = (1−α)p + αq: β = 1−α; m − q − q·v, likewise
    value: `select(${times("q4", "gap4")}, -beta * diff4 - ${times("q4", "v4")}, over_p4)`,
    near: (d, beta) => -beta * expm1(d) - exp(d) * v(d, beta),
    student: {
      weight: "1.0",
      h: "-v4 - beta * alpha * r4",
      slope: "beta * beta",
      split: "abs(v4) + beta * alpha * abs(r4)",
      centred: "both",
    },
    teacher: { weight: "1.0", h: "-beta * beta * r4", slope: "beta * beta", centred: "ratio" },
    scale: "beta * beta",
    mixes: true,
    first: MIXTURE,
    fast: "select(-beta * diff4 - q4 * v4, q4 * log_gap4_(x4, log4), vec4<bool>(!flip) & (x4 < vec4f(1.0)))",
  },
  totalVariation: {
    value: "0.5 * abs(diff4)",
    fast: "0.5 * abs(diff4)",
    near: null,
    student: { weight: "1.0", h: `0.5 * ${SIGN}`, slope: "0.0" },
    teacher: { weight: "1.0", h: `-0.5 * ${SIGN}`, slope: "0.0" },
    scale: "1.0",
    bound: () => 1,
    bounded: true,
  },
};
