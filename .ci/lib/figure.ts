/**
 * One table of how reliable the server is, for each store and each runtime: everything that was done to it, and everything
 * that was lost by it. `faults.ts --figure` prints it.
 *
 * @module
 */

import { join } from "node:path";
import { demand, run, Running, temporaryFolder, until } from "./checks.ts";
import { askingAgain, type Client, overHttp } from "./client.ts";
import { type Engine, ENGINES, freePort, installClients, Process } from "./engines.ts";
import { Ledger } from "./ledger.ts";
import { NotRun, oneLine, pause } from "./limits.ts";
import { ROOT, type Runtime } from "./runtimes.ts";
import { PACKAGES } from "./stores.ts";
import { distinct, expect, shuffled } from "./together.ts";

/** A server that can be killed and started again on the same state. */
interface Victim {
  port: string;
  kill(): Promise<unknown>;
  start(): Promise<void>;
  output(): string;
}

interface Row {
  store: string;
  runtimes: string;
  victims: Victim[];
  engine?: Engine;
}

interface Counts {
  kills: number;
  thefts: number;
  undetected: number;
  storms: number;
  ledger: Ledger;
}

/** Refreshes of one token at once, in each cycle. */
const STORM = 100;
/** Seconds: more than the time for which a rotated token is still taken. */
const LATER = 150;

const HEAD = [
  "store",
  "runtime",
  "kills",
  "storms of parallel refreshes",
  "lost answers",
  "acknowledged changes",
  "lost tokens",
  "false logouts",
  "thefts",
  "undetected",
];

/** Measures the stores that are wanted, in so many cycles each; `report` is told each row as soon as it is there. */
export async function figure(all: Runtime[], cycles: number, wanted: string, report: (line: string) => void) {
  const STORE_PACKAGES = await installClients(...PACKAGES, "miniflare@4", "esbuild@0");
  const line = (cells: unknown[]) => report(`| ${cells.join(" | ")} |`);
  line(HEAD);
  line(HEAD.map(() => "---"));
  for (const [name, open] of rows(all, STORE_PACKAGES)) {
    if (!name.includes(wanted)) continue;
    let row: Row;
    try {
      row = await open();
    } catch (error) {
      if (!(error instanceof NotRun)) throw error;
      report(`not run: ${oneLine(error.message)}`);
      continue;
    }
    const { kills, storms, thefts, undetected, ledger } = await measure(row, cycles);
    const logouts = ledger.lost.filter((what) => /refresh/.test(what)).length;
    const { acknowledged, unanswered, lost, alive, wrong } = ledger;
    const tokens = lost.length - logouts;
    line([row.store, row.runtimes, kills, storms, unanswered, acknowledged, tokens, logouts, thefts, undetected]);
    const said = row.victims.map(({ output }) => oneLine(output().slice(-500))).join(" / ");
    demand(lost.length + alive.length + wrong.length === 0, `${ledger.faults}; the servers said: ${said}`);
    demand(undetected === 0, "a theft went unseen");
    for (const { kill } of row.victims) await kill();
    await row.engine?.kill?.();
  }
}

function rows(all: Runtime[], STORE_PACKAGES: string): [name: string, open: () => Promise<Row>][] {
  const names = all.map(({ name }) => name).join(" + ");
  const onFile = (runtimes: Runtime[]) => async (): Promise<Row> => {
    const dir = join(temporaryFolder(), "state");
    const victims = await Promise.all(runtimes.map((runtime) => victim(runtime, dir, {})));
    return { store: "SQLite file", runtimes: runtimes.map(({ name }) => name).join(" + "), victims };
  };
  const onEngine = (start: () => Promise<Engine>) => async (): Promise<Row> => {
    const engine = await start();
    const env = { STORE_MODULE: join(ROOT, ".ci", "lib", "stores.ts"), STORE_URL: engine.url, STORE_PACKAGES };
    const victims = await Promise.all(all.map((runtime) => victim(runtime, "-", env)));
    return { store: engine.name, runtimes: names, victims, engine };
  };
  const node = all.find(({ name }) => name === "Node");
  return [
    ...[...all.map((runtime) => [runtime]), ...(all.length > 1 ? [all] : [])].map((runtimes) =>
      ["file", onFile(runtimes)] satisfies [string, unknown]
    ),
    ...Object.entries(ENGINES).map(([name, start]) => [name, onEngine(start)] satisfies [string, unknown]),
    ...(node ? [["durable-object", () => durableObject(node, STORE_PACKAGES)] satisfies [string, unknown]] : []),
  ];
}

