"""What boxes ask of the server: enrolment by token, renewal and reports by client certificate.

The certificate is the TLS connection's own. Behind a proxy that ends TLS it is the one the proxy vouches for in a header, which is
believed only when the server was told so and listens on this machine alone.
"""

from __future__ import annotations

import ssl
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Blueprint, Response, abort, current_app, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_sync.agent.report import MAX_REPORT_BYTES, ReportError, load_json, verify
from model_sync.fleet.database import Fleet
from model_sync.fleet.enrolment import MAX_CSR_BYTES, Enrolment, EnrolmentError
from model_sync.fleet.limits import Allowance
from model_sync.fleet.problems import problem
from model_sync.fleet.rollout_pause_policy import Brake

blueprint: Final = Blueprint("api", __name__, url_prefix="/api/v1")
PROXY_CERTIFICATE: Final = "X-Client-Certificate"
_MAX_PEM_CHARS: Final = 8 << 10
_Body = TypeVar("_Body", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EnrolRequest(_Strict):
    """``POST /api/v1/enrol``."""

    token: Annotated[str, Field(min_length=20, max_length=128)]
    csr_pem: Annotated[str, Field(max_length=MAX_CSR_BYTES)]


class RenewRequest(_Strict):
    """``POST /api/v1/renew``."""

    csr_pem: Annotated[str, Field(max_length=MAX_CSR_BYTES)]


@blueprint.before_request
def _limit() -> Response | None:
    """Bound the body, the type and how often one address may ask, before anything is read."""
    request.max_content_length = _most_bytes() + 1  # a body without a length is cut there: one byte more tells it apart
    if request.method == "POST" and request.mimetype != "application/json":
        abort(415)
    allowance: Allowance = current_app.extensions["allowances"]["reports" if request.endpoint == "api.reports" else "enrolments"]
    if not allowance.take(address()):
        answer = problem(429, "http.too_many_requests", "Too many requests from this address; wait a minute.")
        answer.headers["Retry-After"] = "60"
        return answer
    return None


@blueprint.post("/enrol")
def enrol() -> Response:
    """Trade a token for a certificate."""
    body = _body(EnrolRequest)
    certificate, box_id = _enrolment().enrol(body.token, body.csr_pem)
    return _certificate(certificate, box_id)


@blueprint.post("/renew")
def renew() -> Response:
    """Trade a certificate for a younger one."""
    shown = client_certificate()
    _enrolment().identify(shown)
    certificate, box_id = _enrolment().renew(shown or b"", _body(RenewRequest).csr_pem)
    return _certificate(certificate, box_id)


@blueprint.post("/reports")
def reports() -> Response:
    """Keep a box's newest report; whether a rollout has cost too many boxes is seen to behind it."""
    box = _enrolment().identify(client_certificate())
    report = verify(_raw(), box.key)
    if report.box_id != box.box_id:
        raise ReportError("report.signature", "the report is of another box than its certificate", hint="enrol the box again")
    fleet: Fleet = current_app.extensions["fleet"]
    brake: Brake = current_app.extensions["brake"]
    fleet.take(report, per_hour=current_app.config["REPORTS_PER_HOUR"])
    brake.wake(box.ring)
    return Response(status=204)


def client_certificate() -> bytes | None:
    """Return the client's certificate in DER, or None; TLS has shown that the client holds its key."""
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
        raise EnrolmentError("enrolment.certificate", "the device certificate is none", hint="enrol the box with a token") from error


def address() -> str:
    """Return the asker's address; behind a proxy, the one that the proxy itself saw."""
    if current_app.config["BEHIND_PROXY"] and (chain := request.headers.get("X-Forwarded-For", "")):
        return chain.rpartition(",")[2].strip()[:64]
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
        hint = "send the fields that the documentation names"
        raise ReportError("report.invalid", "the request does not fit its schema", hint=hint) from error


def _certificate(pem: str, box_id: str) -> Response:
    return jsonify({"certificate_pem": pem, "ca_pem": _enrolment().authority.pem, "box_id": box_id})


def _enrolment() -> Enrolment:
    found: Enrolment = current_app.extensions["enrolment"]
    return found
