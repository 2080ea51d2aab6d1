/**
 * What strangers try: pages of another origin, script in whatever an app can say of itself, guessing, and floods. Also
 * the way back to the app, which a policy that is too strict would close.
 *
 * @module
 */

// deno-lint-ignore-file no-import-prefix
import type { Browser, Page } from "npm:playwright-core@1.65.1";
import {
  Apps,
  assert,
  assertEquals,
  type Checks,
  listen,
  type Listener,
  looks,
  type Part,
  PASSWORD,
  Site,
  travel,
  until,
  View,
  Visitor,
} from "./kit.ts";
import { NotRun } from "../lib/limits.ts";

interface World {
  browser: Browser;
  apps: Apps;
  site: Site;
  /** The owner's browser, signed in. */
  owner: View;
  /** A request of an app on the web. */
  request: string;
  /** Serves whatever page is being tried. */
  stage: Listener;
}

async function open(browser: Browser): Promise<World> {
  const apps = await Apps.open();
  const site = await Site.open("http", apps);
  const owner = await View.open(browser);
  await signIn(owner, site);
  return { browser, apps, site, owner, request: await site.request("Claude", apps.web), stage: await listen("http") };
}

async function before({ apps, owner, site }: World): Promise<void> {
  apps.callbacks.length = 0;
  for (const page of owner.context.pages()) if (page !== owner.page) await page.close();
  await signIn(owner, site);
  owner.faults.noise.length = 0;
}

async function close({ apps, site, owner, stage }: World): Promise<void> {
  await owner.close();
  await Promise.all([stage.close(), site.close()]);
  await apps.close();
}

