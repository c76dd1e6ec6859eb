/**
 * Measures the engine on this machine's adapter and writes the results: a page of tables, the numbers as JSON, a picture.
 *
 *     deno task bench:report --help
 *
 * Times are GPU times, from timestamps before and after a few consecutive steps, of forward and gradient together; training steps
 * are timed by the wall clock. Every loss and product is compared with its composed twin or with float64 before it is timed.
 *
 * @module
 */

import {
  crossEntropy,
  dispose,
  forwardKl,
  type GpuInfo,
  init,
  jsd,
  linear,
  linearCrossEntropy,
  linearDistillation,
  manualSeed,
  matmul,
  nn,
  optim,
  randint,
  randn,
  relu,
  Scope,
  stats,
  Tape,
  type Tensor,
} from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { median, min } from "d3-array";
import { failOption, makeFolder, readOptions } from "../examples/support/cli.ts";
import { limitsOf } from "../kernels/gpu/device.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import {
  extraBytes,
  measureArithmetic,
  measureBandwidth,
  measureLaunch,
  type Pace,
  time,
  timeKernels,
} from "./measure.ts";
import {
  drawReport,
  formatReport,
  type HeadResult,
  type LossResult,
  type ProductResult,
  type Report,
  type StepResult,
} from "./report_page.ts";
import { drawLabels, LOSSES, type LossInputs } from "./losses.ts";
import { assertAgree, assertProduct, runStep, widened } from "./support.ts";

const SECTIONS = ["losses", "matmul", "linear", "steps"] as const;
type Section = typeof SECTIONS[number];

interface Product {
  what: string;
  m: number;
  k: number;
  n: number;
  transposeA?: boolean;
  transposeB?: boolean;
}

interface Model {
  name: string;
  batch: number;
  /** The options of a GPT; without them the model is an MLP 784-256-256-10. */
  gpt?: nn.GptOptions;
}

/** What is measured on an adapter. */
interface Plan {
  pace: Pace;
  /** The number of bytes copied to find the limit of memory, and of workgroups to find that of arithmetic. */
  copied: number;
  workgroups: number;
  losses: [rows: number, classes: number][];
  /** Rows of the comparison with the twin. */
  checkedRows: number;
  products: Product[];
  heads: { rows: number; depth: number; classes: number; chunkSize?: number }[];
  models: Model[];
  steps: { warmUp: number; timed: number; rounds: number };
}

const SMALL_MLP: Model = { name: "MLP 784-256-256-10, batch 128", batch: 128 };

/** The three products of a linear layer in training. */
function layerProducts(what: string, rows: number, ins: number, outs: number): Product[] {
  return [
    { what: `${what}: y`, m: rows, k: ins, n: outs, transposeB: true },
    { what: `${what}: dX`, m: rows, k: outs, n: ins },
    { what: `${what}: dW`, m: outs, k: rows, n: ins, transposeA: true },
  ];
}

function squareProducts(n: number): Product[] {
  const shape = { m: n, k: n, n };
  return [
    { what: "square", ...shape },
    { what: "square, A transposed", ...shape, transposeA: true },
    { what: "square, B transposed", ...shape, transposeB: true },
    { what: "square, both transposed", ...shape, transposeA: true, transposeB: true },
  ];
}

