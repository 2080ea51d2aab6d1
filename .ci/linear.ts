/**
 * Whether one request can take more time than its length: every parameter, header and member of a document that a
 * stranger can send, at every endpoint, filled with a long run of every class of characters. The time of a run must not
 * grow faster than its length. One server in this process answers all of them.
 *
 *     npx -y deno run -A .ci/linear.ts [--mod FILE]
 *
 * A run of 8n characters takes a linear reader 8 times as long as one of n, and a quadratic one 64 times. A run is
 * reported if it takes more than 24 times as long, as the best of several tries, three times over.
 *
 * @module
 */

import { pathToFileURL } from "node:url";
import { check, demand, finish, textArgument } from "./lib/checks.ts";
import { pause } from "./lib/limits.ts";
import { BASE, Client, REDIRECT, VERIFIER } from "./lib/client.ts";

const file = textArgument("mod");
const mod: typeof import("../mod.ts") = await import(file ? pathToFileURL(file).href : "../mod.ts");

/** A body may have 64 KiB; what is longer is not read. Queries, documents and credentials may have 16 KiB. */
const LONG = [60_000];
const SHORT = [15_000, 60_000];
const STEP = 8;
const MAX_RATIO = 24;
/** Milliseconds. A quadratic reader of 15,000 characters takes about a hundred, a linear one hardly any. */
const NOTICEABLE = 25;
const TRIES = 5;
const CONFIRMATIONS = 3;

/** One of each class that a pattern or a parser may tell from others; two make an alternation. */
const RUNS = [
  ..."aZ0 \t/\\.-_~+=%&;,:@#?!\"'<>()[]{}|*$^`",
  ..."\n\r\0\x01\x7f",
  ..."é\u0301\u200d\u202e\u3000\u2800漢😀",
  ...[
    "\r\n",
    "a/",
    "/.",
    "../",
    "a=",
    "a&",
    "&&",
    "%2",
    "%41",
    "%E2",
    "a ",
    " /",
    '\\"',
    "<!",
    "<a ",
    "&amp;",
    "[]",
    '{"',
    "e\u0301",
  ],
];

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The server
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const SECRET = "a secret of some length";
const OWNED = { client_id: "typed-in", client_secret: SECRET, redirect_uris: [REDIRECT] };

/** What the next metadata document is, as text, and its headers. */
let published: { text: string; headers: Record<string, string> } = { text: "{}", headers: {} };

function server(options: Partial<Parameters<typeof mod.personalAuth>[0]>): Client {
  const auth = mod.personalAuth({
    baseUrl: BASE,
    store: mod.memoryStore(),
    onEvent: () => {},
    clients: [OWNED],
    scopes: ["mcp", "more"],
    allowedRedirectDomains: null,
    fetchClientMetadata: () => Promise.resolve(new Response(published.text, { headers: published.headers })),
    ...options,
  });
  return new Client((path, init) => auth.request(BASE + path, init));
}

const client = server({ authenticateOwner: () => true });
const locked = server({ password: "correct horse battery staple" });
const client_id = await client.id();
const { access_token, refresh_token } = await client.connect();

const APPROVAL = {
  response_type: "code",
  client_id,
  redirect_uri: REDIRECT,
  code_challenge: "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",
  code_challenge_method: "S256",
};

/** The hidden fields of a page, and the cookie they belong to. */
async function formOf(path: string): Promise<{ fields: Record<string, string>; Cookie: string }> {
  const { body, headers } = await client.send(path);
  const hidden = body.matchAll(/name="(request|csrf)" value="([^"]*)"/g);
  const fields = Object.fromEntries([...hidden].map(([, name, value]) => [name, value.replaceAll("&amp;", "&")]));
  return { fields, Cookie: headers.getSetCookie()[0]?.split(";")[0] ?? "" };
}

const consent = await formOf(`/authorize?${new URLSearchParams(APPROVAL)}`);
const connections = await formOf("/connections");
demand(consent.fields.csrf && consent.fields.request && connections.fields.csrf, "the owner's forms were not found");

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// What a stranger can fill
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Sends one request with this value in its place. */
type Place = (value: string) => Promise<unknown>;
const places: { name: string; send: Place; before: string[]; lengths: number[] }[] = [];

/** `before`: what stands in front of a run so that it is read further than its first characters. */
function place(name: string, send: Place, before: string[] = [], lengths = LONG): void {
  places.push({ name, send, before: ["", ...before], lengths });
}

/** A body or query that holds the run as it is: encoded three times as long, it would not fit. */
const raw = (value: string) => value.replace(/[^\x21\x24\x27-\x2a\x2c-\x3a\x3c-\x7e]/gu, encodeURIComponent);

const query = (fields: Record<string, string>, name: string, value: string) =>
  `${new URLSearchParams(Object.entries(fields).filter(([other]) => other !== name))}&${name}=${raw(value)}`;

const FORM = { "Content-Type": "application/x-www-form-urlencoded" };

