/** A server with a tool of its own that fetches by name. Environment: `MOD`, another mod.ts. Prints "listening on PORT". */
import process from "node:process";
import { serve } from "@hono/node-server";
import { Hono } from "hono";
import type * as Mod from "../../mod.ts";

const url = process.env.MOD ?? new URL("../../mod.ts", import.meta.url).href;
const { memoryStore, personalAuth }: typeof Mod = await import(url);

process.stdin.on("end", () => process.exit(0)).resume();
const app = new Hono();
const store = memoryStore();
const baseUrl = "https://mcp.example.com";
const password = "correct horse battery staple";
app.route("/", personalAuth({ baseUrl, store, password, allowedRedirectDomains: null, onEvent: () => {} }));
app.get("/tool/:name", async (c) => c.text(await (await fetch(`http://${c.req.param("name")}:8080/`)).text()));
serve({ fetch: app.fetch, port: 0, hostname: "127.0.0.1" }, ({ port }) => console.log(`listening on ${port}`));
