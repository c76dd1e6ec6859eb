import { assert, assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import {
  crossEntropy,
  type DivergenceName,
  flush,
  forwardKl,
  full,
  init,
  jsd,
  linear,
  linearCrossEntropy,
  linearDistillation,
  type LinearDistillationOptions,
  reverseKl,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import {
  assertSmall,
  combinations,
  crossEntropy as crossEntropyReference,
  type CrossEntropyNumbers,
  divergence as divergenceReference,
  type DivergenceNumbers,
  f16Errors,
  Head,
  integers,
  labelsOf,
  measure,
  normals,
  rowError,
  underAllPlans,
} from "../testing/loss_reference.ts";
import { assertAllThrow } from "../testing/op.ts";

// Shares of the largest number: some 15 and 80 roundings of f32 (6e-8), the products of the head among them.
const VALUE = 1e-6, GRADIENT = 5e-6;

const REDUCTIONS = ["mean", "sum", "none"] as const;
const ROWS = 5, DEPTH = 4, TEACHER_DEPTH = 3, CLASSES = 7;
const HIDDEN = normals(ROWS * DEPTH, 1, 1), WEIGHT = normals(CLASSES * DEPTH, 1, 2), BIAS = normals(CLASSES, 1, 3);
const TEACHER_HIDDEN = normals(ROWS * TEACHER_DEPTH, 1, 4), TEACHER_WEIGHT = normals(CLASSES * TEACHER_DEPTH, 1, 5);
const TEACHER_BIAS = normals(CLASSES, 1, 6);
const TARGET = [3, -100, 6, 0, -100], UPSTREAM = [0.5, -2, 3, 1, 0.25];
const CLASS_WEIGHT = [0.5, 2, 1, 0.25, 0, 3, 1.5].map(Math.fround);

const CHUNKS = [1, 3, ROWS, 100];
const text = (o: object) => JSON.stringify(o);
const defined = <T extends object>(o: T): T =>
  Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined)) as T;

const STUDENT_SIDE = [
  { values: HIDDEN, shape: [ROWS, DEPTH] },
  { values: WEIGHT, shape: [CLASSES, DEPTH] },
  { values: BIAS, shape: [CLASSES] },
];
const TEACHER_SIDE = [
  { values: TEACHER_HIDDEN, shape: [ROWS, TEACHER_DEPTH] },
  { values: TEACHER_WEIGHT, shape: [CLASSES, TEACHER_DEPTH] },
  { values: TEACHER_BIAS, shape: [CLASSES] },
];

const CE_OPTIONS = combinations({
  softcap: [undefined, 2],
  weight: [undefined, CLASS_WEIGHT],
  zLoss: [undefined, 0.01],
  labelSmoothing: [undefined, 0.1],
  temperature: [undefined, 0.7],
  reduction: REDUCTIONS,
}) as CrossEntropyNumbers[];

function ceOptions({ weight, ...o }: CrossEntropyNumbers) {
  return { ...defined(o), ...weight ? { weight: tensor(Float32Array.from(weight)) } : {} };
}

Deno.test("linearCrossEntropy: every option, in chunks, against float64", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const [n, o] of CE_OPTIONS.entries()) {
    const bias = n % 2 === 0, head = new Head(HIDDEN, WEIGHT, DEPTH, bias ? BIAS : undefined);
    const upstream = o.reduction === "none" ? UPSTREAM : [1.5];
    const want = crossEntropyReference(head.logits, TARGET, CLASSES, o, upstream), d = head.backward(want.dLogits);
    for (const chunkSize of CHUNKS) {
      const { loss, gradients } = await measure(
        (h, w, b) =>
          linearCrossEntropy(h, w, labelsOf(TARGET), { ...ceOptions(o), chunkSize, ...bias ? { bias: b } : {} }),
        STUDENT_SIDE,
        upstream,
      );
      const what = `${text({ ...o, bias })} in chunks of ${chunkSize}`;
      errors.push([`${what}: loss`, rowError(loss, want.loss, loss.length), VALUE]);
      errors.push([`${what}: dHidden`, rowError(gradients[0], d.dHidden, DEPTH, 1e-2), GRADIENT]);
      errors.push([`${what}: dWeight`, rowError(gradients[1], d.dWeight, d.dWeight.length), GRADIENT]);
      if (bias) errors.push([`${what}: dBias`, rowError(gradients[2], d.dBias, CLASSES), GRADIENT]);
    }
  }
  assertSmall(errors);
});

