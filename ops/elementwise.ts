/**
 * Elementwise ops. Each is defined by WGSL expressions for its value and its derivatives; `unary` and `binary` say what the letters in them stand for.
 * `kernels/elementwise.ts` turns them into kernels that broadcast.
 */
import { checkNumber, checkOneOf, checkOptions, describe } from "../kernels/check.ts";
import { ACTIVATIONS } from "../kernels/math.ts";
import { composed } from "../autograd/composed.ts";
import type { ClampOptions, GeluOptions, Operand } from "../autograd/options.ts";
import { DTYPES } from "../autograd/storage.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { checkDType, filled } from "./create.ts";
import { broadcastShape, mapped } from "./mapped.ts";
import { sumTo } from "./reduce.ts";

// ---- one input

/** Internal: y = f(x, s0, s1). The derivative is an expression of a (x), b (y), c (dY) and the same scalars. */
export function unary(
  name: string,
  value: string,
  derivative: string,
): (x: Tensor, scalars?: readonly number[]) => Tensor {
  const usesX = /\ba\b/.test(derivative), usesY = /\bb\b/.test(derivative);
  return (x, scalars = []) => {
    checkTensor(name, "x", x);
    const y = mapped(name, value, [x], x.shape, scalars);
    const saved = [...usesX ? [x] : [], ...usesY ? [y] : []];
    return record({
      op: name,
      inputs: [x],
      output: y,
      saved,
      // dY takes the place of what the derivative does not use, so that it need not be saved
      backward: (dY) => {
        const from = [usesX ? x : dY, usesY ? y : dY, dY];
        return [mapped(`${name} backward`, derivative, from, x.shape, scalars)];
      },
    });
  };
}

/**
 * −x, elementwise. Gradient: dX = −dY. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.neg`.
 *
 * @example
 * ```ts
 * import { init, neg, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await neg(tensor([1, -2])).array()); // [-1, 2]
 * ```
 */
export const neg: (x: Tensor) => Tensor = unary("neg", "-a", "-c");
/**
 * |x|, elementwise. Gradient: dX = dY·sign x, 0 at 0. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.abs`.
 *
 * @example
 * ```ts
 * import { abs, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await abs(tensor([1, -2])).array()); // [1, 2]
 * ```
 */
export const abs: (x: Tensor) => Tensor = unary("abs", "abs(a)", "c * sign(a)");
/**
 * eˣ, elementwise. Gradient: dX = dY·eˣ. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.exp`.
 *
 * @example
 * ```ts
 * import { exp, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await exp(tensor([0, 1])).array()); // nearly [1, 2.71828]
 * ```
 */
export const exp: (x: Tensor) => Tensor = unary("exp", "exp_(a)", "c * b");
/**
 * ln x, elementwise; −∞ at 0, NaN below. Gradient: dX = dY/x. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.log`.
 *
 * @example
 * ```ts
 * import { init, log, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await log(tensor([1, Math.E])).array()); // nearly [0, 1]
 * ```
 */
export const log: (x: Tensor) => Tensor = unary("log", "log_(a)", "c / a");
/**
 * √x, elementwise; NaN below 0. Gradient: dX = dY/(2√x). Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.sqrt`.
 *
 * @example
 * ```ts
 * import { init, sqrt, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await sqrt(tensor([4, 9])).array()); // nearly [2, 3]
 * ```
 */
export const sqrt: (x: Tensor) => Tensor = unary("sqrt", "sqrt(a)", "c * 0.5 / b");
/**
 * 1/√x, elementwise; NaN below 0. Gradient: dX = −dY/(2x√x). Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.rsqrt`.
 *
 * @example
 * ```ts
 * import { init, rsqrt, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await rsqrt(tensor([4, 16])).array()); // nearly [0.5, 0.25]
 * ```
 */
