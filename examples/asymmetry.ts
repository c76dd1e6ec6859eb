/**
 * KL has a direction, and no bound; what the other distances do instead.
 *
 * What to look at: the first panel, where KL(P‖Q) is not KL(Q‖P); the second, where two normal distributions part: KL grows
 * with the square of the shift, Jensen–Shannon and total variation stop at their bounds and tell far from farther no more,
 * Wasserstein's distance is the shift itself; and the third, where Σ p·(ln p − ln q), as textbooks write it, loses all its digits in
 * float32 when the rows are nearly equal (a student that has almost learnt its teacher), while `forwardKl` keeps them.
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
import { type Findings, present, type Setting } from "./support/experiment.ts";
import { COLORS, encodeNames, INK, linePanel } from "./support/report.ts";

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
const CLIP = 1e-7;

/** How far Q is from P: in nats, but Wasserstein's distance in steps from class to class. */
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

/** KL(P‖Q) in float64, and in float32 in three ways. */
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
    const seen = logits.map(Math.fround); // what the GPU is given
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

function describe({ pairs, shifts, precision }: Awaited<ReturnType<typeof asymmetry>>): Findings {
  const show = (x: number) => Number.isNaN(x) ? "NaN" : x === Infinity ? "∞" : x.toFixed(4);
  const exactly = (x: number) => Number.isFinite(x) ? x.toExponential(3) : show(x);
  const finite = pairs.filter(({ forwardKl, reverseKl }) => forwardKl + reverseKl < Infinity);
  const [red, blue, orange, green, violet] = COLORS.slice(2);
  const along = (name: string, distance: (row: Distances) => number) =>
    shifts.map((row) => ({ name, x: row.shift, y: distance(row) }));
  const error = (name: string, kl: (row: Precision) => number) =>
    // a log scale has no place for an error of 0
    precision.filter(({ gap }) => gap).map((row) => ({
      name,
      x: row.gap!,
      y: Math.abs(kl(row) / row.truth - 1) || 1e-8,
    }));
  return {
    title: "KL has a direction and no bound",
    subtitle: "All but Wasserstein's distance in nats. JSD is Jensen–Shannon with β = ½.",
    tables: [[
      ["P ‖ Q", "KL(P‖Q)", "in bits", "H(P,Q) − H(P)", "KL(Q‖P)", "JSD ≤ 0.6931", "TV ≤ 1", "Wasserstein"],
      ...pairs.map((row) => [
        row.name,
        ...[row.forwardKl, row.forwardKl / Math.LN2, row.crossEntropy - row.entropy, row.reverseKl].map(show),
        ...[row.jsd, row.totalVariation, row.wasserstein].map(show),
      ]),
    ], [
      ["KL(P‖Q) in float32", "truth (float64)", "textbook", `clipped at ${CLIP}`, "forwardKl"],
      ...precision.map((row) => [row.name, ...[row.truth, row.textbook, row.clipped, row.ours].map(exactly)]),
    ]],
    picture: {
      hconcat: [
        {
          title: "two directions",
          width: 200,
          height: 260,
          data: {
            values: finite.flatMap(({ name: pair, forwardKl, reverseKl }) => [
              { pair, name: "KL(P‖Q)", value: forwardKl },
              { pair, name: "KL(Q‖P)", value: reverseKl },
            ]),
          },
          encoding: {
            y: { field: "pair", type: "nominal", sort: finite.map(({ name }) => name), title: null },
            yOffset: { field: "name", sort: null },
            x: { field: "value", type: "quantitative", title: "nats", axis: { tickCount: 4 } },
          },
          layer: [{ mark: "bar", encoding: { color: encodeNames({ "KL(P‖Q)": blue, "KL(Q‖P)": red }) } }, {
            mark: { type: "text", align: "left", dx: 4, fontSize: 11, color: INK },
            encoding: { text: { field: "value", format: ".3f" } },
          }],
        },
        linePanel(
          "N(0, 1) against N(shift, 1)",
          { KL: blue, Wasserstein: green, "total variation": orange, JSD: violet },
          [
            ...along("KL", (row) => row.forwardKl),
            ...along("Wasserstein", (row) => row.wasserstein),
            ...along("total variation", (row) => row.totalVariation),
            ...along("JSD", (row) => row.jsd),
          ],
          { x: { title: "shift" }, y: { title: "distance", domain: [0, 8] } },
        ),
        linePanel(
          "KL of nearly equal rows in float32",
          { "Σ p·(ln p − ln q)": red, "forwardKl": blue },
          [...error("Σ p·(ln p − ln q)", ({ textbook }) => textbook), ...error("forwardKl", ({ ours }) => ours)],
          {
            x: { title: "gap between the logits", log: true, reverse: true },
            y: { title: "relative error", log: true },
          },
        ),
      ],
      resolve: { scale: { color: "independent" } },
    },
  };
}

if (import.meta.main) {
  await present("asymmetry", "Compares divergences in their two directions and in float32.", asymmetry, describe);
}
