/**
 * One file that makes a [Hono](https://hono.dev) app its own OAuth 2.1 authorization server, for **one person's** MCP
 * server: Claude on the web, on the phone, on the desktop and in the terminal connects to it, and only its owner can
 * let a client in.
 *
 * ```ts ignore
 * import { Hono } from "hono";
 * import { type AuthEnv, personalAuth } from "@personal-auth/mcp";
 *
 * const app = new Hono<AuthEnv>();
 * app.route("/", personalAuth({ baseUrl: "https://your-domain.com" }));
 * app.all("/mcp", (c) => c.json({ hello: c.var.auth.clientId })); // reached only with a valid token
 *
 * export default app;
 * ```
 *
 * What it serves, below `baseUrl`:
 *
 * | path | what | standard |
 * |---|---|---|
 * | `/.well-known/oauth-authorization-server` | authorization server metadata | RFC 8414 |
 * | `/.well-known/oauth-protected-resource/mcp` | protected resource metadata | RFC 9728 |
 * | `/register` | open dynamic client registration, which stores nothing | RFC 7591 |
 * | `/authorize` | the owner signs in and approves or denies | OAuth 2.1 §4.1, RFC 7636, 8707, 9207 |
 * | `/connections` | the owner's page: who is connected, revoke, tokens for scripts | |
 * | `/token` | code exchange and refresh | OAuth 2.1 §4.1.3, §4.3 |
 * | `/revoke` | ends a connection | RFC 7009 |
 * | `/introspect` | tells a resource server elsewhere about a token | RFC 7662 |
 * | `/mcp` | the guard in front of your handler | RFC 6750, RFC 9728 |
 *
 * The file reads from top to bottom in the order a client meets it: options, discovery, clients, redirects,
 * authorization, tokens, grants, guard; then what they stand on: owner, pages, stores, primitives, errors.
 *
 * @module
 */

import { type Context, Hono, type MiddlewareHandler } from "hono";
import { getCookie, setCookie } from "hono/cookie";
import { cors } from "hono/cors";
import { html, raw } from "hono/html";
import type { AuthInfo } from "@modelcontextprotocol/sdk/server/auth/types.js";

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Options and public types
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What {@linkcode personalAuth} is configured with. Only `baseUrl` is required. */
export interface PersonalAuthOptions {
  /**
   * The public URL of the server, which is also the issuer (RFC 8414 §2), byte for byte: no trailing slash. `https`,
   * or `http` on loopback. A path is allowed (`https://host/vault`): the endpoints then live below it.
   */
  baseUrl: string;
  /**
   * The owner's password. Absent: one is generated at the first start, printed once, and kept hashed in the store.
   * `false`: nobody is asked for anything, so that **anybody with an account at an allowed client gets in**.
   */
  password?: string | false | undefined;
  /**
   * Which redirect targets may be registered: `example.com` (https), `*.example.com` (its subdomains), `localhost`
   * (any loopback address and port), `scheme://host` (a private-use scheme). `null`: all. This names the apps that may
   * ask, never the owner. Default: claude.ai, claude.com, localhost and Claude Desktop's `claude://claude.ai`.
   */
  allowedRedirectDomains?: string[] | null | undefined;
  /** Lifetime of an access token, in seconds. Default: 30 days. */
  accessTokenTtl?: number | undefined;
  /** How long a connection outlives its last refresh, in seconds. Default: 365 days. */
  refreshTokenTtl?: number | undefined;
  /** Where state lives. Default: `fileStore(".oauth-state")`. */
  store?: Store | undefined;
  /** The path that is guarded, relative to `baseUrl`; both together are the resource identifier. Default: `/mcp`. */
  mcpPath?: string | undefined;
  /**
   * The scopes on offer: names, or names with what they allow in words or as a {@linkcode ScopeOption}. Default: `mcp`,
   * every tool of the server.
   */
  scopes?: string[] | Record<string, string | ScopeOption> | undefined;
  /** Clients registered by hand, for hosts where a person types in an id and a secret. */
  clients?: PreregisteredClient[] | undefined;
  /**
   * Replaces the password: whether this request comes from the owner, as told by a proxy, a passkey, an upstream
   * login. Only `true` counts. A `Response` is answered in place of the page, such as a redirect to that login.
   */
  authenticateOwner?: ((c: Context) => boolean | Response | Promise<boolean | Response>) | undefined;
  /**
   * Fetches a Client ID Metadata Document in place of the built-in way, which goes to public addresses only: for a
   * runtime without `node:https`, or a network where everything passes a proxy. It must follow no redirects.
   */
  fetchClientMetadata?: ((url: string, signal: AbortSignal) => Promise<Response>) | undefined;
  /** How the owner's pages look, and what they say. */
  pages?: PageOptions | undefined;
  /** Called with everything worth a log line or an alarm. Default: one line each on the console. */
  onEvent?: ((event: AuthEvent) => void) | undefined;
}

/** A scope that is more than a name. */
export interface ScopeOption {
  /** What it allows, in words that go after "It may …". */
  description?: string;
  /** Scopes that whoever has this one has as well. */
  includes?: string[];
  /** `true`: granted only to a client that asks for it by name, as after a step-up challenge. Default: `false`. */
  onRequest?: boolean;
}

/** A client registered by hand, in the member names of RFC 7591 §2. Without a secret it is a public client. */
export interface PreregisteredClient {
  client_id: string;
  client_secret?: string;
  client_name?: string;
  redirect_uris: string[];
}

/** Something security-relevant that happened. `type` is stable; `message` is for people and may change. */
export interface AuthEvent {
  type:
    | "client_registered"
    | "client_document_refused"
    | "redirect_refused"
    | "owner_signed_in"
    | "sign_in_failed"
    | "sign_in_throttled"
    | "connection_approved"
    | "connection_denied"
    | "connection_revoked"
    | "code_replayed"
    | "refresh_token_reused"
    | "token_created"
    | "owner_unprotected"
    | "password_weak"
    | "server_error";
  /** Seconds since the epoch. */
  at: number;
  message: string;
  /** The id of the connection concerned, as in {@linkcode Connection}. */
  connection?: string;
  /** The client's own name for itself: not verified by anybody. */
  clientName?: string;
  /** What was thrown, for `server_error` and `client_document_refused`. */
  cause?: unknown;
}

/** A client the owner has let in, or a personal access token. Times are in seconds since the epoch. */
export interface Connection {
  id: string;
  kind: "client" | "token";
  clientId: string;
  clientName: string;
  redirectUri?: string;
  scopes: string[];
  createdAt: number;
  lastUsedAt?: number;
  expiresAt: number;
}

/** What a personal access token is made of. */
export interface TokenRequest {
  /** What the owner calls it, shown in the list of connections. */
  name: string;
  /** Default: every scope on offer. */
  scopes?: string[];
  /** Seconds. Default: 365 days. */
  expiresIn?: number;
}

/** A personal access token that was just made. */
export interface NewToken {
  /** The id of its {@linkcode Connection}. */
  id: string;
  token: string;
  /** Seconds since the epoch. */
  expiresAt: number;
}

/** The Hono environment of a guarded route: `c.var.auth` is the MCP SDK's `AuthInfo`. */
export interface AuthEnv {
  Variables: { auth: AuthInfo };
}

/** The Hono app that {@linkcode personalAuth} returns, with the few things a program needs besides the routes. */
export interface PersonalAuth extends Hono<AuthEnv> {
  /** The guarded path, with the path of `baseUrl`: the route for your handler. */
  readonly mcpPath: string;
  /**
   * Checks an access token: the MCP SDK's `OAuthTokenVerifier`.
   *
   * @throws {OAuthError} `invalid_token` if it is unknown, expired, revoked or meant for another resource.
   */
  verifyAccessToken(token: string): Promise<AuthInfo>;
  /** Middleware that answers 403 with a step-up challenge (RFC 6750 §3.1) unless the token has all these scopes. */
  requireScopes(...scopes: string[]): MiddlewareHandler<AuthEnv>;
  /** Every live connection and personal access token, newest first. */
  connections(): Promise<Connection[]>;
  /** Ends a connection: its code, access and refresh tokens at once. `false`: there is none of that id. */
  revoke(id: string): Promise<boolean>;
  /**
   * Makes a personal access token for scripts and headless clients. The token is in this answer and nowhere else.
   *
   * @throws {TypeError} if the name is empty, a scope is not on offer, or the lifetime is not a positive number.
   */
  createToken(request: TokenRequest): Promise<NewToken>;
}

/**
 * Where state lives. Keys are short ASCII strings, values are plain JSON, times are seconds since the epoch.
 * One primitive, `update`, carries all atomicity, so that any engine with compare-and-set can be a store.
 */
export interface Store {
  /** The value of a key, or `undefined` if there is none or it has expired. */
  get(key: string): Promise<unknown>;
  /**
   * Reads, changes and writes one key, atomically against every other process on the same store, and durably before
   * it resolves. `change` must be pure: it may be called again after a lost race. Returning `undefined` deletes;
   * returning `current` itself writes nothing. Without `expiresAt` a key keeps the expiry it had (a new one: none).
   *
   * @returns what `change` returned.
   */
  update(key: string, change: (current: unknown) => unknown, options?: { expiresAt?: number }): Promise<unknown>;
  /** All live entries whose keys start with `prefix`, in the order of their keys. */
  list(prefix: string): AsyncIterable<[key: string, value: unknown]>;
  /**
   * A stamp, cheap to read, that is another one after any change by any process: what was read under one stamp need not
   * be read again while it lasts. A change by another process may show a millisecond later. `undefined`, or without this
   * method: cannot tell.
   */
  version?(): number | undefined;
  /** Lets go of files and sockets. */
  close?(): void | Promise<void>;
}

/**
 * Entries of `allowedRedirectDomains` for the apps that many people connect:
 * `allowedRedirectDomains: [...redirects.claude, ...redirects.cursor]`.
 */
export const redirects: Record<
  | "claude"
  | "local"
  | "antigravity"
  | "chatgpt"
  | "cursor"
  | "devin"
  | "grok"
  | "metaai"
  | "mistral"
  | "perplexity"
  | "slack"
  | "vscode",
  string[]
> = {
  /** The web, the phone and the desktop, with Claude Desktop's own scheme for its Code tab. */
  claude: ["claude.ai", "claude.com", "claude://claude.ai"],
  /** Whatever runs on the computer in front of you: Claude Code, Codex, Gemini CLI, Inspector, mcp-remote, opencode. */
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
};

const MINUTE = 60;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

/** What the options come to, checked and completed. */
interface Settings {
  issuer: string;
  origin: string;
  /** https, as opposed to http on loopback. */
  secure: boolean;
  /** `baseUrl`'s path, or "". */
  basePath: string;
  /** The guarded path as a route, `baseUrl`'s path included. */
  mcpPath: string;
  /** The one resource identifier (RFC 8707) that tokens are issued for, and its URL form for `AuthInfo`. */
  resource: string;
  /** What a client may ask for instead, in the form that `normalizeResource` gives them. */
  resourceNames: (string | undefined)[];
  /** Where its metadata is (RFC 9728 §3.1). */
  resourceMetadataUrl: string;
  scopes: Scopes;
  accessTokenTtl: number;
  refreshTokenTtl: number;
  allowed: string[] | null;
  clients: PreregisteredClient[];
  password: string | false | undefined;
  authenticateOwner: PersonalAuthOptions["authenticateOwner"];
  fetchClientMetadata: MetadataFetcher;
  pages: PageOptions;
  wording: Wording;
  emit: Emit;
}

/** The scopes on offer. */
interface Scopes {
  all: string[];
  /** What a client gets that does not ask, or asks for nothing that is known here. */
  byDefault: string[];
  /** What a scope allows, in words; if there are none, what is given with {scope} filled in. */
  words(scope: string, otherwise?: string): string;
  /** These and all they include. */
  withIncluded(scopes: string[]): string[];
}

type Emit = (type: AuthEvent["type"], message: string, more?: Partial<AuthEvent>) => void;

function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new TypeError(message);
}

function readOptions(options: PersonalAuthOptions): Omit<Settings, "emit"> {
  const url = readBaseUrl(options?.baseUrl);
  // A misspelt password would be no password, and a misspelt list the default one.
  for (const name of Object.keys(options)) {
    assert(OPTIONS.has(name), `${quote(name)} is not an option of personalAuth()`);
  }
  const { store } = options;
  assert(
    store === undefined || [store?.get, store?.update, store?.list].every((method) => typeof method === "function"),
    `store must be a store, such as fileStore(".oauth-state"), not ${quote(store)}`,
  );
  const mcpPath = options.mcpPath ?? "/mcp";
  assert(
    typeof mcpPath === "string" && PATH.test(mcpPath) && !OUR_PATHS.has(mcpPath),
    `mcpPath must be a path of its own without a trailing slash, such as "/mcp", not ${quote(mcpPath)}`,
  );
  const { password, authenticateOwner, onEvent } = options;
  assert(
    password === undefined || password === false ||
      (typeof password === "string" && normalize(password) !== ""),
    `password must be a non-empty string; leave it out to have one generated`,
  );
  assert(
    authenticateOwner === undefined || (typeof authenticateOwner === "function" && password === undefined),
    "authenticateOwner must be a function, and stands instead of password: give one of the two",
  );
  const { fetchClientMetadata } = options;
  assert(
    fetchClientMetadata === undefined || typeof fetchClientMetadata === "function",
    "fetchClientMetadata must be a function (url, signal) => Promise<Response>",
  );
  assert(onEvent === undefined || typeof onEvent === "function", "onEvent must be a function");
  const basePath = url.pathname === "/" ? "" : url.pathname;
  assert(
    !basePath.endsWith(mcpPath),
    `baseUrl must not hold mcpPath as well: write "${options.baseUrl.slice(0, -mcpPath.length)}"`,
  );
  return {
    issuer: options.baseUrl,
    origin: url.origin,
    secure: url.protocol === "https:",
    basePath,
    mcpPath: basePath + mcpPath,
    resource: options.baseUrl + mcpPath,
    resourceNames: [options.baseUrl + mcpPath, options.baseUrl].map(normalizeResource),
    resourceMetadataUrl: `${url.origin}/.well-known/oauth-protected-resource${basePath}${mcpPath}`,
    scopes: readScopes(options.scopes ?? { mcp: "use every tool of this server" }),
    accessTokenTtl: readSeconds("accessTokenTtl", options.accessTokenTtl ?? 30 * DAY),
    refreshTokenTtl: readSeconds("refreshTokenTtl", options.refreshTokenTtl ?? 365 * DAY),
    allowed: readAllowed(options.allowedRedirectDomains),
    clients: readClients(options.clients ?? []),
    password: typeof password === "string" ? normalize(password) : password,
    authenticateOwner,
    fetchClientMetadata: fetchClientMetadata ?? fetchPublicly,
    pages: readPages(options.pages ?? {}),
    wording: { ...WORDING, ...options.pages?.wording },
  };
}

const PATH = /^(\/(?!\.)[A-Za-z0-9._~-]+)+$/; // no segment begins with a dot: neither /.. nor /.well-known
const OPTIONS = new Set<string>(
  [
    "baseUrl",
    "password",
    "allowedRedirectDomains",
    "accessTokenTtl",
    "refreshTokenTtl",
    "store",
    "mcpPath",
    "scopes",
    "clients",
    "authenticateOwner",
    "fetchClientMetadata",
    "pages",
    "onEvent",
  ] satisfies (keyof PersonalAuthOptions)[],
);
const OUR_PATHS = new Set(["/authorize", "/token", "/register", "/revoke", "/introspect", "/connections"]);

function readBaseUrl(baseUrl: unknown): URL {
  const url = typeof baseUrl === "string" ? URL.parse(baseUrl) : null;
  assert(url, `baseUrl must be a URL such as "https://your-domain.com", not ${quote(baseUrl)}`);
  assert(
    url.protocol === "https:" || (url.protocol === "http:" && isLoopback(url.hostname)),
    `baseUrl must be https, or http on localhost: tokens would travel readable; write "https://${url.host}"`,
  );
  // Clients compare the issuer byte for byte (RFC 8414 §3.3), so whatever a URL parser would change is refused here.
  const canonical = url.origin + (url.pathname === "/" ? "" : url.pathname.replace(/\/+$/, ""));
  assert(baseUrl === canonical, `baseUrl must be written without a trailing slash or extras: "${canonical}"`);
  assert(
    url.pathname === "/" || PATH.test(url.pathname),
    `baseUrl's path may hold letters, digits and ._~- only, not ${quote(url.pathname)}`,
  );
  return url;
}

function readSeconds(name: string, value: unknown): number {
  assert(
    typeof value === "number" && value >= 1 && value <= 100 * 365 * DAY,
    `${name} must be a number of seconds, from 1 to 100 years, not ${quote(value)}`,
  );
  return value;
}

function readScopes(scopes: string[] | Record<string, string | ScopeOption>): Scopes {
  const names = Array.isArray(scopes) && scopes.every((name) => typeof name === "string");
  assert(
    names || isObject(scopes),
    `scopes must be a list of names or an object, such as ["mcp"], not ${quote(scopes)}`,
  );
  const options = new Map<string, ScopeOption>(
    Array.isArray(scopes)
      ? scopes.map((name) => [name, {}])
      : Object.entries(scopes).map(([name, it]) => [name, typeof it === "string" ? { description: it } : it]),
  );
  const all = [...options.keys()];
  const byDefault = all.filter((name) => !options.get(name)?.onRequest);
  assert(byDefault.length > 0, `scopes must name a scope that is granted by default, such as ["mcp"]`);
  for (const [name, { description = "", includes = [] }] of options) {
    assert(
      SCOPE.test(name) && name !== OFFLINE_ACCESS && name !== "openid",
      `scopes holds ${quote(name)}: a scope is printable ASCII without spaces and quotes; ` +
        "openid and offline_access are not for the owner to offer",
    );
    assert(typeof description === "string", `scopes: the description of ${quote(name)} must be a string`);
    const unknown = includes.filter((scope) => !options.has(scope));
    assert(unknown.length === 0, `scopes: ${quote(name)} includes ${quote(unknown[0])}, which is not on offer`);
  }
  const withIncluded = (scopes: string[]) => {
    const reached = new Set(scopes);
    for (const scope of reached) { // a Set visits what is added meanwhile, so this follows chains, and circles once
      for (const included of options.get(scope)?.includes ?? []) reached.add(included);
    }
    return [...reached];
  };
  const words = (scope: string, otherwise = "{scope}") =>
    options.get(scope)?.description || format(otherwise, { scope });
  return { all, byDefault, words, withIncluded };
}

/** The scope by which clients ask for a refresh token. */
const OFFLINE_ACCESS = "offline_access";

/** One scope-token of RFC 6749 §3.3. */
const SCOPE = /^[\x21\x23-\x5b\x5d-\x7e]+$/;

function readAllowed(allowed: string[] | null | undefined): string[] | null {
  if (allowed === null) return null;
  const entries = allowed ?? [...redirects.claude, ...redirects.local];
  assert(Array.isArray(entries), "allowedRedirectDomains must be a list of domains, or null to allow all");
  for (const entry of entries) {
    assert(
      entry !== "127.0.0.1" && entry !== "[::1]",
      `allowedRedirectDomains: write "localhost" for every loopback address`,
    );
    assert(
      !String(entry).endsWith(":443"),
      `allowedRedirectDomains holds ${quote(entry)}: leave out the port, it is the default`,
    );
    assert(
      typeof entry === "string" && ALLOW_ENTRY.test(entry),
      `allowedRedirectDomains holds ${quote(entry)}: write "example.com", "*.example.com", "localhost" or, for an ` +
        `app's own scheme, "scheme://host"`,
    );
  }
  return entries;
}

