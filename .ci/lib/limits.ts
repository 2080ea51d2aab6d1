/**
 * What every script of checks needs, whatever it checks: an end to waiting, and a word for what a machine cannot do.
 *
 * @module
 */

/** Something this machine cannot do, as opposed to something that went wrong. */
export class NotRun extends Error {}

export const pause = (milliseconds: number): Promise<void> =>
  new Promise((resolve) => setTimeout(resolve, Math.max(0, milliseconds)));

/** Settles as the task does, but not later than it may. */
export async function within<T>(seconds: number, task: Promise<T>, what = "it"): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    const message = `${what} took longer than ${Math.round(seconds)} seconds`;
    timer = setTimeout(() => reject(new Error(message)), seconds * 1000);
  });
  try {
    return await Promise.race([task, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** What a program or a page says, on one line, for a message: without colours and other control sequences. */
export function oneLine(text: string, length?: number): string {
  // deno-lint-ignore no-control-regex
  const sequences = /\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f]/g;
  return text.replace(sequences, " ").replace(/\s+/g, " ").trim().slice(0, length);
}
