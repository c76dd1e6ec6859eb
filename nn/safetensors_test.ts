import { Buffer } from "node:buffer";
import { assert, assertEquals, assertRejects } from "@std/assert";
import {
  dispose,
  init,
  loadSafetensors,
  loadSafetensorsMetadata,
  nn,
  saveSafetensors,
  Scope,
  stats,
  type Tensor,
  tensor,
  zeros,
} from "@limbeck/limbeck";
import { inDirectory } from "../testing/directory.ts";
import { inTurn } from "./files.ts";

/** The bytes of a file with this header (JSON, or a text as it is) and data. */
function file(header: unknown, data: ArrayLike<number> = [], length?: bigint): Uint8Array {
  const head = new TextEncoder().encode(typeof header === "string" ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + head.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, length ?? BigInt(head.length), true);
  bytes.set(head, 8);
  bytes.set(data, 8 + head.length);
  return bytes;
}

const bytesOf = (array: ArrayBufferView) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

const names = (directory: string) => [...Deno.readDirSync(directory)].map((entry) => entry.name).sort();

/** Everything about tensors that a file must keep. */
const contents = async (tensors: Record<string, Tensor>) =>
  Object.fromEntries(
    await Promise.all(
      Object.entries(tensors).map(async ([name, x]) => [name, { shape: [...x.shape], data: await x.data() }]),
    ),
  );

Deno.test("safetensors: there and back", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  const tensors: Record<string, Tensor> = {
    "a.weight": tensor([[1.5, -0, NaN], [Infinity, 2 ** -149, 3.4028234663852886e38]]),
    signed: tensor(new Int32Array([2 ** 31 - 1, -(2 ** 31), 2 ** 24 + 1])),
    unsigned: tensor(new Uint32Array([2 ** 32 - 1, 0]), [2, 1, 1]),
    scalar: tensor(4),
    empty: zeros([0, 3]),
    "": tensor([1]), // odd names
    'ünïcode " \n': tensor([2]),
    "7": tensor([3]),
    result: tensor([1, 2]).add(1), // what only the GPU has seen
  };
  // an odd number of 2-byte elements in front of the others would leave those unaligned
  if (f16) tensors.half = tensor(new Float16Array([65504, -(2 ** -24), 1.5]));
  await inDirectory(async (directory) => {
    const path = `${directory}/all.safetensors`, metadata = { note: 'a "note"', ünï: "code" };
    await saveSafetensors(path, tensors, metadata);
    const want = await contents(tensors);
    assertEquals(await contents(await loadSafetensors(path)), want);
    assertEquals(await contents(await loadSafetensors(new URL(`file://${path}`))), want);
    assertEquals(await contents(await loadSafetensors(Deno.readFileSync(path))), want);
    const shifted = new Uint8Array(Deno.statSync(path).size + 3).subarray(3); // unaligned bytes
    shifted.set(Deno.readFileSync(path));
    assertEquals(await contents(await loadSafetensors(shifted)), want);
    assertEquals(await loadSafetensorsMetadata(path), metadata);
    assertEquals(names(directory), ["all.safetensors"]);

    // what the format asks of a writer: an 8-aligned header, and data without holes, each tensor aligned
    const bytes = Deno.readFileSync(path), length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    assertEquals(length % 8, 0);
    const { __metadata__: _, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    const ranges = Object.values(header as Record<string, { dtype: string; data_offsets: [number, number] }>)
      .map(({ dtype, data_offsets: [from, to] }) => ({ from, to, size: dtype === "F16" ? 2 : 4 }))
      .sort((a, b) => a.from - b.from || a.to - b.to);
    let end = 0;
    for (const { from, to, size } of ranges) {
      assertEquals([from, from % size], [end, 0]);
      end = to;
    }
    assertEquals(8 + length + end, bytes.length);

    await saveSafetensors(path, {});
    assertEquals([await loadSafetensors(path), await loadSafetensorsMetadata(path)], [{}, {}]);
  });
});

