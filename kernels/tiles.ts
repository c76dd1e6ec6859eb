/** The tiles of matrix products, and the choice of one for a product: the tile for which a model of the device predicts the least time. */
import { gpu } from "./gpu/gpu.ts";
import { MOST_TURNS } from "./gpu/kernel.ts";
import { MULTIPROCESSORS, overrides } from "./gpu/tuning.ts";

/**
 * A tile of `m` rows by `n` columns, of which a thread computes `high`×`wide` blocks of 4×4. `slices` sets of such threads share the sum over k, which is
 * divided into slabs of `depth` steps: each slice takes every `slices`-th slab.
 */
export interface Tile {
  m: number;
  n: number;
  high: number;
  wide: number;
  slices: number;
  depth: number;
  /**
   * The time of the tile on a multiprocessor of an H100, in microseconds: `turn`, the least time of a turn (one slab of each slice); `work`, what each group
   * adds to a turn that many groups share; `ends`, the beginning and end of a group. `together`: how many groups run concurrently. Fitted to 834 times of 54
   * products of training steps, measured with many launches in one pass.
   */
  time: { turn: number; work: number; ends: number; together: number };
}

const tile = (
  [m, n]: [number, number],
  [high, wide]: [number, number],
  slices: number,
  depth: number,
  [turn, work, ends, together]: [number, number, number, number],
): Tile => ({ m, n, high, wide, slices, depth, time: { turn, work, ends, together } });

// Tried without gain on an H100, whose multiprocessors have 48 KiB of workgroup memory for all their groups: alternating between two slabs, with one barrier
// instead of two (0.92 to 1.04 times as fast), 512 threads (0.75 times), 8×16 elements per thread (43 TFLOP/s instead of 47), and in smaller tiles 4×8, 4×12,
// and four slices of 8 steps.
export const TILES: Tile[] = [
  tile([128, 128], [2, 2], 1, 32, [1.64, 2.95, 3.49, 1]),
  tile([128, 128], [2, 2], 1, 16, [1.57, 0.52, 3.21, 1]),
  tile([64, 96], [2, 3], 2, 16, [1.44, 1.18, 4.42, 2]), // 4096×384 with a depth of 384 takes 34 µs in 256 of these, 40 in 96 tiles of 128×128
  tile([64, 64], [2, 2], 1, 16, [0.88, 0.48, 3.3, 6]),
  tile([64, 64], [2, 2], 2, 16, [0.93, 0.84, 3.07, 2]),
  tile([64, 32], [1, 1], 1, 32, [0.67, 0.51, 2.34, 3]),
  tile([32, 32], [1, 1], 1, 16, [0.33, 0.14, 2.74, 8]),
  tile([32, 32], [1, 1], 2, 32, [0.64, 0.61, 2.81, 5]),
  tile([16, 16], [1, 1], 16, 16, [0.93, 1.11, 3.3, 2]),
];

export const threadsOf = (t: Tile): number => t.m * t.n / (16 * t.high * t.wide); // of a slice
/** The rows of a slice's slabs, of four m or n each. Threads that are neighbours write to both of two slices: four rows more make that different banks. */
export const slabRows = ({ m, n, slices }: Tile): number => (m + n) / 4 + (slices === 2 ? 4 : 0);
const bytesOf = (t: Tile) => 16 * (t.depth + 1) * slabRows(t) * t.slices;

/** Whether the device has enough threads and workgroup memory for a tile. */
function fits(t: Tile): boolean {
  const { limits } = gpu().info;
  return threadsOf(t) * t.slices <= limits.maxComputeInvocationsPerWorkgroup &&
    bytesOf(t) <= limits.maxComputeWorkgroupStorageSize;
}

/**
 * How many slabs of a slice are fetched together. For f16 it is two, so that 128 bytes of a row are read at a time (4096³ takes an H100 3.0 ms instead of
 * 3.4).
 */
export const slabsAhead = (halves: boolean): number => halves ? 2 : 1;

/**
 * The period of a tile along k: after so many steps all slices have taken the same number of slabs and, if there are several slices, used all that they have
 * fetched. A depth that is a multiple of it needs no `tail`.
 */
export const turnOf = (t: Tile, halves: boolean): number =>
  t.depth * t.slices * (t.slices > 1 ? slabsAhead(halves) : 1);

/** The tiles that the device can run, by index. */
export function fittingTiles(): number[] {
  return TILES.flatMap((t, i) => fits(t) ? [i] : []);
}

/** What the choice of a tile depends on, besides the device. */
export interface Size {
  rows: number;
  columns: number;
  depth: number;
  batches: number;
  /** Whether the product may be cut into pieces along k. */
  cut: boolean;
  /** Whether operands are f16 and read as such. */
  halves: boolean;
}

/** The index of a tile, and the depth of the pieces that the product is cut into along k. */
export interface Choice {
  tile: number;
  part: number;
}

/**
 * The first tile that two products may share. With earlier ones, two kernels joined need more registers than one: 2048×128×512 takes an H100 51 µs in tile 3,
 * 29 in tile 4.
 */
const FIRST_SHARED = 4;

/**
 * The least depth of a piece of a product that is cut along k; and, on software drivers, the largest: they stop a thread after 65,535 iterations, and longer
 * sums lose digits.
 */
const LEAST_PIECE = 64, MOST_STEPS = 2 ** 14;

/** The tile for a product, and its pieces. */
export const choose = (size: Size): Choice => cheapest(waysOf(size));

