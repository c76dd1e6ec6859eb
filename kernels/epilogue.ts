/** Operands of matrix products, and epilogues: what a product's kernel can do with its result before writing it. */
import { type Element, lanes, vec4f, vectorOf } from "./elementwise.ts";
import { type BufferType, u32s } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { type Activation, ACTIVATIONS, MATH } from "./math.ts";

/** A matrix in memory: element (i, j) of batch b at offset + b·batch + i·row + j·column. */
export interface Strided {
  memory: Memory;
  element: Element;
  offset?: number;
  batch: number;
  row: number;
  column: number;
}

/** How a kernel reads an operand: as vec4s along k ("k") or along m or n ("x"), or element by element with any strides ("s"). */
export type Mode = "k" | "x" | "s";

/** The elements of both operands, and how they are read. */
export interface Operands {
  a: Element;
  aMode: Mode;
  b: Element;
  bMode: Mode;
}

/**
 * The parameters of a product's kernel. `whole`: the product's depth, of which each of the `batches` pieces takes `depth`. `aK` and `aAcross`: the strides of
 * A along k and along m.
 */
// deno-fmt-ignore
export const PARAMS: Record<string, "u32"> =
  u32s("rows", "columns", "depth", "whole", "batches", "aOffset", "aBatch", "aK", "aAcross", "bOffset", "bBatch", "bK", "bAcross", "cOffset");

/** The beginning of a product's kernel: which batch and which tile of `m` rows by `n` columns a workgroup computes, and the depth of its sums. */
export const findTile = (m: number, n: number): string =>
  `let tiles_n = (params.columns + ${n - 1}u) / ${n}u;
  let tiles_m = (params.rows + ${m - 1}u) / ${m}u;
  let batch = group / (tiles_n * tiles_m);
  if (batch >= params.batches) { return; }
  let depth = min(params.depth, params.whole - batch * params.depth); // of pieces, the last may be shorter
  let tile_n = (group % tiles_n) * ${n}u;
  let tile_m = (group / tiles_n % tiles_m) * ${m}u;`;

/** A contiguous vector or matrix. */
export interface Plain {
  memory: Memory;
  element: Element;
}

/** What follows a product, in this order. Matrices have C's layout and element type. */
export interface Epilogue {
  /** Added to every row. */
  bias?: Plain;
  /** C becomes f(product + bias); `before` keeps product + bias if f's slope needs it. */
  activation?: { name: Activation; before: Memory | null };
  /** C becomes product·f'(of). */
  slope?: { name: Activation; of: Memory };
  /** A residual that is added. */
  plus?: Memory;
  /** Whether the old contents of C and `sums` are added. */
  add?: boolean;
  /** Where the sums of A's rows go, batch after batch. */
  sums?: Plain;
}

/** The compile-time choices of an epilogue. */
export interface EpilogueShape {
  c: Element;
  /** Whether C is written as vec4s. */
  wide: boolean;
  bias: Element | null;
  activation: Activation | null;
  /** What `beside` is for: to keep product + bias, or to read what the activation's slope is taken of. */
  beside: "before" | "slope" | null;
  plus: boolean;
  add: boolean;
  sums: Element | null;
}

/** The choices for an epilogue. */
export function shapeOf(
  c: Element,
  wide: boolean,
  { bias, activation, slope, plus, add, sums }: Epilogue,
): EpilogueShape {
  return {
    c,
    wide,
    bias: bias?.element ?? null,
    activation: (activation ?? slope)?.name ?? null,
    beside: slope ? "slope" : activation?.before ? "before" : null,
    plus: plus !== undefined,
    add: add ?? false,
    sums: sums?.element ?? null,
  };
}

/** The memories that an epilogue binds, including C and that of the sums, which may be of pieces. */
export function epilogueMemories(
  c: Memory,
  sums: Memory | undefined,
  { bias, activation, slope, plus }: Epilogue,
): Record<string, Memory> {
  const buffers: Record<string, Memory> = { c }, beside = slope?.of ?? activation?.before;
  if (bias) buffers.bias = bias.memory;
  if (beside) buffers.beside = beside;
  if (plus) buffers.plus = plus;
  if (sums) buffers.sums = sums;
  return buffers;
}

