import type { DeviceErrors } from "./errors.ts";

/** Counters behind `stats()`. */
export interface Counters {
  /** Tensors that are not closed. */
  liveTensors: number;
  /** Bytes that tensors, records and optimizers hold, rounded up to size classes. */
  liveBytes: number;
  /** Bytes of free buffers in the pool. */
  pooledBytes: number;
  /** The largest `liveBytes` since `init` or `resetPeak()`. */
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

/** A range of a GPU buffer that a kernel can bind. One object always stands for the same range, so that caches can compare objects. */
export class Memory implements Disposable {
  static #ids = 0;
  /** Unique. */
  readonly id: number = Memory.#ids++;
  /** Number of the last batch of dispatches that uses this memory: the host must not write it before that batch is submitted. */
  batch: number = -1;
  /** Number of the last batch that wrote it, by itself or as a slot of a larger memory; or of a failed batch that its content depends on. −1: no content. */
  written: number = -1;
  /** How often it was written. For a slot, writes to the whole block do not count. */
  writes: number = 0;
  /**
   * Who uses it without owning it, as a gradient uses a slot of an optimizer. The borrower moves out when another one needs the place, and owns it when its
   * owner goes.
   */
  borrower: { vacate(): void } | null = null;
  /** The shape of the tensor in it, for messages. */
  shape: readonly number[] | null = null;
  /** Whether the device refused to make its buffer. */
  refused = false;
  /** What a launch that waits for others does with it or with a slot of it (see joined.ts). */
  awaited: "read" | "write" | null = null;
  /** The slots that it is divided into. */
  slots: readonly Memory[] = [];

  /**
   * Called by pools only.
   * @internal
   */
  constructor(
    readonly buffer: GPUBuffer,
    readonly offset: number,
    readonly bytes: number,
    /** What it returns to. */
    readonly owner: {
      give(memory: Memory): void;
      readonly readOnly: boolean;
      readonly device: GPUDevice;
      /** The memory that it is a slot of. */
      readonly whole?: Memory;
    },
    /** Place in its free list: the one with the lowest number is taken first. */
    readonly number: number,
    /** The free list that it goes back to. */
    readonly list: { give(memory: Memory): void } | null = null,
  ) {}

  /** Returns it to its owner. */
  free(): void {
    this.owner.give(this);
  }

  /** For a user that no longer needs it: the borrower, if there is one, takes it over and frees it later; otherwise it is freed now. */
  leave(): void {
    if (this.borrower) this.borrower = null;
    else this.free();
  }

  /** The same as `free()`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }
}

/** Four size classes per octave up to 16 MiB, then multiples of 2 MiB: little waste, few classes. At least 256 bytes, the alignment of offsets. */
export function sizeClass(bytes: number): number {
  const octave = 2 ** (31 - Math.clz32(Math.min(Math.max(bytes, 1024), 2 ** 23))), step = octave / 4;
  return Math.ceil(Math.max(bytes, 1) / step) * step;
}

/** The free memories of one size class and purpose, lowest number first. */
class FreeList {
  /** How many memories were made, free or not. */
  made: number = 0;
  /** Descending by number, so that the lowest is taken from the end. */
  free: Memory[] = [];

  /** Inserts a memory, in order. */
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

/** The free lists of a pool or an arena. */
class FreeLists {
  #byPurpose = new Map<string, Map<number, FreeList>>();

  /** The list for a purpose and a size. */
  of(purpose: string, bytes: number): FreeList {
    let sizes = this.#byPurpose.get(purpose);
    if (!sizes) this.#byPurpose.set(purpose, sizes = new Map());
    let list = sizes.get(bytes);
    if (!list) sizes.set(bytes, list = new FreeList());
    return list;
  }

