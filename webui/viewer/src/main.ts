/** Starts the viewer on the page's `#viewer` element. */
import "./styles/viewer.css";
import type { Probe } from "./probe";
import { translator } from "./text";
import { parseConfig, type Results } from "./types";
import { Viewer } from "./viewer";

export interface ViewerElement extends HTMLElement {
  /** Grey values that were drawn within the image. */
  viewerProbe?: () => Probe;
  /** Draws results that arrived since, by the ids of their images. */
  viewerResults?: (results: Results) => void;
  /** Shows the image of that id. */
  viewerChoose?: (id: number) => void;
}

function start(root: ViewerElement): void {
  try {
    const viewer = new Viewer(root, parseConfig(root.dataset["config"] ?? ""));
    root.viewerProbe = () => viewer.probe();
    root.viewerResults = (results) => viewer.setResults(results);
    root.viewerChoose = (id) => viewer.choose(id);
    void viewer.start();
  } catch (error) {
    // Without a configuration the language is unknown: take that of the page.
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
