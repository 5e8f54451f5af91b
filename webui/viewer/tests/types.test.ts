// @vitest-environment node
import { UPRIGHT } from "../src/orientation";
import { describe, expect, it } from "vitest";
import { parseConfig, parseMeta } from "../src/types";

const GOOD = { rows: 4, columns: 8, samples: 1, dtype: "uint16", windows: [[40, 400], [1, 0], ["a"]], spacing: [0.2, 0.2] };

describe("parseMeta", () => {
  it("reads what the box says and drops windows that make no sense", () => {
    expect(parseMeta(GOOD)).toEqual({
      rows: 4, columns: 8, frames: 1, samples: 1, dtype: "uint16", slope: 1, intercept: 0,
      windows: [[40, 400]], voiFunction: "LINEAR", inverted: false, spacing: [0.2, 0.2], orientation: UPRIGHT,
    });
    expect(parseMeta({ ...GOOD, photometric: "MONOCHROME1" }).inverted).toBe(true);
  });

  it.each([[[0, 0]], [[0.2]], [["a", 1]], [[20, 1]], [null], [[-1, 1]]])("does not measure by the spacing %j", (spacing) => {
    expect(parseMeta({ ...GOOD, spacing }).spacing).toBeNull();
  });

  it.each([[null], [{ ...GOOD, rows: 0 }], [{ ...GOOD, dtype: "float16" }], [{ ...GOOD, samples: 4 }]])("refuses %j", (value) => {
    expect(() => parseMeta(value)).toThrow(TypeError);
  });
});

describe("parseConfig", () => {
  it("fills in what is left out", () => {
    const config = parseConfig('{"lang": "en", "images": [{"meta_url": "/m", "frame_url": "/f", "findings": [{"id": 1}]}]}');
    expect(config.text).toEqual({});
    expect(config.images[0]).toMatchObject({ title: "", findings: [{ id: 1, outline: [], inner_contours: [] }] });
  });

  it.each(["{}", "null", '{"images": [{"meta_url": "/m"}]}'])("refuses %s", (json) => {
    expect(() => parseConfig(json)).toThrow(TypeError);
  });
});
