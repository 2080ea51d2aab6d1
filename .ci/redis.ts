/**
 * The Redis store of the README, as it stands there, against a real `redis-server` on a free port of this machine: the
 * contract that every store keeps, and two servers behind one Redis. Run with
 * `deno test -A --filter redisStore .ci/redis.ts`: the filter leaves out the tests that come along with the contract.
 */

import { deepStrictEqual as equal, ok } from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { Hono } from "npm:hono@^4.13.19";
import { createClient } from "npm:redis@5";
import { type AuthEnv, personalAuth, type Store } from "../mod.ts";
import { storeContract } from "../mod_test.ts";

const root = new URL("../", import.meta.url);

async function succeeds(command: string, ...args: string[]): Promise<boolean> {
  const quiet = { args, stdin: "null", stdout: "null", stderr: "null" } as const;
  return await new Deno.Command(command, quiet).output().then(({ success }) => success, () => false);
}

const hasRedis = await succeeds("redis-server", "--version") ||
  (await succeeds("apt-get", "update", "-qq") && await succeeds("apt-get", "install", "-y", "-qq", "redis-server"));
const skip = hasRedis ? false : "no redis-server here, and none to be installed";

/** The README's block, made a module that finds its imports. */
async function readmeStore(): Promise<(redis: unknown) => Store> {
  const readme = await Deno.readTextFile(new URL("README.md", root));
  const block = readme.match(/^```ts\n((?:(?!^```)[^])*redisStore(?:(?!^```)[^])*)^```$/m)?.[1];
  ok(block, "the README has no redisStore");
  const file = await Deno.makeTempFile({ suffix: ".ts" });
  try {
    await Deno.writeTextFile(
      file,
      block.replace('"@personal-auth/mcp"', `"${new URL("mod.ts", root)}"`).replace('"redis"', '"npm:redis@5"'),
    );
    return (await import(`file://${file}`)).redisStore;
  } finally {
    await Deno.remove(file);
  }
}

/** A Redis of its own for a test, and clients of it. */
async function startRedis(t: TestContext): Promise<() => Promise<Store>> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr as Deno.NetAddr;
  listener.close();
  const dir = await Deno.makeTempDir();
  const args = ["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", dir];
  const server = new Deno.Command("redis-server", { args, stdout: "null", stderr: "null" }).spawn();
  // deno-lint-ignore no-explicit-any
  const clients: any[] = [];
  t.after(async () => {
    for (const client of clients) client.destroy();
    server.kill("SIGKILL");
    await server.status;
    await Deno.remove(dir, { recursive: true });
  });
  const redisStore = await readmeStore();
  return async () => {
    const client = createClient({ url: `redis://127.0.0.1:${port}` });
    client.on("error", () => {}); // until the server listens, connecting is tried again
    clients.push(client);
    return redisStore(await client.connect());
  };
}

test("redisStore() keeps the contract of a store", { skip }, async (t) => {
  await storeContract(await startRedis(t));
});

test("redisStore() lets two servers serve one set of connections", { skip }, async (t) => {
  const open = await startRedis(t);
  const BASE = "https://mcp.example.com";
  const redirect_uri = "https://claude.ai/api/mcp/auth_callback";
  const apps = await Promise.all([open(), open()].map(async (store) => {
    const app = new Hono<AuthEnv>();
    app.route(
      "/",
      personalAuth({ baseUrl: BASE, store: await store, authenticateOwner: () => true, onEvent: () => {} }),
    );
    return app.all("/mcp", (c) => c.text("in"));
  }));
  const [one, two] = apps as [Hono<AuthEnv>, Hono<AuthEnv>];
  const post = async (app: Hono<AuthEnv>, path: string, fields: Record<string, string>, headers = {}) =>
    await app.request(BASE + path, { method: "POST", headers, body: new URLSearchParams(fields) });
  const registration = await one.request(`${BASE}/register`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ redirect_uris: [redirect_uri], client_name: "Claude" }),
  });
  const { client_id } = await registration.json();
  // RFC 7636, appendix B
  const code_verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
  const code_challenge = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
  const query = new URLSearchParams({
    response_type: "code",
    client_id,
    redirect_uri,
    code_challenge,
    code_challenge_method: "S256",
  });
  const page = await one.request(`${BASE}/authorize?${query}`);
  const text = await page.text();
  const field = (name: string) => text.match(`name="${name}" value="([^"]*)"`)![1]!.replaceAll("&amp;", "&");
  // shown by one server, approved at the other
  const fields = { request: field("request"), csrf: field("csrf"), decision: "approve" };
  const approved = await post(two, "/authorize", fields, { Cookie: page.headers.getSetCookie()[0]!.split(";")[0]! });
  const code = new URL(approved.headers.get("Location")!).searchParams.get("code")!;
  const answers = await Promise.all(
    apps.map((app) => post(app, "/token", { grant_type: "authorization_code", client_id, code, code_verifier })),
  );
  equal(answers.map(({ status }) => status).sort(), [200, 400]);
  const { access_token, refresh_token } = await answers.find(({ ok }) => ok)!.json();
  const call = async (app: Hono<AuthEnv>) =>
    (await app.request(`${BASE}/mcp`, { headers: { Authorization: `Bearer ${access_token}` } })).status;
  equal([await call(one), await call(two)], [200, 200]);
  const refreshed = await Promise.all([one, two, one, two].map(async (app) => {
    const { refresh_token: next } =
      await (await post(app, "/token", { grant_type: "refresh_token", client_id, refresh_token })).json();
    return next;
  }));
  equal(new Set(refreshed).size, 1);
  await post(two, "/revoke", { token: access_token, client_id });
  equal([await call(one), await call(two)], [401, 401]);
});
