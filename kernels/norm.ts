/**
 * Layer norm and RMS norm of rows: y = (x − mean)·rstd·weight + bias, with mean 0 and no bias for RMS. The forward pass keeps mean and rstd, two
 * numbers a row.
 */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { type Kernel, type KernelSpec, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { columnBuffer, columnReader, parsePlan, planKey, planRow, rowBuffer, rowCode } from "./row.ts";

const forwardKernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [kind, element, plan_] = key.split("/") as ["layerNorm" | "rmsNorm", Element, string];
  const plan = parsePlan(plan_), layer = kind === "layerNorm";
  const { head, begin, each, sum } = rowCode(plan, { x: element }, { y: element });
  return {
    name: kind,
    buffers: {
      x: rowBuffer("read", element),
      weight: columnBuffer(element, plan),
      ...layer ? { bias: columnBuffer(element, plan) } : {},
      y: rowBuffer("write", element),
      stats: "write f32",
    },
    params: { rows: "u32", columns: "u32", eps: "f32" },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: head + columnReader("weight", plan) + (layer ? columnReader("bias", plan) : ""),
    main: `let row = group;
  if (row >= params.rows) { return; }
  ${begin}
  let width = f32(params.columns);
  ${
      layer
        ? `var part = 0.0;
  ${each("part += sum_of(select(vec4f(0.0), x4, live4));")}
  let mean = ${sum("part", "f32")} / width;`
        : "let mean = 0.0;"
    }
  var squares = 0.0;
  ${each("let c4 = select(vec4f(0.0), x4 - mean, live4); squares += sum_of(c4 * c4);")}
  let rstd = 1.0 / sqrt(${sum("squares", "f32")} / width + params.eps);
  if (lane == 0u) { stats[2u * row] = mean; stats[2u * row + 1u] = rstd; }
  ${
      each(
        `store_y(row_base, columns4, live4, (x4 - mean) * rstd * weight_at(columns4)${
          layer ? " + bias_at(columns4)" : ""
        });`,
      )
    }`,
  };
});

/** y, and mean and 1/deviation of each row in `stats` [rows, 2]; a layer norm has a bias, an RMS norm none. */
export function normRows(
  b: { x: Memory; weight: Memory; bias: Memory | null; y: Memory; stats: Memory },
  element: Element,
  rows: number,
  columns: number,
  eps: number,
): void {
  const kind = b.bias ? "layerNorm" : "rmsNorm";
  const { bias, ...rest } = b;
  forwardKernel(`${kind}/${element}/${planKey(planRow(columns, "one"))}`).run(bias ? { ...rest, bias } : rest, {
    rows,
    columns,
    eps,
  }, rows);
}

// with h = (x − mean)·rstd and g = dY·weight: dX = rstd·(g − mean(g) − h·mean(g·h)) + plus; RMS leaves mean(g) out
const backwardKernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [kind, element, plan_, plus] = key.split("/") as ["layerNorm" | "rmsNorm", Element, string, string];
  const plan = parsePlan(plan_), layer = kind === "layerNorm";
  const streams: Record<string, Element> = { x: element, d_y: element, ...plus ? { plus: element } : {} };
  const { head, begin, each, sum } = rowCode(plan, streams, { d_x: element });
  return {
    name: `${kind} backward`,
    buffers: {
      x: rowBuffer("read", element),
      weight: columnBuffer(element, plan),
      stats: "read f32",
      dY: rowBuffer("read", element),
      ...plus ? { plus: rowBuffer("read", element) } : {},
      dX: rowBuffer("write", element),
    },
    params: { rows: "u32", columns: "u32" },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: head + columnReader("weight", plan),
    main: `let row = group;
  if (row >= params.rows) { return; }
  ${begin}
  let mean = stats[2u * row];
  let rstd = stats[2u * row + 1u];
  var part = vec2f(0.0);
  ${
      each(`let g4 = select(vec4f(0.0), d_y4 * weight_at(columns4), live4);
    part += vec2f(sum_of(g4), sum_of(g4 * (x4 - mean) * rstd));`)
    }
  let means = ${sum("part", "vec2f")} / f32(params.columns);
  ${
      each(
        `store_d_x(row_base, columns4, live4, rstd * (d_y4 * weight_at(columns4) - ${
          layer ? "means.x" : "0.0"
        } - (x4 - mean) * rstd * means.y)${plus ? " + plus4" : ""});`,
      )
    }`,
  };
});

