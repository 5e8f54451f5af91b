import { beforeEach, describe, expect, it, vi } from "vitest";
import type { ViewerElement } from "../src/main";
import { ReportPane } from "../src/pages/study";
import { page, serve, useFreshPage } from "./support";

useFreshPage();

interface Report {
  findings?: string;
  images?: string;
  results?: string;
  first?: string;
  second?: string;
}

function report({ findings = "1 ", images = "10 11 12 ", results = "{}", first = "one", second = "two" }: Report = {}): string {
  return (
    `<div class="report" data-revision="7" data-images="${images}" data-findings="${findings}" data-results='${results}'>` +
    `<section class="image-report" data-images="10 11 "><h2><button class="to-image">Images 1, 2</button></h2>${first}<details><summary>more</summary></details></section>` +
    `<section class="image-report" data-images="12 "><h2><button class="to-image">Image 3</button></h2>${second}<details><summary>more</summary></details></section>` +
    `<button class="first">Analyse first</button></div>`
  );
}

let viewer: ViewerElement;
let pane: HTMLElement;
const order = () => [...pane.querySelectorAll<HTMLElement>(".image-report")].map((part) => part.dataset["images"]);
const current = () => [...pane.querySelectorAll<HTMLElement>(".is-current")].map((part) => part.dataset["images"]);
const hidden = (id: string) => document.getElementById(id)?.hidden;
const signal = new AbortController().signal;

async function show(imageId: number): Promise<void> {
  viewer.dataset["imageId"] = String(imageId);
  await vi.advanceTimersByTimeAsync(1);
}

beforeEach(() => {
  document.body.innerHTML =
    `<div id="viewer" data-image-id="10"></div><aside><div id="report" data-url="/studies/1">${report()}</div></aside>` +
    `<p id="arrived" hidden></p><p id="new-images" hidden><button>Reload</button></p>`;
  viewer = document.getElementById("viewer") as ViewerElement;
  pane = document.getElementById("report") as HTMLElement;
});

describe("ReportPane", () => {
  it("shows the revision of the page", () => {
    expect(new ReportPane(pane, viewer).revision).toBe(7);
  });

  it("puts the report of the image shown first and marks it", async () => {
    new ReportPane(pane, viewer);
    expect(current()).toEqual(["10 11 "]);
    await show(12);
    expect(order()).toEqual(["12 ", "10 11 "]);
    expect(current()).toEqual(["12 "]);
    expect(pane.querySelectorAll("[aria-current]")).toHaveLength(1);
    await show(11);
    expect(current()).toEqual(["10 11 "]);
    expect(order()).toEqual(["10 11 ", "12 "]);
  });

  it("brings the report back into sight when the image changes", async () => {
    new ReportPane(pane, viewer);
    const aside = pane.parentElement as HTMLElement;
    aside.scrollTop = 200;
    await show(12);
    expect(aside.scrollTop).toBe(0);
  });

  it("asks the viewer for the first image of a part that is pressed", () => {
    viewer.viewerChoose = vi.fn();
    new ReportPane(pane, viewer);
    pane.querySelectorAll<HTMLElement>(".to-image")[1]?.click();
    expect(viewer.viewerChoose).toHaveBeenCalledExactlyOnceWith(12);
    pane.querySelector<HTMLElement>("summary")?.click();
    expect(viewer.viewerChoose).toHaveBeenCalledTimes(1);
  });

  it("leaves a report alone that did not change, also after the parts were put in another order", async () => {
    const shown = new ReportPane(pane, viewer);
    await show(12);
    const before = pane.querySelector(".report");
    serve({ "/studies/1": () => page(report()) });
    expect(await shown.refresh(signal)).toBe(true);
    expect(pane.querySelector(".report")).toBe(before);
  });

  it("shows a new report with the same details open and the same part first", async () => {
    viewer.viewerResults = vi.fn();
    const shown = new ReportPane(pane, viewer);
    await show(12);
    pane.querySelectorAll("details")[0]!.open = true; // of image 12, which stands first
    serve({ "/studies/1": () => page(report({ first: "new", results: '{"12": {"unread": "In the queue"}}' })) });
    expect(await shown.refresh(signal)).toBe(true);
    expect(pane.textContent).toContain("new");
    expect(order()).toEqual(["12 ", "10 11 "]);
    expect([...pane.querySelectorAll("details")].map((details) => details.open)).toEqual([true, false]);
    expect(viewer.viewerResults).toHaveBeenCalledExactlyOnceWith({ "12": { unread: "In the queue", findings: [] } });
  });

  it("keeps the focus on the button that asks for this study first", async () => {
    const shown = new ReportPane(pane, viewer);
    pane.querySelector<HTMLElement>(".first")?.focus();
    serve({ "/studies/1": () => page(report({ first: "new" })) });
    await shown.refresh(signal);
    expect(document.activeElement).toBe(pane.querySelector(".first"));
  });

  it("announces a result that came", async () => {
    const shown = new ReportPane(pane, viewer);
    serve({ "/studies/1": () => page(report({ findings: "1 2 ", second: "result" })) });
    await shown.refresh(signal);
    expect(hidden("arrived")).toBe(false);
    expect(hidden("new-images")).toBe(true);
  });

  it("announces new images, and then not the result as well: the page must be loaded again anyway", async () => {
    const shown = new ReportPane(pane, viewer);
    serve({ "/studies/1": () => page(report({ findings: "1 2 ", images: "10 11 12 13 ", second: "more" })) });
    await shown.refresh(signal);
    expect(hidden("new-images")).toBe(false);
    expect(hidden("arrived")).toBe(true);
  });

  it("draws a result that came without loading the page again", async () => {
    const reload = vi.spyOn(location, "reload").mockImplementation(() => undefined);
    viewer.viewerResults = vi.fn();
    const shown = new ReportPane(pane, viewer);
    serve({ "/studies/1": () => page(report({ findings: "1 2 ", second: "result", results: '{"12": {"findings": [{"id": 2}]}}' })) });
    await shown.refresh(signal);
    expect(viewer.viewerResults).toHaveBeenCalledExactlyOnceWith({ "12": { findings: [{ id: 2, outline: [], inner_contours: [] }] } });
    expect(reload).not.toHaveBeenCalled();
  });

  it("keeps each of several folded parts of one image open or closed", async () => {
    const two = '<details class="a"><summary>a</summary></details><details class="b"><summary>b</summary></details>';
    serve({ "/studies/1": () => page(report({ first: `${two}new` })) });
    pane.querySelector(".report")!.outerHTML = report({ first: two });
    const shown = new ReportPane(pane, viewer);
    pane.querySelector<HTMLDetailsElement>("details.b")!.open = true;
    await shown.refresh(signal);
    expect(pane.querySelector<HTMLDetailsElement>("details.a")!.open).toBe(false);
    expect(pane.querySelector<HTMLDetailsElement>("details.b")!.open).toBe(true);
  });

  it.each(["new-images"])("loads the page again from the banner %s", (id) => {
    const reload = vi.spyOn(location, "reload").mockImplementation(() => undefined);
    new ReportPane(pane, viewer);
    document.querySelector<HTMLElement>(`#${id} button`)?.click();
    expect(reload).toHaveBeenCalledTimes(1);
  });

  it("says that it could not refresh, and keeps the report", async () => {
    const shown = new ReportPane(pane, viewer);
    const before = pane.innerHTML;
    serve({});
    expect(await shown.refresh(signal)).toBe(false);
    expect(pane.innerHTML).toBe(before);
  });
});
