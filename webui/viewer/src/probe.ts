/** Measures what was really drawn: for tests, and to notice a graphics driver that draws nothing. */
import type { DrawnRange } from "./pixels";
import type { ImageState } from "./state";
import type { Point } from "./types";
import type { Size } from "./view";

/** Grey values, 0 to 255. */
export interface Probe {
  min: number;
  max: number;
  mean: number;
}

/** Reads the canvas between two corners of the image, given in CSS pixels of the stage. */
export function measure(canvas: HTMLCanvasElement, stage: Size, topLeft: Point, bottomRight: Point): Probe {
  const ratio = canvas.width / Math.max(1, stage.width);
  // One pixel less at each side: the edge is blended with the background.
  const left = Math.max(0, Math.ceil(topLeft[0] * ratio) + 1);
  const top = Math.max(0, Math.ceil(topLeft[1] * ratio) + 1);
  const width = Math.min(canvas.width, Math.floor(bottomRight[0] * ratio) - 1) - left;
  const height = Math.min(canvas.height, Math.floor(bottomRight[1] * ratio) - 1) - top;
  if (width < 1 || height < 1) {
    return { min: 0, max: 0, mean: 0 };
  }
  // Read a copy: after reading a canvas back, browsers no longer draw it with the graphics card.
  const copy = document.createElement("canvas");
  copy.width = width;
  copy.height = height;
  const context = copy.getContext("2d", { willReadFrequently: true });
  context?.drawImage(canvas, left, top, width, height, 0, 0, width, height);
  const data = context?.getImageData(0, 0, width, height).data ?? new Uint8ClampedArray(4);
  let min = 255;
  let max = 0;
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) {
    const grey = 0.2126 * (data[i] as number) + 0.7152 * (data[i + 1] as number) + 0.0722 * (data[i + 2] as number);
    min = Math.min(min, grey);
    max = Math.max(max, grey);
    sum += grey;
  }
  return { min: Math.round(min), max: Math.round(max), mean: sum / (data.length / 4) };
}

/** True when a good part of the pixels should be dark and a good part bright, so that a uniform result is wrong. */
export function expectedContrast({ frame }: ImageState, { lower, upper }: DrawnRange): boolean {
  if (!frame) {
    return false;
  }
  const stride = Math.max(1, Math.floor(frame.pixels.length / 4096));
  let dark = 0;
  let bright = 0;
  let total = 0;
  for (let i = 0; i < frame.pixels.length; i += stride, total++) {
    const grey = ((frame.pixels[i] as number) - lower) / (upper - lower);
    dark += grey < 0.3 ? 1 : 0;
    bright += grey > 0.6 ? 1 : 0;
  }
  return dark > total / 20 && bright > total / 20;
}
