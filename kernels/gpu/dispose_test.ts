// In a file of its own: each test file is its own process of modules, so that no other test's device ends here.
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  defineKernel,
  dispose,
  distillation,
  init,
  manualSeed,
  Meter,
  nn,
  optim,
  rand,
  Scope,
  stats,
  Tape,
  tensor,
  trimPool,
  zeros,
} from "@limbeck/limbeck";

Deno.test("dispose: before init and twice", async () => {
  await dispose();
  assertThrows(() => tensor([1]), Error, "call `await init()` before the first tensor");
  assertThrows(() => new Tape(), Error, "call `await init()`");
  assertThrows(() => stats(), Error, "call `await init()`");
  await init();
  await dispose();
  await dispose();
  assertThrows(() => zeros([1]), Error, "call `await init()`");
});

Deno.test("init: a second call returns the same, also while the first runs", async () => {
  const [a, b] = await Promise.all([init(), init()]);
  assert(a === b && a === await init());
  const { warn } = console, said: string[] = [];
  console.warn = (message: string) => said.push(message);
  try {
    assert(a === await init({ debug: false, autotune: false, memoryLimit: undefined }));
    assert(a === await init({ debug: true, memoryLimit: 5 })); // too late, which is not kept secret
  } finally {
    console.warn = warn;
  }
  assertEquals(said, ["limbeck: init() was called before: debug, memoryLimit changes nothing until dispose()"]);
  await dispose();
  console.warn = (message: string) => said.push(message);
  try {
    await Promise.all([init(), init({ debug: true }), init({})]); // likewise while the first still runs
    await dispose();
    await init({ features: [] });
    await init({ features: [] }); // the same list
  } finally {
    console.warn = warn;
  }
  assertEquals(said.slice(1), ["limbeck: init() was called before: debug changes nothing until dispose()"]);
  await dispose();
  const several = await Promise.allSettled([init({ features: ["none"] }), init(), init()]); // the first alone asks in vain
  assertEquals(several.map(({ status }) => status), ["rejected", "fulfilled", "fulfilled"]);
  await dispose();
});

Deno.test("dispose: then init gives a fresh engine, and old tensors say so", async () => {
  await init();
  const double = defineKernel({
    name: "double",
    buffers: { x: "read f32", y: "write f32" },
    main: "y[thread] = 2 * x[thread];",
    workgroup: 1,
  });
  const doubled = async () => {
    using _scope = new Scope();
    const x = tensor([21]), y = zeros([1]);
    double.run({ x: x.memory, y: y.memory }, {}, 1);
    return await y.item();
  };
  assertEquals(await doubled(), 42);
  const old = tensor([1, 2], { requiresGrad: true }), scope = new Scope(), inScope = tensor([3]);
  const optimizer = new optim.SGD([tensor([1], { requiresGrad: true })], { lr: 1 });
  await dispose();
  await init();
  assertEquals([stats().liveTensors, stats().liveBytes], [0, 0]);
  assertEquals(await doubled(), 42); // the kernel is compiled again
  await assertRejects(() => old.data(), Error, "on a device that was disposed or lost");
  assertThrows(() => old.add(1), TypeError, "add: a (shape [2]) is on a device that was disposed or lost");
  assertThrows(() => tensor([1, 2]).add(old), TypeError, "add: b (shape [2]) is on a device that was disposed or lost");
  assertThrows(() => old.keep(), TypeError, "on a device that was disposed or lost");
  assertThrows(() => old.detach(), TypeError, "on a device that was disposed or lost");
  assertThrows(() => optimizer.step(), Error, "SGD: the optimizer is on a device that was disposed or lost");
  optimizer.dispose();
  old.dispose();
  scope.close();
  assert(inScope.closed);
  await dispose();
});

