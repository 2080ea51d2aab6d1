/**
 * Pictures of the owner's pages for the README, taken from the real pages: a server with a few connections of different
 * ages, in a phone's window, in light and dark.
 *
 * @module
 */

// deno-lint-ignore-file no-import-prefix
import type { Browser, Page, Route } from "npm:playwright-core@1.65.1";
import { Hono } from "hono";
import { type AuthEnv, memoryStore, personalAuth } from "../../mod.ts";
import { assert, PASSWORD, PKCE, travel, VERIFIER } from "./kit.ts";

const BASE = "https://notes.example.com";
const CLAUDE = "https://claude.ai/api/mcp/auth_callback";
const LOCAL = "http://localhost:49152/callback";
const CURSOR = "cursor://anysphere.cursor-mcp/oauth/callback";
const SIZE = { width: 390, height: 844 };
const MINUTE = 60;
const DAY = 24 * 60 * MINUTE;

/** A server, and the same server as somebody sees it who needs no password. */
class Stage {
  readonly app = new Hono<AuthEnv>();
  readonly inside = new Hono<AuthEnv>();
  #cookie = "";

  constructor() {
    const options = {
      baseUrl: BASE,
      store: memoryStore(),
      onEvent: () => {},
      allowedRedirectDomains: ["claude.ai", "localhost", "cursor://anysphere.cursor-mcp"],
      accessTokenTtl: 365 * DAY,
      pages: { title: "My notes" },
      scopes: {
        read: "read your notes",
        write: "change and delete your notes",
        run: { description: "run commands on your computer", onRequest: true },
      },
    };
    this.app.route("/", personalAuth({ ...options, password: PASSWORD }));
    this.inside.route("/", personalAuth({ ...options, authenticateOwner: () => true }));
    this.inside.all("/mcp", (c) => c.json({}));
  }

  async register(client_name: string, redirect_uri: string): Promise<string> {
    const response = await this.app.request(`${BASE}/register`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ client_name, redirect_uris: [redirect_uri] }),
    });
    return (await response.json()).client_id;
  }

  async request(client_name: string, redirect_uri: string, scope = "read write"): Promise<string> {
    const client_id = await this.register(client_name, redirect_uri);
    const request = { response_type: "code", client_id, redirect_uri, scope, ...PKCE };
    return `${BASE}/authorize?${new URLSearchParams(request)}`;
  }

  /** Answers the browser in place of the network. */
  async serve(page: Page, app: Hono<AuthEnv> = this.app): Promise<void> {
    await page.route(`${BASE}/**`, async (route: Route) => {
      const request = route.request();
      const response = await app.request(request.url(), {
        method: request.method(),
        headers: await request.allHeaders(),
        ...(request.method() === "POST" && { body: request.postData() ?? "" }),
      });
      // What is answered in place of the network follows no redirects.
      const location = response.headers.get("Location");
      const body = location ? `<meta http-equiv="refresh" content="0; url=${location}">` : await response.text();
      const headers = new Headers(response.headers);
      if (location) headers.set("Content-Type", "text/html");
      await route.fulfill({
        status: location ? 200 : response.status,
        headers: Object.fromEntries(headers),
        body,
      });
    });
  }

  async #post(path: string, fields: Record<string, string>): Promise<Response> {
    const headers = { "Content-Type": "application/x-www-form-urlencoded", Cookie: this.#cookie };
    return await this.inside.request(BASE + path, { method: "POST", headers, body: new URLSearchParams(fields) });
  }

  /** Connects an app; the token that it is given. */
  async connect(client_name: string, redirect_uri: string, scope?: string): Promise<string> {
    const address = await this.request(client_name, redirect_uri, scope);
    const shown = await this.inside.request(address, { headers: { Cookie: this.#cookie } });
    this.#cookie ||= shown.headers.getSetCookie()[0]!.split(";")[0]!;
    const csrf = (await shown.text()).match(/name="csrf" value="([^"]*)"/)![1]!;
    const request = new URL(address).search.slice(1);
    const answer = await this.#post("/authorize", { request, csrf, decision: "approve" });
    const back = new URL(answer.headers.get("Location") ?? answer.headers.get("Refresh")!.split("url=")[1]!);
    const redeemed = await this.#post("/token", {
      grant_type: "authorization_code",
      client_id: new URL(address).searchParams.get("client_id")!,
      redirect_uri,
      code: back.searchParams.get("code")!,
      code_verifier: VERIFIER,
    });
    return (await redeemed.json()).access_token;
  }

  async token(name: string): Promise<string> {
    const shown = await this.inside.request(`${BASE}/connections`, { headers: { Cookie: this.#cookie } });
    const csrf = (await shown.text()).match(/name="csrf" value="([^"]*)"/)![1]!;
    const made = await this.#post("/connections", { csrf, action: "create_token", name, days: "30", scope: "read" });
    return (await made.text()).match(/pat_\w+/)![0];
  }

  async use(token: string): Promise<void> {
    const headers = { Authorization: `Bearer ${token}` };
    assert((await this.inside.request(`${BASE}/mcp`, { headers })).ok, "a connection does not work");
  }
}

/** Takes the pictures, into a folder. */
export async function takePictures(browser: Browser, folder: string): Promise<void> {
  const stage = new Stage();
  // What happens below ends now: the pages are asked for outside of this check's clock.
  travel(-40 * DAY - 63 * MINUTE - 20);
  const claude = await stage.connect("Claude", CLAUDE, "read write run");
  travel(20 * DAY);
  const code = await stage.connect("Claude Code", LOCAL);
  travel(MINUTE);
  const backup = await stage.token("Backup script on the NAS");
  travel(18 * DAY);
  await stage.use(code);
  travel(2 * DAY);
  await stage.use(backup);
  await stage.connect("Cursor", CURSOR, "read");
  await stage.register("Windsurf", "https://windsurf.com/callback"); // which is refused
  travel(60 * MINUTE);
  await stage.use(claude);
  travel(2 * MINUTE + 20);
  const request = await stage.request("Claude", CLAUDE, "read write run");
  for (const colorScheme of ["light", "dark"] as const) {
    const context = await browser.newContext({ viewport: SIZE, colorScheme, deviceScaleFactor: 1.5, isMobile: true });
    const page = await context.newPage();
    await stage.serve(page);
    await page.goto(request);
    await page.screenshot({ path: `${folder}/consent-${colorScheme}.png` });
    await page.goto(`${BASE}/connections`);
    await page.fill("#password", PASSWORD);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByText("Sign out").first().waitFor();
    await page.screenshot({ path: `${folder}/connections-${colorScheme}.png` });
    await context.close();
  }
}
