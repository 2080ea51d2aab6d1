/**
 * A `Deno.Kv` on every runtime: Deno's own, or `@deno/kv` on Node and Bun, which is fetched into a folder of its own. As
 * a program, one of several processes that share a KV: it changes a key so many times, and prints all there is, as JSON.
 *
 *     kv.ts PATH KEY TIMES FOLDER
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { type KvLike, kvStore } from "../../mod.ts";

type OpenKv = (path: string) => Promise<KvLike>;

/** Puts `@deno/kv` into a new folder. */
export function installKv(): { folder: string; dispose(): void } {
  const folder = mkdtempSync(join(tmpdir(), "personal-auth-kv-"));
  execFileSync("npm", ["install", "--no-audit", "--no-fund", "--prefix", folder, "@deno/kv@0.14"], { stdio: "ignore" });
  return { folder, dispose: () => rmSync(folder, { recursive: true, force: true }) };
}

/** `folder`: where `@deno/kv` is, for Node and Bun. */
export function kvOpener(folder: string): OpenKv {
  const { Deno, Bun } = globalThis as { Deno?: { openKv: OpenKv }; Bun?: unknown };
  if (Deno) return Deno.openKv;
  const { openKv } = createRequire(join(folder, "x.js"))("@deno/kv");
  // Bun has no V8, so @deno/kv wants to be told how values are written that are not bytes. All of ours are.
  return Bun ? (path) => openKv(path, { encodeV8: String, decodeV8: String }) : openKv;
}

export const increment = (current: unknown): number => (current as number | undefined ?? 0) + 1;

if (process.argv[1]?.endsWith("kv.ts") && process.argv.length > 4) {
  const [path = "", key = "", times = "0", folder = ""] = process.argv.slice(2);
  const store = kvStore(await kvOpener(folder)(path));
  for (let i = 0; i < Number(times); i++) await store.update(key, increment);
  const entries = [];
  for await (const entry of store.list("")) entries.push(entry);
  console.log(JSON.stringify(entries));
  store.close!();
}
