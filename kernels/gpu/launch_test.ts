import { init } from "@limbeck/limbeck";
import { assertEquals } from "@std/assert";
import { gpu } from "./gpu.ts";
import { type Key, remembered } from "./launch.ts";
import { overrides } from "./tuning.ts";

await init();

Deno.test("remembered: each key has its own value, in any order", () => {
  const cached = remembered<string>(), made: string[] = [];
  const value = (key: Key) =>
    cached(key, () => {
      made.push(JSON.stringify(key));
      return JSON.stringify(key);
    });
  const keys: Key[] = [
    ["a", 1, true],
    ["a", 1, false],
    ["a", 1],
    ["a", undefined, true],
    ["a", 1, true, 0.5],
    ["b"],
    [],
  ];
  const orders = [keys, keys, keys.toReversed(), [...keys, ...keys.toReversed()], keys.toSorted()];
  for (const order of orders) for (const key of order) assertEquals(value([...key]), JSON.stringify(key));
  assertEquals(made, keys.map((key) => JSON.stringify(key))); // each once
});

Deno.test("remembered: an override bypasses the cache, and neither reads nor fills it", () => {
  const cached = remembered<number>();
  let made = 0;
  const value = () => cached(["x"], () => ++made);
  try {
    assertEquals([value(), value()], [1, 1]);
    overrides.tile = 1;
    assertEquals([value(), value()], [2, 3]);
  } finally {
    overrides.tile = null;
  }
  assertEquals(value(), 1);
});

Deno.test("remembered: keys that never repeat do not collect", () => {
  const cached = remembered<number>();
  let made = 0;
  for (let i = 0; i < 9000; i++) cached([i], () => ++made);
  assertEquals(made, 9000);
  cached([0], () => ++made);
  assertEquals(made, 9001); // forgotten meanwhile
  cached([8999], () => ++made);
  assertEquals(made, 9001);
});

Deno.test("remembered: another tuning finds nothing of the earlier one", () => {
  const cached = remembered<number>(), { info } = gpu(), limits = { threads: 32, quads: 0 };
  let made = 0;
  const value = () => cached(["x"], () => ++made);
  try {
    assertEquals([value(), value()], [1, 1]);
    info.tuning = { rows: { one: limits, two: limits }, tiles: [] };
    assertEquals([value(), value()], [2, 2]);
  } finally {
    info.tuning = null;
  }
});
