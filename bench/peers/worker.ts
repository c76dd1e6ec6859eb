/**
 * Runs one task in one peer, in a process of its own, so that a peer that hangs or aborts does not affect others. Prints a line of JSON.
 *
 * @module
 */

import type { Peer, Task } from "./work.ts";

/** What a worker prints. */
export interface Answer {
  /** Milliseconds of a step; null if the task has not been written for the peer. */
  milliseconds: number | null;
  /** Each part is compared by its own largest number. */
  result: number[][];
}

const ROUNDS = 5, LEAST_MILLISECONDS = 200;

async function work(file: string, task: Task): Promise<Answer> {
  const { peer }: { peer: Peer } = await import(`./${file}.ts`);
  await peer.open();
  const prepared = await peer.prepare(task);
  if (!prepared) return { milliseconds: null, result: [] };
  const result = await prepared.result();
  const run = async (steps: number) => {
    const start = performance.now();
    for (let i = 0; i < steps; i++) prepared.step();
    await prepared.finish();
    return performance.now() - start;
  };
  let steps = 1;
  while (await run(steps) < LEAST_MILLISECONDS) steps *= 2;
  await run(2 * steps);
  const times: number[] = [];
  // the difference of two runs does not include the cost of waiting
  for (let i = 0; i < ROUNDS; i++) times.push((await run(3 * steps) - await run(steps)) / (2 * steps));
  return { milliseconds: times.sort((a, b) => a - b)[ROUNDS >> 1], result };
}

if (import.meta.main) {
  const [file, task] = Deno.args;
  console.log(JSON.stringify(await work(file, JSON.parse(task))));
  Deno.exit(0); // peers keep devices and timers open
}
