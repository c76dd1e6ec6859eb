/**
 * Modules: layers with parameters, their initial values, and batches of data.
 *
 * @module
 */
export * as init from "./init.ts";
export { batches, type BatchOptions, type Column } from "./batches.ts";
export {
  type AttentionCall,
  Embedding,
  Gpt,
  type GptOptions,
  type KeyValueCache,
  LayerNorm,
  MultiHeadAttention,
  RMSNorm,
  TransformerBlock,
  type TransformerBlockOptions,
} from "./transformer.ts";
export { generate, type GenerateOptions } from "./generate.ts";
export { Conv2d, type Conv2dOptions, Dropout, Linear, type LinearOptions, Sequential } from "./layers.ts";
export { Module } from "./module.ts";
