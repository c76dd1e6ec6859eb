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

const BUNDLE = new URL("../../out/peers/jax.js", import.meta.url).href; // peers.ts makes it
// deno-lint-ignore no-explicit-any
type Any = any;
// jax-js counts references: an argument is used up unless it is passed as `x.ref`

export const peer: Peer = {
  async open() {
    const { defaultDevice, init } = await import(BUNDLE);
    const devices = await init("webgpu");
    if (!devices.includes("webgpu")) throw new Error(`jax-js has no WebGPU here, only ${devices}`);
    defaultDevice("webgpu");
  },
  async prepare(task: Task): Promise<Prepared | null> {
    const { blockUntilReady, jit, nn, numpy: np, valueAndGrad } = await import(BUNDLE);
    const array = (values: Float32Array | Int32Array, ...shape: number[]) => np.array(values).reshape(shape);
    const rowsOf = async (x: Any): Promise<number[][]> => {
      const [rows, columns] = x.shape, data = await x.data();
      return [[...data.subarray(0, columns)], [...data.subarray((rows - 1) * columns)]];
    };
    /** Starts the computation of an array, which jax-js would otherwise postpone until it is read, and drop if it never is. */
    const start = (x: Any) => void x.ref.gpuBufferSync();
    // jax-js's oneHot makes a [classes, classes] table; a comparison does not
    const crossEntropy = (logits: Any, labels: Any) => {
      const [rows, classes] = logits.shape;
      const own = np.equal(labels.reshape([rows, 1]), np.arange(classes).reshape([1, classes]));
      return nn.logSoftmax(logits, -1).mul(own).sum().mul(-1 / rows);
    };
    switch (task.kind) {
      case "crossEntropy": {
        const { rows, classes } = task;
        const logits = array(numbers(rows * classes, 3, 1), rows, classes);
        const labels = array(classIndices(rows, classes), rows);
        const both = jit((logits: Any, labels: Any) => valueAndGrad(crossEntropy)(logits, labels));
        let results: Any[] = [];
        const step = () => {
          for (const x of results) x.dispose();
          results = both(logits.ref, labels.ref);
          results.forEach(start);
        };
        return {
          step,
          finish: async () => void await blockUntilReady(results),
          async result() {
            step();
            const [value, gradient] = results;
            results = [];
            return [[...await value.data()], ...await rowsOf(gradient)];
          },
        };
      }
      case "matmul": {
        const [a, b] = operands(task).map((operand) => array(...operand));
        const product = jit((a: Any, b: Any) => np.matmul(a, b));
        let c: Any;
        const step = () => {
          c?.dispose();
          c = product(a.ref, b.ref);
          start(c);
        };
        return {
          step,
          finish: async () => void await blockUntilReady(c),
          async result() {
            step();
            const rows = await rowsOf(c);
            c = undefined;
            return rows;
          },
        };
      }
      case "mlp": {
        const images = array(numbers(task.batch * 784, 1, 3), task.batch, 784);
        const labels = array(classIndices(task.batch, 10), task.batch);
        const loss = (parameters: Any[], images: Any, labels: Any) => {
          let x = images;
          for (let i = 0; i < MLP.length; i++) {
            x = np.matmul(x, parameters[2 * i].transpose()).add(parameters[2 * i + 1]);
            if (i < MLP.length - 1) x = nn.relu(x);
          }
          return crossEntropy(x, labels);
        };
        const { lr, betas, eps } = ADAM;
        const adam = jit((state: Any, corrections: Any, images: Any, labels: Any) => {
          const [value, gradients] = valueAndGrad(loss)(state.parameters.map((p: Any) => p.ref), images, labels);
          const [first, second] = [corrections.ref.slice(0), corrections.slice(1)];
          const parameters: Any[] = [], means: Any[] = [], squares: Any[] = [];
          state.parameters.forEach((p: Any, i: number) => {
            const gradient = gradients[i];
            const mean = state.means[i].mul(betas[0]).add(gradient.ref.mul(1 - betas[0]));
            const square = state.squares[i].mul(betas[1]).add(np.square(gradient).mul(1 - betas[1]));
            const step = mean.ref.mul(first.ref).div(np.sqrt(square.ref.mul(second.ref)).add(eps));
            parameters.push(p.sub(step.mul(lr)));
            means.push(mean);
            squares.push(square);
          });
          first.dispose();
          second.dispose();
          return { value, state: { parameters, means, squares } };
        });
        const parameters = mlpParameters().flatMap(({ weight, bias }, i) => {
          const [ins, outs] = MLP[i];
          return [array(weight, outs, ins), array(bias, outs)];
        });
        const zeros = () => parameters.map((p) => np.zeros(p.shape));
        let state: Any = { parameters, means: zeros(), squares: zeros() }, value: Any, steps = 0;
        const step = () => {
          value?.dispose();
          steps++;
          const corrections = np.array(Float32Array.from(betas, (beta) => 1 / (1 - beta ** steps)));
          ({ value, state } = adam(state, corrections, images.ref, labels.ref));
          [value, ...state.parameters].forEach(start);
        };
        return {
          step,
          finish: async () => void await blockUntilReady(state.parameters),
          async result() {
            for (let i = 0; i < STEPS; i++) step();
            const after = loss(state.parameters.map((p: Any) => p.ref), images.ref, labels.ref);
            return [[...await after.data()]];
          },
        };
      }
      default:
        return null;
    }
  },
};
