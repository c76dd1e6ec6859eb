import { checkBoolean, checkOptions, describe, isRecord } from "../kernels/check.ts";
import { isFloat } from "../autograd/storage.ts";
import { chosen, noGrad } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { mapped } from "../ops/mapped.ts";
import { assign } from "../ops/shape.ts";

/** PyTorch's name for a property. Initial capitals, as in `A_log` and `W_q`, are kept. */
const snake = (name: string) => name.replace(/(?<=[a-z0-9][A-Z]*)[A-Z]/g, (c) => `_${c.toLowerCase()}`);

/**
 * The base class of everything with parameters and a `forward`. A float tensor in a property is a parameter, an integer tensor a buffer, which is only saved; a
 * module in a property is a child. The same holds for tensors and modules in an array or a plain object in a property. Those elsewhere (deeper, in a Map, in a
 * private field such as `#mask`) are neither: nothing trains, saves or frees them, and `eval()` does not reach them. State names are PyTorch's:
 * `outProj.weight` is saved as `out_proj.weight`, `A_log` unchanged, `blocks[0].bias` as `blocks.0.bias`, `heads.A.bias` as it is.
 *
 * `w.requiresGrad = false` freezes a parameter, `model.parameters().forEach((w) => w.requiresGrad = false)` a model. `training` is what `train()` and `eval()`
 * have set.
 *
 * Parameters belong to the module, not to a scope: `dispose()` frees them. The layers of this package take care of that. Your own tensors need `keep()` if a
 * tape or a scope (`noGrad` opens one) may be open when the module is made: `scale = ones([1], { requiresGrad: true }).keep()`. So does a tensor that
 * `forward` stores: the model around it frees everything but its result. If two parameters have the same state name, methods that use names throw a
 * RangeError.
 *
 * @example
 * ```ts
 * import { init, nn, randn, Tensor } from "@limbeck/limbeck";
 *
 * class Classifier extends nn.Module {
 *   hidden = new nn.Linear(4, 8);
 *   head = new nn.Linear(8, 3);
 *   override forward(x: Tensor): Tensor {
 *     return this.head.forward(this.hidden.forward(x).relu());
 *   }
 * }
 *
 * await init();
 * const model = new Classifier();
 * console.log(model.forward(randn([2, 4])).shape); // [2, 3]
 * console.log(model.namedParameters().map(([name]) => name)); // hidden.weight, hidden.bias, head.weight, head.bias
 * ```
 */
export abstract class Module {
  #training = true;
  #switching = false;

  /** Whether dropout and the like are active: set by `train()` and `eval()`. While a checkpoint recomputes its function, what it was in the forward pass. */
  get training(): boolean {
    return chosen(this.#training);
  }

  set training(on: boolean) {
    this.#training = on;
  }

  /** The module's function. */
  abstract forward(x: Tensor): Tensor;

  /** What this module's properties hold, also in arrays and plain objects, by name. */
  #held(): [string, unknown][] {
    return Object.entries(this).flatMap(([key, value]): [string, unknown][] => {
      const name = snake(key);
      if (!Array.isArray(value) && !isRecord(value)) return [[name, value]];
      return Object.entries(value).map(([inner, x]) => [`${name}.${inner}`, x]);
    });
  }

  /** The modules in this module's properties, by name. */
  children(): [string, Module][] {
    return this.#held().filter((entry): entry is [string, Module] => entry[1] instanceof Module);
  }

  /** Every parameter with its name; the module's own come before those of children. A shared one is listed once, under its first name. */
  namedParameters(): [string, Tensor][] {
    return this.#once().filter(([, x]) => isFloat(x.dtype));
  }

  /** Every parameter and buffer under its first name. */
  #once(): [string, Tensor][] {
    const names = new Map<Tensor, string>();
    for (const [name, x] of this.#named()) if (!names.has(x)) names.set(x, name);
    return Array.from(names, ([x, name]) => [name, x]);
  }

  /** Every parameter and buffer under each of its names. */
  #named(): Map<string, Tensor> {
    const found = new Map<string, Tensor>(), around = new Set<Module>();
    const walk = (module: Module, prefix: string) => {
      if (around.has(module)) return; // a child that refers back to its parent
      around.add(module);
      for (const [key, value] of module.#held()) {
        if (!(value instanceof Tensor)) continue;
        const name = prefix + key;
        if ((found.get(name) ?? value) !== value) {
          throw new RangeError(`${this.constructor.name}: two parameters have the state name ${name}; rename one`);
        }
        found.set(name, value);
      }
      for (const [name, child] of module.children()) walk(child, `${prefix}${name}.`);
      around.delete(module);
    };
    walk(this, "");
    return found;
  }

  /** Every parameter once, for an optimizer. */
  parameters(): Tensor[] {
    return this.namedParameters().map(([, tensor]) => tensor);
  }

  /** Switches dropout and the like on (or off). Returns the module. */
  train(on = true): this {
    checkBoolean("train", "on", on);
    if (this.#switching) return this; // a child refers back to its parent
    this.#switching = true;
    try {
      this.training = on;
      for (const [, child] of this.children()) child.train(on);
    } finally {
      this.#switching = false;
    }
    return this;
  }

  /** Switches dropout and the like off. Returns the module. */
  eval(): this {
    return this.train(false);
  }

  /** The parameters and buffers by name: the live tensors, not copies. A shared one is listed under each of its names. */
  stateDict(): Record<string, Tensor> {
    return Object.fromEntries(this.#named());
  }

  /**
   * Copies tensors into the parameters and buffers of the same names; floats are converted to the dtype of the parameter. A shared one may be given under any
   * of its names; the last one counts. Throws a RangeError that names what is missing or unexpected (unless `strict` is false, which returns these names), and a
   * TypeError for a wrong shape or dtype; then nothing has been copied.
   */
  loadStateDict(
    state: Record<string, Tensor>,
    options: { strict?: boolean } = {},
  ): { missing: string[]; unexpected: string[] } {
    checkOptions("loadStateDict", options, ["strict"]);
    const { strict = true } = options;
    checkBoolean("loadStateDict", "strict", strict);
    if (!isRecord(state)) {
      throw new TypeError(`loadStateDict: state must be an object of tensors, got ${describe(state)}`);
    }
    const own = this.#named(), pairs = [...own].filter(([name]) => Object.hasOwn(state, name));
    const given = new Set(pairs.map(([, x]) => x));
    const missing = this.#once().filter(([, x]) => !given.has(x)).map(([name]) => name);
    const unexpected = Object.keys(state).filter((name) => !own.has(name));
    if (strict && missing.length + unexpected.length > 0) {
      throw new RangeError(
        `loadStateDict: missing ${missing.join(", ") || "nothing"}; unexpected ${unexpected.join(", ") || "nothing"}`,
      );
    }
    for (const [name, x] of pairs) {
      checkTensor("loadStateDict", `the module's ${name}`, x, [x.dtype]); // it may have been disposed of
      checkTensor("loadStateDict", name, state[name], isFloat(x.dtype) ? undefined : [x.dtype], x.shape);
    }
    noGrad(() => {
      for (const [name, x] of pairs) {
        const from = state[name];
        assign(x, from.dtype === x.dtype ? from : mapped("loadStateDict", "a", [from], x.shape, [], x.dtype));
      }
    });
    return { missing, unexpected };
  }

  /** Frees the parameters, their gradients and the buffers. */
  dispose(): void {
    for (const x of this.#named().values()) x.dispose();
  }
}