Deno.test("dispose: in the middle of training, everything old can still be freed", async () => {
  await init();
  const layer = new nn.Linear(2, 2), optimizer = new optim.Adam(layer.parameters()), meter = new Meter();
  const tape = new Tape();
  const loss = layer.forward(tensor([[1, 2]])).square().sum();
  loss.backward();
  optimizer.step();
  meter.add("loss", loss);
  await dispose();
  tape.close(); // never throws
  await init();
  const gone = "the values are on a device that was disposed or lost";
  await assertRejects(() => meter.read(), TypeError, `Meter.read: ${gone}`);
  const late = tensor(1);
  assertThrows(() => meter.add("loss", late), TypeError, `Meter.add: ${gone}`);
  for (const old of [optimizer, layer, meter, late]) old.dispose();
  assertEquals([stats().liveTensors, stats().liveBytes], [0, 0]);
  using _tape = new Tape();
  const x = tensor([3], { requiresGrad: true });
  x.square().sum().backward();
  assertEquals(await x.grad!.array(), [6]);
  await dispose();
});

Deno.test("dispose: a tape that was left open does not keep the next device from having one", async () => {
  await init();
  const left = new Tape(); // as an exception outside of a using leaves it
  await dispose();
  await init();
  {
    using _tape = new Tape();
    const x = tensor([3], { requiresGrad: true });
    x.square().sum().backward();
    assertEquals(await x.grad!.array(), [6]);
    assertThrows(() => new Tape(), Error, "Tape: one tape is open already");
  }
  left.close();
  await dispose();
});

Deno.test("dispose: ends the scopes of its device, so that those of the next are neither used by old ones nor closed with them", async () => {
  const around = new Scope(); // opened before any device: it stays
  for (const end of ["dispose", "loss"]) {
    const device = await (await navigator.gpu.requestAdapter())!.requestDevice();
    await init({ device });
    const scope = new Scope(), old = new Tape(), x = rand([2]);
    if (end === "dispose") await dispose();
    device.destroy();
    if (end === "loss") await device.lost;
    const between = new Scope();
    await init();
    assert(old.closed && scope.closed && x.closed, end);
    manualSeed(1);
    assertEquals((await rand([3]).data()).length, 3); // with no random state of the old tape
    const w = tensor([3], { requiresGrad: true }), tape = new Tape(), y = w.square().sum();
    old.close(); // as its loop comes to its end
    scope.close();
    assert(!tape.closed && !w.closed && !between.closed && !around.closed, end);
    y.backward();
    assertEquals(await w.grad!.array(), [6]);
    between.close();
    assert(tape.closed && w.closed);
    await dispose();
  }
  around.close();
});

