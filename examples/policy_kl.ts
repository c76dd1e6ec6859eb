/**
 * Keeping a policy near its last version: policy gradients without a constraint, with a KL penalty and with clipping.
 *
 * An agent learns to cross a frozen lake with holes, 4×4 fields. Each update plays some episodes and then takes many gradient
 * steps on them, which is valid only as long as the policy stays near the one that played. What to look at: `OBJECTIVES`, where
 * the methods differ in one line; KL(old‖new) of each update, which the penalty and the clipping keep small; and the return,
 * which without them gets stuck or falls.
 *
 *     deno task examples policy_kl --help
 *
 * @module
 */

import {
  embedding,
  forwardKl,
  gather,
  logSoftmax,
  minimum,
  noGrad,
  optim,
  Scope,
  softmax,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { deviation, mean, range, rollup } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg } from "d3-random";
import { present, type Setting } from "./support/experiment.ts";
import { act, LONGEST, SLIP, STATES } from "./support/lake.ts";
import { describe } from "./pictures/policy_kl.ts";

const DISCOUNT = 0.98;

export const SAMPLES = 400; // steps that an update plays
const SEEDS = { full: 5, quick: 3 };
const UPDATES = { full: 30, quick: 10 };
export const GRADIENT_STEPS = 20; // an update
const LEARNING_RATE = 0.3;
const PENALTY = 1;
const CLIP = 0.2;

/** What an objective is computed from: the samples' probability ratios new/old and advantages [samples, 1], and both policies' logits [samples, moves]. */
interface Update {
  ratio: Tensor;
  advantage: Tensor;
  logits: Tensor;
  oldLogits: Tensor;
}

export const OBJECTIVES: Record<string, (update: Update) => Tensor> = {
  "unconstrained": ({ ratio, advantage }) => ratio.mul(advantage).mean(),
  "KL penalty": ({ ratio, advantage, logits, oldLogits }) =>
    ratio.mul(advantage).mean().sub(forwardKl(logits, oldLogits).mul(PENALTY)), // KL(old‖new)
  "clipped": ({ ratio, advantage }) =>
    minimum(ratio.mul(advantage), ratio.clamp({ min: 1 - CLIP, max: 1 + CLIP }).mul(advantage)).mean(),
};

/** Plays episodes by the policy's probabilities until there are enough samples. */
function play(policy: Float32Array, random: () => number) {
  const states: number[] = [], moves: number[] = [], returns: number[] = [], scores: number[] = [];
  while (states.length < SAMPLES) {
    const rewards: number[] = [];
    for (let state = 0, end = false; !end && rewards.length < LONGEST;) {
      let left = random(), move = 0;
      while (move < 3 && (left -= policy[state * 4 + move]) > 0) move++;
      states.push(state);
      moves.push(move);
      const found = act(state, random() < SLIP ? Math.floor(4 * random()) : move);
      rewards.push(found.reward);
      ({ next: state, end } = found);
    }
    scores.push(rewards.reduce((sum, reward) => sum + reward));
    let ahead = 0;
    returns.push(...rewards.reverse().map((reward) => ahead = reward + DISCOUNT * ahead).reverse());
  }
  // a sample's advantage: its return against the mean from the same state
  const baseline = rollup(range(states.length), (own) => mean(own, (i) => returns[i])!, (i) => states[i]);
  const raw = returns.slice(0, SAMPLES).map((sum, i) => sum - baseline.get(states[i])!);
  const spread = deviation(raw) || 1;
  return {
    score: mean(scores)!,
    states: Int32Array.from(states.slice(0, SAMPLES)),
    moves: Int32Array.from(moves.slice(0, SAMPLES)),
    advantages: Float32Array.from(raw, (each) => each / spread),
  };
}

/** One update of a run: the return of the episodes that it played, and how far it then moved the policy. */
export interface Point {
  method: string;
  seed: number;
  update: number;
  score: number;
  kl: number;
}

async function learn(method: string, seed: number, updates: number): Promise<Point[]> {
  const random = randomLcg(seed / 1000);
  using _scope = new Scope(); // frees the tensors
  const policy = zeros([STATES, 4], { requiresGrad: true }); // logits: every move is equally likely at first
  using optimizer = new optim.Adam([policy], { lr: LEARNING_RATE });
  const points: Point[] = [];
  for (const update of range(updates)) {
    using _scope = new Scope();
    const { score, ...samples } = play(await noGrad(() => softmax(policy, -1)).data() as Float32Array, random);
    const states = tensor(samples.states), moves = tensor(samples.moves, [SAMPLES, 1]);
    const advantage = tensor(samples.advantages, [SAMPLES, 1]);
    const oldLogits = noGrad(() => embedding(policy, states)); // [samples, moves]
    const logOf = (logits: Tensor) => gather(logSoftmax(logits, -1), 1, moves); // [samples, 1]
    const oldLog = logOf(oldLogits);
    for (const _ of range(GRADIENT_STEPS)) {
      using _tape = new Tape();
      const logits = embedding(policy, states);
      const ratio = logOf(logits).sub(oldLog).exp();
      OBJECTIVES[method]({ ratio, advantage, logits, oldLogits }).neg().backward();
      optimizer.step();
      optimizer.zeroGrad();
    }
    const kl = await noGrad(() => forwardKl(embedding(policy, states), oldLogits)).item();
    points.push({ method, seed, update, score, kl });
  }
  return points;
}

/** Every method from every seed. */
export async function policyKl({ seed, quick }: Setting): Promise<Point[]> {
  const [seeds, updates] = quick ? [SEEDS.quick, UPDATES.quick] : [SEEDS.full, UPDATES.full];
  const points: Point[] = [];
  for (const method of Object.keys(OBJECTIVES)) {
    for (const each of range(seed, seed + seeds)) points.push(...await learn(method, each, updates));
  }
  return points;
}

if (import.meta.main) {
  await present(
    "policy_kl",
    "Learns a small task with and without a constraint on the policy's KL.",
    policyKl,
    (found) => describe(found, { SAMPLES, GRADIENT_STEPS, OBJECTIVES }),
  );
}
