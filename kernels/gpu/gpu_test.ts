import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  concat,
  defineKernel,
  dispose,
  flush,
  init,
  nn,
  ones,
  optim,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  trimPool,
  zeros,
} from "@limbeck/limbeck";
import { bindable } from "./memory.ts";

Deno.test("gpu: an upload does not change what dispatches before it see", async () => {
  await init();
  using _scope = new Scope();
  // 64 floats go through the arena, 20,000 (above 64 KiB) straight to a buffer; a disposed upload's place is free for the next
  for (const size of [64, 20_000]) {
    const results: Tensor[] = [];
    for (let i = 0; i < 40; i++) {
      const x = tensor(new Float32Array(size).fill(i));
      results.push(x.mul(2));
      x.dispose();
    }
    const seen = await Promise.all(results.map((y) => y.data()));
    seen.forEach((data, i) => assert(data.every((v) => v === 2 * i), `upload ${i} of ${size} floats reads ${data[0]}`));
    for (const y of results) y.dispose();
  }
});

Deno.test("gpu: uploads that stay alive, more than the arena holds", async () => {
  await init();
  using _scope = new Scope();
  // a page of the arena is 4 MiB, the data 90 × 62.5 KiB: one page is not enough
  const kept = Array.from({ length: 90 }, (_, i) => tensor(new Float32Array(16_000).fill(i)));
  const sums = kept.map((x) => x.sum());
  assertEquals(await Promise.all(sums.map((s) => s.item())), kept.map((_, i) => 16_000 * i));
  assertEquals((await kept[0].data())[15_999], 0);
});

Deno.test("gpu: an upload without elements that moves away is gone with its page", async () => {
  await dispose();
  await init();
  using _scope = new Scope();
  for (let i = 0; i < 64; i++) tensor(new Float32Array(2 ** 14)); // a page of uploads
  const none = tensor(new Float32Array(0)); // the first of the next page
  none.requiresGrad = true;
  await flush();
  using _optimizer = new optim.SGD([none], { lr: 1 });
  trimPool();
  for (let i = 0; i < 3; i++) assertEquals(await tensor([i]).add(1).array(), [i + 1]);
});

Deno.test("gpu: small uploads of new sizes need no submit, however many others there were", async () => {
  await init();
  {
    using _scope = new Scope();
    for (let i = 0; i < 20_000; i++) tensor([i]);
  }
  await flush();
  using _scope = new Scope();
  const before = stats().submits, sums = zeros([300]);
  for (let i = 0; i < 50; i++) {
    using _step = new Scope();
    sums.assign(sums.add(tensor(new Float32Array(300).fill(i))));
  }
  assertEquals(stats().submits, before);
  assertEquals((await sums.data())[299], 49 * 50 / 2);
});

Deno.test("gpu: steps are submitted 40 dispatches after a read, then after twice as many, up to 160", async () => {
  await init();
  using _scope = new Scope();
  const x = zeros([1]);
  for (let round = 0; round < 2; round++) {
    await x.data();
    const submitted: number[] = [];
    for (let step = 1, { submits } = stats(); step <= 44; step++) {
      {
        using _tape = new Tape();
        for (let i = 0; i < 10; i++) x.assign(x.neg());
      }
      if (stats().submits > submits) submitted.push(step);
      ({ submits } = stats());
    }
    assertEquals(submitted, [2, 6, 14, 22, 30, 38]); // of 20 dispatches each
  }
});

Deno.test("gpu: of the arena a submit writes what is new, not what lies between", async () => {
  await init();
  using _scope = new Scope();
  tensor([1]).dispose(); // the place of the next one
  for (let i = 0; i < 70; i++) tensor(new Float32Array(16_000)); // more than a page
  zeros([1]);
  await flush();
  const queue = GPUQueue.prototype, { writeBuffer } = queue;
  let written = 0;
  queue.writeBuffer = function (...given: Parameters<GPUQueue["writeBuffer"]>) {
    written += given[4]!;
    return writeBuffer.apply(this, given);
  };
  try {
    const far = tensor(new Float32Array(16_000).fill(3)), near = tensor([2]);
    assertEquals([await far.add(near).sum().item(), (await near.data())[0]], [5 * 16_000, 2]);
  } finally {
    queue.writeBuffer = writeBuffer;
  }
  assert(written < 2 ** 18, `${written} bytes`);
});

