/** The heat maps of the findings, fetched when they are first shown and kept in colours. */
import { colourise } from "./colormap";
import type { HeatLayer } from "./overlay";
import type { Source } from "./source";
import { ViewerError, type FindingConfig } from "./types";

export class HeatMaps {
  private readonly kept = new Map<FindingConfig, HTMLCanvasElement | "coming">();

  /**
   * @param changed is called when a heat map came, or with the reason why it did not.
   */
  constructor(
    private readonly source: Source,
    private readonly changed: (failure: string | null) => void,
  ) {}

  /** The heat maps that are here; the others are asked for. */
  layers(findings: readonly FindingConfig[]): HeatLayer[] {
    return findings.flatMap((finding) => {
      const canvas = this.kept.get(finding);
      if (canvas instanceof HTMLCanvasElement) {
        return [{ finding, canvas }];
      }
      if (!canvas && finding.heatmap_url) {
        this.kept.set(finding, "coming");
        void this.fetch(finding, finding.heatmap_url);
      }
      return [];
    });
  }

  private async fetch(finding: FindingConfig, url: string): Promise<void> {
    try {
      this.kept.set(finding, colourise(await this.source.heatmap(url, new AbortController().signal)));
      this.changed(null);
    } catch (error) {
      // Forgotten, so that switching the heat map on again tries again.
      this.kept.delete(finding);
      this.changed(error instanceof ViewerError ? error.detail || error.title : String(error));
    }
  }
}
