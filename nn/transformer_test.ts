import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  crossEntropy,
  full,
  init,
  loadSafetensors,
  manualSeed,
  nn,
  noGrad,
  ones,
  randn,
  Scope,
  stats,
  Tape,
  type Tensor,
  tensor,
  tril,
  zeros,
} from "@limbeck/limbeck";
import { largestError } from "../testing/compare.ts";
import { random } from "../testing/op.ts";

const SIZES = { vocabulary: 37, context: 16, layers: 2, width: 24, heads: 2 };

const testdata = (name: string) => new URL(`../testing/testdata/${name}.safetensors`, import.meta.url);

const numbers = (count: number, seed: number) => {
  const draw = random(seed);
  return Float32Array.from({ length: count }, () => 2 * draw() - 1);
};

const ids = (count: number, below: number) => Int32Array.from({ length: count }, (_, i) => (i * i + 3) % below);

/** Gives every parameter random values, so that none is at a special one. */
function scramble(module: nn.Module): void {
  module.namedParameters().forEach(([, x], i) => x.assign(tensor(numbers(x.size, i + 1), x.shape).mul(0.5)));
}

Deno.test("transformer: a state dict that PyTorch wrote gives PyTorch's logits", async () => {
  await init();
  using _scope = new Scope();
  const state = await loadSafetensors(testdata("state_dict"));
  const bytes = Deno.readFileSync(testdata("state_dict_io"));
  // float64, which loadSafetensors would round: read by hand
  const start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const part = (name: string) => bytes.slice(...header[name].data_offsets.map((n: number) => start + n)).buffer;
  const gpt = new nn.Gpt(SIZES).eval();
  const shapes = (tensors: Record<string, Tensor>) =>
    Object.fromEntries(Object.entries(tensors).map(([name, x]) => [name, x.shape]));
  assertEquals(shapes(gpt.stateDict()), shapes(state));
  gpt.loadStateDict(state);
  const logits = noGrad(() => gpt.forward(tensor(new Int32Array(part("ids")), header.ids.shape)));
  assertEquals(logits.shape, header.logits.shape);
  const error = largestError(await logits.data(), new Float64Array(part("logits")));
  assert(error < 1e-5, `${error}`); // some hundred roundings of f32 through two blocks
  gpt.dispose();
});

Deno.test("transformer: state names are PyTorch's", async () => {
  await init();
  const names = (module: nn.Module) => {
    const list = Object.keys(module.stateDict()).sort();
    module.dispose();
    return list;
  };
  // as [*torch.nn.MultiheadAttention(8, 2).state_dict()] and those of TransformerEncoderLayer
  const attention = ["in_proj_bias", "in_proj_weight", "out_proj.bias", "out_proj.weight"];
  assertEquals(names(new nn.MultiHeadAttention(8, 2)), attention);
  const pairs = ["linear1", "linear2", "norm1", "norm2"].flatMap((name) => [`${name}.bias`, `${name}.weight`]);
  const block = [...pairs, ...attention.map((name) => `self_attn.${name}`)];
  assertEquals(names(new nn.TransformerBlock(8, 2)), block);
  const gpt = { ...SIZES, layers: 1, tied: true };
  const decoder = [
    ...block.map((name) => `blocks.0.${name}`),
    "norm.bias",
    "norm.weight",
    "positions.weight",
    "tokens.weight",
  ];
  assertEquals(names(new nn.Gpt(gpt)), decoder);
  assertEquals(names(new nn.Gpt({ ...gpt, tied: false })), [...decoder, "head.weight"].sort());
});

