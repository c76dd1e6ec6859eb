/**
 * Optimizers and learning-rate schedules.
 *
 * @module
 */
export { clipGradNorm } from "./clip.ts";
export { Optimizer, type OptimizerState, type ParameterGroup } from "./optim.ts";
export {
  Adagrad,
  type AdagradOptions,
  Adam,
  type AdamOptions,
  AdamW,
  RMSprop,
  type RmspropOptions,
  SGD,
  type SgdOptions,
} from "./rules.ts";
export { cosine, type DecayOptions, linear, type Schedule, step, warmup } from "./schedule.ts";
