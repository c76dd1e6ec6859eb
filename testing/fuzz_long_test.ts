/**
 * Every public function, constructor and method, found by reflection, with good calls and with calls of which one argument or option is wrong. A good call must not throw.
 * A bad one must throw a TypeError or a RangeError that begins with the op's name. Other tensors must be as they were, and nothing may stay, abort, or fail where nobody hears it.
 */
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import * as limbeck from "@limbeck/limbeck";
import { dispose, flush, init, nn, optim, Scope, stats, Tape, Tensor, tensor } from "@limbeck/limbeck";
import { Draw } from "./fuzz.ts";
import { directory, file, INTERNAL, SAYS } from "./fuzz_objects.ts";
import { table } from "./fuzz_table.ts";

const CALLS = 50;

// deno-lint-ignore no-explicit-any
type Run = (...values: any[]) => unknown;

/** Every public function, constructor and method by name. */
function reflect(object: object, prefix = ""): [string, Run][] {
  return Object.entries(object).flatMap(([key, value]): [string, Run][] => {
    const name = prefix + key;
    if (typeof value === "object" && value !== null) return reflect(value, `${name}.`);
    if (typeof value !== "function") return [];
    if (!/^class\b/.test(Function.prototype.toString.call(value))) return [[name, value]];
    const construct: Run = (...values) => {
      const made = new value(...values);
      (made.dispose ?? made[Symbol.dispose])?.call(made);
    };
    const called = (k: string | symbol) => `${name}.${typeof k === "symbol" ? `[${k.description}]` : k}`;
    const methods = Reflect.ownKeys(value.prototype).filter((k) =>
      k !== "constructor" && typeof Object.getOwnPropertyDescriptor(value.prototype, k)!.value === "function"
    ).map((k): [string, Run] => [called(k), (object, ...values) => object[k](...values)]);
    const statics = Object.getOwnPropertyNames(value).filter((k) => typeof value[k] === "function");
    return [[`new ${name}`, construct], ...methods, ...statics.map((k): [string, Run] => [called(k), value[k]])];
  });
}

const functions = new Map<string, Run>([
  ...reflect(limbeck),
  ["Kernel.run", (kernel, ...values) => kernel.run(...values)], // a type: no class to be found
]);

Deno.test("fuzz: every public function, constructor and method is in the table", () => {
  const names = [...functions.keys()].filter((name) => !INTERNAL.includes(name));
  assertEquals(Object.keys(table).sort(), names.sort());
});

const show = (value: unknown) =>
  value instanceof Tensor ? String(value) : Deno.inspect(value, { depth: 2 }).replace(/\s+/g, " ").slice(0, 200);

/** Calls, waits for what it gives, and walks the batches of a generator. */
async function result(run: Run, values: unknown[]): Promise<unknown> {
  const given = await run(...values);
  if (typeof (given as Iterator<unknown>)?.next === "function") { for (const _ of given as Iterable<unknown>); }
  return given;
}

/** The tensors in what a call gave. */
const tensorsIn = (y: unknown): Tensor[] =>
  y instanceof Tensor
    ? [y]
    : Array.isArray(y) || Object.getPrototypeOf(y ?? 0) === Object.prototype
    ? Object.values(y as object).flatMap(tensorsIn)
    : [];

/** Storage of a device that was disposed of. */
async function foreignStorage() {
  await init();
  const { storage } = tensor(new Float32Array(64)).keep();
  await dispose();
  await init();
  return storage;
}

async function prepareFiles() {
  using _scope = new Scope();
  await limbeck.saveSafetensors(file, { a: tensor([1, 2]), b: tensor(new Int32Array(3)) }, { note: "x" });
  const model = new nn.Linear(2, 3), optimizer = new optim.Adam(model.parameters());
  await limbeck.saveCheckpoint(`${directory}/d`, { model, optimizer });
  optimizer.dispose();
  model.dispose();
}

Deno.test("fuzz: good calls work, bad calls say what is wrong, nothing stays", async () => {
  const unheard: string[] = [];
  const listener = (event: PromiseRejectionEvent) => {
    event.preventDefault();
    unheard.push(`nobody heard ${event.reason}`);
  };
  globalThis.addEventListener("unhandledrejection", listener);
  const foreign = await foreignStorage();
  await prepareFiles();
  const complaints = new Map<string, string>(), sentinel = tensor([1, -2, 3.5]).keep();
  const complain = (name: string, what: string) =>
    complaints.set(name + what.replace(/.*: /, "").replace(/\d+/g, ""), `${name}: ${what}`);
  const live = () => `${stats().liveTensors} tensors, ${stats().liveBytes} bytes`;
  for (const [name, draw] of Object.entries(table)) {
    const before = live(), run = functions.get(name)!, [, ...parts] = name.match(/^(?:new )?(?:nn\.|optim\.)?(.*)$/)!;
    const says = [...parts, ...parts[0].split("."), ...SAYS.flatMap(([of, names]) => of.test(name) ? names : [])];
    const draws = fc.sample(fc.gen(), { seed: 1, numRuns: CALLS });
    for (const [i, value] of draws.entries()) {
      const recorded = i % 2 === 0 && !/Tape|backward|gradcheck|generate/.test(name), d = new Draw(value, foreign);
      using _memory = recorded ? new Tape() : new Scope();
      try {
        const y = await result(run, draw(d).map((a) => a.good));
        if (recorded && y instanceof Tensor && y.record) y.backward(limbeck.ones(y.shape));
        for (const x of tensorsIn(y)) x.dispose();
      } catch (error) {
        complain(name, `a good call threw ${error}`);
      }
      d.end();
    }
    for (let i = 0, most = CALLS; i < most; i++) {
      const d = new Draw(draws[i % CALLS], foreign);
      using _memory = new Scope();
      const args = draw(d), wrong = args.flatMap(({ bad }, at) => bad.map((b) => ({ at, ...b })));
      most = wrong.length && Math.max(most, wrong.length);
      if (most === 0) {
        d.end();
        break;
      }
      const { at, make, says: hint = "" } = wrong[i % wrong.length], values = args.map((a) => a.good);
      values[at] = make();
      try {
        await result(run, values);
        complain(name, `argument ${at} was taken: ${show(values[at])}`);
      } catch (error) {
        const { message } = error as Error, named = says.some((s) => message.startsWith(`${s}:`));
        const kind = error instanceof TypeError || error instanceof RangeError;
        if (!kind || !named || !message.includes(hint)) complain(name, `argument ${at}, ${show(values[at])}: ${error}`);
      }
      d.end();
    }
    if (live() !== before) complain(name, `${live()} stayed of ${before}`);
    await flush().catch((error) => complain(name, `the device says ${error}`));
    if (String(await sentinel.data()) !== "1,-2,3.5") complain(name, "another tensor was changed");
  }
  sentinel.dispose();
  await dispose();
  await new Promise((resolve) => setTimeout(resolve));
  globalThis.removeEventListener("unhandledrejection", listener);
  assertEquals([...complaints.values(), ...unheard], []);
});
