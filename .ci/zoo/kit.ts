/**
 * What all checks of the zoo share: a pen for each program (a home of its own, a server of its own, and the list of
 * everything that was started in it), and the owner at the browser.
 *
 * @module
 */

import { fileURLToPath } from "node:url";
import { NotRun, oneLine, pause, within } from "../lib/limits.ts";
import type { Runtime } from "../lib/runtimes.ts";

/** The sum that only the server's `add` tool can come to: no model and no client is told it. */
export const TERMS = { a: 400_000, b: 4_142 };
export const SUM = String(TERMS.a + TERMS.b);

/** Nobody listens here: a program that is not content with loopback gets no further than its own machine. */
const NO_WAY_OUT = "http://127.0.0.1:9";

/** A port that was free a moment ago, for programs that must be told one. */
export function freePort(): number {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  listener.close();
  return listener.addr.port;
}

/** The end of what a program says, where it says what went wrong. */
function lastWords(text: string): string {
  return oneLine(text).slice(-400);
}

/** Demands words of what a program has written. */
export function mustShow(text: string, ...expected: string[]): void {
  for (const words of expected) {
    if (!text.includes(words)) throw new Error(`it did not come to ${words}: ${lastWords(text)}`);
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Processes
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface StartOptions {
  cwd?: string;
  env?: Record<string, string>;
  /** Leaves its standard input open, for `write`: many programs take an open one for more to come, and wait. */
  input?: boolean;
}

/** A process, and what it has written. Whatever it starts ends with it. */
export class Running {
  /** Everything it has written so far; `output` holds both streams as they came. */
  stdout = "";
  output = "";
  readonly exit: Promise<number>;
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array> | undefined;
  #ended = false;

  constructor(command: string, args: string[], { input, ...options }: StartOptions) {
    this.#child = spawn(command, {
      args,
      ...options,
      clearEnv: true,
      stdin: input ? "piped" : "null",
      stdout: "piped",
      stderr: "piped",
    });
    this.#stdin = input ? this.#child.stdin.getWriter() : undefined;
    const read = [
      this.#read(this.#child.stdout, (text) => this.stdout += text).catch(() => {}),
      this.#read(this.#child.stderr, () => {}).catch(() => {}),
    ];
    this.exit = this.#child.status.then(async ({ code }) => {
      this.#ended = true;
      endGroup(this.#child);
      // One that has left the group may hold the streams open; what the program itself wrote has arrived by then.
      await Promise.race([Promise.all(read), pause(500)]);
      return code;
    });
  }

  async #read(stream: ReadableStream<Uint8Array>, keep: (text: string) => void): Promise<void> {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      keep(text);
      this.output += text;
    }
  }

  async write(line: string): Promise<void> {
    await this.#stdin?.write(new TextEncoder().encode(`${line}\n`));
  }

  /** Waits until `look` finds something; never longer than the process lives. */
  async until<T>(look: () => T | undefined | Promise<T | undefined>, what: string): Promise<T> {
    while (true) {
      const ended = this.#ended;
      const found = await look();
      if (found !== undefined) return found;
      if (ended) throw new Error(`it ended without ${what}: ${lastWords(this.output)}`);
      await pause(25);
    }
  }

  /** Asks the process to end. */
  terminate(): void {
    try {
      this.#child.kill("SIGTERM");
    } catch {
      // It has ended by itself.
    }
  }

  /** Ends it and its group. */
  end(): void {
    if (!this.#ended) endGroup(this.#child);
  }
}

/** Starts a process as the head of a group of its own. */
export function spawn(command: string, options: Deno.CommandOptions): Deno.ChildProcess {
  try {
    return new Deno.Command(command, { ...options, detached: true }).spawn();
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) throw new NotRun(`there is no ${command} on this machine`);
    throw error;
  }
}

/** Ends a process and what it has started. */
export function endGroup(child: Deno.ChildProcess): void {
  try {
    Deno.kill(-child.pid, "SIGKILL");
  } catch {
    // Nobody is left.
  }
}

/**
 * Ends what has left its group (a program under a terminal, a daemon): it is known by its environment, which names the
 * pen. Where there is no /proc the groups have to do.
 */
function endStrays(mark: string): void {
  let entries: Deno.DirEntry[];
  try {
    entries = [...Deno.readDirSync("/proc")];
  } catch {
    return;
  }
  for (const { name } of entries) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const environment = Deno.readTextFileSync(`/proc/${name}/environ`).split("\0");
      if (environment.includes(`ZOO_PEN=${mark}`)) Deno.kill(Number(name), "SIGKILL");
    } catch {
      // Ended meanwhile, or somebody else's.
    }
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The pen
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Where one program lives while it is looked at. */
export class Pen {
  readonly home: string;
  readonly server: Server;
  readonly owner: Owner;
  readonly #installed: string;
  readonly #opened: string;
  readonly #environment: Record<string, string>;
  readonly #running: Running[] = [];
  readonly #closers: (() => unknown)[] = [];
  /** The owner's browser is on another computer than the program, whose loopback addresses it cannot reach. */
  elsewhere = false;
  #seen = 0;
  #closed = false;

