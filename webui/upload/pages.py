"""The upload page, the single request for scripts, and the end of a batch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final, cast

from flask import Blueprint, abort, jsonify, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user
from flask_wtf.csrf import validate_csrf
from wtforms import ValidationError

from appliance.core.domain import Source
from appliance.core.errors import IngestError
from appliance.store.encrypted_stream import RECORD_BYTES
from webui.context import current_box
from webui.formatting import format_count, format_size
from webui.messages import RESULTS, reason_hint, reason_text
from webui.server.bearer import has_bearer
from webui.server.problems import problem
from webui.server.security import csrf
from webui.upload.service import current_uploads, display_name, localize_outcome, parse_form, record_refusal

blueprint: Final = Blueprint("upload", __name__)

_MAX_BATCH: Final = 20_000
_MAX_SHOWN: Final = 50


@blueprint.get("/upload")
def show() -> ResponseReturnValue:
    """The page where a person drops files."""
    uploads, settings = current_uploads().uploads, current_box().settings
    offsets = [(upload, uploads.offset(upload)) for upload in uploads.unfinished(current_user.account.id)]
    unfinished = [
        {
            "id": upload.id, "name": upload.name, "offset": offset, "length": upload.length, "size": format_size(offset),
            "total_size": format_size(upload.length),
        }
        for upload, offset in reversed(offsets)
        if offset < upload.length
    ]  # fmt: skip
    hidden = len(unfinished[_MAX_SHOWN:])
    script = {
        "texts": _script_texts(), "endpoint": url_for("tus.create"), "close": url_for("upload.close"),
        "largest": settings.max_upload_bytes, "largest_archive": settings.max_archive_bytes,
        "too_large": reason_text("ingest.too_large"), "too_large_hint": reason_hint("ingest.too_large"),
        "refused": str(RESULTS["refused"]), "user": current_user.account.id,
    }  # fmt: skip
    return render_template(
        "upload.html", script=script, unfinished=unfinished[:_MAX_SHOWN], hidden_count=format_count(hidden) if hidden else "",
        max_size=format_size(settings.max_upload_bytes), max_archive_size=format_size(settings.max_archive_bytes),
    )  # fmt: skip


def _script_texts() -> dict[str, str]:
    """The texts of the page's script (``webui/viewer/src/upload.ts``) by key."""
    return {
        "waiting": gettext("waiting"), "sending": gettext("sending"), "checking": gettext("checking"),
        "checked": gettext("checked: {n} files"), "stored": gettext("stored"), "broken": gettext("connection broken, trying again"),
        "stopped": gettext("interrupted"), "called_off": gettext("cancelled"), "open": gettext("Open study"),
        "remove": gettext("Remove"), "cancel": gettext("Cancel"),
        "logged_out": gettext("You have been logged out. Log in and choose the same files again; they continue where they stopped."),
        "lost": gettext("The connection to the box is lost. Check the network, then press Continue; nothing that arrived is lost."),
        "summary": gettext("{done} of {total} files done, {stored} stored, {refused} refused, {skipped} skipped"),
        "all_done": gettext("All files are done: {stored} stored, {refused} refused, {skipped} skipped."),
        "nothing": gettext("No files were found in what you dropped."), "pictures": gettext("{n} pictures"),
        "pictures_wait": gettext("{n} pictures are not sent yet: fill in the form above."),
        "no_room": gettext(
            "The disk of the box is full. What arrived is kept. Ask the technician to free disk space, then press Continue."
        ),
        "view": gettext("View"), "view_as_below": gettext("View: as below"), "view_PA": gettext("PA, frontal"),
        "view_AP": gettext("AP, frontal"), "view_LL": gettext("LL, lateral"),
    }  # fmt: skip


@blueprint.before_app_request
def check_multipart() -> None:
    """Refuse a multipart request by its head, before its body is written to the disk: no CSRF token, no length, too large, no room.

    The CSRF token of a browser must be in the header ``X-CSRFToken``, since a form's field is known only when the form is on the disk.
    """
    if request.endpoint != "upload.multipart":
        return
    try:
        if not has_bearer():
            validate_csrf(request.headers.get("X-CSRFToken"))
    except ValidationError:
        abort(400)
    if request.content_length is None:
        abort(411)
    box, length = current_box(), request.content_length
    with record_refusal("multipart", length):
        if length > box.settings.max_archive_bytes:
            raise IngestError("ingest.too_large", f"{length >> 20} MiB")
        box.store.check_space(length)


@blueprint.post("/api/v1/uploads")
def multipart() -> ResponseReturnValue:
    """For scripts: any number of files (field ``file``) and the patient form's fields in one request; returns every outcome."""
    files = request.files.getlist("file")
    if not files:
        abort(400)
    form = parse_form(request.form.to_dict()) if any(request.form.get(name) for name in ("patient_id", "patient_name", "view")) else None
    if isinstance(form, list):
        return problem(422, "web.form", "The patient form is not complete", ", ".join(form))
    finaliser, outcomes = current_uploads().finaliser, []
    with ExitStack() as stack:
        for file in files:
            stack.callback(file.close)
            stream = io.BufferedReader(cast("io.RawIOBase", file.stream), RECORD_BYTES)
            size = stream.seek(0, io.SEEK_END)
            name = display_name(file.filename or "")
            source = Source("upload", current_user.account.username, name)
            outcomes += finaliser.accept(stream, size, name, source, form)
    finaliser.close_series(outcomes)
    return jsonify(outcomes=[localize_outcome(item) for item in outcomes])


csrf.exempt(multipart)  # checked before the body is spooled, see check_multipart


@blueprint.post("/api/v1/uploads/close")
def close() -> ResponseReturnValue:
    """Close a batch: the series of these uploads are complete and can be analysed."""
    body = request.get_json(silent=True)
    ids = body.get("uploads") if isinstance(body, dict) else None
    if not isinstance(ids, list) or len(ids) > _MAX_BATCH:
        abort(400)
    current_uploads().finaliser.close_series(_outcomes_of(ids))
    return "", 204


def _outcomes_of(ids: list[Any]) -> Iterator[dict[str, Any]]:
    uploads = current_uploads().uploads
    for upload_id in ids:
        upload = uploads.find(upload_id, current_user.account.id) if isinstance(upload_id, str) else None
        yield from (upload and uploads.outcome(upload)) or []
