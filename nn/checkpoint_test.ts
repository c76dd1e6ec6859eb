import { assert, assertEquals, assertRejects } from "@std/assert";
import {
  crossEntropy,
  init,
  loadCheckpoint,
  loadSafetensors,
  manualSeed,
  nn,
  optim,
  rand,
  relu,
  saveCheckpoint,
  saveSafetensors,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import { randomState } from "../autograd/random.ts";
import { inDirectory } from "../testing/directory.ts";
import { random } from "../testing/op.ts";

const makeModel = (hidden = 16) =>
  new nn.Sequential(new nn.Linear(6, hidden), relu, new nn.Dropout(0.3), new nn.Linear(hidden, 4));

/** Steps `from` to `to`, on data that the step's number fixes. */
function train(model: nn.Module, optimizer: optim.Optimizer, from: number, to: number): void {
  for (let step = from; step < to; step++) {
    using _tape = new Tape();
    const draw = random(step);
    const x = tensor(Float32Array.from({ length: 48 }, draw), [8, 6]);
    const y = tensor(Int32Array.from({ length: 8 }, () => Math.floor(4 * draw())));
    optimizer.zeroGrad();
    crossEntropy(model.forward(x), y).backward();
    optimizer.step();
    optimizer.lr *= 0.97;
  }
}

const values = async (model: nn.Module) => await Promise.all(model.parameters().map((p) => p.data()));

const OPTIMIZERS: Record<string, (model: nn.Module) => optim.Optimizer> = {
  AdamW: (model) => new optim.AdamW(model.parameters(), { lr: 0.02 }),
  "Adam with amsgrad": (model) => new optim.Adam(model.parameters(), { lr: 0.02, amsgrad: true }),
  "SGD with momentum": (model) => new optim.SGD(model.parameters(), { lr: 0.1, momentum: 0.9, dampening: 0.1 }),
  RMSprop: (model) => new optim.RMSprop(model.parameters(), { lr: 0.01, momentum: 0.5, centered: true }),
  Adagrad: (model) => new optim.Adagrad(model.parameters(), { lr: 0.1, lrDecay: 0.1, initialAccumulatorValue: 0.1 }),
};

for (const [name, makeOptimizer] of Object.entries(OPTIMIZERS)) {
  Deno.test(`checkpoint: a run that was broken off repeats the unbroken one bit for bit, ${name}`, async () => {
    await init();
    await inDirectory(async (directory) => {
      const path = `${directory}/run.safetensors`, live = stats();
      const begin = (seed: number) => {
        manualSeed(seed);
        const model = makeModel();
        return { model, optimizer: makeOptimizer(model) };
      };
      const unbroken = begin(5);
      train(unbroken.model, unbroken.optimizer, 0, 20);
      const state = async ({ model, optimizer }: ReturnType<typeof begin>) => {
        using _scope = new Scope();
        return { values: await values(model), lr: optimizer.lr, draw: await rand([4]).array() };
      };
      const want = await state(unbroken);

      const first = begin(5);
      train(first.model, first.optimizer, 0, 8);
      const extra = { losses: [1, 0.5], name: "ü" };
      await saveCheckpoint(path, { ...first, step: 8, extra: { ...extra, best: undefined } });
      train(first.model, first.optimizer, 8, 20); // saving changed nothing
      assertEquals(await values(first.model), want.values);

      const second = begin(99); // all different
      train(second.model, second.optimizer, 0, 3);
      const loaded = await loadCheckpoint(path, second), { step } = loaded;
      assertEquals(loaded, { step: 8, extra });
      train(second.model, second.optimizer, step, 20);
      assertEquals(await state(second), want);
      for (const { model, optimizer } of [unbroken, first, second]) {
        optimizer.dispose();
        model.dispose();
      }
      assertEquals([stats().liveTensors, stats().liveBytes], [live.liveTensors, live.liveBytes]);
    });
  });
}

Deno.test("checkpoint: a run over two processes", async () => {
  await init();
  await inDirectory(async (directory) => {
    const script = `${directory}/run.ts`, path = `${directory}/run.safetensors`;
    Deno.writeTextFileSync(
      script,
      `import { init, loadCheckpoint, manualSeed, nn, optim, randn, saveCheckpoint, Tape } from ${
        JSON.stringify(new URL("../mod.ts", import.meta.url).href)
      };
const [from, to, path] = Deno.args;
await init();
manualSeed(from === "0" ? 5 : 6);
const model = new nn.Sequential(new nn.Linear(6, 8), new nn.Dropout(0.3), new nn.Linear(8, 2));
const optimizer = new optim.AdamW(model.parameters(), { lr: 0.02 });
if (from !== "0") await loadCheckpoint(path, { model, optimizer });
for (let step = Number(from); step < Number(to); step++) {
  using _tape = new Tape();
  optimizer.zeroGrad();
  model.forward(randn([8, 6])).square().mean().backward();
  optimizer.step();
}
if (to !== "20") await saveCheckpoint(path, { model, optimizer, step: Number(to) });
console.log(JSON.stringify(await Promise.all(model.parameters().map((p) => p.array()))));
`,
    );
    const run = async (...args: string[]) => {
      const command = new Deno.Command("deno", {
        cwd: directory, // a comma in its path would part a list of permissions
        args: ["run", "--no-prompt", "--no-lock", "--allow-read", "--allow-write=.", script, ...args, path],
      });
      const { success, stdout, stderr } = await command.output();
      assert(success, new TextDecoder().decode(stderr));
      return new TextDecoder().decode(stdout).trim();
    };
    const whole = await run("0", "20");
    assert((await run("0", "8")) !== whole);
    assertEquals(await run("8", "20"), whole); // JSON gives back every digit of an f32
  });
});

Deno.test("checkpoint: groups go on with the rates and decays that they had", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/run`,
      begin = () => {
        manualSeed(5);
        const model = new nn.Sequential(new nn.Linear(6, 4)), [weight, bias] = model.parameters();
        const groups = [{ params: [weight], lr: 0.5, weightDecay: 0.1 }, { params: [bias] }];
        return { model, groups, optimizer: new optim.SGD(groups, { lr: 0.1 }) };
      };
    const [first, second] = [begin(), begin()];
    train(first.model, first.optimizer, 0, 2);
    Object.assign(first.groups[0], { lr: 0.05, weightDecay: 0.3 });
    await saveCheckpoint(path, { model: first.model, optimizer: first.optimizer });
    await loadCheckpoint(path, { model: second.model, optimizer: second.optimizer });
    for (const { model, optimizer } of [first, second]) train(model, optimizer, 2, 4);
    assertEquals(await values(second.model), await values(first.model));
    for (const { model, optimizer } of [first, second]) for (const used of [optimizer, model]) used.dispose();
  });
});

Deno.test("checkpoint: an optimizer with other options is refused", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/run`, model = new nn.Linear(2, 1);
    using momentum = new optim.SGD(model.parameters(), { momentum: 0.9 });
    await saveCheckpoint(path, { model, optimizer: momentum });
    using plain = new optim.SGD(model.parameters());
    const load = () => loadCheckpoint(path, { model, optimizer: plain });
    await assertRejects(
      load,
      RangeError,
      "SGD: state must be of an optimizer with the same options, got also 0.a, 1.a",
    );
    model.dispose();
  });
});

