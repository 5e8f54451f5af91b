"""The folded part of an image's report: size, times, and the accuracy of the models per source of test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask_babel import gettext

from appliance.store.worklist import InstanceView, JobView
from webui.formatting import format_count, format_milliseconds, format_percent, format_size, format_time, localize
from webui.view_models import DASH, join_nonempty


@dataclass(frozen=True)
class SourceRow:
    """The accuracy of a model on the test images of one source; ``cases`` counts those with and without the finding."""

    source: str
    cases: str
    sensitivity: str
    specificity: str


@dataclass(frozen=True)
class ModelDetails:
    """The intended use of a model, and a table per operating point of the label that it reported."""

    intended_use: str
    tables: tuple[tuple[SourceRow, ...], ...]


@dataclass(frozen=True)
class ImageDetails:
    """Details of one image; ``times`` has one text per job."""

    size: str
    kind: str
    received: str
    times: tuple[str, ...]
    models: tuple[ModelDetails, ...]

    @classmethod
    def of(cls, item: InstanceView, manifests: Mapping[str, Mapping[str, Any]]) -> ImageDetails:
        """The details of an image; ``manifests`` by the model's digest."""
        frames = (item.number_of_frames,) if item.number_of_frames > 1 else ()
        findings = [(finding.label, manifests.get(finding.model_digest)) for finding in item.findings]
        return cls(
            size=gettext(", ").join((" × ".join(map(str, (item.columns, item.rows, *frames))), format_size(item.bytes))),
            kind=join_nonempty((item.modality, item.body_part_examined, item.view_position)) or DASH,
            received=format_time(item.received_at),
            times=tuple(_times(item, job) for job in item.jobs if job.timing_ms),
            models=tuple(_model_details(label, manifest) for label, manifest in findings if manifest),
        )


def _times(item: InstanceView, job: JobView) -> str:
    steps = {
        "decode": gettext("Decoding"), "preprocess": gettext("Preparing"), "infer": gettext("AI model"),
        "postprocess": gettext("Evaluating"), "store": gettext("Saving"), "total": gettext("Total"),
    }  # fmt: skip
    durations = [(gettext("Receiving"), item.ingest_ms)]
    durations += [(word, job.timing_ms[key]) for key, word in steps.items() if key in job.timing_ms]
    return str(gettext("; ").join(f"{word} {format_milliseconds(duration)}" for word, duration in durations))


def _model_details(label: str, manifest: Mapping[str, Any]) -> ModelDetails:
    points = [point["per_source"] for point in manifest["operating_points"] if point["label"] == label and point.get("per_source")]
    use = manifest["intended_use"]
    return ModelDetails(localize(use["zh"], use["en"]), tuple(tuple(map(_source_row, sources)) for sources in points))


def _source_row(source: Mapping[str, Any]) -> SourceRow:
    rates = [source.get(name) for name in ("sensitivity", "specificity")]
    sensitivity, specificity = (format_percent(rate["value"]) if rate else DASH for rate in rates)
    return SourceRow(
        source["source"], f"{format_count(source['n_positive'])} / {format_count(source['n_negative'])}", sensitivity, specificity
    )
