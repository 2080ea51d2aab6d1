/**
 * A line for each check and their sum at the end, which `.ci/run` adds to those of the other runners.
 *
 * @module
 */

import { NotRun, oneLine } from "./limits.ts";

const counts = { ok: 0, FAILED: 0, "not run": 0 };

export type Outcome = keyof typeof counts;

/** What it means that a check has thrown this. */
export const outcome = (error: unknown): Outcome => error instanceof NotRun ? "not run" : "FAILED";

/** `detail`: figures, or what was thrown. */
export function report(outcome: Outcome, name: string, detail?: unknown): void {
  counts[outcome]++;
  console.log(`${outcome} ${name}${detail ? `: ${reason(detail)}` : ""}`);
}

export function reason(error: unknown): string {
  if (!(error instanceof Error)) return oneLine(String(error));
  const { message, cause } = error;
  return oneLine(cause === undefined ? message : `${message} (${Deno.inspect(cause)})`, 1000);
}

/** Prints the sum, and returns the exit status. */
export function sum(): number {
  console.log(`${counts.ok} passed, ${counts.FAILED} failed, ${counts["not run"]} skipped`);
  return counts.FAILED > 0 ? 1 : 0;
}
