/**
 * `deno task test:dawn [FILE…]`: the tests on a second implementation of WebGPU, Dawn, from the npm package `webgpu`. Without a GPU
 * it runs on SwiftShader, Chromium's software Vulkan, because Dawn refuses older releases of Mesa's. If one of the two is not
 * available, it says so in one line and exits with code 0.
 */

const HERE = "testing/dawn";
const SWIFTSHADER = "vk_swiftshader_icd.json";
const BROUGHT = ".limbeck/swiftshader";
const PLACES = [
  "/usr/lib/chromium",
  "/usr/lib/chromium-browser",
  "/usr/lib64/chromium-browser",
  "/opt/google/chrome",
];
const DEBIAN = `mkdir -p ${BROUGHT} && cd ${BROUGHT} && { apt-get download chromium-common ||
  { apt-get update && apt-get download chromium-common; }; } && dpkg-deb --fsys-tarfile chromium-common_*.deb |
  tar -x --strip-components=4 ./usr/lib/chromium/libvk_swiftshader.so ./usr/lib/chromium/${SWIFTSHADER}
  rm -f chromium-common_*.deb; test -f ${SWIFTSHADER}`;

function notRun(why: string, output: string = ""): never {
  console.error(output.trim());
  console.log(`test:dawn: not run: ${why}`);
  Deno.exit(0);
}

/** Runs a command; returns whether it succeeded, and what it printed. */
function run(
  command: string,
  args: string[],
  env: Record<string, string> = {},
): { ok: boolean; output: string } {
  try {
    const { success, stdout, stderr } = new Deno.Command(command, {
      args,
      env,
      stdin: "null",
    }).outputSync();
    const text = new TextDecoder();
    return { ok: success, output: text.decode(stdout) + text.decode(stderr) };
  } catch (error) {
    return { ok: false, output: `${error}` };
  }
}

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** The file that tells Vulkan's loader about SwiftShader; if missing, it is downloaded with Debian's Chromium (31 MB, nothing is installed). */
function findSwiftShader(): string {
  const found = [...PLACES, `${Deno.cwd()}/${BROUGHT}`].map((place) => `${place}/${SWIFTSHADER}`);
  const there = () => found.find(exists);
  if (!there()) {
    console.log(
      "test:dawn: bringing SwiftShader from Debian's package chromium-common",
    );
    const { ok, output } = run("sh", ["-c", DEBIAN]);
    if (!ok) {
      notRun(
        "there is no SwiftShader: install Chromium, or name a Vulkan driver in VK_DRIVER_FILES",
        output,
      );
    }
  }
  return there()!;
}

const installed = run("deno", [
  "install",
  "--config",
  `${HERE}/deno.json`,
  "--frozen",
]);
if (!installed.ok) {
  notRun("the npm package webgpu could not be brought", installed.output);
}

const env: Record<string, string> = {};
if (Deno.build.os === "linux" && !Deno.env.has("VK_DRIVER_FILES")) {
  const driver = findSwiftShader();
  env.VK_DRIVER_FILES = env.VK_ICD_FILENAMES = driver; // older loaders read the second
}
const leave = [
  "--no-prompt",
  "--allow-read=.",
  `--allow-ffi=${HERE}/node_modules`,
];
const adapter = run("deno", ["run", ...leave, `${HERE}/preload.ts`], env);
if (!adapter.ok) notRun("Dawn finds no adapter", adapter.output);
console.log(`test:dawn: ${adapter.output.trim()}`);

// left out: the examples and other tests that start a process, which runs on Deno's WebGPU; and a test that opens and ends some twenty devices, since Deno's
// node API panics in about a third of the runs after collecting so many devices of Dawn
const everything = [
  "--doc",
  "--ignore=**/*_long_test.ts,examples,tasks,kernels/gpu/dispose_test.ts",
];
const child = new Deno.Command("deno", {
  args: [
    "test",
    ...leave,
    "--allow-write=.limbeck/tmp",
    "--allow-run=deno",
    `--preload=${HERE}/preload.ts`,
    ...Deno.args.length > 0 ? Deno.args : everything,
  ],
  env,
}).spawn();
Deno.exit((await child.status).code);
