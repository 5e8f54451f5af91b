/** The state of one image while the page is open: how it is shown, and what was drawn on it. */
import type { DragMode } from "./input";
import { Lengths } from "./lengths";
import { autoWindow, fullWindow, isExact, modalityValue, type Frame, type VoiWindow } from "./pixels";
import type { Translate } from "./text";
import type { FindingConfig, ImageConfig, ImageMeta, ImageResult, Point } from "./types";
import { clamp, type Extent, type View } from "./view";

export interface Preset {
  name: string;
  window: VoiWindow;
}

/** How the viewer is set, whichever image is shown. */
export interface Settings {
  mode: DragMode;
  heatmap: boolean;
  outline: boolean;
  /** Percent. */
  opacity: number;
}

export class ImageState {
  meta: ImageMeta | null = null;
  /** Number of the frame asked for, from 0. */
  frameNumber = 0;
  /** The frame on the stage and its number; they change when the next frame has arrived. */
  frame: Frame | null = null;
  shownNumber = 0;
  window: VoiWindow | null = null;
  /** Inverted by the person, in addition to MONOCHROME1. */
  inverted = false;
  view: View | null = null;
  private presetsOf: { frame: Frame; presets: Preset[] } | null = null;
  readonly lengths: Lengths;
  /** Ids of the findings whose marks are shown. */
  readonly shown: Set<number>;

  constructor(
    readonly config: ImageConfig,
    private readonly t: Translate,
  ) {
    this.lengths = new Lengths(t);
    this.shown = new Set(shownAtFirst(config.findings));
  }

  /** Takes a result that arrived; returns whether the findings changed. What a person switched on or off stays so. */
  setResult(result: ImageResult | undefined): boolean {
    const { config, shown } = this;
    const findings = result?.findings ?? [];
    const known = new Map(config.findings.map((finding) => [finding.id, finding]));
    config.unread = result?.unread ?? "";
    if (findings.length === known.size && findings.every(({ id }) => known.has(id))) {
      return false;
    }
    config.findings = findings.map((finding) => known.get(finding.id) ?? finding);
    const added = shownAtFirst(findings).filter((id) => !known.has(id));
    const present = new Set(findings.map(({ id }) => id));
    for (const id of [...shown].filter((one) => !present.has(one))) {
      shown.delete(id);
    }
    added.forEach((id) => shown.add(id));
    return true;
  }

  get extent(): Extent {
    const { rows, columns, spacing } = this.meta as ImageMeta;
    return { rows, columns, aspect: spacing ? spacing[0] / spacing[1] : 1 };
  }

  get exact(): boolean {
    return isExact(this.meta as ImageMeta);
  }

  /** Findings of the frame on the stage that are switched on. */
  visibleFindings(): FindingConfig[] {
    return this.config.findings.filter(
      (finding) => this.shown.has(finding.id) && (finding.frame ?? 0) === this.shownNumber,
    );
  }

  /** Makes sure that switching the marks on shows something: the finding with the highest score, if none is chosen. */
  showSomething(): void {
    if (this.shown.size === 0) {
      const best = [...this.config.findings].sort((a, b) => b.score - a.score)[0];
      if (best) {
        this.shown.add(best.id);
      }
    }
  }

  /** The windows on offer: those of the file, one computed, and the full range. */
  presets(): Preset[] {
    const { meta, frame } = this;
    if (!meta || !frame) {
      return [];
    }
    if (this.presetsOf?.frame === frame) {
      return this.presetsOf.presets;
    }
    const filed = meta.windows.slice(0, 3).map(([center, width], index, all) => ({
      name: all.length > 1 ? this.t("preset_file_n", { n: index + 1 }) : this.t("preset_file"),
      window: { center, width },
    }));
    const presets = [
      ...filed,
      { name: this.t("preset_auto"), window: autoWindow(frame, this.exact) },
      { name: this.t("preset_full"), window: fullWindow(frame, this.exact) },
    ];
    // Cached: the controls ask at every redraw, and the automatic window counts a quarter of a million pixels.
    this.presetsOf = { frame, presets };
    return presets;
  }

  /** Index of the first preset that equals the window, or -1. */
  activePreset(): number {
    return this.presets().findIndex(
      ({ window }) => window.center === this.window?.center && window.width === this.window.width,
    );
  }

  /** The file's first window, else the full range: the same rule as the model's pixel pipeline. */
  defaultWindow(): VoiWindow {
    const filed = this.meta?.windows[0];
    return filed ? { center: filed[0], width: filed[1] } : fullWindow(this.frame as Frame, this.exact);
  }

  /** Range of the frame in modality values. */
  get span(): number {
    const { width } = fullWindow(this.frame as Frame, true);
    return Math.max(width, Number.EPSILON);
  }

  /** Changes the window by shares of the frame's range; it stays near the values of the frame. */
  shiftWindow(widthShare: number, centerShare: number): void {
    if (!this.window || !this.frame) {
      return;
    }
    const { span } = this;
    const smallest = this.exact ? span / 10_000 : 1;
    const full = fullWindow(this.frame, true);
    const limit = Math.max(span * 4, 4);
    this.window = {
      width: clamp(this.window.width + widthShare * span, Math.min(smallest, span), Math.max(limit, this.window.width)),
      center: clamp(
        this.window.center + centerShare * span,
        Math.min(full.center - limit, this.window.center),
        Math.max(full.center + limit, this.window.center),
      ),
    };
  }

  /** The value under an image point: modality value, or the three samples of a colour pixel. */
  valueAt([x, y]: Point): string {
    const { frame } = this;
    const { rows, columns } = this.extent;
    if (!frame || x < 0 || y < 0 || x >= columns || y >= rows) {
      return "";
    }
    const at = (Math.floor(y / frame.reduction) * frame.columns + Math.floor(x / frame.reduction)) * frame.samples;
    const samples = [...frame.pixels.subarray(at, at + frame.samples)].map((value) =>
      formatValue(frame.samples === 3 ? value : modalityValue(frame, value)),
    );
    return `(${Math.floor(x)}, ${Math.floor(y)})  ${samples.join(" ")}`;
  }
}

/** The findings whose marks are shown until a person chooses: a single one, since there is nothing to choose, else the positive ones. */
function shownAtFirst(findings: readonly FindingConfig[]): number[] {
  return findings.filter((finding) => findings.length === 1 || finding.positive).map((finding) => finding.id);
}

/** A value as a short text: integers as they are, others with four significant digits. */
export function formatValue(value: number): string {
  if (Number.isInteger(value) || Math.abs(value) >= 10_000) {
    return Math.round(value).toString();
  }
  return Number(value.toPrecision(4)).toString();
}