Deno.test("safetensors: files of other writers", async () => {
  await init();
  using _scope = new Scope();
  const bf16 = [0x3fc0, 0xc000, 0x7f80, 0xff80, 0x0000, 0x8000, 0x0001, 0x7fc0]; // 1.5 −2 ∞ −∞ 0 −0 2⁻¹³³ NaN
  const data = [
    bytesOf(new Uint16Array(bf16)),
    bytesOf(new Float64Array([1 / 3, -1e300, 2 ** -200])),
    bytesOf(new BigInt64Array([-1n, 2n ** 31n - 1n, -(2n ** 31n)])),
    bytesOf(new Float32Array([7])),
    bytesOf(new Uint8Array([1, 0, 255])),
    bytesOf(new Int16Array([-300])),
  ];
  let end = 0;
  const offsets = data.map((part) => [end, end += part.length]);
  const load = (header: unknown) => loadSafetensors(file(header, data.flatMap((part) => [...part])));
  const entries = { // in an order of their own, no metadata, a null-free minimum
    late: { dtype: "F32", shape: [], data_offsets: offsets[3] },
    half: { dtype: "BF16", shape: [2, 4], data_offsets: offsets[0] },
    double: { dtype: "F64", shape: [3], data_offsets: offsets[1] },
    long: { dtype: "I64", shape: [3, 1], data_offsets: offsets[2] },
    bytes: { dtype: "U8", shape: [3], data_offsets: offsets[4] },
    short: { dtype: "I16", shape: [1], data_offsets: offsets[5] },
  };
  const wanted = {
    late: { shape: [], data: new Float32Array([7]) },
    half: { shape: [2, 4], data: new Float32Array([1.5, -2, Infinity, -Infinity, 0, -0, 2 ** -133, NaN]) },
    double: { shape: [3], data: new Float32Array([1 / 3, -Infinity, 0]) },
    long: { shape: [3, 1], data: new Int32Array([-1, 2 ** 31 - 1, -(2 ** 31)]) },
    bytes: { shape: [3], data: new Int32Array([1, 0, 255]) },
    short: { shape: [1], data: new Int32Array([-300]) },
  };
  assertEquals(await contents(await load(entries)), wanted);
  assertEquals(await contents(await load(JSON.stringify(entries, null, 3) + "   ")), wanted); // padded
  assertEquals(await loadSafetensorsMetadata(file({ __metadata__: { format: "pt" } })), { format: "pt" });
  const parts = data.flatMap((part) => [...part]), buffer = Buffer.concat([Buffer.of(1), file(entries, parts)]);
  assertEquals(await contents(await loadSafetensors(buffer.subarray(1))), wanted); // as Node's fs reads files
});

