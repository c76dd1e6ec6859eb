// What a whole program comes to, seen from outside: none may fail and exit with 0.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { whatToInstall } from "./device.ts";

async function run(program: string, env: Record<string, string> = {}): Promise<{ code: number; said: string }> {
  const imports = `import { defineKernel, dispose, flush, init, ones, Tape, tensor, zeros } from "@limbeck/limbeck";`;
  const { code, stdout, stderr } = await new Deno.Command("deno", { args: ["eval", imports + program], env }).output();
  const text = new TextDecoder();
  return { code, said: text.decode(stdout) + text.decode(stderr) };
}

const BROKEN = `await init();
const y = zeros([4]), kernel = defineKernel({ name: "broken", buffers: { y: "write f32" }, main: "y[lane] = nothing;" });
kernel.run({ y: y.memory }, {}, 1);`;

const FAILING: Record<string, string> = {
  "nothing is awaited behind an error": BROKEN,
  "a step is encoded and submitted behind it": `${BROKEN} for (let i = 0; i < 300; i++) ones([2]).dispose();`,
  "a flush that nobody awaits": `${BROKEN} flush();`,
  "a read that nobody awaits": `${BROKEN} y.add(1).data().then((data) => console.log("NUMBERS", data[0]));`,
  "the end of the engine": `${BROKEN} await dispose();`,
  "an error outside of the engine's calls": `const adapter = await navigator.gpu.requestAdapter();
const device = await adapter.requestDevice();
await init({ device });
device.createBuffer({ label: "broken", size: 16, usage: 0xffff });`,
};

Deno.test("program: an error of the device gives exit code 1, whatever is awaited", async () => {
  const wrong: string[] = [];
  for (const [name, program] of Object.entries(FAILING)) {
    const { code, said } = await run(program);
    if (code !== 1 || !said.includes("GPU: ") || said.includes("NUMBERS")) wrong.push(`${name}: ${code}, ${said}`);
  }
  assertEquals(wrong, []);
});

Deno.test("program: one that goes on with a new device after a loss ends well", async () => {
  const { code, said } = await run(`const loss = { reason: "unknown", message: "driver reset" };
const withLoss = async (value) =>
  Object.defineProperty(await (await navigator.gpu.requestAdapter()).requestDevice(), "lost", { value });
await init({ device: await withLoss(Promise.resolve(loss)) }).catch((error) => console.log(error.message));
let lose;
const device = await withLoss(new Promise((resolve) => lose = resolve));
await init({ device });
lose(loss);
await device.lost;
await init();
console.log(await tensor([1]).add(1).array());`);
  const first = "init: the device was lost before it could be used (unknown: driver reset)";
  assertEquals([code, said], [0, `${first}\n[ 2 ]\n`]);
});

Deno.test("program: an exception inside a step is the one that is seen", async () => {
  const { code, said } = await run(`await init();
using tape = new Tape();
const x = tensor([1, 2], { requiresGrad: true });
x.square();
throw new RangeError("of the user's own");`);
  assertEquals(code, 1);
  assertStringIncludes(said, "Uncaught (in promise) RangeError: of the user's own");
  assert(!said.includes("SuppressedError"), said);
});

Deno.test("program: without an adapter it is said what to install", async () => {
  const none = { DENO_WEBGPU_BACKEND: "vulkan", VK_DRIVER_FILES: "/none.json", VK_ICD_FILENAMES: "/none.json" };
  const { code, said } = await run("await init();", none);
  assertEquals(code, 1);
  assertStringIncludes(said, "init: WebGPU found no adapter on ");
  const advice: Record<string, string[]> = {
    "Linux x86_64": ["Vulkan driver", "apt-get install mesa-vulkan-drivers", "dnf install", "pacman -S"],
    MacIntel: ["Metal"],
    Win32: ["Direct3D 12", "driver"],
    "": ["Vulkan driver"],
  };
  for (const [platform, words] of Object.entries(advice)) {
    for (const word of words) assertStringIncludes(whatToInstall(platform), word);
  }
});
