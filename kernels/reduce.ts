/**
 * Reductions of [outer, length, inner] over the middle dimension. A workgroup computes `columns` neighbouring results (1 if inner is 1 or for an argmax of
 * millions, else 16) with threads / columns lanes along the length; a tree combines the lanes. A long reduction with few results is first cut into
 * pieces, so that many workgroups share it. The order of additions depends only on the sizes and the device.
 */
import { type Element, numbers } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { variants } from "./gpu/kernel.ts";
import { type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { MATH } from "./math.ts";

export type Reduction = "sum" | "sumOfSquares" | "max" | "min" | "logSumExp" | "argmax";

const LONGEST = 16384; // elements that one workgroup reduces alone

/** A reduction as WGSL. */
interface Fold {
  /** Defines `total`, what a lane begins with. */
  begin: string;
  /** Adds the element `x`, at index k, to `total`. */
  step: string;
  /** Adds the `other` lane's total to `total`. */
  join: string;
  /** The result, from the total of all lanes in `shared_values[lane]`; that total itself by default. */
  result?: string;
}

const FIRST = "let start = f32(values[(outer * params.length + first) * params.inner + column]);";
const FOLDS: Record<Reduction, Fold> = {
  sum: { begin: "var total = 0.0;", step: "total += x;", join: "total += other;" },
  sumOfSquares: { begin: "var total = 0.0;", step: "total += x * x;", join: "total += other;" },
  max: { begin: `${FIRST} var total = start;`, step: "total = max_(total, x);", join: "total = max_(total, other);" },
  min: { begin: `${FIRST} var total = start;`, step: "total = min_(total, x);", join: "total = min_(total, other);" },
  // the largest m and the sum of the others relative to it: (m, r) stands for eᵐ(1 + r); the sum of no elements has r = −1
  logSumExp: {
    begin: "var total = vec2f(-3.4e38, -1.0);",
    step: "total = join_(total, vec2f(x, 0.0));",
    join: "total = join_(total, other);",
    result: "shared_values[lane].x + log1p_(shared_values[lane].y)",
  },
  // (value, index as bits)
  argmax: {
    begin: `${FIRST} var total = vec2f(start, bitcast<f32>(first));`,
    step: "if (x > total.x || (is_nan_(x) && !is_nan_(total.x))) { total = vec2f(x, bitcast<f32>(k)); }",
    join: `let better = other.x > total.x || (is_nan_(other.x) && !is_nan_(total.x));
      let tie = (other.x == total.x || (is_nan_(other.x) && is_nan_(total.x))) && bitcast<u32>(other.y) < bitcast<u32>(total.y);
      if (better || tie) { total = other; }`,
    result: "bitcast<u32>(shared_values[lane].y)",
  },
};

/**
 * Reduces a lane's elements, then the lanes' totals. A lane reads `ahead` elements at once: when it read them one by one, 16,384 elements took a workgroup
 * 31 µs on an H200.
 */
function loops({ begin, step, join, result = "shared_values[lane]" }: Fold, ahead: number): string {
  const all = numbers(ahead);
  return `${begin}
  for (var block = first + along; block < end; block += ${ahead}u * LANES) {
    ${
    all.map((j) =>
      `let x${j} = f32(values[(outer * params.length + min(block + ${j}u * LANES, end - 1u)) * params.inner + column]);`
    ).join(" ")
  }
    ${all.map((j) => `{ let k = block + ${j}u * LANES; let x = x${j}; if (k < end) { ${step} } }`).join("\n    ")}
  }
  shared_values[lane] = total;
  for (var half = LANES / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (along < half) {
      let other = shared_values[lane + half * COLUMNS];
      ${join}
      shared_values[lane] = total;
    }
  }
  let result = ${result}; // which the same lane wrote
  `;
}

/** Compile-time choices: also how many results a workgroup computes, with how many threads, and how many elements a lane reads at once. */
interface Variant {
  kind: Reduction;
  input: Element;
  output: Element;
  columns: number;
  threads: number;
  ahead: number;
}

const kernel = variants(({ kind, input, output, columns, threads, ahead }: Variant) => ({
  name: kind,
  workgroup: threads,
  buffers: { values: `read ${input}`, results: `write ${output}` },
  params: { length: "u32", inner: "u32", piece: "u32", pieces: "u32", tiles: "u32", groups: "u32" },
  head: `${MATH}
const COLUMNS = ${columns}u;
const LANES = ${threads / columns}u;
var<workgroup> shared_values: array<${kind === "logSumExp" || kind === "argmax" ? "vec2f" : "f32"}, ${threads}>;
fn join_(a: vec2f, b: vec2f) -> vec2f {
  if (b.y < 0.0) { return a; }
  if (a.y < 0.0) { return b; }
  let larger = select(b, a, a.x >= b.x);
  let smaller = select(a, b, a.x >= b.x);
  if (smaller.x == larger.x) { return vec2f(larger.x, larger.y + smaller.y + 1.0); }
  return vec2f(larger.x, larger.y + (smaller.y + 1.0) * exp_(smaller.x - larger.x));
}`,
  main: `if (group >= params.groups) { return; }
  let tile = group % params.tiles;
  let piece = (group / params.tiles) % params.pieces;
  let outer = group / (params.tiles * params.pieces);
  let column = min(tile * COLUMNS + lane % COLUMNS, params.inner - 1u);
  let along = lane / COLUMNS;
  let first = piece * params.piece;
  let end = min(first + params.piece, params.length);
  ${loops(FOLDS[kind], ahead)}
  if (along == 0u && tile * COLUMNS + lane < params.inner) {
    results[(outer * params.pieces + piece) * params.inner + column] = ${output}(result);
  }`,
}));

/** What is reduced, and where the results go, with their elements. */
export interface ReduceBuffers {
  values: Memory;
  input: Element;
  results: Memory;
  output: Element;
}

const planned = remembered<{ launch: Launch; pieces: number }>();

/** results[o, i] = the reduction of values[o, :, i]. */
export function reduce(
  kind: Reduction,
  { values, input, results, output }: ReduceBuffers,
  { outer, length, inner }: { outer: number; length: number; inner: number },
): void {
  const { launch, pieces } = planned([kind, input, output, outer, length, inner], () => {
    const { isSoftware, limits } = gpu().info;
    // software drivers stop a thread after 65,535 iterations: all lanes of the only workgroup share an argmax of millions
    const columns = inner === 1 || kind === "argmax" && length > 2 ** 22 ? 1 : 16;
    const tiles = Math.ceil(inner / columns), longest = columns === 1 ? LONGEST : LONGEST / 16;
    // pieces would lose the indices of an argmax; and many results fill the GPU without them
    const isWhole = length <= longest || kind === "argmax" || outer * tiles >= 1024;
    const piece = isWhole ? length : Math.ceil(length / Math.ceil(length / longest));
    const pieces = isWhole ? 1 : Math.ceil(length / piece), groups = outer * tiles * pieces;
    // a workgroup that is alone is the faster the more threads it has: the mean of 16,384 losses takes an H100 9.0 µs, with 256 threads 11.7
    const threads = groups === 1 && piece * columns >= 2048 && !isSoftware
      ? Math.min(1024, limits.maxComputeInvocationsPerWorkgroup)
      : 256;
    const ahead = [8, 4, 1].find((ahead) => piece * columns >= ahead * threads) ?? 1;
    const variant = { kind, input, output: isWhole ? output : "f32", columns, threads, ahead } as const;
    return { launch: launchOf(kernel(variant), { length, inner, piece, pieces, tiles, groups }, groups), pieces };
  });
  if (pieces === 1) return runLaunch(launch, { values, results });
  using partial = gpu().pool.take(outer * pieces * inner * 4, kind);
  runLaunch(launch, { values, results: partial });
  const joining = kind === "sumOfSquares" ? "sum" : kind;
  reduce(joining, { values: partial, input: "f32", results, output }, { outer, length: pieces, inner });
}
