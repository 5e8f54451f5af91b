"""The study page, ready to print: the patient bar, the viewer's configuration, and the report (what the models found, or why not)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from flask import url_for
from flask_babel import gettext

from appliance.core.correction import Correction
from appliance.core.domain import PENDING_STATES, Note, ScanState
from appliance.store.job_queue import STOPPED_BY_INPUT_CHECK
from appliance.store.study_summary import RECALLED
from appliance.store.taken_back import SupersededFinding
from appliance.store.volume_results import VolumeView
from appliance.store.worklist import InstanceView, StudyRow, StudyView
from webui.formatting import format_person_name, format_score, format_study_date, format_time, language, localize
from webui.messages import STATES, note_detail, reason_text, urgency_text
from webui.study.finding_view import Manifest, finding_card, image_details, volume_card
from webui.view_models import DASH, View, join_nonempty, note_view, sex_and_age, state_chip

_AGE_CODES: Final = ("caution.age_outside", "caution.age_unknown")


def study_header(row: StudyRow) -> View:
    """Whose study it is; ``mismatch`` warns that images of another patient came under the same study."""
    return {
        "id": row.id,
        "name": format_person_name(row.patient_name) or gettext("(no name)"),
        "patient_id": row.patient_id or DASH,
        "sex_and_age": sex_and_age(row.patient_sex, row.patient_age_years),
        "taken": format_study_date(row.study_date, row.study_time) or DASH,
        "accession_number": row.accession_number,
        "description": row.study_description,
        "received": format_time(row.received_at),
        "mismatch": note_view(Note("caution.patient_mismatch")) if row.patient_mismatch else None,
    }


def viewer_config(study: StudyView) -> View:
    """The viewer's ``data-config``: language, and for each image the addresses of pixels and heat maps. The viewer has its own texts."""
    return {"lang": language(), "text": {}, "images": [_image_config(item) for item in study.instances]}


def _image_config(item: InstanceView) -> View:
    frame = url_for("image_api.frame", instance_id=item.id, number=0)
    return {
        "id": item.id,
        "title": _kind(item),
        "meta_url": url_for("image_api.description", instance_id=item.id),
        "frame_url": frame.removesuffix("0") + "{frame}",
    } | _viewer_result(item)


def _viewer_result(item: InstanceView) -> View:
    """What the viewer draws of an image's result: the marks of its findings, or why there is none."""
    return {
        "unread": missing_result_word(item),
        "findings": [
            {
                "id": finding.id, "label": localize(finding.title_zh, finding.title_en), "score": finding.score,
                "threshold": finding.threshold, "positive": finding.positive, "outline": finding.outline, "peak": finding.peak,
                "inner_contours": [contour.to_json() for contour in finding.inner_contours],
                "heatmap_url": url_for("image_api.heatmap", finding_id=finding.id),
            }
            for finding in item.findings
        ],
    }  # fmt: skip


def _kind(item: InstanceView) -> str:
    """Modality, body part and view."""
    return join_nonempty((item.modality, item.body_part_examined, item.view_position))


def study_report(study: StudyView, volumes: Sequence[VolumeView], manifests: Mapping[str, Manifest], revision: int) -> View:
    """The report of a study.

    ``image_ids`` and ``finding_ids`` hold the ids of all images and results, separated by blanks, so that a script notices a new one;
    ``results`` is by image id what the viewer draws, so that a result that arrives is shown without a reload; ``urgency``: who made the
    study urgent, empty if it is not.

    Args:
        study: the study.
        volumes: the results of its series.
        manifests: the models' manifests by digest.
        revision: the store's when the study was queried.
    """
    row = study.row
    results = [str(finding.id) for item in study.instances for finding in item.findings]
    return {
        "study_id": row.id,
        "revision": revision,
        "is_pending": row.state in PENDING_STATES or any(item.state in PENDING_STATES for item in study.instances),
        "image_ids": " ".join(str(item.id) for item in study.instances),
        "finding_ids": " ".join(results + [f"v{volume.job_id}" for volume in volumes]),
        "results": {str(item.id): _viewer_result(item) for item in study.instances},
        "urgency": urgency_text(row.urgent) if row.urgent else "",
        "can_be_urgent": row.pending and not row.urgent,
        "has_headings": len(study.instances) > 1,
        "images": [_image_report(group, volumes, manifests, row.position) for group in _groups(study)],
    }


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
    """The images, numbered from 1, in groups with the same report: 160 slices that no model analyses are one section.

    An image that the input check stopped, or that a person decided about, has a section of its own.
    """
    groups: dict[object, list[tuple[int, InstanceView]]] = {}
    for number, item in enumerate(study.instances, start=1):
        series = item.series_id if item.measured else None
        key = (
            item.id
            if item.findings or item.superseded or item.correction.is_confirmed or is_stopped(item)
            else (item.state, item.reason, series)
        )
        groups.setdefault(key, []).append((number, item))
    return list(groups.values())


