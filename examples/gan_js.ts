/**
 * What a generator can learn from a perfect discriminator: the Jensen–Shannon divergence, and nothing without overlap.
 *
 * The data are N(0, 1), the generator draws from N(shift, ½²), both as densities on a grid. What to look at: the best
 * discriminator is D* = p/(p + q), and the value of the game is then 2·JSD − ln 4, which tends to 0 as JSD tends to ln 2.
 * The generator's gradient with the loss ln(1 − D*) is that of 2·JSD, and vanishes with the overlap; with −ln D*, which is used
 * in practice, it is that of KL(q‖p) − 2·JSD, and grows; the gradient of Wasserstein's distance is 1 at any large distance.
 *
 *     deno task examples gan_js --help
 *
 * @module
 */

import {
  jsd,
  logSoftmax,
  ones,
  optim,
  Scope,
  softplus,
  Tape,
  type Tensor,
  tensor,
  triu,
  zeros,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { range } from "d3-array";
import { type Findings, present, type Setting } from "./support/experiment.ts";
import { COLORS, linePanel } from "./support/report.ts";

const STEP = 0.1;
const GRID = range(-6, 16, STEP);
const DEVIATION = 0.5; // of what the generator draws
const SHIFTS = { full: range(0, 12.1, 0.25), quick: range(0, 12.1, 1) };
const STEPS = { full: 1000, quick: 300 };
const RATE = 0.5;

/** The results at one shift, in nats. Gradients are with respect to the shift. */
export interface Point {
  shift: number;
  jsd: number;
  best: number; // V(D*)
  trained: number; // V of a discriminator that was trained
  saturating: number;
  nonSaturating: number;
  wasserstein: number;
}

/** Logits of N(mean, deviation²) on the grid, a row for each mean. */
const logNormal = (mean: Tensor, deviation: number): Tensor =>
  tensor([GRID]).sub(mean).div(deviation).square().mul(-0.5);

/** V(D) = E_p ln D + E_q ln(1 − D) of each row, from D's logits. */
const game = (logits: Tensor, p: Tensor, q: Tensor): Tensor =>
  p.mul(softplus(logits.neg())).add(q.mul(softplus(logits))).sum({ dim: 1 }).neg();

/** V of a discriminator that has a logit for each bin, trained from D = ½. */
async function train(p: Tensor, q: Tensor, steps: number): Promise<ArrayLike<number>> {
  const logits = zeros(p.shape, { requiresGrad: true });
  using optimizer = new optim.Adam([logits], { lr: RATE, betas: [0.9, 0.9], eps: 1e-20 }); // so that tiny gradients count
  const schedule = optim.cosine({ steps });
  for (const step of range(steps)) {
    using _tape = new Tape();
    game(logits, p, q).neg().sum().backward();
    optimizer.lr = RATE * schedule(step);
    optimizer.step();
    optimizer.zeroGrad();
  }
  return await game(logits, p, q).data();
}

/** The game at every shift. */
export async function ganJs({ quick }: Setting): Promise<Point[]> {
  using _scope = new Scope(); // frees the tensors
  const shifts = quick ? SHIFTS.quick : SHIFTS.full;
  const mean = tensor(shifts.map((shift) => [shift]), undefined, { requiresGrad: true }); // [shifts, 1]
  const logP = logSoftmax(logNormal(zeros(mean.shape), 1), -1), p = logP.exp();
  const logQ = () => logSoftmax(logNormal(mean, DEVIATION), -1); // of a generator that can learn
  const fixedQ = logQ().detach(), best = logP.sub(fixedQ); // ln(p/q) are the logits of p/(p + q)
  const upTo = triu(ones([GRID.length, GRID.length])); // a row times this is its running sum
  const losses: Record<string, () => Tensor> = { // of the generator, with a fixed discriminator
    saturating: () => logQ().exp().mul(softplus(best)).neg().sum({ dim: 1 }), // E_q ln(1 − D*)
    nonSaturating: () => logQ().exp().mul(softplus(best.neg())).sum({ dim: 1 }), // E_q −ln D*
    // on a line: the area between the cumulative distributions
    wasserstein: () => p.sub(logQ().exp()).matmul(upTo).abs().sum({ dim: 1 }).mul(STEP),
  };
  const gradients: Record<string, ArrayLike<number>> = {};
  for (const [name, loss] of Object.entries(losses)) {
    using _tape = new Tape();
    loss().sum().backward(); // rows are independent
    gradients[name] = await mean.grad!.data();
    mean.grad = null;
  }
  const divergence = await jsd(fixedQ, logP, { reduction: "none" }).data();
  const values = await game(best, p, fixedQ.exp()).data();
  const trained = await train(p, fixedQ.exp(), quick ? STEPS.quick : STEPS.full);
  return shifts.map((shift, i) => ({
    shift,
    jsd: divergence[i],
    best: values[i],
    trained: trained[i],
    saturating: gradients.saturating[i],
    nonSaturating: gradients.nonSaturating[i],
    wasserstein: gradients.wasserstein[i],
  }));
}

function describe(points: Point[]): Findings {
  const [red, blue, orange, green] = COLORS.slice(2);
  const along = (name: string, of: (point: Point) => number) =>
    points.map((point) => ({ name, x: point.shift, y: of(point) }));
  return {
    title: "A perfect discriminator teaches Jensen–Shannon, which has nothing to say from afar",
    subtitle: "Data N(0, 1), generator N(shift, ½²). Left in nats, right the sizes of the gradients for the shift.",
    tables: [[
      ["shift", "JSD ≤ 0.693147", "2·JSD − ln 4", "V(D*)", "V(D) trained", "ln(1 − D)", "−ln D", "Wasserstein"],
      ...points.filter(({ shift }) => Number.isInteger(shift)).map((point) => [
        `${point.shift}`,
        ...[point.jsd, 2 * point.jsd - Math.log(4), point.best, point.trained].map((each) => each.toFixed(6)),
        point.saturating.toExponential(1),
        ...[point.nonSaturating, point.wasserstein].map((each) => each.toFixed(4)),
      ]),
    ]],
    notes: ["The last three columns are gradients for the shift: of two losses at D*, and of the distance.", ""],
    picture: {
      hconcat: [
        linePanel(
          "the game's value",
          { "JSD": blue, "V(D*)": red },
          [...along("JSD", ({ jsd }) => jsd), ...along("V(D*)", ({ best }) => best)],
          { x: { title: "shift" }, y: { title: "nats" } },
        ),
        linePanel(
          "what pulls the generator back",
          { "ln(1 − D*)": red, "−ln D*": orange, "Wasserstein": green },
          [
            ...along("ln(1 − D*)", ({ saturating }) => saturating),
            ...along("−ln D*", ({ nonSaturating }) => nonSaturating),
            ...along("Wasserstein", ({ wasserstein }) => wasserstein),
          ],
          { x: { title: "shift" }, y: { title: "gradient for the shift", log: true, domain: [1e-12, 100] } },
        ),
      ],
      resolve: { scale: { color: "independent" } },
    },
  };
}

if (import.meta.main) {
  await present("gan_js", "Measures what a generator learns from the best discriminator.", ganJs, describe);
}
