"""The rows of the worklist, ready to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flask import url_for
from flask_babel import gettext

from appliance.core.domain import ScanState
from appliance.store.worklist import StudyRow
from webui.formatting import (
    format_count,
    format_person_name,
    format_score,
    format_study_date,
    format_time,
    format_volume,
    localize,
)
from webui.messages import STATES
from webui.view_models import DASH, Chip, RunView, sex_and_age, state_chip

_WITH_RESULT = frozenset({ScanState.AI_READY, ScanState.REVIEWING, ScanState.SIGNED, ScanState.OVERRIDDEN})
_PENDING = frozenset({ScanState.WAITING, ScanState.QUEUED, ScanState.RUNNING})


@dataclass(frozen=True)
class WorklistRow:
    """One study.

    Attributes:
        word: the state, and that it is urgent, as a screen reader announces a change.
        name: of the patient, or that there is none; ``own_name`` is empty then.
        findings: labels above their threshold with their scores.
        without_findings: what stands in their place: nothing is above a threshold, there is no result yet, or there is none.
        volumes: what was measured in a series.
        button: which of the buttons for the order of analysis the row has.
    """

    id: int
    url: str
    word: str
    name: str
    own_name: str
    patient_id: str
    is_urgent: bool
    has_patient_mismatch: bool
    has_conflict: bool
    is_recalled: bool
    sex_and_age: str
    taken: str
    modalities: str
    images: str
    state: Chip
    findings: tuple[str, ...]
    without_findings: Literal["", "below", "pending", "none"]
    volumes: tuple[str, ...]
    runs: tuple[RunView, ...]
    button: Literal["", "urgent", "routine"]
    received: str

    @classmethod
    def of(cls, row: StudyRow) -> WorklistRow:
        """The view of a row of the store."""
        own_name = format_person_name(row.patient_name)
        words = [str(STATES[row.state].word), *([gettext("Urgent")] if row.urgent else [])]
        return cls(
            id=row.id,
            url=url_for("study.show", study_id=row.id),
            word=gettext(", ").join(words),
            name=own_name or gettext("(no name)"),
            own_name=own_name,
            patient_id=row.patient_id,
            is_urgent=row.urgent is not None,
            has_patient_mismatch=row.patient_mismatch,
            has_conflict=row.conflict,
            is_recalled=row.recalled,
            sex_and_age=sex_and_age(row.patient_sex, row.patient_age_years),
            taken=format_study_date(row.study_date, row.study_time) or DASH,
            modalities=row.modalities,
            images=f" × {format_count(row.images)}" if row.images > 1 else "",
            state=state_chip(row.state, row.position),
            findings=tuple(f"{localize(zh, en)} {format_score(value)}" for zh, en, value in row.positive),
            without_findings="" if row.positive else _without_findings(row),
            volumes=tuple(f"{localize(zh, en)} {format_volume(value)}" for zh, en, value in row.measured),
            runs=tuple(view for ran in row.ran if ran.code and (view := RunView.of(ran))),
            button="" if not row.pending else "routine" if row.urgent else "urgent",
            received=format_time(row.received_at),
        )


def _without_findings(row: StudyRow) -> Literal["", "below", "pending", "none"]:
    if row.state in _WITH_RESULT and row.scored:
        return "below"
    if row.state in _PENDING:
        return "pending"
    return "" if row.measured else "none"
