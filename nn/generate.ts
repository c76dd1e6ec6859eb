/** Samples from a decoder, one token at a time. */
import { checkNumber, checkOptions, describe } from "../kernels/check.ts";
import { cacheWrite } from "../kernels/cache.ts";
import { noGrad } from "../autograd/tape.ts";
import type { Tensor } from "../autograd/tensor.ts";
import { tensor, zeros } from "../ops/create.ts";
import { slice } from "../ops/shape.ts";
import { Embedding, isPlain, parameters } from "./layers.ts";
import type { Module } from "./module.ts";
import { splitmix32 } from "./splitmix.ts";
import { Gpt, type KeyValueCache, MultiHeadAttention, TransformerBlock } from "./transformer.ts";

/** Options of `generate`. */
export interface GenerateOptions {
  /** The number of tokens to add. */
  length: number;
  /** Logits are divided by it; 1 by default, 0 takes the most likely token. */
  temperature?: number;
  /** If given, only the k most likely tokens are drawn. */
  topK?: number;
  /** If given, only the most likely tokens that together have this probability are drawn. */
  topP?: number;
  /** Seed of the draws; 0 by default. */
  seed?: number;
  /** A token that ends its sequence, with itself as the last; the run ends when all have ended. */
  stop?: number;
}

/** One token from a row of logits. */
export function sample(
  logits: ArrayLike<number>,
  options: { temperature: number; topK?: number; topP?: number },
  random: () => number,
): number {
  if (Array.prototype.some.call(logits, Number.isNaN)) {
    throw new RangeError("generate: gpt must give numbers, got NaN among its logits");
  }
  const order = Array.from(logits, (_, i) => i).sort((a, b) => logits[b] - logits[a]); // stable: the first of equals
  if (options.temperature === 0) return order[0];
  const largest = logits[order[0]];
  const weights = order.slice(0, options.topK).map((i) => Math.exp((logits[i] - largest) / options.temperature));
  const all = weights.reduce((a, b) => a + b, 0);
  let kept = 0, mass = 0;
  while (kept < weights.length && (kept === 0 || mass < (options.topP ?? 1) * all)) mass += weights[kept++];
  let at = random() * mass;
  for (let i = 0; i < kept; i++) if ((at -= weights[i]) < 0) return order[i];
  return order[kept - 1];
}

/**
 * The prompts, each followed by `length` tokens drawn from the decoder. Keys and values of earlier tokens are kept in a cache that is allocated once, so that
 * each token costs the computation of one position, and one read.
 *
 * Prompts have equal lengths; prompt and new tokens together fit into the decoder's context. The same seed draws the same tokens. Throws a TypeError for
 * prompts that are not Int32Arrays of one length, and for a decoder (or a block without a `forwardCached` of its own) whose `forward` was replaced; a
 * RangeError for wrong numbers, for a context that is too short and for logits that are NaN. Source of top-p: Holtzman et al. 2020.
 *
 * @example
 * ```ts
 * import { init, nn } from "@limbeck/limbeck";
 *
 * await init();
 * const gpt = new nn.Gpt({ vocabulary: 10, context: 16, layers: 1, width: 8, heads: 2 });
 * const [text] = await nn.generate(gpt, [new Int32Array([1, 2, 3])], { length: 5, topK: 3, seed: 1 });
 * console.log(text.length); // 8
 * ```
 */