const MEETING = "var<workgroup> meeting: array<vec2f, 256>;";
// the lanes of a column meet in a tree
const MEET = `meeting[lane] = sum;
  for (var half = 8u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (along < half) { meeting[lane] += meeting[lane + half * 16u]; }
  }`;

// dWeight = Σ dY·h and dBias = Σ dY over a piece of the rows: 16 columns by 16 lanes a workgroup
const pieceKernel: (element: Element) => Kernel = variants((element: Element): KernelSpec => ({
  name: "norm parameters backward",
  buffers: { x: `read ${element}`, stats: "read f32", dY: `read ${element}`, pieceSums: "write f32" },
  params: { rows: "u32", columns: "u32", piece: "u32", pieces: "u32", tiles: "u32" },
  head: MEETING,
  main: `if (group >= params.tiles * params.pieces) { return; }
  let tile = group % params.tiles;
  let piece = group / params.tiles;
  let column = min(tile * 16u + lane % 16u, params.columns - 1u);
  let along = lane / 16u;
  var sum = vec2f(0.0);
  let end = min((piece + 1u) * params.piece, params.rows);
  for (var row = piece * params.piece + along; row < end; row += 16u) {
    let at = row * params.columns + column;
    let g = f32(d_y[at]);
    sum += vec2f(g * (f32(x[at]) - stats[2u * row]) * stats[2u * row + 1u], g);
  }
  ${MEET}
  if (along == 0u && tile * 16u + lane < params.columns) {
    piece_sums[2u * (piece * params.columns + column)] = meeting[lane].x;
    piece_sums[2u * (piece * params.columns + column) + 1u] = meeting[lane].y;
  }`,
}));

// both parameters' sums over the pieces, likewise
const parameterKernel: (key: string) => Kernel = variants((key: string): KernelSpec => {
  const [element, weight, bias] = key.split("/") as [Element, string, string];
  return {
    name: "norm parameters sum",
    buffers: {
      pieceSums: "read f32",
      ...weight ? { dWeight: `write ${element}` as const } : {},
      ...bias ? { dBias: `write ${element}` as const } : {},
    },
    params: { columns: "u32", pieces: "u32", tiles: "u32" },
    head: MEETING,
    main: `if (group >= params.tiles) { return; }
  let column = group * 16u + lane % 16u;
  let along = lane / 16u;
  var sum = vec2f(0.0);
  for (var piece = along; piece < params.pieces; piece += 16u) {
    let at = 2u * (piece * params.columns + min(column, params.columns - 1u));
    sum += vec2f(piece_sums[at], piece_sums[at + 1u]);
  }
  ${MEET}
  if (along > 0u || column >= params.columns) { return; }
  ${weight ? `d_weight[column] = ${element}(meeting[lane].x);` : ""}
  ${bias ? `d_bias[column] = ${element}(meeting[lane].y);` : ""}`,
  };
});

/** Gradients of a norm; those without memory are left out. `plus` is added to dX. */
export function normRowsBackward(
  b: {
    x: Memory;
    weight: Memory;
    stats: Memory;
    dY: Memory;
    plus: Memory | null;
    dX: Memory | null;
    dWeight: Memory | null;
    dBias: Memory | null;
  },
  layer: boolean,
  element: Element,
  rows: number,
  columns: number,
): void {
  const { x, weight, stats, dY, plus, dX, dWeight, dBias } = b;
  if (dX) {
    const key = `${layer ? "layerNorm" : "rmsNorm"}/${element}/${planKey(planRow(columns, "two"))}/${
      plus ? "plus" : ""
    }`;
    backwardKernel(key).run({ x, weight, stats, dY, dX, ...plus ? { plus } : {} }, { rows, columns }, rows);
  }
  if (!dWeight && !dBias) return;
  const tiles = Math.ceil(columns / 16), pieces = Math.max(1, Math.min(64, Math.ceil(rows / 64)));
  const pieceSums = gpu().pool.take(8 * pieces * columns);
  const params = { rows, columns, piece: Math.ceil(rows / pieces), pieces, tiles };
  pieceKernel(element).run({ x, stats, dY, pieceSums }, params, tiles * pieces);
  parameterKernel(`${element}/${dWeight ? "weight" : ""}/${dBias ? "bias" : ""}`).run(
    {
      pieceSums,
      ...dWeight ? { dWeight } : {},
      ...dBias ? { dBias } : {},
    },
    { columns, pieces, tiles },
    tiles,
  );
  pieceSums.free();
}
