import { init, layerNorm, logSoftmax, randn, rmsNorm, softmax, type Tensor } from "@limbeck/limbeck";
import { compare } from "./support.ts";

const { isSoftware } = await init();

{
  const [rows, columns] = isSoftware ? [256, 1024] : [16384, 4096], shape = [rows, columns];
  const x = randn(shape, { requiresGrad: true }),
    upstream = randn(shape),
    leaves = [x],
    last = { dim: -1, keepDim: true };
  const centred = (x: Tensor) => x.sub(x.max(last).detach()); // softmax does not depend on the shift, which therefore needs no gradient
  const exponentials = (x: Tensor) => centred(x).exp();
  await compare(`softmax, ${rows}×${columns}`, {
    fused: { forward: () => softmax(x, -1), leaves, upstream },
    composed: {
      forward: () => {
        const e = exponentials(x);
        return e.div(e.sum(last));
      },
      leaves,
      upstream,
    },
  });
  await compare(`logSoftmax, ${rows}×${columns}`, {
    fused: { forward: () => logSoftmax(x, -1), leaves, upstream },
    composed: { forward: () => centred(x).sub(exponentials(x).sum(last).log()), leaves, upstream },
  });
}

{
  const [rows, columns] = isSoftware ? [512, 256] : [16384, 1024], shape = [rows, columns], eps = 1e-5;
  const x = randn(shape, { requiresGrad: true }), weight = randn([columns], { requiresGrad: true });
  const bias = randn([columns], { requiresGrad: true }), upstream = randn(shape), last = { dim: -1, keepDim: true };
  await compare(`layerNorm, ${rows}×${columns}`, {
    fused: { forward: () => layerNorm(x, weight, bias, { eps }), leaves: [x, weight, bias], upstream },
    composed: {
      forward: () => {
        const centred = x.sub(x.mean(last)), variance = centred.square().mean(last);
        return centred.mul(variance.add(eps).rsqrt()).mul(weight).add(bias);
      },
      leaves: [x, weight, bias],
      upstream,
    },
  });
  await compare(`rmsNorm, ${rows}×${columns}`, {
    fused: { forward: () => rmsNorm(x, weight, { eps }), leaves: [x, weight], upstream },
    composed: {
      forward: () => x.mul(x.square().mean(last).add(eps).rsqrt()).mul(weight),
      leaves: [x, weight],
      upstream,
    },
  });
}
