/** Reads and writes safetensors files. */
import { describe, isRecord } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { gpu } from "../kernels/gpu/gpu.ts";
import { tooLarge } from "../kernels/gpu/memory.ts";
import { innermost } from "../autograd/scope.ts";
import { ARRAYS, BYTES, type DType, DTYPES, type TypedArray } from "../autograd/storage.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import { checkShapeArgument, tensor } from "../ops/create.ts";
import { checkPath, inTurn, openSource, replaceFile, type Source } from "./files.ts";

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** Bytes of an element, by the dtype's name in a file. */
// deno-fmt-ignore
const FILE_BYTES: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, U32: 4, I16: 2, U16: 2, I8: 1, U8: 1, BOOL: 1 };
const FILE_TYPES: Record<DType, string> = { f32: "F32", f16: "F16", i32: "I32", u32: "U32" };
/** Arrays of what becomes i32. */
const NARROW = { I16: Int16Array, U16: Uint16Array, I8: Int8Array, U8: Uint8Array, BOOL: Uint8Array };
const LONGEST_HEADER = 100_000_000; // as the reference implementation

/** A file whose header was checked. */
export interface Opened {
  metadata: Record<string, string>;
  /** Names of its tensors. */
  names: string[];
  /** Reads its tensors. They belong to no scope, since which one is innermost by then is a matter of chance. */
  load(): Promise<Record<string, Tensor>>;
}

/** The first key that occurs twice in an object of a JSON text; JSON.parse would silently take the last one. */
function duplicateKey(json: string): string | undefined {
  const open: (Set<string> | null)[] = []; // null: an array
  const colon = /\s*:/y;
  for (let i = 0; i < json.length; i++) { // no regular expression for a whole string, which would overflow the stack for a long one
    const token = json[i];
    if (token === "{") open.push(new Set());
    else if (token === "[") open.push(null);
    else if (token === "}" || token === "]") open.pop();
    else if (token === '"') {
      const from = i++;
      while (json[i] !== '"') i += json[i] === "\\" ? 2 : 1;
      colon.lastIndex = i + 1;
      if (!colon.test(json)) continue;
      const key = JSON.parse(json.slice(from, i + 1)), keys = open.at(-1)!;
      if (keys.has(key)) return key;
      keys.add(key);
    }
  }
}

/** The header of a file, with every claim in it checked, so that every tensor can be read. Reads nothing but the header. */
async function readHeader(
  op: string,
  source: Source,
): Promise<{ entries: [string, Entry][]; metadata: Record<string, string>; start: number }> {
  const fail = (what: string): never => {
    throw new RangeError(`${op}: ${source.name} is no valid safetensors file: ${what}`);
  };
  if (source.size < 8) fail(`it has ${source.size} bytes, a header needs 8`);
  const length = Number(new DataView((await source.read(0, 8)).buffer).getBigUint64(0, true));
  if (length > source.size - 8) fail(`its header claims ${length} bytes, only ${source.size - 8} follow`);
  if (length > LONGEST_HEADER) fail(`its header has ${length} bytes, more than ${LONGEST_HEADER}`);
  let header: Record<string, unknown> = {}, text = "";
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await source.read(8, 8 + length));
    header = JSON.parse(text);
  } catch (error) {
    fail(`its header is no JSON (${(error as Error).message})`);
  }
  if (text[0] !== "{") fail(`its header begins with ${describe(text[0])}, not with {`);
  const twice = duplicateKey(text);
  if (twice !== undefined) fail(`its header has ${describe(twice)} twice`);
  const { __metadata__: metadata = {}, ...rest } = header as { __metadata__?: Record<string, string> };
  if (!isRecord(metadata) || Object.values(metadata).some((v) => typeof v !== "string")) {
    fail("its metadata is no object of strings");
  }
  const available = source.size - 8 - length;
  const entries = Object.entries(rest as Record<string, Entry>);
  for (const [name, entry] of entries) {
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    if (name === "__proto__") fail(`it names a tensor ${describe(name)}`);
    if (typeof dtype !== "string") fail(`${describe(name)} has the dtype ${describe(dtype)}`);
    if (!Object.hasOwn(FILE_BYTES, dtype)) { // the file may be valid for all that
      const which = `${describe(name)} of ${source.name} has the dtype ${describe(dtype)}`;
      throw new RangeError(`${op}: ${which}; readable are ${Object.keys(FILE_BYTES).join(", ")}`);
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
    const needed = sizeOf(shape) * FILE_BYTES[dtype];
    if (to - from !== needed) {
      fail(`${describe(name)} has ${to - from} bytes, shape ${describe(shape)} of ${dtype} needs ${needed}`);
    }
  }
  const ranges = entries.map(([name, e]) => [name, ...e.data_offsets] as const);
  ranges.sort((a, b) => a[1] - b[1] || a[2] - b[2]);
  let end = 0;
  for (const [name, from, to] of ranges) {
    if (from < end) fail(`${describe(name)} overlaps another tensor`);
    if (from > end) fail(`nothing names its bytes ${end} to ${from}`);
    end = to;
  }
  if (end < available) fail(`nothing names its bytes ${end} to ${available}`);
  return { entries, metadata, start: 8 + length };
}

