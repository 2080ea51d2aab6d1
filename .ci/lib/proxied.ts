/** Asks for a client's metadata document under whatever proxies the environment prescribes: run by `mod_test.ts`. */
import dns from "node:dns";
import process from "node:process";
import { memoryStore, personalAuth } from "../../mod.ts";

/** The first is public by its form, and belongs to nobody: 3ffe::/16 went back to IANA in 2006, and has no route. */
const ADDRESSES: Record<string, string> = { "public.example": "3ffe::1", "localhost": "::1" };
Object.assign(dns, {
  Resolver: class {
    resolve4(_name: string, callback: (error: null, found: string[]) => void): void {
      callback(null, []);
    }
    resolve6(name: string, callback: (error: null, found: string[]) => void): void {
      callback(null, [ADDRESSES[name]!]);
    }
    cancel(): void {}
  },
});
const base = "https://mcp.example.com";
const app = personalAuth({ baseUrl: base, store: memoryStore(), authenticateOwner: () => false, onEvent() {} });
const visits = Object.keys(ADDRESSES).map((host) => app.request(`${base}/authorize?client_id=https://${host}/x.json`));
await Promise.race([Promise.all(visits), new Promise((resolve) => setTimeout(resolve, 1000))]);
process.exit(0);
