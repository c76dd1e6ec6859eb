/** Divergences between a student's and a teacher's distributions, from logits. */
import { checkBoolean, checkNumber, checkOneOf, isRecord } from "../kernels/check.ts";
import { type DivergenceNumbers, divergenceRows } from "../kernels/divergence.ts";
import type { DivergenceName } from "../kernels/divergence_formulas.ts";
import { composed } from "../autograd/composed.ts";
import { hidden } from "../autograd/tape.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import {
  checkLabels,
  checkLossOptions,
  countsOf,
  type LossReduction,
  type RowLaunch,
  rowLoss,
  type Rows,
  rowsOf,
  total,
} from "./row_loss.ts";

export type { DivergenceName };

/** Options of every divergence. */
export interface DivergenceOptions {
  /** Both sides' logits are divided by it; 1 by default. No T² is applied. */
  temperature?: number;
  /** `"mean"` over the rows that are not ignored by default. */
  reduction?: LossReduction;
  /** Class indices of the rows; rows whose label is `ignoreIndex` are ignored. The labels have no other effect. */
  labels?: Tensor;
  /** The label of rows that are ignored; −100 by default. */
  ignoreIndex?: number;
}

/** Options of `jsd`. */
export interface JsdOptions extends DivergenceOptions {
  /** The teacher's weight in the mixture m = βp + (1−β)q; 0.5 by default. 0 gives forward KL, 1 reverse KL. */
  beta?: number;
  /** Whether the value is divided by β(1−β), which makes it continuous at both ends. */
  normalize?: boolean;
}

/** Options of the skewed KLs. */
export interface SkewOptions extends DivergenceOptions {
  /** The share of the other distribution that is mixed in, at least 1e-15; 0.1 by default. 0 is the plain KL. */
  alpha?: number;
}

/** Options of `distillation`. */
export interface DistillationOptions {
  /** Weight of the cross-entropy; 0.5 by default. */
  alpha?: number;
  /** Temperature of the divergence; 2 by default. The cross-entropy has temperature 1. */
  temperature?: number;
  /** `"forwardKl"` by default. */
  divergence?: DivergenceName;
  /** β if the divergence is `"jsd"`; 0.5 by default. */
  beta?: number;
  /** Divides a jsd by β(1−β). */
  normalize?: boolean;
  /** α if the divergence is a skewed KL; 0.1 by default. */
  skewAlpha?: number;
  /** Whether the divergence is multiplied by T²; true by default. */
  temperatureSquared?: boolean;
  /** `"mean"` by default. */
  reduction?: LossReduction;
  /** The label of rows without a cross-entropy; −100 by default. */
  ignoreIndex?: number;
  /** Whether rows with that label have no divergence either; false by default. */
  dropIgnored?: boolean;
  /** Whether the two parts are returned as well (detached). */
  returnParts?: boolean;
}

/** What `distillation` returns with `returnParts`: loss = α·crossEntropy + (1−α)·T²·divergence. */
export interface DistillationResult {
  /** What `distillation` returns otherwise. */
  loss: Tensor;
  /** The cross-entropy, before α. */
  crossEntropy: Tensor;
  /** The divergence, before (1 − α)·T². */
  divergence: Tensor;
}

/** Internal: the names of the options that every divergence has. */
export const OPTIONS: readonly string[] = ["temperature", "reduction", "labels", "ignoreIndex"];

