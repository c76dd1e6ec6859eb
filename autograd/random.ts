import { checkNumber } from "../kernels/check.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { Storage } from "./storage.ts";
import { currentTape, generator, type RandomState } from "./tape.ts";
import { Tensor } from "./tensor.ts";

/**
 * Seeds everything random: `rand`, `randn`, `randint`, dropout, initial weights. The same seed gives the same numbers, also inside an open tape. Throws a
 * TypeError if the seed is not a number, a RangeError if it is not an integer in [0, 2³²).
 *
 * @example
 * ```ts
 * import { init, manualSeed, rand } from "@limbeck/limbeck";
 *
 * await init();
 * manualSeed(7);
 * const a = await rand([2]).array();
 * manualSeed(7);
 * console.log(a, await rand([2]).array()); // the same twice
 * ```
 */
export function manualSeed(seed: number): void {
  checkNumber("manualSeed", "seed", seed, { integer: true, min: 0, below: 2 ** 32 });
  setRandomState({ seed, counter: 0 });
}

/** The state of the generator: what a checkpoint saves. */
export function randomState(): RandomState {
  return { ...generator };
}

/** Sets the state of the generator. */
export function setRandomState({ seed, counter }: RandomState): void {
  Object.assign(generator, { seed, counter });
  const tape = currentTape();
  if (tape) tape.random = null; // otherwise an open tape would continue with its old state
}

/**
 * Internal: the arguments of an op's random kernel. `state` holds the seed and a counter; they change every step, so they are data. `op` is the number of the
 * op in its tape, the same every step, so it may be a parameter. Outside a tape each op increments the counter. Call `done` after launching the kernel.
 */
export function nextRandom(op = "random"): { state: Tensor; op: number; done: () => void } {
  const tape = currentTape();
  if (tape === null) {
    const state = upload(op);
    return { state, op: 0, done: () => state.dispose() };
  }
  if (!tape.random) {
    tape.random = { state: upload(op), ops: 0 };
    tape.adopt(tape.random.state); // whatever scope is open inside the tape
  }
  return { state: tape.random.state, op: tape.random.ops++, done: () => {} };
}

function upload(op: string): Tensor {
  const words = new Uint32Array([generator.seed, generator.counter++]);
  return Tensor.owned(
    new Storage(gpu().queue.upload(new Uint8Array(words.buffer), false, { purpose: "random", op, shape: [2] })),
    [2],
    "u32",
    "random",
  );
}
