// The same seed gives the same bits, also where a device was lost in between.
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  crossEntropy,
  dispose,
  flush,
  init,
  loadCheckpoint,
  manualSeed,
  nn,
  optim,
  randint,
  randn,
  relu,
  saveCheckpoint,
  stats,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
import { overrides } from "../kernels/gpu/tuning.ts";

interface Run {
  model: nn.Module;
  optimizer: optim.Optimizer;
  /** Draws a batch from the library's random numbers and gives its loss. */
  loss: () => Tensor;
}

function makeMlp(): Run {
  manualSeed(3);
  const model = new nn.Sequential(new nn.Linear(12, 32), relu, new nn.Dropout(0.3), new nn.Linear(32, 5));
  const optimizer = new optim.AdamW(model.parameters(), { lr: 0.01 });
  return { model, optimizer, loss: () => crossEntropy(model.forward(randn([16, 12])), randint(0, 5, [16])) };
}

function makeGpt(): Run {
  manualSeed(4);
  const model = new nn.Gpt({ vocabulary: 11, context: 8, layers: 2, width: 16, heads: 2, dropout: 0.2 });
  const optimizer = new optim.AdamW(model.parameters(), { lr: 0.01 });
  const loss = () => crossEntropy(model.forward(randint(0, 11, [4, 8])), randint(0, 11, [4, 8]));
  return { model, optimizer, loss };
}

function makeNormed(): Run {
  manualSeed(5);
  const model = new nn.Sequential(new nn.LayerNorm(12), new nn.Linear(12, 32), relu, new nn.Linear(32, 5));
  const optimizer = new optim.AdamW(model.parameters(), { lr: 0.01 });
  return { model, optimizer, loss: () => crossEntropy(model.forward(randn([512, 12])), randint(0, 5, [512])) };
}

function train({ optimizer, loss }: Run, steps: number): void {
  for (let step = 0; step < steps; step++) {
    using _tape = new Tape();
    optimizer.zeroGrad();
    loss().backward();
    optimizer.step();
  }
}

const bits = async ({ model }: Run) =>
  await Promise.all(model.parameters().map(async (p) => new Uint32Array((await p.data() as Float32Array).buffer)));

function release({ model, optimizer }: Run): void {
  optimizer.dispose();
  model.dispose();
}

for (const [name, make] of Object.entries({ MLP: makeMlp, GPT: makeGpt })) {
  Deno.test(`${name} with dropout: two runs with one seed end with the same bits`, async () => {
    await init();
    const ends: Uint32Array[][] = [];
    for (let run = 0; run < 2; run++) {
      const training = make(), before = await bits(training);
      train(training, 12);
      ends.push(await bits(training));
      for (const [i, end] of ends[run].entries()) {
        if (end.length > 1) assertEquals(end.some((x, j) => x !== before[i][j]), true);
      }
      release(training);
    }
    assertEquals(ends[0], ends[1]);
  });
}

for (
  const [name, make, hasLeastLimits] of [
    ["GPT", makeGpt, false],
    ["MLP on a device with the least limits", makeNormed, true],
  ] as const
) {
  Deno.test(`${name}: whether launches wait to share a dispatch changes no bit`, async () => {
    await dispose();
    await init(hasLeastLimits ? { device: await (await navigator.gpu.requestAdapter())!.requestDevice() } : {});
    Object.assign(overrides, { pieces: 2, shared: true }); // on a CPU no product is cut and no launch shared otherwise
    try {
      const runs = [];
      for (const on of [false, true]) {
        overrides.gather = on;
        const training = make(), before = stats().dispatches;
        train(training, 3);
        for (let step = 0; step < 2; step++) { // the second backward pass adds to gradients of the first
          using _tape = new Tape();
          training.optimizer.zeroGrad();
          training.loss().backward();
          training.loss().mul(2).backward();
          training.optimizer.step();
        }
        const dispatches = stats().dispatches - before;
        runs.push({ bits: await bits(training), dispatches });
        release(training);
      }
      assertEquals(runs[1].bits, runs[0].bits);
      assert(runs[1].dispatches < runs[0].dispatches, `${runs.map(({ dispatches }) => dispatches)}`);
    } finally {
      overrides.gather = null;
      Object.assign(overrides, { pieces: null, shared: null });
      await dispose();
    }
  });
}

Deno.test("a lost device: every call says so, init() starts anew, and a checkpoint goes on to the same bits", async () => {
  await dispose();
  const directory = await Deno.makeTempDir();
  // the limits of a device decide how sums are split, so that all have the same
  const open = async () => {
    const device = await (await navigator.gpu.requestAdapter())!.requestDevice();
    await init({ device });
    return device;
  };
  try {
    await open();
    const whole = makeMlp();
    train(whole, 10);
    const want = await bits(whole);
    release(whole);
    await dispose();

    const device = await open();
    const begun = makeMlp();
    train(begun, 6);
    await saveCheckpoint(`${directory}/run`, { model: begun.model, optimizer: begun.optimizer });
    device.destroy(); // what a driver's reset does, as far as the library sees
    await assertRejects(async () => await flush(), Error, "the device was lost");
    assertThrows(() => tensor([1]), Error, "the device was lost");
    assertThrows(() => train(begun, 1), Error, "lost");
    await assertRejects(() => bits(begun), Error, "lost");

    await open();
    const resumed = makeMlp();
    await loadCheckpoint(`${directory}/run`, { model: resumed.model, optimizer: resumed.optimizer });
    train(resumed, 4);
    assertEquals(await bits(resumed), want);
    release(resumed);
  } finally {
    await dispose();
    await Deno.remove(directory, { recursive: true });
  }
});
