// Saving a training run to a file is nn/checkpoint_test.ts.
import { assert, assertEquals, assertNotEquals, assertStrictEquals, assertThrows } from "@std/assert";
import {
  checkpoint,
  dropout,
  embedding,
  init,
  linear,
  manualSeed,
  nn,
  noGrad,
  optim,
  rand,
  record,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
import { random } from "../testing/op.ts";

const numbers = (count: number, seed: number) => {
  const draw = random(seed);
  return Float32Array.from({ length: count }, () => 2 * draw() - 1);
};

const leaf = (shape: number[], seed: number) =>
  tensor(numbers(shape.reduce((a, b) => a * b, 1), seed), shape, { requiresGrad: true });

/** How a test calls what it would have recomputed: with and without. */
type Call = (fn: (...x: Tensor[]) => Tensor, ...x: Tensor[]) => Tensor;
const plain: Call = (fn, ...x) => fn(...x);

/** Value and gradients of `forward` on fresh leaves, as bits: they are to be equal with and without checkpoints. */
async function results(
  call: Call,
  shapes: number[][],
  forward: (call: Call, ...x: Tensor[]) => Tensor,
  beforeBackward: () => void = () => {},
): Promise<unknown> {
  manualSeed(11);
  using _tape = new Tape();
  const leaves = shapes.map((shape, i) => leaf(shape, i + 1));
  const y = forward(call, ...leaves);
  beforeBackward();
  y.backward(tensor(numbers(y.size, 99), y.shape));
  return {
    y: await y.data(),
    gradients: await Promise.all(leaves.map((x) => x.grad?.data() ?? null)),
    next: await dropout(tensor(new Float32Array(64).fill(1)), { p: 0.5 }).data(), // random numbers go on as they would
  };
}

Deno.test("checkpoint(fn): the same bits as without, dropout inside and outside", async () => {
  await init();
  const drop = (x: Tensor, p: number) => dropout(x, { p });
  const forwards: Record<string, (call: Call, x: Tensor, w: Tensor, b: Tensor) => Tensor> = {
    "all as inputs": (call, x, w, b) => call((x, w, b) => linear(x, w, b).gelu(), x, w, b),
    "captured parameters": (call, x, w, b) => call((x) => linear(x, w, b).gelu(), x),
    "nothing as input": (call, x, w, b) => call(() => linear(x, w, b).gelu()),
    dropout: (call, x, w, b) => drop(call((x) => drop(linear(drop(x, 0.1), w, b).gelu(), 0.4), drop(x, 0.3)), 0.2),
    "one after the other": (call, x, w, b) => {
      let h = x;
      for (let i = 0; i < 3; i++) h = call((h) => drop(linear(h, w, b), 0.3).tanh(), drop(h.mul(2), 0.2));
      return h.sum();
    },
    nested: (call, x, w, b) =>
      drop(call((x) => drop(call((x) => drop(linear(x, w, b), 0.3).tanh(), x.mul(2)), 0.4).mul(3), drop(x, 0.2)), 0.2),
    "a result as input and beside": (call, x, w, b) => {
      const h = x.square();
      return call((h) => linear(h, w, b).tanh(), h).mul(h);
    },
    "in front of an unused result": (call, x, w, b) => {
      call((x) => x.exp(), x);
      return linear(x, w, b);
    },
  };
  for (const [name, forward] of Object.entries(forwards)) {
    const run = (call: Call) => results(call, [[5, 4], [4, 4], [4]], forward as typeof forwards[""] & typeof forward);
    const want = await run(plain);
    assertEquals(await run(checkpoint), want, name);
    assertEquals(await run(checkpoint), want, `${name}, again`);
  }
});

Deno.test("checkpoint(fn): the seed may change around it and inside, and goes on from where the forward pass left it", async () => {
  await init();
  const drop = (x: Tensor) => dropout(x, { p: 0.5 });
  const run = (call: Call, forward: (call: Call, x: Tensor) => Tensor) => results(call, [[64]], forward);
  const seeds = {
    before: (call: Call, x: Tensor) => {
      manualSeed(5);
      return call((x) => drop(x), x);
    },
    after: (call: Call, x: Tensor) => {
      const y = call((x) => drop(x), drop(x));
      manualSeed(5);
      return drop(y);
    },
    inside: (call: Call, x: Tensor) =>
      call((x) => {
        const y = drop(x);
        manualSeed(5);
        return drop(y);
      }, x),
  };
  for (const [name, forward] of Object.entries(seeds)) {
    assertEquals(await run(checkpoint, forward), await run(plain, forward), name);
  }
  manualSeed(3);
  using _tape = new Tape();
  const first = rand([4]);
  manualSeed(3);
  assertEquals(await rand([4]).data(), await first.data());
  assertNotEquals(await rand([4]).data(), await first.data(), "the second op of a step draws others");
  manualSeed(4);
  assertNotEquals(await rand([4]).data(), await first.data());
});

Deno.test("checkpoint(fn): what fn did not make, or has no gradient, comes back as it is", async () => {
  await init();
  using _tape = new Tape();
  const x = leaf([3], 1), constant = tensor([4]), earlier = noGrad(() => x.mul(2));
  for (const y of [constant, earlier]) {
    assertStrictEquals(checkpoint(() => y, x), y);
    assertStrictEquals(checkpoint((x) => x.mul(2) && y, x), y);
    assertEquals(y.requiresGrad, false);
  }
  const index = checkpoint((x) => x.argmax(), x);
  assertEquals([index.requiresGrad, index.dtype], [false, "i32"]);
  const still = checkpoint((x) => x.mul(2).sum(), constant); // nothing in it needs a gradient
  assertEquals([still.requiresGrad, still.record], [false, null]);
  assert(checkpoint(() => x.sum()).requiresGrad && checkpoint((c) => c.sum().add(x), constant).requiresGrad);
  const y = checkpoint((x) => { // a result that fn took out of a scope of its own is its result
    using _scope = new Scope();
    return x.mul(3).keep();
  }, x);
  y.sum().backward();
  assertEquals(await x.grad!.array(), [3, 3, 3]);
  y.dispose();
});

Deno.test("checkpoint(fn): train flags are those of the forward pass", async () => {
  await init();
  const block = new nn.TransformerBlock(8, 2, { dropout: 0.3 });
  for (const training of [true, false]) {
    const run = async (call: Call) => {
      for (const p of block.parameters()) {
        p.grad?.dispose();
        p.grad = null;
      }
      block.train(training);
      const result = await results(
        call,
        [[2, 5, 8]],
        (call, x) => call((x) => block.forward(call((x) => block.forward(x), x)), x),
        () => block.train(!training),
      );
      return { result, parameters: await Promise.all(block.parameters().map((p) => p.grad!.data())) };
    };
    assertEquals(await run(checkpoint), await run(plain), `training ${training}`);
  }
  block.dispose();
});

Deno.test("checkpoint(fn): a module of one's own asks whether it trains, and is told what the forward pass was told", async () => {
  await init();
  const own = new class extends nn.Module {
    override forward(x: Tensor): Tensor {
      return x.mul(this.training ? 2 : 7);
    }
  }();
  for (const training of [true, false]) {
    own.train(training);
    using _tape = new Tape();
    const x = leaf([2], 1), y = checkpoint((x) => own.forward(x), x);
    own.train(!training);
    y.sum().backward();
    assertEquals(await x.grad!.array(), training ? [2, 2] : [7, 7]);
    assertEquals(own.training, !training);
  }
});

Deno.test("checkpoint(fn): tokens as inputs, and parameters in an optimizer's block", async () => {
  await init();
  const trained = async (call: Call) => {
    manualSeed(2);
    const table = leaf([7, 4], 1).keep(), layer = new nn.Linear(4, 4);
    const optimizer = new optim.AdamW([table, ...layer.parameters()], { lr: 0.1 });
    for (let step = 0; step < 3; step++) {
      using _tape = new Tape();
      optimizer.zeroGrad();
      const tokens = tensor(new Int32Array([1, 5, 1, step]));
      const h = call((tokens) => layer.forward(embedding(table, tokens)).tanh(), tokens);
      call((h) => layer.forward(h), h).square().mean().backward(); // the layer a second time: gradients add up
      optimizer.step();
    }
    const values = await Promise.all([table, ...layer.parameters()].map((p) => p.data()));
    optimizer.dispose();
    layer.dispose();
    table.dispose();
    return values;
  };
  assertEquals(await trained(checkpoint), await trained(plain));
});

Deno.test("checkpoint(fn): holds less", async () => {
  await init();
  const LAYERS = 10, OPS = 4, SIZE = 2 ** 16, BYTES = 4 * SIZE;
  const base = stats().liveBytes;
  const peak = async (call: Call) => { // the highest so far: the smaller one comes first
    using _tape = new Tape();
    const x = leaf([SIZE], 1);
    let h = x;
    for (let l = 0; l < LAYERS; l++) {
      h = call((h) => {
        for (let i = 0; i < OPS; i++) h = h.tanh();
        return h;
      }, h);
    }
    h.sum().backward();
    await x.grad!.data();
    return (stats().peakBytes - base) / BYTES;
  };
  const checked = await peak(checkpoint), unchecked = await peak(plain);
  // one result a layer and some for the layer that runs; all of them without
  assert(checked <= LAYERS + 2 * OPS + 4, `${checked} tensors`);
  assert(unchecked >= LAYERS * OPS, `${unchecked} tensors`);
});

Deno.test("checkpoint(fn): memory comes back", async () => {
  await init();
  const before = stats();
  {
    using _tape = new Tape();
    const x = leaf([8], 1);
    const y = checkpoint((x) => x.tanh().exp(), x);
    checkpoint((y) => y.square(), y).sum().backward();
    checkpoint((x) => x.tanh(), x); // never walked
  }
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("checkpoint(fn): a scope inside fn, with a result that is kept, which the second pass does not keep again", async () => {
  await init();
  const before = stats();
  {
    using _tape = new Tape();
    const x = tensor([1, 2], { requiresGrad: true });
    using y = checkpoint((x) => {
      using _scope = new Scope();
      return x.mul(3).square().keep();
    }, x);
    y.sum().backward();
    assertEquals(await y.array(), [9, 36]);
    assertEquals(await x.grad!.array(), [18, 36]);
    let made: Tensor | null = null; // the second pass finds it, makes nothing, and must not free it
    using z = checkpoint((x) => made ??= x.square().keep(), x);
    z.sum().backward();
    assertEquals(await z.array(), [1, 4]);
  }
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("checkpoint(fn): what fn was given or found", async () => {
  await init();
  for (const what of ["input", "captured leaf", "captured result"]) {
    using _tape = new Tape();
    const w = tensor([1, 2], { requiresGrad: true }), result = w.mul(3), x = tensor([5]);
    const y = what === "input"
      ? checkpoint((w) => w, w)
      : what === "captured leaf"
      ? checkpoint(() => w, x)
      : checkpoint(() => result, x);
    y.mul(2).sum().backward();
    assertEquals(await w.grad?.array(), what === "captured result" ? [6, 6] : [2, 2], what);
  }
});

Deno.test("checkpoint(fn): an input that was disposed of after the forward pass", async () => {
  await init();
  using _tape = new Tape();
  const w = tensor([1, 2], { requiresGrad: true });
  for (const [x, gradient] of [[tensor([3, 4]), [18, 64]], [w.mul(3), [36, 288]]] as const) {
    const y = checkpoint((x) => x.mul(w).square(), x);
    x.dispose(); // a plain mul keeps it for its backward pass
    y.sum().backward();
    assertEquals(await w.grad!.array(), gradient);
    w.grad = null;
  }
});

Deno.test("checkpoint(fn): an input that was written in place is found", async () => {
  await init();
  using _tape = new Tape();
  const w = tensor([1, 2], { requiresGrad: true }), x = tensor([3, 4]);
  const y = checkpoint((x) => x.mul(w), x).sum();
  x.assign(tensor([5, 6]));
  assertThrows(() => y.backward(), Error, "an input of checkpoint (shape [2]) was changed in place");
});

Deno.test("checkpoint(fn): without a tape it is a call", async () => {
  await init();
  using _scope = new Scope();
  const w = tensor([1, 2], { requiresGrad: true });
  let calls = 0;
  const double = (x: Tensor) => {
    calls++;
    return x.mul(2);
  };
  assertEquals(await checkpoint(double, w).array(), [2, 4]);
  using _tape = new Tape();
  const unrecorded = noGrad(() => checkpoint(double, w));
  assertEquals([unrecorded.requiresGrad, calls], [false, 2]);
});

Deno.test("checkpoint(fn): what it throws, and that it goes on afterwards", async () => {
  await init();
  const w = tensor([1, 2], { requiresGrad: true });
  // deno-lint-ignore no-explicit-any
  const call = (fn: any, ...inputs: any[]) => () => checkpoint(fn, ...inputs);
  const all = () => {
    assertThrows(call(() => 5, w), TypeError, "checkpoint: fn must return a Tensor, got 5");
    assertThrows(call(() => undefined, w), TypeError, "checkpoint: fn must return a Tensor, got undefined");
    assertThrows(call((x: Tensor) => [x], w), TypeError, "checkpoint: fn must return a Tensor, got [a Tensor]");
    assertThrows(call((x: Tensor) => Promise.resolve(x), w), TypeError, "checkpoint: fn must return a Tensor, got");
    assertThrows(call(async () => await Promise.reject(new Error("late")), w), TypeError, "checkpoint: fn must");
    assertThrows(call(5, w), TypeError, "checkpoint: fn must be a function, got 5");
    assertThrows(call((x: Tensor) => x, w, [1]), TypeError, "checkpoint: inputs[1] must be a Tensor, got [1]");
    assertThrows(
      call(() => {
        throw new Error("of its own");
      }, w),
      Error,
      "of its own",
    );
  };
  {
    using _scope = new Scope();
    all();
  }
  using _tape = new Tape();
  all();
  const y = checkpoint((x) => x.square(), w).sum();
  let calls = 0;
  const failing = checkpoint((x) => {
    if (++calls === 2) throw new Error("of the second pass");
    return x.exp();
  }, w).sum();
  assertThrows(() => failing.backward(), Error, "of the second pass");
  y.backward();
  assertEquals(await w.grad!.array(), [2, 4]);
  assertThrows(() => y.backward(), Error, "was walked before");
});

Deno.test("checkpoint: backward rules choose and draw as without it", async () => {
  await init();
  const noisy = (x: Tensor) =>
    record({ op: "noisy", inputs: [x], output: x.mul(1).detach(), backward: (dY) => [dropout(dY, { p: 0.5 })] });
  const gradients: unknown[] = [];
  for (const call of [checkpoint, (fn: (x: Tensor) => Tensor, x: Tensor) => fn(x)]) {
    using _tape = new Tape();
    manualSeed(1);
    const x = tensor(numbers(64, 1), [64], { requiresGrad: true });
    const y = call((x) => dropout(noisy(x.mul(3)), { p: 0.25 }), x);
    dropout(y, { p: 0.5 }).sum().backward();
    gradients.push(await x.grad!.array());
  }
  assertEquals(gradients[0], gradients[1]);
});

Deno.test("checkpoint: results without a gradient, and what fn makes and does not use", async () => {
  await init();
  using _tape = new Tape();
  const x = tensor([1, 3, 2], { requiresGrad: true });
  assertEquals(await checkpoint((x) => x.mul(2).argmax(), x).item(), 1);
  const doubled = checkpoint((x) => {
    x.exp().square();
    return x.mul(2);
  }, x);
  doubled.sum().backward();
  assertEquals(await x.grad!.array(), [2, 2, 2]);
});
