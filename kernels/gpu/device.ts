import { checkOptions, describe } from "../check.ts";

/** What `init` takes. */
export interface InitOptions {
  /** A device made elsewhere (a browser's, Dawn's); it stays its maker's: `dispose()` does not destroy it. */
  device?: GPUDevice;
  /** An adapter made elsewhere, to request the device from. */
  adapter?: GPUAdapter;
  /** Which adapter to ask for where there are several. */
  powerPreference?: "low-power" | "high-performance";
  /** Further device features to ask for; those that the adapter lacks are an error. */
  features?: string[];
  /** Most bytes of GPU memory that tensors and the pool may take together; beyond it, allocation throws a RangeError. */
  memoryLimit?: number;
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
  /** Whether GPU timestamps can be taken. */
  timestamps: boolean;
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

const WHAT_TO_INSTALL =
  "init: WebGPU found no adapter. Install a Vulkan driver: your GPU vendor's, or Mesa's software driver " +
  "(Debian, Ubuntu: apt-get install mesa-vulkan-drivers; Fedora: dnf install mesa-vulkan-drivers vulkan-loader; " +
  "Arch: pacman -S vulkan-swrast vulkan-icd-loader). macOS (Metal) and Windows (Direct3D 12) need no installation, " +
  "but a virtual machine may hide the GPU.";

/** What a shader that uses subgroups must begin with: naga refuses the directive that Dawn demands. Null where neither compiles. */
export async function subgroupDirective(device: GPUDevice): Promise<string | null> {
  for (const directive of ["", "enable subgroups;\n"]) {
    device.pushErrorScope("validation");
    const code = `${directive}@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64) fn main(@builtin(subgroup_invocation_id) id: u32) { y[id] = subgroupAdd(1.0) + subgroupMax(1.0); }`;
    try {
      device.createComputePipeline({
        layout: "auto",
        compute: { module: device.createShaderModule({ code }), entryPoint: "main" },
      });
    } catch {
      // the scope says what it was
    }
    if (await device.popErrorScope() === null) return directive;
  }
  return null;
}

/** Asks for a device with the adapter's full limits and the optional features that the engine can use. */
export async function openDevice(options: InitOptions): Promise<{ device: GPUDevice; info: GpuInfo }> {
  checkOptions("init", options, ["device", "adapter", "powerPreference", "features", "memoryLimit"]);
  if (options.device !== undefined && !(options.device?.createShaderModule instanceof Function)) {
    throw new TypeError(`init: device must be a GPUDevice, got ${describe(options.device)}`);
  }
  if (options.device) {
    return { device: options.device, info: describeDevice(options.device, options.device.adapterInfo) };
  }
  const webgpu = globalThis.navigator?.gpu;
  if (!webgpu && !options.adapter) {
    throw new Error(
      "init: this runtime has no WebGPU (navigator.gpu is missing): use Deno 2.9 or newer, or a browser with WebGPU",
    );
  }
  const adapter = options.adapter ?? await webgpu.requestAdapter({ powerPreference: options.powerPreference });
  if (!adapter) throw new Error(WHAT_TO_INSTALL);
  const requiredLimits: Record<string, number> = {};
  for (const name in adapter.limits) {
    const limit = adapter.limits[name as keyof GPUSupportedLimits];
    if (typeof limit === "number") requiredLimits[name] = limit;
  }
  const optional = ["timestamp-query", "shader-f16"].filter((f) => adapter.features.has(f));
  for (const f of options.features ?? []) {
    if (!adapter.features.has(f)) {
      throw new RangeError(
        `init: the adapter lacks the feature ${describe(f)}; it has ${[...adapter.features].join(", ")}`,
      );
    }
  }
  const requiredFeatures = [...new Set([...optional, ...options.features ?? []])] as GPUFeatureName[];
  // Deno grants subgroups without listing them
  const withSubgroups = [...requiredFeatures, "subgroups"] as GPUFeatureName[];
  const device = await adapter.requestDevice({ requiredLimits, requiredFeatures: withSubgroups })
    .catch(() => adapter.requestDevice({ requiredLimits, requiredFeatures }));
  return { device, info: describeDevice(device, adapter.info) };
}

function describeDevice(device: GPUDevice, adapter: GPUAdapterInfo | undefined): GpuInfo {
  const { vendor = "", architecture = "", description = "" } = adapter ?? {};
  const name = [vendor, architecture, description, adapter?.device].filter(Boolean).join(" ");
  return {
    adapter: (adapter?.description || name || "unknown adapter").trim(),
    vendor,
    architecture,
    description,
    isSoftware: /llvmpipe|lavapipe|swiftshader|software|basic render/i.test(name),
    f16: device.features.has("shader-f16"),
    subgroups: false,
    timestamps: device.features.has("timestamp-query"),
    features: [...device.features].sort(),
    limits: {
      maxBufferSize: device.limits.maxBufferSize,
      maxStorageBufferBindingSize: device.limits.maxStorageBufferBindingSize,
      maxComputeWorkgroupStorageSize: device.limits.maxComputeWorkgroupStorageSize,
      maxComputeInvocationsPerWorkgroup: device.limits.maxComputeInvocationsPerWorkgroup,
      maxComputeWorkgroupsPerDimension: device.limits.maxComputeWorkgroupsPerDimension,
      maxStorageBuffersPerShaderStage: device.limits.maxStorageBuffersPerShaderStage,
    },
  };
}

/**
 * What the device reports outside the call that caused it: collected here, thrown by `settle()`, that is, at the
 * next await of the engine. An error that nobody collects would leave wrong numbers and exit code 0.
 */
export class DeviceErrors {
  #messages: string[] = [];
  #pending: Promise<unknown>[] = [];
  /** Why the device is gone, once it is. */
  lost: string | null = null;

  constructor(readonly device: GPUDevice) {
    device.addEventListener("uncapturederror", (event) => {
      event.preventDefault?.();
      this.#messages.push((event as GPUUncapturedErrorEvent).error.message);
    });
    device.lost.then((info) => this.lost = `${info.reason || "unknown"}: ${info.message}`);
  }

  /** Opens error scopes over what follows; `close` collects what they caught, under a label. */
  open(): void {
    for (const filter of ["internal", "out-of-memory", "validation"] as const) this.device.pushErrorScope(filter);
  }

  close(label: () => string): void {
    for (const filter of ["validation", "out-of-memory", "internal"] as const) {
      this.#pending.push(
        this.device.popErrorScope().then(
          (error) => error && this.#messages.push(`${filter} error in ${label()}: ${error.message}`),
          (reason) => this.lost ??= String(reason),
        ),
      );
    }
  }

  /** Waits for the scopes closed so far and throws what was collected, once. */
  async settle(): Promise<void> {
    const pending = this.#pending;
    this.#pending = [];
    await Promise.all(pending);
    this.raise();
  }

  /** Throws what was collected so far, once. */
  raise(): void {
    if (this.#messages.length > 0) {
      const messages = this.#messages;
      this.#messages = [];
      throw new Error(`GPU: ${[...new Set(messages)].slice(0, 4).join("\n")}`);
    }
    if (this.lost) {
      throw new Error(`GPU: the device was lost (${this.lost}); call init() again, all tensors on it are gone`);
    }
  }
}
