/**
 * Distilling a writer.
 *
 * A GPT learns Moby Dick character by character. Smaller ones, the students, then see the same batches for the same number of
 * steps from the same first weights; they differ in one line, the loss. One learns from the text alone, the others from the
 * teacher's probabilities for every next character. Forward KL (β = 0) makes a student cover everything that the teacher might
 * write, reverse KL (β = 1) makes it keep to what the teacher would most likely write; the generalised Jensen–Shannon divergence
 * lies between them.
 *
 * What to look at: `STUDENTS`, where they differ; `train`, a loop in which no step waits for the GPU, and which can stop after any
 * step and continue in another process, bit for bit; `writeBatch`, with which (`--on-policy`) the student writes the text that the
 * teacher then evaluates; and the columns "entropy" and "distinct" of the final table: from `--size medium` on they fall as β
 * grows.
 *
 *     deno task distill-text --help
 *
 * The teacher can also be a file of logits: `support/teacher_logits.ts` describes its format.
 *
 * @module
 */

import {
  argmax,
  crossEntropy,
  dispose,
  entropy,
  forwardKl,
  init,
  jsd,
  linearDistillation,
  loadCheckpoint,
  manualSeed,
  Meter,
  nn,
  noGrad,
  optim,
  profile,
  reverseKl,
  saveCheckpoint,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { mean, range, sum } from "d3-array";
import {
  failOption,
  makeFolder,
  type Options,
  type Progress,
  quote,
  readOptions,
  removeCheckpoint,
  showProgress,
  type Stop,
  watchStop,
} from "./support/cli.ts";
import { type Batch, type Corpus, hashOf, loadCorpus, makeBatch } from "./support/corpus.ts";
import { decode, distinctShare, drawStarts, generator, ngramBits, RARE, spreadStarts } from "./support/text.ts";
import { drawTextReport, formatTextTable, type TextRun, type Yardsticks } from "./support/text_report.ts";

const SEED = 1; // of weights, batches and samples

/** The models of a size, and how long they train; "quick" is for tests. */
interface Size {
  context: number;
  batchSize: number;
  teacher: { layers: number; width: number; heads: number };
  student: { layers: number; width: number; heads: number };
  steps: number;
  heldOutBatches: number;
  /** Characters of each text that a model writes at the end. */
  sampleLength: number;
}
const SIZES: Record<"quick" | "small" | "medium" | "large", Size> = {
  quick: {
    context: 32,
    batchSize: 16,
    teacher: { layers: 1, width: 32, heads: 2 },
    student: { layers: 1, width: 16, heads: 2 },
    steps: 100,
    heldOutBatches: 4,
    sampleLength: 80,
  },
  small: {
    context: 32,
    batchSize: 16,
    teacher: { layers: 2, width: 64, heads: 4 },
    student: { layers: 1, width: 32, heads: 2 },
    steps: 600,
    heldOutBatches: 16,
    sampleLength: 240,
  },
  medium: {
    context: 128,
    batchSize: 64,
    teacher: { layers: 4, width: 192, heads: 6 },
    student: { layers: 2, width: 96, heads: 4 },
    steps: 1500,
    heldOutBatches: 8,
    sampleLength: 240,
  },
  large: {
    context: 256,
    batchSize: 64,
    teacher: { layers: 6, width: 384, heads: 6 },
    student: { layers: 3, width: 192, heads: 6 },
    steps: 5000,
    heldOutBatches: 8,
    sampleLength: 240,
  },
};

const LEARNING_RATE = 4e-3; // its peak at width 64; it falls with the root of the width
const WEIGHT_DECAY = 0.05; // of matrices
const MAX_NORM = 1; // of a step's gradient
const READS = 10; // how often in a run the losses are read and the model is evaluated

const SAMPLES = 16; // texts that each model writes at the end
const SHOWN = 200; // characters of the one that is printed
const PROMPT = 8; // characters of the text that the student continues on policy
const PROFILED = 3; // steps

/** The teacher is a GPT, or null if it is a file. */
type Teacher = nn.Gpt | null;
type StudentLoss = (student: nn.Gpt, batch: Batch, teacher: Teacher) => Tensor;

interface Student {
  method: string;
  loss: StudentLoss;
  beta?: number;
  /** Whether it is one of the few that are trained by default. */
  few?: boolean;
  /** Whether it needs the teacher's hidden states. */
  needsHidden?: boolean;
}

const BASELINE = "labels alone";
const STUDENTS: Student[] = [
  { method: BASELINE, few: true, loss: learnFromText },
  { method: "forward KL", beta: 0, few: true, loss: learnFromTeacher(forwardKl) },
  ...[0.1, 0.3, 0.5, 0.7, 0.9].map((beta) => ({
    method: `jsd, β = ${beta}`,
    beta,
    few: beta === 0.5,
    // normalized, so that with β only the direction of the gradient changes, not its size
    loss: learnFromTeacher((student, teacher, options) => jsd(student, teacher, { beta, normalize: true, ...options })),
  })),
  { method: "reverse KL", beta: 1, loss: learnFromTeacher(reverseKl) },
  {
    method: "forward KL, fused head", // the same loss without the logits: hidden states and heads go in
    needsHidden: true,
    loss: (student, { tokens, targets }, teacher) =>
      linearDistillation(
        student.hiddenStates(tokens),
        student.headWeight,
        noGrad(() => teacher!.hiddenStates(tokens)),
        teacher!.headWeight.detach(),
        { labels: targets },
      ),
  },
];

function learnFromText(model: nn.Gpt, { tokens, targets }: Batch): Tensor {
  return crossEntropy(model.forward(tokens), targets);
}

/** The labels only say which rows count: on policy, those of the prompt do not. */
function learnFromTeacher(divergence: (student: Tensor, teacher: Tensor, options: { labels: Tensor }) => Tensor) {
  return (student: nn.Gpt, batch: Batch, teacher: Teacher) =>
    divergence(student.forward(batch.tokens), teacherLogits(teacher, batch), { labels: batch.targets });
}

function teacherLogits(teacher: Teacher, batch: Batch): Tensor {
  return batch.teacher ?? noGrad(() => teacher!.forward(batch.tokens));
}

/** The options that determine the results. */
interface Setting {
  size: keyof typeof SIZES;
  students: "few" | "all";
  steps: number;
  seed: number;
  text: string;
  teacherLogits: string;
  onPolicy: number;
  sampling: { temperature: number; topK?: number; topP?: number };
}

/** A batch that the student writes itself, from prompts of the text. Only what the student wrote counts in the loss. */
async function writeBatch(student: nn.Gpt, corpus: Corpus, starts: number[], seed: number): Promise<() => Batch> {
  const { context } = student.options;
  const prompts = starts.map((start) => corpus.train.slice(start, start + PROMPT));
  const texts = await nn.generate(student, prompts, { length: context - PROMPT, seed }); // one read a character: it waits
  const labels = Int32Array.from({ length: starts.length * context }, (_, i) => i % context < PROMPT - 1 ? -100 : 0);
  const shape = [starts.length, context];
  return () => ({
    tokens: tensor(Int32Array.from(texts.flatMap((text) => [...text])), shape),
    targets: tensor(labels, shape),
  });
}

/** Both models, for checkpoints. */
class Models extends nn.Module {
  constructor(public teacher: Teacher, public student: nn.Gpt) {
    super();
  }

  override forward(tokens: Tensor): Tensor {
    return this.student.forward(tokens);
  }
}

function makeGpt(which: "teacher" | "student", { size, seed }: Setting, { vocabulary }: Corpus): nn.Gpt {
  manualSeed(seed); // the same first weights for every student
  return new nn.Gpt({ vocabulary: vocabulary.length, context: SIZES[size].context, ...SIZES[size][which] });
}

function makeOptimizer(model: nn.Gpt): optim.AdamW {
  const parameters = model.parameters();
  return new optim.AdamW([
    { params: parameters.filter(({ shape }) => shape.length > 1), weightDecay: WEIGHT_DECAY },
    { params: parameters.filter(({ shape }) => shape.length === 1), weightDecay: 0 },
  ], { lr: LEARNING_RATE });
}

/** The state of an unfinished run, besides the models, the optimizer and the step. */
interface Underway {
  method: string;
  curve: TextRun["curve"];
  /** The losses since the curve's last point. */
  losses: number[];
  seconds: number;
  bytes: number;
}

/** What a checkpoint holds besides the models, the optimizer and the step. */
interface Saved {
  setting: Setting;
  corpusHash: string;
  runs: TextRun[];
  underway: Underway;
}

/** Thrown after a checkpoint was saved. */
class Stopped extends Error {}

/** What all runs of a comparison share. */
interface Comparison {
  setting: Setting;
  corpus: Corpus;
  models: Models;
  heldOut: Batch[];
  runs: TextRun[];
  progress: Progress;
  stop: Stop;
  checkpoint: string;
  /** The unfinished run that `--resume` found, until it continues. */
  resumed?: Underway;
}

/** Trains with AdamW and a cosine schedule; from time to time it reads the losses and evaluates the model on the held-out text. */
async function train(model: nn.Gpt, method: string, loss: StudentLoss, comparison: Comparison): Promise<Underway> {
  const { setting, corpus, models, heldOut, progress, stop, checkpoint, resumed } = comparison;
  const { steps, seed, onPolicy } = setting;
  const { context, batchSize } = SIZES[setting.size];
  const optimizer = makeOptimizer(model);
  const learningRate = LEARNING_RATE * Math.sqrt(64 / model.options.width);
  const schedule = optim.cosine({ steps, warmup: Math.round(steps / 20), final: 0.05 });
  using meter = new Meter();
  let underway: Underway = { method, curve: [], losses: [], seconds: 0, bytes: 0 };
  let step = 0;
  if (resumed) {
    ({ step } = await loadCheckpoint(checkpoint, { model: models, optimizer }));
    underway = resumed;
    delete comparison.resumed;
  }

  while (step < steps) {
    const started = performance.now();
    const first = step;
    const every = Math.ceil(steps / READS);
    const next = Math.min(steps, every * (Math.floor(step / every) + 1));
    let stopping = false;
    while (step < next && !(stopping = await stop.asked())) {
      const random = generator(seed, step);
      const starts = drawStarts(corpus.train, context, batchSize, random);
      const own = method !== BASELINE && model === models.student && random() < onPolicy;
      const written = own ? await writeBatch(model, corpus, starts, step) : null;
      {
        using _tape = new Tape(); // records the step, and frees at the end of the block what the step has made
        const value = loss(model, written?.() ?? makeBatch(corpus, "train", starts, context), models.teacher);
        underway.bytes = Math.max(underway.bytes, stats().liveBytes);
        value.backward();
        optim.clipGradNorm(model.parameters(), MAX_NORM);
        optimizer.lr = learningRate * schedule(step);
        optimizer.step();
        optimizer.zeroGrad();
        meter.add("loss", value); // copied on the GPU: nothing waits
      }
      step++;
    }
    underway.losses.push(...(await meter.read()).loss ?? []); // the one wait in many steps
    underway.seconds += (performance.now() - started) / 1000;
    progress.advance(step - first, method);
    if (stopping) {
      const saved: Saved = { setting, corpusHash: corpus.hash, runs: comparison.runs, underway };
      // overwrites a checkpoint of an earlier stop, even if its step was later, in another run
      await saveCheckpoint(checkpoint, { model: models, optimizer, step, extra: saved }, { overwrite: true });
      throw new Stopped(`stopped after step ${step} of ${steps} of ${method}`);
    }
    const { bits } = await evaluate(heldOut, (batch) => model.forward(batch.tokens));
    underway.curve.push({ step, loss: mean(underway.losses)!, bitsPerCharacter: bits });
    underway.losses = [];
  }
  optimizer.dispose();
  return underway;
}

/** Bits per held-out character, agreement with the teacher's most likely characters, and the entropy of the model's own predictions. */
async function evaluate(
  heldOut: Batch[],
  logitsOf: (batch: Batch) => Tensor,
  teacherOf?: (batch: Batch) => Tensor,
): Promise<{ bits: number; agreement: number; entropy: number }> {
  using meter = new Meter();
  for (const batch of heldOut) {
    using _scope = new Scope(); // frees what a batch makes
    noGrad(() => {
      const logits = logitsOf(batch);
      meter.add("bits", crossEntropy(logits, batch.targets));
      if (!teacherOf) return;
      meter.add("entropy", entropy(logits));
      const likeliest = argmax(teacherOf(batch), { dim: -1 });
      meter.add("agreement", crossEntropy(logits, likeliest, { returnAccuracy: true }).accuracy!);
    });
  }
  const { bits, agreement = [], entropy: own = [] } = await meter.read();
  const rows = heldOut.map(({ tokens }) => tokens.shape[0]); // the last batch may have fewer
  const average = (values: number[]) => sum(values, (value, i) => value * rows[i]) / sum(rows);
  return { bits: average(bits) / Math.LN2, agreement: average(agreement), entropy: average(own) / Math.LN2 };
}

/** Texts that continue held-out characters. They may be longer than the context: the model continues from the last half context of its own text. */
async function writeSamples(model: nn.Gpt, { corpus, setting }: Comparison): Promise<Int32Array[]> {
  const { context } = model.options;
  const { sampleLength } = SIZES[setting.size];
  const half = context / 2;
  let windows: Int32Array[] = spreadStarts(corpus.heldOut, context, SAMPLES).map((start) =>
    corpus.heldOut.slice(start, start + half)
  );
  const texts: number[][] = windows.map(() => []);
  for (let written = 0; written < sampleLength; written += half) {
    const length = Math.min(half, sampleLength - written);
    windows = await nn.generate(model, windows, { ...setting.sampling, length, seed: setting.seed + written });
    windows = windows.map((window) => window.slice(-half));
    windows.forEach((window, i) => texts[i].push(...window.slice(-length)));
  }
  return texts.map((text) => Int32Array.from(text));
}

/** Evaluates a trained model. */
async function examine(
  model: nn.Gpt,
  { method, curve, seconds, bytes }: Underway,
  comparison: Comparison,
): Promise<TextRun> {
  const { models, heldOut, setting, corpus } = comparison;
  const { context, batchSize } = SIZES[setting.size];
  const { bits, agreement, entropy } = await evaluate(
    heldOut,
    (batch) => model.forward(batch.tokens),
    (batch) => teacherLogits(models.teacher, batch),
  );
  const samples = await writeSamples(model, comparison);
  const parameters = model.parameters();
  return {
    method,
    beta: STUDENTS.find((student) => student.method === method)?.beta,
    curve,
    bitsPerCharacter: bits,
    agreement,
    entropy,
    distinct: distinctShare(samples),
    tokensPerSecond: setting.steps * batchSize * context / seconds,
    bytes,
    parameters: parameters.reduce((sum, { size }) => sum + size, 0),
    hash: await hashOf(await Promise.all(parameters.map((parameter) => parameter.data()))),
    samples: samples.map((sample) => decode(sample, corpus.vocabulary)),
  };
}

/** The teacher's run, then the students'. Runs that a stopped program had finished are not repeated. */
async function runAll(comparison: Comparison, students: Student[]): Promise<void> {
  const { setting, corpus, models, runs, heldOut } = comparison;
  const done = (name: string) => runs.some(({ method }) => method === name);
  if (models.teacher && !done("teacher")) {
    const underway = await train(models.teacher, "teacher", learnFromText, comparison);
    runs.push(await examine(models.teacher, underway, comparison));
  }
  if (!models.teacher && !done("teacher")) {
    const { bits, ...others } = await evaluate(heldOut, (batch) => batch.teacher!, (batch) => batch.teacher!);
    runs.push({ method: "teacher", curve: [], bitsPerCharacter: bits, ...others, samples: [] });
  }
  for (const { method, loss } of students) {
    if (done(method)) continue;
    if (!comparison.resumed) {
      models.student.dispose();
      models.student = makeGpt("student", setting, corpus);
    }
    runs.push(await examine(models.student, await train(models.student, method, loss, comparison), comparison));
  }
}

/** Loads the checkpoint of a stopped run into the models, and returns the rest of it. */
async function resume(
  path: string,
  models: Models,
  setting: Setting,
  corpusHash: string,
): Promise<Saved & { step: number }> {
  const wanted = "the options, the text and the teacher of a run that was stopped";
  const saved = await loadCheckpoint(path, { model: models })
    .then(({ step, extra }) => ({ step, ...extra as Saved }))
    .catch(({ message }) => failOption("--resume", wanted, message));
  if (JSON.stringify(saved.setting) !== JSON.stringify(setting) || saved.corpusHash !== corpusHash) {
    failOption("--resume", wanted, `others; it was ${JSON.stringify(saved.setting)}`);
  }
  return saved;
}

/** Times the kernels of a few steps of a student. */
async function profileSteps(setting: Setting, corpus: Corpus, models: Models, out: string): Promise<void> {
  const { context, batchSize } = SIZES[setting.size];
  const optimizer = makeOptimizer(models.student);
  const { loss } = STUDENTS.find(({ method }) => method === "forward KL")!;
  const runSteps = (count: number) => {
    for (const step of range(count)) {
      using _tape = new Tape();
      const starts = drawStarts(corpus.train, context, batchSize, generator(setting.seed, step));
      loss(models.student, makeBatch(corpus, "train", starts, context), models.teacher).backward();
      optim.clipGradNorm(models.student.parameters(), MAX_NORM);
      optimizer.step();
      optimizer.zeroGrad();
    }
  };
  runSteps(1); // compiles the kernels
  const { table, trace } = await profile(() => runSteps(PROFILED));
  await Deno.writeTextFile(`${out}/distill_text_trace.json`, JSON.stringify(trace));
  console.log(`${PROFILED} steps of the student with forward KL, the teacher's forward pass in them:\n\n${table}`);
  console.log(`\n${out}/distill_text_trace.json opens in chrome://tracing and ui.perfetto.dev`);
}

const HELP = `Distils a GPT that learns a novel character by character into smaller ones, with one loss after the other.

  --size SIZE            small, for two CPU cores; medium or large, for a GPU (small)
  --students WHICH       few: labels alone, forward KL and one jsd; all: the whole sweep over β too (few)
  --steps N              training steps of each model (by size)
  --seed N               of weights, batches and samples (${SEED})
  --text FILE            learn this UTF-8 text (Moby Dick); characters in it fewer than ${RARE} times share one class, �
  --teacher-logits FILE  learn from a teacher's logits in a safetensors file, dense or top-k, in place of a teacher of
                         one's own: tokens [N] and logits [N, V], or values and indices [N, K] and if known
                         logSumExp [N]. Of top-k rows the rest of the mass is spread evenly over the other classes;
                         without logSumExp the K are all of it. More in examples/support/teacher_logits.ts
  --on-policy SHARE      share of the batches that the student writes itself, 0 to 1 (0)
  --temperature T        of the samples in the end (1); 0 takes the likeliest character
  --top-k K              samples from the K likeliest characters only
  --top-p P              samples from the likeliest characters with this probability together
  --profile              time per kernel on the GPU of a few steps, in place of the whole run: a table and
                         distill_text_trace.json
  --quick                tiny models: within a minute on two CPU cores
  --stop-after N         stops after N steps as Ctrl-C does: saves a checkpoint and says how to go on
  --resume               goes on from that checkpoint; give the other options as before
  --out DIR              folder for distill_text.svg, distill_text.json and checkpoints (out)
  --help                 this text`;

function readSetting(options: Options): Setting {
  const chosen = options.choice("size", "small", ["small", "medium", "large"]);
  const size = options.given("quick") ? "quick" : chosen;
  const topP = options.number("top-p", 1, 0, 1);
  const setting: Setting = {
    size,
    students: options.choice("students", "few", ["few", "all"]),
    steps: options.count("steps", SIZES[size].steps, 1),
    seed: options.count("seed", SEED, 0),
    text: options.text("text", ""),
    teacherLogits: options.text("teacher-logits", ""),
    onPolicy: options.number("on-policy", 0, 0, 1),
    sampling: {
      temperature: options.number("temperature", 1, 0, Infinity),
      topK: options.count("top-k", 0, 1) || undefined,
      topP: topP === 1 ? undefined : topP,
    },
  };
  if (topP === 0) failOption("--top-p", "a number above 0", '"0"');
  if (setting.onPolicy > 0 && setting.teacherLogits) {
    failOption("--on-policy", "a teacher that can mark new text", "--teacher-logits");
  }
  return setting;
}

async function main(): Promise<void> {
  const options = readOptions(HELP);
  const setting = readSetting(options);
  const stopAfter = options.count("stop-after", 0, 1) || undefined;
  const resuming = options.given("resume");
  const profiling = options.given("profile");
  const out = options.text("out", "out");
  await makeFolder(out);
  const checkpoint = `${out}/distill_text_checkpoint.safetensors`;

  const { adapter } = await init();
  const { context, batchSize, heldOutBatches } = SIZES[setting.size];
  const corpus = await loadCorpus(setting, context, heldOutBatches * batchSize);
  const teacher = corpus.file ? null : makeGpt("teacher", setting, corpus);
  const models = new Models(teacher, makeGpt("student", setting, corpus));
  if (profiling) {
    await profileSteps(setting, corpus, models, out);
    return await dispose();
  }

  const heldOut = range(0, corpus.heldOutStarts.length, batchSize).map((i) =>
    makeBatch(corpus, "heldOut", corpus.heldOutStarts.slice(i, i + batchSize), context)
  );
  const students = STUDENTS.filter(({ few, needsHidden }) =>
    setting.students === "all" ? !(needsHidden && corpus.file) : few
  );
  const saved = resuming ? await resume(checkpoint, models, setting, corpus.hash) : undefined;
  const trained = students.length + (teacher ? 1 : 0);
  const done = saved ? saved.runs.filter(({ curve }) => curve.length > 0).length * setting.steps + saved.step : 0;
  const stop = watchStop(stopAfter);
  const comparison: Comparison = {
    setting,
    corpus,
    models,
    heldOut,
    runs: saved?.runs ?? [],
    progress: showProgress(trained * setting.steps, done),
    stop,
    checkpoint,
    resumed: saved?.underway,
  };
  try {
    await runAll(comparison, students);
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    comparison.progress.stop();
    const again = Deno.args.filter((argument, i, all) =>
      !/^--(stop-after|resume)/.test(argument) && all[i - 1] !== "--stop-after"
    );
    console.log(`\n${error.message}; saved ${checkpoint}`);
    console.log(`Go on with: ./run distill-text ${quote([...again, "--resume"])}`);
    Deno.exit(stop.interrupted ? 130 : 0);
  }
  comparison.progress.stop();
  stop.dispose();
  const { peakBytes } = stats();
  await dispose();
  await report(comparison, out, adapter, peakBytes);
  await removeCheckpoint(checkpoint, setting);
}

/** Prints the table and a sample of each model, and writes the picture and the numbers. */
async function report({ setting, corpus, runs }: Comparison, out: string, adapter: string, peakBytes: number) {
  const { context, batchSize, sampleLength } = SIZES[setting.size];
  const { vocabulary } = corpus;
  const ngrams = ["character frequency", "bigram, add-one", "trigram, add-one"].map((method, i) => ({
    method,
    bitsPerCharacter: ngramBits(corpus.train, corpus.heldOut, {
      order: i + 1,
      classes: vocabulary.length,
      starts: corpus.heldOutStarts,
      context,
    }),
  }));
  const excerpts = spreadStarts(corpus.heldOut, Math.min(sampleLength, corpus.heldOut.length - 2), SAMPLES)
    .map((start) => corpus.heldOut.subarray(start, start + sampleLength));
  const yardsticks: Yardsticks = { ngrams, distinct: distinctShare(excerpts) };
  const story =
    `${setting.steps} steps of ${batchSize} × ${context} characters each; ${
      corpus.train.length.toLocaleString("en")
    } ` +
    `characters to learn from, ${(corpus.heldOutStarts.length * context).toLocaleString("en")} held out to try.`;
  console.log(formatTextTable(runs, yardsticks));
  console.log(`\n${story}`);
  console.log(
    "Agreement: of likeliest characters with the teacher's. Entropy: of a model's own predictions. Distinct: among all",
  );
  console.log(
    "runs of four characters that it wrote. MiB: GPU memory between forward and backward pass, the teacher's with it.",
  );
  for (const { method, samples: [sample] } of runs) {
    if (sample !== undefined) console.log(`\n${method}:\n${sample.slice(0, SHOWN).replace(/^/gm, "  ")}`);
  }

  const json = JSON.stringify({ setting, adapter, story, peakBytes, vocabulary, ...yardsticks, runs }, null, 2);
  await Deno.writeTextFile(`${out}/distill_text.json`, json);
  await Deno.writeTextFile(
    `${out}/distill_text.svg`,
    await drawTextReport("Distilling a writer", story, runs, yardsticks),
  );
  const mebibytes = (peakBytes / 2 ** 20).toFixed(1);
  console.log(`\n${out}/distill_text.svg and .json, computed on ${adapter} with at most ${mebibytes} MiB`);
}

await main();
