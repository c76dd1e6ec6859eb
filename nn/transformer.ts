/** Attention, transformer blocks and a decoder, with PyTorch's state names. */
import { checkBoolean, checkNumber, checkOptions } from "../kernels/check.ts";
import { composed } from "../autograd/composed.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import { packedAttention, scaledDotProductAttention } from "../ops/attention.ts";
import { arange } from "../ops/create.ts";
import { dropout } from "../ops/dropout.ts";
import { linear, perceptron } from "../ops/matmul.ts";
import { slice } from "../ops/shape.ts";
import { constant, normal, xavierUniform } from "./init.ts";
import { Embedding, isPlain, LayerNorm, Linear, parameter, parameters } from "./layers.ts";
import { Module } from "./module.ts";

/** Keys and values of the tokens so far, [batch, heads, length, depth], allocated once and written in place. */
export interface KeyValueCache {
  /** By head. */
  keys: Tensor;
  /** Likewise. */
  values: Tensor;
}

/** Options of a transformer's attention in a forward pass. */
export interface AttentionCall {
  /** Whether a token sees only itself and earlier ones; false by default. */
  causal?: boolean;
  /** As `scaledDotProductAttention` takes it, for [batch, heads, T, T]: padding is 0 in an i32 mask [batch, 1, 1, T], all other tokens 1. */
  mask?: Tensor;
}

function checkBlock(op: string, width: number, heads: number, options: TransformerBlockOptions, p = "dropout"): void {
  checkNumber(op, "width", width, { integer: true, min: 1 });
  checkNumber(op, "heads", heads, { integer: true, min: 1 });
  if (width % heads !== 0) throw new RangeError(`${op}: heads must divide the width ${width}, got ${heads}`);
  const { hidden = 4 * width, dropout = 0 } = options;
  checkNumber(op, "hidden", hidden, { integer: true, min: 1, below: 2 ** 32 }); // even if there is no layer that uses it
  checkNumber(op, p, dropout, { min: 0, max: 1 });
}

/**
 * Multi-head self-attention, [batch, T, width] → the same shape: with Q, K, V the heads' parts of x·inProjWeightᵀ + inProjBias, softmax(QKᵀ/√depth)·V for
 * each head, side by side, through `outProj`. In training its weights are dropped with probability p (0 by default).
 *
 * Throws a RangeError if the number of heads does not divide the width and unless 0 ≤ p ≤ 1, `forward` a TypeError for another shape and a RangeError for heads
 * wider than 128. State names as `torch.nn.MultiheadAttention`. Source: Vaswani et al. 2017.
 *
 * @example
 * ```ts
 * import { init, nn, randn } from "@limbeck/limbeck";
 *
 * await init();
 * const attention = new nn.MultiHeadAttention(8, 2);
 * console.log(attention.forward(randn([3, 5, 8]), { causal: true }).shape); // [3, 5, 8]
 * ```
 */
export class MultiHeadAttention extends Module {
  /** [3·width, width]: queries, keys, values. */
  inProjWeight: Tensor;
  /** [3·width] */
  inProjBias: Tensor;
  /** The projection of the heads' results. */
  outProj: Linear;

  /** Attention with fresh random parameters; `p` is the probability of dropping a weight. */
  constructor(readonly width: number, readonly heads: number, readonly p = 0) {
    super();
    checkBlock("MultiHeadAttention", width, heads, { dropout: p }, "p");
    [this.inProjWeight, this.inProjBias] = parameters(() => [
      xavierUniform(parameter([3 * width, width])),
      parameter([3 * width]),
    ]);
    try {
      this.outProj = new Linear(width, width);
      constant(this.outProj.bias!, 0);
    } catch (error) {
      this.dispose(); // frees what was made before the memory ran out
      throw error;
    }
  }

