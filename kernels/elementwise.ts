/**
 * Elementwise kernels, made from an expression: y[i] = f(a[i], b[i], …) with broadcasting.
 *
 * One factory makes the kernels of all elementwise ops and of their gradients. If every input has the output's shape or a single element, a thread computes
 * four neighbouring elements (`vec4`). Otherwise each output index is split into its dimensions.
 */
import { gpu } from "./gpu/gpu.ts";
import { type BufferType, u32s, variants } from "./gpu/kernel.ts";
import { type Launch, remembered } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { MATH, SINES_AND_POWERS } from "./math.ts";

/** How an element is stored. Arithmetic is f32 for every storage type, except that integers stay integers if the result has their type. */
export type Element = "f32" | "f16" | "i32" | "u32";

/** The WGSL type of four neighbouring elements, and the names of its components. */
export const vectorOf = { f32: "vec4f", f16: "vec4h", i32: "vec4i", u32: "vec4u" } as const;
export const lanes: string[] = [..."xyzw"];
/** WGSL for a vec4f, made of an expression for each component. */
export const vec4f = (of: (lane: string, j: number) => string): string => `vec4f(${lanes.map(of).join(", ")})`;
/** The numbers 0, 1, …, n − 1. */
export const numbers = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
/** How many elements a shape has. */
export function sizeOf(shape: readonly number[]): number {
  let size = 1;
  for (let d = 0; d < shape.length; d++) size *= shape[d];
  return size;
}
/** The strides of a contiguous array: from one element to the next along each dimension. */
export const stridesOf = (shape: readonly number[]): number[] => shape.map((_, d) => sizeOf(shape.slice(d + 1)));

/** An input: its memory and the shape that broadcasts. */
export interface Operand {
  memory: Memory;
  shape: readonly number[];
  element: Element;
}

/** The output's dimensions and each input's strides along them (0: broadcast). Neighbouring dimensions are merged if every input allows it. */
function broadcastStrides(
  shape: readonly number[],
  inputs: readonly (readonly number[])[],
): { dims: number[]; strides: number[][] } {
  const strides = inputs.map((input) => {
    let stride = 1;
    const result = new Array<number>(shape.length).fill(0);
    for (let i = input.length - 1, at = shape.length - 1; i >= 0; i--, at--) {
      if (input[i] !== 1) result[at] = stride;
      stride *= input[i];
    }
    return result;
  });
  const dims: number[] = [], merged: number[][] = inputs.map(() => []);
  for (let d = 0; d < shape.length; d++) {
    if (shape[d] === 1) continue;
    const last = dims.length - 1;
    if (last >= 0 && strides.every((s, k) => merged[k][last] === s[d] * shape[d])) {
      dims[last] *= shape[d];
      strides.forEach((s, k) => merged[k][last] = s[d]);
    } else {
      dims.push(shape[d]);
      strides.forEach((s, k) => merged[k].push(s[d]));
    }
  }
  return { dims, strides: merged };
}

const names = ["a", "b", "c", "d"];

/** Compile-time choices. */
interface Variant {
  name: string;
  expression: string;
  /** Elements of the inputs. */
  types: Element[];
  output: Element;
  /** A letter for each input, `v` (vec4s) or `s` (one element); or the rank of the strided kernel. */
  form: string | number;
}

const kernel = variants(({ name, expression, types, output, form }: Variant) => {
  const inputs = types.map((_, k) => names[k]);
  // f32 holds only 24 bits of an integer, so it stays an integer if the result has its type
  const held = (t: Element): Element => t === output && (t === "i32" || t === "u32") ? t : "f32";
  const head = `${MATH}${/\b(sin|cos|pow)_/.test(expression) ? SINES_AND_POWERS : ""}
fn apply(${inputs.map((x, k) => `${x}: ${held(types[k])}`).join(", ")}) -> ${held(output)} { return ${expression}; }`;
  if (typeof form === "string") {
    const vectors = Object.fromEntries(
      inputs.map((x, k): [string, BufferType] => [x, `read ${form[k] === "v" ? vectorOf[types[k]] : types[k]}`]),
    );
    const load = inputs.map((x, k) => {
      const element = held(types[k]), vector = vectorOf[element];
      return `let ${x}4 = ${vector}(${form[k] === "v" ? `${vector}(${x}[thread])` : `${element}(${x}[0])`});`;
    }).join(" ");
    const results = lanes.map((l) => `apply(${inputs.map((x) => `${x}4.${l}`).join(", ")})`).join(", ");
    return {
      name,
      buffers: { ...vectors, y: `write ${vectorOf[output]}` },
      params: { s0: "f32", s1: "f32", quads: "u32" },
      head,
      main: `if (thread >= params.quads) { return; }
  ${load}
  y[thread] = ${vectorOf[output]}(${vectorOf[held(output)]}(${results}));`,
    };
  }
  const buffers = Object.fromEntries(inputs.map((x, k): [string, BufferType] => [x, `read ${types[k]}`]));
  const axes = numbers(form);
  const params: Record<string, "u32" | "f32"> = { s0: "f32", s1: "f32", size: "u32" };
  for (const d of axes) params[`dim${d}`] = "u32";
  for (const x of inputs) for (const d of axes) params[`${x}${d}`] = "u32";
  const index = axes.toReversed().map((d) => `let i${d} = rest % params.dim${d}; rest /= params.dim${d};`).join(" ");
  const at = (x: string) => axes.map((d) => `i${d} * params.${x}${d}`).join(" + ");
  return {
    name,
    buffers: { ...buffers, y: `write ${output}` },
    params,
    head,
    main: `if (thread >= params.size) { return; }
  var rest = thread;
  ${index}
  y[thread] = ${output}(apply(${inputs.map((x, k) => `${held(types[k])}(${x}[${at(x)}])`).join(", ")}));`,
  };
});

