/** The numbers that differ between adapters: their definition and checks. `kernels/autotune.ts` measures them. */
import { checkNumber, checkOptions, describe } from "../check.ts";

/** Multiprocessors of the GPU that the choice of tiles and pieces of products was fitted to, an H100. */
export const MULTIPROCESSORS = 132;

/** How many matrices a kernel keeps rows of: one, or two (or one with much arithmetic), which takes registers. */
export type RowWork = "one" | "two";

/** How rows are walked on a device, for one kind of work. */
export interface RowLimits {
  /** Most threads that share a row. */
  threads: number;
  /** Most vec4s of each matrix that a thread keeps in registers; what is beyond, each loop reads again. */
  quads: number;
}

/** Numbers that differ between adapters. They decide in which order sums are taken: runs repeat bit for bit under the same ones, and checkpoints hold them. */
export interface Tuning {
  /** By the work that a kernel does on its rows: how they are walked. */
  rows: Record<RowWork, RowLimits>;
  /** What matrix products take in each of the engine's tiles, as multiples of what is expected of them. */
  tiles: number[];
}

/** Throws unless this is a tuning, of any adapter. */
export function checkTuning(op: string, tuning: Tuning): void {
  checkOptions(op, tuning, ["rows", "tiles"]);
  const works = ["one", "two"] as const;
  checkOptions(`${op}.rows`, tuning.rows, works);
  for (const work of works) {
    const limits = tuning.rows[work], name = `${op}.rows.${work}`;
    checkOptions(name, limits, ["threads", "quads"]);
    const { threads, quads } = limits;
    checkNumber(name, "threads", threads, { integer: true, min: 32, max: 1024 });
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
