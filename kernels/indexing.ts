/**
 * Taking rows and elements by index, and the gradients of that. A gradient of repeated indices adds up in a fixed order: no float
 * atomics. An index out of range gives NaN. Loops over positions are nested, since some drivers cut a loop at 65,535 rounds.
 */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { defineKernel, type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { fill } from "./random.ts";

const NAN = "var nan_bits = 0x7fc00000u; let nan = bitcast<f32>(nan_bits);";

const embeddingKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "embedding",
  buffers: { weight: `read ${element}`, index: "read i32", y: `write ${element}` },
  params: { size: "u32", width: "u32", rows: "u32" },
  main: `if (thread >= params.size) { return; }
  ${NAN}
  let row = index[thread / params.width];
  let known = row >= 0 && u32(row) < params.rows;
  let x = f32(weight[u32(select(0, row, known)) * params.width + thread % params.width]);
  y[thread] = ${element}(select(nan, x, known));`,
}));

/** y[n] = weight[index[n]], rows of `width`. */
export function embedding(
  weight: Memory,
  index: Memory,
  y: Memory,
  element: Element,
  count: number,
  width: number,
  rows: number,
): void {
  const size = count * width;
  embeddingKernel(element).run({ weight, index, y }, { size, width, rows }, Math.ceil(size / 256));
}

/** links[n] = [whether n is the first of its index, the next position of the same index or `count`]. */
const linkKernel: Kernel = defineKernel({
  name: "embedding links",
  buffers: { index: "read i32", links: "write u32" },
  params: { count: "u32" },
  main: `if (thread >= params.count) { return; }
  let mine = index[thread];
  var first = 1u;
  for (var block = 0u; block < thread && first == 1u; block += 4096u) {
    for (var n = block; n < min(block + 4096u, thread); n++) { if (index[n] == mine) { first = 0u; break; } }
  }
  var next = params.count;
  for (var block = thread + 1u; block < params.count && next == params.count; block += 4096u) {
    for (var n = block; n < min(block + 4096u, params.count); n++) { if (index[n] == mine) { next = n; break; } }
  }
  links[2u * thread] = first;
  links[2u * thread + 1u] = next;`,
});

const embeddingBackwardKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "embedding backward",
  buffers: { index: "read i32", links: "read u32", dY: `read ${element}`, dWeight: `write ${element}` },
  params: { size: "u32", width: "u32", rows: "u32", count: "u32" },
  main: `if (thread >= params.size) { return; }
  let start = thread / params.width;
  let row = index[start];
  if (links[2u * start] == 0u || row < 0 || u32(row) >= params.rows) { return; }
  let column = thread % params.width;
  var sum = 0.0;
  var n = start;
  for (var outer = 0u; outer < 65536u && n < params.count; outer++) {
    for (var inner = 0u; inner < 4096u && n < params.count; inner++) {
      sum += f32(d_y[n * params.width + column]);
      n = links[2u * n + 1u];
    }
  }
  d_weight[u32(row) * params.width + column] = ${element}(sum);`,
}));

/** dWeight[row] = the sum of dY over the positions of that row, in their order; rows that no index names get 0. */
export function embeddingBackward(
  index: Memory,
  dY: Memory,
  dWeight: Memory,
  element: Element,
  count: number,
  width: number,
  rows: number,
): void {
  fill(dWeight, 0, rows * width, element);
  const links = gpu().pool.take(8 * count), size = count * width;
  linkKernel.run({ index, links }, { count }, Math.ceil(count / 256));
  embeddingBackwardKernel(element).run(
    { index, links, dY, dWeight },
    { size, width, rows, count },
    Math.ceil(size / 256),
  );
  links.free();
}

/** Sizes of a gather along the middle of [outer, from, inner]: `to` elements are taken of `from`. */
export interface GatherSizes {
  outer: number;
  from: number;
  to: number;
  inner: number;
}

const gatherKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "gather",
  buffers: { x: `read ${element}`, index: "read i32", y: `write ${element}` },
  params: { size: "u32", length: "u32", taken: "u32", inner: "u32" },
  main: `if (thread >= params.size) { return; }
  ${NAN}
  let k = index[thread];
  let known = k >= 0 && u32(k) < params.length;
  let outer = thread / (params.taken * params.inner);
  let value = x[(outer * params.length + u32(select(0, k, known))) * params.inner + thread % params.inner];
  y[thread] = ${
    element.startsWith("f") ? `${element}(select(nan, f32(value), known))` : `select(${element}(0), value, known)`
  };`,
}));

/** y[o, j, i] = x[o, index[o, j, i], i]. */
export function gather(
  x: Memory,
  index: Memory,
  y: Memory,
  element: Element,
  { outer, from, to, inner }: GatherSizes,
): void {
  const size = outer * to * inner;
  gatherKernel(element).run({ x, index, y }, { size, length: from, taken: to, inner }, Math.ceil(size / 256));
}

const gatherBackwardKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "gather backward",
  buffers: { index: "read i32", dY: `read ${element}`, dX: `write ${element}` },
  params: { size: "u32", length: "u32", taken: "u32", inner: "u32" },
  main: `if (thread >= params.size) { return; }
  let outer = thread / (params.length * params.inner);
  let k = i32(thread / params.inner % params.length);
  let i = thread % params.inner;
  var sum = 0.0;
  for (var block = 0u; block < params.taken; block += 4096u) {
    for (var j = block; j < min(block + 4096u, params.taken); j++) {
      let at = (outer * params.taken + j) * params.inner + i;
      if (index[at] == k) { sum += f32(d_y[at]); }
    }
  }
  d_x[thread] = ${element}(sum);`,
}));

/** dX[o, k, i] = the sum of dY[o, j, i] over the j with index[o, j, i] = k. */
export function gatherBackward(
  index: Memory,
  dY: Memory,
  dX: Memory,
  element: Element,
  { outer, from, to, inner }: GatherSizes,
): void {
  const size = outer * from * inner;
  gatherBackwardKernel(element).run({ index, dY, dX }, { size, length: from, taken: to, inner }, Math.ceil(size / 256));
}
