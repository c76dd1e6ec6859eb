import { pathToFileURL } from "node:url";
import { assert, assertEquals, assertRejects, assertStringIncludes, assertThrows } from "@std/assert";
import {
  dispose,
  expectNoLeaks,
  flush,
  init,
  Meter,
  noGrad,
  ones,
  optim,
  resetPeak,
  scaledDotProductAttention,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  trimPool,
  zeros,
} from "@limbeck/limbeck";
import { gpu } from "../kernels/gpu/gpu.ts";

Deno.test("expectNoLeaks: passes where nothing stays, and hands on what fn returns", async () => {
  await init();
  assertEquals(expectNoLeaks(() => 5), 5);
  const { y, list } = expectNoLeaks(() => {
    using _scope = new Scope();
    const x = tensor([1, 2]).mul(2);
    return { y: x.add(1).keep(), list: [x.keep()] };
  });
  assertEquals(await y.array(), [3, 5]);
  for (const x of [y, ...list]) x.dispose();
  const read = await expectNoLeaks(async () => {
    using _tape = new Tape();
    const w = tensor([3], { requiresGrad: true });
    w.square().sum().backward();
    return await w.grad!.item();
  });
  assertEquals(read, 6);
});

Deno.test("expectNoLeaks: names the ops of what stays, sync and async", async () => {
  await init();
  const left: Tensor[] = [];
  assertThrows(
    () => expectNoLeaks(() => void left.push(tensor([1, 2]).mul(2))),
    Error,
    "expectNoLeaks: 2 tensors stayed: tensor (shape [2]), mul (shape [2])",
  );
  await assertRejects(
    () =>
      expectNoLeaks(async () => {
        const x = zeros([3, 1]);
        await x.data();
        left.push(x.keep());
      }),
    Error,
    "expectNoLeaks: 1 tensor stayed: zeros (shape [3, 1])",
  );
  assertThrows(() => expectNoLeaks(() => left.push(...Array.from({ length: 20 }, () => zeros([1])))), Error, "12 more");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => expectNoLeaks(5 as any), TypeError, "expectNoLeaks: fn must be a function, got 5");
  assertThrows(
    () =>
      expectNoLeaks(() => {
        throw new Error("mine");
      }),
    Error,
    "mine",
  );
  const returnsClosed = () => {
    using _scope = new Scope();
    return tensor([1]);
  };
  assertThrows(() => expectNoLeaks(returnsClosed), TypeError, "expectNoLeaks: what fn returns (shape [1]) was closed");
  const w = tensor([1], { requiresGrad: true });
  let optimizer: optim.Optimizer | undefined, meter: Meter | undefined;
  assertThrows(() => expectNoLeaks(() => void (optimizer = new optim.Adam([w]))), Error, "bytes stayed that no tensor");
  assertThrows(() => expectNoLeaks(() => void (meter = new Meter()).add("w", w)), Error, "an optimizer or a Meter");
  for (const x of [...left, w, optimizer!, meter!]) x.dispose();
});

Deno.test("expectNoLeaks: a dispose() inside frees all", async () => {
  await init();
  await expectNoLeaks(async () => {
    tensor([1]).keep();
    await dispose();
  });
});

Deno.test("memory: the peak starts anew, the pool is trimmed", async () => {
  await init();
  using _held = zeros([4]);
  zeros([2 ** 20]).dispose();
  assert(stats().peakBytes >= 2 ** 22 && stats().pooledBytes >= 2 ** 22);
  resetPeak();
  assertEquals(stats().peakBytes, stats().liveBytes);
  tensor([1]).dispose(); // small uploads count
  assertEquals(stats().peakBytes, stats().liveBytes + 256);
  zeros([2 ** 10]).dispose();
  assertEquals(stats().peakBytes, stats().liveBytes + 2 ** 12);
  const { pooledBytes } = stats();
  zeros([2 ** 10]).dispose(); // what the pool had waiting
  assertEquals(stats().pooledBytes, pooledBytes);
  using scope = new Scope();
  const x = zeros([100]), y = x.add(1);
  trimPool();
  assertEquals(stats().pooledBytes, 0);
  assertEquals((await y.data())[99], 1); // what is in use stays
  const { buffersCreated } = stats();
  zeros([2 ** 20]);
  assertEquals(stats().buffersCreated, buffersCreated + 1);
  await zeros([2 ** 20]).data();
  trimPool(); // also gives back what reads go through
  const before = stats().buffersCreated;
  await y.data();
  assertEquals(stats().buffersCreated, before + 1);
  scope.close();
});

