import { assert, assertEquals, assertStrictEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  crossEntropyOfDistributions,
  distillation,
  type DistillationOptions,
  type DivergenceName,
  type DivergenceOptions,
  entropy,
  forwardKl,
  full,
  init,
  jsd,
  reverseKl,
  Scope,
  skewForwardKl,
  skewReverseKl,
  Tape,
  type Tensor,
  tensor,
  totalVariation,
  zeros,
} from "@limbeck/limbeck";
import {
  assertSmall,
  combinations,
  deviations,
  distillation as distillationReference,
  type DistillationNumbers,
  divergence as reference,
  DIVERGENCE_NAMES,
  type DivergenceNumbers,
  DIVERGENCES,
  f16Errors,
  gpuOptions,
  GRADIENT,
  integers,
  labelsOf,
  measure,
  normals,
  rowError,
  underAllPlans,
  VALUE,
} from "../testing/loss_reference.ts";
import { assertAllThrow, checkValues } from "../testing/op.ts";
import { differences } from "../testing/reference.ts";

type Pair = (student: Tensor, teacher: Tensor) => Tensor;
const REDUCTIONS = ["mean", "sum", "none"] as const;

const ROWS = 5, CLASSES = 7, SHAPE = [ROWS, CLASSES];
const STUDENT = normals(ROWS * CLASSES, 2, 1), TEACHER = normals(ROWS * CLASSES, 2, 2);
const LABELS = [3, -100, 6, 0, -100], UPSTREAM = [0.5, -2, 3, 1, 0.25];
const BOTH = [{ values: STUDENT, shape: SHAPE }, { values: TEACHER, shape: SHAPE }];

/** What each divergence has options for. */
const OWN: Record<DivergenceName, readonly DivergenceNumbers[]> = {
  forwardKl: [{}],
  reverseKl: [{}],
  jsd: combinations({ beta: [undefined, 0, 0.1, 0.7, 1], normalize: [false, true] }),
  skewForwardKl: combinations({ alpha: [undefined, 0, 0.5, 0.9] }),
  skewReverseKl: combinations({ alpha: [undefined, 0, 0.5, 0.9] }),
  totalVariation: [{}],
};

const text = (o: object) => JSON.stringify(o);

/** Every divergence with every combination of its options. */
const CASES: [DivergenceName, DivergenceNumbers][] = DIVERGENCE_NAMES.flatMap((name) =>
  OWN[name].flatMap((own) =>
    combinations({ temperature: [1, 0.5, 4], reduction: REDUCTIONS, labels: [undefined, LABELS] })
      .map((o): [DivergenceName, DivergenceNumbers] => [name, { ...own, ...o }])
  )
);

Deno.test("divergences: the references' gradients are those of their values", () => {
  for (const [name, o] of CASES) {
    const s = [...STUDENT], t = [...TEACHER], upstream = o.reduction === "none" ? UPSTREAM : [1.5];
    const weighed = () => reference(name, s, t, CLASSES, o).loss.reduce((sum, v, i) => sum + v * upstream[i], 0);
    const want = reference(name, s, t, CLASSES, o, upstream);
    for (const [x, gradient] of [[s, want.dStudent], [t, want.dTeacher]]) {
      assert(rowError(gradient, differences(weighed, x), x.length, 1e-3) < 1e-7, `${name} ${text(o)}`);
    }
  }
});

Deno.test("divergences: true values", async () => {
  await init();
  const logs = (...p: number[]) => tensor([p.map(Math.log)]);
  const P = logs(0.9, 0.1), Q1 = logs(0.6, 0.4), Q2 = logs(0.99, 0.01);
  const table: [name: string, got: Tensor, want: number][] = [
    ["KL(P‖Q1)", forwardKl(Q1, P), 0.226289],
    ["KL(P‖Q2)", forwardKl(Q2, P), 0.144479],
    ["KL(Q1‖P)", reverseKl(Q1, P), 0.311239],
    ["KL(Q2‖P)", reverseKl(Q2, P), 0.071331],
    ["JSD(P, Q1)", jsd(Q1, P), 0.0632878],
    ["TVD(P, Q1)", totalVariation(Q1, P), 0.3],
  ];
  // as many digits as they are written with
  for (const [name, got, want] of table) assert(Math.abs(await got.item() - want) < 6e-7, name);
});

Deno.test("divergences: every combination of options", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const classes of [CLASSES, 131]) { // few, which are computed with care, and many, where most rows need none
    const [student, teacher] = classes === CLASSES
      ? [STUDENT, TEACHER]
      : [5, 6].map((seed) => normals(ROWS * classes, 1, seed));
    student.forEach((x, i) => {
      if (classes > CLASSES && i % 2 < 1) teacher[i] += x;
    }); // some are nearer than others
    const inputs = [student, teacher].map((values) => ({ values, shape: [ROWS, classes] }));
    for (const [name, o] of CASES) {
      const upstream = o.reduction === "none" ? UPSTREAM : undefined, floor = classes === CLASSES ? 3e-2 : 1e-3;
      const want = reference(name, student, teacher, classes, o, upstream);
      const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t, gpuOptions(o)), inputs, upstream);
      const what = `${name} ${text(o)}, ${classes} classes`;
      // terms that cancel are of the size of |student − teacher|, not of the loss
      const least = classes === CLASSES ? 2e-2 : 0.1;
      errors.push([`${what}: loss`, rowError(loss, want.loss, loss.length, least), VALUE]);
      errors.push([`${what}: dStudent`, rowError(gradients[0], want.dStudent, classes, floor), GRADIENT]);
      errors.push([`${what}: dTeacher`, rowError(gradients[1], want.dTeacher, classes, floor), GRADIENT]);
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: identical rows give exactly 0", async () => {
  await init();
  const I = Infinity, V = 9;
  const rows = [
    ...Array.from({ length: 4 }, (_, i) => normals(V, 10 ** (i - 1), i)),
    [1e4, -1e4, 1e4, 0, 1, -1e4, 9999, 3, 4],
    [-1e4, -1e4, -1e4, -1e4, -1e4, -1e4, -1e4, -1e4, -1e4],
    [-I, 1, -I, 2, 3, -I, 1e4, -1e4, 0.5],
    [-I, -I, -I, -I, 7, -I, -I, -I, -I],
  ];
  const x = { values: rows.flat(), shape: [rows.length, V] };
  await underAllPlans(async (plan) => {
    for (const name of DIVERGENCE_NAMES) {
      for (const own of OWN[name]) {
        for (const temperature of [0.05, 0.3, 1, 7, 100]) {
          const o = gpuOptions({ ...own, temperature, reduction: "sum" });
          const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t, o), [x, x]);
          const what = `${name} ${text(o)} ${plan}`;
          assertEquals(loss.filter((v) => v !== 0), [], what);
          for (const g of gradients) assertEquals(g.filter((v) => v !== 0), [], what);
        }
      }
    }
  });
});

