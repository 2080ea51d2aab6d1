/**
 * The promises about refresh tokens, tried on random histories: a server in this process, a clock that is told what to
 * show, and holders of tokens who do whatever real ones do, in any order. fast-check makes the histories up and, where
 * one breaks a promise, looks for the shortest that does.
 *
 *     npx -y deno run -A .ci/model.ts [--runs N] [--seed N]
 *
 * `--runs` (10000) is the number of histories, half of them with a thief. The seed is printed; with it, a run is repeated.
 *
 * Words. RT(0) comes with the code; presenting RT(k) gives RT(k+1) and AT(k+1), derived from RT(k), so that everybody who
 * presents RT(k) is given the same. RT(k) is *rotated* when it is first presented, and RT(k+1) is *seen* when it or AT(k+1)
 * is first presented. All times are the server's own clock, the only one it has.
 *
 * An honest client is one to three nodes. They keep tokens where all can read them, but a node sees what another one has
 * stored only after a delay of up to a minute. Nodes refresh one by one or at once, with one request or several; any answer
 * may be lost, with the connection or with the node, and is asked for again in seconds or weeks, with whatever the
 * node then finds stored. A node stores tokens before it uses them, and only in the place of those it presented: a client
 * that puts old tokens over newer ones holds, as far as a server can tell, a copy. The clock steps back and forth by minutes; it steps ahead
 * only while all nodes see the same, because a step of two minutes in between is the end of any grace period.
 *
 * What is checked of an honest client alone:
 *
 * 1. It is never logged out: every refresh is answered 200 with tokens, as long as the last one is not `refreshTokenTtl` ago.
 * 2. An access token works until its own expiry, also after later refreshes, unless a clock that ran ahead had passed that.
 * 3. The event of a theft is never raised.
 *
 * What is checked in company of a thief, who copies any token at any moment, and uses and refreshes as he likes:
 *
 * 4. There is one chain: whoever presents RT(k) is answered with a later token of the same chain, and only the newest one
 *    makes it longer. So two holders can not live side by side on chains of their own; the thief holds what the victim
 *    holds, and whoever falls behind shows it.
 * 5. A presented RT(k) is accepted if it is the newest, or was rotated not more than two minutes ago, or if RT(k+1) is the
 *    newest and unseen; it ends the connection if it was rotated, and RT(k+1) seen, more than two minutes ago. (In between,
 *    when RT(k) was rotated long ago and RT(k+1) seen just now, both are in order here; rule 1 decides for the honest.)
 * 6. So if thief and victim diverge, the connection ends at the latest when the one who is behind refreshes outside the
 *    grace period. It ends as a whole: no token of either works again, and the event is raised once, for this connection.
 * 7. A second connection of the same client never notices.
 *
 * What is not promised, because nobody could: a thief who keeps in step with his victim, always within the two minutes, is
 * another node of the client as far as a server can tell, until one of them falls behind.
 *
 * @module
 */

import { strictEqual as equal } from "node:assert/strict";
import { Hono } from "hono";
// deno-lint-ignore no-import-prefix -- for this check only, so deno.json does not name it
import fc from "npm:fast-check@4.10.2";
import { memoryStore, personalAuth } from "../mod.ts";
import { check, demand, finish, numberArgument } from "./lib/checks.ts";
import { BASE, Client, type Tokens } from "./lib/client.ts";

const RUNS = numberArgument("runs", 10_000);
const SEED = numberArgument("seed", Math.floor(Math.random() * 2 ** 31));

const GRACE = 120;
const HOUR = 3600;
const DAY = 24 * HOUR;
const ACCESS_TTL = HOUR;
const REFRESH_TTL = 60 * DAY;
/** `expires_in` is a whole number, and no two moments of the server's are the same: nobody is held to a second. */
const ROUNDING = 1;
/** An answer that is given again is not written down again while its access token has half of its time left. */
const SLACK = ACCESS_TTL;

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The server and its clock
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const realNow = Date.now;

class World {
  /** The time that really passes, in seconds: what holders of tokens live by. */
  time = 1_800_000_000;
  /** What the server's clock is wrong by. */
  offset = 0;
  /** The latest that its clock has shown. */
  peak = this.time;
  readonly client: Client;
  readonly thefts: string[] = [];
  readonly #connections: Connection[] = [];

  constructor() {
    Date.now = () => this.clock * 1000;
    const auth = personalAuth({
      baseUrl: BASE,
      store: memoryStore(),
      authenticateOwner: () => true,
      accessTokenTtl: ACCESS_TTL,
      refreshTokenTtl: REFRESH_TTL,
      onEvent: ({ type, connection }) => {
        if (type === "refresh_token_reused") this.thefts.push(connection!);
      },
    });
    const app = new Hono();
    app.route("/", auth);
    app.get("/mcp", auth.guard, (c) => c.json(c.var.auth.extra));
    this.client = new Client((path, init) => app.request(BASE + path, init));
  }

