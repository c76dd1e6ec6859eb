import { checkBoolean, describe, isRecord } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { enter } from "./ledger.ts";
import type { ClampOptions, GeluOptions, MatmulOptions, Operand, ReduceOptions, VarianceOptions } from "./options.ts";
import { innermost } from "./scope.ts";
import { ARRAYS, BYTES, type DType, isFloat, Storage, type TypedArray } from "./storage.ts";

/** One recorded op, as far as its result needs to know it; see `Record` in tape.ts. */
export interface Recorded {
  readonly op: string;
}

/** The most dimensions of a tensor: as many as fit into the parameters of a kernel with four operands. */
export const MOST_DIMENSIONS = 12;

/** Throws a RangeError for more dimensions than kernels support. */
export function checkDimensions(op: string, shape: readonly number[]): void {
  if (shape.length <= MOST_DIMENSIONS) return;
  throw new RangeError(`${op}: a tensor has at most ${MOST_DIMENSIONS} dimensions, got ${shape.length}`);
}

const MOST_UNSCOPED = 1000;
let warned = false;

/**
 * An n-dimensional array on the GPU: `f32`, or `f16`, `i32`, `u32`. Elements lie in row-major order.
 *
 * Make tensors with `tensor`, `zeros`, `randn` and the like. A tensor made while a tape or scope is open belongs to it; `keep()` takes it out, `dispose()`
 * frees it early. Only reading (`data`, `item`, `array`) waits for the GPU. Using a tensor that was closed, or whose device is gone, throws a TypeError.
 *
 * `requiresGrad` may be set of a leaf (a parameter with false is frozen). `backward` adds to its `grad`, a Tensor or null, which belongs to the leaf.
 *
 * @example
 * ```ts
 * import { init, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const x = tensor([1, 2, 3], { requiresGrad: true });
 * using tape = new Tape();
 * x.square().sum().backward();
 * console.log(await x.grad!.array()); // [2, 4, 6]
 * ```
 */
export class Tensor implements Disposable {
  /**
   * What the record whose backward rule is running has saved. It may be read even if it is closed.
   * @internal
   */
  static lent: readonly Tensor[] = [];
  /**
   * How many tensors were made.
   * @internal
   */
  static count: number = 0;
  /** The sizes of the dimensions. */
  readonly shape: readonly number[];
  /** How elements are stored. */
  readonly dtype: DType;
  /** The number of elements. */
  readonly size: number;
  /**
   * Its number, in the order in which tensors were made.
   * @internal
   */
  readonly number: number = Tensor.count++;
  /**
   * What will close this tensor: a scope, the leaf whose gradient it is, or an epoch of batches.
   * @internal
   */
  owner: object | null = null;
  /**
   * The op that made this tensor, if a tape recorded it.
   * @internal
   */
  record: Recorded | null = null;
  #requiresGrad = false;
  #grad: Tensor | null = null;
  #storage: Storage | null;
  #closedBy: string | null = null;
  #saves = 0;
  /**
   * Whether the tensor was made while no scope was open, and neither kept nor closed since.
   * @internal
   */
  forgotten: boolean = false;

  /**
   * Use `tensor`, `zeros` and the like.
   * @internal
   */
  constructor(storage: Storage, shape: readonly number[], dtype: DType, op: string) {
    if (!(storage instanceof Storage)) {
      throw new TypeError("Tensor: tensors are made by tensor(values, shape), zeros(shape) and the like, not by new");
    }
    this.#storage = storage;
    this.shape = shape;
    this.dtype = dtype;
    this.size = sizeOf(shape);
    storage.gpu.counters.liveTensors++;
    storage.memory.shape = shape;
    enter(this, storage.gpu, op);
  }

  /**
   * An uninitialised tensor that belongs to the innermost scope. `op` is for messages.
   * @internal
   */
  static empty(shape: readonly number[], dtype: DType, op: string): Tensor {
    checkDimensions(op, shape);
    const memory = gpu().pool.take(sizeOf(shape) * BYTES[dtype], op, shape);
    return Tensor.owned(new Storage(memory), shape, dtype, op);
  }

