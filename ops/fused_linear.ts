/**
 * A model's head and its loss in one op. It processes the rows in chunks: it computes a chunk's logits, the loss overwrites them with their gradient, and the
 * gradients of hidden states and weights follow from that. The full [N, V] logits never exist.
 */
import { checkNumber, checkOneOf } from "../kernels/check.ts";
import { crossEntropyRows } from "../kernels/cross_entropy.ts";
import { divergenceRows } from "../kernels/divergence.ts";
import type { DivergenceName } from "../kernels/divergence_formulas.ts";
import { accumulate, type Element, map } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { matmul } from "../kernels/matmul.ts";
import { reduce } from "../kernels/reduce.ts";
import type { Upstream } from "../kernels/row.ts";
import { fill } from "../kernels/random.ts";
import { composed } from "../autograd/composed.ts";
import { checkShape, checkTensor, type Tensor } from "../autograd/tensor.ts";
import {
  type CrossEntropyOptions,
  type CrossEntropyResult,
  furtherReturns,
  numbersOf,
  OPTIONS as CROSS_ENTROPY_OPTIONS,
} from "./cross_entropy.ts";
import {
  DIVERGENCES,
  type JsdOptions,
  OPTIONS as DIVERGENCE_OPTIONS,
  resolveDivergence,
  type SkewOptions,
} from "./divergence.ts";
import { matrix, plain } from "./matmul.ts";
import {
  checkLabels,
  checkLossOptions,
  countsOf,
  type LossReduction,
  type RowLaunch,
  rowLoss,
  type Rows,
  rowsOf,
} from "./row_loss.ts";

/** Options of `linearCrossEntropy`: those of `crossEntropy`, and the head's. */
export interface LinearCrossEntropyOptions extends CrossEntropyOptions {
  /** Added to the logits, [V]; null, as that of a `Linear` without one, adds nothing. */
  bias?: Tensor | null;
  /** The rows of a chunk; by default as many as fit into 256 MiB and one binding. */
  chunkSize?: number;
}

/** Options of `linearDistillation`: those of `jsd` and of the skewed KLs, which count for these alone, and the heads'. */
export interface LinearDistillationOptions extends JsdOptions, SkewOptions {
  /** Added to the student's logits, [V]; or null. */
  bias?: Tensor | null;
  /** Added to the teacher's logits, [V]; or null. */
  teacherBias?: Tensor | null;
  /** `"forwardKl"` by default. */
  divergence?: DivergenceName;
  /** The rows of a chunk; by default as many as fit into 256 MiB and one binding. */
  chunkSize?: number;
}

/** One side's head: hidden [N, D] · weightᵀ [V, D] + bias [V]. */
interface Head {
  hidden: Tensor;
  weight: Tensor;
  bias?: Tensor | null;
}

/** Checks a head and returns the rows of its logits. */
function headRows(op: string, names: [string, string, string], { hidden, weight, bias }: Head): Rows {
  const { rows, columns: depth, shape } = rowsOf(op, names[0], hidden, "column");
  checkTensor(op, names[1], weight, [hidden.dtype]);
  if (weight.rank !== 2 || weight.shape[1] !== depth || weight.shape[0] === 0) {
    throw new TypeError(`${op}: ${names[1]} must have shape [classes, ${depth}], got [${weight.shape.join(", ")}]`);
  }
  const columns = weight.shape[0];
  if (bias !== undefined && bias !== null) checkTensor(op, names[2], bias, [hidden.dtype], [columns]);
  return { rows, columns, shape };
}

// The bytes of a chunk of logits, and the rows of a product's largest tile. Chunks are whole tiles (261 rows would take three tiles and fill only two), and
// there are few of them, since each reads and writes the weight's gradient: in chunks of 261 rows 2048×1024×128256 took an H100 1.6 times as long as unfused.
const CHUNK_BYTES = 2 ** 28, TILE = 128;

/** The rows of a chunk: at least 1, and no more than there are. */
function chunkRows(op: string, asked: number | undefined, { rows, columns }: Rows): number {
  const limit = Math.floor(gpu().info.limits.maxStorageBufferBindingSize / (4 * columns));
  if (limit < 1) throw new RangeError(`${op}: one row of ${columns} logits is more than this adapter binds at once`);
  if (asked === undefined) {
    const most = Math.max(1, Math.min(limit, Math.floor(CHUNK_BYTES / (4 * columns))));
    const even = Math.ceil(rows / Math.ceil(rows / most) / TILE) * TILE; // chunks of equal size
    return rows <= most ? Math.max(1, rows) : even <= most ? even : most - most % (most < TILE ? 1 : TILE);
  }
  checkNumber(op, "chunkSize", asked, { integer: true, min: 1 });
  return Math.min(asked, limit, Math.max(1, rows));
}

