/**
 * The peers, each with its own in-memory store, to be measured side by side: `peer_server.ts KIND`, run on Node in the
 * folder where they were installed. It prints the port once it listens, and answers a number on its standard input with
 * so many authorization codes, made without a look at anybody's sign-in page: how the owner says yes is not compared.
 *
 * @module
 */

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createServer, type RequestListener } from "node:http";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";

const [kind = ""] = process.argv.slice(2);

// deno-lint-ignore no-explicit-any
type Any = any;
/** By a name in a variable: these packages are for this benchmark only, and no type checker shall look for them. */
const load = (name: string): Promise<Any> => import(name);

const ISSUER = "http://localhost:8050";
const RESOURCE = `${ISSUER}/mcp`;
const REDIRECT = "https://claude.ai/api/mcp/auth_callback";
const CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
const CLIENT_ID = "client";
const HOUR = 3600;

const CLIENT = {
  client_id: CLIENT_ID,
  client_name: "Client",
  redirect_uris: [REDIRECT],
  token_endpoint_auth_method: "none",
  grant_types: ["authorization_code", "refresh_token"],
  response_types: ["code"],
  scope: "mcp",
};

/** What a token request needs to hold. */
interface Code {
  client_id: string;
  code: string;
  resource?: string;
}
interface Peer {
  port: number;
  code(): Promise<Code> | Code;
}

const random = () => randomBytes(32).toString("hex");

/** The provider that the SDK asks its users to write, in its simplest form: maps of tokens as they are, no expiry. */
function memoryProvider() {
  const codes = new Map<string, string>();
  const access = new Map<string, Any>();
  const refresh = new Map<string, string>();
  const issue = (client_id: string) => {
    const access_token = random();
    const refresh_token = random();
    const expiresAt = Math.floor(Date.now() / 1000) + HOUR;
    access.set(access_token, { token: access_token, clientId: client_id, scopes: ["mcp"], expiresAt });
    refresh.set(refresh_token, client_id);
    return { access_token, token_type: "Bearer", expires_in: HOUR, refresh_token, scope: "mcp" };
  };
  return {
    clientsStore: { getClient: (id: string) => id === CLIENT_ID ? CLIENT : undefined },
    authorize: () => Promise.reject(new Error("not used")),
    challengeForAuthorizationCode: (_client: Any, code: string) => Promise.resolve(codes.get(code)),
    exchangeAuthorizationCode(client: Any, code: string) {
      if (!codes.delete(code)) throw new Error("unknown code");
      return Promise.resolve(issue(client.client_id));
    },
    exchangeRefreshToken(client: Any, token: string) {
      if (refresh.get(token) !== client.client_id || !refresh.delete(token)) throw new Error("unknown token");
      return Promise.resolve(issue(client.client_id));
    },
    verifyAccessToken(token: string) {
      const info = access.get(token);
      return info ? Promise.resolve(info) : Promise.reject(new Error("unknown token"));
    },
    code() {
      const code = random();
      codes.set(code, CHALLENGE);
      return { client_id: CLIENT_ID, code };
    },
  };
}

function listen(listener: RequestListener): Promise<number> {
  return new Promise((resolve) => {
    const server = createServer(listener).listen(0, "127.0.0.1", () => resolve((server.address() as Any).port));
  });
}

const hello = (_request: Any, response: Any) => response.send("hello");
const unlimited = { rateLimit: false };

