/** What the gestures, keys and buttons do to the image on the stage. */
import type { Action } from "./actions";
import type { DragMode, Gestures } from "./input";
import type { ImageState, Settings } from "./state";
import type { Point } from "./types";
import { fit, panBy, toImage, zoomAt, type Size } from "./view";

/** What the commands need of the viewer. */
export interface Host {
  readonly state: ImageState;
  readonly settings: Settings;
  /** Null while no image is shown. */
  readonly stageSize: Size | null;
  /** Draws again and brings the controls up to date. */
  apply(): void;
  updateCorners(): void;
  goTo(frame: number): void;
  openHelp(): void;
  toggleFullscreen(): void;
}

/** One key press: share of the window, CSS pixels of a pan, factor of a zoom. */
const KEY_WINDOW = 0.1;
const KEY_PAN = 40;
const KEY_ZOOM = 1.2;
/** CSS pixels of a drag that pass through the full range of the frame. */
const WINDOW_DRAG = 700;

const MODES: Partial<Record<Action, DragMode>> = { modeWindow: "window", modePan: "pan", modeMeasure: "measure" };

export class Commands implements Gestures {
  private hoverAt: Point | null = null;

  constructor(private readonly host: Host) {}

  // ------------------------------------------------------------------ gestures

  mode(): DragMode {
    return this.host.settings.mode;
  }

  dragWindow(dx: number, dy: number): void {
    if (this.host.stageSize) {
      this.host.state.shiftWindow(dx / WINDOW_DRAG, dy / WINDOW_DRAG);
      this.host.apply();
    }
  }

  dragPan(dx: number, dy: number): void {
    const { state, stageSize } = this.host;
    if (stageSize && state.view) {
      state.view = panBy(state.view, state.extent, dx, dy);
      this.followCentre();
      this.host.apply();
    }
  }

  zoom(factor: number, at: Point): void {
    const { state, stageSize } = this.host;
    if (stageSize && state.view) {
      state.view = zoomAt(state.view, state.extent, stageSize, factor, at);
      this.host.apply();
    }
  }

  scroll(frames: number): void {
    this.host.goTo(this.host.state.frameNumber + frames);
  }

  scrolls(): boolean {
    return (this.host.state.meta?.frames ?? 1) > 1;
  }

  measureStart(at: Point): void {
    this.measure((point) => this.host.state.lengths.start(point), at);
  }

  measureMove(at: Point): void {
    this.measure((point) => this.host.state.lengths.move(point), at);
  }

  measureEnd(at: Point): void {
    const { lengths, shownNumber } = this.host.state;
    this.measure((point) => {
      lengths.move(point);
      lengths.finish(shownNumber);
    }, at);
  }

  measureCancel(): void {
    this.host.state.lengths.cancel();
    this.host.apply();
  }

  hover(at: Point | null): void {
    this.hoverAt = at;
    if (this.host.stageSize) {
      this.host.updateCorners();
    }
  }

  clearHover(): void {
    this.hoverAt = null;
  }

  /** Position and value under the pointer, as text. */
  hovered(): string {
    const point = this.hoverAt && this.imagePoint(this.hoverAt);
    return point ? this.host.state.valueAt(point) : "";
  }

  // ------------------------------------------------------------------ buttons and keys

  act(action: Action): void {
    if (action === "help") {
      this.host.openHelp();
    } else if (action === "fullscreen") {
      this.host.toggleFullscreen();
    } else if (!this.actOnFrames(action) && this.host.stageSize) {
      this.actOnImage(action, this.host.stageSize);
      this.host.apply();
    }
  }

  /** Chooses a window by its number in the list of presets, from 1. */
  preset(number: number): void {
    const { state } = this.host;
    const preset = state.presets()[number - 1];
    if (preset) {
      state.window = preset.window;
      this.host.apply();
    }
  }

  setOpacity(percent: number): void {
    this.host.settings.opacity = percent;
    this.host.apply();
  }

