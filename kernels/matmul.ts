/**
 * Matrix products C[b] = A[b]·B[b], each operand with any strides, so that transposes cost nothing, and what can follow a product without a
 * trip of its own: bias, activation, residual, the slope of an activation, and the row sums of A (the gradient of a bias beside that of its weight).
 *
 * A workgroup computes a tile of C, a thread 4×4 or 8×8 of it. Per turn of 16 or 32 along k the workgroup copies a slab of A and of B to its memory as
 * vec4s along m and n, the two directions in which threads read them; the next slab is fetched into registers while this one is multiplied. A copy
 * moves blocks of 4×4, transposed in registers where k is the contiguous direction. Neighbouring threads take blocks that are neighbours in memory: with
 * 128 bytes of each row at a time 4096³ reaches 45 TFLOP/s in f32 on an H200 whatever is transposed, with 64 bytes of twice the rows 34. Where a product has few tiles, slices of a workgroup
 * share one: each takes every slices-th slab, and their sums meet in a fixed order. Where it has few and a long k, it is cut into
 * pieces along k, products of their own whose sums a second launch adds up.
 */
import type { Element } from "./elementwise.ts";
import {
  type Epilogue,
  epilogueCode,
  epilogueKey,
  epilogueMemories,
  lanes,
  type Plain,
  type Strided,
  vectorOf,
} from "./epilogue.ts";
import { gpu } from "./gpu/gpu.ts";
import { type BufferType, type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import { tensorMatmul } from "./tensor_cores.ts";

/** A square tile, of which a thread computes 8×8 (4×4 of small ones); `slices` times as many threads share it. A slab is `depth` deep. */
interface Tile {
  size: number;
  slices: number;
  depth: number;
  /**
   * Microseconds on a multiprocessor, fitted to 33 products of training steps measured on an H200: of a turn of one group at least, of each group in a
   * turn of many, of a group's beginning and end; and how many groups run together.
   */
  time: { turn: number; work: number; ends: number; together: number };
}

const TILES: Tile[] = [
  { size: 128, slices: 1, depth: 32, time: { turn: 2.85, work: 1.61, ends: 4.97, together: 1 } },
  { size: 128, slices: 1, depth: 16, time: { turn: 1.57, work: 0.08, ends: 3.06, together: 1 } },
  { size: 64, slices: 1, depth: 16, time: { turn: 0.86, work: 0.28, ends: 3.41, together: 2 } },
  { size: 64, slices: 2, depth: 16, time: { turn: 0.94, work: 0.88, ends: 3.58, together: 2 } },
  { size: 64, slices: 4, depth: 16, time: { turn: 1.3, work: 1.68, ends: 3.29, together: 1 } },
  { size: 32, slices: 1, depth: 16, time: { turn: 0.41, work: 0.16, ends: 0.29, together: 5 } },
  { size: 32, slices: 4, depth: 16, time: { turn: 0.67, work: 0.24, ends: 0.73, together: 1 } },
  { size: 16, slices: 4, depth: 16, time: { turn: 0.41, work: 0.25, ends: 1.01, together: 5 } },
  { size: 16, slices: 16, depth: 16, time: { turn: 1.16, work: 0.22, ends: 1.51, together: 1 } },
];

const sideOf = (size: number) => size >= 64 ? 2 : 1; // in fours
const threadsOf = (size: number) => (size / (4 * sideOf(size))) ** 2; // of a slice
const bytesOf = (t: Tile) => 8 * (t.depth + 1) * t.size * t.slices;

/** Overrides for tests and tuning: the index of the tile, pieces along k, how operands are read (false: by vec4s where they can be), and steps of k unrolled. */
export const matmulTuning: {
  tile: number | null;
  pieces: number | null;
  scalar: boolean | null;
  unroll: number | null;
} = { tile: null, pieces: null, scalar: null, unroll: null };

/** Whether the device has the threads and the workgroup memory for a tile. */
function fits(t: Tile): boolean {
  const { limits } = gpu().info;
  return threadsOf(t.size) * t.slices <= limits.maxComputeInvocationsPerWorkgroup &&
    bytesOf(t) <= limits.maxComputeWorkgroupStorageSize;
}

/** The tiles that the device can run, by index. */
export function fittingTiles(): number[] {
  return TILES.flatMap((t, i) => fits(t) ? [i] : []);
}

/**
 * A function that fetches a block of 4 k by 4 of the other direction (m or n), a column of the matrix for each k. How `mode` reads:
 * "k" vec4s along k, "x" vec4s along the other direction, "s" elements with any strides. `places_NAME` gives where the block's rows (of "x"
 * the block itself) begin, which stays the same along k; a slab that may reach beyond the product's depth has a `tail`.
 */
function fetcher(name: "a" | "b", mode: string, size: string, tail: boolean): string {
  const from = `(params.${name}_offset + batch * params.${name}_batch)`, last = `params.${size} - 1u`;
  const places = {
    k: `(${from} + min(x + vec4u(0u, 1u, 2u, 3u), vec4u(${last})) * params.${name}_across) / 4u`,
    x: `vec4u((${from} + min(x, params.${size} - 4u)) / 4u)`,
    s: `${from} + min(x + vec4u(0u, 1u, 2u, 3u), vec4u(${last})) * params.${name}_across`,
  }[mode];
  const inside = (j: number, x: string) => tail ? `select(vec4f(0.0), ${x}, k + ${j}u < params.depth)` : x;
  const at = (j: number) => tail ? `min(k + ${j}u, params.depth - 1u)` : `(k + ${j}u)`;
  const block = {
    k: `transpose(mat4x4f(${
      lanes.map((l) => inside(0, `vec4f(${name}[places.${l} + ${tail ? "min(k, params.depth - 4u)" : "k"} / 4u])`))
        .join(", ")
    }))`,
    x: `mat4x4f(${
      lanes.map((_, j) => inside(j, `vec4f(${name}[places.x + ${at(j)} * (params.${name}_k / 4u)])`)).join(", ")
    })`,
    s: `mat4x4f(${
      lanes.map((_, j) =>
        inside(
          j,
          `vec4f(${lanes.map((l) => `f32(${name}[places.${l} + ${at(j)} * params.${name}_k])`).join(", ")})`,
        )
      ).join(", ")
    })`,
  }[mode];
  return `fn places_${name}(batch: u32, x: u32) -> vec4u { return ${places}; }
fn fetch_${name}(places: vec4u, k: u32) -> mat4x4f {
  return ${block};
}`;
}

const kernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [index, unroll_, a, aMode, b, bMode, tail_, after] = key.split(",");
  const tile = TILES[Number(index)],
    { size, slices, depth } = tile,
    end = epilogueCode(after),
    tail = tail_ === "tail",
    unroll = Number(unroll_);
  // the row sums of a slab are shared among `parts` threads a quad
  const quads = size / 4,
    threads = threadsOf(size),
    parts = Math.min(depth, threads / quads),
    across = size / (4 * sideOf(size));
  const sides = [0, 1].slice(0, sideOf(size)), sum = (h: number, i: number, w: number) => `sum_${h}${i}${w}`;
  const all = sides.flatMap((h) => lanes.flatMap((_, i) => sides.map((w) => [h, i, w] as const)));
  const each = (f: (h: number, i: number, w: number, n: number) => string) =>
    all.map(([h, i, w], n) => f(h, i, w, n)).join(" ");
  // the blocks of 4×4 of A's slab, then those of B's: neighbouring threads take up to eight along m or n, then those along k
  const blocks = quads * depth / 4, run = Math.min(8, quads);
  const rounds = Array.from({ length: Math.ceil(2 * blocks / threads) }, (_, r) => r);
  // which operand the blocks of a round are of; "" where that differs among threads
  const side = (r: number) => (r + 1) * threads <= blocks ? "a" : r * threads >= blocks ? "b" : "";
  // neighbouring threads take blocks that are neighbours in memory
  const order = (r: number, operand: string, mode: string) =>
    mode === "k"
      ? `let x${operand}${r} = place${r} / ${depth / 4}u; let k${operand}${r} = place${r} % ${depth / 4}u;`
      : `let x${operand}${r} = place${r} % ${run}u + place${r} / ${
        run * depth / 4
      }u * ${run}u; let k${operand}${r} = place${r} / ${run}u % ${depth / 4}u;`;
  const begin = rounds.map((r) =>
    `let unit${r} = own + ${r * threads}u;
  let of_a${r} = unit${r} < ${blocks}u;
  let place${r} = select(unit${r} - ${blocks}u, unit${r}, of_a${r});
  ${order(r, "a", aMode)}
  ${order(r, "b", bMode)}
  let x${r} = select(xb${r}, xa${r}, of_a${r});
  let k${r} = select(kb${r}, ka${r}, of_a${r});
  let at${r} = slab + select(${quads}u, 0u, of_a${r}) + x${r};
  let places${r} = ${
      {
        a: `places_a(batch, tile_m + x${r} * 4u)`,
        b: `places_b(batch, tile_n + x${r} * 4u)`,
        "": `select(places_b(batch, tile_n + x${r} * 4u), places_a(batch, tile_m + x${r} * 4u), of_a${r})`,
      }[side(r)]
    };
  var block${r}: mat4x4f;`
  ).join("\n  ");
  const fetch = rounds.map((r) => {
    const [a, b] = ["a", "b"].map((x) => `block${r} = fetch_${x}(places${r}, begins + k${r} * 4u);`);
    return { a, b, "": `if (of_a${r}) { ${a} } else { ${b} }` }[side(r)];
  }).join(" ");
  const keep = rounds.map((r) =>
    `${(r + 1) * threads <= 2 * blocks ? "" : `if (unit${r} < ${2 * blocks}u) `}{ ${
      lanes.map((_, j) => `slabs[at${r}][k${r} + ${j * depth / 4}u] = block${r}[${j}];`).join(" ")
    } }`
  ).join("\n    ");
  // k lies at k % 4 · depth/4 + k / 4, so that threads that keep blocks beside each other along k write beside each other
  const placeOf = (k: number) => k % 4 * depth / 4 + Math.floor(k / 4);
  const step = (k: number) => `
      { ${sides.map((h) => `let x${h} = slabs[at_a + ${h * quads / 2}u][${placeOf(k)}u + k];`).join(" ")}
        ${sides.map((w) => `let y${w} = slabs[at_b + ${w * quads / 2}u][${placeOf(k)}u + k];`).join(" ")}
        ${each((h, i, w) => `${sum(h, i, w)} += x${h}.${lanes[i]} * y${w};`)} }`;
  const steps = Array.from({ length: unroll }, (_, k) => step(k)).join("");
  const multiply = unroll === depth
    ? steps.replaceAll("u + k]", "u]") // a constant place needs no bounds check
    : `for (var k = 0u; k < ${depth / 4}u; k += ${unroll / 4}u) { ${steps} }`;
  // sums of slices meet by halves, as many threads' in a row of the slabs as fit
  const halves = Array.from({ length: Math.log2(slices) }, (_, n) => slices >> (n + 1)), fit = depth / all.length;
  const met = (n: number) => `slabs[at / ${fit}u][at % ${fit}u * ${all.length}u + ${n}u]`;
  const meet = halves.map((half) => `
  if (slice >= ${half}u && slice < ${2 * half}u) {
    let at = (slice - ${half}u) * ${threads}u + own;
    ${each((h, i, w, n) => `${met(n)} = ${sum(h, i, w)};`)}
  }
  workgroupBarrier();
  if (slice < ${half}u) {
    let at = slice * ${threads}u + own;
    ${each((h, i, w, n) => `${sum(h, i, w)} += ${met(n)};`)}
  }
  workgroupBarrier();`).join("");
  const operand = (element: string, mode: string): BufferType =>
    `read ${mode === "s" ? element as Element : vectorOf[element as Element]}`;
  return {
    name: "matmul",
    buffers: {
      a: operand(a, aMode),
      b: operand(b, bMode),
      ...end.buffers,
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
      bOffset: "u32",
      bBatch: "u32",
      bK: "u32",
      bAcross: "u32",
      cOffset: "u32",
    },
    workgroup: threads * slices,
    head: `${end.head}
// of each slice the rows of A's slab, four m each, then those of B's; an odd length keeps neighbours in different banks
var<workgroup> slabs: array<array<vec4f, ${depth + 1}>, ${2 * quads * slices}>;
${fetcher("a", aMode, "rows", tail)}
${fetcher("b", bMode, "columns", tail)}`,
    main: `let tiles_n = (params.columns + ${size - 1}u) / ${size}u;
  let tiles_m = (params.rows + ${size - 1}u) / ${size}u;
  let batch = group / (tiles_n * tiles_m);
  if (batch >= params.batches) { return; }
  let tile_n = (group % tiles_n) * ${size}u;
  let tile_m = (group / tiles_n % tiles_m) * ${size}u;
  let own = lane % ${threads}u;
  let slice = lane / ${threads}u;
  let thread_n = own % ${across}u;
  let thread_m = own / ${across}u;
  let slab = slice * ${2 * quads}u;
  let at_a = slab + thread_m;
  let at_b = slab + ${quads}u + thread_n;
  ${each((h, i, w) => `var ${sum(h, i, w)} = vec4f(0.0);`)}
  ${begin}
  ${end.sums ? "var row_sums = vec4f(0.0);" : ""}
  { let begins = slice * ${depth}u; ${fetch} }
  for (var first = 0u; first < params.depth; first += ${depth * slices}u) {
    workgroupBarrier();
    ${keep}
    workgroupBarrier();
    // the next slab has until the end of this one's multiplication to arrive
    let begins = first + ${depth * slices}u + slice * ${depth}u;
    if (first + ${depth * slices}u < params.depth) { ${fetch} }
    ${multiply}
    ${
      end.sums
        ? `if (tile_n == 0u) {
      ${
          Array.from(
            { length: depth / parts },
            (_, k) => `row_sums += slabs[slab + own % ${quads}u][own / ${quads}u + ${k * parts}u];`,
          ).join(" ")
        }
    }`
        : ""
    }
  }
  workgroupBarrier();
  ${meet}
  ${
      end.sums
        ? `if (tile_n == 0u) { slabs[slab + own % ${quads}u][own / ${quads}u] = row_sums; }
  workgroupBarrier();
  if (tile_n == 0u && lane < ${quads}u) {
    row_sums = vec4f(0.0);
    for (var s = 0u; s < ${slices}u; s++) {
      for (var part = 0u; part < ${parts}u; part++) { row_sums += slabs[s * ${2 * quads}u + lane][part]; }
    }
    let m = tile_m + lane * 4u;
    ${lanes.map((l, i) => end.sum(`(m + ${i}u)`, `row_sums.${l}`)).join(" ")}
  }`
        : ""
    }
  ${slices > 1 ? "if (slice > 0u) { return; }" : ""}
  let c_base = params.c_offset + batch * params.rows * params.columns;
  ${
      sides.map((w) =>
        `{
    let n = tile_n + thread_n * 4u + ${w * size / 2}u;
    if (n < params.columns) {
      ${end.column}
      ${
          sides.flatMap((h) =>
            lanes.map((_, i) =>
              `{ let m = tile_m + thread_m * 4u + ${h * size / 2 + i}u;
        ${end.row("m", sum(h, i, w))} }`
            )
          ).join(" ")
        }
    }
  }`
      ).join("\n  ")
    }`,
  };
});

