/**
 * The owner's pages in a real browser: every way through them at desktop and phone size, in light and dark, with and
 * without JavaScript, by keyboard alone; the way back to the app; and what strangers try. The server runs in this
 * process, with its state in temporary folders and a clock that can be moved on; everything stays on loopback.
 *
 *     npx -y deno run -A .ci/browser.ts [part of a name ...]
 *     npx -y deno run -A .ci/browser.ts --pictures
 *
 * The browser is Debian's `chromium`, which is installed if it is missing and this is root on a machine with apt.
 * Pictures of all pages are left in `.ci/screenshots/`. A line for each check, and their sum at the end. `--pictures`
 * checks nothing, and makes the pictures of README.md anew, in `.github/`.
 *
 * @module
 */

// This package is for this check only, so deno.json does not name it.
// deno-lint-ignore-file no-import-prefix

import { type Browser, chromium } from "npm:playwright-core@1.65.1";
import { attacks } from "./browser/attacks.ts";
import { apart, type Part, ROOT, SCREENSHOTS } from "./browser/kit.ts";
import { extremes } from "./browser/extremes.ts";
import { keyboard, walks } from "./browser/paths.ts";
import { takePictures } from "./browser/pictures.ts";
import { NotRun, pause, within } from "./lib/limits.ts";
import { outcome, report, sum } from "./lib/tally.ts";

const CHROMIUM = "/usr/bin/chromium";
const INSTALL_SECONDS = 240;
const CHECK_SECONDS = 40;
const ALL_SECONDS = 540;
/** Most of the time of a part is waiting. */
const AT_ONCE = 4;

const FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  // Hosts with names of their own, as real ones have, and no way to any other.
  "--host-resolver-rules=MAP *.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
];

// deno-lint-ignore no-explicit-any
const PARTS: Part<any>[] = [...walks, keyboard, extremes, ...attacks];

let deadline = Infinity;

async function install(): Promise<void> {
  const there = async (path: string) => await Deno.stat(path).then(() => true, () => false);
  if (await there(CHROMIUM)) return;
  if (Deno.build.os !== "linux" || Deno.uid() !== 0 || !await there("/usr/bin/apt-get")) {
    throw new NotRun("there is no chromium, and it cannot be installed");
  }
  for (const args of [["update"], ["install", "-y", "--no-install-recommends", "chromium"]]) {
    const { success, stderr } = await new Deno.Command("apt-get", {
      args,
      env: { DEBIAN_FRONTEND: "noninteractive" },
      stdin: "null",
      signal: AbortSignal.timeout(INSTALL_SECONDS * 1000),
    }).output();
    if (!success) throw new NotRun(`chromium cannot be installed: ${new TextDecoder().decode(stderr).slice(-300)}`);
  }
  if (!await there(CHROMIUM)) throw new NotRun(`there is no ${CHROMIUM} even after its installation`);
}

async function run<World>(browser: Browser, { name, open, close, before, checks }: Part<World>): Promise<void> {
  let world: World;
  try {
    world = await within(CHECK_SECONDS, open(browser));
  } catch (error) {
    for (const check of Object.keys(checks)) report("FAILED", `${check} (${name})`, error);
    return;
  }
  for (const [check, body] of Object.entries(checks)) {
    if (stopped) return;
    try {
      const left = (deadline - performance.now()) / 1000;
      if (left <= 0) throw new Error(`the ${ALL_SECONDS} seconds for all checks are over`);
      await within(Math.min(CHECK_SECONDS, left), Promise.resolve(before?.(world)).then(() => body(world)));
      report("ok", `${check} (${name})`);
    } catch (error) {
      if (stopped) return;
      report(outcome(error), `${check} (${name})`, error);
    }
  }
  await within(CHECK_SECONDS, close(world)).catch((error) => console.error(`${name} cannot be closed`, error));
}

const wanted = PARTS.map(({ checks, ...part }) => ({
  ...part,
  checks: Object.fromEntries(
    Object.entries(checks).filter(([check]) =>
      Deno.args.every((word) => `${check} (${part.name})`.toLowerCase().includes(word.toLowerCase()))
    ),
  ),
})).filter(({ checks }) => Object.keys(checks).length > 0);

let browser: Browser | undefined;
let stopped = false;

/** Leaves nothing behind: no process, no folder but that of the pictures. */
async function end(status: number): Promise<never> {
  await within(10, Promise.resolve(browser?.close())).catch((error) => console.error("the browser stays open", error));
  for (let i = 0; i < 20; i++) { // the browser's last writes may come between
    if (await Deno.remove(ROOT, { recursive: true }).then(() => true, () => false)) break;
    await pause(100);
  }
  Deno.exit(status);
}
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(signal, () => {
    stopped = true;
    end(1);
  });
}

try {
  await install();
  if (Deno.args.length === 0) await Deno.remove(SCREENSHOTS, { recursive: true }).catch(() => {});
  await Deno.mkdir(SCREENSHOTS, { recursive: true });
  Deno.env.set("TMPDIR", ROOT); // where the browser is given a new, empty profile
  const launch = { executablePath: CHROMIUM, args: FLAGS, handleSIGINT: false, handleSIGTERM: false };
  browser = await chromium.launch(launch);
} catch (error) {
  for (const { name, checks } of wanted) {
    for (const check of Object.keys(checks)) report(outcome(error), `${check} (${name})`, error);
  }
}
if (browser && Deno.args.includes("--pictures")) {
  await apart(() => takePictures(browser!, new URL("../.github", import.meta.url).pathname));
  await end(0);
}
if (browser) {
  deadline = performance.now() + ALL_SECONDS * 1000;
  const { length } = wanted;
  const waiting = wanted.values();
  const team = Array.from({ length: Math.min(AT_ONCE, length) }, async () => {
    for (const part of waiting) if (!stopped) await apart(() => run(browser!, part));
  });
  await Promise.all(team);
}
if (stopped) await new Promise(() => {}); // whoever stopped it sees to the end
await end(sum());
