import { checkFunction, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { Scope } from "./scope.ts";
import { Storage } from "./storage.ts";
import { Tape } from "./tape.ts";
import { checkTensor, Tensor } from "./tensor.ts";

/** Options of `gradcheck`. */
export interface GradcheckOptions {
  /** Half the distance of the two values that a difference is taken from; 1e-2 unless given. */
  step?: number;
  /** Largest deviation, as a share of the largest gradient; 2e-2 unless given. */
  tolerance?: number;
}

/** What `gradcheck` found. */
export interface GradcheckResult {
  /** Whether every input's gradient is within the tolerance. */
  ok: boolean;
  /** The largest deviation of each input, as a share of its largest gradient (at least 1e-3). */
  errors: number[];
}

/**
 * Compares the gradients of `fn` with differences of its values: (L(x + h·eᵢ) − L(x − h·eᵢ)) / 2h for every element, with L a
 * fixed random weighting of the output. Values are f32, so the step is large and the tolerance wide: a check
 * for wrong formulas, not for lost digits. `fn` must give the same value each time (no dropout).
 *
 * Throws a TypeError where an input is no f32 tensor.
 *
 * @example
 * ```ts
 * import { gradcheck, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const { ok } = await gradcheck((x) => x.tanh().mul(x), [tensor([0.3, -1.2, 2])]);
 * console.log(ok); // true
 * ```
 */
export async function gradcheck(
  fn: (...inputs: Tensor[]) => Tensor,
  inputs: readonly Tensor[],
  options: GradcheckOptions = {},
): Promise<GradcheckResult> {
  checkFunction("gradcheck", "fn", fn);
  checkOptions("gradcheck", options, ["step", "tolerance"]);
  const { step = 1e-2, tolerance = 2e-2 } = options;
  checkNumber("gradcheck", "step", step, { above: 0 });
  checkNumber("gradcheck", "tolerance", tolerance, { above: 0 });
  if (!Array.isArray(inputs)) {
    throw new TypeError(`gradcheck: inputs must be an array of tensors, got ${describe(inputs)}`);
  }
  inputs.forEach((x, i) => checkTensor("gradcheck", `inputs[${i}]`, x, ["f32"]));
  const values = await Promise.all(inputs.map(async (x) => await x.data() as Float32Array));
  const fresh = (data: Float32Array, shape: readonly number[]) => {
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return Tensor.owned(new Storage(gpu().queue.upload(bytes, true)), shape, "f32", "gradcheck");
  };
  const weighting = (size: number) =>
    Float32Array.from({ length: size }, (_, i) => 0.5 + ((i * 2654435761) % 1000) / 1000);

  const analytic: Float32Array[] = [];
  {
    using _tape = new Tape();
    const leaves = inputs.map((x, i) => fresh(values[i], x.shape));
    for (const leaf of leaves) leaf.requiresGrad = true;
    const output = fn(...leaves);
    checkTensor("gradcheck", "what fn returns", output, ["f32"]);
    output.backward(fresh(weighting(output.size), output.shape));
    for (const leaf of leaves) {
      analytic.push(leaf.grad ? await leaf.grad.data() as Float32Array : new Float32Array(leaf.size));
    }
  }

  const lossAt = (input: number, element: number, shift: number): Tensor => {
    const arguments_ = inputs.map((x, i) => {
      if (i !== input) return fresh(values[i], x.shape);
      const shifted = values[i].slice();
      shifted[element] += shift;
      return fresh(shifted, x.shape);
    });
    return fn(...arguments_);
  };
  const weigh = async (output: Tensor): Promise<number> => {
    const weights = weighting(output.size);
    return Array.from(await output.data()).reduce((sum, y, i) => sum + y * weights[i], 0); // float64: the loss itself loses nothing
  };
  const errors: number[] = [];
  for (let i = 0; i < inputs.length; i++) {
    const numeric = new Float64Array(inputs[i].size);
    for (let e = 0; e < inputs[i].size; e++) {
      using _scope = new Scope();
      const up = Math.fround(values[i][e] + step), down = Math.fround(values[i][e] - step);
      numeric[e] = (await weigh(lossAt(i, e, step)) - await weigh(lossAt(i, e, -step))) / (up - down);
    }
    const scale = numeric.reduce((m, g) => Math.max(m, Math.abs(g)), 1e-3);
    errors.push(numeric.reduce((worst, g, e) => Math.max(worst, Math.abs(g - analytic[i][e])), 0) / scale);
  }
  return { ok: errors.every((e) => e <= tolerance), errors };
}
