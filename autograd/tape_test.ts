import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  checkpoint,
  crossEntropy,
  defineKernel,
  embedding,
  forwardKl,
  full,
  init,
  layerNorm,
  linear,
  nn,
  noGrad,
  ones,
  optim,
  record,
  Scope,
  stats,
  sum,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";

const leaf = (values: number[]) => tensor(values, { requiresGrad: true });

Deno.test("tape: what recorded ops made dies with it", async () => {
  await init();
  const x = leaf([1, 2]).keep();
  const tape = new Tape();
  const y = x.mul(2), free = zeros([2]), kept = x.mul(3).keep();
  y.sum().backward();
  tape.close();
  assert(tape.closed && y.closed && free.closed);
  assertThrows(() => y.add(1), Error, "was closed with its tape; keep() it if it must live longer");
  await assertMessage(() => y.data(), "data: this tensor of shape [2] was closed with its tape; keep() it");
  assertEquals(await kept.array(), [3, 6]);
  assertEquals(await x.grad!.array(), [2, 2]); // .grad belongs to the leaf
  for (const t of [x, kept]) t.dispose();
});

async function assertMessage(fn: () => Promise<unknown>, message: string): Promise<void> {
  const thrown = await fn().then(() => new Error("nothing was thrown"), (e) => e);
  assertStringIncludes(thrown.message, message);
}

Deno.test("tape: what a caller holds stays readable after backward", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), y = x.exp(), loss = y.sum();
  loss.backward();
  // e¹ and e² to the few ulp of exp
  (await y.array() as number[]).forEach((v, i) => assertAlmostEquals(v, Math.E ** (i + 1), 1e-5));
  assertAlmostEquals(await loss.item(), Math.E + Math.E ** 2, 1e-5);
});

Deno.test("tape: one at a time, and the error says where the first was opened", async () => {
  await init();
  using _tape = new Tape();
  const { message } = assertThrows(() => new Tape(), Error, "one tape is open already");
  assertStringIncludes(message, "tape_test.ts");
});

Deno.test("tape: opening a second one changes nothing", async () => {
  await init();
  {
    using _tape = new Tape();
    const x = leaf([3]);
    assertThrows(() => new Tape(), Error, "Tape: one tape is open already");
    x.square().sum().backward();
    assertEquals(await x.grad!.array(), [6]);
  }
  using _next = new Tape(); // and afterwards the place is free
});

Deno.test("tape: backward walks once", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), shared = x.square(), first = shared.sum(), second = shared.mean();
  first.backward();
  assertThrows(() => first.backward(), Error, "sum was walked before");
  assertThrows(() => second.backward(), Error, "square was walked before");
  assertEquals(await x.grad!.array(), [2, 4]);
});

Deno.test("tape: backward needs a tape that recorded the loss", async () => {
  await init();
  const x = leaf([1, 2]).keep();
  const outside = x.square().sum(); // nothing is recorded without a tape
  assertEquals(outside.requiresGrad, false);
  assertThrows(() => outside.backward(), Error, "no open tape recorded this tensor");
  const tape = new Tape(), kept = x.square().sum().keep();
  tape.close();
  const { message } = assertThrows(() => kept.backward(), Error, "no open tape recorded this tensor");
  assertStringIncludes(message, "that of sum (shape []) was closed");
  {
    using _tape = new Tape();
    assertThrows(() => kept.backward(), Error, "no open tape recorded this tensor");
    assertThrows(() => x.backward(tensor([1, 1])), Error, "no open tape recorded this tensor"); // a leaf
    assertThrows(() => tensor([1, 2]).sum().backward(), Error, "no open tape recorded this tensor");
  }
  for (const t of [x, outside, kept]) t.dispose();
});

Deno.test("tape: dOutput must fit", async () => {
  const { f16 } = await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), y = x.square();
  assertThrows(() => y.backward(), TypeError, "a tensor of shape [2] needs dOutput of that shape");
  assertThrows(() => y.backward(tensor([1])), TypeError, "backward: dOutput must have shape [2], got [1]");
  assertThrows(() => y.backward(tensor([[1, 1]])), TypeError, "backward: dOutput must have shape [2], got [1, 2]");
  assertThrows(() => y.backward(tensor(new Int32Array(2))), TypeError, "backward: dOutput must have dtype");
  const half = f16 ? tensor([1, 1], { dtype: "f16" }) : null;
  if (half) assertThrows(() => y.backward(half), TypeError, "backward: dOutput must have dtype f32, got f16");
  y.backward(tensor([1, 10])); // none of these walked anything
  assertEquals(await x.grad!.array(), [2, 40]);
});

