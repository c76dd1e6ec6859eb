/**
 * A teacher that is only a file: logits for a text, from PyTorch or anything else that writes safetensors.
 *
 *     tokens    [N]     integers   the text, as classes; row i of the logits predicts tokens[i + 1]
 *     logits    [N, V]  floats     every class, or
 *     values    [N, K]  floats     the K largest of each row, with
 *     indices   [N, K]  integers   their classes, and, if known,
 *     logSumExp [N]     floats     ln Σ exp over the whole row
 *
 * In PyTorch, for one long text:
 *
 *     values, indices = logits.topk(16)
 *     rows = {"tokens": tokens.int(), "values": values.half(), "indices": indices.int(), "logSumExp": logits.logsumexp(-1)}
 *     safetensors.torch.save_file(rows, "teacher.safetensors", {"vocabulary": "".join(characters)})
 *
 * Each tensor must fit into one binding of the GPU, 128 MiB under Mesa's software Vulkan; floats may be f16. They must be finite:
 * instead of −∞ use a number about 20 below the row's largest (a class without any mass would not work, see below).
 *
 * Character i of the metadata's `vocabulary`, a string, is class i. Without it the classes are those of the text that the example
 * would read otherwise, as its JSON lists them.
 *
 * In a sparse row the rest of the mass, 1 − Σ exp(value − logSumExp), is spread evenly over the other classes. Without `logSumExp`
 * the K values are taken to have all the mass. At least 10⁻⁶ of the mass is spread in either case: a class without any mass would
 * make every student's reverse KL infinite.
 *
 * @module
 */

import { loadSafetensors, loadSafetensorsMetadata, Scope } from "@limbeck/limbeck";

const LEAST_REST = 1e-6;

/** The content of the file. */
export interface TeacherLogits {
  tokens: Int32Array;
  vocabulary: string[];
  /** SHA-256 of the whole file. */
  digest: Uint8Array;
  /** Copies the logits of `rows` tokens from `from` on, [rows, classes], to the start of `into`. */
  copyRows(from: number, rows: number, into: Float32Array): void;
}

/** Reads and checks the file; throws an Error that says what is wrong with it. Call `init()` first. */
export async function loadTeacherLogits(path: string, ownVocabulary: string[]): Promise<TeacherLogits> {
  const bytes = await Deno.readFile(path);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const metadata = await loadSafetensorsMetadata(bytes);
  const vocabulary = metadata.vocabulary === undefined ? ownVocabulary : [...metadata.vocabulary];
  const classes = vocabulary.length;
  using _scope = new Scope(); // frees the tensors: the rows stay on the host until a batch needs them
  const tensors = await loadSafetensors(bytes);

  const check = (name: string, kind: "floats" | "integers", shape: (number | null)[]): readonly number[] => {
    const x = tensors[name];
    if (x === undefined) throw new Error(`no tensor "${name}" among ${Object.keys(tensors).join(", ")}`);
    if (x.shape.length !== shape.length || shape.some((size, i) => size !== null && size !== x.shape[i])) {
      throw new Error(`${name} must have shape [${shape.map((size) => size ?? "any")}], got [${x.shape}]`);
    }
    if (x.dtype.startsWith("f") !== (kind === "floats")) throw new Error(`${name} must hold ${kind}, got ${x.dtype}`);
    return x.shape;
  };
  const floats = async (name: string) => {
    const data = Float32Array.from(await tensors[name].data());
    const wrong = data.find((value) => !Number.isFinite(value));
    if (wrong !== undefined) throw new Error(`${name} must be finite, got ${wrong}`);
    return data;
  };
  const integers = async (name: string) => {
    const data = await tensors[name].data();
    const wrong = data.find((value) => value < 0 || value >= classes);
    if (wrong !== undefined) throw new Error(`${name} must be classes in [0, ${classes}), got ${wrong}`);
    return Int32Array.from(data);
  };

  const [rows] = check("tokens", "integers", [null]);
  const tokens = await integers("tokens");
  if ("logits" in tensors) {
    check("logits", "floats", [rows, classes]);
    const logits = await floats("logits");
    return {
      tokens,
      vocabulary,
      digest,
      copyRows: (from, rows, into) => into.set(logits.subarray(from * classes, (from + rows) * classes)),
    };
  }

  const [, k] = check("values", "floats", [rows, null]);
  if (k === 0) throw new Error(`values must have at least one class a row, got [${rows},0]`);
  check("indices", "integers", [rows, k]);
  const values = await floats("values");
  const indices = await integers("indices");
  if ("logSumExp" in tensors) check("logSumExp", "floats", [rows]);
  const logSumExp = "logSumExp" in tensors ? await floats("logSumExp") : null;
  /** A row's known logits, the largest of them, and their Σ exp(logit − largest). */
  const knownOf = (row: number) => {
    const known = values.subarray(row * k, (row + 1) * k);
    const largest = Math.max(...known);
    return { known, largest, seen: known.reduce((sum, value) => sum + Math.exp(value - largest), 0) };
  };
  for (let row = 0; row < rows; row++) {
    const own = indices.subarray(row * k, (row + 1) * k);
    if (new Set(own).size < k) throw new Error(`indices must differ within a row, got [${own}] in row ${row}`);
    if (logSumExp === null) continue;
    const { known, largest, seen } = knownOf(row);
    // at least the sum of the known ones, at most as if all others were as likely as the least of these
    const sums = [seen, seen + (classes - k) * Math.exp(Math.min(...known) - largest)];
    const [least, most] = sums.map((sum) => largest + Math.log(sum));
    const rounding = 2 ** -10 * Math.max(1, Math.abs(logSumExp[row]), ...known.map(Math.abs)); // of halves
    if (logSumExp[row] < least - rounding || logSumExp[row] > most + rounding) {
      const wanted = `that of a row whose largest are the values, ${least} to ${most} in row ${row}`;
      throw new Error(`logSumExp must be ${wanted}, got ${logSumExp[row]}`);
    }
  }
  return {
    tokens,
    vocabulary,
    digest,
    copyRows(from, rows, into) {
      for (let row = from; row < from + rows; row++) {
        const { known, largest, seen } = knownOf(row);
        const all = logSumExp ? Math.exp(logSumExp[row] - largest) : seen;
        const rest = Math.max(all - seen, LEAST_REST * all);
        const start = (row - from) * classes;
        into.fill(largest + Math.log(rest / (classes - k)), start, start + classes);
        known.forEach((value, i) => into[start + indices[row * k + i]] = value);
      }
    },
  };
}
