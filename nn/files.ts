/** Reads parts of files, and replaces files as a whole. */
import { describe } from "../kernels/check.ts";

/** Bytes that are read in parts. */
export interface Source {
  /** Its name in messages. */
  name: string;
  /** The number of bytes. */
  size: number;
  /** A copy of the bytes from `from` up to but excluding `to`. */
  read(from: number, to: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Closes it. */
  close(): void;
}

/** Opens a file, or bytes as if they were a file. */
export async function openSource(op: string, pathOrBytes: string | URL | Uint8Array): Promise<Source> {
  if (pathOrBytes instanceof Uint8Array) {
    // no slice: that of a Node Buffer, which is a Uint8Array, is not a copy
    const read = (from: number, to: number) => Promise.resolve(new Uint8Array(pathOrBytes.subarray(from, to)));
    return { name: "the data", size: pathOrBytes.byteLength, read, close: () => {} };
  }
  if (typeof pathOrBytes !== "string" && !(pathOrBytes instanceof URL)) {
    throw new TypeError(`${op}: pathOrBytes must be a path, a URL or a Uint8Array, got ${describe(pathOrBytes)}`);
  }
  const name = JSON.stringify(String(pathOrBytes));
  // checked before it is opened: opening a pipe would wait for a writer
  if (!(await naming(op, Deno.stat(pathOrBytes))).isFile) throw new RangeError(`${op}: ${name} is no file`);
  const file = await naming(op, Deno.open(pathOrBytes));
  try {
    const { size } = await file.stat();
    return {
      name,
      size,
      async read(from, to) {
        const bytes = new Uint8Array(to - from);
        await file.seek(from, Deno.SeekMode.Start);
        for (let at = 0; at < bytes.length;) {
          const count = await file.read(bytes.subarray(at));
          if (count === null) throw new RangeError(`${op}: ${name} ended at byte ${from + at} while it was read`);
          at += count;
        }
        return bytes;
      },
      close: () => file.close(),
    };
  } catch (error) {
    file.close();
    throw error;
  }
}

/** Puts the op's name in front of the messages of system errors. */
async function naming<T>(op: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    const { constructor, message } = error as Error;
    throw new (constructor as ErrorConstructor)(`${op}: ${message}`, { cause: error });
  }
}

const ATTEMPTS = 5;

/** The last work of this process on each path. */
const turns = new Map<string, Promise<unknown>>();

/** Runs `work` on a path after any earlier work on the same path. */
export async function inTurn(path: string, work: () => Promise<void>): Promise<void> {
  path = URL.parse(path, "file:///")?.href ?? path; // so that ./a equals a; the working directory itself takes a permission
  const before = turns.get(path)?.catch(() => {});
  const turn = (async () => {
    await before;
    await work();
  })();
  turns.set(path, turn);
  try {
    await turn;
  } finally {
    if (turns.get(path) === turn) turns.delete(path);
  }
}

/** Throws a TypeError unless `path` is a string, a RangeError if it is empty. */
export function checkPath(op: string, path: unknown): void {
  if (typeof path !== "string") throw new TypeError(`${op}: path must be a string, got ${describe(path)}`);
  if (path === "") throw new RangeError(`${op}: path must name a file, got ""`);
}

/**
 * Replaces a file as a whole: writes the bytes to a temporary file beside it, and renames that. If the process is killed, either the old file or the new one
 * is there, and perhaps the temporary file, which the next save to the same path removes. If the path is a link, the file that it leads to is replaced.
 * Permissions are preserved.
 */
export async function replaceFile(op: string, path: string, bytes: Uint8Array): Promise<void> {
  const link = await Deno.lstat(path).then((found) => found.isSymlink, () => false);
  const target = link ? await Deno.realPath(path).catch(() => path) : path; // a link to nothing is replaced
  const mode = await Deno.stat(target).then((old) => (old.mode ?? 0) & 0o777, () => 0);
  await naming(op, replace(target, mode, bytes));
}

/** The same without following links. Mode 0 stands for the system's default. */
async function replace(path: string, mode: number, bytes: Uint8Array): Promise<void> {
  await removeLeftovers(path);
  for (let attempt = 1;; attempt++) {
    const temporary = `${path}.${crypto.randomUUID()}.partial`;
    try {
      const file = await Deno.open(temporary, { write: true, createNew: true, mode: mode || undefined });
      try {
        for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
        await file.sync();
      } finally {
        file.close();
      }
      if (mode) await Deno.chmod(temporary, mode).catch(() => {}); // restores what the umask removed; some file systems have no modes
      return await Deno.rename(temporary, path);
    } catch (error) {
      const removed = error instanceof Deno.errors.NotFound && await exists(path.replace(/[^/\\]*$/, "") || ".");
      await Deno.remove(temporary).catch(() => {});
      // another process that saves to the same path took our temporary file for a leftover; our file is the newer one, so try again
      if (!removed || attempt === ATTEMPTS) throw error;
    }
  }
}

const exists = (path: string) => Deno.stat(path).then(() => true, () => false);

/** The suffix of temporary files. */
const TEMPORARY = /^\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.partial$/;

/** Removes the temporary files of saves that were killed. */
async function removeLeftovers(path: string): Promise<void> {
  const [, directory, name] = /^(.*?)([^/\\]*)$/s.exec(path)!;
  try {
    for await (const entry of Deno.readDir(directory || ".")) {
      const leftover = directory + entry.name;
      const isTemporary = entry.name.startsWith(name) && TEMPORARY.test(entry.name.slice(name.length));
      if (isTemporary) await Deno.remove(leftover);
    }
  } catch {
    // a directory that may not be listed keeps its leftovers; if it does not exist, the save itself throws
  }
}
