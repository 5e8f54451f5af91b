/** The upload page: many files at once over any line, each with its progress and in the end its outcome. */
import "./styles/upload.css";
import type { Upload } from "tus-js-client";
import { setText } from "./dom";
import { chosenFiles, droppedFiles, fingerprint, isPicture, type Named } from "./uploadFiles";
import { PictureForm } from "./uploadForm";
import { filled, Row, type Texts } from "./uploadRow";
import { forget, forgetOld, transfer, TransferError, type Box, type Outcome } from "./uploadTransfer";

/** Three fill a clinic's line and leave the box's threads to the others. */
const AT_ONCE = 3;

interface Item {
  named: Named;
  form: string;
  row: Row;
  state: "waiting" | "running" | "stopped" | "done";
  upload: Upload | null;
  key: string;
}

class UploadPage {
  private readonly texts: Texts;
  private readonly box: Box;
  private readonly items: Item[] = [];
  private readonly counts = { stored: 0, refused: 0, skipped: 0 };
  private readonly toClose: string[] = [];
  private readonly form: PictureForm;
  private running = 0;

  constructor(private readonly root: HTMLElement) {
    const csrf = document.querySelector<HTMLMetaElement>("meta[name=csrf-token]")?.content ?? "";
    this.texts = JSON.parse(root.dataset["texts"] ?? "{}") as Texts;
    this.box = { endpoint: root.dataset["endpoint"] ?? "", csrf };
    const form = (this.form = new PictureForm(
      this.find<HTMLFormElement>("#picture-form"),
      this.texts,
      (pictures, values) => this.enqueue(pictures, values),
      () => this.summary(),
    ));
    for (const input of root.querySelectorAll<HTMLInputElement>("#files, #folder")) {
      input.addEventListener("change", () => {
        const files = chosenFiles(input.files ?? new DataTransfer().files);
        input.value = "";
        void this.take(files, form);
      });
    }
    this.listenForDrops(form);
    this.find("#resume").addEventListener("click", () => this.goOn());
    window.addEventListener("beforeunload", (event) => {
      if (this.form.waiting > 0 || this.items.some((item) => item.state !== "done")) {
        event.preventDefault();
      }
    });
    forgetOld();
  }

  private find<Kind extends HTMLElement>(selector: string): Kind {
    return this.root.querySelector(selector) as Kind;
  }

