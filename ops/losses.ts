/**
 * The common losses besides the fused ones. Each is an elementwise expression with a reduction, or composed of primitive ops. The loss of f16 tensors is f32,
 * too.
 */
import { checkBoolean, checkNumber, checkOneOf, checkOptions } from "../kernels/check.ts";
import { nllRows } from "../kernels/nll.ts";
import { composed } from "../autograd/composed.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import { forwardKl } from "./divergence.ts";
import { binary, converted, unary, where } from "./elementwise.ts";
import { broadcastShape, mapped } from "./mapped.ts";
import { checkDim, max, mean as average, sum } from "./reduce.ts";
import {
  checkLabels,
  checkLossOptions,
  countsOf,
  type LossReduction,
  type RowLaunch,
  rowLoss,
  rowsOf,
} from "./row_loss.ts";
import { checkRank, expand } from "./shape.ts";
import { logSoftmax } from "./softmax.ts";

/** Options of the elementwise losses. */
export interface ReductionOptions {
  /** `"mean"` over all elements by default; NaN if there are none. */
  reduction?: LossReduction;
}

function reduced(x: Tensor, reduction: LossReduction): Tensor {
  return reduction === "none" ? x : reduction === "sum" ? sum(x) : average(x);
}

/** x in f32, in which losses are computed; the gradient of an f16 x is rounded once, at the end. */
const inF32 = (op: string, x: Tensor): Tensor => x.dtype === "f32" ? x : converted(op, x, "f32");

/** Checks that two arguments are tensors of one shape and dtype, and returns them in f32. */
function pairInF32(op: string, name: string, a: Tensor, target: Tensor): [Tensor, Tensor] {
  checkTensor(op, name, a);
  checkTensor(op, "target", target, [a.dtype], a.shape);
  return [inF32(op, a), inF32(op, target)];
}

/**
 * A loss of two tensors of one shape, from expressions of its value and derivatives (with a, b, the value c and its gradient d). `name` is that of the first
 * tensor.
 */
function pointwise(
  op: string,
  name: string,
  value: string,
  byA: string,
  byB: string,
): (a: Tensor, target: Tensor, options?: ReductionOptions) => Tensor {
  const f = binary(op, value, byA, byB);
  return (a, target, options = {}) => {
    checkLossOptions(op, options, ["reduction"]);
    return composed(op, () => reduced(f(...pairInF32(op, name, a, target)), options.reduction ?? "mean"));
  };
}

/**
 * (prediction − target)², averaged over all elements (or `"sum"`, `"none"`). Both of one shape; gradients 2(prediction − target) and its negative, over the
 * number of elements. Throws a TypeError for different shapes. Source: `torch.nn.functional.mse_loss`.
 *
 * @example
 * ```ts
 * import { init, mseLoss, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await mseLoss(tensor([1, 2]), tensor([0, 4])).item()); // 2.5
 * ```
 */
export const mseLoss: (prediction: Tensor, target: Tensor, options?: ReductionOptions) => Tensor = pointwise(
  "mseLoss",
  "prediction",
  "(a - b) * (a - b)",
  "2.0 * d * (a - b)",
  "2.0 * d * (b - a)",
);

/**
 * |prediction − target|, averaged over all elements (or `"sum"`, `"none"`). Both of one shape; gradients ±sign(prediction − target) over the number of elements,
 * 0 where they are equal. Throws a TypeError for different shapes. Source: `torch.nn.functional.l1_loss`.
 *
 * @example
 * ```ts
 * import { init, l1Loss, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await l1Loss(tensor([1, 2]), tensor([0, 4])).item()); // 1.5
 * ```
 */
export const l1Loss: (prediction: Tensor, target: Tensor, options?: ReductionOptions) => Tensor = pointwise(
  "l1Loss",
  "prediction",
  "abs(a - b)",
  "d * sign(a - b)",
  "d * sign(b - a)",
);

/**
 * −t·ln σ(x) − (1 − t)·ln(1 − σ(x)) with σ = sigmoid, x the logits and t the target probabilities of the same shape, in nats, averaged over all elements
 * (or `"sum"`, `"none"`). Gradients σ(x) − t for the logits and −x for the target. Small losses keep their digits. Throws a TypeError for different
 * shapes. Source: `torch.nn.functional.binary_cross_entropy_with_logits`.
 *
 * @example
 * ```ts
 * import { binaryCrossEntropyWithLogits, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await binaryCrossEntropyWithLogits(tensor([0]), tensor([1])).item()); // ln 2
 * ```
 */
