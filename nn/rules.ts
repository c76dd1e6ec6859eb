/**
 * The optimizers: their options, checks, and the numbers of a step. `kernels/optimizer.ts` has the arithmetic of a step, `nn/optim.ts` what all optimizers
 * share.
 */
import { checkBoolean, checkNumber, checkOptions, describe } from "../kernels/check.ts";
import type { Tensor } from "../autograd/tensor.ts";
import { Optimizer, type ParameterGroup } from "./optim.ts";

/** Options of `SGD`. */
export interface SgdOptions {
  /** The learning rate; 1e-3 by default. */
  lr?: number;
  /** μ: how much of the previous update is kept; 0 by default. */
  momentum?: number;
  /** τ: with momentum, the gradient's weight is 1 − τ; 0 by default. */
  dampening?: number;
  /** Whether momentum is Nesterov's; false by default. */
  nesterov?: boolean;
  /** λ: this times the parameter is added to the gradient; 0 by default. */
  weightDecay?: number;
}

/**
 * Stochastic gradient descent: g ← g + λp; with momentum μ and dampening τ b ← μb + (1−τ)g (b ← g in the first step) and g ← b, or with Nesterov's g ← g +
 * μb; p ← p − lr·g. Throws as `Optimizer`, and a RangeError for `nesterov` without momentum or with dampening. Source: `torch.optim.SGD`; Sutskever et al.
 * 2013.
 *
 * @example
 * ```ts
 * import { init, optim, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([3], { requiresGrad: true });
 * const optimizer = new optim.SGD([w], { lr: 0.1 });
 * for (let step = 0; step < 50; step++) {
 *   using tape = new Tape();
 *   optimizer.zeroGrad();
 *   w.sub(1).square().sum().backward();
 *   optimizer.step();
 * }
 * console.log(await w.item()); // nearly 1
 * ```
 */
export class SGD extends Optimizer {
  #momentum: number;
  #dampening: number;
  #nesterov: boolean;

  /** Takes the parameters over, from another optimizer too, which then can no longer step (`dispose()` frees its state). */
  constructor(params: Iterable<Tensor> | readonly ParameterGroup[], options: SgdOptions = {}) {
    checkOptions("SGD", options, ["lr", "momentum", "dampening", "nesterov", "weightDecay"]);
    const { lr = 1e-3, momentum = 0, dampening = 0, nesterov = false, weightDecay = 0 } = options;
    checkNumber("SGD", "momentum", momentum, { min: 0 });
    checkNumber("SGD", "dampening", dampening);
    checkBoolean("SGD", "nesterov", nesterov);
    if (nesterov && (momentum === 0 || dampening !== 0)) {
      throw new RangeError(
        `SGD: nesterov needs a momentum and no dampening, got momentum ${momentum} and dampening ${dampening}`,
      );
    }
    super("SGD", params, lr, weightDecay, momentum === 0 ? "sgd" : "sgdMomentum");
    this.#momentum = momentum;
    this.#dampening = dampening;
    this.#nesterov = nesterov;
  }

  /** @internal */
  protected override settings(lr: number, weightDecay: number, step: number): number[] {
    return [lr, weightDecay, this.#momentum, step === 1 ? 1 : 1 - this.#dampening, this.#nesterov ? 1 : 0];
  }
}

/** Options of `Adam` and `AdamW`. */
export interface AdamOptions {
  /** The learning rate; 1e-3 by default. */
  lr?: number;
  /** Decay of the two moments; [0.9, 0.999] by default. */
  betas?: readonly [number, number];
  /** Added to the denominator; 1e-8 by default. */
  eps?: number;
  /** λ: 0 for Adam (added to the gradient), 0.01 for AdamW (decoupled) by default. */
  weightDecay?: number;
  /** Whether the largest second moment so far is used; false by default. */
  amsgrad?: boolean;
}

/**
 * What Adam and AdamW share.
 * @internal
 */
class AdamFamily extends Optimizer {
  #betas: readonly [number, number];
  #eps: number;

