/** What the experiments conclude, at their quick size. The truths are closed forms, or computed here in float64. */
import { init } from "@limbeck/limbeck";
import { assert, assertAlmostEquals, assertEquals, assertStringIncludes } from "@std/assert";
import { asymmetry } from "./asymmetry.ts";
import { betaSweep } from "./beta_sweep.ts";
import { CLOSED_FORMS, DISTANCES, gaussianFit } from "./gaussian_fit.ts";
import { policyKl } from "./policy_kl.ts";
import { regularisers } from "./regularisers.ts";
import { softTargets } from "./soft_targets.ts";
import { optimum } from "./support/lake.ts";

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

Deno.test("gaussian_fit: forward KL matches the moments from every start, reverse KL takes a mode, MSE is at its wider optimum", async () => {
  await init();
  const { fits, slopes } = await gaussianFit(QUICK);
  const near = (loss: string, starts: number[]) => {
    const own = fits.filter((fit) => fit.loss === loss);
    const { mean, deviation } = CLOSED_FORMS[loss];
    for (const fit of starts.map((start) => own[start])) {
      const means = mean < 0 ? [-5, 10] : [mean];
      assert(means.some((mean) => Math.abs(fit.mean - mean) < 0.01), `${loss}: mean ${fit.mean}`);
      assertAlmostEquals(fit.deviation, deviation, 0.01, loss);
    }
  };
  assertAlmostEquals(CLOSED_FORMS["forward KL"].deviation, 7.5664, 1e-4);
  near("forward KL", [0, 1, 2, 3, 4]);
  near("reverse KL", [0, 1, 3, 4]);
  for (const loss of ["MSE", "cosine"]) near(loss, [1, 3]);
  for (const loss of ["jsd, β = 0.5", "cosine"]) { // far from the modes nothing moves them
    const [left, , , , right] = fits.filter((fit) => fit.loss === loss);
    assert(Math.abs(left.mean + 20) < 0.1 && Math.abs(right.mean - 30) < 0.1);
  }
  const slopeOf = (name: string) => slopes.find(({ loss }) => loss === name)!;
  // reverse KL between N(10 + d, 1) and the right half of the mixture is log 2 + d²/2: its slope is d
  slopeOf("reverse KL").plain.forEach((slope, i) => assertAlmostEquals(slope, DISTANCES[i], 0.02));
  // forward KL is E(x − μ)²/2 up to a constant: its slope is the distance from the mean, 2.5
  slopeOf("forward KL").plain.forEach((slope, i) => assertAlmostEquals(slope, 7.5 + DISTANCES[i], 0.02));
  const ratio = (loss: string) => slopeOf(loss).tenfold[2] / slopeOf(loss).plain[2];
  for (
    const [loss, wanted] of [["forward KL", 1], ["reverse KL", 1], ["cosine", 1], ["L1", 10], ["MSE", 100]] as const
  ) {
    assertAlmostEquals(ratio(loss), wanted, 0.01 * wanted, loss);
  }
});

Deno.test("beta_sweep: coverage falls and quality rises from forward to reverse KL, and normalize makes the ends continuous", async () => {
  await init();
  const { students, values } = await betaSweep(QUICK);
  const average = (beta: number, key: "coverage" | "quality") => {
    const own = students.filter((student) => student.beta === beta);
    return own.reduce((sum, student) => sum + student[key], 0) / own.length;
  };
  assert(average(0, "coverage") > average(0.5, "coverage") && average(0.5, "coverage") > average(1, "coverage"));
  assert(average(0, "quality") < average(0.5, "quality") && average(0.5, "quality") < average(1, "quality"));
  assert(average(0, "coverage") > 0.9 && average(1, "quality") > 0.95);
  // two Gaussians hold at most two of six modes, at KL log 3; one that holds one, at log 6
  for (const { beta, coverage, loss } of students) {
    if (beta === 1) assert(coverage <= 1 / 3 && loss > Math.log(3) - 0.02);
  }
  // P = [.9, .1], Q = [.6, .4]
  const forward = .9 * Math.log(.9 / .6) + .1 * Math.log(.1 / .4), reverse = .6 * Math.log(.6 / .9) + .4 * Math.log(4);
  const at = (beta: number) => values.find((value) => value.beta === beta)!;
  assertAlmostEquals(at(0).plain, forward, 1e-6);
  assertAlmostEquals(at(1).plain, reverse, 1e-6);
  assertAlmostEquals(at(0.5).plain, 0.0632878, 1e-6);
  assertAlmostEquals(at(1e-4).plain, 1e-4 * forward, 1e-8);
  assertAlmostEquals(at(1e-4).normalized, forward, 1e-4);
  assertAlmostEquals(at(0.9999).normalized, reverse, 1e-4);
  assertAlmostEquals(at(1e-4).normalizedGradient, at(0).plainGradient, 1e-4); // q − p = 0.3
});

