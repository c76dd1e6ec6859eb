/**
 * The report's measurements: GPU time from timestamps, the machine's two limits, and peak memory.
 *
 * @module
 */

import { defineKernel, type KernelTime, ones, profile, Scope, zeros } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { max, median, min, range } from "d3-array";
import { gpu } from "../kernels/gpu/gpu.ts";
import { readTimestamps } from "../kernels/gpu/profile.ts";
import { finish } from "./support.ts";

/** How long measurements take, in milliseconds. */
export interface Pace {
  /** Before the measurement: a GPU needs some tens of launches to reach its clock rates. */
  warmUp: number;
  /** Of the measurement, with the least and the most repetitions. */
  measured: number;
  least: number;
  most: number;
}

/** The time of a step. */
export interface Timing {
  /** The GPU time per step of a few consecutive steps, between two timestamps; a median. */
  milliseconds: number;
  /** The wall-clock time per step, over many consecutive steps, until the last one is done. */
  wall: number;
}

/** The GPU milliseconds of each run, from a timestamp before it and one after it. */
async function timestamps(runs: (() => void)[]): Promise<number[]> {
  const { device, queue } = gpu(), count = 2 * runs.length;
  const querySet = device.createQuerySet({ type: "timestamp", count });
  const stamp = (index: number) =>
    queue.encode((encoder) =>
      encoder.beginComputePass({ timestampWrites: { querySet, beginningOfPassWriteIndex: index } }).end()
    );
  for (const [i, run] of runs.entries()) {
    queue.submit(); // so that the GPU does not wait for the host between the timestamps
    stamp(2 * i);
    run();
    stamp(2 * i + 1);
  }
  const stamps = await readTimestamps(querySet, count);
  querySet.destroy();
  return runs.map((_, i) => Number(stamps[2 * i + 1] - stamps[2 * i]) / 1e6);
}

// steps between two timestamps: so many that the timestamps' own time (10 µs on an H100) does not matter, and so few that they are in one submit
const TOGETHER = 10, ENOUGH = 10;

/** Times steps: each runs until the GPU is warm, and is then timed by the wall clock; after that all take turns between timestamps. */
export async function time(pace: Pace, ...steps: (() => void)[]): Promise<Timing[]> {
  const run = async (step: () => void, times: number) => {
    const start = performance.now();
    for (let i = 0; i < times; i++) step();
    await finish();
    return performance.now() - start;
  };
  const walls: number[] = [], together: number[] = [];
  let turns = 1;
  for (const step of steps) {
    await run(step, 1); // compiles
    let runs = 1, once = await run(step, 1);
    while (runs * once < pace.warmUp) {
      runs *= 2;
      once = await run(step, runs) / runs;
    }
    const times = Math.min(pace.most, Math.max(pace.least, Math.round(pace.measured / once)));
    walls.push(await atSpeed(() => run(step, times)) / times);
    together.push(Math.max(1, Math.min(times, TOGETHER, Math.round(ENOUGH / once))));
    turns = Math.max(turns, Math.ceil(times / together.at(-1)!), pace.least);
  }
  const repeated = steps.map((step, i) => () => {
    for (let j = 0; j < together[i]; j++) step();
  });
  const found: number[][] = [];
  for (let i = 0; i < turns; i++) found.push(await atSpeed(() => timestamps(repeated)));
  return steps.map((_, i) => ({ milliseconds: median(found, (times) => times[i] / together[i])!, wall: walls[i] }));
}

let fastest = Infinity;

/**
 * The result of a measurement during which the GPU ran at its usual clock rate. Now and then it does not, for a second or two (an H100 at 0.7 GHz instead of
 * 1.98): then some arithmetic behind the measurement takes longer than ever before, and the measurement is repeated. Software's times vary more than that.
 */
async function atSpeed<T>(measure: () => Promise<T>): Promise<T> {
  if (gpu().info.isSoftware) return measure();
  using _scope = new Scope();
  const workgroups = 128, y = zeros([256 * workgroups]);
  for (let tries = 1;; tries++) {
    const result = await measure();
    const [time] = await timestamps([() => multiplyAdd.run({ y: y.memory }, { x: 0.5 }, workgroups)]);
    fastest = Math.min(fastest, time);
    if (time < 1.2 * fastest || tries === 50) return result;
  }
}

/** The GPU time of a step's kernels in passes of their own, a mean over so many steps; the slowest kernel first. */
export async function timeKernels(step: () => void, steps: number): Promise<KernelTime[]> {
  const { kernels } = await profile(() => {
    for (let i = 0; i < steps; i++) step();
  });
  return kernels.map(({ name, launches, milliseconds }) => ({
    name,
    launches: launches / steps,
    milliseconds: milliseconds / steps,
  }));
}

