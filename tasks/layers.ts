/**
 * The layer rule: kernels ← autograd ← ops ← nn ← examples, bench. A file imports only from its own folder and from folders to its
 * left, only kernels/gpu/ touches WebGPU, autograd/ contains no WGSL, only nn's file functions use Deno's own APIs, and there are no
 * import cycles.
 */

const library = ["kernels", "autograd", "ops", "nn"];
const outside = ["examples", "bench", "tasks", "testing"];
const mayUseDeno = /^nn\/(files|checkpoint)\.ts$/;

type Import = { line: number; target: string; typeOnly: boolean }; // the target is a path from the root

/** Checks every .ts file below `root`; each violation reads `file:line message`. */
export function checkLayers(root: string): { files: number; violations: string[] } {
  const files = [...sources(root, "")].sort();
  const imports = new Map<string, Import[]>();
  const violations: string[] = [];
  for (const file of files) {
    const text = withoutComments(Deno.readTextFileSync(`${root}/${file}`));
    const found = importsOf(file, text);
    imports.set(file, found);
    for (const { line, target } of found) {
      const why = wrongImport(file, target);
      if (why) violations.push(`${file}:${line} ${why}`);
    }
    const code = text.replace(/"(?:\\.|[^"\\\n])*"/g, '""'); // Symbol.for("Deno.customInspect") does not use Deno
    for (const [pattern, message] of forbidden(file)) {
      for (const match of code.matchAll(pattern)) {
        violations.push(`${file}:${lineAt(code, match.index)} ${match[0]}: ${message}`);
      }
    }
  }
  violations.push(...cycles(imports));
  return { files: files.length, violations };
}

function* sources(root: string, folder: string): Generator<string> {
  for (const { name, isDirectory } of Deno.readDirSync(`${root}/${folder}`)) {
    if (name.startsWith(".") || name === "node_modules" || name === "testdata") continue;
    if (isDirectory) yield* sources(root, `${folder}${name}/`);
    else if (name.endsWith(".ts")) yield folder + name;
  }
}

// Blanks comments and keeps the line numbers. Quoted strings are matched, so that "https://…" does not count as a comment.
function withoutComments(text: string): string {
  const token = /"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\/\*[\s\S]*?\*\/|\/\/.*/g;
  return text.replace(token, (found) => found.startsWith("/") ? found.replace(/[^\n]/g, " ") : found);
}

function importsOf(file: string, text: string): Import[] {
  const statement =
    /^[ \t]*(?:import|export)\b(?:([\w$*\s{},]*?)\bfrom\s*|\s*)["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']/gm;
  return [...text.matchAll(statement)].flatMap((match) => {
    const [, names = "", fixed, dynamic] = match;
    const target = resolve(file, fixed ?? dynamic);
    if (target === undefined) return [];
    const typeOnly = /^\s*(?:type\b|\{(?:\s*type\s[^,}]*,?)+\s*\}\s*$)/.test(names);
    return [{ line: lineAt(text, match.index), target, typeOnly }];
  });
}

function resolve(file: string, specifier: string): string | undefined {
  if (specifier === "@limbeck/limbeck") return "mod.ts";
  if (!specifier.startsWith(".")) return undefined; // a package
  const path = new URL(specifier, `file:///root/${file}`).pathname;
  return path.startsWith("/root/") ? path.slice("/root/".length) : `..${path}`;
}

const isTest = (file: string) => file.endsWith("_test.ts");
const topOf = (file: string) => file.split("/")[0];

function wrongImport(file: string, target: string): string | undefined {
  const from = topOf(file);
  const to = topOf(target);
  const rank = library.indexOf(from);
  if (to === "..") return `imports ${target}, which is outside the project`;
  if (library.includes(to) && (rank < 0 || library.indexOf(to) <= rank)) return;
  if (to === from || outside.includes(from)) return;
  if (isTest(file) && (target === "mod.ts" || to === "testing")) return;
  return `${from} must not import ${target}: kernels ← autograd ← ops ← nn ← mod.ts ← examples, bench`;
}

function* forbidden(file: string): Generator<[RegExp, string]> {
  if (outside.includes(topOf(file)) || isTest(file)) return;
  if (!file.startsWith("kernels/gpu/")) {
    yield [/\bGPU[A-Z]\w*|\bnavigator\s*\??\.\s*gpu\b/g, "only kernels/gpu/ touches WebGPU"];
  }
  if (file.startsWith("autograd/")) yield [/@compute\b|\bfn\s+main\b/g, "autograd/ contains no WGSL"];
  if (!mayUseDeno.test(file)) {
    yield [/\bDeno\s*(\?\.|\.|\[)\s*\w*/g, "only nn/files.ts and nn/checkpoint.ts use Deno's own APIs"];
  }
}

function cycles(imports: Map<string, Import[]>): string[] {
  const found: string[] = [];
  const done = new Set<string>();
  const visit = (file: string, path: string[]) => {
    for (const { line, target, typeOnly } of imports.get(file) ?? []) {
      if (typeOnly || done.has(target)) continue; // types do not exist at run time
      const start = path.indexOf(target);
      if (start < 0) visit(target, [...path, target]);
      else found.push(`${file}:${line} import cycle: ${[...path.slice(start), target].join(" → ")}`);
    }
    done.add(file);
  };
  for (const file of imports.keys()) if (!done.has(file)) visit(file, [file]);
  return found;
}

const lineAt = (text: string, index: number) => text.slice(0, index).split("\n").length;

if (import.meta.main) {
  const { files, violations } = checkLayers(Deno.args[0] ?? ".");
  for (const violation of violations) console.error(violation);
  if (violations.length > 0) Deno.exit(1);
  console.log(`layers: ${files} files, ok`);
}
