import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  concat,
  expand,
  init,
  optim,
  permute,
  record,
  reshape,
  Scope,
  slice,
  stack,
  Tape,
  tensor,
  transpose,
  tril,
  triu,
  zeros,
} from "@limbeck/limbeck";
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
  const large = 2 ** 24 + 1; // no float32
  assertEquals(await expand(tensor(new Int32Array([1, large]), [2, 1]), [2, -1, 2]).array(), [
    [[1, 1], [large, large]],
    [[1, 1], [large, large]],
  ]);
  assertThrows(() => expand(tensor([1, 2]), [-1, 2]), RangeError, "expand: shape[0] must be an integer, at least 0");
});

Deno.test("shape: slice", async () => {
  const cases: [number[], [number, number][], [number, number][]][] = [ // shape, pairs, the same from the front and complete
    [[5], [[1, 3]], [[1, 3]]],
    [[5], [[-3, -1]], [[2, 4]]],
    [[5], [[0, 5]], [[0, 5]]],
    [[5], [[2, 2]], [[2, 2]]], // empty
    [[5], [[5, 5]], [[5, 5]]],
    [[5], [[-5, 5]], [[0, 5]]],
    [[3, 4], [], [[0, 3], [0, 4]]],
    [[3, 4], [[1, -1]], [[1, 2], [0, 4]]],
    [[3, 4], [[0, 3], [-1, 4]], [[0, 3], [3, 4]]],
    [[3, 4], [[1, 1], [0, 2]], [[1, 1], [0, 2]]],
    [[2, 3, 2, 5], [[1, 2], [0, -1], [0, 2], [2, -1]], [[1, 2], [0, 2], [0, 2], [2, 4]]],
    [[300, 3], [[17, 290], [1, 2]], [[17, 290], [1, 2]]],
    [[], [], []],
  ];
  await checkOps(cases.map(([shape, pairs, ranges]) => ({
    name: `slice ${JSON.stringify(pairs)}`,
    op: (x) => slice(x, pairs),
    reference: (x) => indexed(ranges.map(([from, to]) => to - from), (i) => at(x, i.map((n, d) => n + ranges[d][0]))),
    shapes: [shape],
  })));
});

Deno.test("shape: a list may change between the op and its backward pass", async () => {
  await init();
  using _scope = new Scope();
  const leaves = [tensor([1], { requiresGrad: true }), tensor([2, 3], { requiresGrad: true })],
    factor = tensor([5, 6, 7]);
  using _tape = new Tape();
  const xs = [...leaves], inputs = [...leaves], [a, b] = leaves;
  const y = concat(xs).mul(factor);
  xs.reverse().pop();
  const own = record({ op: "own", inputs, output: zeros([]), backward: () => [a.mul(10), b.mul(10)] }); // 5·‖x‖²
  inputs.length = 0;
  y.sum().add(own).backward();
  assertEquals([await a.grad!.array(), await b.grad!.array()], [[15], [26, 37]]);
});

Deno.test("shape: concat", async () => {
  const cases: [number, number[][]][] = [ // dim, shapes
    [0, [[3]]],
    [0, [[2], [3]]],
    [0, [[2], [0], [3]]],
    [0, [[2, 3], [1, 3], [4, 3]]],
    [1, [[2, 3], [2, 1]]],
    [-1, [[2, 2, 1], [2, 2, 5]]],
    [-2, [[2, 1, 3], [2, 4, 3], [2, 2, 3]]],
    [1, [[0, 2], [0, 3]]],
  ];
  await checkOps(cases.map(([dim, shapes]) => {
    const along = dim < 0 ? dim + shapes[0].length : dim;
    return {
      name: `concat along ${dim}`,
      op: (...xs) => concat(xs, dim),
      reference: (...xs) =>
        indexed(shapes[0].map((n, d) => d === along ? shapes.reduce((sum, s) => sum + s[d], 0) : n), (i) => {
          const index = [...i];
          for (const x of xs) {
            if (index[along] < x.shape[along]) return at(x, index);
            index[along] -= x.shape[along];
          }
          return NaN;
        }),
      shapes,
    };
  }));
});

