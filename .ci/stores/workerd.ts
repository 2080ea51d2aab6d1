/**
 * The whole server in workerd, the runtime of Cloudflare Workers, with its state in a Durable Object: the journey of the
 * MCP SDK's client, the contract of a store, and kills.
 *
 *     npx -y deno run -A .ci/stores/workerd.ts [--kills N]
 *
 * @module
 */

import type { OAuthClientProvider } from "@modelcontextprotocol/sdk/client/auth.js";
import { Client as McpClient } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { join } from "node:path";
import { check, demand, finish, numberArgument, temporaryFolder, wantedRuntimes } from "../lib/checks.ts";
import { Client, type Json, overHttp } from "../lib/client.ts";
import { freePort, installClients, Process } from "../lib/engines.ts";
import { Ledger } from "../lib/ledger.ts";
import { pause } from "../lib/limits.ts";
import { ROOT } from "../lib/runtimes.ts";
import { distinct, expect } from "../lib/together.ts";

const KILLS = numberArgument("kills", 20);
const PASSWORD = "correct horse battery staple";

const [node] = await wantedRuntimes("node");
const STORE_PACKAGES = await installClients("miniflare@4", "esbuild@0");

interface Worker {
  url: string;
  port: number;
  process: Process;
}

async function work(dir: string, env: Record<string, string>): Promise<Worker> {
  const port = await freePort();
  const url = `http://localhost:${port}`;
  const answers = async () => {
    const asked = await fetch(`http://127.0.0.1:${port}/.well-known/oauth-authorization-server`).catch(() => undefined);
    await asked?.body?.cancel();
    return asked?.status === 200;
  };
  const host = join(ROOT, ".ci", "stores", "workerd_host.ts");
  const process = new Process([node!.command[0]!, host, String(port), dir], answers, {
    STORE_PACKAGES,
    BASE_URL: url,
    ...env,
  });
  await process.start();
  return { url, port, process };
}

/** Registers, has the owner approve, gets tokens, calls, refreshes, and calls again. */
async function journey(env: Record<string, string>): Promise<string> {
  const { url } = await work(join(temporaryFolder(), "state"), { OWNER_PASSWORD: PASSWORD, ...env });
  const kept: Json = {};
  let signIn = 0;
  const redirectUrl = "http://localhost:1/callback";
  const provider: OAuthClientProvider = {
    redirectUrl,
    clientMetadata: {
      client_name: "SDK client",
      redirect_uris: [redirectUrl],
      grant_types: ["authorization_code", "refresh_token"],
    },
    clientInformation: () => kept.information,
    saveClientInformation: (information: Json) => kept.information = information,
    tokens: () => kept.tokens,
    saveTokens: (tokens: Json) => kept.tokens = tokens,
    saveCodeVerifier: (verifier: string) => kept.verifier = verifier,
    codeVerifier: () => kept.verifier,
    async redirectToAuthorization(page: URL) {
      const started = performance.now();
      kept.code = await approve(page);
      signIn = performance.now() - started;
    },
  };
  const call = async (word: string): Promise<string> => {
    const transport = () => new StreamableHTTPClientTransport(new URL(`${url}/mcp`), { authProvider: provider });
    let [client, over] = [new McpClient({ name: "check", version: "1" }), transport()];
    try {
      await client.connect(over);
    } catch (error) {
      if (kept.code === undefined) throw error;
      await over.finishAuth(kept.code);
      [client, over] = [new McpClient({ name: "check", version: "1" }), transport()];
      await client.connect(over);
    }
    const { content } = await client.callTool({ name: "reverse", arguments: { word } }) as Json;
    await client.close();
    return content[0].text;
  };
  demand(await call("stressed") === "desserts", "the first call");
  const { refresh_token } = kept.tokens;
  kept.tokens = { ...kept.tokens, access_token: "pat_gone" };
  kept.code = undefined;
  demand(await call("drawer") === "reward", "a call after a refresh");
  demand(kept.tokens.refresh_token !== refresh_token && kept.code === undefined, "no refresh happened");
  return `register, approve (${Math.round(signIn)} ms with the password), token, call, refresh, call`;
}

