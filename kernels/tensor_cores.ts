/**
 * Matrix products of f16 on tensor cores, for devices with Chromium's experimental subgroup matrices (Dawn on an NVIDIA GPU). Products of f16 are exact and
 * sums run in float32, so that an element is off by at most (depth + 16)·2⁻²³·Σ|a·b| before it is rounded to its storage type.
 *
 * A workgroup is 2×2 subgroups, each of which computes a quarter of a tile of C in fragments of 16×16. A slab of A and one of B, 32 deep, are copied as vec4s
 * to workgroup memory in the layout that they have; meanwhile the next slabs are fetched. On an H100 4096³ reaches 150 to 169 TFLOP/s, depending on the
 * layout; f32 without tensor cores reaches 47.
 *
 * Tried there without epilogues, for the layout that reaches 161 TFLOP/s: tiles of 128 with padded rows reach 230, without the padding 115; tiles of 64 reach
 * 119, slabs 16 deep 154, fragments read directly from memory 75.
 */
import { lanes, numbers } from "./elementwise.ts";
import { epilogueCode, type EpilogueShape, findTile, type Mode, type Operands, PARAMS } from "./epilogue.ts";
import { gpu } from "./gpu/gpu.ts";
import { type Kernel, variants } from "./gpu/kernel.ts";
import { MULTIPROCESSORS } from "./gpu/tuning.ts";
import type { Size } from "./tiles.ts";

/** Steps of k in a slab. */
export const TENSOR_DEPTH = 32;

const THREADS = 128, DEPTH = TENSOR_DEPTH, PAD = 8;
const LEFT = "subgroup_matrix_left<f16, 16, 16>", RIGHT = "subgroup_matrix_right<f16, 16, 16>";
/** Bytes of workgroup memory for a tile: two slabs, and a row of fragments for each subgroup. */
const bytesOf = (size: number) => 2 * 2 * size * (DEPTH + PAD) + 4 * 4 * 16 * size / 2;

/** A slab in workgroup memory: rows along the direction that is contiguous in memory, "k" or "x" (m or n). */
function slab(name: "a" | "b", mode: Mode, size: number, sides: string, tail: boolean) {
  const long = mode === "k" ? DEPTH : size, rows = DEPTH * size / long, row = long + PAD;
  const rounds = numbers(DEPTH * size / 4 / THREADS),
    other = name === "a" ? "tile_m" : "tile_n";
  const each = (f: (r: number) => string) => rounds.map(f).join("\n    ");
  const inside = (x: string, k: string) => tail ? `select(vec4h(), ${x}, ${k} < depth)` : x;
  const at = mode === "k"
    ? `min(${other} + line, params.${sides} - 1u) * params.${name}_across + ${tail ? "min(k, depth - 4u)" : "k"}`
    : `${tail ? "min(k, depth - 1u)" : "k"} * params.${name}_k + min(${other} + 4u * word, params.${sides} - 4u)`;
  const kind = name === "a" ? LEFT : RIGHT;
  return {
    declare: `var<workgroup> slab_${name}: array<f16, ${rows * row}>;`,
    begin: `let from_${name} = params.${name}_offset + batch * params.${name}_batch;
  ${each((r) => `var next_${name}${r}: vec4h;`)}`,
    /** Starts reading the slab that begins at k = `begins`. */
    fetch: each((r) =>
      `{ let unit = lane + ${r * THREADS}u; let line = unit / ${long / 4}u; let word = unit % ${long / 4}u;
      let k = begins + ${mode === "k" ? "4u * word" : "line"};
      next_${name}${r} = ${inside(`${name}[(from_${name} + ${at}) / 4u]`, "k")}; }`
    ),
    put: each((r) =>
      `{ let unit = lane + ${r * THREADS}u; let at = unit / ${long / 4}u * ${row}u + unit % ${long / 4}u * 4u;
      ${lanes.map((l, j) => `slab_${name}[at + ${j}u] = next_${name}${r}.${l};`).join(" ")} }`
    ),
    /** The fragment of 16 rows of A (or columns of B) from `x` on and 16 steps of k from `k` on. */
    fragment: (x: string, k: number) => {
      const major = (mode === "k") === (name === "a") ? "row_major" : "col_major";
      const place = mode === "k" ? `(${x}) * ${row}u + ${k}u` : `${k * row}u + ${x}`;
      return `subgroupMatrixLoad<${kind}, ${major}>(&slab_${name}, ${place}, ${row}u)`;
    },
    element: (x: string, k: number) =>
      `slab_${name}[${mode === "k" ? `${x} * ${row}u + ${k}u` : `${k * row}u + ${x}`}]`,
  };
}

/** Compile-time choices: how operands are read, the side of the tile, whether the last slab may reach beyond the depth, and the epilogue. */
interface Variant extends Operands {
  size: number;
  tail: boolean;
  epilogue: EpilogueShape;
}

