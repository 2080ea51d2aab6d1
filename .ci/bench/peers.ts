/** Other authorization servers in the same harness: the check of a token, code exchange and refresh, over HTTP. */

import { execFile } from "node:child_process";
import { copyFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { REDIRECT, VERIFIER } from "../lib/client.ts";
import { request } from "./guard.ts";
import {
  type Child,
  discard,
  figure,
  firstLine,
  median,
  ratio,
  shown,
  start,
  startCommand,
  type Table,
  temporary,
} from "./kit.ts";
import type { Runtime } from "../lib/runtimes.ts";
import type { Driven } from "./load.ts";

const PACKAGES = [
  "@cloudflare/workers-oauth-provider@1",
  "@hono/mcp@0.3",
  "@hono/node-server@2",
  "@modelcontextprotocol/sdk@1",
  "express@5",
  "hono@4",
  "hono-rate-limiter@0.5",
  "mcp-oauth-server@1",
  "miniflare@4",
  "oidc-provider@9",
  "zod@4",
];

/** What each does for an answer: whether it is durable, whether tokens are stored as hashes, what a theft leads to. */
const PEERS: Record<string, [name: string, durable: string, hashed: string, theft: string]> = {
  "ours-durable": ["mod.ts, fileStore", "yes", "yes", "yes"],
  "ours-memory": ["mod.ts, memoryStore", "no", "yes", "yes"],
  sdk: ["@modelcontextprotocol/sdk on Express", "no", "no", "no"],
  "hono-mcp": ["@hono/mcp", "no", "no", "no"],
  "mcp-oauth-server": ["mcp-oauth-server on Express", "no", "no", "no"],
  "oidc-provider": ["oidc-provider", "no", "no", "yes"],
  "workers-oauth-provider": ["@cloudflare/workers-oauth-provider on workerd", "no", "yes", "no"],
  fastmcp: ["fastmcp InMemoryOAuthProvider on Python", "no", "no", "no"],
};

interface Peer {
  kind: string;
  server: Child;
  port: number;
  /** Requests per second in each round. */
  rates: Record<"check" | "exchange" | "refresh", number[]>;
}

export interface PeerOptions {
  rounds: number;
  seconds: number;
  /** Connections in each round. */
  count: number;
}

export async function peers(node: Runtime, options: PeerOptions): Promise<Table> {
  const dir = temporary();
  const state = temporary();
  const absent: string[][] = [];
  const running: Peer[] = [];
  const load = start(node, "load.ts");
  try {
    const run = promisify(execFile);
    writeFileSync(join(dir, "package.json"), JSON.stringify({ type: "module", private: true }));
    await run("npm", ["install", "--no-audit", "--no-fund", "--silent", ...PACKAGES], { cwd: dir });
    copyFileSync(fileURLToPath(new URL("peer_server.ts", import.meta.url)), join(dir, "peer_server.ts"));
    const python = await fastmcp(dir).catch((error) => error);

    for (const [kind, [name]] of Object.entries(PEERS)) {
      try {
        running.push(await ready(kind, node, { dir, state, python }, load));
      } catch (error) {
        absent.push([name, `not run: ${firstLine(error)}`]);
      }
    }
    for (let round = 0; round <= options.rounds; round++) {
      for (const peer of round % 2 ? [...running] : running.toReversed()) {
        try {
          await measure(peer, load, options, round > 0);
        } catch (error) {
          absent.push([PEERS[peer.kind]![0], `not run: ${firstLine(error)}`]);
          running.splice(running.indexOf(peer), 1);
          await peer.server.stop();
        }
      }
    }
  } finally {
    await load.stop();
    for (const { server } of running) await server.stop();
    discard(dir);
    discard(state);
  }
  const ours = running.find(({ kind }) => kind === "ours-durable");
  if (!ours) throw new Error(`our own server does not run: ${absent.map((row) => row.join(" ")).join("; ")}`);
  const cell = (peer: Peer, what: keyof Peer["rates"]) =>
    figure(median(peer.rates[what])) +
    (peer === ours ? "" : ` · ${shown(ratio(ours.rates[what], peer.rates[what]))}`);
  return {
    title: "Peers",
    note:
      "Requests per second over HTTP on Node, ten connections at a time · how many times as many mod.ts on fileStore " +
      "does. *Durable*: an answer is on the disk before it is sent; the others lose their tokens at a restart. *Hashed*: " +
      "the store holds no token that works. *Theft ends*: a refresh token that was replaced and comes back ends the " +
      "connection, instead of being refused or taken.",
    limit: "mod.ts on memoryStore for what the disk costs, and the router of the MCP SDK with maps of tokens in memory",
    head: ["", "check of a token", "code exchange", "refresh", "durable", "hashed", "theft ends"],
    rows: [
      ...running.map((peer) => {
        const [name, ...traits] = PEERS[peer.kind]!;
        return [name, cell(peer, "check"), cell(peer, "exchange"), cell(peer, "refresh"), ...traits];
      }),
      ...absent,
    ],
  };
}

interface Places {
  dir: string;
  state: string;
  python: string | Error;
}

/** Started, and known to answer all that will be asked. */
async function ready(kind: string, node: Runtime, places: Places, load: Child): Promise<Peer> {
  const server = begun(kind, node, places);
  try {
    const { port } = await server.next();
    const peer: Peer = { kind, server, port, rates: { check: [], exchange: [], refresh: [] } };
    await measure(peer, load, { rounds: 0, seconds: 0.1, count: 2 }, false);
    return peer;
  } catch (error) {
    await server.stop();
    throw error;
  }
}

function begun(kind: string, node: Runtime, { dir, state, python }: Places): Child {
  if (kind === "fastmcp") {
    if (python instanceof Error) throw python;
    return startCommand([python, fileURLToPath(new URL("peer_fastmcp.py", import.meta.url))]);
  }
  const script = join(dir, "peer_server.ts");
  if (!kind.startsWith("ours")) return startCommand([...node.command, script, kind], { cwd: dir });
  const world = fileURLToPath(new URL("world.ts", import.meta.url));
  const args = kind === "ours-durable" ? [world, state] : [world];
  return startCommand([...node.command, script, "ours", ...args], { cwd: dir });
}

/** A virtual environment with the package; its interpreter. */
async function fastmcp(dir: string): Promise<string> {
  const run = promisify(execFile);
  const venv = join(dir, "venv");
  await run("python3", ["-m", "venv", venv]);
  const python = join(venv, "bin", "python");
  await run(python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "fastmcp>=2,<4"]);
  return python;
}

