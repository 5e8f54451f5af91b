import { describe, expect, it, vi } from "vitest";
import { fillIn, Row } from "../src/uploadRow";
import type { Outcome } from "../src/uploadTransfer";

const TEXTS = { waiting: "waiting", sending: "sending", cancel: "Cancel", open: "Open", stored: "stored", checked: "checked: {n} files", called_off: "cancelled" };

function outcome(values: Partial<Outcome> = {}): Outcome {
  return { name: "a.dcm", result: "stored", word: "Stored", reason: "", hint: "", url: "/studies/1", ...values };
}

function row(name = "a.dcm", cancel: () => void = () => undefined): Row {
  return new Row(TEXTS, name, cancel);
}

const texts = (one: Row, selector: string) => [...one.node.querySelectorAll(selector)].map((node) => node.textContent);

describe("Row", () => {
  it("shows how much is sent, and can be cancelled until it is done", () => {
    const cancel = vi.fn();
    const one = row("a.dcm", cancel);
    expect(texts(one, ".file-state")).toEqual(["waiting"]);
    one.showSent(0.456);
    expect(texts(one, ".file-state")).toEqual(["sending 45 %"]);
    one.node.querySelector("button")?.click();
    expect(cancel).toHaveBeenCalledTimes(1);
    one.showOutcomes([outcome()]);
    expect(one.node.querySelector("button, progress")).toBeNull();
  });

  it("links to the study of a single file", () => {
    const one = row();
    one.showOutcomes([outcome()]);
    expect(one.node.querySelector("a")?.getAttribute("href")).toBe("/studies/1");
    expect(texts(one, ".file-state")).toEqual(["Stored"]);
    expect(one.needsAttention).toBe(false);
  });

  it("says of a refused file why, and what to do", () => {
    const one = row();
    one.showOutcomes([outcome({ result: "refused", word: "Refused", reason: "Not a DICOM file", hint: "Send another.", url: "" })]);
    expect(texts(one, ".reason")).toEqual(["Not a DICOM file – Send another."]);
    expect(one.needsAttention).toBe(true);
  });

  it("lists what was in an archive, and folds what was taken when there is much of it", () => {
    const one = row("all.zip");
    const stored = Array.from({ length: 20 }, (_, index) => outcome({ name: `all.zip!/${index}.dcm` }));
    one.showOutcomes([...stored, outcome({ name: "all.zip!/bad.dcm", result: "refused", word: "Refused", reason: "Not a DICOM file", url: "" })]);
    expect(texts(one, ".file-state")).toEqual(["checked: 21 files"]);
    expect(texts(one, "summary")).toEqual(["stored (20)"]);
    expect(texts(one, ".outcomes > .is-refused .file-name")).toEqual(["bad.dcm"]);
    expect(one.needsAttention).toBe(true);
  });

  it("shows text from outside as text", () => {
    const one = row("<img src=x>");
    one.showRefused("Refused", "<b>why</b>", "<i>what</i>");
    expect(one.node.querySelector("img, b, i")).toBeNull();
    expect(texts(one, ".reason")).toEqual(["<b>why</b> <i>what</i>"]);
  });

  it("says that it was cancelled", () => {
    const one = row();
    one.showCancelled();
    expect(texts(one, ".file-state")).toEqual(["cancelled"]);
    expect(one.node.dataset["state"]).toBe("called_off");
  });
});

it("fillIn leaves a value that it does not know", () => {
  expect(fillIn("{a} {b}", { a: 1 })).toBe("1 {b}");
  expect(fillIn(undefined, {})).toBe("");
});