Deno.test("tape: an in-place change after use is found", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), w = leaf([3, 4]), loss = x.mul(w).sum();
  w.assign(tensor([5, 6]));
  assertThrows(() => loss.backward(), Error, "an input of mul (shape [2]) was changed in place after it was used");
  assertEquals([x.grad, w.grad], [null, null]);
  // a view shares its storage, so a change through it is one too
  const y = leaf([1, 2]), square = y.square();
  y.detach().assign(tensor([0, 0]));
  assertThrows(() => square.sum().backward(), Error, "changed in place");
  // a kernel of one's own writes without telling
  const set = defineKernel({ name: "set", buffers: { x: "write f32" }, main: "x[0] = 9.0;" });
  const v = zeros([1], { requiresGrad: true }), saved = v.square();
  set.run({ x: v.memory }, {}, 1);
  assertThrows(() => saved.sum().backward(), Error, "changed in place");
  // what a loss reads once more
  const weight = ones([2]),
    rows = crossEntropy(leaf([1, 2]), tensor(Int32Array.of(0), []), { weight, reduction: "none" });
  weight.assign(zeros([2]));
  assertThrows(() => rows.backward(), Error, "an input of crossEntropy (shape [2]) was changed in place");
  // an optimizer that takes a parameter moves it, which changes nothing
  const moved = leaf([1, 2]), cubed = moved.mul(moved.square()).sum();
  using _optimizer = new optim.SGD([moved], { lr: 1 });
  cubed.backward();
  assertEquals(await moved.grad!.array(), [3, 12]);
  // what no backward reads may change
  const z = leaf([1, 2]), sums = z.add(1);
  z.assign(tensor([7, 7]));
  sums.sum().backward();
  assertEquals(await z.grad!.array(), [1, 1]);
});

Deno.test("tape: a result that was overwritten passes its gradient to what stands there", async () => {
  await init();
  using _tape = new Tape();
  const [w, v] = [leaf([1, 2]), leaf([3, 4])], y = w.mul(2), before = y.sum();
  y.assign(v);
  before.add(y.mul(5).sum()).backward();
  assertEquals([await w.grad!.array(), await v.grad!.array()], [[2, 2], [5, 5]]);
  const shared = w.mul(2), view = shared.reshape([2, 1]);
  for (const [x, y] of [[shared, v], [view, v.reshape([2, 1])]]) {
    assertThrows(() => x.assign(y), Error, "assign: x, the result");
  }
  const z = w.mul(2).assign(tensor([6, 7])); // a constant now
  assertEquals(z.requiresGrad, false);
  const same = noGrad(() => w.mul(2)), parameter = leaf([0, 0]).assign(v.mul(2)); // neither has a record
  assertEquals([same.assign(v).requiresGrad, parameter.record], [false, null]);
  const unrecorded = w.mul(3);
  noGrad(() => void unrecorded.assign(v)); // changes numbers, not the history
  unrecorded.sum().backward();
  assertEquals(await w.grad!.array(), [5, 5]);
  const u = leaf([1, 2]), again = u.mul(9);
  again.assign(u).assign(again.add(u)).square().sum().backward(); // (2u)²
  assertEquals([await again.array(), await u.grad!.array()], [[2, 4], [8, 16]]);
});

Deno.test("tape: gradients add up over backward calls and tapes", async () => {
  await init();
  const x = leaf([1, 2]).keep();
  for (let step = 0; step < 2; step++) {
    using _tape = new Tape();
    x.square().sum().backward();
    x.mul(10).sum().backward();
  }
  assertEquals(await x.grad!.array(), [24, 28]);
  x.dispose();
});

Deno.test("tape: tensors that are used more than once", async () => {
  await init();
  using _tape = new Tape();
  const gradient = (f: (x: Tensor) => Tensor) => {
    const x = leaf([1, 2]);
    f(x).sum().backward();
    return x.grad!.array();
  };
  assertEquals(await gradient((x) => x.add(x)), [2, 2]);
  assertEquals(await gradient((x) => x.add(x).add(x)), [3, 3]);
  assertEquals(await gradient((x) => x.mul(x).mul(x)), [3, 12]);
  assertEquals(await gradient((x) => x.sub(x)), [0, 0]);
  const residual = (x: Tensor) => x.add(x.square());
  assertEquals(await gradient((x) => residual(residual(x))), [15, 65]); // (1 + 2x)(1 + 2(x + x²))
  assertEquals(await gradient((x) => x.reshape([2, 1]).add(x.reshape([1, 2]))), [4, 4]);
  assertEquals(await gradient((x) => x.reshape([1, 2]).reshape([2]).add(x).mul(x)), [4, 8]);
  assertEquals(
    await gradient((x) => {
      const y = x.mul(1);
      return y.add(y.reshape([2])).add(y.neg()).add(y);
    }),
    [2, 2],
  );
});