const maps = remembered<Launch>();

/**
 * Runs `expression` (of a, b, c, d in the order of `inputs`, and the scalars s0, s1) over `shape` into `output`.
 * Every input must broadcast to `shape`.
 */
export function map(
  name: string,
  expression: string,
  inputs: readonly Operand[],
  output: { memory: Memory; element: Element },
  shape: readonly number[],
  scalars: readonly number[] = [],
): void {
  if (sizeOf(shape) === 0) return;
  const key: (string | number)[] = [name, expression, output.element, ...shape];
  for (const x of inputs) key.push(x.element, ...x.shape);
  const { kernel, params, workgroups } = maps(key, () => launchOfMap(name, expression, inputs, output.element, shape));
  const memories = inputs.map(({ memory }) => memory);
  kernel.runInOrder([...memories, output.memory], [scalars[0] ?? 0, scalars[1] ?? 0, ...params], workgroups);
}

/** The launch, without the scalars, which are its first parameters. */
function launchOfMap(
  name: string,
  expression: string,
  inputs: readonly Operand[],
  output: Element,
  shape: readonly number[],
): Launch {
  const size = sizeOf(shape);
  const variant = {
    name,
    expression: expression.replace(/\bs([01])\b/g, "params.s$1"),
    types: inputs.map((x) => x.element),
    output,
  };
  let form = "";
  for (const x of inputs) {
    const n = sizeOf(x.shape);
    form += n === size ? "v" : n === 1 ? "s" : "?";
  }
  if (!form.includes("?")) {
    const quads = Math.ceil(size / 4);
    return { kernel: kernel({ ...variant, form }), params: [quads], workgroups: Math.ceil(quads / 256) };
  }
  const { dims, strides } = broadcastStrides(shape, inputs.map((x) => x.shape));
  return {
    kernel: kernel({ ...variant, form: dims.length }),
    params: [size, ...dims, ...strides.flat()],
    workgroups: Math.ceil(size / 256),
  };
}

const accumulateKernel = variants((element: Element) => ({
  name: "accumulate",
  buffers: { x: `read ${element}`, total: `write ${element}` },
  params: { size: "u32" },
  main: "if (thread < params.size) { total[thread] += x[thread]; }",
}));

/** total[i] += x[i]. */
export function accumulate(total: Memory, x: Memory, size: number, element: Element): void {
  accumulateKernel(element).run({ total, x }, { size }, Math.ceil(size / 256));
}

const scaleKernel = variants(({ element, factorElement }: { element: Element; factorElement: Element }) => ({
  name: "scale",
  buffers: { factor: `read ${factorElement}`, x: `write ${element}` },
  params: { size: "u32" },
  main: `if (thread < params.size) { x[thread] = ${element}(f32(x[thread]) * f32(factor[0])); }`,
}));

/** x[i] *= factor, in place. */
export function scale(x: Memory, factor: Memory, size: number, element: Element, factorElement: Element): void {
  scaleKernel({ element, factorElement }).run({ x, factor }, { size }, Math.ceil(size / 256));
}

const copyKernel = variants(({ element, rank }: { element: Element; rank: number }) => {
  const axes = numbers(rank);
  return {
    name: "copy",
    buffers: { x: `read ${element}`, y: `write ${element}` },
    params: u32s("size", "xOffset", "yOffset", ...axes.flatMap((d) => [`dim${d}`, `x${d}`, `y${d}`])),
    main: `if (thread >= params.size) { return; }
  var rest = thread;
  var at_x = params.x_offset;
  var at_y = params.y_offset;
  ${
      axes.toReversed().map((d) =>
        `{ let i = rest % params.dim${d}; rest /= params.dim${d}; at_x += i * params.x${d}; at_y += i * params.y${d}; }`
      ).join(" ")
    }
  y[at_y] = x[at_x];`,
  };
});

/** Where the elements of a copy are: `strides` apart along its dimensions, from `offset` on. */
export interface Layout {
  strides: readonly number[];
  offset?: number;
}

/** Copies an array of shape `dims` from one layout to another; contiguous by default. */
export function copyStrided(
  x: Memory,
  y: Memory,
  element: Element,
  dims: readonly number[],
  from?: Layout,
  to?: Layout,
): void {
  const size = sizeOf(dims), contiguous = stridesOf(dims);
  const values: Record<string, number> = { size, xOffset: from?.offset ?? 0, yOffset: to?.offset ?? 0 };
  dims.forEach((dim, d) => {
    values[`dim${d}`] = dim;
    values[`x${d}`] = (from?.strides ?? contiguous)[d];
    values[`y${d}`] = (to?.strides ?? contiguous)[d];
  });
  copyKernel({ element, rank: dims.length }).run({ x, y }, values, Math.ceil(size / 256));
}

/** Copies the first `size` elements, which are all that y holds. */
export function copyFlat(x: Memory, y: Memory, element: Element, size: number): void {
  gpu().queue.renew(y);
  copyStrided(x, y, element, [size]);
}
