/**
 * Layer norm and RMS norm of rows: y = (x − mean)·rstd·weight + bias. For RMS norm the mean is 0 and there is no bias. The forward pass keeps two numbers per
 * row: mean and rstd, the reciprocal of the standard deviation.
 */
import { type Element, numbers, vectorOf } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { later } from "./gpu/joined.ts";
import { type BufferType, variants } from "./gpu/kernel.ts";
import { type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { columnReader, planRow, rowBuffer, rowCode, type RowPlan } from "./row.ts";

/** Compile-time choices. `layer`: a layer norm, else an RMS norm. */
interface Variant {
  layer: boolean;
  element: Element;
  plan: RowPlan;
}

const nameOf = ({ layer }: Variant) => layer ? "layerNorm" : "rmsNorm";

const forwardKernel = variants((v: Variant) => {
  const { layer, element, plan } = v;
  const { head, begin, each, sum } = rowCode(plan, { x: element }, { y: element });
  return {
    name: nameOf(v),
    buffers: {
      x: rowBuffer("read", element),
      weight: rowBuffer("read", element),
      ...layer ? { bias: rowBuffer("read", element) } : {},
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
  let about = ${sum("part", "f32")} / width;
  var parts = vec2f(0.0); // the mean of x − about is what rounding has taken from the mean
  ${each("let c4 = select(vec4f(0.0), x4 - about, live4); parts += vec2f(sum_of(c4), dot(c4, c4));")}
  let means = ${sum("parts", "vec2f")} / width;
  let rest = means.x;
  let mean = about + rest;
  let variance = max(means.y - rest * rest, 0.0);`
        : `var part = 0.0;
  ${each("let c4 = select(vec4f(0.0), x4, live4); part += dot(c4, c4);")}
  let mean = 0.0;
  let variance = ${sum("part", "f32")} / width;`
    }
  let rstd = 1.0 / sqrt(variance + params.eps);
  if (lane == 0u) { stats[2u * row] = mean; stats[2u * row + 1u] = rstd; }
  ${
      each(
        layer
          ? "store_y(at4, live4, ((x4 - about) - rest) * rstd * weight_at(columns4) + bias_at(columns4));"
          : "store_y(at4, live4, x4 * rstd * weight_at(columns4));",
      )
    }`,
  };
});

const forward = remembered<Launch>(), backward = remembered<Launch>(), parameterSums = remembered<Launch>();

/** y, and mean and rstd of each row in `stats` [rows, 2]. With a bias it is a layer norm, without one an RMS norm. */
export function normRows(
  b: { x: Memory; weight: Memory; bias: Memory | null; y: Memory; stats: Memory },
  element: Element,
  rows: number,
  columns: number,
  eps: number,
): void {
  const layer = b.bias !== null;
  const launch = forward(
    [layer, element, rows, columns, eps],
    () => launchOf(forwardKernel({ layer, element, plan: planRow(columns, "one") }), { rows, columns, eps }, rows),
  );
  runLaunch(launch, b);
}

// with h = (x − mean)·rstd and g = dY·weight: dX = rstd·(g − mean(g) − h·mean(g·h)) + plus; RMS leaves mean(g) out
const backwardKernel = variants((v: Variant & { plus: boolean }) => {
  const { layer, element, plan, plus } = v;
  const streams: Record<string, Element> = { x: element, d_y: element, ...plus ? { plus: element } : {} };
  const { head, begin, each, sum } = rowCode(plan, streams, { d_x: element });
  return {
    name: `${nameOf(v)} backward`,
    buffers: {
      x: rowBuffer("read", element),
      weight: rowBuffer("read", element),
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
        `store_d_x(at4, live4, rstd * (d_y4 * weight_at(columns4) - ${
          layer ? "means.x" : "0.0"
        } - (x4 - mean) * rstd * means.y)${plus ? " + plus4" : ""});`,
      )
    }`,
  };
});

/**
 * A workgroup sums COLUMNS columns over at most ROWS rows, or over a 64th of more than 64·ROWS. Up to ROWS rows take one launch: 10 µs for 2048×128 on an
 * H100; pieces of 64 rows and a second launch for their sums took 13.
 */
const COLUMNS = 8, ROWS = 4096;

/** Which parameters' sums a kernel writes. */
interface Sums {
  element: Element;
  weight: boolean;
  bias: boolean;
}

// dWeight = Σ dY·h and dBias = Σ dY of eight columns, over all rows or a piece of them; a lane has the loads of eight rows under way at once
const pieceKernel = variants((v: Sums & { wide: boolean; threads: number; cut: boolean }) => {
  const { element, weight, bias, wide, threads, cut } = v;
  const across = wide ? COLUMNS / 4 : COLUMNS, along = threads / across;
  const kind = wide ? "vec4f" : "f32", as = wide ? vectorOf[element] : element, turns = numbers(8);
  const buffer: BufferType = `read ${as}`, written: BufferType = `write ${as}`;
  return {
    name: "norm parameters backward",
    buffers: {
      x: buffer,
      stats: "read f32",
      dY: buffer,
      ...cut ? { pieceSums: `write ${kind}` as const } : {},
      ...weight ? { dWeight: written } : {},
      ...bias ? { dBias: written } : {},
    },
    params: { rows: "u32", columns: "u32", piece: "u32", tiles: "u32", pieces: "u32" },
    workgroup: threads,
    head: `var<workgroup> meeting: array<array<${kind}, 2>, ${threads}>;`,
    main: `if (group >= params.tiles * params.pieces) { return; }
  let columns = params.columns / ${wide ? 4 : 1}u;
  let column = group % params.tiles * ${across}u + lane % ${across}u;
  let at = min(column, columns - 1u);
  let piece = group / params.tiles;
  let end = min((piece + 1u) * params.piece, params.rows);
  var slope = ${kind}(0.0);
  var sum = ${kind}(0.0);
  for (var row = piece * params.piece + lane / ${across}u; row < end; row += ${turns.length * along}u) {
    ${
      turns.map((t) =>
        `let row${t} = min(row + ${t * along}u, end - 1u);
    let x${t} = ${kind}(x[row${t} * columns + at]); let g${t} = ${kind}(d_y[row${t} * columns + at]);
    let mean${t} = stats[2u * row${t}]; let rstd${t} = stats[2u * row${t} + 1u];`
      ).join("\n    ")
    }
    ${
      turns.map((t) =>
        `if (row + ${t * along}u < end) { slope += g${t} * (x${t} - mean${t}) * rstd${t}; sum += g${t}; }`
      ).join("\n    ")
    }
  }
  meeting[lane][0] = slope;
  meeting[lane][1] = sum;
  for (var half = ${along / 2}u; half > 0u; half /= 2u) { // a tree adds the lanes of each column
    workgroupBarrier();
    if (lane < half * ${across}u) {
      meeting[lane][0] += meeting[lane + half * ${across}u][0];
      meeting[lane][1] += meeting[lane + half * ${across}u][1];
    }
  }
  if (lane >= ${across}u || column >= columns) { return; }
  ${
      cut
        ? `let to = 2u * piece * columns + column;
  piece_sums[to] = meeting[lane][0];
  piece_sums[to + columns] = meeting[lane][1];`
        : ""
    }
  ${weight ? `d_weight[column] = ${as}(meeting[lane][0]);` : ""}
  ${bias ? `d_bias[column] = ${as}(meeting[lane][1]);` : ""}`,
  };
});

// both parameters' sums over the pieces
const parameterKernel = variants(({ element, weight, bias }: Sums) => ({
  name: "norm parameters sum",
  buffers: {
    pieceSums: "read f32",
    ...weight ? { dWeight: `write ${element}` as const } : {},
    ...bias ? { dBias: `write ${element}` as const } : {},
  },
  params: { columns: "u32", pieces: "u32" },
  main: `if (thread >= params.columns) { return; }
  var sum = vec2f(0.0);
  for (var piece = 0u; piece < params.pieces; piece++) {
    let at = 2u * piece * params.columns + thread;
    sum += vec2f(piece_sums[at], piece_sums[at + params.columns]);
  }
  ${weight ? `d_weight[thread] = ${element}(sum.x);` : ""}
  ${bias ? `d_bias[thread] = ${element}(sum.y);` : ""}`,
}));

/**
 * Gradients of a norm, as far as there is memory for them. `plus` is added to dX. Those of the parameters may be computed later (see `later`): `hold` keeps x,
 * stats and dY until the function that it returns is called.
 */
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
  hold: () => () => void,
): void {
  if (b.dX) {
    const plus = b.plus !== null;
    const launch = backward(
      [layer, element, plus, rows, columns],
      () => launchOf(backwardKernel({ layer, element, plan: planRow(columns, "two"), plus }), { rows, columns }, rows),
    );
    runLaunch(launch, b);
  }
  const which = { weight: b.dWeight !== null, bias: b.dBias !== null };
  if (!which.weight && !which.bias) return;
  const pieces = Math.max(1, Math.min(64, Math.ceil(rows / ROWS))), cut = pieces > 1;
  const launch = parameterSums([element, rows, columns, which.weight, which.bias], () => {
    const { isSoftware, limits: { maxComputeInvocationsPerWorkgroup: fit } } = gpu().info;
    const threads = isSoftware ? 64 : Math.min(512, fit), tiles = Math.ceil(columns / COLUMNS);
    const written = cut ? { weight: false, bias: false } : which;
    const kernel = pieceKernel({ element, wide: columns % 4 === 0, threads, cut, ...written });
    return launchOf(kernel, { rows, columns, piece: Math.ceil(rows / pieces), tiles, pieces }, tiles * pieces);
  });
  if (!cut) return later(launch, b, hold());
  using pieceSums = gpu().pool.take(8 * pieces * columns);
  runLaunch(launch, { ...b, pieceSums });
  parameterKernel({ element, ...which }).run({ ...b, pieceSums }, { columns, pieces }, Math.ceil(columns / 256));
}
