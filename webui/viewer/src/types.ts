/**
 * What the page passes to the viewer (`data-config`) and what the box answers about an image, with the checks that
 * turn untyped JSON into these types.
 *
 * Image coordinates everywhere: pixels, x to the right, y down, origin at the top left corner of the image, so the
 * centre of the first pixel is (0.5, 0.5).
 */
import { parseOrientation, type Orientation } from "./orientation";

export type Point = readonly [x: number, y: number];
export type Polygon = readonly Point[];

/** The area where the evidence is above `level` times its maximum. */
export interface Contour {
  level: number;
  polygons: readonly Polygon[];
}

export interface FindingConfig {
  id: number;
  label: string;
  /** Probability, 0 to 1. */
  score: number;
  threshold: number;
  positive: boolean;
  /** 8-bit grey PNG that covers exactly the extent of the image, or null when the model explains nothing. */
  heatmap_url: string | null;
  /** The region that contributed most to the score. */
  outline: readonly Polygon[];
  /** Higher levels inside the outline; none in results of older versions. */
  inner_contours: readonly Contour[];
  /** Where the evidence is strongest. */
  peak: Point | null;
  /** The frame the finding was made on, from 0; its marks are shown on no other. */
  frame?: number;
}

/** The result of an image, as far as it is drawn. */
export interface ImageResult {
  findings: readonly FindingConfig[];
  /** Why this image was not analysed, in a few words; empty when there is a result. */
  unread?: string;
}

/** Results by the ids of their images. */
export type Results = Readonly<Record<string, ImageResult>>;

export interface ImageConfig extends ImageResult {
  id: number;
  meta_url: string;
  /** Address of a frame, with `{frame}` in place of its number (from 0). */
  frame_url: string;
  title: string;
}

export interface ViewerConfig {
  lang: "zh" | "en";
  text: Readonly<Record<string, string>>;
  images: readonly ImageConfig[];
  /**
   * "cpu" does without WebGL, for a PC whose graphics driver draws wrongly; "webgl" uses it wherever there is some,
   * also where the browser only emulates it.
   */
  renderer?: "auto" | "webgl" | "cpu";
}

export const DTYPE_BYTES = {
  uint8: 1,
  int8: 1,
  uint16: 2,
  int16: 2,
  uint32: 4,
  int32: 4,
  float32: 4,
} as const;
export type Dtype = keyof typeof DTYPE_BYTES;

export interface ImageMeta {
  rows: number;
  columns: number;
  frames: number;
  samples: 1 | 3;
  dtype: Dtype;
  /** Modality value = stored value * slope + intercept (DICOM PS3.3 C.11.1). */
  slope: number;
  intercept: number;
  /** Windows of the file, [center, width] in modality values (DICOM PS3.3 C.11.2). */
  windows: readonly (readonly [center: number, width: number])[];
  voiFunction: string;
  inverted: boolean;
  /** [row, column] spacing in mm, or null when the file has none that can be used. */
  spacing: readonly [row: number, column: number] | null;
  /** How the image of the file was turned upright; findings have the coordinates of the file. */
  orientation: Orientation;
}

/** An error whose text is meant for the person at the screen. */
export class ViewerError extends Error {
  constructor(
    readonly title: string,
    readonly detail: string,
  ) {
    super(`${title} ${detail}`.trim());
    this.name = "ViewerError";
  }
}

/** True for a non-null object, so that its members can be asked for. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null;
}

function isNumber(value: unknown): value is number {
  return typeof value === "number" && Number.isFinite(value);
}

/** Reads the page's configuration; throws a `TypeError` that names what is wrong. */
export function parseConfig(json: string): ViewerConfig {
  const value: unknown = JSON.parse(json);
  if (!isRecord(value) || !Array.isArray(value["images"])) {
    throw new TypeError("data-config has no list of images");
  }
  for (const image of value["images"] as unknown[]) {
    if (!isRecord(image) || typeof image["meta_url"] !== "string" || typeof image["frame_url"] !== "string") {
      throw new TypeError("data-config names an image without its addresses");
    }
    completeResult(image);
    image["title"] ??= "";
  }
  value["text"] ??= {};
  return value as unknown as ViewerConfig;
}

/** Reads the results that came with a new report; an image without an object has none. */
export function parseResults(json: string): Results {
  const value: unknown = JSON.parse(json);
  if (!isRecord(value)) {
    throw new TypeError("data-results is no object");
  }
  const results = Object.entries(value).filter((entry): entry is [string, Record<string, unknown>] => isRecord(entry[1]));
  results.forEach(([, result]) => completeResult(result));
  return Object.fromEntries(results) as unknown as Results;
}

function completeResult(result: Record<string, unknown>): void {
  result["findings"] ??= [];
  for (const finding of result["findings"] as Record<string, unknown>[]) {
    finding["outline"] ??= [];
    finding["inner_contours"] ??= [];
  }
}

/** The spacing, or null unless both numbers make sense: files in the field carry 0, absurd values, or nothing. */
function usableSpacing(value: unknown): readonly [number, number] | null {
  if (!Array.isArray(value) || value.length !== 2) {
    return null;
  }
  const [row, column] = value as unknown[];
  if (!isNumber(row) || !isNumber(column) || row <= 0 || column <= 0) {
    return null;
  }
  // A pixel ten times as long as wide is an error of the file; drawn like this, the image would be a line.
  const ratio = row / column;
  return ratio > 10 || ratio < 0.1 ? null : [row, column];
}

function usableWindows(value: unknown): (readonly [number, number])[] {
  if (!Array.isArray(value)) {
    return [];
  }
  return (value as unknown[]).flatMap((pair) => {
    const [center, width] = Array.isArray(pair) ? (pair as unknown[]) : [];
    return isNumber(center) && isNumber(width) && width > 0 ? [[center, width] as const] : [];
  });
}

/** Reads the box's description of an image; throws a `TypeError` when the pixels cannot be drawn from it. */
export function parseMeta(value: unknown): ImageMeta {
  if (!isRecord(value)) {
    throw new TypeError("the description of the image is not an object");
  }
  const { rows, columns, frames, samples, dtype, slope, intercept } = value;
  if (!isNumber(rows) || !isNumber(columns) || rows < 1 || columns < 1) {
    throw new TypeError("the description of the image has no size");
  }
  if (typeof dtype !== "string" || !(dtype in DTYPE_BYTES) || (samples !== 1 && samples !== 3)) {
    throw new TypeError("the description of the image has an unknown pixel type");
  }
  return {
    rows,
    columns,
    frames: isNumber(frames) && frames >= 1 ? frames : 1,
    samples,
    dtype: dtype as Dtype,
    slope: isNumber(slope) && slope !== 0 ? slope : 1,
    intercept: isNumber(intercept) ? intercept : 0,
    windows: samples === 1 ? usableWindows(value["windows"]) : [],
    voiFunction: typeof value["voi_function"] === "string" ? value["voi_function"] : "LINEAR",
    inverted: value["photometric"] === "MONOCHROME1",
    spacing: usableSpacing(value["spacing"]),
    orientation: parseOrientation(value["orientation"]),
  };
}