/** The same from primitive ops, by the textbook. */
const TEXTBOOK: Record<DivergenceName, (s: Tensor, t: Tensor, temperature?: number, share?: number) => Tensor> = {
  forwardKl: (s, t, T = 1) => kl(t.div(T), s.div(T).logSoftmax()),
  reverseKl: (s, t, T = 1) => kl(s.div(T), t.div(T).logSoftmax()),
  jsd: (s, t, T = 1, beta = 0.5) => {
    const m = mixed(t.div(T), s.div(T), beta).log();
    return kl(t.div(T), m).mul(beta).add(kl(s.div(T), m).mul(1 - beta));
  },
  skewForwardKl: (s, t, T = 1, alpha = 0.1) => kl(t.div(T), mixed(t.div(T), s.div(T), alpha).log()),
  skewReverseKl: (s, t, T = 1, alpha = 0.1) => kl(s.div(T), mixed(s.div(T), t.div(T), alpha).log()),
  totalVariation: (s, t, T = 1) => s.div(T).softmax().sub(t.div(T).softmax()).abs().sum({ dim: -1 }).mul(0.5),
};
const kl = (a: Tensor, logB: Tensor) => a.softmax().mul(a.logSoftmax().sub(logB)).sum({ dim: -1 });
const mixed = (a: Tensor, b: Tensor, share: number) => a.softmax().mul(share).add(b.softmax().mul(1 - share));

Deno.test("divergences: equal their twins of primitive ops", async () => {
  await init();
  const mask = tensor(LABELS.map((y) => y === -100 ? 0 : 1)), kept = LABELS.filter((y) => y !== -100).length;
  for (const name of DIVERGENCE_NAMES) {
    const twin = TEXTBOOK[name], op = DIVERGENCES[name];
    const share = name === "jsd" ? { beta: 0.2 } : name.startsWith("skew") ? { alpha: 0.2 } : {};
    const twins: [string, Pair, Pair, number[]?][] = [
      ["mean", (s, t) => op(s, t), (s, t) => twin(s, t).mean()],
      ["sum", (s, t) => op(s, t, { reduction: "sum" }), (s, t) => twin(s, t).sum()],
      ["none", (s, t) => op(s, t, { reduction: "none" }), (s, t) => twin(s, t), UPSTREAM],
      ["temperature", (s, t) => op(s, t, { temperature: 3 }), (s, t) => twin(s, t, 3).mean()],
      ["share", (s, t) => op(s, t, share as DivergenceOptions), (s, t) => twin(s, t, 1, 0.2).mean()],
      ["labels", (s, t) => op(s, t, { labels: labelsOf(LABELS) }), (s, t) => twin(s, t).mul(mask).sum().div(kept)],
    ];
    if (name === "jsd") {
      twins.push(["normalize", (s, t) => jsd(s, t, { normalize: true }), (s, t) => twin(s, t).mean().mul(4)]);
    }
    for (const [what, fused, composed, upstream] of twins) {
      const a = await measure(fused, BOTH, upstream), b = await measure(composed, BOTH, upstream);
      // two f32 ways of the same sum: the composed one takes differences of logarithms of size 5, good to 5·6e-8 in all
      assert(rowError(a.loss, b.loss, a.loss.length) <= 4 * VALUE, `${name} ${what}: ${a.loss} ${b.loss}`);
      for (const i of [0, 1]) {
        const error = rowError(a.gradients[i], b.gradients[i], CLASSES, 1e-2);
        assert(error <= 4 * GRADIENT, `${name} ${what}: gradient ${i} is off by ${error}`);
      }
    }
  }
});

Deno.test("divergences: close rows are right to 1e-3, where the textbook is not", async () => {
  await init();
  const V = 63, rows = 4, shape = [rows, V], teacher = normals(rows * V, 2, 5), noise = normals(rows * V, 1, 6);
  const table: Record<string, Record<string, string>> = {};
  for (const name of DIVERGENCE_NAMES) {
    for (const delta of [1e-3, 1e-5]) {
      const student = teacher.map((t, i) => Math.fround(t + delta * noise[i]));
      const inputs = [{ values: student, shape }, { values: teacher, shape }], up = [1, 1, 1, 1];
      const want = reference(name, student, teacher, V, { reduction: "none" }, up);
      const off = async (f: (s: Tensor, t: Tensor) => Tensor) => {
        const { loss, gradients: [dStudent, dTeacher] } = await measure(f, inputs, up);
        return [
          rowError(loss, want.loss, 1),
          Math.max(rowError(dStudent, want.dStudent, V), rowError(dTeacher, want.dTeacher, V)),
        ];
      };
      const ours = await off((s, t) => DIVERGENCES[name](s, t, { reduction: "none" }));
      const textbook = await off((s, t) => TEXTBOOK[name](s, t));
      table[`${name}, ${delta} apart`] = Object.fromEntries(
        ["value", "gradient"].flatMap((what, i) => [
          [`${what}`, ours[i].toExponential(1)],
          [`${what}, textbook`, textbook[i].toExponential(1)],
        ]),
      );
      assert(Math.max(...ours) <= 1e-3, `${name}, ${delta} apart: ${ours}`);
      if (delta === 1e-5) assert(Math.max(...textbook) > 1e-3, `${name}: the textbook does as well: ${textbook}`);
    }
  }
  console.log("largest deviation from float64");
  console.table(table);
});

Deno.test("divergences: the ends of jsd and of the skews", async () => {
  await init();
  for (const reduction of REDUCTIONS) {
    for (const temperature of [1, 3]) {
      const o = { reduction, temperature }, up = reduction === "none" ? UPSTREAM : undefined;
      const [forward, reverse] = [
        await measure((s, t) => forwardKl(s, t, o), BOTH, up),
        await measure((s, t) => reverseKl(s, t, o), BOTH, up),
      ];
      for (const normalize of [false, true]) {
        assertEquals(await measure((s, t) => jsd(s, t, { ...o, beta: 0, normalize }), BOTH, up), forward);
        assertEquals(await measure((s, t) => jsd(s, t, { ...o, beta: 1, normalize }), BOTH, up), reverse);
      }
      assertEquals(await measure((s, t) => skewForwardKl(s, t, { ...o, alpha: 0 }), BOTH, up), forward);
      assertEquals(await measure((s, t) => skewReverseKl(s, t, { ...o, alpha: 0 }), BOTH, up), reverse);
      // J/β(1−β) leaves the KL by β·Σp²/2q and less: for these rows some 300β in the value, where f32 adds its own
      for (const [beta, end] of [[1e-6, forward], [1 - 2 ** -20, reverse]] as const) {
        const near = await measure((s, t) => jsd(s, t, { ...o, beta, normalize: true }), BOTH, up);
        const want = reference("jsd", STUDENT, TEACHER, CLASSES, { ...o, beta, normalize: true }, up);
        for (const [what, truth] of [["the end", end.loss], ["J", want.loss]] as const) {
          const error = rowError(near.loss, truth, near.loss.length);
          assert(error < 5e-4, `beta ${beta} is ${error} off ${what}`);
        }
        assert(rowError(near.gradients[0], want.dStudent, CLASSES) < GRADIENT, `beta ${beta}: dStudent`);
        assert(rowError(near.gradients[1], want.dTeacher, CLASSES) < GRADIENT, `beta ${beta}: dTeacher`);
      }
    }
  }
});