Deno.test("dispose: says what the device has refused and nobody has heard", async () => {
  await init();
  defineKernel({ name: "unheard", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" }).run(
    { y: zeros([4]).memory },
    {},
    1,
  );
  await assertRejects(() => dispose(), Error, "the WGSL of unheard (y [4])");
  await init();
  assertEquals(await tensor([1]).add(1).array(), [2]);
  await dispose();
});

Deno.test("dispose: says that the device was lost if nobody has heard it", async () => {
  for (const heard of [true, false]) {
    const device = await (await navigator.gpu.requestAdapter())!.requestDevice();
    const { promise: lost, resolve: lose } = Promise.withResolvers<GPUDeviceLostInfo>();
    Object.defineProperty(device, "lost", { value: lost, configurable: true });
    await init({ device });
    lose({ reason: "unknown", message: "driver reset" } as GPUDeviceLostInfo);
    await lost;
    if (heard) assertThrows(() => zeros([1]), Error, "the device was lost (unknown: driver reset)");
    else await assertRejects(() => dispose(), Error, "the device was lost (unknown: driver reset)");
    await dispose();
    Reflect.deleteProperty(device, "lost");
    device.destroy();
    await device.lost;
  }
});

Deno.test("init: a device or an adapter that cannot be used says so", async () => {
  const lost = await (await navigator.gpu.requestAdapter())!.requestDevice();
  lost.destroy();
  await assertRejects(() => init({ device: lost }), Error, "init: the device was lost before it could be used");
  // deno-lint-ignore no-explicit-any
  const start = (options: any) => () => init(options);
  const adapter = (requestDevice: () => unknown) => ({ requestDevice, features: new Set(), limits: {} });
  await assertRejects(
    start({ device: { createShaderModule() {} } }),
    TypeError,
    "device must be a GPUDevice, got an O",
  );
  await assertRejects(start({ adapter: { requestDevice() {} } }), TypeError, "adapter must be a GPUAdapter, got an O");
  const none = "init: the adapter gave no device";
  await assertRejects(start({ adapter: adapter(() => Promise.reject(new Error("busy"))) }), Error, `${none}: busy`);
  await assertRejects(start({ adapter: adapter(() => Promise.resolve(null)) }), Error, none);
  await init();
  assertEquals(await tensor([1]).add(1).array(), [2]);
  await dispose();
});

Deno.test("gpu: a device that is lost in the middle of reads says so and nothing else", async () => {
  const device = await (await navigator.gpu.requestAdapter())!.requestDevice();
  await init({ device });
  const x = tensor([1, 2]).add(1);
  device.destroy(); // nobody has heard of it yet
  for (const read of [() => x.data(), () => x.array()]) await assertRejects(read, Error, "GPU: the device was lost");
  assertThrows(() => x.add(1), Error, "the device was lost");
  await init();
  await dispose();
});

Deno.test("init: memoryLimit", async () => {
  await init({ memoryLimit: 2 ** 20 });
  using _scope = new Scope();
  const half = zeros([2 ** 17]); // 512 KiB
  assertThrows(() => zeros([2 ** 18]), RangeError, "would pass the memory limit");
  assertEquals((await half.data())[0], 0);
  const { liveTensors, liveBytes } = stats(); // the other half leaves no room for the random state
  assertThrows(() => rand([2 ** 17]), RangeError, "rand: 256 bytes (shape [2]) more would pass the memory limit");
  assertEquals([stats().liveTensors, stats().liveBytes], [liveTensors, liveBytes]);
  half.dispose();
  zeros([3 * 2 ** 16]).dispose(); // the pool's 512 KiB are given up for it
  const upload = () => tensor(new Float32Array(10_000)); // 40 KiB, which have a place of their own
  assertThrows(() => Array.from({ length: 100 }, upload), RangeError, "tensor: 40960 bytes (shape [10000]) more would");
  assert(stats().liveBytes + stats().pooledBytes <= 2 ** 20);
  await dispose();
  await init({ memoryLimit: 12 * 2 ** 20 });
  const uploads = Array.from({ length: 200 }, () => tensor(new Float32Array(12_000))); // three pages of them
  uploads.forEach((x, i) => i % 60 !== 59 && x.dispose());
  const pages = "147456 of 12582912 bytes are live and 8241152 more lie beside small uploads; free some";
  assertThrows(() => zeros([5 * 2 ** 18]), RangeError, pages);
  await dispose();
  await assertRejects(() => init({ memoryLimit: 0 }), RangeError, "init: memoryLimit must be");
});

Deno.test("init: an assign that the memory limit refuses is no in-place change", async () => {
  await init({ memoryLimit: 400_000 });
  const w = tensor([2], { requiresGrad: true }), x = tensor(new Float32Array(10_000).fill(0.5));
  {
    using _tape = new Tape();
    const y = w.mul(x).sum(), other = x.add(1);
    {
      using _scope = new Scope();
      const fill = () => Array.from({ length: 100 }, () => zeros([1000]));
      assertThrows(fill, RangeError, "would pass the memory limit");
      assertThrows(() => x.assign(other), RangeError, "would pass the memory limit");
    }
    y.backward();
    assertEquals(await w.grad!.array(), [5000]);
  }
  await dispose();
});

Deno.test("init: where the memory limit ends a constructor or a batch in the middle, nothing of it stays", async () => {
  const make: Record<string, () => void> = {
    Linear: () => new nn.Linear(40, 30).dispose(),
    Conv2d: () => new nn.Conv2d(8, 8, 3).dispose(),
    Gpt: () => new nn.Gpt({ vocabulary: 9, context: 8, layers: 1, width: 8, heads: 2 }).dispose(),
    Adam: () => {
      using _scope = new Scope();
      using optimizer = new optim.Adam([zeros([100, 10], { requiresGrad: true })]);
      for (const x of Object.values(optimizer.stateDict().tensors)) x.dispose();
    },
    batches: () => {
      const column = { data: new Float32Array(900), shape: [3, 300] };
      for (const _ of nn.batches({ x: column, y: column }, { batchSize: 1 }));
    },
  };
  for (const [name, fn] of Object.entries(make)) {
    let refused = 0, worked = false;
    for (let memoryLimit = 1024; !worked; memoryLimit = Math.ceil(1.3 * memoryLimit)) {
      await init({ memoryLimit });
      try {
        fn();
        worked = true;
      } catch (error) {
        assert(
          error instanceof RangeError && error.message.includes("would pass the memory limit"),
          `${name}: ${error}`,
        );
        refused++;
      }
      assertEquals([stats().liveTensors, stats().liveBytes], [0, 0], `${name} with ${memoryLimit} bytes`);
      await dispose();
    }
    assert(refused > 3, `${name}: only ${refused} limits were too low`);
  }
});

Deno.test("init: an injected device stays its maker's", async () => {
  const adapter = await navigator.gpu.requestAdapter();
  const device = await adapter!.requestDevice();
  const listeners = new Set<unknown>(); // an error that one of ours took would stay unheard after dispose()
  const { addEventListener, removeEventListener } = device;
  device.addEventListener = (type: string, listener: unknown) => {
    listeners.add(listener);
    addEventListener.call(device, type, listener as EventListener);
  };
  device.removeEventListener = (type: string, listener: unknown) => {
    listeners.delete(listener);
    removeEventListener.call(device, type, listener as EventListener);
  };
  await init({ device });
  assertEquals(listeners.size, 1);
  {
    using _scope = new Scope();
    assertEquals(await tensor([1, 2]).add(1).array(), [2, 3]);
    const logits = zeros([2, 3]), binds = "binds at most 8 buffers, got 9; init({ adapter })"; // the least limits
    const student = zeros([2, 3], { requiresGrad: true }), labels = tensor(new Int32Array(2));
    using _tape = new Tape();
    assertThrows(() => distillation(student, logits, labels), RangeError, binds);
  }
  await dispose();
  assertEquals(listeners.size, 0);
  await assertRejects(
    () => init({ device, features: ["nonsense"] }),
    RangeError,
    'init: the device lacks the feature "nonsense"',
  );
  const make = device.createBuffer, held = new Set<GPUBuffer>();
  device.createBuffer = (descriptor) => {
    const buffer = make.call(device, descriptor), { destroy } = buffer;
    held.add(buffer);
    buffer.destroy = () => {
      assert(held.delete(buffer), "destroyed once");
      return destroy.call(buffer);
    };
    return buffer;
  };
  await init({ device });
  const layer = new nn.Linear(8, 8), optimizer = new optim.Adam(layer.parameters()), free = zeros([600]);
  zeros([600]).dispose();
  assertEquals(await layer.forward(zeros([3, 8])).mul(0).sum().item(), 0);
  assert(held.size > 5);
  for (const x of Array.from({ length: 70 }, () => tensor(new Float32Array(16_000)))) x.dispose(); // two pages of uploads
  const bytes = () => [...held].reduce((sum, { size }) => sum + size, 0), before = bytes(), { pooledBytes } = stats();
  trimPool(); // also the second page, and what the read went through
  assertEquals(before - bytes(), pooledBytes + 2 ** 22 + 256);
  await dispose();
  assertEquals(held.size, 0); // also what is alive
  for (const old of [optimizer, layer, free]) old.dispose();
  device.createBuffer = make;
  const buffer = device.createBuffer({ size: 16, usage: 8 }); // works: it was not destroyed
  buffer.destroy();
  device.destroy();
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => init({ device: 5 as any }), TypeError, "init: device must be a GPUDevice, got 5");
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => init({ powerPreferences: "low-power" } as any), TypeError, "did you mean powerPreference?");
  await assertRejects(
    () => init({ features: ["nonsense"] }),
    RangeError,
    'init: the adapter lacks the feature "nonsense"',
  );
});

Deno.test("gpu: a device without adapterInfo, which browsers lacked at first, will do", async () => {
  const device = await (await navigator.gpu.requestAdapter())!.requestDevice();
  Object.defineProperty(device, "adapterInfo", { value: undefined });
  await init({ device });
  assertEquals(await tensor([1]).add(1).array(), [2]);
  await dispose();
  device.destroy();
});
