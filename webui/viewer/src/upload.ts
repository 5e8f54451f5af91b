/** The upload page: many files at once over a connection that may break, each with its progress and in the end its outcome. */
import "./styles/upload.css";
import type { Upload } from "tus-js-client";
import { setText } from "./dom";
import { chosenFiles, droppedFiles, fingerprint, isPicture, type Named } from "./uploadFiles";
import { PictureForm } from "./uploadForm";
import { fillIn, Row, type Texts } from "./uploadRow";
import { removeUpload, removeOldUploads, transfer, TransferError, type Box, type Outcome } from "./uploadTransfer";

/** Three at once use the network of a clinic fully and leave threads of the box to others. */
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
      () => this.showSummary(),
    ));
    for (const input of root.querySelectorAll<HTMLInputElement>("#files, #folder")) {
      input.addEventListener("change", () => {
        const files = chosenFiles(input.files ?? new DataTransfer().files);
        input.value = "";
        void this.add(files, form);
      });
    }
    this.listenForDrops(form);
    this.find("#resume").addEventListener("click", () => this.resume());
    window.addEventListener("beforeunload", (event) => {
      if (this.form.waiting > 0 || this.items.some((item) => item.state !== "done")) {
        event.preventDefault();
      }
    });
    removeOldUploads();
  }

  private find<Kind extends HTMLElement>(selector: string): Kind {
    return this.root.querySelector(selector) as Kind;
  }

  private listenForDrops(form: PictureForm): void {
    const zone = this.find("#drop");
    // Anywhere on the page: the browser would open a file that is dropped beside the zone, in place of the page.
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
        void droppedFiles(event.dataTransfer).then((files) => this.add(files, form));
      }
    });
  }

  private async add(files: Named[], form: PictureForm): Promise<void> {
    this.showTrouble(files.length === 0 ? (this.texts["nothing"] ?? "") : "");
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
      const item: Item = { named, form, row: new Row(this.texts, named.name, () => this.cancel(item)), state: "waiting", upload: null, key: "" };
      this.items.push(item);
      this.find("#files-list").append(item.row.node);
    }
    this.find("#progress").hidden = this.items.length === 0;
    this.showSummary();
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
        this.showSummary();
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
          onSent: (bytes) => row.showSent(named.file.size ? bytes / named.file.size : 1),
          onBroken: () => row.showState("broken"),
          onChecking: (files) => (files > 1 ? row.showState("checked", { n: files }) : row.showState("checking")),
        },
        (upload) => (item.upload = upload),
      );
      this.toClose.push(result.id);
      this.settle(item, result.outcomes);
    } catch (error) {
      this.handleFailure(item, error instanceof TransferError ? error : new TransferError("", "", false, false));
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
    item.row.showOutcomes(outcomes);
    for (const outcome of outcomes) {
      const kind = outcome.result === "refused" || outcome.result === "skipped" ? outcome.result : "stored";
      this.counts[kind] += 1;
    }
  }

  private refuse(item: Item, reason: string, hint: string): void {
    item.state = "done";
    item.row.showRefused(this.root.dataset["refused"] ?? "", reason, hint);
    this.counts.refused += 1;
  }

  private handleFailure(item: Item, error: TransferError): void {
    if (item.state !== "running") {
      return;
    }
    if (error.final) {
      this.refuse(item, error.reason, error.hint);
      return;
    }
    item.state = "stopped";
    item.row.showState("stopped");
    const text = error.loggedOut ? this.texts["logged_out"] : error.noRoom ? this.texts["no_room"] : this.texts["lost"];
    this.showTrouble(text ?? "");
    this.find("#resume").hidden = error.loggedOut;
  }

  private cancel(item: Item): void {
    if (item.state === "done") {
      return;
    }
    item.state = "done";
    item.row.showCancelled();
    void item.upload?.abort(true).catch(() => undefined);
    removeUpload(item.key);
    this.showSummary();
  }

  private resume(): void {
    this.showTrouble("");
    this.find("#resume").hidden = true;
    for (const item of this.items) {
      if (item.state === "stopped") {
        item.state = "waiting";
        item.row.showState("waiting");
      }
    }
    this.next();
  }

  /** Reports to the box that a batch is complete, so that the analysis starts at once; otherwise the box waits a few seconds. */
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

  private showTrouble(text: string): void {
    const banner = this.find("#trouble");
    banner.hidden = text === "";
    this.find("#progress").hidden = this.items.length === 0 && text === "";
    setText(banner.querySelector("span") as HTMLElement, text);
  }

  private showSummary(): void {
    const done = this.items.filter((item) => item.state === "done").length;
    const { waiting } = this.form;
    const all = done === this.items.length && done > 0 && waiting === 0;
    const summary = fillIn(this.texts[all ? "all_done" : "summary"], { done, total: this.items.length, ...this.counts });
    setText(this.find("#summary"), waiting > 0 ? `${summary} ${fillIn(this.texts["pictures_wait"], { n: waiting })}` : summary);
    this.find("#to-list").hidden = !all;
    if (all) {
      const first = this.items.filter((item) => item.row.needsAttention).map((item) => item.row.node);
      this.find("#files-list").prepend(...first);
    }
    this.root.dataset["done"] = all ? "1" : "0";
  }
}

const root = document.getElementById("upload");
if (root) {
  new UploadPage(root);
}
