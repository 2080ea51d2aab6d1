/**
 * What a server has promised: every answer that arrived whole is written down here, and after whatever was done to the
 * server it is asked to keep its word.
 *
 * @module
 */

import { type Answer, Client, overHttp, type Tokens } from "./client.ts";

/** Whether something was revoked. `asked`: no answer came, so it may be alive or dead until it is asked again. */
type Revoked = "no" | "asked" | "yes";

/**
 * What a 503 means for the write that was asked for. `undone`: it did not happen. `open`: it may have, as when a disk
 * fails while it takes the last bytes of it; nobody can tell until the disk is read again. `away`: so for writes, and
 * reads are refused as well, because a database server is away.
 */
export type Refusals = "undone" | "open" | "away";

interface Connection {
  access: string[];
  /** The latest that was acknowledged. A refresh whose answer got lost is repeated with it. */
  refresh: string;
  unanswered: boolean;
  refreshes: number;
  /** After how many refreshes an answer was lost on purpose. */
  lost: number;
  revoked: Revoked;
  busy: boolean;
  /** Since the last audit. */
  touched: boolean;
}

interface Script {
  id: string;
  token: string;
  revoked: Revoked;
  busy: boolean;
  touched: boolean;
}

/** More would make the server drop the oldest access tokens, which is its bound on the size of a record. */
const MAX_REFRESHES = 80;
const MAX_LIVE = 40;
const SAMPLE = 40;

const pick = <T>(items: T[]): T | undefined => items[Math.floor(Math.random() * items.length)];

export class Ledger {
  readonly connections: Connection[] = [];
  readonly scripts: Script[] = [];
  /** Codes that the browser was given and nobody has redeemed. */
  readonly codes = new Set<string>();
  readonly lost: string[] = [];
  readonly alive: string[] = [];
  readonly wrong: string[] = [];
  acknowledged = 0;
  /** Refreshes with one token by several at once. */
  storms = 0;
  /** Changes that were asked for, and whose answers never came. */
  unanswered = 0;
  /** While this is set, a success is no promise: what was asked for may have happened or not. */
  doubtful = false;
  #client_id: string | undefined;

  /** All that is amiss, or nothing. */
  get faults(): string {
    const list = (name: string, items: string[]) => items.length > 0 ? [`${items.length} ${name} (${items[0]})`] : [];
    return [...list("lost", this.lost), ...list("revoked alive", this.alive), ...list("wrong", this.wrong)].join(", ");
  }

  async client(port: string, carry = overHttp(port)): Promise<Client> {
    const client = new Client(carry, this.#client_id);
    this.#client_id = await client.id();
    return client;
  }

  /**
   * Keeps a server busy until it dies or `stop` is called: approvals, code exchanges, refreshes by one and by several at
   * once, revocations, personal access tokens and calls, all mixed. `tolerate` is for a server that cannot write.
   */
  load(client: Client, workers: number, tolerate?: Refusals): { done: Promise<void>; stop(): void } {
    let stopped = false;
    const work = async () => {
      while (!stopped) {
        try {
          await this.#step(client, tolerate);
        } catch {
          this.unanswered++;
          return; // the server is gone, and with it this answer
        }
      }
    };
    return {
      done: Promise.all(Array.from({ length: workers }, work)).then(() => {}),
      stop: () => {
        stopped = true;
      },
    };
  }

  async #step(client: Client, tolerate: Refusals | undefined): Promise<void> {
    const live = this.connections.filter(({ revoked, busy }) => revoked === "no" && !busy);
    const scripts = this.scripts.filter(({ revoked, busy }) => revoked === "no" && !busy);
    const [connection, script] = [pick(live), pick(scripts)];
    const dice = Math.random();
    if (!connection || (live.length < MAX_LIVE && dice < 0.2)) await this.#approve(client, tolerate);
    else if (dice < 0.3 && this.codes.size > 0) await this.#redeem(client, pick([...this.codes])!, tolerate);
    else if (dice < 0.6) {
      const several = Math.random() < 0.3 ? 3 : 1;
      // Not in two rotations in a row: where the clock jumps in between, that is what a thief does, and is taken for one.
      const mayLose = connection.refreshes - connection.lost !== 1;
      if (dice < 0.33 && mayLose) await this.#loseAnswer(client, connection, tolerate);
      else if (connection.refreshes < MAX_REFRESHES) await this.#refresh(client, connection, several, tolerate);
      else await this.#end(client, connection, tolerate);
    } else if (dice < 0.66 && live.length > 5) await this.#end(client, connection, tolerate);
    else if (dice < 0.74 && scripts.length < MAX_LIVE) await this.#createToken(client, tolerate);
    else if (dice < 0.78 && script && scripts.length > 5) await this.#endScript(client, script, tolerate);
    else if (dice < 0.9) await this.#call(client, connection, connection.access.at(-1)!, "access token", tolerate);
    else if (script) await this.#call(client, script, script.token, "personal access token", tolerate);
  }