Deno.test("tape: a leaf's gradient is not the memory of one that still waits", async () => {
  await init();
  using _tape = new Tape();
  const gradient = (f: (x: Tensor) => Tensor) => {
    const x = leaf([1, 2]);
    f(x).sum().backward();
    return x.grad!.array();
  };
  // the sum gives the leaf and a result one gradient; the product's other factor adds to the leaf's before the result's is walked
  const product = (sum: (x: Tensor, y: Tensor) => Tensor) => (x: Tensor) => {
    const twice = x.mul(2), thrice = x.mul(3);
    return sum(x, twice).mul(thrice); // 9x²
  };
  assertEquals(await gradient(product((x, y) => x.add(y))), [18, 36]);
  assertEquals(await gradient(product((x, y) => y.add(x))), [18, 36]);
  const three = (x: Tensor, y: Tensor) => { // a rule that gives what it hides
    const hidden = [tensor([3, 3]).mul(1)], output = noGrad(() => x.add(y));
    return record({ op: "three", inputs: [x, y], output, hidden, backward: () => [hidden[0], hidden[0]] });
  };
  assertEquals(await gradient(product(three)), [18, 27]); // 3 + 2·3 + 9x
  const same = (x: Tensor) => { // a rule that gives a new gradient to one result twice
    const y = x.mul(2), output = noGrad(() => y.add(y));
    const backward = (dOut: Tensor) => {
      const d = dOut.mul(1);
      return [d, d];
    };
    return record({ op: "same", inputs: [y, y], output, backward });
  };
  assertEquals(await gradient(same), [4, 4]);
});

Deno.test("tape: a gradient is its leaf's unless it is kept", async () => {
  await init();
  using _scope = new Scope();
  const x = leaf([1, 2]), other = leaf([1, 2]), before = stats().liveTensors;
  const step = () => {
    using _tape = new Tape();
    x.square().sum().backward();
    return x.grad!;
  };
  for (let i = 0; i < 3; i++) {
    step();
    x.grad = null;
  }
  assertEquals(stats().liveTensors, before, "null in its place frees it");
  step().dispose();
  assertEquals(x.grad, null);
  assertEquals(await step().array(), [2, 4]);
  const same = x.grad!;
  x.grad = same;
  assert(!same.closed, "in its own place it stays");
  const kept = x.grad!.keep(), mine = tensor([7, 7]).keep();
  x.grad = mine;
  x.grad = null;
  assertEquals([await kept.array(), await mine.array()], [[2, 4], [7, 7]], "these are the caller's");
  const shared = other.grad = step();
  x.grad = shared;
  other.dispose();
  assertEquals(await x.grad!.array(), [2, 4]);
  x.dispose();
  assert(shared.closed && !kept.closed && !mine.closed);
  kept.dispose();
  mine.dispose();
});

Deno.test("tape: a gradient that is set by hand is its leaf's, not the scope's in which it was computed", async () => {
  await init();
  const x = leaf([1, 2]).keep(), other = leaf([1, 2]).keep(), before = stats();
  for (let i = 0; i < 2; i++) {
    using _tape = new Tape();
    x.square().sum().backward();
    noGrad(() => {
      x.grad = x.grad!.mul(0.5);
    });
    x.grad = x.grad!.reshape([2]); // a view, and one that a scope would free
  }
  assertEquals(await x.grad!.array(), [1.5, 3]); // ((2, 4)/2 + (2, 4))/2
  other.grad = x.grad;
  x.grad = null;
  assertEquals(await other.grad!.array(), [1.5, 3], "each of two leaves has its own");
  other.grad = null;
  {
    using _tape = new Tape();
    x.grad = x.mul(3); // recorded
  }
  assertEquals(await x.grad!.array(), [3, 6]);
  x.grad = tensor([5, 6]); // made where no scope is open
  x.grad = tensor([7, 8]);
  const last = x.grad!;
  x.grad = null;
  assert(last.closed);
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
  assertThrows(
    () => x.grad = last,
    TypeError,
    "grad: the value (shape [2]) was closed by dispose(); keep() it if it must live longer",
  );
  x.grad = x; // leads to itself
  x.dispose();
  other.dispose();
});

Deno.test("tape: leaves that share one gradient keep their own", async () => {
  await init();
  const a = leaf([1, 2]).keep(), b = leaf([3, 4]).keep();
  for (let step = 0; step < 2; step++) { // the second adds in place
    using _tape = new Tape();
    a.add(b).sum().backward();
    b.mul(2).sum().backward();
  }
  assertEquals([await a.grad!.array(), await b.grad!.array()], [[2, 2], [6, 6]]);
  a.grad = b.grad = null;
  using _tape = new Tape();
  const output = noGrad(() => a.add(a).add(b)); // one gradient for all three, the first of which adds in place
  record({ op: "three", inputs: [a, a, b], output, backward: (d) => [d, d, d] }).sum().backward();
  assertEquals([await a.grad!.array(), await b.grad!.array()], [[2, 2], [1, 1]]);
  for (const t of [a, b]) t.dispose();
});

