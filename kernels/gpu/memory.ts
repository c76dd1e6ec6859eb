/** Counters behind `stats()`. */
export interface Counters {
  /** Tensors that are not closed. */
  liveTensors: number;
  /** Bytes that tensors, records and optimizers hold, rounded up to size classes. */
  liveBytes: number;
  /** Bytes that wait in the pool. */
  pooledBytes: number;
  /** The most that `liveBytes` ever was. */
  peakBytes: number;
  /** GPU buffers made since `init`. */
  buffersCreated: number;
  /** Bind groups made since `init`. */
  bindGroupsCreated: number;
  /** Kernel launches encoded since `init`. */
  dispatches: number;
  /** Command buffers submitted since `init`. */
  submits: number;
}

/** A range of a GPU buffer that a kernel can bind. The same object stands for the same range for ever: caches compare it. */
export class Memory {
  static #ids = 0;
  /** Different for each. */
  readonly id: number = Memory.#ids++;
  /** Number of the last batch of dispatches that names this memory: the host must not write it before that is submitted. */
  batch: number = -1;

  /**
   * Pools make memories.
   * @internal
   */
  constructor(
    readonly buffer: GPUBuffer,
    readonly offset: number,
    readonly bytes: number,
    /** Who takes it back. */
    readonly owner: { give(memory: Memory): void; readonly readOnly: boolean },
    /** Place in its size class: the free one with the lowest number is taken first. */
    readonly number: number,
  ) {}

  /** Gives it back to its owner. */
  free(): void {
    this.owner.give(this);
  }
}

/** Four size classes an octave up to 16 MiB, then multiples of 2 MiB: little waste, few classes. At least 256 bytes, as offsets need. */
export function sizeClass(bytes: number): number {
  const octave = 2 ** Math.floor(Math.log2(Math.max(bytes, 1024)));
  const step = Math.min(octave / 4, 2 ** 21);
  return Math.ceil(Math.max(bytes, 1) / step) * step;
}

/** The free memories of one size class, lowest number first. */
class FreeList {
  made = 0;
  free: Memory[] = []; // descending by number, so that pop() takes the lowest

  take(): Memory | undefined {
    return this.free.pop();
  }

  give(memory: Memory): void {
    let low = 0, high = this.free.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.free[middle].number > memory.number) low = middle + 1;
      else high = middle;
    }
    this.free.splice(low, 0, memory);
  }
}

const STORAGE = 0x80 | 0x4 | 0x8; // GPUBufferUsage.STORAGE | COPY_SRC | COPY_DST; the global is missing in some runtimes

/**
 * Buffers by size class. A repeated step takes and gives in the same order and lowest-number-first makes it meet the
 * same buffers again, so that cached bind groups hit (last-in-first-out does not settle for a hundred steps).
 */
export class Pool {
  readonly readOnly = false;
  #classes = new Map<number, FreeList>();

  constructor(
    readonly device: GPUDevice,
    readonly counters: Counters,
    readonly limit: number,
    /** Called before buffers are destroyed: whoever names them must be done with them. */
    readonly beforeDestroy: () => void,
  ) {}

  #list(bytes: number): FreeList {
    let list = this.#classes.get(bytes);
    if (!list) this.#classes.set(bytes, list = new FreeList());
    return list;
  }

  take(bytes: number): Memory {
    const binding = Math.floor(this.device.limits.maxStorageBufferBindingSize / 4) * 4;
    if (bytes > binding) {
      throw new RangeError(
        `tensor: ${bytes} bytes are more than this adapter binds at once (maxStorageBufferBindingSize ${binding}); split it by rows`,
      );
    }
    const rounded = Math.min(sizeClass(bytes), binding);
    const list = this.#list(rounded);
    let memory = list.take();
    if (memory) this.counters.pooledBytes -= rounded;
    else memory = this.#create(rounded, list.made++);
    this.counters.liveBytes += rounded;
    this.counters.peakBytes = Math.max(this.counters.peakBytes, this.counters.liveBytes);
    return memory;
  }

  #create(bytes: number, number: number): Memory {
    const total = () => this.counters.liveBytes + this.counters.pooledBytes + bytes;
    if (total() > this.limit) this.trim();
    if (total() > this.limit) {
      throw new RangeError(
        `tensor: ${bytes} bytes more would pass the memory limit: ${this.counters.liveBytes} of ${this.limit} bytes are live`,
      );
    }
    this.counters.buffersCreated++;
    const buffer = this.device.createBuffer({ size: bytes, usage: STORAGE });
    return new Memory(buffer, 0, bytes, this, number);
  }

  give(memory: Memory): void {
    this.counters.liveBytes -= memory.bytes;
    this.counters.pooledBytes += memory.bytes;
    this.#list(memory.bytes).give(memory);
  }

  /** Destroys all free buffers. */
  trim(): void {
    this.beforeDestroy();
    for (const list of this.#classes.values()) {
      for (const memory of list.free) memory.buffer.destroy();
      list.free = [];
    }
    this.counters.pooledBytes = 0;
  }
}

