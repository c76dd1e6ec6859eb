/**
 * Values and gradients of the losses in float64, directly from their formulas, with which the fused kernels are compared. The tests
 * of each op first compare its reference with central differences.
 */
import { assertEquals } from "@std/assert";
import type { CrossEntropyOptions, DivergenceName, DivergenceOptions, LossReduction, Tensor } from "@limbeck/limbeck";
import {
  forwardKl,
  jsd,
  reverseKl,
  Scope,
  skewForwardKl,
  skewReverseKl,
  Tape,
  tensor,
  totalVariation,
} from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";
import { largestError } from "./compare.ts";
import { random } from "./op.ts";

/** A batch of rows, flat, or class indices. */
export type Numbers = ArrayLike<number>;

// weight·x, where 0·∞ = 0
const times = (weight: number, x: number) => weight === 0 ? 0 : weight * x;

/** The rows of a flat batch. */
export function rowsOf(x: Numbers, columns: number): number[][] {
  return Array.from(
    { length: x.length / columns },
    (_, r) => Array.from({ length: columns }, (_, c) => x[r * columns + c]),
  );
}

/** log softmax of one row. */
export function logSoftmax(x: readonly number[]): { log: number[]; lse: number } {
  const most = x.reduce((a, b) => Math.max(a, b), -Infinity), first = x.indexOf(most);
  const rest = x.reduce((sum, v, c) => c === first ? sum : sum + Math.exp(v - most), 0);
  const logSum = Math.log1p(rest);
  return { log: x.map((v) => v - most - logSum), lse: most + logSum };
}

/** Gradients of a reduction's rows: `upstream` is one number, or one per row for `none`. */
const upstreamOf = (upstream: Numbers, row: number) => upstream[upstream.length === 1 ? 0 : row];

/** Rows that are scaled already become the loss: for `none` themselves. */
const reduced = (rows: number[], reduction: LossReduction) =>
  reduction === "none" ? rows : [rows.reduce((a, b) => a + b, 0)];

/** Options of `crossEntropy` with plain numbers. */
export type CrossEntropyNumbers =
  & Pick<CrossEntropyOptions, "reduction" | "ignoreIndex" | "labelSmoothing" | "zLoss" | "softcap" | "temperature">
  & { weight?: number[] };

/** The results of `crossEntropy`. */
export interface CrossEntropyReference {
  loss: number[];
  dLogits: number[];
  zLoss: number[];
  /** The share of kept rows whose prediction is right; class indices only. */
  accuracy: number;
  predictions: number[];
}

/** Cross-entropy with class indices, or, with `soft`, with probabilities: then `target` is as long as the logits. */
export function crossEntropy(
  logits: Numbers,
  target: Numbers,
  columns: number,
  o: CrossEntropyNumbers & { soft?: boolean } = {},
  upstream: Numbers = [1],
): CrossEntropyReference {
  const { reduction = "mean", ignoreIndex = -100, labelSmoothing: smoothing = 0, zLoss = 0, softcap, temperature = 1 } =
    o;
  const weight = o.weight ?? Array(columns).fill(1), V = columns, soft = o.soft ?? false;
  const all = rowsOf(logits, V), targets = soft ? rowsOf(target, V) : [];
  const kept = all.map((_, r) => soft || target[r] !== ignoreIndex);
  const count = kept.filter(Boolean).length;
  const weights = kept.reduce((sum, k, r) => k ? sum + (soft ? 1 : weight[target[r]]) : sum, 0);
  const inverse = (n: number) => reduction !== "mean" ? 1 : n === 0 ? 0 : 1 / n;
  const losses: number[] = [], zs: number[] = [], dLogits: number[] = [], predictions: number[] = [];
  let hits = 0;
  all.forEach((row, r) => {
    predictions.push(row.indexOf(row.reduce((a, b) => Math.max(a, b), -Infinity)));
    if (!kept[r]) {
      losses.push(0);
      zs.push(0);
      row.forEach(() => dLogits.push(0));
      return;
    }
    const u = row.map((v) => v / temperature / (softcap ?? 1));
    const { log, lse } = logSoftmax(softcap ? u.map((v) => softcap * Math.tanh(v)) : u);
    const chain = u.map((v) => (softcap ? 1 / Math.cosh(v) ** 2 : 1) / temperature);
    // w·t' by class: the factor of each −log prob
    const mass = row.map((_, c) =>
      soft
        ? weight[c] * ((1 - smoothing) * targets[r][c] + smoothing / V)
        : (c === target[r] ? (1 - smoothing) * weight[c] : 0) + smoothing / V * weight[c]
    );
    const total = mass.reduce((a, b) => a + b, 0);
    const z = zLoss * lse * lse * inverse(count);
    zs.push(z);
    losses.push(mass.reduce((sum, m, c) => sum + times(m, -log[c]), 0) * inverse(weights) + z);
    if (!soft && predictions[r] === target[r]) hits++;
    const up = upstreamOf(upstream, r);
    row.forEach((_, c) => {
      const probability = Math.exp(log[c]);
      // if one class has nearly all the mass, −expm1(log prob) keeps the digits of its 1 − prob
      const only = mass[c] === total && total !== 0;
      const main = (only ? total * Math.expm1(log[c]) : total * probability - mass[c]) * inverse(weights);
      dLogits.push(up * (main + 2 * zLoss * lse * probability * inverse(count)) * chain[c]);
    });
  });
  return {
    loss: reduced(losses, reduction),
    zLoss: reduced(zs, reduction),
    dLogits,
    predictions,
    accuracy: hits / count,
  };
}

