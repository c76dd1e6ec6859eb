import { assert, assertEquals, assertThrows } from "@std/assert";
import { init, logSoftmax, softmax, Tape, type Tensor, tensor, zeros } from "@limbeck/limbeck";
import { logSoftmax as logSoftmaxOf } from "../testing/loss_reference.ts";
import { checkOps, checkValues } from "../testing/op.ts";
import { lines } from "../testing/reference.ts";
import { overrides } from "../kernels/gpu/tuning.ts";

const logSoftmax64 = (x: Float64Array) => Float64Array.from(logSoftmaxOf([...x]).log);
const softmax64 = (x: Float64Array) => logSoftmax64(x).map(Math.exp);

const OPS: [string, (x: Tensor, dim?: number) => Tensor, (x: Float64Array) => Float64Array][] = [
  ["softmax", softmax, softmax64],
  ["logSoftmax", logSoftmax, logSoftmax64],
];

Deno.test("softmax: rows of many lengths", async () => {
  const shapes = [[1], [7], [3, 1], [4, 5], [3, 32], [2, 33], [2, 255], [2, 257], [2, 1000], [1, 4099], [0, 3]];
  await checkOps(
    OPS.flatMap(([name, op, f]) =>
      shapes.map((shape) => ({
        name,
        op: (x: Tensor) => op(x),
        reference: lines(f, -1),
        shapes: [shape],
        range: [-4, 4],
      }))
    ),
  );
});

Deno.test("softmax: threads meet in groups of every size, without subgroups too", async () => {
  try {
    for (const subgroups of [true, false]) {
      for (const threads of [8, 32, 128, 1024]) {
        Object.assign(overrides, { rows: { threads, quads: 0 }, subgroups });
        await checkOps(OPS.map(([name, op, f]) => ({
          name: `${name}, ${threads} threads${subgroups ? "" : " without subgroups"}`,
          op: (x: Tensor) => op(x),
          reference: lines(f, -1),
          shapes: [[1, 4099]],
          range: [-4, 4],
        })));
      }
    }
  } finally {
    Object.assign(overrides, { rows: null, subgroups: null });
  }
});

Deno.test("softmax: along any dimension", async () => {
  await checkOps(OPS.flatMap(([name, op, f]) =>
    [0, 1, -3, -1].map((dim) => ({
      name: `${name} along ${dim}`,
      op: (x: Tensor) => op(x, dim),
      reference: lines(f, dim),
      shapes: [[2, 3, 4]],
    }))
  ));
});

Deno.test("softmax: large, infinite and missing arguments", async () => {
  await init();
  const inf = Infinity, rows = [[1e4, -1e4, 1e4], [-inf, 0, 0], [-1e4, -1e4, -1e4], [0, NaN, 1]];
  await checkValues("softmax", softmax(tensor(rows)), [0.5, 0, 0.5, 0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3, NaN, NaN, NaN]);
  await checkValues("logSoftmax", logSoftmax(tensor(rows)), [
    ...[-Math.LN2, -2e4 - Math.LN2, -Math.LN2],
    ...[-inf, -Math.LN2, -Math.LN2],
    ...[-Math.log(3), -Math.log(3), -Math.log(3)],
    ...[NaN, NaN, NaN],
  ]);
});

Deno.test("softmax: a NaN or a +∞, or nothing but −∞, makes its whole row NaN, and the gradients", async () => {
  await init();
  for (const [a, b] of [[NaN, 1], [Infinity, 1], [Infinity, Infinity], [-Infinity, -Infinity]]) {
    for (const columns of [2, 5000]) {
      const values = new Float32Array(columns).fill(b);
      values[columns - 1] = a;
      for (const op of [softmax, logSoftmax]) {
        using _tape = new Tape();
        const x = tensor(values, { requiresGrad: true }), y = op(x);
        y.slice([[0, 1]]).sum().backward();
        for (const got of [y, x.grad!]) assert((await got.data()).every(Number.isNaN), `${op.name} of ${[a, b]}`);
      }
    }
  }
});

Deno.test("softmax: a −∞ has gradient 0", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([-Infinity, 0, 0], { requiresGrad: true });
  softmax(x).backward(tensor([1, 2, 3]));
  await checkValues("gradient", x.grad!, [0, -0.25, 0.25]);
});

Deno.test("softmax: tails keep their digits", async () => {
  await init();
  // log-probability of the likely class: −ln(1 + e⁻²⁰) ≈ −2e-9
  await checkValues("logSoftmax", logSoftmax(tensor([0, -20])), logSoftmax64(Float64Array.of(0, -20)), 4e-6); // as below
  const p = Math.exp(-20) / (1 + Math.exp(-20));
  await checkValues("softmax", softmax(tensor([0, -20])), [1 - p, p], 4e-6); // exp errs by 3 + 2·20 ulp
});

Deno.test("softmax: more rows than one dimension of workgroups has", async () => {
  await init();
  const rows = 70_000; // 65,535 at most
  const x = Float32Array.from({ length: 2 * rows }, (_, i) => i % 2 === 0 ? 0 : Math.floor(i / 2) % 7);
  const y = await softmax(tensor(x, [rows, 2])).data();
  let worst = 0;
  for (let row = 0; row < rows; row++) {
    const p = 1 / (1 + Math.exp(row % 7));
    worst = Math.max(worst, Math.abs(y[2 * row] - p), Math.abs(y[2 * row + 1] - (1 - p)));
  }
  assert(worst < 1e-6, `off by ${worst}`); // exp errs by 3 + 2·6 ulp (6e-8)
});

Deno.test("softmax: rows of nothing", async () => {
  await init();
  using _tape = new Tape();
  for (const op of [softmax, logSoftmax]) assertEquals(await op(zeros([2, 0])).array(), [[], []]);
});

Deno.test("softmax: what it throws", async () => {
  await init();
  assertThrows(() => softmax(zeros([])), TypeError, "softmax: x must have at least 1 dimension");
  assertThrows(() => logSoftmax(zeros([2, 3]), 2), RangeError, "logSoftmax: dim must be");
  assertThrows(() => softmax(tensor(new Int32Array(2))), TypeError, "softmax: x must have dtype f32 or f16, got i32");
});