export const rsqrt: (x: Tensor) => Tensor = unary("rsqrt", "1.0 / sqrt(a)", "c * -0.5 * b / a");
/**
 * x², elementwise. Gradient: dX = 2x·dY. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.square`.
 *
 * @example
 * ```ts
 * import { init, square, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await square(tensor([2, -3])).array()); // [4, 9]
 * ```
 */
export const square: (x: Tensor) => Tensor = unary("square", "a * a", "2.0 * a * c");
/**
 * sin x, x in radians, elementwise. Gradient: dX = dY·cos x. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.sin`.
 *
 * @example
 * ```ts
 * import { init, sin, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await sin(tensor([0, Math.PI / 2])).array()); // nearly [0, 1]
 * ```
 */
export const sin: (x: Tensor) => Tensor = unary("sin", "sin_(a)", "c * cos_(a)");
/**
 * cos x, x in radians, elementwise. Gradient: dX = −dY·sin x. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.cos`.
 *
 * @example
 * ```ts
 * import { cos, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await cos(tensor([0, Math.PI])).array()); // nearly [1, -1]
 * ```
 */
export const cos: (x: Tensor) => Tensor = unary("cos", "cos_(a)", "-c * sin_(a)");
/**
 * tanh x, elementwise. Gradient: dX = dY·(1 − tanh² x). Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.tanh`.
 *
 * @example
 * ```ts
 * import { init, tanh, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await tanh(tensor([0, 1])).array()); // nearly [0, 0.761594]
 * ```
 */
export const tanh: (x: Tensor) => Tensor = unary("tanh", "tanh_(a)", "c * sech_squared_(a)");
/**
 * 1/(1 + e⁻ˣ), elementwise. Gradient: dX = dY·y·(1 − y). Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.sigmoid`.
 *
 * @example
 * ```ts
 * import { init, sigmoid, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await sigmoid(tensor([0, Math.log(3)])).array()); // nearly [0.5, 0.75]
 * ```
 */
export const sigmoid: (x: Tensor) => Tensor = unary("sigmoid", "sigmoid_(a)", "c * sigmoid_(a) * sigmoid_(-a)");
/**
 * max(x, 0), elementwise. Gradient: dX = dY where x > 0, else 0. Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.nn.functional.relu`.
 *
 * @example
 * ```ts
 * import { init, relu, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await relu(tensor([2, -3])).array()); // [2, 0]
 * ```
 */
export const relu: (x: Tensor) => Tensor = unary("relu", ACTIVATIONS.relu.value, "select(c, 0.0, b <= 0.0)");
/**
 * x·σ(x), with σ = sigmoid, elementwise. Gradient: dX = dY·σ(x)·(1 + x·σ(−x)). Throws a TypeError unless x is a tensor of f32 or f16. Source:
 * `torch.nn.functional.silu`.
 *
 * @example
 * ```ts
 * import { init, silu, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await silu(tensor([0, 1])).array()); // nearly [0, 0.731059]
 * ```
 */
export const silu: (x: Tensor) => Tensor = unary(
  "silu",
  "a * sigmoid_(a)",
  "c * sigmoid_(a) * (1.0 + a * sigmoid_(-a))",
);
/**
 * ln(1 + eˣ), elementwise. Gradient: dX = dY·sigmoid(x). Throws a TypeError unless x is a tensor of f32 or f16. Source: `torch.nn.functional.softplus`.
 *
 * @example
 * ```ts
 * import { init, softplus, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await softplus(tensor([0, 100])).array()); // nearly [0.693147, 100]
 * ```
 */
export const softplus: (x: Tensor) => Tensor = unary("softplus", "softplus_(a)", "c * sigmoid_(a)");

const geluExact = unary("gelu", ACTIVATIONS.gelu.value, `c * (${ACTIVATIONS.gelu.slope})`);
// ½(1 + tanh u) = σ(2u), which keeps its digits in the tail; 2u = √(8/π)(x + 0.044715x³). Beyond ±20, where squares might overflow, the slope is 0 or 1
const U = "1.5957691216 * (a + 0.044715 * a * a * a)";
const geluTanh = unary(
  "gelu",
  `a * sigmoid_(${U})`,
  `c * select(sigmoid_(${U}) * (1.0 + a * sigmoid_(-${U}) * 1.5957691216 * (1.0 + 0.134145 * a * a)), f32(a > 0.0), abs(a) > 20.0)`,
);

