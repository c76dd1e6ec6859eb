/**
 * Optimizers and learning-rate schedules.
 *
 * @module
 */
export {
  Adagrad,
  type AdagradOptions,
  Adam,
  type AdamOptions,
  AdamW,
  clipGradNorm,
  Optimizer,
  type OptimizerState,
  type ParameterGroup,
  RMSprop,
  type RmspropOptions,
  SGD,
  type SgdOptions,
} from "./optim.ts";
export { cosine, type DecayOptions, linear, type Schedule, step, warmup } from "./schedule.ts";
