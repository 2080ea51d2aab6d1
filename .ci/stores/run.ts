/**
 * The stores of this folder, and `kvStore`, on engines that are started here: the contract, servers on three runtimes
 * behind one engine, servers and engines that are killed, engines that are frozen or gone.
 *
 *     npx -y deno run -A .ci/stores/run.ts [--kills N] [--only TEXT]
 *
 * `--kills` (50) is how often servers and engines are killed. What cannot run on a machine is `not run`.
 *
 * @module
 */

import { join } from "node:path";
import { check, demand, finish, numberArgument, Running, textArgument, until, wantedRuntimes } from "../lib/checks.ts";
import { askingAgain, type Client, overHttp, type Tokens } from "../lib/client.ts";
import { type Engine, ENGINES, installClients } from "../lib/engines.ts";
import { Ledger } from "../lib/ledger.ts";
import { oneLine, pause } from "../lib/limits.ts";
import { ROOT, type Runtime } from "../lib/runtimes.ts";
import { open, PACKAGES } from "../lib/stores.ts";
import { agree, distinct, expect, shuffled, timed } from "../lib/together.ts";
import { storeContract } from "./contract.ts";

const KILLS = numberArgument("kills", 50);
const ONLY = textArgument("only") ?? "";
const SERVER = join(ROOT, ".ci", "lib", "server.ts");
/** Seconds: what mod.ts gives a store, and what Claude gives a server. */
const [DEADLINE, CLAUDE_WAITS] = [8, 10];

interface Server {
  runtime: Runtime;
  process: Running;
  client: Client;
  /** Asks again when the answer is 503. */
  patient: Client;
}

async function serve(runtime: Runtime, engine: Engine, ledger = new Ledger()): Promise<Server> {
  const [executable, ...before] = runtime.command;
  const flags = runtime.name === "Deno" ? ["--unstable-kv"] : [];
  const env = { STORE_MODULE: join(ROOT, ".ci", "lib", "stores.ts"), STORE_URL: engine.url, STORE_PACKAGES };
  const process = new Running(executable!, [...before, ...flags, SERVER, "serve", "-"], env);
  const port = await process.says(/listening on (\d+)/);
  const [client, patient] = [await ledger.client(port), await ledger.client(port, askingAgain(overHttp(port)))];
  return { runtime, process, client, patient };
}

async function contract(engine: Engine): Promise<void> {
  await storeContract(() => open(engine.url));
}

/** One answer to a thousand refreshes with one token, spread over three runtimes, and all that `agree` asks for. */
async function agreement(engine: Engine): Promise<string> {
  const servers = await Promise.all(all.map((runtime) => serve(runtime, engine)));
  const clients = servers.map(({ client }) => client);
  const { refresh_token } = await clients[0]!.connect();
  const { answer: answers, milliseconds } = await timed(
    Promise.all(Array.from({ length: 1000 }, (_, i) => clients[i % clients.length]!.refresh(refresh_token))),
  );
  expect(answers[0]!, 200, "a refresh");
  demand(distinct(answers) === 1, `${distinct(answers)} answers to one refresh token`);
  for (const client of clients) expect(await client.call(answers[0]!.body.access_token), 200, "the new token");
  return `1,000 refreshes of one token: one answer (${Math.round(milliseconds)} ms); ${await agree(clients, 10)}`;
}

/** One of three servers is killed under load, and the engine every second time, if it can be. */
async function killed(engine: Engine): Promise<string> {
  const ledger = new Ledger();
  let servers = await Promise.all(all.map((runtime) => serve(runtime, engine, ledger)));
  let engineKills = 0;
  for (let kill = 1; kill <= KILLS; kill++) {
    const killEngine = engine.kill && kill % 2 === 0;
    const loads = servers.map(({ client }) => ledger.load(client, 5, engine.kill ? "away" : undefined));
    await pause(50 + Math.random() * 250);
    if (killEngine) {
      await engine.kill!();
      engineKills++;
      await pause(Math.random() * 100);
      await engine.start!();
    } else {
      const victim = shuffled(servers)[0]!;
      await victim.process.kill();
      const next = await serve(victim.runtime, engine, ledger);
      servers = servers.map((server) => server === victim ? next : server);
    }
    for (const load of loads) load.stop();
    await Promise.all(loads.map(({ done }) => done));
    for (const { process, runtime, client } of servers) {
      demand(!process.ended, `the server on ${runtime.name} ended: ${oneLine(process.output, 600)}`);
      await serves(client, runtime, engine);
    }
    demand(ledger.faults === "", `after kill ${kill}: ${ledger.faults}`);
    await ledger.audit(shuffled(servers)[0]!.patient);
    demand(ledger.faults === "", `after kill ${kill}: ${ledger.faults}`);
  }
  await ledger.audit(servers[0]!.patient, true);
  demand(ledger.faults === "", ledger.faults);
  return `${KILLS - engineKills} kills of servers on ${all.map(({ name }) => name).join("+")}, ${engineKills} of the ` +
    `engine: nothing lost of ${ledger.acknowledged} acknowledged changes`;
}