async function signIn(view: View, site: Site): Promise<void> {
  await view.open(`${site.base}/connections`);
  if (await view.title() === "Connections") return;
  await view.page.fill("#password", PASSWORD);
  await view.press("Sign in", 303);
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The way back to the app
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Approves where the way leads out of the browser: the requests of the tab, and what a policy stopped. */
async function leave(owner: View, address: string): Promise<{ requests: string[]; stopped: string[] }> {
  const page = await owner.context.newPage(); // a tab of its own, for it hangs between two pages at the end
  const requests: string[] = [];
  const stopped: string[] = [];
  page.on("request", (request) => requests.push(request.url()));
  page.on("console", (message) => /Content Security Policy/.test(message.text()) && stopped.push(message.text()));
  await page.goto(address);
  await page.getByRole("button", { name: "Approve" }).click({ noWaitAfter: true });
  await until(() => stopped.length > 0 || requests.some((url) => url.startsWith("claude:")), "way out of the browser");
  await page.close();
  return { requests, stopped };
}

const wayBack: Checks<World> = {
  "Chromium follows an approval to a loopback callback": async ({ owner, site, apps }) => {
    const request = await site.request("Claude Code", apps.local);
    await owner.open(request);
    await owner.approve();
    assertEquals(await owner.title(), "Connected", "the page");
    await site.redeem(request, await apps.arrived());
  },

  "Chromium follows an approval to an https callback, and on to an app's own scheme": async ({ owner, site, apps }) => {
    const request = await site.request("Claude", apps.onward);
    const { requests, stopped } = await leave(owner, request);
    assertEquals(stopped, [], "what the policy stopped");
    const callback = await apps.arrived();
    assertEquals(requests.at(-1), `claude://claude.ai/connected${callback.url.search}`, "the last request");
    await site.redeem(request, callback);
  },

  "Chromium follows an approval straight to an app's own scheme": async ({ owner, site }) => {
    const request = await site.request("Claude", "claude://claude.ai/callback");
    const { requests, stopped } = await leave(owner, request);
    assertEquals(stopped, [], "what the policy stopped");
    assert(requests.at(-1)!.startsWith("claude://claude.ai/callback?code="), `the last request is ${requests.at(-1)}`);
  },

  "the same way with form-action 'self' is stopped: the two checks above would notice": async (world) => {
    const { owner, stage, apps } = world;
    stage.handler = ({ method }) =>
      method === "POST"
        ? new Response(null, { status: 302, headers: { Location: `${apps.onward}?code=x` } })
        : new Response(`<!doctype html><form method="post"><button>Approve</button></form>`, {
          headers: { "Content-Type": "text/html", "Content-Security-Policy": "form-action 'self'" },
        });
    const { stopped } = await leave(owner, `http://localhost:${stage.port}/`);
    assert(stopped.length > 0, "it was not stopped");
    assertEquals(apps.callbacks.splice(0).length, 0, "the number of callbacks");
  },
};

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Pages of another origin
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * Another port of the same host is another origin but the same site: SameSite cookies come along, and what protects is
 * the form's token and the same-origin policy alone. Another host is another site.
 */
const HOSTS = { "same site": "localhost", "other site": "127.0.0.1" };

/** Shows a page of the hostile origin in the owner's browser, in a tab of its own. */
async function stagePage({ owner, stage }: World, host: string, body: string): Promise<Page> {
  stage.handler = () =>
    new Response(`<!doctype html><title>Harmless</title><h1>Harmless</h1>${body}`, {
      headers: { "Content-Type": "text/html" },
    });
  const page = await owner.context.newPage();
  await page.goto(`http://${host}:${stage.port}/`);
  return page;
}

/** That nothing has changed: what is connected, and that the owner is still signed in. */
async function unchanged({ owner, site }: World, act: () => Promise<void>): Promise<void> {
  const look = async () => JSON.stringify(await site.auth.connections());
  const before = await look();
  await act();
  assertEquals(await look(), before, "what is connected");
  await owner.open(`${site.base}/connections`);
  assertEquals(await owner.title(), "Connections", "the owner's page, of which the owner was signed in,");
}

const escape = (text: string) => text.replaceAll("&", "&amp;").replaceAll('"', "&quot;").replaceAll("<", "&lt;");

function hostile(host: string): Checks<World> {
  return {
    "a frame stays empty": async (world) => {
      const { site, request } = world;
      for (const address of [request, `${site.base}/connections`]) {
        const page = await stagePage(world, host, `<iframe src="${escape(address)}"></iframe>`);
        await until(() => page.frames()[1]?.url() !== "" && page.frames()[1], "frame");
        await page.waitForLoadState("networkidle");
        const frame = page.frames()[1]!;
        assertEquals(await frame.locator("form, main").count(), 0, `what of ${address.slice(0, 60)} is in the frame`);
        assert(frame.url().startsWith("chrome-error:"), `the frame holds ${frame.url()}`);
        await page.close();
      }
    },

    "a form that sends itself achieves nothing": async (world) => {
      const { site, request, apps } = world;
      const encoded = new URL(request).search.slice(1);
      // A token that another browser got for the same request is the best that a stranger can have.
      const stranger = new Visitor(site);
      const forms: [string, Record<string, string>][] = [
        ["/authorize", { request: encoded, decision: "approve" }],
        ["/authorize", { ...await stranger.form(request), decision: "approve" }],
        ["/authorize", { ...await stranger.form(request), decision: "deny" }],
        ["/connections", { action: "revoke_all" }],
        ["/connections", { action: "sign_out_everywhere" }],
        ["/connections", {
          ...await stranger.form("/connections"),
          action: "create_token",
          name: "theirs",
          days: "365",
          scope: "notes",
        }],
      ];
      for (const [path, fields] of forms) {
        await unchanged(world, async () => {
          const inputs = Object.entries(fields).map(([name, value]) =>
            `<input type="hidden" name="${name}" value="${escape(value)}">`
          );
          const page = await stagePage(
            world,
            host,
            `<form method="post" action="${site.base}${path}">${inputs.join("")}</form><script>
              addEventListener("load", () => setTimeout(() => document.forms[0].submit()))</script>`,
          );
          await page.waitForURL(`${site.base}${path}`);
          await page.waitForLoadState();
          // It may refuse or ask again; it must not have acted.
          const title = await page.locator("h1").innerText();
          assert(/expired|cannot be answered|^Connect |^Connections$|^Sign in$/.test(title), `the page is ${title}`);
          await page.close();
        });
      }
      assertEquals(apps.callbacks.length, 0, "the number of callbacks");
    },

    "fetch with the owner's cookies reads nothing": async (world) => {
      const { site, request } = world;
      await unchanged(world, async () => {
        const page = await stagePage(world, host, "");
        for (const address of [request, `${site.base}/connections`]) {
          for (const method of ["GET", "POST"]) {
            for (const mode of ["cors", "no-cors"]) {
              const read = await page.evaluate<string>(`fetch(${JSON.stringify(address)}, {
                method: "${method}", mode: "${mode}", credentials: "include",
                ...("${method}" === "POST" && { body: new URLSearchParams({ action: "revoke_all" }) }),
              }).then(async (response) => response.type + (await response.text()), () => "refused")`);
              assertEquals(read, mode === "cors" ? "refused" : "opaque", `what ${method} with ${mode} reads`);
            }
          }
        }
        await page.close();
      });
    },

    "as script, style sheet, image or object it tells nothing": async (world) => {
      const { site } = world;
      const url = `${site.base}/connections`;
      const page = await stagePage(
        world,
        host,
        `<script>window.told = []; onerror = (message) => told.push(message)</script><script src="${url}"></script>
         <link rel="stylesheet" href="${url}"><img src="${url}" onload="told.push('image')"><object data="${url}"></object>
         <embed src="${url}">`,
      );
      await page.waitForLoadState("networkidle");
      const told = await page.evaluate<string[]>(`told.filter((text) => text !== "Script error.").concat(
        [...document.styleSheets].map((sheet) => { try { return sheet.cssRules.length + " rules" } catch { return "" } })
      ).filter((text) => !/^(0 rules)?$/.test(text))`);
      assertEquals(told, [], "what was told");
      await page.close();
    },

    "a window that it opens cannot be read": async (world) => {
      const { site, request } = world;
      await unchanged(world, async () => {
        for (const address of [request, `${site.base}/connections`]) {
          const page = await stagePage(world, host, "");
          const [popup] = await Promise.all([
            page.waitForEvent("popup"),
            page.evaluate(`void (window.it = window.open(${JSON.stringify(address)}))`),
          ]);
          await popup.waitForLoadState();
          assert(await popup.locator("button").count() > 0, "the page did not open");
          const read = await page.evaluate<string[]>(`[
            () => it.document.body.innerHTML, () => it.location.href, () => it.eval("1"), () => it.localStorage,
            () => it.document.forms[0].submit(), () => it.name,
          ].map((attempt) => { try { return String(attempt()) } catch (error) { return error.name } })`);
          assertEquals(read, Array(6).fill("SecurityError"), "what is read");
          await popup.close();
          await page.close();
        }
      });
    },

    "a link that is fetched or rendered ahead changes nothing": async (world) => {
      const { site, request } = world;
      const before = await site.state();
      site.answered.length = 0;
      const page = await stagePage(
        world,
        host,
        `<link rel="prefetch" href="${escape(request)}"><link rel="prerender" href="${escape(request)}">
         <script type="speculationrules">${speculation([request, `${site.base}/connections`])}</script>`,
      );
      await until(() => site.answered.length > 0, "request ahead of time").catch((cause) => {
        throw new NotRun("this browser fetched nothing ahead", { cause });
      });
      await page.waitForLoadState("networkidle");
      assertEquals(await site.state(), before, "the state");
      await page.close();
    },
  };
}

function speculation(urls: string[]): string {
  const rules = [{ source: "list", urls, eagerness: "immediate" }];
  return JSON.stringify({ prefetch: rules, prerender: rules });
}

const origins: Checks<World> = Object.fromEntries(
  Object.entries(HOSTS).flatMap(([site, host]) =>
    Object.entries(hostile(host)).map(([name, check]) => [`a hostile page of the ${site}: ${name}`, check])
  ),
);

const rendering: Checks<World> = {
  "a page of the same origin that renders /authorize ahead changes nothing": async ({ site, owner, request }) => {
    const rules = speculation([request, `${site.base}/connections`]);
    site.ownPage = `<!doctype html><script type="speculationrules">${rules}</script>`;
    const before = await site.state();
    site.answered.length = 0;
    await owner.page.goto(`${site.base}/ahead`);
    await until(() => site.answered.includes("GET /authorize"), "request ahead of time").catch((cause) => {
      throw new NotRun(`this browser rendered nothing ahead but ${site.answered}`, { cause });
    });
    assertEquals(await site.state(), before, "the state");
  },
};

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Script in whatever an app can say
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const RUN = `document.title="run"`;
const SCRIPT = `"'><img src=x onerror='${RUN}'><script>${RUN}</script><svg onload='${RUN}'>`;
/** The same without the characters that a redirect URI cannot hold. */
const TIGHT = SCRIPT.replaceAll(" ", "/");

/** That the page is made of what its author wrote, and of nothing else. */
async function harmless({ page }: View, shown?: string): Promise<void> {
  const strange = await page.locator("script, img, svg, iframe, object, [onerror], [onload]").count();
  assertEquals(strange, 0, "the number of strange elements");
  assert(!(await page.title()).startsWith("run"), "script ran");
  const text = await page.locator("body").innerText();
  assert(shown === undefined || text.includes(shown), `${shown} is not shown: ${text}`);
}

const injection: Checks<World> = {
  "script in a name, redirect, state, scope or address of an app is shown as text": async ({ owner, site, apps }) => {
    const redirect_uri = `${apps.local}?x=${TIGHT}`;
    const request = new URL(await site.request(SCRIPT, redirect_uri, { scope: SCRIPT, state: SCRIPT }));
    const client_id = await site.register(SCRIPT, redirect_uri, {
      client_uri: `https://app.test/${TIGHT}`,
      scope: SCRIPT,
      logo_uri: `javascript:${RUN}`,
    });
    request.searchParams.set("client_id", client_id);
    await owner.open(request.href);
    await owner.inspect("consent-script");
    await harmless(owner, SCRIPT);
    await owner.approve();
    const callback = await apps.arrived();
    assertEquals(callback.url.searchParams.get("state"), SCRIPT, "state");
    await site.redeem(request.href, callback, SCRIPT);

    for (
      const [name, value, shown] of [
        ["redirect_uri", `https://evil.test/${TIGHT}`, "evil.test"],
        ["redirect_uri", `javascript:${RUN}//${TIGHT}`, "javascript:"],
        ["client_id", SCRIPT, undefined],
        ["client_id", `https://evil.test/${TIGHT}`, undefined],
      ] as const
    ) {
      const faulty = new URL(request);
      faulty.searchParams.set(name, value);
      await owner.open(faulty.href, 400);
      await harmless(owner, shown);
    }
    const refused = await site.request(SCRIPT, `https://refused.example/${TIGHT}`);
    await owner.open(refused, 400);
    await harmless(owner, '"refused.example"');

    await owner.open(`${site.base}/connections`);
    await owner.unfold();
    await harmless(owner, SCRIPT);
    await owner.page.fill("#name", SCRIPT);
    await owner.press("Create token", 200);
    await harmless(owner, "Authorization: Bearer");
    await owner.open(`${site.base}/connections`);
    await harmless(owner, SCRIPT);
    assertEquals(owner.faults.noise, [], "what the console and the policy report");
  },
};

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Guessing and floods
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const ROUNDS = 10;
const GUESSERS = 100;
const GUESSES = 10;

const floods: Checks<World> = {
  "10,000 guesses by 1,000 browsers: 10 are looked at, then one a minute; the owner's browser still signs in": async (
    { browser, site, owner, request, apps },
  ) => {
    const signedOut = await View.open(browser);
    await signIn(signedOut, site);
    await signedOut.press("Sign out", 303);
    travel(8 * 24 * 3600); // the session in the owner's browser has ended

    const answers: Record<number, number> = {};
    const start = Date.now();
    const before = looks();
    for (let round = 0; round < ROUNDS; round++) {
      if (round > 0) travel(60);
      await Promise.all(Array.from({ length: GUESSERS }, async (_, i) => {
        const guesser = new Visitor(site);
        const path = i % 2 ? "/connections" : "/authorize";
        const form = await guesser.form(i % 2 ? path : request);
        for (let guess = 0; guess < GUESSES; guess++) {
          const address = `10.${round}.${i}.${guess}`;
          const { status } = await guesser.post(path, { ...form, decision: "approve", password: `guess ${guess}` }, {
            "X-Forwarded-For": address,
            Forwarded: `for=${address}`,
            "X-Real-IP": address,
          });
          answers[status] = (answers[status] ?? 0) + 1;
        }
      }));
    }
    const count = looks() - before;
    const allowed = 10 + Math.floor((Date.now() - start) / 60_000);
    assertEquals(answers, { 403: count, 429: ROUNDS * GUESSERS * GUESSES - count }, "the answers");
    assert(count <= allowed, `${count} were looked at, and ${allowed} may be`);
    assert(count >= 10 + ROUNDS - 1, `only ${count} were looked at, so this was no test`);

    for (const view of [owner, signedOut]) {
      await view.open(request);
      await view.approve(PASSWORD);
      await site.redeem(request, await apps.arrived());
    }
    await signedOut.close();
  },

  "a thousand times GET: the state stays byte for byte": async ({ site, request, owner }) => {
    await owner.open(`${site.base}/connections`);
    const signedIn = new Visitor(site);
    signedIn.cookie = (await owner.context.cookies()).map(({ name, value }) => `${name}=${value}`).join("; ");
    const refused = await site.request("Somebody", "https://refused.example/callback");
    const before = await site.state();
    for (let i = 0; i < 250; i++) {
      const statuses = await Promise.all([
        new Visitor(site).send(request),
        signedIn.send(request),
        new Visitor(site).send(`${request}x`),
        new Visitor(site).send(refused),
      ]);
      assertEquals(statuses.map(({ status }) => status), [200, 200, 302, 400], "the answers");
    }
    assertEquals(await site.state(), before, "the state");
  },
};

const part = (name: string, checks: Checks<World>): Part<World> => ({ name, open, close, before, checks });

export const attacks: Part<World>[] = [
  part("the way back", wayBack),
  part("other origins", { ...origins, ...rendering, ...injection }),
  part("floods", floods),
];
