/** Records which op made each live tensor, and in debug mode the line that called it. Only in debug mode and while `expectNoLeaks` runs. */
import type { Gpu, Made } from "../kernels/gpu/gpu.ts";
import type { Tensor } from "./tensor.ts";

/** Called for every new tensor. */
export function enter(tensor: Tensor, { ledger, debug }: Gpu, op: string): void {
  ledger?.set(tensor, { op, place: debug ? callingLine() : null });
}

/** The live tensors of a device, in the order in which they were made, and what made them. */
export function entries({ ledger }: Gpu): [Tensor, Made][] {
  return [...ledger ?? []] as [Tensor, Made][];
}

/** The folder of this package as stack traces show it, which may differ from its URL. */
const HERE = /(?:at |@)(.*)autograd\/ledger\.ts/.exec(new Error().stack ?? "")?.[1] ?? "";
const OWN = new RegExp(`${RegExp.escape(HERE)}(mod|(kernels|autograd|ops|nn)/(?!.*_test)[^:]*)\\.ts`);

/** The first line of a stack trace that is outside of this package; in a bundle, where no file shows which that is, the whole trace. */
export function outside(stack = ""): string {
  const lines = stack.split("\n").filter((line) => /^\s*at |@/.test(line)).map((line) => line.trim());
  if (HERE === "") return lines.join("\n  ");
  return lines.find((line) => !OWN.test(line) && !line.includes("<anonymous>")) ?? lines.at(-1) ??
    "at an unknown place";
}

function callingLine(): string {
  const limits = Error as { stackTraceLimit?: number }, before = limits.stackTraceLimit;
  limits.stackTraceLimit = 100; // V8 gives 10 frames, which may all be ours
  const { stack } = new Error();
  limits.stackTraceLimit = before;
  return outside(stack);
}
