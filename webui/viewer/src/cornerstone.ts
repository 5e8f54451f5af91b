/**
 * The only module that knows Cornerstone3D: draws one frame with a window and a view, by WebGL or by the CPU.
 *
 * Cornerstone gets no modality values, MONOCHROME1 or millimetres. It gets drawn values, their range,
 * the inversion and a pixel of width 1: stock Cornerstone inverts MONOCHROME1 by itself, clamps window functions in
 * the CPU renderer, and draws nothing at all on WebGL for a PixelSpacing of 0.
 */
import {
  cache,
  Enums,
  eventTarget,
  getConfiguration,
  getRenderingCapabilities,
  imageLoader,
  init,
  metaData,
  RenderingEngine,
  setUseCPURendering,
  utilities,
  type Types,
} from "@cornerstonejs/core";
import type { DrawnRange, Frame, Limits } from "./pixels";
import type { Point } from "./types";
import type { Extent, Size, View } from "./view";

export type Renderer = "webgl" | "cpu";

interface Shown {
  frame: Frame;
  extent: Extent;
}

const SCHEME = "box";
const VIEWPORT = "image";
/** 32 megapixels: the largest detectors in use; more would cost an old PC a gigabyte for detail no screen shows. */
const MAX_PIXELS = 32 * 1024 * 1024;

/** What Cornerstone may ask for, by image id. One viewer shows one frame at a time, so this stays small. */
const registry = new Map<string, Shown>();
let serial = 0;
let installed = false;

/**
 * The renderer for the setting of the page: WebGL 2 where the browser has it (vtk.js's WebGL 1 path lacks the filters for
 * 16-bit pixels), but not where software emulates the graphics chip: there a 2048 x 2048 image took 88 ms for each
 * step of a drag, and less than 17 ms with the CPU renderer.
 */
export function chooseRenderer(wish: "auto" | "webgl" | "cpu"): Renderer {
  const { webgl2, softwareRasterizer } = getRenderingCapabilities();
  if (wish === "cpu" || !webgl2) {
    return "cpu";
  }
  return wish === "webgl" || !softwareRasterizer ? "webgl" : "cpu";
}

/** The largest frame that the renderer can hold. */
export function limitsOf(renderer: Renderer): Limits {
  const texture = getRenderingCapabilities().maxTextureSize;
  return { maxSide: renderer === "webgl" && texture > 0 ? texture : 16384, maxPixels: MAX_PIXELS };
}

function install(renderer: Renderer): void {
  if (!installed) {
    installed = true;
    // One context: each costs an old graphics chip tens of megabytes, and there is one viewport.
    const defaults = getConfiguration();
    init({ ...defaults, rendering: { ...defaults.rendering, webGlContextCount: 1 } });
    imageLoader.registerImageLoader(SCHEME, (imageId: string) => ({
      promise: new Promise<Types.IImage>((resolve) => resolve(cornerstoneImage(imageId))),
    }));
    metaData.addProvider(provideMetadata, 1000);
  }
  setUseCPURendering(renderer === "cpu", false);
}

function shownFor(imageId: string): Shown {
  const shown = registry.get(imageId);
  if (!shown) {
    throw new Error(`no frame is registered as ${imageId}`);
  }
  return shown;
}

/** Spacing in units of an image column, so that world coordinates are image pixels whatever the file says. */
function spacingOf({ frame, extent }: Shown): { row: number; column: number } {
  return { row: frame.reduction * extent.aspect, column: frame.reduction };
}

function provideMetadata(type: string, imageId: unknown): unknown {
  const shown = typeof imageId === "string" ? registry.get(imageId) : undefined;
  if (!shown) {
    return undefined;
  }
  const { frame } = shown;
  const bits = frame.pixels.BYTES_PER_ELEMENT * 8;
  const { row, column } = spacingOf(shown);
  switch (type) {
    case Enums.MetadataModules.IMAGE_PLANE:
      return {
        rows: frame.rows,
        columns: frame.columns,
        rowPixelSpacing: row,
        columnPixelSpacing: column,
        pixelSpacing: [row, column],
        imagePositionPatient: [0, 0, 0],
        imageOrientationPatient: [1, 0, 0, 0, 1, 0],
        rowCosines: [1, 0, 0],
        columnCosines: [0, 1, 0],
        frameOfReferenceUID: imageId,
        usingDefaultValues: false,
      };
    case Enums.MetadataModules.IMAGE_PIXEL:
      return {
        bitsAllocated: bits,
        bitsStored: bits,
        highBit: bits - 1,
        samplesPerPixel: frame.samples,
        pixelRepresentation: frame.pixels instanceof Int16Array ? 1 : 0,
        photometricInterpretation: frame.samples === 3 ? "RGB" : "MONOCHROME2",
      };
    case Enums.MetadataModules.GENERAL_SERIES:
      return { modality: "OT" };
    default:
      return undefined;
  }
}

