/**
 * The owner's ways through the pages, at every size, in light and dark, with and without JavaScript; and by keyboard.
 *
 * @module
 */

// deno-lint-ignore-file no-import-prefix
import type { Browser } from "npm:playwright-core@1.65.1";
import {
  Apps,
  assert,
  assertEquals,
  type Checks,
  type Faults,
  type Look,
  type Part,
  PASSWORD,
  Site,
  travel,
  until,
  View,
  Visitor,
} from "./kit.ts";

interface Walk {
  browser: Browser;
  apps: Apps;
  site: Site;
  /** The owner's browser. */
  owner: View;
  /** Addresses that an app on this computer, and one on the web, send the owner to. */
  local: string;
  web: string;
  /** All browsers that were opened, for what they have noted. */
  views: View[];
}

async function openWalk(browser: Browser, look: Look): Promise<Walk> {
  const apps = await Apps.open();
  // With https the cookie is a __Host- one; plain http on loopback is what a first try on one's own machine looks like.
  const site = await Site.open(look.javaScript ? "https" : "http", apps);
  const owner = await View.open(browser, look);
  const local = await site.request("Claude Code", apps.local);
  const web = await site.request("Claude", apps.web);
  return { browser, apps, site, owner, local, web, views: [owner] };
}

async function closeWalk({ site, apps, views }: Walk): Promise<void> {
  await Promise.all(views.map((view) => view.close()));
  await site.close();
  await apps.close();
}

/** Another browser, which looks at the pages in the same way. */
async function another({ browser, owner, views }: Walk): Promise<View> {
  const view = await View.open(browser, owner.look);
  views.push(view);
  return view;
}

async function before({ site, apps }: Walk): Promise<void> {
  site.storeFails = false;
  site.gate = apps.gate = undefined;
  apps.callbacks.length = 0;
  await Promise.resolve();
}

/** Sees to it that the owner is signed in, in this browser. */
async function signIn(view: View, { site }: Walk): Promise<void> {
  await view.open(`${site.base}/connections`);
  if (await view.title() === "Connections") return;
  await view.page.fill("#password", PASSWORD);
  await view.press("Sign in", 303);
  assertEquals(await view.title(), "Connections", "the page after signing in");
}

/**
 * Presses a button, and again when `held`, which lets nobody on, is reached: the browser drops the first answer for the
 * second.
 */
async function pressTwice(
  view: View,
  name: string,
  { site }: Walk,
  held: { gate: Promise<void> | undefined },
  isReached = (forms: number): boolean => forms === 1,
): Promise<void> {
  site.answered.length = 0;
  const forms = () => site.answered.filter((request) => request.startsWith("POST ")).length;
  const { promise, resolve } = Promise.withResolvers<void>();
  held.gate = promise;
  await view.leads(async () => {
    const { mouse } = view.page;
    const button = view.page.getByRole("button", { name });
    await button.scrollIntoViewIfNeeded();
    const { x, y } = (await button.boundingBox())!;
    await mouse.click(x + 20, y + 20);
    await until(() => isReached(forms()), "first form");
    await mouse.click(x + 20, y + 20);
    await until(() => forms() === 2, "second form");
    resolve();
  });
}

async function approveTwice(walk: Walk, held: Site | Apps, isReached?: () => boolean): Promise<void> {
  const { site, web, apps } = walk;
  const stranger = await another(walk);
  await stranger.open(web);
  await stranger.page.fill("#password", PASSWORD);
  await pressTwice(stranger, "Approve", walk, held, isReached);
  const [dropped] = apps.callbacks.splice(0);
  assertEquals(await stranger.title(), "Already answered", "the page");
  await stranger.inspect("answered-twice");
  await stranger.leads(() => stranger.page.getByRole("link").click());
  assertEquals(await stranger.title(), "Connected", "the page");
  const callback = await apps.arrived();
  if (dropped) assertEquals(callback.url, dropped.url, "the address that the link leads to");
  await site.redeem(web, callback);
  await stranger.close();
}