Deno.test("transformer: a state dict that does not fit", async () => {
  await init();
  using _scope = new Scope();
  const state = await loadSafetensors(testdata("state_dict"));
  const tied = new nn.Gpt({ ...SIZES, tied: true }), before = await tied.tokens.weight.data();
  assertThrows(() => tied.loadStateDict(state), Error, "missing nothing; unexpected head.weight");
  const { "norm.bias": _, ...less } = state;
  const gpt = new nn.Gpt(SIZES);
  assertThrows(() => gpt.loadStateDict(less), Error, "missing norm.bias; unexpected nothing");
  const shallow = new nn.Gpt({ ...SIZES, layers: 1 });
  assertThrows(() => shallow.loadStateDict(state), Error, "unexpected blocks.1.linear1.bias");
  const wide = new nn.Gpt({ ...SIZES, hidden: 48 });
  assertThrows(
    () => wide.loadStateDict(state),
    TypeError,
    "blocks.0.linear1.weight must have shape [48, 24], got [96, 24]",
  );
  assertEquals(await tied.tokens.weight.data(), before);
  tied.loadStateDict(state, { strict: false });
  assertEquals(await tied.tokens.weight.data(), await state["tokens.weight"].data());
  for (const module of [tied, gpt, shallow, wide]) module.dispose();
});

Deno.test("transformer: where weights start", async () => {
  await init();
  manualSeed(1);
  using _scope = new Scope();
  const gpt = new nn.Gpt({ ...SIZES, width: 64, heads: 4 });
  for (const [name, x] of gpt.namedParameters()) {
    const data = Array.from(await x.data()), mean = data.reduce((a, b) => a + b) / data.length;
    const deviation = Math.sqrt(data.reduce((sum, v) => sum + (v - mean) ** 2, 0) / data.length);
    if (name.endsWith("bias")) assertEquals(new Set(data), new Set([0]), name);
    else if (x.rank === 1) assertEquals(new Set(data), new Set([1]), name);
    // n draws give their deviation to 1/√2n: five times that
    else assert(Math.abs(deviation / 0.02 - 1) < 5 / Math.sqrt(2 * data.length), `${name}: ${deviation}`);
  }
  gpt.dispose();
  const table = new nn.Embedding(100, 20);
  const data = Array.from(await table.weight.data());
  const square = data.reduce((sum, v) => sum + v * v, 0) / data.length;
  assert(Math.abs(square - 1) < 5 * Math.sqrt(2 / data.length), `${square}`); // N(0, 1)
  table.dispose();
});

Deno.test("transformer: the small layers are their ops", async () => {
  await init();
  using _scope = new Scope();
  const table = new nn.Embedding(3, 2), layer = new nn.LayerNorm(2, 0), rms = new nn.RMSNorm(2, 0);
  table.weight.assign(tensor([[1, 2], [3, 4], [5, 6]]));
  assertEquals(await table.forward(tensor(new Int32Array([2, 0]))).array(), [[5, 6], [1, 2]]);
  layer.bias.assign(tensor([10, 20]));
  assertEquals(await layer.forward(tensor([[1, 3]])).array(), [[9, 21]]);
  rms.weight.assign(tensor([1, 2]));
  assertEquals(await rms.forward(tensor([[4, -4]])).array(), [[1, -2]]);
  assertEquals([layer.eps, new nn.LayerNorm(1).eps], [0, 1e-5]);
  for (const module of [table, layer, rms]) module.dispose();
});

