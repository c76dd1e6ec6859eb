import { assertEquals } from "@std/assert";
import { init, linear, matmul, profile, Scope, Tape, tensor } from "@limbeck/limbeck";
import { random } from "../testing/op.ts";

/** Numbers that f16 holds. */
const halves = (count: number, seed: number) =>
  Float16Array.from({ length: count }, random(seed)).map((x) => 2 * x - 1);

/** The product of rows × depth and depth × columns in float64, and the sums of its terms' magnitudes. */
function product(a: (m: number, k: number) => number, b: (k: number, n: number) => number, [m, n, k]: number[]) {
  const sums = new Float64Array(m * n), sizes = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      for (let l = 0; l < k; l++) {
        const term = a(i, l) * b(l, j);
        sums[i * n + j] += term;
        sizes[i * n + j] += Math.abs(term);
      }
    }
  }
  return { sums, sizes };
}

/** What exceeds the bound that kernels/tensor_cores.ts states, and the rounding to f16. */
function beyond(got: ArrayLike<number>, { sums, sizes }: ReturnType<typeof product>, depth: number): number[] {
  const bound = (i: number) => (depth + 16) * 2 ** -23 * sizes[i] + 2 ** -11 * Math.abs(sums[i]) + 2 ** -24;
  return Array.from(sums.keys()).filter((i) => !(Math.abs(got[i] - sums[i]) <= bound(i)));
}

// Tensor cores are an extra of Dawn on NVIDIA: no software adapter has them, so that there this file only asks for them. Where they are: whole and cut tiles, depths that
// are no multiple of a slab's, pieces along k, every layout, batches, and the sums of a bias gradient; epilogues have their test in matmul_test.ts.
Deno.test("tensor cores: products of f16 keep to their bound, in every layout", async () => {
  const { tensorCores, timestamps } = await init();
  if (!tensorCores) return;
  const shapes = [[128, 128, 32], [64, 256, 96], [200, 72, 100], [16, 20, 12], [1600, 1540, 64], [512, 128, 1100]];
  for (const [m, n, k] of shapes) {
    for (const transposeA of [false, true]) {
      for (const transposeB of [false, true]) {
        using _scope = new Scope();
        const x = halves(m * k, m), y = halves(k * n, n);
        const a = tensor(x, transposeA ? [k, m] : [m, k]), b = tensor(y, transposeB ? [n, k] : [k, n]);
        const want = product(
          (i, l) => x[transposeA ? l * m + i : i * k + l],
          (l, j) => y[transposeB ? j * k + l : l * n + j],
          [m, n, k],
        );
        const c = matmul(a, b, { transposeA, transposeB });
        assertEquals(beyond(await c.data(), want, k), [], `${[m, n, k]}, ${transposeA}, ${transposeB}`);
        if (!timestamps) continue;
        const { kernels } = await profile(() => matmul(a, b, { transposeA, transposeB }));
        const names = kernels.map(({ name }) => name).sort();
        assertEquals(names, ["matmul (tensor cores)", ...k > 1000 ? ["matmul pieces"] : []]);
      }
    }
  }
});

Deno.test("tensor cores: batches", async () => {
  const { tensorCores } = await init();
  if (!tensorCores) return;
  using _scope = new Scope();
  const [m, n, k] = [40, 24, 48], x = halves(3 * m * k, 1), y = halves(3 * k * n, 2);
  const c = await matmul(tensor(x, [3, m, k]), tensor(y, [3, k, n])).data();
  for (let b = 0; b < 3; b++) {
    const want = product((i, l) => x[(b * m + i) * k + l], (l, j) => y[(b * k + l) * n + j], [m, n, k]);
    assertEquals(beyond(c.subarray(b * m * n, (b + 1) * m * n), want, k), []);
  }
});

Deno.test("tensor cores: a linear layer, forward and backward", async () => {
  const { tensorCores } = await init();
  if (!tensorCores) return;
  using _tape = new Tape();
  const [rows, ins, outs] = [200, 96, 136];
  const [x, w, bias, dY] = [rows * ins, outs * ins, outs, rows * outs].map(halves);
  const leaf = (values: Float16Array, shape: number[]) => tensor(values, shape, { requiresGrad: true });
  const [tx, tw, tb] = [leaf(x, [rows, ins]), leaf(w, [outs, ins]), leaf(bias, [outs])];
  const y = linear(tx, tw, tb);
  const forward = product((i, l) => x[i * ins + l], (l, j) => w[j * ins + l], [rows, outs, ins]);
  forward.sums.forEach((_, i) => forward.sums[i] += bias[i % outs]);
  assertEquals(beyond(await y.data(), forward, ins), []);
  y.backward(tensor(dY, [rows, outs]));
  const dX = product((i, l) => dY[i * outs + l], (l, j) => w[l * ins + j], [rows, ins, outs]);
  assertEquals(beyond(await tx.grad!.data(), dX, outs), []);
  const dW = product((i, l) => dY[l * outs + i], (l, j) => x[l * ins + j], [outs, ins, rows]);
  assertEquals(beyond(await tw.grad!.data(), dW, rows), []);
  const dBias = product((_, l) => 1 + 0 * l, (l, j) => dY[l * outs + j], [1, outs, rows]);
  assertEquals(beyond(await tb.grad!.data(), dBias, rows), []);
});