  constructor(
    name: string,
    readonly decoupled: boolean,
    params: Iterable<Tensor> | readonly ParameterGroup[],
    options: AdamOptions,
  ) {
    checkOptions(name, options, ["lr", "betas", "eps", "weightDecay", "amsgrad"]);
    const {
      lr = 1e-3,
      betas = [0.9, 0.999] as const,
      eps = 1e-8,
      weightDecay = decoupled ? 0.01 : 0,
      amsgrad = false,
    } = options;
    if (!Array.isArray(betas) || betas.length !== 2) {
      throw new TypeError(`${name}: betas must be two numbers, got ${describe(betas)}`);
    }
    betas.forEach((beta, i) => checkNumber(name, `betas[${i}]`, beta, { min: 0, below: 1 }));
    checkNumber(name, "eps", eps, { min: 0 });
    checkBoolean(name, "amsgrad", amsgrad);
    super(name, params, lr, weightDecay, amsgrad ? "amsgrad" : "adam");
    this.#betas = [betas[0], betas[1]];
    this.#eps = eps;
  }

  /** @internal */
  protected override settings(lr: number, weightDecay: number, step: number): number[] {
    const [beta1, beta2] = this.#betas;
    const decay = this.decoupled ? [0, 1 - lr * weightDecay] : [weightDecay, 1];
    return [lr / (1 - beta1 ** step), ...decay, 1 - beta1, 1 - beta2, this.#eps, 1 / Math.sqrt(1 - beta2 ** step)];
  }
}

/**
 * Adam: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← p − lr·m̂/(√v̂ + ε) with m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ); weight decay is added to g, and `amsgrad` takes
 * the largest v so far. Throws as `Optimizer`, and a RangeError for a β outside [0, 1). Source: Kingma & Ba 2015; `torch.optim.Adam`.
 *
 * @example
 * ```ts
 * import { init, optim, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([3], { requiresGrad: true }), optimizer = new optim.Adam([w], { lr: 0.1 });
 * using tape = new Tape();
 * w.square().sum().backward();
 * optimizer.step();
 * console.log(await w.item()); // nearly 2.9
 * ```
 */
export class Adam extends AdamFamily {
  /** Takes the parameters over, from another optimizer too, which then can no longer step (`dispose()` frees its state). */
  constructor(params: Iterable<Tensor> | readonly ParameterGroup[], options: AdamOptions = {}) {
    super("Adam", false, params, options);
  }
}

/**
 * AdamW: `Adam` with decoupled weight decay p ← p·(1 − lr·λ) before the step, λ 0.01 by default. Throws as `Adam`. Source: Loshchilov & Hutter 2019;
 * `torch.optim.AdamW`.
 *
 * @example
 * ```ts
 * import { init, nn, optim, randn, Tape } from "@limbeck/limbeck";
 *
 * await init();
 * const model = new nn.Linear(4, 2);
 * const optimizer = new optim.AdamW([{ params: [model.weight], weightDecay: 0.1 }, { params: [model.bias!], weightDecay: 0 }], { lr: 1e-2 });
 * {
 *   using tape = new Tape();
 *   optimizer.zeroGrad();
 *   model.forward(randn([8, 4])).square().mean().backward();
 *   optimizer.step(); // one dispatch for both
 * }
 * ```
 */
export class AdamW extends AdamFamily {
  /** Takes the parameters over, from another optimizer too, which then can no longer step (`dispose()` frees its state). */
  constructor(params: Iterable<Tensor> | readonly ParameterGroup[], options: AdamOptions = {}) {
    super("AdamW", true, params, options);
  }
}

/** Options of `RMSprop`. */
export interface RmspropOptions {
  /** The learning rate; 0.01 by default. */
  lr?: number;
  /** Decay of the mean square; 0.99 by default. */
  alpha?: number;
  /** Added to the denominator; 1e-8 by default. */
  eps?: number;
  /** λ: this times the parameter is added to the gradient; 0 by default. */
  weightDecay?: number;
  /** Factor of the previous update; 0 by default. */
  momentum?: number;
  /** Whether the square of the mean gradient is subtracted from the mean square; false by default. */
  centered?: boolean;
}

/**
 * RMSprop: v ← αv + (1−α)g², p ← p − lr·g/(√v + ε); weight decay is added to g. `centered` subtracts the square of the mean gradient from v; with momentum μ
 * b ← μb + g/(√v + ε), p ← p − lr·b. Throws as `Optimizer`, and a RangeError for an α outside [0, 1]. Source: Tieleman & Hinton 2012; `torch.optim.RMSprop`.
 *
 * @example
 * ```ts
 * import { init, optim, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([3], { requiresGrad: true }), optimizer = new optim.RMSprop([w], { lr: 0.01 });
 * using tape = new Tape();
 * w.square().sum().backward();
 * optimizer.step();
 * console.log(await w.item()); // nearly 2.9
 * ```
 */
export class RMSprop extends Optimizer {
  #numbers: [rest: number, eps: number, momentum: number, centered: number];

