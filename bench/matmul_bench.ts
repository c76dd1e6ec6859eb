import { init, linear, matmul, randn, relu, transpose } from "@limbeck/limbeck";
import { assertProduct, compare } from "./support.ts";

const { isSoftware } = await init();

// a product composed of primitive ops: elementwise products and a sum
{
  const n = isSoftware ? 64 : 512, upstream = randn([n, n]);
  const a = randn([n, n], { requiresGrad: true }), b = randn([n, n], { requiresGrad: true }), leaves = [a, b];
  await compare(`matmul, ${n}³`, {
    fused: { forward: () => matmul(a, b), leaves, upstream },
    composed: { forward: () => a.reshape([n, n, 1]).mul(b.reshape([1, n, n])).sum({ dim: 1 }), leaves, upstream },
  });
}

{
  const n = isSoftware ? 256 : 4096, upstream = randn([n, n]);
  const a = randn([n, n], { requiresGrad: true }), b = randn([n, n], { requiresGrad: true }), leaves = [a, b];
  for (const o of [{ transposeA: true }, { transposeB: true }]) {
    const [name] = Object.keys(o);
    await assertProduct(name, a, b, o);
    const moved = () => name === "transposeA" ? matmul(transpose(a, 0, 1), b) : matmul(a, transpose(b, 0, 1));
    await compare(`matmul, ${n}³, ${name}`, {
      fused: { forward: () => matmul(a, b, o), leaves, upstream },
      "composed of transpose and matmul": { forward: moved, leaves, upstream },
    });
  }
}

{
  const [rows, ins, outs] = isSoftware ? [256, 64, 256] : [4096, 384, 1536], upstream = randn([rows, outs]);
  const x = randn([rows, ins], { requiresGrad: true }), weight = randn([outs, ins], { requiresGrad: true });
  const bias = randn([outs], { requiresGrad: true }), leaves = [x, weight, bias];
  await compare(`linear with bias and relu, ${rows}×${ins}×${outs}`, {
    fused: { forward: () => relu(linear(x, weight, bias)), leaves, upstream },
    composed: { forward: () => relu(matmul(x, transpose(weight, 0, 1)).add(bias)), leaves, upstream },
  });
}
