/**
 * What all optimizers share. Parameters move into flat blocks (segments below the binding limit). A second block holds the gradients, which `backward` writes
 * there directly, so that a step is one dispatch per segment. A step skips a parameter whose `.grad` is null, including its weight decay.
 */
import { checkNumber, checkOptions, describe, isRecord } from "../kernels/check.ts";
import { type Gpu, gpu } from "../kernels/gpu/gpu.ts";
import { FlatBlock, type Memory } from "../kernels/gpu/memory.ts";
import { optimizerStep, type RuleName, RULES, SETTINGS } from "../kernels/optimizer.ts";
import { copyFlat } from "../kernels/elementwise.ts";
import { fill } from "../kernels/random.ts";
import type { Storage } from "../autograd/storage.ts";
import { noGrad } from "../autograd/tape.ts";
import { zeros } from "../ops/create.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";

/**
 * Parameters with their own hyperparameters, which may be changed between steps; those that are left out default to the optimizer's. A schedule that sets the
 * optimizer's `lr` does not reach a group with its own: keep the group and set `group.lr` as well.
 */
export interface ParameterGroup {
  /** Leaves of f32. */
  params: Iterable<Tensor>;
  /** The group's learning rate. */
  lr?: number;
  /** The group's weight decay. */
  weightDecay?: number;
}

/** A group's own hyperparameters. */
type Rates = Omit<ParameterGroup, "params">;

interface Slot {
  parameter: Tensor;
  home: Memory;
  gradient: Memory;
  group: Rates;
  /** Steps that this parameter has taken. */
  steps: number;
}

/** The numbers of a step, and what they follow from. */
interface Settings extends Required<Rates> {
  steps: number;
  numbers: number[];
}

interface Segment {
  floats: number;
  slots: Slot[];
  parameters: FlatBlock;
  gradients: FlatBlock;
  states: FlatBlock[];
  /** The slot of each 64 floats. */
  slotOf: Memory;
}

/** An optimizer's state, as `stateDict` gives it. */
export interface OptimizerState {
  /** The optimizer's class. */
  name: string;
  /** Its learning rate. */
  lr: number;
  /** The groups' own hyperparameters; if missing, loading leaves the optimizer's unchanged. */
  groups?: { lr?: number; weightDecay?: number }[];
  /** Steps that each parameter has taken. */
  steps: number[];
  /** Moments and the like by parameter. */
  tensors: Record<string, Tensor>;
}

/** Internal: throws unless `params` is iterable. */
export function checkIterable(op: string, params: unknown, more = ""): void {
  if (typeof params === "object" && params !== null && Symbol.iterator in params) return;
  throw new TypeError(`${op}: params must be an array of Tensors${more}, got ${describe(params)}`);
}

function checkRates(op: string, { lr, weightDecay }: Rates): void {
  if (lr !== undefined) checkNumber(op, "lr", lr, { min: 0 });
  if (weightDecay !== undefined) checkNumber(op, "weightDecay", weightDecay, { min: 0 });
}

/**
 * The base class of all optimizers: groups, state, and the step. See `SGD` and `AdamW` for examples. To follow a schedule, set `lr` before every step.
 *
 * A constructor throws a TypeError for parameters that are not f32 leaves, a RangeError for an empty list, for a parameter that is in two groups or shares its
 * memory with another one, and for numbers out of range. `step` throws an Error after `dispose()`, if the device is gone or if another optimizer has taken a
 * parameter since, a RangeError for a group's rate or decay out of range.
 */
export abstract class Optimizer {
  #lr = 0;
  #segments: Segment[];
  /** Those of all segments. */
  #slots: Slot[];
  #groups: Rates[] = [];
  #disposed = false;
  readonly #gpu: Gpu;
  #rule: RuleName;

  /**
   * For subclasses.
   * @internal
   */
  protected constructor(
    readonly name: string,
    params: Iterable<Tensor> | readonly ParameterGroup[],
    lr: number,
    readonly weightDecay: number,
    rule: RuleName,
    initialState = 0,
  ) {
    checkNumber(name, "weightDecay", weightDecay, { min: 0 });
    this.lr = lr;
    this.#rule = rule;
    this.#gpu = gpu();
    this.#segments = this.#layOut(this.#take(params), initialState);
    this.#slots = this.#segments.flatMap(({ slots }) => slots);
  }