Deno.test("linearCrossEntropy: z-loss, accuracy and predictions, in chunks, are those of crossEntropy", async () => {
  await init();
  const head = new Head(HIDDEN, WEIGHT, DEPTH), target = labelsOf(TARGET);
  const further = {
    zLoss: 0.01,
    softcap: 2,
    returnZLoss: true,
    returnAccuracy: true,
    returnPredictions: true,
  } as const;
  await underAllPlans(async (plan) => {
    for (const o of combinations({ reduction: REDUCTIONS, chunkSize: CHUNKS, requiresGrad: [true, false] })) {
      const { reduction, chunkSize, requiresGrad } = o, upstream = reduction === "none" ? UPSTREAM : [1.5];
      const want = crossEntropyReference(
        head.logits,
        TARGET,
        CLASSES,
        { zLoss: 0.01, softcap: 2, reduction },
        upstream,
      );
      const what = `${plan} ${text(o)}`;
      using _scope = new Scope();
      const h = tensor(HIDDEN, [ROWS, DEPTH], { requiresGrad }), w = tensor(WEIGHT, [CLASSES, DEPTH]);
      using _tape = new Tape();
      const { loss, zLoss, accuracy, predictions } = linearCrossEntropy(h, w, target, {
        ...further,
        reduction,
        chunkSize,
      });
      if (requiresGrad) loss.backward(tensor(upstream, loss.shape));
      const z = reduction === "none" ? want.zLoss : [want.zLoss.reduce((a, b) => a + b, 0)];
      assertSmall([
        [`${what}: loss`, rowError(await loss.data(), want.loss, loss.size), VALUE],
        [`${what}: z-loss`, rowError(await zLoss!.data(), z, z.length), VALUE],
        [`${what}: accuracy`, rowError([await accuracy.item()], [want.accuracy], 1), VALUE],
      ]);
      assertEquals(Array.from(await predictions!.data()), want.predictions, what);
      if (!requiresGrad) continue;
      const { dHidden } = head.backward(want.dLogits);
      assertSmall([[`${what}: dHidden`, rowError(await h.grad!.data(), dHidden, DEPTH, 1e-2), GRADIENT]]);
    }
  });
  // what was not asked for is not there
  const h = tensor(HIDDEN, [ROWS, DEPTH]), w = tensor(WEIGHT, [CLASSES, DEPTH]);
  assertEquals(Object.keys(linearCrossEntropy(h, w, target, { returnPredictions: true })), ["loss", "predictions"]);
});

const DIVERGENCES: (DivergenceNumbers & { divergence?: DivergenceName })[] = [
  {},
  { divergence: "reverseKl" as const },
  { divergence: "jsd" as const },
  { divergence: "jsd" as const, beta: 0 },
  { divergence: "jsd" as const, beta: 0.2, normalize: true },
  { divergence: "skewForwardKl" as const },
  { divergence: "skewForwardKl" as const, alpha: 0.4 },
  { divergence: "skewReverseKl" as const, alpha: 0.4 },
  { divergence: "totalVariation" as const },
].flatMap((own) =>
  combinations({
    temperature: [undefined, 3],
    reduction: REDUCTIONS,
    // labels are nothing to the formulas, and three pipelines each
    labels: "beta" in own ? [undefined, TARGET] : [undefined],
  }).map((o) => ({ ...own, ...o }))
);

function klOptions({ labels, ...o }: DivergenceNumbers): LinearDistillationOptions {
  return { ...defined(o), ...labels ? { labels: labelsOf(Array.from(labels)) } : {} };
}

