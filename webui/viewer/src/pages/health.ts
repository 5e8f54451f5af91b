/** Keeps the models on the status page up to date: fetched at intervals, more often while a version is being prepared. */
import "../styles/health.css";
import { find } from "../dom";
import { ConnectionStatus } from "./connection";
import { fetchFragment } from "./fragment";
import { Poller } from "./poller";

const BUSY_MS = 2000;
const CALM_MS = 15_000;
/** The parts of the page that are replaced when they differ. */
const PARTS = [".health-verdict", ".life", ".passed"];

/** Starts the polling; `place` holds the models and the address of the fragment. */
export function startHealthPage(place: HTMLElement): void {
  const status = new ConnectionStatus(document.getElementById("live"));
  const poller = new Poller(
    async (signal) => {
      const fragment = await fetchFragment(place.dataset["url"] ?? "", signal);
      if (fragment) {
        replaceParts(fragment);
      }
      return fragment ? "ok" : "failed";
    },
    () => (find(place, ".life").dataset["busy"] === "1" ? BUSY_MS : CALM_MS),
    (result) => status.show(result === "ok" ? "live" : "lost"),
  );
  poller.start("later");
}

/** Replaces the parts that changed, and leaves the others with their open and closed details. */
export function replaceParts(fragment: HTMLElement): void {
  for (const part of PARTS) {
    const fresh = fragment.querySelector(part);
    const shown = document.querySelector(part);
    if (fresh && shown && fresh.outerHTML !== shown.outerHTML) {
      shown.replaceWith(fresh);
    }
  }
}

const place = document.getElementById("life");
if (place) {
  startHealthPage(place);
}
