import { assert, assertEquals } from "@std/assert";
import { quote, readOptions } from "./cli.ts";

const HELP = `A program.

  --seed N
  --quick
  --out DIR
  --size SIZE
  --top-p P`;

Deno.test("readOptions: nothing given", () => {
  const options = readOptions(HELP, []);
  assert(!options.given("quick"));
  assertEquals(options.count("seed", 7, 0), 7);
  assertEquals(options.text("out", "out"), "out");
  assertEquals(options.choice("size", "small", ["small", "large"]), "small");
  assertEquals(options.number("top-p", 1, 0, 1), 1);
});

Deno.test("readOptions: everything given", () => {
  const options = readOptions(HELP, ["--seed", "3", "--quick", "--out=here", "--size", "large", "--top-p", "0.5"]);
  assert(options.given("quick"));
  assertEquals(options.count("seed", 7, 0), 3);
  assertEquals(options.text("out", "out"), "here");
  assertEquals(options.choice("size", "small", ["small", "large"]), "large");
  assertEquals(options.number("top-p", 1, 0, 1), 0.5);
});

Deno.test("readOptions: npm's -- in front of the options is dropped", () => {
  assert(readOptions(HELP, ["--", "--quick"]).given("quick"));
});

Deno.test("quote: a shell gets the arguments that were given", () => {
  const given = ["--text", "call me.txt", "--out=a,b/c", "it's", "", "$HOME", "*", "β"];
  assertEquals(quote(given), `--text 'call me.txt' --out=a,b/c 'it'\\''s' '' '$HOME' '*' 'β'`);
});
