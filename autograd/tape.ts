import { gpu } from "../kernels/gpu/gpu.ts";
import { gathered } from "../kernels/gpu/joined.ts";
import { checkFunction, checkOptions, describe } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { checkBackward, checkForward } from "./anomaly.ts";
import { scoped } from "./composed.ts";
import { added, addToLeaf, checkGradients, copyOf, gradientFor, unit } from "./gradients.ts";
import { outside } from "./ledger.ts";
import { innermost, Scope } from "./scope.ts";
import { BYTES, type DType, DTYPES, Storage } from "./storage.ts";
import { checkTensor, defineMethod, type Recorded, Tensor } from "./tensor.ts";

/** Makes the tensor for the gradient of input `i`. If an optimizer has a free slot for it, it is made there. */
export type GradientOf = (i: number) => Tensor;

/** The argument of `record`. */
export interface RecordSpec {
  /** The op's name, for messages. */
  op: string;
  /** The tensors that gradients may flow to. */
  inputs: readonly Tensor[];
  /** The result. */
  output: Tensor;
  /**
   * Tensors that `backward` reads. They stay readable until it has run, even if they are closed before. If one of them is written in the meantime, the
   * backward pass throws.
   */
  saved?: readonly Tensor[];
  /** Tensors that nobody else uses: they are freed when `backward` has run. */
  hidden?: readonly Tensor[];
  /**
   * Returns the gradients of the inputs, in their order and with their shapes and dtypes; null if there is none or `wants[i]` is false. Runs unrecorded.
   * `dOutput` is lent: other gradients may share its memory, so do not write to it or keep it.
   *
   * `gradientOf(i)` makes a tensor for the gradient of input i: if that is a parameter of an optimizer, writing there saves a copy. `earlier(i)` is the
   * gradient that input i already has from later ops, or null. A rule that calls it must add that gradient to its own result, which saves a launch that
   * adds the two.
   */
  backward: (
    dOutput: Tensor,
    wants: readonly boolean[],
    gradientOf: GradientOf,
    earlier: (i: number) => Tensor | null,
  ) => readonly (Tensor | null)[];
}

class Record implements Recorded {
  gradient: Tensor | null = null;
  /** Null after it was walked or its tape was closed. */
  spec: RecordSpec | null;
  readonly op: string;
  readonly wants: boolean[] = [];
  /** The records of the inputs at the time of recording: an input may be disposed of before the walk. */
  sources: (Record | null)[] = [];
  versions: number[] = [];

  constructor(readonly tape: Tape, public index: number, spec: RecordSpec) {
    const { op, inputs, saved } = spec; // copies, since the caller may change the lists before the walk
    this.spec = { ...spec, inputs: [...inputs], saved: saved && [...saved] };
    this.op = op;
    for (const x of inputs) {
      this.sources.push(x.record as Record | null);
      this.wants.push(x.requiresGrad);
    }
    for (const x of this.saved) {
      x.save();
      this.versions.push(x.storage.version);
    }
  }

  get saved(): readonly Tensor[] {
    return this.spec?.saved ?? [];
  }

  /** Frees what only this record holds. */
  finish(): void {
    for (const x of this.saved) x.unsave();
    for (const hidden of this.spec?.hidden ?? []) hidden.dispose();
    this.gradient?.dispose();
    this.gradient = this.spec = null; // a result that is kept must not hold on to the graph that led to it
    this.sources = this.versions = [];
  }
}

let openTape: Tape | null = null;
/** How many tapes were opened: the number of the step in messages. */
let tapes = 0;
let recording = true;

/** The state of the random generator. */
export interface RandomState {
  /** The argument of `manualSeed`. */
  seed: number;
  /** How many tapes with random ops, and random ops outside of a tape, there were since. */
  counter: number;
}

/** Internal: the state of the random generator, see random.ts. `checkpoint` restores it. */
export const generator: RandomState = { seed: 0, counter: 0 };

/** Internal: the open tape, whether or not it is recording. */
export function currentTape(): Tape | null {
  return openTape;
}

/** Internal: the open tape, if it is recording. */
export function activeTape(): Tape | null {
  return recording ? openTape : null;
}

/**
 * Records every op that needs a gradient while it is open. It also owns the memory of one training step: closing it frees what recorded ops made. Parameters,
 * `.grad` and optimizer state belong to their objects, not to the tape.
 *
 * Only one tape can be open: opening a second one throws an Error that says where the first was opened. Closing a tape submits the step (very short steps a few
 * at a time) and does not wait for the GPU.
 *
 * @example
 * ```ts
 * import { init, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([[2]], { requiresGrad: true });
 * for (let step = 0; step < 3; step++) {
 *   using tape = new Tape();
 *   const loss = w.mul(3).sub(1).square().sum();
 *   loss.backward();
 * }
 * console.log(await w.grad!.array()); // three times 2·3·(3·2 − 1)
 * ```
 */
