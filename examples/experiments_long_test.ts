/** What the experiments conclude, at their quick size. The truths are closed forms, or computed here in float64. */
import { init } from "@limbeck/limbeck";
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { asymmetry } from "./asymmetry.ts";

const QUICK = { seed: 1, quick: true };

Deno.test("asymmetry: the directions differ, and forwardKl keeps the digits that the textbook formula loses", async () => {
  await init();
  const { pairs: [first, second, , zero, apart], shifts, precision } = await asymmetry(QUICK);
  // P = [.9, .1] against [.6, .4] and [.99, .01]
  assertAlmostEquals(first.forwardKl, .9 * Math.log(.9 / .6) + .1 * Math.log(.1 / .4), 1e-6);
  assertAlmostEquals(first.reverseKl, .6 * Math.log(.6 / .9) + .4 * Math.log(.4 / .1), 1e-6);
  assertAlmostEquals(second.forwardKl, .9 * Math.log(.9 / .99) + .1 * Math.log(.1 / .01), 1e-6);
  assertAlmostEquals(second.reverseKl, .99 * Math.log(.99 / .9) + .01 * Math.log(.01 / .1), 1e-6);
  assertAlmostEquals(first.crossEntropy - first.entropy, first.forwardKl, 1e-6);
  assertAlmostEquals(first.jsd, 0.0632878, 1e-6);
  assertAlmostEquals(zero.forwardKl, Math.LN2, 1e-6);
  assertEquals(zero.reverseKl, Infinity);
  assertAlmostEquals(apart.jsd, Math.LN2, 1e-6);
  assertEquals([apart.forwardKl, apart.totalVariation, apart.wasserstein], [Infinity, 1, 1]);
  for (const { shift, forwardKl, jsd, totalVariation, wasserstein } of shifts) {
    assertAlmostEquals(forwardKl, shift ** 2 / 2, 1e-4);
    assertAlmostEquals(wasserstein, shift, 1e-4);
    assert(jsd <= Math.LN2 && totalVariation <= 1);
  }
  assert(Math.LN2 - shifts.at(-1)!.jsd < 1e-3);
  const near = precision.filter(({ gap }) => gap);
  for (const { ours, truth } of near) assert(Math.abs(ours / truth - 1) < 1e-5);
  assert(Math.abs(near.at(-1)!.textbook / near.at(-1)!.truth - 1) > 10);
  const [underflow, , disjoint] = precision.filter(({ gap }) => !gap);
  assertAlmostEquals(underflow.ours, 100 - Math.LN2, 1e-4);
  assertEquals([underflow.textbook, disjoint.ours], [Infinity, Infinity]);
});
