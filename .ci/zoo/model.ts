/**
 * A language model that takes no account: it calls the server's `add` tool once, and repeats what came out of it and
 * which tools it was offered. With it, the programs that only let a model call tools run as they are, over the
 * protocols of both vendors.
 *
 * @module
 */

import { type Pen, TERMS } from "./kit.ts";

/** What both protocols have in a request, as far as it is read here. */
interface Prompt {
  model?: string;
  stream?: boolean;
  tools?: Tool[];
  /** Messages API. */
  messages?: { content: string | { type: string; content?: unknown }[] }[];
  /** Responses API. */
  input?: { type: string; output?: unknown }[];
}

interface Tool {
  name?: string;
  /** Codex puts the tools of a server together. */
  tools?: Tool[];
}

/** Starts the model for the programs of a pen, and returns its base URL. */
export function startModel(pen: Pen): string {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, answer);
  pen.atClose(() => server.shutdown());
  return `http://127.0.0.1:${server.addr.port}`;
}

async function answer(request: Request): Promise<Response> {
  const { pathname } = new URL(request.url);
  const protocol = { "/v1/messages": messages, "/v1/responses": responses }[pathname];
  if (request.method !== "POST" || !protocol) {
    await request.body?.cancel();
    return Response.json({ error: { type: "not_found_error", message: "not here" } }, { status: 404 });
  }
  const prompt = await request.json() as Prompt;
  const offered = (prompt.tools ?? []).flatMap(({ name = "", tools }) =>
    tools ? tools.map((tool) => `${name}__${tool.name}`) : [name]
  );
  return protocol(prompt, offered.filter((name) => name.includes("zoo_")));
}

/** Anthropic's Messages API. */
function messages({ model, stream, messages = [] }: Prompt, tools: string[]): Response {
  const parts = messages.flatMap(({ content }) => typeof content === "string" ? [] : content);
  const result = parts.find(({ type }) => type === "tool_result");
  const name = result ? undefined : addTool(tools);
  const text = conclusion(result?.content, tools);
  const block = name ? { type: "tool_use", id: "toolu_zoo", name, input: TERMS } : { type: "text", text };
  const stop = { stop_reason: name ? "tool_use" : "end_turn", stop_sequence: null };
  const usage = { input_tokens: 1, output_tokens: 1 };
  const message = { id: "msg_zoo", type: "message", role: "assistant", model, content: [block], ...stop, usage };
  if (!stream) return Response.json(message);
  const delta = name ? { type: "input_json_delta", partial_json: JSON.stringify(TERMS) } : { type: "text_delta", text };
  return events([
    { type: "message_start", message: { ...message, content: [], stop_reason: null } },
    { type: "content_block_start", index: 0, content_block: { ...block, ...(name ? { input: {} } : { text: "" }) } },
    { type: "content_block_delta", index: 0, delta },
    { type: "content_block_stop", index: 0 },
    { type: "message_delta", delta: stop, usage },
    { type: "message_stop" },
  ]);
}

/** OpenAI's Responses API. */
function responses({ input = [] }: Prompt, tools: string[]): Response {
  const result = input.find(({ type }) => type === "function_call_output");
  const name = result ? undefined : addTool(tools);
  const namespace = name?.replace(/_+add$/, "");
  const text = conclusion(result?.output, tools);
  const item = name
    ? { type: "function_call", call_id: "call_zoo", namespace, name: "add", arguments: JSON.stringify(TERMS) }
    : { type: "message", role: "assistant", content: [{ type: "output_text", text }] };
  const usage = { input_tokens: 1, output_tokens: 1, total_tokens: 2 };
  return events([
    { type: "response.created", response: { id: "resp_zoo" } },
    { type: "response.output_item.done", item },
    { type: "response.completed", response: { id: "resp_zoo", usage } },
  ]);
}

function addTool(tools: string[]): string | undefined {
  return tools.find((name) => name.endsWith("_add"));
}

function conclusion(result: unknown, tools: string[]): string {
  return `The tool answered ${JSON.stringify(result) ?? "nothing"}. On offer: ${tools.join(", ") || "nothing"}.`;
}

function events(list: { type: string; [member: string]: unknown }[]): Response {
  const body = list.map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`).join("");
  return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
}
