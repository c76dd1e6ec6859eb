/**
 * Reference cases computed by PyTorch in float64 (`close`: with 45 digits) from the float32 inputs stored beside them, run through the public
 * names.
 */
import { assertEquals } from "@std/assert";
import * as limbeck from "@limbeck/limbeck";
import type { Tensor } from "@limbeck/limbeck";
import { largestError } from "./compare.ts";
import { type Case, readCases, type Values } from "./safetensors.ts";

// cases name ops as strings, so the public names are looked up by string
// deno-lint-ignore no-explicit-any
const L = limbeck as any;

const camel = (name: string) => name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase());

const DIVERGENCES: Record<string, string> = {
  forward_kl: "forwardKl",
  reverse_kl: "reverseKl",
  jsd: "jsd",
  skew_forward_kl: "skewForwardKl",
  skew_reverse_kl: "skewReverseKl",
  tvd: "totalVariation",
};

/** PyTorch's names where ours are not their camelCase. */
const RENAMED: Record<string, string> = {
  logsumexp: "logSumExp",
  amax: "max",
  var: "variance",
  max_pool2d: "maxPool2d",
  l1_loss: "l1Loss",
  smooth_l1_loss: "smoothL1Loss",
  gaussian_kl_standard_normal: "gaussianKl",
};

const FAMILIES = ["cross_entropy", "kl_div", "distillation", "close", "fused_linear", "ops", "optim", "models"];

// ---- running cases

const LOSS_FLOOR = 0.1; // a loss of 1e-3 is right to 1e-7
const GRADIENT_FLOOR = 1e-30; // some gradients are e⁻²⁰⁰, which float32 does not hold

/** What a case gave, what was wanted, and the magnitude below which deviations are taken as absolute. */
interface Compared {
  name: string;
  got: ArrayLike<number>;
  want: ArrayLike<number>;
  floor: number;
}

const upload = (x: Values, requiresGrad = false): Tensor =>
  L.tensor(x.data instanceof Float64Array ? Float32Array.from(x.data) : x.data, x.shape, { requiresGrad });

/** Runs an op on the inputs that it takes as leaves: its results by name, and the gradients of the first for `grad_output`. */
async function differentiate(
  c: Case,
  leafNames: string[],
  run: (leaf: Record<string, Tensor>) => Record<string, Tensor>,
  floor = LOSS_FLOOR,
): Promise<Compared[]> {
  using _tape = new limbeck.Tape();
  const leaves = Object.fromEntries(leafNames.map((k) => [k, upload(c.inputs[k], `grad_${k}` in c.outputs)]));
  const results = run(leaves), [y] = Object.values(results);
  const { grad_output: dY } = c.inputs;
  y.backward(dY && L.tensor(dY.data, y.shape)); // stored flat, a value a row
  return await Promise.all(
    Object.entries(c.outputs).map(async ([name, { data: want }]) => {
      const isGradient = name.startsWith("grad_"), x = isGradient ? leaves[name.slice(5)].grad! : results[name];
      return { name, got: await x.data(), want, floor: isGradient ? GRADIENT_FLOOR : floor };
    }),
  );
}

function lossOptions(args: Case["args"]): Case["args"] {
  const renamed: Record<string, string> = {
    label_smoothing: "labelSmoothing",
    lse_square_scale: "zLoss",
    ignore_index: "ignoreIndex",
    log_target: "logTarget",
    T: "temperature",
  };
  const options = Object.fromEntries(Object.entries(args).map(([k, v]) => [renamed[k] ?? k, v]));
  if (options.reduction === "batchmean") options.reduction = "mean";
  delete options.labels; // whether there are labels: they are among the inputs
  return options;
}

function runLoss(family: string, c: Case): Promise<Compared[]> {
  const { inputs: I } = c, options = lossOptions(c.args);
  if (family === "cross_entropy") {
    if (I.weight) options.weight = upload(I.weight);
    options.returnZLoss = "z_loss" in c.outputs;
    return differentiate(c, ["logits"], ({ logits }): Record<string, Tensor> => {
      const result = L.crossEntropy(logits, upload(I.target ?? I.probabilities), options);
      if (!options.returnZLoss) return { loss: result };
      return { loss: result.loss, z_loss: result.zLoss };
    });
  }
  if (family === "kl_div") {
    if (c.args.reduction) options.reduction = c.args.reduction; // here batchmean is a reduction of its own
    return differentiate(c, ["input"], ({ input }) => ({ loss: L.klDiv(input, upload(I.target), options) }));
  }
  if (c.op === "linear_cross_entropy") {
    return differentiate(c, ["hidden", "weight", ...I.bias ? ["bias"] : []], ({ hidden, weight, bias }) => ({
      loss: L.linearCrossEntropy(hidden, weight, upload(I.target), { ...options, bias }),
    }));
  }
  if (family === "fused_linear") {
    options.divergence = DIVERGENCES[c.op.replace("linear_", "")];
    return differentiate(c, ["hidden", "weight"], ({ hidden, weight }) => ({
      loss: L.linearDistillation(hidden, weight, upload(I.teacher_hidden), upload(I.teacher_weight), options),
    }));
  }
  return differentiate(c, ["student", "teacher"], ({ student, teacher }) => {
    if (c.op === "hinton") return { loss: L.distillation(student, teacher, upload(I.labels), options) };
    if (I.labels) options.labels = upload(I.labels);
    return { loss: L[DIVERGENCES[c.op]](student, teacher, options) };
  }, family === "close" ? 0 : LOSS_FLOOR);
}

