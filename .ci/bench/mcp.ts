/** The MCP server of example.ts: two tools, one server and one transport for each request. */

import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { WebStandardStreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/webStandardStreamableHttp.js";
import { z } from "zod";

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

export async function handleMcp(request: Request): Promise<Response> {
  const transport = new WebStandardStreamableHTTPServerTransport({ enableJsonResponse: true });
  await mcpServer().connect(transport);
  return await transport.handleRequest(request);
}
