import { atEnd, type Gpu, openGpu } from "../kernels/gpu/gpu.ts";

/** Something that a scope owns and closes. */
export interface Owned {
  owner: object | null;
  closeWith(reason: string): void;
}

/** The open scopes, innermost last. */
const open: Scope[] = [];

/** The innermost open scope. */
export function innermost(): Scope | null {
  return open.at(-1) ?? null;
}

/**
 * Owns the tensors that are made while it is open, and frees them when it closes. Results that an open tape records belong to the tape instead.
 * `tensor.keep()` takes a tensor out.
 *
 * Closing a scope also closes those opened after it, and never throws: two functions that await with scopes open may close each other's. When a device ends,
 * the scopes that were opened on it close.
 *
 * @example
 * ```ts
 * import { init, Scope, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * let sum;
 * {
 *   using _scope = new Scope();
 *   const x = tensor([1, 2, 3]);
 *   sum = x.square().sum().keep(); // x and x² go back to the pool here
 * }
 * console.log(await sum.item()); // 14
 * sum.dispose();
 * ```
 */
export class Scope implements Disposable {
  /** Its name in messages. */
  readonly kind: string = "scope";
  #owned: Owned[] = [];
  #most = 1024;
  #closed = false;
  /** Whether an older scope closes it. */
  #isInner = false;
  /** Its device, with which it closes: otherwise it would own tensors of the next device, and closing it would close scopes that were opened there. */
  readonly #gpu: Gpu | null = openGpu();

  static {
    atEnd.push((ended) => {
      open.sort((a, b) => Number(a.#gpu === ended) - Number(b.#gpu === ended)); // those that stay come first, since closing a scope closes all after it
      open.find((scope) => scope.#gpu === ended)?.close();
    });
  }

  constructor() {
    open.push(this);
  }

  /** Whether the scope is closed. */
  get closed(): boolean {
    return this.#closed;
  }

  /**
   * Makes the scope the owner.
   * @internal
   */
  adopt(owned: Owned): void {
    owned.owner = this;
    if (this.#owned.push(owned) <= this.#most) return;
    this.#owned = this.#owned.filter(({ owner }) => owner === this); // otherwise tensors that were disposed of early would stay in JavaScript's memory
    this.#most = Math.max(1024, 2 * this.#owned.length);
  }

  /** Closes the scope and all opened after it. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    for (let inner = open.at(-1)!; inner !== this; inner = open.at(-1)!) {
      inner.#isInner = true;
      inner[Symbol.dispose]();
    }
    open.pop();
    this.#closed = true;
    const reason = this.#isInner ? `${this.kind}, which an older scope closed` : this.kind;
    // the last one first: the pool can take it back without moving others
    for (const owned of this.#owned.reverse()) if (owned.owner === this) owned.closeWith(reason);
    this.#owned = [];
  }

  /** The same as leaving the block of `using`. */
  close(): void {
    this[Symbol.dispose]();
  }
}
