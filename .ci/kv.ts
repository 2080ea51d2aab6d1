/**
 * `kvStore` on a real `Deno.Kv`, in a file and in memory, by several processes at once: Deno's own by
 * `deno test -A --filter Kv .ci/kv.ts`, and `@deno/kv` by `node --test --test-name-pattern=Kv .ci/kv.ts`. The filters
 * leave out the tests that come along with the contract. Deno Deploy's distributed KV cannot be had here.
 */

import { deepStrictEqual as equal } from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { kvStore } from "../mod.ts";
import { storeContract } from "../mod_test.ts";
import { kvOpener } from "./lib/kv.ts";

test("Kv in memory keeps the contract of a store", async (t) => {
  const { openKv, dispose } = kvOpener();
  t.after(dispose);
  const store = kvStore(await openKv(":memory:"));
  await storeContract(() => ({ ...store, close: () => {} }));
  store.close!();
});

test("Kv in a file keeps the contract of a store, and every change of three processes", async (t) => {
  const { openKv, folder, dispose } = kvOpener();
  t.after(dispose);
  const dir = mkdtempSync(join(tmpdir(), "personal-auth-kv-"));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const path = join(dir, "kv");
  await storeContract(async () => kvStore(await openKv(path)));
  const script = fileURLToPath(new URL("lib/kv.ts", import.meta.url));
  const args = [
    ...("Deno" in globalThis ? ["run", "-A", "--unstable-kv"] : []),
    script,
    path,
    "together",
    "100",
    folder,
  ];
  await Promise.all([1, 2, 3].map(() => promisify(execFile)(process.execPath, args)));
  const store = kvStore(await openKv(path));
  t.after(() => store.close!());
  equal(await store.get("together"), 300);
});