Deno.test("safetensors: malformed files take no memory", async () => {
  await init();
  const entry = (more: Record<string, unknown> = {}) => ({ dtype: "F32", shape: [2], data_offsets: [0, 8], ...more });
  const good = entry(), data = new Uint8Array(16);
  const long = file({ a: good, b: entry({ dtype: "I64", shape: [1], data_offsets: [8, 16] }) }, [
    ...data.subarray(0, 8),
    ...bytesOf(new BigInt64Array([2n ** 31n])),
  ]);
  const cases: [string, Uint8Array, string][] = [
    ["nothing", new Uint8Array(0), "it has 0 bytes"],
    ["a cut length", new Uint8Array(7), "it has 7 bytes"],
    ["a cut header", file({ a: good }, data).subarray(0, 20), "its header claims"],
    ["cut data", file({ a: good }, data.subarray(0, 7)), '"a" lies at 0 to 8 of 7 bytes'],
    ["a huge header", file({ a: good }, data, 2n ** 63n), "its header claims 9223372036854776000 bytes"],
    ["a header beyond the file", file({ a: good }, data, 1000n), "its header claims 1000 bytes"],
    ["no JSON", file("{a: 1}"), "its header is no JSON"],
    ["an empty header", file(""), "its header is no JSON"],
    ["no UTF-8", file({ a: good }, data.subarray(0, 8)).with(10, 0xff), "its header is no JSON"], // in the name
    ["an array", file([]), 'its header begins with "[", not with {'],
    ["null", file("null"), 'its header begins with "n"'],
    ["a number", file("5"), 'its header begins with "5"'],
    ["spaces in front", file("  {}"), 'its header begins with " "'],
    ["a byte order mark", file("\ufeff{}"), "its header is no JSON"],
    ["overlaps", file({ a: good, b: entry({ data_offsets: [4, 12] }) }, data), '"b" overlaps another tensor'],
    ["one range twice", file({ a: good, b: good }, data), "overlaps another tensor"],
    [
      "a hole",
      file({ a: good, b: entry({ data_offsets: [12, 20] }) }, new Uint8Array(20)),
      "nothing names its bytes 8 to 12",
    ],
    ["a hole in front", file({ a: entry({ data_offsets: [8, 16] }) }, data), "nothing names its bytes 0 to 8"],
    ["bytes behind the last tensor", file({ a: good }, data), "nothing names its bytes 8 to 16"],
    ["bytes and no tensor", file({}, data), "nothing names its bytes 0 to 16"],
    [
      "a name twice",
      file(`{"a": ${JSON.stringify(good)}, "a": ${JSON.stringify(good)}}`, data.subarray(8)),
      'has "a" twice',
    ],
    ["a name twice, written differently", file(`{"\\u0061": ${JSON.stringify(good)}, "a": {}}`, data), 'has "a" twice'],
    [
      "a shape twice",
      file(`{"a": {"shape": [9], "shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}`),
      'has "shape" twice',
    ],
    ["metadata twice", file(`{"__metadata__": {}, "__metadata__": {"x": "1"}}`), 'has "__metadata__" twice'],
    ["offsets beyond", file({ a: good, b: entry({ data_offsets: [12, 20] }) }, data), '"b" lies at 12 to 20 of 16'],
    ["offsets backwards", file({ a: entry({ data_offsets: [8, 0] }) }, data), '"a" lies at 8 to 0'],
    ["a negative offset", file({ a: entry({ data_offsets: [-8, 0] }) }, data), '"a" lies at -8 to 0'],
    ["offsets that are no integers", file({ a: entry({ data_offsets: [0.5, 8.5] }) }, data), '"a" has the offsets'],
    ["offsets as texts", file({ a: entry({ data_offsets: ["0", "8"] }) }, data), '"a" has the offsets'],
    ["one offset", file({ a: entry({ data_offsets: [8] }) }, data), '"a" has the offsets [8]'],
    ["no offsets", file({ a: { dtype: "F32", shape: [2] } }, data), '"a" has the offsets undefined'],
    ["too many bytes", file({ a: entry({ data_offsets: [0, 12] }) }, data), '"a" has 12 bytes'],
    ["too few bytes", file({ a: entry({ shape: [3] }) }, data), '"a" has 8 bytes'],
    ["a shape of 2⁸⁰", file({ a: entry({ shape: [2 ** 40, 2 ** 40] }) }, data), '"a" has 8 bytes'],
    [
      "a long shape",
      file({ a: entry({ shape: new Array(2 ** 18).fill(1) }) }, data),
      "shape an array of 262144 of F32",
    ],
    ["a negative shape", file({ a: entry({ shape: [-1, -2] }) }, data), '"a" has the shape [-1, -2]'],
    ["a fractional shape", file({ a: entry({ shape: [0.5, 4] }) }, data), '"a" has the shape [0.5, 4]'],
    ["a shape of texts", file({ a: entry({ shape: ["2"] }) }, data), '"a" has the shape ["2"]'],
    ["no shape", file({ a: { dtype: "F32", data_offsets: [0, 8] } }, data), '"a" has the shape undefined'],
    ["an unknown dtype", file({ a: entry({ dtype: "F8_E4M3" }) }, data), 'the dtype "F8_E4M3"; readable are'],
    ["a dtype of Object's", file({ a: entry({ dtype: "toString" }) }, data), 'has the dtype "toString"'],
    ["a dtype in an array", file({ a: entry({ dtype: ["F32"] }) }, data), '"a" has the dtype ["F32"]'],
    ["no dtype", file({ a: { shape: [2], data_offsets: [0, 8] } }, data), '"a" has the dtype undefined'],
    ["a tensor that is null", file({ a: null }), '"a" has the dtype undefined'],
    ["a tensor that is a number", file({ a: 5 }), '"a" has the dtype undefined'],
    ["metadata of numbers", file({ __metadata__: { a: 1 } }), "its metadata is no object of strings"],
    ["metadata that is a text", file({ __metadata__: "a" }), "its metadata is no object of strings"],
    ["metadata that is an array", file({ __metadata__: ["a"] }), "its metadata is no object of strings"],
    ["metadata that is null", file({ __metadata__: null }), "its metadata is no object of strings"],
    ["__proto__", file(`{"__proto__": ${JSON.stringify(good)}}`, data), "__proto__"],
    [
      "too many dimensions",
      file({ a: entry({ shape: new Array(13).fill(1), data_offsets: [0, 4] }) }, [0, 0, 0, 0]),
      "at most 12",
    ],
    ["a long name", file(`{"${"a".repeat(2 ** 22)}": 5}`), "has the dtype undefined"],
    ["a long name twice", file(`{"${"\\n".repeat(2 ** 22)}": 5, "${"\\n".repeat(2 ** 22)}": 5}`), "twice"],
    ["a deep header", file(`${"[".repeat(2 ** 18)}${"]".repeat(2 ** 18)}`), 'its header begins with "["'],
    ["a number that does not fit i32", long, "holds 2147483648, which does not fit i32"],
  ];
  const before = stats(), wrong: string[] = [];
  for (const [name, bytes, message] of cases) {
    try {
      await loadSafetensors(bytes);
      wrong.push(`${name}: nothing is thrown`);
    } catch (error) {
      const { message: text } = error as Error;
      if (!(error instanceof RangeError)) wrong.push(`${name}: no RangeError but ${error}`);
      else if (!text.includes(message)) wrong.push(`${name}: says ${text}`);
      else if (!text.startsWith("loadSafetensors: ")) wrong.push(`${name}: does not name the op: ${text}`);
    }
    if (stats().liveBytes !== before.liveBytes) {
      wrong.push(`${name}: ${stats().liveBytes - before.liveBytes} bytes stay`);
      before.liveBytes = stats().liveBytes;
    }
  }
  assertEquals(wrong, []);
});

