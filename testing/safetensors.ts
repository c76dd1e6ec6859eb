/** Reads the reference cases in testing/testdata: safetensors files that carry a list of cases in their metadata. */

/** A tensor of a file. */
export interface Values {
  shape: number[];
  data: Float32Array | Float64Array | Int32Array;
}

/** One reference case: the inputs, and the outputs in float64. */
export interface Case {
  id: string;
  op: string;
  // deno-lint-ignore no-explicit-any
  args: Record<string, any>;
  inputs: Record<string, Values>;
  outputs: Record<string, Values>;
}

/** A case in the metadata, in which tensors are named. */
interface Listed extends Omit<Case, "inputs" | "outputs"> {
  inputs: Record<string, string>;
  outputs: Record<string, string>;
}

const ARRAYS = { F32: Float32Array, F64: Float64Array, I32: Int32Array };

/** All cases of `testing/testdata/{family}.safetensors`. */
export function readCases(family: string): Case[] {
  const bytes = Deno.readFileSync(new URL(`./testdata/${family}.safetensors`, import.meta.url));
  const begin = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, begin)));
  const values = (key: string): Values => {
    const { dtype, shape, data_offsets: [from, to] } = header[key];
    // a copy, because the header's length leaves the data unaligned
    return { shape, data: new ARRAYS[dtype as keyof typeof ARRAYS](bytes.slice(begin + from, begin + to).buffer) };
  };
  const all = (names: Record<string, string>) =>
    Object.fromEntries(Object.entries(names).map(([name, key]) => [name, values(key)]));
  return (JSON.parse(header.__metadata__.cases) as Listed[])
    .map((c) => ({ ...c, inputs: all(c.inputs), outputs: all(c.outputs) }));
}
