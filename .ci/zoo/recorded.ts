/**
 * The clients that cannot be run here, because they live at their vendors or need a desktop: what each was recorded to
 * send, in its order, with its headers and bodies. Whoever reads a row of these in the table learns that the server
 * answers these requests, and not that the program of today still sends them.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, type JsonWebKey, type KeyObject, randomBytes, sign } from "node:crypto";
import { mustShow, type Pen, SUM, TERMS } from "./kit.ts";
import { life, type Program } from "./programs.ts";

const TRIED = "its recorded requests, not the program";

// deno-lint-ignore no-explicit-any
type Json = any;

/** What tells one client from another on the wire. */
interface Recording {
  /** At the OAuth endpoints, and at the MCP server. */
  headers: { oauth: Record<string, string>; mcp: Record<string, string> };
  /** The first request, without a token. */
  probe: string;
  redirect_uri: string;
  /** The address of its metadata document; without one, it registers with this body. */
  client_id?: string;
  registration?: Json;
  /** Parameters of the authorization request beyond what all send. */
  more?: Record<string, string>;
  /** What it adds at the token endpoint. */
  credentials?: (issuer: string) => Record<string, string>;
}

const DISCOVER = { method: "server/discover", params: {} };
const INITIALIZE = {
  method: "initialize",
  params: { protocolVersion: "2025-11-25", capabilities: {}, clientInfo: { name: "Anthropic", version: "1.0.0" } },
};

function replay(name: string, client: string, recorded: string, recording: Recording, server: () => Json): Program {
  return {
    name,
    row: { client, tried: TRIED, version: `recorded in ${recorded}` },
    site: () => ({ script: "./hosted.ts", env: { DOCUMENTS: JSON.stringify(server()) } }),
    checks: (pen) => {
      const player = new Player(pen, recording);
      // Where the answer goes to a server of the vendor, the browser may be on any computer; a link stays on its own.
      const elsewhere = recording.redirect_uri.startsWith("https:") ? "any browser" : "–";
      return life(pen, {
        signIn: () => player.signIn(),
        use: () => player.use(),
        spoilToken: () => player.tokens.access_token = `${player.tokens.access_token.slice(0, -4)}0000`,
        elsewhere: { without: elsewhere },
      });
    },
  };
}

/** Sends what was recorded. */
class Player {
  tokens: { access_token: string; refresh_token: string } = { access_token: "", refresh_token: "" };
  readonly #pen: Pen;
  readonly #recording: Recording;
  #client: Record<string, string> = {};

  constructor(pen: Pen, recording: Recording) {
    this.#pen = pen;
    this.#recording = recording;
  }