Deno.test("shape: stack", async () => {
  const cases: [number, number, number[]][] = [[0, 1, []], [0, 3, []], [0, 2, [3]], [1, 2, [3]], [-1, 3, [2, 3]], [
    -2,
    2,
    [2, 3],
  ]]; // dim, how many, of which shape
  await checkOps(cases.map(([dim, count, shape]) => {
    const place = dim < 0 ? dim + shape.length + 1 : dim;
    return {
      name: `stack along ${dim}`,
      op: (...xs) => stack(xs, dim),
      reference: (...xs) =>
        indexed(
          [...shape.slice(0, place), count, ...shape.slice(place)],
          (i) => at(xs[i[place]], i.filter((_, d) => d !== place)),
        ),
      shapes: Array.from({ length: count }, () => shape),
    };
  }));
});

Deno.test("shape: triu and tril", async () => {
  const shapes = [[1, 1], [3, 3], [2, 5], [5, 2], [2, 3, 4], [0, 3]];
  await checkOps(shapes.flatMap((shape) =>
    [-2, -1, 0, 1, 5].flatMap((diagonal) =>
      [
        {
          name: `triu ${diagonal}`,
          op: (x) => triu(x, diagonal),
          reference: (x) => indexed(shape, (i) => i.at(-1)! - i.at(-2)! >= diagonal ? at(x, i) : 0),
          shapes: [shape],
        },
        {
          name: `tril ${diagonal}`,
          op: (x) => tril(x, diagonal),
          reference: (x) => indexed(shape, (i) => i.at(-1)! - i.at(-2)! <= diagonal ? at(x, i) : 0),
          shapes: [shape],
        },
      ] satisfies OpCase[]
    )
  ));
  using _scope = new Scope();
  // what is cut off is gone, also where a product with 0 would leave NaN
  assertEquals(await triu(tensor([[1, Infinity], [NaN, 2]])).array(), [[1, Infinity], [0, 2]]);
});

Deno.test("shape: the same tensor twice, and gradients only where they are wanted", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([1, 2], { requiresGrad: true }), fixed = tensor([5]);
  const y = concat([x, fixed, x]);
  assertEquals(await y.array(), [1, 2, 5, 1, 2]);
  y.backward(tensor([1, 10, 100, 1000, 10000]));
  assertEquals(await x.grad!.array(), [1001, 10010]);
  assertEquals(fixed.grad, null);
});

Deno.test("shape: integers are moved too", async () => {
  await init();
  const x = tensor(new Int32Array([1, 2, -3, 2 ** 24 + 1, 2 ** 30 + 1, -(2 ** 31)]), [2, 3]);
  // exact: an element must not pass through f32, which has 24 bits
  assertEquals(await x.transpose(0, 1).array(), [[1, 2 ** 24 + 1], [2, 2 ** 30 + 1], [-3, -(2 ** 31)]]);
  assertEquals((await x.reshape([6]).array() as number[])[3], 2 ** 24 + 1);
  assertEquals(await slice(x, [[0, 2], [-2, 2]]).array(), [[2], [2 ** 30 + 1]]);
  assertEquals(await tril(x, 1).array(), [[1, 2, 0], [2 ** 24 + 1, 2 ** 30 + 1, -(2 ** 31)]]);
  const u = tensor(new Uint32Array([2 ** 32 - 1, 2 ** 24 + 1]));
  assertEquals(await triu(stack([u, u])).array(), [[2 ** 32 - 1, 2 ** 24 + 1], [0, 2 ** 24 + 1]]);
  assertEquals(await concat([u, slice(u, [[1, 2]])]).array(), [2 ** 32 - 1, 2 ** 24 + 1, 2 ** 24 + 1]);
  assertEquals(await stack([u, u], 1).array(), [[2 ** 32 - 1, 2 ** 32 - 1], [2 ** 24 + 1, 2 ** 24 + 1]]);
});

