/** Checkpoints: everything that a training run needs to go on as if it had not stopped. */
import { checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { randomState, setRandomState } from "../autograd/random.ts";
import type { Tensor } from "../autograd/tensor.ts";
import { Module } from "./module.ts";
import { Optimizer, type OptimizerState } from "./optim.ts";
import { loadSafetensors, loadSafetensorsMetadata, saveSafetensors } from "./safetensors.ts";

/** What a checkpoint holds. */
export interface Checkpoint {
  /** Its parameters by name. */
  model: Module;
  /** Its moments and step counts. */
  optimizer?: Optimizer;
  /** Steps done; schedules and batches are functions of it. */
  step?: number;
  /** Anything that JSON can hold: curves, the epoch, options. */
  extra?: unknown;
}

const under = (prefix: string, tensors: Record<string, Tensor>) =>
  Object.fromEntries(Object.entries(tensors).map(([name, x]) => [`${prefix}.${name}`, x]));

function parts(op: string, { model, optimizer }: Partial<Checkpoint>): void {
  if (!(model instanceof Module)) throw new TypeError(`${op}: model must be a Module, got ${describe(model)}`);
  if (optimizer !== undefined && !(optimizer instanceof Optimizer)) {
    throw new TypeError(`${op}: optimizer must be an Optimizer, got ${describe(optimizer)}`);
  }
}

/**
 * Saves model, optimizer, step and random state to a safetensors file: a run that is loaded from it repeats the unbroken run bit for bit on the
 * same adapter. Written under a temporary name and renamed: a kill at any moment leaves the old or the new file whole.
 *
 * @example
 * ```ts
 * import { init, loadCheckpoint, nn, optim, saveCheckpoint } from "@limbeck/limbeck";
 *
 * await init();
 * const model = new nn.Linear(4, 2), optimizer = new optim.AdamW(model.parameters()), path = await Deno.makeTempFile();
 * await saveCheckpoint(path, { model, optimizer, step: 100 });
 * const { step } = await loadCheckpoint(path, { model, optimizer });
 * console.log(step); // 100
 * ```
 */
export async function saveCheckpoint(path: string, checkpoint: Checkpoint): Promise<void> {
  const op = "saveCheckpoint";
  checkOptions(op, checkpoint, ["model", "optimizer", "step", "extra"]);
  parts(op, checkpoint);
  const { model, optimizer, step = 0, extra = null } = checkpoint;
  checkNumber(op, "step", step, { integer: true, min: 0 });
  const state = optimizer?.stateDict();
  try {
    const tensors = { ...under("model", model.stateDict()), ...under("optimizer", state?.tensors ?? {}) };
    await saveSafetensors(path, tensors, {
      limbeck: JSON.stringify({
        step,
        extra,
        random: randomState(),
        optimizer: state && { ...state, tensors: undefined },
      }),
    });
  } finally {
    for (const x of Object.values(state?.tensors ?? {})) x.dispose();
  }
}

/**
 * Loads what `saveCheckpoint` saved into a model and optimizer of the same make, and sets the random state. Returns the step and `extra`.
 * Throws an Error where the file is no checkpoint or does not fit; then the random state is as it was.
 */
export async function loadCheckpoint(
  path: string,
  into: { model: Module; optimizer?: Optimizer },
): Promise<{ step: number; extra: unknown }> {
  const op = "loadCheckpoint";
  checkOptions(op, into, ["model", "optimizer"]);
  parts(op, into);
  const bytes = await Deno.readFile(path);
  const metadata = (await loadSafetensorsMetadata(bytes)).limbeck;
  if (metadata === undefined) {
    throw new Error(`${op}: ${JSON.stringify(path)} is a safetensors file, but no checkpoint; use loadSafetensors`);
  }
  const { step, extra, random, optimizer } = parseState(op, path, metadata);
  if (into.optimizer && !optimizer) throw new Error(`${op}: ${JSON.stringify(path)} holds no optimizer`);
  const tensors = await loadSafetensors(bytes);
  try {
    const of = (prefix: string) =>
      Object.fromEntries(
        Object.entries(tensors).filter(([name]) => name.startsWith(prefix)).map(([name, x]) => [
          name.slice(prefix.length),
          x,
        ]),
      );
    const state = { ...optimizer, tensors: of("optimizer.") } as OptimizerState;
    into.optimizer?.checkState(state); // both fit, or neither is written
    into.model.loadStateDict(of("model."));
    into.optimizer?.loadStateDict(state);
  } finally {
    for (const x of Object.values(tensors)) x.dispose();
  }
  setRandomState(random);
  return { step, extra };
}

interface State {
  step: number;
  extra: unknown;
  random: { seed: number; counter: number };
  optimizer?: Omit<OptimizerState, "tensors">;
}

function parseState(op: string, path: string, text: string): State {
  try {
    const state = JSON.parse(text);
    if (
      Number.isInteger(state?.step) && Number.isInteger(state.random?.seed) && Number.isInteger(state.random?.counter)
    ) return state;
  } catch {
    // said below
  }
  throw new Error(`${op}: the state in ${JSON.stringify(path)} is damaged`);
}