/**
 * The Gaussian error linear unit x·Φ(x), or with `approximate: "tanh"` ½x(1 + tanh u) with u = √(2/π)(x + 0.044715x³), elementwise.
 *
 * Gradient: dX = dY·(Φ(x) + x·φ(x)), or that of the approximation: dY·(½(1 + tanh u) + ½x·(1 − tanh² u)·u'). Throws a TypeError unless x is a tensor of f32
 * or f16, a RangeError for another `approximate`. Source: Hendrycks & Gimpel 2016; `torch.nn.functional.gelu`.
 *
 * @example
 * ```ts
 * import { gelu, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await gelu(tensor([0, 1])).array()); // nearly [0, 0.841345]
 * ```
 */
export function gelu(x: Tensor, options: GeluOptions = {}): Tensor {
  checkOptions("gelu", options, ["approximate"]);
  const { approximate = "none" } = options;
  checkOneOf("gelu", "approximate", approximate, ["none", "tanh"]);
  return approximate === "tanh" ? geluTanh(x) : geluExact(x);
}

/** A bound rounded to x's dtype, so that an x that equals it compares equal. */
const asStored = (x: Tensor, n: number) => x?.dtype === "f16" ? Math.f16round(n) : n;

const clamped = unary("clamp", "min_(max_(a, s0), s1)", "select(0.0, c, a >= s0 && a <= s1)");

/**
 * x limited to [min, max], elementwise: min(max(x, min), max), which is `max` if `min` is larger. Either bound may be left out, or infinite. Gradient: dX = dY
 * where min ≤ x ≤ max, else 0. Throws a TypeError if both bounds are missing or x is not a tensor of f32 or f16, a RangeError for a bound that is NaN. Source:
 * `torch.clamp`.
 *
 * @example
 * ```ts
 * import { clamp, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await clamp(tensor([-2, 0.5, 3]), { min: 0, max: 1 }).array()); // [0, 0.5, 1]
 * ```
 */
export function clamp(x: Tensor, options: ClampOptions): Tensor {
  checkOptions("clamp", options, ["min", "max"]);
  if (options.min === undefined && options.max === undefined) {
    throw new TypeError("clamp: min or max must be given, got neither");
  }
  const { min = -Infinity, max = Infinity } = options;
  for (const [name, bound] of Object.entries({ min, max })) {
    checkNumber("clamp", name, bound, { infinite: true });
  }
  return clamped(x, [asStored(x, min), asStored(x, max)]);
}

/** Internal: `cast`, whose checks are done, under another op's name. */
export function converted(op: string, x: Tensor, dtype: "f32" | "f16"): Tensor {
  return record({
    op,
    inputs: [x],
    output: mapped(op, "a", [x], x.shape, [], dtype),
    backward: (dY) => [mapped(`${op} backward`, "a", [dY], x.shape, [], x.dtype)],
  });
}

/**
 * A copy of x, of any dtype, in f32 or f16, rounded to the nearest. Gradient: dX = dY in x's dtype; integers get none. So parameters in f32 train with
 * products and losses of f16. Throws a TypeError for another dtype and for f16 where the adapter lacks it. Source: `torch.Tensor.to`.
 *
 * @example
 * ```ts
 * import { cast, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const isRight = tensor([1, 0, 1, 1], { dtype: "i32" });
 * console.log(await cast(isRight, "f32").mean().item()); // 0.75
 * ```
 */
export function cast(x: Tensor, dtype: "f32" | "f16"): Tensor {
  checkTensor("cast", "x", x, DTYPES);
  if (dtype !== "f32" && dtype !== "f16") throw new TypeError(`cast: dtype must be f32 or f16, got ${describe(dtype)}`);
  checkDType("cast", dtype);
  return converted("cast", x, dtype);
}

