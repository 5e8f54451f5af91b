"""The agent on the box: looks at the library now and then, tells the centre how it went, and keeps the box's certificate young.

Nothing that goes wrong ends it. It talks to two places only: the library (``model_sync.agent.client``) and, when the settings name one,
the centre's server. What it tells is ``model_sync.agent.report``'s allow-list; what it signs with never leaves the state directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import signal
import stat
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

from pydantic import ValidationError
from securesystemslib.signer import CryptoSigner

from model_sync import atomic_files
from model_sync.agent.central_client import KEPT, OtherSequenceError, post
from model_sync.agent.client import Client
from model_sync.agent.device import Device, Identity, make_request
from model_sync.agent.exchange import REPORT_FILE
from model_sync.agent.report import MAX_BOX_REPORT_BYTES, RELEASE, BoxReport, ReportError, StatusReport, SyncReport, canonical, sign
from model_sync.agent.sync_status import STATUS_FILE
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust.documents import LineIndex

logger = logging.getLogger(__name__)
SENT_FILE: Final = "report.json"
Sent = Literal["sent", "not_enrolled", "no_server"]
_LOOK_S: Final = 20.0  # how often the box's own report is looked at for news
_STOP_S: Final = 0.7
_DRAW: Final = random.SystemRandom().random


def enrol(settings: SyncSettings, token: str) -> None:
    """Trade a token for this box's certificate.

    The key is made here and stays here. When the answer is lost on its way, the same token may be used again from this box.

    Raises:
        DeviceError: the token does not work, or is another box's.
        LibraryUnreachable: the server does not answer; nothing was changed.
        SettingsError: there is no https ``report_url``.
    """
    device = Device(settings.state_dir, settings.box_id)
    key, csr = device.pending()
    answer = post(settings, "enrol", json.dumps({"token": token.strip(), "csr_pem": csr}).encode(), None)
    _accept(device, key, answer, first=True)


def renew_if_due(settings: SyncSettings, *, now: datetime | None = None) -> bool:
    """Renew the certificate from half of its life on, with a new key. Returns whether that was done.

    Raises:
        DeviceError: ``device.expired``: too late, a new token is needed; or the centre refuses.
        LibraryUnreachable: the server does not answer; the certificate in use stays.
    """
    device = Device(settings.state_dir, settings.box_id)
    identity = device.identity()
    if identity is None or not identity.renewal_due(now or datetime.now(timezone.utc)):
        return False
    key, csr = make_request(settings.box_id)
    _accept(device, key, post(settings, "renew", json.dumps({"csr_pem": csr}).encode(), identity), first=False)
    return True


def send_report(settings: SyncSettings) -> Sent:
    """Tell the centre how this box is.

    The number of a report is on the disk before the report is on the wire: no number ever stands for two reports. While it is not
    known whether a report arrived, and nothing has changed, the very same bytes are sent again.

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
    outbox = _Outbox(settings)
    body = outbox.next(identity)
    expected = _deliver(settings, body, identity)
    if expected is not None:  # this box's count is behind: its state was lost or restored
        expected = _deliver(settings, outbox.again(identity, expected), identity)
        if expected is not None:
            raise LibraryUnreachable("the centre counts this box's reports otherwise", hint=KEPT, code="sync.report")
    outbox.delivered()
    return "sent"


def status_of(settings: SyncSettings, sequence: int) -> StatusReport:
    """Return what this box has to tell now: the agent's own status, and the box's report as far as the allow-list lets it pass."""
    box, code = _box_report(settings)
    values = {
        "schema": 1, "box_id": settings.box_id, "sequence": sequence, "at": datetime.now(timezone.utc), "agent_version": _version(),
        "ring": settings.ring, "sync": _sync_report(settings), "box": box, "box_code": code,
    }  # fmt: skip
    return StatusReport.model_validate(values)


