/** Float64 arithmetic on arrays with a shape, with which ops are compared. Written to be easy to verify, not to be fast. */

/** A float64 array with a shape, row by row. */
export interface Array64 {
  shape: readonly number[];
  data: Float64Array;
}

/**
 * ∂f/∂x by central differences, at the elements `at` of x (all by default); x is restored. In float64 the step's square and 1e-16 over the step are both below
 * 1e-9.
 */
export function differences(
  f: () => number,
  x: Float64Array | number[],
  step = 1e-5,
  at: number[] = [...x.keys()],
): number[] {
  return at.map((i) => {
    const v = x[i];
    x[i] = v + step;
    const up = f();
    x[i] = v - step;
    const down = f();
    x[i] = v;
    return (up - down) / (2 * step);
  });
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** The array whose element at each index is `f(index)`. */
export function indexed(shape: readonly number[], f: (index: number[]) => number): Array64 {
  const data = new Float64Array(sizeOf(shape)), index = shape.map(() => 0);
  for (let i = 0; i < data.length; i++) {
    data[i] = f(index);
    for (let d = shape.length - 1; d >= 0 && ++index[d] === shape[d]; d--) index[d] = 0;
  }
  return { shape, data };
}

/** The element of x, after broadcasting, at an index: dimensions are aligned at the back, those of size 1 are repeated. */
export function at(x: Array64, index: readonly number[]): number {
  const lead = index.length - x.shape.length;
  let offset = 0;
  for (let d = 0; d < x.shape.length; d++) offset = offset * x.shape[d] + (x.shape[d] === 1 ? 0 : index[lead + d]);
  return x.data[offset];
}

/** y = f(a, b, …) with broadcasting. */
export function elementwise(f: (...x: number[]) => number): (...xs: Array64[]) => Array64 {
  return (...xs) => {
    const rank = Math.max(...xs.map((x) => x.shape.length));
    const shape = Array.from({ length: rank }, (_, d) => {
      const sizes = xs.map((x) => x.shape[d - rank + x.shape.length] ?? 1);
      return sizes.find((n) => n !== 1) ?? 1;
    });
    return indexed(shape, (i) => f(...xs.map((x) => at(x, i))));
  };
}

/** y = f(the elements over `dim`). */
export function reduction(
  f: (values: number[]) => number,
  { dim, keepDim = false }: { dim?: number | number[]; keepDim?: boolean } = {},
): (x: Array64) => Array64 {
  return (x) => {
    const rank = x.shape.length, named = [dim ?? []].flat();
    const dims = named.length === 0 ? x.shape.map((_, d) => d) : named.map((d) => d < 0 ? d + rank : d);
    const kept = x.shape.map((n, d) => dims.includes(d) ? 1 : n);
    const lines = Array.from({ length: sizeOf(kept) }, (): number[] => []);
    const strides = kept.map((n, d) => n === 1 ? 0 : sizeOf(kept.slice(d + 1)));
    indexed(x.shape, (i) => lines[i.reduce((sum, n, d) => sum + n * strides[d], 0)].push(at(x, i)));
    const shape = keepDim ? kept : x.shape.filter((_, d) => !dims.includes(d));
    return { shape, data: Float64Array.from(lines, f) };
  };
}

/** The dimensions of x in another order. */
export function permuted(x: Array64, order: readonly number[]): Array64 {
  return indexed(order.map((d) => x.shape[d]), (i) => at(x, x.shape.map((_, d) => i[order.indexOf(d)])));
}

/** Every line of x along `dim` replaced by `f` of it. */
export function lines(f: (line: Float64Array) => ArrayLike<number>, dim: number): (x: Array64) => Array64 {
  return (x) => {
    const rank = x.shape.length, along = dim < 0 ? dim + rank : dim;
    const order = [...x.shape.keys()].filter((d) => d !== along).concat(along);
    const moved = permuted(x, order), n = x.shape[along];
    for (let i = 0; i < moved.data.length; i += n) moved.data.set(f(moved.data.subarray(i, i + n)), i);
    return permuted(moved, x.shape.map((_, d) => order.indexOf(d)));
  };
}

/** The matrix product of the last two dimensions with broadcast batches. */
export function product(a: Array64, b: Array64): Array64 {
  const [m, k] = a.shape.slice(-2), n = b.shape.at(-1)!;
  const batchOf = (x: Array64): Array64 => ({ // the number of each matrix in x
    shape: x.shape.slice(0, -2),
    data: Float64Array.from({ length: sizeOf(x.shape.slice(0, -2)) }, (_, i) => i),
  });
  const [ofA, ofB] = [batchOf(a), batchOf(b)];
  const which = elementwise((i, j) => i * ofB.data.length + j)(ofA, ofB);
  const data = new Float64Array(which.data.length * m * n);
  which.data.forEach((both, batch) => {
    const fromA = Math.floor(both / ofB.data.length) * m * k, fromB = (both % ofB.data.length) * k * n;
    for (let i = 0; i < m; i++) {
      for (let l = 0; l < k; l++) {
        const left = a.data[fromA + i * k + l];
        for (let j = 0; j < n; j++) data[(batch * m + i) * n + j] += left * b.data[fromB + l * n + j];
      }
    }
  });
  return { shape: [...which.shape, m, n], data };
}

export const transposed = (x: Array64): Array64 =>
  permuted(x, [...x.shape.slice(0, -2).keys(), x.shape.length - 1, x.shape.length - 2]);
