/**
 * Initial values of parameters, written in place; random ones follow `manualSeed`. Fan-in and fan-out are those of a weight [out, in, …].
 *
 * @module
 */
import { checkNumber, describe } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { noGrad } from "../autograd/tape.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import { full, rand, randn } from "../ops/create.ts";
import { checkRank } from "../ops/shape.ts";

function write(op: string, x: Tensor, values: () => Tensor): Tensor {
  checkTensor(`init.${op}`, "x", x);
  noGrad(() => {
    x.assign(values());
  });
  return x;
}

function fans(op: string, x: Tensor, gain: number): { fanIn: number; fanOut: number } {
  checkTensor(`init.${op}`, "x", x);
  checkNumber(`init.${op}`, "gain", gain, { min: 0 });
  checkRank(`init.${op}`, "x", x, 2);
  const field = sizeOf(x.shape.slice(2));
  // for an empty weight both may be 0, which must not divide; any other number will do
  return { fanIn: Math.max(1, x.shape[1] * field), fanOut: Math.max(1, x.shape[0] * field) };
}

/**
 * Sets every element to `value`. Returns x. Throws a TypeError unless x is a tensor of f32 or f16 and `value` a number. Source: `torch.nn.init.constant_`.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.constant(zeros([2]), 0.5).array()); // [0.5, 0.5]
 * ```
 */
export function constant(x: Tensor, value: number): Tensor {
  if (typeof value !== "number") throw new TypeError(`init.constant: value must be a number, got ${describe(value)}`);
  return write("constant", x, () => full(x.shape, value, { dtype: x.dtype }));
}

/**
 * Uniform in [low, high), 0 and 1 by default; rounding may give `high` itself, as in PyTorch. Returns x. Throws a TypeError unless x
 * is a tensor of f32 or f16, a RangeError for a `high` below `low`. Source: `torch.nn.init.uniform_`.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.uniform(zeros([1000]), 2, 4).mean().item()); // about 3
 * ```
 */
export function uniform(x: Tensor, low = 0, high = 1): Tensor {
  checkNumber("init.uniform", "low", low);
  checkNumber("init.uniform", "high", high, { min: low });
  return write("uniform", x, () => rand(x.shape, { dtype: x.dtype }).mul(high - low).add(low));
}

/**
 * Normal with this mean and deviation (0 and 1 by default). Returns x. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a negative
 * deviation. Source: `torch.nn.init.normal_`.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.normal(zeros([1000]), 3, 0.1).mean().item()); // about 3
 * ```
 */
export function normal(x: Tensor, mean = 0, deviation = 1): Tensor {
  checkNumber("init.normal", "mean", mean);
  checkNumber("init.normal", "deviation", deviation, { min: 0 });
  return write("normal", x, () => randn(x.shape, { dtype: x.dtype }).mul(deviation).add(mean));
}

/**
 * Uniform in ±gain·√(6/(in + out)). Returns x. Throws a TypeError unless x is an f32 or f16 tensor of two dimensions or more, a RangeError for a negative
 * gain. Source: Glorot & Bengio 2010.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.xavierUniform(zeros([100, 50])).abs().max().item()); // nearly 0.2
 * ```
 */
export function xavierUniform(x: Tensor, gain = 1): Tensor {
  const { fanIn, fanOut } = fans("xavierUniform", x, gain);
  const bound = gain * Math.sqrt(6 / (fanIn + fanOut));
  return uniform(x, -bound, bound);
}

/**
 * Normal with deviation gain·√(2/(in + out)). Returns x. Throws a TypeError unless x is an f32 or f16 tensor of two dimensions or more, a RangeError for a
 * negative gain. Source: Glorot & Bengio 2010.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.xavierNormal(zeros([100, 100])).variance().item()); // about 0.01
 * ```
 */
export function xavierNormal(x: Tensor, gain = 1): Tensor {
  const { fanIn, fanOut } = fans("xavierNormal", x, gain);
  return normal(x, 0, gain * Math.sqrt(2 / (fanIn + fanOut)));
}

/**
 * Uniform in ±gain·√(3/in); the gain for ReLU, which is the default, is √2. Returns x. Throws a TypeError unless x is an f32 or f16 tensor of two dimensions
 * or more, a RangeError for a negative gain. Source: He et al. 2015.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.kaimingUniform(zeros([50, 150])).abs().max().item()); // nearly 0.2
 * ```
 */
export function kaimingUniform(x: Tensor, gain: number = Math.SQRT2): Tensor {
  const bound = gain * Math.sqrt(3 / fans("kaimingUniform", x, gain).fanIn);
  return uniform(x, -bound, bound);
}

/**
 * Normal with deviation gain/√in; the gain for ReLU, which is the default, is √2. Returns x. Throws a TypeError unless x is an f32 or f16 tensor of two
 * dimensions or more, a RangeError for a negative gain. Source: He et al. 2015.
 *
 * @example
 * ```ts
 * import { init, nn, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await nn.init.kaimingNormal(zeros([50, 200])).variance().item()); // about 0.01
 * ```
 */
export function kaimingNormal(x: Tensor, gain: number = Math.SQRT2): Tensor {
  return normal(x, 0, gain / Math.sqrt(fans("kaimingNormal", x, gain).fanIn));
}
