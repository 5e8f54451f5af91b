"""The public files of the library over HTTP: metadata and targets, with ranges and strong validators.

Names must match a pattern: a segment starts with a letter or a digit, so there is no parent directory, hidden file or listing.
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
CACHE_FOREVER: Final = "public, max-age=31536000, immutable"
# The file that changes under its name: caches revalidate each time, and get 304 while it is unchanged.
REVALIDATE: Final = "no-cache"


@blueprint.get("/metadata/<name>")
def metadata(name: str) -> Response:
    """Return one metadata file."""
    if not _METADATA.match(name):
        abort(404)
    return _send("metadata", name, CACHE_FOREVER if name[0].isdigit() else REVALIDATE)


@blueprint.get("/targets/<path:name>")
def target(name: str) -> Response:
    """Return one target; a name with its digest never changes."""
    if len(name) > _MAX_PATH_CHARS or not _TARGET.match(name):
        abort(404)
    return _send("targets", name, CACHE_FOREVER if _ADDRESSED.match(name.rpartition("/")[2]) else REVALIDATE)


def _send(kind: str, name: str, cache: str) -> Response:
    root: Path = current_app.config["PUBLIC"]
    path = root / kind / name
    try:
        file_status = path.stat()
        inside = path.resolve().is_relative_to(root)  # a link to the outside is not served
    except (OSError, ValueError):
        abort(404)
    if not inside or not stat.S_ISREG(file_status.st_mode):
        abort(404)
    response = send_file(path, _type_of(name), conditional=False, etag=False, max_age=None)
    addressed = _ADDRESSED.match(path.name)
    # Files are replaced by renaming: new content has another inode and time.
    response.set_etag(addressed[1] if addressed else f"{file_status.st_ino:x}-{file_status.st_mtime_ns:x}-{file_status.st_size:x}")
    response.headers.pop("Content-Disposition", None)
    response.headers.pop("Last-Modified", None)  # the entity tag is more exact
    response.headers["Cache-Control"] = cache
    response.make_conditional(request.environ, accept_ranges=True, complete_length=file_status.st_size)
    if response.status_code == HTTPStatus.NOT_MODIFIED:
        response.headers.pop("Content-Type", None)
    return response


def _type_of(name: str) -> str:
    return "application/json" if name.endswith(".json") else "application/octet-stream"
