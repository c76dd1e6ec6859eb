/** Reading parts of files, and replacing files as a whole. */
import { describe } from "../kernels/check.ts";

/** Bytes that are read a part at a time. */
export interface Source {
  /** What messages call it. */
  name: string;
  /** All bytes. */
  size: number;
  /** A copy of the bytes between. */
  read(from: number, to: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Ends it. */
  close(): void;
}

/** Opens a file, or bytes as if they were one. */
export async function openSource(op: string, pathOrBytes: string | URL | Uint8Array): Promise<Source> {
  if (pathOrBytes instanceof Uint8Array) {
    // a Buffer of Node's is a Uint8Array whose slice is no copy
    const read = (from: number, to: number) => Promise.resolve(new Uint8Array(pathOrBytes.subarray(from, to)));
    return { name: "the data", size: pathOrBytes.byteLength, read, close: () => {} };
  }
  if (typeof pathOrBytes !== "string" && !(pathOrBytes instanceof URL)) {
    throw new TypeError(`${op}: pathOrBytes must be a path, a URL or a Uint8Array, got ${describe(pathOrBytes)}`);
  }
  const name = JSON.stringify(String(pathOrBytes));
  // looked at before it is opened: opening a pipe would wait for somebody to write
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

/** What the system refuses, with the op's name in front of what it says. */
async function naming<T>(op: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    const { constructor, message } = error as Error;
    throw new (constructor as ErrorConstructor)(`${op}: ${message}`, { cause: error });
  }
}

/** Temporary files that this process is writing. */
const writing = new Set<string>();
const ATTEMPTS = 5;

/** What this process does last with each path. */
const turns = new Map<string, Promise<unknown>>();

/** Does something with a path behind what was begun with it before. */
export async function inTurn(path: string, work: () => Promise<void>): Promise<void> {
  path = URL.parse(path, "file:///")?.href ?? path; // ./a is a; where the folder lies takes a permission
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

/** Throws a TypeError for what is no string, a RangeError for an empty one. */
export function checkPath(op: string, path: unknown): void {
  if (typeof path !== "string") throw new TypeError(`${op}: path must be a string, got ${describe(path)}`);
  if (path === "") throw new RangeError(`${op}: path must name a file, got ""`);
}

/**
 * Replaces a file as a whole: the bytes go to a temporary file beside it, which is then renamed. A kill leaves the old file or the new one, and perhaps the
 * temporary file, which the next save of the same path removes. A link stays a link: the file that it leads to is replaced. Permissions stay.
 */
export async function replaceFile(op: string, path: string, bytes: Uint8Array): Promise<void> {
  const link = await Deno.lstat(path).then((found) => found.isSymlink, () => false);
  const target = link ? await Deno.realPath(path).catch(() => path) : path; // a link to nothing is replaced
  const mode = await Deno.stat(target).then((old) => (old.mode ?? 0) & 0o777, () => 0);
  await naming(op, replace(target, mode, bytes));
}

/** With mode 0 the system's own. */
async function replace(path: string, mode: number, bytes: Uint8Array): Promise<void> {
  await removeLeftovers(path);
  for (let attempt = 1;; attempt++) {
    const temporary = `${path}.${crypto.randomUUID()}.partial`;
    writing.add(temporary);
    try {
      const file = await Deno.open(temporary, { write: true, createNew: true, mode: mode || undefined });
      try {
        for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
        await file.sync();
      } finally {
        file.close();
      }
      if (mode) await Deno.chmod(temporary, mode).catch(() => {}); // what the umask took; some file systems have no modes
      return await Deno.rename(temporary, path);
    } catch (error) {
      const removed = error instanceof Deno.errors.NotFound && await exists(path.replace(/[^/\\]*$/, "") || ".");
      await Deno.remove(temporary).catch(() => {});
      // Another process that saves the same path took our temporary file for a leftover. Its file was written before ours, which is the newer one: try again
      if (!removed || attempt === ATTEMPTS) throw error;
    } finally {
      writing.delete(temporary);
    }
  }
}

const exists = (path: string) => Deno.stat(path).then(() => true, () => false);

/** What `replace` puts behind a path. */
const TEMPORARY = /^\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.partial$/;

/** Removes the temporary files of saves that were killed. */
async function removeLeftovers(path: string): Promise<void> {
  const [, directory, name] = /^(.*?)([^/\\]*)$/s.exec(path)!;
  try {
    for await (const entry of Deno.readDir(directory || ".")) {
      const leftover = directory + entry.name;
      const isTemporary = entry.name.startsWith(name) && TEMPORARY.test(entry.name.slice(name.length));
      if (isTemporary && !writing.has(leftover)) await Deno.remove(leftover);
    }
  } catch {
    // a directory that may not be listed keeps its leftovers; one that does not exist is the save's own error
  }
}