Deno.test("tape: dOutput stays as it was", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), dOutput = tensor([1, 2]);
  x.add(1).backward(dOutput);
  x.add(1).backward(dOutput); // would add in place
  assertEquals(await dOutput.array(), [1, 2]);
  assertEquals(await x.grad!.array(), [2, 4]);
  const v = leaf([0, 0]);
  x.add(v).backward(x.grad!); // which grows meanwhile
  assertEquals(await v.grad!.array(), [2, 4]);
  assertEquals(await x.grad!.array(), [4, 8]);
  const grad = x.grad = tensor([1, 2]).keep();
  for (const own of [grad, grad.detach(), grad.reshape([2])]) {
    x.grad.assign(dOutput);
    x.add(x.mul(2)).backward(own);
    assertEquals(await x.grad.array(), [4, 8]); // (1 + 1 + 2)·dOutput
  }
  grad.dispose();
});

Deno.test("tape: two losses on the same logits", async () => {
  await init();
  using _tape = new Tape();
  const values = [[1, 2, 0], [0, -1, 3]],
    target = tensor(new Int32Array([2, 0])),
    teacher = tensor([[0, 1, 2], [2, 1, 0]]);
  const losses = [(x: Tensor) => crossEntropy(x, target), (x: Tensor) => forwardKl(x, teacher).mul(0.5)];
  const gradient = async (...of: ((x: Tensor) => Tensor)[]) => {
    const logits = tensor(values, { requiresGrad: true });
    of.map((loss) => loss(logits)).reduce((a, b) => a.add(b)).backward();
    return await logits.grad!.data() as Float32Array;
  };
  const [first, second, both] = [await gradient(losses[0]), await gradient(losses[1]), await gradient(...losses)];
  assert(first.some((g) => g !== 0) && second.some((g) => g !== 0));
  assertEquals(Array.from(both), Array.from(first, (g, i) => Math.fround(g + second[i])));
  // walked one after the other they add up as well
  const logits = tensor(values, { requiresGrad: true });
  const each = losses.map((loss) => loss(logits));
  for (const loss of each) loss.backward();
  assertEquals(await logits.grad!.data(), both);
});

Deno.test("tape: only what needs a gradient is recorded", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1]), constant = tensor([2]);
  assertEquals(constant.mul(3).requiresGrad, false);
  assertEquals(x.mul(constant).requiresGrad, true);
  assertEquals(x.detach().mul(constant).requiresGrad, false);
  x.mul(constant).sum().backward();
  assertEquals(constant.grad, null);
});

Deno.test("tape: a leaf that is gone takes no gradient", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), w = leaf([3, 4]), loss = x.mul(w).sum();
  w.dispose(); // what the tape saved of it stays
  loss.backward();
  assertEquals(await x.grad!.array(), [3, 4]);
});

Deno.test("tape: a leaf that was frozen before backward takes no gradient", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), w = leaf([3, 4]), loss = x.mul(w).sum();
  w.requiresGrad = false;
  loss.backward();
  assertEquals([await x.grad!.array(), w.grad], [[3, 4], null]);
});

Deno.test("tape: what it saved of a result stays when the caller disposes of it", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), square = x.square(), loss = square.mul(square).sum();
  square.dispose();
  loss.backward();
  assertEquals(await x.grad!.array(), [4, 32]);
  const [first, second] = [x.square().sum(), x.square().sum()];
  x.dispose();
  first.backward();
  assertThrows(() => x.add(1), TypeError, "was closed", "what another record still saves is closed to the caller");
  second.backward();
});

Deno.test("tape: gradients pass through results that were disposed of", async () => {
  await init();
  const ops: [string, (h: Tensor) => Tensor][] = [
    ["add", (h) => ones([3, 2]).add(h)],
    ["expand", (h) => h.expand([3, 2])],
    ["linear's bias", (h) => linear(ones([3, 2]), ones([2, 2]), h)],
    ["layerNorm's bias", (h) => layerNorm(ones([3, 2]), ones([2]), h)],
    ["embedding's weight", (h) => embedding(h.reshape([1, 2]), tensor(new Int32Array(3)))],
  ];
  for (const [name, op] of ops) {
    using _tape = new Tape();
    const w = leaf([1, 2]), h = w.mul(1), y = op(h);
    h.dispose();
    y.sum().backward();
    assertEquals(await w.grad!.array(), [3, 3], name);
  }
  using _tape = new Tape();
  const v = tensor([[1, 2], [3, 4]], { requiresGrad: true }), gone = leaf([1, 2]), y = v.add(gone);
  gone.dispose();
  y.sum().backward();
  assertEquals(await v.grad!.array(), [[1, 1], [1, 1]]);
});

/** x·2, whose backward does what the test wants. */
function custom(x: Tensor, backward: (dY: Tensor) => Tensor): Tensor {
  const y = noGrad(() => x.mul(2));
  return record({ op: "custom", inputs: [x], output: y, backward: (dY) => [backward(dY)] });
}

