"""The service of the sync agent: polls the library, reports to the centre, and renews the box's certificate.

No error ends it. It connects only to the library (``model_sync.agent.client``) and, when the settings name one, to the central server.
A report contains only what ``model_sync.agent.report`` allows; the key that signs it never leaves the state directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Final, Literal

from pydantic import ValidationError
from securesystemslib.signer import CryptoSigner

from model_sync import atomic_files
from model_sync.agent.central_client import ReportSequenceError, post
from model_sync.agent.centre_status import recorded
from model_sync.agent.client import Client
from model_sync.agent.device import Device, Identity, make_certificate_request
from model_sync.agent.exchange import ANCHOR_FILE, REPORT_FILE
from model_sync.agent.report import MAX_BOX_REPORT_BYTES, RELEASE, BoxReport, ReportError, StatusReport, SyncReport, canonical, sign
from model_sync.agent.sync_status import STATUS_FILE, SyncState
from model_sync.errors import Action, LibraryUnreachable, ModelSyncError, TrustError
from model_sync.settings import SyncSettings
from model_sync.transport.connection import installed_version
from model_sync.trust.documents import LineIndex

logger = logging.getLogger(__name__)
SENT_FILE: Final = "report.json"
Sent = Literal["sent", "not_enrolled", "no_server"]
_CHECK_INTERVAL_S: Final = 20.0  # how often the box's own report is checked for changes
_STOP_S: Final = 0.7
_DRAW: Final = random.SystemRandom().random


def enrol(settings: SyncSettings, token: str) -> None:
    """Get a certificate for this box with a token; when the answer is lost, this box may use the same token again.

    Raises:
        DeviceError: the token is not valid, or belongs to another box.
        LibraryUnreachable: the server does not answer; nothing was changed.
        SettingsError: there is no https ``report_url``.
    """
    device = Device(settings.state_dir, settings.box_id)
    key, csr = device.pending_request()
    with recorded(settings.state_dir):
        answer = post(settings, "enrol", json.dumps({"token": token.strip(), "csr_pem": csr}).encode(), None)
        device.accept_certificate(key, str(answer.get("certificate_pem", "")), str(answer.get("ca_pem", "")), first=True)


def renew_if_due(settings: SyncSettings, *, now: datetime | None = None) -> bool:
    """Renew the certificate, with a new key, after half of its validity; return whether that was done.

    Raises:
        DeviceError: ``device.expired``: a new token is needed; or the centre refuses this box.
        LibraryUnreachable: the server does not answer; the certificate in use stays.
    """
    device = Device(settings.state_dir, settings.box_id)
    identity = device.identity()
    if identity is None or not identity.is_renewal_due(now or datetime.now(timezone.utc)):
        return False
    key, csr = make_certificate_request(settings.box_id)
    with recorded(settings.state_dir):
        answer = post(settings, "renew", json.dumps({"csr_pem": csr}).encode(), identity)
        device.accept_certificate(key, str(answer.get("certificate_pem", "")), "", first=False)
    return True


def send_report(settings: SyncSettings) -> Sent:
    """Send the status report to the centre.

    The number of a report is stored before the report is sent, so that no number is used for two reports. While it is not known
    whether a report arrived, and nothing has changed, the same bytes are sent again.

    Raises:
        LibraryUnreachable: the server does not answer.
        DeviceError: the centre refuses this box.
        ReportError: the centre does not understand the report.
    """
    if settings.report_url is None:
        return "no_server"
    identity = Device(settings.state_dir, settings.box_id).identity()
    if identity is None:
        return "not_enrolled"
    outbox = _ReportOutbox(settings)
    body = outbox.next(identity)
    with recorded(settings.state_dir):
        expected = _deliver(settings, body, identity)
        if expected is not None:  # the number on this box is too low: its state was lost or restored
            expected = _deliver(settings, outbox.again(identity, expected), identity)
            if expected is not None:
                raise LibraryUnreachable("the centre expects a third report number", code="sync.report")
    outbox.delivered()
    _confirm_audit(settings, outbox.sent)
    return "sent"


def _confirm_audit(settings: SyncSettings, report: bytes) -> None:
    """Tell the box which head of its audit the centre has now: the next report proves that it is still in the audit."""
    box = json.loads(report)["signed"]["box"]
    if box and box.get("audit"):
        try:
            atomic_files.write_json(settings.exchange_dir / ANCHOR_FILE, box["audit"]["head"])
        except OSError as error:
            raise atomic_files.disk_error(error) from error


def build_report(settings: SyncSettings, sequence: int) -> StatusReport:
    """Return the report of this moment: the agent's status, and the allowed part of the box's own report."""
    box, code = read_box_report(settings)
    values = {
        "schema": 1, "box_id": settings.box_id, "sequence": sequence, "at": datetime.now(timezone.utc), "agent_version": _version(),
        "ring": settings.ring, "sync": _sync_report(settings), "box": box, "box_code": code,
    }  # fmt: skip
    return StatusReport.model_validate(values)


def run(settings: SyncSettings, *, at_once: bool = False) -> int:
    """Work until SIGTERM or SIGINT; return 0. A stop takes less than a second; the next start continues the download."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    agent = Agent(settings, stop)
    work = threading.Thread(target=agent.work, args=(at_once,), name="agent", daemon=True)
    work.start()
    while work.is_alive() and not stop.wait(1.0):
        pass
    work.join(_STOP_S)
    return 0 if stop.is_set() else 1


