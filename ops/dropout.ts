/** Dropout. */
import { checkBoolean, checkNumber, checkOptions } from "../kernels/check.ts";
import { dropout as kernel } from "../kernels/random.ts";
import { composed } from "../autograd/composed.ts";
import { nextRandom } from "../autograd/random.ts";
import { chosen, record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";

/** Options of `dropout`. */
export interface DropoutOptions {
  /** The probability that an element is zeroed; 0.5 by default. */
  p?: number;
  /** Whether anything is dropped; true by default. */
  training?: boolean;
}

/**
 * Zeroes each element with probability p and scales the others by 1/(1 − p), which preserves the expectation. The mask is a hash of (seed, step, number of
 * the op in its tape, element): it is never stored, and the backward pass computes it again. If nothing is dropped, the result is a view of x.
 *
 * Gradient: dX = dY/(1 − p) where the element was kept, else 0. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError unless 0 ≤ p ≤ 1. Source:
 * Srivastava et al. 2014.
 *
 * @example
 * ```ts
 * import { dropout, init, manualSeed, ones } from "@limbeck/limbeck";
 *
 * await init();
 * manualSeed(1);
 * console.log(await dropout(ones([8]), { p: 0.5 }).array()); // zeros and twos
 * ```
 */
export function dropout(x: Tensor, options: DropoutOptions = {}): Tensor {
  checkOptions("dropout", options, ["p", "training"]);
  const { p = 0.5, training = true } = options;
  checkNumber("dropout", "p", p, { min: 0, max: 1 });
  checkBoolean("dropout", "training", training);
  checkTensor("dropout", "x", x);
  if (!chosen(training) || p === 0) { // a view, so that the result can be disposed of separately from x, as usual
    const y = x.sameMemory(x.shape, "dropout");
    return record({ op: "dropout", inputs: [x], output: y, backward: (dY) => [dY.sameMemory(x.shape, "dropout")] });
  }
  return composed("dropout", () => {
    const { state, op, done } = nextRandom();
    const y = Tensor.empty(x.shape, x.dtype, "dropout"), numbers = { op, size: x.size, p };
    kernel(x.dtype, { x: x.memory, state: state.memory, y: y.memory }, numbers);
    const recorded = record({
      op: "dropout",
      inputs: [x],
      output: y,
      saved: [state],
      backward: (dY) => {
        const dX = Tensor.empty(x.shape, x.dtype, "dropout");
        kernel(x.dtype, { x: dY.memory, state: state.memory, y: dX.memory }, numbers);
        return [dX];
      },
    });
    done();
    return recorded;
  });
}