Deno.test("tape: a gradient that a rule keeps for itself stays as it was", async () => {
  await init();
  using _scope = new Scope();
  const x = leaf([1, 2]), mask = full([2], 3), seen = full([2], 5);
  for (let step = 0; step < 3; step++) {
    using _tape = new Tape();
    custom(x, () => mask).sum().backward();
  }
  assertEquals([await x.grad!.array(), await mask.array()], [[9, 9], [3, 3]]);
  using _tape = new Tape();
  const y = leaf([1, 2]);
  let own: Tensor | undefined;
  custom(y, () => own = seen.mul(2).keep()).sum().backward();
  custom(y, () => own!).sum().backward();
  assertEquals([await y.grad!.array(), await own!.array()], [[20, 20], [10, 10]]);
  own!.dispose();
  // nor is the 1 that backward() starts with taken for one once a rule has written to it
  const logits = tensor([[0, 0]], { requiresGrad: true }), loss = crossEntropy(logits, tensor(new Int32Array([0])));
  const twice = noGrad(() => loss.mul(2));
  const backward = (d: Tensor) => [d.assign(d.mul(2))];
  record({ op: "twice", inputs: [loss], output: twice, backward }).backward();
  assertEquals(await logits.grad!.array(), [[-1, 1]]);
});

Deno.test("record: a rule that adds the earlier gradients itself, of the same tensor twice", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), h = x.mul(1), output = noGrad(() => h.mul(3));
  const y = record({
    op: "sum of three",
    inputs: [h, h],
    output,
    backward: (dY, _wants, _gradientOf, earlier) =>
      [1, 2].map((factor, i) => {
        const own = dY.mul(factor), before = earlier(i);
        return before ? own.add(before) : own;
      }),
  });
  y.add(h.mul(10)).sum().backward();
  assertEquals(await x.grad!.array(), [13, 13]);
  // whose own part is 0: it returns the earlier one as it was
  const g = x.mul(1), none = noGrad(() => g.mul(1));
  const nothing = record({
    op: "nothing",
    inputs: [g],
    output: none,
    backward: (_dY, _wants, _of, earlier) => [earlier(0)],
  });
  nothing.add(g.mul(10)).sum().backward();
  assertEquals(await x.grad!.array(), [23, 23]);
});

Deno.test("tape: a gradient that the host wrote adds up with others", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), h = x.mul(1);
  const constant = () => custom(h, () => tensor([1, 2]));
  constant().add(constant()).sum().backward();
  assertEquals(await x.grad!.array(), [2, 4]);
});

Deno.test("record: a rule reads what it saved, also where that was closed since", async () => {
  await init();
  using _tape = new Tape();
  const cube = (x: Tensor) => {
    const output = noGrad(() => x.mul(x).mul(x));
    return record({
      op: "cube",
      inputs: [x],
      output,
      saved: [x],
      backward: (dY) => [dY.mul(x.detach().square()).mul(3)],
    });
  };
  const w = leaf([1, 2]), h = w.mul(1), y = cube(h);
  h.dispose();
  for (const use of [() => h.keep(), () => h.detach(), () => h.add(1)]) assertThrows(use, TypeError, "was closed");
  y.sum().backward();
  assertEquals(await w.grad!.array(), [3, 12]);
  const inner = new Scope(), c = tensor([2, 2]), scaled = w.mul(c);
  inner.close(); // with c, which mul saved
  cube(scaled).sum().backward();
  assertEquals(await w.grad!.array(), [27, 108]);
  const again = checkpoint((x) => cube(x).add(cube(x)), w.mul(1)).sum(); // rules inside a rule
  again.backward();
  assertEquals(await w.grad!.array(), [33, 132]);
  assertThrows(() => h.add(1), TypeError, "was closed");
});

Deno.test("tape: a throw inside a backward leaves nothing behind", async () => {
  await init();
  const x = leaf([1, 2]).keep(), before = stats().liveBytes;
  {
    using _tape = new Tape();
    const bad = custom(x, () => {
      throw new RangeError("no gradient today");
    });
    const loss = bad.add(x.square()).sum();
    assertThrows(() => loss.backward(), RangeError, "no gradient today");
    assertThrows(() => bad.sum().backward(), Error, "backward: custom was walked before");
    // other records of the same tape are walked with clean gradients
    x.grad?.dispose();
    x.grad = null;
    x.mul(3).sum().backward();
    assertEquals(await x.grad!.array(), [3, 3]);
    const y = x.mul(2);
    assert(y.requiresGrad, "recording goes on");
  }
  x.grad!.dispose();
  x.grad = null;
  assertEquals(stats().liveBytes, before);
  using _tape = new Tape();
  x.square().sum().backward();
  assertEquals(await x.grad!.array(), [2, 4]);
  x.dispose();
});

Deno.test("tape: backward inside a rule is refused, and the walk that runs goes on", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), side = leaf([3]).square(), h = x.mul(3);
  const y = custom(h, (dY) => {
    assertThrows(() => side.backward(), Error, "backward: it is running already");
    return dY.mul(2);
  });
  y.add(h).sum().backward();
  assertEquals(await x.grad!.array(), [9, 9]);
  side.backward(); // untouched
});

