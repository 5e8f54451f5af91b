"""The HTTP client of the central server: TLS with the box's certificate, bounded answers, typed errors."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Final

import requests

from model_sync.agent.device import DeviceError, Identity
from model_sync.agent.report import ReportError
from model_sync.errors import LibraryUnreachable, ModelSyncError, SettingsError
from model_sync.settings import SyncSettings
from model_sync.trust.rollback_protection import iso

_ANSWER_BYTES: Final = 64 << 10
_MAX_DETAIL_CHARS: Final = 300


class ReportSequenceError(ModelSyncError):
    """The centre expects another report number; ``expected`` is the lowest one that it accepts."""

    def __init__(self, expected: int) -> None:
        super().__init__(f"the centre expects report {expected}", code="report.sequence")
        self.expected = expected


def post(settings: SyncSettings, path: str, body: bytes, identity: Identity | None) -> dict[str, Any]:
    """Send one request to the centre; return its JSON, an empty object for 204.

    Args:
        settings: address and time limits.
        path: ``enrol``, ``renew`` or ``reports``.
        body: the JSON to send.
        identity: the identity of this box; None only for ``enrol``.

    Raises:
        LibraryUnreachable: it does not answer, is busy, or another server answers; ``sync.unreachable`` means that the
            request may have arrived.
        DeviceError: the centre refuses this box, or the certificate expired.
        ReportSequenceError: another report number is expected.
        ReportError: the centre does not understand the report.
        SettingsError: there is no https ``report_url``.
    """
    if settings.report_url is None or not settings.report_url.startswith("https://"):
        raise SettingsError("report_url must be an https address")
    url = f"{settings.report_url.rstrip('/')}/api/v1/{path}"
    with requests.Session() as session:
        session.trust_env = False  # no proxy, netrc or CA bundle that somebody set for another program
        session.headers["Accept-Encoding"] = "identity"
        try:
            answer = session.post(
                url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False, stream=True,
                cert=str(identity.file) if identity else None,
                verify=str(settings.ca_certificate) if settings.ca_certificate else True,
                timeout=(settings.connect_timeout_s, settings.read_timeout_s),
            )  # fmt: skip
            with answer:
                content = answer.raw.read(_ANSWER_BYTES, decode_content=False) or b""
        except (requests.RequestException, OSError) as error:
            if identity is not None and identity.is_expired(datetime.now(timezone.utc)):
                raise _expired(identity) from error
            hint = "check the link, report_url and ca_certificate; the newest state is sent later"
            raise LibraryUnreachable(f"the centre does not answer ({type(error).__name__})", hint=hint) from error
    return _read(answer, content, identity)


def _read(answer: requests.Response, content: bytes, identity: Identity | None) -> dict[str, Any]:
    if answer.status_code == 204:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    if not isinstance(value, dict) or kind not in ("application/json", "application/problem+json"):
        if identity is not None and identity.is_expired(datetime.now(timezone.utc)):  # a proxy's own error page
            raise _expired(identity)
        raise LibraryUnreachable(f"another server than the centre answered ({answer.status_code})", code="sync.not_the_library")
    if answer.status_code == 200:
        return value
    code, detail = str(value.get("code", "")), _printable(value.get("detail"))
    if code == "report.sequence" and isinstance(value.get("expected"), int) and 0 < value["expected"] < 2**53:
        raise ReportSequenceError(value["expected"])
    if code == "report.invalid":
        raise ReportError("report.invalid", f"the centre refused the report: {detail}")
    if code == "enrolment.expired" and identity is not None:
        raise _expired(identity)
    if answer.status_code in (401, 403, 422) or code.startswith("enrolment."):
        raise DeviceError(code or "device.refused", f"the centre refused: {detail}", hint="ask the central team; the model in use stays")
    if answer.status_code == 429:
        wait = answer.headers.get("Retry-After", "")
        pause = f"; it asks to wait {wait} s" if wait.isdecimal() and len(wait) < 7 else ""
        message = f"the centre answered 429, too many requests{pause}"
        raise LibraryUnreachable(message, code=code if code == "report.rate" else "sync.rate")
    raise LibraryUnreachable(f"the centre cannot accept it now ({answer.status_code})", code="sync.report")


def _expired(identity: Identity) -> DeviceError:
    ended = iso(identity.certificate.not_valid_after_utc)
    return DeviceError("device.expired", f"this box's certificate expired on {ended}")


def _printable(text: object) -> str:
    """Return text from the network, bounded and without control characters."""
    return "".join(letter for letter in str(text or "without a reason") if letter.isprintable())[:_MAX_DETAIL_CHARS]
