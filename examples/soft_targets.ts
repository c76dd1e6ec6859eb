/**
 * Soft targets: what a teacher's wrong answers know, and what the temperature does.
 *
 * A teacher learns the digits. What to look at: one digit's probabilities, in which a higher temperature shows the wrong classes
 * that the teacher finds near; the matrix of those, averaged over the test digits of a class: 4 is near 9, 7 is near 9; the students that never see a 3 and
 * still recognise some when the teacher's soft targets mention it; and T²·gradient, which, as T grows, becomes that of matching logits, (student −
 * teacher)/V of centred logits, for forward and reverse KL and jsd over β(1 − β) alike.
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
import { type Findings, present, type Setting } from "./support/experiment.ts";
import { COLORS, INK, linePanel, type Panel } from "./support/report.ts";

const SIZES = { full: { train: 8000, epochs: 5 }, quick: { train: 3000, epochs: 3 } };
const HIDDEN = { teacher: 256, student: 64 };
const UNSEEN = 3; // the digit that the students do not see
const TEMPERATURE = 4; // of the students' targets, and of the matrix
const SHOWN = 9; // one that the teacher gives a little more than 95 %
const SHOWN_TEMPERATURES = [1, 2, 5, 10];
const TEMPERATURES = range(0, 3.1, 0.25).map((power) => 10 ** power); // of the gradients

type Loss = (student: Tensor, teacher: Tensor, labels: Tensor) => Tensor;

const STUDENTS: Record<string, Loss> = {
  "labels": (student, _, labels) => crossEntropy(student, labels),
  "soft targets, T = 1": (student, teacher) => forwardKl(student, teacher),
  [`soft targets, T = ${TEMPERATURE}`]: (student, teacher, labels) =>
    distillation(student, teacher, labels, { alpha: 0, temperature: TEMPERATURE }), // with its T²
};

const DIVERGENCES: Record<string, (student: Tensor, teacher: Tensor, temperature: number) => Tensor> = {
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

/** What is found: `near[a][b]` is the teacher's mean probability of b for digits that show a. */
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

  // gradients, of a student that has learnt nothing yet
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

function describe({ example, near, students, gradients }: Found): Findings {
  const percent = (share: number) => (100 * share).toFixed(1);
  const [red, blue, orange, green] = COLORS.slice(2);
  const classes = { type: "ordinal" as const, title: null, axis: { labelAngle: 0 } };
  const side = Math.sqrt(PIXELS);
  const nearest = near.map((row, digit) =>
    range(CLASSES).filter((other) => other !== digit).sort((a, b) => row[b] - row[a]).slice(0, 3)
  );
  const size = { width: 130, height: 130 };
  return {
    title: "A teacher's wrong answers teach: students that never saw a 3 know it from soft targets",
    subtitle:
      `Above: one digit and the teacher's probabilities. Below, left: its mean probabilities at T = ${TEMPERATURE}.`,
    tables: [[
      ["digit shown", `nearest wrong classes at T = ${TEMPERATURE}, %`],
      ...nearest.map((others, digit) => [
        `${digit}`,
        others.map((other) => `${other}: ${percent(near[digit][other]).padStart(4)}`).join("  "),
      ]),
    ], [
      [`student that sees no ${UNSEEN}`, "test accuracy, %", `of the ${UNSEEN}s, %`],
      ...students.map(({ method, accuracy, unseen }) => [method, percent(accuracy), percent(unseen)]),
    ], [
      ["T²·gradient, relative distance to (s − t)/V", ...[1, 10, 100, 1000].map((t) => `T = ${t}`)],
      ...Object.keys(DIVERGENCES).map((name) => [
        name,
        ...gradients.filter((row) => row.name === name && [1, 10, 100, 1000].includes(row.temperature))
          .map(({ error }) => error.toExponential(1)),
      ]),
    ]],
    picture: {
      resolve: { scale: { color: "independent" } },
      vconcat: [{
        spacing: 30,
        hconcat: [
          {
            title: `a ${example.label}`,
            ...size,
            data: { values: inked(example.pixels).map(([i, ink]) => ({ x: i % side, y: Math.floor(i / side), ink })) },
            mark: "rect",
            encoding: {
              x: { field: "x", type: "ordinal", axis: null, scale: { domain: range(side), padding: 0 } },
              y: { field: "y", type: "ordinal", axis: null, scale: { domain: range(side), padding: 0 } },
              color: { field: "ink", type: "quantitative", scale: { range: ["#ffffff", INK] }, legend: null },
            },
          },
          ...SHOWN_TEMPERATURES.map((temperature, i): Panel => ({
            title: `T = ${temperature}`,
            ...size,
            data: { values: example.byTemperature[i].map((p, digit) => ({ digit, p })) },
            mark: { type: "bar", color: blue },
            encoding: {
              x: { field: "digit", ...classes },
              y: { field: "p", type: "quantitative", title: null, scale: { domain: [0, 1] }, axis: { tickCount: 3 } },
            },
          })),
        ],
      }, {
        spacing: 30,
        resolve: { scale: { color: "independent" } },
        hconcat: [
          {
            title: "shown (down), thought of (across)",
            width: 230,
            height: 230,
            data: {
              values: near.flatMap((row, shown) =>
                row.flatMap((p, other) => shown === other ? [] : [{ shown, other, p: percent(p) }])
              ),
            },
            encoding: { x: { field: "other", ...classes }, y: { field: "shown", ...classes } },
            layer: [{
              mark: "rect",
              encoding: {
                color: { field: "p", type: "quantitative", scale: { range: ["#ffffff", red] }, legend: null },
              },
            }, { mark: { type: "text", fontSize: 9, color: INK }, encoding: { text: { field: "p" } } }],
          },
          {
            title: `test ${UNSEEN}s recognised by students that saw none, %`,
            width: 200,
            height: 230,
            data: { values: students.map(({ method, unseen }) => ({ method, unseen: 100 * unseen })) },
            encoding: {
              y: { field: "method", type: "nominal", sort: null, title: null },
              x: { field: "unseen", type: "quantitative", title: null, axis: { tickCount: 4 } },
            },
            layer: [{ mark: { type: "bar", height: { band: 0.6 }, color: green } }, {
              mark: { type: "text", align: "left", dx: 4, color: INK },
              encoding: { text: { field: "unseen", format: ".0f" } },
            }],
          },
          linePanel(
            "T²·gradient against its limit",
            { "forward KL": blue, "reverse KL": orange, "jsd, normalised": green },
            gradients.map(({ name, temperature, error }) => ({ name, x: temperature, y: error })),
            { x: { title: "T", log: true }, y: { title: "relative distance", log: true }, width: 230, height: 230 },
          ),
        ],
      }],
    },
  };
}

/** The pixels that are not blank, and how dark they are. */
const inked = (pixels: Float32Array) => [...pixels.entries()].filter(([, ink]) => ink > 0.05);

if (import.meta.main) {
  await present(
    "soft_targets",
    "Shows what a teacher's soft targets hold, over the temperature.",
    softTargets,
    describe,
  );
}