Deno.test("linearDistillation: every option, in chunks, against float64", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const [n, o] of DIVERGENCES.entries()) {
    const bias = n % 2 === 0;
    const student = new Head(HIDDEN, WEIGHT, DEPTH, bias ? BIAS : undefined);
    const teacher = new Head(TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_DEPTH, bias ? TEACHER_BIAS : undefined);
    const upstream = o.reduction === "none" ? UPSTREAM : [1.5];
    const want = divergenceReference(o.divergence ?? "forwardKl", student.logits, teacher.logits, CLASSES, o, upstream);
    const [s, t] = [student.backward(want.dStudent), teacher.backward(want.dTeacher)];
    const wanted = [s.dHidden, s.dWeight, s.dBias, t.dHidden, t.dWeight, t.dBias];
    for (const chunkSize of CHUNKS) {
      const { loss, gradients } = await measure(
        (h, w, b, th, tw, tb) =>
          linearDistillation(h, w, th, tw, {
            ...klOptions(o),
            chunkSize,
            ...bias ? { bias: b, teacherBias: tb } : {},
          }),
        [...STUDENT_SIDE, ...TEACHER_SIDE],
        upstream,
      );
      const what = `${text({ ...o, bias })} in chunks of ${chunkSize}`;
      errors.push([`${what}: loss`, rowError(loss, want.loss, loss.length), VALUE]);
      for (const [i, g] of gradients.entries()) {
        if (g.length) errors.push([`${what}: gradient ${i}`, rowError(g, wanted[i], g.length, 1e-1), GRADIENT]);
      }
      assertEquals(gradients.map((g) => g.length > 0), [true, true, bias, true, true, bias]);
    }
  }
  assertSmall(errors);
});

Deno.test("linearDistillation: gradients for one side alone", async () => {
  await init();
  const student = new Head(HIDDEN, WEIGHT, DEPTH), teacher = new Head(TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_DEPTH);
  for (const divergence of ["forwardKl", "reverseKl", "jsd"] as const) {
    const want = divergenceReference(divergence, student.logits, teacher.logits, CLASSES);
    const [s, t] = [student.backward(want.dStudent), teacher.backward(want.dTeacher)];
    const wanted = [s.dHidden, s.dWeight, t.dHidden, t.dWeight];
    for (let only = 0; only < 4; only++) {
      const inputs = [STUDENT_SIDE[0], STUDENT_SIDE[1], TEACHER_SIDE[0], TEACHER_SIDE[1]]
        .map((x, i) => ({ ...x, requiresGrad: i === only }));
      const { loss, gradients } = await measure(
        (h, w, th, tw) => linearDistillation(h, w, th, tw, { divergence, chunkSize: 2 }),
        inputs,
      );
      assert(rowError(loss, want.loss, 1) <= VALUE);
      gradients.forEach((g, i) =>
        assert(
          i === only ? rowError(g, wanted[i], g.length) <= GRADIENT : g.length === 0,
          `${divergence}: gradient ${i} where ${only} is wanted`,
        )
      );
    }
  }
});

Deno.test("linear losses: equal the unfused ones", async () => {
  await init();
  const target = labelsOf(TARGET), two = [STUDENT_SIDE[0], STUDENT_SIDE[1]];
  const four = [...two, TEACHER_SIDE[0], TEACHER_SIDE[1]];
  const pairs = [
    [
      await measure((h, w) => linearCrossEntropy(h, w, target, { chunkSize: 2, softcap: 3 }), two),
      await measure((h, w) => crossEntropy(linear(h, w), target, { softcap: 3 }), two),
    ],
    [
      await measure(
        (h, w, a, b) => linearDistillation(h, w, a, b, { chunkSize: 2, divergence: "jsd", beta: 0.3 }),
        four,
      ),
      await measure((h, w, a, b) => jsd(linear(h, w), linear(a, b), { beta: 0.3 }), four),
    ],
    [ // what a Linear without a bias has
      await measure((h, w) => linearCrossEntropy(h, w, target, { bias: null }), two),
      await measure((h, w) => crossEntropy(linear(h, w, null), target), two),
    ],
    [
      await measure(
        (h, w, a, b) => linearDistillation(h, w, a, b, { temperature: 2, bias: null, teacherBias: null }),
        four,
      ),
      await measure((h, w, a, b) => forwardKl(linear(h, w), linear(a, b), { temperature: 2 }), four),
    ],
  ];
  // two f32 ways of one sum, each within the tolerances above
  for (const [a, b] of pairs) {
    assert(rowError(a.loss, b.loss, 1) <= 2 * VALUE, `${a.loss} ${b.loss}`);
    a.gradients.forEach((g, i) => assert(rowError(g, b.gradients[i], g.length) <= 2 * GRADIENT, `gradient ${i}`));
  }
});

