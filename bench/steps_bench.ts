import {
  crossEntropy,
  init,
  manualSeed,
  matmul,
  nn,
  noGrad,
  optim,
  randint,
  randn,
  relu,
  Tape,
  type Tensor,
  transpose,
} from "@limbeck/limbeck";
import { atLabels } from "./losses.ts";
import { assertNear, compareSteps, dropGradients } from "./support.ts";

await init();
const LEARNING_RATE = 1e-3, DECAY = 0.01, BETAS = [0.9, 0.999], EPS = 1e-8;
const batch = 128, images = randn([batch, 784]), labels = randint(0, 10, [batch]);

function makeMlp(): nn.Sequential {
  manualSeed(1);
  return new nn.Sequential(new nn.Linear(784, 256), relu, new nn.Linear(256, 256), relu, new nn.Linear(256, 10));
}

/** AdamW composed of primitive ops, in place. */
function composedAdamW(parameters: Tensor[]): () => void {
  const state = parameters.map((p) => ({ mean: p.detach().mul(0), square: p.detach().mul(0) }));
  let steps = 0;
  return () => {
    steps++;
    const correction = BETAS.map((beta) => 1 - beta ** steps);
    noGrad(() => {
      for (const [i, p] of parameters.entries()) {
        const { mean, square } = state[i], gradient = p.grad!;
        mean.assign(mean.mul(BETAS[0]).add(gradient.mul(1 - BETAS[0])));
        square.assign(square.mul(BETAS[1]).add(gradient.square().mul(1 - BETAS[1])));
        const step = mean.div(correction[0]).div(square.div(correction[1]).sqrt().add(EPS));
        p.assign(p.mul(1 - LEARNING_RATE * DECAY).sub(step.mul(LEARNING_RATE)));
      }
    });
  };
}

// the optimizers alone: both get the same gradients
{
  const fused = makeMlp().parameters(), composed = makeMlp().parameters(), size = fused.reduce((n, p) => n + p.size, 0);
  const optimizer = new optim.AdamW(fused, { lr: LEARNING_RATE, weightDecay: DECAY }), update = composedAdamW(composed);
  const gradients = fused.map((p) => randn(p.shape));
  for (const parameters of [fused, composed]) {
    using _tape = new Tape();
    parameters.map((p, i) => p.mul(gradients[i]).sum()).reduce((a, b) => a.add(b)).backward();
  }
  for (let step = 0; step < 3; step++) {
    optimizer.step();
    update();
  }
  // updates of size 10⁻³ and parameters of at most 1 agree up to a few roundings
  for (const [i, p] of fused.entries()) await assertNear(`AdamW: parameter ${i}`, p, composed[i], 1e-6);
  compareSteps(`AdamW, ${size} parameters`, { fused: () => optimizer.step(), composed: update });
}

{
  const fused = makeMlp(), composed = makeMlp(), parameters = composed.parameters();
  const optimizer = new optim.AdamW(fused.parameters(), { lr: LEARNING_RATE, weightDecay: DECAY });
  const fusedLoss = () => crossEntropy(fused.forward(images), labels);
  const fusedStep = () => {
    using _tape = new Tape();
    const loss = fusedLoss();
    optimizer.zeroGrad();
    loss.backward();
    optimizer.step();
  };

  const [w1, b1, w2, b2, w3, b3] = parameters, update = composedAdamW(parameters);
  const layer = (x: Tensor, weight: Tensor, bias: Tensor) => matmul(x, transpose(weight, 0, 1)).add(bias);
  const logits = () => layer(relu(layer(relu(layer(images, w1, b1)), w2, b2)), w3, b3);
  const composedLoss = () => atLabels(logits().logSoftmax(-1), labels).mean().neg();
  const composedStep = () => {
    using _tape = new Tape();
    const loss = composedLoss();
    dropGradients(parameters);
    loss.backward();
    update();
  };

  const before = await noGrad(fusedLoss).item();
  for (let step = 0; step < 5; step++) {
    fusedStep();
    composedStep();
  }
  // AdamW's first steps move a parameter by the sign of its gradient, however small that is: single parameters may differ, the loss does not
  const after = noGrad(fusedLoss);
  await assertNear("training step: the loss after 5", after, noGrad(composedLoss), 1e-3);
  if (!(await after.item() < before)) throw new Error("training step: the loss does not fall");
  compareSteps(`training step of an MLP 784-256-256-10, batch ${batch}`, { fused: fusedStep, composed: composedStep });
}
