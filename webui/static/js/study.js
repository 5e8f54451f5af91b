// Keeps the report pane of a study as the box has it. The image is left alone: nobody's window or zoom is lost.
import { follow, fragment, gently } from "./live.js";

const pane = document.getElementById("report");
const arrived = document.getElementById("arrived");
const study = Number(pane.dataset.study);
const report = () => pane.querySelector(".report");
const shown = report().dataset.findings;

const refresh = gently(async () => {
  const fresh = (await fragment(pane.dataset.url))?.querySelector(".report");
  if (!fresh || fresh.innerHTML === report().innerHTML) {
    return;
  }
  const open = [...pane.querySelectorAll("details")].map((item) => item.open);
  report().replaceWith(fresh);
  pane.querySelectorAll("details").forEach((item, place) => {
    item.open = open[place] ?? false;
  });
  arrived.hidden = fresh.dataset.findings === shown;
});

arrived.querySelector("button").addEventListener("click", () => location.reload());

follow(Number(report().dataset.revision), (change) => {
  const waiting = report().dataset.pending === "1";
  if (waiting || change.studies === null || change.studies.some((item) => item.id === study)) {
    refresh();
  }
});
