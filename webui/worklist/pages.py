"""The worklist page, and the number by which a page notices that something has changed."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, jsonify, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from appliance.core.domain import ANALYSED_STATES, PENDING_STATES, ScanState
from appliance.store.worklist import PAGE_SIZE, StudyRow
from webui.context import current_box
from webui.formatting import format_count, format_person_name, format_score, format_study_date, format_time, format_volume, localize
from webui.messages import STATES, VIEWS
from webui.server.access_log import record_list
from webui.server.security import parse_id
from webui.view_models import DASH, View, run_view, sex_and_age, state_chip

blueprint: Final = Blueprint("worklist", __name__)
_MAX_SEARCH_CHARS: Final = 100


@blueprint.route("/", methods=["GET", "POST"])
def show() -> ResponseReturnValue:
    """The worklist. A search comes by POST, so that a patient's name gets into no address, history or log."""
    worklist = current_box().worklist
    search = request.form.get("q", "").strip()[:_MAX_SEARCH_CHARS]
    before = parse_id((request.form if request.method == "POST" else request.args).get("before"))
    revision = worklist.revision()  # before the rows: a change in between raises it, so that the page asks again
    rows = worklist.page(before=before, search=search, limit=PAGE_SIZE + 1)
    is_fragment = bool(request.headers.get("X-Fragment"))
    record_list("worklist", [row.id for row in rows[:PAGE_SIZE]], is_opened=not is_fragment, is_search=bool(search))
    template = "worklist_rows.html" if is_fragment else "worklist.html"
    return render_template(
        template, rows=[_row_view(row) for row in rows[:PAGE_SIZE]], next_before=rows[PAGE_SIZE - 1].id if rows[PAGE_SIZE:] else None,
        search=search, before=before or "", revision=revision, total=format_count(worklist.count()),
    )  # fmt: skip


@blueprint.get("/api/v1/revision")
def revision() -> ResponseReturnValue:
    """The number of the last change that a person can see, also as the ETag: an open page asks with ``If-None-Match`` (304)."""
    number = current_box().worklist.revision()
    response = jsonify(revision=number)
    response.set_etag(str(number))
    return response.make_conditional(request)


def _row_view(row: StudyRow) -> View:
    """One study, ready to print.

    ``word`` is the state, and that it is urgent, as a screen reader announces a change; ``own_name`` is empty without a name; ``findings``
    are labels above their threshold with their scores; ``parts``: the images by view, where their states differ; ``volumes``: what was
    measured in a series; ``button``: which of the buttons for the order of analysis the row has.
    """
    own_name = format_person_name(row.patient_name)
    parts = _parts(row)
    states = [f"{part['view']}: {part['state']['word']}" for part in parts] or [str(STATES[row.state].word)]
    words = [*states, *([gettext("Urgent")] if row.urgent else [])]
    return {
        "id": row.id,
        "url": url_for("study.show", study_id=row.id),
        "word": gettext(", ").join(words),
        "name": own_name or gettext("(no name)"),
        "own_name": own_name,
        "patient_id": row.patient_id,
        "is_urgent": row.urgent is not None,
        "has_patient_mismatch": row.patient_mismatch,
        "has_conflict": row.conflict,
        "is_recalled": row.recalled,
        "sex_and_age": sex_and_age(row.patient_sex, row.patient_age_years),
        "taken": format_study_date(row.study_date, row.study_time) or DASH,
        "modalities": row.modalities,
        "images": f" × {format_count(row.images)}" if row.images > 1 else "",
        "state": state_chip(row.state, row.position),
        "parts": parts,
        "findings": [f"{localize(zh, en)} {format_score(value)}" for zh, en, value in row.positive],
        "without_findings": "" if row.positive else _without_findings(row),
        "volumes": [f"{localize(zh, en)} {format_volume(value)}" for zh, en, value in row.measured],
        "runs": [run_view(ran) for ran in row.ran if ran.code],
        "button": "" if not row.pending else "routine" if row.urgent else "urgent",
        "received": format_time(row.received_at),
    }


def _parts(row: StudyRow) -> list[View]:
    """The images by view with the state of each group, where they differ: an unanalysed lateral image hides no result of the frontal."""
    if len({group.state for group in row.groups}) < 2:
        return []
    return [
        {
            "view": str(VIEWS.get(group.view, VIEWS[""])),
            "images": f" × {format_count(group.images)}" if group.images > 1 else "",
            "state": state_chip(group.state, row.position if group.state is ScanState.QUEUED else None),
        }
        for group in row.groups
    ]


def _without_findings(row: StudyRow) -> str:
    """What is shown in place of findings: nothing is above a threshold, there is no result yet, or there is none."""
    if row.scored and any(group.state in ANALYSED_STATES for group in row.groups):
        return "below" if all(group.state in ANALYSED_STATES for group in row.groups) else "below_where_analysed"
    if row.state in PENDING_STATES:
        return "pending"
    return "" if row.measured else "none"
