/**
 * From mode-covering to mode-seeking: the generalised Jensen–Shannon divergence over β.
 *
 * The teacher has six modes on a ring; the student is a mixture of two round Gaussians and cannot match them all. What to look
 * at: the pictures of the students, which spread over all modes at β = 0 (forward KL) and settle on two as β grows to 1 (reverse
 * KL); coverage, which falls with β, and quality, which rises; and the last panel: as defined, the divergence and therefore its
 * gradient go to 0 at both ends; `normalize` prevents that, and then the KLs are the limits at both ends.
 *
 *     deno task examples beta_sweep --help
 *
 * @module
 */

import { jsd, logSumExp, noGrad, optim, Scope, softmax, Tape, type Tensor, tensor } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { cross, mean, range } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg, randomNormal } from "d3-random";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/beta_sweep.ts";

export const MODES: number[][] = range(6).map((i) => [3 * Math.cos(Math.PI * i / 3), 3 * Math.sin(Math.PI * i / 3)]);
export const DEVIATION = 0.35; // of a mode
const STEP = 0.3;
const GRID: [number, number][] = cross(range(-4.8, 4.9, STEP), range(-4.8, 4.9, STEP));
const PARTS = 2; // of the student
const BETAS = { full: [0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1], quick: [0, 0.5, 1] };
export const LISTED: number[] = [0, 0.0001, 0.01, 0.5, 0.99, 0.9999, 1]; // of the two small distributions
const STARTS = { full: 12, quick: 4 };
const STEPS = { full: 400, quick: 200 };
const LEARNING_RATE = 0.1; // its peak
const NEAR = 3 * DEVIATION; // a mode is the disc of this radius

export interface Part {
  x: number;
  y: number;
  deviation: number;
}

export interface Student {
  beta: number;
  loss: number;
  /** The share of modes that have at least a fifth of the probability that the teacher gives them. */
  coverage: number;
  /** The probability of being in any mode. */
  quality: number;
  parts: Part[];
}

/** `jsd` and the largest element of its gradient, as defined and with `normalize`. */
export interface Value {
  beta: number;
  plain: number;
  plainGradient: number;
  normalized: number;
  normalizedGradient: number;
}

const distance = ([x, y]: number[], [u, v]: number[]) => Math.hypot(x - u, y - v);

/** The teacher's logits, [grid]. */
const TEACHER = GRID.map((point) =>
  Math.log(MODES.reduce((sum, mode) => sum + Math.exp(-((distance(point, mode) / DEVIATION) ** 2) / 2), 0))
);

/** Students from all starts at one β; each is a row and independent of the others. */
async function train(beta: number, { seed, quick }: Setting): Promise<Student[]> {
  const [starts, steps] = quick ? [STARTS.quick, STEPS.quick] : [STARTS.full, STEPS.full];
  using _scope = new Scope(); // frees the tensors
  const draw = randomNormal.source(randomLcg(seed));
  const shape = [starts, PARTS, 1];
  const make = (from: () => number) =>
    tensor(Float32Array.from({ length: starts * PARTS }, from), shape, { requiresGrad: true });
  const x = make(draw(0, 2)), y = make(draw(0, 2));
  const logDeviation = make(() => 0);
  const [gridX, gridY] = [0, 1].map((i) => tensor(GRID.map((point) => point[i])));
  const teacher = tensor([TEACHER]).expand([starts, GRID.length]);
  const logits = (): Tensor => { // [starts, grid]
    const square = gridX.sub(x).square().add(gridY.sub(y).square()); // [starts, parts, grid]
    const log = square.mul(logDeviation.mul(-2).exp().mul(-0.5)).sub(logDeviation.mul(2));
    return logSumExp(log, { dim: 1 });
  };

  using optimizer = new optim.Adam([x, y, logDeviation], { lr: LEARNING_RATE });
  const schedule = optim.cosine({ steps });
  for (const step of range(steps)) {
    using _tape = new Tape();
    jsd(logits(), teacher, { beta, normalize: true, reduction: "sum" }).backward();
    optimizer.lr = LEARNING_RATE * schedule(step);
    optimizer.step();
    optimizer.zeroGrad();
  }

  const [losses, q] = noGrad(() => [jsd(logits(), teacher, { beta, reduction: "none" }), softmax(logits(), -1)]);
  const [loss, probabilities, xs, ys, deviations] = await Promise.all(
    [losses, q, x, y, logDeviation.exp()].map((result) => result.data()),
  );
  return range(starts).map((start) => {
    const masses = MODES.map((mode) =>
      GRID.reduce(
        (sum, point, i) => sum + (distance(point, mode) < NEAR ? probabilities[start * GRID.length + i] : 0),
        0,
      )
    );
    return {
      beta,
      loss: loss[start],
      coverage: mean(masses, (mass) => Number(mass > 0.2 / MODES.length))!,
      quality: masses.reduce((sum, mass) => sum + mass),
      parts: range(start * PARTS, (start + 1) * PARTS).map((i) => ({
        x: xs[i],
        y: ys[i],
        deviation: deviations[i],
      })),
    };
  });
}

/** The value for P = [.9, .1] and Q = [.6, .4] and the largest element of its gradient, as defined and normalised. */
async function evaluate(beta: number): Promise<Value> {
  using _scope = new Scope();
  const student = tensor([[Math.log(.6), Math.log(.4)]], undefined, { requiresGrad: true });
  const teacher = tensor([[Math.log(.9), Math.log(.1)]]);
  const found: number[] = [];
  for (const normalize of [false, true]) {
    using _tape = new Tape();
    const loss = jsd(student, teacher, { beta, normalize });
    loss.backward();
    found.push(await loss.item(), Math.max(...await student.grad!.data()));
    student.grad!.dispose();
    student.grad = null;
  }
  const [plain, plainGradient, normalized, normalizedGradient] = found;
  return { beta, plain, plainGradient, normalized, normalizedGradient };
}

/** The trained students, and the divergence of two small distributions over β. */
export async function betaSweep(setting: Setting): Promise<{ students: Student[]; values: Value[] }> {
  const students: Student[] = [], values: Value[] = [];
  for (const beta of setting.quick ? BETAS.quick : BETAS.full) students.push(...await train(beta, setting));
  for (const beta of [...LISTED, ...range(0.04, 0.98, 0.08)].sort((a, b) => a - b)) {
    values.push(await evaluate(beta));
  }
  return { students, values };
}

if (import.meta.main) {
  await present(
    "beta_sweep",
    "Trains a student too small for its teacher by jsd over β.",
    betaSweep,
    (found) => describe(found, { MODES, DEVIATION, LISTED }),
  );
}