  async signIn(): Promise<void> {
    const { headers, probe, redirect_uri, more } = this.#recording;
    const resource = this.#pen.server.mcpUrl;
    const refused = await this.#rpc(probe === "initialize" ? INITIALIZE : DISCOVER, headers.oauth);
    await refused.body?.cancel();
    const challenge = refused.headers.get("WWW-Authenticate") ?? "";
    const [, metadataUrl = "", scope = ""] = challenge.match(/^(?=.*resource_metadata="([^"]+)").*scope="([^"]+)"/) ??
      [];
    const metadata = await this.#read(metadataUrl);
    mustShow(JSON.stringify([refused.status, metadata.resource]), `[401,"${resource}"]`);
    const [issuer] = metadata.authorization_servers;
    const server = await this.#read(`${issuer}/.well-known/oauth-authorization-server`);
    await this.#identify(server);

    const verifier = randomBytes(32).toString("base64url");
    const state = randomBytes(32).toString("base64url");
    const query = new URLSearchParams({
      response_type: "code",
      client_id: this.#client.client_id!,
      redirect_uri,
      code_challenge: createHash("sha256").update(verifier).digest("base64url"),
      code_challenge_method: "S256",
      state,
      scope: `${scope} offline_access`,
      resource,
      ...more,
    });
    const address = await this.#pen.owner.approve(`${server.authorization_endpoint}?${query}`);
    const answer = Object.fromEntries(address.searchParams);
    if (!address.href.startsWith(`${redirect_uri}?`) || answer.state !== state || answer.iss !== issuer) {
      throw new Error(`the answer went to ${address.href}`);
    }
    await this.#read(`${issuer}/.well-known/oauth-authorization-server`); // again, from where the answer arrived
    const code = { grant_type: "authorization_code", code: answer.code!, code_verifier: verifier, redirect_uri };
    await this.#ask(code);
  }

  /** Takes the document's address for an id if the server says it may, or registers. */
  async #identify(server: Json): Promise<void> {
    const { client_id, registration, headers } = this.#recording;
    if (client_id) {
      mustShow(JSON.stringify(server), `"client_id_metadata_document_supported":true`, `"none"`);
      this.#client = { client_id };
      return;
    }
    const body = JSON.stringify(registration);
    const type = { "Content-Type": "application/json" };
    const answer = await fetch(server.registration_endpoint, {
      method: "POST",
      headers: { ...headers.oauth, ...type },
      body,
    });
    const { client_id: id, redirect_uris, token_endpoint_auth_method } = await answer.json();
    const got = `${answer.status} ${redirect_uris} ${token_endpoint_auth_method}`;
    mustShow(got, `201 ${registration.redirect_uris} none`);
    this.#client = { client_id: id };
  }

  async #read(url: string): Promise<Json> {
    const answer = await fetch(url, {
      headers: { "MCP-Protocol-Version": "2025-11-25", ...this.#recording.headers.oauth },
    });
    if (!answer.ok) throw new Error(`${url} was answered ${answer.status} ${await answer.text()}`);
    return await answer.json();
  }

  /** Asks the token endpoint. */
  async #ask(request: Record<string, string>): Promise<void> {
    const { url, mcpUrl } = this.#pen.server;
    const { headers, credentials } = this.#recording;
    const body = { ...request, resource: mcpUrl, ...this.#client, ...credentials?.(url) };
    const answer = await fetch(`${url}/token`, {
      method: "POST",
      headers: headers.oauth,
      body: new URLSearchParams(body),
    });
    if (!answer.ok) throw new Error(`/token was answered ${answer.status} ${await answer.text()}`);
    this.tokens = await answer.json();
  }

