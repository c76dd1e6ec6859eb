import { assertEquals } from "@std/assert";
import { inDirectory } from "../testing/directory.ts";
import { checkLayers } from "./layers.ts";

const cleanTree: Record<string, string> = {
  "mod.ts": 'export { sum } from "./ops/sum.ts";\nexport * from "./nn/linear.ts";',
  "kernels/gpu/device.ts": "export const device: GPUDevice | undefined = undefined;",
  "kernels/sum.ts":
    '// a GPUBuffer in a comment\nimport { device } from "./gpu/device.ts";\nexport const sum = () => device;',
  "autograd/tensor.ts":
    'import type { Tape } from "./tape.ts";\nexport class Tensor {\n  tape?: Tape;\n  [Symbol.for("Deno.customInspect")]() {}\n}',
  "autograd/tape.ts": 'import { Tensor } from "./tensor.ts";\nexport class Tape {\n  tensors: Tensor[] = [];\n}',
  "ops/sum.ts": 'import { sum as kernel } from "../kernels/sum.ts";\nexport const sum = kernel;',
  "ops/sum_test.ts": 'import { sum } from "@limbeck/limbeck";\nimport "../testing/near.ts";\nDeno.test("sum", sum);',
  "nn/files.ts": "export const build: string = Deno.build.os;",
  "nn/linear.ts": 'import { sum } from "../ops/sum.ts";\nexport const linear = sum;',
  "testing/near.ts": 'import { sum } from "../mod.ts";\nexport const near = sum;',
  "examples/fit.ts": 'import { linear } from "@limbeck/limbeck";\nconsole.log(Deno.args, linear);',
};

/** Checks the clean tree with some of its files replaced. */
const violations = (changed: Record<string, string>): Promise<string[]> =>
  inDirectory(async (root) => {
    for (const [path, text] of Object.entries({ ...cleanTree, ...changed })) {
      await Deno.mkdir(`${root}/${path}`.replace(/\/[^/]*$/, ""), { recursive: true });
      await Deno.writeTextFile(`${root}/${path}`, text);
    }
    return checkLayers(root).violations;
  });

const order = "kernels ← autograd ← ops ← nn ← mod.ts ← examples, bench";

Deno.test("layers: a clean tree passes", async () => {
  assertEquals(await violations({}), []);
});

Deno.test("layers: an import to the right is caught, of types too", async () => {
  assertEquals(
    await violations({ "kernels/a.ts": '\nimport {\n  type Tensor,\n} from "../autograd/tensor.ts";' }),
    [`kernels/a.ts:2 kernels must not import autograd/tensor.ts: ${order}`],
  );
  assertEquals(
    await violations({ "ops/a.ts": 'export * from "@limbeck/limbeck";' }),
    [`ops/a.ts:1 ops must not import mod.ts: ${order}`],
  );
  assertEquals(
    await violations({ "nn/a.ts": 'import { near } from "../testing/near.ts";\nconsole.log(near);' }),
    [`nn/a.ts:1 nn must not import testing/near.ts: ${order}`],
  );
  assertEquals(
    await violations({ "autograd/a.ts": 'const m = await import("../ops/sum.ts");' }),
    [`autograd/a.ts:1 autograd must not import ops/sum.ts: ${order}`],
  );
  assertEquals(
    await violations({ "ops/a.ts": 'import "../../elsewhere/b.ts";' }),
    [
      "ops/a.ts:1 imports ../elsewhere/b.ts, which is outside the project",
    ],
  );
});

Deno.test("layers: a cycle is caught", async () => {
  assertEquals(
    await violations({
      "ops/a.ts": 'import { b } from "./b.ts";',
      "ops/b.ts": 'import type { x } from "./sum.ts";\nexport { c } from "./c.ts";',
      "ops/c.ts": '\nimport * as a from "./a.ts";',
    }),
    ["ops/c.ts:2 import cycle: ops/a.ts → ops/b.ts → ops/c.ts → ops/a.ts"],
  );
});

Deno.test("layers: WebGPU outside kernels/gpu is caught", async () => {
  assertEquals(
    await violations({
      "kernels/a.ts": "/* GPUBuffer */\nexport const b: GPUBuffer = x;\nawait navigator.gpu.requestAdapter();",
    }),
    [
      "kernels/a.ts:2 GPUBuffer: only kernels/gpu/ touches WebGPU",
      "kernels/a.ts:3 navigator.gpu: only kernels/gpu/ touches WebGPU",
    ],
  );
});

Deno.test("layers: WGSL in autograd and Deno's APIs in the library are caught", async () => {
  assertEquals(
    await violations({
      "autograd/a.ts": "export const shader = `@compute\nfn main() {}`;",
      "kernels/gpu/read.ts": "export const build: string = Deno.build.os;",
      "ops/a.ts": 'export const url = "https://example.org"; Deno.readFileSync("x");',
    }),
    [
      "autograd/a.ts:1 @compute: autograd/ contains no WGSL",
      "autograd/a.ts:2 fn main: autograd/ contains no WGSL",
      "kernels/gpu/read.ts:1 Deno.build: only nn/files.ts and nn/checkpoint.ts use Deno's own APIs",
      "ops/a.ts:1 Deno.readFileSync: only nn/files.ts and nn/checkpoint.ts use Deno's own APIs",
    ],
  );
});
