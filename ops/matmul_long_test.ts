import { assert, assertEquals } from "@std/assert";
import { init, linear, matmul, stats, Tape, tensor } from "@limbeck/limbeck";
import { fittingTiles } from "../kernels/tiles.ts";
import { overrides } from "../kernels/gpu/tuning.ts";
import { normals } from "../testing/loss_reference.ts";
import { checkOps, type OpCase } from "../testing/op.ts";
import { elementwise, product, transposed } from "../testing/reference.ts";
import { type Layer, perceptron } from "./matmul.ts";

const linearCase = (m: number, n: number, k: number): OpCase => ({
  name: "linear",
  op: (x, w, b) => linear(x, w, b),
  reference: (x, w, b) => elementwise((y, c) => y + c)(product(x, transposed(w)), b),
  shapes: [[m, k], [n, k], [n]],
  value: 2e-6,
  gradient: 5e-6,
  samples: 12,
});

// every tile is a kernel of its own, half a second each to compile on a CPU
Deno.test("matmul: every tile, by elements and by vec4s, forward and backward", async () => {
  await init();
  const shapes = [[33, 20, 40], [68, 132, 36]]; // rows, columns, depth
  const cases = shapes.map(([m, n, k]) => linearCase(m, n, k));
  const tiles = fittingTiles();
  assert(tiles.length >= 6);
  try {
    for (const tile of tiles) {
      for (const scalar of [false, true]) {
        Object.assign(overrides, { tile, scalar });
        await checkOps(cases);
      }
    }
  } finally {
    Object.assign(overrides, { tile: null, scalar: null });
  }
});

Deno.test("matmul: pieces along k, set and added, in every layout", async () => {
  await init();
  const cases: [number, OpCase][] = [false, true].flatMap((transposeA) =>
    [false, true].flatMap((transposeB) =>
      [2, 8].map((pieces): [number, OpCase] => [pieces, {
        name: `matmul of ${pieces} pieces`,
        op: (x, y) => matmul(x, y, { transposeA, transposeB }),
        reference: (x, y) => product(transposeA ? transposed(x) : x, transposeB ? transposed(y) : y),
        shapes: [transposeA ? [64, 20] : [20, 64], transposeB ? [32, 64] : [64, 32]],
        value: 2e-6,
        gradient: 5e-6,
        samples: 12,
      }])
    )
  );
  // the last piece is shorter than the others, and ends inside a slab
  cases.push([3, {
    name: "matmul of pieces of 32, 32 and 20",
    op: (x, y) => matmul(x, y),
    reference: product,
    shapes: [[20, 84], [84, 36]],
    value: 2e-6,
    gradient: 5e-6,
    samples: 12,
  }]);
  // with a bias, whose gradient comes from the product of the weight's
  cases.push([4, { ...linearCase(20, 32, 64), name: "linear of 4 pieces" }], [4, linearCase(64, 64, 16)]);
  try {
    for (const [pieces, one] of cases) {
      overrides.pieces = pieces;
      await checkOps([one]);
    }
  } finally {
    overrides.pieces = null;
  }
});

Deno.test("matmul: both gradients in one launch are those of two, bit for bit", async () => {
  const { f16 } = await init();
  const gradients = async (dtype: "f32" | "f16", widths: number[], shared: boolean) => {
    overrides.shared = shared;
    using _tape = new Tape();
    const make = (shape: number[], seed: number) => {
      const values = normals(shape.reduce((a, b) => a * b), 1, seed);
      return tensor(dtype === "f16" ? Float16Array.from(values) : values, shape);
    };
    const [a, b, c] = widths, x = make([37, a], 1), upstream = make([37, c], 2);
    const layers: Layer[] = [
      { weight: make([b, a], 3), bias: make([b], 4), activation: "gelu" },
      { weight: make([c, b], 5), bias: make([c], 6) },
    ];
    const other = make([c, 9], 7), leaves = [x, other, ...layers.flatMap(({ weight, bias }) => [weight, bias!])];
    for (const leaf of leaves) leaf.requiresGrad = true;
    const y = matmul(perceptron(x, layers, upstream), other);
    const before = stats().dispatches;
    y.backward(make([37, 9], 8));
    const dispatches = stats().dispatches - before, all: number[][] = [];
    for (const leaf of leaves) {
      all.push(Array.from(await leaf.grad!.data(), Number));
      leaf.dispose();
    }
    return { dispatches, all };
  };
  try {
    const cases = [[true, 1, "f32"], [false, 2, "f32"], [false, 1, "f16"]] as const;
    for (const [scalar, pieces, dtype] of cases) {
      if (dtype === "f16" && !f16) continue;
      Object.assign(overrides, { scalar, pieces, tile: 6 });
      const widths = scalar ? [5, 7, 6] : [16, 24, 8];
      const two = await gradients(dtype, widths, false), one = await gradients(dtype, widths, true);
      assertEquals(one.all, two.all, `${dtype}, by ${scalar ? "elements" : "vec4s"}, ${pieces} pieces`);
      assertEquals(one.dispatches, two.dispatches - 3);
    }
  } finally {
    Object.assign(overrides, { scalar: null, pieces: null, tile: null, shared: null });
  }
});
