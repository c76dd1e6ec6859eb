import { checkBoolean } from "../kernels/check.ts";
import { type CrossEntropyBuffers, type CrossEntropyNumbers, crossEntropyRows } from "../kernels/cross_entropy.ts";
import { composed } from "../autograd/composed.ts";
import { DTYPES, isFloat } from "../autograd/storage.ts";
import { hidden } from "../autograd/tape.ts";
import { checkShape, checkTensor, HOW_I32, type Tensor } from "../autograd/tensor.ts";
import { mapped } from "./mapped.ts";
import {
  checkLabels,
  checkLossOptions,
  countsOf,
  type LossReduction,
  type RowLaunch,
  rowLoss,
  rowsOf,
  total,
} from "./row_loss.ts";

/** Options of `crossEntropy`. */
export interface CrossEntropyOptions {
  /** `"mean"` by default: over the rows that are not ignored, weighted by their class weights. */
  reduction?: LossReduction;
  /** The label of rows that are ignored; −100 by default. */
  ignoreIndex?: number;
  /** ε: the share of each target that is spread evenly over all classes; 0 by default. */
  labelSmoothing?: number;
  /** λ of the z-loss λ·lse² (Liger's `lse_square_scale`); 0 by default. */
  zLoss?: number;
  /** If given, logits become softcap·tanh(logits/T/softcap), with T the temperature. */
  softcap?: number;
  /** Class weights, f32 [V]. They get no gradient. */
  weight?: Tensor;
  /** Logits are divided by it first; 1 by default. */
  temperature?: number;
  /** Whether the z-loss is returned as well (detached). */
  returnZLoss?: boolean;
  /** Whether the accuracy is returned as well: the share of kept rows whose largest logit is the target's. Class indices only. */
  returnAccuracy?: boolean;
  /** Whether the index of each row's largest logit is returned as well, as i32. */
  returnPredictions?: boolean;
}

/** What `crossEntropy` returns with a `return…` option. All but `loss` are detached. */
export interface CrossEntropyResult {
  /** What `crossEntropy` returns otherwise. */
  loss: Tensor;
  /** The z-loss in it, with the same reduction. */
  zLoss?: Tensor;
  /** The share of kept rows whose prediction is right, a scalar. */
  accuracy?: Tensor;
  /** Indices of the largest logits, i32. */
  predictions?: Tensor;
}

/** Internal: the names of the options. */
export const OPTIONS: readonly string[] = [
  "reduction",
  "ignoreIndex",
  "labelSmoothing",
  "zLoss",
  "softcap",
  "weight",
  "temperature",
  "returnZLoss",
  "returnAccuracy",
  "returnPredictions",
];

/** Internal: the options as the kernel takes them. */
export function numbersOf(
  { reduction = "mean", ignoreIndex = -100, labelSmoothing = 0, zLoss = 0, temperature = 1, softcap = 0 }:
    CrossEntropyOptions,
): Pick<CrossEntropyNumbers, "mean" | "ignoreIndex" | "smoothing" | "zLoss" | "temperature" | "softcap"> {
  return { mean: reduction === "mean", ignoreIndex, smoothing: labelSmoothing, zLoss, temperature, softcap };
}

/**
 * Internal: checks the `return…` options. `counts` are those of `countsOf`; `extras` are the memories that the kernel fills, null if no option is set; `result`
 * makes what the op returns.
 */
export function furtherReturns(
  op: string,
  options: CrossEntropyOptions,
  shape: readonly number[],
  counts: Tensor,
): {
  extras: CrossEntropyBuffers["extras"];
  result: (loss: Tensor) => Tensor | CrossEntropyResult;
} {
  const { reduction, returnZLoss = false, returnAccuracy = false, returnPredictions = false } = options;
  checkBoolean(op, "returnZLoss", returnZLoss);
  checkBoolean(op, "returnAccuracy", returnAccuracy);
  checkBoolean(op, "returnPredictions", returnPredictions);
  if (!returnZLoss && !returnAccuracy && !returnPredictions) return { extras: null, result: (loss) => loss };
  const zRows = hidden(shape, "f32"), predictions = hidden(shape, "i32"), hits = hidden(shape, "f32");
  const kept = counts.detach(); // the loss frees its own
  return {
    extras: { zRows: zRows.memory, predictions: predictions.memory, hits: hits.memory },
    result: (loss) => {
      const result: CrossEntropyResult = { loss };
      if (returnZLoss) result.zLoss = reduction === "none" ? zRows.detach() : total(zRows, op);
      if (returnAccuracy) {
        using right = total(hits, op);
        result.accuracy = mapped("accuracy", "select(a / b, 0.0, b == 0.0)", [right, [kept, []]], []);
      }
      if (returnPredictions) result.predictions = predictions.detach();
      for (const x of [zRows, predictions, hits, kept]) x.dispose();
      return result;
    },
  };
}