/** The peak of live bytes during a step, minus the live bytes before it. */
export function extraBytes(step: () => void): number {
  const { counters } = gpu(), before = counters.liveBytes;
  counters.peakBytes = before;
  step();
  return counters.peakBytes - before;
}

/** The rates of two ways to copy the same bytes, in bytes per second, with reads and writes counted. */
export interface Bandwidth {
  bytes: number;
  copyBufferToBuffer: number;
  vec4Kernel: number;
  best: number;
}

const VECTORS = [1, 4]; // that a thread copies; which is faster depends on the adapter
const copyKernels = VECTORS.map((vectors) =>
  defineKernel({
    name: "copyVectors",
    buffers: { x: "read vec4f", y: "write vec4f" },
    params: { size: "u32" },
    main: Array.from(
      { length: vectors },
      (_, i) => `{ let i = group * ${256 * vectors}u + ${256 * i}u + lane; if (i < params.size) { y[i] = x[i]; } }`,
    ).join("\n  "),
  })
);

/** Measures the rate of copying `bytes` bytes from one buffer to another. */
export async function measureBandwidth(bytes: number, pace: Pace): Promise<Bandwidth> {
  using _scope = new Scope();
  const from = ones([bytes / 4]), to = zeros([bytes / 4]);
  const rate = (milliseconds: number) => 2 * bytes / (milliseconds / 1000);
  const size = bytes / 16, kernelTimes: number[] = [];
  for (const [i, kernel] of copyKernels.entries()) {
    const step = () => kernel.run({ x: from.memory, y: to.memory }, { size }, Math.ceil(size / (256 * VECTORS[i])));
    kernelTimes.push((await time(pace, step))[0].milliseconds);
  }
  const copied = await to.sum().item(); // a sum of ones is exact in f32 blocks up to 2²⁴ and beyond where it is a power of two
  if (Math.abs(copied - bytes / 4) > 1e-6 * bytes) {
    throw new Error(`the copy kernel copied ${copied} of ${bytes / 4} ones`);
  }
  const vec4Kernel = rate(min(kernelTimes)!);
  const copying = () =>
    gpu().queue.encode((encoder) => encoder.copyBufferToBuffer(from.memory.buffer, 0, to.memory.buffer, 0, bytes));
  const times = Math.min(pace.most, Math.max(pace.least, Math.round(pace.measured / min(kernelTimes)!)));
  const copyBufferToBuffer = rate(median(await timestamps(range(times).map(() => copying)))!);
  return { bytes, copyBufferToBuffer, vec4Kernel, best: max([copyBufferToBuffer, vec4Kernel])! };
}

const CHAINS = 8, UNROLLED = 32, ROUNDS = 64; // chains of multiply-adds hide each other's latency
const chains = Array.from({ length: CHAINS }, (_, i) => `a${i}`);
const multiplyAdd = defineKernel({
  name: "multiplyAdd",
  buffers: { y: "write f32" },
  params: { x: "f32" },
  main: `${chains.map((a, i) => `var ${a} = vec4f(f32(lane) + ${i}.0);`).join(" ")}
  let x = vec4f(params.x);
  for (var i = 0u; i < ${ROUNDS}u; i += 1u) {
${Array.from({ length: UNROLLED }, () => `    ${chains.map((a) => `${a} = fma(${a}, x, x);`).join(" ")}`).join("\n")}
  }
  y[thread] = dot(${chains.join(" + ")}, vec4f(1.0));`,
});

/** f32 operations per second of multiply-add chains in registers; a multiply-add counts as two. */
export async function measureArithmetic(workgroups: number, pace: Pace): Promise<number> {
  using _scope = new Scope();
  const y = zeros([256 * workgroups]);
  const [{ milliseconds }] = await time(pace, () => multiplyAdd.run({ y: y.memory }, { x: 0.5 }, workgroups));
  return 2 * 4 * CHAINS * UNROLLED * ROUNDS * 256 * workgroups / (milliseconds / 1000);
}

const empty = defineKernel({ name: "empty", buffers: { y: "write f32" }, main: "if (thread == 0u) { y[0] = 0.0; }" });

/** Milliseconds of a launch, among others, that does almost nothing; it is part of every time. */
export async function measureLaunch(pace: Pace): Promise<number> {
  using _scope = new Scope();
  const y = zeros([1]);
  return (await time(pace, () => empty.run({ y: y.memory }, {}, 1)))[0].milliseconds;
}