/** Options of a divergence with plain numbers. */
export interface DivergenceNumbers {
  temperature?: number;
  reduction?: LossReduction;
  labels?: Numbers;
  ignoreIndex?: number;
  beta?: number;
  normalize?: boolean;
  alpha?: number;
}

/** The results of a divergence. */
export interface DivergenceReference {
  loss: number[];
  dStudent: number[];
  dTeacher: number[];
}

interface RowDivergence {
  value: number;
  student: number[];
  teacher: number[];
}

/** One row at T = 1: the value, and the gradients with respect to both sides' logits. */
function rowDivergence(name: DivergenceName, s: number[], t: number[], o: DivergenceNumbers): RowDivergence {
  const { beta = 0.5, alpha = 0.1, normalize = false } = o;
  const { log: X } = logSoftmax(s), { log: Y } = logSoftmax(t), q = X.map(Math.exp), p = Y.map(Math.exp);
  const sum = (f: (c: number) => number) => s.reduce((total, _, c) => total + f(c), 0);
  const each = (f: (c: number) => number) => s.map((_, c) => f(c));
  // w·(h − E_w h)
  const centred = (w: number[], h: (c: number) => number) => {
    const expected = sum((c) => times(w[c], h(c)));
    return each((c) => times(w[c], h(c) - expected));
  };
  // Σ a·log(a/b) from x = log(b/a): if all x are small, as Σ a·(eˣ − 1 − x), which adds Σb − Σa = 0, and whose terms cannot cancel
  const relative = (a: number[], x: number[]) =>
    x.every((v) => Math.abs(v) < 1) ? sum((c) => a[c] * (Math.expm1(x[c]) - x[c])) : sum((c) => -times(a[c], x[c]));
  const d = each((c) => X[c] - Y[c]), minusD = d.map((v) => -v);
  const forward = (): RowDivergence => ({
    value: relative(p, d),
    student: each((c) => q[c] - p[c]),
    teacher: centred(p, (c) => minusD[c]),
  });
  const reverse = (): RowDivergence => ({
    value: relative(q, minusD),
    student: centred(q, (c) => d[c]),
    teacher: each((c) => p[c] - q[c]),
  });
  // m = b·p + (1−b)·q, log(m/p), log(m/q): log1p keeps the digits of close rows
  const mix = (b: number) => ({
    m: each((c) => b * p[c] + (1 - b) * q[c]),
    byP: each((c) =>
      Math.abs(d[c]) < 1 ? Math.log1p((1 - b) * Math.expm1(d[c])) : Math.log(b * p[c] + (1 - b) * q[c]) - Y[c]
    ),
    byQ: each((c) =>
      Math.abs(d[c]) < 1 ? Math.log1p(b * Math.expm1(-d[c])) : Math.log(b * p[c] + (1 - b) * q[c]) - X[c]
    ),
  });
  // −log(m/w) + (1−b)·x/(1+x) from log(m/w) and x = m/w − 1, where b is the other side's weight: of second order in b
  const second = (log: number, x: number, b: number) =>
    Math.abs(x) < 1e-3
      ? x * x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x / 5))) - x * (x + b) / (1 + x)
      : -log + (1 - b) * x / (1 + x);
  switch (name) {
    case "forwardKl":
      return forward();
    case "reverseKl":
      return reverse();
    case "jsd": {
      if (beta === 0) return forward();
      if (beta === 1) return reverse();
      const { byP, byQ } = mix(beta), f = normalize ? 1 / (beta * (1 - beta)) : 1;
      return {
        value: f * (beta * relative(p, byP) + (1 - beta) * relative(q, byQ)),
        student: centred(q, (c) => -byQ[c]).map((g) => f * (1 - beta) * g),
        teacher: centred(p, (c) => -byP[c]).map((g) => f * beta * g),
      };
    }
    case "skewForwardKl": {
      if (alpha === 0) return forward();
      const { m, byP } = mix(alpha), b = 1 - alpha;
      return {
        value: relative(p, byP),
        student: centred(q, (c) => (1 - alpha) ** 2 * (q[c] - p[c]) / m[c]),
        teacher: centred(p, (c) => second(byP[c], b * Math.expm1(d[c]), b)),
      };
    }
    case "skewReverseKl": {
      if (alpha === 0) return reverse();
      const b = 1 - alpha, { m, byQ } = mix(b);
      return {
        value: relative(q, byQ),
        student: centred(q, (c) => second(byQ[c], b * Math.expm1(-d[c]), b)),
        teacher: centred(p, (c) => (1 - alpha) ** 2 * (p[c] - q[c]) / m[c]),
      };
    }
    case "totalVariation":
      return {
        value: sum((c) => Math.abs(p[c] - q[c]) / 2),
        student: centred(q, (c) => Math.sign(q[c] - p[c]) / 2),
        teacher: centred(p, (c) => Math.sign(p[c] - q[c]) / 2),
      };
  }
}

