/** A small MCP server, made anew with its transport for each request, as example.ts does. */

import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { WebStandardStreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/webStandardStreamableHttp.js";
import { z } from "zod";

const word = z.string().describe("Any word");

export async function handleMcp(request: Request): Promise<Response> {
  const server = new McpServer({ name: "bench", version: "1.0.0" });
  for (const name of ["repeat", "reverse"]) {
    server.registerTool(
      name,
      { description: `To ${name} a word`, inputSchema: { word } },
      ({ word }: { word: string }) => ({
        content: [{ type: "text", text: name === "repeat" ? word : [...word].reverse().join("") }],
      }),
    );
  }
  const transport = new WebStandardStreamableHTTPServerTransport({ enableJsonResponse: true });
  await server.connect(transport);
  return await transport.handleRequest(request);
}