def run(settings: SyncSettings, *, at_once: bool = False) -> int:
    """Work until SIGTERM or SIGINT; returns 0. A stop takes less than a second, also in the middle of a download.

    What a stop leaves behind is what a power cut leaves behind, and the next start goes on from there.
    """
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
    """The loop: a look at the library about every ``poll_interval_s``, a report when something changed and now and then.

    Args:
        settings: the agent's.
        stop: set from outside to end the loop.
        pull: one look at the library; by default the client's.
        draw: a random number in [0, 1): thousands of boxes that start together must not come together.
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
        self._pull = pull or Client(settings, may_continue=self._require_running).pull
        self._told = ""
        self._report_at = self._retry_at = float("-inf")

    def work(self, at_once: bool = False) -> None:
        """Go on until ``stop`` is set."""
        poll_at = self._ticks() + (0.0 if at_once else self._draw() * self._settings.poll_interval_s)
        while not self._stop.wait(max(0.0, min(poll_at - self._ticks(), _LOOK_S))):
            if self._ticks() >= poll_at:
                self._attempt("pull", self._pull)
                poll_at = self._ticks() + self.pause_s()
                self._attempt("renewal", lambda: renew_if_due(self._settings))
            if not self._stop.is_set():
                self._attempt("report", self._report_if_due)

    def pause_s(self) -> float:
        """Return the time to the next look: the interval, moved at random by up to its jitter either way."""
        return self._settings.poll_interval_s * (1 + self._settings.poll_jitter * (2 * self._draw() - 1))

    def _require_running(self) -> None:
        """Stop a look between two pieces of a file, and in a pause before another attempt, when the agent is asked to stop."""
        if self._stop.is_set():
            raise LibraryUnreachable("the agent was stopped", hint="it goes on when it is started again", code="sync.stopped")

    def _report_if_due(self) -> None:
        if self._settings.report_url is None or self._ticks() < self._retry_at:
            return
        news = self._news()
        if self._ticks() < self._report_at and news == self._told:
            return
        self._retry_at = self._ticks() + min(self._settings.poll_interval_s, self._settings.report_interval_s)
        send_report(self._settings)
        self._told, self._report_at = news, self._ticks() + self._settings.report_interval_s
        self._retry_at = float("-inf")

    def _news(self) -> str:
        """Return what a report is sent early for: states, models and activations; not counts that change all the time."""
        report = status_of(self._settings, 1)
        box = report.box
        parts = [report.sync.state, report.sync.code, report.box_code, *(box.models if box else ()), *(box.activations if box else ())]
        return "\n".join(map(repr, parts))

    def _attempt(self, what: str, step: Callable[[], object]) -> None:
        """Do one step; whatever goes wrong is logged, and the next step comes at its time."""
        try:
            step()
        except ModelSyncError as error:
            logger.warning("%s: %s", what, error.message)
        except Exception:  # the top of the loop: an agent that ended would be a box that nobody updates
            logger.exception("%s failed", what)


class _Outbox:
    """The report under way: its number and bytes on the disk, before the first of them is sent."""

    def __init__(self, settings: SyncSettings) -> None:
        self._settings = settings
        self._file = settings.state_dir / SENT_FILE
        self._kept = atomic_files.read_json(self._file)

    def next(self, identity: Identity) -> bytes:
        """Return what to send: the report that may or may not have arrived, when it still holds, or a new one."""
        last = self._kept.get("sequence", 0)
        sequence = (last if isinstance(last, int) and last >= 0 else 0) + 1
        report = status_of(self._settings, sequence)
        body = self._kept.get("body")
        if isinstance(body, str) and self._kept.get("content") == _content(report) and self._kept.get("key") == _key_name(identity):
            return body.encode()
        return self._keep(report, identity)

    def again(self, identity: Identity, sequence: int) -> bytes:
        """Return a new report under a number that the centre asked for."""
        return self._keep(status_of(self._settings, sequence), identity)

    def delivered(self) -> None:
        """Remember that the report arrived."""
        self._write(self._kept | {"body": None})

    def _keep(self, report: StatusReport, identity: Identity) -> bytes:
        if report.box_code:
            logger.warning("the box's own report is not sent: %s", report.box_code)
        body = sign(report, CryptoSigner(identity.key))
        kept = {"sequence": report.sequence, "content": _content(report), "key": _key_name(identity), "body": body.decode()}
        self._write(kept)
        return body

    def _write(self, kept: dict[str, Any]) -> None:
        try:
            atomic_files.write_json(self._file, kept)
        except OSError as error:
            raise atomic_files.disk_trouble(error) from error
        self._kept = kept


def _deliver(settings: SyncSettings, body: bytes, identity: Identity) -> int | None:
    """Send one report; returns the number that the centre expects when it is another one."""
    for last in (False, True):
        try:
            post(settings, "reports", body, identity)
        except OtherSequenceError as other:
            return other.expected
        except LibraryUnreachable as error:
            # It may have arrived: the same bytes again cost nothing, another report under this number would be a lie.
            if last or error.code != "sync.unreachable":
                raise
        else:
            break
    return None


def _accept(device: Device, key: bytes, answer: dict[str, Any], *, first: bool) -> None:
    device.accept(key, str(answer.get("certificate_pem", "")), str(answer.get("ca_pem", "")), first=first)


def _box_report(settings: SyncSettings) -> tuple[BoxReport | None, str]:
    """Return the box's own report, or why there is none; an invalid one is not sent at all."""
    path = settings.exchange_dir / REPORT_FILE
    try:
        # Another account's file: no link is followed and no pipe waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return None, "box_report.unreadable"
            raw = stream.read(MAX_BOX_REPORT_BYTES + 1)
    except FileNotFoundError:
        return None, ""
    except OSError:
        return None, "box_report.unreadable"
    try:
        return BoxReport.parse(raw).known_to(_signed_versions(settings)), ""
    except ReportError as error:
        logger.debug("the box's report: %s", error.message)
        return None, "box_report.invalid"


def _signed_versions(settings: SyncSettings) -> dict[str, frozenset[str]]:
    """Return the lines and versions that the signed library names, as the box was told: only those names may leave the box."""
    known: dict[str, frozenset[str]] = {line: frozenset() for line in settings.lines}
    for path in sorted((settings.exchange_dir / "documents" / "models").glob("*/line.json")):
        try:
            index = LineIndex.parse(path.read_bytes())
        except (OSError, TrustError):
            continue
        known[index.line] = frozenset(release.version for release in index.versions)
    return known


def _sync_report(settings: SyncSettings) -> SyncReport:
    kept = atomic_files.read_json(settings.exchange_dir / STATUS_FILE)
    fields = {name: kept.get(name) for name in SyncReport.model_fields if kept.get(name) is not None}
    try:
        return SyncReport.model_validate_json(json.dumps({"state": "unknown", "code": ""} | fields))
    except (ValidationError, ValueError):
        return SyncReport(state="unknown", code="")


def _content(report: StatusReport) -> str:
    """Return a digest of what a report tells, its number and moment apart."""
    told = {name: value for name, value in report.to_dict().items() if name not in ("sequence", "at")}
    return hashlib.sha256(canonical(told)).hexdigest()


def _key_name(identity: Identity) -> str:
    return f"{identity.certificate.serial_number:x}"


def _version() -> str:
    try:
        found = version("clinic-edge-appliance")
    except PackageNotFoundError:
        return "0.0.0"
    return found if re.fullmatch(RELEASE, found) else "0.0.0"
