import { checkBoolean, checkNumber, checkOptions } from "../kernels/check.ts";
import { sizeOf } from "../kernels/elementwise.ts";
import { attention, attentionBackward, type AttentionSizes, LONGEST_HEAD } from "../kernels/attention.ts";
import { composed } from "../autograd/composed.ts";
import { nextRandom } from "../autograd/random.ts";
import { chosen, hidden, record } from "../autograd/tape.ts";
import { checkShape, checkTensor, Tensor } from "../autograd/tensor.ts";
import { broadcastShape, mapped } from "./mapped.ts";
import { checkRank } from "./shape.ts";

const op = "scaledDotProductAttention";

/** Options of `scaledDotProductAttention`. */
export interface AttentionOptions {
  /** Whether query i sees only keys 0 … i; false by default. */
  causal?: boolean;
  /** Added to the scores (f32), or 1 for a visible key and 0 for a hidden one (i32); broadcast to [..., T, S]. Gets no gradient. */
  mask?: Tensor;
  /** Factor of the scores; 1/√D by default. */
  scale?: number;
  /** Probability of dropping a weight; 0 by default. */
  dropout?: number;
}

/**
 * softmax(scale·q·kᵀ + mask)·v over the last two dimensions: q [..., T, D], k and v [..., S, D], equal leading dimensions → [..., T, D]. D up to 128.
 *
 * The T×S weights are never stored: tiles of them are computed when needed, and again in the backward pass. A query that sees no key gives 0;
 * a score of −3.4e38 or below, as from a mask of the least finite numbers, counts as not seen.
 * Gradients, with W the weights and δ = Σ dO·O by row: dV = Wᵀ·dO, dS = W∘(dO·vᵀ − δ), dQ = scale·dS·k, dK = scale·dSᵀ·q. Throws a TypeError for wrong
 * shapes, a RangeError for wrong values, for D > 128, and on software adapters for more keys or queries than their loops reach (thousands).
 *
 * Source: Vaswani et al. 2017; tiling: Dao et al. 2022 (FlashAttention); `torch.nn.functional.scaled_dot_product_attention`.
 *
 * @example
 * ```ts
 * import { init, randn, scaledDotProductAttention } from "@limbeck/limbeck";
 *
 * await init();
 * const q = randn([2, 4, 16, 8]), k = randn([2, 4, 16, 8]), v = randn([2, 4, 16, 8]); // [batch, heads, T, D]
 * console.log(scaledDotProductAttention(q, k, v, { causal: true }).shape); // [2, 4, 16, 8]
 * ```
 */
export function scaledDotProductAttention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  checkOptions(op, options, ["causal", "mask", "scale", "dropout"]);
  checkTensor(op, "q", q);
  checkRank(op, "q", q, 2);
  const [queries, depth] = q.shape.slice(-2), lead = q.shape.slice(0, -2);
  checkDepth(q, depth);
  checkTensor(op, "k", k, [q.dtype]);
  checkRank(op, "k", k, 2);
  const keys = k.shape.at(-2)!;
  checkShape(op, "k", k, [...lead, keys, depth]);
  checkTensor(op, "v", v, [q.dtype], [...lead, keys, depth]);
  const { causal = false, mask, scale = 1 / Math.sqrt(depth), dropout = 0 } = options;
  checkBoolean(op, "causal", causal);
  checkNumber(op, "scale", scale);
  checkNumber(op, "dropout", dropout, { min: 0, max: 1 });
  return composed(op, () => {
    let scores: Tensor | null = null, maskStride = 0;
    if (mask !== undefined) {
      checkTensor(op, "mask", mask, ["f32", "i32"]);
      const shared = sizeOf(mask.shape.slice(0, -2)) === 1 && mask.rank >= 2;
      const shape = shared ? mask.shape.slice(-2) : mask.shape;
      const wanted = shared ? [queries, keys] : [...lead, queries, keys];
      if (broadcastShape(`${op}: mask`, [shape, wanted]).join() !== wanted.join()) {
        throw new TypeError(
          `${op}: mask must broadcast to [${wanted.join(", ")}], got shape [${mask.shape.join(", ")}]`,
        );
      }
      using own = mask.sameMemory(shape, op);
      // not recorded: debug mode would report the −∞
      scores = mask.dtype === "i32"
        ? mapped(op, "select(log_(0.0), 0.0, a != 0.0)", [own], wanted, [], "f32")
        : shape.join() === wanted.join()
        ? own.sameMemory(wanted, op)
        : mapped(op, "a", [own], wanted);
      maskStride = shared ? 0 : queries * keys;
    }
    const rows = (count: number) => ({ offset: 0, batch: 0, head: count * depth, row: depth });
    return attend([q, k, v], Tensor.empty(q.shape, q.dtype, op), scores, {
      batches: 1,
      heads: sizeOf(lead),
      queries,
      keys,
      depth,
      q: rows(queries),
      k: rows(keys),
      v: rows(keys),
      o: rows(queries),
      scale,
      causal,
      maskStride,
      dropout,
    });
  });
}

