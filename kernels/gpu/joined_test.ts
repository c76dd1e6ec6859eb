import { assertEquals, assertThrows } from "@std/assert";
import { defineKernel, init, type KernelSpec, stats, type Tensor, tensor, zeros } from "@limbeck/limbeck";
import { gathered, later, pairOf } from "./joined.ts";
import { launchOf } from "./launch.ts";
import { overrides } from "./tuning.ts";
import { gpu } from "./gpu.ts";
import { FlatBlock, type Memory } from "./memory.ts";

const reversed: KernelSpec = {
  name: "reversed",
  buffers: { x: "read f32", y: "write f32" },
  params: { size: "u32" },
  workgroup: 64,
  head: "var<workgroup> kept: array<f32, 64>; fn f(x: f32) -> f32 { let y = 2.0 * x; return y; }",
  main: `if (group >= (params.size + 63u) / 64u) { return; }
  kept[lane] = f(x[min(thread, params.size - 1u)]);
  workgroupBarrier();
  if (thread < params.size) { y[thread] = kept[63u - lane]; }`,
};
/** The same names for other things. */
const shifted: KernelSpec = {
  name: "shifted",
  buffers: { y: "read i32", x: "write i32" },
  params: { by: "i32", size: "u32" },
  workgroup: 64,
  head: "var<workgroup> kept: array<i32, 64>; fn f(x: i32) -> i32 { return x + params.by; }",
  main: `if (thread >= params.size) { return; }
  kept[lane] = f(y[thread]);
  let v = vec2i(kept[lane], 1);
  x[thread] = v.x * v.y;`,
};

Deno.test("pairOf: two kernels with the same names in one launch, and two launches where one is not possible", async () => {
  await init();
  const values = Array.from({ length: 128 }, (_, i) => i);
  const launch = (spec: KernelSpec) => launchOf(defineKernel(spec), { by: -5, size: 128 }, 128 / spec.workgroup!);
  const first = launch(reversed), x = tensor(values), y = zeros([128]), z = zeros([128]);
  const i = tensor(Int32Array.from(values)), j = zeros([128], { dtype: "i32" });
  const mirrored = values.map((v) => 2 * (v - v % 64 + 63 - v % 64));
  let before = stats().dispatches;
  pairOf(first, launch(shifted))!({ x: x.memory, y: y.memory }, { y: i.memory, x: j.memory });
  assertEquals(stats().dispatches - before, 1);
  assertEquals([await y.array(), await j.array()], [mirrored, values.map((v) => v - 5)]);
  // the second reads what the first writes
  before = stats().dispatches;
  pairOf(first, launch(reversed))!({ x: x.memory, y: y.memory }, { x: y.memory, y: z.memory });
  assertEquals(stats().dispatches - before, 2);
  assertEquals(await z.array(), values.map((v) => 4 * v));
  // the first reads what the second writes
  before = stats().dispatches;
  pairOf(first, launch(reversed))!({ x: y.memory, y: z.memory }, { x: x.memory, y: y.memory });
  assertEquals(stats().dispatches - before, 2);
  assertEquals(await z.array(), values.map((v) => 4 * v));
  assertEquals(pairOf(first, launch({ ...shifted, workgroup: 128 })), null);
});

/** y = f·x + 1, of 64 elements. */
const scaled = defineKernel({
  name: "scaled",
  buffers: { x: "read f32", y: "write f32" },
  params: { f: "f32" },
  workgroup: 32,
  head: "const one = 1.0; var<workgroup> kept: array<f32, 32>; fn more(x: f32) -> f32 { return x + one; }",
  main: "kept[lane] = params.f * x[thread]; workgroupBarrier(); y[thread] = more(kept[lane]);",
});

/** Runs `fn` while launches wait, on any device, and gives the number of dispatches that it took. */
function gathering(fn: () => void): number {
  const before = stats().dispatches;
  overrides.gather = true;
  try {
    gathered(fn);
  } finally {
    overrides.gather = null;
  }
  return stats().dispatches - before;
}

const first = async (x: Tensor) => (await x.array() as number[])[0];
const released: number[] = [];
const wait = (x: Tensor, y: Tensor, f: number) =>
  later({ kernel: scaled, params: [f], workgroups: 2 }, { x: x.memory, y: y.memory }, () => released.push(f));
