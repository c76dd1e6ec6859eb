import { assertEquals } from "@std/assert";
import { decode, distinctShare, encode, makeVocabulary, ngramBits, spreadStarts } from "./text.ts";

Deno.test("n-grams: add-one counts of aab…", () => {
  const train = Int32Array.from("aabaabaab", (character) => character === "a" ? 0 : 1); // aa 3, ab 3, ba 2
  const heldOut = Int32Array.from([0, 0, 1, 0]);
  const options = { classes: 2, starts: spreadStarts(heldOut, 2, 1), context: 2 }; // its targets: b behind aa, a behind ab
  assertEquals(options.starts, [1]);
  assertEquals(spreadStarts(new Int32Array(10), 3, 2), [1, 6]); // the last target is the last token
  const bits = (order: number) => ngramBits(train, heldOut, { ...options, order });
  const expected = (...shares: number[]) => -shares.reduce((sum, share) => sum + Math.log2(share), 0) / shares.length;
  assertEquals(bits(1).toFixed(12), expected(4 / 11, 7 / 11).toFixed(12));
  assertEquals(bits(2).toFixed(12), expected(4 / 8, 3 / 4).toFixed(12));
  assertEquals(bits(3).toFixed(12), expected(4 / 5, 3 / 4).toFixed(12));
});

Deno.test("vocabulary: rare characters share a class", () => {
  const vocabulary = makeVocabulary("whale ".repeat(10) + "☃");
  assertEquals(vocabulary, ["\uFFFD", " ", "a", "e", "h", "l", "w"]);
  assertEquals(makeVocabulary("\uFFFD".repeat(10)), ["\uFFFD"]);
  assertEquals([...encode("whale☃", vocabulary)], [6, 4, 2, 5, 3, 0]);
  assertEquals(decode([6, 4, 2, 5, 3, 0], vocabulary), "whale\uFFFD");
  assertEquals(distinctShare(["whalewhale"].map((text) => encode(text, vocabulary))), 5 / 7);
});
