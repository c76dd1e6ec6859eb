/**
 * Independent coordinates for correlated ones: too narrow with reverse KL, as wide as each coordinate with forward KL.
 *
 * The truth is a Gaussian in two dimensions with covariance Σ, precision Λ = Σ⁻¹ and correlation ρ; the model is a Gaussian with
 * independent coordinates. What to look at: reverse KL, which variational inference minimises, ends at the variances
 * 1/Λᵢᵢ = (1 − ρ²)·Σᵢᵢ and is overconfident; forward KL ends at Σᵢᵢ and covers regions that the truth all but excludes. Both lose
 * the mutual information of the coordinates, −½·ln(1 − ρ²).
 *
 *     deno task examples variational_inference --help
 *
 * @module
 */

import { forwardKl, manualSeed, optim, randn, reverseKl, Scope, Tape, type Tensor, tensor } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { cross, range } from "d3-array";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/variational_inference.ts";

const CORRELATIONS = { full: [0, 0.15, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99], quick: [0, 0.5, 0.9, 0.99] };
const STEPS = { full: 250, quick: 150 };
const RATE = 0.1;
const SAMPLES = 512; // of the model, a step
const POINTS = cross(range(-5, 5.01, 0.1), range(-5, 5.01, 0.1)); // the narrowest truth is √(1 − 0.99) = 0.1 wide

/** A fitted model, and its distance from the truth, computed on the grid. */
export interface Fit {
  method: string;
  correlation: number;
  variance: number[];
  kl?: number;
}

/** xᵀΛx/2 for variances of 1: minus the truth's log-density, up to a constant. */
function energy([x, y]: Tensor[], correlation: Tensor): Tensor {
  const square = x.square().add(y.square()).sub(x.mul(y).mul(correlation).mul(2));
  return square.div(correlation.square().neg().add(1)).mul(0.5);
}

/** The model's log-density on the grid, up to a constant. */
function logModel(grid: Tensor[], logDeviations: Tensor[]): Tensor {
  const [x, y] = grid.map((points, i) => points.mul(logDeviations[i].neg().exp()).square());
  return x.add(y).mul(-0.5);
}

/** A loss for each correlation. */
type Method = (logDeviations: Tensor[], grid: Tensor[], correlation: Tensor) => Tensor;

/** The divergences take log-densities as logits, and their softmax normalises them. */
const onGrid = (divergence: typeof forwardKl): Method => (logDeviations, grid, correlation) =>
  divergence(logModel(grid, logDeviations), energy(grid, correlation).neg(), { reduction: "none" });

const METHODS: Record<string, Method> = {
  "reverse KL": onGrid(reverseKl),
  "forward KL": onGrid(forwardKl),
  // reverse KL without knowing the truth's normaliser: the energy of samples σε minus the model's entropy
  "ELBO": (logDeviations, _grid, correlation) => {
    const samples = logDeviations.map((each) => randn([correlation.shape[0], SAMPLES]).mul(each.exp()));
    return energy(samples, correlation).mean({ dim: 1 }).sub(logDeviations[0].add(logDeviations[1]).sum({ dim: 1 }));
  },
};

/** Fits for all correlations at once; the means are those of the truth. */
async function fit(method: string, correlations: number[], steps: number): Promise<Fit[]> {
  using _scope = new Scope(); // frees the tensors
  const grid = [0, 1].map((i) => tensor([POINTS.map((point) => point[i])]));
  const correlation = tensor(correlations.map((each) => [each])); // [correlations, 1]
  const logDeviations = [0, 1].map(() => tensor(correlations.map(() => [-1]), undefined, { requiresGrad: true }));
  using optimizer = new optim.Adam(logDeviations, { lr: RATE, betas: [0.9, 0.9] });
  const schedule = optim.cosine({ steps });
  for (const step of range(steps)) {
    using _tape = new Tape();
    METHODS[method](logDeviations, grid, correlation).sum().backward(); // rows are independent
    optimizer.lr = RATE * schedule(step);
    optimizer.step();
    optimizer.zeroGrad();
  }
  const found = await Promise.all(logDeviations.map((each) => each.data()));
  const kl = method === "ELBO" ? [] : await METHODS[method](logDeviations, grid, correlation).data();
  const variance = (row: number) => found.map((all) => Math.exp(2 * all[row]));
  return correlations.map((correlation, row) => ({ method, correlation, variance: variance(row), kl: kl[row] }));
}

/** Every method's model for every correlation. */
export async function variationalInference({ seed, quick }: Setting): Promise<Fit[]> {
  manualSeed(seed);
  const fits: Fit[] = [], size = quick ? "quick" : "full";
  for (const method of Object.keys(METHODS)) fits.push(...await fit(method, CORRELATIONS[size], STEPS[size]));
  return fits;
}

if (import.meta.main) {
  await present(
    "variational_inference",
    "Fits independent Gaussians to correlated ones.",
    variationalInference,
    (fits) => describe(fits, CORRELATIONS.quick),
  );
}
