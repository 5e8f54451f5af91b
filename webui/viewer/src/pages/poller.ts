/** Runs a task again and again while the page is visible, with longer pauses after failures. */

/** A request without an answer after this time counts as failed. */
const TIMEOUT_MS = 10_000;
const LONGEST_PAUSE_MS = 30_000;

/** `ended`: the session is over, the task is not run again until the page becomes visible once more. */
export type PollResult = "ok" | "failed" | "ended";

export class Poller {
  private timer: ReturnType<typeof setTimeout> | undefined;
  private running: AbortController | null = null;
  private failures = 0;

  /**
   * @param task does the requests with the signal, which aborts them when the page is hidden or time is over; it may throw.
   * @param intervalMs the pause after a success; after every further failure in a row it doubles, up to 30 s.
   * @param onResult receives the result, but not that of a run which was stopped.
   */
  constructor(
    private readonly task: (signal: AbortSignal) => Promise<PollResult>,
    private readonly intervalMs: () => number,
    private readonly onResult: (result: PollResult) => void,
  ) {}

  /** Starts, with the first run at once or after a pause. A hidden page makes no request; a page that becomes visible does at once. */
  start(first: "now" | "later"): void {
    document.addEventListener("visibilitychange", () => (isHidden() ? this.stop() : void this.run()));
    window.addEventListener("pagehide", () => this.stop());
    if (isHidden()) {
      return;
    }
    if (first === "now") {
      void this.run();
    } else {
      this.schedule();
    }
  }

  /** Stops until the page becomes visible again. */
  stop(): void {
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = null;
  }

  private async run(): Promise<void> {
    this.stop();
    const controller = (this.running = new AbortController());
    const timeout = setTimeout(() => controller.abort(), TIMEOUT_MS);
    const result = await this.task(controller.signal).catch((): PollResult => "failed");
    clearTimeout(timeout);
    if (this.running !== controller) {
      return; // stopped, or replaced by a newer run
    }
    this.running = null;
    this.onResult(result);
    this.failures = result === "failed" ? this.failures + 1 : 0;
    if (result !== "ended") {
      this.schedule();
    }
  }

  private schedule(): void {
    const pause = Math.min(LONGEST_PAUSE_MS, this.intervalMs() * 2 ** Math.max(0, this.failures - 1));
    this.timer = setTimeout(() => void this.run(), pause);
  }
}

function isHidden(): boolean {
  return document.visibilityState === "hidden";
}
