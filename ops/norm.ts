/** Normalisation over the last dimension. */
import { checkNumber, checkOptions } from "../kernels/check.ts";
import { normRows, normRowsBackward } from "../kernels/norm.ts";
import { composed } from "../autograd/composed.ts";
import { held } from "../autograd/storage.ts";
import { hidden, record } from "../autograd/tape.ts";
import { checkShape, checkTensor, Tensor } from "../autograd/tensor.ts";
import { rowsOf } from "./row_loss.ts";
import { wrongFeatures } from "./shape.ts";

/** Options of the norms. */
export interface NormOptions {
  /** Added to the variance, 1e-5 by default, or to the mean square, by default the machine epsilon of x's dtype: 2⁻²³, of f16 2⁻¹⁰. */
  eps?: number;
}

function norm(
  op: "layerNorm" | "rmsNorm",
  x: Tensor,
  weight: Tensor,
  bias: Tensor | null,
  options: NormOptions,
): Tensor {
  checkOptions(op, options, ["eps"]);
  const { rows, columns } = rowsOf(op, "x", x, "column");
  const { eps = op === "layerNorm" ? 1e-5 : x.dtype === "f16" ? 2 ** -10 : 2 ** -23 } = options;
  checkNumber(op, "eps", eps, { min: 0 });
  checkTensor(op, "weight", weight, [x.dtype]);
  if (weight.rank === 1 && weight.size !== columns) throw wrongFeatures(op, x.shape, weight);
  checkShape(op, "weight", weight, [columns]);
  if (bias) checkTensor(op, "bias", bias, [x.dtype], [columns]);
  const y = Tensor.empty(x.shape, x.dtype, op), stats = hidden([rows, 2], "f32"), element = x.dtype;
  const memories = { x: x.memory, weight: weight.memory, bias: bias?.memory ?? null, y: y.memory, stats: stats.memory };
  normRows(memories, element, rows, columns, eps);
  return record({
    op,
    inputs: bias ? [x, weight, bias] : [x, weight],
    output: y,
    saved: [x, weight],
    hidden: [stats],
    backward: (dY, wants, gradientOf, earlier) => {
      const [dX, dWeight, dBias] = [0, 1, 2].map((i) => wants[i] ? gradientOf(i) : null);
      const plus = dX && earlier(0); // the gradient that x has already, from a residual connection
      normRowsBackward(
        {
          x: x.memory,
          weight: weight.memory,
          stats: stats.memory,
          dY: dY.memory,
          plus: plus?.memory ?? null,
          dX: dX?.memory ?? null,
          dWeight: dWeight?.memory ?? null,
          dBias: dBias?.memory ?? null,
        },
        bias !== null,
        element,
        rows,
        columns,
        () => held([x, stats, dY]),
      );
      return [dX, dWeight, dBias];
    },
  });
}

/**
 * x̂·weight + bias over the last dimension, with x̂ = (x − mean)·r, r = 1/√(Σ(x − mean)²/D + eps); x [..., D], weight and bias [D], eps 1e-5 by default.
 * Two numbers a row are kept for the gradient.
 *
 * Gradients: dX = r·(g − mean g − x̂·mean(g·x̂)) with g = dY·weight; dWeight = Σ dY·x̂, dBias = Σ dY over the rows. Throws a TypeError for wrong shapes or
 * dtypes, a RangeError for an eps below 0 and rows of no columns. Source: Ba, Kiros & Hinton 2016; `torch.nn.functional.layer_norm`.
 *
 * @example
 * ```ts
 * import { init, layerNorm, ones, tensor, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await layerNorm(tensor([[1, 3]]), ones([2]), zeros([2])).array()); // nearly [[-1, 1]]
 * ```
 */
export function layerNorm(x: Tensor, weight: Tensor, bias: Tensor, options: NormOptions = {}): Tensor {
  checkTensor("layerNorm", "weight", weight);
  checkTensor("layerNorm", "bias", bias);
  return composed("layerNorm", () => norm("layerNorm", x, weight, bias, options));
}

/**
 * x̂·weight over the last dimension, with x̂ = x·r, r = 1/√(mean x² + eps); x [..., D], weight [D], eps 2⁻²³ by default (of f16 2⁻¹⁰).
 *
 * Gradients: dX = r·(g − x̂·mean(g·x̂)) with g = dY·weight; dWeight = Σ dY·x̂ over the rows. Throws a TypeError for wrong shapes or dtypes, a RangeError for
 * an eps below 0 and rows of no columns. Source: Zhang & Sennrich 2019; `torch.nn.functional.rms_norm`.
 *
 * @example
 * ```ts
 * import { init, rmsNorm, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await rmsNorm(tensor([[3, -3]]), tensor([1, 2])).array()); // nearly [[1, -2]]
 * ```
 */
export function rmsNorm(x: Tensor, weight: Tensor, options: NormOptions = {}): Tensor {
  return composed("rmsNorm", () => norm("rmsNorm", x, weight, null, options));
}
