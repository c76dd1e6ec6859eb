/** The tables and the picture of policy_kl. */
// @ts-types="@types/d3-array"
import { group, max, mean, min, range } from "d3-array";
import type { Findings } from "../support/experiment.ts";
import { optimum } from "../support/lake.ts";
import { COLORS, linePanel } from "../support/report.ts";
import type * as Example from "../policy_kl.ts";

export function describe(
  points: Example.Point[],
  { SAMPLES, GRADIENT_STEPS, OBJECTIVES }: Pick<typeof Example, "SAMPLES" | "GRADIENT_STEPS" | "OBJECTIVES">,
): Findings {
  const methods = Object.keys(OBJECTIVES);
  const updates = range(max(points, ({ update }) => update)! + 1);
  const best = optimum();
  const [red, blue, orange] = COLORS.slice(2);
  const colors = { unconstrained: red, "KL penalty": blue, clipped: orange };
  const over = (method: string, update: number, key: "score" | "kl") =>
    mean(points.filter((point) => point.method === method && point.update === update), (point) => point[key])!;
  const curves = (key: "score" | "kl") =>
    methods.flatMap((name) => updates.map((update) => ({ name, x: update + 1, y: over(name, update, key) })));
  const lasting = (method: string) =>
    // of each seed, over the last third
    Array.from(
      group(points.filter((point) => point.method === method && point.update >= updates.length * 2 / 3), ({ seed }) =>
        seed),
      ([, own]) =>
        mean(own, ({ score }) => score)!,
    );
  return {
    title: "A policy that strays too far from the one that played gets stuck",
    subtitle: `Means over ${
      lasting(methods[0]).length
    } seeds; ${GRADIENT_STEPS} gradient steps on the same ${SAMPLES} samples an update.`,
    tables: [[
      ["method", "return in the end", "of the worst seed", "mean KL(old‖new)", "largest"],
      ...methods.map((method) => {
        const kls = points.filter((point) => point.method === method).map(({ kl }) => kl);
        return [method, mean(lasting(method))!, min(lasting(method))!, mean(kls)!, max(kls)!]
          .map((x) => typeof x === "string" ? x : x.toFixed(3));
      }),
    ]],
    notes: [`The best policy's return is ${best.toFixed(3)}. "In the end" is over the last third of the updates.`, ""],
    picture: {
      resolve: { scale: { color: "independent" } },
      hconcat: [
        linePanel(
          "return",
          { ...colors, "best policy": COLORS[1] },
          [...curves("score"), ...[1, updates.length].map((x) => ({ name: "best policy", x, y: best }))],
          { x: { title: "update" }, y: { title: "share of episodes that reach the goal", domain: [0, 1] }, width: 360 },
        ),
        linePanel("how far an update moves the policy", colors, curves("kl"), {
          x: { title: "update" },
          y: { title: "KL(old‖new), nats", log: true },
          width: 360,
        }),
      ],
    },
  };
}
