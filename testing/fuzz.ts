/** Valid and invalid arguments of public functions, from which testing/fuzz_table.ts and testing/fuzz_objects.ts are built. */
import type { GeneratorValue } from "fast-check";
import fc from "fast-check";
import { type DType, Scope, Tensor, tensor, type TypedArray } from "@limbeck/limbeck";
import { ARRAYS, isFloat, type Storage } from "../autograd/storage.ts";
import { sizeOf } from "./reference.ts";

/** A value that must be refused in the place of a good one, made when it is needed. The message must contain `says`. */
export interface Bad {
  make: () => unknown;
  says?: string;
}

/** One argument of a call. If it may be the object of a method, `tensors` are the bad values that have methods. */
export interface Argument {
  good: unknown;
  bad: Bad[];
  tensors?: Bad[];
}

/** Values that must be refused as they are. */
export const are = (...values: unknown[]): Bad[] => values.map((value) => ({ make: () => value }));

const KINDS: Record<string, unknown> = {
  null: null,
  number: 3,
  string: "sum",
  boolean: true,
  bigint: 5n,
  symbol: Symbol("s"),
  object: {},
  date: new Date(0),
  bytes: new Uint8Array(4),
  array: [],
  strings: ["a"],
  nested: [[1], [2]],
  function: () => 5,
  endless: [], // contains itself
  nameless: { constructor: { name: Symbol("s") } }, // whose class has no name that a message could give
};
(KINDS.endless as unknown[]).push(KINDS.endless);

/** A value of every kind except these. */
export const not = (...kinds: string[]): Bad[] =>
  are(...Object.entries(KINDS).filter(([kind]) => !kinds.includes(kind)).map(([, v]) => v));

/** A value of every kind except these, and these values. */
export const wrong = (kinds: string[], ...values: unknown[]): Bad[] => [...not(...kinds), ...are(...values)];

/** The same in a list. */
export const listed = ({ make }: Bad): Bad => ({ make: () => [make()] });

/** An optional argument with no bad value. */
export const absent: Argument = { good: undefined, bad: [] };

/** Draws the arguments of one call. */
export class Draw {
  #after: (() => void)[] = [];
  /** Whether tensors require a gradient: all of a call or none, which saves half of the compiling. */
  #grad: boolean;

  constructor(readonly value: GeneratorValue, readonly foreign: Storage) {
    this.#grad = this.chance();
  }

  /** An integer, both ends included. */
  int(low: number, high: number): number {
    return this.value(fc.integer, { min: low, max: high });
  }

  pick<const T>(...list: T[]): T {
    return list[this.int(0, list.length - 1)];
  }

  chance(): boolean {
    return this.int(0, 1) === 1;
  }

  /** Sizes; one of them may be 0. */
  shape(least: number, most: number, empty = true): number[] {
    const shape: number[] = Array.from({ length: this.int(least, most) }, () => this.pick(1, 2, 3, 5));
    if (empty && shape.length > 0 && this.int(0, 9) === 0) shape[0] = 0;
    return shape;
  }

  /** A shape that broadcasts to the given one. */
  narrower(shape: number[]): number[] {
    return shape.slice(this.int(0, shape.length)).map((n) => this.chance() ? 1 : n);
  }

  /** Calls `fn` after the call. */
  after(fn: () => void): void {
    this.#after.push(fn);
  }

  /** An object that is disposed of after the call. */
  own<T extends { dispose(): void }>(object: T): T {
    this.after(() => object.dispose());
    return object;
  }