Deno.test("divergences: large logits and temperatures", async () => {
  await init();
  const teacher = [
    [1e4, -1e4, 0, 1, 2],
    [-1e4, 1e4, 1e4, 1e4 - 1, 9e3],
    [0, 1, 2, 3, 4],
    [-1e4, -1e4 + 2, -1e4 + 1, -1e4, -1e4 + 3],
    [1e4, -1e4, 0, 0, 0],
  ].flat();
  const student = [
    [-1e4, 1e4, 0, 1, 2],
    [-1e4, 1e4 + 3, 1e4 - 1, 1e4, 9e3],
    [1e4 + 1, 1e4, 1e4 + 3, 1e4 - 2, 1e4 + 4],
    [-1e4 + 1, -1e4, -1e4 + 3, -1e4 + 2.5, -1e4],
    [0, 0, 0, -1e4, 1e4],
  ].flat();
  const errors: [string, number, number][] = [];
  for (const name of DIVERGENCE_NAMES) {
    for (const temperature of [0.05, 0.5, 1, 7, 100]) {
      const o = { temperature, reduction: "none" as const }, what = `${name} at ${temperature}`;
      // 1/T is rounded: an exponent of size x is off by 1e-7·x; where both sides have mass, x is at most some 4/T here
      // (in the first row of T = 100 it is 200, but there q and p are e⁻¹⁰⁰ where they differ)
      const limit = 1e-6 / temperature, limits = { value: VALUE + limit, gradient: GRADIENT + limit };
      const floors = { valueFloor: 1e-3, floor: 5e-2 };
      errors.push(
        ...await deviations({ what, name, student, teacher, V: 5, o, upstream: UPSTREAM, ...limits, ...floors }),
      );
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: a level that one side has and the other has not costs no digits", async () => {
  await init();
  const V = 10, rows = 6, errors: [string, number, number][] = [];
  for (const [apart, level] of [[1e-5, 5], [1e-5, 100], [0.2, 20], [0.2, 1e4], [3, 4e7], [9, 1e9]]) {
    const student = normals(rows * V, 2, 5).map((x) => Math.fround(x + level)), noise = normals(rows * V, apart, 6);
    const teacher = student.map((x, i) => Math.fround(x - level + noise[i]));
    for (const name of DIVERGENCE_NAMES) {
      const what = `${name}, ${apart} apart on a level of ${level}`;
      errors.push(...await deviations({ what, name, student, teacher, V, o: { reduction: "sum" } }));
    }
  }
  assertSmall(errors);
});

Deno.test("KLs: a logit far above all others costs the other classes no digits", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const [V, huge] of [[9, 300], [9, 1e4], [131, 3000]]) {
    const [a, b] = [[1, -60], [2, huge]].map(([seed, x]) => normals(V, 1, seed).with(2, x));
    for (const [name, student, teacher] of [["forwardKl", b, a], ["reverseKl", a, b]] as const) {
      errors.push(...await deviations({ what: `${name}, ${huge}`, name, student, teacher, V }));
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: weights of the mixture near their ends, between rows that are as good as apart", async () => {
  await init();
  const student = tensor([[0, 60]]), teacher = tensor([[60, 0]]);
  for (const share of [1e-6, 1e-4, 1e-3]) {
    const want = -Math.log(share); // KL(p‖share·p)
    await checkValues(`skew ${share}`, skewForwardKl(student, teacher, { alpha: share }), [want], 1e-6);
    const jsdWant = (want - (1 - share) / share * Math.log1p(-share)) / (1 - share);
    await checkValues(`jsd ${share}`, jsd(student, teacher, { beta: share, normalize: true }), [jsdWant], 1e-6);
  }
});

Deno.test("divergences: gradients of mixtures with small weights, between rows that are as good as apart", async () => {
  await init();
  const { exp, log } = Math, errors: [string, number, number][] = [];
  for (const x of [60, 75, 85]) {
    const rows = [[x, 0], [0, x]].map((values) => ({ values, shape: [1, 2] })), rare = 1 / (1 + exp(x));
    for (const share of [1e-8, 1e-5, 1e-4, 3e-4, 1 - 1e-4, 1 - 1e-8]) {
      for (const name of ["jsd", "skewForwardKl", "skewReverseKl"] as const) {
        const beta = name === "skewReverseKl" ? 1 - share : share, alpha = 1 - beta;
        // of two classes the gradient is weight·rare·(1 − rare)·(h(d) − h(−d)), where nothing cancels
        const u = (d: number) => log(beta + alpha * exp(d)), v = (d: number) => log(beta * exp(-d) + alpha);
        const r = (d: number) => (exp(d) - 1) / (beta + alpha * exp(d));
        const [student, teacher] = {
          jsd: [(d: number) => -alpha * v(d), (d: number) => -beta * u(d)],
          skewForwardKl: [(d: number) => alpha ** 2 * r(d), (d: number) => -u(d) + beta * alpha * r(d)],
          skewReverseKl: [(d: number) => -v(d) - beta * alpha * r(d), (d: number) => -(beta ** 2) * r(d)],
        }[name].map((h) => rare * (1 - rare) * (h(x) - h(-x)));
        const own: DivergenceNumbers = name === "jsd" ? { beta } : { alpha: share };
        const { gradients } = await measure((s, t) => DIVERGENCES[name](s, t, gpuOptions(own)), rows);
        [student, teacher].forEach((want, i) => {
          if (Math.abs(want) < 1e-36) return; // next to the least normal number
          errors.push([`${name} ${share}, ${x}: ${i}`, rowError(gradients[i], [want, -want], 2), 163 * 2 ** -24]); // as exp errs
        });
      }
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: NaN, and a row without a class, make no number", async () => {
  await init();
  const teacher = tensor([[0, 1, 3]]);
  for (const name of DIVERGENCE_NAMES) {
    for (const [student, teacher] of [[[NaN, 1, 2], [0, 1, 3]], [[0, 1, 3], [NaN, 1, 2]]]) {
      const { gradients } = await measure(
        (s, t) => DIVERGENCES[name](s, t, gpuOptions(name === "jsd" ? { beta: 0.3 } : {})),
        [
          { values: student, shape: [1, 3] },
          { values: teacher, shape: [1, 3] },
        ],
      );
      for (const gradient of gradients) assert(gradient.every(Number.isNaN), `${name}: ${gradient}`);
    }
    for (const row of [[NaN, 1, 2], [-Infinity, -Infinity, -Infinity]]) {
      assertEquals(await DIVERGENCES[name](tensor([row]), teacher).item(), NaN, `${name} of ${row}`);
      assertEquals(await DIVERGENCES[name](teacher, tensor([row])).item(), NaN, `${name} from ${row}`);
    }
  }
});

Deno.test("totalVariation: classes of equal probability, in rows that are far apart and near", async () => {
  await init();
  for (const size of [2, 0.1]) {
    for (let seed = 0; seed < 6; seed++) {
      const student = normals(10, size, seed), teacher = [student[1], student[0], ...student.slice(2)], shape = [1, 10];
      const { gradients } = await measure((s, t) => totalVariation(s, t), [
        { values: student, shape },
        { values: teacher, shape },
      ]);
      const q = student.map(Math.exp), all = q.reduce((a, b) => a + b), h = 0.5 * Math.sign(q[0] - q[1]);
      const mean = h * (q[0] - q[1]) / all;
      const want = q.map((v, c) => v / all * ((c === 0 ? h : c === 1 ? -h : 0) - mean));
      assert(rowError(gradients[0], want, 10) <= GRADIENT, `${size}, ${seed}: ${gradients[0]}, not ${want}`);
    }
  }
});

Deno.test("divergences: −∞ in the student, in the teacher, in both", async () => {
  await init();
  const I = Infinity, A = [-I, 1, 0.5, 2, -1], B = [0.3, -0.5, 1, 0, 2], C = [-I, -0.5, 1, 0, 2];
  // by student and teacher: the value is finite in all but these
  const infinite: Record<string, DivergenceName[]> = { "A‖B": ["forwardKl"], "B‖A": ["reverseKl"], "A‖C": [] };
  const row = { A, B, C };
  for (const [pair, names] of Object.entries(infinite)) {
    const [student, teacher] = pair.split("‖").map((k) => row[k as "A"]);
    for (const name of DIVERGENCE_NAMES) {
      const want = reference(name, student, teacher, 5);
      assertEquals(want.loss[0] === I, names.includes(name), `${name} ${pair}`);
      // where the value is +∞ one side's gradient is still finite: that of the side without logarithms in its gradient
      const wanted = want.loss[0] < I ? [true, true] : [name === "forwardKl", name === "reverseKl"];
      const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t), [
        { values: student, shape: [1, 5], requiresGrad: wanted[0] },
        { values: teacher, shape: [1, 5], requiresGrad: wanted[1] },
      ]);
      assert(rowError(loss, want.loss, 1) <= VALUE, `${name} ${pair}: ${loss}, not ${want.loss}`);
      for (const [i, g] of [want.dStudent, want.dTeacher].entries()) {
        if (wanted[i]) assert(rowError(gradients[i], g, 5) <= GRADIENT, `${name} ${pair}: ${gradients[i]}, not ${g}`);
      }
    }
  }
  for (const op of [skewForwardKl, skewReverseKl]) { // at α = 1 of a side from itself
    for (const both of [[A, B], [B, A]]) {
      const sides = both.map((values) => ({ values, shape: [1, 5] }));
      const { loss, gradients } = await measure((s, t) => op(s, t, { alpha: 1 }), sides);
      const all = [loss, ...gradients].flatMap((x) => Array.from(x));
      assert(all.every((x) => x === 0), `${op.name}: ${all}`);
    }
  }
});

Deno.test("divergences: a probability that underflows is no −∞", async () => {
  await init();
  // p > 0 where q is e⁻³⁰⁰: the logarithm is there though the probability is not
  const student = [0, -300], teacher = [0, 0], want = reference("forwardKl", student, teacher, 2);
  assert(rowError([await forwardKl(tensor([student]), tensor([teacher])).item()], want.loss, 1) <= VALUE);
  assert(rowError([await reverseKl(tensor([teacher]), tensor([student])).item()], want.loss, 1) <= VALUE);
});

Deno.test("divergences: shapes, no row, no kept row, one class", async () => {
  await init();
  for (const name of DIVERGENCE_NAMES) {
    const op = DIVERGENCES[name], want = reference(name, STUDENT.slice(0, 7), TEACHER.slice(0, 7), CLASSES);
    const one = await measure((s, t) => op(s, t, { labels: labelsOf([5], []) }), [
      { values: STUDENT.slice(0, 7), shape: [7] },
      { values: TEACHER.slice(0, 7), shape: [7] },
    ]);
    assert(rowError(one.loss, want.loss, 1) <= VALUE, name);
    assert(rowError(one.gradients[0], want.dStudent, CLASSES) <= GRADIENT, name);
    const cube = op(tensor(STUDENT.slice(7), [2, 2, 7]), tensor(TEACHER.slice(7), [2, 2, 7]), { reduction: "none" });
    assertEquals(cube.shape, [2, 2]);
    const rows = reference(name, STUDENT.slice(7), TEACHER.slice(7), CLASSES, { reduction: "none" });
    assert(rowError(await cube.data(), rows.loss, 4) <= VALUE, name);
    for (const reduction of REDUCTIONS) {
      const none = reduction === "none";
      const empty = { values: [], shape: [0, 3] };
      assertEquals(
        await measure((s, t) => op(s, t, { reduction }), [empty, empty], none ? [] : undefined),
        { loss: none ? [] : [0], gradients: [[], []] },
      );
      const dropped = labelsOf([9, 9, 9, 9, 9]), zeros = Array(ROWS * CLASSES).fill(0);
      assertEquals(
        await measure(
          (s, t) => op(s, t, { reduction, labels: dropped, ignoreIndex: 9 }),
          BOTH,
          none ? UPSTREAM : undefined,
        ),
        { loss: none ? Array(ROWS).fill(0) : [0], gradients: [zeros, zeros] },
        `${name} ${reduction}`,
      );
    }
    const single = await measure((s, t) => op(s, t), [{ values: [1e4, 2], shape: [2, 1] }, {
      values: [-3, 7],
      shape: [2, 1],
    }]);
    assert([...single.loss, ...single.gradients.flat()].every((v) => v === 0), `${name}: ${text(single)}`);
  }
});

Deno.test("divergences: the upstream gradient, two losses on a tape, two tapes, unchanged logits", async () => {
  await init();
  for (const name of DIVERGENCE_NAMES) {
    for (const reduction of ["mean", "sum"] as const) {
      for (const up of [2, 0, -1]) {
        const want = reference(name, STUDENT, TEACHER, CLASSES, { reduction }, [up]);
        const { gradients } = await measure((s, t) => DIVERGENCES[name](s, t, { reduction }), BOTH, [up]);
        assert(rowError(gradients[0], want.dStudent, CLASSES, 1e-3) <= GRADIENT, `${name} ${reduction} ${up}`);
        assert(rowError(gradients[1], want.dTeacher, CLASSES, 1e-3) <= GRADIENT, `${name} ${reduction} ${up}`);
      }
    }
    const student = tensor(STUDENT, SHAPE, { requiresGrad: true }), teacher = tensor(TEACHER, SHAPE);
    const [first, second] = [
      reference(name, STUDENT, TEACHER, CLASSES),
      reference("reverseKl", STUDENT, TEACHER, CLASSES, {}, [3]),
    ];
    const both = first.dStudent.map((g, i) => g + second.dStudent[i]);
    for (const times of [1, 2]) {
      using _tape = new Tape();
      DIVERGENCES[name](student, teacher).add(reverseKl(student, teacher).mul(3)).backward();
      const got = await student.grad!.data();
      assert(rowError(got, both.map((g) => times * g), CLASSES) <= GRADIENT, `${name}: ${times} tapes`);
    }
    assertEquals([await student.data(), await teacher.data()].map((x) => Array.from(x)), [STUDENT, TEACHER]);
    assertStrictEquals(teacher.grad, null);
    student.dispose();
    teacher.dispose();
  }
});

Deno.test("divergences: one tensor as student and teacher", async () => {
  await init();
  for (const name of DIVERGENCE_NAMES) {
    const { loss, gradients } = await measure((x) => DIVERGENCES[name](x, x.mul(1)), [{
      values: STUDENT,
      shape: SHAPE,
    }]);
    assert([...loss, ...gradients[0]].every((v) => v === 0), name);
    const same = await measure((x) => DIVERGENCES[name](x, x), [{ values: STUDENT, shape: SHAPE }]);
    assert([...same.loss, ...same.gradients[0]].every((v) => v === 0), name);
  }
});

Deno.test("divergences: f16 logits, one side or both", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const round = (x: number[]) => Array.from(Float16Array.from(x));
  const student = round(STUDENT), teacher = round(TEACHER);
  for (const name of ["forwardKl", "jsd", "skewReverseKl"] as const) {
    // the storage is the kernels' affair, not the formulas': some ops stand for all, since each pair is two pipelines
    const pairs = [["f16", "f16"], ["f16", "f32"], ["f32", "f16"]] as const;
    for (const [a, b] of name === "jsd" ? pairs : pairs.slice(0, 1)) {
      for (const reduction of a === b ? REDUCTIONS : ["mean"] as const) {
        const upstream = reduction === "none" ? UPSTREAM : [3];
        const want = reference(name, student, teacher, CLASSES, { reduction, temperature: 2 }, upstream);
        const { loss, gradients } = await measure(
          (s, t) => DIVERGENCES[name](s, t, { reduction, temperature: 2 }),
          [{ values: student, shape: SHAPE, dtype: a }, { values: teacher, shape: SHAPE, dtype: b }],
          upstream,
        );
        const what = `${name} ${a} ${b} ${reduction}`;
        assert(rowError(loss, want.loss, loss.length) <= VALUE, what);
        for (const [i, [dtype, g]] of ([[a, want.dStudent], [b, want.dTeacher]] as const).entries()) {
          if (dtype === "f16") {
            assertEquals(f16Errors(gradients[i], g, CLASSES, GRADIENT), [], `${what}: gradient ${i}`);
          } else assert(rowError(gradients[i], g, CLASSES, 1e-3) <= GRADIENT, `${what}: gradient ${i}`);
        }
      }
    }
    // exactly 0 in f16 too
    const same = await measure(
      (s, t) => DIVERGENCES[name](s, t),
      [0, 1].map(() => ({
        values: student,
        shape: SHAPE,
        dtype: "f16" as const,
      })),
    );
    assert([...same.loss, ...same.gradients.flat()].every((v) => v === 0), name);
  }
});

Deno.test("divergences: f16 gradients are scaled before they are rounded", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const rows = 4096, V = 8, shape = [rows, V];
  const round = (x: number[]) => Array.from(Float16Array.from(x));
  const student = round(normals(rows * V, 1, 3)), teacher = round(normals(rows * V, 1, 4));
  for (const name of ["forwardKl", "jsd"] as const) {
    const want = reference(name, student, teacher, V, {}, [1024]);
    const { gradients } = await measure((s, t) => DIVERGENCES[name](s, t), [
      { values: student, shape, dtype: "f16" },
      { values: teacher, shape, dtype: "f16", requiresGrad: false },
    ], [1024]);
    assertEquals(f16Errors(gradients[0], want.dStudent, V, GRADIENT), [], name);
    const small = want.dStudent.filter((g) => Math.abs(g) / 1024 < 2 ** -25);
    assert(small.length > 20, `${name}: only ${small.length} gradients would have become 0`);
  }
});

