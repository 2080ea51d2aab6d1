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
  /** The public URL, and issuer (RFC 8414 §2), without a slash at the end: `https`, or `http` on loopback. */
  baseUrl: string;
  /** The owner's password. Default: one is generated, and printed until it is used. `false`: **anybody gets in**. */
  password?: string | false | undefined;
  /**
   * Where apps that may ask are sent back to: `example.com` (https), `*.example.com` (its subdomains), `localhost` (any
   * loopback address and port), `scheme://host` (a private-use scheme). `null`: anywhere. Default: claude.ai,
   * claude.com, localhost and Claude Desktop's `claude://claude.ai`.
   */
  allowedRedirectDomains?: readonly string[] | null;
  /** Lifetime of an access token, in seconds. Default: 30 days. */
  accessTokenTtl?: number;
  /** Lifetime of a connection after its last refresh, in seconds. Default: 365 days. */
  refreshTokenTtl?: number;
  /** Where state is kept. Default: `fileStore(".oauth-state")`. */
  store?: Store;
  /** `false`: no dynamic registration, only clients with a metadata document and those of `clients`. */
  registration?: boolean;
  /** The path of the MCP endpoint below `baseUrl`; together they are the resource identifier. Default: `/mcp`. */
  mcpPath?: string;
  /** The scopes on offer: names, or an object from name to description. Default: `mcp`, every tool. */
  scopes?: string[] | Record<string, string | ScopeOption>;
  /** Clients registered by hand, for apps into which a person types an id and a secret. */
  clients?: PreregisteredClient[];
  /** Replaces the password: `true` if the owner sent the request. A `Response` replaces the page. */
  authenticateOwner?: (c: Context) => boolean | Response | Promise<boolean | Response>;
  /**
   * Fetches a client's metadata document or keys where the built-in function, which needs `node:https`, cannot. It
   * must connect to public addresses only, follow no redirects, and end when the signal is aborted.
   */
  fetchClientMetadata?: (url: string, signal: AbortSignal) => Promise<Response>;
  /** How the owner's pages look. */
  pages?: PageOptions;
  /** Receives every event. Default: one line each on the console. */
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