const PLANS: Record<"gpu" | "software" | "quick", Plan> = {
  gpu: {
    pace: { warmUp: 120, measured: 60, least: 8, most: 400 },
    copied: 2 ** 30,
    workgroups: 16384,
    losses: [[16384, 8192], [4096, 32000], [4096, 32003], [2048, 128256]],
    checkedRows: 64,
    products: [
      ...squareProducts(4096),
      ...layerProducts("head 4096×1024×32000", 4096, 1024, 32000),
      ...layerProducts("head of the GPT 4×256", 1024, 256, 32000),
      ...layerProducts("feed-forward of the GPT 6×384", 4096, 384, 1536),
      ...layerProducts("feed-forward of the GPT 4×128", 2048, 128, 512),
      ...layerProducts("first layer of the MLP", 128, 784, 256),
    ],
    heads: [
      { rows: 4096, depth: 1024, classes: 32000 },
      { rows: 1024, depth: 256, classes: 32000 },
      { rows: 2048, depth: 1024, classes: 128256 },
    ],
    models: [
      SMALL_MLP,
      {
        name: "GPT 4×128, 32×64 tokens",
        batch: 32,
        gpt: { vocabulary: 96, context: 64, layers: 4, width: 128, heads: 4 },
      },
      {
        name: "GPT 6×384, 16×256 tokens",
        batch: 16,
        gpt: { vocabulary: 96, context: 256, layers: 6, width: 384, heads: 6 },
      },
      {
        name: "GPT 4×256, 8×128 tokens",
        batch: 8,
        gpt: { vocabulary: 32000, context: 128, layers: 4, width: 256, heads: 4 },
      },
    ],
    steps: { warmUp: 100, timed: 50, rounds: 11 },
  },
  software: {
    pace: { warmUp: 20, measured: 150, least: 9, most: 20 },
    copied: 2 ** 26,
    workgroups: 256,
    losses: [[256, 8192], [64, 32003]],
    checkedRows: 64,
    products: [
      ...squareProducts(512),
      ...layerProducts("head 256×64×4096", 256, 64, 4096),
      ...layerProducts("feed-forward of the GPT 2×64", 256, 64, 256),
      ...layerProducts("first layer of the MLP", 128, 784, 256),
    ],
    heads: [{ rows: 256, depth: 64, classes: 4096, chunkSize: 64 }],
    models: [
      SMALL_MLP,
      {
        name: "GPT 2×64, 8×32 tokens",
        batch: 8,
        gpt: { vocabulary: 96, context: 32, layers: 2, width: 64, heads: 4 },
      },
      {
        name: "GPT 1×64, 8×32 tokens",
        batch: 8,
        gpt: { vocabulary: 4096, context: 32, layers: 1, width: 64, heads: 4 },
      },
    ],
    steps: { warmUp: 5, timed: 10, rounds: 3 },
  },
  quick: {
    pace: { warmUp: 0, measured: 0, least: 1, most: 1 },
    copied: 2 ** 20,
    workgroups: 4,
    losses: [[8, 1027]],
    checkedRows: 8,
    products: [{ what: "square", m: 64, k: 64, n: 64 }, ...layerProducts("a layer", 16, 32, 48)],
    heads: [{ rows: 32, depth: 16, classes: 256, chunkSize: 8 }],
    models: [{
      name: "GPT 1×16, 2×8 tokens",
      batch: 2,
      gpt: { vocabulary: 2048, context: 8, layers: 1, width: 16, heads: 2 },
    }],
    steps: { warmUp: 3, timed: 3, rounds: 1 },
  },
};

/** The number of rows, at most as many as the adapter binds at once with `classes` f32 columns. */
function fittingRows(rows: number, classes: number): number {
  const { maxBufferSize, maxStorageBufferBindingSize } = gpu().info.limits;
  return Math.min(rows, Math.floor(Math.min(maxBufferSize, maxStorageBufferBindingSize) / (4 * classes)));
}

const say = (what: string) => console.error(`${(performance.now() / 1000).toFixed(1)} s  ${what}`);

type Variant = LossResult["variant"];

async function measureLosses(plan: Plan, copyRate: number, variants: Variant[]): Promise<LossResult[]> {
  const found: LossResult[] = [];
  for (const [asked, classes] of plan.losses) {
    const rows = fittingRows(asked, classes);
    gpu().pool.trim();
    using _scope = new Scope();
    const draw = (rows: number, someIgnored: boolean, dtype: "f32" | "f16", isClose = false): LossInputs => {
      const teacher = randn([rows, classes], { dtype });
      // a KL of 0.045
      const student = isClose ? teacher.add(randn([rows, classes]).mul(0.3)) : randn([rows, classes], { dtype });
      student.requiresGrad = true;
      return { student, teacher, ...drawLabels(rows, classes, someIgnored) };
    };
    const f32 = draw(rows, false, "f32");
    const prepared = variants.map((variant) => {
      const dtype = variant === "f16" ? "f16" : "f32";
      const kind = variant === "every option" ? "everyOption" as const : "plain" as const;
      const isClose = variant === "close rows";
      const few = draw(Math.min(rows, plan.checkedRows), kind === "everyOption", dtype, isClose);
      const wide = { ...few, student: widened(few.student), teacher: widened(few.teacher) };
      wide.student.requiresGrad = true;
      return {
        variant,
        kind,
        few,
        wide,
        bytes: dtype === "f16" ? 2 : 4,
        inputs: dtype === "f16" || isClose ? draw(rows, false, dtype, isClose) : f32,
      };
    });
    for (const { name, inputs: count, flops, ...ways } of LOSSES) {
      const measured = prepared.filter(({ variant }) => variant !== "close rows" || count === 2);
      for (const { variant, kind, few, wide } of measured) {
        await assertAgree(
          `${name} ${rows}×${classes}, ${variant}`,
          { forward: () => ways[kind].fused(few), leaves: [few.student] },
          { forward: () => ways[kind].twin(wide), leaves: [wide.student] },
        );
      }
      const steps = measured.map(({ kind, inputs }) => () =>
        runStep({ forward: () => ways[kind].fused(inputs), leaves: [inputs.student] })
      );
      const timings = await time(plan.pace, ...steps);
      for (const [i, { variant, bytes }] of measured.entries()) {
        const elements = rows * classes, mustMove = (count + 1) * elements * bytes;
        const rate = mustMove / (timings[i].milliseconds / 1000);
        found.push({
          name,
          variant,
          rows,
          classes,
          mustMove,
          ...timings[i],
          rate,
          share: rate / copyRate,
          flops: flops * elements,
          gradientBytes: elements * bytes,
          extraBytes: extraBytes(steps[i]),
        });
      }
    }
    say(`losses ${rows}×${classes}, ${variants.join(", ")}`);
  }
  return found;
}

