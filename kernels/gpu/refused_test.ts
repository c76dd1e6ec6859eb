// What a device refuses for want of memory or by its own fault, told as devices tell it: an invalid object at once, the error in its scope.
import { assertEquals, assertRejects, assertStringIncludes, assertThrows } from "@std/assert";
import { defineKernel, flush, init, matmul, Scope, stats, tensor, trimPool, zeros } from "@limbeck/limbeck";

const device = GPUDevice.prototype, { pushErrorScope, popErrorScope, createBuffer, createComputePipeline } = device;
const scopes: string[] = [];

/** While `fn` runs, `refuse` makes what it is given invalid and leaves its error in the innermost scope for such. */
async function refusing(
  filter: GPUErrorFilter,
  error: GPUError,
  patch: (refuse: <T>(device: GPUDevice, make: () => T) => T) => void,
  fn: () => Promise<void>,
): Promise<void> {
  let pending = false;
  device.pushErrorScope = function (filter) {
    scopes.push(filter);
    return pushErrorScope.call(this, filter);
  };
  device.popErrorScope = async function () {
    const ours = scopes.pop() === filter && pending;
    if (ours) pending = false;
    return await popErrorScope.call(this) ?? (ours ? error : null);
  };
  patch((device, make) => {
    pushErrorScope.call(device, "validation"); // of the call that makes it invalid
    const made = make();
    popErrorScope.call(device);
    pending = true;
    return made;
  });
  try {
    await fn();
  } finally {
    Object.assign(device, { pushErrorScope, popErrorScope, createBuffer, createComputePipeline });
  }
}

Deno.test("refused: no memory for a result names the op, the shape and the bytes, and all else goes on", async () => {
  await init();
  using _scope = new Scope();
  const a = zeros([300, 20]).add(1), b = zeros([20, 500]).add(1), before = await a.add(1).sum().item();
  trimPool();
  const live = stats().liveBytes, { destroy } = GPUBuffer.prototype;
  let destroyed = 0;
  GPUBuffer.prototype.destroy = function () {
    destroyed++;
    return destroy.call(this);
  };
  const outOfMemory = { message: "not enough memory left" };
  await refusing("out-of-memory", outOfMemory, (refuse) => {
    device.createBuffer = function (descriptor) {
      const large = descriptor.size >= 4 * 300 * 500 && !descriptor.mappedAtCreation;
      const make = (size: number) => createBuffer.call(this, { ...descriptor, size });
      return large ? refuse(this, () => make(2 ** 50)) : make(descriptor.size);
    };
  }, async () => {
    const y = matmul(a, b), z = y.add(1);
    const { message } = await assertRejects(() => z.data(), Error);
    assertStringIncludes(
      message,
      "GPU: out-of-memory error in matmul, which asked for 655360 bytes (shape [300, 500])",
    );
    {
      using _failed = new Scope();
      const missing = "sum: values is missing: the device had no 655360 bytes (shape [300, 500]) for it";
      assertThrows(() => y.sum(), Error, missing);
    }
    for (const x of [y, z]) {
      await assertRejects(() => x.data(), Error, "was not computed");
      x.dispose();
    }
  });
  assertEquals([stats().liveBytes, destroyed], [live, 2]); // and the refused buffers are not handed out again
  assertEquals((await matmul(a, b).data())[149_999], 20);
  assertEquals(await a.add(1).sum().item(), before);

  const gone = zeros([4]), { liveBytes, pooledBytes } = stats();
  await refusing("out-of-memory", outOfMemory, (refuse) => {
    device.createBuffer = function (descriptor) {
      return refuse(this, () => createBuffer.call(this, { ...descriptor, size: 2 ** 50 }));
    };
  }, async () => {
    for (const x of [zeros([200_000]), gone]) x.dispose(); // back in the pool before the device has said so
    const asked = "zeros, which asked for 917504 bytes (shape [200000]) with ";
    await assertRejects(() => flush(), Error, `GPU: out-of-memory error in ${asked}${liveBytes} bytes live`);
  });
  GPUBuffer.prototype.destroy = destroy;
  assertEquals(destroyed, 3);
  assertEquals([stats().pooledBytes, (await zeros([200_000]).add(1).data())[199_999]], [pooledBytes + 256, 1]);
});

