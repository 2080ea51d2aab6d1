/** What the guard costs: the same handler on the same server, with and without it, in alternating rounds, on fileStore. */

import { type Child, discard, figure, type Json, median, ratio, shown, start, type Table, temporary } from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";
import type { Driven } from "./load.ts";

const LIST = JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list", params: {} });

/** Every server gets the token: reading a header off the wire is not the guard's work. */
export function request(method: "GET" | "POST", token: string | undefined, path = "/mcp"): string {
  const body = method === "POST" ? LIST : "";
  return [
    `${method} ${path} HTTP/1.1`,
    "Host: localhost:8050",
    "User-Agent: bench",
    "Accept: application/json, text/event-stream",
    `Authorization: Bearer ${token}`,
    ...(body ? ["Content-Type: application/json", `Content-Length: ${body.length}`] : []),
    "",
    body,
  ].join("\r\n");
}

export interface GuardOptions {
  launches: number;
  /** In each launch. Short ones: the machine must not become another one between two sides. */
  rounds: number;
  seconds: number;
}

const WARM_UP_SECONDS = 0.7;

const PATHS = { guarded: "/mcp", middleware: "/middleware", unguarded: "/unguarded" };

export async function guard(runtimes: Runtime[], node: Runtime, options: GuardOptions): Promise<Table> {
  const rows: string[][] = [];
  const load = start(node, "load.ts");
  try {
    for (const runtime of runtimes) {
      for (const kind of ["hono", "mcp"]) {
        rows.push(...await compare(runtime, kind, load, options));
      }
    }
  } finally {
    await load.stop();
  }
  return {
    title: "The guard over HTTP",
    note:
      "Requests through the guard against those to the same handler in the same server without it, ten connections at " +
      "a time. *Middleware* is any Hono middleware that reads the Authorization header and does nothing else: the least " +
      "that a guard can cost. The last row of each four compares the two of them.",
    limit: "the same handler without any middleware, and with the least middleware",
    essential: /(guarded|middleware|guarded ÷ middleware)$/,
    head: ["", "requests/s", "ratio", "ratio by processor time", "µs of processor", "p50 ms", "p99 ms"],
    rows,
  };
}

interface Side {
  name: string;
  path: string;
  rates: number[];
  /** Microseconds of the server's processor time for each request. */
  cost: number[];
  p50: number[];
  p99: number[];
}

async function compare(
  runtime: Runtime,
  kind: string,
  load: Child,
  options: GuardOptions,
): Promise<string[][]> {
  const sides = Object.entries(PATHS).map(([name, path]): Side => {
    return { name, path, rates: [], cost: [], p50: [], p99: [] };
  });
  const dir = temporary();
  try {
    for (let launch = 0; launch < options.launches; launch++) {
      const server = start(runtime, "server.ts", kind, dir);
      try {
        await alternate(sides, server, kind, load, options);
      } finally {
        await server.stop();
      }
    }
  } finally {
    discard(dir);
  }
  const [guarded, middleware, bare] = sides as [Side, Side, Side];
  const name = `${runtime.name}, ${kind === "mcp" ? "tools/list" : "trivial"}`;
  const rows = sides.map((side) => [
    `${name}, ${side.name}`,
    figure(median(side.rates)),
    side === bare ? "1" : shown(ratio(side.rates, bare.rates)),
    side === bare ? "1" : shown(ratio(bare.cost, side.cost)),
    figure(median(side.cost)),
    median(side.p50).toFixed(2),
    median(side.p99).toFixed(2),
  ]);
  return [...rows, [
    `${name}, guarded ÷ middleware`,
    "",
    shown(ratio(guarded.rates, middleware.rates), 3),
    shown(ratio(middleware.cost, guarded.cost), 3),
  ]];
}

/** Rounds that alternate between the sides, which share a process: two of them would differ by more than a guard costs. */
async function alternate(
  sides: Side[],
  server: Child,
  kind: string,
  load: Child,
  { rounds, seconds }: GuardOptions,
): Promise<void> {
  const { port } = await server.next();
  const { token } = await server.ask("token");
  const drive = (path: string, seconds: number): Promise<Driven> => {
    const sent = request(kind === "mcp" ? "POST" : "GET", token, path);
    return load.ask({ port, request: sent, connections: 10, seconds });
  };
  for (const { path } of sides) await drive(path, WARM_UP_SECONDS);
  for (let round = 0; round < rounds; round++) {
    for (const side of round % 2 ? sides : sides.toReversed()) {
      const before: Json = await server.ask("usage");
      const driven = await drive(side.path, seconds);
      const after: Json = await server.ask("usage");
      side.rates.push(driven.requests / driven.seconds);
      side.cost.push((after.cpu - before.cpu) / driven.requests * 1e6);
      side.p50.push(driven.p50);
      side.p99.push(driven.p99);
    }
  }
}
