/** Matrix products. */
import { checkBoolean, checkOptions } from "../kernels/check.ts";
import { matmul as product, type Strided } from "../kernels/matmul.ts";
import type { MatmulOptions } from "../autograd/methods.ts";
import { record } from "../autograd/tape.ts";
import { checkTensor, sizeOf, Tensor } from "../autograd/tensor.ts";
import { broadcastShape } from "./elementwise.ts";
import { sumTo } from "./reduce.ts";
import { checkRank, expand } from "./shape.ts";

/** A tensor's last two dimensions as a matrix, transposed or not, with one stride between batches (0: one matrix for all). */
function matrix(x: Tensor, transposed: boolean): Strided {
  const [rows, columns] = x.shape.slice(-2);
  const batch = x.size === rows * columns ? 0 : rows * columns;
  return { memory: x.memory, element: x.dtype, batch, row: transposed ? 1 : columns, column: transposed ? columns : 1 };
}

/** x with its batch dimensions equal to `batch`, or one matrix for all of them: what one stride can walk. */
function walkable(x: Tensor, batch: readonly number[]): Tensor {
  const own = sizeOf(x.shape.slice(0, -2));
  return own === 1 || own === sizeOf(batch) ? x : expand(x, [...batch, ...x.shape.slice(-2)]);
}

/** out[b] = op(a)[b] · op(b)[b], unrecorded. */
function multiply(
  a: Tensor,
  transposeA: boolean,
  b: Tensor,
  transposeB: boolean,
  batch: readonly number[],
  into?: Tensor,
): Tensor {
  const [m, k] = transposeA ? a.shape.slice(-2).reverse() : a.shape.slice(-2);
  const n = b.shape.at(transposeB ? -2 : -1)!;
  const out = into ?? Tensor.empty([...batch, m, n], a.dtype, "matmul");
  const [x, y] = [walkable(a, batch), walkable(b, batch)];
  product(
    matrix(x, transposeA),
    matrix(y, transposeB),
    { memory: out.memory, element: out.dtype },
    m,
    n,
    k,
    sizeOf(batch),
  );
  return out;
}

