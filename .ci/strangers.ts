/**
 * What strangers can do to a server by the documents they make it fetch, on each runtime, in a network namespace of its
 * own (Linux, `unshare`): a name server and hosts that stay silent, and responses that never end. Nothing of it leaves
 * the machine.
 *
 *     deno run -A .ci/strangers.ts [--seconds N] [--mod FILE]
 *
 * @module
 */
import { pathToFileURL } from "node:url";
import { check, demand, finish, numberArgument, temporaryFolder, textArgument } from "./lib/checks.ts";
import { NotRun, oneLine } from "./lib/limits.ts";
import { ENVIRONMENT, ROOT, runtimes } from "./lib/runtimes.ts";

const SECONDS = numberArgument("seconds", 12);
const file = textArgument("mod");
const MOD: Record<string, string> = file ? { MOD: pathToFileURL(file).href } : {};
const SETUP = `set -e
ip link set lo up
ip address add 93.184.216.34/32 dev lo
ip address add 93.184.216.35/32 dev lo
mount --bind "$FOLDER/resolv.conf" "$(realpath /etc/resolv.conf)"
exec "$@"`;

async function run(command: string, args: string[], env: Record<string, string> = {}): Promise<string> {
  const child = new Deno.Command(command, { args, env: { ...ENVIRONMENT, ...env }, cwd: ROOT, stdin: "null" });
  const { success, stdout, stderr } = await child.output();
  demand(success, oneLine(new TextDecoder().decode(stderr), 500));
  return new TextDecoder().decode(stdout);
}

interface Report {
  figures: Record<string, Record<string, { asked: number; good: number; slowest: number }>>;
  mostOpen: number;
  openAfterwards: number;
}

const { found, missing } = await runtimes();
for (const { name, command } of found) {
  await check(`strangers use up nothing on ${name}`, 60 + 8 * SECONDS, async () => {
    const folder = temporaryFolder();
    Deno.writeTextFileSync(`${folder}/resolv.conf`, "nameserver 127.0.0.1\n");
    const inside = ["--net", "--mount", "--map-root-user", "--kill-child", "--fork"];
    await run("unshare", [...inside, "true"]).catch((error) => {
      throw new NotRun(`no namespaces here: ${error.message}`);
    });
    const request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    const names = ["-subj", "/CN=public.example", "-addext", "subjectAltName=DNS:*.public.example,DNS:public.example"];
    await run("openssl", [...request, ...names, "-keyout", `${folder}/key.pem`, "-out", `${folder}/cert.pem`]);
    const world = [Deno.execPath(), "run", "-A", "--quiet", "--cached-only", `${ROOT}.ci/strangers/world.ts`];
    const server = [...command, `${ROOT}.ci/strangers/server.ts`];
    const all = ["sh", "-c", SETUP, "sh", ...world, String(SECONDS), folder, ...server];
    const output = await run("unshare", [...inside, ...all], { FOLDER: folder, ...MOD });
    const { figures, mostOpen, openAfterwards }: Report = JSON.parse(output.trim().split("\n").at(-1)!);
    const lines = [`at most ${mostOpen} connections open for 400 answers 404, ${openAfterwards} afterwards`];
    let isGood = mostOpen <= 8 && openAfterwards === 0;
    for (const [flood, kinds] of Object.entries(figures)) {
      const each = Object.entries(kinds).map(([what, { asked, good, slowest }]) => {
        isGood &&= good === asked;
        return `${good} of ${asked} ${what}, slowest ${slowest} ms`;
      });
      lines.push(`${flood}: ${each.join("; ")}`);
    }
    demand(isGood, lines.join(" | "));
    return lines.join(" | ");
  });
}
for (const what of missing) await check(what, 1, () => Promise.reject(new NotRun(what)));
await finish();
