"""Sends the audit to a syslog server over TLS (requirement R12; DICOM PS3.15 A.6, RFC 5424, RFC 5425).

The buffer is the audit itself: a cursor in the database says which entries have arrived, so the server may be away for any time.
Syslog has no answers. An entry counts as arrived when the server's TCP has acknowledged it and the connection has stayed open for half
a minute since; what was sent before a connection broke is sent again. ``sequenceId`` (RFC 5424 7.3.1) is the number of the entry.
"""

from __future__ import annotations

import array
import fcntl
import json
import logging
import socket
import ssl
import termios
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from appliance.core.errors import ApplianceError, StoreError
from appliance.core.process import Lock, stop_on_signal
from appliance.core.settings import Settings
from appliance.store import audit
from appliance.store.audit_entries import read_entries
from appliance.store.audit_messages import AuditMessages
from appliance.store.store import Store
from model_sync import atomic_files

logger = logging.getLogger(__name__)

STATUS_NAME: Final = "audit-sender.json"
DEFAULT_PORT: Final = 6514  # RFC 5425 4.1
_CURSOR: Final = "audit_sent"
_SETTLE_S: Final = 30.0
_BATCH: Final = 200
_POLL_S: Final = 1.0
_TIMEOUT_S: Final = 20.0
_CLOSE_S: Final = 1.0
_FIRST_RETRY_S: Final = 1.0
_LONGEST_RETRY_S: Final = 60.0
_ALERT_INTERVAL_S: Final = 3600.0
# PRI (RFC 5424 6.2.1): facility 10, security and authorization messages (PS3.15 A.6), and the severity of an outcome.
_FACILITY: Final = 10
_SEVERITY: Final = {0: 5, 4: 4, 8: 3, 12: 2}
_APP_NAME: Final = "clinicbox"
_MESSAGE_ID: Final = "DICOM+RFC3881"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_SIOCOUTQ: Final = termios.TIOCOUTQ  # the same number for sockets (tcp(7))


def split_destination(text: str) -> tuple[str, int]:
    """Host and port of the setting ``audit_syslog``."""
    host, _, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", "")
    return host.strip("[]"), int(port or DEFAULT_PORT)


def frame(fields: dict[str, Any], message: str, hostname: str) -> bytes:
    """One entry, by its fields, as a syslog message with its length before it (RFC 5425 4.3)."""
    priority = _FACILITY * 8 + _SEVERITY.get(fields["outcome"], 4)
    sequence = (fields["seq"] - 1) % (2**31 - 1) + 1
    head = f'<{priority}>1 {fields["at"]} {hostname} {_APP_NAME} - {_MESSAGE_ID} [meta sequenceId="{sequence}"] '
    body = head.encode("ascii", "replace") + _BYTE_ORDER_MARK + message.encode()
    return f"{len(body)} ".encode() + body


