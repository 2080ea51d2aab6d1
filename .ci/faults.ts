/**
 * Shows that no state can be lost: servers on all three runtimes are killed, starved of disk, locked out, given damaged
 * files and wrong clocks, and run side by side; whatever they had answered before has to hold afterwards.
 *
 *     npx -y deno run -A .ci/faults.ts [--cycles N] [--registrations N] [--runtime deno|bun|node] [--only TEXT]
 *     npx -y deno run -A .ci/faults.ts --figure [--write] [--cycles N] [--only file|redis|postgres|kv|durable-object]
 *
 * `--cycles` (300) is how often each runtime is killed, `--registrations` (20000) the size of the flood, `--only` runs the
 * checks with that text in their names. `--figure` makes one table instead, for every store and runtime; `--write` puts
 * it into README.md. A line for each check on the standard output, and the sum at the end. Disks are small ones of their
 * own, which only root can mount, and one kind needs ext4 on a loop device: else they are `not run`.
 *
 * @module
 */

import { join } from "node:path";
import { DatabaseSync } from "node:sqlite";
import {
  afterwards,
  check,
  demand,
  Ended,
  finish,
  fragileDisk,
  numberArgument,
  Running,
  smallDisk,
  temporaryFolder,
  textArgument,
  wantedRuntimes,
} from "./lib/checks.ts";
import { oneLine, pause } from "./lib/limits.ts";
import type { Answer, Client, Tokens } from "./lib/client.ts";
import { circumstances, figure, markdown, writeToReadme } from "./lib/figure.ts";
import { Ledger } from "./lib/ledger.ts";
import { ROOT, type Runtime } from "./lib/runtimes.ts";
import { agree, distinct, expect, shuffled, timed } from "./lib/together.ts";

const CYCLES = numberArgument("cycles", 300);
const REGISTRATIONS = numberArgument("registrations", 20_000);
const ONLY = textArgument("only") ?? "";
const SERVER = join(ROOT, ".ci", "lib", "server.ts");

/** What one request after the other may take, however busy the machine. */
const PROMPT = 500;
const DAY = 86_400;

interface Server {
  runtime: Runtime;
  process: Running;
  port: string;
  client: Client;
}

function launch({ command }: Runtime, mode: string, dir: string, env: Record<string, string> = {}): Running {
  const [executable, ...before] = command;
  return new Running(executable!, [...before, SERVER, mode, dir], env);
}

async function serve(runtime: Runtime, dir: string, ledger = new Ledger(), env?: Record<string, string>) {
  const process = launch(runtime, "serve", dir, env);
  const port = await process.says(/listening on (\d+)/);
  return { runtime, process, port, client: await ledger.client(port) } satisfies Server;
}

async function perform(name: string, seconds: number, body: () => Promise<string | void>): Promise<void> {
  if (name.includes(ONLY)) await check(name, seconds, body);
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// kill -9
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function verdict(cycles: number, where: string, ledger: Ledger, unreadable: string[]): string {
  const figures = `${cycles} cycles on ${where}: ${ledger.lost.length} tokens lost, ${ledger.alive.length} revoked ` +
    `alive, ${unreadable.length} unreadable`;
  const faults = [...unreadable, ledger.faults].filter(Boolean).join(", ");
  demand(faults === "", `${figures}: ${faults}`);
  return `${figures} (${ledger.acknowledged} answers acknowledged)`;
}

/** In the middle of a load, and now and then once more while the next process is starting. */
async function killed(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const ledger = new Ledger();
  let server: Server = await serve(runtime, dir, ledger);
  for (let cycle = 1; cycle <= CYCLES; cycle++) {
    const load = ledger.load(server.client, 12);
    await pause(10 + Math.random() * 250);
    await server.process.kill();
    await load.done;
    if (Math.random() < 0.2) {
      const short = launch(runtime, "serve", dir);
      await pause(Math.random() * 300);
      await short.kill();
    }
    try {
      server = await serve(runtime, dir, ledger);
    } catch (error) {
      if (error instanceof Ended) return verdict(cycle, runtime.name, ledger, [error.message]);
      throw error;
    }
    await ledger.audit(server.client);
    if (ledger.faults) return verdict(cycle, runtime.name, ledger, []);
  }
  await ledger.audit(server.client, true);
  return verdict(CYCLES, runtime.name, ledger, []);
}

/** One of three on a shared folder; the other two go on, and must not notice. */
async function killedBesideOthers(all: Runtime[], cycles: number): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const ledger = new Ledger();
  const where = all.map(({ name }) => name).join("+");
  let servers: Server[] = [];
  for (const runtime of all) servers.push(await serve(runtime, dir, ledger));
  for (let cycle = 1; cycle <= cycles; cycle++) {
    const loads = servers.map(({ client }) => ledger.load(client, 5));
    await pause(10 + Math.random() * 250);
    const victim = shuffled(servers)[0]!;
    await victim.process.kill();
    await pause(Math.random() * 100);
    for (const load of loads) load.stop();
    await Promise.all(loads.map(({ done }) => done));
    const dead = servers.filter((server) => server !== victim && server.process.ended);
    if (dead.length > 0) return verdict(cycle, where, ledger, [oneLine(dead[0]!.process.output)]);
    const next = await serve(victim.runtime, dir, ledger);
    servers = servers.map((server) => server === victim ? next : server);
    await ledger.audit(shuffled(servers)[0]!.client);
    if (ledger.faults) return verdict(cycle, where, ledger, []);
  }
  await ledger.audit(servers[0]!.client, true);
  return verdict(cycles, where, ledger, []);
}

