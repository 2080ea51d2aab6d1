/**
 * A copied mod.ts in the projects that people start with: `bun init`, `npm init` with both TypeScript generations, and
 * `deno init`, each as a newcomer types it, with hono beside it and nothing else. The file and a program that uses it
 * must type-check under the settings that these commands write; `deno doc` must read it and find nothing undocumented.
 *
 *     npx -y deno run -A .ci/consumers.ts
 *
 * @module
 */

import { check, demand, finish, temporaryFolder } from "./lib/checks.ts";
import { NotRun, oneLine } from "./lib/limits.ts";
import { ENVIRONMENT, ROOT } from "./lib/runtimes.ts";

const SECONDS = 240;

/** The example of the module doc. `c.var.auth` must be there without a type argument for Hono. */
const program = (file: string) => `
import { Hono } from "hono";
import { type AuthInfo, memoryStore, personalAuth } from "${file}";

const auth = personalAuth({ baseUrl: "https://mcp.example.com", store: memoryStore() });
const app = new Hono();
app.route("/", auth);
app.all("/mcp", auth.guard, (c) => {
  const info: AuthInfo = c.var.auth;
  return c.json({ hello: info.clientId });
});
export default app;
`;

interface Output {
  success: boolean;
  text: string;
}

async function execute(cwd: string, line: string): Promise<Output> {
  const [command = "", ...args] = line.split(" ");
  const options = { cwd, args, env: ENVIRONMENT, stdin: "null", stdout: "piped", stderr: "piped" } as const;
  const { success, stdout, stderr } = await new Deno.Command(command, options).output();
  const text = new TextDecoder();
  return { success, text: `${text.decode(stdout)}\n${text.decode(stderr)}` };
}

/** A project made by these commands, with mod.ts and a program in it. Without a registry there is none. */
async function project(commands: string[], importedAs: string): Promise<string> {
  const dir = temporaryFolder();
  for (const command of commands) {
    const { success, text } = await execute(dir, command);
    if (!success) throw new NotRun(`${command}: ${oneLine(text)}`);
  }
  Deno.copyFileSync(`${ROOT}mod.ts`, `${dir}/mod.ts`);
  Deno.writeTextFileSync(`${dir}/server.ts`, program(importedAs));
  return dir;
}

async function typeChecks(name: string, commands: string[], importedAs: string, ...verdicts: string[]): Promise<void> {
  await check(`mod.ts type-checks in the default project of ${name}`, SECONDS, async () => {
    const dir = await project(commands, importedAs);
    for (const verdict of verdicts) {
      const { success, text } = await execute(dir, verdict);
      demand(success, `${verdict}: ${text}`);
    }
  });
}

const BUN = "npx -y bun@1";
await typeChecks("bun init", [`${BUN} init -y`, `${BUN} add hono`], "./mod.ts", `${BUN} x tsc --noEmit`);

for (const version of ["5.9", "7"]) {
  // npm's own default is CommonJS, where TypeScript refuses every import and export under its default settings.
  const commands = ["npm init -y", "npm pkg set type=module", `npm i hono typescript@${version} @types/node`];
  await typeChecks(
    `npm init and tsc --init ${version}`,
    [...commands, "npx tsc --init"],
    "./mod.js", // the name that TypeScript asks for unless it is told otherwise
    "npx tsc --noEmit",
  );
}

const DENO = "npx -y deno";
const DENO_PROJECT = [`${DENO} init`, `${DENO} add npm:hono`];
await typeChecks("deno init", DENO_PROJECT, "./mod.ts", `${DENO} check mod.ts server.ts`);

await check("deno doc mod.ts shows the exports, and deno doc --lint finds nothing", SECONDS, async () => {
  const dir = await project(DENO_PROJECT, "./mod.ts");
  const shown = await execute(dir, `${DENO} doc mod.ts`);
  demand(shown.success && shown.text.includes("function personalAuth("), shown.text);
  const { text } = await execute(dir, `${DENO} doc --lint mod.ts`);
  const errors = text.split(/^(?=error)/m).filter((part) => part.startsWith("error["));
  // Deno takes the types of npm packages for private ones of this file: https://github.com/denoland/deno/issues/27364
  const ofHono = /^error\[private-type-ref\].*references private type '(Context|Hono|MiddlewareHandler)'/;
  const ours = errors.filter((error) => !ofHono.test(error));
  demand(ours.length === 0 && /Checked|Found \d+ documentation lint error/.test(text), ours.join("") || text);
});

await finish();
