/**
 * What the chapters of a novel are about, by the Jensen–Shannon divergence between the words that they use.
 *
 * A chapter of Moby Dick is a distribution over content words: words that are in several chapters, but not in most. What to look
 * at: the nearest neighbours of some chapters with a known subject, which share it; the dark squares of the heat map, which are
 * sequences of chapters with one subject, the last of them the chase; and the control, where the same words are dealt at random to
 * chapters of the same lengths: there a chapter is no nearer to the next one than to any other. Short chapters have few words in
 * common with any other, so distances are divided by those of the control.
 *
 *     deno task examples topics --help
 *
 * @module
 */

import { jsd, Scope, slice, tensor } from "@limbeck/limbeck";
// @ts-types="@types/d3-array"
import { cross, mean, range, rollup, shuffler } from "d3-array";
// @ts-types="@types/d3-random"
import { randomLcg } from "d3-random";
import { type Findings, present, type Setting } from "./support/experiment.ts";
import { COLORS, linePanel } from "./support/report.ts";
import { loadChapters } from "./support/text.ts";

const CHAPTERS = loadChapters().slice(0, 135); // without the epilogue, which has no number
const FEWEST = { full: 5, quick: 15 }; // chapters that a word must be in
const MOST = 0.4; // of all chapters: a word in more of them says nothing about the subject
const SHORTEST = 4; // letters
const SMOOTHING = 0.1; // the whole book's share in each chapter's distribution
const SHOWN = [9, 32, 86, 103, 104, 134]; // of a known subject
const BLOCK = 3; // chapters a side of a square of the heat map
const FARTHEST = 60; // chapters apart

/** Divergences of chapters [chapters][chapters], in nats; chapter 1 is the first. */
export interface Topics {
  words: number;
  book: number[][];
  shuffled: number[][];
  relative: number[][]; // book / shuffled
}

/** The content words of each chapter, as indices into the vocabulary. */
function readChapters(fewest: number): { tokens: number[][]; words: number } {
  const texts = CHAPTERS.map(({ text }) => text.toLowerCase().match(/[a-z]+/g)!);
  const spread = rollup(texts.flatMap((text) => [...new Set(text)]), (all) => all.length, (word) => word);
  const most = MOST * CHAPTERS.length;
  const words = [...spread].filter(([word, n]) => word.length >= SHORTEST && n >= fewest && n <= most);
  const places = new Map(words.map(([word], i) => [word, i]));
  return { tokens: texts.map((text) => text.flatMap((word) => places.get(word) ?? [])), words: words.length };
}

/** Divergences of each pair of chapters. */
async function compare(tokens: number[][], words: number): Promise<number[][]> {
  using _scope = new Scope(); // frees the tensors
  const count = (tokens: number[]) => {
    const counts = new Array<number>(words).fill(0);
    for (const token of tokens) counts[token]++;
    return counts;
  };
  const book = count(tokens.flat()), size = tokens.flat().length;
  const share = (counts: number[], i: number, total: number) =>
    Math.log((1 - SMOOTHING) * counts[i] / total + SMOOTHING * book[i] / size);
  const logShares = tensor(tokens.map((own) => {
    const counts = count(own);
    return range(words).map((i) => share(counts, i, own.length));
  }));
  const divergences: number[][] = [];
  for (const chapter of range(tokens.length)) {
    using _row = new Scope();
    const same = slice(logShares, [[chapter, chapter + 1]]).expand(logShares.shape); // a row for each pair
    divergences.push(Array.from(await jsd(same, logShares, { reduction: "none" }).data()));
  }
  return divergences;
}

/** Divergences in the book, and with its words dealt at random to chapters of the same lengths. */
export async function topics({ seed, quick }: Setting): Promise<Topics> {
  const { tokens, words } = readChapters(quick ? FEWEST.quick : FEWEST.full);
  const deck = shuffler(randomLcg(seed))(tokens.flat());
  const dealt = tokens.map(({ length }) => deck.splice(0, length));
  const book = await compare(tokens, words), shuffled = await compare(dealt, words);
  const relative = book.map((row, i) => row.map((divergence, j) => i === j ? 0 : divergence / shuffled[i][j]));
  return { words, book, shuffled, relative };
}

/** The mean divergence of chapters at this distance in the book. */
export function apart(divergences: number[][], distance: number): number {
  return mean(range(divergences.length - distance), (i) => divergences[i][i + distance])!;
}

/** The numbers of the chapters nearest to one, by its number. */
export function nearest(divergences: number[][], chapter: number, count: number): number[] {
  const row = divergences[chapter - 1];
  return range(1, row.length + 1).filter((other) => other !== chapter)
    .sort((a, b) => row[a - 1] - row[b - 1]).slice(0, count);
}

function describe({ words, book, shuffled, relative }: Topics): Findings {
  const [red, blue] = COLORS.slice(2);
  const name = (chapter: number) => `${chapter} ${CHAPTERS[chapter - 1].title.split(/[.;,—]/)[0]}`;
  const blocks = range(0, CHAPTERS.length, BLOCK);
  const square = (x: number, y: number) =>
    mean(cross(range(x, x + BLOCK), range(y, y + BLOCK)).filter(([i, j]) => i !== j), ([i, j]) => relative[i][j])!;
  const axis = { title: "chapter", axis: { values: range(1, 135, BLOCK * 5), labelAngle: 0 } };
  return {
    title: "Chapters by their words: neighbours share a subject",
    subtitle: `Jensen–Shannon divergences of ${words} words in ${CHAPTERS.length} chapters.`,
    tables: [[
      ["chapter", "nearest", "second", "third", "fourth"],
      ...SHOWN.map((chapter) => [name(chapter), ...nearest(relative, chapter, 4).map(name)]),
    ], [
      ["mean JSD", ...[1, 2, 10, FARTHEST].map((distance) => `${distance} apart`)],
      ...Object.entries({ book, shuffled }).map(([name, all]) => [
        name,
        ...[1, 2, 10, FARTHEST].map((distance) => apart(all, distance).toFixed(4)),
      ]),
    ]],
    picture: {
      hconcat: [
        {
          title: `relative to shuffled words, ${BLOCK} × ${BLOCK} chapters a square`,
          width: 360,
          height: 360,
          data: { values: cross(blocks, blocks).map(([x, y]) => ({ x: x + 1, y: y + 1, z: square(x, y) })) },
          mark: "rect",
          encoding: {
            x: { field: "x", type: "ordinal", ...axis },
            y: { field: "y", type: "ordinal", ...axis },
            color: { field: "z", type: "quantitative", title: null, scale: { scheme: "viridis", zero: false } },
          },
        },
        linePanel(
          "by distance in the book",
          { book: blue, "shuffled words": red },
          range(1, FARTHEST + 1).flatMap((x) => [
            { name: "book", x, y: apart(book, x) },
            { name: "shuffled words", x, y: apart(shuffled, x) },
          ]),
          { x: { title: "chapters apart" }, y: { title: "mean JSD, nats" }, height: 360 },
        ),
      ],
      resolve: { scale: { color: "independent" } },
    },
  };
}

if (import.meta.main) {
  await present("topics", "Compares the chapters of Moby Dick by the words that they use.", topics, describe);
}
