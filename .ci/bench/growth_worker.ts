/**
 * What a full store costs: `growth_worker.ts times DIR ROUNDS SIZE…` fills one state folder below DIR for each size and
 * times the same requests on all of them in turn; `growth_worker.ts memory DIR` opens one of them and says how much
 * memory that takes; `growth_worker.ts register DIR COUNT` registers so many clients. Each prints one line of JSON.
 *
 * @module
 */

import { createHash, randomBytes } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { median } from "./kit.ts";
import type { Client, Tokens } from "../lib/client.ts";
import { good, mod, world } from "./world.ts";

const [mode, dir = "", ...rest] = process.argv.slice(2);
const { DatabaseSync } = createRequire(import.meta.url)("node:sqlite");

/** By step and size, the median of each round in microseconds; and the bytes on disk by size. */
export interface Growth {
  times: Record<string, number[][]>;
  bytes: number[];
}

/** What is made anew in a copy of a record. */
interface Grant {
  access: { hash: string }[];
  refresh: { hash: string };
}

/** As many connections as are timed on each store: the rest is there and idle. */
const SAMPLES = 10;

/** Copies of a real record under ids of their own, in one go. */
function fill(folder: string, count: number): string[] {
  const db = new DatabaseSync(join(folder, "oauth.sqlite"));
  const hash = () => randomBytes(32).toString("base64url");
  const { value, expires } = db.prepare("SELECT value, expires FROM entries WHERE key LIKE 'grant/%'").get();
  const insert = db.prepare("INSERT INTO entries (key, value, expires) VALUES (?, ?, ?)");
  db.exec("BEGIN");
  for (let i = 0; i < count; i++) {
    const grant: Grant = JSON.parse(value);
    for (const token of grant.access) token.hash = hash();
    grant.refresh.hash = hash();
    insert.run(`grant/${randomBytes(16).toString("hex")}`, JSON.stringify(grant), expires);
  }
  db.exec("COMMIT; PRAGMA wal_checkpoint(TRUNCATE)");
  const keys = db.prepare("SELECT key FROM entries WHERE key LIKE 'grant/%' ORDER BY random() LIMIT 10000").all();
  db.close();
  return keys.map(({ key }: { key: string }) => key);
}

async function prepared(size: number) {
  const folder = join(dir, String(size));
  mkdirSync(folder);
  const store = mod.fileStore(folder);
  const w = world(store);
  const samples: { client: Client; tokens: Tokens }[] = [];
  for (let i = 0; i < SAMPLES; i++) {
    const client = w.client();
    samples.push({ client, tokens: await client.connect() });
  }
  const keys = fill(folder, size - SAMPLES);
  let at = 0;
  const readAny = () => store.get(keys[at++ % keys.length]!);
  return { w, samples, folder, readAny };
}

async function times(rounds: number, sizes: number[]): Promise<Growth> {
  const stores = [];
  for (const size of sizes) stores.push(await prepared(size));
  const bytes = stores.map(({ folder }) => statSync(join(folder, "oauth.sqlite")).size);
  type Sample = (typeof stores)[number]["samples"][number];
  type Prepared = (typeof stores)[number];
  const steps: Record<string, (on: Prepared, sample: Sample) => Promise<unknown>> = {
    verify: ({ w }, { tokens }) => w.auth.verifyAccessToken(tokens.access_token),
    "read of any record": ({ readAny }) => readAny(),
    refresh: async (_, sample) => sample.tokens = await good(sample.client.refresh(sample.tokens.refresh_token)),
    register: (_, { client }) => good(client.register()),
    connect: (_, { client }) => client.connect(),
  };
  const results: Growth["times"] = {};
  for (const [step, task] of Object.entries(steps)) {
    results[step] = stores.map(() => []);
    const repeat = { verify: 50, "read of any record": 50, register: 5 }[step] ?? 1;
    for (let round = 0; round <= rounds; round++) {
      for (const [which, store] of stores.entries()) {
        const taken: number[] = [];
        for (let i = 0; i < SAMPLES * repeat; i++) {
          const started = performance.now();
          await task(store, store.samples[i % SAMPLES]!);
          taken.push((performance.now() - started) * 1000);
        }
        if (round > 0) results[step]![which]!.push(median(taken));
      }
    }
  }
  return { times: results, bytes };
}

async function memory(): Promise<{ memory: number }> {
  const store = mod.fileStore(dir);
  const w = world(store);
  await good(w.client().register());
  await w.auth.verifyAccessToken(`pat_${"0".repeat(96)}`).catch(() => {});
  await new Promise((resolve) => setTimeout(resolve, 200));
  const { Bun, gc } = globalThis as { Bun?: { gc(force: boolean): void }; gc?: () => void };
  Bun?.gc(true);
  gc?.();
  return { memory: process.memoryUsage().rss };
}

/** Everything in the folder, as one digest. */
function contents(): string {
  const hash = createHash("sha256");
  for (const name of readdirSync(dir).sort()) hash.update(name).update(readFileSync(join(dir, name)));
  return hash.digest("hex");
}

async function register(count: number): Promise<{ unchanged: boolean; seconds: number }> {
  const client = world(mod.fileStore(dir)).client();
  await good(client.register("the first, for which the server's key is drawn"));
  const before = contents();
  const started = performance.now();
  for (let i = 0; i < count; i++) await good(client.register(`client ${i}`));
  return { unchanged: contents() === before, seconds: (performance.now() - started) / 1000 };
}

const answer = mode === "times"
  ? await times(Number(rest[0]), rest.slice(1).map(Number))
  : mode === "memory"
  ? await memory()
  : await register(Number(rest[0]));
console.log(JSON.stringify(answer));
process.exit(0);
