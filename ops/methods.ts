/** Fills the table of functions that Tensor's methods call, so that they reach `ops/`, from which `autograd/` must not import. */
import { methods } from "../autograd/methods.ts";
import * as elementwise from "./elementwise.ts";
import { gather } from "./indexing.ts";
import { matmul } from "./matmul.ts";
import { argmax, logSumExp, max, mean, min, sum, variance } from "./reduce.ts";
import { assign, expand, permute, reshape, slice, transpose, tril, triu } from "./shape.ts";
import { logSoftmax, softmax } from "./softmax.ts";

const { binary: _b, converted: _c, unary: _u, ...table } = elementwise;
Object.assign(methods, table, {
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
  permute,
  reshape,
  slice,
  softmax,
  sum,
  transpose,
  tril,
  triu,
  variance,
});
