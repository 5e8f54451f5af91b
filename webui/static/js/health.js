// Keeps the life of the models as the box has it: asked for at intervals, more often while something is on its way.
import { fragment } from "./live.js";

const BUSY_MS = 2000;
const CALM_MS = 15000;

const place = document.getElementById("life");
const line = document.getElementById("live");
let timer = 0;

async function look() {
  clearTimeout(timer);
  const page = await fragment(place.dataset.url);
  line.textContent = page ? "" : line.dataset.lost;
  line.classList.toggle("is-lost", !page);
  for (const part of page ? [".life", ".passed"] : []) {
    const fresh = page.querySelector(part);
    const shown = document.querySelector(part);
    if (fresh && fresh.outerHTML !== shown.outerHTML) {
      shown.replaceWith(fresh);
    }
  }
  next();
}

function next() {
  clearTimeout(timer);
  if (!document.hidden) {
    timer = setTimeout(look, place.querySelector(".life").dataset.busy === "1" ? BUSY_MS : CALM_MS);
  }
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look()));
next();