Deno.test("linearDistillation: many classes, whose gradients overwrite logits that were read fast", async () => {
  await init();
  const V = 200,
    input = (rows: number, columns: number, seed: number, size: number) => ({
      values: normals(rows * columns, size, seed),
      shape: [rows, columns],
    });
  const inputs = [input(6, 4, 1, 1), input(V, 4, 2, 1), input(6, 3, 3, 1), input(V, 3, 4, 1)];
  // of the last two rows both sides are sure of the first class
  for (const [side, weights] of [[0, 1], [2, 3]]) {
    const [hidden, weight] = [inputs[side], inputs[weights]], depth = hidden.shape[1];
    for (let d = 0; d < depth; d++) {
      weight.values[d] = d === 0 ? 12 : 0;
      for (const row of [4, 5]) hidden.values[row * depth + d] = d === 0 ? 1 : 0.3 * hidden.values[row * depth + d];
    }
  }
  await underAllPlans(async (plan) => {
    for (const divergence of ["forwardKl", "reverseKl", "jsd"] as const) {
      const o = { reduction: "sum" as const }, op = { forwardKl, reverseKl, jsd }[divergence];
      const a = await measure(
        (h, w, x, y) => linearDistillation(h, w, x, y, { ...o, divergence, chunkSize: 4 }),
        inputs,
      );
      const b = await measure((h, w, x, y) => op(linear(h, w), linear(x, y), o), inputs);
      assert(rowError(a.loss, b.loss, 1) <= 2 * VALUE, `${divergence}, ${plan}: ${a.loss} ${b.loss}`);
      a.gradients.forEach((g, i) => {
        const error = rowError(g, b.gradients[i], g.length);
        assert(error <= 2 * GRADIENT, `${divergence}, ${plan}: gradient ${i} is off by ${error}`);
      });
    }
  });
});

Deno.test("linearDistillation: a skew whose gradient is small next to what it is made of", async () => {
  await init();
  const V = 130, alpha = 0.3, one = tensor([[1]]);
  // each side is sure of a class of its own
  const [student, teacher] = [0, 1].map((likely) =>
    normals(V, 1, likely).map((x, c) => Math.fround(c === likely ? -5 : x - 20))
  );
  const want = divergenceReference("skewReverseKl", student, teacher, V, { alpha });
  await underAllPlans(async (plan) => {
    const { gradients } = await measure(
      (w) => linearDistillation(one, w, one, tensor(teacher, [V, 1]), { divergence: "skewReverseKl", alpha }),
      [{ values: student, shape: [V, 1] }],
    );
    assertSmall([[plan, rowError(gradients[0], want.dStudent, V), GRADIENT]]);
  });
});

