/** Argument checks that all layers share. Their errors name the op, the argument, what was expected and what was given. */

/** A value in words short enough for an error message. Arrays are shown to a depth of two, since they may contain themselves. */
export function describe(value: unknown, depth = 0): string {
  if (typeof value === "string") return JSON.stringify(value.length > 60 ? value.slice(0, 57) + "..." : value);
  if (Array.isArray(value)) {
    return value.length > 8 || depth === 2
      ? `an array of ${value.length}`
      : `[${value.map((x) => describe(x, depth + 1)).join(", ")}]`;
  }
  const nameOf = (x: unknown) => (x as { name?: unknown } | null | undefined)?.name; // of any type
  if (typeof value === "function") return `the function ${String(nameOf(value) || "(anonymous)")}`;
  if (typeof value === "object" && value !== null) {
    const name = nameOf(value.constructor),
      size = ArrayBuffer.isView(value) && "length" in value ? ` of ${value.length}` : "";
    return typeof name === "string"
      ? `${/^[AEIO]/.test(name) ? "an" : "a"} ${name}${size}`
      : "an object without a class";
  }
  return typeof value === "bigint" ? `${value}n` : String(value);
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}

/** Suggests the name in `known` that was most likely meant; empty if not even a third of the letters agree. */
function suggestion(name: string, known: readonly string[]): string {
  const distance = (k: string) => editDistance(name.toLowerCase(), k.toLowerCase()) / Math.max(name.length, k.length);
  const best = known.reduce((best, k) => distance(k) < distance(best) ? k : best);
  return distance(best) < 2 / 3 ? `; did you mean ${best}?` : "";
}

/** Whether a value is a plain object: `{ … }`, also from another realm. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === null || Object.getPrototypeOf(prototype) === null;
}

/** Throws a TypeError unless `value` is a function. */
export function checkFunction(op: string, name: string, value: unknown): void {
  if (typeof value !== "function") throw new TypeError(`${op}: ${name} must be a function, got ${describe(value)}`);
}

/** Throws a TypeError if `options` is not a plain object or has a key that is not in `known`. */
export function checkOptions(op: string, options: unknown, known: readonly string[]): void {
  if (!isRecord(options)) {
    throw new TypeError(`${op}: options must be an object, got ${describe(options)}`);
  }
  for (const key in options) {
    if (known.includes(key)) continue;
    const hint = known.length ? `${suggestion(key, known)} (known: ${known.join(", ")})` : "; it takes none";
    throw new TypeError(`${op}: unknown option ${describe(key)}${hint}`);
  }
}

/** Bounds of a number: inclusive `min` and `max`, exclusive `above` and `below`. */
export interface Range {
  min?: number;
  max?: number;
  above?: number;
  below?: number;
  integer?: boolean;
  /** Whether it may be infinite. */
  infinite?: boolean;
}

/** Throws unless `value` is a number inside `range`, and finite unless that says otherwise: a TypeError if it is not a number, else a RangeError. */
export function checkNumber(op: string, name: string, value: unknown, range: Range = {}): void {
  const { min, max, above, below, integer, infinite } = range;
  if (typeof value !== "number") throw new TypeError(`${op}: ${name} must be a number, got ${describe(value)}`);
  const held = infinite ? !Number.isNaN(value) : Number.isFinite(value);
  const inside = held && (min === undefined || value >= min) && (max === undefined || value <= max) &&
    (above === undefined || value > above) && (below === undefined || value < below) &&
    (!integer || Number.isInteger(value));
  if (inside) return;
  const wanted = [
    integer ? "an integer" : infinite ? "a number" : "a finite number",
    min !== undefined ? `at least ${min}` : "",
    above !== undefined ? `above ${above}` : "",
    max !== undefined ? `at most ${max}` : "",
    below !== undefined ? `below ${below}` : "",
  ].filter(Boolean).join(", ");
  throw new RangeError(`${op}: ${name} must be ${wanted}, got ${value}`);
}

/** Throws unless `value` is true or false. */
export function checkBoolean(op: string, name: string, value: unknown): void {
  if (typeof value !== "boolean") throw new TypeError(`${op}: ${name} must be true or false, got ${describe(value)}`);
}

/** Throws unless `value` is one of `known`: a TypeError if it is not a string, else a RangeError. */
export function checkOneOf(op: string, name: string, value: unknown, known: readonly string[]): void {
  if (known.includes(value as string)) return;
  const message = `${op}: ${name} must be one of ${known.join(", ")}, got ${describe(value)}`;
  throw typeof value === "string" ? new RangeError(message + suggestion(value, known)) : new TypeError(message);
}
