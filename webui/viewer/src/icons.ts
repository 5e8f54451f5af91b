/** The toolbar's icons: strokes on a 24 x 24 grid, drawn for this project. */
import { svg } from "./dom";

const PATHS = {
  window: ["M12 3a9 9 0 1 0 0 18a9 9 0 0 0 0-18z", "M12 3v18", "M12 8h6.5M12 12h9M12 16h6.5"],
  pan: ["M12 3v18M3 12h18", "M9 6l3-3l3 3M9 18l3 3l3-3M6 9l-3 3l3 3M18 9l3 3l-3 3"],
  measure: ["M4 20L20 4", "M2.5 16.5l5 5M16.5 2.5l5 5", "M9 12l2 2M12 9l2 2"],
  clear: ["M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13", "M10.5 11v5M13.5 11v5"],
  zoomIn: ["M10.5 4a6.5 6.5 0 1 0 0 13a6.5 6.5 0 0 0 0-13z", "M15.5 15.5L21 21", "M7.5 10.5h6M10.5 7.5v6"],
  zoomOut: ["M10.5 4a6.5 6.5 0 1 0 0 13a6.5 6.5 0 0 0 0-13z", "M15.5 15.5L21 21", "M7.5 10.5h6"],
  fit: ["M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5", "M9 9h6v6H9z"],
  invert: ["M4 4h16v16H4z", "M4 20L20 4", "M14 15h3M7 8.5h3M8.5 7v3"],
  reset: ["M5 12a7 7 0 1 0 2.5-5.400", "M4 4v5h5"],
  heatmap: ["M12 3c4 4 6 6.5 6 10a6 6 0 0 1-12 0c0-2 1-3.5 2.5-5c.5 2 1.5 3 2.5 3c-.5-3 0-5.5 1-8z"],
  outline: ["M7 4.5c4-2 9-.5 11 3.5s1 9-3 11s-8 .5-10-3.5s-2-9 2-11z"],
  fullscreen: ["M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5"],
  help: ["M4 6h16v12H4z", "M7 10h.01M10.5 10h.01M14 10h.01M17 10h.01M8 14h8"],
  previous: ["M15 5l-7 7l7 7"],
  next: ["M9 5l7 7l-7 7"],
} as const;

export type IconName = keyof typeof PATHS;

/** An icon that takes the colour of the text beside it and says nothing to a screen reader. */
export function icon(name: IconName): SVGElement {
  return svg(
    "svg",
    { class: "vw-icon", viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false" },
    ...PATHS[name].map((d) => svg("path", { d })),
  );
}
