/**
 * The frozen lake of reinforcement learning, 4×4 fields with holes: a small task whose best policy can be computed.
 *
 * @module
 */

// @ts-types="@types/d3-array"
import { mean, range } from "d3-array";

const GRID = [
  "S...",
  ".O.O",
  "...O",
  "O..G",
].join(""); // start, holes, goal
const SIDE = 4;
export const STATES: number = SIDE ** 2; // numbered row by row; an episode begins in the first
const MOVES = [[0, -1], [1, 0], [0, 1], [-1, 0]];
export const SLIP = 0.1; // of the moves go in a random direction
export const LONGEST = 50; // the most steps of an episode

/** Where a move leads, and what it earns. */
export function act(state: number, move: number): { next: number; reward: number; end: boolean } {
  const [x, y] = [state % SIDE + MOVES[move][0], Math.floor(state / SIDE) + MOVES[move][1]];
  const next = x < 0 || y < 0 || x >= SIDE || y >= SIDE ? state : y * SIDE + x;
  if (GRID[next] === "G") return { next, reward: 1, end: true };
  if (GRID[next] === "O") return { next, reward: 0, end: true };
  return { next, reward: 0, end: false };
}

/** The best policy's chance of reaching the goal in time, by dynamic programming. */
export function optimum(): number {
  let chances: number[] = GRID.split("").map(() => 0);
  for (const _ of range(LONGEST)) {
    chances = GRID.split("").map((_, state) => {
      const after = MOVES.map((_, move) => act(state, move)).map(({ next, reward, end }) =>
        end ? reward : chances[next]
      );
      return (1 - SLIP) * Math.max(...after) + SLIP * mean(after)!;
    });
  }
  return chances[0];
}