function form(path: string, fields: Record<string, string>): string {
  const body = new URLSearchParams(fields).toString();
  return [
    `POST ${path} HTTP/1.1`,
    "Host: localhost:8050",
    "Content-Type: application/x-www-form-urlencoded",
    `Content-Length: ${body.length}`,
    "",
    body,
  ].join("\r\n");
}

async function measure(peer: Peer, load: Child, options: PeerOptions, counted: boolean): Promise<void> {
  const { port } = peer;
  const { codes } = await peer.server.ask(options.count);
  const once = async (requests: string[]): Promise<Driven> => await load.ask({ port, requests, connections: 10 });
  const rate = ({ requests, seconds }: Driven) => requests / seconds;

  const exchange = await once(
    codes.map((code: Record<string, string>) =>
      form("/token", {
        grant_type: "authorization_code",
        ...code,
        redirect_uri: REDIRECT,
        code_verifier: VERIFIER,
      })
    ),
  );
  const tokens = exchange.bodies.map((body) => JSON.parse(body));
  const refresh = await once(
    tokens.map(({ refresh_token }, i) => {
      const { code: _code, ...client } = codes[i];
      return form("/token", { grant_type: "refresh_token", ...client, refresh_token });
    }),
  );
  const { access_token } = JSON.parse(refresh.bodies[0]!);
  const check: Driven = await load.ask({
    port,
    request: request("GET", access_token),
    connections: 10,
    seconds: options.seconds,
  });
  if (!counted) return;
  peer.rates.exchange.push(rate(exchange));
  peer.rates.refresh.push(rate(refresh));
  peer.rates.check.push(rate(check));
}
