import { assert, assertEquals, assertRejects } from "@std/assert";
import { crossEntropy, dispose, init, jsd, stats, type Tuning, zeros } from "@limbeck/limbeck";
import { remembered } from "./gpu/launch.ts";
import { choose, fittingTiles, TILES } from "./tiles.ts";
import { planRow } from "./row.ts";

const WORKS = ["one", "two"] as const;

Deno.test("init: autotune measures once an adapter, and leaves nothing behind", async () => {
  await dispose();
  try {
    localStorage.clear();
    const { tuning, limits } = await init({ autotune: true });
    assert(stats().dispatches > 0);
    assertEquals([stats().liveBytes, stats().pooledBytes, stats().peakBytes], [0, 0, 0]);
    for (const work of WORKS) {
      assert(tuning!.rows[work].threads <= limits.maxComputeInvocationsPerWorkgroup);
    }
    assert(tuning!.tiles.length > 1 && tuning!.tiles.length <= fittingTiles().length);
    assert(
      new Set(tuning!.tiles).size > 1 && tuning!.tiles.every((factor) => factor > 0 && Number.isFinite(factor)),
      `${tuning!.tiles}`,
    );

    await dispose();
    assertEquals((await init({ autotune: true })).tuning, tuning);
    assertEquals(stats().dispatches, 0); // it was kept

    // what is computed under it is right, but for some roundings of log 4096 = 8.3 (5e-7 each)
    const uniform = zeros([4, 4096]), target = zeros([4], { dtype: "i32" });
    const ce = await crossEntropy(uniform, target).item(), same = await jsd(uniform, uniform).item();
    assert(Math.abs(ce - Math.log(4096)) < 1e-6, `${ce}`);
    assertEquals(same, 0);
  } finally {
    localStorage.clear();
    await dispose();
  }
});

Deno.test("init: autotune measures nothing under a small memory limit", async () => {
  await dispose();
  try {
    localStorage.clear();
    for (const memoryLimit of [2 ** 10, 2 ** 20]) {
      assertEquals((await init({ autotune: true, memoryLimit })).tuning, null);
      assertEquals([stats().dispatches, localStorage.length], [0, 0]);
      await dispose();
    }
  } finally {
    localStorage.clear();
    await dispose();
  }
});

Deno.test("init: autotune takes numbers that were measured before, and none unless asked", async () => {
  await dispose();
  const limits = { threads: 64, quads: 4 };
  const tuning: Tuning = { rows: { one: limits, two: limits }, tiles: [2, 3] };
  try {
    assertEquals((await init({ autotune: tuning })).tuning, tuning);
    for (const work of WORKS) {
      const plans = [256, 1024, 1028].map((columns) => planRow(columns, work));
      assertEquals(plans.map(({ threads, quads, more }) => [threads, quads, more]), [
        [32, 2, false],
        [64, 4, false],
        [64, 4, true],
      ]);
    }
    await dispose();
    assertEquals((await init()).tuning, null);
  } finally {
    await dispose();
  }
});

Deno.test("tiles: the one for a product is chosen again on another device and under another tuning", async () => {
  await dispose();
  const size = { rows: 256, columns: 256, depth: 64, batches: 1, cut: false, halves: false };
  const kept = remembered<number>();
  let made = 0;
  const chosen = () => kept([], () => (made++, choose(size).tile));
  try {
    const info = await init(), tile = chosen(), limits = { threads: 64, quads: 4 };
    info.tuning = { rows: { one: limits, two: limits }, tiles: TILES.map((_, i) => i === tile ? 1e6 : 1) };
    const other = chosen();
    assert(other !== tile);
    assertEquals([chosen(), made], [other, 2]);
    info.tuning = null;
    assertEquals([chosen(), made], [tile, 3]);
    await dispose();
    await init();
    assertEquals([chosen(), made], [tile, 4]);
  } finally {
    await dispose();
  }
});

Deno.test("init: autotune refuses what is no tuning", async () => {
  await dispose();
  const limits = { threads: 64, quads: 4 }, rows = { one: limits, two: limits };
  for (
    const [autotune, message] of [
      ["yes", 'init: autotune must be true, false or a tuning, got "yes"'],
      [{ rows, tiles: 1 }, "init: autotune: tiles must be an array of numbers, got 1"],
      [{ rows, tiles: [0] }, "init: autotune: tiles must be a finite number, above 0, got 0"],
      [
        { rows: { ...rows, one: { ...limits, threads: 100 } }, tiles: [] },
        "init: autotune.rows.one: threads must be a power of two, got 100",
      ],
      [{ rows: { ...rows, three: limits }, tiles: [] }, 'init: autotune.rows: unknown option "three"'],
    ] as const
  ) {
    // deno-lint-ignore no-explicit-any
    const error = await assertRejects(() => init({ autotune: autotune as any }));
    assert(error instanceof Error && error.message.startsWith(message), `${error}`);
  }
});
