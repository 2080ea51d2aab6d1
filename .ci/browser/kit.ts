/**
 * What all checks in the browser share: the clock, the servers, the owner's server under test, and the list of what a
 * page must not do at any size.
 *
 * @module
 */

// These packages are for this check only, so deno.json does not name them.
// deno-lint-ignore-file no-import-prefix

import { AsyncLocalStorage } from "node:async_hooks";
import axe from "npm:axe-core@4.14.1";
import type { Browser, BrowserContext, Page } from "npm:playwright-core@1.65.1";
import { generate } from "npm:selfsigned@5.5.0";
import { Hono } from "hono";
import { pause } from "../lib/limits.ts";
import { type AuthEnv, fileStore, type PersonalAuth, personalAuth, type Store } from "../../mod.ts";

/** A group of checks in one world, made before the first and unmade after the last of them. */
export interface Part<World> {
  name: string;
  open(browser: Browser): Promise<World>;
  close(world: World): Promise<void>;
  /** In this order: a check may go on from where the one before it left the world. */
  checks: Checks<World>;
  /** Before each check: what one that failed may have left behind is cleared away. */
  before?(world: World): Promise<void>;
}

export type Checks<World> = Record<string, (world: World) => Promise<void>>;

export function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

export function assertEquals(actual: unknown, expected: unknown, what: string): void {
  const [a, b] = [JSON.stringify(actual), JSON.stringify(expected)];
  assert(a === b, `${what} is ${a}, not ${b}`);
}

/** Looks again and again until there is something to see. */
export async function until<T>(look: () => T | undefined | false, what: string, seconds = 5): Promise<T> {
  const deadline = performance.now() + seconds * 1000;
  while (true) {
    const found = look();
    if (found) return found;
    assert(performance.now() < deadline, `there was no ${what} within ${seconds} seconds`);
    await pause(20);
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Clock and password
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What belongs to one part, so that several can go on side by side. */
interface Apart {
  /** How far its clock is ahead, in milliseconds. */
  ahead: number;
  /** How often a password was looked at. */
  looks: number;
}

const parts = new AsyncLocalStorage<Apart>();

/** Runs something with a clock of its own. */
export function apart<T>(task: () => T): T {
  return parts.run({ ahead: 0, looks: 0 }, task);
}

const now = Date.now;
Date.now = () => now() + (parts.getStore()?.ahead ?? 0);

/** Moves the server's clock on. The browser keeps its own: cookies carry a Max-Age, which is no point in time. */
export function travel(seconds: number): void {
  parts.getStore()!.ahead += seconds * 1000;
}

/** A password is stretched in six rounds: how many passwords were looked at. */
export const looks = (): number => parts.getStore()!.looks / 6;

const { subtle } = crypto;
const { deriveBits } = subtle;

// A password is stretched each time it is looked at, and nothing else is. Here it is stretched less than in earnest:
// most of the time would go into it, and it is the pages that are looked at.
subtle.deriveBits = ((algorithm: Pbkdf2Params, ...rest: [CryptoKey, number]) => {
  const part = parts.getStore();
  if (part) part.looks++;
  return deriveBits.call(subtle, { ...algorithm, iterations: Math.min(algorithm.iterations, 1000) }, ...rest);
}) as typeof deriveBits;

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Servers
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A listener on loopback. Names below .test lead here too: the browser is told so at its start. */
export interface Listener {
  port: number;
  handler: (request: Request) => Response | Promise<Response>;
  close(): Promise<void>;
}

let certificate: Promise<{ cert: string; private: string }> | undefined;

export async function listen(scheme: "http" | "https"): Promise<Listener> {
  const listener: Listener = {
    port: 0,
    handler: () => new Response(null, { status: 404 }),
    async close() {
      stop.abort(); // at once: a browser keeps its connections open
      await server.finished;
    },
  };
  const stop = new AbortController();
  // Nobody checks this certificate; it is there so that the browser treats the pages as it would those of a real host.
  certificate ??= generate([{ name: "commonName", value: "test" }]);
  const tls = scheme === "https" ? await certificate.then(({ cert, private: key }) => ({ cert, key })) : {};
  const part = parts.getStore()!;
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, signal: stop.signal, onListen: () => {}, ...tls },
    (request) => parts.run(part, () => listener.handler(request)),
  );
  listener.port = server.addr.port;
  return listener;
}

/** What an app's callback was sent. */
export interface Callback {
  url: URL;
  headers: Headers;
}

