/** −w_y·x_y of rows of log-probabilities, and its gradient, which is 0 except in the label's column. One thread per element. */
import type { Element } from "./elementwise.ts";
import { type BufferType, variants } from "./gpu/kernel.ts";
import type { Memory } from "./gpu/memory.ts";
import { NOT_FINITE } from "./math.ts";
import type { Upstream } from "./row.ts";

/** Compile-time choices. */
interface Variant {
  element: Element;
  weight: boolean;
  upstream: boolean;
  gradient: boolean;
}

const kernel = variants(({ element, weight, upstream, gradient }: Variant) => ({
  name: "nllLoss",
  buffers: {
    logProbabilities: `read ${element}`,
    labels: "read i32",
    counts: "read f32",
    ...weight ? { weight: "read f32" as BufferType } : {},
    ...upstream ? { upstream: "read f32" as BufferType } : {},
    loss: "write f32",
    ...gradient ? { gradient: `write ${element}` as const } : {},
  },
  params: { rows: "u32", columns: "u32", ignoreIndex: "i32", mean: "u32", upstreamStride: "u32" },
  head: NOT_FINITE,
  main: `let row = thread / params.columns;
  if (row >= params.rows) { return; }
  let column = thread % params.columns;
  let label = labels[row];
  let ignored = label == params.ignore_index;
  let known = label >= 0 && u32(label) < params.columns;
  let poison = select(0.0, nan_(), !known && !ignored);
  let scale = select(1.0, select(0.0, 1.0 / counts[1], counts[1] != 0.0), params.mean == 1u);
  let w = select(0.0, ${weight ? "weight[select(0, label, known)]" : "1.0"} * scale, !ignored) + poison;
  if (column == 0u) {
    let x = f32(log_probabilities[row * params.columns + u32(select(0, label, known))]);
    loss[row] = select(-w * x, 0.0, w == 0.0);
  }
  ${
    gradient
      ? `gradient[thread] = ${element}(select(poison, -w ${
        // elsewhere 0, also where the upstream gradient is infinite
        upstream ? "* upstream[row * params.upstream_stride]" : ""}, column == u32(label) && !ignored));`
      : ""
  }`,
}));

/** The loss of each row (divided for the mean), and the gradient if there is memory for it. */
export function nllRows(
  element: Element,
  b: {
    logProbabilities: Memory;
    labels: Memory;
    counts: Memory;
    weight: Memory | null;
    upstream: Upstream | null;
    loss: Memory;
    gradient: Memory | null;
  },
  n: { rows: number; columns: number; ignoreIndex: number; mean: boolean },
): void {
  kernel({ element, weight: b.weight !== null, upstream: b.upstream !== null, gradient: b.gradient !== null })
    .run(
      { ...b, upstream: b.upstream?.memory ?? null },
      { ...n, mean: n.mean ? 1 : 0, upstreamStride: b.upstream?.stride ?? 0 },
      Math.ceil(n.rows * n.columns / 256),
    );
}
