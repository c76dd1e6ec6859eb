/**
 * Replaces Deno's WebGPU by Dawn, Chromium's. `deno task test:dawn` loads it before each test file, and so does `bench:report --dawn`. Run by itself, it prints
 * the adapter that Dawn finds, and exits with code 1 if there is none.
 */

// subgroup matrices, if there are tensor cores; and exact timestamps, for `bench:report --dawn`
const TOGGLES = [
  "enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia",
  "disable-dawn-features=timestamp_quantization",
];

// imported by its path, so that it is not in Deno's own configuration and lockfile
const { create, globals } = await import(
  new URL("node_modules/webgpu/index.js", import.meta.url).href
);
Object.assign(globalThis, globals);
Object.defineProperty(navigator, "gpu", { value: create(TOGGLES) });

// While a promise is pending, Dawn polls for events in a busy loop, with a new function each time; Deno then searches all of
// these functions whenever one is collected: a test of 5 s took 5 min.
Object.assign(globalThis, {
  setImmediate: (look: () => void) => setTimeout(look, 1),
});

// Dawn aborts the process if a promise is still pending at its end, as `device.lost` is if a test file does not destroy its device.
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
