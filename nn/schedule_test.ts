import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { optim } from "@limbeck/limbeck";

const points = (schedule: optim.Schedule, steps: number[]) => steps.map((s) => +schedule(s).toFixed(12));

Deno.test("schedule: cosine", () => {
  assertEquals(points(optim.cosine({ steps: 100 }), [0, 50, 100, 200]), [1, 0.5, 0, 0]);
  assertAlmostEquals(optim.cosine({ steps: 90 })(30), (1 + Math.cos(Math.PI / 3)) / 2, 1e-12);
  const risen = optim.cosine({ steps: 100, warmup: 10, final: 0.2 });
  assertEquals(optim.cosine({ steps: 10, warmup: 10, final: 0.1 })(10), 0.1);
  assertEquals(points(risen, [0, 4, 9, 10, 55, 100, 1000]), [0.1, 0.5, 1, 1, 0.6, 0.2, 0.2]);
});

Deno.test("schedule: linear", () => {
  assertEquals(points(optim.linear({ steps: 10 }), [0, 5, 10, 11]), [1, 0.5, 0, 0]);
  assertEquals(points(optim.linear({ steps: 10, warmup: 2, final: 0.5 }), [0, 1, 2, 6, 10]), [0.5, 1, 1, 0.75, 0.5]);
  assertEquals(points(optim.linear({ steps: 5, warmup: 5 }), [0, 4, 5, 6]), [0.2, 1, 0, 0]); // all of it warm-up
});

Deno.test("schedule: warmup and step", () => {
  assertEquals(points(optim.warmup({ steps: 4 }), [0, 1, 3, 4, 100]), [0.25, 0.5, 1, 1, 1]);
  assertEquals(points(optim.step({ every: 3 }), [0, 2, 3, 5, 6]), [1, 1, 0.1, 0.1, 0.01]);
  assertEquals(points(optim.step({ every: 1, gamma: 0.5 }), [0, 1, 3]), [1, 0.5, 0.125]);
});

Deno.test("schedule: what they throw", () => {
  assertThrows(() => optim.cosine({ steps: 0 }), RangeError, "cosine: steps must be");
  assertThrows(() => optim.linear({ steps: 5, warmup: 6 }), RangeError, "linear: warmup must be");
  assertThrows(() => optim.step({ every: 2, gamma: 0 }), RangeError, "step: gamma must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => optim.warmup({ step: 3 } as any), TypeError, "did you mean steps?");
  const { cosine, linear, warmup, step } = optim, steps = { steps: 5 };
  for (const schedule of [cosine(steps), linear(steps), warmup(steps), step({ every: 2 })]) {
    for (const wrong of [NaN, -1, Infinity]) assertThrows(() => schedule(wrong), RangeError, ": the step must be");
    assertThrows(() => schedule("3" as unknown as number), TypeError, ': the step must be a number, got "3"');
  }
});