const now = (x: Tensor, y: Tensor, f: number) => scaled.run({ x: x.memory, y: y.memory }, { f }, 2);

Deno.test("later: launches share a dispatch, at the end at the latest", async () => {
  await init();
  const x = tensor(Array.from({ length: 64 }, (_, i) => i)), results = [2, 3, 4, 5].map(() => zeros([64]));
  released.length = 0;
  const dispatches = gathering(() => {
    results.forEach((y, i) => wait(x, y, i + 2));
    assertEquals(released, []);
  });
  assertEquals([dispatches, released], [1, [2, 3, 4, 5]]);
  for (const [i, y] of results.entries()) {
    assertEquals(await y.array(), Array.from({ length: 64 }, (_, k) => (i + 2) * k + 1));
  }
  // outside of `gathered` they run at once
  const before = stats().dispatches;
  wait(x, results[0], 7);
  assertEquals([stats().dispatches - before, released.at(-1)], [1, 7]);
});

Deno.test("later: what uses a result, or overwrites an operand, comes after it", async () => {
  await init();
  const x = tensor(Array(64).fill(10)), [a, b, c, d] = [1, 2, 3, 4].map(() => zeros([64]));
  now(x, a, 1); // 11, and memory that may be written
  assertEquals(
    gathering(() => {
      wait(a, b, 2); // 23
      wait(x, c, 5); // 51
      now(b, d, 10); // reads b: 231
    }),
    2,
  );
  assertEquals([await first(b), await first(c), await first(d)], [23, 51, 231]);
  assertEquals(
    gathering(() => {
      wait(a, b, 3); // 34
      now(x, a, 0); // overwrites a: 1
      wait(a, c, 4); // 5
      wait(c, d, 2); // reads what a waiting one writes: 11
      wait(x, d, 3); // and overwrites its result: 31
    }),
    5,
  );
  assertEquals([await first(b), await first(c), await first(d)], [34, 5, 31]);
  // reads, copies and uploads too, and memory that is freed while a launch waits for it
  const copied = zeros([64]), { queue, pool } = gpu();
  let read: Promise<number> | undefined;
  gathering(() => {
    wait(x, b, 1); // 11
    read = first(b);
  });
  assertEquals(await read, 11);
  gathering(() => {
    wait(x, b, 6); // 61
    queue.copy(b.memory, copied.memory, 4 * 64);
    wait(a, c, 9); // 10
    queue.copy(x.memory, a.memory, 4 * 64);
    const gone = pool.take(4 * 64, "test", [64], "upload");
    later({ kernel: scaled, params: [1], workgroups: 2 }, { x: x.memory, y: gone }, () => {});
    gone.free();
    using again = queue.upload(new Uint8Array(Float32Array.of(...Array(64).fill(3)).buffer), true);
    scaled.run({ x: again, y: d.memory }, { f: 2 }, 2); // 7
    wait(x, b, 7); // 71
    const freed = pool.take(4 * 64);
    later({ kernel: scaled, params: [1], workgroups: 2 }, { x: x.memory, y: freed }, () => {});
    freed.free();
    pool.trim(); // destroys it
  });
  assertEquals([await first(copied), await first(c), await first(a), await first(d), await first(b)], [
    61,
    10,
    10,
    7,
    71,
  ]);
});

