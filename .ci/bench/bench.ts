/**
 * How fast it is: `deno run -A .ci/bench/bench.ts [--quick] [--only PART,…] [--readme]`. Everything is a ratio within
 * one run, of rounds that alternate, as the median with the middle half of the rounds in brackets.
 *
 *     --quick           a smaller version, in under 90 seconds, without stores and peers
 *     --only PART,…     some of process, guard, journeys, growth, start, stores, peers
 *     --readme          puts what matters most of it into .ci/bench/README.md, in place of what stands there, and the
 *                       small table into README.md
 *
 * @module
 */

import { readFileSync, writeFileSync } from "node:fs";
import { availableParallelism, cpus, totalmem } from "node:os";
import process from "node:process";
import { parseArgs } from "node:util";
import { begin } from "./begin.ts";
import { growth } from "./growth.ts";
import { guard } from "./guard.ts";
import { inProcess } from "./process.ts";
import { journeys } from "./journeys.ts";
import { cleanUp, firstLine, markdown, startCommand, type Table } from "./kit.ts";
import { peers } from "./peers.ts";
import { stores } from "./stores.ts";
import { ROOT, type Runtime, runtimes } from "../lib/runtimes.ts";

const { values: { quick, only, readme } } = parseArgs({
  args: process.argv.slice(2).filter((argument) => argument !== "--"), // which `deno task` hands on
  options: { quick: { type: "boolean" }, only: { type: "string" }, readme: { type: "boolean" } },
});

type Part = (found: Runtime[], node: Runtime) => Promise<Table>;

const parts: Record<string, Part> = {
  process: (found) =>
    inProcess(found, quick ? { launches: 1, rounds: 10, count: 1000 } : { launches: 3, rounds: 20, count: 5000 }),
  guard: (found, node) =>
    guard(found, node, quick ? { launches: 1, rounds: 15, seconds: 0.1 } : { launches: 4, rounds: 25, seconds: 0.1 }),
  journeys: (found) => journeys(found, quick ? { rounds: 3, count: 30 } : { rounds: 9, count: 100 }),
  growth: (found) =>
    growth(
      found,
      quick
        ? { rounds: 3, sizes: [10, 5_000], registrations: 2_000 }
        : { rounds: 9, sizes: [10, 1_000, 100_000], registrations: 100_000 },
    ),
  start: (found) => begin(found, quick ? 3 : 11),
  ...(!quick && {
    stores: (_, node) => stores(node, { rounds: 7, count: 20 }),
    peers: (_, node) => peers(node, { rounds: 9, seconds: 0.5, count: 100 }),
  }),
};

function machine(found: Runtime[]): string {
  const versions = found.map(({ name, version }) => `${name} ${version}`).join(", ");
  const memory = Math.round(totalmem() / 2 ** 30);
  const cores = availableParallelism();
  return `${
    cpus()[0]?.model.trim() || "unknown processor"
  }, ${cores} cores, ${memory} GB, ${process.platform}; ${versions}; ` +
    new Date().toISOString().slice(0, 10);
}

async function main(): Promise<void> {
  const { found, missing } = await runtimes();
  const node = found.find(({ name }) => name === "Node");
  if (!node) throw new Error(`The load generator needs Node. ${missing.join("; ")}`);
  const about = machine(found);
  console.log([about, ...missing.map((reason) => `not run: ${reason}`), ""].join("\n"));
  const tables: Table[] = [];
  for (const name of only?.split(",") ?? Object.keys(parts)) {
    const part = parts[name];
    if (!part) throw new Error(`There is no part ${name}: ${Object.keys(parts).join(", ")}`);
    const table = await part(found, node);
    tables.push(table);
    console.log(`${markdown(table)}\n`);
  }
  if (readme) await rewrite(`${ROOT}.ci/bench/README.md`, section(about, tables));
  if (readme && !only && !quick) await rewrite(`${ROOT}README.md`, withSummary(tables));
}

async function rewrite(file: string, text: string): Promise<void> {
  writeFileSync(file, text);
  await startCommand(["npx", "-y", "deno", "fmt", file], { cwd: ROOT }).ended;
}

/** README.md with its small table: a row for each runtime, of what the larger tables say first. */
function withSummary(tables: Table[]): string {
  const text = readFileSync(`${ROOT}README.md`, "utf8");
  const cell = (title: string, row: string, column: string): string => {
    const { head, rows } = tables.find((table) => table.title === title)!;
    return rows.find(([name]) => name === row)![head.indexOf(column)]!;
  };
  const percent = (ratio: string) => `${Math.round(Number.parseFloat(ratio) * 100)} %`;
  const rows = ["Deno", "Bun", "Node"].map((name) => [
    name,
    percent(cell("The guard over HTTP", `${name}, trivial, guarded`, "ratio")),
    percent(cell("The guard over HTTP", `${name}, tools/list, guarded`, "ratio")),
    `${
      (Number.parseFloat(cell("A connection's life", `${name}, refresh`, "µs durable").replaceAll(",", "")) / 1000)
        .toFixed(2)
    } ms`,
  ]);
  const head = ["", "handler that does nothing", "MCP `tools/list`", "a refresh"];
  const lines = [head, head.map(() => "---"), ...rows].map((line) => `| ${line.join(" | ")} |`).join("\n");
  return text.replace(/(?<=<!-- speed -->\n)[^]*(?=<!-- \/speed -->)/, () => `\n${lines}\n\n`);
}

function section(about: string, tables: Table[]): string {
  const essentials = tables.map(({ essential = /^/, rows, ...rest }) =>
    markdown({ ...rest, rows: rows.filter(([name = ""]) => essential.test(name)) })
  );
  return [
    "# Performance",
    "",
    `Measured on ${about}. Ratios are medians of alternating rounds, with the middle half of the rounds in brackets. ` +
    "To repeat it, with more rows: `deno task bench`; `deno task bench --readme` writes this file anew.",
    "",
    essentials.join("\n\n"),
    "",
    "",
  ].join("\n");
}

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.once(signal, () => {
    cleanUp();
    process.exit(1);
  });
}
try {
  await main();
} catch (error) {
  console.error(`broken: ${error instanceof Error ? error.stack : firstLine(error)}`);
  process.exitCode = 1;
} finally {
  cleanUp();
}
