/** One file on its way to the box: tus over a line that may break, then the outcome, asked for until it is known. */
import { DetailedError, Upload } from "tus-js-client";
import type { Named } from "./uploadFiles";
import { isRecord } from "./types";

/** Large enough that the requests do not matter, small enough that a session stays awake on a slow line. */
const CHUNK_BYTES = 8 * 1024 * 1024;
/** Together longer than the silence after which the box gives a hanging upload free. */
const RETRY_MS = [0, 500, 1000, 3000, 5000, 10000, 15000];
const OUTCOME_WAIT_S = 20;
const ASK_AGAIN_MS = 250;
const KEPT_MS = 24 * 3600 * 1000;
/** Insufficient Storage: what arrived is kept, and somebody has to make room before it goes on. */
const NO_ROOM = 507;
const STORED_AS = "clinic-upload-";

export interface Outcome {
  name: string;
  result: "stored" | "duplicate" | "conflict" | "skipped" | "refused";
  word: string;
  reason: string;
  hint: string;
  url: string;
}

/** Why a file did not arrive: `final` when trying again is of no use, `loggedOut` when a login is, `noRoom` when the disk is full. */
export class TransferError extends Error {
  constructor(
    readonly reason: string,
    readonly hint: string,
    readonly final: boolean,
    readonly loggedOut: boolean,
    readonly noRoom = false,
  ) {
    super(reason);
    this.name = "TransferError";
  }
}

export interface Events {
  sent(bytes: number): void;
  broken(): void;
  checking(files: number): void;
}

export interface Box {
  endpoint: string;
  csrf: string;
}

/** Sends a file and returns what became of it; `begun` tells how to call it off. Throws `TransferError`. */
export async function transfer(
  box: Box,
  named: Named,
  form: string,
  key: string,
  events: Events,
  begun: (upload: Upload) => void,
): Promise<{ id: string; outcomes: Outcome[] }> {
  const url = await send(box, named, form, key, events, begun);
  const outcomes = await outcome(url, events);
  localStorage.removeItem(STORED_AS + key);
  return { id: url.slice(url.lastIndexOf("/") + 1), outcomes };
}

/** Forgets where uploads of former days stood; the box has forgotten them too. */
export function forgetOld(): void {
  for (const name of Object.keys(localStorage)) {
    if (name.startsWith(STORED_AS) && Date.now() - (remembered(name)?.at ?? 0) > KEPT_MS) {
      localStorage.removeItem(name);
    }
  }
}

/** Forgets one upload that was called off. */
export function forget(key: string): void {
  localStorage.removeItem(STORED_AS + key);
}

function remembered(name: string): { url: string; at: number } | null {
  try {
    const value: unknown = JSON.parse(localStorage.getItem(name) ?? "null");
    const known = isRecord(value) && typeof value["url"] === "string" && typeof value["at"] === "number";
    return known ? { url: value["url"] as string, at: value["at"] as number } : null;
  } catch {
    return null;
  }
}

function send(box: Box, named: Named, form: string, key: string, events: Events, begun: (upload: Upload) => void): Promise<string> {
  return new Promise((resolve, reject) => {
    const upload = new Upload(named.file, {
      endpoint: box.endpoint,
      uploadUrl: remembered(STORED_AS + key)?.url ?? null,
      chunkSize: CHUNK_BYTES,
      retryDelays: RETRY_MS,
      uploadDataDuringCreation: true,
      storeFingerprintForResuming: false,
      metadata: form ? { filename: named.name, form } : { filename: named.name },
      headers: { "X-CSRFToken": box.csrf },
      onUploadUrlAvailable: () => {
        if (upload.url) {
          localStorage.setItem(STORED_AS + key, JSON.stringify({ url: upload.url, at: Date.now() }));
        }
      },
      onProgress: (bytes) => events.sent(bytes),
      onShouldRetry: (error) => {
        const status = error.originalResponse?.getStatus() ?? 0;
        const again = status === 0 || [408, 409, 423, 429, 500, 502, 503, 504].includes(status);
        if (again) {
          events.broken();
        }
        return again;
      },
      onSuccess: () => (upload.url ? resolve(upload.url) : reject(new TransferError("", "", false, false))),
      onError: (error) => reject(explained(error)),
    });
    begun(upload);
    upload.start();
  });
}

function explained(error: Error | DetailedError): TransferError {
  const response = error instanceof DetailedError ? error.originalResponse : null;
  const status = response?.getStatus() ?? 0;
  const { title, detail } = problem(response?.getBody() ?? "");
  const passing = [401, 408, 409, 423, 429, 500, 502, 503, 504, NO_ROOM].includes(status);
  return new TransferError(title, detail, status >= 400 && !passing, status === 401, status === NO_ROOM);
}

function problem(body: string): { title: string; detail: string } {
  try {
    const value: unknown = JSON.parse(body);
    if (isRecord(value)) {
      return { title: String(value["title"] ?? ""), detail: String(value["detail"] ?? "") };
    }
  } catch {
    // No problem+json: the line broke, or something between here and the box answered.
  }
  return { title: "", detail: "" };
}

/** Asks until the box knows; a lost answer is asked for again, the box gives the same one. */
async function outcome(url: string, events: Events): Promise<Outcome[]> {
  events.checking(0);
  for (let failures = 0; ; ) {
    try {
      const answer = await fetch(`${url}/outcome?wait=${OUTCOME_WAIT_S}`, { credentials: "same-origin" });
      if (answer.status === 200) {
        return ((await answer.json()) as { outcomes: Outcome[] }).outcomes;
      }
      if (answer.status === 202) {
        failures = 0;
        events.checking(((await answer.json()) as { files: number }).files);
        await pause(ASK_AGAIN_MS);
        continue;
      }
      if (answer.status < 500) {
        const { title, detail } = problem(await answer.text());
        throw new TransferError(title, detail, false, answer.status === 401);
      }
    } catch (error) {
      if (error instanceof TransferError) {
        throw error;
      }
    }
    const delay = RETRY_MS[++failures];
    if (delay === undefined) {
      throw new TransferError("", "", false, false);
    }
    events.broken();
    await pause(delay);
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
