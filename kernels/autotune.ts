/** `init`, and the measurement of the numbers that differ between adapters: how rows are walked, and how long each tile of matrix products takes. */
import { crossEntropyRows } from "./cross_entropy.ts";
import { divergenceRows } from "./divergence.ts";
import type { GpuInfo, InitOptions } from "./gpu/device.ts";
import { gpu, open } from "./gpu/gpu.ts";
import type { Memory } from "./gpu/memory.ts";
import { profile } from "./gpu/profile.ts";
import { checkTuning, overrides, type RowLimits, type Tuning } from "./gpu/tuning.ts";
import { matmul } from "./matmul.ts";
import { expectedOf, fittingTiles } from "./tiles.ts";
import { fill, random } from "./random.ts";

/**
 * Opens the GPU. Call it once, before the first tensor. A second call returns the same info until `dispose()` or device loss.
 *
 * It requests the adapter's full limits and, if available, `timestamp-query` and `shader-f16`. With `autotune: true` it measures, the first time on an adapter,
 * which numbers of threads and registers and which tiles are fast there (about 10 s), unless a memoryLimit below 2 GiB (8 MiB on a software adapter) leaves too
 * little memory for that. Throws an Error that says what to install if there is no adapter, a RangeError for a feature that the adapter lacks, a TypeError for
 * a wrong option.
 *
 * @example
 * ```ts
 * import { init } from "@limbeck/limbeck";
 *
 * const info = await init();
 * console.log(info.adapter);
 * ```
 */
export async function init(options: InitOptions = {}): Promise<GpuInfo> {
  return await open(options, async () => {
    const { info } = gpu(), { autotune = false } = options;
    info.tuning = autotune === true ? stored() ?? await tune() : autotune || null;
  });
}

/** The key in `localStorage`. */
const place = () => {
  const { adapter, limits: { maxComputeInvocationsPerWorkgroup: threads, maxComputeWorkgroupStorageSize: bytes } } =
    gpu().info;
  return `limbeck tuning 3: ${adapter}, ${threads} threads, ${bytes} bytes`;
};

/** What was measured for this adapter before, if `localStorage` has it. */
function stored(): Tuning | null {
  try {
    const tuning = JSON.parse(localStorage.getItem(place())!);
    checkTuning("autotune", tuning);
    return tuning;
  } catch {
    return null; // no storage, or nothing usable in it
  }
}

function store(tuning: Tuning): Tuning {
  try {
    localStorage.setItem(place(), JSON.stringify(tuning));
  } catch {
    // no storage: measured again the next time
  }
  return tuning;
}

/** Widths of rows: some rows fit into registers as a whole, some in part. */
const WIDTHS = [4096, 8192, 16384, 32768, 65536];

/** Measures the tuning; null if the memory limit leaves too little to measure with. */
async function tune(): Promise<Tuning | null> {
  const { counters, pool, info, queue } = gpu(), { isSoftware, limits: { maxStorageBufferBindingSize: most } } = info;
  const bytes = Math.min(isSoftware ? 2 ** 20 : 2 ** 28, most);
  if (pool.limit < 8 * bytes) return null;
  const size = 2 ** Math.floor(Math.log2(bytes / 4)); // of a matrix
  const taken: Memory[] = [];
  const take = (count: number) => {
    const memory = pool.take(4 * count, "init: autotune");
    taken.push(memory);
    return memory;
  };
  try {
    const [student, teacher, dStudent] = [take(size), take(size), take(size)], rows = Math.ceil(size / WIDTHS[0]);
    const [labels, counts, loss] = [take(rows), take(256), take(rows)];
    for (const [op, y] of [student, teacher].entries()) {
      random("normal", "f32", { y, state: labels }, { op, size, low: 0, count: 0 });
    }
    fill(labels, 0, rows, "i32");
    const common = { mean: true, ignoreIndex: -100, temperature: 1, firstRow: 0, allRows: rows };
    const numbers = (columns: number) => ({ ...common, rows: Math.floor(size / columns), columns });
    const shared = { counts, upstream: null, loss };
    const ofOne = { ...shared, logits: student, target: labels, weight: null, extras: null, dLogits: dStudent };
    const one = await tuneRows((columns) =>
      crossEntropyRows("f32", "index", ofOne, { ...numbers(columns), smoothing: 0, zLoss: 0, softcap: 0 })
    );
    const ofTwo = { ...shared, student, teacher, labels: null, parts: null, dStudent, dTeacher: null };
    const factors = { drop: false, beta: 0.5, ceFactor: 0, divergenceFactor: 1 };
    const two = await tuneRows((columns) =>
      divergenceRows("jsd", "f32", "f32", ofTwo, { ...numbers(columns), ...factors })
    );
    return store({ rows: { one, two }, tiles: await tuneTiles([student, teacher, dStudent], size) });
  } finally {
    info.tuning = null;
    overrides.tile = overrides.pieces = null;
    queue.submit();
    for (const memory of taken) memory.free();
    pool.trim();
    counters.peakBytes = counters.liveBytes;
  }
}