  /** Takes the parameters over, from another optimizer too, which then can no longer step (`dispose()` frees its state). */
  constructor(params: Iterable<Tensor> | readonly ParameterGroup[], options: RmspropOptions = {}) {
    checkOptions("RMSprop", options, ["lr", "alpha", "eps", "weightDecay", "momentum", "centered"]);
    const { lr = 0.01, alpha = 0.99, eps = 1e-8, weightDecay = 0, momentum = 0, centered = false } = options;
    checkNumber("RMSprop", "alpha", alpha, { min: 0, max: 1 });
    checkNumber("RMSprop", "eps", eps, { min: 0 });
    checkNumber("RMSprop", "momentum", momentum, { min: 0 });
    checkBoolean("RMSprop", "centered", centered);
    super("RMSprop", params, lr, weightDecay, momentum > 0 || centered ? "rmspropFull" : "rmsprop");
    this.#numbers = [1 - alpha, eps, momentum, centered ? 1 : 0];
  }

  /** @internal */
  protected override settings(lr: number, weightDecay: number): number[] {
    return [lr, weightDecay, ...this.#numbers];
  }
}

/** Options of `Adagrad`. */
export interface AdagradOptions {
  /** The learning rate; 0.01 by default. */
  lr?: number;
  /** The rate of step t is lr/(1 + (t − 1)·lrDecay); 0 by default. */
  lrDecay?: number;
  /** λ: this times the parameter is added to the gradient; 0 by default. */
  weightDecay?: number;
  /** The initial sum of squares; 0 by default. */
  initialAccumulatorValue?: number;
  /** Added to the denominator; 1e-10 by default. */
  eps?: number;
}

/**
 * Adagrad: s ← s + g², p ← p − lr/(1 + (t−1)·lrDecay)·g/(√s + ε); weight decay is added to g. Throws as `Optimizer`. Source: Duchi, Hazan & Singer 2011;
 * `torch.optim.Adagrad`.
 *
 * @example
 * ```ts
 * import { init, optim, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([3], { requiresGrad: true }), optimizer = new optim.Adagrad([w], { lr: 0.1 });
 * using tape = new Tape();
 * w.square().sum().backward();
 * optimizer.step();
 * console.log(await w.item()); // nearly 2.9
 * ```
 */
export class Adagrad extends Optimizer {
  #decay: number;
  #eps: number;

  /** Takes the parameters over, from another optimizer too, which then can no longer step (`dispose()` frees its state). */
  constructor(params: Iterable<Tensor> | readonly ParameterGroup[], options: AdagradOptions = {}) {
    checkOptions("Adagrad", options, ["lr", "lrDecay", "weightDecay", "initialAccumulatorValue", "eps"]);
    const { lr = 0.01, lrDecay = 0, weightDecay = 0, initialAccumulatorValue = 0, eps = 1e-10 } = options;
    checkNumber("Adagrad", "lrDecay", lrDecay, { min: 0 });
    checkNumber("Adagrad", "initialAccumulatorValue", initialAccumulatorValue, { min: 0 });
    checkNumber("Adagrad", "eps", eps, { min: 0 });
    super("Adagrad", params, lr, weightDecay, "adagrad", initialAccumulatorValue);
    this.#decay = lrDecay;
    this.#eps = eps;
  }

  /** @internal */
  protected override settings(lr: number, weightDecay: number, step: number): number[] {
    return [lr / (1 + (step - 1) * this.#decay), weightDecay, this.#eps];
  }
}
