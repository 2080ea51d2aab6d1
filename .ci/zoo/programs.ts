/**
 * The programs that bring their own user interface: how each is told of a server, signs in, and calls a tool.
 *
 * @module
 */

import { NotRun } from "../lib/limits.ts";
import { finished, freePort, mustShow, type Pen, type Running, type Site, SUM, TERMS } from "./kit.ts";
import { startModel } from "./model.ts";

/** What the table of clients in README.md says, column by column. */
export const COLUMNS = ["signs in", "calls a tool", "refreshes", "after a restart", "from another computer"] as const;
export type Cells = Partial<Record<(typeof COLUMNS)[number], string>>;

/** `shows`: the cells of the table that this check fills in, if it succeeds. */
export type Check = [what: string, run: () => Promise<void>, shows?: Cells];

/** One kind of client. */
export interface Program {
  name: string;
  /** Its row in the table of clients: what it is called there, and how it was tried. Without one, it has no row. */
  row?: { client: string; tried: string; version?: string };
  /** The npm package it comes in, with its version. Without one, it is a library that is loaded when it is needed. */
  npm?: string;
  /** Its checks do not build on each other: a failed one says nothing of those that follow. */
  independent?: true;
  /** What it meets in place of `example.ts`. */
  site?: () => Pick<Site, "script" | "env">;
  checks(pen: Pen): Check[] | Promise<Check[]>;
}

export const TRIED = { program: "the program itself", library: "the library itself" };

/** What can be asked of every client. */
export interface Habits {
  /** Connects for the first time, with the owner's help. */
  signIn(): Promise<void>;
  /** Lists the tools and calls one, without the owner. */
  use(): Promise<void>;
  /** Puts something else in the place of the access token that it keeps. */
  spoilToken?(): void;
  /**
   * How it gets the answer of an owner whose browser is on another computer, for which it may look at `pen.elsewhere`;
   * or what the table says of one that takes no answer at a port of its own.
   */
  elsewhere?: string | { without: string };
}

/** What every client has to live through. */
export function life(pen: Pen, habits: Habits): Check[] {
  const { signIn, use, spoilToken = () => spoilTokens(pen.home), elsewhere = "by `curl`" } = habits;
  const without = typeof elsewhere === "object" && { "from another computer": elsewhere.without };
  const checks: Check[] = [
    ["signs in", () => pen.asking(signIn), { "signs in": "yes", ...without }],
    ["lists and calls a tool", () => pen.unasked(use), { "calls a tool": "yes" }],
    ["lists and calls a tool after a restart of the server", async () => {
      await pen.server.restart();
      await pen.unasked(use);
    }, { "after a restart": "yes" }],
    ["renews its access by its refresh token, twice at the same time", async () => {
      spoilToken();
      await pen.unasked(async () => {
        await Promise.all([use(), use()]);
      });
    }, { "refreshes": "yes" }],
    ["signs in to a server that has forgotten it", async () => {
      await pen.server.forget();
      await pen.asking(signIn);
      await pen.unasked(use);
    }],
  ];
  if (typeof elsewhere === "string") {
    checks.push(["signs in with a browser on another computer", async () => {
      await pen.server.forget();
      pen.elsewhere = true;
      await pen.asking(signIn);
      pen.elsewhere = false;
      await pen.unasked(use);
    }, { "from another computer": elsewhere }]);
  }
  return checks;
}

/** Makes all access tokens in a program's files such as the server would not know: the same as if they had expired. */
function spoilTokens(home: string): void {
  let found = false;
  for (const file of files(home)) {
    const before = Deno.readTextFileSync(file);
    if (before.includes("\0")) continue; // not text
    const after = before.replace(/\bpat_[0-9a-f]+/g, (token) => `pat_${"0".repeat(token.length - 4)}`);
    if (after === before) continue;
    Deno.writeTextFileSync(file, after);
    found = true;
  }
  if (!found) throw new Error("it keeps its access token where it cannot be found");
}

