/**
 * Elementary functions for WGSL. The built-in ones guarantee too little: `log` may be off by 2⁻²¹ near 1 (as it is in Mesa's software driver), `tanh` loses
 * the digits of small arguments, and `expm1`, `log1p` and `Φ` do not exist. Each function here is accurate to a few ulp, keeps NaN, and exists for `f32` and
 * `vec4f` (suffix `4`). `exp` is the built-in one: its error is (3 + 2|x|) ulp, and for large |x| the result has little weight in a sum.
 */

interface Lane {
  suffix: "" | "4";
  float: string;
  int: string;
  uint: string;
  bool: string;
}

const f32: Lane = { suffix: "", float: "f32", int: "i32", uint: "u32", bool: "bool" };
const vec4: Lane = { suffix: "4", float: "vec4f", int: "vec4i", uint: "vec4u", bool: "vec4<bool>" };

/** A polynomial by Horner's scheme; the coefficients start with the constant. */
export function horner(x: string, coefficients: number[]): string {
  const literal = (c: number) => Number.isInteger(c) ? `${c}.0` : `${c}`;
  return coefficients.slice(0, -1).reduceRight(
    (inner, c) => `(${literal(c)} + ${x} * ${inner})`,
    literal(coefficients.at(-1)!),
  );
}

/**
 * The coefficients, starting with the constant, of the polynomial that equals f at `count` Chebyshev points between `from` and `to`. Its error falls
 * geometrically with `count`, the faster the farther away f's nearest singularity is. To get a small relative error, divide f by the power of x that it
 * vanishes like.
 */
export function fit(f: (x: number) => number, from: number, to: number, count: number): number[] {
  const x = Array.from(
    { length: count },
    (_, i) => (from + to + (to - from) * Math.cos(Math.PI * (i + 0.5) / count)) / 2,
  );
  const divided = x.map(f);
  for (let k = 1; k < count; k++) {
    for (let i = count - 1; i >= k; i--) divided[i] = (divided[i] - divided[i - 1]) / (x[i] - x[i - k]);
  }
  let p: number[] = [];
  for (let i = count - 1; i >= 0; i--) { // p = divided[i] + (x − x[i])·p
    p = [divided[i], ...p].map((c, j) => c - (j < p.length ? x[i] * p[j] : 0));
  }
  return p;
}

const EXPM1 = fit((x) => Math.expm1(x) / x, -1, 1, 8);
const EXCESS = fit((x) => (Math.expm1(x) - x) / (x * x), -1, 1, 8);
const LOG1P = fit((x) => (Math.log1p(x) - x + x * x / 2) / x ** 3, Math.SQRT1_2 - 1, Math.SQRT2 - 1, 8);
const LOG1P_ALL = fit((x) => Math.log1p(x) / x, Math.SQRT1_2 - 1, Math.SQRT2 - 1, 9);
const TANH = fit((z) => (Math.tanh(Math.sqrt(z)) / Math.sqrt(z) - 1) / z, 0, 0.3, 5);

