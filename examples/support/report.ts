/**
 * The report of a comparison of trained models: a table, and a picture.
 *
 * @module
 */

// @ts-types="@types/d3-array"
import { deviation, extent, group, mean, median, range } from "d3-array";
import * as vega from "vega";
import { compile, type TopLevelSpec } from "vega-lite";

/** One model, trained once. */
export interface Run {
  method: string;
  seed: number;
  /** The mean training loss since the previous point, and accuracy and mean negative log-likelihood (nats) on the test rows. */
  curve: { step: number; loss: number; accuracy: number; negativeLogLikelihood: number }[];
  /** Over the whole run, including evaluations. */
  stepsPerSecond: number;
  parameters: number;
}

/** A method's runs over all seeds. A single run has no deviation, and only methods with a baseline have a gain. */
export interface Row {
  method: string;
  runs: number;
  accuracy: number;
  accuracyDeviation?: number;
  gain?: number;
  gainError?: number;
  negativeLogLikelihood: number;
  stepsPerSecond: number;
  parameters: number;
}

/**
 * A row for each method: means over the seeds, standard deviations, and the mean gain in accuracy over the baseline's run of the
 * same seed, with its standard error.
 */
export function summarize(runs: Run[], baseline?: string): Row[] {
  const accuracyOf = (run: Run) => run.curve.at(-1)!.accuracy;
  const twins = new Map(runs.filter(({ method }) => method === baseline).map((run) => [run.seed, accuracyOf(run)]));
  return Array.from(group(runs, ({ method }) => method), ([method, own]) => {
    const paired = method === baseline ? [] : own.filter(({ seed }) => twins.has(seed));
    const gains = paired.map((run) => accuracyOf(run) - twins.get(run.seed)!);
    const spread = deviation(gains);
    return {
      method,
      runs: own.length,
      accuracy: mean(own, accuracyOf)!,
      accuracyDeviation: deviation(own, accuracyOf),
      gain: mean(gains),
      gainError: spread === undefined ? undefined : spread / Math.sqrt(gains.length),
      negativeLogLikelihood: mean(own, ({ curve }) => curve.at(-1)!.negativeLogLikelihood)!,
      stepsPerSecond: median(own, ({ stepsPerSecond }) => stepsPerSecond)!, // the first also compiled its kernels
      parameters: own[0].parameters,
    };
  });
}

/** The rows as an aligned table that is also Markdown. */
export function formatTable(rows: Row[]): string {
  const percent = (share: number, spread?: number) =>
    (100 * share).toFixed(2) + (spread === undefined ? "" : ` ± ${(100 * spread).toFixed(2)}`);
  const cells = [
    ["model", "test accuracy, %", "gain, points", "NLL", "steps/s", "parameters"],
    ...rows.map((row) => [
      row.method,
      percent(row.accuracy, row.accuracyDeviation),
      row.gain === undefined ? "–" : `+${percent(row.gain, row.gainError)}`.replace("+-", "−"),
      row.negativeLogLikelihood.toFixed(3),
      row.stepsPerSecond.toFixed(0),
      row.parameters.toLocaleString("en"),
    ]),
  ];
  return alignTable(cells);
}

/** Cells as an aligned table that is also Markdown. The first row is the head. */
export function alignTable(cells: string[][]): string {
  const widths = cells[0].map((_, column) => Math.max(...cells.map((row) => row[column].length)));
  const align = (text: string, column: number) =>
    column === 0 ? text.padEnd(widths[column]) : text.padStart(widths[column]);
  const lines = cells.map((row) => `| ${row.map(align).join(" | ")} |`);
  const rule = `|${widths.map((width, column) => "-".repeat(width + 1) + (column === 0 ? "-" : ":")).join("|")}|`;
  return [lines[0], rule, ...lines.slice(1)].join("\n");
}

/** A colour for each method, the same in every panel. */
export const COLORS: string[] = [
  "#1f2937",
  "#9ca3af",
  "#e15759",
  "#4e79a7",
  "#f28e2b",
  "#59a14f",
  "#b07aa1",
  "#76b7b2",
  "#edc948",
  "#9c755f",
];
export const INK = "#111827";
export const FAINT = "#4b5563";

const CONFIG: TopLevelSpec["config"] = {
  font: "Inter, Helvetica Neue, Helvetica, Arial, sans-serif",
  view: { stroke: null },
  title: { color: INK, subtitleColor: FAINT, subtitlePadding: 6 },
  axis: {
    domain: false,
    ticks: false,
    labelFlush: false,
    labelLimit: 240,
    gridColor: "#e5e7eb",
    labelColor: FAINT,
    labelFontSize: 11,
    labelPadding: 8,
    titleColor: INK,
    titleFontSize: 12,
    titleFontWeight: "normal",
    titlePadding: 12,
  },
};

// Vega cannot measure text without a canvas. Its estimate, 0.8 of the font size per character, left a third of some pictures empty
(vega as unknown as { textMetrics: { width(item: { fontSize?: number }, text: unknown): number } }).textMetrics.width =
  (
    { fontSize = 11 },
    text,
  ) => 0.6 * fontSize * String(text ?? "").length;

