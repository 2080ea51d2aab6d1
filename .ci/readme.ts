/**
 * Holds README.md to its word: every block of code type-checks and runs, its programs serve from an empty folder on
 * each runtime, a client that may only read asks for more and gets it, every option is in the type and the other way
 * round, the stores are those of `.ci/stores/`, every test, file and picture that is named exists, what is not folded is
 * no longer than 240 lines, and the first command works as pasted. Run with `deno test -A .ci/readme.ts`.
 */

import { deepStrictEqual as equal, match, ok } from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { Client as McpClient } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { type Carrier, Client, overHttp } from "./lib/client.ts";
import { runtimes } from "./lib/runtimes.ts";
import { Owner } from "./zoo/kit.ts";
import { App, loadSdk1, loadSdk2, type Sdk } from "./zoo/libraries.ts";

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

function temporaryFolder(t: TestContext): string {
  const dir = Deno.makeTempDirSync();
  t.after(() => Deno.removeSync(dir, { recursive: true }));
  return dir;
}

function freePort(): number {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  listener.close();
  return (listener.addr as Deno.NetAddr).port;
}

/** Starts a command in a process group of its own, because launchers leave their children behind when they are killed. */
function start(t: TestContext, command: string, cwd: string, env: Record<string, string>): () => string {
  const args = ["bash", "-c", command];
  const child = new Deno.Command("setsid", { args, cwd, env, stdout: "piped", stderr: "piped" }).spawn();
  let output = "";
  const reading = [child.stdout, child.stderr].map(async (stream) => {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) output += text;
  });
  t.after(async () => {
    await new Deno.Command("bash", { args: ["-c", `kill -9 -- -${child.pid}`], stderr: "null" }).output();
    await Promise.all([child.status, ...reading]);
  });
  return () => output;
}

/** Waits a minute at most until there is something to return. */
async function until<T>(look: () => T | undefined | Promise<T | undefined>, what: () => string): Promise<T> {
  const begin = performance.now();
  while (performance.now() - begin < 60_000) {
    const found = await look();
    if (found !== undefined) return found;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(what());
}

/** Answers the status of `/mcp` without a token, as soon as there is one. */
async function statusOf(port: number): Promise<number | undefined> {
  const response = await fetch(`http://localhost:${port}/mcp`).catch(() => undefined);
  await response?.body?.cancel();
  return response?.status;
}

test("every ts block of the README type-checks and runs", async (t) => {
  const codes = blocks("ts");
  ok(codes.length >= 8, "the README has lost its blocks");
  const dir = temporaryFolder(t);
  const { imports, compilerOptions, unstable } = JSON.parse(read("deno.json"));
  const all = {
    ...imports,
    "@modelcontextprotocol/server": "npm:@modelcontextprotocol/server@2.4.0",
    "@personal-auth/mcp": new URL("mod.ts", root).href,
    "redis": "npm:redis@5",
  };
  Deno.writeTextFileSync(`${dir}/deno.json`, JSON.stringify({ imports: all, compilerOptions, unstable, lock: false }));
  Deno.copyFileSync(new URL("mod.ts", root), `${dir}/mod.ts`);
  Deno.writeTextFileSync(
    `${dir}/durable-object.ts`,
    codes.find((code) => code.includes("function durableObjectStore"))!,
  );
  const files = codes.map((code, index) => {
    const file = `block-${index + 1}.ts`;
    Deno.writeTextFileSync(`${dir}/${file}`, code);
    return file;
  });
  const checked = await run([Deno.execPath(), "check", ...files], dir, 120);
  equal(checked.code, 0, checked.output);
  for (const [index, file] of files.entries()) {
    if (codes[index]!.includes("\nserve({")) continue; // it serves until it is stopped: the next test runs it
    const { code, output, late } = await run([Deno.execPath(), "run", "-A", file], dir, 30);
    ok(code === 0 && !late, `${file}: ${output}\n${codes[index]}`);
  }
});

test("the README's programs serve their tools on each runtime, from an empty folder and with its commands", async (t) => {
  const table = readme.match(/^\|\s*\| install[^]*?\n\n/m)![0];
  const rows = [...table.matchAll(/^\| (\w+)\s*\| `([^`]*)`\s*\| `([^`]*)`/gm)].map(([, ...cells]) => cells);
  equal(rows.map(([name]) => name), ["Deno", "Bun", "Node"]);
  const { found } = await runtimes();
  for (const [name, install, serve] of rows) {
    const runtime = found.find((runtime) => runtime.name === name);
    await t.test(name!, { skip: runtime ? false : "not on this machine" }, async (t) => {
      const bin = temporaryFolder(t);
      Deno.symlinkSync(runtime!.command[0]!, `${bin}/${name!.toLowerCase()}`);
      const env = { PATH: `${bin}:${Deno.env.get("PATH")}` };
      const dir = temporaryFolder(t);
      const installed = await run(["env", `PATH=${env.PATH}`, "bash", "-ec", install!], dir, 120);
      equal(installed.code, 0, installed.output);
      Deno.copyFileSync(new URL("mod.ts", root), `${dir}/mod.ts`);
      const programs = blocks("ts").filter((block) => block.includes("\nserve({"));
      equal(programs.length, 2);
      const [first, notes] = await Promise.all(programs.map(async (program, index) => {
        const folder = `${dir}/${index}`; // what was installed above is found from here, too
        Deno.mkdirSync(folder);
        Deno.copyFileSync(new URL("mod.ts", root), `${folder}/mod.ts`);
        const port = freePort();
        Deno.writeTextFileSync(`${folder}/server.ts`, program.replaceAll("8050", String(port)));
        const output = start(t, serve!, folder, env);
        equal(await until(() => statusOf(port), output), 401);
        return { port, password: await until(() => output().match(/[a-z1-9]{5}(-[a-z1-9]{5}){3}/)?.[0], output) };
      }));
      const { access_token } = await new Client(ownerKnows(first!.password, overHttp(first!.port))).connect();
      equal(await addByTool(first!.port, access_token), "3");
      const owner = new Owner({ url: `http://localhost:${notes!.port}`, password: notes!.password, state: 1 });
      for (const load of [loadSdk1, loadSdk2]) await asksForMore(t, owner, notes!.port, await load());
    });
  }
});

/** A client reads, is refused when it writes, asks, the owner approves, and it goes on. */
async function asksForMore(t: TestContext, owner: Owner, port: number, sdk: Sdk): Promise<void> {
  const url = new URL(`http://localhost:${port}/mcp`);
  let page = "";
  const app = new App({
    atClose: (close) => t.after(async () => void await close()),
    open: (url) => page = url,
    approveFor: async () => void await (await fetch(await owner.approve(page))).body?.cancel(),
  });
  const read = async () => {
    const session = await sdk.connect(url, app);
    const result = await session.callTool({ name: "read_notes", arguments: {} });
    await session.close();
    return JSON.stringify(result);
  };
  const note = crypto.randomUUID();
  const write = { name: "write_note", arguments: { note } };
  const before = owner.approvals;

  ok(!(await read()).includes(note));
  equal([app.kept.tokens?.scope, owner.approvals - before], ["notes:read", 1]);
  ok(owner.asked.includes("read your notes") && !owner.asked.includes("change your notes"), owner.asked);

  const call = { jsonrpc: "2.0", id: 1, method: "tools/call", params: write };
  for (const body of [call, [call]]) {
    const refused = await fetch(url, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "Authorization": `Bearer ${app.kept.tokens!.access_token}`,
      },
      body: JSON.stringify(body),
    });
    await refused.body?.cancel();
    equal(refused.status, 403);
    match(refused.headers.get("WWW-Authenticate")!, /error="insufficient_scope".*scope="notes:read notes:write"/);
  }

  match(JSON.stringify(await sdk.callWithMore(url, app, write)), /Written/);
  equal(owner.approvals - before, 2);
  ok(owner.asked.includes("change your notes"), owner.asked);
  ok(app.kept.tokens?.scope?.split(" ").includes("notes:write"), app.kept.tokens?.scope);
  ok((await read()).includes(note));
  equal(owner.approvals - before, 2); // it goes on without being asked again
}