Deno.test("safetensors: nothing but the header is read of a file that is refused", async () => {
  const { limits } = await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, most = limits.maxStorageBufferBindingSize;
    const sparse = (header: unknown, bytes: number, length?: bigint) => {
      const head = file(header, [], length);
      Deno.writeFileSync(path, head);
      Deno.truncateSync(path, head.length + bytes); // takes no room on the disk
    };
    const refused = async (message: string) => {
      const before = [stats().liveBytes, Deno.memoryUsage().rss];
      await assertRejects(() => loadSafetensors(path), RangeError, message);
      assertEquals(stats().liveBytes, before[0]);
      assert(Deno.memoryUsage().rss - before[1] < 2 ** 28, "it was read whole");
    };
    const large = { dtype: "F32", shape: [2 ** 20, 2 ** 10], data_offsets: [0, 2 ** 32] };
    sparse({ a: large }, 2 ** 33);
    await refused("nothing names its bytes 4294967296 to 8589934592");
    if (most < 2 ** 32) {
      sparse({ a: large }, 2 ** 32);
      await refused(`"a" of "${path}": 4294967296 bytes (shape [1048576, 1024]) are more than this adapter binds`);
    }
    sparse("", 2 ** 32, 2n ** 31n);
    await refused("its header has 2147483648 bytes, more than 100000000");
    await assertRejects(() => loadSafetensors(directory), RangeError, "is no file");
  });
});

Deno.test("safetensors: what is wrong in the middle leaves no tensor", async () => {
  await dispose();
  await init({ memoryLimit: 2 ** 19 });
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, size = 2 ** 15; // 128 KiB each
    const entries = Object.fromEntries(
      Array.from(
        { length: 8 },
        (_, i) => [`x${i}`, { dtype: "F32", shape: [size], data_offsets: [4 * size * i, 4 * size * (i + 1)] }],
      ),
    );
    await Deno.writeFile(path, file(entries, new Uint8Array(8 * 4 * size).fill(1)));
    const before = stats();
    await assertRejects(() => loadSafetensors(path), RangeError, "would pass the memory limit");
    assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
  });
  await dispose();
});