  /**
   * A tensor over a storage, given to the innermost scope.
   * @internal
   */
  static owned(storage: Storage, shape: readonly number[], dtype: DType, op: string): Tensor {
    const tensor = new Tensor(storage, shape, dtype, op);
    const scope = innermost();
    if (scope) scope.adopt(tensor);
    else tensor.leaveScope(op);
    return tensor;
  }

  /**
   * Counts it among the tensors that belong to no scope. `op` is for messages.
   * @internal
   */
  leaveScope(op: string): void {
    this.owner = null;
    this.forgotten = true;
    if (++this.storage.gpu.unscoped > MOST_UNSCOPED && !warned) {
      warned = true;
      console.warn(
        `limbeck: more than ${MOST_UNSCOPED} live tensors belong to no scope (the last one: ${op}). Open a Tape or a Scope around your step, or dispose() them.`,
      );
    }
  }

  /**
   * Another tensor over the same storage, with the same number of elements and no history (`reshape` has one).
   * @internal
   */
  sameMemory(shape: readonly number[], op: string): Tensor {
    checkDimensions(op, shape);
    return Tensor.owned(this.storage.retain(), shape, this.dtype, op);
  }

  /**
   * The storage; throws if the tensor was closed and no record has saved it.
   * @internal
   */
  get storage(): Storage {
    const storage = this.#storage;
    if (storage === null) throw this.#closedError("tensor");
    return storage;
  }

