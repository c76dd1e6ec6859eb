/** A growing list of scalars on the GPU. It contains its own length, so that `append` has the same parameters in every step. */
import { defineKernel, type Kernel } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

const appendKernel: Kernel = defineKernel({
  name: "meter",
  buffers: { x: "read u32", list: "write u32" },
  params: { capacity: "u32" },
  workgroup: 1,
  main: `let count = list[0];
  if (group == 0u && count < params.capacity) {
    list[1u + count] = x[0];
    list[0] = count + 1u;
  }`,
});

/** Appends x's first element to list = [count, value, value, …], as bits. */
export function append(x: Memory, list: Memory, capacity: number): void {
  appendKernel.run({ x, list }, { capacity }, 1);
}
