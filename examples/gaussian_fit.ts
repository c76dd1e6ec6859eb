/**
 * One Gaussian fitted to two: where each loss ends if the model cannot match the truth.
 *
 * The truth is half N(−5, 1) and half N(10, 1); the model is one N(μ, σ²). What to look at: `LOSSES`, the only line in which the
 * fits differ; forward KL, which ends at the mixture's own mean and variance from every start; reverse KL, which ends at one of
 * the two modes; and mean squared error, L1 and cosine similarity between densities, which depend on the start, because their
 * gradients vanish away from the modes (last panel), and some of which depend on the scale of the density.
 *
 *     deno task examples gaussian_fit --help
 *
 * @module
 */

import {
  cosineSimilarity,
  forwardKl,
  jsd,
  l1Loss,
  mseLoss,
  optim,
  reverseKl,
  Scope,
  smoothL1Loss,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { range } from "d3-array";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/gaussian_fit.ts";

const MODES = [-5, 10];
const STEP = 0.25;
export const GRID: number[] = range(-40, 45 + STEP, STEP); // wide enough for the widest fit
export const STARTS: number[][] = [[-20, 1], [-8, 2], [3, 8], [11, 4], [30, 1]]; // μ and σ
export const DISTANCES: number[] = range(1, 16.1, 0.5); // of a mean from the right mode
const STEPS = { full: 800, quick: 250 };
const BETAS: [number, number] = [0.9, 0.9]; // the first gradients of KL are huge and must be forgotten soon
const RATE = { mean: 0.5, logDeviation: 0.05 }; // Adam's, at their peak: the mean has further to go

/**
 * Losses of both sides' log-densities [starts, grid], which the divergences take as logits. They are summed over the starts, which are rows, so that each has
 * its own gradient.
 */
const LOSSES: Record<string, (student: Tensor, teacher: Tensor) => Tensor> = {
  "forward KL": (student, teacher) => forwardKl(student, teacher, { reduction: "sum" }),
  "jsd, β = 0.1": (student, teacher) => jsd(student, teacher, { beta: 0.1, reduction: "sum" }),
  "jsd, β = 0.5": (student, teacher) => jsd(student, teacher, { beta: 0.5, reduction: "sum" }),
  "jsd, β = 0.9": (student, teacher) => jsd(student, teacher, { beta: 0.9, reduction: "sum" }),
  "reverse KL": (student, teacher) => reverseKl(student, teacher, { reduction: "sum" }),
  "MSE": (student, teacher) => mseLoss(student.exp(), teacher.exp(), { reduction: "sum" }),
  "L1": (student, teacher) => l1Loss(student.exp(), teacher.exp(), { reduction: "sum" }),
  "smooth L1": (student, teacher) => smoothL1Loss(student.exp(), teacher.exp(), { reduction: "sum" }),
  "cosine": (student, teacher) => cosineSimilarity(student.exp(), teacher.exp()).neg().sum(),
};

const QUICK_LOSSES = ["forward KL", "jsd, β = 0.5", "reverse KL", "MSE", "L1", "cosine"];

/** The optima that have a closed form; those at the mode −5 also hold for the mode 10. */
const root = 2 ** (-1 / 3);
export const CLOSED_FORMS: Record<string, { mean: number; deviation: number }> = {
  "forward KL": { mean: 2.5, deviation: Math.sqrt(1 + 7.5 ** 2) }, // the mixture's own moments
  "reverse KL": { mean: -5, deviation: 1 },
  "MSE": { mean: -5, deviation: Math.sqrt(root / (1 - root)) }, // of ∫q² − ∫q·N(−5, 1): wider than the mode
  "smooth L1": { mean: -5, deviation: Math.sqrt(root / (1 - root)) }, // half the MSE as long as no density exceeds 1
  "cosine": { mean: -5, deviation: 1 },
};

export interface Fit {
  loss: string;
  mean: number;
  deviation: number;
}

/** |∂loss/∂μ| for each of `DISTANCES`. */
export interface Slopes {
  loss: string;
  plain: number[];
  tenfold: number[];
}

/** ln N(x; μ, σ²) on the grid, for means and log-deviations [rows, 1]. */
function logNormal(grid: Tensor, mean: Tensor, logDeviation: Tensor): Tensor {
  const z = grid.sub(mean).mul(logDeviation.neg().exp()); // [rows, grid]
  return z.square().mul(-0.5).sub(logDeviation.add(Math.log(2 * Math.PI) / 2));
}

/** The mixture's log-density, in as many rows. */
function logTruth(rows: number): Tensor {
  const sums = GRID.map((x) => MODES.reduce((sum, mode) => sum + Math.exp(-((x - mode) ** 2) / 2), 0));
  return tensor([sums.map((sum) => Math.log(sum / (2 * Math.sqrt(2 * Math.PI))))]).expand([rows, GRID.length]);
}

/** Fits from all starts at once. */
async function fit(loss: string, steps: number): Promise<Fit[]> {
  using _scope = new Scope(); // frees the tensors
  const mean = tensor(STARTS.map(([mean]) => [mean]), undefined, { requiresGrad: true }); // [starts, 1]
  const logDeviation = tensor(STARTS.map(([, deviation]) => [Math.log(deviation)]), undefined, { requiresGrad: true });
  const grid = tensor([GRID]), teacher = logTruth(STARTS.length);
  using meanOptimizer = new optim.Adam([mean], { lr: RATE.mean, betas: BETAS });
  using deviationOptimizer = new optim.Adam([logDeviation], { lr: RATE.logDeviation, betas: BETAS });
  const schedule = optim.cosine({ steps });
  for (const step of range(steps)) {
    using _tape = new Tape();
    LOSSES[loss](logNormal(grid, mean, logDeviation), teacher).backward();
    meanOptimizer.lr = RATE.mean * schedule(step);
    deviationOptimizer.lr = RATE.logDeviation * schedule(step);
    for (const optimizer of [meanOptimizer, deviationOptimizer]) {
      optimizer.step();
      optimizer.zeroGrad();
    }
  }
  const means = await mean.data(), logDeviations = await logDeviation.data();
  return STARTS.map((_, i) => ({ loss, mean: means[i], deviation: Math.exp(logDeviations[i]) }));
}

/** |∂loss/∂μ| at N(10 + distance, 1), with both densities multiplied by `scale`. */
async function slopes(loss: string, scale: number): Promise<number[]> {
  using _scope = new Scope();
  const mean = tensor(DISTANCES.map((distance) => [MODES[1] + distance]), undefined, { requiresGrad: true });
  using _tape = new Tape();
  const student = logNormal(tensor([GRID]), mean, tensor(DISTANCES.map(() => [0])));
  LOSSES[loss](student.add(Math.log(scale)), logTruth(DISTANCES.length).add(Math.log(scale))).backward();
  return Array.from(await mean.grad!.data(), Math.abs);
}

/** Where every fit ends, and how strongly each loss pulls by distance, with densities as they are and ten times as high. */
export async function gaussianFit({ quick }: Setting): Promise<{ fits: Fit[]; slopes: Slopes[] }> {
  const found: { fits: Fit[]; slopes: Slopes[] } = { fits: [], slopes: [] };
  for (const loss of quick ? QUICK_LOSSES : Object.keys(LOSSES)) {
    found.fits.push(...await fit(loss, quick ? STEPS.quick : STEPS.full));
    found.slopes.push({ loss, plain: await slopes(loss, 1), tenfold: await slopes(loss, 10) });
  }
  return found;
}

if (import.meta.main) {
  await present(
    "gaussian_fit",
    "Fits one Gaussian to a mixture of two with every loss.",
    gaussianFit,
    (found) => describe(found, { GRID, STARTS, DISTANCES, CLOSED_FORMS }),
  );
}
