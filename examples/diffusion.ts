/**
 * Diffusion in one dimension: denoising learned as a sum of KL divergences between Gaussians.
 *
 * Data are turned into noise in T steps; a network learns to undo one step. If the data point x₀ is known, the step back from x_t
 * is a Gaussian q(x_{t−1} | x_t, x₀); the model's step has the same variance and a mean that it predicts, and the loss is the sum
 * over t of KL(q ‖ model), by `gaussianKl`. What to look at: `klOfStep`, where this KL equals the usual loss, the weighted squared
 * error of the predicted noise; and the samples, which find both peaks starting from pure noise.
 *
 *     deno task examples diffusion --help
 *
 * @module
 */

import {
  concat,
  gaussianKl,
  gelu,
  manualSeed,
  nn,
  noGrad,
  optim,
  randn,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { range } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg, randomNormal, randomUniform } from "d3-random";
import { present, type Setting } from "./support/experiment.ts";
import { BINS, compare, drawPeaks, type Fit, histogram, normal, TRUTH } from "./support/peaks.ts";
import { describe } from "./pictures/diffusion.ts";

const STEPS = 40; // T
const BETAS = range(STEPS).map((t) => 0.005 + 0.22 * t / (STEPS - 1)); // variances of the noise that each step adds
const KEPT: number[] = BETAS.map((_, t) => BETAS.slice(0, t + 1).reduce((kept, beta) => kept * (1 - beta), 1)); // ᾱ
const SIZES = { full: { updates: 1500, samples: 20000 }, quick: { updates: 300, samples: 4000 } };
const BATCH_SIZE = 512;
const LEARNING_RATE = 3e-3; // its peak
const FREQUENCIES = [1, 2, 4, 8]; // of the time's features

export interface Found {
  bins: number[];
  truth: number[];
  fits: Fit[];
  /** Where samples are after each step. */
  paths: number[][];
  /** The mean KL of a step, directly and as a weighted squared error, in nats. */
  kl: number;
  weighted: number;
}

/** Features of x [rows, 1] and of the step's number t [rows, 1] → the noise in x [rows, 1]. */
class Denoiser extends nn.Module {
  layers = new nn.Sequential(
    new nn.Linear(2 + 2 * FREQUENCIES.length, 64),
    gelu,
    new nn.Linear(64, 64),
    gelu,
    new nn.Linear(64, 1),
  );

  override forward(x: Tensor, t?: Tensor): Tensor {
    const time = t!.mul(1 / STEPS);
    const waves = FREQUENCIES.flatMap((f) => [time.mul(f * Math.PI).sin(), time.mul(f * Math.PI).cos()]);
    return this.layers.forward(concat([x, time, ...waves], 1));
  }
}

/** The coefficients of the mean and the variance of the step back from t; the last one, from t = 1, leads to the data itself. */
function stepBack(t: number) {
  const beta = BETAS[t], kept = KEPT[t], before = KEPT[t - 1], alpha = 1 - beta;
  return {
    ofData: Math.sqrt(before) * beta / (1 - kept), // q's mean is ofData·x₀ + ofState·x_t
    ofState: Math.sqrt(alpha) * (1 - before) / (1 - kept),
    ofNoise: beta / Math.sqrt((1 - kept) * alpha), // which also is x_t/√α − ofNoise·noise
    variance: beta * (1 - before) / (1 - kept),
    shrink: 1 / Math.sqrt(alpha),
  };
}

/** KL(q ‖ model) for one step of each data point, from the data, their noise and the steps; and the same as a squared error. */
function klOfStep(model: Denoiser, data: number[], noise: number[], steps: number[]): { kl: Tensor; weighted: Tensor } {
  const column = (f: (s: ReturnType<typeof stepBack>) => number) => tensor(steps.map((t) => [f(stepBack(t))]));
  const noisy = data.map((x, i) => Math.sqrt(KEPT[steps[i]]) * x + Math.sqrt(1 - KEPT[steps[i]]) * noise[i]);
  const x = tensor(noisy.map((value) => [value])), x0 = tensor(data.map((value) => [value]));
  const predicted = model.forward(x, tensor(steps.map((t) => [t]))), logVariance = column((s) => Math.log(s.variance));
  const mean = x0.mul(column((s) => s.ofData)).add(x.mul(column((s) => s.ofState)));
  const modelMean = x.mul(column((s) => s.shrink)).sub(predicted.mul(column((s) => s.ofNoise)));
  const error = predicted.sub(tensor(noise.map((value) => [value]))).square();
  return {
    kl: gaussianKl(mean, logVariance, modelMean, logVariance),
    weighted: error.mul(column((s) => s.ofNoise ** 2 / (2 * s.variance))).mean(),
  };
}

/** Turns noise into samples, step by step; returns the states after each step. */
async function sample(model: Denoiser, count: number): Promise<Float32Array[]> {
  let x = randn([count, 1]).keep();
  const states = [await x.data() as Float32Array];
  for (const t of range(STEPS - 1, 0, -1)) {
    const { shrink, ofNoise, variance } = stepBack(t), before = x;
    x = noGrad(() => {
      const predicted = model.forward(before, tensor([[t]]).expand([count, 1]));
      const mean = before.mul(shrink).sub(predicted.mul(ofNoise));
      return t > 1 ? mean.add(randn([count, 1]).mul(Math.sqrt(variance))) : mean;
    }).keep();
    before.dispose();
    states.push(await x.data() as Float32Array);
  }
  x.dispose();
  return states;
}

/** Trains the model and draws from it. */
export async function diffusion({ seed, quick }: Setting): Promise<Found> {
  const { updates, samples } = quick ? SIZES.quick : SIZES.full, source = randomLcg(seed);
  const gaussian = randomNormal.source(source)(), uniform = randomUniform.source(source)();
  manualSeed(seed);
  const model = new Denoiser(), schedule = optim.cosine({ steps: updates });
  using optimizer = new optim.Adam(model.parameters(), { lr: LEARNING_RATE });
  let kl = 0, weighted = 0;
  for (const update of range(updates)) {
    using _tape = new Tape();
    const data = drawPeaks(BATCH_SIZE, uniform, gaussian);
    const steps = data.map(() => 1 + Math.floor(uniform() * (STEPS - 1)));
    const loss = klOfStep(model, data, data.map(() => gaussian()), steps);
    loss.kl.backward();
    optimizer.lr = LEARNING_RATE * schedule(update);
    optimizer.step();
    optimizer.zeroGrad();
    if (update === updates - 1) [kl, weighted] = [await loss.kl.item(), await loss.weighted.item()];
  }
  const states = await sample(model, samples);
  const fits = [compare("samples", histogram(states.at(-1)!)), compare("noise", BINS.map((x) => normal(x, 0, 1)))];
  model.dispose();
  const paths = range(40).map((i) => states.map((state) => state[i]));
  return { bins: BINS, truth: TRUTH, fits, paths, kl, weighted };
}

if (import.meta.main) {
  await present("diffusion", "Learns to denoise two peaks by KL divergences of Gaussians.", diffusion, describe);
}