/** Runs and records attention over q, k and v, or over one tensor that holds all three. */
function attend(
  inputs: [Tensor, Tensor, Tensor] | [Tensor],
  o: Tensor,
  scores: Tensor | null,
  given: Omit<AttentionSizes, "op">,
): Tensor {
  const dropout = chosen(given.dropout), random = dropout > 0 ? nextRandom() : null;
  const sizes = { ...given, dropout, op: random?.op ?? 0 };
  const element = o.dtype, [q, k, v] = inputs.length === 1 ? [inputs[0], inputs[0], inputs[0]] : inputs;
  const each = [sizes.batches, sizes.heads, sizes.queries], lse = hidden(each, "f32");
  const buffers = () => ({
    q: q.memory,
    k: k.memory,
    v: v.memory,
    mask: scores?.memory ?? null,
    state: random?.state.memory ?? null,
    o: o.memory,
    lse: lse.memory,
  });
  attention(element, buffers(), sizes);
  const recorded = record({
    op,
    inputs,
    output: o,
    saved: [...inputs, o, ...scores ? [scores] : [], ...random ? [random.state] : []],
    hidden: [lse],
    backward: (dO, wants, gradientOf) => {
      using delta = hidden(each, "f32");
      // computed in any case: its kernel also computes `delta`, which the keys' kernel reads
      const dQ = wants[0] ? gradientOf(0) : Tensor.empty(q.shape, q.dtype, op);
      const [dK, dV] = inputs.length === 1
        ? [dQ, dQ]
        : wants[1] || wants[2]
        ? [gradientOf(1), gradientOf(2)]
        : [null, null];
      const memories = {
        dO: dO.memory,
        delta: delta.memory,
        dQ: dQ.memory,
        dK: dK?.memory ?? null,
        dV: dV?.memory ?? null,
      };
      attentionBackward(element, buffers(), memories, sizes);
      return inputs.length === 1 ? [dQ] : [wants[0] ? dQ : null, dK, dV];
    },
  });
  random?.done();
  scores?.dispose(); // the record keeps what it saved
  return recorded;
}

/**
 * Internal: self-attention for a tensor that holds the queries, keys and values of a token side by side: [batch, T, 3·heads·D] → [batch, T, heads·D]. Like
 * `scaledDotProductAttention`, without permuting anything.
 */
export function packedAttention(
  all: Tensor,
  heads: number,
  { causal, dropout }: { causal: boolean; dropout: number },
): Tensor {
  const [batches, length, triple] = all.shape, width = triple / 3, depth = width / heads;
  checkDepth(all, depth);
  const part = (i: number) => ({ offset: i * width, batch: length * triple, head: depth, row: triple });
  return attend([all], Tensor.empty([batches, length, width], all.dtype, op), null, {
    batches,
    heads,
    queries: length,
    keys: length,
    depth,
    q: part(0),
    k: part(1),
    v: part(2),
    o: { offset: 0, batch: length * width, head: depth, row: width },
    scale: 1 / Math.sqrt(depth),
    causal,
    maskStride: 0,
    dropout,
  });
}

function checkDepth(x: Tensor, depth: number): void {
  if (depth >= 1 && depth <= LONGEST_HEAD) return;
  throw new RangeError(`${op}: q must have 1 to ${LONGEST_HEAD} features a head, got shape [${x.shape.join(", ")}]`);
}
