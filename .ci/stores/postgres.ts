import type { Store } from "../../mod.ts"; // in your project: from "@personal-auth/mcp"

type Pool = { query: Query; on(event: "error", listener: () => void): unknown }; // of the npm package `pg`
type Query = (text: string, values: unknown[]) => Promise<{ rows: Row[]; rowCount: number | null }>;
type Row = { key: string; value: string; expires: number | null };

/** Run this once. Text, because jsonb cannot hold \u0000; COLLATE "C", because keys are in the order of their bytes. */
export const TABLE =
  'CREATE TABLE personal_auth (key text COLLATE "C" PRIMARY KEY, value text NOT NULL, expires float8)';
const INSERT = "INSERT INTO personal_auth VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
const SAME = "WHERE key = $1 AND value = $2 AND expires IS NOT DISTINCT FROM $3";

/** PostgreSQL: `postgresStore(new Pool(…))`. As durable as `synchronous_commit`, which is on by default. */
export function postgresStore(pool: Pool): Store {
  pool.on("error", () => {}); // an idle connection broke off; the next query opens another one
  const ask = (text: string, ...values: unknown[]) => pool.query(text, values);
  const find = async (key: string) => (await ask("SELECT * FROM personal_auth WHERE key = $1", key)).rows[0];
  const read = (row?: Row) => row && (row.expires ?? Infinity) > Date.now() / 1000 ? JSON.parse(row.value) : undefined;
  const replace = (key: string, row: Row, value: string, expires: number | null) =>
    value === undefined
      ? ask(`DELETE FROM personal_auth ${SAME}`, key, row.value, row.expires)
      : ask(`UPDATE personal_auth SET value = $4, expires = $5 ${SAME}`, key, row.value, row.expires, value, expires);
  return {
    get: async (key) => read(await find(key)),
    async update(key, change, { expiresAt } = {}) {
      for (let row = await find(key);; row = await find(key)) {
        const current = read(row);
        const next = change(current);
        if (next === current && (next !== undefined || !row)) return next;
        const [value, expires] = [JSON.stringify(next), expiresAt ?? (current === undefined ? null : row!.expires)];
        const { rowCount } = await (row ? replace(key, row, value, expires) : ask(INSERT, key, value, expires));
        if (rowCount) return next; // nobody had been there since it was read
      }
    },
    async *list(prefix) {
      const { rows } = await ask("SELECT * FROM personal_auth WHERE starts_with(key, $1) ORDER BY key", prefix);
      for (const row of rows) if (read(row) !== undefined) yield [row.key, read(row)];
    },
  };
}
