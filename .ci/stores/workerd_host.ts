/**
 * Runs `worker.ts` in workerd, by miniflare, which needs Node: `workerd_host.ts PORT DIR`. Prints "listening on PORT",
 * and ends with its standard input.
 *
 * Environment: `STORE_PACKAGES`, where miniflare and esbuild are; `BASE_URL`, `OWNER_PASSWORD`, `CHECKS` for the worker;
 * `PLAIN`, for a worker without `nodejs_compat`; `WORKER`, another file in place of `worker.ts`.
 *
 * @module
 */

import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const [port, dir] = process.argv.slice(2);
const { STORE_PACKAGES = "", BASE_URL = "", OWNER_PASSWORD = "", CHECKS = "", PLAIN, WORKER } = process.env;
const load = createRequire(join(STORE_PACKAGES, "x.js"));
const { build } = load("esbuild");
const { Miniflare } = load("miniflare");

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));

const { outputFiles } = await build({
  entryPoints: [WORKER ?? path("worker.ts")],
  alias: { "@personal-auth/mcp": path("../../mod.ts") },
  nodePaths: [path("../../node_modules")],
  bundle: true,
  write: false,
  format: "esm",
  target: "es2022",
  conditions: ["workerd", "worker", "browser"],
  external: ["node:*"],
  minifySyntax: true, // what WITH_CONTRACT rules out is left out
  define: { WITH_CONTRACT: String(!PLAIN) },
});

const miniflare = new Miniflare({
  host: "127.0.0.1",
  port: Number(port),
  modules: [{ type: "ESModule", path: "worker.js", contents: outputFiles[0].text }],
  compatibilityDate: "2026-04-01",
  compatibilityFlags: PLAIN ? [] : ["nodejs_compat"],
  bindings: { BASE_URL, OWNER_PASSWORD, CHECKS },
  durableObjects: { VAULT: { className: "Vault", useSQLite: true } },
  durableObjectsPersist: dir,
});
const { port: bound } = await miniflare.ready;
console.log(`listening on ${bound}`);

async function leave(): Promise<void> {
  await miniflare.dispose();
  process.exit(0);
}
process.stdin.on("end", leave);
process.stdin.resume();
