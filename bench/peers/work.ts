/**
 * The work of all peers, with the same numbers.
 *
 * @module
 */

/** One row of the table. `torch_losses.py` reads the same file of tasks. */
export type Task =
  & { name: string }
  & (
    | { kind: "crossEntropy" | "forwardKl" | "jsd"; rows: number; classes: number }
    | { kind: "matmul"; rows: number; depth: number; columns: number }
    | { kind: "mlp"; batch: number }
    | { kind: "gpt"; layers: number; width: number; heads: number; batch: number; context: number; classes: number }
  );

/** A task that a peer has set up. */
export interface Prepared {
  /** Encodes the work once: a loss with its gradient, a product, a training step. */
  step(): void;
  /** Waits until all steps have been done. */
  finish(): Promise<void>;
  /** What must agree: a loss and two rows of its gradient, two rows of a product, or, for training, the loss after the first five steps. */
  result(): Promise<number[][]>;
}

/** A library that does the work. */
export interface Peer {
  /** Opens the adapter. */
  open(): Promise<void>;
  /** Null if the task has not been written for this library. */
  prepare(task: Task): Promise<Prepared | null>;
}

/** The layers of the MLP, and Adam's numbers. */
export const MLP: [ins: number, outs: number][] = [[784, 256], [256, 256], [256, 10]];
export const ADAM = { lr: 1e-3, betas: [0.9, 0.999] as [number, number], eps: 1e-8 };
export const STEPS = 5;

/** Evenly spread numbers in (−scale, scale), the same in Python: a hash of the index. */
export function numbers(size: number, scale: number, seed: number): Float32Array<ArrayBuffer> {
  const values = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    let h = Math.imul(i + Math.imul(seed, 0x9e3779b9), 0x9e3779b1);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    h ^= h >>> 16;
    values[i] = ((h >>> 0) / 2 ** 31 - 1) * scale;
  }
  return values;
}

/** A product's operands: the numbers, and how many rows and columns they form. */
export function operands(
  { rows, depth, columns }: { rows: number; depth: number; columns: number },
): [values: Float32Array<ArrayBuffer>, rows: number, columns: number][] {
  return [[numbers(rows * depth, 1, 1), rows, depth], [numbers(depth * columns, 1, 2), depth, columns]];
}

/** Class indices, the same in Python. */
export function classIndices(size: number, classes: number): Int32Array<ArrayBuffer> {
  return Int32Array.from({ length: size }, (_, i) => (i * 7919) % classes);
}

/** Initial weights and biases of the MLP, in the same range as PyTorch's. */
export function mlpParameters(): { weight: Float32Array<ArrayBuffer>; bias: Float32Array<ArrayBuffer> }[] {
  return MLP.map(([ins, outs], i) => ({
    weight: numbers(outs * ins, ins ** -0.5, 10 + 2 * i), // [outs, ins]
    bias: numbers(outs, ins ** -0.5, 11 + 2 * i),
  }));
}
