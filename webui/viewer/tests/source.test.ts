// @vitest-environment node
import { describe, expect, it, vi } from "vitest";
import { Source } from "../src/source";
import { ViewerError } from "../src/types";
import { english, image, LIMITS } from "./measures";
import { requestsOf, serve, type Answer } from "./support";

const META = { rows: 4, columns: 8, samples: 1, dtype: "uint16" };
const json = (value: unknown, status = 200, type = "application/json") =>
  new Response(JSON.stringify(value), { status, headers: { "Content-Type": type } });
const pixels = (bytes: number) => new Response(new Uint8Array(bytes), { headers: { "Content-Type": "application/octet-stream" } });
const signal = new AbortController().signal;

function source(answers: Record<string, Answer>) {
  const fetching = serve({ "/meta": () => json(META), ...answers });
  return { fetching, source: new Source(english, LIMITS), config: image() };
}

describe("Source", () => {
  it("fetches a frame once, with its progress", async () => {
    const { fetching, source: box, config } = source({ "/frames/0": () => pixels(64) });
    const progress = vi.fn();
    const frame = await box.frame(config, 0, signal, progress);
    expect(progress).toHaveBeenLastCalledWith(64, 64);
    expect(await box.frame(config, 0, signal, progress)).toBe(frame);
    expect(requestsOf(fetching, "/frames/0")).toHaveLength(1);
    expect(requestsOf(fetching, "/meta")).toHaveLength(1);
    box.setLimits(LIMITS);
    await box.frame(config, 0, signal, progress);
    expect(requestsOf(fetching, "/frames/0")).toHaveLength(2);
  });

  it("shows the words of the box about an error (RFC 9457)", async () => {
    const problem = { title: "No pixels", detail: "The file has none." };
    const { source: box, config } = source({ "/frames/0": () => json(problem, 404, "application/problem+json") });
    await expect(box.frame(config, 0, signal, vi.fn())).rejects.toMatchObject(problem);
  });

  it.each<[string, Answer]>([
    ["too few bytes", () => pixels(10)],
    ["too many bytes", () => pixels(100)],
    ["the login page", () => new Response("<html>", { headers: { "Content-Type": "text/html" } })],
    ["an error without words", () => new Response("", { status: 500 })],
    ["a network error", () => Promise.reject(new TypeError("failed to fetch"))],
  ])("refuses %s with a text for the person", async (_, answer) => {
    const { source: box, config } = source({ "/frames/0": answer });
    await expect(box.frame(config, 0, signal, vi.fn())).rejects.toBeInstanceOf(ViewerError);
  });

  it("passes a cancelled request on as such", async () => {
    const { source: box, config } = source({ "/frames/0": () => Promise.reject(new DOMException("", "AbortError")) });
    await expect(box.frame(config, 0, signal, vi.fn())).rejects.toMatchObject({ name: "AbortError" });
  });
});
