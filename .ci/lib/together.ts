/**
 * What several servers on one store owe to each other, whatever the store is.
 *
 * @module
 */

import { demand } from "./checks.ts";
import type { Answer, Client } from "./client.ts";

export function expect({ status, body }: Answer, wanted: number, what: string): void {
  demand(status === wanted, `${what}: ${status} instead of ${wanted} ${JSON.stringify(body).slice(0, 200)}`);
}

export async function timed<T>(task: Promise<T>): Promise<{ answer: T; milliseconds: number }> {
  const start = performance.now();
  const answer = await task;
  return { answer, milliseconds: performance.now() - start };
}

export const shuffled = <T>(items: T[]): T[] =>
  items.map((item) => ({ item, at: Math.random() })).sort((a, b) => a.at - b.at).map(({ item }) => item);

/** How many different answers there are, but for what time alone changes. */
export function distinct(answers: Answer[]): number {
  return new Set(answers.map(({ status, body: { expires_in: _, ...rest } }) => status + JSON.stringify(rest))).size;
}

/** One set of connections behind all of them: they answer as one, and what one ends is ended everywhere. */
export async function agree(clients: Client[], rounds: number): Promise<string> {
  const each = <T>(times: number, ask: (client: Client) => Promise<T>): Promise<T[]> =>
    Promise.all(Array.from({ length: times }, () => clients.map(ask)).flat());
  for (let round = 0; round < rounds; round++) {
    const [one, ...others] = shuffled(clients);
    const { access_token, refresh_token } = await one!.connect();
    const refreshes = await each(20, (client) => client.refresh(refresh_token));
    expect(refreshes[0]!, 200, "a refresh");
    demand(distinct(refreshes) === 1, `${distinct(refreshes)} answers to one refresh token`);
    for (const answer of await each(1, (client) => client.call(refreshes[0]!.body.access_token))) {
      expect(answer, 200, "the new token, everywhere");
    }
    const { code } = await one!.approve();
    const given = (await each(3, (client) => client.redeem(code!))).filter(({ status }) => status === 200);
    demand(given.length === 1, `a code was redeemed ${given.length} times`);
    expect(await one!.revoke(access_token), 200, "a revocation");
    for (const client of others) {
      // The one that everybody has just seen, too: what a server remembers must not outlive a revocation anywhere.
      for (const token of [access_token, refreshes[0]!.body.access_token]) {
        expect(await client.call(token), 401, "a revoked token, elsewhere");
      }
      expect(await client.refresh(refreshes[0]!.body.refresh_token), 400, "the revoked refresh token, elsewhere");
    }
  }
  const times = 600 / clients.length;
  for (const answer of await each(1, (client) => client.json("/test/count", { key: "counter", times }))) {
    expect(answer, 200, "the increments");
  }
  const { value } = (await clients[0]!.json("/test/count", { key: "counter", times: 0 })).body;
  demand(value === 600, `600 increments came to ${value}`);
  return `${rounds} rounds: one answer, one redemption, a revocation holds at once; 600 of 600 increments`;
}
