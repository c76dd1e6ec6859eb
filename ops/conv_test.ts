import { assertEquals, assertThrows } from "@std/assert";
import { arange, conv2d, init, maxPool2d, ones, Scope, Tape, type Tensor, tensor, zeros } from "@limbeck/limbeck";
import { checkOps, type OpCase } from "../testing/op.ts";
import { type Array64, at, indexed } from "../testing/reference.ts";

/** The definition, term by term. */
function convolved(x: Array64, weight: Array64, bias: Array64 | null, stride: number, padding: number): Array64 {
  const [N, C, H, W] = x.shape, [O, , h, w] = weight.shape;
  const out = (size: number, kernel: number) => Math.floor((size + 2 * padding - kernel) / stride) + 1;
  return indexed([N, O, out(H, h), out(W, w)], ([n, o, row, column]) => {
    let sum = bias ? bias.data[o] : 0;
    for (let c = 0; c < C; c++) {
      for (let i = 0; i < h; i++) {
        for (let j = 0; j < w; j++) {
          const [y, z] = [row * stride + i - padding, column * stride + j - padding];
          if (y >= 0 && y < H && z >= 0 && z < W) sum += at(x, [n, c, y, z]) * at(weight, [o, c, i, j]);
        }
      }
    }
    return sum;
  });
}

Deno.test("conv: conv2d", async () => {
  const table: [number[], number[], number, number, boolean][] = [ // x, weight, stride, padding, bias
    [[1, 1, 1, 1], [1, 1, 1, 1], 1, 0, true],
    [[1, 1, 3, 3], [1, 1, 2, 2], 1, 0, false],
    [[2, 3, 5, 4], [4, 3, 3, 3], 1, 1, true],
    [[1, 2, 7, 5], [3, 2, 3, 2], 2, 1, true], // strides that leave a rest, a window that is no square
    [[1, 2, 8, 9], [1, 2, 3, 3], 3, 0, false], // the last rows and columns are in no window
    [[1, 1, 2, 2], [2, 1, 3, 3], 1, 2, true], // a window larger than the image
    [[2, 1, 6, 6], [2, 1, 1, 1], 4, 0, true], // pixels between windows
    [[1, 1, 3, 3], [1, 1, 2, 2], 5, 3, true], // a window in the padding alone
    [[3, 5, 9, 9], [2, 5, 4, 4], 2, 2, false],
    [[0, 1, 3, 3], [1, 1, 2, 2], 1, 0, true],
  ];
  await checkOps(table.map(([x, weight, stride, padding, bias]): OpCase => ({
    name: `conv2d stride ${stride} padding ${padding}`,
    op: (x, w, b) => conv2d(x, w, b ?? null, { stride, padding }),
    reference: (x, w, b) => convolved(x, w, b ?? null, stride, padding),
    shapes: bias ? [x, weight, [weight[0]]] : [x, weight],
    samples: 24,
  })));
});

Deno.test("conv: maxPool2d", async () => {
  const table: [number[], number, number | undefined][] = [ // x, kernel, stride
    [[1, 1, 1, 1], 1, undefined],
    [[2, 3, 4, 6], 2, undefined],
    [[1, 2, 5, 7], 2, undefined], // the last row and column are in no window
    [[1, 1, 4, 4], 3, 1], // windows that overlap: gradients add up
    [[2, 2, 7, 5], 3, 2],
    [[1, 1, 5, 5], 5, 1],
    [[1, 1, 7, 8], 2, 3], // pixels between windows
  ];
  await checkOps(table.map(([shape, kernel, stride = kernel], i): OpCase => ({
    name: `maxPool2d ${kernel} stride ${stride}`,
    op: (x) => maxPool2d(x, table[i][2] === undefined ? { kernel } : { kernel, stride }),
    reference: (x) => {
      const [N, C, H, W] = x.shape, out = (size: number) => Math.floor((size - kernel) / stride) + 1;
      return indexed([N, C, out(H), out(W)], ([n, c, row, column]) => {
        let best = -Infinity;
        for (let i = 0; i < kernel; i++) {
          for (let j = 0; j < kernel; j++) best = Math.max(best, at(x, [n, c, row * stride + i, column * stride + j]));
        }
        return best;
      });
    },
    shapes: [shape],
  })));
});

Deno.test("conv: of equal elements the first gets the gradient of its window", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([[[[1, 3, 3], [3, 2, 3], [0, 3, 3]]]], { requiresGrad: true });
  const y = maxPool2d(x, { kernel: 2, stride: 1 });
  assertEquals(await y.array(), [[[[3, 3], [3, 3]]]]);
  y.backward(tensor([[[[1, 10], [100, 1000]]]]));
  assertEquals(await x.grad!.array(), [[[[0, 11, 0], [100, 0, 1000], [0, 0, 0]]]]);
});