Deno.test("checkpoint: a model alone", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/model.safetensors`, [model, other] = [makeModel(), makeModel()];
    await saveCheckpoint(path, { model });
    assertEquals(await loadCheckpoint(path, { model: other }), { step: 0, extra: null });
    assertEquals(await values(other), await values(model));
    const optimizer = new optim.SGD(other.parameters());
    await saveCheckpoint(path, { model: other, optimizer, step: 3 });
    assertEquals((await loadCheckpoint(path, { model })).step, 3); // evaluation needs no optimizer
    optimizer.dispose();
    for (const m of [model, other]) m.dispose();
  });
});

Deno.test("checkpoint: brings back the numbers that were tuned for the adapter", async () => {
  const info = await init(), limits = { threads: 64, quads: 0 };
  const tuning = { rows: { one: limits, two: limits }, tiles: [1, 0.5] };
  await inDirectory(async (directory) => {
    const model = makeModel(), path = `${directory}/c.safetensors`;
    for (const saved of [tuning, null]) {
      info.tuning = saved;
      await saveCheckpoint(path, { model });
      info.tuning = saved ? null : tuning;
      await loadCheckpoint(path, { model });
      assertEquals(info.tuning, saved);
    }
    model.dispose();
  });
});

Deno.test("checkpoint: what it refuses changes nothing", async () => {
  await init();
  await inDirectory(async (directory) => {
    const good = `${directory}/good`,
      bare = `${directory}/bare`,
      plain = `${directory}/plain`,
      cut = `${directory}/cut`;
    manualSeed(1);
    const saved = makeModel(), adam = new optim.AdamW(saved.parameters());
    train(saved, adam, 0, 2);
    await saveCheckpoint(good, { model: saved, optimizer: adam, step: 2 });
    await saveCheckpoint(bare, { model: saved });
    await saveSafetensors(plain, saved.stateDict());
    await Deno.writeFile(cut, Deno.readFileSync(good).subarray(0, -4));

    manualSeed(2);
    const model = makeModel(), optimizer = new optim.AdamW(model.parameters());
    train(model, optimizer, 0, 1);
    const otherModel = makeModel(8), otherOptimizer = new optim.AdamW(otherModel.parameters());
    const sgdModel = makeModel(), sgd = new optim.SGD(sgdModel.parameters(), { momentum: 0.9 });
    const halfModel = makeModel(), half = new optim.AdamW(halfModel.parameters().slice(0, 2));
    const all = async () => {
      const moments = optimizer.stateDict();
      const tensors = await Promise.all(Object.values(moments.tensors).map((x) => x.data()));
      for (const x of Object.values(moments.tensors)) x.dispose();
      return {
        models: await Promise.all([model, otherModel, sgdModel, halfModel].map(values)),
        optimizer: { ...moments, tensors },
        random: randomState(),
        live: [stats().liveTensors, stats().liveBytes],
      };
    };
    const before = await all();
    const cases: [string, string, Parameters<typeof loadCheckpoint>[1], string][] = [
      ["no checkpoint", plain, { model, optimizer }, "is a safetensors file, but no checkpoint; use loadSafetensors"],
      ["no optimizer", bare, { model, optimizer }, "holds no optimizer"],
      ["a cut file", cut, { model, optimizer }, "is no valid safetensors file"],
      ["no file", `${directory}/none`, { model, optimizer }, "No such file"],
      ["another shape", good, { model: otherModel, optimizer: otherOptimizer }, "must have shape"],
      ["another model", good, { model: new nn.Dropout(), optimizer }, "unexpected 0.weight"],
      ["another optimizer", good, { model: sgdModel, optimizer: sgd }, "SGD: state must be of SGD"],
      [
        "fewer parameters",
        good,
        { model: halfModel, optimizer: half },
        "AdamW: state must be of AdamW with 2 parameters",
      ],
    ];
    const wrong: string[] = [];
    for (const [name, path, into, message] of cases) {
      const { message: got } = await assertRejects(() => loadCheckpoint(path, into), Error);
      if (!got.includes(message)) wrong.push(`${name}: says ${got}`);
      const after = await all();
      for (const part of ["models", "optimizer", "random", "live"] as const) {
        if (JSON.stringify(after[part]) !== JSON.stringify(before[part])) wrong.push(`${name}: changed ${part}`);
      }
      Object.assign(before, after); // each case answers for itself
    }
    assertEquals(wrong, []);
    for (const x of [adam, optimizer, otherOptimizer, sgd, half]) x.dispose();
    for (const x of [saved, model, otherModel, sgdModel, halfModel]) x.dispose();
  });
});

Deno.test("checkpoint: does not overwrite with less unless told to", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/run`, model = makeModel(), optimizer = new optim.Adam(model.parameters());
    const small = new nn.Linear(6, 4);
    const steps = async () => (await loadCheckpoint(path, { model })).step;
    Deno.writeTextFileSync(path, ""); // an empty file is nothing to lose
    await saveCheckpoint(path, { model, step: 3 });
    await saveCheckpoint(path, { model, step: 3 });
    await saveCheckpoint(path, { model, optimizer, step: 5 }); // more
    const refused = async (checkpoint: Parameters<typeof saveCheckpoint>[1], message: string) => {
      const { message: got } = await assertRejects(() => saveCheckpoint(path, checkpoint), Error);
      assert(got.includes(message) && got.includes("overwrite: true") && got.includes(path), got);
      assertEquals([await steps(), [...Deno.readDirSync(directory)].length], [5, 1]);
    };
    await refused({ model, optimizer, step: 4 }, "is a checkpoint of step 5, and this one is of step 4");
    await refused({ model, step: 6 }, "has 8 tensors that this checkpoint lacks: optimizer.");
    await refused({ model: small, step: 6 }, "tensors that this checkpoint lacks");
    await saveCheckpoint(path, { model, step: 4 }, { overwrite: true });
    assertEquals(await steps(), 4);
    await Deno.writeFile(path, Deno.readFileSync(path).subarray(0, -8));
    await assertRejects(() => saveCheckpoint(path, { model, step: 9 }), Error, "is no checkpoint");
    await Deno.mkdir(`${path}s`);
    for (const overwrite of [false, true]) {
      await assertRejects(
        () => saveCheckpoint(`${path}s`, { model, step: 9 }, { overwrite }),
        Error,
        "saveCheckpoint: ",
      );
    }
    await Deno.remove(`${path}s`);
    Deno.writeTextFileSync(path, "a diary");
    await assertRejects(() => saveCheckpoint(path, { model, step: 9 }), Error, "is no checkpoint");
    await saveSafetensors(path, model.stateDict());
    await assertRejects(() => saveCheckpoint(path, { model, step: 9 }), Error, "is no checkpoint");
    await saveCheckpoint(path, { model, step: 9 }, { overwrite: true });
    assertEquals(await steps(), 9);
    optimizer.dispose();
    for (const m of [model, small]) m.dispose();
  });
});