/** Which of the three ways an operand is read. */
function modeOf(scalar: boolean, x: Strided, k: number, across: number, size: number, depth: number): string {
  if (scalar || ((x.offset ?? 0) | x.batch) % 4 !== 0) return "s";
  if (k === 1 && across % 4 === 0 && depth % 4 === 0) return "k";
  if (across === 1 && k % 4 === 0 && size % 4 === 0) return "x";
  return "s";
}

/** Pieces along k that a product without an epilogue may be cut into, whose sums are added up afterwards. */
const PIECES = [1, 2, 4, 8, 16];

/** The tile for a product, and the pieces: those of which a model of the device expects the least time. */
function choose(rows: number, columns: number, depth: number, batches: number, cut: boolean): [number, number] {
  const { isSoftware, tuning } = gpu().info;
  let best = [0, 1] as [number, number], least = Infinity;
  const forced = cut && matmulTuning.pieces;
  for (const pieces of forced && depth % (4 * forced) === 0 ? [forced] : cut && !isSoftware ? PIECES : [1]) {
    if (pieces > 1 && !forced && (depth % (4 * pieces) !== 0 || depth < 256 * pieces)) break;
    // the sums are written and read once more, in a launch of their own
    const more = pieces === 1 ? 0 : 7 + 8 * pieces * rows * columns / 2.5e6;
    for (let i = 0; i < TILES.length; i++) {
      const t = TILES[i];
      if (!fits(t) || i !== (matmulTuning.tile ?? i)) continue;
      const groups = Math.ceil(rows / t.size) * Math.ceil(columns / t.size) * batches * pieces;
      const expected = more + (tuning?.tiles[i] ?? 1) * expectedTime(t, groups, depth / pieces);
      if (expected < least || least === Infinity) [best, least] = [[i, pieces], expected];
    }
  }
  return best;
}

