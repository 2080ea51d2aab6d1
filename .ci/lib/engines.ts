/**
 * Database servers on this machine's loopback, each with a folder of its own, that can be frozen, killed and started
 * again. They are installed from Debian where that is possible; what cannot be had is {@linkcode NotRun}.
 *
 * @module
 */

import { createServer } from "node:net";
import { join } from "node:path";
import { afterwards, run, Running, temporaryFolder, until } from "./checks.ts";
import { NotRun, oneLine, pause } from "./limits.ts";

export interface Engine {
  /** For `open()` of stores.ts. */
  url: string;
  /** All of its processes stand still until `thaw`. Absent: it is no process. */
  freeze?(): Promise<unknown>;
  thaw?(): Promise<unknown>;
  /** `kill -9`; `start` brings it back with what it had on its disk. */
  kill?(): Promise<unknown>;
  start?(): Promise<unknown>;
  /** The end of its log, if it is a process. */
  log?(): string;
}

export async function freePort(): Promise<number> {
  return await new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolve(port));
    });
  });
}

/** Installs the packages of the engines' clients; the folder is for STORE_PACKAGES. */
export async function installClients(...packages: string[]): Promise<string> {
  const folder = temporaryFolder();
  try {
    await run("npm", "install", "--no-audit", "--no-fund", "--prefix", folder, ...packages);
  } catch (error) {
    throw new NotRun(`the clients cannot be installed: ${(error as Error).message}`);
  }
  Deno.env.set("STORE_PACKAGES", folder);
  return folder;
}

async function found(command: string, debianPackage: string): Promise<void> {
  const there = () => run("sh", "-c", `command -v ${command}`).then(() => true, () => false);
  if (await there()) return;
  await run("apt-get", "update", "-qq").catch(() => {});
  await run("apt-get", "install", "-y", "-qq", debianPackage).catch(() => {});
  if (!await there()) throw new NotRun(`no ${command} here, and none to be installed`);
}

const succeeds = (task: Promise<unknown>) => task.then(() => true, () => false);

/** A server, whose children get the same signals, and which ends when this program does. */
export class Process {
  #running: Running | undefined;
  readonly #command: string[];
  readonly #answers: () => Promise<boolean>;
  readonly #env: Record<string, string>;

  constructor(command: string[], answers: () => Promise<boolean>, env: Record<string, string> = {}) {
    this.#command = command;
    this.#answers = answers;
    this.#env = env;
  }

