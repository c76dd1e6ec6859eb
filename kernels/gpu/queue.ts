import type { DeviceErrors } from "./errors.ts";
import { checkNumber, describe } from "../check.ts";
import type { Gathering } from "./joined.ts";
import { Arena, type Counters, Memory, Mirror, ofShape, Pool, sizeClass } from "./memory.ts";

/** A compiled kernel. */
export interface Pipeline {
  id: number;
  name: string;
  gpu: GPUComputePipeline;
  layout: GPUBindGroupLayout;
  /** The storage bindings, in order. */
  buffers: string[];
  /** Whether the kernel writes each. */
  writes: boolean[];
  /** Names and WGSL types of the parameters, in order. Empty: the kernel has no Params block. */
  params: [name: string, type: "u32" | "i32" | "f32"][];
}

/** A dispatch seen before: what it bound, its bind group, and the dispatch that came after it last time. */
interface Entry {
  pipeline: Pipeline;
  memories: readonly Memory[];
  params: readonly number[];
  /** The shapes of what the memories held when the entry was made, for messages. */
  shapes: (readonly number[] | null)[];
  group: GPUBindGroup;
  next: Entry | null;
}

// Dispatches after which a batch is submitted. With fewer, the submits cost more on every adapter measured; with more, the GPU starts late.
const SUBMIT_AFTER = 250;
// At the end of a step fewer are enough: SUBMIT_FIRST after a read, when the GPU is idle, then twice as many after each submit, up to SUBMIT_MOST. With
// SUBMIT_FIRST throughout, an MLP's step of 10 dispatches takes an H100's host a tenth more; with SUBMIT_MOST throughout, the GPU is idle during the first 50
// steps of a loss alone.
const SUBMIT_FIRST = 40, SUBMIT_MOST = 160;
const MOST_ENTRIES = 8192;
const PARAMS_BYTES = 256; // the strictest offset alignment there is
const CHUNK_BYTES = 2 ** 16;
const TURN = 100; // milliseconds of reads until the event loop gets a turn; it costs 1 ms

/**
 * Encodes everything into one open compute pass and submits it after a batch of dispatches, at a read or when asked.
 * Writes of the host take effect before the whole submit, so the host never writes memory that an unsubmitted dispatch uses:
 * small data goes through the arena, Params blocks are content-addressed and never change.
 */
export class Queue {
  readonly pool: Pool;
  readonly arena: Arena;
  /** Number of the batch that is open. */
  batch = 0;
  /** While a profile is taken: where the times of a dispatch go. */
  timestamps: ((name: string) => GPUComputePassTimestampWrites) | null = null;
  /** Launches that wait for others; null if none may. */
  gathering: Gathering | null = null;
  #encoder: GPUCommandEncoder | null = null;
  #pass: GPUComputePassEncoder | null = null;
  /** What the open pass has as its pipeline. */
  #bound: Pipeline | null = null;
  /** Batches that the device discarded: their results are missing. */
  #failed = new Set<number>();
  /** The dispatches since the last submit. */
  #batch: Entry[] = [];
  /** How many of them are submitted when a step ends. */
  #enough = SUBMIT_FIRST;
  /** Stands before the first dispatch of each batch. */
  #first: Entry = { next: null } as Entry;
  #last: Entry = this.#first;
  /** All entries, by pipeline, memories and parameters. */
  #entries = new Map<string, Entry>();
  /** The Params blocks, by content, and the buffers that they lie in. */
  #blocks = new Map<string, GPUBindingResource>();
  #chunks: Mirror[] = [];
  /** Free buffers for reads, by size. */
  #staging = new Map<number, GPUBuffer[]>();
  /** When a read last gave the event loop a turn. */
  #turned = 0;

  constructor(
    readonly device: GPUDevice,
    readonly counters: Counters,
    readonly errors: DeviceErrors,
    memoryLimit: number,
  ) {
    this.pool = new Pool(device, counters, memoryLimit, errors, () => this.trim(), () => this.arena.spare);
    this.arena = new Arena(device, counters, (bytes, op, shape) => this.pool.makeRoom(bytes, op, shape));
  }

