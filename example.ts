/**
 * A personal MCP server with two small tools, behind `personalAuth()`.
 *
 *     npx -y deno run -A example.ts        (or: bun example.ts, node example.ts)
 *
 * Environment: `PORT` (8050), `BASE_URL` (http://localhost:PORT), `OWNER_PASSWORD` (absent: one is generated and
 * printed at the first start) and `STATE_DIR` (.oauth-state).
 *
 * @module
 */

import process from "node:process";
import { serve } from "@hono/node-server";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { WebStandardStreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/webStandardStreamableHttp.js";
import type { AuthInfo } from "@modelcontextprotocol/sdk/server/auth/types.js";
import { Hono } from "hono";
import { z } from "zod";
import { type AuthEnv, fileStore, personalAuth } from "./mod.ts";

const { PORT = "8050", OWNER_PASSWORD, STATE_DIR = ".oauth-state" } = process.env;
const { BASE_URL = `http://localhost:${PORT}` } = process.env;

/** Your server: change the tools to your own. One is made for each request, so no state is shared between clients. */
function mcpServer(): McpServer {
  const server = new McpServer({ name: "personal-mcp", version: "1.0.0" }, {
    instructions: "A small personal server: greet somebody, or add two numbers.",
  });
  server.registerTool("greet", {
    description: "Greet a person by name",
    inputSchema: { name: z.string().describe("Whom to greet") },
  }, ({ name }: { name: string }) => ({ content: [{ type: "text", text: `Hello, ${name}!` }] }));
  server.registerTool("add", {
    description: "Add two numbers",
    inputSchema: { a: z.number(), b: z.number() },
  }, ({ a, b }: { a: number; b: number }) => ({ content: [{ type: "text", text: String(a + b) }] }));
  return server;
}

/** Answers one MCP request, without sessions: hosted clients do not keep to one connection. */
async function handleMcp(request: Request, authInfo: AuthInfo): Promise<Response> {
  // Some clients accept anything, or do not say; the transport wants both of its formats named.
  const accept = request.headers.get("Accept");
  if (!accept || accept.includes("*/*")) {
    const headers = new Headers(request.headers);
    headers.set("Accept", "application/json, text/event-stream");
    request = new Request(request.url, { method: request.method, headers, body: await request.text() });
  }
  const transport = new WebStandardStreamableHTTPServerTransport({ enableJsonResponse: true });
  await mcpServer().connect(transport);
  return await transport.handleRequest(request, { authInfo });
}

const store = fileStore(STATE_DIR);
const auth = personalAuth({ baseUrl: BASE_URL, store, ...(OWNER_PASSWORD && { password: OWNER_PASSWORD }) });

const app = new Hono<AuthEnv>();
app.route("/", auth); // the OAuth endpoints, the owner's pages, and the guard in front of the next line
app.post(auth.mcpPath, (c) => handleMcp(c.req.raw, c.var.auth)); // reached only with a valid token
app.all(auth.mcpPath, (c) => c.text("This server speaks over POST only", 405, { Allow: "POST" }));

const server = serve({ fetch: app.fetch, port: Number(PORT) }, () => {
  console.log(`Listening on port ${PORT}`);
  console.log(`Type this into Claude: ${BASE_URL}/mcp`);
  console.log(`State is kept in:      ${STATE_DIR}`);
});

for (const signal of ["SIGINT", "SIGTERM"]) {
  process.once(signal, () => {
    server.close(async () => {
      await store.close?.();
      process.exit(0);
    });
    if ("closeAllConnections" in server) {
      server.closeIdleConnections();
      setTimeout(() => server.closeAllConnections(), 2000).unref(); // whoever is being answered gets two seconds
    }
  });
}