/** The kernel, the mixture's β and the factor for a divergence with its options. At the ends of β and α it is one of the plain KLs. */
export function resolveDivergence(
  op: string,
  name: DivergenceName,
  o: { beta?: number; alpha?: number; normalize?: boolean },
): { kernel: DivergenceName; beta: number; factor: number } {
  const { beta = 0.5, alpha = 0.1, normalize = false } = o;
  checkNumber(op, "beta", beta, { min: 0, max: 1 });
  const alphaName = op === "distillation" ? "skewAlpha" : "alpha";
  checkNumber(op, alphaName, alpha, { min: 0, max: 1 });
  checkBoolean(op, "normalize", normalize);
  if (name === "jsd") {
    // for such a β, which f32 could not divide by, J/β is forward KL, unless log(p/q) exceeds log(1/β) = 69
    if (beta === 0 || normalize && beta < 1e-30) return { kernel: "forwardKl", beta: 0, factor: 1 };
    if (beta === 1) return { kernel: "reverseKl", beta, factor: 1 };
    return { kernel: "jsd", beta, factor: normalize ? 1 / (beta * (1 - beta)) : 1 };
  }
  if (name === "skewForwardKl" || name === "skewReverseKl") {
    const forward = name === "skewForwardKl";
    if (alpha > 0 && alpha < 1e-15) { // 1 − α would have lost it
      throw new RangeError(`${op}: ${alphaName} must be 0 or at least 1e-15, got ${alpha}`);
    }
    if (alpha === 0) return { kernel: forward ? "forwardKl" : "reverseKl", beta: 0, factor: 1 };
    return { kernel: name, beta: forward ? alpha : 1 - alpha, factor: 1 };
  }
  return { kernel: name, beta: 0.5, factor: 1 };
}

/** Checks the two sides and counts their rows. */
function sides(op: string, student: Tensor, teacher: Tensor): Rows {
  const batch = rowsOf(op, "student", student);
  checkTensor(op, "teacher", teacher, ["f32", "f16"], student.shape);
  return batch;
}

function divergence(
  op: DivergenceName,
  student: Tensor,
  teacher: Tensor,
  options: JsdOptions & SkewOptions,
  own: readonly string[] = [],
): Tensor {
  // `delta` is not an option and has no effect; reference cases carry it to say how far apart their rows are
  const given = isRecord(options)
    ? Object.fromEntries(Object.entries(options).filter(([key]) => key !== "delta"))
    : options;
  checkLossOptions(op, given, [...OPTIONS, ...own]);
  const { temperature = 1, reduction = "mean", labels, ignoreIndex = -100 } = options;
  const { kernel, beta, factor } = resolveDivergence(op, op, options);
  const batch = sides(op, student, teacher);
  if (labels !== undefined) checkLabels(op, "labels", labels, batch, ignoreIndex);
  return composed(op, () =>
    launchDivergence(op, kernel, { student, teacher, labels, batch, reduction, parts: null }, {
      temperature,
      beta,
      ignoreIndex,
      drop: labels !== undefined,
      ceFactor: 0,
      divergenceFactor: factor,
    }));
}

/** What a divergence is computed from, checked. */
interface DivergenceInputs {
  student: Tensor;
  teacher: Tensor;
  labels?: Tensor;
  batch: Rows;
  reduction: LossReduction;
  /** For distillation: where the rows of its two parts go. */
  parts: { ceRows: Tensor; divergenceRows: Tensor } | null;
}

function launchDivergence(
  op: string,
  kernel: DivergenceName,
  { student, teacher, labels, batch, reduction, parts }: DivergenceInputs,
  numbers: Omit<DivergenceNumbers, "rows" | "firstRow" | "allRows" | "columns" | "mean">,
): Tensor {
  const { rows, columns } = batch;
  const counts = countsOf(labels, undefined, batch, numbers.ignoreIndex);
  const launch: RowLaunch = (loss, [dStudent, dTeacher], upstream) => {
    // a launch in the backward pass writes the parts again, to scratch: nobody reads them, and the first ones are closed
    const again = parts?.ceRows.closed;
    using ceRows = again ? hidden([rows], "f32") : null;
    using spareRows = again ? hidden([rows], "f32") : null;
    divergenceRows(kernel, student.dtype, teacher.dtype, {
      student: student.memory,
      teacher: teacher.memory,
      labels: labels?.memory ?? null,
      counts: counts.memory,
      upstream,
      loss,
      parts: parts &&
        { ceRows: (ceRows ?? parts.ceRows).memory, divergenceRows: (spareRows ?? parts.divergenceRows).memory },
      dStudent,
      dTeacher,
    }, {
      rows,
      firstRow: 0,
      allRows: rows,
      columns,
      mean: reduction === "mean",
      ...numbers,
    });
  };
  return rowLoss(op, [student, teacher], batch, reduction, launch, counts, labels ? [labels] : []);
}

