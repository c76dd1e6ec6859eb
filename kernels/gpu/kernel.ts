import { checkBoolean, checkNumber, checkOneOf, checkOptions, describe, isRecord } from "../check.ts";
import { type Gpu, gpu } from "./gpu.ts";
import type { Memory } from "./memory.ts";
import type { Pipeline } from "./queue.ts";

/** How a kernel binds a buffer: `read`, or `write` (which may also read), and the element type. */
export type BufferType = `${"read" | "write"} ${"f32" | "f16" | "i32" | "u32" | "vec4f" | "vec4h" | "vec4i" | "vec4u"}`;

/** What `defineKernel` takes. Names are camelCase here and snake_case in WGSL: `dLogits` is `d_logits`. */
export interface KernelSpec {
  /** Shown in errors and profiles. */
  name: string;
  /** The buffers, in binding order. */
  buffers: Record<string, BufferType>;
  /** Scalars and sizes: they become one uniform `params`. */
  params?: Record<string, "u32" | "i32" | "f32">;
  /** Threads of a workgroup; 256 by default. */
  workgroup?: number;
  /** Whether the kernel uses subgroups (`info.subgroups` tells whether it may): `subgroup_size` and `subgroup_lane` are defined for its functions. */
  subgroups?: boolean;
  /** WGSL directives (`enable …;`, `diagnostic(…);`), which come first. */
  directives?: string;
  /** Functions and workgroup variables. */
  head?: string;
  /**
   * The body of the kernel. It sees `lane` (index of the thread in its workgroup), `group` (index of the workgroup,
   * counted through all dimensions) and `thread` (`group` times the workgroup's size plus `lane`), all u32. `group` may run past
   * the count that was asked for: compare it with a size in `params` first.
   */
  main: string;
}

/** A compute kernel that compiles at its first run on a device. */
export interface Kernel {
  /** The spec that it was defined with. */
  readonly spec: KernelSpec;
  /**
   * Encodes one dispatch of `workgroups` workgroups. Memories and params are passed by name; those that the kernel does not have are ignored, and may be
   * null.
   */
  run(buffers: Record<string, Memory | null>, params: Record<string, number>, workgroups: number): void;
  /**
   * The same with memories and params in the spec's order.
   * @internal
   */
  runInOrder(memories: readonly (Memory | null)[], params: readonly number[], workgroups: number): void;
}

/** How many parameters fit the block of a kernel. */
export const MOST_PARAMS = 64;

/** Parameters that are all u32. */
export const u32s = (...names: readonly string[]): Record<string, "u32"> =>
  Object.fromEntries(names.map((name) => [name, "u32"]));

/** Which buffers a kernel writes, in the spec's order. */
export const writesOf = ({ buffers }: KernelSpec): boolean[] =>
  Object.values(buffers).map((type) => type.startsWith("write"));

/** The name in WGSL. */
export const snake = (name: string): string => name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`);

/** The whole WGSL text of a kernel. */
export function wgsl(
  { name: _, buffers, params = {}, workgroup = 256, subgroups = false, directives = "", head = "", main }: KernelSpec,
  subgroupDirective = "",
): string {
  const f16 = Object.values(buffers).some((type) => type.endsWith("f16") || type.endsWith("vec4h"));
  const bindings = Object.entries(buffers).map(([name, type], i) => {
    const [access, element] = type.split(" ");
    return `@group(0) @binding(${i}) var<storage, ${access === "write" ? "read_write" : "read"}> ${
      snake(name)
    }: array<${element}>;`;
  });
  const fields = Object.entries(params).map(([name, type]) => `${snake(name)}: ${type}`);
  const uniform = fields.length === 0 ? "" : `struct Params { ${fields.join(", ")} }
@group(0) @binding(${bindings.length}) var<uniform> params: Params;`;
  const builtins = subgroups
    ? ", @builtin(subgroup_size) size_of_subgroup: u32, @builtin(subgroup_invocation_id) lane_of_subgroup: u32"
    : "";
  return `${f16 ? "enable f16;\n" : ""}${subgroups ? subgroupDirective : ""}${directives}
