import {
  crossEntropy,
  forwardKl,
  init,
  jsd,
  matmul,
  nn,
  noGrad,
  optim,
  relu,
  Scope,
  slice,
  Tape,
  type Tensor,
  tensor,
} from "@limbeck/limbeck";
import { dropGradients, finish } from "../support.ts";
import {
  ADAM,
  classIndices,
  MLP,
  mlpParameters,
  numbers,
  operands,
  type Peer,
  type Prepared,
  STEPS,
  type Task,
} from "./work.ts";

const first = (x: Tensor) => slice(x, [[0, 1]]), last = (x: Tensor) => slice(x, [[x.shape[0] - 1, x.shape[0]]]);

async function rowsOf(x: Tensor): Promise<number[][]> {
  using _scope = new Scope();
  return [[...await first(x).data()], [...await last(x).data()]];
}

function prepareLoss(logits: Tensor, loss: () => Tensor): Prepared {
  const backward = () => {
    const value = loss();
    value.backward();
    return value;
  };
  return {
    step() {
      using _tape = new Tape();
      backward();
      dropGradients([logits]);
    },
    finish,
    async result() {
      using _tape = new Tape();
      const value = await backward().item(), rows = await rowsOf(logits.grad!);
      dropGradients([logits]);
      return [[value], ...rows];
    },
  };
}

function prepareTraining(model: nn.Module, loss: () => Tensor): Prepared {
  const optimizer = new optim.Adam(model.parameters(), ADAM);
  const step = () => {
    using _tape = new Tape();
    const value = loss();
    optimizer.zeroGrad();
    value.backward();
    optimizer.step();
  };
  return {
    step,
    finish,
    async result() {
      for (let i = 0; i < STEPS; i++) step();
      return [[await noGrad(loss).item()]];
    },
  };
}

/** Initial parameters of a GPT, the same as in Python: seeded by the index of their names in alphabetical order. */
function setParameters(model: nn.Module): void {
  const named = [...model.namedParameters()].sort(([a], [b]) => a < b ? -1 : 1);
  for (const [i, [name, p]] of named.entries()) {
    if (p.rank > 1) p.assign(tensor(numbers(p.size, 0.03, 100 + i), p.shape));
    else p.assign(tensor(new Float32Array(p.size).fill(name.endsWith("weight") ? 1 : 0), p.shape));
  }
}

export const peer: Peer = {
  async open() {
    await init();
  },
  // deno-lint-ignore require-await
  async prepare(task: Task): Promise<Prepared> {
    switch (task.kind) {
      case "matmul": {
        const [a, b] = operands(task).map(([values, ...shape]) => tensor(values, shape));
        return {
          step: () => matmul(a, b).dispose(),
          finish,
          async result() {
            using product = matmul(a, b);
            return await rowsOf(product);
          },
        };
      }
      case "mlp": {
        const layers = MLP.map(([ins, outs]) => new nn.Linear(ins, outs));
        for (const [i, { weight, bias }] of mlpParameters().entries()) {
          layers[i].weight.assign(tensor(weight, layers[i].weight.shape));
          layers[i].bias!.assign(tensor(bias));
        }
        const model = new nn.Sequential(layers[0], relu, layers[1], relu, layers[2]);
        const images = tensor(numbers(task.batch * 784, 1, 3), [task.batch, 784]);
        const labels = tensor(classIndices(task.batch, 10));
        return prepareTraining(model, () => crossEntropy(model.forward(images), labels));
      }
      case "gpt": {
        const { layers, width, heads, batch, context, classes } = task;
        const model = new nn.Gpt({ vocabulary: classes, context, layers, width, heads });
        setParameters(model);
        const tokens = tensor(classIndices(batch * context, classes), [batch, context]);
        return prepareTraining(model, () => crossEntropy(model.forward(tokens), tokens));
      }
      default: {
        const { kind, rows, classes } = task, shape = [rows, classes];
        const student = tensor(numbers(rows * classes, 3, 1), shape, { requiresGrad: true });
        if (kind === "crossEntropy") {
          const labels = tensor(classIndices(rows, classes));
          return prepareLoss(student, () => crossEntropy(student, labels));
        }
        const teacher = tensor(numbers(rows * classes, 3, 2), shape);
        return prepareLoss(student, () => kind === "jsd" ? jsd(student, teacher) : forwardKl(student, teacher));
      }
    }
  },
};