const expectedTime = (t: Tile, groups: number, depth: number) =>
  gpu().info.isSoftware ? softwareTime(t, groups) : deviceTime(t, groups, depth);

/** What the model expects of a product in one tile: microseconds on the device that it was fitted to, infinite where the tile is never taken. */
export function expectedOf(tile: number, rows: number, columns: number, depth: number): number {
  const { size } = TILES[tile];
  return expectedTime(TILES[tile], Math.ceil(rows / size) * Math.ceil(columns / size), depth);
}

// a core takes a tile at a time: what counts is the area, and how often a value read serves
function softwareTime(t: Tile, groups: number): number {
  return t.slices > 1 || t.depth > 16 || t.size < 32
    ? Infinity
    : groups * t.size ** 2 * (sideOf(t.size) === 2 ? 1 : 1.6);
}

/** Microseconds on a device of 132 multiprocessors: the tile chosen takes 1.02 times the best one's time in the mean, 1.16 at worst. */
function deviceTime({ depth: slab, slices, time }: Tile, groups: number, depth: number): number {
  const turns = Math.ceil(depth / slab / slices), each = Math.ceil(groups / 132);
  const wave = (n: number) => n && turns * Math.max(time.turn, n * time.work) + time.ends;
  return Math.floor(each / time.together) * wave(time.together) + wave(each % time.together);
}