function functions({ suffix: s, float: F, int: I, uint: U, bool }: Lane): string {
  return `
fn is_nan${s}_(x: ${F}) -> ${bool} { return (bitcast<${U}>(x) & ${U}(0x7fffffffu)) > ${U}(0x7f800000u); }

// log f for f = 1 + x, a normal number > 0: f = 2^k·(1 + m) with 1 + m in [√½, √2); for k = 0, m is x, so that a small x keeps its digits
fn log_of_sum${s}_(f: ${F}, x: ${F}) -> ${F} {
  let shifted = bitcast<${U}>(f) - ${U}(0x3f3504f3u);
  let k = bitcast<${I}>(shifted) >> ${U}(23u);
  let mantissa = bitcast<${F}>((shifted & ${U}(0x007fffffu)) + ${U}(0x3f3504f3u)) - 1.0;
  let m = select(mantissa, x, k == ${I}(0));
  let z = m * m;
  // log 2 in two parts, so that k times the first is exact
  return ${F}(k) * 0.693359375 + (m - z * (0.5 - m * ${horner("m", LOG1P)}) - ${F}(k) * 2.12194440e-4);
}

// the same with an absolute error of 1e-7 only; wrong if f is infinite
fn log_of_any${s}_(f: ${F}, x: ${F}) -> ${F} {
  let power = (bitcast<${I}>(f) - ${I}(0x3f3504f3)) & ${I}(-0x800000); // k where floats have their exponent
  let scale = bitcast<${F}>(${I}(0x3f800000) - power);
  let m = x * scale + (scale - 1.0);
  return ${F}(power) * ${Math.LN2 / 2 ** 23} + m * ${horner("m", LOG1P_ALL)};
}

// x − log(1 + x), given the logarithm
fn log_gap${s}_(x: ${F}, log: ${F}) -> ${F} {
  return select(x - log, x * x * (0.5 - x * ${horner("x", LOG1P)}), (x > ${F}(-0.29)) & (x < ${F}(0.41)));
}

fn log${s}_(x: ${F}) -> ${F} { return log_special${s}_(x, x - 1.0); }

fn log1p${s}_(x: ${F}) -> ${F} { return log_special${s}_(1.0 + x, x); }

// for any f
fn log_special${s}_(f: ${F}, x: ${F}) -> ${F} {
  let subnormal = f < ${F}(1.17549435e-38);
  let r = log_of_sum${s}_(select(f, f * 8388608.0, subnormal), x) - select(${F}(0.0), ${F}(15.942385), subnormal); // 23·log 2
  let special = select(select(r, ${F}(nan_()), f < ${F}(0.0)), ${F}(-infinity_()), f == ${F}(0.0));
  return select(special, f, (bitcast<${U}>(f) == ${U}(0x7f800000u)) | is_nan${s}_(f));
}

// exp x that keeps NaN, which the built-in one need not (in SwiftShader it is +∞)
fn exp${s}_(x: ${F}) -> ${F} { return select(exp(x), x, is_nan${s}_(x)); }

// exp x − 1 for |x| < 1
fn expm1_series${s}_(x: ${F}) -> ${F} { return x * ${horner("x", EXPM1)}; }

// exp x − 1 − x for |x| < 1: x²/2 near 0
fn excess_series${s}_(x: ${F}) -> ${F} { return x * x * ${horner("x", EXCESS)}; }

fn expm1${s}_(x: ${F}) -> ${F} { return select(exp(x) - 1.0, expm1_series${s}_(x), abs(x) < ${F}(1.0)); }

// 1 − 2/(1 + e²ˣ), and near 0, where that cancels, x plus the rest of its series; keeps NaN
fn tanh${s}_(x: ${F}) -> ${F} {
  let z = x * x;
  let far = 1.0 - 2.0 / (1.0 + exp2(x * ${2 * Math.LOG2E}));
  return select(x + x * z * ${horner("z", TANH)}, far, z >= ${F}(0.3));
}

// 1/cosh² x; in its tails 1 − tanh² x would lose all digits
fn sech_squared${s}_(x: ${F}) -> ${F} {
  let e = exp(-2.0 * abs(x));
  let r = 1.0 / (1.0 + e);
  return 4.0 * e * r * r;
}

fn sigmoid${s}_(x: ${F}) -> ${F} {
  let e = exp${s}_(-abs(x));
  return select(${F}(1.0), e, x < ${F}(0.0)) / (1.0 + e);
}

fn softplus${s}_(x: ${F}) -> ${F} { return max(x, ${F}(0.0)) + log1p${s}_(exp${s}_(-abs(x))); }
`;
}

/** NaN and infinity, through variables, because as constants they do not compile. */
export const NOT_FINITE = `
fn nan_() -> f32 { var bits = 0x7fc00000u; return bitcast<f32>(bits); }
fn infinity_() -> f32 { var bits = 0x7f800000u; return bitcast<f32>(bits); }
`;

