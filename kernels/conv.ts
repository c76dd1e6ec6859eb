/** Convolution and max pooling of images [N, C, H, W], with one thread per element of the result: of y forward, of dX backward. */
import type { Element } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { type Kernel, MOST_TURNS, spans, u32s, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

// deno-fmt-ignore
const SIZES = ["images", "channels", "height", "width", "outs", "outHeight", "outWidth", "kernelHeight", "kernelWidth", "stride", "padding"] as const;
/** Sizes of a convolution (or pooling, where `outs` is the channels): images → [images, outs, outHeight, outWidth]. */
export type ConvSizes = Record<typeof SIZES[number], number>;
// and the part of the kernel's outer loop that a launch runs
const PARAMS = u32s(...SIZES, "start", "end");

// splits `thread` into an index of [images, planes, rows, columns]
const apart = (planes: string, rows: string, columns: string) =>
  `let column = thread % params.${columns};
  let row = thread / params.${columns} % params.${rows};
  let plane = thread / (params.${columns} * params.${rows}) % params.${planes};
  let image = thread / (params.${columns} * params.${rows} * params.${planes});`;

/** Iterations of two nested loops in one of an outer loop, with those that end them. */
const turnsOf = (rows: number, columns: number) => 3 + rows * (2 + columns);

/** Runs a kernel once for each part of its loop of `count` positions, of which each takes `turns` iterations. */
function inParts(
  kernel: Kernel,
  buffers: Record<string, Memory | null>,
  s: ConvSizes,
  [count, turns]: [count: number, turns: number],
  workgroups: number,
): void {
  if (turns > MOST_TURNS && gpu().info.isSoftware) { // the driver would stop in the middle of a window without a word
    const { kernelHeight, kernelWidth } = s, most = `windows of at most about ${MOST_TURNS} pixels`;
    throw new RangeError(`${kernel.spec.name}: a software adapter takes ${most}, got ${kernelHeight}×${kernelWidth}`);
  }
  for (const [start, end] of spans(count, turns)) kernel.run(buffers, { ...s, start, end }, workgroups);
}

/** How many workgroups give each element of y, or of x, a thread. */
const forY = (s: ConvSizes) => Math.ceil(s.images * s.outs * s.outHeight * s.outWidth / 256);
const forX = (s: ConvSizes) => Math.ceil(s.images * s.channels * s.height * s.width / 256);

const forwardKernel = variants(({ element, bias }: { element: Element; bias: boolean }) => ({
  name: "conv2d",
  buffers: {
    x: `read ${element}`,
    weight: `read ${element}`,
    ...bias ? { bias: `read ${element}` as const } : {},
    y: `write ${element}`,
  },
  params: PARAMS,
  main: `if (thread >= params.images * params.outs * params.out_height * params.out_width) { return; }
  ${apart("outs", "out_height", "out_width")}
  var sum = ${bias ? "f32(bias[plane])" : "0.0"};
  if (params.start > 0u) { sum = f32(y[thread]); } // of earlier channels
  for (var c = params.start; c < params.end; c++) {
    for (var i = 0u; i < params.kernel_height; i++) {
      let h = row * params.stride + i;
      if (h < params.padding || h - params.padding >= params.height) { continue; }
      let x_row = ((image * params.channels + c) * params.height + h - params.padding) * params.width;
      let w_row = ((plane * params.channels + c) * params.kernel_height + i) * params.kernel_width;
      for (var j = 0u; j < params.kernel_width; j++) {
        let w = column * params.stride + j;
        if (w >= params.padding && w - params.padding < params.width) { sum += f32(x[x_row + w - params.padding]) * f32(weight[w_row + j]); }
      }
    }
  }
  y[thread] = ${element}(sum);`,
}));

/** y = x convolved with weight [outs, channels, kernelHeight, kernelWidth] (as a correlation), plus bias. */
export function conv2d(
  element: Element,
  x: Memory,
  weight: Memory,
  bias: Memory | null,
  y: Memory,
  s: ConvSizes,
): void {
  const kernel = forwardKernel({ element, bias: bias !== null });
  inParts(kernel, { x, weight, bias, y }, s, [s.channels, turnsOf(s.kernelHeight, s.kernelWidth)], forY(s));
}

const inputKernel = variants((element: Element) => ({
  name: "conv2d backward (x)",
  buffers: { weight: `read ${element}`, dY: `read ${element}`, dX: `write ${element}` },
  params: PARAMS,
  main: `if (thread >= params.images * params.channels * params.height * params.width) { return; }
  ${apart("channels", "height", "width")}
  var sum = 0.0;
  if (params.start > 0u) { sum = f32(d_x[thread]); }
  for (var o = params.start; o < params.end; o++) {
    for (var i = 0u; i < params.kernel_height; i++) {
      let h = row + params.padding;
      if (h < i || (h - i) % params.stride != 0u || (h - i) / params.stride >= params.out_height) { continue; }
      let y_row = ((image * params.outs + o) * params.out_height + (h - i) / params.stride) * params.out_width;
      let w_row = ((o * params.channels + plane) * params.kernel_height + i) * params.kernel_width;
      for (var j = 0u; j < params.kernel_width; j++) {
        let w = column + params.padding;
        if (w < j || (w - j) % params.stride != 0u || (w - j) / params.stride >= params.out_width) { continue; }
        sum += f32(d_y[y_row + (w - j) / params.stride]) * f32(weight[w_row + j]);
      }
    }
  }
  d_x[thread] = ${element}(sum);`,
}));

/** dX from dY. */
export function conv2dBackwardInput(element: Element, weight: Memory, dY: Memory, dX: Memory, s: ConvSizes): void {
  inParts(inputKernel(element), { weight, dY, dX }, s, [s.outs, turnsOf(s.kernelHeight, s.kernelWidth)], forX(s));
}

// one workgroup for each element of the weight; its lanes share the images' output positions
const weightKernel = variants((element: Element) => ({
  name: "conv2d backward (weight)",
  buffers: { x: `read ${element}`, dY: `read ${element}`, dWeight: `write ${element}` },
  params: PARAMS,
  workgroup: 64,
  head: "var<workgroup> meeting: array<f32, 64>;",
  main: `let j = group % params.kernel_width;
  let i = group / params.kernel_width % params.kernel_height;
  let c = group / (params.kernel_width * params.kernel_height) % params.channels;
  let o = group / (params.kernel_width * params.kernel_height * params.channels);
  if (o >= params.outs) { return; }
  let size = params.out_height * params.out_width;
  var sum = 0.0;
  for (var position = params.start + lane; position < params.end; position += 64u) {
    let image = position / size;
    let at = position % size;
    let h = at / params.out_width * params.stride + i;
    let w = at % params.out_width * params.stride + j;
    if (h < params.padding || h - params.padding >= params.height || w < params.padding || w - params.padding >= params.width) { continue; }
    let pixel = f32(x[((image * params.channels + c) * params.height + h - params.padding) * params.width + w - params.padding]);
    sum += pixel * f32(d_y[(image * params.outs + o) * size + at]);
  }
  meeting[lane] = sum;
  for (var half = 32u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) { meeting[lane] += meeting[lane + half]; }
  }
  if (lane > 0u) { return; }
  sum = meeting[0];
  if (params.start > 0u) { sum += f32(d_weight[group]); } // of earlier positions
  d_weight[group] = ${element}(sum);`,
}));

/** dWeight from dY. */
export function conv2dBackwardWeight(element: Element, x: Memory, dY: Memory, dWeight: Memory, s: ConvSizes): void {
  const positions = s.images * s.outHeight * s.outWidth,
    elements = s.outs * s.channels * s.kernelHeight * s.kernelWidth;
  inParts(weightKernel(element), { x, dY, dWeight }, s, [positions, 1 / 64], elements);
}

const poolKernel = variants((element: Element) => ({
  name: "maxPool2d",
  buffers: { x: `read ${element}`, y: `write ${element}`, chosen: "write u32" },
  params: PARAMS,
  main: `if (thread >= params.images * params.outs * params.out_height * params.out_width) { return; }
  ${apart("outs", "out_height", "out_width")}
  let base = (image * params.channels + plane) * params.height * params.width;
  var best = base + row * params.stride * params.width + column * params.stride;
  if (params.start > 0u) { best = chosen[thread]; }
  for (var i = params.start; i < params.end; i++) {
    for (var j = 0u; j < params.kernel_width; j++) {
      let at = base + (row * params.stride + i) * params.width + column * params.stride + j;
      let value = f32(x[at]);
      let is_nan = (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
      if (value > f32(x[best]) || is_nan) { best = at; }
    }
  }
  y[thread] = x[best];
  chosen[thread] = best;`,
}));

/** The largest element of each window and its position, the first one if several are equal. */
export function maxPool2d(element: Element, x: Memory, y: Memory, chosen: Memory, s: ConvSizes): void {
  inParts(poolKernel(element), { x, y, chosen }, s, [s.kernelHeight, 3 + s.kernelWidth], forY(s));
}

const poolBackwardKernel = variants((element: Element) => ({
  name: "maxPool2d backward",
  buffers: { chosen: "read u32", dY: `read ${element}`, dX: `write ${element}` },
  params: PARAMS,
  main: `if (thread >= params.images * params.channels * params.height * params.width) { return; }
  ${apart("channels", "height", "width")}
  // the windows that contain this element
  var sum = 0.0;
  if (params.start > 0u) { sum = f32(d_x[thread]); }
  let top = select(0u, (row - params.kernel_height) / params.stride + 1u, row >= params.kernel_height);
  let left = select(0u, (column - params.kernel_width) / params.stride + 1u, column >= params.kernel_width);
  for (var i = top + params.start; i < min(top + params.end, min(row / params.stride + 1u, params.out_height)); i++) {
    for (var j = left; j <= column / params.stride && j < params.out_width; j++) {
      let at = ((image * params.channels + plane) * params.out_height + i) * params.out_width + j;
      if (chosen[at] == thread) { sum += f32(d_y[at]); }
    }
  }
  d_x[thread] = ${element}(sum);`,
}));

/** dX: dY where an element was chosen. */
export function maxPool2dBackward(element: Element, chosen: Memory, dY: Memory, dX: Memory, s: ConvSizes): void {
  const [down, across] = [s.kernelHeight, s.kernelWidth].map((size) => Math.ceil(size / s.stride));
  inParts(poolBackwardKernel(element), { chosen, dY, dX }, s, [down, 3 + across], forX(s));
}