  async use(): Promise<void> {
    mustShow(await this.#call("tools/list", {}), "greet", "add");
    mustShow(await this.#call("tools/call", { name: "add", arguments: TERMS }), SUM);
  }

  async #call(method: string, params: Json): Promise<string> {
    const { access_token, refresh_token } = this.tokens;
    const headers = () => ({ ...this.#recording.headers.mcp, Authorization: `Bearer ${this.tokens.access_token}` });
    let answer = await this.#rpc({ method, params }, headers());
    if (answer.status === 401) {
      await answer.body?.cancel();
      // Another of its machines may have refreshed meanwhile; this one presents what it has read before.
      await this.#ask({ grant_type: "refresh_token", refresh_token });
      if (this.tokens.access_token === access_token) throw new Error("the refresh brought nothing new");
      answer = await this.#rpc({ method, params }, headers());
    }
    const text = await answer.text();
    if (!answer.ok) throw new Error(`${method} was answered ${answer.status} ${text}`);
    return text;
  }

  #rpc(message: Json, headers: Record<string, string>): Promise<Response> {
    const type = { "Content-Type": "application/json", "MCP-Protocol-Version": "2025-11-25" };
    const body = JSON.stringify({ jsonrpc: "2.0", id: 1, ...message });
    return fetch(this.#pen.server.mcpUrl, { method: "POST", headers: { ...type, ...headers }, body });
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Anthropic
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const CLAUDE = "https://claude.ai/oauth/mcp-oauth-client-metadata";
const CLAUDE_REDIRECT = "https://claude.ai/api/mcp/auth_callback";

/** One backend stands behind the web site, the apps for phones, and the connectors of Claude Desktop. */
export const claude: Program = replay("claude", "Claude on the web, the phone and the desktop", "2026-08", {
  headers: {
    oauth: { "User-Agent": "python-httpx/0.28.1", "Accept": "*/*" },
    mcp: { "User-Agent": "Claude-User", "Accept": "application/json, text/event-stream" },
  },
  probe: "initialize",
  client_id: CLAUDE,
  redirect_uri: CLAUDE_REDIRECT,
  more: { prompt: "consent" },
}, () => ({
  [CLAUDE]: {
    client_id: CLAUDE,
    client_name: "Claude",
    client_uri: "https://claude.ai",
    redirect_uris: [CLAUDE_REDIRECT],
    grant_types: ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:jwt-bearer"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  },
}));

const DESKTOP_REDIRECT = "claude://claude.ai/mcp-auth-callback/sdk";
const bun = { "User-Agent": "Bun/1.4.4", "Accept": "*/*" };

/** It drives the engine of Claude Code, with a link into the app in place of a port. */
export const claudeDesktopCode: Program = replay("claude-desktop", "Claude Desktop, Code tab", "2026-09", {
  headers: { oauth: bun, mcp: { ...bun, "Accept": "application/json, text/event-stream" } },
  probe: "server/discover",
  redirect_uri: DESKTOP_REDIRECT,
  registration: {
    client_name: "Claude Code (personal)",
    redirect_uris: [DESKTOP_REDIRECT],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
    application_type: "native",
    scope: "mcp offline_access",
  },
  more: { prompt: "consent" },
}, () => ({}));

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// OpenAI
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const CHATGPT = "https://chatgpt.com/oauth/client.json";
const CHATGPT_REDIRECT = "https://chatgpt.com/connector_platform_oauth_redirect";
const CHATGPT_KEYS = "https://chatgpt.com/oauth/jwks.json";

let pair: { publicKey: KeyObject; privateKey: KeyObject } | undefined;

/** The vendor's keys are not to be had: these stand in for them, in the document and in the assertions. */
const keys = () => pair ??= generateKeyPairSync("rsa", { modulusLength: 2048 });

const part = (value: unknown): string => Buffer.from(JSON.stringify(value)).toString("base64url");

/** It signs each request to the token endpoint (RFC 7523). */
function assertion(issuer: string): Record<string, string> {
  const now = Math.floor(Date.now() / 1000);
  const claims = { iss: CHATGPT, sub: CHATGPT, aud: `${issuer}/token`, iat: now, exp: now + 300 };
  const signed = `${part({ alg: "RS256", kid: "zoo" })}.${part({ ...claims, jti: crypto.randomUUID() })}`;
  return {
    client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    client_assertion: `${signed}.${sign("sha256", Buffer.from(signed), keys().privateKey).toString("base64url")}`,
  };
}

export const chatgpt: Program = replay("chatgpt", "ChatGPT", "2026-09", {
  headers: {
    oauth: { "User-Agent": "Python/3.12 aiohttp/3.13.2", "Accept": "*/*" },
    mcp: { "User-Agent": "openai-mcp/1.0.0", "Accept": "application/json, text/event-stream" },
  },
  probe: "server/discover",
  client_id: CHATGPT,
  redirect_uri: CHATGPT_REDIRECT,
  credentials: assertion,
}, () => ({
  [CHATGPT]: {
    client_id: CHATGPT,
    client_name: "ChatGPT",
    client_uri: "https://chatgpt.com",
    redirect_uris: [CHATGPT_REDIRECT],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "private_key_jwt",
    token_endpoint_auth_methods_supported: ["none", "private_key_jwt"],
    token_endpoint_auth_signing_alg: "RS256",
    jwks_uri: CHATGPT_KEYS,
  },
  [CHATGPT_KEYS]: {
    keys: [{ ...keys().publicKey.export({ format: "jwk" }) as JsonWebKey, kid: "zoo", alg: "RS256", use: "sig" }],
  },
}));
