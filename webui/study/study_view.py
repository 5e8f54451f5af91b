"""The patient bar of the study page and the configuration of the image viewer, ready to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import url_for
from flask_babel import gettext

from appliance.store.worklist import InstanceView, StudyRow, StudyView
from webui.formatting import format_person_name, format_study_date, format_time, language, localize
from webui.messages import reason_hint, reason_text
from webui.study.report_view import missing_result_word
from webui.view_models import DASH, NoteView, join_nonempty, sex_and_age


@dataclass(frozen=True)
class StudyHeader:
    """Whose study it is; ``mismatch`` warns that images of another patient came under the same study."""

    id: int
    name: str
    patient_id: str
    sex_and_age: str
    taken: str
    accession_number: str
    description: str
    received: str
    mismatch: NoteView | None

    @classmethod
    def of(cls, row: StudyRow) -> StudyHeader:
        """The header of a study."""
        code = "caution.patient_mismatch"
        return cls(
            id=row.id,
            name=format_person_name(row.patient_name) or gettext("(no name)"),
            patient_id=row.patient_id or DASH,
            sex_and_age=sex_and_age(row.patient_sex, row.patient_age_years),
            taken=format_study_date(row.study_date, row.study_time) or DASH,
            accession_number=row.accession_number,
            description=row.study_description,
            received=format_time(row.received_at),
            mismatch=NoteView(code, reason_text(code), reason_hint(code)) if row.patient_mismatch else None,
        )


def viewer_config(study: StudyView) -> dict[str, Any]:
    """The viewer's ``data-config``: language, and for each image the addresses of pixels and heat maps. The viewer has its own texts."""
    return {"lang": language(), "text": {}, "images": [_image_config(item) for item in study.instances]}


def _image_config(item: InstanceView) -> dict[str, Any]:
    frame = url_for("image_api.frame", instance_id=item.id, number=0)
    return {
        "id": item.id,
        "title": join_nonempty((item.modality, item.body_part_examined, item.view_position)),
        "unread": missing_result_word(item),
        "meta_url": url_for("image_api.description", instance_id=item.id),
        "frame_url": frame.removesuffix("0") + "{frame}",
        "findings": [
            {
                "id": finding.id, "label": localize(finding.title_zh, finding.title_en), "score": finding.score,
                "threshold": finding.threshold, "positive": finding.positive, "outline": finding.outline, "peak": finding.peak,
                "heatmap_url": url_for("image_api.heatmap", finding_id=finding.id),
            }
            for finding in item.findings
        ],
    }  # fmt: skip