const authorize: Checks<Walk> = {
  "consent: password and approval in one page": async ({ owner, site, local, apps }) => {
    await owner.open(local);
    await owner.says(
      "Connect this app to",
      "Claude Code",
      new URL(apps.local).origin,
      "read your notes",
      "change your notes",
    );
    await owner.says("Approve only if you just started this.", "until you revoke it");
    const [password, user] = ["current-password", "username"].map((it) => owner.page.locator(`[autocomplete=${it}]`));
    assertEquals([await password!.count(), await user!.count()], [1, 1], "what a password manager looks for");
    await owner.inspect("consent-password");
    await owner.approve(PASSWORD);
    assertEquals(await owner.title(), "Connected", "the page after approving");
    assertEquals(await site.call(await site.redeem(local, await apps.arrived())), 200, "the answer to a call");
  },

  "consent when signed in: one click": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    await owner.open(web);
    assertEquals(await owner.page.locator("input[type=password]").count(), 0, "the number of password fields");
    await owner.inspect("consent");
    await owner.approve();
    assertEquals(await site.call(await site.redeem(web, await apps.arrived())), 200, "the answer to a call");
  },

  "consent after the back button: asked anew, or told that it was answered": async ({ owner, apps }) => {
    await owner.page.goBack();
    if (await owner.page.getByRole("button", { name: "Approve" }).count() > 0) await owner.approve();
    const title = await owner.title();
    assert(/Connected|Already answered/.test(title), `the page is ${title}`);
    if (title === "Connected") await apps.arrived();
  },

  "consent sent again after its answer: told so, and nothing new": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    await owner.open(web);
    const csrf = await owner.page.locator("[name=csrf]").inputValue();
    await owner.approve();
    await site.redeem(web, await apps.arrived());
    const before = (await site.auth.connections()).length;
    // The form as it was before, which a browser may bring back from its cache.
    await owner.open(web);
    await owner.page.evaluate(`document.querySelector("[name=csrf]").value = ${JSON.stringify(csrf)}`);
    await owner.press("Approve", 409);
    assertEquals(await owner.title(), "Already answered", "the page");
    await owner.inspect("answered");
    assertEquals((await site.auth.connections()).length, before, "the number of connections");
    assertEquals(apps.callbacks.length, 0, "the number of callbacks");
  },

  "Approve pressed again before the first answer came: the app is connected": (walk) => approveTwice(walk, walk.site),

  // By then the first answer has signed the owner in.
  "Approve pressed again while the app is slow: it is connected": (walk) =>
    approveTwice(walk, walk.apps, () => walk.apps.callbacks.length === 1),

  "wrong password: said so, asked again, and the right one goes through": async (walk) => {
    const { site, local, apps } = walk;
    const stranger = await another(walk);
    await stranger.open(local);
    await stranger.page.fill("#password", "wrong");
    await stranger.press("Approve", 403);
    await stranger.says("Connect this app to", "Claude Code");
    assertEquals(await stranger.page.getByRole("alert").innerText(), "That is not the password.", "the alert");
    assertEquals(await stranger.page.inputValue("#password"), "", "the password field");
    await stranger.focuses("input Your password for this server");
    await stranger.inspect("consent-wrong-password");
    await stranger.approve(PASSWORD);
    await site.redeem(local, await apps.arrived());
    await stranger.close();
  },

  "deny: no password needed, and the app is told": async (walk) => {
    const { site, local, apps } = walk;
    const stranger = await another(walk);
    await stranger.open(local);
    await stranger.press("Deny");
    const { searchParams } = (await apps.arrived()).url;
    assertEquals(
      ["error", "code", "state", "iss"].map((name) => searchParams.get(name)),
      ["access_denied", null, new URL(local).searchParams.get("state"), site.base],
      "the answer",
    );
    await stranger.close();
  },

  "names and hosts of the greatest length": async ({ owner, site, apps }) => {
    const name = "W".repeat(200);
    const request = await site.request(name, apps.longest);
    await owner.open(request);
    await owner.says(name, new URL(apps.longest).host);
    await owner.inspect("consent-long");
    await owner.open(request.replace("callback", "elsewhere"), 400);
    await owner.inspect("faulty-long");
  },

  "unknown client: what to do": async ({ owner, web }) => {
    const stale = new URL(web);
    stale.searchParams.set("client_id", `${stale.searchParams.get("client_id")!.slice(0, -1)}x`);
    await owner.open(stale.href, 400);
    await owner.says("does not know the app", "Remove this server from the app and add it again");
    await owner.inspect("unknown-client");
  },

  "refused redirect: the entry to add": async ({ owner, site }) => {
    await owner.open(await site.request("Somebody", "https://refused.example/callback"), 400);
    await owner.says("not allowed here", '"refused.example"', "allowedRedirectDomains");
    await owner.inspect("refused-redirect");
  },

  "faulty request: a page, and no redirect": async ({ owner, site, apps }) => {
    await owner.open(`${site.base}/authorize`, 400);
    await owner.says("cannot be answered");
    await owner.inspect("faulty");
    assertEquals(apps.callbacks.length, 0, "the number of callbacks");
  },

  "expired form: asked again, and nothing lost": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    await owner.open(web);
    travel(11 * 60);
    await owner.press("Approve", 403);
    await owner.inspect("expired");
    await owner.says("Connect this app to", "This page was open for too long.");
    assertEquals(apps.callbacks.length, 0, "the number of callbacks");
    await owner.approve();
    await site.redeem(web, await apps.arrived());
  },

  "signed out elsewhere meanwhile: asked for the password, and not told that it was wrong": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    await owner.open(web);
    const tab = await owner.context.newPage();
    await tab.goto(`${site.base}/connections`);
    await tab.getByRole("button", { name: "Sign out", exact: true }).click();
    await tab.waitForLoadState();
    await tab.close();
    await owner.press("Approve", 403);
    assertEquals(await owner.page.locator("#password").count(), 1, "the number of password fields");
    const alert = await owner.page.getByRole("alert").allInnerTexts();
    assert(
      !alert.includes("That is not the password."),
      "the page says that the password was wrong, but none was sent",
    );
    await owner.inspect("consent-signed-out");
    await owner.approve(PASSWORD);
    await site.redeem(web, await apps.arrived());
  },

  "too many attempts: how long to wait, and the browser used before still gets in": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    const guesser = new Visitor(site);
    const form = await guesser.form("/connections");
    let status = 0;
    for (let i = 0; i < 12 && status !== 429; i++) {
      status = (await guesser.post("/connections", { ...form, password: "wrong" })).status;
    }
    const stranger = await another(walk);
    await stranger.open(web);
    await stranger.page.fill("#password", PASSWORD);
    await stranger.press("Approve", 429);
    await stranger.says("Too many attempts", /\d+ seconds/);
    await stranger.inspect("consent-throttled");
    await stranger.close();
    await owner.open(`${site.base}/connections`);
    await owner.press("Sign out", 303);
    await owner.open(web);
    await owner.approve(PASSWORD);
    await site.redeem(web, await apps.arrived());
    travel(11 * 60); // the others may try again
  },

  "store failing: said so, nothing approved, and it goes through later": async (walk) => {
    const { owner, site, web, apps } = walk;
    await signIn(owner, walk);
    await owner.open(web);
    site.storeFails = true;
    try {
      await owner.press("Approve", 503);
      await owner.says("Something went wrong here", "try again");
      await owner.inspect("failing");
      assertEquals(apps.callbacks.length, 0, "the number of callbacks");
      await owner.open(web, 503);
    } finally {
      site.storeFails = false;
    }
    await owner.open(web);
    await owner.approve();
    await site.redeem(web, await apps.arrived());
  },
};