  /**
   * Encodes one dispatch of `given` memories and parameters, which are not checked yet. The one that followed the previous dispatch last time is tried first:
   * in a repeated step, a comparison finds the entry.
   */
  dispatch(
    pipeline: Pipeline,
    given: readonly (Memory | null)[],
    params: readonly number[],
    x: number,
    y: number,
  ): void {
    if (this.gathering !== null && isAwaited(pipeline, given)) this.gathering.settle(); // first, since it may clear the entries
    let entry = this.#last.next;
    if (entry === null || !matches(entry, pipeline, given, params)) entry = this.#entry(pipeline, given, params);
    const { memories } = entry;
    this.#last.next = entry;
    this.#last = entry;
    const pass = this.#openPass(pipeline.name);
    if (this.#bound !== pipeline) {
      pass.setPipeline(pipeline.gpu);
      this.#bound = pipeline;
    }
    this.#batch.push(entry);
    pass.setBindGroup(0, entry.group);
    pass.dispatchWorkgroups(x, y);
    const from = this.#origin(memories);
    for (let i = 0; i < memories.length; i++) {
      const memory = memories[i];
      memory.batch = this.batch;
      if (!pipeline.writes[i]) continue;
      memory.written = from;
      memory.writes++;
      for (const slot of memory.slots) slot.written = from;
    }
    this.counters.dispatches++;
    if (this.#batch.length >= SUBMIT_AFTER) this.submit();
  }

  #entry(pipeline: Pipeline, memories: readonly (Memory | null)[], params: readonly number[]): Entry {
    checkMemories(pipeline, memories, this.device);
    checkParams(pipeline, params);
    let key = `${pipeline.id}`;
    for (const memory of memories) key += `,${memory.id}`;
    for (const value of params) key += `;${Object.is(value, -0) ? "-0" : value}`;
    let entry = this.#entries.get(key);
    if (!entry) {
      if (this.#entries.size >= MOST_ENTRIES) this.forget();
      checkAliasing(pipeline, memories);
      const entries: GPUBindGroupEntry[] = memories.map((m, binding) => ({
        binding,
        resource: { buffer: m.buffer, offset: m.offset, size: m.bytes },
      }));
      if (params.length > 0) entries.push({ binding: memories.length, resource: this.#paramsBlock(pipeline, params) });
      this.counters.bindGroupsCreated++;
      const shapes = memories.map((m) => m.shape);
      this.errors.open();
      const group = this.device.createBindGroup({ layout: pipeline.layout, entries });
      const made: Entry = { pipeline, memories, params, shapes, group, next: null };
      this.errors.close(() => nameOf(made));
      this.#entries.set(key, entry = made);
    }
    return entry;
  }

  /** The uniform block with this content: made once, never changed. */
  #paramsBlock(pipeline: Pipeline, params: readonly number[]): GPUBindingResource {
    const bytes = new Uint8Array(PARAMS_BYTES);
    const view = new DataView(bytes.buffer);
    params.forEach((value, i) => {
      const [, type] = pipeline.params[i];
      if (type === "f32") view.setFloat32(4 * i, value, true);
      else view.setUint32(4 * i, value, true); // an i32's bits too
    });
    const key = bytes.subarray(0, 4 * params.length).join();
    let block = this.#blocks.get(key);
    if (!block) {
      const index = this.#blocks.size, offset = (index * PARAMS_BYTES) % CHUNK_BYTES;
      const at = Math.floor(index * PARAMS_BYTES / CHUNK_BYTES);
      if (at === this.#chunks.length) {
        this.counters.buffersCreated++;
        const buffer = this.device.createBuffer({ size: CHUNK_BYTES, usage: 0x40 | 0x8 }); // UNIFORM | COPY_DST
        this.#chunks.push(new Mirror(buffer));
      }
      const chunk = this.#chunks[at];
      chunk.put(bytes, offset, PARAMS_BYTES);
      block = { buffer: chunk.buffer, offset, size: Math.ceil(params.length / 4) * 16 };
      this.#blocks.set(key, block);
    }
    return block;
  }

  #openEncoder(): GPUCommandEncoder {
    if (!this.#encoder) {
      this.errors.open();
      this.#encoder = this.device.createCommandEncoder();
    }
    return this.#encoder;
  }

  #openPass(name: string): GPUComputePassEncoder {
    if (this.timestamps) { // each dispatch is a pass of its own while a profile is taken
      this.#endPass();
      return this.#pass = this.#openEncoder().beginComputePass({ timestampWrites: this.timestamps(name) });
    }
    return this.#pass ??= this.#openEncoder().beginComputePass();
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = null;
    this.#bound = null;
  }