/** What a property test draws. */
const drawn = {
  rows: fc.integer({ min: 1, max: 5 }),
  columns: fc.nat(19).map((n) => 2 * n + 1), // odd ones share their pipelines
  seed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
  deviation: fc.constantFrom(0.01, 1, 5),
  /** How far the student is from the teacher. */
  apart: fc.constantFrom(1e-4, 0.1, 1, 4),
  temperature: fc.constantFrom(0.5, 1, 2, 3, 20),
  share: fc.constantFrom(0.01, 0.1, 0.5, 0.9),
  reduction: fc.constantFrom(...REDUCTIONS),
  dropped: fc.nat(6),
  shift: fc.constantFrom(-32, 64),
};

for (const name of DIVERGENCE_NAMES) {
  Deno.test(`${name}: property: value, gradients, bounds, identities`, async () => {
    await init();
    await fc.assert(
      fc.asyncProperty(fc.record(drawn), async (c) => {
        const { rows, columns, seed, share, temperature, reduction, dropped, shift } = c;
        const teacher = normals(rows * columns, c.deviation, seed), noise = normals(rows * columns, c.apart, seed + 1);
        const student = teacher.map((t, i) => Math.fround(t + noise[i]));
        const labels = Array.from({ length: rows }, (_, r) => r === dropped ? -100 : 0);
        const own = name === "jsd" ? { beta: share } : name.startsWith("skew") ? { alpha: share } : {};
        const shape = [rows, columns], up = normals(rows, 1, seed + 2);
        const run = (s: number[], t: number[], o: DivergenceNumbers, upstream?: number[]) =>
          measure(
            (a, b) => DIVERGENCES[name](a, b, gpuOptions(o)),
            [{ values: s, shape }, { values: t, shape }],
            upstream,
          );

        // the logarithms of p and q are off by a few steps of their size and 1/T is rounded; their difference by a few of its own
        const log = 2 ** -22 * 4 * (c.deviation + c.apart) / temperature;
        const gap = 2 ** -22 * (4 * c.apart / temperature) + (4 * c.apart / temperature > 0.25 ? 2 ** -21 : 0);
        const check = (got: number[], want: number[], n: number, what: string, relative: number, scale: number) =>
          assertSmall([[what, rowError(got, want, n, gap * scale / relative + 1e-30), relative]]);

        const o = { temperature, reduction, labels, ...own }, upstream = reduction === "none" ? up : undefined;
        const want = reference(name, student, teacher, columns, o, upstream);
        const got = await run(student, teacher, o, upstream);
        const scale = (reduction === "mean" ? 1 : rows) * 3 / temperature; // of a gradient: upstream is about 1, 3 at most
        check(got.gradients[0], want.dStudent, columns, "dStudent", 1e-4 + log, scale);
        check(got.gradients[1], want.dTeacher, columns, "dTeacher", 1e-4 + log, scale);
        // by the gap, a KL changes by its square root times that; half the sum of |p − q| by as much
        const size = name === "totalVariation" ? 1 : Math.sqrt(Math.max(...want.loss));
        check(got.loss, want.loss, got.loss.length, "loss", 1e-4 + log, (size + gap) * rows);

        // the bounds, row by row, and exactly
        const plain = { temperature, reduction: "none" as const, ...own };
        const each = await run(student, teacher, plain, up);
        const H = -share * Math.log(share) - (1 - share) * Math.log(1 - share);
        const most = name === "totalVariation" ? 1 : name === "jsd" ? H : Infinity;
        assert(each.loss.every((v) => v >= 0 && v <= most), `${each.loss} outside [0, ${most}]`);
        assert(H <= Math.LN2 + 1e-15);
        // a row's gradient sums to 0: V terms, each off by what was allowed above
        for (const g of each.gradients) {
          for (let r = 0; r < rows; r++) {
            const line = g.slice(r * columns, (r + 1) * columns), sum = line.reduce((a, b) => a + b, 0);
            const bound = columns *
              (Math.max(...line.map(Math.abs)) * (GRADIENT + log) + gap * Math.abs(up[r]) / temperature);
            assert(Math.abs(sum) <= bound, `row ${r}'s gradient sums to ${sum}, not 0 to ${bound}`);
          }
        }
        // a shift of either side changes nothing; the truth is the reference of the shifted numbers, which were rounded again
        const movedS = student.map((v) => Math.fround(v + shift)), movedT = teacher.map((v) => Math.fround(v - shift));
        const wantMoved = reference(name, movedS, movedT, columns, plain, up);
        const moved = await run(movedS, movedT, plain, up);
        moved.loss.forEach((v, r) => {
          const w = wantMoved.loss[r];
          const change = name === "totalVariation" ? gap : (Math.sqrt(w) + gap) * gap;
          assert(Math.abs(v - w) <= w * (1e-4 + log) + change, `shifted: ${v}, not ${w}`);
        });
        if (name === "jsd") { // the sides may change places
          const swapped = await run(teacher, student, { ...plain, beta: 1 - share }, up);
          const limit = 1e-4 + log;
          assertSmall([
            ["swapped", rowError(swapped.loss, each.loss, 1, gap * gap / limit + 1e-30), limit],
            [
              "swapped gradient",
              rowError(swapped.gradients[1], each.gradients[0], columns, gap * 3 / temperature / limit),
              limit,
            ],
          ]);
        }
        if (name === "forwardKl") { // KL(p‖q) = H(p, q) − H(p), all of them f32: sums of size H
          using _scope = new Scope();
          const s = tensor(student, shape),
            t = tensor(teacher, shape),
            options = { temperature, reduction: "none" } as const;
          const [cross, h] = [crossEntropyOfDistributions(s, t, options), entropy(t, options)];
          const [a, b] = [await cross.data(), await h.data()];
          each.loss.forEach((v, r) =>
            assert(
              Math.abs(a[r] - b[r] - v) <= (a[r] + b[r]) * (VALUE + log) + log + gap,
              `${a[r]} − ${b[r]}, not ${v}`,
            )
          );
        }
      }),
      { numRuns: 200 },
    );
  });
}

