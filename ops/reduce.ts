/** Reductions over one or more dimensions. */
import { checkBoolean, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { numbers, sizeOf } from "../kernels/elementwise.ts";
import { reduce, type Reduction } from "../kernels/reduce.ts";
import { composed } from "../autograd/composed.ts";
import type { ReduceOptions, VarianceOptions } from "../autograd/options.ts";
import type { DType } from "../autograd/storage.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { mapped } from "./mapped.ts";

/** The dimension `dim` counted from the front. Throws a RangeError that names the op. */
export function checkDim(op: string, dim: unknown, rank: number, name = "dim"): number {
  if (rank === 0) {
    throw new RangeError(`${op}: ${name} must name a dimension, and a scalar has none, got ${describe(dim)}`);
  }
  checkNumber(op, name, dim, { integer: true, min: -rank, max: rank - 1 });
  return (dim as number) < 0 ? dim as number + rank : dim as number;
}

/** The dimensions that `dim` names, ascending; all where it is undefined or [], as in PyTorch. */
function dimsOf(op: string, dim: number | number[] | undefined, rank: number): number[] {
  if (dim === undefined || Array.isArray(dim) && dim.length === 0) return numbers(rank);
  if (!Array.isArray(dim) && typeof dim !== "number") {
    throw new TypeError(`${op}: dim must be a number or an array of numbers, got ${describe(dim)}`);
  }
  // a scalar has one dimension here, as in PyTorch
  const dims = (Array.isArray(dim) ? dim : [dim]).map((d) => checkDim(op, d, Math.max(1, rank))).sort((a, b) => a - b);
  if (new Set(dims).size < dims.length) {
    throw new RangeError(`${op}: dim must not name a dimension twice, got [${dim}]`);
  }
  return rank === 0 ? [] : dims;
}

/** Reduces `x` over `dims`, with one pass for each run of neighbouring dimensions, to the tensor that `into` makes, by default one of `shape` and `dtype`. */
function reduced(
  kind: Reduction,
  x: Tensor,
  dims: readonly number[],
  shape: readonly number[],
  dtype: DType = x.dtype,
  into = (): Tensor => Tensor.empty(shape, dtype, kind),
): Tensor {
  let from = x, sizes = [...x.shape];
  const runs: [number, number][] = [];
  for (const d of dims) {
    const last = runs.at(-1);
    if (last && last[1] === d) last[1] = d + 1;
    else runs.push([d, d + 1]);
  }
  if (runs.length === 0) runs.push([x.rank, x.rank]); // nothing to reduce, only to convert
  for (const [i, [start, end]] of runs.reverse().entries()) {
    const [outer, length, inner] = [sizes.slice(0, start), sizes.slice(start, end), sizes.slice(end)].map(sizeOf);
    sizes = sizes.map((n, d) => d >= start && d < end ? 1 : n);
    using _ = i > 0 ? from : null; // the result of the previous pass
    // intermediate results are f32: only the last one is rounded, and a sum may be too large for f16
    const y = i === runs.length - 1 ? into() : Tensor.empty(sizes, "f32", kind);
    const what = kind === "sumOfSquares" && i > 0 ? "sum" : kind;
    const b = { values: from.memory, input: from.dtype, results: y.memory, output: y.dtype };
    reduce(what, b, { outer, length, inner });
    from = y;
  }
  return from;
}

/** The gradient of a broadcast: sums `x` over the dimensions in which it is larger than `shape`, into the tensor that `into` makes. */
export function sumTo(x: Tensor, shape: readonly number[], into?: () => Tensor): Tensor {
  const lead = x.rank - shape.length;
  const dims = x.shape.flatMap((n, d) => d < lead || (shape[d - lead] === 1 && n !== 1) ? [d] : []);
  return dims.length === 0 ? x : reduced("sum", x, dims, shape, x.dtype, into);
}

/** Checks x and the options, and returns the dimensions to reduce, the shape with them kept, and the shape of the result. */
function reductionOf(
  op: string,
  x: Tensor,
  options: ReduceOptions,
  more: string[] = [],
): { dims: number[]; kept: number[]; shape: number[] } {
  checkTensor(op, "x", x);
  checkOptions(op, options, ["dim", "keepDim", ...more]);
  if (options.keepDim !== undefined) checkBoolean(op, "keepDim", options.keepDim);
  const dims = dimsOf(op, options.dim, x.rank);
  const kept = x.shape.map((n, d) => dims.includes(d) ? 1 : n);
  return { dims, kept, shape: options.keepDim ? kept : x.shape.filter((_, d) => !dims.includes(d)) };
}

function notEmpty(op: string, x: Tensor, dims: readonly number[]): void {
  if (dims.some((d) => x.shape[d] === 0)) {
    throw new RangeError(`${op}: x must have an element to reduce, got shape [${x.shape.join(", ")}]`);
  }
}

/** kind(x) / divisor over `dims`, in the given shape. The dividend is f32: a sum may exceed the 65,504 of f16 even if the quotient does not. */
function divided(
  name: string,
  kind: Reduction,
  x: Tensor,
  dims: readonly number[],
  divisor: number,
  shape: readonly number[],
  dtype: DType,
): Tensor {
  using dividend = reduced(kind, x, dims, shape, "f32");
  return mapped(name, "a / s0", [dividend], shape, [divisor], dtype);
}

/**
 * Σ x over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1; 0 over nothing. Gradient: dX = dY, broadcast.
 * Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x lacks or that is named twice. Source: `torch.sum`.
 *
 * @example
 * ```ts
 * import { init, sum, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await sum(tensor([[1, 2], [3, 4]]), { dim: 1 }).array()); // [3, 7]
 * ```
 */
export function sum(x: Tensor, options: ReduceOptions = {}): Tensor {
  const { dims, kept, shape } = reductionOf("sum", x, options);
  const y = reduced("sum", x, dims, shape);
  return record({
    op: "sum",
    inputs: [x],
    output: y,
    backward: (dY) => [mapped("expand", "a", [[dY, kept]], x.shape)],
  });
}

/**
 * The mean Σ x/n over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1; NaN over nothing. Gradient: dX = dY/n,
 * broadcast. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x lacks or that is named twice. Source: `torch.mean`.
 *
 * @example
 * ```ts
 * import { init, mean, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await mean(tensor([[1, 2], [3, 4]]), { dim: 0 }).array()); // [2, 3]
 * ```
 */
export function mean(x: Tensor, options: ReduceOptions = {}): Tensor {
  const { dims, kept, shape } = reductionOf("mean", x, options);
  const count = sizeOf(dims.map((d) => x.shape[d]));
  const y = divided("mean", "sum", x, dims, count, shape, x.dtype);
  return record({
    op: "mean",
    inputs: [x],
    output: y,
    backward: (dY) => [mapped("mean backward", "a / s0", [[dY, kept]], x.shape, [count])],
  });
}

function extreme(kind: "max" | "min", x: Tensor, options: ReduceOptions): Tensor {
  const { dims, kept, shape } = reductionOf(kind, x, options);
  notEmpty(kind, x, dims);
  const y = reduced(kind, x, dims, shape);
  return record({
    op: kind,
    inputs: [x],
    output: y,
    saved: [x, y],
    backward: (dY) => {
      const hit = mapped(`${kind} hits`, "select(0.0, 1.0, a == b || is_nan_(a))", [x, [y, kept]], x.shape);
      const ties = reduced("sum", hit, dims, kept, "f32");
      const share = "select(c / b, 0.0, a == 0.0)"; // dY may be infinite
      return [mapped(`${kind} backward`, share, [hit, ties, [dY, kept]], x.shape)];
    },
  });
}

/**
 * The largest value over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1; NaN if there is one. Gradient: dX
 * = dY at the largest value, 0 elsewhere; ties share it evenly. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x
 * lacks or that is named twice, and over nothing. Source: `torch.amax`.
 *
 * @example
 * ```ts
 * import { init, max, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await max(tensor([[1, 3], [7, 2]]), { dim: 1 }).array()); // [3, 7]
 * ```
 */
export function max(x: Tensor, options: ReduceOptions = {}): Tensor {
  return extreme("max", x, options);
}

/**
 * The smallest value over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1; NaN if there is one. Gradient:
 * dX = dY at the smallest value, 0 elsewhere; ties share it evenly. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that
 * x lacks or that is named twice, and over nothing. Source: `torch.amin`.
 *
 * @example
 * ```ts
 * import { init, min, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await min(tensor([[1, 3], [7, 2]]), { dim: 1 }).array()); // [1, 2]
 * ```
 */
export function min(x: Tensor, options: ReduceOptions = {}): Tensor {
  return extreme("min", x, options);
}

/**
 * ln Σ eˣ over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1, computed as max + ln(1 + the rest). Gradient:
 * dX = dY·softmax(x), 0 where the result is infinite. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x lacks or that
 * is named twice, and over nothing. Source: `torch.logsumexp`.
 *
 * @example
 * ```ts
 * import { init, logSumExp, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await logSumExp(tensor([[0, 0], [1000, 1000]]), { dim: 1 }).array()); // nearly [0.693147, 1000.693]
 * ```
 */
export function logSumExp(x: Tensor, options: ReduceOptions = {}): Tensor {
  const { dims, kept, shape } = reductionOf("logSumExp", x, options);
  notEmpty("logSumExp", x, dims);
  const y = reduced("logSumExp", x, dims, shape);
  return record({
    op: "logSumExp",
    inputs: [x],
    output: y,
    saved: [x, y],
    backward: (dY) => {
      // y is rounded, so that e^(x − y) is off by a common factor: dividing by its sum corrects that
      const nearly = "select(exp_(a - b), 0.0, a == b && abs(b) > 3.4028234e38)";
      const share = mapped("logSumExp shares", nearly, [x, [y, kept]], x.shape, [], "f32");
      const total = reduced("sum", share, dims, kept);
      const slope = "select(a / b * c, 0.0, a == 0.0)";
      return [mapped("logSumExp backward", slope, [share, total, [dY, kept]], x.shape, [], x.dtype)];
    },
  });
}

/**
 * The variance Σ(x − mean)²/(n − correction) over `dim` (a number or several; all by default), which is removed, or with `keepDim` kept with size 1;
 * `correction` is 1 by default. The mean is subtracted first, and then the mean of the result, which rounding has left, so that a large mean costs no digits.
 *
 * Gradient: dX = 2(x − mean)·dY/(n − correction). Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x lacks or that is
 * named twice, and for a correction that is not finite. Source: `torch.var`.
 *
 * @example
 * ```ts
 * import { init, tensor, variance } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await variance(tensor([1, 2, 3, 4])).item()); // 5/3
 * ```
 */
export function variance(x: Tensor, options: VarianceOptions = {}): Tensor {
  const { dims, kept, shape } = reductionOf("variance", x, options, ["correction"]);
  const { correction = 1 } = options;
  checkNumber("variance", "correction", correction);
  const count = sizeOf(dims.map((d) => x.shape[d])), divisor = count - correction;
  return composed("variance", () => {
    using average = divided("mean", "sum", x, dims, count, kept, "f32"); // the record keeps what it saved
    using nearly = mapped("centred", "a - b", [x, average], x.shape, [], "f32");
    using rest = divided("mean", "sum", nearly, dims, count, kept, "f32");
    using centred = mapped("centred", "a - b", [nearly, rest], x.shape, [], "f32");
    const slope = "2.0 * ((a - b) - c) * d / s0";
    return record({
      op: "variance",
      inputs: [x],
      output: divided("variance", "sumOfSquares", centred, dims, Math.max(0, divisor), shape, x.dtype),
      saved: [x, average, rest],
      backward: (dY) => [mapped("variance backward", slope, [x, average, rest, [dY, kept]], x.shape, [divisor])],
    });
  });
}

/**
 * The index of the largest value over `dim` (over all elements by default), as i32; the first of several. No gradient. `dim` is removed, or with `keepDim` kept
 * with size 1. Throws a TypeError unless x is a tensor of f32 or f16, a RangeError for a dimension that x lacks, and over nothing. Source: `torch.argmax`.
 *
 * @example
 * ```ts
 * import { argmax, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await argmax(tensor([[1, 3], [7, 2]]), { dim: 1 }).array()); // [1, 0]
 * ```
 */
export function argmax(x: Tensor, options: { dim?: number; keepDim?: boolean } = {}): Tensor {
  checkTensor("argmax", "x", x);
  if (options?.dim !== undefined) checkDim("argmax", options.dim, Math.max(1, x.rank));
  const { dims, shape } = reductionOf("argmax", x, options);
  notEmpty("argmax", x, dims);
  return reduced("argmax", x, dims, shape, "i32");
}
