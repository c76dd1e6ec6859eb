import { assert, assertAlmostEquals } from "@std/assert";
import { init } from "@limbeck/limbeck";
import { diffusion } from "./diffusion.ts";
import { vae } from "./vae.ts";

Deno.test("vae: a KL term of weight 100 leaves nothing of the image in z, one of weight 1 does not", async () => {
  await init();
  const { outcomes } = await vae({ seed: 1, quick: true });
  const [light, one, heavy] = outcomes;
  assert(light.kl > one.kl && one.kl > heavy.kl);
  // collapsed: q is the prior, whatever the image
  assert(heavy.kl < 0.05 && heavy.spread < 0.1);
  assertAlmostEquals(heavy.width, 1, 0.05);
  assert(Math.abs(heavy.dependence) < 1);
  // not collapsed; KL(q ‖ prior) of narrow q is large, as KL(prior ‖ q) would be far larger: of weight 1 it would crush the deviations to 1
  assert(one.kl > 2 && one.dependence > 10 && one.width < 0.6);
  assert(heavy.reconstruction - one.reconstruction > 10);
});

Deno.test("diffusion: the sum of Gaussian KLs is the weighted squared error, and its samples have both peaks", async () => {
  await init();
  const { fits: [samples, noise], kl, weighted, truth, bins } = await diffusion({ seed: 1, quick: true });
  assertAlmostEquals(kl, weighted, 1e-3 * weighted);
  assertAlmostEquals(truth.reduce((sum, p) => sum + p * 0.1, 0), 1, 1e-3);
  assert(samples.totalVariation < 0.25 && noise.totalVariation > 0.6);
  assert(samples.wasserstein < 0.3 && noise.wasserstein > 0.8);
  const left = samples.density.reduce((sum, p, i) => sum + (bins[i] < -0.5 ? p * 0.1 : 0), 0);
  assertAlmostEquals(left, 0.4, 0.1); // the left peak's share
});