export class Tape extends Scope {
  /** Its name in messages. */
  override readonly kind: string = "tape";
  #records: Record[] = [];
  #openedAt: Error | null;
  /**
   * The random state of the step, and how many ops have drawn from it; the op's number is part of what it draws. See random.ts.
   * @internal
   */
  random: { state: Tensor; ops: number } | null = null;
  /**
   * The leaves that get gradients; null for all.
   * @internal
   */
  leaves: readonly Tensor[] | null = null;

  constructor() {
    gpu();
    if (openTape) {
      const where = outside(openTape.#openedAt?.stack);
      throw new Error(`Tape: one tape is open already, opened ${where}; close it first (using, or close())`);
    }
    super();
    this.#openedAt = new Error();
    openTape = this;
    tapes++;
  }

  /**
   * See `record`.
   * @internal
   */
  add(spec: RecordSpec): void {
    const { output } = spec;
    output.requiresGrad = true;
    // results belong to the tape even if a scope is open inside it, except what a checkpoint recomputes, which only its own walk needs
    if (output.owner === innermost() && choices === null) this.adopt(output);
    const record = new Record(this, this.#records.length, spec);
    this.#records.push(record);
    output.record = record;
  }

  /**
   * Walks the records backward from `last`.
   * @internal
   */
  walk(last: Record, dOutput: Tensor): void {
    // a copy if it may share memory with a leaf's gradient, which changes during the walk
    const isAlone = dOutput.owner instanceof Scope && dOutput.storage.owners === 1;
    last.gradient = (isAlone ? dOutput.sameMemory(dOutput.shape, "backward") : copyOf(dOutput)).keep();
    const { lent } = Tensor;
    try {
      gathered(() => this.#walkBack(last, 0));
    } finally {
      Tensor.lent = lent;
      // an exception leaves gradients in records that were not reached
      for (const record of this.#records) {
        record.gradient?.dispose();
        record.gradient = null;
      }
      this.#records = this.#records.filter(({ spec }) => spec !== null);
      this.#records.forEach((record, i) => record.index = i);
    }
  }

  /**
   * Records `fn` after the other records, walks the new records at once, and removes them. Gradients of earlier results wait in those results' records.
   * @internal
   */
  walkAgain(fn: () => Tensor, dOutput: Tensor): void {
    const first = this.#records.length, { count } = Tensor;
    let output: Tensor | null = null;
    recording = true;
    try {
      output = fn();
      const last = output.record as Record | null;
      if (!last || last.index < first) return; // nothing in it needs a gradient
      last.gradient = dOutput.sameMemory(dOutput.shape, "checkpoint").keep();
      recording = false;
      this.#walkBack(last, first);
    } finally {
      recording = false;
      for (const record of this.#records.splice(first)) record.finish();
      if (output && output.number >= count) output.dispose(); // also if fn keeps its result: the caller has that of the forward pass
    }
  }

  /** Walks the records from `last` back to number `first`, as far as they have gradients. */
  #walkBack(last: Record, first: number): void {
    for (let i = last.index; i >= first; i--) {
      const record = this.#records[i];
      if (record.gradient === null) continue;
      const scope = new Scope(); // with `using`, which V8 does not optimize, the backward pass of a small GPT takes the host a tenth longer
      try {
        this.#step(record, scope);
      } finally {
        scope.close();
        record.finish();
      }
    }
  }

  /** Calls the backward rule of a record, in its own scope, and passes the gradients that it returns to the inputs. */
  #step(record: Record, scope: Scope): void {
    const { wants, saved, versions } = record, spec = record.spec!;
    for (let i = 0; i < saved.length; i++) {
      if (saved[i].storage.version === versions[i]) continue;
      const shape = saved[i].shape.join(", ");
      throw new Error(`backward: an input of ${spec.op} (shape [${shape}]) was changed in place after it was used`);
    }
    Tensor.lent = saved;
    const read = [record.gradient!, ...saved];
    const whole: number[] = []; // inputs whose returned gradient includes the earlier one
    const gradients = spec.backward(
      record.gradient!,
      wants,
      // a closed input has lost its own record
      (i) => gradientFor(spec.inputs[i], record.sources[i] === null, read),
      (i) => {
        const { sources } = record, earlier = sources[i]?.gradient ?? null;
        if (earlier === null || sources.indexOf(sources[i]) !== i) return null; // if inputs are the same tensor, it must be added only once
        whole.push(i);
        return earlier;
      },
    );
    checkGradients(spec.op, spec.inputs, gradients);
    if (gpu().debug) checkBackward(gpu(), spec.op, spec.output, gradients, tapes);
    for (let i = 0; i < wants.length; i++) {
      const input = spec.inputs[i], gradient = gradients[i];
      if (!wants[i] || !gradient) continue;
      const isLast = !isSharedLater(gradients, i), isOwn = isLast && gradient.owner === scope;
      const target = record.sources[i];
      if (target) {
        if (target.spec === null) throw gone(target);
        if (whole.includes(i)) {
          const earlier = target.gradient; // freed only afterwards: the rule may have returned it as it was
          target.gradient = added(null, gradient, isOwn);
          earlier?.dispose();
        } else target.gradient = added(target.gradient, gradient, isOwn);
      } else if (!input.closed && input.requiresGrad && (this.leaves?.includes(input) ?? true)) { // requiresGrad may have been switched off since
        const isFreed = isLast && (gradient === record.gradient || spec.hidden?.includes(gradient) === true);
        addToLeaf(input, gradient, isOwn, isFreed);
      }
    }
  }

  /** Closes the tape: frees what it owns and submits what was encoded, if that is enough for a submit. */
  override [Symbol.dispose](): void {
    if (this.closed) return;
    for (const record of this.#records) record.finish();
    this.#records = [];
    this.#openedAt = this.random = null; // records of kept results refer to the tape
    super[Symbol.dispose]();
    if (openTape === this) openTape = null;
    try {
      gpu().queue.stepped();
    } catch {
      // closing never throws: if the device was lost, the next call says so
    }
  }
}

/** Whether the gradient of input `i` is also that of a later input: it must not change before that one has it. */
function isSharedLater(gradients: readonly (Tensor | null)[], i: number): boolean {
  const { storage } = gradients[i]!;
  for (let j = i + 1; j < gradients.length; j++) if (gradients[j]?.storage === storage) return true;
  return false;
}

/** The error for a record that can no longer be walked. */
const gone = ({ op, tape }: Record): Error =>
  new Error(
    tape.closed
      ? `backward: the tape that recorded ${op} was closed; detach() its result to use it without a gradient`
      : `backward: ${op} was walked before, and what it had saved is gone; add the losses up and call backward() once`,
  );

let walking = false;

defineMethod("backward", (loss: Tensor, dOutput?: Tensor): void => {
  checkTensor("backward", "the tensor", loss);
  if (walking) throw new Error("backward: it is running already; the backward of a recorded op must not call it");
  const record = loss.record as Record | null;
  if (record?.tape.closed) {
    const shape = loss.shape.join(", ");
    throw new Error(
      `backward: no open tape recorded this tensor: that of ${record.op} (shape [${shape}]) was closed; call backward() inside its block`,
    );
  }
  if (record?.spec === null) throw gone(record);
  if (!record) {
    throw new Error(
      "backward: no open tape recorded this tensor; compute it inside `using tape = new Tape()`, not in noGrad, from tensors with requiresGrad",
    );
  }
  if (dOutput !== undefined) {
    checkTensor("backward", "dOutput", dOutput, [loss.dtype], loss.shape);
  } else if (loss.size !== 1) {
    throw new TypeError(
      `backward: a tensor of shape [${loss.shape.join(", ")}] needs dOutput of that shape; only a scalar needs none`,
    );
  }
  const before = recording;
  recording = false;
  walking = true;
  try {
    using _scope = new Scope();
    record.tape.walk(record, dOutput ?? unit(loss));
  } finally {
    walking = false;
    recording = before;
  }
});

/**
 * Makes `output` differentiable with respect to `inputs`, and returns it. If no tape is open or no input needs a gradient, it only frees `hidden`. Every op of
 * this package ends with it, and so should yours. Throws a TypeError for wrong or unknown members of the spec, for a closed tensor in it, and for an output
 * that is one of the inputs.
 *
 * @example
 * ```ts
 * import { defineKernel, init, record, Tape, Tensor, tensor, zeros } from "@limbeck/limbeck";
 *
 * const forward = defineKernel({
 *   name: "cube",
 *   buffers: { x: "read f32", y: "write f32" },
 *   params: { size: "u32" },
 *   main: "if (thread < params.size) { y[thread] = x[thread] * x[thread] * x[thread]; }",
 * });
 *
 * function cube(x: Tensor): Tensor {
 *   const y = zeros(x.shape);
 *   forward.run({ x: x.memory, y: y.memory }, { size: x.size }, Math.ceil(x.size / 256));
 *   return record({ op: "cube", inputs: [x], output: y, saved: [x], backward: (dY) => [dY.mul(x.square()).mul(3)] });
 * }
 *
 * await init();
 * const x = tensor([1, 2], { requiresGrad: true });
 * using tape = new Tape();
 * cube(x).sum().backward();
 * console.log(await x.grad!.array()); // [3, 12]
 * ```
 */
export function record(spec: RecordSpec): Tensor {
  checkRecord(spec);
  const isRecorded = needsGradient(spec.inputs);
  checkTensor("record", "output", spec.output, isRecorded ? undefined : DTYPES);
  if (spec.inputs.includes(spec.output)) throw new TypeError("record: output must not be one of the inputs");
  if (spec.output.storage.gpu.debug) checkForward(spec.op, spec.inputs, spec.output, tapes);
  if (isRecorded) activeTape()!.add(spec);
  else for (const hidden of spec.hidden ?? []) hidden.dispose();
  return spec.output;
}

const RECORD = ["op", "inputs", "output", "saved", "hidden", "backward"];

function checkRecord(spec: RecordSpec): void {
  checkOptions("record", spec, RECORD);
  if (typeof spec.op !== "string") throw new TypeError(`record: op must be a string, got ${describe(spec.op)}`);
  checkRecorded("inputs", spec.inputs);
  if (spec.saved !== undefined) checkRecorded("saved", spec.saved);
  if (spec.hidden !== undefined) checkRecorded("hidden", spec.hidden);
  checkFunction("record", "backward", spec.backward);
}

function checkRecorded(name: string, xs: readonly Tensor[]): void {
  if (!Array.isArray(xs)) throw new TypeError(`record: ${name} must be an array of tensors, got ${describe(xs)}`);
  for (let i = 0; i < xs.length; i++) { // every op comes here, so the name for messages is built only if needed
    if (!(xs[i] instanceof Tensor && xs[i].isUsable)) checkTensor("record", `${name}[${i}]`, xs[i], DTYPES);
  }
}

/** Whether an op on these inputs will be recorded. */
export function needsGradient(inputs: readonly Tensor[]): boolean {
  const isWanted = inputs.some((x) => x.requiresGrad);
  if (isWanted && choices?.next === null) choices.isNeeded = true;
  return isWanted && activeTape() !== null;
}

/** Internal: a tensor for a record's `hidden`. If an exception prevents the record, the tape or scope frees it. */
export function hidden(shape: readonly number[], dtype: DType): Tensor {
  const memory = gpu().pool.take(sizeOf(shape) * BYTES[dtype], "scratch", shape);
  const tensor = new Tensor(new Storage(memory), shape, dtype, "scratch");
  (openTape ?? innermost())?.adopt(tensor);
  return tensor;
}

/**
 * Runs `fn` unrecorded, passes the tensors that it returns, also inside arrays and records, to the enclosing scope, and frees everything else that it made.
 * Throws a TypeError if `fn` returns a Promise: what it made would be gone before the Promise resolves.
 *
 * @example
 * ```ts
 * import { init, noGrad, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([1, 2], { requiresGrad: true });
 * const y = noGrad(() => w.mul(2)); // needs no gradient
 * console.log(await y.array()); // [2, 4]
 * ```
 */
export function noGrad<T>(fn: () => T): T {
  checkFunction("noGrad", "fn", fn);
  const before = recording;
  recording = false;
  try {
    return scoped("noGrad", () => {
      const result = fn();
      if (!(result instanceof Promise)) return result;
      result.catch(() => {});
      throw new TypeError("noGrad: fn must not be async: what it made would be gone before its Promise resolves");
    });
  } finally {
    recording = before;
  }
}

/** What a checkpoint remembers while its function runs. */
export interface Choices {
  /** The choices that were made, such as whether dropout is on. */
  made: unknown[];
  /** The index of the one that the recomputation repeats next; null in the forward pass. */
  next: number | null;
  /** Whether any op needs a gradient. */
  isNeeded: boolean;
}

let choices: Choices | null = null;

/** Internal: whether a checkpoint's function is running. */
export const isInCheckpoint = (): boolean => choices !== null;

/** Internal: runs the function of a checkpoint. */
export function choosing<T>(own: Choices, fn: () => T): T {
  choices = own;
  try {
    return fn();
  } finally {
    choices = null;
  }
}

/**
 * Internal: for a choice that depends on state outside the tensors. In the recomputation of a checkpoint it returns the choice of the forward pass.
 */
export function chosen<T>(value: T): T {
  if (choices === null) return value;
  if (choices.next !== null) return choices.made[choices.next++] as T;
  choices.made.push(value);
  return value;
}
