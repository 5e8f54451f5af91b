/**
 * Raw pixels of one frame -> what the renderer draws. Pure.
 *
 * The renderer gets 8 or 16-bit integers only: every WebGL 2 device can filter them, the CPU renderer looks them up in
 * a table, and both show the same image. 32-bit integers and floats are spread over 16 bits of the frame's own range;
 * the linear map back to modality values travels with the pixels, so window values stay those of the file.
 */
import { DTYPE_BYTES, type Dtype, type ImageMeta } from "./types";

export type DrawablePixels = Uint8Array | Uint16Array | Int16Array;
type StoredPixels = DrawablePixels | Int8Array | Uint32Array | Int32Array | Float32Array;

export interface Frame {
  /** Row by row; RGB interleaved when `samples` is 3. */
  pixels: DrawablePixels;
  columns: number;
  rows: number;
  samples: 1 | 3;
  /** One drawn pixel stands for `reduction` x `reduction` pixels of the image (1 unless the image is huge). */
  reduction: number;
  /** Modality value = drawn value * slope + intercept. */
  slope: number;
  intercept: number;
  /** Range of the drawn values. */
  min: number;
  max: number;
}

export interface Limits {
  /** Longest side that the renderer can hold, in pixels. */
  maxSide: number;
  maxPixels: number;
}

export interface VoiWindow {
  center: number;
  width: number;
}

const ARRAYS = {
  uint8: Uint8Array,
  int8: Int8Array,
  uint16: Uint16Array,
  int16: Int16Array,
  uint32: Uint32Array,
  int32: Int32Array,
  float32: Float32Array,
} as const satisfies Record<Dtype, unknown>;

/** Bytes that one frame must have. */
export function frameBytes(meta: ImageMeta): number {
  return meta.rows * meta.columns * meta.samples * DTYPE_BYTES[meta.dtype];
}

/** Smallest and largest finite value; [0, 0] when there is none. */
function finiteRange(values: StoredPixels): [min: number, max: number] {
  let min = Infinity;
  let max = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i] as number;
    // A comparison with NaN is false, so NaN never counts; infinities are excluded here.
    if (value < min && value !== -Infinity) min = value;
    if (value > max && value !== Infinity) max = value;
  }
  return min <= max ? [min, max] : [0, 0];
}

/** Mean over squares of `factor` x `factor` pixels, in the type of the input. */
function reduce(values: StoredPixels, meta: ImageMeta, factor: number): StoredPixels {
  const { rows, columns, samples } = meta;
  const outColumns = Math.ceil(columns / factor);
  const outRows = Math.ceil(rows / factor);
  const out = new ARRAYS[meta.dtype](outColumns * outRows * samples);
  for (let oy = 0; oy < outRows; oy++) {
    const yEnd = Math.min(rows, (oy + 1) * factor);
    for (let ox = 0; ox < outColumns; ox++) {
      const xEnd = Math.min(columns, (ox + 1) * factor);
      const count = (yEnd - oy * factor) * (xEnd - ox * factor);
      for (let s = 0; s < samples; s++) {
        let sum = 0;
        for (let y = oy * factor; y < yEnd; y++) {
          for (let x = ox * factor; x < xEnd; x++) {
            sum += values[(y * columns + x) * samples + s] as number;
          }
        }
        out[(oy * outColumns + ox) * samples + s] = sum / count;
      }
    }
  }
  return out;
}

/** How many pixels of the image one drawn pixel must stand for, so that the frame fits the renderer. */
export function reductionFor(meta: ImageMeta, limits: Limits): number {
  const bySide = Math.ceil(Math.max(meta.rows, meta.columns) / limits.maxSide);
  const byArea = Math.ceil(Math.sqrt((meta.rows * meta.columns) / limits.maxPixels));
  return Math.max(1, bySide, byArea);
}

/** Spreads [min, max] over 16 bits; NaN becomes the smallest value. */
function to16Bit(values: StoredPixels, min: number, max: number): Uint16Array<ArrayBuffer> {
  const factor = max > min ? 65535 / (max - min) : 0;
  const out = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const scaled = ((values[i] as number) - min) * factor + 0.5;
    // Infinities are outside the finite range and must not wrap around to the other end.
    out[i] = scaled > 0 ? Math.min(65535, scaled) : 0;
  }
  return out;
}

/** Colour is drawn with 8 bits per sample; deeper samples keep their highest bits. */
function colour8Bit(values: StoredPixels, max: number): Uint8Array<ArrayBuffer> {
  const factor = max > 255 ? 255 / (max > 65535 ? max : 65535) : max <= 1 && values instanceof Float32Array ? 255 : 1;
  return Uint8Array.from(values as ArrayLike<number>, (value) => Math.max(0, Math.min(255, value * factor)));
}

/**
 * Turns the bytes of one frame into what the renderer draws.
 *
 * @param buffer little-endian pixels, exactly `frameBytes(meta)` long.
 */