/** logits = hidden[from, from + count)·weightᵀ + bias. */
function headForward(head: Head, logits: Memory, from: number, count: number): void {
  const { hidden, weight, bias } = head, [classes, depth] = weight.shape;
  matmul({
    a: { ...matrix(hidden, depth), offset: from * depth },
    b: matrix(weight, depth, true),
    c: { memory: logits, element: "f32" },
    rows: count,
    columns: classes,
    depth,
    epilogue: { bias: bias ? plain(bias) : undefined },
  });
}

/** The memories of one side's gradients; those that are sums over chunks are f32 for every storage type. */
interface HeadGradients {
  hidden: Memory | null;
  weight: Memory | null;
  bias: Memory | null;
}

/** Adds the contribution of a chunk's d_logits to the gradients. */
function headBackward(head: Head, dLogits: Memory, to: HeadGradients, from: number, count: number): void {
  const { hidden, weight } = head, [classes, depth] = weight.shape, first = from === 0;
  const d = { memory: dLogits, element: "f32" as Element, batch: 0 };
  if (to.hidden) {
    matmul({
      a: { ...d, row: classes, column: 1 },
      b: matrix(weight, depth),
      c: { memory: to.hidden, element: hidden.dtype, offset: from * depth },
      rows: count,
      columns: depth,
      depth: classes,
    });
  }
  if (to.weight) {
    matmul({
      a: { ...d, row: 1, column: classes },
      b: { ...matrix(hidden, depth), offset: from * depth },
      c: { memory: to.weight, element: "f32" },
      rows: classes,
      columns: depth,
      depth: count,
      epilogue: { add: !first, sums: to.bias ? { memory: to.bias, element: "f32" } : undefined },
    });
  } else if (to.bias) {
    const from = { values: dLogits, input: "f32", output: "f32" } as const;
    const sizes = { outer: 1, length: count, inner: classes };
    if (first) return reduce("sum", { ...from, results: to.bias }, sizes);
    using part = gpu().pool.take(4 * classes);
    reduce("sum", { ...from, results: part }, sizes);
    accumulate(to.bias, part, classes, "f32");
  }
}

/**
 * The loss over chunks. `chunk` writes the losses of a chunk's rows, and overwrites the logits of each head for which `gradients` is true with their gradient.
 */
function chunked(
  op: string,
  heads: Head[],
  batch: Rows,
  size: number,
  loss: { reduction: LossReduction; counts: Tensor; more: Tensor[] },
  chunk: (
    logits: Memory[],
    from: number,
    count: number,
    into: Memory,
    gradients: boolean[],
    upstream: Upstream | null,
  ) => void,
): Tensor {
  const { rows, columns } = batch, { pool } = gpu();
  const inputs = heads.flatMap((h) => h.bias ? [h.hidden, h.weight, h.bias] : [h.hidden, h.weight]);
  const launch: RowLaunch = (into, gradients, upstream) => {
    const taken: Memory[] = [];
    const take = (bytes: number) => {
      const memory = pool.take(bytes, op);
      taken.push(memory);
      return memory;
    };
    try {
      const temporary: { memory: Memory; to: Memory; tensor: Tensor }[] = [];
      // sums over chunks for f16 gradients are f32 and rounded once
      const summed = (tensor: Tensor, to: Memory | null): Memory | null => {
        if (!to || tensor.dtype === "f32") return to;
        const memory = take(4 * tensor.size);
        temporary.push({ memory, to, tensor });
        return memory;
      };
      let i = 0;
      const targets = heads.map((head): HeadGradients => ({
        hidden: gradients[i++],
        weight: summed(head.weight, gradients[i++]),
        bias: head.bias ? summed(head.bias, gradients[i++]) : null,
      }));
      if (rows === 0) { // there is no chunk that writes them
        targets.forEach(({ weight, bias }, h) => {
          if (weight) fill(weight, 0, heads[h].weight.size, "f32");
          if (bias) fill(bias, 0, columns, "f32");
        });
      }
      const wanted = targets.map((t) => t.hidden !== null || t.weight !== null || t.bias !== null);
      const logits = heads.map(() => take(4 * size * columns));
      for (let from = 0; from < rows; from += size) {
        const count = Math.min(size, rows - from);
        heads.forEach((head, h) => headForward(head, logits[h], from, count));
        chunk(logits, from, count, into, wanted, upstream);
        heads.forEach((head, h) => wanted[h] && headBackward(head, logits[h], targets[h], from, count));
      }
      for (const { memory, to, tensor } of temporary) {
        const operand = (m: Memory, element: Element) => ({ memory: m, shape: tensor.shape, element });
        map("convert", "a", [operand(memory, "f32")], operand(to, tensor.dtype), tensor.shape);
      }
    } finally {
      for (const memory of taken) memory.free();
    }
  };
  return rowLoss(op, inputs, batch, loss.reduction, launch, loss.counts, loss.more);
}

