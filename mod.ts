/**
 * One file that makes a [Hono](https://hono.dev) app its own OAuth 2.1 authorization server, for **one person's** MCP
 * server. Claude on the web, the phone, the desktop and in the terminal connects to it; only the owner lets it in.
 *
 * ```ts ignore
 * import { Hono } from "hono";
 * import { personalAuth } from "@personal-auth/mcp";
 *
 * const auth = personalAuth({ baseUrl: "https://your-domain.com" });
 * const app = new Hono();
 * app.route("/", auth); // the OAuth endpoints and the owner's pages
 * app.all("/mcp", auth.guard, (c) => c.json({ hello: c.var.auth.clientId })); // only with a valid token
 * export default app;
 * ```
 *
 * | path or rule | function | standard |
 * |---|---|---|
 * | `/.well-known/oauth-authorization-server` | `authorizationServerMetadata` | RFC 8414 §2 |
 * | `/.well-known/oauth-protected-resource/mcp` | `protectedResourceMetadata` | RFC 9728 §2 |
 * | `/register` | `registerClient` | RFC 7591 §3 |
 * | `/authorize` | `showConsent`, `decideConsent` | OAuth 2.1 §4.1, RFC 9207 |
 * | `/token` | `tokenEndpoint` | OAuth 2.1 §3.2 |
 * | `/revoke` | `revocationEndpoint` | RFC 7009 §2.1 |
 * | `/introspect` | `introspectionEndpoint` | RFC 7662 §2 |
 * | `/connections` | `showConnections`, `changeConnections` | |
 * | `/mcp` | `createGuard`; its 401 and 403: `challenge` | RFC 6750 §2.1, RFC 9728 §5.1 |
 * | which redirect URIs are allowed | `redirectRefusal`, `sameRedirect` | OAuth 2.1 §4.1.1, RFC 8252 §7.3 |
 * | a client signs with its own key | `verifyAssertion` | RFC 7523 §3 |
 * | client metadata documents | `readClientDocument`, `fetchPublicly` | draft-ietf-oauth-client-id-metadata-document |
 * | a code works once, with PKCE | `redeemGrant` | OAuth 2.1 §4.1.3, RFC 7636 §4.6 |
 * | refresh tokens rotate; reuse ends the connection | `refreshGrant`, `repeatRefresh` | OAuth 2.1 §4.3.1 |
 * | the audience of a token | `checkResource`, `verifyGrant` | RFC 8707 §2 |
 * | the owner's password and session | `signIn`, `readSession` | |
 *
 * @module
 */

import { type Context, Hono, type MiddlewareHandler } from "hono";
import { getCookie, setCookie } from "hono/cookie";
import { cors } from "hono/cors";
import { html, raw } from "hono/html";

// --- Options and public types ---

/** Options of {@linkcode personalAuth}. Only `baseUrl` is required. */
export interface PersonalAuthOptions {
  /** The public URL, without a slash at the end: `https`, or `http` on loopback. It is the issuer (RFC 8414 §2). */
  baseUrl: string;
  /** The owner's password. Default: one is generated, and printed until it is used. `false`: **anybody gets in**. */
  password?: string | false | undefined;
  /**
   * Which apps may ask, by where they are sent back to: `example.com` (https), `*.example.com` (its subdomains),
   * `localhost` (any loopback address and port), `scheme://host` (a private-use scheme). `null`: all. Default:
   * claude.ai, claude.com, localhost and Claude Desktop's `claude://claude.ai`.
   */
  allowedRedirectDomains?: readonly string[] | null;
  /** Lifetime of an access token, in seconds. Default: 30 days. */
  accessTokenTtl?: number;
  /** Lifetime of a connection after its last refresh, in seconds. Default: 365 days. */
  refreshTokenTtl?: number;
  /** Where state is kept. Default: `fileStore(".oauth-state")`. */
  store?: Store;
  /** `false`: no dynamic client registration, only clients with a metadata document and those of `clients`. */
  registration?: boolean;
  /** The path of the MCP endpoint below `baseUrl`. Both together are the resource identifier. Default: `/mcp`. */
  mcpPath?: string;
  /** The scopes on offer: a list of names, or an object from name to description. Default: `mcp`, every tool. */
  scopes?: string[] | Record<string, string | ScopeOption>;
  /** Clients registered by hand, for apps where a person types in an id and a secret. */
  clients?: PreregisteredClient[];
  /** Replaces the password: `true` if the owner sent the request. A `Response` is sent in place of the page. */
  authenticateOwner?: (c: Context) => boolean | Response | Promise<boolean | Response>;
  /**
   * Fetches a client's metadata document or keys where the built-in function, which needs `node:https`, cannot. It
   * must connect to public addresses only, follow no redirects, and end when the signal is aborted.
   */
  fetchClientMetadata?: (url: string, signal: AbortSignal) => Promise<Response>;
  /** How the owner's pages look. */
  pages?: PageOptions;
  /** Receives every security-relevant event. Default: one line each on the console. */
  onEvent?: (event: AuthEvent) => void;
}

/** A scope on offer. */
export type ScopeOption = {
  /** What the scope allows, as words that follow "It may …". */
  description?: string;
  /** Scopes that come with this one. */
  includes?: string[];
  /** `true`: granted only to a client that asks for it by name, as after a step-up challenge. */
  onRequest?: boolean;
};

/** A client registered by hand (RFC 7591 §2). Without a secret, of at least 16 characters, it is a public client. */
export type PreregisteredClient = {
  client_id: string;
  client_secret?: string;
  client_name?: string;
  redirect_uris: string[];
};

/** A security-relevant event. `type` is stable; `message` is for people and may change. */
export type AuthEvent = {
  type:
    | "client_registered"
    | "client_document_refused"
    | "client_assertion_refused"
    | "redirect_refused"
    | "owner_signed_in"
    | "sign_in_failed"
    | "sign_in_throttled"
    | "connection_approved"
    | "connection_denied"
    | "connection_revoked"
    | "code_redeemed"
    | "first_call"
    | "token_refused"
    | "code_replayed"
    | "refresh_token_reused"
    | "refresh_token_repeated"
    | "token_created"
    | "owner_unprotected"
    | "password_weak"
    | "store_shared"
    | "server_error";
  /** Seconds since the epoch. */
  at: number;
  message: string;
  /** The id of the connection concerned, as in {@linkcode Connection}. */
  connection?: string;
  /** The name the client gives itself; nobody has verified it. */
  clientName?: string;
  /** What was thrown. */
  cause?: unknown;
};

/** A client that the owner approved, or a personal access token. Times are in seconds since the epoch. */
export type Connection = {
  id: string;
  kind: "client" | "token";
  clientId: string;
  /** The name the client gives itself, or the owner's name for the token. */
  clientName: string;
  /** The owner's own name for it. */
  label?: string;
  /**
   * `pending`: approved, but its token is not fetched yet. `unused`: it has a token and never called. `active`: it
   * calls. `silent`: its access token has run out, or it was refused, and it did not come back.
   */
  state: "pending" | "unused" | "active" | "silent";
  redirectUri?: string;
  scopes: string[];
  createdAt: number;
  /** To the minute. */
  lastUsedAt?: number;
  /** When it ends unless it is refreshed. */
  expiresAt: number;
};

/** What the guard knows about a request: the `AuthInfo` of both generations of the MCP SDK. It is frozen. */
export type AuthInfo = {
  /** The access token. */
  token: string;
  clientId: string;
  /** The granted scopes, with all the scopes they include. */
  scopes: string[];
  /** Seconds since the epoch. */
  expiresAt?: number;
  /** The resource that the token is for (RFC 8707). */
  resource?: URL;
  /** Where the resource's metadata is (RFC 9728 §3). */
  resourceMetadataUrl?: string;
  /** `connection`: the id of the {@linkcode Connection}. `clientName`: the name the client gives itself. */
  extra?: Record<string, unknown>;
};

/** The Hono environment of a guarded route: `c.var.auth` is in every handler behind the guard. */
export type AuthEnv = { Variables: { auth: AuthInfo } };

/** The Hono app that {@linkcode personalAuth} returns, and what a program needs besides. */
export interface PersonalAuth extends Hono<AuthEnv> {
  /** The route for your handler: `mcpPath` below the path of `baseUrl`. */
  readonly mcpPath: string;
  /** Lets a request pass only with a valid access token, at any route, and sets `c.var.auth`. */
  readonly guard: MiddlewareHandler<AuthEnv>;
  /**
   * Checks an access token, as the MCP SDK's `OAuthTokenVerifier`.
   *
   * @throws {OAuthError} `invalid_token` if it is unknown, expired, revoked or for another resource.
   */
  verifyAccessToken(token: string): Promise<AuthInfo>;
  /**
   * Returns a guard that also requires all these scopes, and answers 403 with a step-up challenge if one is missing.
   *
   * @throws {TypeError} if a scope is not on offer.
   * @see https://www.rfc-editor.org/rfc/rfc6750#section-3.1
   */
  requireScopes(...scopes: string[]): MiddlewareHandler<AuthEnv>;
  /** Returns every live connection and personal access token, newest first. */
  connections(): Promise<Connection[]>;
  /** Ends a connection with its code, access and refresh tokens. Returns `false` if there is none with this id. */
  revoke(id: string): Promise<boolean>;
  /**
   * Makes a personal access token, for scripts and headless clients: by default with every scope, for 365 days.
   * `expiresIn` is in seconds. The token is shown only here; `id` is that of its {@linkcode Connection}.
   *
   * @throws {TypeError} if the name is empty, a scope is not on offer, or the lifetime is not a positive number.
   */
  createToken(
    request: { name: string; scopes?: string[]; expiresIn?: number },
  ): Promise<{ id: string; token: string; expiresAt: number }>;
}

/**
 * Where state is kept. Keys are short ASCII strings, values are plain JSON, times are seconds since the epoch.
 * `update` alone carries all atomicity, so any engine with compare-and-set can be a store.
 */
export interface Store {
  /** Returns the value of a key, or `undefined` if there is none or it has expired. */
  get(key: string): Promise<unknown>;
  /**
   * Changes one key, atomically against every other process, and durably before it resolves. `change` is called again
   * after a lost race, so it must be pure. `undefined` deletes the key; `current` itself writes nothing. Without
   * `expiresAt` a key keeps its expiry. Returns what `change` returned.
   */
  update(key: string, change: (current: unknown) => unknown, options?: { expiresAt?: number }): Promise<unknown>;
  /** Yields all live entries whose keys start with `prefix`, in the order of their keys. */
  list(prefix: string): AsyncIterable<[key: string, value: unknown]>;
  /**
   * Returns a stamp that differs after any change by any process, at the latest a millisecond after it. While it is
   * the same, the guard does not read again. Without a stamp it always reads.
   */
  version?(): number | undefined;
  /** Closes files and sockets. */
  close?(): void | Promise<void>;
}

/** Entries of `allowedRedirectDomains` for common apps: `[...redirects.claude, ...redirects.cursor]`. */
export const redirects = {
  /** Claude on the web, the phone and the desktop; the scheme is for the Code tab of Claude Desktop. */
  claude: ["claude.ai", "claude.com", "claude://claude.ai"],
  /** Programs on the owner's computer: Claude Code, Codex, Gemini CLI, Inspector, mcp-remote, opencode. */
  local: ["localhost"],
  antigravity: ["antigravity.google"],
  chatgpt: ["chatgpt.com"],
  cursor: ["cursor://anysphere.cursor-mcp", "www.cursor.com", "cursor.com", "localhost"],
  devin: ["api.devin.ai"],
  grok: ["grok.com", "console.x.ai"],
  metaai: ["agent.meta.ai"],
  mistral: ["callback.mistral.ai"],
  perplexity: ["www.perplexity.ai", "enterprise.perplexity.ai"],
  slack: ["oauth2.slack.com"],
  vscode: ["vscode.dev", "insiders.vscode.dev", "localhost"],
} as const;

const MINUTE = 60;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

const isString = (it: unknown) => typeof it === "string";
const isFunction = (it: unknown) => typeof it === "function";
const isLifetime = (it: unknown) => typeof it === "number" && it >= 1 && it <= 100 * 365 * DAY;
const LIFETIME = "must be a number of seconds, from 1 to 100 years";

/** A path whose segments do not begin with a dot: neither `/..` nor `/.well-known`. */
const PATH = /^(\/(?!\.)[A-Za-z0-9._~-]+)+$/;

/** For every option: what a good value is, and what to say of a bad one. These are also all the names there are. */
// deno-lint-ignore no-explicit-any
const OPTIONS: Record<keyof PersonalAuthOptions, [isGood: (it: any) => unknown, must: string]> = {
  baseUrl: [(it) => isString(it) && URL.canParse(it), `must be a URL such as "https://your-domain.com"`],
  password: [
    (it) => it === false || (isString(it) && normalizePassword(it) !== ""),
    "must be a non-empty string; leave it out to have one generated",
  ],
  allowedRedirectDomains: [(it) => it === null || isStringList(it), `must be a list such as ["example.com"], or null`],
  accessTokenTtl: [isLifetime, LIFETIME],
  refreshTokenTtl: [isLifetime, LIFETIME],
  store: [(it) => [it?.get, it?.update, it?.list].every(isFunction), `must be a store: fileStore(".oauth-state")`],
  registration: [(it) => typeof it === "boolean", "must be true or false"],
  mcpPath: [
    (it) => isString(it) && PATH.test(it) && !(it in ENDPOINTS) && !(it in OWNER_PAGES),
    `must be a path of its own without a trailing slash, such as "/mcp"`,
  ],
  scopes: [(it) => isStringList(it) || isObject(it), "must be a list of names, or an object from name to description"],
  clients: [(it) => Array.isArray(it) && it.every(isObject), "must be a list of { client_id, redirect_uris }"],
  authenticateOwner: [isFunction, "must be a function (c) => boolean"],
  fetchClientMetadata: [isFunction, "must be a function (url, signal) => Promise<Response>"],
  pages: [
    // The colour becomes part of a style sheet, where nothing is escaped.
    (it) => isObject(it) && isString(it.title ?? "") && /^#[0-9a-f]{6}$/i.test(it.accent ?? "#000000"),
    `must be an object; pages.title is a string, pages.accent a colour such as "#7a3cff"`,
  ],
  onEvent: [isFunction, "must be a function (event) => void"],
};

type Settings = ReturnType<typeof readOptions>;
type TokenRequest = Parameters<PersonalAuth["createToken"]>[0];
type Emit = (type: AuthEvent["type"], message: string, more?: Partial<AuthEvent>) => void;

/** Everything the endpoints share: the checked options, and what the server keeps besides. */
interface Server extends Settings {
  emit: Emit;
  store: Store; // its failures are reported, and answered with 503
  mac: Mac; // the first 64 hex digits of longMac
  longMac: Mac;
  events: EventLog;
  documents: DocumentCache;
  verified: Map<string, VerifiedToken>; // by Authorization header
  passed: symbol; // where a Hono context holds what a guard has found: the next guard does no more
  attempts: Map<string, Attempt>; // to connect, not approved yet, by client_id, the latest last
  found: { at?: number }; // when somebody last called without a token: how a client finds the server
  passwordReady: () => Promise<OwnerRecord>;
}

/** Throws a TypeError with this message unless the condition holds. */
function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new TypeError(message);
}

/** Returns the options, checked and completed. */
function readOptions(options: PersonalAuthOptions) {
  assert(isObject(options), `personalAuth() needs { baseUrl: "https://your-domain.com" }`);
  for (const name of Object.keys(options)) {
    // Reject unknown names: a typo would silently fall back to the default.
    assert(Object.hasOwn(OPTIONS, name), `${quote(name)} is not an option of personalAuth()${didYouMean(name)}`);
  }
  const given: Record<string, unknown> = { ...options };
  for (const [name, [isGood, must]] of Object.entries(OPTIONS)) {
    const value = given[name];
    const found = name === "password" ? "" : `, not ${quote(value)}`;
    assert((value === undefined && name !== "baseUrl") || isGood(value), `${name} ${must}${found}`);
  }
  const { baseUrl, mcpPath = "/mcp", password, authenticateOwner, pages = {}, registration = true } = options;
  const { accessTokenTtl = 30 * DAY, refreshTokenTtl = 365 * DAY, onEvent = logEvent } = options;
  const isOneWay = !authenticateOwner || password === undefined;
  assert(isOneWay, "authenticateOwner is used instead of password: give one of them");
  const { origin, protocol, pathname } = readBaseUrl(baseUrl);
  const basePath = pathname === "/" ? "" : pathname;
  const doubled = `baseUrl must not contain mcpPath as well: write "${baseUrl.slice(0, -mcpPath.length)}"`;
  assert(!basePath.endsWith(mcpPath), doubled);
  return {
    issuer: baseUrl,
    origin,
    secure: protocol === "https:",
    basePath, // or ""
    mcpPath: basePath + mcpPath,
    resource: baseUrl + mcpPath, // the one that tokens are issued for (RFC 8707)
    resourceNames: [baseUrl + mcpPath, baseUrl].map(normalizeResource), // what clients may ask for
    resourceMetadataUrl: `${origin}/.well-known/oauth-protected-resource${basePath}${mcpPath}`,
    scopes: readScopes(options.scopes ?? { mcp: "use every tool of this server" }),
    allowed: readAllowed(options.allowedRedirectDomains),
    clients: readClients(options.clients ?? []),
    password: typeof password === "string" ? normalizePassword(password) : password,
    fetchClientMetadata: options.fetchClientMetadata ?? fetchPublicly,
    ...{ accessTokenTtl, refreshTokenTtl, registration, authenticateOwner, pages, onEvent },
  };
}

/** Names the known option that shares the most pairs of letters with an unknown one, if it shares half of them. */
function didYouMean(name: string): string {
  const pairs = (text: string) => new Set([...text.toLowerCase()].map((letter, i, all) => letter + (all[i + 1] ?? "")));
  const wanted = pairs(name.slice(0, 100));
  const likeness = (option: string) => {
    const known = pairs(option);
    return 2 * [...wanted].filter((pair) => known.has(pair)).length / (wanted.size + known.size);
  };
  const [nearest = ""] = Object.keys(OPTIONS).sort((a, b) => likeness(b) - likeness(a));
  return likeness(nearest) >= 0.5 ? `; did you mean ${nearest}?` : "";
}

function readBaseUrl(baseUrl: string): URL {
  const url = new URL(baseUrl);
  const { protocol, hostname, host, origin, pathname } = url;
  const isPrivate = !hostname.includes(".") || /\.(local|lan|home|internal)$/.test(hostname) ||
    /^(10|192\.168|172\.(1[6-9]|2\d|3[01]))\./.test(hostname);
  const tunnel = "put a tunnel or a proxy with https in front of a server on a local network";
  const advice = isPrivate ? tunnel : `write "https://${host}"`;
  const isSafe = protocol === "https:" || (protocol === "http:" && isLoopback(hostname));
  assert(isSafe, `baseUrl must be https, or http on localhost, because tokens would be sent unencrypted; ${advice}`);
  // Clients compare the issuer byte for byte (RFC 8414 §3.3), so only the one way to write a URL is accepted.
  const canonical = origin + pathname.replace(/\/+$/, "");
  assert(baseUrl === canonical, `baseUrl is ${quote(baseUrl)}; write it exactly like this: "${canonical}"`);
  const fault = `the path of baseUrl may contain letters, digits and ._~- only, not ${quote(pathname)}`;
  assert(pathname === "/" || PATH.test(pathname), fault);
  return url;
}

/** One scope-token (RFC 6749 §3.3). */
const SCOPE = /^[\x21\x23-\x5b\x5d-\x7e]+$/;

/** The scope by which clients ask for a refresh token. */
const OFFLINE_ACCESS = "offline_access";

function readScopes(scopes: string[] | Record<string, string | ScopeOption>) {
  const entries = Array.isArray(scopes) ? scopes.map((name) => [name, {}] as const) : Object.entries(scopes);
  const options = new Map<string, ScopeOption>(
    entries.map(([name, it]) => [name, typeof it === "string" ? { description: it } : it]),
  );
  const all = [...options.keys()];
  const byDefault = all.filter((name) => !options.get(name)?.onRequest);
  assert(byDefault.length > 0, `scopes must name a scope that is granted by default, such as ["mcp"]`);
  for (const [name, { description = "", includes = [] }] of options) {
    const isGood = SCOPE.test(name) && name !== OFFLINE_ACCESS && name !== "openid";
    const rule = "a scope is printable ASCII without spaces and quotes; openid and offline_access cannot be offered";
    assert(isGood, `scopes contains ${quote(name)}: ${rule}`);
    assert(isString(description), `scopes: the description of ${quote(name)} must be a string`);
    const unknown = includes.find((scope) => !options.has(scope));
    assert(unknown === undefined, `scopes: ${quote(name)} includes ${quote(unknown)}, which is not on offer`);
  }
  return {
    all,
    byDefault, // for a client that asks for nothing, or for nothing that is known here
    words: (scope: string) => options.get(scope)?.description || scope,
    withIncluded(scopes: string[]) {
      const reached = new Set(scopes);
      for (const scope of reached) { // a Set visits what is added meanwhile, so this follows chains and ends in circles
        for (const included of options.get(scope)?.includes ?? []) reached.add(included);
      }
      return [...reached];
    },
  };
}

