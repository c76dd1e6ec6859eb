import {
  checkInitOptions,
  type GpuInfo,
  hasTensorCores,
  type InitOptions,
  openDevice,
  subgroupDirective,
} from "./device.ts";
import { DeviceErrors } from "./errors.ts";
import type { Counters, Pool } from "./memory.ts";
import { Queue } from "./queue.ts";

/** The open device with everything that belongs to it. */
export interface Gpu {
  device: GPUDevice;
  info: GpuInfo;
  pool: Pool;
  queue: Queue;
  errors: DeviceErrors;
  counters: Counters;
  /** The directive that shaders with subgroups start with; empty if the compiler needs none. */
  subgroupDirective: string;
  /** The options that `init` was given. */
  options: InitOptions;
  /** Whether results are checked and tensors remember where they were made. */
  debug: boolean;
  /** How many tensors belong to no scope. */
  unscoped: number;
  /** The live tensors and what made each of them: only in debug mode and while `expectNoLeaks` runs. */
  ledger: Map<object, Made> | null;
}

/** What made a tensor. */
export interface Made {
  /** The op. */
  op: string;
  /** The line of the program that called it; null unless in debug mode. */
  place: string | null;
}

/** The defaults of `init`. */
const DEFAULTS: InitOptions = { memoryLimit: Infinity, debug: false, autotune: false, features: [] };

let current: Gpu | null = null;
let starting: Promise<GpuInfo> | null = null;

/** The open device; throws if `init()` has not run. */
export function gpu(): Gpu {
  if (current === null) throw new Error("limbeck: call `await init()` before the first tensor");
  if (current.errors.lost !== null) current.errors.raise();
  return current;
}

/** The open device, or null if there is none or it was lost. */
export function openGpu(): Gpu | null {
  return current?.errors.lost === null ? current : null;
}

/** Functions that are called when a device ends: by `dispose()`, or when an `init()` replaces a lost one. */
export const atEnd: ((ended: Gpu) => void)[] = [];

/** Opens the device unless one is open. `prepare` runs before anyone gets it. */
export async function open(options: InitOptions, prepare: () => Promise<void>): Promise<GpuInfo> {
  checkInitOptions(options);
  if (current && !starting) await current.errors.news();
  while (starting) await starting.catch(() => {}); // another call is opening it; that call reports its own errors
  if (current && current.errors.lost === null) {
    const { options: first, info } = current, names = Object.keys(options) as (keyof InitOptions)[];
    const valueOf = (o: InitOptions, n: keyof InitOptions) => {
      const value = o[n] ?? DEFAULTS[n];
      return n === "features" || n === "autotune" ? JSON.stringify(value) : value; // the same with the same content
    };
    const other = names.filter((n) => valueOf(first, n) !== valueOf(options, n));
    if (other.length > 0) {
      console.warn(`limbeck: init() was called before: ${other.join(", ")} changes nothing until dispose()`);
    }
    return info;
  }
  starting = start(options, prepare);
  return await starting.finally(() => starting = null);
}

async function start(options: InitOptions, prepare: () => Promise<void>): Promise<GpuInfo> {
  const { device, info } = await openDevice(options);
  const errors = new DeviceErrors(device);
  await errors.news();
  if (errors.lost !== null) {
    errors.forget();
    throw new Error(`init: the device was lost before it could be used (${errors.lost})`);
  }
  const directive = await subgroupDirective(device);
  info.subgroups = directive !== null;
  if (info.subgroups) info.subgroupSize = device.adapterInfo?.subgroupMinSize ?? 0;
  info.tensorCores = await hasTensorCores(device);
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
  const queue = new Queue(device, counters, errors, options.memoryLimit ?? Infinity);
  await dispose().catch(() => {}); // of a lost device, which this one replaces
  current = {
    device,
    info,
    pool: queue.pool,
    queue,
    errors,
    counters,
    subgroupDirective: directive ?? "",
    options,
    debug: options.debug ?? false,
    unscoped: 0,
    ledger: options.debug ? new Map() : null,
  };
  try {
    await prepare();
  } catch (error) {
    await dispose();
    throw error;
  }
  return info;
}

/**
 * Ends the engine: closes open tapes and scopes, frees the GPU memory and, unless the device was passed to `init`, destroys it. Tensors made before can no
 * longer be used. Throws errors that the device has reported and no call has thrown yet.
 *
 * @example
 * ```ts
 * import { dispose, init } from "@limbeck/limbeck";
 *
 * await init();
 * await dispose(); // a later init() opens the GPU again
 * ```
 */
export async function dispose(): Promise<void> {
  const ending = current;
  current = null;
  if (!ending) return;
  for (const end of atEnd) end(ending);
  if (ending.errors.lost !== null) {
    ending.errors.forget();
    return ending.errors.end();
  }
  const { queue, pool, errors, device, options } = ending;
  try {
    queue.submit();
    await errors.settle();
  } catch (error) {
    if (!errors.lost?.startsWith("destroyed")) throw error; // the caller, whose device it is, has destroyed it already
  } finally {
    errors.forget();
    if (errors.lost === null) {
      queue.destroy();
      pool.destroy();
      if (!options.device) device.destroy();
    }
  }
}

/**
 * Submits everything encoded so far and throws errors that the device has reported. It does not wait for the results.
 *
 * @example
 * ```ts
 * import { flush, init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const y = tensor([1, 2]).mul(2);
 * await flush(); // the GPU starts; the host continues
 * console.log(await y.array()); // [2, 4]
 * ```
 */
export async function flush(): Promise<void> {
  const { queue, errors } = gpu();
  queue.submit();
  await errors.news();
  await errors.settle();
}
