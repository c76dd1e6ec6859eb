/** Gradient clipping. */
import { checkNumber } from "../kernels/check.ts";
import { scale } from "../kernels/elementwise.ts";
import { noGrad } from "../autograd/tape.ts";
import { checkTensor, type Tensor } from "../autograd/tensor.ts";
import { zeros } from "../ops/create.ts";
import { total } from "../ops/row_loss.ts";
import { stack } from "../ops/shape.ts";
import { checkIterable } from "./optim.ts";

/**
 * Scales the gradients so that their norm √Σ‖g‖² is at most `maxNorm`, and returns the norm before that as a scalar, all on the GPU. With `maxNorm` Infinity
 * it only measures. Parameters without a gradient are skipped. An infinite norm makes finite gradients 0 and infinite ones NaN, a norm of NaN makes all of
 * them NaN, as in PyTorch. Throws a TypeError for a parameter that is not a Tensor, a RangeError for a negative `maxNorm`. Source: Pascanu, Mikolov & Bengio
 * 2013; `torch.nn.utils.clip_grad_norm_`. Outside a tape or scope, as between steps that accumulate gradients, the norm is yours to free: `using norm = …`.
 *
 * @example
 * ```ts
 * import { init, optim, Tape, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * const w = tensor([3, 4], { requiresGrad: true });
 * using tape = new Tape();
 * w.square().sum().mul(0.5).backward(); // the gradient is w
 * console.log(await optim.clipGradNorm([w], 1).item(), await w.grad!.array()); // 5, [0.6, 0.8]
 * ```
 */
export function clipGradNorm(params: Iterable<Tensor>, maxNorm: number): Tensor {
  checkIterable("clipGradNorm", params);
  checkNumber("clipGradNorm", "maxNorm", maxNorm, { min: 0, infinite: true });
  const gradients: Tensor[] = [];
  for (const [i, x] of [...params].entries()) {
    checkTensor("clipGradNorm", `params[${i}]`, x);
    if (x.grad) gradients.push(x.grad);
  }
  return noGrad(() => {
    if (gradients.length === 0) return zeros([]);
    const norm = stack(gradients.map((g) => total(g, "clipGradNorm", "sumOfSquares"))).sum().sqrt();
    if (maxNorm === Infinity) return norm; // not through a factor, which would be NaN for an infinite norm
    const factor = norm.add(1e-6).pow(-1).mul(maxNorm).minimum(1);
    for (const g of gradients) {
      scale(g.storage.writable(), factor.memory, g.size, g.dtype, factor.dtype);
    }
    return norm;
  });
}
