/** Finds NaN and infinity. */
import type { Element } from "./elementwise.ts";
import { variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

// by the bits of the exponent, since some compilers make `x != x` false for NaN
const kernel = variants((element: Element) => ({
  name: "find non-finite",
  buffers: { x: `read ${element}`, found: "write u32" },
  params: { size: "u32", check: "u32" },
  main: `if (thread < params.size) {
    let bits = bitcast<u32>(f32(x[thread])) & 0x7fffffffu;
    if (bits >= 0x7f800000u && found[0] == 0u) { found[0] = params.check; } // all threads write the same
  }`,
}));

/** found[0] = check (> 0) if it was 0 and x holds a NaN or an infinity. */
export function findNonFinite(x: Memory, element: Element, size: number, found: Memory, check: number): void {
  kernel(element).run({ x, found }, { size, check }, Math.ceil(size / 256));
}
