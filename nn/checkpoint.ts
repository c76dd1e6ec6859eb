/** Checkpoints: everything that a training run needs to continue as if it had not stopped. */
import { checkBoolean, checkNumber, checkOptions, describe, isRecord } from "../kernels/check.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { checkTuning, type Tuning } from "../kernels/gpu/tuning.ts";
import { randomState, setRandomState } from "../autograd/random.ts";
import type { Tensor } from "../autograd/tensor.ts";
import { Module } from "./module.ts";
import { Optimizer, type OptimizerState } from "./optim.ts";
import { checkPath, inTurn, replaceFile } from "./files.ts";
import { encode, openSafetensors } from "./safetensors.ts";

/** What a checkpoint holds. */
export interface Checkpoint {
  /** The model, whose parameters and buffers are saved by name. */
  model: Module;
  /** The optimizer, whose state tensors, rates and step counts are saved. */
  optimizer?: Optimizer;
  /** The number of steps done, from which schedules and batches follow. */
  step?: number;
  /** Anything that JSON can hold: curves, the epoch, options. Infinity, NaN, a Map or a typed array is a TypeError. */
  extra?: unknown;
}

/** Options of `saveCheckpoint`. */
export interface SaveCheckpointOptions {
  /** Whether a file that holds more may be replaced; false by default. */
  overwrite?: boolean;
}

const under = (prefix: string, tensors: Record<string, Tensor>) =>
  Object.fromEntries(Object.entries(tensors).map(([name, x]) => [`${prefix}.${name}`, x]));

function checkParts(op: string, { model, optimizer }: Partial<Checkpoint>): void {
  if (!(model instanceof Module)) throw new TypeError(`${op}: model must be a Module, got ${describe(model)}`);
  if (optimizer !== undefined && !(optimizer instanceof Optimizer)) {
    throw new TypeError(`${op}: optimizer must be an Optimizer, got ${describe(optimizer)}`);
  }
}

/**
 * Saves model, optimizer, step, random state and `info.tuning` to a safetensors file: a run resumed from it repeats the uninterrupted run bit for bit on the
 * same adapter. Save outside of a tape: in an open one, what random ops draw also depends on how many came before them, which is not saved. The file is
 * written under a temporary name and renamed: whenever the process is killed, either the old file or the new one is complete.
 *
 * Throws an Error rather than lose data: if the existing file is a checkpoint of a later step, has tensors that this one lacks (an optimizer, a larger
 * model), or is not a checkpoint. `overwrite: true` replaces it anyway.
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
export async function saveCheckpoint(
  path: string,
  checkpoint: Checkpoint,
  options: SaveCheckpointOptions = {},
): Promise<void> {
  const op = "saveCheckpoint";
  checkPath(op, path);
  checkOptions(op, options, ["overwrite"]);
  const { overwrite = false } = options;
  checkBoolean(op, "overwrite", overwrite);
  checkOptions(op, checkpoint, ["model", "optimizer", "step", "extra"]);
  checkParts(op, checkpoint);
  const { model, optimizer, step = 0, extra = null } = checkpoint;
  checkNumber(op, "step", step, { integer: true, min: 0 });
  checkJson(op, "extra", extra);
  const state = optimizer?.stateDict();
  try {
    const tensors = { ...under("model", model.stateDict()), ...under("optimizer", state?.tensors ?? {}) };
    const limbeck = JSON.stringify({
      step,
      extra,
      random: randomState(),
      tuning: gpu().info.tuning,
      optimizer: state && { ...state, tensors: undefined },
    });
    // encoding starts before the old file is read, since a training loop may continue meanwhile, and save again
    const bytes = encode(op, tensors, { limbeck });
    bytes.catch(() => {}); // it is awaited later
    await inTurn(path, async () => {
      const kept = overwrite ? Promise.resolve() : checkKept(op, path, step, Object.keys(tensors));
      await Promise.all([kept, bytes]);
      await replaceFile(op, path, await bytes);
    });
  } finally {
    for (const x of Object.values(state?.tensors ?? {})) x.dispose();
  }
}

/**
 * Loads what `saveCheckpoint` saved into a model and an optimizer of the same kind, and sets the random state and the tuning. Returns the step and `extra`.
 * Throws an Error if the file is not a checkpoint or does not fit; then nothing has changed.
 *
 * @example
 * ```ts
 * import { init, loadCheckpoint, nn, saveCheckpoint } from "@limbeck/limbeck";
 *
 * await init();
 * const model = new nn.Linear(4, 2), path = await Deno.makeTempFile();
 * await saveCheckpoint(path, { model, step: 3, extra: { epoch: 1 } });
 * console.log(await loadCheckpoint(path, { model })); // { step: 3, extra: { epoch: 1 } }
 * ```
 */
