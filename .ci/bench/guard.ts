/** What the guard costs: the same app on the same server, with and without it, in alternating rounds. */

import {
  type Child,
  discard,
  figure,
  type Json,
  median,
  ratio,
  type Runtime,
  shown,
  start,
  type Table,
  temporary,
} from "./kit.ts";
import type { Driven } from "./load.ts";

const LIST = JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list", params: {} });

/** Every server gets the token: reading a header off the wire is not the guard's work. */
export function request(method: "GET" | "POST", token: string | undefined): string {
  const body = method === "POST" ? LIST : "";
  return [
    `${method} /mcp HTTP/1.1`,
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
  /** How often the servers are started anew: two processes of the same program differ by more than the guard costs. */
  launches: number;
  /** In each launch, after one that warms up. */
  rounds: number;
  seconds: number;
}

export async function guard(runtimes: Runtime[], node: Runtime, options: GuardOptions): Promise<Table> {
  const rows: string[][] = [];
  const load = start(node, "load.ts");
  try {
    for (const runtime of runtimes) {
      for (const kind of ["hono", "mcp"]) rows.push(...await compare(runtime, kind, load, options));
    }
  } finally {
    await load.stop();
  }
  return {
    title: "The guard",
    note:
      "Requests through the guard against the same Hono app without it, ten connections at a time. *Middleware* is " +
      "any Hono middleware that reads the Authorization header and does nothing else: the least that a guard can cost.",
    essential: /, (guarded|middleware)$/,
    head: ["", "requests/s", "of unguarded", "by processor time", "µs of processor", "p50 ms", "p99 ms"],
    rows,
  };
}

interface Side {
  name: string;
  rates: number[];
  /** Microseconds of the server's processor time for each request. */
  cost: number[];
  p50: number[];
  p99: number[];
}

interface Running {
  side: Side;
  server: Child;
  port: number;
}

async function compare(runtime: Runtime, kind: string, load: Child, options: GuardOptions): Promise<string[][]> {
  const sides = ["-guarded", "-middleware", ""].map((name): Side => ({ name, rates: [], cost: [], p50: [], p99: [] }));
  const dir = temporary();
  try {
    for (let launch = 0; launch < options.launches; launch++) {
      const running: Running[] = [];
      try {
        for (const side of sides) {
          const server = start(runtime, "server.ts", kind + side.name, dir);
          running.push({ side, server, port: 0 });
          running.at(-1)!.port = (await server.next()).port;
        }
        await alternate(running, kind, load, options);
      } finally {
        for (const { server } of running) await server.stop();
      }
    }
  } finally {
    discard(dir);
  }
  const bare = sides.at(-1)!;
  const names: Record<string, string> = { "-guarded": "guarded", "-middleware": "middleware", "": "unguarded" };
  return sides.map((side) => [
    `${runtime.name}, ${kind === "mcp" ? "tools/list" : "trivial"}, ${names[side.name]}`,
    figure(median(side.rates)),
    side === bare ? "1" : shown(ratio(side.rates, bare.rates)),
    side === bare ? "1" : shown(ratio(bare.cost, side.cost)),
    figure(median(side.cost)),
    median(side.p50).toFixed(2),
    median(side.p99).toFixed(2),
  ]);
}

/** Rounds that alternate between the servers; the first warms up and is not counted. */
async function alternate(running: Running[], kind: string, load: Child, { rounds, seconds }: GuardOptions) {
  const { token } = await running[0]!.server.ask("token");
  const sent = request(kind === "mcp" ? "POST" : "GET", token);
  for (let round = 0; round <= rounds; round++) {
    for (const { side, server, port } of round % 2 ? running : running.toReversed()) {
      const before: Json = await server.ask("usage");
      const driven: Driven = await load.ask({ port, request: sent, connections: 10, seconds });
      const after: Json = await server.ask("usage");
      if (round === 0) continue;
      side.rates.push(driven.requests / driven.seconds);
      side.cost.push((after.cpu - before.cpu) / driven.requests * 1e6);
      side.p50.push(driven.p50);
      side.p99.push(driven.p99);
    }
  }
}