  #closedError(op: string): TypeError {
    return new TypeError(`${op}: this tensor of shape [${this.shape.join(", ")}] ${this.howClosed}`);
  }

  /**
   * What closed the tensor, for messages.
   * @internal
   */
  get howClosed(): string {
    return `was closed ${this.#closedBy}; keep() it if it must live longer`;
  }

  /** The memory on the GPU, for your own kernels. Throws a TypeError if the tensor was closed or is on another device. */
  get memory(): Memory {
    const { storage } = this;
    if (storage.gpu !== gpu()) {
      throw new TypeError(
        `tensor: this tensor of shape [${this.shape.join(", ")}] is on a device that was disposed or lost`,
      );
    }
    return storage.memory;
  }

  /**
   * Whether the tensor can be read, and is on the open device.
   * @internal
   */
  get isUsable(): boolean {
    return this.isReadable && this.#storage?.gpu === gpu();
  }

  /**
   * Whether the tensor is open, or lent to a backward rule.
   * @internal
   */
  get isReadable(): boolean {
    return this.#closedBy === null || Tensor.lent.includes(this);
  }

  /** Whether `backward` leaves a gradient in `.grad` (of a leaf) or passes one on (from a result). Only f32 and f16 tensors can have one. */
  get requiresGrad(): boolean {
    return this.#requiresGrad;
  }

  set requiresGrad(on: boolean) {
    checkBoolean("requiresGrad", "the value", on);
    if (on && !isFloat(this.dtype)) {
      throw new TypeError(`requiresGrad: only f32 and f16 tensors can require a gradient, got dtype ${this.dtype}`);
    }
    if (!on && this.record !== null) {
      throw new TypeError("requiresGrad: only leaves can be frozen, not the result of a recorded op; detach() it");
    }
    this.#requiresGrad = on;
  }

  /**
   * The gradient that `backward` accumulated, or null. Only leaves have one. It belongs to its leaf, as does one that you set: it is freed with the leaf, or
   * when another one or null replaces it, unless `keep()` took it out before. A gradient that was disposed of reads as null. Setting the gradient of another
   * leaf sets a view of it.
   */
  get grad(): Tensor | null {
    const grad = this.#grad;
    return grad === null || grad.#closedBy !== null ? null : grad;
  }

  set grad(gradient: Tensor | null) {
    let given = gradient ?? null;
    if (given === this.#grad) return;
    if (given !== null) {
      if (this.closed) throw this.#closedError("grad"); // nobody would free it
      checkTensor("grad", "the value", given, [this.dtype], this.shape);
    }
    if (given?.owner instanceof Tensor) given = given.sameMemory(given.shape, "grad"); // so that each leaf can free its own
    if (this.#grad?.owner === this) this.#grad.dispose();
    this.#grad = given;
    if (given && given !== this && (given.owner !== null || given.forgotten)) { // unless keep() was called on it
      given.#leaveOwner();
      given.owner = this;
    }
  }

  /** Whether the tensor can no longer be used. */
  get closed(): boolean {
    return this.#closedBy !== null;
  }

  /** The number of dimensions. */
  get rank(): number {
    return this.shape.length;
  }

  /**
   * Called by the owning scope.
   * @internal
   */
  closeWith(reason: string): void {
    this.#close(`with its ${reason}`);
  }

  #close(by: string): void {
    const storage = this.#storage;
    if (storage === null || this.#closedBy !== null) return;
    this.#closedBy = by;
    storage.gpu.ledger?.delete(this);
    this.record = null;
    this.#leaveOwner();
    storage.gpu.counters.liveTensors--;
    if (this.#grad !== null) this.grad = null;
    if (this.#saves === 0) this.#release();
  }

  #release(): void {
    this.#storage?.release();
    this.#storage = null;
  }

  /**
   * Keeps the memory for a record's backward pass, also when the tensor is closed before it.
   * @internal
   */
  save(): void {
    this.storage.saves++; // throws if it is gone
    this.#saves++;
  }

  /**
   * Ends a `save`.
   * @internal
   */
  unsave(): void {
    this.storage.saves--;
    if (--this.#saves === 0 && this.closed) this.#release();
  }

  /** Frees the tensor. If a tape has saved it, its memory stays until the tape no longer needs it. Calling it twice is allowed. */
  dispose(): void {
    this.#close("by dispose()");
  }

  /** The same as `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Takes the tensor out of its scope: it lives until `dispose()`. Returns it. */
  keep(): this {
    if (this.closed) throw this.#closedError("keep");
    this.memory; // throws if it is on another device
    this.#leaveOwner();
    return this;
  }

  #leaveOwner(): void {
    this.owner = null;
    if (this.forgotten) this.#storage!.gpu.unscoped--;
    this.forgotten = false;
  }

  /** A tensor with the same memory and no history: no gradient flows through it. */
  detach(): Tensor {
    if (!this.isReadable) throw this.#closedError("detach");
    this.memory; // throws if it is on another device
    return this.sameMemory(this.shape, "detach");
  }

  /** The elements as a typed array. Waits until the GPU has computed them. */
  async data(): Promise<TypedArray> {
    return await this.#read("data");
  }

  async #read(op: string): Promise<TypedArray> {
    const { dtype, size } = this, open = gpu();
    if (!this.isReadable) throw this.#closedError(op);
    const buffer = await open.queue.read(this.memory, size * BYTES[dtype]);
    return new ARRAYS[dtype](buffer);
  }

  /** The only element. Throws a TypeError unless there is exactly one. */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw new TypeError(`item: the tensor must have one element, got shape [${this.shape.join(", ")}]`);
    }
    return (await this.#read("item"))[0];
  }

  /** The elements as nested arrays (a number if the rank is 0). */
  async array(): Promise<NestedArray> {
    const data = await this.#read("array");
    const nest = (dim: number, offset: number): NestedArray => {
      if (dim === this.rank) return data[offset];
      const step = sizeOf(this.shape.slice(dim + 1));
      return Array.from({ length: this.shape[dim] }, (_, i) => nest(dim + 1, offset + i * step));
    };
    return nest(0, 0);
  }

  /** Shape and dtype, without values: what the console shows. */
  toString(): string {
    const more = (this.requiresGrad ? ", requiresGrad" : "") + (this.closed ? ", closed" : "");
    return `Tensor([${this.shape.join(", ")}], ${this.dtype}${more})`;
  }
}

