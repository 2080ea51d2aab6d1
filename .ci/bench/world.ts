/** A server in this very process, and clients of it. Shared by the workers that measure. */

import process from "node:process";
import { Hono } from "hono";
import { type Answer, BASE, Client, type Json } from "../lib/client.ts";
import type { AuthEnv, PersonalAuth, Store } from "../../mod.ts";

/** `BENCH_MOD`: another copy of mod.ts to be measured in its place, as an absolute path. */
export const mod: typeof import("../../mod.ts") = await import(process.env.BENCH_MOD ?? "../../mod.ts");

export interface World {
  app: Hono<AuthEnv>;
  auth: PersonalAuth;
  client(): Client;
}

export function world(store: Store): World {
  const auth = mod.personalAuth({ baseUrl: BASE, store, authenticateOwner: () => true, onEvent: () => {} });
  const app = new Hono<AuthEnv>();
  app.route("/", auth);

  /** As a server hands it over: with the length of its body said beforehand. */
  function carry(path: string, init: RequestInit = {}): Response | Promise<Response> {
    const headers = { ...init.headers as Record<string, string> };
    if (typeof init.body === "string") headers["Content-Length"] = String(init.body.length);
    return app.request(BASE + path, { ...init, headers });
  }
  return { app, auth, client: () => new Client(carry) };
}

/** What was asked for; anything else would be timed for nothing. */
export async function good(asked: Promise<Answer>): Promise<Json> {
  const { status, body } = await asked;
  if (status >= 400) throw new Error(`${status} ${JSON.stringify(body)}`);
  return body;
}