class Agent:
    """The loop: a pull about every ``poll_interval_s``, a report when something changed and at least every ``report_interval_s``.

    Args:
        settings: the agent's settings.
        stop: set by the caller to end the loop.
        pull: one pull; by default that of a client.
        draw: returns a random number in [0, 1): thousands of boxes that start together must not poll together.
        ticks: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        settings: SyncSettings,
        stop: threading.Event,
        *,
        pull: Callable[[], object] | None = None,
        draw: Callable[[], float] = _DRAW,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._stop, self._draw, self._ticks = settings, stop, draw, ticks
        self._pull = pull or Client(settings, check_stop=self._require_running).pull
        self._reported_state = ""
        self._report_at = self._retry_at = float("-inf")

    def work(self, at_once: bool = False) -> None:
        """Run until ``stop`` is set."""
        poll_at = self._ticks() + (0.0 if at_once else self._draw() * self._settings.poll_interval_s)
        while not self._stop.wait(max(0.0, min(poll_at - self._ticks(), _CHECK_INTERVAL_S))):
            if self._ticks() >= poll_at:
                self._attempt("pull", self._pull)
                poll_at = self._ticks() + self.pause_s()
                self._attempt("renewal", lambda: renew_if_due(self._settings))
            if not self._stop.is_set():
                self._attempt("report", self._report_if_due)

    def pause_s(self) -> float:
        """Return the time to the next poll: the interval, plus or minus a random part of at most its jitter."""
        return self._settings.poll_interval_s * (1 + self._settings.poll_jitter * (2 * self._draw() - 1))

    def _require_running(self) -> None:
        """Stop a pull between two chunks of a file, and during a pause, when the agent is asked to stop."""
        if self._stop.is_set():
            raise LibraryUnreachable("the agent was stopped", code="sync.stopped", action=Action.WAIT)

    def _report_if_due(self) -> None:
        if self._settings.report_url is None or self._ticks() < self._retry_at:
            return
        summary = self._summary()
        if self._ticks() < self._report_at and summary == self._reported_state:
            return
        self._retry_at = self._ticks() + min(self._settings.poll_interval_s, self._settings.report_interval_s)
        send_report(self._settings)
        self._reported_state, self._report_at = summary, self._ticks() + self._settings.report_interval_s
        self._retry_at = float("-inf")

    def _summary(self) -> str:
        """Return the part of the report whose change is reported at once: states, models and activations, but no counts."""
        report = build_report(self._settings, 1)
        box = report.box
        parts = [report.sync.state, report.sync.code, report.box_code, *(box.models if box else ()), *(box.activations if box else ())]
        return "\n".join(map(repr, parts))

    def _attempt(self, what: str, step: Callable[[], object]) -> None:
        """Do one step; an error is logged, and the loop continues."""
        try:
            step()
        except ModelSyncError as error:
            logger.warning("%s: %s", what, error.message)
        except Exception:  # the top of the loop: without the agent nobody updates this box
            logger.exception("%s failed", what)


class _ReportOutbox:
    """The report being sent: its number and bytes are on the disk before the first byte is sent.

    Attributes:
        sent: the bytes that were returned last.
    """

    def __init__(self, settings: SyncSettings) -> None:
        self._settings = settings
        self._file = settings.state_dir / SENT_FILE
        self._stored = atomic_files.read_json(self._file)
        self.sent = b""

    def next(self, identity: Identity) -> bytes:
        """Return the bytes to send: the last report if it may not have arrived and nothing changed, or a new one."""
        last = self._stored.get("sequence", 0)
        sequence = (last if isinstance(last, int) and last >= 0 else 0) + 1
        report = build_report(self._settings, sequence)
        body = self._stored.get("body")
        if isinstance(body, str) and self._stored.get("content") == _content(report) and self._stored.get("key") == _key_name(identity):
            self.sent = body.encode()
            return self.sent
        return self._store(report, identity)

    def again(self, identity: Identity, sequence: int) -> bytes:
        """Return a new report under the number that the centre expects."""
        return self._store(build_report(self._settings, sequence), identity)

    def delivered(self) -> None:
        """Record that the report arrived."""
        self._write(self._stored | {"body": None})

    def _store(self, report: StatusReport, identity: Identity) -> bytes:
        if report.box_code:
            logger.warning("the box's own report is not sent: %s", report.box_code)
        body = sign(report, CryptoSigner(identity.key))
        entry = {"sequence": report.sequence, "content": _content(report), "key": _key_name(identity), "body": body.decode()}
        self._write(entry)
        self.sent = body
        return body

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            atomic_files.write_json(self._file, entry)
        except OSError as error:
            raise atomic_files.disk_error(error) from error
        self._stored = entry


def _deliver(settings: SyncSettings, body: bytes, identity: Identity) -> int | None:
    """Send one report; return None if it was accepted, else the number that the centre expects."""
    for last in (False, True):
        try:
            post(settings, "reports", body, identity)
        except ReportSequenceError as other:
            return other.expected
        except LibraryUnreachable as error:
            # It may have arrived: sending the same bytes again is harmless, another report under this number would be wrong.
            if last or error.code != "sync.unreachable":
                raise
        else:
            break
    return None


def read_box_report(settings: SyncSettings) -> tuple[BoxReport | None, str]:
    """Return the box's own report, or the code that says why there is none; no code where the box has left none so far."""
    path = settings.exchange_dir / REPORT_FILE
    try:
        raw = atomic_files.read(path, MAX_BOX_REPORT_BYTES)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, "box_report.invalid" if error.errno == errno.EFBIG else "box_report.unreadable"
    try:
        return BoxReport.parse(raw).restricted_to(_signed_versions(settings)), ""
    except ReportError as error:
        logger.debug("the box's report: %s", error.message)
        return None, "box_report.invalid"