  end(): void {
    for (const fn of this.#after.splice(0).reverse()) fn();
  }

  /** A tensor; integers are in [0, below). */
  tensor(shape: readonly number[], dtype: DType = "f32", below = 3, requiresGrad = false): Tensor {
    const whole = !isFloat(dtype), from = this.int(0, 9);
    const values = Array.from({ length: sizeOf(shape) }, (_, i) => whole ? (from + i) % below : 0.1 + (from + i) % 7);
    return tensor(ARRAYS[dtype].from(values) as TypedArray, shape, { requiresGrad });
  }

  /** Tensors that can no longer be used: disposed of, closed with a scope, or on a device that was disposed of. */
  gone(shape: readonly number[], dtype: DType = "f32"): Bad[] {
    return [
      () => {
        const x = this.tensor(shape, dtype);
        x.dispose();
        return x;
      },
      () => {
        using _scope = new Scope();
        return this.tensor(shape, dtype);
      },
      () => new Tensor(this.foreign.retain(), shape, dtype, "fuzz"),
    ].map((make) => ({ make }));
  }

  /** A tensor argument. `exact`: any other shape is invalid. `wrong`: invalid dtypes. `or`: other kinds of values that are valid. */
  x(
    shape: readonly number[],
    o: {
      dtype?: DType;
      below?: number;
      exact?: boolean;
      wrong?: DType[];
      shapes?: number[][];
      grad?: boolean;
      optional?: boolean;
      or?: string[];
    } = {},
  ): Argument {
    const { dtype = "f32", exact = false, wrong = dtype === "f32" ? ["i32", "u32"] : ["f32"], shapes = [], or = [] } =
      o;
    const misfits = exact ? [[...shape, 2], [2, ...shape], shape.length ? [shape[0] + 1, ...shape.slice(1)] : [7]] : [];
    const tensors = [
      ...this.gone(shape, dtype),
      ...wrong.map((other) => ({ make: () => this.tensor(shape, other) })),
      ...[...misfits, ...shapes].map((other) => ({ make: () => this.tensor(other, dtype) })),
    ];
    const grad = (o.grad ?? true) && dtype === "f32" && this.#grad;
    return {
      good: this.tensor(shape, dtype, o.below, grad),
      bad: [...o.optional ? [] : are(undefined), ...not(...or), ...tensors],
      tensors,
    };
  }

  /** Integers in [0, below) on the device; others are invalid. */
  labels(shape: number[], below: number, o: { exact?: boolean; optional?: boolean } = {}): Argument {
    const x = this.x(shape, { dtype: this.pick("i32", "u32"), below, ...o });
    const outside = [below, -1, 2 ** 31 - 1].map((k) => ({
      make: () => tensor(new Int32Array(sizeOf(shape)).fill(k), shape),
    }));
    return sizeOf(shape) === 0 ? x : { ...x, bad: [...x.bad, ...outside] };
  }

  /** One of these numbers; `outside`, and anything but a finite number, is invalid. */
  number(good: (number | undefined)[], outside: unknown[] = [], required = false): Argument {
    const bad = [...not("number"), ...are(NaN, Infinity, -Infinity, ...outside), ...required ? are(undefined) : []];
    return { good: this.pick(...good), bad };
  }

  /** The same for integers. */
  integer(good: (number | undefined)[], outside: unknown[] = [], required = false): Argument {
    return this.number(good, [0.5, -1.5, ...outside], required);
  }

  flag(): Argument {
    return { good: this.chance(), bad: not("boolean") };
  }

  oneOf(...good: string[]): Argument {
    return {
      good: this.pick(...good),
      bad: [...not("string"), ...are("", "nonsense", "__proto__"), { make: () => `${good[0]}z`, says: good[0] }],
    };
  }

  /** Options: any may be left out except those in `always`. A misspelt one is invalid, and the message names the right one. */
  options(options: Record<string, Argument>, ...always: string[]): Argument {
    const given = Object.entries(options).filter(([k, o]) =>
      always.includes(k) || o.good !== undefined && this.chance()
    );
    const good = Object.fromEntries(given.map(([k, o]) => [k, o.good]));
    const bad = [
      ...not("object"),
      ...are({ ...good, zzz: 1 }, { ...good, constructor_: 1 }),
      ...Object.entries(options).flatMap(([k, o]): Bad[] => [
        ...o.bad.map(({ make, says }) => ({ make: () => ({ ...good, [k]: make() }), says })),
        { make: () => ({ ...good, [`${k}s`]: o.good }), says: `did you mean ${k}?` },
      ]),
    ];
    return { good: given.length === 0 && always.length === 0 && this.chance() ? undefined : good, bad };
  }

  /** A shape argument. */
  sizes(good: readonly number[]): Argument {
    const wrong = [NaN, -2, 0.5, Infinity, "2", null, 1e300, undefined, 2n, Symbol("s")].map((n) => [...good, n]);
    const huge = [new Array(2), [2 ** 31], [2 ** 16, 2 ** 16], [2 ** 53, 2 ** 53], [1e9, 0.1], [2 ** 15, 2 ** 15]]; // the last: 4 GiB
    return { good, bad: [...not("array"), ...are(undefined, ...wrong, ...huge)] };
  }

  /** A dimension of a tensor of this rank. */
  dim(rank: number, o: { required?: boolean; several?: boolean } = {}): Argument {
    const { required = false, several = false } = o, most = Math.max(1, rank), one = this.int(-most, most - 1);
    const lists = several ? [[one], Array.from({ length: rank }, (_, i) => i)] : [];
    return {
      good: this.pick<unknown>(one, ...lists, ...required ? [] : [undefined]),
      bad: [
        ...this.integer([0], [most, -most - 1], required).bad.filter(({ make }) => !several || make() !== KINDS.array),
        ...are([0, 0], [most], [NaN], ["0"]),
      ],
    };
  }

  /** A function argument. */
  fn(good: unknown): Argument {
    return { good, bad: [...are(undefined), ...not("function")] };
  }
}
