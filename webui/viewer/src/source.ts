/**
 * Fetches images from the box and caches the frames that were shown last.
 *
 * Cornerstone never touches the network: its loader (cornerstone.ts) takes frames from here only, so progress,
 * cancellation and the server's text of an error stay in one place.
 */
import { frameBytes, decodeFrame, type Frame, type Limits } from "./pixels";
import type { Translate } from "./text";
import { isRecord, parseMeta, ViewerError, type ImageConfig, type ImageMeta } from "./types";

/** Frames cached in memory: a few radiographs, or a short cine run, on a PC with 2 GB. */
const CACHE_BYTES = 192 * 1024 * 1024;

export type Progress = (received: number, expected: number) => void;

export class Source {
  private readonly metas = new Map<ImageConfig, ImageMeta>();
  private readonly frames = new Map<string, Frame>();

  constructor(
    private readonly t: Translate,
    private limits: Limits,
  ) {}

  /** Drops frames that were decoded for another renderer. */
  setLimits(limits: Limits): void {
    this.limits = limits;
    this.frames.clear();
  }

  /** The description of an image. Throws `ViewerError`, or `AbortError` when cancelled. */
  async meta(image: ImageConfig, signal: AbortSignal): Promise<ImageMeta> {
    const known = this.metas.get(image);
    if (known) {
      return known;
    }
    const response = await this.fetch(image.meta_url, signal);
    let meta: ImageMeta;
    try {
      meta = parseMeta(await response.json());
    } catch (error) {
      throw this.explained(error, "error_answer");
    }
    this.metas.set(image, meta);
    return meta;
  }

  /** One frame, numbered from 0. Throws `ViewerError`, or `AbortError` when cancelled. */
  async frame(image: ImageConfig, number: number, signal: AbortSignal, progress: Progress): Promise<Frame> {
    const meta = await this.meta(image, signal);
    const key = `${image.id}/${number}`;
    const cached = this.frames.get(key);
    if (cached) {
      this.frames.delete(key);
      this.frames.set(key, cached);
      return cached;
    }
    const expected = frameBytes(meta);
    const response = await this.fetch(image.frame_url.replace("{frame}", String(number)), signal);
    const buffer = await this.body(response, expected, progress);
    const frame = decodeFrame(meta, buffer, this.limits);
    this.cache(key, frame);
    return frame;
  }

  /** The 8-bit values of a heat map. Throws `ViewerError`, or `AbortError` when cancelled. */
  async heatmap(url: string, signal: AbortSignal): Promise<ImageData> {
    const response = await this.fetch(url, signal);
    try {
      const bitmap = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
      const canvas = document.createElement("canvas");
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      if (!context) {
        throw new Error("no 2D canvas");
      }
      context.drawImage(bitmap, 0, 0);
      bitmap.close();
      return context.getImageData(0, 0, canvas.width, canvas.height);
    } catch (error) {
      throw this.explained(error, "error_answer");
    }
  }

  private cache(key: string, frame: Frame): void {
    this.frames.set(key, frame);
    let bytes = 0;
    for (const cached of this.frames.values()) {
      bytes += cached.pixels.byteLength;
    }
    // A Map iterates in the order of insertion, so the first entries are those that were not used for the longest time.
    for (const [oldKey, old] of this.frames) {
      if (bytes <= CACHE_BYTES || oldKey === key) {
        break;
      }
      this.frames.delete(oldKey);
      bytes -= old.pixels.byteLength;
    }
  }

  private async fetch(url: string, signal: AbortSignal): Promise<Response> {
    let response: Response;
    try {
      response = await fetch(url, { signal, credentials: "same-origin" });
    } catch (error) {
      throw this.explained(error, "error_network");
    }
    if (!response.ok) {
      throw await this.problem(response);
    }
    // A session that ended is answered by the login page with status 200.
    if (response.headers.get("Content-Type")?.startsWith("text/html")) {
      throw new ViewerError(this.t("error_title"), this.t("error_answer"));
    }
    return response;
  }

  /** The server's text, where it answered with problem+json (RFC 9457). */
  private async problem(response: Response): Promise<ViewerError> {
    let title = "";
    let detail = "";
    if (response.headers.get("Content-Type")?.includes("json")) {
      const body: unknown = await response.json().catch(() => null);
      if (isRecord(body)) {
        title = typeof body["title"] === "string" ? body["title"] : "";
        detail = typeof body["detail"] === "string" ? body["detail"] : "";
      }
    }
    const fallback = `${this.t("error_answer")} (HTTP ${response.status})`;
    return new ViewerError(title || this.t("error_title"), detail || (title ? "" : fallback));
  }

  /** Reads the body with progress; the size is known from the description, also when the transfer is compressed. */
  private async body(response: Response, expected: number, progress: Progress): Promise<ArrayBuffer> {
    const bytes = new Uint8Array(expected);
    let received = 0;
    try {
      const reader = response.body?.getReader();
      for (;;) {
        const chunk = await reader?.read();
        if (!chunk || chunk.done) {
          break;
        }
        const room = expected - received;
        if (room > 0) {
          bytes.set(chunk.value.length > room ? chunk.value.subarray(0, room) : chunk.value, received);
        }
        received += chunk.value.length;
        progress(Math.min(received, expected), expected);
      }
    } catch (error) {
      throw this.explained(error, "error_network");
    }
    if (received !== expected) {
      throw new ViewerError(this.t("error_title"), this.t("error_short", { expected, got: received }));
    }
    return bytes.buffer;
  }

  private explained(error: unknown, key: "error_network" | "error_answer"): unknown {
    const cancelled = error instanceof DOMException && error.name === "AbortError";
    return cancelled || error instanceof ViewerError ? error : new ViewerError(this.t("error_title"), this.t(key));
  }
}
