/**
 * The load generator, a process of its own on Node: it does nothing but write one fixed request over and over on a few
 * connections, so that it is never the slower one. A line of JSON on its standard input is a round to drive; the
 * answer is a line as well.
 *
 * @module
 */

import { connect, type Socket } from "node:net";
import process from "node:process";
import { createInterface } from "node:readline";

/**
 * One round, by so many `connections` at once: `request` is sent over and over for so many `seconds`, or each of
 * `requests` once.
 */
export interface Round {
  port: number;
  connections: number;
  request?: string;
  seconds?: number;
  requests?: string[];
}

/** Times are in milliseconds. */
export interface Driven {
  requests: number;
  seconds: number;
  p50: number;
  p99: number;
  /** What was answered to each of `requests`. */
  bodies: string[];
  /** The load generator's own processor time over the duration: near 1, it was the bottleneck. */
  busy: number;
}

function drive({ port, connections, request = "", seconds = 0, requests }: Round): Promise<Driven> {
  const all = (requests ?? [request]).map((text) => Buffer.from(text, "latin1"));
  const times: number[] = [];
  const bodies: string[] = [];
  const sockets: Socket[] = [];
  const started = performance.now();
  const until = started + seconds * 1000;
  const cpu = process.cpuUsage();
  let taken = 0;
  /** The number of the next request to send, if there is one. */
  const next = () => {
    if (requests) return taken < all.length ? taken++ : undefined;
    return performance.now() < until ? 0 : undefined;
  };
  return new Promise((resolve, reject) => {
    let open = connections;
    const fail = (error: Error) => {
      for (const socket of sockets) socket.destroy();
      reject(error);
    };
    const finish = () => {
      const elapsed = performance.now() - started;
      const { user, system } = process.cpuUsage(cpu);
      times.sort((a, b) => a - b);
      const quantile = (share: number) => times[Math.min(times.length - 1, Math.floor(times.length * share))] ?? NaN;
      resolve({
        requests: times.length,
        seconds: elapsed / 1000,
        p50: quantile(0.5),
        p99: quantile(0.99),
        bodies,
        busy: (user + system) / 1000 / elapsed,
      });
    };
    for (let i = 0; i < connections; i++) {
      const socket = connect({ port, host: "127.0.0.1", noDelay: true });
      sockets.push(socket);
      let current: number | undefined;
      let sent = 0;
      let received = "";
      const send = () => {
        current = next();
        if (current === undefined) {
          socket.destroy();
          if (--open === 0) finish();
          return;
        }
        sent = performance.now();
        socket.write(all[current]!);
      };
      socket.on("connect", send);
      socket.on("error", fail);
      socket.on("data", (chunk) => {
        received += chunk.toString("latin1");
        if (!isComplete(received)) return;
        times.push(performance.now() - sent);
        if (!/^HTTP\/1\.1 20/.test(received)) return fail(new Error(summary(received)));
        // The one JSON object in an answer stays whole in whatever framing it came.
        if (requests) bodies[current!] = received.slice(received.indexOf("{"), received.lastIndexOf("}") + 1);
        received = "";
        send();
      });
      socket.on("end", () => fail(new Error("the server closed a connection")));
    }
  });
}

function summary(answer: string): string {
  const [head = "", body = ""] = answer.split("\r\n\r\n");
  return `${head.split("\r\n")[0]}: ${body.slice(0, 200)}`;
}

/** Whether a whole answer has come: all of Content-Length, or the last chunk. */
function isComplete(answer: string): boolean {
  const head = answer.indexOf("\r\n\r\n");
  if (head < 0) return false;
  const length = /\r\ncontent-length: *(\d+)/i.exec(answer);
  return length && length.index < head ? answer.length >= head + 4 + Number(length[1]) : answer.endsWith("0\r\n\r\n");
}

const lines = createInterface({ input: process.stdin });
lines.on("line", async (line) => {
  try {
    console.log(JSON.stringify(await drive(JSON.parse(line))));
  } catch (error) {
    console.log(JSON.stringify({ error: error instanceof Error ? error.message : String(error) }));
  }
});
lines.on("close", () => process.exit(0));
