import { assert, assertEquals, assertNotEquals, assertThrows } from "@std/assert";
import { init, nn, stats, Tape, type Tensor } from "@limbeck/limbeck";

const ROWS = 10;
/** Row r is [r, r + ½] and has label r. */
const data = () => ({
  x: { data: Float32Array.from({ length: 2 * ROWS }, (_, i) => Math.floor(i / 2) + (i % 2) / 2), shape: [ROWS, 2] },
  y: { data: Int32Array.from({ length: ROWS }, (_, i) => i), shape: [ROWS] },
});

/** The labels in the order of one epoch; x must go with y. */
async function order(options: nn.BatchOptions): Promise<number[]> {
  const labels: number[] = [];
  for (const { x, y, size } of nn.batches(data(), options)) {
    assertEquals([x.shape, y.shape, y.dtype], [[size, 2], [size], "i32"]);
    const rows = Array.from(await y.data());
    assertEquals(Array.from(await x.data()), rows.flatMap((r) => [r, r + 0.5]));
    labels.push(...rows);
  }
  return labels;
}

const all = Array.from({ length: ROWS }, (_, i) => i);

Deno.test("batches: every row once, in order", async () => {
  await init();
  assertEquals(await order({ batchSize: 4 }), all);
  assertEquals(await order({ batchSize: 4, dropLast: true }), all.slice(0, 8));
  assertEquals(await order({ batchSize: 5 }), all);
  assertEquals(await order({ batchSize: 20 }), all);
  assertEquals(await order({ batchSize: 20, dropLast: true }), []);
  assertEquals(await order({ batchSize: 1 }), all);
});

Deno.test("batches: shuffled by the seed, every row once", async () => {
  await init();
  const options = { batchSize: 3, shuffle: true };
  const first = await order({ ...options, seed: 1 });
  assertEquals(first.toSorted((a, b) => a - b), all);
  assertNotEquals(first, all);
  assertEquals(await order({ ...options, seed: 1 }), first);
  assertNotEquals(await order({ ...options, seed: 2 }), first);
});

Deno.test("batches: a shuffle puts every row at every place", async () => {
  await init();
  const places = new Set<string>();
  for (let seed = 0; seed < 60; seed++) {
    let place = 0;
    for (
      const { y } of nn.batches({ y: { data: Int32Array.of(0, 1, 2), shape: [3] } }, {
        batchSize: 1,
        shuffle: true,
        seed,
      })
    ) {
      places.add(`${await y.item()} at ${place++}`);
    }
  }
  assertEquals(places.size, 9); // by chance one of the nine is missing in 9·(2/3)⁶⁰ = 2e-10 of all seeds
});

Deno.test("batches: a batch is freed when the next is taken, and live bytes stay flat", async () => {
  await init();
  const before = stats().liveBytes, live = new Set<number>();
  let last: Tensor | undefined;
  for (let epoch = 0; epoch < 3; epoch++) {
    for (const { x } of nn.batches(data(), { batchSize: 2 })) {
      assert(!x.closed && (last === undefined || last.closed));
      using _tape = new Tape(); // closes without the batch
      x.add(1);
      live.add(stats().liveBytes - before);
      last = x;
    }
  }
  assert(last!.closed);
  assert(live.size <= 2, `${[...live]}`); // with and without a next one
  assertEquals(stats().liveBytes, before);
});

Deno.test("batches: what is kept stays", async () => {
  await init();
  const before = stats().liveTensors, kept: Tensor[] = [];
  for (const { y } of nn.batches(data(), { batchSize: 4, dropLast: true })) kept.push(y.keep());
  assertEquals(await Promise.all(kept.map((y) => y.array())), [all.slice(0, 4), all.slice(4, 8)]);
  assertEquals(stats().liveTensors, before + 2);
  for (const y of kept) y.dispose();
});

Deno.test("batches: leaving the loop frees everything", async () => {
  await init();
  const before = stats();
  for (const _ of nn.batches(data(), { batchSize: 2 })) break;
  assertThrows(() => {
    for (const _ of nn.batches(data(), { batchSize: 2 })) throw new Error("enough");
  });
  assertEquals([stats().liveBytes, stats().liveTensors], [before.liveBytes, before.liveTensors]);
});

Deno.test("batches: what it throws", async () => {
  await init();
  const first = (columns: Record<string, nn.Column>, options: nn.BatchOptions) => nn.batches(columns, options).next();
  assertThrows(() => first(data(), { batchSize: 0 }), RangeError, "batches: batchSize must be");
  assertThrows(() => first({}, { batchSize: 1 }), TypeError, "batches: columns must have at least one field");
  const { x } = data(), y = { data: new Int32Array(9), shape: [9] };
  assertThrows(() => first({ x, y }, { batchSize: 1 }), TypeError, "batches: y must hold 10 rows");
  assertThrows(
    () => first({ x: { ...x, shape: [10, 3] } }, { batchSize: 1 }),
    TypeError,
    "batches: x must hold 10 rows",
  );
  // deno-lint-ignore no-explicit-any
  const wrong = (columns: any) => () => first(columns, { batchSize: 1 });
  assertThrows(wrong(null), TypeError, "batches: columns must be an object of columns, got null");
  assertThrows(wrong({ x, size: x }), RangeError, "batches: no column can be named size");
  assertThrows(wrong({ x: 5 }), TypeError, "batches: x must be a column, got 5");
  assertThrows(
    wrong({ x: { data: new Float64Array(1), shape: [1] } }),
    TypeError,
    "batches: x.data must be a Float32Array, Float16Array, Int32Array or Uint32Array, got a Float64Array of 1",
  );
  assertThrows(
    wrong({ x: { data: new Float32Array(2), shape: [-1, -2] } }),
    RangeError,
    "batches: x: shape[0] must be",
  );
  assertThrows(wrong({ x: { data: new Float32Array(1), shape: [] } }), TypeError, "batches: x.shape must start");
  assertThrows(() => nn.batches(data(), { batchSize: 0 }), RangeError, "batches: batchSize must be"); // before the loop
});
