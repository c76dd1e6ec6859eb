/** The tables and the picture of asymmetry. */
import type { Findings } from "../support/experiment.ts";
import { COLORS, encodeNames, INK, linePanel } from "../support/report.ts";
import type * as Example from "../asymmetry.ts";

export function describe(
  { pairs, shifts, precision }: Awaited<ReturnType<typeof Example.asymmetry>>,
  { CLIP }: Pick<typeof Example, "CLIP">,
): Findings {
  const show = (x: number) => Number.isNaN(x) ? "NaN" : x === Infinity ? "∞" : x.toFixed(4);
  const exactly = (x: number) => Number.isFinite(x) ? x.toExponential(3) : show(x);
  const finite = pairs.filter(({ forwardKl, reverseKl }) => forwardKl + reverseKl < Infinity);
  const [red, blue, orange, green, violet] = COLORS.slice(2);
  const along = (name: string, distance: (row: Example.Distances) => number) =>
    shifts.map((row) => ({ name, x: row.shift, y: distance(row) }));
  const error = (name: string, kl: (row: Example.Precision) => number) =>
    // a log scale cannot show an error of 0
    precision.filter(({ gap }) => gap).map((row) => ({
      name,
      x: row.gap!,
      y: Math.abs(kl(row) / row.truth - 1) || 1e-8,
    }));
  return {
    title: "KL has a direction and no bound",
    subtitle: "KL and JSD (β = ½) in nats, Wasserstein's distance in units of the shift; total variation has no unit.",
    tables: [[
      ["P ‖ Q", "KL(P‖Q)", "in bits", "H(P,Q) − H(P)", "KL(Q‖P)", "JSD ≤ 0.6931", "TV ≤ 1", "Wasserstein"],
      ...pairs.map((row) => [
        row.name,
        ...[row.forwardKl, row.forwardKl / Math.LN2, row.crossEntropy - row.entropy, row.reverseKl].map(show),
        ...[row.jsd, row.totalVariation, row.wasserstein].map(show),
      ]),
    ], [
      ["KL(P‖Q) in float32", "truth (float64)", "textbook", `clipped at ${CLIP}`, "forwardKl"],
      ...precision.map((row) => [row.name, ...[row.truth, row.textbook, row.clipped, row.ours].map(exactly)]),
    ]],
    picture: {
      hconcat: [
        {
          title: "two directions",
          width: 200,
          height: 260,
          data: {
            values: finite.flatMap(({ name: pair, forwardKl, reverseKl }) => [
              { pair, name: "KL(P‖Q)", value: forwardKl },
              { pair, name: "KL(Q‖P)", value: reverseKl },
            ]),
          },
          encoding: {
            y: { field: "pair", type: "nominal", sort: finite.map(({ name }) => name), title: null },
            yOffset: { field: "name", sort: null },
            x: { field: "value", type: "quantitative", title: "nats", axis: { tickCount: 4 } },
          },
          layer: [{ mark: "bar", encoding: { color: encodeNames({ "KL(P‖Q)": blue, "KL(Q‖P)": red }) } }, {
            mark: { type: "text", align: "left", dx: 4, fontSize: 11, color: INK },
            encoding: { text: { field: "value", format: ".3f" } },
          }],
        },
        linePanel(
          "N(0, 1) against N(shift, 1)",
          { KL: blue, Wasserstein: green, "total variation": orange, JSD: violet },
          [
            ...along("KL", (row) => row.forwardKl),
            ...along("Wasserstein", (row) => row.wasserstein),
            ...along("total variation", (row) => row.totalVariation),
            ...along("JSD", (row) => row.jsd),
          ],
          { x: { title: "shift" }, y: { title: "distance", domain: [0, 8] } },
        ),
        linePanel(
          "KL of nearly equal rows in float32",
          { "Σ p·(ln p − ln q)": red, "forwardKl": blue },
          [...error("Σ p·(ln p − ln q)", ({ textbook }) => textbook), ...error("forwardKl", ({ ours }) => ours)],
          {
            x: { title: "gap between the logits", log: true, reverse: true },
            y: { title: "relative error", log: true },
          },
        ),
      ],
      resolve: { scale: { color: "independent" } },
    },
  };
}
