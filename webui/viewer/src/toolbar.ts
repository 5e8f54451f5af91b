/**
 * The toolbar: every function as a visible button with its name, its key and its state.
 *
 * Its role is a group and not a toolbar: there the arrow keys would have to move between the buttons, and here they
 * move the image.
 */
import type { Action } from "./actions";
import { html } from "./dom";
import { icon, type IconName } from "./icons";
import type { DragMode } from "./input";
import type { TextKey, Translate } from "./text";
import type { FindingConfig } from "./types";

export interface ToolbarState {
  mode: DragMode;
  presets: readonly { name: string; active: boolean }[];
  inverted: boolean;
  heatmap: boolean;
  outline: boolean;
  hasLengths: boolean;
  enabled: boolean;
  /** Ids of the findings whose marks are shown. */
  shown: ReadonlySet<number>;
}

export interface ToolbarEvents {
  action(action: Action): void;
  preset(number: number): void;
  finding(id: number): void;
}

interface ButtonSpec {
  action: Action;
  icon: IconName;
  text: TextKey;
  /** As on the keyboard; shown in the tooltip. */
  key?: string;
  /** Has an on and an off state. */
  toggle?: boolean;
}

const MODES: readonly ButtonSpec[] = [
  { action: "modeWindow", icon: "window", text: "tool_window", key: "W", toggle: true },
  { action: "modePan", icon: "pan", text: "tool_pan", key: "P", toggle: true },
  { action: "modeMeasure", icon: "measure", text: "tool_measure", key: "M", toggle: true },
];
const VIEW: readonly ButtonSpec[] = [
  { action: "zoomOut", icon: "zoomOut", text: "zoom_out", key: "-" },
  { action: "zoomIn", icon: "zoomIn", text: "zoom_in", key: "+" },
  { action: "fit", icon: "fit", text: "fit", key: "0" },
  { action: "invert", icon: "invert", text: "invert", key: "I", toggle: true },
  { action: "reset", icon: "reset", text: "reset", key: "R" },
];
const MARKS: readonly ButtonSpec[] = [
  { action: "outline", icon: "outline", text: "outline", key: "O", toggle: true },
  { action: "heatmap", icon: "heatmap", text: "heatmap", key: "H", toggle: true },
];
const PAGE: readonly ButtonSpec[] = [
  { action: "fullscreen", icon: "fullscreen", text: "fullscreen", key: "F" },
  { action: "help", icon: "help", text: "help", key: "?" },
];

export class Toolbar {
  readonly root: HTMLElement;
  private readonly buttons = new Map<Action, HTMLButtonElement>();
  private readonly presets: HTMLElement;
  private readonly marks: HTMLElement;
  private readonly chips = html("span", { class: "vw-group vw-chips", role: "group" });

  constructor(
    private readonly t: Translate,
    private readonly events: ToolbarEvents,
  ) {
    this.presets = html("span", { class: "vw-group", role: "group", hidden: true, "aria-label": t("presets_label") });
    this.chips.setAttribute("aria-label", t("findings_label"));
    const clear = this.button({ action: "lengthClear", icon: "clear", text: "measure_clear" });
    const modes = this.group(MODES, t("mode_label"));
    modes.append(clear);
    this.marks = this.group(MARKS);
    this.marks.append(this.chips);
    this.root = html("div", { class: "vw-toolbar", role: "group", "aria-label": t("toolbar_label") });
    this.root.append(modes, this.presets, this.group(VIEW), this.marks, this.group(PAGE));
  }

  /** Shows the buttons of an image's findings; several findings can be shown one by one. */
  setFindings(findings: readonly FindingConfig[]): void {
    this.marks.hidden = findings.length === 0;
    this.chips.hidden = findings.length < 2;
    this.chips.replaceChildren(...findings.map((finding) => this.chip(finding)));
  }

  update(state: ToolbarState): void {
    const pressed: Partial<Record<Action, boolean>> = {
      modeWindow: state.mode === "window",
      modePan: state.mode === "pan",
      modeMeasure: state.mode === "measure",
      invert: state.inverted,
      heatmap: state.heatmap,
      outline: state.outline,
    };
    for (const [action, button] of this.buttons) {
      const on = pressed[action];
      if (on !== undefined) {
        button.setAttribute("aria-pressed", String(on));
      }
      button.disabled = !state.enabled && action !== "help" && action !== "fullscreen";
    }
    const clear = this.buttons.get("lengthClear");
    if (clear) {
      // Not hidden: a toolbar that changes its width can change its height, and with it the size of the image.
      clear.disabled ||= !state.hasLengths;
    }
    this.updatePresets(state);
    for (const chip of this.chips.querySelectorAll("button")) {
      chip.setAttribute("aria-pressed", String(state.shown.has(Number(chip.dataset["finding"]))));
    }
  }

  private updatePresets({ presets, enabled }: ToolbarState): void {
    // Built again only when their names change, or a button would lose the focus at every redraw.
    const names = presets.map((preset) => preset.name).join("\n");
    if (this.presets.dataset["names"] !== names) {
      this.presets.dataset["names"] = names;
      this.presets.hidden = presets.length === 0;
      this.presets.replaceChildren(
        ...presets.map(({ name }, index) => {
          const button = html("button", { type: "button", class: "vw-button vw-text", "data-tip": `${name}  ${index + 1}` });
          button.append(name);
          button.setAttribute("aria-keyshortcuts", String(index + 1));
          button.addEventListener("click", () => this.events.preset(index + 1));
          return button;
        }),
      );
    }
    presets.forEach(({ active }, index) => {
      const button = this.presets.children[index] as HTMLButtonElement;
      button.setAttribute("aria-pressed", String(active));
      button.disabled = !enabled;
    });
  }

  private group(specs: readonly ButtonSpec[], label?: string): HTMLElement {
    return html(
      "span",
      { class: "vw-group", role: "group", "aria-label": label },
      ...specs.map((spec) => this.button(spec)),
    );
  }

  private button(spec: ButtonSpec): HTMLButtonElement {
    const name = this.t(spec.text);
    const button = html(
      "button",
      {
        type: "button",
        class: "vw-button",
        "data-action": spec.action,
        "aria-label": name,
        "aria-pressed": spec.toggle ? "false" : undefined,
        "aria-keyshortcuts": spec.key,
        "data-tip": spec.key ? `${name}  ${spec.key}` : name,
      },
      icon(spec.icon),
      html("span", { class: "vw-name", "aria-hidden": "true" }, name),
    );
    button.addEventListener("click", () => this.events.action(spec.action));
    this.buttons.set(spec.action, button);
    return button;
  }

  private chip(finding: FindingConfig): HTMLButtonElement {
    const verdict = this.t(finding.positive ? "finding_positive" : "finding_below");
    const words = {
      label: finding.label,
      score: finding.score.toFixed(2),
      threshold: finding.threshold.toFixed(2),
      verdict,
    };
    const button = html(
      "button",
      {
        type: "button",
        class: finding.positive ? "vw-button vw-text vw-chip vw-positive" : "vw-button vw-text vw-chip",
        "aria-label": this.t("finding_chip", words),
        "data-tip": verdict,
        "data-finding": finding.id,
      },
      html("span", { class: "vw-verdict", "aria-hidden": "true" }, finding.positive ? "▲" : "▽"),
      `${finding.label} ${words.score}`,
    );
    button.addEventListener("click", () => this.events.finding(finding.id));
    return button;
  }
}
