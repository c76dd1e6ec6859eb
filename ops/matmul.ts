/** Matrix products. */
import { checkBoolean, checkOptions } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import type { Plain, Strided } from "../kernels/epilogue.ts";
import { matmul as multiplied, type Product } from "../kernels/matmul.ts";
import type { Activation } from "../kernels/math.ts";
import { composed } from "../autograd/composed.ts";
import type { MatmulOptions } from "../autograd/options.ts";
import { hidden, record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { broadcastShape } from "./mapped.ts";
import { sumTo } from "./reduce.ts";
import { checkRank, expand, wrongFeatures } from "./shape.ts";

/** Internal: a tensor as matrices with `columns` columns, transposed or not; `batch` is the stride from one matrix to the next (0: one for all). */
export function matrix(x: Tensor, columns: number, transposed = false, batch = 0): Strided {
  return { memory: x.memory, element: x.dtype, batch, row: transposed ? 1 : columns, column: transposed ? columns : 1 };
}

/** The last two dimensions as matrices. */
function matrices(x: Tensor, transposed: boolean): Strided {
  const [rows, columns] = x.shape.slice(-2);
  return matrix(x, columns, transposed, x.size === rows * columns ? 0 : rows * columns);
}

/** Internal: a tensor's elements in their order. */
export const plain = (x: Tensor): Plain => ({ memory: x.memory, element: x.dtype });

/** x, expanded if necessary so that one batch stride is enough: either it has all of `batch`, or one matrix for all. */
function walkable(x: Tensor, batch: readonly number[]): Tensor {
  const own = sizeOf(x.shape.slice(0, -2));
  return own === 1 || own === sizeOf(batch) ? x : expand(x, [...batch, ...x.shape.slice(-2)]);
}

/** out[b] = op(a)[b] · op(b)[b], and the copies that it reads. */
function productOf(
  a: Tensor,
  transposeA: boolean,
  b: Tensor,
  transposeB: boolean,
  batch: readonly number[],
  out: Tensor,
): { product: Product; copies: Tensor[] } {
  const [rows, depth] = transposeA ? a.shape.slice(-2).reverse() : a.shape.slice(-2);
  const x = walkable(a, batch), y = walkable(b, batch);
  return {
    product: {
      a: matrices(x, transposeA),
      b: matrices(y, transposeB),
      c: plain(out),
      rows,
      columns: b.shape.at(transposeB ? -2 : -1)!,
      depth,
      batches: sizeOf(batch),
    },
    copies: [...x === a ? [] : [x], ...y === b ? [] : [y]],
  };
}

/**
 * The matrix product of the last two dimensions, with the leading dimensions broadcast: [..., M, K] · [..., K, N] → [..., M, N]. A
 * vector on the left counts as a row, on the right as a column. `transposeA` and `transposeB` take a matrix transposed without moving it.
 *
 * Gradient: dA = dC·Bᵀ, dB = Aᵀ·dC. Sums run in float32 whatever the storage. Throws a TypeError if the inner sizes or dtypes differ. Source: `torch.matmul`.
 *
 * @example
 * ```ts
 * import { init, matmul, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const a = tensor([[1, 2], [3, 4]]), b = tensor([[5, 6], [7, 8]]);
 * console.log(await matmul(a, b).array()); // [[19, 22], [43, 50]]
 * console.log(await matmul(a, b, { transposeB: true }).array()); // [[17, 23], [39, 53]]
 * ```
 */
export function matmul(a: Tensor, b: Tensor, options: MatmulOptions = {}): Tensor {
  return composed("matmul", () => multiply(a, b, options));
}

function multiply(a: Tensor, b: Tensor, options: MatmulOptions): Tensor {
  checkOptions("matmul", options, ["transposeA", "transposeB"]);
  const { transposeA = false, transposeB = false } = options;
  checkBoolean("matmul", "transposeA", transposeA);
  checkBoolean("matmul", "transposeB", transposeB);
  checkTensor("matmul", "a", a);
  checkTensor("matmul", "b", b, [a.dtype]);
  checkRank("matmul", "a", a, 1);
  checkRank("matmul", "b", b, 1);
  const inner = [
    a.shape.at(transposeA && a.rank > 1 ? -2 : -1)!,
    b.shape.at(transposeB || b.rank === 1 ? -1 : -2)!,
  ];
  if (inner[0] !== inner[1]) {
    const name = (x: Tensor, t: boolean) => `[${x.shape.join(", ")}]${t ? " transposed" : ""}`;
    throw new TypeError(
      `matmul: inner sizes must agree, got a of shape ${name(a, transposeA)} and b of shape ${name(b, transposeB)}`,
    );
  }
  if (a.rank === 1) {
    using row = a.reshape([1, a.size]), y = multiply(row, b, { transposeB }); // records keep what they saved
    return y.reshape(y.shape.toSpliced(-2, 1));
  }
  if (b.rank === 1) {
    using column = b.reshape([b.size, 1]), y = multiply(a, column, { transposeA });
    return y.reshape(y.shape.toSpliced(-1, 1));
  }
  if (b.rank === 2 && a.rank > 2 && !transposeA) { // one b for all: the rows of all a form one matrix
    const lead = a.shape.slice(0, -1);
    using rows = a.reshape([sizeOf(lead), inner[0]]), y = multiply(rows, b, { transposeB });
    return y.reshape([...lead, y.shape[1]]);
  }
  const batch = broadcastShape("matmul", [a.shape.slice(0, -2), b.shape.slice(0, -2)]);
  const out = Tensor.empty(
    [...batch, a.shape.at(transposeA ? -1 : -2)!, b.shape.at(transposeB ? -2 : -1)!],
    a.dtype,
    "matmul",
  );
  const { product, copies } = productOf(a, transposeA, b, transposeB, batch, out);
  multiplied(product);
  for (const copy of copies) copy.dispose();
  return record({
    op: "matmul",
    inputs: [a, b],
    output: out,
    saved: [...b.requiresGrad ? [a] : [], ...a.requiresGrad ? [b] : []], // each is what the other's gradient needs
    backward: (dOut, wants, gradientOf) => {
      // A gradient is written to its final place, unless it is summed over batches afterwards. Both are made before the products: if a and b are the same
      // leaf, the second one takes the optimizer's slot, and the first one moves
      const target = (i: number, x: Tensor) =>
        x.rank === out.rank && x.shape.slice(0, -2).every((n, d) => n === batch[d])
          ? gradientOf(i)
          : Tensor.empty([...batch, ...x.shape.slice(-2)], x.dtype, "matmul");
      const [dA, dB] = [a, b].map((x, i) => wants[i] ? target(i, x) : null);
      const products = [
        dA &&
        (transposeA
          ? productOf(b, transposeB, dOut, true, batch, dA)
          : productOf(dOut, false, b, !transposeB, batch, dA)),
        dB &&
        (transposeB
          ? productOf(dOut, true, a, transposeA, batch, dB)
          : productOf(a, !transposeA, dOut, false, batch, dB)),
      ].filter((product) => product !== null);
      multiplied(...products.map(({ product }) => product));
      for (const copy of products.flatMap(({ copies }) => copies)) copy.dispose();
      return [dA && sumTo(dA, a.shape), dB && sumTo(dB, b.shape)];
    },
  });
}

/** One layer of a perceptron. */
export interface Layer {
  /** [out, in] */
  weight: Tensor;
  /** [out] */
  bias?: Tensor | null;
  /** Follows the layer; not allowed after the last one. */
  activation?: Activation;
}

/** Checks the layers against their input, and returns the width of the result. */
function checkLayers(x: Tensor, layers: readonly Layer[]): number {
  let width = x.shape.at(-1)!;
  for (const { weight, bias } of layers) {
    checkTensor("linear", "weight", weight, [x.dtype]);
    const [outs, ins] = weight.shape;
    if (weight.rank !== 2) {
      throw new TypeError(`linear: weight must have shape [out, ${width}], got [${weight.shape.join(", ")}]`);
    }
    if (ins !== width) throw wrongFeatures("linear", [...x.shape.slice(0, -1), width], weight);
    if (bias !== undefined && bias !== null) checkTensor("linear", "bias", bias, [x.dtype], [outs]);
    width = outs;
  }
  return width;
}

/**
 * Internal: consecutive linear layers with activations between them, and a residual added at the end. Each layer is one product with everything else in its
 * epilogue, forward and backward. hᵢ = f(zᵢ), zᵢ = hᵢ₋₁·Wᵢᵀ + bᵢ, y = z_last + residual.
 */
export function perceptron(x: Tensor, layers: readonly Layer[], residual?: Tensor): Tensor {
  return composed("linear", () => layered(x, layers, residual));
}

function layered(x: Tensor, layers: readonly Layer[], residual?: Tensor): Tensor {
  checkTensor("linear", "x", x);
  checkRank("linear", "x", x, 1);
  const shape = [...x.shape.slice(0, -1), checkLayers(x, layers)], rows = sizeOf(x.shape.slice(0, -1));
  if (residual) checkTensor("linear", "residual", residual, [x.dtype], shape);
  // the input of each layer, and the tensor from which the slope of the activation before it is computed
  const reads = [x], slopes: (Tensor | null)[] = [null], own: Tensor[] = [];
  // copies, since a module's parameters may be replaced before the backward pass
  layers = layers.map(({ weight, bias, activation }) => ({ weight, bias, activation }));
  const y = Tensor.empty(shape, x.dtype, "linear"), last = layers.length - 1;
  layers.forEach(({ weight, bias, activation }, i) => {
    const [outs, ins] = weight.shape;
    const h = i === last ? y : hidden([rows, outs], x.dtype);
    // relu's slope follows from its result, gelu's only from its argument
    const z = activation === "gelu" ? hidden([rows, outs], x.dtype) : null;
    multiplied({
      a: matrix(reads[i], ins),
      b: matrix(weight, ins, true),
      c: plain(h),
      rows,
      columns: outs,
      depth: ins,
      epilogue: {
        bias: bias ? plain(bias) : undefined,
        activation: activation && { name: activation, before: z?.memory ?? null },
        plus: i === last ? residual?.memory : undefined,
      },
    });
    if (i === last) return;
    own.push(h);
    if (z) own.push(z);
    reads.push(h);
    slopes.push(z ?? h);
  });
  const inputs = [x, ...layers.flatMap(({ weight, bias }) => bias ? [weight, bias] : [weight])];
  if (residual) inputs.push(residual);
  // backward reads a layer's weight if anything before it needs a gradient, and x if the first weight does
  const saved = layers[0].weight.requiresGrad ? [x] : [];
  let isPassing = x.requiresGrad;
  for (const { weight, bias } of layers) {
    if (isPassing) saved.push(weight);
    isPassing ||= weight.requiresGrad || bias?.requiresGrad === true;
  }
  return record({
    op: "linear",
    inputs,
    output: y,
    saved,
    hidden: own,
    backward: (dY, wants, gradientOf) => {
      const gradients: (Tensor | null)[] = inputs.map(() => null);
      if (residual && wants[inputs.length - 1]) gradients[inputs.length - 1] = dY;
      let dZ = dY, at = inputs.length - (residual ? 1 : 0); // `at`: the index in `inputs` of the current layer's weight
      for (let i = last; i >= 0; i--) {
        const { weight, bias } = layers[i], [outs, ins] = weight.shape;
        at -= bias ? 2 : 1;
        const dWeight = wants[at] ? gradientOf(at) : null, dBias = bias && wants[at + 1] ? gradientOf(at + 1) : null;
        const needed = wants.slice(0, at).some(Boolean), of = slopes[i]?.memory;
        const dX = !needed ? null : i === 0 ? gradientOf(0) : Tensor.empty([rows, ins], x.dtype, "linear");
        const products: Product[] = [];
        if (dWeight) {
          products.push({
            a: matrix(dZ, outs, true),
            b: matrix(reads[i], ins),
            c: plain(dWeight),
            rows: outs,
            columns: ins,
            depth: rows,
            epilogue: { sums: dBias && ins > 0 ? plain(dBias) : undefined },
            isLate: true,
          });
        }
        if (dX) {
          products.push({
            a: matrix(dZ, outs),
            b: matrix(weight, ins),
            c: plain(dX),
            rows,
            columns: ins,
            depth: outs,
            epilogue: { slope: of && { name: layers[i - 1].activation!, of } },
          });
        }
        multiplied(...products);
        gradients[at] = dWeight;
        if (dBias) {
          gradients[at + 1] = dWeight && ins > 0
            ? dBias
            : sumTo(dZ.sameMemory([rows, outs], "linear"), [outs], () => dBias);
        }
        if (!dX) break;
        dZ = dX;
      }
      if (wants[0]) gradients[0] = dZ;
      return gradients;
    },
  });
}

/**
 * y = x·weightᵀ + bias over the last dimension: x [..., in], weight [out, in], bias [out] (or null) → [..., out]. The bias is added inside the product's
 * kernel.
 *
 * Gradients: dX = dY·weight, dWeight = dYᵀ·x, dBias = Σ dY. Throws a TypeError if the shapes or dtypes do not fit. Source: `torch.nn.functional.linear`.
 *
 * @example
 * ```ts
 * import { init, linear, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const y = linear(tensor([[1, 2]]), tensor([[3, 4], [5, 6]]), tensor([0.5, -0.5]));
 * console.log(await y.array()); // [[11.5, 16.5]]
 * ```
 */
export function linear(x: Tensor, weight: Tensor, bias?: Tensor | null): Tensor {
  return perceptron(x, [{ weight, bias }]);
}
