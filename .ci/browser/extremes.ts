/**
 * Where a page is put to the test: names that want to be everywhere, a hundred connections, apps that a redirect does
 * not reach, forced colours and zoom.
 *
 * @module
 */

// deno-lint-ignore-file no-import-prefix
import type { Browser } from "npm:playwright-core@1.65.1";
import { Apps, assert, assertEquals, type Checks, type Part, PASSWORD, Site, travel, until, View } from "./kit.ts";

interface World {
  apps: Apps;
  site: Site;
  /** The owner's browser, signed in, as large as a phone of today. */
  owner: View;
}

const SCREEN = { width: 390, height: 844 };

async function open(browser: Browser): Promise<World> {
  const apps = await Apps.open();
  const site = await Site.open("https", apps);
  const owner = await View.open(browser, { size: "phone", scheme: "light", javaScript: true });
  await owner.page.setViewportSize(SCREEN);
  await owner.open(`${site.base}/connections`);
  await owner.page.fill("#password", PASSWORD);
  await owner.press("Sign in", 303);
  return { apps, site, owner };
}

async function close({ apps, site, owner }: World): Promise<void> {
  await owner.close();
  await site.close();
  await apps.close();
}

/** Fails where the page is wider than the window, or axe finds something. */
async function sound(view: View, name: string): Promise<void> {
  await view.inspect(name);
  const { width, axe, noise } = view.faults;
  assertEquals([width, axe, noise], [[], [], []], "what is wrong with the page");
}

/** The picture of all that is not a name, with the names and without them. */
async function aroundNames({ page }: View): Promise<Uint8Array[]> {
  const pictures: Uint8Array[] = [];
  const boxes = await page.evaluate<{ y: number; height: number }[]>(`(() => {
    const names = [...document.querySelectorAll(".name")].map((name) => name.getBoundingClientRect());
    const edges = [{ bottom: 0 }, ...names, { top: document.documentElement.scrollHeight }];
    return edges.slice(1).map((edge, i) => ({ y: Math.ceil(edges[i].bottom), height: Math.floor(edge.top - edges[i].bottom) - 1 }));
  })()`);
  for (const { y, height } of boxes) {
    if (height > 0) {
      pictures.push(await page.screenshot({ fullPage: true, clip: { x: 0, y, width: SCREEN.width, height } }));
    }
  }
  return pictures;
}

/** Names that want more room than they are given: marks above and below, wide spaces, the other direction, one word. */
const NAMES = {
  marks: `A${"\u0302".repeat(60)}a${"\u0308".repeat(60)}`,
  "wide spaces": `Claude${"\u2003".repeat(150)}approved by your server`,
  "right to left": "\u05d0\u05e4\u05dc\u05d9\u05e7\u05e6\u05d9\u05d4 (evil.example) \u0627\u062a\u0635\u0627\u0644",
  "one word": "W".repeat(200),
};

