/** What a connection's life costs, durable and in memory, against what the disk can do. */

import { discard, figure, median, ratio, shown, start, type Table, temporary } from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";
import type { Lives } from "./journeys_worker.ts";

export interface JourneyOptions {
  rounds: number;
  /** Connections in each round. */
  count: number;
}

export async function journeys(runtimes: Runtime[], { rounds, count }: JourneyOptions): Promise<Table> {
  const rows: string[][] = [];
  for (const runtime of runtimes) {
    const dir = temporary();
    const worker = start(runtime, "journeys_worker.ts", dir, String(rounds), String(count));
    try {
      const { file, memory, commit }: Lives = await worker.next();
      for (const step of Object.keys(file)) {
        rows.push([
          `${runtime.name}, ${step}`,
          shown(ratio(commit[step]!, file[step]!)),
          shown(ratio(memory[step]!, file[step]!)),
          figure(median(file[step]!)),
          figure(median(memory[step]!)),
          figure(median(commit[step]!)),
        ]);
      }
    } finally {
      await worker.stop();
      discard(dir);
    }
  }
  return {
    title: "A connection's life",
    note:
      "Ten requests at a time in one process, durable on fileStore: how many there are for each bare commit to the " +
      "same disk, and for each one in memory. The times are medians, for one of the ten.",
    limit: "one bare commit of SQLite to the same disk for each change, and the same server without a disk",
    essential: /code exchange|refresh|later use|revoke/,
    head: ["", "per commit", "per one in memory", "µs durable", "µs in memory", "µs commit"],
    rows,
  };
}