/**
 * KL(p‖q) by row, with p = softmax(teacher/T), q = softmax(student/T): Σ p·(ln p − ln q). Mode-covering; the usual loss for distillation.
 *
 * Gradients: ∂/∂student = (q − p)/T, ∂/∂teacher = p·(ln p − ln q − KL)/T. Shapes: both [..., V]; `"none"` gives [...]. In nats. Identical rows give exactly 0.
 * p > 0 where the student's logit is −∞ gives +∞. Throws a TypeError for wrong shapes or dtypes, a RangeError for wrong values.
 *
 * Source: Hinton, Vinyals & Dean 2015 (without the factor T², which `distillation` has).
 *
 * @example
 * ```ts
 * import { forwardKl, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const teacher = tensor([[Math.log(0.9), Math.log(0.1)]]), student = tensor([[Math.log(0.6), Math.log(0.4)]]);
 * console.log(await forwardKl(student, teacher).item()); // 0.226289
 * ```
 */
export function forwardKl(student: Tensor, teacher: Tensor, options: DivergenceOptions = {}): Tensor {
  return divergence("forwardKl", student, teacher, options);
}

/**
 * KL(q‖p) by row, with p = softmax(teacher/T), q = softmax(student/T): Σ q·(ln q − ln p). Mode-seeking.
 *
 * Gradients: ∂/∂student = q·(ln q − ln p − KL)/T, ∂/∂teacher = (p − q)/T. Shapes, units and errors as `forwardKl`; q > 0 where the teacher's logit is −∞ gives +∞.
 *
 * Source: Gu et al. 2023 (MiniLLM).
 *
 * @example
 * ```ts
 * import { init, reverseKl, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const teacher = tensor([[Math.log(0.9), Math.log(0.1)]]), student = tensor([[Math.log(0.6), Math.log(0.4)]]);
 * console.log(await reverseKl(student, teacher).item()); // 0.311239
 * ```
 */
export function reverseKl(student: Tensor, teacher: Tensor, options: DivergenceOptions = {}): Tensor {
  return divergence("reverseKl", student, teacher, options);
}

/**
 * The generalised Jensen–Shannon divergence by row: β·KL(p‖m) + (1−β)·KL(q‖m) with m = βp + (1−β)q, p = softmax(teacher/T), q = softmax(student/T).
 *
 * Gradients: ∂/∂student = (1−β)·q·(ln q − ln m − KL(q‖m))/T, ∂/∂teacher = β·p·(ln p − ln m − KL(p‖m))/T. Between 0 and H(β) ≤ ln 2. Shapes, units and
 * errors as `forwardKl`.
 *
 * The ends: at β = 0 and 1 the formula itself gives 0, from which nothing can be learned. As in Liger and TRL, β = 0 gives forward KL and β = 1 reverse KL. J/β
 * tends to KL(p‖q) as β → 0 and J/(1−β) to KL(q‖p) as β → 1, so that with `normalize: true`, J/(β(1−β)), the value is continuous at both ends. Some articles
 * swap the two ends: here β is the teacher's weight, and a small β is mode-covering.
 *
 * Source: Agarwal et al. 2023 (generalised knowledge distillation).
 *
 * @example
 * ```ts
 * import { init, jsd, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const teacher = tensor([[Math.log(0.9), Math.log(0.1)]]), student = tensor([[Math.log(0.6), Math.log(0.4)]]);
 * console.log(await jsd(student, teacher, { beta: 0.5 }).item()); // 0.0632878
 * ```
 */