function cornerstoneImage(imageId: string): Types.IImage {
  const shown = shownFor(imageId);
  const { frame } = shown;
  const { row, column } = spacingOf(shown);
  const voxelManager = utilities.VoxelManager.createImageVoxelManager({
    scalarData: frame.pixels,
    width: frame.columns,
    height: frame.rows,
    numberOfComponents: frame.samples,
  }) as NonNullable<Types.IImage["voxelManager"]>;
  return {
    imageId,
    voxelManager,
    getPixelData: () => frame.pixels,
    getCanvas: () => undefined as unknown as HTMLCanvasElement,
    dataType: frame.pixels.constructor.name as Types.IImage["dataType"],
    rows: frame.rows,
    columns: frame.columns,
    height: frame.rows,
    width: frame.columns,
    rowPixelSpacing: row,
    columnPixelSpacing: column,
    color: frame.samples === 3,
    rgba: false,
    numberOfComponents: frame.samples,
    slope: 1,
    intercept: 0,
    minPixelValue: frame.min,
    maxPixelValue: frame.max,
    windowCenter: (frame.min + frame.max) / 2,
    // Replaced at once by `apply`; of width 1 the transfer function would have one node, and stay black for ever.
    windowWidth: Math.max(2, frame.max - frame.min),
    voiLUTFunction: Enums.VOILUTFunctionType.LINEAR,
    invert: false,
    photometricInterpretation: frame.samples === 3 ? "RGB" : "MONOCHROME2",
    sizeInBytes: frame.pixels.byteLength,
  };
}

/** Draws frames into an element; to be replaced by a new one when the renderer must change. */
export class Stage {
  private readonly engine: RenderingEngine;
  private readonly viewport: Types.IStackViewport;
  private shown: Shown | null = null;

  constructor(
    private readonly element: HTMLDivElement,
    readonly renderer: Renderer,
    onRendered: () => void,
    onLost: () => void,
  ) {
    install(renderer);
    this.engine = new RenderingEngine(`viewer-${++serial}`);
    element.addEventListener(Enums.Events.IMAGE_RENDERED, onRendered);
    eventTarget.addEventListener(Enums.Events.WEBGL_CONTEXT_LOST, onLost);
    this.dispose = () => {
      element.removeEventListener(Enums.Events.IMAGE_RENDERED, onRendered);
      eventTarget.removeEventListener(Enums.Events.WEBGL_CONTEXT_LOST, onLost);
    };
    this.engine.enableElement({ viewportId: VIEWPORT, type: Enums.ViewportType.STACK, element });
    this.viewport = this.engine.getViewport(VIEWPORT) as Types.IStackViewport;
  }

  private readonly dispose: () => void;

  get size(): Size {
    return { width: this.element.clientWidth, height: this.element.clientHeight };
  }

  /** The canvas that shows the image. */
  get canvas(): HTMLCanvasElement {
    return this.viewport.canvas;
  }

  /** Puts a frame on the stage; `apply` draws it. */
  async show(frame: Frame, extent: Extent): Promise<void> {
    const imageId = `${SCHEME}:${++serial}`;
    // Every frame has an id of its own, so nothing of the one before can be reused by mistake; Source does the caching.
    cache.purgeCache();
    registry.clear();
    this.shown = { frame, extent };
    registry.set(imageId, this.shown);
    await this.viewport.setStack([imageId], 0);
    if (this.viewport.getCurrentImageId() !== imageId || !this.viewport.getImageData()) {
      throw new Error("the renderer did not take the frame");
    }
  }

  /** Draws the frame with this window and view in the next animation frame. */
  apply(range: DrawnRange, inverted: boolean, view: View): void {
    if (!this.shown) {
      return;
    }
    this.viewport.setProperties({
      voiRange: { lower: range.lower, upper: range.upper },
      invert: inverted !== range.reversed,
    });
    const cleared = this.fitCanvas();
    this.setCamera(view, this.shown);
    if (cleared) {
      // Now, and again in the next frame, which notifies the listeners: otherwise one frame would be black at every resize.
      this.viewport.customRenderViewportToCanvas();
    }
    this.viewport.render();
  }

  /** Where an image point was drawn, in CSS pixels of the stage: asked of the renderer, not computed beside it. */
  imageToStage([x, y]: Point): Point {
    const world = this.world(x, y);
    const [sx, sy] = this.viewport.worldToCanvas(world);
    return [sx, sy];
  }

  destroy(): void {
    this.dispose();
    this.engine.destroy();
    this.element.replaceChildren();
  }

  private world(x: number, y: number): Types.Point3 {
    const { frame, extent } = this.shown as Shown;
    // vtk.js puts the origin into the middle of the first drawn pixel, the CPU renderer at its corner.
    const half = this.renderer === "webgl" ? frame.reduction / 2 : 0;
    return [x - half, (y - half) * extent.aspect, 0];
  }

  /** Gives the canvas the size of the stage; true when that has wiped it. */
  private fitCanvas(): boolean {
    const { width, height } = this.size;
    const ratio = window.devicePixelRatio || 1;
    if (this.renderer === "webgl") {
      this.engine.resize(false, true);
      return false;
    }
    // Cornerstone's own resize of the CPU canvas ignores the device pixel ratio.
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (w > 0 && h > 0 && (this.canvas.width !== w || this.canvas.height !== h)) {
      this.canvas.width = w;
      this.canvas.height = h;
      return true;
    }
    return false;
  }

  private setCamera(view: View, { frame, extent }: Shown): void {
    const focalPoint = this.world(view.x, view.y);
    if (this.renderer === "webgl") {
      const { position } = this.viewport.getCamera();
      this.viewport.setCamera({
        focalPoint,
        position: [focalPoint[0], focalPoint[1], position?.[2] ?? -1],
        parallelScale: this.size.height / 2 / view.scale,
      });
      return;
    }
    // The CPU camera counts device pixels per drawn pixel of the narrower spacing. Scale first: it also recomputes
    // the transform from the canvas size, which the shift to the focal point is measured with.
    const perColumn = view.scale * (window.devicePixelRatio || 1) * frame.reduction;
    const scale = perColumn * Math.min(1, extent.aspect);
    this.viewport.setCamera({ scale } as Types.ICamera);
    this.viewport.setCamera({ focalPoint, scale } as Types.ICamera);
  }
}
