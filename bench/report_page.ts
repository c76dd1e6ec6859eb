/**
 * The report as a page of tables and as a picture.
 *
 * @module
 */

import type { KernelTime } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { sum } from "d3-array";
import { alignTable, COLORS, drawSpec, FAINT, INK } from "../examples/support/report.ts";
import type { Bandwidth, Timing } from "./measure.ts";

/** A loss with its gradient. `rate` is in bytes per second, `share` is relative to the best copy. */
export interface LossResult extends Timing {
  name: string;
  variant: "plain" | "every option" | "close rows" | "f16" | "no subgroups";
  rows: number;
  classes: number;
  /** One read of each input and one write of the gradient. */
  mustMove: number;
  rate: number;
  share: number;
  flops: number;
  gradientBytes: number;
  /** Bytes alive at the peak, without the inputs. */
  extraBytes: number;
}

/** A product of [m, k] and [k, n]; `rate` is in operations per second. */
export interface ProductResult extends Timing {
  what: string;
  dtype: "f32" | "f16";
  m: number;
  k: number;
  n: number;
  transposeA: boolean;
  transposeB: boolean;
  bytes: number;
  flops: number;
  rate: number;
}

/** A model's head with its loss, as one op and as two. `extraBytes` are without inputs and gradients. */
export interface HeadResult {
  name: string;
  rows: number;
  depth: number;
  classes: number;
  logitsBytes: number;
  gradientBytes: number;
  fused: Timing & { extraBytes: number };
  unfused: Timing & { extraBytes: number };
  ratio: number;
}

/** A training step; `wall` is the wall-clock time in milliseconds, the median of all rounds, `best` that of the fastest. */
export interface StepResult {
  model: string;
  loss: string;
  wall: number;
  best: number;
  /** The kernels, each launch a pass of its own; the slowest first. */
  kernels: KernelTime[];
  submits: number;
  /** Buffers and bind groups made in all timed steps. */
  buffersCreated: number;
  bindGroupsCreated: number;
  extraBytes: number;
}

/** Everything that was measured. */
export interface Report {
  device: string;
  /** What the report lacks; empty if it is complete. */
  lacks: string[];
  driver: string;
  deno: string;
  /** The implementation of WebGPU. */
  webgpu: string;
  date: string;
  commit: string;
  subgroups: boolean;
  f16: boolean;
  tensorCores: boolean;
  bandwidth: Bandwidth;
  /** f32 operations per second in registers. */
  arithmetic: number;
  /** Milliseconds of a kernel that does nothing. */
  launch: number;
  losses: LossResult[];
  products: ProductResult[];
  heads: HeadResult[];
  steps: StepResult[];
  /** How long the report took. */
  seconds: number;
}

const three = (x: number) => x >= 100 ? x.toFixed(0) : x.toPrecision(3);
const mebibytes = (bytes: number) => (bytes / 2 ** 20).toFixed(1);
const percent = (share: number) => `${(100 * share).toFixed(0)} %`;
const times = (ratio?: number) => ratio === undefined ? "–" : `${ratio.toFixed(2)} ×`;
/** 12.3 GB/s, 1.23 TB/s, 4.56 TFLOP/s: a rate with the prefix that suits it. */
function rate(perSecond: number, unit: string): string {
  return perSecond >= 1e12 ? `${three(perSecond / 1e12)} T${unit}` : `${three(perSecond / 1e9)} G${unit}`;
}

function lossTable(losses: LossResult[]): string {
  const twin = (loss: LossResult, variant: LossResult["variant"]) =>
    losses.find((x) =>
      x.name === loss.name && x.rows === loss.rows && x.classes === loss.classes && x.variant === variant
    );
  return alignTable([
    [
      "loss and gradient",
      "rows × classes",
      "must move, MB",
      "ms",
      "wall, ms",
      "rate",
      "of the copy",
      "every option",
      "close rows",
      "f16",
      "no subgroups",
      "extra, MiB",
      "gradient, MiB",
    ],
    ...losses.filter(({ variant }) => variant === "plain").map((loss) => {
      const ratio = (variant: LossResult["variant"]) => {
        const other = twin(loss, variant);
        return other && other.milliseconds / loss.milliseconds;
      };
      const bare = twin(loss, "no subgroups");
      return [
        loss.name,
        `${loss.rows} × ${loss.classes}`,
        (loss.mustMove / 1e6).toFixed(0),
        three(loss.milliseconds),
        three(loss.wall),
        rate(loss.rate, "B/s"),
        percent(loss.share),
        times(ratio("every option")),
        times(ratio("close rows")),
        times(ratio("f16")),
        bare ? percent(bare.share) : "–",
        mebibytes(loss.extraBytes),
        mebibytes(loss.gradientBytes),
      ];
    }),
  ]);
}