function runOp(c: Case): Promise<Compared[]> {
  const a = c.args, name = RENAMED[c.op] ?? camel(c.op);
  const last = { dim: -1 };
  const more: Record<string, unknown[]> = { // what follows the tensors
    gelu: [{ approximate: a.approximate }],
    softmax: [-1],
    log_softmax: [-1],
    logsumexp: [last],
    sum: [a.dim === undefined ? {} : { dim: a.dim }],
    mean: [a.dim === undefined ? {} : { dim: a.dim }],
    amax: [last],
    var: [{ ...last, correction: 0 }],
    transpose: [-1, -2],
    layer_norm: [{ eps: a.eps }],
    rms_norm: [{ eps: a.eps }],
    conv2d: [{ stride: a.stride, padding: a.padding }],
    max_pool2d: [{ kernel: a.kernel }],
    scaled_dot_product_attention: [{ causal: a.causal }],
    cosine_similarity: [last],
    smooth_l1_loss: [{ beta: a.beta }],
  };
  const leaves = c.op === "embedding" ? ["weight"] : Object.keys(c.inputs).filter((k) => /^x\d$/.test(k)).sort();
  return differentiate(c, leaves, (leaf) => {
    const tensors = leaves.map((k) => leaf[k]);
    if (c.op === "embedding") tensors.push(upload(c.inputs.index));
    return { y: L[name](...tensors, ...more[c.op] ?? []) };
  });
}

async function runOptimizer(c: Case): Promise<Compared[]> {
  const { inputs: I, outputs: O, args: a } = c;
  if (c.op === "clip_grad_norm") {
    const parameters: Tensor[] = [I.g0, I.g1].map((g) => upload(g, true));
    using _tape = new limbeck.Tape();
    [I.g0, I.g1].forEach((g, i) => parameters[i].mul(upload(g)).sum().backward());
    const norm: Tensor = L.optim.clipGradNorm(parameters, a.max_norm);
    return [
      { name: "norm", got: await norm.data(), want: O.norm.data, floor: 0 },
      { name: "g0", got: await parameters[0].grad!.data(), want: O.g0.data, floor: 0 },
      { name: "g1", got: await parameters[1].grad!.data(), want: O.g1.data, floor: 0 },
    ];
  }
  const { weight_decay, ...options } = a;
  if (weight_decay !== undefined) options.weightDecay = weight_decay;
  const parameter = upload(I.param, true), size = parameter.size;
  const optimizer = new L.optim[c.op]([parameter], options);
  const trajectory: number[] = [];
  for (let step = 0; step < I.grads.shape[0]; step++) {
    using _tape = new limbeck.Tape();
    const gradient = upload({ shape: I.param.shape, data: I.grads.data.slice(step * size, (step + 1) * size) });
    optimizer.zeroGrad();
    parameter.mul(gradient).sum().backward();
    optimizer.step();
    trajectory.push(...await parameter.data());
  }
  return [{ name: "trajectory", got: trajectory, want: O.trajectory.data, floor: 0 }];
}

/** A perceptron with one hidden layer: 30 steps of AdamW. */
async function runMlp(c: Case): Promise<Compared[]> {
  const { inputs: I, args: a } = c, kind = c.op.replace("mlp_", "");
  const [w1, b1, w2, b2] = ["w1", "b1", "w2", "b2"].map((k) => upload(I[k], true));
  const [x, teacher, y] = [I.x, I.teacher, I.y].map((v) => upload(v));
  const optimizer = new limbeck.optim.AdamW([w1, b1, w2, b2], { lr: a.lr, weightDecay: a.weight_decay });
  const meter = new limbeck.Meter();
  for (let step = 0; step < a.steps; step++) {
    using _tape = new limbeck.Tape();
    const student = limbeck.linear(limbeck.linear(x, w1, b1).gelu({ approximate: "tanh" }), w2, b2);
    const loss = kind === "ce"
      ? limbeck.crossEntropy(student, y)
      : kind === "hinton"
      ? limbeck.distillation(student, teacher, y, { alpha: a.alpha, temperature: a.temperature })
      : L[DIVERGENCES[kind]](student, teacher, a.beta === undefined ? {} : { beta: a.beta });
    optimizer.zeroGrad();
    loss.backward();
    optimizer.step();
    meter.add("loss", loss);
  }
  return [{ name: "losses", got: (await meter.read()).loss, want: c.outputs.losses.data, floor: 0 }];
}