  get clock(): number {
    return this.time + this.offset;
  }

  async connect(): Promise<Connection> {
    const connection = new Connection(this, await this.client.connect());
    this.#connections.push(connection);
    return connection;
  }

  wait(seconds: number): void {
    this.time += seconds;
    this.#tick();
  }

  step(seconds: number): void {
    this.offset += seconds;
    this.#tick();
  }

  #tick(): void {
    this.peak = Math.max(this.peak, this.clock);
    for (const connection of this.#connections) connection.tick();
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// What a connection should do
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Access {
  n: number;
  until: number;
  /** The latest that the clock has shown since it was issued. */
  peak: number;
}

/**
 * One connection as the promises have it. It keeps everything that ever happened, where the server keeps as little as it
 * can, and compares each answer with what was promised.
 */
class Connection {
  readonly #world: World;
  readonly first: Tokens;
  /** RT(0) … RT(n). */
  readonly chain: string[];
  readonly #rotated: { at: number; peak: number }[] = [];
  readonly #seen: (number | undefined)[] = [];
  readonly #access = new Map<string, Access>();
  #refreshed: number;
  ended = false;

  constructor(world: World, tokens: Tokens) {
    this.#world = world;
    this.first = tokens;
    this.#refreshed = world.clock;
    this.chain = [tokens.refresh_token];
    this.#issued(tokens, 0);
  }

  get #n(): number {
    return this.chain.length - 1;
  }

  tick(): void {
    const { clock } = this.#world;
    for (const each of this.#rotated) each.peak = Math.max(each.peak, clock);
    for (const each of this.#access.values()) each.peak = Math.max(each.peak, clock);
  }

  isNewest(refresh_token: string): boolean {
    return this.chain.indexOf(refresh_token) === this.#n;
  }

  #issued({ access_token, expires_in }: Tokens, n: number): void {
    const { clock } = this.#world;
    const until = Math.max(clock + expires_in, this.#access.get(access_token)?.until ?? 0);
    this.#access.set(access_token, { n, until, peak: clock });
  }

  #promise(k: number): "accept" | "end" | "expired" | "open" {
    const { clock } = this.#world;
    const n = this.#n;
    const idle = clock - this.#refreshed;
    if (this.ended || idle > REFRESH_TTL + ROUNDING) return "expired";
    const alive = idle < REFRESH_TTL - SLACK ? "accept" : "open";
    if (k === n) return alive;
    const { at, peak } = this.#rotated[k]!;
    if (peak - at <= GRACE - ROUNDING) return alive;
    const seen = this.#seen[k + 1];
    if (k === n - 1 && seen === undefined) return alive;
    return alive === "accept" && clock - Math.max(at, seen!) > GRACE + ROUNDING ? "end" : "open";
  }

  /** Presents a refresh token, so many times at once; the tokens it got, if it got any. */
  async refresh(refresh_token: string, times = 1, honest = false): Promise<Tokens | undefined> {
    const { clock, client, thefts } = this.#world;
    const k = this.chain.indexOf(refresh_token);
    const promise = this.#promise(k);
    const reported = thefts.length;
    figures.refreshes += times;
    const answers = await Promise.all(Array.from({ length: times }, () => client.refresh(refresh_token)));
    const { status, body } = answers[0]!;
    for (const answer of answers) {
      equal(answer.status, status, "one of several at once was answered otherwise");
      equal(answer.body.refresh_token, body.refresh_token, "one of several at once got another refresh token");
      equal(answer.body.access_token, body.access_token, "one of several at once got another access token");
    }
    const what = `RT(${k}) of RT(${this.#n})`;
    if (status !== 200) {
      equal(`${status} ${body.error}`, "400 invalid_grant");
      demand(promise !== "accept", `${what} was refused`);
      demand(!honest || promise === "expired" || clock - this.#refreshed >= REFRESH_TTL - SLACK, `${what}: logged out`);
      if (thefts.length === reported) demand(promise !== "end", `${what} was refused, and the theft was not noticed`);
      else await this.#theft(promise);
      return undefined;
    }
    demand(promise !== "end" && promise !== "expired", `${what} was accepted (${promise})`);
    this.#refreshed = clock;
    if (k > 0) this.#seen[k] ??= clock;
    if (k === this.#n) {
      demand(!this.chain.includes(body.refresh_token), `${what} was answered with an earlier one`);
      this.chain.push(body.refresh_token);
      this.#rotated.push({ at: clock, peak: clock });
    }
    const next = this.chain.indexOf(body.refresh_token);
    demand(next > k, `${what} was answered with a token from outside of the chain`);
    this.#issued(body, next);
    return body;
  }

  async #theft(promise: string): Promise<void> {
    const { thefts } = this.#world;
    demand(promise === "end" || promise === "open", "a theft was reported where there was none");
    demand(!this.ended, "a theft was reported twice");
    const id = this.chain[0]!.slice(4, 36);
    equal(thefts.at(-1), id, "the theft was reported of another connection");
    this.ended = true;
    for (const access_token of this.#access.keys()) await this.use(access_token);
    for (const refresh_token of this.chain) equal(await this.refresh(refresh_token), undefined);
    equal(thefts.filter((each) => each === id).length, 1);
  }

  async use(access_token: string): Promise<boolean> {
    const { clock, client } = this.#world;
    const { n, until, peak } = this.#access.get(access_token)!;
    figures.calls++;
    const { status } = await client.call(access_token);
    if (status !== 200) equal(status, 401);
    if (this.ended || clock > until + ROUNDING) equal(status, 401, `AT(${n}) works when it should not`);
    else if (peak < until - ROUNDING) {
      equal(status, 200, `AT(${n}) does not work, ${until - clock} s before it expires`);
    }
    if (status === 200 && n > 0) this.#seen[n] ??= clock;
    return status === 200;
  }
}

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Holders of tokens
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A client on several nodes, as honest as they come. */
class Honest {
  readonly #world: World;
  readonly #connection: Connection;
  readonly #delay: number;
  /** Where all nodes keep their tokens: what was written, when, and which nodes know of it before the others do. */
  readonly #stored: { known: Set<number>; at: number; tokens: Tokens }[];

  constructor(world: World, connection: Connection, delay: number) {
    this.#world = world;
    this.#connection = connection;
    this.#delay = delay;
    this.#stored = [{ known: new Set(), at: -Infinity, tokens: connection.first }];
  }

  /** What a node takes for the latest: the last that was written, of what it can see. */
  view(node: number): Tokens {
    const { time } = this.#world;
    return this.#stored.findLast(({ known, at }) => known.has(node) || time >= at + this.#delay)!.tokens;
  }

  /** The seconds until all nodes see what was stored last. */
  get behind(): number {
    return Math.max(0, this.#stored.at(-1)!.at + this.#delay - this.#world.time);
  }

  /** Any token it ever had: what a thief may find in a backup. */
  past(which: number): Tokens {
    return this.#stored[which % this.#stored.length]!.tokens;
  }

  /** Some nodes at the same moment: each with what it saw then, whatever the others are answered. */
  async refresh(nodes: { node: number; lost: boolean }[], times: number, alone: boolean): Promise<void> {
    const views = nodes.map(({ node, lost }) => ({ node, lost, token: this.view(node).refresh_token }));
    for (const { node, lost, token } of views) {
      const tokens = await this.#connection.refresh(token, times, alone);
      if (tokens && !lost) this.#store(node, token, tokens);
    }
  }

  /** Compares and sets: where another node was faster, its tokens stand, and this one learns of them. */
  #store(node: number, presented: string, tokens: Tokens): void {
    const last = this.#stored.at(-1)!;
    if (last.tokens.refresh_token === presented) {
      this.#stored.push({ known: new Set([node]), at: this.#world.time, tokens });
    } else last.known.add(node);
  }
}

/** What happens next. Numbers choose among what there is at that moment. */
type Action =
  | { do: "wait" | "step"; seconds: number }
  | { do: "use"; node: number }
  | { do: "refresh"; node: number; times: number; lost: boolean }
  | { do: "together"; lost: boolean[] }
  | { do: "bystander" }
  | { do: "steal"; node: number; past: number | null }
  | { do: "thief refreshes" | "thief uses"; which: number };

const wait = fc.oneof(
  { weight: 4, arbitrary: fc.integer({ min: 0, max: 20 }) },
  { weight: 3, arbitrary: fc.integer({ min: 20, max: 300 }) },
  { weight: 2, arbitrary: fc.integer({ min: 300, max: 5 * HOUR }) },
  { weight: 2, arbitrary: fc.integer({ min: 1, max: 40 }).map((days) => days * DAY) },
).map((seconds): Action => ({ do: "wait", seconds }));
const step = fc.integer({ min: -600, max: 600 }).map((seconds): Action => ({ do: "step", seconds }));
const node = fc.nat({ max: 2 });
const use = node.map((node): Action => ({ do: "use", node }));
const refresh = fc.record({
  do: fc.constant("refresh" as const),
  node,
  times: fc.integer({ min: 1, max: 3 }),
  lost: fc.boolean(),
});
const together = fc.tuple(fc.boolean(), fc.boolean(), fc.boolean()).map((lost): Action => ({ do: "together", lost }));
const bystander = fc.constant<Action>({ do: "bystander" });
const steal = fc.record({ do: fc.constant("steal" as const), node, past: fc.option(fc.nat()) });
const theft = fc.record({ do: fc.constantFrom("thief refreshes" as const, "thief uses" as const), which: fc.nat() });

const history = (...more: fc.Arbitrary<Action>[]) =>
  fc.record({
    nodes: fc.integer({ min: 1, max: 3 }),
    delay: fc.integer({ min: 0, max: 60 }),
    actions: fc.array(fc.oneof(wait, wait, step, use, use, refresh, refresh, together, ...more), {
      minLength: 1,
      maxLength: 40,
    }),
  });

// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
// Histories
// ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface History {
  nodes: number;
  delay: number;
  actions: Action[];
}

const figures = { refreshes: 0, calls: 0, stolen: 0, ended: 0 };

async function live({ nodes, delay, actions }: History, thieves: boolean): Promise<void> {
  const world = new World();
  const connection = await world.connect();
  const honest = new Honest(world, connection, nodes === 1 ? 0 : delay);
  const bystander = new Honest(world, await world.connect(), 0);
  const loot: Tokens[] = [];
  for (const action of actions) {
    switch (action.do) {
      case "wait":
        world.wait(action.seconds);
        break;
      case "step":
        if (action.seconds > 0) world.wait(honest.behind);
        world.step(action.seconds);
        break;
      case "use":
        await connection.use(honest.view(action.node % nodes).access_token);
        break;
      case "refresh":
        await honest.refresh([{ node: action.node % nodes, lost: action.lost }], action.times, !thieves);
        break;
      case "together":
        await honest.refresh(action.lost.slice(0, nodes).map((lost, node) => ({ node, lost })), 1, !thieves);
        break;
      case "bystander":
        await bystander.refresh([{ node: 0, lost: false }], 1, true);
        break;
      case "steal":
        loot.push(action.past === null ? honest.view(action.node % nodes) : honest.past(action.past));
        figures.stolen++;
        break;
      case "thief refreshes": {
        const tokens = loot.length > 0 && await connection.refresh(loot[action.which % loot.length]!.refresh_token);
        if (tokens) loot.push(tokens);
        break;
      }
      case "thief uses":
        if (loot.length > 0) await connection.use(loot[action.which % loot.length]!.access_token);
        break;
    }
  }
  if (thieves) await partWays(world, connection, honest, loot);
  await bystander.refresh([{ node: 0, lost: false }], 1, true);
  equal(world.thefts.length, connection.ended ? 1 : 0);
  if (connection.ended) figures.ended++;
}

/** The end of every history with a thief: he goes on alone, and later the victim comes back. */
async function partWays(world: World, connection: Connection, honest: Honest, loot: Tokens[]): Promise<void> {
  const latest = loot.at(-1);
  const tokens = latest && !connection.ended && await connection.refresh(latest.refresh_token);
  if (!tokens) return;
  await connection.use(tokens.access_token);
  world.wait(Math.max(honest.behind, world.peak - world.clock + GRACE + 1));
  const { refresh_token } = honest.view(0);
  const apart = connection.isNewest(tokens.refresh_token) && !connection.isNewest(refresh_token);
  await connection.refresh(refresh_token);
  demand(connection.ended || !apart, "thief and victim went separate ways, and nobody noticed");
}

async function histories(arbitrary: fc.Arbitrary<History>, thieves: boolean): Promise<string> {
  const numRuns = Math.ceil(RUNS / 2);
  const property = fc.asyncProperty(arbitrary, async (history) => {
    try {
      await live(history, thieves);
    } finally {
      Date.now = realNow;
    }
  });
  await fc.assert(property, { numRuns, seed: SEED });
  return `${numRuns} histories`;
}

console.log(`seed ${SEED}`);
const limit = 60 + RUNS / 20;
await check("an honest client is never logged out", limit, () => histories(history(), false));
await check(
  "a thief is found out, and costs one connection",
  limit,
  () => histories(history(bystander, steal, steal, theft, theft, theft), true),
);
const { refreshes, calls, stolen, ended } = figures;
console.log(`${refreshes} refreshes, ${calls} calls, ${stolen} copies stolen, ${ended} connections ended`);
await finish();