  /** The learning rate of groups without their own. To follow a schedule, set it before every step. */
  get lr(): number {
    return this.#lr;
  }

  set lr(lr: number) {
    checkNumber(this.name, "lr", lr, { min: 0 });
    this.#lr = lr;
  }

  /** The parameters, each with its group. */
  #take(params: Iterable<Tensor> | readonly ParameterGroup[]): { parameter: Tensor; group: ParameterGroup }[] {
    checkIterable(this.name, params, " or of groups");
    const list = [...params as Iterable<Tensor | ParameterGroup>];
    const given = list.every((x) => x instanceof Tensor) ? [{ params: list as Tensor[] }] : list as ParameterGroup[];
    const groups = given.map((group) => isRecord(group) && Object.isFrozen(group) ? { ...group } : group); // loadStateDict writes to them
    const found = new Map<Storage, { parameter: Tensor; group: ParameterGroup }>();
    for (const group of groups) {
      if (!isRecord(group)) {
        throw new TypeError(
          `${this.name}: params must hold Tensors or groups alone, got ${describe(group)} among them`,
        );
      }
      checkOptions(this.name, group, ["params", "lr", "weightDecay"]);
      checkIterable(this.name, group.params);
      checkRates(this.name, group);
      for (const x of group.params) {
        checkTensor(this.name, "params", x, ["f32"]);
        if (x.record) throw new TypeError(`${this.name}: params must be leaves, got ${x}, which ${x.record.op} made`);
        const other = found.get(x.storage), which = `a parameter of shape [${x.shape.join(", ")}]`;
        if (other && other.parameter !== x) {
          throw new RangeError(`${this.name}: ${which} shares its memory with another one; hand in one of the two`);
        }
        if (other && other.group !== group) throw new RangeError(`${this.name}: ${which} is in two groups`);
        found.set(x.storage, { parameter: x, group });
      }
    }
    if (found.size === 0) throw new RangeError(`${this.name}: params must hold at least one parameter, got none`);
    this.#groups = groups;
    return [...found.values()];
  }

  /** Moves the parameters into flat blocks. */
  #layOut(all: { parameter: Tensor; group: ParameterGroup }[], initialState: number): Segment[] {
    const { pool, queue, info } = gpu();
    const limit = Math.floor(info.limits.maxStorageBufferBindingSize / 256) * 256;
    const cuts: typeof all[] = [];
    let used = Infinity;
    for (const entry of all) {
      const bytes = FlatBlock.slotBytes(entry.parameter.size * 4);
      if (used + bytes > limit) {
        cuts.push([]);
        used = 0;
      }
      cuts.at(-1)!.push(entry);
      used += bytes;
    }
    // allocate everything first: if there is too little memory, nothing has changed yet and nothing remains allocated
    const planned = cuts.map((entries) => {
      const sizes = entries.map(({ parameter }) => parameter.size * 4);
      const table = sizes.flatMap((bytes, i): number[] => new Array(FlatBlock.slotBytes(bytes) / 256).fill(i));
      return { entries, sizes, table: Uint32Array.from(table), taken: [] as Memory[] };
    });
    try {
      for (const { table, taken } of planned) {
        taken.push(queue.upload(new Uint8Array(table.buffer), true, { op: this.name }));
        for (let block = 0; block < 2 + RULES[this.#rule].states; block++) {
          taken.push(pool.take(256 * table.length, this.name));
        }
      }
    } catch (error) {
      for (const memory of planned.flatMap(({ taken }) => taken)) memory.free();
      throw error;
    }
    return planned.map(({ entries, sizes, table, taken: [slotOf, ...wholes] }) => {
      const [parameters, gradients, ...states] = wholes.map((whole) => new FlatBlock(pool, whole, sizes));
      const floats = 64 * table.length;
      for (const { whole } of states) fill(whole, initialState, floats, "f32");
      const slots = entries.map(({ parameter, group }, i): Slot => {
        const { storage } = parameter, home = parameters.slots[i], gradient = gradients.slots[i];
        storage.moveTo(home, sizes[i]);
        this.#lend(parameter, gradient);
        return { parameter, home, gradient, group, steps: 0 };
      });
      return { floats, slots, parameters, gradients, states, slotOf };
    });
  }

  /** Makes `gradient` the place where `backward` puts the parameter's gradient. An existing gradient moves there, unless it shares its memory. */
  #lend(parameter: Tensor, gradient: Memory): void {
    const { storage, grad } = parameter;
    if (grad?.storage.owners === 1 && grad !== parameter) grad.storage.moveTo(gradient, parameter.size * 4, true);
    storage.gradientHome?.leave();
    storage.gradientHome = gradient;
  }

  /** The numbers s0 … s6 of the rule for a parameter's step `step`, counted from 1. */
  protected abstract settings(lr: number, weightDecay: number, step: number): number[];

  #checkUsable(): void {
    if (this.#disposed) throw new Error(`${this.name}: the optimizer was disposed`);
    if (this.#gpu !== gpu()) {
      throw new Error(`${this.name}: the optimizer is on a device that was disposed or lost; make a new one`);
    }
  }

  /** Updates every parameter that has a gradient. */
  step(): void {
    this.#checkUsable();
    for (const group of this.#groups) checkRates(this.name, group);
    for (const { parameter, home } of this.#slots) {
      if (!parameter.grad || parameter.storage.memory === home) continue;
      const which = `a parameter of shape [${parameter.shape.join(", ")}]`;
      throw new Error(
        `${this.name}: ${which} was handed to another optimizer since; give one optimizer two groups instead`,
      );
    }
    for (const segment of this.#segments) {
      const settings = new Float32Array(SETTINGS * segment.slots.length);
      const active: Slot[] = [];
      let last = null as Settings | null; // most parameters have the same
      for (let i = 0; i < segment.slots.length; i++) {
        const slot = segment.slots[i], { parameter: { grad }, group, steps } = slot;
        if (!grad) continue;
        active.push(slot);
        if (grad.storage.memory !== slot.gradient) { // `.grad` was assigned, so it is elsewhere
          slot.gradient.borrower?.vacate();
          gpu().queue.copy(grad.memory, slot.gradient, grad.size * 4);
        }
        const { lr = this.lr, weightDecay = this.weightDecay } = group;
        if (last?.lr !== lr || last.weightDecay !== weightDecay || last.steps !== steps) {
          last = { lr, weightDecay, steps, numbers: this.settings(lr, weightDecay, steps + 1) };
        }
        settings.set(last.numbers, SETTINGS * i);
        settings[SETTINGS * i + 7] = 1;
      }
      if (active.length === 0) continue;
      using uploaded = gpu().queue.upload(new Uint8Array(settings.buffer), false, { purpose: "settings" });
      const { slotOf, gradients, parameters, states, floats } = segment;
      optimizerStep(this.#rule, floats, {
        slotOf,
        settings: uploaded,
        gradients: gradients.whole,
        parameters: parameters.whole,
        states: states.map((block) => block.whole),
      });
      for (const slot of active) { // only now: a step that throws does not count
        slot.steps++;
        slot.parameter.storage.version++;
      }
    }
  }

  /** Sets the `.grad` of all parameters to null. */
  zeroGrad(): void {
    for (const { parameter } of this.#slots) parameter.grad = null;
  }

  /**
   * The state that a checkpoint saves: the learning rate, the groups' own rates and decays, each parameter's step count, and copies of the state tensors
   * (`0.a` is the first of parameter 0). The copies are the caller's. What only the constructor sets (betas, momentum, the default decay) is not included.
   */
  stateDict(): OptimizerState {
    this.#checkUsable();
    const tensors = noGrad(() => { // noGrad: if there is too little memory for all, it frees those already made
      const copies: Record<string, Tensor> = {};
      this.#eachState((name, memory, { shape }) => {
        copyFlat(memory, (copies[name] = zeros(shape)).memory, "f32", copies[name].size);
      });
      return copies;
    });
    for (const copy of Object.values(tensors)) copy.keep();
    const groups = this.#groups.map(({ lr, weightDecay }) => ({ lr, weightDecay }));
    return { name: this.name, lr: this.lr, groups, steps: this.#slots.map(({ steps }) => steps), tensors };
  }

  /** Loads what `stateDict` returned, for parameters of the same shapes in the same order. Throws an Error if it does not fit; then nothing has changed. */
  loadStateDict(state: OptimizerState): void {
    this.checkState(state);
    const { lr, groups, steps, tensors } = state;
    groups?.forEach(({ lr, weightDecay }, i) => Object.assign(this.#groups[i], { lr, weightDecay }));
    this.#eachState((key, memory, { size }) => copyFlat(tensors[key].memory, memory, "f32", size));
    this.lr = lr;
    this.#slots.forEach((slot, i) => slot.steps = steps[i]);
  }

  /**
   * Throws an Error unless `loadStateDict` would accept the state.
   * @internal
   */
  checkState(state: OptimizerState): void {
    this.#checkUsable();
    if (!isRecord(state)) {
      throw new TypeError(`${this.name}: state must be what stateDict() gave, got ${describe(state)}`);
    }
    const { name, lr, groups, steps, tensors } = state, { length: count } = this.#slots;
    if (name !== this.name || !Array.isArray(steps) || steps.length !== count) {
      throw new RangeError(
        `${this.name}: state must be of ${this.name} with ${count} parameters, got ${
          String(name)
        } with ${steps?.length}`,
      );
    }
    checkNumber(this.name, "state.lr", lr, { min: 0 });
    if (groups !== undefined) {
      const { length } = this.#groups;
      if (!Array.isArray(groups) || groups.length !== length || !groups.every(isRecord)) {
        throw new RangeError(
          `${this.name}: state.groups must hold one object a group, ${length} in all, got ${describe(groups)}`,
        );
      }
      groups.forEach((group, i) => checkRates(`${this.name}: state.groups[${i}]`, group));
    }
    steps.forEach((step, i) => checkNumber(this.name, `state.steps[${i}]`, step, { integer: true, min: 0 }));
    if (!isRecord(tensors)) {
      throw new TypeError(`${this.name}: state.tensors must be an object of tensors, got ${describe(tensors)}`);
    }
    const foreign = new Set(Object.keys(tensors));
    this.#eachState((key, _, parameter) => {
      checkTensor(this.name, `tensors[${key}]`, tensors[key], ["f32"], parameter.shape);
      foreign.delete(key);
    });
    if (foreign.size > 0) {
      const names = [...foreign].slice(0, 4).join(", ") + (foreign.size > 4 ? ", …" : "");
      throw new RangeError(`${this.name}: state must be of an optimizer with the same options, got also ${names}`);
    }
  }

  #eachState(visit: (name: string, memory: Memory, parameter: Tensor) => void): void {
    let first = 0;
    for (const { slots, states } of this.#segments) {
      states.forEach((block, s) =>
        slots.forEach(({ parameter }, i) => visit(`${first + i}.${"abc"[s]}`, block.slots[i], parameter))
      );
      first += slots.length;
    }
  }

  /** Frees the optimizer's state and, unless another optimizer has taken the parameters since, sets their `.grad` to null. The parameters themselves remain. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const { slots, states, slotOf } of this.#segments) {
      for (const { parameter, gradient } of slots) {
        if (parameter.closed) continue; // disposed of
        const { storage } = parameter;
        if (storage.gradientHome !== gradient) continue; // another optimizer's since
        parameter.grad = null;
        if (storage.gradientHome === null) continue; // that freed the parameter: it was its gradient's gradient
        storage.gradientHome = null;
        gradient.leave();
      }
      for (const block of states) for (const slot of block.slots) slot.free();
      slotOf.free();
    }
  }

  /** The same as `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
