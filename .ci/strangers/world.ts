/**
 * The world around one server, in a network namespace of its own: a name server that stays silent about some names, hosts
 * that accept a connection and say nothing, and one that answers 404 without ever ending. Prints its figures as JSON.
 *
 *     world.ts SECONDS FOLDER COMMAND…     the command runs `server.ts`
 */
import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import { createSocket } from "node:dgram";
import { readFileSync } from "node:fs";
import http from "node:http";
import https from "node:https";
import net from "node:net";
import process from "node:process";

const [seconds, folder = "", command = "", ...args] = process.argv.slice(2);
const HEALTHY = "93.184.216.34";
const SILENT = "93.184.216.35";
const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function address(name: string): string | undefined {
  if (name.endsWith("tool.example")) return "127.0.0.1";
  if (name.endsWith("public.example")) return HEALTHY;
  if (name.endsWith("hanging.example")) return SILENT;
  return undefined; // and no answer at all
}

/** RFC 1035: one question, and an answer if it is about an IPv4 address. */
const names = createSocket("udp4");
names.on("message", (query, { port, address: from }) => {
  const labels = [];
  let at = 12;
  for (; query[at]; at += query[at]! + 1) labels.push(query.toString("latin1", at + 1, at + 1 + query[at]!));
  const found = address(labels.join(".").toLowerCase());
  if (!found) return;
  const isIpv4 = query.readUInt16BE(at + 1) === 1;
  const header = Buffer.from([query[0]!, query[1]!, 0x81, 0x80, 0, 1, 0, isIpv4 ? 1 : 0, 0, 0, 0, 0]);
  const answer = Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, ...found.split(".").map(Number)]);
  names.send(Buffer.concat([header, query.subarray(12, at + 5), isIpv4 ? answer : Buffer.alloc(0)]), port, from);
});
await new Promise<void>((resolve) => names.bind(53, "127.0.0.1", resolve));

const tls = { key: readFileSync(`${folder}/key.pem`), cert: readFileSync(`${folder}/cert.pem`) };
const open = new Set<unknown>();
let mostOpen = 0;
const site = https.createServer(tls, (request, response) => {
  const client_id = `https://${request.headers.host}${request.url}`;
  if (request.url!.startsWith("/gone")) {
    response.writeHead(404, { "Content-Type": "text/html" }).write("gone"); // and never ends
  } else {response.end(
      JSON.stringify({ client_id, client_name: "App", redirect_uris: ["https://app.example/callback"] }),
    );}
});
site.on("connection", (socket) => {
  open.add(socket);
  mostOpen = Math.max(mostOpen, open.size);
  socket.on("close", () => open.delete(socket)).on("error", () => {});
});
site.listen(443, HEALTHY);
net.createServer((socket) => socket.on("error", () => {})).listen(443, SILENT);
http.createServer((_, response) => response.end("the tool's own")).listen(8080, "127.0.0.1");

const server = spawn(command, args, {
  stdio: ["pipe", "pipe", "inherit"],
  env: { ...process.env, NODE_EXTRA_CA_CERTS: `${folder}/cert.pem`, DENO_CERT: `${folder}/cert.pem` },
});
const base = await new Promise<string>((resolve) => {
  let text = "";
  server.stdout.on("data", (data) => {
    const [, port] = (text += data).match(/listening on (\d+)/) ?? [];
    if (port) resolve(`http://127.0.0.1:${port}`);
  });
});

const query = (client_id: string) =>
  "response_type=code&code_challenge_method=S256&code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM&redirect_uri=" +
  `https%3A%2F%2Fapp.example%2Fcallback&client_id=${encodeURIComponent(client_id)}`;
const visit = async (client_id: string) => (await fetch(`${base}/authorize?${query(client_id)}`)).status;

async function signIn(client_id: string): Promise<number> {
  const page = await fetch(`${base}/authorize?${query(client_id)}`);
  const fields = [...(await page.text()).matchAll(/<input type="hidden" name="([^"]*)" value="([^"]*)"/g)];
  const body = new URLSearchParams(fields.map(([, name, value]) => [name!, value!.replaceAll("&amp;", "&")]));
  body.set("password", "correct horse battery staple");
  body.set("decision", "approve");
  const cookie = page.headers.getSetCookie()[0]!.split(";")[0]!;
  const init: RequestInit = { method: "POST", body, headers: { Cookie: cookie }, redirect: "manual" };
  return (await fetch(`${base}/authorize`, init)).status;
}

interface Figure {
  asked: number;
  good: number;
  slowest: number;
}

/** Asks once a second while strangers ask, and counts what was answered as it must be, within ten seconds. */
async function under(flood: (i: number) => string, rate: number): Promise<Record<string, Figure>> {
  let going = true;
  const strangers = (async () => {
    for (let i = 0; going; i++) {
      visit(flood(i)).catch(() => {});
      await pause(1000 / rate);
    }
  })();
  await pause(6000); // what is to be used up is used up by then
  const figures: Record<string, Figure> = {};
  const ask = async (what: string, call: () => Promise<unknown>, expected: unknown) => {
    const figure = figures[what] ??= { asked: 0, good: 0, slowest: 0 };
    const start = performance.now();
    const answer = await Promise.race([call().catch(String), pause(10_000)]);
    figure.asked++;
    if (answer === expected) figure.good++;
    figure.slowest = Math.max(figure.slowest, Math.round(performance.now() - start));
  };
  const asked: Promise<void>[] = [];
  for (let i = 0; i < Number(seconds); i++) {
    const unique = `${i}-${Math.round(performance.now())}`;
    asked.push(ask("first visits", () => visit(`https://a${unique}.public.example/client.json`), 200));
    const tool = async () => (await fetch(`${base}/tool/t${unique}.tool.example`)).text();
    asked.push(ask("a tool's fetch", tool, "the tool's own"));
    if (i % 3 === 0) asked.push(ask("sign-ins", () => signIn(registered), 302));
    await pause(1000);
  }
  await Promise.all(asked);
  going = false;
  await strangers;
  return figures;
}

const { client_id: registered } = await (await fetch(`${base}/register`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ redirect_uris: ["https://app.example/callback"] }),
})).json();

const figures = {
  "silent name server, 2 a second": await under((i) => `https://n${i}.silent.example/client.json`, 2),
  "one silent host, 2 a second": await under((i) => `https://one.hanging.example/${i}.json`, 2),
  "many silent hosts, 4 a second": await under((i) => `https://n${i}.hanging.example/client.json`, 4),
};
await pause(6000);
mostOpen = open.size;
for (let i = 0; i < 400; i++) await visit(`https://n${i}.public.example/gone/${i}.json`);
await pause(1000);
console.log(JSON.stringify({ figures, mostOpen, openAfterwards: open.size }));
server.kill("SIGKILL");
process.exit(0);
