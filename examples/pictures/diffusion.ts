/** The tables and the picture of diffusion. */
import type { Findings } from "../support/experiment.ts";
import { COLORS, linePanel } from "../support/report.ts";
import type * as Example from "../diffusion.ts";

export function describe({ bins, truth, fits, paths, kl, weighted }: Example.Found): Findings {
  const [red, blue] = COLORS.slice(2);
  return {
    title: "Steps that undo noise, each fitted by a KL of Gaussians, lead from noise to both peaks",
    subtitle: "Left: densities. Right: forty samples on their way from noise (left) to data (right).",
    tables: [[
      ["density", "total variation from the truth", "Wasserstein's distance"],
      ...fits.map(({ name, totalVariation, wasserstein }) => [name, totalVariation.toFixed(3), wasserstein.toFixed(3)]),
    ]],
    notes: [`KL of a step, mean: ${kl.toFixed(4)} nats; as a weighted squared error: ${weighted.toFixed(4)}.`, ""],
    picture: {
      hconcat: [
        linePanel(
          "two peaks, and what the model draws",
          { truth: COLORS[1], samples: blue, noise: red },
          [{ name: "truth", density: truth }, ...fits].flatMap(({ name, density }) =>
            density.map((y, i) => ({ name, x: bins[i], y }))
          ),
          { x: { title: "x" }, y: { title: "density" }, height: 300 },
        ),
        {
          title: "on the way",
          width: 330,
          height: 300,
          data: {
            values: paths.flatMap((path, i) => path.map((y, step) => ({ i, step, y: Math.round(100 * y) / 100 }))),
          },
          mark: { type: "line", strokeWidth: 0.8, opacity: 0.7, color: blue },
          encoding: {
            x: { field: "step", type: "quantitative", title: "steps back", axis: { grid: false } },
            y: { field: "y", type: "quantitative", title: "x" },
            detail: { field: "i" },
          },
        },
      ],
    },
  };
}
