/** The numbers that differ between adapters: their definition and checks. `kernels/autotune.ts` measures them. */
import { checkNumber, checkOptions, describe } from "../check.ts";

/** Multiprocessors of an H100, the GPU to which the choice of tiles and pieces of matrix products was fitted. */
export const MULTIPROCESSORS = 132;

/** How many matrices a kernel keeps rows of in registers. */
export type RowWork = "one" | "two";

/** How a device processes rows, for one kind of work. */
export interface RowLimits {
  /** The most threads that share a row. */
  threads: number;
  /** The most vec4s of each matrix that a thread keeps in registers; each loop reads the rest of the row again. */
  quads: number;
}

/** Numbers that differ between adapters. They determine the order of summation: runs repeat bit for bit with the same numbers, so checkpoints store them. */
export interface Tuning {
  /** How rows are processed, by the kind of work. */
  rows: Record<RowWork, RowLimits>;
  /** The time that matrix products take in each of the engine's tiles, divided by the expected time. */
  tiles: number[];
}

/** What tests and the measurement of the tuning can prescribe; null where the engine decides. */
export interface Overrides {
  /** How rows are processed, and whether their threads meet in subgroups. */
  rows: RowLimits | null;
  subgroups: boolean | null;
  /** Of matrix products: the index of the tile, and the number of pieces along k. */
  tile: number | null;
  pieces: number | null;
  /** Whether products read their operands element by element; false: as vec4s where possible. */
  scalar: boolean | null;
  /** Whether two products share a launch. */
  shared: boolean | null;
  /** Whether attention's kernels are written as for GPUs. */
  unrolled: boolean | null;
  /** Whether launches wait for others (see `gathered`). */
  gather: boolean | null;
}

/** The overrides of now. */
export const overrides: Overrides = {
  rows: null,
  subgroups: null,
  tile: null,
  pieces: null,
  scalar: null,
  shared: null,
  unrolled: null,
  gather: null,
};

/** Throws unless this is a tuning, of any adapter. */
export function checkTuning(op: string, tuning: Tuning): void {
  checkOptions(op, tuning, ["rows", "tiles"]);
  const works = ["one", "two"] as const;
  checkOptions(`${op}.rows`, tuning.rows, works);
  for (const work of works) {
    const limits = tuning.rows[work], name = `${op}.rows.${work}`;
    checkOptions(name, limits, ["threads", "quads"]);
    const { threads, quads } = limits;
    checkNumber(name, "threads", threads, { integer: true, min: 4, max: 1024 });
    if (!Number.isInteger(Math.log2(threads))) {
      throw new RangeError(`${name}: threads must be a power of two, got ${threads}`);
    }
    checkNumber(name, "quads", quads, { integer: true, min: 0, max: 16 });
  }
  if (!Array.isArray(tuning.tiles)) {
    throw new TypeError(`${op}: tiles must be an array of numbers, got ${describe(tuning.tiles)}`);
  }
  for (const factor of tuning.tiles) checkNumber(op, "tiles", factor, { above: 0 });
}
