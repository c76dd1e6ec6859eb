/** What elementwise ops and reductions share: broadcast shapes, and tensors computed by an expression. */
import { map, type Operand } from "../kernels/elementwise.ts";
import type { DType } from "../autograd/storage.ts";
import { Tensor } from "../autograd/tensor.ts";

/** The shape that `shapes` broadcast to, by NumPy's rules. Throws a TypeError that names the op. */
export function broadcastShape(op: string, shapes: readonly (readonly number[])[]): number[] {
  const rank = Math.max(0, ...shapes.map((s) => s.length));
  const out = new Array<number>(rank).fill(1);
  for (const shape of shapes) {
    shape.forEach((n, i) => {
      const at = rank - shape.length + i;
      if (n === 1 || n === out[at]) return;
      if (out[at] !== 1) {
        throw new TypeError(`${op}: shapes ${shapes.map((s) => `[${s.join(", ")}]`).join(" and ")} do not broadcast`);
      }
      out[at] = n;
    });
  }
  return out;
}

/** A tensor, or a tensor that is read in another shape of the same size. */
export type Input = Tensor | readonly [x: Tensor, shape: readonly number[]];

/**
 * Internal: a new tensor of `shape`, each element of which is `expression` of the inputs' elements (a, b, c, d) and the scalars (s0, s1). The dtype is that
 * of the first input by default.
 */
export function mapped(
  name: string,
  expression: string,
  inputs: readonly Input[],
  shape: readonly number[],
  scalars: readonly number[] = [],
  dtype?: DType,
): Tensor {
  const operands = inputs.map((input): Operand => {
    const [x, shape] = input instanceof Tensor ? [input, input.shape] : input;
    return { memory: x.memory, shape, element: x.dtype };
  });
  const y = Tensor.empty([...shape], dtype ?? operands[0].element, name);
  map(name, expression, operands, { memory: y.memory, element: y.dtype }, shape, scalars);
  return y;
}
