/**
 * Keeps the report beside the image up to date, with the part of the image that the viewer shows first. The image itself is
 * left as it is: nobody loses a window or a zoom.
 */
import "../styles/study.css";
import { find } from "../dom";
import type { ViewerElement } from "../main";
import { parseResults } from "../types";
import { fetchFragment } from "./fragment";
import { followRevision } from "./revision";

export class ReportPane {
  private readonly arrived = find(document, "#arrived");
  private readonly newImages = find(document, "#new-images");
  /** Findings and images when the page was opened: what the viewer can show without a reload. */
  private readonly opened: { findings: string | undefined; images: string | undefined };
  /** The report as the box sent it: what is in the page changes with the image shown. */
  private sent: string;

  constructor(
    private readonly pane: HTMLElement,
    private readonly viewer: ViewerElement,
  ) {
    const { findings, images } = this.report.dataset;
    this.opened = { findings, images };
    this.sent = this.report.innerHTML;
    new MutationObserver(() => this.showCurrent()).observe(viewer, { attributeFilter: ["data-image-id"] });
    pane.addEventListener("click", (event) => {
      const part = (event.target as Element).closest(".to-image")?.closest<HTMLElement>(".image-report");
      if (part) {
        viewer.viewerChoose?.(Number(imagesOf(part)[0]));
      }
    });
    find(this.newImages, "button").addEventListener("click", () => location.reload());
    this.showCurrent();
  }

  /** The revision that the report shows. */
  get revision(): number {
    return Number(this.report.dataset["revision"]);
  }

  /** Fetches the report and shows it if it changed; returns whether the box answered. */
  async refresh(signal: AbortSignal): Promise<boolean> {
    const fragment = await fetchFragment(this.pane.dataset["url"] ?? "", signal);
    const fresh = fragment?.querySelector<HTMLElement>(".report");
    if (fresh && fresh.innerHTML !== this.sent) {
      this.sent = fresh.innerHTML;
      this.replaceReport(fresh);
    }
    return fragment !== null;
  }

  private get report(): HTMLElement {
    return find(this.pane, ".report");
  }

  private replaceReport(fresh: HTMLElement): void {
    const wasOpen = new Map([...this.pane.querySelectorAll("details")].map((details) => [placeOf(details), details.open]));
    const onFirstButton = document.activeElement?.matches(".first");
    this.report.replaceWith(fresh);
    if (onFirstButton) {
      this.pane.querySelector<HTMLElement>(".first")?.focus({ preventScroll: true });
    }
    for (const details of this.pane.querySelectorAll("details")) {
      details.open = wasOpen.get(placeOf(details)) ?? false;
    }
    this.newImages.hidden = fresh.dataset["images"] === this.opened.images;
    this.arrived.hidden = fresh.dataset["findings"] === this.opened.findings || !this.newImages.hidden;
    this.viewer.viewerResults?.(parseResults(fresh.dataset["results"] ?? "{}"));
    this.showCurrent();
  }

  /** Puts the report of the image shown first and marks it; the others stay below it. */
  private showCurrent(): void {
    const shown = this.viewer.dataset["imageId"] ?? "";
    let current: HTMLElement | null = null;
    for (const part of this.pane.querySelectorAll<HTMLElement>(".image-report")) {
      const isCurrent = imagesOf(part).includes(shown);
      part.classList.toggle("is-current", isCurrent);
      part.toggleAttribute("aria-current", isCurrent);
      current = isCurrent ? part : current;
    }
    const first = this.pane.querySelector(".image-report");
    if (current && first !== current) {
      first?.before(current);
    }
    if (this.pane.parentElement) {
      this.pane.parentElement.scrollTop = 0;
    }
  }
}

/** The ids of the images that a part of the report is about. */
function imagesOf(part: HTMLElement): string[] {
  return (part.dataset["images"] ?? "").split(" ");
}

/** Identifies folded details in a new report: by the first image that they belong to, their kind, and their number among these. */
function placeOf(details: HTMLDetailsElement): string | undefined {
  const part = details.closest<HTMLElement>(".image-report");
  const alike = [...(part?.querySelectorAll("details") ?? [])].filter((other) => other.className === details.className);
  return part ? `${imagesOf(part)[0]} ${details.className} ${alike.indexOf(details)}` : undefined;
}

const pane = document.getElementById("report");
if (pane) {
  const report = new ReportPane(pane, find<ViewerElement>(document, "#viewer"));
  followRevision(report.revision, (signal) => report.refresh(signal));
}
