/**
 * The viewer of the study page: connects the box's pixels, the renderer, the marks and the controls.
 *
 * For tests and for the page around it, the element carries `data-state`, `data-renderer`, `data-image-id`,
 * `data-frame`, `data-window-center`, `data-window-width` (modality values), `data-zoom` (CSS pixels per image column),
 * `data-inverted` and `data-heatmap`, sends `viewer:rendered` after each drawing, and has `viewerProbe()`.
 */
import { actionFor } from "./actions";
import { Commands, type Host } from "./commands";
import { cornerTexts } from "./corners";
import { chooseRenderer, limitsOf, Stage, type Renderer } from "./cornerstone";
import { html } from "./dom";
import { HeatMaps } from "./heatmaps";
import { helpDialog } from "./help";
import { PointerInput } from "./input";
import { toUpright } from "./orientation";
import { Overlay } from "./overlay";
import { Corners, FrameBar, ImageList, Legend, Message, Unread } from "./panels";
import { drawnRange, type DrawnRange } from "./pixels";
import { expectedContrast, measure, type Probe } from "./probe";
import { Source } from "./source";
import { formatValue, ImageState, type Settings } from "./state";
import { translator, type Translate } from "./text";
import { Toolbar } from "./toolbar";
import { ViewerError, type Point, type Results, type ViewerConfig } from "./types";
import { clamp, fit, type Size } from "./view";

/** A frame that comes sooner than this is shown without the loading box: which would only flicker. */
const QUIET_MS = 250;

export class Viewer implements Host {
  private readonly t: Translate;
  private readonly images: ImageState[];
  readonly settings: Settings = { mode: "window", heatmap: false, outline: true, opacity: 50 };
  private readonly source: Source;
  private readonly commands = new Commands(this);
  private readonly stageBox: HTMLElement;
  private readonly picture = html("div", { class: "vw-picture" });
  private readonly overlay: Overlay;
  private readonly corners: Corners;
  private readonly unread: Unread;
  private readonly legend: Legend;
  private readonly message: Message;
  private readonly toolbar: Toolbar;
  private readonly list: ImageList;
  private readonly frameBar: FrameBar;
  readonly openHelp: () => void;
  private readonly heatMaps: HeatMaps;
  private renderer: Renderer;
  private stage: Stage | null = null;
  private current = 0;
  private loading = new AbortController();
  private note = "";
  /** A frame was put on the stage and not drawn yet. */
  private fresh = false;

  constructor(
    private readonly root: HTMLElement,
    config: ViewerConfig,
  ) {
    this.t = translator(config);
    this.images = config.images.map((image) => new ImageState(image, this.t));
    this.renderer = chooseRenderer(config.renderer ?? "auto");
    this.source = new Source(this.t, limitsOf(this.renderer));
    this.heatMaps = new HeatMaps(this.source, (failure) => this.heatChanged(failure));
    this.stageBox = html("div", {
      class: "vw-stage",
      tabindex: 0,
      role: "application",
      "aria-label": this.t("stage_label"),
    });
    this.stageBox.append(this.picture);
    this.overlay = new Overlay(this.stageBox);
    this.corners = new Corners(this.stageBox);
    this.unread = new Unread(this.stageBox);
    this.legend = new Legend(this.stageBox, this.t, (percent) => this.commands.setOpacity(percent));
    this.message = new Message(this.stageBox, this.t);
    this.toolbar = new Toolbar(this.t, {
      action: (action) => this.commands.act(action),
      preset: (number) => this.commands.preset(number),
      finding: (id) => this.commands.toggleFinding(id),
    });
    this.list = new ImageList(this.t, config.images, (index) => void this.open(index));
    this.frameBar = new FrameBar(this.t, (frame) => this.goTo(frame));
    root.classList.add("vw");
    root.setAttribute("role", "region");
    root.setAttribute("aria-label", this.t("viewer_label"));
    root.replaceChildren(this.list.root, this.toolbar.root, this.stageBox, this.frameBar.root);
    this.openHelp = helpDialog(root, this.t);
    this.listen();
  }

  /** Shows the first image. */
  async start(): Promise<void> {
    this.setState("loading");
    if (this.images.length === 0) {
      this.toolbar.root.hidden = true;
      this.frameBar.root.hidden = true;
      this.message.error(new ViewerError(this.t("error_title"), this.t("error_no_image")), null);
      this.setState("error");
      return;
    }
    await this.open(0);
    if (document.activeElement === document.body) {
      // The keys work at once, unless another part of the page has the focus.
      this.stageBox.focus({ preventScroll: true });
    }
  }

  /** The grey values that were drawn within the image. */
  probe(): Probe {
    const { stage, state } = this;
    if (!stage || !state.frame) {
      return { min: 0, max: 0, mean: 0 };
    }
    const { columns, rows } = state.extent;
    return measure(stage.canvas, stage.size, stage.imageToStage([0, 0]), stage.imageToStage([columns, rows]));
  }