Deno.test("memory: debug mode lists forgotten tensors with the lines that made them", async () => {
  await dispose();
  await init({ debug: true });
  const { stackTraceLimit } = Error as { stackTraceLimit?: number };
  assertEquals(stats().forgotten, []);
  const forgotten = tensor([[1, 2, 3]]).exp();
  const kept = zeros([4]).keep();
  let scoped: Tensor;
  {
    using _scope = new Scope();
    scoped = zeros([5]);
    assertEquals(stats().forgotten!.length, 2);
  }
  const found = stats().forgotten!;
  assertEquals(found.map(({ op, shape, dtype, bytes }) => [op, shape, dtype, bytes]), [
    ["tensor", [1, 3], "f32", 12],
    ["exp", [1, 3], "f32", 12],
  ]);
  for (const { place } of found) assertStringIncludes(place, "debug_test.ts");
  assertEquals((Error as { stackTraceLimit?: number }).stackTraceLimit, stackTraceLimit, "is as it was");
  assert(scoped.closed);
  const error = assertThrows(() => expectNoLeaks(() => void noGrad(() => kept.mul(2))), Error);
  assertStringIncludes(error.message, "mul (shape [4]) at ");
  assertStringIncludes(error.message, "debug_test.ts");
  forgotten.dispose();
  assertEquals(stats().forgotten!.map(({ op }) => op), ["tensor", "mul"]); // the latter from noGrad
  await dispose();
  await init();
  assertEquals(stats().forgotten, undefined);
});