/** Waits until the server reaches its store again, by every connection that it has to it. */
async function serves(client: Client, { name }: Runtime, engine: Engine): Promise<void> {
  try {
    await until(`the server on ${name} serves again`, 20, async () => {
      return (await client.json("/test/count", { key: "alive", times: 30 })).status === 200;
    });
  } catch (error) {
    throw new Error(`${(error as Error).message}; the engine's log: ${engine.log?.()}`);
  }
}

/** Everything is refused in time while the engine does not answer, and served at once when it does. */
async function unreachable(engine: Engine, leave: () => Promise<unknown>, come: () => Promise<unknown>) {
  const servers = await Promise.all(all.map((runtime) => serve(runtime, engine)));
  const connected: { client: Client; tokens: Tokens; ended: Tokens; code: string }[] = [];
  for (const { client } of servers) {
    const [tokens, ended] = [await client.connect(), await client.connect()];
    connected.push({ client, tokens, ended, code: (await client.approve()).code! });
    expect(await client.call(tokens.access_token), 200, "a call before");
  }
  const asks = connected.flatMap(({ client, tokens, ended, code }) => [
    () => client.call(tokens.access_token),
    () => client.refresh(tokens.refresh_token),
    () => client.redeem(code),
    () => client.revoke(ended.refresh_token),
    () => client.approve(),
  ]);
  await leave();
  let answers;
  try {
    answers = await Promise.all(asks.map((ask) => timed(ask())));
  } finally {
    await come();
  }
  const slowest = Math.max(...answers.map(({ milliseconds }) => milliseconds)) / 1000;
  for (const { answer } of answers) {
    expect(answer, 503, "a request without the engine");
    demand(Number(answer.headers.get("Retry-After")) > 0, "503 without Retry-After");
  }
  demand(slowest < Math.min(DEADLINE + 1, CLAUDE_WAITS), `an answer took ${slowest.toFixed(1)} s`);
  for (const { process } of servers) demand(/server_error/.test(process.output), "nobody was told");
  const back = performance.now();
  for (const { client, runtime } of servers) await serves(client, runtime, engine);
  const again = (performance.now() - back) / 1000;
  for (const { client, tokens, ended, code } of connected) {
    expect(await client.call(tokens.access_token), 200, "the call, later");
    expect(await client.refresh(tokens.refresh_token), 200, "the refresh, later");
    // What was asked for may have happened late, as when an answer gets lost: then the code is used.
    demand([200, 400].includes((await client.redeem(code)).status), "the code, later");
    expect(await client.revoke(ended.refresh_token), 200, "the revocation, later");
    expect(await client.call(ended.access_token), 401, "what was revoked");
  }
  return `${answers.length} requests on ${all.map(({ name }) => name).join("+")} answered 503 within ` +
    `${slowest.toFixed(1)} s; full service ${again.toFixed(1)} s after the engine was back`;
}

const all = await wantedRuntimes();
const STORE_PACKAGES = await installClients(...PACKAGES);

for (const [id, { start }] of Object.entries(ENGINES)) {
  const perform = async (name: string, seconds: number, body: (engine: Engine) => Promise<string | void>) => {
    if (!`${name}, ${id}`.includes(ONLY)) return;
    await check(`${name}, ${id}`, seconds, async () => await body(await start()));
  };
  await perform("the contract", 120, contract);
  await perform("agreement of three runtimes", 180, agreement);
  await perform("kills", 60 + KILLS * 20, killed);
  if (id === "kv") continue; // a file, not a process
  await perform("frozen", 120, (engine) => unreachable(engine, engine.freeze!, engine.thaw!));
  await perform("gone", 120, (engine) => unreachable(engine, engine.kill!, engine.start!));
}
await finish();
