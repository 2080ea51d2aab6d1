/**
 * A store on an engine, by its address, on any runtime: `redis://…`, `postgres://…`, or the path of a KV. The packages
 * are in a folder of their own, which the environment names in STORE_PACKAGES.
 *
 * @module
 */

import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { kvStore, type Store } from "../../mod.ts";
import { postgresStore } from "../stores/postgres.ts";
import { redisStore } from "../stores/redis.ts";
import { kvOpener } from "./kv.ts";

export const PACKAGES = ["redis@5", "pg@8", "@deno/kv@0.14"];

/** What a program does that follows the README. */
export async function open(url: string): Promise<Store> {
  const { STORE_PACKAGES = "" } = process.env;
  const load = createRequire(join(STORE_PACKAGES, "x.js"));
  if (url.startsWith("redis:")) {
    // Without a queue for commands while Redis is away: what comes too late is of no use to anybody.
    const client = load("redis").createClient({ url, disableOfflineQueue: true });
    client.on("error", () => {});
    await client.connect();
    return { ...redisStore(client), close: () => client.destroy() };
  }
  if (url.startsWith("postgres:")) {
    const { Pool } = load("pg");
    const pool = new Pool({ connectionString: url, connectionTimeoutMillis: 5000 });
    return { ...postgresStore(pool), close: () => pool.end() };
  }
  return kvStore(await kvOpener(STORE_PACKAGES)(url));
}