const connections: Checks<Walk> = {
  "/connections: signing in, at first with a wrong password": async (walk) => {
    const stranger = await another(walk);
    await stranger.open(`${walk.site.base}/connections`);
    await stranger.inspect("sign-in");
    await stranger.page.fill("#password", "wrong");
    await stranger.press("Sign in", 403);
    await stranger.says("That is not the password.");
    await stranger.inspect("sign-in-wrong-password");
    await stranger.page.fill("#password", PASSWORD);
    await stranger.press("Sign in", 303);
    assertEquals(await stranger.title(), "Connections", "the page");
    await stranger.close();
  },

  "/connections: the list, with what happened lately": async (walk) => {
    const { owner, site, apps } = walk;
    await site.connect("W".repeat(200), apps.longest);
    await signIn(owner, walk);
    await owner.inspect("connections");
    await owner.says("Claude Code", new URL(apps.local).origin, "W".repeat(200), new URL(apps.longest).host);
    await owner.unfold();
    await owner.says(/a wrong password was entered/i, '"refused.example"', /too many wrong passwords/i, "UTC");
    await owner.inspect("connections-unfolded");
  },

  "/connections: disconnecting one, after a look at what that means": async (walk) => {
    const { owner, site, apps } = walk;
    const gone = await site.connect("Gone", apps.web);
    const kept = await site.connect("Kept", apps.web);
    await signIn(owner, walk);
    assertEquals(await owner.page.getByRole("button", { name: "Disconnect: Gone" }).isVisible(), false, "at one tap");
    await owner.expand("Gone");
    await owner.says("it has to ask you again");
    await owner.press("Disconnect: Gone", 303);
    assertEquals(
      await owner.page.getByRole("status").innerText(),
      "Disconnected. It has to ask you again.",
      "the result",
    );
    await owner.inspect("connections-disconnected");
    const list = owner.page.locator(".list").first();
    assertEquals(await list.locator("summary", { hasText: "Gone" }).count(), 0, "what is left of it");
    assertEquals([await site.call(gone), await site.call(kept)], [401, 200], "the answers to calls");
  },

  "/connections: a token, shown once, with a command to copy": async (walk) => {
    const { owner, site } = walk;
    await signIn(owner, walk);
    await owner.expand("New token for a script");
    await owner.page.fill("#name", "Backup script");
    await owner.page.selectOption("#days", "90");
    await owner.page.getByLabel("change your notes").uncheck();
    await owner.press("Create token", 200);
    const [token = "", command = ""] = await owner.page.locator("code").allInnerTexts();
    assertEquals(await site.call(token), 200, "the answer to a call");
    assertEquals(
      command,
      `claude mcp add --transport http backup-script ${site.base}/mcp --header "Authorization: Bearer ${token}"`,
      "the command",
    );
    await owner.inspect("token");
    await owner.page.getByRole("link").click();
    assertEquals(await owner.title(), "Connections", "the page behind the link");
    await owner.says("Backup script");
    assert(!(await owner.page.content()).includes(token), "the token is shown again");
    await owner.page.goBack().catch(() => {}); // a browser asks before it sends a form again, and shows that instead
    assert(!(await owner.page.content()).includes(token), "the back button shows the token again");
    const made = (await site.auth.connections()).filter(({ clientName }) => clientName === "Backup script");
    assertEquals(made.map(({ scopes }) => scopes), [["notes"]], "what was made");
  },

  "/connections: Create token pressed twice: one token, and it is shown": async (walk) => {
    const { owner, site } = walk;
    await signIn(owner, walk);
    await owner.expand("New token for a script");
    await owner.page.fill("#name", "Impatient");
    await pressTwice(owner, "Create token", walk, site);
    assertEquals(await site.call(await owner.page.locator("code").first().innerText()), 200, "the answer to a call");
    const made = (await site.auth.connections()).filter(({ clientName }) => clientName === "Impatient");
    assertEquals(made.length, 1, "the number of tokens");
  },

  "/connections: an expired page leads back to itself": async (walk) => {
    const { owner, site } = walk;
    await signIn(owner, walk);
    await owner.expand("Kept");
    travel(11 * 60);
    await owner.press(/^Disconnect: Kept/, 403);
    await owner.inspect("connections-expired");
    const ways = await owner.page.locator('a[href="/connections"], form').count();
    assert(ways > 0, `the page leads nowhere: ${(await owner.text()).replace(/\s+/g, " ")}`);
    assertEquals((await site.auth.connections()).some(({ clientName }) => clientName === "Kept"), true, "still there");
  },

  "/connections: disconnecting all": async (walk) => {
    const { owner, site } = walk;
    await signIn(owner, walk);
    await owner.expand("Disconnect all");
    await owner.press("Disconnect all", 303);
    await owner.says("Everything is disconnected.", "Nothing is connected yet", `${site.base}/mcp`, "claude mcp add");
    assertEquals(await site.auth.connections(), [], "what is connected");
    await owner.inspect("connections-empty");
  },

  "/connections: store failing": async ({ owner, site }) => {
    site.storeFails = true;
    try {
      await owner.open(`${site.base}/connections`, 503);
      await owner.says("Something went wrong here");
    } finally {
      site.storeFails = false;
    }
  },

  "/connections: signing out here": async (walk) => {
    await signIn(walk.owner, walk);
    const other = await another(walk);
    await signIn(other, walk);
    await other.press("Sign out", 303);
    assertEquals(await other.title(), "Sign in", "the page");
    await other.close();
    await walk.owner.open(`${walk.site.base}/connections`);
    assertEquals(await walk.owner.title(), "Connections", "the page in the other browser");
  },

  "/connections: signing out everywhere": async (walk) => {
    const other = await another(walk);
    await signIn(other, walk);
    await other.press("Sign out everywhere", 303);
    for (const view of [other, walk.owner]) {
      await view.open(`${walk.site.base}/connections`);
      assertEquals(await view.title(), "Sign in", "the page");
    }
    await other.close();
  },
};

