import { beforeEach, describe, expect, it, vi } from "vitest";
import { followRevision } from "../src/pages/revision";
import { header, requestsOf, revision, serve, setVisibility, unchanged, useFreshPage, type Answer } from "./support";

const URL = "/api/v1/revision";

useFreshPage();

beforeEach(() => {
  document.body.innerHTML = '<div id="logged-out" hidden></div><p id="live" data-live="up to date" data-lost="no connection"></p>';
});

function follow(answer: Answer, refresh: () => Promise<boolean> = async () => true) {
  const fetching = serve({ [URL]: answer });
  const refreshing = vi.fn(refresh);
  followRevision(7, refreshing);
  return { asked: () => requestsOf(fetching, URL), refreshing };
}

const line = () => document.getElementById("live") as HTMLElement;
const later = (ms: number) => vi.advanceTimersByTimeAsync(ms);

describe("followRevision", () => {
  it("asks with the ETag of the page, in the background", async () => {
    const { asked, refreshing } = follow(unchanged);
    await later(0);
    expect(header(asked()[0], "If-None-Match")).toBe('"7"');
    expect(header(asked()[0], "X-Background")).toBe("1");
    expect(line().textContent).toBe("up to date");
    await later(3000);
    expect(asked()).toHaveLength(2);
    expect(refreshing).not.toHaveBeenCalled();
  });

  it("refreshes once per new revision and sends the ETag of the answer back as it came", async () => {
    const answers = [revision(9), unchanged(), revision(10)];
    answers[0]?.headers.set("ETag", 'W/"9"');
    const { asked, refreshing } = follow(() => answers.shift() ?? unchanged());
    await later(0);
    expect(refreshing).toHaveBeenCalledTimes(1);
    await later(3000);
    expect(header(asked()[1], "If-None-Match")).toBe('W/"9"');
    expect(refreshing).toHaveBeenCalledTimes(1);
    await later(3000);
    expect(refreshing).toHaveBeenCalledTimes(2);
    await later(3000);
    expect(header(asked()[3], "If-None-Match")).toBe('"10"');
  });

  it("does not refresh for the same revision when something on the way drops the condition", async () => {
    const { refreshing } = follow(() => revision(7));
    await later(9000);
    expect(refreshing).not.toHaveBeenCalled();
    expect(line().textContent).toBe("up to date");
  });

  it("refreshes when the revision goes back, as after a restore", async () => {
    const { refreshing } = follow(() => revision(3));
    await later(3000);
    expect(refreshing).toHaveBeenCalledTimes(1);
  });

  it("asks with the old ETag until the page could be refreshed, and says that it is out of date", async () => {
    const results = [false, false, true];
    const { asked, refreshing } = follow(() => revision(8), async () => results.shift() ?? true);
    await later(3000);
    expect(refreshing).toHaveBeenCalledTimes(2);
    expect(header(asked()[1], "If-None-Match")).toBe('"7"');
    await later(3000);
    expect(line().textContent).toBe("no connection");
    await later(3000);
    expect(refreshing).toHaveBeenCalledTimes(3);
    expect(line().textContent).toBe("up to date");
    expect(line().classList.contains("is-lost")).toBe(false);
  });

  it.each([
    ["a network error", () => Promise.reject(new TypeError("failed to fetch"))],
    ["503", () => new Response("", { status: 503 })],
    ["an answer that is no JSON", () => new Response("<html>")],
    ["an answer without a revision", () => new Response('{"revision": "many"}')],
  ])("says after six seconds of %s that the connection is lost, and that it is back", async (_, failure) => {
    let broken = true;
    const { asked } = follow(() => (broken ? failure() : unchanged()));
    await later(5999);
    expect(line().classList.contains("is-lost")).toBe(false);
    await later(1);
    expect(line().classList.contains("is-lost")).toBe(true);
    expect(line().textContent).toBe("no connection");
    broken = false;
    const before = asked().length;
    await later(6000);
    expect(asked().length).toBeGreaterThan(before);
    expect(line().classList.contains("is-lost")).toBe(false);
    expect(line().textContent).toBe("up to date");
  });

  it("does not say that the connection is lost when the page is only hidden", async () => {
    follow(() => new Promise(() => undefined));
    await later(5000);
    setVisibility("hidden");
    await later(60_000);
    expect(line().textContent).toBe("");
  });

  it("says that the session has ended and stops", async () => {
    const { asked } = follow(() => new Response("", { status: 401 }));
    await later(60_000);
    expect(asked()).toHaveLength(1);
    expect(document.getElementById("logged-out")?.hidden).toBe(false);
    expect(line().classList.contains("is-lost")).toBe(false);
  });
});
