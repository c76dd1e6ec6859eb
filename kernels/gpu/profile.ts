import { checkFunction } from "../check.ts";
import { gpu } from "./gpu.ts";

/** The time of one kernel over all its launches. */
export interface KernelTime {
  /** The kernel's name. */
  name: string;
  /** How often it ran. */
  launches: number;
  /** Time on the GPU, in milliseconds. */
  milliseconds: number;
}

/** The result of `profile`. */
export interface Profile<T> {
  /** What the function returned. */
  result: T;
  /** The kernels, the slowest first. */
  kernels: KernelTime[];
  /** The same as a table of text. */
  table: string;
  /** Every launch for Chrome's trace viewer: write it to a file as JSON, open it in chrome://tracing or ui.perfetto.dev. */
  trace: { traceEvents: { name: string; ph: "X"; ts: number; dur: number; pid: number; tid: number }[] };
}

const LAUNCHES = 2048; // a query set holds at most 4,096 timestamps

/**
 * Runs `fn`, which may be async, and measures the GPU time of each of its kernel launches with timestamps at start and end. Meanwhile every launch is a pass
 * of its own: the whole takes longer than otherwise, the kernels themselves do not.
 *
 * Throws an Error if the adapter has no timestamps (`(await init()).timestamps` tells) or another profile is being taken.
 *
 * @example
 * ```ts
 * import { init, matmul, profile, randn } from "@limbeck/limbeck";
 *
 * const { timestamps } = await init();
 * if (timestamps) {
 *   const { table } = await profile(() => matmul(randn([64, 64]), randn([64, 64])).softmax());
 *   console.log(table);
 * }
 * ```
 */
export async function profile<T>(fn: () => T | Promise<T>): Promise<Profile<T>> {
  checkFunction("profile", "fn", fn);
  const { device, info, queue, errors } = gpu();
  if (!info.timestamps) throw new Error("profile: this adapter has no timestamp-query");
  if (queue.timestamps) throw new Error("profile: a profile is being taken already");
  const names: string[] = [], sets: GPUQuerySet[] = [];
  let result: T;
  queue.submit();
  queue.timestamps = (name) => {
    const at = names.push(name) - 1, slot = 2 * (at % LAUNCHES);
    if (slot === 0) sets.push(device.createQuerySet({ type: "timestamp", count: 2 * LAUNCHES }));
    return { querySet: sets.at(-1)!, beginningOfPassWriteIndex: slot, endOfPassWriteIndex: slot + 1 };
  };
  try {
    result = await fn();
    queue.submit();
    await errors.settle(); // some drivers wait forever for timestamps of a batch that failed
  } catch (error) {
    queue.submit();
    for (const set of sets) set.destroy();
    throw error;
  } finally {
    queue.timestamps = null;
  }
  const times: bigint[] = [];
  for (const [i, set] of sets.entries()) {
    const count = 2 * Math.min(LAUNCHES, names.length - i * LAUNCHES);
    times.push(...await readTimestamps(set, count));
    set.destroy();
  }
  await errors.settle();

  const totals = new Map<string, KernelTime>();
  const traceEvents = names.map((name, i) => {
    const [start, end] = [times[2 * i], times[2 * i + 1]].map((t) => Number(t - times[0]) / 1000);
    const total = totals.get(name) ?? { name, launches: 0, milliseconds: 0 };
    totals.set(name, { name, launches: total.launches + 1, milliseconds: total.milliseconds + (end - start) / 1000 });
    return { name, ph: "X" as const, ts: start, dur: end - start, pid: 0, tid: 0 };
  });
  const kernels = [...totals.values()].sort((a, b) => b.milliseconds - a.milliseconds);
  return { result, kernels, table: tabulate(kernels), trace: { traceEvents } };
}

/** The first timestamps of a set, in nanoseconds, after everything encoded so far has run. */
export async function readTimestamps(set: GPUQuerySet, count: number): Promise<BigUint64Array> {
  const { device, queue, pool } = gpu();
  const resolved = device.createBuffer({ size: 8 * count, usage: 0x200 | 0x4 }); // QUERY_RESOLVE | COPY_SRC
  const memory = pool.take(8 * count);
  queue.encode((encoder) => {
    encoder.resolveQuerySet(set, 0, count, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, memory.buffer, memory.offset, 8 * count);
  });
  const times = new BigUint64Array(await queue.read(memory, 8 * count));
  memory.free();
  resolved.destroy();
  return times;
}

function tabulate(kernels: KernelTime[]): string {
  const whole = kernels.reduce((sum, { milliseconds }) => sum + milliseconds, 0);
  const rows = kernels.map(({ name, launches, milliseconds }) => [
    name,
    String(launches),
    milliseconds.toFixed(3),
    `${(100 * milliseconds / (whole || 1)).toFixed(1)} %`,
  ]);
  const table = [["kernel", "launches", "ms", "share"], ...rows, ["all", "", whole.toFixed(3), ""]];
  const widths = table[0].map((_, c) => Math.max(...table.map((row) => row[c].length)));
  return table.map((row) =>
    row.map((cell, c) => c === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[c])).join("  ").trimEnd()
  ).join("\n");
}