  /** Draws results that arrived since, by the ids of their images: outline, buttons, or why an image was not analysed. */
  setResults(results: Results): void {
    const changed = this.images.filter((image) => image.setResult(results[String(image.config.id)]));
    this.list.mark(this.images.map(({ config }) => config));
    if (this.images.length > 0) {
      this.unread.update(this.state.config.unread ?? "");
    }
    if (changed.includes(this.state)) {
      this.toolbar.setFindings(this.state.config.findings);
      this.apply();
    }
  }

  /** Shows the image of that id, if the study has it and it is not the one shown. */
  choose(id: number): void {
    const index = this.images.findIndex(({ config }) => config.id === id);
    if (index >= 0 && index !== this.current) {
      void this.open(index);
    }
  }

  get state(): ImageState {
    return this.images[this.current] as ImageState;
  }

  /** Size of the stage, or null while no image is shown. */
  get stageSize(): Size | null {
    return this.stage && this.state?.frame ? this.stage.size : null;
  }

  toggleFullscreen(): void {
    const change = document.fullscreenElement ? document.exitFullscreen() : this.root.requestFullscreen();
    // Some phones have no full screen for elements; the image stays where it is.
    change.catch((error: unknown) => console.info("viewer: no full screen:", error));
  }

  private setState(name: "loading" | "ready" | "error"): void {
    this.root.dataset["state"] = name;
    this.root.setAttribute("aria-busy", String(name === "loading"));
  }

  private listen(): void {
    new PointerInput(this.stageBox, this.commands);
    this.root.addEventListener("keydown", (event) => {
      const action = actionFor(event);
      if (action === null) {
        return;
      }
      event.preventDefault();
      if (typeof action === "number") {
        this.commands.preset(action);
      } else {
        this.commands.act(action);
      }
    });
    new ResizeObserver(() => this.resized()).observe(this.stageBox);
  }

  // ------------------------------------------------------------------ loading

  private async open(index: number): Promise<void> {
    this.current = index;
    const { state } = this;
    this.list.update(index);
    this.toolbar.setFindings(state.config.findings);
    this.root.dataset["imageId"] = String(state.config.id);
    this.overlay.clear();
    this.unread.update(state.config.unread ?? "");
    this.note = "";
    this.commands.clearHover();
    state.frame = null;
    await this.load(0);
  }

  goTo(frame: number): void {
    const { state } = this;
    const wanted = clamp(frame, 0, (state.meta?.frames ?? 1) - 1);
    if (!state.meta || wanted === state.frameNumber) {
      return;
    }
    state.frameNumber = wanted;
    state.lengths.cancel();
    this.frameBar.update(wanted, state.meta.frames);
    void this.load(QUIET_MS);
  }

  /** Fetches and shows the frame that the state asks for; a newer call replaces an older one. */
  private async load(quietMs: number): Promise<void> {
    this.loading.abort();
    const loading = (this.loading = new AbortController());
    const { state } = this;
    const number = state.frameNumber;
    this.setState("loading");
    const timer = window.setTimeout(() => this.message.loading(), quietMs);
    try {
      state.meta = await this.source.meta(state.config, loading.signal);
      this.frameBar.update(number, state.meta.frames);
      const frame = await this.source.frame(state.config, number, loading.signal, (received, expected) =>
        this.message.progress(received, expected),
      );
      if (!loading.signal.aborted) {
        state.frame = frame;
        state.shownNumber = number;
        await this.show(loading.signal);
      }
    } catch (error) {
      if (!loading.signal.aborted) {
        this.fail(error);
      }
    } finally {
      window.clearTimeout(timer);
    }
  }

  private fail(error: unknown): void {
    if (!(error instanceof ViewerError)) {
      console.warn("viewer:", error);
    }
    const shown = error instanceof ViewerError ? error : new ViewerError(this.t("error_title"), this.t("error_draw"));
    // Do not show another frame in place of the one that failed.
    this.state.frame = null;
    this.overlay.clear();
    this.legend.update({ outline: false, heat: false }, this.settings.opacity);
    this.message.error(shown, () => void this.load(0));
    this.setState("error");
    this.updateControls();
  }

  // ------------------------------------------------------------------ drawing

  private async show(signal: AbortSignal): Promise<void> {
    const { state } = this;
    if (!state.frame) {
      return;
    }
    this.fresh = true;
    try {
      this.stage ??= new Stage(this.picture, this.renderer, () => this.rendered(), () => void this.useCpu("context lost"));
      await this.stage.show(state.frame, state.extent);
    } catch (error) {
      if (signal.aborted) {
        return;
      }
      if (this.renderer === "cpu") {
        throw error;
      }
      await this.useCpu(error);
      return;
    }
    if (signal.aborted) {
      return;
    }
    state.window ??= state.defaultWindow();
    if (!state.view || state.view.fitted) {
      state.view = fit(state.extent, this.stage.size);
    }
    this.message.hide();
    this.apply();
  }

