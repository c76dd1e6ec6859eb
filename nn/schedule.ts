/**
 * Learning-rate schedules: functions from the step to a factor of the base rate. A training loop sets `optimizer.lr = LR * schedule(step)`; they have no state
 * that a resumed run would need.
 */
import { checkNumber, checkOptions } from "../kernels/check.ts";

/** From the step (0 on) to a factor of the base learning rate. */
export type Schedule = (step: number) => number;

/** Options of schedules that decay towards the end of a run. */
export interface DecayOptions {
  /** The number of steps of the whole run. */
  steps: number;
  /** Steps of linear warm-up at the start; 0 by default. */
  warmup?: number;
  /** The factor at the end; 0 by default. */
  final?: number;
}

const checkStep = (op: string, step: number) => checkNumber(op, "the step", step, { min: 0 });

function decay(op: string, options: DecayOptions, shape: (progress: number) => number): Schedule {
  checkOptions(op, options, ["steps", "warmup", "final"]);
  const { steps, warmup: rise = 0, final = 0 } = options;
  checkNumber(op, "steps", steps, { integer: true, min: 1 });
  checkNumber(op, "warmup", rise, { integer: true, min: 0, max: steps });
  checkNumber(op, "final", final, { min: 0 });
  return (step) => {
    checkStep(op, step);
    if (step < rise) return (step + 1) / rise;
    const progress = step < steps ? (step - rise) / (steps - rise) : 1;
    return final + (1 - final) * shape(progress);
  };
}

/**
 * Half a cosine from 1 to `final` (0 by default) over `steps`, after a linear warm-up: final + (1 − final)·½(1 + cos πt), t the share of the steps after the
 * warm-up that are done. Throws a RangeError for fewer than 1 step, a warm-up outside [0, steps] and a negative `final`, the schedule itself for a negative
 * step. Source: Loshchilov & Hutter 2017.
 *
 * @example
 * ```ts
 * import { optim } from "@limbeck/limbeck";
 *
 * const schedule = optim.cosine({ steps: 100, warmup: 10 });
 * console.log(schedule(0), schedule(10), schedule(55), schedule(100)); // 0.1, 1, 0.5, 0
 * ```
 */
export function cosine(options: DecayOptions): Schedule {
  return decay("cosine", options, (t) => (1 + Math.cos(Math.PI * t)) / 2);
}

/**
 * A straight line from 1 to `final` (0 by default) over `steps`, after a linear warm-up: final + (1 − final)·(1 − t), t the share of the steps after the
 * warm-up that are done. Throws a RangeError for fewer than 1 step, a warm-up outside [0, steps] and a negative `final`, the schedule itself for a negative
 * step.
 *
 * @example
 * ```ts
 * import { optim } from "@limbeck/limbeck";
 *
 * const schedule = optim.linear({ steps: 4, final: 0.5 });
 * console.log(schedule(0), schedule(2), schedule(4)); // 1, 0.75, 0.5
 * ```
 */
export function linear(options: DecayOptions): Schedule {
  return decay("linear", options, (t) => 1 - t);
}

/**
 * Linear from 1/steps to 1 over `steps`, then 1: min(1, (step + 1)/steps). Throws a RangeError for fewer than 1 step, the schedule itself for a negative
 * step.
 *
 * @example
 * ```ts
 * import { optim } from "@limbeck/limbeck";
 *
 * const schedule = optim.warmup({ steps: 4 });
 * console.log(schedule(0), schedule(1), schedule(9)); // 0.25, 0.5, 1
 * ```
 */
export function warmup(options: { steps: number }): Schedule {
  checkOptions("warmup", options, ["steps"]);
  const { steps } = options;
  checkNumber("warmup", "steps", steps, { integer: true, min: 1 });
  return (step) => {
    checkStep("warmup", step);
    return Math.min(1, (step + 1) / steps);
  };
}

/**
 * Multiplies by `gamma` (0.1 by default) every `every` steps: gamma^⌊step/every⌋. Throws a RangeError for an `every` below 1 and a gamma that is not above 0,
 * the schedule itself for a negative step. Source: `torch.optim.lr_scheduler.StepLR`.
 *
 * @example
 * ```ts
 * import { optim } from "@limbeck/limbeck";
 *
 * const schedule = optim.step({ every: 10, gamma: 0.5 });
 * console.log(schedule(9), schedule(10), schedule(20)); // 1, 0.5, 0.25
 * ```
 */
export function step(options: { every: number; gamma?: number }): Schedule {
  checkOptions("step", options, ["every", "gamma"]);
  const { every, gamma = 0.1 } = options;
  checkNumber("step", "every", every, { integer: true, min: 1 });
  checkNumber("step", "gamma", gamma, { above: 0 });
  return (at) => {
    checkStep("step", at);
    return gamma ** Math.floor(at / every);
  };
}