Deno.test("later: as many share a dispatch as the device allows, and what was waiting runs if there is an error", async () => {
  await init();
  const most = Math.min(Math.floor(gpu().info.limits.maxStorageBuffersPerShaderStage / 2), 32); // 32 launches have 63 parameters
  const x = tensor(Array(64).fill(1)), results = Array.from({ length: most + 1 }, () => zeros([64]));
  assertEquals(gathering(() => results.forEach((y, i) => wait(x, y, i))), 2);
  assertEquals(await Promise.all(results.map(first)), results.map((_, i) => i + 1));
  // a buffer must not be read and written in one dispatch, not even in different slots; and waiting launches hold little memory
  const { pool } = gpu(), { slots: [one, other] } = new FlatBlock(pool, pool.take(1024), [256, 256]);
  const on = (x: Memory, y: Memory) => later({ kernel: scaled, params: [3], workgroups: 2 }, { x, y }, () => {});
  now(x, results[0], 2);
  const reads = () => on(other, results[1].memory), writes = () => on(results[0].memory, one);
  for (const order of [[reads, writes], [writes, reads]]) {
    assertEquals(gathering(() => order.forEach((launch) => launch())), 2);
  }
  const large = [0, 1].map(() => pool.take(9 * 2 ** 20));
  assertEquals(gathering(() => large.forEach((x, i) => on(x, results[i].memory))), 2);
  const refused = pool.take(256);
  refused.refused = true;
  const failing = () => {
    wait(x, results[1], 5); // 6
    on(refused, results[0].memory);
  };
  assertThrows(() => gathering(failing), Error, "scaled: x is missing");
  assertEquals(await first(results[1]), 6);
  for (const memory of [one, other, ...large, refused]) memory.free();
  let message = "";
  try {
    gathering(() => {
      wait(x, results[0], 8);
      throw new Error("stopped");
    });
  } catch (error) {
    ({ message } = error as Error);
  }
  assertEquals([message, await first(results[0])], ["stopped", 9]);
  assertEquals(gpu().queue.gathering, null);
});

Deno.test("later: launches that run before another one, and make the cache of dispatches full, leave that one its parameters", async () => {
  await init();
  const x = tensor(Array(64).fill(1)), [y, z] = [zeros([64]), zeros([64])], { queue } = gpu();
  now(x, y, 0); // memory that may be written
  queue.forget();
  now(y, z, 100);
  for (let f = 1; f < 8192; f++) now(x, y, f / 8192); // the cache is full
  gathering(() => {
    wait(x, y, 7); // 8
    now(y, z, 100); // 801
  });
  assertEquals([await first(y), await first(z)], [8, 801]);
});

Deno.test("later: what uses a whole block comes after the launches that use its slots", async () => {
  await init();
  const { pool } = gpu(), whole = pool.take(512), { slots: [one, other] } = new FlatBlock(pool, whole, [256, 256]);
  const x = tensor(Array(64).fill(1)), [y, z] = [zeros([64]), zeros([64])];
  const on = (x: Memory, y: Memory, f: number) =>
    later({ kernel: scaled, params: [f], workgroups: 2 }, { x, y }, () => {});
  gathering(() => {
    on(x.memory, one, 4); // 5
    scaled.run({ x: whole, y: y.memory }, { f: 2 }, 2); // 11
    on(one, z.memory, 3); // 16
    scaled.run({ x: x.memory, y: whole }, { f: 0 }, 2);
  });
  assertEquals([await first(y), await first(z)], [11, 16]);
  let again: Memory | undefined;
  gathering(() => {
    on(x.memory, one, 6);
    for (const slot of [one, other]) slot.free();
    again = pool.take(512);
    assertEquals(again, whole);
    scaled.run({ x: x.memory, y: again }, { f: 8 }, 2);
  });
  scaled.run({ x: again!, y: y.memory }, { f: 1 }, 2);
  assertEquals(await first(y), 10);
  again!.free();
});

Deno.test("later: data from the host that moves out of its place stays there until the launches that read it have run", async () => {
  await init();
  const x = tensor(Array(64).fill(1)), y = zeros([64]), { queue } = gpu();
  gathering(() => {
    wait(x, y, 4); // 5
    x.assign(zeros([64])); // now it may be written, and its place is free after the next submit
    queue.submit();
    tensor(Array(64).fill(9)).dispose();
  });
  assertEquals([await first(y), await first(x)], [5, 0]);
});

Deno.test("later: launches with other workgroup variables do not share a dispatch: together they might need more than the device has", async () => {
  await init();
  const wider = defineKernel({ ...scaled.spec, name: "wider", head: scaled.spec.head!.replace(", 32>", ", 64>") });
  const x = tensor(Array(64).fill(1)), results = [2, 3, 4].map(() => zeros([64]));
  const dispatches = gathering(() => {
    results.forEach((y, i) =>
      later({ kernel: i < 2 ? scaled : wider, params: [i], workgroups: 2 }, { x: x.memory, y: y.memory }, () => {})
    );
  });
  assertEquals([dispatches, ...await Promise.all(results.map(first))], [2, 1, 2, 3]);
});
