import { crossEntropy, forwardKl, init, linear, linearCrossEntropy, linearDistillation, randn } from "@limbeck/limbeck";
import { crossEntropyTwin, drawLabels, forwardKlTwin } from "./losses.ts";
import { compare } from "./support.ts";

const { isSoftware } = await init();
const [rows, depth, classes] = isSoftware ? [128, 64, 2048] : [4096, 1024, 32000];
const chunkSize = isSoftware ? 64 : undefined; // so that there are chunks
const hidden = randn([rows, depth], { requiresGrad: true }), teacherHidden = randn([rows, depth]);
const [weight, teacherWeight] = [0, 1].map(() => randn([classes, depth]).mul(depth ** -0.5));
weight.requiresGrad = true;
const labels = drawLabels(rows, classes, true), leaves = [hidden, weight];
const student = () => linear(hidden, weight), teacher = () => linear(teacherHidden, teacherWeight);
const inputs = () => ({ student: student(), teacher: teacher(), ...labels });

await compare(`linearCrossEntropy, ${rows}×${depth}×${classes}`, {
  fused: { forward: () => linearCrossEntropy(hidden, weight, labels.labels, { chunkSize }), leaves },
  "two ops": { forward: () => crossEntropy(student(), labels.labels), leaves },
  composed: { forward: () => crossEntropyTwin(student(), labels), leaves },
});

await compare(`linearDistillation, ${rows}×${depth}×${classes}`, {
  fused: {
    forward: () =>
      linearDistillation(hidden, weight, teacherHidden, teacherWeight, { chunkSize, labels: labels.labels }),
    leaves,
  },
  "two ops": { forward: () => forwardKl(student(), teacher(), { labels: labels.labels }), leaves },
  composed: { forward: () => forwardKlTwin(inputs(), 1), leaves },
});