Deno.test("linear losses: shapes, no row, no kept row, labels outside the classes", async () => {
  await init();
  const head = new Head(HIDDEN, WEIGHT, DEPTH);
  // [1, 5, D] with labels [1, 5], and [D] with labels []
  const cube = linearCrossEntropy(
    tensor(HIDDEN, [1, ROWS, DEPTH]),
    tensor(WEIGHT, [CLASSES, DEPTH]),
    labelsOf(TARGET, [1, ROWS]),
    {
      reduction: "none",
      chunkSize: 2,
    },
  );
  assertEquals(cube.shape, [1, ROWS]);
  const rows = crossEntropyReference(head.logits, TARGET, CLASSES, { reduction: "none" });
  assert(rowError(await cube.data(), rows.loss, ROWS) <= VALUE);
  const single = linearCrossEntropy(
    tensor(HIDDEN.slice(0, DEPTH)),
    tensor(WEIGHT, [CLASSES, DEPTH]),
    labelsOf([3], []),
  );
  const wantSingle = crossEntropyReference(head.logits.slice(0, CLASSES), [3], CLASSES);
  assert(rowError(await single.data(), wantSingle.loss, 1) <= VALUE);

  const weight = { values: WEIGHT, shape: [CLASSES, DEPTH] }, bias = { values: BIAS, shape: [CLASSES] };
  const zero = (n: number) => Array(n).fill(0);
  for (const reduction of REDUCTIONS) {
    const none = reduction === "none", o = { reduction, chunkSize: 2 };
    const empty = { values: [], shape: [0, DEPTH] };
    assertEquals(
      await measure(
        (h, w, b) => linearCrossEntropy(h, w, labelsOf([]), { ...o, bias: b }),
        [empty, weight, bias],
        none ? [] : undefined,
      ),
      { loss: none ? [] : [0], gradients: [[], zero(CLASSES * DEPTH), zero(CLASSES)] },
    );
    assertEquals(
      await measure(
        (h, w, a, b) => linearDistillation(h, w, a, b, o),
        [empty, weight, empty, weight],
        none ? [] : undefined,
      ),
      { loss: none ? [] : [0], gradients: [[], zero(CLASSES * DEPTH), [], zero(CLASSES * DEPTH)] },
    );
    const ignored = await measure(
      (h, w) => linearCrossEntropy(h, w, labelsOf([-100, -100, -100, -100, -100]), { ...o, zLoss: 1 }),
      [STUDENT_SIDE[0], weight],
      none ? UPSTREAM : undefined,
    );
    assert([...ignored.loss, ...ignored.gradients.flat()].every((v) => v === 0), text(ignored));
  }

  assertThrows(
    () =>
      linearCrossEntropy(tensor(HIDDEN, [ROWS, DEPTH]), tensor(WEIGHT, [CLASSES, DEPTH]), labelsOf([0, 1, 2, 9, 0])),
    RangeError,
    `linearCrossEntropy: target must be a class in [0, ${CLASSES}) or ignoreIndex -100, got 9 at row 3`,
  );
  using _tape = new Tape();
  const hidden = tensor(HIDDEN, [ROWS, DEPTH], { requiresGrad: true });
  const labels = labelsOf([0, 0, 0, 0, 0]).assign(labelsOf([0, 1, 2, 9, 0]));
  const loss = linearCrossEntropy(hidden, tensor(WEIGHT, [CLASSES, DEPTH]), labels, {
    reduction: "none",
    chunkSize: 2,
  });
  loss.backward(tensor([1, 1, 1, 1, 1]));
  assertEquals(Array.from(await loss.data(), Number.isNaN), [false, false, false, true, false]);
  const gradient = Array.from(await hidden.grad!.data(), Number.isNaN);
  assertEquals(gradient, Array.from({ length: ROWS * DEPTH }, (_, i) => Math.floor(i / DEPTH) === 3));
});