/** The functions for `f32`. */
export const MATH: string = NOT_FINITE + functions(f32) + `
// max and min that keep NaN, which the built-in ones need not
fn max_(a: f32, b: f32) -> f32 { return select(select(max(a, b), b, is_nan_(b)), a, is_nan_(a)); }
fn min_(a: f32, b: f32) -> f32 { return select(select(min(a, b), b, is_nan_(b)), a, is_nan_(a)); }

// Φ(x), given exp(−x²/2). The tail beyond |x| is that times a function which a polynomial in t = 1/(1 + 0.35·|x|) fits with a relative error of 4e-8
fn normal_below_(x: f32, bell: f32) -> f32 {
  let t = 1.0 / (1.0 + 0.35 * abs(x));
  let tail = bell * t * ${
  horner("t", [
    0.1396187126,
    0.1399122981,
    0.1194449168,
    0.1071145876,
    -0.02704660827,
    0.1650509959,
    -0.2609612283,
    0.1465458303,
    -0.029679522,
  ])
};
  return select(1.0 - tail, tail, x < 0.0);
}
`;

/** The 64 bits of a product. */
export const WIDE_PRODUCT: string = `
fn wide_product_(a: u32, b: u32) -> vec2u { // low and high word
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  return vec2u((other << 16u) | (low & 0xffffu), (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u));
}
`;