  all(): FreeList[] {
    return [...this.#byPurpose.values()].flatMap((sizes) => [...sizes.values()]);
  }
}

/** Counts bytes as taken. */
function hold(counters: Counters, bytes: number): void {
  counters.liveBytes += bytes;
  counters.peakBytes = Math.max(counters.peakBytes, counters.liveBytes);
}

/** Bytes with the shape that needs them, for messages. */
export const ofShape = (bytes: number, shape?: readonly number[] | null): string =>
  `${bytes} bytes${shape ? ` (shape [${shape.join(", ")}])` : ""}`;

/** The error of an op with more bytes than the adapter binds at once. */
export const tooLarge = (op: string, bytes: number, shape: readonly number[] | undefined, most: number): RangeError =>
  new RangeError(
    `${op}: ${
      ofShape(bytes, shape)
    } are more than this adapter binds at once (maxStorageBufferBindingSize ${most}); split it by rows`,
  );

const STORAGE = 0x80 | 0x4 | 0x8; // GPUBufferUsage.STORAGE | COPY_SRC | COPY_DST; the global is missing in some runtimes

/** The most bytes of one binding, in whole vec4s, which is how kernels read them: of an H100's 2 GiB − 4 the last three numbers would belong to no vec4. */
export function bindable({ limits }: GPUDevice): number {
  return Math.floor(limits.maxStorageBufferBindingSize / 16) * 16;
}

/**
 * Buffers by size class. Of the free ones the one with the lowest number is taken first. A repeated step takes and returns them in the same order, so it gets
 * the same buffers again and finds its bind groups in the cache (with last-in-first-out that takes a hundred steps to settle). Uploads are taken and returned
 * at other times than a step's results, so they have their own lists, by `purpose`: otherwise the last batch of an epoch would shift all others.
 */
export class Pool {
  readonly readOnly = false;
  /** Bytes that flat blocks have taken beyond their slots, because sizes are rounded up. Nothing uses them. */
  slack = 0;
  readonly #binding: number; // kept here, since asking the device takes as long as all the rest of `take`
  #lists = new FreeLists();
  #buffers = new Set<GPUBuffer>();

  constructor(
    readonly device: GPUDevice,
    readonly counters: Counters,
    readonly limit: number,
    readonly errors: DeviceErrors,
    /** Called before buffers are destroyed, so that nobody uses them any more. */
    readonly beforeDestroy: () => void,
    /** Bytes of the arena that are not live and yet count towards the limit. */
    readonly spare: () => number,
  ) {
    this.#binding = bindable(device);
  }

  /** Memory of at least `bytes` bytes. `op` and `shape` are for messages. */
  take(bytes: number, op = "tensor", shape?: readonly number[], purpose = ""): Memory {
    const binding = this.#binding;
    if (!(bytes <= binding)) throw tooLarge(op, bytes, shape, binding);
    const rounded = Math.min(sizeClass(bytes), binding);
    const list = this.#lists.of(purpose, rounded);
    let memory = list.free.pop();
    if (memory) this.counters.pooledBytes -= rounded;
    else {
      this.makeRoom(rounded, op, shape);
      memory = this.#create(rounded, list, op, shape);
    }
    memory.shape = shape ?? null;
    memory.written = -1; // what is still in it does not count
    hold(this.counters, rounded);
    return memory;
  }

  /** Makes sure that `bytes` more bytes stay within the limit: destroys free buffers of the pool if necessary, and throws if that is not enough. */
  makeRoom(bytes: number, op: string, shape?: readonly number[]): void {
    const total = () => this.counters.liveBytes + this.counters.pooledBytes + this.spare() + bytes;
    if (total() > this.limit) this.trim();
    if (total() > this.limit) {
      const spare = this.spare(), beside = spare > 0 ? ` and ${spare} more lie beside small uploads` : "";
      const live = `${this.counters.liveBytes} of ${this.limit} bytes are live${beside}`;
      const excess = `${ofShape(bytes, shape)} more would pass the memory limit`;
      throw new RangeError(`${op}: ${excess}: ${live}; free some, or give init() a higher memoryLimit`);
    }
  }

