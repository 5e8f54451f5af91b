import { beforeEach, describe, expect, it, vi } from "vitest";
import { startHealthPage } from "../src/pages/health";
import { page, requestsOf, serve, useFreshPage } from "./support";

useFreshPage();

const parts = (busy: number, life = "life", passed = "passed") =>
  `<div class="life" data-busy="${busy}">${life}</div><div class="passed">${passed}</div>`;

function open(busy: number): HTMLElement {
  const [life, passed] = parts(busy).split("</div>");
  document.body.innerHTML = `<p id="live" data-lost="no connection"></p><div id="life" data-url="/health">${life}</div></div><div id="passed">${passed}</div></div>`;
  return document.getElementById("life") as HTMLElement;
}

const line = () => document.getElementById("live") as HTMLElement;
const later = (ms: number) => vi.advanceTimersByTimeAsync(ms);

describe("startHealthPage", () => {
  let place: HTMLElement;
  beforeEach(() => {
    place = open(0);
  });

  it("replaces the parts that changed and leaves the others", async () => {
    const passed = document.querySelector(".passed");
    serve({ "/health": () => page(parts(0, "another")) });
    startHealthPage(place);
    await later(15_000);
    expect(document.querySelector(".life")?.textContent).toBe("another");
    expect(document.querySelector(".passed")).toBe(passed);
  });

  it("asks every 15 s, and every 2 s while a version is being prepared", async () => {
    const answers = [page(parts(1)), page(parts(1)), page(parts(0))];
    const fetching = serve({ "/health": () => answers.shift() ?? page(parts(0)) });
    startHealthPage(place);
    await later(14_999);
    expect(requestsOf(fetching, "/health")).toHaveLength(0);
    await later(1);
    expect(requestsOf(fetching, "/health")).toHaveLength(1);
    await later(4000);
    expect(requestsOf(fetching, "/health")).toHaveLength(3);
    await later(14_999);
    expect(requestsOf(fetching, "/health")).toHaveLength(3);
  });

  it("says at once that the box is gone, and that it is back", async () => {
    let gone = true;
    serve({ "/health": () => (gone ? Promise.reject(new TypeError("failed to fetch")) : page(parts(0))) });
    startHealthPage(place);
    await later(15_000);
    expect(line().textContent).toBe("no connection");
    expect(line().classList.contains("is-lost")).toBe(true);
    gone = false;
    await later(15_000);
    expect(line().textContent).toBe("");
    expect(line().classList.contains("is-lost")).toBe(false);
  });
});