/** A client that the owner approved, or a personal access token; times in seconds since the epoch. */
export type Connection = {
  id: string;
  kind: "client" | "token";
  clientId: string;
  /** The name the client gives itself, or the owner's name for the token. */
  clientName: string;
  /** The owner's own name for it. */
  label?: string;
  /**
   * `pending`: its token is not fetched yet. `unused`: it never called. `active`: it calls. `silent`: its access token
   * has run out, or it was refused, and it did not come back.
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
   * `expiresIn` is in seconds; `id` is that of its {@linkcode Connection}.
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

/** Entries of `allowedRedirectDomains`: `[...redirects.claude, ...redirects.cursor]`. */
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

/** For every option there is: what a good value is, and what to say of a bad one. */
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

/** Names the option of whose pairs of letters an unknown name holds the most, if it holds half of them. */
function didYouMean(name: string): string {
  const wanted = name.toLowerCase();
  const likeness = (option: string) => {
    const letters = [...option.toLowerCase()];
    return letters.filter((letter, i) => wanted.includes(letter + (letters[i + 1] ?? ""))).length / letters.length;
  };
  const [nearest = ""] = Object.keys(OPTIONS).sort((a, b) => likeness(b) - likeness(a));
  return likeness(nearest) >= 0.5 ? `; did you mean ${nearest}?` : "";
}

function readBaseUrl(baseUrl: string): URL {
  const url = new URL(baseUrl);
  const { protocol, hostname, host, origin, pathname } = url;
  const isPrivate = !hostname.includes(".") || /\.(local|lan|home|internal)$/.test(hostname) ||
    /^(10|192\.168|172\.(1[6-9]|2\d|3[01]))\./.test(hostname);
  const advice = isPrivate ? "put a tunnel or a proxy with https in front of it" : `write "https://${host}"`;
  const isSafe = protocol === "https:" || (protocol === "http:" && isLoopback(hostname));
  assert(isSafe, `baseUrl must be https, or http on localhost, because tokens would be sent unencrypted; ${advice}`);
  // Clients compare the issuer byte for byte (RFC 8414 §3.3), so a URL counts in one form only.
  const canonical = origin + pathname.replace(/\/+$/, "");
  assert(baseUrl === canonical, `baseUrl is ${quote(baseUrl)}; write it exactly like this: "${canonical}"`);
  const fault = `the path of baseUrl may contain letters, digits and ._~- only, not ${quote(pathname)}`;
  assert(pathname === "/" || PATH.test(pathname), fault);
  return url;
}

/** RFC 6749 §3.3. */
const SCOPE = /^[\x21\x23-\x5b\x5d-\x7e]+$/;

/** The scope by which clients ask for a refresh token. */
const OFFLINE_ACCESS = "offline_access";

function readScopes(scopes: string[] | Record<string, string | ScopeOption>) {
  const named: [string, string | ScopeOption][] = Array.isArray(scopes)
    ? scopes.map((name) => [name, {}])
    : Object.entries(scopes);
  const options = new Map(named.map(([name, it]) => [name, isString(it) ? { description: it } : it]));
  const all = [...options.keys()];
  const byDefault = all.filter((name) => !options.get(name)?.onRequest);
  assert(byDefault.length > 0, `scopes must name a scope that is granted by default, such as ["mcp"]`);
  for (const [name, { description = "", includes = [] }] of options) {
    const check = (good: unknown, fault: string) => assert(good, `scopes: ${quote(name)} ${fault}`);
    check(SCOPE.test(name), "must be printable ASCII without spaces and quotes");
    check(name !== OFFLINE_ACCESS && name !== "openid", "cannot be offered");
    check(isString(description), "needs a string as its description");
    const unknown = includes.find((scope) => !options.has(scope));
    check(unknown === undefined, `includes ${quote(unknown)}, which is not on offer`);
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
        `"example.com", "*.example.com", "localhost" (any loopback address and port) or "scheme://host"`,
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

type Server = ReturnType<typeof createServer>;
type Handler = (server: Server, c: Context) => Response | Promise<Response>;

/** Programs post to these. None reads a cookie. */
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
 * Makes an OAuth 2.1 authorization server and the guard of one person's MCP server, as a Hono app. Mount it at "/" and
 * put its guard before your handler: `app.route("/", auth); app.all("/mcp", auth.guard, handler)`.
 *
 * @throws {TypeError} if an option is wrong; the message says what to write instead.
 * @throws {Error} if the state folder cannot be used; the message says which file and what to do.
 */
export function personalAuth(options: PersonalAuthOptions): PersonalAuth {
  const server = createServer(options);
  const guard = createGuard(server);
  const { basePath, mcpPath } = server;
  const app = new Hono<AuthEnv>();
  const add = (path: string, ...handlers: MiddlewareHandler<AuthEnv>[]) => {
    for (const place of [path, `${path}/`]) app.use(place, ...handlers);
  };

  for (const [path, document] of discoveryDocuments(server)) {
    const GET: Handler = (_, c) => c.json(document, 200, { "Cache-Control": "public, max-age=300" });
    add(path, CORS, endpoint(server, { GET }));
  }
  // Answer 404 explicitly: OpenID clients fail on half a document, and on an app's catch-all page.
  const openid = "/.well-known/openid-configuration";
  for (const path of new Set([openid + basePath, openid + mcpPath, basePath + openid, mcpPath + openid])) {
    app.all(path, (c) => c.json({ error: "not_found" }, 404, FIXED_HEADERS));
  }
  for (const [path, POST] of Object.entries(ENDPOINTS)) {
    if (path !== "/register" || server.registration) add(basePath + path, withCors(endpoint(server, { POST })));
  }
  for (const [path, [GET, change]] of Object.entries(OWNER_PAGES)) {
    const POST: Handler = (server, c) => assertOwnSite(server, c) ?? change(server, c);
    add(basePath + path, endpoint(server, { GET, POST }, errorPage));
  }
  for (const path of new Set([basePath || "/", `${basePath}/`])) app.get(path, homePage(server));

  // A second line behind `auth.guard`, also without the path of baseUrl, for a handler at the wrong path.
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
function createServer(options: PersonalAuthOptions) {
  const settings = readOptions(options);
  const { issuer, password, authenticateOwner, onEvent } = settings;
  const emit: Emit = (type, message, more) => recordEvent(events, onEvent, { type, message, ...more });
  const store = guardStore(options.store ?? fileStore(".oauth-state"), emit);
  const events: EventLog = { store, key: `events/${issuer}`, waiting: {}, writing: Promise.resolve() };
  const longMac = serverMac(store, issuer, emit);
  const passwordReady = once(() => ensurePassword({ ...settings, store }));
  // At start, to notice that another server uses the store. A failure is reported, and tried again when needed.
  longMac("start").catch(() => {});
  if (password === false) {
    emit("owner_unprotected", "password is false: anybody who knows the address can connect");
  } else if (!authenticateOwner) {
    const isShort = password !== undefined && password.length < 12;
    if (isShort) emit("password_weak", "the owner's password is short: take 12 characters or more");
    passwordReady().catch(() => {}); // also at start, to print a generated password
  }
  const documents: DocumentCache = { copies: new Map(), underWay: new Map(), asked: new Map(), own: new Set() };
  return {
    ...settings,
    ...{ emit, events, documents, passwordReady, longMac },
    store, // its failures are reported, and answered with 503
    mac: (async (...parts) => (await longMac(...parts)).slice(0, 64)) as Mac,
    registered: new Map<string, Client>(), // by a client_id whose MAC was checked
    verified: new Map<string, VerifiedToken>(), // by Authorization header
    passed: Symbol("passed"), // where a Hono context holds what a guard has found, for the next guard
    attempts: new Map<string, Attempt>(), // not approved yet, by client_id, the latest last
    found: { at: undefined as number | undefined }, // the last call without a token
  };
}

// --- Discovery ---

/** Nobody keeps an answer, and no browser guesses that it is a page. */
const FIXED_HEADERS = { "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff" };

/** Answers by the handler of a method, which may end early by throwing its answer, or an error. */
function endpoint(
  server: Server,
  handlers: Record<string, Handler>,
  onError = errorResponse,
): MiddlewareHandler<AuthEnv> {
  const methods = Object.keys(handlers).join(", ").replace("GET", "GET, HEAD");
  return async (c) => {
    const method = c.req.method === "HEAD" ? "GET" : c.req.method;
    for (const [name, value] of Object.entries(FIXED_HEADERS)) c.header(name, value);
    try {
      if (Object.hasOwn(handlers, method)) return await handlers[method]!(server, c);
      throw invalidRequest(`The method must be one of ${methods}`, { status: 405, headers: { Allow: methods } });
    } catch (thrown) {
      return thrown instanceof Response ? thrown : await onError(server, c, thrown);
    }
  };
}

/** Lets apps in a web page read an answer. `*` is safe: nothing behind it looks at a cookie. */
const CORS = cors({ origin: "*", exposeHeaders: ["WWW-Authenticate", "Retry-After", "Mcp-Session-Id"] });

/** Adds CORS for browsers, which send Origin. A preflight carries no token, so it is answered first. */
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
 * request, whose Host can be forged, and which claims to be http behind a proxy that ends TLS.
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
    scopes_supported: scopes.byDefault, // offline_access concerns only the authorization server
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
  const refusals = asked.map((uri) => redirectRefusal(server.allowed, uri));
  const redirect_uris = asked.filter((_, i) => !refusals[i]); // a part: Cursor sends mixed lists
  const reasons = refusals.filter(isString).join("; ");
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
  return c.json(answer, 201);
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

/** Returns a name without what could make the owner's page look like something else. */
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
  // With registration off, a registered client keeps its connections and gets no new one.
  if (!server.registration && !isConnected) return undefined;
  const recent = server.registered.get(id);
  if (recent) return recent;
  const [payload = ""] = id.split(".");
  if (!equal(id, await signedId(server, payload))) return undefined;
  const { n: name, r: redirect_uris, s, o } = JSON.parse(decodeBase64(payload)!);
  const secret = s && await clientSecret(server, id);
  const client: Client = { id, name, redirect_uris, secret, refreshes: !o, source: "registered" };
  remember(server.registered, id, client);
  return client;
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
    // RFC 6749 §2.3.1 form-encodes both halves; many clients do not. Both ways are taken.
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

/** Authenticates a client with a document: by an assertion, or by nothing where its grants allow that. */
async function authenticatePublished(server: Server, id: string, form: URLSearchParams) {
  const ids = ["code", "refresh_token", "token"].flatMap((name) => grantIdOf(form.get(name) ?? "") ?? []);
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
      // Only for a connection that there is, or strangers could fill the store.
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
    // Others go on: to ignore an assertion is no weaker than a request without one.
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

/** What each `alg` means, with the one type of key it takes: no public key becomes the secret of an HMAC. */
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
    // Not signed for another purpose, such as an ID token (RFC 8725 §3.11).
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

/** Tells whether a key may be tried: one of any size could cost much computing. */
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

/** Spends an assertion: whoever reads it on its way can use it nowhere on this store. */
async function spendAssertion(server: Server, id: string, jti: string, exp: number) {
  const user = random(16);
  const key = `assertion/${await server.mac("assertion", id, jti)}`;
  const first = await server.store.update(key, (current) => current ?? user, { expiresAt: exp + MAX_CLOCK_SKEW });
  assertClient(first === user, "The client_assertion was used before");
}

// --- Client ID Metadata Documents ---

const MAX_DOCUMENT_BYTES = 16 * 1024;
const MAX_REMEMBERED = 100; // of each kind that strangers can fill
const MAX_COPY_AGE = 30 * DAY;
const MAX_DOWNLOADS = 8;
const MAX_DOWNLOADS_PER_HOST = 2;
const MAX_DOWNLOADS_PER_MINUTE = 60;

/** In memory only, and bounded, because strangers can fill it. */
interface DocumentCache {
  copies: Map<string, { id: string; body: unknown; at: number; fresh: number }>; // by client and URL
  underWay: Map<string, Download>; // by URL, the oldest first
  asked: Map<string, { times: number; since: number }>; // by host, or by connected client
  own: Set<string>; // clients with a connection: strangers push out nothing of theirs
}

interface Download {
  host: string;
  since: number;
  controller: AbortController;
  over: ReturnType<typeof fetchJson>; // when it has really ended
  answer: Download["over"];
}

/**
 * Tells whether a client_id is the address of a document.
 * @see https://datatracker.ietf.org/doc/draft-ietf-oauth-client-id-metadata-document
 */
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
    // A document that was withdrawn or is wrong gets no stand-in: its author may mean it.
    const known = isTemporary(cause) && wellKnownClient(id);
    if (known) return known;
    const isOurs = cause instanceof OAuthError;
    if (isOurs && cause.status === 503) throw cause;
    const description = `The app's metadata at ${id} cannot be used: ${isOurs ? cause.message : "it cannot be read"}`;
    // Not invalid_client: the client would register again, with the same address.
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

/** Returns what `parse` makes of a document as it was after `since`; during an outage, of an old copy. */
async function fetchCached<T>(server: Server, id: string, url: string, parse: (body: unknown) => T, since = 0) {
  const { copies, own } = server.documents;
  const key = `${id} ${url}`; // each client has its own, so that nobody else replaces or removes it
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
    if (!isTemporary(error)) copies.delete(key); // errors are not cached, so that a repair works at once
    else if (copy && seconds() < copy.at + MAX_COPY_AGE) return parse(copy.body);
    throw error;
  }
}

class Unusable extends Error {} // by its own fault; any other failure is an outage

const isTemporary = (error: unknown) =>
  error instanceof OAuthError
    ? error.status === 503
    : ![Unusable, TooLarge, SyntaxError].some((it) => error instanceof it);

const tryLater = (description: string) =>
  new OAuthError("temporarily_unavailable", description, { status: 503, headers: { "Retry-After": "5" } });

/** Sets an entry of a map that forgets its oldest ones, and kept ones last. */
function remember<T>(map: Map<string, T>, key: string, value: T, isKept = (_: T) => false): void {
  map.delete(key); // moves it to the end
  map.set(key, value);
  if (map.size <= MAX_REMEMBERED) return;
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

/** Fetches one document. Time and size are counted on the stream, whatever its headers promise. */
async function fetchJson({ fetchClientMetadata }: Server, url: string, signal: AbortSignal) {
  const { status, body, headers } = await fetchClientMetadata(url, signal);
  const text = status === 200 ? await inTime(readLimited(body, MAX_DOCUMENT_BYTES), signal) : await body?.cancel();
  // A firewall's refusal, or too many requests, say nothing about the document.
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
  const literal = hostname.replace(/^\[|\]$/g, ""); // needs no lookup
  const found: string[] = isIP(literal) ? [literal] : await resolveName(hostname, signal);
  const inside = found.find((address) => !isPublicAddress(address));
  if (inside !== undefined) throw new Unusable(`${hostname} resolves to ${inside}, which is not a public address`);
  const addresses = found.map((address) => ({ address, family: isIP(address) }));
  const [first] = addresses;
  if (!first) throw new Error(`${hostname} has no address`);
  // Only to what was checked: a name that changes its answer in between gains nothing.
  const lookup = (_name: string, { all }: { all?: boolean }, done: (...found: unknown[]) => void) =>
    all ? done(null, addresses) : done(null, first.address, first.family);
  // A proxy of the environment would look the name up again, and connect to what it finds.
  const agent = new https.Agent({ proxyEnv: {} });
  const headers = { Accept: "application/json", "User-Agent": "personal-auth" };
  // deno-lint-ignore no-explicit-any
  const message: any = await new Promise((resolve, reject) => {
    https.get(url, { agent, lookup, signal, headers }, resolve).on("error", reject);
  });
  const { statusCode: status } = message;
  const body = status === 200 ? nodeModule("node:stream").Readable.toWeb(message) : null;
  if (!body) message.destroy(); // or the socket stays open as long as the other side likes
  return new Response(body, { status, headers: { "Cache-Control": message.headers["cache-control"] ?? "" } });
}

/** Resolves a name by queries that can be ended: a silent name server would block getaddrinfo()'s threads. */
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

/** Tells whether an address may be connected to on a stranger's word. Of IPv6 only 2000::/3 may. */
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
 * Returns why a redirect URI is refused. The list keeps other apps off the owner's page. It does not keep strangers
 * out: all Claude accounts use one redirect URI.
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

/** Returns the entry of `allowedRedirectDomains` that lets a URL in. */
const allowEntry = (url: URL) => isLocal(url) ? "localhost" : hostOf(url);

/** What no list can allow: ways to make a URI look like another one, or run as script. */
const UNSAFE: [pattern: RegExp, fault: string][] = [
  [/^$|[^\x21-\x7e]/, "must be printable ASCII without spaces"],
  [/\\/, "must not hold a backslash"], // https://claude.ai\@evil.example
  [/#/, "must not have a fragment"], // RFC 6749 §3.1.2
  // A browser acts on these itself: the code would be script, or a file, or readable on the way.
  [
    /^(javascript|data|file|blob|filesystem|vbscript|about|view-source|intent|ftp|wss?):/i,
    "has a scheme that browsers run or open themselves",
  ],
  [/^(?![a-z][a-z0-9+.-]*:)/i, "is not an absolute URI"],
  [/^[^/?]*\/\/[^/?]*@/, "must not hold a user name"], // https://claude.ai@evil.example
  [/^https?:(?!\/\/[^/])/i, "must name its host after //"],
];

function unsafeRedirect(uri: unknown): string | undefined {
  if (!isString(uri) || uri.length > MAX_URI_LENGTH) return `must be a string of up to ${MAX_URI_LENGTH} characters`;
  const fault = UNSAFE.find(([pattern]) => pattern.test(uri))?.[1];
  if (fault) return fault;
  const url = URL.parse(uri);
  if (!url) return "is not an absolute URI";
  if (url.protocol === "http:" && !isLoopback(url.hostname)) return "must be https, or http on localhost";
  // A client that takes the first of two equal parameters would read the one in its redirect URI.
  const taken = ["code", "state", "iss", "error"].find((name) => url.searchParams.has(name));
  return taken && `must not carry the parameter ${taken}`;
}

const isLoopback = (hostname: string) => ["localhost", "127.0.0.1", "[::1]"].includes(hostname);

/**
 * Compares exactly (OAuth 2.1 §4.1.1), but lets a native app listen on any port of loopback (RFC 8252 §7.3). Loopback's
 * three names stay different: whoever holds one need not hold the others.
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

/** Carries out the owner's decision. The form holds the whole request, which is checked again. */
async function decideConsent(server: Server, c: Context) {
  const form = Object.fromEntries(await readForm(c));
  const { request: encoded = "", csrf = "", decision = "", password = "" } = form;
  const session = await readSession(server, c);
  if (encoded === "" || !session.known) return expiredPage(server, c);
  const request = await readRequest(server, c, encoded);
  const { client, redirect_uri } = request;
  const elsewhere = decision === "approve_elsewhere";
  // Only a loopback address is ever shown: any other app is reached from here, and nobody can be talked into sending
  // its code on.
  if (elsewhere && !isLocal(new URL(redirect_uri))) throw invalidRequest("This app can be reached from this browser");
  const isDecided = elsewhere || decision === "approve" || decision === "deny";
  if (!isDecided || !await checkCsrf(server, session.browser, encoded, csrf)) {
    // The first of two clicks may have signed the owner in and replaced the browser's secret, which the form is bound
    // to. So the session decides: only the owner is told what came of that click.
    const earlier = session.isOwner ? await approve(server, csrf, request, true) : undefined;
    if (earlier) return approvedPage(server, c, request, earlier.code, elsewhere);
    // It was open too long, or in a second tab while the first signed in: ask again, and lose nothing.
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

/** Checks a request. A fault is answered to the client, or on a page while the target is not trusted. */
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

/** Answers with the code on a page: for another computer, or because the form was sent before. */
function approvedPage(server: Server, c: Context, request: AuthorizationRequest, code = "", elsewhere: boolean) {
  const uri = code && answerUri(server, request, { code });
  return uri && elsewhere ? elsewherePage(server, c, uri) : answeredPage(server, c, request.client.name, uri);
}

/**
 * Returns the redirect URI with the answer and `iss`, which tells a client of several servers who answered.
 * @see https://www.rfc-editor.org/rfc/rfc9207#section-2
 */
function answerUri({ issuer }: Server, { redirect_uri, state }: Target, answer: Record<string, string>): string {
  const params = new URLSearchParams({ ...answer, ...(state !== null && { state }), iss: issuer });
  // Appended, to keep the URI byte for byte as it was registered. %20, because some clients show a + as it is.
  return `${redirect_uri}${redirect_uri.includes("?") ? "&" : "?"}${params.toString().replaceAll("+", "%20")}`;
}

/** Sends the browser back to the client; to a private-use scheme by way of a page. */
function redirectBack(server: Server, c: Context, target: Target, answer: Record<string, string>) {
  const uri = answerUri(server, target, answer);
  if (!/^https?:/i.test(uri)) return openAppPage(server, c, uri, target.client.name, "code" in answer);
  return c.redirect(uri, 302); // never 307: it would post the owner's password on to the client
}

const invalidRequest = (description: string, details?: OAuthErrorDetails) =>
  new OAuthError("invalid_request", description, details);

/** Finds client and redirect URI. Before that, nothing may be redirected (OAuth 2.1 §4.1.2.1). */
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
  // Again, although registration did: the owner may have shortened the list, and a signed client_id stays valid.
  const isOwn = source === "preregistered";
  const refused = isOwn ? unsafeRedirect(redirect_uri) : redirectRefusal(server.allowed, redirect_uri);
  if (refused) throw invalidRequest(refused, event);
  return { client, redirect_uri, state: params.get("state") };
}

/** Reads the rest. What is wrong with it goes back to the client (OAuth 2.1 §4.1.1, RFC 7636 §4.3). */
function authorizationRequest(server: Server, params: URLSearchParams) {
  for (const name of ["request", "request_uri"]) {
    if (params.has(name)) throw new OAuthError(`${name}_not_supported`, "Request objects are not supported");
  }
  if (required(params, "response_type") !== "code") {
    throw new OAuthError("unsupported_response_type", "response_type must be code");
  }
  if ((params.get("response_mode") ?? "query") !== "query") throw invalidRequest("response_mode must be query");
  // Without PKCE a stolen code is a stolen connection; "plain" sends the verifier along the same way.
  const code_challenge = params.get("code_challenge");
  if (code_challenge === null) throw invalidRequest("code_challenge is missing: PKCE is required");
  if (params.get("code_challenge_method") !== "S256") throw invalidRequest("code_challenge_method must be S256");
  const isDigest = /^[A-Za-z0-9_-]{43}$/.test(code_challenge);
  if (!isDigest) throw invalidRequest("code_challenge must be a base64url SHA-256 digest");
  checkResource(server, params);
  return { code_challenge, scopes: grantedScopes(params.get("scope"), server.scopes) };
}

/** Answers a request without a trusted target: on a page, or in JSON for a program that asks for it. */
function faultPage(server: Server, c: Context, error: unknown) {
  if (!(error instanceof OAuthError) || error.status >= 500) throw error;
  const { code, message, details: { event, reason, clientName, cause } } = error;
  if (event) server.emit(event, reason ?? message, defined({ clientName, cause }));
  const accept = c.req.header("Accept") ?? "";
  // mcp-remote asks for JSON before it opens the browser, and registers again at invalid_client.
  if (accept.includes("application/json") && !accept.includes("text/html")) return errorResponse(server, c, error);
  const [title = "", advice = ""] = (FAULTS[event ?? code] ?? FAULTS.invalid_request!).split(" → ");
  return messagePage(server, c, 400, title, `${message}.`, advice);
}

/** Title → advice, by event or error code. */
const FAULTS: Record<string, string> = {
  invalid_client: "This server does not know the app → Remove this server from the app and add it again.",
  client_document_refused: "This app cannot be checked → This server must be able to read its address. Try later.",
  redirect_refused: "This app is not allowed here → Nothing was shared. If you did not start this, close the page.",
  invalid_request: "That request cannot be answered → Nothing was shared. If you started this, connect again.",
};

/**
 * Requires that every `resource` is this one. Clients differ in slashes, case and default ports, and some send the base
 * URL; the audience is always stored and checked as the canonical URL.
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
  // Not /\/+$/, which takes quadratic time on a stranger's "////…x" and would stop the server.
  let end = url.pathname.length;
  while (url.pathname[end - 1] === "/") end--;
  return url.origin + url.pathname.slice(0, end) + url.search;
}

/**
 * Returns the scopes that are asked for and on offer, or the default if there are none: clients ask for scopes that
 * they know from other servers.
 * @see https://www.rfc-editor.org/rfc/rfc6749#section-3.3
 */
function grantedScopes(asked: string | null | undefined, { all, byDefault }: { all: string[]; byDefault: string[] }) {
  const wanted = new Set(asked?.split(/\s/));
  const granted = all.filter((scope) => wanted.has(scope));
  return [...(granted.length > 0 ? granted : byDefault), ...(wanted.has(OFFLINE_ACCESS) ? [OFFLINE_ACCESS] : [])];
}

/** Returns the scopes of a refresh: what it asks for of those granted, and never more (RFC 6749 §6). */
function narrowedScopes(asked: string | null, granted: string[]): string[] {
  if (asked === null) return granted;
  const all = granted.filter((scope) => scope !== OFFLINE_ACCESS);
  return grantedScopes(asked, { all, byDefault: all }).filter((scope) => granted.includes(scope));
}

// --- Token and revocation endpoints ---

function required(form: URLSearchParams, name: string) {
  const value = form.get(name);
  if (value === null) throw invalidRequest(`${name} is missing`);
  return value;
}

/** Issues tokens. @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-3.2 */
async function tokenEndpoint(server: Server, c: Context) {
  const arrived = seconds();
  const form = await readForm(c);
  const client = await authenticateClient(server, c, form);
  try {
    const grant_type = required(form, "grant_type");
    checkResource(server, form);
    if (grant_type === "authorization_code") return c.json(await redeem(server, form, client, arrived));
    if (grant_type === "refresh_token") return c.json(await refresh(server, form, client));
    throw new OAuthError("unsupported_grant_type", "grant_type must be authorization_code or refresh_token");
  } catch (error) {
    const id = grantIdOf(form.get("code") ?? form.get("refresh_token") ?? "");
    await noteRefusal(server, error, id, client);
    throw error;
  }
}

/**
 * Ends the connection of a token, and answers 200 for an unknown one too. The client stays registered: Claude Code
 * signs out and comes back with the same client_id.
 * @see https://www.rfc-editor.org/rfc/rfc7009#section-2.1
 */
async function revocationEndpoint(server: Server, c: Context) {
  const form = await readForm(c);
  const client = await authenticateClient(server, c, form);
  await revokeToken(server, required(form, "token"), client);
  return c.body(null);
}

/**
 * Describes a token to a resource server elsewhere. Only one that the owner registered with a secret may ask, or
 * anybody could learn whether a token found somewhere is alive.
 * @see https://www.rfc-editor.org/rfc/rfc7662#section-2
 */
async function introspectionEndpoint(server: Server, c: Context) {
  const form = await readForm(c);
  const { source, secret } = await authenticateClient(server, c, form);
  const mayAsk = source === "preregistered" && secret !== undefined;
  if (!mayAsk) throw new OAuthError("unauthorized_client", "Only clients that the owner gave a secret may ask");
  const { issuer: iss, resource: aud } = server;
  try {
    const { clientId: client_id, scopes, expiresAt: exp } = await verifyAccessToken(server, required(form, "token"));
    return c.json({ active: true, client_id, scope: scopes.join(" "), exp, token_type: "Bearer", iss, aud });
  } catch (error) {
    if (error instanceof OAuthError && error.code === "invalid_token") return c.json({ active: false });
    throw error;
  }
}

// --- Grants ---

/**
 * A connection: one record, `grant/<id>`, which all its tokens name. So a check of a token is one read, every change is
 * atomic, and the end of a connection ends all its tokens. Only hashes of secrets are stored.
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

type NewCode = { hash: string; challenge: string; refreshes: boolean };

/** `n`: of the refresh token it came with. `scopes`: which of the grant's, by position, if not all. */
type AccessToken = { hash: string; n: number; scopes?: number[]; expires: number };

interface RefreshState {
  hash: string; // of the current token, RT(n)
  n: number;
  presented: boolean; // RT(n) or its access token was used: RT(n-1) is spent
  rotated: [hash: string, at: number][]; // the latest before RT(n), newest first
  repeated?: number; // the latest n that was issued again after the grace period
}

type Presented = { hash: string; client_id: string; resource: string };
type PresentedCode = Presented & { challenge: string; redirect_uri?: string | undefined; arrived: number };
type Issue = { access: Omit<AccessToken, "n">; refresh: string; expires: number };

/** `grant`: the record to keep, the same object if nothing changed. */
type Transition = { grant: Grant; outcome: "refused" | "issued" | keyof typeof EVENTS; reason?: string };

const EVENTS = {
  code_redeemed: "the app fetched its token",
  code_replayed: "a code was redeemed twice: the connection is ended",
  refresh_token_reused: "a refresh token was used again: the connection is ended",
  refresh_token_repeated: "an old refresh token was used again, long after its rotation",
};
const CODE_TTL = 5 * MINUTE;
const REFRESH_GRACE = 2 * MINUTE; // for clients that refresh on several machines at once
const MAX_ACCESS_TOKENS = 100; // so that the largest record fits into a Deno KV
const MAX_ROTATIONS = 200;

// OAuth's hard rules are pure functions, without HTTP and storage.

/** Makes a record that outlives its form, so that the form is good once. */
function approveGrant(approval: Omit<Grant, "created" | "expires" | "access">, code: NewCode, now: number): Grant {
  const expires = now + UNREDEEMED_KEPT;
  return { ...approval, created: now, expires, code: { ...code, expires: now + CODE_TTL }, access: [] };
}

/** Returns why a code or token of a grant is refused. */
function grantRefusal(grant: Grant, holder: Partial<Presented>, now: number, expires = Infinity) {
  const { resource, client_id = grant.client.id } = holder;
  if (grant.revoked !== undefined) return `the connection was ended ${ago(now - grant.revoked)}`;
  if (grant.client.id !== client_id) return "it was issued to another client";
  // Servers may share a store: each issues tokens for itself alone.
  if (grant.resource !== resource) return `it is for ${quote(grant.resource)}`;
  if (expires <= now) return `it expired ${ago(now - expires)}`;
}

const refused = (grant: Grant, reason = "it was never issued"): Transition => ({ grant, outcome: "refused", reason });

/**
 * Redeems a code once. A wrong attempt costs neither the code nor the connection.
 * @see https://www.rfc-editor.org/rfc/rfc7636#section-4.6
 * @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-4.1.3
 */
function redeemGrant(grant: Grant, request: PresentedCode, issue: Issue, now: number): Transition {
  const { code } = grant;
  const { redirect_uri = grant.redirect_uri } = request;
  const refusal = grantRefusal(grant, request, now);
  if (refusal || code?.hash !== request.hash) return refused(grant, refusal);
  if (code.challenge !== request.challenge) return refused(grant, "code_verifier does not match the code_challenge");
  if (redirect_uri !== grant.redirect_uri) {
    return refused(grant, `redirect_uri ${quote(redirect_uri)} differs from ${quote(grant.redirect_uri)}`);
  }
  if (code.redeemed !== undefined) {
    // The client's own duplicate came before that; later, somebody else holds both.
    if (request.arrived < code.redeemed) return refused(grant, "a duplicate of a request that came at the same time");
    return { grant: revokeGrant(grant, now), outcome: "code_replayed" };
  }
  if (code.expires <= now) return refused(grant, `the code expired ${ago(now - code.expires)}`);
  const { expires } = code.refreshes ? issue : issue.access;
  const redeemed = { ...grant, expires, code: { ...code, redeemed: now }, access: [{ ...issue.access, n: 0 }] };
  const refresh = { hash: issue.refresh, n: 0, presented: false, rotated: [] };
  return { grant: { ...redeemed, ...(code.refreshes && { refresh }) }, outcome: "code_redeemed" };
}

/**
 * Rotates a refresh token that this server made for this grant.
 * @see https://datatracker.ietf.org/doc/html/draft-ietf-oauth-v2-1-13#section-4.3.1
 */
function refreshGrant(grant: Grant, request: Presented, issue: Issue, now: number): Transition {
  const { refresh } = grant;
  const refusal = grantRefusal(grant, request, now, grant.expires);
  if (refusal || !refresh) return refused(grant, refusal);
  if (refresh.hash !== request.hash) return repeatRefresh(grant, refresh, request.hash, issue, now);
  const n = refresh.n + 1;
  const recent = refresh.rotated.filter(([, at]) => now - at <= REFRESH_GRACE).slice(0, MAX_ROTATIONS - 1);
  const rotated: RefreshState["rotated"] = [[request.hash, now], ...recent];
  const next = { ...refresh, hash: issue.refresh, n, presented: false, rotated };
  return { grant: withTokens(grant, issue, next, now), outcome: "issued" };
}

/** Repeats an answer within the grace period, or later if it was lost. Anything else is a second holder. */
function repeatRefresh(grant: Grant, refresh: RefreshState, hash: string, issue: Issue, now: number): Transition {
  const { rotated, n, presented, repeated } = refresh;
  const index = rotated.findIndex(([known]) => known === hash);
  const [, at = -Infinity] = rotated[index] ?? [];
  if (now - at <= REFRESH_GRACE) {
    // Its access token gets new time once half of it is used up.
    const issued = grant.access.find((token) => token.hash === issue.access.hash);
    const lasts = issued && issued.expires - now >= (issue.access.expires - now) / 2;
    return { grant: lasts ? grant : withTokens(grant, issue, refresh, now, n - index), outcome: "issued" };
  }
  // A thief may rotate first and wait, as if an answer had been lost. Two in a row are taken for theft.
  if (index !== 0 || presented || repeated === n - 1) {
    return { grant: revokeGrant(grant, now), outcome: "refresh_token_reused" };
  }
  // The client's other machines get a grace period of their own.
  const late: RefreshState = { ...refresh, rotated: [[hash, now], ...rotated.slice(1)], repeated: n };
  return { grant: withTokens(grant, issue, late, now), outcome: "refresh_token_repeated" };
}

/** Adds an access token issued with RT(n), and drops those that expired. */
function withTokens(grant: Grant, issue: Issue, refresh: RefreshState, now: number, n = refresh.n): Grant {
  const others = grant.access.filter((token) => token.expires > now && token.hash !== issue.access.hash);
  const access = [...others, { ...issue.access, n }].slice(-MAX_ACCESS_TOKENS);
  return { ...grant, access, used: now, expires: issue.expires, refresh };
}

function verifyGrant(grant: Grant, hash: string, resource: string, now: number) {
  // Not in constant time: digests that agree in part tell nothing of the tokens.
  const token = grant.access.find((candidate) => candidate.hash === hash);
  return token && !grantRefusal(grant, { resource }, now, Math.min(token.expires, grant.expires)) ? token : undefined;
}

const scopesOf = (grant: Grant, { scopes }: AccessToken) =>
  scopes ? grant.scopes.filter((_, position) => scopes.includes(position)) : grant.scopes;

/** Returns the grant after a call with an access token, the same object if there is nothing new. */
function presentGrant(grant: Grant, { n }: AccessToken, now: number): Grant {
  const { refresh, called = now, used = 0 } = grant;
  // The client has the latest tokens: from now on, use of the previous refresh token is theft.
  const spent = refresh?.n === n && !refresh.presented && { refresh: { ...refresh, presented: true } };
  // Once a minute, or a busy client would turn every read into a write.
  const isRecent = grant.called !== undefined && Math.abs(now - used) < MINUTE;
  return isRecent && !spent ? grant : { ...grant, called, used: now, ...spent };
}

/** Ends a connection. The record stays, so that its form cannot be posted again. */
function revokeGrant({ code: _code, refresh: _refresh, ...rest }: Grant, now: number): Grant {
  return { ...rest, access: [], revoked: now };
}

const readGrant = ({ store }: Server, id: string) => store.get(`grant/${id}`) as Promise<Grant | undefined>;

/** Stores a new grant and returns it, or the one that the same form made before. */
const insertGrant = ({ store }: Server, id: string, grant: Grant) =>
  store.update(`grant/${id}`, (current) => current ?? grant, { expiresAt: grant.expires }) as Promise<Grant>;

/** Changes a grant atomically, if there is one. Keeps what has expired, perhaps by a clock that is wrong. */
async function updateGrant({ store }: Server, id: string, change: (grant: Grant) => Grant, expiresAt?: number) {
  const changeIt: Change = (current, expired) => current ? change(current as Grant) : expired;
  return await store.update(`grant/${id}`, changeIt, defined({ expiresAt })) as Grant | undefined;
}

/** Says one thing of whatever is wrong with a token: the reason is for the owner, not for a thief. */
const invalidGrant = (details: OAuthErrorDetails) =>
  new OAuthError("invalid_grant", "The code or refresh token is wrong, used, expired or revoked", details);

const emitFor = (server: Server, type: AuthEvent["type"], message: string, connection: string, grant: Grant) =>
  server.emit(type, message, { connection, clientName: grant.client.name });

/** Derives an id from a form: sent twice, it finds the first grant. */
const formId = async ({ mac }: Server, ...form: string[]) => (await mac("grant", ...form)).slice(0, 32);

/** Approves a request, or with `lookOnly` finds its approval. Returns its code while that is good. */
async function approve(server: Server, form: string, request: AuthorizationRequest, lookOnly = false) {
  const { client: { id: client_id, name, auth, refreshes }, redirect_uri, scopes, code_challenge: challenge } = request;
  const id = await formId(server, form);
  const code = `pac_${id}${await server.mac("code", form)}`;
  const { found, introduced, shown } = server.attempts.get(client_id) ?? {};
  const attempt = defined({ found, introduced, shown });
  const client = { id: client_id, name, ...defined({ auth }) };
  const approval = { client, redirect_uri, scopes, resource: server.resource, attempt };
  const grant = approveGrant(approval, { hash: await hashToken(code), challenge, refreshes }, seconds());
  const kept = await (lookOnly ? readGrant(server, id) : insertGrant(server, id, grant));
  if (!kept) return undefined;
  if (!lookOnly) server.attempts.delete(client_id); // from here on, the record tells
  if (kept.client.id !== client_id || kept.redirect_uri !== redirect_uri) return undefined;
  // After a double click the browser follows the second response.
  return { code: hasOpenCode(kept, seconds()) ? code : undefined, repeated: kept.created !== grant.created };
}

const hasOpenCode = ({ code }: Grant, now: number) => !!code && code.redeemed === undefined && code.expires > now;

async function redeem(server: Server, form: URLSearchParams, client: Client, arrived: number) {
  const [code, code_verifier] = [required(form, "code"), required(form, "code_verifier")];
  if (!/^[A-Za-z0-9._~-]{43,128}$/.test(code_verifier)) {
    throw invalidRequest("code_verifier must be 43 to 128 unreserved characters (RFC 7636 §4.1)");
  }
  const id = grantIdOf(code);
  if (!id) throw invalidGrant({ reason: "this server did not make the code" });
  const [hash, challenge] = [await hashToken(code), await s256(code_verifier)];
  const redirect_uri = form.get("redirect_uri") ?? undefined;
  const request = { hash, challenge, client_id: client.id, resource: server.resource, redirect_uri, arrived };
  const step: Step = (grant, issue) => redeemGrant(grant, request, issue, seconds());
  return await issueTokens(server, id, random(32), random(32), step);
}

async function refresh(server: Server, form: URLSearchParams, client: Client) {
  const refresh_token = required(form, "refresh_token");
  const made = await readRefresh(server, refresh_token);
  if (!made) throw invalidGrant({ reason: "this server did not make the refresh token" });
  const asked = form.get("scope");
  const access = await server.mac("access", refresh_token, asked ?? "");
  const request = { hash: made.hash, client_id: client.id, resource: server.resource };
  return await issueTokens(server, made.id, access, made.successor, (grant, issue) => {
    const scopes = narrowedScopes(asked, grant.scopes);
    const isNarrower = scopes.length < grant.scopes.length;
    const narrower = isNarrower && { scopes: scopes.map((scope) => grant.scopes.indexOf(scope)) };
    return refreshGrant(grant, request, { ...issue, access: { ...issue.access, ...narrower } }, seconds());
  });
}

type Step = (grant: Grant, issue: Issue) => Transition;

/** Issues tokens by an atomic transition, and raises its event (OAuth 2.1 §3.2.3). */
async function issueTokens(server: Server, id: string, accessSecret: string, refreshSecret: string, step: Step) {
  const access_token = `pat_${id}${accessSecret}`;
  const { token: refresh_token, hash: refresh } = await deriveRefresh(server, id, refreshSecret);
  const [hash, now] = [await hashToken(access_token), seconds()];
  const expires = now + Math.max(server.refreshTokenTtl, server.accessTokenTtl);
  const issue = { access: { hash, expires: now + server.accessTokenTtl }, refresh, expires };
  let result!: Transition; // of the last try to write
  const grant = await updateGrant(server, id, (grant) => {
    result = step(grant, issue);
    return result.grant;
  }, expires);
  if (!grant) throw invalidGrant({ reason: "the connection has ended" });
  const { outcome, reason } = result;
  if (outcome === "refused") throw invalidGrant({ reason });
  if (outcome !== "issued") {
    emitFor(server, outcome, EVENTS[outcome], id, grant);
    if (grant.revoked !== undefined) throw invalidGrant({ event: outcome });
  }
  const issued = grant.access.find((token) => token.hash === hash)!;
  return {
    access_token,
    token_type: "Bearer",
    expires_in: Math.round(issued.expires - seconds()),
    ...(grant.refresh && { refresh_token }), // absent, not null: strict clients refuse that
    scope: scopesOf(grant, issued).join(" "),
  };
}

const CHECK_DIGITS = 32;

/** Derives a refresh token, `prt_<id><secret><check>`, its hash and the secret of its successor. */
async function deriveRefresh({ longMac }: Server, id: string, secret: string) {
  const digest = await longMac("refresh", id + secret); // its parts tell nothing of each other
  const token = `prt_${id}${secret}${digest.slice(0, CHECK_DIGITS)}`;
  return { id, token, hash: digest.slice(CHECK_DIGITS, 64), successor: digest.slice(64) };
}

/** Reads a refresh token of this server: nobody who learns an id can end a connection by a made-up one. */
async function readRefresh(server: Server, token: string) {
  const made = await deriveRefresh(server, token.slice(4, 36), token.slice(36, -CHECK_DIGITS));
  return equal(token, made.token) ? made : undefined;
}

/** Returns the id of the grant that a code or token names. Its hash tells whether it is good, and for what. */
function grantIdOf(token: string) {
  const forms = /^(?:p(?:ac|at)_([0-9a-f]{32})[0-9a-f]{64}|prt_([0-9a-f]{32})[0-9a-f]{96}|pat_([\w-]{22})[\w-]{43})$/;
  const [, id, refreshId, short] = forms.exec(token) ?? [];
  return short ? hex(base64Bytes(short)) : id ?? refreshId; // a personal access token is shorter to copy
}

async function rename(server: Server, id: string, label: string) {
  if (label.length > MAX_LABEL) throw invalidRequest(`The name may have up to ${MAX_LABEL} characters`);
  await updateGrant(server, id, (grant) => grant.resource === server.resource ? { ...grant, label } : grant);
}

async function revokeAll(server: Server) {
  for (const { id } of await listConnections(server)) await revoke(server, id);
}

/** Ends the connection of a token. Others' tokens are ignored (RFC 7009 §2.2). */
async function revokeToken(server: Server, token: string, client: Client) {
  const id = grantIdOf(token);
  if (!id) return;
  const grant = await readGrant(server, id);
  if (grant) {
    const hash = await hashToken(token);
    if (!grant.access.some((access) => access.hash === hash) && !await readRefresh(server, token)) return;
    if (grant.client.id !== client.id) throw new OAuthError("invalid_grant", "The token was issued to another client");
  }
  await revoke(server, id); // also where nothing is found: the clock may be wrong
}

async function revoke(server: Server, id: string) {
  const now = seconds(); // no two moments are the same
  const end = (grant: Grant) => grantRefusal(grant, server, now) ? grant : revokeGrant(grant, now);
  const grant = await updateGrant(server, id, end, now + FORM_TTL);
  if (!grant) await server.store.update(`grant/${id}`, (current) => current); // removes what has expired
  if (grant?.revoked !== now) return false;
  emitFor(server, "connection_revoked", "a connection was ended", id, grant);
  return true;
}

async function listConnections(server: Server): Promise<Connection[]> {
  const live: Connection[] = [];
  const now = seconds();
  for await (const [key, value] of server.store.list("grant/")) {
    const grant = value as Grant;
    const { client, label, redirect_uri: redirectUri, scopes, access, created, used, expires } = grant;
    const hasTokens = access.length > 0 || hasOpenCode(grant, now);
    if (!hasTokens || grantRefusal(grant, server, now, expires)) continue;
    live.push({
      id: key.slice("grant/".length),
      kind: client.id === PERSONAL ? "token" : "client",
      clientId: client.id,
      clientName: client.name,
      state: connectionState(grant, now),
      ...defined({ label: label || undefined, redirectUri, lastUsedAt: used && Math.floor(used) }),
      scopes,
      createdAt: Math.floor(created),
      expiresAt: Math.floor(expires),
    });
  }
  return live.sort((a, b) => b.createdAt - a.createdAt);
}

/** Stands in place of a client_id. */
const PERSONAL = "personal-access-token";

/** Makes a personal access token, unless the same form made one that is in use. */
async function createToken(server: Server, request: TokenRequest, form = random(32)) {
  const { name, expiresIn = 365 * DAY, scopes = server.scopes.all } = request;
  assert(isString(name) && printable(name) !== "", "createToken: name must say what the token is for");
  assert(isLifetime(expiresIn), `createToken: expiresIn ${LIFETIME}, not ${quote(expiresIn)}`);
  assertOffered(server, "createToken", scopes);
  // The same form makes the same token, as for a double click. A copy of the store does not give it.
  const parts = [form, name, String(expiresIn), ...scopes];
  const id = await formId(server, ...parts);
  const token = `pat_${base64url(unhex(id))}${base64url(unhex(await server.mac("token", ...parts)))}`;
  const created = seconds();
  const expires = created + expiresIn;
  const client = { id: PERSONAL, name: printable(name) };
  const access = [{ hash: await hashToken(token), n: 0, expires }];
  const grant: Grant = { client, scopes, resource: server.resource, created, expires, access };
  const kept = await insertGrant(server, id, grant);
  if (kept.used !== undefined || kept.revoked !== undefined) return undefined;
  if (kept.created === created) emitFor(server, "token_created", "a personal access token was made", id, grant);
  return { id, token, expiresAt: Math.floor(kept.expires) };
}

// --- Guard ---

/** `version`: the store's stamp before the token was read. */
type VerifiedToken = { info: AuthInfo; version: number; until: number };
const MAX_VERIFIED = 1000;
const MARK_PATIENCE = 200; // ms
/** Never read from query or body: URLs are logged (RFC 6750 §2.1). */
const BEARER = /^Bearer +([A-Za-z0-9._~+/-]+=*) *$/i;

/** Makes a guard. It looks at the token alone: without one, any request gets the 401. */
function createGuard(server: Server, required: string[] = []): MiddlewareHandler<AuthEnv> {
  const { mcpPath } = server;
  const checkToken = withCors(async (c, next) => {
    try {
      const info = recall(server, c) ?? await authenticate(server, c);
      admit(server, c, info);
      // With those it has: clients ask for exactly this list.
      const needed = [...new Set([...info.scopes, ...required])];
      const isGranted = needed.length === info.scopes.length;
      if (!isGranted) throw challenge(server, "insufficient_scope", "The token lacks a scope that this needs", needed);
    } catch (error) {
      return errorResponse(server, c, error);
    }
    await next();
    // Some clients add a slash. 308 keeps method and body.
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
  assertOffered(server, "requireScopes", required);
  return createGuard(server, required);
}

function assertOffered({ scopes: { all } }: Server, caller: string, scopes: string[]) {
  const isOffered = isStringList(scopes) && scopes.length > 0 && scopes.every((scope) => all.includes(scope));
  assert(isOffered, `${caller}: scopes must be some of ${all.join(", ")}, not ${quote(scopes)}`);
}

/** Returns what is known of a token, unless a process has changed the store since. */
function recall({ passed, verified, store }: Server, c: Context) {
  const earlier: AuthInfo | undefined = c.get(passed); // from another guard of this request
  if (earlier) return earlier;
  const known = verified.get(c.req.raw.headers.get("Authorization") ?? "");
  return known && known.version === store.version?.() && Date.now() / 1000 < known.until ? known.info : undefined;
}

function admit({ passed }: Server, c: Context, info: AuthInfo) {
  c.set(passed, info); // c.var.auth would not do: any middleware can set it
  c.set("auth", info);
}

async function authenticate(server: Server, c: Context) {
  const header = c.req.raw.headers.get("Authorization") ?? "";
  const token = header.match(BEARER)?.[1];
  if (token) return await verifyAccessToken(server, token, header);
  server.found.at = seconds();
  throw challenge(server, "unauthorized", "An access token is needed: send it as Authorization: Bearer");
}

async function verifyAccessToken(server: Server, token: string, header = `Bearer ${token}`) {
  const { store, verified, resource, resourceMetadataUrl } = server;
  const now = seconds();
  const version = store.version?.(); // before the read, or a change in between would go unseen
  const id = grantIdOf(token);
  const grant = id ? await readGrant(server, id) : undefined;
  const hash = grant ? await hashToken(token) : "";
  const access = grant && verifyGrant(grant, hash, resource, now);
  if (!id || !access) {
    const error = challenge(server, "invalid_token", "The access token is unknown, expired or revoked");
    if (grant) {
      const { expires } = grant.access.find((token) => token.hash === hash) ?? grant;
      const refusal = grantRefusal(grant, server, now, Math.min(expires, grant.expires));
      error.details.reason = `access token: ${refusal ?? "it was replaced, or never issued"}`;
    }
    await noteRefusal(server, error, id);
    throw error;
  }
  const presented = presentGrant(grant, access, now);
  if (presented !== grant) {
    const marking = markPresented(server, id, access, now);
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
  if (verified.size >= MAX_VERIFIED) verified.clear();
  const until = Math.min(access.expires, grant.expires, (presented.used ?? now) + MINUTE);
  if (version !== undefined) verified.set(header, { info, version, until }); // else nothing would tell of a change
  return info;
}

/** Stores that a token was used, if it can: the owner may always read. */
async function markPresented(server: Server, id: string, token: AccessToken, now: number) {
  const change = (grant: Grant) => grantRefusal(grant, server, now) ? grant : presentGrant(grant, token, now);
  const grant = await updateGrant(server, id, change).catch(() => undefined); // the store reports it
  if (grant?.called === now) emitFor(server, "first_call", "the app called for the first time", id, grant);
}

/**
 * Makes an error with its challenge. Without `scope`, Claude would ask for every scope there is.
 * @see https://www.rfc-editor.org/rfc/rfc9728#section-5.1
 */
function challenge(server: Server, code: string, description: string, scopes = server.scopes.byDefault) {
  const status = code === "insufficient_scope" ? 403 : 401;
  // No error code where no token came (RFC 6750 §3.1).
  const error = code === "unauthorized" ? "" : `error="${code}", error_description="${description}", `;
  const scope = scopes.filter((scope) => scope !== OFFLINE_ACCESS).join(" ");
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

/** `owner/<issuer>`: the password, or all that were printed until one is used. A new epoch ends all sessions. */
type OwnerRecord = { salt: string; hashes: string[]; generated: boolean; used: boolean; epoch: string };

const FORM_TTL = 10 * MINUTE;
const SESSION_TTL = 30 * DAY;
const SESSION_IDLE_TTL = 7 * DAY;
const BROWSER_TTL = 400 * DAY; // the longest that browsers keep a cookie
const MAX_ATTEMPTS = 10;
const ATTEMPT_INTERVAL = MINUTE;
const MAX_PRINTED_PASSWORDS = 10;
const browserKey = async (browser: string) => `browser/${await hashToken(browser)}`;
const ownerKey = ({ issuer }: Settings) => `owner/${issuer}`;

/** Reads who is at the browser, and throws the page for a stranger. Never writes to the store. */
async function readSession(server: Server, c: Context): Promise<Session> {
  const { secure, store, password, authenticateOwner } = server;
  const held = getCookie(c, cookieName(server), secure ? "host" : undefined);
  const known = held !== undefined && /^[0-9a-f]{64}$/.test(held);
  const browser = known ? held : random(32);
  // Another site's form comes without the cookie: a new one would sign the owner out.
  if (!known && c.req.method !== "POST") rememberBrowser(server, c, browser);
  if (password === false) return { browser, known, isOwner: true };
  if (authenticateOwner) {
    const answer = await authenticateOwner(c);
    if (answer === true) return { browser, known, isOwner: true };
    const notOwner = "You are not signed in as the owner of this server.";
    throw answer instanceof Response ? answer : await messagePage(server, c, 403, "For the owner only", notOwner);
  }
  const { epoch } = await readOwner(server); // each time, because another process may have ended all sessions
  const { session } = (await store.get(await browserKey(browser)) ?? {}) as BrowserRecord;
  const now = seconds();
  const isOwner = session !== undefined && session.epoch === epoch && now - session.since < SESSION_TTL &&
    now - session.seen < SESSION_IDLE_TTL;
  return { browser, known, isOwner };
}

/** Servers on one host share cookies: the name holds port and path. No path holds a "!". */
function cookieName({ origin, basePath }: Server) {
  const { port } = new URL(origin);
  return `personal-auth${port && `.${port}`}${basePath.replaceAll("/", "!")}`;
}

function rememberBrowser(server: Server, c: Context, browser: string) {
  setCookie(c, cookieName(server), browser, {
    path: "/",
    httpOnly: true,
    sameSite: "Lax", // comes along when an app leads here, but not with another site's form
    maxAge: BROWSER_TTL,
    secure: server.secure, // Safari keeps no Secure cookie on loopback
    // __Host-: no other host can plant a secret that it knows.
    ...(server.secure && { prefix: "host" as const }),
  });
}

/** Binds a form to one browser and one request. Another site can neither read nor make it. */
async function createCsrf({ mac }: Server, browser: string, request: string, head?: string) {
  head ??= `${Math.floor(seconds()).toString(36)}.${random(8)}`;
  return `${head}.${await mac("form", browser, request, head)}`;
}

async function checkCsrf(server: Server, browser: string, request: string, csrf: string) {
  const [time = "", nonce = ""] = csrf.split(".", 2);
  const expected = await createCsrf(server, browser, request, `${time}.${nonce}`);
  return equal(csrf, expected) && Math.abs(seconds() - parseInt(time, 36)) < FORM_TTL;
}

/** Signs the owner in by the password if need be. Returns why it failed. */
async function signIn(server: Server, c: Context, { browser, isOwner }: Session, password: string) {
  const { store, emit } = server;
  const problem = (status: Problem["status"], message: string): Problem => ({ status, message });
  const key = await browserKey(browser);
  if (isOwner) return await touchSession(server, key);
  // A form from before the session ended has no password: that is no attempt.
  if (password === "") return problem(403, "Please type your password.");
  const bucket = await store.get(key) === undefined ? "throttle" : key;
  const wait = await takeAttempt(server, bucket);
  const record = await readOwner(server);
  // Nobody guesses a generated password, so a lack of attempts does not lock it. A chosen one is not looked at.
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
  // The owner's sign-ins from new browsers must not use up the shared attempts.
  if (wait === 0) await takeAttempt(server, bucket, -1);
  if (!record.used) {
    // Of the printed passwords, only this one stays good.
    await store.update(ownerKey(server), (current) => current && { ...current, hashes: [hash], used: true });
  }
  // A new secret, because somebody else may know the old one.
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
  // At another name of this server, Origin and Host agree.
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

/** Ends the session. The browser keeps its attempts. */
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
 * Takes a password attempt, or gives it back (-1). Returns 0, or the seconds until there is one. Strangers share one
 * bucket, because an attacker has many addresses; a browser that has signed in has its own.
 */
async function takeAttempt({ store }: Server, bucket: string, count: 1 | -1 = 1) {
  let wait = 0;
  await store.update(bucket, (current) => {
    const record = current as BrowserRecord | undefined;
    const now = seconds();
    const { left, at } = record?.attempts ?? { left: MAX_ATTEMPTS, at: now };
    // If the clock was set back, `at` follows, or the refill would stop.
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
 * Puts the password into the store. A configured one replaces any other and ends all sessions. Until a generated one
 * is used, every start prints another, because earlier output may be lost.
 */
async function ensurePassword(server: Settings & { store: Store }): Promise<OwnerRecord> {
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
  if (!kept.hashes.includes(hash)) return await ensurePassword(server); // another process was faster
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

/** Hashes slowly, so that a stolen store gives up no password; 100 random bits do not need it. */
async function stretch(password: string, { salt, generated }: OwnerRecord) {
  // In rounds: Cloudflare Workers refuse more than 100,000 in one call.
  const [rounds, iterations] = generated ? [1, 1] : [6, 100_000];
  let secret = await sha256(password); // HMAC pads its key with NULs: "secret\0" would do for "secret"
  for (let round = 0; round < rounds; round++) {
    const key = await crypto.subtle.importKey("raw", secret, "PBKDF2", false, ["deriveBits"]);
    const params = { name: "PBKDF2", hash: "SHA-256", salt: utf8.encode(salt), iterations };
    secret = new Uint8Array(await crypto.subtle.deriveBits(params, key, 256));
  }
  return hex(secret);
}

// --- Owner's page ---

/** What the page says after an action. Its address names the action only: no link can make it say more. */
const DONE = new Map([
  ["revoke", "Disconnected. It has to ask you again."],
  ["revoke_all", "Everything is disconnected."],
  ["rename", "Renamed."],
]);
const MAX_LABEL = 60; // characters

async function showConnections(server: Server, c: Context) {
  await assertProtected(server, c);
  return connectionsPage(server, c, await readSession(server, c));
}

async function changeConnections(server: Server, c: Context) {
  const path = `${server.basePath}/connections`;
  const form = await readForm(c, "scope");
  const field = (name: string) => form.get(name) ?? "";
  await assertProtected(server, c);
  const session = await readSession(server, c);
  const action = field("action");
  if (!await checkCsrf(server, session.browser, path, field("csrf"))) {
    if (!session.known) return expiredPage(server, c);
    // The second of two clicks; the first has signed the owner in.
    if (session.isOwner && action === "") return c.redirect(path, 303);
    return connectionsPage(server, c, session, OPEN_TOO_LONG);
  }
  const problem = await signIn(server, c, session, field("password"));
  if (problem) return connectionsPage(server, c, session, problem);
  const tokenPage = action === "create_token" && await createAndShowToken(server, c, form);
  if (tokenPage) return tokenPage;
  if (action === "revoke") await revoke(server, field("id"));
  if (action === "rename") await rename(server, field("id"), printable(field("label")));
  if (action === "revoke_all" || form.has("revoke_all")) await revokeAll(server); // the button, or the box at sign-out
  if (action === "sign_out") await signOut(server, session);
  if (action === "sign_out_everywhere") await signOutEverywhere(server);
  return c.redirect(DONE.has(action) ? `${path}?done=${action}` : path, 303); // 303: a reload must not do it again
}

/** Throws a page where the password is off. */
async function assertProtected(server: Server, c: Context) {
  const advice = "Without it, this page would be open to everybody. To use it, give personalAuth() a password.";
  if (server.password === false) throw await messagePage(server, c, 403, "The password check is off", advice);
}

/** Makes a personal access token and shows it once; returns nothing if the form's token is in use. */
async function createAndShowToken(server: Server, c: Context, form: URLSearchParams) {
  const { all } = server.scopes;
  const [name, expiresIn] = [form.get("name") ?? "", Number(form.get("days")) * DAY];
  // With one scope there is nothing to choose; with several, none ticked is none.
  const scopes = all.length > 1 ? form.getAll("scope") : all;
  const made = await createToken(server, { name, expiresIn, scopes }, form.get("csrf")!).catch((error) => {
    throw error instanceof TypeError ? invalidRequest("The token needs a name, a lifetime and a scope") : error;
  });
  if (!made) return undefined;
  const body = html`
    <p class="warn">Copy it now: it is not shown again.</p>${copyable(made.token)}
    <p>In Claude Code, for example:</p>
    ${copyable(`${addCommand(name, server)} --header "Authorization: Bearer ${made.token}"`)}
    <a href="${server.basePath}/connections">Back to your connections</a>
  `;
  return messagePage(server, c, 200, "Your new token", body);
}

/** Leads a browser from the root to the owner's page if the app has nothing there. */
function homePage({ basePath }: Server): MiddlewareHandler {
  return async (c, next) => {
    await next(); // asks all routes after this one
    if (c.res.status !== 404 || !c.req.header("Accept")?.includes("text/html")) return;
    c.res = undefined; // or its headers would be kept
    c.res = new Response(null, { status: 302, headers: { Location: `${basePath}/connections` } });
  };
}

// --- Timeline ---

const STEPS = {
  found: "found this server",
  introduced: "introduced itself",
  shown: "was shown to you for approval",
  denied: "was denied by you",
  approved: "was approved by you",
  redeemed: "fetched its token",
  called: "called for the first time",
  refreshed: "refreshed its token, the last time",
  used: "was used, the last time",
};

/** When a client took which step. In memory until its approval, because strangers can make any number of them. */
type Attempt = { name: string; refused?: Refusal | undefined } & { [step in keyof typeof STEPS]?: number | undefined };
type Refusal = { at: number; reason: string };
type Timeline = ReturnType<typeof timeline>;
const UNREDEEMED_KEPT = 7 * DAY; // to be shown

/** Notes how far a client came. What nobody opened in a browser is forgotten first. */
function noteAttempt({ attempts, found }: Server, { id, name }: Pick<Client, "id" | "name">, step: Partial<Attempt>) {
  const before = attempts.get(id) ?? { name, found: found.at };
  remember(attempts, id, { ...before, ...step }, ({ shown }) => shown !== undefined);
}

/** Tells the owner why a request was refused: on the connection that it names, or on the client's attempt. */
async function noteRefusal(server: Server, error: unknown, id: string | undefined, client?: Client) {
  if (!(error instanceof OAuthError) || error.status >= 500 || error.details.event) return;
  const refused = { at: seconds(), reason: error.details.reason ?? error.message };
  const grant = id ? await readGrant(server, id).catch(() => undefined) : undefined;
  const named = grant?.client ?? client;
  if (!named) return; // a made-up token
  server.emit("token_refused", refused.reason, defined({ connection: grant && id, clientName: named.name }));
  if (!grant) noteAttempt(server, named, { refused });
  else if (refused.at - (grant.refused?.at ?? 0) > MINUTE) { // at most once a minute
    await updateGrant(server, id!, (grant) => ({ ...grant, refused })).catch(() => {});
  }
}

function connectionState(grant: Grant, now: number): Connection["state"] {
  if (grant.code && grant.code.redeemed === undefined) return "pending";
  if (grant.called === undefined) return "unused";
  const isRefused = grant.refused !== undefined && grant.refused.at > (grant.used ?? 0);
  return isRefused || !grant.access.some(({ expires }) => expires > now) ? "silent" : "active";
}

/** Returns what is new, unfinished, or fell silent, newest first. */
async function listTimelines(server: Server) {
  const now = seconds();
  const approved: Timeline[] = [];
  for await (const [, value] of server.store.list("grant/")) {
    const grant = value as Grant;
    const { client, label, created, called, used, code, refresh, refused, attempt } = grant;
    const isSettled = connectionState(grant, now) === "active" && now - created > DAY;
    if (client.id === PERSONAL || isSettled || grantRefusal(grant, server, now, grant.expires)) continue;
    const times = { approved: created, redeemed: code?.redeemed, refreshed: refresh?.rotated[0]?.[1], called };
    const steps = { ...attempt, ...times, used: called && used, refused };
    approved.push(timeline(label || client.name, grantAdvice(server, grant, now), steps));
  }
  approved.sort((a, b) => b.steps.at(-1)!.at - a.steps.at(-1)!.at);
  const attempts = [...server.attempts.values()].reverse();
  // Some of each kind: no number of strangers' attempts hides what the owner approved or opened.
  const opened = attempts.filter(({ shown }) => shown !== undefined);
  const unopened = attempts.filter(({ shown }) => shown === undefined).slice(0, 3);
  const unapproved = [...opened, ...unopened].map((it) => timeline(it.name, attemptAdvice(server, it), it));
  return [...approved, ...unapproved].slice(0, 15);
}

/** Puts the steps into their order. */
function timeline(title: string, advice: string, { refused, ...times }: Partial<Attempt>) {
  const steps = Object.entries(STEPS).flatMap(([step, text]) => {
    const at = times[step as keyof typeof STEPS];
    return at === undefined ? [] : [{ at, text, ok: step !== "denied" }];
  });
  if (refused) steps.push({ at: refused.at, text: `was refused: ${refused.reason}`, ok: false });
  return { title, advice, steps: steps.sort((a, b) => a.at - b.at) };
}

/** Says what to know and do about an attempt that is not approved. */
function attemptAdvice(server: Server, { name, shown = 0, denied = 0, refused }: Attempt) {
  // The latest step counts: an app that was refused, and then came properly, waits for the owner.
  const last = Math.max(shown, denied, refused?.at ?? 0);
  if (last === 0) return `It introduced itself, but no browser has opened the page. Connect again; ${hint(server)}`;
  if (last === shown) return "It is your turn: approve or deny on the page that the app opened, or connect again.";
  if (last === denied) return "You denied it. Nothing was shared.";
  return `This server refused it. Mend that, and connect again in ${name || "the app"}.`;
}

/** Says the same of a connection. */
function grantAdvice(server: Server, grant: Grant, now: number) {
  const { client, code, refused, access, used = 0 } = grant;
  const target = new URL(grant.redirect_uri!);
  const [name, redeemed] = [client.name || "the app", code?.redeemed ?? 0];
  if (refused && refused.at > Math.max(used, redeemed)) {
    return `${name} was refused ${ago(now - refused.at)}: ${refused.reason}. Connect again in ${name}.`;
  }
  if (hasOpenCode(grant, now)) {
    return `It is ${name}'s turn: it was sent back to ${target.host} and has not fetched its token yet.`;
  }
  const userAgent = /^claude\.(ai|com)$/.test(target.host) ? "the user agent Claude-User" : "its user agent";
  const isStripped = (server.found.at ?? 0) > redeemed; // a request came without its token
  const fault = isStripped ? "remove the Authorization header: a request without a token came" : `block ${userAgent}`;
  const expired = Math.max(0, ...access.map(({ expires }) => expires));
  return {
    pending: isLocal(target)
      ? `${name} never fetched its token: nothing listens at ${target.host} on your browser's computer. If it is on ` +
        "another computer, connect again and say so on the page."
      : `${name} never fetched its token. Its servers may not reach ${server.issuer}/token; ${hint(server)}`,
    unused: `${name} got its token ${ago(now - redeemed)} and has not called since. ` +
      `Something in front of this server may ${fault}; ${hint(server)}`,
    silent: `${name}'s access token expired ${ago(now - expired)} and it has not come back. ` +
      `Open ${name} and connect again.`,
    active: `${name} is connected.`,
  }[connectionState(grant, now)];
}

const hint = ({ resource }: Server) => `to see what a client meets, run: npx -y deno run -A mod.ts ${resource}`;

// --- Events ---

/** `events/<issuer>`: the latest of each type, so that a flood of one pushes out no other. */
type EventRecord = Record<string, { count: number; latest: Omit<AuthEvent, "type" | "cause">[] }>;
type EventLog = { store: Store; key: string; waiting: EventRecord; writing: Promise<unknown> };
const MAX_EVENTS_PER_TYPE = 5;
/** Strangers can cause these at will: they wait in memory for one that is worth a write. */
const CHEAP_EVENTS = /^(\w+_refused|connection_denied|sign_in_throttled|owner_unprotected|password_weak|server_error)$/;

/** Passes an event to `onEvent`, and keeps it for the owner's page. */
function recordEvent(log: EventLog, onEvent: (event: AuthEvent) => void, happened: Omit<AuthEvent, "at">) {
  const event = { at: Math.floor(seconds()), ...happened };
  const { type, cause: _cause, ...rest } = event;
  // A broken alarm must break neither the request nor, if it is asynchronous, the process.
  promiseTry(() => onEvent(event)).catch((error) => console.error("personal-auth: onEvent threw", error));
  if (type === "client_registered") return; // anybody's, and nothing the owner could act on
  const kept = { ...rest, message: rest.message.slice(0, 500) };
  log.waiting = mergeEvents(log.waiting, { [type]: { count: 1, latest: [kept] } });
  if (CHEAP_EVENTS.test(type)) return;
  const batch = log.waiting;
  log.waiting = {};
  log.writing = promiseTry(() => log.store.update(log.key, (current) => mergeEvents(current, batch)))
    .catch(() => log.waiting = mergeEvents(batch, log.waiting)); // the next event tries again
}

/** Adds newer events to a record. A repeated event replaces the earlier one. */
function mergeEvents(record: unknown, newer: EventRecord) {
  const merged = { ...record as EventRecord | undefined };
  for (const [type, { count, latest }] of Object.entries(newer)) {
    const before = merged[type] ?? { count: 0, latest: [] };
    const others = before.latest.filter((old) =>
      !latest.some(({ message, clientName }) => message === old.message && clientName === old.clientName)
    );
    merged[type] = { count: before.count + count, latest: [...latest, ...others].slice(0, MAX_EVENTS_PER_TYPE) };
  }
  return merged;
}

/** Returns the latest events, newest first. The first of a type says how many there were. */
async function latestEvents(log: EventLog) {
  await log.writing;
  const record = mergeEvents(await log.store.get(log.key), log.waiting);
  return Object.entries(record)
    .flatMap(([type, { count, latest }]) => latest.map((event, i) => ({ ...event, type, count: i === 0 ? count : 1 })))
    .sort((a, b) => b.at - a.at);
}

/** Writes an event to the console, unless anyone can cause it at will. */
function logEvent({ type, message, connection, clientName, cause }: AuthEvent) {
  if (type === "client_registered" || (type === "token_refused" && !connection)) return;
  const parts = [
    ...["personal-auth", type, message],
    // quote() keeps it on one line, so that no name can forge a second log entry.
    clientName && `client ${quote(clientName)}`,
    connection && `connection ${connection}`,
    cause instanceof Error && quote(cause.message),
  ];
  console.log(parts.filter(Boolean).join(" | "));
  if (type === "server_error") console.error(cause); // in full only what no stranger can cause at will
}

// --- Pages ---

type Html = ReturnType<typeof html>;
type Text = string | Html | undefined; // a string is a paragraph
type PageStatus = 200 | 409 | 429 | ErrorStatus;

/** How the owner's pages look. */
export type PageOptions = {
  /** What the owner calls this server. Default: its address. */
  title?: string;
  /** The colour of the button that approves, as `#rrggbb`. */
  accent?: string;
};

const UNNAMED = "an app without a name";
/** Events when all is well; every other one needs a look. */
const ROUTINE = /^(owner_signed_in|sign_in_failed|connection_\w+|code_redeemed|first_call|token_created)$/;
const OPEN_TOO_LONG: Problem = { status: 403, message: "This page was open for too long. Check it and answer again." };

// Apps' own names are a .name: two lines at most, and clipped, so that combining marks draw over nothing else.
const STYLE = `
:root{color-scheme:light dark;--ink:#1d1b18;--soft:#5c574f;--paper:#f5f3ee;--card:#fff;--line:#e0dbd0;--link:#1d4f9c;
--accent:var(--link);--on-accent:var(--card);--warn:#7a3d00;--warn-paper:#fff4e0;--good:#1b6b3a;--good-paper:#e8f5ec;
--bad:#a3241b}
@media(prefers-color-scheme:dark){:root{--ink:#f1efe9;--soft:#b8b2a7;--paper:#161513;--card:#211f1d;--line:#3d3a35;
--link:#8db4f5;--warn:#ffcf8f;--warn-paper:#36260f;--good:#8fd8a8;--good-paper:#16301f;--bad:#ff9d94}}
@media(prefers-contrast:more){:root{--soft:var(--ink);--line:var(--ink)}}*{box-sizing:border-box;margin:0;padding:0}
body{min-height:100vh;display:grid;grid-template-columns:100%;place-items:center;padding:1rem;background:var(--paper);
color:var(--ink);font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere;text-wrap:pretty}
main{width:100%;max-width:28rem;padding:clamp(1.1rem,5vw,2rem);background:var(--card);border:1px solid var(--line);
border-radius:1.1rem}
.wide{max-width:44rem;align-self:start}header,.row,.pair,fieldset label{display:flex;gap:.7rem;align-items:center}
header{color:var(--soft);font-size:.9rem}header b,.to b{color:var(--ink)}header form{margin-left:auto}
header,h1{margin-bottom:.5rem}h1{font-size:1.5rem;line-height:1.2;text-wrap:balance}
h2{margin:1.6rem 0 .3rem;font-size:1rem}p,code{margin:.5rem 0}small{display:block}
small,code,.row p,.name,.av{overflow:clip}small,.soft,.to{color:var(--soft);font-size:.875rem}ul,ol{list-style:none}
a{color:var(--link)}
.name{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:2;font-weight:600;text-align:left}
.card,.flash,.warn{margin:1rem 0}.card,.flash,.warn,code{padding:.8rem}
.card,.flash,.warn,.chip,.av,code,input,select,button,.button{border:1px solid transparent;border-radius:.75rem}
.card,code{border-color:var(--line)}.flash,.chip{background:var(--good-paper);color:var(--good)}
.warn{background:var(--warn-paper);color:var(--warn)}.warn,.chip{font-weight:600}
.chip{padding:0 .5rem;font-size:.8rem;white-space:nowrap}.row{padding:.7rem 0}.row>div{flex:1;min-width:0}
.row p{margin:0}.row p::first-letter{text-transform:uppercase}.card>.row{padding:0 0 .7rem}.row+.card{margin:0 0 .8rem}
.av{flex:none;width:2.5rem;height:2.5rem;display:grid;place-items:center;color:#fff;font-weight:700}
.c0{background:#b0492a}.c1{background:#2d66a8}.c2{background:#6a53c0}.c3{background:#1f7350}.c4{background:#a23b72}
.list>li,.to{border-top:1px solid var(--line)}.to{margin:0;padding-top:.7rem}.to b{font-size:1.2rem}
.marks li{padding:.2rem 0 .2rem 1.6rem;position:relative}
.marks li::before{content:"✓";position:absolute;left:.2rem;color:var(--good);font-weight:700}
.marks .more::before{content:"!";left:.45rem;color:var(--warn)}.marks .bad::before{content:"✗";color:var(--bad)}
label,legend{display:block;margin-top:1rem;font-weight:600}fieldset{border:0}fieldset label{margin:0;font-weight:400}
input,select,button,.button{width:100%;min-height:3rem;margin-top:.5rem;padding:.6rem .9rem;font:inherit;
border-color:var(--soft);color:inherit;background:var(--card)}
[type=checkbox]{width:1.35rem;min-height:1.35rem;margin:0;accent-color:var(--accent)}
button,.button,summary{font-weight:600;cursor:pointer}.button{display:block;text-decoration:none}
.approve{margin-top:1rem;background:var(--accent);border-color:var(--accent);color:var(--on-accent)}
.plain{width:auto;margin:0;padding:0;border:0;background:none;color:var(--link)}.danger{color:var(--bad)}
.pair{margin-top:.75rem}.pair>*{margin:0}.pair button{flex:none;width:auto}.pair .approve{flex:1}
header,fieldset label,.plain,summary{min-height:2.75rem}summary{padding:.6rem 0;color:var(--link)}
summary.row{padding:.7rem .3rem .7rem 0;color:inherit;font-weight:400}summary.row::-webkit-details-marker{display:none}
summary.row::after{content:"";padding:.2rem;border:solid var(--soft);border-width:0 2px 2px 0;rotate:45deg}
[open]>summary.row::after{rotate:225deg}
code{display:block;background:var(--paper);white-space:pre-wrap;user-select:all;font-size:.875rem}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
`;

const serverName = ({ pages, issuer }: Server) => pages.title || issuer.replace("https://", "");
/** Shows the whole host: its end counts. */
const hostOf = ({ protocol, host }: URL) => protocol === "https:" ? host : `${protocol}//${host}`;
/** Tells whether the target is on the browser's computer. A private-use scheme may have a host `localhost` too. */
const isLocal = ({ protocol, hostname }: URL) => /^https?:$/.test(protocol) && isLoopback(hostname);
const nameOf = (name: string) => html`<bdi class="name">${name || UNNAMED}</bdi>`;
const link = (uri: string, text: string) => html`<a class="button approve" href="${uri}">${nameOf(text)}</a>`;
const copyable = (text: string) => html`<code tabindex="0">${text}</code>`;
const list = (items: Html[]) => html`<ul class="list">${items.map((item) => html`<li>${item}</li>`)}</ul>`;
const fold = (line: string | Html, content: Html, isOpen = false) =>
  html`<details ${isOpen && "open"}>
    <summary class="${typeof line !== "string" && "row"}">${line}</summary>${content}</details>`;

/** Shows a name beside its first letters in one of five colours, to tell rows apart at a glance. */
function heading(name: string, where: string, more: Html, label?: string) {
  const letters = name.split(/\s+/, 2).map((word) => word.match(/[\p{L}\p{N}]/u)?.[0]).join("").toUpperCase();
  const sum = [...(name + where)].reduce((sum, char) => (sum * 31 + char.codePointAt(0)!) % 9973, 0);
  return html`
    <span class="av c${sum % 5}" aria-hidden="true">${letters || "?"}</span>
    <div>${nameOf(label || name)}${more}</div>
  `;
}

/** Shows a time from now, because a page without script knows no time zone; the exact one is its title. */
function timeOf(at: number) {
  const left = at - seconds();
  const text = Math.abs(left) < MINUTE ? "just now" : fromNow(left);
  return html`<time datetime="${new Date(at * 1000).toISOString()}" title="${formatTime(at)}">${text}</time>`;
}

const formatTime = (at: number) => `${new Date(at * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;

/** Lists what a connection may do, and marks what is granted on request only. */
function scopeList({ scopes }: Server, granted: string[]) {
  const items = granted.filter((scope) => scope !== OFFLINE_ACCESS).map((scope) => {
    const extra = !scopes.byDefault.includes(scope) && html`<span class="chip warn">extra</span>`;
    return html`<li class="${extra && "more"}">${scopes.words(scope)} ${extra}</li>`;
  });
  return html`<ul class="marks">${items}</ul>`;
}

/** Asks for the password. `ready`: with the cursor in it, unless that scrolls the question away on a phone. */
function passwordField(isOwner: boolean, problem?: Problem, ready = problem !== undefined) {
  const alert = problem && html`<p class="warn" role="alert" id="problem">${problem.message}</p>`;
  if (isOwner) return alert;
  // Password managers fill in a password only where they see a user name.
  return html`
    ${alert}<input autocomplete="username" value="owner" hidden>
        <label for="password">Your password for this server</label>
        <input id="password" name="password" type="password" autocomplete="current-password" required
      ${problem && "aria-describedby=problem aria-invalid=true"} ${ready && "autofocus"}>
  `;
}

async function consentPage(
  server: Server,
  c: Context,
  { client, redirect_uri, scopes, encoded }: AuthorizationRequest,
  { browser, isOwner }: Session,
  csrf?: string,
  problem?: Problem,
) {
  const target = new URL(redirect_uri);
  const isDocument = client.source === "document";
  // On the list can be the site of the document, or else of the answer; never a mere name, or any program.
  const site = isDocument ? new URL(client.id) : target;
  const isOnList = site.protocol === "https:" && !isLocal(site) && isListed(server.allowed, site);
  const chip = isOnList && html`<span class="chip">on your list</span>`;
  const origin = {
    preregistered: "You registered it",
    registered: "The app chose this name; it is not verified",
    document: html`Described by ${site.host} ${chip}`,
  }[client.source];
  const device = target.protocol === "https:" ? "" : "an app on this device";
  const elsewhere = html`
    <p>This browser cannot reach it there. Approve here, then copy the address that is shown into the app.</p>
    <button name="decision" value="approve_elsewhere">Approve and show the address</button>
  `;
  const body = html`
    <h1>Connect this app to ${serverName(server)}?</h1>
    <div class="card">
      <div class="row">${heading(client.name, target.host, html`<small>${origin}</small>`)}</div>
      <p class="to">Sends you back to ${isLocal(target) ? "an app on this computer" : device}<br>
        <b title="${redirect_uri}">${hostOf(target)}</b> ${!isDocument && chip}</p>
    </div>
    <h2>It will be able to</h2>
    ${scopeList(server, scopes)}
    <p class="warn">Approve only if you just started this.</p>
    <form method="post" action="${server.basePath}/authorize">
      <input type="hidden" name="request" value="${encoded}">
      <input type="hidden" name="csrf" value="${csrf ?? await createCsrf(server, browser, encoded)}">
      ${passwordField(isOwner, problem)}
      <div class="pair">
        <button class="approve" name="decision" value="approve">Approve</button>
        <button name="decision" value="deny" formnovalidate>Deny</button>
      </div>
      ${isLocal(target) && fold("The app is on another computer", elsewhere)}
    </form>
    <p class="soft">Stays connected until you revoke it at <a href="${server.issuer}/connections">/connections</a>.</p>
  `;
  return page(server, c, problem?.status, `Connect ${client.name || UNNAMED}?`, body);
}

/** Leads to a private-use scheme. After a redirect the form would stay on the screen. */
function openAppPage(server: Server, c: Context, uri: string, name: string, approved: boolean) {
  c.header("Refresh", `0; url=${uri}`);
  const body = html`
    <p>The app opens now. If it does not, press the button.</p>
    ${link(uri, `Open ${name || "the app"}`)}<p>Then close this page.</p>
  `;
  return messagePage(server, c, 200, approved ? "Approved" : "Not connected", body);
}

/** Shows the callback's address, to be carried to the app's computer. */
function elsewherePage(server: Server, c: Context, uri: string) {
  const body = html`
    <p>Paste this address where the app on the other computer asks for it, or into a browser there:</p>
    ${copyable(uri)}
    <p class="warn">Give it only to the app that you started yourself.</p>
    <p>It works once, within ${CODE_TTL / MINUTE} minutes.</p>
  `;
  return messagePage(server, c, 200, "Approved", body);
}

/** Answers a form that was sent before, with the way on: the first answer may be lost. */
function answeredPage(server: Server, c: Context, client: string, uri?: string) {
  const text = "You approved this before. If the app is not connected, go back to it and connect again.";
  return messagePage(server, c, 409, "Already answered", text, uri && link(uri, `Go on to ${client || "the app"}`));
}

/** Shows the owner's page, or the form to sign in. */
async function connectionsPage(server: Server, c: Context, { browser, isOwner }: Session, problem?: Problem) {
  const path = `${server.basePath}/connections`;
  const csrf = await createCsrf(server, browser, path);
  const form = (content: Html) =>
    html`<form method="post" action="${path}"><input type="hidden" name="csrf" value="${csrf}">${content}</form>`;
  if (!isOwner) {
    const fields = form(html`${passwordField(isOwner, problem, true)}<button class="approve">Sign in</button>`);
    return messagePage(server, c, problem?.status, "Sign in", "This page is for the owner of this server.", fields);
  }
  const connections = await listConnections(server);
  const attempts = await listTimelines(server);
  const events = await latestEvents(server.events);
  const done = DONE.get(c.req.query("done") ?? "");
  const isNew = ({ type, at }: typeof events[0]) => !ROUTINE.test(type) && seconds() - at < 30 * DAY;
  const section = (title: string, items: Html[]) => items.length > 0 && html`<h2>${title}</h2>${list(items)}`;
  const signOut = (action: string, text: string, choice?: Html) =>
    !server.authenticateOwner &&
    form(html`${choice}<button class="plain" name="action" value="${action}">${text}</button>`);
  const address = html`
    <p>Give it this address, in Claude as a custom connector:</p>${copyable(server.resource)}
    <p>In Claude Code:</p>${copyable(addCommand(serverName(server), server))}
  `;
  const all = form(html`
    <p>Every app and every token has to be connected again.</p>
    <button class="danger" name="action" value="revoke_all">Disconnect all</button>
  `);
  const box = html`<fieldset><label>
    <input type="checkbox" name="revoke_all" value="yes">Disconnect every app and token as well</label></fieldset>`;
  const body = html`
    <h1>Connections</h1>
    ${done && html`<p class="flash" role="status">${done}</p>`}
    ${passwordField(isOwner, problem)}
    ${connections.length === 0 && html`<p>Nothing is connected yet.</p>`}
    ${list(connections.map((connection) => connectionItem(server, connection, form)))}
    ${fold("Connect an app", address, connections.length === 0)}
    ${fold("New token for a script", form(tokenFields(server)))}
    ${connections.length > 1 && fold("Disconnect all", all)}
    ${section("Attempts to connect", attempts.map(attemptItem))}
    ${section("Needs a look", events.filter(isNew).map(eventItem))}
    ${section("Recent activity", events.filter((event) => !isNew(event)).map(eventItem))}
    ${events.length === 0 && html`<p class="soft">No activity yet.</p>`}
    ${signOut("sign_out_everywhere", "Sign out everywhere", box)}
  `;
  return page(server, c, problem?.status, "Connections", body, signOut("sign_out", "Sign out"));
}

function connectionItem(server: Server, connection: Connection, form: (content: Html) => Html) {
  const { id, kind, clientName, label, redirectUri, scopes, state, createdAt, lastUsedAt, expiresAt } = connection;
  const name = label || clientName || UNNAMED;
  const where = redirectUri ? hostOf(new URL(redirectUri)) : "token";
  const short = scopes.filter((scope) => scope !== OFFLINE_ACCESS).join(" · ");
  const expires = kind === "token" && html`<span> · expires ${timeOf(expiresAt)}</span>`;
  const unused = state === "pending" ? "not finished" : "never used";
  const facts = html`
    <small>${where} · ${lastUsedAt ? html`used ${timeOf(lastUsedAt)}` : unused}
      ${state === "silent" && html`<span class="chip warn">silent</span>`}</small>
    <small>${short}${expires}</small>
  `;
  const actions = html`
    <input type="hidden" name="id" value="${id}">
    <label for="label-${id}">Your name for it</label>
    <div class="pair">
      <input id="label-${id}" name="label" value="${label ?? ""}" maxlength="${MAX_LABEL}" autocomplete="off">
      <button name="action" value="rename" aria-label="Rename: ${name}">Rename</button>
    </div>
    <p>Once disconnected, it has to ask you again.</p>
    <button class="danger" name="action" value="revoke" aria-label="Disconnect: ${name}">Disconnect</button>
  `;
  const content = html`
    <div class="card">
      ${label && nameOf(clientName)} ${scopeList(server, scopes)}
      <small>Connected ${timeOf(createdAt)} · ${formatTime(createdAt)}</small>
      ${form(actions)}
    </div>
  `;
  return fold(heading(clientName, where, facts, label), content);
}

/** Shows an attempt step by step, and as text to ask somebody about it. */
function attemptItem({ title, steps, advice }: Timeline) {
  const lines = steps.map(({ at, text, ok }) => `${ok ? "ok    " : "FAILED"} ${formatTime(at)} ${text}`);
  const items = steps.map((it) => html`<li class="${!it.ok && "bad"}">${it.text}<small>${timeOf(it.at)}</small></li>`);
  const content = html`<ol class="marks">${items}</ol>${copyable([title, ...lines, advice].join("\n"))}`;
  return fold(html`<div>${nameOf(title)}<small>${advice}</small></div>`, content);
}

function eventItem({ at, message, clientName, count }: Awaited<ReturnType<typeof latestEvents>>[number]) {
  const times = count > 1 && ` · ${count} times in all`;
  return html`
    <div class="row">
      <div>${clientName && nameOf(clientName)}<p>${message}</p><small>${timeOf(at)}${times}</small></div>
    </div>
  `;
}

/** Returns a command for Claude Code. Its name needs no quotes in any shell. */
function addCommand(name: string, { resource }: Server) {
  const word = name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "personal";
  return `claude mcp add --transport http ${word} ${resource}`;
}

function tokenFields({ scopes }: Server) {
  const choices = scopes.all.map((scope) =>
    html`<label><input type="checkbox" name="scope" value="${scope}"
      ${scopes.byDefault.includes(scope) && "checked"}>${scopes.words(scope)}</label>`
  );
  return html`
    <p class="soft">For scripts, and for clients without a browser.</p>
    <label for="name">What is it for?</label>
    <input id="name" name="name" required maxlength="200" autocomplete="off">
    <label for="days">Expires after</label>
    <select id="days" name="days">
      ${[30, 90, 365].map((days) => html`<option value="${days}">${days} days</option>`)}
    </select>
    ${choices.length > 1 && html`<fieldset><legend>It may</legend>${choices}</fieldset>`}
    <button name="action" value="create_token">Create token</button>
  `;
}

function messagePage(server: Server, c: Context, status: PageStatus = 200, title: string, ...texts: Text[]) {
  const body = html`<h1>${title}</h1>${texts.map((text) => typeof text === "string" ? html`<p>${text}</p>` : text)}`;
  return page(server, c, status, title, body);
}

const expiredPage: Handler = (server, c) => {
  const advice = "Go back to the app and connect again. If that does not help, allow cookies for this site.";
  return messagePage(server, c, 403, "This page has expired", advice);
};

/** Returns black or white, whichever is easier to read on a colour (relative luminance, WCAG 2). */
function readableOn(colour: string) {
  const [r = 0, g = 0, b = 0] = colour.slice(1).match(/../g)!.map((pair) => (parseInt(pair, 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

/** Sends a page. `aside` ends its head line; the page that has one is wide. */
function page(server: Server, c: Context, status: PageStatus = 200, title: string, body: Html, aside?: Html | false) {
  const { issuer, pages: { title: own, accent } } = server;
  const [name, nonce] = [serverName(server), random(16)];
  const colours = accent ? `:root{--accent:${accent};--on-accent:${readableOn(accent)}}` : "";
  const address = own && html`<span>${issuer.replace("https://", "")}</span>`;
  const document = html`
    <!doctype html>
    <html lang="en">
      <meta charset="utf-8">
      <meta name="viewport" content="width=device-width, initial-scale=1">
      <meta name="robots" content="noindex">
      <title>${title} · ${name}</title>
      <style nonce="${nonce}">${raw(STYLE + colours)}</style>
      <main class="${aside !== undefined && "wide"}"><header><b>${name}</b>${address}${aside}</header>${body}</main>
    </html>
  `;
  return c.html(document, status, {
    // No script, frame or image: nobody can decorate or frame the page. No form-action: browsers apply it to the
    // redirect after the form too, and would stop the way back to the app.
    "Content-Security-Policy":
      `default-src 'none'; style-src 'nonce-${nonce}'; frame-ancestors 'none'; base-uri 'none'`,
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin", // not no-referrer: the form would then be sent with Origin: null
  });
}

// --- Stores ---

/** Keeps state in memory, for tests. */
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
      const keys = [...entries.keys()].filter((key) => key.startsWith(prefix)).sort();
      for (const key of keys) yield* listed(key, entries.get(key));
    },
    version: () => changes,
  };
}

type Update = [key: string, change: Change, options?: { expiresAt?: number } | undefined];
/** A change that our own stores also tell of what has expired: if it returns that, nothing is written. */
type Change = (current: unknown, expired?: unknown) => unknown;
type Entry = { value: string; expires: number | null; mark?: string }; // the value as JSON: nobody else holds it
type Write = (key: string, entry?: Entry) => void;

function valueOf(entry: Entry | undefined): unknown {
  const isLive = entry && (entry.expires === null || entry.expires > seconds());
  return isLive ? JSON.parse(entry.value) : undefined;
}

/** Returns what `list` yields for an entry: nothing once it has expired. */
function listed(key: string, entry: Entry | undefined): [key: string, value: unknown][] {
  const value = valueOf(entry);
  return value === undefined ? [] : [[key, value]];
}

/** Returns what `update` answers. Writes the entry if it changes, or none to delete it. */
function applyChange(found: Entry | undefined, [key, change, options]: Update, write: Write) {
  const current = valueOf(found);
  const next = change(current, found);
  if (next === found) return undefined;
  if (next === undefined) write(key); // also an expired one: the clock may be set back
  else if (next !== current) {
    const kept = current === undefined ? null : found!.expires;
    write(key, { value: JSON.stringify(next), expires: options?.expiresAt ?? kept });
  }
  return next;
}

const APPLICATION_ID = 0x6d637061; // "mcpa" in ASCII: marks a file as ours
const FORMAT = 2; // which tables a file has
const LOCK_PATIENCE = 5000; // ms
const STORE_DEADLINE = 8000; // ms: Claude waits ten seconds
const LAST_CHARACTER = "\u{10ffff}"; // follows a prefix to make the end of its keys

/**
 * Keeps state in one SQLite file, `<dir>/oauth.sqlite`. What `update` has answered survives `kill -9` and a power cut.
 * Processes on one machine may share it, but not over a network file system. While it is removed or replaced, every
 * call throws.
 *
 * @throws {Error} if the folder cannot be written, or the file is damaged or not ours; it is then left as it is.
 */
export function fileStore(dir: string): Store {
  assert(typeof dir === "string" && dir !== "", `fileStore: dir must be the path of a folder, such as ".oauth-state"`);
  assert(!/^~([\\/]|$)/.test(dir), `fileStore: only a shell replaces ~, so write the whole path, not ${quote(dir)}`);
  const { db, file } = openStateFile(dir);
  const { select, range, writeTogether } = prepareStatements(db);
  const { assertInPlace, look } = watchFile(db, file);
  const { add, flush } = batch((updates) => retry(() => writeTogether(updates), assertInPlace));
  return {
    get: (key) => retry(() => valueOf(select.get(key)), look),
    update: (...update) => add(update),
    async *list(prefix) {
      const rows = await retry(() => range.all(prefix, prefix + LAST_CHARACTER), look);
      for (const row of rows) yield* listed(row.key, row);
    },
    version: look,
    close() {
      flush();
      db.close();
    },
  };
}

// deno-lint-ignore no-explicit-any
type Sqlite = any; // DatabaseSync of node:sqlite, whose types not every project has

let commits = 0; // of all file stores in this process

function prepareStatements(db: Sqlite) {
  const select = db.prepare("SELECT value, expires FROM entries WHERE key = ?");
  const range = db.prepare("SELECT * FROM entries WHERE key >= ? AND key < ? ORDER BY key");
  const upsert = db.prepare(`INSERT INTO entries VALUES (?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = excluded.expires`);
  const remove = db.prepare("DELETE FROM entries WHERE key = ?");
  // Two per change: nothing waits. The latest stay, because a clock that was wrong must not cost a connection.
  const sweep = db.prepare(`DELETE FROM entries WHERE key IN
    (SELECT key FROM entries WHERE expires < ? ORDER BY expires DESC LIMIT 2 OFFSET 1000)`);

  /** Performs all updates in one transaction: the commit dominates the cost. */
  function writeTogether(updates: Update[]) {
    let changed = false;
    const write: Write = (key, entry) => {
      changed = true;
      if (entry) upsert.run(key, entry.value, entry.expires);
      else remove.run(key);
      sweep.run(seconds());
    };
    try {
      db.exec("BEGIN IMMEDIATE");
      const answers = updates.map((update) => applyChange(select.get(update[0]), update, write));
      db.exec("COMMIT");
      if (changed) commits++;
      return answers;
    } finally {
      if (db.isTransaction) db.exec("ROLLBACK"); // after some faults SQLite has done it
    }
  }

  return { select, range, writeTogether };
}

/** Tells whether an open state file is still the one in the folder, and by a number whether it has changed. */
function watchFile(db: Sqlite, file: string) {
  const { statSync } = nodeModule("node:fs");
  const identify = (name: string) => {
    const { dev, ino } = statSync(name, { throwIfNoEntry: false }) ?? {};
    return `${dev} ${ino}`;
  };
  const names = [file, `${file}-wal`, `${file}-shm`];
  const opened = names.map(identify);
  const othersCommits = db.prepare("PRAGMA data_version");
  let others = 0;
  let lookedAt = -Infinity;

  function assertInPlace() {
    const missing = names.find((name, i) => identify(name) !== opened[i]);
    const fault = "was removed or replaced while open: no call works until it is back or the server is restarted";
    if (missing) throw new StateFileError(missing, fault);
  }

  /** Looks once a millisecond: a token revoked by another process might have been used just before. */
  function look() {
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

/** Repeats a call while another process has the lock: SQLite's own wait would stop the server. */
async function retry<T>(call: () => T | Promise<T>, check = () => {}): Promise<T> {
  const deadline = performance.now() + LOCK_PATIENCE;
  for (let wait = 1;; wait = Math.min(wait * 2, 50)) {
    try {
      check(); // or a write to a deleted log may end in a file that others use
      const answer = call();
      check(); // or a write that is gone after a restart is answered as done
      return await answer;
    } catch (error) {
      if (!isLocked(error) || performance.now() > deadline) throw error;
      await delay(wait * (0.5 + Math.random()));
    }
  }
}

const isLocked = (error: unknown) =>
  error instanceof Error && /database (table )?is locked|busy/i.test(error.message) &&
  !(error instanceof StateFileError); // its path may say anything

/** Performs the updates of two turns of the event loop together. If that fails, each is tried alone. */
function batch(perform: (updates: Update[]) => Promise<unknown[]>) {
  const { setImmediate } = nodeModule("node:timers");
  let updates: Update[] = [];
  let answers = Promise.withResolvers<unknown[]>();

  function flush() {
    if (updates.length === 0) return;
    const [together, { resolve }] = [updates, answers];
    [updates, answers] = [[], Promise.withResolvers()];
    resolve(perform(together));
  }

  async function add(update: Update) {
    // In the turn after the next, so that whoever was just answered may join in: fewer commits under load.
    if (updates.length === 0) setImmediate(() => setImmediate(flush));
    const position = updates.push(update) - 1;
    try {
      return (await answers.promise)[position];
    } catch (error) {
      if (isLocked(error)) throw error; // each has waited long enough
      return (await perform([update]))[0];
    }
  }

  return { add, flush };
}

class StateFileError extends Error {
  constructor(file: string, fault: string, cause?: unknown) {
    super(`${quote(file)} ${fault}`, { cause });
  }
}

function openStateFile(dir: string) {
  nodeModule("node:sqlite"); // a runtime without it is no fault of the file
  const file: string = nodeModule("node:path").resolve(dir, "oauth.sqlite"); // the working folder may change
  let db: Sqlite;
  let fault = "cannot be written: make it writable for this user, with its folder, and see that there is room";
  try {
    ensureStateFile(dir, file);
    fault = "cannot be read and was left as it is: put a backup in its place, or move it away, with its -wal and -shm";
    checkStateFile(file);
    db = openSqlite(file);
    // This makes the log and its index, too.
    db.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 0");
    return { db, file };
  } catch (cause) {
    db?.close();
    if (cause instanceof StateFileError) throw cause;
    const { name, message } = cause as Error; // Deno's message names the flag
    if (name === "NotCapable") fault = `cannot be written: Deno was started without a permission. ${message}`;
    throw new StateFileError(file, fault, cause);
  }
}

/** Opens an SQLite file that waits for locks by itself, as retry() does later. */
function openSqlite(file: string, options = {}): Sqlite {
  return new (nodeModule("node:sqlite").DatabaseSync)(file, { timeout: LOCK_PATIENCE, ...options });
}

function ensureStateFile(dir: string, file: string) {
  const fs = nodeModule("node:fs");
  const mark = random(4);
  const fresh = `${file}.${mark}.new`;
  fs.mkdirSync(dir, { recursive: true, mode: 0o700 });
  try {
    // Always: Deno's accessSync() overlooks a read-only file system. SQLite gives its side files this mode too.
    fs.closeSync(fs.openSync(fresh, "wx", 0o600));
    if (!fs.existsSync(file)) {
      // SQLite would take the log of a file that was moved away for the new one's. Looks for the file again, because
      // another process may make it, and its log, at this moment.
      const isOrphaned = fs.existsSync(`${file}-wal`) && !fs.existsSync(file);
      const fault = "is there without its state file: put that back, or move -wal and -shm away as well";
      if (isOrphaned) throw new StateFileError(`${file}-wal`, fault);
      createStateFile(fresh, file);
    }
  } catch (error) {
    if ((error as { code?: string }).code !== "EEXIST") throw error; // another process was faster
  } finally {
    removeTemporaryFiles(dir, mark);
  }
  fs.accessSync(file, fs.constants.R_OK | fs.constants.W_OK);
}

/** Makes the file elsewhere and puts it in place whole: one without our mark is always damage. */
function createStateFile(fresh: string, file: string) {
  const fs = nodeModule("node:fs");
  const db = openSqlite(fresh);
  // In WAL mode at once: after a kill there would be a journal, which the read-only check cannot roll back.
  db.exec(`PRAGMA application_id = ${APPLICATION_ID}; PRAGMA user_version = ${FORMAT};
    CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL);
    CREATE INDEX expiring ON entries (expires) WHERE expires IS NOT NULL;
    PRAGMA journal_mode = WAL`);
  db.close();
  try {
    fs.linkSync(fresh, file); // unlike a rename, it replaces nothing
  } catch { // no hard links here; "wx" replaces nothing either
    fs.writeFileSync(file, fs.readFileSync(fresh), { flag: "wx", mode: 0o600, flush: true });
  }
}

/** Removes what this start made, and what a killed one left a minute ago. */
function removeTemporaryFiles(dir: string, mark: string) {
  const fs = nodeModule("node:fs");
  for (const name of fs.readdirSync(dir)) {
    if (!/^oauth\.sqlite\.[0-9a-f]{8}\.new(-\w+)?$/.test(name)) continue;
    try {
      const isOld = Date.now() - fs.statSync(`${dir}/${name}`).mtimeMs > MINUTE * 1000;
      if (isOld || name.includes(mark)) fs.rmSync(`${dir}/${name}`);
    } catch {
      // It is gone, or a virus scanner holds it; a later start removes it.
    }
  }
}

/** Throws unless this is a sound state file of ours. Only reads: SQLite may change a damaged one, or its log. */
function checkStateFile(file: string) {
  assert(nodeModule("node:fs").statSync(file).size > 0, "it is empty"); // SQLite would delete its log
  // By SQLite: any other close of the file drops this process's locks on it (POSIX).
  const db = openSqlite(file, { readOnly: true });
  const pragma = (name: string) => db.prepare(`PRAGMA ${name}`).get()[name];
  try {
    const foreign = "is not a state file of this program: choose another folder, or move it away";
    if (pragma("application_id") !== APPLICATION_ID) throw new StateFileError(file, foreign);
    const format = pragma("user_version");
    const strange = `has format ${format}, not ${FORMAT}: update mod.ts if a newer version wrote it, or move it away`;
    if (format !== FORMAT) throw new StateFileError(file, strange);
    const verdict = pragma("quick_check");
    assert(verdict === "ok", verdict);
    db.prepare("SELECT key FROM entries");
  } finally {
    db.close();
  }
}

/** The part of a `Deno.Kv` that is used here. `expireIn` is in milliseconds. */
export type KvLike = {
  get(key: string[]): Promise<{ value: unknown; versionstamp: string | null }>;
  list(selector: { start: string[]; end: string[] }): AsyncIterable<{ key: readonly unknown[]; value: unknown }>;
  atomic(): {
    check(entry: { key: string[]; versionstamp: string | null }): unknown;
    set(key: string[], value: unknown, options?: { expireIn?: number }): unknown;
    delete(key: string[]): unknown;
    commit(): Promise<{ ok: boolean }>;
  };
  close(): void;
};

/**
 * Keeps state in a `Deno.Kv`: a local file, Deno Deploy or denokv. `await Deno.openKv()` makes one; so does `openKv()`
 * of `@deno/kv` on Node and Bun. All three read what the others wrote.
 */
export function kvStore(kv: KvLike): Store {
  assert(typeof kv?.atomic === "function", "kvStore needs an open Deno.Kv: kvStore(await Deno.openKv())");
  const path = (key: string) => ["personal-auth", key];
  const turns = new Map<string, Promise<void>>();

  function compareAndSet(update: Update) {
    const [key] = update;
    const mark = random(8);
    let next: unknown;
    return retry(async () => {
      const { value, versionstamp } = await kv.get(path(key));
      const found = decodeEntry(key, value);
      // A KV's client repeats a commit whose answer was lost, and loses the race against itself.
      if (found?.mark === mark) return next;
      let committed = Promise.resolve({ ok: true });
      next = applyChange(found, update, (_, entry) => {
        const atomic = kv.atomic();
        atomic.check({ key: path(key), versionstamp });
        if (entry) atomic.set(path(key), encodeEntry(key, { ...entry, mark }), removal(entry));
        else atomic.delete(path(key));
        committed = atomic.commit();
      });
      if (!(await committed).ok) throw new Error("the key is busy: another process changed it");
      return next;
    });
  }

  return {
    get: (key) => retry(async () => valueOf(decodeEntry(key, (await kv.get(path(key))).value))),
    update(...update) {
      const [key] = update;
      // In turn, to race against other processes only.
      const turn = (turns.get(key) ?? Promise.resolve()).then(() => compareAndSet(update));
      // One that never ends must not hold up its key.
      const over: Promise<void> = withDeadline(turn).catch(() => {}).then(() => {
        if (turns.get(key) === over) turns.delete(key);
      });
      turns.set(key, over);
      return turn;
    },
    async *list(prefix) {
      const range = { start: path(prefix), end: path(prefix + LAST_CHARACTER) };
      for await (const { key: [, name], value } of kv.list(range)) {
        const key = String(name);
        yield* listed(key, decodeEntry(key, value));
      }
    },
    close: () => kv.close(),
  };
}

/** Lets the KV remove an entry long after its expiry, because our clock may have been wrong. */
const removal = ({ expires }: Entry) =>
  expires === null ? {} : { expireIn: Math.max(0, Math.ceil((expires - seconds() + 30 * DAY) * 1000)) };

/** Writes `[expires, value, mark]` as bytes: anything else depends on the version of V8. */
function encodeEntry(key: string, { value, expires, mark }: Entry) {
  const bytes = utf8.encode(`[${JSON.stringify(expires)},${value},"${mark}"]`);
  assert(bytes.length <= 65536, `${quote(key)} would take ${bytes.length} bytes, and a Deno.Kv holds 65536`);
  return bytes;
}

function decodeEntry(key: string, bytes: unknown): Entry | undefined {
  if (bytes === null) return undefined;
  try {
    const [expires, value, mark] = JSON.parse(new TextDecoder().decode(bytes as Uint8Array));
    assert(value !== undefined && (expires === null || typeof expires === "number"), "It is not [expires, value]");
    return { expires, value: JSON.stringify(value), mark };
  } catch (cause) {
    const found = `The value of ["personal-auth", ${quote(key)}] was not written by personal-auth`;
    throw new Error(`${found} and was left as it is: delete it, or open another KV`, { cause });
  }
}

function withDeadline<T>(answer: Promise<T>) {
  return new Promise<T>((resolve, reject) => {
    const late = () => reject(new Error(`the store has not answered for ${STORE_DEADLINE / 1000} seconds`));
    const timer = setTimeout(late, STORE_DEADLINE);
    answer.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/** Wraps the store: if it fails or is too slow, the answer is 503. */
function guardStore(store: Store, emit: Emit): Store {
  async function guarded<T>(ask: (changeInTime: Change) => Promise<T>, change?: Change): Promise<T> {
    let isOver = false;
    // A store that wakes up late must not change anything: the client was answered 503.
    const changeInTime: Change = (current, expired) => {
      assert(!isOver, "the store came back after the answer: nothing was changed");
      return change!(current, expired);
    };
    try {
      return await withDeadline(promiseTry(() => ask(changeInTime)));
    } catch (cause) {
      emit("server_error", "the store failed", { cause });
      const details = { status: 503, headers: { "Retry-After": "5" } } as const;
      throw new OAuthError("server_error", "The server cannot reach its state; try again", details);
    } finally {
      isOver = true;
    }
  }

  return {
    version() {
      try {
        return store.version?.();
      } catch {
        return undefined; // get() will say what is wrong
      }
    },
    get: (key) => guarded(() => store.get(key)),
    update: (key, change, options) => guarded((changeInTime) => store.update(key, changeInTime, options), change),
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

/** Returns seconds since the epoch, with their fraction. No two calls return the same. */
function seconds() {
  const now = Date.now() / 1000;
  latest = now > latest || latest - now > 1 ? now : latest + 1e-6; // a clock that was set back is followed
  return latest;
}

/** Says how far a moment is from now, in the largest unit that fits. */
function fromNow(seconds: number) {
  const units = [["month", 30 * DAY], ["day", DAY], ["hour", HOUR], ["minute", MINUTE]] as const;
  const [unit, size] = units.find(([, size]) => Math.abs(seconds) >= size) ?? ["second", 1];
  return RELATIVE_TIME.format(Math.trunc(seconds / size), unit);
}

const RELATIVE_TIME = new Intl.RelativeTimeFormat("en");
const ago = (seconds: number) => fromNow(-Math.max(0, seconds));

const hex = (bytes: Uint8Array) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const unhex = (text: string) => Uint8Array.from(text.match(/../g) ?? [], (digits) => parseInt(digits, 16));
const random = (bytes: number) => hex(crypto.getRandomValues(new Uint8Array(bytes)));

function base64url(bytes: Uint8Array) {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function base64Bytes(text: string) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
}

/** Returns `undefined` if the text is neither base64 nor base64url. */
function decodeBase64(text: string) {
  try {
    return new TextDecoder().decode(base64Bytes(text));
  } catch {
    return undefined;
  }
}

/** Used where it exists: Web Crypto takes forty times as long for a digest. */
const nodeCrypto = once(() => nodeModule("node:crypto", {}));

const sha256 = async (text: string) => new Uint8Array(await crypto.subtle.digest("SHA-256", utf8.encode(text)));

/** Makes a code_challenge. @see https://www.rfc-editor.org/rfc/rfc7636#section-4.2 */
const s256 = async (code_verifier: string) => base64url(await sha256(code_verifier));

/** Hashes a secret for the store. A random one needs no slow hash. */
async function hashToken(token: string): Promise<string> {
  const { hash } = nodeCrypto();
  return hash ? hash("sha256", token, "base64url") : base64url(await sha256(token));
}

async function hmac(key: string) {
  const { createHmac } = nodeCrypto();
  if (createHmac) return (text: string): string => createHmac("sha512", key).update(text).digest("hex");
  const algorithm = { name: "HMAC", hash: "SHA-512" };
  const imported = await crypto.subtle.importKey("raw", utf8.encode(key), algorithm, false, ["sign"]);
  return async (text: string) => hex(new Uint8Array(await crypto.subtle.sign("HMAC", imported, utf8.encode(text))));
}

/** Computes HMAC-SHA-512 under the server's key, in hex. `purpose` keeps one use apart from another. */
type Mac = (purpose: string, ...parts: string[]) => Promise<string>;

/** Makes the server's MAC. Its key, drawn at the first start, opens nothing: tokens are checked in the store. */
function serverMac(store: Store, issuer: string, emit: Emit): Mac {
  const keyed = once(async () => {
    let before: { key: string; issuer: string } | undefined;
    const { key } = await store.update("server", (current) => {
      before = current as typeof before;
      return before?.issuer === issuer ? before : { key: before?.key ?? random(32), issuer };
    }) as NonNullable<typeof before>;
    if (before && before.issuer !== issuer) {
      const found = `this store was last used by a server at ${quote(before.issuer)}`;
      const advice = "if it still runs, give each its own store; if the address has changed, connect all clients again";
      emit("store_shared", `${found}: ${advice}`);
    }
    return hmac(key);
  });
  // JSON, so that no two lists of parts become the same bytes.
  return async (purpose, ...parts) => (await keyed())(JSON.stringify([purpose, ...parts]));
}

/** Compares in constant time; leaks only the lengths. */
function equal(a: string, b: string) {
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

/** Drops the members that are undefined. */
function defined<T extends Record<string, unknown>>(members: T) {
  const entries = Object.entries(members).filter(([, value]) => value !== undefined);
  return Object.fromEntries(entries) as { [K in keyof T]?: Exclude<T[K], undefined> };
}

/** Quotes any value: short, on one line, in ASCII, so that it cannot forge a log entry. */
function quote(value: unknown) {
  const json = JSON.stringify(value) ?? String(value);
  const escape = (char: string) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return json.slice(0, 200).replace(/[^\x20-\x7e]/g, escape);
}

/** Returns a module of Node's where it is used, so that this file loads without it. */
// deno-lint-ignore no-explicit-any
function nodeModule(name: string, otherwise?: object): any {
  const { process } = globalThis as { process?: { getBuiltinModule?: (name: string) => unknown } };
  const module = process?.getBuiltinModule?.(name) ?? otherwise;
  if (!module) throw new Error(`${name} is missing here: Deno 2.9, Bun 1.4 and Node 22.18 have it`);
  return module;
}

/** Reads OAuth parameters. @see https://www.rfc-editor.org/rfc/rfc6749#section-3.1 */
function parameters(encoded: string, repeatable = "resource") {
  const seen = new Set<string>();
  const known = new URLSearchParams();
  for (const [name, value] of new URLSearchParams(encoded)) {
    if (value === "") continue; // counts as absent
    const isRepeated = seen.has(name) && name !== repeatable; // two parsers may take different ones
    if (isRepeated) throw invalidRequest(`The parameter ${quote(name)} is given more than once`);
    if (seen.size >= 100) throw invalidRequest("The request has too many parameters"); // a lookup walks over all
    seen.add(name);
    known.append(name, value);
  }
  return known;
}

async function readForm(c: Context, repeatable?: string) {
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

async function readBody(c: Context, type: string) {
  if (c.req.header("Content-Type")?.split(";", 1)[0]?.trim().toLowerCase() !== type) {
    throw invalidRequest(`The Content-Type must be ${type}`, { status: 415 });
  }
  const announced = Number(c.req.header("Content-Length"));
  // No more arrives than was announced, but for chunks (RFC 9112 §6.3), which are counted and slower to read.
  const isBounded = announced <= MAX_BODY_BYTES && c.req.header("Transfer-Encoding") === undefined;
  try {
    if (announced > MAX_BODY_BYTES) throw new TooLarge();
    const text = isBounded ? await c.req.text() : await readLimited(c.req.raw.body, MAX_BODY_BYTES);
    if (text.length > MAX_BODY_BYTES) throw new TooLarge(); // in process
    return text;
  } catch (cause) {
    if (!(cause instanceof TooLarge)) throw invalidRequest("The body did not arrive whole", { cause });
    // The rest would be taken for the next request, so the connection ends.
    const details = { status: 413, headers: { Connection: "close" } } as const;
    throw invalidRequest(`The body is larger than ${MAX_BODY_BYTES} bytes`, details);
  }
}

class TooLarge extends Error {}

async function readLimited(stream: ReadableStream<Uint8Array> | null, limit: number) {
  const reader = stream?.getReader(); // not every set of types can iterate a stream
  const decoder = new TextDecoder();
  let [text, length] = ["", 0];
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
 * An error in OAuth's own form. `code` and `message` go to the client; the reason is for the owner.
 * @see https://www.rfc-editor.org/rfc/rfc6749#section-5.2
 */
export class OAuthError extends Error {
  /** The name of the class. */
  override name = "OAuthError";
  /** The standard's error code, such as `invalid_grant`. */
  readonly code: string;
  /** The HTTP status. */
  readonly status: NonNullable<OAuthErrorDetails["status"]>;
  /** HTTP headers of the answer. */
  readonly headers: Record<string, string>;
  /** What it was made with. */
  readonly details: OAuthErrorDetails;

  /** Makes an error; `description` is for the client's developer. */
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

function asOAuthError({ emit }: Server, error: unknown): OAuthError {
  if (error instanceof OAuthError) return error;
  emit("server_error", "an unexpected error", { cause: error }); // the wire is told nothing of it
  return new OAuthError("server_error", "Something went wrong here", { status: 500 });
}

function errorResponse(server: Server, c: Context, thrown: unknown): Response | Promise<Response> {
  const { code, message, status, headers } = asOAuthError(server, thrown);
  // A 401 must say how to authenticate (RFC 9110 §15.5.2); the guard's own says it by itself.
  const basic = status === 401 && { "WWW-Authenticate": 'Basic realm="token"' };
  const body = { error: code, error_description: errorDescription(message) };
  return c.json(body, status, { ...FIXED_HEADERS, ...basic, ...headers });
}

function errorPage(server: Server, c: Context, thrown: unknown): Response | Promise<Response> {
  const { message, status, headers } = asOAuthError(server, thrown);
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
  const title = status < 500 ? "This request cannot be answered" : "Something went wrong here";
  return messagePage(server, c, status, title, `${message}.`);
}

const grantFunctions = { approveGrant, redeemGrant, refreshGrant, verifyGrant, presentGrant, revokeGrant };

/** Parts that tests check on their own: they may change. */
// deno-lint-ignore no-explicit-any
export const internals: any = { ...grantFunctions, isPublicAddress };

// --- Setup check ---

/** One thing that {@linkcode checkSetup} looked at. */
export type SetupFinding = {
  heading: "Address" | "Guard" | "Discovery" | "Sign-in" | "Browser apps";
  /** `failed`: some client cannot connect. `warning`: some clients stumble, or it is weaker than need be. */
  result: "ok" | "warning" | "failed";
  /** What was found, or the name of the check that passed. */
  what: string;
  /** What any server should do instead. */
  fix?: string;
  /** The same for a server with `personalAuth()`, where it can be named. */
  withPersonalAuth?: string;
};

/** The result of {@linkcode checkSetup}. */
export type SetupReport = {
  url: string;
  /** `unreachable`: no answer came at all. */
  verdict: "ready" | "broken" | "unreachable";
  findings: SetupFinding[];
  /** What to type into Claude, or the one thing to repair first. */
  next: string[];
};

/** Options of {@linkcode checkSetup}. */
export type SetupOptions = {
  /** Called before each request with its method and path. */
  onProgress?: (what: string) => void;
  /** Replaces the built-in `fetch`. */
  fetch?: (request: Request) => Response | Promise<Response>;
  /** An access token, to call `initialize` and `tools/list` as well. */
  token?: string | undefined;
};

/** What is said where a check fails → the fix → the fix with `personalAuth()`. `{}`: what was found. */
const CHECKS = {
  "public address": "{} is this computer → For claude.ai, use the https address of a tunnel.",
  "https": "The address is http → Use https: clients send no token over http.",
  "port 443": "The port is {} → Use 443: claude.ai reaches no other.",
  "no slash at the end": "The address ends with a slash → Leave it out.",
  "answer": "No answer from {} → Check DNS, the port and the certificate.",
  "proxy": "The proxy answers {}, your server does not → Start the server on the proxy's port.",
  "own URLs":
    "The server names {}, which is not asked → Build https URLs from the public base URL. → set baseUrl to it",
  "speed": "It takes {} s → Answer sooner: Claude gives up after 10 s.",
  "closed": 'Anybody is let in: {} → Check the token first. → app.all("/mcp", auth.guard, handler)',
  "path": "Nothing is served at {}: it answers 404 → Check path and proxy. → type the path of mcpPath",
  "401": "A request without a token is answered {} → Send 401: no redirect, login, 405 or 406. → put auth.guard first",
  "challenge": 'The 401 has no {} → Send WWW-Authenticate: Bearer resource_metadata="…", scope="…".',
  "Claude-User": "The user agent Claude-User is answered {} → Allow it (Cloudflare: Block AI bots).",
  "Authorization": "The token did not arrive: the proxy drops Authorization → Pass it on (Apache: CGIPassAuth On).",
  "invalid token": 'A made-up token is answered {} → Send 401 with error="invalid_token"; let the proxy pass both.',
  "calls": "With the token, {} → Use a valid token, or see the server's log.",
  "tool names": "Claude refuses the tools named {} → Use at most 64 letters, digits, _ and -.",
  "metadata": "Metadata is incomplete: {} → Serve it as application/json (RFC 9728, RFC 8414), or answer 404.",
  "resource": "resource is {} → Send the typed address byte for byte, without a slash at its end. → correct baseUrl",
  "issuer": "issuer is {} → Repeat authorization_servers byte for byte; mind a slash at the end.",
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

/** Ends the check: all else would fail for the same reason. */
class RootCause extends Error {}

/**
 * Asks any MCP server what a client will ask, from outside and without a password. Registers a client, and starts an
 * authorization that it never finishes.
 *
 * @throws {TypeError} if `mcpUrl` is not an http or https URL, or `token` cannot be a token.
 */
export async function checkSetup(mcpUrl: string, options: SetupOptions = {}): Promise<SetupReport> {
  const typed = webUrl(mcpUrl);
  assert(typed, `Give the URL that you type into Claude, such as "https://your-domain.com/mcp"`);
  typed.hash = "";
  // RFC 6750 §2.1; of anything else, the message of fetch() holds the token.
  assert(/^[\w.~+/-]+=*$/.test(options.token || "x"), "The token holds a character that no token has");
  const checkup = startCheckup(typed, options);
  const below = (heading: SetupFinding["heading"]) => Object.assign(checkup, { heading });
  try {
    checkAddress(checkup);
    const metadataUrl = await checkGuard(below("Guard"));
    const server = await checkDiscovery(below("Discovery"), metadataUrl);
    await checkSignIn(below("Sign-in"), server);
    await checkCors(below("Browser apps"), server);
  } catch (error) {
    if (!(error instanceof RootCause)) throw error;
  }
  const { findings, next } = checkup;
  const url = typed.href;
  const failed = findings.find(({ result }) => result === "failed");
  if (failed) {
    const verdict = findings.at(-1)!.heading === "Address" ? "unreachable" : "broken";
    return { url, verdict, findings, next: [`Repair this first: ${failed.what}`] };
  }
  next.push(`claude.ai: Customize → Connectors → Add, and type ${url}`);
  const quoted = /[^\w:/.~%-]/.test(url) ? `'${url.replaceAll("'", "%27")}'` : url; // for a shell
  next.push(`Claude Code: claude mcp add --transport http personal ${quoted}`);
  return { url, verdict: "ready", findings, next };
}

type Checkup = ReturnType<typeof startCheckup>;

/** Returns what the stages share. */
function startCheckup(url: URL, { token = "", onProgress, fetch: send = fetch }: SetupOptions) {
  const state = {
    heading: "Address" as SetupFinding["heading"],
    findings: [] as SetupFinding[],
    next: [] as string[],
    answered: "", // the latest answer
  };
  const judge =
    (result: "warning" | "failed", isRootCause = false) =>
    (good: unknown, check: keyof typeof CHECKS, found: unknown = state.answered) => {
      const { heading, findings } = state;
      if (good) {
        findings.push({ heading, result: "ok", what: check });
        return true;
      }
      const plain = isString(found) && token ? found.replaceAll(token, "[token]") : found;
      // Quoted in ASCII, so that it controls no terminal. An object may be too deep for JSON.stringify().
      const shown = plain instanceof Object ? "an object" : quote(plain);
      const [what = "", fix, withPersonalAuth] = CHECKS[check].replace("{}", () => shown).split(" → ");
      findings.push({ heading, result, what, ...defined({ fix, withPersonalAuth }) });
      if (isRootCause) throw new RootCause();
      return false;
    };
  const should = judge("warning"); // else some clients stumble
  const must = judge("failed"); // else some client cannot connect
  const need = judge("failed", true); // else everything after it fails as well

  /** Asks one question, for at most 30 seconds and 1 MB. Ends the check if nothing usable answers. */
  async function ask(place: unknown, headers = {}, body?: object, method = body ? "POST" : "GET") {
    const target = place instanceof URL ? place : webUrl(place);
    onProgress?.(`${method} ${target?.pathname}`);
    const limit = new AbortController(); // AbortSignal.timeout() with a listener would keep the process alive
    const timer = setTimeout(() => limit.abort(), 30_000);
    try {
      if (!target || !await inTime(mayAsk(target, url), limit.signal)) need(false, "own URLs", target?.href ?? place);
      const request = new Request(target!.href, {
        method,
        headers: { "User-Agent": "python-httpx/0.28.1", Accept: "*/*", ...headers }, // as hosted Claude
        body: body instanceof URLSearchParams ? body : JSON.stringify(body),
        redirect: "manual", // it could lead to an inside address
        signal: limit.signal,
      });
      const answer = await inTime(exchange(request, send), limit.signal);
      // A busy server answers in JSON (RFC 6749 §5.2), a proxy with a page.
      if ([502, 503, 504].includes(answer.status) && !answer.json) need(false, "proxy", answer.status);
      state.answered = `${method} ${target!.pathname}: ${answer.summary}`;
      return answer;
    } catch (error) {
      if (error instanceof RootCause) throw error;
      if (state.findings.at(-1)?.heading === "Address") state.heading = "Address"; // nothing was ever answered
      const { message, cause } = error as Error;
      need(false, "answer", `${target?.host}: ${message}${cause instanceof Error ? `: ${cause.message}` : ""}`);
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }
  return Object.assign(state, { url, resource: url.href.replace(/\/$/, ""), token, ask, should, must, need });
}

/** Parses an http or https URL without credentials, which fetch() refuses. */
function webUrl(value: unknown, base?: URL): URL | undefined {
  const url = isString(value) && value.length < 8192 ? URL.parse(value, base?.href) : undefined;
  return url && /^https?:\/\/[^/@]+\//.test(url.href) ? url : undefined;
}

/** Tells whether a URL may be asked: a hostile server could name what only this computer reaches. */
async function mayAsk({ origin, hostname, protocol }: URL, typed: URL): Promise<boolean> {
  if (origin === typed.origin || (isLoopback(hostname) && isLoopback(typed.hostname))) return true;
  if (protocol !== "https:") return false;
  const { lookup } = nodeModule("node:dns").promises;
  // If the addresses change after this, the certificate does not fit.
  const found: { address: string }[] = await lookup(hostname, { all: true }).catch(() => []);
  return found.length > 0 && found.every(({ address }) => isPublicAddress(address));
}

const MAX_ANSWER_BYTES = 1024 * 1024;

async function exchange(request: Request, fetch: NonNullable<SetupOptions["fetch"]>) {
  const start = seconds();
  const { status, ok, headers, body } = await fetch(request);
  const type = headers.get("Content-Type") ?? "";
  const isStream = type.startsWith("text/event-stream");
  const isCall = ok && request.method === "POST";
  const text = await (isStream ? readMessage(body, isCall) : readLimited(body, MAX_ANSWER_BYTES));
  const parsed: unknown = /json|event-stream/i.test(type) && await new Response(text).json().catch(() => {});
  const json = isObject(parsed) ? parsed : undefined;
  const location = headers.get("Location") ?? "";
  const summary = `${status} ${location || `${type} ${text}`}`;
  return { status, ok, headers, location, text, json, summary, took: seconds() - start };
}

/** Reads the first JSON-RPC response of an event stream, which may stay open. */
async function readMessage(stream: Response["body"], isCall: boolean): Promise<string> {
  const [reader, decoder] = [stream?.getReader(), new TextDecoder()];
  let [line, length] = ["", 0];
  try {
    while (reader && isCall && length < MAX_ANSWER_BYTES) {
      const { done, value } = await reader.read();
      if (done) break;
      length += value.length;
      for (const char of decoder.decode(value, { stream: true })) {
        if (char !== "\n") line += char;
        else if (/^data:.*"(result|error)":/.test(line)) return line.slice("data:".length);
        else line = "";
      }
    }
    return "";
  } finally {
    reader?.cancel().catch(() => {});
  }
}

function checkAddress({ url, need, must, should }: Checkup) {
  if (should(!isLoopback(url.hostname), "public address", url.host)) {
    need(url.protocol === "https:", "https");
    must(url.port === "", "port 443", Number(url.port));
  }
  should(!/.\/$/.test(url.pathname), "no slash at the end");
}

const AS_JSON = { "Content-Type": "application/json" };
const AS_CLAUDE = {
  ...AS_JSON,
  Accept: "application/json, text/event-stream",
  "MCP-Protocol-Version": "2025-11-25",
  "User-Agent": "Claude-User",
};
const AS_BROWSER = { Accept: "text/html", "User-Agent": "Mozilla/5.0" };
const PARAMS = { protocolVersion: "2025-11-25", capabilities: {}, clientInfo: { name: "setup-check", version: "1" } };
const INITIALIZE = { jsonrpc: "2.0", id: 0, method: "initialize", params: PARAMS };

/** Asks without a token, and returns where the metadata is: a client learns that from the 401. */
async function checkGuard(checkup: Checkup) {
  const { url, token, ask, need, must, should } = checkup;
  const { status, ok, headers, took } = await ask(url, AS_JSON, INITIALIZE);
  need(!ok, "closed");
  need(status !== 404, "path", url.pathname);
  need(status === 401, "401");
  (took < 10 ? should : must)(took < 3, "speed", Math.round(took));
  const challenge = headers.get("WWW-Authenticate")?.slice(0, 8192) ?? "";
  if (must(/^Bearer\b/i.test(challenge), "challenge", "Bearer challenge")) {
    should(/scope="[^"]+"/.test(challenge), "challenge", "scope");
  }
  must((await ask(url, { Accept: "text/event-stream" })).status === 401, "401");
  need((await ask(url, AS_CLAUDE, INITIALIZE)).status === 401, "Claude-User");
  const bad = await ask(url, { ...AS_CLAUDE, Authorization: "Bearer made-up" }, INITIALIZE);
  if (must(bad.status === 401, "invalid token")) {
    const said = bad.headers.get("WWW-Authenticate") ?? "";
    const noToken = /(missing|no) (authorization|access token|token)|token is (needed|required)/i; // but one was sent
    need(!noToken.test(`${said} ${bad.text}`.slice(0, 8192)), "Authorization");
    should(!challenge || said.includes("invalid_token"), "invalid token", "401 without invalid_token");
  }
  if (token) await checkCalls(checkup);
  return challenge.match(/resource_metadata="([^"]+)"/)?.[1];
}

/** Calls as Claude does. The token is sent to the typed address alone. */
async function checkCalls({ url, token, next, ask, need, should }: Checkup) {
  const headers: Record<string, string> = { ...AS_CLAUDE, Authorization: `Bearer ${token}` };
  const hello = await ask(url, headers, INITIALIZE);
  need(hello.json?.result, "calls", `initialize is answered ${hello.status}`);
  const session = hello.headers.get("Mcp-Session-Id");
  if (session) headers["Mcp-Session-Id"] = session;
  await ask(url, headers, { jsonrpc: "2.0", method: "notifications/initialized" });
  const list = await ask(url, headers, { jsonrpc: "2.0", id: 1, method: "tools/list" });
  if (session) await ask(url, headers, undefined, "DELETE");
  const tools: ({ name?: unknown } | null)[] = list.json?.result?.tools;
  need(Array.isArray(tools), "calls", `tools/list is answered ${list.status}`);
  const names = tools.map((tool) => isString(tool?.name) ? tool.name : "");
  const refused = names.filter((name) => !/^[\w-]{1,64}$/.test(name));
  should(refused.length === 0, "tool names", refused.join(", "));
  const [first, second] = [hello, list].map(({ took }) => `${took.toFixed(2)} s`);
  next.push(`initialize took ${first}, tools/list ${second}: ${names.length} tools`);
}

const wellKnown = (name: string, { origin, pathname }: URL) =>
  `${origin}/.well-known/${name}${pathname.replace(/\/$/, "")}`; // RFC 8414 §3.1, RFC 9728 §3.1
const lists = (list: unknown, value: string) => Array.isArray(list) && list.includes(value);

function checkMembers({ must }: Checkup, json: Metadata) {
  const empty = Object.keys(json).filter((name) => json[name] === null || json[name] === "").join(", ");
  must(!empty, "no empty members", empty);
}

type Metadata = Awaited<ReturnType<typeof checkDiscovery>>;

/** Reads the metadata, and returns that of the authorization server. */
async function checkDiscovery(checkup: Checkup, metadataUrl?: string) {
  const { url, resource, ask, need, must, should } = checkup;
  const place = metadataUrl || wellKnown("oauth-protected-resource", url);
  need(webUrl(place)?.origin === url.origin, "own URLs", place);
  const { ok, json: document } = await ask(place);
  need(ok && document, "metadata");
  need(document?.resource === resource, "resource", document?.resource);
  const issuer = document?.authorization_servers?.[0];
  need(webUrl(issuer), "offer", "authorization_servers");
  for (const base of [url, new URL(url.origin)]) { // some clients look at one of these only
    const { ok, json } = await ask(wellKnown("oauth-protected-resource", base));
    should(ok && json, "metadata");
  }
  // Clients take either document (RFC 8414 §5), and stumble over half of one.
  const openid = await ask(wellKnown("openid-configuration", new URL(issuer)));
  const isWhole = openid.ok && openid.json?.jwks_uri;
  should(isWhole || openid.status === 404, "metadata");
  const oauth = await ask(wellKnown("oauth-authorization-server", new URL(issuer)));
  const server = oauth.ok && oauth.json || isWhole && openid.json || {};
  need(server.issuer, "metadata");
  need(server.issuer === issuer, "issuer", server.issuer);
  for (const name of ["authorization_endpoint", "token_endpoint"]) need(webUrl(server[name]), "offer", name);
  const takesDocuments = server.client_id_metadata_document_supported === true;
  need(takesDocuments || server.registration_endpoint, "offer", "registration_endpoint");
  must(lists(server.code_challenge_methods_supported, "S256"), "offer", "S256");
  const methods = server.token_endpoint_auth_methods_supported;
  (server.registration_endpoint ? should : must)(lists(methods, "none"), "offer", "none");
  if (takesDocuments) should(lists(methods, "private_key_jwt"), "offer", "private_key_jwt, for ChatGPT");
  should(lists(server.scopes_supported, "offline_access"), "offer", "offline_access");
  should(server.authorization_response_iss_parameter_supported, "offer", "iss (RFC 9207)");
  checkMembers(checkup, server);
  return server;
}

const CLAUDE_REDIRECT = "https://claude.ai/api/mcp/auth_callback";

/** Registers as Claude does, where that is possible, and signs in up to the password. */
async function checkSignIn(checkup: Checkup, server: Metadata) {
  const { resource, ask, must } = checkup;
  let client_id = "https://claude.ai/oauth/mcp-oauth-client-metadata";
  if (server.registration_endpoint) {
    const client = { client_name: "setup check", redirect_uris: [CLAUDE_REDIRECT], token_endpoint_auth_method: "none" };
    const asked = { ...client, grant_types: ["authorization_code", "refresh_token"] };
    const { ok, json = {} } = await ask(server.registration_endpoint, AS_JSON, asked);
    const isWhole = isString(json.client_id) && lists(json.redirect_uris, CLAUDE_REDIRECT);
    if (!must(ok && isWhole, "registration")) return;
    checkMembers(checkup, json);
    client_id = json.client_id;
  }
  const code_challenge = await s256(random(32)); // nothing is ever redeemed
  const page = (change = "") => {
    const request = { response_type: "code", client_id, redirect_uri: CLAUDE_REDIRECT, resource, state: "setup-check" };
    const pkce = { code_challenge, code_challenge_method: "S256" };
    const all = { ...request, ...pkce, ...Object.fromEntries(new URLSearchParams(change)) };
    const target = new URL(server.authorization_endpoint);
    for (const [name, value] of Object.entries(all)) if (value) target.searchParams.set(name, value);
    return target;
  };
  await checkConsent(checkup, server, page());
  const attempts = {
    "code_challenge=&code_challenge_method=": /[?&]code=/,
    "code_challenge_method=plain": /[?&]code=/,
    "redirect_uri=https://evil.example/": /^https:\/\/evil\.example/,
    "client_id=nobody": /^https:\/\/claude\.ai/,
  };
  for (const [change, accepted] of Object.entries(attempts)) {
    const { location } = await ask(page(change), AS_BROWSER);
    must(!accepted.test(location), "refusal", change);
  }
  const body = new URLSearchParams({ grant_type: "refresh_token", refresh_token: "made-up", client_id });
  const { status, json } = await ask(server.token_endpoint, {}, body);
  must(status === 400 && json?.error === "invalid_grant", "dead token");
}

/** Looks at the owner's page, and presses its button to deny, which needs no password. */
async function checkConsent({ ask, need, must, should }: Checkup, server: Metadata, page: URL) {
  const { status, headers, location, text } = await ask(page, AS_BROWSER);
  need(!/[?&]code=/.test(location), "owner");
  if (location && !location.startsWith(CLAUDE_REDIRECT)) return; // the owner signs in on another page
  if (!must(status === 200, "consent page")) return;
  const policy = headers.get("Content-Security-Policy") ?? "";
  must(!policy.includes("form-action"), "no form-action");
  should(policy.includes("frame-ancestors") || headers.has("X-Frame-Options"), "no frames");
  const form = readDenial(text.slice(0, 64 * 1024));
  if (!form) return; // the rest would need the owner
  // A form for elsewhere is not sent: a page could choose any address and fields.
  const target = webUrl(form.action || page.href, page);
  if (!should(target?.origin === page.origin, "own URLs", form.action)) return;
  const Cookie = headers.getSetCookie().map((cookie) => cookie.split(";")[0]).join("; ");
  const denial = await ask(target, { ...AS_BROWSER, Cookie, Origin: page.origin }, form.body);
  const isBack = [302, 303].includes(denial.status) && denial.location.startsWith(CLAUDE_REDIRECT);
  const { error, state, iss } = Object.fromEntries(new URLSearchParams(denial.location.split("?")[1]));
  const isTold = error === "access_denied" && state === "setup-check";
  const hasIss = !server.authorization_response_iss_parameter_supported || iss === server.issuer;
  must(isBack && isTold && hasIss, "denial");
}

/** Each part is bounded, or shares no character with the next: the time grows with the length alone. */
const ATTRIBUTE = /([\w-]{1,40})\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))/g;

function readAttributes(tag: string): Record<string, string> {
  const attributes: Record<string, string> = {};
  for (const [, name = "", ...values] of tag.matchAll(ATTRIBUTE)) {
    attributes[name.toLowerCase()] ??= values.join("").replaceAll("&quot;", '"').replaceAll("&amp;", "&");
  }
  return attributes;
}

/** Finds the form with a button to deny: where it goes, and what a browser posts. */
function readDenial(html: string) {
  for (const form of html.split(/<form\b/i).slice(1)) {
    const [{ action, method } = {}, ...tags] = form.split(/<\/form/i)[0]!.split("<").map(readAttributes);
    const button = tags.find(({ name, value }) => name && /deny|denied|cancel|reject/i.test(value || name));
    if (!button || method?.toLowerCase() !== "post") continue;
    const fields = tags.filter((tag) => tag === button || tag.type?.toLowerCase() === "hidden");
    const body = new URLSearchParams(); // a list of pairs is not known to Bun's types
    for (const { name = "", value = "" } of fields) body.append(name, value);
    return { action, body };
  }
}

async function checkCors({ url, ask, should }: Checkup, { token_endpoint }: Metadata) {
  const headers = { Origin: "https://inspector.example", "Access-Control-Request-Method": "POST" };
  for (const [name, place] of Object.entries({ MCP: url, token: token_endpoint })) {
    const answer = await ask(place, headers, undefined, "OPTIONS");
    const allowed = answer.headers.get("Access-Control-Allow-Origin") ?? "";
    should(answer.ok && ["*", headers.Origin].includes(allowed), "CORS", name);
  }
}

const HELP = `Asks an MCP server what Claude will ask, and says what to repair. It needs no password.

Usage: mod.ts [options] https://your-domain.com/mcp

  --token pat_…   also call initialize and tools/list (or set MCP_TOKEN)
  -v, --verbose   name the checks that passed
  --json          print { url, verdict, findings: [{ heading, result, what, fix, withPersonalAuth }], next }

Exit status: 0 clients can connect; 1 some clients will fail; 2 no answer, or wrong arguments.`;

/** Runs `deno run -A mod.ts https://your-domain.com/mcp`. */
async function setupCheckCommand() {
  const process = nodeModule("node:process");
  const flag = { type: "boolean" };
  const flags = { json: flag, verbose: { ...flag, short: "v" }, help: { ...flag, short: "h" } };
  const options = { token: { type: "string" }, ...flags };
  try {
    const { values, positionals } = nodeModule("node:util").parseArgs({ options, allowPositionals: true });
    if (values.help) return console.log(HELP);
    const { token = process.env.MCP_TOKEN, json, verbose } = values;
    const onProgress = (what: string) => process.stderr.isTTY && process.stderr.write(`\r\x1b[K${what}`);
    const report = await checkSetup(positionals[0], { token, onProgress });
    onProgress("");
    console.log(json ? JSON.stringify(report, null, 2) : reportText(report, verbose));
    process.exitCode = { ready: 0, broken: 1, unreachable: 2 }[report.verdict];
  } catch (error) {
    console.error(`${(error as Error).message}\nFor help: mod.ts --help`);
    process.exitCode = 2;
  }
}

/** Formats a report with failures last: nobody reads what has scrolled away. */
function reportText({ url, findings, next }: SetupReport, verbose: boolean): string {
  const marks = { failed: "✗", warning: "!", ok: "✓" };
  const lines = [`Setup of ${url}`, ""];
  for (const heading of ["Address", "Guard", "Discovery", "Sign-in", "Browser apps"]) {
    const here = findings.filter((finding) => finding.heading === heading);
    const passed = here.filter(({ result }) => result === "ok").map(({ what }) => what);
    const worst = Object.entries(marks).find(([kind]) => here.some(({ result }) => result === kind));
    const count = worst ? `${passed.length} of ${here.length} passed` : "not asked yet";
    lines.push(`${worst?.[1] ?? "-"} ${heading.padEnd(12)} ${count}`);
    if (verbose && passed.length > 0) lines.push(`  passed: ${[...new Set(passed)].join(", ")}`);
  }
  for (const kind of ["warning", "failed"] as const) {
    for (const { what, fix, withPersonalAuth } of findings.filter(({ result }) => result === kind)) {
      lines.push("", `${marks[kind]} ${what}`, `    ${fix}`);
      if (withPersonalAuth) lines.push(`    With personalAuth(): ${withPersonalAuth}.`);
    }
  }
  return [...lines, "", ...next].join("\n");
}

/** Only where this file is the program: bundled into another one, it is nobody's command. */
if ((import.meta as { main?: boolean }).main && /\/mod\.[jt]s$/.test(import.meta.url)) void setupCheckCommand();
