"""The cards of the report, ready to print: a finding on an image, the volumes measured in a series, and the details of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from flask import url_for
from flask_babel import gettext

from appliance.core.domain import Finding
from appliance.store.volume_results import COLOURS, VolumeView
from appliance.store.worklist import InstanceView, JobView
from webui.formatting import (
    format_count,
    format_milliseconds,
    format_percent,
    format_score,
    format_size,
    format_time,
    format_volume,
    localize,
    untranslated,
)
from webui.study.accuracy_view import accuracy_view
from webui.view_models import DASH, View, digest_view, join_nonempty, note_view, run_view

Manifest: TypeAlias = Mapping[str, Any]
"""A model's manifest, as stored."""

_SCALE_WIDTH: Final = 200


def finding_card(item: InstanceView, finding: Finding, manifest: Manifest | None, cautions: Sequence[View]) -> View:
    """One label's score against its threshold.

    ``recall`` is why the model version was withdrawn after it had made this finding; ``score_x`` and ``threshold_x`` are places on a
    scale that is ``_SCALE_WIDTH`` wide.
    """
    return {
        "title": localize(finding.title_zh, finding.title_en),
        "is_positive": finding.positive,
        "verdict": _verdict(finding, manifest),
        "recall": note_view(item.recall(finding)),
        "score": format_score(finding.score),
        "threshold": format_score(finding.threshold),
        "score_x": f"{finding.score * _SCALE_WIDTH:.1f}",
        "threshold_x": f"{finding.threshold * _SCALE_WIDTH:.1f}",
        "accuracy": accuracy_view(finding),
        "model": _model_version(finding, manifest, run_view(item.ran(finding))),
        "cautions": cautions,
    }


def volume_card(volume: VolumeView, manifest: Manifest | None, cautions: Sequence[View]) -> View:
    """One model's measurements in a series (colour of the outline, title, value), and a key picture per plane through its middle."""
    model = _model_version(volume, manifest, run_view(volume.ran))
    words = {"axial": gettext("Axial"), "coronal": gettext("Coronal"), "sagittal": gettext("Sagittal")}
    return {
        "job_id": volume.job_id,
        "title": model["title"] or volume.model,
        "slices": format_count(volume.slices),
        "recall": note_view(volume.recall),
        "measurements": [
            (COLOURS[place % len(COLOURS)], localize(item.title_zh, item.title_en), format_volume(item.value))
            for place, item in enumerate(volume.measurements)
        ],
        "planes": [
            {
                "word": word,
                "url": url_for("image_api.key_picture", job_id=volume.job_id, plane=plane),
                "description": gettext("%(plane)s plane through the middle, with the outline", plane=word),
            }
            for plane, word in words.items()
            if plane in volume.planes
        ],
        "model": model,
        "cautions": cautions,
    }


def _model_version(result: Finding | VolumeView, manifest: Manifest | None, run: View | None) -> View:
    """The version that made a result, and how it was run on this box; the title is empty without its manifest."""
    return digest_view(result.model_digest) | {
        "title": localize(manifest["title"]["zh"], manifest["title"]["en"]) if manifest else "",
        "name": f"{result.model} {result.model_version}",
        "run": run if run and run["code"] else None,
        "runtime": result.runtime,
        "precision": result.precision.upper(),
    }


def _verdict(finding: Finding, manifest: Manifest | None) -> str:
    """The result in the words of the model's manifest, or in general words where it has none."""
    labels = manifest["labels"] if manifest else []
    words = next((label.get("verdict") for label in labels if label["name"] == finding.label), None)
    if words:
        chosen = words["positive" if finding.positive else "below"]
        return localize(chosen["zh"], chosen["en"])
    if finding.positive:
        return str(gettext("%(label)s suggested: please review", label=localize(finding.title_zh, finding.title_en)))
    return str(gettext("Below the threshold; does not exclude it"))


def image_details(item: InstanceView, manifests: Mapping[str, Manifest]) -> View:
    """The folded part: size, ``times`` per job, and the accuracy of the models per source of test images.

    ``manifests`` are by the model's digest; a model has a table per operating point of the label that it reported.
    """
    frames = (item.number_of_frames,) if item.number_of_frames > 1 else ()
    findings = [(finding, manifests.get(finding.model_digest)) for finding in item.findings]
    return {
        "size": gettext(", ").join((" × ".join(map(str, (item.columns, item.rows, *frames))), format_size(item.bytes))),
        "kind": join_nonempty((item.modality, item.body_part_examined, item.view_position)) or DASH,
        "received": format_time(item.received_at),
        "times": [_times(item, job) for job in item.jobs if job.timing_ms],
        "models": [_model_details(finding, manifest) for finding, manifest in findings if manifest],
    }


def _times(item: InstanceView, job: JobView) -> str:
    steps = {
        "decode": gettext("Decoding"), "preprocess": gettext("Preparing"), "input_check": gettext("Checking the image"),
        "infer": gettext("AI model"), "postprocess": gettext("Evaluating"), "store": gettext("Saving"), "total": gettext("Total"),
    }  # fmt: skip
    durations = [(gettext("Receiving"), item.ingest_ms)]
    durations += [(word, job.timing_ms[key]) for key, word in steps.items() if key in job.timing_ms]
    return str(gettext("; ").join(f"{word} {format_milliseconds(duration)}" for word, duration in durations))


def _model_details(finding: Finding, manifest: Manifest) -> View:
    """The intended use, and a table of accuracy per source; no table where the accuracy is not verified."""
    points = [point["per_source"] for point in manifest["operating_points"] if point["label"] == finding.label and point.get("per_source")]
    points = points if finding.has_verified_accuracy else []
    use = manifest["intended_use"]
    return {"intended_use": localize(use["zh"], use["en"]), "tables": [[_source_row(source) for source in sources] for sources in points]}


def _source_row(source: Mapping[str, Any]) -> View:
    """The accuracy on the test images of one source; ``cases`` counts those with and without the finding."""
    rates = {name: source.get(name) for name in ("sensitivity", "specificity")}
    return {
        "source": untranslated(source["source"]),
        "cases": f"{format_count(source['n_positive'])} / {format_count(source['n_negative'])}",
        **{name: format_percent(rate["value"]) if rate else DASH for name, rate in rates.items()},
    }