export const tensorKernel: (variant: Variant) => Kernel = variants((v: Variant) => {
  const { size, tail } = v, half = size / 2, end = epilogueCode(v.epilogue);
  const a = slab("a", v.aMode, size, "rows", tail), b = slab("b", v.bMode, size, "columns", tail);
  const fragments = numbers(half / 16);
  const each = (f: (i: number) => string) => fragments.map(f).join("\n    "),
    all = (f: (i: number, j: number) => string) => each((i) => each((j) => f(i, j)));
  return {
    name: "matmul (tensor cores)",
    directives: "enable chromium_experimental_subgroup_matrix;\ndiagnostic(off, chromium.subgroup_matrix_uniformity);", // offsets depend on the subgroup
    buffers: { a: "read vec4h", b: "read vec4h", ...end.buffers },
    params: PARAMS,
    workgroup: THREADS,
    subgroups: true,
    head: `${end.head}
${a.declare} ${b.declare}
var<workgroup> results: array<f32, ${4 * 16 * half}>;`,
    main: `${findTile(size, size)}
  let own = lane / 32u; // the subgroup
  let own_m = own / 2u * ${half}u;
  let own_n = own % 2u * ${half}u;
  ${all((i, j) => `var sum_${i}_${j}: subgroup_matrix_result<f32, 16, 16>;`)}
  ${end.sums ? "var row_sum = 0.0;" : ""}
  ${a.begin} ${b.begin}
  { let begins = 0u; ${a.fetch} ${b.fetch} }
  for (var first = 0u; first < depth; first += ${DEPTH}u) {
    workgroupBarrier();
    ${a.put} ${b.put}
    workgroupBarrier();
    // the next slab is fetched while this one is multiplied
    let begins = first + ${DEPTH}u;
    if (begins < depth) { ${a.fetch} ${b.fetch} }
    ${
      [0, 16].map((k) =>
        `{ ${each((i) => `let a${i} = ${a.fragment(`own_m + ${16 * i}u`, k)};`)}
    ${each((j) => `let b${j} = ${b.fragment(`own_n + ${16 * j}u`, k)};`)}
    ${all((i, j) => `sum_${i}_${j} = subgroupMatrixMultiplyAccumulate(a${i}, b${j}, sum_${i}_${j});`)} }`
      ).join("\n    ")
    }
    ${
      end.sums
        ? `if (tile_n == 0u && lane < ${size}u) { ${
          numbers(DEPTH).map((k) => `row_sum += f32(${a.element("lane", k)});`).join(" ")
        } }`
        : ""
    }
  }
  ${end.sums ? `if (tile_n == 0u && lane < ${size}u) { let m = tile_m + lane; ${end.sum("m", "row_sum")} }` : ""}
  let c_base = params.c_offset + batch * params.rows * params.columns;
  ${
      each((i) =>
        `workgroupBarrier();
  ${
          fragments.map((j) =>
            `subgroupMatrixStore<row_major>(&results, own * ${16 * half}u + ${16 * j}u, sum_${i}_${j}, ${half}u);`
          ).join("\n  ")
        }
  workgroupBarrier();
  for (var q = lane % 32u; q < ${4 * half}u; q += 32u) {
    let n = tile_n + own_n + q % ${half / 4}u * 4u;
    let m = tile_m + own_m + ${16 * i}u + q / ${half / 4}u;
    let at_result = own * ${16 * half}u + 4u * q;
    if (n < params.columns) {
      ${end.column}
      ${
          end.row(
            "m",
            "vec4f(results[at_result], results[at_result + 1u], results[at_result + 2u], results[at_result + 3u])",
          )
        }
    }
  }`
      )
    }`,
  };
});

/** The least depth of a piece, and of a product that is worth the launch that sums pieces. */
const LEAST_PIECE = 256, LEAST_CUT = 1024;

/**
 * The side of the tile for a product whose operands are read as the modes say (vec4s along "k" or "x"), and the depth of the pieces that it is cut into along
 * k, if it may be. Null if it cannot run on tensor cores, and if few workgroups would have a long k: then a tile with slices on ordinary cores is faster
 * (128×784×256 takes an H100 13 µs, 23 on tensor cores).
 */
export function tensorTile(
  { a, aMode, b, bMode }: Operands,
  { rows, columns, depth, batches, cut }: Size,
): { side: number; part: number } | null {
  const { tensorCores, limits: { maxComputeWorkgroupStorageSize: most } } = gpu().info;
  if (!tensorCores || a !== "f16" || b !== "f16" || aMode === "s" || bMode === "s") return null;
  for (const side of [128, 64]) {
    const tiles = Math.ceil(rows / side) * Math.ceil(columns / side) * batches;
    const wanted = Math.min(Math.floor(MULTIPROCESSORS / tiles), Math.floor(depth / LEAST_PIECE));
    const pieces = cut && depth >= LEAST_CUT ? Math.max(1, wanted) : 1, groups = tiles * pieces;
    if (bytesOf(side) > most || side === 128 && groups < 0.75 * MULTIPROCESSORS) continue; // too few to fill the GPU
    if (groups < 16 && depth > 2 * LEAST_PIECE) continue;
    return { side, part: pieces === 1 ? depth : Math.ceil(depth / pieces / DEPTH) * DEPTH };
  }
  return null;
}