Deno.test("safetensors: a save removes what killed saves of the same file left behind, and nothing else", async () => {
  await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, id = () => crypto.randomUUID(), x = tensor([1, 2]);
    const others = ["a.safetensors.partial", `ab.safetensors.${id()}.partial`, `a.safetensors.${id()}.other`];
    others.push(`a.safetensors.${"notes-of-a-user-".padEnd(36, "x")}.partial`);
    for (const name of [...others, `a.safetensors.${id()}.partial`, `a.safetensors.${id()}.partial`]) {
      Deno.writeTextFileSync(`${directory}/${name}`, "");
    }
    await saveSafetensors(path, { x });
    assertEquals(names(directory), [...others, "a.safetensors"].sort());
    // saves that run side by side do not take each other for leftovers
    const values = Array.from({ length: 8 }, (_, i) => i);
    await Promise.all(values.map((i) => saveSafetensors(path, { x: x.mul(i) })));
    assertEquals(names(directory), [...others, "a.safetensors"].sort());
    const [one, two] = await (await loadSafetensors(path)).x.data();
    assert(values.includes(one) && two === 2 * one);
  });
});

Deno.test("safetensors: what is done with a file is done in turn, however its path is spelled", async () => {
  const done: string[] = [], spellings = ["a/b", "./a/b", "a/./b", "a/c/../b", "http://["];
  await Promise.all(spellings.map((path, i) =>
    inTurn(path, async () => {
      for (let left = spellings.length - i; left > 0; left--) await null; // the later the sooner
      done.push(path);
    })
  ));
  assertEquals(done.filter((path) => path !== "http://["), spellings.slice(0, 4));
  const failing = inTurn("a", () => Promise.reject(new Error("mine"))), next = inTurn("a", () => Promise.resolve());
  await assertRejects(() => failing, Error, "mine");
  await next; // is not the one that failed
});

