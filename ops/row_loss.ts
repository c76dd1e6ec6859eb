/** What all losses over rows of logits share: checks, the reduction, and when the gradient is computed. */
import { checkNumber, checkOneOf, checkOptions } from "../kernels/check.ts";
import { countRows } from "../kernels/cross_entropy.ts";
import { scale, sizeOf } from "../kernels/elementwise.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { reduce } from "../kernels/reduce.ts";
import type { Upstream } from "../kernels/row.ts";
import { hidden, needsGradient, record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { checkRank } from "./shape.ts";

/** How the rows' losses are reduced: to their mean, to their sum, or not at all. */
export type LossReduction = "mean" | "sum" | "none";

/** The rows of a tensor of logits: their number, their length, and the shape without the last dimension. */
export interface Rows {
  rows: number;
  columns: number;
  shape: number[];
}

/** Checks a tensor of logits and counts its rows. */
export function rowsOf(op: string, name: string, x: Tensor, column = "class"): Rows {
  checkTensor(op, name, x);
  checkRank(op, name, x, 1);
  const columns = x.shape.at(-1)!, shape = x.shape.slice(0, -1);
  if (columns === 0) {
    throw new RangeError(`${op}: ${name} must have at least one ${column}, got shape [${x.shape.join(", ")}]`);
  }
  return { rows: sizeOf(shape), columns, shape: [...shape] };
}

/**
 * Checks class indices: integers of the rows' shape. If the host wrote them, they must be classes or `ignoreIndex`; if only the GPU knows them, a wrong one
 * makes its row NaN.
 */
export function checkLabels(
  op: string,
  name: string,
  labels: Tensor,
  { columns, shape }: Rows,
  ignoreIndex: number,
): void {
  checkTensor(op, name, labels, ["i32", "u32"], shape);
  labels.storage.host?.forEach((label, i) => {
    if (label === ignoreIndex || (label >= 0 && label < columns)) return;
    throw new RangeError(
      `${op}: ${name} must be a class in [0, ${columns}) or ignoreIndex ${ignoreIndex}, got ${label} at row ${i}`,
    );
  });
}

type Checked = "reduction" | "temperature" | "ignoreIndex" | "labelSmoothing" | "zLoss" | "softcap";

/** Checks that a loss has no options but the `known` ones, and the values of those that losses share. */
export function checkLossOptions(op: string, o: { [name in Checked]?: unknown }, known: readonly string[]): void {
  checkOptions(op, o, known);
  if (o.reduction !== undefined) checkOneOf(op, "reduction", o.reduction, ["mean", "sum", "none"]);
  if (o.temperature !== undefined) checkNumber(op, "temperature", o.temperature, { above: 0 });
  if (o.ignoreIndex !== undefined) {
    checkNumber(op, "ignoreIndex", o.ignoreIndex, { integer: true, min: -(2 ** 31), below: 2 ** 31 });
  }
  if (o.labelSmoothing !== undefined) checkNumber(op, "labelSmoothing", o.labelSmoothing, { min: 0, max: 1 });
  if (o.zLoss !== undefined) checkNumber(op, "zLoss", o.zLoss, { min: 0 });
  if (o.softcap !== undefined) checkNumber(op, "softcap", o.softcap, { above: 0 });
}

/** What kernels divide the mean by; see `countRows`. Without labels it is memory that no kernel reads. */
export function countsOf(
  labels: Tensor | undefined,
  weight: Tensor | undefined,
  { rows, columns }: Rows,
  ignoreIndex: number,
): Tensor {
  const counts = hidden([3], "f32");
  if (labels) countRows(labels.memory, weight?.memory ?? null, counts.memory, rows, columns, ignoreIndex);
  return counts;
}

/** Launches the kernel of a row loss, for the rows' losses and the gradients of the inputs that have memory for them. */
export type RowLaunch = (
  loss: Memory,
  gradients: readonly (Memory | null)[],
  upstream: Upstream | null,
) => void;

/** Internal: the sum of all elements, or of their squares, as a scalar of f32. */
export function total(x: Tensor, op: string, kind: "sum" | "sumOfSquares" = "sum"): Tensor {
  const y = Tensor.empty([], "f32", op);
  const b = { values: x.memory, input: x.dtype, results: y.memory, output: "f32" } as const;
  reduce(kind, b, { outer: 1, length: x.size, inner: 1 });
  return y;
}

/**
 * Runs and records a row loss. When its gradient is computed depends on the reduction:
 *
 * - For a scalar, one launch computes value and gradients, for an upstream gradient of 1. If the actual one differs, f32 gradients are scaled in place; f16
 *   gradients are computed again, so that they are rounded only once.
 * - With `"none"` the backward pass computes the gradients, since each row has its own upstream gradient.
 *
 * Launches read the inputs, the tensors in `more`, and `counts`, which is freed after the last one.
 */
export function rowLoss(
  op: string,
  inputs: readonly Tensor[],
  { rows, shape }: Rows,
  reduction: LossReduction,
  launch: RowLaunch,
  counts: Tensor,
  more: readonly Tensor[],
): Tensor {
  const wanted = needsGradient(inputs), scalar = reduction !== "none";
  const scalable = scalar && inputs.every((x) => x.dtype === "f32");
  const once = scalable || !wanted; // no launch in the backward pass
  const lossRows = scalar ? hidden([rows], "f32") : Tensor.empty(shape, "f32", op);
  const early = inputs.map((x) => wanted && scalar && x.requiresGrad ? hidden(x.shape, x.dtype) : null);
  const memories = (gradients: readonly (Tensor | null)[]) => gradients.map((g) => g?.memory ?? null);
  launch(lossRows.memory, memories(early), null);
  const loss = scalar ? total(lossRows, op) : lossRows;
  if (scalar) lossRows.dispose();
  if (once) counts.dispose();
  return record({
    op,
    inputs,
    output: loss,
    saved: once ? [] : [...inputs, ...more],
    hidden: [...early.filter((g) => g !== null), ...once ? [] : [counts]],
    backward: (dLoss, wants, gradientOf) => {
      if (scalar && dLoss.storage.isUnit) return early;
      if (scalable) {
        for (const g of early) if (g) scale(g.memory, dLoss.memory, g.size, g.dtype, dLoss.dtype);
        return early;
      }
      const gradients = scalar ? early : inputs.map((_, i) => wants[i] ? gradientOf(i) : null);
      using again = hidden([rows], "f32");
      launch(again.memory, memories(gradients), { memory: dLoss.memory, stride: scalar ? 0 : 1 });
      return gradients;
    },
  });
}
