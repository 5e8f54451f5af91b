/** The parts around the image: corner texts, loading and error box, list of images, frame slider, legend. */
import { colourTable } from "./colormap";
import type { CornerTexts } from "./corners";
import { html, setText, svg } from "./dom";
import { icon } from "./icons";
import type { Translate } from "./text";
import type { ImageConfig, ViewerError } from "./types";

/** The corner texts over the image. */
export class Corners {
  private readonly title = html("div", { class: "vw-corner vw-top-left" });
  private readonly left = html("div", { class: "vw-corner vw-bottom-left" });
  private readonly right = html("div", { class: "vw-corner vw-bottom-right" });
  private readonly hint = html("div", { class: "vw-hint" });

  constructor(parent: HTMLElement) {
    parent.append(this.title, this.left, this.right, this.hint);
  }

  update(texts: CornerTexts): void {
    setText(this.title, texts.title);
    setText(this.left, texts.left);
    setText(this.right, texts.right);
    setText(this.hint, texts.hint);
    this.hint.hidden = !texts.hint;
  }
}

/** A notice over an image that was not analysed: without marks it would look like an image without findings. */
export class Unread {
  private readonly box = html("p", { class: "vw-unread", role: "status" });
  private readonly words = html("span", {});

  constructor(parent: HTMLElement) {
    this.box.append(
      svg("svg", { class: "vw-icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM5.6 5.6l12.8 12.8" })),
      this.words,
    );
    parent.append(this.box);
    this.update("");
  }

  update(why: string): void {
    this.box.hidden = !why;
    setText(this.words, why);
  }
}

/** Covers the stage while no image is shown: the progress of loading, or why there is none. */
export class Message {
  private readonly box = html("div", { class: "vw-message" });
  private readonly bar = html("progress", { max: 100 });
  private readonly percent = html("span", { class: "vw-percent" });

  constructor(
    parent: HTMLElement,
    private readonly t: Translate,
  ) {
    parent.append(this.box);
    this.hide();
  }

  hide(): void {
    this.box.hidden = true;
  }

  loading(): void {
    this.box.hidden = false;
    this.box.className = "vw-message";
    this.bar.removeAttribute("value");
    setText(this.percent, "");
    this.box.replaceChildren(html("p", { role: "status" }, this.t("loading")), this.bar, this.percent);
  }

  progress(received: number, expected: number): void {
    const percent = Math.floor((received / expected) * 100);
    this.bar.value = percent;
    setText(this.percent, `${percent} %`);
  }

  /** Shows the error, with a button to try again where `retry` is given. */
  error(error: ViewerError, retry: (() => void) | null): void {
    this.box.hidden = false;
    this.box.className = "vw-message vw-error";
    const text = html("div", { role: "alert" }, html("h2", {}, error.title), html("p", {}, error.detail));
    this.box.replaceChildren(warningSign(), text);
    if (retry) {
      const button = html("button", { type: "button", class: "vw-button vw-text vw-retry" }, this.t("retry"));
      button.addEventListener("click", retry);
      this.box.append(button);
    }
  }
}

function warningSign(): SVGElement {
  return svg(
    "svg",
    { class: "vw-icon vw-warning", viewBox: "0 0 24 24", "aria-hidden": "true" },
    svg("path", { d: "M12 3.5L22 20.5H2z" }),
    svg("path", { d: "M12 10v5M12 17.5v.5" }),
  );
}

/** The images of the study, as buttons beside each other; hidden when there is one. */
export class ImageList {
  readonly root: HTMLElement;

  constructor(t: Translate, images: readonly ImageConfig[], choose: (index: number) => void) {
    this.root = html("nav", { class: "vw-images", "aria-label": t("images_label") });
    this.root.hidden = images.length < 2;
    images.forEach((image, index) => {
      const title = image.title || t("image_n", { n: index + 1 });
      const button = html("button", { type: "button", class: "vw-button vw-text vw-image" }, `${index + 1}  ${title}`);
      button.append(html("span", { class: "vw-verdict", role: "img", "aria-label": t("image_positive") }, "▲"));
      button.append(html("span", { class: "vw-no-verdict", role: "img", "aria-label": t("image_unread") }, "⊘"));
      button.addEventListener("click", () => choose(index));
      this.root.append(button);
    });
    this.mark(images);
  }

