/** Where gradients are stored and how they are accumulated: in the optimizer's slots if possible, and in place if nobody else uses the sum. */
import { describe } from "../kernels/check.ts";
import { accumulate } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { ARRAYS, Storage } from "./storage.ts";
import { checkShape, checkTensor, Tensor } from "./tensor.ts";

/** Throws unless `gradients`, which a backward rule returned, fit the inputs. */
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

/**
 * An uninitialised gradient; that of a leaf is in the optimizer's slot, if there is one and `.grad` is null. It is not if the rule reads another gradient of
 * that optimizer: one dispatch cannot read and write the same buffer.
 */
export function gradientFor(input: Tensor, isLeaf: boolean, read: readonly Tensor[]): Tensor {
  const home = isLeaf && !input.closed && input.grad === null ? freeHome(input) : null;
  if (!home || read.some((x) => x.storage.memory.buffer === home.buffer)) {
    return Tensor.empty(input.shape, input.dtype, "backward");
  }
  return Tensor.owned(new Storage(home, true), input.shape, input.dtype, "backward");
}

/** The slot where an optimizer wants a leaf's gradient. An earlier gradient that is still in it moves out. */
function freeHome(leaf: Tensor): Memory | null {
  const home = leaf.storage.gradientHome;
  home?.borrower?.vacate();
  return home;
}

/** total + gradient as a tensor that no scope owns; in place if nobody else uses the total. `isOwn`: nobody else needs the gradient. */
export function added(total: Tensor | null, gradient: Tensor, isOwn: boolean): Tensor {
  if (total === null) return (isOwn ? gradient : gradient.sameMemory(gradient.shape, "backward")).keep();
  let sum = total;
  if (total.storage.owners > 1) {
    sum = copyOf(total).keep();
    total.dispose();
  }
  addInto(sum, gradient); // a rule may have returned a tensor from the host
  return sum;
}

/** total += gradient, which may lie in the same buffer: the same tensor twice (x + x), or a gradient in the same optimizer's block. */
function addInto(total: Tensor, gradient: Tensor): void {
  using same = total.memory.buffer === gradient.memory.buffer ? copyOf(gradient) : null;
  accumulate(total.storage.writable(), (same ?? gradient).memory, total.size, total.dtype);
}

/** A copy of a gradient. */
export function copyOf(x: Tensor): Tensor {
  return Tensor.empty(x.shape, x.dtype, "backward").assign(x);
}

/**
 * Adds a gradient to a leaf's `.grad`. The first one becomes `.grad` without a copy if nobody else needs it (`isOwn`), or if it is about to be freed (`isFreed`),
 * and nobody else uses its storage.
 */
export function addToLeaf(leaf: Tensor, gradient: Tensor, isOwn: boolean, isFreed: boolean): void {
  if (leaf.grad) {
    if (leaf.grad.storage.saves > 0) leaf.grad = copyOf(leaf.grad); // the loss contains it
    addInto(leaf.grad, gradient);
    return;
  }
  const home = leaf.storage.gradientHome, { storage } = gradient;
  if (home && storage.memory !== home) {
    freeHome(leaf);
    leaf.grad = Tensor.owned(new Storage(home, true), leaf.shape, leaf.dtype, "backward");
    leaf.grad.assign(gradient);
  } else {
    // a copy if others use it (another leaf, dOutput, a view, the rule), so that in-place changes affect only this leaf
    const isOurs = (isOwn || isFreed) && storage.owners === 1 && !storage.isUnit;
    leaf.grad = !isOurs ? copyOf(gradient) : isOwn ? gradient : gradient.sameMemory(leaf.shape, "backward");
  }
}

/** The gradient 1 that `backward()` of a scalar starts with. */
export function unit(loss: Tensor): Tensor {
  const one = new Uint8Array(ARRAYS[loss.dtype].of(1).buffer);
  const storage = new Storage(gpu().queue.upload(one, false, { purpose: "unit" }));
  storage.isUnit = true;
  return Tensor.owned(storage, loss.shape, loss.dtype, "backward");
}