def _image_report(
    group: list[tuple[int, InstanceView]], volumes: Sequence[VolumeView], manifests: Mapping[str, Manifest], position: int | None
) -> View:
    """One section: an image with findings, a series, or all images without a result for the same reason.

    ``images`` holds the ids, separated by blanks; ``cautions`` are here where no card has them; ``details`` is None for several images.
    """
    item, is_single = group[0][1], len(group) == 1
    numbers = format_numbers([number for number, _ in group])
    cautions = list(_cautions(item, manifests))
    measured = [volume for volume in volumes if item.measured and volume.series_id == item.series_id]
    return {
        "heading": gettext("Image %(n)s", n=numbers) if is_single else gettext("Images %(n)s", n=numbers),
        "images": " ".join(str(image.id) for _, image in group),
        "kind": _kind(item),
        "state": _state_box(item, position),
        "findings": [
            finding_card(item, finding, manifests.get(finding.model_digest), () if place else cautions)
            for place, finding in enumerate(item.findings)
        ],
        "volumes": [
            volume_card(volume, manifests.get(volume.model_digest), () if place or item.findings else cautions)
            for place, volume in enumerate(measured)
        ],
        "cautions": () if item.findings or item.measured else cautions,
        "details": image_details(item, manifests) if is_single else None,
        "take_back": item.id if is_single and item.correction.is_confirmed and item.state not in PENDING_STATES else None,
        "superseded": [_superseded(finding) for finding in item.superseded] if is_single else [],
    }


def _superseded(finding: SupersededFinding) -> View:
    """An earlier result that does not count any more: what it was, on which decision, and who took that back."""
    done = [Note("caution.turned_by_person", str(finding.correction.degrees))] if finding.correction.degrees else []
    done += [Note("caution.inverted_by_person")] if finding.correction.inverts else []
    words = [" ".join(filter(None, (reason_text(note.code), note_detail(note)))) for note in done] or [gettext("Analysed as it was")]
    return {
        "title": localize(finding.title_zh, finding.title_en),
        "score": gettext(
            "%(score)s (threshold %(threshold)s)", score=format_score(finding.score), threshold=format_score(finding.threshold)
        ),
        "version": finding.model_version,
        "decision": gettext("; ").join(words),
        "taken_back": gettext("Taken back %(when)s by %(who)s", when=format_time(finding.at), who=finding.actor),
    }


def _state_box(item: InstanceView, position: int | None) -> View | None:
    """The state of an image without a result, or of a model that gave none beside others that did; None where a result says enough.

    ``kind`` is ``pending``; ``none``: there is no result; ``partial``: another model could not analyse it; ``failed``: another model
    failed. ``reason`` is why, if that is known.
    """
    state, has_result = item.state, bool(item.findings or item.measured)
    is_failed = state == ScanState.FAILED
    if state in PENDING_STATES:
        return {"kind": "pending", "chip": state_chip(state, position if state == ScanState.QUEUED else None)}
    if not has_result:
        kind = "none"
    elif state in (ScanState.NOT_ANALYSED, ScanState.QUALITY_REJECTED):
        kind = "partial"
    elif is_failed:
        kind = "failed"
    else:
        return None
    return {
        "kind": kind,
        "chip": state_chip(state),
        "reason": _with_detail(item.reason) if item.reason else None,
        "can_retry": is_failed,
        "decisions": _decisions(item),
    }


def is_stopped(item: InstanceView) -> bool:
    """Whether the input check stopped an image, so that a person may decide what to do with it."""
    return item.state is ScanState.QUALITY_REJECTED and item.reason is not None and item.reason.code in STOPPED_BY_INPUT_CHECK


def _decisions(item: InstanceView) -> list[View]:
    """What a person may have done with an image that the input check stopped: the correction that it suggests, and none."""
    reason = item.reason
    if reason is None or not is_stopped(item):
        return []
    words = {
        ("quality.turned", "90"): gettext("Turn left by 90° and analyse"),
        ("quality.turned", "180"): gettext("Turn by 180° and analyse"),
        ("quality.turned", "270"): gettext("Turn right by 90° and analyse"),
        ("quality.negative", ""): gettext("Exchange dark and bright, and analyse"),
    }
    decisions = []
    if word := words.get((reason.code, reason.detail)):
        back = (item.correction.degrees - int(reason.detail or 0)) % 360
        inverts = item.correction.inverts ^ (reason.code == "quality.negative")
        decisions.append({"correction": Correction(back, inverts, True).to_text(), "word": word, "is_suggested": True})
    as_it_is = Correction(item.correction.degrees, item.correction.inverts, True)
    return [*decisions, {"correction": as_it_is.to_text(), "word": gettext("Analyse as it is"), "is_suggested": False}]


def _cautions(item: InstanceView, manifests: Mapping[str, Manifest]) -> Iterator[View]:
    """Assumptions and cautions of an image and its jobs, each code once; ``remark``: what the manifest says of the age it is for.

    Left out is what the report says at another place: the reason of the state, and on a result that the model was withdrawn.
    """
    has_result = bool(item.findings or item.measured)
    codes_in_other_rows = ({item.reason.code} if item.reason else set()) | (set(RECALLED) if has_result else set())
    notes: dict[str, Note] = {}
    for note in (*item.notes, *(note for job in item.jobs for note in job.notes if note.code not in codes_in_other_rows)):
        notes.setdefault(note.code, note)
    manifest = manifests.get(item.findings[0].model_digest) if item.findings else None
    for note in notes.values():
        remark = manifest["applies_to"]["age"]["note"] if manifest and note.code in _AGE_CODES else None
        yield {"note": _with_detail(note), "remark": localize(remark["zh"], remark["en"]) if remark else ""}


def _with_detail(note: Note) -> View | None:
    return note_view(replace(note, detail=note_detail(note)))
