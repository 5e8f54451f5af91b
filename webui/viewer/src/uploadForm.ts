/** The patient form for pictures (PNG, JPEG): they hold no patient data, so a person enters it before anything is sent. */
import { html, setText } from "./dom";
import type { Named } from "./uploadFiles";
import { fillIn, type Texts } from "./uploadRow";

const THUMBNAILS = 24;
const VIEWS = ["PA", "AP", "LL"] as const;

export class PictureForm {
  private pictures: Named[] = [];
  /** The view chosen for a single picture; the others take the one of the form. */
  private readonly views = new Map<Named, string>();
  private readonly thumbs: HTMLElement;
  private readonly error: HTMLElement;

  constructor(
    private readonly form: HTMLFormElement,
    private readonly texts: Texts,
    onSubmit: (pictures: Named[], form: string) => void,
    private readonly onChange: () => void,
  ) {
    this.thumbs = form.querySelector("#thumbs") as HTMLElement;
    this.error = form.querySelector("#form-error") as HTMLElement;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const values = this.values();
      if (this.valid(values)) {
        const pictures = this.pictures.map((picture) => [picture, this.viewOf(picture, values)] as const);
        this.clear();
        for (const view of VIEWS) {
          const same = pictures.filter(([, own]) => own === view).map(([picture]) => picture);
          if (same.length > 0) {
            onSubmit(same, JSON.stringify({ ...values, view }));
          }
        }
      }
    });
    form.addEventListener("input", () => this.error.hidden || this.valid(this.values(), false));
    form.querySelector("#drop-pictures")?.addEventListener("click", () => this.clear());
  }

  /** Adds pictures to the form, and shows it. */
  add(pictures: readonly Named[]): void {
    if (pictures.length > 0) {
      this.pictures.push(...pictures);
      this.draw();
      this.form.hidden = false;
      this.form.scrollIntoView({ block: "nearest" });
      this.form.querySelector<HTMLInputElement>("#patient_name")?.focus();
    }
  }

  /** The number of pictures that wait for the form. */
  get waiting(): number {
    return this.pictures.length;
  }

  private viewOf(picture: Named, values: Record<string, string>): string {
    return this.views.get(picture) || values["view"] || "";
  }

  private clear(): void {
    this.pictures = [];
    this.views.clear();
    this.draw();
    this.form.reset();
    this.form.hidden = true;
  }

  private values(): Record<string, string> {
    const values: Record<string, string> = {};
    for (const [name, value] of new FormData(this.form)) {
      values[name] = String(value).trim();
    }
    return values;
  }

  /** Checks the rules of the box before anything is sent, and marks the fields that break them. */
  private valid(values: Record<string, string>, moveFocus = true): boolean {
    const nameless = !values["patient_name"] && !values["patient_id"];
    const isNamed = (name: string): boolean => !nameless && !/[\\=]/.test(values[name] ?? "");
    const checks: [string, boolean][] = [
      ["#patient_name", isNamed("patient_name")],
      ["#patient_id", isNamed("patient_id")],
      ["#age", /^\d{0,3}$/.test(values["age"] ?? "") && !(values["age_unit"] === "years" && Number(values["age"]) > 130)],
      ["#view-field", this.pictures.every((picture) => this.viewOf(picture, values))],
    ];
    let first: HTMLElement | null = null;
    for (const [selector, isRight] of checks) {
      const field = this.form.querySelector<HTMLElement>(selector);
      field?.classList.toggle("is-wrong", !isRight);
      field?.setAttribute("aria-invalid", String(!isRight));
      if (!isRight) {
        first ??= field?.querySelector("input") ?? field;
      }
    }
    this.error.hidden = first === null;
    if (moveFocus) {
      first?.focus();
    }
    return first === null;
  }

  private draw(): void {
    this.thumbs.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
    this.thumbs.replaceChildren(...this.pictures.slice(0, THUMBNAILS).map((picture) => this.thumb(picture)));
    const more = this.pictures.length - THUMBNAILS;
    if (more > 0) {
      this.thumbs.append(html("li", {}, html("span", {}, `+ ${fillIn(this.texts["pictures"], { n: more })}`)));
    }
    this.onChange();
  }

  private thumb(picture: Named): HTMLLIElement {
    const image = html("img", { alt: "", src: URL.createObjectURL(picture.file) });
    const remove = html("button", { type: "button", "aria-label": `${this.texts["remove"]}: ${picture.name}` });
    setText(remove, this.texts["remove"] ?? "");
    remove.addEventListener("click", () => {
      this.pictures = this.pictures.filter((item) => item !== picture);
      this.views.delete(picture);
      this.draw();
      this.form.hidden = this.pictures.length === 0;
    });
    const entry = html("li", {}, image, html("span", {}, html("bdi", {}, picture.name)));
    if (this.pictures.length > 1) {
      entry.append(this.viewChoice(picture));
    }
    entry.append(remove);
    return entry;
  }

  /** The view of this one picture: a frontal and a lateral film of one patient are uploaded together. */
  private viewChoice(picture: Named): HTMLSelectElement {
    const choice = html("select", { class: "view-choice", "aria-label": `${this.texts["view"]}: ${picture.name}` });
    for (const view of ["", ...VIEWS]) {
      choice.append(html("option", { value: view }, this.texts[view ? `view_${view}` : "view_as_below"] ?? view));
    }
    choice.value = this.views.get(picture) ?? "";
    choice.addEventListener("change", () => this.views.set(picture, choice.value));
    return choice;
  }
}
