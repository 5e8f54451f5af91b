/** The list of keys and gestures, as a modal dialog that the browser itself keeps the focus in. */
import { html } from "./dom";
import type { TextKey, Translate } from "./text";

const GESTURES: readonly (readonly [TextKey, TextKey])[] = [
  ["help_mouse_left", "help_mouse_left_does"],
  ["help_mouse_pan", "help_mouse_pan_does"],
  ["help_mouse_zoom", "help_mouse_zoom_does"],
  ["help_wheel", "help_wheel_does"],
  ["help_touch", "help_touch_does"],
];
const KEYS: readonly (readonly [keys: string | TextKey, does: TextKey])[] = [
  ["W", "tool_window"],
  ["P", "tool_pan"],
  ["M", "tool_measure"],
  ["Delete", "help_delete"],
  ["1 2 3 …", "presets_label"],
  ["[  ]", "help_width"],
  [";  '", "help_level"],
  ["+", "zoom_in"],
  ["-", "zoom_out"],
  ["0", "fit"],
  ["help_arrows", "tool_pan"],
  ["I", "invert"],
  ["R", "reset"],
  ["O", "outline"],
  ["H", "heatmap"],
  ["PageUp  PageDown", "help_frames"],
  ["F", "fullscreen"],
  ["?", "help"],
];

/** Builds the dialog inside `parent`; the function it returns opens it. */
export function helpDialog(parent: HTMLElement, t: Translate): () => void {
  const keyName = (key: string): string => (key === "help_arrows" ? t("help_arrows") : key);
  const row = (left: Node, right: string): HTMLElement => html("div", { class: "vw-help-row" }, html("dt", {}, left), html("dd", {}, right));
  const close = html("button", { type: "button", class: "vw-button vw-text", autofocus: true }, t("help_close"));
  const dialog = html(
    "dialog",
    { class: "vw-help", "aria-label": t("help_title") },
    html("div", { class: "vw-help-head" }, html("h2", {}, t("help_title")), close),
    html("dl", {}, ...GESTURES.map(([what, does]) => row(document.createTextNode(t(what)), t(does)))),
    html("dl", { class: "vw-help-keys" }, ...KEYS.map(([keys, does]) => row(html("kbd", {}, keyName(keys)), t(does)))),
    html("p", {}, t("help_note_focus"), " ", t("help_note_measure")),
  );
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    // A click on the dialog element itself is a click on its backdrop: the content covers the rest.
    if (event.target === dialog) {
      dialog.close();
    }
  });
  parent.append(dialog);
  return () => dialog.showModal();
}
