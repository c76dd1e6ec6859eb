/**
 * The kernel of matrix products on ordinary cores. A workgroup computes a tile of C, a thread 4×4, 8×8 or 8×12 elements of it. In each iteration (16 or 32
 * steps of k) the workgroup copies a slab of A and one of B to workgroup memory, as vec4s along m and along n, the way threads read them. While these are
 * multiplied, the next slabs are fetched into registers.
 *
 * The copy moves blocks of 4×4 (of f16 as many bytes), which are transposed in registers if k is the contiguous direction. Neighbouring threads take blocks
 * that are neighbours in memory. With 128 bytes of each row at a time, 4096³ reaches 47 TFLOP/s in f32 on an H100, whatever is transposed; with 64 bytes of
 * twice as many rows it reached 41.
 *
 * For products with few tiles the slices of a workgroup share a tile: each takes every slices-th slab, and their sums are added in a fixed order. All threads
 * copy the slabs of all slices, so that with several slices, too, they read 128 bytes of a row at a time.
 */
import { type Element, lanes, numbers, vec4f, vectorOf } from "./elementwise.ts";
import { epilogueCode, type EpilogueShape, findTile, type Mode, type Operands, PARAMS } from "./epilogue.ts";
import { type BufferType, type Kernel, variants } from "./gpu/kernel.ts";
import { slabRows, slabsAhead, threadsOf, type Tile, TILES, turnOf } from "./tiles.ts";

/**
 * A WGSL function that fetches a block: 4 steps of k by 4 of the other direction (m or n), with a column of the result for each k.
 *
 * - `mode`: "k" reads vec4s along k, "x" vec4s along the other direction, "s" single elements with any strides.
 * - `places_NAME` returns where the rows of the block begin (with "x" the block itself). That does not depend on k.
 * - `tail`: the slab may extend beyond the product's depth.
 * - `halves`: f16 is read as u32, two at a time, because the compiler would unpack f16 right after the fetch, and so wait for it. A block has as many bytes as
 *   one of f32, and so 8 elements along the direction that is read. With "x" it has two k of one slab and two of the next, `slab` steps further, so that every
 *   thread keeps half of its block in each slab (512×2048×128 takes an H100 25 µs; with half of the threads keeping whole blocks it took 31).
 */
function fetcher(name: "a" | "b", mode: Mode, size: string, tail: boolean, halves: boolean, slab: number): string {
  const from = `(params.${name}_offset + batch * params.${name}_batch)`, last = `params.${size} - 1u`;
  const w = halves ? 8 : 4, vector = halves ? "vec4u" : "vec4f", block = halves ? "array<vec4u, 4>" : "mat4x4f";
  const places = {
    k: `(${from} + min(x + vec4u(0u, 1u, 2u, 3u), vec4u(${last})) * params.${name}_across) / ${w}u`,
    x: `vec4u((${from} + min(x, params.${size} - ${w}u)) / ${w}u)`,
    s: `${from} + min(x + vec4u(0u, 1u, 2u, 3u), vec4u(${last})) * params.${name}_across`,
  }[mode];
  const step = (j: number) => halves && mode === "x" ? j % 2 + (j < 2 ? 0 : slab) : j;
  const inside = (j: number, x: string) => tail ? `select(${vector}(), ${x}, k + ${step(j)}u < depth)` : x;
  const at = (j: number) => tail ? `min(k + ${step(j)}u, depth - 1u)` : `(k + ${step(j)}u)`;
  const rows = {
    k: lanes.map((l) => inside(0, `${vector}(${name}[places.${l} + ${tail ? `min(k, depth - ${w}u)` : "k"} / ${w}u])`)),
    x: lanes.map((_, j) => inside(j, `${vector}(${name}[places.x + ${at(j)} * (params.${name}_k / ${w}u)])`)),
    s: lanes.map((_, j) => inside(j, vec4f((l) => `f32(${name}[places.${l} + ${at(j)} * params.${name}_k])`))),
  }[mode];
  const all = `${block}(${rows.join(", ")})`;
  return `fn places_${name}(batch: u32, x: u32) -> vec4u { return ${places}; }
fn fetch_${name}(places: vec4u, k: u32, depth: u32) -> ${block} {
  return ${mode === "k" && !halves ? `transpose(${all})` : all};
}`;
}