function noFault(kind: keyof Faults): (walk: Walk) => Promise<void> {
  return ({ views }) => {
    const found = views.flatMap(({ faults }) => faults[kind]);
    assert(found.length === 0, `${found.length}: ${[...new Set(found)].join("; ")}`);
    return Promise.resolve();
  };
}

/** What was noted on all these ways. */
const throughout: Checks<Walk> = {
  "every page: nothing is wider than the window": noFault("width"),
  "every page: what is pressed is at least 44 px high": noFault("height"),
  "every page: opens at its beginning, with the question in view": noFault("question"),
  "every page: no error on the console, nothing against its policy": noFault("noise"),
};

const LOOKS: Look[] = (["desktop", "phone"] as const).flatMap((size) =>
  (["light", "dark"] as const).flatMap((scheme) => [true, false].map((javaScript) => ({ size, scheme, javaScript })))
);

export const walks: Part<Walk>[] = LOOKS.map((look) => ({
  name: `${look.size}, ${look.scheme}, JavaScript ${look.javaScript ? "on" : "off"}`,
  open: (browser) => openWalk(browser, look),
  close: closeWalk,
  before,
  checks: {
    ...authorize,
    ...connections,
    ...throughout,
    ...(look.javaScript && look.size === "phone" && { "every page: axe finds nothing": noFault("axe") }),
  },
}));

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Keyboard
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Goes on with Tab until something of this name has the focus. Every stop on the way must be there to be seen. */
async function tabTo(view: View, name: string): Promise<string[]> {
  const stops: string[] = [];
  for (let i = 0; i < 60; i++) {
    await view.page.keyboard.press("Tab");
    const stop = await view.focused();
    stops.push(stop);
    assert(!stop.includes("cannot be seen"), stops.join(", "));
    if (stop.includes(name)) return stops;
  }
  throw new Error(`Tab does not reach ${name}: ${stops.join(", ")}`);
}