${subgroups ? `var<private> subgroup_size: u32;\nvar<private> subgroup_lane: u32;\n` : ""}${bindings.join("\n")}
${uniform}
${head}
@compute @workgroup_size(${workgroup})
fn main(@builtin(workgroup_id) group_id: vec3u, @builtin(num_workgroups) group_count: vec3u, @builtin(local_invocation_index) lane: u32${builtins}) {
  let group = group_id.x + group_id.y * group_count.x;
  let thread = group * ${workgroup}u + lane;
  ${subgroups ? "subgroup_size = size_of_subgroup; subgroup_lane = lane_of_subgroup;" : ""}
  ${main}
}
`;
}

let pipelines = 0;

function compile(spec: KernelSpec, { device, subgroupDirective }: Gpu): Pipeline {
  const writes = writesOf(spec);
  const params = Object.entries(spec.params ?? {});
  const entries = writes.map((write, binding): GPUBindGroupLayoutEntry => ({
    binding,
    visibility: 0x4, // GPUShaderStage.COMPUTE
    buffer: { type: write ? "storage" : "read-only-storage" },
  }));
  if (params.length > 0) entries.push({ binding: writes.length, visibility: 0x4, buffer: { type: "uniform" } });
  const layout = device.createBindGroupLayout({ entries });
  const module = device.createShaderModule({ label: spec.name, code: wgsl(spec, subgroupDirective) });
  const pipeline = device.createComputePipeline({
    label: spec.name,
    layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
    compute: { module, entryPoint: "main" },
  });
  const buffers = Object.keys(spec.buffers);
  return { id: pipelines++, name: spec.name, gpu: pipeline, layout, buffers, writes, params };
}

/** The values with these names. */
export function inOrder<T>(names: readonly string[], values: Record<string, T> | undefined): T[] {
  const ordered: T[] = [];
  for (let i = 0; i < names.length; i++) ordered.push(values?.[names[i]] as T);
  return ordered;
}

/**
 * Defines a compute kernel: its buffers, its parameters and its WGSL. It compiles at its first run on a device and is
 * cached. All kernels of this package are defined in this way. With `record` a kernel becomes a differentiable op.
 *
 * Throws a TypeError for a name that is not an identifier, for parameters that do not fit one 256-byte block, and for a pointer to an element or member as an
 * argument (`f(&x[i])`), which makes Deno's compiler abort the process. `run` throws for arguments that do not fit the kernel; errors that only the compiler
 * finds are thrown at the next await.
 *
 * @example
 * ```ts
 * import { defineKernel, init, tensor, zeros } from "@limbeck/limbeck";
 *
 * await init();
 * const double = defineKernel({
 *   name: "double",
 *   buffers: { x: "read f32", y: "write f32" },
 *   params: { size: "u32" },
 *   main: "if (thread < params.size) { y[thread] = 2 * x[thread]; }",
 * });
 * const x = tensor([1, 2, 3]), y = zeros([3]);
 * double.run({ x: x.memory, y: y.memory }, { size: 3 }, 1);
 * console.log(await y.array()); // [2, 4, 6]
 * ```
 */
export function defineKernel(spec: KernelSpec): Kernel {
  checkSpec(spec);
  const names = Object.keys(spec.buffers), params = Object.keys(spec.params ?? {});
  let owner: Gpu | null = null, pipeline: Pipeline;
  const runInOrder: Kernel["runInOrder"] = (memories, values, workgroups) => {
    const open = gpu(), { errors, info: { limits }, queue } = open;
    if (owner !== open) {
      checkFits(spec, open);
      const shapes = names.map((name, i) => `${name} [${memories[i]?.shape?.join(", ") ?? "?"}]`).join(", ");
      errors.open();
      pipeline = compile(spec, open);
      errors.close(() => `the WGSL of ${spec.name} (${shapes})`);
      owner = open;
    }
    const most = limits.maxComputeWorkgroupsPerDimension;
    if (!Number.isInteger(workgroups) || workgroups < 0 || workgroups > most * most) {
      checkNumber(spec.name, "workgroups", workgroups, { integer: true, min: 0, max: most * most });
    }
    if (workgroups === 0) return;
    // hardly more than `workgroups`: 65,535 × 2 for 65,536 of them, half of which would have nothing to do, cost a copy of 256 MiB 15 % on an H100
    const y = Math.ceil(workgroups / most), x = Math.ceil(workgroups / y);
    queue.dispatch(pipeline, memories, values, x, y);
  };
  return {
    spec,
    run: (buffers, values, workgroups) => runInOrder(inOrder(names, buffers), inOrder(params, values), workgroups),
    runInOrder,
  };
}

/** One kernel for each compile-time choice (a name, a number or a record of such), defined when it is first needed. */
export function variants<C extends string | number | object>(define: (choice: C) => KernelSpec): (choice: C) => Kernel {
  const made = new Map<unknown, Kernel>();
  return (choice) => {
    const key = typeof choice === "object" ? JSON.stringify(choice) : choice;
    let kernel = made.get(key);
    if (!kernel) made.set(key, kernel = defineKernel(define(choice)));
    return kernel;
  };
}

/** Loop iterations of a thread that software drivers do: they silently stop it after 65,535 in all. Some are left for other loops. */
export const MOST_TURNS = 60_000;

/**
 * Splits `count` positions into ranges, one for each launch. It is one range except on software drivers (see `MOST_TURNS`). `turns` is the most iterations
 * that a position takes, including those that end a loop. Without any position there is still one launch.
 */
export function spans(count: number, turns: number): [start: number, end: number][] {
  const step = gpu().info.isSoftware ? Math.max(1, Math.floor(MOST_TURNS / turns)) : Math.max(1, count);
  return Array.from({ length: Math.max(1, Math.ceil(count / step)) }, (_, i) => [
    i * step,
    Math.min((i + 1) * step, count),
  ]);
}

const BUFFER_TYPE = /^(read|write) (f32|f16|i32|u32|vec4f|vec4h|vec4i|vec4u)$/;

function checkSpec(spec: KernelSpec): void {
  const known = ["name", "buffers", "params", "workgroup", "subgroups", "directives", "head", "main"];
  checkOptions("defineKernel", spec, known);
  const { name, buffers, params = {}, workgroup = 256, subgroups = false, directives = "", head = "", main } = spec;
  if (typeof name !== "string") throw new TypeError(`defineKernel: name must be a string, got ${describe(name)}`);
  const op = `defineKernel: ${name}`;
  for (const [what, record] of [["buffers", buffers], ["params", params]] as const) {
    if (!isRecord(record)) {
      throw new TypeError(`${op}: ${what} must be an object of types, got ${describe(record)}`);
    }
  }
  const names = [...Object.keys(buffers), ...Object.keys(params)];
  for (const name of names) {
    if (!/^[a-z][A-Za-z0-9_]*$/.test(name)) {
      throw new TypeError(`${op}: ${describe(name)} must be a camelCase identifier`);
    }
    if (names.filter((other) => snake(other) === snake(name)).length > 1) {
      throw new TypeError(`${op}: ${describe(name)} must not come twice`);
    }
  }
  for (const [name, type] of Object.entries(buffers)) {
    if (typeof type !== "string" || !BUFFER_TYPE.test(type)) {
      throw new TypeError(`${op}: ${name} must be "read" or "write" and an element type, got ${describe(type)}`);
    }
  }
  for (const [name, type] of Object.entries(params)) checkOneOf(op, name, type, ["u32", "i32", "f32"]);
  const count = Object.keys(params).length;
  if (count > MOST_PARAMS) throw new TypeError(`${op}: at most ${MOST_PARAMS} params fit, got ${count}`);
  checkNumber(op, "workgroup", workgroup, { integer: true, min: 1 });
  checkBoolean(op, "subgroups", subgroups);
  for (const [what, text] of [["directives", directives], ["head", head], ["main", main]]) {
    if (typeof text !== "string") throw new TypeError(`${op}: ${what} must be a string of WGSL, got ${describe(text)}`);
    const pointer = elementPointer(text);
    if (pointer) {
      throw new TypeError(
        `${op}: ${what} must not pass a pointer to an element or member to a function, got ${
          describe(pointer)
        }: pass the value or the index`,
      );
    }
  }
}

/** The first argument of a WGSL call that points to an element or member, if there is one. Only built-in functions may take such pointers. */
function elementPointer(wgsl: string): string | undefined {
  const code = wgsl.replace(/\/\/.*|\/\*[\s\S]*?\*\//g, " ");
  const target = String.raw`&\s*[(*\s]*\w+[)\s]*(?:\[|\.)[^;,]*`; // &x[i], &(x[i]), &s.a, &(*p)[i]
  const named = [...code.matchAll(new RegExp(String.raw`\blet\s+(\w+)[^=;]*=\s*${target}`, "g"))].map(([, name]) =>
    name
  );
  const argument = new RegExp(`^\\s*(?:${[target, ...named.map((name) => `${name}\\s*$`)].join("|")})`);
  const calls: { name: string; from: number }[] = [];
  for (let i = 0; i < code.length; i++) {
    const call = calls.at(-1);
    if (code[i] === "(" || code[i] === "[") {
      // the name is searched at most 200 characters back: without a limit the time would grow with the square of the text
      const name = code[i] === "(" ? /(\w*)\s*$/.exec(code.slice(Math.max(0, i - 200), i))![1] : "";
      calls.push({ name, from: i + 1 });
    } else if (call && ")],".includes(code[i])) {
      const text = code.slice(call.from, i);
      const builtIn = call.name === "" ||
        /^(atomic\w+|arrayLength|workgroupUniformLoad|if|while|for|switch)$/.test(call.name);
      if (!builtIn && argument.test(text)) return `${call.name}(${text.trim()})`;
      if (code[i] === ",") call.from = i + 1;
      else calls.pop();
    }
  }
}

/** Throws unless the adapter can run the kernel. */
function checkFits({ name, buffers, workgroup = 256 }: KernelSpec, { info: { limits }, options }: Gpu): void {
  const count = Object.keys(buffers).length;
  if (count > limits.maxStorageBuffersPerShaderStage) {
    const advice = options.device ? "; init({ adapter }), without a device, asks for all that the adapter has" : "";
    throw new RangeError(
      `${name}: this device binds at most ${limits.maxStorageBuffersPerShaderStage} buffers, got ${count}${advice}`,
    );
  }
  checkNumber(name, "workgroup", workgroup, { max: limits.maxComputeInvocationsPerWorkgroup });
}
