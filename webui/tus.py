"""The server's side of tus 1.0 (https://tus.io/protocols/resumable-upload): uploads that go on after a broken line.

Core protocol with the extensions creation, creation-with-upload, expiration and termination. An offset is told only when the bytes
before it are on the disk. Written here because no maintained WSGI server for tus exists; the browser's side is tus-js-client.
Beyond tus: ``GET /api/v1/tus/<id>/outcome`` says what became of a complete upload, as often as it is asked.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final

from flask import Blueprint, Response, abort, jsonify, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user
from werkzeug.exceptions import ClientDisconnected, ServiceUnavailable

from webui.box import the_box
from webui.parts import ABANDONED_AFTER_S, BusyError, Upload
from webui.problems import problem
from webui.uploads import described, form_of, name_of, refusal_recorded

blueprint: Final = Blueprint("tus", __name__, url_prefix="/api/v1/tus")

VERSION: Final = "1.0.0"
_EXTENSIONS: Final = "creation,creation-with-upload,expiration,termination"
_BODY_TYPE: Final = "application/offset+octet-stream"
_LONGEST_WAIT_S: Final = 20.0
_MAX_NAME_CHARS: Final = 400
# A line silent for so long is broken; the browser, which notices later, finds the upload free to go on.
_SILENCE_S: Final = 20.0
_SENDERS_RETRY_S: Final = 3


@blueprint.before_request
def check_version() -> ResponseReturnValue | None:
    """A client of another version is told which one is spoken here (412)."""
    if request.method in ("OPTIONS", "GET") or request.headers.get("Tus-Resumable") == VERSION:
        return None
    return Response(status=412)


@blueprint.after_request
def add_version(response: Response) -> Response:
    """Every answer names the version."""
    response.headers["Tus-Resumable"] = VERSION
    if response.status_code in (412, 204) and request.method in ("OPTIONS", "POST", "PATCH", "HEAD"):
        response.headers["Tus-Version"] = VERSION
    return response


@blueprint.route("", methods=["OPTIONS"])
def options() -> ResponseReturnValue:
    """What this server can do."""
    settings = the_box().settings
    largest = max(settings.max_upload_bytes, settings.max_archive_bytes)
    return Response(status=204, headers={"Tus-Version": VERSION, "Tus-Extension": _EXTENSIONS, "Tus-Max-Size": str(largest)})


@blueprint.post("")
def create() -> ResponseReturnValue:
    """Begin an upload, with its first bytes where they are sent along."""
    length, metadata = _number("Upload-Length"), _metadata()
    form = form_of(_json(metadata["form"])) if metadata.get("form") else None
    if isinstance(form, list):
        return _bad_form(form)
    box = the_box()
    name = name_of(metadata.get("filename", ""))[:_MAX_NAME_CHARS]
    with refusal_recorded(name, length):
        upload = box.parts.create(current_user.account.id, current_user.account.username, name, length, form)
    offset = _append(upload, 0) if request.mimetype == _BODY_TYPE else 0
    if offset >= length:
        box.finaliser.submit(upload)
    response = Response(status=201, headers=_state(upload, offset))
    response.headers["Location"] = url_for("tus.resume", upload_id=upload.id)
    return response


@blueprint.route("/<upload_id>", methods=["HEAD"])
def status(upload_id: str) -> ResponseReturnValue:
    """Where an upload stands."""
    upload = _find(upload_id)
    return Response(status=200, headers=_state(upload, the_box().parts.offset(upload)))


@blueprint.patch("/<upload_id>")
def resume(upload_id: str) -> ResponseReturnValue:
    """Go on with an upload from where it stands."""
    upload = _find(upload_id)
    if request.mimetype != _BODY_TYPE:
        abort(415)
    offset = _append(upload, _number("Upload-Offset"))
    if offset >= upload.length:
        the_box().finaliser.submit(upload)
    return Response(status=204, headers=_state(upload, offset))


@blueprint.delete("/<upload_id>")
def terminate(upload_id: str) -> ResponseReturnValue:
    """Call an upload off. One that is complete was acknowledged and cannot be called off any more."""
    upload, parts = _find(upload_id), the_box().parts
    try:
        with parts.exclusive(upload):
            if parts.outcome(upload) is None and parts.complete(upload):
                abort(423)
            parts.remove(upload)
    except BusyError:
        abort(423)
    return Response(status=204)


@blueprint.get("/<upload_id>/outcome")
def outcome(upload_id: str) -> ResponseReturnValue:
    """What became of every file of a complete upload; 202 while that is being found out (``?wait=`` seconds at most)."""
    box, upload = the_box(), _find(upload_id)
    if not box.parts.complete(upload):
        abort(409)
    box.finaliser.submit(upload)
    asked_s = request.args.get("wait", 0.0, float)
    wait_s = asked_s if 0 <= asked_s <= _LONGEST_WAIT_S else _LONGEST_WAIT_S  # NaN is not within either
    # Beyond the bound nobody waits here: they get the answer of this moment and ask again.
    waits = wait_s > 0 and box.waiters.acquire(blocking=False)
    try:
        outcomes = box.finaliser.wait(upload, wait_s if waits else 0)
    finally:
        if waits:
            box.waiters.release()
    if outcomes is None:
        return jsonify(done=False, files=box.finaliser.progress(upload)), 202
    return jsonify(done=True, outcomes=[described(item) for item in outcomes])


def _append(upload: Upload, offset: int) -> int:
    box = the_box()
    if not box.senders.acquire(blocking=False):
        raise ServiceUnavailable(retry_after=_SENDERS_RETRY_S)
    try:
        return box.parts.append(upload, offset, _reader())
    except BusyError:
        abort(423)
    except ValueError:
        abort(409)
    finally:
        box.senders.release()


def _reader() -> Callable[[int], bytes]:
    """Read the body; a client that hangs or vanishes is a broken line, what it brought is kept."""
    stream, connection = request.stream, request.environ.get("gunicorn.socket")
    if connection is not None:
        connection.settimeout(_SILENCE_S)

    def read(size: int) -> bytes:
        try:
            return stream.read(size)
        except ClientDisconnected as error:
            raise ConnectionError from error

    return read


def _find(upload_id: str) -> Upload:
    upload = the_box().parts.find(upload_id, current_user.account.id)
    if upload is None:
        abort(404)
    return upload


def _state(upload: Upload, offset: int) -> dict[str, str]:
    expires = formatdate(upload.created_at + ABANDONED_AFTER_S, usegmt=True)
    return {"Upload-Offset": str(offset), "Upload-Length": str(upload.length), "Upload-Expires": expires}


def _number(header: str) -> int:
    value = request.headers.get(header, "")
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        abort(400)
    return int(value)


def _metadata() -> dict[str, str]:
    """``Upload-Metadata``: comma-separated keys with base64 values."""
    values = {}
    for item in filter(None, (part.strip() for part in request.headers.get("Upload-Metadata", "").split(","))):
        key, _, encoded = item.partition(" ")
        try:
            values[key] = base64.b64decode(encoded, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            abort(400)
    return values


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        abort(400)


def _bad_form(fields: list[str]) -> Response:
    response = problem(422, "web.form", gettext("The patient form is not complete"), gettext("Correct the marked fields."))
    body: dict[str, Any] = response.get_json() | {"fields": fields}
    response.set_data(json.dumps(body, ensure_ascii=False))
    return response
