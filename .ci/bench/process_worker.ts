/**
 * Times the guard in one process, without sockets: `process_worker.ts STORE ROUNDS COUNT`, with a state folder or "memory".
 * Prints one line of JSON.
 *
 * @module
 */

import process from "node:process";
import { type Handler, Hono, type MiddlewareHandler } from "hono";
import { BASE } from "../lib/client.ts";
import { mod } from "./world.ts";

const [place = "memory", rounds = "20", count = "2000"] = process.argv.slice(2);

/** Microseconds for one request, of each round. */
export type Costs = Record<"guarded" | "middleware" | "bare", number[]>;

const store = place === "memory" ? mod.memoryStore() : mod.fileStore(place);
const auth = mod.personalAuth({ baseUrl: BASE, store, authenticateOwner: () => true, onEvent: () => {} });
const { token } = await auth.createToken({ name: "load" });

/** The least that any guard does. */
const readsHeader: MiddlewareHandler = async (c, next) => {
  if (c.req.header("Authorization") === undefined) return c.text("unauthorized", 401);
  await next();
};
const handler: Handler = (c) => c.text("hello");

const apps = {
  guarded: new Hono().all("/mcp", auth.guard, handler),
  middleware: new Hono().all("/mcp", readsHeader, handler),
  bare: new Hono().all("/mcp", handler),
};
const sides = Object.keys(apps) as (keyof Costs)[];
const request = new Request(`${BASE}/mcp`, { headers: { Authorization: `Bearer ${token}` } });

async function cost(side: keyof Costs): Promise<number> {
  const started = performance.now();
  for (let i = 0; i < Number(count); i++) {
    const response = await apps[side].fetch(request);
    if (response.status !== 200) throw new Error(`${side}: ${response.status}`);
  }
  return (performance.now() - started) * 1000 / Number(count);
}

const costs: Costs = { guarded: [], middleware: [], bare: [] };
for (let round = -3; round < Number(rounds); round++) { // the first three warm up
  for (const side of round % 2 ? sides : sides.toReversed()) {
    const taken = await cost(side);
    if (round >= 0) costs[side].push(taken);
  }
}
console.log(JSON.stringify(costs));
process.exit(0);
