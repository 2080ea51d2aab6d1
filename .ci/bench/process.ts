/** What the guard costs in one process, without sockets: above the least middleware, for each store. */

import { discard, figure, median, shown, spread, start, type Table, temporary } from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";
import type { Costs } from "./process_worker.ts";

export interface ProcessOptions {
  launches: number;
  rounds: number;
  /** Requests in each round. */
  count: number;
}

export async function inProcess(runtimes: Runtime[], { launches, rounds, count }: ProcessOptions): Promise<Table> {
  const rows: string[][] = [];
  for (const runtime of runtimes) {
    for (const store of ["memoryStore", "fileStore"]) {
      const all: Costs = { guarded: [], middleware: [], bare: [] };
      for (let launch = 0; launch < launches; launch++) {
        const dir = temporary();
        const place = store === "fileStore" ? dir : "memory";
        const worker = start(runtime, "process_worker.ts", place, String(rounds), String(count));
        try {
          const costs: Costs = await worker.next();
          for (const side of Object.keys(all) as (keyof Costs)[]) all[side].push(...costs[side]);
        } finally {
          await worker.stop();
          discard(dir);
        }
      }
      const above = all.guarded.map((guarded, i) => guarded - all.middleware[i]!);
      const sides = [all.guarded, all.middleware, all.bare].map((list) => figure(median(list)));
      rows.push([`${runtime.name}, ${store}`, shown(spread(above)), ...sides]);
    }
  }
  return {
    title: "The guard in one process",
    note: "Microseconds for a request to a handler that does nothing, one after the other, without a socket.",
    limit: "the least middleware, which reads the Authorization header and does nothing else",
    head: ["", "guard above middleware", "with the guard", "with the middleware", "bare handler"],
    rows,
  };
}
