import { init, randn } from "@limbeck/limbeck";
import { drawLabels, LOSSES } from "./losses.ts";
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
