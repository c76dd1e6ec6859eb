/** Writes new keys or values into a cache. The position is data, not a parameter, so that every token has the same launch. */
import type { Element } from "./elementwise.ts";
import { variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

const kernel = variants((element: Element) => ({
  name: "cache write",
  buffers: { x: `read ${element}`, position: "read u32", cache: `write ${element}` },
  params: { size: "u32", fresh: "u32", length: "u32", depth: "u32" },
  main: `if (thread >= params.size) { return; }
  let d = thread % params.depth;
  let t = thread / params.depth % params.fresh + position[0];
  let head = thread / (params.depth * params.fresh);
  if (t < params.length) { cache[(head * params.length + t) * params.depth + d] = x[thread]; }`,
}));

/** cache[h, position + t, :] = x[h, t, :] with x [heads, fresh, depth] and cache [heads, length, depth]. */
export function cacheWrite(
  x: Memory,
  position: Memory,
  cache: Memory,
  element: Element,
  sizes: { heads: number; fresh: number; length: number; depth: number },
): void {
  const { heads, fresh, length, depth } = sizes, size = heads * fresh * depth;
  kernel(element).run({ x, position, cache }, { size, fresh, length, depth }, Math.ceil(size / 256));
}
