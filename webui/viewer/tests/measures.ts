/** Descriptions of images for the tests of the viewer's pure modules. */
import { UPRIGHT } from "../src/orientation";
import { translator } from "../src/text";
import type { FindingConfig, ImageConfig, ImageMeta } from "../src/types";

export const english = translator({ lang: "en", text: {} });

export function meta(values: Partial<ImageMeta> = {}): ImageMeta {
  return {
    rows: 4, columns: 8, frames: 1, samples: 1, dtype: "uint16", slope: 1, intercept: 0,
    windows: [], voiFunction: "LINEAR", inverted: false, spacing: null, orientation: UPRIGHT, ...values,
  };
}

export function finding(values: Partial<FindingConfig> = {}): FindingConfig {
  return {
    id: 1, label: "pneumonia", score: 0.9, threshold: 0.4, positive: true, heatmap_url: null,
    outline: [], inner_contours: [], peak: null, ...values,
  };
}

export function image(...findings: FindingConfig[]): ImageConfig {
  return { id: 7, meta_url: "/meta", frame_url: "/frames/{frame}", title: "PA", findings };
}

export const LIMITS = { maxSide: 4096, maxPixels: 4096 * 4096 };
