import { assert, assertEquals, assertRejects } from "@std/assert";
import { defineKernel, init, profile, Scope, stats, Tape, tensor, zeros } from "@limbeck/limbeck";

/** Runs a test where the adapter has timestamps; elsewhere `profile` says so. */
function test(name: string, fn: () => Promise<void>): void {
  Deno.test(`profile: ${name}`, async () => {
    const { timestamps } = await init();
    if (!timestamps) return void await assertRejects(() => profile(() => 1), Error, "no timestamp-query");
    using _scope = new Scope();
    await fn();
  });
}

test("counts launches by kernel and passes the result on", async () => {
  const x = tensor([1, 2, 3]), before = stats().dispatches;
  const { result, kernels, table, trace } = await profile(() => {
    const y = x.exp().add(1).exp();
    return { y, label: "mine" };
  });
  const launches = Object.fromEntries(kernels.map(({ name, launches }) => [name, launches]));
  assertEquals(launches, { exp: 2, add: 1 });
  assertEquals(stats().dispatches - before, 3);
  assertEquals(result.label, "mine");
  const [first] = await result.y.data();
  assert(Math.abs(first / Math.exp(Math.E + 1) - 1) < 1e-5, `${first}`); // the kernels did run
  assert(kernels.every(({ milliseconds }) => milliseconds >= 0 && milliseconds < 10_000));
  assert(kernels[0].milliseconds >= kernels[1].milliseconds, "the slowest first");

  const rows = table.split("\n").map((line) => line.trim().split(/\s{2,}/));
  assertEquals(rows.map((row) => row[0]), ["kernel", ...kernels.map(({ name }) => name), "all"]);
  assertEquals(rows[0], ["kernel", "launches", "ms", "share"]);
  assertEquals(rows[1].slice(0, 3), [
    kernels[0].name,
    String(kernels[0].launches),
    kernels[0].milliseconds.toFixed(3),
  ]);

  const { traceEvents } = JSON.parse(JSON.stringify(trace)) as typeof trace;
  assertEquals(traceEvents.map(({ name }) => name), ["exp", "add", "exp"]); // in order
  traceEvents.forEach((event, i) => {
    assertEquals([event.ph, Number.isFinite(event.ts), event.dur >= 0], ["X", true, true]);
    assert(i === 0 || event.ts >= traceEvents[i - 1].ts, "one begins behind the other");
  });
  assertEquals(traceEvents[0].ts, 0);
  const sum = traceEvents.reduce((total, { dur }) => total + dur, 0) / 1000; // µs
  const all = kernels.reduce((total, { milliseconds }) => total + milliseconds, 0);
  assert(Math.abs(sum - all) <= 1e-9 * Math.max(1, all), `${sum} and ${all}`);
});

test("a training step, and an async function with reads in it", async () => {
  const w = tensor([1, 2], { requiresGrad: true });
  const { result, kernels } = await profile(async () => {
    using _tape = new Tape();
    const loss = w.square().sum();
    loss.backward();
    return [await loss.item(), await w.grad!.array()];
  });
  assertEquals(result, [5, [2, 4]]);
  assert(kernels.some(({ name }) => name === "square backward"), kernels.map(({ name }) => name).join());
});

test("what was launched before and after is not in it", async () => {
  const x = tensor([1]);
  x.sin();
  const { kernels } = await profile(() => x.cos());
  x.sin();
  assertEquals(kernels.map(({ name, launches }) => [name, launches]), [["cos", 1]]);
});

test("more launches than a query set holds", async () => {
  const { result, kernels, trace } = await profile(async () => {
    let x = tensor([0]);
    for (let i = 0; i < 2050; i++) { // a set takes 2,048
      const next = x.add(1);
      x.dispose();
      x = next;
    }
    return await x.item();
  });
  assertEquals([result, kernels.length, kernels[0].launches], [2050, 1, 2050]);
  assertEquals(trace.traceEvents.length, 2050);
  assert(trace.traceEvents.every(({ dur, ts }) => dur >= 0 && ts >= 0));
});

test("nothing launched", async () => {
  const { result, kernels, table, trace } = await profile(() => 7);
  assertEquals([result, kernels, trace.traceEvents], [7, [], []]);
  assertEquals(table.split("\n").length, 2);
});

test("one at a time; an error inside ends it", async () => {
  const x = tensor([1]);
  const { result } = await profile(async () => {
    await assertRejects(() => profile(() => x.exp()), Error, "profile: a profile is being taken already");
    return await x.add(1).item(); // the outer one goes on
  });
  assertEquals(result, 2);
  await assertRejects(
    () =>
      profile(() => {
        x.exp();
        throw new Error("of its own");
      }),
    Error,
    "of its own",
  );
  await assertRejects(() => profile(() => Promise.reject(new Error("later"))), Error, "later");
  const broken = defineKernel({ name: "broken", buffers: { y: "write f32" }, main: "y[lane] = nothing;" });
  await assertRejects(() => profile(() => broken.run({ y: zeros([1]).memory }, {}, 1)), Error, "WGSL of broken");
  assertEquals((await profile(() => x.exp())).kernels.length, 1);
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => profile(5 as any), TypeError, "profile: fn must be a function, got 5");
});

test("afterwards launches share passes again and nothing is held", async () => {
  const x = tensor([1, 2]);
  const step = async () => {
    using _tape = new Tape();
    return await x.mul(2).add(1).array();
  };
  await step();
  const submits = stats().submits;
  await step();
  const each = stats().submits - submits, live = stats();
  await profile(step);
  assertEquals([stats().liveBytes, stats().liveTensors], [live.liveBytes, live.liveTensors]);

  const begin = GPUCommandEncoder.prototype.beginComputePass, { bindGroupsCreated } = stats(), before = stats().submits;
  let passes = 0;
  GPUCommandEncoder.prototype.beginComputePass = function (this: GPUCommandEncoder, descriptor) {
    assertEquals(descriptor?.timestampWrites, undefined);
    passes++;
    return begin.call(this, descriptor);
  };
  try {
    assertEquals(await step(), [3, 5]);
  } finally {
    GPUCommandEncoder.prototype.beginComputePass = begin;
  }
  assertEquals([passes, stats().submits - before, stats().bindGroupsCreated], [1, each, bindGroupsCreated]);
});