Deno.test("safetensors: errors name the file, and what is no file is refused", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/bad.safetensors`;
    await Deno.writeFile(path, new Uint8Array(3));
    await assertRejects(() => loadSafetensors(path), RangeError, path);
    await assertRejects(() => loadSafetensors(`${directory}/none`), Deno.errors.NotFound, "loadSafetensors: No such");
    const { open } = Deno;
    Deno.open = () => Promise.reject(new Error("opened")); // where a pipe would wait for ever
    try {
      await assertRejects(() => loadSafetensors(directory), RangeError, `loadSafetensors: "${directory}" is no file`);
    } finally {
      Deno.open = open;
    }
  });
  await assertRejects(() => loadSafetensors(new URL("http://x/y")), TypeError, "loadSafetensors: Must be a file URL");
  // deno-lint-ignore no-explicit-any
  await assertRejects(() => loadSafetensors(5 as any), TypeError, "pathOrBytes must be a path, a URL or a Uint8Array");
});

Deno.test("safetensors: a save that fails leaves the old file and nothing else", async () => {
  await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, x = tensor([1, 2]), closed = tensor([3]);
    closed.dispose();
    await saveSafetensors(path, { x });
    const old = Deno.readFileSync(path);
    // deno-lint-ignore no-explicit-any
    const save = (to: any, tensors: any, metadata?: any) => () => saveSafetensors(to, tensors, metadata);
    await assertRejects(save(path, { x, y: 5 }), TypeError, "saveSafetensors: y must be a Tensor, got 5");
    await assertRejects(save(path, { x, y: closed }), Error, "saveSafetensors: y (shape [1]) was closed");
    await assertRejects(save(path, null), TypeError, "saveSafetensors: tensors must be an object of tensors, got null");
    await assertRejects(save(path, { x }, { step: 5 }), TypeError, "saveSafetensors: metadata.step must be a string");
    await assertRejects(save(5, { x }), TypeError, "saveSafetensors: path must be a string, got 5");
    await assertRejects(save("", { x }), RangeError, 'saveSafetensors: path must name a file, got ""');
    const strange = "saveSafetensors: tensors must be an object of tensors, got a ";
    for (const tensors of [new Map([["x", x]]), x, new nn.Dropout()]) {
      await assertRejects(save(path, tensors), TypeError, strange + tensors.constructor.name); // not an empty file
    }
    await assertRejects(save(path, { x }, new Map()), TypeError, "metadata must be an object of strings, got a Map");
    // names that the file could not give back
    await assertRejects(save(path, { x, __metadata__: x }), Error, "__metadata__");
    await assertRejects(save(path, Object.fromEntries([["x", x], ["__proto__", x]])), Error, "__proto__");
    assertEquals(Deno.readFileSync(path), old);
    // the data is written, but cannot get its name
    await Deno.mkdir(`${directory}/taken/inner`, { recursive: true });
    await assertRejects(() => saveSafetensors(`${directory}/taken`, { x }), Error, "saveSafetensors: ");
    const none = () => saveSafetensors(`${directory}/none/a`, { x });
    await assertRejects(none, Deno.errors.NotFound, "saveSafetensors: No such file");
    assertEquals(names(directory), ["a.safetensors", "taken"]);
    await saveSafetensors(path, { x: x.add(1) });
    assertEquals(await (await loadSafetensors(path)).x.array(), [2, 3]);
  });
});

Deno.test("safetensors: a file keeps its permissions, and a link its file", async () => {
  await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/a`, link = `${directory}/link`, dangling = `${directory}/dangling`, x = tensor([1, 2]);
    // making a link needs all permissions
    const script = `Deno.symlinkSync("a", ${JSON.stringify(link)}); Deno.symlinkSync("no", ${
      JSON.stringify(dangling)
    })`;
    assert((await new Deno.Command("deno", { args: ["eval", script] }).output()).success);
    await saveSafetensors(path, { x });
    if (Deno.lstatSync(path).mode === null) return; // Windows
    for (const mode of [0o600, 0o664]) { // more than the umask leaves, and less
      Deno.chmodSync(path, mode);
      await saveSafetensors(path, { x });
      await saveSafetensors(link, { x: x.add(1) });
      assertEquals(Deno.statSync(path).mode! & 0o777, mode);
    }
    assert(Deno.lstatSync(link).isSymlink);
    assertEquals(await (await loadSafetensors(path)).x.array(), [2, 3]);
    await saveSafetensors(dangling, { x });
    assertEquals(await (await loadSafetensors(dangling)).x.array(), [1, 2]);
    assertEquals(names(directory), ["a", "dangling", "link"]);
  });
});

Deno.test("safetensors: a disk that fails in the middle leaves the old file", async () => {
  await init();
  using _scope = new Scope();
  const { write, sync } = Deno.FsFile.prototype;
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, x = tensor(new Float32Array(1000).fill(1));
    await saveSafetensors(path, { x });
    let writes = 0;
    Deno.FsFile.prototype.write = async function (this: Deno.FsFile, bytes: Uint8Array) {
      if (writes++ === 2) throw new Error("no space left");
      return await write.call(this, bytes.subarray(0, 100)); // a file may take less than it is given
    };
    try {
      await assertRejects(() => saveSafetensors(path, { x: x.mul(2) }), Error, "no space left");
      Deno.FsFile.prototype.write = write;
      Deno.FsFile.prototype.sync = () => Promise.reject(new Error("input/output error")); // what the system still held
      await assertRejects(() => saveSafetensors(path, { x: x.mul(2) }), Error, "input/output error");
    } finally {
      Object.assign(Deno.FsFile.prototype, { write, sync });
    }
    assertEquals(writes, 3);
    assertEquals(names(directory), ["a.safetensors"]);
    const { x: loaded } = await loadSafetensors(path);
    assert((await loaded.data()).every((v) => v === 1));
  });
});