Deno.test("tape: gradients do not stay in records that the walk has not reached", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), y = x.mul(1);
  const bad = custom(y, () => {
    throw new Error("stop");
  });
  // y gets its part of the second use first, then the walk stops at `bad`
  assertThrows(() => bad.sum().add(y.sum()).backward(), Error, "stop");
  y.mul(5).sum().backward();
  assertEquals(await x.grad!.array(), [5, 5]);
});

Deno.test("tape: a gradient of the wrong shape is an error", async () => {
  await init();
  using _tape = new Tape();
  const message = "custom: the gradient of input 0 must have shape [2], got";
  for (const given of [tensor([1, 2, 3]), tensor([[1], [2]])]) {
    const loss = custom(leaf([1, 2]), () => given).sum();
    assertThrows(() => loss.backward(), TypeError, `${message} [${given.shape.join(", ")}]`);
  }
});

Deno.test("tape: a result that is kept holds nothing of the graph that led to it", async () => {
  await init();
  const x = leaf([1, 2]), tape = new Tape(), walked = x.square().sum().keep(), closed = x.exp().keep();
  walked.backward();
  tape.close();
  for (const y of [walked, closed]) {
    const { spec, sources, gradient } = y.record as unknown as Record<string, unknown>;
    assertEquals([spec, sources, gradient], [null, [], null]);
  }
  for (const t of [x, walked, closed]) t.dispose();
});

Deno.test("tape: a result of a closed tape takes no gradient in the next", async () => {
  await init();
  using _scope = new Scope();
  const w = leaf([1, 2]);
  const keptOf = (walk: boolean) => {
    using _tape = new Tape();
    const h = w.mul(2).keep();
    if (walk) h.sum().backward();
    return h;
  };
  for (const h of [keptOf(false), keptOf(true)]) {
    using _tape = new Tape();
    const message = "backward: the tape that recorded mul was closed; detach() its result";
    assertThrows(() => h.square().sum().backward(), Error, message);
    const x = leaf([1, 1]);
    h.detach().mul(x).sum().backward();
    assertEquals(await x.grad!.array(), [2, 4]);
    assertThrows(() => h.sum().detach().backward(), Error, "no open tape recorded this tensor");
    assertThrows(() => h.backward(tensor([1, 1])), Error, "that of mul (shape [2]) was closed");
    h.dispose();
  }
});

Deno.test("tape: what a backward rule returns must be gradients", async () => {
  await init();
  using _tape = new Tape();
  const wrong = (given: unknown) => custom(leaf([1, 2]), () => given as Tensor).sum();
  const closed = tensor([1, 2]);
  closed.dispose();
  const cases: [unknown, string][] = [
    [5, "custom: the gradient of input 0 must be a Tensor, got 5"],
    [tensor(new Int32Array(2)), "custom: the gradient of input 0 must have dtype f32, got i32"],
    [closed, "custom: the gradient of input 0 (shape [2]) was closed"],
  ];
  for (const [given, message] of cases) assertThrows(() => wrong(given).backward(), TypeError, message);
  for (const given of [undefined, 5, [], [null, tensor([1, 2])]]) {
    const x = leaf([1, 2]), y = tensor([1, 2]);
    // deno-lint-ignore no-explicit-any
    record({ op: "mine", inputs: [x], output: y, backward: () => given as any });
    assertThrows(() => y.sum().backward(), TypeError, "mine: backward must return an array with a gradient or null");
  }
  const x = leaf([1, 2]);
  const itself = () => record({ op: "mine", inputs: [x], output: x, backward: (dY) => [dY] });
  assertThrows(itself, TypeError, "record: output must not be one of the inputs");
  assertThrows(() => noGrad(itself), TypeError, "record: output must not be one of the inputs");
});

Deno.test("tape: record outside a tape frees what is hidden and returns the output", async () => {
  await init();
  const x = tensor([1]), y = tensor([1]), hidden = tensor([2]);
  assertStrictEquals(record({ op: "custom", inputs: [x], output: y, hidden: [hidden], backward: () => [null] }), y);
  assert(hidden.closed && !y.closed);
  x.dispose();
  y.dispose();
});

Deno.test("tape: backward itself is not recorded", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([2]);
  let during = true;
  custom(x, (dY) => {
    during = x.mul(dY).requiresGrad;
    return dY.mul(2);
  }).sum().backward();
  assertEquals(during, false);
  assertEquals(x.grad!.requiresGrad, false);
});

Deno.test("noGrad: records nothing and passes results on", async () => {
  await init();
  using tape = new Tape();
  const x = leaf([1, 2]);
  let inner: Tensor | undefined;
  const y = noGrad(() => {
    inner = x.mul(2);
    return inner.add(1);
  });
  assert(inner!.closed, "what is not returned is freed");
  assertEquals(y.requiresGrad, false);
  assertEquals(await y.array(), [3, 5]);
  const { list, record: { z }, n } = noGrad(() => ({ list: [x.mul(3), [x.mul(4)]], record: { z: x.mul(5) }, n: 1 }));
  assertEquals(await Promise.all([list[0], (list[1] as Tensor[])[0], z].map((t) => (t as Tensor).array())), [
    [3, 6],
    [4, 8],
    [5, 10],
  ]);
  assertEquals(n, 1);
  const kept = tensor([1]).keep(), loss = x.sum();
  assertStrictEquals(noGrad(() => kept), kept);
  noGrad(() => {
    loss.backward();
    noGrad(() => x.mul(2));
    assert(!x.mul(2).requiresGrad, "neither a backward() nor another noGrad inside it ends it");
  });
  assert(x.mul(2).requiresGrad, "afterwards recording goes on");
  tape.close();
  assert(y.closed && z.closed, "the enclosing scope owns them");
  assert(!kept.closed, "but not what was the caller's");
  kept.dispose();
});

