/**
 * What the experiments share: the command line, the tables and the picture.
 *
 * @module
 */

import { dispose, init } from "@limbeck/limbeck";
import type { TopLevelSpec } from "vega-lite";
import { makeFolder, readOptions } from "./cli.ts";
import { alignTable, drawSpec } from "./report.ts";

/** Options of every experiment: the same seed gives the same numbers, and a quick run is smaller. */
export interface Setting {
  seed: number;
  quick: boolean;
}

/** What an experiment shows at the end. */
export interface Findings {
  /** The picture's title: what it shows, in one sentence. */
  title: string;
  subtitle: string | string[];
  /** The picture in Vega-Lite (`layer`, `hconcat`, …), without what all pictures share. */
  picture: TopLevelSpec;
  /** Each table is a list of rows of cells; the first row is the head. */
  tables: string[][][];
  /** Lines below the tables. */
  notes?: string[];
}

/**
 * Runs an experiment as a program: reads the options, prints the tables and saves the picture as an SVG.
 *
 * `name` is the name of the file, `about` says in one line what the program does, `run` computes the numbers, and `describe` decides what to show of them.
 */
export async function present<Result>(
  name: string,
  about: string,
  run: (setting: Setting) => Promise<Result>,
  describe: (result: Result) => Findings,
): Promise<void> {
  const options = readOptions(`${about}

  --seed N   of what is drawn at random, if anything is (1)
  --quick    a smaller run, if the whole one takes longer than 15 s on two CPU cores
  --out DIR  folder for ${name}.svg (out/${name})
  --help     this text`);
  const setting = { seed: options.count("seed", 1, 0), quick: options.given("quick") };
  const out = options.text("out", `out/${name}`);
  await makeFolder(out);

  const { adapter } = await init();
  const { title, subtitle, picture, tables, notes = [] } = describe(await run(setting));
  await dispose();

  for (const cells of tables) console.log(`${alignTable(cells)}\n`);
  for (const note of notes) console.log(note);
  const config = { aria: false, ...picture.config };
  // two decimals of a pixel are enough and halve the file
  const svg = (await drawSpec(title, subtitle, { ...picture, config })).replace(
    / (?:d|transform)="[^"]*"/g,
    (path) => path.replace(/(\.\d\d)\d+/g, "$1"),
  );
  await Deno.writeTextFile(`${out}/${name}.svg`, svg);
  console.log(`${out}/${name}.svg, computed on ${adapter}`);
}