/** A block from primitive ops alone; `seen` is 1 where a token sees another one, else 0. */
function composed(p: Record<string, Tensor>, x: Tensor, heads: number, seen: Tensor): Tensor {
  const [batch, length, width] = x.shape, depth = width / heads;
  const normed = (x: Tensor, name: string) => {
    const centred = x.sub(x.mean({ dim: -1, keepDim: true }));
    const deviation = centred.square().mean({ dim: -1, keepDim: true }).add(1e-5).sqrt();
    return centred.div(deviation).mul(p[`${name}.weight`]).add(p[`${name}.bias`]);
  };
  const times = (x: Tensor, weight: string, bias: string) => x.matmul(p[weight].transpose(0, 1)).add(p[bias]);
  const projected = times(normed(x, "norm1"), "self_attn.in_proj_weight", "self_attn.in_proj_bias");
  const [q, k, v] = [0, 1, 2].map((i) => {
    const pick = zeros([3 * width, width]); // takes its third of the columns by a product
    pick.assign(tensor(
      Float32Array.from(
        { length: 3 * width * width },
        (_, at) => Math.floor(at / width) === i * width + at % width ? 1 : 0,
      ),
      [3 * width, width],
    ));
    return projected.matmul(pick).reshape([batch, length, heads, depth]).transpose(1, 2);
  });
  const scores = q.matmul(k.transpose(2, 3)).mul(1 / Math.sqrt(depth)).add(seen.sub(1).mul(1e30));
  const joined = scores.softmax(-1).matmul(v).transpose(1, 2).reshape([batch, length, width]);
  const y = x.add(times(joined, "self_attn.out_proj.weight", "self_attn.out_proj.bias"));
  const inner = times(normed(y, "norm2"), "linear1.weight", "linear1.bias").gelu();
  return y.add(times(inner, "linear2.weight", "linear2.bias"));
}

Deno.test("transformer: a block against primitive ops, values and all gradients", async () => {
  await init();
  const block = new nn.TransformerBlock(6, 3, { hidden: 10 }), shape = [2, 5, 6];
  scramble(block);
  const all = ones([5, 5]), padding = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0];
  const mask = tensor(new Int32Array(padding), [2, 1, 1, 5]);
  const calls: [nn.AttentionCall, Tensor][] = [
    [{}, all],
    [{ causal: true }, tril(all)],
    [{ mask }, tensor(padding, [2, 1, 1, 5])],
    [{ mask, causal: true }, tensor(padding, [2, 1, 1, 5]).mul(tril(all))],
  ];
  for (const [call, seen] of calls) {
    const run = async (forward: (x: Tensor) => Tensor) => {
      using _tape = new Tape();
      for (const p of block.parameters()) {
        p.grad?.dispose();
        p.grad = null;
      }
      const x = tensor(numbers(60, 50), shape, { requiresGrad: true }), y = forward(x);
      y.backward(tensor(numbers(60, 60), shape));
      const gradients: [string, Tensor][] = [["x", x], ...block.namedParameters()];
      const all: [string, ArrayLike<number>][] = [["y", await y.data()]];
      for (const [name, t] of gradients) all.push([name, await t.grad!.data()]);
      return all;
    };
    const got = await run((x) => block.forward(x, call));
    const want = await run((x) => composed(block.stateDict(), x, 3, seen));
    const wrong = got.flatMap(([name, values], i) => {
      const error = largestError(values, want[i][1], 1e-2); // gradients of key biases are 0
      return error < 1e-5 ? [] : [`${name} ${error}`]; // both f32, some 80 roundings
    });
    assertEquals(wrong, [], Object.keys(call).join());
  }
  block.dispose();
});

Deno.test("transformer: a decoder sees no later token", async () => {
  await init();
  using _scope = new Scope();
  const gpt = new nn.Gpt(SIZES);
  scramble(gpt);
  const tokens = ids(10, 37), changed = tokens.slice();
  changed[7] = (changed[7] + 1) % 37;
  const [a, b] = await Promise.all([tokens, changed].map((t) => gpt.forward(tensor(t, [1, 10])).data()));
  assertEquals(a.slice(0, 7 * 37), b.slice(0, 7 * 37));
  assert(a.slice(9 * 37).some((v, i) => v !== b[9 * 37 + i]), "the last one sees the change");
  gpt.dispose();
});

