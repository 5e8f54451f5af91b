import { beforeEach, describe, expect, it } from "vitest";
import { fetchFragment } from "../src/pages/fragment";
import { header, page, requestsOf, serve, useFreshPage } from "./support";

useFreshPage();

beforeEach(() => {
  document.head.innerHTML = '<meta name="csrf-token" content="token">';
  document.body.innerHTML = '<div id="logged-out" hidden></div>';
});

const signal = new AbortController().signal;

describe("fetchFragment", () => {
  it("asks for the part alone, in the background", async () => {
    const fetching = serve({ "/health": () => page("<p>one</p>") });
    expect((await fetchFragment("/health", signal))?.innerHTML).toBe("<p>one</p>");
    const [options] = requestsOf(fetching, "/health");
    expect(options?.method).toBeUndefined();
    expect(header(options, "X-Fragment")).toBe("1");
    expect(header(options, "X-Background")).toBe("1");
    expect(header(options, "X-CSRFToken")).toBeNull();
  });

  it("posts fields with the token of the page, so that a name never stands in an address", async () => {
    const fetching = serve({ "/": () => page("") });
    await fetchFragment("/", signal, { q: "王 小", before: "7" });
    const [options] = requestsOf(fetching, "/");
    expect(options?.method).toBe("POST");
    expect(header(options, "X-CSRFToken")).toBe("token");
    expect([...(options?.body as URLSearchParams)]).toEqual([["q", "王 小"], ["before", "7"]]);
  });

  it("is null when the box cannot be reached or answers with an error", async () => {
    serve({ "/error": () => new Response("<p>sorry</p>", { status: 500 }) });
    expect(await fetchFragment("/error", signal)).toBeNull();
    expect(await fetchFragment("/unreachable", signal)).toBeNull();
    expect(document.getElementById("logged-out")?.hidden).toBe(true);
  });

  it("says that the session has ended", async () => {
    serve({ "/": () => new Response("", { status: 401 }) });
    expect(await fetchFragment("/", signal)).toBeNull();
    expect(document.getElementById("logged-out")?.hidden).toBe(false);
  });
});
