/** Trains for 10,000 steps and prints its memory use every 500 steps from step 2,000 on. Runs in a process of its own: `deno run --v8-flags=--expose-gc`. */
import { crossEntropy, init, manualSeed, Meter, nn, optim, randint, randn, relu, stats, Tape } from "@limbeck/limbeck";

const STEPS = 10_000, SETTLED = 2_000, EVERY = 500;
const { gc } = globalThis as unknown as { gc: () => void };

await init();
manualSeed(1);
const model = new nn.Sequential(new nn.Linear(8, 16), relu, new nn.Dropout(0.1), new nn.Linear(16, 4));
const optimizer = new optim.AdamW(model.parameters(), { lr: 1e-3 }), meter = new Meter();
for (let step = 1; step <= STEPS; step++) {
  {
    using _tape = new Tape();
    const loss = crossEntropy(model.forward(randn([16, 8])), randint(0, 4, [16]));
    optimizer.zeroGrad();
    loss.backward();
    optimizer.step();
    meter.add("loss", loss);
  }
  if (step % EVERY === 0) {
    await meter.read();
    if (step < SETTLED) continue;
    gc();
    const { liveBytes, pooledBytes, liveTensors, buffersCreated } = stats();
    const { rss, heapTotal, heapUsed } = Deno.memoryUsage();
    // without V8's heap, whose size follows rules of its own
    console.log(
      JSON.stringify({
        device: { liveBytes, pooledBytes, liveTensors, buffersCreated },
        native: rss - heapTotal,
        heapUsed,
      }),
    );
  }
}
