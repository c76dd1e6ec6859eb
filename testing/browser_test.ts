import { assert, assertEquals, assertMatch } from "@std/assert";
import { inDirectory } from "./directory.ts";

/** What a page in a browser does: WebGPU is there, `Deno` is not. */
const PAGE = `
delete globalThis.Deno;
const { crossEntropy, init, nn, optim, randn, randint, relu, Tape } = await import("@limbeck/limbeck");
await init({ device: await (await navigator.gpu.requestAdapter()).requestDevice() }); // a page's own device
const model = new nn.Sequential(new nn.Linear(8, 16), relu, new nn.Linear(16, 4));
const optimizer = new optim.AdamW(model.parameters(), { lr: 1e-2 });
const x = randn([32, 8]), labels = randint(0, 4, [32]), losses = [];
for (let step = 0; step < 20; step++) {
  using tape = new Tape();
  const loss = crossEntropy(model.forward(x), labels);
  optimizer.zeroGrad();
  loss.backward();
  optimizer.step();
  losses.push(await loss.item());
}
console.log(losses[19] < losses[0], typeof Deno);`;

Deno.test("browser: training needs WebGPU and nothing of Deno", async () => {
  const { stdout, stderr } = await new Deno.Command("deno", { args: ["eval", PAGE] }).output();
  assertEquals(new TextDecoder().decode(stdout), "true undefined\n", new TextDecoder().decode(stderr));
});

/** The same in a bundle, in which no file tells the package from the program. */
const FORGETFUL = `
import { init, stats, tensor } from ${JSON.stringify(new URL("../mod.ts", import.meta.url))};
delete globalThis.Deno;
await init({ debug: true });
function forget() { return tensor([1]); }
forget();
console.log(stats().forgotten[0].place);`;

Deno.test("browser: a bundle says where its program made what it forgot", async () => {
  const run = async (...args: string[]) => {
    const { success, stdout, stderr } = await new Deno.Command("deno", { args }).output();
    assert(success, new TextDecoder().decode(stderr));
    return new TextDecoder().decode(stdout);
  };
  await inDirectory(async (folder) => {
    const program = `${folder}/main.ts`, bundle = `${folder}/main.js`;
    await Deno.writeTextFile(program, FORGETFUL);
    await run("bundle", "--quiet", "--platform", "browser", "-o", bundle, program);
    assertMatch(await run("run", "--no-prompt", bundle), /^at .*\n(.*\n)*\s+at forget /);
  });
});