/** A transformer from ops alone: `gpt` all gradients of one pass, `gpt_train` its losses over some steps. */
async function runGpt(c: Case): Promise<Compared[]> {
  const { inputs: I, outputs: O, args: a } = c;
  const [B, T] = I.ids.shape, [V, C] = I.wte.shape, heads = a.heads;
  const P: Record<string, Tensor> = {};
  for (const k in I) if (k !== "ids" && k !== "target") P[k] = upload(I[k], true);
  const ids = upload(I.ids), target = upload(I.target).reshape([B * T]);
  const forward = (): Tensor => {
    let x: Tensor = L.embedding(P.wte, ids).add(P.wpe);
    for (let l = 0; l < a.layers; l++) {
      const p = (k: string) => P[`h${l}.${k}`];
      const normed = L.layerNorm(x, p("ln1_w"), p("ln1_b"), { eps: 1e-5 });
      const qkv = L.linear(normed, p("attn_w"), p("attn_b")).reshape([B, T, 3, heads, C / heads])
        .permute([2, 0, 3, 1, 4]);
      const part = (i: number) => L.slice(qkv, [[i, i + 1]]).reshape([B, heads, T, C / heads]);
      const attended = L.scaledDotProductAttention(part(0), part(1), part(2), { causal: true });
      x = x.add(L.linear(attended.transpose(1, 2).reshape([B, T, C]), p("proj_w"), p("proj_b")));
      const wide = L.linear(L.layerNorm(x, p("ln2_w"), p("ln2_b"), { eps: 1e-5 }), p("fc_w"), p("fc_b"));
      x = x.add(L.linear(wide.gelu({ approximate: "tanh" }), p("fc2_w"), p("fc2_b")));
    }
    return L.linear(L.layerNorm(x, P.lnf_w, P.lnf_b, { eps: 1e-5 }), P.wte);
  };
  if (c.op === "gpt") {
    using _tape = new limbeck.Tape();
    const logits = forward(), loss = limbeck.crossEntropy(logits.reshape([B * T, V]), target);
    loss.backward();
    const compared: Compared[] = [
      { name: "logits", got: await logits.data(), want: O.logits.data, floor: LOSS_FLOOR },
      { name: "loss", got: await loss.data(), want: O.loss.data, floor: 0 },
    ];
    for (const k in P) {
      compared.push({ name: `grad_${k}`, got: await P[k].grad!.data(), want: O[`grad_${k}`].data, floor: 1e-4 });
    }
    return compared;
  }
  const optimizer = new limbeck.optim.AdamW(Object.values(P), { lr: a.lr, weightDecay: a.weight_decay });
  const losses: number[] = [];
  for (let step = 0; step < a.steps; step++) {
    using _tape = new limbeck.Tape();
    const loss = limbeck.crossEntropy(forward().reshape([B * T, V]), target);
    optimizer.zeroGrad();
    loss.backward();
    optimizer.step();
    losses.push(await loss.item());
  }
  return [{ name: "losses", got: losses, want: O.losses.data, floor: 0 }];
}

function run(family: string, c: Case): Promise<Compared[]> {
  if (family === "ops") return runOp(c);
  if (family === "optim") return runOptimizer(c);
  if (family === "models") return c.op.startsWith("gpt") ? runGpt(c) : runMlp(c);
  return runLoss(family, c);
}

/**
 * Largest deviations of values and of gradients, as shares of a case's largest value: some 10 and 50 roundings of f32 (6e-8), more where
 * steps follow each other. `close` rows differ by 1e-5, where f32 logits alone leave no more than 3 digits to hold on to.
 */
const LIMITS: Record<string, { value: number; gradient: number }> = {
  cross_entropy: { value: 1e-6, gradient: 5e-6 },
  kl_div: { value: 1e-6, gradient: 5e-6 },
  distillation: { value: 1e-6, gradient: 5e-6 },
  close: { value: 1e-3, gradient: 1e-3 },
  fused_linear: { value: 2e-6, gradient: 5e-6 },
  ops: { value: 2e-6, gradient: 5e-6 },
  optim: { value: 2e-5, gradient: 1e-5 },
  models: { value: 1e-4, gradient: 5e-5 },
};

for (const family of FAMILIES) {
  const cases = readCases(family);
  Deno.test({
    name: `golden: ${cases.length} cases of ${family}`,
    fn: async () => {
      await limbeck.init();
      const wrong: string[] = [];
      for (const c of cases) {
        const title = `${c.id} ${c.op} ${JSON.stringify(c.args)}`;
        try {
          using _scope = new limbeck.Scope();
          for (const { name, got, want, floor } of await run(family, c)) {
            const error = largestError(got, want, floor);
            const limit = LIMITS[family][name.startsWith("grad") ? "gradient" : "value"];
            if (!(error <= limit)) wrong.push(`${title} ${name}: off by ${error.toExponential(1)}`);
          }
        } catch (thrown) {
          wrong.push(`${title}: ${thrown}`);
        }
      }
      assertEquals(wrong, []);
    },
  });
}