Deno.test("safetensors: what is saved is what was there when the call was made", async () => {
  await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/a.safetensors`, x = tensor([1, 2]);
    const saving = saveSafetensors(path, { x });
    x.assign(tensor([5, 6])); // a training loop goes on
    await saving;
    assertEquals(await (await loadSafetensors(path)).x.array(), [1, 2]);
  });
});

Deno.test("safetensors: tensors belong to the scope that was innermost at the call", async () => {
  await init();
  const before = stats().liveTensors,
    bytes = file({ a: { dtype: "F32", shape: [1], data_offsets: [0, 4] } }, [0, 0, 0, 0]);
  {
    using _scope = new Scope();
    await loadSafetensors(bytes);
    assertEquals(stats().liveTensors, before + 1);
  }
  assertEquals(stats().liveTensors, before);
});

Deno.test("safetensors: tensors do not go with a scope that was opened while the file was read", async () => {
  await init();
  const bytes = file({ x: { dtype: "F32", shape: [1], data_offsets: [0, 4] } }, bytesOf(new Float32Array([7])));
  const loading = loadSafetensors(bytes);
  const other = new Scope();
  const { x } = await loading;
  other.close();
  assertEquals(await x.array(), [7]);
  assert(x.forgotten); // the caller's, who has not kept it yet
  x.dispose();
  const mine = new Scope(), inside = loadSafetensors(bytes);
  mine.close();
  const late = (await inside).x;
  assertEquals(await late.array(), [7]);
  late.dispose();
});

Deno.test("safetensors: unusual files that are valid", async () => {
  await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/swapped.safetensors`; // the header's order is not the data's
    const at = (from: number) => ({ dtype: "F32", shape: [1], data_offsets: [from, from + 4] });
    await Deno.writeFile(path, file({ b: at(4), a: at(0) }, new Uint8Array(new Float32Array([1, 2]).buffer)));
    const { a, b } = await loadSafetensors(path);
    assertEquals([await a.item(), await b.item()], [1, 2]);
  });
  const f32 = (shape: number[], data_offsets: number[]) => ({ dtype: "F32", shape, data_offsets });
  const empty = await loadSafetensors(file({ a: f32([2], [0, 8]), b: f32([0], [0, 0]) }, new Uint8Array(8)));
  assertEquals(empty.b.shape, [0]);
  const short = file({ a: { dtype: "U16", shape: [1], data_offsets: [0, 2] } }, [0xff, 0xff]);
  assertEquals(await (await loadSafetensors(short)).a.item(), 65535);
});

Deno.test("safetensors: what is written is aligned, and files are closed", async () => {
  const { f16 } = await init();
  using _scope = new Scope();
  await inDirectory(async (directory) => {
    const path = `${directory}/x.safetensors`;
    for (const name of ["a", "ab", "abc"]) {
      const more: Record<string, Tensor> = f16 ? { half: tensor([1], { dtype: "f16" }) } : {};
      await saveSafetensors(path, { ...more, [name]: tensor([1]) });
      const bytes = await Deno.readFile(path), length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
      const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
      assertEquals([length % 8, header[name].data_offsets[0] % 4], [0, 0]);
    }
    // each of these would fail on a file that another one has left open or written to
    const saves = [saveSafetensors(path, { x: zeros([100_000]) }), saveSafetensors(path, { x: tensor([7]) })];
    await Promise.all(saves);
    assertEquals((await loadSafetensors(path)).x.shape, [1]); // the later call wins
  });
});

Deno.test("safetensors: a save that fails while it waits for another one is reported once", async () => {
  await init();
  await inDirectory(async (directory) => {
    const path = `${directory}/x.safetensors`, x = tensor([1]), y = zeros([1000]);
    x.dispose();
    const results = await Promise.allSettled([saveSafetensors(path, { y }), saveSafetensors(path, { x })]);
    assertEquals(results.map(({ status }) => status), ["fulfilled", "rejected"]);
    y.dispose();
  });
});

Deno.test("inTurn: the third on a path waits for the second, though the first has ended", async () => {
  const log: string[] = [], gate = Promise.withResolvers<void>();
  const first = inTurn("p", () => Promise.resolve(void log.push("first")));
  const second = inTurn("p", async () => {
    await gate.promise;
    log.push("second");
  });
  await first;
  const third = inTurn("p", () => Promise.resolve(void log.push("third")));
  await new Promise((resolve) => setTimeout(resolve, 5));
  gate.resolve();
  await Promise.all([second, third]);
  assertEquals(log, ["first", "second", "third"]);
});
