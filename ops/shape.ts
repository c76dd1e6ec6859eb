/** Ops that move elements without changing them. */
import { describe } from "../kernels/check.ts";
import { gatherStrided } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { DType } from "../autograd/storage.ts";
import { record } from "../autograd/tape.ts";
import { checkShape, checkTensor, sizeOf, Tensor } from "../autograd/tensor.ts";
import { checkShapeArgument } from "./create.ts";
import { broadcastShape, mapped } from "./elementwise.ts";
import { checkDim, sumTo } from "./reduce.ts";

const ANY: readonly DType[] = ["f32", "f16", "i32", "u32"];

/** The same elements in another shape, as a view; one size may be −1 and is worked out. Throws a TypeError where the counts differ. */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  checkTensor("reshape", "x", x, ANY);
  if (!Array.isArray(shape)) throw new TypeError(`reshape: shape must be an array of sizes, got ${describe(shape)}`);
  const unknown = shape.indexOf(-1);
  const wanted = [...shape];
  if (unknown >= 0) {
    wanted[unknown] = 1;
    const known = sizeOf(wanted);
    wanted[unknown] = known === 0 ? 0 : x.size / known;
  }
  if (!wanted.every((n) => Number.isInteger(n) && n >= 0) || sizeOf(wanted) !== x.size) {
    throw new TypeError(`reshape: shape [${shape}] does not hold the ${x.size} elements of [${x.shape}]`);
  }
  const y = x.view(wanted, "reshape");
  return record({ op: "reshape", inputs: [x], output: y, backward: (dY) => [dY.view(x.shape, "reshape")] });
}

/** The dimensions in another order: y's dimension i is x's dimension order[i]. Throws a RangeError unless `order` names each once. */
export function permute(x: Tensor, order: readonly number[]): Tensor {
  checkTensor("permute", "x", x, ANY);
  if (!Array.isArray(order)) {
    throw new TypeError(`permute: order must be an array of dimensions, got ${describe(order)}`);
  }
  const dims = order.map((d, i) => checkDim("permute", d, x.rank, `order[${i}]`));
  if (dims.length !== x.rank || new Set(dims).size !== x.rank) {
    throw new RangeError(`permute: order must name each of the ${x.rank} dimensions once, got [${order}]`);
  }
  const strides = dims.map((d) => sizeOf(x.shape.slice(d + 1)));
  const y = Tensor.empty(dims.map((d) => x.shape[d]), x.dtype, "permute");
  gatherStrided(x.memory, y.memory, x.dtype, y.shape, strides);
  const inverse = dims.map((_, i) => dims.indexOf(i));
  return record({ op: "permute", inputs: [x], output: y, backward: (dY) => [permute(dY, inverse)] });
}

/** Dimensions a and b exchanged. */
export function transpose(x: Tensor, a: number, b: number): Tensor {
  checkTensor("transpose", "x", x, ANY);
  const order = x.shape.map((_, i) => i);
  const from = checkDim("transpose", a, x.rank, "a"), to = checkDim("transpose", b, x.rank, "b");
  [order[from], order[to]] = [to, from];
  return permute(x, order);
}

/** x broadcast to `shape` by NumPy's rule. Throws a TypeError where it does not broadcast. */
export function expand(x: Tensor, shape: readonly number[]): Tensor {
  checkTensor("expand", "x", x);
  checkShapeArgument("expand", shape);
  const full = broadcastShape("expand", [x.shape, shape]);
  if (full.length !== shape.length || full.some((n, i) => n !== shape[i])) {
    throw new TypeError(`expand: x of shape [${x.shape}] does not broadcast to [${shape}]`);
  }
  const y = mapped("expand", "a", [x], full);
  return record({ op: "expand", inputs: [x], output: y, backward: (dY) => [sumTo(dY, x.shape)] });
}

/** Overwrites x in place with `other`'s elements; see `Tensor.assign`. */
export function assign(x: Tensor, other: Tensor): void {
  checkTensor("assign", "x", x, ANY);
  checkTensor("assign", "other", other, [x.dtype]);
  checkShape("assign", "other", other, x.shape);
  const { storage } = x, { pool } = gpu();
  let from = other.memory;
  storage.version++;
  storage.host = null;
  if (storage === other.storage) return;
  // host-written slots are never written by the GPU: the tensor moves to memory of its own
  if (x.memory.owner.readOnly) storage.moveTo(pool.take(x.memory.bytes), x.memory.bytes);
  const shared = from.buffer === storage.memory.buffer;
  if (shared) { // one dispatch cannot read and write one buffer: two slots of an optimizer's block
    const between = pool.take(from.bytes);
    gatherStrided(from, between, x.dtype, [x.size], [1]);
    from = between;
  }
  gatherStrided(from, storage.memory, x.dtype, [x.size], [1]);
  if (shared) from.free();
}

/** Internal: throws unless `x` has at least `rank` dimensions. */
export function checkRank(op: string, name: string, x: Tensor, rank: number): void {
  if (x.rank < rank) {
    throw new TypeError(
      `${op}: ${name} must have at least ${rank} dimension${rank > 1 ? "s" : ""}, got shape [${x.shape}]`,
    );
  }
}