/** The limits under which `walk` takes the least time over all widths. */
async function tuneRows(walk: (columns: number) => void): Promise<RowLimits> {
  const { info } = gpu(), { isSoftware, subgroupSize, limits: { maxComputeInvocationsPerWorkgroup: fit } } = info;
  const numbers = isSoftware // a CPU has no memory for rows that is faster than its cache
    ? [[subgroupSize || 16, 0], [32, 0], [64, 0]]
    : [[256, 0], [256, 8], [512, 4], [512, 8], [512, 12], [1024, 0], [1024, 4], [1024, 6], [1024, 8]];
  const candidates: RowLimits[] = numbers.filter(([threads]) => threads <= fit).map(([threads, quads]) => ({
    threads,
    quads,
  }));
  const widths = isSoftware ? WIDTHS.slice(0, 1) : WIDTHS;
  const runs = candidates.flatMap((limits) =>
    widths.map((columns) => () => {
      info.tuning = { rows: { one: limits, two: limits }, tiles: [] };
      walk(columns);
    })
  );
  const times = await measure(runs);
  // each width has the same weight
  const totals = candidates.map((_, i) =>
    times.slice(i * widths.length, (i + 1) * widths.length).reduce((a, b) => a + b)
  );
  return candidates[totals.indexOf(Math.min(...totals))];
}

/** The time of each tile divided by the expected time: the geometric mean over a product of many tiles and one of few. */
async function tuneTiles([a, b, c]: Memory[], size: number): Promise<number[]> {
  const tiles = fittingTiles().filter((tile) => expectedOf(tile, 64, 64, 64) < Infinity);
  const factors: number[] = new Array(Math.max(...tiles) + 1).fill(1);
  const whole = Math.min(2048, 2 ** Math.floor(Math.log2(size) / 2)), sides = [whole, whole / 4];
  const operand = (memory: Memory, side: number) => ({
    memory,
    element: "f32" as const,
    batch: 0,
    row: side,
    column: 1,
  });
  const runs = tiles.flatMap((tile) =>
    sides.map((side) => () => {
      overrides.tile = tile;
      overrides.pieces = 1;
      const operands = { a: operand(a, side), b: operand(b, side), c: { memory: c, element: "f32" as const } };
      matmul({ ...operands, rows: side, columns: side, depth: side });
    })
  );
  const times = await measure(runs);
  for (const [i, tile] of tiles.entries()) {
    const ratios = sides.map((side, j) => 1000 * times[i * sides.length + j] / expectedOf(tile, side, side, side));
    factors[tile] = Math.exp(ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / ratios.length);
  }
  return factors;
}

/**
 * Milliseconds of each run, which is one launch. The runs take turns for about 300 ms of work, and the least time in the last third of it counts: before that
 * kernels compile and an idle GPU raises its clock.
 */
async function measure(runs: (() => void)[]): Promise<number[]> {
  const { device, info: { timestamps }, queue } = gpu();
  const round = async (times: number) => {
    if (timestamps) {
      const { trace } = await profile(() => {
        for (let i = 0; i < times; i++) for (const run of runs) run();
      });
      return trace.traceEvents.map(({ dur }) => dur / 1000);
    }
    const all: number[] = [];
    for (let i = 0; i < times * runs.length; i++) { // a wait for each run, whose time is included
      const start = performance.now();
      runs[i % runs.length]();
      queue.submit();
      await device.queue.onSubmittedWorkDone();
      all.push(performance.now() - start);
    }
    return all;
  };
  await round(1);
  const once = (await round(1)).reduce((a, b) => a + b, 0);
  const turns = 3 * Math.ceil(Math.min(Math.max(100 / once, 1), 100)), all = await round(turns);
  return runs.map((_, i) => Math.min(...all.filter((_, n) => n % runs.length === i).slice(-turns / 3)));
}
