/** Says how long the import of what mod.ts imports takes, and after it that of mod.ts itself. */

import process from "node:process";

async function timed(...modules: string[]): Promise<number> {
  const started = performance.now();
  for (const module of modules) await import(module);
  return performance.now() - started;
}

const hono = await timed("hono", "hono/cookie", "hono/cors", "hono/html");
console.log(JSON.stringify({ hono, mod: await timed(process.env.BENCH_MOD ?? "../../mod.ts") }));
process.exit(0);