const key = (view: View, name: string) => view.leads(() => view.page.keyboard.press(name));

const byKeyboard: Checks<Walk> = {
  "the password is the first stop, and Enter in it approves": async ({ owner, site, local, apps }) => {
    await owner.open(local);
    if (!(await owner.focused()).startsWith("input")) await owner.page.keyboard.press("Tab");
    await owner.focuses("input Your password for this server");
    await owner.page.keyboard.type(PASSWORD);
    await key(owner, "Enter");
    await site.redeem(local, await apps.arrived());
  },

  "Tab leads to Approve, and Space presses it": async ({ owner, site, web, apps }) => {
    travel(2);
    await owner.open(web);
    assertEquals(await tabTo(owner, "Approve"), ["button Approve"], "the stops");
    await key(owner, "Space");
    await site.redeem(web, await apps.arrived());
  },

  "Tab leads on to Deny, and Enter presses it": async ({ owner, web, apps }) => {
    await owner.open(web);
    assertEquals(await tabTo(owner, "Deny"), ["button Approve", "button Deny"], "the stops");
    await key(owner, "Enter");
    assertEquals((await apps.arrived()).url.searchParams.get("error"), "access_denied", "the answer");
  },

  "/connections: every stop can be seen, in the order of the page, there and back": async ({
    owner,
    site,
    apps,
  }) => {
    for (const name of ["First", "Second", "Third"]) {
      travel(2); // so that the list has an order
      await site.connect(name, apps.web);
    }
    await owner.open(`${site.base}/connections`);
    const stops = await tabTo(owner, "Sign out everywhere");
    assertEquals(
      stops,
      [
        "button Sign out",
        ...["Third", "Second", "First", "Claude", "Claude Code"].map((name) => `summary ${name}`),
        "summary Connect an app",
        "summary New token for a script",
        "summary Disconnect all",
        // How each of them came in, and what was denied above.
        ...["Third", "Second", "First", "Claude", "Claude Code", "Claude"].map((name) => `summary ${name}`),
        "input Disconnect every app and token as well",
        "button Sign out everywhere",
      ],
      "the stops",
    );
    // The way back is held neither: it ends where it began.
    for (let i = 1; i < stops.length; i++) await owner.page.keyboard.press("Shift+Tab");
    assertEquals(await owner.focused(), stops[0], "the stop that Shift+Tab comes back to");
  },

  "/connections: making a token": async ({ owner, site }) => {
    const { page } = owner;
    await owner.open(`${site.base}/connections`);
    await tabTo(owner, "New token for a script");
    await page.keyboard.press("Enter");
    await tabTo(owner, "What is it for?");
    await page.keyboard.type("By keyboard");
    await tabTo(owner, "Expires after");
    await page.keyboard.press("ArrowDown");
    await tabTo(owner, "change your notes");
    await page.keyboard.press("Space");
    await tabTo(owner, "Create token");
    await key(owner, "Enter");
    const token = await page.locator("code").first().innerText();
    assertEquals(await site.call(token), 200, "the answer to a call");
    const made = (await site.auth.connections()).filter(({ clientName }) => clientName === "By keyboard");
    assertEquals(
      made.map(({ scopes, expiresAt, createdAt }) => [scopes, Math.round((expiresAt - createdAt) / 86400)]),
      [[["notes"], 90]],
      "what was made",
    );
    await tabTo(owner, "Back to your connections");
    await key(owner, "Enter");
    assertEquals(await owner.title(), "Connections", "the page");
  },

  "/connections: disconnecting one, and all": async ({ owner, site }) => {
    await owner.open(`${site.base}/connections`);
    await tabTo(owner, "summary Third");
    await owner.page.keyboard.press("Space");
    await tabTo(owner, "Disconnect: Third");
    await key(owner, "Enter");
    const left = (await site.auth.connections()).map(({ clientName }) => clientName);
    assert(!left.includes("Third") && left.includes("Second"), `what is left is ${left}`);
    await tabTo(owner, "summary Disconnect all");
    await owner.page.keyboard.press("Space");
    await tabTo(owner, "button Disconnect all");
    await key(owner, "Space");
    assertEquals(await site.auth.connections(), [], "what is connected");
  },

  "/connections: signing out, and in again": async ({ owner, site }) => {
    await owner.open(`${site.base}/connections`);
    await tabTo(owner, "Sign out");
    await key(owner, "Enter");
    await owner.focuses("input Your password for this server");
    await owner.page.keyboard.type(PASSWORD);
    await key(owner, "Enter");
    assertEquals(await owner.title(), "Connections", "the page");
  },
};

export const keyboard: Part<Walk> = {
  name: "by keyboard alone",
  open: (browser) => openWalk(browser, { size: "desktop", scheme: "light", javaScript: true }),
  close: closeWalk,
  before,
  checks: byKeyboard,
};
