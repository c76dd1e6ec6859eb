import { assert } from "@std/assert";

const { publish } = JSON.parse(await Deno.readTextFile("deno.json"));
const published = publish.include.map((glob: string) => new RegExp(`^${glob.replaceAll("*", "[^/]*")}(/|$)`));
const programs = /^(examples|bench)\b(?!.*\.(md|svg)$)/; // are in a clone alone

Deno.test("package: what the README and the pages behind it link to is there, and published", async () => {
  const pages = ["README.md"];
  for (const page of pages) { // grows
    const text = await Deno.readTextFile(page);
    for (const [, link] of text.matchAll(/\]\(([^):#\s]+)(?:#[^)\s]*)?\)/g)) {
      const path = new URL(link, `file:///${page}`).pathname.slice(1);
      const { isFile } = await Deno.stat(path);
      if (pages.includes(path) || programs.test(path)) continue;
      assert(published.some((glob: RegExp) => glob.test(path)), `${page} links to ${path}`);
      if (isFile && path.endsWith(".md")) pages.push(path);
    }
  }
  assert(pages.includes("docs/losses.md"));
});
