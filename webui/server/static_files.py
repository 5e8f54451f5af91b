"""Scripts, style sheets and icons: compressed when they are built, and kept by the browser while their address stays the same."""

from __future__ import annotations

import functools
import hashlib
import mimetypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flask import request, send_from_directory, url_for
from flask.sessions import SecureCookieSessionInterface

if TYPE_CHECKING:
    from flask import Flask, Response
    from flask.sessions import SessionMixin

_VERSION_CHARS: Final = 12
# What the build names by its content.
_HASHED: Final = re.compile(r"-[\w-]{8}\.js$")


class _Sessions(SecureCookieSessionInterface):
    """Flask's sessions without ``Vary: Cookie`` on static files: no cached copy would outlive a new cookie."""

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Write the cookie as usual."""
        super().save_session(app, session, response)
        if request.endpoint == "static":
            response.headers["Vary"] = "Accept-Encoding"


def init_app(app: Flask) -> None:
    """Serve the files below ``static``, and give templates ``asset(name)``: the address of a file, which changes with its content."""
    static = Path(app.static_folder or "")

    def asset(name: str) -> str:
        return url_for("static", filename=name, v=_version(static / name))

    def serve(filename: str) -> Response:
        """A file; its compressed form where the browser accepts it and the build has made one."""
        is_compressed = request.accept_encodings.quality("gzip") > 0 and (static / f"{filename}.gz").is_file()
        kind = mimetypes.guess_type(filename)[0] or "application/octet-stream"
        response = send_from_directory(static, f"{filename}.gz" if is_compressed else filename, mimetype=kind)
        if is_compressed:
            response.headers["Content-Encoding"] = "gzip"
        is_versioned = _HASHED.search(filename) or request.args.get("v") == _version(static / filename)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if is_versioned else "no-cache"
        return response

    app.view_functions["static"] = serve
    app.session_interface = _Sessions()
    app.jinja_env.globals.update(asset=asset)


def versioned_addresses(static: Path) -> Iterator[str]:
    """Every file's address with its version behind ``?``, under which a browser may keep it; nginx answers with these rules too."""
    for path in sorted(path for path in static.rglob("*") if path.is_file() and path.suffix != ".gz"):
        name = path.relative_to(static).as_posix()
        yield f"/static/{name}?{_version(path)}"
        if _HASHED.search(name):
            yield f"/static/{name}?"


def _version(path: Path) -> str:
    """A part of the file's digest; empty where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return _digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, _modified_ns: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:_VERSION_CHARS]
