import type { Tensor } from "./tensor.ts";

/** A tensor, or a number that broadcasts. */
export type Operand = Tensor | number;

/** Options of reductions. */
export interface ReduceOptions {
  /** The dimension or dimensions to reduce; all by default, and where none is named. Negative ones count from the back. */
  dim?: number | number[];
  /** Whether reduced dimensions are kept, with size 1. */
  keepDim?: boolean;
}

/** Options of `variance`. */
export interface VarianceOptions extends ReduceOptions {
  /** Subtracted from the count in the divisor; 1 (unbiased) by default. */
  correction?: number;
}

/** Options of `gelu`. */
export interface GeluOptions {
  /** `"none"` for x·Φ(x), `"tanh"` for its approximation. */
  approximate?: "none" | "tanh";
}

/** Options of `clamp`. */
export interface ClampOptions {
  /** Lower bound. */
  min?: number;
  /** Upper bound. */
  max?: number;
}

/** Options of `matmul`. */
export interface MatmulOptions {
  /** Whether a's last two dimensions are exchanged first. */
  transposeA?: boolean;
  /** Whether b's last two dimensions are exchanged first. */
  transposeB?: boolean;
}

/**
 * The functions that Tensor's methods call. ops/methods.ts fills the table (tape.ts adds `backward`), so that this folder imports
 * nothing to its right.
 */
export interface Methods {
  backward(loss: Tensor, dOutput?: Tensor): void;
  assign(x: Tensor, other: Tensor): void;
  add(a: Operand, b: Operand): Tensor;
  sub(a: Operand, b: Operand): Tensor;
  mul(a: Operand, b: Operand): Tensor;
  div(a: Operand, b: Operand): Tensor;
  pow(a: Operand, b: Operand): Tensor;
  maximum(a: Operand, b: Operand): Tensor;
  minimum(a: Operand, b: Operand): Tensor;
  neg(x: Tensor): Tensor;
  abs(x: Tensor): Tensor;
  exp(x: Tensor): Tensor;
  log(x: Tensor): Tensor;
  sqrt(x: Tensor): Tensor;
  rsqrt(x: Tensor): Tensor;
  square(x: Tensor): Tensor;
  sin(x: Tensor): Tensor;
  cos(x: Tensor): Tensor;
  tanh(x: Tensor): Tensor;
  sigmoid(x: Tensor): Tensor;
  relu(x: Tensor): Tensor;
  gelu(x: Tensor, options?: GeluOptions): Tensor;
  silu(x: Tensor): Tensor;
  softplus(x: Tensor): Tensor;
  clamp(x: Tensor, options: ClampOptions): Tensor;
  cast(x: Tensor, dtype: "f32" | "f16"): Tensor;
  sum(x: Tensor, options?: ReduceOptions): Tensor;
  mean(x: Tensor, options?: ReduceOptions): Tensor;
  max(x: Tensor, options?: ReduceOptions): Tensor;
  min(x: Tensor, options?: ReduceOptions): Tensor;
  variance(x: Tensor, options?: VarianceOptions): Tensor;
  logSumExp(x: Tensor, options?: ReduceOptions): Tensor;
  argmax(x: Tensor, options?: { dim?: number; keepDim?: boolean }): Tensor;
  softmax(x: Tensor, dim?: number): Tensor;
  logSoftmax(x: Tensor, dim?: number): Tensor;
  reshape(x: Tensor, shape: readonly number[]): Tensor;
  transpose(x: Tensor, a: number, b: number): Tensor;
  permute(x: Tensor, order: readonly number[]): Tensor;
  expand(x: Tensor, shape: readonly number[]): Tensor;
  slice(x: Tensor, pairs: readonly (readonly [number, number])[]): Tensor;
  gather(x: Tensor, dim: number, index: Tensor): Tensor;
  triu(x: Tensor, diagonal?: number): Tensor;
  tril(x: Tensor, diagonal?: number): Tensor;
  where(condition: Tensor, a: Operand, b: Operand): Tensor;
  matmul(a: Tensor, b: Tensor, options?: MatmulOptions): Tensor;
}

/** The table. */
export const methods: Methods = {} as Methods;