export const binaryCrossEntropyWithLogits: (logits: Tensor, target: Tensor, options?: ReductionOptions) => Tensor =
  pointwise(
    "binaryCrossEntropyWithLogits",
    "logits",
    // max(a, 0) − a·b = |a|·(1 − b or b), which does not cancel, where 0·∞ is 0
    "select(abs(a) * select(1.0 - b, b, a <= 0.0), 0.0, b == select(1.0, 0.0, a <= 0.0)) + log1p_(exp_(-abs(a)))",
    "d * select(sigmoid_(a) - b, (1.0 - b) - sigmoid_(-a), a > 0.0)",
    "-d * a",
  );

/** Options of `smoothL1Loss`. */
export interface SmoothL1Options extends ReductionOptions {
  /** Where the quadratic part ends and the linear part begins; 1 by default, 0 gives `l1Loss`. */
  beta?: number;
}

const huber = unary(
  "smoothL1Loss",
  "select(abs(a) - 0.5 * s0, 0.5 * a * a / s0, abs(a) < s0)",
  "c * min_(max_(a / s0, -1.0), 1.0)",
);

/**
 * With d = prediction − target: d²/(2β) for |d| < β, else |d| − β/2, averaged over all elements (or `"sum"`, `"none"`). β is 1 by default; 0 is
 * `l1Loss`. Gradient: d/β limited to ±1. Throws a TypeError for different shapes, a RangeError for a negative β. Source:
 * `torch.nn.functional.smooth_l1_loss`; Girshick 2015.
 *
 * @example
 * ```ts
 * import { init, smoothL1Loss, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await smoothL1Loss(tensor([0.5, 3]), tensor([0, 0]), { reduction: "none" }).array()); // [0.125, 2.5]
 * ```
 */
export function smoothL1Loss(prediction: Tensor, target: Tensor, options: SmoothL1Options = {}): Tensor {
  const op = "smoothL1Loss";
  checkLossOptions(op, options, ["reduction", "beta"]);
  const { reduction = "mean", beta = 1 } = options;
  checkNumber(op, "beta", beta, { min: 0 });
  return composed(op, () => {
    const [x, t] = pairInF32(op, "prediction", prediction, target);
    return beta === 0 ? l1Loss(x, t, { reduction }) : reduced(huber(x.sub(t), [beta]), reduction);
  });
}

/** Options of `klDiv`. */
export interface KlDivOptions {
  /** `"mean"` divides by all elements, which is not the divergence; `"batchmean"` by the first dimension, which is. */
  reduction?: LossReduction | "batchmean";
  /** Whether the target holds log-probabilities too. */
  logTarget?: boolean;
}

// 0·ln 0 = 0, also if the log-probability is −∞
const klOfProbability = binary(
  "klDiv",
  "select(b * (log_(b) - a), 0.0, b == 0.0)",
  "-d * b",
  "select(d * (log_(b) + 1.0 - a), 0.0, b == 0.0)",
);
const klOfLog = binary(
  "klDiv",
  "select(exp(b) * (b - a), 0.0, exp(b) == 0.0)",
  "-d * exp(b)",
  "select(d * exp(b) * (b - a + 1.0), 0.0, exp(b) == 0.0)",
);

/**
 * PyTorch's `kl_div`: t·(ln t − x) elementwise, from log-probabilities x and probabilities t (or log-probabilities, with `logTarget`), of one shape. For
 * ported code: `forwardKl` and the other divergences take logits, keep their digits for close rows, and their mean is the divergence.
 *
 * Reductions: `"none"`, `"sum"`, `"mean"` (the default: divided by all elements, which is not the divergence) and `"batchmean"` (divided by the size of the
 * first dimension). Both arguments get gradients: −t and ln t + 1 − x. A zero target contributes 0. Throws a TypeError for different shapes.
 *
 * Source: `torch.nn.functional.kl_div`.
 *
 * @example
 * ```ts
 * import { init, klDiv, logSoftmax, randn, softmax } from "@limbeck/limbeck";
 *
 * await init();
 * const student = randn([4, 10]), teacher = randn([4, 10]);
 * console.log(await klDiv(logSoftmax(student), softmax(teacher), { reduction: "batchmean" }).item());
 * ```
 */
export function klDiv(logProbabilities: Tensor, target: Tensor, options: KlDivOptions = {}): Tensor {
  const op = "klDiv";
  checkOptions(op, options, ["reduction", "logTarget"]);
  const { reduction = "mean", logTarget = false } = options;
  checkBoolean(op, "logTarget", logTarget);
  checkOneOf(op, "reduction", reduction, ["mean", "sum", "none", "batchmean"]);
  return composed(op, () => {
    const [x, t] = pairInF32(op, "logProbabilities", logProbabilities, target);
    const terms = logTarget ? klOfLog(x, t) : klOfProbability(x, t);
    if (reduction === "batchmean") return sum(terms).div(logProbabilities.shape[0] ?? 1);
    return reduced(terms, reduction);
  });
}

