/**
 * Cross-entropy of rows of logits: the loss and, if wanted, its gradient, from one pass over the logits.
 *
 *   x = softcap·tanh(logits/T/softcap) or logits/T,  lse = log Σ eˣ = m + log1p(rest),  prob = eˣ⁻ˡˢᵉ
 *   row = (1−ε)·w_y·(lse − x_y) + (ε/V)·Σ w_c·(lse − x_c),  z = λ·lse²,  result = row·scale + z·zScale
 *   d_logits = {[(1−ε)·w_y·(prob − 1_y) + (ε/V)·(W·prob − w)]·scale + 2λ·lse·prob·zScale}·(1 − tanh²)/T · upstream
 *
 * With soft targets t' = (1−ε)t + ε/V: row = Σ w_c·t'_c·(lse − x_c), d_logits = (Σ_j w_j t'_j)·prob − w·t'.
 */
import { type Element, lanes, numbers } from "./elementwise.ts";
import { gpu } from "./gpu/gpu.ts";
import { type BufferType, variants } from "./gpu/kernel.ts";
import { type Launch, launchOf, remembered, runLaunch } from "./gpu/launch.ts";
import type { Memory } from "./gpu/memory.ts";
import { MATH, MATH4 } from "./math.ts";
import { columnReader, planRow, rowBuffer, rowCode, type RowPlan, type Upstream } from "./row.ts";

// vec4s of labels and of weights that a thread reads at once. Element after element, 16,384 labels took 256 threads 33 µs on an H200, 128,256 weights 120 µs
const LABELS_AHEAD = 2, WEIGHTS_AHEAD = 8;

// where |tanh u| is larger, the slope 1 − tanh² u could be off by more than 3e-6 of itself
const STEEP = 0.94;

/** The divisors of means: counts = [kept rows, the sum of their weights Σ w_y, the sum W of all class weights]. One workgroup. */
const countKernel = variants(({ threads, weighted }: { threads: number; weighted: boolean }) => {
  // a loop over `size` elements of a vector, whose body sees a vec4 as x4, and in live4 which of its elements exist
  const each = (vector: string, size: string, ahead: number, body: string) =>
    `for (var block = lane; 4u * block < ${size}; block += ${ahead * threads}u) {
    ${numbers(ahead).map((j) => `let x${j} = ${vector}[min(block + ${threads * j}u, (${size} - 1u) / 4u)];`).join(" ")}
    ${
      numbers(ahead).map((j) =>
        `{ let x4 = x${j}; let live4 = 4u * (block + ${
          threads * j
        }u) + vec4u(0u, 1u, 2u, 3u) < vec4u(${size}); ${body} }`
      ).join("\n    ")
    }
  }`;
  return {
    name: "count kept rows",
    workgroup: threads,
    buffers: {
      labels: "read vec4i",
      ...weighted ? { weight: "read vec4f" as BufferType } : {},
      counts: "write f32",
    },
    params: { rows: "u32", columns: "u32", ignoreIndex: "i32" },
    head: `var<workgroup> meeting: array<vec3f, ${threads}>;
fn weight_of(y: i32) -> f32 {
  ${weighted ? "if (y >= 0 && u32(y) < params.columns) { return weight[y / 4][y % 4]; }" : ""}
  return 1.0;
}`,
    main: `if (group > 0u) { return; }
  var sum = vec3f(0.0);
  ${
      each(
        "labels",
        "params.rows",
        LABELS_AHEAD,
        `let kept4 = select(vec4f(0.0), vec4f(1.0), live4 & (x4 != vec4i(params.ignore_index)));
      let w4 = vec4f(${lanes.map((l) => `weight_of(x4.${l})`).join(", ")});
      sum += vec3f(dot(kept4, vec4f(1.0)), dot(kept4, w4), 0.0);`,
      )
    }
  ${
      weighted
        ? each("weight", "params.columns", WEIGHTS_AHEAD, "sum.z += dot(select(vec4f(0.0), x4, live4), vec4f(1.0));")
        : ""
    }
  meeting[lane] = sum;
  for (var half = ${threads / 2}u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) { meeting[lane] += meeting[lane + half]; }
  }
  if (lane == 0u) {
    counts[0] = meeting[0].x;
    counts[1] = meeting[0].y;
    counts[2] = ${weighted ? "meeting[0].z" : "f32(params.columns)"};
  }`,
  };
});

