/** Where gradients are stored and how they are accumulated: in the optimizer's slots if possible, in place if nobody else holds the sum. */
import { describe } from "../kernels/check.ts";
import { accumulate } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { methods } from "./methods.ts";
import { ARRAYS, Storage } from "./storage.ts";
import { checkShape, checkTensor, Tensor } from "./tensor.ts";

/** Throws unless these, which a backward rule returned, are gradients of the inputs. */
export function checkGradients(
  op: string,
  inputs: readonly Tensor[],
  gradients: readonly (Tensor | null)[],
): void {
  const isList = Array.isArray(gradients) && gradients.length >= inputs.length;
  if (!isList || gradients.slice(inputs.length).some((x) => x)) {
    throw new TypeError(
      `${op}: backward must return an array with a gradient or null for each of ${inputs.length} inputs, got ${
        describe(gradients)
      }`,
    );
  }
  for (let i = 0; i < gradients.length; i++) {
    const gradient = gradients[i];
    if (!gradient) continue;
    const { dtype, shape } = inputs[i];
    if (!(gradient instanceof Tensor && gradient.dtype === dtype && gradient.isUsable)) {
      checkTensor(op, `the gradient of input ${i}`, gradient, [dtype]);
    }
    if (gradient.shape !== shape) checkShape(op, `the gradient of input ${i}`, gradient, shape);
  }
}

/** An uninitialised gradient; that of a leaf lies in the optimizer's slot, where there is one and it is free. */
export function gradientFor(input: Tensor, isLeaf: boolean): Tensor {
  const home = isLeaf && !input.closed && input.grad === null ? freeHome(input) : null;
  if (!home) return Tensor.empty(input.shape, input.dtype, "backward");
  return Tensor.owned(new Storage(home, true), input.shape, input.dtype, "backward");
}

/** Where an optimizer wants a leaf's gradient. An earlier gradient there that somebody still holds moves out. */
function freeHome(leaf: Tensor): Memory | null {
  const home = leaf.storage.gradientHome;
  home?.borrower?.vacate();
  return home;
}

/** total + gradient as a tensor that nothing owns; in place where nobody else holds the total. */
export function added(total: Tensor | null, gradient: Tensor, input: Tensor): Tensor {
  if (total === null) return gradient.view(input.shape, "backward").keep();
  let sum = total;
  if (total.storage.owners > 1) {
    sum = copyOf(total).keep();
    total.dispose();
  }
  accumulate(sum.storage.writable(), gradient.memory, sum.size, sum.dtype); // a rule may have given what the host wrote
  return sum;
}

export function copyOf(x: Tensor): Tensor {
  const copy = Tensor.empty(x.shape, x.dtype, "backward");
  methods.assign(copy, x);
  return copy;
}

/**
 * Adds a gradient to a leaf's `.grad`. The first one becomes `.grad` without a copy if it is about to be freed (`isFreed`) and nobody else owns
 * its storage.
 */
export function addToLeaf(leaf: Tensor, gradient: Tensor, isFreed: boolean): void {
  if (leaf.grad) {
    // twice the same tensor: x + x
    using same = leaf.grad.storage === gradient.storage ? copyOf(gradient) : null;
    accumulate(leaf.grad.storage.writable(), (same ?? gradient).memory, leaf.size, leaf.dtype);
    return;
  }
  const home = leaf.storage.gradientHome;
  if (home && gradient.storage.memory !== home) {
    freeHome(leaf);
    leaf.grad = Tensor.owned(new Storage(home, true), leaf.shape, leaf.dtype, "backward");
    methods.assign(leaf.grad, gradient);
  } else {
    // another leaf's, dOutput's, a view's or kept by the rule: a copy, so that in-place changes stay this leaf's
    const isOurs = isFreed && gradient.storage.owners === 1 && !gradient.storage.isUnit;
    leaf.grad = isOurs ? gradient.view(leaf.shape, "backward") : copyOf(gradient);
  }
}

/** The gradient 1 that `backward()` of a scalar starts with. */
export function unit(loss: Tensor): Tensor {
  const one = new Uint8Array(ARRAYS[loss.dtype].of(1).buffer);
  const storage = new Storage(gpu().queue.upload(one, false, "unit"));
  storage.isUnit = true;
  return Tensor.owned(storage, loss.shape, loss.dtype, "backward");
}