// ---- two inputs

/** Internal: y = f(a, b) with broadcasting. The derivatives are expressions of a, b, c (y) and d (dY). */
export function binary(name: string, value: string, byA: string, byB: string): (a: Tensor, b: Tensor) => Tensor {
  const used = [byA, byB].map((derivative) => [/\ba\b/, /\bb\b/, /\bc\b/].map((letter) => letter.test(derivative)));
  return (a, b) => {
    checkTensor(name, "a", a);
    checkTensor(name, "b", b);
    if (a.dtype !== b.dtype) throw new TypeError(`${name}: b must have dtype ${a.dtype} as a, got ${b.dtype}`);
    const shape = broadcastShape(name, [a.shape, b.shape]);
    const y = mapped(name, value, [a, b], shape);
    const [wantsA, wantsB] = [a.requiresGrad, b.requiresGrad];
    const isSaved = (i: number) => wantsA && used[0][i] || wantsB && used[1][i];
    return record({
      op: name,
      inputs: [a, b],
      output: y,
      saved: [a, b, y].filter((_, i) => isSaved(i)),
      backward: (dY, wants, gradientOf) => {
        const from = [...[a, b, y].map((x, i) => isSaved(i) ? x : dY), dY];
        const gradient = (expression: string, i: number) => {
          const whole = expression === "d" ? dY : mapped(`${name} backward`, expression, from, shape);
          return sumTo(whole, [a, b][i].shape, () => gradientOf(i));
        };
        return [wants[0] ? gradient(byA, 0) : null, wants[1] ? gradient(byB, 1) : null];
      },
    });
  };
}

/** A number beside a tensor: value and derivative as in `unary`, with the number as s0, or a function of both. */
type WithNumber = [value: string, derivative: string] | ((x: Tensor, number: number) => Tensor);

/** An op on two tensors (value and derivatives as in `binary`), on a tensor and a number (`left`), or on a number and a tensor (`right`). */
function arithmetic(
  op: string,
  both: [value: string, byA: string, byB: string],
  left: WithNumber,
  right: WithNumber = left,
): (a: Operand, b: Operand) => Tensor {
  const onTensors = binary(op, ...both);
  const [onLeft, onRight] = [left, right].map((form) => {
    if (typeof form === "function") return form;
    const f = unary(op, ...form);
    return (x: Tensor, number: number) => f(x, [number]);
  });
  return (a, b) => {
    for (const [name, x] of [["a", a], ["b", b]] as const) {
      if (x instanceof Tensor) checkTensor(op, name, x);
      else if (typeof x !== "number") {
        throw new TypeError(`${op}: ${name} must be a Tensor or a number, got ${describe(x)}`);
      }
    }
    if (typeof b === "number") {
      if (typeof a === "number") throw new TypeError(`${op}: one of a and b must be a Tensor, got two numbers`);
      return onLeft(a, b);
    }
    return typeof a === "number" ? onRight(b, a) : onTensors(a, b);
  };
}

/**
 * a + b, elementwise with broadcasting; either may be a number. Gradients: dA = dY, dB = dY; for a broadcast operand, summed over it. Throws a TypeError for
 * two numbers, tensors of different dtypes or of integers, and shapes that do not broadcast. Source: `torch.add`.
 *
 * @example
 * ```ts
 * import { add, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await add(tensor([[1, 2], [3, 4]]), tensor([10, 20])).array()); // [[11, 22], [13, 24]]
 * ```
 */
export const add: (a: Operand, b: Operand) => Tensor = arithmetic("add", ["a + b", "d", "d"], ["a + s0", "c"]);

