/** Operands of matrix products, and their epilogues: what can follow a product without a pass of its own. */
import { type Element, lanes, vectorOf } from "./elementwise.ts";
import type { BufferType } from "./gpu/kernel.ts";
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

/** How a kernel reads an operand: by vec4s along k ("k") or along m or n ("x"), or element by element with any strides ("s"). */
export type Mode = "k" | "x" | "s";

/** The elements of both operands, and how they are read. */
export interface Operands {
  a: Element;
  aMode: Mode;
  b: Element;
  bMode: Mode;
}

// deno-fmt-ignore
const NAMES = ["rows", "columns", "depth", "whole", "batches", "aOffset", "aBatch", "aK", "aAcross", "bOffset", "bBatch", "bK", "bAcross", "cOffset"];
/**
 * The parameters of a product's kernel. `whole`: the depth of which `batches` pieces of `depth` are computed. `aK` and `aAcross`: from one element of A to the
 * next along k, and along m.
 */
export const PARAMS: Record<string, "u32"> = Object.fromEntries(NAMES.map((name) => [name, "u32"]));

/** A vector or matrix that lies without gaps. */
export interface Plain {
  memory: Memory;
  element: Element;
}

/** What follows a product, in this order. Matrices lie as C does, with C's element. */
export interface Epilogue {
  /** Added to every row. */
  bias?: Plain;
  /** C becomes f(product + bias); `before` keeps product + bias where f's slope needs it. */
  activation?: { name: Activation; before: Memory | null };
  /** C becomes product·f'(of), with what f's slope is a function of. */
  slope?: { name: Activation; of: Memory };
  /** Added: a residual. */
  plus?: Memory;
  /** Whether the old content of C and `sums` is added. */
  add?: boolean;
  /** Where the sums of A's rows go, batch after batch. */
  sums?: Plain;
}

/** The choices of an epilogue that are compiled in; `wide`: C is written by vec4s. */
export function epilogueKey(c: Element, wide: boolean, { bias, activation, slope, plus, add, sums }: Epilogue): string {
  const after = slope ? "slope" : activation?.before ? "before" : "none";
  return `${c}/${wide ? "wide" : "narrow"}/${bias?.element ?? "none"}/${after}/${
    (activation ?? slope)?.name ?? "none"
  }/${plus ? "plus" : "none"}/${add ? "add" : "none"}/${sums?.element ?? "none"}`;
}

/** What an epilogue binds, C among it. */
export function epilogueMemories(c: Memory, { bias, activation, slope, plus, sums }: Epilogue): Record<string, Memory> {
  const buffers: Record<string, Memory> = { c }, beside = slope?.of ?? activation?.before;
  if (bias) buffers.bias = bias.memory;
  if (beside) buffers.beside = beside;
  if (plus) buffers.plus = plus;
  if (sums) buffers.sums = sums.memory;
  return buffers;
}

/** The pieces of a kernel that end a product. They need `c_base`, where the batch of C begins, and `params` rows and columns. */
export interface EpilogueCode {
  buffers: Record<string, BufferType>;
  head: string;
  /** In front of the rows of column `n` (a multiple of 4, of which the column exists). */
  column: string;
  /**
   * What rows read, by name, so that all reads can begin at once: one after the other, those of a residual or a slope took 30 µs of 170 (4096×384 on an
   * H100).
   */
  reads: string[];
  /** What one of these holds at columns n to n + 3 of row `m`, or of the last row where there is no row `m`. */
  read: (name: string, m: string) => string;
  /** Finishes columns n to n + 3 of row `m` from their product `x` and what `got` says was read. */
  row: (m: string, x: string, got?: (name: string) => string) => string;
  /** Writes the sum of A's row `m`, which the epilogue wants. */
  sum: (m: string, x: string) => string;
  /** Whether it wants the sums of A's rows. */
  sums: boolean;
  /** Whether a row's code is long: written out for each row of a thread it takes longer to fetch than to run (GELU of 2048×512: 41 µs, in a loop 24, on an H100). */
  long: boolean;
}

/** The code for what `epilogueKey` named. */
export function epilogueCode(key: string): EpilogueCode {
  const [c, cWide, bias, after, activation, plus, add, sums] = key.split("/");
  const wide = cWide === "wide", has = (x: string) => x !== "none";
  const buffer = (access: "read" | "write"): BufferType => `${access} ${wide ? vectorOf[c as Element] : c as Element}`;
  const f = has(activation) ? ACTIVATIONS[activation as Activation] : null;
  const reads = [...after === "slope" ? ["beside"] : [], ...has(plus) ? ["plus"] : [], ...has(add) ? ["c"] : []];
  // one vec4 of a row (or what of it there is) from column n on
  const reader = (name: string) =>
    `fn read_${name}(base: u32, m: u32, n: u32) -> vec4f {
  let row = base + min(m, params.rows - 1u) * params.columns;
  ${
      wide ? `return vec4f(${name}[(row + n) / 4u]);` : `let end = row + params.columns - 1u;
  return vec4f(${lanes.map((_, j) => `f32(${name}[min(row + n + ${j}u, end)])`).join(", ")});`
    }
}`;
  const read = (name: string, m: string) => `read_${name}(c_base, ${m}, n)`;
  const write = (name: string, x: string) =>
    wide
      ? `${name}[at / 4u] = ${vectorOf[c as Element]}(${x});`
      : lanes.map((l, j) => `if (n + ${j}u < params.columns) { ${name}[at + ${j}u] = ${c}(${x}.${l}); }`).join(" ");
  const map = (g: string, x: string) => `vec4f(${lanes.map((l) => `${g}(${x}.${l})`).join(", ")})`;
  return {
    buffers: {
      ...has(bias) ? { bias: `read ${bias as Element}` as const } : {},
      ...has(after) ? { beside: buffer(after === "before" ? "write" : "read") } : {},
      ...has(plus) ? { plus: buffer("read") } : {},
      c: buffer("write"),
      ...has(sums) ? { sums: `write ${sums as Element}` as const } : {},
    },
    head: `${f ? `${MATH}\nfn activated(a: f32) -> f32 { return ${after === "slope" ? f.slope : f.value}; }` : ""}
${reads.map(reader).join("\n")}`,
    column: has(bias)
      ? `let bias4 = vec4f(${lanes.map((_, j) => `f32(bias[min(n + ${j}u, params.columns - 1u)])`).join(", ")});`
      : "",
    reads,
    read,
    row: (m, x, got = (name) => read(name, m)) =>
      `if (${m} < params.rows) {
          let at = c_base + ${m} * params.columns + n;
          var result = ${x}${has(bias) ? " + bias4" : ""};
          ${after === "before" ? write("beside", "result") : ""}
          ${
        !f
          ? ""
          : after === "slope"
          ? `let of4 = ${got("beside")}; result *= ${map("activated", "of4")};`
          : `result = ${map("activated", "result")};`
      }
          ${has(plus) ? `result += ${got("plus")};` : ""}
          ${has(add) ? `result += ${got("c")};` : ""}
          ${write("c", "result")}
        }`,
    sum: (m, x) =>
      `if (${m} < params.rows) { let at = batch * params.rows + ${m}; sums[at] = ${sums}(${x}${
        has(add) ? " + f32(sums[at])" : ""
      }); }`,
    sums: has(sums),
    long: activation === "gelu",
  };
}
