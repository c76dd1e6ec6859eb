/**
 * Soft targets: what a teacher's wrong answers reveal, and what the temperature does.
 *
 * A teacher learns the digits. What to look at: one digit's probabilities, in which a higher temperature shows the wrong classes
 * that the teacher finds similar; the matrix of these, averaged over the test digits of each class: 4 is near 9, 7 is near 9; the
 * students that never see a 3 and still recognise some if the teacher's soft targets mention it; and T²·gradient, which, as T
 * grows, tends to the gradient of matching logits, (student − teacher)/V of centred logits, for forward KL, reverse KL and jsd
 * divided by β(1 − β).
 *
 *     deno task examples soft_targets --help
 *
 * @module
 */

import {
  crossEntropy,
  distillation,
  forwardKl,
  jsd,
  manualSeed,
  reverseKl,
  Scope,
  softmax,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { least, mean, range } from "d3-array";
import { accuracyOf, makeClassifier, readLogits, trainClassifier } from "./support/classifier.ts";
import { CLASSES, type Digits, loadDigits, PIXELS, splitDigits, takeRows } from "./support/digits.ts";
import { present, type Setting } from "./support/experiment.ts";
import { describe } from "./pictures/soft_targets.ts";

const SIZES = { full: { train: 8000, epochs: 5 }, quick: { train: 3000, epochs: 3 } };
const HIDDEN = { teacher: 256, student: 64 };
export const UNSEEN = 3; // the digit that the students do not see
export const TEMPERATURE = 4; // of the students' targets, and of the matrix
const SHOWN = 9; // a digit 9 to which the teacher gives a little more than 95 %
export const SHOWN_TEMPERATURES: number[] = [1, 2, 5, 10];
const TEMPERATURES = range(0, 3.1, 0.25).map((power) => 10 ** power); // of the gradients

type Loss = (student: Tensor, teacher: Tensor, labels: Tensor) => Tensor;

const STUDENTS: Record<string, Loss> = {
  "labels": (student, _, labels) => crossEntropy(student, labels),
  "soft targets, T = 1": (student, teacher) => forwardKl(student, teacher),
  [`soft targets, T = ${TEMPERATURE}`]: (student, teacher, labels) =>
    distillation(student, teacher, labels, { alpha: 0, temperature: TEMPERATURE }), // with its T²
};

export const DIVERGENCES: Record<string, (student: Tensor, teacher: Tensor, temperature: number) => Tensor> = {
  "forward KL": (student, teacher, temperature) => forwardKl(student, teacher, { temperature, reduction: "sum" }),
  "reverse KL": (student, teacher, temperature) => reverseKl(student, teacher, { temperature, reduction: "sum" }),
  "jsd, normalised": (student, teacher, temperature) =>
    jsd(student, teacher, { temperature, reduction: "sum", normalize: true }),
};

async function probabilities(logits: Float32Array, temperature: number): Promise<Float32Array> {
  using _scope = new Scope();
  return await softmax(tensor(logits, [logits.length / CLASSES, CLASSES]).div(temperature), -1).data() as Float32Array;
}

/** ‖T²·∂loss/∂student − limit‖ / ‖limit‖ with the limit (student − teacher)/V of logits that are centred by row. */
async function distanceToLimit(name: string, temperature: number, rows: LogitRows): Promise<number> {
  using _scope = new Scope();
  const shape = [rows.student.length / CLASSES, CLASSES];
  const student = tensor(rows.student, shape, { requiresGrad: true }), teacher = tensor(rows.teacher, shape);
  using _tape = new Tape();
  DIVERGENCES[name](student, teacher, temperature).backward();
  const centred = (x: Tensor) => x.sub(x.mean({ dim: -1, keepDim: true }));
  const limit = centred(student.detach()).sub(centred(teacher)).div(CLASSES);
  const norm = (x: Tensor) => x.square().sum().sqrt();
  return await norm(student.grad!.mul(temperature ** 2).sub(limit)).div(norm(limit)).item();
}

/** The results: `near[a][b]` is the teacher's mean probability of b for digits that show a. */
export interface Found {
  example: { pixels: Float32Array; label: number; byTemperature: number[][] };
  near: number[][];
  students: { method: string; accuracy: number; unseen: number }[];
  gradients: { name: string; temperature: number; error: number }[];
  logits: LogitRows;
}

/** Logits of two models for the same rows. */
export interface LogitRows {
  student: Float32Array;
  teacher: Float32Array;
}

export async function softTargets({ seed, quick }: Setting): Promise<Found> {
  const size = quick ? SIZES.quick : SIZES.full;
  manualSeed(seed);
  const { train: digits, test } = splitDigits(loadDigits(), size.train, 0);
  const teacher = makeClassifier(HIDDEN.teacher);
  trainClassifier(teacher, digits, size.epochs, (logits, { labels }) => crossEntropy(logits, labels));

  // dark knowledge
  const teacherLogits = await readLogits(teacher, test);
  const soft = await probabilities(teacherLogits, TEMPERATURE);
  const near = range(CLASSES).map((digit) => {
    const rows = [...test.labels.keys()].filter((row) => test.labels[row] === digit);
    return range(CLASSES).map((other) => mean(rows, (row) => soft[row * CLASSES + other])!);
  });
  const plain = await probabilities(teacherLogits, 1);
  const right = (row: number) => plain[row * CLASSES + SHOWN];
  const row = least([...test.labels.keys()].filter((row) => test.labels[row] === SHOWN && right(row) > 0.95), right)!;
  const byTemperature = await Promise.all(
    SHOWN_TEMPERATURES.map(async (t) => [...await probabilities(takeRows(teacherLogits, CLASSES, [row]), t)]),
  );
  const example = { pixels: takeRows(test.images, PIXELS, [row]), label: test.labels[row], byTemperature };

  // students that never see one of the digits
  const seen = [...digits.labels.keys()].filter((row) => digits.labels[row] !== UNSEEN);
  const transfer = { images: takeRows(digits.images, PIXELS, seen), labels: takeRows(digits.labels, 1, seen) };
  const column = { data: await readLogits(teacher, transfer), shape: [seen.length, CLASSES] };
  const students = [];
  for (const [method, loss] of Object.entries(STUDENTS)) {
    manualSeed(seed); // the same first weights
    const student = makeClassifier(HIDDEN.student);
    const lossOf = (logits: Tensor, { teacher, labels }: Record<string, Tensor>) => loss(logits, teacher, labels);
    trainClassifier(student, transfer, size.epochs, lossOf, { teacher: column });
    const logits = await readLogits(student, test);
    students.push({
      method,
      accuracy: accuracyOf(logits, test.labels),
      unseen: accuracyOf(logits, test.labels, UNSEEN),
    });
    student.dispose();
  }

  // gradients of a student that has learned nothing yet
  const fresh = makeClassifier(HIDDEN.student);
  const few: Digits = { images: test.images.subarray(0, 64 * PIXELS), labels: test.labels.subarray(0, 64) };
  const logits = { student: await readLogits(fresh, few), teacher: await readLogits(teacher, few) };
  const gradients = [];
  for (const name of Object.keys(DIVERGENCES)) {
    for (const temperature of TEMPERATURES) {
      gradients.push({ name, temperature, error: await distanceToLimit(name, temperature, logits) });
    }
  }
  fresh.dispose();
  teacher.dispose();
  return { example, near, students, gradients, logits };
}

if (import.meta.main) {
  await present(
    "soft_targets",
    "Shows what a teacher's soft targets hold, over the temperature.",
    softTargets,
    (found) => describe(found, { UNSEEN, TEMPERATURE, SHOWN_TEMPERATURES, DIVERGENCES }),
  );
}
