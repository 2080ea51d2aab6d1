/** What all the benchmarks stand on: children that speak in lines of JSON, statistics, tables. */

import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { ENVIRONMENT, type Runtime } from "../lib/runtimes.ts";

// ─── What has to be gone at the end ────────────────────────────────────────────────────────────────────────────────

const folders = new Set<string>();
const children = new Set<ChildProcess>();

export function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), "personal-auth-bench-"));
  folders.add(folder);
  return folder;
}

export function discard(folder: string): void {
  rmSync(folder, { recursive: true, force: true });
  folders.delete(folder);
}

/** Stops every process and removes every folder, however the benchmark ends. */
export function cleanUp(): void {
  for (const child of children) child.kill("SIGKILL");
  for (const folder of folders) discard(folder);
}

export function firstLine(error: unknown): string {
  return String(error instanceof Error ? error.message : error).split("\n")[0]!.slice(0, 200);
}

// ─── Children ──────────────────────────────────────────────────────────────────────────────────────────────────────

// deno-lint-ignore no-explicit-any
export type Json = any;

/** A process that answers each line with a line of JSON, and ends when its standard input does. */
export interface Child {
  /** The next line that it writes by itself. */
  next(): Promise<Json>;
  ask(question: unknown): Promise<Json>;
  stop(): Promise<void>;
  readonly ended: Promise<void>;
}

/** `script` is a file of this folder, or an absolute path. */
export function start(runtime: Runtime, script: string, ...args: string[]): Child {
  const { command, env } = runtime;
  return startCommand([...command, fileURLToPath(new URL(script, import.meta.url)), ...args], env && { env });
}

export function startCommand(
  [command, ...args]: string[],
  options: { cwd?: string; env?: Record<string, string> } = {},
): Child {
  const child = spawn(command!, args, {
    stdio: ["pipe", "pipe", "pipe"],
    ...options,
    env: { ...ENVIRONMENT, ...options.env },
  });
  children.add(child);
  let complaints = "";
  child.stderr.on("data", (chunk) => complaints = (complaints + chunk).slice(-4000));
  const ended = new Promise<void>((resolve) => child.once("close", () => resolve()));
  void ended.then(() => children.delete(child));

  const lines: string[] = [];
  let wake = () => {};
  let over = false;
  createInterface({ input: child.stdout }).on("line", (line) => {
    lines.push(line);
    wake();
  });
  child.once("error", (error) => complaints += error.message);
  void ended.then(() => {
    over = true;
    wake();
  });

  async function next(): Promise<Json> {
    while (true) {
      const line = lines.shift();
      // Anything else that a program prints is not for us.
      if (line?.startsWith("{")) {
        const answer = JSON.parse(line);
        if (answer.error) throw new Error(answer.error);
        return answer;
      }
      if (line !== undefined) continue;
      if (over) throw new Error(complaints.trim() || `${args.join(" ")} ended without an answer`);
      await new Promise<void>((resolve) => wake = resolve);
    }
  }

  return {
    next,
    ended,
    ask: (question) => {
      child.stdin.write(`${JSON.stringify(question)}\n`);
      return next();
    },
    async stop() {
      child.stdin.end();
      const timer = setTimeout(() => child.kill("SIGKILL"), 2000);
      await ended;
      clearTimeout(timer);
    },
  };
}

// ─── Statistics ────────────────────────────────────────────────────────────────────────────────────────────────────

export function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(middle)]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The median, and the middle half of what it is the median of. */
export interface Spread {
  median: number;
  low: number;
  high: number;
}

export function spread(values: number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  const quarter = Math.floor((sorted.length - 1) / 4);
  return { median: median(values), low: sorted[quarter]!, high: sorted.at(-1 - quarter)! };
}

/** What came of each round for one over what came of the same round for the other. */
export function ratio(ones: number[], others: number[]): Spread {
  return spread(ones.map((one, i) => one / others[i]!));
}

/** `0.93 (0.91–0.95)` */
export function shown({ median, low, high }: Spread, digits = 2): string {
  return `${median.toFixed(digits)} (${low.toFixed(digits)}–${high.toFixed(digits)})`;
}

export function figure(value: number): string {
  return value >= 100 ? Math.round(value).toLocaleString("en-US") : value.toPrecision(3);
}

// ─── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface Table {
  title: string;
  /** What is measured, in a sentence or two. */
  note: string;
  /** What the figures are compared with: the best that they could be. */
  limit: string;
  head: string[];
  rows: string[][];
  /** The rows that README.md has room for, by their first cells; without it, all. */
  essential?: RegExp;
}

export function markdown({ title, note, limit, head, rows }: Table): string {
  const width = head.map((name, i) =>
    Math.max(...[name, ...rows.map((row) => row[i] ?? "")].map((cell) => cell.length))
  );
  const line = (cells: string[]) => `| ${width.map((w, i) => (cells[i] ?? "").padEnd(w)).join(" | ")} |`;
  const rule = `| ${width.map((w) => "-".repeat(w)).join(" | ")} |`;
  return [`## ${title}`, "", note, "", `**Measured against**: ${limit}.`, "", line(head), rule, ...rows.map(line)].join(
    "\n",
  );
}
