/** How the box turned an image upright, and where a point of the file lies in the upright image (appliance/imaging/orientation.py). */
import type { Point } from "./types";

export interface Orientation {
  /** Rows became columns; done before the mirroring. */
  transpose: boolean;
  flipRows: boolean;
  flipColumns: boolean;
}

export const UPRIGHT: Orientation = { transpose: false, flipRows: false, flipColumns: false };

/** Reads `[transpose, flip_rows, flip_columns]`; anything else is upright. */
export function parseOrientation(value: unknown): Orientation {
  if (!Array.isArray(value) || value.length !== 3) {
    return UPRIGHT;
  }
  return { transpose: value[0] === true, flipRows: value[1] === true, flipColumns: value[2] === true };
}

/** Maps a point of the file's image to the upright image of `columns` x `rows` pixels. */
export function toUpright(
  [x, y]: Point,
  { transpose, flipRows, flipColumns }: Orientation,
  { columns, rows }: { columns: number; rows: number },
): Point {
  const [across, down] = transpose ? [y, x] : [x, y];
  return [flipColumns ? columns - across : across, flipRows ? rows - down : down];
}