Deno.test("refused: of reads at once, none gives the numbers of a refused batch before the device has said so", async () => {
  await init();
  using _scope = new Scope();
  const x = tensor([1, 2, 3]).add(1), z = zeros([4]);
  await flush();
  device.popErrorScope = async function () {
    const error = await popErrorScope.call(this);
    await new Promise((resolve) => setTimeout(resolve, 20));
    return error;
  };
  try {
    const a = x.mul(10), b = x.mul(100);
    defineKernel({ name: "bad", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" }).run(
      { y: z.memory },
      {},
      1,
    );
    const results = await Promise.allSettled([a.data(), b.data(), flush()]);
    const [first, second, third] = results.map((x) => String(x.status === "rejected" ? x.reason : x.value));
    for (const said of [first, second]) assertStringIncludes(said, "Error: GPU: "); // no numbers
    assertStringIncludes(first + second + third, "the WGSL of bad"); // whoever hears it first
  } finally {
    device.popErrorScope = popErrorScope;
  }
});

Deno.test("refused: no memory for a read names the tensor", async () => {
  await init();
  using _scope = new Scope();
  const x = zeros([300, 500]).add(1);
  trimPool();
  await refusing("out-of-memory", { message: "not enough memory left" }, (refuse) => {
    device.createBuffer = function (descriptor) {
      const make = () => createBuffer.call(this, { ...descriptor, size: 2 ** 50, mappedAtCreation: false });
      return descriptor.mappedAtCreation ? refuse(this, make) : createBuffer.call(this, descriptor);
    };
  }, async () => {
    await assertRejects(() => x.data(), Error, "in a read of 655360 bytes (shape [300, 500]): not enough memory left");
  });
  assertEquals((await x.data())[0], 1);
});

Deno.test("refused: an internal error of the compiler names the kernel and the shapes", async () => {
  await init();
  using _scope = new Scope();
  const x = tensor([[1, 2], [3, 4]]);
  await refusing("internal", { message: "the compiler gave up" }, (refuse) => {
    device.createComputePipeline = function (descriptor) {
      const compute = { ...descriptor.compute, entryPoint: "nowhere" };
      return refuse(this, () => createComputePipeline.call(this, { ...descriptor, compute }));
    };
  }, async () => {
    const y = x.cos();
    const { message } = await assertRejects(() => flush(), Error);
    assertStringIncludes(message, "GPU: internal error in the WGSL of cos (a [2, 2], y [2, 2]): the compiler gave up");
    await assertRejects(() => y.data(), Error, "was not computed");
  });
  assertEquals(await x.add(1).array(), [[2, 3], [4, 5]]);
});

Deno.test("refused: reads that wait while a batch is discarded give its results or an error, whatever the memory holds by then", async () => {
  await init();
  using _scope = new Scope();
  const bad = defineKernel({ name: "bad", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" });
  const reads: Promise<unknown>[] = [],
    said = (x: Promise<unknown>) => x.then((y) => y, (error: Error) => error.message);
  {
    using _short = new Scope();
    const sums = [1, 2, 3].map((i) => tensor([1, 2, 3, 4]).add(i));
    bad.run({ y: zeros([4]).memory }, {}, 1);
    reads.push(...sums.map((x) => said(x.data())));
  }
  for (const read of reads) {
    assertStringIncludes(String(await read), "GPU: ");
    for (let i = 0; i < 8; i++) zeros([4]); // in the memory that the sums had
  }
  // and the other way round: what an earlier batch computed is there, though a later one should have overwritten it
  const x = tensor([1, 2]).add(1), good = said(x.data()), other = defineKernel({ ...bad.spec });
  other.run({ y: x.memory }, {}, 1);
  const [later, numbers] = [String(await said(zeros([1]).data())), String(await good)];
  // whoever hears of the error first tells it; that is the earlier read on a GPU, the later one on a CPU
  assertStringIncludes(later + numbers, "the WGSL of bad");
  if (!numbers.includes("the WGSL of bad")) assertEquals(numbers, "2,3");
});
