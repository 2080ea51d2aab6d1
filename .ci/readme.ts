/**
 * Holds README.md to its word: every block of code type-checks and runs, every option is in the type and the other way
 * round, every test that is named exists, and the commands of its first screen work as pasted. Run with
 * `deno test -A .ci/readme.ts`.
 */

import { deepStrictEqual as equal, ok } from "node:assert/strict";
import { test } from "node:test";

const root = new URL("../", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, root));
const readme = read("README.md");

/** The fenced blocks of a language. */
function blocks(language: string): string[] {
  return [...readme.matchAll(new RegExp(`^\`\`\`${language}\n([^]*?)^\`\`\`$`, "gm"))].map(([, code]) => code!);
}

async function run(
  args: string[],
  cwd: string,
  seconds: number,
): Promise<{ code: number; output: string; late: boolean }> {
  const child = new Deno.Command(args[0]!, { args: args.slice(1), cwd, stdout: "piped", stderr: "piped" }).spawn();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    child.kill("SIGKILL");
  }, seconds * 1000);
  const { code, stdout, stderr } = await child.output();
  clearTimeout(timer);
  const text = new TextDecoder();
  return { code, output: text.decode(stdout) + text.decode(stderr), late };
}

async function inTemporaryFolder(use: (dir: string) => Promise<void>): Promise<void> {
  const dir = Deno.makeTempDirSync();
  try {
    await use(dir);
  } finally {
    Deno.removeSync(dir, { recursive: true });
  }
}

test("every ts block of the README type-checks and runs", async () => {
  const codes = blocks("ts");
  ok(codes.length >= 8, "the README has lost its blocks");
  await inTemporaryFolder(async (dir) => {
    const { imports, compilerOptions, unstable } = JSON.parse(read("deno.json"));
    const all = {
      ...imports,
      "@modelcontextprotocol/server": "npm:@modelcontextprotocol/server@2.4.0",
      "@personal-auth/mcp": new URL("mod.ts", root).href,
      "redis": "npm:redis@5",
    };
    Deno.writeTextFileSync(
      `${dir}/deno.json`,
      JSON.stringify({ imports: all, compilerOptions, unstable, lock: false }),
    );
    const files = codes.map((code, index) => {
      const file = `block-${index + 1}.ts`;
      Deno.writeTextFileSync(`${dir}/${file}`, code);
      return file;
    });
    const checked = await run([Deno.execPath(), "check", ...files], dir, 120);
    equal(checked.code, 0, checked.output);
    for (const file of files) {
      const { code, output, late } = await run([Deno.execPath(), "run", "-A", file], dir, 30);
      ok(code === 0 && !late, `${file}: ${output}\n${Deno.readTextFileSync(`${dir}/${file}`)}`);
    }
  });
});

test("the README names every option, and no other", () => {
  const options = read("mod.ts").match(/export interface PersonalAuthOptions \{\n([^]*?)\n\}\n/)![1]!;
  const declared = [...options.matchAll(/^ {2}(\w+)\??:/gm)].map(([, name]) => name!);
  const table = readme.match(/^### Options\n\n([^]*?)\n\n/m)![1]!;
  const described = [...table.matchAll(/^\| `(\w+)`/gm)].map(([, name]) => name!);
  equal(described.toSorted(), declared.toSorted());
});

test("the README names tests that exist", () => {
  const table = readme.match(/^## How it keeps strangers out\n\n([^]*?)\n\n/m)![1]!;
  const tests = [...read("mod_test.ts").matchAll(/^test\(\s*"((?:[^"\\]|\\.)*)"/gm)].map(([, name]) => name!);
  const named = [...table.matchAll(/"([^"]+)"/g)].map(([, name]) => name!);
  ok(named.length >= 13 && tests.length > 100);
  for (const name of named) ok(tests.some((test) => test.includes(name)), `no test begins with "${name}"`);
});

test("the README's first command serves within a minute, as pasted", async () => {
  const [first] = blocks("sh")[0]!.split("\n");
  equal(first, "npx -y deno run -A example.ts");
  await inTemporaryFolder(async (dir) => {
    for (const file of ["mod.ts", "example.ts", "deno.json"]) Deno.copyFileSync(new URL(file, root), `${dir}/${file}`);
    const listener = Deno.listen({ port: 0 });
    const { port } = listener.addr as Deno.NetAddr;
    listener.close();
    const env = { PORT: String(port) };
    // In a process group of its own: npx leaves its child behind when it is killed.
    const child = new Deno.Command("setsid", {
      args: ["bash", "-c", first!],
      cwd: dir,
      env,
      stdout: "null",
      stderr: "null",
    }).spawn();
    try {
      const start = performance.now();
      let status = 0;
      while (status === 0 && performance.now() - start < 60_000) {
        await new Promise((resolve) => setTimeout(resolve, 200));
        const response = await fetch(`http://localhost:${port}/mcp`).catch(() => undefined);
        status = response?.status ?? 0;
        await response?.body?.cancel();
      }
      equal(status, 401);
    } finally {
      await new Deno.Command("bash", { args: ["-c", `kill -9 -- -${child.pid}`] }).output();
      await child.status;
    }
  });
});