function productTable(products: ProductResult[]): string {
  const square = products.find(({ what, dtype }) => what === "square" && dtype === "f32")!;
  return alignTable([
    ["product", "m × k × n", "f32, ms", "f32", "of the square", "f16, ms", "f16", "f16 : f32 time"],
    ...products.filter(({ dtype }) => dtype === "f32").map((product) => {
      const { what, m, k, n } = product;
      const f16 = products.find((x) => x.what === what && x.m === m && x.k === k && x.n === n && x.dtype === "f16");
      return [
        what,
        `${m} × ${k} × ${n}`,
        three(product.milliseconds),
        rate(product.rate, "FLOP/s"),
        percent(product.rate / square.rate),
        f16 ? three(f16.milliseconds) : "–",
        f16 ? rate(f16.rate, "FLOP/s") : "–",
        times(f16 && f16.milliseconds / product.milliseconds),
      ];
    }),
  ]);
}

function headTable(heads: HeadResult[]): string {
  return alignTable([
    [
      "head and loss in one op",
      "rows × depth × classes",
      "ms",
      "as two ops, ms",
      "ratio",
      "extra, MiB",
      "as two ops, MiB",
      "all logits, MiB",
    ],
    ...heads.map((head) => [
      head.name,
      `${head.rows} × ${head.depth} × ${head.classes}`,
      three(head.fused.milliseconds),
      three(head.unfused.milliseconds),
      times(head.ratio),
      mebibytes(head.fused.extraBytes),
      mebibytes(head.unfused.extraBytes),
      mebibytes(head.logitsBytes),
    ]),
  ]);
}

function stepTable(steps: StepResult[]): string {
  return alignTable([
    [
      "training step",
      "loss",
      "wall, ms",
      "at best, ms",
      "kernels, ms",
      "dispatches",
      "submits",
      "buffers made",
      "extra, MiB",
      "slowest kernel",
      "its share",
    ],
    ...steps.map((step) => [
      step.model,
      step.loss,
      three(step.wall),
      three(step.best),
      three(sum(step.kernels, ({ milliseconds }) => milliseconds)),
      String(sum(step.kernels, ({ launches }) => launches)),
      step.submits.toFixed(1),
      String(step.buffersCreated),
      mebibytes(step.extraBytes),
      step.kernels[0].name,
      percent(step.kernels[0].milliseconds / sum(step.kernels, ({ milliseconds }) => milliseconds)),
    ]),
  ]);
}

