import { innermost, Scope } from "./scope.ts";
import { tensorsIn } from "./tensor.ts";

/** Runs `fn` in a scope of its own and passes the tensors that it returns, also inside arrays and records, to the enclosing scope. `op` is for messages. */
export function scoped<T>(op: string, fn: () => T): T {
  const outer = innermost();
  using scope = new Scope();
  const result = fn();
  for (const x of tensorsIn(result)) {
    if (x.owner !== scope) continue;
    if (outer) outer.adopt(x);
    else x.leaveScope(op);
  }
  return result;
}

/**
 * Internal: for an op that makes more tensors than it returns. An open scope or tape frees them later. If none is open, this frees them at once, also those
 * made before `fn` throws.
 */
export function composed<T>(op: string, fn: () => T): T {
  return innermost() ? fn() : scoped(op, fn);
}
