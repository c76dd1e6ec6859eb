/** The tables and the picture of regularisers. */
import type { Findings } from "../support/experiment.ts";
import { COLORS, encodeNames, INK, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../regularisers.ts";

export function describe(results: Example.Result[]): Findings {
  const half = results[0].f16Error !== null;
  const colors = Object.fromEntries(results.map(({ method }, i) => [method, COLORS[i + 2]]));
  const every = Math.ceil(results[0].logSumExp.length / 60); // steps per point of the curve
  return {
    title: "Label smoothing and softcap change how sure a model is, z-loss how large its log-sum-exp is",
    subtitle: "Below the dashed diagonal a model is too sure. A dot is larger for more digits.",
    tables: [[
      [
        "trained with",
        "accuracy, %",
        "NLL",
        "calibration error, %",
        "log-sum-exp",
        "largest |logit|",
        "f16: loss off by",
        "gradient by",
      ],
      ...results.map((row) => [
        row.method,
        (100 * row.accuracy).toFixed(1),
        row.negativeLogLikelihood.toFixed(3),
        (100 * row.calibrationError).toFixed(1),
        row.logSumExp.at(-1)!.toFixed(2),
        row.largestLogit.toFixed(1),
        ...[row.f16Error?.loss, row.f16Error?.gradient].map((error) => error?.toExponential(1) ?? "–"),
      ]),
    ]],
    notes: [
      "The log-sum-exp is the last batch's, before a softcap; all else is of the test digits.",
      half
        ? "The last columns: the largest difference in a row's loss and gradient when the logits are stored as f16, not f32."
        : "This adapter has no shader-f16: nothing was stored as f16.",
      "",
    ],
    picture: {
      vconcat: [
        { spacing: 26, hconcat: results.map((result) => diagram(result, colors[result.method])) },
        {
          spacing: 60,
          hconcat: [
            linePanel(
              "log-sum-exp of the logits",
              colors,
              results.flatMap(({ method: name, logSumExp }) =>
                logSumExp.flatMap((y, x) => x % every === 0 ? [{ name, x, y }] : [])
              ),
              { x: { title: "training step" }, y: { title: "mean over the batch" }, width: 480, height: 200 },
            ),
            ...half ? [errors(results, colors)] : [],
          ],
        },
      ],
    },
  };
}

/** How often a model is right, over its confidence. */
function diagram({ method, bins, calibrationError }: Example.Result, color: string): Panel {
  const error = `calibration error ${(100 * calibrationError).toFixed(1)} %`;
  return {
    title: { text: method, subtitle: error, fontSize: 12, offset: 6 },
    width: 160,
    height: 160,
    encoding: {
      x: { field: "confidence", type: "quantitative", scale: { domain: [0, 1] }, axis: { tickCount: 3 } },
      y: {
        field: "accuracy",
        type: "quantitative",
        title: "share right",
        scale: { domain: [0, 1] },
        axis: { tickCount: 3 },
      },
    },
    layer: [
      {
        data: { values: [0, 1].map((end) => ({ confidence: end, accuracy: end })) },
        mark: { type: "line", strokeDash: [3, 3], strokeWidth: 1, color: INK },
      },
      { data: { values: bins }, mark: { type: "line", color, strokeWidth: 2.2 } },
      {
        data: { values: bins },
        mark: { type: "point", filled: true, opacity: 1, color },
        encoding: { size: { field: "share", type: "quantitative", scale: { range: [12, 220] }, legend: null } },
      },
    ],
  };
}

function errors(results: Example.Result[], colors: Record<string, string>): Panel {
  return {
    title: "logits stored as f16: the largest error of a loss",
    width: 260,
    height: 200,
    data: { values: results.map(({ method, f16Error }) => ({ name: method, error: f16Error!.loss })) },
    mark: { type: "bar", height: { band: 0.6 } },
    encoding: {
      y: { field: "name", type: "nominal", sort: null, title: null },
      x: { field: "error", type: "quantitative", title: "nats", axis: { tickCount: 4 } },
      color: encodeNames(colors),
    },
  };
}