  #checked(x: Tensor): Tensor {
    checkTensor("MultiHeadAttention", "x", x);
    if (x.rank === 3 && x.shape[2] === this.width) return x;
    throw new TypeError(`MultiHeadAttention: x must have shape [batch, T, ${this.width}], got [${x.shape.join(", ")}]`);
  }

  /** Queries, keys and values of x, each [batch, heads, T, depth]. */
  project(x: Tensor): [Tensor, Tensor, Tensor] {
    const [batch, length] = this.#checked(x).shape, { heads } = this, depth = this.width / heads;
    return composed("MultiHeadAttention", () => {
      const all = linear(x, this.inProjWeight, this.inProjBias).reshape([batch, length, 3, heads, depth]);
      const turned = all.permute([2, 0, 3, 1, 4]);
      const part = (i: number) => slice(turned, [[i, i + 1]]).reshape([batch, heads, length, depth]);
      return [part(0), part(1), part(2)];
    });
  }

  /** The heads' results [batch, heads, T, depth] side by side, [batch, T, width]. */
  merge(x: Tensor): Tensor {
    checkTensor("MultiHeadAttention", "x", x);
    const [batch, , length] = x.shape;
    return composed("MultiHeadAttention", () => x.permute([0, 2, 1, 3]).reshape([batch, length, this.width]));
  }

  /** The heads' results side by side, [batch, T, width], before `outProj`. */
  attend(x: Tensor, call: AttentionCall = {}): Tensor {
    checkOptions("MultiHeadAttention", call, ["causal", "mask"]);
    const { causal = false, mask } = call, dropout = this.training ? this.p : 0;
    checkBoolean("MultiHeadAttention", "causal", causal);
    this.#checked(x);
    return composed("MultiHeadAttention", () => {
      if (mask !== undefined) {
        return this.merge(scaledDotProductAttention(...this.project(x), { causal, mask, dropout }));
      }
      const all = linear(x, this.inProjWeight, this.inProjBias);
      return packedAttention(all, this.heads, { causal, dropout });
    });
  }

  /** [batch, T, width] → the same */
  override forward(x: Tensor, call: AttentionCall = {}): Tensor {
    return composed("MultiHeadAttention", () => this.outProj.forward(this.attend(x, call)));
  }
}

/** Options of `TransformerBlock`. */
export interface TransformerBlockOptions {
  /** Width of the feed-forward layer; 4 times the width by default. */
  hidden?: number;
  /** Probability of dropout on weights, activations and residuals; 0 by default. */
  dropout?: number;
}

/**
 * A pre-norm block, [batch, T, width] → the same shape: x + attention(norm1(x)), then x + linear2(gelu(linear1(norm2(x)))). State names as
 * `torch.nn.TransformerEncoderLayer(norm_first, gelu, batch_first)`. Throws a RangeError for sizes below 1, if the number of heads does not divide the width
 * and unless 0 ≤ dropout ≤ 1; `forward` as `MultiHeadAttention`. Source: Vaswani et al. 2017; pre-norm: Xiong et al. 2020.
 *
 * @example
 * ```ts
 * import { init, nn, randn } from "@limbeck/limbeck";
 *
 * await init();
 * const block = new nn.TransformerBlock(8, 2, { hidden: 16 });
 * console.log(block.forward(randn([3, 5, 8]), { causal: true }).shape); // [3, 5, 8]
 * ```
 */
export class TransformerBlock extends Module {
  /** The attention. */
  selfAttn: MultiHeadAttention;
  /** [hidden, width] */
  linear1: Linear;
  /** [width, hidden] */
  linear2: Linear;
  /** Before the attention. */
  norm1: LayerNorm;
  /** Before the feed-forward layers. */
  norm2: LayerNorm;
  /** The probability of dropout. */
  readonly p: number;

  /** A block with fresh random parameters. */
  constructor(width: number, heads: number, options: TransformerBlockOptions = {}) {
    super();
    checkOptions("TransformerBlock", options, ["hidden", "dropout"]);
    checkBlock("TransformerBlock", width, heads, options);
    const { hidden = 4 * width, dropout = 0 } = options;
    this.p = dropout;
    try {
      this.selfAttn = new MultiHeadAttention(width, heads, dropout);
      this.linear1 = new Linear(width, hidden);
      this.linear2 = new Linear(hidden, width);
      this.norm1 = new LayerNorm(width);
      this.norm2 = new LayerNorm(width);
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** Whether there is dropout between the products and the ops that their kernels could include. */
  get #dropping(): boolean {
    return this.training && this.p > 0;
  }

  #drop(x: Tensor): Tensor {
    return dropout(x, { p: this.p, training: this.training });
  }