Deno.test("conv: infinities and NaN in a pool", async () => {
  await init();
  using _scope = new Scope();
  const pool = (values: number[]) => maxPool2d(tensor(values, [1, 1, 2, 2]), { kernel: 2 }).item();
  assertEquals(await pool([-Infinity, -Infinity, -Infinity, -Infinity]), -Infinity);
  assertEquals(await pool([-1, -Infinity, Infinity, 2]), Infinity);
  assertEquals(await pool([1, NaN, 3, Infinity]), NaN); // as in PyTorch
});

Deno.test("conv: what they throw", async () => {
  await init();
  using _scope = new Scope();
  const x = zeros([1, 2, 4, 4]), weight = zeros([3, 2, 3, 3]);
  assertThrows(() => conv2d(zeros([2, 4, 4]), weight), TypeError, "conv2d: x must have shape [images, channels,");
  assertThrows(() => conv2d(x, zeros([3, 2, 3])), TypeError, "conv2d: weight must have shape [outs, 2, height, width]");
  assertThrows(() => conv2d(x, zeros([3, 1, 3, 3])), TypeError, "conv2d: x must have shape [images, 1,");
  assertThrows(() => conv2d(x, weight, zeros([2])), TypeError, "conv2d: bias must have shape [3], got [2]");
  assertThrows(() => conv2d(x, zeros([3, 2, 5, 3])), RangeError, "conv2d: ");
  assertThrows(() => conv2d(x, weight, null, { stride: 0 }), RangeError, "conv2d: stride must be");
  assertThrows(() => conv2d(x, weight, null, { padding: 0.5 }), RangeError, "conv2d: padding must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => conv2d(x, weight, null, { dilation: 2 } as any), TypeError, "conv2d: unknown option");
  assertThrows(() => conv2d(x, zeros([3, 2, 1, 0])), RangeError, "conv2d: weight must fit the padded image");
  assertThrows(() => maxPool2d(x, { kernel: 5 }), RangeError, "maxPool2d: kernel must fit the image, got 5");
  assertThrows(() => maxPool2d(zeros([1, 1, 4, 3]), { kernel: 4 }), RangeError, "maxPool2d: kernel must fit the image");
  assertThrows(() => maxPool2d(x, { kernel: 2, stride: 0 }), RangeError, "maxPool2d: stride must be");
  assertThrows(() => maxPool2d(zeros([4, 4]), { kernel: 2 }), TypeError, "maxPool2d: x must have shape");
});

Deno.test("conv2d, maxPool2d: more iterations than a software driver runs in one thread", async () => {
  await init();
  using _scope = new Scope();
  assertEquals(await conv2d(ones([1, 12_000, 1, 1]), ones([1, 12_000, 1, 1])).item(), 12_000);
  assertEquals(await maxPool2d(arange(256 * 256).reshape([1, 1, 256, 256]), { kernel: 256 }).item(), 256 * 256 - 1);
  const gradient = async (leaf: Tensor, op: (leaf: Tensor) => Tensor) => {
    leaf.requiresGrad = true;
    using _tape = new Tape();
    op(leaf).sum().backward();
    return await leaf.grad!.data();
  };
  assertEquals([...await gradient(ones([1, 1, 1, 1]), (x) => conv2d(x, ones([12_000, 1, 1, 1])))], [12_000]);
  assertEquals([...await gradient(ones([1, 1, 1, 1]), (w) => conv2d(ones([1, 1, 2100, 2100]), w))], [2100 ** 2]);
  assertEquals([...await gradient(ones([1, 1, 1, 1]), (w) => conv2d(ones([7000, 1, 24, 24]), w))], [7000 * 24 ** 2]);
});

Deno.test("conv2d: a window that a software adapter would not finish is an error", async () => {
  const { isSoftware } = await init(), shape = [1, 1, 1, 66_000];
  if (isSoftware) {
    assertThrows(() => conv2d(ones(shape), ones(shape)), RangeError, "takes windows of at most about 60000");
  } else assertEquals(await conv2d(ones(shape), ones(shape)).item(), 66_000);
});

Deno.test("maxPool2d: windows so large that software drivers take several launches", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor(Float32Array.from({ length: 251 * 251 }, (_, i) => i === 252 ? 5 : 0), [1, 1, 251, 251], {
    requiresGrad: true,
  });
  const y = maxPool2d(x, { kernel: 250, stride: 1 });
  assertEquals([...await y.data()], [5, 5, 5, 5]);
  y.sum().backward();
  assertEquals((await x.grad!.data())[252], 4);
});