/**
 * The matrix product of the last two dimensions, with the leading dimensions broadcast: [..., M, K] · [..., K, N] → [..., M, N]. A
 * vector on the left counts as a row, on the right as a column. `transposeA` and `transposeB` take a matrix transposed without moving it.
 *
 * Gradient: dA = dC·Bᵀ, dB = Aᵀ·dC. Sums run in float32 whatever the storage. Throws a TypeError where the inner sizes differ.
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
  checkOptions("matmul", options, ["transposeA", "transposeB"]);
  const { transposeA = false, transposeB = false } = options;
  checkBoolean("matmul", "transposeA", transposeA);
  checkBoolean("matmul", "transposeB", transposeB);
  checkTensor("matmul", "a", a);
  checkTensor("matmul", "b", b, [a.dtype]);
  checkRank("matmul", "a", a, 1);
  checkRank("matmul", "b", b, 1);
  if (a.rank === 1) return squeezed(matmul(a.reshape([1, a.size]), b, { transposeB }), -2);
  if (b.rank === 1) return squeezed(matmul(a, b.reshape([b.size, 1]), { transposeA }), -1);
  const inner = [a.shape.at(transposeA ? -2 : -1)!, b.shape.at(transposeB ? -1 : -2)!];
  if (inner[0] !== inner[1]) {
    const name = (x: Tensor, t: boolean) => `[${x.shape.join(", ")}]${t ? " transposed" : ""}`;
    throw new TypeError(
      `matmul: inner sizes must agree, got a of shape ${name(a, transposeA)} and b of shape ${name(b, transposeB)}`,
    );
  }
  if (b.rank === 2 && a.rank > 2 && !transposeA) { // one matrix for all: its rows are one long batch
    const [m, n] = [a.shape.at(-2)!, b.shape.at(transposeB ? -2 : -1)!];
    return matmul(a.reshape([sizeOf(a.shape.slice(0, -1)), inner[0]]), b, { transposeB }).reshape([
      ...a.shape.slice(0, -2),
      m,
      n,
    ]);
  }
  const batch = broadcastShape("matmul", [a.shape.slice(0, -2), b.shape.slice(0, -2)]);
  const out = multiply(a, transposeA, b, transposeB, batch);
  return record({
    op: "matmul",
    inputs: [a, b],
    output: out,
    saved: [a, b],
    backward: (dOut, wants, gradientOf) => {
      // written where it is wanted if no sum over batches follows
      const target = (i: number, x: Tensor) =>
        x.rank === out.rank && x.shape.slice(0, -2).every((n, d) => n === batch[d]) ? gradientOf(i) : undefined;
      const dA = () =>
        transposeA
          ? multiply(b, transposeB, dOut, true, batch, target(0, a))
          : multiply(dOut, false, b, !transposeB, batch, target(0, a));
      const dB = () =>
        transposeB
          ? multiply(dOut, true, a, transposeA, batch, target(1, b))
          : multiply(a, !transposeA, dOut, false, batch, target(1, b));
      return [wants[0] ? sumTo(dA(), a.shape) : null, wants[1] ? sumTo(dB(), b.shape) : null];
    },
  });
}

function squeezed(x: Tensor, dim: -1 | -2): Tensor {
  const shape = [...x.shape];
  shape.splice(dim, 1);
  return x.reshape(shape);
}

/**
 * y = x·weightᵀ + bias over the last dimension: x [..., in], weight [out, in], bias [out] → [..., out]. The bias is added inside the product's kernel.
 *
 * Gradients: dX = dY·weight, dWeight = dYᵀ·x, dBias = Σ dY. Throws a TypeError where the shapes do not fit.
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
export function linear(x: Tensor, weight: Tensor, bias?: Tensor): Tensor {
  checkTensor("linear", "x", x);
  checkRank("linear", "x", x, 1);
  checkTensor("linear", "weight", weight, [x.dtype]);
  const width = x.shape.at(-1)!, [outs, ins] = weight.shape;
  if (weight.rank !== 2 || ins !== width) {
    throw new TypeError(`linear: weight must have shape [out, ${width}], got [${weight.shape.join(", ")}]`);
  }
  if (bias !== undefined) {
    checkTensor("linear", "bias", bias, [x.dtype]);
    if (bias.rank !== 1 || bias.size !== outs) {
      throw new TypeError(`linear: bias must have shape [${outs}], got [${bias.shape.join(", ")}]`);
    }
  }
  const rows = sizeOf(x.shape.slice(0, -1));
  const y = Tensor.empty([...x.shape.slice(0, -1), outs], x.dtype, "linear");
  const flat = (t: Tensor, columns: number, transposed = false): Strided => ({
    memory: t.memory,
    element: t.dtype,
    batch: 0,
    row: transposed ? 1 : columns,
    column: transposed ? columns : 1,
  });
  const target = (t: Tensor) => ({ memory: t.memory, element: t.dtype });
  product(flat(x, width), flat(weight, ins, true), target(y), rows, outs, width, 1, bias && target(bias));
  return record({
    op: "linear",
    inputs: bias ? [x, weight, bias] : [x, weight],
    output: y,
    saved: [x, weight],
    backward: (dY, wants, gradientOf) => {
      const dX = wants[0] ? gradientOf(0) : null, dWeight = wants[1] ? gradientOf(1) : null;
      if (dX) product(flat(dY, outs), flat(weight, ins), target(dX), rows, ins, outs, 1);
      if (dWeight) product(flat(dY, outs, true), flat(x, width), target(dWeight), outs, ins, rows, 1);
      return [dX, dWeight, wants[2] ? sumTo(dY.view([rows, outs], "linear"), [outs]) : null];
    },
  });
}