  start = async (): Promise<void> => {
    const running = new Running("setpriv", ["--pdeathsig", "KILL", ...this.#command], this.#env);
    this.#running = running;
    afterwards(() => this.kill()); // before Running ends it, which knows nothing of its children
    try {
      await until("it answers", 60, async () => running.ended || await this.#answers());
    } catch (error) {
      throw new Error(`${this.#command[0]}: ${(error as Error).message}; it said: ${this.output}`);
    }
    if (running.ended) throw new Error(`${this.#command[0]} ended: ${this.output}`);
  };

  get ended(): boolean {
    return this.#running?.ended ?? true;
  }

  /** The end of what it has printed. */
  get output(): string {
    return oneLine(this.#running?.output.slice(-1000) ?? "");
  }

  async #signal(signal: string): Promise<void> {
    if (!this.#running || this.#running.ended) return;
    const pid = String(this.#running.pid);
    const children = await run("ps", "-o", "pid=", "--ppid", pid).catch(() => "");
    for (const each of [pid, ...children.split(/\s+/).filter(Boolean)]) {
      await run("kill", `-${signal}`, each).catch(() => {}); // it may have just ended
    }
  }

  freeze = (): Promise<unknown> => this.#signal("STOP");
  thaw = (): Promise<unknown> => this.#signal("CONT");
  kill = async (): Promise<void> => {
    await this.#signal("KILL");
    await this.#running?.kill();
  };
}

/** Redis, set to lose nothing: every change is on its disk before it is answered. */
async function redis(): Promise<Engine> {
  await found("redis-server", "redis-server");
  const [port, dir] = [await freePort(), temporaryFolder()];
  const options = ["--port", `${port}`, "--bind", "127.0.0.1", "--dir", dir, "--save", ""];
  const durable = ["--appendonly", "yes", "--appendfsync", "always"];
  const url = `redis://127.0.0.1:${port}`;
  const ping = async () => (await run("redis-cli", "-p", `${port}`, "PING").catch(() => "")) === "PONG";
  const process = new Process(["redis-server", ...options, ...durable], ping);
  await process.start();
  return { url, ...methods(process) };
}

async function postgres(): Promise<Engine> {
  await found("psql", "postgresql");
  const version = await run("sh", "-c", "ls /usr/lib/postgresql | sort -n | tail -n 1").catch(() => "");
  const program = (name: string) => version ? `/usr/lib/postgresql/${version}/bin/${name}` : name;
  const [port, folder] = [await freePort(), temporaryFolder()];
  const dir = join(folder, "data");
  // It refuses to run as root, and Debian makes a user for it.
  const user = Deno.uid() === 0 ? ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] : [];
  if (user.length > 0) await run("chown", "postgres", folder);
  const as = (...command: string[]) => [...user, ...command] as [string, ...string[]];
  await run(...as(program("initdb"), "-D", dir, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"));
  const url = `postgres://postgres@127.0.0.1:${port}/postgres`;
  const answers = () => succeeds(run("psql", "-q", url, "-c", "SELECT 1"));
  // After a kill it would sync each of a thousand files by itself, which takes long on a busy disk.
  const settings = ["-c", "unix_socket_directories=", "-c", "recovery_init_sync_method=syncfs"];
  const options = ["-D", dir, "-p", `${port}`, "-h", "127.0.0.1", ...settings];
  const process = new Process(as(program("postgres"), ...options), answers);
  const start = async () => {
    // After a kill its children may hold on to their memory for a moment, and then it does not start.
    for (let attempt = 0;; attempt++) {
      try {
        return await process.start();
      } catch (error) {
        if (!process.ended || attempt > 20) throw error;
        await pause(100);
      }
    }
  };
  await start();
  const { TABLE } = await import("../stores/postgres.ts");
  await run("psql", "-q", url, "-c", TABLE);
  return { url, ...methods(process), start };
}

function methods(process: Process): Required<Omit<Engine, "url">> {
  const { freeze, thaw, kill, start } = process;
  return { freeze, thaw, kill, start, log: () => process.output };
}

/** Deno's local KV: a file, which every runtime opens by itself. */
function kvFile(): Promise<Engine> {
  return Promise.resolve({ url: join(temporaryFolder(), "kv") });
}

/** A KV that is asked over HTTP (KV Connect). Nobody packages it: `cargo install denokv --locked` takes ten minutes. */
async function denokv(): Promise<Engine> {
  const there = await succeeds(run("sh", "-c", "command -v denokv"));
  if (!there) throw new NotRun("no denokv here: cargo install denokv --locked");
  const [port, dir, token] = [await freePort(), temporaryFolder(), crypto.randomUUID()];
  Deno.env.set("DENO_KV_ACCESS_TOKEN", token); // for its clients
  const url = `http://127.0.0.1:${port}`;
  const options = ["--sqlite-path", join(dir, "kv.sqlite"), "serve", "--addr", `127.0.0.1:${port}`];
  const answers = () => succeeds(fetch(url).then((response) => response.body?.cancel()));
  const process = new Process(["denokv", ...options, "--access-token", token], answers);
  await process.start();
  return { url, ...methods(process) };
}

export const ENGINES: Record<string, { title: string; start(): Promise<Engine> }> = {
  redis: { title: "Redis", start: redis },
  postgres: { title: "Postgres", start: postgres },
  kv: { title: "Deno KV", start: kvFile },
  denokv: { title: "denokv", start: denokv },
};
