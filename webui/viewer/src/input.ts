/**
 * Mouse, pen, touch and wheel on the stage -> what the person wants.
 *
 * Cornerstone's own tools would add 450 kB and a second copy of the state (tool groups, annotations) for these few
 * gestures; pointer events cover mouse, pen and touch in one.
 */
import type { Point } from "./types";

export type DragMode = "window" | "pan" | "measure";

export interface Gestures {
  mode(): DragMode;
  /** Window by a drag of this many CSS pixels: width sideways, level up and down. */
  dragWindow(dx: number, dy: number): void;
  dragPan(dx: number, dy: number): void;
  zoom(factor: number, at: Point): void;
  scroll(frames: number): void;
  /** True while the wheel turns frames instead of zooming. */
  scrolls(): boolean;
  measureStart(at: Point): void;
  measureMove(at: Point): void;
  measureEnd(at: Point): void;
  measureCancel(): void;
  hover(at: Point | null): void;
}

type Drag = "window" | "pan" | "zoom" | "measure";

/** Zoom of one CSS pixel of a zoom drag, and of one notch of the wheel. */
const ZOOM_PER_PIXEL = 1.006;
const ZOOM_PER_NOTCH = 1.15;
/** A wheel notch in CSS pixels; touchpads send many smaller steps that add up. */
const NOTCH = 100;

/** Listens on the stage until the page ends. */
export class PointerInput {
  private readonly pointers = new Map<number, Point>();
  private drag: Drag | null = null;
  private wheelRest = 0;

  constructor(
    private readonly stage: HTMLElement,
    private readonly gestures: Gestures,
  ) {
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.move(event));
    stage.addEventListener("pointerup", (event) => this.up(event));
    stage.addEventListener("pointercancel", (event) => this.cancel(event));
    stage.addEventListener("pointerleave", () => this.gestures.hover(null));
    stage.addEventListener("contextmenu", (event) => event.preventDefault());
    stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  private at(event: MouseEvent): Point {
    const box = this.stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  private static dragOf(event: PointerEvent, mode: DragMode): Drag {
    if (event.pointerType === "touch") {
      return mode;
    }
    if (event.button === 1 || event.shiftKey) {
      return "pan";
    }
    return event.button === 2 || event.ctrlKey ? "zoom" : mode;
  }

  private down(event: PointerEvent): void {
    if ((event.target as Element).closest("button, a, input")) {
      return;
    }
    // Also keeps the middle button from starting the browser's own scrolling; the focus must then be set here.
    event.preventDefault();
    this.stage.focus({ preventScroll: true });
    this.stage.setPointerCapture(event.pointerId);
    const at = this.at(event);
    this.pointers.set(event.pointerId, at);
    if (this.pointers.size > 1) {
      // The second finger turns whatever the first began into a pinch.
      if (this.drag === "measure") {
        this.gestures.measureCancel();
      }
      this.drag = null;
      return;
    }
    this.drag = PointerInput.dragOf(event, this.gestures.mode());
    if (this.drag === "measure") {
      this.gestures.measureStart(at);
    }
  }

  private move(event: PointerEvent): void {
    const at = this.at(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.gestures.hover(at);
      return;
    }
    if (this.pointers.size === 2) {
      this.pinch(event.pointerId, before, at);
    }
    this.pointers.set(event.pointerId, at);
    const [dx, dy] = [at[0] - before[0], at[1] - before[1]];
    if (this.drag === "window") {
      this.gestures.dragWindow(dx, dy);
    } else if (this.drag === "pan") {
      this.gestures.dragPan(dx, dy);
    } else if (this.drag === "zoom") {
      const box = this.stage.getBoundingClientRect();
      this.gestures.zoom(ZOOM_PER_PIXEL ** -dy, [box.width / 2, box.height / 2]);
    } else if (this.drag === "measure") {
      this.gestures.measureMove(at);
    }
    this.gestures.hover(event.pointerType === "touch" ? null : at);
  }

  private pinch(id: number, before: Point, now: Point): void {
    const other = [...this.pointers].find(([otherId]) => otherId !== id)?.[1];
    if (!other) {
      return;
    }
    const spread = (p: Point): number => Math.max(10, Math.hypot(p[0] - other[0], p[1] - other[1]));
    this.gestures.dragPan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    this.gestures.zoom(spread(now) / spread(before), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
  }

  private up(event: PointerEvent): void {
    if (!this.pointers.delete(event.pointerId)) {
      return;
    }
    if (this.drag === "measure") {
      this.gestures.measureEnd(this.at(event));
    }
    this.drag = null;
  }

  private cancel(event: PointerEvent): void {
    this.pointers.delete(event.pointerId);
    if (this.drag === "measure") {
      this.gestures.measureCancel();
    }
    this.drag = null;
  }

  private wheel(event: WheelEvent): void {
    // Always: with Ctrl the browser would zoom the page, without it scroll the image away.
    event.preventDefault();
    const pixels = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? event.deltaY * 33 : event.deltaY;
    if (event.ctrlKey || !this.gestures.scrolls()) {
      this.gestures.zoom(ZOOM_PER_NOTCH ** -(pixels / NOTCH), this.at(event));
      return;
    }
    this.wheelRest += pixels;
    const frames = Math.trunc(this.wheelRest / NOTCH);
    this.wheelRest -= frames * NOTCH;
    if (frames) {
      this.gestures.scroll(frames);
    }
  }
}
