/**
 * Gathers elements by index. Indices are i32 or u32 tensors and get no gradient. An index out of range is a RangeError if the host wrote it; otherwise its
 * result is NaN, or 0 for integers and in `oneHot`.
 */
import { checkNumber } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { embedding as lookUp, embeddingBackward, gather as take, gatherBackward } from "../kernels/indexing.ts";
import { composed } from "../autograd/composed.ts";
import { DTYPES } from "../autograd/storage.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { arange } from "./create.ts";
import { mapped } from "./mapped.ts";
import { checkDim } from "./reduce.ts";
import { slice } from "./shape.ts";

function checkIndex(op: string, index: Tensor, size: number): void {
  checkTensor(op, "index", index, ["i32", "u32"]);
  index.storage.host?.forEach((k, i) => {
    if (k < 0 || k >= size) throw new RangeError(`${op}: index must be in [0, ${size}), got ${k} at element ${i}`);
  });
}

/**
 * The rows of `weight` [V, D] with the indices `index` [...] (i32 or u32) → [..., D]. Gradient: dWeight[v] = Σ dY over the places where index = v, added in
 * their order: the same bits every time.
 *
 * Throws a TypeError for wrong shapes or dtypes, a RangeError for an index outside [0, V) that the host wrote; one that only the GPU has seen gives a row of
 * NaN. Source: `torch.nn.functional.embedding`.
 *
 * @example
 * ```ts
 * import { embedding, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const y = embedding(tensor([[1, 2], [3, 4]]), tensor(new Int32Array([1, 1, 0])));
 * console.log(await y.array()); // [[3, 4], [3, 4], [1, 2]]
 * ```
 */
export function embedding(weight: Tensor, index: Tensor): Tensor {
  checkTensor("embedding", "weight", weight);
  if (weight.rank !== 2) {
    throw new TypeError(`embedding: weight must have shape [rows, width], got [${weight.shape.join(", ")}]`);
  }
  const [rows, width] = weight.shape;
  checkIndex("embedding", index, rows);
  const y = Tensor.empty([...index.shape, width], weight.dtype, "embedding");
  const sizes = { count: index.size, width, rows };
  lookUp(weight.dtype, { weight: weight.memory, index: index.memory, y: y.memory }, sizes);
  return record({
    op: "embedding",
    inputs: [weight],
    output: y,
    saved: [index],
    backward: (dY, _, gradientOf) => {
      const dWeight = gradientOf(0);
      embeddingBackward(weight.dtype, { index: index.memory, dY: dY.memory, dWeight: dWeight.memory }, sizes);
      return [dWeight];
    },
  });
}

/**
 * y[…, j, …] = x[…, index[…, j, …], …] along `dim`: index (i32 or u32) has any size there and at most x's sizes elsewhere. Gradient: dX[…, k, …] = Σ dY over
 * the places where index = k, added in their order.
 *
 * Throws a TypeError for wrong shapes or dtypes, a RangeError for a dimension that x lacks and for an index out of range that the host wrote; one that only
 * the GPU has seen gives NaN, or 0 where x holds integers. Source: `torch.gather`.
 *
 * @example
 * ```ts
 * import { gather, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const y = gather(tensor([[1, 2], [3, 4]]), 1, tensor(new Int32Array([1, 0]), [2, 1]));
 * console.log(await y.array()); // [[2], [3]]
 * ```
 */
export function gather(x: Tensor, dim: number, index: Tensor): Tensor {
  checkTensor("gather", "x", x, DTYPES);
  const along = checkDim("gather", dim, x.rank);
  checkTensor("gather", "index", index, ["i32", "u32"]);
  if (index.rank !== x.rank || index.shape.some((n, d) => d !== along && n > x.shape[d])) {
    throw new TypeError(
      `gather: index must have at most shape [${x.shape.join(", ")}] but for dimension ${along}, got [${
        index.shape.join(", ")
      }]`,
    );
  }
  checkIndex("gather", index, x.shape[along]);
  if (index.shape.some((n, d) => d !== along && n < x.shape[d])) {
    return composed("gather", () => {
      const within = slice(x, x.shape.map((n, d) => [0, d === along ? n : index.shape[d]]));
      return gather(within, along, index);
    });
  }
  const sizes = {
    outer: sizeOf(x.shape.slice(0, along)),
    from: x.shape[along],
    to: index.shape[along],
    inner: sizeOf(x.shape.slice(along + 1)),
  };
  const y = Tensor.empty(index.shape, x.dtype, "gather");
  take(x.dtype, { x: x.memory, index: index.memory, y: y.memory }, sizes);
  return record({
    op: "gather",
    inputs: [x],
    output: y,
    saved: [index],
    backward: (dY, _, gradientOf) => {
      const dX = gradientOf(0);
      gatherBackward(x.dtype, { index: index.memory, dY: dY.memory, dX: dX.memory }, sizes);
      return [dX];
    },
  });
}

/**
 * f32 [..., classes]: 1 at each index [...] (i32 or u32), 0 elsewhere (everywhere for an index out of range). No gradient. Throws a TypeError for an index of
 * another dtype, a RangeError unless 1 ≤ classes ≤ 2²⁴. Source: `torch.nn.functional.one_hot`, in f32.
 *
 * @example
 * ```ts
 * import { init, oneHot, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await oneHot(tensor(new Int32Array([2, 0])), 3).array()); // [[0, 0, 1], [1, 0, 0]]
 * ```
 */
export function oneHot(index: Tensor, classes: number): Tensor {
  checkTensor("oneHot", "index", index, ["i32", "u32"]);
  checkNumber("oneHot", "classes", classes, { integer: true, min: 1, max: 2 ** 24 });
  using numbers = arange(classes), column = index.sameMemory([...index.shape, 1], "oneHot");
  return mapped("oneHot", "select(0.0, 1.0, a == b)", [column, numbers], [...index.shape, classes], [], "f32");
}
