/**
 * KL is asymmetric and unbounded; how it compares with other distances.
 *
 * What to look at: the first panel, where KL(P‖Q) differs from KL(Q‖P); the second, where two normal distributions move apart: KL
 * grows with the square of the shift, Jensen–Shannon and total variation reach their bounds and then hardly change, and
 * Wasserstein's distance is the shift itself; and the third, where Σ p·(ln p − ln q), as textbooks write it, loses all its digits
 * in float32 when the rows are nearly equal (a student that has almost learned its teacher), while `forwardKl` keeps them.
 *
 *     deno task examples asymmetry --help
 *
 * @module
 */

import {
  crossEntropyOfDistributions,
  entropy,
  forwardKl,
  jsd,
  ones,
  reverseKl,
  Scope,
  softmax,
  type Tensor,
  tensor,
  totalVariation,
  triu,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { range } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg, randomNormal } from "d3-random";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/asymmetry.ts";

const PAIRS: [name: string, p: number[], q: number[]][] = [
  ["[.9 .1] ‖ [.6 .4]", [.9, .1], [.6, .4]],
  ["[.9 .1] ‖ [.99 .01]", [.9, .1], [.99, .01]],
  ["[.36 .48 .16] ‖ uniform", [.36, .48, .16], [1 / 3, 1 / 3, 1 / 3]],
  ["[1 0] ‖ [.5 .5]", [1, 0], [.5, .5]],
  ["[1 0] ‖ [0 1]", [1, 0], [0, 1]],
];
const SHIFTS = range(0, 8.1, 0.25); // of N(0, 1) from N(shift, 1)
const GAPS = range(0, -5.5, -1).map((power) => 10 ** power); // between the logits of rows that are nearly equal
const CLASSES = 32;
export const CLIP = 1e-7;

/** How far Q is from P, in nats; Wasserstein's distance in steps from class to class. */
export interface Distances {
  name: string;
  forwardKl: number; // KL(P‖Q)
  reverseKl: number; // KL(Q‖P)
  crossEntropy: number; // H(P, Q)
  entropy: number; // H(P)
  jsd: number;
  totalVariation: number;
  wasserstein: number;
}

/** KL(P‖Q) in float64, and computed in float32 in three ways. */
export interface Precision {
  name: string;
  gap?: number;
  truth: number;
  textbook: number;
  clipped: number;
  ours: number;
}

const value = async (x: Tensor): Promise<number> => await x.item();

/** P is the teacher and Q the student: the losses ask how well Q stands in for P. The logarithm of a distribution serves as its logits. */
async function compare(name: string, logP: number[], logQ: number[]): Promise<Distances> {
  using _scope = new Scope(); // frees the tensors
  const p = tensor([logP]), q = tensor([logQ]); // [1, classes]
  const upTo = triu(ones([logP.length, logP.length])); // a row times this is its running sum
  return {
    name,
    forwardKl: await value(forwardKl(q, p)),
    reverseKl: await value(reverseKl(q, p)),
    crossEntropy: await value(crossEntropyOfDistributions(q, p)),
    entropy: await value(entropy(p)),
    jsd: await value(jsd(q, p)),
    totalVariation: await value(totalVariation(q, p)),
    // on a line: the area between the cumulative distributions
    wasserstein: await value(softmax(p, -1).sub(softmax(q, -1)).matmul(upTo).abs().sum()),
  };
}

async function measure(name: string, logitsP: number[], logitsQ: number[], gap?: number): Promise<Precision> {
  using _scope = new Scope();
  const teacher = tensor([logitsP]), student = tensor([logitsQ]);
  const p = softmax(teacher, -1), q = softmax(student, -1);
  const textbook = (p: Tensor, q: Tensor) => p.mul(p.log().sub(q.log())).sum();
  const clip = (x: Tensor) => x.clamp({ min: CLIP, max: 1 });
  return {
    name,
    gap,
    truth: klInFloat64(logitsP, logitsQ),
    textbook: await value(textbook(p, q)),
    clipped: await value(textbook(clip(p), clip(q))),
    ours: await value(forwardKl(student, teacher)),
  };
}

function klInFloat64(logitsP: number[], logitsQ: number[]): number {
  const [x, y] = [logitsP, logitsQ].map((logits) => {
    const seen = logits.map(Math.fround); // what the GPU gets
    const most = Math.max(...seen);
    const rest = Math.log(seen.reduce((sum, logit) => sum + Math.exp(logit - most), 0));
    return seen.map((logit) => logit - most - rest);
  });
  return x.reduce((sum, logP, i) => logP === -Infinity ? sum : sum + Math.exp(logP) * (logP - y[i]), 0);
}

/** All the numbers. */
export async function asymmetry({ seed }: Setting): Promise<
  { pairs: Distances[]; shifts: (Distances & { shift: number })[]; precision: Precision[] }
> {
  const pairs: Distances[] = [];
  for (const [name, p, q] of PAIRS) pairs.push(await compare(name, p.map(Math.log), q.map(Math.log)));

  const grid = range(-8, 16.1, 0.25);
  const normal = (mean: number) => grid.map((x) => -((x - mean) ** 2) / 2);
  const shifts: (Distances & { shift: number })[] = [];
  for (const shift of SHIFTS) {
    const found = await compare(`shift ${shift}`, normal(0), normal(shift));
    shifts.push({ ...found, wasserstein: found.wasserstein * 0.25, shift }); // a step of the grid is a quarter
  }

  const draw = randomNormal.source(randomLcg(seed))(0, 1);
  const teacher = range(CLASSES).map(() => draw()), direction = range(CLASSES).map(() => draw());
  const precision: Precision[] = [];
  for (const gap of GAPS) {
    const student = teacher.map((logit, i) => logit + gap * direction[i]);
    precision.push(await measure(`logits ${gap.toExponential(0)} apart`, teacher, student, gap));
  }
  precision.push(await measure("logits [0 0] ‖ [200 0]: underflow", [0, 0], [200, 0]));
  precision.push(await measure("[1 0] ‖ [.5 .5]: a zero", [0, -Infinity], [0, 0]));
  precision.push(await measure("[.5 .5 0] ‖ [.5 0 .5]: apart", [0, 0, -Infinity], [0, -Infinity, 0]));
  return { pairs, shifts, precision };
}

if (import.meta.main) {
  await present(
    "asymmetry",
    "Compares divergences in their two directions and in float32.",
    asymmetry,
    (found) => describe(found, { CLIP }),
  );
}
