/** What the page says about its connection to the box: the line `#live` and the banner `#logged-out`. */

const LOST_AFTER_MS = 6000;

/** The texts come from the page: `data-live` while connected, `data-lost` when the connection is lost. */
export class ConnectionStatus {
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(private readonly line: HTMLElement | null) {
    // A hidden page makes no requests, so it cannot know.
    document.addEventListener("visibilitychange", () => document.visibilityState === "hidden" && this.cancel());
  }

  /** Shows "connection lost" if the next state is not shown within a few seconds. */
  expectAnswer(): void {
    this.timer ??= setTimeout(() => this.show("lost"), LOST_AFTER_MS);
  }

  /** Shows the state now. */
  show(state: "live" | "lost"): void {
    this.cancel();
    if (this.line) {
      this.line.textContent = this.line.dataset[state] ?? "";
      this.line.classList.toggle("is-lost", state === "lost");
    }
  }

  /** Leaves what is shown as it is. */
  cancel(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
  }
}

/** Shows the banner that says that the session has ended. */
export function showLoggedOut(): void {
  document.getElementById("logged-out")?.removeAttribute("hidden");
}
