/** One row of the list of files: name, progress, state in words, and in the end the outcome. */
import { html, setText } from "./dom";
import type { Outcome } from "./uploadTransfer";

/** More outcomes than this (a ZIP) are folded, except those that need attention. */
const SHOWN_OUTCOMES = 12;

export type Texts = Readonly<Record<string, string>>;

/** Replaces each `{name}` in a text by its value. */
export function fillIn(text: string | undefined, values: Readonly<Record<string, string | number>>): string {
  return (text ?? "").replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole));
}

export class Row {
  readonly node = html("li", { class: "upload-file" });
  /** Something was refused or conflicts: the page shows this row first when all is done. */
  needsAttention = false;
  private readonly bar = html("progress", { max: 1, value: 0 });
  private readonly state = html("span", { class: "file-state" });
  private readonly button = html("button", { type: "button" });

  constructor(
    private readonly texts: Texts,
    private readonly name: string,
    onCancel: () => void,
  ) {
    this.bar.setAttribute("aria-label", name);
    this.button.addEventListener("click", onCancel);
    setText(this.button, texts["cancel"] ?? "");
    this.button.setAttribute("aria-label", `${texts["cancel"]}: ${name}`);
    this.node.append(html("span", { class: "file-name" }, html("bdi", {}, name)), this.bar, this.state, this.button);
    this.showState("waiting");
  }

  /** Shows a state by the key of its text. */
  showState(key: string, values: Readonly<Record<string, string | number>> = {}): void {
    this.node.dataset["state"] = key;
    setText(this.state, fillIn(this.texts[key], values));
  }

  /** Shows how much is sent, 0 to 1. */
  showSent(part: number): void {
    this.bar.value = part;
    this.node.dataset["state"] = "sending";
    setText(this.state, `${this.texts["sending"]} ${Math.floor(part * 100)} %`);
  }

  /** Shows the outcome of the file, or of every file in the archive. */
  showOutcomes(outcomes: readonly Outcome[]): void {
    this.close("done");
    const [only] = outcomes;
    if (outcomes.length === 1 && only && only.name === this.name && only.url && !only.reason) {
      setText(this.state, only.word);
      this.node.append(this.link(only));
      return;
    }
    const list = html("ul", { class: "outcomes" });
    const folded = outcomes.length > SHOWN_OUTCOMES ? html("ul", { class: "outcomes" }) : list;
    for (const outcome of outcomes) {
      const isStored = outcome.result === "stored" || outcome.result === "duplicate";
      (isStored ? folded : list).append(this.outcome(outcome));
    }
    if (folded !== list) {
      const count = `${this.texts["stored"]} (${folded.childElementCount})`;
      list.append(html("li", {}, html("details", {}, html("summary", {}, count), folded)));
    }
    this.needsAttention = outcomes.some((outcome) => outcome.result === "refused" || outcome.result === "conflict");
    setText(this.state, only && outcomes.length === 1 ? only.word : fillIn(this.texts["checked"], { n: outcomes.length }));
    this.node.append(list);
  }

  /** Shows why the file was not taken. */
  showRefused(word: string, reason: string, hint: string): void {
    this.close("refused");
    this.needsAttention = true;
    setText(this.state, word);
    this.node.append(html("ul", { class: "outcomes" }, html("li", { class: "is-refused" }, html("span", { class: "reason" }, `${reason} ${hint}`))));
  }

  /** Shows that the person cancelled the upload. */
  showCancelled(): void {
    this.close("called_off");
    this.showState("called_off");
  }

  private close(state: string): void {
    this.node.dataset["state"] = state;
    this.bar.remove();
    this.button.remove();
    this.node.querySelector(".outcomes")?.remove();
  }

  private link(outcome: Outcome): HTMLAnchorElement {
    return html("a", { class: "open", href: outcome.url, "aria-label": `${this.texts["open"]}: ${outcome.name}` }, this.texts["open"] ?? "");
  }

  private outcome(outcome: Outcome): HTMLLIElement {
    const entry = html("li", { class: `is-${outcome.result}` });
    if (outcome.name !== this.name) {
      entry.append(html("span", { class: "file-name" }, html("bdi", {}, outcome.name.replace(`${this.name}!/`, ""))), html("span", {}, outcome.word));
    }
    if (outcome.url) {
      entry.append(this.link(outcome));
    }
    if (outcome.reason) {
      entry.append(html("span", { class: "reason" }, `${outcome.reason}${outcome.hint ? ` – ${outcome.hint}` : ""}`));
    }
    return entry;
  }
}
