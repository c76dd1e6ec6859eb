/**
 * What the benches and the report share: steps with their gradients, the losses with their composed twins, and checks
 * that come before any clock starts.
 *
 * @module
 */

import {
  crossEntropy,
  defineKernel,
  distillation,
  forwardKl,
  gather,
  jsd,
  matmul,
  ones,
  reverseKl,
  Scope,
  slice,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";

/** Something to be timed with its gradients: a function of leaves, and the gradient of its value where that is no scalar. */
export interface Work {
  forward: () => Tensor;
  leaves: Tensor[];
  upstream?: Tensor;
}

/** Forward and backward once. The gradients are dropped, so that the next step writes them instead of adding to them. */
export function runStep({ forward, leaves, upstream }: Work): void {
  using _tape = new Tape();
  forward().backward(upstream);
  dropGradients(leaves);
}

function dropGradients(leaves: Tensor[]): void {
  for (const leaf of leaves) {
    leaf.grad?.dispose();
    leaf.grad = null;
  }
}

/**
 * Waits until the GPU has done everything that was encoded. On Deno the read blocks until then and costs 0.1 ms; `mapAsync`
 * awaited by hand would sleep 10 ms more.
 */
export async function finish(): Promise<void> {
  using _scope = new Scope();
  await ones([1]).data();
}

/** The GPU's value and gradients of some work, kept. */
function results({ forward, leaves, upstream }: Work): { value: Tensor; gradients: Tensor[] } {
  using _tape = new Tape();
  const value = forward();
  value.backward(upstream);
  const gradients = leaves.map((leaf) => leaf.grad!);
  for (const leaf of leaves) leaf.grad = null;
  return { value: value.detach().keep(), gradients };
}

const widen = defineKernel({
  name: "widen",
  buffers: { x: "read f16", y: "write f32" },
  params: { size: "u32" },
  main: "if (thread < params.size) { y[thread] = f32(x[thread]); }",
});

/** The same numbers as f32. */
export function widened(x: Tensor): Tensor {
  if (x.dtype === "f32") return x;
  const y = zeros(x.shape);
  widen.run({ x: x.memory, y: y.memory }, { size: x.size }, Math.ceil(x.size / 256));
  return y;
}

/**
 * Throws unless two ways to the same value and gradients agree: no element may differ by more than 10⁻⁴ of the largest of its
 * tensor, as sums of up to 10⁵ terms in f32 may, and where the first way stores f16 by its rounding more. The twin is f32.
 */
export async function assertAgree(what: string, fused: Work, twin: Work): Promise<void> {
  const a = results(fused), b = results(twin);
  const pairs: [string, Tensor, Tensor][] = [
    ["value", a.value, b.value],
    ...a.gradients.map((g, i): [string, Tensor, Tensor] => [`gradient ${i}`, g, b.gradients[i]]),
  ];
  for (const [name, x, y] of pairs) {
    using _scope = new Scope();
    const difference = widened(x).sub(y).abs();
    // the sum is there for NaN, which a maximum may pass over
    const [off, sum, largest] = await Promise.all(
      [difference.max(), difference.sum(), y.abs().max()].map((t) => t.item()),
    );
    const allowed = 1e-4 * largest + (x.dtype === "f16" ? 2 ** -11 * largest + 2 ** -24 : 0);
    if (!(off <= allowed) || !Number.isFinite(sum)) {
      throw new Error(`${what}: the ${name} is off by ${off} (in all ${sum}) where ${allowed} is allowed`);
    }
  }
  for (const x of [a.value, b.value, ...a.gradients, ...b.gradients]) x.dispose();
}

/** Throws unless some elements of c = op(a)·op(b) are what float64 makes of their rows and columns. */
export async function assertProduct(
  what: string,
  a: Tensor,
  b: Tensor,
  o: { transposeA?: boolean; transposeB?: boolean },
): Promise<void> {
  using _scope = new Scope();
  const c = matmul(a, b, o), [m, n] = c.shape;
  const line = (x: Tensor, dim: number, i: number) =>
    slice(x, dim === 0 ? [[i, i + 1]] : [[0, x.shape[0]], [i, i + 1]]);
  for (const i of [0, m >> 1, m - 1]) {
    const [row, whole] = await Promise.all([line(a, o.transposeA ? 1 : 0, i).data(), line(c, 0, i).data()]);
    for (const j of [0, n >> 1, n - 1]) {
      const column = await line(b, o.transposeB ? 0 : 1, j).data();
      let sum = 0, magnitude = 0;
      for (let k = 0; k < row.length; k++) {
        sum += row[k] * column[k];
        magnitude += Math.abs(row[k] * column[k]);
      }
      // an f32 sum in blocks is good to some roundings of the magnitudes' sum, an f16 result is rounded once more
      const allowed = 2 ** -21 * magnitude + (c.dtype === "f16" ? 2 ** -11 * Math.abs(sum) : 0);
      if (!(Math.abs(whole[j] - sum) <= allowed)) {
        throw new Error(`${what}: element [${i}, ${j}] must be ${sum} ± ${allowed}, got ${whole[j]}`);
      }
    }
  }
}

/** What the losses are computed from. */
export interface LossInputs {
  /** Logits [rows, classes]; leaves that want a gradient are the caller's choice. */
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

/** Labels and class weights for logits of this shape; every eighth row is ignored where that is asked for. */
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
   * Floating-point operations an element of the plain loss with its gradient, as the formulas need them; an exponential or a
   * logarithm counts as one. For the roofline.
   */
  flops: number;
  plain: { fused: (x: LossInputs) => Tensor; twin: (x: LossInputs) => Tensor };
  everyOption: { fused: (x: LossInputs) => Tensor; twin: (x: LossInputs) => Tensor };
}

/** Each row's logit at its label. */
function atLabels(x: Tensor, places: Tensor): Tensor {
  return gather(x, -1, places.reshape([places.size, 1])).reshape([places.size]);
}

const crossEntropyTwin = (logits: Tensor, { places, kept }: LossInputs) =>
  atLabels(logits.logSoftmax(-1), places).mul(kept).sum().div(kept.sum()).neg();

/** KL(a‖m) by row, from a's logits and the logarithm of m. */
const klTwin = (a: Tensor, logM: Tensor) => a.softmax(-1).mul(a.logSoftmax(-1).sub(logM)).sum({ dim: -1 });
const meanOfKept = (rows: Tensor, { kept }: LossInputs) => rows.mul(kept).sum().div(kept.sum());
const forwardKlTwin = (x: LossInputs, temperature: number) =>
  meanOfKept(klTwin(x.teacher.div(temperature), x.student.div(temperature).logSoftmax(-1)), x);
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
        distillation(student, teacher, labels, {
          alpha: 0.3,
          temperature: 3,
          divergence: "jsd",
          beta: 0.3,
          normalize: true,
          dropIgnored: true,
        }),
      twin: (x) => crossEntropyTwin(x.student, x).mul(0.3).add(jsdTwin(x, 3, 0.3).mul(0.7 * 9 / 0.21)),
    },
  },
];
