// Keeps the worklist as the box has it: when something changes the lines are fetched anew and those that differ replaced.
import { follow, fragment, gently } from "./live.js";

const list = document.getElementById("list");
const announce = document.getElementById("announce");

function fields() {
  return list.dataset.before ? { q: list.dataset.query, before: list.dataset.before } : { q: list.dataset.query };
}

const refresh = gently(async () => {
  const fresh = await fragment(list.dataset.url, fields());
  if (fresh) {
    merge(fresh);
  }
});

/** Puts the fresh lines in, touching only what changed, so that the focus and a person's place in the list stay. */
function merge(fresh) {
  const body = list.querySelector("tbody");
  const freshBody = fresh.querySelector("tbody");
  const changes = [];
  if (!body || !freshBody) {
    changes.push(...fresh.querySelectorAll("tbody tr"));
    list.replaceChildren(...fresh.childNodes);
  } else {
    mergeRows(body, freshBody, changes);
    const pages = fresh.querySelector(".pages");
    if (pages) {
      list.querySelector(".pages")?.replaceWith(pages);
    }
  }
  announce.textContent = changes
    .slice(-3)
    .map((row) => `${row.querySelector(".row-link").textContent}: ${row.dataset.word}`)
    .join("; ");
}

function mergeRows(body, freshBody, changes) {
  const known = new Map([...body.rows].map((row) => [row.id, row]));
  const focused = document.activeElement?.closest?.("tr")?.id;
  const pressing = document.activeElement?.matches?.(".first");
  const rows = [...freshBody.rows].map((row) => {
    const old = known.get(row.id);
    if (old && old.outerHTML.replace(' class="is-new"', "") === row.outerHTML) {
      return old;
    }
    if (!old) {
      row.classList.add("is-new");
    }
    if (!old || old.dataset.state !== row.dataset.state || old.dataset.urgent !== row.dataset.urgent) {
      changes.push(row);
    }
    return row;
  });
  if (rows.length !== body.rows.length || rows.some((row, place) => body.rows[place] !== row)) {
    body.replaceChildren(...rows);
    if (focused) {
      const row = document.getElementById(focused);
      ((pressing && row?.querySelector(".first")) || row?.querySelector(".row-link"))?.focus({ preventScroll: true });
    }
  }
}

if (list) {
  follow(Number(list.dataset.revision), refresh);
}
