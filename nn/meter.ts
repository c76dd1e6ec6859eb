/** Collects scalars, such as a loss, without waiting for the GPU. */
import { describe } from "../kernels/check.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import type { Memory } from "../kernels/gpu/memory.ts";
import { append } from "../kernels/meter.ts";
import { fill } from "../kernels/random.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";

interface List {
  memory: Memory;
  capacity: number;
  count: number;
}

function checkDevice(op: string, { memory }: List): void {
  if (memory.owner.device === gpu().device) return;
  throw new TypeError(`Meter.${op}: the values are on a device that was disposed or lost; dispose() of the Meter`);
}

/**
 * Collects scalars by name on the GPU and reads many at once: a training step adds its loss and continues, and from time to time one read fetches them all. A
 * read waits for the GPU, an `add` never does.
 *
 * `add` throws a TypeError for anything but an f32 scalar, both throw one if the device of the values so far was disposed or lost.
 *
 * @example
 * ```ts
 * import { init, Meter, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const meter = new Meter();
 * for (let step = 0; step < 3; step++) meter.add("loss", tensor(1 / (step + 1)));
 * console.log(await meter.read()); // { loss: [1, 0.5, 0.333…] }
 * meter.dispose();
 * ```
 */
export class Meter implements Disposable {
  #lists = new Map<string, List>();

  /** Copies a scalar (f32, one element). Throws a TypeError for anything else. */
  add(name: string, scalar: Tensor): void {
    if (typeof name !== "string") throw new TypeError(`Meter.add: name must be a string, got ${describe(name)}`);
    checkTensor("Meter.add", "scalar", scalar, ["f32"]);
    if (scalar.size !== 1) {
      throw new TypeError(`Meter.add: scalar must have one element, got shape [${scalar.shape.join(", ")}]`);
    }
    let list = this.#lists.get(name);
    if (list) checkDevice("add", list);
    else this.#lists.set(name, list = this.#made(255));
    if (list.count === list.capacity) {
      const larger = this.#made(2 * list.capacity + 1);
      gpu().queue.copy(list.memory, larger.memory, 4 * (1 + list.count));
      list.memory.free();
      list.memory = larger.memory;
      list.capacity = larger.capacity;
    }
    append(scalar.memory, list.memory, list.capacity);
    list.count++;
  }

  #made(capacity: number): List {
    const memory = gpu().pool.take(4 * (1 + capacity), "Meter.add");
    fill(memory, 0, 1, "u32");
    return { memory, capacity, count: 0 };
  }

  /** The values added since the last read, by name and in order. */
  async read(): Promise<Record<string, number[]>> {
    const { queue } = gpu();
    for (const list of this.#lists.values()) checkDevice("read", list);
    const entries = [...this.#lists].map(async ([name, list]) => {
      const count = list.count;
      list.count = 0;
      const words = queue.read(list.memory, 4 * (1 + count));
      fill(list.memory, 0, 1, "u32"); // after the copy that the read has encoded
      return [name, Array.from(new Float32Array(await words, 4))] as const;
    });
    return Object.fromEntries(await Promise.all(entries));
  }

  /** Frees the lists. */
  dispose(): void {
    for (const { memory } of this.#lists.values()) memory.free();
    this.#lists.clear();
  }

  /** The same as `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
