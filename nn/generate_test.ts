import { assert, assertEquals, assertRejects } from "@std/assert";
import { init, manualSeed, nn, noGrad, Scope, stats, Tape, Tensor, tensor } from "@limbeck/limbeck";
import { random } from "../testing/op.ts";
import { sample } from "./generate.ts";

/** A decoder whose weights are large enough for every token to depend on those before it. */
function makeGpt(context: number, dropout = 0): nn.Gpt {
  manualSeed(7);
  const gpt = new nn.Gpt({ vocabulary: 23, context, layers: 2, width: 16, heads: 2, dropout });
  for (const x of gpt.parameters()) if (x.rank > 1) nn.init.normal(x, 0, 0.4);
  return gpt;
}

const PROMPTS = [new Int32Array([1, 2, 3]), new Int32Array([20, 4, 9])];

const arrays = (texts: readonly Int32Array[]) => texts.map((text) => [...text]);

/** The likeliest tokens, computed from the whole text for each. */
async function greedy(gpt: nn.Gpt, prompts: readonly Int32Array[], length: number): Promise<number[][]> {
  const texts = arrays(prompts);
  for (let i = 0; i < length; i++) {
    using _scope = new Scope();
    const tokens = tensor(Int32Array.from(texts.flat()), [texts.length, texts[0].length]);
    const best = await noGrad(() => gpt.forward(tokens).argmax({ dim: 2 })).array() as number[][];
    texts.forEach((text, b) => text.push(best[b].at(-1)!));
  }
  return texts;
}

Deno.test("generate: the cache changes nothing", async () => {
  await init();
  const gpt = makeGpt(40);
  const cases: [readonly Int32Array[], number][] = [ // prompts, tokens to add
    [PROMPTS, 37], // up to the last place
    [[new Int32Array([5])], 12],
    [PROMPTS.map((_, b) => Int32Array.from({ length: 35 }, (_, i) => (i * i + b) % 23)), 3], // longer than a tile of queries
  ];
  for (const [prompts, length] of cases) {
    const want = await greedy(gpt, prompts, length);
    assert(new Set(want[0].slice(-length)).size > 1, `${want[0]}`); // else any mistake would pass
    const got = await nn.generate(gpt, prompts, { length, temperature: 0 });
    assertEquals(arrays(got), want);
  }
  gpt.dispose();
});

Deno.test("generate: one candidate is the likeliest", async () => {
  await init();
  const gpt = makeGpt(20), length = 10;
  const likeliest = await nn.generate(gpt, PROMPTS, { length, temperature: 0 });
  assertEquals(await nn.generate(gpt, PROMPTS, { length, topK: 1, seed: 3 }), likeliest);
  assertEquals(await nn.generate(gpt, PROMPTS, { length, topP: 1e-6, seed: 4 }), likeliest);
  assertEquals(await nn.generate(gpt, PROMPTS, { length, temperature: 1e-3, seed: 5 }), likeliest);
  assert(arrays(await nn.generate(gpt, PROMPTS, { length })).join() !== arrays(likeliest).join());
  gpt.dispose();
});

Deno.test("generate: seeds", async () => {
  await init();
  const gpt = makeGpt(20), run = (seed?: number) => nn.generate(gpt, PROMPTS, { length: 15, temperature: 2, seed });
  const first = await run(1);
  assertEquals(await run(1), first);
  assert(arrays(await run(2)).join() !== arrays(first).join());
  assertEquals(await run(undefined), await run(0));
  const [a, b] = await nn.generate(gpt, [PROMPTS[0], PROMPTS[0]], { length: 15, temperature: 2 });
  assert(a.join() !== b.join(), "each prompt draws for itself");
  gpt.dispose();
});

Deno.test("generate: a stop token ends its sequence", async () => {
  await init();
  const gpt = makeGpt(30), length = 20;
  const whole = arrays(await nn.generate(gpt, PROMPTS, { length, temperature: 0 }));
  const cut = (text: number[], stop: number) => {
    const end = text.indexOf(stop, 3);
    return end < 0 ? text : text.slice(0, end + 1);
  };
  // every token that occurs, and one of the prompt, which ends nothing
  for (const stop of new Set([...whole[0].slice(0, 6), ...whole[1].slice(3, 6)])) {
    const got = await nn.generate(gpt, PROMPTS, { length, temperature: 0, stop });
    assertEquals(arrays(got), whole.map((text) => cut(text, stop)), `stop ${stop}`);
  }
  const before = stats().dispatches;
  await nn.generate(gpt, [PROMPTS[0]], { length, temperature: 0 });
  const full = stats().dispatches - before;
  await nn.generate(gpt, [PROMPTS[0]], { length, temperature: 0, stop: whole[0][3] });
  assert(stats().dispatches - before < 1.5 * full, "the run ends when all have ended");
  gpt.dispose();
});

