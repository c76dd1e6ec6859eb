import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import {
  crossEntropy,
  dispose,
  flush,
  init,
  nn,
  ones,
  optim,
  randint,
  randn,
  relu,
  scaledDotProductAttention,
  Scope,
  Tape,
  tensor,
} from "@limbeck/limbeck";

async function debugging(fn: () => Promise<void>): Promise<void> {
  await dispose();
  await init({ debug: true });
  try {
    await fn();
  } finally {
    await dispose();
  }
}

const message = async (fn: () => Promise<unknown>) => (await assertRejects(fn, Error)).message;

Deno.test("debug: the op that first made an infinity is named, not those that passed it on", () =>
  debugging(async () => {
    using _tape = new Tape();
    const x = tensor([1, 0, 2], { requiresGrad: true });
    const y = x.log().mul(0).add(1);
    const said = await message(() => y.array());
    assertStringIncludes(said, "debug: log: the forward pass of step");
    assertStringIncludes(said, "(shape [3])");
    assertStringIncludes(said, "anomaly_test.ts");
  }));

Deno.test("debug: ops that need no gradient are named too", () =>
  debugging(async () => {
    using _scope = new Scope();
    const zero = tensor([[0, 0]]), labels = tensor([0], { dtype: "i32" });
    assertStringIncludes(await message(() => zero.div(zero).add(1).array()), "debug: div: the forward pass of step");
    const logits = tensor([[NaN, 0]]);
    assertStringIncludes(await message(() => crossEntropy(logits, labels).item()), "debug: crossEntropy: input 0");
  }));

Deno.test("debug: a gradient that the backward pass made infinite is named", () =>
  debugging(async () => {
    using _tape = new Tape();
    const x = tensor([0, 4], { requiresGrad: true });
    x.sqrt().sum().backward(); // 1/(2√0)
    assertStringIncludes(await message(() => x.grad!.array()), "debug: sqrt: the backward pass of step");
  }));

Deno.test("debug: what the host brought is told from what an op made", () =>
  debugging(async () => {
    const x = tensor([NaN, 1]);
    assertStringIncludes(
      await message(() => x.exp().array()),
      "exp: input 0 (shape [2]) held a NaN or an infinity before",
    );
    assertEquals(await tensor([1, 2]).mul(2).array(), [2, 4]); // said once
  }));

Deno.test("debug: a result that was written in place since is told from what its op made", () =>
  debugging(async () => {
    const written = tensor([1]).add(1);
    written.assign(tensor([NaN]));
    assertStringIncludes(await message(() => written.mul(2).array()), "mul: input 0 (shape [1]) held a NaN");
    const w = tensor([1]).mul(2);
    w.requiresGrad = true;
    using optimizer = new optim.SGD([w], { lr: 3e38 });
    using _tape = new Tape();
    w.mul(1000).sum().backward();
    optimizer.step();
    assertStringIncludes(await message(() => w.exp().array()), "exp: input 0 (shape [1]) held a NaN or an infinity");
  }));

Deno.test("debug: in a training run the step and the op are named at the next await", () =>
  debugging(async () => {
    const model = new nn.Sequential(new nn.Linear(4, 8), relu, new nn.Linear(8, 3));
    const optimizer = new optim.SGD(model.parameters(), { lr: 1e30 });
    const x = randn([16, 4]).keep(), y = randint(0, 3, [16]).keep();
    let steps = 0;
    const said = await message(async () => {
      for (; steps < 20; steps++) {
        using _tape = new Tape();
        optimizer.zeroGrad();
        crossEntropy(model.forward(x), y).backward();
        optimizer.step();
        await flush();
      }
    });
    assert(steps > 0 && steps < 20);
    assert(/step \d+/.test(said), said);
  }));

Deno.test("debug: a run without anomalies is left alone, and without debug nothing is checked", async () => {
  await debugging(async () => {
    using _tape = new Tape();
    const w = randn([3, 3], { requiresGrad: true });
    w.square().sum().backward();
    assertEquals((await w.grad!.array() as number[][]).length, 3);
  });
  await init();
  assertEquals(await tensor([0]).log().array(), [-Infinity]);
});

Deno.test("debug: a mask is no alarm", () =>
  debugging(async () => {
    using _scope = new Scope();
    const q = ones([1, 1, 2, 4]), mask = tensor(new Int32Array([1, 0, 1, 1]), [2, 2]);
    assertEquals(await scaledDotProductAttention(q, q, q, { mask }).sum().item(), 8);
    const heads = ones([3, 2, 2, 4]), keys = new Int32Array([1, 0, 1, 1, 1, 0]); // of three sequences, and of all
    for (const mask of [tensor(keys, [3, 1, 1, 2]), tensor(keys.slice(0, 2))]) {
      assertEquals(await scaledDotProductAttention(heads, heads, heads, { mask }).sum().item(), 48);
    }
  }));