  async #call(
    client: Client,
    holder: { revoked: Revoked },
    token: string,
    what: string,
    tolerate?: Refusals,
  ): Promise<void> {
    const answer = await client.call(token);
    if (tolerate === "away" && answer.status === 503) return;
    // Another worker may have asked for its end meanwhile.
    if (holder.revoked === "no") this.#expect(answer, 200, this.lost, what);
  }

  #expect({ status, body }: Answer, wanted: number, list: string[], what: string): boolean {
    if (status !== wanted) list.push(`${what}: ${status} ${JSON.stringify(body).slice(0, 200)}`);
    return status === wanted;
  }

  /** Whether this is the promised success; a tolerated refusal is neither that nor a fault. */
  #succeeded(answer: Answer, tolerate: Refusals | undefined, what: string, wanted = 200): boolean {
    if (answer.status === 503 && tolerate) {
      if (!(Number(answer.headers.get("Retry-After")) > 0)) this.wrong.push(`${what}: 503 without Retry-After`);
      return false;
    }
    return this.#expect(answer, wanted, this.wrong, what) && !this.doubtful;
  }

  async #approve(client: Client, tolerate?: Refusals): Promise<void> {
    const answer = await client.approve();
    if (!this.#succeeded(answer, tolerate, "approval", 302)) return;
    this.acknowledged++;
    this.codes.add(answer.code!);
    if (Math.random() < 0.8) await this.#redeem(client, answer.code!, tolerate);
  }

  async #redeem(client: Client, code: string, tolerate?: Refusals): Promise<void> {
    if (!this.codes.delete(code)) return; // once it is on its way, only an answer tells what became of it
    const answer = await client.redeem(code);
    if (!this.#succeeded(answer, tolerate, "code")) {
      if (answer.status === 503 && tolerate === "undone") this.codes.add(code); // it must be as good as before
      return;
    }
    const { access_token, refresh_token }: Tokens = answer.body;
    this.acknowledged++;
    const state = { unanswered: false, refreshes: 0, lost: -2, revoked: "no", busy: false, touched: true } as const;
    this.connections.push({ access: [access_token], refresh: refresh_token, ...state });
  }

  async #refresh(client: Client, connection: Connection, several: number, tolerate?: Refusals): Promise<void> {
    Object.assign(connection, { busy: true, touched: true, unanswered: true });
    const presented = connection.refresh;
    if (several > 1) this.storms++;
    const answers = await Promise.allSettled(Array.from({ length: several }, async () => {
      const answer = await client.refresh(presented);
      if (!this.#succeeded(answer, tolerate, "refresh")) return;
      const { access_token, refresh_token }: Tokens = answer.body;
      this.acknowledged++;
      if (connection.refresh === presented) {
        connection.access.push(access_token);
        connection.refresh = refresh_token;
        connection.refreshes++;
        connection.unanswered = false;
      } else if (connection.refresh !== refresh_token || connection.access.at(-1) !== access_token) {
        this.wrong.push("refresh: two answers to one token");
      }
    }));
    connection.busy = false;
    if (answers.some(({ status }) => status === "rejected")) throw new Error("unanswered");
  }

  /** As when a connection breaks off: the server has rotated the token, and the client goes on with the old one. */
  async #loseAnswer(client: Client, connection: Connection, tolerate?: Refusals): Promise<void> {
    Object.assign(connection, { busy: true, touched: true, unanswered: true, lost: connection.refreshes });
    this.#succeeded(await client.refresh(connection.refresh), tolerate, "refresh");
    this.unanswered++;
    connection.busy = false;
  }

  async #end(client: Client, connection: Connection, tolerate?: Refusals): Promise<void> {
    const token = Math.random() < 0.5 ? connection.refresh : connection.access.at(-1)!;
    await this.#revoke(connection, () => client.revoke(token), tolerate);
  }

  async #endScript(client: Client, script: Script, tolerate?: Refusals): Promise<void> {
    await this.#revoke(script, () => client.json("/test/revoke", { id: script.id }), tolerate);
  }

  async #revoke(holder: Connection | Script, ask: () => Promise<Answer>, tolerate?: Refusals): Promise<void> {
    Object.assign(holder, { busy: true, touched: true, revoked: "asked" });
    const answer = await ask().finally(() => {
      holder.busy = false;
    });
    if (!this.#succeeded(answer, tolerate, "revocation")) {
      if (answer.status === 503 && tolerate === "undone") holder.revoked = "no";
      return;
    }
    holder.revoked = "yes";
    this.acknowledged++;
  }

  async #createToken(client: Client, tolerate?: Refusals): Promise<void> {
    const answer = await client.json("/test/token", { name: "script" });
    if (!this.#succeeded(answer, tolerate, "personal access token")) return;
    this.acknowledged++;
    this.scripts.push({ id: answer.body.id, token: answer.body.token, revoked: "no", busy: false, touched: true });
  }

  /** Asks for everything that changed since the last time and a sample of the rest, or for all there is. */
  async audit(client: Client, everything = false): Promise<void> {
    const due = <T extends { touched: boolean }>(items: T[]): T[] => {
      if (everything) return items;
      const rest = items.filter(({ touched }) => !touched).sort(() => Math.random() - 0.5);
      return [...items.filter(({ touched }) => touched), ...rest.slice(0, SAMPLE)];
    };
    await eight([...this.codes], (code) => this.#redeem(client, code));
    await eight(due(this.connections), async (connection) => {
      if (connection.revoked === "asked") await this.#end(client, connection);
      await this.#auditConnection(client, connection);
      connection.touched = false;
    });
    await eight(due(this.scripts), async (script) => {
      if (script.revoked === "asked") await this.#endScript(client, script);
      if (script.revoked === "yes") this.#expect(await client.call(script.token), 401, this.alive, "revoked token");
      else this.#expect(await client.call(script.token), 200, this.lost, "personal access token");
      script.touched = false;
    });
  }

  async #auditConnection(client: Client, connection: Connection): Promise<void> {
    const { access, refresh } = connection;
    const dead = connection.revoked === "yes";
    // The latest tokens each time, and one of the earlier ones, which live to their own expiry.
    for (const token of new Set([...access.slice(-3), pick(access.slice(-MAX_REFRESHES))!])) {
      this.#expect(await client.call(token), dead ? 401 : 200, dead ? this.alive : this.lost, "access token");
    }
    if (dead) this.#expect(await client.refresh(refresh), 400, this.alive, "refresh token of a revoked connection");
    else {
      const answer = await client.refresh(refresh);
      const what = connection.unanswered ? "repeated refresh" : "refresh token";
      if (!this.#expect(answer, 200, this.lost, what)) return;
      access.push(answer.body.access_token);
      Object.assign(connection, { refresh: answer.body.refresh_token, unanswered: false });
      connection.refreshes++;
    }
  }
}

/** Eight at a time. */
async function eight<T>(items: T[], task: (item: T) => Promise<void>): Promise<void> {
  const queue = [...items];
  await Promise.all(Array.from({ length: 8 }, async () => {
    for (let item = queue.shift(); item !== undefined; item = queue.shift()) await task(item);
  }));
}
