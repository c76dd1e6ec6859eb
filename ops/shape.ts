/** Ops that move elements without changing them. */
import { checkNumber, describe } from "../kernels/check.ts";
import { copyFlat, copyStrided, type Layout, sizeOf, stridesOf } from "../kernels/elementwise.ts";
import { fill } from "../kernels/random.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { composed } from "../autograd/composed.ts";
import { BYTES, DTYPES, isFloat } from "../autograd/storage.ts";
import { needsGradient, record } from "../autograd/tape.ts";
import { checkDimensions, checkShape, checkTensor, Tensor } from "../autograd/tensor.ts";
import { arange, checkShapeArgument } from "./create.ts";
import { broadcastShape, mapped } from "./mapped.ts";
import { checkDim, sumTo } from "./reduce.ts";

/**
 * The same elements in another shape, as a view; one size may be −1, which is inferred. Gradient: dX = dY in x's shape. Throws a TypeError if the numbers of
 * elements differ. Source: `torch.reshape`.
 *
 * @example
 * ```ts
 * import { init, reshape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await reshape(tensor([1, 2, 3, 4]), [2, -1]).array()); // [[1, 2], [3, 4]]
 * ```
 */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  checkTensor("reshape", "x", x, DTYPES);
  if (!Array.isArray(shape)) throw new TypeError(`reshape: shape must be an array of sizes, got ${describe(shape)}`);
  const unknown = shape.indexOf(-1), wanted = [...shape].map((n) => Object.is(n, -0) ? 0 : n);
  const areSizes = () => wanted.every((n) => Number.isInteger(n) && n >= 0 && n < 2 ** 31);
  if (unknown >= 0) wanted[unknown] = 1;
  if (unknown >= 0 && areSizes()) {
    const known = sizeOf(wanted);
    wanted[unknown] = x.size / known; // beside a size of 0 it could be any: NaN
  }
  if (!areSizes() || sizeOf(wanted) !== x.size) {
    throw new TypeError(
      `reshape: shape ${describe(shape)} does not hold the ${x.size} elements of [${x.shape.join(", ")}]`,
    );
  }
  const y = x.sameMemory(wanted, "reshape");
  return record({ op: "reshape", inputs: [x], output: y, backward: (dY) => [dY.sameMemory(x.shape, "reshape")] });
}

/**
 * The dimensions in another order, as a copy: y's dimension i is x's dimension order[i]. Gradient: dX = dY in the order of x. Throws a TypeError if `order`
 * is not an array, a RangeError unless it names each dimension once. Source: `torch.permute`.
 *
 * @example
 * ```ts
 * import { init, permute, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await permute(tensor([[1, 2], [3, 4], [5, 6]]), [1, 0]).array()); // [[1, 3, 5], [2, 4, 6]]
 * ```
 */
export function permute(x: Tensor, order: readonly number[]): Tensor {
  checkTensor("permute", "x", x, DTYPES);
  if (!Array.isArray(order)) {
    throw new TypeError(`permute: order must be an array of dimensions, got ${describe(order)}`);
  }
  const dims = [...order].map((d, i) => checkDim("permute", d, x.rank, `order[${i}]`));
  if (dims.length !== x.rank || new Set(dims).size !== x.rank) {
    throw new RangeError(`permute: order must name each of the ${x.rank} dimensions once, got ${describe(order)}`);
  }
  const own = stridesOf(x.shape), strides = dims.map((d) => own[d]);
  const y = Tensor.empty(dims.map((d) => x.shape[d]), x.dtype, "permute");
  copyStrided(x.memory, y.memory, x.dtype, y.shape, { strides });
  const inverse = dims.map((_, i) => dims.indexOf(i));
  return record({ op: "permute", inputs: [x], output: y, backward: (dY) => [permute(dY, inverse)] });
}

/**
 * Dimensions a and b exchanged, as a copy. Gradient: dX = dY with them exchanged back. Throws a TypeError if x is not a tensor, a RangeError for a dimension
 * that x lacks. Source: `torch.transpose`.
 *
 * @example
 * ```ts
 * import { init, tensor, transpose } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await transpose(tensor([[1, 2], [3, 4]]), 0, 1).array()); // [[1, 3], [2, 4]]
 * ```
 */
