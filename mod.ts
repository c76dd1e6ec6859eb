/**
 * A small tensor and autograd engine on WebGPU, for distilling models on the GPU you have. Fused cross-entropy, KL and
 * Jensen–Shannon losses are first-class ops.
 *
 * @module
 */
export { init } from "./kernels/autotune.ts";
export { dispose, flush } from "./kernels/gpu/gpu.ts";
export type { GpuInfo, InitOptions } from "./kernels/gpu/device.ts";
export type { RowLimits, RowWork, Tuning } from "./kernels/gpu/tuning.ts";
export { type KernelTime, type Profile, profile } from "./kernels/gpu/profile.ts";
export type { Counters, Memory } from "./kernels/gpu/memory.ts";
export { type BufferType, defineKernel, type Kernel, type KernelSpec } from "./kernels/gpu/kernel.ts";

export { expectNoLeaks, type ForgottenTensor, resetPeak, type Stats, stats, trimPool } from "./autograd/debug.ts";
export type { DType, TypedArray } from "./autograd/storage.ts";
export { type NestedArray, Tensor } from "./autograd/tensor.ts";
export type {
  ClampOptions,
  GeluOptions,
  MatmulOptions,
  Operand,
  ReduceOptions,
  VarianceOptions,
} from "./autograd/options.ts";
export { Scope } from "./autograd/scope.ts";
export { checkpoint } from "./autograd/checkpoint.ts";
export { type GradientOf, noGrad, record, type RecordSpec, Tape } from "./autograd/tape.ts";
export { manualSeed } from "./autograd/random.ts";
export { gradcheck, type GradcheckOptions, type GradcheckResult } from "./autograd/gradcheck.ts";

import "./ops/methods.ts";
export { arange, eye, full, ones, rand, randint, randn, tensor, type TensorOptions, zeros } from "./ops/create.ts";
export {
  abs,
  add,
  cast,
  clamp,
  cos,
  div,
  exp,
  gelu,
  log,
  maximum,
  minimum,
  mul,
  neg,
  pow,
  relu,
  rsqrt,
  sigmoid,
  silu,
  sin,
  softplus,
  sqrt,
  square,
  sub,
  tanh,
  where,
} from "./ops/elementwise.ts";
export { argmax, logSumExp, max, mean, min, sum, variance } from "./ops/reduce.ts";
export { concat, expand, permute, reshape, slice, stack, transpose, tril, triu } from "./ops/shape.ts";
export { embedding, gather, oneHot } from "./ops/indexing.ts";
export { layerNorm, type NormOptions, rmsNorm } from "./ops/norm.ts";
export { linear, matmul } from "./ops/matmul.ts";
export { logSoftmax, softmax } from "./ops/softmax.ts";
export { dropout, type DropoutOptions } from "./ops/dropout.ts";
export type { LossReduction } from "./ops/row_loss.ts";
export { crossEntropy, type CrossEntropyOptions, type CrossEntropyResult } from "./ops/cross_entropy.ts";
export {
  distillation,
  type DistillationOptions,
  type DistillationResult,
  type DivergenceName,
  type DivergenceOptions,
  forwardKl,
  jsd,
  type JsdOptions,
  reverseKl,
  skewForwardKl,
  type SkewOptions,
  skewReverseKl,
  totalVariation,
} from "./ops/divergence.ts";
export {
  linearCrossEntropy,
  type LinearCrossEntropyOptions,
  linearDistillation,
  type LinearDistillationOptions,
} from "./ops/fused_linear.ts";
export {
  binaryCrossEntropyWithLogits,
  cosineEmbeddingLoss,
  cosineSimilarity,
  crossEntropyOfDistributions,
  entropy,
  gaussianKl,
  klDiv,
  type KlDivOptions,
  l1Loss,
  mseLoss,
  nllLoss,
  type NllOptions,
  type ReductionOptions,
  type RowOptions,
  smoothL1Loss,
  type SmoothL1Options,
} from "./ops/losses.ts";
export { type AttentionOptions, scaledDotProductAttention } from "./ops/attention.ts";
export { conv2d, type ConvOptions, maxPool2d } from "./ops/conv.ts";

export * as nn from "./nn/mod.ts";
export * as optim from "./nn/optimizers.ts";
export { Meter } from "./nn/meter.ts";
export { loadSafetensors, loadSafetensorsMetadata, saveSafetensors } from "./nn/safetensors.ts";
export type { Module } from "./nn/module.ts";
export type { Optimizer, OptimizerState } from "./nn/optim.ts";
export { type Checkpoint, loadCheckpoint, saveCheckpoint, type SaveCheckpointOptions } from "./nn/checkpoint.ts";
