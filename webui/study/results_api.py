"""The results of a study as JSON, for programs; by UIDs and numbers of the box, without the patient's name or ID."""

from __future__ import annotations

from typing import Any, Final

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from appliance.core.domain import PENDING_STATES, Note
from appliance.messages import DISCLAIMER, both_languages
from appliance.store.volume_results import VolumeResults, VolumeView
from appliance.store.worklist import InstanceView
from webui.context import current_box
from webui.server.access_log import record_access

blueprint: Final = Blueprint("results_api", __name__, url_prefix="/api/v1")


@blueprint.get("/studies/<int:study_id>/results")
def show(study_id: int) -> ResponseReturnValue:
    """Every image of a study with its own state and findings.

    ``is_pending``: results may still come. A result whose model version was withdrawn or rolled back has ``recall``. The fields of findings
    and volumes are those of ``appliance analyze --json``.
    """
    box = current_box()
    study = box.worklist.study(study_id)
    record_access(study_id)
    return jsonify(
        study_id=study.row.id,
        study_instance_uid=study.study_instance_uid,
        accession_number=study.row.accession_number,
        received_at=study.row.received_at,
        is_pending=study.row.state in PENDING_STATES or any(item.state in PENDING_STATES for item in study.instances),
        has_patient_mismatch=study.row.patient_mismatch,
        images=[_image(item) for item in study.instances],
        volumes=[_volume(item) for item in VolumeResults(box.store).of_study(study_id)],
        disclaimer=DISCLAIMER,
    )


def _image(item: InstanceView) -> dict[str, Any]:
    notes = dict.fromkeys((*item.notes, *(note for job in item.jobs if job.model_digest for note in job.notes)))
    return {
        "id": item.id,
        "series_instance_uid": item.series_instance_uid,
        "sop_instance_uid": item.sop_instance_uid,
        "modality": item.modality,
        "state": item.state.value,
        "reason": _note(item.reason),
        "notes": [_note(note) for note in notes],
        "findings": [finding.to_json() | {"recall": _note(item.recall(finding))} for finding in item.findings],
    }


def _volume(item: VolumeView) -> dict[str, Any]:
    return {"series_id": item.series_id} | item.to_json() | {"recall": _note(item.recall)}


def _note(note: Note | None) -> dict[str, str] | None:
    return both_languages(note.code, note.detail) if note else None
