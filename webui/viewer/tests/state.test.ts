// @vitest-environment node
import { describe, expect, it } from "vitest";
import { decodeFrame } from "../src/pixels";
import { formatValue, ImageState } from "../src/state";
import type { FindingConfig, ImageMeta } from "../src/types";
import { english, finding, image, LIMITS, meta } from "./measures";

function state(values: Partial<ImageMeta> = {}, ...findings: FindingConfig[]): ImageState {
  const made = new ImageState(image(...findings), english);
  made.meta = meta(values);
  made.frame = decodeFrame(made.meta, Uint16Array.from({ length: 32 }, (_, index) => index * 10).buffer, LIMITS);
  return made;
}

describe("ImageState", () => {
  it("shows a single finding, and of several the positive ones", () => {
    const [below, above] = [finding({ id: 1, positive: false, score: 0.1 }), finding({ id: 2 })];
    expect([...new ImageState(image(below), english).shown]).toEqual([1]);
    expect([...new ImageState(image(below, above), english).shown]).toEqual([2]);
  });

  it("takes a result that arrives, and leaves what a person chose", () => {
    const one = new ImageState(image(), english);
    expect(one.setResult({ findings: [], unread: "In the queue" })).toBe(false);
    expect(one.config.unread).toBe("In the queue");
    const below = finding({ id: 1, positive: false, score: 0.1 });
    expect(one.setResult({ findings: [below] })).toBe(true);
    expect(one.config.unread).toBe("");
    expect([...one.shown]).toEqual([1]);
    one.shown.delete(1);
    expect(one.setResult({ findings: [{ ...below }] })).toBe(false);
    expect(one.setResult({ findings: [{ ...below }, finding({ id: 2 })] })).toBe(true);
    expect(one.config.findings[0]).toBe(below);
    expect([...one.shown]).toEqual([2]);
    expect(one.setResult(undefined)).toBe(true);
    expect([...one.shown]).toEqual([]);
  });

  it("shows the finding with the highest score when none is chosen", () => {
    const one = state({}, finding({ id: 1, positive: false, score: 0.1 }), finding({ id: 2, positive: false, score: 0.3 }));
    one.showSomething();
    expect([...one.shown]).toEqual([2]);
    expect(one.visibleFindings().map(({ id }) => id)).toEqual([2]);
  });

  it("shows marks only on the frame that they were made on", () => {
    const one = state({ frames: 3 }, finding({ frame: 2 }));
    expect(one.visibleFindings()).toEqual([]);
    one.shownNumber = 2;
    expect(one.visibleFindings()).toHaveLength(1);
  });

  it("offers the windows of the file, a computed one and the full range, and knows which is active", () => {
    const one = state({ windows: [[100, 50], [200, 400]] });
    expect(one.presets()).toHaveLength(4);
    expect(one.presets()).toBe(one.presets());
    one.window = one.defaultWindow();
    expect(one.window).toEqual({ center: 100, width: 50 });
    expect(one.activePreset()).toBe(0);
    one.shiftWindow(0.1, 0);
    expect(one.activePreset()).toBe(-1);
    expect(new ImageState(image(), english).presets()).toEqual([]);
  });

  it("starts with the full range when the file has no window", () => {
    expect(state().defaultWindow()).toEqual({ center: 155.5, width: 311 });
  });

  it("keeps a shifted window within reach of the values", () => {
    const one = state();
    one.shiftWindow(1, 1); // nothing to shift yet
    expect(one.window).toBeNull();
    one.window = one.defaultWindow();
    one.shiftWindow(1e9, 1e9);
    expect(one.window.width).toBeLessThanOrEqual(311 * 4);
    expect(one.window.center).toBeLessThanOrEqual(155.5 + 311 * 4);
    one.shiftWindow(-1e9, 0);
    expect(one.window.width).toBe(1);
  });

  it("tells the value under a point, and none outside of the image", () => {
    const one = state({ slope: 2, intercept: 1 });
    expect(one.valueAt([2.5, 1.5])).toBe("(2, 1)  201");
    expect(one.valueAt([-0.1, 0])).toBe("");
    expect(one.valueAt([8, 0])).toBe("");
  });

  it("has the shape of its pixels from the spacing", () => {
    expect(state({ spacing: [0.4, 0.2] }).extent).toEqual({ rows: 4, columns: 8, aspect: 2 });
    expect(state().extent.aspect).toBe(1);
  });
});

it.each([[3, "3"], [0.123456, "0.1235"], [12_345.6, "12346"], [-2.5, "-2.5"]])("formatValue(%s) is %s", (value, text) => {
  expect(formatValue(value)).toBe(text);
});