Deno.test("gpu: writable uploads behind dispatches that read their memory", async () => {
  await init();
  using _scope = new Scope();
  const results: Tensor[] = [];
  for (let i = 0; i < 20; i++) {
    const x = tensor(new Float32Array(64).fill(i), [64], { requiresGrad: true }); // in the pool, as parameters are
    results.push(x.mul(3));
    x.dispose();
  }
  assertEquals(await Promise.all(results.map((y) => y.data().then((d) => d[63]))), results.map((_, i) => 3 * i));
});

Deno.test("gpu: a copy between two places in one buffer", async () => {
  await init();
  using _scope = new Scope();
  const [a, b] = [[1, 2, 3], [7, 8, 9]].map((values) => tensor(values, { requiresGrad: true }));
  using optimizer = new optim.SGD([a, b], { lr: 1 }); // parameters and gradients in a block each
  using _tape = new Tape();
  a.mul(2).sum().backward();
  b.grad = a.grad;
  optimizer.step();
  assertEquals([await a.array(), await b.array()], [[-1, 0, 1], [5, 6, 7]]);
  a.assign(b);
  assertEquals([await a.array(), await b.array()], [[5, 6, 7], [5, 6, 7]]);
});

Deno.test("gpu: bytes that are no multiple of four", async () => {
  const info = await init();
  if (!info.f16) return;
  using _scope = new Scope();
  for (const size of [1, 3, 40_001]) {
    const x = tensor(new Float16Array(size).fill(1.5), [size]);
    const data = await x.data();
    assertEquals([data.length, data[0], data[size - 1]], [size, 1.5, 1.5]);
  }
});

Deno.test("gpu: reads are right after more dispatches than a batch holds", async () => {
  await init();
  using _scope = new Scope();
  const before = stats();
  let x = tensor([0]);
  const some: Tensor[] = [];
  for (let i = 1; i <= 700; i++) {
    const next = x.add(1);
    if (some.at(-1) !== x) x.dispose();
    x = next;
    if (i % 100 === 0) some.push(x);
  }
  const after = stats();
  assertEquals(after.dispatches - before.dispatches, 700);
  assert(after.submits > before.submits, "batches are submitted on the way");
  assertEquals(await Promise.all(some.map((t) => t.item())), [100, 200, 300, 400, 500, 600, 700]);
});

Deno.test("gpu: many reads at once", async () => {
  await init();
  using _scope = new Scope();
  const all = Array.from({ length: 100 }, (_, i) => tensor([i]).add(0.5));
  assertEquals(await Promise.all(all.map((x) => x.item())), all.map((_, i) => i + 0.5));
});

Deno.test("gpu: a loop that awaits nothing but reads lets timers run", async () => {
  await init();
  using _scope = new Scope();
  const x = tensor([1]), end = performance.now() + 300;
  let ticks = 0;
  const timer = setInterval(() => ticks++, 10);
  try {
    while (performance.now() < end) await x.item();
  } finally {
    clearInterval(timer);
  }
  assert(ticks > 0);
});

Deno.test("gpu: a repeated dispatch makes no bind group", async () => {
  await init();
  const step = () => {
    using _tape = new Tape();
    const x = tensor(new Float32Array(64).fill(2), [64], { requiresGrad: true });
    x.square().mul(3).sum().backward();
  };
  for (let i = 0; i < 4; i++) step();
  const { bindGroupsCreated, buffersCreated } = stats();
  for (let i = 0; i < 20; i++) step();
  assertEquals([stats().bindGroupsCreated, stats().buffersCreated], [bindGroupsCreated, buffersCreated]);
});

Deno.test("gpu: numbers in params are told apart, −0 and large u32 too", async () => {
  await init();
  using _scope = new Scope();
  const kernel = defineKernel({
    name: "params",
    buffers: { y: "write f32" },
    params: { a: "f32", b: "u32", c: "i32" },
    workgroup: 1,
    main: "y[0] = 1.0 / params.a; y[1] = f32(params.b >> 24u); y[2] = f32(params.c);",
  });
  const y = zeros([3]);
  const run = (a: number, b: number, c: number) => {
    kernel.run({ y: y.memory }, { a, b, c }, 1);
    return y.array();
  };
  assertEquals(await run(2, 0xff000000, -5), [0.5, 255, -5]);
  assertEquals(await run(0, 0, 0), [Infinity, 0, 0]);
  assertEquals(await run(-0, 0, 0), [-Infinity, 0, 0]);
});

