/**
 * Modules: layers with parameters, their initial values, and batches of data.
 *
 * @module
 */
export * as init from "./init.ts";
export { batches, type BatchOptions, type Column } from "./batches.ts";
export {
  type AttentionCall,
  Gpt,
  type GptOptions,
  type KeyValueCache,
  MultiHeadAttention,
  TransformerBlock,
  type TransformerBlockOptions,
} from "./transformer.ts";
export { generate, type GenerateOptions } from "./generate.ts";
export {
  Conv2d,
  type Conv2dOptions,
  Dropout,
  Embedding,
  LayerNorm,
  Linear,
  type LinearOptions,
  RMSNorm,
  Sequential,
} from "./layers.ts";
export { Module } from "./module.ts";
