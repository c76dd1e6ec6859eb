/** Divergences of rows with many classes, which the loops of `kernels/divergence_fast.ts` process, in registers and not. */
import { assert, assertEquals } from "@std/assert";
import {
  dispose,
  distillation,
  forwardKl,
  init,
  jsd,
  reverseKl,
  Tape,
  type Tensor,
  tensor,
  totalVariation,
} from "@limbeck/limbeck";
import { gpu } from "../kernels/gpu/gpu.ts";
import { overrides } from "../kernels/gpu/tuning.ts";
import {
  assertSmall,
  deviations,
  distillation as distillationReference,
  divergence as reference,
  DIVERGENCE_NAMES,
  type DivergenceNumbers,
  DIVERGENCES,
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

type Pair = (student: Tensor, teacher: Tensor) => Tensor;

// the other counts are in the long tests: each takes some pipelines
Deno.test("divergences: class counts under both row plans", async () => {
  await init();
  const errors: [string, number, number][] = [], rows = 3;
  await underAllPlans(async (plan) => {
    for (const V of [1, 4, 33, 1024]) {
      const student = normals(rows * V, 2, V), teacher = normals(rows * V, 2, V + 1);
      for (const name of V === 1024 ? ["jsd" as const] : DIVERGENCE_NAMES) {
        const what = `${name}, ${V} classes, ${plan}`;
        errors.push(...await deviations({ what, name, student, teacher, V, valueFloor: 1e-3, floor: 1e-4 }));
      }
    }
  });
  assertSmall(errors);
});

Deno.test("divergences: rows that several subgroups share", async () => {
  await init();
  const V = 603, student = normals(V, 2, 1), teacher = normals(V, 2, 2);
  try {
    // read again, and in registers in part; as a whole in the long tests: software Vulkan compiles that for four seconds
    for (const [name, quads] of [["reverseKl", 0], ["skewForwardKl", 0], ["jsd", 1]] as const) {
      overrides.rows = { threads: 64, quads };
      assertSmall(await deviations({ what: `${name}, ${quads} vec4s`, name, student, teacher, V }));
    }
  } finally {
    overrides.rows = null;
  }
});

Deno.test("divergences: two sides that are sure of the same class, and unlike in the others", async () => {
  await init();
  const V = 997, errors: [string, number, number][] = [];
  const side = (a: number, b: number) =>
    Array.from({ length: V }, (_, c) => Math.fround(c === 7 ? 10.5 : 2 * Math.sin(a * c + b)));
  const student = side(12.9898, 0), teacher = side(78.233, 1);
  await underAllPlans(async () => {
    for (const name of DIVERGENCE_NAMES) {
      // the likely class's gradient is the difference of 1 − q and 1 − p, sums of a thousand terms 500 times as large
      errors.push(...await deviations({ what: name, name, student, teacher, V, valueFloor: 0.1, gradient: 1e-4 }));
    }
  });
  assertSmall(errors);
});

Deno.test("divergences: NaN anywhere in a long row makes that row NaN, and no other", async () => {
  const { f16, isSoftware } = await init();
  const none = { reduction: "none" } as const;
  const ops: [string, Pair][] = [
    ...DIVERGENCE_NAMES.map((name): [string, Pair] => [name, (s, t) => DIVERGENCES[name](s, t, none)]),
    ["jsd of β = 0.9", (s, t) => jsd(s, t, { ...none, beta: 0.9 })],
    ["distillation", (s, t) => distillation(s, t, labelsOf(integers(s.shape[0], 9, 1)), none)],
  ];
  try {
    // as the adapter would have it; and in part in registers. Some ops only: software Vulkan compiles each for half a second
    for (const [threads, quads, V] of [[0, 0, isSoftware ? 8001 : 40_000], [8, 2, 301]]) {
      overrides.rows = threads > 0 ? { threads, quads } : null;
      // the first rows have it in the student, the next in the teacher, the last row nowhere
      const places = [1, V >> 1, V - 2],
        rows = 2 * places.length + 1,
        want = Array.from({ length: rows }, (_, r) => r < rows - 1);
      const sides = [0, 1].map((side) => {
        const values = normals(rows * V, 2, side);
        for (const [i, place] of places.entries()) values[(side * places.length + i) * V + place] = NaN;
        return values;
      });
      for (const dtype of f16 ? ["f32", "f16"] as const : ["f32"] as const) {
        const some = quads > 0 ? ["forwardKl"] : dtype === "f16" ? ["jsd"] : ops.map(([name]) => name);
        for (const [name, op] of ops.filter(([name]) => some.includes(name))) {
          const what = `${name} of ${V} in ${dtype}`;
          const inputs = sides.map((values) => ({ values, shape: [rows, V], dtype }));
          const { loss, gradients } = await measure(op, inputs, Array(rows).fill(1));
          assertEquals(loss.map(Number.isNaN), want, what);
          for (const g of gradients) {
            const nans = want.map((_, r) => g.slice(r * V, (r + 1) * V).filter(Number.isNaN).length);
            assertEquals(nans, want.map((is) => is ? V : 0), what);
          }
        }
      }
    }
  } finally {
    overrides.rows = null;
  }
});

Deno.test("KLs: a class that one side lacks makes them infinite, however unlikely it is on the other", async () => {
  await init();
  const V = 100, lacking = normals(V, 1, 1), having = normals(V, 1, 2), shape = [1, V];
  lacking[70] = -Infinity;
  const label = labelsOf([3]);
  const infinite: Record<string, (lacking: Tensor, having: Tensor) => Tensor> = {
    forwardKl,
    reverseKl: (a, b) => reverseKl(b, a),
    "distillation by forwardKl": (a, b) => distillation(a, b, label),
    "distillation by reverseKl": (a, b) => distillation(b, a, label, { divergence: "reverseKl" }),
  };
  for (const below of [10, 60, 70, 80]) { // e⁻⁸⁰/Σ is the least that is no underflow
    having[70] = -below;
    const inputs = [lacking, having].map((values) => ({ values, shape }));
    for (const [name, op] of Object.entries(infinite)) {
      const { loss } = await measure(op, inputs);
      assertEquals(loss, [Infinity], `${name}, ${below}`);
    }
    const want = reference("forwardKl", lacking, having, V),
      { gradients } = await measure((s, t) => forwardKl(s, t), inputs);
    assert(rowError(gradients[0], want.dStudent, V) <= GRADIENT, `${below}`);
  }
  having[70] = -200; // which underflows
  assert(await forwardKl(tensor([lacking]), tensor([having])).item() < 2);
});

Deno.test("divergences: Gaussians on a grid, near and as good as apart", async () => {
  await init();
  const grid = Array.from({ length: 121 }, (_, i) => (i - 60) / 4), shifts = [0.01, 0.51, 2.01, 8.01, 15.01]; // no x is as likely in both
  const rows = (mean: (shift: number) => number) => shifts.flatMap((s) => grid.map((x) => -((x - mean(s)) ** 2) / 2));
  const [student, teacher] = [rows((s) => s), rows(() => 0)], shape = [shifts.length, grid.length];
  const inputs = [student, teacher].map((values) => ({ values, shape })), ones = shifts.map(() => 1);
  const errors: [string, number, number][] = [];
  await underAllPlans(async (plan) => {
    for (const name of DIVERGENCE_NAMES) {
      const o = { reduction: "none" as const }, want = reference(name, student, teacher, grid.length, o, ones);
      const { loss, gradients } = await measure((s, t) => DIVERGENCES[name](s, t, o), inputs, ones);
      errors.push([`${name}, ${plan}`, rowError(loss, want.loss, 1, 0.1), VALUE]);
      errors.push([
        `${name}, ${plan}: dStudent`,
        rowError(gradients[0], want.dStudent, grid.length, 1e-3),
        2 * GRADIENT,
      ]);
      errors.push([
        `${name}, ${plan}: dTeacher`,
        rowError(gradients[1], want.dTeacher, grid.length, 1e-3),
        2 * GRADIENT,
      ]);
      const most = name === "jsd" ? Math.LN2 : name === "totalVariation" ? 1 : Infinity; // which the last rows as good as reach
      assert(loss.every((x) => x >= 0 && x <= most), `${name}: ${loss}`);
    }
  });
  assertSmall(errors);
});

Deno.test("divergences: temperatures far below the gaps between logits", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const V of [65, 133]) { // the last of 133 classes is not among those that the row is first measured by
    const shape = [1, V];
    // the likely classes, at places between whole numbers, are the first and another one
    for (const [likely, T, other] of [[2.52, 0.0056, 1], [2.6, 0.0046, 1], [2.6, 0.004, V - 2], [7.4, 0.001, V - 2]]) {
      const row = (first: number, second: number) =>
        Array.from({ length: V }, (_, c) => Math.fround(c === 0 ? first : c === other ? second : 0));
      for (const above of [-1.8 * T, 0.37]) {
        const student = row(likely, likely + above), teacher = row(likely - 1.8 * T, likely), o = { temperature: T };
        for (const name of DIVERGENCE_NAMES) {
          const { loss, gradients } = await measure(
            (s, t) => DIVERGENCES[name](s, t, o),
            [{ values: student, shape }, { values: teacher, shape, requiresGrad: false }],
          );
          const want = reference(name, student, teacher, V, o), what = `${name} of ${V}, ${likely}, ${above}, T = ${T}`;
          const limit = 2 ** -22 * (likely + 1) / T; // roundings of the logits, which are so many times T
          errors.push([`${what}: loss`, rowError(loss, want.loss, 1, 0.1), limit]);
          errors.push([`${what}: dStudent`, rowError(gradients[0], want.dStudent, V, 0.1 / T), limit]);
        }
      }
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: close rows, beside classes that have next to nothing on both sides and are not alike", async () => {
  await init();
  const I = Infinity, errors: [string, number, number][] = [];
  for (const V of [8, 101]) {
    for (const [a, b, offset] of [[-1e9, -1e30, 0], [-1e4, -1e9, 0], [-1e9, -I, 0], [-60, -80, 0], [-1e9, -1e9, 100]]) {
      for (const apart of [1e-3, 1e-5]) {
        const rare = (c: number) => c % 3 === 1, noise = normals(V, apart, 1);
        const teacher = normals(V, 1, 2).map((x, c) => rare(c) ? b : Math.fround(x));
        const student = teacher.map((x, c) => rare(c) ? a : Math.fround(x + offset + noise[c]));
        for (const name of DIVERGENCE_NAMES) {
          const what = `${name} of ${V}, ${a} and ${b}, ${offset}, ${apart}`;
          errors.push(...await deviations({ what, name, student, teacher, V, value: 1e-4, gradient: 1e-4 }));
        }
      }
    }
  }
  assertSmall(errors);
});

Deno.test("KLs: close rows beside a class of which one side has next to nothing", async () => {
  await init();
  const V = 512, rows = 16, errors: [string, number, number][] = [];
  const likely = normals(rows * V, 2, 118), other = normals(rows * V, 0.03, 119).map((x, i) => likely[i] + x);
  for (let row = 0; row < rows; row++) likely[row * V + 3] = 4; // elsewhere |d| is 0.1, and here up to 20
  const sides = [likely, other].map((x) => x.map(Math.fround));
  for (const [student, teacher] of [sides, sides.toReversed()]) {
    for (const name of ["forwardKl", "reverseKl"] as const) {
      const o = { temperature: 0.5, reduction: "none" } as const, upstream = Array<number>(rows).fill(1);
      const what = `${name}, ${student === sides[0] ? "student" : "teacher"} alone`;
      errors.push(...await deviations({ what, name, student, teacher, V, o, upstream, value: 3e-6 }));
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: equal rows but for classes of which one side has next to nothing, or that differ alone", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const V of [64, 100]) {
    const row = (changes: Record<number, number>) => Array.from({ length: V }, (_, c) => Math.fround(changes[c] ?? 0));
    // the last pairs: two classes with their logits exchanged, whose probabilities underflow on one side
    const pairs: [number[], number[]][] = [
      ...[0.5, 2, -60, -90, -1e4, -1e8].map((m): [number[], number[]] => [row({ 3: m }), row({})]),
      ...[[-6, -90], [-14, -95]].map(([a, b]): [number[], number[]] => [row({ 3: a, 5: b }), row({ 3: b, 5: a })]),
    ];
    for (const [a, b] of pairs) {
      for (const [student, teacher] of [[a, b], [b, a]]) {
        for (const name of DIVERGENCE_NAMES) {
          const what = `${name} of ${V}, ${student.slice(3, 6)} and ${teacher.slice(3, 6)}`;
          errors.push(
            ...await deviations({ what, name, student, teacher, V, value: 5e-6, gradient: 1e-5, floor: 1e-6 }),
          );
        }
      }
    }
  }
  assertSmall(errors);
});

Deno.test("totalVariation: one class of many differs, which puts the same rounding into every other", async () => {
  await init();
  const V = 4099, name = "totalVariation", errors: [string, number, number][] = [];
  for (const h of [0.5, 2]) {
    const teacher = Array<number>(V).fill(0), student = teacher.with(V >> 1, h);
    errors.push(...await deviations({ what: `${h} apart`, name, student, teacher, V, value: 5e-6, gradient: 1e-5 }));
  }
  assertSmall(errors);
});

Deno.test("divergences: flat and peaked rows, from as good as equal to far apart", async () => {
  await init();
  const V = 131, rows = 4, ones = Array(rows).fill(1);
  const errors: [string, number, number][] = [];
  for (const peak of [1, 6, 8, 12]) {
    for (const apart of [0.001, 0.03, 0.2, 0.36, 0.8, 1.6, 3]) {
      const noise = normals(rows * V, apart, 103), f32 = (x: number[]) => Array.from(Float32Array.from(x));
      const student = f32(normals(rows * V, peak, 3)), teacher = f32(student.map((x, i) => x + noise[i]));
      for (const name of DIVERGENCE_NAMES) {
        const o = { reduction: "none" as const }, what = `${name}, ${peak}, ${apart}`;
        errors.push(...await deviations({ what, name, student, teacher, V, o, upstream: ones, value: 2 * VALUE }));
      }
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: likely classes behind those that rows are first measured by", async () => {
  await init();
  const V = 997, rises = [3, 7, 12, 40], ones = rises.map(() => 1);
  const rows = (seed: number) => {
    const noise = normals(rises.length * V, 1, seed);
    return rises.flatMap((rise, r) => noise.slice(r * V, (r + 1) * V).map((x, c) => x + (c >= V - 60 ? rise : 0)));
  };
  const [student, teacher] = [rows(1), rows(2)];
  const errors: [string, number, number][] = [];
  await underAllPlans(async (plan) => {
    for (const name of ["forwardKl", "jsd", "totalVariation"] as const) {
      const o = { reduction: "none" as const }, what = `${name}, ${plan}`;
      errors.push(...await deviations({ what, name, student, teacher, V, o, upstream: ones }));
    }
  });
  assertSmall(errors);
});

Deno.test("mixtures: rows whose divergence is small, but not so small that each needs care", async () => {
  await init();
  const V = 1501, apart = [0.1, 0.2, 0.3, 0.6, 1, 2], rows = apart.length, shape = [rows, V], ones = apart.map(() => 1);
  const errors: [string, number, number][] = [];
  const bound = 1e-5; // d errs by 5e-7 beside a class that lies 9 above those that the row is first measured by
  for (const [scale, spike] of [[1, 0], [4, 0], [1, 9]]) {
    const teacher = normals(rows * V, scale, 3).map((x, i) => x + (i % V === 1400 ? spike : 0)),
      noise = normals(rows * V, 1, 4);
    const student = teacher.map((x, i) => x + apart[Math.floor(i / V)] * noise[i]);
    const inputs = [student, teacher].map((values) => ({ values, shape }));
    for (
      const [name, extra] of [
        ...[0.01, 0.3, 0.5, 0.9].map((beta) => ["jsd", { beta }] as const),
        ...[0.1, 0.6].flatMap((alpha) => [["skewForwardKl", { alpha }], ["skewReverseKl", { alpha }]] as const),
      ]
    ) {
      for (const which of [[true, false], [false, true], [true, true]]) {
        const what = `${name} ${JSON.stringify(extra)}, scale ${scale}, spike ${spike}, gradients of ${which}`;
        const o = { reduction: "sum" as const, ...extra }, want = reference(name, student, teacher, V, o, ones);
        const { loss, gradients } = await measure(
          (s, t) => DIVERGENCES[name](s, t, o),
          inputs.map((input, i) => ({ ...input, requiresGrad: which[i] })),
          [1],
        );
        errors.push([what, rowError(loss, want.loss, 1), VALUE]);
        if (which[0]) errors.push([`${what}: dStudent`, rowError(gradients[0], want.dStudent, V), bound]);
        if (which[1]) errors.push([`${what}: dTeacher`, rowError(gradients[1], want.dTeacher, V), bound]);
      }
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: values of mixtures without gradients, beside classes that are far apart", async () => {
  await init();
  const student = Array.from({ length: 64 }, (_, i) => Math.fround(Math.sin(i))), teacher = [...student];
  [student[5], teacher[5]] = [44.105, -44.105].map(Math.fround);
  for (const name of ["skewForwardKl", "skewReverseKl", "jsd"] as const) {
    for (const share of [0.1, 0.3, 0.9]) {
      const own: DivergenceNumbers = name === "jsd" ? { beta: share } : { alpha: share };
      for (const [s, t] of [[student, teacher], [teacher, student]]) {
        const got = await DIVERGENCES[name](tensor([s]), tensor([t]), gpuOptions(own)).item(),
          want = reference(name, s, t, 64, own).loss;
        assert(rowError([got], want, 1) <= VALUE, `${name} ${share}: ${got}, not ${want}`);
      }
    }
  }
});

Deno.test("mixtures: shares of next to nothing, and a class that one side as good as lacks", async () => {
  await init();
  const cases = [["skewForwardKl", { alpha: 1e-15 }, 34], ["skewReverseKl", { alpha: 1e-15 }, 34], [
    "jsd",
    { beta: 1e-30, normalize: true },
    75,
  ]] as const;
  const errors: [string, number, number][] = [];
  for (const [name, o, y] of cases) {
    for (const [student, teacher] of [[[0, 0], [0, -y]], [[0, -y], [0, 0]]]) {
      const what = `${name}, ${student} and ${teacher}`;
      // (of the gradients the reference itself would lose its digits)
      errors.push(...(await deviations({ what, name, student, teacher, V: 2, o, value: 3e-6 })).slice(0, 1));
    }
  }
  // teacher: β·p·(h − E h) with h = −log(β + (1 − β)·eᵈ), over β: d = log 2 and −75 + log 2, and of two classes (h₁ − h₂)/4
  using _tape = new Tape();
  const student = tensor([[0, -75]]), teacher = tensor([[0, 0]], { requiresGrad: true });
  jsd(student, teacher, { beta: 1e-30, normalize: true }).backward();
  const [, u, v] = [1e-30, Math.LN2, -75 + Math.LN2].map((d) => Math.log(1e-30 + Math.exp(d)));
  errors.push(["jsd: dTeacher", rowError(await teacher.grad!.data(), [(v - u) / 4, (u - v) / 4], 2), 1e-6]);
  assertSmall(errors);
});

Deno.test("divergences: gradients of mixtures where several classes are likely on one side alone", async () => {
  await init();
  for (const V of [12, 128]) { // too few for the fast way, and many
    for (const level of [8, 12, 20]) {
      const [student, teacher] = [1, 2].map((seed) => normals(V, 1, seed));
      for (const c of [1, 4, 6]) student[c] = Math.fround(student[c] + level);
      for (const c of [2, 3, 9]) teacher[c] = Math.fround(teacher[c] + level);
      for (const name of ["skewForwardKl", "skewReverseKl", "jsd"] as const) {
        for (const share of [0.001, 0.1, 0.5, 0.9, 0.999]) {
          const o = name === "jsd" ? { beta: share } : { alpha: share }, what = `${name} ${share}, ${level}, ${V}`;
          assertSmall(await deviations({ what, name, student, teacher, V, o }));
        }
      }
    }
  }
});

Deno.test("mixtures: gradients where the classes are nearly alike, beside one that a side lacks", async () => {
  await init();
  const errors: [string, number, number][] = [];
  for (const V of [3, 70]) {
    const likely = normals(V, 1, 7), noise = normals(V, 1e-5, 8);
    const other = likely.map((x, c) => c === 2 ? -Infinity : Math.fround(x + noise[c]));
    for (const [student, teacher] of [[likely, other], [other, likely]]) {
      for (const share of [1e-6, 0.02, 0.3, 0.5, 0.95]) {
        for (
          const [name, o] of [["jsd", { beta: share }], ["skewForwardKl", { alpha: share }], ["skewReverseKl", {
            alpha: share,
          }]] as const
        ) {
          const what = `${name} of ${V}, ${share}, ${student === likely ? "student" : "teacher"} has it`;
          // the gradients are 1e-7 and less: differences of h, which is of the order of 1
          errors.push(...await deviations({ what, name, student, teacher, V, o, value: 3e-6, gradient: 2e-5 }));
        }
      }
    }
  }
  assertSmall(errors);
});

Deno.test("divergences: gradients of the skews where next to nothing is mixed in", async () => {
  await init();
  for (const V of [10, 300]) {
    const [student, teacher] = [3, 4].map((seed) => normals(3 * V, 1, seed));
    for (const name of ["skewForwardKl", "skewReverseKl"] as const) {
      for (const alpha of [0.98, 0.99, 0.9999, 1 - 1e-6, 1 - 1e-9]) {
        const what = `${name} ${alpha}, ${V}`;
        assertSmall(await deviations({ what, name, student, teacher, V, o: { alpha } }));
      }
    }
  }
});

Deno.test("divergences: gradients of the skews where an unlikely class makes all of it", async () => {
  await init();
  const V = 64;
  for (const [level, beside] of [[30, 24.5], [24, 20], [17, 15], [10, 12]]) {
    const [sure, doubts] = [0, beside].map((x) =>
      Array.from({ length: V }, (_, c) => c === 0 ? level : c === 1 ? x : 0)
    );
    for (const alpha of [0.3, 0.7, 0.9, 0.975]) {
      for (const name of ["skewForwardKl", "skewReverseKl"] as const) {
        const [student, teacher] = name === "skewForwardKl" ? [doubts, sure] : [sure, doubts];
        const what = `${name} ${alpha}, ${level}, ${beside}`, gradient = 163 * 2 ** -24; // as exp errs
        assertSmall(await deviations({ what, name, student, teacher, V, o: { alpha }, gradient }));
      }
    }
  }
});

Deno.test("divergences: values of the skews where little of the other side is mixed in", async () => {
  await init();
  const V = 256, shape = [1, V], alpha = 0.9;
  const rows = [1, 2, 4, 8, 11].map((seed) => {
    const near = normals(V, 1, seed);
    return [normals(V, 0.7, seed + 30).map((x, c) => Math.fround(near[c] + x)), near];
  });
  for (const [s, t] of rows) {
    for (const name of ["skewForwardKl", "skewReverseKl"] as const) {
      const want = reference(name, s, t, V, { alpha });
      for (const wanted of [0, 1]) { // whose gradient
        const inputs = [s, t].map((values, side) => ({ values, shape, requiresGrad: side === wanted }));
        const { loss } = await measure((s, t) => DIVERGENCES[name](s, t, gpuOptions({ alpha })), inputs);
        assertSmall([[name, rowError(loss, want.loss, 1), VALUE]]);
      }
    }
  }
});

Deno.test("divergences: a software driver gets no fma, which it rounds twice, even if another device was open before", async () => {
  if (!(await init()).f16) return;
  await dispose();
  const limits = { threads: 256, quads: 5 }, autotune = { rows: { one: limits, two: limits }, tiles: [] };
  const uses: boolean[] = [];
  for (const isSoftware of [false, true]) {
    Object.assign(await init({ autotune }), { isSoftware });
    const { device } = gpu(), { createShaderModule } = device;
    device.createShaderModule = (of) => {
      if (of.label === "jsd") uses.push(of.code.includes("fma(student4"));
      return createShaderModule.call(device, of);
    };
    const side = (seed: number) => tensor(Float16Array.from(normals(4000, 1, seed)), [4, 1000]);
    await jsd(side(1), side(2)).data();
    await dispose();
  }
  assertEquals(uses, [true, false]);
});

Deno.test("distillation: many classes, and labels that are unlikely, likely, certain, impossible, ignored or no class", async () => {
  await init();
  const V = 300, rows = 6, labels = [7, 8, 9, 10, -100, 11], errors: [string, number, number][] = [];
  for (const apart of [1, 0.01]) {
    const teacher = normals(rows * V, 1, 3).map(Math.fround);
    teacher[V + 8] = 14, teacher[2 * V + 9] = 30;
    const student = normals(rows * V, apart, 4).map((x, i) => Math.fround(teacher[i] + x));
    student[3 * V + 10] = teacher[3 * V + 10] = -Infinity;
    for (
      const [temperature, divergence] of [[1, "forwardKl"], [2, "reverseKl"], [3, "forwardKl"], [2, "jsd"]] as const
    ) {
      const o = { temperature, divergence, alpha: 0.9, reduction: "none" } as const;
      const want = distillationReference(student, teacher, labels, V, o, labels.map(() => 1));
      const s = tensor(student, [rows, V], { requiresGrad: true });
      using _tape = new Tape();
      const given = labelsOf(labels).assign(labelsOf([...labels.slice(0, -1), V])); // on the GPU, where the host can't check them
      const got = distillation(s, tensor(teacher, [rows, V]), given, { ...o, returnParts: true });
      got.loss.sum().backward();
      const [loss, ce, gradient] = await Promise.all([got.loss, got.crossEntropy, s.grad!].map((x) => x.data()));
      const what = `${divergence}, T = ${temperature}, ${apart} apart`;
      assertEquals([ce[3], ce[4], ce[5], loss[3], loss[5]], [Infinity, 0, NaN, Infinity, NaN], what);
      assert(gradient.subarray(5 * V).every(Number.isNaN), what);
      for (const row of [0, 1, 2]) {
        const off = (a: number, b: number) => Math.abs(a / b - 1);
        errors.push([`${what}, row ${row}: cross-entropy`, off(ce[row], want.crossEntropy[row]), 2e-6]);
        // a KL just above that of near rows is the difference of larger sums
        errors.push([`${what}, row ${row}: loss`, off(loss[row], want.loss[row]), 3 * VALUE]);
      }
      errors.push([
        `${what}: gradient`,
        rowError(gradient.subarray(0, 5 * V), want.dStudent.slice(0, 5 * V), V),
        GRADIENT,
      ]);
    }
  }
  assertSmall(errors);
});

Deno.test("distillation: an ignored row whose last class has no probability has cross-entropy 0, in few classes and many", async () => {
  await init();
  for (const V of [4, 100]) {
    const [s, t] = [1, 2].map((seed) =>
      Array.from({ length: V }, (_, c) => c < V - 1 ? Math.sin(seed + c) : -Infinity)
    );
    const student = tensor([s], { requiresGrad: true }),
      teacher = tensor([t]),
      labels = tensor(Int32Array.of(-100), [1]);
    using _tape = new Tape();
    const { loss, crossEntropy, divergence } = distillation(student, teacher, labels, {
      reduction: "none",
      returnParts: true,
    });
    loss.sum().backward();
    const [l, ce, d] = await Promise.all([loss, crossEntropy, divergence].map((x) => x.item()));
    assertEquals(ce, 0, `${V}`);
    assert(d > 0 && Math.abs(l / (2 * d) - 1) < 1e-6, `${V}: ${l}, ${d}`); // (1 − α)·T²·d
    assert((await student.grad!.data()).every(Number.isFinite), `${V}`);
  }
});

Deno.test("totalVariation: at most 1 between rows with nothing in common", async () => {
  await init();
  for (const V of [6, 200]) { // with care, and fast
    const shape = [200, V], noise = [1, 2].map((seed) => normals(200 * V, 1, seed));
    const [s, t] = noise.map((x, side) => x.map((y, i) => Math.fround((i % V < V / 2) === (side === 0) ? y + 60 : y)));
    const got = await totalVariation(tensor(s, shape), tensor(t, shape), { reduction: "none" }).data();
    assert(got.every((x) => x <= 1 && x > 1 - 1e-6), `${V}: ${Math.max(...got)}`);
  }
});
