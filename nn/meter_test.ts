import { assertEquals, assertThrows } from "@std/assert";
import { init, Meter, Scope, stats, Tape, tensor } from "@limbeck/limbeck";

Deno.test("meter: order, several names, and beyond its first capacity", async () => {
  await init();
  using _scope = new Scope();
  const before = stats().liveBytes;
  const meter = new Meter(), count = 600; // grows beyond 255 and 511
  for (let i = 0; i < count; i++) {
    meter.add("a", tensor([i]));
    if (i % 2 === 0) meter.add("b", tensor([[-i]]));
  }
  const { a, b } = await meter.read();
  assertEquals(a, Array.from({ length: count }, (_, i) => i));
  assertEquals(b, Array.from({ length: count / 2 }, (_, i) => -2 * i));
  assertEquals(Object.keys(await meter.read()), ["a", "b"]);
  meter.dispose();
  meter.dispose();
  _scope.close();
  assertEquals(stats().liveBytes, before);
});

Deno.test("meter: a read gives what came since the last", async () => {
  await init();
  using meter = new Meter();
  const add = (value: number) => {
    using _scope = new Scope();
    meter.add("loss", tensor(value));
  };
  add(1);
  add(2);
  assertEquals(await meter.read(), { loss: [1, 2] });
  assertEquals(await meter.read(), { loss: [] });
  add(3);
  // what is added while a read waits belongs to the next
  const reading = meter.read();
  add(4);
  assertEquals(await reading, { loss: [3] });
  add(5);
  assertEquals(await meter.read(), { loss: [4, 5] });
});

Deno.test("meter: reads that do not wait for each other", async () => {
  await init();
  using meter = new Meter();
  using _scope = new Scope();
  meter.add("loss", tensor(1));
  const first = meter.read();
  meter.add("loss", tensor(2));
  const second = meter.read();
  meter.add("loss", tensor(3));
  assertEquals(await Promise.all([first, second, meter.read()]), [{ loss: [1] }, { loss: [2] }, { loss: [3] }]);
});

Deno.test("meter: copies the value as it is", async () => {
  await init();
  using meter = new Meter();
  {
    using _tape = new Tape();
    const x = tensor([3], undefined, { requiresGrad: true });
    const loss = x.square().sum();
    meter.add("loss", loss);
    x.assign(tensor([5])); // later
    meter.add("x", x);
  }
  meter.add("NaN", tensor(NaN));
  assertEquals(await meter.read(), { loss: [9], x: [5], NaN: [NaN] });
});

Deno.test("meter: what it throws", async () => {
  await init();
  using meter = new Meter();
  assertThrows(
    () => meter.add("x", tensor([1, 2])),
    TypeError,
    "Meter.add: scalar must have one element, got shape [2]",
  );
  assertThrows(() => meter.add("x", tensor(new Int32Array(1))), TypeError, "Meter.add: scalar must have dtype f32");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => meter.add("x", 5 as any), TypeError, "Meter.add: scalar must be a Tensor, got 5");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => meter.add(5 as any, tensor(1)), TypeError, "Meter.add: name must be a string, got 5");
  assertEquals(await meter.read(), {}); // nothing was begun
});