/** A divergence of rows of student logits from rows of teacher logits. */
export function divergence(
  name: DivergenceName,
  student: Numbers,
  teacher: Numbers,
  columns: number,
  o: DivergenceNumbers = {},
  upstream: Numbers = [1],
): DivergenceReference {
  const { temperature: T = 1, reduction = "mean", labels, ignoreIndex = -100 } = o;
  const teachers = rowsOf(teacher, columns), students = rowsOf(student, columns);
  const kept = students.map((_, r) => labels === undefined || labels[r] !== ignoreIndex);
  const count = kept.filter(Boolean).length, scale = reduction === "mean" ? 1 / Math.max(count, 1) : 1;
  const rows: number[] = [], dStudent: number[] = [], dTeacher: number[] = [];
  students.forEach((s, r) => {
    const { value, student, teacher } = kept[r]
      ? rowDivergence(name, s.map((v) => v / T), teachers[r].map((v) => v / T), o)
      : { value: 0, student: s.map(() => 0), teacher: s.map(() => 0) };
    rows.push(value * scale);
    const factor = scale / T * upstreamOf(upstream, r);
    for (const g of student) dStudent.push(g * factor);
    for (const g of teacher) dTeacher.push(g * factor);
  });
  return { loss: reduced(rows, reduction), dStudent, dTeacher };
}

/** Options of `distillation` with plain numbers. */
export interface DistillationNumbers extends Omit<DivergenceNumbers, "labels"> {
  divergence?: DivergenceName;
  skewAlpha?: number;
  temperatureSquared?: boolean;
  dropIgnored?: boolean;
}

