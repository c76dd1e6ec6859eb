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

const BUNDLE = new URL("../../out/peers/tfjs.js", import.meta.url).href; // peers.ts makes it
// deno-lint-ignore no-explicit-any
type Any = any;

export const peer: Peer = {
  async open() {
    const tf = await import(BUNDLE);
    if (!await tf.setBackend("webgpu")) throw new Error("tfjs has no WebGPU here");
    await tf.ready();
  },
  async prepare(task: Task): Promise<Prepared | null> {
    const tf = await import(BUNDLE);
    const rowsOf = async (x: Any): Promise<number[][]> => {
      const [rows, columns] = x.shape, part = (row: number) => tf.slice(x, [row, 0], [1, columns]).data();
      return [[...await part(0)], [...await part(rows - 1)]];
    };
    /** Steps that keep their last result, so that one can wait for it. */
    const keeping = (run: () => Any[]): { step: () => void; finish: () => Promise<void>; results: () => Any[] } => {
      let results: Any[] = [];
      return {
        step() {
          tf.dispose(results);
          results = tf.tidy(run);
        },
        finish: async () => void await tf.slice(tf.reshape(results[0], [-1]), 0, 1).data(),
        results: () => results,
      };
    };
    switch (task.kind) {
      case "crossEntropy": {
        const { rows, classes } = task;
        const logits = tf.tensor2d(numbers(rows * classes, 3, 1), [rows, classes]);
        // tfjs has a custom gradient only for labels as a matrix, which is made before the measurement
        const oneHot = tf.cast(tf.oneHot(tf.tensor1d(classIndices(rows, classes), "int32"), classes), "float32");
        const both = tf.valueAndGrad((x: Any) => tf.losses.softmaxCrossEntropy(oneHot, x));
        const work = keeping(() => {
          const { value, grad } = both(logits);
          return [grad, value];
        });
        return {
          ...work,
          async result() {
            work.step();
            const [gradient, value] = work.results();
            return [[...await value.data()], ...await rowsOf(gradient)];
          },
        };
      }
      case "matmul": {
        const [a, b] = operands(task).map(([values, ...shape]) => tf.tensor2d(values, shape));
        const work = keeping(() => [tf.matMul(a, b)]);
        return {
          ...work,
          result() {
            work.step();
            return rowsOf(work.results()[0]);
          },
        };
      }
      case "mlp": {
        const images = tf.tensor2d(numbers(task.batch * 784, 1, 3), [task.batch, 784]);
        const oneHot = tf.cast(tf.oneHot(tf.tensor1d(classIndices(task.batch, 10), "int32"), 10), "float32");
        const parameters = mlpParameters().map(({ weight, bias }, i) => {
          const [ins, outs] = MLP[i];
          return { weight: tf.variable(tf.tensor2d(weight, [outs, ins])), bias: tf.variable(tf.tensor1d(bias)) };
        });
        const loss = () => {
          let x = images;
          for (const [i, { weight, bias }] of parameters.entries()) {
            const activation = i < MLP.length - 1 ? "relu" : "linear";
            x = tf.fused.matMul({ a: x, b: weight, transposeB: true, bias, activation });
          }
          return tf.losses.softmaxCrossEntropy(oneHot, x);
        };
        const optimizer = tf.train.adam(ADAM.lr, ...ADAM.betas, ADAM.eps);
        const step = () => void optimizer.minimize(loss);
        return {
          step,
          finish: async () => void await parameters[2].bias.data(),
          async result() {
            for (let i = 0; i < STEPS; i++) step();
            const value = tf.tidy(loss);
            return [[...await value.data()]];
          },
        };
      }
      default:
        return null;
    }
  },
};
