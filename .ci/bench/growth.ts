/** Whether anything grows: the same requests at ten connections and at very many; memory; disk; registrations. */

import { join } from "node:path";
import { discard, figure, median, ratio, shown, start, type Table, temporary } from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";
import type { Growth } from "./growth_worker.ts";

export interface GrowthOptions {
  rounds: number;
  /** The first is what the others are compared with. */
  sizes: number[];
  registrations: number;
}

export async function growth(runtimes: Runtime[], { rounds, sizes, registrations }: GrowthOptions): Promise<Table> {
  const rows: string[][] = [];
  for (const runtime of runtimes) {
    const dir = temporary();
    const child = async (...args: string[]) => {
      const worker = start(runtime, "growth_worker.ts", ...args);
      try {
        return await worker.next();
      } finally {
        await worker.stop();
      }
    };
    try {
      const { times, bytes }: Growth = await child("times", dir, String(rounds), ...sizes.map(String));
      for (const [step, bySize] of Object.entries(times)) {
        const relative = bySize.slice(1).map((list) => shown(ratio(list, bySize[0]!)));
        rows.push([`${runtime.name}, ${step}`, `${figure(median(bySize[0]!))} µs`, ...relative]);
      }
      const used: number[] = [];
      // Three starts each: what a process takes varies more than what is looked for.
      for (const size of sizes) {
        const starts = [];
        for (let i = 0; i < 3; i++) starts.push((await child("memory", join(dir, String(size)))).memory);
        used.push(median(starts));
      }
      const more = (size: number, i: number) => (used[i]! - used[0]!) / (size - sizes[0]!);
      const each = sizes.slice(1).map((size, i) =>
        size < 10_000 ? "" : `${Math.max(0, more(size, i + 1)).toFixed(0)} B each`
      );
      rows.push([`${runtime.name}, memory`, `${(used[0]! / 2 ** 20).toFixed(0)} MB`, ...each]);
      rows.push([
        `${runtime.name}, disk`,
        `${(bytes[0]! / 1024).toFixed(0)} KB`,
        ...sizes.slice(1).map((size, i) => `${((bytes[i + 1]! - bytes[0]!) / (size - sizes[0]!)).toFixed(0)} B each`),
      ]);
      const { unchanged } = await child("register", temporaryIn(dir), String(registrations));
      if (!unchanged) throw new Error("registrations have changed the store");
      rows.push([`${runtime.name}, ${registrations.toLocaleString("en-US")} registrations`, "leave no byte"]);
    } finally {
      discard(dir);
    }
  }
  return {
    title: "Growth",
    note: "The same request as the store fills: its time at ten connections, and the multiple of it at more.",
    limit: "the same request at ten connections; 1.00 is no growth",
    essential: /verify|refresh|register|memory|disk/,
    head: ["", ...sizes.map((size, i) => `${i ? "× " : ""}at ${size.toLocaleString("en-US")}`)],
    rows,
  };
}

const temporaryIn = (dir: string) => join(dir, "registrations");
