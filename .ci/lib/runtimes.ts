/**
 * The three runtimes that mod.ts is for, and its packages where all of them look for packages.
 *
 * @module
 */

import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { oneLine } from "./limits.ts";

const run = promisify(execFile);

export const ROOT = fileURLToPath(new URL("../../", import.meta.url));
export const ENVIRONMENT = { ...process.env, NO_COLOR: "1", NODE_NO_WARNINGS: "1", DENO_NO_UPDATE_CHECK: "1" };

export interface Runtime {
  name: "Deno" | "Bun" | "Node";
  version: string;
  /** The executable itself, so that no launcher's start is measured and `kill` meets the process, and what goes before a script. */
  command: string[];
  env?: Record<string, string>;
}

/** A runtime that cannot be had is left out, and said to be. */
export async function runtimes(): Promise<{ found: Runtime[]; missing: string[] }> {
  const executable = "console.log(process.execPath)";
  const wanted: [Runtime["name"], string[], string[]][] = [
    ["Deno", ["-y", "deno", "eval", executable], ["run", "-A", "--quiet"]],
    ["Bun", ["-y", "bun@1", "-e", executable], ["run"]],
    ["Node", ["-y", "-p", "node@24", "--", "node", "-e", executable], ["--expose-gc"]],
  ];
  const found: Runtime[] = [];
  const missing: string[] = [];
  for (const [name, ask, before] of wanted) {
    try {
      const path = (await run("npx", ask, { env: ENVIRONMENT })).stdout.trim();
      const version = (await run(path, ["--version"], { env: ENVIRONMENT })).stdout.match(/\d+\.\d+\.\d+/)![0];
      found.push({ name, version, command: [path, ...before] });
    } catch (error) {
      missing.push(`${name}: ${oneLine(String(error), 200)}`);
    }
  }
  await installPackages();
  return { found, missing };
}

/** Bun and Node look for packages in a folder; Deno puts them there. */
async function installPackages(): Promise<void> {
  if (existsSync(`${ROOT}node_modules/@hono/node-server`)) return;
  const entries = ["--entrypoint", "mod.ts", "example.ts", "mod_test.ts"];
  await run("npx", ["-y", "deno", "install", "--node-modules-dir=auto", ...entries], { cwd: ROOT, env: ENVIRONMENT });
}
