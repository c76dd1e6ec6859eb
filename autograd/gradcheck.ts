import { checkFunction, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { Scope } from "./scope.ts";
import { Storage, type TypedArray } from "./storage.ts";
import { noGrad, Tape } from "./tape.ts";
import { checkTensor, Tensor } from "./tensor.ts";

/** Options of `gradcheck`. */
export interface GradcheckOptions {
  /** h of the central difference; 1e-2 by default. For large elements it is at least 64 units in their last place. */
  step?: number;
  /** Largest deviation, as a share of the largest gradient; 2e-2 by default. */
  tolerance?: number;
}

/** The result of `gradcheck`. */
export interface GradcheckResult {
  /** Whether every input's gradient is within the tolerance. */
  ok: boolean;
  /** The largest deviation of each input, as a share of its largest gradient (at least 1e-3). */
  errors: number[];
}

/** `step`, or 64 units in the last place of x if that is more: f32 would lose a smaller step. */
const stepAt = (x: number, step: number) => Math.max(step, 2 ** (Math.floor(Math.log2(Math.abs(x))) - 17));

/**
 * Compares the gradients of `fn` with finite differences: (L(x + h·eᵢ) − L(x − h·eᵢ)) / 2h for every element, where L is a fixed random weighting of the
 * output. Values are f32, so the step is large and the tolerance wide: the check finds wrong formulas, not lost digits. `fn` must give the same value each time
 * (no dropout).
 *
 * Throws a TypeError unless every input is an f32 tensor.
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

  // tape and scopes close before each await, or they would own what others make meanwhile; reads are encoded at once, so the tensors may close after that
  const gradients = (): Promise<TypedArray>[] => {
    using tape = new Tape();
    const leaves = inputs.map((x, i) => fresh(values[i], x.shape));
    for (const leaf of leaves) leaf.requiresGrad = true;
    tape.leaves = leaves; // the gradients of parameters that fn uses do not change
    let output = fn(...leaves);
    checkTensor("gradcheck", "what fn returns", output, ["f32"]);
    output = output.reshape(output.shape); // fn may return a leaf
    if (output.requiresGrad) output.backward(fresh(weighting(output.size), output.shape));
    return leaves.map(async (leaf) => await leaf.grad?.data() ?? new Float32Array(leaf.size));
  };
  const analytic = await Promise.all(gradients());

  const lossAt = async (input: number, element: number, shift: number): Promise<number> => {
    const read = () => {
      using _scope = new Scope();
      const arguments_ = inputs.map((x, i) => {
        if (i !== input) return fresh(values[i], x.shape);
        const shifted = values[i].slice();
        shifted[element] += shift;
        return fresh(shifted, x.shape);
      });
      return noGrad(() => fn(...arguments_)).data();
    };
    const data = await read(), weights = weighting(data.length);
    return Array.from(data).reduce((sum, y, i) => sum + y * weights[i], 0); // in float64, so that the sum adds no error
  };
  if (!Object.is(await lossAt(-1, 0, 0), await lossAt(-1, 0, 0))) {
    throw new Error("gradcheck: fn must return the same each time, so without dropout or new random numbers");
  }
  const errors: number[] = [];
  for (let i = 0; i < inputs.length; i++) {
    const numeric = new Float64Array(inputs[i].size);
    for (let e = 0; e < inputs[i].size; e++) {
      const x = values[i][e], shift = stepAt(x, step);
      const up = Math.fround(x + shift), down = Math.fround(x - shift);
      numeric[e] = (await lossAt(i, e, shift) - await lossAt(i, e, -shift)) / (up - down);
    }
    const scale = numeric.reduce((m, g) => Math.max(m, Math.abs(g)), 1e-3);
    errors.push(numeric.reduce((worst, g, e) => Math.max(worst, Math.abs(g - analytic[i][e])), 0) / scale);
  }
  return { ok: errors.every((e) => e <= tolerance), errors };
}
