/** Sends one file to the box: by tus over a connection that may break, then polls for the outcome until it is known. */
import { DetailedError, Upload } from "tus-js-client";
import type { Named } from "./uploadFiles";
import { isRecord } from "./types";

/** Large enough that the number of requests does not matter, small enough that a session does not expire on a slow connection. */
const CHUNK_BYTES = 8 * 1024 * 1024;
/** Together longer than the time after which the box releases an upload that sends nothing. */
const RETRY_MS = [0, 500, 1000, 3000, 5000, 10000, 15000];
const OUTCOME_WAIT_S = 20;
const POLL_PAUSE_MS = 250;
const MAX_AGE_MS = 24 * 3600 * 1000;
/** Insufficient Storage: what arrived stays on the box, and somebody has to free disk space before it continues. */
const NO_ROOM = 507;
const KEY_PREFIX = "clinic-upload-";

export interface Outcome {
  name: string;
  result: "stored" | "duplicate" | "conflict" | "skipped" | "refused";
  word: string;
  reason: string;
  hint: string;
  url: string;
}

/** Why a file did not arrive: `final` when another attempt cannot help, `loggedOut` when a login helps, `noRoom` when the disk is full. */
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

/** What the page shows while a file is sent. */
export interface TransferEvents {
  onSent(bytes: number): void;
  onBroken(): void;
  onChecking(files: number): void;
}

export interface Box {
  endpoint: string;
  csrf: string;
}

/** Sends a file and returns its outcome; `onStart` gets the upload, which can be aborted. Throws `TransferError`. */
export async function transfer(
  box: Box,
  named: Named,
  form: string,
  key: string,
  events: TransferEvents,
  onStart: (upload: Upload) => void,
): Promise<{ id: string; outcomes: Outcome[] }> {
  const url = await send(box, named, form, key, events, onStart);
  const outcomes = await pollOutcome(url, events);
  localStorage.removeItem(KEY_PREFIX + key);
  return { id: url.slice(url.lastIndexOf("/") + 1), outcomes };
}

/** Removes the stored addresses of uploads older than a day; the box has deleted them too. */
export function removeOldUploads(): void {
  for (const name of Object.keys(localStorage)) {
    if (name.startsWith(KEY_PREFIX) && Date.now() - (storedUpload(name)?.at ?? 0) > MAX_AGE_MS) {
      localStorage.removeItem(name);
    }
  }
}

/** Removes the stored address of an upload that was cancelled. */
export function removeUpload(key: string): void {
  localStorage.removeItem(KEY_PREFIX + key);
}

function storedUpload(name: string): { url: string; at: number } | null {
  try {
    const value: unknown = JSON.parse(localStorage.getItem(name) ?? "null");
    const isStored = isRecord(value) && typeof value["url"] === "string" && typeof value["at"] === "number";
    return isStored ? { url: value["url"] as string, at: value["at"] as number } : null;
  } catch {
    return null;
  }
}

function send(box: Box, named: Named, form: string, key: string, events: TransferEvents, onStart: (upload: Upload) => void): Promise<string> {
  return new Promise((resolve, reject) => {
    const upload = new Upload(named.file, {
      endpoint: box.endpoint,
      uploadUrl: storedUpload(KEY_PREFIX + key)?.url ?? null,
      chunkSize: CHUNK_BYTES,
      retryDelays: RETRY_MS,
      uploadDataDuringCreation: true,
      storeFingerprintForResuming: false,
      metadata: form ? { filename: named.name, form } : { filename: named.name },
      headers: { "X-CSRFToken": box.csrf },
      onUploadUrlAvailable: () => {
        if (upload.url) {
          localStorage.setItem(KEY_PREFIX + key, JSON.stringify({ url: upload.url, at: Date.now() }));
        }
      },
      onProgress: (bytes) => events.onSent(bytes),
      onShouldRetry: (error) => {
        const status = error.originalResponse?.getStatus() ?? 0;
        const isTemporary = status === 0 || [408, 409, 423, 429, 500, 502, 503, 504].includes(status);
        if (isTemporary) {
          events.onBroken();
        }
        return isTemporary;
      },
      onSuccess: () => (upload.url ? resolve(upload.url) : reject(new TransferError("", "", false, false))),
      onError: (error) => reject(toTransferError(error)),
    });
    onStart(upload);
    upload.start();
  });
}

function toTransferError(error: Error | DetailedError): TransferError {
  const response = error instanceof DetailedError ? error.originalResponse : null;
  const status = response?.getStatus() ?? 0;
  const { title, detail } = problem(response?.getBody() ?? "");
  const isTemporary = [401, 408, 409, 423, 429, 500, 502, 503, 504, NO_ROOM].includes(status);
  return new TransferError(title, detail, status >= 400 && !isTemporary, status === 401, status === NO_ROOM);
}

function problem(body: string): { title: string; detail: string } {
  try {
    const value: unknown = JSON.parse(body);
    if (isRecord(value)) {
      return { title: String(value["title"] ?? ""), detail: String(value["detail"] ?? "") };
    }
  } catch {
    // No problem+json: the connection broke, or something between here and the box answered.
  }
  return { title: "", detail: "" };
}

/** Polls until the box knows the outcome; after a lost answer the box repeats it. */
async function pollOutcome(url: string, events: TransferEvents): Promise<Outcome[]> {
  events.onChecking(0);
  for (let failures = 0; ; ) {
    try {
      const answer = await fetch(`${url}/outcome?wait=${OUTCOME_WAIT_S}`, { credentials: "same-origin" });
      if (answer.status === 200) {
        return ((await answer.json()) as { outcomes: Outcome[] }).outcomes;
      }
      if (answer.status === 202) {
        failures = 0;
        events.onChecking(((await answer.json()) as { files: number }).files);
        await pause(POLL_PAUSE_MS);
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
    events.onBroken();
    await pause(delay);
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
