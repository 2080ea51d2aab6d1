/**
 * A `Deno.Kv` on either runtime that has one: Deno's own, or `@deno/kv` on Node, which is fetched into a folder of its
 * own. As a program, one of several processes that change a key at the same time:
 *
 *     kv.ts PATH KEY TIMES
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

/** `folder`: where `@deno/kv` is, if it is needed; `npm` puts it there if this is absent. */
export function kvOpener(folder?: string): { openKv: OpenKv; folder: string; dispose(): void } {
  const { Deno } = globalThis as { Deno?: { openKv: OpenKv } };
  if (Deno) return { openKv: Deno.openKv, folder: "", dispose: () => {} };
  const place = folder || mkdtempSync(join(tmpdir(), "personal-auth-kv-"));
  if (!folder) execFileSync("npm", ["install", "--no-audit", "--no-fund", "--prefix", place, "@deno/kv@0.13"]);
  const { openKv } = createRequire(join(place, "x.js"))("@deno/kv") as { openKv: OpenKv };
  return { openKv, folder: place, dispose: () => rmSync(place, { recursive: true, force: true }) };
}

export const increment = (current: unknown): number => (current as number | undefined ?? 0) + 1;

if (process.argv[1]?.endsWith("kv.ts") && process.argv.length > 4) {
  const [path = "", key = "", times = "0", folder] = process.argv.slice(2);
  const store = kvStore(await kvOpener(folder).openKv(path));
  for (let i = 0; i < Number(times); i++) await store.update(key, increment);
  store.close!();
}
