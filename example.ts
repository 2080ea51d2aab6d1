/**
 * A personal MCP server with two small tools, behind `personalAuth()`.
 *
 *     npx -y deno run -A example.ts        (or: bun example.ts, node example.ts)
 *
 * Environment: `HOST` (127.0.0.1; 0.0.0.0 in a container), `PORT` (8050), `BASE_URL` (http://localhost:PORT),
 * `OWNER_PASSWORD` (absent: one is generated, and printed until the first sign-in) and `STATE_DIR` (.oauth-state).
 *
 * @module
 */

import process from "node:process";
import { serve } from "@hono/node-server";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { WebStandardStreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/webStandardStreamableHttp.js";
import { Hono } from "hono";
import { z } from "zod";
import { type AuthInfo, fileStore, personalAuth } from "./mod.ts";

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

/** Reads the environment and serves. */
function main(): void {
  const { HOST = "127.0.0.1", PORT = "8050", OWNER_PASSWORD, STATE_DIR = ".oauth-state" } = process.env;
  const { BASE_URL = `http://localhost:${PORT}` } = process.env;
  const port = Number(PORT);
  if (!(Number.isInteger(port) && port > 0 && port < 65536)) throw new Error(`PORT must be 1 to 65535, not "${PORT}"`);

  const store = fileStore(STATE_DIR);
  const auth = personalAuth({ baseUrl: BASE_URL, store, ...(OWNER_PASSWORD && { password: OWNER_PASSWORD }) });

  const app = new Hono();
  app.route("/", auth); // the OAuth endpoints and the owner's pages
  app.post(auth.mcpPath, auth.guard, (c) => handleMcp(c.req.raw, c.var.auth)); // only with a valid token
  app.all(auth.mcpPath, auth.guard, (c) => c.text("This server speaks over POST only", 405, { Allow: "POST" }));

  const server = serve({ fetch: app.fetch, hostname: HOST, port }, () => {
    process.off("uncaughtException", stop); // from here on an error is a fault in the code, and is shown in full
    server.off("error", stop);
    const password = OWNER_PASSWORD ? "set by OWNER_PASSWORD" : "printed here at every start until you first sign in";
    console.log(`Listening on port ${PORT} of ${HOST}

  Claude Code:      claude mcp add --transport http personal ${BASE_URL}/mcp
                    claude mcp login personal
  claude.ai:        ${whatToTypeAtClaude(BASE_URL)}
  Connections:      ${BASE_URL}/connections
  Password:         ${password}
                    forgotten? start once with OWNER_PASSWORD=…
  State is kept in: ${STATE_DIR}
`);
  });
  server.on("error", stop);

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
}

function whatToTypeAtClaude(baseUrl: string): string {
  return baseUrl.startsWith("https:")
    ? `Customize → Connectors → Add, and type ${baseUrl}/mcp`
    : "cannot reach this address; set BASE_URL to an https address, as README.md says under Deploy";
}

/** Ends the program with one sentence, which names what to change in the environment and not in the code. */
function stop(error: unknown): never {
  const { code = "", name, message } = error as Error & { code?: string };
  const wrongHost = "HOST is no address of this computer: leave it out, or set it to 0.0.0.0";
  const advice: Record<string, string> = {
    EADDRINUSE: "The port is in use: set PORT to another one, or end the program that uses it",
    EACCES: "This user may not use the port: set PORT to one above 1023",
    EADDRNOTAVAIL: wrongHost,
    EINVAL: wrongHost,
    ENOTFOUND: wrongHost,
    NotCapable: "Deno was started without a permission; README.md lists what is needed",
  };
  const inEnvironment = message.replace("baseUrl", "BASE_URL").replace(/^password/, "OWNER_PASSWORD")
    .replace(/fileStore(\(\)|: dir)?/, "STATE_DIR");
  const known = advice[code] ?? advice[name];
  console.error(known ? `${known}. (${message})` : inEnvironment);
  process.exit(1);
}

process.once("uncaughtException", stop); // Deno throws where nobody can catch it if it may not listen
try {
  main();
} catch (error) {
  stop(error);
}
