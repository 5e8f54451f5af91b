// @vitest-environment node
import { describe, expect, it } from "vitest";
import { cornerTexts } from "../src/corners";
import { decodeFrame } from "../src/pixels";
import { ImageState, type Settings } from "../src/state";
import { fit } from "../src/view";
import { english, image, LIMITS, meta } from "./measures";

const SETTINGS: Settings = { mode: "window", heatmap: false, outline: true, opacity: 50 };
const AROUND = { hovered: "", note: "", isDrawnByCpu: false };

function shown(spacing: readonly [number, number] | null = [0.2, 0.2]): ImageState {
  const state = new ImageState(image(), english);
  state.meta = meta({ spacing });
  state.frame = decodeFrame(state.meta, new Uint16Array(32).buffer, LIMITS);
  state.window = { center: 40, width: 400 };
  state.view = { ...fit(state.extent, { width: 8, height: 8 }), scale: 1.5 };
  return state;
}

describe("cornerTexts", () => {
  it("has none while no image is shown", () => {
    expect(cornerTexts(english, new ImageState(image(), english), SETTINGS, AROUND)).toBeNull();
  });

  it("says title, zoom and window", () => {
    const texts = cornerTexts(english, shown(), SETTINGS, { ...AROUND, hovered: "(1, 2)  3" });
    expect(texts).toMatchObject({ title: "PA", right: "(1, 2)  3", hint: "" });
    expect(texts?.left).toContain("150");
    expect(texts?.left).toContain("400");
    expect(texts?.left.split("\n")).toHaveLength(2);
  });

  it("says what limits the image: no spacing, the CPU renderer, the inversion", () => {
    const state = shown(null);
    state.inverted = true;
    const texts = cornerTexts(english, state, SETTINGS, { ...AROUND, isDrawnByCpu: true });
    expect(texts?.right).toBe(`${english("status_no_spacing")}\n${english("status_cpu")}`);
    expect(texts?.left.split("\n")[0]).toBe(english("status_inverted"));
  });

  it("hints at measuring, unless there is a message", () => {
    const measuring: Settings = { ...SETTINGS, mode: "measure" };
    expect(cornerTexts(english, shown(), measuring, AROUND)?.hint).toBe(english("measure_hint"));
    expect(cornerTexts(english, shown(), measuring, { ...AROUND, note: "failed" })?.hint).toBe("failed");
  });
});