const ALLOW_ENTRY = /^((\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?|(?!https?:)[a-z][a-z0-9+.-]*:\/\/[^\s/?#@\\]*)$/;

function readAllowed(allowed: readonly string[] | null = [...redirects.claude, ...redirects.local]) {
  for (const entry of allowed ?? []) {
    const url = URL.parse(entry.includes("://") ? entry : `https://${entry}`);
    const better = url && (/^https?:$/.test(url.protocol) && !isLoopback(url.hostname) ? url.host : allowEntry(url));
    assert(
      entry === better && ALLOW_ENTRY.test(entry),
      `allowedRedirectDomains holds ${quote(entry)}: write ${better ? `${quote(better)}. An entry is ` : ""}` +
        `"example.com", "*.example.com", "localhost" for every loopback address and port, or "scheme://host" for an ` +
        "app's own scheme",
    );
  }
  return allowed;
}

function readClients(clients: PreregisteredClient[]): PreregisteredClient[] {
  const ids = new Set<string>();
  for (const { client_id, client_secret, redirect_uris } of clients) {
    const check = (good: unknown, must: string) => assert(good, `clients: ${quote(client_id)} ${must}`);
    check(isString(client_id) && /^[\x20-\x7e]+$/.test(client_id), "must be a client_id of printable ASCII");
    check(!ids.has(client_id), "is the client_id of two");
    ids.add(client_id);
    const isLong = client_secret === undefined || (isString(client_secret) && client_secret.length >= 16);
    check(isLong, "needs a client_secret of at least 16 characters");
    check(isStringList(redirect_uris) && redirect_uris.length > 0, "needs a list of redirect_uris");
    for (const uri of redirect_uris) {
      const fault = unsafeRedirect(uri);
      check(!fault, `has redirect_uri ${quote(uri)}, which ${fault}`);
    }
  }
  return clients;
}

// --- The server ---

type Handler = (server: Server, c: Context) => Response | Promise<Response>;

/** What programs post to. None of them reads a cookie. */
const ENDPOINTS: Record<string, Handler> = {
  "/register": registerClient,
  "/token": tokenEndpoint,
  "/revoke": revocationEndpoint,
  "/introspect": introspectionEndpoint,
};

const OWNER_PAGES: Record<string, [show: Handler, change: Handler]> = {
  "/authorize": [showConsent, decideConsent],
  "/connections": [showConnections, changeConnections],
};

/**
 * Makes a complete OAuth 2.1 authorization server and the guard of one person's MCP server, as a Hono app. Mount it at
 * "/" and put its guard before your handler: `app.route("/", auth); app.all("/mcp", auth.guard, handler)`.
 *
 * @throws {TypeError} if an option is wrong; the message says what to write instead.
 * @throws {Error} if the state folder cannot be used; the message says which file and what to do.
 */
export function personalAuth(options: PersonalAuthOptions): PersonalAuth {
  const server = createServer(options);
  const guard = createGuard(server);
  const { basePath, mcpPath } = server;
  const app = new Hono<AuthEnv>();
  const withSlash = (path: string) => [path, `${path}/`];

  for (const [place, document] of discoveryDocuments(server)) {
    for (const path of withSlash(place)) {
      app.use(path, CORS);
      app.get(path, (c) => c.json(document, 200, { ...NOSNIFF, "Cache-Control": "public, max-age=300" }));
      app.all(path, withErrors(server, () => methodNotAllowed("GET, HEAD")));
    }
  }
  // Answer 404 explicitly: OpenID clients fail on partial documents and on an app's catch-all page.
  const openid = "/.well-known/openid-configuration";
  for (const path of new Set([openid + basePath, openid + mcpPath, basePath + openid, mcpPath + openid])) {
    app.all(path, (c) => c.json({ error: "not_found" }, 404, NOSNIFF));
  }
  for (const [path, handler] of Object.entries(ENDPOINTS)) {
    if (path === "/register" && !server.registration) continue;
    const onlyPost: Handler = (server, c) => c.req.method === "POST" ? handler(server, c) : methodNotAllowed("POST");
    for (const route of withSlash(basePath + path)) app.all(route, withCors(withErrors(server, onlyPost)));
  }
  for (const [path, [show, change]] of Object.entries(OWNER_PAGES)) {
    for (const route of withSlash(basePath + path)) {
      app.get(route, withErrors(server, show, errorPage));
      app.post(route, withErrors(server, (server, c) => assertOwnSite(server, c) ?? change(server, c), errorPage));
      app.all(route, withErrors(server, () => methodNotAllowed("GET, HEAD, POST"), errorPage));
    }
  }
  for (const path of new Set([basePath || "/", `${basePath}/`])) app.get(path, homePage(server));

  // A second line behind `auth.guard`, also without the path of baseUrl: a handler at the wrong path is not open.
  for (const path of new Set([mcpPath, mcpPath.slice(basePath.length)])) app.use(`${path}/*`, guard);

  return Object.assign(app, {
    mcpPath,
    guard,
    verifyAccessToken: (token: string) => verifyAccessToken(server, token),
    requireScopes: (...scopes: string[]) => createScopeGuard(server, scopes),
    connections: () => listConnections(server),
    revoke: (id: string) => revoke(server, id),
    createToken: async (request: TokenRequest) => (await createToken(server, request))!,
  });
}

/** Reads the options and puts together what the endpoints share. */
function createServer(options: PersonalAuthOptions): Server {
  const settings = readOptions(options);
  const { issuer, password, authenticateOwner, onEvent } = settings;
  const emit: Emit = (type, message, more) => recordEvent(events, onEvent, { type, message, ...more });
  const store = guardStore(options.store ?? fileStore(".oauth-state"), emit);
  const events: EventLog = { store, key: `events/${issuer}`, waiting: {}, writing: Promise.resolve() };
  const longMac = serverMac(store, issuer, emit);
  const server: Server = {
    ...settings,
    ...{ emit, events, store, longMac },
    mac: async (...parts) => (await longMac(...parts)).slice(0, 64),
    documents: { copies: new Map(), underWay: new Map(), asked: new Map(), own: new Set() },
    verified: new Map(),
    passed: Symbol("passed"),
    attempts: new Map(),
    found: {},
    passwordReady: once(() => ensurePassword(server)),
  };
  // At start, so that a store that another server uses is noticed. A failure is reported, and tried again when needed.
  longMac("start").catch(() => {});
  if (password === false) {
    emit("owner_unprotected", "password is false: anybody who knows the address can connect");
  } else if (!authenticateOwner) {
    const isShort = password !== undefined && password.length < 12;
    if (isShort) emit("password_weak", "the owner's password is short: take 12 characters or more");
    server.passwordReady().catch(() => {}); // also at start, so that a generated password is printed
  }
  return server;
}

// --- Discovery ---

/** Keeps browsers from guessing that an answer is a page. */
const NOSNIFF = { "X-Content-Type-Options": "nosniff" };

/** Lets apps in a web page read an answer. `*` is safe: nothing behind it looks at a cookie; the owner's pages do. */
const CORS = cors({ origin: "*", exposeHeaders: ["WWW-Authenticate", "Retry-After", "Mcp-Session-Id"] });

/** Adds CORS for browsers, which send Origin. A preflight carries no token, so it is answered before the handler. */
function withCors(handler: MiddlewareHandler<AuthEnv>): MiddlewareHandler<AuthEnv> {
  return (c, next) => {
    if (!c.req.raw.headers.has("Origin")) return handler(c, next);
    return CORS(c, async () => {
      const answer = await handler(c, next);
      if (answer) c.res = answer;
    });
  };
}

/**
 * Returns both metadata documents at every place where clients look. They are built from `baseUrl`, never from the
 * request: a forged Host header would be believed, and behind a proxy that ends TLS the request claims to be http.
 */
function discoveryDocuments(server: Server) {
  const { basePath, mcpPath } = server;
  const [authorization, resource] = [
    "/.well-known/oauth-authorization-server",
    "/.well-known/oauth-protected-resource",
  ];
  const metadata = authorizationServerMetadata(server);
  const resourceMetadata = protectedResourceMetadata(server);
  return new Map<string, Record<string, unknown>>([
    [authorization + basePath, metadata], // RFC 8414 §3.1: the path goes behind
    [authorization + mcpPath, metadata], // clients that take the MCP URL for the issuer
    [basePath + authorization, metadata],
    [resource + mcpPath, resourceMetadata], // RFC 9728 §3.1
    [resource + basePath, resourceMetadata], // clients that ask the root only
    [mcpPath + resource, resourceMetadata],
  ]);
}

/** Describes the authorization server. @see https://www.rfc-editor.org/rfc/rfc8414#section-2 */
function authorizationServerMetadata({ issuer, scopes, clients, registration }: Server) {
  const secrets = ["client_secret_post", "client_secret_basic"];
  const authMethods = ["none", ...secrets, "private_key_jwt"]; // Claude looks for "none"
  const algorithms = Object.keys(ASSERTION_ALGORITHMS);
  return {
    issuer,
    authorization_endpoint: `${issuer}/authorize`,
    token_endpoint: `${issuer}/token`,
    ...(registration && { registration_endpoint: `${issuer}/register` }),
    revocation_endpoint: `${issuer}/revoke`,
    // Clients ask for a refresh token only where this list has offline_access (MCP 2026-07-28, refresh tokens).
    scopes_supported: [...scopes.all, OFFLINE_ACCESS],
    response_types_supported: ["code"],
    response_modes_supported: ["query"],
    grant_types_supported: ["authorization_code", "refresh_token"],
    token_endpoint_auth_methods_supported: authMethods,
    token_endpoint_auth_signing_alg_values_supported: algorithms,
    revocation_endpoint_auth_methods_supported: authMethods,
    revocation_endpoint_auth_signing_alg_values_supported: algorithms,
    ...(clients.some(({ client_secret }) => client_secret !== undefined) && {
      introspection_endpoint: `${issuer}/introspect`,
      introspection_endpoint_auth_methods_supported: secrets,
    }),
    code_challenge_methods_supported: ["S256"],
    client_id_metadata_document_supported: true,
    authorization_response_iss_parameter_supported: true,
  };
}

/** Describes the MCP server. @see https://www.rfc-editor.org/rfc/rfc9728#section-2 */
function protectedResourceMetadata({ issuer, resource, scopes, pages }: Server) {
  return {
    resource,
    resource_name: pages.title ?? new URL(issuer).host,
    authorization_servers: [issuer],
    scopes_supported: scopes.byDefault, // without offline_access, which concerns only the authorization server
    bearer_methods_supported: ["header"],
  };
}

// --- Clients ---

/** A client of any origin. `auth`: its document offers nothing else. */
interface Client {
  id: string;
  name: string;
  redirect_uris: string[];
  secret?: string | undefined;
  refreshes: boolean;
  source: "preregistered" | "registered" | "document";
  auth?: "private_key_jwt" | undefined;
  keys?: Jwk[] | string | false; // or where they are
}

const MAX_BODY_BYTES = 64 * 1024;
const MAX_REDIRECT_URIS = 16;
const MAX_URI_LENGTH = 4096;
const MAX_CLIENT_ID_LENGTH = 2048;

/** Registers a client and stores nothing. @see https://www.rfc-editor.org/rfc/rfc7591#appendix-A.5.2 */
async function registerClient(server: Server, c: Context) {
  const { redirect_uris: asked, name, method, refreshes, scope, ...echo } = readClientMetadata(await readJson(c));
  const refusal = (uri: string) => redirectRefusal(server.allowed, uri);
  const redirect_uris = asked.filter((uri) => !refusal(uri)); // a part: Cursor sends mixed lists
  const reasons = asked.flatMap((uri) => refusal(uri) ?? []).join("; ");
  if (reasons) server.emit("redirect_refused", reasons.slice(0, 1000), { clientName: name });
  // At once, not at /authorize: Claude Desktop then tries again with localhost.
  if (redirect_uris.length === 0) throw new OAuthError("invalid_redirect_uri", reasons);
  const hasSecret = method === "client_secret_post" || method === "client_secret_basic";
  // A client_id is the metadata with a MAC, so that a flood of registrations leaves no trace.
  const signed = { n: name, r: redirect_uris, ...(hasSecret && { s: 1 }), ...(!refreshes && { o: 1 }) };
  const client_id = await signedId(server, base64url(utf8.encode(JSON.stringify(signed))));
  assertMetadata(client_id.length <= MAX_CLIENT_ID_LENGTH, "client_name and redirect_uris are too long");
  server.emit("client_registered", "a client registered", { clientName: name });
  noteAttempt(server, { id: client_id, name }, { introduced: seconds() });
  const answer = {
    client_id,
    client_id_issued_at: Math.floor(seconds()),
    ...(hasSecret && { client_secret: await clientSecret(server, client_id), client_secret_expires_at: 0 }),
    ...defined({ client_name: name || undefined, ...echo }),
    redirect_uris,
    // It may differ from the request (RFC 7591 §3.2.1): clients read the answer.
    token_endpoint_auth_method: hasSecret ? method : "none",
    grant_types: ["authorization_code", ...(refreshes ? ["refresh_token"] : [])],
    response_types: ["code"],
    scope: grantedScopes(scope, server.scopes).join(" "),
  };
  return c.json(answer, 201, { "Cache-Control": "no-store" });
}

const signedId = async ({ mac }: Server, payload: string) => `${payload}.${await mac("client_id", payload)}`;
const clientSecret = ({ mac }: Server, client_id: string) => mac("client_secret", client_id);

function assertMetadata(good: unknown, description: string): asserts good {
  if (!good) throw new OAuthError("invalid_client_metadata", description);
}

/** Reads metadata (RFC 7591 §2). `null` counts as absent. */
function readClientMetadata(body: unknown) {
  assertMetadata(isObject(body), "The body must be a JSON object");
  const text = (name: string) => {
    const value = body[name] ?? "";
    assertMetadata(isString(value), `${name} must be a string`);
    return value || undefined;
  };
  const list = (name: string, otherwise: string[]) => {
    const value = body[name] ?? otherwise;
    const [needed] = otherwise;
    assertMetadata(isStringList(value), `${name} must be a list of strings`);
    assertMetadata(!needed || value.includes(needed), `${name} must hold ${needed}`);
    return value;
  };
  const redirect_uris = [...new Set(list("redirect_uris", []))];
  if (redirect_uris.length === 0) throw new OAuthError("invalid_redirect_uri", "redirect_uris is missing or empty");
  assertMetadata(redirect_uris.length <= MAX_REDIRECT_URIS, `redirect_uris may hold ${MAX_REDIRECT_URIS} at the most`);
  list("response_types", ["code"]);
  const client_uri = text("client_uri");
  return {
    redirect_uris,
    name: printable(text("client_name") ?? ""),
    refreshes: list("grant_types", ["authorization_code", "refresh_token"]).includes("refresh_token"),
    method: text("token_endpoint_auth_method") ?? "none",
    scope: text("scope"),
    client_uri: unsafeRedirect(client_uri) ? undefined : client_uri,
    software_id: text("software_id"),
    software_version: text("software_version"),
    application_type: text("application_type"),
  };
}

/** Takes from a name what could make the owner's page look like something else. */
function printable(name: string) {
  const visible = name.slice(0, 2000)
    .replace(/[\p{C}\p{Default_Ignorable_Code_Point}\u2800]/gu, "")
    .replace(/(\p{M}{2})\p{M}+/gu, "$1") // more marks draw over the lines around them
    .replace(/\p{Z}+/gu, " ");
  return [...visible.trim()].slice(0, 200).join(""); // by characters: half of one breaks parsers
}

const preregistered = ({ clients }: Server, id: string) => clients.find(({ client_id }) => client_id === id);

/** Finds a client. `isConnected`: for a connection that it has already. */
async function resolveClient(server: Server, id: string, isConnected = false): Promise<Client | undefined> {
  const known = preregistered(server, id);
  if (known) {
    const { client_secret: secret, redirect_uris, client_name: name = id } = known;
    return { id, name, redirect_uris, secret, refreshes: true, source: "preregistered" };
  }
  if (isDocumentUrl(id)) return await documentClient(server, id);
  // With registration off, who registered before keeps its connections and gets no new one.
  if (!server.registration && !isConnected) return undefined;
  const [payload = ""] = id.split(".");
  if (!equal(id, await signedId(server, payload))) return undefined;
  const { n: name, r: redirect_uris, s, o } = JSON.parse(decodeBase64(payload)!);
  const secret = s && await clientSecret(server, id);
  return { id, name, redirect_uris, secret, refreshes: !o, source: "registered" };
}

/** Authenticates a client. @see https://www.rfc-editor.org/rfc/rfc6749#section-2.3 */
async function authenticateClient(server: Server, c: Context, form: URLSearchParams) {
  const authorization = c.req.header("Authorization") ?? "";
  const isBasic = /^basic /i.test(authorization);
  const assertion = form.get("client_assertion");
  let id = form.get("client_id") ?? (assertion && readAssertion(assertion).claims.sub);
  let secrets = form.getAll("client_secret");
  const ways = [isBasic, secrets.length > 0, assertion !== null].filter(Boolean);
  if (ways.length > 1) throw invalidRequest("The client authenticates in more than one way (RFC 6749 §2.3)");
  if (isBasic) {
    const pair = decodeBase64(authorization.slice(6))?.match(/^([^:]*):(.*)$/s);
    assertClient(pair, "The Basic credentials cannot be read");
    const [, name = "", password = ""] = pair;
    // RFC 6749 §2.3.1 form-encodes both halves; many clients do not. Each is taken in either way.
    const decode = (value: string) => new URLSearchParams(`value=${value.replaceAll("&", "%26")}`).get("value")!;
    const known = preregistered(server, name) ? name : decode(name);
    assertClient(id === null || id === known, "client_id differs between header and body");
    id = known;
    secrets = [password, decode(password)];
  }
  assertClient(isString(id), "client_id is missing");
  if (isDocumentUrl(id) && !preregistered(server, id)) return await authenticatePublished(server, id, form);
  const client = await resolveClient(server, id, form.get("grant_type") !== "authorization_code");
  assertClient(client, "This client is unknown here: register again");
  const { secret } = client;
  const isGood = secret === undefined || secrets.some((given) => equal(given, secret));
  assertClient(isGood, "The client_secret is missing or wrong");
  return client;
}

function assertClient(good: unknown, description: string): asserts good {
  if (!good) throw new OAuthError("invalid_client", description, { status: 401 });
}

/** Authenticates a client with a document: by an assertion, or by nothing where its grant allows that. */
async function authenticatePublished(server: Server, id: string, form: URLSearchParams) {
  const places = [["pac", "code"], ["prt", "refresh_token"], ["prt", "token"], ["pat", "token"]] as const;
  const ids = places.flatMap(([kind, name]) => grantId(kind, form.get(name) ?? "") ?? []);
  const grants = await Promise.all(ids.map((id) => readGrant(server, id)));
  const clients = grants.flatMap((grant) => grant?.client.id === id ? [grant.client] : []);
  const isConnected = clients.length > 0;
  const isHeld = clients.some(({ auth }) => auth);
  if (isConnected) server.documents.own.add(id);
  const assertion = form.get("client_assertion");
  try {
    if (assertion !== null) {
      assertClient(form.get("client_assertion_type") === ASSERTION_TYPE, "client_assertion_type is wrong");
      const { jti, exp } = await verifyAssertion(server, id, assertion);
      // Only for a connection that there is, or strangers with keys of their own could fill the store.
      if (isConnected) await spendAssertion(server, id, jti, exp);
    } else if (isHeld) {
      const { auth } = await publishedClient(server, id); // its present document decides
      assertClient(!auth, "This client must authenticate by private_key_jwt, as its metadata says");
    }
  } catch (error) {
    const isOurs = error instanceof OAuthError; // what other servers say is for the owner only
    const reason = isOurs ? error.message : String(error);
    if (isConnected) server.emit("client_assertion_refused", `${id}: ${reason}`, isOurs ? {} : { cause: error });
    assertClient(isTemporary(error), isOurs ? reason : "The client's keys cannot be used");
    // Others go on: to ignore an assertion is no weaker than to accept a request without one.
    if (isHeld) throw tryLater("The client's keys cannot be fetched at the moment");
  }
  return publicClient(id);
}

const ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
const MAX_ASSERTION_AGE = HOUR;
const MAX_CLOCK_SKEW = MINUTE;
const MAX_TRIED_KEYS = 4;

type Jwk = Record<string, string | undefined>;
type Algorithm = { kty: string; name: string; [more: string]: unknown };

/** What each `alg` means, with the one type of key it takes: a public key is never the secret of an HMAC. */
const ASSERTION_ALGORITHMS: Record<string, Algorithm> = {
  ES256: { kty: "EC", namedCurve: "P-256", name: "ECDSA", hash: "SHA-256" },
  RS256: { kty: "RSA", name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" },
  PS256: { kty: "RSA", name: "RSA-PSS", hash: "SHA-256", saltLength: 32 },
  EdDSA: { kty: "OKP", namedCurve: "Ed25519", name: "Ed25519" },
};

/** Decodes a JWT (RFC 7519) without believing any of it. */
function readAssertion(assertion: string) {
  const [head = "", body = "", tail = "", more] = assertion.split(".");
  try {
    const [header, claims] = [head, body].map((part) => JSON.parse(decodeBase64(part)!));
    const [signature, signed] = [base64Bytes(tail), utf8.encode(`${head}.${body}`)];
    if (more === undefined && isObject(header) && isObject(claims)) return { header, claims, signature, signed };
  } catch { /* no JWT */ }
  assertClient(false, "The client_assertion is not a JWT");
}

/** Verifies a client's assertion. @see https://www.rfc-editor.org/rfc/rfc7523#section-3 */
async function verifyAssertion(server: Server, id: string, assertion: string) {
  const jwt = readAssertion(assertion);
  const { header: { alg, kid, typ = "JWT", crit }, claims: { iss, sub, aud, exp, nbf = 0, iat = 0, jti } } = jwt;
  const { issuer } = server;
  const algorithms = Object.keys(ASSERTION_ALGORITHMS);
  const now = seconds();
  const isWithin = (at: unknown, from: number, to: number) =>
    typeof at === "number" && at > from - MAX_CLOCK_SKEW && at < to + MAX_CLOCK_SKEW;
  const rules: [good: unknown, must: string][] = [
    [algorithms.includes(alg), `be signed by one of ${algorithms.join(", ")}`],
    [crit === undefined, "have no critical extensions"],
    // Not what the same key signed for another purpose, such as an ID token (RFC 8725 §3.11).
    [isString(typ) && /^(application\/)?(client-authentication\+)?jwt$/i.test(typ), "be of the type JWT"],
    [iss === id && sub === id, "have the client_id as iss and sub"],
    [[aud].flat().some((to) => to === issuer || to === `${issuer}/token`), `have aud "${issuer}"`],
    [isWithin(exp, now, now + MAX_ASSERTION_AGE), `expire within the next ${MAX_ASSERTION_AGE} seconds`],
    [isWithin(nbf, 0, now) && isWithin(iat, 0, now), "have nbf and iat in the past"],
    [isString(jti) && jti !== "" && jti.length <= 256, "have a jti of 256 characters at the most"],
  ];
  for (const [good, must] of rules) assertClient(good, `The client_assertion must ${must}`);
  const algorithm = ASSERTION_ALGORITHMS[alg]!;
  for (const since of [0, now]) { // once more if none fits: they may just have been changed
    const keys = (await publishedKeys(server, id, since)).filter((key) => fits(key, jwt.header, algorithm));
    for (const key of keys.slice(0, MAX_TRIED_KEYS)) if (await isSignedBy(key, jwt, algorithm)) return { jti, exp };
    if (keys.length > 0 && kid !== undefined) break;
  }
  assertClient(false, "The client_assertion is signed by none of the client's keys");
}

/** Tells whether a key may be tried. With keys of any size, each request could cost much computing. */
function fits({ kty, crv, n = "", e = "", kid, alg, use = "sig" }: Jwk, header: Jwk, algorithm: Algorithm) {
  const isCommon = kty !== "RSA" || (n.length >= 342 && n.length <= 683 && e.length <= 4); // 2,048 to 4,096 bits
  const isChosen = kid === (header.kid ?? kid) && header.alg === (alg ?? header.alg) && use === "sig";
  return isChosen && isCommon && kty === algorithm.kty && crv === algorithm.namedCurve;
}

async function isSignedBy({ kty, crv, x, y, n, e }: Jwk, jwt: ReturnType<typeof readAssertion>, algorithm: Algorithm) {
  const members = defined({ kty, crv, x, y, n, e });
  try {
    const key = await crypto.subtle.importKey("jwk", members, algorithm, false, ["verify"]);
    return await crypto.subtle.verify(algorithm, key, jwt.signature, jwt.signed);
  } catch {
    return false; // no key
  }
}

/** Spends an assertion: whoever reads it on its way can use it on no server of this store. */
async function spendAssertion(server: Server, id: string, jti: string, exp: number) {
  const user = random(16);
  const key = `assertion/${await server.mac("assertion", id, jti)}`;
  const first = await server.store.update(key, (current) => current ?? user, { expiresAt: exp + MAX_CLOCK_SKEW });
  assertClient(first === user, "The client_assertion was used before");
}

// --- Client ID Metadata Documents ---

const MAX_DOCUMENT_BYTES = 16 * 1024;
const MAX_DOCUMENTS = 100;
const MAX_COPY_AGE = 30 * DAY;
const MAX_DOWNLOADS = 8;
const MAX_DOWNLOADS_PER_HOST = 2;
const MAX_DOWNLOADS_PER_MINUTE = 60;

/** In memory only, and bounded, because strangers can fill it. */
interface DocumentCache {
  copies: Map<string, { id: string; body: unknown; at: number; fresh: number }>; // by client and URL
  underWay: Map<string, Download>; // by URL, the oldest first
  asked: Map<string, { times: number; since: number }>; // by host, or by connected client
  own: Set<string>; // clients with a connection: strangers push out none of their copies and downloads
}

interface Download {
  host: string;
  since: number;
  controller: AbortController;
  over: ReturnType<typeof fetchJson>; // when it has really ended, although nobody waits for it any more
  answer: Download["over"];
}

/** @see https://datatracker.ietf.org/doc/draft-ietf-oauth-client-id-metadata-document */
function isDocumentUrl(id: string) {
  if (id.length > MAX_CLIENT_ID_LENGTH || !/^https:\/\/[^/@]+\/[^?#][^#]*$/.test(id)) return false;
  return URL.parse(id)?.href === id; // in one form only: client ids are compared as strings
}

const publicClient = (id: string, more: Partial<Client> = {}): Client => (
  { id, name: new URL(id).host, redirect_uris: [], refreshes: true, source: "document", ...more }
);

async function documentClient(server: Server, id: string) {
  try {
    return await publishedClient(server, id);
  } catch (cause) {
    // A document that was withdrawn or is wrong gets no stand-in: its author may have meant it.
    const known = isTemporary(cause) && wellKnownClient(id);
    if (known) return known;
    const isOurs = cause instanceof OAuthError;
    if (isOurs && cause.status === 503) throw cause;
    const description = `The app's metadata at ${id} cannot be used: ${isOurs ? cause.message : "it cannot be read"}`;
    // Not invalid_client: the client would take its registration for dead and come back with the same address.
    throw invalidRequest(description, { event: "client_document_refused", cause });
  }
}

const publishedClient = (server: Server, id: string, since?: number) =>
  fetchCached(server, id, id, (body) => readClientDocument(id, body), since);

async function publishedKeys(server: Server, id: string, since: number) {
  const { keys } = await publishedClient(server, id, since);
  assertMetadata(keys, "The client publishes no keys");
  return isString(keys) ? await fetchCached(server, id, keys, readKeys, since) : keys;
}

function readClientDocument(id: string, body: unknown) {
  const { name, redirect_uris, refreshes, method } = readClientMetadata(body);
  const { jwks, jwks_uri, token_endpoint_auth_methods_supported: more, ...rest } = body as Record<string, unknown>;
  assertMetadata(rest.client_id === id, "it names another client_id"); // a copy of somebody else's document
  assertMetadata(name, "it has no client_name");
  const secret = [method, ...Object.keys(rest)].find((name) => name.startsWith("client_secret"));
  assertMetadata(!secret, `it relies on a shared secret (${secret}), which everybody can read`);
  const methods = [method, ...(Array.isArray(more) ? more : [])];
  const isPublic = methods.includes("none");
  const isKnown = isPublic || methods.includes("private_key_jwt");
  assertMetadata(isKnown, `it asks for ${quote(method)}, which this server does not offer`);
  const uri = (isString(jwks_uri) && URL.parse(jwks_uri)?.href) || "";
  const keys = jwks ? readKeys(jwks) : isDocumentUrl(uri) && uri;
  assertMetadata(isPublic || keys, "it has neither jwks nor a jwks_uri of https");
  const auth = isPublic ? undefined : "private_key_jwt";
  return publicClient(id, { name, redirect_uris, refreshes, auth, keys });
}

/** Reads a JWK Set. One with a private key is refused, so that its author learns of it. */
function readKeys(body: unknown): Jwk[] {
  const keys: unknown = isObject(body) ? body.keys : undefined;
  assertMetadata(Array.isArray(keys) && keys.every(isObject), "jwks must be a JWK Set");
  const secret = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].find((name) => keys.some((key) => name in key));
  assertMetadata(!secret, `jwks holds a private key (${secret}): replace it, everybody can read it`);
  return keys.map((key) => Object.fromEntries(Object.entries(key).filter(([, value]) => isString(value))));
}

/** Returns what `parse` makes of a document as it was after `since`, or of an old copy during an outage. */
async function fetchCached<T>(server: Server, id: string, url: string, parse: (body: unknown) => T, since = 0) {
  const { copies, own } = server.documents;
  const key = `${id} ${url}`; // of its own for each client: nobody else replaces or removes its copy
  const known = copies.get(key);
  const copy = known && known.at >= since ? known : undefined;
  const at = seconds();
  if (copy && at < copy.fresh) return parse(copy.body);
  try {
    const { body, maxAge } = await download(server, url, id);
    const parsed = parse(body);
    remember(copies, key, { id, body, at, fresh: at + maxAge }, ({ id }) => own.has(id));
    return parsed;
  } catch (error) {
    if (!isTemporary(error)) copies.delete(key); // errors are not cached: what its author repairs works at once
    else if (copy && seconds() < copy.at + MAX_COPY_AGE) return parse(copy.body);
    throw error;
  }
}

class Unusable extends Error {} // by a fault of its own: anything else that fails is an outage

const isTemporary = (error: unknown) =>
  error instanceof OAuthError
    ? error.status === 503
    : ![Unusable, TooLarge, SyntaxError].some((it) => error instanceof it);

const tryLater = (description: string) =>
  new OAuthError("temporarily_unavailable", description, { status: 503, headers: { "Retry-After": "5" } });

/** Sets an entry of a map that forgets its oldest ones, but kept ones last. */
function remember<T>(map: Map<string, T>, key: string, value: T, isKept = (_: T) => false): void {
  map.delete(key); // moves it to the end
  map.set(key, value);
  if (map.size <= MAX_DOCUMENTS) return;
  const keys = [...map.keys()];
  map.delete(keys.find((key) => !isKept(map.get(key)!)) ?? keys[0]!);
}

/** Downloads a document, once for all who ask meanwhile; throws 503 if too many are asked for. */
async function download(server: Server, url: string, id: string) {
  const { underWay, asked, own } = server.documents;
  const { hostname: host } = new URL(url);
  const inTheWay = () => {
    const all = [...underWay.values()];
    const ofHost = all.filter((download) => download.host === host);
    if (ofHost.length >= MAX_DOWNLOADS_PER_HOST) return ofHost;
    return all.length >= MAX_DOWNLOADS ? all : [];
  };
  // A slow one gives way: silent hosts must not keep another app out.
  const slow = inTheWay().find(({ since, controller }) => seconds() - since > 1 && !controller.signal.aborted);
  if (slow && !underWay.has(url)) {
    slow.controller.abort();
    await Promise.race([slow.over.catch(() => {}), delay(100)]); // at once, or others take its place
  }
  const running = underWay.get(url);
  if (running) return await running.answer;
  const now = seconds();
  const counted = own.has(id) ? id : host;
  const recent = asked.get(counted);
  const { times, since } = recent && Math.abs(now - recent.since) < MINUTE ? recent : { times: 0, since: now };
  if (inTheWay().length > 0 || times >= MAX_DOWNLOADS_PER_MINUTE) {
    throw tryLater("Too many apps ask at once; try again in a few seconds");
  }
  remember(asked, counted, { times: times + 1, since });
  const controller = new AbortController();
  const signal = AbortSignal.any([controller.signal, AbortSignal.timeout(5000)]);
  const over = fetchJson(server, url, signal).finally(() => underWay.delete(url));
  const answer = inTime(over, signal);
  underWay.set(url, { host, since: now, controller, over, answer });
  return await answer;
}

/** Fetches one document. Its time and size are counted on the stream, whatever its headers promise. */
async function fetchJson({ fetchClientMetadata }: Server, url: string, signal: AbortSignal) {
  const { status, body, headers } = await fetchClientMetadata(url, signal);
  const text = status === 200 ? await inTime(readLimited(body, MAX_DOCUMENT_BYTES), signal) : await body?.cancel();
  // A firewall's refusal, or too many requests, tell nothing about the document itself.
  if (status >= 500 || status === 403 || status === 429) throw new Error(`answered ${status}`);
  if (text === undefined) throw new Unusable(`answered ${status}`); // no redirects: they could lead anywhere
  const control = headers.get("Cache-Control")?.toLowerCase() ?? ""; // RFC 9111
  const age = /no-store|no-cache/.test(control) ? 0 : Number(control.match(/max-age=(\d+)/)?.[1] ?? HOUR);
  return { body: JSON.parse(text) as unknown, maxAge: Math.min(Math.max(age, MINUTE), DAY) };
}

/** Gives up on a promise when the signal says so. */
function inTime<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const giveUp = () => reject(new Error("did not answer in time"));
    if (signal.aborted) giveUp();
    signal.addEventListener("abort", giveUp);
    promise.then(resolve, reject);
  });
}

/** Fetches from public addresses only: not from this machine, its network, or a cloud's metadata service. */
async function fetchPublicly(url: string, signal: AbortSignal) {
  const [https, { isIP }] = [nodeModule("node:https"), nodeModule("node:net")];
  const { hostname } = new URL(url);
  const literal = hostname.replace(/^\[|\]$/g, ""); // an address is connected to without a lookup
  const found: string[] = isIP(literal) ? [literal] : await resolveName(hostname, signal);
  const inside = found.find((address) => !isPublicAddress(address));
  if (inside !== undefined) throw new Unusable(`${hostname} resolves to ${inside}, which is not a public address`);
  const addresses = found.map((address) => ({ address, family: isIP(address) }));
  const [first] = addresses;
  if (!first) throw new Error(`${hostname} has no address`);
  // Only to what was checked: a name that changes its answer in between gains nothing.
  const lookup = (_name: string, { all }: { all?: boolean }, done: (...found: unknown[]) => void) =>
    all ? done(null, addresses) : done(null, first.address, first.family);
  // A proxy of the environment would look the name up again, and connect to whatever it finds.
  const agent = new https.Agent({ proxyEnv: {} });
  const headers = { Accept: "application/json", "User-Agent": "personal-auth" };
  // deno-lint-ignore no-explicit-any
  const message: any = await new Promise((resolve, reject) => {
    https.get(url, { agent, lookup, signal, headers }, resolve).on("error", reject);
  });
  const { statusCode: status } = message;
  const body = status === 200 ? nodeModule("node:stream").Readable.toWeb(message) : null;
  if (!body) message.destroy(); // or the socket stays open for as long as the other side likes
  return new Response(body, { status, headers: { "Cache-Control": message.headers["cache-control"] ?? "" } });
}

/** Resolves a name, by queries that can be ended: a silent name server would use up getaddrinfo()'s threads. */
async function resolveName(hostname: string, signal: AbortSignal) {
  const resolver = new (nodeModule("node:dns").promises.Resolver)({ timeout: 1000, tries: 2 });
  signal.addEventListener("abort", () => resolver.cancel());
  const none = () => []; // a family may have none
  const both = [resolver.resolve4(hostname).catch(none), resolver.resolve6(hostname).catch(none)];
  return (await Promise.all<string[]>(both)).flat();
}

/** What is not public by the special-purpose address registries (RFC 6890). The last of IPv4 is Azure's. */
const PRIVATE_RANGES =
  "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 " +
  "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 " +
  "203.0.113.0/24 224.0.0.0/3 168.63.129.16/32 2001::/23 2001:db8::/32 2002::/16 3fff::/20 2620:4f:8000::/48";

const privateAddresses = once(() => {
  const { BlockList, isIP } = nodeModule("node:net");
  const list = new BlockList();
  for (const range of PRIVATE_RANGES.split(" ")) {
    const [address, bits] = range.split("/");
    list.addSubnet(address, Number(bits), `ipv${isIP(address)}`);
  }
  return list;
});

/** Tells whether an address may be connected to on a stranger's word. Of IPv6 only 2000::/3 is public. */
function isPublicAddress(address: string) {
  const family = nodeModule("node:net").isIP(address);
  const isGlobal = family === 4 || (family === 6 && /^[23][0-9a-f]{3}:[^%]*$/i.test(address)); // % names an interface
  return isGlobal && !privateAddresses().check(address, `ipv${family}`);
}

/** Name → redirect URIs that the most used clients published in 2026. `*` is one segment of the path. */
const WELL_KNOWN_CLIENTS: Record<string, string> = {
  "claude.ai/oauth/mcp-oauth-client-metadata":
    "Claude → https://claude.ai/api/mcp/auth_callback https://claude.com/api/mcp/auth_callback",
  "claude.ai/oauth/claude-code-client-metadata": "Claude Code → http://localhost/callback http://127.0.0.1/callback",
  "chatgpt.com/oauth/client.json": "ChatGPT → https://chatgpt.com/connector_platform_oauth_redirect",
  "chatgpt.com/oauth/codex/client.json": "Codex → http://127.0.0.1/callback",
  "chatgpt.com/oauth/*/client.json": "ChatGPT → https://chatgpt.com/connector/oauth/*",
  "chatgpt.com/oauth/codex/*/client.json": "Codex → http://127.0.0.1/callback/*",
  "vscode.dev/oauth/client-metadata.json":
    "Visual Studio Code → https://vscode.dev/redirect https://insiders.vscode.dev/redirect http://127.0.0.1/ " +
    "http://localhost/",
};

function wellKnownClient(id: string) {
  const [, segment = " "] = id.match(/\/([\w-]+)\/client\.json$/) ?? []; // no URL holds a space
  const fill = (text: string) => text.replace("*", segment);
  for (const [address, client] of Object.entries(WELL_KNOWN_CLIENTS)) {
    const [name = "", uris = ""] = fill(client).split(" → ");
    if (id === `https://${fill(address)}`) return publicClient(id, { name, redirect_uris: uris.split(" ") });
  }
}

// --- Redirect policy ---

/**
 * Returns why a redirect URI is refused, or `undefined`. The list keeps other apps off the owner's page. It does not
 * keep strangers out: all Claude accounts use one redirect URI.
 */
function redirectRefusal(allowed: readonly string[] | null, uri: string): string | undefined {
  const fault = unsafeRedirect(uri);
  if (fault) return `redirect_uri ${quote(uri)} ${fault}`;
  const url = new URL(uri);
  if (allowed === null || isListed(allowed, url)) return undefined;
  const entry = quote(allowEntry(url));
  return `redirect_uri ${quote(uri)} is not allowed here; the owner can add ${entry} to allowedRedirectDomains`;
}

function isListed(allowed: readonly string[] | null, url: URL): boolean {
  const entry = allowEntry(url);
  const isBelow = (wildcard: string) => wildcard.startsWith("*.") && entry.endsWith(wildcard.slice(1));
  return allowed?.some((item) => item === entry || (url.protocol === "https:" && isBelow(item))) ?? false;
}

/** The entry of `allowedRedirectDomains` that lets a URL in. */
function allowEntry(url: URL): string {
  if (isLocal(url)) return "localhost";
  return url.protocol === "https:" ? url.host : `${url.protocol}//${url.host}`;
}

/** Schemes a browser acts on itself: a code sent there is script, or a file, or readable on the way. */
const NEVER_SCHEMES = /^(javascript|data|file|blob|filesystem|vbscript|about|view-source|intent|ftp|wss?):/i;

/** Returns what no list can allow. Each rule closes a way to make a URI look like another one, or run as script. */
function unsafeRedirect(uri: unknown): string | undefined {
  if (typeof uri !== "string" || uri.length > MAX_URI_LENGTH) {
    return `must be a string of ${MAX_URI_LENGTH} characters at the most`;
  }
  if (!/^[\x21-\x7e]+$/.test(uri)) return "must be printable ASCII without spaces";
  if (uri.includes("\\")) return "must not hold a backslash"; // https://claude.ai\@evil.example
  if (uri.includes("#")) return "must not have a fragment"; // RFC 6749 §3.1.2
  if (NEVER_SCHEMES.test(uri)) return "has a scheme that browsers run or open themselves";
  const url = URL.parse(uri);
  if (!url || !/^[a-z][a-z0-9+.-]*:/i.test(uri)) return "is not an absolute URI";
  if (/^[^/?]*\/\/[^/?]*@/.test(uri)) return "must not hold a user name"; // https://claude.ai@evil.example
  if (url.protocol === "http:" && !isLoopback(url.hostname)) return "must be https, or http on localhost";
  if (/^https?:/.test(url.protocol) && !/^https?:\/\/[^/]/i.test(uri)) return "must name its host after //";
  // A client that takes the first of two equal parameters would read the one that stood there before.
  const taken = ["code", "state", "iss", "error"].find((name) => url.searchParams.has(name));
  return taken && `must not carry the parameter ${taken}`;
}

const isLoopback = (hostname: string) => ["localhost", "127.0.0.1", "[::1]"].includes(hostname);

/**
 * Compares exactly (OAuth 2.1 §4.1.1), but lets a native app listen on any port of loopback (RFC 8252 §7.3). The three
 * names of loopback stay different: whoever holds one need not hold the others.
 */
function sameRedirect(registered: string, requested: string): boolean {
  const portless = (uri: string) =>
    uri.replace(/^(http:\/\/(?:localhost|127\.0\.0\.1|\[::1\])):\d{1,5}(?=[/?]|$)/, "$1");
  return registered === requested || portless(registered) === portless(requested);
}

// --- Authorization endpoint ---

/** Only what has passed `authorizationTarget` is ever redirected to. */
type Target = { client: Client; redirect_uri: string; state: string | null };
/** `encoded`: the query, word for word. */
type AuthorizationRequest = Target & { encoded: string; scopes: string[]; code_challenge: string };
const MAX_REQUEST_LENGTH = 16 * 1024;

/**
 * Shows the consent page and changes nothing, so that a prefetch, a preview or a crawler does no harm.
 * @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-4.1
 */
async function showConsent(server: Server, c: Context) {
  const encoded = c.req.url.split("?").slice(1).join("?").split("#")[0]!; // not new URL(): a hostile Host breaks it
  const request = await readRequest(server, c, encoded);
  const session = await readSession(server, c);
  noteAttempt(server, request.client, { shown: seconds() });
  return await consentPage(server, c, request, session);
}

/** Carries out the owner's decision. The form holds the request word for word, and it is checked again. */
async function decideConsent(server: Server, c: Context) {
  const form = Object.fromEntries(await readForm(c));
  const { request: encoded = "", csrf = "", decision = "", password = "" } = form;
  const session = await readSession(server, c);
  if (encoded === "" || !session.known) return expiredPage(server, c);
  const request = await readRequest(server, c, encoded);
  const { client, redirect_uri } = request;
  const elsewhere = decision === "approve_elsewhere";
  // Only the address of a loopback listener is ever shown: any other app is reached from here, and its code is no text
  // that somebody could be talked into sending on.
  if (elsewhere && !isLocal(new URL(redirect_uri))) throw invalidRequest("This app can be reached from this browser");
  const isDecided = elsewhere || decision === "approve" || decision === "deny";
  if (!isDecided || !await checkCsrf(server, session.browser, encoded, csrf)) {
    // The first of two clicks may have signed the owner in and replaced the browser's secret. The form proves nothing
    // then, but the session does: only the owner is told what came of the first click.
    const earlier = session.isOwner ? await approve(server, csrf, request, true) : undefined;
    if (earlier) return approvedPage(server, c, request, earlier.code, elsewhere);
    // It was open too long, or in a second tab while the first one signed in: ask again, and lose nothing.
    return await consentPage(server, c, request, session, undefined, OPEN_TOO_LONG);
  }
  if (decision === "deny") {
    server.emit("connection_denied", "the request was denied", { clientName: client.name });
    noteAttempt(server, client, { denied: seconds() });
    const answer = { error: "access_denied", error_description: "The owner denied the request" };
    return redirectBack(server, c, request, answer);
  }
  const problem = await signIn(server, c, session, password);
  if (problem) return await consentPage(server, c, request, session, csrf, problem);
  const approval = await approve(server, csrf, request);
  if (!approval) throw invalidRequest("The app has changed its redirect_uri since the page was shown: connect again");
  const { code, repeated } = approval;
  if (!repeated) server.emit("connection_approved", `approved for ${redirect_uri}`, { clientName: client.name });
  if (repeated || elsewhere) return approvedPage(server, c, request, code, elsewhere);
  return redirectBack(server, c, request, { code: code! });
}

/** Returns the checked request. A faulty one is answered to the client, or on a page if nobody is trusted with it. */
async function readRequest(server: Server, c: Context, encoded: string): Promise<AuthorizationRequest> {
  let target: Target | undefined;
  try {
    if (encoded.length > MAX_REQUEST_LENGTH) throw invalidRequest("The request is too long");
    const params = parameters(encoded);
    target = await authorizationTarget(server, params);
    return { ...target, encoded, ...authorizationRequest(server, params) };
  } catch (error) {
    if (!target) throw await faultPage(server, c, error);
    if (!(error instanceof OAuthError)) throw error;
    await noteRefusal(server, error, undefined, target.client);
    const error_description = errorDescription(error.message);
    throw await redirectBack(server, c, target, { error: error.code, error_description });
  }
}

/** Answers with the code on a page: to be carried to another computer, or because the form was sent before. */
function approvedPage(server: Server, c: Context, request: AuthorizationRequest, code = "", elsewhere: boolean) {
  const uri = code && answerUri(server, request, { code });
  return uri && elsewhere ? elsewherePage(server, c, uri) : answeredPage(server, c, request.client.name, uri);
}

/**
 * Returns the redirect URI with the answer and `iss`, so that a client of several servers knows which one answered.
 * @see https://www.rfc-editor.org/rfc/rfc9207#section-2
 */
function answerUri({ issuer }: Server, { redirect_uri, state }: Target, answer: Record<string, string>): string {
  const params = new URLSearchParams({ ...answer, ...(state !== null && { state }), iss: issuer });
  // Appended, so that the URI stays byte for byte what was registered. %20, because some clients show a + as it is.
  return `${redirect_uri}${redirect_uri.includes("?") ? "&" : "?"}${params.toString().replaceAll("+", "%20")}`;
}

/** Sends the browser back to the client, by way of a page if the target is a private-use scheme. */
function redirectBack(server: Server, c: Context, target: Target, answer: Record<string, string>) {
  const uri = answerUri(server, target, answer);
  if (!/^https?:/i.test(uri)) return openAppPage(server, c, uri, target.client.name, "code" in answer);
  c.header("Cache-Control", "no-store");
  return c.redirect(uri, 302); // never 307: the browser would post the owner's password on to the client
}

const invalidRequest = (description: string, details?: OAuthErrorDetails) =>
  new OAuthError("invalid_request", description, details);

/** Finds client and redirect URI. Until both are known good, nothing may be redirected (OAuth 2.1 §4.1.2.1). */
async function authorizationTarget(server: Server, params: URLSearchParams): Promise<Target> {
  const client = await resolveClient(server, required(params, "client_id"));
  const unknown = "This server does not know the app that sent you here";
  if (!client) throw new OAuthError("invalid_client", unknown, { status: 401 });
  const { redirect_uris, source, name: clientName } = client;
  const only = redirect_uris.length === 1 ? redirect_uris[0] : undefined;
  const redirect_uri = only !== undefined && !params.has("redirect_uri") ? only : required(params, "redirect_uri");
  const event = { event: "redirect_refused", clientName } as const;
  if (!redirect_uris.some((registered) => sameRedirect(registered, redirect_uri))) {
    const description = `redirect_uri ${quote(redirect_uri)} is not one that the client registered`;
    throw invalidRequest(description, { ...event, reason: `${description}: ${quote(redirect_uris)}` });
  }
  // Checked again although registration did: the owner may have shortened the list, and a signed client_id stays valid.
  const isOwn = source === "preregistered";
  const refused = isOwn ? unsafeRedirect(redirect_uri) : redirectRefusal(server.allowed, redirect_uri);
  if (refused) throw invalidRequest(refused, event);
  return { client, redirect_uri, state: params.get("state") };
}

/** Reads the rest of the request. What is wrong with it goes back to the client (OAuth 2.1 §4.1.1, RFC 7636 §4.3). */
function authorizationRequest(server: Server, params: URLSearchParams) {
  for (const name of ["request", "request_uri"]) {
    if (params.has(name)) throw new OAuthError(`${name}_not_supported`, "Request objects are not supported");
  }
  if (required(params, "response_type") !== "code") {
    throw new OAuthError("unsupported_response_type", "response_type must be code");
  }
  if ((params.get("response_mode") ?? "query") !== "query") throw invalidRequest("response_mode must be query");
  // Without PKCE a stolen code is a stolen connection; "plain" sends the verifier where codes are stolen from.
  const code_challenge = params.get("code_challenge");
  if (code_challenge === null) throw invalidRequest("code_challenge is missing: PKCE is required");
  if (params.get("code_challenge_method") !== "S256") throw invalidRequest("code_challenge_method must be S256");
  const isDigest = /^[A-Za-z0-9_-]{43}$/.test(code_challenge);
  if (!isDigest) throw invalidRequest("code_challenge must be a base64url SHA-256 digest");
  checkResource(server, params);
  return { code_challenge, scopes: grantedScopes(params.get("scope"), server.scopes) };
}

/** Answers a request that names nobody who could be answered: a page, or JSON for a program that asks for it. */
function faultPage(server: Server, c: Context, error: unknown) {
  if (!(error instanceof OAuthError) || error.status >= 500) throw error;
  const { code, message, details: { event, reason, clientName, cause } } = error;
  if (event) server.emit(event, reason ?? message, defined({ clientName, cause }));
  const accept = c.req.header("Accept") ?? "";
  // mcp-remote asks for JSON before it opens the browser, and registers again if it reads invalid_client.
  if (accept.includes("application/json") && !accept.includes("text/html")) return errorResponse(server, c, error);
  const [title = "", advice = ""] = (FAULTS[event ?? code] ?? FAULTS.invalid_request!).split(" → ");
  return messagePage(server, c, 400, title, `${message}.`, advice);
}

/** Title → advice for what a person sees, by event or error code. */
const FAULTS: Record<string, string> = {
  invalid_client: "This server does not know the app → Remove this server from the app and add it again.",
  client_document_refused: "This app cannot be checked → This server must be able to read its address. Try later.",
  redirect_refused: "This app is not allowed here → Nothing was shared. If you did not start this, close the page.",
  invalid_request: "That request cannot be answered → Nothing was shared. If you started this, connect again.",
};

/**
 * Requires that every `resource` is this one. Clients differ in slashes, case and default ports, and some send the base
 * URL; the audience that is stored and checked is always the canonical URL.
 * @see https://www.rfc-editor.org/rfc/rfc8707#section-2
 */
function checkResource({ resource, resourceNames }: Server, params: URLSearchParams) {
  for (const asked of params.getAll("resource")) {
    if (resourceNames.includes(normalizeResource(asked) ?? "")) continue;
    const reason = `the client asked for ${quote(asked)}`;
    throw new OAuthError("invalid_target", `This server grants access to ${resource} only`, { reason });
  }
}

const MAX_RESOURCE_LENGTH = 2048;

function normalizeResource(resource: string): string | undefined {
  if (resource.length > MAX_RESOURCE_LENGTH || resource.includes("#")) return undefined;
  const url = URL.parse(resource);
  if (!url || url.username || url.password || !/^https?:$/.test(url.protocol)) return undefined;
  // A loop, not /\/+$/: that takes quadratic time on a stranger's "////…x" and stopped the whole server.
  let end = url.pathname.length;
  while (url.pathname[end - 1] === "/") end--;
  return url.origin + url.pathname.slice(0, end) + url.search;
}

/**
 * Returns the scopes that are asked for and on offer, or the default if there are none, because clients ask for scopes
 * they know from other servers. `offline_access` is granted if asked.
 * @see https://www.rfc-editor.org/rfc/rfc6749#section-3.3
 */
function grantedScopes(asked: string | null | undefined, { all, byDefault }: { all: string[]; byDefault: string[] }) {
  const wanted = new Set(asked?.split(/\s/));
  const granted = all.filter((scope) => wanted.has(scope));
  return [...(granted.length > 0 ? granted : byDefault), ...(wanted.has(OFFLINE_ACCESS) ? [OFFLINE_ACCESS] : [])];
}

/** Returns the scopes of a refresh: fewer than were granted if it asks for fewer, and never more (RFC 6749 §6). */
function narrowedScopes(asked: string | null, granted: string[]): string[] {
  if (asked === null) return granted;
  const all = granted.filter((scope) => scope !== OFFLINE_ACCESS);
  return grantedScopes(asked, { all, byDefault: all }).filter((scope) => granted.includes(scope));
}

// --- Token and revocation endpoints ---

function required(form: URLSearchParams, name: string): string {
  const value = form.get(name);
  if (value === null) throw invalidRequest(`${name} is missing`);
  return value;
}

/** Issues tokens. @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-3.2 */
async function tokenEndpoint(server: Server, c: Context): Promise<Response> {
  const arrived = seconds();
  const form = await readForm(c);
  const client = await authenticateClient(server, c, form);
  c.header("Cache-Control", "no-store");
  try {
    const grant_type = required(form, "grant_type");
    checkResource(server, form);
    if (grant_type === "authorization_code") return c.json(await redeem(server, form, client, arrived));
    if (grant_type === "refresh_token") return c.json(await refresh(server, form, client));
    throw new OAuthError("unsupported_grant_type", "grant_type must be authorization_code or refresh_token");
  } catch (error) {
    const id = grantId("pac", form.get("code") ?? "") ?? grantId("prt", form.get("refresh_token") ?? "");
    await noteRefusal(server, error, id, client);
    throw error;
  }
}

/**
 * Ends the connection that a token belongs to, and answers 200 for an unknown one too. The client stays registered:
 * Claude Code signs out and comes back with the same client_id.
 * @see https://www.rfc-editor.org/rfc/rfc7009#section-2.1
 */
async function revocationEndpoint(server: Server, c: Context): Promise<Response> {
  const form = await readForm(c);
  const client = await authenticateClient(server, c, form);
  await revokeToken(server, required(form, "token"), client);
  return c.body(null, 200, { "Cache-Control": "no-store" });
}

/**
 * Describes a token to a resource server that runs elsewhere. Only clients that the owner registered with a secret may
 * ask: anybody else could learn whether a token found somewhere is alive.
 * @see https://www.rfc-editor.org/rfc/rfc7662#section-2
 */
async function introspectionEndpoint(server: Server, c: Context): Promise<Response> {
  const form = await readForm(c);
  const { source, secret } = await authenticateClient(server, c, form);
  if (source !== "preregistered" || secret === undefined) {
    throw new OAuthError("unauthorized_client", "Introspection is for clients registered with a secret by the owner");
  }
  const token = required(form, "token");
  c.header("Cache-Control", "no-store");
  try {
    const { clientId: client_id, scopes, expiresAt: exp, resource } = await verifyAccessToken(server, token);
    const [scope, iss, aud] = [scopes.join(" "), server.issuer, resource?.href];
    return c.json({ active: true, client_id, scope, exp, token_type: "Bearer", iss, aud });
  } catch (error) {
    if (error instanceof OAuthError && error.code === "invalid_token") return c.json({ active: false });
    throw error;
  }
}

// --- Grants ---

/**
 * A connection: one record, `grant/<id>`. Every token names its grant, so checking a token is one read, every change is
 * one atomic change, and ending the connection ends all its tokens. Only hashes of secrets are stored.
 */
interface Grant {
  client: { id: string; name: string; auth?: "private_key_jwt" }; // `auth`: its only way to authenticate
  redirect_uri?: string;
  scopes: string[];
  resource: string;
  created: number;
  called?: number; // for the first time
  used?: number; // for the last time, to the minute
  expires: number;
  revoked?: number;
  code?: NewCode & { expires: number; redeemed?: number };
  refresh?: RefreshState;
  access: AccessToken[]; // oldest first
  label?: string; // the owner's own name for it
  attempt?: Pick<Attempt, "found" | "introduced" | "shown">;
  refused?: Refusal;
}

type Approval = Pick<Grant, "client" | "redirect_uri" | "scopes" | "resource" | "attempt">;
type NewCode = { hash: string; challenge: string; refreshes: boolean };

/** `n`: of the refresh token it came with. `scopes`: which of the grant's, by position, if not all. */
type AccessToken = { hash: string; n: number; scopes?: number[]; expires: number };

interface RefreshState {
  hash: string; // of the current token, RT(n)
  n: number;
  presented: boolean; // RT(n) or its access token was used: the client has it, and RT(n-1) is spent
  rotated: [hash: string, at: number][]; // the latest before RT(n), newest first
  repeated?: number; // the latest n that was issued again after the grace period
}

type Presented = { hash: string; client_id: string; resource: string };
type PresentedCode = Presented & { challenge: string; redirect_uri?: string | undefined; arrived: number };
type Issue = { access: Omit<AccessToken, "n">; refresh: string; expires: number };

/** `grant`: the record to keep, the same object if nothing changed. */
type Transition = { grant: Grant; outcome: "refused" | "issued" | keyof typeof EVENTS; reason?: string };

const EVENTS = {
  redeemed: ["code_redeemed", "the app fetched its token"],
  replayed: ["code_replayed", "a code was redeemed twice: the connection is ended"],
  reused: ["refresh_token_reused", "a refresh token was used again: the connection is ended"],
  repeated: ["refresh_token_repeated", "an old refresh token was used again, long after its rotation"],
} as const;
const CODE_TTL = 5 * MINUTE;
const REFRESH_GRACE = 2 * MINUTE; // for clients that refresh in parallel on several machines
const MAX_ACCESS_TOKENS = 100; // so that the largest record fits into the 64 KiB of a Deno KV
const MAX_ROTATIONS = 200;

// OAuth's hard rules are pure functions, without HTTP and storage.

/** The record outlives its form, so that the form is good once. */
function approveGrant(approval: Approval, code: NewCode, now: number): Grant {
  const expires = now + UNREDEEMED_KEPT;
  return { ...approval, created: now, expires, code: { ...code, expires: now + CODE_TTL }, access: [] };
}

function grantRefusal(grant: Grant, request: Presented, now: number) {
  if (grant.revoked !== undefined) return `the connection was ended ${ago(now - grant.revoked)}`;
  if (grant.client.id !== request.client_id) return "the code or refresh token was issued to another client";
  // Servers may share a store: each issues tokens for itself alone.
  if (grant.resource !== request.resource) return `the code or refresh token is for ${quote(grant.resource)}`;
}

const refused = (grant: Grant, reason: string): Transition => ({ grant, outcome: "refused", reason });

/**
 * Redeems a code once. A wrong attempt costs the client neither the code nor the connection.
 * @see https://www.rfc-editor.org/rfc/rfc7636#section-4.6
 * @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-4.1.3
 */
function redeemGrant(grant: Grant, request: PresentedCode, issue: Issue, now: number): Transition {
  const { code } = grant;
  const { redirect_uri } = request;
  const refusal = grantRefusal(grant, request, now);
  if (refusal) return refused(grant, refusal);
  if (code?.hash !== request.hash) return refused(grant, "this code was never issued");
  if (code.challenge !== request.challenge) return refused(grant, "code_verifier does not match the code_challenge");
  if (redirect_uri !== undefined && redirect_uri !== grant.redirect_uri) {
    return refused(grant, `redirect_uri ${quote(redirect_uri)} differs from ${quote(grant.redirect_uri)}`);
  }
  if (code.redeemed !== undefined) {
    // The client's own duplicate came before that. Later, somebody else holds both.
    if (request.arrived < code.redeemed) return refused(grant, "a duplicate of a request that came at the same time");
    return { grant: revokeGrant(grant, now), outcome: "replayed" };
  }
  if (code.expires <= now) return refused(grant, `the code expired ${ago(now - code.expires)}`);
  const redeemed = { ...grant, code: { ...code, redeemed: now }, access: [{ ...issue.access, n: 0 }] };
  if (!code.refreshes) return { grant: { ...redeemed, expires: issue.access.expires }, outcome: "redeemed" };
  const refresh: RefreshState = { hash: issue.refresh, n: 0, presented: false, rotated: [] };
  return { grant: { ...redeemed, expires: issue.expires, refresh }, outcome: "redeemed" };
}

/**
 * Rotates a refresh token that this server made for this grant.
 * @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-4.3.1
 */
function refreshGrant(grant: Grant, request: Presented, issue: Issue, now: number): Transition {
  const { refresh } = grant;
  const refusal = grantRefusal(grant, request, now);
  if (refusal) return refused(grant, refusal);
  if (!refresh) return refused(grant, "the connection has no refresh token");
  if (grant.expires <= now) return refused(grant, `the connection expired ${ago(now - grant.expires)}`);
  if (refresh.hash !== request.hash) return repeatRefresh(grant, refresh, request.hash, issue, now);
  const n = refresh.n + 1;
  const recent = refresh.rotated.filter(([, at]) => now - at <= REFRESH_GRACE).slice(0, MAX_ROTATIONS - 1);
  const rotated: RefreshState["rotated"] = [[request.hash, now], ...recent];
  const next = { ...refresh, hash: issue.refresh, n, presented: false, rotated };
  return { grant: withTokens(grant, issue, next, n, now), outcome: "issued" };
}

/** Repeats an answer within the grace period, or later if it was lost. Anything else is a second holder. */
function repeatRefresh(grant: Grant, refresh: RefreshState, hash: string, issue: Issue, now: number): Transition {
  const { rotated, n } = refresh;
  const index = rotated.findIndex(([known]) => known === hash);
  const at = rotated[index]?.[1];
  if (at !== undefined && now - at <= REFRESH_GRACE) {
    // Its access token gets new time only if it has used up half of it.
    const issued = grant.access.find((token) => token.hash === issue.access.hash);
    const lasts = issued && issued.expires - now >= (issue.access.expires - now) / 2;
    return { grant: lasts ? grant : withTokens(grant, issue, refresh, n - index, now), outcome: "issued" };
  }
  // A thief may rotate first and wait: the client then seems to have lost an answer. Two in a row are taken for theft.
  const isSecondInRow = refresh.repeated !== undefined && refresh.repeated === n - 1;
  if (index !== 0 || refresh.presented || isSecondInRow) {
    const reason = `the refresh token was rotated ${at === undefined ? "long ago" : ago(now - at)}`;
    return { grant: revokeGrant(grant, now), outcome: "reused", reason };
  }
  // The grace period for the client's other machines starts again.
  const late: RefreshState = { ...refresh, rotated: [[hash, now], ...rotated.slice(1)], repeated: n };
  return { grant: withTokens(grant, issue, late, n, now), outcome: "repeated" };
}

/** Adds an access token issued with RT(n), and drops those that expired. */
function withTokens(grant: Grant, issue: Issue, refresh: RefreshState, n: number, now: number): Grant {
  const others = grant.access.filter((token) => token.expires > now && token.hash !== issue.access.hash);
  const access = [...others, { ...issue.access, n }].slice(-MAX_ACCESS_TOKENS);
  return { ...grant, access, used: now, expires: issue.expires, refresh };
}

function verifyGrant(grant: Grant, hash: string, resource: string, now: number): AccessToken | undefined {
  // Not in constant time: how far two digests agree says nothing about the tokens.
  const token = grant.access.find((candidate) => candidate.hash === hash);
  const isLive = token && token.expires > now && grant.expires > now && grant.revoked === undefined;
  return isLive && grant.resource === resource ? token : undefined;
}

const scopesOf = (grant: Grant, { scopes }: AccessToken) =>
  scopes ? grant.scopes.filter((_, position) => scopes.includes(position)) : grant.scopes;

/** Returns the grant after use of an access token, the same object if there is nothing new. */
function presentGrant(grant: Grant, token: AccessToken, now: number): Grant {
  const { refresh, called = now } = grant;
  // The client has the latest tokens: use of the previous refresh token is theft from now on.
  if (refresh && refresh.n === token.n && refresh.rotated.length > 0 && !refresh.presented) {
    return { ...grant, called, used: now, refresh: { ...refresh, presented: true } };
  }
  // Once a minute, or a busy client would turn every read into a write.
  const isRecent = grant.called !== undefined && Math.abs(now - (grant.used ?? 0)) < MINUTE;
  return isRecent ? grant : { ...grant, called, used: now };
}

/** Ends a connection. The record stays, so that its approval cannot be posted again. */
function revokeGrant({ code: _code, refresh: _refresh, ...rest }: Grant, now: number): Grant {
  return { ...rest, access: [], revoked: rest.revoked ?? now };
}

const readGrant = ({ store }: Server, id: string) => store.get(`grant/${id}`) as Promise<Grant | undefined>;

/** Stores a new grant, or returns the one that the same form has made before. */
async function insertGrant({ store }: Server, id: string, grant: Grant) {
  const change = (current: unknown) => current ?? grant;
  const kept = await store.update(`grant/${id}`, change, { expiresAt: grant.expires }) as Grant;
  return kept === grant ? undefined : kept;
}

/** Changes a grant atomically, if there is one. Writes nothing if `change` returns the same object. */
async function updateGrant({ store }: Server, id: string, change: (grant: Grant) => Grant, expiresAt?: number) {
  const changeIt = (current: unknown) => current === undefined ? undefined : change(current as Grant);
  return await store.update(`grant/${id}`, changeIt, defined({ expiresAt })) as Grant | undefined;
}

/** One answer to whatever is wrong with a token: the reason is for the owner, not for a thief. */
function invalidGrant(reason?: string, event?: AuthEvent["type"]): OAuthError {
  const description = "The code or refresh token is wrong, used, expired or revoked";
  return new OAuthError("invalid_grant", description, { reason, ...defined({ event }) });
}

const emitFor = (server: Server, type: AuthEvent["type"], message: string, connection: string, grant: Grant) =>
  server.emit(type, message, { connection, clientName: grant.client.name });

/** An id that comes from the form, so that sending it twice finds the first grant. */
const formId = async ({ mac }: Server, ...form: string[]) => (await mac("grant", ...form)).slice(0, 32);

/** Approves a request (or with `lookOnly` finds its approval), and returns its code while that is good. */
async function approve(server: Server, form: string, request: AuthorizationRequest, lookOnly = false) {
  const { client: { id: client_id, name, auth, refreshes }, redirect_uri, scopes, code_challenge: challenge } = request;
  const id = await formId(server, form);
  const code = `pac_${id}${await server.mac("code", form)}`;
  const { found, introduced, shown } = server.attempts.get(client_id) ?? {};
  const attempt = defined({ found, introduced, shown });
  const client = { id: client_id, name, ...defined({ auth }) };
  const approval = { client, redirect_uri, scopes, resource: server.resource, attempt };
  const newCode = { hash: await hashToken(code), challenge, refreshes };
  const grant = approveGrant(approval, newCode, seconds());
  const before = await (lookOnly ? readGrant(server, id) : insertGrant(server, id, grant));
  if (!before && lookOnly) return undefined;
  server.attempts.delete(client_id); // from here on, the record tells
  if (!before) return { code, repeated: false };
  if (before.client.id !== client_id || before.redirect_uri !== redirect_uri) return undefined;
  // After a double click the browser follows the second response.
  return { code: hasOpenCode(before, seconds()) ? code : undefined, repeated: true };
}

const hasOpenCode = ({ code }: Grant, now: number) => !!code && code.redeemed === undefined && code.expires > now;

async function redeem(server: Server, form: URLSearchParams, client: Client, arrived: number) {
  const [code, code_verifier] = [required(form, "code"), required(form, "code_verifier")];
  if (!/^[A-Za-z0-9._~-]{43,128}$/.test(code_verifier)) {
    throw invalidRequest("code_verifier must be 43 to 128 unreserved characters (RFC 7636 §4.1)");
  }
  const id = grantId("pac", code);
  if (!id) throw new OAuthError("invalid_grant", "This is not a code of this server");
  const [hash, challenge] = [await hashToken(code), await s256(code_verifier)];
  const redirect_uri = form.get("redirect_uri") ?? undefined;
  const request = { hash, challenge, client_id: client.id, resource: server.resource, redirect_uri, arrived };
  const successor = await deriveRefresh(server, id + random(32));
  const tokens = { access_token: `pat_${id}${random(32)}`, successor };
  return await issueTokens(server, id, tokens, (grant, issue, now) => redeemGrant(grant, request, issue, now));
}

async function refresh(server: Server, form: URLSearchParams, client: Client) {
  const refresh_token = required(form, "refresh_token");
  const id = grantId("prt", refresh_token);
  if (!id) throw invalidGrant("it does not have the form of a refresh token");
  const current = await deriveRefresh(server, refresh_token.slice(4, -CHECK_DIGITS));
  // Only a token that this server made may end a connection, or whoever learns a connection's id could.
  if (!equal(refresh_token, current.token)) throw invalidGrant("this server did not make the refresh token");
  const asked = form.get("scope");
  const access_token = `pat_${id}${await server.mac("access", refresh_token, asked ?? "")}`;
  const request = { hash: current.hash, client_id: client.id, resource: server.resource };
  const successor = await deriveRefresh(server, current.successor);
  return await issueTokens(server, id, { access_token, successor }, (grant, issue, now) => {
    const { scopes: granted } = grant;
    const scopes = narrowedScopes(asked, granted);
    const narrower = scopes.length < granted.length && { scopes: scopes.map((scope) => granted.indexOf(scope)) };
    return refreshGrant(grant, request, { ...issue, access: { ...issue.access, ...narrower } }, now);
  });
}

type Tokens = { access_token: string; successor: { token: string; hash: string } };
type Step = (grant: Grant, issue: Issue, now: number) => Transition;

/** Issues tokens by an atomic transition, and raises its event. Returns the token response (OAuth 2.1 §3.2.3). */
async function issueTokens(server: Server, id: string, { access_token, successor }: Tokens, step: Step) {
  const { accessTokenTtl, refreshTokenTtl } = server;
  const [hash, now] = [await hashToken(access_token), seconds()];
  const access = { hash, expires: now + accessTokenTtl };
  const issue: Issue = { access, refresh: successor.hash, expires: now + Math.max(refreshTokenTtl, accessTokenTtl) };
  let result = undefined as Transition | undefined;
  const grant = await updateGrant(server, id, (grant) => {
    result = step(grant, issue, seconds());
    return result.grant;
  }, issue.expires);
  if (!grant || !result) throw invalidGrant("the connection has ended"); // perhaps between two tries to write
  const { outcome, reason } = result;
  if (outcome === "refused") throw invalidGrant(reason);
  if (outcome !== "issued") {
    const [event, message] = EVENTS[outcome];
    emitFor(server, event, message, id, grant);
    if (grant.revoked !== undefined) throw invalidGrant(reason, event);
  }
  const issued = grant.access.find((token) => token.hash === hash)!;
  return {
    access_token,
    token_type: "Bearer",
    expires_in: Math.round(issued.expires - seconds()),
    ...(grant.refresh && { refresh_token: successor.token }), // absent, not null: strict clients refuse that
    scope: scopesOf(grant, issued).join(" "),
  };
}

/** The last digits of a refresh token: they prove that this server made it. */
const CHECK_DIGITS = 32;

/** Derives a refresh token, `prt_<id><secret><check>`, its hash and its successor from id and secret. */
async function deriveRefresh({ longMac }: Server, body: string) {
  const digest = await longMac("refresh", body); // its parts tell nothing of each other
  const token = `prt_${body}${digest.slice(0, CHECK_DIGITS)}`;
  return { token, hash: digest.slice(CHECK_DIGITS, 64), successor: body.slice(0, 32) + digest.slice(64) };
}

/** Returns the id of the grant that a token or code names. */
function grantId(prefix: "pat" | "prt" | "pac", token: string): string | undefined {
  if (typeof token !== "string" || !token.startsWith(`${prefix}_`)) return undefined;
  const digits = 32 + 64 + (prefix === "prt" ? CHECK_DIGITS : 0);
  if (token.length === 4 + digits && /^[0-9a-f]+$/.test(token.slice(4))) return token.slice(4, 4 + 32);
  // A personal access token is in base64url, which is shorter to copy.
  if (prefix !== "pat" || token.length !== 4 + 22 + 43 || !/^[\w-]+$/.test(token)) return undefined;
  return hex(base64Bytes(token.slice(4, 4 + 22)));
}

async function rename(server: Server, id: string, label: string) {
  if (label.length > MAX_LABEL) throw invalidRequest(`The name may have up to ${MAX_LABEL} characters`);
  await updateGrant(server, id, (current) => {
    const { label: _label, ...grant } = current;
    return grant.resource === server.resource ? { ...grant, ...(label && { label }) } : current;
  });
}

async function revokeAll(server: Server) {
  for (const { id } of await listConnections(server)) await revoke(server, id);
}

/** Ends the connection of a token. Others' tokens are ignored (RFC 7009 §2.2). */
async function revokeToken(server: Server, token: string, client: Client) {
  const id = grantId("pat", token) ?? grantId("prt", token);
  if (!id) return;
  const grant = await readGrant(server, id);
  if (grant) {
    const hash = await hashToken(token);
    const { token: refresh_token } = await deriveRefresh(server, token.slice(4, -CHECK_DIGITS));
    if (token !== refresh_token && !grant.access.some((access) => access.hash === hash)) return;
    if (grant.client.id !== client.id) throw new OAuthError("invalid_grant", "The token was issued to another client");
  }
  await revoke(server, id); // also where nothing seems to be left: the clock may be wrong
}

async function revoke(server: Server, id: string): Promise<boolean> {
  let isNew = false;
  const now = seconds();
  const grant = await updateGrant(server, id, (grant) => {
    isNew = grant.revoked === undefined && grant.resource === server.resource;
    return isNew ? revokeGrant(grant, now) : grant;
  }, now + FORM_TTL);
  if (!grant || !isNew) return false;
  emitFor(server, "connection_revoked", "a connection was ended", id, grant);
  return true;
}

async function listConnections(server: Server): Promise<Connection[]> {
  const live: Connection[] = [];
  const now = seconds();
  for await (const [key, value] of server.store.list("grant/")) {
    const grant = value as Grant;
    const { client, label, redirect_uri: redirectUri, scopes, created, used, expires } = grant;
    const isLive = grant.revoked === undefined && expires > now && (grant.access.length > 0 || hasOpenCode(grant, now));
    if (!isLive || grant.resource !== server.resource) continue; // servers may share a store
    live.push({
      id: key.slice("grant/".length),
      kind: client.id === PERSONAL ? "token" : "client",
      clientId: client.id,
      clientName: client.name,
      state: connectionState(grant, now),
      ...defined({ label, redirectUri, lastUsedAt: used && Math.floor(used) }),
      scopes,
      createdAt: Math.floor(created),
      expiresAt: Math.floor(expires),
    });
  }
  return live.sort((a, b) => b.createdAt - a.createdAt);
}

/** Stands in place of a client_id. */
const PERSONAL = "personal-access-token";

/** Makes a personal access token, unless the same form has made one that is in use. */
async function createToken(server: Server, request: TokenRequest, form = random(32)) {
  const { all } = server.scopes;
  const { name, expiresIn = 365 * DAY } = request;
  const scopes = request.scopes ?? all;
  assert(isString(name) && printable(name) !== "", "createToken: name must say what the token is for");
  assert(isLifetime(expiresIn), `createToken: expiresIn ${LIFETIME}, not ${quote(expiresIn)}`);
  const isOffered = isStringList(scopes) && scopes.length > 0 && scopes.every((scope) => all.includes(scope));
  assert(isOffered, `createToken: scopes must be some of ${all.join(", ")}, not ${quote(scopes)}`);
  // The same form makes the same token, as for a double click. It is sealed: a copy of the store does not give it.
  const parts = [form, name, String(expiresIn), ...scopes];
  const id = await formId(server, ...parts);
  const token = `pat_${base64url(unhex(id))}${base64url(unhex(await server.mac("token", ...parts)))}`;
  const created = seconds();
  const expires = created + expiresIn;
  const client = { id: PERSONAL, name: printable(name) };
  const access = [{ hash: await hashToken(token), n: 0, expires }];
  const grant: Grant = { client, scopes, resource: server.resource, created, expires, access };
  const before = await insertGrant(server, id, grant);
  if (before?.used !== undefined || before?.revoked !== undefined) return undefined;
  if (!before) emitFor(server, "token_created", "a personal access token was made", id, grant);
  return { id, token, expiresAt: Math.floor((before ?? grant).expires) };
}

// --- Guard ---

/** `version`: the store's stamp before the token was read. */
type VerifiedToken = { info: AuthInfo; version: number; until: number };
const MAX_VERIFIED = 1000;
const MARK_PATIENCE = 200; // ms
/** Never read from query or body: URLs are logged (RFC 6750 §2.1). */
const BEARER = /^Bearer +([A-Za-z0-9._~+/-]+=*) *$/i;

/** Makes a guard. It looks at the token alone: a client without one gets the 401, whatever it sent. */
function createGuard(server: Server, required: string[] = []): MiddlewareHandler<AuthEnv> {
  const { mcpPath } = server;
  const checkToken = withCors(async (c, next) => {
    try {
      assertScopes(server, (await authenticate(server, c)).scopes, required);
    } catch (error) {
      return errorResponse(server, c, error);
    }
    await next();
    // Some clients add a slash. 308 keeps method and body, and stays on this host.
    if (c.req.path === `${mcpPath}/` && c.res.status === 404) c.res = c.redirect(mcpPath, 308);
  });
  return function personalAuthGuard(c, next) {
    // The common case, without a promise of its own.
    const info = required.length === 0 ? recall(server, c) : undefined;
    if (!info || c.req.raw.headers.has("Origin") || c.req.path.endsWith("/")) return checkToken(c, next);
    admit(server, c, info);
    return next();
  };
}

function createScopeGuard(server: Server, required: string[]) {
  const { all } = server.scopes;
  const isOffered = required.length > 0 && required.every((scope) => all.includes(scope));
  assert(isOffered, `requireScopes: ${quote(required)} must be among the scopes on offer: ${all.join(", ")}`);
  return createGuard(server, required);
}

function assertScopes(server: Server, scopes: string[], required: string[]) {
  if (required.every((scope) => scopes.includes(scope))) return;
  // With what the token has already: clients ask for exactly this list.
  const needed = [...new Set([...scopes, ...required])].filter((scope) => scope !== OFFLINE_ACCESS);
  throw challenge(server, 403, "insufficient_scope", "The token lacks a scope that this needs", needed);
}

/** Returns what is known of a token, unless any process has changed the store since. */
function recall({ passed, verified, store }: Server, c: Context): AuthInfo | undefined {
  const earlier: AuthInfo | undefined = c.get(passed); // from another guard of the same request
  if (earlier) return earlier;
  const known = verified.get(c.req.raw.headers.get("Authorization") ?? "");
  return known && known.version === store.version?.() && Date.now() / 1000 < known.until ? known.info : undefined;
}

function admit({ passed }: Server, c: Context, info: AuthInfo) {
  c.set(passed, info); // c.var.auth alone would not do: any middleware can set it
  c.set("auth", info);
  return info;
}

async function authenticate(server: Server, c: Context) {
  const known = recall(server, c);
  if (known) return admit(server, c, known);
  const header = c.req.raw.headers.get("Authorization");
  const token = header?.match(BEARER)?.[1];
  if (header !== null && token !== undefined) return admit(server, c, await verifyAccessToken(server, token, header));
  server.found.at = seconds();
  throw challenge(server, 401, "unauthorized", "An access token is needed: send it as Authorization: Bearer");
}

async function verifyAccessToken(server: Server, token: string, header = `Bearer ${token}`): Promise<AuthInfo> {
  const { store, verified, resource, resourceMetadataUrl } = server;
  const now = seconds();
  const version = store.version?.(); // before the record is read, or a change in between would go unseen
  const id = grantId("pat", token);
  const grant = id ? await readGrant(server, id) : undefined;
  const hash = grant ? await hashToken(token) : "";
  const access = grant && verifyGrant(grant, hash, resource, now);
  if (!id || !access) {
    const error = challenge(server, 401, "invalid_token", "The access token is unknown, expired or revoked");
    error.details.reason = `access token: ${whyInvalid(id, grant, hash, resource, now)}`;
    await noteRefusal(server, error, id);
    throw error;
  }
  const presented = presentGrant(grant, access, now);
  if (presented !== grant) {
    const marking = markPresented(server, id, hash, now);
    // Theft detection needs this before the answer; the time of use is best effort.
    if (!grant.called || presented.refresh !== grant.refresh) await Promise.race([marking, delay(MARK_PATIENCE)]);
  }
  const info: AuthInfo = Object.freeze({
    token,
    clientId: grant.client.id,
    scopes: Object.freeze(server.scopes.withIncluded(scopesOf(grant, access))) as string[],
    expiresAt: Math.floor(access.expires),
    resource: new URL(resource),
    resourceMetadataUrl,
    extra: Object.freeze({ connection: id, clientName: grant.client.name }),
  });
  if (version === undefined) return info; // nothing would tell that it has changed
  if (verified.size >= MAX_VERIFIED) verified.clear();
  const until = Math.min(access.expires, grant.expires, (presented.used ?? now) + MINUTE);
  verified.set(header, { info, version, until });
  return info;
}

function whyInvalid(id: string | undefined, grant: Grant | undefined, hash: string, resource: string, now: number) {
  if (!id) return "it does not have the form of an access token of this server";
  if (!grant) return "its connection has ended, or never existed";
  if (grant.revoked !== undefined) return `its connection was ended ${ago(now - grant.revoked)}`;
  if (grant.resource !== resource) return `it is for ${quote(grant.resource)}`;
  const expires = Math.min(grant.access.find((token) => token.hash === hash)?.expires ?? Infinity, grant.expires);
  return expires <= now ? `it expired ${ago(now - expires)}` : "it was replaced, or never issued";
}

/** Stores that a token was used, if it can: the owner may always read. */
async function markPresented(server: Server, id: string, hash: string, now: number) {
  let isFirst = false;
  const grant = await updateGrant(server, id, (grant) => {
    const access = verifyGrant(grant, hash, server.resource, now);
    isFirst = access !== undefined && grant.called === undefined;
    return access ? presentGrant(grant, access, now) : grant;
  }).catch(() => undefined); // the store reports it
  if (grant && isFirst) emitFor(server, "first_call", "the app called for the first time", id, grant);
}

/**
 * Returns an error with its challenge. Without `scope`, Claude would ask for every scope there is.
 * @see https://www.rfc-editor.org/rfc/rfc9728#section-5.1
 * @see https://www.rfc-editor.org/rfc/rfc6750#section-3
 */
function challenge(server: Server, status: 401 | 403, code: string, description: string, scopes?: string[]) {
  // No error code where no token came (RFC 6750 §3.1).
  const error = code === "unauthorized" ? "" : `error="${code}", error_description="${description}", `;
  const scope = (scopes ?? server.scopes.byDefault).join(" ");
  const value = `Bearer ${error}scope="${scope}", resource_metadata="${server.resourceMetadataUrl}"`;
  return new OAuthError(code, description, { status, headers: { "WWW-Authenticate": value } });
}

// --- Owner ---

/** `browser`: the secret in its cookie. `known`: it came with the request. */
type Session = { browser: string; known: boolean; isOwner: boolean };
type Problem = { status: 403 | 429; message: string };

/** `browser/<hash of its secret>`: a browser that has signed in. */
interface BrowserRecord {
  attempts?: { left: number; at: number };
  session?: { epoch: string; since: number; seen: number };
}

/** `owner/<issuer>`: the password, or all that were printed until one is used. Sessions end with the epoch. */
type OwnerRecord = { salt: string; hashes: string[]; generated: boolean; used: boolean; epoch: string };

const FORM_TTL = 10 * MINUTE;
const SESSION_TTL = 30 * DAY;
const SESSION_IDLE_TTL = 7 * DAY;
const BROWSER_TTL = 400 * DAY; // the longest that browsers keep a cookie
const MAX_ATTEMPTS = 10;
const ATTEMPT_INTERVAL = MINUTE;
const MAX_PRINTED_PASSWORDS = 10;
const browserKey = async (browser: string) => `browser/${await hashToken(browser)}`;
const ownerKey = ({ issuer }: Server) => `owner/${issuer}`;

/** Reads who is at the browser, and throws the page for a stranger. Opening a page never writes to the store. */
async function readSession(server: Server, c: Context): Promise<Session> {
  const { secure, store, password, authenticateOwner } = server;
  const held = getCookie(c, cookieName(server), secure ? "host" : undefined);
  const known = held !== undefined && /^[0-9a-f]{64}$/.test(held);
  const browser = known ? held : random(32);
  // Another site's form comes without the cookie: a new one would replace it and sign the owner out.
  if (!known && c.req.method !== "POST") rememberBrowser(server, c, browser);
  if (password === false) return { browser, known, isOwner: true };
  if (authenticateOwner) {
    const answer = await authenticateOwner(c);
    if (answer === true) return { browser, known, isOwner: true };
    const notOwner = "You are not signed in as the owner of this server.";
    throw answer instanceof Response ? answer : await messagePage(server, c, 403, "For the owner only", notOwner);
  }
  const { epoch } = await readOwner(server); // each time: another process may have ended all sessions
  const { session } = (await store.get(await browserKey(browser)) ?? {}) as BrowserRecord;
  const now = seconds();
  const isOwner = session !== undefined && session.epoch === epoch && now - session.since < SESSION_TTL &&
    now - session.seen < SESSION_IDLE_TTL;
  return { browser, known, isOwner };
}

/** Servers on one host share cookies, so the name holds port and path. No path holds a "!". */
function cookieName({ origin, basePath }: Server) {
  const { port } = new URL(origin);
  return `personal-auth${port && `.${port}`}${basePath.replaceAll("/", "!")}`;
}

function rememberBrowser(server: Server, c: Context, browser: string) {
  setCookie(c, cookieName(server), browser, {
    path: "/",
    httpOnly: true,
    sameSite: "Lax", // sent when an app leads the owner here, but not with another site's form
    maxAge: BROWSER_TTL,
    secure: server.secure, // not on loopback, where Safari refuses to keep a Secure cookie
    // __Host-: no other host can make the owner use a secret that it knows.
    ...(server.secure && { prefix: "host" as const }),
  });
}

/** Binds a form to one browser and one request. Another site can neither read nor make such a token. */
async function createCsrf({ mac }: Server, browser: string, request: string, head?: string) {
  head ??= `${Math.floor(seconds()).toString(36)}.${random(8)}`;
  return `${head}.${await mac("form", browser, request, head)}`;
}

async function checkCsrf(server: Server, browser: string, request: string, csrf: string) {
  const [time = "", nonce = ""] = csrf.split(".", 2);
  const expected = await createCsrf(server, browser, request, `${time}.${nonce}`);
  return equal(csrf, expected) && Math.abs(seconds() - parseInt(time, 36)) < FORM_TTL;
}

/** Signs the owner in by the password, where that is needed. Returns why it failed. */
async function signIn(server: Server, c: Context, { browser, isOwner }: Session, password: string) {
  const { store, emit } = server;
  const problem = (status: Problem["status"], message: string): Problem => ({ status, message });
  const key = await browserKey(browser);
  if (isOwner) return await touchSession(server, key);
  // A form from before the session ended has no password: that costs no attempt.
  if (password === "") return problem(403, "Please type your password.");
  const bucket = await store.get(key) === undefined ? "throttle" : key;
  const wait = await takeAttempt(server, bucket);
  const record = await readOwner(server);
  // Nobody guesses a generated password, so a lack of attempts does not lock it. A chosen one is not even looked at.
  const hash = wait === 0 || record.generated ? await matchingHash(password, record) : undefined;
  if (hash === undefined && wait > 0) {
    emit("sign_in_throttled", "too many wrong passwords");
    c.header("Retry-After", String(wait));
    return problem(429, `Too many attempts. Try again in ${wait} seconds.`);
  }
  if (hash === undefined) {
    emit("sign_in_failed", "a wrong password was entered");
    return problem(403, "That is not the password.");
  }
  // The owner's own sign-ins from new browsers must not use up the shared attempts.
  if (wait === 0) await takeAttempt(server, bucket, -1);
  if (!record.used) {
    // Of the passwords that were printed, only the one in use stays good.
    await store.update(ownerKey(server), (current) => current && { ...current, hashes: [hash], used: true });
  }
  // A new secret, because somebody else may know the one that was in the browser before.
  const fresh = random(32);
  const now = seconds();
  const session = { epoch: record.epoch, since: now, seen: now };
  await store.update(await browserKey(fresh), () => ({ session }), { expiresAt: now + BROWSER_TTL });
  await store.update(key, () => undefined);
  rememberBrowser(server, c, fresh);
  emit("owner_signed_in", "the owner signed in");
}

/** Refuses a form of another site, should SameSite and the form's token fail. */
function assertOwnSite({ origin }: Server, c: Context): undefined {
  const site = c.req.header("Sec-Fetch-Site") ?? "none";
  const sender = c.req.header("Origin") ?? origin;
  // Under another name of this server, Origin and Host agree.
  const isOwn = sender === origin || (sender.includes("://") && sender.split("://")[1] === c.req.header("Host")) ||
    (sender === "null" && site === "same-origin");
  if (isOwn && (site === "same-origin" || site === "none")) return undefined;
  throw invalidRequest("The form was sent by another site", { status: 403 });
}

async function touchSession({ store }: Server, key: string): Promise<undefined> {
  const now = seconds();
  await store.update(key, (current) => {
    const { session, ...rest } = (current ?? {}) as BrowserRecord;
    return !session || now - session.seen < MINUTE ? current : { ...rest, session: { ...session, seen: now } };
  }, { expiresAt: now + BROWSER_TTL });
}

/** Ends the session. The browser keeps its own bucket of attempts. */
async function signOut({ store }: Server, { browser }: Session) {
  await store.update(await browserKey(browser), (current) => {
    const { session: _session, ...rest } = (current ?? {}) as BrowserRecord;
    return current && rest;
  });
}

async function signOutEverywhere(server: Server) {
  const epoch = random(8);
  await server.store.update(ownerKey(server), (current) => current && { ...current, epoch });
}

/**
 * Takes a password attempt, or gives it back (-1). Returns 0, or the seconds until there is one. All strangers share
 * one bucket, because an attacker has many addresses; a browser that has signed in has its own.
 */
async function takeAttempt({ store }: Server, bucket: string, count: 1 | -1 = 1) {
  let wait = 0;
  await store.update(bucket, (current) => {
    const record = current as BrowserRecord | undefined;
    const now = seconds();
    const { left, at } = record?.attempts ?? { left: MAX_ATTEMPTS, at: now };
    // `at` follows a clock that was set back, or it would stop the refill.
    const refilled = Math.min(MAX_ATTEMPTS, left + Math.max(0, now - at) / ATTEMPT_INTERVAL);
    wait = refilled >= count ? 0 : Math.ceil((1 - refilled) * ATTEMPT_INTERVAL);
    if (wait > 0 && at <= now) return current;
    return { ...record, attempts: { left: wait > 0 ? left : Math.min(MAX_ATTEMPTS, refilled - count), at: now } };
  });
  return wait;
}

async function readOwner(server: Server) {
  await server.passwordReady();
  const record = await server.store.get(ownerKey(server)) as OwnerRecord | undefined;
  return record ?? await ensurePassword(server); // somebody emptied the store
}

/**
 * Puts the password into the store. A configured one replaces what is there and ends all sessions. Until a generated
 * one is used, every start prints another, because the earlier output may be lost.
 */
async function ensurePassword(server: Server): Promise<OwnerRecord> {
  const { password, store } = server;
  const stored = await store.get(ownerKey(server)) as OwnerRecord | undefined;
  const configured = typeof password === "string";
  const isInPlace = stored && (configured ? await matchingHash(password, stored) : stored.used || !stored.generated);
  if (isInPlace) return stored;
  const next = configured ? password : generatePassword();
  const empty = { salt: random(16), hashes: [], generated: !configured, used: false, epoch: random(8) };
  const base: OwnerRecord = !configured && stored ? stored : empty;
  const hash = await stretch(next, base);
  const fresh = { ...base, hashes: [...base.hashes, hash].slice(-MAX_PRINTED_PASSWORDS) };
  const before = JSON.stringify(stored);
  const change = (current: unknown) => JSON.stringify(current) === before ? fresh : current;
  const kept = await store.update(ownerKey(server), change) as OwnerRecord;
  if (!kept.hashes.includes(hash)) return await ensurePassword(server); // another process was faster: look again
  const notice = `\n  The owner's password for this server, shown until the first sign-in:\n\n      ${next}\n`;
  if (!configured) console.log(notice);
  return kept;
}

/** Generates 100 bits, grouped to be typed on a phone. */
function generatePassword() {
  const alphabet = "abcdefghjkmnpqrstuvwxyz123456789"; // 32, so that a byte's remainder is even; no look-alikes
  const letters = [...crypto.getRandomValues(new Uint8Array(20))].map((byte) => alphabet[byte % 32]).join("");
  return letters.match(/.{5}/g)!.join("-");
}

/** Phones add a space, and one character can be typed in two ways. */
const normalizePassword = (password: string) => password.normalize("NFKC").trim();

async function matchingHash(typed: string, record: OwnerRecord) {
  const hash = await stretch(normalizePassword(typed), record);
  return record.hashes.find((stored) => equal(stored, hash));
}

/** Hashes slowly, so that a stolen store does not give up a password; 100 random bits do not need it. */
async function stretch(password: string, { salt, generated }: OwnerRecord) {
  // In rounds, because Cloudflare Workers refuse more than 100,000 in one call.
  const [rounds, iterations] = generated ? [1, 1] : [6, 100_000];
  let secret = await sha256(password); // HMAC pads its key with NULs: "secret\0" would open what "secret" opens
  for (let round = 0; round < rounds; round++) {
    const key = await crypto.subtle.importKey("raw", secret, "PBKDF2", false, ["deriveBits"]);
    const params = { name: "PBKDF2", hash: "SHA-256", salt: utf8.encode(salt), iterations };
    secret = new Uint8Array(await crypto.subtle.deriveBits(params, key, 256));
  }
  return hex(secret);
}

// --- Owner's page ---

/** The action of a form, its name in the next page's address, and what that page says: no link can make it say more. */
const DONE = [
  ["revoke", "disconnected", "Disconnected. It has to ask you again."],
  ["revoke_all", "all_disconnected", "Everything is disconnected."],
  ["rename", "renamed", "Renamed."],
] as const;
const MAX_LABEL = 60; // characters of the owner's own name for a connection

/** Shows `/connections`: connections, attempts to connect, personal access tokens, and the latest events. */
async function showConnections(server: Server, c: Context): Promise<Response> {
  await assertProtected(server, c);
  return await connectionsPage(server, c, await readSession(server, c));
}

/** Carries out a form of `/connections`. */
async function changeConnections(server: Server, c: Context): Promise<Response> {
  const path = `${server.basePath}/connections`;
  const form = await readForm(c, "scope");
  await assertProtected(server, c);
  const session = await readSession(server, c);
  const [action, id] = [form.get("action"), form.get("id") ?? ""];
  if (!await checkCsrf(server, session.browser, path, form.get("csrf") ?? "")) {
    if (!session.known) return expiredPage(server, c);
    // The second of two clicks, after the answer to the first one has signed the owner in.
    if (session.isOwner && action === null) return c.redirect(path, 303);
    return await connectionsPage(server, c, session, OPEN_TOO_LONG);
  }
  const problem = await signIn(server, c, session, form.get("password") ?? "");
  if (problem) return await connectionsPage(server, c, session, problem);
  const tokenPage = action === "create_token" && await createAndShowToken(server, c, form);
  if (tokenPage) return tokenPage;
  if (action === "revoke") await revoke(server, id);
  if (action === "rename") await rename(server, id, printable(form.get("label") ?? ""));
  if (action === "revoke_all" || form.has("revoke_all")) await revokeAll(server); // the button, or the box at sign-out
  if (action === "sign_out") await signOut(server, session);
  if (action === "sign_out_everywhere") await signOutEverywhere(server);
  const done = DONE.find(([it]) => it === action)?.[1];
  return c.redirect(done ? `${path}?done=${done}` : path, 303); // 303: a reload must not do it again
}

/** Throws a page where no password keeps anybody out. */
async function assertProtected(server: Server, c: Context) {
  const advice = "Without it, this page would be open to everybody. To use it, give personalAuth() a password.";
  if (server.password === false) throw await messagePage(server, c, 403, "The password check is off", advice);
}

/** Makes a personal access token and shows it, this one time. Returns `undefined` if the form's token is in use. */
async function createAndShowToken(server: Server, c: Context, form: URLSearchParams): Promise<Response | undefined> {
  const [name, expiresIn] = [form.get("name") ?? "", Number(form.get("days")) * DAY];
  // With one scope there is nothing to choose; with several, none ticked is none, not all.
  const scopes = server.scopes.all.length > 1 && { scopes: form.getAll("scope") };
  const made = await createToken(server, { name, expiresIn, ...scopes }, form.get("csrf")!).catch((error) => {
    if (!(error instanceof TypeError)) throw error;
    throw invalidRequest("The token needs a name, a lifetime and a scope");
  });
  if (!made) return undefined;
  const once = html`<p class="warn">Copy it now: it is not shown again.</p>${copyable(made.token)}`;
  const command = copyable(`${addCommand(name, server.resource)} --header "Authorization: Bearer ${made.token}"`);
  const back = html`<a href="${server.basePath}/connections">Back to your connections</a>`;
  return await messagePage(server, c, 200, "Your new token", once, "In Claude Code, for example:", command, back);
}

/** Leads a browser from the root to the owner's page if the app has nothing there. A program still finds nothing. */
function homePage({ basePath }: Server): MiddlewareHandler {
  return async (c, next) => {
    await next(); // asks all routes that come after this one
    if (c.res.status !== 404 || !c.req.header("Accept")?.includes("text/html")) return;
    c.res = undefined; // or its headers would be kept
    c.res = new Response(null, { status: 302, headers: { Location: `${basePath}/connections` } });
  };
}

// --- Timeline ---

/** How far a client came before its approval, and when. In memory only: strangers can make any number of these. */
type Attempt = { name: string; refused?: Refusal } & { [step in "found" | "introduced" | "shown" | "denied"]?: number };
type Refusal = { at: number; reason: string };
type Timeline = ReturnType<typeof timeline>;
type TimelineStep = [at: number | undefined, text: string, ok?: boolean];
const MAX_KEPT_ATTEMPTS = 50;
const MAX_SHOWN_TIMELINES = 15;
const UNREDEEMED_KEPT = 7 * DAY; // to be shown

/** Notes how far a client came. Attempts that nobody opened in a browser are forgotten first. */
function noteAttempt({ attempts, found }: Server, { id, name }: Pick<Client, "id" | "name">, step: Partial<Attempt>) {
  const before = attempts.get(id) ?? { name, ...defined({ found: found.at }) };
  attempts.delete(id); // so that it moves to the end, where the latest are
  attempts.set(id, { ...before, ...step });
  if (attempts.size <= MAX_KEPT_ATTEMPTS) return;
  const ids = [...attempts.keys()];
  attempts.delete(ids.find((id) => attempts.get(id)?.shown === undefined) ?? ids[0]!);
}

/** Tells the owner why a request was refused: on its connection if it names one, else on the client's attempt. */
async function noteRefusal(server: Server, error: unknown, id: string | undefined, client?: Client): Promise<void> {
  if (!(error instanceof OAuthError) || error.status >= 500 || error.details.event) return;
  const refused: Refusal = { at: seconds(), reason: error.details.reason ?? error.message };
  const grant = id ? await readGrant(server, id).catch(() => undefined) : undefined;
  if (!grant && !client) return; // a made-up token: anybody's, any number of times
  const clientName = grant?.client.name ?? client?.name;
  server.emit("token_refused", refused.reason, defined({ connection: grant && id, clientName }));
  if (!grant) noteAttempt(server, client!, { refused });
  else if (refused.at - (grant.refused?.at ?? 0) > MINUTE) { // a client that asks without pause must not write so
    await updateGrant(server, id!, (grant) => ({ ...grant, refused })).catch(() => {});
  }
}

function connectionState(grant: Grant, now: number): Connection["state"] {
  if (grant.code && grant.code.redeemed === undefined) return "pending";
  if (grant.called === undefined) return "unused";
  const isRefused = grant.refused !== undefined && grant.refused.at > (grant.used ?? 0);
  return isRefused || !grant.access.some(({ expires }) => expires > now) ? "silent" : "active";
}

/** Returns what the owner should see of connecting: what is new, unfinished, or fell silent, newest first. */
async function listTimelines(server: Server): Promise<Timeline[]> {
  const now = seconds();
  const approved: Timeline[] = [];
  for await (const [, value] of server.store.list("grant/")) {
    const grant = value as Grant;
    const isOver = grant.revoked !== undefined || grant.expires <= now;
    const isSettled = connectionState(grant, now) === "active" && now - grant.created > DAY;
    if (grant.client.id === PERSONAL || grant.resource !== server.resource || isOver || isSettled) continue;
    approved.push(grantTimeline(server, grant, now));
  }
  approved.sort((a, b) => b.steps.at(-1)!.at - a.steps.at(-1)!.at);
  const attempts = [...server.attempts.values()].reverse();
  // Some of each kind, so that no number of strangers' attempts hides what the owner approved or opened.
  const opened = attempts.filter(({ shown }) => shown !== undefined);
  const unopened = attempts.filter(({ shown }) => shown === undefined).slice(0, 3);
  const unapproved = [...opened, ...unopened].map((it) => timeline(it.name, attemptAdvice(server, it), it));
  return [...approved, ...unapproved].slice(0, MAX_SHOWN_TIMELINES);
}

/** Returns an attempt as the page shows it, with the steps that happened, in order. */
function timeline(title: string, advice: string, attempt: Partial<Attempt>, more: TimelineStep[] = []) {
  const { found, introduced, shown, denied, refused } = attempt;
  const all: TimelineStep[] = [
    [found, "found this server"],
    [introduced, "introduced itself"],
    [shown, "was shown to you for approval"],
    [denied, "was denied by you", false],
    ...more,
    [refused?.at, `was refused: ${refused?.reason}`, false],
  ];
  const steps = all.flatMap(([at, text, ok = true]) => at === undefined ? [] : [{ at, text, ok }]);
  return { title, advice, steps: steps.sort((a, b) => a.at - b.at) };
}

function grantTimeline(server: Server, grant: Grant, now: number): Timeline {
  const { label, client, code, refresh, created, called, used, refused, attempt } = grant;
  return timeline(label || client.name, grantAdvice(server, grant, now), { ...attempt, ...defined({ refused }) }, [
    [created, "was approved by you"],
    [code?.redeemed, "fetched its token"],
    [called, "called for the first time"],
    [refresh?.rotated[0]?.[1], "refreshed its token, the last time"],
    [called && used, "was used, the last time"],
  ]);
}

/** Returns what the owner should know and do about an attempt that is not approved. */
function attemptAdvice(server: Server, { name, shown = 0, denied = 0, refused }: Attempt): string {
  // What came last counts: an app that was refused and then came again properly waits for the owner.
  const last = Math.max(shown, denied, refused?.at ?? 0);
  if (last === 0) return `It introduced itself, but no browser has opened the page. Connect again; ${hint(server)}`;
  if (last === shown) return "It is your turn: approve or deny on the page that the app opened, or connect again.";
  if (last === denied) return "You denied it. Nothing was shared.";
  return `This server refused it. Mend that, and connect again in ${name || "the app"}.`;
}

/** Returns the same about a connection, by where it stopped. */
function grantAdvice(server: Server, grant: Grant, now: number): string {
  const { client, code, refused, created, access, redirect_uri = server.issuer, used = 0, called = 0 } = grant;
  const target = new URL(redirect_uri);
  const [name, redeemed] = [client.name || "the app", code?.redeemed ?? created];
  if (refused && refused.at > Math.max(used, redeemed)) {
    return `${name} was refused ${ago(now - refused.at)}: ${refused.reason}. Connect again in ${name}.`;
  }
  if (hasOpenCode(grant, now)) {
    return `It is ${name}'s turn: it was sent back to ${target.host} and has not fetched its token yet.`;
  }
  const userAgent = /^claude\.(ai|com)$/.test(target.host) ? "the user agent Claude-User" : "its user agent";
  const cause = (server.found.at ?? 0) > redeemed
    ? "Then a request without a token came: something in front of this server may remove the Authorization header"
    : `Something in front of this server may block ${userAgent}`;
  const expired = ago(now - Math.max(...access.map(({ expires }) => expires), called));
  return {
    pending: isLocal(target)
      ? `${name} never fetched its token: nothing listens at ${target.host} on the computer of your browser. If it ` +
        "is on another computer, connect again and say so on the page."
      : `${name} never fetched its token. Its servers may not reach ${server.issuer}/token; ${hint(server)}`,
    unused: `${name} got its token ${ago(now - redeemed)} and has not called since. ${cause}; ${hint(server)}`,
    silent: `${name}'s access token expired ${expired} and it has not come back. Open ${name} and connect again.`,
    active: `${name} is connected.`,
  }[connectionState(grant, now)];
}

const hint = ({ resource }: Server) => `to see what a client meets, run: npx -y deno run -A mod.ts ${resource}`;

// --- Events ---

/** `events/<issuer>`: the latest of each type, so that a flood of one type cannot push out the others. */
type EventRecord = Record<string, { count: number; latest: Omit<AuthEvent, "type" | "cause">[] }>;
/** Where events are kept, and those that are not written yet. */
type EventLog = { store: Store; key: string; waiting: EventRecord; writing: Promise<unknown> };
const MAX_EVENTS_PER_TYPE = 5;
/** Events that strangers can cause at will: they wait in memory for one that is worth a write. */
const CHEAP_EVENTS = /^(\w+_refused|connection_denied|sign_in_throttled|owner_unprotected|password_weak|server_error)$/;

/** Passes an event to `onEvent`, and keeps it for the owner's page. */
function recordEvent(log: EventLog, onEvent: (event: AuthEvent) => void, happened: Omit<AuthEvent, "at">): void {
  const event: AuthEvent = { at: Math.floor(seconds()), ...happened };
  // A broken alarm must break neither the request it reports nor, if it is asynchronous, the process.
  promiseTry(() => onEvent(event)).catch((error) => console.error("personal-auth: onEvent threw", error));
  const { at, type, message, clientName, connection } = event;
  if (type === "client_registered") return; // anybody's, any number of times, and nothing the owner could act on
  const kept = { at, message: message.slice(0, 500), ...defined({ clientName, connection }) };
  log.waiting = mergeEvents(log.waiting, { [type]: { count: 1, latest: [kept] } });
  if (CHEAP_EVENTS.test(type)) return;
  const batch = log.waiting;
  log.waiting = {};
  log.writing = promiseTry(() => log.store.update(log.key, (current) => mergeEvents(current, batch)))
    .catch(() => log.waiting = mergeEvents(batch, log.waiting)); // the next event tries again
}

/** Adds newer events to a record. An event that repeats an earlier one replaces it. */
function mergeEvents(record: unknown, newer: EventRecord): EventRecord {
  const merged = { ...record as EventRecord | undefined };
  for (const [type, { count, latest }] of Object.entries(newer)) {
    const all = [...latest, ...merged[type]?.latest ?? []];
    const keys = all.map(({ message, clientName }) => JSON.stringify([message, clientName]));
    const distinct = all.filter((_, i) => keys.indexOf(keys[i]!) === i);
    merged[type] = { count: count + (merged[type]?.count ?? 0), latest: distinct.slice(0, MAX_EVENTS_PER_TYPE) };
  }
  return merged;
}

/** Returns the latest events, newest first. The latest of a type says how many there were of that type. */
async function latestEvents(log: EventLog) {
  await log.writing;
  const record = mergeEvents(await log.store.get(log.key), log.waiting);
  return Object.entries(record)
    .flatMap(([type, { count, latest }]) => latest.map((event, i) => ({ ...event, type, count: i === 0 ? count : 1 })))
    .sort((a, b) => b.at - a.at);
}

/** Writes an event to the console, but for those that anyone can cause at will; these go to `onEvent` only. */
function logEvent({ type, message, connection, clientName, cause }: AuthEvent): void {
  if (type === "client_registered" || (type === "token_refused" && !connection)) return;
  // quote() keeps what a client controls on one line, so that no name can forge a second log entry.
  const why = cause instanceof Error ? quote(cause.message) : undefined;
  const parts = [clientName && `client ${quote(clientName)}`, connection && `connection ${connection}`, why];
  console.log(["personal-auth", type, message, ...parts.filter(Boolean)].join(" | "));
  if (type === "server_error") console.error(cause); // in full only what no stranger can cause at will
}

// --- Pages ---

type Html = ReturnType<typeof html>;
type PageStatus = 200 | 409 | 429 | ErrorStatus;

/** How the owner's pages look. */
export interface PageOptions {
  /** What the owner calls this server. Default: its address. */
  title?: string;
  /** The colour of the button that approves, as `#rrggbb`; its text is black or white by itself. */
  accent?: string;
}

const UNNAMED = "an app without a name";
const RELATIVE_TIME = new Intl.RelativeTimeFormat("en");
/** Events that happen when all is well; every other one needs a look. */
const ROUTINE = /^(owner_signed_in|sign_in_failed|connection_\w+|code_redeemed|first_call|token_created)$/;
const OPEN_TOO_LONG: Problem = { status: 403, message: "This page was open for too long. Check it and answer again." };

// What apps say of themselves is a .name: at most two lines, and clipped, so that combining marks draw over nothing.
const STYLE = `
:root{color-scheme:light dark;--ink:#1d1b18;--soft:#5c574f;--paper:#f5f3ee;--card:#fff;--line:#e0dbd0;--link:#1d4f9c;
--accent:var(--link);--on-accent:var(--card);--warn:#7a3d00;--warn-paper:#fff4e0;--good:#1b6b3a;--good-paper:#e8f5ec;
--bad:#a3241b}@media(prefers-color-scheme:dark){:root{--ink:#f1efe9;--soft:#b8b2a7;--paper:#161513;--card:#211f1d;
--line:#3d3a35;--link:#8db4f5;--warn:#ffcf8f;--warn-paper:#36260f;--good:#8fd8a8;--good-paper:#16301f;--bad:#ff9d94}}
@media(prefers-contrast:more){:root{--soft:var(--ink);--line:var(--ink)}}*{box-sizing:border-box;margin:0;padding:0}
body{min-height:100vh;display:grid;grid-template-columns:100%;place-items:center;padding:1rem;background:var(--paper);
color:var(--ink);font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere;text-wrap:pretty}main{width:100%;
max-width:28rem;padding:clamp(1.1rem,5vw,2rem);background:var(--card);border:1px solid var(--line);
border-radius:1.1rem}.wide{max-width:44rem;align-self:start}header,.row,.pair,fieldset label{display:flex;gap:.7rem;
align-items:center}header{min-height:2.75rem;margin-bottom:.5rem;color:var(--soft);font-size:.9rem}
header b,.to b{color:var(--ink)}header form{margin-left:auto}h1{margin-bottom:.5rem;font-size:1.5rem;line-height:1.2;
text-wrap:balance}h2{margin:1.6rem 0 .3rem;font-size:1rem}p{margin:.5rem 0}small{display:block}
small,code,.row p,.name,.av{overflow:clip}small,.soft,.to{color:var(--soft);font-size:.875rem}
ul,ol,summary.row{list-style:none}a{color:var(--link)}.name{display:-webkit-box;-webkit-box-orient:vertical;
-webkit-line-clamp:2;font-weight:600;text-align:left}.card,.flash,.warn{margin:1rem 0;padding:.8rem}
.card,.flash,.warn,.chip,.av,code,input,select,button,.button{border:1px solid transparent;border-radius:.75rem}
.card,code{border-color:var(--line)}.flash,.chip{background:var(--good-paper);color:var(--good)}
.warn{background:var(--warn-paper);color:var(--warn)}.warn,.chip{font-weight:600}.chip{padding:0 .5rem;font-size:.8rem;
white-space:nowrap}.row{padding:.7rem 0}.row>div{flex:1;min-width:0}.row p{margin:0}
.row p::first-letter{text-transform:uppercase}.card>.row{padding:0 0 .7rem}.row+.card{margin:0 0 .8rem}.av{flex:none;
width:2.5rem;height:2.5rem;display:grid;place-items:center;color:#fff;font-weight:700}.c0{background:#b0492a}
.c1{background:#2d66a8}.c2{background:#6a53c0}.c3{background:#1f7350}.c4{background:#a23b72}
.list>li,.to{border-top:1px solid var(--line)}.to{margin:0;padding-top:.7rem}.to b{font-size:1.2rem}
.marks li{padding:.2rem 0 .2rem 1.6rem;position:relative}.marks li::before{content:"✓";position:absolute;left:.2rem;
color:var(--good);font-weight:700}.marks .more::before{content:"!";left:.45rem;color:var(--warn)}
.marks .bad::before{content:"✗";color:var(--bad)}label,legend{display:block;margin-top:1rem;font-weight:600}
fieldset{border:0}fieldset label{min-height:2.75rem;margin:0;font-weight:400}input,select,button,.button{width:100%;
min-height:3rem;margin-top:.5rem;padding:.6rem .9rem;font:inherit;border-color:var(--soft);color:inherit;
background:var(--card)}[type=checkbox]{width:1.35rem;min-height:1.35rem;margin:0;accent-color:var(--accent)}
button,.button,summary{font-weight:600;cursor:pointer}.button{display:block;text-align:center;text-decoration:none}
.approve{margin-top:1rem;background:var(--accent);border-color:var(--accent);color:var(--on-accent)}.plain{width:auto;
min-height:2.75rem;margin:0;padding:0;border:0;background:none;color:var(--link)}.danger{color:var(--bad)}
.pair{margin-top:.75rem}.pair>*{margin:0}.pair button{flex:none;width:auto}.pair .approve{flex:1}
summary{min-height:2.75rem;padding:.6rem 0;color:var(--link)}summary.row{padding:.7rem .3rem .7rem 0;color:inherit;
font-weight:400}summary.row::-webkit-details-marker{display:none}summary.row::after{content:"";padding:.2rem;
border:solid var(--soft);border-width:0 2px 2px 0;rotate:45deg}[open]>summary.row::after{rotate:225deg}
code{display:block;margin:.5rem 0;padding:.8rem;background:var(--paper);white-space:pre-wrap;user-select:all;
font-size:.875rem}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
`;

const serverName = ({ pages, issuer }: Server) => pages.title || issuer.replace("https://", "");
/** Where an answer goes: a web site by its host, anything else with its scheme. Never shortened: the end counts. */
const hostOf = ({ protocol, host }: URL) => protocol === "https:" ? host : `${protocol}//${host}`;
/** Whether an app on the browser's own computer listens there. A private-use scheme may have a host `localhost` too. */
const isLocal = ({ protocol, hostname }: URL) => /^https?:$/.test(protocol) && isLoopback(hostname);
const nameOf = (name: string) => html`<bdi class="name">${name || UNNAMED}</bdi>`;
const link = (uri: string, text: string) => html`<a class="button approve" href="${uri}">${nameOf(text)}</a>`;
const copyable = (text: string) => html`<code tabindex="0">${text}</code>`;
const list = (items: Html[]) => html`<ul class="list">${items.map((item) => html`<li>${item}</li>`)}</ul>`;
const fold = (title: string, content: Html, open = false) =>
  html`<details ${open && raw("open")}><summary>${title}</summary>${content}</details>`;

/** Shows a name beside its first letters in one of five colours, so that rows are told apart at a glance. */
function heading(name: string, where: string, more: Html, label?: string): Html {
  const letters = name.split(/\s+/).map((word) => word.match(/[\p{L}\p{N}]/u)?.[0] ?? "").slice(0, 2).join("");
  const sum = [...(name + where)].reduce((sum, char) => (sum * 31 + char.codePointAt(0)!) % 9973, 0);
  const avatar = html`<span class="av c${sum % 5}" aria-hidden="true">${letters.toUpperCase() || "?"}</span>`;
  return html`${avatar}<div>${nameOf(label || name)}${more}</div>`;
}

/** Shows a time from now, as a page without script does not know the owner's time zone; exactly in the title. */
function timeOf(at: number): Html {
  const left = at - seconds();
  const units = [["month", 30 * DAY], ["day", DAY], ["hour", HOUR], ["minute", MINUTE]] as const;
  const [unit, size] = units.find(([, size]) => Math.abs(left) >= size) ?? [];
  const text = unit ? RELATIVE_TIME.format(Math.trunc(left / size), unit) : "just now";
  return html`<time datetime="${new Date(at * 1000).toISOString()}" title="${formatTime(at)}">${text}</time>`;
}

const formatTime = (at: number) => `${new Date(at * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;

/** Says what a connection may do; what is granted on request only is marked. */
function scopeList({ scopes }: Server, granted: string[]): Html {
  const item = (scope: string) =>
    scopes.byDefault.includes(scope)
      ? html`<li class="">${scopes.words(scope)}</li>`
      : html`<li class="more">${scopes.words(scope)} <span class="chip warn">extra</span></li>`;
  return html`<ul class="marks">${granted.filter((scope) => scope !== OFFLINE_ACCESS).map(item)}</ul>`;
}

/** `ready`: with the cursor in it; not where that would scroll the question out of sight on a phone. */
function passwordField(isOwner: boolean, problem?: Problem, ready = problem !== undefined): Html {
  const alert = problem && html`<p class="warn" role="alert" id="problem">${problem.message}</p>`;
  if (isOwner) return html`${alert}`;
  const more = raw((problem ? 'aria-describedby="problem" aria-invalid="true"' : "") + (ready ? " autofocus" : ""));
  // Password managers store and fill in a password only where they see a user name.
  return html`${alert}<input autocomplete="username" value="owner" hidden>
    <label for="password">Your password for this server</label>
    <input id="password" name="password" type="password" autocomplete="current-password" required ${more}>`;
}

/** Asks the owner, and for the password if nobody is signed in. */
async function consentPage(
  server: Server,
  c: Context,
  { client, redirect_uri, scopes, encoded }: AuthorizationRequest,
  { browser, isOwner }: Session,
  csrf?: string,
  problem?: Problem,
) {
  const { issuer, basePath } = server;
  const target = new URL(redirect_uri);
  // Beside what is on the list: the site of the document, or else of the answer; never a mere name, or any program.
  const isDocument = client.source === "document";
  const site = isDocument ? new URL(client.id) : target;
  const isListedSite = site.protocol === "https:" && !isLocal(site) && isListed(server.allowed, site);
  const chip = isListedSite && html`<span class="chip">on your list</span>`;
  const own = client.source === "registered" ? "The app chose this name; it is not verified" : "You registered it";
  const origin = isDocument ? html`Described by ${new URL(client.id).host} ${chip}` : own;
  const isWeb = /^https?:$/.test(target.protocol);
  const device = isLocal(target) ? "an app on this computer" : isWeb ? "" : "an app on this device";
  const place = html`<b title="${redirect_uri}">${hostOf(target)}</b> ${!isDocument && chip}`;
  const elsewhere = html`
    <p>This browser cannot reach it there. Approve here, then copy the address that is shown into the app.</p>
    <button name="decision" value="approve_elsewhere">Approve and show the address</button>
  `;
  const body = html`
    <h1>Connect this app to ${serverName(server)}?</h1>
    <div class="card">
      <div class="row">${heading(client.name, target.host, html`<small>${origin}</small>`)}</div>
      <p class="to">Sends you back to ${device}<br>${place}</p>
    </div>
    <h2>It will be able to</h2>
    ${scopeList(server, scopes)}
    <p class="warn">Approve only if you just started this.</p>
    <form method="post" action="${basePath}/authorize">
      <input type="hidden" name="request" value="${encoded}">
      <input type="hidden" name="csrf" value="${csrf ?? await createCsrf(server, browser, encoded)}">
      ${passwordField(isOwner, problem)}
      <div class="pair">
        <button class="approve" name="decision" value="approve">Approve</button>
        <button name="decision" value="deny" formnovalidate>Deny</button>
      </div>
      ${isLocal(target) && fold("The app is on another computer", elsewhere)}
    </form>
    <p class="soft">Stays connected until you revoke it at <a href="${issuer}/connections">/connections</a>.</p>
  `;
  return page(server, c, `Connect ${client.name || UNNAMED}?`, body, { status: problem?.status });
}

/** Leads to a private-use scheme. A redirect would leave the form on the screen, as if nothing had happened. */
function openAppPage(server: Server, c: Context, uri: string, name: string, approved: boolean) {
  c.header("Refresh", `0; url=${uri}`);
  const texts = ["The app opens now. If it does not, press the button.", link(uri, `Open ${name || "the app"}`)];
  return messagePage(server, c, 200, approved ? "Approved" : "Not connected", ...texts, "Then close this page.");
}

/** Shows the address of the callback, to be carried by hand to the computer that the app runs on. */
function elsewherePage(server: Server, c: Context, uri: string) {
  const what = "Paste this address where the app on the other computer asks for it, or into a browser there:";
  const warning = html`<p class="warn">Give it only to the app that you started yourself.</p>`;
  const limit = `It works once, within ${CODE_TTL / MINUTE} minutes.`;
  return messagePage(server, c, 200, "Approved", what, copyable(uri), warning, limit);
}

/** Answers a form that was sent before, with the way on if the first answer did not get through. */
function answeredPage(server: Server, c: Context, client: string, uri?: string) {
  const text = "You approved this request before. If the app is not connected, go back to it and connect again.";
  const way = uri ? [link(uri, `Go on to ${client || "the app"}`)] : [];
  return messagePage(server, c, 409, "Already answered", text, ...way);
}

/** Shows the owner's page; to anybody else, the form to sign in. */
async function connectionsPage(server: Server, c: Context, { browser, isOwner }: Session, problem?: Problem) {
  const { basePath, resource } = server;
  const csrf = await createCsrf(server, browser, `${basePath}/connections`);
  const form = (content: Html) =>
    html`<form method="post" action="${basePath}/connections">
      <input type="hidden" name="csrf" value="${csrf}">${content}</form>`;
  if (!isOwner) {
    const fields = form(html`${passwordField(false, problem, true)}<button class="approve">Sign in</button>`);
    const text = "This page is for the owner of this server.";
    return await messagePage(server, c, problem?.status ?? 200, "Sign in", text, fields);
  }
  const connections = await listConnections(server);
  const [attempts, events] = [await listTimelines(server), await latestEvents(server.events)];
  const done = DONE.find(([, it]) => it === c.req.query("done"))?.[2];
  const isNew = ({ type, at }: typeof events[0]) => !ROUTINE.test(type) && seconds() - at < 30 * DAY;
  const section = (title: string, items: Html[]) => items.length > 0 && html`<h2>${title}</h2>${list(items)}`;
  const signOut = (name: string, text: string, choice?: Html) =>
    !server.authenticateOwner &&
    form(html`${choice}<button class="plain" name="action" value="${name}">${text}</button>`);
  const address = html`
    <p>Give it this address, in Claude as a custom connector:</p>${copyable(resource)}
    <p>In Claude Code:</p>${copyable(addCommand(serverName(server), resource))}
  `;
  const token = html`<p class="soft">For scripts, and for clients without a browser.</p>${form(tokenFields(server))}`;
  const disconnect = html`
    <p>Every app and every token has to be connected again.</p>
    ${form(html`<button class="danger" name="action" value="revoke_all">Disconnect all</button>`)}
  `;
  const box = html`<fieldset><label>
    <input type="checkbox" name="revoke_all" value="yes">Disconnect every app and token as well</label></fieldset>`;
  const body = html`
    <h1>Connections</h1>
    ${done && html`<p class="flash" role="status">${done}</p>`}
    ${passwordField(true, problem)}
    ${connections.length === 0 && html`<p>Nothing is connected yet.</p>`}
    ${list(connections.map((connection) => connectionItem(server, connection, form)))}
    ${fold("Connect an app", address, connections.length === 0)}
    ${fold("New token for a script", token)}
    ${connections.length > 1 && fold("Disconnect all", disconnect)}
    ${section("Attempts to connect", attempts.map(attemptItem))}
    ${section("Needs a look", events.filter(isNew).map(eventItem))}
    ${section("Recent activity", events.filter((event) => !isNew(event)).map(eventItem))}
    ${events.length === 0 && html`<p class="soft">No activity yet.</p>`}
    ${signOut("sign_out_everywhere", "Sign out everywhere", box)}
  `;
  const more = { status: problem?.status, wide: true, aside: signOut("sign_out", "Sign out") };
  return await page(server, c, "Connections", body, more);
}

/** Shows a connection in a row; opened, what can be done with it. */
function connectionItem(server: Server, connection: Connection, form: (content: Html) => Html): Html {
  const { id, kind, clientName, label, redirectUri, scopes, state, createdAt, lastUsedAt, expiresAt } = connection;
  const name = label || clientName || UNNAMED;
  const where = redirectUri ? hostOf(new URL(redirectUri)) : "token";
  const short = scopes.filter((scope) => scope !== OFFLINE_ACCESS).join(" · ");
  const expires = kind === "token" && html`<span> · expires ${timeOf(expiresAt)}</span>`;
  const used = lastUsedAt ? html`used ${timeOf(lastUsedAt)}` : state === "pending" ? "not finished" : "never used";
  const silent = state === "silent" && html`<span class="chip warn">silent</span>`;
  const facts = html`<small>${where} · ${used} ${silent}</small><small>${short}${expires}</small>`;
  const actions = html`
    <input type="hidden" name="id" value="${id}">
    <label for="label-${id}">Your name for it</label>
    <div class="pair">
      <input id="label-${id}" name="label" value="${label ?? ""}" maxlength="${MAX_LABEL}" autocomplete="off">
      <button name="action" value="rename" aria-label="Rename: ${name}">Rename</button>
    </div>
    <p>Once disconnected, it has to ask you again before it can use this server.</p>
    <button class="danger" name="action" value="revoke" aria-label="Disconnect: ${name}">Disconnect</button>
  `;
  return html`
    <details>
      <summary class="row">${heading(clientName, where, facts, label)}</summary>
      <div class="card">
        ${label && nameOf(clientName)} ${scopeList(server, scopes)}
        <small>Connected ${timeOf(createdAt)} · ${formatTime(createdAt)}</small>
        ${form(actions)}
      </div>
    </details>
  `;
}

/** Shows how far an attempt came, step by step, and the same as text, to ask somebody about it. */
function attemptItem({ title, steps, advice }: Timeline): Html {
  const lines = steps.map(({ at, text, ok }) => `${ok ? "ok    " : "FAILED"} ${formatTime(at)} ${text}`);
  const items = steps.map((it) => html`<li class="${!it.ok && "bad"}">${it.text}<small>${timeOf(it.at)}</small></li>`);
  return html`
    <details>
      <summary class="row"><div>${nameOf(title)}<small>${advice}</small></div></summary>
      <ol class="marks">${items}</ol>
      ${copyable([title, ...lines, advice].join("\n"))}
    </details>
  `;
}

function eventItem({ at, message, clientName, count }: Awaited<ReturnType<typeof latestEvents>>[number]): Html {
  const when = html`<small>${timeOf(at)}${count > 1 && ` · ${count} times in all`}</small>`;
  return html`
    <div class="row">
      <div>${clientName && nameOf(clientName)}<p>${message}</p>${when}</div>
    </div>
  `;
}

/** Returns the command that adds this server to Claude Code, under a name that needs no quotes in any shell. */
function addCommand(name: string, resource: string): string {
  const word = name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "personal";
  return `claude mcp add --transport http ${word} ${resource}`;
}

function tokenFields({ scopes }: Server): Html {
  const days = [30, 90, 365].map((days) => html`<option value="${days}">${days} days</option>`);
  const choices = scopes.all.map((scope) =>
    html`<label><input type="checkbox" name="scope" value="${scope}"
      ${scopes.byDefault.includes(scope) && raw("checked")}>${scopes.words(scope)}</label>`
  );
  return html`<label for="name">What is it for?</label>
    <input id="name" name="name" required maxlength="200" autocomplete="off">
    <label for="days">Expires after</label>
    <select id="days" name="days">${days}</select>
    ${choices.length > 1 && html`<fieldset><legend>It may</legend>${choices}</fieldset>`}
    <button name="action" value="create_token">Create token</button>`;
}

function messagePage(server: Server, c: Context, status: PageStatus, title: string, ...texts: (string | Html)[]) {
  const body = html`<h1>${title}</h1>${texts.map((text) => typeof text === "string" ? html`<p>${text}</p>` : text)}`;
  return page(server, c, title, body, { status });
}

const expiredPage: Handler = (server, c) => {
  const advice = "Go back to the app and connect again. If that does not help, allow cookies for this site.";
  return messagePage(server, c, 403, "This page has expired", advice);
};

/** Returns black or white, whichever is easier to read on a colour `#rrggbb` (relative luminance, WCAG 2). */
function readableOn(colour: string): string {
  const [r = 0, g = 0, b = 0] = colour.slice(1).match(/../g)!.map((pair) => (parseInt(pair, 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

type PageMore = { status?: PageStatus | undefined; wide?: boolean; aside?: Html | false };

/** Sends a page. `aside` stands at the end of its head line. */
function page(server: Server, c: Context, title: string, body: Html, { status = 200, wide, aside }: PageMore = {}) {
  const { issuer, pages } = server;
  const nonce = random(16);
  const headers = {
    // No script, frame or image: nobody can decorate or frame the page. No form-action: browsers apply it to the
    // redirect after the form too, and would stop the way back to the app.
    "Content-Security-Policy":
      `default-src 'none'; style-src 'nonce-${nonce}'; frame-ancestors 'none'; base-uri 'none'`,
    "X-Frame-Options": "DENY",
    ...NOSNIFF,
    "Referrer-Policy": "same-origin", // not no-referrer: the form would then be sent with Origin: null
    "Cache-Control": "no-store",
  };
  const name = serverName(server);
  const address = pages.title && html`<span>${issuer.replace("https://", "")}</span>`;
  const accent = pages.accent ? `:root{--accent:${pages.accent};--on-accent:${readableOn(pages.accent)}}` : "";
  const document = html`
    <!doctype html>
    <html lang="en">
      <meta charset="utf-8">
      <meta name="viewport" content="width=device-width, initial-scale=1">
      <meta name="robots" content="noindex">
      <title>${title} · ${name}</title>
      <style nonce="${nonce}">${raw(STYLE + accent)}</style>
      <main class="${wide && "wide"}"><header><b>${name}</b>${address}${aside}</header>${body}</main>
    </html>
  `;
  return c.html(document, status, headers);
}

// --- Stores ---

/** Keeps state in memory, until the process ends: for tests. */
export function memoryStore(): Store {
  const entries = new Map<string, Entry>();
  let changes = 0;
  const write: Write = (key, entry) => {
    changes++;
    if (entry) entries.set(key, entry);
    else entries.delete(key);
  };
  return {
    get: (key) => promiseTry(() => valueOf(entries.get(key))),
    update: (...update) => promiseTry(() => applyChange(entries.get(update[0]), update, write)),
    async *list(prefix) {
      for (const key of [...entries.keys()].filter((key) => key.startsWith(prefix)).sort()) {
        const value = valueOf(entries.get(key));
        if (value !== undefined) yield [key, value];
      }
    },
    version: () => changes,
  };
}

type Update = Parameters<Store["update"]>;
type Entry = { value: string; expires: number | null; mark?: string }; // the value as JSON: nobody else holds it
type Write = (key: string, entry?: Entry) => void;

function valueOf(entry: Entry | undefined): unknown {
  const isLive = entry && (entry.expires === null || entry.expires > seconds());
  return isLive ? JSON.parse(entry.value) : undefined;
}

/** Returns what `update` answers, and writes the entry if it changes: without one, it is deleted. */
function applyChange(found: Entry | undefined, [key, change, options]: Update, write: Write): unknown {
  const current = valueOf(found);
  const next = change(current);
  if (next === undefined) {
    if (found) write(key); // also if it has expired: the clock may be set back
  } else if (next !== current) {
    const kept = current === undefined ? null : found!.expires;
    write(key, { value: JSON.stringify(next), expires: options?.expiresAt ?? kept });
  }
  return next;
}

const APPLICATION_ID = 0x6d637061; // "mcpa" in ASCII: marks a file as ours
const FORMAT = 2; // which tables a file has
const LOCK_PATIENCE = 5; // seconds
const STORE_DEADLINE = 8; // seconds: less than the ten that Claude waits
const LAST_CHARACTER = "\u{10ffff}"; // after a prefix: the end of all keys that begin with it

/**
 * Keeps state in one SQLite file, `<dir>/oauth.sqlite`. What `update` has answered survives `kill -9` and a power cut.
 * Processes on one machine may share it, but not over a network file system. If it is removed or replaced while open,
 * every call throws until it is back or the server is restarted.
 *
 * @throws {Error} if the folder cannot be written, or the file is damaged or not ours; it is then left as it is.
 */
export function fileStore(dir: string): Store {
  assert(typeof dir === "string" && dir !== "", `fileStore: dir must be the path of a folder, such as ".oauth-state"`);
  assert(!/^~([\\/]|$)/.test(dir), `fileStore: only a shell replaces ~, so write the whole path, not ${quote(dir)}`);
  const { db, file } = openStateFile(dir);
  const sql = prepareStatements(db);
  const { assertInPlace, look } = watchFile(db, file);
  const read = <T>(query: () => T): Promise<T> =>
    retry(() => {
      look();
      return query();
    });
  const { add, flush } = batch((updates: Update[]) =>
    retry(() => {
      assertInPlace(); // what is written to a deleted log may end in a file that others use by now
      const answers = writeTogether(db, sql, updates);
      assertInPlace(); // what was written to one is not there after a restart: it must not be answered as done
      return answers;
    })
  );
  return {
    get: async (key) => valueOf(await read(() => sql.select.get(key))),
    update: (...update) => add(update),
    async *list(prefix) {
      for (const row of await read(() => sql.list.all(prefix, prefix + LAST_CHARACTER))) {
        const value = valueOf(row);
        if (value !== undefined) yield [row.key, value];
      }
    },
    version() {
      try {
        return look();
      } catch {
        return undefined; // then the record is read, and that says what is wrong
      }
    },
    close() {
      flush();
      db.close();
    },
  };
}

// deno-lint-ignore no-explicit-any
type Sqlite = any; // DatabaseSync of node:sqlite, whose types not every project has

function prepareStatements(db: Sqlite) {
  return {
    select: db.prepare("SELECT value, expires FROM entries WHERE key = ?"),
    list: db.prepare("SELECT key, value, expires FROM entries WHERE key >= ? AND key < ? ORDER BY key"),
    upsert: db.prepare(`INSERT INTO entries (key, value, expires) VALUES (?, ?, ?)
      ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = excluded.expires`),
    remove: db.prepare("DELETE FROM entries WHERE key = ?"),
    // Two with each change, so that nothing waits. The latest stay: a clock that was wrong must not cost a connection.
    sweep: db.prepare(`DELETE FROM entries WHERE key IN
      (SELECT key FROM entries WHERE expires < ? ORDER BY expires DESC LIMIT 2 OFFSET 1000)`),
  };
}

let commits = 0; // of all file stores in this process

/** Performs all updates in one transaction, because the commit dominates the cost. */
function writeTogether(db: Sqlite, sql: ReturnType<typeof prepareStatements>, updates: Update[]): unknown[] {
  let changed = false;
  const write: Write = (key, entry) => {
    changed = true;
    if (entry) sql.upsert.run(key, entry.value, entry.expires);
    else sql.remove.run(key);
    sql.sweep.run(seconds());
  };
  db.exec("BEGIN IMMEDIATE");
  try {
    const answers = updates.map((update) => applyChange(sql.select.get(update[0]), update, write));
    db.exec("COMMIT");
    if (changed) commits++;
    return answers;
  } catch (error) {
    try {
      db.exec("ROLLBACK");
    } catch {
      // It has rolled back by itself.
    }
    throw error;
  }
}

/** Tells whether an open state file is still the one in the folder, and of every change by a number. */
function watchFile(db: Sqlite, file: string) {
  const { statSync } = nodeModule("node:fs");
  const identify = (name: string) => {
    const found = statSync(name, { throwIfNoEntry: false });
    return `${found?.dev} ${found?.ino}`;
  };
  const othersCommits = db.prepare("PRAGMA data_version");
  let others: number = othersCommits.get().data_version; // a first read also makes the log and its index
  let lookedAt = -Infinity;
  const names = [file, `${file}-wal`, `${file}-shm`];
  const opened = names.map(identify);

  function assertInPlace(): void {
    const missing = names.find((name, i) => identify(name) !== opened[i]);
    const fault = "was removed or replaced while open: nothing is accepted until it is back or the server is restarted";
    if (missing) throw new StateFileError(`${quote(missing)} ${fault}`);
  }

  /** Looks once a millisecond: a token revoked by another process might as well have been used just before. */
  function look(): number {
    const now = performance.now();
    if (now - lookedAt >= 1) {
      assertInPlace();
      others = othersCommits.get().data_version;
      lookedAt = now;
    }
    return commits + others; // neither count ever falls, so no sum comes twice
  }

  return { assertInPlace, look };
}

/** Repeats a call while another process has the lock: SQLite would wait with the whole server standing still. */
async function retry<T>(call: () => T | Promise<T>): Promise<T> {
  const deadline = performance.now() + LOCK_PATIENCE * 1000;
  for (let wait = 1;; wait = Math.min(wait * 2, 50)) {
    try {
      return await call();
    } catch (error) {
      if (!isLocked(error) || performance.now() > deadline) throw error;
      await delay(wait * (0.5 + Math.random()));
    }
  }
}

function isLocked(error: unknown): boolean {
  if (!(error instanceof Error) || error instanceof StateFileError) return false; // whose path may say anything
  return /database (table )?is locked|busy/i.test(error.message);
}

/** Performs together the tasks of one turn of the event loop. If one fails, each is tried alone. */
function batch<Task, Result>(perform: (tasks: Task[]) => Promise<Result[]>) {
  const { setImmediate } = nodeModule("node:timers");
  let tasks: Task[] = [];
  let results = Promise.withResolvers<Result[]>();

  function flush(): void {
    if (tasks.length === 0) return;
    const [together, { resolve }] = [tasks, results];
    [tasks, results] = [[], Promise.withResolvers()];
    resolve(perform(together));
  }

  async function add(task: Task): Promise<Result> {
    if (tasks.length === 0) setImmediate(flush);
    const position = tasks.push(task) - 1;
    try {
      return (await results.promise)[position]!;
    } catch (error) {
      if (isLocked(error)) throw error; // a lock concerns them all, and each has waited long enough for it
      return (await perform([task]))[0]!;
    }
  }

  return { add, flush };
}

class StateFileError extends Error {}

function openStateFile(dir: string): { db: Sqlite; file: string } {
  nodeModule("node:sqlite"); // a runtime without it is no fault of the file
  const file: string = nodeModule("node:path").resolve(dir, "oauth.sqlite"); // the working folder may change
  let db: Sqlite;
  let fault = "cannot be written: make it writable for this user, with its folder, and see that there is room";
  try {
    ensureStateFile(dir, file);
    fault = "cannot be read and was left as it is: put a backup in its place, or move it away, with its -wal and -shm";
    checkStateFile(file);
    db = openSqlite(file);
    db.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 0");
    return { db, file };
  } catch (cause) {
    db?.close();
    if (cause instanceof StateFileError) throw cause;
    const { name, message } = cause as Error; // Deno's message names the flag
    if (name === "NotCapable") fault = `cannot be written: Deno was started without a permission. ${message}`;
    throw new StateFileError(`${quote(file)} ${fault}`, { cause });
  }
}

/** Opens an SQLite file that waits for locks by itself, which later retry() does. */
function openSqlite(file: string, options = {}): Sqlite {
  const { DatabaseSync } = nodeModule("node:sqlite");
  const db = new DatabaseSync(file, options);
  db.exec(`PRAGMA busy_timeout = ${LOCK_PATIENCE * 1000}`);
  return db;
}

function ensureStateFile(dir: string, file: string): void {
  const fs = nodeModule("node:fs");
  const fresh = `${file}.${random(4)}.new`;
  fs.mkdirSync(dir, { recursive: true, mode: 0o700 });
  try {
    // Always: Deno's accessSync() does not notice a read-only file system. SQLite gives its side files this mode too.
    fs.closeSync(fs.openSync(fresh, "wx", 0o600));
    // SQLite would take the log of a file that was moved away for the new one's. Asked twice, because another process
    // may make the file, and then its log, at this moment.
    const isOrphaned = !fs.existsSync(file) && fs.existsSync(`${file}-wal`) && !fs.existsSync(file);
    const fault = "is there without its state file: put that back, or move the -wal and -shm away as well";
    if (isOrphaned) throw new StateFileError(`${quote(`${file}-wal`)} ${fault}`);
    if (!fs.existsSync(file)) createStateFile(fresh, file);
  } catch (error) {
    if ((error as { code?: string }).code !== "EEXIST") throw error; // another process was faster
  } finally {
    removeTemporaryFiles(dir, fresh);
  }
  fs.accessSync(file, fs.constants.R_OK | fs.constants.W_OK);
}

/** Makes the file elsewhere and puts it in place whole, so that one without our mark is always damage. */
function createStateFile(fresh: string, file: string): void {
  const fs = nodeModule("node:fs");
  const db = openSqlite(fresh);
  // In WAL mode at once, because a later kill would leave a journal, which who only reads cannot roll back.
  db.exec(`PRAGMA application_id = ${APPLICATION_ID}; PRAGMA user_version = ${FORMAT};
    CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL);
    CREATE INDEX expiring ON entries (expires) WHERE expires IS NOT NULL;
    PRAGMA journal_mode = WAL`);
  db.close();
  try {
    fs.linkSync(fresh, file); // unlike a rename, it does not replace what another process put there meanwhile
  } catch { // there are no hard links; "wx" replaces nothing either
    fs.writeFileSync(file, fs.readFileSync(fresh), { flag: "wx", mode: 0o600, flush: true });
  }
}

/** Removes what was made for this start, and what a killed one left a minute ago. */
function removeTemporaryFiles(dir: string, fresh: string): void {
  const fs = nodeModule("node:fs");
  for (const name of fs.readdirSync(dir)) {
    if (!/^oauth\.sqlite\.[0-9a-f]{8}\.new(-\w+)?$/.test(name)) continue;
    const path: string = nodeModule("node:path").resolve(dir, name);
    try {
      const isOld = Date.now() - fs.statSync(path).mtimeMs > MINUTE * 1000;
      if (isOld || path.startsWith(fresh)) fs.rmSync(path);
    } catch {
      // It is gone; or a virus scanner holds it, and a later start removes it.
    }
  }
}

/** Throws unless this is a sound state file of ours. It only reads: SQLite may change a damaged one, or its log. */
function checkStateFile(file: string): void {
  if (nodeModule("node:fs").statSync(file).size === 0) throw new Error("it is empty"); // SQLite would delete its log
  // By SQLite, because any other close of the file drops the locks that this process has on it (POSIX).
  const db = openSqlite(file, { readOnly: true });
  const pragma = (name: string) => db.prepare(`PRAGMA ${name}`).get()[name];
  const assertOurs = (holds: boolean, finding: string, advice: string) => {
    if (!holds) throw new StateFileError(`${quote(file)} ${finding} and was left as it is: ${advice}, or move it away`);
  };
  try {
    const isOurs = pragma("application_id") === APPLICATION_ID;
    assertOurs(isOurs, "is not a state file of this program", "choose another folder");
    const format = pragma("user_version");
    const advice = "update mod.ts if a newer version wrote it";
    assertOurs(format === FORMAT, `has format ${format} instead of ${FORMAT}`, advice);
    const verdict = pragma("quick_check");
    if (verdict !== "ok") throw new Error(verdict);
    db.prepare("SELECT key FROM entries");
  } finally {
    db.close();
  }
}

/** The part of a `Deno.Kv` that is used here. */
export interface KvLike {
  /** Reads one key. */
  get(key: string[]): Promise<{ value: unknown; versionstamp: string | null }>;
  /** Reads a range of keys, in their order. */
  list(selector: { start: string[]; end: string[] }): AsyncIterable<{ key: readonly unknown[]; value: unknown }>;
  /** Begins a change that is committed whole or not at all. */
  atomic(): KvAtomicLike;
  /** Closes the connection. */
  close(): void;
}

/** One compare-and-set of a {@linkcode KvLike}. */
export interface KvAtomicLike {
  /** Requires that the key still has this version. */
  check(entry: { key: string[]; versionstamp: string | null }): KvAtomicLike;
  /** Writes a key; `expireIn` is in milliseconds. */
  set(key: string[], value: unknown, options?: { expireIn?: number }): KvAtomicLike;
  /** Removes a key. */
  delete(key: string[]): KvAtomicLike;
  /** Carries out the change; `ok` is false if a version differs. */
  commit(): Promise<{ ok: boolean }>;
}

/**
 * Keeps state in a `Deno.Kv`: a local file, or the distributed store of Deno Deploy or denokv. `await Deno.openKv()`
 * makes one; so does `openKv()` of `@deno/kv` on Node and Bun. All three read what the others wrote.
 */
export function kvStore(kv: KvLike): Store {
  assert(typeof kv?.atomic === "function", "kvStore needs an open Deno.Kv: kvStore(await Deno.openKv())");
  const path = (key: string) => ["personal-auth", key];
  const inTurn = queue();

  async function compareAndSet(update: Update, mine: { mark: string; next?: unknown }): Promise<unknown> {
    const { value, versionstamp } = await kv.get(path(update[0]));
    const found = decodeEntry(update[0], value);
    // A commit whose answer is lost on a network is repeated by the KV's client, and loses the race against itself.
    if (found?.mark === mine.mark) return mine.next;
    let atomic: KvAtomicLike | undefined;
    const next = mine.next = applyChange(found, update, (key, entry) => {
      atomic = kv.atomic().check({ key: path(key), versionstamp });
      if (!entry) return atomic.delete(path(key));
      // The value has its own expiry. KV removes it much later, by its own clock, because ours may have been wrong.
      const left = entry.expires === null ? Infinity : entry.expires - seconds() + 30 * DAY;
      const options = left === Infinity ? {} : { expireIn: Math.max(0, Math.ceil(left * 1000)) };
      atomic.set(path(key), encodeEntry(key, { ...entry, mark: mine.mark }), options);
    });
    if (atomic && !(await atomic.commit()).ok) throw new Error("the key is busy: another process changed it");
    return next;
  }

  return {
    get: (key) => retry(async () => valueOf(decodeEntry(key, (await kv.get(path(key))).value))),
    // In turn, so that only other processes are raced against.
    update: (...update) => {
      const mine = { mark: random(8) };
      return inTurn(update[0], () => retry(() => compareAndSet(update, mine)));
    },
    async *list(prefix) {
      for await (const found of kv.list({ start: path(prefix), end: path(prefix + LAST_CHARACTER) })) {
        const key = String(found.key[1]);
        const value = valueOf(decodeEntry(key, found.value));
        if (value !== undefined) yield [key, value];
      }
    },
    close: () => kv.close(),
  };
}

/** Writes `[expires, value, mark]` as UTF-8, because all that a KV takes but bytes depends on the version of V8. */
function encodeEntry(key: string, { value, expires, mark }: Entry): Uint8Array {
  const bytes = utf8.encode(`[${JSON.stringify(expires)},${value},"${mark}"]`);
  assert(bytes.length <= 65536, `${quote(key)} would take ${bytes.length} bytes, and a Deno.Kv holds 65536`);
  return bytes;
}

function decodeEntry(key: string, bytes: unknown): Entry | undefined {
  if (bytes === null) return undefined; // there is no such key
  try {
    const [expires, value, mark] = JSON.parse(new TextDecoder().decode(bytes as Uint8Array));
    assert(value !== undefined && (expires === null || typeof expires === "number"), "It is not [expires, value]");
    return { expires, value: JSON.stringify(value), mark };
  } catch (cause) {
    const found = `The value of ["personal-auth", ${quote(key)}] in the Deno.Kv was not written by personal-auth`;
    throw new Error(`${found} and was left as it is: delete it, or open another KV`, { cause });
  }
}

/** Runs the tasks of one key one after the other. */
function queue() {
  const last = new Map<string, Promise<unknown>>();
  return <T>(key: string, task: () => Promise<T>): Promise<T> => {
    const turn = (last.get(key) ?? Promise.resolve()).then(task);
    // A task that never ends must not hold up its key.
    const done: Promise<unknown> = withDeadline(turn).catch(() => {}).then(() => {
      if (last.get(key) === done) last.delete(key);
    });
    last.set(key, done);
    return turn;
  };
}

function withDeadline<T>(answer: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = () => reject(new Error(`the store has not answered for ${STORE_DEADLINE} seconds`));
    const timer = setTimeout(late, STORE_DEADLINE * 1000);
    answer.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/** Wraps the store for the rest of the server: when it fails or is too slow, the answer is 503. */
function guardStore(store: Store, emit: Emit): Store {
  async function guarded<T>(ask: (inTime: (change: Update[1]) => Update[1]) => Promise<T>): Promise<T> {
    let answered = false;
    // A store that wakes up late must not apply what was answered with 503: the client has moved on.
    const inTime = (change: Update[1]) => (current: unknown) => {
      assert(!answered, "the store came back after the request was answered: nothing was changed");
      return change(current);
    };
    try {
      return await withDeadline(promiseTry(() => ask(inTime)));
    } catch (cause) {
      emit("server_error", "the store failed", { cause });
      const details = { status: 503, headers: { "Retry-After": "5" } } as const;
      throw new OAuthError("server_error", "The server cannot reach its state; try again", details);
    } finally {
      answered = true;
    }
  }

  return {
    ...(store.version && { version: () => store.version!() }),
    get: (key) => guarded(() => store.get(key)),
    update: (key, change, options) => guarded((inTime) => store.update(key, inTime(change), options)),
    async *list(prefix) {
      yield* await guarded(() => Array.fromAsync(store.list(prefix)));
    },
  };
}

// --- Primitives ---

const utf8 = new TextEncoder();
const promiseTry = <T>(call: () => T | Promise<T>) => new Promise<T>((resolve) => resolve(call()));
const delay = (milliseconds: number) => new Promise<void>((resolve) => setTimeout(resolve, milliseconds));

let latest = 0;

/** Returns seconds since the epoch, with their fraction. No two calls return the same: moments have an order. */
function seconds(): number {
  const now = Date.now() / 1000;
  latest = now > latest || latest - now > 1 ? now : latest + 1e-6; // a clock that was set back is followed
  return latest;
}

function ago(seconds: number): string {
  const units = [[DAY, "day"], [HOUR, "hour"], [MINUTE, "minute"]] as const;
  const [size, unit] = units.find(([size]) => seconds >= size) ?? [1, "second"];
  const count = Math.max(0, Math.floor(seconds / size));
  return `${count} ${unit}${count === 1 ? "" : "s"} ago`;
}

const hex = (bytes: Uint8Array) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const unhex = (text: string) => Uint8Array.from(text.match(/../g) ?? [], (digits) => parseInt(digits, 16));
const random = (bytes: number) => hex(crypto.getRandomValues(new Uint8Array(bytes)));

function base64url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function base64Bytes(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
}

/** Returns `undefined` if the text is neither base64 nor base64url. */
function decodeBase64(text: string): string | undefined {
  try {
    return new TextDecoder().decode(base64Bytes(text));
  } catch {
    return undefined;
  }
}

/** Used where there is one: Web Crypto takes forty times as long for a digest. */
const nodeCrypto = once(() => nodeModule("node:crypto", {}));

async function sha256(text: string): Promise<Uint8Array<ArrayBuffer>> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", utf8.encode(text)));
}

/** Makes a code_challenge. @see https://www.rfc-editor.org/rfc/rfc7636#section-4.2 */
const s256 = async (code_verifier: string) => base64url(await sha256(code_verifier));

/** Hashes a secret for the store. Secrets are random, so they need no slow hash. */
async function hashToken(token: string): Promise<string> {
  const { hash } = nodeCrypto();
  return hash ? hash("sha256", token, "base64url") : base64url(await sha256(token));
}

async function hmac(key: string): Promise<(text: string) => string | Promise<string>> {
  const { createHmac } = nodeCrypto();
  if (createHmac) return (text) => createHmac("sha512", key).update(text).digest("hex");
  const algorithm = { name: "HMAC", hash: "SHA-512" };
  const imported = await crypto.subtle.importKey("raw", utf8.encode(key), algorithm, false, ["sign"]);
  return async (text) => hex(new Uint8Array(await crypto.subtle.sign("HMAC", imported, utf8.encode(text))));
}

/** Computes HMAC-SHA-512 under the server's key, in hex. The purpose keeps one use apart from another. */
type Mac = (purpose: string, ...parts: string[]) => Promise<string>;

/** Makes the server's MAC. Its key, drawn at the first start, opens nothing: what it signs is checked in the store. */
function serverMac(store: Store, issuer: string, emit: Emit): Mac {
  const keyed = once(async () => {
    let before: string | undefined;
    const { key } = await store.update("server", (current) => {
      const record = current as { key: string; issuer: string } | undefined;
      before = record?.issuer;
      return before === issuer ? current : { key: record?.key ?? random(32), issuer };
    }) as { key: string };
    if (before !== undefined && before !== issuer) {
      const advice = "if that one still runs, give each a store of its own; " +
        "if the address has changed, all clients must connect again";
      emit("store_shared", `this store was last used by a server at ${quote(before)}: ${advice}`);
    }
    return hmac(key);
  });
  // JSON, so that no two lists of parts come out as the same bytes.
  return async (purpose, ...parts) => (await keyed())(JSON.stringify([purpose, ...parts]));
}

/** Compares in constant time, so that it leaks only the lengths. */
function equal(a: string, b: string): boolean {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a.charCodeAt(i) ^ b.charCodeAt(i);
  return difference === 0;
}

/** Computes a value when it is first needed. A promise that fails is computed again. */
function once<T>(compute: () => T): () => T {
  let value: T | undefined;
  return () => {
    if (value !== undefined) return value;
    value = compute();
    if (value instanceof Promise) value.catch(() => value = undefined);
    return value;
  };
}

// deno-lint-ignore no-explicit-any
function isObject(value: unknown): value is Record<string, any> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const isStringList = (value: unknown): value is string[] => Array.isArray(value) && value.every(isString);
type Defined<T> = { [K in keyof T]?: Exclude<T[K], undefined> };

/** Drops the members that are undefined. */
function defined<T extends Record<string, unknown>>(members: T): Defined<T> {
  return Object.fromEntries(Object.entries(members).filter(([, value]) => value !== undefined)) as Defined<T>;
}

/** Quotes an unknown value for a message: short, on one line, in plain ASCII, so that it cannot forge a log entry. */
function quote(value: unknown): string {
  const json = JSON.stringify(value) ?? String(value);
  const escape = (char: string) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return json.slice(0, 200).replace(/[^\x20-\x7e]/g, escape);
}

/** Returns a module of Node's, asked for only where it is used, so that this file loads where it is missing. */
// deno-lint-ignore no-explicit-any
function nodeModule(name: string, otherwise?: object): any {
  const { process } = globalThis as { process?: { getBuiltinModule?: (name: string) => unknown } };
  const module = process?.getBuiltinModule?.(name) ?? otherwise;
  if (!module) throw new Error(`${name} is missing here: Deno 2.9, Bun 1.4, Node 22.18 and later versions have it`);
  return module;
}

/** Reads OAuth parameters. @see https://www.rfc-editor.org/rfc/rfc6749#section-3.1 */
function parameters(encoded: string, repeatable = "resource"): URLSearchParams {
  const seen = new Set<string>();
  const known = new URLSearchParams();
  for (const [name, value] of new URLSearchParams(encoded)) {
    if (value === "") continue; // counts as absent
    if (seen.has(name) && name !== repeatable) { // two parsers may take different ones of the two
      throw invalidRequest(`The parameter ${quote(name)} is given more than once`);
    }
    // To look one up takes a walk over all.
    if (seen.size >= 100) throw invalidRequest("The request has too many parameters");
    seen.add(name);
    known.append(name, value);
  }
  return known;
}

async function readForm(c: Context, repeatable?: string): Promise<URLSearchParams> {
  return parameters(await readBody(c, "application/x-www-form-urlencoded"), repeatable);
}

async function readJson(c: Context): Promise<unknown> {
  const body = await readBody(c, "application/json");
  try {
    return JSON.parse(body);
  } catch (cause) {
    throw new OAuthError("invalid_client_metadata", "The body is not valid JSON", { cause });
  }
}

async function readBody(c: Context, type: string): Promise<string> {
  if (c.req.header("Content-Type")?.split(";", 1)[0]?.trim().toLowerCase() !== type) {
    throw invalidRequest(`The Content-Type must be ${type}`, { status: 415 });
  }
  const announced = Number(c.req.header("Content-Length") ?? NaN);
  // No more than was announced arrives, but for chunks (RFC 9112 §6.3), which are counted, and slower to read.
  const isBounded = announced <= MAX_BODY_BYTES && c.req.header("Transfer-Encoding") === undefined;
  try {
    if (announced > MAX_BODY_BYTES) throw new TooLarge();
    const text = isBounded ? await c.req.text() : await readLimited(c.req.raw.body, MAX_BODY_BYTES);
    if (text.length > MAX_BODY_BYTES) throw new TooLarge(); // no server was in between
    return text;
  } catch (cause) {
    const isTooLarge = cause instanceof TooLarge;
    if (!isTooLarge) throw invalidRequest("The body did not arrive whole", { cause });
    // The rest of the body would be taken for the next request, so the connection ends.
    const details = { status: 413, headers: { Connection: "close" } } as const;
    throw invalidRequest(`The body is larger than ${MAX_BODY_BYTES} bytes`, details);
  }
}

class TooLarge extends Error {}

async function readLimited(stream: ReadableStream<Uint8Array> | null, limit: number): Promise<string> {
  const reader = stream?.getReader(); // not every set of types knows that a stream can be iterated
  const decoder = new TextDecoder();
  let text = "";
  let length = 0;
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > limit) {
      reader.cancel().catch(() => {}); // the sender need not listen
      throw new TooLarge(`is larger than ${limit} bytes`);
    }
    text += decoder.decode(value, { stream: true });
  }
  return text + decoder.decode();
}

// --- Errors ---

/** What an {@linkcode OAuthError} has besides its code and description. */
export type OAuthErrorDetails = {
  /** The HTTP status. Default: 400. */
  status?: 400 | 401 | 403 | 405 | 413 | 415 | 500 | 503;
  headers?: Record<string, string>;
  /** Why it was refused, for the owner only. */
  reason?: string | undefined;
  /** The event to raise. */
  event?: AuthEvent["type"];
  clientName?: string;
  cause?: unknown;
};

type ErrorStatus = NonNullable<OAuthErrorDetails["status"]>;

/**
 * An error in OAuth's own form. `code` and `message` go to the client; the reason is for the owner only.
 *
 * @see https://www.rfc-editor.org/rfc/rfc6749#section-5.2
 */
export class OAuthError extends Error {
  /** The name of the class. */
  override name = "OAuthError";
  /** The error code of the standard, such as `invalid_grant`. */
  readonly code: string;
  /** The HTTP status. */
  readonly status: NonNullable<OAuthErrorDetails["status"]>;
  /** HTTP headers of the answer. */
  readonly headers: Record<string, string>;
  /** What it was made with. */
  readonly details: OAuthErrorDetails;

  /** Makes an error with a description for the client's developer. */
  constructor(code: string, description: string, details: OAuthErrorDetails = {}) {
    super(description, { cause: details.cause });
    this.code = code;
    this.status = details.status ?? 400;
    this.headers = details.headers ?? {};
    this.details = details;
  }
}

/** Replaces what RFC 6749 §5.2 does not allow in an error_description. */
const errorDescription = (message: string) =>
  message.replaceAll('"', "'").replace(/[^\x20-\x21\x23-\x5b\x5d-\x7e]/g, "?");

function methodNotAllowed(allow: string): never {
  const headers = { Allow: allow };
  throw invalidRequest(`The method must be one of ${allow}`, { status: 405, headers });
}

function asOAuthError({ emit }: Server, error: unknown): OAuthError {
  if (error instanceof OAuthError) return error;
  emit("server_error", "an unexpected error", { cause: error }); // the wire is told nothing of it
  return new OAuthError("server_error", "Something went wrong here", { status: 500 });
}

function errorResponse(server: Server, c: Context, thrown: unknown): Response {
  const { code, message, status, headers } = asOAuthError(server, thrown);
  const all: Record<string, string> = { ...headers, "Cache-Control": "no-store", ...NOSNIFF };
  // A 401 must say how to authenticate (RFC 9110 §15.5.2); the guard's own answers say it by themselves.
  if (status === 401) all["WWW-Authenticate"] ??= 'Basic realm="token"';
  return c.json({ error: code, error_description: errorDescription(message) }, status, all);
}

function errorPage(server: Server, c: Context, thrown: unknown): Response | Promise<Response> {
  const { message, status, headers } = asOAuthError(server, thrown);
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
  const title = status < 500 ? "This request cannot be answered" : "Something went wrong here";
  return messagePage(server, c, status, title, `${message}.`);
}

/** Answers by `handler`, which may end early by throwing its answer, or an error. */
function withErrors(server: Server, handler: Handler, answer: typeof errorPage = errorResponse) {
  return async (c: Context): Promise<Response> => {
    for (const [name, value] of Object.entries(NOSNIFF)) c.header(name, value);
    try {
      return await handler(server, c);
    } catch (thrown) {
      return thrown instanceof Response ? thrown : await answer(server, c, thrown);
    }
  };
}

const grantFunctions = { approveGrant, redeemGrant, refreshGrant, verifyGrant, presentGrant, revokeGrant };

/** Parts that tests check on their own: they may change. */
// deno-lint-ignore no-explicit-any
export const internals: any = { ...grantFunctions, isPublicAddress };

// --- Setup check ---

/** One thing that {@linkcode checkSetup} looked at. */
export interface SetupFinding {
  /** The part of the setup. */
  heading: "Address" | "Guard" | "Discovery" | "Sign-in" | "Browser apps";
  /** `failed`: some client cannot connect. `warning`: some clients stumble, or something is weaker than need be. */
  result: "ok" | "warning" | "failed";
  /** What was found, or the name of the check that passed. */
  what: string;
  /** What any server should do instead. */
  fix?: string;
  /** What to change on a server with `personalAuth()`, where it can be named. */
  withPersonalAuth?: string;
}

/** The result of {@linkcode checkSetup}. */
export interface SetupReport {
  /** The address that was checked. */
  url: string;
  /** `unreachable`: no answer came at all. */
  verdict: "ready" | "broken" | "unreachable";
  /** Everything that was looked at. */
  findings: SetupFinding[];
  /** What to type into Claude, or the one thing to repair first. */
  next: string[];
}

/** Options of {@linkcode checkSetup}. */
export interface SetupOptions {
  /** Called before each request with its method and path. */
  onProgress?: (what: string) => void;
  /** Replaces the built-in `fetch`. */
  fetch?: (request: Request) => Response | Promise<Response>;
  /** An access token, to call `initialize` and `tools/list` as well. */
  token?: string | undefined;
}

/** What is said where a check fails → the fix → the fix with `personalAuth()`. `{}` is what was found. */
const CHECKS = {
  "public address": "{} is this computer → For claude.ai, use the https address of a tunnel.",
  "https": "The address is http → Use https: clients send no token over http.",
  "port 443": "The port is {} → Use 443: claude.ai reaches no other.",
  "no slash at the end": "The address ends with a slash → Leave it out.",
  "answer": "No answer from {} → Check DNS, the port and the certificate.",
  "proxy": "The proxy answers {}, your server does not → Start the server on the proxy's port.",
  "own URLs": "The server names {}, which is not asked → Build URLs from the public base URL. → set baseUrl to it",
  "speed": "It takes {} s → Make it faster: Claude gives up after 10 s.",
  "closed": 'Anybody is let in: it answers {} → Check the token first. → app.all("/mcp", auth.guard, handler)',
  "path": "Nothing is served at {}: it answers 404 → Check path and proxy. → type the path of mcpPath",
  "guard first": "{} comes before the 401 → Check the token before method and Accept. → put auth.guard first",
  "401": "A request without a token is answered {} → Answer 401, with no redirect or login in front.",
  "challenge": 'The 401 has no Bearer challenge → Send WWW-Authenticate: Bearer resource_metadata="…".',
  "scope": 'The challenge names no scope → Add scope="…": without it Claude asks for all.',
  "Claude-User": "The user agent Claude-User is answered {} → Allow it (Cloudflare: Block AI bots).",
  "Authorization": "The token did not arrive: the proxy drops Authorization → Pass it on (Apache: CGIPassAuth On).",
  "invalid token": 'A made-up token is answered {} → Send 401 with error="invalid_token"; let the proxy pass both.',
  "calls": "With the token, {} → Use a valid token, or see the server's log.",
  "tool names": "Claude refuses the tools named {} → Use at most 64 letters, digits, _ and -.",
  "metadata": "Metadata is incomplete: {} → Serve it as application/json (RFC 9728, RFC 8414), or answer 404.",
  "resource": "resource is {} → Send the typed address byte for byte, without a slash at its end. → correct baseUrl",
  "issuer": "issuer is {} → Repeat authorization_servers byte for byte; mind a slash at the end.",
  "https endpoints": "{} is missing or not https → Build it from the public https address.",
  "offer": "{} is not on offer → Add it to the metadata: some clients insist on it.",
  "no empty members": "Members without a value: {} → Leave them out: strict clients refuse the answer.",
  "registration": "Registration is answered {} → Accept Claude, from any address. → see allowedRedirectDomains",
  "owner": "A code is given to anybody → Ask the owner first. → set password or authenticateOwner",
  "consent page": "The consent page is answered {} → See the server's log.",
  "no form-action": "The page's policy has form-action → Leave it out: Chromium blocks the way back to the app.",
  "no frames": "The page can be framed → Send frame-ancestors 'none': other sites could lead a click.",
  "denial": "A denial is answered {} → Send 302 with access_denied, the state as it came, and iss (RFC 9207).",
  "refusal": "A request with {} is not refused → Require PKCE with S256; compare the redirect URI exactly.",
  "dead token": "A dead refresh token is answered {} → Answer 400 invalid_grant in JSON.",
  "CORS": "A browser may not use the {} endpoint → Answer OPTIONS first, with Access-Control-Allow-Origin.",
} satisfies Record<string, `${string} → ${string}`>;

/** Ends the check: the rest would only fail for the same reason. */
class RootCause extends Error {}

/**
 * Asks any MCP server, from outside and without a password, what a client will ask. Registers a client, and starts an
 * authorization that it never finishes. On the command line: `deno run -A mod.ts https://your-domain.com/mcp`.
 *
 * @throws {TypeError} if `mcpUrl` is not an http or https URL, or `token` cannot be a token.
 */
export async function checkSetup(mcpUrl: string, options: SetupOptions = {}): Promise<SetupReport> {
  const url = webUrl(mcpUrl);
  assert(url, `Give the URL that you type into Claude, such as "https://your-domain.com/mcp"`);
  url.hash = "";
  // RFC 6750 §2.1. The message of fetch() about anything else holds the token.
  assert(/^[\w.~+/-]+=*$/.test(options.token || "x"), "The token holds a character that no token has");
  const checkup = startCheckup(url, options);
  try {
    for (const [heading, check] of STAGES) {
      checkup.heading = heading;
      await check(checkup);
    }
  } catch (error) {
    if (!(error instanceof RootCause)) throw error;
  }
  const { findings, next } = checkup;
  const failed = findings.find(({ result }) => result === "failed");
  const quoted = /[^\w:/.~%-]/.test(url.href) ? `'${url.href.replaceAll("'", "%27")}'` : url.href; // for a shell
  next.push(`claude.ai: Customize → Connectors → Add, and type ${url.href}`);
  next.push(`Claude Code: claude mcp add --transport http personal ${quoted}`);
  if (!failed) return { url: url.href, verdict: "ready", findings, next };
  const verdict = findings.at(-1)!.heading === "Address" ? "unreachable" : "broken";
  return { url: url.href, verdict, findings, next: [`Repair this first: ${failed.what}`] };
}

const STAGES: [SetupFinding["heading"], (checkup: Checkup) => unknown][] = [
  ["Address", checkAddress],
  ["Guard", checkGuard],
  ["Discovery", checkDiscovery],
  ["Sign-in", checkSignIn],
  ["Browser apps", checkCors],
];

type Checkup = ReturnType<typeof startCheckup>;

/** Returns what the stages share. */
function startCheckup(url: URL, options: SetupOptions) {
  type Judge = (good: unknown, check: keyof typeof CHECKS, found?: unknown) => boolean;
  const judge = (result: "warning" | "failed", isRootCause = false): Judge => (good, check, found) => {
    const { heading, findings } = checkup;
    const plain = options.token && isString(found) ? found.replaceAll(options.token, "[token]") : found;
    // Quoted in ASCII, so that it cannot control a terminal. An object may be too deep for JSON.stringify().
    const shown = plain instanceof Object ? "an object" : quote(plain);
    const [what = "", fix, withPersonalAuth] = CHECKS[check].replace("{}", () => shown).split(" → ");
    const failure = { heading, result, what, ...defined({ fix, withPersonalAuth }) };
    findings.push(good ? { heading, result: "ok", what: check } : failure);
    if (!good && isRootCause) throw new RootCause();
    return Boolean(good);
  };
  const checkup = {
    url,
    resource: url.href.replace(/\/$/, ""),
    options,
    heading: "Address" as SetupFinding["heading"],
    findings: [] as SetupFinding[],
    next: [] as string[],
    should: judge("warning"), // else some clients stumble
    must: judge("failed"), // else some client cannot connect
    need: judge("failed", true), // else everything after it fails as well
    ask: (...question: Question): Answer => ask(checkup, question),
    // deno-lint-ignore no-explicit-any
    told: { metadataUrl: "", server: {} as any, client_id: "https://claude.ai/oauth/mcp-oauth-client-metadata" },
  };
  return checkup;
}

/** Parses an http or https URL without credentials, which fetch() refuses. */
function webUrl(value: unknown, base?: URL): URL | undefined {
  const url = isString(value) && value.length < 8192 ? URL.parse(value, base?.href) : undefined;
  return url && /^https?:\/\/[^/@]+\//.test(url.href) ? url : undefined;
}

/** Tells whether a URL may be asked: a hostile server could name what only this computer reaches. */
async function mayAsk({ origin, hostname, protocol }: URL, typed: URL): Promise<boolean> {
  if (origin === typed.origin || isLoopback(hostname) && isLoopback(typed.hostname)) return true;
  if (protocol !== "https:") return false;
  const lookup: Promise<{ address: string }[]> = nodeModule("node:dns").promises.lookup(hostname, { all: true });
  const addresses = await lookup.catch(() => []); // if they change after this, the certificate does not fit
  return addresses.length > 0 && addresses.every(({ address }) => isPublicAddress(address));
}

const MAX_ANSWER_BYTES = 1024 * 1024;
type Question = [place: string | URL, headers?: Record<string, string>, body?: object, method?: string];
type Answer = ReturnType<typeof exchange>;

/** Asks one question, and takes at most 30 seconds and 1 MB. Ends the check if nothing usable answers. */
async function ask(checkup: Checkup, [place, headers, body, method = body ? "POST" : "GET"]: Question): Answer {
  const { url, options, findings, need } = checkup;
  const target = webUrl(String(place));
  options.onProgress?.(`${method} ${target?.pathname}`);
  const limit = new AbortController(); // AbortSignal.timeout() with a listener would keep the process alive
  const timer = setTimeout(() => limit.abort(), 30_000);
  try {
    if (!target || !await inTime(mayAsk(target, url), limit.signal)) need(false, "own URLs", String(place));
    const request = new Request(target!.href, {
      ...{ method, signal: limit.signal, body: body instanceof URLSearchParams ? body : JSON.stringify(body) },
      headers: { "User-Agent": "python-httpx/0.28.1", Accept: "*/*", ...headers }, // as hosted Claude
      redirect: "manual", // it could lead to an inside address
    });
    const answer = await inTime(exchange(request, options.fetch ?? fetch), limit.signal);
    // A busy server answers in JSON (RFC 6749 §5.2), a proxy with a page.
    if ([502, 503, 504].includes(answer.status) && !answer.json) need(false, "proxy", answer.status);
    return answer;
  } catch (error) {
    if (error instanceof RootCause) throw error;
    if (findings.at(-1)?.heading === "Address") checkup.heading = "Address"; // nothing was ever answered
    const { message, cause } = error as Error;
    need(false, "answer", `${target?.host}: ${message}${cause instanceof Error ? `: ${cause.message}` : ""}`);
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

async function exchange(request: Request, fetch: NonNullable<SetupOptions["fetch"]>) {
  const start = performance.now();
  const { status, ok, headers, body } = await fetch(request);
  const type = headers.get("Content-Type") ?? "";
  let text = "";
  if (!type.startsWith("text/event-stream")) text = await readLimited(body, MAX_ANSWER_BYTES);
  else if (ok && request.method === "POST") text = await readMessage(body);
  else body?.cancel().catch(() => {}); // it may stay open for ever
  const parsed: unknown = /json|event-stream/i.test(type) && await new Response(text).json().catch(() => {});
  const json = isObject(parsed) ? parsed : undefined;
  const seconds = (performance.now() - start) / 1000;
  return { status, ok, headers, location: headers.get("Location") ?? "", type, text, json, seconds };
}

/** Reads an event stream up to the first JSON-RPC response. Each line is searched once, however it is cut up. */
async function readMessage(stream: ReadableStream<Uint8Array> | null): Promise<string> {
  const [reader, decoder] = [stream?.getReader(), new TextDecoder()];
  let [line, message, length] = ["", "", 0];
  while (reader && !message && length < MAX_ANSWER_BYTES) {
    const { done, value } = await reader.read();
    if (done) break;
    length += value.length;
    const [end = "", ...lines] = decoder.decode(value, { stream: true }).split("\n");
    line += end;
    for (const next of lines) {
      if (/^data:.*"(result|error)":/.test(line)) message ||= line.slice("data:".length);
      line = next;
    }
  }
  reader?.cancel().catch(() => {});
  return message;
}

function checkAddress({ url, need, must, should }: Checkup) {
  if (should(!isLoopback(url.hostname), "public address", url.host)) {
    need(url.protocol === "https:", "https");
    must(url.port === "", "port 443", Number(url.port));
  }
  should(!/.\/$/.test(url.pathname), "no slash at the end");
}

const CLAUDE_REDIRECT = "https://claude.ai/api/mcp/auth_callback";
const AS_JSON = { "Content-Type": "application/json" };
const AS_MCP = { ...AS_JSON, Accept: "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25" };
const AS_CLAUDE = { ...AS_MCP, "User-Agent": "Claude-User" };
const AS_BROWSER = { Accept: "text/html", "User-Agent": "Mozilla/5.0" };
const PARAMS = { protocolVersion: "2025-11-25", capabilities: {}, clientInfo: { name: "setup-check", version: "1" } };
const INITIALIZE = { jsonrpc: "2.0", id: 0, method: "initialize", params: PARAMS };

/** Asks without a token: from the 401 a client learns that it has to sign in, and where. */
async function checkGuard(checkup: Checkup) {
  const { url, options, told, ask, need, must, should } = checkup;
  const { status, ok, headers, location, seconds } = await ask(url, AS_JSON, INITIALIZE);
  need(!ok, "closed", status);
  need(status !== 404, "path", url.pathname);
  need(![405, 406, 415].includes(status), "guard first", status);
  need(status === 401, "401", `${status} ${location}`);
  (seconds < 10 ? should : must)(seconds < 3, "speed", Math.round(seconds));
  const challenge = headers.get("WWW-Authenticate")?.slice(0, 8192) ?? "";
  told.metadataUrl = challenge.match(/resource_metadata="([^"]+)"/)?.[1] ?? "";
  if (must(/^Bearer\b/i.test(challenge), "challenge")) should(/scope="[^"]+"/.test(challenge), "scope");
  const get = await ask(url, { Accept: "text/event-stream" });
  must(get.status === 401, "guard first", `GET: ${get.status}`);
  const claude = await ask(url, AS_CLAUDE, INITIALIZE);
  need(claude.status === 401, "Claude-User", claude.status);
  const bad = await ask(url, { ...AS_CLAUDE, Authorization: "Bearer made-up" }, INITIALIZE);
  if (must(bad.status === 401, "invalid token", bad.status)) {
    const said = bad.headers.get("WWW-Authenticate") ?? "";
    const noToken = /(missing|no) (authorization|access token|token)|token is (needed|required)/i; // but one was sent
    need(!noToken.test(`${said} ${bad.text}`.slice(0, 8192)), "Authorization");
    should(!challenge || said.includes("invalid_token"), "invalid token", "401 without invalid_token");
  }
  if (options.token) await checkCalls(checkup);
}

/** Calls as Claude does. The token is sent to the typed address, and to no other. */
async function checkCalls({ url, options, next, ask, need, should }: Checkup) {
  const headers: Record<string, string> = { ...AS_CLAUDE, Authorization: `Bearer ${options.token}` };
  const hello = await ask(url, headers, INITIALIZE);
  need(hello.json?.result, "calls", `initialize is answered ${hello.status}`);
  const session = hello.headers.get("Mcp-Session-Id");
  if (session) headers["Mcp-Session-Id"] = session;
  await ask(url, headers, { jsonrpc: "2.0", method: "notifications/initialized" });
  const list = await ask(url, headers, { jsonrpc: "2.0", id: 1, method: "tools/list" });
  const tools = list.json?.result?.tools;
  need(Array.isArray(tools), "calls", `tools/list is answered ${list.status}`);
  if (session) await ask(url, headers, undefined, "DELETE");
  const names: string[] = tools.map((tool: unknown) => isObject(tool) && isString(tool.name) ? tool.name : "");
  const refused = names.filter((name) => !/^[\w-]{1,64}$/.test(name));
  should(refused.length === 0, "tool names", refused.join(", "));
  const [first, second] = [hello.seconds.toFixed(2), list.seconds.toFixed(2)];
  next.push(`initialize took ${first} s, tools/list ${second} s: ${names.length} tools`);
}

/** Returns the place of a metadata document (RFC 8414 §3.1, RFC 9728 §3.1). */
const wellKnown = (name: string, { origin, pathname }: URL) =>
  `${origin}/.well-known/${name}${pathname.replace(/\/$/, "")}`;
const lists = (list: unknown, value: string) => Array.isArray(list) && list.includes(value);

/** Tells whether secrets can be sent there. */
const isSafe = (url: URL | undefined) => url?.protocol === "https:" || isLoopback(url?.hostname ?? "");
const emptyMembers = (json: object) =>
  Object.entries(json).filter(([, value]) => value === null || value === "").map(([name]) => name).join(", ");

async function checkDiscovery({ url, resource, told, ask, need, must, should }: Checkup) {
  const place = told.metadataUrl || wellKnown("oauth-protected-resource", url);
  need(webUrl(place)?.origin === url.origin, "own URLs", place);
  const { ok, status, type, json: document } = await ask(place);
  need(ok && document, "metadata", `${status} ${type} at ${place}`);
  need(document?.resource === resource, "resource", document?.resource);
  const issuer = document?.authorization_servers?.[0];
  need(isSafe(webUrl(issuer)), "https endpoints", "authorization_servers");
  for (const base of [url, new URL(url.origin)]) { // some clients look at one of these only
    const other = wellKnown("oauth-protected-resource", base);
    const { ok, status, json } = await ask(other);
    should(ok && json, "metadata", `${status} at ${other}`);
  }
  const oauth = await ask(wellKnown("oauth-authorization-server", new URL(issuer)));
  const openid = await ask(wellKnown("openid-configuration", new URL(issuer)));
  // Clients take either document (RFC 8414 §5), and stumble over half of one.
  const isWhole = openid.ok && openid.json?.jwks_uri;
  should(isWhole || openid.status === 404, "metadata", `${openid.status} ${openid.type}, OpenID configuration`);
  const server = told.server = oauth.ok && oauth.json || isWhole && openid.json || {};
  need(server.issuer, "metadata", `${oauth.status} ${oauth.type}, authorization server`);
  need(server.issuer === issuer, "issuer", server.issuer);
  const bad = ["authorization_endpoint", "token_endpoint"].find((name) => !isSafe(webUrl(server[name])));
  need(!bad, "https endpoints", bad);
  const takesDocuments = server.client_id_metadata_document_supported === true;
  need(takesDocuments || server.registration_endpoint, "offer", "registration_endpoint");
  must(lists(server.code_challenge_methods_supported, "S256"), "offer", "S256");
  const methods = server.token_endpoint_auth_methods_supported;
  (server.registration_endpoint ? should : must)(lists(methods, "none"), "offer", "none");
  if (takesDocuments) should(lists(methods, "private_key_jwt"), "offer", "private_key_jwt, for ChatGPT");
  should(lists(server.scopes_supported, "offline_access"), "offer", "offline_access");
  should(server.authorization_response_iss_parameter_supported, "offer", "iss (RFC 9207)");
  must(!emptyMembers(server), "no empty members", emptyMembers(server));
}

/** Registers as Claude does, if the server lets clients register, and signs in up to the password. */
async function checkSignIn(checkup: Checkup) {
  const { told, ask, must } = checkup;
  if (told.server.registration_endpoint) {
    const client = { client_name: "setup check", redirect_uris: [CLAUDE_REDIRECT], token_endpoint_auth_method: "none" };
    const asked = { ...client, grant_types: ["authorization_code", "refresh_token"] };
    const { ok, status, json = {}, text } = await ask(told.server.registration_endpoint, AS_JSON, asked);
    const isWhole = isString(json.client_id) && lists(json.redirect_uris, CLAUDE_REDIRECT);
    if (!must(ok && isWhole, "registration", `${status} ${text}`)) return;
    must(!emptyMembers(json), "no empty members", emptyMembers(json));
    told.client_id = json.client_id;
  }
  await checkConsent(checkup);
  await checkRefusals(checkup);
}

function authorizationUrl({ resource, told }: Checkup, change = ""): URL {
  const target = new URL(told.server.authorization_endpoint);
  const code_challenge = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"; // RFC 7636 appendix B; nothing is ever redeemed
  const request = { response_type: "code", client_id: told.client_id, redirect_uri: CLAUDE_REDIRECT, resource };
  const fixed = { state: "setup-check", code_challenge, code_challenge_method: "S256" };
  const all = { ...request, ...fixed, ...Object.fromEntries(new URLSearchParams(change)) };
  for (const [name, value] of Object.entries(all)) if (value) target.searchParams.set(name, value);
  return target;
}

/** Looks at the page that the owner sees, and presses its button to deny, which needs no password. */
async function checkConsent(checkup: Checkup) {
  const { told: { server }, ask, need, must, should } = checkup;
  const page = authorizationUrl(checkup);
  const { status, headers, location, text } = await ask(page, AS_BROWSER);
  need(!/[?&]code=/.test(location), "owner");
  const isLogin = location && !location.startsWith(CLAUDE_REDIRECT); // the owner signs in on another page
  const title = text.slice(0, MAX_PAGE_LENGTH).match(/<title>([^<]*)/)?.[1] ?? "";
  if (!must(isLogin || status === 200, "consent page", `${status} ${location || title}`) || isLogin) return;
  const policy = headers.get("Content-Security-Policy") ?? "";
  must(!policy.includes("form-action"), "no form-action");
  should(policy.includes("frame-ancestors") || headers.has("X-Frame-Options"), "no frames");
  const { action, body } = readDenial(text);
  if (!body) return; // the rest would need the owner
  // A form for elsewhere is not sent: the page could choose any address, with any fields.
  const target = webUrl(action || page.href, page);
  if (!should(target?.origin === page.origin, "own URLs", action)) return;
  const Cookie = headers.getSetCookie().map((cookie) => cookie.split(";")[0]).join("; ");
  const denial = await ask(target!, { ...AS_BROWSER, Cookie, Origin: page.origin }, body);
  const query = new URLSearchParams(denial.location.split("?")[1]);
  const hasIss = !server.authorization_response_iss_parameter_supported || query.get("iss") === server.issuer;
  const isTold = query.get("error") === "access_denied" && query.get("state") === "setup-check" && hasIss;
  const isBack = [302, 303].includes(denial.status) && denial.location.startsWith(CLAUDE_REDIRECT);
  must(isBack && isTold, "denial", `${denial.status} ${denial.location}`);
}

const MAX_PAGE_LENGTH = 64 * 1024;
/** Each part is bounded, or shares no character with the next, so that the time grows with the length alone. */
const ATTRIBUTE = /([\w-]{1,40})\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))/g;

function readAttributes(tag: string): Record<string, string> {
  const attributes: Record<string, string> = {};
  for (const [, name = "", ...values] of tag.matchAll(ATTRIBUTE)) {
    attributes[name.toLowerCase()] ??= values.join("").replaceAll("&quot;", '"').replaceAll("&amp;", "&");
  }
  return attributes;
}

/** Returns where the form with a button to deny goes, and what a browser posts at a press of that button. */
function readDenial(page: string): { action?: string; body?: URLSearchParams } {
  for (const form of page.slice(0, MAX_PAGE_LENGTH).split(/<form\b/i).slice(1)) {
    const [{ action = "", method } = {}, ...tags] = form.split(/<\/form/i)[0]!.split("<").map(readAttributes);
    const button = tags.find(({ name, value }) => name && /deny|denied|cancel|reject/i.test(value || name));
    if (!button || method?.toLowerCase() !== "post") continue;
    const fields = tags.filter((tag) => tag === button || tag.type?.toLowerCase() === "hidden");
    const body = new URLSearchParams(); // a list of pairs is not known to Bun's types
    for (const { name = "", value = "" } of fields) body.append(name, value);
    return { action, body };
  }
  return {};
}

async function checkRefusals(checkup: Checkup) {
  const { told: { server, client_id }, ask, must } = checkup;
  const attempts: [change: string, accepted: RegExp][] = [
    ["code_challenge=&code_challenge_method=", /[?&]code=/],
    ["code_challenge_method=plain", /[?&]code=/],
    ["redirect_uri=https://evil.example/", /^https:\/\/evil\.example/],
    ["client_id=nobody", /^https:\/\/claude\.ai/],
  ];
  for (const [change, accepted] of attempts) {
    const { location } = await ask(authorizationUrl(checkup, change), AS_BROWSER);
    must(!accepted.test(location), "refusal", change);
  }
  const body = new URLSearchParams({ grant_type: "refresh_token", refresh_token: "made-up", client_id });
  const { status, type, json } = await ask(server.token_endpoint, {}, body);
  must(status === 400 && json?.error === "invalid_grant", "dead token", json?.error ?? `${status} ${type}`);
}

async function checkCors({ url, told, ask, should }: Checkup) {
  const headers = { Origin: "https://inspector.example", "Access-Control-Request-Method": "POST" };
  for (const [name, place] of [["MCP", url], ["token", told.server.token_endpoint]]) {
    const answer = await ask(place, headers, undefined, "OPTIONS");
    const allowed = answer.headers.get("Access-Control-Allow-Origin") ?? "";
    should(answer.ok && ["*", headers.Origin].includes(allowed), "CORS", name);
  }
}

const HELP = `Asks an MCP server what Claude will ask, and says what to repair. It needs no password.

Usage: mod.ts [options] https://your-domain.com/mcp

  --token pat_…   also call initialize and tools/list (or set MCP_TOKEN)
  -v, --verbose   show the checks that passed, too
  --json          print { url, verdict, findings: [{ heading, result, what, fix, withPersonalAuth }], next }

Exit status: 0 clients can connect; 1 some clients will fail; 2 no answer, or wrong arguments.`;

/** Runs `deno run -A mod.ts https://your-domain.com/mcp`, and returns the exit status. */
async function setupCheckCommand(): Promise<number> {
  const flag = { type: "boolean" };
  const flags = { json: flag, verbose: { ...flag, short: "v" }, help: { ...flag, short: "h" } };
  const options = { token: { type: "string" }, ...flags };
  const { values, positionals } = nodeModule("node:util").parseArgs({ options, allowPositionals: true });
  const { env, stderr } = nodeModule("node:process");
  const { token = env.MCP_TOKEN, json, verbose, help } = values;
  const onProgress = (what: string) => stderr.isTTY && stderr.write(`\r\x1b[K${what}`);
  const report = help ? undefined : await checkSetup(positionals[0], { token, onProgress });
  onProgress("");
  console.log(!report ? HELP : json ? JSON.stringify(report, null, 2) : reportText(report, verbose));
  return { ready: 0, broken: 1, unreachable: 2 }[report?.verdict ?? "ready"];
}

/** Formats a report, with failures last: nobody reads what has scrolled away. */
function reportText({ url, findings, next }: SetupReport, verbose: boolean): string {
  const lines = [`Setup of ${url}`, ""];
  for (const [heading] of STAGES) {
    const here = findings.filter((finding) => finding.heading === heading);
    const passed = here.filter(({ result }) => result === "ok").map(({ what }) => what);
    const mark = here.some(({ result }) => result === "failed") ? "✗" : passed.length < here.length ? "!" : "✓";
    const row = `${heading.padEnd(12)} ${passed.length} of ${here.length} passed`;
    lines.push(here.length > 0 ? `${mark} ${row}` : `- ${heading.padEnd(12)} not asked yet`);
    if (verbose && passed.length > 0) lines.push(`  passed: ${[...new Set(passed)].join(", ")}`);
  }
  for (const [kind, mark] of [["warning", "!"], ["failed", "✗"]]) {
    for (const { what, fix, withPersonalAuth } of findings.filter(({ result }) => result === kind)) {
      const own = withPersonalAuth ? `    with personalAuth(): ${withPersonalAuth}\n    another server: ` : "    ";
      lines.push("", `${mark} ${what}`, own + fix);
    }
  }
  return [...lines, "", ...next].join("\n");
}

/** Only where this very file is the program: bundled into another one, it is nobody's command. */
if ((import.meta as { main?: boolean }).main && /\/mod\.[jt]s$/.test(import.meta.url)) {
  const fail = ({ message }: Error) => {
    console.error(`${message}\nFor help: mod.ts --help`);
    return 2;
  };
  void setupCheckCommand().catch(fail).then((status) => nodeModule("node:process").exitCode = status);
}
