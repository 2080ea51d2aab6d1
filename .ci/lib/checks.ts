/**
 * What the checks share: a line for each of them and the sum at the end, processes and folders that are gone when the
 * program is.
 *
 * @module
 */

import { join } from "node:path";
import { NotRun, oneLine, pause, within } from "./limits.ts";
import { ROOT, type Runtime, runtimes } from "./runtimes.ts";
import { outcome, report, sum } from "./tally.ts";

export function demand(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

/** Asks until the answer is yes. */
export async function until(what: string, seconds: number, ask: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  while (!await ask()) {
    demand(performance.now() < deadline, `${what}: not within ${seconds} seconds`);
    await pause(20);
  }
}

/** `--name N` of the command line. */
export function numberArgument(name: string, otherwise: number): number {
  const at = Deno.args.indexOf(`--${name}`);
  const value = at < 0 ? otherwise : Number(Deno.args[at + 1]);
  demand(Number.isInteger(value) && value >= 0, `--${name} takes a whole number`);
  return value;
}

/** `--name TEXT` of the command line. */
export function textArgument(name: string): string | undefined {
  const at = Deno.args.indexOf(`--${name}`);
  return at < 0 ? undefined : Deno.args[at + 1];
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// One after the other
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * Runs one check and says how it went. `body` returns the figures to print behind the name; it has as many seconds as
 * given, and whatever it leaves behind is ended with it.
 */
export async function check(name: string, seconds: number, body: () => Promise<string | void>): Promise<void> {
  const mark = disposals.length;
  try {
    report("ok", name, await within(seconds, body(), "the check"));
  } catch (error) {
    report(outcome(error), name, error);
    if (outcome(error) === "FAILED") console.error(error);
  }
  await dispose(mark);
}

/** Ends and removes everything, prints the sum and leaves. */
export async function finish(): Promise<never> {
  await dispose(0);
  Deno.exit(sum());
}

const disposals: (() => unknown)[] = [];

/** Called when the check that is running has ended, in whatever way; the latest first. */
export function afterwards(dispose: () => unknown): void {
  disposals.push(dispose);
}

async function dispose(mark: number): Promise<void> {
  while (disposals.length > mark) {
    try {
      await disposals.pop()!();
    } catch (error) {
      console.error("clearing up:", error);
    }
  }
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  Deno.addSignalListener(signal, () => {
    dispose(0).finally(() => Deno.exit(130));
  });
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Folders and disks
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export function temporaryFolder(): string {
  const dir = Deno.makeTempDirSync({ prefix: "personal-auth-" });
  afterwards(() => Deno.removeSync(dir, { recursive: true }));
  return dir;
}

export async function run(command: string, ...args: string[]): Promise<string> {
  const env = { NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", LC_ALL: "C" };
  const options = { args, env, cwd: ROOT, stdin: "null", stdout: "piped", stderr: "piped" } as const;
  const { success, stdout, stderr } = await new Deno.Command(command, options).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  if (!success) throw new Error(`${command} ${args.join(" ")}: ${text(stderr) || text(stdout)}`);
  return text(stdout);
}

/** Runs what not every user may and not every machine can. */
async function runIfPossible(command: string, ...args: string[]): Promise<void> {
  if (Deno.uid() !== 0) throw new NotRun("only root can mount a disk for it");
  try {
    await run(command, ...args);
  } catch (error) {
    throw new NotRun((error as Error).message);
  }
}

/** A disk of its own in memory, as small as is told, in a mode as is told. */
export async function smallDisk(kilobytes: number): Promise<{ dir: string; readOnly(yes: boolean): Promise<void> }> {
  const dir = temporaryFolder();
  await runIfPossible("mount", "-t", "tmpfs", "-o", `size=${kilobytes}k,mode=0700`, "tmpfs", dir);
  afterwards(() => run("umount", "--lazy", dir));
  return { dir, readOnly: (yes) => runIfPossible("mount", "-o", `remount,${yes ? "ro" : "rw"}`, dir) };
}

/** A disk that can be lost: what was not synced to it is gone, as in a power cut. */
export interface FragileDisk {
  dir: string;
  /** The disk takes no more writes from now on, as after an error of the hardware: open files fail as well. */
  cut(): Promise<void>;
  /** As after the machine has come up again. Nobody may have a file open on it. */
  revive(): Promise<void>;
}

export async function fragileDisk(): Promise<FragileDisk> {
  const folder = temporaryFolder();
  const [image, dir] = [join(folder, "image"), join(folder, "disk")];
  Deno.mkdirSync(dir);
  Deno.writeFileSync(image, new Uint8Array());
  Deno.truncateSync(image, 64 * 1024 * 1024);
  await runIfPossible("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image);
  // Nothing is written back on its own while a check runs: what is to survive must have been synced.
  const attach = () => runIfPossible("mount", "-o", "loop,commit=300", image, dir);
  await attach();
  afterwards(() => run("umount", "--lazy", dir));
  return {
    dir,
    cut: () => runIfPossible("mount", "-o", "remount,abort", dir),
    async revive() {
      const unmount = () => run("umount", dir).then(() => true, () => false); // what was killed may still hold it
      await until("the disk is let go of", 10, unmount);
      await attach();
    },
  };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Processes
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** All runtimes, or the one that is wanted. */
export async function wantedRuntimes(wanted?: string): Promise<Runtime[]> {
  const all = await runtimes();
  const isWanted = (name: string) => wanted === undefined || name.toLowerCase().startsWith(wanted);
  const missing = all.missing.filter(isWanted);
  demand(missing.length === 0, missing.join("; "));
  const found = all.found.filter(({ name }) => isWanted(name));
  demand(found.length > 0, "--runtime takes deno, bun or node");
  return found;
}

/** A process that ends with this one: by the check's end, or by its standard input, which closes whatever happens. */
export class Running {
  output = "";
  ended = false;
  readonly exit: Promise<number>;
  readonly #child: Deno.ChildProcess;

  constructor(command: string, args: string[], env: Record<string, string> = {}) {
    this.#child = new Deno.Command(command, {
      args,
      cwd: ROOT,
      env: { NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", ...env },
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const read = [this.#child.stdout, this.#child.stderr].map((stream) => this.#read(stream));
    this.exit = this.#child.status.then(async ({ code }) => {
      this.ended = true;
      await Promise.all(read);
      return code;
    });
    afterwards(() => this.kill());
  }

  async #read(stream: ReadableStream<Uint8Array>): Promise<void> {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) this.output += text;
  }

  get pid(): number {
    return this.#child.pid;
  }

  async kill(signal: Deno.Signal = "SIGKILL"): Promise<number> {
    if (!this.ended) {
      try {
        this.#child.kill(signal);
      } catch {
        // It has just ended.
      }
    }
    return await this.exit;
  }

  /** Waits for a line of its output; what follows `pattern` in it is the answer. */
  async says(pattern: RegExp, seconds = 60): Promise<string> {
    await until(`${pattern}`, seconds, () => this.ended || pattern.test(this.output));
    if (this.ended) await this.exit;
    const answer = this.output.match(pattern);
    if (!answer) throw new Ended(await this.exit, this.output);
    return answer[1] ?? "";
  }
}

/** A process that ended where it should have gone on. */
export class Ended extends Error {
  readonly code: number;
  readonly output: string;
  constructor(code: number, output: string) {
    super(`the process ended with ${code}: ${oneLine(output)}`);
    this.code = code;
    this.output = output;
  }
}
