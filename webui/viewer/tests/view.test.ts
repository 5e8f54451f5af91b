// @vitest-environment node
import { describe, expect, it } from "vitest";
import { fit, panBy, toImage, toStage, zoomAt } from "../src/view";

const extent = { columns: 200, rows: 100, aspect: 2 };
const stage = { width: 400, height: 300 };

describe("view", () => {
  it("fits the image by the shape of its pixels", () => {
    expect(fit(extent, stage)).toEqual({ x: 100, y: 50, scale: 1.5, fitted: true });
  });

  it("maps points to the stage and back", () => {
    const view = { x: 120, y: 30, scale: 3, fitted: false };
    expect(toStage(view, extent, stage, [120, 30])).toEqual([200, 150]);
    const [x, y] = toImage(view, extent, stage, toStage(view, extent, stage, [10, 20]));
    expect([x, y]).toEqual([expect.closeTo(10), expect.closeTo(20)]);
  });

  it("keeps the image point under the pointer when it zooms", () => {
    const at = [50, 60] as const;
    const before = fit(extent, stage);
    const after = zoomAt(before, extent, stage, 2, at);
    expect(after.scale).toBe(3);
    const [x, y] = toImage(after, extent, stage, at);
    const [x0, y0] = toImage(before, extent, stage, at);
    expect([x, y]).toEqual([expect.closeTo(x0), expect.closeTo(y0)]);
    expect(after.fitted).toBe(false);
  });

  it("zooms from half the stage to 64 screen pixels per image pixel", () => {
    expect(zoomAt(fit(extent, stage), extent, stage, 1e-9, [0, 0]).scale).toBe(0.75);
    expect(zoomAt(fit(extent, stage), extent, stage, 1e9, [0, 0]).scale).toBe(64);
  });

  it("never loses the image when it is moved", () => {
    const moved = panBy(fit(extent, stage), extent, 1e6, -1e6);
    expect([moved.x, moved.y]).toEqual([0, 100]);
  });
});