Deno.test("shape: what they throw", async () => {
  await init();
  const x = zeros([2, 3]);
  assertThrows(() => reshape(x, [4]), TypeError, "reshape: shape [4] does not hold the 6 elements of [2, 3]");
  assertThrows(() => reshape(x, [-1, -1]), TypeError, "reshape: shape [-1, -1]");
  assertThrows(() => reshape(x, [-1, 4]), TypeError, "reshape: shape [-1, 4]");
  assertThrows(() => reshape(zeros([0]), [0, -1]), TypeError, "reshape: shape [0, -1]"); // -1 could be any size
  assertThrows(() => permute(x, [0]), RangeError, "permute: order must name each of the 2 dimensions once");
  assertThrows(() => permute(x, [0, 0]), RangeError, "permute: order");
  assertThrows(() => permute(x, [0, 1, 0]), RangeError, "permute: order must name each of the 2 dimensions once");
  assertThrows(() => permute(x, [0, 2]), RangeError, "permute: order[1] must be");
  assertThrows(() => transpose(x, 0, 2), RangeError, "transpose: b must be");
  assertThrows(() => expand(x, [3]), TypeError, "expand: x of shape [2, 3] does not broadcast to [3]");
  assertThrows(() => expand(x, [4, 3]), TypeError, "expand: shapes [2, 3] and [4, 3] do not broadcast");
  assertThrows(() => slice(x, [[0, 3]]), RangeError, "slice: pairs[0][1] must be an integer, at least -2, at most 2");
  assertThrows(() => slice(x, [[0, 2], [-4, 3]]), RangeError, "slice: pairs[1][0] must be");
  assertThrows(() => slice(x, [[0, 1.5]]), RangeError, "slice: pairs[0][1] must be an integer");
  assertThrows(() => slice(x, [[1, 0]]), RangeError, "slice: pairs[0] must not end before it starts");
  assertThrows(() => slice(x, [[0, 1], [0, 1], [0, 1]]), TypeError, "slice: pairs must be at most 2 pairs");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => slice(x, [0, 1] as any), TypeError, "slice: pairs must be at most 2 pairs");
  const integers = zeros([2, 3], { dtype: "i32" });
  assertThrows(() => concat([]), TypeError, "concat: xs must be an array of at least one tensor");
  assertThrows(() => concat([x, integers]), TypeError, "concat: xs[1] must have dtype f32, got i32");
  assertThrows(() => concat([x, zeros([2, 2])]), TypeError, "concat: xs[1] must have shape [2, 3], got [2, 2]");
  assertThrows(() => concat([x, zeros([6])], 1), TypeError, "concat: xs[1] must have shape [2, 3], got [6]");
  assertThrows(() => concat([x], 2), RangeError, "concat: dim must be");
  assertThrows(() => stack([]), TypeError, "stack: xs must be an array of at least one tensor");
  assertThrows(() => stack([x, zeros([3, 2])]), TypeError, "stack: xs[1] must have shape [2, 3], got [3, 2]");
  assertThrows(() => stack([x], 3), RangeError, "stack: dim must be");
  assertThrows(() => triu(zeros([3])), TypeError, "triu: x must have at least 2 dimensions");
  assertThrows(() => tril(x, 0.5), RangeError, "tril: diagonal must be an integer");
  // deno-lint-ignore no-explicit-any
  const reshaped = (shape: unknown) => () => x.reshape(shape as any);
  for (const shape of [[-1, 2n], [6, Symbol("s")], [-1, 4], [NaN]]) {
    assertThrows(reshaped(shape), TypeError, "reshape: shape [");
  }
  assertThrows(() => x.permute(new Array(2)), TypeError, "permute: order[0] must be a number, got undefined");
});

Deno.test("shape: a view's gradient reaches the tensor behind it", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([1, 2, 3, 4], { requiresGrad: true });
  const y = x.reshape([2, 2]);
  y.mul(tensor([[1, 2], [3, 4]])).sum().add(y.reshape([4]).square().sum()).backward();
  assertEquals(await x.grad!.array(), [3, 6, 9, 12]);
});

Deno.test("assign: from a tensor in the same buffer, and from a constant to a result", async () => {
  await init();
  using _tape = new Tape();
  const a = tensor([1, 2], { requiresGrad: true }), b = tensor([3, 4], { requiresGrad: true });
  const optimizer = new optim.SGD([a, b]); // puts both into one buffer
  a.assign(b);
  assertEquals([await a.array(), await b.array()], [[3, 4], [3, 4]]);
  const h = a.mul(2);
  h.assign(tensor([1, 1]));
  assertEquals([h.requiresGrad, h.record], [false, null]);
  const z = tensor([5, 6], { requiresGrad: true }), g = a.mul(2);
  g.assign(z.mul(3));
  g.sum().backward();
  assertEquals([a.grad, await z.grad!.array()], [null, [3, 3]]);
  optimizer.dispose();
});

Deno.test("shapes: at most 12 dimensions, and no −0", async () => {
  await init();
  using _scope = new Scope();
  const most = zeros(new Array(12).fill(1));
  assertThrows(() => stack([most]), RangeError, "stack: a tensor has at most 12");
  assertThrows(() => most.reshape(new Array(13).fill(1)), RangeError, "at most 12");
  assert(Object.is(zeros([0]).reshape([-0]).shape[0], 0));
  assert(Object.is(zeros([2]).slice([[0, -0]]).shape[0], 0));
});