const URLS = ["https://h", "https://h/", "http://localhost:", "http://[::1]", "x:", "https://h/?"];
const BEFORE: Record<string, string[]> = {
  client_id: [client_id, "https://h/", "https://h", "a."],
  redirect_uri: [REDIRECT, ...URLS],
  resource: [`${BASE}/mcp`, ...URLS],
  scope: ["mcp "],
  code: ["pac_"],
  refresh_token: [refresh_token, "prt_"],
  token: [refresh_token, access_token, "prt_", "pat_"],
  code_verifier: [VERIFIER],
  request: [`${new URLSearchParams(APPROVAL)}`, "resource=https://h", "redirect_uri="],
};

function parameters(
  what: string,
  names: string[],
  fields: Record<string, string>,
  headers: Record<string, string> = {},
  on = client,
): void {
  const [method = "", path = ""] = what.split(" ");
  const lengths = path === "/authorize" ? SHORT : LONG;
  const send = (text: string) =>
    method === "GET"
      ? on.send(`${path}?${text}`)
      : on.send(path, { method, headers: { ...FORM, ...headers }, body: text });
  for (const name of [...names, "unknown"]) {
    place(`${what} ${name}`, (value) => send(query(fields, name, value)), BEFORE[name], lengths);
  }
  place(`${what} as a whole`, send, [], lengths);
}

const AUTHORIZE = [
  ...["response_type", "response_mode", "client_id", "redirect_uri", "scope", "state", "resource", "prompt", "nonce"],
  ...["code_challenge", "code_challenge_method", "request", "request_uri"],
];
const CLIENT = ["client_id", "client_secret", "client_assertion", "client_assertion_type"];
const exchange = {
  grant_type: "authorization_code",
  client_id,
  code: `pac_${"0".repeat(96)}`,
  code_verifier: VERIFIER,
};
const renewal = { grant_type: "refresh_token", client_id, refresh_token };

parameters("GET /authorize", AUTHORIZE, APPROVAL);
parameters("POST /authorize", ["request", "csrf", "decision", "password"], { ...consent.fields, decision: "deny" }, {
  Cookie: consent.Cookie,
});
const CHANGES = ["action", "csrf", "password", "id", "name", "days", "scope"];
for (const action of ["revoke", "create_token"]) {
  const fields = { ...connections.fields, action, id: "0", name: "n", days: "1", scope: "mcp" };
  parameters("POST /connections", CHANGES, fields, { Cookie: connections.Cookie });
}
parameters("POST /connections", ["csrf", "password"], {}, {}, locked);
parameters("POST /token", [...CLIENT, "grant_type", "code", "code_verifier", "redirect_uri", "resource"], exchange);
parameters("POST /token", [...CLIENT, "refresh_token", "scope", "resource"], renewal);
parameters("POST /revoke", [...CLIENT, "token", "token_type_hint"], { client_id, token: "x" });
const asker = { client_id: OWNED.client_id, client_secret: SECRET };
parameters("POST /introspect", [...CLIENT, "token", "token_type_hint"], { ...asker, token: "x" });

const METADATA: Record<string, unknown> = { client_name: "n", redirect_uris: [REDIRECT] };
const STRINGS = [
  ...["client_name", "scope", "token_endpoint_auth_method", "client_uri", "logo_uri", "tos_uri", "policy_uri"],
  ...["software_id", "software_version", "application_type", "jwks_uri", "unknown"],
];
const LISTS = ["redirect_uris", "grant_types", "response_types", "contacts"];

/** Every member of a client's metadata: as a string, alone in a list, and as many short ones in a list. */
function members(
  what: string,
  send: (text: string) => Promise<unknown>,
  base: Record<string, unknown>,
  lengths = LONG,
): void {
  const own = (name: string, member: unknown) => send(JSON.stringify({ ...base, [name]: member }));
  for (const name of STRINGS) {
    place(
      `${what} ${name}`,
      (value) => own(name, value),
      ["https://h", "http://localhost:"],
      lengths,
    );
  }
  for (const name of LISTS) {
    place(`${what} ${name}`, (value) => own(name, [value]), [REDIRECT, ...URLS], lengths);
    place(`${what} ${name}, many`, (value) => own(name, [...value.slice(0, value.length / 4)]), [], lengths);
  }
  place(`${what} as a whole`, send, ['{"a":', '{"redirect_uris":["'], lengths);
}

const JSON_TYPE = { "Content-Type": "application/json" };
members("POST /register", (body) => client.send("/register", { method: "POST", headers: JSON_TYPE, body }), METADATA);

/** Every visit is to a host of its own: a document is cached, and no host is asked too often. */
let visits = 0;
function visit(text: string, headers: Record<string, string> = JSON_TYPE, id = newDocument()): Promise<unknown> {
  published = { text: text.replaceAll("CLIENT_ID", id), headers };
  return client.send(`/authorize?${new URLSearchParams({ ...APPROVAL, client_id: id })}`);
}
const newDocument = () => `https://host-${++visits}.example/client`;

members("document", visit, { ...METADATA, client_id: "CLIENT_ID" }, SHORT);
for (const name of ["Cache-Control", "Content-Type", "Age", "Expires", "ETag"]) {
  const document = JSON.stringify({ ...METADATA, client_id: "CLIENT_ID" });
  place(`document ${name}`, (value) => visit(document, { ...JSON_TYPE, [name]: `x${value}x` }), ["max-age=1"]);
}

