"""The API for boxes: enrolment by token, renewal and reports by client certificate.

The certificate is that of the TLS connection. Behind a proxy that ends TLS it comes from a header of the proxy, which is used only
when the server was started with ``--behind-proxy`` and listens on loopback.
"""

from __future__ import annotations

import ssl
import threading
import time
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Blueprint, Response, abort, current_app, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_sync.agent.report import MAX_REPORT_BYTES, ReportError, load_json, verify
from model_sync.fleet.database import Fleet
from model_sync.fleet.enrolment import MAX_CSR_BYTES, Enrolment, EnrolmentError
from model_sync.fleet.problems import problem
from model_sync.fleet.rollout_pause_policy import RolloutPausePolicy

blueprint: Final = Blueprint("api", __name__, url_prefix="/api/v1")
PROXY_CERTIFICATE: Final = "X-Client-Certificate"
_MAX_PEM_CHARS: Final = 8 << 10
_MAX_ADDRESSES: Final = 50_000
_Body = TypeVar("_Body", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RateLimiter:
    """A token bucket per client address: ``burst`` tokens, refilled by ``per_minute``; in memory, for a limited number of addresses."""

    def __init__(self, per_minute: float, burst: int) -> None:
        self._per_s, self._burst = per_minute / 60, burst
        self._left: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allow(self, who: str) -> bool:
        """Take one token of ``who``; return False when there is none."""
        now = time.monotonic()
        with self._lock:
            left, at = self._left.pop(who, (float(self._burst), now))
            left = min(self._burst, left + (now - at) * self._per_s)
            self._left[who] = (left - 1 if left >= 1 else left, now)
            while len(self._left) > _MAX_ADDRESSES:
                del self._left[next(iter(self._left))]
        return left >= 1


class EnrolRequest(_Strict):
    """``POST /api/v1/enrol``."""

    token: Annotated[str, Field(min_length=20, max_length=128)]
    csr_pem: Annotated[str, Field(max_length=MAX_CSR_BYTES)]


class RenewRequest(_Strict):
    """``POST /api/v1/renew``."""

    csr_pem: Annotated[str, Field(max_length=MAX_CSR_BYTES)]


@blueprint.before_request
def _limit() -> Response | None:
    """Limit body size, content type and request rate before the body is read."""
    request.max_content_length = _most_bytes() + 1  # a body without a length is cut there: the extra byte shows that it is too long
    if request.method == "POST" and request.mimetype != "application/json":
        abort(415)
    limiter: RateLimiter = current_app.extensions["rate_limiters"]["reports" if request.endpoint == "api.reports" else "enrolments"]
    if not limiter.allow(client_address()):
        answer = problem(429, "http.too_many_requests", "Too many requests from this address; wait a minute.")
        answer.headers["Retry-After"] = "60"
        return answer
    return None


@blueprint.post("/enrol")
def enrol() -> Response:
    """Issue a certificate for a token."""
    body = _body(EnrolRequest)
    certificate, box_id = _enrolment().enrol(body.token, body.csr_pem)
    return _certificate(certificate, box_id)


@blueprint.post("/renew")
def renew() -> Response:
    """Issue a new certificate for a valid one."""
    shown = client_certificate()
    _enrolment().identify(shown)
    certificate, box_id = _enrolment().renew(shown or b"", _body(RenewRequest).csr_pem)
    return _certificate(certificate, box_id)


@blueprint.post("/reports")
def reports() -> Response:
    """Store a box's report, and schedule the check of the failure budget."""
    box = _enrolment().identify(client_certificate())
    report = verify(_raw(), box.key)
    if report.box_id != box.box_id:
        raise ReportError("report.signature", "the report is of another box than its certificate")
    fleet: Fleet = current_app.extensions["fleet"]
    pause_policy: RolloutPausePolicy = current_app.extensions["pause_policy"]
    fleet.store_report(report, per_hour=current_app.config["REPORTS_PER_HOUR"])
    pause_policy.schedule_check(box.ring)
    return Response(status=204)


def client_certificate() -> bytes | None:
    """Return the client certificate in DER, or None; TLS has verified that the client has its key."""
    connection = request.environ.get("gunicorn.socket")
    if isinstance(connection, ssl.SSLSocket):
        return connection.getpeercert(binary_form=True)
    header = request.headers.get(PROXY_CERTIFICATE, "") if current_app.config["BEHIND_PROXY"] else ""
    if not header:
        return None
    try:
        if len(header) > _MAX_PEM_CHARS:
            raise ValueError("too long")
        return x509.load_pem_x509_certificate(unquote(header).encode("ascii")).public_bytes(Encoding.DER)
    except ValueError as error:
        raise EnrolmentError("enrolment.certificate", "the device certificate cannot be read") from error


def client_address() -> str:
    """Return the client's address; behind a proxy, the last one of X-Forwarded-For."""
    if current_app.config["BEHIND_PROXY"] and (trusted := request.headers.get("X-Forwarded-For", "")):
        return trusted.rpartition(",")[2].strip()[:64]
    return request.remote_addr or ""


def _most_bytes() -> int:
    return MAX_REPORT_BYTES if request.endpoint == "api.reports" else 2 * MAX_CSR_BYTES


def _raw() -> bytes:
    raw = request.get_data(cache=False)
    if len(raw) > _most_bytes():
        abort(413)
    return raw


def _body(kind: type[_Body]) -> _Body:
    raw: Any = load_json(_raw(), _most_bytes())
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ReportError("report.invalid", "the request does not fit its schema") from error


def _certificate(pem: str, box_id: str) -> Response:
    return jsonify({"certificate_pem": pem, "ca_pem": _enrolment().authority.pem, "box_id": box_id})


def _enrolment() -> Enrolment:
    enrolment: Enrolment = current_app.extensions["enrolment"]
    return enrolment
