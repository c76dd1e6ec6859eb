/**
 * Runs the same work in other libraries on the same adapter, and prints the ratios as a table.
 *
 *     deno task bench:peers --help
 *
 * @module
 */

import { dispose, init } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { max, sum } from "d3-array";
import { failOption, readOptions } from "../../examples/support/cli.ts";
import { alignTable } from "../../examples/support/report.ts";
import type { Answer } from "./worker.ts";
import type { Task } from "./work.ts";

const HERE = import.meta.dirname!, OUT = `${HERE}/../../out/peers`;

/** A peer's time for a task, or why there is none. */
type Found = { milliseconds: number } | { missing: string };

interface Column {
  title: string;
  found: Map<string, Found>;
}

const HELP = `Times the same work here and in jax-js, tfjs and PyTorch, and prints a table of ratios.

  deno task bench:peers [options]

  --tasks WORD     software or gpu: which tasks of tasks.json (by the adapter)
  --only TEXT      only tasks whose name has this in it
  --seconds N      how long a peer may take for a task (120); PyTorch, which does all in one process, has 20 minutes
  --help           this text`;

interface Output {
  code: number;
  stdout: string;
  stderr: string;
  late: boolean;
}

/** Runs a program in this folder, for at most `seconds` seconds. */
async function run(command: string, args: string[], seconds = 600): Promise<Output> {
  let late = false;
  try {
    const child = new Deno.Command(command, {
      args,
      cwd: HERE,
      env: { NO_COLOR: "1" },
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const timer = setTimeout(() => {
      late = true;
      child.kill("SIGKILL");
    }, 1000 * seconds);
    const { code, stdout, stderr } = await child.output();
    clearTimeout(timer);
    const text = new TextDecoder();
    return { code, stdout: text.decode(stdout), stderr: text.decode(stderr), late };
  } catch (error) { // there is no such program
    return { code: -1, stdout: "", stderr: `error: ${(error as Error).message}`, late };
  }
}

/**
 * Installs the peers into this folder and bundles each into one file; returns the reason if that fails. The bundles are kept, so that
 * they can be copied to a machine without a network.
 */
async function bundle(): Promise<string | null> {
  const config = ["--quiet", "--config", "deno.json", "--frozen"];
  const installed = await run("deno", ["install", ...config]);
  if (installed.code !== 0) return why(installed);
  const bundles = ["bundles/jax.js", "bundles/tfjs.js"];
  const bundled = await run("deno", ["bundle", ...config, "--platform", "deno", "--outdir", OUT, ...bundles]);
  return bundled.code === 0 ? null : why(bundled);
}

const isFile = (path: string) => Deno.stat(path).then(({ isFile }) => isFile, () => false);

/** The line of the output that says what was wrong. */
function why({ stderr, code, late }: Output): string {
  if (late) return "did not finish";
  const lines = stderr.split("\n").filter((line) => line.trim() !== "");
  return (lines.find((line) => /error/i.test(line) && !line.includes("XDG_RUNTIME_DIR")) ?? `exit code ${code}`).trim();
}

/** The largest difference of two results over their parts, relative to a part's largest number or to its sum. */
function distance(a: number[][], b: number[][]): number {
  if (a.length !== b.length || a.some((part, i) => part.length !== b[i].length)) return Infinity;
  const shares = a.flatMap((part, i) => {
    const off = part.map((x, j) => Math.abs(x - b[i][j])), magnitudes = b[i].map(Math.abs);
    return [max(off)! / max(magnitudes)!, sum(off) / sum(magnitudes)];
  });
  return a.flat().some(Number.isNaN) ? NaN : Math.max(...shares); // d3's max and sum ignore NaN
}

/** The allowed difference: f32 sums have up to 10⁵ terms, and training magnifies their roundings. */
const allowed = (task: Task) => task.kind === "mlp" || task.kind === "gpt" ? 1e-3 : 2e-5;

/** Checks a peer's answer against ours, which is missing if our run failed. */
function judge(task: Task, answer: Answer, wanted?: number[][]): Found {
  if (answer.milliseconds === null) return { missing: "–" };
  if (wanted === undefined) return { missing: "not checked" };
  const off = distance(answer.result, wanted);
  if (!(off <= allowed(task))) return { missing: `wrong: off by ${off.toExponential(1)}` };
  return { milliseconds: answer.milliseconds };
}

async function runWorker(file: string, task: Task, seconds: number): Promise<Answer | string> {
  const leave = ["--no-check", "--no-prompt", "--allow-read=.,../../out", "--allow-env"];
  const args = [
    "run",
    "--quiet",
    "--config",
    "../../deno.json",
    "--frozen",
    ...leave,
    "worker.ts",
    file,
    JSON.stringify(task),
  ];
  const output = await run("deno", args, seconds);
  const line = output.stdout.trim().split("\n").at(-1)!;
  if (output.code !== 0 || !line.startsWith("{")) return output.late ? `not in ${seconds} s` : why(output);
  return JSON.parse(line);
}

async function main(): Promise<void> {
  const options = readOptions(HELP);
  const { adapter, isSoftware } = await init();
  await dispose(); // the workers open it again, one after the other
  const lists: Record<"software" | "gpu", Task[]> = JSON.parse(await Deno.readTextFile(`${HERE}/tasks.json`));
  const kind = options.choice("tasks", isSoftware ? "software" : "gpu", ["software", "gpu"]);
  const only = options.text("only", "");
  const tasks = lists[kind].filter(({ name }) => name.includes(only));
  if (tasks.length === 0) {
    failOption("--only", `a part of a name (${lists[kind].map(({ name }) => name).join(", ")})`, `"${only}"`);
  }
  const seconds = options.count("seconds", 120, 1);
  await Deno.mkdir(OUT, { recursive: true });

  const notes: string[] = [];
  const reason = await bundle();
  const { imports }: { imports: Record<string, string> } = JSON.parse(await Deno.readTextFile(`${HERE}/deno.json`));
  const version = (name: string) => imports[name].split("@").at(-1);
  const peers = {
    ours: "limbeck",
    jax: `jax-js ${version("@jax-js/jax")}`,
    tfjs: `tfjs ${version("@tensorflow/tfjs-core")}`,
  };
  const own = new Map<string, { result: number[][] }>();
  const all = Object.entries(peers).map(([file, title]): Column & { file: string } => ({
    file,
    title,
    found: new Map(),
  }));
  const here: typeof all = [];
  for (const peer of all) {
    if (peer.file === "ours" || await isFile(`${OUT}/${peer.file}.js`)) here.push(peer);
    else notes.push(`${peer.title} is not here: ${reason}`);
  }
  for (const task of tasks) {
    // all libraries directly after each other, so that the machine is in the same state
    for (const { file, title, found } of here) {
      const answer = await runWorker(file, task, seconds);
      console.error(`${title}: ${task.name}`);
      if (typeof answer === "string") {
        found.set(task.name, { missing: "failed" });
        notes.push(`${title}, ${task.name}: ${answer}`);
      } else if (file === "ours") {
        found.set(task.name, { milliseconds: answer.milliseconds! });
        own.set(task.name, answer);
      } else {
        found.set(task.name, judge(task, answer, own.get(task.name)?.result));
      }
    }
  }
  const columns: Column[] = [...all, ...await runTorch(tasks, own, notes)];

  console.log(`${adapter}, ${new Date().toISOString().slice(0, 10)}, Deno ${Deno.version.deno}\n`);
  console.log(formatRatios(tasks, columns));
  console.log(
    "\nMilliseconds per step of many in a row, and in brackets how many times ours that is. Only results that agree with ours have one.",
  );
  for (const note of notes) console.log(`- ${note}`);
}

/** PyTorch's columns, one for each way that it runs. */
async function runTorch(tasks: Task[], own: Map<string, { result: number[][] }>, notes: string[]): Promise<Column[]> {
  const output = await run("python3", ["torch_losses.py", "--json", JSON.stringify(tasks)], 1200);
  const line = output.stdout.trim().split("\n").at(-1)!;
  if (output.code !== 0 || !line.startsWith("{")) {
    notes.push(`PyTorch is not here: ${why(output)}`);
    return [{ title: "PyTorch", found: new Map() }];
  }
  const { version, columns, notes: more }: {
    version: string;
    columns: Record<string, Record<string, Answer>>;
    notes: string[];
  } = JSON.parse(line);
  notes.push(`PyTorch ${version}`, ...more);
  return Object.entries(columns).map(([title, answers]) => ({
    title,
    found: new Map(
      tasks.filter(({ name }) => name in answers)
        .map((task) => [task.name, judge(task, answers[task.name], own.get(task.name)?.result)]),
    ),
  }));
}

function formatRatios(tasks: Task[], columns: Column[]): string {
  const cell = (milliseconds: number) => milliseconds >= 100 ? milliseconds.toFixed(0) : milliseconds.toPrecision(3);
  return alignTable([
    ["ms (times ours)", ...columns.map(({ title }) => title)],
    ...tasks.map(({ name }) => [
      name,
      ...columns.map(({ found }, i) => {
        const own = columns[0].found.get(name), here = found.get(name);
        if (!here) return found.size > 0 ? "–" : "not here";
        if ("missing" in here) return here.missing;
        if (i === 0 || !own || "missing" in own) return cell(here.milliseconds);
        return `${cell(here.milliseconds)} (${(here.milliseconds / own.milliseconds).toFixed(2)} ×)`;
      }),
    ]),
  ]);
}

if (import.meta.main) await main();
