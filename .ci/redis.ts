/**
 * The Redis store of the README, as it stands there, against a real `redis-server` on a free port of this machine: the
 * contract that every store keeps, and two server processes behind one Redis. Run with
 * `deno test -A --filter redisStore .ci/redis.ts`: the filter leaves out the tests that come along with the contract.
 */

import { ok } from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import { createClient } from "npm:redis@5";
import type { Store } from "../mod.ts";
import { storeContract } from "./stores/contract.ts";
import { Running } from "./lib/checks.ts";
import { Client, overHttp } from "./lib/client.ts";
import { agree } from "./lib/together.ts";

const root = new URL("../", import.meta.url);

async function succeeds(command: string, ...args: string[]): Promise<boolean> {
  const quiet = { args, stdin: "null", stdout: "null", stderr: "null" } as const;
  return await new Deno.Command(command, quiet).output().then(({ success }) => success, () => false);
}

const hasRedis = await succeeds("redis-server", "--version") ||
  (await succeeds("apt-get", "update", "-qq") && await succeeds("apt-get", "install", "-y", "-qq", "redis-server"));
const skip = hasRedis ? false : "no redis-server here, and none to be installed";

/** The README's block, made a module that finds its imports; its `open()` is what other processes call. */
async function readmeModule(t: TestContext): Promise<string> {
  const readme = await Deno.readTextFile(new URL("README.md", root));
  const block = readme.match(/^```ts\n((?:(?!^```)[^])*redisStore(?:(?!^```)[^])*)^```$/m)?.[1];
  ok(block, "the README has no redisStore");
  const file = await Deno.makeTempFile({ suffix: ".ts" });
  t.after(() => Deno.remove(file));
  const found = block.replace('"@personal-auth/mcp"', `"${new URL("mod.ts", root)}"`)
    .replace('"redis"', '"npm:redis@5"');
  await Deno.writeTextFile(
    file,
    `${found}
import { createClient as create } from "npm:redis@5";
export async function open(url: string) {
  // Until the server listens, connecting is tried again.
  return redisStore(await create({ url }).on("error", () => {}).connect() as never);
}
`,
  );
  return `file://${file}`;
}

/** A Redis of its own for a test. */
async function startRedis(t: TestContext): Promise<string> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr as Deno.NetAddr;
  listener.close();
  const dir = await Deno.makeTempDir();
  const args = ["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", dir];
  const server = new Deno.Command("redis-server", { args, stdout: "null", stderr: "null" }).spawn();
  t.after(async () => {
    server.kill("SIGKILL");
    await server.status;
    await Deno.remove(dir, { recursive: true });
  });
  return `redis://127.0.0.1:${port}`;
}

test("redisStore() keeps the contract of a store", { skip }, async (t) => {
  const url = await startRedis(t);
  const module = await readmeModule(t);
  const { redisStore } = await import(module);
  // deno-lint-ignore no-explicit-any
  const clients: any[] = [];
  t.after(() => clients.forEach((client) => client.destroy()));
  await storeContract(async () => {
    const client = createClient({ url });
    client.on("error", () => {});
    clients.push(client);
    return redisStore(await client.connect()) as Store;
  });
});

test("redisStore() lets two server processes serve one set of connections", { skip }, async (t) => {
  const env = { STORE_URL: await startRedis(t), STORE_MODULE: await readmeModule(t) };
  const script = fileURLToPath(new URL("lib/server.ts", import.meta.url));
  const servers = [1, 2].map(() => new Running(Deno.execPath(), ["run", "-A", script, "serve", "-"], env));
  t.after(() => Promise.all(servers.map((server) => server.kill())));
  const ports = await Promise.all(servers.map((server) => server.says(/listening on (\d+)/)));
  console.log(await agree(ports.map((port) => new Client(overHttp(port))), 10));
});
