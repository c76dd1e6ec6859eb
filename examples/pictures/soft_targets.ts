/** The tables and the picture of soft_targets. */
// @ts-types="@types/d3-array"
import { range } from "d3-array";
import { CLASSES, PIXELS } from "../support/digits.ts";
import type { Findings } from "../support/experiment.ts";
import { COLORS, INK, linePanel, type Panel } from "../support/report.ts";
import type * as Example from "../soft_targets.ts";

export function describe(
  { example, near, students, gradients }: Example.Found,
  { UNSEEN, TEMPERATURE, SHOWN_TEMPERATURES, DIVERGENCES }: Pick<
    typeof Example,
    "UNSEEN" | "TEMPERATURE" | "SHOWN_TEMPERATURES" | "DIVERGENCES"
  >,
): Findings {
  const percent = (share: number) => (100 * share).toFixed(1);
  const [red, blue, orange, green] = COLORS.slice(2);
  const classes = { type: "ordinal" as const, title: null, axis: { labelAngle: 0 } };
  const side = Math.sqrt(PIXELS);
  const nearest = near.map((row, digit) =>
    range(CLASSES).filter((other) => other !== digit).sort((a, b) => row[b] - row[a]).slice(0, 3)
  );
  const size = { width: 130, height: 130 };
  return {
    title: "A teacher's wrong answers teach: students that never saw a 3 know it from soft targets",
    subtitle:
      `Above: one digit and the teacher's probabilities. Below, left: its mean probabilities at T = ${TEMPERATURE}, %.`,
    tables: [[
      ["digit shown", `nearest wrong classes at T = ${TEMPERATURE}, %`],
      ...nearest.map((others, digit) => [
        `${digit}`,
        others.map((other) => `${other}: ${percent(near[digit][other]).padStart(4)}`).join("  "),
      ]),
    ], [
      [`student that sees no ${UNSEEN}`, "test accuracy, %", `of the ${UNSEEN}s, %`],
      ...students.map(({ method, accuracy, unseen }) => [method, percent(accuracy), percent(unseen)]),
    ], [
      ["T²·gradient, relative distance to (s − t)/V", ...[1, 10, 100, 1000].map((t) => `T = ${t}`)],
      ...Object.keys(DIVERGENCES).map((name) => [
        name,
        ...gradients.filter((row) => row.name === name && [1, 10, 100, 1000].includes(row.temperature))
          .map(({ error }) => error.toExponential(1)),
      ]),
    ]],
    picture: {
      resolve: { scale: { color: "independent" } },
      vconcat: [{
        spacing: 30,
        hconcat: [
          {
            title: `a ${example.label}`,
            ...size,
            data: { values: inked(example.pixels).map(([i, ink]) => ({ x: i % side, y: Math.floor(i / side), ink })) },
            mark: "rect",
            encoding: {
              x: { field: "x", type: "ordinal", axis: null, scale: { domain: range(side), padding: 0 } },
              y: { field: "y", type: "ordinal", axis: null, scale: { domain: range(side), padding: 0 } },
              color: { field: "ink", type: "quantitative", scale: { range: ["#ffffff", INK] }, legend: null },
            },
          },
          ...SHOWN_TEMPERATURES.map((temperature, i): Panel => ({
            title: `T = ${temperature}`,
            ...size,
            data: { values: example.byTemperature[i].map((p, digit) => ({ digit, p })) },
            mark: { type: "bar", color: blue },
            encoding: {
              x: { field: "digit", ...classes },
              y: { field: "p", type: "quantitative", title: null, scale: { domain: [0, 1] }, axis: { tickCount: 3 } },
            },
          })),
        ],
      }, {
        spacing: 30,
        resolve: { scale: { color: "independent" } },
        hconcat: [
          {
            title: "shown (down), thought of (across)",
            width: 230,
            height: 230,
            data: {
              values: near.flatMap((row, shown) =>
                row.flatMap((p, other) => shown === other ? [] : [{ shown, other, p: percent(p) }])
              ),
            },
            encoding: { x: { field: "other", ...classes }, y: { field: "shown", ...classes } },
            layer: [{
              mark: "rect",
              encoding: {
                color: { field: "p", type: "quantitative", scale: { range: ["#ffffff", red] }, legend: null },
              },
            }, { mark: { type: "text", fontSize: 9, color: INK }, encoding: { text: { field: "p" } } }],
          },
          {
            title: `test ${UNSEEN}s recognised by students that saw none, %`,
            width: 200,
            height: 230,
            data: { values: students.map(({ method, unseen }) => ({ method, unseen: 100 * unseen })) },
            encoding: {
              y: { field: "method", type: "nominal", sort: null, title: null },
              x: { field: "unseen", type: "quantitative", title: null, axis: { tickCount: 4 } },
            },
            layer: [{ mark: { type: "bar", height: { band: 0.6 }, color: green } }, {
              mark: { type: "text", align: "left", dx: 4, color: INK },
              encoding: { text: { field: "unseen", format: ".0f" } },
            }],
          },
          linePanel(
            "T²·gradient against its limit",
            { "forward KL": blue, "reverse KL": orange, "jsd, normalised": green },
            gradients.map(({ name, temperature, error }) => ({ name, x: temperature, y: error })),
            { x: { title: "T", log: true }, y: { title: "relative distance", log: true }, width: 230, height: 230 },
          ),
        ],
      }],
    },
  };
}

/** The pixels that are not blank, and how dark they are. */
const inked = (pixels: Float32Array) => [...pixels.entries()].filter(([, ink]) => ink > 0.05);
