// @vitest-environment node
import { describe, expect, it } from "vitest";
import { autoWindow, drawnRange, frameBytes, fullWindow, isExact, decodeFrame, modalityValue, reductionFor } from "../src/pixels";
import { LIMITS, meta } from "./measures";

describe("decodeFrame", () => {
  it("passes 16-bit values on as they are", () => {
    const stored = Uint16Array.from({ length: 32 }, (_, index) => index * 3);
    const frame = decodeFrame(meta({ slope: 2, intercept: -10 }), stored.buffer, LIMITS);
    expect(frame).toMatchObject({ min: 0, max: 93, reduction: 1, slope: 2, intercept: -10 });
    expect(modalityValue(frame, 93)).toBe(176);
  });

  it("spreads floats over 16 bits, with a linear map back to modality values", () => {
    const stored = Float32Array.from({ length: 32 }, (_, index) => index / 31 - 0.5);
    stored[3] = NaN;
    stored[4] = Infinity;
    stored[5] = -Infinity;
    const frame = decodeFrame(meta({ dtype: "float32" }), stored.buffer, LIMITS);
    expect([frame.pixels[0], frame.pixels[3], frame.pixels[4], frame.pixels[5], frame.pixels[31]]).toEqual([0, 0, 65535, 0, 65535]);
    expect(modalityValue(frame, frame.pixels[31] as number)).toBeCloseTo(0.5, 4);
    expect(modalityValue(frame, frame.pixels[16] as number)).toBeCloseTo(stored[16] as number, 4);
  });

  it("draws an image without any finite value", () => {
    const frame = decodeFrame(meta({ dtype: "float32" }), new Float32Array(32).fill(NaN).buffer, LIMITS);
    expect([frame.min, frame.max]).toEqual([0, 0]);
  });

  it("keeps the highest bits of deep colour", () => {
    const stored = new Uint16Array(96).fill(65535);
    expect(decodeFrame(meta({ samples: 3 }), stored.buffer, LIMITS).pixels[0]).toBe(255);
  });

  it("reduces an image that the renderer cannot hold by means", () => {
    const limits = { maxSide: 4, maxPixels: 1e9 };
    const stored = Uint8Array.from({ length: 32 }, (_, index) => (index % 8 < 4 ? 10 : 20));
    expect(reductionFor(meta(), limits)).toBe(2);
    const frame = decodeFrame(meta({ dtype: "uint8" }), stored.buffer, limits);
    expect(frame).toMatchObject({ columns: 4, rows: 2, reduction: 2 });
    expect([...frame.pixels]).toEqual([10, 10, 20, 20, 10, 10, 20, 20]);
  });

  it("knows how many bytes a frame has", () => {
    expect(frameBytes(meta({ samples: 3, dtype: "uint8" }))).toBe(96);
    expect(frameBytes(meta({ dtype: "int32" }))).toBe(128);
  });
});

describe("windows", () => {
  const frame = decodeFrame(meta(), Uint16Array.from({ length: 32 }, (_, index) => index * 100).buffer, LIMITS);

  it("show all values, with the half and the whole unit of DICOM's LINEAR", () => {
    expect(fullWindow(frame, false)).toEqual({ center: 1550.5, width: 3101 });
    expect(fullWindow(frame, true)).toEqual({ center: 1550, width: 3100 });
    expect(drawnRange(frame, fullWindow(frame, false), false)).toEqual({ lower: 0, upper: 3100, reversed: false });
    expect(drawnRange(frame, fullWindow(frame, true), true)).toEqual({ lower: 0, upper: 3100, reversed: false });
  });

  it("leave a few bright pixels out when computed", () => {
    const stored = Uint16Array.from({ length: 32 * 32 }, (_, index) => index % 1000);
    stored[0] = 65535;
    const bright = decodeFrame(meta({ rows: 32, columns: 32 }), stored.buffer, LIMITS);
    const window = autoWindow(bright, false);
    expect(window.center + window.width / 2).toBeLessThan(1200);
  });

  it("draw a uniform image grey", () => {
    const uniform = decodeFrame(meta(), new Uint16Array(32).fill(7).buffer, LIMITS);
    expect(fullWindow(uniform, false)).toEqual({ center: 7.5, width: 2 });
    expect(autoWindow(uniform, true)).toEqual({ center: 7, width: 1 });
  });

  it("turn the grey scale round for a negative slope, and never have a width of zero", () => {
    const negative = { ...frame, slope: -1 };
    const range = drawnRange(negative, { center: 0, width: 1 }, false);
    expect(range.reversed).toBe(true);
    expect(range.upper).toBeGreaterThan(range.lower);
  });

  it("are exact for floats, fractions and LINEAR_EXACT", () => {
    expect(isExact(meta())).toBe(false);
    expect(isExact(meta({ slope: 0.5 }))).toBe(true);
    expect(isExact(meta({ dtype: "float32" }))).toBe(true);
    expect(isExact(meta({ voiFunction: "LINEAR_EXACT" }))).toBe(true);
  });
});