export function transpose(x: Tensor, a: number, b: number): Tensor {
  checkTensor("transpose", "x", x, DTYPES);
  const order = x.shape.map((_, i) => i);
  const from = checkDim("transpose", a, x.rank, "a"), to = checkDim("transpose", b, x.rank, "b");
  [order[from], order[to]] = [to, from];
  return permute(x, order);
}

/**
 * x broadcast to `shape` by NumPy's rule, as a copy; −1 stands for the size that x has there. Gradient: dX = Σ dY over what was broadcast. Throws a TypeError
 * if x does not broadcast to it, a RangeError for a wrong size. Source: `torch.Tensor.expand`.
 *
 * @example
 * ```ts
 * import { expand, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await expand(tensor([[1], [2]]), [-1, 3]).array()); // [[1, 1, 1], [2, 2, 2]]
 * ```
 */
export function expand(x: Tensor, shape: readonly number[]): Tensor {
  checkTensor("expand", "x", x, DTYPES);
  const lead = Array.isArray(shape) ? shape.length - x.rank : 0;
  const wanted = Array.isArray(shape) ? shape.map((n, d) => n === -1 && d >= lead ? x.shape[d - lead] : n) : shape;
  checkShapeArgument("expand", wanted);
  const full = broadcastShape("expand", [x.shape, wanted.map((n) => n + 0)]); // −0 is 0
  if (full.length !== wanted.length || full.some((n, i) => n !== wanted[i])) {
    throw new TypeError(`expand: x of shape [${x.shape.join(", ")}] does not broadcast to [${shape.join(", ")}]`);
  }
  const y = Tensor.empty(full, x.dtype, "expand");
  const own = stridesOf(x.shape), strides = full.map((_, d) => d < lead || x.shape[d - lead] === 1 ? 0 : own[d - lead]);
  copyStrided(x.memory, y.memory, x.dtype, full, { strides });
  return record({
    op: "expand",
    inputs: [x],
    output: y,
    backward: (dY, _, gradientOf) => [sumTo(dY, x.shape, () => gradientOf(0))],
  });
}

/** Overwrites x in place with `other`'s elements, and returns it; see `Tensor.assign`. */
export function assign(x: Tensor, other: Tensor): Tensor {
  checkTensor("assign", "x", x, DTYPES);
  checkTensor("assign", "other", other, [x.dtype], x.shape);
  const { storage } = x, isRecorded = x.record !== null && needsGradient([x]);
  if (storage === other.storage) return x;
  if (isRecorded && storage.owners > 1) {
    throw new Error(
      "assign: x, the result of a recorded op, shares its memory with a view, which would keep the old history; assign to a copy",
    );
  }
  const from = other.memory, to = storage.writable();
  // two slots of an optimizer's block: a dispatch cannot read and write the same buffer
  if (from.buffer === to.buffer) gpu().queue.copy(from, to, x.size * BYTES[x.dtype]);
  else copyFlat(from, to, x.dtype, x.size);
  if (!isRecorded) return x;
  x.record = null; // its gradient no longer belongs to the op that made it
  x.requiresGrad = false;
  return record({ op: "assign", inputs: [other], output: x, backward: (dX) => [dX] });
}

/** Internal: throws unless `x` has at least `rank` dimensions. */
export function checkRank(op: string, name: string, x: Tensor, rank: number): void {
  if (x.rank < rank) {
    throw new TypeError(
      `${op}: ${name} must have at least ${rank} dimension${rank > 1 ? "s" : ""}, got shape [${x.shape.join(", ")}]`,
    );
  }
}

/** Internal: the error for an x of `shape` whose number of features does not fit `weight`. It names x, since a layer's weight is seldom what is wrong. */
export function wrongFeatures(op: string, shape: readonly number[], weight: Tensor): TypeError {
  return new TypeError(
    `${op}: x must have shape [..., ${weight.shape.at(-1)}] for a weight of shape [${weight.shape.join(", ")}], got [${
      shape.join(", ")
    }]`,
  );
}

