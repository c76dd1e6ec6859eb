import { checkFunction, describe } from "../kernels/check.ts";
import { DTYPES, isFloat } from "./storage.ts";
import { activeTape, type Choices, choosing, generator, isInCheckpoint, noGrad, type Tape } from "./tape.ts";
import { checkTensor, Tensor } from "./tensor.ts";

/** The state that determines what the next random op of a tape draws. */
const randomOf = ({ random }: Tape) => ({ random: random && { ...random }, generator: { ...generator } });

function setRandom(tape: Tape, to: ReturnType<typeof randomOf>): void {
  tape.random = to.random;
  Object.assign(generator, to.generator);
}

/**
 * `fn(...inputs)` without keeping its intermediate results: the backward pass computes them again. This costs a second forward pass and saves the memory of the
 * intermediate results.
 *
 * `fn` is synchronous and returns one tensor; if it calls `keep()` on it, the tensor is yours, and the recomputed one is freed. The recomputation draws the
 * same random numbers, with dropout on or off as before; anything else that `fn` reads must not change before `backward()`. Gradients reach the inputs and
 * all parameters that `fn` uses. Throws a TypeError if `fn` returns a Promise or anything else but a Tensor. Source: Chen et al. 2016;
 * `torch.utils.checkpoint`.
 *
 * @example
 * ```ts
 * import { checkpoint, init, nn, randn, Tape } from "@limbeck/limbeck";
 *
 * await init();
 * const block = new nn.TransformerBlock(16, 2, { dropout: 0.1 });
 * using tape = new Tape();
 * checkpoint((x) => block.forward(x), randn([2, 8, 16])).square().mean().backward();
 * console.log(block.linear1.weight.grad!.shape); // [64, 16]
 * ```
 */
export function checkpoint(fn: (...inputs: Tensor[]) => Tensor, ...inputs: Tensor[]): Tensor {
  checkFunction("checkpoint", "fn", fn);
  inputs.forEach((x, i) => checkTensor("checkpoint", `inputs[${i}]`, x, DTYPES));
  const tape = activeTape();
  const checked = (output: unknown): Tensor => {
    if (output instanceof Promise) output.catch(() => {});
    if (!(output instanceof Tensor)) {
      throw new TypeError(`checkpoint: fn must return a Tensor, got ${describe(output)}`);
    }
    return output;
  };
  if (tape === null || isInCheckpoint()) return checked(fn(...inputs)); // inside another checkpoint, which runs it again anyway
  const made: unknown[] = [], before = randomOf(tape), earlier = Tensor.count;
  const forward: Choices = { made, next: null, isNeeded: false };
  const output = choosing(forward, () => noGrad(() => checked(fn(...inputs))));
  // nothing to record: fn did not make the output, or no gradient flows through it
  if (output.number < earlier || output.requiresGrad || !isFloat(output.dtype) || !forward.isNeeded) return output;
  const records = inputs.map((x) => x.record);
  // the recomputation adds gradients to the inputs' own records, so that `backward` has none to return
  tape.add({
    op: "checkpoint",
    inputs,
    output,
    saved: inputs,
    backward: (dOutput) => {
      // an input that was closed since is still saved; a view takes its place
      const again = inputs.map((x, i) => {
        if (!x.closed) return x;
        const view = x.sameMemory(x.shape, "checkpoint");
        view.record = records[i];
        view.requiresGrad = records[i] !== null;
        return view;
      });
      tape.walkAgain(() => { // only fn repeats: what the backward rules choose and draw, they choose and draw for the first time
        const after = randomOf(tape);
        setRandom(tape, before);
        try {
          return choosing({ made, next: 0, isNeeded: true }, () => fn(...again));
        } finally {
          setRandom(tape, after);
        }
      }, dOutput);
      return inputs.map(() => null); // they have got theirs in the walk
    },
  });
  return output;
}