export function jsd(student: Tensor, teacher: Tensor, options: JsdOptions = {}): Tensor {
  return divergence("jsd", student, teacher, options, ["beta", "normalize"]);
}

/**
 * KL(p ‖ αp + (1−α)q) by row, with p = softmax(teacher/T), q = softmax(student/T): forward KL that stays finite where the student has no mass.
 *
 * Gradients, with m = αp + (1−α)q: ∂/∂student = q·(h − E_q h)/T with h = (1−α)²(q−p)/m; ∂/∂teacher = p·(h − E_p h)/T with h = ln p − ln m − α(1−α)(p−q)/m.
 * Shapes, units and errors as `forwardKl`.
 *
 * Source: Ko et al. 2024 (DistiLLM).
 *
 * @example
 * ```ts
 * import { init, skewForwardKl, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await skewForwardKl(tensor([[0, -Infinity]]), tensor([[0, 0]]), { alpha: 0.1 }).item()); // finite
 * ```
 */
export function skewForwardKl(student: Tensor, teacher: Tensor, options: SkewOptions = {}): Tensor {
  return divergence("skewForwardKl", student, teacher, options, ["alpha"]);
}

/**
 * KL(q ‖ (1−α)p + αq) by row, with p = softmax(teacher/T), q = softmax(student/T): reverse KL that stays finite where the teacher has no mass.
 *
 * Gradients, with m = (1−α)p + αq: ∂/∂student = q·(h − E_q h)/T with h = ln q − ln m − α(1−α)(q−p)/m; ∂/∂teacher = p·(h − E_p h)/T with h = (1−α)²(p−q)/m.
 * Shapes, units and errors as `forwardKl`.
 *
 * Source: Ko et al. 2024 (DistiLLM).
 *
 * @example
 * ```ts
 * import { init, skewReverseKl, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await skewReverseKl(tensor([[0, 0]]), tensor([[0, -Infinity]]), { alpha: 0.1 }).item()); // finite
 * ```
 */
export function skewReverseKl(student: Tensor, teacher: Tensor, options: SkewOptions = {}): Tensor {
  return divergence("skewReverseKl", student, teacher, options, ["alpha"]);
}

/**
 * The total variation distance ½Σ|p − q| by row, with p = softmax(teacher/T), q = softmax(student/T): between 0 and 1, and symmetric.
 *
 * Gradients: ∂/∂student = q·(h − E_q h)/T with h = ½sign(q − p), sign 0 = 0; ∂/∂teacher likewise with p and q exchanged. Shapes and errors as `forwardKl`;
 * no unit.
 *
 * Source: Wen et al. 2023 (f-divergence distillation).
 *
 * @example
 * ```ts
 * import { init, tensor, totalVariation } from "@limbeck/limbeck";
 *
 * await init();
 * const teacher = tensor([[Math.log(0.9), Math.log(0.1)]]), student = tensor([[Math.log(0.6), Math.log(0.4)]]);
 * console.log(await totalVariation(student, teacher).item()); // 0.3
 * ```
 */
export function totalVariation(student: Tensor, teacher: Tensor, options: DivergenceOptions = {}): Tensor {
  return divergence("totalVariation", student, teacher, options);
}

const DISTILLATION_OPTIONS = [
  "alpha",
  "temperature",
  "divergence",
  "beta",
  "normalize",
  "skewAlpha",
  "temperatureSquared",
  "reduction",
  "ignoreIndex",
  "dropIgnored",
  "returnParts",
];
/** All divergences by name. */
export const DIVERGENCES: readonly DivergenceName[] = [
  "forwardKl",
  "reverseKl",
  "jsd",
  "skewForwardKl",
  "skewReverseKl",
  "totalVariation",
];