Deno.test("generate: leaves the train flag, gradients and memory alone", async () => {
  await init();
  const gpt = makeGpt(20, 0.5).train(), live = stats();
  const got = await nn.generate(gpt, PROMPTS, { length: 4, temperature: 0 });
  assert(gpt.training && gpt.blocks[0].training);
  assertEquals(arrays(got), await greedy(gpt.eval(), PROMPTS, 4)); // nothing was dropped
  await nn.generate(gpt, PROMPTS, { length: 1 });
  assert(!gpt.training);
  assertEquals([stats().liveTensors, stats().liveBytes], [live.liveTensors, live.liveBytes]);
  {
    using _tape = new Tape(); // between a forward pass and its backward pass
    const x = tensor([1, 2], { requiresGrad: true }), loss = x.square().sum();
    assertEquals(await nn.generate(gpt, PROMPTS, { length: 4, temperature: 0 }), got);
    loss.backward();
    assertEquals(await x.grad!.array(), [2, 4]);
  }
  assert(gpt.parameters().every((p) => p.grad === null));
  gpt.dispose();
});

Deno.test("generate: two at once, a scope and a training step in between", async () => {
  await init();
  const gpt = makeGpt(20, 0.5), live = stats();
  const runs = [{ length: 9, seed: 1 }, { length: 5, seed: 2 }, { length: 0 }];
  const want = [];
  for (const run of runs) want.push(await nn.generate(gpt, PROMPTS, run));
  const scope = new Scope(), all = Promise.all(runs.map((run) => nn.generate(gpt, PROMPTS, run)));
  assert(gpt.training && gpt.blocks[0].training); // also while they run
  scope.close();
  {
    using _tape = new Tape();
    gpt.forward(tensor(new Int32Array(3), [1, 3]));
  }
  assertEquals(await all, want);
  assertEquals([stats().liveTensors, stats().liveBytes], [live.liveTensors, live.liveBytes]);
  gpt.dispose();
});

Deno.test("generate: each module keeps its own train flag", async () => {
  await init();
  const gpt = makeGpt(20, 0.5), flags = () => [gpt, ...gpt.blocks, gpt.norm].map((module) => module.training);
  gpt.blocks[0].eval();
  await nn.generate(gpt, PROMPTS, { length: 2 });
  assertEquals(flags(), [true, false, true, true]);
  nn.init.constant(gpt.tokens.weight, NaN);
  await assertRejects(() => nn.generate(gpt, PROMPTS, { length: 1 }), RangeError, "NaN");
  assertEquals(flags(), [true, false, true, true]);
  gpt.dispose();
});

Deno.test("generate: draws follow the distribution", () => {
  const logits = [2, 1, 0.5, 0, -1, -3, 1.5], DRAWS = 20_000;
  const powers = (temperature: number) => logits.map((x) => Math.exp(x / temperature));
  const only = (weights: number[], kept: number[]) => weights.map((w, i) => kept.includes(i) ? w : 0);
  // sorted: 0 (2), 6 (1.5), 1 (1), 2, 3, 4, 5; shares at temperature 1: 0.41, 0.25, 0.15, 0.09, …
  const cases: [string, Parameters<typeof sample>[1], number[]][] = [
    ["temperature 1", { temperature: 1 }, powers(1)],
    ["temperature 0.5", { temperature: 0.5 }, powers(0.5)],
    ["temperature 3", { temperature: 3 }, powers(3)],
    ["top 3", { temperature: 1, topK: 3 }, only(powers(1), [0, 6, 1])],
    ["top 100", { temperature: 1, topK: 100 }, powers(1)],
    ["top p 0.4", { temperature: 1, topP: 0.4 }, only(powers(1), [0])],
    ["top p 0.5", { temperature: 1, topP: 0.5 }, only(powers(1), [0, 6])],
    ["top p 1", { temperature: 1, topP: 1 }, powers(1)],
    // of the two that top-k leaves the first has 0.62
    ["top 2, top p 0.6", { temperature: 1, topK: 2, topP: 0.6 }, only(powers(1), [0])],
    ["top 2, top p 0.65", { temperature: 1, topK: 2, topP: 0.65 }, only(powers(1), [0, 6])],
  ];
  for (const [i, [name, options, weights]] of cases.entries()) {
    const draw = random(i), counts = weights.map(() => 0), total = weights.reduce((a, b) => a + b);
    for (let n = 0; n < DRAWS; n++) counts[sample(logits, options, draw)]++;
    let chiSquare = 0, freedom = -1;
    weights.forEach((w, i) => {
      const expected = DRAWS * w / total;
      if (expected === 0) return assertEquals(counts[i], 0, `${name}: token ${i} was left out`);
      chiSquare += (counts[i] - expected) ** 2 / expected;
      freedom++;
    });
    // χ² with f degrees has mean f and deviation √2f; 5 of them
    assert(chiSquare <= freedom + 5 * Math.sqrt(2 * freedom), `${name}: χ² ${chiSquare} of ${freedom}`);
  }
  assertEquals(sample([1, 3, 3, 2], { temperature: 0 }, random(0)), 1); // the first of equal ones
  assertEquals(sample([-Infinity, 5, -Infinity], { temperature: 1 }, () => 0.999999), 1);
  assertEquals(sample([0, 0], { temperature: 1 }, () => 1 - 2 ** -32), 1); // the last number a generator gives
});