Deno.test("linear losses: two on a tape, two tapes, unchanged inputs", async () => {
  await init();
  const hidden = tensor(HIDDEN, [ROWS, DEPTH], { requiresGrad: true });
  const weight = tensor(WEIGHT, [CLASSES, DEPTH], { requiresGrad: true });
  const head = new Head(HIDDEN, WEIGHT, DEPTH), o = { chunkSize: 2 };
  const once = head.backward(crossEntropyReference(head.logits, TARGET, CLASSES, {}, [4]).dLogits); // 1 + 3
  for (const times of [1, 2]) {
    using _tape = new Tape();
    const loss = () => linearCrossEntropy(hidden, weight, labelsOf(TARGET), o);
    loss().add(loss().mul(3)).backward();
    assert(rowError(await hidden.grad!.data(), once.dHidden.map((g) => g * times), DEPTH, 1e-2) <= GRADIENT);
    assert(rowError(await weight.grad!.data(), once.dWeight.map((g) => g * times), WEIGHT.length) <= GRADIENT);
  }
  assertEquals([Array.from(await hidden.data()), Array.from(await weight.data())], [HIDDEN, WEIGHT]);
  // what the backward pass would read once more
  const [labels, classWeight] = [labelsOf(TARGET), tensor(CLASS_WEIGHT)], none = { reduction: "none" } as const;
  const ops: [string, () => Tensor][] = [
    ["linearCrossEntropy", () => linearCrossEntropy(hidden, weight, labels, { ...none, weight: classWeight })],
    ["linearDistillation", () => linearDistillation(hidden, weight, hidden, weight, { ...none, labels })],
  ];
  for (const changed of [labels, classWeight]) {
    for (const [op, make] of changed === labels ? ops : ops.slice(0, 1)) {
      using _tape = new Tape();
      const loss = make().sum();
      changed.assign(zeros(changed.shape, { dtype: changed.dtype }));
      assertThrows(() => loss.backward(), Error, `${op} (shape [${changed.shape}]) was changed in place`);
    }
  }
  for (const x of [labels, classWeight]) x.dispose();
  hidden.dispose();
  weight.dispose();
});

Deno.test("linear losses: f16", async () => {
  const { f16 } = await init();
  if (!f16) return;
  const round = (x: number[]) => Array.from(Float16Array.from(x)), half = { dtype: "f16" as const };
  const [h, w, b, th, tw] = [HIDDEN, WEIGHT, BIAS, TEACHER_HIDDEN, TEACHER_WEIGHT].map(round);
  const inputs = [
    { values: h, shape: [ROWS, DEPTH], ...half },
    { values: w, shape: [CLASSES, DEPTH], ...half },
    { values: b, shape: [CLASSES], ...half },
  ];
  const teacher = [
    { values: th, shape: [ROWS, TEACHER_DEPTH], ...half },
    { values: tw, shape: [CLASSES, TEACHER_DEPTH], ...half },
  ];
  const head = new Head(h, w, DEPTH, b), other = new Head(th, tw, TEACHER_DEPTH);
  for (const chunkSize of [1, 2, ROWS]) {
    for (const reduction of REDUCTIONS) {
      const upstream = reduction === "none" ? UPSTREAM : [3], what = `${chunkSize} ${reduction}`;
      const want = crossEntropyReference(head.logits, TARGET, CLASSES, { reduction }, upstream);
      const d = head.backward(want.dLogits);
      const got = await measure(
        (x, y, z) => linearCrossEntropy(x, y, labelsOf(TARGET), { reduction, chunkSize, bias: z }),
        inputs,
        upstream,
      );
      assert(rowError(got.loss, want.loss, got.loss.length) <= VALUE, what);
      // one rounding at the end: the sums over chunks are f32
      assertEquals(f16Errors(got.gradients[0], d.dHidden, DEPTH, GRADIENT), [], `dHidden ${what}`);
      assertEquals(f16Errors(got.gradients[1], d.dWeight, d.dWeight.length, GRADIENT), [], `dWeight ${what}`);
      assertEquals(f16Errors(got.gradients[2], d.dBias, CLASSES, GRADIENT), [], `dBias ${what}`);

      const kl = divergenceReference("forwardKl", head.logits, other.logits, CLASSES, { reduction }, upstream);
      const [s, t] = [head.backward(kl.dStudent), other.backward(kl.dTeacher)];
      const both = await measure(
        (x, y, z, tx, ty) => linearDistillation(x, y, tx, ty, { reduction, chunkSize, bias: z }),
        [...inputs, ...teacher],
        upstream,
      );
      assert(rowError(both.loss, kl.loss, both.loss.length) <= VALUE, what);
      for (const [i, g] of [s.dHidden, s.dWeight, s.dBias, t.dHidden, t.dWeight].entries()) {
        assertEquals(f16Errors(both.gradients[i], g, g.length, GRADIENT), [], `distillation, gradient ${i}, ${what}`);
      }
    }
  }
  // the two sides may have dtypes of their own; one head may not
  const mixed = linearDistillation(
    tensor(h, [ROWS, DEPTH], half),
    tensor(w, [CLASSES, DEPTH], half),
    tensor(th, [ROWS, TEACHER_DEPTH]),
    tensor(tw, [CLASSES, TEACHER_DEPTH]),
  );
  const plain = new Head(h, w, DEPTH);
  const want = divergenceReference("forwardKl", plain.logits, other.logits, CLASSES);
  assert(rowError(await mixed.data(), want.loss, 1) <= VALUE);
  assertThrows(
    () => linearCrossEntropy(tensor(h, [ROWS, DEPTH], half), tensor(w, [CLASSES, DEPTH]), labelsOf(TARGET)),
    TypeError,
    "linearCrossEntropy: weight must have dtype f16",
  );
});