Deno.test("transformer: dropout in training, none in evaluation", async () => {
  await init();
  using _scope = new Scope();
  const plain = new nn.Gpt(SIZES), gpt = new nn.Gpt({ ...SIZES, dropout: 0.3 }), tokens = tensor(ids(10, 37), [1, 10]);
  scramble(plain);
  gpt.loadStateDict(plain.stateDict());
  const run = async (module: nn.Module, x: Tensor, seed: number) => {
    manualSeed(seed);
    return await module.forward(x).data();
  };
  assertEquals(await run(gpt.eval(), tokens, 1), await run(plain, tokens, 2));
  assert(!gpt.blocks[1].selfAttn.training, "eval reaches the blocks");
  const trained = await run(gpt.train(), tokens, 1);
  assertEquals(await run(gpt, tokens, 1), trained);
  assert((await run(gpt, tokens, 2)).some((v, i) => v !== trained[i]));
  assert((await run(plain, tokens, 1)).some((v, i) => v !== trained[i]));
  // the decoder drops of what goes into its blocks
  const bare = new nn.Gpt({ ...SIZES, layers: 0, dropout: 0.3 }), embedded = await run(bare, tokens, 1);
  assert((await run(bare, tokens, 2)).some((v, i) => v !== embedded[i]));
  // the attention drops weights of its own
  const attention = new nn.MultiHeadAttention(4, 2, 0.5), x = tensor(numbers(20, 3), [1, 5, 4]);
  const dropped = await run(attention, x, 1);
  assert((await run(attention.eval(), x, 1)).some((v, i) => v !== dropped[i]));
  for (const module of [plain, gpt, bare, attention]) module.dispose();
});

Deno.test("transformer: a tied head is one parameter, and its gradient the sum of both uses", async () => {
  await init();
  const tied = new nn.Gpt({ ...SIZES, tied: true }), untied = new nn.Gpt(SIZES);
  scramble(tied);
  untied.loadStateDict({ ...tied.stateDict(), "head.weight": tied.tokens.weight });
  assertEquals(tied.parameters().length, untied.parameters().length - 1);
  assert(tied.headWeight === tied.tokens.weight && untied.headWeight === untied.head!.weight);
  const tokens = ids(12, 37), target = ids(12, 36);
  const losses = [];
  for (const gpt of [tied, untied]) {
    using _tape = new Tape();
    const logits = gpt.forward(tensor(tokens, [2, 6])).reshape([12, 37]);
    const loss = crossEntropy(logits, tensor(target));
    loss.backward();
    losses.push(await loss.item());
  }
  assertEquals(losses[0], losses[1]);
  const [rows, columns] = await Promise.all([untied.tokens.weight, untied.head!.weight].map((w) => w.grad!.data()));
  const sum = Float64Array.from(rows, (g, i) => g + columns[i]);
  assert(largestError(await tied.tokens.weight.grad!.data(), sum) < 1e-6); // one addition in f32
  assert(columns.some((g) => g !== 0) && rows.some((g) => g !== 0));
  tied.dispose();
  untied.dispose();
});

Deno.test("transformer: dispose frees all", async () => {
  await init();
  const before = stats();
  const gpt = new nn.Gpt(SIZES);
  {
    using _tape = new Tape();
    gpt.forward(tensor(ids(4, 37), [1, 4])).square().mean().backward();
  }
  gpt.dispose();
  assertEquals([stats().liveTensors, stats().liveBytes], [before.liveTensors, before.liveBytes]);
});