async function measureProducts(plan: Plan): Promise<ProductResult[]> {
  const found: ProductResult[] = [];
  const dtypes = gpu().info.f16 ? ["f32", "f16"] as const : ["f32"] as const;
  for (const { what, m, k, n, transposeA = false, transposeB = false } of plan.products) {
    using _scope = new Scope();
    const o = { transposeA, transposeB }, steps: (() => void)[] = [];
    for (const dtype of dtypes) {
      const a = randn(transposeA ? [k, m] : [m, k], { dtype }), b = randn(transposeB ? [n, k] : [k, n], { dtype });
      await assertProduct(`matmul ${m}×${k}×${n}, ${what}, ${dtype}`, a, b, o);
      steps.push(() => matmul(a, b, o).dispose());
    }
    const timings = await time(plan.pace, ...steps);
    for (const [i, dtype] of dtypes.entries()) {
      const flops = 2 * m * k * n, bytes = (m * k + k * n + m * n) * (dtype === "f16" ? 2 : 4);
      const rate = flops / (timings[i].milliseconds / 1000);
      found.push({ what, dtype, m, k, n, ...o, bytes, flops, ...timings[i], rate });
    }
  }
  say("products");
  gpu().pool.trim();
  return found;
}

async function measureHeads(plan: Plan): Promise<HeadResult[]> {
  const found: HeadResult[] = [];
  for (const { rows, depth, classes, chunkSize } of plan.heads) {
    using _scope = new Scope();
    const hidden = randn([rows, depth], { requiresGrad: true }), teacherHidden = randn([rows, depth]);
    const [weight, teacherWeight] = [0, 1].map(() => randn([classes, depth]).mul(depth ** -0.5));
    weight.requiresGrad = true;
    const { labels } = drawLabels(rows, classes, false), leaves = [hidden, weight];
    const ways: [string, fused: () => Tensor, unfused: () => Tensor][] = [
      [
        "linearCrossEntropy",
        () => linearCrossEntropy(hidden, weight, labels, { chunkSize }),
        () => crossEntropy(linear(hidden, weight), labels),
      ],
      [
        "linearDistillation",
        () => linearDistillation(hidden, weight, teacherHidden, teacherWeight, { chunkSize }),
        () => forwardKl(linear(hidden, weight), linear(teacherHidden, teacherWeight)),
      ],
    ];
    for (const [name, forward, forwardUnfused] of ways) {
      const fused = { forward, leaves }, unfused = { forward: forwardUnfused, leaves };
      await assertAgree(`${name} ${rows}×${depth}×${classes}`, fused, unfused);
      const gradientBytes = 4 * (hidden.size + weight.size);
      const steps = [() => runStep(fused), () => runStep(unfused)];
      const [a, b] = (await time(plan.pace, ...steps)).map((timing, i) => ({
        ...timing,
        extraBytes: extraBytes(steps[i]) - gradientBytes,
      }));
      found.push({
        name,
        rows,
        depth,
        classes,
        logitsBytes: 4 * rows * classes,
        gradientBytes,
        fused: a,
        unfused: b,
        ratio: a.milliseconds / b.milliseconds,
      });
    }
    say(`linear ${rows}×${depth}×${classes}`);
    gpu().pool.trim();
  }
  return found;
}

