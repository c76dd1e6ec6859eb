/** Reading and writing safetensors files. */
import { describe } from "../kernels/check.ts";
import { BYTES, type DType, type TypedArray } from "../autograd/storage.ts";
import { checkTensor, sizeOf, type Tensor } from "../autograd/tensor.ts";
import { tensor } from "../ops/create.ts";

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** Bytes of an element in a file. */
const FILE_BYTES: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, U32: 4 };
const FILE_TYPES: Record<DType, string> = { f32: "F32", f16: "F16", i32: "I32", u32: "U32" };
const LONGEST_HEADER = 100_000_000; // as the reference implementation

/** The header of a file, checked so far that every tensor in it can be read: nothing is taken from its word. */
function parseHeader(
  bytes: Uint8Array,
  source: string,
): { entries: [string, Entry][]; metadata: Record<string, string>; start: number } {
  const fail = (what: string): never => {
    throw new RangeError(`loadSafetensors: ${source} is no valid safetensors file: ${what}`);
  };
  if (bytes.byteLength < 8) fail(`it has ${bytes.byteLength} bytes, a header needs 8`);
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true));
  if (length > LONGEST_HEADER || length > bytes.byteLength - 8) {
    fail(`its header says it has ${length} bytes, the file has ${bytes.byteLength - 8} more`);
  }
  let header: Record<string, unknown> = {};
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + length)));
  } catch (error) {
    fail(`its header is no JSON (${(error as Error).message})`);
  }
  if (typeof header !== "object" || header === null || Array.isArray(header)) fail("its header is no object");
  const { __metadata__: metadata = {}, ...rest } = header as { __metadata__?: Record<string, string> };
  if (
    typeof metadata !== "object" || metadata === null || Array.isArray(metadata) ||
    Object.values(metadata).some((v) => typeof v !== "string")
  ) {
    fail("its metadata is no object of strings");
  }
  const available = bytes.byteLength - 8 - length;
  const entries = Object.entries(rest as Record<string, Entry>);
  for (const [name, entry] of entries) {
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    if (name === "__proto__") fail(`it names a tensor ${describe(name)}`);
    if (typeof dtype !== "string" || !Object.hasOwn(FILE_BYTES, dtype)) {
      fail(`${describe(name)} has the dtype ${describe(dtype)}; readable are ${Object.keys(FILE_BYTES).join(", ")}`);
    }
    if (!Array.isArray(shape) || !shape.every((n) => Number.isSafeInteger(n) && n >= 0)) {
      fail(`${describe(name)} has the shape ${describe(shape)}`);
    }
    if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(Number.isSafeInteger)) {
      fail(`${describe(name)} has the offsets ${describe(offsets)}`);
    }
    const [from, to] = offsets;
    if (from < 0 || to < from || to > available) {
      fail(`${describe(name)} lies at ${from} to ${to} of ${available} bytes`);
    }
    if (to - from !== sizeOf(shape) * FILE_BYTES[dtype]) {
      fail(
        `${describe(name)} has ${to - from} bytes, shape [${shape.join(", ")}] of ${dtype} needs ${
          sizeOf(shape) * FILE_BYTES[dtype]
        }`,
      );
    }
  }
  const ranges = entries.map(([name, e]) => [name, ...e.data_offsets] as const).sort((a, b) =>
    a[1] - b[1] || a[2] - b[2]
  );
  ranges.reduce(
    (end, [name, from, to]) => from < end ? fail(`${describe(name)} overlaps another tensor`) : Math.max(end, to),
    0,
  );
  return { entries, metadata, start: 8 + length };
}

async function bytesOf(
  op: string,
  pathOrBytes: string | URL | Uint8Array,
): Promise<{ bytes: Uint8Array; source: string }> {
  if (pathOrBytes instanceof Uint8Array) return { bytes: pathOrBytes, source: "the data" };
  if (typeof pathOrBytes === "string" || pathOrBytes instanceof URL) {
    return { bytes: await Deno.readFile(pathOrBytes), source: JSON.stringify(String(pathOrBytes)) };
  }
  throw new TypeError(`${op}: pathOrBytes must be a path, a URL or a Uint8Array, got ${describe(pathOrBytes)}`);
}

function values(raw: ArrayBuffer, dtype: string): TypedArray {
  if (dtype === "F32") return new Float32Array(raw);
  if (dtype === "F16") return new Float16Array(raw);
  if (dtype === "I32") return new Int32Array(raw);
  if (dtype === "U32") return new Uint32Array(raw);
  if (dtype === "F64") return Float32Array.from(new Float64Array(raw));
  if (dtype === "I64") {
    return Int32Array.from(new BigInt64Array(raw), (n) => {
      if (BigInt.asIntN(32, n) !== n) throw new RangeError(`loadSafetensors: the I64 value ${n} does not fit i32`);
      return Number(n);
    });
  }
  const halves = new Uint16Array(raw), words = new Uint32Array(halves.length); // BF16: the upper half of an f32
  halves.forEach((half, i) => words[i] = half << 16);
  return new Float32Array(words.buffer);
}

