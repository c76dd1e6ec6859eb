import { assert, assertEquals } from "@std/assert";
import { crossEntropy, init, manualSeed, Meter, nn, optim, randint, randn, relu, stats, Tape } from "@limbeck/limbeck";

const STEPS = 10_000, SETTLED = 2_000, EVERY = 500;
const { gc } = globalThis as { gc?: () => void };

Deno.test("10,000 steps: live bytes, pooled bytes and the process stay as large as they are", async () => {
  if (!gc) throw new Error("this test needs deno test --v8-flags=--expose-gc, as in deno task test:long");
  await init();
  manualSeed(1);
  const model = new nn.Sequential(new nn.Linear(8, 16), relu, new nn.Dropout(0.1), new nn.Linear(16, 4));
  const optimizer = new optim.AdamW(model.parameters(), { lr: 1e-3 }), meter = new Meter();
  const seen = [];
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
      // what V8 reserves for its heap grows by its own rules, whatever stands in it
      seen.push({ device: [liveBytes, pooledBytes, liveTensors, buffersCreated], native: rss - heapTotal, heapUsed });
    }
  }
  const [first, last] = [seen[0], seen.at(-1)!];
  for (const { device } of seen) assertEquals(device, first.device);
  // 8,000 steps: 1 KiB lost a step would be 8 MiB
  for (const kind of ["native", "heapUsed"] as const) {
    assert(last[kind] - first[kind] < 8 * 2 ** 20, `${kind} memory grew from ${first[kind]} to ${last[kind]} bytes`);
  }
  meter.dispose();
  optimizer.dispose();
  model.dispose();
});
