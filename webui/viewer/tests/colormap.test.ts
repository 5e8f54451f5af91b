// @vitest-environment node
import { describe, expect, it } from "vitest";
import { colourTable } from "../src/colormap";

function luminance(index: number): number {
  const rgb = [...colourTable().subarray(index * 4, index * 4 + 3)].map((byte) => (byte / 255) ** 2.2);
  const [r, g, b] = rgb as [number, number, number];
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

describe("colourTable", () => {
  it("has RGBA for 256 values and is computed once", () => {
    expect(colourTable()).toHaveLength(1024);
    expect(colourTable()).toBe(colourTable());
  });

  it("gets lighter with the value, for colour-blind eyes and prints in black and white", () => {
    for (let index = 8; index < 256; index += 8) {
      expect(luminance(index)).toBeGreaterThan(luminance(index - 8));
    }
  });

  it("is transparent for low values and opaque from the middle", () => {
    const alpha = (index: number) => colourTable()[index * 4 + 3];
    expect(alpha(0)).toBe(0);
    expect(alpha(128)).toBe(255);
    expect(alpha(255)).toBe(255);
  });
});
