/**
 * What is drawn over the image: heat map, outlines of the findings, measured lengths.
 *
 * Everything is drawn in CSS pixels of the stage, at places that the renderer itself reports for image points
 * (`project`), after each frame it has drawn. So the marks cannot drift from the image, whichever renderer drew it.
 */
import { html, svg } from "./dom";
import type { FindingConfig, Point, Polygon } from "./types";
import type { Size } from "./view";

export type Projection = (point: Point) => Point;

export interface HeatLayer {
  finding: FindingConfig;
  /** The heat map in colours; covers exactly the extent of the image. */
  canvas: HTMLCanvasElement;
}

export interface LengthMark {
  from: Point;
  to: Point;
  text: string;
  /** Still being drawn. */
  open: boolean;
}

export interface Marks {
  outlines: readonly FindingConfig[];
  heat: readonly HeatLayer[];
  /** 0 to 1. */
  opacity: number;
  lengths: readonly LengthMark[];
  crosshair: boolean;
}

export class Overlay {
  /** Shows only the heat map, so that a test can read it. */
  readonly heatCanvas = html("canvas", { class: "vw-heat", "aria-hidden": "true" });
  private readonly marks = svg("svg", { class: "vw-marks", "aria-hidden": "true", focusable: "false" });

  constructor(parent: HTMLElement) {
    parent.append(this.heatCanvas, this.marks);
  }

  /**
   * Draws everything again.
   *
   * @param corner the bottom right corner of the image as the file has it.
   * @param projectFile where a point of the file's image is on the stage: outlines, peaks and heat maps.
   * @param project where a point of the upright image is: lengths.
   */
  draw(stage: Size, corner: Point, projectFile: Projection, project: Projection, marks: Marks): void {
    this.drawHeat(stage, [projectFile([0, 0]), projectFile([corner[0], 0]), projectFile([0, corner[1]])], marks);
    const nodes: SVGElement[] = [];
    for (const finding of marks.outlines) {
      nodes.push(...outlineNodes(finding, projectFile));
    }
    // A negative finding has no outline; its peak is marked with its heat map only.
    for (const finding of new Set([...marks.outlines.filter((one) => one.outline.length), ...marks.heat.map((layer) => layer.finding)])) {
      if (finding.peak) {
        nodes.push(...peakNodes(projectFile(finding.peak)));
      }
    }
    for (const length of marks.lengths) {
      nodes.push(...lengthNodes(length, project, stage));
    }
    if (marks.crosshair) {
      nodes.push(...crosshairNodes([stage.width / 2, stage.height / 2]));
    }
    this.marks.replaceChildren(...nodes);
  }

  clear(): void {
    this.heatCanvas.getContext("2d")?.clearRect(0, 0, this.heatCanvas.width, this.heatCanvas.height);
    this.marks.replaceChildren();
  }

  /** The corners are the stage points of the file's top left, top right and bottom left: the image may be turned. */
  private drawHeat(stage: Size, [origin, right, below]: readonly [Point, Point, Point], { heat, opacity }: Marks): void {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(stage.width * ratio);
    const height = Math.round(stage.height * ratio);
    if (this.heatCanvas.width !== width || this.heatCanvas.height !== height) {
      this.heatCanvas.width = width;
      this.heatCanvas.height = height;
    }
    const context = this.heatCanvas.getContext("2d");
    if (!context) {
      return;
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, stage.width, stage.height);
    context.globalAlpha = opacity;
    context.imageSmoothingQuality = "high";
    context.transform(
      right[0] - origin[0], right[1] - origin[1], below[0] - origin[0], below[1] - origin[1], origin[0], origin[1],
    );
    for (const { canvas } of heat) {
      context.drawImage(canvas, 0, 0, 1, 1);
    }
  }
}

function pathData(polygon: Polygon, project: (point: Point) => Point): string {
  const points = polygon.map((point) => project(point).map((value) => value.toFixed(1)).join(" "));
  return `M${points.join("L")}Z`;
}

/** A dark line below a bright one: visible over black lung and white bone alike. */
function haloed(d: string, className: string): SVGElement[] {
  return [svg("path", { class: "vw-halo", d }), svg("path", { class: className, d })];
}

function label(text: string, [x, y]: Point, className = "vw-label", anchor = "middle"): SVGElement {
  return svg("text", { class: className, x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor }, text);
}

function outlineNodes(finding: FindingConfig, project: (point: Point) => Point): SVGElement[] {
  const className = finding.positive ? "vw-outline" : "vw-outline vw-below";
  const inner = finding.inner_contours.flatMap(({ polygons }) =>
    polygons.map((polygon) => svg("path", { class: "vw-contour", d: pathData(polygon, project) })),
  );
  const nodes = [...inner, ...finding.outline.flatMap((polygon) => haloed(pathData(polygon, project), className))];
  // One label per finding, above its highest point: several polygons are one finding, not several.
  const top = finding.outline.flat().map(project).reduce<Point | null>((best, p) => (best && best[1] <= p[1] ? best : p), null);
  if (top) {
    const [x, y] = top;
    nodes.push(label(`${finding.label} ${finding.score.toFixed(2)}`, [x, Math.max(14, y - 8)]));
  }
  return nodes;
}

function peakNodes([x, y]: Point): SVGElement[] {
  return haloed(`M${x - 9} ${y}h6M${x + 3} ${y}h6M${x} ${y - 9}v6M${x} ${y + 3}v6`, "vw-peak");
}

function crosshairNodes([x, y]: Point): SVGElement[] {
  return haloed(`M${x - 14} ${y}h28M${x} ${y - 14}v28`, "vw-length");
}

function lengthNodes(length: LengthMark, project: (point: Point) => Point, stage: Size): SVGElement[] {
  const [x1, y1] = project(length.from);
  const [x2, y2] = project(length.to);
  const distance = Math.hypot(x2 - x1, y2 - y1) || 1;
  // Short bars across both ends show exactly where the line ends.
  const [bx, by] = [((y2 - y1) / distance) * 6, (-(x2 - x1) / distance) * 6];
  const d =
    `M${x1} ${y1}L${x2} ${y2}` +
    `M${x1 - bx} ${y1 - by}L${x1 + bx} ${y1 + by}M${x2 - bx} ${y2 - by}L${x2 + bx} ${y2 + by}`;
  const nodes = haloed(d, length.open ? "vw-length vw-open" : "vw-length");
  const [lx, anchor] = x2 > stage.width - 120 ? [x2 - 10, "end"] : [x2 + 10, "start"];
  nodes.push(label(length.text, [lx, y2 - 6], "vw-label vw-length-label", anchor));
  return nodes;
}