/** Options of `nllLoss`. */
export interface NllOptions {
  /** `"mean"` by default, weighted by the class weights of the rows that are not ignored. */
  reduction?: LossReduction;
  /** −100 by default. */
  ignoreIndex?: number;
  /** Class weights, f32 [V]. They get no gradient. */
  weight?: Tensor;
}

/**
 * −w_y·x_y by row, from log-probabilities x [..., V], class indices y [...] (i32 or u32) and class weights w [V] (1 by default). Rows with the label
 * `ignoreIndex` (−100) are ignored. The mean divides by the sum of the other rows' weights. If that is 0 (no row, all ignored, all of weight 0), loss and
 * gradient are 0; PyTorch's loss is NaN. Gradient: −w_y at the label's column, 0 elsewhere. Errors as `crossEntropy`, which takes logits and keeps their digits.
 * Source: `torch.nn.functional.nll_loss`.
 *
 * @example
 * ```ts
 * import { init, logSoftmax, nllLoss, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const x = logSoftmax(tensor([[0, 0], [1, 3]]));
 * console.log(await nllLoss(x, tensor(new Int32Array([0, 1]))).item()); // 0.410038
 * ```
 */
export function nllLoss(logProbabilities: Tensor, target: Tensor, options: NllOptions = {}): Tensor {
  const op = "nllLoss";
  checkLossOptions(op, options, ["reduction", "ignoreIndex", "weight"]);
  const { reduction = "mean", ignoreIndex = -100, weight } = options;
  const batch = rowsOf(op, "logProbabilities", logProbabilities), { rows, columns } = batch;
  checkLabels(op, "target", target, batch, ignoreIndex);
  if (weight !== undefined) checkTensor(op, "weight", weight, ["f32"], [columns]);
  return composed(op, () => {
    const counts = countsOf(target, weight, batch, ignoreIndex);
    const launch: RowLaunch = (loss, [gradient], upstream) => {
      nllRows(logProbabilities.dtype, {
        logProbabilities: logProbabilities.memory,
        labels: target.memory,
        counts: counts.memory,
        weight: weight?.memory ?? null,
        upstream,
        loss,
        gradient,
      }, { rows, columns, ignoreIndex, mean: reduction === "mean" });
    };
    return rowLoss(op, [logProbabilities], batch, reduction, launch, counts, weight ? [target, weight] : [target]);
  });
}

/**
 * a·b / (max(‖a‖, eps)·max(‖b‖, eps)) over `dim` (1 by default, as in PyTorch), with broadcasting; eps is 1e-8 by default, and at least 2⁻⁶³.
 * Gradients: (b/‖b‖ − cos·a/‖a‖)/‖a‖ for a (without the second term below eps), likewise for b. Throws a TypeError for shapes that do not broadcast, a
 * RangeError for a dimension that does not exist. Source: `torch.nn.functional.cosine_similarity`.
 *
 * @example
 * ```ts
 * import { cosineSimilarity, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await cosineSimilarity(tensor([[1, 0]]), tensor([[1, 1]])).array()); // [0.7071]
 * ```
 */
export function cosineSimilarity(a: Tensor, b: Tensor, options: { dim?: number; eps?: number } = {}): Tensor {
  const op = "cosineSimilarity";
  checkOptions(op, options, ["dim", "eps"]);
  checkTensor(op, "a", a);
  checkTensor(op, "b", b, [a.dtype]);
  const { dim: asked = 1, eps = 1e-8 } = options;
  const shape = broadcastShape(op, [a.shape, b.shape]), rank = shape.length;
  const dim = checkDim(op, asked, rank) - rank; // counted from the back, since a and b may differ in rank
  checkNumber(op, "eps", eps, { above: 0 });
  const least = Math.max(eps * eps, 2 ** -126); // a smaller number could become 0 in f32
  const norm = (x: Tensor) => sum(x.square(), { dim }).maximum(least).sqrt();
  return composed(op, () => {
    // what is broadcast along dim counts in its norm as often as in the product
    const [x, y] = [a, b].map((x) => inF32(op, x.shape.at(dim) === shape.at(dim) ? x : expand(x, shape)));
    return sum(x.mul(y), { dim }).div(norm(x).mul(norm(y)));
  });
}

