import { init, matmul, ones, randn, scaledDotProductAttention, tril } from "@limbeck/limbeck";
import { compare } from "./support.ts";

const { isSoftware } = await init();
const [batch, heads, length, depth] = isSoftware ? [2, 2, 64, 32] : [16, 6, 1024, 64];
const shape = [batch, heads, length, depth], upstream = randn(shape);
const [q, k, v] = [0, 1, 2].map(() => randn(shape, { requiresGrad: true })), leaves = [q, k, v];
const later = tril(ones([length, length])).sub(1).mul(1e9); // 0 where a key may be seen, else −10⁹

for (const causal of [false, true]) {
  await compare(`attention${causal ? ", causal" : ""}, ${shape.join("×")}`, {
    fused: { forward: () => scaledDotProductAttention(q, k, v, { causal }), leaves, upstream },
    composed: {
      forward: () => {
        const scores = matmul(q, k, { transposeB: true }).mul(depth ** -0.5);
        return matmul((causal ? scores.add(later) : scores).softmax(-1), v);
      },
      leaves,
      upstream,
    },
  });
}
