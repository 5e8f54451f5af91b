import { beforeEach, describe, expect, it, vi } from "vitest";
import { mergeFragment, startWorklist } from "../src/pages/worklist";
import { page, requestsOf, revision, serve, unchanged, useFreshPage } from "./support";

useFreshPage();

interface Study {
  id: number;
  state?: string;
  urgent?: number;
  more?: string;
}

function row({ id, state = "queued", urgent = 0, more = "" }: Study): string {
  const button = state === "queued" ? '<button class="first">Analyse first</button>' : "";
  return (
    `<tr id="study-${id}" data-state="${state}" data-urgent="${urgent}" data-word="${state}">` +
    `<td><a class="row-link" href="/studies/${id}">Patient ${id}</a>${more}${button}</td></tr>`
  );
}

const table = (studies: Study[], pages = "1") =>
  `<table><tbody>${studies.map(row).join("")}</tbody></table><nav class="pages">${pages}</nav>`;

function fragment(html: string): HTMLElement {
  return new DOMParser().parseFromString(html, "text/html").body;
}

let list: HTMLElement;
const rows = () => [...list.querySelectorAll("tbody tr")].map((node) => node.id);

beforeEach(() => {
  document.body.innerHTML = `<p id="live" data-live="live"></p><p id="announce"></p><div id="list" data-revision="7" data-query="wang" data-before="" data-url="/">${table([{ id: 2 }, { id: 1 }])}</div>`;
  list = document.getElementById("list") as HTMLElement;
});

describe("mergeFragment", () => {
  it("keeps the rows that did not change, so that nothing moves under a finger", () => {
    const before = [...list.querySelectorAll("tr")];
    const changes = mergeFragment(list, fragment(table([{ id: 2 }, { id: 1, state: "ai_ready" }], "2")));
    const after = [...list.querySelectorAll("tr")];
    expect(after[0]).toBe(before[0]);
    expect(after[1]).not.toBe(before[1]);
    expect(changes.map((node) => node.id)).toEqual(["study-1"]);
    expect(list.querySelector(".pages")?.textContent).toBe("2");
  });

  it("marks a new row, and keeps it when only the mark differs", () => {
    const studies = [{ id: 3 }, { id: 2 }, { id: 1 }];
    expect(mergeFragment(list, fragment(table(studies))).map((node) => node.id)).toEqual(["study-3"]);
    const added = document.getElementById("study-3");
    expect(added?.className).toBe("is-new");
    expect(mergeFragment(list, fragment(table(studies)))).toEqual([]);
    expect(document.getElementById("study-3")).toBe(added);
  });

  it("takes over the order and drops rows that left the page", () => {
    mergeFragment(list, fragment(table([{ id: 1, urgent: 1 }, { id: 4 }])));
    expect(rows()).toEqual(["study-1", "study-4"]);
  });

  it("announces a new state or urgency, but no other difference", () => {
    expect(mergeFragment(list, fragment(table([{ id: 2, more: " " }, { id: 1, urgent: 1 }]))).map((node) => node.id)).toEqual(["study-1"]);
  });

  it("replaces everything when the list was empty or becomes so", () => {
    expect(mergeFragment(list, fragment('<section class="empty">none</section>'))).toEqual([]);
    expect(list.textContent).toBe("none");
    expect(mergeFragment(list, fragment(table([{ id: 5 }]))).map((node) => node.id)).toEqual(["study-5"]);
    expect(rows()).toEqual(["study-5"]);
  });

  it.each([".row-link", ".first"])("gives the focus back to %s of the same study", (selector) => {
    list.querySelector<HTMLElement>(`#study-1 ${selector}`)?.focus();
    mergeFragment(list, fragment(table([{ id: 3 }, { id: 2 }, { id: 1, urgent: 1 }])));
    expect(document.activeElement).toBe(list.querySelector(`#study-1 ${selector}`));
  });

  it("gives the focus to the link when the button is gone", () => {
    list.querySelector<HTMLElement>("#study-1 .first")?.focus();
    mergeFragment(list, fragment(table([{ id: 2 }, { id: 1, state: "ai_ready" }])));
    expect(document.activeElement).toBe(list.querySelector("#study-1 .row-link"));
  });
});

describe("startWorklist", () => {
  it("fetches the rows of the same search after a change and announces the last three changes", async () => {
    const studies = [5, 4, 3, 2, 1].map((id) => ({ id, state: "ai_ready" }));
    const answers = [revision(8)];
    const fetching = serve({ "/api/v1/revision": () => answers.shift() ?? unchanged(), "/": () => page(table(studies)) });
    startWorklist(list);
    await vi.advanceTimersByTimeAsync(3000);
    expect(rows()).toHaveLength(5);
    expect(document.getElementById("announce")?.textContent).toBe("Patient 3: ai_ready; Patient 2: ai_ready; Patient 1: ai_ready");
    const posts = requestsOf(fetching, "/").filter((options) => options.method === "POST");
    expect(posts.map((options) => String(options.body))).toEqual(["q=wang"]);
  });

  it("stays on an older part of the list", async () => {
    list.dataset["before"] = "40";
    const fetching = serve({ "/api/v1/revision": () => revision(8), "/": () => page(table([])) });
    startWorklist(list);
    await vi.advanceTimersByTimeAsync(0);
    const post = requestsOf(fetching, "/").find((options) => options.method === "POST");
    expect(String(post?.body)).toBe("q=wang&before=40");
  });

  it("asks again when the rows did not come", async () => {
    const answers = [new Response("", { status: 503 }), page(table([{ id: 9 }]))];
    serve({ "/api/v1/revision": () => revision(8), "/": () => answers.shift() ?? page("") });
    startWorklist(list);
    await vi.advanceTimersByTimeAsync(0);
    expect(rows()).toEqual(["study-2", "study-1"]);
    await vi.advanceTimersByTimeAsync(3000);
    expect(rows()).toEqual(["study-9"]);
  });
});
