/**
 * Optimizer steps over flat blocks: one dispatch updates all parameters of a segment. Parameters, gradients and state lie in slots whose sizes are multiples of
 * 64 floats. `slot_of` gives the slot of each 64 floats. `settings` holds 8 numbers per slot that change from step to step (learning rate, bias corrections,
 * whether the slot takes part).
 */
import { type BufferType, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";

/** Numbers per slot: the rule defines s0 … s6; s7 is 0 if the slot takes no part in the step. */
export const SETTINGS = 8;

/** The rule of an optimizer: how many state blocks it has and how it changes p, with gradient g, state a, b, c and numbers s0 … s6. */
export interface Rule {
  name: string;
  states: number;
  wgsl: string;
}

/** The rules that have a kernel. */
export type RuleName = "sgd" | "sgdMomentum" | "adam" | "amsgrad" | "rmsprop" | "rmspropFull" | "adagrad";

/** nn/rules.ts computes each rule's numbers. A decay β is given as 1 − β, which f32 could not compute from a β near 1. */
export const RULES: Record<RuleName, Rule> = {
  // s0 lr, s1 weight decay
  sgd: { name: "SGD", states: 0, wgsl: "g += decayed_(p, s1); p -= s0 * g;" },
  // and s2 momentum, s3 1 − dampening (1 in the first step, in which the buffer is the gradient), s4 1 for Nesterov's momentum
  sgdMomentum: {
    name: "SGD",
    states: 1,
    wgsl: "g += decayed_(p, s1); a = s2 * a + s3 * g; p -= s0 * select(a, g + s2 * a, s4 == 1.0);",
  },
  // s0 lr/(1 − β1ᵗ), s1 decay added to the gradient, s2 factor of decoupled decay, s3 1 − β1, s4 1 − β2, s5 ε, s6 1/√(1 − β2ᵗ)
  adam: {
    name: "Adam",
    states: 2,
    wgsl:
      "p *= s2; g += decayed_(p, s1); a = mixed_(a, g, s3); b = (1.0 - s4) * b + s4 * g * g; p -= s0 * a / (sqrt(b) * s6 + s5);",
  },
  // the same numbers as adam
  amsgrad: {
    name: "Adam",
    states: 3,
    wgsl:
      "p *= s2; g += decayed_(p, s1); a = mixed_(a, g, s3); b = (1.0 - s4) * b + s4 * g * g; c = max(c, b); p -= s0 * a / (sqrt(c) * s6 + s5);",
  },
  // s0 lr, s1 weight decay, s2 1 − α, s3 ε
  rmsprop: {
    name: "RMSprop",
    states: 1,
    wgsl: "g += decayed_(p, s1); a = (1.0 - s2) * a + s2 * g * g; p -= s0 * g / (sqrt(a) + s3);",
  },
  // and s4 momentum, s5 1 if the variance is centred
  rmspropFull: {
    name: "RMSprop",
    states: 3,
    wgsl:
      "g += decayed_(p, s1); a = (1.0 - s2) * a + s2 * g * g; b = (1.0 - s2) * b + s2 * g * s5; c = s4 * c + g / (sqrt(max(a - b * b, vec4f(0.0))) + s3); p -= s0 * c;",
  },
  // s0 lr/(1 + (t − 1)·decay), s1 weight decay, s2 ε
  adagrad: { name: "Adagrad", states: 1, wgsl: "g += decayed_(p, s1); a += g * g; p -= s0 * g / (sqrt(a) + s2);" },
};

const kernel = variants((key: RuleName) => {
  const rule = RULES[key];
  const states = ["a", "b", "c"].slice(0, rule.states);
  return {
    name: rule.name,
    buffers: {
      slotOf: "read u32",
      settings: "read f32",
      gradients: "read vec4f",
      parameters: "write vec4f",
      ...Object.fromEntries(states.map((s): [string, BufferType] => [`${s}State`, "write vec4f"])),
    },
    params: { quads: "u32" },
    head: `fn decayed_(p: vec4f, decay: f32) -> vec4f { return select(decay * p, vec4f(0.0), decay == 0.0); } // 0·∞ = 0
// a + share·(g − a), from the nearer end, so that a much larger one leaves the digits of the other
fn mixed_(a: vec4f, g: vec4f, share: f32) -> vec4f {
  return select(a + share * (g - a), g - (1.0 - share) * (g - a), share >= 0.5);
}
`,
    main: `if (thread >= params.quads) { return; }
  let at = slot_of[thread / 16u] * ${SETTINGS}u;
  if (settings[at + 7u] == 0.0) { return; }
  let s0 = settings[at]; let s1 = settings[at + 1u]; let s2 = settings[at + 2u]; let s3 = settings[at + 3u];
  let s4 = settings[at + 4u]; let s5 = settings[at + 5u]; let s6 = settings[at + 6u];
  var p = parameters[thread];
  var g = gradients[thread];
  ${states.map((s) => `var ${s} = ${s}_state[thread];`).join(" ")}
  ${rule.wgsl}
  parameters[thread] = p;
  ${states.map((s) => `${s}_state[thread] = ${s};`).join(" ")}`,
  };
});

/** One step over a segment of `floats` floats (a multiple of 64). */
export function optimizerStep(
  rule: RuleName,
  floats: number,
  memories: { slotOf: Memory; settings: Memory; gradients: Memory; parameters: Memory; states: Memory[] },
): void {
  const { states, ...rest } = memories;
  const buffers: Record<string, Memory> = { ...rest };
  states.forEach((memory, i) => buffers[`${"abc"[i]}State`] = memory);
  kernel(rule).run(buffers, { quads: floats / 4 }, Math.ceil(floats / 1024));
}
