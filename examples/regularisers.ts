/**
 * Label smoothing, z-loss and softcap: what they do to confidence, to the size of logits, and to f16.
 *
 * A classifier trains on few digits for a long time. What to look at: the reliability diagrams, where a calibrated model lies on
 * the diagonal (of the predictions made with 80 % confidence, 80 % are right), the plain one is overconfident, and one with much
 * label smoothing is underconfident; the log-sum-exp of the logits over training, which only the z-loss keeps near 0; and what is
 * lost when the logits are stored as f16, whose rounding steps grow with the numbers.
 *
 *     deno task examples regularisers --help
 *
 * @module
 */

import {
  crossEntropy,
  init,
  logSumExp,
  manualSeed,
  Meter,
  Scope,
  softmax,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { max, mean, range } from "d3-array";
import { accuracyOf, makeClassifier, readLogits, trainClassifier } from "./support/classifier.ts";
import { CLASSES, loadDigits, splitDigits } from "./support/digits.ts";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/regularisers.ts";

const SIZES = { full: { digits: 1000, epochs: 60 }, quick: { digits: 500, epochs: 40 } };
const HIDDEN = 128;
const BINS = 10;

const METHODS: Record<string, { labelSmoothing?: number; zLoss?: number; softcap?: number }> = {
  "plain": {},
  "smoothing, ε = 0.02": { labelSmoothing: 0.02 },
  "smoothing, ε = 0.1": { labelSmoothing: 0.1 },
  "z-loss, λ = 0.01": { zLoss: 0.01 },
  "softcap, ±4": { softcap: 4 },
};

/** The results of one trained model on the test digits. */
export interface Result {
  method: string;
  accuracy: number;
  negativeLogLikelihood: number;
  /** Σ over bins of the share of rows in the bin × |accuracy − mean confidence| there. */
  calibrationError: number;
  bins: { confidence: number; accuracy: number; share: number }[];
  /** By step, the batch's mean log-sum-exp of the logits. */
  logSumExp: number[];
  largestLogit: number;
  /** The largest difference between rows' losses with logits stored as f16 and as f32, and likewise of gradients; null if the adapter has no f16. */
  f16Error: { loss: number; gradient: number } | null;
}

/** Bins by confidence, the probability of the most likely class (Guo et al. 2017). */
function reliability(probabilities: Float32Array, labels: Int32Array): Result["bins"] {
  const rows = Array.from(labels, (label, row) => {
    const own = probabilities.subarray(row * CLASSES, (row + 1) * CLASSES);
    const confidence = Math.max(...own);
    return { confidence, right: Number(own.indexOf(confidence) === label) };
  });
  return range(BINS).flatMap((bin) => {
    const inside = rows.filter(({ confidence }) => Math.min(BINS - 1, Math.floor(confidence * BINS)) === bin);
    if (inside.length === 0) return [];
    const [confidence, accuracy] = [mean(inside, (row) => row.confidence)!, mean(inside, ({ right }) => right)!];
    return [{ confidence, accuracy, share: inside.length / rows.length }];
  });
}

/** Losses and gradients by row, with the logits stored as this type. */
async function lossesOf(logits: Float32Array, labels: Int32Array, softcap: number | undefined, dtype: "f16" | "f32") {
  using _scope = new Scope();
  const x = tensor(logits, [labels.length, CLASSES], { dtype, requiresGrad: true });
  using _tape = new Tape();
  const losses = crossEntropy(x, tensor(labels), { softcap, reduction: "none" });
  losses.sum().backward();
  return { losses: [...await losses.data()], gradients: [...await x.grad!.data()] };
}

async function f16Error(logits: Float32Array, labels: Int32Array, softcap?: number): Promise<Result["f16Error"]> {
  if (!(await init()).f16) return null;
  const [half, full] = [
    await lossesOf(logits, labels, softcap, "f16"),
    await lossesOf(logits, labels, softcap, "f32"),
  ];
  const apart = (a: number[], b: number[]) => max(a, (each, i) => Math.abs(each - b[i]))!;
  return { loss: apart(half.losses, full.losses), gradient: apart(half.gradients, full.gradients) };
}

/** Trains and tests a model by each method. */
export async function regularisers({ seed, quick }: Setting): Promise<Result[]> {
  const { digits, epochs } = quick ? SIZES.quick : SIZES.full;
  const { train, test } = splitDigits(loadDigits(), digits, 0);
  const results: Result[] = [];
  for (const [method, options] of Object.entries(METHODS)) {
    manualSeed(seed); // the same first weights
    const model = makeClassifier(HIDDEN);
    using meter = new Meter();
    trainClassifier(model, train, epochs, (logits, { labels }) => {
      meter.add("logSumExp", logSumExp(logits.detach(), { dim: -1 }).mean());
      return crossEntropy(logits, labels, options);
    });
    const raw = await readLogits(model, test);
    using _scope = new Scope();
    const { softcap } = options; // part of the model; the other options are part of its training only
    const cap = (x: Tensor) => softcap ? x.div(softcap).tanh().mul(softcap) : x;
    const logits = tensor(raw, [test.labels.length, CLASSES]);
    const bins = reliability(await softmax(cap(logits), -1).data() as Float32Array, test.labels);
    results.push({
      method,
      accuracy: accuracyOf(raw, test.labels),
      negativeLogLikelihood: await crossEntropy(logits, tensor(test.labels), { softcap }).item(),
      calibrationError: bins.reduce(
        (sum, { confidence, accuracy, share }) => sum + share * Math.abs(accuracy - confidence),
        0,
      ),
      bins,
      logSumExp: (await meter.read()).logSumExp,
      largestLogit: max(await cap(logits).abs().data() as Float32Array)!,
      f16Error: await f16Error(raw, test.labels, softcap),
    });
    model.dispose();
  }
  return results;
}

if (import.meta.main) {
  await present(
    "regularisers",
    "Trains a classifier with label smoothing, z-loss and softcap.",
    regularisers,
    describe,
  );
}
