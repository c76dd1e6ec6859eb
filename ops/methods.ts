/** Gives Tensor the methods that are ops: x.add(y) is add(x, y). They are defined here because `autograd/` must not import from `ops/`. */
import { defineMethod, type Tensor } from "../autograd/tensor.ts";
import type { Operand } from "../autograd/options.ts";
import * as elementwise from "./elementwise.ts";
import { gather, oneHot } from "./indexing.ts";
import { matmul } from "./matmul.ts";
import { argmax, logSumExp, max, mean, min, sum, variance } from "./reduce.ts";
import { assign, expand, permute, reshape, slice, transpose, tril, triu } from "./shape.ts";
import { logSoftmax, softmax } from "./softmax.ts";

const { binary: _b, converted: _c, unary: _u, where, ...ops } = elementwise;
const methods = {
  ...ops,
  argmax,
  assign,
  expand,
  gather,
  logSoftmax,
  logSumExp,
  matmul,
  max,
  mean,
  min,
  oneHot,
  permute,
  reshape,
  slice,
  softmax,
  sum,
  transpose,
  tril,
  triu,
  variance,
  where: (x: Tensor, condition: Tensor, other: Operand) => where(condition, x, other),
};
for (const [name, op] of Object.entries(methods)) defineMethod(name as keyof typeof methods, op);
