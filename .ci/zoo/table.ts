/**
 * The table of clients in README.md: what a run has shown of each, and when.
 *
 * @module
 */

import { type Cells, COLUMNS } from "./programs.ts";

export interface Row {
  client: string;
  version: string;
  tried: string;
  cells: Cells;
}

const README = new URL("../../README.md", import.meta.url);
/** The table stands between these lines. */
const BETWEEN = /(?<=^<!-- clients -->\n)[^]*(?=^<!-- \/clients -->$)/m;
const HEADER = ["client", "version", "tried on", "how", ...COLUMNS];
/** The columns that a later run may differ in. */
const DATED = ["version", "tried on"];

/** The rows as they stand in README.md, by client. */
function standing(): Map<string, string[]> {
  const lines = Deno.readTextFileSync(README).match(BETWEEN)?.[0].split("\n").filter((line) => line.startsWith("|"));
  if (!lines) throw new Error("README.md has lost the marks of its table of clients");
  const rows = lines.slice(2).map((line) => line.slice(1, -1).split("|").map((cell) => cell.trim()));
  return new Map(rows.map((row) => [row[0]!, row]));
}

function line({ client, version, tried, cells }: Row): string[] {
  const today = new Date().toISOString().slice(0, 10);
  return [client, version, today, tried, ...COLUMNS.map((column) => cells[column] ?? "–")];
}

/** What the table says otherwise than a run, dates and versions apart. `others` are clients that this run left out. */
export function differences(rows: Row[], others: string[]): string[] {
  const table = standing();
  const different = rows.flatMap((row) => {
    const before = table.get(row.client);
    table.delete(row.client);
    if (!before) return [`there is no row for ${row.client}`];
    return line(row).flatMap((cell, column) => {
      const name = HEADER[column]!;
      return cell === before[column] || DATED.includes(name)
        ? []
        : [`${row.client}, ${name}: "${before[column]}" in the table, "${cell}" in this run`];
    });
  });
  const unknown = [...table.keys()].filter((client) => !others.includes(client));
  return [...different, ...unknown.map((client) => `nothing tries ${client}`)];
}

/** Writes these rows, and leaves those of other clients as they stand. */
export async function writeRows(rows: Row[]): Promise<void> {
  const table = standing();
  for (const row of rows) table.set(row.client, line(row));
  // Programs first, recorded requests last.
  const order = ([a = "", , , how = ""]: string[], [b = "", , , other = ""]: string[]) =>
    other.localeCompare(how) || a.localeCompare(b);
  const lines = [HEADER, HEADER.map(() => "-"), ...[...table.values()].toSorted(order)];
  const text = lines.map((cells) => `| ${cells.join(" | ")} |`).join("\n");
  Deno.writeTextFileSync(README, Deno.readTextFileSync(README).replace(BETWEEN, () => `\n${text}\n\n`));
  await new Deno.Command(Deno.execPath(), { args: ["fmt", "--quiet", README.pathname] }).output();
}