// defined with `defineMethod`, since this file must import neither: `backward` by tape.ts, all others by `ops/methods.ts`
/** Its ops: `x.add(y)` is `add(x, y)`. */
export interface Tensor {
  /**
   * Adds the gradients of this tensor to the `.grad` of every leaf that it was computed from. `dOutput` has this tensor's shape; for a scalar it is 1 by
   * default. Gradients are constants: a loss that contains one (a gradient penalty) gets nothing through it. Throws an Error if no open tape recorded this
   * tensor, or if `backward` has walked its records before.
   */
  backward(dOutput?: Tensor): void;
  /**
   * Overwrites the elements in place with `other`'s. Shapes and dtypes must agree. Returns this tensor. The result of a recorded op takes on `other`'s history,
   * as in PyTorch: gradients flow to `other`; throws an Error if it shares its memory with a view, which would not. A leaf or a constant remains one.
   */
  assign(other: Tensor): this;
  /** x + other, with broadcasting. */
  add(other: Operand): Tensor;
  /** x − other, with broadcasting. */
  sub(other: Operand): Tensor;
  /** x · other, with broadcasting. */
  mul(other: Operand): Tensor;
  /** x / other, with broadcasting. */
  div(other: Operand): Tensor;
  /** x to the power `other`, with broadcasting. */
  pow(other: Operand): Tensor;
  /** The larger of x and other, with broadcasting. */
  maximum(other: Operand): Tensor;
  /** The smaller of x and other, with broadcasting. */
  minimum(other: Operand): Tensor;
  /** −x. */
  neg(): Tensor;
  /** |x|. */
  abs(): Tensor;
  /** eˣ. */
  exp(): Tensor;
  /** ln x. */
  log(): Tensor;
  /** √x. */
  sqrt(): Tensor;
  /** 1/√x. */
  rsqrt(): Tensor;
  /** x². */
  square(): Tensor;
  /** sin x. */
  sin(): Tensor;
  /** cos x. */
  cos(): Tensor;
  /** tanh x. */
  tanh(): Tensor;
  /** 1/(1 + e⁻ˣ). */
  sigmoid(): Tensor;
  /** max(x, 0). */
  relu(): Tensor;
  /** x·sigmoid(x). */
  silu(): Tensor;
  /** ln(1 + eˣ). */
  softplus(): Tensor;
  /** x·Φ(x), or its tanh approximation. */
  gelu(options?: GeluOptions): Tensor;
  /** x held between `min` and `max`. */
  clamp(options: ClampOptions): Tensor;
  /** x as f32 or f16. */
  cast(dtype: "f32" | "f16"): Tensor;
  /** Σ x over `dim`, or over all. */
  sum(options?: ReduceOptions): Tensor;
  /** The mean over `dim`, or over all. */
  mean(options?: ReduceOptions): Tensor;
  /** The largest value over `dim`, or over all. */
  max(options?: ReduceOptions): Tensor;
  /** The smallest value over `dim`, or over all. */
  min(options?: ReduceOptions): Tensor;
  /** ln Σ eˣ over `dim`, or over all. */
  logSumExp(options?: ReduceOptions): Tensor;
  /** The variance over `dim`, or over all. */
  variance(options?: VarianceOptions): Tensor;
  /** Index of the largest value over `dim`, or over all. */
  argmax(options?: { dim?: number; keepDim?: boolean }): Tensor;
  /** Softmax over `dim`, the last by default. */
  softmax(dim?: number): Tensor;
  /** Log-softmax over `dim`, the last by default. */
  logSoftmax(dim?: number): Tensor;
  /** The same elements in another shape; one size may be −1, which is inferred. */
  reshape(shape: readonly number[]): Tensor;
  /** Dimensions a and b exchanged. */
  transpose(a: number, b: number): Tensor;
  /** The dimensions in another order. */
  permute(order: readonly number[]): Tensor;
  /** Broadcast to `shape`. */
  expand(shape: readonly number[]): Tensor;
  /** The elements between start and end, with one pair for each leading dimension. */
  slice(pairs: readonly (readonly [number, number])[]): Tensor;
  /** The elements at the indices `index` along `dim`. */
  gather(dim: number, index: Tensor): Tensor;
  /** For each index 1 at its place among `classes`, 0 elsewhere. */
  oneHot(classes: number): Tensor;
  /** The elements on and above a diagonal of the last two dimensions, 0 below. */
  triu(diagonal?: number): Tensor;
  /** The elements on and below a diagonal of the last two dimensions, 0 above. */
  tril(diagonal?: number): Tensor;
  /** This tensor where `condition` is not 0, else `other`. */
  where(condition: Tensor, other: Operand): Tensor;
  /** Matrix product. */
  matmul(other: Tensor, options?: MatmulOptions): Tensor;
}