/**
 * 1 − cos(a, b) where y is 1, max(0, cos(a, b) − margin) where y is −1; a and b [N, D], y [N], margin 0 by default. Averaged over rows (or `"sum"`,
 * `"none"`). Gradients: those of `cosineSimilarity`, times −1 where y is 1 and 1 where y is −1 and the loss above 0. Throws a TypeError for wrong shapes,
 * a RangeError for a margin outside [−1, 1] and for another y that the host wrote as i32; any other wrong y makes its row NaN. Source:
 * `torch.nn.functional.cosine_embedding_loss`.
 *
 * @example
 * ```ts
 * import { cosineEmbeddingLoss, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const a = tensor([[1, 0], [1, 0]]), b = tensor([[1, 0], [1, 1]]);
 * console.log(await cosineEmbeddingLoss(a, b, tensor([1, -1])).item()); // 0.3536
 * ```
 */
export function cosineEmbeddingLoss(
  a: Tensor,
  b: Tensor,
  y: Tensor,
  options: ReductionOptions & { margin?: number } = {},
): Tensor {
  const op = "cosineEmbeddingLoss";
  checkLossOptions(op, options, ["reduction", "margin"]);
  const { reduction = "mean", margin = 0 } = options;
  checkNumber(op, "margin", margin, { min: -1, max: 1 });
  checkTensor(op, "a", a);
  checkTensor(op, "b", b, [a.dtype]);
  if (b.rank === 0) checkRank(op, "a", a, 1); // two scalars have no dimension along which to compare
  checkTensor(op, "y", y, ["f32", "f16", "i32"], broadcastShape(op, [a.shape, b.shape]).slice(0, -1));
  y.storage.host?.forEach((sign, i) => {
    if (Math.abs(sign) !== 1) throw new RangeError(`${op}: y must be 1 or -1, got ${sign} at row ${i}`);
  });
  return composed(op, () => {
    const cosine = cosineSimilarity(a, b, { dim: -1 });
    const same = mapped(op, "max(a, 0.0)", [y], y.shape, [], "f32"); // 1 or 0
    const known = mapped(op, "select(log_(-1.0 - a * a), 0.0, abs(a) == 1.0)", [y], y.shape, [], "f32"); // NaN or 0
    const rows = where(same, cosine.neg().add(1), cosine.sub(margin).relu());
    return reduced(rows.add(known), reduction);
  });
}

/** Options of losses over rows of logits. */
export interface RowOptions {
  /** Logits are divided by it; 1 by default. */
  temperature?: number;
  /** `"mean"` over rows by default; 0 if there are none. */
  reduction?: LossReduction;
}

/** The reduced loss of rows. The mean over no rows is 0, as for the fused losses. */
function reducedRows(rows: Tensor, reduction: LossReduction = "mean"): Tensor {
  return reduced(rows, rows.size === 0 && reduction === "mean" ? "sum" : reduction);
}

/**
 * H by row, from logits of which the largest is 0. Its gradient is −p·(z − E_p z): −p·(ln p + H) would lose its digits where ln p hardly varies, −p·(ln p + 1),
 * of which logSoftmax's backward pass would remove what is a multiple of p, in peaked rows.
 */
function entropyOfRows(z: Tensor): Tensor {
  const log = logSoftmax(z.detach());
  using terms = mapped("entropy", "select(-exp(a) * a, 0.0, exp(a) == 0.0)", [log], log.shape);
  return record({
    op: "entropy",
    inputs: [z],
    output: sum(terms, { dim: -1 }),
    saved: [log, z],
    backward: (dY) => {
      const terms = mapped("entropy backward", "select(exp(a) * b, 0.0, exp(a) == 0.0)", [log, z], z.shape);
      const mean = sum(terms, { dim: -1, keepDim: true }), d = dY.sameMemory(mean.shape, "entropy");
      const slope = "select(-exp(a) * (b - c) * d, 0.0, exp(a) == 0.0)";
      return [mapped("entropy backward", slope, [log, z, mean, d], z.shape)];
    },
  });
}

/** x/T minus each row's largest, which does not change the distribution. The largest ones are then near 0, where the rounding of the division is small. */
function cooled(x: Tensor, temperature: number): Tensor {
  using constant = x.detach();
  using largest = max(constant, { dim: -1, keepDim: true });
  return record({
    op: "entropy",
    inputs: [x],
    output: mapped("entropy", "(a - b) / s0", [x, largest], x.shape, [temperature]),
    backward: (dY) => [mapped("entropy backward", "a / s0", [dY], x.shape, [temperature])],
  });
}

