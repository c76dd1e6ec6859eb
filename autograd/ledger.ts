/** Which op made each live tensor, in debug mode also on which line. Kept only in debug mode and while `expectNoLeaks` runs. */
import type { Gpu, Made } from "../kernels/gpu/gpu.ts";
import type { Tensor } from "./tensor.ts";

/** Called for every new tensor. */
export function enter(tensor: Tensor, { ledger, debug }: Gpu, op: string): void {
  ledger?.set(tensor, { op, place: debug ? callingLine() : null });
}

/** The live tensors of a device, in the order they were made, with how they came to be. */
export function entries({ ledger }: Gpu): [Tensor, Made][] {
  return [...ledger ?? []] as [Tensor, Made][];
}

/** The folder of this package as stacks show it, which is not always as the URL does. */
const HERE = /(?:at |@)(.*)autograd\/ledger\.ts/.exec(new Error().stack ?? "")?.[1] ?? "";
const OWN = new RegExp(`${RegExp.escape(HERE)}(mod|(kernels|autograd|ops|nn)/(?!.*_test)[^:]*)\\.ts`);

/** The first line of the stack that is outside of this package. */
function callingLine(): string {
  const limits = Error as { stackTraceLimit?: number }, before = limits.stackTraceLimit;
  limits.stackTraceLimit = 100; // V8 gives 10 frames, which may all be ours
  const lines = new Error().stack?.split("\n").slice(1) ?? [];
  limits.stackTraceLimit = before;
  return (lines.find((line) => !OWN.test(line) && !line.includes("<anonymous>")) ?? lines.at(-1) ??
    "at an unknown place").trim();
}