/** The page, which shows the picture beside it. */
export function formatReport(report: Report, picture: string): string {
  const { bandwidth, losses, products, heads, steps } = report;
  const sections: [title: string, rows: unknown[], text: () => string][] = [
    [
      "Losses",
      losses,
      () =>
        `Forward and gradient, f32. "Must move" is one read of each input and one write of the gradient; "every option" (smoothing,
z-loss, softcap, weights, temperature, labels), "close rows" (a student with a KL of 0.045 from its teacher) and "f16" are the time divided by that of the
plain f32 loss;
"no subgroups" is the plain loss on a device without them, as a share of the copy; "extra" is the most memory alive beyond the inputs.

${lossTable(losses)}`,
    ],
    ["Matrix products", products, () => productTable(products)],
    [
      "Head and loss in one op",
      heads,
      () => `Forward and gradients. "Extra" is memory beyond inputs and gradients.\n\n${headTable(heads)}`,
    ],
    [
      "Training steps",
      steps,
      () =>
        `AdamW. Wall clock over consecutive unread steps until the last parameter has been read back, the median of many rounds; "kernels" is their time on the GPU, a pass
each. "Buffers made" counts those of all timed steps.

${stepTable(steps)}`,
    ],
  ];
  const notice = report.lacks.length > 0 ? `**Not the whole report: ${report.lacks.join("; ")}.**\n\n` : "";
  return `# ${report.device}

${notice}| | |
| --- | --- |
| driver | ${report.driver} |
| Deno | ${report.deno}, with ${report.webgpu} WebGPU |
| date | ${report.date} |
| commit | ${report.commit} |
| subgroups, f16, tensor cores | ${
    [report.subgroups, report.f16, report.tensorCores].map((x) => x ? "yes" : "no").join(", ")
  } |
| copy, ${mebibytes(bandwidth.bytes)} MiB | ${rate(bandwidth.copyBufferToBuffer, "B/s")} by copyBufferToBuffer, ${
    rate(bandwidth.vec4Kernel, "B/s")
  } by a vec4 kernel, reading and writing counted |
| f32 multiply-adds | ${rate(report.arithmetic, "FLOP/s")} |
| an empty kernel | ${(1000 * report.launch).toFixed(1)} µs |
| this report | ${report.seconds} s |

Written by \`deno task bench:report\`. Times are medians of GPU timestamps, after warming up. "Of the copy" is the share of the best copy above.
A time has that of an empty kernel in it.

![Roofline](${picture})

${sections.filter(([, rows]) => rows.length > 0).map(([title, , text]) => `## ${title}\n\n${text()}`).join("\n\n")}
`;
}

/** The roofline: operations per second over operations per byte, with the limits of memory and arithmetic measured in the same run. */
export function drawReport(report: Report): Promise<string> {
  const { bandwidth: { best }, arithmetic } = report;
  const ops = [
    ...report.losses.filter(({ variant }) => variant === "plain" || variant === "f16").map((loss) => ({
      group: loss.name,
      storage: loss.variant === "f16" ? "f16" : "f32",
      intensity: loss.flops / loss.mustMove,
      rate: loss.flops / (loss.milliseconds / 1000) / 1e9,
    })),
    ...report.products.map((product) => ({
      group: "matmul",
      storage: product.dtype,
      intensity: product.flops / product.bytes,
      rate: product.rate / 1e9,
    })),
  ];
  const groups = [...new Set(ops.map(({ group }) => group))];
  const lows = [0.5, ...ops.map(({ intensity }) => intensity / 2)];
  const low = Math.min(...lows), ridge = arithmetic / best, slope = Math.max(low, ridge / 4);
  const high = Math.max(2 * ridge, ...ops.map(({ intensity }) => 2 * intensity));
  const roof = [low, ridge, high].map((intensity) => ({
    intensity,
    rate: Math.min(intensity * best, arithmetic) / 1e9,
  }));
  const x = {
    field: "intensity",
    type: "quantitative" as const,
    title: "operations a byte that must move (log scale)",
  };
  const y = { field: "rate", type: "quantitative" as const, title: "GFLOP/s (log scale)" };
  const log = { type: "log" as const, nice: false };
  const labels = [
    { intensity: slope, rate: slope * best / 1e9, text: `copy, ${rate(best, "B/s")}` },
    { intensity: ridge * 1.2, rate: arithmetic / 1e9, text: `f32 multiply-adds, ${rate(arithmetic, "FLOP/s")}` },
  ];
  const subtitle = [
    "Losses with their gradients and matrix products, and what copies and f32 multiply-adds reach in the same run",
    ...report.tensorCores ? ["f16 products run on tensor cores, whose limit is higher"] : [],
    `Deno ${report.deno} with ${report.webgpu} WebGPU, ${report.date}, ${report.commit}`,
  ];
  return drawSpec(`Roofline of ${report.device}`, subtitle, {
    width: 760,
    height: 420,
    layer: [
      {
        data: { values: roof },
        mark: { type: "line", color: INK, strokeWidth: 1.6 },
        encoding: {
          x: { ...x, scale: { ...log, domain: [low, high] }, axis: { grid: false, format: "~g" } },
          y: { ...y, scale: log, axis: { format: "~s", tickCount: 6 } },
        },
      },
      {
        data: { values: labels },
        mark: { type: "text", align: "left", baseline: "top", dx: 10, dy: 8, fontSize: 11, color: FAINT },
        encoding: { x, y, text: { field: "text" } },
      },
      {
        data: { values: ops },
        mark: { type: "point", filled: true, size: 60, opacity: 0.85 },
        encoding: {
          x,
          y,
          color: {
            field: "group",
            type: "nominal",
            scale: { domain: groups, range: COLORS.slice(2, 2 + groups.length) },
            legend: { title: null, labelColor: FAINT, labelFontSize: 11 },
          },
          shape: {
            field: "storage",
            type: "nominal",
            scale: { domain: ["f32", "f16"], range: ["circle", "triangle-up"] },
            legend: { title: null, labelColor: FAINT, labelFontSize: 11 },
          },
        },
      },
    ],
  });
}
