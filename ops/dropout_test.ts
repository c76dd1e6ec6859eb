import { assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import { dropout, init, manualSeed, ones, rand, Scope } from "@limbeck/limbeck";

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
