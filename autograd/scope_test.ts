import { assert, assertEquals, assertThrows } from "@std/assert";
import { init, Scope, stats, Tape, tensor } from "@limbeck/limbeck";

Deno.test("scope: closes what was made inside it", async () => {
  await init();
  const before = stats();
  const outer = new Scope(), x = tensor([1, 2]);
  const inner = new Scope(), y = x.add(1), kept = x.add(2).keep();
  inner.close();
  assert(y.closed && !x.closed && !kept.closed);
  outer.close();
  assert(x.closed && !kept.closed);
  assertThrows(() => x.add(1), TypeError, "add: a (shape [2]) was closed");
  assertEquals(await kept.array(), [3, 4]);
  kept.dispose();
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("scope: closing one closes those opened after it, and never throws", async () => {
  await init();
  const first = new Scope(), second = new Scope(), tape = new Tape(), third = new Scope();
  const x = tensor([1]);
  first.close();
  assertThrows(() => x.add(1), TypeError, "was closed with its scope, which an older scope closed; keep() it");
  assert(first.closed && second.closed && tape.closed && third.closed && x.closed);
  for (const scope of [third, tape, second, first]) scope.close();
  using _tape = new Tape(); // the closed tape is no longer open
});

Deno.test("scope: out of order, the ones opened before stay open", async () => {
  await init();
  const first = new Scope(), x = tensor([1]), second = new Scope(), third = new Scope();
  second.close();
  assert(third.closed && !first.closed && !x.closed);
  const y = tensor([2]); // made in the first again
  first.close();
  assert(y.closed);
});

Deno.test("scope: keep in a scope, used in the next", async () => {
  await init();
  const sum = (() => {
    using _scope = new Scope();
    return tensor([1, 2]).square().sum().keep();
  })();
  assertEquals(await sum.item(), 5);
  sum.dispose();
});

Deno.test("scope: an early dispose is no double free", async () => {
  await init();
  const before = stats().liveBytes;
  {
    using _scope = new Scope();
    const x = tensor([1, 2]), y = x.reshape([2, 1]);
    x.dispose();
    x.dispose();
    assertEquals(await y.array(), [[1], [2]]); // the view holds the storage
  }
  assertEquals(stats().liveBytes, before);
});