  #create(bytes: number, list: FreeList, op: string, shape?: readonly number[]): Memory {
    this.counters.buffersCreated++;
    const { liveBytes } = this.counters; // as of now: before the device reports an error, scopes may close
    this.errors.open();
    const buffer = this.device.createBuffer({ size: bytes, usage: STORAGE });
    this.#buffers.add(buffer);
    const memory = new Memory(buffer, 0, bytes, this, list.made++, list);
    this.errors.close(() => {
      memory.refused = true;
      const at = list.free.indexOf(memory);
      if (at >= 0) { // returned before the device reported it
        list.free.splice(at, 1);
        this.counters.pooledBytes -= bytes;
        this.#destroy(memory);
      }
      return `${op}, which asked for ${ofShape(bytes, shape)} with ${liveBytes} bytes live`;
    });
    return memory;
  }

  give(memory: Memory): void {
    this.counters.liveBytes -= memory.bytes;
    if (memory.refused) return this.#destroy(memory); // it is not used again
    this.counters.pooledBytes += memory.bytes;
    memory.list!.give(memory);
  }

  /** Destroys all free buffers. */
  trim(): void {
    this.beforeDestroy();
    for (const list of this.#lists.all()) {
      for (const memory of list.free) this.#destroy(memory);
      list.free = [];
    }
    this.counters.pooledBytes = 0;
  }

  #destroy({ buffer }: Memory): void {
    buffer.destroy();
    this.#buffers.delete(buffer);
  }

  /** Destroys all buffers, including those that are taken. */
  destroy(): void {
    for (const buffer of this.#buffers) buffer.destroy();
  }
}

/** The host's copy of a buffer that it writes. `put` changes the copy, `write` uploads what has changed. */
export class Mirror {
  static readonly #GAP = 2 ** 16; // uploading so many bytes takes about as long as one more writeBuffer
  readonly #bytes: Uint8Array<ArrayBuffer>;
  /** The ranges that are newer than on the GPU. */
  #newer: { from: number; to: number }[] = [];

  constructor(readonly buffer: GPUBuffer) {
    this.#bytes = new Uint8Array(buffer.size);
  }

  /** Puts data at the start of the range of `bytes` bytes from `offset` on. */
  put(data: Uint8Array, offset: number, bytes: number): void {
    this.#bytes.set(data, offset);
    const end = offset + bytes;
    const near = this.#newer.find(({ from, to }) => offset - to <= Mirror.#GAP && from - end <= Mirror.#GAP);
    if (near) {
      near.from = Math.min(near.from, offset);
      near.to = Math.max(near.to, end);
    } else this.#newer.push({ from: offset, to: end });
  }

  write(queue: GPUQueue): void {
    for (const { from, to } of this.#newer) queue.writeBuffer(this.buffer, from, this.#bytes, from, to - from);
    this.#newer.length = 0;
  }
}

/** A buffer of the arena: how many of its bytes are slots, and how many of those are taken. */
interface Page {
  mirror: Mirror;
  used: number;
  live: number;
}

/**
 * Buffers for small data from the host (inputs, learning rates, random state); one is enough unless much of it is alive. Writes go to a mirror on the host and
 * reach the GPU once per submit, before its dispatches. A slot that an unsubmitted dispatch uses is used again only after the next submit. Nothing on the GPU
 * writes them, so that one dispatch may read several slots.
 */
export class Arena {
  static readonly PAGE_BYTES: number = 4 * 2 ** 20;
  static readonly LARGEST_SLOT: number = 2 ** 16;
  readonly readOnly = true;
  #lists = new FreeLists();
  #pages: Page[] = [];
  #given: Memory[] = [];
  #batch = 0;

  constructor(
    readonly device: GPUDevice,
    readonly counters: Counters,
    /** The pool's: slots count towards the limit as well. */
    readonly makeRoom: (bytes: number, op: string, shape?: readonly number[]) => void,
  ) {}