Deno.test("generate: what it throws", async () => {
  await init();
  const gpt = makeGpt(8).train(), live = stats().liveBytes;
  const cases: [unknown, unknown, unknown, typeof TypeError | typeof RangeError, string][] = [
    [gpt, PROMPTS, { length: 6 }, RangeError, "prompt and length must fit the context 8, got 3 + 6"],
    [gpt, [new Int32Array(9)], { length: 0 }, RangeError, "must fit the context 8, got 9 + 0"],
    [gpt, [], { length: 1 }, TypeError, "prompts must be Int32Arrays of one length"],
    [gpt, [new Int32Array(0)], { length: 1 }, TypeError, "prompts must be Int32Arrays of one length of at least 1"],
    [
      gpt,
      [new Int32Array(1), new Int32Array(2)],
      { length: 1 },
      TypeError,
      "prompts must be Int32Arrays of one length of at least 1, got [an Int32Array of 1, an Int32Array of 2]",
    ],
    [gpt, [[1, 2]], { length: 1 }, TypeError, "prompts must be Int32Arrays"],
    [gpt, undefined, { length: 1 }, TypeError, "prompts must be Int32Arrays"],
    [gpt, [new Int32Array([23])], { length: 1 }, RangeError, "prompts must hold tokens in [0, 23), got 23"],
    [gpt, [new Int32Array([-1])], { length: 0 }, RangeError, "prompts must hold tokens in [0, 23), got -1"],
    [gpt, PROMPTS, { length: -1 }, RangeError, "length must be"],
    [gpt, PROMPTS, {}, TypeError, "length must be a number, got undefined"],
    [gpt, PROMPTS, { length: 1, temperature: -1 }, RangeError, "temperature must be"],
    [gpt, PROMPTS, { length: 1, topK: 0 }, RangeError, "topK must be"],
    [gpt, PROMPTS, { length: 1, topP: 0 }, RangeError, "topP must be"],
    [gpt, PROMPTS, { length: 1, topP: 1.1 }, RangeError, "topP must be"],
    [gpt, PROMPTS, { length: 1, stop: 23 }, RangeError, "stop must be"],
    [gpt, PROMPTS, { length: 1, top_k: 2 }, TypeError, "did you mean topK?"],
    [new nn.Dropout(), PROMPTS, { length: 1 }, TypeError, "gpt must be a Gpt, got a Dropout"],
  ];
  for (const [model, prompts, options, type, message] of cases) {
    // deno-lint-ignore no-explicit-any
    await assertRejects(() => nn.generate(model as any, prompts as any, options as any), type, message);
  }
  assert(gpt.training, "the train flag is back");
  assertEquals(stats().liveBytes, live);
  assertEquals(arrays(await nn.generate(gpt, PROMPTS, { length: 0 })), arrays(PROMPTS));
  nn.init.constant(gpt.tokens.weight, NaN);
  for (const temperature of [0, 1]) {
    const text = () => nn.generate(gpt, PROMPTS, { length: 1, temperature });
    await assertRejects(text, RangeError, "generate: gpt must give numbers, got NaN among its logits");
  }
  gpt.dispose();
});

