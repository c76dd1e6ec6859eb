/** Several launches in one dispatch: their kernels' texts are joined. */
import { gpu } from "./gpu.ts";
import { defineKernel, type Kernel, type KernelSpec, MOST_PARAMS, snake, u32s } from "./kernel.ts";
import type { Memory } from "./memory.ts";

/** A dispatch without its buffers. */
export interface Launch {
  kernel: Kernel;
  params: Record<string, number>;
  workgroups: number;
}

type Buffers = Record<string, Memory>;

/** Kernels in one, and the names that their buffers and parameters have there. */
interface Joined {
  kernel: Kernel;
  buffers: string[][];
  params: string[][];
}

/** A sequence of kernels: what joins them, if anyone asked, and the sequences that begin with them. */
interface Sequence {
  joined: Joined | null;
  next: WeakMap<Kernel, Sequence>;
}

const empty: Sequence = { joined: null, next: new WeakMap() };

function joinedOf(kernels: readonly Kernel[]): Joined {
  let sequence = empty;
  for (const kernel of kernels) {
    let next = sequence.next.get(kernel);
    if (!next) sequence.next.set(kernel, next = { joined: null, next: new WeakMap() });
    sequence = next;
  }
  return sequence.joined ??= join(kernels.map(({ spec }) => spec));
}

/** How many buffers and parameters a kernel has. */
const buffersOf = ({ spec }: Kernel) => Object.keys(spec.buffers).length;
const paramsOf = ({ spec }: Kernel) => Object.keys(spec.params ?? {}).length;

/** A function that runs launches as one, given the buffers of each. None may use what another one writes. */
function runnerOf(launches: readonly Launch[]): (buffers: readonly Buffers[]) => void {
  const { kernel, ...names } = joinedOf(launches.map(({ kernel }) => kernel)), params: Record<string, number> = {};
  let workgroups = 0;
  launches.forEach((launch, i) => {
    if (i > 0) params[`begin_${i}`] = workgroups;
    Object.keys(launch.kernel.spec.params ?? {}).forEach((name, j) => params[names.params[i][j]] = launch.params[name]);
    workgroups += launch.workgroups;
  });
  const own = launches.map(({ kernel }) => Object.keys(kernel.spec.buffers));
  return (buffers) => {
    const all: Buffers = {};
    for (let i = 0; i < own.length; i++) {
      for (let j = 0; j < own[i].length; j++) all[names.buffers[i][j]] = buffers[i][own[i][j]];
    }
    kernel.run(all, params, workgroups);
  };
}

const runAlone = ({ kernel, params, workgroups }: Launch, buffers: Buffers) => kernel.run(buffers, params, workgroups);

const writes = ({ buffers }: KernelSpec, name: string) => buffers[name].startsWith("write");

/** Whether a launch, with the buffers in `b`, writes a buffer that the other one binds: WebGPU forbids that in one dispatch, even for parts of a buffer. */
function writesInto({ spec }: Kernel, b: Buffers, other: Buffers): boolean {
  for (const name in spec.buffers) {
    if (!writes(spec, name)) continue;
    for (const bound in other) if (b[name].buffer === other[bound].buffer) return true;
  }
  return false;
}

/**
 * A function that runs two launches as one, given the buffers of both; neither may read what the other writes. Two small launches fill a GPU together, and the
 * host encodes only one (both gradients of a product of 2048×512×128 take an H100 25 µs instead of 29). Null if their workgroups differ in size or the device
 * binds too few buffers.
 */
export function pairOf(a: Launch, b: Launch): ((first: Buffers, second: Buffers) => void) | null {
  const { maxStorageBuffersPerShaderStage: most } = gpu().info.limits;
  if (a.kernel.spec.workgroup !== b.kernel.spec.workgroup || buffersOf(a.kernel) + buffersOf(b.kernel) > most) {
    return null;
  }
  const run = runnerOf([a, b]);
  return (first, second) => {
    if (!writesInto(a.kernel, first, second) && !writesInto(b.kernel, second, first)) return run([first, second]);
    runAlone(a, first);
    runAlone(b, second);
  };
}

/** A launch that waits, its buffers, and what to do afterwards. */
interface Waiting {
  launch: Launch;
  buffers: Buffers;
  release: () => void;
}

/** Bytes that waiting launches bind at most: they keep memory from being used again. */
const MOST_BYTES = 2 ** 24;

/** Launches that wait for others, to share a dispatch with them. */
export class Gathering {
  #waiting: Waiting[] = [];
  #written = new Set<GPUBuffer>();
  #read = new Set<GPUBuffer>();
  #buffers = 0;
  #params = 0;
  #bytes = 0;

