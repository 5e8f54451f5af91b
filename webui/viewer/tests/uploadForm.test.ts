import { beforeEach, describe, expect, it, vi } from "vitest";
import type { Named } from "../src/uploadFiles";
import { PictureForm } from "../src/uploadForm";

const TEXTS = { remove: "Remove", view: "View", view_as_below: "as below", view_PA: "PA", view_AP: "AP", view_LL: "LL", pictures: "{n} pictures" };
const FORM = `<form hidden>
  <ul id="thumbs"></ul><p id="form-error" hidden></p>
  <input id="patient_name" name="patient_name"><input id="patient_id" name="patient_id">
  <input id="age" name="age"><select name="age_unit"><option value="years">years</option><option value="months">months</option></select>
  <fieldset id="view-field"><input type="radio" name="view" value="PA"><input type="radio" name="view" value="LL"></fieldset>
  <button id="send">Upload</button><button type="button" id="drop-pictures">Not</button>
</form>`;

const picture = (name: string): Named => ({ name, file: new File([name], name) });

let node: HTMLFormElement;
let sent: { names: string[]; form: Record<string, string> }[];
let form: PictureForm;
const changed = vi.fn();
const field = <Kind extends HTMLElement = HTMLInputElement>(selector: string) => node.querySelector(selector) as Kind;
const wrong = () => [...node.querySelectorAll(".is-wrong")].map(({ id }) => id);

function submit(): void {
  node.dispatchEvent(new Event("submit", { cancelable: true }));
}

beforeEach(() => {
  vi.spyOn(URL, "createObjectURL").mockReturnValue("blob:picture");
  vi.spyOn(URL, "revokeObjectURL").mockReturnValue();
  document.body.innerHTML = FORM;
  node = document.querySelector("form") as HTMLFormElement;
  node.scrollIntoView = vi.fn();
  sent = [];
  form = new PictureForm(
    node,
    TEXTS,
    (pictures, values) => sent.push({ names: pictures.map(({ name }) => name), form: JSON.parse(values) as Record<string, string> }),
    changed,
  );
});

describe("PictureForm", () => {
  it("appears with the pictures that it asks about, and the cursor in the name", () => {
    expect(node.hidden).toBe(true);
    form.add([]);
    expect(node.hidden).toBe(true);
    form.add([picture("a.png")]);
    expect(node.hidden).toBe(false);
    expect(form.waiting).toBe(1);
    expect(document.activeElement?.id).toBe("patient_name");
    expect(node.querySelectorAll("#thumbs img")).toHaveLength(1);
  });

  it("sends nothing while a name or an ID and the view are missing, and marks them", () => {
    form.add([picture("a.png")]);
    submit();
    expect(sent).toEqual([]);
    expect(wrong()).toEqual(["patient_name", "patient_id", "view-field"]);
    expect(field("#form-error").hidden).toBe(false);
    expect(field("#patient_name").getAttribute("aria-invalid")).toBe("true");
    expect(document.activeElement?.id).toBe("patient_name");
  });

  it("takes a mark off as soon as the field is right", () => {
    form.add([picture("a.png")]);
    submit();
    field("#patient_id").value = "4711";
    node.dispatchEvent(new Event("input"));
    expect(wrong()).toEqual(["view-field"]);
  });

  it.each([
    ["#patient_name", "A\\B"], ["#patient_name", "A=B"], ["#age", "1x"], ["#age", "131"],
  ])("refuses in %s the value %s", (selector, value) => {
    form.add([picture("a.png")]);
    field("#patient_id").value = "4711";
    field("input[value=PA]").checked = true;
    field(selector).value = value;
    submit();
    expect(wrong()).toEqual([selector.slice(1)]);
    expect(sent).toEqual([]);
  });

  it("takes 131 months", () => {
    form.add([picture("a.png")]);
    field("#patient_id").value = "4711";
    field("input[value=PA]").checked = true;
    field("#age").value = "131";
    field<HTMLSelectElement>("select").value = "months";
    submit();
    expect(sent).toHaveLength(1);
  });

  it("sends the pictures with trimmed values and is empty afterwards", () => {
    form.add([picture("a.png"), picture("b.png")]);
    field("#patient_name").value = "  王小东 ";
    field("input[value=PA]").checked = true;
    submit();
    expect(sent).toEqual([{ names: ["a.png", "b.png"], form: { patient_name: "王小东", patient_id: "", age: "", age_unit: "years", view: "PA" } }]);
    expect(node.hidden).toBe(true);
    expect(form.waiting).toBe(0);
  });

  it("sends pictures of one patient by their views, each picture's own before that of the form", () => {
    form.add([picture("front.png"), picture("side.png")]);
    field("#patient_id").value = "4711";
    field("input[value=PA]").checked = true;
    const own = node.querySelectorAll<HTMLSelectElement>(".view-choice")[1] as HTMLSelectElement;
    own.value = "LL";
    own.dispatchEvent(new Event("change"));
    submit();
    expect(sent.map(({ names, form: values }) => [names, values["view"]])).toEqual([[["front.png"], "PA"], [["side.png"], "LL"]]);
  });

  it("forgets one picture, or all of them", () => {
    form.add([picture("a.png"), picture("b.png")]);
    node.querySelector<HTMLElement>("#thumbs button")?.click();
    expect(form.waiting).toBe(1);
    expect(node.hidden).toBe(false);
    field("#drop-pictures").click();
    expect(form.waiting).toBe(0);
    expect(node.hidden).toBe(true);
    expect(changed).toHaveBeenCalled();
  });

  it("shows at most 24 small pictures and the number of the others", () => {
    form.add(Array.from({ length: 30 }, (_, index) => picture(`${index}.png`)));
    expect(node.querySelectorAll("#thumbs img")).toHaveLength(24);
    expect(node.querySelector("#thumbs")?.lastElementChild?.textContent).toBe("+ 6 pictures");
  });
});
