/** The tables and the picture of variational_inference. */
// @ts-types="@types/d3-array"
import { range } from "d3-array";
import type { Findings } from "../support/experiment.ts";
import { COLORS, encodeNames, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../variational_inference.ts";

export function describe(fits: Example.Fit[], shown: number[]): Findings {
  const [grey, red, blue, orange] = [COLORS[1], ...COLORS.slice(2)];
  const axis = { title: null, scale: { domain: [-2, 2] }, axis: { grid: false, values: [-2, 0, 2] } };
  /** Two deviations around the mean. */
  const ellipse = (name: string, [a, b]: number[], correlation: number) =>
    range(0, 2 * Math.PI + 0.01, Math.PI / 40).map((angle) => ({
      name,
      angle,
      x: 2 * a * Math.cos(angle),
      y: 2 * b * (correlation * Math.cos(angle) + Math.sqrt(1 - correlation ** 2) * Math.sin(angle)),
    }));
  const panel = (correlation: number): Panel => ({
    title: { text: `ρ = ${correlation}`, fontSize: 12 },
    width: 150,
    height: 150,
    data: {
      values: [
        ...ellipse("the truth", [1, 1], correlation),
        ...fits.filter((fit) => fit.correlation === correlation && fit.kl !== undefined)
          .flatMap(({ method, variance }) => ellipse(method, variance.map(Math.sqrt), 0)),
      ],
    },
    mark: { type: "line", strokeWidth: 2.2 },
    encoding: {
      x: { field: "x", type: "quantitative", ...axis },
      y: { field: "y", type: "quantitative", ...axis },
      order: { field: "angle" },
      color: encodeNames({ "the truth": grey, "reverse KL": red, "forward KL": blue }),
    },
  });
  return {
    title: "Independent for correlated: reverse KL is too narrow, forward KL too wide",
    subtitle:
      "Left: ellipses of two standard deviations. Right: the first variance; the true one is 1, reverse KL's 1 − ρ².",
    tables: [[
      ["method", "ρ", "variances", "on paper", "KL left", "−½·ln(1 − ρ²)"],
      ...fits.map(({ method, correlation, variance, kl }) => [
        method,
        `${correlation}`,
        variance.map((each) => each.toFixed(4)).join(", "),
        (method === "forward KL" ? 1 : 1 - correlation ** 2).toFixed(4),
        kl?.toFixed(4) ?? "–",
        (-0.5 * Math.log1p(-(correlation ** 2))).toFixed(4),
      ]),
    ]],
    picture: {
      hconcat: [
        { columns: 2, spacing: 24, concat: shown.map(panel) },
        linePanel(
          "how wide each model is",
          { "reverse KL": red, "ELBO": orange, "forward KL": blue },
          fits.map(({ method, correlation, variance }) => ({ name: method, x: correlation, y: variance[0] })),
          { x: { title: "correlation ρ" }, y: { title: "variance" }, width: 360, height: 360 },
        ),
      ],
      resolve: { scale: { color: "independent" } },
    },
  };
}
