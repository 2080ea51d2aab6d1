/**
 * `kvStore` on a real `Deno.Kv`, in a file and in memory: Deno's own, and `@deno/kv` on Node and Bun, each alone, in every
 * pair and all at once. `deno test -A .ci/kv.ts`. A self-hosted denokv takes minutes to build, so it is not started here.
 */

import { deepStrictEqual as equal } from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { kvStore } from "../mod.ts";
import { installKv, kvOpener } from "./lib/kv.ts";
import { ENVIRONMENT, ROOT, type Runtime, runtimes } from "./lib/runtimes.ts";
import { storeContract } from "./stores/contract.ts";

const script = (name: string) => fileURLToPath(new URL(name, import.meta.url));

async function run({ command: [executable, ...before], name }: Runtime, ...args: string[]): Promise<string> {
  const all = [...before, ...(name === "Deno" ? ["--unstable-kv"] : []), ...args];
  return (await promisify(execFile)(executable!, all, { env: ENVIRONMENT, cwd: ROOT })).stdout;
}

function temporaryPath(t: TestContext): string {
  const dir = mkdtempSync(join(tmpdir(), "personal-auth-kv-"));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  return join(dir, "kv");
}

test("a KV in memory keeps the contract of a store", async () => {
  const store = kvStore(await kvOpener("")(":memory:"));
  await storeContract(() => ({ ...store, close: () => {} }));
  store.close!();
});

test("a KV in a file keeps the contract of a store, on every runtime", async (t) => {
  const { folder, dispose } = installKv();
  t.after(dispose);
  for (const runtime of (await runtimes()).found) {
    await run(runtime, script("lib/kv_contract.ts"), temporaryPath(t), folder);
  }
});

test("every runtime reads what every other wrote, and no change is lost", async (t) => {
  const { folder, dispose } = installKv();
  t.after(dispose);
  const { found } = await runtimes();
  equal(found.length, 3);
  const path = temporaryPath(t);
  const change = async (runtime: Runtime, key: string, times: number) =>
    JSON.parse(await run(runtime, script("lib/kv.ts"), path, key, String(times), folder));
  for (const writer of found) {
    await change(writer, writer.name, 1);
    for (const reader of found) await change(reader, writer.name, 1);
  }
  await Promise.all(found.map((runtime) => change(runtime, "together", 100)));
  const expected = [["Bun", 4], ["Deno", 4], ["Node", 4], ["together", 300]];
  for (const reader of found) equal(await change(reader, "", 0), expected);
});