Deno.test("gpu: an error in WGSL comes at the next await, names the kernel and passes", async () => {
  await init();
  using _scope = new Scope();
  const broken = defineKernel({ name: "brokenKernel", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" });
  const y = zeros([4]);
  broken.run({ y: y.memory }, {}, 1); // nothing is thrown here
  const { message } = await assertRejects(() => flush(), Error);
  assertStringIncludes(message, "brokenKernel");
  await flush(); // said once
  assertEquals(await tensor([1, 2]).add(1).array(), [2, 3]);
});

Deno.test("gpu: an error in WGSL comes at a read as well", async () => {
  await init();
  using _scope = new Scope();
  const broken = defineKernel({ name: "otherBroken", buffers: { y: "write f32" }, main: "y[thread] = 1 +;" });
  const y = zeros([4]);
  broken.run({ y: y.memory }, {}, 1);
  const { message } = await assertRejects(() => y.data(), Error);
  assertStringIncludes(message, "otherBroken");
  assertEquals(await zeros([2]).add(1).array(), [1, 1]);
});

Deno.test("gpu: what an invalid dispatch took down with it says so", async () => {
  await init();
  using _scope = new Scope();
  zeros([4]).add(9).dispose(); // the pool's memory holds old numbers
  await flush();
  const broken = defineKernel({ name: "poisonous", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" });
  const innocent = tensor([1, 2, 3, 4]).add(1); // in the same pass, which the device discards as a whole
  broken.run({ y: zeros([4]).memory }, {}, 1);
  await assertRejects(() => flush(), Error, "poisonous");
  await assertRejects(() => innocent.data(), Error, "was not computed"); // not the pool's old numbers
});

Deno.test("gpu: what later batches made of a refused batch's results says so as well", async () => {
  await init();
  using _scope = new Scope();
  const broken = defineKernel({ name: "early", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" });
  const before = tensor([1, 2]).add(1), y = zeros([4]);
  const submitted = () => {
    for (let i = 0; i < 250; i++) zeros([1]).dispose();
  };
  await flush();
  broken.run({ y: y.memory }, {}, 1);
  submitted();
  const second = y.add(1); // encoded before anybody knows
  submitted();
  const third = second.mul(2);
  await assertRejects(() => flush(), Error, "early");
  for (const x of [y, second, third, third.add(1)]) await assertRejects(() => x.data(), Error, "was not computed");
  const fresh = zeros([4]);
  await flush();
  broken.run({ y: fresh.memory }, {}, 1);
  const read = fresh.data(), open = fresh.add(1); // in the batch that is open when the device says so
  await assertRejects(() => read, Error, "early");
  await assertRejects(() => open.data(), Error, "was not computed");
  assertEquals([await before.array(), await before.add(1).array()], [[2, 3], [3, 4]]);
});

Deno.test("gpu: what is added to or fills a part of a refused batch's results is still missing", async () => {
  await init();
  using _scope = new Scope();
  const broken = defineKernel({
    name: "partial",
    buffers: { y: "write f32" },
    params: { size: "u32" },
    main: "y[thread] = nonsense;",
  });
  const w = tensor([1, 2], { requiresGrad: true }), lost = zeros([2]), good = zeros([2]).add(3);
  await flush();
  {
    using _tape = new Tape();
    broken.run({ y: lost.memory }, { size: 2 }, 1);
    w.mul(lost.add(1)).sum().backward();
  }
  await assertRejects(() => flush(), Error, "partial");
  await assertRejects(() => w.grad!.data(), Error, "was not computed");
  {
    using _tape = new Tape();
    w.mul(2).sum().backward(); // adds to what is missing
  }
  const joined = concat([lost, good]);
  for (const x of [w.grad!, joined]) await assertRejects(() => x.data(), Error, "was not computed");
  const moved = tensor([1, 2], { requiresGrad: true });
  moved.assign(lost);
  using _optimizer = new optim.SGD([moved]); // copies it
  await assertRejects(() => moved.data(), Error, "was not computed");
  lost.assign(good); // and what is written as a whole is there again
  w.grad = null;
  {
    using _tape = new Tape();
    w.mul(lost).sum().backward();
  }
  assertEquals([await lost.array(), await w.grad!.array()], [[3, 3], [3, 3]]);
  joined.dispose(); // its memory is whoever takes it next
  for (const y of [1, 2, 3, 4].map((n) => good.add(n))) assert((await y.data())[0] > 3);
  w.dispose();
});

Deno.test("gpu: a training run does not go on unheard from a step that the device refused", async () => {
  await init();
  const model = new nn.Sequential(new nn.Linear(2, 4), new nn.Linear(4, 1)), [w] = model.parameters();
  const optimizer = new optim.AdamW(model.parameters()), saved = await w.data();
  const broken = defineKernel({ name: "midstep", buffers: { y: "write f32" }, main: "y[thread] = nonsense;" });
  const step = async (breaks: boolean) => {
    using _tape = new Tape();
    optimizer.zeroGrad();
    const loss = model.forward(tensor([[1, 2]])).square().sum();
    if (breaks) broken.run({ y: zeros([4]).memory }, {}, 1);
    loss.backward();
    if (breaks) await assertRejects(() => flush(), Error, "midstep");
    optimizer.step();
    return await loss.item();
  };
  await step(false);
  const state = optimizer.stateDict();
  await flush();
  await assertRejects(() => step(true), Error, "was not computed");
  await assertRejects(() => w.data(), Error, "was not computed");
  await assertRejects(() => step(false), Error, "was not computed"); // computed from those parameters
  const renew = () => model.parameters().forEach((x) => nn.init.constant(x, 0.5));
  renew();
  assert(Number.isFinite(await step(false)));
  await assertRejects(() => w.data(), Error, "was not computed"); // the moments were added to, not replaced
  renew();
  optimizer.loadStateDict(state); // whole again
  assert(Number.isFinite(await step(false)));
  assertEquals((await w.data()).length, saved.length);
  for (const x of Object.values(state.tensors)) x.dispose();
  optimizer.dispose();
  model.dispose();
});

Deno.test("gpu: one buffer is not read and written by one dispatch", async () => {
  await init();
  using _scope = new Scope();
  const copy = defineKernel({
    name: "copyKernel",
    buffers: { x: "read f32", y: "write f32" },
    main: "y[thread] = x[thread];",
  });
  const x = zeros([4]), uploaded = tensor([1]);
  assertThrows(() => copy.run({ x: x.memory, y: x.memory }, {}, 1), TypeError, "copyKernel: y is written and");
  assertThrows(() => copy.run({ x: x.memory, y: uploaded.memory }, {}, 1), TypeError, "copyKernel: y must be memory");
  assertEquals(await x.add(1).array(), [1, 1, 1, 1]); // the pass goes on
  // deno-lint-ignore no-explicit-any
  assertThrows(() => copy.run(null as any, {}, 1), TypeError, "copyKernel: x must be a Memory, got undefined");
});

Deno.test("defineKernel: refuses names that are no identifiers and too many params", async () => {
  await init();
  const main = "";
  for (const name of ["d_logits 2", "Upper", "2x", "", "a-b"]) {
    assertThrows(
      () => defineKernel({ name: "k", buffers: { [name]: "read f32" }, main }),
      TypeError,
      "must be a camelCase identifier",
    );
  }
  const params = Object.fromEntries(Array.from({ length: 65 }, (_, i) => [`p${i}`, "u32" as const]));
  assertThrows(
    () => defineKernel({ name: "k", buffers: {}, params, main }),
    TypeError,
    "at most 64 params fit, got 65",
  );
});

Deno.test("defineKernel: more workgroups than one dimension takes", async () => {
  await init();
  using _scope = new Scope();
  const groups = 70_001; // 35,001 in x, twice in y: one too many
  const kernel = defineKernel({
    name: "groups",
    buffers: { y: "write u32" },
    params: { groups: "u32" },
    workgroup: 1,
    main: "if (group < params.groups) { y[group] = group + 1u; }",
  });
  const y = zeros([groups], { dtype: "u32" });
  kernel.run({ y: y.memory }, { groups }, groups);
  const data = await y.data();
  assertEquals(data.findIndex((v, i) => v !== i + 1), -1);
});

Deno.test("gpu: an elementwise op on more than 65,535 workgroups", async () => {
  await init();
  using _scope = new Scope();
  const size = 17_000_000; // 256 threads each: 66,407 workgroups of the filling kernel
  const x = zeros([size]).add(1);
  // f32 cannot count beyond 2²⁴ one by one, but these sums are exact; a division may err by 2.5 ulp
  assertAlmostEquals(await x.mean().item(), 1, 2 ** -22);
  assertEquals(await x.reshape([1000, 17_000]).sum({ dim: 1 }).min().item(), 17_000);
});

Deno.test("gpu: the largest tensor that the adapter binds is there to its last number", async () => {
  // the second is an H100's: kernels read whole vec4s
  const of = (maxStorageBufferBindingSize: number) =>
    bindable({ limits: { maxStorageBufferBindingSize } } as unknown as GPUDevice);
  assertEquals([2 ** 27, 2 ** 31 - 4].map(of), [2 ** 27, 2 ** 31 - 16]);

  const { limits, isSoftware } = await init(), bytes = limits.maxStorageBufferBindingSize;
  if (isSoftware && bytes > 2 ** 29) return; // SwiftShader binds 1 GiB and does not have it
  using _scope = new Scope();
  const size = bytes / 4, more = ones([size]).add(1);
  assertEquals(Array.from(await more.slice([[size - 5, size]]).data()), [2, 2, 2, 2, 2]);
});

Deno.test("gpu: a tensor that the adapter cannot bind is refused", async () => {
  const { limits } = await init();
  const before = stats().liveBytes;
  const { message } = assertThrows(() => zeros([Math.floor(limits.maxStorageBufferBindingSize / 4) + 1]), RangeError);
  assertStringIncludes(message, "more than this adapter binds at once");
  assertEquals(stats().liveBytes, before);
});

Deno.test("defineKernel: refuses what would abort the process", () => {
  const head = "fn f(p: ptr<function, f32>) { *p = 1.0; }", rest = "y[thread] = 1.0;";
  const refused = [
    "var a: array<f32, 4>; f(&a[1]);",
    "var a: array<f32, 4>; f( & a [thread]);",
    "var a: array<f32, 4>; f(&(a[1]));",
    "var a: array<f32, 4>; let p = &a; f(&(*p)[1]);",
    "var a: array<f32, 4>; g(1.0, &a[max(1, 2)]);",
    "var a: array<f32, 4>; let p = &a[1]; f(p);",
    "var a: array<f32, 4>; let p: ptr<function, f32> = &a[1]; g(1.0, p);",
    "var s: S; f(&s.a);",
    "var s: S; f(/* here */ &s.a);",
  ];
  const wrong = refused.filter((main) => {
    try {
      defineKernel({ name: "k", buffers: { y: "write f32" }, head, main: main + rest });
      return true;
    } catch (error) {
      return !(error as Error).message.includes("must not pass a pointer to an element or member to a function");
    }
  });
  assertEquals(wrong, []);
  const taken = [
    "var a: f32; f(&a);",
    "var a: array<f32, 4>; h(&a); h2(&a, a[1]);",
    "var a: array<f32, 4>; let p = &a[1]; *p = 3.0;",
    "let i = 5u & x[1]; g(1u & x[0]); f2(3u, 1u & x[1]);",
    "if (thread == 0u && x[1] == 1u) { atomicAdd(&counts[thread], 1u); }",
    "let n = arrayLength(&s.values); // f(&x[1])",
  ];
  for (const main of taken) defineKernel({ name: "k", buffers: { y: "write f32" }, head, main: main + rest });
});

Deno.test("defineKernel: what it is made of and what run takes are checked", async () => {
  await init();
  using _scope = new Scope();
  const good = { name: "k", buffers: { y: "write f32" }, params: { size: "u32" }, main: "y[0] = f32(params.size);" };
  // deno-lint-ignore no-explicit-any
  const define = (more: any) => () => defineKernel({ ...good, ...more });
  const cases: [unknown, string][] = [
    [{ name: 5 }, "defineKernel: name must be a string, got 5"],
    [{ buffers: null }, "buffers must be an object of types, got null"],
    [{ buffers: { y: "readwrite f32" } }, 'y must be "read" or "write" and an element type, got "readwrite f32"'],
    [{ params: { size: "f16" } }, 'size must be one of u32, i32, f32, got "f16"'],
    [{ params: { y: "u32" } }, '"y" must not come twice'],
    [{ workgroup: 0 }, "workgroup must be an integer, at least 1, got 0"],
    [{ main: undefined }, "main must be a string of WGSL, got undefined"],
    [{ bufers: {} }, 'unknown option "bufers"; did you mean buffers?'],
  ];
  for (const [more, message] of cases) assertStringIncludes(assertThrows(define(more), Error).message, message);
  const kernel = define({})(), y = zeros([1]), run = kernel.run;
  // deno-lint-ignore no-explicit-any
  const call = (buffers: any, params: any, groups: any) => () => run(buffers, params, groups);
  const memory = y.memory;
  assertThrows(call({ x: memory }, { size: 1 }, 1), TypeError, "k: y must be a Memory, got undefined");
  assertThrows(call({ y }, { size: 1 }, 1), TypeError, "k: y must be a Memory, got a Tensor");
  assertThrows(call({ y: null }, { size: 1 }, 1), TypeError, "k: y must be a Memory, got null");
  assertThrows(call({ y: memory }, {}, 1), TypeError, "k: params.size must be a number, got undefined");
  assertThrows(call({ y: memory }, { size: -1 }, 1), RangeError, "k: params.size must be an integer");
  assertThrows(call({ y: memory }, { size: 1 }, -1), RangeError, "k: workgroups must be an integer, at least 0");
  assertThrows(call({ y: memory }, { size: 1 }, 2 ** 40), RangeError, "k: workgroups must be an integer, at least 0");
  const wide = defineKernel({ name: "wide", buffers: { y: "write f32" }, workgroup: 2 ** 20, main: "" });
  assertThrows(() => wide.run({ y: memory }, {}, 1), RangeError, "wide: workgroup must be a finite number, at most");
  run({ y: memory, z: null }, { size: 7 }, 1); // which binds no z
  assertEquals(await y.item(), 7);
});

Deno.test("gpu: parameters stay as they were, however many follow and whatever is forgotten meanwhile", async () => {
  await init();
  using _scope = new Scope();
  const scaled = defineKernel({
    name: "scaled",
    buffers: { x: "read f32", y: "write f32" },
    params: { f: "f32" },
    workgroup: 1,
    main: "y[0] = params.f * x[0];",
  });
  const [x, y, z] = [tensor([1]), zeros([1]), zeros([1])];
  const run = (to: Tensor, f: number) => scaled.run({ x: x.memory, y: to.memory }, { f }, 1);
  for (let f = 0; f < 600; f++) run(z, f); // more than a buffer for parameters holds
  for (const f of [0, 1, 300, 599]) {
    run(y, f);
    assertEquals(await y.array(), [f]);
  }
  run(y, 2);
  await flush();
  trimPool(); // forgets all parameters
  run(y, 2);
  run(z, 3);
  assertEquals([await y.item(), await z.item()], [2, 3]);
});

Deno.test("gpu: a kernel may not write one memory twice, nor memory of another device", async () => {
  await init();
  const both = defineKernel({
    name: "both",
    buffers: { x: "write f32", y: "write f32" },
    main: "x[0] = 1.0; y[0] = 2.0;",
  });
  const x = zeros([1]), { memory } = x;
  assertThrows(() => both.run({ x: memory, y: memory }, {}, 1), TypeError, "both: ");
  await dispose();
  await init();
  const y = zeros([1]);
  assertThrows(() => both.run({ x: memory, y: y.memory }, {}, 1), Error, "is on a device that was disposed");
  y.dispose();
});

Deno.test("gpu: the memory limit counts what the pool keeps", async () => {
  await dispose();
  await init({ memoryLimit: 2 ** 20 });
  try {
    for (const size of [150_000, 200_000]) zeros([size]).dispose();
    const { liveBytes, pooledBytes } = stats();
    assert(liveBytes + pooledBytes <= 2 ** 20, `${liveBytes} + ${pooledBytes}`);
  } finally {
    await dispose();
  }
});
