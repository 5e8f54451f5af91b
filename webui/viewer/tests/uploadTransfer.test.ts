import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { removeUpload, removeOldUploads, transfer, TransferError, type Outcome } from "../src/uploadTransfer";
import { requestsOf, serve, type Answer } from "./support";

/** What the next upload does; the options are those that the page gave to tus. */
interface Options {
  uploadUrl: string | null;
  metadata: Record<string, string>;
  headers: Record<string, string>;
  onUploadUrlAvailable: () => void;
  onShouldRetry: (error: unknown) => boolean;
  onSuccess: () => void;
  onError: (error: unknown) => void;
}
const tus = vi.hoisted(() => ({ behave: (_options: Options): void => undefined, options: [] as unknown[] }));

vi.mock("tus-js-client", () => {
  class DetailedError extends Error {
    constructor(readonly originalResponse: unknown) {
      super("upload");
    }
  }
  class Upload {
    url = "/api/v1/tus/77";
    constructor(
      _file: File,
      private readonly options: Options,
    ) {
      tus.options.push(options);
    }
    start(): void {
      tus.behave(this.options);
    }
  }
  return { DetailedError, Upload };
});

const { DetailedError } = (await import("tus-js-client")) as unknown as { DetailedError: new (response: unknown) => Error };
const BOX = { endpoint: "/api/v1/tus", csrf: "token" };
const OUTCOME = "/api/v1/tus/77/outcome";
const named = { name: "a.dcm", file: new File(["x"], "a.dcm") };
const stored: Outcome = { name: "a.dcm", result: "stored", word: "Stored", reason: "", hint: "", url: "/studies/1" };
const events = { onSent: vi.fn(), onBroken: vi.fn(), onChecking: vi.fn() };

const json = (value: unknown, status = 200) => new Response(JSON.stringify(value), { status });
const answered = (status: number, body = "") => new DetailedError({ getStatus: () => status, getBody: () => body });

function send(form = "") {
  return transfer(BOX, named, form, "key", events, () => undefined);
}

/** Asks for the outcome with these answers, one after the other. */
function outcomes(...answers: Answer[]) {
  return serve({ [OUTCOME]: () => (answers.shift() ?? (() => json({ outcomes: [stored] })))() });
}

beforeEach(() => {
  vi.useFakeTimers();
  localStorage.clear();
  Object.values(events).forEach((event) => event.mockClear());
  tus.options.length = 0;
  tus.behave = (options) => {
    options.onUploadUrlAvailable();
    options.onSuccess();
  };
});
afterEach(() => {
  vi.useRealTimers();
});

describe("transfer", () => {
  it("sends the file with its name, form and token, and returns its outcome", async () => {
    outcomes();
    expect(await send('{"view": "PA"}')).toEqual({ id: "77", outcomes: [stored] });
    expect(tus.options[0]).toMatchObject({ uploadUrl: null, metadata: { filename: "a.dcm", form: '{"view": "PA"}' }, headers: { "X-CSRFToken": "token" } });
    expect(localStorage.length).toBe(0);
  });

  it("goes on where it stopped before a reload", async () => {
    tus.behave = (options) => {
      options.onUploadUrlAvailable();
      options.onError(answered(503));
    };
    await expect(send()).rejects.toBeInstanceOf(TransferError);
    tus.behave = (options) => options.onSuccess();
    outcomes();
    await send();
    expect(tus.options[1]).toMatchObject({ uploadUrl: "/api/v1/tus/77" });
  });

  it("asks until the outcome is known", async () => {
    const fetching = outcomes(() => json({ files: 12 }, 202), () => json({ files: 20 }, 202));
    const result = send();
    await vi.runAllTimersAsync();
    expect((await result).outcomes).toEqual([stored]);
    expect(events.onChecking.mock.calls).toEqual([[0], [12], [20]]);
    expect(requestsOf(fetching, OUTCOME)).toHaveLength(3);
  });

  it("asks again after errors of the network and of the server, and gives up in the end", async () => {
    outcomes(() => Promise.reject(new TypeError("failed to fetch")), () => json({}, 502));
    const result = send();
    await vi.runAllTimersAsync();
    expect((await result).outcomes).toEqual([stored]);
    expect(events.onBroken).toHaveBeenCalledTimes(2);
    const never = () => json({}, 500);
    outcomes(...Array<Answer>(20).fill(never));
    const failed = expect(send()).rejects.toMatchObject({ final: false, loggedOut: false });
    await vi.runAllTimersAsync();
    await failed;
  });

  it.each([
    [401, { loggedOut: true, final: false }],
    [507, { noRoom: true, final: false }],
    [503, { final: false }],
    [413, { final: true, reason: "Too large", hint: "Send less." }],
  ])("tells what an answer %i means for the person", async (status, expected) => {
    tus.behave = (options) => options.onError(answered(status, '{"title": "Too large", "detail": "Send less."}'));
    await expect(send()).rejects.toMatchObject(expected);
  });

  it("tries again by itself only where that is of use", () => {
    const retried = (status: number) => {
      let again = false;
      tus.behave = (options) => (again = options.onShouldRetry(answered(status)));
      void send();
      return again;
    };
    expect([0, 423, 503].map(retried)).toEqual([true, true, true]);
    expect([400, 401, 413, 507].map(retried)).toEqual([false, false, false, false]);
    expect(events.onBroken).toHaveBeenCalledTimes(3);
  });
});

describe("what the browser keeps", () => {
  it("is removed after a day, and at once when an upload is cancelled", () => {
    const day = 24 * 3600 * 1000;
    localStorage.setItem("clinic-upload-old", JSON.stringify({ url: "/1", at: Date.now() - day - 1 }));
    localStorage.setItem("clinic-upload-new", JSON.stringify({ url: "/2", at: Date.now() - 1 }));
    localStorage.setItem("clinic-upload-garbled", "{");
    localStorage.setItem("another", "1");
    removeOldUploads();
    expect(Object.keys(localStorage).sort()).toEqual(["another", "clinic-upload-new"]);
    removeUpload("new");
    expect(Object.keys(localStorage)).toEqual(["another"]);
  });
});
