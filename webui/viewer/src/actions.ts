/** Everything a person can make the viewer do by key or button, and the keys. */

export type Action =
  | "modeWindow"
  | "modePan"
  | "modeMeasure"
  | "narrower"
  | "wider"
  | "lower"
  | "higher"
  | "zoomIn"
  | "zoomOut"
  | "fit"
  | "invert"
  | "reset"
  | "panLeft"
  | "panRight"
  | "panUp"
  | "panDown"
  | "heatmap"
  | "outline"
  | "framePrevious"
  | "frameNext"
  | "frameFirst"
  | "frameLast"
  | "fullscreen"
  | "help"
  | "lengthEnd"
  | "lengthDelete"
  | "lengthClear"
  | "escape";

/** Keys by `KeyboardEvent.key`; a Chinese input method sends its own punctuation for the same keys. */
const KEYS: Readonly<Record<string, Action>> = {
  w: "modeWindow",
  p: "modePan",
  m: "modeMeasure",
  "[": "narrower",
  "【": "narrower",
  "]": "wider",
  "】": "wider",
  ";": "lower",
  "；": "lower",
  "'": "higher",
  "‘": "higher",
  "’": "higher",
  "+": "zoomIn",
  "=": "zoomIn",
  "-": "zoomOut",
  "0": "fit",
  i: "invert",
  r: "reset",
  ArrowLeft: "panLeft",
  ArrowRight: "panRight",
  ArrowUp: "panUp",
  ArrowDown: "panDown",
  h: "heatmap",
  o: "outline",
  PageUp: "framePrevious",
  PageDown: "frameNext",
  Home: "frameFirst",
  End: "frameLast",
  f: "fullscreen",
  "?": "help",
  "？": "help",
  Enter: "lengthEnd",
  Delete: "lengthDelete",
  Backspace: "lengthDelete",
  Escape: "escape",
};

/** Keys that a slider or a field uses itself while it has the focus, and those that a button does. */
const FIELD_KEYS = /^(Arrow\w+|Page\w+|Home|End|Enter|Backspace|Delete| )$/;
const BUTTON_KEYS = /^(Enter| )$/;

/** What a key press means, "preset" with a number for 1 to 9, or null when it is not for the viewer. */
export function actionFor(event: KeyboardEvent): Action | number | null {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) {
    return null;
  }
  const target = event.target as Element | null;
  if (target?.closest("dialog")) {
    return null;
  }
  if (target?.closest("input, select, textarea") && FIELD_KEYS.test(event.key)) {
    return null;
  }
  if (target?.closest("button, a, summary") && BUTTON_KEYS.test(event.key)) {
    return null;
  }
  if (/^[1-9]$/.test(event.key)) {
    return Number(event.key);
  }
  return KEYS[event.key] ?? KEYS[event.key.toLowerCase()] ?? null;
}
