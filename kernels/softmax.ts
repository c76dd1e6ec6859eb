/** Softmax and log-softmax of rows, forward and backward. */
import type { Element } from "./elementwise.ts";
import { variants } from "./gpu/kernel.ts";
import { type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { MATH, MATH4 } from "./math.ts";
import { planRow, rowBuffer, rowCode, type RowPlan } from "./row.ts";

/** Compile-time choices. */
interface Variant {
  kind: "softmax" | "logSoftmax";
  element: Element;
  plan: RowPlan;
}

// y = exp(x − max) / Σ, or x − max − log Σ
const forwardKernel = variants(({ kind, element, plan }: Variant) => {
  const { head, begin, each, normalise } = rowCode(plan, { x: element }, { y: element });
  return {
    name: kind,
    buffers: { x: rowBuffer("read", element), y: rowBuffer("write", element) },
    params: { rows: "u32", columns: "u32" },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: MATH + MATH4 + head,
    main: `let row = group;
  if (row >= params.rows) { return; }
  ${begin}
  ${normalise([{ name: "row", value: "x4", k: "1.0" }])}
  // a NaN or an infinite maximum makes the row NaN, even if exp(NaN) is +∞ (in SwiftShader) and max ignores NaN
  let log_sum = select(log1p_(row_rest), nan_(), is_nan_(row_rest) || max(row_rest, abs(row_max)) > 3.4028234e38);
  ${
      each(
        `store_y(at4, live4, ${kind === "softmax" ? "exp4_(x4 - row_max - log_sum)" : "x4 - row_max - log_sum"});`,
      )
    }`,
  };
});

// softmax: dX = y·(dY − Σ dY·y); log-softmax: dX = dY − exp(y)·Σ dY
const backwardKernel = variants(({ kind, element, plan }: Variant) => {
  const { head, begin, each, sum } = rowCode(plan, { y: element, d_y: element }, { d_x: element });
  const soft = kind === "softmax";
  return {
    name: `${kind} backward`,
    buffers: {
      y: rowBuffer("read", element),
      dY: rowBuffer("read", element),
      dX: rowBuffer("write", element),
    },
    params: { rows: "u32", columns: "u32" },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: MATH + MATH4 + head,
    main: `let row = group;
  if (row >= params.rows) { return; }
  ${begin}
  var part = 0.0;
  ${each(`part += sum_of(select(vec4f(0.0), ${soft ? "d_y4 * y4" : "d_y4"}, live4));`)}
  let total = ${sum("part", "f32")};
  ${each(`store_d_x(at4, live4, ${soft ? "y4 * (d_y4 - total)" : "d_y4 - exp4_(y4) * total"});`)}`,
  };
});

const forward = remembered<Launch>(), backward = remembered<Launch>();

/** y = softmax or log-softmax of each row of x. */
export function softmaxRows(
  kind: Variant["kind"],
  x: Memory,
  y: Memory,
  element: Element,
  rows: number,
  columns: number,
): void {
  const launch = forward(
    [kind, element, rows, columns],
    () => launchOf(forwardKernel({ kind, element, plan: planRow(columns, "one") }), { rows, columns }, rows),
  );
  runLaunch(launch, { x, y });
}

/** The gradient of `softmaxRows` from its result. */
export function softmaxRowsBackward(
  kind: Variant["kind"],
  y: Memory,
  dY: Memory,
  dX: Memory,
  element: Element,
  rows: number,
  columns: number,
): void {
  const launch = backward(
    [kind, element, rows, columns],
    () => launchOf(backwardKernel({ kind, element, plan: planRow(columns, "two") }), { rows, columns }, rows),
  );
  runLaunch(launch, { y, dY, dX });
}
