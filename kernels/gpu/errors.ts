/**
 * Collects the errors that the device reports only after the call that caused them. `settle()` throws them, which is to say the
 * engine's next await does. If nobody collected them, a program could print wrong numbers and exit with code 0.
 */
export class DeviceErrors {
  #messages: string[] = [];
  /** Closed error scopes whose results have not arrived yet. */
  #pending = new Set<Promise<unknown>>();
  /** Whether the device was lost and no call has thrown that yet. */
  #unsaid = false;
  /** A further check that runs with every `settle`. */
  check: (() => Promise<void>) | null = null;
  /** Why the device was lost; null until then. */
  lost: string | null = null;

  constructor(readonly device: GPUDevice) {
    device.addEventListener("uncapturederror", this.#hear);
    device.lost.then((info) => {
      this.lost = `${info.reason || "unknown"}: ${info.message}`;
      this.#unsaid ||= info.reason !== "destroyed";
    });
    globalThis.addEventListener?.("unload", this.end);
  }

  readonly #hear = (event: Event): void => {
    event.preventDefault?.();
    this.#messages.push((event as GPUUncapturedErrorEvent).error.message);
  };

  /** Throws errors that no call has thrown: a program that ends without an await after the error must not seem to have succeeded. */
  readonly end = (): void => {
    if (this.#messages.length > 0 || this.#unsaid) this.raise();
  };

  /** Stops listening: nothing is thrown at the end of the program, and later reports of the device are for its owner. */
  forget(): void {
    globalThis.removeEventListener?.("unload", this.end);
    this.device.removeEventListener("uncapturederror", this.#hear);
  }

  /** Opens error scopes over what follows; `close` collects what they caught, under a label. */
  open(): void {
    for (const filter of ["internal", "out-of-memory", "validation"] as const) this.device.pushErrorScope(filter);
  }

  close(label: () => string): void {
    for (const filter of ["validation", "out-of-memory", "internal"] as const) {
      const told: Promise<unknown> = this.device.popErrorScope().then(
        (error) => error && this.#messages.push(`${filter} error in ${label()}: ${error.message}`),
        (reason) => this.lost ??= String(reason),
      ).finally(() => this.#pending.delete(told));
      this.#pending.add(told);
    }
  }

  /** Waits for the results of the scopes closed so far and throws the collected errors, once. */
  async settle(): Promise<void> {
    await Promise.all(this.#pending); // several calls may wait for the same
    this.raise();
    await this.check?.();
  }

  /** Gives the event loop a turn, in which the runtime delivers what the device has reported, such as its loss. */
  async news(): Promise<void> {
    await new Promise((resolve) => setTimeout(resolve));
  }

  /** Throws the errors collected so far, once. */
  raise(): void {
    const messages = [...new Set(this.#messages)].slice(0, 4).join("\n");
    this.#messages = [];
    if (this.lost !== null) {
      this.#unsaid = false;
      const before = messages && `; before that: ${messages}`;
      throw new Error(
        `GPU: the device was lost (${this.lost}); call init() again, all tensors on it are gone${before}`,
      );
    }
    if (messages) throw new Error(`GPU: ${messages}`);
  }
}
