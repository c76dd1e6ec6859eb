/**
 * Matrix products C[b] = A[b]·B[b] (+ bias), each operand with any strides, so that transposes cost nothing.
 *
 * A workgroup computes a tile of C, a thread 4×4 of it. Per step of 16 along k the workgroup copies a slab of A and of B to its
 * memory as vec4s along m and n, the two directions in which threads read them. Where k is the contiguous direction,
 * neighbouring threads load neighbouring k, else neighbouring m (or n): loads coalesce either way.
 */
import type { Element } from "./elementwise.ts";
import { type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

/** A matrix in memory: element (i, j) of batch b at b·batch + i·row + j·column. */
export interface Strided {
  memory: Memory;
  element: Element;
  batch: number;
  row: number;
  column: number;
}

const DEPTH = 16;
const TILES = [[64, 64], [32, 32], [64, 16], [16, 64], [16, 16]]; // each with 4×4 results a thread

const kernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [tileM, tileN, a, b, c, bias] = key.split(",");
  const M = Number(tileM), N = Number(tileN), threads = M * N / 16;
  // copies one slab: vec4s along `across` (m or n), `count` of them per k
  const slab = (name: string, count: number, first: string, size: string) => `
    for (var unit = lane; unit < ${count * DEPTH}u; unit += ${threads}u) {
      let along = select(unit % ${count}u, unit / ${DEPTH}u, params.${name}_k == 1u);
      let k = select(unit / ${count}u, unit % ${DEPTH}u, params.${name}_k == 1u);
      let x = ${first} + along * 4u;
      let at = ${name}_base + (k0 + k) * params.${name}_k;
      let last = params.${size} - 1u;
      let value = vec4f(
        f32(${name}[min(at, params.${name}_last) + min(x, last) * params.${name}_across]),
        f32(${name}[min(at, params.${name}_last) + min(x + 1u, last) * params.${name}_across]),
        f32(${name}[min(at, params.${name}_last) + min(x + 2u, last) * params.${name}_across]),
        f32(${name}[min(at, params.${name}_last) + min(x + 3u, last) * params.${name}_across]));
      slab_${name}[k * ${count}u + along] = select(vec4f(0.0), value, k0 + k < params.depth);
    }`;
  const unrolled = Array.from({ length: DEPTH }, (_, k) => `
    { let x = slab_a[${k * M / 4}u + thread_m]; let y = slab_b[${k * N / 4}u + thread_n];
      sum0 += x.x * y; sum1 += x.y * y; sum2 += x.z * y; sum3 += x.w * y; }`).join("");
  const store = (i: number) => `
  if (m + ${i}u < params.rows) {
    ${
    [..."xyzw"].map((l, j) =>
      `if (n + ${j}u < params.columns) { c[c_base + (m + ${i}u) * params.columns + n + ${j}u] = ${c}(sum${i}.${l}${
        bias === "none" ? "" : ` + f32(bias[n + ${j}u])`
      }); }`
    ).join("\n    ")
  }
  }`;
  return {
    name: "matmul",
    buffers: {
      a: `read ${a as Element}`,
      b: `read ${b as Element}`,
      ...bias === "none" ? {} : { bias: `read ${bias as Element}` as const },
      c: `write ${c as Element}`,
    },
    params: {
      rows: "u32",
      columns: "u32",
      depth: "u32",
      batches: "u32",
      aBatch: "u32",
      aK: "u32",
      aAcross: "u32",
      aLast: "u32",
      bBatch: "u32",
      bK: "u32",
      bAcross: "u32",
      bLast: "u32",
    },
    workgroup: threads,
    head: `var<workgroup> slab_a: array<vec4f, ${M / 4 * DEPTH}>;
var<workgroup> slab_b: array<vec4f, ${N / 4 * DEPTH}>;`,
    main: `let tiles_n = (params.columns + ${N - 1}u) / ${N}u;
  let tiles_m = (params.rows + ${M - 1}u) / ${M}u;
  let batch = group / (tiles_n * tiles_m);
  if (batch >= params.batches) { return; }
  let tile_n = (group % tiles_n) * ${N}u;
  let tile_m = (group / tiles_n % tiles_m) * ${M}u;
  let thread_n = lane % ${N / 4}u;
  let thread_m = lane / ${N / 4}u;
  let a_base = batch * params.a_batch;
  let b_base = batch * params.b_batch;
  var sum0 = vec4f(0.0); var sum1 = vec4f(0.0); var sum2 = vec4f(0.0); var sum3 = vec4f(0.0);
  for (var k0 = 0u; k0 < params.depth; k0 += ${DEPTH}u) {
    ${slab("a", M / 4, "tile_m", "rows")}
    ${slab("b", N / 4, "tile_n", "columns")}
    workgroupBarrier();
    ${unrolled}
    workgroupBarrier();
  }
  let m = tile_m + thread_m * 4u;
  let n = tile_n + thread_n * 4u;
  let c_base = batch * params.rows * params.columns;
  ${[0, 1, 2, 3].map(store).join("")}`,
  };
});

/** c[b] = a[b]·b[b] + bias, with a [rows, depth] and b [depth, columns] in each batch; `c` lies row by row. */
export function matmul(
  a: Strided,
  b: Strided,
  c: { memory: Memory; element: Element },
  rows: number,
  columns: number,
  depth: number,
  batches: number,
  bias?: { memory: Memory; element: Element },
): void {
  // the tile with the least padding; of equals the largest, listed first
  const waste = ([m, n]: number[]) => Math.ceil(rows / m) * m * Math.ceil(columns / n) * n;
  const [tileM, tileN] = TILES.reduce((best, tile) => waste(tile) < waste(best) * 0.8 ? tile : best);
  const key = [tileM, tileN, a.element, b.element, c.element, bias?.element ?? "none"].join();
  const buffers: Record<string, Memory> = { a: a.memory, b: b.memory, c: c.memory };
  if (bias) buffers.bias = bias.memory;
  kernel(key).run(buffers, {
    rows,
    columns,
    depth,
    batches,
    aBatch: a.batch,
    aK: a.column,
    aAcross: a.row,
    aLast: Math.max(0, (batches - 1) * a.batch + (depth - 1) * a.column),
    bBatch: b.batch,
    bK: b.row,
    bAcross: b.column,
    bLast: Math.max(0, (batches - 1) * b.batch + (depth - 1) * b.row),
  }, Math.ceil(rows / tileM) * Math.ceil(columns / tileN) * batches);
}
