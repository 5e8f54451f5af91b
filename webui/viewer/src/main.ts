/** Starts the viewer on the page's `#viewer` element. */
import "./viewer.css";
import type { Probe } from "./probe";
import { translator } from "./text";
import { parseConfig } from "./types";
import { Viewer } from "./viewer";

export interface ViewerElement extends HTMLElement {
  /** Grey values that were drawn within the image. */
  viewerProbe?: () => Probe;
}

function start(root: ViewerElement): void {
  try {
    const viewer = new Viewer(root, parseConfig(root.dataset["config"] ?? ""));
    root.viewerProbe = () => viewer.probe();
    void viewer.start();
  } catch (error) {
    // Without a configuration there is no language either: the page's own decides.
    console.warn("viewer:", error);
    const lang = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
    root.dataset["state"] = "error";
    root.setAttribute("role", "alert");
    root.textContent = translator({ lang, text: {} })("error_draw");
  }
}

const root = document.getElementById("viewer");
if (root) {
  start(root);
}
