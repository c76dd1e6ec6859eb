/**
 * The data of the text example: a text as tokens, the logits of a teacher that is a file, and batches of both.
 *
 * @module
 */

import { type Tensor, tensor } from "@limbeck/limbeck";
import { failOption } from "./cli.ts";
import { loadTeacherLogits, type TeacherLogits } from "./teacher_logits.ts";
import { cutWindows, encode, loadMobyDick, makeVocabulary, spreadStarts } from "./text.ts";

const HELD_OUT = 0.1; // the share of the text, its end, that nobody learns from

/** Tokens and the token after each, both [batch, context]; if the teacher is a file, also its logits, [batch, context, classes]. */
export interface Batch {
  tokens: Tensor;
  targets: Tensor;
  teacher?: Tensor;
}

/** The text as tokens, in two parts; if the teacher is a file, also its logits. */
export interface Corpus {
  vocabulary: string[];
  train: Int32Array;
  heldOut: Int32Array;
  /** Where the windows of the held-out part begin. */
  heldOutStarts: number[];
  /** Of all tokens, and of the file if that is the teacher. */
  hash: string;
  file?: TeacherLogits;
}

/**
 * The text of a file (Moby Dick for an empty path) and the logits of a teacher (none for an empty path). Of the held-out part, at most `windows` windows of
 * `context` characters are used. Ends the program if a file is wrong.
 */
export async function loadCorpus(
  { text: path, teacherLogits }: { text: string; teacherLogits: string },
  context: number,
  windows: number,
): Promise<Corpus> {
  const text = path ? await readText(path) : loadMobyDick();
  let vocabulary = makeVocabulary(text.slice(0, Math.floor((1 - HELD_OUT) * text.length)));
  let file: TeacherLogits | undefined;
  if (teacherLogits) {
    file = await loadTeacherLogits(teacherLogits, vocabulary)
      .catch(({ message }) =>
        failOption("--teacher-logits", "a safetensors file of logits", `"${teacherLogits}": ${message}`)
      );
    vocabulary = file.vocabulary;
  }
  const tokens = file?.tokens ?? encode(text, vocabulary);
  const cut = Math.floor((1 - HELD_OUT) * tokens.length);
  const train = tokens.subarray(0, cut);
  const heldOut = tokens.subarray(cut);
  const disjoint = Math.floor((heldOut.length - 2) / context); // windows that do not overlap
  if (disjoint < 1) {
    const least = Math.floor((context + 1) / HELD_OUT) + 1;
    failOption(file ? "--teacher-logits" : "--text", `at least ${least} characters`, `${tokens.length}`);
  }
  const heldOutStarts = spreadStarts(heldOut, context, Math.min(disjoint, windows));
  const hash = await hashOf([tokens, ...file ? [file.digest] : []]);
  return { vocabulary, train, heldOut, heldOutStarts, hash, file };
}

async function readText(path: string): Promise<string> {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await Deno.readFile(path));
    return text.replaceAll("\r\n", "\n");
  } catch (error) {
    return failOption("--text", "a file of UTF-8 text", (error as Error).message);
  }
}

/** The windows from these starts as tensors; they belong to the innermost tape or scope. */
export function makeBatch(
  corpus: Corpus,
  part: "train" | "heldOut",
  starts: number[],
  context: number,
): Batch {
  const tokens = corpus[part];
  const shape = [starts.length, context];
  const batch: Batch = {
    tokens: tensor(cutWindows(tokens, starts, context), shape),
    targets: tensor(cutWindows(tokens, starts, context, 1), shape),
  };
  if (corpus.file === undefined) return batch;
  const first = part === "train" ? 0 : corpus.train.length;
  const window = context * corpus.vocabulary.length;
  const rows = new Float32Array(starts.length * window);
  starts.forEach((start, i) =>
    corpus.file!.copyRows(first + start, context, rows.subarray(i * window, (i + 1) * window))
  );
  return { ...batch, teacher: tensor(rows, [...shape, corpus.vocabulary.length]) };
}

/** SHA-256 in hexadecimal. */
export async function hashOf(arrays: ArrayBufferView[]): Promise<string> {
  const bytes = new Uint8Array(await new Blob(arrays as BlobPart[]).arrayBuffer());
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
}