Deno.test("checkpoint: a state that no run could have saved is damaged", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/run`, model = makeModel(), before = randomState();
    const tensors = Object.fromEntries(Object.entries(model.stateDict()).map(([name, x]) => [`model.${name}`, x]));
    const random = { seed: 1, counter: 1 };
    const states = [
      {},
      { step: -5, random },
      { step: 0.5, random },
      { step: 1, random: { seed: -1, counter: 1 } },
      { step: 1, random: { seed: 2 ** 32, counter: 1 } },
      { step: 1, random: { seed: 1, counter: 1e300 } },
      { step: 1, random: { seed: 1 } },
    ];
    for (const state of states) {
      await saveSafetensors(path, tensors, { limbeck: JSON.stringify(state) });
      await assertRejects(() => loadCheckpoint(path, { model }), Error, "loadCheckpoint: the state in");
      assertEquals(randomState(), before);
    }
    const tuning = { rows: {}, tiles: [1] };
    await saveSafetensors(path, tensors, { limbeck: JSON.stringify({ step: 1, random, tuning }) });
    await assertRejects(() => loadCheckpoint(path, { model }), TypeError, "loadCheckpoint: tuning.rows.one");
    assertEquals([randomState(), (await init()).tuning], [before, null]);
    model.dispose();
  });
});

Deno.test("checkpoint: wrong arguments", async () => {
  await init();
  const model = makeModel(), path = "never written";
  // deno-lint-ignore no-explicit-any
  const save = (checkpoint: any) => () => saveCheckpoint(path, checkpoint);
  await assertRejects(save({}), TypeError, "saveCheckpoint: model must be a Module, got undefined");
  await assertRejects(
    save({ model, optimizer: 5 }),
    TypeError,
    "saveCheckpoint: optimizer must be an Optimizer, got 5",
  );
  await assertRejects(save({ model, step: -1 }), RangeError, "saveCheckpoint: step must be");
  const circle: Record<string, unknown> = {};
  circle.self = [circle];
  const lost: [unknown, string][] = [
    [5n, "extra must be what JSON can hold, got 5n"],
    [{ best: Infinity }, "extra.best must be what JSON can hold, got Infinity"],
    [{ losses: [1, { mean: NaN }] }, "extra.losses[1].mean must be what JSON can hold, got NaN"],
    [new Array(1), "extra[0] must be what JSON can hold, got undefined"],
    [{ best: -0 }, "extra.best must be what JSON can hold, got -0"],
    [Object.assign([1], { mean: 2 }), "extra must be what JSON can hold, got"],
    [{ [Symbol("mean")]: 2 }, "extra must be what JSON can hold, got"],
    [{ map: new Map() }, "extra.map must be what JSON can hold, got a Map"],
    [new Float32Array(2), "extra must be what JSON can hold, got a Float32Array"],
    [{ when: new Date() }, "extra.when must be what JSON can hold, got a Date"],
    [{ f: () => 1 }, "extra.f must be what JSON can hold, got the function f"],
    [{ toJSON: () => 1 }, "extra.toJSON must be what JSON can hold, got the function toJSON"],
    [circle, "extra.self[0] must be what JSON can hold, got an object that it lies in"],
  ];
  for (const [extra, message] of lost) await assertRejects(save({ model, extra }), TypeError, message);
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => saveCheckpoint(5 as any, { model }), TypeError, "path must be a string, got 5");
  // deno-lint-ignore no-explicit-any
  const forced: any = { force: true };
  await assertRejects(
    () => saveCheckpoint(path, { model }, forced),
    TypeError,
    'unknown option "force" (known: overwrite)',
  );
  await assertRejects(save({ model, epoch: 1 }), TypeError, 'saveCheckpoint: unknown option "epoch"');
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => loadCheckpoint(path, {} as any), TypeError, "loadCheckpoint: model must be a Module");
  model.dispose();
});

Deno.test("checkpoint: saves of one path that are not awaited leave the last one", async () => {
  await init();
  const model = makeModel(), path = await Deno.makeTempFile();
  const saves = await Promise.allSettled([1, 2, 5, 4].map((step) => saveCheckpoint(path, { model, step })));
  assertEquals(saves.map(({ status }) => status), ["fulfilled", "fulfilled", "fulfilled", "rejected"]);
  assertEquals((await loadCheckpoint(path, { model })).step, 5);
  await Promise.all([1, 2, 3].map((n) => saveSafetensors(path, { x: tensor([n]) })));
  assertEquals(await (await loadSafetensors(path)).x.item(), 3);
});

Deno.test("checkpoint: a load beside a loop whose tapes are open while it reads", async () => {
  await init();
  const model = new nn.Linear(2, 2), path = await Deno.makeTempFile();
  await saveCheckpoint(path, { model, step: 3 });
  let isLoaded = false;
  const loop = async () => {
    for (let i = 0; !isLoaded; i++) {
      using _tape = new Tape();
      await (i % 50 === 0 ? new Promise((resolve) => setTimeout(resolve)) : null); // files need a turn of the event loop
    }
  };
  const running = loop();
  try {
    for (let i = 0; i < 20; i++) assertEquals((await loadCheckpoint(path, { model })).step, 3);
  } finally {
    isLoaded = true;
    await running;
    await Deno.remove(path);
  }
  model.dispose();
});

Deno.test("checkpoint: a child named optimizer, a folder for a file, and a save that fails while it waits", async () => {
  await init();
  await inDirectory(async (directory) => {
    class Odd extends nn.Module {
      optimizer = new nn.Linear(1, 1);
      model = new nn.Linear(1, 1);
      override forward(x: Tensor): Tensor {
        return x;
      }
    }
    const model = new Odd(), optimizer = new optim.AdamW(model.parameters()), path = `${directory}/odd`;
    await saveCheckpoint(path, { model, optimizer });
    const before = await values(model);
    for (const p of model.parameters()) p.assign(zeros(p.shape));
    await loadCheckpoint(path, { model, optimizer });
    assertEquals(await values(model), before);
    await assertRejects(() => saveCheckpoint(directory, { model }), RangeError, "is no file");
    const closed = new nn.Linear(1, 1);
    closed.dispose();
    const saves = [model, closed].map((model) => saveCheckpoint(path, { model }, { overwrite: true }));
    assertEquals((await Promise.allSettled(saves)).map(({ status }) => status), ["fulfilled", "rejected"]);
    optimizer.dispose();
    model.dispose();
  });
});
