/** Makes tensors from values, constants, and random numbers. */
import { checkBoolean, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { tooLarge } from "../kernels/gpu/memory.ts";
import { fill, random } from "../kernels/random.ts";
import { nextRandom } from "../autograd/random.ts";
import { ARRAYS, BYTES, type DType, DTYPES, isFloat, Storage, type TypedArray } from "../autograd/storage.ts";
import { checkDimensions, MOST_DIMENSIONS, type NestedArray, Tensor } from "../autograd/tensor.ts";

/** Options of all functions that make tensors. */
export interface TensorOptions {
  /** The dtype; by default that of the typed array, or `f32`. */
  dtype?: DType;
  /** Whether `backward` leaves a gradient in `.grad`. */
  requiresGrad?: boolean;
}

/** Throws unless `shape` is an array of sizes. */
export function checkShapeArgument(op: string, shape: unknown): asserts shape is readonly number[] {
  if (!Array.isArray(shape)) throw new TypeError(`${op}: shape must be an array of sizes, got ${describe(shape)}`);
  checkDimensions(op, shape);
  for (const [i, n] of shape.entries()) { // holes too
    checkNumber(op, `shape[${i}]`, n, { integer: true, min: 0, below: 2 ** 32 });
  }
  if (sizeOf(shape) >= 2 ** 31) throw new RangeError(`${op}: shape [${shape.join(", ")}] has 2³¹ elements or more`);
}

/** Checks a shape before the options, because the second size of `zeros(2, 3)` is none of them. */
function checkMade(op: string, shape: readonly number[], options: TensorOptions, dtypes?: readonly DType[]): void {
  checkShapeArgument(op, shape);
  checkTensorOptions(op, options, dtypes);
}

function checkTensorOptions(op: string, options: TensorOptions, dtypes = DTYPES): void {
  checkOptions(op, options, ["dtype", "requiresGrad"]);
  const { dtype, requiresGrad } = options;
  if (dtype !== undefined && !dtypes.includes(dtype)) {
    throw new TypeError(`${op}: dtype must be one of ${dtypes.join(", ")}, got ${describe(dtype)}`);
  }
  if (requiresGrad !== undefined) checkBoolean(op, "requiresGrad", requiresGrad);
  if (dtype !== undefined) checkDType(op, dtype, requiresGrad);
}

/** Throws for a dtype that cannot have the requested gradient, or that the adapter lacks. */
export function checkDType(op: string, dtype: DType, requiresGrad = false): void {
  if (requiresGrad && !isFloat(dtype)) {
    throw new TypeError(`${op}: only f32 and f16 tensors can require a gradient, got dtype ${dtype}`);
  }
  if (dtype === "f16" && !gpu().info.f16) {
    throw new TypeError(`${op}: this adapter has no shader-f16: use f32 (init() tells: info.f16)`);
  }
}

function flatten(values: unknown, shape: number[], depth: number, out: number[]): void {
  if (typeof values === "number") {
    if (depth !== shape.length) {
      throw new TypeError(`tensor: values must be nested evenly, got a number at depth ${depth}`);
    }
    out.push(values);
    return;
  }
  if (!Array.isArray(values)) {
    throw new TypeError(
      `tensor: values must be numbers, nested arrays or a typed array (Float32Array, Float16Array, Int32Array or Uint32Array), got ${
        describe(values)
      }`,
    );
  }
  if (out.length === 0 && depth === shape.length) shape.push(values.length);
  if (shape[depth] !== values.length) {
    const first = shape[depth] ?? "a number";
    throw new TypeError(
      `tensor: values must be nested evenly: ${first} at depth ${depth} at first, then an array of ${values.length}`,
    );
  }
  if (depth === MOST_DIMENSIONS) { // such as an array that contains itself
    throw new RangeError(`tensor: values must be nested at most ${MOST_DIMENSIONS} deep`);
  }
  for (const v of values) flatten(v, shape, depth + 1, out);
}

/**
 * A tensor from a number, a flat or nested array, or a typed array (Float32Array → f32, Float16Array → f16, Int32Array → i32, Uint32Array → u32).
 *
 * The shape is that of the nesting by default: `tensor(values, shape, options)` or `tensor(values, options)`. Integer dtypes cut off fractions. Throws a
 * TypeError for ragged values or a count that does not fit the shape, a RangeError for a value that an integer dtype cannot hold and for more than
 * 12 dimensions. Source: `torch.tensor`.
 *
 * @example
 * ```ts
 * import { init, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(tensor([[1, 2], [3, 4]]).shape); // [2, 2]
 * console.log(tensor(new Int32Array([3, 1]), [2, 1]).dtype); // i32
 * ```
 */
export function tensor(
  values: NestedArray | readonly number[] | TypedArray,
  shapeOrOptions?: readonly number[] | TensorOptions,
  more?: TensorOptions,
): Tensor {
  const isShape = shapeOrOptions === undefined || Array.isArray(shapeOrOptions);
  if (!isShape && (more !== undefined || typeof shapeOrOptions === "number")) {
    const when = more === undefined ? "" : " if options follow";
    throw new TypeError(`tensor: shape must be an array of sizes${when}, got ${describe(shapeOrOptions)}`);
  }
  const [shape, options = {}] = (isShape ? [shapeOrOptions, more] : [undefined, shapeOrOptions]) as [
    readonly number[] | undefined,
    TensorOptions | undefined,
  ];
  checkTensorOptions("tensor", options);
  return uploaded("tensor", values, shape, options);
}

/** Throws if a typed array has lost its buffer: then it only seems to be empty. */
function checkAttached(op: string, values: TypedArray): void {
  try {
    if (values.length === 0) values.indexOf(0);
  } catch {
    throw new TypeError(`${op}: values must be there, got ${describe(values)} whose buffer was detached or cut short`);
  }
}

/** Throws if conversion to integers has changed more than the fraction. */
function checkHeld(op: string, numbers: ArrayLike<number>, converted: TypedArray, dtype: DType): void {
  if (isFloat(dtype)) return;
  const i = converted.findIndex((n, i) => n !== Math.trunc(numbers[i]));
  if (i >= 0) throw new RangeError(`${op}: values must fit ${dtype}, got ${numbers[i]}`);
}

/** A tensor of values. The options were checked before. */
function uploaded(
  op: string,
  values: NestedArray | readonly number[] | TypedArray,
  shape: readonly number[] | undefined,
  options: TensorOptions,
): Tensor {
  let data: TypedArray, natural: number[] = [];
  const isTyped = ArrayBuffer.isView(values);
  const given = DTYPES.find((d) => isTyped && values instanceof ARRAYS[d]);
  if (given) checkAttached(op, values as TypedArray);
  const dtype = options.dtype ?? given ?? "f32";
  if (given) {
    data = given === dtype ? values as TypedArray : ARRAYS[dtype].from(values as TypedArray);
    natural = [data.length];
    if (data !== values) checkHeld(op, values as TypedArray, data, dtype);
  } else {
    const flat: number[] = [];
    flatten(values, natural, 0, flat);
    data = ARRAYS[dtype].from(flat);
    checkHeld(op, flat, data, dtype);
  }
  if (shape !== undefined) checkShapeArgument(op, shape);
  const wanted = (shape ?? natural).map((n) => n + 0); // −0 is 0
  if (sizeOf(wanted) !== data.length) {
    throw new TypeError(`${op}: shape [${wanted.join(", ")}] needs ${sizeOf(wanted)} values, got ${data.length}`);
  }
  checkDType(op, dtype, options.requiresGrad);
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const storage = new Storage(gpu().queue.upload(bytes, options.requiresGrad === true, { op, shape: wanted }));
  if (!isFloat(dtype)) storage.host = data.slice() as TypedArray;
  const result = Tensor.owned(storage, wanted, dtype, op);
  result.requiresGrad = options.requiresGrad ?? false;
  return result;
}

/** Makes a tensor and lets `write` fill it. The options were checked before. */
function made(op: string, shape: readonly number[], options: TensorOptions, write: (x: Tensor) => void): Tensor {
  const result = Tensor.empty(shape.map((n) => n + 0), options.dtype ?? "f32", op); // −0 is 0
  try {
    write(result);
  } catch (error) { // if no scope is open, nobody else can free it
    result.dispose();
    throw error;
  }
  result.requiresGrad = options.requiresGrad ?? false;
  return result;
}

/**
 * A tensor of this shape in which every element is `value`. Throws a TypeError if the value is not a number and for a wrong dtype, a RangeError for a wrong
 * size and for a value that an integer dtype cannot hold. Source: `torch.full`.
 *
 * @example
 * ```ts
 * import { full, init } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await full([2, 2], 7).array()); // [[7, 7], [7, 7]]
 * ```
 */
export function full(shape: readonly number[], value: number, options: TensorOptions = {}): Tensor {
  if (typeof value !== "number") throw new TypeError(`full: value must be a number, got ${describe(value)}`);
  return filled("full", "value", shape, value, options);
}

/** Internal: `full`, for an op that names its argument. `value` is a number. */
export function filled(
  op: string,
  name: string,
  shape: readonly number[],
  value: number,
  options: TensorOptions,
): Tensor {
  checkMade(op, shape, options);
  if (options.dtype === "i32") checkNumber(op, name, value, { integer: true, min: -(2 ** 31), below: 2 ** 31 });
  if (options.dtype === "u32") checkNumber(op, name, value, { integer: true, min: 0, below: 2 ** 32 });
  return made(op, shape, options, (x) => fill(x.memory, value, x.size, x.dtype));
}

/**
 * A tensor of this shape with every element 0, f32 unless another dtype is given. Throws a TypeError for a wrong dtype, a RangeError for a wrong size.
 * Source: `torch.zeros`.
 *
 * @example
 * ```ts
 * import { init, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await zeros([2, 3]).array()); // [[0, 0, 0], [0, 0, 0]]
 * ```
 */
export function zeros(shape: readonly number[], options: TensorOptions = {}): Tensor {
  return filled("zeros", "value", shape, 0, options);
}

/**
 * A tensor of this shape with every element 1, f32 unless another dtype is given. Throws a TypeError for a wrong dtype, a RangeError for a wrong size.
 * Source: `torch.ones`.
 *
 * @example
 * ```ts
 * import { init, ones } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await ones([2, 3]).array()); // [[1, 1, 1], [1, 1, 1]]
 * ```
 */
export function ones(shape: readonly number[], options: TensorOptions = {}): Tensor {
  return filled("ones", "value", shape, 1, options);
}

/**
 * The numbers from `start` (0 by default) up to but excluding `end`, `step` apart (1 by default): `arange(end)` or `arange(start, end, step)`. Throws a
 * TypeError for an argument that is not a number and for a wrong dtype, a RangeError for a step of 0 or one that leads away from the end, and for numbers
 * outside of an integer dtype's range, in which fractions are cut off. Source: `torch.arange`.
 *
 * @example
 * ```ts
 * import { arange, init } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await arange(3).array(), await arange(1, 2, 0.25).array()); // [0, 1, 2] [1, 1.25, 1.5, 1.75]
 * ```
 */
export function arange(start: number, end?: number, step = 1, options: TensorOptions = {}): Tensor {
  const [from, to] = end === undefined ? [0, start] : [start, end];
  checkNumber("arange", "start", from);
  checkNumber("arange", "end", to);
  checkNumber("arange", "step", step);
  checkTensorOptions("arange", options);
  const distance = (to - from) / step, count = Math.ceil(distance); // −0 where it leads away by less than a step
  if (!(distance >= 0) || count === Infinity) {
    throw new RangeError(`arange: step must lead from ${from} to ${to}, got ${step}`);
  }
  checkNumber("arange", "the number of elements", count, { below: 2 ** 31 });
  checkBindable("arange", [count], options);
  const { dtype = "f32" } = options, values = new ARRAYS[dtype](count), last = from + (count - 1) * step;
  for (let i = 0; i < count; i++) values[i] = from + i * step;
  if (count > 0) checkHeld("arange", [from, last], ARRAYS[dtype].of(from, last), dtype);
  return uploaded("arange", values, [count], options);
}

/** Throws, before the host allocates anything, if the device cannot hold the tensor. */
function checkBindable(op: string, shape: readonly number[], { dtype = "f32" }: TensorOptions): void {
  checkShapeArgument(op, shape);
  const most = gpu().info.limits.maxStorageBufferBindingSize, bytes = BYTES[dtype] * sizeOf(shape);
  if (bytes > most) throw tooLarge(op, bytes, shape, most);
}

/**
 * The identity matrix [n, n]. Throws a TypeError for a wrong dtype, a RangeError if n is not an integer or larger than the adapter binds at once.
 * Source: `torch.eye`.
 *
 * @example
 * ```ts
 * import { eye, init } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await eye(2).array()); // [[1, 0], [0, 1]]
 * ```
 */
export function eye(n: number, options: TensorOptions = {}): Tensor {
  checkNumber("eye", "n", n, { integer: true, min: 0, below: 2 ** 31 });
  checkTensorOptions("eye", options);
  checkBindable("eye", [n, n], options);
  const values = new Float32Array(n * n);
  for (let i = 0; i < n; i++) values[i * (n + 1)] = 1;
  return uploaded("eye", values, [n, n], options);
}

function drawn(
  op: string,
  kind: "uniform" | "normal" | "integer",
  shape: readonly number[],
  options: TensorOptions,
  low = 0,
  count = 0,
): Tensor {
  return made(op, shape, options, (x) => {
    const { state, op: number, done } = nextRandom(op);
    try {
      random(kind, x.dtype, { y: x.memory, state: state.memory }, { op: number, size: x.size, low, count });
    } finally {
      done();
    }
  });
}

const REAL: readonly DType[] = ["f32", "f16"];

/**
 * Uniform random numbers in [0, 1), f32 (multiples of 2⁻²⁴) or f16 (of 2⁻¹¹), from the seed of `manualSeed`. Throws a TypeError for a wrong dtype, a
 * RangeError for a wrong size. Source of randomness: the counter-based hash pcg4d (Jarzynski & Olano 2020).
 *
 * @example
 * ```ts
 * import { init, rand } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await rand([1000]).mean().item()); // about 0.5
 * ```
 */
export function rand(shape: readonly number[], options: TensorOptions = {}): Tensor {
  checkMade("rand", shape, options, REAL);
  return drawn("rand", "uniform", shape, options);
}

/**
 * Normal random numbers with mean 0 and deviation 1 (Box & Muller 1958, from the bits of `rand`), f32 or f16, from the seed of `manualSeed`. Throws a TypeError
 * for a wrong dtype, a RangeError for a wrong size.
 *
 * @example
 * ```ts
 * import { init, randn } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await randn([1000]).square().mean().item()); // about 1
 * ```
 */
export function randn(shape: readonly number[], options: TensorOptions = {}): Tensor {
  checkMade("randn", shape, options, REAL);
  return drawn("randn", "normal", shape, options);
}

/**
 * Random integers from `low` up to but excluding `high`, i32 by default, from the seed of `manualSeed`. Throws a TypeError for a wrong dtype, a RangeError
 * for a wrong size and for a range that is empty, has 2³² numbers, or has numbers that the dtype cannot hold exactly (f16 ends at ±2¹¹, f32 at ±2²⁴).
 *
 * @example
 * ```ts
 * import { init, randint } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await randint(0, 6, [10]).data()); // ten of 0, 1, 2, 3, 4, 5
 * ```
 */
export function randint(low: number, high: number, shape: readonly number[], options: TensorOptions = {}): Tensor {
  checkMade("randint", shape, options);
  const { dtype = "i32" } = options;
  const [min, last] =
    { i32: [-(2 ** 31), 2 ** 31 - 1], u32: [0, 2 ** 32 - 1], f32: [-(2 ** 24), 2 ** 24], f16: [-2048, 2048] }[dtype];
  checkNumber("randint", "low", low, { integer: true, min, max: last });
  checkNumber("randint", "high", high, { integer: true, above: low, max: Math.min(last + 1, low + 2 ** 32 - 1) });
  return drawn("randint", "integer", shape, { ...options, dtype }, low | 0, high - low); // the kernel's low is i32: its bits
}
