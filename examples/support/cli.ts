/**
 * What every example needs on a command line: checked options, visible progress, and runs that can be stopped.
 *
 * @module
 */

import { loadSafetensorsMetadata } from "@limbeck/limbeck";
import { parseArgs } from "@std/cli/parse-args";
// @ts-types="@types/cli-progress"
import { Presets, SingleBar } from "cli-progress";

const SECONDS_A_LINE = 10;

/** The options on the command line, by name. */
export interface Options {
  /** Whether a switch such as `--quick` was given. */
  given(name: string): boolean;
  /** A whole number of at least `least`. */
  count(name: string, otherwise: number, least: number): number;
  /** A finite number between two bounds. */
  number(name: string, otherwise: number, least: number, most: number): number;
  /** A text, such as a folder. */
  text(name: string, otherwise: string): string;
  /** One of a few words. */
  choice<T extends string>(name: string, otherwise: T, words: readonly T[]): T;
}

/**
 * Reads the options with which lines of the help text begin. `--help` prints that text and exits with code 0; an unknown or wrong
 * option exits with code 2, naming the option, what was expected and what was given.
 */
export function readOptions(help: string, args: string[] = Deno.args): Options {
  const names = new Set(Array.from(help.matchAll(/^ *--([a-z]+(?:-[a-z]+)*)/gm), ([, name]) => name));
  const unknown: string[] = [];
  const given = args[0] === "--" ? args.slice(1) : args; // npm puts it before the options
  // in `--seed -5` the -5 is a value, not an option, and so is the empty text in `--out ""`
  const joined = given.length === 0 ? [] : given.join("\0").replace(/\0(?=-\d|\0|$)/g, "=").split("\0");
  // everything is read as text, so that `--seeds few` and `--quick=perhaps` are refused below instead of being guessed
  const { _: rest, ...values }: { _: string[] } & Record<string, string | undefined> = parseArgs(joined, {
    string: [...names],
    alias: { help: "h" },
    unknown: (argument: string) => (unknown.push(argument), false),
  });
  if (values.help !== undefined) {
    console.log(help);
    Deno.exit(0);
  }
  const wanted = [...names].map((name) => `--${name}`).join(", ");
  unknown.push(...rest); // arguments after a later --
  if (unknown.length > 0) failOption("unknown option", `one of ${wanted}`, `"${unknown[0]}"`);
  return {
    given(name) {
      if (values[name]) failOption(`--${name}`, "no value", `"${values[name]}"`);
      return values[name] !== undefined;
    },
    count(name, otherwise, least) {
      const value = values[name];
      if (value === undefined) return otherwise;
      if (!/^\d+$/.test(value) || Number(value) < least || Number(value) > 0x7fffffff) {
        failOption(`--${name}`, `a whole number of at least ${least}`, value ? `"${value}"` : "nothing");
      }
      return Number(value);
    },
    number(name, otherwise, least, most) {
      const value = values[name];
      if (value === undefined) return otherwise;
      const read = Number(value);
      if (value.trim() === "" || !Number.isFinite(read) || read < least || read > most) {
        const wanted = most === Infinity ? `a number of at least ${least}` : `a number from ${least} to ${most}`;
        failOption(`--${name}`, wanted, value ? `"${value}"` : "nothing");
      }
      return read;
    },
    choice(name, otherwise, words) {
      const value = values[name];
      if (value === undefined) return otherwise;
      const word = words.find((word) => word === value);
      return word ?? failOption(`--${name}`, `one of ${words.join(", ")}`, value ? `"${value}"` : "nothing");
    },
    text(name, otherwise) {
      if (values[name] === "") failOption(`--${name}`, "a value", "nothing");
      return values[name] ?? otherwise;
    },
  };
}

/** Says which option was wrong, what was expected and what was given, and exits with code 2. */
export function failOption(option: string, wanted: string, got: string): never {
  console.error(`${option}: wanted ${wanted}, got ${got} (--help lists the options)`);
  Deno.exit(2);
}

/** Makes the folder of `--out`, and checks with a temporary file that it can be written, before the long computation starts. */
export async function makeFolder(path: string): Promise<void> {
  try {
    await Deno.mkdir(path, { recursive: true });
    await Deno.remove(await Deno.makeTempFile({ dir: path }));
  } catch (error) {
    failOption("--out", "a folder that can be written", `"${path}": ${(error as Error).message}`);
  }
}

/** Arguments, quoted for a shell. */
export function quote(args: string[]): string {
  return args.map((argument) => /^[\w%+,./:=@-]+$/.test(argument) ? argument : `'${argument.replaceAll("'", "'\\''")}'`)
    .join(" ");
}

/** Tells a long run whether it is to stop. */
export interface Stop {
  /** Called after every step. */
  asked(): Promise<boolean>;
  /** Whether Ctrl-C was pressed. */
  readonly interrupted: boolean;
  /** From now on Ctrl-C ends the program at once. */
  dispose(): void;
}

/** Stops a run after the current step at Ctrl-C, or after `steps` steps as if by Ctrl-C. A second Ctrl-C ends the program at once. */
export function watchStop(steps: number = Infinity): Stop {
  const BREATH = 100; // milliseconds between turns of the event loop, in which signals arrive
  let interrupted = false;
  let left = steps;
  let lastLook = performance.now();
  const listener = () => {
    interrupted = true;
    Deno.removeSignalListener("SIGINT", listener);
  };
  Deno.addSignalListener("SIGINT", listener);
  return {
    async asked() {
      if (performance.now() - lastLook > BREATH) {
        await new Promise((resolve) => setTimeout(resolve));
        lastLook = performance.now();
      }
      return interrupted || left-- <= 0;
    },
    get interrupted() {
      return interrupted;
    },
    dispose: () => interrupted || Deno.removeSignalListener("SIGINT", listener),
  };
}

/** Removes the checkpoint of a stopped run with this setting, after a run with it has finished. A checkpoint with another setting stays. */
export async function removeCheckpoint(path: string, setting: unknown): Promise<void> {
  const { limbeck = "{}" } = await loadSafetensorsMetadata(path).catch((): Record<string, string> => ({}));
  const { extra } = JSON.parse(limbeck);
  if (JSON.stringify(extra?.setting) === JSON.stringify(setting)) await Deno.remove(path);
}

/** Progress of a long run, on standard error: a bar on a terminal, elsewhere a plain line every few seconds. */
export interface Progress {
  /** Adds `steps` done steps; `what` is shown. */
  advance(steps: number, what: string): void;
  stop(): void;
}

/** Shows progress towards `total` steps, `before` of which an earlier run has done, with the rate and the time left. */
export function showProgress(total: number, before: number): Progress {
  const format = "{bar} {percentage} %{pace}";
  // shows nothing without a terminal; does not change line wrapping, so that Ctrl-C need not restore it
  const bar = new SingleBar({ format, barsize: 16, linewrap: true }, Presets.shades_classic);
  bar.start(total, before, { pace: "" });
  const started = performance.now();
  let lastLine = started;
  let done = before;
  return {
    advance(steps, what) {
      done += steps;
      const now = performance.now();
      const rate = 1000 * (done - before) / (now - started);
      const pace = ` | ${rate.toFixed(0)} steps/s | ${formatSeconds((total - done) / rate)} left | ${what}`;
      bar.update(done, { pace });
      if (Deno.stderr.isTerminal() || (now - lastLine < SECONDS_A_LINE * 1000 && done < total)) return;
      lastLine = now;
      console.error(`${Math.floor(100 * done / total)} %${pace}`);
    },
    stop: () => bar.stop(),
  };
}

function formatSeconds(seconds: number): string {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
