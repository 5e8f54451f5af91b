"""``appliance studies``: the studies of this box with their patients, states and findings, as a table or as JSON for scripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.terminal import print_columns, say
from appliance.core.domain import Note

if TYPE_CHECKING:
    from appliance.store.worklist import InstanceView, StudyView, Worklist

_PAGE: Final = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance studies``."""
    parser.add_argument("--search", default="", metavar="TEXT", help="only studies with this in the patient's name, ID or accession number")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the studies, newest first, and record the access in the audit; returns the exit code."""
    from appliance.store.database import INSTANCES_ACCESSED
    from appliance.store.store import open_box
    from appliance.store.worklist import Worklist

    with closing(open_box(arguments.data_dir)) as store:
        studies = list(_studies(Worklist(store), arguments.search))
        for study in studies:  # as on the page: whoever sees a patient is in the audit
            store.record(INSTANCES_ACCESSED, "cli", "R", f"study:{study.row.id}")
    if arguments.json:
        print(json.dumps([_to_json(study) for study in studies], ensure_ascii=False, indent=1))
        return 0
    if not studies:
        print(say("no study"))
        return 0
    head = (say("number"), say("patient"), say("ID"), say("study date"), say("images"), say("state"))
    print_columns([head, *(_columns(study) for study in studies)])
    return 0


def _studies(worklist: Worklist, search: str) -> Iterator[StudyView]:
    before = None
    while rows := worklist.page(before=before, search=search, limit=_PAGE):
        for row in rows:
            yield worklist.study(row.id)
        before = rows[-1].id


def _columns(study: StudyView) -> tuple[str, ...]:
    row = study.row
    return str(row.id), row.patient_name, row.patient_id, row.study_date, str(row.images), row.state.value


def _to_json(study: StudyView) -> dict[str, Any]:
    row = study.row
    return {
        "id": row.id,
        "study_instance_uid": study.study_instance_uid,
        "patient_name": row.patient_name,
        "patient_id": row.patient_id,
        "patient_birth_date": row.patient_birth_date,
        "patient_sex": row.patient_sex,
        "accession_number": row.accession_number,
        "study_date": row.study_date,
        "study_description": row.study_description,
        "received_at": row.received_at,
        "state": row.state.value,
        "images": [_image(image) for image in study.instances],
    }


def _image(image: InstanceView) -> dict[str, Any]:
    notes: list[Note] = [*image.notes, *(note for job in image.jobs for note in job.notes)]
    return {
        "id": image.id,
        "series_instance_uid": image.series_instance_uid,
        "sop_instance_uid": image.sop_instance_uid,
        "modality": image.modality,
        "body_part_examined": image.body_part_examined,
        "view_position": image.view_position,
        "source": image.source_kind,
        "state": image.state.value,
        "reason": image.reason.to_json() if image.reason else None,
        "notes": [note.to_json() for note in dict.fromkeys(notes)],
        "findings": [finding.to_json() for finding in image.findings],
    }