Deno.test("noGrad: without an enclosing scope the caller owns the result", async () => {
  await init();
  const before = stats().liveTensors;
  const y = noGrad(() => tensor([1]).add(1).add(1));
  assertEquals(stats().liveTensors, before + 1);
  assertEquals(await y.array(), [3]);
  y.dispose();
});

Deno.test("noGrad: what it passes on may hold itself", async () => {
  await init();
  using _scope = new Scope();
  const list: unknown[] = [], all = { list, x: tensor([1]) };
  list.push(all, list);
  assertStrictEquals(noGrad(() => all), all);
  assertEquals(await all.x.array(), [1]);
});

Deno.test("noGrad: an async function is a TypeError, a throw restores recording", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1]);
  assertThrows(() => noGrad(async () => await x.data()), TypeError, "noGrad: fn must not be async");
  assertThrows(
    () =>
      noGrad(() => {
        throw new RangeError("mine");
      }),
    RangeError,
    "mine",
  );
  // deno-lint-ignore no-explicit-any
  assertThrows(() => noGrad(5 as any), TypeError, "noGrad: fn must be a function, got 5");
  assert(x.mul(2).requiresGrad);
});

Deno.test("tape: all bytes come back", async () => {
  await init();
  const before = stats();
  const w = leaf([1, 2, 3]).keep();
  for (let step = 0; step < 3; step++) {
    using _tape = new Tape();
    const y = w.tanh().mul(w).softmax().reshape([1, 3]);
    const extra = y.detach(), kept = y.keep();
    sum(y.add(extra).square()).backward();
    kept.dispose();
    const a = w.exp(), b = w.neg(), c = a.square();
    c.add(a.add(b)).sum().backward(); // a's gradient is b's as well when more is added to it
    w.exp(); // never walked
    const saved = [w.exp()];
    record({ op: "mine", inputs: [w], output: zeros([3]), saved, backward: () => [null] });
    saved.length = 0;
  }
  w.dispose(); // with its gradient
  const after = stats();
  assertEquals([after.liveTensors, after.liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("tape: what it records is its own, also in a scope inside it", async () => {
  await init();
  using _outer = new Scope();
  const x = leaf([1, 2]).keep(), outside = zeros([2]), tape = new Tape(), inner = new Scope();
  const y = x.mul(2), constant = tensor([3]), kept = x.mul(3).keep(), unrecorded = noGrad(() => x.mul(4));
  const loss = crossEntropy(x.detach().mul(0).add(x), tensor(Int32Array.of(0), [])); // its gradient waits beside it
  inner.close();
  assertEquals([y, constant, kept, unrecorded].map((t) => t.closed), [false, true, false, true]);
  y.sum().backward();
  assertEquals(await x.grad!.array(), [2, 2]);
  loss.backward();
  record({ op: "mine", inputs: [x], output: outside, backward: () => [null] });
  tape.close();
  assertEquals([y.closed, kept.closed, outside.closed], [true, false, false]);
  for (const t of [x, kept, outside]) t.dispose();
});

Deno.test("tape: what a record hides and the walk makes is freed in the walk", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([1, 2]), label = tensor(Int32Array.of(0), []), { liveTensors } = stats();
  crossEntropy(x.mul(2), label).backward();
  assertEquals(stats().liveTensors, liveTensors + 3); // the product, the loss and x's gradient
});

Deno.test("tape: closes a scope that was opened inside it", async () => {
  await init();
  const tape = new Tape(), scope = new Scope(), x = tensor([1]);
  tape.close();
  assert(scope.closed && x.closed);
  scope.close(); // again is allowed
});

Deno.test("record: what it throws", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([1], { requiresGrad: true }), output = tensor([2]), closed = tensor([3]);
  closed.dispose();
  const good = { op: "mine", inputs: [x], output, backward: (dY: Tensor) => [dY] };
  const cases: [unknown, string][] = [
    [null, "options must be an object, got null"],
    [{ ...good, save: [x] }, 'unknown option "save"; did you mean saved?'],
    [{ ...good, op: 5 }, "op must be a string, got 5"],
    [{ ...good, inputs: x }, "inputs must be an array of tensors, got a Tensor"],
    [{ ...good, inputs: [x, 5] }, "inputs[1] must be a Tensor, got 5"],
    [{ ...good, saved: [closed] }, "saved[0] (shape [1]) was closed"],
    [{ ...good, hidden: 5 }, "hidden must be an array of tensors, got 5"],
    [{ ...good, output: undefined }, "output must be a Tensor, got undefined"],
    [{ ...good, output: tensor(new Int32Array(1)) }, "output must have dtype f32 or f16, got i32"],
    [{ ...good, backward: undefined }, "backward must be a function, got undefined"],
  ];
  // deno-lint-ignore no-explicit-any
  for (const [spec, message] of cases) assertThrows(() => record(spec as any), TypeError, `record: ${message}`);
});

Deno.test("record: a rule that gives one gradient, in an optimizer's memory, to two inputs", async () => {
  await init();
  const [p, q, u] = [1, 2, 3].map((x) => tensor([x, x], { requiresGrad: true }));
  using _optimizer = new optim.SGD([p, q], { lr: 1 });
  const plus = (a: Tensor, b: Tensor) =>
    record({
      op: "plus",
      inputs: [a, b],
      output: noGrad(() => a.add(b)),
      backward: (dY, _, gradientOf) => {
        const d = gradientOf(1).assign(dY);
        return [d, d];
      },
    });
  {
    using _tape = new Tape();
    const h = u.mul(2);
    plus(h, q).add(plus(h, p)).sum().backward();
  }
  assertEquals(await Promise.all([p, q, u].map((x) => x.grad!.array())), [[1, 1], [1, 1], [4, 4]]);
  [p, q, u].forEach((x) => x.dispose());
});

Deno.test("backward: a loss that contains a parameter's gradient, or a view of it, takes it as it was", async () => {
  await init();
  for (const seen of [(g: Tensor) => g, (g: Tensor) => g.detach()]) {
    for (const home of [false, true]) {
      const w = tensor([1, 2], { requiresGrad: true }), optimizer = home ? new optim.SGD([w], { lr: 1 }) : null;
      for (const gradientToo of [false, true]) {
        using _tape = new Tape();
        const penalty = gradientToo ? w.mul(seen(w.grad!)).sum() : null, loss = w.square().sum();
        (penalty?.add(loss) ?? loss).backward();
      }
      assertEquals(await w.grad!.array(), [6, 12]); // 2w, and once more 2w and the gradient of before
      optimizer?.step();
      if (home) assertEquals(await w.array(), [-5, -10]);
      optimizer?.dispose();
      w.dispose();
    }
  }
});

Deno.test("tape: a rule that gives one gradient to several inputs", async () => {
  await init();
  const views = (g: Tensor) => [g, g.reshape([1]), g.reshape([1])];
  for (const gradients of [(g: Tensor) => [g, g, g], views]) {
    const a = leaf([1]), b = leaf([1]);
    using _tape = new Tape();
    const y = record({ op: "three", inputs: [a, a, b], output: zeros([1]), backward: (dY) => gradients(dY.mul(1)) });
    y.sum().backward();
    assertEquals([await a.grad!.item(), await b.grad!.item()], [2, 1]);
  }
});

Deno.test("tape: the first gradient has the loss's dtype", async () => {
  const { f16 } = await init();
  if (!f16) return; // no f16 on this adapter
  const x = tensor([1, 2], { dtype: "f16", requiresGrad: true });
  using _tape = new Tape();
  x.sum().backward();
  assertEquals(await x.grad!.array(), [1, 1]);
});

Deno.test("tape: a tensor that was closed, disposed of twice, or thrown from an async function", async () => {
  await init();
  const before = stats().liveTensors;
  {
    using _tape = new Tape();
    const x = leaf([1]), y = x.sum();
    y.dispose();
    assertThrows(() => y.backward(), TypeError, "was closed");
    x.square(); // the record keeps x
    x.dispose();
    x.dispose();
  }
  assertEquals(stats().liveTensors, before);
  const late = async () => {
    await Promise.resolve();
    throw new Error("late"); // which nobody awaits
  };
  assertThrows(() => noGrad(late), TypeError, "must not be async");
  await new Promise((resolve) => setTimeout(resolve, 5));
});

Deno.test("tape: a step leaves nothing behind, also where a norm has a residual", async () => {
  await init();
  const block = new nn.TransformerBlock(4, 2), x = tensor(new Float32Array(8), [1, 2, 4], { requiresGrad: true });
  const step = () => {
    using _tape = new Tape();
    block.forward(x.mul(1)).sum().backward();
    return stats().liveTensors;
  };
  step();
  const inside = step(), after = stats().liveTensors;
  assertEquals([step(), stats().liveTensors], [inside, after]);
  block.dispose();
  x.dispose();
});

Deno.test("tape: all elements of a long leaf's gradients are added", async () => {
  await init();
  using _tape = new Tape();
  const x = ones([300], { requiresGrad: true });
  for (const factor of [2, 3]) x.mul(factor).sum().backward();
  assertEquals(new Set(await x.grad!.data()), new Set([5]));
});
