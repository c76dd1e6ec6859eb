// A step that repeats must create nothing on the GPU: what it costs to encode decides the speed of small models.
import { assert, assertEquals } from "@std/assert";
import {
  crossEntropy,
  init,
  manualSeed,
  Meter,
  nn,
  noGrad,
  optim,
  relu,
  Scope,
  stats,
  Tape,
  type Tensor,
} from "@limbeck/limbeck";
import { random } from "../testing/op.ts";

const ROWS = 256, WIDTH = 8, CLASSES = 4, STEPS = 300;

/** What the device was asked for, counted outside the engine. */
const created = { buffers: 0, bindGroups: 0 };
for (const [method, counter] of [["createBuffer", "buffers"], ["createBindGroup", "bindGroups"]] as const) {
  // deno-lint-ignore no-explicit-any
  const prototype = GPUDevice.prototype as any, original = prototype[method];
  prototype[method] = function (this: GPUDevice, ...args: unknown[]) {
    created[counter]++;
    return original.apply(this, args);
  };
}

/** Rows whose label is their largest feature of the first four. */
function makeData(): Record<"x" | "y", nn.Column> {
  const draw = random(1);
  const x = Float32Array.from({ length: ROWS * WIDTH }, () => 2 * draw() - 1);
  const y = Int32Array.from({ length: ROWS }, (_, row) => {
    const features = x.subarray(row * WIDTH, row * WIDTH + CLASSES);
    return features.indexOf(Math.max(...features));
  });
  return { x: { data: x, shape: [ROWS, WIDTH] }, y: { data: y, shape: [ROWS] } };
}

function makeModel(): nn.Sequential {
  return new nn.Sequential(new nn.Linear(WIDTH, 32), relu, new nn.Dropout(0.2), new nn.Linear(32, CLASSES));
}

/** A training loop as a user writes it; `afterStep` looks on. */
async function train(
  model: nn.Sequential,
  steps: number,
  afterStep: (step: number) => Promise<void> | void = () => {},
): Promise<number[]> {
  const data = makeData(), optimizer = new optim.AdamW(model.parameters(), { lr: 1e-2 }), meter = new Meter();
  const losses: number[] = [];
  for (let step = 0, epoch = 0; step < steps; epoch++) {
    for (const { x, y } of nn.batches(data, { batchSize: 32, shuffle: true, seed: epoch })) {
      if (step === steps) break;
      {
        using _tape = new Tape();
        const loss = crossEntropy(model.forward(x), y);
        optimizer.zeroGrad();
        loss.backward();
        optimizer.step();
        meter.add("loss", loss);
      }
      optimizer.lr *= 0.999; // what changes from step to step must not make a bind group
      if (step % 50 === 1) losses.push(...(await meter.read()).loss);
      await afterStep(step++);
    }
  }
  losses.push(...(await meter.read()).loss);
  optimizer.dispose();
  meter.dispose();
  return losses;
}

async function evaluate(model: nn.Sequential, x: nn.Column, y: nn.Column): Promise<number> {
  model.eval();
  let right = 0;
  for (const batch of nn.batches({ x, y }, { batchSize: 64 })) {
    using _scope = new Scope();
    const predicted = noGrad(() => model.forward(batch.x).argmax({ dim: 1 }));
    const [got, want] = [await predicted.data(), await batch.y.data()];
    right += want.filter((label, i) => label === got[i]).length;
  }
  model.train();
  return right / ROWS;
}

Deno.test("steady: 300 steps with evaluations in between create nothing and hold nothing", async () => {
  await init();
  manualSeed(1);
  const before = stats(), model = makeModel(), { x, y } = makeData();
  const evaluations = [120, 200, 280];
  // the first steps, until two batches of as many as share a submit were encoded, and the first evaluation itself
  const mayCreate = (what: string, step: number) => step < 40 || what === `evaluation at ${evaluations[0]}`;
  const creations: string[] = [], live = new Set<number>();
  let seen = { ...created }, seenStats = stats(), accuracy = 0;
  const losses = await train(model, STEPS, async (step) => {
    const compare = (what: string) => {
      const now = stats();
      const counts = [
        created.buffers - seen.buffers,
        created.bindGroups - seen.bindGroups,
        now.buffersCreated - seenStats.buffersCreated,
        now.bindGroupsCreated - seenStats.bindGroupsCreated,
      ];
      seen = { ...created };
      seenStats = now;
      if (counts.some((n) => n > 0) && !mayCreate(what, step)) creations.push(`${what}: ${counts}`);
    };
    compare(`step ${step}`);
    if (step >= 4) live.add(stats().liveBytes);
    if (!evaluations.includes(step)) return;
    accuracy = await evaluate(model, x, y);
    compare(`evaluation at ${step}`);
  });
  assertEquals(creations, [], "created [buffers, bind groups] as the device and as stats() count them");
  // two batches are alive at a time, one at the end of an epoch
  assert(live.size <= 2, `live bytes: ${[...live]}`);
  assertEquals(losses.length, STEPS);
  assert(losses.slice(-20).reduce((a, b) => a + b) / 20 < 0.6 * losses[0], `${losses[0]} to ${losses.at(-1)}`);
  assert(accuracy > 0.85, `${accuracy}`);
  model.dispose();
  assertEquals([stats().liveBytes, stats().liveTensors], [before.liveBytes, before.liveTensors]);
});

Deno.test("steady: the same seed trains to the same bits", async () => {
  await init();
  const run = async (seed: number) => {
    manualSeed(seed);
    const model = makeModel();
    const losses = await train(model, 40);
    const parameters = await Promise.all(model.parameters().map((p: Tensor) => p.data()));
    model.dispose();
    return { losses, parameters };
  };
  const first = await run(5);
  assertEquals(await run(5), first);
  assert((await run(6)).losses[39] !== first.losses[39]);
});