Deno.test("linear losses: memory is one chunk a side beyond the gradients", async () => {
  await init();
  const rows = 256, depth = 4, classes = 2048, chunkSize = 8;
  const whole = 4 * rows * classes, chunk = 4 * chunkSize * classes, heads = 4 * (rows + classes) * depth;
  const sizes: number[] = [], original = GPUDevice.prototype.createBuffer;
  GPUDevice.prototype.createBuffer = function (d: GPUBufferDescriptor) {
    if (d.usage & GPUBufferUsage.STORAGE) sizes.push(d.size); // not parameter blocks and read-backs
    return original.call(this, d);
  };
  try {
    for (const sides of [1, 2]) {
      for (const reduction of ["mean", "none"] as const) {
        using _scope = new Scope();
        const leaf = (shape: number[]) => zeros(shape, { requiresGrad: true });
        const [hidden, weight] = [leaf([rows, depth]), leaf([classes, depth])];
        const [otherHidden, otherWeight] = [leaf([rows, depth]), leaf([classes, depth])];
        const target = labelsOf(integers(rows, classes, 1)), ones = tensor(Array(rows).fill(1));
        const before = stats();
        sizes.length = 0;
        using _tape = new Tape();
        const o = { reduction, chunkSize };
        const loss = sides === 1
          ? linearCrossEntropy(hidden, weight, target, o)
          : linearDistillation(hidden, weight, otherHidden, otherWeight, o);
        loss.backward(reduction === "none" ? ones : undefined);
        await flush();
        const after = stats(), what = `${sides} sides, ${reduction}`;
        // the pool's size classes are up to a quarter larger; rows of losses and divisors are some kilobytes
        const most = 1.25 * sides * (chunk + heads) + 16 * 1024;
        assert(sizes.every((bytes) => bytes < whole / 4), `${what}: a buffer of ${Math.max(...sizes)} bytes was made`);
        const created = sizes.reduce((a, b) => a + b, 0);
        assert(created <= most, `${what}: ${created} bytes were created, not ${most}`);
        const grown = after.peakBytes - Math.max(before.liveBytes, 0);
        assert(grown <= most, `${what}: ${grown} bytes at the peak, not ${most}`);
        assert(grown >= chunk, `${what}: the peak is no peak of this`);
      }
    }
  } finally {
    GPUDevice.prototype.createBuffer = original;
  }
});

