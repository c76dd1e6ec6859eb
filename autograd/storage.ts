import { type Gpu, gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";

/** How an element is stored. */
export type DType = "f32" | "f16" | "i32" | "u32";

/** The typed arrays that `data()` gives. */
export type TypedArray = Float32Array | Float16Array | Int32Array | Uint32Array;

/** All dtypes. */
export const DTYPES: readonly DType[] = ["f32", "f16", "i32", "u32"];

/** The typed array for each dtype. */
export const ARRAYS: {
  f32: Float32ArrayConstructor;
  f16: Float16ArrayConstructor;
  i32: Int32ArrayConstructor;
  u32: Uint32ArrayConstructor;
} = { f32: Float32Array, f16: Float16Array, i32: Int32Array, u32: Uint32Array };

/** Whether elements are floats: only these have gradients. */
export const isFloat = (dtype: DType): boolean => dtype === "f32" || dtype === "f16";

/** Bytes of one element. */
export const BYTES: Record<DType, number> = { f32: 4, f16: 2, i32: 4, u32: 4 };

/** The memory of tensors. Views and `detach()` share it; it returns to the pool with its last owner. */
export class Storage {
  #changes = 0;
  owners = 1;
  /** How many backward rules will still read it. */
  saves = 0;
  #host: { values: TypedArray; version: number } | null = null;
  /** Whether this is the gradient 1 that `backward()` starts with, as long as nothing writes there. */
  isUnit = false;
  /** Where an optimizer wants the gradient: a slot of its flat block. */
  gradientHome: Memory | null = null;
  readonly gpu: Gpu;

  /** `borrowed` memory (a gradient's home) is not this storage's to free, as long as this storage is its `borrower`. */
  constructor(public memory: Memory, borrowed = false) {
    this.gpu = gpu();
    if (borrowed) memory.borrower = this;
  }

  /** Increases with every write, also by a kernel, so that a backward pass can detect that a saved input has changed. */
  get version(): number {
    return this.#changes + this.memory.writes;
  }

  set version(version: number) {
    this.#changes = version - this.memory.writes;
  }

  /** The integers that the host wrote, so that labels can be checked without a read. Null after any other write. */
  get host(): TypedArray | null {
    return this.#host?.version === this.version ? this.#host.values : null;
  }

  set host(values: TypedArray) {
    this.#host = { values, version: this.version };
  }

  retain(): this {
    this.owners++;
    return this;
  }

  release(): void {
    if (--this.owners > 0 || this.gpu.errors.lost !== null) return;
    this.gradientHome?.leave();
    this.gradientHome = null;
    this.#letGo();
  }

  #letGo(): void {
    if (this.memory.borrower === this) {
      this.memory.borrower = null;
      this.memory.written = -1; // what is still in it does not count
    } else this.memory.free();
  }

  /** Memory that may be written; counts as a write. Small uploads are in read-only memory: they move first. */
  writable(): Memory {
    if (this.memory.owner.readOnly) this.vacate();
    this.isUnit = false;
    return this.memory;
  }

  /** Moves to memory of its own. */
  vacate(): void {
    this.moveTo(this.gpu.pool.take(this.memory.bytes), this.memory.bytes);
  }

  /** Moves the content to other memory, which this storage then owns or borrows. */
  moveTo(memory: Memory, bytes: number, borrowed = false): void {
    this.gpu.queue.copy(this.memory, memory, bytes);
    const { version } = this;
    this.#letGo();
    this.memory = memory;
    this.version = version;
    if (borrowed) memory.borrower = this;
  }
}

/** Keeps the memory of these tensors from being freed until the function that it returns is called. */
export function held(tensors: readonly { storage: Storage }[]): () => void {
  const storages = tensors.map(({ storage }) => storage.retain());
  return () => {
    for (const storage of storages) storage.release();
  };
}