/** Types the password wherever the page is sent. */
function ownerKnows(password: string, carry: Carrier): Carrier {
  return (path, init) =>
    carry(path, path === "/authorize" ? { ...init, body: `${init?.body}&password=${password}` } : init);
}

async function addByTool(port: number, token: string): Promise<string> {
  const client = new McpClient({ name: "readme", version: "1" });
  const requestInit = { headers: { Authorization: `Bearer ${token}` } };
  await client.connect(new StreamableHTTPClientTransport(new URL(`http://127.0.0.1:${port}/mcp`), { requestInit }));
  try {
    const { content } = await client.callTool({ name: "add", arguments: { a: 1, b: 2 } });
    return (content as { text: string }[])[0]!.text;
  } finally {
    await client.close();
  }
}

test("the README shows the stores as they are in .ci/stores/", () => {
  for (const name of ["redis.ts", "postgres.ts", "durable-object.ts"]) {
    const [, ...rest] = read(`.ci/stores/${name}`).split("\n");
    ok(rest.length <= 41, `${name} has more than 40 lines`);
    const shown = ['import type { Store } from "@personal-auth/mcp";', ...rest].join("\n");
    ok(blocks("ts").includes(shown), `copy .ci/stores/${name} into README.md, with this first line:\n${shown}`);
  }
});