/** Internal: from now on, `x.name(…)` is `op(x, …)`. */
export function defineMethod(name: keyof Tensor, op: (x: Tensor, ...rest: never[]) => unknown): void {
  Object.defineProperty(Tensor.prototype, name, {
    value(this: Tensor, ...rest: never[]) {
      return op(this, ...rest);
    },
    configurable: true,
    writable: true,
  });
}

// console.log in Deno and Node shows this instead of the fields, which lead to everything that the tape recorded
for (const inspect of ["Deno.customInspect", "nodejs.util.inspect.custom"]) {
  Object.defineProperty(Tensor.prototype, Symbol.for(inspect), { get: () => Tensor.prototype.toString });
}

/** A number, or arrays of arrays of numbers. */
export type NestedArray = number | NestedArray[];

/** The tensors in a value, also inside arrays and records, which may contain themselves. */
export function tensorsIn(value: unknown): Set<Tensor> {
  const tensors = new Set<Tensor>(), seen = new Set<unknown>();
  const visit = (value: unknown) => {
    if (value instanceof Tensor) tensors.add(value);
    else if (Array.isArray(value) || isRecord(value)) {
      if (seen.has(value)) return;
      seen.add(value);
      for (const x of Object.values(value)) visit(x);
    }
  };
  visit(value);
  return tensors;
}

/** A hint for errors about labels, tokens and indices, since `tensor` makes f32 of whole numbers, too. */
export const HOW_I32 = ' (tensor(values, { dtype: "i32" }) makes i32)';

/** Throws a TypeError unless `x` is a tensor of one of the dtypes, and of this shape if one is given, that is open and on the open device. */
export function checkTensor(
  op: string,
  name: string,
  x: unknown,
  dtypes: readonly DType[] = ["f32", "f16"],
  shape?: readonly number[],
): asserts x is Tensor {
  if (!(x instanceof Tensor)) throw new TypeError(`${op}: ${name} must be a Tensor, got ${describe(x)}`);
  if (!dtypes.includes(x.dtype)) {
    const toFloat = dtypes.every(isFloat) ? ` (cast(x, "${dtypes[0]}") makes ${dtypes[0]})` : "";
    const how = x.dtype === "f32" && dtypes.includes("i32") ? HOW_I32 : toFloat;
    throw new TypeError(`${op}: ${name} must have dtype ${dtypes.join(" or ")}, got ${x.dtype}${how}`);
  }
  if (!x.isUsable) {
    const which = `${op}: ${name} (shape [${x.shape.join(", ")}])`;
    if (x.isReadable) throw new TypeError(`${which} is on a device that was disposed or lost`);
    throw new TypeError(`${which} ${x.howClosed}`);
  }
  if (shape) checkShape(op, name, x, shape);
}

function areEqual(x: readonly number[], y: readonly number[]): boolean {
  if (x === y) return true;
  if (x.length !== y.length) return false;
  for (let d = 0; d < x.length; d++) if (x[d] !== y[d]) return false;
  return true;
}

/** Throws a TypeError unless `x` has this shape. */
export function checkShape(op: string, name: string, x: Tensor, shape: readonly number[]): void {
  if (!areEqual(x.shape, shape)) {
    throw new TypeError(`${op}: ${name} must have shape [${shape.join(", ")}], got [${x.shape.join(", ")}]`);
  }
}
