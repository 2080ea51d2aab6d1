/**
 * The server for the clients that live at their vendors: `example.ts` with ChatGPT on its list. No request leaves the
 * machine: what these clients publish is in DOCUMENTS, a JSON object of bodies by URL. Runs on all three runtimes.
 *
 * @module
 */

import process from "node:process";
import { serve } from "@hono/node-server";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { WebStandardStreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/webStandardStreamableHttp.js";
import { Hono } from "hono";
import { z } from "zod";
import { type AuthInfo, fileStore, personalAuth, redirects } from "../../mod.ts";

const { PORT, BASE_URL = "", OWNER_PASSWORD, STATE_DIR = "", DOCUMENTS = "{}" } = process.env;
const documents = JSON.parse(DOCUMENTS);

const auth = personalAuth({
  baseUrl: BASE_URL,
  password: OWNER_PASSWORD,
  store: fileStore(STATE_DIR),
  allowedRedirectDomains: [...redirects.claude, ...redirects.chatgpt],
  fetchClientMetadata: (url) =>
    Promise.resolve(url in documents ? Response.json(documents[url]) : new Response(null, { status: 404 })),
});

async function handleMcp(request: Request, authInfo: AuthInfo): Promise<Response> {
  const server = new McpServer({ name: "hosted", version: "1.0.0" });
  const text = (text: string) => ({ content: [{ type: "text" as const, text }] });
  const greet = ({ name }: { name: string }) => text(`Hello, ${name}!`);
  const add = ({ a, b }: { a: number; b: number }) => text(String(a + b));
  server.registerTool("greet", { inputSchema: { name: z.string() } }, greet);
  server.registerTool("add", { inputSchema: { a: z.number(), b: z.number() } }, add);
  const transport = new WebStandardStreamableHTTPServerTransport({ enableJsonResponse: true });
  await server.connect(transport);
  return await transport.handleRequest(request, { authInfo });
}

const app = new Hono();
app.route("/", auth);
app.all("/mcp", auth.guard, (c) => handleMcp(c.req.raw, c.var.auth));

const server = serve({ fetch: app.fetch, hostname: "127.0.0.1", port: Number(PORT) });
process.once("SIGTERM", () => server.close(() => process.exit(0)));