Deno.test("generate: layers that were replaced, and blocks with a forward of their own", async () => {
  await init();
  const gpt = makeGpt(16), [first, second] = gpt.blocks, prompts = PROMPTS;
  const { outProj } = first.selfAttn, { linear1 } = second, { forward } = nn.Linear.prototype;
  outProj.forward = (x) => forward.call(outProj, x).mul(-3);
  linear1.forward = (x) => forward.call(linear1, x).mul(2);
  const head = gpt.head!;
  head.forward = (x) => forward.call(head, x).neg();
  assertEquals(arrays(await nn.generate(gpt, prompts, { length: 10, temperature: 0 })), await greedy(gpt, prompts, 10));
  second.forward = (x) => x;
  const message = "generate: blocks[1] must have a forwardCached of its own";
  await assertRejects(() => nn.generate(gpt, prompts, { length: 1 }), TypeError, message);
  second.forwardCached = (x) => x;
  assertEquals((await nn.generate(gpt, prompts, { length: 1 }))[0].length, 4);
  first.selfAttn.attend = (x) => x;
  await assertRejects(() => nn.generate(gpt, prompts, { length: 1 }), TypeError, "generate: blocks[0] must");
  gpt.blocks[0] = linear1 as unknown as nn.TransformerBlock; // a module of another class
  await assertRejects(() => nn.generate(gpt, prompts, { length: 1 }), TypeError, "generate: blocks[0] must");
  gpt.blocks[0] = first;
  for (const name of ["forward", "hiddenStates"] as const) {
    gpt[name] = (tokens) => gpt.tokens.forward(tokens);
    const own = `generate: gpt must have Gpt's own ${name}`;
    await assertRejects(() => nn.generate(gpt, prompts, { length: 1 }), TypeError, own);
    gpt[name] = nn.Gpt.prototype[name];
  }
  gpt.dispose();
});

Deno.test("generate: a decoder that is no longer what it was made as", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  const block = (heads: number) => {
    const made = new nn.TransformerBlock(16, heads);
    for (const x of made.parameters()) if (x.rank > 1) nn.init.normal(x, 0, 0.4);
    return made;
  };
  const changes: [string, (gpt: nn.Gpt) => void][] = [
    ["a block more", (gpt) => gpt.blocks.push(block(2))],
    ["other heads", (gpt) => gpt.blocks[0] = block(4)],
    ["more tokens", (gpt) => [gpt.tokens, gpt.head] = [new nn.Embedding(25, 16), new nn.Linear(16, 25)]],
    ["a longer table of positions", (gpt) => gpt.positions = new nn.Embedding(32, 16)],
  ];
  for (const [what, change] of changes) {
    const gpt = makeGpt(16);
    change(gpt);
    const prompts = [new Int32Array([1, gpt.tokens.weight.shape[0] - 1, 3])];
    const want = await greedy(gpt, prompts, 13);
    assertEquals(arrays(await nn.generate(gpt, prompts, { length: 13, temperature: 0 })), want, what);
  }
  if (!f16) return;
  const gpt = makeGpt(16), all = (m: nn.Module): nn.Module[] => [m, ...m.children().flatMap(([, child]) => all(child))];
  for (const module of all(gpt) as unknown as Record<string, Tensor>[]) {
    for (const [name, x] of Object.entries(module)) {
      if (x instanceof Tensor) module[name] = tensor(Float16Array.from(await x.data()), x.shape);
    }
  }
  assertEquals(arrays(await nn.generate(gpt, PROMPTS, { length: 13, temperature: 0 })), await greedy(gpt, PROMPTS, 13));
});

Deno.test("generate: the most probable tokens, at their edge and at an infinite logit", () => {
  assertEquals(sample([0, 0], { temperature: 1, topP: 0.5 }, () => 0.99), 0); // the first alone has a probability of 0.5
  assertEquals(sample([0, Infinity], { temperature: 1 }, () => 0.5), 1);
});

Deno.test("generate: ends when the last sequence has, and walks modules in a circle once", async () => {
  await init();
  const gpt = makeGpt(32), { logits } = gpt;
  let calls = 0;
  gpt.logits = (hidden) => {
    calls++;
    return logits.call(gpt, hidden);
  };
  Object.assign(gpt.blocks[0], { parent: gpt });
  const prompts = [5, 6, 7, 8].map((token) => Int32Array.of(token)), free = { length: 12, seed: 3 };
  const texts = await nn.generate(gpt, prompts, free), stop = texts[0][3];
  calls = 0;
  const stopped = await nn.generate(gpt, prompts, { ...free, stop });
  assertEquals(calls, Math.max(...stopped.map((text) => text.length - 1)));
  gpt.dispose();
});
