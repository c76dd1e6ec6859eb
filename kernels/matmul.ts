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
import type { Memory } from "./gpu/memory.ts";
import { type Launch, pairOf } from "./gpu/pair.ts";
import { tileKernel } from "./matmul_kernel.ts";
import { TENSOR_DEPTH, tensorKernel, tensorTile } from "./tensor_cores.ts";
import { type Choice, choose, chooseShared, matmulTuning, remembered, TILES, turnOf } from "./tiles.ts";

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
}

/** In which of the three ways an operand can be read, `w` elements at a time. */
function modeOf(x: Strided, w: number, k: number, across: number, size: number, depth: number): Mode {
  if (((x.offset ?? 0) | x.batch) % w !== 0) return "s";
  if (k === 1 && across % w === 0 && depth % w === 0) return "k";
  if (across === 1 && k % w === 0 && size % w === 0) return "x";
  return "s";
}

const sumPieces = variants(({ element, sums, add }: { element: Element; sums: Element | null; add: boolean }) => {
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
  sums: Launch | null;
}

/** How the kernels read a product's operands, and what the choice of its tile depends on. */
function reading({ a, b, c, rows, columns, depth, batches = 1, epilogue = {} }: Product) {
  const { bias, activation, slope, plus } = epilogue, cOffset = c.offset ?? 0;
  // compilers for CPUs take half a second for each variant and gain little from vec4s and long bodies: there, one variant serves all strides
  const scalar = matmulTuning.scalar ?? gpu().info.isSoftware, wide = !scalar && columns % 4 === 0 && cOffset % 4 === 0;
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
    const hasTail = (turn: number) => depth % turn > 0 || last % turn > 0;
    const tile = TILES[choice.tile], unrolled = !gpu().info.isSoftware;
    const { m, n } = tensors ? { m: tensors.side, n: tensors.side } : tile;
    return {
      kernel: tensors
        ? tensorKernel({ ...operands, size: tensors.side, tail: hasTail(TENSOR_DEPTH), epilogue })
        : tileKernel({
          ...operands,
          tile: choice.tile,
          unrolled,
          halves,
          tail: hasTail(turnOf(tile, halves)),
          epilogue,
        }),
      params,
      workgroups: Math.ceil(rows / m) * Math.ceil(columns / n) * batches,
    };
  };
  if (part === depth) {
    return { launch: launch(params, shapeOf(c.element, wide, epilogue)), sums: null };
  }
  const size = rows * columns, pieces = Math.ceil(depth / part);
  const cut = { depth: part, whole: depth, batches: pieces, aBatch: part * a.column, bBatch: part * b.row, cOffset: 0 };
  const partial = { sums: sums && { ...sums, element: "f32" as const } };
  return {
    launch: launch({ ...params, ...cut }, shapeOf("f32", !scalar && columns % 4 === 0, partial)),
    sums: {
      kernel: sumPieces({ element: c.element, sums: sums?.element ?? null, add: add ?? false }),
      params: { size, rows, pieces, cOffset },
      workgroups: Math.ceil((size + (sums ? rows : 0)) / 256),
    },
  };
}

/** The recipes of one or two products, and the function that runs both if they share a launch. */
interface Prepared {
  recipes: Recipe[];
  pair: ReturnType<typeof pairOf>;
}

const cached = remembered<Prepared>();

/** All that a recipe depends on: a training step repeats the same keys. */
function keyOf({ a, b, c, rows, columns, depth, batches, epilogue = {} }: Product): string {
  const { bias, activation, slope, plus, add, sums } = epilogue;
  const sizes = `${rows},${columns},${depth},${batches}`;
  const operands =
    `${a.element},${a.offset},${a.batch},${a.row},${a.column},${b.element},${b.offset},${b.batch},${b.row},${b.column}`;
  const before = activation?.before ? "before" : "";
  const end = `${bias?.element},${activation?.name},${before},${slope?.name},${!plus},${add},${sums?.element}`;
  return `${sizes},${operands},${c.element},${c.offset},${end};`;
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

const run = ({ kernel, params, workgroups }: Launch, buffers: Record<string, Memory>) =>
  kernel.run(buffers, params, workgroups);

/** Computes a product, or two of which neither needs the other's result: small ones then share a launch. */
export function matmul(...products: Product[]): void {
  if (products.length === 0) return;
  let key = "";
  for (const product of products) key += keyOf(product);
  const { recipes, pair } = cached(key, () => prepared(products));
  const scratch: Memory[] = [];
  const take = (floats: number) => {
    const memory = gpu().pool.take(4 * floats);
    scratch.push(memory);
    return memory;
  };
  try {
    const launched: Record<string, Memory>[] = [], summed: Record<string, Memory>[] = [];
    for (let i = 0; i < products.length; i++) {
      const { a, b, c, rows, columns, epilogue = {} } = products[i], { sums } = recipes[i];
      let to = c.memory, rowSums = epilogue.sums?.memory;
      if (sums) {
        const { pieces } = sums.params;
        to = take(pieces * rows * columns);
        summed[i] = { partial: to, c: c.memory };
        if (rowSums) {
          summed[i].sums = rowSums;
          rowSums = summed[i].partialSums = take(pieces * rows);
        }
      }
      const buffers = epilogueMemories(to, rowSums, epilogue);
      buffers.a = a.memory;
      buffers.b = b.memory;
      launched.push(buffers);
    }
    if (pair) pair(launched[0], launched[1]);
    else recipes.forEach(({ launch }, i) => run(launch, launched[i]));
    recipes.forEach(({ sums }, i) => sums && run(sums, summed[i]));
  } finally {
    for (const memory of scratch) memory.free();
  }
}