Deno.test("transformer: what they throw", async () => {
  await init();
  using _scope = new Scope();
  assertThrows(() => new nn.MultiHeadAttention(6, 4), RangeError, "heads must divide the width 6, got 4");
  assertThrows(() => new nn.MultiHeadAttention(6, 2, 1.1), RangeError, "MultiHeadAttention: p must be");
  assertThrows(() => new nn.Embedding(0, 2), RangeError, "Embedding: count must be");
  assertThrows(() => new nn.LayerNorm(0), RangeError, "LayerNorm: width must be");
  assertThrows(() => new nn.RMSNorm(1.5), RangeError, "RMSNorm: width must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.TransformerBlock(4, 2, { ffn: 8 } as any), TypeError, 'unknown option "ffn"');
  assertThrows(() => new nn.Gpt({ ...SIZES, layers: -1 }), RangeError, "Gpt: layers must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.Gpt({ ...SIZES, tied: 1 } as any), TypeError, "Gpt: tied must be true or false");
  const gpt = new nn.Gpt({ ...SIZES, layers: 0 });
  assertEquals(gpt.forward(tensor(ids(16, 37), [1, 16])).shape, [1, 16, 37]);
  assertThrows(
    () => gpt.forward(tensor(ids(17, 37), [1, 17])),
    RangeError,
    "Gpt: tokens must have at most 16 positions",
  );
  assertThrows(() => gpt.forward(tensor(ids(4, 37))), TypeError, "Gpt: tokens must have shape [batch, T], got [4]");
  assertThrows(() => gpt.forward(zeros([1, 4])), TypeError, "Gpt: tokens must have dtype i32 or u32, got f32");
  assertThrows(() => gpt.forward(tensor(new Int32Array([37]), [1, 1])), RangeError, "must be in [0, 37), got 37");
  gpt.dispose();
  const before = stats().liveBytes;
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.LayerNorm(2, "1" as any), TypeError, "LayerNorm: eps must be a number");
  assertThrows(() => new nn.RMSNorm(2, -1), RangeError, "RMSNorm: eps must be");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => new nn.TransformerBlock(4n as any, 2), TypeError, "TransformerBlock: width must be a number");
  assertThrows(() => new nn.TransformerBlock(4, 3), RangeError, "TransformerBlock: heads must divide the width 4");
  assertThrows(() => new nn.TransformerBlock(4, 2, { hidden: 0 }), RangeError, "TransformerBlock: hidden must be");
  assertThrows(() => new nn.Gpt({ ...SIZES, context: 0 }), RangeError, "Gpt: context must be");
  assertThrows(() => new nn.Gpt({ ...SIZES, hidden: 2 ** 31 }), RangeError, "2³¹ elements");
  assertEquals(stats().liveBytes, before); // what stood before the layer that is too large
  const attention = new nn.MultiHeadAttention(4, 2), tokens = zeros([1, 2, 4]);
  // deno-lint-ignore no-explicit-any
  assertThrows(() => attention.forward(tokens, { casual: true } as any), TypeError, "did you mean causal?");
  // deno-lint-ignore no-explicit-any
  assertThrows(() => attention.attend(tokens, { causal: 1 } as any), TypeError, "MultiHeadAttention: causal must be");
  assertThrows(
    () => attention.forward(tokens, { mask: zeros([3]) }),
    TypeError,
    "mask: shapes [3] and [1, 2, 2, 2] do not broadcast",
  );
  // deno-lint-ignore no-explicit-any
  assertThrows(() => attention.merge(5 as any), TypeError, "MultiHeadAttention: x must be a Tensor, got 5");
  attention.dispose();
});

Deno.test("transformer: weights that are replaced before the backward pass have no part in it", async () => {
  await init();
  const block = new nn.TransformerBlock(4, 1), { linear2 } = block, { weight } = linear2, bias = linear2.bias!;
  const x = tensor(numbers(12, 1), [1, 3, 4], { requiresGrad: true }), leaves = [x, weight, bias];
  const gradients = async (meanwhile: () => void) => {
    for (const leaf of leaves) leaf.grad = null;
    using _tape = new Tape();
    const y = block.forward(x).square().sum();
    meanwhile();
    y.backward();
    Object.assign(linear2, { weight, bias });
    return await Promise.all(leaves.map((leaf) => leaf.grad!.data()));
  };
  const want = await gradients(() => {});
  assertEquals(await gradients(() => linear2.weight = zeros([4, 16])), want);
  assertEquals(await gradients(() => linear2.bias = null), want);
});