/**
 * Cross-entropy of logits [..., V] with class indices [...] (i32 or u32) or with a probability matrix [..., V].
 *
 * With x = logits/T (or softcap·tanh(logits/T/softcap)), lse = ln Σ eˣ, prob = softmax(x), class weights w (1 by default), W = Σ w, and ε, λ as named below:
 *
 * - row: ℓ = (1−ε)·w_y·(lse − x_y) + (ε/V)·Σ_c w_c·(lse − x_c), and the z-loss z = λ·lse²
 * - `"none"`: ℓ + z by row, 0 for ignored rows · `"sum"`: Σ · `"mean"`: Σℓ/Σ_kept w_y + Σz/kept
 * - gradient of the mean: {[(1−ε)·w_y·(prob − 1_y) + (ε/V)·(W·prob − w)]/Σ_kept w_y + 2λ·lse·prob/kept}·(1 − tanh²)/T
 * - soft targets t: ℓ = −Σ_c w_c·t'_c·ln prob_c with t' = (1−ε)t + ε/V; the mean is over rows; nothing is ignored, the target gets no gradient
 *
 * Natural logarithms (nats). f16 logits get f16 gradients; arithmetic and loss are f32. No probability matrix is stored: value
 * and gradient come from one pass over the logits. If no row is kept, loss and gradient are 0.
 *
 * Throws a TypeError for wrong shapes or dtypes, a RangeError for wrong values and for labels outside [0, V) that the host wrote; a label that only the GPU has
 * seen makes its row's loss and gradient NaN.
 *
 * Source: `torch.nn.functional.cross_entropy`; z-loss: Chowdhery et al. 2022 (PaLM); softcap: Gemma 2, 2024; gradient in the same pass: Liger-Kernel, 2024.
 *
 * @example
 * ```ts
 * import { crossEntropy, init, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const logits = tensor([[2, 0, 0], [0, 1, 0]], { requiresGrad: true });
 * using tape = new Tape();
 * const loss = crossEntropy(logits, tensor(new Int32Array([0, -100])), { labelSmoothing: 0.1 });
 * loss.backward();
 * console.log(await loss.item(), await logits.grad!.array()); // nearly 0.372878, [[-0.146347, 0.0731736, 0.0731736], [0, 0, 0]]
 * ```
 */
export function crossEntropy(
  logits: Tensor,
  target: Tensor,
  options?: CrossEntropyOptions & { returnZLoss?: false; returnAccuracy?: false; returnPredictions?: false },
): Tensor;
/** With `returnAccuracy`: the loss, the accuracy, and whatever else was requested. */
export function crossEntropy(
  logits: Tensor,
  target: Tensor,
  options: CrossEntropyOptions & { returnAccuracy: true },
): CrossEntropyResult & { accuracy: Tensor };
/** With another `return…` option: the loss and what was requested. */
export function crossEntropy(
  logits: Tensor,
  target: Tensor,
  options: CrossEntropyOptions & ({ returnZLoss: true } | { returnPredictions: true }),
): CrossEntropyResult;
/** With options that are not known at compile time: a Tensor, or a result if a `return…` option is set. */
export function crossEntropy(
  logits: Tensor,
  target: Tensor,
  options?: CrossEntropyOptions,
): Tensor | CrossEntropyResult;
export function crossEntropy(
  logits: Tensor,
  target: Tensor,
  options: CrossEntropyOptions = {},
): Tensor | CrossEntropyResult {
  const op = "crossEntropy";
  checkLossOptions(op, options, OPTIONS);
  const { reduction = "mean", weight } = options, numbers = numbersOf(options), { ignoreIndex } = numbers;
  const batch = rowsOf(op, "logits", logits);
  const { rows, columns } = batch;
  checkTensor(op, "target", target, DTYPES);
  const soft = isFloat(target.dtype);
  if (soft) {
    if (target.shape.join() === batch.shape.join()) { // tensor([0, 1]) is f32
      const wanted = `dtype i32 or u32 as class indices (or shape [${logits.shape.join(", ")}] as probabilities)`;
      throw new TypeError(
        `${op}: target must have ${wanted}, got ${target.dtype} of shape [${target.shape.join(", ")}]${HOW_I32}`,
      );
    }
    checkShape(op, "target", target, logits.shape);
    if (options.ignoreIndex !== undefined) {
      throw new TypeError(`${op}: ignoreIndex does not go with soft targets, got ${ignoreIndex}`);
    }
    if (options.returnAccuracy) throw new TypeError(`${op}: returnAccuracy needs class indices, got soft targets`);
  } else checkLabels(op, "target", target, batch, ignoreIndex);
  if (weight !== undefined) checkTensor(op, "weight", weight, ["f32"], [columns]);

  return composed(op, () => {
    const counts = countsOf(soft ? undefined : target, weight, batch, ignoreIndex);
    const { extras, result } = furtherReturns(op, options, batch.shape, counts);
    const launch: RowLaunch = (loss, [dLogits], upstream) => {
      crossEntropyRows(logits.dtype, soft ? target.dtype : "index", {
        logits: logits.memory,
        target: target.memory,
        counts: counts.memory,
        weight: weight?.memory ?? null,
        upstream,
        loss,
        extras: upstream ? null : extras, // only the first launch, which has no upstream gradient, fills them
        dLogits,
      }, {
        rows,
        firstRow: 0,
        allRows: rows,
        columns,
        ...numbers,
      });
    };
    const more = weight ? [target, weight] : [target];
    return result(rowLoss(op, [logits], batch, reduction, launch, counts, more));
  });
}