/**
 * `crossEntropy(linear(hidden, weight, bias), target)` without the [N, V] logits: only one chunk of rows exists at a time.
 *
 * hidden [..., D], weight [V, D], bias [V], target [...] (i32 or u32). It has every option, reduction and additional result of `crossEntropy`, but no soft
 * targets; the mean is over all rows, not over a chunk. Gradients: dHidden = dLogits·weight, dWeight = dLogitsᵀ·hidden, dBias = Σ dLogits, with dLogits as
 * `crossEntropy` has them. Value and gradients equal the unfused ones up to float32 rounding. Besides the gradients it needs memory for one chunk of logits.
 * Errors as `crossEntropy`, and a RangeError for a chunk size below 1.
 *
 * Source: Liger-Kernel 2024 (fused linear cross-entropy); Wijmans et al. 2024 (cut cross-entropy).
 *
 * @example
 * ```ts
 * import { init, linearCrossEntropy, randn, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const hidden = randn([6, 4], { requiresGrad: true }), weight = randn([10, 4], { requiresGrad: true });
 * using tape = new Tape();
 * const loss = linearCrossEntropy(hidden, weight, tensor(new Int32Array([1, 2, 3, 4, 5, -100])), { chunkSize: 2 });
 * loss.backward();
 * console.log(weight.grad!.shape); // [10, 4]
 * ```
 */
export function linearCrossEntropy(
  hidden: Tensor,
  weight: Tensor,
  target: Tensor,
  options?: LinearCrossEntropyOptions & { returnZLoss?: false; returnAccuracy?: false; returnPredictions?: false },
): Tensor;
/** With `returnAccuracy`: the loss, the accuracy, and whatever else was requested. */
export function linearCrossEntropy(
  hidden: Tensor,
  weight: Tensor,
  target: Tensor,
  options: LinearCrossEntropyOptions & { returnAccuracy: true },
): CrossEntropyResult & { accuracy: Tensor };
/** With another `return…` option: the loss and what was requested. */
export function linearCrossEntropy(
  hidden: Tensor,
  weight: Tensor,
  target: Tensor,
  options: LinearCrossEntropyOptions & ({ returnZLoss: true } | { returnPredictions: true }),
): CrossEntropyResult;
/** With options that are not known at compile time: a Tensor, or a result if a `return…` option is set. */
export function linearCrossEntropy(
  hidden: Tensor,
  weight: Tensor,
  target: Tensor,
  options?: LinearCrossEntropyOptions,
): Tensor | CrossEntropyResult;
export function linearCrossEntropy(
  hidden: Tensor,
  weight: Tensor,
  target: Tensor,
  options: LinearCrossEntropyOptions = {},
): Tensor | CrossEntropyResult {
  const op = "linearCrossEntropy";
  checkLossOptions(op, options, ["bias", "chunkSize", ...CROSS_ENTROPY_OPTIONS]);
  const { bias, chunkSize, reduction = "mean", weight: classWeight } = options;
  const numbers = numbersOf(options), { ignoreIndex } = numbers;
  const head = { hidden, weight, bias };
  const batch = headRows(op, ["hidden", "weight", "bias"], head), { rows, columns } = batch;
  checkLabels(op, "target", target, batch, ignoreIndex);
  if (classWeight !== undefined) checkTensor(op, "options.weight", classWeight, ["f32"], [columns]);
  const size = chunkRows(op, chunkSize, batch);
  return composed(op, () => {
    const counts = countsOf(target, classWeight, batch, ignoreIndex);
    const { extras, result } = furtherReturns(op, options, batch.shape, counts);
    const more = classWeight ? [target, classWeight] : [target];
    const loss = chunked(
      op,
      [head],
      batch,
      size,
      { reduction, counts, more },
      ([logits], from, count, loss, [wanted], upstream) => {
        const launch = (filled: typeof extras, dLogits: Memory | null) =>
          crossEntropyRows("f32", "index", {
            logits,
            target: target.memory,
            counts: counts.memory,
            weight: classWeight?.memory ?? null,
            upstream,
            loss,
            extras: filled,
            dLogits,
          }, {
            rows: count,
            firstRow: from,
            allRows: rows,
            columns,
            ...numbers,
          });
        // a launch of its own: the kernel finds the largest logits last, when gradients in place would have overwritten them
        const first = extras !== null && upstream === null;
        if (first) launch(extras, null);
        if (wanted || !first) launch(null, wanted ? logits : null);
      },
    );
    return result(loss);
  });
}

