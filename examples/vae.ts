/**
 * A variational autoencoder on the digits: what the weight of its KL term does, and how the posterior collapses.
 *
 * The encoder gives each image a Gaussian q(z|x) in the plane, the decoder draws an image from z; the loss is the pixels'
 * cross-entropy plus a weight times KL(q(z|x) ‖ N(0, 1)) in closed form. What to look at: `train`, which is the whole method; the
 * KL, which falls as its weight grows, and is 0 at the largest weight: there q is the prior for every image (posterior collapse),
 * and the decoder draws the mean of all digits; and the plane of digits that the model with weight 1 learns.
 *
 *     deno task examples vae --help
 *
 * @module
 */

import {
  binaryCrossEntropyWithLogits,
  gaussianKl,
  manualSeed,
  nn,
  noGrad,
  optim,
  randn,
  relu,
  Scope,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { cross, deviation, mean, range } from "d3-array";
import { type Digits, loadDigits, PIXELS, splitDigits, takeRows } from "./support/digits.ts";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/vae.ts";

const LATENT = 2;
const HIDDEN = 128;
const BATCH_SIZE = 100;
const LEARNING_RATE = 3e-3;
const WEIGHTS = { full: [0.1, 1, 5, 20, 100], quick: [0.1, 1, 100] };
const SIZES = { full: { digits: 3000, epochs: 10 }, quick: { digits: 1000, epochs: 6 } };
const TEST_DIGITS = 500;
const SHOWN = 5; // test digits that are drawn again
const PLANE = range(-2, 2.1); // of z, in each direction

/** The result of one weight of the KL term, on the test digits. */
export interface Outcome {
  weight: number;
  /** Nats an image. */
  reconstruction: number;
  kl: number;
  /** How much worse the reconstruction from another image's z is. */
  dependence: number;
  /** The deviation of q's means over the images, and the mean of q's deviations: 0 and 1 if q is the prior. */
  spread: number;
  width: number;
  /** The pixels, between 0 and 1, of the reconstructed digits and of the plane. */
  again: Float32Array[];
  plane: Float32Array[];
}

/** The two networks. */
class Autoencoder extends nn.Module {
  encoder = new nn.Sequential(new nn.Linear(PIXELS, HIDDEN), relu);
  mean = new nn.Linear(HIDDEN, LATENT);
  logVariance = new nn.Linear(HIDDEN, LATENT);
  decoder = new nn.Sequential(new nn.Linear(LATENT, HIDDEN), relu, new nn.Linear(HIDDEN, PIXELS));

  /** q(z|x): mean and log-variance, [rows, 2] each. */
  encode(images: Tensor): [Tensor, Tensor] {
    const hidden = this.encoder.forward(images);
    return [this.mean.forward(hidden), this.logVariance.forward(hidden)];
  }

  /** The logits of the pixels, from z [rows, 2]. */
  override forward(z: Tensor): Tensor {
    return this.decoder.forward(z);
  }
}

/** Cross-entropy of the pixels, nats an image. */
const pixelLoss = (logits: Tensor, images: Tensor) =>
  binaryCrossEntropyWithLogits(logits, images, { reduction: "sum" }).div(images.shape[0]);

function train(weight: number, { images, labels }: Digits, { seed, quick }: Setting): Autoencoder {
  manualSeed(seed);
  const model = new Autoencoder(), rows = labels.length;
  using optimizer = new optim.Adam(model.parameters(), { lr: LEARNING_RATE });
  for (const epoch of range(quick ? SIZES.quick.epochs : SIZES.full.epochs)) {
    const columns = { images: { data: images, shape: [rows, PIXELS] } };
    for (
      const { images } of nn.batches(columns, { batchSize: BATCH_SIZE, shuffle: true, seed: epoch, dropLast: true })
    ) {
      using _tape = new Tape();
      const [mean, logVariance] = model.encode(images);
      const z = randn(mean.shape).mul(logVariance.mul(0.5).exp()).add(mean); // differentiable in mean and deviation
      const loss = pixelLoss(model.forward(z), images).add(gaussianKl(mean, logVariance).mul(weight));
      loss.backward();
      optimizer.step();
      optimizer.zeroGrad();
    }
  }
  return model;
}

async function evaluate(weight: number, model: Autoencoder, { images, labels }: Digits): Promise<Outcome> {
  using _scope = new Scope();
  const rows = labels.length, x = tensor(images, [rows, PIXELS]);
  const other = tensor(takeRows(images, PIXELS, range(rows).map((row) => (row + rows / 2) % rows)), [rows, PIXELS]);
  const [[q, logVariance], [qOther]] = noGrad(() => [model.encode(x), model.encode(other)]);
  const pictures = async (z: Tensor) => {
    const pixels = await noGrad(() => model.forward(z).sigmoid()).data() as Float32Array;
    return range(z.shape[0]).map((row) => pixels.slice(row * PIXELS, (row + 1) * PIXELS));
  };
  const reconstruction = await pixelLoss(model.forward(q), x).item();
  const means = await q.data(), deviations = await logVariance.mul(0.5).exp().data();
  return {
    weight,
    reconstruction,
    kl: await gaussianKl(q, logVariance).item(),
    dependence: await pixelLoss(model.forward(qOther), x).item() - reconstruction,
    spread: deviation(means)!,
    width: mean(deviations)!,
    again: (await pictures(q)).slice(0, SHOWN),
    plane: await pictures(tensor(cross(PLANE, PLANE, (y, x) => [x, -y]))),
  };
}

/** Autoencoders with ever heavier KL terms, on digits that they have not seen; those come first. */
export async function vae(setting: Setting): Promise<{ shown: Float32Array[]; outcomes: Outcome[] }> {
  const { digits } = setting.quick ? SIZES.quick : SIZES.full;
  const { train: seen, test } = splitDigits(loadDigits(), digits, setting.seed);
  const held = { images: test.images.slice(0, TEST_DIGITS * PIXELS), labels: test.labels.slice(0, TEST_DIGITS) };
  const outcomes: Outcome[] = [];
  for (const weight of setting.quick ? WEIGHTS.quick : WEIGHTS.full) {
    const model = train(weight, seen, setting);
    outcomes.push(await evaluate(weight, model, held));
    model.dispose();
  }
  return { shown: range(SHOWN).map((row) => held.images.slice(row * PIXELS, (row + 1) * PIXELS)), outcomes };
}

if (import.meta.main) {
  await present("vae", "Trains variational autoencoders of digits, over the weight of the KL term.", vae, describe);
}