/** The owner at a browser, who knows the password. */
async function approve(page: URL): Promise<string> {
  const shown = await fetch(page);
  const text = await shown.text();
  const field = (name: string) => text.match(`name="${name}" value="([^"]*)"`)![1]!.replaceAll("&amp;", "&");
  const body = new URLSearchParams({
    request: field("request"),
    csrf: field("csrf"),
    decision: "approve",
    password: PASSWORD,
  });
  const Cookie = shown.headers.getSetCookie().map((cookie) => cookie.split(";")[0]).join("; ");
  const answer = await fetch(page.origin + page.pathname, {
    method: "POST",
    headers: { Cookie, Origin: page.origin },
    body,
    redirect: "manual",
  });
  await answer.body?.cancel();
  demand(answer.status === 302, `approving was answered ${answer.status}`);
  return new URL(answer.headers.get("Location")!).searchParams.get("code")!;
}

/** The Worker of README.md, as somebody copies it. */
async function readme(): Promise<string> {
  const text = Deno.readTextFileSync(join(ROOT, "README.md"));
  const [worker] = text.match(/(?<=```ts\n)[^`]*export class Vault [^`]*(?=```)/)!;
  const settings = JSON.parse(text.match(/(?<=```json\n)[^`]*"durable_objects"[^`]*(?=```)/)![0]);
  demand(settings.migrations[0].new_sqlite_classes[0] === "Vault", "the class is not declared");
  const folder = temporaryFolder();
  Deno.writeTextFileSync(join(folder, "worker.ts"), worker);
  Deno.copyFileSync(join(ROOT, ".ci", "stores", "durable-object.ts"), join(folder, "durable-object.ts"));
  const env = { OWNER_PASSWORD: PASSWORD, WORKER: join(folder, "worker.ts"), PLAIN: "1" };
  const { port } = await work(join(temporaryFolder(), "state"), env);
  const carry = overHttp(port);
  const client = new Client((path, init) => {
    const body = path === "/authorize" ? { body: `${init?.body}&password=${encodeURIComponent(PASSWORD)}` } : {};
    return carry(path, { ...init, ...body });
  });
  const { access_token, refresh_token } = await client.connect();
  expect(await client.call(access_token), 200, "a call");
  expect(await client.refresh(refresh_token), 200, "a refresh");
  expect(await client.call("x"), 401, "a call with a wrong token");
  return "approve, token, call, refresh";
}

async function contract(): Promise<void> {
  const { url } = await work(join(temporaryFolder(), "state"), { CHECKS: "1" });
  const verdict = await (await fetch(`${url}/test/contract`)).text();
  demand(verdict === "kept", verdict);
}

async function agreement(): Promise<string> {
  const { port } = await work(join(temporaryFolder(), "state"), { CHECKS: "1" });
  const client: Client = await new Ledger().client(String(port));
  const { refresh_token } = await client.connect();
  const answers = await Promise.all(Array.from({ length: 1000 }, () => client.refresh(refresh_token)));
  expect(answers[0]!, 200, "a refresh");
  demand(distinct(answers) === 1, `${distinct(answers)} answers to one refresh token`);
  return `1,000 refreshes of one token: one answer`;
}

async function killed(): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const ledger = new Ledger();
  const { port, process } = await work(dir, { CHECKS: "1" });
  for (let kill = 1; kill <= KILLS; kill++) {
    const load = ledger.load(await ledger.client(String(port)), 8);
    await pause(100 + Math.random() * 300);
    await process.kill();
    await load.done;
    await process.start();
    await ledger.audit(await ledger.client(String(port)));
    demand(ledger.faults === "", `after kill ${kill}: ${ledger.faults}`);
  }
  await ledger.audit(await ledger.client(String(port)), true);
  demand(ledger.faults === "", ledger.faults);
  return `${KILLS} kills: nothing lost of ${ledger.acknowledged} acknowledged changes`;
}

await check("workerd: the SDK's journey", 120, () => journey({}));
await check("workerd without nodejs_compat: the SDK's journey", 120, () => journey({ PLAIN: "1" }));
await check("workerd: the Worker of README.md", 120, readme);
await check("workerd: the contract", 120, contract);
await check("workerd: parallel refreshes", 120, agreement);
await check("workerd: kills", 60 + KILLS * 10, killed);
await finish();