const sumPieces: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [element, sums, add] = key.split(",") as [Element, Element | "none", string];
  const join = (from: string, to: string, element: Element, at: string, i: string, size: string) =>
    `var sum = ${add === "add" ? `f32(${to}[${at}])` : "0.0"};
    for (var p = 0u; p < params.pieces; p++) { sum += ${from}[p * ${size} + ${i}]; }
    ${to}[${at}] = ${element}(sum);`;
  return {
    name: "matmul pieces",
    buffers: {
      partial: "read f32",
      c: `write ${element}`,
      ...sums !== "none" ? { partialSums: "read f32" as const, sums: `write ${sums}` as const } : {},
    },
    params: { size: "u32", rows: "u32", pieces: "u32", cOffset: "u32" },
    main: `if (thread < params.size) {
    ${join("partial", "c", element, "params.c_offset + thread", "thread", "params.size")}
  }${
      sums === "none" ? "" : ` else if (thread - params.size < params.rows) {
    let row = thread - params.size;
    ${join("partial_sums", "sums", sums, "row", "row", "params.rows")}
  }`
    }`,
  };
});

/** c[b] = a[b]·b[b] and its epilogue, with a [rows, depth] and b [depth, columns] in each batch; `c` lies row by row, from `offset` on. */
export function matmul(
  a: Strided,
  b: Strided,
  c: Plain & { offset?: number },
  rows: number,
  columns: number,
  depth: number,
  batches: number,
  epilogue: Epilogue = {},
): void {
  const { bias, activation, slope, plus, add, sums } = epilogue, { isSoftware } = gpu().info, cOffset = c.offset ?? 0;
  const values = {
    rows,
    columns,
    depth,
    batches,
    aOffset: a.offset ?? 0,
    aBatch: a.batch,
    aK: a.column,
    aAcross: a.row,
    bOffset: b.offset ?? 0,
    bBatch: b.batch,
    bK: b.row,
    bAcross: b.column,
    cOffset,
  };
  // a compiler for CPUs takes half a second for each variant and gains little by vec4s and long bodies: there, one variant serves all strides
  const scalar = matmulTuning.scalar ?? isSoftware, wide = !scalar && columns % 4 === 0 && cOffset % 4 === 0;
  const aMode = modeOf(scalar, a, a.column, a.row, rows, depth),
    bMode = modeOf(scalar, b, b.row, b.column, columns, depth);
  if (tensorMatmul(a, aMode, b, bMode, c, wide, values, epilogue)) return;
  const plain = !bias && !activation && !slope && !plus && batches === 1;
  const [index, pieces] = choose(rows, columns, depth, batches, plain), tile = TILES[index];
  if (pieces > 1) {
    const size = rows * columns, part = depth / pieces;
    const take = (count: number) => ({ memory: gpu().pool.take(4 * pieces * count), element: "f32" as const });
    const partial = take(size), partialSums = sums && take(rows);
    const [aPart, bPart] = [{ ...a, batch: part * a.column }, { ...b, batch: part * b.row }];
    matmul(aPart, bPart, partial, rows, columns, part, pieces, { sums: partialSums });
    sumPieces(`${c.element},${sums?.element ?? "none"},${add ? "add" : "set"}`).run(
      { partial: partial.memory, c: c.memory, ...sums && { partialSums: partialSums!.memory, sums: sums.memory } },
      { size, rows, pieces, cOffset },
      Math.ceil((size + (sums ? rows : 0)) / 256),
    );
    partialSums?.memory.free();
    return partial.memory.free();
  }
  const unroll = matmulTuning.unroll ?? (isSoftware ? 4 : tile.depth), tail = depth % (tile.depth * tile.slices) !== 0;
  const key = `${index},${unroll},${a.element},${aMode},${b.element},${bMode},${tail ? "tail" : "whole"},${
    epilogueKey(c.element, wide, epilogue)
  }`;
  const buffers = { a: a.memory, b: b.memory, ...epilogueMemories(c.memory, epilogue) };
  const groups = Math.ceil(rows / tile.size) * Math.ceil(columns / tile.size) * batches;
  kernel(key).run(buffers, values, groups);
}
