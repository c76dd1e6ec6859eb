import { assertEquals } from "@std/assert";
import { defineKernel, init, type KernelSpec, stats, tensor, zeros } from "@limbeck/limbeck";
import { pairOf } from "./pair.ts";

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
  const launch = (spec: KernelSpec) => ({
    kernel: defineKernel(spec),
    params: { by: -5, size: 128 },
    workgroups: 128 / spec.workgroup!,
  });
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
  assertEquals(pairOf(first, launch({ ...shifted, workgroup: 128 })), null);
});
