/** Layers of one op each, and Sequential. */
import { checkBoolean, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { composed } from "../autograd/composed.ts";
import { noGrad } from "../autograd/tape.ts";
import { Tensor } from "../autograd/tensor.ts";
import { ones, zeros } from "../ops/create.ts";
import { dropout } from "../ops/dropout.ts";
import { conv2d, type ConvOptions } from "../ops/conv.ts";
import { gelu, relu } from "../ops/elementwise.ts";
import { embedding } from "../ops/indexing.ts";
import { type Layer, linear, perceptron } from "../ops/matmul.ts";
import { layerNorm, rmsNorm } from "../ops/norm.ts";
import { normal, uniform } from "./init.ts";
import { Module } from "./module.ts";

/** Internal: a parameter, for `parameters` to keep. */
export function parameter(shape: readonly number[]): Tensor {
  return zeros(shape, { requiresGrad: true });
}

/** Internal: makes parameters, which belong to their module and to no scope. If there is too little memory for all of them, none remains. */
export function parameters<T extends (Tensor | null)[]>(make: () => [...T]): T {
  const made = noGrad(make);
  for (const x of made) x?.keep();
  return made;
}

/** Options of `Linear`. */
export interface LinearOptions {
  /** Whether a bias is added; true by default. */
  bias?: boolean;
}

/**
 * y = x·weightᵀ + bias over the last dimension, [..., in] → [..., out]. Weight [out, in] and bias [out] start uniform in ±1/√in, as in PyTorch. Gradients as
 * `linear`. Throws a RangeError for sizes below 1, `forward` a TypeError if the shapes do not fit. Source: `torch.nn.Linear`.
 *
 * @example
 * ```ts
 * import { init, nn, randn } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(new nn.Linear(4, 2).forward(randn([3, 4])).shape); // [3, 2]
 * ```
 */
export class Linear extends Module {
  /** [out, in] */
  weight: Tensor;
  /** [out], or null */
  bias: Tensor | null;

  /** A layer with fresh random parameters. */
  constructor(inFeatures: number, outFeatures: number, options: LinearOptions = {}) {
    super();
    checkOptions("Linear", options, ["bias"]);
    checkNumber("Linear", "inFeatures", inFeatures, { integer: true, min: 1 });
    checkNumber("Linear", "outFeatures", outFeatures, { integer: true, min: 1 });
    const { bias = true } = options;
    checkBoolean("Linear", "bias", bias);
    const bound = 1 / Math.sqrt(inFeatures);
    [this.weight, this.bias] = parameters(() => [
      uniform(parameter([outFeatures, inFeatures]), -bound, bound),
      bias ? uniform(parameter([outFeatures]), -bound, bound) : null,
    ]);
  }

  /** [..., in] → [..., out] */
  override forward(x: Tensor): Tensor {
    return linear(x, this.weight, this.bias);
  }
}

/** Options of `Conv2d`. */
export interface Conv2dOptions extends ConvOptions {
  /** Whether a bias is added; true by default. */
  bias?: boolean;
}

/**
 * Convolution of images as `conv2d`, [N, in, H, W] → [N, out, H', W'] with H' = ⌊(H + 2·padding − kernel)/stride⌋ + 1. Weight [out, in, kernel, kernel] and
 * bias [out] start uniform in ±1/√(in·kernel²), as in PyTorch. Gradients as `conv2d`. Throws a RangeError for sizes below 1 and a negative padding, `forward`
 * as `conv2d`. Source: `torch.nn.Conv2d`.
 *
 * @example
 * ```ts
 * import { init, nn, randn } from "@limbeck/limbeck";
 *
 * await init();
 * const conv = new nn.Conv2d(1, 8, 3, { padding: 1 });
 * console.log(conv.forward(randn([2, 1, 28, 28])).shape); // [2, 8, 28, 28]
 * ```
 */
export class Conv2d extends Module {
  /** [out, in, kernel, kernel] */
  weight: Tensor;
  /** [out], or null */
  bias: Tensor | null;
  /** Pixels from one window to the next. */
  readonly stride: number;
  /** Zeros around the image. */
  readonly padding: number;

  /** A layer with fresh random parameters, for square windows of `kernel`×`kernel` pixels. */
  constructor(inChannels: number, outChannels: number, kernel: number, options: Conv2dOptions = {}) {
    super();
    checkOptions("Conv2d", options, ["stride", "padding", "bias"]);
    checkNumber("Conv2d", "inChannels", inChannels, { integer: true, min: 1 });
    checkNumber("Conv2d", "outChannels", outChannels, { integer: true, min: 1 });
    checkNumber("Conv2d", "kernel", kernel, { integer: true, min: 1 });
    const { stride = 1, padding = 0, bias = true } = options;
    checkNumber("Conv2d", "stride", stride, { integer: true, min: 1 });
    checkNumber("Conv2d", "padding", padding, { integer: true, min: 0 });
    checkBoolean("Conv2d", "bias", bias);
    const bound = 1 / Math.sqrt(inChannels * kernel * kernel);
    [this.weight, this.bias] = parameters(() => [
      uniform(parameter([outChannels, inChannels, kernel, kernel]), -bound, bound),
      bias ? uniform(parameter([outChannels]), -bound, bound) : null,
    ]);
    this.stride = stride;
    this.padding = padding;
  }

  /** [N, in, H, W] → [N, out, H', W'] */
  override forward(x: Tensor): Tensor {
    return conv2d(x, this.weight, this.bias, { stride: this.stride, padding: this.padding });
  }
}

/**
 * Rows of a table by index (i32 or u32): [...] → [..., width]. The table [count, width] is initialized from N(0, 1), as in PyTorch. Gradient and errors of
 * `forward` as `embedding`. Throws a RangeError for sizes below 1. Source: `torch.nn.Embedding`.
 *
 * @example
 * ```ts
 * import { init, nn, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(new nn.Embedding(10, 4).forward(tensor(new Int32Array([7, 1, 7]))).shape); // [3, 4]
 * ```
 */
export class Embedding extends Module {
  /** [count, width] */
  weight: Tensor;

  /** A table with fresh random rows. */
  constructor(count: number, width: number) {
    super();
    checkNumber("Embedding", "count", count, { integer: true, min: 1 });
    checkNumber("Embedding", "width", width, { integer: true, min: 1 });
    [this.weight] = parameters(() => [normal(parameter([count, width]))]);
  }

  /** Indices [...] → [..., width] */
  override forward(index: Tensor): Tensor {
    return embedding(this.weight, index);
  }
}

/**
 * Layer norm over the last dimension, [..., width] → the same, with weight 1 and bias 0 at first: formula, gradients and errors of `forward` as `layerNorm`.
 * Throws a RangeError for a width below 1 and a negative eps. Source: `torch.nn.LayerNorm`.
 *
 * @example
 * ```ts
 * import { init, nn, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await new nn.LayerNorm(2).forward(tensor([[1, 3]])).array()); // nearly [[-1, 1]]
 * ```
 */
export class LayerNorm extends Module {
  /** [width] */
  weight: Tensor;
  /** [width] */
  bias: Tensor;

  /** `eps` is added to the variance. */
  constructor(width: number, readonly eps = 1e-5) {
    super();
    checkNumber("LayerNorm", "width", width, { integer: true, min: 1 });
    checkNumber("LayerNorm", "eps", eps, { min: 0 });
    [this.weight, this.bias] = parameters(() => [ones([width], { requiresGrad: true }), parameter([width])]);
  }

  /** [..., width] → the same */
  override forward(x: Tensor): Tensor {
    return layerNorm(x, this.weight, this.bias, { eps: this.eps });
  }
}

/**
 * RMS norm over the last dimension, [..., width] → the same, with weight 1 at first: formula, gradients and errors of `forward` as `rmsNorm`. Throws a
 * RangeError for a width below 1 and a negative eps. Source: `torch.nn.RMSNorm`.
 *
 * @example
 * ```ts
 * import { init, nn, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await new nn.RMSNorm(2).forward(tensor([[3, -3]])).array()); // nearly [[1, -1]]
 * ```
 */
export class RMSNorm extends Module {
  /** [width] */
  weight: Tensor;

  /** `eps` is added to the mean square; by default as in `rmsNorm`. */
  constructor(width: number, readonly eps?: number) {
    super();
    checkNumber("RMSNorm", "width", width, { integer: true, min: 1 });
    if (eps !== undefined) checkNumber("RMSNorm", "eps", eps, { min: 0 });
    this.weight = ones([width], { requiresGrad: true }).keep();
  }

  /** [..., width] → the same */
  override forward(x: Tensor): Tensor {
    return rmsNorm(x, this.weight, { eps: this.eps });
  }
}

/**
 * Dropout with probability p (0.5 by default) while training, nothing in evaluation; shape and gradient as `dropout`. Throws a RangeError unless 0 ≤ p ≤ 1.
 * Source: `torch.nn.Dropout`.
 *
 * @example
 * ```ts
 * import { init, nn, ones } from "@limbeck/limbeck";
 *
 * await init();
 * const layer = new nn.Dropout(0.5);
 * console.log(await layer.forward(ones([4])).array()); // zeros and twos
 * console.log(await layer.eval().forward(ones([4])).array()); // [1, 1, 1, 1]
 * ```
 */
export class Dropout extends Module {
  /** `p` is the probability of dropping an element. */
  constructor(readonly p = 0.5) {
    super();
    checkNumber("Dropout", "p", p, { min: 0, max: 1 });
  }

  /** [...] → the same */
  override forward(x: Tensor): Tensor {
    return dropout(x, { p: this.p, training: this.training });
  }
}

/** Internal: whether a layer has exactly this class and its `forward`, which a subclass or the layer itself may replace. */
export const isPlain = (layer: unknown, type: { prototype: Module }): boolean =>
  (layer as Module | undefined)?.constructor === type && (layer as Module).forward === type.prototype.forward;

/**
 * Modules and functions in sequence; state names are `0.weight`, `2.weight`, … by position. Throws a TypeError for a step that is neither, `forward` for one
 * that does not return a Tensor. Source: `torch.nn.Sequential`.
 *
 * @example
 * ```ts
 * import { init, nn, randn, relu } from "@limbeck/limbeck";
 *
 * await init();
 * const mlp = new nn.Sequential(new nn.Linear(4, 8), relu, new nn.Dropout(0.1), new nn.Linear(8, 3));
 * console.log(mlp.forward(randn([5, 4])).shape); // [5, 3]
 * ```
 */
export class Sequential extends Module {
  /** The steps, in order. */
  readonly steps: (Module | ((x: Tensor) => Tensor))[];

  /** The steps in their order. */
  constructor(...steps: (Module | ((x: Tensor) => Tensor))[]) {
    super();
    steps.forEach((step, i) => {
      if (!(step instanceof Module) && typeof step !== "function") {
        throw new TypeError(`Sequential: step ${i} must be a Module or a function, got ${describe(step)}`);
      }
    });
    this.steps = steps;
  }

  /** The modules among the steps by position, then what a subclass has. */
  override children(): [string, Module][] {
    const steps = this.steps.flatMap((x, i): [string, Module][] => x instanceof Module ? [[String(i), x]] : []);
    return [...steps, ...super.children().filter(([name]) => !name.startsWith("steps."))]; // and those of a subclass
  }

  /** What the last step makes of what the one before it made, and so on; x itself where there is none. */
  override forward(x: Tensor): Tensor {
    return composed("Sequential", () => {
      let y = x;
      for (let i = 0; i < this.steps.length;) {
        const step = this.steps[i], layers = this.#perceptron(i);
        y = layers.length > 1 ? perceptron(y, layers) : step instanceof Module ? step.forward(y) : step(y);
        if (!(y instanceof Tensor)) {
          throw new TypeError(`Sequential: step ${i} must return a Tensor, got ${describe(y)}`);
        }
        i += Math.max(1, 2 * layers.length - 1); // the layers, and the activations between them
      }
      return y;
    });
  }

  /** The linear layers from step `i` on with only an activation between them: each layer and its activation are one kernel. */
  #perceptron(i: number): Layer[] {
    const layers: Layer[] = [];
    for (;; i += 2) {
      const step = this.steps[i], next = this.steps[i + 1];
      if (!isPlain(step, Linear)) break;
      const { weight, bias } = step as Linear, activation = next === relu ? "relu" : next === gelu ? "gelu" : undefined;
      const goes = activation && isPlain(this.steps[i + 2], Linear);
      layers.push({ weight, bias, activation: goes ? activation : undefined });
      if (!goes) break;
    }
    return layers;
  }
}
