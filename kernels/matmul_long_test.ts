import { assertEquals } from "@std/assert";
import { full, init, ones, Scope, tensor } from "@limbeck/limbeck";
import { overrides } from "./gpu/tuning.ts";
import { matmul } from "./matmul.ts";

Deno.test("matmul: whatever the offsets, strides and pieces, element by element as in vec4s, in several tiles", async () => {
  await init();
  using _scope = new Scope();
  const whole = (i: number) => (i * 7) % 11 - 5; // sums of products of small integers are exact in any order
  const x = tensor(Float32Array.from({ length: 2000 }, (_, i) => whole(i))),
    changes = [
      {},
      ...[{ aOffset: 3 }, { bOffset: 3 }, { cOffset: 3 }, { rows: 6 }, { columns: 6 }, { depth: 6 }],
      { aRow: 8, aColumn: 1, depth: 6 },
      { bRow: 1, bColumn: 8, depth: 6 },
      { aRow: 8, aColumn: 1, bRow: 1, bColumn: 8, depth: 5 },
      { depth: 100, cOffset: 4, add: true },
      { aRow: 200, aColumn: 1, depth: 200, rows: 4 },
    ];
  const usual = { rows: 8, columns: 8, depth: 8, aOffset: 0, aRow: 1, aColumn: 8, bOffset: 0, bRow: 8, bColumn: 1 };
  try {
    for (const change of changes) {
      const c = { ...usual, cOffset: 0, add: false, ...change };
      const run = async () => {
        const y = full([200], 0.25), sums = full([c.rows], 0.5);
        matmul({
          a: { memory: x.memory, element: "f32", offset: c.aOffset, batch: 0, row: c.aRow, column: c.aColumn },
          b: { memory: x.memory, element: "f32", offset: c.bOffset, batch: 0, row: c.bRow, column: c.bColumn },
          c: { memory: y.memory, element: "f32", offset: c.cOffset },
          rows: c.rows,
          columns: c.columns,
          depth: c.depth,
          epilogue: { add: c.add, sums: { memory: sums.memory, element: "f32" } },
        });
        return [await y.data(), await sums.data()];
      };
      const y = new Float32Array(200).fill(0.25), sums = new Float32Array(c.rows).fill(c.add ? 0.5 : 0);
      for (let i = 0; i < c.rows; i++) {
        for (let k = 0; k < c.depth; k++) sums[i] += whole(c.aOffset + i * c.aRow + k * c.aColumn);
        for (let j = 0; j < c.columns; j++) {
          let sum = c.add ? 0.25 : 0;
          for (let k = 0; k < c.depth; k++) {
            sum += whole(c.aOffset + i * c.aRow + k * c.aColumn) * whole(c.bOffset + k * c.bRow + j * c.bColumn);
          }
          y[c.cOffset + i * c.columns + j] = sum;
        }
      }
      for (const scalar of [null, false]) {
        for (const pieces of [null, 2]) {
          for (const tile of scalar === false ? [3, 4, 7] : [null]) {
            Object.assign(overrides, { scalar, pieces, tile });
            assertEquals(await run(), [y, sums], JSON.stringify({ ...change, scalar, pieces, tile }));
          }
        }
      }
    }
  } finally {
    Object.assign(overrides, { scalar: null, pieces: null, tile: null });
  }
});

Deno.test("matmul: f16 in slices, of any depth", async () => {
  const { f16 } = await init();
  if (!f16) return; // no f16 on this adapter
  using _scope = new Scope();
  try {
    Object.assign(overrides, { scalar: false, tile: 7, pieces: 1 });
    for (const depth of [8, 40, 128, 136, 152, 160, 256]) {
      const [a, b] = [[8, depth], [depth, 8]].map((shape) => ones(shape, { dtype: "f16" }));
      assertEquals(new Set(await a.matmul(b).data()), new Set([depth]));
    }
  } finally {
    Object.assign(overrides, { scalar: null, tile: null, pieces: null });
  }
});
