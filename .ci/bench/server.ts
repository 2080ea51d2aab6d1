/**
 * A server to be measured, on any of the three runtimes: `server.ts KIND [DIR]`. It prints one line of JSON when it
 * listens, and another with a token if there is one; answers each line on its standard input with the processor time
 * and memory it has used; and ends when its standard input does, so that none is ever left over.
 *
 *     hono             a bare Hono app with a trivial handler
 *     hono-middleware  the same behind a middleware that reads the Authorization header and does nothing
 *     hono-guarded     the same behind the guard, on the state folder DIR
 *     mcp, mcp-middleware, mcp-guarded   the same three around the MCP server of example.ts
 *
 * @module
 */

import process from "node:process";
import { createInterface } from "node:readline";
import { serve } from "@hono/node-server";
import { Hono, type MiddlewareHandler } from "hono";
import type { AuthEnv, PersonalAuth } from "../../mod.ts";

const [kind = "hono", dir = ""] = process.argv.slice(2);

/** The least that any guard does. */
const readsHeader: MiddlewareHandler<AuthEnv> = async (c, next) => {
  if (c.req.header("Authorization") === undefined) return c.text("unauthorized", 401);
  await next();
};

const app = new Hono<AuthEnv>();
let auth: PersonalAuth | undefined;
if (kind.endsWith("-guarded")) {
  // Only here, so that the others start as a program does that has never heard of it.
  const { fileStore, personalAuth }: typeof import("../../mod.ts") = await import(
    process.env.BENCH_MOD ?? "../../mod.ts"
  );
  const store = fileStore(dir);
  auth = personalAuth({ baseUrl: "http://localhost:8050", store, authenticateOwner: () => true, onEvent: () => {} });
  app.route("/", auth);
} else if (kind.endsWith("-middleware")) app.use("/mcp/*", readsHeader);
if (kind.startsWith("mcp")) {
  const { handleMcp } = await import("./mcp.ts");
  app.post("/mcp", (c) => handleMcp(c.req.raw));
} else app.all("/mcp", (c) => c.text("hello"));

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