/** While state folders are being made: each must be usable afterwards, and hold what was acknowledged. */
async function killedAtFirstStart(runtime: Runtime): Promise<string> {
  const dir = temporaryFolder();
  let made: string[] = [];
  let total = 0;
  let cut = 0;
  for (let cycle = 0; cycle <= CYCLES; cycle++) {
    const process = launch(runtime, "create", dir);
    await process.says(/creating/);
    const found = new Map(
      [...process.output.matchAll(/^found (\S+) (\S+) (\S+)$/gm)].map((
        [, name, value, sound],
      ) => [name!, [value, sound]]),
    );
    for (const name of made) {
      demand(found.has(name), `${name} is gone`);
      demand(found.get(name)![0] === name, `${name} has lost its entry: it holds ${found.get(name)![0]}`);
    }
    for (const [name, [, sound]] of found) demand(sound === "true", `${name} takes no entry`);
    cut += found.size - made.length;
    await pause(Math.random() * 60);
    await process.kill();
    made = [...process.output.matchAll(/^made (\S+)$/gm)].map(([, name]) => name!);
    total += made.length;
  }
  return `${CYCLES} kills on ${runtime.name} while ${total} folders were made, ${cut} of them caught half-way: all usable`;
}

/** A server's own first start, from nothing to the first answer. */
async function killedBeforeFirstAnswer(runtime: Runtime): Promise<string> {
  const rounds = Math.ceil(CYCLES / 3);
  for (let round = 0; round < rounds; round++) {
    const dir = join(temporaryFolder(), "state");
    const first = launch(runtime, "serve", dir);
    await pause(Math.random() * 400);
    await first.kill();
    const { process, client } = await serve(runtime, dir);
    expect(await client.call((await client.connect()).access_token), 200, `the call in round ${round}`);
    await process.kill();
  }
  return `${rounds} kills on ${runtime.name}, and each next start serves`;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Disks
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Asks for every kind of write; the answers must be refusals that a client takes for "later". */
async function refusedWrites(client: Client, tokens: Tokens, code: string): Promise<void> {
  const refusals: [string, Answer][] = [
    ["approval", await client.approve()],
    ["code", await client.redeem(code)],
    ["refresh", await client.refresh(tokens.refresh_token)],
    ["revocation", await client.revoke(tokens.refresh_token)],
    ["personal access token", await client.json("/test/token", { name: "script" })],
  ];
  for (const [what, answer] of refusals) {
    expect(answer, 503, what);
    demand(Number(answer.headers.get("Retry-After")) > 0, `${what}: no Retry-After`);
    if (what !== "approval") demand(answer.body.error === "server_error", `${what}: ${JSON.stringify(answer.body)}`);
  }
}

async function diskFull(runtime: Runtime): Promise<string> {
  const { dir: disk } = await smallDisk(6 * 1024);
  const dir = join(disk, "state");
  const ledger = new Ledger();
  let { process, client } = await serve(runtime, dir, ledger);
  await warmUp(client, ledger);
  const used = await client.connect();
  expect(await client.call(used.access_token), 200, "a call");
  const unused = await client.connect();
  const { code } = await client.approve();

  const filler = join(disk, "filler");
  await fill(filler);
  const before = ledger.acknowledged;
  const load = ledger.load(client, 8, "undone");
  await pause(700);
  load.stop();
  await load.done;
  demand(ledger.faults === "", `while the disk is full: ${ledger.faults}`);
  const late = ledger.acknowledged - before;
  await fill(filler); // what SQLite had given back meanwhile
  await refusedWrites(client, used, code!);
  for (const { access_token } of [used, unused]) expect(await client.call(access_token), 200, "a call on a full disk");
  expect(await client.send("/.well-known/oauth-authorization-server"), 200, "metadata");

  // killed and started again with the disk still full: reading goes on
  await process.kill();
  ({ process, client } = await serve(runtime, dir, ledger));
  for (const { access_token } of [used, unused]) expect(await client.call(access_token), 200, "a call after a restart");
  await refusedWrites(client, used, code!);

  Deno.removeSync(filler);
  expect(await client.redeem(code!), 200, "the code, when there is room");
  expect(await client.refresh(used.refresh_token), 200, "the refresh, when there is room");
  await ledger.audit(client, true);
  demand(ledger.faults === "", `when there is room: ${ledger.faults}`);
  return `on ${runtime.name}: ${late} writes still found room, all others 503; nothing lost`;
}

/** Some of everything, before something happens. */
async function warmUp(client: Client, ledger: Ledger): Promise<void> {
  const load = ledger.load(client, 8);
  await pause(300);
  load.stop();
  await load.done;
  demand(ledger.faults === "", `before anything happened: ${ledger.faults}`);
}

/** Takes what is left of a disk, to the last byte. */
async function fill(path: string): Promise<void> {
  const file = await Deno.open(path, { create: true, append: true });
  try {
    for (let size = 64 * 1024; size >= 1;) {
      try {
        await file.write(new Uint8Array(size));
      } catch {
        size = Math.floor(size / 2);
      }
    }
  } finally {
    file.close();
  }
}

/** The disk fails under a running server and takes no more writes; what was never synced to it is lost with it. */
async function powerCuts(runtime: Runtime): Promise<string> {
  const cuts = Math.ceil(CYCLES / 5);
  const disk = await fragileDisk();
  const dir = join(disk.dir, "state");
  const ledger = new Ledger();
  let server: Server = await serve(runtime, dir, ledger);
  await warmUp(server.client, ledger);
  for (let cut = 1; cut <= cuts; cut++) {
    const spare = await server.client.connect();
    const load = ledger.load(server.client, 8, "open");
    await pause(100 + Math.random() * 200);
    // While ext4 is being cut off, it answers an fsync with success for a moment and drops what was to be synced: a loop
    // of nothing but write and fsync on a busy machine sees that, too. Only what was answered before is a promise.
    ledger.doubtful = true;
    await disk.cut();
    await pause(100);
    load.stop();
    await load.done;
    ledger.doubtful = false;
    demand(ledger.faults === "", `when the disk failed: ${ledger.faults}`);
    expect(await server.client.call(spare.access_token), 200, "a call with the disk read-only");
    expect(await server.client.refresh(spare.refresh_token), 503, "a refresh with the disk read-only");
    await server.process.kill();
    await disk.revive();
    server = await serve(runtime, dir, ledger);
    await ledger.audit(server.client);
    if (ledger.faults) break;
  }
  await ledger.audit(server.client, true);
  const figures = verdict(cuts, runtime.name, ledger, []);
  await server.process.kill(); // or the disk could not be removed
  return figures.replace("cycles", "cuts");
}

/** A start with a folder or file that cannot be written stops and says so. */
async function readOnlyAtStart(runtime: Runtime): Promise<string> {
  const root = Deno.uid() === 0;
  const disk = root ? await smallDisk(6 * 1024) : { dir: temporaryFolder(), readOnly: undefined };
  const dir = join(disk.dir, "state");
  const ledger = new Ledger();
  const first = await serve(runtime, dir, ledger);
  await warmUp(first.client, ledger);
  await first.process.kill();
  const set = async (yes: boolean) => {
    if (disk.readOnly) await disk.readOnly(yes);
    else for (const path of [join(dir, "oauth.sqlite"), dir]) Deno.chmodSync(path, yes ? 0o500 : 0o700);
  };
  await set(true);
  const output = await refusal(runtime, dir, "a read-only folder");
  await set(false);
  demand(/make it writable/.test(output) && output.includes(dir), `it does not say what to do: ${oneLine(output)}`);
  const { client, process } = await serve(runtime, dir, ledger);
  await ledger.audit(client, true);
  demand(ledger.faults === "", ledger.faults);
  await process.kill();
  return `on ${runtime.name}: the start stops and says what to do; nothing lost`;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Files that are not what they should be
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Starts a server that must not start, and returns what it had to say. */
async function refusal(runtime: Runtime, dir: string, what: string): Promise<string> {
  const process = launch(runtime, "serve", dir);
  try {
    await process.says(/listening on (\d+)/);
  } catch (error) {
    if (!(error instanceof Ended)) throw error;
    demand(error.code === 1, `${what}: exit status ${error.code} instead of 1: ${oneLine(error.output)}`);
    return error.output;
  }
  await process.kill();
  throw new Error(`${what}: the server started`);
}

function contents(dir: string): Map<string, string> {
  const files = [...Deno.readDirSync(dir)].map(({ name }) => name).filter((name) => !name.endsWith("-shm")).sort();
  return new Map(files.map((name) => [name, new TextDecoder("latin1").decode(Deno.readFileSync(join(dir, name)))]));
}

/** A state folder with something in it, as `kill -9` left it or as a server closed it. */
async function usedFolder(runtime: Runtime, ledger: Ledger, signal: Deno.Signal): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { process, client } = await serve(runtime, dir, ledger);
  await warmUp(client, ledger);
  await process.kill(signal);
  return dir;
}

function copy(from: string): string {
  const to = join(temporaryFolder(), "state");
  Deno.mkdirSync(to, { mode: 0o700 });
  for (const { name } of Deno.readDirSync(from)) Deno.copyFileSync(join(from, name), join(to, name));
  return to;
}

/** The state as it would be after `change`, with that in the file itself or, as a crash may leave it, in its log. */
function rewritten(good: string, change: string, log: boolean): string {
  const dir = copy(good);
  const db = new DatabaseSync(join(dir, "oauth.sqlite"));
  db.prepare("PRAGMA wal_checkpoint(TRUNCATE)").all();
  db.exec(change);
  const result = log ? copy(dir) : dir;
  db.close();
  return result;
}

/** `log`: the latest change is in a log beside the file, as a process leaves it that did not get to close the file. */
async function wrongFiles(runtime: Runtime, log: boolean): Promise<string> {
  const used = await usedFolder(runtime, new Ledger(), "SIGTERM");
  demand(!contents(used).has("oauth.sqlite-wal"), "a server that ended by itself left a log");
  const good = rewritten(used, "INSERT INTO entries VALUES ('later', '1', NULL)", log);
  const bytes = Deno.readFileSync(join(good, "oauth.sqlite"));
  const holding = (content: Uint8Array) => {
    const dir = copy(good);
    Deno.writeFileSync(join(dir, "oauth.sqlite"), content);
    return dir;
  };
  const overwritten = bytes.slice();
  overwritten.fill(0xff, 4096, 4096 + 2048);
  const cases: [what: string, dir: string, says: RegExp][] = [
    ["an empty file", holding(new Uint8Array()), /is not a state file|cannot be read/],
    ["a text file", holding(new TextEncoder().encode('{"access_tokens":{}}')), /is not a state file|cannot be read/],
    ["a truncated file", holding(bytes.slice(0, 4096 + 1000)), /cannot be read/],
    ["a page overwritten", holding(overwritten), /cannot be read/],
    ["a newer version's file", rewritten(good, "PRAGMA user_version = 99", log), /newer version/],
    ["another program's file", rewritten(good, "PRAGMA application_id = 1", log), /is not a state file/],
    ["a table missing", rewritten(good, "DROP TABLE entries", log), /oauth\.sqlite/],
  ];
  const faults: string[] = [];
  for (const [what, dir, says] of cases) {
    const before = contents(dir);
    const output = await refusal(runtime, dir, what).catch((error) => String(error));
    const named = output.includes(join(dir, "oauth.sqlite"));
    if (!named || !says.test(output)) faults.push(`${what}: it said ${oneLine(output, 300)}`);
    const after = contents(dir);
    for (const [name, text] of before) {
      const now = after.get(name);
      if (now !== text) faults.push(`${what}: ${name} was ${now === undefined ? "deleted" : "changed"}`);
    }
  }
  demand(faults.length === 0, faults.join("; "));
  return `${cases.length} kinds on ${runtime.name}: each start stops with a sentence, no file is changed`;
}

/** Who moves the file away "to start anew, which ends all connections", must get that, even after a `kill -9`. */
async function movedAway(runtime: Runtime): Promise<string> {
  const ledger = new Ledger();
  const dir = await usedFolder(runtime, ledger, "SIGKILL");
  Deno.renameSync(join(dir, "oauth.sqlite"), join(dir, "moved"));
  const [old] = ledger.connections.filter(({ revoked }) => revoked === "no");
  try {
    const { client } = await serve(runtime, dir);
    expect(await client.call(old!.access.at(-1)!), 401, "a token of the state that was moved away");
    expect(await client.call((await client.connect()).access_token), 200, "a token of the new state");
    return `on ${runtime.name}: a new state, with nothing of the old one in it`;
  } catch (error) {
    if (!(error instanceof Ended)) throw error;
    // A log without its file must not be taken for the new file's; to stop and name it is as good as to begin anew.
    demand(error.code === 1 && /oauth\.sqlite.*-wal/.test(error.output), `it said ${oneLine(error.output)}`);
    for (const name of ["oauth.sqlite-wal", "oauth.sqlite-shm"]) await Deno.remove(join(dir, name)).catch(() => {});
    const { client } = await serve(runtime, dir);
    expect(await client.call((await client.connect()).access_token), 200, "a token of the new state");
    return `on ${runtime.name}: the log that was left is named, and without it a new state begins`;
  }
}

/** Files that are taken away under a running server: it must not go on with what nobody else can see or change. */
async function takenAway(runtime: Runtime, other: Runtime): Promise<string> {
  const cases: [
    what: string,
    happen: (dir: string, running: Client) => Promise<void>,
    restored?: (dir: string) => void,
  ][] = [
    ["the folder removed", (dir) => Deno.remove(dir, { recursive: true })],
    ["the file removed", (dir) => Deno.remove(join(dir, "oauth.sqlite"))],
    [
      "the file moved away and back",
      (dir) => Deno.rename(join(dir, "oauth.sqlite"), join(dir, "moved")),
      (dir) => Deno.renameSync(join(dir, "moved"), join(dir, "oauth.sqlite")),
    ],
    ["the folder replaced by another server's", async (dir) => {
      Deno.removeSync(dir, { recursive: true });
      await serve(other, dir);
    }],
    ["a tool that reads the files, and a process that comes and goes", async (dir, running) => {
      expect(await running.json("/test/read-files", {}), 200, "the tool");
      const { process } = await serve(other, dir);
      await process.kill("SIGTERM");
      await serve(other, dir);
    }],
  ];
  for (const [what, happen, restore] of cases) {
    const dir = join(temporaryFolder(), "state");
    const { client, process } = await serve(runtime, dir);
    const { access_token, refresh_token } = await client.connect();
    expect(await client.call(access_token), 200, "a call before");
    await happen(dir, client);
    await pause(5); // what was seen of the files holds for a millisecond
    for (const [call, wanted] of [["call", 503], ["refresh", 503]] as const) {
      const answer = call === "call" ? await client.call(access_token) : await client.refresh(refresh_token);
      expect(answer, wanted, `${what}, on ${runtime.name}: a ${call}`);
      demand(Number(answer.headers.get("Retry-After")) > 0, `${what}: 503 without Retry-After`);
    }
    demand(
      /oauth\.sqlite.* was removed or replaced/.test(process.output),
      `${what}: it said ${oneLine(process.output)}`,
    );
    if (!restore) continue;
    restore(dir);
    await pause(20);
    expect(await client.call(access_token), 200, `${what}, on ${runtime.name}: a call`);
    expect(await client.refresh(refresh_token), 200, `${what}, on ${runtime.name}: a refresh`);
  }
  return `${cases.length} ways on ${runtime.name}: 503 at once, and the log says why`;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// A lock in somebody else's hands
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Asks for something that only reads, until told to stop; the slowest answer, in milliseconds. */
function readAllTheWhile(client: Client, access_token: string): () => Promise<number> {
  let stopped = false;
  let slowest = 0;
  const reading = (async () => {
    while (!stopped) {
      for (const ask of [() => client.call(access_token), () => client.register(), () => client.refresh("prt_wrong")]) {
        const { answer, milliseconds } = await timed(ask());
        demand([200, 201, 400].includes(answer.status), `a read was answered ${answer.status}`);
        slowest = Math.max(slowest, milliseconds);
      }
      await pause(50);
    }
  })();
  reading.catch(() => {}); // told to who stops it
  return async () => {
    stopped = true;
    await reading;
    return Math.round(slowest);
  };
}

async function locked(runtime: Runtime, seconds: number): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { client } = await serve(runtime, dir);
  const [reader, writer, ended] = [await client.connect(), await client.connect(), await client.connect()];
  expect(await client.call(reader.access_token), 200, "a call");
  const { code } = await client.approve();
  await client.send("/test/stillness");

  const db = new DatabaseSync(join(dir, "oauth.sqlite"));
  afterwards(() => db.close());
  db.exec("PRAGMA busy_timeout = 2000; BEGIN IMMEDIATE");
  const stop = readAllTheWhile(client, reader.access_token);
  const writes = [
    () => client.refresh(writer.refresh_token),
    () => client.redeem(code!),
    () => client.revoke(ended.refresh_token),
  ];
  const answers = Promise.all(writes.map((write) => timed(write())));
  await pause(seconds * 1000);
  db.exec("ROLLBACK");
  const results = await answers;
  const slowest = await stop();
  const { milliseconds: stillness } = (await client.send("/test/stillness")).body;
  demand(slowest < PROMPT, `a read took ${slowest} ms`);
  demand(stillness < PROMPT, `the event loop stood still for ${stillness} ms`);

  const patient = seconds < 5;
  for (const { answer, milliseconds } of results) {
    expect(answer, patient ? 200 : 503, "a write");
    const bounds = patient ? [seconds * 900, (seconds + 3) * 1000] : [1000, 15_000];
    demand(milliseconds > bounds[0]! && milliseconds < bounds[1]!, `a write was answered after ${milliseconds} ms`);
    if (!patient) demand(Number(answer.headers.get("Retry-After")) > 0, "503 without Retry-After");
  }
  if (!patient) {
    expect(await client.call(ended.access_token), 200, "the connection that was not revoked");
    for (const write of writes) expect(await write(), 200, "a write, when the lock is free");
  }
  expect(await client.call(ended.access_token), 401, "the connection that was revoked");
  expect(await client.call(writer.access_token), 200, "the connection that was refreshed");
  const waited = Math.round(Math.max(...results.map(({ milliseconds }) => milliseconds)));
  return `${runtime.name}: writes ${patient ? 200 : 503} after ${waited} ms, reads within ${slowest} ms`;
}

/** The first call with a token leaves a mark in the store; the caller must not have to wait for that. */
async function firstCallLocked(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { client } = await serve(runtime, dir);
  const first = await client.connect();
  const { body: second } = await client.refresh(first.refresh_token);
  const db = new DatabaseSync(join(dir, "oauth.sqlite"));
  afterwards(() => db.close());
  db.exec("PRAGMA busy_timeout = 2000; BEGIN IMMEDIATE");
  const free = pause(2000).then(() => db.exec("ROLLBACK"));
  const { answer, milliseconds } = await timed(client.call(second.access_token));
  await free;
  expect(answer, 200, "the first call");
  demand(milliseconds < PROMPT, `on ${runtime.name} the first call with a token took ${Math.round(milliseconds)} ms`);
  return `${runtime.name}: ${Math.round(milliseconds)} ms`;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Wrong clocks
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A year ahead for some minutes, with work going on, and back: whatever was good before is good again. */
async function clockAhead(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { client } = await serve(runtime, dir, new Ledger(), { TEST_CLOCK: String(-100 * DAY) });
  const setClock = async (ahead: number) => expect(await client.json("/test/clock", { ahead }), 200, "the clock");
  const script = async (days: number): Promise<[string, string]> => {
    const { body } = await client.json("/test/token", { name: "script", expiresIn: days * DAY });
    return [`a token for ${days} days`, body.token];
  };
  const idle = await client.connect(); // last seen 100 days ago
  const ended = await client.connect();
  expect(await client.revoke(ended.access_token), 200, "a revocation");
  await setClock(0);
  const fresh = await client.connect();
  const refreshed = (await client.refresh((await client.connect()).refresh_token)).body;
  const tokens = [await script(1), await script(30), await script(90), await script(365), await script(1000)];
  tokens.push(["an access token", fresh.access_token], ["a refreshed access token", refreshed.access_token]);

  await setClock(365 * DAY + 60);
  for (let i = 0; i < 20; i++) {
    await client.call((await client.connect()).access_token);
    await client.call(tokens[0]![1]);
  }
  const doomed = await client.connect();
  expect(await client.revoke(doomed.access_token), 200, "a revocation a year ahead");
  await setClock(365 * DAY + 360);
  await client.connect();
  await setClock(300);

  const lost: string[] = [];
  for (const [what, token] of tokens) if ((await client.call(token)).status !== 200) lost.push(what);
  const kept = [["the idle connection", idle], ["a connection", fresh], ["a refreshed one", refreshed]] as const;
  for (const [what, { refresh_token }] of kept) {
    const { status, body } = await client.refresh(refresh_token);
    if (status !== 200 || (await client.call(body.access_token)).status !== 200) lost.push(what);
  }
  demand(lost.length === 0, `on ${runtime.name}, lost: ${lost.join(", ")}`);
  for (const { access_token } of [ended, doomed]) expect(await client.call(access_token), 401, "what was revoked");
  return `on ${runtime.name}: ${tokens.length} tokens and ${kept.length} connections are there again`;
}

/** What is revoked while the clock is ahead stays revoked when it is right again. */
async function revokedAhead(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { client } = await serve(runtime, dir, new Ledger(), { TEST_CLOCK: "0" });
  const setClock = async (ahead: number) => expect(await client.json("/test/clock", { ahead }), 200, "the clock");
  for (const days of [40, 366]) {
    const tokens = await client.connect();
    await setClock(days * DAY);
    expect(await client.revoke(tokens.refresh_token), 200, `a revocation ${days} days ahead`);
    await setClock(0);
    expect(await client.call(tokens.access_token), 401, `on ${runtime.name}, after a revocation ${days} days ahead`);
    expect(
      await client.refresh(tokens.refresh_token),
      400,
      `on ${runtime.name}, after a revocation ${days} days ahead`,
    );
  }
  return `on ${runtime.name}: holds when the clock is right again`;
}

/** Back by an hour, and forth again: nobody has to sign in. */
async function clockBack(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const ledger = new Ledger();
  const { client, process } = await serve(runtime, dir, ledger, { TEST_CLOCK: "0" });
  const setClock = async (ahead: number) => expect(await client.json("/test/clock", { ahead }), 200, "the clock");
  await warmUp(client, ledger);
  let now = 0;
  for (const ahead of [-3600, -3000, 0, -3600]) {
    if (ahead > now) ledger.codes.clear(); // codes have five minutes, and nobody can tell that these have not passed
    await setClock(now = ahead);
    await ledger.audit(client, true);
    await warmUp(client, ledger);
  }
  await process.kill();
  const again = await serve(runtime, dir, ledger, { TEST_CLOCK: "-3600" });
  await ledger.audit(again.client, true);
  demand(ledger.faults === "", ledger.faults);
  return `on ${runtime.name}: ${ledger.acknowledged} answers hold`;
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Several processes, and many requests
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

async function sideBySide(all: Runtime[]): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const clients = await Promise.all(all.map(async (runtime) => (await serve(runtime, dir)).client));
  return `${all.map(({ name }) => name).join("+")}, ${await agree(clients, 40)}`;
}

/** All at once on a folder that does not exist yet: they must agree on one state and one key. */
async function firstStartTogether(all: Runtime[]): Promise<string> {
  const rounds = Math.min(CYCLES, 30);
  for (let round = 0; round < rounds; round++) {
    const dir = join(temporaryFolder(), "state");
    const servers = await Promise.all([...all, ...all].map((runtime) => serve(runtime, dir)));
    const { access_token } = await servers[0]!.client.connect();
    for (const { client } of servers) {
      expect(await client.call(access_token), 200, "a token, everywhere");
      demand(await client.id() === await servers[0]!.client.id(), "the processes differ in their key");
    }
    await Promise.all(
      shuffled(servers).map(({ process }) => process.kill(Math.random() < 0.5 ? "SIGTERM" : "SIGKILL")),
    );
  }
  return `${rounds} times ${all.length * 2} processes`;
}

/** Starts and stops beside a process that stays: the last to close a file clears up after it, and must not be mistaken. */
async function comeAndGo(all: Runtime[]): Promise<string> {
  const rounds = Math.min(CYCLES, 30);
  const dir = join(temporaryFolder(), "state");
  const ledger = new Ledger();
  let servers: Server[] = [await serve(all[0]!, dir, ledger)];
  for (let round = 1; round <= rounds; round++) {
    const starting = Promise.all(all.map((runtime) => serve(runtime, dir, ledger)));
    await Promise.all(servers.map(({ process }) => process.kill("SIGTERM")));
    servers = await starting;
    for (const { client } of servers) await warmUp(client, ledger);
    await ledger.audit(shuffled(servers)[0]!.client);
    demand(ledger.faults === "", ledger.faults);
  }
  await ledger.audit(servers[0]!.client, true);
  demand(ledger.faults === "", ledger.faults);
  return `${rounds} hand-overs, ${ledger.acknowledged} answers hold`;
}

async function manyRefreshes(runtime: Runtime): Promise<string> {
  const { client } = await serve(runtime, join(temporaryFolder(), "state"));
  const { refresh_token } = await client.connect();
  const { answer: answers, milliseconds } = await timed(
    Promise.all(Array.from({ length: 1000 }, () => client.refresh(refresh_token))),
  );
  expect(answers[0]!, 200, "a refresh");
  demand(distinct(answers) === 1, `${distinct(answers)} answers to one refresh token`);
  expect(await client.call(answers[0]!.body.access_token), 200, "the one new token");
  return `1000 at once on ${runtime.name}: one answer (${Math.round(milliseconds)} ms)`;
}

async function flood(runtime: Runtime): Promise<string> {
  const dir = join(temporaryFolder(), "state");
  const { client } = await serve(runtime, dir);
  const { access_token, refresh_token } = await client.connect();
  expect(await client.call(access_token), 200, "the owner's call");
  await pause(500); // what is written in the background, such as the log of events
  const before = measure(dir);
  let sent = 0;
  let slowest = 0;
  const stranger = async () => {
    while (sent < REGISTRATIONS) expect(await client.register(`Claude ${sent++}`), 201, "a registration");
  };
  const owner = async () => {
    while (sent < REGISTRATIONS) {
      const { answer, milliseconds } = await timed(client.call(access_token));
      expect(answer, 200, "the owner's call during the flood");
      slowest = Math.max(slowest, milliseconds);
      await pause(20);
    }
  };
  const { milliseconds } = await timed(Promise.all([...Array.from({ length: 20 }, stranger), owner()]));
  const after = measure(dir);
  demand(after.entries === before.entries, `${after.entries - before.entries} entries more`);
  // The owner's own calls mark the connection as used, once a minute: some pages of the log each time.
  demand(
    after.bytes - before.bytes <= 32 * 1024 * (1 + milliseconds / 60_000),
    `${after.bytes - before.bytes} bytes more`,
  );
  expect(await client.refresh(refresh_token), 200, "the owner's refresh");
  return `${REGISTRATIONS} registrations on ${runtime.name}: no entry and ${after.bytes - before.bytes} bytes more; ` +
    `the owner's calls within ${Math.round(slowest)} ms`;
}

function measure(dir: string): { entries: number; bytes: number } {
  const bytes = [...Deno.readDirSync(dir)].reduce((sum, { name }) => sum + Deno.statSync(join(dir, name)).size, 0);
  const db = new DatabaseSync(join(dir, "oauth.sqlite"), { readOnly: true });
  const { entries } = db.prepare("SELECT count(*) AS entries FROM entries").get() as { entries: number };
  db.close();
  return { entries, bytes };
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const all = await wantedRuntimes(textArgument("runtime"));

if (Deno.args.includes("--figure")) {
  const write = Deno.args.includes("--write");
  demand(!write || (ONLY === "" && all.length === 3), "--write is for the whole table: without --only and --runtime");
  const table = await figure(all, CYCLES, ONLY);
  const about = circumstances(all, CYCLES);
  console.log(`\n${about}\n\n${markdown(table)}\n`);
  if (write) await writeToReadme(table, about);
  await finish();
}

const several = all.length > 1 ? all : [all[0]!, all[0]!];
const everywhere = async (body: (runtime: Runtime) => Promise<string>) => (await Promise.all(all.map(body))).join("; ");

for (const runtime of all) {
  const { name } = runtime;
  await perform(`kill -9 under load, ${name}`, 60 + CYCLES * 10, () => killed(runtime));
  await perform(`kill -9 while the state is created, ${name}`, 60 + CYCLES * 5, () => killedAtFirstStart(runtime));
  await perform(`kill -9 before the first answer, ${name}`, 60 + CYCLES * 5, () => killedBeforeFirstAnswer(runtime));
}
await perform("kill -9 of one of several", 60 + CYCLES * 10, () => killedBesideOthers(several, CYCLES));
for (const runtime of all) {
  const { name } = runtime;
  await perform(`disk full, ${name}`, 120, () => diskFull(runtime));
  await perform(`disk cut off, ${name}`, 120 + CYCLES, () => powerCuts(runtime));
  await perform(`read-only state at the start, ${name}`, 120, () => readOnlyAtStart(runtime));
  await perform(`wrong state files, ${name}`, 120, () => wrongFiles(runtime, false));
  await perform(`wrong state files after a kill, ${name}`, 120, () => wrongFiles(runtime, true));
  await perform(`a state file moved away, ${name}`, 120, () => movedAway(runtime));
  await perform(`state files taken away while it runs, ${name}`, 120, () => takenAway(runtime, several.at(-1)!));
}
await perform("a lock for 2 s", 120, () => everywhere((runtime) => locked(runtime, 2)));
await perform("a lock for 20 s", 120, () => everywhere((runtime) => locked(runtime, 20)));
await perform("a first call under a lock", 120, () => everywhere(firstCallLocked));
for (const runtime of all) {
  const { name } = runtime;
  await perform(`the clock a year ahead and back, ${name}`, 120, () => clockAhead(runtime));
  await perform(`a revocation while the clock is ahead, ${name}`, 120, () => revokedAhead(runtime));
  await perform(`the clock back by an hour, ${name}`, 120, () => clockBack(runtime));
}
await perform("two processes", 120, () => sideBySide(several.slice(-2)));
await perform("three processes", 120, () => sideBySide(all.length > 1 ? all : [all[0]!, all[0]!, all[0]!]));
await perform("first start of several at once", 300, () => firstStartTogether(several));
await perform("processes come and go", 300, () => comeAndGo(several));
for (const runtime of all) {
  await perform(`parallel refreshes, ${runtime.name}`, 120, () => manyRefreshes(runtime));
  await perform(`a flood of registrations, ${runtime.name}`, 120 + REGISTRATIONS / 50, () => flood(runtime));
}
await finish();