/**
 * Compile-time choices: how operands are read, the index of the tile, whether all steps of a slab are unrolled, the epilogue, and the rest as in `fetcher`.
 */
interface Variant extends Operands {
  tile: number;
  unrolled: boolean;
  halves: boolean;
  tail: boolean;
  epilogue: EpilogueShape;
}

/**
 * How slabs get into workgroup memory: declarations before the loop (`begin`), `fetch` for the slabs that start at k = `begins`, and `keep`, which writes the
 * fetched blocks to `slabs`. The blocks of A's slab come first, then those of B's: neighbouring threads take up to eight along m or n, then those along k.
 */
function copying({ aMode, bMode, halves }: Variant, tile: Tile) {
  const { slices, depth } = tile,
    rows = slabRows(tile),
    threads = threadsOf(tile) * slices,
    aQuads = tile.m / 4,
    bQuads = tile.n / 4;
  const w = halves ? 8 : 4, ofSlice = slabsAhead(halves) * depth, fetched = ofSlice * slices;
  const aBlocks = aQuads * fetched / w, bBlocks = bQuads * fetched / w, blocks = aBlocks + bBlocks;
  const rounds = numbers(Math.ceil(blocks / threads));
  // the operand that the blocks of a round belong to; "" if that differs among threads
  const side = (r: number) => (r + 1) * threads <= aBlocks ? "a" : r * threads >= aBlocks ? "b" : "";
  const operands = {
    a: { mode: aMode, quads: aQuads, tile: "tile_m" },
    b: { mode: bMode, quads: bQuads, tile: "tile_n" },
  };
  // how many elements a block has along k and along x (m or n)
  const kOf = (o: "a" | "b") => halves && operands[o].mode === "k" ? 8 : 4;
  const xOf = (o: "a" | "b") => halves && operands[o].mode === "x" ? 8 : 4;
  // the quad of m or n in a row of the slabs: the two quads of a block of eight are far apart, so that neighbouring threads write to neighbouring rows
  const quadOf = (o: "a" | "b", row: string) =>
    xOf(o) === 8 ? `((${row}) % ${operands[o].quads / 2}u * 2u + (${row}) / ${operands[o].quads / 2}u)` : `(${row})`;
  // Neighbouring threads take blocks that are neighbours in memory. If there are fewer than eight along k, the next ones come from rows so far apart that they
  // are written to different banks of workgroup memory: 4096×384×1152 in tiles of 64×64 takes an H100 120 µs instead of 133
  const order = (r: number, o: "a" | "b") => {
    const { mode, quads } = operands[o], ks = fetched / kOf(o), xs = quads * 4 / xOf(o);
    if (mode === "k") {
      const t = `place${r} / ${ks}u`, apart = 8 / ks;
      const x = ks < 8 && xs % 8 === 0 ? `${t} / 8u * 8u + ${t} % ${apart}u * ${ks}u + ${t} / ${apart}u % ${ks}u` : t;
      return `let x${o}${r} = ${x}; let k${o}${r} = place${r} % ${ks}u;`;
    }
    const run = [8, 4, 2, 1].find((n) => xs % n === 0)!;
    return `let x${o}${r} = place${r} % ${run}u + place${r} / ${
      run * ks
    }u * ${run}u; let k${o}${r} = place${r} / ${run}u % ${ks}u;`;
  };
  const choice = (r: number, f: (o: "a" | "b") => string) => {
    const o = side(r);
    if (o) return f(o as "a" | "b");
    const [a, b] = [f("a"), f("b")];
    return a === b ? a : `if (of_a${r}) { ${a} } else { ${b} }`;
  };
  // blocks along k in a slice
  const perSlice = (r: number, by: string) => {
    const [a, b] = (["a", "b"] as const).map((o) => `k_all${r} ${by} ${ofSlice / kOf(o)}u`);
    return a === b ? a : `select(${b}, ${a}, of_a${r})`;
  };
  const begin = rounds.map((r) =>
    `let unit${r} = lane + ${r * threads}u;
  let of_a${r} = unit${r} < ${aBlocks}u;
  let place${r} = select(unit${r} - ${aBlocks}u, unit${r}, of_a${r});
  ${order(r, "a")}
  ${order(r, "b")}
  let x${r} = select(xb${r}, xa${r}, of_a${r});
  let k_all${r} = select(kb${r}, ka${r}, of_a${r});
  let slice${r} = ${perSlice(r, "/")};
  let k${r} = ${perSlice(r, "%")};
  let at${r} = slice${r} * ${rows}u + select(${aQuads}u, 0u, of_a${r}) + x${r};
  var places${r}: vec4u;
  ${choice(r, (o) => `places${r} = places_${o}(batch, ${operands[o].tile} + x${r} * ${xOf(o)}u);`)}
  var block${r}: ${halves ? "array<vec4u, 4>" : "mat4x4f"};`
  ).join("\n  ");
  const fetch = rounds.map((r) =>
    choice(
      r,
      (o) =>
        `block${r} = fetch_${o}(places${r}, begins + slice${r} * ${ofSlice}u + k${r} * ${
          xOf(o) === 8 ? 2 : kOf(o)
        }u, depth);`,
    )
  ).join(" ");
  const put = (r: number, row: string, place: string, x: string) => `slabs[at${r}${row}][${place}] = ${x};`;
  const unpacked = (x: string) => `unpack2x16float(${x})`;
  const keepBlock = (r: number, o: "a" | "b") => {
    const block = `block${r}`;
    if (!halves) return lanes.map((_, j) => put(r, "", `k${r} + ${j * depth / 4}u`, `${block}[${j}]`)).join(" ");
    if (operands[o].mode === "k") { // all of one slab
      const ks = depth / 8;
      return `if (k${r} / ${ks}u == phase) { let k = k${r} % ${ks}u; ${
        lanes.map((l, p) =>
          `{ ${lanes.map((_, i) => `let h${i} = ${unpacked(`${block}[${i}].${l}`)};`).join(" ")} ${
            ["x", "y"].map((e, n) =>
              put(r, "", `k + ${(2 * p + n) * depth / 8}u`, `vec4f(h0.${e}, h1.${e}, h2.${e}, h3.${e})`)
            ).join(" ")
          } }`
        ).join(" ")
      } }`;
    }
    const half = (rows: number[]) =>
      rows.flatMap((row, j) =>
        ["xy", "zw"].map((pair, e) =>
          put(
            r,
            e ? ` + ${operands[o].quads / 2}u` : "",
            `(k${r} % 4u * 2u + ${j}u) * ${depth / 8}u + k${r} / 4u`,
            `vec4f(${[...pair].map((l) => unpacked(`${block}[${row}].${l}`)).join(", ")})`,
          )
        )
      ).join(" ");
    return `if (phase == 0u) { ${half([0, 1])} } else { ${half([2, 3])} }`;
  };
  const keep = rounds.map((r) =>
    `${(r + 1) * threads <= blocks ? "" : `if (unit${r} < ${blocks}u) `}{ ${choice(r, (o) => keepBlock(r, o))} }`
  ).join("\n    ");
  return { begin, fetch, keep, quadOf };
}

