"""The library's plain files over HTTP: metadata and targets, with ranges and strong validators, and nothing else of the disk.

Names are matched, not cleaned: a segment starts with a letter or a digit, so there is no way up, no hidden file and no listing.
"""

from __future__ import annotations

import re
import stat
from http import HTTPStatus
from pathlib import Path
from typing import Final

from flask import Blueprint, Response, abort, current_app, request, send_file

blueprint: Final = Blueprint("files", __name__)
_METADATA: Final = re.compile(r"^(?:[1-9]\d*\.)?[A-Za-z0-9][A-Za-z0-9_-]*\.json$")
_TARGET: Final = re.compile(r"^(?:[A-Za-z0-9][A-Za-z0-9._-]*/)*[A-Za-z0-9][A-Za-z0-9._-]*$")
_ADDRESSED: Final = re.compile(r"^([0-9a-f]{64})\.")
_MAX_PATH_CHARS: Final = 400
FOR_EVER: Final = "public, max-age=31536000, immutable"
# The one file that changes under its name: caches ask again each time, and get 304 while it is the same.
ASK_AGAIN: Final = "no-cache"


@blueprint.get("/metadata/<name>")
def metadata(name: str) -> Response:
    """One metadata file."""
    if not _METADATA.match(name):
        abort(404)
    return _send("metadata", name, FOR_EVER if name[0].isdigit() else ASK_AGAIN)


@blueprint.get("/targets/<path:name>")
def target(name: str) -> Response:
    """One target; its name holds its digest, so that it never changes."""
    if len(name) > _MAX_PATH_CHARS or not _TARGET.match(name):
        abort(404)
    return _send("targets", name, FOR_EVER if _ADDRESSED.match(name.rpartition("/")[2]) else ASK_AGAIN)


def _send(kind: str, name: str, cache: str) -> Response:
    root: Path = current_app.config["PUBLIC"]
    path = root / kind / name
    try:
        facts = path.stat()
        inside = path.resolve().is_relative_to(root)  # a link that leads out is not served
    except (OSError, ValueError):
        abort(404)
    if not inside or not stat.S_ISREG(facts.st_mode):
        abort(404)
    response = send_file(path, _type_of(name), conditional=False, etag=False, max_age=None)
    addressed = _ADDRESSED.match(path.name)
    # Files are replaced by renaming: another content is another inode and time.
    response.set_etag(addressed[1] if addressed else f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}")
    response.headers.pop("Content-Disposition", None)
    response.headers.pop("Last-Modified", None)  # the entity tag says more
    response.headers["Cache-Control"] = cache
    response.make_conditional(request.environ, accept_ranges=True, complete_length=facts.st_size)
    if response.status_code == HTTPStatus.NOT_MODIFIED:
        response.headers.pop("Content-Type", None)
    return response


def _type_of(name: str) -> str:
    return "application/json" if name.endswith(".json") else "application/octet-stream"
