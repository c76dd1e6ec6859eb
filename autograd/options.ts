/** Operands and options of Tensor's methods. */
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