/** Adds up the sums of the slices in a tree, as many at once as the slabs can hold. */
function meeting(tile: Tile, sums: string[]): string {
  const threads = threadsOf(tile), quads = (tile.m + tile.n) / 4, { slices, depth } = tile;
  const halvings = numbers(Math.log2(slices)).map((n) => slices >> (n + 1));
  return halvings.map((half) => {
    const most = [sums.length, ...[16, 8, 4, 2, 1].filter((n) => n < sums.length)].find((n) =>
      half * threads <= Math.floor(depth / n) * quads * slices
    )!;
    const fit = Math.floor(depth / most);
    return numbers(Math.ceil(sums.length / most)).map((part) => {
      const some = sums.slice(part * most, (part + 1) * most).map((sum, n) => [
        sum,
        `slabs[at / ${fit}u][at % ${fit}u * ${most}u + ${n}u]`,
      ]);
      return `
  if (slice >= ${half}u && slice < ${2 * half}u) {
    let at = (slice - ${half}u) * ${threads}u + own;
    ${some.map(([sum, met]) => `${met} = ${sum};`).join(" ")}
  }
  workgroupBarrier();
  if (slice < ${half}u) {
    let at = slice * ${threads}u + own;
    ${some.map(([sum, met]) => `${sum} += ${met};`).join(" ")}
  }
  workgroupBarrier();`;
    }).join("");
  }).join("");
}