  /** Shows or hides the marks of one finding. */
  toggleFinding(id: number): void {
    const { shown } = this.host.state;
    if (!shown.delete(id)) {
      shown.add(id);
      // Choosing a finding while everything is hidden would seem to have no effect.
      this.host.settings.outline ||= !this.host.settings.heatmap;
    }
    this.host.apply();
  }

  /** Turns frames; works also where a frame could not be shown. */
  private actOnFrames(action: Action): boolean {
    const { state } = this.host;
    const targets: Partial<Record<Action, number>> = {
      framePrevious: state.frameNumber - 1,
      frameNext: state.frameNumber + 1,
      frameFirst: 0,
      frameLast: Infinity,
    };
    const target = targets[action];
    if (target === undefined) {
      return false;
    }
    this.host.goTo(target);
    return true;
  }

  private actOnImage(action: Action, stage: Size): void {
    const { state, settings } = this.host;
    const middle: Point = [stage.width / 2, stage.height / 2];
    const width = state.window?.width ?? 0;
    const share = (KEY_WINDOW * width) / state.span;
    const effects: Partial<Record<Action, () => void>> = {
      narrower: () => state.shiftWindow(-share, 0),
      wider: () => state.shiftWindow(share, 0),
      lower: () => state.shiftWindow(0, -share / 2),
      higher: () => state.shiftWindow(0, share / 2),
      zoomIn: () => this.zoom(KEY_ZOOM, middle),
      zoomOut: () => this.zoom(1 / KEY_ZOOM, middle),
      fit: () => (state.view = fit(state.extent, stage)),
      invert: () => (state.inverted = !state.inverted),
      reset: () => this.reset(stage),
      panLeft: () => this.dragPan(KEY_PAN, 0),
      panRight: () => this.dragPan(-KEY_PAN, 0),
      panUp: () => this.dragPan(0, KEY_PAN),
      panDown: () => this.dragPan(0, -KEY_PAN),
      heatmap: () => this.toggle("heatmap"),
      outline: () => this.toggle("outline"),
      lengthEnd: () => this.lengthEnd(),
      lengthDelete: () => state.lengths.removeLast(state.shownNumber),
      lengthClear: () => state.lengths.clear(state.shownNumber),
      escape: () => state.lengths.cancel(),
    };
    const mode = MODES[action];
    if (mode) {
      settings.mode = mode;
      state.lengths.cancel();
    }
    effects[action]?.();
  }

  private reset(stage: Size): void {
    const { state } = this.host;
    state.window = state.defaultWindow();
    state.inverted = false;
    state.view = fit(state.extent, stage);
  }

  private toggle(layer: "heatmap" | "outline"): void {
    const { state, settings } = this.host;
    if (state.config.findings.length > 0) {
      settings[layer] = !settings[layer];
      if (settings[layer]) {
        state.showSomething();
      }
    }
  }

  // ------------------------------------------------------------------ measuring

  private imagePoint(at: Point): Point | null {
    const { state, stageSize } = this.host;
    return stageSize && state.view ? toImage(state.view, state.extent, stageSize, at) : null;
  }

  private measure(step: (point: Point) => void, at: Point): void {
    const point = this.imagePoint(at);
    if (point) {
      step(point);
      this.host.apply();
    }
  }

  /** Sets an end of a length at the middle of the stage: measuring without a mouse. */
  private lengthEnd(): void {
    const { state, settings } = this.host;
    if (settings.mode !== "measure" || !state.view) {
      return;
    }
    const middle: Point = [state.view.x, state.view.y];
    if (state.lengths.drawing) {
      state.lengths.move(middle);
      state.lengths.finish(state.shownNumber);
    } else {
      state.lengths.start(middle);
    }
  }

  /** A length begun with the keyboard ends in the middle of the stage, wherever the image is moved to. */
  private followCentre(): void {
    const { state } = this.host;
    if (state.lengths.drawing && state.view) {
      state.lengths.move([state.view.x, state.view.y]);
    }
  }
}