/**
 * The tensors of a safetensors file, from a path or from bytes. F32, F16, I32 and U32 stay what they are; BF16 and F64 become f32, I64 becomes i32.
 * They belong to the innermost scope, or are the caller's.
 *
 * Throws a RangeError that says what is wrong with a malformed file, before any memory is taken. Format: https://github.com/huggingface/safetensors.
 *
 * @example
 * ```ts
 * import { init, loadSafetensors, nn, saveSafetensors } from "@limbeck/limbeck";
 *
 * await init();
 * const model = new nn.Linear(4, 2), path = await Deno.makeTempFile();
 * await saveSafetensors(path, model.stateDict(), { note: "a linear layer" });
 * model.loadStateDict(await loadSafetensors(path));
 * ```
 */
export async function loadSafetensors(pathOrBytes: string | URL | Uint8Array): Promise<Record<string, Tensor>> {
  const { bytes, source } = await bytesOf("loadSafetensors", pathOrBytes);
  const { entries, start } = parseHeader(bytes, source);
  // all values first, so that one that does not fit leaves no tensor behind
  const arrays = entries.map(([, { dtype, data_offsets: [from, to] }]) => {
    return values(bytes.slice(start + from, start + to).buffer, dtype); // a copy: aligned
  });
  return Object.fromEntries(entries.map(([name, { shape }], i) => [name, tensor(arrays[i], shape)]));
}

/** The metadata of a safetensors file, from a path or from bytes. Errors as `loadSafetensors`. */
export async function loadSafetensorsMetadata(pathOrBytes: string | URL | Uint8Array): Promise<Record<string, string>> {
  const { bytes, source } = await bytesOf("loadSafetensorsMetadata", pathOrBytes);
  return parseHeader(bytes, source).metadata;
}

/** The bytes of a safetensors file with these tensors. */
async function encode(tensors: Record<string, Tensor>, metadata: Record<string, string>): Promise<Uint8Array> {
  if (typeof tensors !== "object" || tensors === null) {
    throw new TypeError(`saveSafetensors: tensors must be an object of tensors, got ${describe(tensors)}`);
  }
  for (const [key, value] of Object.entries(metadata)) {
    if (typeof value !== "string") {
      throw new TypeError(`saveSafetensors: metadata.${key} must be a string, got ${describe(value)}`);
    }
  }
  let offset = 0;
  const header: Record<string, unknown> = { __metadata__: metadata };
  // larger elements first keep every tensor aligned
  const entries = Object.entries(tensors).map(([name, x]): [string, Tensor] => {
    if (name === "__metadata__" || name === "__proto__") {
      throw new RangeError(`saveSafetensors: no tensor can be named ${name}`);
    }
    checkTensor("saveSafetensors", name, x, ["f32", "f16", "i32", "u32"]);
    return [name, x];
  }).sort(([, a], [, b]) => BYTES[b.dtype] - BYTES[a.dtype]);
  for (const [name, x] of entries) {
    const end = offset + x.size * BYTES[x.dtype];
    header[name] = { dtype: FILE_TYPES[x.dtype], shape: x.shape, data_offsets: [offset, end] };
    offset = end;
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - new TextEncoder().encode(text).length % 8) % 8);
  const head = new TextEncoder().encode(text);
  const bytes = new Uint8Array(8 + head.length + offset);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(head.length), true);
  bytes.set(head, 8);
  const data = await Promise.all(entries.map(([, x]) => x.data()));
  let at = 8 + head.length;
  for (const array of data) {
    bytes.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength), at);
    at += array.byteLength;
  }
  return bytes;
}

/**
 * Writes tensors to a safetensors file. It is written under a temporary name and renamed, so that a kill leaves the old file or the new one whole.
 * Throws a TypeError for what is no tensor. See `loadSafetensors` for an example.
 */
export async function saveSafetensors(
  path: string,
  tensors: Record<string, Tensor>,
  metadata: Record<string, string> = {},
): Promise<void> {
  if (typeof path !== "string") throw new TypeError(`saveSafetensors: path must be a string, got ${describe(path)}`);
  const bytes = await encode(tensors, metadata);
  const temporary = `${path}.${crypto.randomUUID()}.partial`;
  try {
    const file = await Deno.open(temporary, { write: true, createNew: true });
    try {
      for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
      await file.sync();
    } finally {
      file.close();
    }
    await Deno.rename(temporary, path);
  } catch (error) {
    await Deno.remove(temporary).catch(() => {});
    throw error;
  }
}