/**
 * a − b, elementwise with broadcasting; either may be a number. Gradients: dA = dY, dB = −dY; for a broadcast operand, summed over it. Throws a TypeError for
 * two numbers, tensors of different dtypes or of integers, and shapes that do not broadcast. Source: `torch.sub`.
 *
 * @example
 * ```ts
 * import { init, sub, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await sub(1, tensor([1, 2])).array()); // [0, -1]
 * ```
 */
export const sub: (a: Operand, b: Operand) => Tensor = arithmetic(
  "sub",
  ["a - b", "d", "-d"],
  ["a - s0", "c"],
  ["s0 - a", "-c"],
);

/**
 * a · b, elementwise with broadcasting; either may be a number. Gradients: dA = dY·b, dB = dY·a; for a broadcast operand, summed over it. Throws a TypeError
 * for two numbers, tensors of different dtypes or of integers, and shapes that do not broadcast. Source: `torch.mul`.
 *
 * @example
 * ```ts
 * import { init, mul, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await mul(tensor([1, 2]), tensor([[3], [4]])).array()); // [[3, 6], [4, 8]]
 * ```
 */
export const mul: (a: Operand, b: Operand) => Tensor = arithmetic(
  "mul",
  ["a * b", "d * b", "d * a"],
  ["a * s0", "c * s0"],
);

/**
 * a / b, elementwise with broadcasting; either may be a number. Gradients: dA = dY/b, dB = −dY·a/b²; for a broadcast operand, summed over it. Throws a
 * TypeError for two numbers, tensors of different dtypes or of integers, and shapes that do not broadcast. Source: `torch.div`.
 *
 * @example
 * ```ts
 * import { div, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await div(tensor([3, 4]), 2).array()); // nearly [1.5, 2]
 * ```
 */
export const div: (a: Operand, b: Operand) => Tensor = arithmetic(
  "div",
  ["a / b", "d / b", "-d * (c / b)"],
  ["a / s0", "c / s0"],
  ["s0 / a", "-c * (b / a)"],
);

const power = unary("pow", "pow_(a, s0)", "select(c * s0 * pow_(a, s0 - 1.0), 0.0, s0 == 0.0)");

/**
 * a to the power b (NaN for a finite negative base unless b is an integer), elementwise with broadcasting; either may be a number. Gradients: dA = dY·b·aᵇ⁻¹
 * (0 where b = 0), dB = dY·aᵇ·ln a (0 where a = 0 and b ≥ 0); for a broadcast operand, summed over it. Throws a TypeError for two numbers, tensors of different
 * dtypes or of integers, and shapes that do not broadcast. Source: `torch.pow`.
 *
 * @example
 * ```ts
 * import { init, pow, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await pow(tensor([2, 3]), 3).array()); // nearly [8, 27]
 * ```
 */
export const pow: (a: Operand, b: Operand) => Tensor = arithmetic(
  "pow",
  [
    "pow_(a, b)",
    "select(d * b * pow_(a, b - 1.0), 0.0, b == 0.0)",
    "select(d * c * log_(a), 0.0, a == 0.0 && b >= 0.0)",
  ],
  (x, n) => n === 2 ? square(x) : n === 0.5 ? sqrt(x) : n === 1 ? mul(x, 1) : n === -1 ? div(1, x) : power(x, [n]),
  ["pow_(s0, a)", "select(c * b * log_(s0), 0.0, s0 == 0.0 && a >= 0.0)"],
);

const maximumNumber = unary("maximum", "max_(a, s0)", "select(select(c, 0.5 * c, a == s0), 0.0, a < s0)");

/**
 * The larger of a and b, NaN if one of them is NaN, elementwise with broadcasting; either may be a number. Gradients: dA is dY where a was taken, 0
 * elsewhere, half of dY where a = b, and dY at NaN; dB likewise; for a broadcast operand, summed over it. Throws a TypeError for two numbers, tensors of
 * different dtypes or of integers, and shapes that do not broadcast. Source: `torch.maximum`.
 *
 * @example
 * ```ts
 * import { init, maximum, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await maximum(tensor([1, 5]), tensor([3, 4])).array()); // [3, 5]
 * ```
 */
