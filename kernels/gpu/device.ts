import { checkBoolean, checkNumber, checkOneOf, checkOptions, describe, isRecord } from "../check.ts";
import { bindable } from "./memory.ts";
import { checkTuning, type Tuning } from "./tuning.ts";

/** What `init` takes. */
export interface InitOptions {
  /**
   * A device made elsewhere (by a browser, by Dawn). It remains the caller's: `dispose()` does not destroy it. Its limits are the caller's choice too: with the
   * least ones (8 buffers a kernel) `distillation` does not run. From an `adapter`, `init` requests all that it has.
   */
  device?: GPUDevice;
  /** An adapter made elsewhere, to request the device from. If it comes from the npm package `webgpu`, keep what `create` returned: without it Dawn crashes. */
  adapter?: GPUAdapter;
  /** Which adapter to request if there are several. */
  powerPreference?: "low-power" | "high-performance";
  /** Further device features to request; one that the adapter, or a device made elsewhere, lacks is a RangeError. */
  features?: string[];
  /** The most bytes of GPU memory that tensors and the pool may take together; to allocate more throws a RangeError. */
  memoryLimit?: number;
  /**
   * Whether every result is checked: the next await throws an Error that names the op and the step that first made a NaN or an infinity. An
   * intended one, such as −∞ for a masked score, counts too: mask with −1e9 (−6e4 in f16). `stats()` then also lists forgotten tensors with the lines that made
   * them. Slow; false by default.
   */
  debug?: boolean;
  /**
   * `true` measures the numbers that differ between adapters (threads and registers of row kernels, tiles of matrix products). That takes seconds;
   * `localStorage`, if there is one, keeps them for the next time. A tuning, as `info.tuning` shows it, sets them. `false`, the default, uses fixed numbers.
   */
  autotune?: boolean | Tuning;
}

/** What `init` found. */
export interface GpuInfo {
  /** One line for people: the adapter's name and driver. */
  adapter: string;
  /** The adapter's maker, as far as the runtime tells. */
  vendor: string;
  /** The adapter's family, likewise. */
  architecture: string;
  /** The adapter's own description, likewise. */
  description: string;
  /** Whether the adapter runs on the CPU (lavapipe, SwiftShader). */
  isSoftware: boolean;
  /** Whether tensors may be stored as f16. */
  f16: boolean;
  /** Whether kernels may use subgroup operations. */
  subgroups: boolean;
  /** The fewest threads that a subgroup has; 0 if it is not known or kernels may not use subgroups. */
  subgroupSize: number;
  /** Whether products of f16 run on tensor cores: Chromium's experimental subgroup matrices, on a device that was made with them. */
  tensorCores: boolean;
  /** Whether GPU timestamps can be taken. */
  timestamps: boolean;
  /** The numbers that were measured for this adapter or passed to `init`; null if the fixed ones are used. */
  tuning: Tuning | null;
  /** The device's features. */
  features: string[];
  /** The limits that matter to compute, in bytes and counts. */
  limits: {
    maxBufferSize: number;
    maxStorageBufferBindingSize: number;
    maxComputeWorkgroupStorageSize: number;
    maxComputeInvocationsPerWorkgroup: number;
    maxComputeWorkgroupsPerDimension: number;
    maxStorageBuffersPerShaderStage: number;
  };
}

/** What to install if there is no adapter, for a platform as `navigator.platform` names it. */
export function whatToInstall(platform: string): string {
  const advice = /^mac|iphone|ipad/i.test(platform)
    ? "macOS has Metal and needs no installation, but a virtual machine may hide the GPU, and Metal needs macOS 10.13 or newer"
    : /^win/i.test(platform)
    ? "Windows has Direct3D 12 and needs no installation but the GPU vendor's driver; a virtual machine or remote desktop may hide the GPU"
    : "install a Vulkan driver: your GPU vendor's, or Mesa's software driver (Debian, Ubuntu: apt-get install " +
      "mesa-vulkan-drivers; Fedora: dnf install mesa-vulkan-drivers vulkan-loader; Arch: pacman -S vulkan-swrast " +
      "vulkan-icd-loader); in a container, hand in the GPU's devices as well";
  return `init: WebGPU found no adapter${platform && ` on ${platform}`}: ${advice}`;
}