/**
 * Which quads of the tile a thread has. Eight neighbours read four quads of B and two of A, which workgroup memory delivers at once: with rows of 16
 * neighbours, which read one quad of A, an H100 took 2 to 15 % longer, most with few elements per thread.
 */
function placeOfThread(across: number): string {
  const w = Math.min(8, across);
  return `let thread_n = own / 2u % ${w}u + own / ${4 * w}u % ${across / w}u * ${w}u;
  let thread_m = own % 2u + own / ${2 * w}u % 2u * 2u + own / ${4 * across}u * 4u;`;
}

export const tileKernel: (variant: Variant) => Kernel = variants((v: Variant) => {
  const { aMode, bMode, unrolled, halves, tail } = v, tile = TILES[v.tile], { slices, depth } = tile;
  const { begin, fetch, keep, quadOf } = copying(v, tile), end = epilogueCode(v.epilogue);
  const threads = threadsOf(tile), aQuads = tile.m / 4, bQuads = tile.n / 4;
  const across = bQuads / tile.wide, down = aQuads / tile.high; // threads
  const rows = slabRows(tile);
  // `parts` threads share the row sums of each quad of a slab
  const parts = Math.min(depth, threads / aQuads);
  type Place = (h: number, i: number, w: number) => string; // the name of row i of a block
  const hs = numbers(tile.high), ws = numbers(tile.wide), sum: Place = (h, i, w) => `sum_${h}${i}${w}`;
  const all = hs.flatMap((h) => lanes.flatMap((_, i) => ws.map((w) => [h, i, w] as const)));
  const rowsOf = hs.flatMap((h) => lanes.map((_, i) => [h, i] as const));
  const blocks = hs.flatMap((h) => ws.map((w) => [h, w] as const));
  const mOf = (h: string, i: number) => `(tile_m + ${quadOf("a", `thread_m + ${h} * ${down}u`)} * 4u + ${i}u)`;
  const nOf = (w: string) => `(tile_n + ${quadOf("b", `thread_n + ${w} * ${across}u`)} * 4u)`;
  const got = (name: string): Place => (h, i, w) => `got_${name}_${h}${i}${w}`;
  // Finishes a block. With an activation, blocks take turns in a loop: a GPU fetches the code of each launch anew, and gelu for all elements of a thread is so
  // long that in a training step the launches of 4096×384×1536 took an H100 9 µs more with it
  const finished = (h: string, w: string, pick: (x: Place, i: number) => string) =>
    `{
    let n = ${nOf(w)};
    if (n < params.columns) {
      ${end.column}
      ${
      lanes.map((_, i) => `{ let m = ${mOf(h, i)}; ${end.row("m", pick(sum, i), (name) => pick(got(name), i))} }`).join(
        "\n      ",
      )
    }
    }
  }`;
  const ofLoop = (x: Place, i: number) =>
    blocks.map(([h, w]) => x(h, i, w)).reduce((a, b, n) => `select(${a}, ${b}, block == ${n}u)`);
  const each = (f: Place) => all.map(([h, i, w]) => f(h, i, w)).join(" ");
  const w = halves ? 8 : 4, ahead = slabsAhead(halves);
  // step k is at k % 4 · depth/4 + ⌊k / 4⌋ (for f16 with 8 instead of 4), so that threads whose blocks are neighbours along k write to neighbouring places
  const placeOf = (k: number) => k % w * depth / w + Math.floor(k / w);
  const step = (k: number) => `
      { ${hs.map((h) => `let x${h} = slabs[at_a + ${h * down}u][${placeOf(k)}u + k];`).join(" ")}
        ${ws.map((w) => `let y${w} = slabs[at_b + ${w * across}u][${placeOf(k)}u + k];`).join(" ")}
        ${each((h, i, w) => `${sum(h, i, w)} += x${h}.${lanes[i]} * y${w};`)} }`;
  const steps = numbers(unrolled ? depth : w).map(step).join("");
  const multiplied = unrolled
    ? steps.replaceAll("u + k]", "u]") // a constant index needs no bounds check
    : `for (var k = 0u; k < ${depth / w}u; k += 1u) { ${steps} }`;
  // a branch that is always taken makes the compiler wait for the next slab only after multiplying this one: 1536×4096×384 of f16 takes an H100 147 µs, else
  // 159
  const multiply = halves && !end.sums ? `if (params.depth > 0u) { ${multiplied} }` : multiplied;
  const operand = (element: Element, mode: Mode): BufferType =>
    halves ? "read vec4u" : `read ${mode === "s" ? element : vectorOf[element]}`;
  const turn = depth * slices, whole = turnOf(tile, halves);
  return {
    name: "matmul",
    buffers: {
      a: operand(v.a, aMode),
      b: operand(v.b, bMode),
      ...end.buffers,
    },
    params: PARAMS,
    workgroup: threads * slices,
    head: `${end.head}
// for each slice the rows of A's slab, four m each, then those of B's; the odd length puts neighbours into different banks
var<workgroup> slabs: array<array<vec4f, ${depth + 1}>, ${rows * slices}>;
${fetcher("a", aMode, "rows", tail, halves, depth)}
${fetcher("b", bMode, "columns", tail, halves, depth)}`,
    main: `${findTile(tile.m, tile.n)}
  let own = lane % ${threads}u;
  let slice = lane / ${threads}u;
  ${placeOfThread(across)}
  let slab = slice * ${rows}u;
  let at_a = slab + thread_m;
  let at_b = slab + ${aQuads}u + thread_n;
  ${each((h, i, w) => `var ${sum(h, i, w)} = vec4f(0.0);`)}
  ${begin}
  ${end.sums ? "var row_sums = vec4f(0.0);" : ""}
  { let begins = 0u; ${fetch} }
  for (var first = 0u; first < ${
      whole > turn ? `(depth + ${whole - 1}u) / ${whole}u * ${whole}u` : "depth"
    }; first += ${turn}u) {
    workgroupBarrier();
    let phase = first / ${turn}u % ${ahead}u;
    ${keep}
    workgroupBarrier();
    // the next slab is fetched while this one is multiplied
    let begins = first + ${turn}u;
    if (first + ${turn}u < depth && phase == ${ahead - 1}u) { ${fetch} }
    ${multiply}
    ${
      end.sums
        ? `if (tile_n == 0u) {
      ${
          numbers(depth / parts).map((k) =>
            `row_sums += slabs[slab + own % ${aQuads}u][own / ${aQuads}u + ${k * parts}u];`
          ).join(" ")
        }
    }`
        : ""
    }
  }
  workgroupBarrier();
  ${meeting(tile, all.map(([h, i, w]) => sum(h, i, w)))}
  ${
      end.sums
        ? `if (tile_n == 0u) { slabs[slab + own % ${aQuads}u][own / ${aQuads}u] = row_sums; }
  workgroupBarrier();
  if (tile_n == 0u && lane < ${aQuads}u) {
    row_sums = vec4f(0.0);
    for (var s = 0u; s < ${slices}u; s++) {
      for (var part = 0u; part < ${parts}u; part++) { row_sums += slabs[s * ${rows}u + lane][part]; }
    }
    let m = tile_m + ${quadOf("a", "lane")} * 4u;
    ${lanes.map((l, i) => end.sum(`(m + ${i}u)`, `row_sums.${l}`)).join(" ")}
  }`
        : ""
    }
  ${slices > 1 ? "if (slice > 0u) { return; }" : ""}
  let c_base = params.c_offset + batch * params.rows * params.columns;
  ${all.flatMap((at) => end.reads.map((name) => `var ${got(name)(...at)}: vec4f;`)).join(" ")}
  ${
      end.reads.length === 0
        ? ""
        : ws.map((w) =>
          `{ let n = ${nOf(`${w}u`)}; if (n < params.columns) { ${
            rowsOf.flatMap(([h, i]) =>
              end.reads.map((name) => `${got(name)(h, i, w)} = ${end.read(name, mOf(`${h}u`, i))};`)
            ).join(" ")
          } } }`
        ).join("\n  ")
    }
  ${
      v.epilogue.activation
        ? `for (var block = 0u; block < ${blocks.length}u; block++) ${
          finished(`(block / ${ws.length}u)`, `(block % ${ws.length}u)`, ofLoop)
        }`
        : blocks.map(([h, w]) => finished(`${h}u`, `${w}u`, (x, i) => x(h, i, w))).join("\n  ")
    }`,
  };
});
