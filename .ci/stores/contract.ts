/**
 * What every store owes to personal-auth. Whoever writes one runs this on an empty one:
 *
 *     import { storeContract } from "./contract.ts";
 *     await storeContract(() => myStore("redis://127.0.0.1"));
 *
 * `open` is called twice, for two holders of one state, as two servers are; both are closed in the end. All promises are
 * tried, each with keys of its own, and one error names those that are broken.
 *
 * @module
 */

import { deepStrictEqual as equal, notDeepStrictEqual as notEqual } from "node:assert/strict";
import type { Store } from "../../mod.ts";

type Promised = (store: Store, other: Store, key: (name: string) => string) => Promise<void>;

const TEXT = { list: [1, { deep: "ü\u0000\u{1f510}" }], none: null, empty: {} };

const increment = (current: unknown) => (current as number | undefined ?? 0) + 1;
const seconds = () => Date.now() / 1000;
const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const times = <T>(count: number, call: (i: number) => T): T[] => Array.from({ length: count }, (_, i) => call(i));

async function entries(store: Store, prefix: string): Promise<[string, unknown][]> {
  const list: [string, unknown][] = [];
  for await (const entry of store.list(prefix)) list.push(entry);
  return list;
}

const PROMISES: Record<string, Promised> = {
  "a key that was never written is undefined, and an update that leaves it so writes nothing": async (
    store,
    _,
    key,
  ) => {
    equal(await store.get(key("a")), undefined);
    equal(await store.update(key("a"), (current) => current), undefined);
    equal(await entries(store, key("")), []);
  },
  "update() passes the current value, writes what is returned, and answers it": async (store, _, key) => {
    const answer = await store.update(key("a"), (current) => ({ was: current === undefined }));
    equal([answer, await store.get(key("a"))], [{ was: true }, { was: true }]);
    await store.update(key("a"), (current) => [current, 2]);
    equal(await store.get(key("a")), [{ was: true }, 2]);
  },
  "an update that returns undefined deletes": async (store, _, key) => {
    await store.update(key("a"), () => 1);
    equal(await store.update(key("a"), () => undefined), undefined);
    equal([await store.get(key("a")), await entries(store, key(""))], [undefined, []]);
    equal(await store.update(key("a"), (current) => current === undefined), true);
  },
  "a value comes back as it was, whatever is in it": async (store, other, key) => {
    await store.update(key("a"), () => TEXT);
    equal(await store.get(key("a")), TEXT);
    equal(await other.get(key("a")), TEXT);
    equal(await entries(store, key("")), [[key("a"), TEXT]]);
    for (const value of [0, "", false, [], "text"]) equal(await store.update(key("b"), () => value), value);
    equal(await store.get(key("b")), "text");
  },
  "nobody changes what is stored by holding on to an object": async (store, _, key) => {
    const value = { list: [1] };
    await store.update(key("a"), () => value);
    value.list.push(2);
    const read = await store.get(key("a")) as typeof value;
    equal(read, { list: [1] });
    read.list.pop();
    equal(await store.get(key("a")), { list: [1] });
  },
  "a change that throws changes nothing, its error arrives, and the next change works": async (store, _, key) => {
    await store.update(key("a"), () => 1);
    const boom = new Error("boom");
    const thrown = await store.update(key("a"), () => {
      throw boom;
    }).catch((error) => error);
    equal([thrown === boom, await store.get(key("a"))], [true, 1]);
    equal(await store.update(key("a"), increment), 2);
  },
  "list() yields the keys of a prefix and no others, whatever characters they have": async (store, _, key) => {
    const names = ["a/", "a/0", "a/1", "a/10", "a/2", "a/%_*", "a/[x]?", "a/ü", "a0", "b/1", `a/${"k".repeat(500)}`];
    for (const name of names) await store.update(key(name), () => name);
    const listed = await entries(store, key("a/"));
    equal(
      listed.map(([name]) => name).sort(),
      names.filter((name) => name.startsWith("a/")).map(key).sort(),
    );
    equal(listed.every(([name, value]) => name === key(value as string)), true);
    equal(await entries(store, key("a/1")), [[key("a/1"), "a/1"], [key("a/10"), "a/10"]]);
    equal(await entries(store, key("c")), []);
  },
  "list() yields all of many entries, in the order of their keys": async (store, _, key) => {
    const name = (i: number) => key(String(i).padStart(3, "0"));
    for (let i = 249; i >= 0; i--) await store.update(name(i), () => i);
    equal(await entries(store, key("")), times(250, (i) => [name(i), i]));
  },
  "an entry ends at expiresAt, to the fraction of a second, for every method": async (store, other, key) => {
    await store.update(key("soon"), () => 1, { expiresAt: seconds() + 0.3 });
    await store.update(key("later"), () => 1, { expiresAt: seconds() + 3600 });
    await store.update(key("past"), () => 1, { expiresAt: seconds() - 1 });
    equal([await store.get(key("soon")), await other.get(key("later"))], [1, 1]);
    equal([await store.get(key("past")), await store.update(key("past"), (value) => value)], [undefined, undefined]);
    await pause(400);
    equal([await store.get(key("soon")), await other.get(key("soon"))], [undefined, undefined]);
    equal(await entries(store, key("")), [[key("later"), 1]]);
    equal(await store.update(key("soon"), (current) => current ?? "new"), "new");
    equal(await store.get(key("soon")), "new");
  },
  "an update without expiresAt keeps the expiry that the key had": async (store, _, key) => {
    await store.update(key("a"), () => 1, { expiresAt: seconds() + 0.3 });
    await store.update(key("a"), () => 2);
    equal(await store.get(key("a")), 2);
    await pause(400);
    equal(await store.get(key("a")), undefined);
  },
  "a value may be as large as the largest record": async (store, _, key) => {
    const large = { text: "x".repeat(40_000) };
    await store.update(key("a"), () => large);
    equal(await store.get(key("a")), large);
  },
  "updates at the same time through one holder are all counted": async (store, _, key) => {
    const answers = await Promise.all(times(200, () => store.update(key("a"), increment)));
    equal(await store.get(key("a")), 200);
    equal(answers.sort((a, b) => Number(a) - Number(b)), times(200, (i) => i + 1));
  },
  "updates at the same time through two holders are all counted": async (store, other, key) => {
    await Promise.all([store, other].flatMap((each) => times(50, () => each.update(key("a"), increment))));
    equal([await store.get(key("a")), await other.get(key("a"))], [100, 100]);
  },
  "what one holder has answered, the other reads": async (store, other, key) => {
    for (let i = 1; i <= 20; i++) {
      const [writer, reader] = i % 2 ? [store, other] : [other, store];
      await writer.update(key("a"), increment);
      equal(await reader.get(key("a")), i);
    }
    await other.update(key("a"), () => undefined);
    equal(await store.get(key("a")), undefined);
  },
  "version(), if there is one, stays while nothing changes and is another after any change": async (
    store,
    other,
    key,
  ) => {
    if (!store.version) return;
    const versions = () => [store.version!(), other.version!()];
    await store.update(key("a"), increment);
    await pause(20); // a change by another holder may show a little later
    const before = versions();
    await store.get(key("a"));
    await store.update(key("a"), (current) => current);
    equal(versions(), before);
    await other.update(key("a"), increment);
    await pause(20);
    const after = versions();
    notEqual([after[0] === before[0], after[1] === before[1]].includes(true), true);
    await store.update(key("a"), increment);
    notEqual(store.version!(), after[0]);
    await pause(20);
    notEqual(other.version!(), after[1]);
  },
};

/** Tries every promise on what `open` opens; throws an error that names the broken ones. */
export async function storeContract(open: () => Store | Promise<Store>): Promise<void> {
  const [store, other] = [await open(), await open()];
  const broken: string[] = [];
  try {
    for (const [i, [name, promised]] of Object.entries(PROMISES).entries()) {
      await promised(store, other, (name) => `contract/${i}/${name}`).catch((error: Error) => {
        broken.push(`${name}: ${error.message}`);
      });
    }
  } finally {
    for (const each of new Set([store, other])) await each.close?.();
  }
  if (broken.length > 0) throw new Error(["The store breaks its contract.", ...broken].join("\n\n"));
}