/** Throws if an option of `init` is wrong. */
export function checkInitOptions(options: InitOptions): void {
  checkOptions("init", options, [
    "device",
    "adapter",
    "powerPreference",
    "features",
    "memoryLimit",
    "debug",
    "autotune",
  ]);
  const { device, adapter, powerPreference, features, memoryLimit, debug, autotune } = options;
  const has = (x: unknown, ...names: string[]) =>
    typeof x === "object" && x !== null && names.every((name) => Reflect.get(x, name));
  if (device !== undefined && !has(device, "createShaderModule", "features", "limits", "queue", "lost")) {
    throw new TypeError(`init: device must be a GPUDevice, got ${describe(device)}`);
  }
  if (adapter !== undefined && !has(adapter, "requestDevice", "features", "limits")) {
    throw new TypeError(`init: adapter must be a GPUAdapter, got ${describe(adapter)}`);
  }
  if (powerPreference !== undefined) {
    checkOneOf("init", "powerPreference", powerPreference, ["low-power", "high-performance"]);
  }
  if (features !== undefined && !(Array.isArray(features) && features.every((f) => typeof f === "string"))) {
    throw new TypeError(`init: features must be an array of strings, got ${describe(features)}`);
  }
  if (memoryLimit !== undefined) checkNumber("init", "memoryLimit", memoryLimit, { above: 0, infinite: true });
  if (debug !== undefined) checkBoolean("init", "debug", debug);
  if (autotune === undefined || typeof autotune === "boolean") return;
  if (isRecord(autotune)) checkTuning("init: autotune", autotune);
  else throw new TypeError(`init: autotune must be true, false or a tuning, got ${describe(autotune)}`);
}

/** Whether the device compiles a kernel. */
async function compiles(device: GPUDevice, code: string): Promise<boolean> {
  device.pushErrorScope("validation");
  try {
    device.createComputePipeline({
      layout: "auto",
      compute: { module: device.createShaderModule({ code }), entryPoint: "main" },
    });
  } catch {
    // the error scope reports it
  }
  return await device.popErrorScope() === null;
}

/**
 * What a shader that uses subgroups must begin with: naga refuses the directive that Dawn demands. Null where neither compiles. Dawn also cannot see that a
 * branch by a sum of all threads is the same in all of them.
 */
export async function subgroupDirective(device: GPUDevice): Promise<string | null> {
  for (const directive of ["", "enable subgroups;\ndiagnostic(off, subgroup_uniformity);\n"]) {
    const code = `${directive}@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64) fn main(@builtin(subgroup_invocation_id) id: u32) { y[id] = subgroupAdd(1.0) + subgroupMax(1.0); }`;
    if (await compiles(device, code)) return directive;
  }
  return null;
}

const MATRICES = "chromium-experimental-subgroup-matrix" as string as GPUFeatureName; // missing in @webgpu/types

/** Whether the device multiplies fragments of 16×16 f16 and sums them in f32, with subgroups of 32. */
export async function hasTensorCores(device: GPUDevice): Promise<boolean> {
  const { subgroupMinSize, subgroupMaxSize } = device.adapterInfo ?? {}; // which older browsers lack
  if (!device.features.has(MATRICES) || subgroupMinSize !== 32 || subgroupMaxSize !== 32) {
    return false;
  }
  const of = (kind: string, element: string) => `subgroup_matrix_${kind}<${element}, 16, 16>`;
  return await compiles(
    device,
    `enable f16; enable subgroups; enable chromium_experimental_subgroup_matrix;
var<workgroup> x: array<f16, 256>;
@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(32) fn main() {
  let a = subgroupMatrixLoad<${of("left", "f16")}, row_major>(&x, 0u, 16u);
  let b = subgroupMatrixLoad<${of("right", "f16")}, col_major>(&x, 0u, 16u);
  subgroupMatrixStore<row_major>(&y, 0u, subgroupMatrixMultiplyAccumulate(a, b, ${of("result", "f32")}()), 16u);
}`,
  );
}

