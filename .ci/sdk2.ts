/**
 * The guard in front of the second generation of the SDK, and every answer of ours in its parsers' hands. Run with
 * `deno test -A .ci/sdk2.ts`; these packages are for this check only, so deno.json does not name them.
 */

import { deepStrictEqual as equal, ok } from "node:assert/strict";
import { test } from "node:test";
import { Client, StreamableHTTPClientTransport } from "npm:@modelcontextprotocol/client@2.4.0";
import * as core from "npm:@modelcontextprotocol/core@2.4.0";
import {
  type AuthInfo as SdkAuthInfo,
  createMcpHandler,
  McpServer,
  requireBearerAuth,
} from "npm:@modelcontextprotocol/server@2.4.0";
import { Hono } from "npm:hono@^4.13.19";
import * as oauth from "npm:oauth4webapi@3";
import { z } from "npm:zod@4";
import { type AuthInfo, memoryStore, personalAuth } from "../mod.ts";

const BASE = "https://mcp.example.com";
const REDIRECT = "https://claude.ai/api/mcp/auth_callback";

const auth = personalAuth({
  baseUrl: BASE,
  store: memoryStore(),
  authenticateOwner: () => true,
  onEvent: () => {},
  clients: [{ client_id: "resource-server", client_secret: "a secret of some length", redirect_uris: [REDIRECT] }],
});
const app = new Hono();
app.route("/", auth);
const handler = createMcpHandler(() => {
  const server = new McpServer({ name: "two", version: "1" });
  server.registerTool("whoami", { inputSchema: z.object({}) }, (_args, { http }) => ({
    content: [{ type: "text", text: JSON.stringify(http?.authInfo) }],
  }));
  return server;
});
app.all("/mcp", auth.guard, (c) => handler.fetch(c.req.raw, { authInfo: c.var.auth }));
const fetchApp = (input: string | URL | Request, init?: RequestInit) =>
  Promise.resolve(app.request(new Request(input, init)));

// deno-lint-ignore no-explicit-any
async function call(token: string, transport: any): Promise<any> {
  const client = new Client({ name: "test", version: "1" }, transport.era);
  const requestInit = { headers: { Authorization: `Bearer ${token}` } };
  await client.connect(new StreamableHTTPClientTransport(new URL(`${BASE}/mcp`), { fetch: fetchApp, requestInit }));
  try {
    const { tools } = await client.listTools();
    equal(tools.map(({ name }) => name), ["whoami"]);
    // deno-lint-ignore no-explicit-any
    const result: any = await client.callTool({ name: "whoami", arguments: {} });
    return JSON.parse(result.content[0].text);
  } finally {
    await client.close();
  }
}

test("createMcpHandler gets its AuthInfo from the guard, in both protocol eras", async () => {
  const { token, id } = await auth.createToken({ name: "script" });
  for (const mode of ["auto", "legacy"]) {
    const info = await call(token, { era: { versionNegotiation: { mode } } });
    equal(info.scopes, ["mcp"]);
    equal(info.resource, `${BASE}/mcp`);
    equal(info.resourceMetadataUrl, `${BASE}/.well-known/oauth-protected-resource/mcp`);
    equal(info.extra.connection, id);
    ok(Number.isInteger(info.expiresAt));
  }
  const refused = await app.request(`${BASE}/mcp`, { method: "POST", headers: { "Mcp-Method": "server/discover" } });
  equal(refused.status, 401); // before the handler could answer 406
});

test("AuthInfo and the SDK's may stand for each other", () => {
  // Checked by the compiler: both are assignable to each other, and have the same members.
  type Same<Ours, Theirs> = [Ours, Theirs, keyof Ours, keyof Theirs] extends [Theirs, Ours, keyof Theirs, keyof Ours]
    ? true
    : false;
  const isSame: Same<AuthInfo, SdkAuthInfo> = true;
  ok(isSame);
});

test("requireBearerAuth of the SDK takes our verifyAccessToken", async () => {
  const { token } = await auth.createToken({ name: "script" });
  const gate = requireBearerAuth({ verifier: auth, requiredScopes: ["mcp"], expectedResource: new URL(`${BASE}/mcp`) });
  const headers = { Authorization: `Bearer ${token}` };
  const info = await gate(new Request(`${BASE}/elsewhere`, { headers }));
  ok(!(info instanceof Response) && info.token === token);
});

