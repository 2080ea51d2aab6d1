import type { Store } from "../../mod.ts"; // in your project: from "@personal-auth/mcp"

/** What is used of `postgres(url)`, of the npm package `postgres`. */
// deno-lint-ignore no-explicit-any
type Sql = (strings: TemplateStringsArray, ...values: any[]) => PromiseLike<any[] & { count: number }>;

/** Run this once. Text, because jsonb cannot hold \u0000; COLLATE "C", because keys are in the order of their bytes. */
export const TABLE = `CREATE TABLE personal_auth
  (key text COLLATE "C" PRIMARY KEY, value text NOT NULL, expires float8)`;

/** PostgreSQL: `postgresStore(postgres(url))`. As durable as `synchronous_commit`, which is on by default. */
export function postgresStore(sql: Sql): Store {
  const find = async (key: string) => (await sql`SELECT value, expires FROM personal_auth WHERE key = ${key}`)[0];
  const isLive = (row?: { expires: number | null }) => row && (row.expires ?? Infinity) > Date.now() / 1000;
  const read = (row?: { value: string; expires: number }) => row && isLive(row) ? JSON.parse(row.value) : undefined;
  return {
    get: async (key) => read(await find(key)),
    async update(key, change, { expiresAt } = {}) {
      while (true) {
        const row = await find(key);
        const current = read(row);
        const next = change(current);
        if (next === current && (next !== undefined || !row)) return next;
        const [value, expires] = [JSON.stringify(next), expiresAt ?? (isLive(row) ? row.expires : null)];
        const { count } = !row
          ? await sql`INSERT INTO personal_auth VALUES (${key}, ${value}, ${expires}) ON CONFLICT DO NOTHING`
          : next === undefined
          ? await sql`DELETE FROM personal_auth WHERE key = ${key} AND value = ${row.value}`
          : await sql`UPDATE personal_auth SET value = ${value}, expires = ${expires}
              WHERE key = ${key} AND value = ${row.value} AND expires IS NOT DISTINCT FROM ${row.expires}`;
        if (count > 0) return next; // nobody had been there since it was read
      }
    },
    async *list(prefix) {
      const rows = await sql`SELECT * FROM personal_auth WHERE starts_with(key, ${prefix}) ORDER BY key`;
      for (const row of rows) if (isLive(row)) yield [row.key, read(row)];
    },
  };
}
