/** Convolution and pooling of images. */
import { checkNumber, checkOptions } from "../kernels/check.ts";
import {
  conv2d as forward,
  conv2dBackwardInput,
  conv2dBackwardWeight,
  maxPool2d as pool,
  maxPool2dBackward,
} from "../kernels/conv.ts";
import { composed } from "../autograd/composed.ts";
import { hidden, record } from "../autograd/tape.ts";
import { checkTensor, Tensor } from "../autograd/tensor.ts";
import { sum } from "./reduce.ts";

/** Options of `conv2d`. */
export interface ConvOptions {
  /** Pixels from one window to the next; 1 by default. */
  stride?: number;
  /** Zeros around the image; 0 by default. */
  padding?: number;
}

function imageSizes(op: string, x: Tensor): { images: number; channels: number; height: number; width: number } {
  checkTensor(op, "x", x);
  if (x.rank !== 4) {
    throw new TypeError(`${op}: x must have shape [images, channels, height, width], got [${x.shape.join(", ")}]`);
  }
  const [images, channels, height, width] = x.shape;
  return { images, channels, height, width };
}

/**
 * The correlation of images x [N, C, H, W] with weight [O, C, h, w], plus bias [O] → [N, O, H', W'] with H' = ⌊(H + 2·padding − h)/stride⌋ + 1. `bias` may be
 * null: y[n, o, i, j] = bias[o] + Σ x[n, c, stride·i + a − padding, stride·j + b − padding]·weight[o, c, a, b] over c, a, b.
 *
 * Gradients: dX and dWeight are the sums of dY·weight and dY·x over the products that x and weight were part of, dBias = Σ dY over n, i, j. Throws a
 * TypeError for wrong shapes, a RangeError if the window is larger than the padded image. Source: `torch.nn.functional.conv2d` (without dilation and
 * groups).
 *
 * @example
 * ```ts
 * import { conv2d, init, randn } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(conv2d(randn([2, 1, 28, 28]), randn([8, 1, 3, 3]), null, { padding: 1 }).shape); // [2, 8, 28, 28]
 * ```
 */
export function conv2d(x: Tensor, weight: Tensor, bias?: Tensor | null, options: ConvOptions = {}): Tensor {
  checkOptions("conv2d", options, ["stride", "padding"]);
  const { stride = 1, padding = 0 } = options;
  checkNumber("conv2d", "stride", stride, { integer: true, min: 1 });
  checkNumber("conv2d", "padding", padding, { integer: true, min: 0 });
  const image = imageSizes("conv2d", x), { images, channels, height, width } = image;
  checkTensor("conv2d", "weight", weight, [x.dtype]);
  if (weight.rank !== 4) {
    throw new TypeError(
      `conv2d: weight must have shape [outs, ${channels}, height, width], got [${weight.shape.join(", ")}]`,
    );
  }
  const [outs, ins, kernelHeight, kernelWidth] = weight.shape;
  if (channels !== ins) { // a layer's weight is seldom what is wrong
    throw new TypeError(
      `conv2d: x must have shape [images, ${ins}, height, width] for a weight of shape [${
        weight.shape.join(", ")
      }], got [${x.shape.join(", ")}]`,
    );
  }
  if (bias !== undefined && bias !== null) checkTensor("conv2d", "bias", bias, [x.dtype], [outs]);
  const out = (size: number, kernel: number) => Math.floor((size + 2 * padding - kernel) / stride) + 1;
  const outHeight = out(height, kernelHeight), outWidth = out(width, kernelWidth);
  if (outHeight < 1 || outWidth < 1 || kernelHeight < 1 || kernelWidth < 1) {
    throw new RangeError(
      `conv2d: weight must fit the padded image, got shape [${weight.shape.join(", ")}] for x of shape [${
        x.shape.join(", ")
      }] and padding ${padding}`,
    );
  }
  const sizes = { ...image, outs, outHeight, outWidth, kernelHeight, kernelWidth, stride, padding };
  return composed("conv2d", () => {
    const y = Tensor.empty([images, outs, outHeight, outWidth], x.dtype, "conv2d");
    forward(x.dtype, x.memory, weight.memory, bias?.memory ?? null, y.memory, sizes);
    return record({
      op: "conv2d",
      inputs: bias ? [x, weight, bias] : [x, weight],
      output: y,
      saved: [...weight.requiresGrad ? [x] : [], ...x.requiresGrad ? [weight] : []],
      backward: (dY, wants, gradientOf) => {
        const dX = wants[0] ? gradientOf(0) : null, dWeight = wants[1] ? gradientOf(1) : null;
        if (dX) conv2dBackwardInput(x.dtype, weight.memory, dY.memory, dX.memory, sizes);
        if (dWeight) conv2dBackwardWeight(x.dtype, x.memory, dY.memory, dWeight.memory, sizes);
        return [dX, dWeight, wants[2] ? sum(dY, { dim: [0, 2, 3] }) : null];
      },
    });
  });
}

/**
 * The largest element of each window of `kernel`×`kernel` pixels, `stride` apart (the kernel's size by default): [N, C, H, W] → [N, C, H', W'] with H' =
 * ⌊(H − kernel)/stride⌋ + 1.
 *
 * Gradient: dX = Σ dY over the windows whose largest element it is, the first one if several are equal. Throws a TypeError unless x has four dimensions, a
 * RangeError if the window is larger than the image. Source: `torch.nn.functional.max_pool2d`.
 *
 * @example
 * ```ts
 * import { init, maxPool2d, tensor } from "@limbeck/limbeck";
 *
 * await init();
 * console.log(await maxPool2d(tensor([[[[1, 2], [3, 4]]]]), { kernel: 2 }).array()); // [[[[4]]]]
 * ```
 */
export function maxPool2d(x: Tensor, options: { kernel: number; stride?: number }): Tensor {
  checkOptions("maxPool2d", options, ["kernel", "stride"]);
  const { kernel, stride = kernel } = options;
  checkNumber("maxPool2d", "kernel", kernel, { integer: true, min: 1 });
  checkNumber("maxPool2d", "stride", stride, { integer: true, min: 1 });
  const image = imageSizes("maxPool2d", x), { images, channels, height, width } = image;
  if (kernel > height || kernel > width) {
    throw new RangeError(`maxPool2d: kernel must fit the image, got ${kernel} for shape [${x.shape.join(", ")}]`);
  }
  const outHeight = Math.floor((height - kernel) / stride) + 1, outWidth = Math.floor((width - kernel) / stride) + 1;
  const sizes = {
    ...image,
    outs: channels,
    outHeight,
    outWidth,
    kernelHeight: kernel,
    kernelWidth: kernel,
    stride,
    padding: 0,
  };
  return composed("maxPool2d", () => {
    const y = Tensor.empty([images, channels, outHeight, outWidth], x.dtype, "maxPool2d"),
      chosen = hidden(y.shape, "u32");
    pool(x.dtype, x.memory, y.memory, chosen.memory, sizes);
    return record({
      op: "maxPool2d",
      inputs: [x],
      output: y,
      hidden: [chosen],
      backward: (dY, _, gradientOf) => {
        const dX = gradientOf(0);
        maxPool2dBackward(x.dtype, chosen.memory, dY.memory, dX.memory, sizes);
        return [dX];
      },
    });
  });
}
