/** Calls `fn` with a directory that is gone afterwards. */
export async function inDirectory<T>(fn: (directory: string) => Promise<T>): Promise<T> {
  const directory = await Deno.makeTempDir();
  try {
    return await fn(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}
