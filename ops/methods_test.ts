import { assertEquals } from "@std/assert";
import * as limbeck from "@limbeck/limbeck";
import { init, Scope, Tensor, tensor } from "@limbeck/limbeck";

/** What follows the tensor, where an op needs more than that. */
const ARGUMENTS: Record<string, () => unknown[]> = {
  ...Object.fromEntries(
    ["add", "sub", "mul", "div", "pow", "maximum", "minimum"].map((name) => [name, () => [tensor([3, 2])]]),
  ),
  cast: () => ["f32"],
  clamp: () => [{ min: 0.6, max: 2 }],
  expand: () => [[3, 2, 2]],
  gather: () => [1, tensor(new Int32Array([1, 0]), [2, 1])],
  matmul: () => [tensor([[1, 2], [3, 4]])],
  oneHot: () => [3],
  permute: () => [[1, 0]],
  reshape: () => [[4, -1]],
  slice: () => [[[0, 1], [1, 2]]],
  transpose: () => [0, 1],
  where: () => [tensor([[1, 0], [0, 1]]), tensor([7])],
};

Deno.test("methods: each is the function of the same name", async () => {
  await init();
  using _scope = new Scope();
  const numbers = tensor([[0.5, 1], [2, 3]]), indices = tensor(new Int32Array([2, 0]));
  const names = Object.getOwnPropertyNames(Tensor.prototype).filter((name) => name in limbeck && name !== "dispose");
  assertEquals(names.length, 44); // all that the interface lists, but for assign and backward
  for (const name of names) {
    const x = name === "oneHot" ? indices : numbers, more = ARGUMENTS[name]?.() ?? [];
    // deno-lint-ignore no-explicit-any
    const [method, op] = [(x as any)[name], (limbeck as any)[name]];
    const got: Tensor = method.call(x, ...more);
    const want: Tensor = name === "where" ? op(more[0], x, more[1]) : op(x, ...more); // the condition comes first
    assertEquals(got.shape, want.shape, name);
    assertEquals(await got.data(), await want.data(), name);
  }
});
