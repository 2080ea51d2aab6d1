/** A Cloudflare Worker whose one Durable Object is the whole server: what `workerd.ts` runs, and an example to copy. */

import { type AuthEnv, OAuthError, personalAuth } from "../../mod.ts";
import { Hono } from "hono";
import { handleMcp } from "../bench/mcp.ts";
import { durableObjectStore } from "./durable-object.ts";

interface Environment {
  VAULT: { idFromName(name: string): unknown; get(id: unknown): { fetch(request: Request): Promise<Response> } };
  BASE_URL: string;
  /** Absent: whoever asks is the owner, for checks only. */
  OWNER_PASSWORD?: string;
  CHECKS?: string;
}

/** True where the bundle has Node's modules, which the contract needs. */
declare const WITH_CONTRACT: boolean;

export class Vault {
  readonly #app = new Hono<AuthEnv>();

  constructor(ctx: { storage: Parameters<typeof durableObjectStore>[0] }, env: Environment) {
    const store = durableObjectStore(ctx.storage);
    const owner = env.OWNER_PASSWORD ? { password: env.OWNER_PASSWORD } : { authenticateOwner: () => true };
    const auth = personalAuth({ baseUrl: env.BASE_URL, store, ...owner });
    const app = this.#app;
    app.route("/", auth);
    app.get("/mcp", (c) => c.json(c.var.auth.extra)); // a quick call, for checks
    app.post("/mcp", (c) => handleMcp(c.req.raw));
    if (!env.CHECKS) return;
    app.post("/test/clock", async (c) => {
      const { ahead } = await c.req.json();
      Date.now = () => new Date().getTime() + ahead * 1000;
      return c.json({ now: Date.now() / 1000 });
    });
    app.post("/test/token", async (c) => c.json(await auth.createToken(await c.req.json())));
    app.post("/test/revoke", async (c) => c.json({ revoked: await auth.revoke((await c.req.json()).id) }));
    if (WITH_CONTRACT) {
      app.get("/test/contract", async (c) => {
        const { storeContract } = await import("./contract.ts");
        return c.text(await storeContract(() => store).then(() => "kept", (error) => error.stack));
      });
    }
    app.onError((error, c) =>
      error instanceof OAuthError
        ? c.json({ error: error.code }, error.status, error.headers)
        : c.text(String(error), 500)
    );
  }

  async fetch(request: Request): Promise<Response> {
    return await this.#app.fetch(request);
  }
}

export default {
  fetch: (request: Request, { VAULT }: Environment): Promise<Response> =>
    VAULT.get(VAULT.idFromName("vault")).fetch(request),
};
