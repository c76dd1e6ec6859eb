/**
 * Distilling handwritten digits.
 *
 * A wide teacher learns 8,000 digits with all their labels. Small students then learn from the same 8,000 digits, but see the
 * labels of only 200 of them: this is the case for distillation, when labels are expensive and a trained teacher is available.
 * One student learns from those labels alone. The others start from the same weights, see the same batches and take the same
 * number of steps; they differ in one line, the loss, which uses the teacher's logits for every digit.
 *
 * What to look at: `LOSSES`, where the students differ; `train`, a loop in which no step waits for the GPU; and the column
 * "gain" of the table at the end, which pairs each student with the label-only student of the same seed.
 *
 *     deno task distill --help
 *
 * @module
 */

import {
  crossEntropy,
  dispose,
  distillation,
  forwardKl,
  init,
  jsd,
  loadCheckpoint,
  manualSeed,
  maxPool2d,
  Meter,
  nn,
  noGrad,
  optim,
  relu,
  reverseKl,
  saveCheckpoint,
  Scope,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { mean, range, sum } from "d3-array";
import {
  failOption,
  makeFolder,
  type Progress,
  quote,
  readOptions,
  removeCheckpoint,
  showProgress,
  type Stop,
  watchStop,
} from "./support/cli.ts";
import { readLogits } from "./support/classifier.ts";
import { CLASSES, type Digits, drawPerClass, loadDigits, PIXELS, splitDigits, takeRows } from "./support/digits.ts";
import { drawReport, formatTable, type Run, summarize } from "./support/report.ts";

const SEED = 1; // of weights, batches, dropout and the choice of labels
const SEEDS = 5; // students of each kind, one a seed
const EPOCHS = 5;
const QUICK = { seeds: 2, epochs: 1 };

const TRAIN_DIGITS = 8000; // of 10,000; the others are the test
const SPLIT_SEED = 0; // the same test digits for every --seed
const LABELS = 20 * CLASSES; // that a student sees, the same number of each digit
const LABEL_REPEATS = 20; // how often a labelled digit comes up in an epoch; a third of each batch then has labels
const STUDENT_ROWS = TRAIN_DIGITS + (LABEL_REPEATS - 1) * LABELS; // an epoch
const UNSEEN = -100; // the label of a digit whose label is hidden; the losses ignore it

const BATCH_SIZE = 128;
const LEARNING_RATE = 5e-3; // its peak, for teacher and students
const TEACHER_HIDDEN = 256;
const TEACHER_DROPOUT = 0.3;
const STUDENT_HIDDEN = 32;
const STUDENT_CHANNELS = 8; // of the convolutional student
const READS = 10; // how often in a run the losses are read and the model is tested

const TEMPERATURE = 2;
const ALPHA = 0.5; // the labels' share in `distillation`

/** Logits [rows, classes] of both, and labels [rows], most of them `UNSEEN`. */
type StudentLoss = (student: Tensor, teacher: Tensor, labels: Tensor) => Tensor;

const BASELINE = "labels alone";
const LOSSES: Record<string, StudentLoss> = {
  [BASELINE]: (student, _, labels) => crossEntropy(student, labels, { ignoreIndex: UNSEEN }),
  "distillation": (student, teacher, labels) =>
    distillation(student, teacher, labels, { alpha: ALPHA, temperature: TEMPERATURE, ignoreIndex: UNSEEN }),
  "forward KL": (student, teacher) => forwardKl(student, teacher, { temperature: TEMPERATURE }),
  "reverse KL": (student, teacher) => reverseKl(student, teacher, { temperature: TEMPERATURE }),
  "jsd, β = 0.1": (student, teacher) => jsd(student, teacher, { beta: 0.1, temperature: TEMPERATURE }),
  "jsd, β = 0.9": (student, teacher) => jsd(student, teacher, { beta: 0.9, temperature: TEMPERATURE }),
};

function makeTeacher(): nn.Sequential {
  return new nn.Sequential(
    new nn.Linear(PIXELS, TEACHER_HIDDEN),
    relu,
    new nn.Dropout(TEACHER_DROPOUT),
    new nn.Linear(TEACHER_HIDDEN, TEACHER_HIDDEN),
    relu,
    new nn.Dropout(TEACHER_DROPOUT),
    new nn.Linear(TEACHER_HIDDEN, CLASSES),
  );
}

type StudentKind = "mlp" | "conv";

function makeStudent(kind: StudentKind): nn.Sequential {
  if (kind === "mlp") {
    return new nn.Sequential(new nn.Linear(PIXELS, STUDENT_HIDDEN), relu, new nn.Linear(STUDENT_HIDDEN, CLASSES));
  }
  const side = Math.sqrt(PIXELS);
  return new nn.Sequential(
    (images) => images.reshape([-1, 1, side, side]),
    new nn.Conv2d(1, STUDENT_CHANNELS, 5, { stride: 2, padding: 2 }), // [rows, channels, 14, 14]
    relu,
    (x) => maxPool2d(x, { kernel: 2 }), // [rows, channels, 7, 7]
    (x) => x.reshape([-1, STUDENT_CHANNELS * 49]),
    new nn.Linear(STUDENT_CHANNELS * 49, CLASSES),
  );
}

/** Columns with one row per digit. `nn.batches` cuts them into tensors and uploads these before they are used. */
type Columns = Record<string, nn.Column>;
type Batch = Record<string, Tensor>;

/** The teacher's training data: every digit with its label. */
function teacherColumns({ images, labels }: Digits): Columns {
  return { images: { data: images, shape: [labels.length, PIXELS] }, labels: { data: labels, shape: [labels.length] } };
}

/**
 * The training data for the students of one seed: every digit with the teacher's logits, and the labels of a few. The images, and
 * therefore the logits, are the same in every epoch: the logits are computed once, and batched like any other column.
 */
function studentColumns({ images, labels }: Digits, teacherLogits: Float32Array, seed: number): Columns {
  const labelled = drawPerClass(labels, LABELS / CLASSES, seed);
  const seen = new Int32Array(labels.length).fill(UNSEEN);
  for (const row of labelled) seen[row] = labels[row];
  const rows = [...labels.keys(), ...range(LABEL_REPEATS - 1).flatMap(() => labelled)];
  return {
    images: { data: takeRows(images, PIXELS, rows), shape: [rows.length, PIXELS] },
    teacher: { data: takeRows(teacherLogits, CLASSES, rows), shape: [rows.length, CLASSES] },
    labels: { data: takeRows(seen, 1, rows), shape: [rows.length] },
  };
}

/** How one model is trained. */
interface Training {
  method: string;
  seed: number;
  epochs: number;
  columns: Columns;
  lossOf: (logits: Tensor, batch: Batch) => Tensor;
  test: Batch;
  progress: Progress;
  stop: Stop;
}

/**
 * Trains with AdamW and a cosine schedule; from time to time it reads the losses and tests the model. Null if Ctrl-C has
 * interrupted it.
 */
async function train(model: nn.Sequential, training: Training): Promise<Run | null> {
  const { method, seed, epochs, columns, lossOf, test, progress, stop } = training;
  const steps = stepsOf(columns.labels.shape[0], epochs);
  const optimizer = new optim.AdamW(model.parameters(), { lr: LEARNING_RATE });
  const schedule = optim.cosine({ steps, warmup: Math.round(steps / 20) });
  const meter = new Meter();
  const curve: Run["curve"] = [];
  const started = performance.now();
  let step = 0;
  for (const epoch of range(epochs)) {
    const options = { batchSize: BATCH_SIZE, shuffle: true, seed: 1000 * seed + epoch, dropLast: true };
    for (const batch of nn.batches(columns, options)) {
      {
        using _tape = new Tape(); // records the step, and frees at the end of the block what the step has made
        const loss = lossOf(model.forward(batch.images), batch);
        loss.backward();
        optimizer.lr = LEARNING_RATE * schedule(step);
        optimizer.step();
        optimizer.zeroGrad();
        meter.add("loss", loss); // copied on the GPU: nothing waits
      }
      if (await stop.asked()) return null;
      step++;
      if (step % Math.ceil(steps / READS) !== 0 && step !== steps) continue;
      evaluate(model, test, meter);
      const { loss, accuracy, negativeLogLikelihood } = await meter.read(); // the one wait in many steps
      curve.push({
        step,
        loss: mean(loss)!,
        accuracy: accuracy[0],
        negativeLogLikelihood: negativeLogLikelihood[0],
      });
      progress.advance(loss.length, `${method}, seed ${seed}`);
    }
  }
  const stepsPerSecond = 1000 * steps / (performance.now() - started);
  meter.dispose();
  optimizer.dispose();
  const parameters = model.parameters().reduce((sum, { size }) => sum + size, 0);
  return { method, seed, parameters, stepsPerSecond, curve };
}

/** Full batches only. */
function stepsOf(rows: number, epochs: number): number {
  return epochs * Math.floor(rows / BATCH_SIZE);
}

/** Meters the accuracy and the negative log-likelihood of the test digits. */
function evaluate(model: nn.Sequential, { images, labels }: Batch, meter: Meter): void {
  using _scope = new Scope(); // frees what this function makes
  model.eval(); // no dropout
  const { loss, accuracy } = noGrad(() => crossEntropy(model.forward(images), labels, { returnAccuracy: true }));
  meter.add("negativeLogLikelihood", loss);
  meter.add("accuracy", accuracy);
  model.train();
}

interface Setting {
  student: StudentKind;
  seed: number;
  seeds: number;
  epochs: number;
}

/** What a checkpoint holds besides the teacher: the finished runs. Each run has its own seed, so the others do not depend on when the program was stopped. */
interface Saved {
  setting: Setting;
  runs: Run[];
}

/** The teacher's run, then the students': every loss with the first seed, every loss with the next, and so on. */
async function trainAll(setting: Setting, checkpoint: string, resume: boolean): Promise<Run[]> {
  const { student: kind, seed, seeds, epochs } = setting;
  const digits = splitDigits(loadDigits(), TRAIN_DIGITS, SPLIT_SEED);
  const test = {
    images: tensor(digits.test.images, [digits.test.labels.length, PIXELS]),
    labels: tensor(digits.test.labels),
  };
  const teacher = makeTeacher();
  const runs: Run[] = resume ? await loadRuns(checkpoint, teacher, setting) : [];
  const students = seeds * Object.keys(LOSSES).length;
  const progress = showProgress(
    stepsOf(TRAIN_DIGITS, epochs) + students * stepsOf(STUDENT_ROWS, epochs),
    sum(runs, ({ curve }) => curve.at(-1)!.step),
  );
  const stop = watchStop();
  const common = { epochs, test, progress, stop };

  const finish = async (model: nn.Sequential, training: Training) => {
    const run = await train(model, training);
    if (run) return runs.push(run);
    progress.stop();
    const saved: Saved = { setting, runs };
    await saveCheckpoint(checkpoint, { model: teacher, extra: saved }, { overwrite: true }); // also one of another run
    const again = [...Deno.args.filter((argument) => argument !== "--resume"), "--resume"];
    console.log(`Stopped. Go on with: ./run distill ${quote(again)}`);
    Deno.exit(130); // as a shell calls a program that Ctrl-C ended
  };
  if (runs.length === 0) {
    manualSeed(seed);
    const fresh = makeTeacher();
    teacher.loadStateDict(fresh.stateDict());
    fresh.dispose();
    await finish(teacher, {
      ...common,
      method: "teacher",
      seed,
      columns: teacherColumns(digits.train),
      lossOf: (logits, batch) => crossEntropy(logits, batch.labels),
    });
  }
  teacher.eval(); // no dropout
  const teacherLogits = await readLogits(teacher, digits.train);

  for (const studentSeed of range(seed, seed + seeds)) {
    const columns = studentColumns(digits.train, teacherLogits, studentSeed);
    for (const [method, loss] of Object.entries(LOSSES)) {
      if (runs.some((run) => run.method === method && run.seed === studentSeed)) continue;
      manualSeed(studentSeed); // the same first weights for every loss
      const student = makeStudent(kind);
      await finish(student, {
        ...common,
        method,
        seed: studentSeed,
        columns,
        lossOf: (logits, batch) => loss(logits, batch.teacher, batch.labels),
      });
      student.dispose();
    }
  }
  teacher.dispose();
  progress.stop();
  stop.dispose();
  return runs;
}

/** Loads the teacher from a checkpoint, and returns its finished runs. */
async function loadRuns(checkpoint: string, teacher: nn.Sequential, setting: Setting): Promise<Run[]> {
  const wanted = "the checkpoint of a run with the same options";
  const saved = await loadCheckpoint(checkpoint, { model: teacher }).catch(({ message }) =>
    failOption("--resume", wanted, message)
  );
  const { setting: before, runs } = saved.extra as Saved;
  if (JSON.stringify(before) !== JSON.stringify(setting)) failOption("--resume", wanted, JSON.stringify(before));
  return runs;
}

const HELP = `Distils a teacher of handwritten digits into small students, with one loss after the other.

  --student S  mlp or conv (mlp)
  --seed N     first seed of weights, batches and labels (${SEED})
  --seeds N    students of each kind, one a seed (${SEEDS}; quick ${QUICK.seeds})
  --epochs N   passes over the digits (${EPOCHS}; quick ${QUICK.epochs})
  --quick      fewer seeds and epochs: within a minute on two CPU cores (conv takes longer)
  --out DIR    folder for distill_digits.svg and distill_digits.json (out)
  --resume     goes on where Ctrl-C has stopped a run with these options
  --help       this text`;

async function main(): Promise<void> {
  const options = readOptions(HELP);
  const quick = options.given("quick");
  const setting: Setting = {
    student: options.choice("student", "mlp", ["mlp", "conv"]),
    seed: options.count("seed", SEED, 0),
    seeds: options.count("seeds", quick ? QUICK.seeds : SEEDS, 1),
    epochs: options.count("epochs", quick ? QUICK.epochs : EPOCHS, 1),
  };
  const out = options.text("out", "out");
  await makeFolder(out);

  const checkpoint = `${out}/distill_digits.safetensors`;

  const { adapter } = await init();
  const [teacher, ...students] = await trainAll(setting, checkpoint, options.given("resume"));
  await dispose();

  const rows = [...summarize([teacher]), ...summarize(students, BASELINE)];
  const story = `Students see the labels of ${LABELS} of ${TRAIN_DIGITS} digits, the teacher sees all. ` +
    `Steps a student: ${students[0].curve.at(-1)!.step}. Seeds: ${setting.seeds}.`;
  console.log(formatTable(rows));
  console.log(`\n${story}`);
  console.log("± is the standard deviation over seeds; a gain is paired by seed, ± the standard error of its mean.");

  const runs = [teacher, ...students];
  const json = JSON.stringify({ setting, adapter, story, rows, runs }, null, 2);
  await Deno.writeTextFile(`${out}/distill_digits.json`, json);
  await Deno.writeTextFile(`${out}/distill_digits.svg`, await drawReport("Distilling digits", story, runs, rows));
  await removeCheckpoint(checkpoint, setting);
  console.log(`\n${out}/distill_digits.svg and .json, computed on ${adapter}`);
}

await main();
