/** Fills memory with a constant or with counter-based random numbers. */
import { gpu } from "./gpu/gpu.ts";
import { variants } from "./gpu/kernel.ts";
import { WIDE_PRODUCT } from "./math.ts";
import type { Memory } from "./gpu/memory.ts";
import type { Element } from "./elementwise.ts";

const fillKernel = variants((element: Element) => ({
  name: "fill",
  buffers: { y: `write ${element}` },
  params: { value: element === "f16" ? "f32" : element, size: "u32" },
  main: `if (thread < params.size) { y[thread] = ${element}(params.value); }`,
}));

/** y[i] = value for the first `size` elements, which are all that y holds. */
export function fill(y: Memory, value: number, size: number, element: Element): void {
  gpu().queue.renew(y);
  fillKernel(element).run({ y }, { value, size }, Math.ceil(size / 256));
}

/**
 * pcg4d (Jarzynski & Olano, "Hash Functions for GPU Rendering", 2020): four random words from four counters. The same
 * (seed, step, op, element) gives the same bits on every device, and nothing is stored.
 */
export const PCG4D = `
fn pcg4d(counters: vec4u) -> vec4u {
  var v = counters * 1664525u + 1013904223u;
  v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
  v ^= v >> vec4u(16u);
  v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
  return v;
}
fn unit_(bits: u32) -> f32 { return f32(bits >> 8u) * 5.9604644775390625e-8; } // [0, 1), 24 bits
`;

type Kind = "uniform" | "normal" | "integer";

const randomKernel = variants(({ kind, element }: { kind: Kind; element: Element }) => {
  const value = {
    // only bits that f16 holds exactly: 24 bits could round up to 1
    uniform: element === "f16" ? "f32(bits.x >> 21u) * 4.8828125e-4" : "unit_(bits.x)",
    // Box–Muller; 1 − u is in (0, 1], so the logarithm is finite; WGSL lets that of numbers near 1 come out above 0
    normal: "sqrt(max(0.0, -2.0 * log(1.0 - unit_(bits.x)))) * cos(6.283185307179586 * unit_(bits.y))",
    // the high word of bits · count: uniform up to count / 2³²
    integer: "params.low + i32(wide_product_(bits.x, params.count).y)",
  }[kind];
  return {
    name: `random ${kind}`,
    buffers: { state: "read u32", y: `write ${element}` },
    params: { op: "u32", size: "u32", low: "i32", count: "u32" },
    head: `${PCG4D}${kind === "integer" ? WIDE_PRODUCT : ""}`,
    main: `if (thread >= params.size) { return; }
  let bits = pcg4d(vec4u(thread, params.op, state[0], state[1]));
  y[thread] = ${element}(${value});`,
  };
});

/** Random numbers: uniform in [0, 1) (multiples of 2⁻²⁴, in f16 of 2⁻¹¹), normal, or integers in [low, low + count). `state` holds seed and step. */
export function random(
  kind: Kind,
  element: Element,
  b: { y: Memory; state: Memory },
  n: { op: number; size: number; low: number; count: number },
): void {
  randomKernel({ kind, element }).run(b, n, Math.ceil(n.size / 256));
}

const dropoutKernel = variants((element: Element) => ({
  name: "dropout",
  buffers: { x: `read ${element}`, state: "read u32", y: `write ${element}` },
  params: { op: "u32", size: "u32", p: "f32" },
  head: PCG4D,
  main: `if (thread >= params.size) { return; }
  let keep = unit_(pcg4d(vec4u(thread, params.op, state[0], state[1])).x) >= params.p;
  y[thread] = ${element}(select(0.0, f32(x[thread]) / (1.0 - params.p), keep));`,
}));

/** y = x / (1 − p) with probability 1 − p, else 0. The backward pass runs it again on dY with the same state and op number. */
export function dropout(
  element: Element,
  b: { x: Memory; state: Memory; y: Memory },
  n: { op: number; size: number; p: number },
): void {
  dropoutKernel(element).run(b, n, Math.ceil(n.size / 256));
}
