/** The tables and the picture of vae. */
// @ts-types="@types/d3-array"
import { range } from "d3-array";
import type { Findings } from "../support/experiment.ts";
import { COLORS, INK, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../vae.ts";

const SIDE = 14; // pixels of a drawn picture, which has a quarter of a digit's pixels

/** Pictures side by side in rows of `across`; nearly blank pixels are left out to keep the file small. */
function mosaic(title: string, pictures: Float32Array[], across: number, tile: number): Panel {
  const values = pictures.flatMap((pixels, n) =>
    range(SIDE * SIDE).flatMap((i) => {
      const x = i % SIDE, y = Math.floor(i / SIDE), at = 2 * y * 2 * SIDE + 2 * x;
      const ink = (pixels[at] + pixels[at + 1] + pixels[at + 2 * SIDE] + pixels[at + 2 * SIDE + 1]) / 4;
      const [column, row] = [n % across, Math.floor(n / across)];
      return ink < 0.25 ? [] : [{ x: column * SIDE + x, y: row * SIDE + y, ink: Math.round(10 * ink) / 10 }];
    })
  );
  const rows = Math.ceil(pictures.length / across);
  const axis = (count: number) => ({
    type: "ordinal" as const,
    axis: null,
    scale: { domain: range(count * SIDE), padding: 0 },
  });
  return {
    title,
    width: across * tile,
    height: rows * tile,
    data: { values },
    mark: "rect",
    encoding: {
      x: { field: "x", ...axis(across) },
      y: { field: "y", ...axis(rows) },
      color: { field: "ink", type: "quantitative", scale: { domain: [0, 1], range: ["#ffffff", INK] }, legend: null },
    },
  };
}

export function describe({ shown, outcomes }: Awaited<ReturnType<typeof Example.vae>>): Findings {
  const [red, blue, orange] = COLORS.slice(2);
  const across = Math.sqrt(outcomes[0].plane.length);
  const one = outcomes.find(({ weight }) => weight === 1)!;
  return {
    title: "A heavy KL term makes the posterior the prior, and the decoder draws the mean digit",
    subtitle:
      "Left: the pixels' cross-entropy (less 100), the KL, and what another image's z costs. Middle: test digits on top, drawn again below.",
    tables: [[
      ["weight of KL", "reconstruction", "KL", "from another's z", "deviation of means", "mean deviation"],
      ...outcomes.map(({ weight, reconstruction, kl, dependence, spread, width }) => [
        `${weight}`,
        reconstruction.toFixed(1),
        kl.toFixed(2),
        Math.abs(dependence).toFixed(1),
        spread.toFixed(2),
        width.toFixed(2),
      ]),
    ]],
    notes: [
      "Nats an image, of digits held out. Where q is the prior, its means deviate by 0 and its deviation is 1.",
      "",
    ],
    picture: {
      resolve: { scale: { color: "independent" } },
      hconcat: [
        linePanel(
          "what the weight buys",
          { "pixels − 100": blue, "KL": red, "with another's z": orange },
          outcomes.flatMap(({ weight, reconstruction, kl, dependence }) => [
            { name: "pixels − 100", x: weight, y: reconstruction - 100 },
            { name: "KL", x: weight, y: kl },
            { name: "with another's z", x: weight, y: dependence },
          ]),
          { x: { title: "weight of KL", log: true }, y: { title: "nats an image" }, width: 300, height: 300 },
        ),
        mosaic(
          `weights ${outcomes.map(({ weight }) => weight).join(", ")} (down)`,
          [...shown, ...outcomes.flatMap(({ again }) => again)],
          shown.length,
          300 / (outcomes.length + 1),
        ),
        mosaic("the plane of z at weight 1", one.plane, across, 300 / across),
      ],
    },
  };
}