/** Sines and powers, which only elementwise ops need. */
export const SINES_AND_POWERS: string = `${WIDE_PRODUCT}

// x as k·π/2 + r with |r| ≤ π/4, for |x| ≥ 2: the mantissa, an integer, times those 96 bits of 2/π that contribute no multiple of 4 (Payne and Hanek 1983)
fn turns_(x: f32) -> vec2f {
  var bits_of = array<u32, 7>(0xa2f9836eu, 0x4e441529u, 0xfc2757d1u, 0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu);
  let bits = bitcast<u32>(x) & 0x7fffffffu;
  let power = i32(bits >> 23u) - 150;
  let mantissa = (bits & 0x7fffffu) | 0x800000u;
  let from_ = u32(max(power - 2, 0));
  let back = u32(2 - min(power, 2)); // bits to shift the product to the right, so that it counts quarters
  let w = min(from_ / 32u, 3u);
  let shift = from_ % 32u;
  var window: array<u32, 3>;
  for (var i = 0u; i < 3u; i++) { window[i] = (bits_of[w + i] << shift) | ((bits_of[w + i + 1u] >> 1u) >> (31u - shift)); }
  let a = wide_product_(mantissa, window[0]);
  let b = wide_product_(mantissa, window[1]);
  let rest = wide_product_(mantissa, window[2]).y;
  let low = b.x + rest;
  let next = b.y + select(0u, 1u, low < rest);
  let middle = a.x + next;
  let high = a.y + select(0u, 1u, middle < next);
  // of x·2/π/4 without its whole part: 64 bits, of which the first two are quarters
  let first = ((high << 1u) << (31u - back)) | (middle >> back);
  let second = ((middle << 1u) << (31u - back)) | (low >> back);
  let k = ((first >> 29u) + 1u) >> 1u; // rounded
  let part = f32(bitcast<i32>((first << 2u) | (second >> 30u))) * exp2(-32.0) + f32(second << 2u) * exp2(-64.0);
  let turns = vec2f(f32(k), part * ${Math.PI / 2});
  return select(turns, -turns, x < 0.0);
}

// sin(x + quarter·π/2), where WGSL lets the built-in sine err by 2⁻¹¹: π/2 in three parts, of which k times the first two is
// exact, so that the remainder keeps its digits for |x| up to 12,000
fn sin_shifted_(x: f32, quarter: i32) -> f32 {
  var k = round(x * 0.6366197723675814);
  var r = x - k * 1.5703125 - k * 4.837512969970703e-4 - k * 7.549789954891882e-8;
  if (abs(x) > 12000.0) {
    let turns = turns_(x);
    k = turns.x;
    r = select(turns.y, nan_(), abs(x) > 3.4028234e38);
  }
  let z = r * r;
  let quadrant = i32(k) + quarter;
  let sine = r + r * z * ${horner("z", [-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4])};
  let cosine = 1.0 - 0.5 * z + z * z * ${
  horner("z", [4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5])
};
  let value = select(sine, cosine, (quadrant & 1) == 1);
  return select(value, -value, (quadrant & 2) == 2);
}
fn sin_(x: f32) -> f32 { return sin_shifted_(x, 0); }
fn cos_(x: f32) -> f32 { return sin_shifted_(x, 1); }

// x cut to 12 bits: products of two such numbers are exact, and no compiler simplifies (a + b) − cut_(a) to b
fn cut_(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u); }

// log₂ x for normal numbers > 0, in two parts, the first of 12 bits: k + 2/ln 2·artanh s with 1 + m in [√½, √2) and s = m/(2 + m)
fn log2_(x: f32) -> vec2f {
  let power = (bitcast<i32>(x) - 0x3f3504f3) & -0x800000;
  let k = f32(power) * exp2(-23.0);
  let m = bitcast<f32>(bitcast<i32>(x) - power) - 1.0;
  let s = cut_(m / (2.0 + m));
  let s_rest = (((m - 2.0 * s) - s * cut_(m)) - s * (m - cut_(m))) / (2.0 + m);
  let first = s * 2.884765625;
  let sum = cut_(k + first);
  let all = s + s_rest;
  let z = all * all;
  return vec2f(sum, (first - (sum - k)) + (s * 6.244567779268e-4 + s_rest * 2.88539 + all * z * ${
  horner("z", [3, 5, 7, 9, 11].map((n) => 2 / Math.LN2 / n))
}));
}

fn power_of_two_(k: i32) -> f32 { return bitcast<f32>((k + 127) << 23u); } // by bits: compilers would make one exp2(a + b) of exp2(a)·exp2(b)

// x to the power y as in C: a negative base takes integer exponents only
fn pow_(x: f32, y: f32) -> f32 {
  if (y == 0.0 || x == 1.0 || (x == -1.0 && abs(y) > 3.4e38)) { return 1.0; }
  let a = abs(x);
  let odd = abs(y) < 16777216.0 && floor(y) == y && (i32(y) & 1) == 1;
  var magnitude = 0.0;
  if (a > 0.0 && a <= 3.4028234e38 && abs(y) < 1e30) {
    let small = a < 1.17549435e-38;
    let l = log2_(select(a, a * 8388608.0, small)) - vec2f(select(0.0, 23.0, small), 0.0);
    let p = cut_(y) * l.x;
    let rest = (y - cut_(y)) * l.x + y * l.y;
    let whole = round(clamp(p + rest, -250.0, 250.0));
    let part = bitcast<f32>(bitcast<u32>(p - whole) & 0xfffffffeu) + rest; // through bits, so that compilers do not reorder it
    let power = 1.0 + expm1_series_(clamp(part, -1.0, 1.0) * ${Math.LN2});
    let half = i32(whole) >> 1u; // in two steps, as 2¹²⁸ is too large and 2⁻¹⁴⁹ too small for one
    magnitude = power * power_of_two_(half) * power_of_two_(i32(whole) - half);
  } else { magnitude = exp_(y * log_(a)); } // for 0, infinity and NaN
  let signed = select(magnitude, -magnitude, odd && (bitcast<u32>(x) >> 31u) == 1u); // −0 has a sign too
  return select(signed, nan_(), x < 0.0 && x >= -3.4028234e38 && floor(y) != y);
}
`;

/** The functions for `vec4f`. */
export const MATH4: string = functions(vec4);

/** An activation that a matrix product may end with: its value and its slope in WGSL, functions of `a`. */
export const ACTIVATIONS = {
  relu: { value: "max_(a, 0.0)", slope: "select(1.0, 0.0, a <= 0.0)" },
  // x·Φ(x); Φ'(x) = exp(−x²/2)/√(2π)
  gelu: {
    value: "a * normal_below_(a, exp(-0.5 * a * a))",
    slope: "normal_below_(a, exp(-0.5 * a * a)) + a * 0.39894228040 * exp(-0.5 * a * a)",
  },
} as const;

/** The name of one. */
export type Activation = keyof typeof ACTIVATIONS;