const peers: Record<string, () => Promise<Peer>> = {
  async "sdk"() {
    const { default: express } = await load("express");
    const { mcpAuthRouter } = await load("@modelcontextprotocol/sdk/server/auth/router.js");
    const { requireBearerAuth } = await load("@modelcontextprotocol/sdk/server/auth/middleware/bearerAuth.js");
    const provider = memoryProvider();
    const app = express();
    app.use(mcpAuthRouter({ provider, issuerUrl: new URL(ISSUER), tokenOptions: unlimited }));
    app.all("/mcp", requireBearerAuth({ verifier: provider }), hello);
    return { port: await listen(app), code: provider.code };
  },

  async "hono-mcp"() {
    const { Hono } = await load("hono");
    const { getRequestListener } = await load("@hono/node-server");
    const { mcpAuthRouter, bearerAuth } = await load("@hono/mcp/auth").catch(() => load("@hono/mcp"));
    const provider = memoryProvider();
    const app = new Hono();
    app.route(
      "/",
      mcpAuthRouter({ provider, issuerUrl: ISSUER, tokenOptions: unlimited, revocationOptions: unlimited }),
    );
    const verifyToken = async (token: string) => Boolean(await provider.verifyAccessToken(token));
    app.use("/mcp", bearerAuth({ verifyToken }));
    app.all("/mcp", (c: Any) => c.text("hello"));
    return { port: await listen(getRequestListener(app.fetch)), code: provider.code };
  },

  async "mcp-oauth-server"() {
    const { default: express } = await load("express");
    const { mcpAuthRouter, MemoryOAuthServerModel, OAuthServer, requireBearerAuth } = await load("mcp-oauth-server");
    const model = new MemoryOAuthServerModel();
    const client = await model.registerClient(CLIENT);
    const provider = new OAuthServer({
      model,
      issuerUrl: new URL(ISSUER),
      authorizationUrl: new URL(`${ISSUER}/consent`),
      resourceServerUrl: new URL(RESOURCE),
      scopesSupported: ["mcp"],
    });
    const app = express();
    app.use(mcpAuthRouter({ provider, tokenOptions: unlimited }));
    app.all("/mcp", requireBearerAuth({ verifier: provider }), hello);
    const code = async () => {
      const authorizationCode = random();
      await model.saveAuthorizationCode({
        authorizationCode,
        clientId: client.client_id,
        userId: "owner",
        expiresAt: new Date(Date.now() + HOUR * 1000),
        scopes: ["mcp"],
        codeChallenge: CHALLENGE,
        redirectUri: REDIRECT,
        resource: RESOURCE,
        grantId: random(),
      }, client);
      return { client_id: client.client_id, code: authorizationCode, resource: RESOURCE };
    };
    return { port: await listen(app), code };
  },

  async "oidc-provider"() {
    const { default: Provider } = await load("oidc-provider");
    const client = { client_id: CLIENT_ID, redirect_uris: [REDIRECT], token_endpoint_auth_method: "none" };
    const provider = new Provider(ISSUER, {
      clients: [{ ...client, grant_types: ["authorization_code", "refresh_token"], response_types: ["code"] }],
      scopes: ["openid", "offline_access"],
      findAccount: (_ctx: Any, accountId: string) => ({ accountId, claims: () => ({ sub: accountId }) }),
      issueRefreshToken: () => true,
      rotateRefreshToken: true,
      features: { devInteractions: { enabled: false } },
      routes: { token: "/token" },
    });
    // It is no resource server: the check that its own endpoints do, in front of the same handler.
    provider.use(async (ctx: Any, next: () => Promise<void>) => {
      if (ctx.path !== "/mcp") return next();
      const token = await provider.AccessToken.find(ctx.get("Authorization").slice("Bearer ".length));
      if (token?.isValid) ctx.body = "hello";
      else ctx.status = 401;
    });
    const code = async () => {
      const grant = new provider.Grant({ accountId: "owner", clientId: CLIENT_ID });
      grant.addOIDCScope("openid offline_access");
      const made = new provider.AuthorizationCode({
        accountId: "owner",
        client: await provider.Client.find(CLIENT_ID),
        clientId: CLIENT_ID,
        grantId: await grant.save(),
        codeChallenge: CHALLENGE,
        codeChallengeMethod: "S256",
        expiresWithSession: false,
        gty: "authorization_code",
        redirectUri: REDIRECT,
        scope: "openid offline_access",
      });
      return { client_id: CLIENT_ID, code: await made.save() };
    };
    return { port: await listen(provider.callback()), code };
  },

  async "workers-oauth-provider"() {
    const { Miniflare } = await load("miniflare");
    const path = createRequire(join(process.cwd(), "x.js")).resolve("@cloudflare/workers-oauth-provider");
    const worker = `
      import OAuthProvider from "./oauth-provider.js";
      export default new OAuthProvider({
        apiRoute: "/mcp",
        apiHandler: { fetch: () => new Response("hello") },
        defaultHandler: {
          async fetch(request, env) {
            if (new URL(request.url).pathname !== "/code") return new Response(null, { status: 404 });
            const helpers = env.OAUTH_PROVIDER;
            const redirectUri = "${REDIRECT}";
            const { clientId } = await helpers.createClient({
              redirectUris: [redirectUri], tokenEndpointAuthMethod: "none", clientName: "Client",
            });
            const { redirectTo } = await helpers.completeAuthorization({
              request: {
                responseType: "code", clientId, redirectUri, scope: ["mcp"], state: "state", issuer: "${ISSUER}",
                codeChallenge: "${CHALLENGE}", codeChallengeMethod: "S256",
              },
              userId: crypto.randomUUID(), metadata: {}, scope: ["mcp"], props: {},
            });
            return Response.json({ client_id: clientId, code: new URL(redirectTo).searchParams.get("code") });
          },
        },
        authorizeEndpoint: "/authorize",
        tokenEndpoint: "/token",
        scopesSupported: ["mcp"],
        resourceMetadata: { resource: "${RESOURCE}", authorization_servers: ["${ISSUER}"] },
      });`;
    const miniflare = new Miniflare({
      host: "127.0.0.1",
      port: 0,
      modules: [
        { type: "ESModule", path: "worker.js", contents: worker },
        { type: "ESModule", path: "oauth-provider.js", contents: readFileSync(path, "utf8") },
      ],
      kvNamespaces: ["OAUTH_KV"],
      compatibilityDate: "2025-11-01",
      compatibilityFlags: ["nodejs_compat", "global_fetch_strictly_public"],
    });
    const url: URL = await miniflare.ready;
    process.once("exit", () => miniflare.dispose());
    const code = async () => {
      const response = await miniflare.dispatchFetch(`${ISSUER}/code`);
      const text = await response.text();
      if (!response.ok) throw new Error(text.slice(0, 300));
      return JSON.parse(text);
    };
    return { port: Number(url.port), code };
  },

  /** Ours, with the path of world.ts and a folder if it is to be durable. */
  async ours() {
    const [, world = "", dir = ""] = process.argv.slice(2);
    const { mod, world: make }: typeof import("./world.ts") = await load(world);
    const { getRequestListener } = await load("@hono/node-server");
    const w = make(dir ? mod.fileStore(dir) : mod.memoryStore());
    // A version that BENCH_MOD names may have no `auth.guard`: then its guard stands at the path alone.
    if ("guard" in w.auth) w.app.all("/mcp", w.auth.guard, (c) => c.text("hello"));
    else w.app.all("/mcp", (c: Any) => c.text("hello"));
    const client = w.client();
    const client_id = await client.id();
    return {
      port: await listen(getRequestListener(w.app.fetch)),
      code: async () => ({ client_id, code: (await client.approve()).code! }),
    };
  },
};

const write = (answer: unknown) => console.log(JSON.stringify(answer));

try {
  const { port, code } = await peers[kind]!();
  write({ port });
  const lines = createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    if (line === '"usage"') {
      const { user, system } = process.cpuUsage();
      return write({ cpu: (user + system) / 1e6 });
    }
    try {
      const codes: Code[] = [];
      for (let i = 0; i < Number(line); i++) codes.push(await code());
      write({ codes });
    } catch (error) {
      write({ error: String(error) });
    }
  });
  lines.on("close", () => process.exit(0));
} catch (error) {
  write({ error: String(error) });
  process.exit(1);
}