/** A model with the losses that it is trained by. There is something to learn, so that a loss that does not fall is a bug. */
function build({ batch, gpt }: Model): { model: nn.Module; ways: [loss: string, forward: () => Tensor][] } {
  if (!gpt) {
    const model = new nn.Sequential(
      new nn.Linear(784, 256),
      relu,
      new nn.Linear(256, 256),
      relu,
      new nn.Linear(256, 10),
    );
    const images = randn([batch, 784]), labels = randint(0, 10, [batch]), teacher = randn([batch, 10]);
    return {
      model,
      ways: [
        ["crossEntropy", () => crossEntropy(model.forward(images), labels)],
        ["jsd", () => jsd(model.forward(images), teacher)],
      ],
    };
  }
  const { vocabulary, context, width } = gpt, model = new nn.Gpt(gpt);
  const tokens = randint(0, vocabulary, [batch, context]), labels = tokens.detach();
  const teacher = randn([batch, context, vocabulary]).add(randn([vocabulary]));
  const ways: [string, () => Tensor][] = [
    ["crossEntropy", () => crossEntropy(model.forward(tokens), labels)],
    ["jsd", () => jsd(model.forward(tokens), teacher)],
  ];
  if (vocabulary > 1000) { // large enough logits for the head and its loss in one op
    const teacherHidden = randn([batch, context, width]).add(randn([width]));
    const teacherWeight = randn([vocabulary, width]).mul(width ** -0.5);
    const o = { divergence: "jsd" as const };
    ways.push(
      ["linearCrossEntropy", () => linearCrossEntropy(model.hiddenStates(tokens), model.headWeight, labels)],
      [
        "linearDistillation, jsd",
        () => linearDistillation(model.hiddenStates(tokens), model.headWeight, teacherHidden, teacherWeight, o),
      ],
    );
  }
  return { model, ways };
}

async function measureSteps(plan: Plan): Promise<StepResult[]> {
  const found: StepResult[] = [], { warmUp, timed, rounds } = plan.steps;
  for (const described of plan.models) {
    using _scope = new Scope();
    const { model, ways } = build(described);
    for (const [loss, forward] of ways) {
      manualSeed(1);
      model.train();
      using optimizer = new optim.AdamW(model.parameters(), { lr: 1e-3 });
      const step = () => {
        using _tape = new Tape();
        const value = forward();
        optimizer.zeroGrad();
        value.backward();
        optimizer.step();
        return value;
      };
      const lossNow = async () => {
        using _tape = new Tape();
        return await forward().item();
      };
      const before = await lossNow(), last = model.parameters().at(-1)!;
      // at first kernels compile, and the clock rate rises
      const warm = performance.now() + 16 * plan.pace.warmUp;
      do {
        for (let i = 0; i < warmUp; i++) step();
        await last.data();
      } while (performance.now() < warm);
      // for a while, as hosts are slower for seconds
      const start = stats(), walls: number[] = [], until = performance.now() + 24 * plan.pace.warmUp;
      do {
        const from = performance.now();
        for (let i = 0; i < timed; i++) step();
        await last.data(); // nothing was read before
        walls.push((performance.now() - from) / timed);
      } while (walls.length < rounds || performance.now() < until);
      const end = stats(), steps = walls.length * timed;
      const kernels = await timeKernels(step, plan.pace.least);
      const after = await lossNow();
      if (!(after < before)) throw new Error(`${described.name}, ${loss}: the loss went from ${before} to ${after}`);
      found.push({
        model: described.name,
        loss,
        wall: median(walls)!,
        best: min(walls)!,
        submits: (end.submits - start.submits) / steps,
        buffersCreated: end.buffersCreated - start.buffersCreated,
        bindGroupsCreated: end.bindGroupsCreated - start.bindGroupsCreated,
        extraBytes: extraBytes(step),
        kernels,
      });
      say(`step of ${described.name}, ${loss}`);
    }
    model.dispose();
    gpu().pool.trim();
  }
  return found;
}

/** Opens the adapter again, without subgroups; null if it has them nevertheless. */
async function withoutSubgroups(): Promise<GpuInfo | null> {
  await dispose();
  const adapter = (await navigator.gpu.requestAdapter())!;
  const requiredFeatures: GPUFeatureName[] = ["timestamp-query"];
  const device = await adapter.requestDevice({ requiredLimits: limitsOf(adapter), requiredFeatures });
  const info = await init({ device });
  return info.subgroups ? null : info;
}

/** The first line that a program prints; undefined if it is missing or fails. */
function outputOf(command: string, ...args: string[]): string | undefined {
  try {
    const { success, stdout } = new Deno.Command(command, { args, stderr: "null" }).outputSync();
    return success ? new TextDecoder().decode(stdout).trim().split("\n")[0] : undefined;
  } catch {
    return undefined;
  }
}