/** The apps that ask to be connected: one on this computer, one on the web that goes on to a scheme of its own. */
export class Apps {
  readonly callbacks: Callback[] = [];
  /** Answers are under way for so long. */
  gate: Promise<void> | undefined;
  readonly #local: Listener;
  readonly #web: Listener;

  private constructor(local: Listener, web: Listener) {
    this.#local = local;
    this.#web = web;
    for (const listener of [local, web]) listener.handler = (request) => this.#answer(request);
  }

  static async open(): Promise<Apps> {
    return new Apps(await listen("http"), await listen("https"));
  }

  async close(): Promise<void> {
    await Promise.all([this.#local.close(), this.#web.close()]);
  }

  get local(): string {
    return `http://localhost:${this.#local.port}/callback`;
  }
  get web(): string {
    return `https://app.test:${this.#web.port}/callback`;
  }
  /** Answers with a redirect to a scheme that only an app on the device understands. */
  get onward(): string {
    return `https://app.test:${this.#web.port}/onward`;
  }
  /** The longest name that a host can have. */
  get longest(): string {
    const labels = [63, 63, 63, 50].map((length) => "w".repeat(length));
    return `https://${labels.join(".")}.test:${this.#web.port}/callback`;
  }

  async #answer(request: Request): Promise<Response> {
    const url = new URL(request.url);
    if (!/^\/(callback|onward)$/.test(url.pathname)) return new Response(null, { status: 204 }); // an icon, for example
    this.callbacks.push({ url, headers: new Headers(request.headers) });
    await this.gate;
    if (url.pathname === "/onward") {
      return new Response(null, { status: 307, headers: { Location: `claude://claude.ai/connected${url.search}` } });
    }
    return new Response("<!doctype html><html lang=en><title>Connected</title><h1>Connected</h1>", {
      headers: { "Content-Type": "text/html" },
    });
  }

  /** The one callback that came since the last look. */
  async arrived(): Promise<Callback> {
    const callback = await until(() => this.callbacks[0], "callback");
    assertEquals(this.callbacks.splice(0).length, 1, "the number of callbacks");
    return callback;
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The server under test
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const PASSWORD = "correct horse battery staple";
export const STATE = "s t&te";
export const VERIFIER = "a-verifier.with_every~kind-of-character.0123456789";
const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(VERIFIER));
const CHALLENGE = btoa(String.fromCharCode(...new Uint8Array(digest))).replaceAll("+", "-").replaceAll("/", "_")
  .replaceAll("=", "");

/** All state is kept below this folder, which is removed at the end. */
export const ROOT = await Deno.makeTempDir({ prefix: "browser-" });

/** A whole server with its state in a folder of its own. */
export class Site {
  readonly base: string;
  readonly app = new Hono<AuthEnv>();
  readonly auth: PersonalAuth;
  readonly apps: Apps;
  readonly dir: string;
  /** A page of the owner's own, at /ahead. */
  ownPage = "";
  /** What the store does while this is set: fail. */
  storeFails = false;
  /** Answers are under way for so long, as they are to a phone on a train. */
  gate: Promise<void> | undefined;
  /** All requests that have been answered, as "GET /path". */
  readonly answered: string[] = [];
  readonly #listener: Listener;
  readonly #store: Store;
  /** The same server with its doors open: it lets every app register, and everybody is its owner. */
  readonly #open: PersonalAuth;

  private constructor(scheme: "http" | "https", listener: Listener, apps: Apps, dir: string) {
    this.base = scheme === "https" ? `https://vault.test:${listener.port}` : `http://localhost:${listener.port}`;
    this.apps = apps;
    this.dir = dir;
    this.#listener = listener;
    this.#store = fileStore(dir);
    const options = {
      baseUrl: this.base,
      store: this.#fallible(),
      onEvent: () => {},
      scopes: { notes: "read your notes", "notes:write": "change your notes" },
    };
    const [web, longest] = [apps.web, apps.longest].map((url) => new URL(url).host);
    this.auth = personalAuth({
      ...options,
      password: PASSWORD,
      allowedRedirectDomains: ["localhost", "claude://claude.ai", web!, longest!],
    });
    this.#open = personalAuth({ ...options, authenticateOwner: () => true, allowedRedirectDomains: null });
    this.app.route("/", this.auth);
    this.app.get("/ahead", (c) => c.html(this.ownPage));
    this.app.post("/mcp", (c) => c.json({ connection: c.var.auth.extra }));
    listener.handler = async (request) => {
      const response = await this.app.fetch(request);
      this.answered.push(`${request.method} ${new URL(request.url).pathname}`);
      await this.gate;
      return response;
    };
  }

  static async open(scheme: "http" | "https", apps: Apps): Promise<Site> {
    const site = new Site(scheme, await listen(scheme), apps, await Deno.makeTempDir({ dir: ROOT }));
    await site.app.request(`${site.base}/connections`); // the password is in place when this is answered
    return site;
  }

  async close(): Promise<void> {
    await this.#listener.close();
    await this.#store.close?.();
  }

  #fallible(): Store {
    const store = this.#store;
    const check = () => assert(!this.storeFails, "the disk is on fire");
    return {
      get: async (key) => (check(), await store.get(key)),
      update: async (key, change, options) => (check(), await store.update(key, change, options)),
      list: (prefix) => (check(), store.list(prefix)),
    };
  }

  async register(client_name: string, redirect_uri: string, more: Record<string, unknown> = {}): Promise<string> {
    const response = await this.#open.request(`${this.base}/register`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ client_name, redirect_uris: [redirect_uri], ...more }),
    });
    assertEquals(response.status, 201, "the answer to a registration");
    return (await response.json()).client_id;
  }

  /** The address that an app sends the owner to. */
  async request(client_name: string, redirect_uri: string, more: Record<string, string> = {}): Promise<string> {
    const client_id = await this.register(client_name, redirect_uri);
    const request = { response_type: "code", client_id, redirect_uri, state: STATE, ...PKCE, ...more };
    return `${this.base}/authorize?${new URLSearchParams(request)}`;
  }

  /** What the app does with a callback; an access token if it was an approval. */
  async redeem(request: string, { url, headers }: Callback, state = STATE): Promise<string> {
    const { searchParams } = url;
    assertEquals(searchParams.get("state"), state, "state");
    assertEquals(searchParams.get("iss"), this.base, "iss");
    assertEquals(headers.get("Referer"), null, "the Referer that the app is told");
    // On loopback it is: cookies know no ports.
    if (this.base.startsWith("https:")) assertEquals(headers.get("Cookie"), null, "the cookie that the app is sent");
    const asked = new URL(request).searchParams;
    const response = await this.app.request(`${this.base}/token`, {
      method: "POST",
      headers: { "Content-Type": "application/x-www-form-urlencoded" },
      body: new URLSearchParams({
        grant_type: "authorization_code",
        client_id: asked.get("client_id")!,
        redirect_uri: asked.get("redirect_uri")!,
        code: searchParams.get("code") ?? "",
        code_verifier: VERIFIER,
      }),
    });
    const answer = await response.json();
    assertEquals(response.status, 200, `the answer to the code (${JSON.stringify(answer)})`);
    return answer.access_token;
  }

  /** The status that a call of the MCP server is answered with. */
  async call(token: string): Promise<number> {
    const headers = { Authorization: `Bearer ${token}` };
    return (await this.app.request(`${this.base}/mcp`, { method: "POST", headers })).status;
  }

  /** Connects an app, without a browser. */
  async connect(client_name: string, redirect_uri: string): Promise<string> {
    const request = await this.request(client_name, redirect_uri);
    const visitor = new Visitor(this, this.#open);
    const form = await visitor.form(request);
    const answer = await visitor.post("/authorize", { ...form, decision: "approve" });
    return await this.redeem(request, { url: new URL(answer.headers.get("Location")!), headers: new Headers() });
  }

  /** Everything that is kept, byte for byte. */
  async state(): Promise<Record<string, string>> {
    const files: Record<string, string> = {};
    for (const { name } of [...Deno.readDirSync(this.dir)].sort((a, b) => a.name < b.name ? -1 : 1)) {
      const bytes = await Deno.readFile(`${this.dir}/${name}`);
      const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
      files[name] = `${bytes.length} bytes, ${[...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    }
    return files;
  }
}

export const PKCE = { code_challenge: CHALLENGE, code_challenge_method: "S256" };

/** Somebody without a browser: requests and one cookie. */
export class Visitor {
  cookie = "";
  readonly #site: Site;
  readonly #app: Hono<AuthEnv>;
  constructor(site: Site, app = site.app) {
    this.#site = site;
    this.#app = app;
  }

  async send(address: string, init: { method?: string; headers?: HeadersInit; body?: BodyInit } = {}) {
    const headers = new Headers(init.headers);
    if (this.cookie) headers.set("Cookie", this.cookie);
    const response = await this.#app.request(new URL(address, this.#site.base).href, { ...init, headers });
    const [cookie] = response.headers.getSetCookie();
    if (cookie) this.cookie = cookie.split(";")[0]!;
    return response;
  }

  /** The hidden fields of the form on a page. */
  async form(address: string): Promise<Record<string, string>> {
    const text = await (await this.send(address)).text();
    const fields = [...text.matchAll(/<input type="hidden" name="([^"]*)" value="([^"]*)"/g)];
    return Object.fromEntries(fields.map(([, name, value]) => [name, value!.replaceAll("&amp;", "&")]));
  }

  async post(path: string, fields: Record<string, string>, headers?: HeadersInit): Promise<Response> {
    return await this.send(path, { method: "POST", headers: headers ?? [], body: new URLSearchParams(fields) });
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Pages
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const SCREENSHOTS = new URL("../screenshots/", import.meta.url).pathname;

export const SIZES = { desktop: { width: 1280, height: 800 }, phone: { width: 320, height: 640 } };

/** How the owner looks at the pages. */
export interface Look {
  size: keyof typeof SIZES;
  scheme: "light" | "dark";
  javaScript: boolean;
}

/** What no page may do, whatever it is for; each with the places where one did. */
export interface Faults {
  width: string[];
  height: string[];
  question: string[];
  axe: string[];
  noise: string[];
}

/** One browser of the owner's, or somebody else's, with one open tab. */
export class View {
  readonly context: BrowserContext;
  readonly page: Page;
  readonly look: Look;
  readonly faults: Faults = { width: [], height: [], question: [], axe: [], noise: [] };

  private constructor(context: BrowserContext, page: Page, look: Look) {
    this.context = context;
    this.page = page;
    this.look = look;
  }

  static async open(browser: Browser, look: Look = { size: "desktop", scheme: "light", javaScript: true }) {
    const phone = look.size === "phone";
    const context = await browser.newContext({
      viewport: SIZES[look.size],
      colorScheme: look.scheme,
      javaScriptEnabled: look.javaScript,
      ignoreHTTPSErrors: true,
      ...(phone && { isMobile: true, hasTouch: true, deviceScaleFactor: 2 }),
    });
    context.setDefaultTimeout(10_000);
    await context.addInitScript(`addEventListener("securitypolicyviolation", (event) =>
      console.error("CSP: " + event.effectiveDirective + " " + event.blockedURI))`);
    const view = new View(context, await context.newPage(), look);
    view.#listen();
    return view;
  }

  async close(): Promise<void> {
    await this.context.close();
  }

  #listen(): void {
    const note = (text: string) => this.faults.noise.push(`${text} at ${new URL(this.page.url()).pathname}`);
    this.context.on("console", (message) => {
      // That a page was answered with 403 is what it is meant to be.
      const status = message.text().startsWith("Failed to load resource") && message.location().url === this.page.url();
      if (/error|warning/.test(message.type()) && !status) note(message.text());
    });
    this.context.on("weberror", (error) => note(String(error.error())));
    this.page.on("dialog", (dialog) => {
      note(`a dialog: ${dialog.message()}`);
      dialog.dismiss().catch(() => {});
    });
  }

  /** What the tab shows now. */
  async title(): Promise<string> {
    return await this.page.locator("h1").innerText();
  }

  async text(): Promise<string> {
    return await this.page.locator("body").innerText();
  }

  async says(...texts: (string | RegExp)[]): Promise<void> {
    const all = await this.text();
    for (const text of texts) {
      const found = typeof text === "string" ? all.includes(text) : text.test(all);
      assert(found, `the page does not say ${text}: ${all.replace(/\s+/g, " ").slice(0, 300)}`);
    }
  }

  async open(address: string, status = 200): Promise<void> {
    const response = await this.page.goto(address);
    assertEquals(response?.status(), status, "the status");
  }

  /** Does what leads to another page, and waits for that. */
  async leads(act: () => Promise<void>, status?: number): Promise<void> {
    // The first answer is that to the form; a redirect may lead on from there.
    const [response] = await Promise.all([
      this.page.waitForResponse((response) => response.request().isNavigationRequest()),
      this.page.waitForEvent("load"),
      act(),
    ]);
    if (status !== undefined) assertEquals(response.status(), status, "the status");
  }

  async press(name: string | RegExp, status?: number): Promise<void> {
    const button = this.page.getByRole("button", { name, exact: typeof name === "string" }).first();
    await this.leads(() => button.click(), status);
  }

  async approve(password?: string): Promise<void> {
    if (password !== undefined) await this.page.fill("#password", password);
    await this.press("Approve");
  }

  /** Opens a part of the page by its line. */
  async expand(line: string): Promise<void> {
    await this.page.locator("summary", { hasText: line }).first().click();
  }

  /** Opens whatever can be opened on the page. */
  async unfold(): Promise<void> {
    await this.page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)");
  }

  /** Waits until this has the focus: a page gives it a moment after it has loaded. */
  async focuses(what: string): Promise<void> {
    const deadline = performance.now() + 2000;
    while (await this.focused() !== what && performance.now() < deadline) await this.page.waitForTimeout(20);
    assertEquals(await this.focused(), what, "what has the focus");
  }

  async focused(): Promise<string> {
    return await this.page.evaluate<string>(FOCUSED);
  }

  /**
   * Holds a page against what every page has to be, and takes its picture. Without JavaScript the page is the same, so
   * axe and the camera are spared.
   */
  async inspect(name: string): Promise<void> {
    const { page, faults, look } = this;
    const { size, scheme } = look;
    const { wide, low, scrolled } = await page.evaluate<{ wide: string[]; low: string[]; scrolled: number }>(MEASURE);
    faults.width.push(...wide.map((what) => `${name}: ${what}`));
    faults.height.push(...low.map((what) => `${name}: ${what}`));
    if (scrolled > 0) faults.question.push(`${name} opens ${scrolled} px down`);
    if (!look.javaScript) return;
    const picture = `${SCREENSHOTS}${name}-${size}-${scheme}`;
    if (await page.evaluate<boolean>("document.documentElement.scrollHeight > innerHeight") && size === "phone") {
      await page.screenshot({ path: `${picture}-first.png` });
    }
    await page.screenshot({ path: `${picture}.png`, fullPage: true });
    if (size !== "phone") return; // to axe, one size is like the other
    await page.evaluate(axe.source);
    // No preload: it would fetch the style sheet again, which the page's own policy forbids.
    const violations = await page.evaluate<AxeViolation[]>("axe.run({ preload: false }).then((it) => it.violations)");
    for (const { id, nodes } of violations) faults.axe.push(`${name}: ${id} at ${nodes.map((node) => node.html)}`);
  }
}

interface AxeViolation {
  id: string;
  nodes: { html: string }[];
}

/** Run in the page. What is wider than the window, what is lower than a finger is wide, how far down it opened. */
const MEASURE = `(() => {
  const shown = (element) => element.checkVisibility() && element.getBoundingClientRect();
  const describe = (element) => element.outerHTML.slice(0, 80);
  const wide = [...document.querySelectorAll("*")].filter((element) => {
    const box = shown(element);
    return box && (box.right > innerWidth + 0.5 || box.left < -0.5);
  }).map(describe);
  if (document.documentElement.scrollWidth > innerWidth) wide.push("scrollWidth " + document.documentElement.scrollWidth);
  const targets = "button, .button, select, summary, input:not([type=hidden], [type=checkbox]), label:has([type=checkbox])";
  const low = [...document.querySelectorAll(targets)].filter((element) => {
    const box = shown(element);
    return box && box.height < 44;
  }).map((element) => describe(element) + " is " + element.getBoundingClientRect().height + " px high");
  // Something that went wrong is what to see first, then the beginning.
  const alert = document.querySelector("[role=alert]")?.getBoundingClientRect();
  const seen = alert && alert.top >= 0 && alert.bottom <= innerHeight;
  return { wide, low, scrolled: seen ? 0 : Math.round(scrollY) };
})()`;

/** What has the focus, and whether that can be seen. */
const FOCUSED = `(() => {
  const element = document.activeElement;
  const { outlineStyle, outlineWidth } = getComputedStyle(element);
  const name = element.getAttribute("aria-label") ??
    (element.labels?.[0] ?? element.querySelector(".name") ?? element).innerText;
  const visible = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2 && element.matches(":focus-visible");
  return element.localName + " " + name.trim().slice(0, 40) + (visible ? "" : " (its focus cannot be seen)");
})()`;