/** `groups` workgroups, each of which takes `depth` steps of k. */
interface Groups {
  groups: number;
  depth: number;
}

/** A way to compute a product: its choice, the workgroups of its launch, and the expected microseconds: of adding up the pieces (`more`), and in all. */
interface Way extends Choice, Groups {
  more: number;
  expected: number;
}

const cheapest = (ways: Way[]) => ways.reduce((best, way) => way.expected < best.expected ? way : best);

function waysOf({ rows, columns, depth, batches, cut, halves }: Size): Way[] {
  const { isSoftware, tuning } = gpu().info, ways: Way[] = [];
  const steps = Math.max(1, depth); // with nothing to sum, tiles are still filled with zeros
  if (isSoftware && !cut && depth > 16 * MOST_TURNS) { // 16: the least depth of a slab
    throw new RangeError(
      `matmul: a software adapter sums at most ${16 * MOST_TURNS} products in a batch or with a bias, got ${depth}`,
    );
  }
  for (const [tile, t] of TILES.entries()) {
    if (!fits(t) || tile !== (overrides.tile ?? tile)) continue;
    const tiles = Math.ceil(rows / t.m) * Math.ceil(columns / t.n) * batches, turn = turnOf(t, halves);
    const add = (pieces: number) => {
      const part = Math.ceil(steps / pieces / turn) * turn, count = Math.ceil(steps / part), groups = tiles * count;
      if (ways.some((way) => way.tile === tile && way.part === Math.min(part, depth))) return;
      // a second launch reads the sums of the pieces again
      const more = count > 1 ? 3.5 + 0.22 * count + 1.6e-6 * count * rows * columns : 0, each = Math.min(part, steps);
      const expected = more + (tuning?.tiles[tile] ?? 1) * expectedTime(t, [{ groups, depth: each }]);
      ways.push({ tile, part: Math.min(part, depth), groups, depth: each, more, expected });
    };
    if (cut && overrides.pieces) {
      add(overrides.pieces);
      continue;
    }
    add(isSoftware && cut ? Math.ceil(steps / MOST_STEPS) : 1);
    // as many pieces as fill the multiprocessors one to four times
    for (let waves = 1; cut && !isSoftware && waves <= 4; waves++) {
      const pieces = Math.min(Math.floor(MULTIPROCESSORS * waves / tiles), Math.floor(depth / LEAST_PIECE));
      if (pieces > 1) add(pieces);
    }
  }
  return ways;
}

/** The same for two products that share a launch, and therefore a tile; null if two launches are as good. */
export function chooseShared(...sizes: [Size, Size]): [Choice, Choice] | null {
  const { isSoftware, tuning } = gpu().info, [a, b] = sizes.map(waysOf);
  if (!(overrides.shared ?? !isSoftware)) return null; // on a CPU, compiling a kernel for each pair costs more than the launches
  let best: [Choice, Choice] | null = null;
  let least = overrides.shared ? Infinity : cheapest(a).expected + cheapest(b).expected;
  for (const x of a) {
    for (const y of b) {
      if (x.tile !== y.tile || x.tile < FIRST_SHARED && !overrides.shared) continue;
      const expected = x.more + y.more + (tuning?.tiles[x.tile] ?? 1) * expectedTime(TILES[x.tile], [x, y]);
      if (expected < least || best === null && least === Infinity) [best, least] = [[x, y], expected];
    }
  }
  return best;
}

const expectedTime = (t: Tile, all: Groups[]) => gpu().info.isSoftware ? softwareTime(t, all) : deviceTime(t, all);

/** The time that the model expects of a product in one tile: microseconds on the device that it was fitted to; infinite if the tile is never chosen. */
export function expectedOf(tile: number, rows: number, columns: number, depth: number): number {
  const { m, n } = TILES[tile];
  return expectedTime(TILES[tile], [{ groups: Math.ceil(rows / m) * Math.ceil(columns / n), depth }]);
}

// a core computes one tile at a time: the time grows with the area, and falls the more often each value read is used
function softwareTime(t: Tile, all: Groups[]): number {
  return t.slices > 1 || t.depth > 16 || t.m < 32 || t.m !== t.n
    ? Infinity
    : all.reduce((sum, { groups }) => sum + groups, 0) * t.m * t.n * (t.high === 2 ? 1 : 1.6);
}

/**
 * Microseconds on the device that the model was fitted to. The model errs by 8 %: its choice of tile and pieces takes 1.007 times as long as the best one
 * on average over the 54 products, 1.08 times at worst. Groups of different depths count as groups of their mean depth, but the launch takes at
 * least as long as the slowest kind alone.
 */
function deviceTime({ depth: slab, slices, time }: Tile, all: Groups[]): number {
  const waves = (groups: number, turns: number) => {
    const each = Math.ceil(groups / MULTIPROCESSORS);
    const wave = (n: number) => n && turns * Math.max(time.turn, n * time.work) + time.ends;
    return 1.2 + Math.floor(each / time.together) * wave(time.together) + wave(each % time.together);
  };
  let groups = 0, work = 0, slowest = 0;
  for (const one of all) {
    const turns = Math.ceil(one.depth / slab / slices);
    groups += one.groups;
    work += one.groups * turns;
    slowest = Math.max(slowest, waves(one.groups, turns));
  }
  return all.length === 1 ? slowest : Math.max(slowest, waves(groups, work / groups));
}
