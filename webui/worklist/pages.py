"""The worklist page, and the number by which a page notices that something has changed."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, jsonify, render_template, request
from flask.typing import ResponseReturnValue

from appliance.store.worklist import PAGE_SIZE
from webui.context import current_box
from webui.formatting import format_count
from webui.server.security import parse_id
from webui.worklist.view_model import WorklistRow

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
    template = "worklist_rows.html" if request.headers.get("X-Fragment") else "worklist.html"
    return render_template(
        template, rows=[WorklistRow.of(row) for row in rows[:PAGE_SIZE]], next_before=rows[PAGE_SIZE - 1].id if rows[PAGE_SIZE:] else None,
        search=search, before=before or "", revision=revision, total=format_count(worklist.count()),
    )  # fmt: skip


@blueprint.get("/api/v1/revision")
def revision() -> ResponseReturnValue:
    """The number of the last change that a person can see, also as the ETag: an open page asks with ``If-None-Match`` (304)."""
    number = current_box().worklist.revision()
    response = jsonify(revision=number)
    response.set_etag(str(number))
    return response.make_conditional(request)