/** The version of NVIDIA's driver, which WebGPU does not provide; for other drivers there is only the adapter's description. */
const driverVersion = () => outputOf("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader");
const commitHash = () => outputOf("git", "describe", "--always", "--dirty", "--abbrev=12");

const HELP = `Measures the engine on this machine's adapter and writes <device>.md, .json and .svg.

  deno task bench:report [options]

  --only PARTS     some of ${SECTIONS.join(",")}
  --quick          tiny sizes: whether it runs, not how fast
  --out DIR        where the files go (bench/results; with --only or --quick out/report); for a folder outside both
                   Deno asks in a terminal, and refuses elsewhere
  --dawn           on Dawn, which has tensor cores, and into <device>-dawn.*; bench/README.md has the whole command
  --driver TEXT    the driver's version, where nvidia-smi does not tell
  --commit TEXT    the commit, where git does not tell
  --help           this text`;

async function main(): Promise<void> {
  const started = performance.now();
  const options = readOptions(HELP), quick = options.given("quick");
  const only = options.text("only", SECTIONS.join(",")).split(",");
  for (const part of only) {
    if (!SECTIONS.includes(part as Section)) failOption("--only", SECTIONS.join(","), `"${part}"`);
  }
  const wanted = (section: Section) => only.includes(section);
  const lacks = quick ? ["tiny sizes, to see whether it runs"] : [];
  if (!SECTIONS.every(wanted)) lacks.push(`only ${only.join(", ")}`);

  // bench/results has complete reports only
  const out = options.text("out", `${import.meta.dirname}/${lacks.length > 0 ? "../out/report" : "results"}`);
  await makeFolder(out);
  const dawn = options.given("dawn");
  if (dawn) {
    await import("../testing/dawn/preload.ts").catch(({ message }) =>
      failOption("--dawn", "an installed npm:webgpu and the permissions that bench/README.md lists", message)
    );
  }
  manualSeed(1);
  const info = await init();
  if (!info.timestamps) throw new Error(`${info.adapter} has no timestamp-query: its kernels cannot be timed`);
  const plan = PLANS[quick ? "quick" : info.isSoftware ? "software" : "gpu"];
  const { maxBufferSize, maxStorageBufferBindingSize } = info.limits;
  const copied = 2 ** Math.floor(Math.log2(Math.min(plan.copied, maxBufferSize, maxStorageBufferBindingSize)));
  const bandwidth = await measureBandwidth(copied, plan.pace);
  const report: Report = {
    device: info.adapter,
    lacks,
    driver: options.text("driver", driverVersion() ?? "not told"),
    deno: Deno.version.deno,
    webgpu: dawn ? "Dawn's" : "its own",
    date: new Date().toISOString().slice(0, 10),
    commit: options.text("commit", commitHash() ?? "unknown"),
    subgroups: info.subgroups,
    f16: info.f16,
    tensorCores: info.tensorCores,
    bandwidth,
    arithmetic: await measureArithmetic(plan.workgroups, plan.pace),
    launch: await measureLaunch(plan.pace),
    losses: [],
    products: [],
    heads: [],
    steps: [],
    seconds: 0,
  };
  say("limits of memory and arithmetic");
  gpu().pool.trim();
  // first, as in a process of their own: memory that the host holds from other work would slow the steps down
  if (wanted("steps")) report.steps = await measureSteps(plan);
  if (wanted("losses")) {
    const variants: Variant[] = ["plain", "every option", "close rows", ...info.f16 ? ["f16" as const] : []];
    report.losses = await measureLosses(plan, bandwidth.best, variants);
  }
  if (wanted("matmul")) report.products = await measureProducts(plan);
  if (wanted("linear")) report.heads = await measureHeads(plan);
  if (wanted("losses") && info.subgroups && await withoutSubgroups()) {
    report.losses.push(...await measureLosses(plan, bandwidth.best, ["no subgroups"]));
  }
  await dispose();
  report.seconds = Math.round((performance.now() - started) / 1000);

  const name = `${info.adapter}${dawn ? " Dawn" : ""}`.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  const page = formatReport(report, `${name}.svg`);
  await Deno.writeTextFile(`${out}/${name}.json`, JSON.stringify(report, null, 1) + "\n");
  await Deno.writeTextFile(`${out}/${name}.md`, page);
  await Deno.writeTextFile(`${out}/${name}.svg`, await drawReport(report));
  console.log(page);
}

if (import.meta.main) await main();
