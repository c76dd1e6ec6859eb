/** Checks values and gradients of a differentiable op against a float64 function of the same inputs. */
import { assertEquals, assertThrows } from "@std/assert";
import { gradcheck, init, Scope, stats, Tape, type Tensor, tensor } from "@limbeck/limbeck";
import { largestError } from "./compare.ts";
import { type Array64, differences, sizeOf } from "./reference.ts";

/** One op on inputs of some shapes. */
export interface OpCase {
  /** For messages. */
  name: string;
  op: (...x: Tensor[]) => Tensor;
  /** The same in float64. */
  reference: (...x: Array64[]) => Array64;
  /** Shapes of the inputs. */
  shapes: readonly (readonly number[])[];
  /** The range of random inputs; −2 to 2 by default. */
  range?: readonly [number, number];
  /** Inputs in place of random ones. */
  values?: readonly (readonly number[])[];
  /** Largest deviation of the value, as a share of the largest; 2e-6 by default: some 30 roundings of f32. */
  value?: number;
  /** Likewise of a gradient; 5e-6 by default. */
  gradient?: number;
  /** Elements of each input whose gradient is compared; 64 by default, the first and the last among them. */
  samples?: number;
}

/** Random numbers in [0, 1) from a seed (mulberry32). */
export function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let z = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

const GRADCHECK_AT_MOST = 24; // elements: it runs the op twice for each

async function complaints(c: OpCase, seed: number): Promise<string[]> {
  const draw = random(seed), [low, high] = c.range ?? [-2, 2];
  const inputs = c.shapes.map((shape, i): Array64 => ({
    shape,
    // rounded to f32 at once, so that both sides see the same numbers
    data: Float64Array.from(c.values?.[i] ?? Array.from({ length: sizeOf(shape) }, () => low + (high - low) * draw()))
      .map(Math.fround),
  }));
  const want = c.reference(...inputs);
  const upstream = want.data.map(() => Math.fround(0.5 + draw()));

  using _tape = new Tape();
  const leaves = inputs.map((x) => tensor(Float32Array.from(x.data), x.shape, { requiresGrad: true }));
  const y = c.op(...leaves);
  const found: string[] = [];
  if (`${y.shape}` !== `${want.shape}`) return [`has shape [${y.shape}], not [${want.shape}]`];
  const off = (what: string, got: ArrayLike<number>, wanted: ArrayLike<number>, limit: number) => {
    const error = largestError(got, wanted, 1e-30);
    if (!(error <= limit)) found.push(`${what} is off by ${error.toExponential(1)}`);
  };
  off("value", await y.data(), want.data, c.value ?? 2e-6);
  y.backward(tensor(Float32Array.from(upstream), want.shape));

  const weighed = () => c.reference(...inputs).data.reduce((sum, v, i) => sum + v * upstream[i], 0);
  for (const [i, { data }] of inputs.entries()) {
    const count = Math.min(data.length, c.samples ?? 64);
    const at = Array.from({ length: count }, (_, k) => Math.round(k * (data.length - 1) / Math.max(1, count - 1)));
    const wanted = differences(weighed, data, 1e-5, at);
    if (leaves[i].grad === null) {
      found.push(`gradient ${i} is missing`);
      continue;
    }
    const got = await leaves[i].grad.data();
    off(`gradient ${i}`, at.map((e) => got[e]), wanted, c.gradient ?? 5e-6);
  }
  return found;
}

/** Checks all cases and fails with the list of those that are wrong. Small ones run through `gradcheck` as well. */
export async function checkOps(cases: readonly OpCase[]): Promise<void> {
  await init();
  const wrong: string[] = [];
  for (const [i, c] of cases.entries()) {
    const title = `${c.name} ${c.shapes.map((s) => `[${s}]`).join(" ")}`;
    try {
      using _scope = new Scope();
      wrong.push(...(await complaints(c, i)).map((complaint) => `${title}: ${complaint}`));
      const count = c.shapes.reduce((sum, shape) => sum + sizeOf(shape), 0);
      if (count > GRADCHECK_AT_MOST || c.values) continue;
      // multiples of the golden ratio are far enough apart for gradcheck's step: it does not change the order of a maximum's inputs
      const [low, high] = c.range ?? [-2, 2];
      let drawn = 0;
      const next = () => low + (high - low) * ((0.35 + ++drawn * 0.6180339887) % 1);
      const inputs = c.shapes.map((shape) => tensor(Float32Array.from({ length: sizeOf(shape) }, next), shape));
      const { ok, errors } = await gradcheck(c.op, inputs);
      if (!ok) wrong.push(`${title}: gradcheck finds errors ${errors}`);
    } catch (thrown) {
      wrong.push(`${title}: ${thrown}`);
    }
  }
  assertEquals(wrong, []);
}

/** Checks only values, with errors relative to each element: for infinities, NaN and very different magnitudes. */
export async function checkValues(
  name: string,
  got: Tensor,
  want: ArrayLike<number>,
  tolerance = 1e-6,
): Promise<void> {
  const data = await got.data();
  assertEquals(data.length, want.length, name);
  const wrong = Array.from(want).flatMap((w, i) =>
    largestError([data[i]], [w], 1e-37) <= tolerance ? [] : [`${name}, element ${i}: wanted ${w}, got ${data[i]}`]
  );
  assertEquals(wrong, []);
}

/** Checks that each call throws the expected error, and that none of them leaks memory. */
export function assertAllThrow(table: readonly [call: () => unknown, type: ErrorConstructor, message: string][]): void {
  const before = stats().liveBytes, wrong: string[] = [];
  for (const [call, type, message] of table) {
    using _scope = new Scope(); // for what the calls make themselves
    try {
      assertThrows(call, type, message);
    } catch (e) {
      wrong.push((e as Error).message);
    }
  }
  assertEquals(wrong, []);
  assertEquals(stats().liveBytes, before);
}