/**
 * H(p) = −Σ p·ln p by row, with p = softmax(logits/T) over the last dimension: between 0 and ln V, in nats. Averaged over rows (or `"sum"`, `"none"`); T
 * is 1 by default. Gradient: −p·(ln p + H)/T. Throws a TypeError unless `logits` is a tensor of f32 or f16, a RangeError for T ≤ 0. Source: Shannon 1948.
 *
 * @example
 * ```ts
 * import { entropy, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await entropy(tensor([[0, 0, 0, 0]])).item()); // ln 4
 * ```
 */
export function entropy(logits: Tensor, options: RowOptions = {}): Tensor {
  const op = "entropy";
  checkLossOptions(op, options, ["temperature", "reduction"]);
  rowsOf(op, "logits", logits);
  const { temperature = 1, reduction } = options;
  return composed(op, () => {
    return reducedRows(entropyOfRows(cooled(inF32(op, logits), temperature)), reduction);
  });
}

/**
 * H(p, q) = −Σ p·ln q by row, with p = softmax(teacher/T), q = softmax(student/T), in nats: forward KL plus the teacher's entropy. Averaged over rows (or
 * `"sum"`, `"none"`). Gradients: (q − p)/T for the student, −p·(ln q + H(p, q))/T for the teacher. Throws a TypeError for different shapes, a RangeError
 * for T ≤ 0. Source: Cover & Thomas 2006.
 *
 * @example
 * ```ts
 * import { crossEntropyOfDistributions, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const teacher = tensor([[0, 1]]), student = tensor([[1, 0]]);
 * console.log(await crossEntropyOfDistributions(student, teacher).item()); // 1.04432
 * ```
 */
export function crossEntropyOfDistributions(student: Tensor, teacher: Tensor, options: RowOptions = {}): Tensor {
  const op = "crossEntropyOfDistributions";
  checkLossOptions(op, options, ["temperature", "reduction"]);
  rowsOf(op, "student", student);
  checkTensor(op, "teacher", teacher, [student.dtype], student.shape);
  return composed(op, () => {
    const t = inF32(op, teacher);
    return forwardKl(student, t, options).add(entropy(t, options));
  });
}

// eˣ − 1 − x, exact near 0, and its derivative
const excess = unary("gaussianKl", "select(exp(a) - 1.0 - a, excess_series_(a), abs(a) < 1.0)", "c * expm1_(a)");

// (a·e^(−b/2))², which is 0 for a = 0 however small the variance e^b
const distance = binary(
  "gaussianKl",
  "select((a * exp_(-0.5 * b)) * (a * exp_(-0.5 * b)), 0.0, a == 0.0)",
  "select(2.0 * d * (a * exp_(-0.5 * b)) * exp_(-0.5 * b), 0.0, a == 0.0)",
  "-d * c",
);

/**
 * KL(N(mean, e^logVariance) ‖ N(otherMean, e^otherLogVariance)) of diagonal Gaussians [..., D], summed over the last dimension and averaged over the rows (0
 * if there are none); the other is N(0, 1) by default: ½Σ[e^δ − 1 − δ + (μ − μ')²/σ'²] with δ = logVariance − otherLogVariance. In nats; identical ones
 * give exactly 0.
 *
 * Gradients, over the number of rows: (μ − μ')/σ'² for the mean, ½(e^δ − 1) for logVariance, −(μ − μ')/σ'² and ½(1 − e^δ − (μ − μ')²/σ'²) for the others.
 * Throws a TypeError for different shapes or dtypes, a RangeError for rows of no columns. Source: Kingma & Welling 2014.
 *
 * @example
 * ```ts
 * import { gaussianKl, init, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await gaussianKl(zeros([8, 2]), zeros([8, 2])).item()); // 0
 * ```
 */
export function gaussianKl(mean: Tensor, logVariance: Tensor, otherMean?: Tensor, otherLogVariance?: Tensor): Tensor {
  const op = "gaussianKl";
  rowsOf(op, "mean", mean, "column");
  checkTensor(op, "logVariance", logVariance, [mean.dtype], mean.shape);
  for (const [name, x] of Object.entries({ otherMean, otherLogVariance })) {
    if (x !== undefined) checkTensor(op, name, x, [mean.dtype], mean.shape);
  }
  return composed(op, () => {
    const m = inF32(op, mean), v = inF32(op, logVariance), n = otherMean && inF32(op, otherMean);
    const w = otherLogVariance && inF32(op, otherLogVariance);
    const delta = w ? v.sub(w) : v, apart = n ? m.sub(n) : m;
    return reducedRows(sum(excess(delta).add(w ? distance(apart, w) : apart.square()).mul(0.5), { dim: -1 }));
  });
}