  private listenForDrops(form: PictureForm): void {
    const zone = this.find("#drop");
    // Anywhere on the page: a file that misses the zone must not replace the page.
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      zone.classList.add("is-over");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) {
        zone.classList.remove("is-over");
      }
    });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("is-over");
      if (event.dataTransfer) {
        void droppedFiles(event.dataTransfer).then((files) => this.take(files, form));
      }
    });
  }

  private async take(files: Named[], form: PictureForm): Promise<void> {
    this.trouble(files.length === 0 ? (this.texts["nothing"] ?? "") : "");
    const pictures: Named[] = [];
    const others: Named[] = [];
    for (const named of files) {
      ((await isPicture(named.file).catch(() => false)) ? pictures : others).push(named);
    }
    this.enqueue(others, "");
    form.add(pictures);
  }

  private enqueue(files: readonly Named[], form: string): void {
    for (const named of files) {
      const item: Item = { named, form, row: new Row(this.texts, named.name, () => this.callOff(item)), state: "waiting", upload: null, key: "" };
      this.items.push(item);
      this.find("#files-list").append(item.row.node);
    }
    this.find("#progress").hidden = this.items.length === 0;
    this.summary();
    this.next();
  }

  private next(): void {
    while (this.running < AT_ONCE) {
      const item = this.items.find((candidate) => candidate.state === "waiting");
      if (!item) {
        break;
      }
      item.state = "running";
      this.running += 1;
      void this.run(item).finally(() => {
        this.running -= 1;
        this.summary();
        this.next();
      });
    }
    if (this.running === 0) {
      void this.close();
    }
  }

  private async run(item: Item): Promise<void> {
    const { row, named } = item;
    const limit = this.tooLarge(named);
    if (limit) {
      this.refuse(item, limit, this.root.dataset["tooLargeHint"] ?? "");
      return;
    }
    try {
      item.key ||= await fingerprint(this.root.dataset["user"] ?? "", named, item.form);
      const result = await transfer(
        this.box,
        named,
        item.form,
        item.key,
        {
          sent: (bytes) => row.sent(named.file.size ? bytes / named.file.size : 1),
          broken: () => row.say("broken"),
          checking: (files) => (files > 1 ? row.say("checked", { n: files }) : row.say("checking")),
        },
        (upload) => (item.upload = upload),
      );
      this.toClose.push(result.id);
      this.settle(item, result.outcomes);
    } catch (error) {
      this.failed(item, error instanceof TransferError ? error : new TransferError("", "", false, false));
    }
  }

  private tooLarge({ file, name }: Named): string {
    const limit = Number(this.root.dataset[name.toLowerCase().endsWith(".zip") ? "largestArchive" : "largest"]);
    return file.size > limit ? (this.root.dataset["tooLarge"] ?? "") : "";
  }

  private settle(item: Item, outcomes: Outcome[]): void {
    if (item.state !== "running") {
      return;
    }
    item.state = "done";
    item.row.done(outcomes);
    for (const outcome of outcomes) {
      const kind = outcome.result === "refused" || outcome.result === "skipped" ? outcome.result : "stored";
      this.counts[kind] += 1;
    }
  }

  private refuse(item: Item, reason: string, hint: string): void {
    item.state = "done";
    item.row.refused(this.root.dataset["refused"] ?? "", reason, hint);
    this.counts.refused += 1;
  }

  private failed(item: Item, error: TransferError): void {
    if (item.state !== "running") {
      return;
    }
    if (error.final) {
      this.refuse(item, error.reason, error.hint);
      return;
    }
    item.state = "stopped";
    item.row.say("stopped");
    const told = error.loggedOut ? this.texts["logged_out"] : error.noRoom ? this.texts["no_room"] : this.texts["lost"];
    this.trouble(told ?? "");
    this.find("#resume").hidden = error.loggedOut;
  }

  private callOff(item: Item): void {
    if (item.state === "done") {
      return;
    }
    item.state = "done";
    item.row.calledOff();
    void item.upload?.abort(true).catch(() => undefined);
    forget(item.key);
    this.summary();
  }

  private goOn(): void {
    this.trouble("");
    this.find("#resume").hidden = true;
    for (const item of this.items) {
      if (item.state === "stopped") {
        item.state = "waiting";
        item.row.say("waiting");
      }
    }
    this.next();
  }

  /** Tells the box that a batch is complete, so that the reading begins at once; without it the box waits a few seconds. */
  private async close(): Promise<void> {
    const uploads = this.toClose.splice(0);
    if (uploads.length > 0) {
      await fetch(this.root.dataset["close"] ?? "", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-CSRFToken": this.box.csrf },
        body: JSON.stringify({ uploads }),
      }).catch(() => undefined);
    }
  }

  private trouble(text: string): void {
    const line = this.find("#trouble");
    line.hidden = text === "";
    this.find("#progress").hidden = this.items.length === 0 && text === "";
    setText(line.querySelector("span") as HTMLElement, text);
  }

  private summary(): void {
    const done = this.items.filter((item) => item.state === "done").length;
    const { waiting } = this.form;
    const all = done === this.items.length && done > 0 && waiting === 0;
    const told = filled(this.texts[all ? "all_done" : "summary"], { done, total: this.items.length, ...this.counts });
    setText(this.find("#summary"), waiting > 0 ? `${told} ${filled(this.texts["pictures_wait"], { n: waiting })}` : told);
    this.find("#to-list").hidden = !all;
    if (all) {
      const first = this.items.filter((item) => item.row.needsAPerson).map((item) => item.row.node);
      this.find("#files-list").prepend(...first);
    }
    this.root.dataset["done"] = all ? "1" : "0";
  }
}

const root = document.getElementById("upload");
if (root) {
  new UploadPage(root);
}
