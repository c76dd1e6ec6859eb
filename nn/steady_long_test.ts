import { assert, assertEquals } from "@std/assert";
import { crossEntropy, init, manualSeed, Meter, nn, optim, randint, randn, relu, stats, Tape } from "@limbeck/limbeck";

const STEPS = 10_000, SETTLED = 2_000, EVERY = 500;

Deno.test("10,000 steps: live bytes, pooled bytes and the process stay as large as they are", async () => {
  await init();
  manualSeed(1);
  const model = new nn.Sequential(new nn.Linear(8, 16), relu, new nn.Dropout(0.1), new nn.Linear(16, 4));
  const optimizer = new optim.AdamW(model.parameters(), { lr: 1e-3 }), meter = new Meter();
  const seen: { live: number; pooled: number; tensors: number; buffers: number; resident: number }[] = [];
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
      const { liveBytes, pooledBytes, liveTensors, buffersCreated } = stats();
      const resident = Deno.memoryUsage().rss;
      seen.push({ live: liveBytes, pooled: pooledBytes, tensors: liveTensors, buffers: buffersCreated, resident });
    }
  }
  const [first, last] = [seen[0], seen.at(-1)!];
  for (const { live, pooled, tensors, buffers } of seen) {
    assertEquals({ live, pooled, tensors, buffers }, {
      live: first.live,
      pooled: first.pooled,
      tensors: first.tensors,
      buffers: first.buffers,
    });
  }
  // 8,000 steps: 4 KiB lost a step would be 32 MiB; collection's own ups and downs are smaller
  assert(
    last.resident - first.resident < 24 * 2 ** 20,
    `the process grew from ${first.resident} to ${last.resident} bytes`,
  );
  meter.dispose();
  optimizer.dispose();
  model.dispose();
});
