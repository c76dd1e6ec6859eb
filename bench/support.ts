/**
 * What the benches and the report share: steps with their gradients, and checks before anything is timed.
 *
 * @module
 */

import { matmul, ones, Scope, slice, Tape, type Tensor } from "@limbeck/limbeck";
import { gpu } from "../kernels/gpu/gpu.ts";

/** Something to be timed with its gradients: a function of leaves, and the gradient of its value unless that is a scalar. */
export interface Work {
  forward: () => Tensor;
  leaves: Tensor[];
  upstream?: Tensor;
}

/** Forward and backward once, without keeping the gradients. */
export function runStep({ forward, leaves, upstream }: Work): void {
  using _tape = new Tape();
  forward().backward(upstream);
  dropGradients(leaves);
}

/** Drops the gradients, so that the next step writes them instead of adding to them. */
export function dropGradients(leaves: Tensor[]): void {
  for (const leaf of leaves) leaf.grad = null;
}

/**
 * Waits until the GPU has done everything that was encoded. On Deno the read blocks until then and costs 0.1 ms; awaiting
 * `mapAsync` would sleep 10 ms more.
 */
export async function finish(): Promise<void> {
  using _scope = new Scope();
  await ones([1]).data();
}

/** The GPU's value and gradients of some work, kept. */
function results({ forward, leaves, upstream }: Work): { value: Tensor; gradients: Tensor[] } {
  using _tape = new Tape();
  const value = forward();
  value.backward(upstream);
  const gradients = leaves.map((leaf) => leaf.grad!.keep());
  dropGradients(leaves);
  return { value: value.detach().keep(), gradients };
}

/** The same numbers as f32. */
export const widened = (x: Tensor): Tensor => x.dtype === "f32" ? x : x.cast("f32");

/**
 * Throws unless x is near y, which is f32: no element may differ by more than `share` of y's largest element, and the sum of all
 * differences must be at most that share of the sum of all magnitudes (the gradient of a cross-entropy has one large element per
 * row, and as much in all others together). If x is f16, the rounding to f16 is allowed as well. The default, 10⁻⁴, is for f32 sums
 * of up to 10⁵ terms.
 */
export async function assertNear(what: string, x: Tensor, y: Tensor, share = 1e-4): Promise<void> {
  using _scope = new Scope();
  const difference = widened(x).sub(y).abs(), magnitude = y.abs();
  const [most, all, largest, whole] = await Promise.all(
    [difference.max(), difference.sum(), magnitude.max(), magnitude.sum()].map((t) => t.item()),
  );
  const [relative, absolute] = x.dtype === "f16" ? [share + 2 ** -11, 2 ** -24] : [share, 0];
  // a maximum ignores a NaN, a sum does not
  if (!(most <= relative * largest + absolute && all <= relative * whole + absolute * x.size)) {
    throw new Error(`${what} is off by ${most} of ${largest}, in all by ${all} of ${whole}`);
  }
}

/** Throws unless both have the same value and gradients; `twin` is in f32. */
export async function assertAgree(what: string, fused: Work, twin: Work): Promise<void> {
  const a = results(fused), b = results(twin);
  await assertNear(`${what}: the value`, a.value, b.value);
  for (const [i, gradient] of a.gradients.entries()) {
    await assertNear(`${what}: gradient ${i}`, gradient, b.gradients[i]);
  }
  for (const x of [a.value, b.value, ...a.gradients, ...b.gradients]) x.dispose();
}

/** Throws unless some elements of c = op(a)·op(b) agree with float64. */
export async function assertProduct(
  what: string,
  a: Tensor,
  b: Tensor,
  o: { transposeA?: boolean; transposeB?: boolean },
): Promise<void> {
  using _scope = new Scope();
  const c = matmul(a, b, o), [m, n] = c.shape;
  const line = (x: Tensor, dim: number, i: number) =>
    slice(x, dim === 0 ? [[i, i + 1]] : [[0, x.shape[0]], [i, i + 1]]);
  for (const i of [0, m >> 1, m - 1]) {
    const [row, whole] = await Promise.all([line(a, o.transposeA ? 1 : 0, i).data(), line(c, 0, i).data()]);
    for (const j of [0, n >> 1, n - 1]) {
      const column = await line(b, o.transposeB ? 0 : 1, j).data();
      let sum = 0, magnitude = 0;
      for (let k = 0; k < row.length; k++) {
        sum += row[k] * column[k];
        magnitude += Math.abs(row[k] * column[k]);
      }
      // a blocked f32 sum is off by a few roundings of the sum of magnitudes; an f16 result is rounded again
      const allowed = 2 ** -21 * magnitude + (c.dtype === "f16" ? 2 ** -11 * Math.abs(sum) : 0);
      if (!(Math.abs(whole[j] - sum) <= allowed)) {
        throw new Error(`${what}: element [${i}, ${j}] must be ${sum} ± ${allowed}, got ${whole[j]}`);
      }
    }
  }
}

/**
 * A group of `deno bench`: several ways to compute the same value and gradients. All are compared with the first, the baseline, before
 * they are timed. A GPU runs each many times between two waits, so that it reaches its clock rates and the wait does not count.
 */
export async function compare(group: string, ways: Record<string, Work>): Promise<void> {
  const [[, first], ...others] = Object.entries(ways);
  for (const [name, work] of others) await assertAgree(`${group}, ${name}`, work, first);
  compareSteps(group, Object.fromEntries(Object.entries(ways).map(([name, work]) => [name, () => runStep(work)])));
}

/** The same for steps that have been compared already. */
export function compareSteps(group: string, ways: Record<string, () => void>): void {
  const runs = gpu().info.isSoftware ? 1 : 20;
  for (const [i, [name, step]] of Object.entries(ways).entries()) {
    Deno.bench({
      name: `${group}, ${name}${runs === 1 ? "" : `, ${runs} times`}`, // whole, for --filter
      group,
      baseline: i === 0,
      async fn() {
        for (let run = 0; run < runs; run++) step();
        await finish();
      },
    });
  }
}
