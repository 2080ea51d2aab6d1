import type { Store } from "../../mod.ts"; // in your project: from "@personal-auth/mcp"

/** What is used of `ctx.storage` in a Durable Object that has SQLite. */
interface Storage {
  // deno-lint-ignore no-explicit-any
  sql: { exec(query: string, ...values: any[]): { toArray(): any[] } };
}

/**
 * A Durable Object of Cloudflare with the whole server in it: `personalAuth({ store: durableObjectStore(ctx.storage) })`.
 * There is one instance, so `write` needs no lock as long as it never awaits. An answer leaves when all writes are durable.
 */
export function durableObjectStore({ sql }: Storage): Store {
  sql.exec("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires REAL)");
  let changes = 0;
  const query = "SELECT * FROM entries WHERE key BETWEEN ? AND ? AND coalesce(expires > ?, 1) ORDER BY key";
  const find = (from: string, to: string) => sql.exec(query, from, to, Date.now() / 1000).toArray();
  const parse = (row?: { value: string }) => row && JSON.parse(row.value);
  function write(key: string, change: (current: unknown) => unknown, expiresAt?: number) {
    const [row] = find(key, key);
    const current = parse(row);
    const next = change(current);
    if (next !== current) changes++;
    if (next === undefined) sql.exec("DELETE FROM entries WHERE key = ?", key);
    else if (next !== current) {
      const expires = expiresAt ?? row?.expires ?? null;
      sql.exec("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", key, JSON.stringify(next), expires);
    }
    return next;
  }
  return {
    get: (key) => new Promise((resolve) => resolve(parse(find(key, key)[0]))),
    update: (key, change, options) => new Promise((resolve) => resolve(write(key, change, options?.expiresAt))),
    async *list(prefix) {
      for (const row of find(prefix, `${prefix}\u{10ffff}`)) yield [row.key, parse(row)];
    },
    version: () => changes,
  };
}