/**
 * α·crossEntropy(student, labels) + (1−α)·T²·divergence(student/T, teacher/T), in one kernel and one pass over both.
 *
 * Student and teacher [..., V], labels [...] (i32 or u32). A row whose label is `ignoreIndex` has no cross-entropy but still a divergence: unlabelled rows
 * learn from the teacher. With `dropIgnored` it has neither. The mean divides the cross-entropy by the number of labelled rows and the divergence by the number
 * of all rows (with `dropIgnored`, of labelled ones).
 *
 * Gradients: α·(softmax(student) − 1_label) and (1−α)·T² times the divergence's own, for student and teacher. T² keeps the size of the divergence's gradient
 * independent of T; `temperatureSquared: false` leaves it out. Units and errors as `crossEntropy` and `forwardKl`.
 *
 * Source: Hinton, Vinyals & Dean 2015.
 *
 * @example
 * ```ts
 * import { distillation, init, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const student = tensor([[1, 0, 0], [0, 0, 0]], { requiresGrad: true });
 * const teacher = tensor([[3, 1, 0], [0, 2, 1]]), labels = tensor(new Int32Array([0, -100]));
 * using tape = new Tape();
 * const loss = distillation(student, teacher, labels, { alpha: 0.3, temperature: 4 });
 * loss.backward();
 * console.log(await loss.item(), await student.grad!.array()); // nearly 0.396132, [[-0.253211, 0.0814302, 0.171781], [0.110681, -0.120254, 0.00957248]]
 * ```
 */
export function distillation(
  student: Tensor,
  teacher: Tensor,
  labels: Tensor,
  options?: DistillationOptions & { returnParts?: false },
): Tensor;
/** With `returnParts`: the loss and its two parts. */
export function distillation(
  student: Tensor,
  teacher: Tensor,
  labels: Tensor,
  options: DistillationOptions & { returnParts: true },
): DistillationResult;
/** With options that are not known at compile time: a Tensor, or a result if `returnParts` is set. */
export function distillation(
  student: Tensor,
  teacher: Tensor,
  labels: Tensor,
  options?: DistillationOptions,
): Tensor | DistillationResult;
export function distillation(
  student: Tensor,
  teacher: Tensor,
  labels: Tensor,
  options: DistillationOptions = {},
): Tensor | DistillationResult {
  const op = "distillation";
  checkLossOptions(op, options, DISTILLATION_OPTIONS);
  const { alpha = 0.5, temperature = 2, divergence = "forwardKl", beta, normalize, skewAlpha } = options;
  const {
    temperatureSquared = true,
    reduction = "mean",
    ignoreIndex = -100,
    dropIgnored = false,
    returnParts = false,
  } = options;
  checkNumber(op, "alpha", alpha, { min: 0, max: 1 });
  checkOneOf(op, "divergence", divergence, DIVERGENCES);
  checkBoolean(op, "temperatureSquared", temperatureSquared);
  checkBoolean(op, "dropIgnored", dropIgnored);
  checkBoolean(op, "returnParts", returnParts);
  const { kernel, beta: mixture, factor } = resolveDivergence(op, divergence, { beta, alpha: skewAlpha, normalize });
  const batch = sides(op, student, teacher);
  checkLabels(op, "labels", labels, batch, ignoreIndex);
  return composed(op, () => {
    const parts = { ceRows: hidden(batch.shape, "f32"), divergenceRows: hidden(batch.shape, "f32") };
    const loss = launchDivergence(op, kernel, { student, teacher, labels, batch, reduction, parts }, {
      temperature,
      beta: mixture,
      ignoreIndex,
      drop: dropIgnored,
      ceFactor: alpha,
      divergenceFactor: (1 - alpha) * factor * (temperatureSquared ? temperature ** 2 : 1),
      partFactor: factor,
    });
    const { ceRows, divergenceRows: rows } = parts;
    const part = (x: Tensor) => reduction === "none" ? x.detach() : total(x, op);
    const result = returnParts ? { loss, crossEntropy: part(ceRows), divergence: part(rows) } : loss;
    ceRows.dispose();
    rows.dispose();
    return result;
  });
}