Deno.test("soft_targets: soft targets teach a digit that was never shown, and T²·gradient tends to the logits' difference", async () => {
  await init();
  const { near, students, gradients, logits } = await softTargets(QUICK);
  const nearest = near.map((row, digit) => row.indexOf(Math.max(...row.filter((_, other) => other !== digit))));
  assertEquals([nearest[4], nearest[7]], [9, 9]);
  const [labels, plain, soft] = students.map(({ unseen }) => unseen);
  assertEquals(labels, 0);
  assert(plain > 0 && soft > 2 * plain && soft > 0.15);

  const V = 10, rows = logits.student.length / V;
  const centred = (x: number[]) => x.map((value) => value - x.reduce((sum, each) => sum + each) / V);
  const logSoftmax = (x: number[]) => {
    const top = Math.max(...x), rest = Math.log(x.reduce((sum, value) => sum + Math.exp(value - top), 0));
    return x.map((value) => value - top - rest);
  };
  // ∂/∂student of the row at temperature 1, from ln q and ln p
  const formulas: Record<string, (x: number[], y: number[]) => number[]> = {
    "forward KL": (x, y) => x.map((_, i) => Math.exp(x[i]) - Math.exp(y[i])),
    "reverse KL": (x, y) => {
      const kl = x.reduce((sum, each, i) => sum + Math.exp(each) * (each - y[i]), 0);
      return x.map((each, i) => Math.exp(each) * (each - y[i] - kl));
    },
    "jsd, normalised": (x, y) => {
      const ratio = x.map((each, i) => each - Math.log((Math.exp(each) + Math.exp(y[i])) / 2));
      const kl = x.reduce((sum, each, i) => sum + Math.exp(each) * ratio[i], 0);
      return x.map((each, i) => 0.5 * Math.exp(each) * (ratio[i] - kl) / 0.25);
    },
  };
  for (const { name, temperature, error } of gradients) {
    let distance = 0, norm = 0;
    for (let row = 0; row < rows; row++) {
      const [s, t] = [logits.student, logits.teacher].map((all) => [...all.subarray(row * V, (row + 1) * V)]);
      const [x, y] = [s, t].map((own) => logSoftmax(own.map((logit) => logit / temperature)));
      const [a, b] = [s, t].map(centred);
      formulas[name](x, y).forEach((gradient, i) => {
        const limit = (a[i] - b[i]) / V;
        distance += (temperature * gradient - limit) ** 2;
        norm += limit ** 2;
      });
    }
    const truth = Math.sqrt(distance / norm);
    assertAlmostEquals(error, truth, 1e-3 * truth + 1e-5, `${name} at T = ${temperature}`);
    if (temperature === 1000) assert(error < 0.01, name);
  }
});

Deno.test("policy_kl: a penalty or clipping keeps updates short, and gets further than a policy without", async () => {
  await init();
  const points = await policyKl(QUICK);
  const of = (method: string) => points.filter((point) => point.method === method);
  const largest = (method: string) => Math.max(...of(method).map(({ kl }) => kl));
  // the first policy is uniform over 4 moves: KL(new‖old) could not exceed log 4, KL(old‖new) does
  assert(Math.max(...of("unconstrained").map(({ update, kl }) => update === 0 ? kl : 0)) > Math.log(4));
  for (const method of ["KL penalty", "clipped"]) assert(largest(method) < 0.5, `${method}: ${largest(method)}`);
  const last = (method: string) => {
    const scores = of(method).filter(({ update }) => update >= 7).map(({ score }) => score);
    return scores.reduce((sum, score) => sum + score) / scores.length;
  };
  assert(last("KL penalty") > last("unconstrained") + 0.1);
  // the goal is 6 moves away, and a policy needs no luck to hold its way but for the slips
  assert(optimum() > 0.8 && optimum() < 1);
  assert(last("KL penalty") < optimum() + 0.1);
});

Deno.test("regularisers: smoothing lowers confidence, z-loss the log-sum-exp, softcap the logits and so the error of f16", async () => {
  await init();
  const [plain, , smoothed, zLoss, capped] = await regularisers(QUICK);
  const sureness = ({ bins }: typeof plain) =>
    // mean confidence − accuracy
    bins.reduce((sum, { confidence, accuracy, share }) => sum + share * (confidence - accuracy), 0);
  assert(sureness(plain) > 0.02 && sureness(smoothed) < -0.05);
  for (const { calibrationError, bins } of [plain, smoothed]) {
    assert(calibrationError >= Math.abs(sureness({ ...plain, bins })) - 1e-9 && calibrationError < 0.5);
    assertAlmostEquals(bins.reduce((sum, { share }) => sum + share, 0), 1, 1e-9);
  }
  const last = ({ logSumExp }: typeof plain) => logSumExp.slice(-10).reduce((sum, each) => sum + each) / 10;
  assert(Math.abs(last(zLoss)) < 1 && last(plain) > 4);
  assert(capped.largestLogit <= 4 && plain.largestLogit > 10);
  if (plain.f16Error && capped.f16Error) {
    assert(capped.f16Error.loss < plain.f16Error.loss / 2);
    // a loss takes lse − x: the rounding of each, at most half a step of 11 bits, and as much again of the f16 that is returned
    assert(plain.f16Error.loss < 4 * plain.largestLogit * 2 ** -12);
  }
});

Deno.test("an experiment as a program: a table, an SVG, and exit code 2 for a bad option", async () => {
  const out = await Deno.makeTempDir();
  const run = (...options: string[]) =>
    new Deno.Command("deno", {
      args: ["run", "--frozen", "--no-prompt", `--allow-write=${out}`, "examples/asymmetry.ts", ...options],
    }).output();
  const { code, stdout } = await run("--quick", "--out", out);
  assertEquals(code, 0);
  assertStringIncludes(new TextDecoder().decode(stdout), `${out}/asymmetry.svg, computed on`);
  assertStringIncludes(await Deno.readTextFile(`${out}/asymmetry.svg`), "KL has a direction");
  const bad = await run("--steps", "3");
  assertEquals(bad.code, 2);
  assertStringIncludes(new TextDecoder().decode(bad.stderr), 'one of --seed, --quick, --out, --help, got "--steps"');
  await Deno.remove(out, { recursive: true });
});
