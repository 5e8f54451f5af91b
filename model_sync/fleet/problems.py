"""Responses for errors: RFC 9457 problem+json for boxes, an HTML page for operators.

A response holds a code and a hint, never details of an exception (R25); the fallback is a plain 500.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from flask import Flask, Response, jsonify, render_template, request
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import CSRFError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.routing import RequestRedirect

from model_sync.agent.report import ReportError
from model_sync.fleet.database import RateError, SequenceError
from model_sync.fleet.enrolment import EnrolmentError

logger = logging.getLogger(__name__)
STATUS_OF_CODE: Final = {
    "enrolment.token": 403, "enrolment.csr": 422, "enrolment.denied": 403, "enrolment.certificate": 401,
    "enrolment.expired": 401, "enrolment.too_early": 409, "report.invalid": 422, "report.signature": 403,
}  # fmt: skip
_DETAILS: Final = {
    400: "The request is not valid. Nothing was changed.",
    401: "Log in first.",
    403: "This is not allowed.",
    404: "This address does not exist.",
    405: "This address does not support the method.",
    413: "The body is too large. Nothing was stored.",
    415: "Send application/json.",
    416: "The file has no such range.",
    422: "The request does not fit its schema. Nothing was stored.",
    429: "Too many requests. Wait, then try again.",
    503: "The server is busy or cannot reach its database. Nothing was stored; try again later.",
}
_RETRY_S: Final = 60


def init_app(app: Flask) -> None:
    """Register the error handlers, including the fallback, and the headers of every response."""
    app.register_error_handler(EnrolmentError, _refused)
    app.register_error_handler(ReportError, _refused)
    app.register_error_handler(SequenceError, _sequence)
    app.register_error_handler(RateError, _rate)
    app.register_error_handler(SQLAlchemyError, _database)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(500, _http)
    app.after_request(_headers)


def problem(status: int, code: str, detail: str, **more: Any) -> Response:
    """Return an ``application/problem+json`` response; ``code`` is for programs, ``detail`` for people."""
    title = HTTPStatus(status).phrase
    answer = jsonify({"type": "about:blank", "status": status, "title": title, "detail": detail, "code": code} | more)
    answer.status_code = status
    answer.content_type = "application/problem+json"
    answer.headers["Cache-Control"] = "no-store"
    return answer


def _refused(error: EnrolmentError | ReportError) -> Response:
    status = STATUS_OF_CODE[error.code]
    logger.info("request refused: %s", error.code)
    return problem(status, error.code, f"{error.message}; {error.hint}")


def _sequence(error: SequenceError) -> Response:
    return problem(409, "report.sequence", f"{error.message}; {error.hint}", expected=error.expected)


def _rate(error: RateError) -> Response:
    answer = problem(429, "report.rate", f"{error.message}; {error.hint}")
    answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer


def _database(error: SQLAlchemyError) -> Response:
    # Only the type is logged: the statement contains reported values.
    logger.error("the fleet database failed: %s", type(error).__name__)
    answer = problem(503, "server.database", _DETAILS[503])
    answer.headers["Retry-After"] = str(_RETRY_S)
    return answer


def _http(error: HTTPException) -> ResponseReturnValue:
    status = error.code or 500
    if isinstance(error, InternalServerError):
        cause = error.original_exception or error
        trace = cause.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace else "?"
        logger.error("request crashed: %s in %s", type(cause).__name__, where)
    if isinstance(error, CSRFError):
        status = 400
    if isinstance(error, RequestRedirect):
        return error.get_response()
    if request.path.startswith("/fleet") and request.accept_mimetypes.accept_html:
        return Response(render_template("error.html", status=status), status, content_type="text/html; charset=utf-8")
    answer = problem(status, f"http.{HTTPStatus(status).name.lower()}", _DETAILS.get(status, "The server made an error. Try again later."))
    for name, value in error.get_headers():  # Allow, Content-Range, Retry-After
        if name.lower() not in ("content-type", "content-length"):
            answer.headers[name] = value
    return answer


def _headers(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    if request.blueprint == "files":  # polls of very many boxes: no unnecessary bytes
        return response
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Frame-Options"] = "DENY"
    sources = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:"
    policy = f"{sources}; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    response.headers["Content-Security-Policy"] = policy
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if request.is_secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    return response