/** The pieces of a kernel that finish a product. They use `c_base`, where the batch of C begins, and the params rows and columns. */
export interface EpilogueCode {
  buffers: Record<string, BufferType>;
  head: string;
  /** Comes before the rows of column `n`, which is a multiple of 4 and exists. */
  column: string;
  /**
   * Names of the buffers that rows read, so that all reads can begin at once: one after the other, the reads of a residual or a slope took 30 of 170 µs
   * (4096×384 on an H100).
   */
  reads: string[];
  /** Reads columns n to n + 3 of row `m` from one of these buffers; of the last row if there is no row `m`. */
  read: (name: string, m: string) => string;
  /** Finishes columns n to n + 3 of row `m`, given the product `x` and the expression `got(name)` for what was read. */
  row: (m: string, x: string, got?: (name: string) => string) => string;
  /** Writes the sum of A's row `m`. */
  sum: (m: string, x: string) => string;
  /** Whether it wants the sums of A's rows. */
  sums: boolean;
}

/** The code of an epilogue. */
export function epilogueCode({ c, wide, bias, activation, beside, plus, add, sums }: EpilogueShape): EpilogueCode {
  const buffer = (access: "read" | "write"): BufferType => `${access} ${wide ? vectorOf[c] : c}`;
  const f = activation && ACTIVATIONS[activation];
  const reads = [...beside === "slope" ? ["beside"] : [], ...plus ? ["plus"] : [], ...add ? ["c"] : []];
  // four columns of a row from column n on, as far as they exist
  const reader = (name: string) =>
    `fn read_${name}(base: u32, m: u32, n: u32) -> vec4f {
  let row = base + min(m, params.rows - 1u) * params.columns;
  ${
      wide ? `return vec4f(${name}[(row + n) / 4u]);` : `let end = row + params.columns - 1u;
  return ${vec4f((_, j) => `f32(${name}[min(row + n + ${j}u, end)])`)};`
    }
}`;
  const read = (name: string, m: string) => `read_${name}(c_base, ${m}, n)`;
  const write = (name: string, x: string) =>
    wide
      ? `${name}[at / 4u] = ${vectorOf[c]}(${x});`
      : lanes.map((l, j) => `if (n + ${j}u < params.columns) { ${name}[at + ${j}u] = ${c}(${x}.${l}); }`).join(" ");
  const activated = (x: string) => vec4f((l) => `activated(${x}.${l})`);
  return {
    buffers: {
      ...bias ? { bias: `read ${bias}` as const } : {},
      ...beside ? { beside: buffer(beside === "before" ? "write" : "read") } : {},
      ...plus ? { plus: buffer("read") } : {},
      c: buffer("write"),
      ...sums ? { sums: `write ${sums}` as const } : {},
    },
    head: `${f ? `${MATH}\nfn activated(a: f32) -> f32 { return ${beside === "slope" ? f.slope : f.value}; }` : ""}
${reads.map(reader).join("\n")}`,
    column: bias ? `let bias4 = ${vec4f((_, j) => `f32(bias[min(n + ${j}u, params.columns - 1u)])`)};` : "",
    reads,
    read,
    row: (m, x, got = (name) => read(name, m)) =>
      `if (${m} < params.rows) {
          let at = c_base + ${m} * params.columns + n;
          var result = ${x}${bias ? " + bias4" : ""};
          ${beside === "before" ? write("beside", "result") : ""}
          ${
        !f
          ? ""
          : beside === "slope"
          ? `let of4 = ${got("beside")}; result *= ${activated("of4")};`
          : `result = ${activated("result")};`
      }
          ${plus ? `result += ${got("plus")};` : ""}
          ${add ? `result += ${got("c")};` : ""}
          ${write("c", "result")}
        }`,
    sum: (m, x) =>
      `if (${m} < params.rows) { let at = batch * params.rows + ${m}; sums[at] = ${sums}(${x}${
        add ? " + f32(sums[at])" : ""
      }); }`,
    sums: sums !== null,
  };
}