/** One checked pair [start, end] for each dimension. */
type Ranges = readonly (readonly [number, number])[];

/** Where the elements within `ranges` are in x. */
function within(x: Tensor, ranges: Ranges): Layout {
  const strides = stridesOf(x.shape);
  return { strides, offset: ranges.reduce((sum, [from], d) => sum + from * strides[d], 0) };
}

/** A copy of x's elements within `ranges`. */
function cut(x: Tensor, ranges: Ranges, op: string): Tensor {
  const y = Tensor.empty(ranges.map(([from, to]) => to - from), x.dtype, op);
  copyStrided(x.memory, y.memory, x.dtype, y.shape, within(x, ranges));
  return y;
}

/** Zeros of `shape` with x at `ranges`: the gradient of `cut`. */
function padded(x: Tensor, ranges: Ranges, shape: readonly number[], op: string): Tensor {
  const y = Tensor.empty(shape, x.dtype, op);
  fill(y.memory, 0, y.size, y.dtype);
  place(x, y, ranges);
  return y;
}

/** Writes x into y at `ranges`. */
function place(x: Tensor, y: Tensor, ranges: Ranges): void {
  copyStrided(x.memory, y.memory, x.dtype, x.shape, undefined, within(y, ranges));
}

/**
 * A copy of the elements between start and end (exclusive), one pair for each leading dimension; negative ends count from the back, a missing pair takes all.
 * Gradient: dX = dY between them, 0 elsewhere. Throws a TypeError unless `pairs` holds pairs, at most one per dimension, a RangeError for a pair outside the dimension or
 * one that ends before it starts.
 *
 * @example
 * ```ts
 * import { init, slice, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await slice(tensor([[1, 2, 3], [4, 5, 6]]), [[0, 2], [1, -1]]).array()); // [[2], [5]]
 * ```
 */
export function slice(x: Tensor, pairs: readonly (readonly [number, number])[]): Tensor {
  checkTensor("slice", "x", x, DTYPES);
  if (!Array.isArray(pairs) || pairs.length > x.rank || !pairs.every((p) => Array.isArray(p) && p.length === 2)) {
    throw new TypeError(`slice: pairs must be at most ${x.rank} pairs [start, end], got ${describe(pairs)}`);
  }
  const ranges = x.shape.map((n, d): [number, number] => {
    const [from, to] = (pairs[d] ?? [0, n]).map((at: number, i: number) => {
      checkNumber("slice", `pairs[${d}][${i}]`, at, { integer: true, min: -n, max: n });
      return at < 0 ? at + n : at + 0; // −0 is 0
    });
    if (to < from) {
      throw new RangeError(`slice: pairs[${d}] must not end before it starts, got [${pairs[d].join(", ")}]`);
    }
    return [from, to];
  });
  const y = cut(x, ranges, "slice");
  return record({ op: "slice", inputs: [x], output: y, backward: (dY) => [padded(dY, ranges, x.shape, "slice")] });
}

function checkTensors(op: string, xs: readonly Tensor[]): void {
  if (!Array.isArray(xs) || xs.length === 0) {
    throw new TypeError(`${op}: xs must be an array of at least one tensor, got ${describe(xs)}`);
  }
  for (const [i, x] of xs.entries()) checkTensor(op, `xs[${i}]`, x, i === 0 ? DTYPES : [xs[0].dtype]); // holes too
}

/**
 * Joins tensors along `dim` (0 by default); they agree in dtype and all other dimensions. Gradients: each gets its part of dY. Throws a TypeError for an empty
 * list and for tensors that do not agree, a RangeError for a dimension that they lack. Source: `torch.cat`.
 *
 * @example
 * ```ts
 * import { concat, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await concat([tensor([1, 2]), tensor([3])]).array()); // [1, 2, 3]
 * ```
 */
