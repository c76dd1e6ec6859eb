import { assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import { dropout, init, manualSeed, ones, rand, Scope, Tape } from "@limbeck/limbeck";

Deno.test("dropout: p is ½ by default; 0 changes nothing and draws nothing; others are refused", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(1);
  const x = ones([1000]), values = new Set(await dropout(x).data());
  assertEquals([...values].sort(), [0, 2]);
  const drawn = async (fn: () => void) => {
    manualSeed(1);
    fn();
    return await rand([4]).data();
  };
  assertEquals(await drawn(() => dropout(x, { p: 0 })), await drawn(() => {}));
  assertNotEquals(await drawn(() => dropout(x)), await drawn(() => {}));
  assertThrows(() => dropout(x, { p: 2 }), RangeError, "dropout: p must be");
});

Deno.test("dropout: another mask for another op, step and seed", async () => {
  await init();
  const x = ones([64]), masks: string[] = [];
  for (const seed of [1, 2]) {
    manualSeed(seed);
    for (let step = 0; step < 2; step++) {
      using _tape = new Tape();
      for (let op = 0; op < 2; op++) masks.push((await dropout(x, { p: 0.5 }).data()).join());
    }
  }
  assertEquals(new Set(masks).size, 8);
  x.dispose();
});
