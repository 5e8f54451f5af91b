"""What a client gets when a request fails: RFC 9457 problem+json for programs, a page for people.

An answer holds a code, its text and a hint in the person's language, never the text of an exception (R25).
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from flask import Flask, Response, g, jsonify, render_template, request
from flask_babel import gettext, lazy_gettext
from flask_login import current_user
from flask_wtf.csrf import CSRFError
from werkzeug.exceptions import HTTPException, InternalServerError

from appliance.core.errors import ApplianceError, IngestError, PixelError, StoreError
from appliance.store.audit import NODE_AUTHENTICATION, USE_OF_RESTRICTED_FUNCTION
from webui.context import current_box
from webui.messages import reason_hint, reason_text
from webui.server.bearer import has_bearer

logger = logging.getLogger(__name__)

STATUS_OF_CODE: Final[dict[str, int]] = {
    "ingest.too_large": 413,
    "ingest.too_many_files": 413,
    "ingest.archive_bomb": 413,
    "ingest.disk_full": 507,
    "store.missing": 404,
    "model.unknown": 404,
    "account.unknown": 404,
    "account.not_allowed": 403,
    "account.token_unknown": 404,
    "emergency.running": 409,
    "box.busy": 503,
}
_STATUS_OF_CLASS: Final[tuple[tuple[type[ApplianceError], int], ...]] = ((PixelError, 422), (IngestError, 422), (StoreError, 500))

_PAGES: Final[dict[int, tuple[Any, Any]]] = {
    400: (
        lazy_gettext("This request is not valid"),
        lazy_gettext("The page was probably open too long. Go back, reload it and try again; nothing was changed."),
    ),
    401: (lazy_gettext("You are logged out"), lazy_gettext("Log in again.")),
    403: (
        lazy_gettext("You may not see this page"),
        lazy_gettext("Your account has no right to it. Ask the administrator of this box."),
    ),
    404: (
        lazy_gettext("There is no such page"),
        lazy_gettext("The address is wrong, or the record is not on this box. Go back to your first page."),
    ),
    405: (lazy_gettext("This request is not valid"), lazy_gettext("Go back, reload the page and try again; nothing was changed.")),
    413: (lazy_gettext("Too large"), lazy_gettext("Nothing was kept. Upload fewer or smaller files at once.")),
    429: (lazy_gettext("Too many requests at once"), lazy_gettext("Wait a moment, then try again.")),
    500: (
        lazy_gettext("The box made an error"),
        lazy_gettext("What was stored is safe. Try again; if it happens again, call the technician."),
    ),
    503: (lazy_gettext("The box is busy"), lazy_gettext("Wait a moment, then try again.")),
    507: (lazy_gettext("The disk is full"), lazy_gettext("Nothing was kept and nothing deleted. Ask the technician to free disk space.")),
}


def init_app(app: Flask) -> None:
    """Register the error handlers, the one for unexpected exceptions included."""
    app.register_error_handler(ApplianceError, _appliance_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(500, _http_error)


def wants_json() -> bool:
    """Whether the client is a program: everything below ``/api/``, scripts that accept JSON, and whoever presents an API token."""
    return has_bearer() or request.path.startswith("/api/") or request.accept_mimetypes.best == "application/json"


def status_of(error: ApplianceError) -> int:
    """The HTTP status for an error of the box."""
    if error.code in STATUS_OF_CODE:
        return STATUS_OF_CODE[error.code]
    return next((status for kind, status in _STATUS_OF_CLASS if isinstance(error, kind)), 500)


def problem(status: int, code: str, title: str, hint: str) -> Response:
    """An ``application/problem+json`` answer (RFC 9457); ``detail`` says what to do, ``code`` is for programs."""
    answer = jsonify({"type": "about:blank", "status": status, "title": title, "detail": hint, "code": code})
    answer.status_code = status
    answer.content_type = "application/problem+json"
    return answer


def _answer(status: int, code: str, title: str, hint: str) -> Response:
    if wants_json():
        return problem(status, code, title, hint)
    page = render_template("error.html", status=status, title=title, hint=hint)
    return Response(page, status, content_type="text/html; charset=utf-8")


def _appliance_error(error: ApplianceError) -> Response:
    status = status_of(error)
    if status >= 500:
        logger.error("request failed", extra={"code": error.code, "status": status})
    return _answer(status, error.code, reason_text(error.code), reason_hint(error.code))


def _record_refusal(error: HTTPException) -> None:
    """Write to the audit that somebody was refused (requirement R9): by role, by the CSRF token, or by the name of the host."""
    code = "web.csrf" if isinstance(error, CSRFError) else "web.forbidden" if error.code == 403 else g.get("refused", "")
    if not code:
        return
    is_logged_in = code != "web.host" and current_user.is_authenticated
    account, peer = current_user.account.username if is_logged_in else "", request.remote_addr or ""
    kind = NODE_AUTHENTICATION if code == "web.host" else USE_OF_RESTRICTED_FUNCTION
    current_box().store.refusals.record(account, peer, code, endpoint=request.endpoint or "", method=request.method[:16], **kind)


def _http_error(error: HTTPException) -> Response:
    _record_refusal(error)
    if isinstance(error, InternalServerError):
        # The traceback is logged without values: an exception's text may quote a patient's name.
        logger.error("request crashed", exc_info=error.original_exception or error, extra={"status": 500})
    status = error.code or 500
    title, hint = _PAGES.get(status, _PAGES[400] if status < 500 else _PAGES[500])
    answer = _answer(status, _code_name(status), str(title), str(hint))
    for name, value in error.get_headers():  # Allow, Retry-After
        if name.lower() not in ("content-type", "content-length"):
            answer.headers[name] = value
    return answer


def _code_name(status: int) -> str:
    return f"web.{HTTPStatus(status).name.lower()}"


def login_incomplete(code: str) -> Response:
    """What a program gets until the person has completed the login; ``code`` says what is outstanding."""
    return problem(403, code, gettext("The login is not complete"), gettext("Open the page and log in."))


def confirmation_required() -> Response:
    """What a program gets where the password must be typed again."""
    return problem(403, "web.confirmation_required", gettext("Confirm that it is you"), gettext("Open the page and log in."))


def token_refused() -> Response:
    """What a program gets whose API token is wrong, has expired or was revoked: the same for all of them."""
    hint = gettext("It is wrong, has expired or was revoked. The security administrator of this box makes a new one.")
    answer = problem(401, "web.token", gettext("This token is not valid"), hint)
    answer.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    return answer


def scope_refused() -> Response:
    """What a program gets whose API token is valid, but not for this."""
    hint = gettext("Its scopes do not name this address. The security administrator of this box makes one with another scope.")
    answer = problem(403, "web.token_scope", gettext("This token is not for that"), hint)
    answer.headers["WWW-Authenticate"] = 'Bearer error="insufficient_scope"'
    return answer