const checks: Checks<World> = {
  ...Object.fromEntries(
    Object.entries(NAMES).map(([kind, name]) => [
      `a name of ${kind} stays in its place`,
      async ({ site, owner, apps }: World) => {
        await site.connect(name, apps.web);
        for (const address of [await site.request(name, apps.web), `${site.base}/connections`]) {
          await owner.open(address);
          const { height } = (await owner.page.locator(".name").first().boundingBox())!;
          assert(height < 60, `the name is ${height} px high`);
          await sound(owner, `name-${kind.replaceAll(" ", "-")}`);
          const shown = await aroundNames(owner);
          await owner.page.evaluate(
            `document.querySelectorAll(".name").forEach((it) => it.style.visibility = "hidden")`,
          );
          const hidden = await aroundNames(owner);
          assert(shown.length > 0 && shown.length === hidden.length, "there is nothing to compare");
          const drawn = shown.filter((picture, i) => !picture.every((byte, at) => byte === hidden[i]![at]));
          assertEquals(drawn.length, 0, "the number of places that the name draws over");
        }
      },
    ]),
  ),

  "an app that calls itself like the server is told apart": async ({ site, owner, apps }) => {
    const host = new URL(site.base).host;
    await owner.open(await site.request(host, apps.web));
    assertEquals(await owner.title(), `Connect this app to ${host}?`, "the title");
    await owner.says(`${host}\nThe app chose this name; it is not verified`, new URL(apps.web).host);
  },

  "a scheme of an app's own: a page that goes on by itself, with a link, and the code is nowhere else": async (
    world,
  ) => {
    const { site, owner } = world;
    const page = await owner.context.newPage();
    const sent: string[] = [];
    page.on("request", (request) => sent.push(`${request.url()} ${request.headers()["referer"] ?? ""}`));
    await page.goto(await site.request("Claude", "claude://claude.ai/callback"));
    await page.getByRole("button", { name: "Approve" }).click({ noWaitAfter: true });
    await until(() => sent.some((request) => request.startsWith("claude:")), "way out of the browser");
    assertEquals(await page.locator("h1").innerText(), "Approved", "the page");
    const link = page.getByRole("link", { name: "Open Claude" });
    const address = (await link.getAttribute("href"))!;
    assert(address.startsWith("claude://claude.ai/callback?code=pac_"), `the link is ${address}`);
    assertEquals(sent.filter((request) => request.includes("pac_")), [`${address} `], "the requests with the code");
    await link.click({ noWaitAfter: true });
    await until(() => sent.filter((request) => request.startsWith("claude:")).length === 2, "way out by the link");
    assertEquals(await page.locator("h1").innerText(), "Approved", "the page after that");
    await page.close();
  },

  "an app on another computer: the address is shown, selected at a tap, and works there": async (world) => {
    const { site, owner, apps } = world;
    const request = await site.request("Claude Code", apps.local);
    await owner.open(request);
    await owner.expand("The app is on another computer");
    await sound(owner, "consent-elsewhere");
    await owner.press("Approve and show the address", 200);
    await owner.says("Give it only to the app that you started yourself", "within 5 minutes");
    await sound(owner, "elsewhere");
    await owner.page.locator("code").click();
    const address = await owner.page.evaluate<string>("getSelection().toString()");
    assertEquals(apps.callbacks.length, 0, "the number of callbacks from this browser");
    const token = await site.redeem(request, { url: new URL(address), headers: new Headers() });
    assertEquals(await site.call(token), 200, "the answer to a call");
  },

  "a name of the owner's with markup in it is shown as text, and taken away again": async ({ site, owner, apps }) => {
    travel(2); // so that it is the latest
    await site.connect("Labelled", apps.web);
    const label = `"'><img src=x onerror='document.title="run"'>&lt;b>`;
    for (const [text, shown] of [[label, label], ["", "Labelled"]] as const) {
      await owner.open(`${site.base}/connections`);
      await owner.page.locator("summary.row").first().click();
      await owner.page.locator("[name=label]").first().fill(text);
      await owner.press(/^Rename/, 303);
      assertEquals(await owner.page.getByRole("status").innerText(), "Renamed.", "the result");
      assertEquals(await owner.page.locator("summary .name").first().innerText(), shown, "the name");
      assertEquals(await owner.page.locator("img").count(), 0, "the number of images");
      await sound(owner, "connections-renamed");
    }
  },

  "eight connections fit on two screens of a phone, a hundred are still sound": async ({ site, owner, apps }) => {
    for (const { id } of await site.auth.connections()) await site.auth.revoke(id);
    for (let i = 0; i < 8; i++) {
      const token = await site.connect(`Assistant number ${i}`, i % 2 ? apps.web : apps.local);
      if (i % 3) await site.call(token);
    }
    await owner.open(`${site.base}/connections`);
    const list = (await owner.page.locator(".list").first().boundingBox())!;
    assertEquals(await owner.page.locator(".list").first().locator("> li").count(), 8, "the number of connections");
    assert(list.y + list.height <= 2 * SCREEN.height, `the list ends at ${list.y + list.height} px`);
    for (let i = 8; i < 100; i++) await site.auth.createToken({ name: `Token ${i}` });
    await owner.open(`${site.base}/connections`);
    assertEquals(await owner.page.locator(".list").first().locator("> li").count(), 100, "the number of connections");
    await sound(owner, "connections-hundred");
  },

  "forced colours, more contrast, zoom to 200 %, and the narrowest window": async ({ site, owner, apps }) => {
    const { page } = owner;
    const request = await site.request("Claude Code", apps.local);
    for (const [name, address] of [["consent", request], ["connections", `${site.base}/connections`]] as const) {
      await page.emulateMedia({ forcedColors: "active" });
      await owner.open(address);
      await sound(owner, `${name}-forced`);
      await page.emulateMedia({ forcedColors: "none", contrast: "more" });
      await sound(owner, `${name}-contrast`);
      await page.emulateMedia({ contrast: null });
      for (const size of [{ width: 640, height: 400 }, { width: 320, height: 480 }]) {
        await page.setViewportSize(size);
        await sound(owner, `${name}-${size.width}`);
      }
      await page.setViewportSize(SCREEN);
    }
  },

  "the root leads to the owner's page": async ({ site, owner }) => {
    await owner.open(`${site.base}/`);
    assertEquals(new URL(owner.page.url()).pathname, "/connections", "the path");
    assertEquals(await owner.title(), "Connections", "the page");
  },
};

export const extremes: Part<World> = { name: "extremes", open, close, checks };