  /** Encodes another command, after the dispatches so far. */
  encode(command: (encoder: GPUCommandEncoder) => void): void {
    this.#endPass();
    command(this.#openEncoder());
  }

  /** A step ends here: submits what was encoded so far if that is worth it. */
  stepped(): void {
    if (this.#batch.length < this.#enough) return;
    this.submit();
    this.#enough = Math.min(2 * this.#enough, SUBMIT_MOST);
  }

  /** Submits what was encoded so far. */
  submit(): void {
    if (!this.#encoder) return;
    this.#endPass();
    this.arena.write();
    for (const chunk of this.#chunks) chunk.write(this.device.queue);
    this.device.queue.submit([this.#encoder.finish()]);
    const batch = this.batch, entries = this.#batch;
    this.errors.close(() => {
      this.#fail(batch);
      return `the batch of ${namesOf(entries)}`;
    });
    this.#encoder = null;
    this.#batch = [];
    this.batch++;
    this.counters.submits++;
    this.#last = this.#first; // a step begins after a submit: this aligns the predictions
    this.arena.submitted(this.batch);
  }

  /** Forgets all bind groups and Params blocks, after submitting the dispatches that may use them. */
  forget(): void {
    this.submit();
    this.#entries.clear();
    this.#blocks.clear();
    this.#first.next = null;
    this.#last = this.#first;
  }

  /**
   * Puts bytes into memory that the next dispatch can read: a slot of the arena if they fit and need not be `writable`, else memory of the pool. `purpose`: what
   * it shares free memories with. `op` and `shape` are for messages.
   */
  upload(
    data: Uint8Array,
    writable: boolean,
    { purpose = "upload", op = "tensor", shape }: { purpose?: string; op?: string; shape?: readonly number[] } = {},
  ): Memory {
    const memory = (writable ? undefined : this.arena.take(data, op, shape, purpose)) ??
      this.pool.take(data.byteLength, op, shape, purpose);
    memory.written = -1;
    if (memory.owner === this.arena) return memory;
    if (memory.awaited) this.gathering?.settle();
    if (memory.batch === this.batch) this.submit();
    const whole = data.byteLength - data.byteLength % 4;
    const { device: { queue } } = this;
    if (whole > 0) queue.writeBuffer(memory.buffer, memory.offset, data as BufferSource, 0, whole);
    if (whole < data.byteLength) {
      const rest = new Uint8Array(4);
      rest.set(data.subarray(whole));
      queue.writeBuffer(memory.buffer, memory.offset + whole, rest);
    }
    return memory;
  }

  /** Copies the first bytes of one memory to another, in order with the dispatches. */
  copy(from: Memory, to: Memory, bytes: number): void {
    if (from.owner.device !== this.device || to.owner.device !== this.device) {
      throw new Error("tensor: a copy cannot leave or enter a device that was disposed or lost");
    }
    const size = Math.min(Math.ceil(bytes / 4) * 4, from.bytes, to.bytes);
    if (size === 0) return; // the open batch does not use them: if nothing else is in it, it is never submitted
    if (from.buffer === to.buffer) { // two slots of an optimizer's block: WebGPU cannot copy within a buffer
      using between = this.pool.take(bytes, "copy");
      this.copy(from, between, bytes);
      return this.copy(between, to, bytes);
    }
    // also if one reads `from`: when it is given back, the host may overwrite it, and would not wait for that launch
    if (from.awaited || to.awaited) this.gathering?.settle();
    this.#endPass();
    this.#openEncoder().copyBufferToBuffer(from.buffer, from.offset, to.buffer, to.offset, size);
    from.batch = to.batch = this.batch;
    to.writes++;
    to.written = this.#failure(from) ?? this.batch;
  }

  /** The first bytes of a memory, as they are after everything encoded so far has run. */
  async read(memory: Memory, bytes: number): Promise<ArrayBuffer> {
    if (bytes === 0 || this.#isMissing(memory)) { // a copy from a missing one could make the whole batch fail
      this.submit();
      await this.errors.settle();
      if (bytes > 0) throw notComputed();
      return new ArrayBuffer(0);
    }
    if (memory.awaited === "write") this.gathering?.settle();
    this.#enough = SUBMIT_FIRST;
    const size = sizeClass(bytes), copied = Math.ceil(bytes / 4) * 4;
    const failed = async (reason: Error) => {
      await this.errors.news();
      await this.errors.settle(); // throws the reason, if the device has reported it
      throw new Error(`GPU: reading ${bytes} bytes failed: ${reason?.message ?? reason}`);
    };
    let staging: GPUBuffer;
    try {
      staging = this.#staging.get(size)?.pop() ?? this.#createStaging(size, memory.shape);
    } catch (error) {
      return await failed(error as Error);
    }
    this.#endPass();
    this.#openEncoder().copyBufferToBuffer(memory.buffer, memory.offset, staging, 0, copied);
    memory.batch = this.batch;
    const needed = [this.batch, ...partsOf(memory).map(({ written }) => written)]; // later the memory may be another tensor's
    this.submit();
    const range = await mapped(staging, copied).catch(failed);
    const result = range.slice(0, bytes);
    staging.unmap();
    const free = this.#staging.get(size);
    if (free) free.push(staging);
    else this.#staging.set(size, [staging]);
    // Deno's reads end without a turn of the event loop: a loop that awaits nothing else would block timers, signals and files forever
    if ("Deno" in globalThis && performance.now() - this.#turned > TURN) {
      await this.errors.news();
      this.#turned = performance.now();
    }
    await this.errors.settle();
    if (memory.refused || needed.some((batch) => this.#failed.has(batch))) throw notComputed();
    return result;
  }

  #createStaging(size: number, shape: readonly number[] | null): GPUBuffer {
    this.counters.buffersCreated++;
    // created mapped, and unmapped: only then may it be read after a mapAsync that was not awaited (see `mapped`)
    this.errors.open();
    try {
      const staging = this.device.createBuffer({ size, usage: 0x1 | 0x8, mappedAtCreation: true }); // MAP_READ | COPY_DST
      staging.unmap();
      return staging;
    } finally { // createBuffer throws if there is no memory to map
      this.errors.close(() => `a read of ${ofShape(size, shape)}`);
    }
  }

  /** Marks a batch and all later ones as failed: they may have read its results before the failure was known. */
  #fail(batch: number): void {
    if (this.errors.lost === null) this.submit(); // so that the open batch is among them, and the next is not
    for (let since = batch; since < this.batch; since++) this.#failed.add(since);
  }

  /** The failed batch, if any, that should have written a memory or a slot of it. */
  #failure(memory: Memory): number | undefined {
    return partsOf(memory).find((part) => this.#failed.has(part.written))?.written;
  }

  /** Whether the content of a memory is missing: the device refused the memory itself, or the batch that should have written it. */
  #isMissing(memory: Memory): boolean {
    return memory.refused || this.#failure(memory) !== undefined;
  }

  /** The batch that a dispatch's results depend on: the open one, or a failed one that should have written something that the dispatch binds. */
  #origin(memories: readonly Memory[]): number {
    if (this.#failed.size === 0) return this.batch;
    return memories.map((memory) => this.#failure(memory)).find((batch) => batch !== undefined) ?? this.batch;
  }

  /** Call it before a dispatch that overwrites a whole memory: then it no longer matters whether a failed batch should have written it. */
  renew(memory: Memory): void {
    memory.written = this.batch;
  }

  /** Clears the caches that refer to the pool's buffers, and destroys free staging buffers and pages of the arena. */
  trim(): void {
    this.gathering?.settle();
    this.forget();
    for (const buffers of this.#staging.values()) for (const buffer of buffers) buffer.destroy();
    this.#staging.clear();
    this.arena.trim();
  }

  destroy(): void {
    this.trim();
    for (const { buffer } of this.#chunks) buffer.destroy();
    this.arena.destroy();
  }
}

/**
 * The content of a staging buffer. Deno finishes the mapping before `mapAsync` returns and then sleeps 10 ms inside the
 * promise, so the range is taken without the await if that works (0.1 ms). Dawn and browsers throw; there the await comes first.
 */
async function mapped(staging: GPUBuffer, bytes: number): Promise<ArrayBuffer> {
  const ready = staging.mapAsync(0x1, 0, bytes); // GPUMapMode.READ
  if ("Deno" in globalThis) {
    ready.catch(() => {}); // unmapping before it resolves rejects it
    try {
      return staging.getMappedRange(0, bytes);
    } catch {
      // not mapped yet: a device of another implementation
    }
  }
  await ready;
  return staging.getMappedRange(0, bytes);
}

const notComputed = () =>
  new Error("GPU: this tensor was not computed: the device had refused the batch that it belongs to, and has said why");

/** The slots of a memory, or itself. */
const partsOf = (memory: Memory): readonly Memory[] => memory.slots.length > 0 ? memory.slots : [memory];

/** Whether a dispatch uses what a waiting launch writes, or writes what one reads. */
function isAwaited({ writes }: Pipeline, memories: readonly (Memory | null)[]): boolean {
  for (let i = 0; i < memories.length; i++) {
    const awaited = memories[i]?.awaited;
    if (awaited && (writes[i] || awaited === "write")) return true;
  }
  return false;
}

function matches(
  { pipeline, memories, params }: Entry,
  other: Pipeline,
  given: readonly (Memory | null)[],
  values: readonly number[],
): boolean {
  if (pipeline !== other) return false;
  for (let i = 0; i < memories.length; i++) if (memories[i] !== given[i]) return false;
  for (let i = 0; i < params.length; i++) if (!Object.is(params[i], values[i])) return false;
  return true;
}

/** A dispatch with its operands, for messages. */
function nameOf({ pipeline, shapes, memories }: Entry): string {
  const on = pipeline.buffers.map((name, i) =>
    `${name} ${shapes[i] ? `[${shapes[i].join(", ")}]` : `of ${memories[i].bytes} bytes`}`
  );
  return `${pipeline.name} (${on.join(", ")})`;
}

function namesOf(entries: Entry[]): string {
  const names = [...new Map(entries.map((entry) => [entry.pipeline, entry])).values()].map(nameOf);
  const rest = names.length > 8 ? ` and ${names.length - 8} more kernels` : "";
  return names.slice(0, 8).join(", ") + rest || "copies";
}

/** Throws unless these are memories of the device. */
function checkMemories(
  { name, buffers }: Pipeline,
  memories: readonly (Memory | null)[],
  device: GPUDevice,
): asserts memories is readonly Memory[] {
  memories.forEach((memory, i) => {
    if (!(memory instanceof Memory)) {
      throw new TypeError(`${name}: ${buffers[i]} must be a Memory, got ${describe(memory)}`);
    }
    if (memory.owner.device !== device) {
      throw new TypeError(`${name}: ${buffers[i]} is on a device that was disposed or lost`);
    }
    if (memory.refused) {
      throw new Error(
        `${name}: ${buffers[i]} is missing: the device had no ${ofShape(memory.bytes, memory.shape)} for it`,
      );
    }
  });
}

/** Throws unless the parameters are numbers that their types hold. */
function checkParams({ name, params }: Pipeline, values: readonly number[]): void {
  params.forEach(([param, type], i) => {
    const value = values[i];
    if (typeof value !== "number") {
      throw new TypeError(`${name}: params.${param} must be a number, got ${describe(value)}`);
    }
    if (type === "f32") return;
    const [min, below] = type === "u32" ? [0, 2 ** 32] : [-(2 ** 31), 2 ** 31];
    checkNumber(name, `params.${param}`, value, { integer: true, min, below });
  });
}

/** One dispatch must not read and write the same buffer through different bindings: WebGPU would discard the whole pass. */
function checkAliasing({ name, buffers, writes }: Pipeline, memories: readonly Memory[]): void {
  memories.forEach((written, i) => {
    if (!writes[i]) return;
    if (written.owner.readOnly) {
      throw new TypeError(`${name}: ${buffers[i]} must be memory that may be written, got small host-written data`);
    }
    memories.forEach((other, j) => {
      if (i !== j && other.buffer === written.buffer && (!writes[j] || other === written)) {
        throw new TypeError(`${name}: ${buffers[i]} is written and must not lie in one buffer with ${buffers[j]}`);
      }
    });
  });
}
