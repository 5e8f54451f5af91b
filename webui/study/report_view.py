"""The report of a study: what the models found on each image, and why there is no result, ready to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from flask_babel import gettext

from appliance.core.domain import PENDING_STATES, Note, ScanState
from appliance.store.study_summary import RECALLED
from appliance.store.volume_results import VolumeView
from appliance.store.worklist import InstanceView, StudyView
from webui.formatting import localize
from webui.messages import STATES, note_detail, reason_hint, reason_text, urgency_text
from webui.study.finding_view import Caution, FindingCard, VolumeCard
from webui.study.image_details import ImageDetails
from webui.view_models import Chip, NoteView, join_nonempty, state_chip

# A model's manifest by its digest, as stored.
Manifests = Mapping[str, Mapping[str, Any]]

_AGE_CODES: Final = ("caution.age_outside", "caution.age_unknown")


@dataclass(frozen=True)
class StateBox:
    """The state of an image without a result, or of a model that gave none beside others that did.

    Attributes:
        kind: ``pending``; ``none``: there is no result; ``partial``: another model could not analyse it; ``failed``: another model failed.
        reason: why, if that is known.
    """

    kind: Literal["pending", "none", "partial", "failed"]
    chip: Chip
    reason: NoteView | None
    can_retry: bool


@dataclass(frozen=True)
class ImageReport:
    """One section: an image with findings, a series, or all images without a result for the same reason.

    Attributes:
        images: the ids of the images, separated by blanks.
        kind: modality, body part and view.
        cautions: assumptions and cautions, where no card has them.
        details: of the image; None for several images.
    """

    heading: str
    images: str
    kind: str
    state: StateBox | None
    findings: tuple[FindingCard, ...]
    volumes: tuple[VolumeCard, ...]
    cautions: tuple[Caution, ...]
    details: ImageDetails | None


@dataclass(frozen=True)
class StudyReport:
    """The report of a study.

    Attributes:
        image_ids: ids of all images; ``finding_ids``: of all results; both separated by blanks, so that a script notices a new one.
        missing: by image id, why there is no result on it, for the viewer.
        urgency: who made the study urgent; empty if it is not.
    """

    study_id: int
    revision: int
    is_pending: bool
    image_ids: str
    finding_ids: str
    missing: Mapping[str, str]
    urgency: str
    can_be_urgent: bool
    has_headings: bool
    images: tuple[ImageReport, ...]

    @classmethod
    def of(cls, study: StudyView, volumes: Sequence[VolumeView], manifests: Manifests, revision: int) -> StudyReport:
        """The report of a study; ``revision`` is the store's when the study was read."""
        row = study.row
        results = [str(finding.id) for item in study.instances for finding in item.findings]
        return cls(
            study_id=row.id,
            revision=revision,
            is_pending=row.state in PENDING_STATES or any(item.state in PENDING_STATES for item in study.instances),
            image_ids=" ".join(str(item.id) for item in study.instances),
            finding_ids=" ".join(results + [f"v{volume.job_id}" for volume in volumes]),
            missing={str(item.id): missing_result_word(item) for item in study.instances if not item.findings},
            urgency=urgency_text(row.urgent) if row.urgent else "",
            can_be_urgent=row.pending and not row.urgent,
            has_headings=len(study.instances) > 1,
            images=tuple(_image_report(group, volumes, manifests, row.position) for group in _groups(study)),
        )


def missing_result_word(item: InstanceView) -> str:
    """Why there is no result on this image, as the viewer writes it over the image; empty when there is one."""
    return "" if item.findings or item.measured else str(STATES[item.state].word)


def format_numbers(numbers: Sequence[int]) -> str:
    """Numbers with ranges: ``1–3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _groups(study: StudyView) -> list[list[tuple[int, InstanceView]]]:
    """The images, numbered from 1, in groups with the same report: 160 slices that no model analyses are one section."""
    groups: dict[object, list[tuple[int, InstanceView]]] = {}
    for number, item in enumerate(study.instances, start=1):
        series = item.series_id if item.measured else None
        key = item.id if item.findings else (item.state, item.reason, series)
        groups.setdefault(key, []).append((number, item))
    return list(groups.values())


def _image_report(
    group: list[tuple[int, InstanceView]], volumes: Sequence[VolumeView], manifests: Manifests, position: int | None
) -> ImageReport:
    item, is_single = group[0][1], len(group) == 1
    numbers = format_numbers([number for number, _ in group])
    cautions = tuple(_cautions(item, manifests))
    measured = [volume for volume in volumes if item.measured and volume.series_id == item.series_id]
    return ImageReport(
        heading=gettext("Image %(n)s", n=numbers) if is_single else gettext("Images %(n)s", n=numbers),
        images=" ".join(str(image.id) for _, image in group),
        kind=join_nonempty((item.modality, item.body_part_examined, item.view_position)),
        state=_state_box(item, position),
        findings=tuple(
            FindingCard.of(item, finding, manifests.get(finding.model_digest), () if place else cautions)
            for place, finding in enumerate(item.findings)
        ),
        volumes=tuple(
            VolumeCard.of(volume, manifests.get(volume.model_digest), () if place or item.findings else cautions)
            for place, volume in enumerate(measured)
        ),
        cautions=() if item.findings or item.measured else cautions,
        details=ImageDetails.of(item, manifests) if is_single else None,
    )


def _state_box(item: InstanceView, position: int | None) -> StateBox | None:
    """The state as the report shows it; None where a result says enough."""
    state, has_result = item.state, bool(item.findings or item.measured)
    reason = _with_detail(item.reason) if item.reason else None
    is_failed = state == ScanState.FAILED
    if state in PENDING_STATES:
        return StateBox("pending", state_chip(state, position if state == ScanState.QUEUED else None), None, False)
    if not has_result:
        return StateBox("none", state_chip(state), reason, is_failed)
    if state in (ScanState.NOT_ANALYSED, ScanState.QUALITY_REJECTED):
        return StateBox("partial", state_chip(state), reason, False)
    return StateBox("failed", state_chip(state), reason, True) if is_failed else None


def _cautions(item: InstanceView, manifests: Manifests) -> Iterator[Caution]:
    """Assumptions and cautions of an image and its jobs, each code once.

    Left out is what the report says at another place: the reason of the state, and on a result that the model was withdrawn.
    """
    has_result = bool(item.findings or item.measured)
    shown_elsewhere = ({item.reason.code} if item.reason else set()) | (set(RECALLED) if has_result else set())
    notes: dict[str, Note] = {}
    for note in (*item.notes, *(note for job in item.jobs for note in job.notes if note.code not in shown_elsewhere)):
        notes.setdefault(note.code, note)
    manifest = manifests.get(item.findings[0].model_digest) if item.findings else None
    for note in notes.values():
        remark = manifest["applies_to"]["age"]["note"] if manifest and note.code in _AGE_CODES else None
        yield Caution(_with_detail(note), localize(remark["zh"], remark["en"]) if remark else "")


def _with_detail(note: Note) -> NoteView:
    return NoteView(note.code, reason_text(note.code), reason_hint(note.code), note_detail(note))