// ---- distillation

const DISTILLATIONS: DistillationNumbers[] = DIVERGENCE_NAMES.flatMap((divergence) =>
  combinations({
    divergence: [divergence],
    alpha: [0, 0.3, 1],
    temperature: [3],
    temperatureSquared: [undefined, false],
    dropIgnored: [undefined, true],
    reduction: divergence === "forwardKl" || divergence === "jsd" ? REDUCTIONS : ["mean"] as const,
    own: divergence === "jsd"
      ? combinations({ beta: [undefined, 0, 0.2], normalize: [undefined, true] })
      : divergence.startsWith("skew")
      ? combinations({ skewAlpha: [undefined, 0.3] })
      : [{}],
  }).map(({ own, ...o }) => ({ ...o, ...own }))
);

const given = (o: DistillationNumbers): DistillationOptions & { returnParts?: false } =>
  Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined));

Deno.test("distillation: the reference's gradients are those of its value", () => {
  for (const o of DISTILLATIONS.filter(({ alpha }) => alpha === 0.3)) {
    const s = [...STUDENT], t = [...TEACHER], upstream = o.reduction === "none" ? UPSTREAM : [1.5];
    const f = () =>
      distillationReference(s, t, LABELS, CLASSES, o).loss.reduce((sum, v, i) => sum + v * upstream[i], 0);
    const want = distillationReference(s, t, LABELS, CLASSES, o, upstream);
    assert(rowError(want.dStudent, differences(f, s), s.length, 1e-3) < 1e-7, text(o));
    assert(rowError(want.dTeacher, differences(f, t), t.length, 1e-3) < 1e-7, text(o));
  }
});