/** α·CE + (1−α)·T²·divergence and its parts. */
export function distillation(
  student: Numbers,
  teacher: Numbers,
  labels: Numbers,
  columns: number,
  o: DistillationNumbers = {},
  upstream: Numbers = [1],
): DivergenceReference & { crossEntropy: number[]; divergence: number[] } {
  const { alpha = 0.5, temperature = 2, reduction = "mean", ignoreIndex = -100, temperatureSquared = true } = o;
  const scale = (1 - alpha) * (temperatureSquared ? temperature ** 2 : 1);
  const ce = crossEntropy(student, labels, columns, { reduction, ignoreIndex }, upstream);
  const other = divergence(o.divergence ?? "forwardKl", student, teacher, columns, {
    temperature,
    reduction,
    ignoreIndex,
    labels: o.dropIgnored ? labels : undefined,
    beta: o.beta,
    alpha: o.skewAlpha,
  }, upstream);
  const factor = o.normalize && o.divergence === "jsd" && o.beta !== 0 && o.beta !== 1
    ? 1 / ((o.beta ?? 0.5) * (1 - (o.beta ?? 0.5)))
    : 1;
  return {
    loss: ce.loss.map((v, i) => times(alpha, v) + scale * factor * other.loss[i]),
    crossEntropy: ce.loss,
    divergence: other.loss.map((v) => factor * v),
    dStudent: ce.dLogits.map((v, i) => alpha * v + scale * factor * other.dStudent[i]),
    dTeacher: other.dTeacher.map((v) => scale * factor * v),
  };
}

/** A head's logits, and the gradients of its inputs. */
export class Head {
  readonly logits: number[];
  constructor(
    readonly hidden: Numbers,
    readonly weight: Numbers,
    readonly depth: number,
    readonly bias: Numbers | undefined = undefined,
  ) {
    const h = rowsOf(hidden, depth), w = rowsOf(weight, depth);
    this.logits = h.flatMap((x) => w.map((y, c) => x.reduce((sum, v, d) => sum + v * y[d], bias?.[c] ?? 0)));
  }

  backward(dLogits: Numbers): { dHidden: number[]; dWeight: number[]; dBias: number[] } {
    const { depth } = this, h = rowsOf(this.hidden, depth), w = rowsOf(this.weight, depth);
    const d = rowsOf(dLogits, w.length), over = Array.from({ length: depth }, (_, k) => k);
    return {
      dHidden: d.flatMap((row) => over.map((k) => row.reduce((sum, g, c) => sum + g * w[c][k], 0))),
      dWeight: w.flatMap((_, c) => over.map((k) => d.reduce((sum, row, r) => sum + row[c] * h[r][k], 0))),
      dBias: w.map((_, c) => d.reduce((sum, row) => sum + row[c], 0)),
    };
  }
}

// ---- comparisons

/** The largest deviation of any row, relative to that row's largest number (at least `floor`). Infinities and NaN must be equal. */
export function rowError(got: Numbers, want: Numbers, columns: number, floor = 0): number {
  if (got.length !== want.length) return Infinity;
  const wanted = rowsOf(want, columns);
  return rowsOf(got, columns).reduce((worst, row, r) => Math.max(worst, largestError(row, wanted[r], floor)), 0);
}

/** Normal random numbers from a seed, rounded to f32, so that kernels and references get the same numbers. */
export function normals(count: number, deviation: number, seed: number): number[] {
  const draw = random(seed);
  return Array.from(
    { length: count },
    () => Math.fround(deviation * Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw())),
  );
}

/** Random integers in [0, below) from a seed. */
export function integers(count: number, below: number, seed: number): number[] {
  const draw = random(seed);
  return Array.from({ length: count }, () => Math.floor(below * draw()));
}

/** Class indices as a tensor. */
export const labelsOf = (labels: readonly number[], shape?: number[]): Tensor => tensor(Int32Array.from(labels), shape);

/** Runs `check` with so many vec4s of a row in each of 8 threads' registers: by default two, which are up to 64 columns, and none, where loops read the row again. */
export async function underAllPlans(check: (plan: string) => Promise<void>, all: number[] = [2, 0]): Promise<void> {
  try {
    for (const quads of all) {
      overrides.rows = { threads: 8, quads }; // one subgroup, which software Vulkan compiles fastest
      await check(`${quads} vec4s`);
    }
  } finally {
    overrides.rows = null;
  }
}

/** Every combination with one of the choices for each key. */
export function combinations<T extends Record<string, readonly unknown[]>>(
  choices: T,
): { [K in keyof T]: T[K][number] }[] {
  return Object.entries(choices).reduce(
    (all, [name, values]) => all.flatMap((o) => values.map((v) => ({ ...o, [name]: v }))),
    [{}] as Record<string, unknown>[],
  ) as { [K in keyof T]: T[K][number] }[];
}