/**
 * One buffer for small host-written data (inputs, learning rates, random state). Writes go to a mirror on the host and
 * reach the GPU once a submit, in front of its dispatches. A slot that was given back is used again only after the
 * next submit, since dispatches that name it may be waiting. Nothing on the GPU writes it, so its slots
 * can be read beside each other in one dispatch.
 */
export class Arena {
  static readonly BYTES: number = 4 * 2 ** 20;
  static readonly LARGEST_SLOT: number = 2 ** 16;
  readonly readOnly = true;
  #classes = new Map<number, FreeList>();
  #given: Memory[] = [];
  #used = 0;
  #buffer: GPUBuffer;
  #mirror = new Uint8Array(Arena.BYTES);
  #dirty: [number, number] = [Infinity, 0];

  constructor(readonly device: GPUDevice, readonly counters: Counters) {
    counters.buffersCreated++;
    this.#buffer = device.createBuffer({ size: Arena.BYTES, usage: STORAGE });
  }

  /** A slot with these bytes in it, or nothing where the arena is full or the data too large for it. */
  take(data: Uint8Array): Memory | undefined {
    if (data.byteLength > Arena.LARGEST_SLOT) return undefined;
    const bytes = sizeClass(data.byteLength);
    let list = this.#classes.get(bytes);
    if (!list) this.#classes.set(bytes, list = new FreeList());
    let memory = list.take();
    if (!memory) {
      if (this.#used + bytes > Arena.BYTES) return undefined;
      memory = new Memory(this.#buffer, this.#used, bytes, this, list.made++);
      this.#used += bytes;
    }
    this.#mirror.set(data, memory.offset);
    this.#dirty[0] = Math.min(this.#dirty[0], memory.offset);
    this.#dirty[1] = Math.max(this.#dirty[1], memory.offset + bytes);
    this.counters.liveBytes += bytes;
    return memory;
  }

  give(memory: Memory): void {
    this.counters.liveBytes -= memory.bytes;
    this.#given.push(memory);
  }

  /** Writes what is new. Call it in front of a submit. */
  write(): void {
    const [from, to] = this.#dirty;
    if (from >= to) return;
    this.device.queue.writeBuffer(this.#buffer, from, this.#mirror, from, to - from);
    this.#dirty = [Infinity, 0];
  }

  /** Call it behind a submit: what was given back is free now. */
  submitted(): void {
    for (const memory of this.#given) this.#classes.get(memory.bytes)!.give(memory);
    this.#given.length = 0;
  }

  destroy(): void {
    this.#buffer.destroy();
  }
}

/** One pool memory cut into slots that lie flat behind each other, so that one dispatch can walk over all of them. */
export class FlatBlock {
  readonly readOnly = false;
  readonly slots: Memory[];
  #held: number;

  /** `slots` of these sizes in bytes, each from a multiple of 256 on. */
  constructor(readonly whole: Memory, sizes: number[]) {
    let offset = 0;
    this.slots = sizes.map((bytes, i) => {
      const slot = new Memory(whole.buffer, whole.offset + offset, FlatBlock.slotBytes(bytes), this, i);
      offset += slot.bytes;
      return slot;
    });
    this.#held = sizes.length;
  }

  static slotBytes(bytes: number): number {
    return Math.max(256, Math.ceil(bytes / 256) * 256);
  }

  /** The whole goes back to its pool with its last slot. */
  give(slot: Memory): void {
    this.whole.batch = Math.max(this.whole.batch, slot.batch);
    if (--this.#held === 0) this.whole.free();
  }
}
