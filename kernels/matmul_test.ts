import { assert, assertEquals } from "@std/assert";
import { init, tensor, zeros } from "@limbeck/limbeck";
import { gpu } from "./gpu/gpu.ts";
import type { Memory } from "./gpu/memory.ts";
import { matmul, type Product } from "./matmul.ts";

const N = 4, SIZE = 64; // all matrices are parts of 64 small numbers, so that every sum is exact
const numbers = (scale: number) => Array.from({ length: SIZE }, (_, i) => scale * ((i * 7) % 11 - 5));
const [A, B, C, MORE] = [1, 0.5, 3, 2].map(numbers);

type Change = (product: Product, memories: { c16: Memory; more: Memory; room: Memory }) => Partial<Product>;

/** The product of two 4×4 matrices, of which `change` changes one thing. */
function made(change: Change) {
  const a = tensor(A),
    b = tensor(B),
    c = tensor(C),
    c16 = tensor(C, { dtype: gpu().info.f16 ? "f16" : "f32" }),
    more = tensor(MORE);
  const room = zeros([SIZE]), f32 = { element: "f32", batch: 0, row: 8, column: 1 } as const;
  const product: Product = {
    a: { memory: a.memory, ...f32 },
    b: { memory: b.memory, ...f32 },
    c: { memory: c.storage.writable(), element: "f32" },
    rows: N,
    columns: N,
    depth: N,
  };
  const memories = { c16: c16.storage.writable(), more: more.memory, room: room.memory };
  return { product: { ...product, ...change(product, memories) }, c, c16, room };
}

/** What C and `room`, for all that is written besides, must hold afterwards. */
function wanted({ a, b, c, rows, columns, depth, batches = 1, epilogue: e = {} }: Product): [number[], number[]] {
  const result = [...C], room = Array(SIZE).fill(0);
  for (let batch = 0; batch < batches; batch++) {
    for (let i = 0; i < rows; i++) {
      const from = (a.offset ?? 0) + batch * a.batch + i * a.row;
      if (e.sums) { for (let k = 0; k < depth; k++) room[batch * rows + i] += A[from + k * a.column]; }
      for (let j = 0; j < columns; j++) {
        const at = (c.offset ?? 0) + batch * rows * columns + i * columns + j;
        let x = e.bias ? MORE[j] : 0;
        for (let k = 0; k < depth; k++) {
          x += A[from + k * a.column] * B[(b.offset ?? 0) + batch * b.batch + k * b.row + j * b.column];
        }
        if (e.activation?.before) room[at] = x;
        if (e.activation) x = Math.max(x, 0);
        if (e.slope && MORE[at] <= 0) x = 0;
        result[at] = x + (e.plus ? MORE[at] : 0) + (e.add ? C[at] : 0);
      }
    }
  }
  return [result, room];
}

const CHANGES: Record<string, Change> = {
  rows: () => ({ rows: 3 }),
  columns: () => ({ columns: 3 }),
  depth: () => ({ depth: 3 }),
  batches: () => ({ batches: 2 }),
  "A's offset": ({ a }) => ({ a: { ...a, offset: 4 } }),
  "A's rows": ({ a }) => ({ a: { ...a, row: 4 } }),
  "A's columns": ({ a }) => ({ a: { ...a, column: 2 } }),
  "A's batches": ({ a }) => ({ batches: 2, a: { ...a, batch: 4 } }),
  "B's rows": ({ b }) => ({ b: { ...b, row: 4 } }),
  "B's columns": ({ b }) => ({ b: { ...b, column: 2 } }),
  "C's offset": ({ c }) => ({ c: { ...c, offset: 16 } }),
  "C's element": (_, { c16 }) => ({ c: { memory: c16, element: "f16" } }),
  bias: (_, { more }) => ({ epilogue: { bias: { memory: more, element: "f32" } } }),
  activation: () => ({ epilogue: { activation: { name: "relu", before: null } } }),
  "an activation whose argument is kept": (_, { room }) => ({
    epilogue: { activation: { name: "relu", before: room } },
  }),
  slope: (_, { more }) => ({ epilogue: { slope: { name: "relu", of: more } } }),
  residual: (_, { more }) => ({ epilogue: { plus: more } }),
  add: () => ({ epilogue: { add: true } }),
  sums: (_, { room }) => ({ epilogue: { sums: { memory: room, element: "f32" } } }),
};

Deno.test("products that differ in one thing are not taken for each other", async () => {
  await init();
  const check = async (name: string, { product, c, c16, room }: ReturnType<typeof made>) => {
    matmul(product);
    const got = product.c.element === "f16" ? c16 : c;
    assertEquals([await got.array(), await room.array()], wanted(product), name);
  };
  for (const [name, change] of Object.entries(CHANGES)) {
    if (name === "C's element" && !gpu().info.f16) continue; // the adapter has no other
    await check("plain", made(() => ({})));
    await check(name, made(change));
    assert(`${wanted(made(change).product)}` !== `${wanted(made(() => ({})).product)}` || name === "C's element", name);
  }
});