  /** A slot that holds these bytes, or undefined if there are too many. */
  take(data: Uint8Array, op: string, shape: readonly number[] | undefined, purpose: string): Memory | undefined {
    if (data.byteLength > Arena.LARGEST_SLOT) return undefined;
    const bytes = sizeClass(data.byteLength);
    const list = this.#lists.of(purpose, bytes);
    const memory = list.free.pop() ?? this.#create(bytes, list, op, shape);
    const page = this.#pageOf(memory);
    page.live += bytes;
    page.mirror.put(data, memory.offset, bytes);
    hold(this.counters, bytes);
    return memory;
  }

  #create(bytes: number, list: FreeList, op: string, shape?: readonly number[]): Memory {
    this.makeRoom(bytes, op, shape); // only here: a free slot counts towards the limit already
    let page = this.#pages.at(-1);
    if (!page || page.used + bytes > Arena.PAGE_BYTES) {
      this.counters.buffersCreated++;
      const buffer = this.device.createBuffer({ size: Arena.PAGE_BYTES, usage: STORAGE });
      page = { mirror: new Mirror(buffer), used: 0, live: 0 };
      this.#pages.push(page);
    }
    const memory = new Memory(page.mirror.buffer, page.used, bytes, this, list.made++, list);
    page.used += bytes;
    return memory;
  }

  #pageOf(memory: Memory): Page {
    return this.#pages.find(({ mirror }) => mirror.buffer === memory.buffer)!;
  }

  /** Bytes of the pages outside of taken slots, less one page, since there is always one. */
  get spare(): number {
    return Math.max(0, this.#pages.reduce((sum, { live }) => sum + Arena.PAGE_BYTES - live, -Arena.PAGE_BYTES));
  }

  give(memory: Memory): void {
    this.counters.liveBytes -= memory.bytes;
    this.#pageOf(memory).live -= memory.bytes;
    if (memory.batch === this.#batch) this.#given.push(memory);
    else memory.list!.give(memory);
  }

  /** Uploads what is new. Call it before a submit. */
  write(): void {
    for (const { mirror } of this.#pages) mirror.write(this.device.queue);
  }

  /** Call it after a submit, with the number of the batch that begins: slots that were returned meanwhile become free. */
  submitted(batch: number): void {
    this.#batch = batch;
    for (const memory of this.#given) memory.list!.give(memory);
    this.#given.length = 0;
  }

  /** Destroys unused pages except the first. Call it after a submit, with no cache left that refers to them. */
  trim(): void {
    const free = this.#pages.filter(({ live }, i) => i > 0 && live === 0),
      gone = new Set(free.map((x) => x.mirror.buffer));
    for (const list of this.#lists.all()) {
      list.free = list.free.filter(({ buffer }) => !gone.has(buffer));
    }
    this.#pages = this.#pages.filter((page) => !free.includes(page));
    for (const buffer of gone) buffer.destroy();
  }

  destroy(): void {
    for (const { mirror } of this.#pages) mirror.buffer.destroy();
  }
}

/** A memory of the pool that is divided into consecutive slots, so that one dispatch can process all of them. */
export class FlatBlock {
  readonly readOnly = false;
  readonly device: GPUDevice;
  /** The slots, in order. */
  readonly slots: Memory[];
  #held: number;
  #slack: number;

  /** Divides `whole`, which the pool gave, into slots of these sizes in bytes, each at a multiple of 256. */
  constructor(readonly pool: Pool, readonly whole: Memory, sizes: number[]) {
    this.device = whole.owner.device;
    let offset = 0;
    this.slots = sizes.map((bytes, i) => {
      const slot = new Memory(whole.buffer, whole.offset + offset, FlatBlock.slotBytes(bytes), this, i);
      offset += slot.bytes;
      return slot;
    });
    whole.slots = this.slots;
    this.#slack = whole.bytes - offset;
    pool.slack += this.#slack;
    this.#held = sizes.length;
  }

  static slotBytes(bytes: number): number {
    return Math.max(256, Math.ceil(bytes / 256) * 256);
  }

  /** `whole` returns to the pool with its last slot. */
  give(): void {
    if (--this.#held > 0) return;
    this.whole.slots = [];
    this.pool.slack -= this.#slack;
    this.whole.free();
  }
}