test("the README's line for kvStore type-checks and works on each runtime", async (t) => {
  const lines = [...readme.matchAll(/^- \*\*Deno KV, from (\w+)\*\*: `([^`]*)`/gm)].map(([, ...found]) => found);
  equal(lines.map(([name]) => name), ["Deno", "Node", "Bun"]);
  const { found } = await runtimes();
  const dir = temporaryFolder(t);
  Deno.copyFileSync(new URL("mod.ts", root), `${dir}/mod.ts`);
  Deno.writeTextFileSync(`${dir}/deno.json`, '{ "unstable": ["kv"], "nodeModulesDir": "manual", "lock": false }');
  Deno.writeTextFileSync(`${dir}/package.json`, '{ "type": "module" }');
  const installed = await run(["npm", "install", "--no-audit", "--no-fund", "hono@4", "@deno/kv@0.14"], dir, 120);
  equal(installed.code, 0, installed.output);
  for (const [name, code] of lines) {
    const runtime = found.find((runtime) => runtime.name === name);
    await t.test(name!, { skip: runtime ? false : "not on this machine" }, async () => {
      const program = [
        'import { kvStore } from "./mod.ts";',
        ...(name === "Deno" ? [] : ['import { openKv } from "@deno/kv";']),
        "const url = import.meta.dirname + `/${crypto.randomUUID()}`;",
        "async function work(open: () => Promise<ReturnType<typeof kvStore>>) {",
        "  const store = await open();",
        '  await store.update("key", () => ({ text: "漢" }));',
        '  console.log(JSON.stringify(await store.get("key")));',
        "  store.close!();",
        "}",
        `await work(async () => ${code!.replace("openKv()", "openKv(url)")});`,
      ];
      const file = `${name}.ts`;
      Deno.writeTextFileSync(`${dir}/${file}`, program.join("\n"));
      const checked = await run([Deno.execPath(), "check", file], dir, 120);
      equal(checked.code, 0, checked.output);
      const [executable, ...before] = runtime!.command;
      const { code: status, output } = await run([executable!, ...before, file], dir, 60);
      ok(status === 0 && output.includes('{"text":"漢"}'), output);
    });
  }
});

test("the permissions that the README lists are enough for its example", async (t) => {
  const [command] = blocks("sh").flatMap((block) => block.split("\n")).filter((line) => line.includes("--allow-net"));
  const dir = temporaryFolder(t);
  for (const file of ["mod.ts", "example.ts", "deno.json"]) Deno.copyFileSync(new URL(file, root), `${dir}/${file}`);
  const port = freePort();
  const serve = command!.replace("deno run", `'${Deno.execPath()}' run --no-prompt`).replace("server.ts", "example.ts");
  const output = start(t, serve, dir, { PORT: String(port) });
  equal(await until(() => statusOf(port), output), 401);
  const password = await until(() => output().match(/[a-z1-9]{5}(-[a-z1-9]{5}){3}/)?.[0], output);
  await new Client(ownerKnows(password, overHttp(port))).connect();
  ok(!output().includes("error"), output());
});

test("the README names every option, and no other", () => {
  const options = read("mod.ts").match(/export interface PersonalAuthOptions \{\n([^]*?)\n\}\n/)![1]!;
  const declared = [...options.matchAll(/^ {2}(\w+)\??:/gm)].map(([, name]) => name!);
  const table = readme.match(/^## Options\n\n([^]*?)\n## /m)![1]!;
  const described = [...table.matchAll(/^\| `(\w+)`/gm)].map(([, name]) => name!);
  equal(described.toSorted(), declared.toSorted());
});

test("the README names tests that exist", () => {
  const table = readme.match(/^<summary>Each threat.*<\/summary>\n\n([^]*?)\n\n/m)![1]!;
  const tests = [...read("mod_test.ts").matchAll(/^test\(\s*"((?:[^"\\]|\\.)*)"/gm)].map(([, name]) => name!);
  const named = [...table.matchAll(/"([^"]+)"/g)].map(([, name]) => name!);
  ok(named.length >= 13 && tests.length > 100);
  for (const name of named) ok(tests.some((test) => test.includes(name)), `no test begins with "${name}"`);
});

test("the README says what newcomers trip over", () => {
  const warnings = [
    "`.oauth-state/` into `.gitignore`",
    "(2.1.186 or later",
    "with `--cli`, set `MCP_AUTO_OPEN_ENABLED=true`",
  ];
  for (const text of warnings) ok(readme.includes(text), text);
});

test("the README shows at most 240 lines", () => {
  const shown = readme.replaceAll(/^<details>\n(<summary>.*<\/summary>\n)[^]*?^<\/details>\n/gm, "$1");
  ok(!shown.includes("details>") && shown.split("\n").length <= 241, `${shown.split("\n").length - 1} lines`);
});

test("what the README links to is there", () => {
  const links = [...readme.matchAll(/\]\(([^)]+)\)|src(?:set)?="([^"]+)"/g)].map(([, link, picture]) =>
    link ?? picture!
  );
  ok(links.length > 5);
  for (const link of links.filter((link) => !link.startsWith("https:"))) {
    if (link.startsWith("#")) ok(readme.includes(`\n## ${link[1]!.toUpperCase()}${link.slice(2)}\n`), link);
    else ok(Deno.statSync(new URL(link, root)).isFile, link);
  }
});

test("the README's first command serves within a minute, as pasted", async (t) => {
  const [first] = blocks("sh")[0]!.split("\n");
  equal(first, "npx -y deno run -A example.ts");
  const dir = temporaryFolder(t);
  for (const file of ["mod.ts", "example.ts", "deno.json"]) Deno.copyFileSync(new URL(file, root), `${dir}/${file}`);
  const port = freePort();
  const output = start(t, first!, dir, { PORT: String(port) });
  equal(await until(() => statusOf(port), output), 401);
});
