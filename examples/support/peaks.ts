/**
 * One-dimensional data with two peaks, and the distance of a model's samples from them.
 *
 * @module
 */

// @ts-types="@types/d3-array"
import { cumsum, range, sum } from "d3-array";

const PEAKS = [{ mean: -2, deviation: 0.3, share: 0.4 }, { mean: 1.5, deviation: 0.5, share: 0.6 }];
const BIN = 0.1;
const EDGES = range(-4, 4, BIN);
/** The middles of the bins. */
export const BINS: number[] = EDGES.map((x) => x + BIN / 2);

/** A histogram as densities over the bins, and its distance from the truth. */
export interface Fit {
  name: string;
  density: number[];
  /** ½Σ|p − q| and ∫|F − G|: total variation and Wasserstein's distance from the truth. */
  totalVariation: number;
  wasserstein: number;
}

/** The density of a normal distribution. */
export const normal = (x: number, mean: number, deviation: number): number =>
  Math.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * Math.sqrt(2 * Math.PI));

/** The true density in the middle of each bin. */
export const TRUTH: number[] = BINS.map((x) => sum(PEAKS, (peak) => peak.share * normal(x, peak.mean, peak.deviation)));

/** Data points. First the peak of each is drawn, then all points. */
export function drawPeaks(count: number, uniform: () => number, gaussian: () => number): number[] {
  const peaks = range(count).map(() => PEAKS[uniform() < PEAKS[0].share ? 0 : 1]);
  return peaks.map(({ mean, deviation }) => mean + deviation * gaussian());
}

/** The density of samples in each bin. */
export function histogram(samples: Float32Array): number[] {
  return EDGES.map((x) => samples.filter((value) => value >= x && value < x + BIN).length / samples.length / BIN);
}

/** Measures how far a density is from the truth. */
export function compare(name: string, density: number[]): Fit {
  const gap = density.map((p, i) => (p - TRUTH[i]) * BIN);
  const wasserstein = BIN * sum(cumsum(gap), Math.abs);
  return { name, density, totalVariation: sum(gap, Math.abs) / 2, wasserstein };
}