def _signed_versions(settings: SyncSettings) -> dict[str, frozenset[str]]:
    """Return the model lines and versions that the signed library names: only those names may leave the box."""
    known: dict[str, frozenset[str]] = {line: frozenset() for line in settings.lines}
    for path in sorted((settings.exchange_dir / "documents" / "models").glob("*/line.json")):
        try:
            index = LineIndex.parse(path.read_bytes())
        except (OSError, TrustError):
            continue
        known[index.line] = frozenset(release.version for release in index.versions)
    return known


def _sync_report(settings: SyncSettings) -> SyncReport:
    status = atomic_files.read_json(settings.exchange_dir / STATUS_FILE)
    fields = {name: status.get(name) for name in SyncReport.model_fields if status.get(name) is not None}
    try:
        return SyncReport.model_validate_json(json.dumps({"state": "unknown", "code": ""} | fields))
    except (ValidationError, ValueError):
        return SyncReport(state=SyncState.UNKNOWN, code="")


def _content(report: StatusReport) -> str:
    """Return a digest of a report without its number and time."""
    content = {name: value for name, value in report.to_dict().items() if name not in ("sequence", "at")}
    return hashlib.sha256(canonical(content)).hexdigest()


def _key_name(identity: Identity) -> str:
    return f"{identity.certificate.serial_number:x}"


def _version() -> str:
    installed = installed_version()
    return installed if re.fullmatch(RELEASE, installed) else "0.0.0"
