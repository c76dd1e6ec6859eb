/** Splits data into batches. */
import { checkBoolean, checkNumber, checkOptions, describe, isRecord } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { ARRAYS, type TypedArray } from "../autograd/storage.ts";
import { noGrad } from "../autograd/tape.ts";
import type { Tensor } from "../autograd/tensor.ts";
import { checkShapeArgument, tensor } from "../ops/create.ts";
import { splitmix32 } from "./splitmix.ts";

/** One field of a data set: its values row by row, and their shape [rows, …]. */
export interface Column {
  /** The values, row by row. */
  data: TypedArray;
  /** [rows, …] */
  shape: readonly number[];
}

/** Options of `batches`. */
export interface BatchOptions {
  /** Rows per batch. */
  batchSize: number;
  /** Whether rows are drawn in random order; false by default. */
  shuffle?: boolean;
  /** Seed of that order; 0 by default. */
  seed?: number;
  /** Whether a last, smaller batch is left out; false by default. */
  dropLast?: boolean;
}

/** The rows 0 … n − 1 in a random order that `seed` determines (Fisher–Yates). */
function shuffled(n: number, seed: number): Uint32Array {
  const order = Uint32Array.from({ length: n }, (_, i) => i), random = splitmix32(seed);
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/**
 * One epoch of batches, each with one tensor per field. The next batch is uploaded while the current one is used; a batch is freed when the next one is
 * taken, except for tensors that you `keep()`. Take a batch first and open the tape inside the loop.
 *
 * A batch's `size` is its number of rows. Throws a TypeError for fields of different lengths, a RangeError for a batch size below 1 and a field named `size`.
 *
 * @example
 * ```ts
 * import { init, nn } from "@limbeck/limbeck";
 *
 * await init();
 * const x = { data: new Float32Array(20), shape: [10, 2] }, y = { data: new Int32Array(10), shape: [10] };
 * for (const batch of nn.batches({ x, y }, { batchSize: 4, shuffle: true, seed: 1 })) {
 *   console.log(batch.x.shape, batch.y.shape); // [4, 2] [4], twice, then [2, 2] [2]
 * }
 * ```
 */
export function batches<K extends string>(
  columns: Record<K, Column>,
  options: BatchOptions,
): Generator<Record<K, Tensor> & { size: number }, void, void> {
  checkOptions("batches", options, ["batchSize", "shuffle", "seed", "dropLast"]);
  const { batchSize, shuffle = false, seed = 0, dropLast = false } = options;
  checkNumber("batches", "batchSize", batchSize, { integer: true, min: 1 });
  checkNumber("batches", "seed", seed, { integer: true });
  checkBoolean("batches", "shuffle", shuffle);
  checkBoolean("batches", "dropLast", dropLast);
  if (!isRecord(columns)) {
    throw new TypeError(`batches: columns must be an object of columns, got ${describe(columns)}`);
  }
  const fields = Object.entries(columns) as [K, Column][];
  if (fields.length === 0) throw new TypeError("batches: columns must have at least one field, got none");
  for (const [name, column] of fields) {
    if (name === "size") throw new RangeError("batches: no column can be named size: a batch's size is its rows");
    if (!isRecord(column)) throw new TypeError(`batches: ${name} must be a column, got ${describe(column)}`);
    if (!Object.values(ARRAYS).some((array) => column.data instanceof array)) {
      throw new TypeError(
        `batches: ${name}.data must be a Float32Array, Float16Array, Int32Array or Uint32Array, got ${
          describe(column.data)
        }`,
      );
    }
    checkShapeArgument(`batches: ${name}`, column.shape);
    if (column.shape.length === 0) throw new TypeError(`batches: ${name}.shape must start with the rows, got []`);
  }
  const rows = fields[0][1].shape[0];
  for (const [name, { data, shape }] of fields) {
    if (data.length === sizeOf(shape) && shape[0] === rows) continue;
    throw new TypeError(
      `batches: ${name} must hold ${rows} rows of values that fill its shape, got ${
        describe(data)
      } of ${data.length} for [${shape.join(", ")}]`,
    );
  }
  return cutting(fields, { batchSize, shuffle, seed, dropLast });
}

/** The batches, from checked fields and options. */
function* cutting<K extends string>(
  fields: [K, Column][],
  { batchSize, shuffle, seed, dropLast }: Required<BatchOptions>,
): ReturnType<typeof batches<K>> {
  const rows = fields[0][1].shape[0], order = shuffle ? shuffled(rows, seed) : null, epoch = {};
  const rowsOf = ({ data, shape }: Column, from: number, to: number) => {
    const width = sizeOf(shape.slice(1));
    if (!order) return data.subarray(from * width, to * width);
    const part = data.slice(0, (to - from) * width);
    for (let i = from; i < to; i++) {
      part.set(data.subarray(order[i] * width, (order[i] + 1) * width), (i - from) * width);
    }
    return part;
  };
  const upload = (from: number, to: number) => {
    const batch: Record<string, Tensor> = noGrad(() =>
      // noGrad: if there is too little memory for all fields, it frees those already made
      Object.fromEntries(fields.map(([name, column]) => {
        const shape = [to - from, ...column.shape.slice(1)];
        return [name, tensor(rowsOf(column, from, to) as TypedArray, shape)];
      }))
    );
    for (const x of Object.values(batch)) x.keep().owner = epoch;
    return batch;
  };
  const free = (batch: Record<string, Tensor> | null) => {
    for (const x of Object.values(batch ?? {})) if (x.owner === epoch) x.dispose(); // otherwise it was kept
  };
  const end = dropLast ? rows - rows % batchSize : rows;
  const at = (from: number) => from < end ? upload(from, Math.min(from + batchSize, end)) : null;
  let current: Record<string, Tensor> | null = null, next = at(0);
  try {
    for (let from = 0; next; from += batchSize) {
      current = next;
      next = at(from + batchSize);
      yield { ...current as Record<K, Tensor>, size: Math.min(batchSize, end - from) };
      free(current);
      current = null;
    }
  } finally {
    free(current);
    free(next);
  }
}
