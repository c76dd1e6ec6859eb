/**
 * The timed losses, each with its twin composed of primitive ops.
 *
 * @module
 */

import { crossEntropy, distillation, forwardKl, gather, jsd, reverseKl, type Tensor, tensor } from "@limbeck/limbeck";

/** The inputs of the losses. */
export interface LossInputs {
  /** Logits [rows, classes]; the caller decides which of them require a gradient. */
  student: Tensor;
  teacher: Tensor;
  /** [rows], −100 where ignored */
  labels: Tensor;
  /** [rows], 0 where ignored */
  places: Tensor;
  /** [rows], 0 where ignored, else 1 */
  kept: Tensor;
  /** Class weights [classes]. */
  weight: Tensor;
}

/** Labels and class weights for logits of this shape; with `someIgnored` every eighth row is ignored. */
export function drawLabels(
  rows: number,
  classes: number,
  someIgnored: boolean,
): Omit<LossInputs, "student" | "teacher"> {
  const places = Int32Array.from({ length: rows }, (_, i) => (i * 7919) % classes);
  const ignored = (i: number) => someIgnored && i % 8 === 3;
  return {
    labels: tensor(places.map((place, i) => ignored(i) ? -100 : place)),
    places: tensor(places),
    kept: tensor(Float32Array.from(places, (_, i) => ignored(i) ? 0 : 1)),
    weight: tensor(Float32Array.from({ length: classes }, (_, c) => 0.5 + (c % 5) / 4)),
  };
}

/** A loss, plain and with every option on, fused and composed of primitive ops. */
export interface Loss {
  name: string;
  /** How many tensors of logits it reads. */
  inputs: 1 | 2;
  /**
   * Floating-point operations per element of the plain loss with its gradient, by the formulas; an exponential or a logarithm
   * counts as one. For the roofline.
   */
  flops: number;
  plain: { fused: (x: LossInputs) => Tensor; twin: (x: LossInputs) => Tensor };
  everyOption: { fused: (x: LossInputs) => Tensor; twin: (x: LossInputs) => Tensor };
}

/** Each row's logit at its label. */
export function atLabels(x: Tensor, places: Tensor): Tensor {
  return gather(x, -1, places.reshape([places.size, 1])).reshape([places.size]);
}

export function crossEntropyTwin(logits: Tensor, { places, kept }: Omit<LossInputs, "student" | "teacher">): Tensor {
  return atLabels(logits.logSoftmax(-1), places).mul(kept).sum().div(kept.sum()).neg();
}

/** KL(a‖m) by row, from a's logits and the logarithm of m. */
export const klTwin = (a: Tensor, logM: Tensor): Tensor =>
  a.softmax(-1).mul(a.logSoftmax(-1).sub(logM)).sum({ dim: -1 });
const meanOfKept = (rows: Tensor, { kept }: LossInputs) => rows.mul(kept).sum().div(kept.sum());
export function forwardKlTwin(x: LossInputs, temperature: number): Tensor {
  return meanOfKept(klTwin(x.teacher.div(temperature), x.student.div(temperature).logSoftmax(-1)), x);
}
const reverseKlTwin = (x: LossInputs, temperature: number) =>
  meanOfKept(klTwin(x.student.div(temperature), x.teacher.div(temperature).logSoftmax(-1)), x);
function jsdTwin(x: LossInputs, temperature: number, beta: number): Tensor {
  const teacher = x.teacher.div(temperature), student = x.student.div(temperature);
  const logM = teacher.softmax(-1).mul(beta).add(student.softmax(-1).mul(1 - beta)).log();
  return meanOfKept(klTwin(teacher, logM).mul(beta).add(klTwin(student, logM).mul(1 - beta)), x);
}

function crossEntropyOptionsTwin(x: LossInputs): Tensor {
  const logits = x.student.div(2).div(15).tanh().mul(15), logProbabilities = logits.logSoftmax(-1);
  const own = gather(x.weight, 0, x.places).mul(x.kept);
  const atLabel = atLabels(logProbabilities, x.places).mul(own).mul(-0.9);
  const spread = logProbabilities.mul(x.weight).sum({ dim: -1 }).mul(x.kept).mul(-0.1 / logits.shape[1]);
  return atLabel.add(spread).sum().div(own.sum())
    .add(meanOfKept(logits.logSumExp({ dim: -1 }).square().mul(1e-4), x));
}

/** The losses that are timed. */
export const LOSSES: Loss[] = [
  {
    name: "crossEntropy",
    inputs: 1,
    flops: 7,
    plain: {
      fused: ({ student, labels }) => crossEntropy(student, labels),
      twin: (x) => crossEntropyTwin(x.student, x),
    },
    everyOption: {
      fused: ({ student, labels, weight }) =>
        crossEntropy(student, labels, { temperature: 2, softcap: 15, labelSmoothing: 0.1, zLoss: 1e-4, weight }),
      twin: crossEntropyOptionsTwin,
    },
  },
  {
    name: "forwardKl",
    inputs: 2,
    flops: 15,
    plain: { fused: ({ student, teacher }) => forwardKl(student, teacher), twin: (x) => forwardKlTwin(x, 1) },
    everyOption: {
      fused: ({ student, teacher, labels }) => forwardKl(student, teacher, { temperature: 2, labels }),
      twin: (x) => forwardKlTwin(x, 2),
    },
  },
  {
    name: "reverseKl",
    inputs: 2,
    flops: 15,
    plain: { fused: ({ student, teacher }) => reverseKl(student, teacher), twin: (x) => reverseKlTwin(x, 1) },
    everyOption: {
      fused: ({ student, teacher, labels }) => reverseKl(student, teacher, { temperature: 2, labels }),
      twin: (x) => reverseKlTwin(x, 2),
    },
  },
  {
    name: "jsd",
    inputs: 2,
    flops: 22,
    plain: { fused: ({ student, teacher }) => jsd(student, teacher), twin: (x) => jsdTwin(x, 1, 0.5) },
    everyOption: {
      fused: ({ student, teacher, labels }) =>
        jsd(student, teacher, { beta: 0.3, temperature: 2, normalize: true, labels }),
      twin: (x) => jsdTwin(x, 2, 0.3).div(0.21),
    },
  },
  {
    name: "distillation",
    inputs: 2,
    flops: 20,
    plain: {
      fused: ({ student, teacher, labels }) => distillation(student, teacher, labels),
      twin: (x) => crossEntropyTwin(x.student, x).mul(0.5).add(forwardKlTwin(x, 2).mul(2)),
    },
    everyOption: {
      fused: ({ student, teacher, labels }) =>
        distillation(student, teacher, labels, { alpha: 0.3, temperature: 3, dropIgnored: true }),
      twin: (x) => crossEntropyTwin(x.student, x).mul(0.3).add(forwardKlTwin(x, 3).mul(0.7 * 9)),
    },
  },
];