/** counts = [kept rows, Σ w_y over them, Σ w_c over all classes]; without `weight` all weights are 1. */
export function countRows(
  target: Memory,
  weight: Memory | null,
  counts: Memory,
  rows: number,
  columns: number,
  ignoreIndex: number,
): void {
  const { isSoftware, limits } = gpu().info;
  const threads = isSoftware ? 256 : Math.min(1024, limits.maxComputeInvocationsPerWorkgroup);
  countKernel({ threads, weighted: weight !== null })
    .run({ labels: target, counts, ...weight ? { weight } : {} }, { rows, columns, ignoreIndex }, 1);
}

/** Compile-time choices. */
interface Variant {
  logits: Element;
  /** Class indices, or a probability matrix of this element. */
  target: "index" | Element;
  weight: boolean;
  softcap: boolean;
  /** Whether labels are smoothed. */
  smooth: boolean;
  gradient: boolean;
  /** Whether z-loss, predictions and hits of the rows are written too. */
  extras: boolean;
  /** Whether the gradient overwrites the logits. */
  inPlace: boolean;
}

// f16 could not hold the tanh of a softcap precisely enough
const inHalves = (v: Variant) => v.logits === "f16" && v.target === "index" && !v.softcap;

const kernel = variants(({ plan, ...v }: Variant & { plan: RowPlan }) => {
  const soft = v.target !== "index", dLogits = v.inPlace ? "logits" : "d_logits";
  const streams: Record<string, Element> = { logits: v.logits, ...soft ? { probability: v.target as Element } : {} };
  const outputs: Record<string, Element> = v.gradient ? { [dLogits]: v.logits } : {};
  const { head, begin, each, sum, normalise, overwrite, shared, once, wait } = rowCode(plan, streams, outputs, {
    halves: inHalves(v),
  });

  // First the code that loop bodies have for four columns: x4, where x = k·x4, their weights w4, and w·t' as wt4. With a softcap x4 is y = tanh u and k is the
  // cap. Registers that keep the whole row keep y: 4096×32000 took an H100 0.39 ms, 0.49 when the tanh was computed twice
  const capped = v.softcap && plan.quads > 0 && !plan.more && !v.extras && !v.inPlace;
  const capping = "let u4 = logits4 * params.to_cap; let x4 = tanh4_(u4);",
    squashed = "tanh4_(logits4 * params.to_cap)";
  const x = v.softcap && !capped ? capping : "let x4 = logits4;";
  // without smoothing only the weight of the label's class is needed: 4096×32003 takes an H100 0.36 ms instead of 0.39 with all weights read
  const weighted = v.weight && (soft || v.smooth), ones = "let w4 = vec4f(1.0);";
  // (beyond the last class the memory may hold anything)
  const w = weighted
    ? `let w4 = ${plan.wide ? "weight_at(columns4)" : "select(vec4f(0.0), weight_at(columns4), live4)"};`
    : ones;
  const t =
    `let wt4 = w4 * select(vec4f(0.0), (1.0 - params.smoothing) * probability4 + params.smoothing / f32(params.columns), live4);`;
  // What four columns add to −Σ w·t'·(m − x) or −Σ w·(m − x). A logit of −∞, impossible with a softcap, adds 0 and is counted separately if it has a weight,
  // so that 0·∞ is 0
  const spread = (w: string) =>
    v.softcap ? `spread += dot(${w}, select(vec4f(0.0), x4 - m, live4));` : `let endless4 = x4 < vec4f(-3.4e38);
    spread += vec2f(dot(${w}, select(x4 - m, vec4f(0.0), endless4 | !live4)), sum_of(select(vec4f(0.0), vec4f(1.0), endless4 & live4 & (${w} > vec4f(0.0)))));`;
  // The gradient is linear in prob: slope·prob − level·w, with soft targets slope·prob + level·(mass·prob − w·t'). `bend` is the factor of a softcap
  const writing = (bend: string) =>
    `let prob4 = exp2((x4 - m) * k2 - log_sum2);
    ${
      soft
        ? `var over4 = mass * prob4 - wt4;
    if (max_of(prob4) > 0.5) { over4 = select(over4, vec4f(others - mass * x_rest / (1.0 + x_rest)), x4 == vec4f(m)); }
    let g4 = level * over4 + slope * prob4;`
        : `let g4 = slope * prob4 - level${weighted ? " * w4" : ""};`
    }
    store_${dLogits}(at4, live4, g4${bend});`;
  const bend = v.softcap && !capped
    ? `var bend4 = 1.0 - x4 * x4; if (max_of(abs(x4)) > ${STEEP}) { bend4 = sech_squared4_(u4); }`
    : "";

  // Then the steps, in order. Ignored rows:
  const zeroRow = v.gradient ? each(`store_${dLogits}(at4, live4, vec4f(0.0));`) : "";
  const ignoredRow = soft ? "" : `if (labels[at] == params.ignore_index) {
    if (lane == 0u) { loss[at] = 0.0; ${v.extras ? "z_rows[at] = 0.0; hits[at] = 0.0;" : ""} }
    ${v.extras ? "" : `${zeroRow}\n    return;`}
  }`;

  // values that are read early and used late: one thread puts them into workgroup memory
  const scales = soft
    ? `let scale = select(1.0, 1.0 / f32(params.all_rows), is_mean);
    given[0] = vec4f(up, scale, scale, 0.0);`
    : `// the scale is 0 if no row is kept, or only rows of weight 0
    let scale = select(1.0, select(0.0, 1.0 / counts[1], counts[1] != 0.0), is_mean);
    let z_scale = select(1.0, select(0.0, 1.0 / counts[0], counts[0] != 0.0), is_mean);
    given[0] = vec4f(up, scale, z_scale, counts[2]);
    let some_label = min(label, params.columns - 1u);
    given[1] = vec4f(element(row, some_label), ${v.weight ? "weight_of(some_label)" : "1.0"}, 0.0, 0.0);`;

  // m and log Σ eˣ⁻ᵐ, and Σ w·t'. Meanwhile one float in every 32 bytes of the weights is read, so that the last loop finds them in the nearest cache:
  // 4096×32000 with every option takes 0.40 ms instead of 0.42
  const touched = capped && weighted
    ? numbers(Math.ceil(plan.quads / 2))
      .map((i) => `weight[min(${2 * i * plan.threads}u + 2u * lane, params.columns / 4u - 1u)].x`)
      .reduce((a, b) => `max(${a}, ${b})`)
    : null;
  const normalised = normalise(
    [{
      name: "x",
      value: v.softcap && !capped ? squashed : "logits4",
      k: "k",
      becomes: capped ? squashed : undefined,
    }],
    (soft ? `{ ${w} ${t} mass_part += sum_of(wt4); }` : "") +
      (capped ? "steep = max(steep, max_of(select(vec4f(0.0), abs(x4), live4)));" : ""),
  );
  // for a row's only likely class, mass·prob − w·t' is the sum over all others, without cancellation
  const likeliest = () =>
    `var others = 0.0;
  if (x_rest < 1.0) { // its probability, 1/(1 + x_rest), is above ½
    var others_part = 0.0;
    ${each(`${x} ${w} ${t} others_part += sum_of(select(wt4, vec4f(0.0), x4 == vec4f(m)));`)}
    others = ${sum("others_part", "f32")};
  }`;
  const labelOrMass = soft
    ? `let mass = ${sum("mass_part", "f32")};
  ${!v.gradient ? "" : likeliest()}`
    : `// a label that is not a class makes its row NaN: it came from the GPU, so the host could not check it
  let known = label < params.columns;
  let poison = select(nan_(), 0.0, known);
  let label_weight = given[1].y + poison;`;

  // slope and level of the gradient; for a label also those of its own column, and its loss
  const zLoss = "select(0.0, params.z_loss * lse * lse * z_scale, params.z_loss > 0.0)"; // lse² may overflow
  const slopes = soft
    ? `let slope = z_slope * outer;
  let level = scale * outer;`
    : `let sharp = scale * (1.0 - params.smoothing) * label_weight * outer;
  let smooth_ = scale * params.smoothing / f32(params.columns) * outer;
  let even = smooth_ * given[0].w + z_slope * outer;
  let slope = sharp + even;
  let level = smooth_ + poison;
  ${
      once(
        `let label_loss = log_sum - (capped(given[1].x) - m) * k; // capped as m is: a row's only likely class has loss 0
    given[2] = vec4f(sharp, even, expm1_(-label_loss), label_loss);
    given[3] = vec4f(${zLoss});`,
      )
    }`;

  // the loop that writes the gradient and sums what smoothing and soft targets need
  const spreading = soft ? spread("wt4") : v.smooth ? spread("w4") : "";
  const gradientLoop = () =>
    each(`${x} ${soft || weighted ? w : ""} ${soft ? t : ""}
    ${!soft && v.smooth && !weighted ? ones : ""}${spreading}
    ${bend}
    ${writing(capped ? " * (1.0 - x4 * x4)" : v.softcap ? " * bend4" : "")}`);
  // near y = ±1 the slope is computed from u instead: the few columns there are read and written again
  const steepLoop = () =>
    !capped ? "" : `if (steep > ${STEEP}) {
    ${
      each(
        `${capping} if (max_of(abs(x4)) > ${STEEP}) { ${soft || weighted ? w : ""} ${soft ? t : ""} ${
          writing(" * sech_squared4_(u4)")
        } }`,
        null,
      )
    }
  }`;
  const lastLoop = v.gradient
    ? v.extras ? `if (ignored) { ${zeroRow} } else { ${gradientLoop()} }` : gradientLoop() + steepLoop()
    : spreading && each(`${x} ${w} ${soft ? t : ""} ${spreading}`);
  const spreadSum = !spreading
    ? wait
    : v.softcap
    ? `let spread_sum = -k * ${sum("spread", "f32")};`
    : `let spread_all = ${sum("spread", "vec2f")};
  let spread_sum = select(-spread_all.x * k, infinity_(), spread_all.y > 0.0);`;

  // the label's column, overwritten by the thread that wrote it
  const labelColumn = soft || !v.gradient ? "" : `if (known${v.extras ? " && !ignored" : ""}) { ${
    overwrite(
      dLogits,
      "label",
      `let g = slopes.x * slopes.z + (slopes.y * exp(-slopes.w) - level${weighted ? " * of_label.y" : ""});`,
      `g${v.softcap ? " * sech_squared_(of_label.x * params.to_cap)" : ""}`,
    )
  } }`;

  // the row's loss
  const rowLoss = soft
    ? `loss[at] = (spread_sum + select(mass * log_sum, 0.0, mass == 0.0)) * scale + ${zLoss};`
    : `let smooth_loss = ${
      v.smooth ? "params.smoothing / f32(params.columns) * (spread_sum + given[0].w * log_sum)" : "0.0"
    };
    let sharp_weight = (1.0 - params.smoothing) * (of_label.y + poison);
    let sharp_loss = select(sharp_weight * slopes.w, poison, sharp_weight == 0.0);
    // without weight, not even an infinite logit counts
    loss[at] = select((sharp_loss + smooth_loss) * given[0].y, 0.0, given[0].y == 0.0) + given[3].x;`;

  // and its prediction: the first column with the row's largest logit; NaN counts as larger than any number
  const predictionHead = !v.extras ? "" : `var<workgroup> best: array<vec2f, THREADS>;
fn first_largest_(a: vec2f, b: vec2f) -> vec2f { // (value, column)
  let alike = a.x == b.x || (is_nan_(a.x) && is_nan_(b.x));
  let second = select(b.x > a.x || (is_nan_(b.x) && !is_nan_(a.x)), bitcast<u32>(b.y) < bitcast<u32>(a.y), alike);
  return select(a, b, second);
}`;
  const prediction = !v.extras ? "" : `var mine = vec2f(-infinity_(), bitcast<f32>(0xffffffu));
  ${
    each(`for (var j = 0u; j < 4u; j++) {
      if (live4[j]) { mine = first_largest_(mine, vec2f(logits4[j], bitcast<f32>(columns4[j]))); }
    }`)
  }
  best[lane] = mine;
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane < half) {
      best[lane] = first_largest_(best[lane], best[lane + half]);
    }
  }
  if (lane == 0u) {
    let prediction = bitcast<u32>(best[0].y);
    predictions[at] = i32(min(prediction, params.columns - 1u));
    ${soft ? "hits[at] = 0.0;" : "if (!ignored) { hits[at] = select(0.0, 1.0, prediction == label); }"}
  }`;

  return {
    name: "crossEntropy",
    buffers: {
      logits: rowBuffer(v.inPlace ? "write" : "read", v.logits),
      ...soft ? { probability: rowBuffer("read", v.target as Element) } : { labels: "read i32" as BufferType },
      counts: "read f32",
      upstream: "read f32",
      ...v.weight ? { weight: rowBuffer("read", "f32") } : {},
      loss: "write f32",
      ...v.extras
        ? { zRows: "write f32" as BufferType, predictions: "write i32" as BufferType, hits: "write f32" as BufferType }
        : {},
      ...v.gradient && !v.inPlace ? { dLogits: rowBuffer("write", v.logits) } : {},
    },
    params: {
      rows: "u32",
      columns: "u32",
      firstRow: "u32",
      allRows: "u32",
      ignoreIndex: "i32",
      mean: "u32",
      scaled: "u32",
      upstreamStride: "u32",
      smoothing: "f32",
      zLoss: "f32",
      inverseTemperature: "f32",
      softcap: "f32",
      toCap: "f32",
    },
    workgroup: plan.threads,
    subgroups: plan.subgroups,
    head: `${MATH}${MATH4}${head}
${
      !v.weight ? "" : `${columnReader("weight", plan)}
fn weight_of(c: u32) -> f32 { return weight[c / 4u][c % 4u]; }`
    }
// values that are read early and used late, kept here because registers are scarce: the upstream gradient, the scales of the row and its z-loss, the weight
// of all classes; the label's logit and weight; for the end of the row the slopes of the label's column and the label's loss; the z-loss. (4096×32003 with
// every option took an H100 0.42 ms when each was read where it was used, now 0.41; 2048×128256 with a softcap 1.17, now 1.10.)
${shared("given", `array<vec4f, ${soft ? 1 : 4}>`)}
${predictionHead}
fn element(row: u32, c: u32) -> f32 {
  let at = row * params.columns + c;
  return f32(logits[at / 4u][at % 4u]);
}
fn capped(logit: f32) -> f32 {
  return ${v.softcap ? "tanh4_(vec4f(logit * params.to_cap)).x" : "logit"};
}`,
    main: `let row = group;
  if (row >= params.rows) { return; }
  let at = params.first_row + row; // in the whole batch, of which the logits may be a chunk
  let is_mean = params.mean == 1u;
  let k = params.${v.softcap ? "softcap" : "inverse_temperature"};
  let k2 = k * ${Math.LOG2E};
  ${soft ? "" : "let label = u32(labels[at]);"}
  ${begin}
  ${ignoredRow}
  ${
      once(`let up = select(1.0, upstream[at * params.upstream_stride], params.scaled == 1u);
    ${scales}`)
    }
  ${soft ? "var mass_part = 0.0;" : ""}
  ${capped ? "var steep = 0.0;" : ""}
  ${touched ? `let touched = ${touched};` : ""}
  var spread = ${v.softcap ? "0.0" : "vec2f(0.0)"};
  ${normalised}
  ${touched ? "steep = select(steep, 1.0, touched > 3e38); // never true, but the compiler must keep the reads" : ""}
  let m = x_max;
  let log_sum = log1p_(x_rest);
  let log_sum2 = log_sum * ${Math.LOG2E};
  let lse = m * k + log_sum;
  let up = given[0].x;
  let scale = given[0].y;
  let z_scale = given[0].z;
  ${labelOrMass}
  let z_slope = select(0.0, 2.0 * params.z_loss * z_scale * lse, params.z_loss > 0.0);
  let outer = up * params.inverse_temperature;
  ${slopes}
  ${v.extras ? `let ignored = ${soft ? "false" : "labels[at] == params.ignore_index"};` : ""}
  ${lastLoop}
  ${spreadSum}
  ${soft ? "" : "let of_label = given[1]; let slopes = given[2];"}
  ${labelColumn}
  if (lane == 0u ${v.extras ? "&& !ignored" : ""}) {
    ${rowLoss}
    ${v.extras ? `z_rows[at] = ${soft ? zLoss : "given[3].x"};` : ""}
  }
  ${prediction}`,
  };
});

