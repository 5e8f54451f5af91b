/** The heat maps of the findings, fetched when they are first shown and stored in colours. */
import { colourise } from "./colormap";
import type { HeatLayer } from "./overlay";
import type { Source } from "./source";
import { ViewerError, type FindingConfig } from "./types";

export class HeatMaps {
  private readonly canvases = new Map<FindingConfig, HTMLCanvasElement | "loading">();

  /**
   * @param changed is called when a heat map has arrived, or with the reason why it could not be loaded.
   */
  constructor(
    private readonly source: Source,
    private readonly changed: (failure: string | null) => void,
  ) {}

  /** The heat maps that have arrived; requests the others. */
  layers(findings: readonly FindingConfig[]): HeatLayer[] {
    return findings.flatMap((finding) => {
      const canvas = this.canvases.get(finding);
      if (canvas instanceof HTMLCanvasElement) {
        return [{ finding, canvas }];
      }
      if (!canvas && finding.heatmap_url) {
        this.canvases.set(finding, "loading");
        void this.fetch(finding, finding.heatmap_url);
      }
      return [];
    });
  }

  private async fetch(finding: FindingConfig, url: string): Promise<void> {
    try {
      this.canvases.set(finding, colourise(await this.source.heatmap(url, new AbortController().signal)));
      this.changed(null);
    } catch (error) {
      // Removed, so that switching the heat map on again requests it again.
      this.canvases.delete(finding);
      this.changed(error instanceof ViewerError ? error.detail || error.title : String(error));
    }
  }
}
