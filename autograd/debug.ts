/** Memory debugging: the counters, forgotten tensors, and a check for tests that no tensor is left behind. */
import { checkFunction } from "../kernels/check.ts";
import { type Gpu, gpu, openGpu } from "../kernels/gpu/gpu.ts";
import type { Counters } from "../kernels/gpu/memory.ts";
import { watchOf } from "./anomaly.ts";
import { entries } from "./ledger.ts";
import { BYTES, type DType, DTYPES, type Storage } from "./storage.ts";
import { checkTensor, tensorsIn } from "./tensor.ts";

/** A tensor that was made while no scope was open, and neither kept nor disposed of since. */
export interface ForgottenTensor {
  /** The op that made it. */
  op: string;
  /** The line of the program that called the op. */
  place: string;
  /** Its sizes. */
  shape: readonly number[];
  /** How its elements are stored. */
  dtype: DType;
  /** Bytes of its elements. */
  bytes: number;
}

/** The result of `stats`. */
export interface Stats extends Counters {
  /** With `init({ debug: true })`: live tensors that belong to no scope and were never kept, in the order they were made. */
  forgotten?: ForgottenTensor[];
}

/**
 * A snapshot of the engine's counters: tensors and bytes alive, bytes waiting in the pool, and what was created and dispatched since `init`. With `init({
 * debug: true })` also the forgotten tensors, each with the line that made it. Throws an Error before `init`.
 *
 * @example
 * ```ts
 * import { init, stats, tensor } from "@limbeck/limbeck";
 *
 * await init({ debug: true });
 * const lost = tensor([1, 2]).mul(2); // no scope is open
 * for (const { op, place, bytes } of stats().forgotten ?? []) console.log(op, place, bytes);
 * ```
 */
export function stats(): Stats {
  const open = gpu(), { counters, debug } = open;
  if (!debug) return { ...counters };
  const forgotten = entries(open).filter(([x]) => x.forgotten).map(([x, { op, place }]) => ({
    op,
    place: place ?? "",
    shape: x.shape,
    dtype: x.dtype,
    bytes: x.size * BYTES[x.dtype],
  }));
  return { ...counters, forgotten };
}

/**
 * Resets `stats().peakBytes` to the bytes that are live now. Throws an Error before `init`.
 *
 * @example
 * ```ts
 * import { init, resetPeak, stats, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * zeros([1000]).dispose();
 * resetPeak();
 * console.log(stats().peakBytes === stats().liveBytes); // true
 * ```
 */
export function resetPeak(): void {
  const { counters } = gpu();
  counters.peakBytes = counters.liveBytes;
}

/**
 * Returns the free buffers of the pool to the device. The next allocations make new ones. Throws an Error before `init`.
 *
 * @example
 * ```ts
 * import { init, stats, trimPool, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * zeros([1000]).dispose();
 * trimPool();
 * console.log(stats().pooledBytes); // 0
 * ```
 */
export function trimPool(): void {
  gpu().pool.trim();
}

/** How many `expectNoLeaks` of a device are running. */
const checks = new WeakMap<Gpu, number>();

/**
 * Runs `fn`, which may be async, and throws an Error if tensors or GPU memory that it made are still alive after it, naming the ops (with `init({ debug:
 * true })` also the lines) that made them. Tensors that `fn` returns, also inside arrays and records, are the caller's. Returns what `fn` returns. For
 * tests.
 *
 * Gradients count too: end a training step with `zeroGrad()`, or run it once before.
 *
 * @example
 * ```ts
 * import { expectNoLeaks, init, Scope, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * await expectNoLeaks(async () => {
 *   using _scope = new Scope();
 *   console.log(await tensor([1, 2]).sum().item()); // 3
 * });
 * ```
 */
export function expectNoLeaks<T>(fn: () => T): T {
  checkFunction("expectNoLeaks", "fn", fn);
  const open = gpu(), { counters } = open;
  if (open.debug) watchOf(open); // takes its memory now, so that it does not count as a leak of fn
  const held = () => counters.liveBytes - open.pool.slack; // without the rounding of optimizers' blocks
  const before = held();
  open.ledger ??= new Map();
  checks.set(open, (checks.get(open) ?? 0) + 1);
  const end = () => {
    const left = checks.get(open)! - 1; // async ones may overlap
    checks.set(open, left);
    if (left === 0 && !open.debug) open.ledger = null;
  };
  const old = new Set(entries(open).map(([x]) => x));
  const check = (result: unknown) => {
    if (openGpu() !== open) return; // dispose() freed all
    const returned = tensorsIn(result), made = entries(open).filter(([x]) => !old.has(x));
    for (const x of returned) checkTensor("expectNoLeaks", "what fn returns", x, DTYPES);
    const storages = new Set<Storage>(made.flatMap(([x]) => returned.has(x) ? [x.storage] : []));
    const stayed = made.filter(([x]) => !returned.has(x));
    const grown = held() - before - [...storages].reduce((sum, s) => sum + s.memory.bytes, 0);
    if (stayed.length > 0) {
      const named = stayed.slice(0, 8).map(([x, { op, place }]) =>
        `${op} (shape [${x.shape.join(", ")}])${place ? ` ${place}` : ""}`
      );
      const rest = stayed.length > 8 ? `, and ${stayed.length - 8} more` : "";
      throw new Error(
        `expectNoLeaks: ${stayed.length} tensor${stayed.length > 1 ? "s" : ""} stayed: ${named.join(", ")}${rest}`,
      );
    }
    if (grown > 0) {
      throw new Error(
        `expectNoLeaks: ${grown} bytes stayed that no tensor holds: an optimizer or a Meter was not disposed of`,
      );
    }
  };
  let running = false;
  try {
    const result = fn();
    if (!(result instanceof Promise)) {
      check(result);
      return result;
    }
    running = true;
    return result.then((value) => {
      check(value);
      return value;
    }).finally(end) as T;
  } finally {
    if (!running) end();
  }
}
