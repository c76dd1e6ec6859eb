import { assert, assertEquals, assertRejects } from "@std/assert";
import { checkpoint, gradcheck, init, noGrad, randn, record, stats, type Tensor, tensor } from "@limbeck/limbeck";

/** x·y, with a factor on the gradient by y. */
function product(x: Tensor, y: Tensor, wrong: number): Tensor {
  return record({
    op: "product",
    inputs: [x, y],
    output: noGrad(() => x.mul(y)),
    saved: [x, y],
    backward: (d) => [d.mul(y), d.mul(x).mul(wrong)],
  });
}

Deno.test("gradcheck: accepts the right gradient and finds the wrong one", async () => {
  await init();
  const x = tensor([1, -2, 0.5]), y = tensor([2, 3, -1]), one = tensor([1]);
  const before = stats().liveBytes;
  const right = await gradcheck((a, b) => product(a, b, 1), [x, y]);
  assert(right.ok, `${right.errors}`);
  const { ok, errors } = await gradcheck((a, b) => product(a, b, 1.1), [x, y]);
  assertEquals(ok, false);
  assert(errors[0] < 1e-3, `${errors}`);
  assert(Math.abs(errors[1] - 0.1) < 0.01, `${errors}`); // it says which input and by how much
  assertEquals((await gradcheck((a, b) => product(a, b, 1.1), [one, one])).ok, false); // none is too small
  const loose = await gradcheck((a, b) => product(a, b, 1.1), [x, y], { tolerance: 0.2 });
  assert(loose.ok);
  assertEquals(stats().liveBytes, before);
});

Deno.test("gradcheck: of large values too", async () => {
  await init();
  for (const x of [1e4, -1e6, 3e9, 2 ** 100]) {
    const { ok, errors } = await gradcheck((x) => x.mul(3), [tensor([x])]);
    assert(ok, `${x}: ${errors}`);
    assertEquals((await gradcheck((x) => x.detach().mul(3), [tensor([x])])).errors, [1], `${x}`);
  }
});

Deno.test("gradcheck: a missing gradient counts as 0, a constant has none", async () => {
  await init();
  assertEquals((await gradcheck((a) => a.detach().mul(2).add(a.mul(0)), [tensor([1, 2])])).ok, false);
  assertEquals((await gradcheck((a) => a.mul(0), [tensor([1, 2])])).errors, [0]);
});

Deno.test("gradcheck: a result without a way back to the inputs has the gradient 0, the input itself 1", async () => {
  await init();
  const x = tensor([1, 2]), w = tensor([3, 4], { requiresGrad: true });
  assertEquals(await gradcheck((a) => a.detach(), [x]), { ok: false, errors: [1] });
  assertEquals(await gradcheck(() => w, [x]), { ok: true, errors: [0] });
  assert((await gradcheck((a) => a, [x])).ok);
  assert(!w.closed);
});

Deno.test("gradcheck: two at once, and what others make meanwhile is theirs", async () => {
  await init();
  const f = (a: Tensor) => a.square();
  const both = Promise.all([gradcheck(f, [tensor([1, 2])]), gradcheck(f, [tensor([3])])]);
  let done = false;
  both.finally(() => done = true).catch(() => {});
  const made: Tensor[] = [];
  while (!done) {
    made.push(tensor([1]));
    await (made.length % 8 === 0 ? new Promise((resolve) => setTimeout(resolve)) : null);
  }
  assert((await both).every(({ ok }) => ok));
  assert(made.every((x) => !x.closed));
  for (const x of made) x.dispose();
});

Deno.test("gradcheck: parameters that fn uses keep the gradients that they had", async () => {
  await init();
  const w = tensor([3, 4], { requiresGrad: true }), v = tensor([5, 6], { requiresGrad: true });
  w.grad = tensor([7, 8]);
  const before = w.grad;
  const { ok } = await gradcheck((a) => a.mul(w).add(checkpoint((b) => b.mul(v), a)), [tensor([1, 2])]);
  assert(ok);
  assertEquals([w.grad === before, await w.grad.array(), v.grad], [true, [7, 8], null]);
});

Deno.test("gradcheck: what it throws", async () => {
  await init();
  const index = tensor(new Int32Array(1)), f = (x: Tensor) => x;
  await assertRejects(() => gradcheck(f, [index]), TypeError, "gradcheck: inputs[0] must have dtype f32, got i32");
  await assertRejects(() => gradcheck(f, [tensor([1])], { step: 0 }), RangeError, "gradcheck: step must be");
  // deno-lint-ignore no-explicit-any
  const check: any = gradcheck, x = tensor([1]);
  await assertRejects(() => check(5, [x]), TypeError, "gradcheck: fn must be a function, got 5");
  await assertRejects(() => check(f, x), TypeError, "gradcheck: inputs must be an array of tensors, got a Tensor");
  await assertRejects(() => check(() => 5, [x]), TypeError, "gradcheck: what fn returns must be a Tensor, got 5");
  const noisy = (x: Tensor) => x.mul(randn([1]));
  await assertRejects(() => gradcheck(noisy, [tensor([1])]), Error, "gradcheck: fn must return the same each time");
});

Deno.test("gradcheck: finds a gradient whose elements are in the wrong order", async () => {
  await init();
  const flip = (x: Tensor) => {
    const output = noGrad(() => x.gather(0, tensor(Int32Array.of(2, 1, 0))));
    return record({ op: "flip", inputs: [x], output, backward: (dY) => [dY.mul(1)] });
  };
  const x = tensor([1, 2, 3]);
  assertEquals((await gradcheck(flip, [x])).ok, false);
  x.dispose();
});