/** A picture as an SVG, with the title, margins and fonts that all pictures share. */
export function drawSpec(title: string, subtitle: string | string[], picture: TopLevelSpec): Promise<string> {
  const spec = {
    background: "white",
    padding: 20,
    spacing: 44,
    ...picture,
    title: { text: title, subtitle, anchor: "start", fontSize: 17, subtitleFontSize: 12, offset: 18 },
    config: { ...CONFIG, ...picture.config },
  } as TopLevelSpec;
  return new vega.View(vega.parse(compile(spec).spec), { renderer: "none" }).toSVG();
}

/** A part of a picture that stands beside others. */
export type Panel = Extract<TopLevelSpec, { layer: unknown[] }>["layer"][number];

/** One axis of a panel of lines; lines are clipped to the domain. */
export interface LineAxis {
  title: string;
  log?: boolean;
  reverse?: boolean;
  domain?: [number, number];
}

/** A panel with a line for each name in `colors`. On a log scale only positive numbers are shown. */
export function linePanel(
  title: string,
  colors: Record<string, string>,
  points: { name: string; x: number; y: number }[],
  { x, y, width = 280, height = 260 }: { x: LineAxis; y: LineAxis; width?: number; height?: number },
): Panel {
  const values = points.filter((point) => (!x.log || point.x > 0) && (!y.log || point.y > 0));
  const decades = (field: "x" | "y", [low, high] = extent(values, (point) => point[field])) => {
    const [first, last] = [low!, high!].map((end) => Math.round(Math.log10(end)));
    return range(first, last + 1, last - first > 7 ? 2 : 1).map((power) => 10 ** power);
  };
  const encode = (field: "x" | "y", { title, log, reverse, domain }: LineAxis) => ({
    field,
    type: "quantitative" as const,
    title: log ? `${title} (log scale)` : title,
    scale: {
      type: log ? "log" as const : "linear" as const,
      reverse,
      ...domain && { domain },
      ...!log && { zero: false },
    },
    axis: { tickCount: 6, grid: field === "y", ...log && { format: "~e", values: decades(field, domain) } },
  });
  return {
    title,
    width,
    height,
    data: { values },
    mark: { type: "line", strokeWidth: 2.2, clip: x.domain !== undefined || y.domain !== undefined },
    encoding: { x: encode("x", x), y: encode("y", y), color: encodeNames(colors) },
  };
}

/** How names become colours, with a legend above the panel. */
export interface NameEncoding {
  field: "name";
  type: "nominal";
  scale: { domain: string[]; range: string[] };
  legend: { title: null; orient: "top"; symbolStrokeWidth: number; columnPadding: number; columns: number };
}

/** A colour for each name. */
export function encodeNames(colors: Record<string, string>): NameEncoding {
  return {
    field: "name",
    type: "nominal",
    scale: { domain: Object.keys(colors), range: Object.values(colors) },
    legend: { title: null, orient: "top", symbolStrokeWidth: 3, columnPadding: 4, columns: 5 },
  };
}

/** Learning curves (means over the seeds) beside the final test errors, as an SVG; the bars are also the legend of the curves. */
export function drawReport(title: string, subtitle: string, runs: Run[], rows: Row[]): Promise<string> {
  const methods = rows.map(({ method }) => method);
  const color = { field: "method", scale: { domain: methods, range: COLORS.slice(0, methods.length) }, legend: null };
  const error = (share: number) => 100 * (1 - share);
  const curves = runs.flatMap(({ method, seed, curve }) =>
    curve.map(({ step, accuracy }) => ({ method, seed, step, error: error(accuracy) }))
  );
  const bars = rows.map(({ method, accuracy, accuracyDeviation = 0 }) => ({
    method,
    error: error(accuracy),
    low: error(accuracy + accuracyDeviation),
    high: error(accuracy - accuracyDeviation),
  }));
  return drawSpec(title, subtitle, {
    hconcat: [{
      width: 430,
      height: 300,
      data: { values: curves },
      mark: { type: "line", strokeWidth: 2.2, point: { size: 22 } },
      encoding: {
        x: { field: "step", type: "quantitative", title: "training step", axis: { grid: false, tickCount: 6 } },
        y: {
          field: "error",
          aggregate: "mean",
          type: "quantitative",
          title: "test error, % (log scale)",
          scale: { type: "log", nice: false },
          axis: { values: [1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 80] },
        },
        color,
      },
    }, {
      width: 330,
      height: 300,
      data: { values: bars },
      encoding: { y: { field: "method", type: "nominal", sort: methods, title: null, axis: { labelFontSize: 12 } } },
      layer: [{
        mark: { type: "bar", height: { band: 0.62 }, cornerRadiusEnd: 3 },
        encoding: { x: { field: "error", type: "quantitative", title: "test error in the end, %" }, color },
      }, {
        mark: { type: "rule", strokeWidth: 1.4, color: INK },
        encoding: { x: { field: "low", type: "quantitative" }, x2: { field: "high" } },
      }, {
        mark: { type: "text", align: "left", dx: 8, fontSize: 11, color: INK },
        encoding: { x: { field: "high", type: "quantitative" }, text: { field: "error", format: ".1f" } },
      }],
    }],
  });
}