/**
 * A divergence between the logits of two heads, without their [N, V] logits: student hidden·weightᵀ + bias against teacherHidden·teacherWeightᵀ + teacherBias.
 *
 * hidden [..., D], weight [V, D], teacherHidden [..., E], teacherWeight [V, E]. The divergence alone, without cross-entropy and T², with every option
 * and reduction. Gradients for both hidden states, weights and biases: of each side dHidden = dLogits·weight, dWeight = dLogitsᵀ·hidden, dBias = Σ
 * dLogits, with dLogits as the divergences have them; none for a teacher that requires none, as with `teacherWeight.detach()`. Memory: one chunk of logits
 * per side. Errors as the divergences.
 *
 * Source: Liger-Kernel 2024 (fused linear JSD).
 *
 * @example
 * ```ts
 * import { init, linearDistillation, randn, Tape } from "@limbeck/limbeck";
 *
 * await init();
 * const hidden = randn([6, 4], { requiresGrad: true }), weight = randn([10, 4], { requiresGrad: true });
 * using tape = new Tape();
 * const loss = linearDistillation(hidden, weight, randn([6, 8]), randn([10, 8]), { divergence: "jsd", beta: 0.3 });
 * loss.backward();
 * console.log(hidden.grad!.shape); // [6, 4]
 * ```
 */
export function linearDistillation(
  hidden: Tensor,
  weight: Tensor,
  teacherHidden: Tensor,
  teacherWeight: Tensor,
  options: LinearDistillationOptions = {},
): Tensor {
  const op = "linearDistillation";
  const own = ["bias", "teacherBias", "divergence", "beta", "normalize", "alpha", "chunkSize"];
  checkLossOptions(op, options, [...own, ...DIVERGENCE_OPTIONS]);
  const { bias, teacherBias, divergence = "forwardKl", chunkSize } = options;
  const { temperature = 1, reduction = "mean", labels, ignoreIndex = -100 } = options;
  checkOneOf(op, "divergence", divergence, DIVERGENCES);
  const { kernel, beta, factor } = resolveDivergence(op, divergence, options);
  const student = { hidden, weight, bias };
  const teacher = { hidden: teacherHidden, weight: teacherWeight, bias: teacherBias };
  const batch = headRows(op, ["hidden", "weight", "bias"], student), { rows, columns } = batch;
  const other = headRows(op, ["teacherHidden", "teacherWeight", "teacherBias"], teacher);
  if (other.columns !== columns) {
    throw new TypeError(
      `${op}: teacherWeight must have shape [${columns}, depth], got [${teacherWeight.shape.join(", ")}]`,
    );
  }
  checkShape(op, "teacherHidden", teacherHidden, [...batch.shape, teacherWeight.shape[1]]);
  if (labels !== undefined) checkLabels(op, "labels", labels, batch, ignoreIndex);
  const size = chunkRows(op, chunkSize, batch);
  return composed(op, () => {
    const counts = countsOf(labels, undefined, batch, ignoreIndex);
    const loss = { reduction, counts, more: labels ? [labels] : [] };
    return chunked(
      op,
      [student, teacher],
      batch,
      size,
      loss,
      ([s, t], from, count, into, [dStudent, dTeacher], upstream) => {
        divergenceRows(kernel, "f32", "f32", {
          student: s,
          teacher: t,
          labels: labels?.memory ?? null,
          counts: counts.memory,
          upstream,
          loss: into,
          parts: null,
          dStudent: dStudent ? s : null,
          dTeacher: dTeacher ? t : null,
        }, {
          rows: count,
          firstRow: from,
          allRows: rows,
          columns,
          mean: reduction === "mean",
          drop: labels !== undefined,
          ignoreIndex,
          temperature,
          beta,
          ceFactor: 0,
          divergenceFactor: factor,
        });
      },
    );
  });
}
