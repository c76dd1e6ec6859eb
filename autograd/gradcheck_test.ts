import { assert, assertEquals, assertRejects } from "@std/assert";
import { gradcheck, init, noGrad, record, stats, type Tensor, tensor } from "@limbeck/limbeck";

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
  const x = tensor([1, -2, 0.5]), y = tensor([2, 3, -1]);
  const before = stats().liveBytes;
  const right = await gradcheck((a, b) => product(a, b, 1), [x, y]);
  assert(right.ok, `${right.errors}`);
  const { ok, errors } = await gradcheck((a, b) => product(a, b, 1.1), [x, y]);
  assertEquals(ok, false);
  assert(errors[0] < 1e-3, `${errors}`);
  assert(Math.abs(errors[1] - 0.1) < 0.01, `${errors}`); // it says which input and by how much
  const loose = await gradcheck((a, b) => product(a, b, 1.1), [x, y], { tolerance: 0.2 });
  assert(loose.ok);
  assertEquals(stats().liveBytes, before);
});

Deno.test("gradcheck: a missing gradient counts as 0, a constant has none", async () => {
  await init();
  assertEquals((await gradcheck((a) => a.detach().mul(2).add(a.mul(0)), [tensor([1, 2])])).ok, false);
  assertEquals((await gradcheck((a) => a.mul(0), [tensor([1, 2])])).errors, [0]);
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
});
