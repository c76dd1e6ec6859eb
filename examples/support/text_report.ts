/**
 * The report of a comparison of language models: a table, and a picture of the learning curves and of the sweep over β.
 *
 * @module
 */

import type { TopLevelSpec } from "vega-lite";
import { alignTable, COLORS, drawSpec, FAINT } from "./report.ts";

/** One model, trained once; a teacher that is only a file has no parameters, no curve and no samples. */
export interface TextRun {
  method: string;
  /** For a loss between forward KL (0) and reverse KL (1), its β. */
  beta?: number;
  /** The mean training loss (nats) since the previous point, and bits per held-out character. */
  curve: { step: number; loss: number; bitsPerCharacter: number }[];
  bitsPerCharacter: number;
  /** The share of held-out characters for which the most likely character is also the teacher's. */
  agreement: number;
  /** The entropy of the model's own predictions of held-out characters, in bits. */
  entropy: number;
  /** The number of different sequences of four characters in the samples, as a share of all. */
  distinct?: number;
  /** In training, without evaluations. */
  tokensPerSecond?: number;
  /** The most GPU memory that was in use between the forward and the backward pass of a step. */
  bytes?: number;
  parameters?: number;
  /** SHA-256 of the trained parameters. */
  hash?: string;
  samples: string[];
}

/** For comparison with the models: bits per character of the n-grams, and the held-out text's own diversity. */
export interface Yardsticks {
  ngrams: { method: string; bitsPerCharacter: number }[];
  distinct: number;
}

/** The n-grams, the text itself and the models, as an aligned table that is also Markdown. */
export function formatTextTable(runs: TextRun[], { ngrams, distinct }: Yardsticks): string {
  const percent = (share?: number) => share === undefined ? "–" : (100 * share).toFixed(1);
  const whole = (count?: number) => count === undefined ? "–" : Math.round(count).toLocaleString("en");
  return alignTable([
    ["model", "bits/char", "agreement, %", "entropy, bits", "distinct, %", "tokens/s", "MiB", "parameters"],
    ...ngrams.map(({ method, bitsPerCharacter }) => [method, bitsPerCharacter.toFixed(3), ...Array(6).fill("–")]),
    ["the text itself", "–", "–", "–", percent(distinct), "–", "–", "–"],
    ...runs.map((run) => [
      run.method,
      run.bitsPerCharacter.toFixed(3),
      percent(run.agreement),
      run.entropy.toFixed(3),
      percent(run.distinct),
      whole(run.tokensPerSecond),
      run.bytes === undefined ? "–" : (run.bytes / 2 ** 20).toFixed(1),
      whole(run.parameters),
    ]),
  ]);
}

const BITS = "held-out bits a character";

/** A dashed line across a panel, with its name above or below. */
interface Level {
  name: string;
  y: number;
  below?: boolean;
}

/** Learning curves with the n-grams' levels, beside the students' results over β, as an SVG. */
export function drawTextReport(
  title: string,
  subtitle: string,
  runs: TextRun[],
  { ngrams, distinct }: Yardsticks,
): Promise<string> {
  const methods = runs.map(({ method }) => method);
  const color = {
    field: "method",
    scale: { domain: methods, range: methods.map((_, i) => COLORS[i % COLORS.length]) },
    legend: {
      title: null,
      orient: "bottom" as const,
      columns: 3,
      labelColor: FAINT,
      labelFontSize: 11,
      labelLimit: 240,
    },
  };
  const swept = runs.filter(({ beta }) => beta !== undefined).sort((a, b) => a.beta! - b.beta!);
  const levels = (values: Level[], y: string): object[] => [
    {
      data: { values },
      mark: { type: "rule", strokeDash: [4, 4], color: FAINT, opacity: 0.6 },
      encoding: { y: { field: "y", type: "quantitative", title: y } },
    },
    ...values.map((value) => {
      const place = value.below ? { baseline: "top", dy: 3 } : { baseline: "bottom", dy: -3 };
      return {
        data: { values: [value] },
        mark: { type: "text", align: "right", ...place, fontSize: 10, color: FAINT },
        encoding: { x: { value: "width" }, y: { field: "y", type: "quantitative", title: y }, text: { field: "name" } },
      };
    }),
  ];
  const sweep = (y: string, valueOf: (run: TextRun) => number, reference: Level[]) => ({
    width: 300,
    height: 118,
    layer: [
      ...levels(reference, y),
      {
        data: { values: swept.map((run) => ({ beta: run.beta, y: valueOf(run) })) },
        mark: { type: "line", strokeWidth: 2, color: COLORS[3], point: { size: 40, color: COLORS[3] } },
        encoding: {
          x: {
            field: "beta",
            type: "quantitative",
            title: "β: forward KL at 0, reverse KL at 1",
            scale: { domain: [0, 1] },
          },
          y: { field: "y", type: "quantitative", title: y, scale: { zero: false, padding: 12 } },
        },
      },
    ],
  });
  const of = (method: string) => runs.filter((run) => run.method === method);
  const picture = {
    hconcat: [{
      width: 460,
      height: 320,
      layer: [
        ...levels(ngrams.map(({ method, bitsPerCharacter }) => ({ name: method, y: bitsPerCharacter })), BITS),
        {
          data: {
            values: runs.flatMap(({ method, curve }) =>
              curve.map(({ step, bitsPerCharacter }) => ({ method, step, bitsPerCharacter }))
            ),
          },
          mark: { type: "line", strokeWidth: 2.2, point: { size: 22 } },
          encoding: {
            x: { field: "step", type: "quantitative", title: "training step", axis: { grid: false, tickCount: 6 } },
            y: {
              field: "bitsPerCharacter",
              type: "quantitative",
              title: BITS,
              scale: { zero: false },
            },
            color,
          },
        },
      ],
    }, {
      spacing: 24,
      vconcat: [
        sweep("bits a character", (run) => run.bitsPerCharacter, [
          ...of("teacher").map((run) => ({ name: "teacher", y: run.bitsPerCharacter, below: true })),
          ...of("labels alone").map((run) => ({ name: "labels alone", y: run.bitsPerCharacter })),
        ]),
        sweep("distinct in samples, %", (run) => 100 * run.distinct!, [{ name: "the text itself", y: 100 * distinct }]),
      ],
    }],
  };
  return drawSpec(title, subtitle, picture as TopLevelSpec);
}
