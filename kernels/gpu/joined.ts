/** Two launches as one: their kernels' texts are joined. */
import { gpu } from "./gpu.ts";
import { defineKernel, type Kernel, type KernelSpec, snake } from "./kernel.ts";
import type { Memory } from "./memory.ts";

/** A dispatch without its buffers. */
export interface Launch {
  kernel: Kernel;
  params: Record<string, number>;
  workgroups: number;
}

const joined = new WeakMap<Kernel, WeakMap<Kernel, Kernel>>();

/**
 * A function that runs two launches as one, given the buffers of both; neither may read what the other writes. Two small launches fill a GPU together, and the
 * host encodes only one (both gradients of a product of 2048×512×128 take an H100 25 µs instead of 29). Null if their workgroups differ in size or the device
 * binds too few buffers.
 */
export function pairOf(
  a: Launch,
  b: Launch,
): ((first: Record<string, Memory>, second: Record<string, Memory>) => void) | null {
  const [one, two] = [a.kernel.spec, b.kernel.spec], names = Object.keys(two.buffers);
  const { maxStorageBuffersPerShaderStage: most } = gpu().info.limits;
  if (one.workgroup !== two.workgroup || Object.keys(one.buffers).length + names.length > most) return null;
  const kernels = joined.get(a.kernel) ?? new WeakMap(), kernel = kernels.get(b.kernel) ?? defineKernel(both(one, two));
  joined.set(a.kernel, kernels);
  kernels.set(b.kernel, kernel);
  const renamed = names.map((name) => `${name}_b`);
  const params = { ...a.params, ...suffixed(b.params), split: a.workgroups }, workgroups = a.workgroups + b.workgroups;
  const writes = [one, two].map(({ buffers }) =>
    Object.keys(buffers).filter((name) => buffers[name].startsWith("write"))
  );
  // WebGPU lets neither bind a buffer that the other writes, not even another part of it
  const meet = (writes: string[], buffers: Record<string, Memory>, others: Record<string, Memory>) => {
    for (const name of writes) {
      for (const other in others) if (buffers[name].buffer === others[other].buffer) return true;
    }
    return false;
  };
  return (first, second) => {
    if (meet(writes[0], first, second) || meet(writes[1], second, first)) {
      a.kernel.run(first, a.params, a.workgroups);
      b.kernel.run(second, b.params, b.workgroups);
      return;
    }
    const buffers = { ...first };
    for (let i = 0; i < names.length; i++) buffers[renamed[i]] = second[names[i]];
    kernel.run(buffers, params, workgroups);
  };
}

const suffixed = <T>(record: Record<string, T>): Record<string, T> =>
  Object.fromEntries(Object.entries(record).map(([name, value]) => [`${name}_b`, value]));

/**
 * Two kernels as one: the first `split` workgroups run a, the others b. The names of b get the suffix `_b`; a workgroup variable that both declare with the
 * same words is shared.
 */
function both(a: KernelSpec, b: KernelSpec): KernelSpec {
  const variable = /var<workgroup> .*;/g, common = new Set(a.head?.match(variable));
  const head = (b.head ?? "").replace(variable, (text) => common.has(text) ? "" : text);
  let outer = head; // without the bodies of functions
  for (let all = ""; all !== outer;) [all, outer] = [outer, outer.replace(/\{[^{}]*\}/g, "")];
  const declared = [...outer.matchAll(/\b(?:fn|const|var(?:<\w+>)?)\s+(\w+)/g)].map(([, name]) => name);
  const names = ["group", "thread", ...declared, ...Object.keys(b.buffers).map(snake)].join("|");
  const renamed = (text: string) =>
    text.replace(new RegExp(`(?<![.\\w])(${names})\\b`, "g"), "$1_b").replace(/\bparams\.(\w+)/g, "params.$1_b");
  return {
    name: a.name === b.name ? `${a.name} ×2` : `${a.name}, ${b.name}`,
    buffers: { ...a.buffers, ...suffixed(b.buffers) },
    params: { ...a.params, ...suffixed(b.params ?? {}), split: "u32" },
    workgroup: a.workgroup,
    subgroups: a.subgroups || b.subgroups,
    directives: `${a.directives ?? ""}${b.directives ?? ""}`,
    head: `${a.head ?? ""}\n${renamed(head)}`,
    main: `if (group < params.split) {
    ${a.main}
  } else {
    let group_b = group - params.split;
    let thread_b = group_b * ${a.workgroup ?? 256}u + lane;
    ${renamed(b.main)}
  }`,
  };
}
