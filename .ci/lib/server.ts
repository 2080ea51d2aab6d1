/**
 * A server to be ill-treated, on any of the three runtimes: `mod.ts` on a state folder, and routes below `/test` for
 * what a program does by calling it. It ends when its standard input does, so that none is ever left over.
 *
 *     server.ts serve DIR     prints "listening on PORT"
 *     server.ts create DIR    opens what an earlier run left in DIR, then makes new state folders without pause
 *
 * Environment: `TEST_CLOCK`, seconds that its clock is ahead, which `/test/clock` may then change; `STORE_MODULE` and
 * `STORE_URL`, a module whose `open()` makes a store to take the place of the file.
 *
 * @module
 */

import { readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { serve } from "@hono/node-server";
import { Hono } from "hono";
import { type AuthEnv, fileStore, OAuthError, personalAuth, type Store } from "../../mod.ts";
import { BASE } from "./client.ts";

const [mode, dir = ""] = process.argv.slice(2);
const { TEST_CLOCK, STORE_MODULE, STORE_URL } = process.env;

process.stdin.on("end", () => process.exit(0));
process.stdin.on("error", () => process.exit(0));
process.stdin.resume();

let ahead = Number(TEST_CLOCK ?? 0);
if (TEST_CLOCK !== undefined) {
  const now = Date.now;
  Date.now = () => now() + ahead * 1000;
}

const increment = (current: unknown) => (current as number | undefined ?? 0) + 1;

if (mode === "create") await create();
else await start();

async function start(): Promise<void> {
  const store: Store = STORE_MODULE ? await (await import(STORE_MODULE)).open(STORE_URL) : fileStore(dir);
  const auth = personalAuth({
    baseUrl: BASE,
    store,
    authenticateOwner: () => true,
    onEvent: ({ type, cause }) => {
      if (type === "server_error") console.error(type, cause instanceof Error ? cause.message : cause);
    },
  });

  /** The longest that the event loop stood still since it was last asked, in milliseconds. */
  let stillness = 0;
  let last = performance.now();
  setInterval(() => {
    const now = performance.now();
    stillness = Math.max(stillness, now - last - 20);
    last = now;
  }, 20);

  const app = new Hono<AuthEnv>();
  app.route("/", auth);
  app.all("/mcp", (c) => c.json(c.var.auth.extra));
  app.post("/test/token", async (c) => c.json(await auth.createToken(await c.req.json())));
  app.post("/test/revoke", async (c) => c.json({ revoked: await auth.revoke((await c.req.json()).id) }));
  app.post("/test/clock", async (c) => {
    ahead = (await c.req.json()).ahead;
    return c.json({ now: Date.now() / 1000 });
  });
  app.post("/test/count", async (c) => {
    const { key, times } = await c.req.json();
    await Promise.all(Array.from({ length: times }, () => store.update(key, increment)));
    return c.json({ value: await store.get(key) });
  });
  // As a tool does that searches or backs up files: to close them drops this process's locks on them (POSIX).
  app.post(
    "/test/read-files",
    (c) => c.json({ read: readdirSync(dir).map((name) => readFileSync(join(dir, name)).length) }),
  );
  app.get("/test/stillness", (c) => {
    const milliseconds = Math.round(stillness);
    stillness = 0;
    return c.json({ milliseconds });
  });
  app.onError((error, c) => {
    if (!(error instanceof OAuthError)) throw error;
    return c.json({ error: error.code }, error.status, error.headers);
  });

  const server = serve({ fetch: app.fetch, port: 0, hostname: "127.0.0.1" }, ({ port }) => {
    console.log(`listening on ${port}`);
  });
  process.once("SIGTERM", () => {
    server.close();
    Promise.resolve(store.close?.()).finally(() => process.exit(0));
  });
}

/** One new folder after the other, each acknowledged when its first entry is written. */
async function create(): Promise<void> {
  for (const name of readdirSync(dir)) {
    const folder = join(dir, name);
    const store = fileStore(folder);
    const value = await store.get("entry");
    // An unacknowledged one may have got as far as its folder only; it must be as good as new.
    const after = await store.update("entry", () => `${name} again`);
    store.close!();
    console.log(`found ${name} ${value ?? "nothing"} ${after === `${name} again`}`);
    rmSync(folder, { recursive: true });
  }
  console.log("creating");
  for (let i = 0;; i++) {
    const name = `${process.pid}-${i}`;
    const store = fileStore(join(dir, name));
    await store.update("entry", () => name);
    console.log(`made ${name}`);
    if (i % 2) store.close!();
    // The event loop must turn, or the end of the standard input would go unheard.
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
}
