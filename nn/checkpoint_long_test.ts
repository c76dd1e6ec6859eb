import { assert, assertEquals } from "@std/assert";
import { init, loadCheckpoint, nn } from "@limbeck/limbeck";
import { random } from "../testing/op.ts";

const KILLS = 20, WIDTH = 1500; // 9 MB a save, or half of it

/** Saves in a loop: checkpoint number n has every parameter n. Even ones are larger. */
const SCRIPT = `import { init, loadCheckpoint, nn, saveCheckpoint } from ${
  JSON.stringify(new URL("../mod.ts", import.meta.url).href)
};
const [path] = Deno.args;
await init();
const layer = () => new nn.Linear(${WIDTH}, ${WIDTH});
const [small, large] = [new nn.Sequential(layer()), new nn.Sequential(layer(), layer())];
const begin = await Deno.stat(path).then(() => loadCheckpoint(path, { model: small }).catch(() => loadCheckpoint(path, { model: large })), () => ({ step: 0 }));
for (let step = begin.step + 1;; step++) {
  const model = step % 2 ? small : large;
  for (const x of model.parameters()) nn.init.constant(x, step);
  await saveCheckpoint(path, { model, step }, { overwrite: true });
  console.log("saved");
}
`;

Deno.test("checkpoint: a kill at any moment leaves a whole file and no heap of others", async () => {
  await init();
  const directory = await Deno.makeTempDir(), script = `${directory}/save.ts`;
  Deno.writeTextFileSync(script, SCRIPT);
  const wrong: string[] = [], layer = () => new nn.Linear(WIDTH, WIDTH);
  const models = [new nn.Sequential(layer(), layer()), new nn.Sequential(layer())];
  let leftovers = 0;
  const lane = async (name: string, kills: number, seed: number) => {
    const own = `${directory}/${name}`, path = `${own}/run`, draw = random(seed);
    Deno.mkdirSync(own);
    let last = 0;
    for (let kill = 0; kill < kills; kill++) {
      const child = new Deno.Command("deno", {
        args: ["run", "--no-prompt", "--no-lock", "--no-check", "--allow-read", `--allow-write=${own}`, script, path],
        stdout: "piped",
        stderr: "null",
      }).spawn();
      const output = child.stdout.getReader();
      const { done } = await output.read(); // the first save of this process is done
      const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
      const isWriting = () => [...Deno.readDirSync(own)].some(({ name }) => name.endsWith(".partial"));
      await pause(100 * draw());
      // every other one while a file is being written, which is a small part of the time
      for (let looks = 0; kill % 2 === 0 && !isWriting() && looks < 2000; looks++) await pause(1);
      child.kill("SIGKILL");
      await child.status;
      await output.cancel();
      if (done) wrong.push(`${name}: the process ended by itself`);

      const files = [...Deno.readDirSync(own)].map((entry) => entry.name);
      if (files.length > 2 || !files.includes("run")) wrong.push(`${name}, kill ${kill}: ${files}`);
      leftovers += files.length - 1;
      // which of the two it is, the file does not say
      const { step, model } = await loadCheckpoint(path, { model: models[0] }).then(
        ({ step }) => ({ step, model: models[0] }),
        async () => ({ ...await loadCheckpoint(path, { model: models[1] }), model: models[1] }),
      );
      const values = await Promise.all(model.parameters().map((x) => x.data()));
      if (!values.every((data) => data.every((v) => v === step))) wrong.push(`${name}, kill ${kill}: mixed values`);
      if (step <= last) wrong.push(`${name}, kill ${kill}: step ${step} behind ${last}`);
      last = step;
    }
  };
  try {
    await Promise.all([lane("a", KILLS / 2, 1), lane("b", KILLS / 2, 2)]);
    assertEquals(wrong, []);
    assert(leftovers > 0, "no kill came in the middle of a save");
  } finally {
    for (const model of models) model.dispose();
    await Deno.remove(directory, { recursive: true });
  }
});
