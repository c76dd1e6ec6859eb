/**
 * Matrix products C[b] = A[b]·B[b] (+ bias), each operand with any strides, so that transposes cost nothing.
 *
 * A workgroup computes a tile of C, a thread up to 8×8 of it. Per step of 16 along k the workgroup copies a slab of A and of B to its
 * memory as vec4s along m and n, the two directions in which threads read them. Where k is the contiguous direction,
 * neighbouring threads load neighbouring k, else neighbouring m (or n): loads coalesce either way.
 */
import type { Element } from "./elementwise.ts";
import { type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

/** A matrix in memory: element (i, j) of batch b at offset + b·batch + i·row + j·column. */
export interface Strided {
  memory: Memory;
  element: Element;
  offset?: number;
  batch: number;
  row: number;
  column: number;
}

const DEPTH = 16;

/** A tile of rows × columns, of which a thread computes `high`·4 rows by `wide`·4 columns. */
interface Tile {
  rows: number;
  columns: number;
  high: 1 | 2;
  wide: 1 | 2;
  /** Time of one multiply-add relative to the best tile's: 8×8 results a thread read half as much a product as 4×4. */
  cost: number;
}

const TILES: Tile[] = [
  { rows: 64, columns: 64, high: 2, wide: 2, cost: 1 },
  { rows: 64, columns: 16, high: 2, wide: 1, cost: 1.3 },
  { rows: 16, columns: 64, high: 1, wide: 2, cost: 1.3 },
  { rows: 32, columns: 32, high: 1, wide: 1, cost: 1.6 },
  { rows: 16, columns: 16, high: 1, wide: 1, cost: 1.8 },
];

const kernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [index, a, b, c, bias, accumulate] = key.split(",");
  const { rows: M, columns: N, high, wide } = TILES[Number(index)], threads = M * N / (16 * high * wide);
  // copies one slab: vec4s along `across` (m or n), `count` of them per k
  const slab = (name: string, count: number, first: string, size: string) => `
    for (var unit = lane; unit < ${count * DEPTH}u; unit += ${threads}u) {
      let along = select(unit % ${count}u, unit / ${DEPTH}u, params.${name}_k == 1u);
      let k = select(unit / ${count}u, unit % ${DEPTH}u, params.${name}_k == 1u);
      let x = ${first} + along * 4u;
      let at = min(${name}_base + (k0 + k) * params.${name}_k, params.${name}_last);
      let last = params.${size} - 1u;
      let value = vec4f(${
    [0, 1, 2, 3].map((j) => `f32(${name}[at + min(x + ${j}u, last) * params.${name}_across])`).join(", ")
  });
      slab_${name}[k * ${count}u + along] = select(vec4f(0.0), value, k0 + k < params.depth);
    }`;
  const highs = [0, 1].slice(0, high), wides = [0, 1].slice(0, wide), lanes = [..."xyzw"];
  // rows of a thread lie in `high` groups of 4, half a tile apart, columns likewise
  const rowOf = (h: number, i: number) => `(m + ${h * M / 2 + i}u)`,
    columnOf = (w: number, j: number) => `(n + ${w * N / 2 + j}u)`;
  const sum = (h: number, i: number, w: number) => `sum_${h}${i}${w}`;
  const each = (f: (h: number, i: number, w: number) => string) =>
    highs.flatMap((h) => lanes.flatMap((_, i) => wides.map((w) => f(h, i, w)))).join(" ");
  const unrolled = Array.from({ length: DEPTH }, (_, k) => `
    { ${highs.map((h) => `let x${h} = slab_a[${k * M / 4 + h * M / 8}u + thread_m];`).join(" ")}
      ${wides.map((w) => `let y${w} = slab_b[${k * N / 4 + w * N / 8}u + thread_n];`).join(" ")}
      ${each((h, i, w) => `${sum(h, i, w)} += x${h}.${lanes[i]} * y${w};`)} }`).join("");
  const biases = bias === "none" ? "" : wides.map((w) => `
  let bias${w} = vec4f(${lanes.map((_, j) => `f32(bias[min(${columnOf(w, j)}, params.columns - 1u)])`).join(", ")});`)
    .join("");
  const store = each((h, i, w) => `
  if (${rowOf(h, i)} < params.rows) {
    let result = ${sum(h, i, w)}${bias === "none" ? "" : ` + bias${w}`};
    let at = c_base + ${rowOf(h, i)} * params.columns;
    ${
    lanes.map((l, j) =>
      `if (${columnOf(w, j)} < params.columns) { c[at + ${columnOf(w, j)}] = ${c}(result.${l}${
        accumulate === "add" ? ` + f32(c[at + ${columnOf(w, j)}])` : ""
      }); }`
    )
      .join("\n    ")
  }
  }`);
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
      aOffset: "u32",
      aBatch: "u32",
      aK: "u32",
      aAcross: "u32",
      aLast: "u32",
      bOffset: "u32",
      bBatch: "u32",
      bK: "u32",
      bAcross: "u32",
      bLast: "u32",
      cOffset: "u32",
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
  let thread_n = lane % ${N / 4 / wide}u;
  let thread_m = lane / ${N / 4 / wide}u;
  let a_base = params.a_offset + batch * params.a_batch;
  let b_base = params.b_offset + batch * params.b_batch;
  ${each((h, i, w) => `var ${sum(h, i, w)} = vec4f(0.0);`)}
  for (var k0 = 0u; k0 < params.depth; k0 += ${DEPTH}u) {
    ${slab("a", M / 4, "tile_m", "rows")}
    ${slab("b", N / 4, "tile_n", "columns")}
    workgroupBarrier();
    ${unrolled}
    workgroupBarrier();
  }
  let m = tile_m + thread_m * 4u;
  let n = tile_n + thread_n * 4u;
  let c_base = params.c_offset + batch * params.rows * params.columns;
  ${biases}
  ${store}`,
  };
});

/** c[b] = a[b]·b[b] + bias, with a [rows, depth] and b [depth, columns] in each batch; `c` lies row by row, from `offset` on, and is added to if `add` is set. */
export function matmul(
  a: Strided,
  b: Strided,
  c: { memory: Memory; element: Element; offset?: number; add?: boolean },
  rows: number,
  columns: number,
  depth: number,
  batches: number,
  bias?: { memory: Memory; element: Element },
): void {
  const groups = (t: Tile) => Math.ceil(rows / t.rows) * Math.ceil(columns / t.columns);
  const time = (t: Tile) => groups(t) * t.rows * t.columns * t.cost;
  const tile = TILES.reduce((best, t) => time(t) < time(best) ? t : best);
  const key = [TILES.indexOf(tile), a.element, b.element, c.element, bias?.element ?? "none", c.add ? "add" : "set"]
    .join();
  const buffers: Record<string, Memory> = { a: a.memory, b: b.memory, c: c.memory };
  if (bias) buffers.bias = bias.memory;
  kernel(key).run(buffers, {
    rows,
    columns,
    depth,
    batches,
    aOffset: a.offset ?? 0,
    aBatch: a.batch,
    aK: a.column,
    aAcross: a.row,
    aLast: Math.max(0, (a.offset ?? 0) + (batches - 1) * a.batch + (depth - 1) * a.column),
    bOffset: b.offset ?? 0,
    bBatch: b.batch,
    bK: b.row,
    bAcross: b.column,
    bLast: Math.max(0, (b.offset ?? 0) + (batches - 1) * b.batch + (depth - 1) * b.row),
    cOffset: c.offset ?? 0,
  }, groups(tile) * batches);
}
