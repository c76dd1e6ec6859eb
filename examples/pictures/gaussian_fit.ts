/** The tables and the picture of gaussian_fit. */
import type { Findings } from "../support/experiment.ts";
import { normal } from "../support/peaks.ts";
import { COLORS, encodeNames, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../gaussian_fit.ts";

export function describe(
  { fits, slopes }: Awaited<ReturnType<typeof Example.gaussianFit>>,
  { GRID, STARTS, DISTANCES, CLOSED_FORMS }: Pick<typeof Example, "GRID" | "STARTS" | "DISTANCES" | "CLOSED_FORMS">,
): Findings {
  const losses = slopes.map(({ loss }) => loss);
  const startNames = STARTS.map(([mean, deviation]) => `N(${mean}, ${deviation}²)`.replace("-", "−"));
  const show = ({ mean, deviation }: { mean: number; deviation: number }) =>
    `${mean.toFixed(2)} ± ${deviation.toFixed(2)}`.replace("-", "−");
  const fitsOf = (loss: string) => fits.filter((fit) => fit.loss === loss);
  const near = DISTANCES.indexOf(2), far = DISTANCES.indexOf(12);
  const seen = GRID.filter((x) => x >= -23 && x <= 33);

  const panel = (loss: string): Panel => ({
    title: { text: loss, fontSize: 12, offset: 2 },
    width: 200,
    height: 90,
    encoding: {
      x: { field: "x", type: "quantitative", title: null, axis: { values: [-20, -5, 10, 30], grid: false } },
      y: { field: "y", type: "quantitative", title: null, axis: null, scale: { domain: [0, 0.45] } },
    },
    layer: [{
      data: { values: seen.map((x) => ({ x, y: (normal(x, -5, 1) + normal(x, 10, 1)) / 2 })) },
      mark: { type: "area", color: "#d1d5db" },
    }, {
      data: {
        values: fitsOf(loss).flatMap(({ mean, deviation }, i) =>
          seen.map((x) => ({ x, y: normal(x, mean, deviation), name: startNames[i], under: STARTS.length - i }))
            .filter(({ y }) => y > 2e-3)
        ),
      },
      mark: { type: "line", clip: true },
      encoding: {
        color: encodeNames(Object.fromEntries(startNames.map((name, i) => [name, COLORS[2 + i]]))),
        strokeWidth: { field: "under", type: "quantitative", scale: { range: [1.3, 6] }, legend: null }, // so that all are visible
      },
    }],
  });

  return {
    title: "One Gaussian for two: forward KL spans both, reverse KL takes one, the others depend on their start",
    subtitle: [
      "Left: grey is the truth, ½N(−5, 1) + ½N(10, 1); a colour is a start. Right: the gradient for the mean of",
      "N(10 + distance, 1), which a fit needs to find back.",
    ],
    tables: [[
      ["loss", "on paper", ...startNames.map((name) => `from ${name}`), "gradient 12 away", "×10 density: gradient ×"],
      ...losses.map((loss, i) => [
        loss,
        loss in CLOSED_FORMS ? show(CLOSED_FORMS[loss]) : "–",
        ...fitsOf(loss).map(show),
        slopes[i].plain[far].toExponential(0),
        (slopes[i].tenfold[near] / slopes[i].plain[near]).toFixed(0),
      ]),
    ]],
    notes: ["μ ± σ of each fit. −5 on paper stands for either mode.", ""],
    picture: {
      hconcat: [
        { columns: 3, spacing: 18, concat: losses.map(panel) },
        linePanel(
          "how strongly a loss pulls",
          Object.fromEntries(losses.map((loss, i) => [loss, COLORS[i]])),
          slopes.flatMap(({ loss, plain }) => plain.map((y, i) => ({ name: loss, x: DISTANCES[i], y }))),
          {
            x: { title: "distance from the right mode" },
            y: { title: "|∂loss/∂μ|", log: true, domain: [1e-12, 100] },
            height: 330,
          },
        ),
      ],
      resolve: { scale: { color: "independent", strokeWidth: "shared" } },
    },
  };
}