  /**
   * @param root the folder for everything that is left behind
   * @param site the server that the program meets
   * @param installed where npm has put the program, if it is one of npm's
   * @param node the folder with the `node` that runs it
   */
  constructor(root: string, site: Site, installed?: string, node?: string) {
    this.#installed = installed ?? "";
    this.home = `${root}/home`;
    this.#opened = `${root}/opened`;
    const bin = `${root}/bin`;
    for (const folder of [this.home, bin, `${root}/tmp`]) Deno.mkdirSync(folder, { recursive: true });
    Deno.writeTextFileSync(this.#opened, "");
    // Programs open a browser by one of these names, or by $BROWSER: this one only writes down where it should go.
    const browsers = ["xdg-open", "open", "x-www-browser", "www-browser", "sensible-browser", "browser"];
    for (const name of browsers) {
      const script = `#!/bin/sh\nprintf '%s\\n' "$1" >> '${this.#opened}'\n`;
      Deno.writeTextFileSync(`${bin}/${name}`, script, { mode: 0o755 });
    }
    this.#environment = {
      PATH: [bin, node, Deno.env.get("PATH")].filter(Boolean).join(":"),
      HOME: this.home,
      TMPDIR: `${root}/tmp`,
      BROWSER: `${bin}/browser`,
      TERM: "dumb",
      LANG: "C.UTF-8",
      NO_COLOR: "1",
      HTTP_PROXY: NO_WAY_OUT,
      HTTPS_PROXY: NO_WAY_OUT,
      ALL_PROXY: NO_WAY_OUT,
      NO_PROXY: "localhost,127.0.0.1,::1",
      ZOO_PEN: root,
    };
    this.server = new Server(this, root, site);
    this.owner = new Owner(this.server);
  }

  /** An executable of the program's package. */
  bin(name: string): string {
    return `${this.#installed}/node_modules/.bin/${name}`;
  }

