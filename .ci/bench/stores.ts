/** What another engine costs: a check of the guard and a refresh on it, against fileStore in the same process. */

import { discard, figure, median, ratio, shown, start, type Table, temporary } from "./kit.ts";
import { type Engine, ENGINES, installClients } from "../lib/engines.ts";
import { NotRun } from "../lib/limits.ts";
import type { Runtime } from "../lib/runtimes.ts";
import { PACKAGES } from "../lib/stores.ts";
import type { StoreTimes } from "./stores_worker.ts";

export async function stores(node: Runtime, { rounds, count }: { rounds: number; count: number }): Promise<Table> {
  const STORE_PACKAGES = await installClients(...PACKAGES);
  const rows: string[][] = [];
  for (const { title, start: startEngine } of Object.values(ENGINES)) {
    const dir = temporary();
    let engine: Engine | undefined;
    try {
      engine = await startEngine();
      const env = { ...Deno.env.toObject(), ...node.env, STORE_PACKAGES };
      const worker = start({ ...node, env }, "stores_worker.ts", dir, engine.url, String(rounds), String(count));
      const { guard, refresh }: StoreTimes = await worker.next();
      await worker.stop();
      rows.push([
        title,
        ...[guard, refresh].flatMap(({ file, engine }) => [
          shown(ratio(file, engine)),
          figure(median(engine)),
          figure(median(file)),
        ]),
      ]);
    } catch (error) {
      if (!(error instanceof NotRun)) throw error;
      rows.push([title, `not run: ${error.message}`]);
    } finally {
      await engine?.kill?.();
      discard(dir);
    }
  }
  return {
    title: "Other stores",
    note:
      "On Node, ten requests at a time in one process, in turns with fileStore: how many there are on the engine, on " +
      "this machine's loopback, for each one on fileStore. An engine without a stamp is asked at every check.",
    limit: "the same requests on fileStore in the same rounds",
    head: ["", "guard", "µs", "µs fileStore", "refresh", "µs", "µs fileStore"],
    rows,
  };
}