Deno.test("distillation: every combination of options", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const o of DISTILLATIONS) {
    const upstream = o.reduction === "none" ? UPSTREAM : undefined;
    const want = distillationReference(STUDENT, TEACHER, LABELS, CLASSES, o, upstream);
    const parts: Tensor[] = [];
    const { loss, gradients } = await measure(
      (s, t) => {
        const result = distillation(s, t, labelsOf(LABELS), { ...given(o), returnParts: true });
        parts.push(result.crossEntropy.keep(), result.divergence.keep());
        return result.loss;
      },
      BOTH,
      upstream,
    );
    const [ce, divergence] = await Promise.all(parts.map((x) => x.data()));
    const n = loss.length,
      add = (what: string, error: number, limit: number) => errors.push([`${what} of ${text(o)}`, error, limit]);
    add("loss", rowError(loss, want.loss, n, 1e-3), VALUE);
    // the parts are before α, T² and what normalize divides by
    add("crossEntropy", rowError(ce, want.crossEntropy, n, 1e-3), VALUE);
    add("divergence", rowError(divergence, want.divergence, n, 1e-3), VALUE);
    add("dStudent", rowError(gradients[0], want.dStudent, CLASSES, 1e-3), GRADIENT);
    add("dTeacher", rowError(gradients[1], want.dTeacher, CLASSES, 1e-3), GRADIENT);
    assertEquals(parts.map((x) => x.requiresGrad), [false, false]);
    for (const x of parts) x.dispose();
  }
  assertSmall(errors);
});

Deno.test("distillation: without parts, in f16, under both row plans", async () => {
  const { f16 } = await init();
  const round = (x: number[]) => Array.from(Float16Array.from(x));
  const student = round(STUDENT), teacher = round(TEACHER);
  await underAllPlans(async () => {
    for (const dtype of f16 ? ["f32", "f16"] as const : ["f32"] as const) {
      for (const reduction of REDUCTIONS) {
        const upstream = reduction === "none" ? UPSTREAM : [3];
        const want = distillationReference(student, teacher, LABELS, CLASSES, { reduction }, upstream);
        const { loss, gradients } = await measure((s, t) => distillation(s, t, labelsOf(LABELS), { reduction }), [
          { values: student, shape: SHAPE, dtype },
          { values: teacher, shape: SHAPE, dtype },
        ], upstream);
        assert(rowError(loss, want.loss, loss.length) <= VALUE);
        for (const [i, g] of [want.dStudent, want.dTeacher].entries()) {
          if (dtype === "f16") assertEquals(f16Errors(gradients[i], g, CLASSES, GRADIENT), []);
          else assert(rowError(gradients[i], g, CLASSES) <= GRADIENT);
        }
      }
    }
  });
});

