/**
 * The report's measurements: GPU time from timestamps, the machine's two limits, and peak memory.
 *
 * @module
 */

import { defineKernel, type KernelTime, ones, profile, Scope, zeros } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { max, median, min, sum } from "d3-array";
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
  /** The GPU time of its kernels, a median over the repetitions. */
  milliseconds: number;
  /** The wall-clock time per step, over many consecutive steps, until the last one is done. */
  wall: number;
  /** The number of kernels launched in a step, and the time of each by name, the slowest first. */
  launches: number;
  kernels: KernelTime[];
}

/**
 * Times steps: each runs until the GPU is warm, and is then timed by the wall clock; after that all take turns with timestamps around each kernel, so that a
 * temporarily slow machine does not change their ratios.
 */
export async function time(pace: Pace, ...steps: (() => void)[]): Promise<Timing[]> {
  const run = async (step: () => void, times: number) => {
    const start = performance.now();
    for (let i = 0; i < times; i++) step();
    await finish();
    return performance.now() - start;
  };
  const { counters } = gpu(), launches: number[] = [], walls: number[] = [], turns: number[] = [];
  for (const step of steps) {
    await run(step, 1); // compiles
    let runs = 1, once = await run(step, 1);
    while (runs * once < pace.warmUp) {
      runs *= 2;
      once = await run(step, runs) / runs;
    }
    const times = Math.min(pace.most, Math.max(pace.least, Math.round(pace.measured / once)));
    walls.push(await run(step, times) / times);
    const before = counters.dispatches;
    step();
    launches.push(counters.dispatches - before);
    turns.push(times);
  }
  const times = Math.max(...turns), skipped = Math.ceil(times / 5); // the profile's own start is cold again
  const { trace: { traceEvents } } = await profile(() => {
    for (let i = 0; i < skipped + times; i++) for (const step of steps) step();
  });
  const each = sum(launches);
  if (traceEvents.length !== (skipped + times) * each) {
    throw new Error(`a step launches a different number of kernels each time`);
  }
  const total = (events: { dur: number }[]) => sum(events, ({ dur }) => dur) / 1000;
  return steps.map((_, s) => {
    const first = sum(launches.slice(0, s));
    const own = Array.from({ length: times }, (_, i) => {
      const from = (skipped + i) * each + first;
      return traceEvents.slice(from, from + launches[s]);
    });
    const kernels = [...new Set(own[0].map(({ name }) => name))].map((name) => {
      const named = own.map((events) => events.filter((event) => event.name === name));
      return { name, launches: named[0].length, milliseconds: median(named, total)! };
    });
    kernels.sort((a, b) => b.milliseconds - a.milliseconds);
    return { milliseconds: median(own, total)!, wall: walls[s], launches: launches[s], kernels };
  });
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
  const times = Math.min(pace.most, Math.max(pace.least, Math.round(pace.measured / min(kernelTimes)!)));
  const copyBufferToBuffer = rate(await timeCopies(from.memory.buffer, to.memory.buffer, bytes, times));
  return { bytes, copyBufferToBuffer, vec4Kernel, best: max([copyBufferToBuffer, vec4Kernel])! };
}

/** Median milliseconds of copyBufferToBuffer, from timestamps in empty passes before and after it. */
async function timeCopies(from: GPUBuffer, to: GPUBuffer, bytes: number, times: number): Promise<number> {
  const { device, queue } = gpu(), count = 2 * times;
  const querySet = device.createQuerySet({ type: "timestamp", count });
  queue.encode((encoder) => {
    const stamp = (index: number) =>
      encoder.beginComputePass({ timestampWrites: { querySet, beginningOfPassWriteIndex: index } }).end();
    for (let i = 0; i < times; i++) {
      stamp(2 * i);
      encoder.copyBufferToBuffer(from, 0, to, 0, bytes);
      stamp(2 * i + 1);
    }
  });
  const stamps = await readTimestamps(querySet, count);
  querySet.destroy();
  return median(Array.from({ length: times }, (_, i) => Number(stamps[2 * i + 1] - stamps[2 * i]) / 1e6))!;
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

/** Milliseconds of a launch that does almost nothing; it is part of every time. */
export async function measureLaunch(pace: Pace): Promise<number> {
  using _scope = new Scope();
  const y = zeros([1]);
  return (await time(pace, () => empty.run({ y: y.memory }, {}, 1)))[0].milliseconds;
}