/** The memories of one launch. */
export interface CrossEntropyBuffers {
  logits: Memory;
  target: Memory;
  /** From `countRows` if the target is class indices; else any memory that is not used otherwise here. */
  counts: Memory;
  weight: Memory | null;
  upstream: Upstream | null;
  loss: Memory;
  extras: { zRows: Memory; predictions: Memory; hits: Memory } | null;
  /** May be the logits' own memory. */
  dLogits: Memory | null;
}

/** The numbers of one launch. */
export interface CrossEntropyNumbers {
  /** The rows of these logits: those from `firstRow` on of a batch with `allRows` rows. */
  rows: number;
  firstRow: number;
  allRows: number;
  columns: number;
  mean: boolean;
  ignoreIndex: number;
  smoothing: number;
  zLoss: number;
  temperature: number;
  softcap: number;
}

const ofRows = remembered<Launch>();

/** Computes the loss of each row (scaled for the mean), and the gradient if `dLogits` is given. */
export function crossEntropyRows(
  logits: Element,
  target: "index" | Element,
  b: CrossEntropyBuffers,
  n: CrossEntropyNumbers,
): void {
  // deno-fmt-ignore
  const key = [
    logits, target, b.weight !== null, b.dLogits !== null, b.dLogits === b.logits, b.extras !== null, b.upstream?.stride, n.rows, n.firstRow, n.allRows,
    n.columns, n.mean, n.ignoreIndex, n.smoothing, n.zLoss, n.temperature, n.softcap,
  ];
  const launch = ofRows(key, () => {
    const variant: Variant = {
      logits,
      target,
      weight: b.weight !== null,
      softcap: n.softcap > 0,
      smooth: n.smoothing > 0,
      gradient: b.dLogits !== null,
      extras: b.extras !== null,
      inPlace: b.dLogits === b.logits,
    };
    const plan = planRow(n.columns, target === "index" ? "one" : "two", {
      halves: inHalves(variant),
      busy: variant.softcap,
    });
    if (variant.extras) plan.alone = false; // threads find the prediction in workgroup memory
    const params = {
      ...n,
      mean: n.mean ? 1 : 0,
      scaled: b.upstream ? 1 : 0,
      upstreamStride: b.upstream?.stride ?? 0,
      inverseTemperature: 1 / n.temperature,
      toCap: n.softcap > 0 ? 1 / n.temperature / n.softcap : 0,
    };
    return launchOf(kernel({ ...variant, plan }), params, n.rows);
  });
  const { extras, ...rest } = b;
  runLaunch(launch, {
    ...rest,
    ...extras,
    labels: b.target,
    probability: b.target,
    upstream: b.upstream?.memory ?? b.counts,
  });
}
