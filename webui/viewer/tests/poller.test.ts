import { describe, expect, it, vi } from "vitest";
import { Poller, type PollResult } from "../src/pages/poller";
import { setVisibility, useFreshPage } from "./support";

useFreshPage();

function poller(results: (PollResult | Error)[]) {
  const task = vi.fn<(signal: AbortSignal) => Promise<PollResult>>(async () => {
    const result = results.length > 1 ? results.shift() : results[0];
    if (result instanceof Error || result === undefined) {
      throw result ?? new Error("no result");
    }
    return result;
  });
  const seen: PollResult[] = [];
  return { task, seen, poller: new Poller(task, () => 3000, (result) => seen.push(result)) };
}

describe("Poller", () => {
  it("runs at once and then after each interval", async () => {
    const { task, poller: one } = poller(["ok"]);
    one.start("now");
    expect(task).toHaveBeenCalledTimes(1);
    await vi.advanceTimersByTimeAsync(2999);
    expect(task).toHaveBeenCalledTimes(1);
    await vi.advanceTimersByTimeAsync(6001);
    expect(task).toHaveBeenCalledTimes(4);
  });

  it("can wait before the first run", async () => {
    const { task, poller: one } = poller(["ok"]);
    one.start("later");
    expect(task).not.toHaveBeenCalled();
    await vi.advanceTimersByTimeAsync(3000);
    expect(task).toHaveBeenCalledTimes(1);
  });

  it("waits longer after every failure in a row, at most 30 s, and as usual again after a success", async () => {
    const { task, seen, poller: one } = poller([...Array<Error>(6).fill(new Error("network")), "ok"]);
    one.start("now");
    let calls = 1;
    for (const pause of [3000, 6000, 12_000, 24_000, 30_000, 30_000]) {
      await vi.advanceTimersByTimeAsync(pause - 1);
      expect(task).toHaveBeenCalledTimes(calls);
      await vi.advanceTimersByTimeAsync(1);
      expect(task).toHaveBeenCalledTimes(++calls);
    }
    expect(seen).toEqual([...Array<string>(6).fill("failed"), "ok"]);
    await vi.advanceTimersByTimeAsync(3000);
    expect(task).toHaveBeenCalledTimes(calls + 1);
  });

  it("makes no request while the page is hidden, and one at once when it becomes visible", async () => {
    const { task, poller: one } = poller(["ok"]);
    one.start("now");
    await vi.advanceTimersByTimeAsync(0);
    setVisibility("hidden");
    await vi.advanceTimersByTimeAsync(60_000);
    expect(task).toHaveBeenCalledTimes(1);
    setVisibility("visible");
    expect(task).toHaveBeenCalledTimes(2);
    await vi.advanceTimersByTimeAsync(3000);
    expect(task).toHaveBeenCalledTimes(3);
  });

  it("does not start on a hidden page", async () => {
    const { task, poller: one } = poller(["ok"]);
    setVisibility("hidden");
    one.start("now");
    await vi.advanceTimersByTimeAsync(60_000);
    expect(task).not.toHaveBeenCalled();
  });

  it("aborts the run of a page that is hidden and ignores its result", async () => {
    const signals: AbortSignal[] = [];
    const seen: PollResult[] = [];
    const one = new Poller(
      (signal) => new Promise((_, reject) => (signals.push(signal), signal.addEventListener("abort", () => reject(new Error("aborted"))))),
      () => 3000,
      (result) => seen.push(result),
    );
    one.start("now");
    setVisibility("hidden");
    await vi.advanceTimersByTimeAsync(60_000);
    expect(signals.map((signal) => signal.aborted)).toEqual([true]);
    expect(seen).toEqual([]);
  });

  it("counts a run without an answer as failed after 10 s", async () => {
    const seen: PollResult[] = [];
    const one = new Poller(
      (signal) => new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted")))),
      () => 3000,
      (result) => seen.push(result),
    );
    one.start("now");
    await vi.advanceTimersByTimeAsync(9999);
    expect(seen).toEqual([]);
    await vi.advanceTimersByTimeAsync(1);
    expect(seen).toEqual(["failed"]);
  });

  it("stops when the session has ended, until the page becomes visible again", async () => {
    const { task, poller: one } = poller(["ended"]);
    one.start("now");
    await vi.advanceTimersByTimeAsync(60_000);
    expect(task).toHaveBeenCalledTimes(1);
    setVisibility("visible");
    expect(task).toHaveBeenCalledTimes(2);
  });

  it("stops when the page is left", async () => {
    const { task, poller: one } = poller(["ok"]);
    one.start("now");
    await vi.advanceTimersByTimeAsync(0);
    window.dispatchEvent(new Event("pagehide"));
    await vi.advanceTimersByTimeAsync(60_000);
    expect(task).toHaveBeenCalledTimes(1);
  });
});
