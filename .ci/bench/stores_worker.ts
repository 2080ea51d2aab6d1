/**
 * Times a check of the guard and a refresh on an engine and on fileStore, in turns: `stores_worker.ts DIR URL ROUNDS
 * COUNT`, on Node, with STORE_PACKAGES as `lib/stores.ts` wants it. Prints one line of JSON.
 *
 * @module
 */

import process from "node:process";
import { median } from "./kit.ts";
import type { Tokens } from "../lib/client.ts";
import { open } from "../lib/stores.ts";
import { good, mod, world } from "./world.ts";

const [dir = "", url = "", rounds = "5", count = "20"] = process.argv.slice(2);

/** Microseconds for one of ten at once: the median of each round. */
export type StoreTimes = Record<"guard" | "refresh", Record<"file" | "engine", number[]>>;

const AT_ONCE = 10;
const worlds = { file: world(mod.fileStore(dir)), engine: world(await open(url)) };
const times: StoreTimes = { guard: { file: [], engine: [] }, refresh: { file: [], engine: [] } };

for (let round = 0; round <= Number(rounds); round++) {
  for (const side of ["file", "engine"] as const) {
    const { auth, client } = worlds[side];
    const lives = await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      const it = client();
      return { it, tokens: await it.connect() as Tokens };
    }));
    const taken = { guard: [] as number[], refresh: [] as number[] };
    const time = async (step: "guard" | "refresh", task: (life: typeof lives[0]) => Promise<unknown>) => {
      const started = performance.now();
      await Promise.all(lives.map(task));
      taken[step].push((performance.now() - started) * 1000 / AT_ONCE);
    };
    for (let i = 0; i < Number(count); i++) {
      await time("guard", ({ tokens }) => auth.verifyAccessToken(tokens.access_token));
      await time("refresh", async (life) => life.tokens = await good(life.it.refresh(life.tokens.refresh_token)));
    }
    if (round === 0) continue; // warms up
    for (const step of ["guard", "refresh"] as const) times[step][side].push(median(taken[step]));
  }
}
console.log(JSON.stringify(times));
process.exit(0);
