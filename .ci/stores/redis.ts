import type { Store } from "../../mod.ts"; // in your project: from "@personal-auth/mcp"

/** What is used of a client of the npm package `redis`. */
interface Redis {
  get(key: string): Promise<string | null>;
  eval(script: string, options: { keys: string[]; arguments: string[] }): Promise<unknown>;
  scanIterator(options: { MATCH: string; COUNT: number }): AsyncIterable<string[]>;
}

/** Compares and sets in one step. An empty string means "no value"; without a new expiry the old one stays. */
const SWAP = `if (redis.call("GET", KEYS[1]) or "") ~= ARGV[1] then return 0 end
  if ARGV[2] == "" then redis.call("DEL", KEYS[1]) elseif ARGV[3] == "" then redis.call("SET", KEYS[1], ARGV[2], "KEEPTTL")
  else redis.call("SET", KEYS[1], ARGV[2], "PXAT", ARGV[3]) end return 1`;

/** Redis or Valkey, with `appendonly yes` and `appendfsync always`: without them a crash loses the last second. */
export function redisStore(redis: Redis, prefix = "personal-auth:"): Store {
  const parse = (text: string | null) => text === null ? undefined : JSON.parse(text);
  return {
    get: async (key) => parse(await redis.get(prefix + key)),
    async update(key, change, { expiresAt } = {}) {
      while (true) {
        const before = await redis.get(prefix + key);
        const current = parse(before);
        const next = change(current);
        if (next === current) return next;
        const values = [before ?? "", JSON.stringify(next) ?? "", expiresAt ? String(Math.ceil(expiresAt * 1000)) : ""];
        if (await redis.eval(SWAP, { keys: [prefix + key], arguments: values })) return next;
      }
    },
    async *list(start) {
      const found = [];
      const MATCH = (prefix + start).replace(/[\\*?[\]]/g, "\\$&") + "*";
      for await (const keys of redis.scanIterator({ MATCH, COUNT: 1000 })) found.push(...keys);
      for (const key of [...new Set(found)].sort()) {
        const value = parse(await redis.get(key));
        if (value !== undefined) yield [key.slice(prefix.length), value];
      }
    },
  };
}
