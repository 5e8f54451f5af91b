"""The server of tus 1.0 (https://tus.io/protocols/resumable-upload): uploads that continue after a broken connection.

Core protocol with the extensions creation, creation-with-upload, expiration and termination. An offset is reported only when the bytes
before it are on the disk. Hand-written because no maintained WSGI server for tus exists; the client in the browser is tus-js-client.
Beyond tus: ``GET /api/v1/tus/<id>/outcome`` returns the result of a complete upload.
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

from webui.context import current_box
from webui.server.problems import problem
from webui.upload.service import current_uploads, display_name, localize_outcome, parse_form, record_refusal
from webui.upload.upload_store import ABANDONED_AFTER_S, BusyError, Upload

blueprint: Final = Blueprint("tus", __name__, url_prefix="/api/v1/tus")

VERSION: Final = "1.0.0"
_EXTENSIONS: Final = "creation,creation-with-upload,expiration,termination"
_BODY_TYPE: Final = "application/offset+octet-stream"
_LONGEST_WAIT_S: Final = 20.0
_MAX_NAME_CHARS: Final = 400
_RETRY_AFTER_S: Final = 3


@blueprint.before_request
def check_version() -> ResponseReturnValue | None:
    """Refuse a client of another version; the answer (412) names the supported one."""
    if request.method in ("OPTIONS", "GET") or request.headers.get("Tus-Resumable") == VERSION:
        return None
    return Response(status=412)


@blueprint.after_request
def add_version(response: Response) -> Response:
    """Add the version to every answer."""
    response.headers["Tus-Resumable"] = VERSION
    if response.status_code in (412, 204) and request.method in ("OPTIONS", "POST", "PATCH", "HEAD"):
        response.headers["Tus-Version"] = VERSION
    return response


@blueprint.route("", methods=["OPTIONS"])
def options() -> ResponseReturnValue:
    """The abilities of this server."""
    settings = current_box().settings
    largest = max(settings.max_upload_bytes, settings.max_archive_bytes)
    return Response(status=204, headers={"Tus-Version": VERSION, "Tus-Extension": _EXTENSIONS, "Tus-Max-Size": str(largest)})


@blueprint.post("")
def create() -> ResponseReturnValue:
    """Create an upload, with its first bytes if the request has them."""
    length, metadata = _number("Upload-Length"), _metadata()
    form = parse_form(_json(metadata["form"])) if metadata.get("form") else None
    if isinstance(form, list):
        return _bad_form(form)
    service = current_uploads()
    name = display_name(metadata.get("filename", ""))[:_MAX_NAME_CHARS]
    with record_refusal(name, length):
        upload = service.uploads.create(current_user.account.id, current_user.account.username, name, length, form)
    offset = _append(upload, 0) if request.mimetype == _BODY_TYPE else 0
    if offset >= length:
        service.finaliser.submit(upload)
    response = Response(status=201, headers=_state(upload, offset))
    response.headers["Location"] = url_for("tus.resume", upload_id=upload.id)
    return response


@blueprint.route("/<upload_id>", methods=["HEAD"])
def status(upload_id: str) -> ResponseReturnValue:
    """The offset of an upload."""
    upload = _find(upload_id)
    return Response(status=200, headers=_state(upload, current_uploads().uploads.offset(upload)))


@blueprint.patch("/<upload_id>")
def resume(upload_id: str) -> ResponseReturnValue:
    """Continue an upload at its offset."""
    upload = _find(upload_id)
    if request.mimetype != _BODY_TYPE:
        abort(415)
    offset = _append(upload, _number("Upload-Offset"))
    if offset >= upload.length:
        current_uploads().finaliser.submit(upload)
    return Response(status=204, headers=_state(upload, offset))


@blueprint.delete("/<upload_id>")
def terminate(upload_id: str) -> ResponseReturnValue:
    """Cancel an upload. A complete one was acknowledged and cannot be cancelled."""
    upload, uploads = _find(upload_id), current_uploads().uploads
    try:
        with uploads.lock(upload):
            if uploads.outcome(upload) is None and uploads.is_complete(upload):
                abort(423)
            uploads.remove(upload)
    except BusyError:
        abort(423)
    return Response(status=204)


@blueprint.get("/<upload_id>/outcome")
def outcome(upload_id: str) -> ResponseReturnValue:
    """The outcome of every file of a complete upload, waited for at most ``?wait=`` seconds; 202 while it is not known."""
    service, upload = current_uploads(), _find(upload_id)
    if not service.uploads.is_complete(upload):
        abort(409)
    service.finaliser.submit(upload)
    asked_s = request.args.get("wait", 0.0, float)
    wait_s = asked_s if 0 <= asked_s <= _LONGEST_WAIT_S else _LONGEST_WAIT_S  # NaN is not within either
    # When all waiting places are taken, the client gets the present answer and asks again.
    can_wait = wait_s > 0 and service.waiters.acquire(blocking=False)
    try:
        outcomes = service.finaliser.wait(upload, wait_s if can_wait else 0)
    finally:
        if can_wait:
            service.waiters.release()
    if outcomes is None:
        return jsonify(done=False, files=service.finaliser.progress(upload)), 202
    return jsonify(done=True, outcomes=[localize_outcome(item) for item in outcomes])


def _append(upload: Upload, offset: int) -> int:
    service = current_uploads()
    if not service.senders.acquire(blocking=False):
        raise ServiceUnavailable(retry_after=_RETRY_AFTER_S)
    try:
        return service.uploads.append(upload, offset, _reader())
    except BusyError:
        abort(423)
    except ValueError:
        abort(409)
    finally:
        service.senders.release()


def _reader() -> Callable[[int], bytes]:
    """A function that reads the body; a client that hangs or closes counts as a broken connection."""
    stream = request.stream

    def read(size: int) -> bytes:
        try:
            return stream.read(size)
        except ClientDisconnected as error:
            raise ConnectionError from error

    return read


def _find(upload_id: str) -> Upload:
    upload = current_uploads().uploads.find(upload_id, current_user.account.id)
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
