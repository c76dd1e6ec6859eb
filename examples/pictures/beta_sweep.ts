/** The tables and the picture of beta_sweep. */
// @ts-types="@types/d3-array"
import { group, mean } from "d3-array";
import type { Findings } from "../support/experiment.ts";
import { COLORS, INK, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../beta_sweep.ts";

export function describe(
  { students, values }: Awaited<ReturnType<typeof Example.betaSweep>>,
  { MODES, DEVIATION, LISTED }: Pick<typeof Example, "MODES" | "DEVIATION" | "LISTED">,
): Findings {
  const [red, blue] = COLORS.slice(2);
  const byBeta = Array.from(group(students, ({ beta }) => beta), ([beta, own]) => ({
    beta,
    coverage: mean(own, ({ coverage }) => coverage)!,
    quality: mean(own, ({ quality }) => quality)!,
    best: own.reduce((best, student) => student.loss < best.loss ? student : best),
  }));
  const percent = (share: number) => (100 * share).toFixed(0);
  const side = 150, unit = side / 10; // pixels
  const disc = (deviation: number) => Math.PI * (2 * deviation * unit) ** 2; // two deviations, as an area
  const axis = { axis: null, scale: { domain: [-5, 5] } };
  const picture = ({ beta, best }: typeof byBeta[number]): Panel => ({
    title: { text: `β = ${beta}`, fontSize: 12, offset: 4 },
    width: side,
    height: side,
    encoding: {
      x: { field: "x", type: "quantitative", ...axis },
      y: { field: "y", type: "quantitative", ...axis },
      size: { field: "area", type: "quantitative", scale: null },
    },
    layer: [{
      data: { values: MODES.map(([x, y]) => ({ x, y, area: disc(DEVIATION) })) },
      mark: { type: "point", filled: true, opacity: 1, color: "#9ca3af" },
    }, {
      data: { values: best.parts.map((part) => ({ ...part, area: disc(part.deviation) })) },
      mark: { type: "point", fill: red, fillOpacity: 0.35, stroke: red, strokeWidth: 2, opacity: 1 },
    }],
  });
  const shown = byBeta.filter(({ beta }) => [0, 0.1, 0.5, 0.9, 1].includes(beta));
  const inner = values.filter(({ beta }) => beta > 0 && beta < 1);
  const line = (name: string, y: (value: Example.Value) => number) =>
    inner.map((value) => ({ name, x: value.beta, y: y(value) }));
  return {
    title: "A small student covers modes at β = 0 and seeks them at β = 1",
    subtitle: [
      "Grey: the teacher's six modes. Red: the best student's two Gaussians.",
      "Discs have a radius of two standard deviations.",
    ],
    tables: [[
      ["jsd", "coverage, %", "quality, %"],
      ...byBeta.map(({ beta, coverage, quality }) => [`β = ${beta}`, percent(coverage), percent(quality)]),
    ], [
      ["P = [.9, .1], Q = [.6, .4]", "jsd", "its gradient", "normalised", "its gradient"],
      ...values.filter(({ beta }) => LISTED.includes(beta)).map((value) => [
        `β = ${value.beta}`,
        ...[value.plain, value.plainGradient, value.normalized, value.normalizedGradient].map((x) => x.toPrecision(4)),
      ]),
    ]],
    notes: [
      `Coverage: modes with at least a fifth of the probability that the teacher gives them, mean of ${
        students.length / byBeta.length
      } starts.`,
      "Quality: the probability of being in a mode. At β = 0 and 1 the library runs the KLs.",
      "",
    ],
    picture: {
      resolve: { scale: { color: "independent" } },
      vconcat: [
        { hconcat: shown.map(picture), spacing: 16 },
        {
          spacing: 60,
          resolve: { scale: { color: "independent" } },
          hconcat: [
            linePanel(
              "what the students keep",
              { coverage: blue, quality: red },
              byBeta.flatMap(({ beta, coverage, quality }) => [
                { name: "coverage", x: beta, y: 100 * coverage },
                { name: "quality", x: beta, y: 100 * quality },
              ]),
              { x: { title: "β" }, y: { title: "%", domain: [0, 100] }, width: 340, height: 220 },
            ),
            {
              layer: [
                linePanel(
                  "jsd of [.9, .1] and [.6, .4]",
                  { "as defined": COLORS[1], normalised: INK },
                  [...line("as defined", ({ plain }) => plain), ...line("normalised", ({ normalized }) => normalized)],
                  { x: { title: "β" }, y: { title: "nats", domain: [0, 0.35] }, width: 340, height: 220 },
                ),
                {
                  data: { values: [values[0], values.at(-1)!].map(({ beta, plain }) => ({ x: beta, y: plain })) },
                  mark: { type: "point", filled: true, size: 60, color: INK },
                  encoding: { x: { field: "x", type: "quantitative" }, y: { field: "y", type: "quantitative" } },
                },
              ],
            },
          ],
        },
      ],
    },
  };
}