Deno.test("transformer: a block drops of its attention, of its hidden layer and of what that gives", async () => {
  await init();
  using _scope = new Scope();
  manualSeed(6);
  const block = new nn.TransformerBlock(4, 2, { hidden: 8, dropout: 0.5 }), x = zeros([1, 32, 4]);
  const values = async (attention: number, hidden: number, weight: number, bias: number) => {
    const { selfAttn: { outProj }, linear1, linear2 } = block;
    const of = [[outProj.bias, attention], [linear1.bias, hidden], [linear2.weight, weight], [
      linear2.bias,
      bias,
    ]] as const;
    for (const [parameter, value] of of) nn.init.constant(parameter!, value);
    return [...new Set(await block.forward(x).data())].sort();
  };
  nn.init.constant(block.linear1.weight, 0);
  assertEquals(await values(1, 0, 0, 0), [0, 2]);
  assertEquals(await values(0, 0, 0, 1), [0, 2]);
  assert((await values(0, 3, 1, 0)).length > 2); // how many of eight were dropped
  block.dispose();
});

Deno.test("transformer: a layer that was replaced is called by its own forward, with dropout and without", async () => {
  await init();
  using _scope = new Scope();
  class Doubled extends nn.Linear { // as LoRA and its like add to what the weight gives
    override forward(x: Tensor): Tensor {
      return super.forward(x).mul(2);
    }
  }
  class Twice extends nn.MultiHeadAttention {
    override forward(x: Tensor, call: nn.AttentionCall = {}): Tensor {
      return super.forward(x, call).mul(2);
    }
  }
  const x = tensor(numbers(12, 9), [1, 3, 4]);
  for (const p of [0, 1e-7]) { // of which nothing is dropped here
    const block = new nn.TransformerBlock(4, 2, { hidden: 6, dropout: p });
    scramble(block);
    const state = block.stateDict(), { selfAttn, linear1, linear2 } = block;
    const twice = (name: string): Record<string, Tensor> => ({ [name]: state[name].mul(2) });
    const cases: [string, () => void, string[]][] = [ // what doubles a layer, and the parameters that do so when doubled
      ["outProj", () => selfAttn.outProj = new Doubled(4, 4), ["self_attn.out_proj.weight", "self_attn.out_proj.bias"]],
      ["linear1", () => block.linear1 = new Doubled(4, 6), ["linear1.weight", "linear1.bias"]],
      ["linear2", () => block.linear2 = new Doubled(6, 4), ["linear2.weight", "linear2.bias"]],
      ["selfAttn", () => block.selfAttn = new Twice(4, 2), ["self_attn.out_proj.weight", "self_attn.out_proj.bias"]],
    ];
    for (const training of [true, false]) {
      block.train(training);
      for (const [name, replace, doubled] of cases) {
        const { outProj } = selfAttn, plain = new nn.TransformerBlock(4, 2, { hidden: 6 });
        plain.loadStateDict({ ...state, ...Object.assign({}, ...doubled.map(twice)) });
        replace();
        block.loadStateDict(state);
        block.train(training);
        const error = largestError(await block.forward(x).data(), await plain.forward(x).data());
        assert(error < 1e-5, `${name}, dropout ${p}, training ${training}: ${error}`);
        Object.assign(block, { linear1, linear2, selfAttn });
        selfAttn.outProj = outProj;
        plain.dispose();
      }
    }
    block.dispose();
  }
});