Deno.test("distillation: ignored labels, no row, an infinite part of weight 0", async () => {
  await init();
  const all = [-100, -100, -100, -100, -100];
  // unlabelled rows still learn from the teacher …
  const want = distillationReference(STUDENT, TEACHER, all, CLASSES);
  const got = await measure((s, t) => distillation(s, t, labelsOf(all)), BOTH);
  assert(rowError(got.loss, want.loss, 1) <= VALUE && rowError(got.gradients[0], want.dStudent, CLASSES) <= GRADIENT);
  assert(want.loss[0] > 0.1);
  // … unless they are dropped
  const dropped = await measure((s, t) => distillation(s, t, labelsOf(all), { dropIgnored: true }), BOTH);
  const zeros35 = Array(ROWS * CLASSES).fill(0);
  assertEquals(dropped, { loss: [0], gradients: [zeros35, zeros35] });
  const empty = { values: [], shape: [0, 3] };
  assertEquals(await measure((s, t) => distillation(s, t, labelsOf([])), [empty, empty]), {
    loss: [0],
    gradients: [[], []],
  });
  // 0·∞ = 0: cross-entropy alone where the divergence is +∞, divergence alone where the cross-entropy is
  const row = (values: number[], requiresGrad: boolean) => ({ values, shape: [1, 3], requiresGrad });
  const [s, t] = [row([-Infinity, 1, 2], true), row([0, 1, 0], false)];
  for (const divergence of ["forwardKl", "jsd"] as const) {
    const o = { alpha: 1, divergence }, want = distillationReference(s.values, t.values, [1], 3, o);
    const { loss, gradients } = await measure((a, b) => distillation(a, b, labelsOf([1]), o), [s, t]);
    const ce = reference("forwardKl", [1, 2], [40, -40], 2).loss[0]; // −log prob of the label
    assert(rowError(loss, [ce], 1) <= VALUE, `${divergence}, alpha 1: ${loss}, not ${ce}`);
    assert(rowError(gradients[0], want.dStudent, 3) <= GRADIENT, `${divergence}, alpha 1: ${gradients[0]}`);
  }
  // … and an infinite divergence has no gradient beside it
  const masked = { values: [0, 1, -Infinity], shape: [1, 3] }, all3 = { values: [2, 0, 0], shape: [1, 3] };
  for (const [divergence, ...sides] of [["reverseKl", all3, masked], ["forwardKl", masked, all3]] as const) {
    const { gradients: [dStudent, dTeacher] } = await measure(
      (a, b) => distillation(a, b, labelsOf([0]), { divergence, alpha: 1 }),
      sides,
    );
    assert(dStudent.every(Number.isFinite), `${divergence}: ${dStudent}`);
    assertEquals(dTeacher, [0, 0, 0]);
  }
  const o = { alpha: 0, divergence: "reverseKl" } as const;
  const plain = distillationReference(s.values, t.values, [1], 3, o);
  const { loss, gradients } = await measure((a, b) => distillation(a, b, labelsOf([0]), o), [s, t]);
  assert(rowError(loss, plain.loss, 1) <= VALUE, `alpha 0: ${loss}, not ${plain.loss}`);
  assert(rowError(gradients[0], plain.dStudent, 3) <= GRADIENT, `alpha 0: ${gradients[0]}, not ${plain.dStudent}`);
});

Deno.test("distillation: equals its twin of cross-entropy and divergence", async () => {
  await init();
  const oneHot = tensor(LABELS.flatMap((y) => Array.from({ length: CLASSES }, (_, c) => c === y ? 1 : 0)), SHAPE);
  const kept = LABELS.filter((y) => y !== -100).length;
  for (const divergence of DIVERGENCE_NAMES) {
    const a = await measure(
      (s, t) => distillation(s, t, labelsOf(LABELS), { alpha: 0.3, temperature: 3, divergence }),
      BOTH,
    );
    const b = await measure((s, t) => {
      const ce = s.logSoftmax().mul(oneHot).sum().div(-kept);
      return ce.mul(0.3).add(TEXTBOOK[divergence](s, t, 3).mean().mul(0.7 * 9));
    }, BOTH);
    assert(rowError(a.loss, b.loss, 1) <= 4 * VALUE, `${divergence}: ${a.loss} ${b.loss}`);
    for (const i of [0, 1]) {
      const error = rowError(a.gradients[i], b.gradients[i], CLASSES, 1e-2);
      assert(error <= 4 * GRADIENT, `${divergence}: gradient ${i} is off by ${error}`);
    }
  }
});

Deno.test("distillation: options that are not known when this is compiled", async () => {
  await init();
  const options: DistillationOptions = { alpha: 0.3 };
  const loss = distillation(tensor(STUDENT, SHAPE), tensor(TEACHER, SHAPE), labelsOf(LABELS), options);
  assertEquals("divergence" in loss ? null : loss.shape, []); // compiles only where a Tensor may come
});

Deno.test("distillation: labels outside the classes", async () => {
  await init();
  const student = tensor(STUDENT, SHAPE), teacher = tensor(TEACHER, SHAPE);
  assertThrows(
    () => distillation(student, teacher, labelsOf([0, 1, 2, CLASSES, 0])),
    RangeError,
    `distillation: labels must be a class in [0, ${CLASSES}) or ignoreIndex -100, got ${CLASSES} at row 3`,
  );
  for (const alpha of [0.5, 0]) {
    for (const bad of [CLASSES, -1]) {
      using _tape = new Tape();
      const s = tensor(STUDENT, SHAPE, { requiresGrad: true });
      const labels = labelsOf([0, 0, 0, 0, 0]).assign(labelsOf([0, 1, 2, bad, 3]));
      const loss = distillation(s, teacher, labels, { reduction: "none", alpha });
      loss.backward(tensor([1, 1, 1, 1, 1]));
      assertEquals(Array.from(await loss.data(), Number.isNaN), [false, false, false, true, false], `alpha ${alpha}`);
      Array.from(await s.grad!.data()).forEach((g, i) =>
        assertEquals(
          Number.isNaN(g),
          Math.floor(i / CLASSES) === 3,
          `alpha ${alpha}, label ${bad}: gradient ${i} is ${g}`,
        )
      );
    }
  }
  // the divergences only ask whether a label is ignored
  const labels = full([ROWS], 12345, { dtype: "i32" });
  const want = reference("forwardKl", STUDENT, TEACHER, CLASSES);
  assert(rowError([await forwardKl(student, teacher, { labels }).item()], want.loss, 1) <= VALUE);
});