export async function generate(
  gpt: Gpt,
  prompts: readonly Int32Array[],
  options: GenerateOptions,
): Promise<Int32Array[]> {
  const op = "generate";
  if (!(gpt instanceof Gpt)) throw new TypeError(`${op}: gpt must be a Gpt, got ${describe(gpt)}`);
  checkOptions(op, options, ["length", "temperature", "topK", "topP", "seed", "stop"]);
  const { length, temperature = 1, topK, topP, seed = 0, stop } = options, { context, heads, width } = gpt.options;
  const vocabulary = isPlain(gpt.tokens, Embedding) ? gpt.tokens.weight.shape[0] : gpt.options.vocabulary; // as it is now
  checkNumber(op, "length", length, { integer: true, min: 0 });
  checkNumber(op, "temperature", temperature, { min: 0 });
  checkNumber(op, "seed", seed, { integer: true });
  if (topK !== undefined) checkNumber(op, "topK", topK, { integer: true, min: 1 });
  if (topP !== undefined) checkNumber(op, "topP", topP, { above: 0, max: 1 });
  if (stop !== undefined) checkNumber(op, "stop", stop, { integer: true, min: 0, below: vocabulary });
  for (const name of ["forward", "hiddenStates"] as const) {
    if (gpt[name] === Gpt.prototype[name]) continue;
    throw new TypeError(`${op}: gpt must have Gpt's own ${name}, as the pass with a cache has; got another`);
  }
  gpt.blocks.forEach(checkCached);
  const start = prompts?.[0]?.length;
  if (!Array.isArray(prompts) || !prompts.every((p) => p instanceof Int32Array && p.length === start) || !start) {
    throw new TypeError(`${op}: prompts must be Int32Arrays of one length of at least 1, got ${describe(prompts)}`);
  }
  const outside = prompts.flatMap((prompt) => [...prompt]).find((token) => token < 0 || token >= vocabulary);
  if (outside !== undefined) {
    throw new RangeError(`${op}: prompts must hold tokens in [0, ${vocabulary}), got ${outside}`);
  }
  if (start + length > context) {
    throw new RangeError(`${op}: prompt and length must fit the context ${context}, got ${start} + ${length}`);
  }

  const random = splitmix32(seed);
  // while this waits for a read, other code runs: no scope may be open then, and no flag switched
  const memories = parameters(() =>
    gpt.blocks.flatMap(({ selfAttn: attention }) => { // which a block of another class may lack
      const own = attention?.heads ?? heads, dtype = attention?.inProjWeight?.dtype === "f16" ? "f16" : "f32";
      return [0, 1].map(() => zeros([prompts.length, own, context, width / own], { dtype }));
    })
  );
  const caches = gpt.blocks.map((_, i) => ({ keys: memories[2 * i], values: memories[2 * i + 1] }));
  const texts = prompts.map((prompt) => [...prompt]), ended = prompts.map(() => false);
  try {
    let fresh = prompts.map((prompt) => [...prompt]);
    while (texts[0].length < start + length && !ended.every(Boolean)) {
      const at = texts[0].length - fresh[0].length;
      using last = noGrad(() => evaluating(gpt, () => cachedLogits(gpt, caches, fresh, at))).keep();
      const logits = await last.data(), classes = last.shape[2];
      fresh = texts.map((text, b) => {
        const next = sample(logits.subarray(b * classes, (b + 1) * classes), { temperature, topK, topP }, random);
        text.push(next);
        return [next];
      });
      texts.forEach((text, b) => ended[b] ||= text.at(-1) === stop);
    }
  } finally {
    for (const memory of memories) memory.dispose();
  }
  return texts.map((text) => {
    const end = stop === undefined ? -1 : text.indexOf(stop, start);
    return Int32Array.from(end < 0 ? text : text.slice(0, end + 1));
  });
}

/** Throws if a block has its own `forward`, which the pass with a cache would not call. */
function checkCached(block: TransformerBlock, i: number): void {
  const { prototype: plain } = TransformerBlock, { prototype: attention } = MultiHeadAttention, { selfAttn } = block;
  const isUnchanged = block.forward === plain.forward && selfAttn.forward === attention.forward &&
    selfAttn.attend === attention.attend;
  if (isUnchanged || ![undefined, plain.forwardCached].includes(block.forwardCached)) return;
  throw new TypeError(
    `generate: blocks[${i}] must have a forwardCached of its own where its forward or its attention's is replaced, got none`,
  );
}

/** Calls `fn` with the model in evaluation mode, and restores the train flag of every module. */
function evaluating<T>(model: Module, fn: () => T): T {
  const flags = new Map<Module, boolean>();
  const remember = (module: Module) => {
    if (flags.has(module)) return;
    flags.set(module, module.training);
    for (const [, child] of module.children()) remember(child);
  };
  remember(model);
  try {
    model.eval();
    return fn();
  } finally {
    for (const [module, training] of flags) module.training = training;
  }
}

/** Logits [batch, 1, vocabulary] after the last of the fresh tokens, which start at `position`. Their keys and values are added to the caches. */
function cachedLogits(gpt: Gpt, caches: KeyValueCache[], fresh: number[][], position: number): Tensor {
  const { context } = gpt.options, batch = fresh.length, count = fresh[0].length;
  const place = tensor(new Uint32Array([position]));
  const write = (cache: Tensor, x: Tensor) => {
    const [, heads, length, depth] = cache.shape, sizes = { heads: batch * heads, fresh: count, length, depth };
    cacheWrite(x.memory, place.memory, cache.memory, cache.dtype, sizes);
  };
  const seen = Int32Array.from(
    { length: count * context },
    (_, i) => i % context <= position + Math.floor(i / context) ? 1 : 0,
  );
  const mask = tensor(seen, [count, context]);
  const places = tensor(Int32Array.from({ length: count }, (_, i) => position + i));
  const tokens = tensor(Int32Array.from(fresh.flat()), [batch, count]);
  let x = gpt.tokens.forward(tokens).add(gpt.positions.forward(places));
  gpt.blocks.forEach((block, i) => x = block.forwardCached(x, caches[i], write, mask));
  const last = slice(gpt.norm.forward(x), [[0, batch], [count - 1, count]]);
  return gpt.logits(last);
}