  /** Draws without WebGL until the page is left: a lost context or a blank image will happen again. */
  private async useCpu(reason: unknown): Promise<void> {
    if (this.renderer === "cpu") {
      return;
    }
    console.info("viewer: drawing with the CPU from now on:", reason);
    this.renderer = "cpu";
    this.stage?.destroy();
    this.stage = null;
    this.source.setLimits(limitsOf("cpu"));
    await this.load(QUIET_MS);
  }

  private range(): DrawnRange | null {
    const { frame, window, exact } = this.state;
    return frame && window ? drawnRange(frame, window, exact) : null;
  }

  /** Draws the image as the state says. */
  apply(): void {
    const { stage, state } = this;
    const range = this.range();
    if (!stage || !range || !state.view || !state.meta) {
      return;
    }
    stage.apply(range, state.inverted !== state.meta.inverted, state.view);
    this.updateControls();
  }

  private rendered(): void {
    const { state, stage, root } = this;
    const range = this.range();
    if (!stage || !range || !state.meta || !state.view || !state.window) {
      return;
    }
    if (this.fresh) {
      this.fresh = false;
      if (this.renderer === "webgl" && state.view.fitted && expectedContrast(state, range) && this.isBlank()) {
        void this.useCpu("the picture came out blank");
        return;
      }
      this.setState("ready");
    }
    this.drawMarks();
    this.updateCorners();
    root.dataset["renderer"] = this.renderer;
    root.dataset["frame"] = String(state.shownNumber);
    root.dataset["windowCenter"] = formatValue(state.window.center);
    root.dataset["windowWidth"] = formatValue(state.window.width);
    root.dataset["zoom"] = state.view.scale.toFixed(4);
    root.dataset["inverted"] = String(state.inverted);
    root.dataset["heatmap"] = this.settings.heatmap ? "on" : "off";
    const detail = { imageId: state.config.id, frame: state.shownNumber };
    root.dispatchEvent(new CustomEvent("viewer:rendered", { bubbles: true, detail }));
  }

  private isBlank(): boolean {
    const { min, max } = this.probe();
    return max - min < 4;
  }

  private drawMarks(): void {
    const { stage, state, settings } = this;
    if (!stage || !state.meta || !state.frame) {
      return;
    }
    const findings = state.visibleFindings();
    const { columns, rows } = state.meta;
    const heat = settings.heatmap ? this.heatMaps.layers(findings) : [];
    const { orientation } = state.meta;
    const corner: Point = orientation.transpose ? [rows, columns] : [columns, rows];
    const project = (point: Point): Point => stage.imageToStage(point);
    const projectFile = (point: Point): Point => project(toUpright(point, orientation, { columns, rows }));
    this.overlay.draw(stage.size, corner, projectFile, project, {
      outlines: settings.outline ? findings : [],
      heat,
      opacity: settings.opacity / 100,
      lengths: state.lengths.marks(state.shownNumber, state.meta),
      crosshair: settings.mode === "measure" && state.lengths.drawing,
    });
    const outline = settings.outline && findings.some((finding) => finding.outline.length > 0);
    this.legend.update({ outline, heat: heat.length > 0 }, settings.opacity);
  }

  private heatChanged(failure: string | null): void {
    this.note = failure === null ? "" : this.t("heatmap_failed", { detail: failure });
    this.settings.heatmap &&= failure === null;
    this.apply();
  }

  private resized(): void {
    const { stage, state } = this;
    if (!stage || !state?.view || !state.frame || stage.size.width < 2 || stage.size.height < 2) {
      return;
    }
    if (state.view.fitted) {
      state.view = fit(state.extent, stage.size);
    }
    this.apply();
  }

  // ------------------------------------------------------------------ texts and buttons

  updateCorners(): void {
    const around = { hovered: this.commands.hovered(), note: this.note, isDrawnByCpu: this.renderer === "cpu" };
    const texts = cornerTexts(this.t, this.state, this.settings, around);
    if (texts) {
      this.corners.update(texts);
    }
  }

  private updateControls(): void {
    const { state, settings } = this;
    const enabled = state.frame !== null;
    this.toolbar.update({
      ...settings,
      enabled,
      inverted: state.inverted,
      presets: state.presets().map(({ name }, index) => ({ name, active: index === state.activePreset() })),
      hasLengths: enabled && state.lengths.count(state.shownNumber) > 0,
      shown: state.shown,
    });
  }
}
