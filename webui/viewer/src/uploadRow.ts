/** One line of the list of files: name, progress, state in words, and in the end what became of it. */
import { html, setText } from "./dom";
import type { Outcome } from "./uploadTransfer";

/** More outcomes than this (a ZIP) are folded away, except those that need a person. */
const SHOWN_OUTCOMES = 12;

export type Texts = Readonly<Record<string, string>>;

/** Fills `{name}` in a text. */
export function filled(text: string | undefined, values: Readonly<Record<string, string | number>>): string {
  return (text ?? "").replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole));
}

export class Row {
  readonly node = html("li", { class: "upload-file" });
  /** Something was refused or conflicts: the page shows this line first when all is done. */
  needsAPerson = false;
  private readonly bar = html("progress", { max: 1, value: 0 });
  private readonly state = html("span", { class: "file-state" });
  private readonly button = html("button", { type: "button" });

  constructor(
    private readonly texts: Texts,
    private readonly name: string,
    calledOff: () => void,
  ) {
    this.bar.setAttribute("aria-label", name);
    this.button.addEventListener("click", calledOff);
    setText(this.button, texts["cancel"] ?? "");
    this.button.setAttribute("aria-label", `${texts["cancel"]}: ${name}`);
    this.node.append(html("span", { class: "file-name" }, html("bdi", {}, name)), this.bar, this.state, this.button);
    this.say("waiting");
  }

  /** Shows a state by the key of its text. */
  say(key: string, values: Readonly<Record<string, string | number>> = {}): void {
    this.node.dataset["state"] = key;
    setText(this.state, filled(this.texts[key], values));
  }

  /** Shows how much is sent, 0 to 1. */
  sent(part: number): void {
    this.bar.value = part;
    this.node.dataset["state"] = "sending";
    setText(this.state, `${this.texts["sending"]} ${Math.floor(part * 100)} %`);
  }

  /** Shows what became of the file, or of every file in the archive. */
  done(outcomes: readonly Outcome[]): void {
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
      const taken = outcome.result === "stored" || outcome.result === "duplicate";
      (taken ? folded : list).append(this.outcome(outcome));
    }
    if (folded !== list) {
      const count = `${this.texts["stored"]} (${folded.childElementCount})`;
      list.append(html("li", {}, html("details", {}, html("summary", {}, count), folded)));
    }
    this.needsAPerson = outcomes.some((outcome) => outcome.result === "refused" || outcome.result === "conflict");
    setText(this.state, only && outcomes.length === 1 ? only.word : filled(this.texts["checked"], { n: outcomes.length }));
    this.node.append(list);
  }

  /** Shows why the file was not taken. */
  refused(word: string, reason: string, hint: string): void {
    this.close("refused");
    this.needsAPerson = true;
    setText(this.state, word);
    this.node.append(html("ul", { class: "outcomes" }, html("li", { class: "is-refused" }, html("span", { class: "reason" }, `${reason} ${hint}`))));
  }

  /** Shows that the person called it off. */
  calledOff(): void {
    this.close("called_off");
    this.say("called_off");
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
    const line = html("li", { class: `is-${outcome.result}` });
    if (outcome.name !== this.name) {
      line.append(html("span", { class: "file-name" }, html("bdi", {}, outcome.name.replace(`${this.name}!/`, ""))), html("span", {}, outcome.word));
    }
    if (outcome.url) {
      line.append(this.link(outcome));
    }
    if (outcome.reason) {
      line.append(html("span", { class: "reason" }, `${outcome.reason}${outcome.hint ? ` – ${outcome.hint}` : ""}`));
    }
    return line;
  }
}