export const maximum: (a: Operand, b: Operand) => Tensor = arithmetic(
  "maximum",
  [
    "max_(a, b)",
    "select(select(d, 0.5 * d, a == b), 0.0, a < b)",
    "select(select(d, 0.5 * d, a == b), 0.0, b < a)",
  ],
  (x, n) => maximumNumber(x, [asStored(x, n)]),
);

const minimumNumber = unary("minimum", "min_(a, s0)", "select(select(c, 0.5 * c, a == s0), 0.0, a > s0)");

/**
 * The smaller of a and b, NaN if one of them is NaN, elementwise with broadcasting; either may be a number. Gradients: dA is dY where a was taken, 0
 * elsewhere, half of dY where a = b, and dY at NaN; dB likewise; for a broadcast operand, summed over it. Throws a TypeError for two numbers, tensors of
 * different dtypes or of integers, and shapes that do not broadcast. Source: `torch.minimum`.
 *
 * @example
 * ```ts
 * import { init, minimum, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await minimum(tensor([1, 5]), tensor([3, 4])).array()); // [1, 4]
 * ```
 */
export const minimum: (a: Operand, b: Operand) => Tensor = arithmetic(
  "minimum",
  [
    "min_(a, b)",
    "select(select(d, 0.5 * d, a == b), 0.0, a > b)",
    "select(select(d, 0.5 * d, a == b), 0.0, b > a)",
  ],
  (x, n) => minimumNumber(x, [asStored(x, n)]),
);

/**
 * `a` where `condition` is not 0, else `b`, with broadcasting; `condition` has any dtype and gets no gradient. Gradients: dA = dY where `condition` is not 0,
 * else 0; dB = dY − dA; for a broadcast operand, summed over it. Integers, as labels are, keep every bit and get no gradient. `a` or `b` may be a number.
 * Throws a TypeError for a `condition` that is not a tensor, for two numbers, for `a` and `b` of different dtypes, and for shapes that do not broadcast, a
 * RangeError for a number that an integer dtype cannot hold. Source: `torch.where`.
 *
 * @example
 * ```ts
 * import { init, tensor, where } from "@limbeck/limbeck";
 *
 * await init();
 * const y = where(tensor(new Int32Array([1, 0])), tensor([1, 2]), tensor([3, 4]));
 * console.log(await y.array()); // [1, 4]
 * ```
 */
export function where(condition: Tensor, a: Operand, b: Operand): Tensor {
  checkTensor("where", "condition", condition, DTYPES);
  if (typeof a === "number" || typeof b === "number") {
    const [like, name] = typeof a === "number" ? [b, "b"] : [a, "a"];
    if (typeof like === "number") throw new TypeError("where: one of a and b must be a Tensor, got two numbers");
    checkTensor("where", name, like, DTYPES);
    const tensorOf = (name: string, x: Operand) =>
      typeof x === "number" ? filled("where", name, [], x, { dtype: like.dtype }) : x;
    return composed("where", () => where(condition, tensorOf("a", a), tensorOf("b", b)));
  }
  checkTensor("where", "a", a, DTYPES);
  checkTensor("where", "b", b, [a.dtype]);
  const shape = broadcastShape("where", [condition.shape, a.shape, b.shape]);
  const y = mapped("where", "select(b, c, a == 0)", [condition, a, b], shape, [], a.dtype);
  return record({
    op: "where",
    inputs: [a, b],
    output: y,
    saved: [condition],
    backward: (dY, wants, gradientOf) => {
      const part = (expression: string, i: number) => {
        const whole = mapped("where backward", expression, [condition, dY], shape, [], a.dtype);
        return sumTo(whole, [a, b][i].shape, () => gradientOf(i));
      };
      return [
        wants[0] ? part("select(b, 0.0, a == 0.0)", 0) : null,
        wants[1] ? part("select(0.0, b, a == 0.0)", 1) : null,
      ];
    },
  });
}
