/**
 * Optimizers and learning-rate schedules.
 *
 * @module
 */
export { Adam, type AdamOptions, AdamW, Optimizer, type ParameterGroup, SGD, type SgdOptions } from "./optim.ts";
export { cosine, type DecayOptions, linear, type Schedule, step, warmup } from "./schedule.ts";
