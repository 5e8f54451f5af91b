// Keeps the report pane of a study as the box has it, and at the image that the viewer shows. The image is left alone: nobody's
// window or zoom is lost.
import { follow, fragment, gently } from "./live.js";

const pane = document.getElementById("report");
const viewer = document.getElementById("viewer");
const arrived = document.getElementById("arrived");
const newImages = document.getElementById("new-images");
const study = Number(pane.dataset.study);
const report = () => pane.querySelector(".report");
const { findings, images } = report().dataset;
let html = report().innerHTML;

const refresh = gently(async () => {
  const fresh = (await fragment(pane.dataset.url))?.querySelector(".report");
  if (!fresh || fresh.innerHTML === html) {
    return;
  }
  html = fresh.innerHTML;
  const open = new Map([...pane.querySelectorAll("details")].map((item) => [placeOf(item), item.open]));
  const pressing = document.activeElement?.matches?.(".first");
  report().replaceWith(fresh);
  if (pressing) {
    pane.querySelector(".first")?.focus({ preventScroll: true });
  }
  pane.querySelectorAll("details").forEach((item) => {
    item.open = open.get(placeOf(item)) ?? false;
  });
  newImages.hidden = fresh.dataset.images === images;
  arrived.hidden = fresh.dataset.findings === findings || !newImages.hidden;
  viewer.viewerUnread?.(JSON.parse(fresh.dataset.unread));
  showCurrent();
});

/** What tells a folded part again in a fresh report: the image it belongs to. */
function placeOf(details) {
  return details.closest(".image-report")?.dataset.images.split(" ")[0];
}

/** Puts the report of the image on the stage first and marks it; the others stay below it. */
function showCurrent() {
  const shown = viewer.dataset.imageId;
  let current = null;
  for (const part of pane.querySelectorAll(".image-report")) {
    const mine = part.dataset.images.split(" ").includes(shown);
    part.classList.toggle("is-current", mine);
    part.toggleAttribute("aria-current", mine);
    current = mine ? part : current;
  }
  const first = pane.querySelector(".image-report");
  if (current && first !== current) {
    first.before(current);
  }
  pane.parentElement.scrollTop = 0;
}

new MutationObserver(showCurrent).observe(viewer, { attributeFilter: ["data-image-id"] });
showCurrent();

pane.addEventListener("click", (event) => {
  const part = event.target.closest(".to-image")?.closest(".image-report");
  if (part) {
    viewer.viewerChoose?.(Number(part.dataset.images.split(" ")[0]));
  }
});

for (const banner of [arrived, newImages]) {
  banner.querySelector("button").addEventListener("click", () => location.reload());
}

follow(Number(report().dataset.revision), (change) => {
  const waiting = report().dataset.pending === "1";
  if (waiting || change.studies === null || change.studies.some((item) => item.id === study)) {
    refresh();
  }
});
