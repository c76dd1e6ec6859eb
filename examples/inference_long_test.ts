/** What three more experiments conclude, at their quick size. The truths are closed forms, or computed here in float64. */
import { init } from "@limbeck/limbeck";
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { ganJs } from "./gan_js.ts";
import { apart, nearest, topics } from "./topics.ts";
import { variationalInference } from "./variational_inference.ts";

const QUICK = { seed: 1, quick: true };
const average = (values: number[]) => values.reduce((sum, value) => sum + value) / values.length;

Deno.test("variational_inference: reverse KL ends at 1/Λᵢᵢ, forward KL at Σᵢᵢ, and both leave the mutual information", async () => {
  await init();
  const fits = await variationalInference(QUICK);
  assertEquals(fits.length, 12);
  for (const { method, correlation, variance, kl } of fits) {
    const truth = method === "forward KL" ? 1 : 1 - correlation ** 2;
    for (const each of variance) {
      assertAlmostEquals(each, truth, (method === "ELBO" ? 0.05 : 3e-3) * truth, `${method} at ${correlation}`);
    }
    if (kl !== undefined) assertAlmostEquals(kl, -0.5 * Math.log(1 - correlation ** 2), 2e-4);
  }
  assertEquals(fits.filter(({ kl }) => kl !== undefined).length, 8);
});

Deno.test("gan_js: V(D*) is 2·JSD − log 4, and JSD's gradient vanishes where Wasserstein's stays 1", async () => {
  await init();
  const points = await ganJs(QUICK);
  const h = 0.01, xs = Array.from({ length: 2800 }, (_, i) => -8 + i * h); // −8 to 20
  const normal = (x: number, mean: number, deviation: number) =>
    Math.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * Math.sqrt(2 * Math.PI));
  const integral = (f: (p: number, q: number, z: number) => number, shift: number) =>
    h * xs.reduce((sum, x) => sum + f(normal(x, 0, 1), normal(x, shift, 0.5), (x - shift) / 0.25), 0);
  const xlog = (x: number, of: number) => x === 0 ? 0 : x * Math.log(of);
  for (const { shift, jsd, best, trained, saturating, nonSaturating, wasserstein } of points) {
    const truth = integral((p, q) => (xlog(p, 2 * p / (p + q)) + xlog(q, 2 * q / (p + q))) / 2, shift);
    assertAlmostEquals(jsd, truth, 2e-6, `jsd at ${shift}`);
    assert(jsd <= Math.LN2 + 1e-6);
    assertAlmostEquals(best, 2 * jsd - Math.log(4), 1e-5);
    assertAlmostEquals(trained, best, 1e-5);
    // d(2·JSD)/dshift = ∫ ∂q/∂shift · ln(q/m), of which ∂q/∂shift is q·(x − shift)/σ²
    const slope = integral((p, q, z) => xlog(q, 2 * q / (p + q)) * z, shift);
    assertAlmostEquals(saturating, slope, 1e-3 * slope + 2e-6, `gradient at ${shift}`);
    assertAlmostEquals(nonSaturating, shift - slope, 1e-3, `−ln D* at ${shift}`); // KL(q‖p) is shift²/2 up to a constant
    if (shift >= 2) assertAlmostEquals(wasserstein, 1, 1e-3);
  }
  const { jsd, saturating, wasserstein } = points.at(-1)!;
  assert(Math.LN2 - jsd < 1e-6 && saturating < 1e-12 && wasserstein > 0.999);
});

Deno.test("topics: neighbours are nearer than others, the chapters on whales find each other, and shuffled words do not", async () => {
  await init();
  const { book, shuffled, relative } = await topics(QUICK);
  const others = (rows: number[][]) => average(rows.flatMap((row, i) => row.filter((_, j) => j !== i)));
  for (const [i, row] of book.entries()) {
    assertAlmostEquals(row[i], 0, 1e-6);
    for (const [j, each] of row.entries()) {
      assertAlmostEquals(each, book[j][i], 1e-5); // as no KL is
      assert(each < Math.LN2);
    }
  }
  assert(apart(book, 1) < 0.97 * others(book), "neighbours");
  assertAlmostEquals(apart(shuffled, 1) / others(shuffled), 1, 0.01);
  // pictures of whales, their heads, spout and tail, skeletons, fossils, their size
  const whales = [32, 55, 56, 57, 74, 75, 76, 77, 79, 80, 85, 86, 102, 103, 104, 105];
  const found = (rows: number[][], chapter: number) =>
    nearest(rows, chapter, 5).filter((other) => whales.includes(other));
  assert(found(relative, 32).length >= 2, `nearest to 32: ${nearest(relative, 32, 5)}`);
  assert(found(relative, 103).length >= 3, `nearest to 103: ${nearest(relative, 103, 5)}`);
  assertEquals(nearest(relative, 134, 2).sort(), [133, 135]); // the three days of the chase
  const close = (rows: number[][]) => average(whales.map((chapter) => found(rows, chapter).length));
  assert(close(relative) > 1.5 && close(shuffled) < 1, `${close(relative)}, shuffled ${close(shuffled)}`);
});
