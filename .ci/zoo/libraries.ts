/**
 * The libraries that clients are made with, each used the way its own documentation shows. Like the programs, they come
 * in the versions that are named here, whatever deno.json says.
 *
 * @module
 */

// deno-lint-ignore-file no-import-prefix
import type { OAuthClientProvider, OAuthDiscoveryState } from "npm:@modelcontextprotocol/client@2.4.0";
import { NotRun } from "../lib/limits.ts";
import { mustShow, type Pen, SUM, TERMS } from "./kit.ts";
import { type Check, life, type Program, TRIED } from "./programs.ts";

/** Loads a library, which may have to be fetched first. */
async function load<T>(library: Promise<T>): Promise<T> {
  try {
    return await library;
  } catch (error) {
    throw new NotRun(`it could not be loaded: ${error}`);
  }
}

/** Where an app waits on loopback for the owner to come back. */
class Callback {
  readonly url: string;
  #arrived = Promise.withResolvers<URL>();

  constructor(pen: Pick<Pen, "atClose">) {
    const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, ({ url }) => {
      this.#arrived.resolve(new URL(url));
      return new Response("You can close this page.");
    });
    pen.atClose(() => server.shutdown());
    this.url = `http://127.0.0.1:${server.addr.port}/callback`;
  }

  async next(): Promise<URL> {
    const url = await this.#arrived.promise;
    this.#arrived = Promise.withResolvers();
    return url;
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The MCP SDKs
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

type Kept<T> = Exclude<T, Promise<unknown> | undefined>;

/** What an app needs of a pen. */
export type Browser = Pick<Pen, "atClose" | "open" | "approveFor">;

/** An app on an MCP SDK, as far as the SDKs leave it to the app: what is kept, and how the owner is asked. */
export class App implements OAuthClientProvider {
  readonly redirectUrl: string;
  kept: {
    client?: Kept<ReturnType<OAuthClientProvider["clientInformation"]>>;
    tokens?: Kept<ReturnType<OAuthClientProvider["tokens"]>>;
    discovery?: OAuthDiscoveryState;
  } = {};
  readonly #pen: Browser;
  readonly #callback: Callback;
  #verifier = "";
  #state = "";

  constructor(pen: Browser) {
    this.#pen = pen;
    this.#callback = new Callback(pen);
    this.redirectUrl = this.#callback.url;
  }

  get clientMetadata() {
    return { client_name: "An app of the zoo", redirect_uris: [this.redirectUrl] };
  }

  state = () => this.#state = crypto.randomUUID();
  clientInformation = () => this.kept.client;
  tokens = () => this.kept.tokens;
  discoveryState = () => this.kept.discovery;
  codeVerifier = () => this.#verifier;
  redirectToAuthorization = (url: URL) => this.#pen.open(url.href);

  saveClientInformation(client: NonNullable<App["kept"]["client"]>): void {
    this.kept.client = client;
  }

  saveTokens(tokens: NonNullable<App["kept"]["tokens"]>): void {
    this.kept.tokens = tokens;
  }

  saveDiscoveryState(discovery: OAuthDiscoveryState): void {
    this.kept.discovery = discovery;
  }

  saveCodeVerifier(verifier: string): void {
    this.#verifier = verifier;
  }

  invalidateCredentials(scope: string): void {
    if (scope === "all" || scope === "client") delete this.kept.client;
    if (scope === "all" || scope === "tokens") delete this.kept.tokens;
    if (scope === "all" || scope === "discovery") delete this.kept.discovery;
  }

  /** What the owner's browser brings, once the owner has approved. */
  async answer(): Promise<URLSearchParams> {
    await this.#pen.approveFor();
    const { searchParams } = await this.#callback.next();
    if (searchParams.get("state") !== this.#state) throw new Error("the state came back changed");
    return searchParams;
  }
}

/** What both SDKs' clients have in common. */
interface Session {
  listTools(): Promise<{ tools: { name: string }[] }>;
  callTool(call: { name: string; arguments: Record<string, unknown> }): Promise<unknown>;
  close(): Promise<void>;
}

type Call = { name: string; arguments: Record<string, unknown> };

/** One generation of the SDK, as an app uses it. */
export interface Sdk {
  /** Connects an app, with the owner's help where it is needed. */
  connect(url: URL, app: App): Promise<Session>;
  /** Calls a tool that wants another scope than the app has: the owner is asked, and the call is made again. */
  callWithMore(url: URL, app: App, call: Call): Promise<unknown>;
}

function sdk(name: string, version: string, loading: () => Promise<Sdk>): Program {
  const client = `MCP SDK, \`${name}\``;
  return {
    name,
    row: { client, tried: TRIED.library, version },
    async checks(pen) {
      const { connect } = await loading();
      const app = new App(pen);
      const url = new URL(pen.server.mcpUrl);
      async function use(): Promise<void> {
        const session = await connect(url, app);
        mustShow(JSON.stringify(await session.listTools()), "greet", "add");
        mustShow(JSON.stringify(await session.callTool({ name: "add", arguments: TERMS })), SUM);
        await session.close();
      }
      const signIn = async () => await (await connect(url, app)).close();
      function spoilToken(): void {
        if (!app.kept.tokens?.refresh_token) throw new Error("it was given no refresh token");
        app.kept.tokens = { ...app.kept.tokens, access_token: "spoilt" };
      }
      return life(pen, { signIn, use, spoilToken });
    },
  };
}

const IMPLEMENTATION = { name: "zoo", version: "1.0.0" };

/**
 * As both generations have it.
 *
 * @param taken the form in which it takes the owner's answer
 * @param refreshesFirst whether it answers a demand for another scope by its refresh token, which brings no scope
 */
// deno-lint-ignore no-explicit-any
function generation(classes: any, taken: (answer: URLSearchParams) => unknown, refreshesFirst: boolean): Sdk {
  const { Client, StreamableHTTPClientTransport, UnauthorizedError } = classes;
  const open = (url: URL, authProvider: App) => ({
    client: new Client(IMPLEMENTATION),
    transport: new StreamableHTTPClientTransport(url, { authProvider }),
  });

  /** Does what may need the owner, who is asked at most once. */
  async function asking<T>(app: App, { transport }: ReturnType<typeof open>, act: () => Promise<T>) {
    try {
      return await act();
    } catch (error) {
      if (!(error instanceof UnauthorizedError)) throw error;
    }
    await transport.finishAuth(taken(await app.answer()));
  }

  return {
    async connect(url, app) {
      const first = open(url, app);
      if (await asking(app, first, () => first.client.connect(first.transport).then(() => true))) return first.client;
      const authorized = open(url, app);
      await authorized.client.connect(authorized.transport);
      return authorized.client;
    },
    async callWithMore(url, app, call) {
      if (refreshesFirst) app.kept.tokens = { ...app.kept.tokens!, refresh_token: undefined };
      const session = open(url, app);
      await session.client.connect(session.transport);
      const before = await asking(app, session, () => session.client.callTool(call));
      if (before) throw new Error(`it was not refused: ${JSON.stringify(before)}`);
      const result = await session.client.callTool(call);
      await session.client.close();
      return result;
    },
  };
}

export async function loadSdk2(): Promise<Sdk> {
  const classes = await load(import("npm:@modelcontextprotocol/client@2.4.0"));
  return generation(classes, (answer) => answer, false);
}

export async function loadSdk1(): Promise<Sdk> {
  const { Client } = await load(import("npm:@modelcontextprotocol/sdk@1.32.2/client/index.js"));
  const { StreamableHTTPClientTransport } = await load(
    import("npm:@modelcontextprotocol/sdk@1.32.2/client/streamableHttp.js"),
  );
  const { UnauthorizedError } = await load(import("npm:@modelcontextprotocol/sdk@1.32.2/client/auth.js"));
  const classes = { Client, StreamableHTTPClientTransport, UnauthorizedError };
  return generation(classes, (answer) => answer.get("code") ?? "", true);
}

export const sdk2: Program = sdk("@modelcontextprotocol/client", "2.4.0", loadSdk2);
export const sdk1: Program = sdk("@modelcontextprotocol/sdk", "1.32.2", loadSdk1);

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// oauth4webapi
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A library that takes the RFCs by the letter: whatever it takes amiss is a fault of the server. */
export const oauth4webapi: Program = {
  name: "oauth4webapi",
  row: { client: "oauth4webapi", tried: TRIED.library, version: "3.8.8" },
  independent: true,
  async checks(pen) {
    const oauth = await load(import("npm:oauth4webapi@3.8.8"));
    const insecure = { [oauth.allowInsecureRequests]: true }; // plain http, on loopback
    const resource = new URL(pen.server.mcpUrl);
    const callback = new Callback(pen);

    async function discover() {
      const answer = await oauth.resourceDiscoveryRequest(resource, insecure);
      const { authorization_servers } = await oauth.processResourceDiscoveryResponse(resource, answer);
      const issuer = new URL(authorization_servers?.[0] ?? "");
      const found = await oauth.discoveryRequest(issuer, { ...insecure, algorithm: "oauth2" });
      const server = await oauth.processDiscoveryResponse(issuer, found);
      if (!server.authorization_response_iss_parameter_supported) throw new Error("iss is not advertised");
      return server;
    }

    /** What an access token is good for: a sum, or a challenge that names where to get another one. */
    async function call(token: string): Promise<string> {
      const request = { jsonrpc: "2.0", id: 1, method: "tools/call", params: { name: "add", arguments: TERMS } };
      const headers = new Headers({
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
      });
      const body = JSON.stringify(request);
      const answer = await oauth.protectedResourceRequest(token, "POST", resource, headers, body, insecure);
      return await answer.text();
    }

    async function mustBeRefused(token: string): Promise<void> {
      let challenges;
      try {
        throw new Error(`a token that is no good was answered ${await call(token)}`);
      } catch (error) {
        if (!(error instanceof oauth.WWWAuthenticateChallengeError)) throw error;
        challenges = error.cause;
      }
      const { scheme, parameters } = challenges[0]!;
      mustShow(`${scheme} ${parameters.error} ${parameters.resource_metadata}`, "bearer invalid_token http");
    }

    async function grant(method: string): Promise<void> {
      const server = await discover();
      const client = await oauth.processDynamicClientRegistrationResponse(
        await oauth.dynamicClientRegistrationRequest(server, {
          client_name: `A client of the zoo, ${method}`,
          redirect_uris: [callback.url],
          token_endpoint_auth_method: method,
        }, insecure),
      );
      if (client.token_endpoint_auth_method !== method) throw new Error(`${method} was not granted`);
      const authentication = {
        none: () => oauth.None(),
        client_secret_post: () => oauth.ClientSecretPost(String(client.client_secret)),
        client_secret_basic: () => oauth.ClientSecretBasic(String(client.client_secret)),
      }[method]!();

      const verifier = oauth.generateRandomCodeVerifier();
      const state = oauth.generateRandomState();
      const request = new URL(server.authorization_endpoint!);
      request.search = String(
        new URLSearchParams({
          client_id: client.client_id,
          redirect_uri: callback.url,
          response_type: "code",
          code_challenge: await oauth.calculatePKCECodeChallenge(verifier),
          code_challenge_method: "S256",
          state,
          resource: resource.href,
        }),
      );
      await pen.approve(request.href);
      const answer = oauth.validateAuthResponse(server, client, await callback.next(), state); // with iss
      const asked = await oauth.authorizationCodeGrantRequest(
        server,
        client,
        authentication,
        answer,
        callback.url,
        verifier,
        { ...insecure, additionalParameters: { resource: resource.href } },
      );
      const first = await oauth.processAuthorizationCodeResponse(server, client, asked);
      mustShow(await call(first.access_token), SUM);

      await pen.server.restart();
      mustShow(await call(first.access_token), SUM);
      const refreshed = await oauth.refreshTokenGrantRequest(
        server,
        client,
        authentication,
        String(first.refresh_token),
        insecure,
      );
      const second = await oauth.processRefreshTokenResponse(server, client, refreshed);
      mustShow(await call(second.access_token), SUM);

      const token = String(second.refresh_token);
      await oauth.processRevocationResponse(
        await oauth.revocationRequest(server, client, authentication, token, insecure),
      );
      await mustBeRefused(second.access_token);
    }

    return ["none", "client_secret_post", "client_secret_basic"].map((method): Check => [
      `discovery, registration, code, iss, refresh after a restart, and revocation with ${method}`,
      () => grant(method),
      { "signs in": "yes", "calls a tool": "yes", "refreshes": "yes", "after a restart": "yes" },
    ]);
  },
};
