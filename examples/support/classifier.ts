/**
 * A small classifier of digits for the experiments.
 *
 * @module
 */

import { nn, noGrad, optim, relu, Scope, Tape, type Tensor, tensor } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { mean, range } from "d3-array";
import { CLASSES, type Digits, PIXELS } from "./digits.ts";

const BATCH_SIZE = 128;
const LEARNING_RATE = 3e-3;

/** One hidden layer. */
export function makeClassifier(hidden: number): nn.Sequential {
  return new nn.Sequential(new nn.Linear(PIXELS, hidden), relu, new nn.Linear(hidden, CLASSES));
}

/** Trains with AdamW. `loss` gets the logits and the batch: images, labels, and the columns of `more`. */
export function trainClassifier(
  model: nn.Sequential,
  { images, labels }: Digits,
  epochs: number,
  loss: (logits: Tensor, batch: Record<string, Tensor>) => Tensor,
  more: Record<string, nn.Column> = {},
): void {
  const columns: Record<string, nn.Column> = {
    images: { data: images, shape: [labels.length, PIXELS] },
    labels: { data: labels, shape: [labels.length] },
    ...more,
  };
  using optimizer = new optim.AdamW(model.parameters(), { lr: LEARNING_RATE });
  for (const epoch of range(epochs)) {
    for (const batch of nn.batches(columns, { batchSize: BATCH_SIZE, shuffle: true, seed: epoch, dropLast: true })) {
      using _tape = new Tape(); // records the step and frees its memory
      loss(model.forward(batch.images), batch).backward();
      optimizer.step();
      optimizer.zeroGrad();
    }
  }
}

/** A model's logits of every image, [rows, classes] in one array. */
export async function readLogits(model: nn.Sequential, { images, labels }: Digits): Promise<Float32Array> {
  using _scope = new Scope();
  return await noGrad(() => model.forward(tensor(images, [labels.length, PIXELS]))).data() as Float32Array;
}

/** The share of rows whose largest logit is the label's, among all rows or those with one label. */
export function accuracyOf(logits: Float32Array, labels: Int32Array, only?: number): number {
  const rows = [...labels.keys()].filter((row) => only === undefined || labels[row] === only);
  return mean(rows, (row) => {
    const own = logits.subarray(row * CLASSES, (row + 1) * CLASSES);
    return Number(own.indexOf(Math.max(...own)) === labels[row]);
  })!;
}