const REQUESTS: [what: string, body: string | undefined][] = [
  ["GET /authorize", undefined],
  ["POST /authorize", `${new URLSearchParams(consent.fields)}`],
  ["GET /connections", undefined],
  ["POST /connections", `${new URLSearchParams(connections.fields)}`],
  ["POST /token", `${new URLSearchParams(renewal)}`],
  ["POST /revoke", `${new URLSearchParams({ client_id, token: "x" })}`],
  ["POST /introspect", "token=x"],
  ["POST /register", JSON.stringify(METADATA)],
  ["POST /mcp", "{}"],
  ["OPTIONS /mcp", undefined],
  ["GET /.well-known/oauth-protected-resource/mcp", undefined],
];
const HEADERS: Record<string, string[]> = {
  ...Object.fromEntries(["Accept", "Content-Length", "Host", "Transfer-Encoding", "User-Agent"].map((it) => [it, []])),
  "Authorization": ["Bearer ", "Bearer", `Bearer ${access_token}`, "Basic ", "Basic", "Basic dHlwZWQtaW4"],
  "Content-Type": ["application/json", "application/x-www-form-urlencoded;"],
  "Cookie": ["a=", consent.Cookie, `${consent.Cookie}; `],
  "Origin": ["https://h", BASE],
  "Referer": ["https://h"],
  "Sec-Fetch-Site": ["same-origin"],
  "Forwarded": ["for="],
  "X-Forwarded-Proto": ["https,"],
  "Access-Control-Request-Headers": ["a,"],
};
for (const [what, body] of REQUESTS) {
  const [method = "", path = ""] = what.split(" ");
  const type: Record<string, string> = path === "/register" ? JSON_TYPE : FORM;
  for (const [name, before] of Object.entries(HEADERS)) {
    const send = (value: string) =>
      client.send(path, { method, headers: { ...type, [name]: `${value}x` }, ...(body !== undefined && { body }) });
    place(`${what}, header ${name}`, send, before, name === "Authorization" ? SHORT : LONG);
  }
  place(`${what}, below its path`, (value) => client.send(`${path}${raw(value)}x`, { method }), ["/"]);
}
const basic = (value: string) => ({ Authorization: `Basic ${btoa(raw(value))}` });
place("POST /token, Basic", (value) => client.form("/token", {}, basic(value)), ["a:", "%41:"], [10_000]);

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Time
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Milliseconds, the best of several tries; fewer of what takes seconds. */
async function best(send: () => Promise<unknown>, tries: number): Promise<number> {
  let least = Infinity;
  for (let i = 0, spent = 0; i < tries && spent < 4000; i++) {
    const started = performance.now();
    await send();
    const taken = performance.now() - started;
    least = Math.min(least, taken);
    spent += taken;
  }
  return least;
}

const figures = { requests: 0 };

/** Says what is wrong with the time of a run in one place, if anything is. */
async function slowness(send: Place, before: string, run: string, characters: number): Promise<string | undefined> {
  const length = Math.floor(characters / raw(run).length);
  const request = (times: number) => async () => {
    figures.requests++;
    await send(`${before}${run.repeat(times)}x`); // the last one ends a pattern that all others have satisfied
  };
  try {
    // Most are fast at once, and need no second try.
    if (await best(request(length), 1) < NOTICEABLE) return undefined;
  } catch (error) {
    if (error instanceof TypeError) return undefined; // no runtime sends this character in a header
    throw error;
  }
  let long = 0;
  let short = 0;
  for (let i = 0; i < CONFIRMATIONS; i++) {
    if (i > 0) await pause(300);
    long = await best(request(length), TRIES);
    if (long < NOTICEABLE) return undefined;
    short = await best(request(Math.ceil(length / STEP)), TRIES);
    if (long / short <= MAX_RATIO) return undefined;
  }
  const shown = JSON.stringify(before + run);
  return `${shown}: ${short.toFixed(1)} ms, and ${long.toFixed(0)} ms for a run ${STEP} times as long`;
}

/** How many faults are enough to fail an endpoint: each of them takes seconds to confirm. */
const ENOUGH = 3;

const endpoint = (name: string) =>
  name.startsWith("document") ? "a metadata document" : name.replace(",", "").split(" ").slice(0, 2).join(" ");

for (const [what, own] of Map.groupBy(places, ({ name }) => endpoint(name))) {
  await check(`${what} takes no more time than its input is long`, 900, async () => {
    const slow: string[] = [];
    for (const { name, send, before, lengths } of own) {
      for (const start of before) {
        for (const run of RUNS) {
          for (const length of lengths) {
            if (slow.length === ENOUGH) break;
            const fault = await slowness(send, start, run, length);
            if (fault) slow.push(`${name}: ${fault}`);
          }
        }
      }
    }
    demand(slow.length === 0, slow.join("\n"));
    return `${own.length} places`;
  });
}
console.log(`${figures.requests} requests`);
await finish();
