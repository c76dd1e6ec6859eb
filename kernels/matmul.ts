/**
 * Matrix products C[b] = A[b]·B[b]. Operands may have any strides, so transposes cost nothing. The same kernel also does what often follows a product: bias,
 * activation, residual, the slope of an activation, and the row sums of A (the gradient of a bias, along with that of its weight).
 *
 * A product with a long k and few tiles is cut along k into several products, and a second launch adds them up. Two small products, such as the gradients of
 * a layer's input and weight, share a launch.
 */
import type { Element } from "./elementwise.ts";
import {
  type Epilogue,
  epilogueMemories,
  type EpilogueShape,
  type Mode,
  type Operands,
  type Plain,
  shapeOf,
  type Strided,
} from "./epilogue.ts";
import { gpu } from "./gpu/gpu.ts";
import { variants } from "./gpu/kernel.ts";
import { later, pairOf } from "./gpu/joined.ts";
import { type Key, type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { overrides } from "./gpu/tuning.ts";
import { tileKernel } from "./matmul_kernel.ts";
import { TENSOR_DEPTH, tensorKernel, tensorTile } from "./tensor_cores.ts";
import { type Choice, choose, chooseShared, TILES, turnOf } from "./tiles.ts";

/** c[b] = a[b]·b[b] with an epilogue; a is [rows, depth] and b [depth, columns] in each batch, and `c` is in row-major order, from `offset` on. */
export interface Product {
  a: Strided;
  b: Strided;
  c: Plain & { offset?: number };
  rows: number;
  columns: number;
  depth: number;
  batches?: number;
  epilogue?: Epilogue;
  /** Whether the result is not needed soon: if it is a sum of pieces, they may be added up later (see `later`). */
  isLate?: boolean;
}

/** In which of the three ways an operand can be read, `w` elements at a time. */
function modeOf(x: Strided, w: number, k: number, across: number, size: number, depth: number): Mode {
  if (((x.offset ?? 0) | x.batch) % w !== 0) return "s";
  if (k === 1 && across % w === 0 && depth % w === 0) return "k";
  if (across === 1 && k % w === 0 && size % w === 0) return "x";
  return "s";
}

/** Compile-time choices of the launch that adds pieces up. */
interface Pieces {
  element: Element;
  sums: Element | null;
  add: boolean;
  threads: number;
}

const sumPieces = variants(({ element, sums, add, threads }: Pieces) => {
  const join = (from: string, to: string, element: Element, at: string, i: string, size: string) =>
    `var sum = ${add ? `f32(${to}[${at}])` : "0.0"};
    for (var p = 0u; p < params.pieces; p++) { sum += ${from}[p * ${size} + ${i}]; }
    ${to}[${at}] = ${element}(sum);`;
  return {
    name: "matmul pieces",
    buffers: {
      partial: "read f32",
      c: `write ${element}`,
      ...sums ? { partialSums: "read f32" as const, sums: `write ${sums}` as const } : {},
    },
    params: { size: "u32", rows: "u32", pieces: "u32", cOffset: "u32" },
    workgroup: threads,
    main: `if (thread < params.size) {
    ${join("partial", "c", element, "params.c_offset + thread", "thread", "params.size")}
  }${
      !sums ? "" : ` else if (thread - params.size < params.rows) {
    let row = thread - params.size;
    ${join("partial_sums", "sums", sums, "row", "row", "params.rows")}
  }`
    }`,
  };
});

/** How a product is computed: in one launch, or, if it is cut into pieces along k, in one for the pieces' products and one for their sums. */
interface Recipe {
  launch: Launch;
  pieces: number;
  sums: Launch | null;
}

/** How the kernels read a product's operands, and what the choice of its tile depends on. */
function reading({ a, b, c, rows, columns, depth, batches = 1, epilogue = {} }: Product) {
  const { bias, activation, slope, plus } = epilogue, cOffset = c.offset ?? 0;
  // compilers for CPUs take half a second for each variant and gain little from vec4s and long bodies: there, one variant serves all strides and depths
  const scalar = overrides.scalar ?? gpu().info.isSoftware, wide = !scalar && columns % 4 === 0 && cOffset % 4 === 0;
  const modes = (w: number): [Mode, Mode] =>
    scalar ? ["s", "s"] : [modeOf(a, w, a.column, a.row, rows, depth), modeOf(b, w, b.row, b.column, columns, depth)];
  const eights: [Mode, Mode] = a.element === "f16" && b.element === "f16" ? modes(8) : ["s", "s"];
  const halves = !eights.includes("s"), [aMode, bMode] = halves ? eights : modes(4);
  const operands: Operands = { a: a.element, aMode, b: b.element, bMode };
  const size = { rows, columns, depth, batches, cut: !bias && !activation && !slope && !plus && batches === 1, halves };
  return { operands, size, scalar, wide, tensors: tensorTile(operands, size) };
}

function recipeOf(product: Product, how: ReturnType<typeof reading>, choice: Choice): Recipe {
  const { a, b, c, rows, columns, depth, batches = 1, epilogue = {} } = product, { sums, add } = epilogue;
  const { operands, size: { halves }, scalar, wide, tensors } = how, part = tensors?.part ?? choice.part;
  const cOffset = c.offset ?? 0;
  const params = {
    rows,
    columns,
    depth,
    whole: 2 ** 32 - 1,
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
  const launch = (params: Record<string, number>, epilogue: EpilogueShape): Launch => {
    const { depth, whole, batches } = params, last = Math.min(depth, whole - (batches - 1) * depth);
    const tile = TILES[choice.tile], unrolled = !gpu().info.isSoftware;
    const hasTail = (turn: number) => scalar || depth % turn > 0 || last % turn > 0;
    const { m, n } = tensors ? { m: tensors.side, n: tensors.side } : tile;
    const kernel = tensors
      ? tensorKernel({ ...operands, size: tensors.side, tail: hasTail(TENSOR_DEPTH), epilogue })
      : tileKernel({
        ...operands,
        tile: choice.tile,
        unrolled,
        halves,
        tail: hasTail(turnOf(tile, halves)),
        epilogue,
      });
    return launchOf(kernel, params, Math.ceil(rows / m) * Math.ceil(columns / n) * batches);
  };
  if (part === depth) {
    return { launch: launch(params, shapeOf(c.element, wide, epilogue)), pieces: 1, sums: null };
  }
  const size = rows * columns, pieces = Math.ceil(depth / part);
  const cut = { depth: part, whole: depth, batches: pieces, aBatch: part * a.column, bBatch: part * b.row, cOffset: 0 };
  const partial = { sums: sums && { ...sums, element: "f32" as const } };
  const threads = Math.min(512, gpu().info.limits.maxComputeInvocationsPerWorkgroup); // as many as a norm's sums have, to share a dispatch
  return {
    launch: launch({ ...params, ...cut }, shapeOf("f32", !scalar && columns % 4 === 0, partial)),
    pieces,
    sums: launchOf(
      sumPieces({ element: c.element, sums: sums?.element ?? null, add: add ?? false, threads }),
      { size, rows, pieces, cOffset },
      Math.ceil((size + (sums ? rows : 0)) / threads),
    ),
  };
}

/** The recipes of one or two products, and the function that runs both if they share a launch. */
interface Prepared {
  recipes: Recipe[];
  pair: ReturnType<typeof pairOf>;
}

const cached = remembered<Prepared>();

/** All that a recipe depends on. */
function keyOf({ rows, columns, depth, batches, a, b, c, epilogue = {} }: Product): Key {
  const { bias, activation, slope, plus, add, sums } = epilogue;
  // deno-fmt-ignore
  return [
    rows, columns, depth, batches, a.element, a.offset, a.batch, a.row, a.column, b.element, b.offset, b.batch, b.row, b.column, c.element, c.offset,
    bias?.element, activation?.name, !activation?.before, slope?.name, !plus, add, sums?.element,
  ];
}

function prepared(products: Product[]): Prepared {
  const ways = products.map(reading), sizes = ways.map(({ size }) => size);
  const shared = products.length === 2 && !ways.some(({ tensors }) => tensors)
    ? chooseShared(sizes[0], sizes[1])
    : null;
  const recipes = products.map((product, i) => recipeOf(product, ways[i], shared?.[i] ?? choose(sizes[i])));
  const [first, second] = recipes;
  return { recipes, pair: shared && pairOf(first.launch, second.launch) };
}

/** Computes a product, or two of which neither needs the other's result: small ones then share a launch. */
export function matmul(...products: Product[]): void {
  if (products.length === 0) return;
  const [first, second] = products, key = second ? [...keyOf(first), ...keyOf(second)] : keyOf(first);
  const { recipes, pair } = cached(key, () => prepared(products));
  const scratch: Memory[][] = products.map(() => []); // of each product's pieces
  const free = (memories: Memory[]) => memories.splice(0).forEach((memory) => memory.free());
  try {
    const launched: Record<string, Memory>[] = [], summed: Record<string, Memory>[] = [];
    for (let i = 0; i < products.length; i++) {
      const { a, b, c, rows, columns, epilogue = {} } = products[i], { pieces, sums } = recipes[i];
      let to = c.memory, rowSums = epilogue.sums?.memory;
      if (sums) {
        scratch[i].push(to = gpu().pool.take(4 * pieces * rows * columns));
        summed[i] = { partial: to, c: c.memory };
        if (rowSums) {
          summed[i].sums = rowSums;
          scratch[i].push(rowSums = summed[i].partialSums = gpu().pool.take(4 * pieces * rows));
        }
      }
      const buffers = epilogueMemories(to, rowSums, epilogue);
      buffers.a = a.memory;
      buffers.b = b.memory;
      launched.push(buffers);
    }
    if (pair) pair(launched[0], launched[1]);
    else for (let i = 0; i < launched.length; i++) runLaunch(recipes[i].launch, launched[i]);
    for (let i = 0; i < launched.length; i++) {
      const { sums } = recipes[i];
      if (sums && products[i].isLate) {
        const pieces = scratch[i].splice(0);
        later(sums, summed[i], () => free(pieces));
      } else if (sums) runLaunch(sums, summed[i]);
    }
  } finally {
    scratch.forEach(free);
  }
}