  add(launch: Launch, buffers: Buffers, release: () => void): void {
    const { kernel, kernel: { spec } } = launch, names = Object.keys(spec.buffers);
    const bytes = names.reduce((sum, name) => sum + buffers[name].bytes, 0);
    const isMet = names.some((name) => {
      const { buffer, awaited } = buffers[name];
      return writes(spec, name) ? awaited || this.#read.has(buffer) : this.#written.has(buffer);
    });
    const first = this.#waiting.at(0)?.launch.kernel.spec;
    if (
      first && (isMet || spec.workgroup !== first.workgroup || this.#bytes + bytes > MOST_BYTES ||
        this.#buffers + names.length > gpu().info.limits.maxStorageBuffersPerShaderStage ||
        this.#params + paramsOf(kernel) + 1 > MOST_PARAMS)
    ) this.settle();
    this.#waiting.push({ launch, buffers, release });
    this.#buffers += names.length;
    this.#params += paramsOf(kernel) + 1; // one for where its workgroups begin
    this.#bytes += bytes;
    for (const name of names) {
      (writes(spec, name) ? this.#written : this.#read).add(buffers[name].buffer);
      buffers[name].awaited = writes(spec, name) ? "write" : "read";
    }
  }

  /** Runs what waits. */
  settle(): void {
    const all = this.#waiting;
    this.#waiting = [];
    this.#written.clear();
    this.#read.clear();
    this.#buffers = this.#params = this.#bytes = 0;
    for (const { buffers } of all) for (const name in buffers) buffers[name].awaited = null;
    try {
      if (all.length === 1) runAlone(all[0].launch, all[0].buffers);
      else if (all.length > 1) runnerOf(all.map(({ launch }) => launch))(all.map(({ buffers }) => buffers));
    } finally {
      for (const { release } of all) release();
    }
  }
}

/**
 * Runs `fn`. Launches that it hands to `later` wait for others, up to its end, and share a dispatch with them; a launch that uses their results, or writes what
 * they read, makes them run before. The step of a GPT of 4 layers of 128 features takes an H100 75 dispatches and 1.03 ms instead of 98 and 1.10. On a CPU
 * launches do not wait: there, compiling a kernel for each sequence costs more than the launches.
 */
export function gathered(fn: () => void): void {
  const { queue, info } = gpu();
  if (queue.gathering !== null || !(gatherTuning.on ?? !info.isSoftware)) return fn();
  const gathering = queue.gathering = new Gathering();
  try {
    fn();
  } finally {
    queue.gathering = null;
    gathering.settle();
  }
}

/** Override for tests: whether launches wait for others. */
export const gatherTuning: { on: boolean | null } = { on: null };

/**
 * Runs a launch whose results are not needed soon, at once or later. `release` is called when it was encoded: whoever frees its buffers before makes it run
 * alone, as they are taken again.
 */
export function later(launch: Launch, buffers: Buffers, release: () => void): void {
  const { gathering } = gpu().queue;
  // one that the device refused throws now, and harms no other launch
  if (gathering && !Object.values(buffers).some(({ refused }) => refused)) {
    return gathering.add(launch, buffers, release);
  }
  try {
    runAlone(launch, buffers);
  } finally {
    release();
  }
}

/**
 * Kernels as one, of which each runs the next of the workgroups. The names of all but the first get a number; a workgroup variable that several declare with
 * the same words is shared.
 */
function join(specs: readonly KernelSpec[]): Joined {
  const [{ workgroup = 256 }] = specs, variable = /var<workgroup> (\w+)[^;]*;/g, shared = new Map<string, string>();
  const parts = specs.map(({ buffers, params = {}, head = "", main }, i) => {
    const numbered = (name: string) => i === 0 ? name : `${name}_no${i}`;
    let outer = head; // without the bodies of functions
    for (let all = ""; all !== outer;) [all, outer] = [outer, outer.replace(/\{[^{}]*\}/g, "")];
    const declared = [...outer.matchAll(/\b(?:fn|const|var(?:<\w+>)?)\s+(\w+)/g)].map(([, name]) => name);
    const names = new Map(
      ["group", "thread", ...declared, ...Object.keys(buffers).map(snake)].map((name) => [name, numbered(name)]),
    );
    const own = head.replace(variable, (text, name) => {
      const earlier = shared.get(text);
      if (earlier) names.set(name, earlier);
      else shared.set(text, numbered(name));
      return earlier ? "" : text;
    });
    const word = new RegExp(`(?<![.\\w])(${[...names.keys()].join("|")})\\b`, "g");
    const renamed = (text: string) =>
      i === 0
        ? text
        : text.replace(word, (name) => names.get(name)!).replace(/\bparams\.(\w+)/g, (_, name) =>
          `params.${numbered(name)}`);
    return {
      buffers: Object.entries(buffers).map(([name, type]) => [numbered(name), type] as const),
      params: Object.entries(params).map(([name, type]) => [numbered(name), type] as const),
      head: renamed(own),
      main: `{
    ${
        i === 0 ? "" : `let ${numbered("group")} = group - params.begin_${i};
    let ${numbered("thread")} = ${numbered("group")} * ${workgroup}u + lane;`
      }
    ${renamed(main)}
  }`,
    };
  });
  const names = specs.map(({ name }) => name);
  const kernel = defineKernel({
    name: [...new Set(names)].map((name) => {
      const count = names.filter((other) => other === name).length;
      return count > 1 ? `${name} ×${count}` : name;
    }).join(", "),
    buffers: Object.fromEntries(parts.flatMap(({ buffers }) => buffers)),
    params: {
      ...Object.fromEntries(parts.flatMap(({ params }) => params)),
      ...u32s(...specs.slice(1).map((_, i) => `begin_${i + 1}`)),
    },
    workgroup,
    subgroups: specs.some(({ subgroups }) => subgroups),
    directives: [...new Set(specs.map(({ directives = "" }) => directives))].join(""),
    head: parts.map(({ head }) => head).join("\n"),
    main: parts.map(({ main }, i) => i + 1 < specs.length ? `if (group < params.begin_${i + 1}) ${main} else ` : main)
      .join(""),
  });
  return {
    kernel,
    buffers: parts.map(({ buffers }) => buffers.map(([name]) => name)),
    params: parts.map(({ params }) => params.map(([name]) => name)),
  };
}