  /** [batch, T, width] → the same */
  override forward(x: Tensor, call: AttentionCall = {}): Tensor {
    const { selfAttn } = this;
    const isOwn = selfAttn.forward !== MultiHeadAttention.prototype.forward; // and need not end with outProj
    return composed("TransformerBlock", () => {
      const inner = this.norm1.forward(x);
      const y = isOwn ? x.add(this.#drop(selfAttn.forward(inner, call))) : this.#added(x, selfAttn.attend(inner, call));
      return this.feedForward(y);
    });
  }

  /** x plus the projected results of the heads. */
  #added(x: Tensor, heads: Tensor): Tensor {
    const { outProj } = this.selfAttn;
    if (this.#dropping || !isPlain(outProj, Linear)) return x.add(this.#drop(outProj.forward(heads)));
    return perceptron(heads, [outProj], x);
  }

  /** The second half of the block. */
  feedForward(x: Tensor): Tensor {
    const { linear1, linear2 } = this;
    return composed("TransformerBlock", () => {
      const inner = this.norm2.forward(x);
      if (this.#dropping || !isPlain(linear1, Linear) || !isPlain(linear2, Linear)) {
        return x.add(this.#drop(linear2.forward(this.#drop(linear1.forward(inner).gelu()))));
      }
      const { weight, bias } = linear1;
      return perceptron(inner, [{ weight, bias, activation: "gelu" }, linear2], x);
    });
  }

  /** The block for tokens that follow those in a cache; `write` adds their keys and values to it. */
  forwardCached(x: Tensor, cache: KeyValueCache, write: (cache: Tensor, x: Tensor) => void, mask: Tensor): Tensor {
    const [q, k, v] = this.selfAttn.project(this.norm1.forward(x));
    write(cache.keys, k);
    write(cache.values, v);
    const attended = scaledDotProductAttention(q, cache.keys, cache.values, { mask });
    return this.feedForward(this.#added(x, this.selfAttn.merge(attended)));
  }
}

/** Options of `Gpt`. */
export interface GptOptions {
  /** The number of different tokens. */
  vocabulary: number;
  /** The longest sequence. */
  context: number;
  /** The number of blocks. */
  layers: number;
  /** The width of embeddings and hidden states. */
  width: number;
  /** The number of attention heads. */
  heads: number;
  /** Width of the feed-forward layers; 4 times the width by default. */
  hidden?: number;
  /** Probability of dropout; 0 by default. */
  dropout?: number;
  /** Whether the head shares the weight of the token embedding; false by default. */
  tied?: boolean;
}

/**
 * A decoder: token and learned position embeddings, pre-norm blocks, a final norm and a head without bias. [batch, T] tokens (i32 or u32) → [batch, T,
 * vocabulary] logits. State names: `tokens.weight`, `positions.weight`, `blocks.N.…`, `norm.…`, `head.weight` (absent when tied). Weights are initialized
 * with deviation 0.02, biases with 0, as in GPT-2, but without its smaller residual projections.
 *
 * Throws a RangeError for sizes below 1, if the number of heads does not divide the width and unless 0 ≤ dropout ≤ 1; `forward` a TypeError for tokens of
 * another shape or dtype, a RangeError for sequences longer than the context and for tokens outside the vocabulary that the host wrote. Source: Radford et
 * al. 2019.
 *
 * @example
 * ```ts
 * import { init, nn, randint } from "@limbeck/limbeck";
 *
 * await init();
 * const gpt = new nn.Gpt({ vocabulary: 96, context: 32, layers: 2, width: 16, heads: 2 });
 * console.log(gpt.forward(randint(0, 96, [4, 32])).shape); // [4, 32, 96]
 * ```
 */
export class Gpt extends Module {
  /** [vocabulary, width] */
  tokens: Embedding;
  /** [context, width] */
  positions: Embedding;
  /** The blocks, in order. */
  blocks: TransformerBlock[];
  /** Before the head. */
  norm: LayerNorm;
  /** [vocabulary, width], or null if it shares the weight of `tokens`. */
  head: Linear | null;
  /** The options that it was made with. */
  readonly options: Required<GptOptions>;

  /** A model with fresh random parameters. */
  constructor(options: GptOptions) {
    super();
    checkOptions("Gpt", options, ["vocabulary", "context", "layers", "width", "heads", "hidden", "dropout", "tied"]);
    const { vocabulary, context, layers, width, heads, dropout = 0, tied = false } = options;
    // check everything before the first parameter is made
    checkNumber("Gpt", "vocabulary", vocabulary, { integer: true, min: 1 });
    checkNumber("Gpt", "context", context, { integer: true, min: 1 });
    checkNumber("Gpt", "layers", layers, { integer: true, min: 0, max: 4096 });
    checkBlock("Gpt", width, heads, options);
    checkBoolean("Gpt", "tied", tied);
    const hidden = options.hidden ?? 4 * width;
    this.options = { vocabulary, context, layers, width, heads, hidden, dropout, tied };
    this.blocks = [];
    try {
      this.tokens = new Embedding(vocabulary, width);
      this.positions = new Embedding(context, width);
      while (this.blocks.length < layers) this.blocks.push(new TransformerBlock(width, heads, { hidden, dropout }));
      this.norm = new LayerNorm(width);
      this.head = tied ? null : new Linear(width, vocabulary, { bias: false });
      for (const [name, x] of this.namedParameters()) {
        if (name.endsWith("bias")) constant(x, 0);
        else if (x.rank > 1) normal(x, 0, 0.02);
      }
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** The last hidden states [batch, T, width], which the head turns into logits. */
  hiddenStates(tokens: Tensor): Tensor {
    const [, length] = this.#checked(tokens);
    const p = { p: this.options.dropout, training: this.training };
    return composed("Gpt", () => {
      let x = dropout(this.tokens.forward(tokens).add(this.#places(length)), p);
      for (const block of this.blocks) x = block.forward(x, { causal: true });
      return this.norm.forward(x);
    });
  }

  /** The embeddings of the first positions. */
  #places(length: number): Tensor {
    const { positions } = this;
    if (!isPlain(positions, Embedding)) return positions.forward(arange(0, length, 1, { dtype: "i32" }));
    return length < positions.weight.shape[0] ? slice(positions.weight, [[0, length]]) : positions.weight;
  }

  #checked(tokens: Tensor): readonly number[] {
    checkTensor("Gpt", "tokens", tokens, ["i32", "u32"]);
    if (tokens.rank !== 2) {
      throw new TypeError(`Gpt: tokens must have shape [batch, T], got [${tokens.shape.join(", ")}]`);
    }
    if (tokens.shape[1] > this.options.context) {
      throw new RangeError(
        `Gpt: tokens must have at most ${this.options.context} positions, got shape [${tokens.shape.join(", ")}]`,
      );
    }
    return tokens.shape;
  }

  /**
   * The head's weight [vocabulary, width]: with `hiddenStates` an argument of `linearCrossEntropy` and `linearDistillation`. Throws a TypeError if there is
   * more to the head, such as a bias or a `forward` of its own. Of a teacher hand in `headWeight.detach()`, or it gets a gradient.
   */
  get headWeight(): Tensor {
    const { head } = this;
    if (head === null) return this.tokens.weight;
    if (isPlain(head, Linear) && head.bias === null) return head.weight;
    const got = head.bias ? "one with a bias" : "one with a forward of its own";
    throw new TypeError(`Gpt: head must be a Linear without bias for headWeight, got ${got}; logits() takes any head`);
  }

  /** Applies the head: logits [..., vocabulary] from hidden states [..., width]. */
  logits(hidden: Tensor): Tensor {
    return this.head ? this.head.forward(hidden) : linear(hidden, this.tokens.weight);
  }

  /** Tokens [batch, T] → logits [batch, T, vocabulary] */
  override forward(tokens: Tensor): Tensor {
    return composed("Gpt", () => this.logits(this.hiddenStates(tokens)));
  }
}
