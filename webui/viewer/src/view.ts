/** Where the image is on the stage: zoom and pan as pure functions. Lengths on the stage are CSS pixels. */
import type { Point } from "./types";

export interface Extent {
  columns: number;
  rows: number;
  /** Height of a pixel divided by its width (1 when the file has no spacing). */
  aspect: number;
}

export interface Size {
  width: number;
  height: number;
}

export interface View {
  /** Image point in the middle of the stage. */
  x: number;
  y: number;
  /** CSS pixels per image column. */
  scale: number;
  /** True while the image is fitted to the stage, so that it keeps doing so when the stage changes its size. */
  fitted: boolean;
}

/** The largest view that shows the complete image. */
export function fit(image: Extent, stage: Size): View {
  const scale = Math.min(stage.width / image.columns, stage.height / (image.rows * image.aspect));
  return { x: image.columns / 2, y: image.rows / 2, scale, fitted: true };
}

/** Where an image point is on the stage. */
export function toStage(view: View, image: Extent, stage: Size, [x, y]: Point): Point {
  return [
    (x - view.x) * view.scale + stage.width / 2,
    (y - view.y) * view.scale * image.aspect + stage.height / 2,
  ];
}

/** Which image point is under a point of the stage. */
export function toImage(view: View, image: Extent, stage: Size, [x, y]: Point): Point {
  return [
    view.x + (x - stage.width / 2) / view.scale,
    view.y + (y - stage.height / 2) / (view.scale * image.aspect),
  ];
}

/** Moves the image by a distance on the stage; its edge never passes the middle, so it stays visible. */
export function panBy(view: View, image: Extent, dx: number, dy: number): View {
  return {
    x: clamp(view.x - dx / view.scale, 0, image.columns),
    y: clamp(view.y - dy / (view.scale * image.aspect), 0, image.rows),
    scale: view.scale,
    fitted: false,
  };
}

/** Zooms by a factor about a point of the stage, which keeps its image point. */
export function zoomAt(view: View, image: Extent, stage: Size, factor: number, at: Point): View {
  const fitScale = fit(image, stage).scale;
  // From half the stage to 64 CSS pixels per image pixel; a tiny image may already be larger than that when fitted.
  const scale = clamp(view.scale * factor, fitScale / 2, Math.max(64, fitScale * 4));
  const [x, y] = toImage(view, image, stage, at);
  return {
    x: clamp(x - (at[0] - stage.width / 2) / scale, 0, image.columns),
    y: clamp(y - (at[1] - stage.height / 2) / (scale * image.aspect), 0, image.rows),
    scale,
    fitted: false,
  };
}

export function clamp(value: number, low: number, high: number): number {
  return Math.min(high, Math.max(low, value));
}
