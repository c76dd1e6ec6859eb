import { assertEquals, assertThrows } from "@std/assert";
import { expand, init, permute, reshape, Tape, tensor, transpose, zeros } from "@limbeck/limbeck";
import { checkOps, type OpCase } from "../testing/op.ts";
import { at, indexed, permuted } from "../testing/reference.ts";

Deno.test("shape: reshape", async () => {
  const pairs: [number[], number[], number[]][] = [ // from, asked for, result
    [[2, 3], [3, 2], [3, 2]],
    [[2, 3], [-1], [6]],
    [[6], [2, -1, 1], [2, 3, 1]],
    [[1], [], []],
    [[], [1, 1], [1, 1]],
    [[0, 3], [3, -1], [3, 0]],
    [[0], [0, -1], [0, 0]],
  ];
  await checkOps(pairs.map(([from, to, shape]) => ({
    name: `reshape to [${to}]`,
    op: (x) => reshape(x, to),
    reference: (x) => ({ shape, data: x.data }),
    shapes: [from],
  })));
});

Deno.test("shape: permute and transpose", async () => {
  const permutations: [number[], number[]][] = [
    [[2, 3], [1, 0]],
    [[2, 3], [0, 1]], // stays
    [[7, 1, 5], [2, 0, 1]],
    [[2, 3, 4], [-1, 0, -2]],
    [[2, 3, 2, 2], [0, 2, 1, 3]],
    [[255, 17], [1, 0]],
    [[0, 3], [1, 0]],
    [[5], [0]],
    [[], []],
  ];
  await checkOps([
    ...permutations.map(([shape, order]): OpCase => ({
      name: `permute ${order}`,
      op: (x) => permute(x, order),
      reference: (x) => permuted(x, order.map((d) => d < 0 ? d + order.length : d)),
      shapes: [shape],
    })),
    {
      name: "transpose",
      op: (x) => transpose(x, -3, 2),
      reference: (x) => permuted(x, [2, 1, 0]),
      shapes: [[2, 3, 4]],
    },
  ]);
});

Deno.test("shape: expand", async () => {
  const pairs = [[[3], [2, 3]], [[2, 1], [2, 5]], [[], [2, 2]], [[1, 3, 1], [2, 3, 4]], [[3], [3]], [[1], [0]]];
  await checkOps(pairs.map(([from, shape]) => ({
    name: `expand to [${shape}]`,
    op: (x) => expand(x, shape),
    reference: (x) => indexed(shape, (i) => at(x, i)),
    shapes: [from],
  })));
});

Deno.test("shape: integers are moved too", async () => {
  await init();
  const x = tensor(new Int32Array([1, 2, -3, 2 ** 24 + 1, 2 ** 30 + 1, -(2 ** 31)]), [2, 3]);
  // exact: an element must not pass through f32, which has 24 bits
  assertEquals(await x.transpose(0, 1).array(), [[1, 2 ** 24 + 1], [2, 2 ** 30 + 1], [-3, -(2 ** 31)]]);
  assertEquals((await x.reshape([6]).array() as number[])[3], 2 ** 24 + 1);
});

Deno.test("shape: what they throw", async () => {
  await init();
  const x = zeros([2, 3]);
  assertThrows(() => reshape(x, [4]), TypeError, "reshape: shape [4] does not hold the 6 elements of [2,3]");
  assertThrows(() => reshape(x, [-1, -1]), TypeError, "reshape: shape [-1,-1]");
  assertThrows(() => reshape(x, [-1, 4]), TypeError, "reshape: shape [-1,4]");
  assertThrows(() => permute(x, [0]), RangeError, "permute: order must name each of the 2 dimensions once");
  assertThrows(() => permute(x, [0, 0]), RangeError, "permute: order");
  assertThrows(() => permute(x, [0, 2]), RangeError, "permute: order[1] must be");
  assertThrows(() => transpose(x, 0, 2), RangeError, "transpose: b must be");
  assertThrows(() => expand(x, [3]), TypeError, "expand: x of shape [2,3] does not broadcast to [3]");
  assertThrows(() => expand(x, [4, 3]), TypeError, "expand: shapes [2,3] and [4,3] do not broadcast");
});

Deno.test("shape: a view's gradient reaches the tensor behind it", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([1, 2, 3, 4], { requiresGrad: true });
  const y = x.reshape([2, 2]);
  y.mul(tensor([[1, 2], [3, 4]])).sum().add(y.reshape([4]).square().sum()).backward();
  assertEquals(await x.grad!.array(), [3, 6, 9, 12]);
});
