/** Says how long the import of mod.ts takes, once all that it imports itself is there. */

import process from "node:process";
import "hono";
import "hono/cookie";
import "hono/cors";
import "hono/html";

const started = performance.now();
await import(process.env.BENCH_MOD ?? "../../mod.ts");
console.log(JSON.stringify({ milliseconds: performance.now() - started }));
process.exit(0);
