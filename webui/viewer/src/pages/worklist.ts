/** Keeps the worklist up to date: after a change on the box the rows are fetched again and those that differ are replaced. */
import "../styles/worklist.css";
import { find } from "../dom";
import { fetchFragment } from "./fragment";
import { followRevision } from "./revision";

/** At most so many changed studies are announced to a screen reader at once. */
const MOST_ANNOUNCED = 3;

/** Starts to follow the box; `list` holds the table, and the revision that it shows. */
export function startWorklist(list: HTMLElement): void {
  followRevision(Number(list.dataset["revision"]), async (signal) => {
    const fragment = await fetchFragment(list.dataset["url"] ?? "", signal, searchFields(list));
    if (fragment) {
      announce(mergeFragment(list, fragment));
    }
    return fragment !== null;
  });
}

function searchFields(list: HTMLElement): Record<string, string> {
  const { query = "", before } = list.dataset;
  return before ? { q: query, before } : { q: query };
}

/**
 * Puts the fetched rows in and returns those that are new or have another state. Touches only what changed, so that the
 * focus and a person's place in the list stay.
 */
export function mergeFragment(list: HTMLElement, fragment: HTMLElement): HTMLTableRowElement[] {
  const body = list.querySelector("tbody");
  const freshBody = fragment.querySelector("tbody");
  if (!body || !freshBody) {
    const changes = [...fragment.querySelectorAll<HTMLTableRowElement>("tbody tr")];
    list.replaceChildren(...fragment.childNodes);
    return changes;
  }
  const changes = mergeRows(body, freshBody);
  const pages = fragment.querySelector(".pages");
  if (pages) {
    list.querySelector(".pages")?.replaceWith(pages);
  }
  return changes;
}

function mergeRows(body: HTMLTableSectionElement, freshBody: HTMLTableSectionElement): HTMLTableRowElement[] {
  const shown = rowsOf(body);
  const known = new Map(shown.map((row) => [row.id, row]));
  const changes: HTMLTableRowElement[] = [];
  const rows = rowsOf(freshBody).map((row) => {
    const old = known.get(row.id);
    if (old && old.outerHTML.replace(' class="is-new"', "") === row.outerHTML) {
      return old;
    }
    if (!old) {
      row.classList.add("is-new");
    }
    if (!old || old.dataset["state"] !== row.dataset["state"] || old.dataset["urgent"] !== row.dataset["urgent"]) {
      changes.push(row);
    }
    return row;
  });
  if (rows.length !== shown.length || rows.some((row, place) => shown[place] !== row)) {
    replaceRows(body, rows);
  }
  return changes;
}

function rowsOf(body: HTMLTableSectionElement): HTMLTableRowElement[] {
  return [...body.querySelectorAll("tr")];
}

/** Replaces the rows and gives the focus back to the same link or button of the same study. */
function replaceRows(body: HTMLTableSectionElement, rows: readonly HTMLTableRowElement[]): void {
  const focused = document.activeElement?.closest("tr")?.id;
  const onFirstButton = document.activeElement?.matches(".first");
  body.replaceChildren(...rows);
  const row = focused ? document.getElementById(focused) : null;
  const button = onFirstButton ? row?.querySelector<HTMLElement>(".first") : null;
  (button ?? row?.querySelector<HTMLElement>(".row-link"))?.focus({ preventScroll: true });
}

function announce(changes: readonly HTMLTableRowElement[]): void {
  find(document, "#announce").textContent = changes
    .slice(-MOST_ANNOUNCED)
    .map((row) => `${row.querySelector(".row-link")?.textContent}: ${row.dataset["word"]}`)
    .join("; ");
}

const list = document.getElementById("list");
if (list) {
  startWorklist(list);
}