/** Throws unless the device can hold the tensors. */
function checkHoldable(op: string, source: Source, entries: [string, Entry][]): void {
  const { limits: { maxStorageBufferBindingSize: most }, f16 } = gpu().info;
  for (const [name, { dtype, shape }] of entries) {
    const bytes = sizeOf(shape) * (dtype === "F16" ? 2 : 4), of = `${describe(name)} of ${source.name}`;
    checkShapeArgument(`${op}: ${of}`, shape);
    if (dtype === "F16" && !f16) throw new TypeError(`${op}: ${of} is F16, and this adapter has no shader-f16`);
    if (bytes > most) throw tooLarge(`${op}: ${of}`, bytes, shape, most);
  }
}

/** Opens a file, checks its header and hands it to `use`. */
export async function openSafetensors<T>(
  op: string,
  pathOrBytes: string | URL | Uint8Array,
  use: (file: Opened) => T | Promise<T>,
): Promise<T> {
  const source = await openSource(op, pathOrBytes);
  try {
    const { entries, metadata, start } = await readHeader(op, source);
    const load = async () => {
      checkHoldable(op, source, entries);
      // convert all values first, so that no tensor is left over if one does not fit
      const arrays: TypedArray[] = [];
      for (const [name, { dtype, data_offsets: [from, to] }] of entries) {
        const of = `${describe(name)} of ${source.name}`;
        arrays.push(values(op, of, (await source.read(start + from, start + to)).buffer, dtype));
      }
      const loaded: Record<string, Tensor> = {};
      try {
        entries.forEach(([name, { shape }], i) => loaded[name] = tensor(arrays[i], shape).keep());
      } catch (error) {
        for (const x of Object.values(loaded)) x.dispose();
        throw error;
      }
      return loaded;
    };
    return await use({ metadata, names: entries.map(([name]) => name), load });
  } finally {
    source.close();
  }
}

function values(op: string, of: string, raw: ArrayBuffer, dtype: string): TypedArray {
  const own = DTYPES.find((d) => FILE_TYPES[d] === dtype);
  if (own) return new ARRAYS[own](raw);
  if (dtype === "F64") return Float32Array.from(new Float64Array(raw));
  if (dtype === "I64") {
    return Int32Array.from(new BigInt64Array(raw), (n) => {
      if (BigInt.asIntN(32, n) !== n) throw new RangeError(`${op}: ${of} holds ${n}, which does not fit i32`);
      return Number(n);
    });
  }
  if (dtype in NARROW) return Int32Array.from(new NARROW[dtype as keyof typeof NARROW](raw));
  const halves = new Uint16Array(raw), words = new Uint32Array(halves.length); // BF16: the upper half of an f32
  halves.forEach((half, i) => words[i] = half << 16);
  return new Float32Array(words.buffer);
}

