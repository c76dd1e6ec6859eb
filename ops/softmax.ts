/** Softmax and log-softmax. */
import { softmaxRows, softmaxRowsBackward } from "../kernels/softmax.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { checkDim } from "./reduce.ts";
import { checkRank, transpose } from "./shape.ts";

function soft(kind: "softmax" | "logSoftmax", x: Tensor, dim: number): Tensor {
  checkTensor(kind, "x", x);
  checkRank(kind, "x", x, 1);
  const last = x.rank - 1, along = checkDim(kind, dim, x.rank);
  if (along !== last) {
    using turned = transpose(x, along, last), rows = soft(kind, turned, last); // records keep what they saved
    return transpose(rows, along, last);
  }
  const columns = x.shape[last], rows = columns === 0 ? 0 : x.size / columns;
  const y = Tensor.empty(x.shape, x.dtype, kind);
  softmaxRows(kind, x.memory, y.memory, x.dtype, rows, columns);
  return record({
    op: kind,
    inputs: [x],
    output: y,
    saved: [y],
    backward: (dY) => {
      const dX = Tensor.empty(x.shape, x.dtype, kind);
      softmaxRowsBackward(kind, y.memory, dY.memory, dX.memory, x.dtype, rows, columns);
      return [dX];
    },
  });
}

/**
 * eˣ / Σ eˣ over `dim` (the last by default), in x's shape. Gradient: dX = y·(dY − Σ dY·y). A −∞ has probability 0; a row with a NaN or +∞, or with only −∞, is
 * NaN. Throws a TypeError for integers and for a scalar, a RangeError for a dimension that x lacks. Source: `torch.softmax`.
 *
 * @example
 * ```ts
 * import { init, softmax, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await softmax(tensor([0, Math.log(3)]), -1).array()); // nearly [0.25, 0.75]
 * ```
 */
export function softmax(x: Tensor, dim = -1): Tensor {
  return soft("softmax", x, dim);
}

/**
 * x − ln Σ eˣ over `dim` (the last by default), in x's shape. Gradient: dX = dY − eʸ·Σ dY. Throws a TypeError for integers and for a scalar, a RangeError
 * for a dimension that x lacks. Source: `torch.log_softmax`.
 *
 * @example
 * ```ts
 * import { init, logSoftmax, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await logSoftmax(tensor([0, 0])).array()); // nearly [-0.693147, -0.693147]
 * ```
 */
export function logSoftmax(x: Tensor, dim = -1): Tensor {
  return soft("logSoftmax", x, dim);
}
