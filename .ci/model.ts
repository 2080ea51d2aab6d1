/**
 * The promises about refresh tokens, tried on random histories: a server in this process, a clock under control, and
 * clients and thieves that do what real ones do, in any order. fast-check makes the histories, and where one breaks a
 * promise it looks for the shortest that does.
 *
 *     npx -y deno run -A .ci/model.ts [--runs N] [--seed N]
 *
 * `--runs` (10000) is the number of histories, half of them with a thief. The seed is printed and repeats a run.
 *
 * Words. RT(0) comes with the code. Presenting RT(k) gives RT(k+1) and AT(k+1), which are derived from RT(k), so that
 * everybody who presents RT(k) gets the same. RT(k) is *rotated* when it is first presented. RT(k+1) is *seen* when it
 * or AT(k+1) is first presented. RT(k) is *repeated late* when it is presented again more than two minutes after its
 * rotation and RT(k+1) is the newest and unseen. A late repeat starts the two minutes again. All times are those of the
 * server's clock, the only one it has.
 *
 * An honest client is one to three nodes with a common storage. A node sees what another one has stored after up to a
 * minute. Nodes refresh one by one or at once, with one request or several. Any answer may be lost, with the connection
 * or with the node, and is asked for again after seconds or weeks. A node stores tokens before it uses them, and only in
 * the place of those it presented: a client that puts old tokens over newer ones holds, as far as a server can tell, a
 * copy. The clock steps back and forth by minutes; it steps ahead only while all nodes see the same, because a step of
 * two minutes in between is the end of any grace period.
 *
 * The one assumption: **an honest client does not repeat late in two consecutive rotations.** It would have to lose the
 * answers of both, and ask for both again only after the grace period. No server can tell it from the thief who copies a
 * refresh token, rotates first, leaves the answer unused and waits. So an answer that follows a late repeat arrives here.
 *
 * What is checked of an honest client alone:
 *
 * 1. It is never logged out: every refresh is answered 200 with tokens, as long as the last one is not
 *    `refreshTokenTtl` ago.
 * 2. An access token works until its own expiry, also after later refreshes, unless a clock that ran ahead had passed
 *    that.
 * 3. `refresh_token_reused` is never raised. `refresh_token_repeated` is raised once for each late repeat, never else.
 *
 * What is checked in company of a thief, who copies any token at any moment, and uses and refreshes as he likes:
 *
 * 4. There is one chain: whoever presents RT(k) gets a later token of the same chain, and only the newest one makes it
 *    longer. So thief and client cannot live side by side on two chains.
 * 5. A presented RT(k) is accepted if it is the newest or was rotated at most two minutes ago. If it is repeated late,
 *    the event is raised, and the connection goes on, unless RT(k-1) was repeated late as well. In every other case the
 *    connection ends.
 * 6. A connection ends as a whole: no token of it works again, and `refresh_token_reused` is raised once, for it alone.
 * 7. A thief who rotates while the client is away is noticed, by an event or by the end, at the latest in the second
 *    refresh of the client that comes more than two minutes after his. It does not help him to leave his tokens unused.
 * 8. A second connection of the same client is not affected.
 *
 * What cannot be noticed: a thief who refreshes within two minutes of the client, each time. A server cannot tell him
 * from another node of it. The last check prints such a history.
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
  readonly repeats: string[] = [];
  readonly #connections: Connection[] = [];

  constructor(accessTokenTtl = ACCESS_TTL, refreshTokenTtl = REFRESH_TTL) {
    Date.now = () => this.clock * 1000;
    const auth = personalAuth({
      baseUrl: BASE,
      store: memoryStore(),
      authenticateOwner: () => true,
      accessTokenTtl,
      refreshTokenTtl,
      onEvent: ({ type, connection }) => {
        if (type === "refresh_token_reused") this.thefts.push(connection!);
        if (type === "refresh_token_repeated") this.repeats.push(connection!);
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
  /** The latest n for which RT(n-1) was repeated late. */
  #late = -1;
  /** The rotation that a thief made, and how often the client has refreshed since, more than two minutes later. */
  #alone: { k: number; refreshes: number } | undefined;
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

  /** Whether the newest refresh token comes from a late repeat. */
  get isLate(): boolean {
    return this.#late === this.#n;
  }

  /** How often the owner was told of something odd about this connection, its end included. */
  get notices(): number {
    const id = this.id;
    return [...this.#world.thefts, ...this.#world.repeats].filter((each) => each === id).length;
  }

  get id(): string {
    return this.chain[0]!.slice(4, 36);
  }

  #issued({ access_token, expires_in }: Tokens, n: number): void {
    const { clock } = this.#world;
    const until = Math.max(clock + expires_in, this.#access.get(access_token)?.until ?? 0);
    this.#access.set(access_token, { n, until, peak: clock });
  }

  #promise(k: number): "accept" | "late" | "end" | "expired" | "open" {
    const { clock } = this.#world;
    const n = this.#n;
    const idle = clock - this.#refreshed;
    if (this.ended || idle > REFRESH_TTL + ROUNDING) return "expired";
    const alive = idle < REFRESH_TTL - SLACK ? "accept" : "open";
    if (k === n) return alive;
    const { at, peak } = this.#rotated[k]!;
    if (peak - at <= GRACE - ROUNDING) return alive;
    // Within a second of the end of the grace period, or within it again because the clock has stepped back.
    if (clock - at <= GRACE + ROUNDING || alive !== "accept") return "open";
    const isUnseen = k === n - 1 && this.#seen[n] === undefined;
    return isUnseen && this.#late !== n - 1 ? "late" : "end";
  }

  /** Presents a refresh token, so many times at once; the tokens it got, if it got any. */
  async refresh(
    refresh_token: string,
    { times = 1, by, alone = false }: { times?: number; by: "client" | "thief"; alone?: boolean },
  ): Promise<Tokens | undefined> {
    const { clock, client, thefts, repeats } = this.#world;
    const k = this.chain.indexOf(refresh_token);
    const promise = this.#promise(k);
    const reported = thefts.length;
    const repeated = repeats.length;
    const noticed = this.notices;
    const since = this.#rotated[k] && clock - this.#rotated[k].at;
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
      demand(promise !== "accept" && promise !== "late", `${what} was refused (${promise})`);
      demand(!alone || promise === "expired" || clock - this.#refreshed >= REFRESH_TTL - SLACK, `${what}: logged out`);
      if (thefts.length === reported) demand(promise !== "end", `${what} was refused, and the theft was not noticed`);
      else await this.#theft(promise);
      return undefined;
    }
    demand(promise !== "end" && promise !== "expired", `${what} was accepted (${promise})`);
    const told = repeats.slice(repeated);
    const isLate = told.length === 1 && told[0] === this.id;
    demand(isLate || told.length === 0, `${what}: ${told.length} events for one late repeat`);
    if (promise !== "open") equal(isLate, promise === "late", `${what}: refresh_token_repeated (${promise})`);
    this.#refreshed = clock;
    if (k > 0) this.#seen[k] ??= clock;
    if (isLate) {
      figures.late++;
      this.#late = this.#n;
      this.#rotated[k] = { at: clock, peak: clock };
    }
    this.#watch(by, k, since, this.notices > noticed);
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

  /** Holds the server to rule 7, on every refresh that was answered. */
  #watch(by: "client" | "thief", k: number, since: number | undefined, isNoticed: boolean): void {
    if (by === "thief") {
      if (k === this.#n) this.#alone ??= { k, refreshes: 0 };
      return;
    }
    const isApart = this.#alone && k <= this.#alone.k && since !== undefined && since > GRACE + ROUNDING;
    if (!isApart || isNoticed) { // in step with him, on his tokens, or told
      this.#alone = undefined;
      return;
    }
    demand(++this.#alone!.refreshes < 2, "a thief rotated, the client refreshed twice, and nobody noticed");
  }

  async #theft(promise: string): Promise<void> {
    const { thefts } = this.#world;
    demand(promise === "end" || promise === "open", "a theft was reported where there was none");
    demand(!this.ended, "a theft was reported twice");
    const id = this.id;
    equal(thefts.at(-1), id, "the theft was reported of another connection");
    this.ended = true;
    for (const access_token of this.#access.keys()) await this.use(access_token);
    for (const refresh_token of this.chain) {
      equal(await this.refresh(refresh_token, { by: "client" }), undefined);
    }
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
    // The one assumption: after a late repeat, the next answer arrives at one of the nodes.
    const rotating = views.filter(({ token }) => this.#connection.isLate && this.#connection.isNewest(token));
    if (rotating.every(({ lost }) => lost)) { for (const view of rotating) view.lost = false; }
    for (const { node, lost, token } of views) {
      const tokens = await this.#connection.refresh(token, { times, by: "client", alone });
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
    patient: fc.boolean(),
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
  /** Whether the thief leaves his last tokens unused. */
  patient: boolean;
  nodes: number;
  delay: number;
  actions: Action[];
}

const figures = { refreshes: 0, calls: 0, stolen: 0, late: 0, ended: 0 };

async function live({ patient, nodes, delay, actions }: History, thieves: boolean): Promise<void> {
  const world = new World();
  const connection = await world.connect();
  const honest = new Honest(world, connection, nodes === 1 ? 0 : delay);
  const bystander = new Honest(world, await world.connect(), 0);
  const loot: Tokens[] = [];
  const stolen = (tokens: Tokens) => connection.refresh(tokens.refresh_token, { by: "thief" });
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
        const tokens = loot.length > 0 && await stolen(loot[action.which % loot.length]!);
        if (tokens) loot.push(tokens);
        break;
      }
      case "thief uses":
        if (loot.length > 0) await connection.use(loot[action.which % loot.length]!.access_token);
        break;
    }
  }
  const latest = loot.at(-1);
  if (latest && patient) await waitForClient(world, connection, honest, latest);
  else if (latest) await partWays(world, connection, honest, latest);
  await bystander.refresh([{ node: 0, lost: false }], 1, true);
  equal(world.thefts.length, connection.ended ? 1 : 0);
  if (connection.ended) figures.ended++;
}

/** The seconds after which every node sees the latest tokens, and every grace period is over. */
const untilApart = (world: World, honest: Honest) => Math.max(honest.behind, world.peak - world.clock + GRACE + 2);

/** One end of a history with a thief: he refreshes, uses what he got, and later the client comes back. */
async function partWays(world: World, connection: Connection, honest: Honest, latest: Tokens): Promise<void> {
  const tokens = !connection.ended && await connection.refresh(latest.refresh_token, { by: "thief" });
  if (!tokens) return;
  await connection.use(tokens.access_token);
  world.wait(untilApart(world, honest));
  const { refresh_token } = honest.view(0);
  const apart = connection.isNewest(tokens.refresh_token) && !connection.isNewest(refresh_token);
  await connection.refresh(refresh_token, { by: "client" });
  demand(connection.ended || !apart, "thief and victim went separate ways, and nobody noticed");
}

/** The other end: he rotates first, leaves the answer unused and waits for the client, twice in a row. */
async function waitForClient(world: World, connection: Connection, honest: Honest, latest: Tokens): Promise<void> {
  let held = latest;
  for (let round = 1; round <= 2; round++) {
    world.wait(untilApart(world, honest));
    const rotates = connection.isNewest(held.refresh_token) && connection.isNewest(honest.view(0).refresh_token);
    const tokens = !connection.ended && await connection.refresh(held.refresh_token, { by: "thief" });
    if (!tokens) return;
    held = tokens;
    const before = connection.notices;
    world.wait(untilApart(world, honest));
    await honest.refresh([{ node: 0, lost: false }], 1, false);
    demand(!rotates || connection.notices > before, "a patient thief rotated first, and nobody noticed");
    demand(!rotates || round === 1 || connection.ended, "a patient thief rotated first twice, and lives on");
    if (!connection.ended) await connection.use(honest.view(0).access_token);
  }
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

/** Two years of a client that refreshes when its access token expires, with the default lifetimes. */
async function twoYears(secondsAhead: number): Promise<{ world: World; connection: Connection; access: number }> {
  const world = new World(30 * DAY, 365 * DAY);
  const connection = await world.connect();
  let own = connection.first;
  let stolen = connection.first;
  let access = 0;
  try {
    for (let day = 0; day < 730; day++) {
      const isDue = day % 30 === 29 && !connection.ended;
      const thief = async () => stolen = await connection.refresh(stolen.refresh_token, { by: "thief" }) ?? stolen;
      const client = async () => own = await connection.refresh(own.refresh_token, { by: "client" }) ?? own;
      // Whoever comes first leaves the new access token unused until the other one has been there.
      const turns = secondsAhead > 0 ? [thief, client] : [client, thief];
      if (isDue) await turns[0]!();
      if (isDue) world.wait(Math.abs(secondsAhead));
      if (isDue && !connection.ended) await turns[1]!();
      if (!connection.ended) await connection.use(own.access_token);
      if (await connection.use(stolen.access_token)) access++;
      world.wait(DAY - (isDue ? Math.abs(secondsAhead) : 0));
    }
  } finally {
    Date.now = realNow;
  }
  return { world, connection, access };
}

/** What a thief who cannot be noticed does. */
const IN_STEP = `
  00:00:00  the client refreshes: RT(0) gives RT(1), and the client uses AT(1)
  00:01:00  a thief with a copy of RT(0) presents it: within two minutes it gives RT(1) and AT(1) once more
            he uses AT(1) until it expires, as the client does
            at the next refresh he comes within two minutes again, with RT(1), and so on`;

console.log(`seed ${SEED}`);
const limit = 60 + RUNS / 20;
await check("an honest client is never logged out", limit, () => histories(history(), false));
await check(
  "a thief is found out, and costs one connection",
  limit,
  () => histories(history(bystander, steal, steal, theft, theft, theft), true),
);
await check("two years of a patient thief, who refreshes an hour before the client", 60, async () => {
  const { world, connection, access } = await twoYears(HOUR);
  equal(world.repeats.length, 1);
  equal(world.thefts.length, 1);
  demand(connection.ended && access <= 60, `he had access on ${access} days`);
  return `an event at the first refresh, the end at the second; access on ${access} days of 730`;
});
await check("two years of a thief in step with the client, whom nobody can notice", 60, async () => {
  const { connection, access } = await twoYears(-60);
  equal(connection.notices, 0, "he can be noticed after all: say so here and in SECURITY.md");
  return `access on ${access} days of 730`;
});
console.log(`The history that a server cannot tell from a client on two machines:${IN_STEP}`);
const { refreshes, calls, stolen, late, ended } = figures;
console.log(
  `${refreshes} refreshes, ${late} of them late repeats, ${calls} calls, ${stolen} copies stolen, ` +
    `${ended} connections ended`,
);
await finish();