Deno.test("memory: the lines are found whatever the folder of the package is called", async () => {
  const directory = `${await Deno.makeTempDir()}/c++ (1 50% é#`, copy = `${directory}/autograd/ledger.ts`;
  try {
    await Deno.mkdir(`${directory}/autograd`, { recursive: true });
    await Deno.copyFile(new URL("ledger.ts", import.meta.url), copy);
    const { enter } = await import(pathToFileURL(copy).href), ledger = new Map();
    enter({}, { ledger, debug: true }, "mul");
    assertStringIncludes([...ledger.values()][0].place, "debug_test.ts");
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("memory: the limit's error names the op, the shape and the bytes", async () => {
  await dispose();
  await init({ memoryLimit: 2 ** 20 });
  using scope = new Scope();
  const { message } = assertThrows(() => zeros([600, 1000]), RangeError);
  assertStringIncludes(message, "zeros: 2621440 bytes (shape [600, 1000]) more would pass the memory limit: 0 of 1048");
  const x = zeros([100, 1000]);
  x.add(1);
  assertThrows(() => x.matmul(x, { transposeA: true }), RangeError, "matmul: 4194304 bytes (shape [1000, 1000]) more");
  assertEquals(await x.sum().item(), 0); // the rest goes on
  scope.close();
  const upload = () => tensor([1]).dispose(), fill = () => zeros([2 ** 18]).dispose(); // up to the limit
  upload();
  fill();
  const { buffersCreated } = stats();
  upload(); // takes its old place, which costs the pool nothing
  fill();
  assertEquals(stats().buffersCreated, buffersCreated);
  await dispose();
});

Deno.test("memory: the limit counts the places that small uploads have left, and trimming gives them up", async () => {
  await dispose();
  await init({ memoryLimit: 2 ** 24 });
  const upload = () => Array.from({ length: 200 }, () => tensor(new Float32Array(2 ** 14))); // 12.5 MiB
  const fill = () => Array.from({ length: 7 }, () => zeros([2 ** 19])); // 14 MiB
  for (const trims of [true, false]) {
    for (const x of upload()) x.dispose();
    await flush();
    if (trims) trimPool();
    const large = fill();
    assertEquals(stats().liveBytes, 14 * 2 ** 20);
    using scope = new Scope();
    assertThrows(upload, RangeError, "tensor: 65536 bytes (shape [16384]) more would pass the memory limit");
    scope.close();
    for (const x of large) x.dispose();
    assertEquals(stats().liveBytes, 0);
  }
  {
    using _scope = new Scope();
    const xs = upload();
    xs.forEach((x, i) => i % 2 === 0 && x.dispose()); // a free place in a page that is in use is no room for others
    assertThrows(() => fill(), RangeError, "zeros: 2097152 bytes (shape [524288]) more would pass the memory limit");
    assertEquals((await xs[1].data())[0], 0);
  }
  await dispose();
});

Deno.test("expectNoLeaks: an optimizer that stays, beside tensors that fn returns", async () => {
  await init();
  const w = tensor([1, 2], undefined, { requiresGrad: true }).keep(), old = zeros([1000]).keep();
  const left = "an optimizer or a Meter was not disposed of";
  assertThrows(() => expectNoLeaks(() => [new optim.Adam([w]), old]), Error, left);
  assertThrows(() => expectNoLeaks(() => [new optim.Adam([w]), w.mul(2)]), Error, left);
});

Deno.test("expectNoLeaks: an optimizer that went leaves parameters in a block that its pool has rounded up", async () => {
  await init();
  const parameters = Array.from({ length: 9 }, () => zeros([3], { requiresGrad: true }).keep()); // slots of 256: 2304 bytes of 2560
  for (let i = 0; i < 2; i++) expectNoLeaks(() => new optim.Adam(parameters).dispose());
  const { liveBytes } = stats();
  for (const x of parameters) x.dispose();
  assertEquals(stats().liveBytes, liveBytes - 2560);
  expectNoLeaks(() => {});
});

Deno.test("expectNoLeaks: async ones that overlap", async () => {
  await init();
  const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
  const first = expectNoLeaks(() => sleep(5));
  const second = expectNoLeaks(async () => {
    await sleep(30);
    tensor([1, 2, 3]).keep();
  });
  await first;
  await assertRejects(() => second, Error, "1 tensor stayed: tensor (shape [3])");
  assertEquals(gpu().ledger, null);
});

Deno.test("expectNoLeaks: an op that throws leaves nothing of its own where no scope is open", async () => {
  await init();
  const a = ones([2, 1, 4, 4]).keep(), wide = ones([2, 5], { dtype: "i32" }).keep();
  expectNoLeaks(() => {
    assertThrows(() => scaledDotProductAttention(a, a, a, { mask: wide }), TypeError, "mask");
  });
});

Deno.test("expectNoLeaks: views of one returned tensor do not hide what stays", async () => {
  await init();
  const one = tensor(1);
  let meter: Meter;
  assertThrows(
    () =>
      expectNoLeaks(() => {
        meter = new Meter();
        meter.add("a", one);
        const x = zeros([1000]);
        return [x, x.reshape([10, 100])];
      }),
    Error,
    "stayed",
  );
});

Deno.test("debug: a message names the step, and the check's own memory is made once", async () => {
  await dispose();
  await init({ debug: true });
  try {
    const message = async () => {
      using _tape = new Tape();
      tensor([0], { requiresGrad: true }).log();
      return await flush().then(() => "", (error) => error.message);
    };
    const numbers: number[] = [], bytes: number[] = [];
    for (let i = 0; i < 3; i++) {
      numbers.push(Number(/step (\d+)/.exec(await message())![1]));
      bytes.push(stats().liveBytes);
    }
    assertEquals(numbers, [numbers[0], numbers[0] + 1, numbers[0] + 2]);
    assertEquals(bytes[2], bytes[1]);
  } finally {
    await dispose();
  }
});
