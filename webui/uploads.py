"""Getting scans in: the upload page, the single request for scripts, and the end of a batch."""

from __future__ import annotations

import logging
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

from flask import Blueprint, Flask, Request, abort, jsonify, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user
from flask_wtf.csrf import validate_csrf
from wtforms import ValidationError

from appliance.core.domain import Source
from appliance.core.errors import IngestError, StoreError
from webui.box import the_box
from webui.problems import problem
from webui.security import csrf
from webui.texts import RESULTS, reason_hint, reason_text

logger = logging.getLogger(__name__)
blueprint: Final = Blueprint("uploads", __name__)

VIEWS: Final = ("PA", "AP", "LL")
_AGE_UNITS: Final = {"years": "Y", "months": "M", "days": "D"}
_NAME: Final = re.compile(r"[^\\=]{0,64}")  # a backslash parts values, an equals sign parts groups of a name (PS3.5 6.2)
_MAX_BATCH: Final = 20_000
_SHOWN_WAITING: Final = 50


def init_app(app: Flask) -> None:
    """Have multipart bodies spooled inside the data directory: a scan never lies in the system's /tmp."""
    directory = app.extensions["box"].parts.directory

    @app.before_request
    def check() -> None:
        if request.endpoint == "uploads.multipart":
            check_before_spooling()

    class BoxRequest(Request):
        """A request whose uploaded files are written where the box keeps its scans."""

        def _get_file_stream(
            self, total_content_length: int | None, content_type: str | None, filename: str | None = None, content_length: int | None = None
        ) -> IO[bytes]:
            del total_content_length, content_type, filename, content_length
            return tempfile.NamedTemporaryFile(dir=directory, prefix="multipart-")

    app.request_class = BoxRequest


@blueprint.get("/upload")
def page() -> ResponseReturnValue:
    """Where a person drops scans."""
    box, owner = the_box(), current_user.account.id
    stand = [(upload, box.parts.offset(upload)) for upload in box.parts.unfinished(owner)]
    waiting = [(upload, offset) for upload, offset in reversed(stand) if offset < upload.length]
    return render_template("upload.html", waiting=waiting[:_SHOWN_WAITING], more=len(waiting[_SHOWN_WAITING:]), settings=box.settings)


def check_before_spooling() -> None:
    """Refuse a multipart request by its head, before a byte of its body is written: no token, no length, too large, no room.

    The CSRF token must stand in the header ``X-CSRFToken``, since a form's field is known only when the form is on the disk.
    """
    try:
        validate_csrf(request.headers.get("X-CSRFToken"))
    except ValidationError:
        abort(400)
    if request.content_length is None:
        abort(411)
    box, length = the_box(), request.content_length
    with refusal_recorded("multipart", length):
        if length > box.settings.max_archive_bytes:
            raise IngestError("ingest.too_large", f"{length >> 20} MiB")
        box.store.check_space(length)


@contextmanager
def refusal_recorded(name: str, size: int) -> Iterator[None]:
    """Write a refusal before the door to the list of refused files, as the door writes its own, and let it go on."""
    try:
        yield
    except (IngestError, StoreError) as refusal:
        try:
            the_box().store.add_rejection(Source("upload", current_user.account.username, name), size, refusal.code, refusal.detail)
        except StoreError:  # the disk has no room for that either; the sender is told all the same
            logger.exception("refusal not recorded")
        raise


@blueprint.post("/api/v1/uploads")
def multipart() -> ResponseReturnValue:
    """For scripts: any number of files (field ``file``) and the patient form's fields in one request; returns every outcome."""
    files = request.files.getlist("file")
    if not files:
        abort(400)
    form = form_of(request.form.to_dict()) if any(request.form.get(name) for name in ("patient_id", "patient_name", "view")) else None
    if isinstance(form, list):
        return problem(422, "web.form", "The patient form is not complete", ", ".join(form))
    box, outcomes = the_box(), []
    with ExitStack() as stack:
        for file in files:
            stack.callback(file.close)
            file.stream.flush()
            name = name_of(file.filename or "")
            source = Source("upload", current_user.account.username, name)
            outcomes += box.finaliser.accept(Path(getattr(file.stream, "name")), name, source, form)  # noqa: B009 - IO has no name
    box.finaliser.close_series(outcomes)
    return jsonify(outcomes=[described(item) for item in outcomes])


csrf.exempt(multipart)  # checked before the body is spooled, see check_before_spooling


@blueprint.post("/api/v1/uploads/close")
def close() -> ResponseReturnValue:
    """The end of a batch: what these uploads brought is complete and can be read."""
    told = request.get_json(silent=True)
    ids = told.get("uploads") if isinstance(told, dict) else None
    if not isinstance(ids, list) or len(ids) > _MAX_BATCH:
        abort(400)
    box = the_box()
    box.finaliser.close_series(_outcomes_of(ids))
    return "", 204


def _outcomes_of(ids: list[Any]) -> Iterator[dict[str, Any]]:
    parts = the_box().parts
    for upload_id in ids:
        upload = parts.find(upload_id, current_user.account.id) if isinstance(upload_id, str) else None
        yield from (upload and parts.outcome(upload)) or []


def described(outcome: dict[str, Any]) -> dict[str, Any]:
    """One outcome in the words of this request's language, with the way to its study."""
    code, study = outcome["code"], outcome["study_id"]
    return outcome | {
        "word": str(RESULTS[outcome["result"]]),
        "reason": reason_text(code) if code else "",
        "hint": reason_hint(code) if code else "",
        "url": url_for("pages.study", study_id=study) if study else "",
    }


def name_of(filename: str) -> str:
    """The name a person knows a file by, its folders included; only ever shown, never used as a path."""
    name = "".join(char for char in filename if char.isprintable()).strip()
    return name or f"file-{secrets.token_hex(3)}"


def form_of(fields: Any) -> dict[str, Any] | list[str]:
    """The patient form of a picture as ``PictureForm`` takes it, or the names of the fields that are wrong.

    A name or an ID is required (pictures of two nameless patients must not become one), and a view, since nothing in a picture
    tells it.
    """
    if not isinstance(fields, dict):
        return ["patient_name"]
    text = {key: "".join(char for char in str(value) if char.isprintable()).strip() for key, value in fields.items()}
    wrong = [key for key in ("patient_id", "patient_name") if not _NAME.fullmatch(text.get(key, ""))]
    if not text.get("patient_id") and not text.get("patient_name"):
        wrong.append("patient_name")
    sex, view, age = text.get("patient_sex", ""), text.get("view", ""), _age(text)
    checks = {"patient_sex": sex in ("", "M", "F", "O"), "view": view in VIEWS, "age": age is not None}
    wrong += [key for key, fits in checks.items() if not fits]
    if wrong:
        return wrong
    return {
        "patient_id": text.get("patient_id", ""),
        "patient_name": text.get("patient_name", ""),
        "patient_sex": sex,
        "patient_age": age,
        "view": view,
        "photographed": text.get("photographed", "") in ("1", "true", "True", "on"),
    }


def _age(text: dict[str, str]) -> str | None:
    """A DICOM age (VR AS) from number and unit; empty when not given, None when it is no age."""
    number, unit = text.get("age", ""), _AGE_UNITS.get(text.get("age_unit", "years"))
    if not number:
        return ""
    if unit is None or not re.fullmatch(r"\d{1,3}", number) or (unit == "Y" and int(number) > 130):
        return None
    return f"{int(number):03d}{unit}"