Deno.test("transformer: a decoder calls its own head and positions; headWeight refuses a head that is more", async () => {
  await init();
  using _scope = new Scope();
  const gpt = new nn.Gpt({ ...SIZES, layers: 0 }), tokens = tensor(ids(6, 37), [2, 3]);
  scramble(gpt);
  const { head, positions } = gpt, plain = await gpt.forward(tokens).data();
  const biased = gpt.head = new nn.Linear(24, 37), bias = numbers(37, 3);
  biased.weight.assign(head!.weight);
  biased.bias!.assign(tensor(bias));
  const error = largestError(await gpt.forward(tokens).data(), plain.map((v, i) => v + bias[i % 37]));
  assert(error < 1e-6, `${error}`); // one rounding
  assertThrows(() => gpt.headWeight, TypeError, "Gpt: head must be a Linear without bias for headWeight, got one with");
  gpt.head = head;
  head!.forward = (x) => x;
  assertEquals(gpt.forward(tokens).shape, [2, 3, 24]);
  assertThrows(() => gpt.headWeight, TypeError, "got one with a forward of its own");
  const seen: number[][] = [], reads: Promise<void>[] = [];
  positions.forward = (index) => {
    reads.push(index.data().then((data) => void seen.push([...data])));
    return zeros([3, 24]);
  };
  const hidden = gpt.hiddenStates(tokens), want = gpt.norm.forward(gpt.tokens.forward(tokens));
  await Promise.all(reads);
  assertEquals(seen, [[0, 1, 2]]);
  assertEquals(await hidden.data(), await want.data());
  for (const module of [gpt, biased]) module.dispose();
});

Deno.test("Gpt and TransformerBlock: every part has the dropout and the width that were asked for", async () => {
  await init();
  using _scope = new Scope();
  const { blocks: [block] } = new nn.Gpt({ vocabulary: 4, context: 4, layers: 1, width: 4, heads: 2, dropout: 0.25 });
  assertEquals([block.p, block.selfAttn.p, block.linear1.weight.shape], [0.25, 0.25, [16, 4]]);
  assertEquals(new nn.TransformerBlock(4, 2).linear1.weight.shape, [16, 4]);
  assertEquals(await new nn.MultiHeadAttention(4, 2).outProj.bias!.array(), [0, 0, 0, 0]);
  // all weights are dropped, also where there is a mask
  const attention = new nn.MultiHeadAttention(4, 2, 1), x = randn([1, 2, 4]);
  for (const mask of [undefined, ones([2, 2])]) assertEquals(await attention.attend(x, { mask }).abs().max().item(), 0);
  // an attention of one's own: what it adds is dropped, too
  const own = new nn.TransformerBlock(4, 2, { dropout: 1 });
  own.selfAttn.forward = (x) => x.add(1);
  own.feedForward = (x) => x.add(0);
  assertEquals(await own.forward(x).data(), await x.data());
});

Deno.test("transformer: what does not fit is refused by name", async () => {
  await init();
  using _scope = new Scope();
  const sizes = { vocabulary: 4, context: 4, layers: 0, width: 4 };
  assertThrows(() => new nn.Gpt({ ...sizes, heads: 3 }), RangeError, "Gpt: heads");
  const attention = new nn.MultiHeadAttention(4, 2);
  assertThrows(() => attention.forward(randn([2, 4])), TypeError, "x must have shape [batch, T, 4]");
  assertThrows(() => new nn.MultiHeadAttention(129, 1).forward(randn([1, 2, 129])), RangeError, "1 to 128");
  const block = new nn.TransformerBlock(4, 2);
  block.selfAttn.outProj = new nn.Linear(4, 8);
  assertThrows(() => block.forward(randn([1, 2, 4])), TypeError, "residual");
});

Deno.test("TransformerBlock: a weight that is replaced before the backward pass does not change its gradient", async () => {
  await init();
  using _scope = new Scope();
  const block = new nn.TransformerBlock(2, 1);
  const gradient = async (replace: () => void) => {
    const x = tensor([[[1, 2]]], { requiresGrad: true });
    using _tape = new Tape();
    const loss = block.forward(x).sum();
    replace();
    loss.backward();
    return await x.grad!.data();
  };
  const wanted = await gradient(() => {});
  assertEquals(await gradient(() => block.linear2.weight = full([2, 8], 3)), wanted);
});