/**
 * The tensors of a safetensors file, from a path or from bytes. F32, F16, I32 and U32 stay what they are; BF16 and F64 become f32, BOOL and the other integers
 * i32, except U64, which is not read. The tensors belong to the scope that was innermost at the call, or to the caller if there was none or it has closed since.
 *
 * Throws a RangeError that says what is wrong with a malformed file (truncated, overlapping tensors, unused bytes, duplicate names), and for a tensor larger
 * than the adapter binds at once, after reading only the header and before allocating any memory. Format: https://github.com/huggingface/safetensors.
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
  const op = "loadSafetensors", scope = innermost();
  const tensors = await openSafetensors(op, pathOrBytes, (file) => file.load());
  for (const x of Object.values(tensors)) {
    if (scope && !scope.closed) scope.adopt(x);
    else x.leaveScope(op);
  }
  return tensors;
}

/**
 * The metadata of a safetensors file, from a path or from bytes: the strings that `saveSafetensors` was given. Errors as `loadSafetensors`.
 *
 * @example
 * ```ts
 * import { init, loadSafetensorsMetadata, saveSafetensors, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const path = await Deno.makeTempFile();
 * await saveSafetensors(path, { x: tensor([1, 2]) }, { unit: "nats" });
 * console.log(await loadSafetensorsMetadata(path)); // { unit: "nats" }
 * ```
 */
export async function loadSafetensorsMetadata(pathOrBytes: string | URL | Uint8Array): Promise<Record<string, string>> {
  return await openSafetensors("loadSafetensorsMetadata", pathOrBytes, ({ metadata }) => metadata);
}

/** The bytes of a safetensors file with these tensors. */
export async function encode(
  op: string,
  tensors: Record<string, Tensor>,
  metadata: Record<string, string>,
): Promise<Uint8Array> {
  for (const [name, record] of [["tensors", tensors], ["metadata", metadata]] as const) {
    if (isRecord(record)) continue;
    const what = name === "tensors" ? "tensors" : "strings";
    throw new TypeError(`${op}: ${name} must be an object of ${what}, got ${describe(record)}`);
  }
  for (const [key, value] of Object.entries(metadata)) {
    if (typeof value !== "string") {
      throw new TypeError(`${op}: metadata.${key} must be a string, got ${describe(value)}`);
    }
  }
  let offset = 0;
  const header: Record<string, unknown> = { __metadata__: metadata };
  // larger elements first keep every tensor aligned
  const entries = Object.entries(tensors).map(([name, x]): [string, Tensor] => {
    if (name === "__metadata__" || name === "__proto__") {
      throw new RangeError(`${op}: no tensor can be named ${name}`);
    }
    checkTensor(op, name, x, DTYPES);
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
 * Writes tensors to a safetensors file: first to a temporary file beside it, which is then renamed. If the process is killed, either the old file or the new
 * one is complete; the next save removes the temporary file.
 *
 * Throws a TypeError for a value that is not a tensor and for metadata that are not strings, a RangeError for the names `__metadata__` and `__proto__`. Format:
 * https://github.com/huggingface/safetensors.
 *
 * @example
 * ```ts
 * import { init, loadSafetensors, saveSafetensors, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const path = await Deno.makeTempFile();
 * await saveSafetensors(path, { x: tensor([1, 2]) });
 * console.log(await (await loadSafetensors(path)).x.array()); // [1, 2]
 * ```
 */
export async function saveSafetensors(
  path: string,
  tensors: Record<string, Tensor>,
  metadata: Record<string, string> = {},
): Promise<void> {
  checkPath("saveSafetensors", path);
  const bytes = encode("saveSafetensors", tensors, metadata);
  bytes.catch(() => {}); // it is awaited later
  await inTurn(path, async () => await replaceFile("saveSafetensors", path, await bytes));
}
