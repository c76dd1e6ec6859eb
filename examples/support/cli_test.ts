import { assert, assertEquals } from "@std/assert";
import { readOptions } from "./cli.ts";

const HELP = "--seed N  --quick  --out DIR";

Deno.test("readOptions: nothing given", () => {
  const options = readOptions(HELP, []);
  assert(!options.given("quick"));
  assertEquals(options.count("seed", 7, 0), 7);
  assertEquals(options.text("out", "out"), "out");
});

Deno.test("readOptions: everything given", () => {
  const options = readOptions(HELP, ["--seed", "3", "--quick", "--out=here"]);
  assert(options.given("quick"));
  assertEquals(options.count("seed", 7, 0), 3);
  assertEquals(options.text("out", "out"), "here");
});