Deno.test("distillation: property: value and gradients", async () => {
  await init();
  const c = fc.record({
    ...drawn,
    alpha: fc.constantFrom(0, 0.2, 0.5, 1),
    // three stand for all, and `none` for itself above: each is a pipeline or two
    divergence: fc.constantFrom("forwardKl" as const, "jsd" as const, "totalVariation" as const),
    reduction: fc.constantFrom("mean" as const, "sum" as const),
    dropIgnored: fc.boolean(),
    temperatureSquared: fc.boolean(),
  });
  await fc.assert(
    fc.asyncProperty(c, async ({ rows, columns, seed, deviation, share, dropped, shift: _, apart: _apart, ...o }) => {
      const student = normals(rows * columns, deviation, seed), teacher = normals(rows * columns, 1, seed + 1);
      const labels = integers(rows, columns, seed + 2).map((y, r) => r === dropped ? -100 : y), shape = [rows, columns];
      const options = { ...o, beta: share, skewAlpha: share };
      const want = distillationReference(student, teacher, labels, columns, options);
      const { loss, gradients } = await measure((s, t) => distillation(s, t, labelsOf(labels), options), [
        { values: student, shape },
        { values: teacher, shape },
      ]);
      // exponents of size x are off by some steps of x; a divergence of close rows is T² times a difference of 1/T²
      const log = 2 ** -21 * 4 * (deviation + 1) * (1 + 1 / o.temperature),
        size = o.temperatureSquared ? o.temperature : 1;
      assertSmall([
        ["loss", rowError(loss, want.loss, loss.length, 1), 5 * VALUE + log],
        ["dStudent", rowError(gradients[0], want.dStudent, columns, size / rows), GRADIENT + log],
        ["dTeacher", rowError(gradients[1], want.dTeacher, columns, size / rows), GRADIENT + log],
      ]);
    }),
    { numRuns: 200 },
  );
});

Deno.test("divergences: what they throw", async () => {
  await init();
  // deno-lint-ignore no-explicit-any
  const student: any = tensor(STUDENT, SHAPE), teacher: any = tensor(TEACHER, SHAPE), index = labelsOf([1, 2, 3, 4, 5]);
  // deno-lint-ignore no-explicit-any
  type Options = any;
  const d = (o: Options) => () => distillation(student, teacher, index, o);
  assertAllThrow([
    [
      () => forwardKl(student, teacher, { temprature: 2 } as Options),
      TypeError,
      'forwardKl: unknown option "temprature"; did you mean temperature?',
    ],
    [() => forwardKl(student, teacher, { beta: 0.5 } as Options), TypeError, 'forwardKl: unknown option "beta"'],
    [() => jsd(student, teacher, { alpha: 0.5 } as Options), TypeError, 'jsd: unknown option "alpha"'],
    [() => jsd(student, teacher, null as Options), TypeError, "jsd: options must be an object, got null"],
    [
      () => jsd(student, teacher, { beta: 1.5 }),
      RangeError,
      "jsd: beta must be a finite number, at least 0, at most 1, got 1.5",
    ],
    [() => jsd(student, teacher, { beta: "0" as Options }), TypeError, 'jsd: beta must be a number, got "0"'],
    [
      () => jsd(student, teacher, { normalize: 1 as Options }),
      TypeError,
      "jsd: normalize must be true or false, got 1",
    ],
    [
      () => skewForwardKl(student, teacher, { alpha: -0.1 }),
      RangeError,
      "skewForwardKl: alpha must be a finite number, at least 0, at most 1, got -0.1",
    ],
    [
      () => skewReverseKl(student, teacher, { alpha: 1e-16 }),
      RangeError,
      "skewReverseKl: alpha must be 0 or at least 1e-15, got 1e-16",
    ],
    [
      d({ beta: 7 }),
      RangeError,
      "distillation: beta must be a finite number, at least 0, at most 1",
    ],
    [
      () => reverseKl(student, teacher, { temperature: 0 }),
      RangeError,
      "reverseKl: temperature must be a finite number, above 0, got 0",
    ],
    [
      () => totalVariation(student, teacher, { reduction: "batchmean" as Options }),
      RangeError,
      'totalVariation: reduction must be one of mean, sum, none, got "batchmean"',
    ],
    [() => forwardKl(student, zeros([4, 7])), TypeError, "forwardKl: teacher must have shape [5"],
    [() => forwardKl(student, zeros([5, 8])), TypeError, "forwardKl: teacher must have shape [5"],
    [() => forwardKl(index as Options, teacher), TypeError, "forwardKl: student must have dtype"],
    [() => forwardKl(student, 3 as Options), TypeError, "forwardKl: teacher must be a Tensor, got 3"],
    [() => forwardKl(tensor(1), tensor(1)), TypeError, "forwardKl: student must have"],
    [() => forwardKl(zeros([2, 0]), zeros([2, 0])), RangeError, "forwardKl: student must have at least one class"],
    [
      () => forwardKl(student, teacher, { labels: [1, 2] as Options }),
      TypeError,
      "forwardKl: labels must be a Tensor, got [1, 2]",
    ],
    [() => forwardKl(student, teacher, { labels: zeros([5]) }), TypeError, "forwardKl: labels must have dtype"],
    [
      () => forwardKl(student, teacher, { labels: labelsOf([1]) }),
      TypeError,
      "forwardKl: labels must have shape [5], got [1]",
    ],
    [d({ alfa: 0 }), TypeError, 'distillation: unknown option "alfa"; did you mean alpha?'],
    [
      () => forwardKl(student, teacher, { beta: 0 } as Options),
      TypeError,
      'unknown option "beta" (known: temperature, ',
    ],
    [d({ alpha: 2 }), RangeError, "distillation: alpha must be a finite number, at least 0, at most 1, got 2"],
    [d({ divergence: "forwardKL" }), RangeError, "did you mean forwardKl?"],
    [d({ divergence: "jsd", beta: -1 }), RangeError, "distillation: beta must be"],
    [d({ divergence: "skewReverseKl", skewAlpha: 2 }), RangeError, "distillation: skewAlpha must be"],
    [d({ temperatureSquared: 1 }), TypeError, "distillation: temperatureSquared must be true or false, got 1"],
    [d({ dropIgnored: "yes" }), TypeError, 'distillation: dropIgnored must be true or false, got "yes"'],
    [d({ returnParts: 0 }), TypeError, "distillation: returnParts must be true or false, got 0"],
    [() => distillation(student, teacher, zeros([5])), TypeError, "distillation: labels must have dtype"],
    [
      () => distillation(student, teacher, undefined as Options),
      TypeError,
      "distillation: labels must be a Tensor, got undefined",
    ],
  ]);
  assert(Number.isFinite(await forwardKl(student, teacher).item()));
});

Deno.test("jsd: normalized, a β too small for f32 gives the forward KL", async () => {
  await init();
  using _scope = new Scope();
  const student = tensor([[0, 1]]), teacher = tensor([[1, 0]]);
  const [limit, kl] = [jsd(student, teacher, { beta: 1e-40, normalize: true }), forwardKl(student, teacher)];
  assert(Math.abs(await limit.item() - await kl.item()) < 1e-6);
});

Deno.test("mixtures: gradients where the likely classes are 9 to 11 apart", async () => {
  await init();
  for (const level of [9, 10, 11]) {
    const V = 12, [student, teacher] = [1, 2].map((seed) => normals(V, 0.3, seed));
    for (const c of [1, 4, 6]) student[c] = Math.fround(student[c] + level);
    for (const c of [2, 3, 9]) teacher[c] = Math.fround(teacher[c] + level);
    for (const name of ["skewForwardKl", "skewReverseKl", "jsd"] as const) {
      for (const share of [0.1, 0.5, 0.9]) {
        const o = name === "jsd" ? { beta: share } : { alpha: share };
        assertSmall(await deviations({ what: `${name} ${share}, ${level}`, name, student, teacher, V, o }));
      }
    }
  }
});
