/** What `kernels/divergence.ts` shares with its two sorts of loops: `kernels/divergence_fast.ts` and `kernels/divergence_careful.ts`. */
import { type DivergenceName, type Formula, FORMULAS, type Side } from "./divergence_formulas.ts";
import { type Element, numbers } from "./elementwise.ts";
import type { RowCode, RowPlan } from "./row.ts";

/** Terms of a fitted polynomial: enough for an error of at most 1e-7 for any β. The number is even, so that d = 0 is not among the points. */
export const TERMS = 10;
/** The names of its coefficients. */
export const COEFFICIENTS: string[] = numbers(TERMS).map((i) => `value${i}`);
/** The polynomial in d4 with these coefficients: a value over p·d², for formulas of which `near` is a function. */
export const POLYNOMIAL: string = COEFFICIENTS.map((c) => `params.${c}`).reduceRight((inner, c) =>
  `(${c} + d4 * ${inner})`
);

/** The least weight of the other side in a mixture for the fast loops, where h is a difference: above it a gradient's relative error is at most 3e-6. */
export const SLIGHT = 0.02;
/** The least number of columns for the fast loops: with so many terms, the terms' roundings are small compared to those of the sum. */
export const MANY = 64;

export const LOG2E = "1.44269504089";
/** The scales of the gradients, which the loops that write them read from workgroup memory. */
export const SCALES = "let student_scale = given[0].x; let teacher_scale = given[0].y;";

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
  /** Whether the fast loops come first. Short rows, and the others that could never trust them, compile in half the time without. */
  fast: boolean;
  /** T if it is 1 or 2 and cross-entropy is added: then the exponentials of cross-entropy, which is at T = 1, are powers of the divergence's. Else null. */
  power: 1 | 2 | null;
  /** Whether an fma rounds only once, which is not so on software drivers. */
  fused: boolean;
}

// not for a mixture, except β = ½, which is faster so (4096×32000 0.41 ms on an H100 instead of 0.49): registers of halves must not be replaced, but those of a
// mixture keep an exponential and a logarithm for the third loop; for β = ½ h is kept beside them (`keepsH`)
export const inHalves = ({ name, student, teacher }: Variant): boolean =>
  (!FORMULAS[name].mixes || name === "halfJsd") && student === "f16" && teacher === "f16";

/**
 * The side whose h registers keep in far rows of `inHalves`, as `kept_h`, for the loop that writes its gradient; it then computes one exponential instead of two
 * and a logarithm. jsd of 16384×8192 in f16 takes an H100 0.35 ms instead of 0.40, of 4096×32000 0.41 instead of 0.42.
 */
export function keepsH(v: Variant): "student" | "teacher" | null {
  if (v.name !== "halfJsd" || !inHalves(v) || v.dStudent === v.dTeacher) return null;
  return v.dStudent ? "student" : "teacher";
}

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
  /** Code with which one thread puts what is needed late into workgroup memory. */
  given: string;
}