export function concat(xs: readonly Tensor[], dim = 0): Tensor {
  checkTensors("concat", xs);
  const along = checkDim("concat", dim, xs[0].rank);
  for (const [i, x] of xs.entries()) {
    const wanted = xs[0].shape.map((n, d) => d === along && x.rank === xs[0].rank ? x.shape[d] : n);
    checkShape("concat", `xs[${i}]`, x, wanted);
  }
  const total = xs.reduce((sum, x) => sum + x.shape[along], 0);
  const y = Tensor.empty(xs[0].shape.map((n, d) => d === along ? total : n), xs[0].dtype, "concat");
  let at = 0;
  const parts = xs.map((x) => {
    const from = at;
    at += x.shape[along];
    return y.shape.map((n, d): [number, number] => d === along ? [from, from + x.shape[along]] : [0, n]);
  });
  xs.forEach((x, i) => place(x, y, parts[i]));
  return record({
    op: "concat",
    inputs: xs,
    output: y,
    backward: (dY, wants) => parts.map((part, i) => wants[i] ? cut(dY, part, "concat") : null),
  });
}

/**
 * Joins tensors of one shape and dtype along a new dimension `dim` (0 by default). Gradients: each gets its part of dY. Throws a TypeError for an empty list
 * and for tensors that differ, a RangeError for a dimension that the result lacks. Source: `torch.stack`.
 *
 * @example
 * ```ts
 * import { init, stack, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await stack([tensor([1, 2]), tensor([3, 4])], 1).array()); // [[1, 3], [2, 4]]
 * ```
 */
export function stack(xs: readonly Tensor[], dim = 0): Tensor {
  checkTensors("stack", xs);
  const at = checkDim("stack", dim, xs[0].rank + 1);
  xs.forEach((x, i) => checkShape("stack", `xs[${i}]`, x, xs[0].shape));
  const shape = [...xs[0].shape];
  shape.splice(at, 0, 1);
  checkDimensions("stack", shape);
  return composed("stack", () => {
    const parts = xs.map((x) => reshape(x, shape)), y = concat(parts, at);
    for (const part of parts) part.dispose(); // until the scope closes they would keep the memory of xs
    return y;
  });
}

function triangle(op: "triu" | "tril", x: Tensor, diagonal: number): Tensor {
  checkTensor(op, "x", x, DTYPES);
  checkRank(op, "x", x, 2);
  checkNumber(op, "diagonal", diagonal, { integer: true });
  const [rows, columns] = x.shape.slice(-2);
  using row = arange(rows), column = arange(columns); // the record keeps what it saved
  const zero = isFloat(x.dtype) ? "0.0" : x.dtype === "i32" ? "0i" : "0u";
  const keep = `select(${zero}, a, c - b ${op === "triu" ? ">=" : "<="} s0)`;
  const kept = (x: Tensor) => mapped(op, keep, [x, [row, [rows, 1]], column], x.shape, [diagonal]);
  return record({ op, inputs: [x], output: kept(x), saved: [row, column], backward: (dY) => [kept(dY)] });
}

/**
 * x [..., M, N] on and above the given diagonal of the last two dimensions (0, the default: the main one; 1: the one above), 0 below. Gradient: dX = dY
 * there, 0 below. Throws a TypeError for fewer than two dimensions, a RangeError for a diagonal that is not an integer. Source: `torch.triu`.
 *
 * @example
 * ```ts
 * import { init, ones, triu } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await triu(ones([3, 3])).array()); // [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
 * ```
 */
export function triu(x: Tensor, diagonal = 0): Tensor {
  return triangle("triu", x, diagonal);
}

/**
 * x [..., M, N] on and below the given diagonal of the last two dimensions (0, the default: the main one; 1: the one above), 0 above. Gradient: dX = dY
 * there, 0 above. Throws a TypeError for fewer than two dimensions, a RangeError for a diagonal that is not an integer. Source: `torch.tril`.
 *
 * @example
 * ```ts
 * import { init, ones, tril } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await tril(ones([3, 3]), -1).array()); // [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
 * ```
 */
export function tril(x: Tensor, diagonal = 0): Tensor {
  return triangle("tril", x, diagonal);
}
