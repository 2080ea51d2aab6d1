/**
 * Times each step of a connection's life: `journeys_worker.ts DIR ROUNDS COUNT`, on a state folder below DIR, in
 * memory, and against bare commits to the same disk. Prints one line of JSON.
 *
 * @module
 */

import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { median } from "./kit.ts";
import type { Client, Tokens } from "../lib/client.ts";
import { good, mod, type World, world } from "./world.ts";

const [dir = "", rounds = "7", count = "100"] = process.argv.slice(2);
const { DatabaseSync } = createRequire(import.meta.url)("node:sqlite");

const BATCH = 10;

/** The time of ten operations at once, divided by ten, in microseconds: the median of each round. */
export type Times = Record<string, number[]>;
export interface Lives {
  file: Times;
  memory: Times;
  /** Bare commits, one after the other, timed in between the operations of the same step. */
  commit: Times;
}

/** A connection on its way: what the steps so far have left. */
interface Life {
  w: World;
  client: Client;
  code: string;
  tokens: Tokens;
}

const STEPS: Record<string, (life: Life) => Promise<unknown>> = {
  register: ({ client }) => client.id(),
  authorize: async (life) => life.code = (await life.client.approve()).code!,
  "code exchange": async (life) => life.tokens = await good(life.client.redeem(life.code)),
  "first use": ({ w, tokens }) => w.auth.verifyAccessToken(tokens.access_token),
  refresh: async (life) => life.tokens = await good(life.client.refresh(life.tokens.refresh_token)),
  "first use of the new": ({ w, tokens }) => w.auth.verifyAccessToken(tokens.access_token),
  "later use": ({ w, tokens }) => w.auth.verifyAccessToken(tokens.access_token),
  revoke: ({ client, tokens }) => good(client.revoke(tokens.refresh_token)),
};

/** What the disk and SQLite can do: one record of a grant's size, made durable before the next. */
function committer(): () => void {
  const db = new DatabaseSync(join(dir, "commits.sqlite"));
  db.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL");
  db.exec("CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL)");
  db.exec("CREATE INDEX expiring ON entries (expires) WHERE expires IS NOT NULL");
  const upsert = db.prepare("INSERT OR REPLACE INTO entries (key, value, expires) VALUES (?, ?, ?)");
  let n = 0;
  return () => upsert.run(`grant/${++n}`, "x".repeat(800), n);
}

const stores = { file: world(mod.fileStore(join(dir, "state"))), memory: world(mod.memoryStore()) };
const commit = committer();
const times: Lives = { file: {}, memory: {}, commit: {} };

for (let round = 0; round <= Number(rounds); round++) {
  const of = (w: World) => Array.from({ length: Number(count) }, () => ({ w, client: w.client() } as Life));
  const files = of(stores.file);
  const memories = of(stores.memory);
  for (const [step, task] of Object.entries(STEPS)) {
    const taken = { file: [] as number[], memory: [] as number[], commit: [] as number[] };
    // Ten at once of each in turn, so that whatever else the machine and the disk are doing hits all three.
    for (let from = 0; from < Number(count); from += BATCH) {
      for (const side of ["file", "memory", "commit"] as const) {
        const some = { file: files, memory: memories, commit: [] }[side].slice(from, from + BATCH);
        const started = performance.now();
        if (side === "commit") { for (let i = 0; i < BATCH; i++) commit(); }
        else await Promise.all(some.map(task));
        taken[side].push((performance.now() - started) * 1000 / BATCH);
      }
    }
    if (round === 0) continue; // warms up
    for (const side of ["file", "memory", "commit"] as const) (times[side][step] ??= []).push(median(taken[side]));
  }
}
console.log(JSON.stringify(times));
process.exit(0);
