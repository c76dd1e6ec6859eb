import { DeviceErrors, type GpuInfo, type InitOptions, openDevice, subgroupDirective } from "./device.ts";
import { type Counters, Pool } from "./memory.ts";
import { Queue } from "./queue.ts";
import { checkNumber } from "../check.ts";

/** The open device with everything that belongs to it. */
export interface Gpu {
  device: GPUDevice;
  info: GpuInfo;
  pool: Pool;
  queue: Queue;
  errors: DeviceErrors;
  counters: Counters;
  /** What shaders that use subgroups begin with. */
  subgroupDirective: string;
  ownsDevice: boolean;
}

let current: Gpu | null = null;
let starting: Promise<GpuInfo> | null = null;

/** The open device; throws where `init()` has not run. */
export function gpu(): Gpu {
  if (current === null) throw new Error("limbeck: call `await init()` before the first tensor");
  if (current.errors.lost !== null) current.errors.raise();
  return current;
}

/**
 * Opens the GPU. Call it once, before the first tensor; a second call returns the same until `dispose()` or device loss.
 *
 * It asks the adapter for its full limits and, where present, for `timestamp-query` and `shader-f16`.
 * Throws an Error that says what to install where there is no adapter, a RangeError for a feature that the adapter lacks.
 *
 * @example
 * ```ts
 * import { init } from "@limbeck/limbeck";
 *
 * const info = await init();
 * console.log(info.adapter);
 * ```
 */
export function init(options: InitOptions = {}): Promise<GpuInfo> {
  if (current && current.errors.lost === null) return Promise.resolve(current.info);
  return starting ??= start(options).finally(() => starting = null);
}

async function start(options: InitOptions): Promise<GpuInfo> {
  const limit = options?.memoryLimit ?? Infinity;
  if (limit !== Infinity) checkNumber("init", "memoryLimit", limit, { above: 0 });
  const { device, info } = await openDevice(options);
  const directive = await subgroupDirective(device);
  info.subgroups = directive !== null;
  const counters: Counters = {
    liveTensors: 0,
    liveBytes: 0,
    pooledBytes: 0,
    peakBytes: 0,
    buffersCreated: 0,
    bindGroupsCreated: 0,
    dispatches: 0,
    submits: 0,
  };
  const errors = new DeviceErrors(device);
  const queue: Queue = new Queue(device, () => pool, counters, errors);
  const pool = new Pool(device, counters, limit, () => queue.forget());
  current = {
    device,
    info,
    pool,
    queue,
    errors,
    counters,
    subgroupDirective: directive ?? "",
    ownsDevice: !options.device,
  };
  return info;
}

/** Ends the engine: frees its GPU memory and, unless it was handed in, destroys the device. Tensors made before are gone. */
export async function dispose(): Promise<void> {
  const ending = current;
  current = null;
  if (!ending) return;
  if (ending.errors.lost === null) {
    ending.queue.destroy();
    ending.pool.trim();
    if (ending.ownsDevice) ending.device.destroy();
  }
  await Promise.resolve();
}

/** Submits everything that was encoded so far and throws what the device has reported; does not wait for the results. */
export async function flush(): Promise<void> {
  const { queue, errors } = gpu();
  queue.submit();
  await errors.settle();
}

/** A snapshot of the engine's counters: tensors and bytes alive, bytes waiting in the pool, and what was created and dispatched since `init`. */
export function stats(): Counters {
  return { ...gpu().counters };
}
