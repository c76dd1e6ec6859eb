import { assertEquals } from "@std/assert";
import { defineKernel, init, type KernelSpec, stats, tensor, zeros } from "@limbeck/limbeck";
import { runTogether } from "./kernel.ts";

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

Deno.test("runTogether: two kernels with the same names in one launch, and two launches where one is not possible", async () => {
  await init();
  const values = Array.from({ length: 128 }, (_, i) => i), wide = { ...reversed, workgroup: 128, name: "wide" };
  wide.head = wide.head!.replace("64", "128");
  wide.main = wide.main.replaceAll("63u", "127u").replaceAll("64u", "128u");
  for (
    const [a, b, sameBuffer, launches] of [[reversed, shifted, false, 1], [wide, shifted, false, 2], [
      reversed,
      reversed,
      true,
      2,
    ]] as const
  ) {
    const x = tensor(values), y = zeros([128]), z = zeros([128], { dtype: sameBuffer ? "f32" : "i32" });
    const i = tensor(Int32Array.from(values));
    const before = stats().dispatches;
    runTogether(
      { kernel: defineKernel(a), buffers: { x: x.memory, y: y.memory }, params: { size: 128 }, workgroups: 2 },
      {
        kernel: defineKernel(b),
        buffers: sameBuffer ? { x: y.memory, y: z.memory } : { y: i.memory, x: z.memory },
        params: { by: -5, size: 128 },
        workgroups: 2,
      },
    );
    assertEquals(stats().dispatches - before, launches, `${a.name}, ${b.name}`);
    const size = a.workgroup!, once = values.map((v) => 2 * (Math.floor(v / size) * size + size - 1 - v % size));
    assertEquals(await y.array(), once);
    assertEquals(await z.array(), sameBuffer ? values.map((v) => 4 * v) : values.map((v) => v - 5));
  }
});