/**
 * The elements of an f16 gradient that are not the float64 ones rounded once: off by more than 2⁻¹¹ of themselves, half the smallest
 * step, plus `arithmetic` times the row's largest.
 */
export function f16Errors(got: Numbers, want: Numbers, columns: number, arithmetic: number): string[] {
  return rowsOf(want, columns).flatMap((row, r) => {
    const most = row.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    return row.flatMap((w, c) => {
      const g = got[r * columns + c], bound = 2 ** -11 * Math.abs(w) + 2 ** -25 + arithmetic * most;
      return Math.abs(g - w) <= bound ? [] : [`[${r}, ${c}] is ${g}, not ${w}`];
    });
  });
}

/** Throws with a list of the errors above their limits, from `[name, error, limit]`. */
export function assertSmall(errors: Iterable<readonly [name: string, error: number, limit: number]>): void {
  const wrong = Array.from(errors).filter(([, error, limit]) => !(error <= limit));
  assertEquals(
    wrong.map(([name, error, limit]) => `${name} is off by ${error.toExponential(1)}, at most ${limit}`),
    [],
  );
}

/** Values with their shape: an input of `measure`. */
export interface Input {
  values: Numbers;
  shape: readonly number[];
  dtype?: "f32" | "f16";
  /** False for an input without a gradient. */
  requiresGrad?: boolean;
}

/** An op's value and its inputs' gradients. */
export async function measure(
  op: (...x: Tensor[]) => Tensor,
  inputs: readonly Input[],
  upstream?: readonly number[],
): Promise<{ loss: number[]; gradients: number[][] }> {
  using _scope = new Scope();
  const leaves = inputs.map(({ values, shape, dtype = "f32", requiresGrad = true }) =>
    tensor(Array.from(values), shape, { dtype, requiresGrad })
  );
  using _tape = new Tape();
  const y = op(...leaves);
  y.backward(upstream && tensor(Float32Array.from(upstream), y.shape));
  const [loss, ...gradients] = await Promise.all(
    [y, ...leaves.map((x) => x.grad)].map((x) => x ? x.data() : Promise.resolve(new Float32Array())),
  );
  return { loss: Array.from(loss), gradients: gradients.map((g) => Array.from(g)) };
}

// ---- the divergences

type Op = (student: Tensor, teacher: Tensor, options?: DivergenceOptions) => Tensor;
export const DIVERGENCES: Record<DivergenceName, Op> = {
  forwardKl,
  reverseKl,
  jsd,
  skewForwardKl,
  skewReverseKl,
  totalVariation,
};
export const DIVERGENCE_NAMES = Object.keys(DIVERGENCES) as DivergenceName[];

// Shares of the largest number of the loss and of each row's gradient: some 15 and 80 roundings of f32 (6e-8).
export const VALUE = 1e-6, GRADIENT = 5e-6;

/** The op's options from plain numbers. */
export function gpuOptions({ labels, ...o }: DivergenceNumbers): DivergenceOptions {
  const given = Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined));
  return labels ? { ...given, labels: labelsOf(Array.from(labels)) } : given;
}

/** One divergence of rows of V classes. */
export interface Rows {
  what: string;
  name: DivergenceName;
  student: number[];
  teacher: number[];
  V: number;
  o?: DivergenceNumbers;
  upstream?: number[];
  /** Limits, and the floors of `rowError`. */
  value?: number;
  gradient?: number;
  valueFloor?: number;
  floor?: number;
}

/** How far value and gradients are from the reference, for `assertSmall`. */
export async function deviations(
  { what, name, student, teacher, V, o = {}, upstream, value = VALUE, gradient = GRADIENT, valueFloor, floor }: Rows,
): Promise<[string, number, number][]> {
  const inputs = [student, teacher].map((values) => ({ values, shape: [values.length / V, V] }));
  const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t, gpuOptions(o)), inputs, upstream);
  const want = divergence(name, student, teacher, V, o, upstream);
  return [
    [`${what}: loss`, rowError(loss, want.loss, 1, valueFloor), value],
    [`${what}: dStudent`, rowError(gradients[0], want.dStudent, V, floor), gradient],
    [`${what}: dTeacher`, rowError(gradients[1], want.dTeacher, V, floor), gradient],
  ];
}