  start(command: string, args: string[], { env, ...options }: StartOptions = {}): Running {
    return this.add(
      new Running(command, args, { cwd: this.home, ...options, env: { ...this.#environment, ...env } }),
    );
  }

  add(running: Running): Running {
    this.#running.push(running);
    if (this.#closed) running.end();
    return running;
  }

  /** Runs a program to its good end, and returns what it wrote. */
  async run(command: string, args: string[], options?: StartOptions): Promise<Running> {
    return await finished(this.start(command, args, options));
  }

  /** Opens a page in the owner's browser, as programs do by themselves. */
  open(url: string): void {
    Deno.writeTextFileSync(this.#opened, `${url}\n`, { append: true });
  }

  /** The owner follows the next page that was opened, or that the program opens, and approves what it asks. */
  async approveFor(program?: Running): Promise<void> {
    const next = () => this.#pages()[this.#seen];
    const page = program ? await program.until(next, "opening a browser") : next();
    if (page === undefined) throw new Error("no browser was opened");
    this.#seen++;
    await this.approve(page);
  }

  /** The owner approves what a page asks; the answer arrives at the program. */
  async approve(page: string): Promise<void> {
    const address = await this.owner.approve(page, this.elsewhere ? "approve_elsewhere" : "approve");
    // An address that was only shown is opened on the program's computer, with curl for example.
    const response = await fetch(address);
    const answer = textOf(await response.text());
    if (!response.ok) throw new Error(`the client did not like the answer: ${response.status} ${lastWords(answer)}`);
  }

  /** The address that the owner, at another computer, is shown for the request that a program has printed. */
  async approvePrinted(program: Running): Promise<string> {
    const printed = () => program.output.match(/\bhttp:[\w:./-]+\/authorize\?[\w%&=.~+-]+(?=[^\w%&=.~+-])/)?.[0];
    const page = await program.until(printed, "printing where to sign in");
    return (await this.owner.approve(page, "approve_elsewhere")).href;
  }

  /** What a program does that must ask the owner. */
  async asking(task: () => Promise<void>): Promise<void> {
    const before = this.owner.approvals;
    await task();
    if (this.owner.approvals === before) throw new Error("it got in without the owner");
  }

  /** What a program does that must not ask the owner: it was let in before. */
  async unasked(task: () => Promise<void>): Promise<void> {
    const before = this.#pages().length;
    let done = false;
    const asked = (async () => {
      while (!done || this.#pages().length > before) {
        const page = this.#pages()[before];
        if (page !== undefined) throw new Error(`it asked the owner again: ${page}`);
        await pause(50);
      }
    })();
    await Promise.race([task().finally(() => done = true), asked]);
    await asked;
  }

  #pages(): string[] {
    return Deno.readTextFileSync(this.#opened).split("\n").slice(0, -1);
  }

  /** Something to be called when the pen is closed. */
  atClose(close: () => unknown): void {
    this.#closers.push(close);
  }

  /** Everything the programs and the server have written, for whoever has to find out what went wrong. */
  get log(): string {
    return this.#running.map(({ output }) => output).filter(Boolean).join("\n----\n");
  }

  close(): void {
    this.#closed = true;
    for (const running of this.#running) running.end();
    endStrays(this.#environment.ZOO_PEN!);
    for (const close of this.#closers) close();
  }
}

/** Waits for a program's end, which has to be a good one. */
export async function finished(running: Running): Promise<Running> {
  const code = await running.exit;
  if (code !== 0) throw new Error(`it ended with status ${code}: ${lastWords(running.output)}`);
  return running;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The server
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What serves, and on what. */
export interface Site {
  /** The server's runtime changes at each start: what one has written, the next one has to read. */
  runtimes: Runtime[];
  /** A program beside this file, in place of `example.ts`. */
  script?: string | undefined;
  env?: Record<string, string> | undefined;
}

/** `example.ts`, as its own header says to run it, or another program that takes the same environment. */
export class Server {
  readonly password: string = crypto.randomUUID();
  readonly url: string;
  readonly mcpUrl: string;
  readonly #pen: Pen;
  readonly #root: string;
  readonly #site: Site;
  readonly #port = freePort();
  #starts = 0;
  /** Which of its memories it has. */
  state = 1;
  #running: Running | undefined;

  constructor(pen: Pen, root: string, site: Site) {
    this.#pen = pen;
    this.#root = root;
    this.#site = site;
    this.url = `http://localhost:${this.#port}`;
    this.mcpUrl = `${this.url}/mcp`;
  }

  /** What it runs on. */
  get runtime(): Runtime {
    const { runtimes } = this.#site;
    return runtimes[Math.max(0, this.#starts - 1) % runtimes.length]!;
  }

  async start(): Promise<void> {
    this.#starts++;
    const { command: [executable, ...before], env: extra } = this.runtime;
    const script = fileURLToPath(new URL(this.#site.script ?? "../../example.ts", import.meta.url));
    const env = {
      ...Deno.env.toObject(),
      ...extra,
      ...this.#site.env,
      PORT: String(this.#port),
      BASE_URL: this.url,
      OWNER_PASSWORD: this.password,
      STATE_DIR: `${this.#root}/state-${this.state}`,
    };
    const running = this.#pen.add(new Running(executable!, [...before, script], { env }));
    this.#running = running;
    await running.until(() => this.#answers(), "answering");
  }

  async #answers(): Promise<true | undefined> {
    try {
      const response = await fetch(`${this.url}/.well-known/oauth-authorization-server`);
      await response.body?.cancel();
      return response.ok || undefined;
    } catch {
      return undefined;
    }
  }

  async stop(): Promise<void> {
    if (!this.#running) return;
    this.#running.terminate();
    await within(10, finished(this.#running)); // also while clients hold connections open
  }

  async restart(): Promise<void> {
    await this.stop();
    await this.start();
  }

  /** The same server with all its state lost: it knows no client, no token and no browser any more. */
  async forget(): Promise<void> {
    this.state++;
    await this.restart();
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The owner
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The owner at a browser: cookies, forms and redirects, but no script, which the pages have to do without. */
export class Owner {
  readonly #server: Pick<Server, "url" | "password" | "state">;
  /** By host name alone: ports do not keep cookies apart. */
  readonly #cookies = new Map<string, Map<string, string>>();
  approvals = 0;
  /** What the last page that asked has said. */
  asked = "";
  /** Which of the server's memories holds this browser's session. */
  #session = 0;

  constructor(server: Pick<Server, "url" | "password" | "state">) {
    this.#server = server;
  }

  /**
   * Opens what a client wants approved, signs in if asked, and approves.
   *
   * @param decision `approve_elsewhere` if the client is on another computer
   * @returns where the answer goes: the browser would follow a redirect or a link there, or shows it
   */
  async approve(url: string, decision: "approve" | "approve_elsewhere" = "approve"): Promise<URL> {
    let at = new URL(url);
    let response = await this.#request(at);
    let forms = 0;
    while (true) {
      const location = response.headers.get("Location");
      const page = await response.text();
      const seen = `${response.status} ${oneLine(textOf(page)).slice(0, 300)}`;
      if (location !== null && response.status >= 300 && response.status < 400) {
        if (decision === "approve_elsewhere" && forms > 0) throw new Error("the owner was sent to the own computer");
        at = new URL(location, at);
      } else if (forms > 0) {
        at = new URL(shownAddress(page) ?? at);
      }
      if (at.origin !== this.#server.url) {
        if (forms === 0) throw new Error(`the owner was sent back without a question, to ${at.href}`);
        if (at.searchParams.has("error")) throw new Error(`the client is told of an error: ${at.href}`);
        this.approvals++;
        return at;
      }
      if (location !== null) {
        response = await this.#request(at);
        continue;
      }
      const form = approvalForm(page, at, decision);
      if (!form || ++forms > 1) throw new Error(`the owner cannot approve this: ${seen}`);
      this.asked = oneLine(textOf(page));
      const signedIn = this.#session === this.#server.state;
      if (form.password && signedIn) throw new Error(`the owner was asked for the password again: ${seen}`);
      if (!form.password && !signedIn) throw new Error(`the owner was not asked for the password: ${seen}`);
      if (form.password) form.fields.set(form.password, this.#server.password);
      this.#session = this.#server.state;
      at = form.action;
      response = await this.#request(at, form.fields);
    }
  }

  async #request(url: URL, form?: URLSearchParams): Promise<Response> {
    const cookies = this.#cookies.get(url.hostname) ?? new Map<string, string>();
    this.#cookies.set(url.hostname, cookies);
    const response = await fetch(url, {
      method: form ? "POST" : "GET",
      ...(form && { body: form }),
      redirect: "manual",
      headers: {
        "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0",
        ...(cookies.size > 0 && { "Cookie": [...cookies].map((cookie) => cookie.join("=")).join("; ") }),
        ...(form && { "Origin": url.origin }),
      },
    });
    for (const cookie of response.headers.getSetCookie()) {
      const [, name = "", value = ""] = cookie.match(/^([^=;]*)=([^;]*)/) ?? [];
      if (value === "") cookies.delete(name);
      else cookies.set(name, value);
    }
    return response;
  }
}

interface Form {
  action: URL;
  fields: URLSearchParams;
  /** The name of the field that wants the password. */
  password: string | undefined;
}

/** The form that has a button to approve with, filled in as a browser would send it when that button is pressed. */
function approvalForm(page: string, at: URL, decision: string): Form | undefined {
  for (const [, head = "", body = ""] of page.matchAll(new RegExp(`<form\\b(${INSIDE})>(.*?)</form>`, "gis"))) {
    const tags = [...body.matchAll(new RegExp(`<(?:input|button)\\b(${INSIDE})>`, "gi"))].map(([, text = ""]) =>
      attributes(text)
    );
    const approve = tags.find((tag) => tag.get("name") === "decision" && tag.get("value") === decision);
    if (!approve) continue;
    const sent = tags.filter((tag) =>
      tag.get("type") === "hidden" || (/^(checkbox|radio)$/.test(tag.get("type") ?? "") && tag.has("checked"))
    );
    const fields = [...sent, approve].map((tag) => [tag.get("name") ?? "", tag.get("value") ?? ""]);
    return {
      action: new URL(attributes(head).get("action") ?? "", at),
      fields: new URLSearchParams(fields),
      password: tags.find((tag) => tag.get("type") === "password")?.get("name"),
    };
  }
}

/** An answer that the page holds: a link into an app, or an address to be copied. */
function shownAddress(page: string): string | undefined {
  const address = page.match(/(?:href="|<code[^>]*>)([^"<]*[?&](?:amp;)?code=[^"<]*)/)?.[1];
  return address && unescapeHtml(address);
}

/** What may stand between the angle brackets of a tag. */
const INSIDE = `(?:"[^"]*"|'[^']*'|[^'">])*`;

function attributes(tag: string): Map<string, string> {
  const pairs = tag.matchAll(/([^\s=\/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+)))?/g);
  return new Map(
    [...pairs].map(([, name = "", a, b, c]) => [name.toLowerCase(), unescapeHtml(a ?? b ?? c ?? "")]),
  );
}

function unescapeHtml(text: string): string {
  const named: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };
  return text.replace(/&(?:#(\d+)|#x([0-9a-f]+)|(\w+));/gi, (all, decimal, hexadecimal, name) => {
    if (name) return named[name] ?? all;
    return String.fromCodePoint(decimal ? Number(decimal) : parseInt(hexadecimal, 16));
  });
}

/** The words of a page. */
function textOf(page: string): string {
  return unescapeHtml(page.replace(/<(head|style|script)\b.*?<\/\1>/gis, " ").replace(/<[^>]*>/g, " "));
}
