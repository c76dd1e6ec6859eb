/**
 * The largest deviation, relative to the largest finite expected value (at least `floor`). Infinities and NaN must be equal.
 * Infinity if the lengths differ.
 */
export function largestError(got: ArrayLike<number>, want: ArrayLike<number>, floor = 0): number {
  if (got.length !== want.length) return Infinity;
  let scale = floor, worst = 0;
  for (let i = 0; i < want.length; i++) if (Number.isFinite(want[i])) scale = Math.max(scale, Math.abs(want[i]));
  for (let i = 0; i < want.length; i++) {
    if (Object.is(got[i], want[i]) || got[i] === want[i]) continue;
    const error = Math.abs(got[i] - want[i]) / scale;
    worst = Number.isFinite(want[i]) && !Number.isNaN(error) ? Math.max(worst, error) : Infinity;
  }
  return worst;
}
