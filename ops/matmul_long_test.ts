import { assert } from "@std/assert";
import { init, linear } from "@limbeck/limbeck";
import { fittingTiles, matmulTuning } from "../kernels/matmul.ts";
import { checkOps, type OpCase } from "../testing/op.ts";
import { elementwise, product, transposed } from "../testing/reference.ts";

// every tile is a kernel of its own, half a second each to compile on a CPU
Deno.test("matmul: every tile, by elements and by vec4s, forward and backward", async () => {
  await init();
  const shapes = [[33, 20, 40], [68, 132, 36]]; // rows, columns, depth
  const cases = shapes.map(([m, n, k]): OpCase => ({
    name: "linear",
    op: (x, w, b) => linear(x, w, b),
    reference: (x, w, b) => elementwise((y, c) => y + c)(product(x, transposed(w)), b),
    shapes: [[m, k], [n, k], [n]],
    value: 2e-6,
    gradient: 5e-6,
    samples: 12,
  }));
  const tiles = fittingTiles();
  assert(tiles.length >= 6);
  try {
    for (const tile of tiles) {
      for (const scalar of [false, true]) {
        Object.assign(matmulTuning, { tile, scalar });
        await checkOps(cases);
      }
    }
  } finally {
    Object.assign(matmulTuning, { tile: null, scalar: null });
  }
});
