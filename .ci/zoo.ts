/**
 * The zoo: real clients, unmodified, against `example.ts` on loopback. Each gets in as it would on the owner's
 * machine, through the owner's page, which a script fills in; then it lists the tools and calls one, and does so again
 * after a restart of the server. At each start the server runs on the next of the three runtimes. Clients that cannot
 * run here are played from what was recorded of them.
 *
 *     npx -y deno run -A .ci/zoo.ts [--table] [--runtimes Bun,Node,Deno] [part of a name ...]
 *
 * `--table` writes what the run has shown into the table of README.md. Without it, the run must not differ from the
 * table, dates and versions apart. `--runtimes` names other runtimes to serve on, or another order.
 *
 * It needs npm and a POSIX shell. The programs, and all that they write, are in a temporary folder that is removed at
 * the end; libraries are in Deno's own cache. There is a line for each check on the standard output, and what the
 * programs wrote about a failure on the other one.
 *
 * @module
 */

import { parseArgs } from "node:util";
import { NotRun, pause, within } from "./lib/limits.ts";
import { type Runtime, runtimes } from "./lib/runtimes.ts";
import { outcome, reason, report, sum } from "./lib/tally.ts";
import { endGroup, Pen, spawn } from "./zoo/kit.ts";
import { oauth4webapi, sdk1, sdk2 } from "./zoo/libraries.ts";
import {
  type Cells,
  type Check,
  claudeCode,
  codex,
  conformance,
  inspector,
  mcpRemote,
  opencode,
  type Program,
} from "./zoo/programs.ts";
import { chatgpt, claude, claudeDesktopCode } from "./zoo/recorded.ts";
import { differences, type Row, writeRows } from "./zoo/table.ts";

/** In the order of their size, so that the large ones are downloaded while the small ones are looked at. */
const PROGRAMS: Program[] = [
  claude,
  claudeDesktopCode,
  chatgpt,
  oauth4webapi,
  sdk1,
  sdk2,
  mcpRemote,
  conformance,
  inspector,
  claudeCode,
  codex,
  opencode,
];

/** The Node that all programs of npm run on: the newest of them want more than many machines have. */
const NODE = "node@24";

const INSTALL_SECONDS = 240;
const CHECK_SECONDS = 150;

const root = await Deno.makeTempDir({ prefix: "zoo-" });
const pens = new Set<Pen>();
const installs = new Set<Deno.ChildProcess>();
let interrupted = false;

/** Installs one package into a folder of its own, which it returns. */
async function install(spec: string): Promise<string> {
  const folder = `${root}/${spec.replace(/[^a-z0-9.-]+/g, "_")}`;
  await Deno.mkdir(folder);
  // npm asks for leave to run a package's own installation, which some of the programs need.
  const manifest = { private: true, allowScripts: { [spec.replace(/@[^@]*$/, "")]: true } };
  await Deno.writeTextFile(`${folder}/package.json`, JSON.stringify(manifest));
  const quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--no-update-notifier", "--loglevel=error"];
  const child = spawn("npm", {
    args: ["install", ...quiet, "--cache", `${root}/cache`, "--prefix", folder, spec],
    cwd: folder,
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  });
  installs.add(child);
  try {
    const { success, stderr } = await within(INSTALL_SECONDS, child.output());
    if (!success) throw new Error(new TextDecoder().decode(stderr));
    return folder;
  } catch (error) {
    throw new NotRun(`npm could not install ${spec}: ${reason(error)}`);
  } finally {
    endGroup(child);
    installs.delete(child);
  }
}

