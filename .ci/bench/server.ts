/**
 * A server to be measured, on any of the three runtimes: `server.ts KIND [STORE]`. It prints one line of JSON when it
 * listens, and another with a token if there is one; answers each line on its standard input with the processor time
 * and memory it has used; and ends when its standard input does, so that none is ever left over.
 *
 *     hono   a Hono app with a trivial handler
 *     mcp    one with the MCP server of example.ts
 *
 * The handler is at /unguarded, at /middleware behind a middleware that reads the Authorization header and does nothing,
 * and at /mcp behind `auth.guard`. STORE is the guard's state folder, or "memory"; without it, mod.ts is not imported.
 *
 * @module
 */

import process from "node:process";
import { createInterface } from "node:readline";
import { serve } from "@hono/node-server";
import { type Handler, Hono, type MiddlewareHandler } from "hono";
import type { AuthEnv, PersonalAuth } from "../../mod.ts";

const [kind = "hono", place = ""] = process.argv.slice(2);

/** The least that any guard does. */
const readsHeader: MiddlewareHandler<AuthEnv> = async (c, next) => {
  if (c.req.header("Authorization") === undefined) return c.text("unauthorized", 401);
  await next();
};

const app = new Hono<AuthEnv>();
let auth: PersonalAuth | undefined;
if (place) {
  const { fileStore, memoryStore, personalAuth }: typeof import("../../mod.ts") = await import(
    process.env.BENCH_MOD ?? "../../mod.ts"
  );
  const store = place === "memory" ? memoryStore() : fileStore(place);
  auth = personalAuth({ baseUrl: "http://localhost:8050", store, authenticateOwner: () => true, onEvent: () => {} });
  app.route("/", auth);
}
app.use("/middleware", readsHeader);
let handler: Handler<AuthEnv> = (c) => c.text("hello");
if (kind === "mcp") {
  const { handleMcp } = await import("./mcp.ts");
  handler = (c) => handleMcp(c.req.raw);
}
// A version that BENCH_MOD names may have no `auth.guard`: then its guard stands at the path alone.
if (auth && "guard" in auth) app.all("/mcp", auth.guard, handler);
for (const path of ["/mcp", "/middleware", "/unguarded"]) app.all(path, handler);

const write = (answer: unknown) => console.log(JSON.stringify(answer));

const server = serve({ fetch: app.fetch, port: 0, hostname: "127.0.0.1" }, ({ port }) => write({ port }));

const lines = createInterface({ input: process.stdin });
lines.on("line", async (line) => {
  if (line.includes("token")) return write({ token: (await auth?.createToken({ name: "load" }))?.token });
  const { user, system } = process.cpuUsage();
  write({ cpu: (user + system) / 1e6, memory: process.memoryUsage().rss });
});
lines.on("close", () => {
  server.close();
  process.exit(0);
});