/** All files in a folder and below. */
function* files(folder: string): Generator<string> {
  for (const { name, isDirectory, isFile } of Deno.readDirSync(folder)) {
    if (isDirectory) yield* files(`${folder}/${name}`);
    else if (isFile) yield `${folder}/${name}`;
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// mcp-remote
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What stands in Claude Desktop's configuration file for servers it cannot reach by itself: a proxy to stdio. */
export const mcpRemote: Program = {
  name: "mcp-remote",
  row: { client: "mcp-remote", tried: TRIED.program },
  npm: "mcp-remote@0.15.1",
  checks(pen) {
    const start = () => new Stdio(pen.start(pen.bin("mcp-remote"), [pen.server.mcpUrl], { input: true }));

    async function signIn(): Promise<void> {
      const proxy = start();
      const connected = proxy.initialize();
      await Promise.race([pen.approveFor(proxy.program), connected]);
      await connected;
      await proxy.end();
    }

    async function use(): Promise<void> {
      const proxy = start();
      await proxy.initialize();
      await proxy.listAndCall();
      await proxy.end();
    }

    return [
      ...life(pen, { signIn, use }),
      ["goes on while the server is restarted", () =>
        pen.unasked(async () => {
          const proxy = start();
          await proxy.initialize();
          await pen.server.restart();
          await proxy.listAndCall();
          await proxy.end();
        })],
      ["registers again with a server that has forgotten it, when its tokens are lost as well", async () => {
        await pen.server.forget();
        let registration = "";
        for (const file of files(`${pen.home}/.mcp-auth`)) {
          if (file.endsWith("_tokens.json")) await Deno.remove(file);
          if (file.endsWith("_client_info.json")) registration = file;
        }
        const before = registered(registration);
        // Without tokens it asks /authorize before it opens the browser. It registers again on what it hears there, but
        // keeps the sign-in of the old registration in mind and opens no browser for the new one before its next start.
        const proxy = start();
        const connecting = proxy.initialize().catch(() => {});
        await proxy.program.until(() => {
          const now = registered(registration);
          return now !== before ? now : undefined;
        }, "registering again");
        await proxy.end();
        await connecting;
        await pen.asking(signIn);
        await pen.unasked(use);
      }],
    ];
  },
};

/** The client_id in a file, if that is there and has been written to the end. */
function registered(file: string): string | undefined {
  try {
    return JSON.parse(Deno.readTextFileSync(file)).client_id;
  } catch {
    return undefined;
  }
}

/** The side of the MCP stdio transport that Claude Desktop has. */
class Stdio {
  readonly program: Running;
  #id = 0;

  constructor(program: Running) {
    this.program = program;
  }

  async initialize(): Promise<void> {
    const clientInfo = { name: "claude-ai", version: "0.1.0" };
    await this.#request("initialize", { protocolVersion: "2025-06-18", capabilities: {}, clientInfo });
    await this.program.write(JSON.stringify({ jsonrpc: "2.0", method: "notifications/initialized" }));
  }

  async listAndCall(): Promise<void> {
    mustShow(await this.#request("tools/list", {}), "greet", "add");
    mustShow(await this.#request("tools/call", { name: "add", arguments: TERMS }), SUM);
  }

  async end(): Promise<void> {
    this.program.terminate();
    await this.program.exit;
  }

  async #request(method: string, params: Record<string, unknown>): Promise<string> {
    const id = ++this.#id;
    await this.program.write(JSON.stringify({ jsonrpc: "2.0", id, method, params }));
    const answer = () => {
      const lines = this.program.stdout.split("\n").slice(0, -1).filter((line) => line.startsWith("{"));
      return lines.map((line) => JSON.parse(line)).find((message) => message.id === id && !("method" in message));
    };
    const { result, error } = await this.program.until(answer, `an answer to ${method}`);
    if (error) throw new Error(`${method} was answered by ${JSON.stringify(error)}`);
    return JSON.stringify(result);
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// MCP Inspector
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const inspector: Program = {
  name: "inspector",
  row: { client: "MCP Inspector, `--cli`", tried: TRIED.program },
  npm: "@modelcontextprotocol/inspector@2.12.0",
  checks(pen) {
    const env = {
      MCP_AUTO_OPEN_ENABLED: "true",
      MCP_OAUTH_CALLBACK_URL: `http://127.0.0.1:${freePort()}/oauth/callback`,
      MCP_INSPECTOR_SECRET_STORE: "file", // not the machine's key chain
    };
    const start = (...args: string[]) =>
      pen.start(pen.bin("mcp-inspector"), ["--cli", pen.server.mcpUrl, "--format", "json", ...args], { env });
    const list = () => start("--method", "tools/list");
    const call = () => start("--method", "tools/call", "--tool-name", "add", "--tool-args-json", JSON.stringify(TERMS));

    return life(pen, {
      async signIn() {
        const program = list();
        await pen.approveFor(program);
        await finished(program);
      },
      async use() {
        mustShow((await finished(list())).stdout, "greet", "add");
        mustShow((await finished(call())).stdout, SUM);
      },
    });
  },
};

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Agents in a terminal
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const PROMPT = "Add the numbers.";

/** Demands that the model was offered both tools, and was brought the sum. */
function mustConclude({ output }: Running): void {
  mustShow(output, "The tool answered", SUM, "_add", "_greet");
}

export const claudeCode: Program = {
  name: "claude-code",
  row: { client: "Claude Code", tried: TRIED.program },
  npm: "@anthropic-ai/claude-code@2.1.330",
  checks(pen) {
    if (Deno.build.os !== "linux") throw new NotRun("it would keep its tokens in this machine's key chain");
    const model = startModel(pen);
    const env = {
      ANTHROPIC_BASE_URL: model,
      ANTHROPIC_API_KEY: "zoo",
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
      DISABLE_AUTOUPDATER: "1",
      ENABLE_TOOL_SEARCH: "false", // all tools are in the first request, for a model that does not search
    };
    const claude = (...args: string[]) => pen.run(pen.bin("claude"), args, { env });

    async function signIn(): Promise<void> {
      // It signs in at a terminal only.
      const command = `'${pen.bin("claude")}' mcp login ${pen.elsewhere ? "--no-browser " : ""}zoo`;
      const program = pen.start("script", ["-qefc", command, "/dev/null"], { env, input: true });
      if (!pen.elsewhere) await pen.approveFor(program);
      else await program.write(await pen.approvePrinted(program));
      await finished(program);
      mustShow(program.output, "Authenticated");
    }

    async function use(): Promise<void> {
      mustShow((await claude("mcp", "list")).output, "Connected");
      mustConclude(await claude("-p", PROMPT, "--allowedTools", "mcp__zoo__add"));
    }

    return [
      ["is told of the server", async () => {
        await claude("mcp", "add", "--transport", "http", "zoo", pen.server.mcpUrl);
        mustShow((await claude("mcp", "list")).output, "Needs authentication");
      }],
      ...life(pen, { signIn, use, elsewhere: "pasted" }),
      ["signs out, and in again", async () => {
        await claude("mcp", "logout", "zoo");
        mustShow((await claude("mcp", "list")).output, "Needs authentication");
        await pen.asking(signIn);
        await pen.unasked(use);
      }],
    ];
  },
};

export const codex: Program = {
  name: "codex",
  row: { client: "Codex CLI", tried: TRIED.program },
  npm: "@openai/codex@0.169.0",
  checks(pen) {
    const model = startModel(pen);
    Deno.mkdirSync(`${pen.home}/.codex`);
    Deno.writeTextFileSync(
      `${pen.home}/.codex/config.toml`,
      `model = "zoo"
       model_provider = "zoo"
       mcp_oauth_credentials_store = "file"
       [model_providers.zoo]
       name = "zoo"
       base_url = "${model}/v1"
       wire_api = "responses"
      `,
    );
    async function login(...args: string[]): Promise<void> {
      const program = pen.start(pen.bin("codex"), ["mcp", ...args], { input: pen.elsewhere });
      if (!pen.elsewhere) await pen.approveFor(program);
      else await program.write(await pen.approvePrinted(program));
      await finished(program);
      mustShow(program.output, "Successfully logged in");
    }

    async function use(): Promise<void> {
      mustShow((await pen.run(pen.bin("codex"), ["mcp", "list"])).stdout, "OAuth");
      const approved = `mcp_servers.zoo.default_tools_approval_mode="approve"`;
      const args = ["exec", "--skip-git-repo-check", "-c", approved, PROMPT];
      mustConclude(await pen.run(pen.bin("codex"), args));
    }

    let added = false;
    async function signIn(): Promise<void> {
      const again = ["login", "zoo", ...(pen.elsewhere ? ["--no-browser"] : [])];
      await login(...(added ? again : ["add", "zoo", "--url", pen.server.mcpUrl]));
      added = true;
    }

    return [
      ...life(pen, { signIn, use, elsewhere: "pasted" }),
      ["signs out, and in again with a dynamic registration", async () => {
        await pen.run(pen.bin("codex"), ["mcp", "logout", "zoo"]);
        await pen.asking(() => login("login", "zoo", "--oauth-client-registration", "dcr"));
        await pen.unasked(use);
      }],
    ];
  },
};

export const opencode: Program = {
  name: "opencode",
  row: { client: "opencode", tried: TRIED.program },
  npm: "opencode-ai@1.18.33",
  checks(pen) {
    const model = startModel(pen);
    const env = { OPENCODE_DISABLE_AUTOUPDATE: "1", OPENCODE_DISABLE_MODELS_FETCH: "1" };
    Deno.writeTextFileSync(
      `${pen.home}/opencode.json`,
      JSON.stringify({
        mcp: { zoo: { type: "remote", url: pen.server.mcpUrl, oauth: { callbackPort: freePort() } } },
        model: "anthropic/zoo",
        small_model: "anthropic/zoo",
        provider: {
          anthropic: { options: { baseURL: `${model}/v1`, apiKey: "zoo" }, models: { zoo: { name: "zoo" } } },
        },
      }),
    );

    return life(pen, {
      async signIn() {
        // It finds out here that it has nothing, or nothing that is good any more.
        mustShow((await pen.run(pen.bin("opencode"), ["mcp", "list"], { env })).output, "needs authentication");
        const program = pen.start(pen.bin("opencode"), ["mcp", "auth", "zoo"], { env });
        await pen.approveFor(program);
        await finished(program);
        mustShow(program.output, "Authentication successful");
      },
      async use() {
        mustShow((await pen.run(pen.bin("opencode"), ["mcp", "list"], { env })).output, "connected");
        mustConclude(await pen.run(pen.bin("opencode"), ["run", PROMPT], { env }));
      },
    });
  },
};

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The official conformance suite
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const conformance: Program = {
  name: "conformance",
  npm: "@modelcontextprotocol/conformance@0.2.0-alpha.12",
  independent: true,
  async checks(pen) {
    const { stdout } = await pen.run(pen.bin("conformance"), ["list", "--authorization"]);
    const versions = new Set(stdout.match(/\b\d{4}-\d{2}-\d{2}\b/g));
    if (versions.size === 0) throw new Error(`it lists no version of the specification: ${stdout}`);
    // Naming the resource is new in alpha.12; clients of before it do without.
    return [...versions].flatMap((version): Check[] => [
      [`specification ${version}`, async () => {
        await pen.server.restart();
        await conform(pen, version);
      }],
      [`specification ${version}, with a resource`, () => conform(pen, version, { resource: pen.server.mcpUrl })],
    ]);
  },
};

async function conform(pen: Pen, version: string, more: Record<string, string> = {}): Promise<void> {
  const port = freePort();
  const registration = await fetch(`${pen.server.url}/register`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ client_name: "conformance", redirect_uris: [`http://127.0.0.1:${port}/callback`] }),
  });
  if (!registration.ok) throw new Error(`registration: ${registration.status} ${await registration.text()}`);
  const { client_id } = await registration.json();
  const results = `${pen.home}/results-${port}`;
  const settings = {
    url: pen.server.url,
    "client-id": client_id,
    port,
    "output-dir": results,
    "spec-version": version,
    ...more,
  };
  const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
  const suite = pen.start(pen.bin("conformance"), ["authorization", ...args]);
  // It prints where to go before it listens for the answer.
  const question = () => suite.stdout.match(/^(http\S+\/authorize\?\S+)$[^]*^Callback server started/m)?.[1];
  await pen.approve(await suite.until(question, "an authorization request"));
  await suite.exit;
  const statuses = [];
  for (const file of files(results)) {
    for (const { id, status, errorMessage } of JSON.parse(Deno.readTextFileSync(file))) {
      // Its exit status lets warnings and skipped checks pass.
      if (status !== "SUCCESS" && status !== "INFO") throw new Error(`${status} ${id}: ${errorMessage}`);
      statuses.push(status);
    }
  }
  await finished(suite);
  if (!statuses.includes("SUCCESS")) throw new Error("it has checked nothing");
}