  /** Shows which images have a positive finding, and which were not analysed. */
  mark(images: readonly ImageConfig[]): void {
    images.forEach(({ findings, unread }, index) => {
      const button = this.root.children[index];
      button?.querySelector(".vw-verdict")?.toggleAttribute("hidden", !findings.some((finding) => finding.positive));
      button?.querySelector(".vw-no-verdict")?.toggleAttribute("hidden", !unread);
    });
  }

  update(current: number): void {
    [...this.root.children].forEach((button, index) => {
      button.toggleAttribute("data-current", index === current);
      button.setAttribute("aria-current", String(index === current));
    });
  }
}

/** Chooses a frame; hidden when there is one. */
export class FrameBar {
  readonly root: HTMLElement;
  private readonly slider: HTMLInputElement;
  private readonly label = html("output", { class: "vw-frame-label" });

  constructor(
    private readonly t: Translate,
    go: (frame: number) => void,
  ) {
    this.slider = html("input", { type: "range", min: 1, max: 1, step: 1, "aria-label": t("frame_label") });
    this.slider.addEventListener("input", () => go(Number(this.slider.value) - 1));
    const step = (by: number, name: "previous" | "next"): HTMLButtonElement => {
      const text = t(name === "previous" ? "frame_previous" : "frame_next");
      const key = name === "previous" ? "PageUp" : "PageDown";
      const attributes = { type: "button", class: "vw-button", "aria-label": text, "data-tip": `${text}  ${key}` };
      const button = html("button", { ...attributes, "aria-keyshortcuts": key }, icon(name));
      button.addEventListener("click", () => go(Number(this.slider.value) - 1 + by));
      return button;
    };
    this.root = html("div", { class: "vw-frames" }, step(-1, "previous"), this.slider, step(1, "next"), this.label);
    this.root.hidden = true;
  }

  update(frame: number, total: number): void {
    this.root.hidden = total < 2;
    this.slider.max = String(total);
    this.slider.value = String(frame + 1);
    const words = this.t("frame_of", { n: frame + 1, total });
    this.slider.setAttribute("aria-valuetext", words);
    setText(this.label, words);
  }
}

/** What the lines over the image mean, what the colours of the heat map mean, and how opaque they are. */
export class Legend {
  private readonly root: HTMLElement;
  private readonly lines: HTMLElement;
  private readonly colours: HTMLElement;
  private readonly slider: HTMLInputElement;
  private readonly percent = html("output", { class: "vw-percent" });

  constructor(parent: HTMLElement, t: Translate, setOpacity: (percent: number) => void) {
    const label = t("heatmap_opacity");
    this.slider = html("input", { type: "range", min: 0, max: 100, step: 5, "aria-label": label });
    this.slider.addEventListener("input", () => setOpacity(Number(this.slider.value)));
    this.lines = html("p", { class: "vw-lines" }, t("outline_legend"));
    this.colours = html(
      "div",
      { class: "vw-colours", role: "group", "aria-label": t("heatmap") },
      html("span", {}, t("heatmap_legend")),
      html("span", { class: "vw-legend" }, t("heatmap_low"), colourScale(), t("heatmap_high")),
      html("span", { class: "vw-opacity" }, html("span", { "aria-hidden": "true" }, label), this.slider, this.percent),
    );
    this.root = html("div", { class: "vw-corner vw-top-right" }, this.lines, this.colours);
    parent.append(this.root);
    this.update({ outline: false, heat: false }, 0);
  }

  update(shown: { outline: boolean; heat: boolean }, opacity: number): void {
    this.root.hidden = !shown.outline && !shown.heat;
    this.lines.hidden = !shown.outline;
    this.colours.hidden = !shown.heat;
    this.slider.value = String(opacity);
    setText(this.percent, `${opacity} %`);
  }
}

function colourScale(): HTMLCanvasElement {
  const scale = html("canvas", { width: 128, height: 1, class: "vw-scale", "aria-hidden": "true" });
  const context = scale.getContext("2d");
  const colours = colourTable();
  for (let x = 0; x < 128 && context; x++) {
    const [r, g, b, a] = colours.subarray(x * 8, x * 8 + 4) as unknown as [number, number, number, number];
    context.fillStyle = `rgba(${r},${g},${b},${a / 255})`;
    context.fillRect(x, 0, 1, 1);
  }
  return scale;
}