/** Runs a program's checks. Returns its row of the table, if nothing failed and nothing was left out. */
async function visit(
  program: Program,
  served: Runtime[],
  installed: Promise<string> | undefined,
  node: Promise<string>,
): Promise<Row | undefined> {
  let pen: Pen | undefined;
  let complete = true;
  const cells: Cells = {};
  const fault = (name: string, error: unknown): void => {
    complete = false;
    if (interrupted) return;
    report(outcome(error), name, error);
    if (outcome(error) === "FAILED") console.error(`\n${name}\n${pen?.log}\n`);
  };
  let checks: Check[] = [];
  try {
    const folder = installed && await installed;
    const runtime = installed && `${await node}/node_modules/.bin`;
    const site = { runtimes: served, ...program.site?.() };
    const own = new Pen(`${root}/${program.name.replaceAll("/", "_")}`, site, folder, runtime);
    pens.add(pen = own);
    checks = await within(CHECK_SECONDS, own.server.start().then(() => program.checks(own)));
  } catch (error) {
    fault(program.name, error);
  }
  let failed: string | undefined;
  for (const [what, run, shows] of checks) {
    if (interrupted) break;
    const name = `${program.name}: ${what}`;
    try {
      if (failed) throw new NotRun(`not after what came before it (${failed})`);
      const start = performance.now();
      await within(CHECK_SECONDS, run());
      const seconds = ((performance.now() - start) / 1000).toFixed(1);
      if (!interrupted) report("ok", `${name} [${pen!.server.runtime.name}, ${seconds} s]`);
      Object.assign(cells, shows);
    } catch (error) {
      fault(name, error);
      if (!program.independent) failed ??= what;
    }
  }
  pen?.close();
  if (pen) pens.delete(pen);
  if (!program.row || !complete || interrupted) return undefined;
  return { version: program.npm?.replace(/^.+@/, "") ?? "", ...program.row, cells };
}

/** Says how the table in README.md and this run differ, if they do. */
function compareWithTable(rows: Row[]): void {
  const others = PROGRAMS.flatMap(({ row }) =>
    row && !rows.some(({ client }) => client === row.client) ? [row.client] : []
  );
  const found = differences(rows, others);
  if (found.length === 0) report("ok", "the table of clients in README.md says what this run has shown");
  else report("FAILED", "the table of clients in README.md: run this with --table", found.join("; "));
}

/** The runtimes to serve on, in their order; those that this machine does not have are named. */
async function serving(order = ["Deno", "Bun", "Node"]): Promise<Runtime[]> {
  const { found, missing } = await runtimes();
  for (const reason of missing) report("not run", "a runtime to serve on", reason);
  const served = order.flatMap((name) => found.filter((runtime) => runtime.name === name));
  if (served.length === 0) throw new Error(`there is no runtime of ${order} to serve on`);
  return served;
}

/** Ends and removes everything. */
async function leave(): Promise<void> {
  for (const child of installs) endGroup(child);
  for (const pen of pens) pen.close();
  // What was ended a moment ago may still be writing its last.
  for (let attempt = 1;; attempt++) {
    try {
      return await Deno.remove(root, { recursive: true });
    } catch (error) {
      if (error instanceof Deno.errors.NotFound) return;
      if (attempt === 10) throw error;
      await pause(200);
    }
  }
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  Deno.addSignalListener(signal, () => {
    interrupted = true;
    leave().finally(() => Deno.exit(130));
  });
}

const { values: { table, runtimes: order }, positionals: parts } = parseArgs({
  args: Deno.args,
  allowPositionals: true,
  options: { table: { type: "boolean" }, runtimes: { type: "string" } },
});
const wanted = PROGRAMS.filter(({ name }) => parts.length === 0 || parts.some((part) => name.includes(part)));
try {
  const node = wanted.some(({ npm }) => npm) ? install(NODE) : Promise.resolve("");
  node.catch(() => {});
  const visits = wanted.map((program) => ({ program, installed: program.npm ? install(program.npm) : undefined }));
  for (const { installed } of visits) installed?.catch(() => {}); // told when its turn comes
  const served = await serving(order?.split(","));
  const rows: Row[] = [];
  for (const { program, installed } of visits) {
    if (interrupted) break;
    const row = await visit(program, served, installed, node);
    if (row) rows.push(row);
  }
  if (table) await writeRows(rows);
  else if (!interrupted && rows.length > 0) compareWithTable(rows);
} finally {
  await leave();
}
if (interrupted) Deno.exit(130);
Deno.exit(sum());
