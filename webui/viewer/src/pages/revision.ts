/** Follows the changes on the box by polling `/api/v1/revision`, whose ETag (RFC 9110, 8.8.3) is the number of the last change. */
import { isRecord } from "../types";
import { ConnectionStatus, showLoggedOut } from "./connection";
import { Poller, type PollResult } from "./poller";

const REVISION_URL = "/api/v1/revision";
const INTERVAL_MS = 3000;

/**
 * Calls `refresh` when the box has another revision than the page, again until it succeeds.
 *
 * @param shown the revision that the page shows.
 * @param refresh brings the page up to date; returns whether it could.
 */
export function followRevision(shown: number, refresh: (signal: AbortSignal) => Promise<boolean>): void {
  const status = new ConnectionStatus(document.getElementById("live"));
  let revision = shown;
  let etag = `"${shown}"`;

  async function poll(signal: AbortSignal): Promise<PollResult> {
    status.expectAnswer();
    // With a condition of its own the request bypasses the browser's cache, and the 304 comes through to this script.
    const response = await fetch(REVISION_URL, { headers: { "X-Background": "1", "If-None-Match": etag }, signal });
    if (response.status === 304 || response.status === 401) {
      return response.status === 304 ? "ok" : "ended";
    }
    const latest = response.ok ? revisionOf(await response.json()) : null;
    if (latest === null || (latest !== revision && !(await refresh(signal)))) {
      return "failed";
    }
    revision = latest;
    etag = response.headers.get("ETag") ?? `"${latest}"`;
    return "ok";
  }

  function report(result: PollResult): void {
    if (result === "ok") {
      status.show("live");
    } else if (result === "ended") {
      status.cancel();
      showLoggedOut();
    }
  }

  new Poller(poll, () => INTERVAL_MS, report).start("now");
}

function revisionOf(answer: unknown): number | null {
  const revision = isRecord(answer) ? answer["revision"] : null;
  return typeof revision === "number" ? revision : null;
}
