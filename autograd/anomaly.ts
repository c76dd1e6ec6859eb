/**
 * Anomaly detection, `init({ debug: true })`: the GPU searches the results of ops for NaN and infinity. The engine's next await throws an error that names the
 * first op whose result has one.
 */
import { findNonFinite } from "../kernels/anomaly.ts";
import type { Gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { isFloat } from "./storage.ts";
import type { Tensor } from "./tensor.ts";

/** The checks of a device. */
interface Watch {
  /** One number on the GPU: that of the first check that found something, or 0. */
  found: Memory;
  /** Messages for the checks since the last await, by number. */
  checks: Map<number, string>;
  /** The number of the last check. */
  last: number;
  /** Results of ops, with the versions that were checked when the ops had made them. */
  made: WeakMap<Tensor, number>;
}

const watches = new WeakMap<Gpu, Watch>();

/** The checks of a device; the first call sets them up. */
export function watchOf(gpu: Gpu): Watch {
  let watch = watches.get(gpu);
  if (!watch) {
    watch = { found: clean(gpu), checks: new Map(), last: 0, made: new WeakMap() };
    watches.set(gpu, watch);
    gpu.errors.check = () => report(gpu, watch!);
  }
  return watch;
}

const clean = (gpu: Gpu) => gpu.queue.upload(new Uint8Array(4), true, { purpose: "anomaly" });

function check(watch: Watch, x: Tensor, what: string): void {
  if (!isFloat(x.dtype)) return;
  watch.checks.set(++watch.last, what);
  findNonFinite(x.memory, x.dtype, x.size, watch.found, watch.last);
}

const text = (x: Tensor) => `(shape [${x.shape.join(", ")}])`;

/** Checks the result of an op, and before it the inputs that were not checked as results: they come from the host, an optimizer or an in-place write. */
export function checkForward(op: string, inputs: readonly Tensor[], output: Tensor, step: number): void {
  const { gpu } = output.storage, watch = watchOf(gpu), where = place(gpu, output);
  inputs.forEach((x, i) => {
    if (watch.made.get(x) === x.storage.version) return;
    check(watch, x, `${op}: input ${i} ${text(x)} held a NaN or an infinity before it, in step ${step}${where}`);
  });
  check(watch, output, `${op}: the forward pass of step ${step} made a NaN or an infinity ${text(output)}${where}`);
  watch.made.set(output, output.storage.version);
}

/** Checks the gradients that an op's backward rule returned. */
export function checkBackward(
  gpu: Gpu,
  op: string,
  output: Tensor,
  gradients: readonly (Tensor | null)[],
  step: number,
): void {
  const watch = watchOf(gpu), where = place(gpu, output);
  gradients.forEach((x, i) => {
    if (!x) return;
    const what = `${op}: the backward pass of step ${step} made a NaN or an infinity in the gradient of input ${i}`;
    check(watch, x, `${what} ${text(x)}${where}`);
  });
}

function place({ ledger }: Gpu, output: Tensor): string {
  const made = ledger?.get(output);
  return made?.place ? `; the op was called ${made.place}` : "";
}

async function report(gpu: Gpu, watch: Watch): Promise<void> {
  if (watch.checks.size === 0) return;
  const { checks, found } = watch;
  watch.checks = new Map(); // first, since the read below leads here again
  const [number] = new Uint32Array(await gpu.queue.read(found, 4));
  if (number === 0) return;
  found.free();
  watch.found = clean(gpu);
  throw new Error(`debug: ${checks.get(number) ?? "an op made a NaN or an infinity"}`);
}
