/** Lengths measured on an image: stored per frame in image coordinates, shown in mm, or in pixels without a spacing. */
import type { LengthMark } from "./overlay";
import type { Translate } from "./text";
import type { ImageMeta, Point } from "./types";

interface Line {
  from: Point;
  to: Point;
}

/** Shorter drags, in image pixels, are not intended. */
const SHORTEST = 2;

export class Lengths {
  private readonly lines = new Map<number, Line[]>();
  private open: Line | null = null;

  constructor(private readonly t: Translate) {}

  get drawing(): boolean {
    return this.open !== null;
  }

  start(at: Point): void {
    this.open = { from: at, to: at };
  }

  move(at: Point): void {
    if (this.open) {
      this.open.to = at;
    }
  }

  /** Stores the line being drawn on this frame, unless it is too short to mean anything. */
  finish(frame: number): void {
    const line = this.open;
    this.open = null;
    if (line && Math.hypot(line.to[0] - line.from[0], line.to[1] - line.from[1]) >= SHORTEST) {
      this.lines.set(frame, [...this.of(frame), line]);
    }
  }

  cancel(): void {
    this.open = null;
  }

  removeLast(frame: number): void {
    this.open = null;
    this.lines.set(frame, this.of(frame).slice(0, -1));
  }

  clear(frame: number): void {
    this.open = null;
    this.lines.delete(frame);
  }

  count(frame: number): number {
    return this.of(frame).length;
  }

  /** What to draw on this frame. */
  marks(frame: number, meta: ImageMeta): LengthMark[] {
    const marks = this.of(frame).map((line) => ({ ...line, text: this.textOf(line, meta), open: false }));
    if (this.open) {
      marks.push({ ...this.open, text: this.textOf(this.open, meta), open: true });
    }
    return marks;
  }

  private of(frame: number): Line[] {
    return this.lines.get(frame) ?? [];
  }

  private textOf({ from, to }: Line, { spacing }: ImageMeta): string {
    const [row, column] = spacing ?? [1, 1];
    const length = Math.hypot((to[0] - from[0]) * column, (to[1] - from[1]) * row);
    return spacing ? `${length.toFixed(1)} ${this.t("unit_mm")}` : `${Math.round(length)} ${this.t("unit_px")}`;
  }
}