Deno.test("linear losses: what they throw", async () => {
  await init();
  // deno-lint-ignore no-explicit-any
  type Anything = any;
  const h: Anything = tensor(HIDDEN, [ROWS, DEPTH]), w: Anything = tensor(WEIGHT, [CLASSES, DEPTH]);
  const th = tensor(TEACHER_HIDDEN, [ROWS, TEACHER_DEPTH]), tw = tensor(TEACHER_WEIGHT, [CLASSES, TEACHER_DEPTH]);
  const target = labelsOf(TARGET);
  const ce = (o: Anything, x: Anything = h, y: Anything = w, t: Anything = target) => () =>
    linearCrossEntropy(x, y, t, o);
  const kl = (o: Anything, a: Anything = h, b: Anything = w, c: Anything = th, d: Anything = tw) => () =>
    linearDistillation(a, b, c, d, o);
  const L = "linearCrossEntropy: ", D = "linearDistillation: ";
  assertAllThrow([
    [ce({ chunksize: 1 }), TypeError, `${L}unknown option "chunksize"; did you mean chunkSize?`],
    [ce({ returnAccuracy: 1 }), TypeError, `${L}returnAccuracy must be true or false, got 1`],
    [ce({ chunkSize: 0 }), RangeError, `${L}chunkSize must be an integer, at least 1, got 0`],
    [ce({ chunkSize: 1.5 }), RangeError, `${L}chunkSize must be an integer, at least 1, got 1.5`],
    [ce({ chunkSize: "1" }), TypeError, `${L}chunkSize must be a number, got "1"`],
    [ce({ softcap: -1 }), RangeError, `${L}softcap must be a finite number, above 0, got -1`],
    [ce({ bias: zeros([CLASSES + 1]) }), TypeError, `${L}bias must have shape [7], got [8]`],
    [ce({ bias: labelsOf([1, 2, 3, 4, 5, 6, 0]) }), TypeError, `${L}bias must have dtype`],
    [ce({ weight: zeros([3]) }), TypeError, `${L}options.weight must have shape [7], got [3]`],
    [ce({}, h, zeros([CLASSES, DEPTH + 1])), TypeError, `${L}weight must have shape [classes, 4], got [7`],
    [ce({}, h, zeros([DEPTH])), TypeError, `${L}weight must have shape [classes, 4], got [4]`],
    [ce({}, h, zeros([0, DEPTH])), TypeError, `${L}weight must have shape [classes, 4], got [0`],
    [ce({}, 1), TypeError, `${L}hidden must be a Tensor, got 1`],
    [ce({}, h, w, zeros([ROWS])), TypeError, `${L}target must have dtype`],
    [ce({}, h, w, labelsOf([1])), TypeError, `${L}target must have shape [5], got [1]`],
    [kl({ teacherbias: 1 }), TypeError, `${D}unknown option "teacherbias"; did you mean teacherBias?`],
    [kl({ divergence: "kl" }), RangeError, `${D}divergence must be one of forwardKl`],
    [kl({ divergence: "jsd", beta: 2 }), RangeError, `${D}beta must be a finite number, at least 0, at most 1, got 2`],
    [kl({ divergence: "skewForwardKl", alpha: 2 }), RangeError, `${D}alpha must be`],
    [kl({ teacherBias: zeros([3]) }), TypeError, `${D}teacherBias must have shape [7], got [3]`],
    [kl({}, h, w, th, zeros([8, TEACHER_DEPTH])), TypeError, `${D}teacherWeight must have shape [7, depth], got [8`],
    [kl({}, h, w, zeros([4, TEACHER_DEPTH])), TypeError, `${D}teacherHidden must have shape [5`],
    [kl({ labels: 3 }), TypeError, `${D}labels must be a Tensor, got 3`],
  ]);
  const { dispatches } = stats();
  assertThrows(ce({ chunkSize: 0 }), RangeError, "linearCrossEntropy: chunkSize must be an integer, at least 1");
  assertEquals(stats().dispatches, dispatches); // checked before anything is encoded
  assert(Number.isFinite(await linearCrossEntropy(h, w, target).item()));
});

Deno.test("linearCrossEntropy: only the bias learns, over one chunk or several, in memory that held other numbers", async () => {
  await init();
  using _scope = new Scope();
  const h = tensor([[1, 2], [3, 4], [0, 1]]), w = tensor([[1, 0], [0, 1]]), y = tensor(Int32Array.of(0, 1, 1));
  const gradient = async (loss: (bias: Tensor) => Tensor) => {
    const bias = tensor([0.5, -0.5], { requiresGrad: true });
    for (let i = 0; i < 8; i++) full([64], 7).dispose();
    using _tape = new Tape();
    loss(bias).backward();
    return await bias.grad!.data();
  };
  const wanted = await gradient((bias) => crossEntropy(linear(h, w, bias), y));
  for (const chunkSize of [1, 2, 3]) {
    const got = await gradient((bias) => linearCrossEntropy(h, w, y, { bias, chunkSize }));
    got.forEach((g, i) => assertAlmostEquals(g, wanted[i], 1e-6, `${chunkSize}`));
  }
});