const ALLOW_ENTRY = /^((\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?|(?!https?:)[a-z][a-z0-9+.-]*:\/\/[^\s/?#@\\]*)$/;

function readClients(clients: PreregisteredClient[]): PreregisteredClient[] {
  assert(Array.isArray(clients), "clients must be a list of { client_id, client_secret?, redirect_uris }");
  const ids = new Set<string>();
  for (const client of clients) {
    assert(
      isObject(client),
      `clients holds ${quote(client)}, which is not { client_id, client_secret?, redirect_uris }`,
    );
    const { client_id, client_secret, redirect_uris } = client;
    assert(!ids.has(client_id), `clients: two have the client_id ${quote(client_id)}`);
    ids.add(client_id);
    assert(
      typeof client_id === "string" && /^[\x20-\x7e]+$/.test(client_id),
      "clients: every client needs a client_id of printable ASCII",
    );
    assert(
      client_secret === undefined || (typeof client_secret === "string" && client_secret.length >= 16),
      `clients: the client_secret of ${quote(client_id)} must have at least 16 characters`,
    );
    assert(
      Array.isArray(redirect_uris) && redirect_uris.length > 0,
      `clients: ${quote(client_id)} needs a list of redirect_uris`,
    );
    for (const uri of redirect_uris) {
      const fault = unsafeRedirect(uri);
      assert(!fault, `clients: redirect_uri ${quote(uri)} of ${quote(client_id)} ${fault}`);
    }
  }
  return clients;
}

function readPages(pages: PageOptions): PageOptions {
  const { title, accent, wording = {} } = pages;
  assert(title === undefined || typeof title === "string", "pages.title must be a string");
  // It becomes part of a style sheet, where nothing is escaped.
  assert(accent === undefined || /^#[0-9a-f]{6}$/i.test(accent), `pages.accent must be a colour such as "#7a3cff"`);
  for (const [name, text] of Object.entries(wording)) {
    assert(Object.hasOwn(WORDING, name), `pages.wording has no text ${quote(name)}`);
    assert(typeof text === "string", `pages.wording.${name} must be a string`);
  }
  return pages;
}

/** An unknown value for a message: short, on one line, and in plain ASCII, so that it can neither forge nor garble it. */
function quote(value: unknown): string {
  const json = JSON.stringify(value) ?? String(value);
  return json.slice(0, 200).replace(
    /[^\x20-\x7e]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** The characters that RFC 6749 §5.2 allows in an error_description. */
function errorDescription(message: string): string {
  return message.replaceAll('"', "'").replace(/[^\x20-\x21\x23-\x5b\x5d-\x7e]/g, "?");
}

/** Registrations are anybody's to make: they are told to `onEvent`, but the console is spared them. */
function logEvent({ type, message, connection, clientName, cause }: AuthEvent): void {
  if (type === "client_registered") return;
  // quote() keeps what a client controls on its own line, so that no name can forge a second log entry.
  const why = cause instanceof Error ? quote(cause.message) : undefined;
  const parts = [clientName && `client ${quote(clientName)}`, connection && `connection ${connection}`, why];
  console.log(["personal-auth", type, message, ...parts.filter(Boolean)].join(" | "));
  if (type === "server_error") console.error(cause); // in full only what no stranger can cause at will
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The server
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * A complete OAuth 2.1 authorization server and the guard of one person's MCP server, as a Hono app. Mount it first,
 * at "/": `app.route("/", personalAuth({ baseUrl }))`.
 *
 * @throws {TypeError} if an option is wrong, saying what to write instead.
 * @throws {Error} if the state folder cannot be used, saying which file and what to do.
 */
export function personalAuth(options: PersonalAuthOptions): PersonalAuth {
  const checked = readOptions(options);
  const store = guardStore(options.store ?? fileStore(".oauth-state"), (...event) => events.emit(...event));
  const events = eventLog(store, options.onEvent ?? logEvent);
  const settings: Settings = { ...checked, emit: events.emit };
  const mac = serverMac(store);
  const redirects = redirectPolicy(settings.allowed);
  const clients = clientRegistry(settings, mac, redirects);
  const grants = grantKeeper(settings, store, mac);
  const owner = ownerDesk(settings, store, mac);
  const guard = resourceGuard(settings, grants.verify);

  const app = new Hono<AuthEnv>();
  const { basePath, mcpPath } = settings;

  for (const [place, document] of discoveryDocuments(settings)) {
    for (const path of [place, `${place}/`]) {
      app.use(path, CORS);
      app.get(path, (c) => c.json(document, 200, { "Cache-Control": "public, max-age=300" }));
      app.all(path, answering(() => methodNotAllowed("GET, HEAD"), settings));
    }
  }
  // A partial document breaks clients that parse it strictly, and an app's catch-all page would be taken for one.
  for (const path of openidPaths(settings)) app.all(path, (c) => c.json({ error: "not_found" }, 404));

  const withSlash = (path: string) => [basePath + path, `${basePath}${path}/`];
  const post = (path: string, handler: Handler) => {
    const onlyPost: Handler = (c) => c.req.method === "POST" ? handler(c) : methodNotAllowed("POST");
    const endpoint = withCors(answering(onlyPost, settings));
    for (const route of withSlash(path)) app.all(route, endpoint);
  };
  const pages = (path: string, { show, decide }: { show: Handler; decide: Handler }) => {
    for (const route of withSlash(path)) {
      app.get(route, answering(show, settings, errorPage));
      app.post(route, answering(decide, settings, errorPage));
      app.all(route, answering(() => methodNotAllowed("GET, HEAD, POST"), settings));
    }
  };
  post("/register", clients.register);
  post("/token", (c) => tokenEndpoint(c, clients, grants, settings));
  post("/revoke", (c) => revocationEndpoint(c, clients, grants));
  post("/introspect", (c) => introspectionEndpoint(c, clients, grants, settings));
  pages("/authorize", authorizeEndpoint(settings, clients, redirects, grants, owner));
  pages("/connections", connectionsEndpoint(settings, grants, owner, events));

  // Without the path of baseUrl too: a handler that was put there by mistake must not stand open.
  for (const path of new Set([mcpPath, mcpPath.slice(basePath.length)])) app.use(`${path}/*`, guard.middleware);

  return Object.assign(app, {
    mcpPath,
    verifyAccessToken: async (token: string) => await grants.verify(token),
    requireScopes: guard.requireScopes,
    connections: grants.connections,
    revoke: grants.revoke,
    createToken: async (request: TokenRequest) => (await grants.createToken(request))!,
  });
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Discovery
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * Browser-based clients (MCP Inspector, playgrounds) read these endpoints from another origin. `*` is safe: nothing
 * here looks at a cookie. The owner's pages, which do, are never opened this way.
 */
const CORS = cors({ origin: "*", exposeHeaders: ["WWW-Authenticate", "Retry-After", "Mcp-Session-Id"] });

/**
 * The same around what is never cached, so that only browsers, which alone send Origin, have to be told. A preflight
 * carries no token by design: it is answered before the handler is asked.
 */
function withCors(handler: MiddlewareHandler<AuthEnv>): MiddlewareHandler<AuthEnv> {
  return (c, next) => {
    if (c.req.header("Origin") === undefined) return handler(c, next);
    return CORS(c, async () => {
      const answer = await handler(c, next);
      if (answer) c.res = answer;
    });
  };
}

/**
 * Both metadata documents at every place a client looks for them. They are built from `baseUrl` and never from the
 * request: behind a proxy that ends TLS, a request claims to be http, and a forged Host header would be believed.
 */
function discoveryDocuments(settings: Settings): Map<string, Record<string, unknown>> {
  const { basePath, mcpPath } = settings;
  const server = authorizationServerMetadata(settings);
  const resource = protectedResourceMetadata(settings);
  return new Map([
    [`/.well-known/oauth-authorization-server${basePath}`, server], // RFC 8414 §3.1: the path goes behind
    [`/.well-known/oauth-authorization-server${mcpPath}`, server], // clients that take the MCP URL for the issuer
    [`${basePath}/.well-known/oauth-authorization-server`, server],
    [`/.well-known/oauth-protected-resource${mcpPath}`, resource], // RFC 9728 §3.1
    [`/.well-known/oauth-protected-resource${basePath}`, resource], // clients that ask the root only
    [`${mcpPath}/.well-known/oauth-protected-resource`, resource],
  ]);
}

/** RFC 8414 §2. */
function authorizationServerMetadata({ issuer, scopes, clients }: Settings): Record<string, unknown> {
  const authMethods = ["none", "client_secret_post", "client_secret_basic"]; // Claude looks for "none"
  return {
    issuer,
    authorization_endpoint: `${issuer}/authorize`,
    token_endpoint: `${issuer}/token`,
    registration_endpoint: `${issuer}/register`,
    revocation_endpoint: `${issuer}/revoke`,
    // Clients ask for a refresh token only where this list holds offline_access (MCP 2026-07-28, refresh tokens).
    scopes_supported: [...scopes.all, OFFLINE_ACCESS],
    response_types_supported: ["code"],
    response_modes_supported: ["query"],
    grant_types_supported: ["authorization_code", "refresh_token"],
    token_endpoint_auth_methods_supported: authMethods,
    revocation_endpoint_auth_methods_supported: authMethods,
    ...(clients.some(({ client_secret }) => client_secret !== undefined) && {
      introspection_endpoint: `${issuer}/introspect`,
      introspection_endpoint_auth_methods_supported: ["client_secret_post", "client_secret_basic"],
    }),
    code_challenge_methods_supported: ["S256"],
    client_id_metadata_document_supported: true,
    authorization_response_iss_parameter_supported: true,
  };
}

/** RFC 9728 §2. What a client needs to begin with, and no `offline_access`: that is the authorization server's affair. */
function protectedResourceMetadata({ issuer, resource, scopes }: Settings): Record<string, unknown> {
  return {
    resource,
    authorization_servers: [issuer],
    scopes_supported: scopes.byDefault,
    bearer_methods_supported: ["header"],
  };
}

function openidPaths({ basePath, mcpPath }: Settings): Set<string> {
  const document = "/.well-known/openid-configuration";
  return new Set([document + basePath, document + mcpPath, basePath + document, mcpPath + document]);
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Clients
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A client, whatever its origin. */
interface Client {
  id: string;
  name: string;
  redirect_uris: string[];
  /** What a confidential client must present; `undefined` for a public one. */
  secret: string | undefined;
  /** Whether it registered for refresh tokens. */
  refreshes: boolean;
  /** Typed in by the owner, signed by this server, or a document that the client publishes. */
  source: "preregistered" | "registered" | "document";
}

/** What a signed client_id carries: no more than is needed to recognise the client again. Short names keep it short. */
interface SignedClient {
  n: string;
  r: string[];
  /** 1: confidential. */
  s?: 1;
  /** 1: registered without the refresh_token grant. */
  o?: 1;
}

interface Clients {
  register(c: Context): Promise<Response>;
  resolve(client_id: string): Promise<Client | undefined>;
  authenticate(c: Context, form: URLSearchParams): Promise<Client>;
}

const MAX_BODY_BYTES = 64 * 1024;
const MAX_REDIRECT_URIS = 16;
const MAX_CLIENT_ID_LENGTH = 2048;

/**
 * Registration stores nothing: a `client_id` is the client's metadata and a MAC under the server's key, and a client
 * secret is a MAC of the client_id (RFC 7591 appendix A.5.2). So a flood of registrations leaves no trace, a restart
 * forgets no client, and registering twice gives the same client.
 */
function clientRegistry(settings: Settings, mac: Mac, policy: RedirectPolicy): Clients {
  const { clients, scopes, emit } = settings;
  const documents = documentReader(settings.fetchClientMetadata);
  const preregistered = new Map(clients.map((client) => [client.client_id, client]));

  async function register(c: Context): Promise<Response> {
    const metadata = readClientMetadata(await readJson(c));
    const { client_name, grant_types, token_endpoint_auth_method: method = "none" } = metadata;
    const report = (message: string) => emit("redirect_refused", message, { clientName: client_name });
    const redirect_uris = keptRedirects(metadata.redirect_uris, policy, report);
    const confidential = method === "client_secret_post" || method === "client_secret_basic";
    const refreshes = grant_types?.includes("refresh_token") ?? true;
    const client_id = await sign({
      n: client_name,
      r: redirect_uris,
      ...(confidential && { s: 1 }),
      ...(!refreshes && { o: 1 }),
    });
    emit("client_registered", "a client registered", { clientName: client_name });
    const { client_uri, software_id, software_version, application_type } = metadata;
    const answer = {
      client_id,
      client_id_issued_at: Math.floor(seconds()),
      ...(confidential && { client_secret: await mac("client_secret", client_id), client_secret_expires_at: 0 }),
      ...defined({
        client_name: client_name || undefined,
        client_uri,
        software_id,
        software_version,
        application_type,
      }),
      redirect_uris,
      // What was asked need not be what is given (RFC 7591 §3.2.1): clients read this, not what they sent.
      token_endpoint_auth_method: confidential ? method : "none",
      grant_types: refreshes ? ["authorization_code", "refresh_token"] : ["authorization_code"],
      response_types: ["code"],
      scope: grantedScopes(metadata.scope, scopes).join(" "),
    };
    return c.json(answer, 201, { "Cache-Control": "no-store" });
  }

  async function sign(client: SignedClient): Promise<string> {
    const payload = base64url(utf8.encode(JSON.stringify(client)));
    const client_id = `${payload}.${await mac("client_id", payload)}`;
    if (client_id.length <= MAX_CLIENT_ID_LENGTH) return client_id;
    throw new OAuthError(
      "invalid_client_metadata",
      `The metadata is too long: client_name and redirect_uris come to a client_id of ${client_id.length} characters, ` +
        `and ${MAX_CLIENT_ID_LENGTH} are possible`,
    );
  }

  async function resolve(client_id: string): Promise<Client | undefined> {
    const known = preregistered.get(client_id);
    if (known) {
      const { client_secret: secret, redirect_uris, client_name } = known;
      const name = client_name ?? client_id;
      return { id: client_id, name, redirect_uris, secret, refreshes: true, source: "preregistered" };
    }
    if (isDocumentUrl(client_id)) return await documents(client_id);
    if (client_id.length > MAX_CLIENT_ID_LENGTH) return undefined;
    const [payload = "", signature = ""] = client_id.split(".");
    if (!equal(signature, await mac("client_id", payload)) || client_id !== `${payload}.${signature}`) {
      return undefined;
    }
    const { n, r, s, o } = JSON.parse(decodeBase64(payload)!) as SignedClient;
    const secret = s ? await mac("client_secret", client_id) : undefined;
    return { id: client_id, name: n, redirect_uris: r, secret, refreshes: !o, source: "registered" };
  }

  /** Client authentication at /token and /revoke: none, client_secret_post or client_secret_basic (RFC 6749 §2.3). */
  async function authenticate(c: Context, form: URLSearchParams): Promise<Client> {
    const { id, secrets } = clientCredentials(c.req.header("Authorization"), form, (id) => preregistered.has(id));
    const refused = (description: string) => new OAuthError("invalid_client", description, { status: 401 });
    // A published document is read where it decides where to redirect to. Here the grant is bound to the id itself, and
    // a connection must go on whether or not the client's site is up.
    const client = isDocumentUrl(id) && !preregistered.has(id) ? publicClient(id) : await resolve(id);
    // 401 invalid_client is what makes clients that cached a registration register again.
    if (!client) throw refused("This client is unknown here: register again");
    if (client.secret === undefined) return client;
    // Both sides are hashed, so that neither length nor content of the secret shows in the time this takes.
    const expected = await sha256(client.secret);
    for (const secret of secrets) if (equal(await sha256(secret), expected)) return client;
    throw refused("The client_secret is missing or wrong");
  }

  return { register, resolve, authenticate };
}

/** The members of RFC 7591 §2 that are read; every other one is ignored. */
interface ClientMetadata {
  redirect_uris: string[];
  client_name: string;
  token_endpoint_auth_method?: string;
  grant_types?: string[];
  scope?: string;
  client_uri?: string;
  software_id?: string;
  software_version?: string;
  application_type?: string;
}

function readClientMetadata(body: unknown): ClientMetadata {
  const invalid = (description: string) => new OAuthError("invalid_client_metadata", description);
  if (typeof body !== "object" || body === null || Array.isArray(body)) {
    throw invalid("The body must be a JSON object");
  }
  const own = (name: string): unknown =>
    Object.hasOwn(body, name) ? (body as Record<string, unknown>)[name] : undefined;
  const text = (name: string): string | undefined => {
    const value = own(name) ?? undefined; // null is what some serialisers write for "absent"
    if (value !== undefined && typeof value !== "string") throw invalid(`${name} must be a string`);
    return value || undefined;
  };
  const list = (name: string): string[] | undefined => {
    const value = own(name) ?? undefined;
    if (value !== undefined && !(Array.isArray(value) && value.every((item) => typeof item === "string"))) {
      throw invalid(`${name} must be a list of strings`);
    }
    return value as string[] | undefined;
  };
  const redirect_uris = [...new Set(list("redirect_uris"))];
  if (redirect_uris.length === 0) {
    throw new OAuthError("invalid_redirect_uri", "redirect_uris is missing or empty");
  }
  if (redirect_uris.length > MAX_REDIRECT_URIS) {
    throw invalid(`redirect_uris may hold ${MAX_REDIRECT_URIS} at the most`);
  }
  const grant_types = list("grant_types");
  if (grant_types && !grant_types.includes("authorization_code")) {
    throw invalid("grant_types must hold authorization_code");
  }
  const response_types = list("response_types");
  if (response_types && !response_types.includes("code")) throw invalid("response_types must hold code");
  const client_uri = text("client_uri");
  return {
    redirect_uris,
    client_name: printable(text("client_name") ?? ""),
    ...defined({
      grant_types,
      token_endpoint_auth_method: text("token_endpoint_auth_method"),
      scope: text("scope"),
      client_uri: client_uri && URL.parse(client_uri)?.protocol === "https:" ? client_uri : undefined,
      software_id: text("software_id"),
      software_version: text("software_version"),
      application_type: text("application_type"),
    }),
  };
}

/**
 * A client's name as it may stand on the owner's page: control characters, invisible ones and those that turn the
 * direction of writing are dropped, because with them a name can make the page read as something else.
 */
function printable(name: string): string {
  const visible = name.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\u2800]/gu, "");
  return [...visible.trim()].slice(0, 200).join(""); // by characters: half of one breaks other people's parsers
}

/** RFC 7591 §3.2.1 lets a server keep part of what was asked: Cursor and VS Code send lists no allow-list takes whole. */
function keptRedirects(uris: string[], policy: RedirectPolicy, report: (message: string) => void): string[] {
  const kept = [];
  const refused = [];
  for (const uri of uris) {
    const reason = policy.refusal(uri);
    if (reason) refused.push(reason);
    else kept.push(uri);
  }
  if (refused.length > 0) report(refused.join("; ").slice(0, 1000));
  // At once, and not later at /authorize: Claude Desktop then tries again with localhost.
  if (kept.length === 0) throw new OAuthError("invalid_redirect_uri", refused.join("; "));
  return kept;
}

/**
 * RFC 6749 §2.3.1 has both halves of Basic form-encoded, and many clients send them as they are: the secret is taken
 * either way, and the id in whichever way is known.
 */
function clientCredentials(authorization: string | undefined, form: URLSearchParams, isKnown: (id: string) => boolean) {
  const failed = (description: string) => new OAuthError("invalid_client", description, { status: 401 });
  const id = form.get("client_id");
  const encoded = authorization?.match(/^Basic +(\S+) *$/i)?.[1];
  if (encoded === undefined) {
    if (id === null) throw failed("client_id is missing");
    return { id, secrets: form.getAll("client_secret") };
  }
  if (form.has("client_secret")) {
    throw new OAuthError("invalid_request", "The client authenticates both by header and by body (RFC 6749 §2.3)");
  }
  const [, name, password] = decodeBase64(encoded)?.match(/^([^:]*):(.*)$/s) ?? [];
  if (name === undefined || password === undefined) throw failed("The Basic credentials cannot be read");
  const known = isKnown(name) ? name : decodeForm(name);
  if (id !== null && id !== known) throw failed("client_id differs between header and body");
  return { id: known, secrets: [password, decodeForm(password)] };
}

function decodeForm(value: string): string {
  return new URLSearchParams(`value=${value.replaceAll("&", "%26")}`).get("value")!;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Client ID Metadata Documents
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const DOCUMENT_TIMEOUT_SECONDS = 5;
const MAX_DOCUMENT_BYTES = 16 * 1024;
const MAX_DOCUMENTS = 100;
const MAX_DOCUMENT_REQUESTS = 8;
/** Whatever a document's own headers say: it is not asked for more often than the one, nor trusted longer than the other. */
const MIN_DOCUMENT_AGE = MINUTE;
const MAX_DOCUMENT_AGE = DAY;
/** How long an old copy stands in for a document that cannot be had. */
const STALE_DOCUMENT_AGE = 30 * DAY;

/** A client_id that is the address of the client's own metadata: https with a path (draft-ietf-oauth-client-id-metadata-document §3). */
function isDocumentUrl(client_id: string): boolean {
  if (!client_id.startsWith("https://") || client_id.length > MAX_CLIENT_ID_LENGTH) return false;
  const url = URL.parse(client_id);
  // Client ids are compared as strings, so only the one way to write a URL is taken: no dot segments, no default port,
  // no upper-case host, no other form of an address.
  return url?.href === client_id && url.pathname !== "/" && !client_id.includes("#") && !url.username && !url.password;
}

function publicClient(id: string, more: Partial<Client> = {}): Client {
  return {
    id,
    name: new URL(id).host,
    redirect_uris: [],
    secret: undefined,
    refreshes: true,
    source: "document",
    ...more,
  };
}

/**
 * Reads client metadata documents, with a cache that follows their HTTP headers within bounds. Nothing is stored: what
 * anybody can make this server fetch lives in bounded memory. The address of a document is a stranger's choice, which
 * is why it is fetched with {@linkcode fetchPublicly}.
 */
function documentReader(fetcher: MetadataFetcher): (client_id: string) => Promise<Client> {
  const cache = new Map<string, { client: Client; fresh: number; until: number }>();
  // Apart from the good ones, so that a crowd of bad addresses cannot push these out.
  const failures = new Map<string, { error: unknown; until: number }>();
  const underWay = new Map<string, Promise<Client>>();

  async function read(client_id: string): Promise<Client> {
    try {
      const { client, maxAge } = await fetchDocument(client_id, fetcher);
      const now = seconds();
      remember(cache, client_id, { client, fresh: now + maxAge, until: now + STALE_DOCUMENT_AGE });
      return client;
    } catch (error) {
      remember(failures, client_id, { error, until: seconds() + MIN_DOCUMENT_AGE });
      return standIn(client_id, error);
    }
  }

  /** The last good copy, or what is known of the big ones: an outage at the client's site must lock nobody out. */
  function standIn(client_id: string, error: unknown): Client {
    const cached = cache.get(client_id);
    const client = cached && cached.until > seconds() ? cached.client : wellKnownClient(client_id);
    if (!client) throw error;
    return client;
  }

  return async (client_id) => {
    const cached = cache.get(client_id);
    if (cached && cached.fresh > seconds()) return cached.client;
    const failure = failures.get(client_id);
    if (failure && failure.until > seconds()) return standIn(client_id, failure.error);
    const running = underWay.get(client_id);
    if (running) return await running;
    if (underWay.size >= MAX_DOCUMENT_REQUESTS) {
      const description = "Too many apps are asking at once; try again in a few seconds";
      const busy = new OAuthError("server_error", description, { status: 503, headers: { "Retry-After": "5" } });
      return standIn(client_id, busy);
    }
    const reading = read(client_id).finally(() => underWay.delete(client_id));
    underWay.set(client_id, reading);
    return await reading;
  };
}

/** Sets an entry of a map that forgets its oldest ones. */
function remember<T>(map: Map<string, T>, key: string, value: T): void {
  map.delete(key); // so that it moves to the end of the line
  map.set(key, value);
  if (map.size > MAX_DOCUMENTS) map.delete(map.keys().next().value!);
}

/** Fetches and checks one document. Time and size are counted here, on the stream, whatever its headers promise. */
async function fetchDocument(client_id: string, fetcher: MetadataFetcher): Promise<{ client: Client; maxAge: number }> {
  const unusable = (reason: string, cause?: unknown) =>
    // Not invalid_client: the client would take its registration for dead and come back with the same address.
    new OAuthError("invalid_request", `The app's metadata at ${client_id} ${reason}`, {
      event: "client_document_refused",
      cause,
    });
  const signal = AbortSignal.timeout(DOCUMENT_TIMEOUT_SECONDS * 1000);
  let text: string;
  let maxAge: number;
  try {
    const response = await inTime(fetcher(client_id, signal), signal);
    if (response.status !== 200) throw new Error(`answered ${response.status}`); // no redirects: they could lead anywhere
    text = await inTime(readLimited(response.body, MAX_DOCUMENT_BYTES), signal);
    maxAge = cacheSeconds(response.headers);
  } catch (cause) {
    throw unusable("cannot be read", cause);
  }
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch (cause) {
    throw unusable("is not JSON", cause);
  }
  const metadata = readClientMetadata(body);
  const { client_id: own, client_secret, token_endpoint_auth_methods_supported: offered } = body as Record<
    string,
    unknown
  >;
  if (own !== client_id) throw unusable("names another client_id"); // a copy of somebody else's document
  if (!metadata.client_name) throw unusable("has no client_name");
  const method = metadata.token_endpoint_auth_method ?? "none";
  // A published document can hold no secret. One that can sign says so, and is taken as public if it offers that too.
  if (client_secret !== undefined || method.startsWith("client_secret")) throw unusable("relies on a shared secret");
  if (method !== "none" && !(Array.isArray(offered) && offered.includes("none"))) {
    throw unusable(`asks for ${quote(method)}, which this server does not offer`);
  }
  const { client_name: name, redirect_uris, grant_types } = metadata;
  const refreshes = grant_types?.includes("refresh_token") ?? true;
  return { client: publicClient(client_id, { name, redirect_uris, refreshes }), maxAge };
}

/** RFC 9111 §5.2.2, as much as matters for a small document. */
function cacheSeconds(headers: Headers): number {
  const control = headers.get("Cache-Control")?.toLowerCase() ?? "";
  const age = /no-store|no-cache/.test(control) ? 0 : Number(control.match(/max-age=(\d+)/)?.[1] ?? HOUR);
  return Math.min(Math.max(age, MIN_DOCUMENT_AGE), MAX_DOCUMENT_AGE);
}

/** Gives up on a promise when the signal says so, even if whoever made it does not listen. */
function inTime<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}

/** Fetches a document at an address that a stranger chose. */
type MetadataFetcher = (url: string, signal: AbortSignal) => Promise<Response>;

/**
 * GET over TLS to a public address, and to no other: not to this machine, its network, or the metadata service of a
 * cloud. The name is resolved once; every address it has is checked, and the connection is made to one of those that
 * were checked, so a name that changes its answer in between gains nothing. Addresses in a URL are seen by the same
 * check in whatever form they are written. Redirects are not followed.
 *
 * Deno, Bun and Node all connect through the `lookup` they are given, so all three guarantee this. Where `node:https`
 * is missing, nothing is fetched, and only the documents known beforehand are there. A proxy that the environment
 * prescribes is not used.
 */
async function fetchPublicly(url: string, signal: AbortSignal): Promise<Response> {
  const { hostname } = new URL(url);
  const { net, https, stream } = {
    net: nodeModule("node:net"),
    https: nodeModule("node:https"),
    stream: nodeModule("node:stream"),
  };
  const literal = hostname.replace(/^\[|\]$/g, "");
  // An address is connected to without a lookup.
  if (net.isIP(literal) && !isPublicAddress(literal)) throw new Error(`${hostname} is not a public address`);
  // deno-lint-ignore no-explicit-any
  const message: any = await new Promise((resolve, reject) => {
    const headers = { Accept: "application/json", "User-Agent": "personal-auth" };
    https.get(url, { agent: false, lookup: publicLookup, signal, headers }, resolve).on("error", reject);
  });
  const headers = new Headers();
  for (const name of ["content-type", "cache-control"]) {
    if (message.headers[name]) headers.set(name, message.headers[name]);
  }
  return new Response(message.statusCode === 200 ? stream.Readable.toWeb(message) : null, {
    status: message.statusCode === 200 ? 200 : 502,
    headers,
  });
}

// deno-lint-ignore no-explicit-any
function publicLookup(hostname: string, options: { all?: boolean }, callback: (...args: any[]) => void): void {
  const done = (error: Error | null, addresses: { address: string; family: number }[] = []) => {
    const inside = addresses.find(({ address }) => !isPublicAddress(address));
    if (error || inside || addresses.length === 0) {
      callback(
        error ?? new Error(`${hostname} resolves to ${inside?.address ?? "nothing"}, which is not a public address`),
      );
    } else if (options.all) callback(null, addresses);
    else callback(null, addresses[0]!.address, addresses[0]!.family);
  };
  nodeModule("node:dns").lookup(hostname, { ...options, all: true }, done);
}

/** What is not the public internet, by the special-purpose address registries (RFC 6890) and their later entries. */
const PRIVATE_IPV4 =
  "0/8 10/8 100.64/10 127/8 169.254/16 172.16/12 192.0.0/24 192.0.2/24 192.31.196/24 192.52.193/24 " +
  "192.88.99/24 192.168/16 192.175.48/24 198.18/15 198.51.100/24 203.0.113/24 224/3 168.63.129.16/32"; // the last: Azure's
/** Of IPv6 only 2000::/3 is global; inside it, what is special, for documentation, or carries an IPv4 address (6to4, Teredo). */
const PRIVATE_IPV6 = "2001::/23 2001:db8::/32 2002::/16 3fff::/20 2620:4f:8000::/48";

const addressLists = lazy(() => {
  const { BlockList } = nodeModule("node:net");
  const [inside, outside] = [new BlockList(), new BlockList()];
  for (const range of PRIVATE_IPV4.split(" ")) {
    const [address = "", bits] = range.split("/");
    inside.addSubnet([...address.split("."), "0", "0", "0"].slice(0, 4).join("."), Number(bits), "ipv4");
  }
  for (const range of PRIVATE_IPV6.split(" ")) {
    const [address, bits] = range.split("/");
    inside.addSubnet(address, Number(bits), "ipv6");
  }
  outside.addSubnet("2000::", 3, "ipv6");
  return { inside, outside };
});

/**
 * Whether an address may be connected to on a stranger's word.
 *
 * @internal
 */
export function isPublicAddress(address: string): boolean {
  const { inside, outside } = addressLists();
  if (/^[0-9.]+$/.test(address)) return nodeModule("node:net").isIPv4(address) && !inside.check(address, "ipv4");
  const plain = address.split("%")[0]!; // without the name of an interface
  return nodeModule("node:net").isIPv6(plain) && outside.check(plain, "ipv6") && !inside.check(plain, "ipv6");
}

/** The documents of the clients that most people use, as they were when this file was written. */
const WELL_KNOWN_CLIENTS: [id: RegExp, name: string, redirect_uris: string[]][] = [
  [/^https:\/\/claude\.ai\/oauth\/mcp-oauth-client-metadata$/, "Claude", [
    "https://claude.ai/api/mcp/auth_callback",
    "https://claude.com/api/mcp/auth_callback",
  ]],
  [/^https:\/\/claude\.ai\/oauth\/claude-code-client-metadata$/, "Claude Code", [
    "http://localhost/callback",
    "http://127.0.0.1/callback",
  ]],
  [/^https:\/\/chatgpt\.com\/oauth\/client\.json$/, "ChatGPT", [
    "https://chatgpt.com/connector_platform_oauth_redirect",
  ]],
  [/^https:\/\/chatgpt\.com\/oauth\/(?!codex\/)([\w-]+)\/client\.json$/, "ChatGPT", [
    "https://chatgpt.com/connector/oauth/$1",
  ]],
  [/^https:\/\/chatgpt\.com\/oauth\/codex\/client\.json$/, "Codex", ["http://127.0.0.1/callback"]],
  [/^https:\/\/chatgpt\.com\/oauth\/codex\/([\w-]+)\/client\.json$/, "Codex", ["http://127.0.0.1/callback/$1"]],
  [/^https:\/\/vscode\.dev\/oauth\/client-metadata\.json$/, "Visual Studio Code", [
    "https://vscode.dev/redirect",
    "https://insiders.vscode.dev/redirect",
    "http://127.0.0.1/",
    "http://localhost/",
  ]],
];

function wellKnownClient(client_id: string): Client | undefined {
  for (const [id, name, redirects] of WELL_KNOWN_CLIENTS) {
    const match = client_id.match(id);
    if (!match) continue;
    return publicClient(client_id, { name, redirect_uris: redirects.map((uri) => uri.replace("$1", match[1] ?? "")) });
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Redirect policy
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface RedirectPolicy {
  /** Why a redirect URI is refused, for the client and the owner alike; `undefined` if it is allowed. */
  refusal(uri: string): string | undefined;
  /** Whether the owner's list names the site of this URL. */
  vouchesFor(url: URL): boolean;
}

/**
 * The allow-list names the apps that may ask, and so keeps strangers' clients off the owner's page. It is not what
 * keeps strangers out: every Claude account has the same redirect URI.
 */
function redirectPolicy(allowed: string[] | null): RedirectPolicy {
  const exact = new Set(allowed);
  const suffixes = (allowed ?? []).filter((entry) => entry.startsWith("*.")).map((entry) => entry.slice(1));
  const listed = (url: URL) => {
    const entry = allowEntry(url);
    return exact.has(entry) || (url.protocol === "https:" && suffixes.some((suffix) => entry.endsWith(suffix)));
  };
  return {
    refusal(uri) {
      const fault = unsafeRedirect(uri);
      if (fault) return `redirect_uri ${quote(uri)} ${fault}`;
      const url = new URL(uri);
      if (allowed === null || listed(url)) return undefined;
      const entry = quote(allowEntry(url));
      return `redirect_uri ${quote(uri)} is not allowed here; the owner can add ${entry} to allowedRedirectDomains`;
    },
    vouchesFor: (url) => url.protocol === "https:" && !isLoopback(url.hostname) && listed(url),
  };
}

/** The entry of `allowedRedirectDomains` that lets a URL in. */
function allowEntry(url: URL): string {
  if (isLoopback(url.hostname) && /^https?:$/.test(url.protocol)) return "localhost";
  return url.protocol === "https:" ? url.host : `${url.protocol}//${url.host}`;
}

/** Schemes a browser acts on itself: a code sent there is script, or a file, or readable on the way. */
const NEVER_SCHEMES = /^(javascript|data|file|blob|filesystem|vbscript|about|view-source|intent|ftp|wss?):/i;

/** What no list can allow. Each rule closes a known way to make a URI look like another one, or run as script. */
function unsafeRedirect(uri: unknown): string | undefined {
  if (typeof uri !== "string" || !/^[\x21-\x7e]+$/.test(uri)) return "must be printable ASCII without spaces";
  if (uri.includes("\\")) return "must not hold a backslash"; // https://claude.ai\@evil.example
  if (uri.includes("#")) return "must not have a fragment"; // RFC 6749 §3.1.2
  if (NEVER_SCHEMES.test(uri)) return "has a scheme that browsers run or open themselves";
  const url = URL.parse(uri);
  if (!url || !/^[a-z][a-z0-9+.-]*:/i.test(uri)) return "is not an absolute URI";
  if (/^[^/?]*\/\/[^/?]*@/.test(uri)) return "must not hold a user name"; // https://claude.ai@evil.example
  if (url.protocol === "http:" && !isLoopback(url.hostname)) return "must be https, or http on localhost";
  if (/^https?:/.test(url.protocol) && !/^https?:\/\/[^/]/i.test(uri)) return "must name its host after //"; // https:/\x
  const taken = ["code", "state", "iss", "error"].filter((name) => url.searchParams.has(name));
  // A client that takes the first of two equal parameters would read the one that stood there before.
  if (taken.length > 0) return `must not carry the parameter ${taken[0]}`;
  return undefined;
}

function isLoopback(hostname: string): boolean {
  return hostname === "localhost" || hostname === "127.0.0.1" || hostname === "[::1]";
}

/**
 * Exact string comparison (OAuth 2.1 §4.1.1), except that a native app's loopback listener may be on any port
 * (RFC 8252 §7.3). The three loopback names stay different from each other: whoever holds one need not hold the others.
 */
function sameRedirect(registered: string, requested: string): boolean {
  const portless = (uri: string) =>
    uri.replace(/^(http:\/\/(?:localhost|127\.0\.0\.1|\[::1\])):\d{1,5}(?=[/?]|$)/, "$1");
  return registered === requested || portless(registered) === portless(requested);
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Authorization endpoint
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Where an answer may be sent: only what has passed `authorizationTarget` is ever redirected to. */
interface Target {
  client: Client;
  redirect_uri: string;
  state: string | null;
}

/** What the owner is asked to approve. */
interface AuthorizationRequest extends Target {
  scopes: string[];
  code_challenge: string;
}

const MAX_REQUEST_LENGTH = 16 * 1024;

/**
 * GET shows what is asked and changes nothing, so that a prefetch, a preview or a crawler does no harm; POST decides.
 * The form carries the request word for word, and POST checks it again from the start.
 */
function authorizeEndpoint(
  settings: Settings,
  clients: Clients,
  policy: RedirectPolicy,
  grants: Grants,
  owner: Owner,
): { show: Handler; decide: Handler } {
  const { issuer, wording, emit } = settings;

  /** Runs with a checked request; answers a faulty one where it has to be answered: to the client, or on a page. */
  async function withRequest(
    c: Context,
    encoded: string,
    then: (request: AuthorizationRequest) => Promise<Response>,
  ): Promise<Response> {
    let target: Target;
    let params: URLSearchParams;
    try {
      if (encoded.length > MAX_REQUEST_LENGTH) throw new OAuthError("invalid_request", "The request is too long");
      params = parameters(encoded);
      target = await authorizationTarget(params, clients, policy);
    } catch (error) {
      return unanswerable(c, error, settings);
    }
    let request: AuthorizationRequest;
    try {
      request = authorizationRequest(params, target, settings);
    } catch (error) {
      if (!(error instanceof OAuthError)) throw error;
      return redirectBack(c, target, { error: error.code, error_description: errorDescription(error.message) });
    }
    return then(request);
  }

  function answerUri({ redirect_uri, state }: Target, answer: Record<string, string>): string {
    // iss on success and on error (RFC 9207 §2), so that a client of several servers cannot be confused about which
    // one answered. Appended, never parsed and rebuilt: the rest of the URI stays byte for byte what was registered.
    // Spaces as %20, which every decoder reads; some clients show a + as it is.
    const params = new URLSearchParams({ ...answer, ...(state !== null && { state }), iss: issuer });
    const query = params.toString().replaceAll("+", "%20");
    return `${redirect_uri}${redirect_uri.includes("?") ? "&" : "?"}${query}`;
  }

  function redirectBack(c: Context, target: Target, answer: Record<string, string>): Response {
    c.header("Cache-Control", "no-store");
    // 302, never 307: the browser would post the owner's password on to the client.
    return c.redirect(answerUri(target, answer), 302);
  }

  async function ask(c: Context, request: AuthorizationRequest, encoded: string, { browser, who }: Visit, again?: {
    csrf: string;
    problem: Problem;
  }): Promise<Response> {
    const { client, redirect_uri } = request;
    const csrf = again?.csrf ?? await owner.seal(browser, encoded);
    const vouched = policy.vouchesFor(new URL(client.source === "document" ? client.id : redirect_uri));
    return consentPage(c, settings, request, { who, encoded, csrf, vouched, ...(again && { problem: again.problem }) });
  }

  function answered(c: Context, request: AuthorizationRequest, { code }: { code?: string | undefined }) {
    return answeredPage(c, settings, request.client.name, code && answerUri(request, { code }));
  }

  const show: Handler = (c) => {
    const encoded = c.req.url.split("?").slice(1).join("?").split("#")[0]!; // not by URL: a hostile Host is none
    return withRequest(c, encoded, async (request) => {
      const visit = await owner.visit(c);
      if (visit.answer) return visit.answer;
      if (visit.who === "stranger") return messagePage(c, settings, 403, wording.strangerTitle, wording.stranger);
      return await ask(c, request, encoded, visit);
    });
  };

  const decide: Handler = async (c) => {
    const form = await readForm(c);
    const encoded = form.get("request") ?? "";
    const csrf = form.get("csrf") ?? "";
    const visit = await owner.visit(c);
    if (visit.answer) return visit.answer;
    const decision = form.get("decision");
    if (!await owner.sealed(visit.browser, encoded, csrf) || (decision !== "approve" && decision !== "deny")) {
      if (encoded === "" || !visit.known) return messagePage(c, settings, 403, wording.expired, wording.expiredAdvice);
      return withRequest(c, encoded, async (request) => {
        // Of two clicks, the first may have been answered before the second: that signed the owner in, and the browser's
        // secret is no longer the form's. The form proves nothing then, but the session does: only the owner is told.
        const answer = visit.who === "owner" ? await grants.answered(csrf, request) : undefined;
        if (answer) return answered(c, request, answer);
        // A form left open too long, or in a second tab while the first one signed in: asked again, and nothing lost.
        const problem: Problem = { status: 403, message: wording.expiredAgain };
        return await ask(c, request, encoded, visit, { csrf: await owner.seal(visit.browser, encoded), problem });
      });
    }
    return withRequest(c, encoded, async (request) => {
      const { client, redirect_uri } = request;
      if (decision === "deny") {
        emit("connection_denied", "the request was denied", { clientName: client.name });
        return redirectBack(c, request, { error: "access_denied", error_description: "The owner denied the request" });
      }
      const problem = await owner.prove(c, visit, form.get("password") ?? "");
      if (problem) return await ask(c, request, encoded, visit, { csrf, problem });
      const { code, repeated } = await grants.approve(csrf, request);
      if (repeated) return answered(c, request, { code });
      emit("connection_approved", `approved for ${redirect_uri}`, { clientName: client.name });
      return redirectBack(c, request, { code: code! });
    });
  };

  return { show, decide };
}

/** Client and redirect URI: until both are known good, nothing may be redirected anywhere (OAuth 2.1 §4.1.2.1). */
async function authorizationTarget(params: URLSearchParams, clients: Clients, policy: RedirectPolicy): Promise<Target> {
  const client_id = params.get("client_id");
  if (client_id === null) throw new OAuthError("invalid_request", "The request names no client_id");
  const client = await clients.resolve(client_id);
  if (!client) {
    throw new OAuthError("invalid_client", "This server does not know the app that sent you here", { status: 401 });
  }
  const [only, ...others] = client.redirect_uris;
  const redirect_uri = params.get("redirect_uri") ?? (others.length === 0 ? only : undefined);
  if (redirect_uri === undefined) {
    throw new OAuthError("invalid_request", "The request names no redirect_uri");
  }
  if (!client.redirect_uris.some((registered) => sameRedirect(registered, redirect_uri))) {
    throw new OAuthError(
      "invalid_request",
      `redirect_uri ${quote(redirect_uri)} is not one that the client registered`,
    );
  }
  // Again, although registration asked: the owner may have shortened the list since, and a signed client_id stays.
  const refused = client.source === "preregistered" ? unsafeRedirect(redirect_uri) : policy.refusal(redirect_uri);
  if (refused) throw new OAuthError("invalid_request", refused, { event: "redirect_refused" });
  return { client, redirect_uri, state: params.get("state") };
}

/** The rest of the request; what is wrong with it is the client's to hear (OAuth 2.1 §4.1.1, RFC 7636 §4.3). */
function authorizationRequest(params: URLSearchParams, target: Target, settings: Settings): AuthorizationRequest {
  const invalid = (description: string, code = "invalid_request") => new OAuthError(code, description);
  if (params.has("request")) throw invalid("Request objects are not supported", "request_not_supported");
  if (params.has("request_uri")) {
    throw invalid("Request objects are not supported", "request_uri_not_supported");
  }
  const response_type = params.get("response_type");
  if (response_type === null) throw invalid("response_type is missing");
  if (response_type !== "code") throw invalid("response_type must be code", "unsupported_response_type");
  if ((params.get("response_mode") ?? "query") !== "query") throw invalid("response_mode must be query");
  const code_challenge = params.get("code_challenge");
  // Without PKCE a stolen code is a stolen connection; "plain" puts the verifier where the code is stolen from.
  if (code_challenge === null) throw invalid("code_challenge is missing: PKCE is required");
  if (params.get("code_challenge_method") !== "S256") throw invalid("code_challenge_method must be S256");
  if (!/^[A-Za-z0-9_-]{43}$/.test(code_challenge)) {
    throw invalid("code_challenge must be a base64url SHA-256 digest");
  }
  checkResource(params, settings);
  return { ...target, code_challenge, scopes: grantedScopes(params.get("scope"), settings.scopes) };
}

/** An answer to a request that names nobody who could be answered: a page, or JSON for a program that asks for it. */
function unanswerable(c: Context, error: unknown, settings: Settings): Response | Promise<Response> {
  if (!(error instanceof OAuthError) || error.status >= 500) throw error;
  const { code, message, event, cause } = error;
  if (event) settings.emit(event, message, defined({ cause }));
  const accept = c.req.header("Accept") ?? "";
  // mcp-remote asks this way before it opens the browser, and registers again when it reads invalid_client.
  if (accept.includes("application/json") && !accept.includes("text/html")) return errorResponse(c, error, settings);
  const { wording } = settings;
  let [title, advice] = [wording.faulty, wording.faultyAdvice];
  if (code === "invalid_client") [title, advice] = [wording.unknownClient, wording.unknownClientAdvice];
  if (event === "redirect_refused") title = wording.refusedRedirect;
  if (event === "client_document_refused") [title, advice] = [wording.unreadClient, wording.unreadClientAdvice];
  return messagePage(c, settings, 400, title, `${message}.`, advice);
}

/**
 * RFC 8707 §2: whatever is asked must be this one resource. Clients differ in slashes, case and default ports, and some
 * send the base URL, which on a server with one resource can mean nothing else. What is stored and checked as the
 * audience is always the canonical URL.
 */
function checkResource(params: URLSearchParams, { resource, resourceNames }: Settings): void {
  for (const asked of params.getAll("resource")) {
    const normal = normalizeResource(asked);
    if (normal === undefined || !resourceNames.includes(normal)) {
      throw new OAuthError("invalid_target", `This server grants access to ${resource} only`);
    }
  }
}

function normalizeResource(resource: string): string | undefined {
  const url = URL.parse(resource);
  if (!url || resource.includes("#") || url.username || url.password || !/^https?:$/.test(url.protocol)) {
    return undefined;
  }
  return url.origin + url.pathname.replace(/\/+$/, "") + url.search;
}

/**
 * RFC 6749 §3.3: what is asked and on offer; if that is nothing, the default, because clients ask for scopes they know
 * from other servers. Never more than is on offer. `offline_access` only if asked: it is a formality here, where every
 * client gets a refresh token.
 */
function grantedScopes(asked: string | null | undefined, { all, byDefault }: Pick<Scopes, "all" | "byDefault">) {
  const wanted = new Set(asked?.split(/\s+/));
  const granted = all.filter((scope) => wanted.has(scope));
  return [...(granted.length > 0 ? granted : byDefault), ...(wanted.has(OFFLINE_ACCESS) ? [OFFLINE_ACCESS] : [])];
}

/** A refresh may ask for less than was granted, and gets no more whatever it asks (RFC 6749 §6). */
function narrowedScopes(asked: string, granted: string[]): string[] {
  const all = granted.filter((scope) => scope !== OFFLINE_ACCESS);
  return grantedScopes(asked, { all, byDefault: all }).filter((scope) => granted.includes(scope));
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Token and revocation endpoints
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** OAuth 2.1 §3.2: a code or a refresh token in, an access token out. */
async function tokenEndpoint(c: Context, clients: Clients, grants: Grants, settings: Settings): Promise<Response> {
  const arrived = seconds();
  const form = await readForm(c);
  const client = await clients.authenticate(c, form);
  const required = (name: string): string => {
    const value = form.get(name);
    if (value === null) throw new OAuthError("invalid_request", `${name} is missing`);
    return value;
  };
  const grant_type = required("grant_type");
  checkResource(form, settings);
  c.header("Cache-Control", "no-store");
  if (grant_type === "authorization_code") {
    const code_verifier = required("code_verifier");
    if (!/^[A-Za-z0-9._~-]{43,128}$/.test(code_verifier)) {
      throw new OAuthError("invalid_request", "code_verifier must be 43 to 128 unreserved characters (RFC 7636 §4.1)");
    }
    const redirect_uri = form.get("redirect_uri") ?? undefined;
    return c.json(await grants.redeem({ code: required("code"), code_verifier, redirect_uri, client, arrived }));
  }
  if (grant_type === "refresh_token") {
    const scope = form.get("scope") ?? undefined;
    return c.json(await grants.refresh({ refresh_token: required("refresh_token"), scope, client }));
  }
  throw new OAuthError("unsupported_grant_type", "grant_type must be authorization_code or refresh_token");
}

/**
 * RFC 7009: ends the connection that a token of either kind belongs to; the client itself stays, because Claude Code
 * signs out and then comes back with the same client_id. An unknown token is answered 200 as well (§2.2).
 */
async function revocationEndpoint(c: Context, clients: Clients, grants: Grants): Promise<Response> {
  const form = await readForm(c);
  const client = await clients.authenticate(c, form);
  const token = form.get("token");
  if (token === null) throw new OAuthError("invalid_request", "token is missing");
  await grants.revokeToken(token, client);
  c.header("Cache-Control", "no-store");
  return c.body(null, 200);
}

/**
 * RFC 7662, for a resource server that runs elsewhere. Only clients that the owner registered with a secret may ask:
 * to anybody else an answer would tell whether a token found somewhere is alive.
 */
async function introspectionEndpoint(
  c: Context,
  clients: Clients,
  grants: Grants,
  { issuer }: Settings,
): Promise<Response> {
  const form = await readForm(c);
  const { source, secret } = await clients.authenticate(c, form);
  if (source !== "preregistered" || secret === undefined) {
    throw new OAuthError("unauthorized_client", "Introspection is for clients registered with a secret by the owner");
  }
  const token = form.get("token");
  if (token === null) throw new OAuthError("invalid_request", "token is missing");
  c.header("Cache-Control", "no-store");
  try {
    const { clientId: client_id, scopes, expiresAt: exp, resource } = await grants.verify(token);
    const scope = scopes.join(" ");
    return c.json({ active: true, client_id, scope, exp, token_type: "Bearer", iss: issuer, aud: resource?.href });
  } catch (error) {
    if (error instanceof OAuthError && error.code === "invalid_token") return c.json({ active: false });
    throw error;
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Grants
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * A connection: one record, `grant/<id>`, and everything about it. Every token names its grant, so that checking one is
 * one read, every change is one atomic change of one record, and ending the connection ends all its tokens.
 * Only SHA-256 hashes of secrets are kept. Times are in seconds, with their fractions.
 */
export interface Grant {
  client: { id: string; name: string };
  /** Absent for a personal access token. */
  redirect_uri?: string;
  scopes: string[];
  resource: string;
  created: number;
  used?: number;
  expires: number;
  revoked?: number;
  /** `refreshes`: what the client registered for. */
  code?: { hash: string; challenge: string; refreshes: boolean; expires: number; redeemed?: number };
  refresh?: RefreshState;
  /** Live access tokens, oldest first: a refresh leaves the earlier ones to their own expiry. */
  access: AccessToken[];
}

export interface RefreshState {
  /** The current refresh token, RT(n). */
  hash: string;
  n: number;
  /** Whether anything issued with RT(n) has been presented: then the client has it, and RT(n-1) has had its day. */
  presented: boolean;
  /** The latest refresh tokens before RT(n) and when each was first rotated, newest first. */
  rotated: [hash: string, at: number][];
}

export interface AccessToken {
  hash: string;
  /** The n of the refresh token it was issued with. */
  n: number;
  /** Where it has fewer than the grant. */
  scopes?: string[];
  expires: number;
}

/** What a transition leaves: the record to keep (unchanged: the same object) and what happened. */
export interface Transition {
  grant: Grant;
  outcome: "issued" | "replayed" | "reused" | "refused";
}

/** What is to be issued, hashed. */
export interface Issue {
  access: Omit<AccessToken, "n">;
  refresh: string;
  /** When the connection ends unless it is refreshed. */
  expires: number;
}

const CODE_TTL = 5 * MINUTE;
/** A refresh token stays good this long after its rotation: clients on several machines refresh in parallel. */
const REFRESH_GRACE = 2 * MINUTE;
/** Bounds on one record for clients that refresh without pause; Deno KV takes 64 KiB, and these come to half of it. */
const MAX_ACCESS_TOKENS = 100;
const MAX_ROTATIONS = 200;

// The life of a grant as pure functions of (grant, request, now): OAuth's hard rules, without HTTP or storage. They are
// exported so that tests can walk through them; a program has no use for them.

/**
 * The owner said yes: a code, and nothing else yet. The record outlives the code until its form is worthless too, so
 * that the form cannot be sent a second time.
 *
 * @internal
 */
export function approveGrant(
  request: Pick<Grant, "client" | "scopes" | "resource"> & { redirect_uri: string },
  code: { hash: string; challenge: string; refreshes: boolean },
  now: number,
): Grant {
  return { ...request, created: now, expires: now + FORM_TTL, code: { ...code, expires: now + CODE_TTL }, access: [] };
}

/**
 * OAuth 2.1 §4.1.3. A wrong attempt changes nothing: it costs the client neither the code nor the connection.
 *
 * @internal
 */
export function redeemGrant(
  grant: Grant,
  request: { hash: string; challenge: string; client_id: string; redirect_uri?: string | undefined; arrived: number },
  issue: Issue,
  now: number,
): Transition {
  const { code } = grant;
  const refused: Transition = { grant, outcome: "refused" };
  if (grant.revoked !== undefined || code?.hash !== request.hash) return refused;
  if (grant.client.id !== request.client_id || code.challenge !== request.challenge) return refused;
  if (request.redirect_uri !== undefined && request.redirect_uri !== grant.redirect_uri) return refused;
  if (code.redeemed !== undefined) {
    // Client and verifier are right, so somebody else holds both: end what was issued (OAuth 2.1 §4.1.3). Only a
    // request that was already here when the code was redeemed is a client's own duplicate; it is refused, no more.
    return request.arrived < code.redeemed ? refused : { grant: revokeGrant(grant, now), outcome: "replayed" };
  }
  if (code.expires <= now) return refused;
  const { access, refresh, expires } = issue;
  return {
    outcome: "issued",
    grant: {
      ...grant,
      expires: code.refreshes ? expires : access.expires,
      code: { ...code, redeemed: now },
      access: [{ ...access, n: 0 }],
      ...(code.refreshes && { refresh: { hash: refresh, n: 0, presented: false, rotated: [] } }),
    },
  };
}

/**
 * OAuth 2.1 §4.3. The successor is derived from the token, so whoever presents the same token gets the same answer:
 * parallel and repeated requests need no luck. A rotated token is accepted (a) within the grace period, or (b) for as
 * long as nothing that was issued for it has been presented: then the answer was lost on its way, however long ago.
 * Anything else is a second holder, and the connection ends.
 *
 * `request.hash` must be the hash of a refresh token that this server issued for this grant.
 *
 * @internal
 */
export function refreshGrant(
  grant: Grant,
  request: { hash: string; client_id: string; resource: string },
  issue: Issue,
  now: number,
): Transition {
  const { refresh } = grant;
  const ours = grant.client.id === request.client_id && grant.resource === request.resource;
  if (grant.revoked !== undefined || !refresh || !ours || grant.expires <= now) return { grant, outcome: "refused" };
  const { hash, rotated, n } = refresh;
  const isCurrent = hash === request.hash;
  const steps = isCurrent ? 0 : rotated.findIndex(([known]) => known === request.hash) + 1;
  let spent = rotated;
  if (!isCurrent) {
    const at = rotated[steps - 1]?.[1];
    const inGrace = at !== undefined && now - at <= REFRESH_GRACE;
    const unseen = steps === 1 && !refresh.presented;
    if (!inGrace && !unseen) return { grant: revokeGrant(grant, now), outcome: "reused" };
    // A lost answer that is given again counts as the first one: the client's other machines have their grace from here.
    if (!inGrace) spent = [[request.hash, now], ...rotated.slice(1)];
  }
  const { access: fresh } = issue;
  const issued = grant.access.find((token) => token.hash === fresh.hash);
  // A repeated answer is the first one over again; only if that has aged does its access token get new time.
  const lasts = issued && issued.expires - now >= (fresh.expires - now) / 2;
  if (!isCurrent && lasts && spent === rotated) return { grant, outcome: "issued" };
  const others = grant.access.filter((token) => token.expires > now && token !== issued);
  const access = [...others, { ...fresh, n: n + 1 - steps }].slice(-MAX_ACCESS_TOKENS);
  if (!isCurrent) {
    const repeated = { ...grant, access, used: now, expires: issue.expires, refresh: { ...refresh, rotated: spent } };
    return { grant: repeated, outcome: "issued" };
  }
  const recent = rotated.filter(([, at]) => now - at <= REFRESH_GRACE).slice(0, MAX_ROTATIONS - 1);
  return {
    outcome: "issued",
    grant: {
      ...grant,
      access,
      used: now,
      expires: issue.expires,
      refresh: { hash: issue.refresh, n: n + 1, presented: false, rotated: [[hash, now], ...recent] },
    },
  };
}

/**
 * The live access token of this hash and audience.
 *
 * @internal
 */
export function verifyGrant(grant: Grant, hash: string, resource: string, now: number): AccessToken | undefined {
  // Digests are compared, not tokens: how far two digests agree tells nothing about the token that is missing.
  const token = grant.access.find((candidate) => candidate.hash === hash);
  const live = token && token.expires > now && grant.expires > now && grant.revoked === undefined;
  return live && grant.resource === resource ? token : undefined;
}

/**
 * An access token was presented: what must be remembered of it, or the same object if that is nothing new.
 *
 * @internal
 */
export function presentGrant(grant: Grant, token: AccessToken, now: number): Grant {
  const { refresh } = grant;
  // The client has the latest answer: from here on, its predecessor in another hand is a theft.
  if (refresh && refresh.n === token.n && refresh.rotated.length > 0 && !refresh.presented) {
    return { ...grant, used: now, refresh: { ...refresh, presented: true } };
  }
  // Once a minute at the most, so that a busy client does not make every read a write.
  return Math.abs(now - (grant.used ?? 0)) < MINUTE ? grant : { ...grant, used: now };
}

/**
 * The end of a connection. The record stays a little as a tombstone, so that its approval cannot be posted again.
 *
 * @internal
 */
export function revokeGrant({ code: _code, refresh: _refresh, ...rest }: Grant, now: number): Grant {
  return { ...rest, access: [], revoked: rest.revoked ?? now };
}

interface TokenResponse {
  access_token: string;
  token_type: "Bearer";
  expires_in: number;
  refresh_token?: string;
  scope: string;
}

interface Grants {
  /** `repeated`: this form was sent before; its code is there for as long as it can be redeemed. */
  approve(form: string, request: AuthorizationRequest): Promise<{ code?: string; repeated: boolean }>;
  /** The same of a form that was sent before; nothing if it was not, or not with this request. */
  answered(form: string, request: AuthorizationRequest): Promise<{ code?: string } | undefined>;
  redeem(request: {
    code: string;
    code_verifier: string;
    redirect_uri: string | undefined;
    client: Client;
    arrived: number;
  }): Promise<TokenResponse>;
  refresh(request: { refresh_token: string; scope: string | undefined; client: Client }): Promise<TokenResponse>;
  revokeToken(token: string, client: Client): Promise<void>;
  /** The remembered answer at once: a request that waits for nothing is done before the next one begins. */
  verify(token: string): AuthInfo | Promise<AuthInfo>;
  connections: PersonalAuth["connections"];
  revoke: PersonalAuth["revoke"];
  /** With a form: nothing if it was sent before, and what it made is in use. */
  createToken(request: TokenRequest, form?: string): Promise<NewToken | undefined>;
}

/** Personal access tokens belong to no client; this stands where a `clientId` is expected. */
const PERSONAL = "personal-access-token";

/** The grants in the store: hashes what comes in, makes what goes out, and lets `transitions` decide. */
function grantKeeper(settings: Settings, store: Store, mac: Mac): Grants {
  const { resource, scopes: offered, accessTokenTtl, refreshTokenTtl, emit } = settings;
  const resourceUrl = new URL(resource);
  const resourceMetadata = { resourceMetadataUrl: settings.resourceMetadataUrl }; // a member of the second SDK's AuthInfo
  const verified = new Map<string, Verified>();

  const read = async (id: string) => await store.get(`grant/${id}`) as Grant | undefined;

  /** Applies a transition, atomically. Nothing to apply it to: refused. */
  async function apply(id: string, transition: (grant: Grant, now: number) => Transition, { expires }: Issue) {
    let outcome: Transition["outcome"] = "refused";
    const grant = await store.update(`grant/${id}`, (current) => {
      if (current === undefined) return undefined;
      const result = transition(current as Grant, seconds());
      outcome = result.outcome;
      return result.grant;
    }, { expiresAt: expires }) as Grant | undefined;
    return { outcome: outcome as Transition["outcome"], grant };
  }

  /**
   * What a form makes has its id from that form, so that sending it twice finds the first in its place. Writes a new
   * grant; answers the one that was there already.
   */
  async function insert(id: string, grant: Grant): Promise<Grant | undefined> {
    let before: Grant | undefined;
    await store.update(`grant/${id}`, (current) => {
      before = current as Grant | undefined;
      return before ?? grant;
    }, { expiresAt: grant.expires });
    return before;
  }

  const idOf = async (...form: string[]) => (await mac("grant", ...form)).slice(0, 32);
  const codeOf = async (id: string, form: string) => `pac_${id}${await mac("code", form)}`;

  const approve: Grants["approve"] = async (form, request) => {
    const id = await idOf(form);
    const code = await codeOf(id, form);
    const { client, redirect_uri, scopes, code_challenge: challenge } = request;
    const grant = approveGrant(
      { client: { id: client.id, name: client.name }, redirect_uri, scopes, resource },
      { hash: await sha256(code), challenge, refreshes: client.refreshes },
      seconds(),
    );
    const before = await insert(id, grant);
    return { repeated: before !== undefined, ...(isOpen(before ?? grant) && { code }) };
  };

  const answered: Grants["answered"] = async (form, { client, redirect_uri }) => {
    const id = await idOf(form);
    const grant = await read(id);
    if (grant?.client.id !== client.id || grant.redirect_uri !== redirect_uri) return undefined;
    return isOpen(grant) ? { code: await codeOf(id, form) } : {};
  };

  /** Of an impatient double click, the browser follows the second answer: it goes on with the code of the first. */
  function isOpen({ code }: Grant): boolean {
    return code !== undefined && code.redeemed === undefined && code.expires > seconds();
  }

  const redeem: Grants["redeem"] = async ({ code, code_verifier, redirect_uri, client, arrived }) => {
    const id = grantId("pac", code);
    const wrong = () => new OAuthError("invalid_grant", "The code is wrong, used, expired or meant for another client");
    if (!id) throw wrong();
    const access_token = `pat_${id}${random(32)}`;
    const refresh_token = await refreshToken(id + random(32));
    const request = {
      hash: await sha256(code),
      challenge: await sha256(code_verifier),
      client_id: client.id,
      redirect_uri,
      arrived,
    };
    const issue = await hashed(access_token, undefined, refresh_token);
    const { outcome, grant } = await apply(id, (grant, now) => redeemGrant(grant, request, issue, now), issue);
    if (outcome === "replayed") {
      report("code_replayed", "a code was redeemed twice: the connection is ended", id, grant);
    }
    if (outcome !== "issued" || !grant) throw wrong();
    return tokenResponse(grant, issue.access.hash, access_token, grant.refresh && refresh_token);
  };

  const refresh: Grants["refresh"] = async ({ refresh_token, scope, client }) => {
    const id = grantId("prt", refresh_token);
    const spent = () => new OAuthError("invalid_grant", "The refresh token is wrong, expired or revoked");
    // Only a token of our own making may end a connection: otherwise whoever learns a connection's id could.
    if (!id || refresh_token !== await refreshToken(refresh_token.slice(4, -CHECK_DIGITS))) throw spent();
    const granted = (await read(id))?.scopes;
    if (!granted) throw spent();
    const scopes = scope === undefined ? granted : narrowedScopes(scope, granted);
    const access_token = `pat_${id}${await mac("access", refresh_token, scopes.join(" "))}`;
    const successor = await refreshToken(id + await mac("refresh", refresh_token));
    const request = { hash: await sha256(refresh_token), client_id: client.id, resource };
    const narrower = scopes.length < granted.length ? scopes : undefined;
    const issue = await hashed(access_token, narrower, successor);
    const { outcome, grant } = await apply(id, (grant, now) => refreshGrant(grant, request, issue, now), issue);
    if (outcome === "reused") {
      report("refresh_token_reused", "a refresh token was used again: the connection is ended", id, grant);
    }
    if (outcome !== "issued" || !grant) throw spent();
    return tokenResponse(grant, issue.access.hash, access_token, successor);
  };

  /** What the record keeps of tokens that are about to be issued. */
  async function hashed(access_token: string, scopes: string[] | undefined, refresh_token: string): Promise<Issue> {
    const now = seconds();
    return {
      access: { hash: await sha256(access_token), ...defined({ scopes }), expires: now + accessTokenTtl },
      refresh: await sha256(refresh_token),
      expires: now + Math.max(refreshTokenTtl, accessTokenTtl),
    };
  }

  /** `prt_<id><secret><check>`: the check tells, without a look at the store, that this server made the token. */
  const refreshToken = async (idAndSecret: string) =>
    `prt_${idAndSecret}${(await mac("refresh_check", idAndSecret)).slice(0, CHECK_DIGITS)}`;

  async function revokeToken(token: string, client: Client): Promise<void> {
    const id = grantId("pat", token) ?? grantId("prt", token);
    if (!id) return;
    const grant = await read(id);
    if (grant) {
      const hash = await sha256(token);
      const ours = grant.access.some((access) => access.hash === hash) ||
        token === await refreshToken(token.slice(4, -CHECK_DIGITS));
      if (!ours) return;
      if (grant.client.id !== client.id) {
        throw new OAuthError("invalid_grant", "The token was issued to another client");
      }
    }
    await revoke(id); // also where there seems to be nothing left: the clock may be wrong
  }

  async function revoke(id: string): Promise<boolean> {
    let ended: Grant | undefined;
    const now = seconds();
    await store.update(`grant/${id}`, (current) => {
      const grant = current as Grant | undefined;
      ended = grant?.revoked === undefined ? grant : undefined;
      return ended ? revokeGrant(ended, now) : current;
    }, { expiresAt: now + FORM_TTL });
    if (ended) report("connection_revoked", "a connection was ended", id, ended);
    return ended !== undefined;
  }

  function verify(token: string): AuthInfo | Promise<AuthInfo> {
    const now = seconds();
    const version = store.version?.(); // before the record is read, or a change in between would go unseen
    const known = verified.get(token);
    // A revocation by any process changes the version, so this is never later than the store itself would be.
    const fresh = known && known.version === version && now < known.until;
    return fresh ? ownCopy(known.info) : lookUp(token, version, now);
  }

  async function lookUp(token: string, version: number | undefined, now: number): Promise<AuthInfo> {
    const id = grantId("pat", token);
    const grant = id ? await read(id) : undefined;
    const hash = grant ? await sha256(token) : "";
    const access = grant && verifyGrant(grant, hash, resource, now);
    if (!id || !access) {
      throw new OAuthError("invalid_token", "The access token is unknown, expired or revoked", { status: 401 });
    }
    const presented = presentGrant(grant, access, now);
    if (presented !== grant) {
      const marking = markPresented(id, hash, now);
      // What reveals a theft is written before the answer leaves, as far as a lock elsewhere lets it; a date can wait.
      if (presented.refresh !== grant.refresh) await Promise.race([marking, delay(MARKING_PATIENCE)]);
    }
    const info: AuthInfo = {
      token,
      clientId: grant.client.id,
      scopes: offered.withIncluded(access.scopes ?? grant.scopes),
      expiresAt: Math.floor(access.expires),
      resource: resourceUrl,
      ...resourceMetadata,
      extra: { connection: id, clientName: grant.client.name },
    };
    if (version === undefined) return info; // nothing would tell that it has changed
    const until = Math.min(access.expires, grant.expires, (presented.used ?? now) + MINUTE);
    if (verified.size >= MAX_REMEMBERED) verified.clear();
    verified.set(token, { version, until, info });
    return ownCopy(info);
  }

  /** Remembers that a token was used. A store that cannot write must not keep the owner from reading. */
  async function markPresented(id: string, hash: string, now: number): Promise<void> {
    await store.update(`grant/${id}`, (current) => {
      const grant = current as Grant | undefined;
      const access = grant && verifyGrant(grant, hash, resource, now);
      return access ? presentGrant(grant, access, now) : current;
    }).catch(() => {}); // reported by the store already
  }

  async function connections(): Promise<Connection[]> {
    const live: Connection[] = [];
    const now = seconds();
    for await (const [key, value] of store.list("grant/")) {
      const grant = value as Grant;
      if (grant.revoked !== undefined || grant.expires <= now || grant.access.length === 0) continue;
      live.push({
        id: key.slice("grant/".length),
        kind: grant.client.id === PERSONAL ? "token" : "client",
        clientId: grant.client.id,
        clientName: grant.client.name,
        ...defined({ redirectUri: grant.redirect_uri, lastUsedAt: grant.used && Math.floor(grant.used) }),
        scopes: grant.scopes,
        createdAt: Math.floor(grant.created),
        expiresAt: Math.floor(grant.expires),
      });
    }
    return live.sort((a, b) => b.createdAt - a.createdAt);
  }

  async function createToken({ name, scopes, expiresIn }: TokenRequest, form?: string): Promise<NewToken | undefined> {
    assert(typeof name === "string" && printable(name) !== "", "createToken: name must say what the token is for");
    const lifetime = readSeconds("createToken: expiresIn", expiresIn ?? 365 * DAY);
    const granted = scopes ?? offered.all;
    assert(
      Array.isArray(granted) && granted.length > 0 && granted.every((scope) => offered.all.includes(scope)),
      `createToken: scopes must be some of ${offered.all.join(", ")}, not ${quote(scopes)}`,
    );
    // Sent twice, the form makes the same token, and not a second one; sent with other fields, as after the way back, it
    // makes another. Of a double click the browser shows the second answer, so that one has the token as well, unless
    // somebody has used it already. Whoever copies the store cannot make it: the form is sealed with the browser's secret.
    const parts = [form ?? random(32), name, String(lifetime), ...granted];
    const id = await idOf(...parts);
    const token = `pat_${id}${await mac("token", ...parts)}`;
    const created = seconds();
    const expires = created + lifetime;
    const client = { id: PERSONAL, name: printable(name) };
    const access = [{ hash: await sha256(token), n: 0, expires }];
    const grant: Grant = { client, scopes: granted, resource, created, expires, access };
    const before = await insert(id, grant);
    if (before?.used !== undefined || before?.revoked !== undefined) return undefined;
    if (!before) report("token_created", "a personal access token was made", id, grant);
    return { id, token, expiresAt: Math.floor((before ?? grant).expires) };
  }

  function report(type: AuthEvent["type"], message: string, connection: string, grant: Grant | undefined): void {
    emit(type, message, { connection, ...defined({ clientName: grant?.client.name }) });
  }

  return { approve, answered, redeem, refresh, revokeToken, revoke, verify, connections, createToken };
}

/** What the store said of a good access token, under which version. */
interface Verified {
  version: number;
  /** When something about it changes by itself. */
  until: number;
  info: AuthInfo;
}

/** What a handler does to it must not be remembered. */
function ownCopy(info: AuthInfo): AuthInfo {
  return { ...info, scopes: [...info.scopes], extra: { ...info.extra } };
}

/** How many good access tokens are remembered: more than one person's clients hold, and little memory. */
const MAX_REMEMBERED = 1000;

/** Milliseconds that a request waits for a mark on its connection. */
const MARKING_PATIENCE = 200;

/** The digits at the end of a refresh token that prove its origin. */
const CHECK_DIGITS = 32;

/** The grant a token names, if it has the form of one: `pat_` access, `prt_` refresh, `pac_` code. */
function grantId(prefix: "pat" | "prt" | "pac", token: string): string | undefined {
  const digits = 32 + 64 + (prefix === "prt" ? CHECK_DIGITS : 0);
  const wellFormed = typeof token === "string" && token.length === 4 + digits && token.startsWith(`${prefix}_`) &&
    /^[0-9a-f]+$/.test(token.slice(4));
  return wellFormed ? token.slice(4, 4 + 32) : undefined;
}

/** OAuth 2.1 §3.2.3, for an access token of the grant. No member is ever null: strict clients refuse the whole answer. */
function tokenResponse(
  grant: Grant,
  hash: string,
  access_token: string,
  refresh_token: string | undefined,
): TokenResponse {
  const { expires = 0, scopes = grant.scopes } = grant.access.find((token) => token.hash === hash) ?? {};
  return {
    access_token,
    token_type: "Bearer",
    expires_in: Math.round(expires - seconds()),
    ...defined({ refresh_token }),
    scope: scopes.join(" "),
  };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Guard
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Guard {
  middleware: MiddlewareHandler<AuthEnv>;
  requireScopes: PersonalAuth["requireScopes"];
}

/**
 * Bearer token in, `c.var.auth` out. It runs before anything else looks at the request: a client that has no token yet
 * learns where to get one from the 401 alone, whatever method, body or Accept header it tried.
 */
function resourceGuard(settings: Settings, verify: Grants["verify"]): Guard {
  const { mcpPath, scopes, resourceMetadataUrl } = settings;

  /** RFC 6750 §3 and RFC 9728 §5.1. Without `scope`, Claude asks for every scope of the authorization server. */
  const challenge = (scope: string[], error?: OAuthError) =>
    "Bearer " + [
      ...(error ? [`error="${error.code}"`, `error_description="${error.message}"`] : []),
      `scope="${scope.join(" ")}"`,
      `resource_metadata="${resourceMetadataUrl}"`,
    ].join(", ");
  const bare = challenge(scopes.byDefault);

  function authenticate(c: Context<AuthEnv>): AuthInfo | Promise<AuthInfo> {
    const token = c.req.header("Authorization")?.match(BEARER)?.[1];
    // No error code where no token came (RFC 6750 §3.1): the client has done nothing wrong yet.
    if (token === undefined) {
      throw new OAuthError("unauthorized", "An access token is needed: send it as Authorization: Bearer", {
        status: 401,
        headers: { "WWW-Authenticate": bare },
      });
    }
    return verify(token);
  }

  function refusal(c: Context, error: unknown): Response {
    if (error instanceof OAuthError && error.code === "invalid_token") {
      error.headers["WWW-Authenticate"] = challenge(scopes.byDefault, error);
    }
    return errorResponse(c, error, settings);
  }

  async function guarded(c: Context<AuthEnv>, next: () => Promise<void>): Promise<Response | void> {
    try {
      const auth = authenticate(c);
      c.set("auth", auth instanceof Promise ? await auth : auth);
    } catch (error) {
      return refusal(c, error);
    }
    await next();
    // Some clients add a slash to the URL they were given. 308 keeps the method and the body, and stays on this host.
    if (c.req.path === `${mcpPath}/` && c.res.status === 404) c.res = c.redirect(mcpPath, 308);
  }

  const requireScopes: PersonalAuth["requireScopes"] = (...required) => {
    assert(
      required.length > 0 && required.every((scope) => scopes.all.includes(scope)),
      `requireScopes: ${quote(required)} must be among the scopes on offer: ${scopes.all.join(", ")}`,
    );
    return async function personalAuthScopes(c, next) {
      try {
        // On a route outside the guard there is nobody yet: the token is asked for here, and never taken on trust.
        if (c.get("auth") === undefined) c.set("auth", await authenticate(c));
        const granted = new Set<string>(c.var.auth.scopes);
        if (!required.every((scope) => granted.has(scope))) {
          const error = new OAuthError("insufficient_scope", "The token lacks a scope that this needs", {
            status: 403,
          });
          // All that is needed at once, with what is there already: clients ask for exactly this list.
          const needed = [...new Set([...granted, ...required])].filter((scope) => scope !== OFFLINE_ACCESS);
          error.headers["WWW-Authenticate"] = challenge(needed, error);
          throw error;
        }
      } catch (error) {
        return refusal(c, error);
      }
      await next();
    };
  };

  return { middleware: withCors(guarded), requireScopes };
}

/** RFC 6750 §2.1, case-insensitive scheme (RFC 9110 §11.1). Never from the query or the body, where URLs are logged. */
const BEARER = /^Bearer +([A-Za-z0-9._~+/-]+=*) *$/i;

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Owner
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** One visit of a browser to an owner's page. */
interface Visit {
  /** The browser's secret, which its cookie holds. */
  browser: string;
  /** Whether it came with that cookie. */
  known: boolean;
  /** The owner, known by a session or by `authenticateOwner`; somebody who has to type the password; or neither. */
  who: "owner" | "anybody" | "stranger";
  /** What `authenticateOwner` wants to be answered instead of the page, such as a redirect to its own login. */
  answer?: Response;
}

/** Why the owner could not be recognised, as the page tells it. */
interface Problem {
  status: 403 | 429;
  message: string;
}

interface Owner {
  visit(c: Context): Promise<Visit>;
  seal(browser: string, request: string): Promise<string>;
  sealed(browser: string, request: string, csrf: string): Promise<boolean>;
  prove(c: Context, visit: Visit, password: string): Promise<Problem | undefined>;
  signOut(visit: Visit): Promise<void>;
  signOutEverywhere(): Promise<void>;
}

/** `browser/<hash of its secret>`: a browser that has signed in at least once. */
interface BrowserRecord {
  attempts?: Attempts;
  session?: { epoch: string; since: number; seen: number };
}

/** `owner`: the password, as PBKDF2-HMAC-SHA-256 of it. A session is good for the epoch it began in. */
interface OwnerRecord {
  salt: string;
  hash: string;
  iterations: number;
  /** Drawn at random, with 100 bits: it needs neither slow hashing nor a throttle. */
  generated: boolean;
  epoch: string;
}

/** Password attempts left, and since when: a token bucket. */
interface Attempts {
  left: number;
  at: number;
}

/** How long a form can be sent after it was shown. */
const FORM_TTL = 10 * MINUTE;
const SESSION_TTL = 30 * DAY;
const SESSION_IDLE_TTL = 7 * DAY;
/** How long a browser is remembered; 400 days is the longest that browsers keep a cookie. */
const BROWSER_TTL = 400 * DAY;
const PASSWORD_ITERATIONS = 600_000;
/** Ten guesses at once, then one a minute: 1,450 in a day, of 2^100 for a generated password. */
const MAX_ATTEMPTS = 10;
const ATTEMPT_INTERVAL = MINUTE;

/** Who is at the browser: the password, its sessions, the forms bound to both, and the throttle on guessing. */
function ownerDesk(settings: Settings, store: Store, mac: Mac): Owner {
  const { secure, authenticateOwner, wording, emit } = settings;
  const cookie = cookieName(settings);
  const prefix = secure ? "host" as const : undefined;
  const passwordInPlace = once(() => placePassword(settings, store));

  if (settings.password === false) {
    emit("owner_unprotected", "password is false: anybody with an account at an allowed client can connect");
  } else if (!authenticateOwner) {
    if (settings.password !== undefined && settings.password.length < 12) {
      emit("password_weak", "the owner's password is short: take 12 characters or more");
    }
    // At start, so that a generated password is printed there; a failure is reported, and tried again when needed.
    passwordInPlace().catch(() => {});
  }

  const keyOf = async (browser: string) => `browser/${await sha256(browser)}`;

  /** Read each time, not remembered: another process may have changed the password or ended all sessions. */
  async function ownerRecord(): Promise<OwnerRecord> {
    await passwordInPlace();
    const record = await store.get("owner") as OwnerRecord | undefined;
    if (record) return record;
    await placePassword(settings, store); // somebody emptied the store under the running server
    return ownerRecord();
  }

  /** GET pages call this too: it reads the store and never writes it. */
  async function visit(c: Context): Promise<Visit> {
    const held = getCookie(c, cookie, prefix);
    const known = held !== undefined && /^[0-9a-f]{64}$/.test(held);
    const browser = known ? held : random(32);
    // Not in answer to a form: when another site posts one, the browser leaves its cookie out, and what is set here would
    // take the place of it and sign the owner out.
    if (!known && c.req.method !== "POST") remember(c, browser);
    if (settings.password === false) return { browser, known, who: "owner" };
    if (authenticateOwner) {
      const answer = await authenticateOwner(c);
      if (answer instanceof Response) return { browser, known, who: "stranger", answer };
      return { browser, known, who: answer === true ? "owner" : "stranger" };
    }
    const { epoch } = await ownerRecord();
    const record = await store.get(await keyOf(browser)) as BrowserRecord | undefined;
    return { browser, known, who: isSignedIn(record, epoch) ? "owner" : "anybody" };
  }

  /**
   * `__Host-`: no other host and no subdomain can plant it, so nobody can make the owner use a browser secret they
   * know. Lax: it must come along when a client's page sends the owner here, and does not with a form of another site.
   */
  function remember(c: Context, browser: string): void {
    setCookie(c, cookie, browser, {
      path: "/",
      httpOnly: true,
      sameSite: "Lax",
      maxAge: BROWSER_TTL,
      secure, // plain http on loopback only, where Safari refuses to keep a Secure cookie
      ...(prefix && { prefix }),
    });
  }

  /** A form belongs to one browser and one request, for ten minutes; another site can neither read nor make one. */
  async function seal(browser: string, request: string): Promise<string> {
    const head = `${Math.floor(seconds()).toString(36)}.${random(8)}`;
    return `${head}.${await mac("form", browser, request, head)}`;
  }

  async function sealed(browser: string, request: string, csrf: string): Promise<boolean> {
    const [time = "", nonce = ""] = csrf.split(".");
    const age = seconds() - parseInt(time, 36);
    const expected = `${time}.${nonce}.${await mac("form", browser, request, `${time}.${nonce}`)}`;
    return equal(csrf, expected) && Math.abs(age) < FORM_TTL;
  }

  async function prove(c: Context, { browser, who }: Visit, password: string): Promise<Problem | undefined> {
    const key = await keyOf(browser);
    if (who === "owner") {
      await touch(key);
      return undefined;
    }
    if (who === "stranger") {
      emit("sign_in_failed", "authenticateOwner did not recognise the owner");
      return { status: 403, message: wording.stranger };
    }
    // A form from before the session ended has no password: that is no wrong one, and costs no attempt.
    if (password === "") return { status: 403, message: wording.passwordNeeded };
    const wait = await takeAttempt(key);
    const record = await ownerRecord();
    // Nobody guesses a generated password, so the right one is let through whatever strangers have used up. One that
    // a person chose is not even looked at.
    const looked = wait === 0 || record.generated;
    const right = looked && equal(await stretch(normalize(password), record), record.hash);
    if (!right && wait > 0) {
      emit("sign_in_throttled", "too many wrong passwords");
      c.header("Retry-After", String(wait));
      return { status: 429, message: format(wording.throttled, { seconds: wait }) };
    }
    if (!right) {
      emit("sign_in_failed", "a wrong password was entered");
      return { status: 403, message: wording.wrongPassword };
    }
    await signIn(c, key, record);
    return undefined;
  }

  /** A new secret at every sign-in: one that was in the browser before may be known to somebody else. */
  async function signIn(c: Context, before: string, { epoch }: OwnerRecord): Promise<void> {
    const browser = random(32);
    const now = seconds();
    const record: BrowserRecord = { session: { epoch, since: now, seen: now } };
    await store.update(await keyOf(browser), () => record, { expiresAt: now + BROWSER_TTL });
    await store.update(before, () => undefined);
    remember(c, browser);
    emit("owner_signed_in", "the owner signed in");
  }

  /** A session lives on by use; once a minute is exact enough. */
  async function touch(key: string): Promise<void> {
    const now = seconds();
    await store.update(key, (current) => {
      const record = current as BrowserRecord | undefined;
      if (!record?.session || now - record.session.seen < MINUTE) return current;
      return { ...record, session: { ...record.session, seen: now } };
    }, { expiresAt: now + BROWSER_TTL });
  }

  /** The browser stays known, and with it its own allowance of attempts; the session is gone for good. */
  async function signOut({ browser }: Visit): Promise<void> {
    await store.update(await keyOf(browser), (current) => {
      const { session: _session, ...rest } = (current ?? {}) as BrowserRecord;
      return current && rest;
    });
  }

  async function signOutEverywhere(): Promise<void> {
    const epoch = random(8);
    await store.update("owner", (current) => current && { ...current, epoch });
  }

  /**
   * Takes one of the attempts, before the password is looked at; 0, or the seconds until there is one. All strangers
   * share one allowance, because an attacker has as many addresses as he likes; a browser that has signed in before
   * has its own, so that he cannot use up the owner's.
   */
  async function takeAttempt(browserKey: string): Promise<number> {
    const known = await store.get(browserKey) !== undefined;
    let wait = 0;
    await store.update(known ? browserKey : "throttle", (current) => {
      const record = current as { attempts?: Attempts } | undefined;
      const now = seconds();
      const { left, at } = record?.attempts ?? { left: MAX_ATTEMPTS, at: now };
      // A clock that was set back must not stop the refill until it has caught up: `at` follows it below.
      const refilled = Math.min(MAX_ATTEMPTS, left + Math.max(0, now - at) / ATTEMPT_INTERVAL);
      wait = refilled >= 1 ? 0 : Math.ceil((1 - refilled) * ATTEMPT_INTERVAL);
      if (wait > 0 && at <= now) return current;
      return { ...record, attempts: { left: wait > 0 ? left : refilled - 1, at: now } };
    });
    return wait;
  }

  return { visit, seal, sealed, prove, signOut, signOutEverywhere };
}

function isSignedIn(record: BrowserRecord | undefined, epoch: string): boolean {
  const session = record?.session;
  const now = seconds();
  return session !== undefined && session.epoch === epoch && now - session.since < SESSION_TTL &&
    now - session.seen < SESSION_IDLE_TTL;
}

/** Two servers on one host share its cookies, whatever their ports and paths: each needs a name of its own. */
function cookieName({ origin, basePath, secure }: Settings): string {
  const port = secure ? "" : new URL(origin).port;
  return ["personal-auth", port, ...basePath.split("/")].filter(Boolean).join("-");
}

/**
 * Sees to it that the right password is in the store. A configured one replaces whatever is there, and begins a new
 * epoch; without one, the stored password stays, and at the very first start one is generated.
 */
async function placePassword(settings: Settings, store: Store): Promise<void> {
  const { password } = settings;
  const stored = await store.get("owner") as OwnerRecord | undefined;
  if (stored && (typeof password !== "string" || equal(await stretch(password, stored), stored.hash))) return;
  const next = typeof password === "string" ? password : generatePassword();
  const generated = next !== password;
  const unhashed = { salt: random(16), iterations: generated ? 1 : PASSWORD_ITERATIONS, generated, epoch: random(8) };
  const fresh: OwnerRecord = { ...unhashed, hash: await stretch(next, unhashed) };
  const kept = await store.update("owner", (current) => {
    return (current as OwnerRecord | undefined)?.salt === stored?.salt ? fresh : current;
  }) as OwnerRecord;
  // Another process on this store was faster: what it wrote, and printed, is what holds.
  if (kept.salt !== fresh.salt) return placePassword(settings, store);
  if (generated) console.log(`\n  The owner's password for this server, shown this once:\n\n      ${next}\n`);
}

/** 100 bits, in an alphabet without look-alikes, grouped to be typed on a phone. */
function generatePassword(): string {
  const alphabet = "abcdefghjkmnpqrstuvwxyz123456789"; // 32 characters, so that a byte's remainder is even
  const letters = [...crypto.getRandomValues(new Uint8Array(20))].map((byte) => alphabet[byte % 32]).join("");
  return letters.match(/.{5}/g)!.join("-");
}

/** Phones add a space after a word, and one character can be typed in two ways. */
function normalize(password: string): string {
  return password.normalize("NFKC").trim();
}

/** Slow on purpose: a stolen store must not give up a short password. */
async function stretch(password: string, { salt, iterations }: { salt: string; iterations: number }): Promise<string> {
  const key = await crypto.subtle.importKey("raw", utf8.encode(password), "PBKDF2", false, ["deriveBits"]);
  const bits = { name: "PBKDF2", hash: "SHA-256", salt: utf8.encode(salt), iterations };
  return hex(new Uint8Array(await crypto.subtle.deriveBits(bits, key, 256)));
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Owner's page
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** `/connections`: what is connected, personal access tokens, and what happened lately. */
function connectionsEndpoint(
  settings: Settings,
  grants: Grants,
  owner: Owner,
  events: EventLog,
): { show: Handler; decide: Handler } {
  const { basePath, password, scopes, wording } = settings;
  const path = `${basePath}/connections`;

  async function render(c: Context, visit: Visit, problem?: Problem): Promise<Response> {
    const csrf = await owner.seal(visit.browser, path);
    if (visit.who !== "owner") return signInPage(c, settings, { action: path, csrf, ...(problem && { problem }) });
    const connections = await grants.connections();
    const latest = await events.latest();
    return connectionsPage(c, settings, { action: path, csrf, connections, events: latest, ...defined({ problem }) });
  }

  /** Whether this visit may see the page at all; what to answer if not. */
  function turnedAway(c: Context, { who, answer }: Visit): Response | Promise<Response> | undefined {
    // Without any proof of the owner, this page would be everybody's, and with it tokens and the list of what is here.
    if (password === false) return messagePage(c, settings, 403, wording.noOwner, wording.noOwnerAdvice);
    if (answer) return answer;
    return who === "stranger" ? messagePage(c, settings, 403, wording.strangerTitle, wording.stranger) : undefined;
  }

  const show: Handler = async (c) => {
    const visit = await owner.visit(c);
    return turnedAway(c, visit) ?? await render(c, visit);
  };

  const decide: Handler = async (c) => {
    const form = await readForm(c, "scope");
    const visit = await owner.visit(c);
    const away = turnedAway(c, visit);
    if (away) return away;
    const csrf = form.get("csrf") ?? "";
    if (!await owner.sealed(visit.browser, path, csrf)) {
      if (!visit.known) return messagePage(c, settings, 403, wording.expired, wording.expiredAdvice);
      // The second of two clicks, after the answer to the first one has signed the owner in.
      if (visit.who === "owner" && !form.has("action")) return c.redirect(path, 303);
      return await render(c, visit, { status: 403, message: wording.expiredAgain });
    }
    const problem = await owner.prove(c, visit, form.get("password") ?? "");
    if (problem) return await render(c, visit, problem);
    const answer = await act(c, visit, form, csrf);
    // 303: a reload of the page that follows must not do it again.
    return answer ?? c.redirect(path, 303);
  };

  async function act(c: Context, visit: Visit, form: URLSearchParams, csrf: string): Promise<Response | undefined> {
    switch (form.get("action")) {
      case "revoke":
        await grants.revoke(form.get("id") ?? "");
        return undefined;
      case "revoke_all":
        for (const { id } of await grants.connections()) await grants.revoke(id);
        return undefined;
      case "sign_out":
        await owner.signOut(visit);
        return undefined;
      case "sign_out_everywhere":
        await owner.signOutEverywhere();
        return undefined;
      case "create_token": {
        const request = {
          name: form.get("name") ?? "",
          expiresIn: Number(form.get("days") ?? 0) * DAY,
          // With one scope there is nothing to choose; with several, none ticked is none, not all.
          ...(scopes.all.length > 1 && { scopes: form.getAll("scope") }),
        };
        const made = await grants.createToken(request, csrf).catch((error) => {
          if (error instanceof TypeError) throw new OAuthError("invalid_request", wording.tokenRefused);
          throw error;
        });
        return made && await tokenPage(c, settings, { ...made, name: request.name, back: path });
      }
    }
    return undefined;
  }

  return { show, decide };
}

/** `events`: the latest of each kind. */
type EventRecord = Partial<Record<AuthEvent["type"], { count: number; latest: LoggedEvent[] }>>;
type LoggedEvent = Pick<AuthEvent, "at" | "message" | "clientName" | "connection">;

interface EventLog {
  emit: Emit;
  latest(): Promise<(LoggedEvent & { type: AuthEvent["type"]; count: number })[]>;
}

const MAX_EVENTS_PER_TYPE = 5;
/** What strangers can cause at will: kept in memory until something worth a write comes along, so they cause no writes. */
const CHEAP_EVENTS: AuthEvent["type"][] = [
  "client_registered",
  "client_document_refused",
  "redirect_refused",
  "connection_denied",
  "sign_in_throttled",
  "owner_unprotected",
  "password_weak",
  "server_error",
];

/**
 * Tells every event to `onEvent`, and keeps the latest of each kind for the owner's page: of each kind, so that a flood
 * of one cannot wash away the others.
 */
function eventLog(store: Store, onEvent: (event: AuthEvent) => void): EventLog {
  let waiting: AuthEvent[] = [];
  let writing: Promise<unknown> = Promise.resolve();

  const emit: Emit = (type, message, more) => {
    const event: AuthEvent = { type, at: Math.floor(seconds()), message, ...more };
    // A broken alarm must break neither the request it reports nor, if it is asynchronous, the process.
    promiseTry(() => onEvent(event)).catch((error) => console.error("personal-auth: onEvent threw", error));
    if (type === "client_registered") return; // anybody's, any number of times, and nothing the owner could act on
    waiting = [...waiting, event].slice(-100);
    if (!CHEAP_EVENTS.includes(type)) keep();
  };

  function keep(): void {
    const batch = waiting;
    waiting = [];
    writing = promiseTry(() => store.update("events", (current) => merge(current as EventRecord | undefined, batch)))
      .catch(() => waiting = [...batch, ...waiting].slice(-100)); // the next event tries again
  }

  function merge(record: EventRecord = {}, events: AuthEvent[]): EventRecord {
    const merged = { ...record };
    for (const { type, at, message, clientName, connection } of events) {
      const { count, latest } = merged[type] ?? { count: 0, latest: [] };
      const event = { at, message: message.slice(0, 500), ...defined({ clientName, connection }) };
      merged[type] = { count: count + 1, latest: [event, ...latest].slice(0, MAX_EVENTS_PER_TYPE) };
    }
    return merged;
  }

  async function latest() {
    await writing;
    const record = merge(await store.get("events") as EventRecord | undefined, waiting);
    const list = Object.entries(record).flatMap(([type, { count, latest }]) =>
      latest.map((event) => ({ ...event, type: type as AuthEvent["type"], count }))
    );
    return list.sort((a, b) => b.at - a.at);
  }

  return { emit, latest };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Pages
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

type Html = ReturnType<typeof html>;
type PageStatus = 200 | 409 | 429 | ErrorStatus;

/** Every text on the owner's pages. `pages.wording` replaces any of them; what stands in braces is filled in. */
const WORDING = {
  connect: "Connect {client}?",
  unnamed: "an app without a name",
  server: "Server",
  asks: "Who asks",
  registered: "The app registered itself; its name is its own claim.",
  preregistered: "You registered this app yourself.",
  published: "Described by {host}",
  vouched: "You allow this site.",
  target: "The answer goes to",
  targetHere: "an app on this computer",
  targetApp: "an app on this device",
  allows: "It may",
  allowsScope: "use {scope}",
  local: "Only go on if you started this yourself, just now, on this computer. Otherwise deny.",
  password: "Your password for this server",
  approve: "Approve",
  deny: "Deny",
  signIn: "Sign in",
  signInText: "This page is for the owner of this server.",
  wrongPassword: "That is not the password.",
  passwordNeeded: "Please type your password.",
  throttled: "Too many attempts. Try again in {seconds} seconds.",
  stranger: "You are not signed in as the owner of this server.",
  strangerTitle: "For the owner only",
  noOwner: "This server asks nobody for a password",
  noOwnerAdvice: "So there is no page for its owner. Give personalAuth() a password to have one.",
  expired: "This page has expired",
  expiredAgain: "The page was open for too long. Please look again, and answer once more.",
  expiredAdvice: "Go back to the app and connect again. If that does not help, allow cookies for this site.",
  answered: "Already answered",
  answeredAdvice: "This request was approved before. If the app is not connected, go back to it and connect again.",
  goOn: "Go on to {client}",
  unknownClient: "This server does not know the app",
  unknownClientAdvice: "Remove this server from the app and add it again: the app then registers anew.",
  unreadClient: "This app cannot be checked",
  unreadClientAdvice: "The app describes itself at an address of its own, which has to be reachable. Try again later.",
  refusedRedirect: "This app is not allowed here",
  faulty: "That request cannot be answered",
  faultyAdvice: "Go back to the app and connect again. If you run this server, its log says more.",
  failed: "Something went wrong here",
  connections: "Connections",
  none: "Nothing is connected yet.",
  since: "Since {time}",
  lastUsed: "last used {time}",
  neverUsed: "never used",
  until: "until {time}",
  personalToken: "personal access token",
  revoke: "Revoke",
  revokeAll: "Revoke all",
  revokeAllText: "Every app and every token has to be connected anew.",
  newToken: "New personal access token",
  newTokenText: "For scripts, and for clients without a browser.",
  tokenName: "What is it for?",
  tokenDays: "How long is it good?",
  days: "{days} days",
  createToken: "Create token",
  tokenRefused: "The token needs a name, a lifetime and a scope",
  tokenMade: "Your new token",
  tokenOnce: "Copy it now: it is not shown again.",
  tokenUse: "In Claude Code, for example:",
  back: "Back to your connections",
  events: "What happened lately",
  noEvents: "Nothing worth telling.",
  times: "{count} times in all",
  session: "This browser",
  signOut: "Sign out here",
  signOutEverywhere: "Sign out everywhere",
};

/** The texts of the owner's pages, by name. */
export type Wording = Record<keyof typeof WORDING, string>;

/** How the owner's pages look and what they say. */
export interface PageOptions {
  /** What the owner calls this server. Default: the host of `baseUrl`. */
  title?: string;
  /** The colour of the button that approves, as `#rrggbb`; its text is black or white by itself. */
  accent?: string;
  /** Texts to use instead of the built-in ones. */
  wording?: Partial<Wording>;
}

const STYLE = `
:root{color-scheme:light dark;--ink:#1d1b18;--soft:#5c574f;--paper:#f5f3ee;--card:#fff;--line:#dcd7cc;--link:#1d4f9c;--accent:#1d4f9c;--on-accent:#fff;--warn:#7a3d00;--warn-paper:#fff4e0}
@media(prefers-color-scheme:dark){:root{--ink:#f1efe9;--soft:#b8b2a7;--paper:#161513;--card:#211f1d;--line:#3d3a35;--link:#8db4f5;--accent:#8db4f5;--on-accent:#0d1d35;--warn:#ffcf8f;--warn-paper:#36260f}}
@media(prefers-contrast:more){:root{--soft:var(--ink);--line:var(--ink)}}
*{box-sizing:border-box}
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:1rem;background:var(--paper);color:var(--ink);font:1rem/1.5 system-ui,sans-serif}
main{width:100%;max-width:28rem;padding:clamp(1.1rem,5vw,2rem);background:var(--card);border:1px solid var(--line);border-radius:1.1rem}
main.wide{max-width:44rem}
header{margin:0 0 1.1rem;color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
h1{margin:0 0 .4rem;font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}
h2{margin:2rem 0 .5rem;font-size:1.1rem}
p{margin:.5rem 0;overflow-wrap:anywhere}
small,.soft,dt{color:var(--soft);font-size:.9rem}
dl{margin:1.1rem 0;display:grid;gap:.9rem}
dd{margin:.1rem 0 0;overflow-wrap:anywhere}
ul{list-style:none;margin:0;padding:0}
.list>li{padding:.9rem 0;border-top:1px solid var(--line);display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center}
.list>li>div{flex:1 1 14rem;min-width:0;overflow-wrap:anywhere}
.warn{margin:1rem 0;padding:.75rem .9rem;border-radius:.7rem;background:var(--warn-paper);color:var(--warn);font-weight:600}
.mark{color:var(--link);font-weight:600}
label,legend{display:block;margin-top:1rem;font-weight:600}
fieldset{border:0;margin:1rem 0 0;padding:0}
legend{margin:0;padding:0}
fieldset label{font-weight:400;margin:0;display:flex;gap:.6rem;align-items:center;min-height:2.75rem}
input,select,button,a.button{width:100%;min-height:3rem;margin-top:.5rem;padding:.6rem .9rem;font:inherit;border-radius:.7rem;border:1px solid var(--soft);color:inherit;background:var(--card)}
input[type=checkbox]{width:1.35rem;min-height:1.35rem;margin:0;accent-color:var(--accent)}
button{font-weight:600;cursor:pointer}
.list button,.row button{width:auto;min-width:7rem;margin:0}
.row{display:flex;flex-wrap:wrap;gap:.75rem}
button.approve{background:var(--accent);border-color:var(--accent);color:var(--on-accent);margin-top:1.25rem}
pre{margin:.5rem 0;padding:.8rem;border:1px solid var(--line);border-radius:.7rem;white-space:pre-wrap;overflow-wrap:anywhere;user-select:all;font-size:.9rem}
summary{min-height:2.75rem;padding:.5rem 0;cursor:pointer;font-weight:600}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
`;

/** A text with its braces filled in; the page escapes the result as a whole. */
function format(text: string, values: Record<string, string | number>): string {
  return text.replace(/\{(\w+)\}/g, (braces, name) => String(values[name] ?? braces));
}

/** The question to the owner, and with it the password form if nobody is signed in. */
function consentPage(
  c: Context,
  settings: Settings,
  request: AuthorizationRequest,
  form: { who: Visit["who"]; encoded: string; csrf: string; vouched: boolean; problem?: Problem },
): Response | Promise<Response> {
  const { issuer, basePath, scopes, wording } = settings;
  const { client, redirect_uri } = request;
  const target = new URL(redirect_uri);
  const here = isLoopback(target.hostname);
  const name = client.name || wording.unnamed;
  const title = format(wording.connect, { client: name });
  const origin =
    { registered: wording.registered, preregistered: wording.preregistered, document: "" }[client.source] ||
    format(wording.published, { host: new URL(client.id).host });
  const allowed = request.scopes.filter((scope) => scope !== OFFLINE_ACCESS);
  // Beside what it vouches for: the site of the document, or else the one that the answer goes to; never a mere name.
  const mark = form.vouched && html`<br><small class="mark">✓ ${wording.vouched}</small>`;
  const body = html`
    <h1>${title}</h1>
    <dl>
      <div>
        <dt>${wording.asks}</dt>
        <dd><strong>${name}</strong><br><small>${origin}</small>
          ${client.source === "document" && mark}</dd>
      </div>
      <div>
        <dt>${wording.target}</dt>
        <dd><strong>${target.protocol}//${target.host}</strong>
          ${client.source !== "document" && mark}
          ${here && html`<br><small>${wording.targetHere}</small>`}
          ${!/^https?:$/.test(target.protocol) && html`<br><small>${wording.targetApp}</small>`}</dd>
      </div>
      <div>
        <dt>${wording.allows}</dt>
        <dd>
          <ul>${allowed.map((scope) => html`<li>${scopes.words(scope, wording.allowsScope)}</li>`)}</ul>
        </dd>
      </div>
      <div>
        <dt>${wording.server}</dt>
        <dd>${issuer}</dd>
      </div>
    </dl>
    ${here && html`<p class="warn">${wording.local}</p>`}
    <form method="post" action="${basePath}/authorize">
      <input type="hidden" name="request" value="${form.encoded}">
      <input type="hidden" name="csrf" value="${form.csrf}">
      ${passwordField(settings, form)}
      <button class="approve" name="decision" value="approve">${wording.approve}</button>
      <button name="decision" value="deny" formnovalidate>${wording.deny}</button>
    </form>
  `;
  return page(c, settings, { status: form.problem?.status ?? 200, title, body });
}

/** `ready`: with the cursor in it; not where that would scroll the question out of sight on a phone. */
function passwordField(
  { wording }: Settings,
  { who, problem, ready = problem !== undefined }: { who: Visit["who"]; problem?: Problem; ready?: boolean },
): Html {
  return html`
    ${problem && html`<p class="warn" role="alert" id="problem">${problem.message}</p>`}
    ${who === "anybody" && html`
      <label for="password">${wording.password}</label>
      <input id="password" name="password" type="password" autocomplete="current-password" required
        ${problem && raw('aria-describedby="problem" aria-invalid="true"')} ${ready && raw("autofocus")}>
    `}
  `;
}

function signInPage(
  c: Context,
  settings: Settings,
  { action, csrf, problem }: { action: string; csrf: string; problem?: Problem },
): Response | Promise<Response> {
  const { wording } = settings;
  const body = html`
    <h1>${wording.signIn}</h1>
    <p>${wording.signInText}</p>
    <form method="post" action="${action}">
      <input type="hidden" name="csrf" value="${csrf}">
      ${passwordField(settings, { who: "anybody", ready: true, ...(problem && { problem }) })}
      <button class="approve">${wording.signIn}</button>
    </form>
  `;
  return page(c, settings, { status: problem?.status ?? 200, title: wording.signIn, body });
}

function connectionsPage(
  c: Context,
  settings: Settings,
  { action, csrf, connections, events, problem }: {
    action: string;
    csrf: string;
    connections: Connection[];
    events: Awaited<ReturnType<EventLog["latest"]>>;
    problem?: Problem;
  },
): Response | Promise<Response> {
  const { wording, authenticateOwner } = settings;
  const form = (name: string, content: Html) =>
    html`
      <form method="post" action="${action}">
        <input type="hidden" name="csrf" value="${csrf}"><input type="hidden" name="action" value="${name}">${content}
      </form>
    `;
  const button = (name: string, text: string) => form(name, html`<button>${text}</button>`);
  const body = html`
    <h1>${wording.connections}</h1>
    ${problem && html`<p class="warn" role="alert">${problem.message}</p>`}
    ${connections.length === 0 && html`<p class="soft">${wording.none}</p>`}
    <ul class="list">${connections.map((connection) => connectionItem(settings, connection, form))}</ul>
    ${connections.length > 1 && html`
      <details><summary>${wording.revokeAll}</summary>
        <p>${wording.revokeAllText}</p>${button("revoke_all", wording.revokeAll)}</details>
    `}
    <h2>${wording.newToken}</h2>
    <p class="soft">${wording.newTokenText}</p>
    ${form("create_token", tokenFields(settings))}
    <h2>${wording.events}</h2>
    ${events.length === 0 && html`<p class="soft">${wording.noEvents}</p>`}
    <ul class="list">${events.map(({ at, message, clientName, count }) =>
      html`
        <li>
          <div>${clientName && html`
            <strong>${clientName}</strong>:
          `}${message}<br>
          <small>${formatTime(at)}${count > 1 && html`
            · ${format(wording.times, { count })}
          `}</small></div>
        </li>
      `
    )}</ul>
    ${!authenticateOwner && html`
      <h2>${wording.session}</h2>
      <div class="row">${button("sign_out", wording.signOut)}
              ${button("sign_out_everywhere", wording.signOutEverywhere)}</div>
    `}
  `;
  return page(c, settings, { status: problem?.status ?? 200, title: wording.connections, body, wide: true });
}

function connectionItem(
  { wording, scopes }: Settings,
  { id, kind, clientName, redirectUri, scopes: granted, createdAt, lastUsedAt, expiresAt }: Connection,
  form: (name: string, content: Html) => Html,
): Html {
  const target = redirectUri && new URL(redirectUri);
  const used = lastUsedAt ? format(wording.lastUsed, { time: formatTime(lastUsedAt) }) : wording.neverUsed;
  const name = clientName || wording.unnamed;
  return html`<li>
    <div><strong>${name}</strong> <small>${
    target ? `${target.protocol}//${target.host}` : wording.personalToken
  }</small><br>
      <small>${
    granted.filter((scope) => scope !== OFFLINE_ACCESS).map((scope) => scopes.words(scope)).join(", ")
  }</small><br>
      <small>${format(wording.since, { time: formatTime(createdAt) })} · ${used}
        ${
    kind === "token" && html`
      · ${format(wording.until, { time: formatTime(expiresAt) })}
    `
  }</small></div>
    ${
    form(
      "revoke",
      html`
        <input type="hidden" name="id" value="${id}">
        <button aria-label="${wording.revoke}: ${name}">${wording.revoke}</button>
      `,
    )
  }
  </li>`;
}

function tokenFields({ wording, scopes }: Settings): Html {
  return html`
    <label for="name">${wording.tokenName}</label>
    <input id="name" name="name" required maxlength="200" autocomplete="off">
    <label for="days">${wording.tokenDays}</label>
    <select id="days" name="days">${[30, 90, 365].map((days) =>
      html`<option value="${days}">${format(wording.days, { days })}</option>`
    )}</select>
    ${scopes.all.length > 1 && html`<fieldset><legend>${wording.allows}</legend>${
      scopes.all.map((scope) =>
        html`
          <label><input type="checkbox" name="scope" value="${scope}"
            ${scopes.byDefault.includes(scope) && raw("checked")}>${scopes.words(scope)}</label>
        `
      )
    }</fieldset>`}
    <button>${wording.createToken}</button>
  `;
}

/** The one time that a personal access token is shown. */
function tokenPage(
  c: Context,
  settings: Settings,
  { token, name, back }: { token: string; name: string; back: string },
): Response | Promise<Response> {
  const { wording, resource } = settings;
  const label = name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "personal";
  const command = `claude mcp add --transport http ${label} ${resource} --header "Authorization: Bearer ${token}"`;
  const body = html`
    <h1>${wording.tokenMade}</h1>
    <p class="warn">${wording.tokenOnce}</p>
    <pre tabindex="0">${token}</pre>
    <p>${wording.tokenUse}</p>
    <pre tabindex="0">${command}</pre>
    <p><a href="${back}">${wording.back}</a></p>
  `;
  return page(c, settings, { status: 200, title: wording.tokenMade, body });
}

/** In UTC: without script, a page cannot know the owner's own time. */
function formatTime(at: number): string {
  return `${new Date(at * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

/** The answer to a form that was sent before, and the way on if the first answer did not get through. */
function answeredPage(c: Context, settings: Settings, client: string, uri?: string): Response | Promise<Response> {
  const { answered, answeredAdvice, goOn, unnamed } = settings.wording;
  const body = html`
    <h1>${answered}</h1><p>${answeredAdvice}</p>
    ${uri && html`<p><a href="${uri}">${format(goOn, { client: client || unnamed })}</a></p>`}
  `;
  return page(c, settings, { status: 409, title: answered, body });
}

/** Black or white, whichever is easier to read on a colour `#rrggbb` (relative luminance, WCAG 2). */
function readableOn(colour: string): string {
  const [r = 0, g = 0, b = 0] = colour.slice(1).match(/../g)!.map((pair) => (parseInt(pair, 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function messagePage(
  c: Context,
  settings: Settings,
  status: PageStatus,
  title: string,
  ...texts: string[]
): Response | Promise<Response> {
  return page(c, settings, {
    status,
    title,
    body: html`<h1>${title}</h1>${texts.map((text) => html`<p>${text}</p>`)}`,
  });
}

/**
 * No script, no frame, no image: the page can be neither decorated nor framed by anybody. There is no `form-action` on
 * purpose: browsers apply it to the redirects after the form as well, and would stop the way back to the app.
 */
function page(
  c: Context,
  { issuer, pages }: Settings,
  { status, title, body, wide }: { status: PageStatus; title: string; body: Html; wide?: boolean },
): Response | Promise<Response> {
  const nonce = random(16);
  const policy = `default-src 'none'; style-src 'nonce-${nonce}'; frame-ancestors 'none'; base-uri 'none'`;
  c.header("Content-Security-Policy", policy);
  c.header("X-Frame-Options", "DENY");
  c.header("X-Content-Type-Options", "nosniff");
  c.header("Referrer-Policy", "same-origin"); // not no-referrer: the form would then be sent with Origin: null
  c.header("Cache-Control", "no-store");
  const name = pages.title ?? new URL(issuer).host;
  const accent = pages.accent ? `:root{--accent:${pages.accent};--on-accent:${readableOn(pages.accent)}}` : "";
  return c.html(
    html`
      <!doctype html>
      <html lang="en">
        <head>
          <meta charset="utf-8">
          <meta name="viewport" content="width=device-width, initial-scale=1">
          <meta name="robots" content="noindex">
          <title>${title} · ${name}</title>
          <style nonce="${nonce}">${raw(STYLE + accent)}</style>
        </head>
        <body>
          <main class="${wide ? "wide" : ""}"><header>${name}</header>${body}</main>
        </body>
      </html>
    `,
    status,
  );
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Stores
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Keeps state in memory, until the process ends: for tests. */
export function memoryStore(): Store {
  const entries = new Map<string, Entry>();
  let changes = 0;
  const write = (...[key, change, options]: Update): unknown => {
    const { next, entry } = applyChange(entries.get(key), change, options);
    if (entry !== undefined) changes++;
    if (entry) entries.set(key, entry);
    else if (entry === null) entries.delete(key);
    return next;
  };
  return {
    get: (key) => promiseTry(() => valueOf(entries.get(key))),
    update: (...update) => promiseTry(() => write(...update)),
    async *list(prefix) {
      for (const key of [...entries.keys()].filter((key) => key.startsWith(prefix)).sort()) {
        const entry = entries.get(key);
        if (isLive(entry)) yield [key, valueOf(entry)];
      }
    },
    version: () => changes,
  };
}

type Update = Parameters<Store["update"]>;

/** What is kept of a key: JSON, so that nobody changes it by holding on to an object; seconds since the epoch. */
interface Entry {
  value: string;
  expires: number | null;
}

function isLive(entry: Entry | undefined): entry is Entry {
  return entry !== undefined && (entry.expires === null || entry.expires > seconds());
}

/** Returns the value of an entry, or `undefined` if there is none or it has expired. */
function valueOf(entry: Entry | undefined): unknown {
  return isLive(entry) ? JSON.parse(entry.value) : undefined;
}

/** Returns what an `update` answers, and the entry that it writes: `null` deletes, `undefined` leaves all as it is. */
function applyChange(found: Entry | undefined, change: Update[1], options: Update[2]) {
  const live = isLive(found) ? found : undefined;
  const current = valueOf(live);
  const next = change(current);
  let entry: Entry | null | undefined;
  // What has expired is deleted as well, or it would be there again after the clock is set back.
  if (next === undefined) entry = found && null;
  else if (next !== current) {
    entry = { value: JSON.stringify(next), expires: options?.expiresAt ?? live?.expires ?? null };
  }
  return { next, entry };
}

/**
 * Expired entries are invisible at once, and so many of them, the latest, are kept: a clock that jumped ahead, however
 * far, must not cost a connection when it is right again.
 */
const EXPIRED_KEPT = 1000;
/** "mcpa" in ASCII: the `application_id` that marks a file as ours. */
const APPLICATION_ID = 0x6d637061;
/** The `user_version` of a file: which tables it has. */
const FORMAT = 2;
/** Seconds that a read or a write waits for a lock of another process. */
const LOCK_PATIENCE = 5;
/** Milliseconds for which what was seen of the files is taken to hold: on a busy server, looking costs too much. */
const LOOK_INTERVAL = 1;
/** Behind a prefix, the end of all keys that begin with it. */
const LAST_CHARACTER = "\u{10ffff}";

/**
 * Keeps state in one SQLite file in a folder of its own, `<dir>/oauth.sqlite`, by the `node:sqlite` that Deno, Bun and
 * Node all carry. What `update` has answered survives `kill -9` and a power cut (`synchronous=FULL`). Several processes
 * on one machine may share the folder; a network file system will not do. If the file is removed or replaced while it
 * is in use, every call throws until the same file is back or the server is restarted.
 *
 * @throws {Error} if the folder cannot be written, or the file is damaged, of another format, or not ours. Such a file
 * is never changed.
 */
export function fileStore(dir: string): Store {
  assert(
    typeof dir === "string" && !/^(~([\\/].*)?)?$/.test(dir),
    `fileStore: dir must be the path of a folder, such as ".oauth-state"; only a shell knows what ~ is`,
  );
  const { db, file } = openDatabase(dir);
  const sql = prepareStatements(db);
  const watch = watchFile(sql, file);
  const updates = batch((updates: Update[]) => retry(() => writeAll(sql, watch, updates)));
  const read = <T>(query: () => unknown): Promise<T> =>
    retry(() => {
      watch.look();
      return query() as T;
    });
  return {
    get: async (key) => valueOf(await read<Entry | undefined>(() => sql.select.get(key))),
    update: (...update) => updates.add(update),
    async *list(prefix) {
      const rows = await read<(Entry & { key: string })[]>(() => sql.list.all(prefix, prefix + LAST_CHARACTER));
      for (const row of rows) if (isLive(row)) yield [row.key, valueOf(row)];
    },
    version: watch.version,
    close() {
      updates.flush();
      db.close();
    },
  };
}

/** The part of `node:sqlite` that is used here; Deno and Bun have it too. */
interface Sqlite {
  exec(sql: string): void;
  prepare(sql: string): Record<"get" | "all" | "run", (...values: unknown[]) => unknown>;
  close(): void;
}

function prepareStatements(db: Sqlite) {
  return {
    select: db.prepare("SELECT value, expires FROM entries WHERE key = ?"),
    list: db.prepare("SELECT key, value, expires FROM entries WHERE key >= ? AND key < ? ORDER BY key"),
    upsert: db.prepare(`INSERT INTO entries (key, value, expires) VALUES (?, ?, ?)
      ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = excluded.expires`),
    remove: db.prepare("DELETE FROM entries WHERE key = ?"),
    // Two at a time, with each change: the past is cleared faster than it grows, and nothing ever waits for a sweep.
    sweep: db.prepare(`DELETE FROM entries WHERE key IN
      (SELECT key FROM entries WHERE expires < ? ORDER BY expires DESC LIMIT 2 OFFSET ${EXPIRED_KEPT})`),
    begin: db.prepare("BEGIN IMMEDIATE"),
    commit: db.prepare("COMMIT"),
    rollback: db.prepare("ROLLBACK"),
    dataVersion: db.prepare("PRAGMA data_version"),
  };
}

type Statements = ReturnType<typeof prepareStatements>;

/** The commits of all file stores in this process. */
let commits = 0;

/** Writes all changes in one transaction: the commit dominates the cost. They become durable together, or none does. */
function writeAll(sql: Statements, { assertInPlace }: ReturnType<typeof watchFile>, updates: Update[]): unknown[] {
  let changed = false;
  const write = ([key, change, options]: Update): unknown => {
    const { next, entry } = applyChange(sql.select.get(key) as Entry | undefined, change, options);
    if (entry === undefined) return next;
    if (entry) sql.upsert.run(key, entry.value, entry.expires);
    else sql.remove.run(key);
    sql.sweep.run(seconds());
    changed = true;
    return next;
  };
  // Before, because what is written to a log that was deleted may end in a file that others use by now; and after,
  // because nobody would find it there again: it must not be answered as done.
  assertInPlace();
  sql.begin.run();
  try {
    const results = updates.map(write);
    (changed ? sql.commit : sql.rollback).run();
    if (changed) commits++;
    assertInPlace();
    return results;
  } catch (error) {
    attempt(() => sql.rollback.run()); // SQLite may have done so by itself; what led here is the error to report
    throw error;
  }
}

/** Watches an open state file: whether it is still the one in the folder, and whether anybody has changed it. */
function watchFile(sql: Statements, file: string) {
  const { statSync } = nodeModule("node:fs");
  const countOthers = () => Number(Object.values(sql.dataVersion.get() as object)[0]);
  /** Which files the names stand for: the state, the log of its latest changes, the index of that log. */
  const identify = () =>
    ["", "-wal", "-shm"].map((suffix) => {
      const found = statSync(file + suffix, { throwIfNoEntry: false });
      return `${found?.dev} ${found?.ino}`;
    }).join();
  let others = countOthers(); // a first read, which makes the log and its index if they are not there
  const opened = identify();
  let lookedAt = -Infinity;

  function assertInPlace(): void {
    if (identify() === opened) return;
    throw new StateFileError(
      `${quote(file)}, or its -wal or -shm, was removed or replaced while the server was running. It accepts nothing ` +
        "until the same file is back, or until it is restarted and uses what is in the folder then",
    );
  }

  function look(): void {
    const now = performance.now();
    if (now - lookedAt < LOOK_INTERVAL) return;
    assertInPlace();
    others = countOthers();
    lookedAt = now;
  }

  // SQLite counts what other connections commit; this process counts its own, at once. Neither count ever falls, so no
  // sum comes twice. A revocation by another process holds here a millisecond later at most: whoever uses the token
  // within that might as well have come before the revocation. Where there is no sum, the record is read, and that says
  // what is wrong.
  const version = () =>
    attempt(() => {
      look();
      return commits + others;
    });
  return { assertInPlace, look, version };
}

/** Returns what a call returns, or nothing if it throws: for what may fail without harm. */
function attempt<T>(call: () => T): T | undefined {
  try {
    return call();
  } catch {
    return undefined;
  }
}

/**
 * Runs a database call, again and again while another process holds the lock or wins the race. SQLite itself is told
 * not to wait: it would do so with the whole server standing still.
 */
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

/** A compare-and-set found that somebody else had been there. */
class LostRace extends Error {}

function isLocked(error: unknown): boolean {
  return error instanceof LostRace || /database (table )?is locked|busy/i.test((error as Error)?.message);
}

/**
 * Collects tasks for as long as a turn of the event loop lasts, and has them performed together. One that fails does
 * not take the others with it: each is then tried alone.
 */
function batch<Task, Result>(perform: (tasks: Task[]) => Promise<Result[]>) {
  const { setImmediate } = nodeModule("node:timers");
  let tasks: Task[] = [];
  let begin: (results: Promise<Result[]>) => void;
  let results: Promise<Result[]>;

  function flush(): void {
    if (tasks.length === 0) return;
    const together = tasks;
    tasks = [];
    begin(perform(together));
  }

  async function add(task: Task): Promise<Result> {
    const position = tasks.push(task) - 1;
    if (position === 0) {
      results = new Promise((resolve) => begin = resolve);
      setImmediate(flush);
    }
    try {
      return (await results)[position]!;
    } catch (error) {
      if (isLocked(error)) throw error; // a lock concerns them all, and each has waited long enough for it
      return (await perform([task]))[0]!;
    }
  }

  return { add, flush };
}

class StateFileError extends Error {}

/** Opens the state file of a folder, made if there is none; returns it with its absolute path. */
function openDatabase(dir: string): { db: Sqlite; file: string } {
  const { DatabaseSync } = nodeModule("node:sqlite");
  const file: string = nodeModule("node:path").resolve(dir, "oauth.sqlite"); // for the working folder may change
  try {
    ensureDatabase(dir, file);
  } catch (cause) {
    if (cause instanceof StateFileError) throw cause;
    const { name, message } = cause as Error;
    const advice = name === "NotCapable" // what Deno throws; its message names the flag
      ? `Deno was started without a permission. ${message}`
      : "make it writable for this user and see that there is room, or give fileStore() another folder";
    throw new Error(`Cannot write the state folder ${quote(dir)}: ${advice}`, { cause });
  }
  try {
    checkFile(file);
    const db = new DatabaseSync(file) as Sqlite;
    // For what follows SQLite may wait; from then on retry() does, because SQLite would stop the whole server.
    db.exec(`PRAGMA busy_timeout = ${LOCK_PATIENCE * 1000}`);
    db.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 0");
    return { db, file };
  } catch (cause) {
    if (cause instanceof StateFileError) throw cause;
    throw new StateFileError(
      `The state file ${quote(file)} cannot be read and was left as it is. Move it away, with its -wal and -shm ` +
        "beside it, and put a backup in its place, or start anew, which ends all connections",
      { cause },
    );
  }
}

/** Sees to it that the file is there, and that it and its folder can be written. */
function ensureDatabase(dir: string, file: string): void {
  const fs = nodeModule("node:fs");
  fs.mkdirSync(dir, { recursive: true, mode: 0o700 });
  // What a process left behind that was killed here; a minute is more than this takes. On Windows a virus scanner may
  // hold such a file; then a later start clears it away.
  for (const name of fs.readdirSync(dir)) {
    if (!/^oauth\.sqlite\.[0-9a-f]{8}\.new(-journal|-wal|-shm)?$/.test(name)) continue;
    attempt(() => Date.now() - fs.statSync(`${dir}/${name}`).mtimeMs > MINUTE * 1000 && fs.rmSync(`${dir}/${name}`));
  }
  const fresh = `${file}.${random(4)}.new`;
  try {
    // Deno's accessSync() knows nothing of a file system that is mounted read-only. And SQLite gives the files that it
    // puts beside one the mode of that one.
    fs.closeSync(fs.openSync(fresh, "wx", 0o600));
    if (!fs.existsSync(file)) createDatabase(fresh, file);
    fs.accessSync(file, fs.constants.R_OK | fs.constants.W_OK);
  } finally {
    for (const suffix of ["", "-journal", "-wal", "-shm"]) attempt(() => fs.rmSync(fresh + suffix, { force: true }));
  }
}

/** Makes the file under another name and puts it in place whole: one of this name without our mark is always damage. */
function createDatabase(fresh: string, file: string): void {
  const fs = nodeModule("node:fs");
  // SQLite would take the log of a file that was moved away for the new one's. Looked for twice, because another
  // process may be making the file, and then its log, at this moment.
  if (fs.existsSync(`${file}-wal`) && !fs.existsSync(file)) {
    throw new StateFileError(
      `${quote(`${file}-wal`)} is there without the state file it belongs to: put oauth.sqlite back, or move the ` +
        "-wal and -shm away as well to start anew, which ends all connections",
    );
  }
  const db: Sqlite = new (nodeModule("node:sqlite").DatabaseSync)(fresh);
  // With rows, because WITHOUT ROWID a record larger than a quarter of a page takes pages of its own. And with the log,
  // because a kill in between would leave a journal that must be rolled back.
  db.exec(`PRAGMA application_id = ${APPLICATION_ID}; PRAGMA user_version = ${FORMAT};
    CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL);
    CREATE INDEX expiring ON entries (expires) WHERE expires IS NOT NULL;
    PRAGMA journal_mode = WAL`);
  db.close();
  try {
    fs.linkSync(fresh, file); // unlike a rename, it does not replace what another process put there meanwhile
  } catch {
    if (fs.existsSync(file)) return;
    // A file system without hard links. "wx" replaces nothing either; a kill in the middle of it leaves a damaged file,
    // which the next start names, and in which nothing was.
    fs.writeFileSync(file, fs.readFileSync(fresh), { flag: "wx", mode: 0o600, flush: true });
  }
}

/**
 * Throws unless this is a sound state file of ours. Opened only for reading, because SQLite may change a damaged file,
 * or take in its log, as soon as it may write. And by SQLite, because what is in the log counts, and because closing a
 * file that was opened in any other way takes away the locks that another store in this process has on it (POSIX).
 */
function checkFile(file: string): void {
  if (nodeModule("node:fs").statSync(file).size === 0) throw new Error("it is empty"); // SQLite would delete its log
  const db: Sqlite = new (nodeModule("node:sqlite").DatabaseSync)(file, { readOnly: true });
  const pragma = (name: string) => Object.values(db.prepare(`PRAGMA ${name}`).get() as object)[0];
  const refuse = (why: string) => {
    throw new StateFileError(`${quote(file)} ${why}, or give fileStore() another folder. The file was left as it is`);
  };
  try {
    db.exec(`PRAGMA busy_timeout = ${LOCK_PATIENCE * 1000}`);
    if (pragma("application_id") !== APPLICATION_ID) refuse("is not a state file of this program: move it away");
    const format = pragma("user_version");
    if (format !== FORMAT) {
      refuse(`has format ${format}, not ${FORMAT}: if a newer version of personal-auth wrote it, update mod.ts`);
    }
    const verdict = pragma("quick_check");
    if (verdict !== "ok") throw new Error(String(verdict));
    db.prepare("SELECT key FROM entries");
  } finally {
    db.close();
  }
}

/** The part of a `Deno.Kv` that is used here, so that no Deno type is named. */
export interface KvLike {
  get(key: string[]): Promise<{ value: unknown; versionstamp: string | null }>;
  list(selector: { start: string[]; end: string[] }): AsyncIterable<{ key: readonly unknown[]; value: unknown }>;
  atomic(): KvAtomicLike;
  close(): void;
}

/** One compare-and-set of a {@linkcode KvLike}. */
export interface KvAtomicLike {
  check(entry: { key: string[]; versionstamp: string | null }): KvAtomicLike;
  set(key: string[], value: unknown, options?: { expireIn?: number }): KvAtomicLike;
  delete(key: string[]): KvAtomicLike;
  commit(): Promise<{ ok: boolean }>;
}

/** Deno KV removes by its own clock; seconds that ours may differ from it, or have been wrong. */
const EXPIRED_KV_KEPT = 30 * DAY;
const MAX_KV_BYTES = 65_536;

/**
 * Keeps state in a `Deno.Kv`: a local file, or the distributed store of Deno Deploy or denokv. `await Deno.openKv()`
 * makes one; so does `openKv()` of `@deno/kv` on Node and Bun. All three read what the others wrote.
 */
export function kvStore(kv: KvLike): Store {
  assert(typeof kv?.atomic === "function", "kvStore needs an open Deno.Kv: kvStore(await Deno.openKv())");
  const path = (key: string) => ["personal-auth", key];

  async function compareAndSet(...[key, change, options]: Update): Promise<unknown> {
    const { value, versionstamp } = await kv.get(path(key));
    const { next, entry } = applyChange(decodeEntry(key, value), change, options);
    if (entry === undefined) return next;
    const atomic = kv.atomic().check({ key: path(key), versionstamp });
    if (entry === null) atomic.delete(path(key));
    else {
      const left = (entry.expires ?? Infinity) - seconds() + EXPIRED_KV_KEPT;
      const expireIn = Math.max(0, Math.ceil(left * 1000));
      atomic.set(path(key), encodeEntry(key, entry), left === Infinity ? {} : { expireIn });
    }
    if (!(await atomic.commit()).ok) throw new LostRace("another process changed this key at the same time");
    return next;
  }

  const inTurn = queue();
  return {
    get: (key) => retry(async () => valueOf(decodeEntry(key, (await kv.get(path(key))).value))),
    // One after the other within this process, so that only other processes are raced against.
    update: (...update) => inTurn(update[0], () => retry(() => compareAndSet(...update))),
    async *list(prefix) {
      for await (const { key, value } of kv.list({ start: path(prefix), end: path(prefix + LAST_CHARACTER) })) {
        const entry = decodeEntry(String(key[1]), value);
        if (isLive(entry)) yield [String(key[1]), valueOf(entry)];
      }
    },
    close: () => kv.close(),
  };
}

/**
 * Writes `[expires, value]` as JSON in UTF-8. Only bytes are the same in every version of V8; and the expiry is in
 * them, because KV's own may be a minute late.
 */
function encodeEntry(key: string, { value, expires }: Entry): Uint8Array {
  const bytes = utf8.encode(`[${JSON.stringify(expires)},${value}]`);
  if (bytes.length <= MAX_KV_BYTES) return bytes;
  throw new Error(`${quote(key)} would take ${bytes.length} bytes, and a Deno.Kv holds ${MAX_KV_BYTES} in a value`);
}

function decodeEntry(key: string, bytes: unknown): Entry | undefined {
  if (bytes === null) return undefined; // what KV answers for a key that is not there
  const pair = attempt(() => JSON.parse(new TextDecoder().decode(bytes as Uint8Array)));
  if (Array.isArray(pair) && pair.length === 2 && (pair[0] === null || typeof pair[0] === "number")) {
    return { expires: pair[0], value: JSON.stringify(pair[1]) };
  }
  const found = `The value of ["personal-auth", ${quote(key)}] in the Deno.Kv was not written by personal-auth`;
  throw new Error(`${found} and was left as it is: delete it, or open another KV`);
}

/** Runs the tasks of one key one after the other, and forgets a key that has none. */
function queue(): <T>(key: string, task: () => Promise<T>) => Promise<T> {
  const last = new Map<string, Promise<unknown>>();
  return (key, task) => {
    const turn = (last.get(key) ?? Promise.resolve()).then(task);
    // A task that never ends must not hold up its key for ever: who waits for it has been answered by then.
    const done: Promise<unknown> = withDeadline(turn).catch(() => {}).then(() =>
      last.get(key) === done && last.delete(key)
    );
    last.set(key, done);
    return turn;
  };
}

/** Seconds that the store may take to answer: more than LOCK_PATIENCE, and less than the ten that Claude waits. */
const STORE_DEADLINE = 8;

function withDeadline<T>(answer: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = () => reject(new Error(`the store has not answered for ${STORE_DEADLINE} seconds`));
    const timer = setTimeout(late, STORE_DEADLINE * 1000);
    answer.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/**
 * Makes the store what the rest of the server sees of it: when it fails, or does not answer in time, the owner is told
 * in full and the wire gets a 503.
 */
function guardStore(store: Store, emit: Emit): Store {
  async function guarded<T>(ask: () => Promise<T>): Promise<T> {
    try {
      return await withDeadline(promiseTry(ask));
    } catch (cause) {
      emit("server_error", "the store failed", { cause });
      const headers = { "Retry-After": "5" };
      throw new OAuthError("server_error", "The server cannot reach its state; try again", { status: 503, headers });
    }
  }

  function update(...[key, change, options]: Update): Promise<unknown> {
    let answered = false;
    // A store that wakes up late must not apply what was answered with 503: the client has moved on. Where the change
    // was computed in time and only its commit comes late, it is as if the answer had got lost on the way. That does no
    // harm: a refresh or an approval is repeated with the same result, a code or a token that nobody was given opens
    // nothing, and what was to end has ended.
    const inTime = (current: unknown) => {
      assert(!answered, "the store came back after the request was answered: nothing was changed");
      return change(current);
    };
    return guarded(() => store.update(key, inTime, options)).finally(() => answered = true);
  }

  async function listAll(prefix: string): Promise<[string, unknown][]> {
    const entries: [string, unknown][] = [];
    for await (const entry of store.list(prefix)) entries.push(entry);
    return entries;
  }

  return {
    ...(store.version && { version: () => store.version!() }),
    get: (key) => guarded(() => store.get(key)),
    update,
    async *list(prefix) {
      yield* await guarded(() => listAll(prefix));
    },
  };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Primitives
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const utf8 = new TextEncoder();

/** Returns what a function returns or throws, as a promise. */
function promiseTry<T>(call: () => T | Promise<T>): Promise<T> {
  return new Promise((resolve) => resolve(call()));
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

let latest = 0;

/**
 * Seconds since the epoch, with their fraction: the one unit of time in this file. Within a process no two moments are
 * the same, so that what came first can be told even within one tick of the clock.
 */
function seconds(): number {
  const now = Date.now() / 1000;
  latest = now > latest || latest - now > 1 ? now : latest + 1e-6; // a clock that was set back is followed
  return latest;
}

function hex(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += (byte + 0x100).toString(16).slice(1);
  return text;
}

/** So many random bytes, as hex digits. */
function random(bytes: number): string {
  return hex(crypto.getRandomValues(new Uint8Array(bytes)));
}

function base64url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** Base64 or base64url of UTF-8 text; nothing if it is neither. */
function decodeBase64(text: string): string | undefined {
  try {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new TextDecoder().decode(bytes);
  } catch {
    return undefined;
  }
}

/**
 * `node:crypto`, where there is one: Web Crypto sends each digest through a pool of threads, which on Deno and Node takes
 * forty times as long as the digest itself.
 */
// deno-lint-ignore no-explicit-any
const nodeCrypto = lazy((): any => builtinModule("node:crypto") ?? {});

/** SHA-256 in base64url: how secrets are kept, and the S256 transformation of RFC 7636 §4.2. */
async function sha256(text: string): Promise<string> {
  const { createHash } = nodeCrypto();
  if (createHash) return createHash("sha256").update(text).digest("base64url");
  return base64url(new Uint8Array(await crypto.subtle.digest("SHA-256", utf8.encode(text))));
}

/**
 * HMAC-SHA-256 (RFC 2104) in hex, under a key of 64 hex digits: as long as a block of SHA-256, so it needs no padding. It
 * is put together from its two digests, because on Deno `createHmac` takes three times as long as they do.
 */
async function hmac(key: string): Promise<(text: string) => Promise<string>> {
  const { createHash } = nodeCrypto();
  if (createHash) {
    const masked = (mask: number) => String.fromCharCode(...[...key].map((digit) => digit.charCodeAt(0) ^ mask));
    const [inner, outer] = [masked(0x36), masked(0x5c)];
    const digest = (text: string) => createHash("sha256").update(inner).update(text).digest();
    return (text) => Promise.resolve(createHash("sha256").update(outer).update(digest(text)).digest("hex"));
  }
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const imported = await crypto.subtle.importKey("raw", utf8.encode(key), algorithm, false, ["sign"]);
  return async (text) => hex(new Uint8Array(await crypto.subtle.sign("HMAC", imported, utf8.encode(text))));
}

/** HMAC-SHA-256 under the server's key, in hex. The purpose keeps one use from standing in for another. */
type Mac = (purpose: string, ...parts: string[]) => Promise<string>;

/** The key is drawn at the first start. It opens nothing by itself: what it signs is checked against the store. */
function serverMac(store: Store): Mac {
  const keyed = once(async () => {
    const { key } = await store.update("server", (current) => current ?? { key: random(32) }) as { key: string };
    return hmac(key);
  });
  // JSON, so that no two lists of parts come out as the same bytes.
  return async (purpose, ...parts) => (await keyed())(JSON.stringify([purpose, ...parts]));
}

/** Whether two strings are equal, in a time that tells only their lengths. */
function equal(a: string, b: string): boolean {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a.charCodeAt(i) ^ b.charCodeAt(i);
  return difference === 0;
}

/** Computes a value when it is first needed, and again only after a failure. */
function once<T>(compute: () => Promise<T>): () => Promise<T> {
  let value: Promise<T> | undefined;
  return () =>
    value ??= compute().catch((error) => {
      value = undefined;
      throw error;
    });
}

/** The same for a value that is computed at once. */
function lazy<T>(compute: () => T): () => T {
  let value: T | undefined;
  return () => value ??= compute();
}

/** The members that have a value: JSON for other people's parsers holds no null. */
function defined<T extends Record<string, unknown>>(members: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(members).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

/** A module of Node's, which Deno and Bun have as well. Asked for only where it is used: this file loads without. */
function builtinModule(name: string): unknown {
  const { process } = globalThis as { process?: { getBuiltinModule?: (name: string) => unknown } };
  return process?.getBuiltinModule?.(name);
}

// deno-lint-ignore no-explicit-any
function nodeModule(name: string): any {
  const module = builtinModule(name);
  if (!module) {
    throw new Error(`${name} is missing: fileStore() needs Deno 2.9, Bun 1.4 or Node 22.18, or later ones`);
  }
  return module;
}

/**
 * OAuth parameters. One without a value counts as absent, and one that comes twice is refused, because two parsers may
 * take different ones of the two (RFC 6749 §3.1); only `resource` may repeat (RFC 8707 §2).
 */
function parameters(encoded: string, repeatable = "resource"): URLSearchParams {
  const params = new URLSearchParams(encoded);
  const seen = new Set<string>();
  const known = new URLSearchParams();
  for (const [name, value] of params) {
    if (value === "") continue;
    if (seen.has(name) && name !== repeatable) {
      throw new OAuthError("invalid_request", `The parameter ${quote(name)} is given more than once`);
    }
    if (seen.size >= MAX_PARAMETERS) throw new OAuthError("invalid_request", "The request has too many parameters");
    seen.add(name);
    known.append(name, value);
  }
  return known;
}

/** Far more than any client sends; looking one up takes a walk over all of them. */
const MAX_PARAMETERS = 100;

async function readForm(c: Context, repeatable?: string): Promise<URLSearchParams> {
  assertContentType(c, "application/x-www-form-urlencoded");
  return parameters(await readBody(c), repeatable);
}

async function readJson(c: Context): Promise<unknown> {
  assertContentType(c, "application/json");
  const body = await readBody(c);
  try {
    return JSON.parse(body);
  } catch (cause) {
    throw new OAuthError("invalid_client_metadata", "The body is not valid JSON", { cause });
  }
}

/** The body, and never more of it than may be. */
async function readBody(c: Context): Promise<string> {
  const announced = Number(c.req.header("Content-Length") ?? NaN);
  try {
    if (announced > MAX_BODY_BYTES) throw new TooLarge();
    // A server takes no more from the wire than was announced, unless it comes in chunks (RFC 9112 §6.3): then it is
    // counted as it comes, which is slower.
    if (announced <= MAX_BODY_BYTES && c.req.header("Transfer-Encoding") === undefined) {
      const text = await c.req.text();
      if (text.length > MAX_BODY_BYTES) throw new TooLarge(); // no server was in between
      return text;
    }
    return await readLimited(c.req.raw.body, MAX_BODY_BYTES);
  } catch (cause) {
    if (!(cause instanceof TooLarge)) {
      throw new OAuthError("invalid_request", "The body did not arrive whole", { cause });
    }
    // What is left of it would be taken for the next request: the connection ends with the answer.
    throw new OAuthError("invalid_request", `The body is larger than ${MAX_BODY_BYTES} bytes`, {
      status: 413,
      headers: { Connection: "close" },
    });
  }
}

/** A stream that is longer than somebody was willing to read. */
class TooLarge extends Error {}

async function readLimited(stream: ReadableStream<Uint8Array> | null, limit: number): Promise<string> {
  const reader = stream?.getReader(); // not for await: not every set of types knows that a stream can be iterated
  const decoder = new TextDecoder();
  let text = "";
  let length = 0;
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > limit) {
      reader.cancel().catch(() => {}); // the sender is told to stop; whether it listens is its own affair
      throw new TooLarge(`is larger than ${limit} bytes`);
    }
    text += decoder.decode(value, { stream: true });
  }
  return text + decoder.decode();
}

function assertContentType(c: Context, type: string): void {
  if (c.req.header("Content-Type")?.split(";")[0]?.trim().toLowerCase() !== type) {
    throw new OAuthError("invalid_request", `The Content-Type must be ${type}`, { status: 415 });
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Errors
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

type ErrorStatus = 400 | 401 | 403 | 405 | 413 | 415 | 500 | 503;

/**
 * An error in OAuth's own form (RFC 6749 §5.2). `code` and `message` go to the client; what only the owner may read
 * goes into `cause` or an event, never into the message.
 */
export class OAuthError extends Error {
  override name = "OAuthError";
  readonly code: string;
  readonly status: ErrorStatus;
  readonly headers: Record<string, string>;
  /** The event to raise when this is answered. */
  readonly event: AuthEvent["type"] | undefined;

  constructor(
    code: string,
    description: string,
    more: {
      status?: ErrorStatus;
      headers?: Record<string, string>;
      event?: AuthEvent["type"];
      cause?: unknown;
    } = {},
  ) {
    super(description, { cause: more.cause });
    this.code = code;
    this.status = more.status ?? 400;
    this.headers = more.headers ?? {};
    this.event = more.event;
  }
}

function methodNotAllowed(allow: string): never {
  throw new OAuthError("invalid_request", `The method must be one of ${allow}`, {
    status: 405,
    headers: { Allow: allow },
  });
}

/** Anything that was thrown, as an OAuthError. What is none is a fault of this file, and tells the wire nothing. */
function asOAuthError(error: unknown, emit: Emit): OAuthError {
  if (error instanceof OAuthError) return error;
  emit("server_error", "an unexpected error", { cause: error });
  return new OAuthError("server_error", "Something went wrong here", { status: 500 });
}

function errorResponse(c: Context, thrown: unknown, { emit }: Settings): Response {
  const { code, message, status, headers } = asOAuthError(thrown, emit);
  // A 401 must say how to authenticate (RFC 9110 §15.5.2); the guard's own says it by itself.
  const all: Record<string, string> = { ...headers, "Cache-Control": "no-store" };
  if (status === 401) all["WWW-Authenticate"] ??= 'Basic realm="token"';
  return c.json({ error: code, error_description: errorDescription(message) }, status, all);
}

/** The same for an endpoint that people see. */
function errorPage(c: Context, thrown: unknown, settings: Settings): Response | Promise<Response> {
  const { message, status, headers } = asOAuthError(thrown, settings.emit);
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
  return messagePage(
    c,
    settings,
    status,
    status < 500 ? settings.wording.faulty : settings.wording.failed,
    `${message}.`,
  );
}

type Handler = (c: Context) => Response | Promise<Response>;

/** A handler that answers what it throws. */
function answering(handler: Handler, settings: Settings, answer: typeof errorPage = errorResponse) {
  return async (c: Context): Promise<Response> => {
    try {
      return await handler(c);
    } catch (error) {
      return await answer(c, error, settings);
    }
  };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Setup check
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** One thing that {@linkcode checkSetup} looked at. */
export interface SetupFinding {
  /** `failed`: would keep a client out. `warning`: some clients stumble, or something is weaker than it could be. */
  result: "ok" | "warning" | "failed";
  /** What was found. */
  what: string;
  /** What to do about it, in one sentence. */
  fix?: string;
}

/** What {@linkcode checkSetup} found. */
export interface SetupReport {
  url: string;
  /** `unreachable`: nothing could be asked at all, and the last finding says why. */
  verdict: "ready" | "broken" | "unreachable";
  findings: SetupFinding[];
}

/** How to ask. */
export interface SetupOptions {
  /** Told what is being asked, before each request. */
  onProgress?: (what: string) => void;
  /** In place of the built-in `fetch`. */
  fetch?: (request: Request) => Response | Promise<Response>;
}

/** What the stages of a check share. */
interface Checkup {
  url: URL;
  ask(what: string, path: string | URL, init?: RequestInit): Promise<Answer>;
  note(result: SetupFinding["result"], what: string, fix?: string): void;
  /** ok, or the other with its fix. */
  expect(good: unknown, what: string, fix: string, otherwise?: "warning" | "failed"): boolean;
  metadataUrl?: string;
  // deno-lint-ignore no-explicit-any
  resource?: any;
  // deno-lint-ignore no-explicit-any
  server?: any;
  client_id?: string;
}

interface Answer {
  status: number;
  headers: Headers;
  text: string;
  /** The body, if it is JSON and says so. */
  // deno-lint-ignore no-explicit-any
  json: any;
  seconds: number;
}

/** How hosted Claude introduces itself: the one for discovery, registration and tokens, the other for MCP itself. */
const OAUTH_AGENT = "python-httpx/0.28.1";
const MCP_AGENT = "Claude-User";
/** Claude's own limit for everything but a refresh. */
const CLIENT_PATIENCE_SECONDS = 10;
const CHECK_REDIRECT = "https://claude.ai/api/mcp/auth_callback";
const CHECK_CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"; // RFC 7636 appendix B; nothing is ever redeemed

/** Where no answer came at all. */
class Unreachable extends Error {}

/**
 * Asks a server the questions that a client will ask, from outside and without the owner's password: any server, not
 * only one of this file. On the command line: `deno run -A mod.ts https://your-domain.com/mcp`, or with `bun`, `node`.
 * It registers a client and starts an authorization that it never finishes.
 *
 * @throws {TypeError} if `mcpUrl` is not an http or https URL.
 */
export async function checkSetup(mcpUrl: string, options: SetupOptions = {}): Promise<SetupReport> {
  const url = URL.parse(mcpUrl);
  assert(
    url && /^https?:$/.test(url.protocol),
    `Give the URL that you type into Claude, such as "https://your-domain.com/mcp"`,
  );
  const findings: SetupFinding[] = [];
  let answers = 0;
  const note: Checkup["note"] = (result, what, fix) =>
    void findings.push({ result, what, ...(result !== "ok" && defined({ fix })) });
  const expect: Checkup["expect"] = (good, what, fix, otherwise = "failed") => {
    note(good ? "ok" : otherwise, what, fix);
    return Boolean(good);
  };
  const checkup: Checkup = {
    url,
    async ask(what, path, init = {}) {
      const answer = await ask(what, new URL(path, url), init, options);
      answers++;
      return answer;
    },
    note,
    expect,
  };
  const stages = [
    checkAddress,
    checkChallenge,
    checkUserAgents,
    checkResourceMetadata,
    checkServerMetadata,
    checkOpenidConfiguration,
    checkRegistration,
    checkAuthorization,
    checkConsent,
    checkToken,
    checkBrowserAccess,
  ];
  try {
    for (const stage of stages) await stage(checkup);
    const broken = findings.some(({ result }) => result === "failed");
    return { url: mcpUrl, verdict: broken ? "broken" : "ready", findings };
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    note("failed", error.message, unreachableFix(error.cause));
    return { url: mcpUrl, verdict: answers > 0 ? "broken" : "unreachable", findings };
  }
}

async function ask(what: string, url: URL, init: RequestInit, options: SetupOptions): Promise<Answer> {
  options.onProgress?.(what);
  const headers = new Headers(init.headers);
  if (!headers.has("User-Agent")) headers.set("User-Agent", OAUTH_AGENT);
  if (!headers.has("Accept")) headers.set("Accept", "*/*");
  const start = performance.now();
  try {
    const signal = AbortSignal.timeout(3 * CLIENT_PATIENCE_SECONDS * 1000);
    const request = new Request(url, { ...init, headers, redirect: "manual", signal });
    const response = await (options.fetch ?? fetch)(request);
    // A stream that stays open, as an event stream does, has said enough with its headers.
    const streams = response.headers.get("Content-Type")?.startsWith("text/event-stream");
    const text = streams ? "" : (await readLimited(response.body, 1024 * 1024));
    if (streams) await response.body?.cancel();
    return {
      status: response.status,
      headers: response.headers,
      text,
      json: parseJson(response.headers, text),
      seconds: (performance.now() - start) / 1000,
    };
  } catch (cause) {
    throw new Unreachable(`No answer from ${url.origin}${url.pathname} (${what})`, { cause });
  }
}

function parseJson(headers: Headers, text: string): unknown {
  try {
    return /^application\/([a-z.+-]+\+)?json/i.test(headers.get("Content-Type") ?? "") ? JSON.parse(text) : undefined;
  } catch {
    return undefined;
  }
}

function unreachableFix(cause: unknown): string {
  const detail = [cause, (cause as Error | undefined)?.cause].map((error) => (error as Error | undefined)?.message)
    .filter(Boolean).join(": ");
  if (/dns|ENOTFOUND|EAI_AGAIN|lookup|resolve/i.test(detail)) {
    return `The name does not resolve; set its DNS record. (${detail})`;
  }
  if (/cert|tls|ssl|handshake/i.test(detail)) {
    return `TLS failed; serve a certificate that browsers trust, with its whole chain. (${detail})`;
  }
  if (/refused/i.test(detail)) return `Nothing listens there; start the server, or open the port. (${detail})`;
  if (/time|abort/i.test(detail)) {
    return `It took too long; clients give up after ${CLIENT_PATIENCE_SECONDS} seconds. (${detail})`;
  }
  return `See that the server runs and is reachable from here. (${detail || "no detail"})`;
}

function checkAddress({ url, note, expect }: Checkup): void {
  const local = isLoopback(url.hostname);
  if (local) {
    note(
      "warning",
      `${url.host} is this computer`,
      "Only programs on it can connect; for Claude on the web, put a tunnel or proxy with https in front.",
    );
  } else {
    expect(
      url.protocol === "https:",
      "the address is https",
      `Write https://${url.host}${url.pathname}; clients send no token over plain http.`,
    );
    expect(url.port === "", "the port is 443", "Serve it on port 443: Claude on the web reaches no other.");
  }
  expect(url.pathname.length > 1, "the address has a path", "Type the whole address, with /mcp at the end.", "warning");
  if (url.pathname.length > 1) {
    expect(
      !url.pathname.endsWith("/"),
      "the address has no slash at its end",
      "Leave the slash out: clients compare the address as a string.",
      "warning",
    );
  }
}

const CHECK_INITIALIZE = JSON.stringify({
  jsonrpc: "2.0",
  id: 0,
  method: "initialize",
  params: { protocolVersion: "2025-11-25", capabilities: {}, clientInfo: { name: "setup-check", version: "1" } },
});

function initializeAs(agent: string, more: Record<string, string> = {}): RequestInit {
  const headers = {
    "Content-Type": "application/json",
    "User-Agent": agent,
    "MCP-Protocol-Version": "2025-11-25",
    ...more,
  };
  return { method: "POST", headers, body: CHECK_INITIALIZE };
}

/** Everything begins with the 401: it is how a client learns that, and where, it has to sign in. */
async function checkChallenge(checkup: Checkup): Promise<void> {
  const { url, note, expect, ask } = checkup;
  const answer = await ask("the MCP endpoint, without a token", url, initializeAs(OAUTH_AGENT));
  const fix: Record<number, string> = {
    200: "The server is open to everybody: put the guard in front of the MCP handler.",
    403: "A firewall or host check refuses the request before the server sees it: let it through.",
    404: "Nothing is served at this path: check the address and the proxy's routes.",
    405: "The method is refused before the token is looked at: put the guard first, for every method.",
    406: "The Accept header is refused before the token is looked at: put the guard in front of the MCP handler.",
    415: "The content type is refused before the token is looked at: put the guard in front of the MCP handler.",
  };
  const redirects = answer.status >= 300 && answer.status < 400;
  const advice = redirects
    ? `It redirects to ${
      quote(answer.headers.get("Location"))
    }: clients lose the method or the token on the way; type the final address, or serve it here.`
    : fix[answer.status] ?? "The server must answer 401 to a request without a token, whatever else is in it.";
  if (
    !expect(
      answer.status === 401,
      `a request without a token is answered ${answer.status}${answer.status === 401 ? "" : ", not 401"}`,
      advice,
    )
  ) return;
  expect(
    answer.seconds < CLIENT_PATIENCE_SECONDS / 3,
    `it answers in ${answer.seconds.toFixed(1)} s`,
    `Clients give up after ${CLIENT_PATIENCE_SECONDS} seconds: find out what is slow.`,
    answer.seconds < CLIENT_PATIENCE_SECONDS ? "warning" : "failed",
  );
  const challenge = answer.headers.get("WWW-Authenticate") ?? "";
  checkup.metadataUrl = challenge.match(/resource_metadata="([^"]+)"/)?.[1] ?? "";
  if (
    expect(
      /^Bearer\b/i.test(challenge),
      "the 401 has a Bearer challenge",
      'Send WWW-Authenticate: Bearer resource_metadata="…" with the 401; a proxy may have removed it.',
    )
  ) {
    expect(
      checkup.metadataUrl,
      "the challenge says where the metadata is",
      'Add resource_metadata="https://…/.well-known/oauth-protected-resource…" to the challenge (RFC 9728 §5.1).',
      "warning",
    );
    expect(
      /scope="[^"]+"/.test(challenge),
      "the challenge names the scope",
      'Add scope="…": without it Claude asks for every scope there is.',
      "warning",
    );
    expect(
      !/error=/.test(challenge),
      "the challenge blames nobody for a token that was not sent",
      "Leave error out where no token came (RFC 6750 §3.1).",
      "warning",
    );
  }
  const get = await ask("the same by GET", url, { headers: { Accept: "text/event-stream" } });
  expect(
    get.status === 401,
    `GET without a token is answered ${get.status}`,
    "Answer 401 to every method: mcp-remote and Codex ask by GET first.",
  );
  const bad = await ask(
    "the same with a made-up token",
    url,
    initializeAs(MCP_AGENT, { Authorization: "Bearer made-up" }),
  );
  if (
    expect(
      bad.status === 401,
      `a made-up token is answered ${bad.status}`,
      "Answer 401, so that clients refresh or sign in again; on anything else they give up.",
    )
  ) {
    expect(
      /error="?invalid_token/.test(bad.headers.get("WWW-Authenticate") ?? ""),
      "a bad token is called invalid_token",
      'Add error="invalid_token" to the challenge (RFC 6750 §3.1).',
      "warning",
    );
  }
  if (!url.pathname.endsWith("/")) {
    const slash = await ask("the address with a slash", new URL(`${url.pathname}/`, url), initializeAs(OAUTH_AGENT));
    expect(
      slash.status === 401 || slash.status === 308,
      `the address with a slash at its end is answered ${slash.status}`,
      "Serve it like the one without: some clients add a slash.",
      "warning",
    );
  }
  note("ok", "the endpoint asks for a token");
}

async function checkUserAgents({ url, expect, ask, metadataUrl }: Checkup): Promise<void> {
  if (metadataUrl === undefined) return;
  const answer = await ask(`the MCP endpoint as ${MCP_AGENT}`, url, initializeAs(MCP_AGENT));
  expect(
    answer.status === 401,
    `${MCP_AGENT} is answered ${answer.status}`,
    `Something in front blocks this user agent (in Cloudflare: Block AI bots, AI Crawl Control): allow ${MCP_AGENT}, or sign-in succeeds and every call fails.`,
  );
}

/** Where RFC 8414 and RFC 9728 put a document for this URL. */
function wellKnown(name: string, url: URL): string {
  return `${url.origin}/.well-known/${name}${url.pathname === "/" ? "" : url.pathname.replace(/\/$/, "")}`;
}

async function readDocument({ ask, expect }: Checkup, what: string, place: string) {
  const { status, json, headers } = await ask(what, place);
  const served = `Serve it at ${place}, without a redirect (RFC 8414 §3, RFC 9728 §3); it must pass every firewall.`;
  if (!expect(status === 200, `${what} is answered ${status}`, served)) return undefined;
  const type = quote(headers.get("Content-Type"));
  return expect(isObject(json), "it is JSON", `It is ${type}: serve application/json, not a page of the app.`)
    ? json
    : undefined;
}

async function checkResourceMetadata(checkup: Checkup): Promise<void> {
  const { url, expect, ask, metadataUrl, note } = checkup;
  const place = metadataUrl || wellKnown("oauth-protected-resource", url);
  if (!URL.canParse(place)) {
    return note("failed", "resource_metadata is not a URL", "Write it in full, with https:// and the host.");
  }
  if (metadataUrl && new URL(metadataUrl).origin !== url.origin) {
    note(
      "failed",
      `resource_metadata points to ${new URL(metadataUrl).origin}`,
      `Build it from the public base URL, ${url.origin}, not from what the request says behind the proxy.`,
    );
  }
  const json = await readDocument(checkup, "the resource's metadata", place);
  if (!json) return;
  checkup.resource = json;
  const typed = url.href.replace(/\/$/, "");
  const same = String(json.resource).replace(/\/$/, "") === typed;
  expect(
    same,
    `resource is ${quote(json.resource)}`,
    `It must be what is typed into the client, ${quote(typed)}, byte for byte.`,
  );
  if (same) {
    expect(
      json.resource === typed,
      "resource has no slash at its end",
      "Leave it out: Codex and Gemini CLI compare strings.",
    );
  }
  const servers = json.authorization_servers;
  expect(
    Array.isArray(servers) && servers.length > 0 && servers.every((server) => typeof server === "string"),
    "it names an authorization server",
    "Add authorization_servers with the issuer (RFC 9728 §2).",
  );
  expect(
    !json.scopes_supported?.includes?.("offline_access"),
    "it does not list offline_access",
    "That belongs in the authorization server's metadata only.",
    "warning",
  );
  const direct = wellKnown("oauth-protected-resource", url);
  if (place !== direct) {
    const other = await ask("the metadata where clients guess it", direct);
    expect(
      other.status === 200,
      `${direct} is answered ${other.status}`,
      "Serve it there too: some clients do not read the challenge.",
      "warning",
    );
  }
  const root = await ask("the metadata at the root", `${url.origin}/.well-known/oauth-protected-resource`);
  expect(
    root.status === 200 && isObject(root.json),
    `the root form of it is answered ${root.status}`,
    "Serve the same document there: Claude Code looks there when it signs out.",
    "warning",
  );
}

async function checkServerMetadata(checkup: Checkup): Promise<void> {
  const { url, resource, expect, note, ask } = checkup;
  const issuer = resource?.authorization_servers?.[0] ?? url.origin;
  if (!URL.canParse(issuer)) return note("failed", `authorization_servers names ${quote(issuer)}`, "It must be a URL.");
  const place = wellKnown("oauth-authorization-server", new URL(issuer));
  const json = await readDocument(checkup, "the authorization server's metadata", place);
  if (!json) return;
  checkup.server = json;
  expect(
    json.issuer === issuer,
    `issuer is ${quote(json.issuer)}`,
    `It must be ${
      quote(issuer)
    }, byte for byte, as authorization_servers has it; mind a slash at the end and http behind a proxy.`,
  );
  const endpoints = ["authorization_endpoint", "token_endpoint", "registration_endpoint", "revocation_endpoint"].filter(
    (name) => name in json,
  );
  for (const name of ["authorization_endpoint", "token_endpoint"]) {
    if (!endpoints.includes(name)) note("failed", `${name} is missing`, "Every client needs it.");
  }
  for (const name of endpoints) {
    const endpoint = URL.parse(String(json[name]));
    const secure = endpoint?.protocol === "https:" || (endpoint !== null && isLoopback(endpoint.hostname));
    expect(
      secure,
      `${name} is https`,
      `It is ${
        quote(json[name])
      }: build it from the public https address, not from what the request says behind the proxy.`,
    );
  }
  const has = (name: string, value: string) => Array.isArray(json[name]) && json[name].includes(value);
  expect(
    has("code_challenge_methods_supported", "S256"),
    "PKCE with S256 is on offer",
    'Add code_challenge_methods_supported: ["S256"]: without it clients refuse to go on.',
  );
  expect(
    has("response_types_supported", "code"),
    "response_types_supported holds code",
    "Add it: the document does not parse without.",
  );
  const cimd = json.client_id_metadata_document_supported === true;
  expect(
    cimd || json.registration_endpoint,
    "a client can introduce itself",
    "Add registration_endpoint (RFC 7591), or client_id_metadata_document_supported: true.",
  );
  expect(
    has("token_endpoint_auth_methods_supported", "none"),
    "public clients are welcome",
    'Add "none" to token_endpoint_auth_methods_supported: Claude and most others are public clients.',
    json.registration_endpoint ? "warning" : "failed",
  );
  expect(
    has("scopes_supported", "offline_access"),
    "offline_access is on offer",
    "Add it to scopes_supported: several clients ask for a refresh token only then.",
    "warning",
  );
  expect(
    json.authorization_response_iss_parameter_supported,
    "answers carry iss (RFC 9207)",
    "Send iss and advertise it: ChatGPT and Codex then use their stable addresses.",
    "warning",
  );
  const nulls = Object.entries(json).filter(([, value]) => value === null || value === "").map(([name]) => name);
  expect(
    nulls.length === 0,
    "no member is null or empty",
    `Leave out ${nulls.join(", ")}: strict clients refuse the whole document.`,
  );
  const head = await ask("the same by HEAD", place, { method: "HEAD" });
  expect(head.status === 200, `HEAD is answered ${head.status}`, "Answer HEAD like GET.", "warning");
}

async function checkOpenidConfiguration({ url, server, note, ask }: Checkup): Promise<void> {
  const { status, json } = await ask("the OpenID configuration", `${url.origin}/.well-known/openid-configuration`);
  if (status === 404) return note("ok", "there is no OpenID configuration to mistake for one");
  const complete = isObject(json) &&
    ["jwks_uri", "subject_types_supported", "id_token_signing_alg_values_supported"].every((name) => json[name]);
  if (status === 200 && !complete) {
    note(
      server ? "warning" : "failed",
      "the OpenID configuration is incomplete",
      "Answer 404 there, or serve all that OpenID Connect Discovery requires: clients that try it cannot parse it.",
    );
  } else if (status !== 200) note("warning", `the OpenID configuration is answered ${status}`, "Answer 404 there.");
}

async function checkRegistration(checkup: Checkup): Promise<void> {
  const { url, server, expect, note, ask } = checkup;
  const endpoint = server?.registration_endpoint ?? (server ? undefined : `${url.origin}/register`);
  if (!endpoint) {
    if (server?.client_id_metadata_document_supported === true) {
      checkup.client_id = "https://claude.ai/oauth/mcp-oauth-client-metadata";
    }
    return;
  }
  const body = JSON.stringify({
    client_name: "setup check",
    redirect_uris: [CHECK_REDIRECT],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  });
  const { status, json, text } = await ask("registration", endpoint, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
  });
  const reason = isObject(json) ? `${json.error ?? ""} ${json.error_description ?? ""}`.trim() : text.slice(0, 100);
  const advice = status === 429
    ? "Do not limit registrations by address: all of Claude's users share a few."
    : `Accept open registration with Claude's redirect URI ${CHECK_REDIRECT}. (${reason})`;
  if (!expect(status === 201 || status === 200, `registration is answered ${status}`, advice)) return;
  if (
    !expect(
      isObject(json) && typeof json.client_id === "string" && json.client_id,
      "it gives a client_id",
      "Answer JSON with client_id (RFC 7591 §3.2.1).",
    )
  ) return;
  checkup.client_id = json.client_id;
  expect(
    json.redirect_uris?.includes?.(CHECK_REDIRECT),
    "it echoes the redirect URIs",
    "Answer redirect_uris as they were registered: clients cannot parse the answer without.",
  );
  const nulls = Object.entries(json).filter(([, value]) => value === null || value === "").map(([name]) => name);
  expect(
    nulls.length === 0,
    "no member of the answer is null or empty",
    `Leave out ${nulls.join(", ")}: strict clients refuse the whole answer.`,
  );
  if (status !== 201) note("warning", "registration answers 200", "Answer 201 (RFC 7591 §3.2.1).");
}

function authorizationUrl(checkup: Checkup, change: Record<string, string | undefined> = {}): URL {
  const { url, server, resource, client_id = "" } = checkup;
  const target = new URL(server?.authorization_endpoint ?? "/authorize", url);
  const params = {
    response_type: "code",
    client_id,
    redirect_uri: CHECK_REDIRECT,
    code_challenge: CHECK_CHALLENGE,
    code_challenge_method: "S256",
    state: "setup-check",
    resource: typeof resource?.resource === "string" ? resource.resource : url.href,
    ...change,
  };
  for (const [name, value] of Object.entries(params)) if (value !== undefined) target.searchParams.set(name, value);
  return target;
}

/** What must not be waved through. */
async function checkAuthorization(checkup: Checkup): Promise<void> {
  const { client_id, expect, ask } = checkup;
  if (!client_id) return;
  const headers = { Accept: "text/html", "User-Agent": "Mozilla/5.0" };
  const location = async (what: string, change: Record<string, string | undefined>) =>
    (await ask(what, authorizationUrl(checkup, change), { headers })).headers.get("Location") ?? "";
  const without = await location("authorization without PKCE", {
    code_challenge: undefined,
    code_challenge_method: undefined,
  });
  expect(
    !/[?&]code=/.test(without),
    "a request without PKCE gets no code",
    "Require PKCE with S256 (OAuth 2.1 §4.1.1).",
  );
  const plain = await location("authorization with plain PKCE", { code_challenge_method: "plain" });
  expect(!/[?&]code=/.test(plain), "a request with plain PKCE gets no code", "Accept S256 only.");
  const elsewhere = await location("authorization with another redirect", { redirect_uri: "https://evil.example/" });
  expect(
    !elsewhere.startsWith("https://evil.example"),
    "a redirect URI that is not registered is not followed",
    "Compare redirect URIs exactly, before anything is sent to them.",
  );
  const unknown = await location("authorization for an unknown client", { client_id: "nobody" });
  expect(
    !unknown.startsWith(CHECK_REDIRECT),
    "an unknown client is not answered by a redirect",
    "Show a page instead: nothing is known about the address.",
  );
}

/** The page the owner sees, and the way back from it: the form's own button to deny shows that without a password. */
async function checkConsent(checkup: Checkup): Promise<void> {
  const { client_id, expect, note, ask } = checkup;
  if (!client_id) return;
  const headers = { Accept: "text/html", "User-Agent": "Mozilla/5.0" };
  const target = authorizationUrl(checkup);
  const shown = await ask("the consent page", target, { headers });
  const location = shown.headers.get("Location") ?? "";
  if (
    !expect(
      !/[?&]code=/.test(location),
      "nobody gets a code without the owner",
      "Ask the owner first: as it is, anybody with an account at an allowed client can connect.",
    )
  ) return;
  if (location.startsWith(CHECK_REDIRECT)) {
    const error = new URL(location).searchParams;
    note(
      "failed",
      `a good authorization request is refused: ${error.get("error")}`,
      error.get("error_description") ?? "See the server's log.",
    );
    return;
  }
  if (location) return note("ok", `the owner is sent to ${new URL(location, target).origin} to sign in`);
  const reason = shown.text.replace(/<(style|script)[^]*?<\/\1>|<[^>]*>/g, " ").replace(/\s+/g, " ").trim().slice(
    0,
    200,
  );
  if (!expect(shown.status === 200, `the consent page is answered ${shown.status}`, `It says: ${reason}`)) return;
  const policy = shown.headers.get("Content-Security-Policy") ?? "";
  expect(
    !/form-action/.test(policy),
    "its Content-Security-Policy has no form-action",
    "Leave form-action out: Chromium applies it to the redirect back to the app, and the button does nothing.",
  );
  const framed = /frame-ancestors/.test(policy) || shown.headers.has("X-Frame-Options");
  expect(
    framed,
    "it cannot be framed",
    "Send frame-ancestors 'none': another site can otherwise lead the owner's click.",
    "warning",
  );
  expect(
    shown.headers.get("Cross-Origin-Opener-Policy") !== "same-origin",
    "it keeps its opener",
    "Leave out Cross-Origin-Opener-Policy: same-origin, which cuts pop-up sign-ins off.",
    "warning",
  );
  await checkDenial(checkup, target, shown);
}

async function checkDenial({ expect, ask, server }: Checkup, page: URL, shown: Answer): Promise<void> {
  const form = shown.text.match(/<form\b[^]*?<\/form>/i)?.[0] ?? "";
  const attribute = (tag: string, name: string) =>
    tag.match(new RegExp(`\\b${name}=(?:"([^"]*)"|'([^']*)')`, "i"))?.slice(1).find((value) => value !== undefined)
      ?.replace(
        /&(amp|quot|lt|gt|#39);/g,
        (_, entity) => ({ amp: "&", quot: '"', lt: "<", gt: ">", "#39": "'" })[entity as "amp"]!,
      );
  const tags = form.match(/<(input|button)\b[^>]*>/gi) ?? [];
  const deny = tags.find((tag) =>
    /deny|denied|cancel|reject/i.test(attribute(tag, "value") ?? attribute(tag, "name") ?? "")
  );
  if (!deny || !attribute(deny, "name")) return; // a page of its own kind: nothing can be said without its owner
  const fields = tags.filter((tag) => /type=["']?hidden/i.test(tag)).map((
    tag,
  ) => [attribute(tag, "name") ?? "", attribute(tag, "value") ?? ""]);
  const cookies = shown.headers.getSetCookie().map((cookie) => cookie.split(";")[0]).join("; ");
  const answer = await ask(
    "the way back from the consent page",
    new URL(attribute(form, "action") || page.href, page),
    {
      method: "POST",
      headers: {
        "Content-Type": "application/x-www-form-urlencoded",
        "User-Agent": "Mozilla/5.0",
        Accept: "text/html",
        Cookie: cookies,
        Origin: page.origin,
      },
      body: new URLSearchParams([...fields, [attribute(deny, "name")!, attribute(deny, "value") ?? ""]]).toString(),
    },
  );
  const { status, headers } = answer;
  if (
    !expect(
      status === 302 || status === 303,
      `the consent form is answered ${status}`,
      status === 307 || status === 308
        ? "Redirect with 302: after 307 the browser posts the owner's form on to the app, which refuses it."
        : "Answer the form with a redirect (302) back to the app.",
    )
  ) return;
  const back = new URL(headers.get("Location") ?? "", page).searchParams;
  expect(
    back.get("error") === "access_denied" && back.get("state") === "setup-check",
    "a denial is told to the app, with its state",
    "Redirect back with error=access_denied and the state as it came.",
  );
  if (server?.authorization_response_iss_parameter_supported) {
    expect(
      back.get("iss") === server.issuer,
      `the answer's iss is ${quote(back.get("iss"))}`,
      `It must be the issuer, ${quote(server.issuer)}, on errors too (RFC 9207 §2).`,
    );
  }
}

async function checkToken({ url, server, client_id, expect, ask }: Checkup): Promise<void> {
  const endpoint = server?.token_endpoint ?? new URL("/token", url).href;
  const post = (what: string, fields: Record<string, string>) =>
    ask(what, endpoint, {
      method: "POST",
      headers: { "Content-Type": "application/x-www-form-urlencoded" },
      body: new URLSearchParams(fields).toString(),
    });
  const unknown = await post("the token endpoint, as an unknown client", {
    grant_type: "refresh_token",
    refresh_token: "made-up",
    client_id: "nobody",
  });
  expect(
    isObject(unknown.json) && typeof unknown.json.error === "string",
    "the token endpoint answers errors in JSON",
    `It answered ${unknown.status} ${
      quote(unknown.headers.get("Content-Type"))
    }: clients take anything but JSON for a broken server.`,
  );
  if (!client_id) return;
  const dead = await post("the token endpoint, with a dead refresh token", {
    grant_type: "refresh_token",
    refresh_token: "made-up",
    client_id,
  });
  const found = `${dead.status} ${isObject(dead.json) ? dead.json.error : ""}`.trim();
  expect(
    found === "400 invalid_grant",
    `a dead refresh token is answered ${found}`,
    "Answer 400 invalid_grant: it is what makes a client ask its user to sign in again.",
  );
}

/** Only browser-based clients need this, such as Inspector and playgrounds. */
async function checkBrowserAccess({ url, server, metadataUrl, expect, ask }: Checkup): Promise<void> {
  if (metadataUrl === undefined) return;
  const headers = {
    Origin: "https://inspector.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,mcp-protocol-version",
  };
  const opens = ({ status, headers }: Answer) =>
    status < 300 && /^\*$|inspector\.example/.test(headers.get("Access-Control-Allow-Origin") ?? "");
  const fix =
    "Answer the preflight before the guard, with Access-Control-Allow-Origin; only clients inside a browser need it.";
  for (const [what, place] of [["the MCP endpoint", url.href], ["the token endpoint", server?.token_endpoint]]) {
    if (!place) continue;
    const answer = await ask(`a browser's preflight for ${what}`, place, { method: "OPTIONS", headers });
    expect(opens(answer), `a browser may use ${what}`, fix, "warning");
  }
}

// deno-lint-ignore no-explicit-any
function isObject(value: unknown): value is Record<string, any> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** `deno run -A mod.ts https://your-domain.com/mcp`: exit status 0 ready, 1 broken, 2 unreachable. */
async function setupCheckCommand(process: CommandProcess): Promise<void> {
  const args = process.argv.slice(2);
  const [url] = args.filter((arg) => !arg.startsWith("--"));
  if (!url) {
    console.error("Say which server to check: mod.ts [--json] https://your-domain.com/mcp");
    process.exitCode = 2;
    return;
  }
  const terminal = Boolean(process.stdout.isTTY) && !process.env.NO_COLOR;
  const quiet = args.includes("--json");
  const progress = (text: string) => process.stdout.write(`\r\x1b[K${text}`);
  const onProgress = (what: string) => terminal && !quiet && progress(`… ${what}`);
  let report: SetupReport;
  try {
    report = await checkSetup(url, { onProgress });
  } catch (error) {
    console.error((error as Error).message);
    process.exitCode = 2;
    return;
  }
  if (terminal && !quiet) progress("");
  console.log(quiet ? JSON.stringify(report, null, 2) : setupReportText(report, terminal));
  process.exitCode = { ready: 0, broken: 1, unreachable: 2 }[report.verdict];
}

function setupReportText({ findings, verdict }: SetupReport, terminal: boolean): string {
  const marks = { ok: ["✓", "32"], warning: ["!", "33"], failed: ["✗", "31"] };
  const lines = findings.map(({ result, what, fix }) => {
    const [mark, colour] = marks[result];
    return `${terminal ? `\x1b[${colour}m${mark}\x1b[0m` : mark} ${what}${fix ? `\n  ${fix}` : ""}`;
  });
  const conclusion = {
    ready: "Clients can connect.",
    broken: "Some clients cannot connect: see the lines with ✗.",
    unreachable: "Nothing could be asked.",
  };
  return [...lines, "", conclusion[verdict]].join("\n");
}

/** The part of Node's `process` that the command uses; Deno and Bun have it too. */
interface CommandProcess {
  argv: string[];
  env: Record<string, string | undefined>;
  exitCode?: number | string | null | undefined;
  stdout: { isTTY?: boolean; write(text: string): unknown };
}

/** Only where this very file is the program: bundled into another one, it is nobody's command. */
if ((import.meta as { main?: boolean }).main && /\/mod\.[jt]s$/.test(import.meta.url)) {
  void setupCheckCommand((globalThis as unknown as { process: CommandProcess }).process);
}