export function decodeFrame(meta: ImageMeta, buffer: ArrayBuffer, limits: Limits): Frame {
  const reduction = reductionFor(meta, limits);
  const stored: StoredPixels = new ARRAYS[meta.dtype](buffer);
  const values = reduction > 1 ? reduce(stored, meta, reduction) : stored;
  const [min, max] = finiteRange(values);
  const size = {
    columns: Math.ceil(meta.columns / reduction),
    rows: Math.ceil(meta.rows / reduction),
    samples: meta.samples,
    reduction,
  };
  if (meta.samples === 3) {
    const pixels = values instanceof Uint8Array ? values : colour8Bit(values, max);
    return { ...size, pixels, slope: 1, intercept: 0, min: 0, max: 255 };
  }
  const { slope, intercept } = meta;
  if (values instanceof Uint8Array || values instanceof Uint16Array || values instanceof Int16Array) {
    return { ...size, pixels: values, slope, intercept, min, max };
  }
  if (values instanceof Int8Array) {
    return { ...size, pixels: Int16Array.from(values), slope, intercept, min, max };
  }
  const step = max > min ? (max - min) / 65535 : 1;
  return {
    ...size,
    pixels: to16Bit(values, min, max),
    slope: slope * step,
    intercept: intercept + slope * min,
    min: 0,
    max: max > min ? 65535 : 0,
  };
}

/** Modality value of a drawn value. */
export function modalityValue(frame: Frame, value: number): number {
  return value * frame.slope + frame.intercept;
}

/** The window that shows all values of the frame, in modality values. */
export function fullWindow(frame: Frame, exact: boolean): VoiWindow {
  if (frame.samples === 3) {
    return { center: 128, width: 256 };
  }
  const a = modalityValue(frame, frame.min);
  const b = modalityValue(frame, frame.max);
  return windowOf(Math.min(a, b), Math.max(a, b), exact);
}

/** The window from the 1st to the 99th percentile, in modality values: bright markers and collimation do not count. */
export function autoWindow(frame: Frame, exact: boolean): VoiWindow {
  if (frame.samples === 3 || frame.max <= frame.min) {
    return fullWindow(frame, exact);
  }
  const bins = new Uint32Array(1024);
  const toBin = (bins.length - 1) / (frame.max - frame.min);
  const stride = Math.max(1, Math.floor(frame.pixels.length / 250_000));
  let total = 0;
  for (let i = 0; i < frame.pixels.length; i += stride, total++) {
    const bin = Math.floor(((frame.pixels[i] as number) - frame.min) * toBin);
    bins[bin] = (bins[bin] as number) + 1;
  }
  const at = (share: number): number => {
    let left = total * share;
    const bin = bins.findIndex((count) => (left -= count) <= 0);
    return modalityValue(frame, frame.min + Math.max(0, bin) / toBin);
  };
  const [a, b] = [at(0.01), at(0.99)];
  return a === b ? fullWindow(frame, exact) : windowOf(Math.min(a, b), Math.max(a, b), exact);
}

/** True when the window is defined without the offsets 0.5 and 1 of DICOM's LINEAR (PS3.3 C.11.2.1.2 and .1.3.2). */
export function isExact(meta: ImageMeta): boolean {
  return meta.voiFunction === "LINEAR_EXACT" || meta.dtype === "float32" || !Number.isInteger(meta.slope);
}

function windowOf(lower: number, upper: number, exact: boolean): VoiWindow {
  if (lower === upper) {
    // A uniform image is drawn grey: black would look like no image at all.
    return exact ? { center: lower, width: 1 } : { center: lower + 0.5, width: 2 };
  }
  return exact
    ? { center: (lower + upper) / 2, width: upper - lower }
    : { center: (lower + upper + 1) / 2, width: upper - lower + 1 };
}

export interface DrawnRange {
  /** Drawn values that become black and white. */
  lower: number;
  upper: number;
  /** True when a negative slope inverts the grey scale. */
  reversed: boolean;
}

/**
 * The window in drawn values.
 *
 * SIGMOID windows are drawn as the straight line with the same slope at their centre: the CPU renderer has no other,
 * and both renderers must show the same image.
 */
export function drawnRange(frame: Frame, window: VoiWindow, exact: boolean): DrawnRange {
  const linear = !exact && window.width >= 1;
  const lower = linear ? window.center - 0.5 - (window.width - 1) / 2 : window.center - window.width / 2;
  const upper = linear ? window.center - 0.5 + (window.width - 1) / 2 : window.center + window.width / 2;
  const a = (lower - frame.intercept) / frame.slope;
  const b = (upper - frame.intercept) / frame.slope;
  const low = Math.min(a, b);
  // A window of width 1 is a step; the renderer divides by the difference, which must not be 0.
  return { lower: low, upper: Math.max(a, b, low + 0.01), reversed: frame.slope < 0 };
}
