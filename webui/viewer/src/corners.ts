/** The texts in the corners of the stage. */
import { formatValue, type ImageState, type Settings } from "./state";
import type { Translate } from "./text";

export interface CornerTexts {
  title: string;
  left: string;
  right: string;
  hint: string;
}

/** What the viewer knows beside the state of the image. */
export interface Surroundings {
  /** Position and value under the pointer. */
  hovered: string;
  /** A message that takes the place of the hint. */
  note: string;
  isDrawnByCpu: boolean;
}

/** The texts for the image on the stage, or null while there is none. */
export function cornerTexts(t: Translate, state: ImageState, settings: Settings, around: Surroundings): CornerTexts | null {
  const { window, view, meta, frame } = state;
  if (!window || !view || !meta || !frame) {
    return null;
  }
  const right = [
    around.hovered,
    meta.spacing ? "" : t("status_no_spacing"),
    frame.reduction > 1 ? t("status_reduced", { factor: frame.reduction }) : "",
    around.isDrawnByCpu ? t("status_cpu") : "",
  ];
  const left = [
    state.inverted ? t("status_inverted") : "",
    t("status_zoom", { percent: Math.round(view.scale * 100) }),
    t("status_window", { width: formatValue(window.width), center: formatValue(window.center) }),
  ];
  return {
    title: state.config.title,
    left: left.filter(Boolean).join("\n"),
    right: right.filter(Boolean).join("\n"),
    hint: around.note || (settings.mode === "measure" ? t("measure_hint") : ""),
  };
}