test("the SDK's own schemas parse every answer", async () => {
  const read = async (path: string, init?: RequestInit) => (await app.request(BASE + path, init)).json();
  const schemas = core as unknown as Record<string, z.ZodType>;
  const parse = (name: string, value: unknown) => {
    ok(schemas[name], `the SDK has no ${name}`);
    ok(!JSON.stringify(value).includes("null"), `${name}: null in ${JSON.stringify(value)}`);
    schemas[name]!.parse(value);
  };
  parse("OAuthMetadataSchema", await read("/.well-known/oauth-authorization-server"));
  parse("OAuthProtectedResourceMetadataSchema", await read("/.well-known/oauth-protected-resource/mcp"));
  const registration = {
    redirect_uris: [REDIRECT],
    client_name: "x",
    token_endpoint_auth_method: "client_secret_basic",
  };
  const headers = { "Content-Type": "application/json" };
  const client = await read("/register", { method: "POST", headers, body: JSON.stringify(registration) });
  parse("OAuthClientInformationFullSchema", client);
});

test("oauth4webapi, which forgives nothing, gets through the whole protocol", async () => {
  const options = { [oauth.customFetch]: fetchApp };
  const resource = new URL(`${BASE}/mcp`);
  await oauth.processResourceDiscoveryResponse(resource, await oauth.resourceDiscoveryRequest(resource, options));
  const issuer = new URL(BASE);
  // RFC 8414 compares strings, URL.href adds a slash: the library takes the issuer as it was typed
  const as = await oauth.processDiscoveryResponse(
    issuer,
    await oauth.discoveryRequest(issuer, { ...options, algorithm: "oauth2" }),
  );
  for (const method of ["none", "client_secret_post", "client_secret_basic"]) {
    const client = await oauth.processDynamicClientRegistrationResponse(
      await oauth.dynamicClientRegistrationRequest(as, {
        redirect_uris: [REDIRECT],
        token_endpoint_auth_method: method,
        grant_types: ["authorization_code", "refresh_token"],
        response_types: ["code"],
      }, options),
    );
    const secret = String(client.client_secret);
    const authentication = {
      none: () => oauth.None(),
      client_secret_post: () => oauth.ClientSecretPost(secret),
      client_secret_basic: () => oauth.ClientSecretBasic(secret),
    }[method]!();
    const verifier = oauth.generateRandomCodeVerifier();
    const state = oauth.generateRandomState();
    const url = new URL(as.authorization_endpoint!);
    for (
      const [name, value] of Object.entries({
        response_type: "code",
        client_id: client.client_id,
        redirect_uri: REDIRECT,
        code_challenge: await oauth.calculatePKCECodeChallenge(verifier),
        code_challenge_method: "S256",
        state,
        scope: "mcp offline_access",
      })
    ) url.searchParams.set(name, value);
    const page = await app.request(url.href);
    const field = (text: string, name: string) =>
      text.match(new RegExp(`name="${name}" value="([^"]*)"`))![1]!.replaceAll("&amp;", "&");
    const text = await page.text();
    const approved = await app.request(`${BASE}/authorize`, {
      method: "POST",
      headers: {
        "Content-Type": "application/x-www-form-urlencoded",
        "Cookie": page.headers.getSetCookie()[0]!.split(";")[0]!,
      },
      body: new URLSearchParams({ request: field(text, "request"), csrf: field(text, "csrf"), decision: "approve" }),
    });
    const callback = oauth.validateAuthResponse(as, client, new URL(approved.headers.get("Location")!), state);
    const tokens = await oauth.processAuthorizationCodeResponse(
      as,
      client,
      await oauth.authorizationCodeGrantRequest(as, client, authentication, callback, REDIRECT, verifier, options),
    );
    const refreshed = await oauth.processRefreshTokenResponse(
      as,
      client,
      await oauth.refreshTokenGrantRequest(as, client, authentication, tokens.refresh_token!, options),
    );
    const info = await oauth.processIntrospectionResponse(
      as,
      { client_id: "resource-server" },
      await oauth.introspectionRequest(
        as,
        { client_id: "resource-server" },
        oauth.ClientSecretBasic("a secret of some length"),
        refreshed.access_token,
        options,
      ),
    );
    equal(info.active, true);
    await oauth.processRevocationResponse(
      await oauth.revocationRequest(as, client, authentication, refreshed.refresh_token!, options),
    );
    equal(
      (await app.request(`${BASE}/mcp`, { headers: { Authorization: `Bearer ${tokens.access_token}` } })).status,
      401,
    );
  }
});