async function victim({ command, name }: Runtime, dir: string, env: Record<string, string>): Promise<Victim> {
  const [executable, ...before] = command;
  const args = [...before, ...(name === "Deno" ? ["--unstable-kv"] : []), join(ROOT, ".ci", "lib", "server.ts")];
  let process: Running;
  const victim: Victim = {
    port: "",
    kill: () => process.kill(),
    output: () => process.output,
    async start() {
      process = new Running(executable!, [...args, "serve", dir], { ...env, TEST_CLOCK: "0" });
      victim.port = await process.says(/listening on (\d+)/);
    },
  };
  await victim.start();
  return victim;
}

async function durableObject(node: Runtime, STORE_PACKAGES: string): Promise<Row> {
  const port = String(await freePort());
  const host = join(ROOT, ".ci", "stores", "workerd_host.ts");
  const url = `http://127.0.0.1:${port}/.well-known/oauth-authorization-server`;
  const answers = () => fetch(url).then((answer) => answer.text()).then(() => true, () => false);
  const env = { STORE_PACKAGES, BASE_URL: "https://mcp.example.com", CHECKS: "1", PLAIN: "1" };
  const dir = join(temporaryFolder(), "state");
  const process = new Process([node.command[0]!, host, port, dir], answers, env);
  await process.start();
  const victims = [{ port, kill: process.kill, start: process.start, output: () => "" }];
  return { store: "Durable Object", runtimes: "workerd", victims };
}

async function measure({ victims, engine }: Row, cycles: number): Promise<Counts> {
  const counts: Counts = { kills: 0, storms: 0, thefts: 0, undetected: 0, ledger: new Ledger() };
  const { ledger } = counts;
  let ahead = 0;
  const clients = async (): Promise<Client[]> => {
    const all = await Promise.all(victims.map(({ port }) => ledger.client(port, askingAgain(overHttp(port)))));
    for (const client of all) {
      await until("the server serves", 30, async () => (await client.json("/test/clock", { ahead })).status === 200);
    }
    return all;
  };
  for (let cycle = 1; cycle <= cycles; cycle++) {
    const killEngine = engine?.kill && cycle % 2 === 0;
    await clients();
    const impatient = await Promise.all(victims.map(({ port }) => ledger.client(port)));
    const loads = impatient.map((client) => ledger.load(client, 6, engine?.kill ? "away" : undefined));
    await pause(100 + Math.random() * 300);
    if (killEngine) {
      await engine.kill!();
      await engine.start!();
    } else {
      const one = shuffled(victims)[0]!;
      await one.kill();
      await one.start();
    }
    counts.kills++;
    for (const { stop } of loads) stop();
    await Promise.all(loads.map(({ done }) => done));
    const alive = await clients();
    await ledger.audit(shuffled(alive)[0]!, cycle === cycles);
    await storm(alive, counts);
    ledger.codes.clear(); // they are good for five minutes, and the clock is about to move on
    ahead = await theft(alive, counts, ahead);
  }
  counts.storms += ledger.storms;
  return counts;
}

async function storm(clients: Client[], counts: Counts): Promise<void> {
  const { refresh_token } = await clients[0]!.connect();
  const turns = Array.from({ length: STORM }, (_, i) => clients[i % clients.length]!);
  const answers = await Promise.all(turns.map((client) => client.refresh(refresh_token)));
  counts.storms++;
  counts.ledger.acknowledged++;
  if (distinct(answers) !== 1 || answers[0]!.status !== 200) {
    counts.ledger.lost.push(`a refresh in a storm: ${answers.map(({ status }) => status)}`);
  }
}

/**
 * Somebody has copied a refresh token, and presents it before its owner or after; both go on to use what they get. It
 * counts as undetected if the connection still lives after the second of them has come.
 */
async function theft(clients: Client[], counts: Counts, ahead: number): Promise<number> {
  const [one, other] = [shuffled(clients)[0]!, shuffled(clients)[0]!];
  const { refresh_token: copied } = await one.connect();
  const first = await one.refresh(copied);
  expect(first, 200, "the refresh of the one who comes first");
  expect(await one.call(first.body.access_token), 200, "a call with what it gave");
  for (const client of clients) expect(await client.json("/test/clock", { ahead: ahead + LATER }), 200, "the clock");
  counts.thefts++;
  const second = await other.refresh(copied);
  const ended = (await one.call(first.body.access_token)).status === 401 &&
    (await one.refresh(first.body.refresh_token)).status === 400;
  if (second.status !== 400 || !ended) counts.undetected++;
  return ahead + LATER;
}

/** What the table was made by: the date, the machine, the versions. */
export async function circumstances(all: Runtime[], cycles: number): Promise<string> {
  const commit = await run("git", "rev-parse", "--short", "HEAD").catch(() => "no commit");
  const versions = all.map(({ name, version }) => `${name} ${version}`).join(", ");
  const date = new Date().toISOString().slice(0, 10);
  return `${date}, ${commit}, ${versions}, ${navigator.hardwareConcurrency} cores: ` +
    `npx -y deno run -A .ci/faults.ts --figure --cycles ${cycles}`;
}
