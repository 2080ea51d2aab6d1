/**
 * A client of the server, and the owner at the browser: no more than the protocol asks for, over whatever carries
 * requests. Runs on all three runtimes.
 *
 * @module
 */

/** What the server believes to be its address, wherever it listens. */
export const BASE = "https://mcp.example.com";
export const REDIRECT = "https://claude.ai/api/mcp/auth_callback";
/** The pair of RFC 7636 appendix B. */
export const VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";

// deno-lint-ignore no-explicit-any
export type Json = any;

export interface Answer {
  status: number;
  headers: Headers;
  body: Json;
}

export interface Tokens {
  access_token: string;
  refresh_token: string;
  expires_in: number;
}

/** Carries a request to the server: `path` begins with a slash. */
export type Carrier = (path: string, init?: RequestInit) => Response | Promise<Response>;

/** Over a socket, to a server on this machine. */
export function overHttp(port: number | string): Carrier {
  return (path, init) => fetch(`http://127.0.0.1:${port}${path}`, { redirect: "manual", ...init });
}

/**
 * Asks again, as Retry-After says, while the answer is 503: nothing is lost by one. When a database server has been
 * killed, its client library may take some seconds until all of its connections are new ones.
 */
export function askingAgain(carry: Carrier): Carrier {
  return async (path, init) => {
    for (let attempts = 1;; attempts++) {
      const response = await carry(path, init);
      if (response.status !== 503 || attempts === 20) return response;
      await response.body?.cancel();
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  };
}

export class Client {
  readonly carry: Carrier;
  #id: string | undefined;

  constructor(carry: Carrier, id?: string) {
    this.carry = carry;
    this.#id = id;
  }

  async send(path: string, init?: RequestInit): Promise<Answer> {
    const response = await this.carry(path, init);
    const { status, headers } = response;
    const text = await response.text(); // an answer counts when all of it has arrived
    return { status, headers, body: text.startsWith("{") ? JSON.parse(text) : text };
  }

  form(path: string, fields: Record<string, string>, headers: Record<string, string> = {}): Promise<Answer> {
    const body = new URLSearchParams(fields).toString();
    return this.send(path, {
      method: "POST",
      headers: { "Content-Type": "application/x-www-form-urlencoded", ...headers },
      body,
    });
  }

  json(path: string, body: unknown): Promise<Answer> {
    const headers = { "Content-Type": "application/json" };
    return this.send(path, { method: "POST", headers, body: JSON.stringify(body) });
  }

  register(name = "Claude"): Promise<Answer> {
    return this.json("/register", { redirect_uris: [REDIRECT], client_name: name });
  }

  /** The client's id: a registration stores nothing and gives the same again, so one is enough for all. */
  async id(): Promise<string> {
    if (this.#id === undefined) {
      const { status, body } = await this.register();
      if (status !== 201) throw new Error(`/register answered ${status}`);
      this.#id = body.client_id as string;
    }
    return this.#id;
  }

  /** What the owner's browser is answered when the owner approves; the code, if it came to that. */
  async approve(): Promise<Answer & { code: string | undefined }> {
    const query = new URLSearchParams({
      response_type: "code",
      client_id: await this.id(),
      redirect_uri: REDIRECT,
      code_challenge: CHALLENGE,
      code_challenge_method: "S256",
    });
    const page = await this.send(`/authorize?${query}`);
    if (page.status !== 200) return { ...page, code: undefined };
    const field = (name: string) => page.body.match(`name="${name}" value="([^"]*)"`)[1].replaceAll("&amp;", "&");
    const Cookie = page.headers.getSetCookie()[0]!.split(";")[0]!;
    const fields = { request: field("request"), csrf: field("csrf"), decision: "approve" };
    const answer = await this.form("/authorize", fields, { Cookie });
    const location = answer.headers.get("Location");
    return { ...answer, code: location ? new URL(location).searchParams.get("code") ?? undefined : undefined };
  }

  async redeem(code: string): Promise<Answer> {
    const client_id = await this.id();
    return this.form("/token", { grant_type: "authorization_code", client_id, code, code_verifier: VERIFIER });
  }

  async refresh(refresh_token: string): Promise<Answer> {
    return this.form("/token", { grant_type: "refresh_token", client_id: await this.id(), refresh_token });
  }

  async revoke(token: string): Promise<Answer> {
    return this.form("/revoke", { client_id: await this.id(), token });
  }

  call(access_token: string): Promise<Answer> {
    return this.send("/mcp", { headers: { Authorization: `Bearer ${access_token}` } });
  }

  /** From nothing to tokens. */
  async connect(): Promise<Tokens> {
    const { status, code } = await this.approve();
    if (code === undefined) throw new Error(`/authorize answered ${status}`);
    const answer = await this.redeem(code);
    if (answer.status !== 200) throw new Error(`/token answered ${answer.status} to a code`);
    return answer.body;
  }
}
