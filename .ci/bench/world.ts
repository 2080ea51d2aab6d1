/** A server in this very process, and what a client and its owner ask of it. Shared by the workers that measure. */

import process from "node:process";
import { Hono } from "hono";
import type { AuthEnv, PersonalAuth, Store } from "../../mod.ts";

/** `BENCH_MOD`: another copy of mod.ts to be measured in its place, as an absolute path. */
export const mod: typeof import("../../mod.ts") = await import(process.env.BENCH_MOD ?? "../../mod.ts");

export const BASE = "https://mcp.example.com";
export const REDIRECT = "https://claude.ai/api/mcp/auth_callback";
/** The pair of RFC 7636 appendix B. */
export const VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
export const CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";

export interface Tokens {
  access_token: string;
  refresh_token: string;
}

export interface World {
  app: Hono<AuthEnv>;
  auth: PersonalAuth;
  register(name: string): Promise<string>;
  /** The owner opens the page and approves: a code. */
  authorize(client_id: string): Promise<string>;
  exchange(client_id: string, code: string): Promise<Tokens>;
  refresh(client_id: string, refresh_token: string): Promise<Tokens>;
  revoke(client_id: string, token: string): Promise<void>;
}

export function world(store: Store): World {
  const auth = mod.personalAuth({ baseUrl: BASE, store, authenticateOwner: () => true, onEvent: () => {} });
  const app = new Hono<AuthEnv>();
  app.route("/", auth);
  let cookie: Promise<string> | undefined;

  /** The owner's browser has its cookie from its first page. */
  async function open(): Promise<string> {
    const page = await app.request(`${BASE}/connections`);
    return page.headers.getSetCookie()[0]!.split(";")[0]!;
  }

  /** As a server hands it over: with the length of its body said beforehand. */
  async function post(path: string, type: string, body: string, status: number, more = {}): Promise<Response> {
    const headers = { "Content-Type": type, "Content-Length": String(body.length), ...more };
    const response = await app.request(BASE + path, { method: "POST", headers, body });
    if (response.status !== status) throw new Error(`${path}: ${response.status} ${await response.text()}`);
    return response;
  }
  const form = (path: string, fields: Record<string, string>, status = 200, more = {}) =>
    post(path, "application/x-www-form-urlencoded", new URLSearchParams(fields).toString(), status, more);

  return {
    app,
    auth,
    async register(client_name) {
      const body = JSON.stringify({ client_name, redirect_uris: [REDIRECT], token_endpoint_auth_method: "none" });
      return (await (await post("/register", "application/json", body, 201)).json()).client_id;
    },
    async authorize(client_id) {
      const request = new URLSearchParams({
        response_type: "code",
        client_id,
        redirect_uri: REDIRECT,
        state: "state",
        code_challenge: CHALLENGE,
        code_challenge_method: "S256",
        resource: `${BASE}/mcp`,
      });
      const headers = { Cookie: await (cookie ??= open()) };
      const page = await app.request(`${BASE}/authorize?${request}`, { headers });
      const csrf = (await page.text()).match(/name="csrf" value="([^"]*)"/)![1]!;
      const answer = await form("/authorize", { request: request.toString(), csrf, decision: "approve" }, 302, headers);
      return new URL(answer.headers.get("Location")!).searchParams.get("code")!;
    },
    async exchange(client_id, code) {
      const fields = {
        grant_type: "authorization_code",
        code,
        client_id,
        redirect_uri: REDIRECT,
        code_verifier: VERIFIER,
      };
      return await (await form("/token", fields)).json();
    },
    async refresh(client_id, refresh_token) {
      return await (await form("/token", { grant_type: "refresh_token", refresh_token, client_id })).json();
    },
    async revoke(client_id, token) {
      await form("/revoke", { token, client_id });
    },
  };
}