/** All limits of an adapter, to request for its device. */
export function limitsOf({ limits }: GPUAdapter): Record<string, number> {
  const found: Record<string, number> = {};
  for (const name in limits) { // Object.keys finds none: they are getters of the prototype
    const limit = limits[name as keyof GPUSupportedLimits];
    if (typeof limit === "number") found[name] = limit;
  }
  return found;
}

function checkFeatures(what: string, { features }: GPUAdapter | GPUDevice, asked: GPUFeatureName[]): void {
  const missing = asked.find((f) => !features.has(f));
  if (missing === undefined) return;
  throw new RangeError(`init: the ${what} lacks the feature ${describe(missing)}; it has ${[...features].join(", ")}`);
}

/** Requests a device with the adapter's full limits and the optional features that the engine can use. */
export async function openDevice(options: InitOptions): Promise<{ device: GPUDevice; info: GpuInfo }> {
  const asked = (options.features ?? []) as GPUFeatureName[];
  if (options.device) {
    checkFeatures("device", options.device, asked);
    return { device: options.device, info: describeDevice(options.device, options.device.adapterInfo) };
  }
  const webgpu = globalThis.navigator?.gpu;
  if (!webgpu && !options.adapter) {
    throw new Error(
      "init: this runtime has no WebGPU (navigator.gpu is missing): use Deno 2.9 or newer, or a browser with WebGPU",
    );
  }
  const adapter = options.adapter ?? await webgpu.requestAdapter({ powerPreference: options.powerPreference });
  if (!adapter) throw new Error(whatToInstall(globalThis.navigator?.platform ?? ""));
  const requiredLimits = limitsOf(adapter);
  const known: GPUFeatureName[] = ["timestamp-query", "shader-f16", MATRICES];
  const optional = known.filter((f) => adapter.features.has(f));
  checkFeatures("adapter", adapter, asked);
  const requiredFeatures = [...new Set([...optional, ...asked])];
  // Deno grants subgroups without listing them
  const withSubgroups = [...requiredFeatures, "subgroups"] as GPUFeatureName[];
  const device = await adapter.requestDevice({ requiredLimits, requiredFeatures: withSubgroups })
    .catch(() => adapter.requestDevice({ requiredLimits, requiredFeatures }))
    .catch((error) => {
      throw new Error(`init: the adapter gave no device: ${error?.message ?? error}`, { cause: error });
    });
  if (!device) throw new Error("init: the adapter gave no device");
  return { device, info: describeDevice(device, adapter.info) };
}

function describeDevice(device: GPUDevice, adapter: GPUAdapterInfo | undefined): GpuInfo {
  const { vendor = "", architecture = "", description = "" } = adapter ?? {};
  const name = [vendor, architecture, description, adapter?.device].filter(Boolean).join(" ");
  return {
    // Deno puts the adapter's name into `description`, Dawn into `device`
    adapter: [adapter?.device, description, name].find((text) => /[a-z]{3}/i.test(text ?? ""))?.trim() ??
      "unknown adapter",
    vendor,
    architecture,
    description,
    isSoftware: /llvmpipe|lavapipe|swiftshader|software|basic render/i.test(name),
    f16: device.features.has("shader-f16"),
    subgroups: false,
    subgroupSize: 0,
    tensorCores: false,
    timestamps: device.features.has("timestamp-query"),
    tuning: null,
    features: [...device.features].sort(),
    limits: {
      maxBufferSize: device.limits.maxBufferSize,
      maxStorageBufferBindingSize: bindable(device),
      maxComputeWorkgroupStorageSize: device.limits.maxComputeWorkgroupStorageSize,
      maxComputeInvocationsPerWorkgroup: device.limits.maxComputeInvocationsPerWorkgroup,
      maxComputeWorkgroupsPerDimension: device.limits.maxComputeWorkgroupsPerDimension,
      maxStorageBuffersPerShaderStage: device.limits.maxStorageBuffersPerShaderStage,
    },
  };
}
