/**
 * Puts Dawn, Chromium's WebGPU, in the place of Deno's own: loaded in front of each test file by `deno task test:dawn`, and by `bench:report --dawn`.
 * Run by itself it prints the adapter that Dawn finds, and ends with exit code 1 where there is none.
 */

// subgroup matrices, where there are tensor cores; and timestamps as the GPU takes them, for `bench:report --dawn`
const TOGGLES = [
  "enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia",
  "disable-dawn-features=timestamp_quantization",
];

// by its path, so that Deno's own configuration and lockfile know nothing of it
const { create, globals } = await import(
  new URL("node_modules/webgpu/index.js", import.meta.url).href
);
Object.assign(globalThis, globals);
Object.defineProperty(navigator, "gpu", { value: create(TOGGLES) });

// While a promise waits, Dawn looks for events in a busy loop, a new function for each look; Deno then searches all of
// them whenever one is collected: a test of 5 s took 5 min.
Object.assign(globalThis, {
  setImmediate: (look: () => void) => setTimeout(look, 1),
});

// Dawn aborts the process when a promise ends unresolved, as `device.lost` does where a test file leaves its device.
const devices: GPUDevice[] = [];
const { requestDevice } = globals.GPUAdapter.prototype;
globals.GPUAdapter.prototype.requestDevice = async function (
  descriptor: GPUDeviceDescriptor,
) {
  const device = await requestDevice.call(this, descriptor);
  devices.push(device);
  return device;
};
async function destroyAll() {
  for (const device of devices) device.destroy();
  await Promise.all(devices.map(({ lost }) => lost));
}

if (import.meta.main) {
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) Deno.exit(1);
  console.log(
    `Dawn on ${
      adapter.info.description || adapter.info.device ||
      "an adapter without a name"
    }`,
  );
} else {
  Deno.test.afterAll(destroyAll);
}
