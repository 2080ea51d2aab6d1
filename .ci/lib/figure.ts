/**
 * One table of how reliable the server is, for each store and each runtime: everything that was done to it, and everything
 * that was lost by it. `faults.ts --figure` prints it, and puts it into README.md with `--write`.
 *
 * @module
 */

import { join } from "node:path";
import { check, demand, run, Running, temporaryFolder, until } from "./checks.ts";
import { askingAgain, type Client, overHttp } from "./client.ts";
import { type Engine, ENGINES, freePort, installClients, Process } from "./engines.ts";
import { Ledger } from "./ledger.ts";
import { oneLine, pause } from "./limits.ts";
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

/**
 * What is counted, in the order of the columns: a phone shows the first ones. A lost token may also be a revocation that
 * did not hold.
 */
const COLUMNS = {
  lost: "lost tokens",
  logouts: "false logouts",
  undetected: "undetected thefts",
  kills: "kills",
  storms: "storms",
  unanswered: "lost answers",
  acknowledged: "acknowledged",
  thefts: "thefts",
};
type Column = keyof typeof COLUMNS;

/** Markers in README.md. */
const [BEGIN, END] = ["<!-- reliability -->", "<!-- /reliability -->"];

export interface Figure {
  rows: { name: string; counts: Record<Column, number> }[];
  /** Rows that could not be measured. */
  missing: string[];
}

/** Measures each of the wanted stores, in so many cycles each. One that fails does not stop the others. */
export async function figure(all: Runtime[], cycles: number, wanted: string): Promise<Figure> {
  const result: Figure = { rows: [], missing: [] };
  const STORE_PACKAGES = await installClients(...PACKAGES, "miniflare@4", "esbuild@0");
  for (const [name, title, open] of rows(all, STORE_PACKAGES)) {
    if (!name.includes(wanted)) continue;
    await check(title, 300 + cycles * 60, async () => await measureRow(title, await open(), cycles, result));
    if (result.rows.at(-1)?.name !== title) result.missing.push(title);
  }
  return result;
}

/** Adds a row to the table before anything in it fails the check, so that a fault is shown and not left out. */
async function measureRow(name: string, row: Row, cycles: number, { rows }: Figure): Promise<string> {
  const { kills, storms, thefts, undetected, ledger } = await measure(row, cycles);
  const { acknowledged, unanswered, lost, alive, wrong } = ledger;
  const logouts = lost.filter((what) => /refresh/.test(what)).length;
  const tokens = lost.length - logouts + alive.length;
  rows.push({ name, counts: { kills, storms, unanswered, acknowledged, lost: tokens, logouts, thefts, undetected } });
  const said = row.victims.map(({ output }) => oneLine(output().slice(-500))).join(" / ");
  demand(lost.length + alive.length + wrong.length === 0, `${ledger.faults}; the servers said: ${said}`);
  demand(undetected === 0, `${undetected} of ${thefts} thefts were not detected`);
  return `${kills} kills, ${thefts} thefts, ${acknowledged} acknowledged changes`;
}

export function markdown({ rows }: Figure): string {
  const columns = Object.keys(COLUMNS) as Column[];
  const sum = (column: Column) => rows.reduce((total, { counts }) => total + counts[column], 0);
  const cells = (counts: (column: Column) => number) => columns.map((column) => counts(column).toLocaleString("en-US"));
  const lines = [
    ["", ...Object.values(COLUMNS)],
    ["---", ...columns.map(() => "--:")],
    ...rows.map(({ name, counts }) => [name, ...cells((column) => counts[column])]),
    ["**together**", ...cells(sum)],
  ];
  return lines.map((line) => `| ${line.join(" | ")} |`).join("\n");
}

/** Puts the table between its markers in README.md. */
export async function writeToReadme(figure: Figure, about: string): Promise<void> {
  const file = join(ROOT, "README.md");
  const readme = Deno.readTextFileSync(file);
  const [from, to] = [readme.indexOf(BEGIN), readme.indexOf(END)];
  demand(from >= 0 && to > from, `README.md has no ${BEGIN} … ${END}`);
  const missing = figure.missing.length > 0 ? [`Not measured: ${figure.missing.join(", ")}.`, ""] : [];
  const section = [BEGIN, "", markdown(figure), "", ...missing, about, "", ""].join("\n");
  Deno.writeTextFileSync(file, readme.slice(0, from) + section + readme.slice(to));
  await run("npx", "-y", "deno", "fmt", file);
}

function rows(all: Runtime[], STORE_PACKAGES: string): [name: string, title: string, open: () => Promise<Row>][] {
  const names = (runtimes: Runtime[]) =>
    runtimes.length === 3 ? "all three" : runtimes.map(({ name }) => name).join("+");
  const onFile = (runtimes: Runtime[]) => async (): Promise<Row> => {
    const dir = join(temporaryFolder(), "state");
    const victims = await Promise.all(runtimes.map((runtime) => victim(runtime, dir, {})));
    return { victims };
  };
  const onEngine = (start: () => Promise<Engine>) => async (): Promise<Row> => {
    const engine = await start();
    const env = { STORE_MODULE: join(ROOT, ".ci", "lib", "stores.ts"), STORE_URL: engine.url, STORE_PACKAGES };
    const victims = await Promise.all(all.map((runtime) => victim(runtime, "-", env)));
    return { victims, engine };
  };
  const node = all.find(({ name }) => name === "Node");
  const together = all.length > 1 ? [all] : [];
  const found: ReturnType<typeof rows> = [];
  for (const runtimes of [...all.map((runtime) => [runtime]), ...together]) {
    found.push(["file", `SQLite, ${names(runtimes)}`, onFile(runtimes)]);
  }
  for (const [name, { title, start }] of Object.entries(ENGINES)) {
    found.push([name, `${title}, ${names(all)}`, onEngine(start)]);
  }
  if (node) {
    found.push(["durable-object", "Durable Object, workerd", () => durableObject(node, STORE_PACKAGES)]);
  }
  return found;
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
  return { victims };
}

async function measure({ victims, engine }: Row, cycles: number): Promise<Counts> {
  const counts: Counts = { kills: 0, storms: 0, thefts: 0, undetected: 0, ledger: new Ledger() };
  const { ledger } = counts;
  let ahead = 0;
  const clients = async (): Promise<Client[]> => {
    const all = await Promise.all(victims.map(({ port }) => ledger.client(port, askingAgain(overHttp(port)))));
    for (const client of all) {
      try {
        await until("the server serves", 60, async () => (await client.json("/test/clock", { ahead })).status === 200);
      } catch (error) {
        throw new Error(`${(error as Error).message}; the engine's log: ${engine?.log?.()}`);
      }
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

/** The sentence below the table: the date, the versions, the command. */
export function circumstances(all: Runtime[], cycles: number): string {
  const versions = all.map(({ name, version }) => `${name} ${version}`).join(", ");
  const date = new Date().toISOString().slice(0, 10);
  return `${date}, ${versions}, ${navigator.hardwareConcurrency} cores: ` +
    `\`npx -y deno run -A .ci/faults.ts --figure --cycles ${cycles}\``;
}
