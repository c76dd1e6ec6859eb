import { init, randn, skewForwardKl, skewReverseKl, type Tensor, totalVariation } from "@limbeck/limbeck";
import { drawLabels, klTwin, LOSSES } from "./losses.ts";
import { compare } from "./support.ts";

const { isSoftware } = await init();
const [rows, classes] = isSoftware ? [64, 8192] : [4096, 32000];
const student = randn([rows, classes], { requiresGrad: true }), teacher = randn([rows, classes]);
const [whole, someIgnored] = [false, true].map((ignored) => ({
  student,
  teacher,
  ...drawLabels(rows, classes, ignored),
}));
const leaves = [student];

for (const { name, plain, everyOption } of LOSSES) {
  await compare(`${name}, ${rows}×${classes}`, {
    fused: { forward: () => plain.fused(whole), leaves },
    composed: { forward: () => plain.twin(whole), leaves },
  });
  await compare(`${name}, every option, ${rows}×${classes}`, {
    fused: { forward: () => everyOption.fused(someIgnored), leaves },
    composed: { forward: () => everyOption.twin(someIgnored), leaves },
  });
}

// the divergences that the report leaves out
const ALPHA = 0.1;
const logMixture = (a: Tensor, b: Tensor) => a.softmax(-1).mul(ALPHA).add(b.softmax(-1).mul(1 - ALPHA)).log();
const others: [name: string, fused: () => Tensor, twin: () => Tensor][] = [
  [
    "skewForwardKl",
    () => skewForwardKl(student, teacher, { alpha: ALPHA }),
    () => klTwin(teacher, logMixture(teacher, student)).mean(),
  ],
  [
    "skewReverseKl",
    () => skewReverseKl(student, teacher, { alpha: ALPHA }),
    () => klTwin(student, logMixture(student, teacher)).mean(),
  ],
  [
    "totalVariation",
    () => totalVariation(student, teacher),
    () => teacher.softmax(-1).sub(student.softmax(-1)).abs().sum({ dim: -1 }).mul(0.5).mean(),
  ],
];
for (const [name, fused, twin] of others) {
  await compare(`${name}, ${rows}×${classes}`, {
    fused: { forward: fused, leaves },
    composed: { forward: twin, leaves },
  });
}
