"""The cards of the report: one finding on an image, or the volumes that a model measured in a series, ready to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flask import url_for
from flask_babel import gettext

from appliance.core.domain import Finding
from appliance.store.volume_results import COLOURS, VolumeView
from appliance.store.worklist import InstanceView
from webui.formatting import format_count, format_percent, format_score, format_volume, localize
from webui.view_models import NoteView, RunView

# A model's manifest, as stored.
Manifest = Mapping[str, Any]

_SCALE_WIDTH: Final = 200
_SHORT_DIGEST_CHARS: Final = 12


@dataclass(frozen=True)
class Caution:
    """An assumption or caution; ``remark`` is what the model's manifest says of the age it is for."""

    note: NoteView
    remark: str


@dataclass(frozen=True)
class ModelVersion:
    """The version that made a result: ``name`` with version, and how it was run on this box."""

    title: str
    name: str
    digest: str
    short_digest: str
    run: RunView | None
    runtime: str
    precision: str

    @classmethod
    def of(cls, result: Finding | VolumeView, manifest: Manifest | None, run: RunView | None) -> ModelVersion:
        """The version of a result; the title is empty without its manifest."""
        return cls(
            title=localize(manifest["title"]["zh"], manifest["title"]["en"]) if manifest else "",
            name=f"{result.model} {result.model_version}",
            digest=result.model_digest,
            short_digest=result.model_digest[:_SHORT_DIGEST_CHARS],
            run=run if run and run.code else None,
            runtime=result.runtime,
            precision=result.precision.upper(),
        )


@dataclass(frozen=True)
class Rate:
    """Sensitivity or specificity with its 95 % confidence interval, in words."""

    value: str
    interval: str

    @classmethod
    def of(cls, rate: tuple[float, float, float]) -> Rate:
        """The words of value, lower and upper bound (fractions)."""
        value, low, high = (format_percent(item) for item in rate)
        return cls(value, gettext("95%% CI %(low)s to %(high)s", low=low, high=high))


@dataclass(frozen=True)
class FindingCard:
    """One label's score against its threshold.

    Attributes:
        recall: why the model version was withdrawn after it had made this finding.
        score_x: the score on a scale that is 200 wide; ``threshold_x``: the threshold.
    """

    title: str
    is_positive: bool
    recall: NoteView | None
    score: str
    threshold: str
    score_x: str
    threshold_x: str
    sensitivity: Rate
    specificity: Rate
    measured_on: str
    model: ModelVersion
    cautions: tuple[Caution, ...]

    @classmethod
    def of(cls, item: InstanceView, finding: Finding, manifest: Manifest | None, cautions: tuple[Caution, ...]) -> FindingCard:
        """The card of a finding on an image."""
        return cls(
            title=localize(finding.title_zh, finding.title_en),
            is_positive=finding.positive,
            recall=NoteView.of(item.recall(finding)),
            score=format_score(finding.score),
            threshold=format_score(finding.threshold),
            score_x=f"{finding.score * _SCALE_WIDTH:.1f}",
            threshold_x=f"{finding.threshold * _SCALE_WIDTH:.1f}",
            sensitivity=Rate.of(finding.sensitivity),
            specificity=Rate.of(finding.specificity),
            measured_on=finding.measured_on,
            model=ModelVersion.of(finding, manifest, RunView.of(item.ran(finding))),
            cautions=cautions,
        )


@dataclass(frozen=True)
class Plane:
    """A key picture of a volume: a plane through its middle."""

    word: str
    url: str
    description: str


@dataclass(frozen=True)
class VolumeCard:
    """One model's measurements in a series; each has the colour of its outline, its title and its value."""

    job_id: int
    title: str
    slices: str
    recall: NoteView | None
    measurements: tuple[tuple[str, str, str], ...]
    planes: tuple[Plane, ...]
    model: ModelVersion
    cautions: tuple[Caution, ...]

    @classmethod
    def of(cls, volume: VolumeView, manifest: Manifest | None, cautions: tuple[Caution, ...]) -> VolumeCard:
        """The card of a volume."""
        model = ModelVersion.of(volume, manifest, RunView.of(volume.ran))
        words = {"axial": gettext("Axial"), "coronal": gettext("Coronal"), "sagittal": gettext("Sagittal")}
        return cls(
            job_id=volume.job_id,
            title=model.title or volume.model,
            slices=format_count(volume.slices),
            recall=NoteView.of(volume.recall),
            measurements=tuple(
                (COLOURS[place % len(COLOURS)], localize(item.title_zh, item.title_en), format_volume(item.value))
                for place, item in enumerate(volume.measurements)
            ),
            planes=tuple(
                Plane(
                    word,
                    url_for("image_api.key_picture", job_id=volume.job_id, plane=plane),
                    gettext("%(plane)s plane through the middle, with the outline", plane=word),
                )
                for plane, word in words.items()
                if plane in volume.planes
            ),
            model=model,
            cautions=cautions,
        )