export async function loadCheckpoint(
  path: string,
  into: { model: Module; optimizer?: Optimizer },
): Promise<{ step: number; extra: unknown }> {
  const op = "loadCheckpoint";
  checkOptions(op, into, ["model", "optimizer"]);
  checkParts(op, into);
  checkPath(op, path);
  return await openSafetensors(op, path, async ({ metadata, load }) => {
    if (metadata.limbeck === undefined) {
      throw new Error(`${op}: ${JSON.stringify(path)} is a safetensors file, but no checkpoint; use loadSafetensors`);
    }
    const saved = parseState(metadata.limbeck);
    if (!saved) throw new Error(`${op}: the state in ${JSON.stringify(path)} is damaged`);
    const { step, extra = null, random, tuning = null, optimizer } = saved;
    if (tuning) checkTuning(`${op}: tuning`, tuning);
    if (into.optimizer && !optimizer) throw new Error(`${op}: ${JSON.stringify(path)} holds no optimizer`);
    const tensors = await load();
    try {
      const of = (prefix: string) => {
        const own = Object.entries(tensors).filter(([name]) => name.startsWith(prefix));
        return Object.fromEntries(own.map(([name, x]) => [name.slice(prefix.length), x]));
      };
      const state = { ...optimizer, tensors: of("optimizer.") } as OptimizerState;
      into.optimizer?.checkState(state); // both fit, or neither is written
      into.model.loadStateDict(of("model."));
      into.optimizer?.loadStateDict(state);
    } finally {
      for (const x of Object.values(tensors)) x.dispose();
    }
    setRandomState(random);
    gpu().info.tuning = tuning;
    return { step, extra };
  });
}

/** Throws if the file at `path` holds more than a checkpoint of this step with these tensors would, or is not a checkpoint. */
async function checkKept(op: string, path: string, step: number, names: string[]): Promise<void> {
  const found = await Deno.stat(path).catch((error) => {
    if (error instanceof Deno.errors.NotFound) return null;
    throw error;
  });
  if (found !== null && !found.isFile) throw new RangeError(`${op}: ${JSON.stringify(path)} is no file`);
  if (found === null || found.size === 0) return;
  const why = await openSafetensors(op, path, ({ metadata, names: old }) => {
    const state = metadata.limbeck === undefined ? null : parseState(metadata.limbeck);
    if (state === null) return "is no checkpoint";
    if (state.step > step) return `is a checkpoint of step ${state.step}, and this one is of step ${step}`;
    const has = new Set(names), lost = old.filter((name) => !has.has(name));
    return lost.length > 0
      ? `has ${lost.length} tensors that this checkpoint lacks: ${lost.slice(0, 4).join(", ")}${lost[4] ? ", …" : ""}`
      : null;
  }).catch((error) => {
    if (error instanceof RangeError) return "is no checkpoint";
    throw error;
  });
  if (why) throw new Error(`${op}: ${JSON.stringify(path)} ${why}; to replace it all the same, pass overwrite: true`);
}

interface State {
  step: number;
  extra: unknown;
  random: { seed: number; counter: number };
  tuning?: Tuning | null;
  optimizer?: Omit<OptimizerState, "tensors">;
}

function parseState(text: string): State | null {
  try {
    const state = JSON.parse(text);
    const whole = (n: unknown) => Number.isSafeInteger(n) && (n as number) >= 0;
    const { seed, counter } = state.random;
    return whole(state.step) && whole(seed) && seed < 2 ** 32 && whole(counter) ? state : null;
  } catch {
    return null;
  }
}

/** Throws a TypeError for a value that JSON would silently leave out or change; `around` are the objects that contain it. */
function checkJson(op: string, name: string, value: unknown, around: readonly unknown[] = []): void {
  const isNumber = Number.isFinite(value) && !Object.is(value, -0);
  if (value === null || typeof value === "string" || typeof value === "boolean" || isNumber) return;
  const isArray = Array.isArray(value);
  const more = isArray && Object.keys(value).length > value.length ||
    isRecord(value) && Object.getOwnPropertySymbols(value).length > 0;
  if ((!isArray && !isRecord(value)) || more || around.includes(value)) {
    const what = around.includes(value) ? "an object that it lies in" : Object.is(value, -0) ? "-0" : describe(value);
    throw new TypeError(`${op}: ${name} must be what JSON can hold, got ${what}`);
  }
  const inner = [...around, value];
  for (const [key, x] of isArray ? value.entries() : Object.entries(value)) {
    if (isArray) checkJson(op, `${name}[${key}]`, x, inner);
    else if (x !== undefined) checkJson(op, `${name}.${key}`, x, inner); // undefined is left out, and reads as undefined again
  }
}