class AuditSender:
    """Sends the entries of one box; each method call does what can be done now.

    Args:
        settle_s: how long a connection must have stayed open after an entry before the entry counts as arrived.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, store: Store, *, settle_s: float = _SETTLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._settle_s, self._clock = store, settle_s, clock
        self._settings = store.settings
        self._host, self._port = split_destination(self._settings.audit_syslog)
        self._messages = AuditMessages(store.database, self._settings.ae_title)
        self._hostname = socket.gethostname().encode("ascii", "replace").decode() or "-"
        self._connection: ssl.SSLSocket | None = None
        self._unsettled: deque[tuple[float, int]] = deque()
        self._next = self.arrived() + 1
        self._retry_s, self._retry_at = _FIRST_RETRY_S, float("-inf")
        self._code, self._alerted_at = "", float("-inf")

    def arrived(self) -> int:
        """The last entry that has arrived at this destination."""
        row = self._store.database.one("SELECT value FROM meta WHERE key = ?", _CURSOR)
        destination, _, seq = str(row["value"]).rpartition(" ") if row else ("", "", "0")
        is_of_this = destination == self._settings.audit_syslog and seq.isascii() and seq.isdigit()
        return int(seq) if is_of_this else 0

    def step(self) -> bool:
        """Connect where that is due, send what is new, record what has arrived; returns whether more waits and can be sent."""
        try:
            if self._connection is None:
                if self._clock() < self._retry_at:
                    return False
                self._connection = self._connect()
                self._next = self.arrived() + 1
            self._require_open(self._connection)
            has_more = self._send_batch(self._connection)
            self._settle()
        except (OSError, ApplianceError) as error:
            self._disconnect(error)
            return False
        self._report("")
        self._retry_s = _FIRST_RETRY_S
        return has_more

    def close(self) -> None:
        """Close the connection; what has not settled is sent again at the next start."""
        if self._connection is not None:
            self._connection.settimeout(_CLOSE_S)
            with suppress(OSError):  # the server may be gone; what it has not got is sent again
                self._connection.unwrap()
            self._connection.close()
            self._connection = None
        self._unsettled.clear()

    def _connect(self) -> ssl.SSLSocket:
        settings = self._settings
        context = ssl.create_default_context(cafile=settings.audit_syslog_ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.audit_syslog_certificate and settings.audit_syslog_key:
            context.load_cert_chain(settings.audit_syslog_certificate, settings.audit_syslog_key)
        plain = socket.create_connection((self._host, self._port), timeout=_TIMEOUT_S)
        try:
            return context.wrap_socket(plain, server_hostname=self._host)
        except BaseException:
            plain.close()
            raise

    @staticmethod
    def _require_open(connection: ssl.SSLSocket) -> None:
        """Raise OSError where the server has closed the connection; it never sends anything."""
        connection.setblocking(False)
        try:
            while connection.recv(4096):
                pass
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        finally:
            connection.settimeout(_TIMEOUT_S)
        raise ConnectionResetError("the server closed the connection")

    def _send_batch(self, connection: ssl.SSLSocket) -> bool:
        with self._store.database.snapshot() as snapshot:
            entries = list(read_entries(snapshot, "WHERE seq >= ? ORDER BY seq LIMIT ?", self._next, _BATCH))
        for entry in entries:
            if entry.fields() is None:
                logger.error("damaged entry of the audit: an alert is sent instead", extra={"code": audit.UNREADABLE, "count": entry.seq})
            fields = audit.fields_of(entry)
            connection.sendall(frame(fields, self._messages.message(fields), self._hostname))
            self._next = entry.seq + 1
        if entries:
            self._wait_for_acknowledgement(connection)
            self._unsettled.append((self._clock(), entries[-1].seq))
        return len(entries) == _BATCH

    def _wait_for_acknowledgement(self, connection: ssl.SSLSocket) -> None:
        """Wait until TCP has no unacknowledged byte of ours; raises OSError where that takes too long."""
        waiting, limit = array.array("i", [1]), time.monotonic() + _TIMEOUT_S
        while waiting[0]:
            fcntl.ioctl(connection.fileno(), _SIOCOUTQ, waiting)
            if waiting[0]:
                if time.monotonic() > limit:
                    raise TimeoutError("the server acknowledges nothing")
                time.sleep(0.005)

    def _settle(self) -> None:
        last = None
        while self._unsettled and self._clock() - self._unsettled[0][0] >= self._settle_s:
            last = self._unsettled.popleft()[1]
        if last is not None:
            with self._store.database.transaction(durable=False) as tx:  # lost in a power cut: some entries are sent twice
                tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_CURSOR, f"{self._settings.audit_syslog} {last}"))

    def _disconnect(self, error: OSError | ApplianceError) -> None:
        self.close()
        self._retry_at = self._clock() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
        if isinstance(error, ssl.SSLCertVerificationError):
            self._report("audit.certificate", error.verify_message)
        elif isinstance(error, ApplianceError):
            self._report(error.code)
        else:
            self._report("audit.unreachable", error.strerror or type(error).__name__)

    def _report(self, code: str, detail: str = "") -> None:
        """Log a change of state, write it for ``appliance audit status``, and alert once in a while where the server is not trusted."""
        if code == self._code:
            return
        self._code = code
        logger.log(logging.WARNING if code else logging.INFO, "syslog server", extra={"code": code or "ok"})
        with suppress(OSError):  # a full disk: the log has it
            path = self._settings.data_dir / "run" / STATUS_NAME
            atomic_files.write(path, json.dumps({"code": code, "detail": detail}).encode(), mode=0o600)
        if code == "audit.certificate" and self._clock() - self._alerted_at >= _ALERT_INTERVAL_S:
            self._alerted_at = self._clock()
            with suppress(StoreError):  # a full disk: the next change of state tries again
                self._store.record(audit.SECURITY_ALERT, "audit-sender", "E", "syslog", 8, code=code, **audit.NODE_AUTHENTICATION)


def run(settings: Settings) -> None:
    """Send the audit of a data directory until SIGTERM.

    Raises:
        ApplianceError: ``box.busy``; ``settings.invalid``: no server is configured.
    """
    if not settings.audit_syslog:
        raise ApplianceError("settings.invalid", "audit_syslog names no server")
    lock = Lock(settings.data_dir, "audit-sender")
    is_stopping = stop_on_signal()
    store = Store(settings)
    sender = AuditSender(store)
    try:
        while not is_stopping():
            if not sender.step():
                time.sleep(_POLL_S)
    finally:
        sender.close()
        store.close()
        lock.release()
