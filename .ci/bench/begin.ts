/** How long a server takes to begin: from the start of its process to its first answer. */

import { readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { stripTypeScriptTypes } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { discard, median, ratio, shown, start, type Table, temporary } from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));

export async function begin(runtimes: Runtime[], rounds: number): Promise<Table> {
  const rows: string[][] = [];
  const script = temporary();
  try {
    for (const runtime of runtimes) {
      rows.push([runtime.name, ...await starts(runtime, rounds)]);
      if (runtime.name !== "Node") continue;
      // The first round, which does not count, fills it.
      const cached = { NODE_COMPILE_CACHE: join(script, "cache") };
      rows.push(["Node, compile cache", ...await starts({ ...runtime, env: cached }, rounds)]);
      const env = { BENCH_MOD: javascript(script) };
      rows.push(["Node, as JavaScript", ...await starts({ ...runtime, env }, rounds)]);
    }
  } finally {
    discard(script);
  }
  return {
    title: "Start",
    note:
      "From the start of the process to the first 401, and to the first answer of a bare server. The import of mod.ts " +
      "is that of the copied file, with hono loaded already. Node takes the types out of a copied file at each start, " +
      "unless NODE_COMPILE_CACHE names a folder to remember it in; what JSR hands it is JavaScript.",
    limit: "a bare Hono server, and the import of hono, which mod.ts cannot do without",
    head: ["", "of a bare server", "first 401", "bare server", "import of mod.ts", "import of hono"],
    rows,
  };
}

/** mod.ts without its types, in a folder from which it finds its imports. */
function javascript(folder: string): string {
  symlinkSync(path("../../node_modules"), join(folder, "node_modules"));
  const file = join(folder, "mod.mjs");
  writeFileSync(file, stripTypeScriptTypes(readFileSync(path("../../mod.ts"), "utf8")));
  return file;
}

async function starts(runtime: Runtime, rounds: number): Promise<string[]> {
  const dir = temporary();
  const times = { guarded: [] as number[], bare: [] as number[] };
  const imports = { mod: [] as number[], hono: [] as number[] };
  try {
    for (let round = 0; round <= rounds; round++) {
      for (const kind of ["guarded", "bare"] as const) {
        const taken = await firstAnswer(runtime, kind === "guarded" ? [dir] : []);
        if (round > 0) times[kind].push(taken);
      }
      const loading = start(runtime, "import.ts");
      const { mod, hono } = await loading.next();
      await loading.stop();
      if (round === 0) continue;
      imports.mod.push(mod);
      imports.hono.push(hono);
    }
  } finally {
    discard(dir);
  }
  const { guarded, bare } = times;
  return [
    shown(ratio(guarded, bare)),
    `${median(guarded).toFixed(0)} ms`,
    `${median(bare).toFixed(0)} ms`,
    `${median(imports.mod).toFixed(1)} ms`,
    `${median(imports.hono).toFixed(1)} ms`,
  ];
}

async function firstAnswer(runtime: Runtime, folder: string[]): Promise<number> {
  const started = performance.now();
  const server = start(runtime, "server.ts", "hono", ...folder);
  try {
    const { port } = await server.next();
    const response = await fetch(`http://127.0.0.1:${port}/mcp`);
    await response.body?.cancel();
    const taken = performance.now() - started;
    if (response.status !== (folder.length > 0 ? 401 : 200)) throw new Error(`the first answer is ${response.status}`);
    return taken;
  } finally {
    await server.stop();
  }
}
