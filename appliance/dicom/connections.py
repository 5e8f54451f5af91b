"""Limits for the peers of the receiver, none of which has logged in (R45): connections, silence, and bytes that wait in memory.

pynetdicom limits associations alone, and counts a connection that never asks for one as an association. A peer that sends half a PDU and
then nothing keeps two threads for ever, and one that announces a PDU or a data set of any length gets the memory for it. The limits here
hold for both ports together. A peer that exceeds one loses its connection, which a DICOM sender answers by sending again later.
"""

from __future__ import annotations

import gc
import logging
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from socketserver import BaseServer
from typing import Any, Final
from weakref import WeakKeyDictionary

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from appliance.core.settings import Settings
from model_sync.login_throttle import machine_of

logger = logging.getLogger(__name__)

# What the box asks its peers to send at most in one PDU (PS3.8 D.1.1), and what it takes from those that do not keep to it.
MAX_PDU_BYTES: Final = 1 << 20
_LONGEST_PDU_BYTES: Final = 4 << 20
# Longest time until a connection has asked for an association (the ARTIM timer of PS3.8 9.1.5), and later without a whole PDU; pynetdicom
# ends what is merely silent in two thirds of these times.
REQUEST_S: Final = 45.0
_SILENCE_S: Final = 90.0
_MIB: Final = 1 << 20
_MOST_REPORTED: Final = 1000


@dataclass(eq=False)
class _Traffic:
    """What one connection has sent.

    Attributes:
        heard_at: when its last whole PDU was complete, by the monotonic clock.
        unfinished_bytes: of the message that is not complete yet.
        waiting_bytes: of each complete message that is not answered yet.
        is_ended: whether it is closed, or was over a limit and will be.
    """

    heard_at: float
    unfinished_bytes: int = 0
    waiting_bytes: deque[int] = field(default_factory=deque)
    is_ended: bool = False

    @property
    def held_bytes(self) -> int:
        """What its messages take in memory."""
        return 0 if self.is_ended else self.unfinished_bytes + sum(self.waiting_bytes)


class ConnectionLimits:
    """The limits of all connections of one receiver.

    One machine (an address, or an IPv6 network of 64 bits) gets three quarters of the associations at most: the rest is for the others.

    Args:
        settings: ``dicom_max_associations``, ``max_upload_bytes``, ``process_memory_max_bytes``.
    """

    def __init__(self, settings: Settings) -> None:
        self._most = 2 * settings.dicom_max_associations  # above dicom_max_associations pynetdicom answers "local limit exceeded"
        self._most_of_machine = max(1, settings.dicom_max_associations * 3 // 4)
        self._most_bytes = settings.max_upload_bytes * 5 // 4 + _MIB  # a larger data set is refused by its status up to here
        self._most_bytes_together = max(self._most_bytes, settings.process_memory_max_bytes // 4)
        self._request_s = REQUEST_S
        self._lock = threading.Lock()
        self._opening: Counter[str] = Counter()
        self._reported: set[str] = set()
        self._traffic: WeakKeyDictionary[Association, _Traffic] = WeakKeyDictionary()
        self._has_freed = False

    def handlers(self) -> list[Any]:
        """The event handlers that every connection needs."""
        return [
            (evt.EVT_CONN_OPEN, self._on_open), (evt.EVT_DATA_RECV, self._on_pdu), (evt.EVT_DIMSE_RECV, self._on_message),
            (evt.EVT_DIMSE_SENT, self._on_answer), (evt.EVT_CONN_CLOSE, self._on_close),
        ]  # fmt: skip

    @property
    def acse_timeout_s(self) -> float:
        """How long pynetdicom waits for a request."""
        return self._request_s * 2 / 3

    def admit(self, associations: list[Association], address: str) -> bool:
        """Whether a machine may open one more connection; if so, it counts until :meth:`opened`, and then as an association."""
        machine = machine_of(address)
        with self._lock:
            open_now = self._opening + Counter(machine_of(association.requestor.address or "") for association in associations)
            is_admitted = open_now.total() < self._most and open_now[machine] < self._most_of_machine
            if is_admitted:
                self._opening[machine] += 1
                self._reported.discard(machine)
            elif machine not in self._reported and len(self._reported) < _MOST_REPORTED:  # one line, not one for each attempt
                self._reported.add(machine)
                logger.warning("too many connections", extra={"peer": machine, "count": open_now[machine]})
        return is_admitted

    def opened(self, address: str) -> None:
        """Note that a connection has become an association, or was closed."""
        with self._lock:
            self._opening[machine_of(address)] -= 1
            self._opening += Counter()  # forgets machines with none

    def end_stalled(self) -> None:
        """Close the connections that have sent no whole PDU for too long, so that the threads that wait for it end."""
        now = time.monotonic()
        with self._lock:
            watched = list(self._traffic.items())
        for association, traffic in watched:
            if now - traffic.heard_at > (_SILENCE_S if association.is_established else self._request_s):
                self._end(association, traffic, "silent")
        if self._has_freed:  # a connection and its messages refer to each other: only the collector frees them
            self._has_freed = False
            gc.collect()

    def end_all(self) -> None:
        """Close every connection."""
        with self._lock:
            watched = list(self._traffic.items())
        for association, traffic in watched:
            self._end(association, traffic, "stopping")

    def _on_open(self, event: Any) -> None:
        association = event.assoc
        with self._lock:
            self._traffic[association] = _Traffic(time.monotonic())
        association.dul.socket = _BoundedSocket(association, client_socket=association.dul.socket.socket)
        association.dul.event_queue.get_nowait()  # both sockets have announced the connection

    def _on_pdu(self, event: Any) -> None:
        with self._lock:
            traffic = self._traffic[event.assoc]
            traffic.heard_at = time.monotonic()
            traffic.unfinished_bytes += len(event.data)
            is_over = traffic.held_bytes > self._most_bytes
            held = {each: of_each.held_bytes for each, of_each in self._traffic.items()} if traffic.held_bytes > _MIB else {}
        if is_over:
            self._end(event.assoc, traffic, "too large")
        elif sum(held.values()) > self._most_bytes_together:
            largest = max(held, key=held.__getitem__)
            self._end(largest, self._traffic[largest], "too large together")

    def _on_message(self, event: Any) -> None:
        with self._lock:
            traffic = self._traffic[event.assoc]
            traffic.waiting_bytes.append(traffic.unfinished_bytes)
            traffic.unfinished_bytes = 0

    def _on_answer(self, event: Any) -> None:
        with self._lock:
            waiting = self._traffic[event.assoc].waiting_bytes
            if waiting:
                waiting.popleft()

    def _on_close(self, event: Any) -> None:
        with self._lock:
            traffic = self._traffic[event.assoc]
            self._has_freed |= traffic.held_bytes > _MIB
            traffic.is_ended = True

    def _end(self, association: Association, traffic: _Traffic, reason: str) -> None:
        line = association.dul.socket.socket if association.dul.socket else None
        if traffic.is_ended or line is None:
            return
        traffic.is_ended = self._has_freed = True
        logger.warning("connection ended", extra={"peer": association.requestor.address, "state": reason})
        try:
            socket.socket.shutdown(line, socket.SHUT_RDWR)  # not that of an SSL socket, which another thread reads at this moment
        except OSError as error:
            logger.debug("connection has ended by itself", extra={"status": error.errno})


class _BoundedSocket(AssociationSocket):
    """Reads no PDU that is longer than any that the box has asked for."""

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly so many bytes, or fewer where the peer has closed; raises OSError for more than a PDU may have."""
        if nr_bytes > _LONGEST_PDU_BYTES:
            raise OSError("a PDU that is too long")
        return super().recv(nr_bytes)


class LimitedServer(ThreadedAssociationServer):
    """pynetdicom's server for one port, within the limits.

    Args:
        limits: shared by the ports of a receiver.
        evt_handlers: of the associations.
        request_handler: what a connection does first.
    """

    request_queue_size = 64

    def __init__(
        self, *args: Any, limits: ConnectionLimits, evt_handlers: list[Any], request_handler: type[RequestHandler] = RequestHandler
    ) -> None:
        self._limits = limits
        super().__init__(*args, evt_handlers=[*evt_handlers, *limits.handlers()], request_handler=request_handler)  # type: ignore[misc]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the machine may have one more connection."""
        del request
        return self._limits.admit(self.ae.active_associations, client_address[0])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no further thread
            self._limits.opened(client_address[0])
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Start the association of a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._limits.opened(client_address[0])

    def service_actions(self) -> None:
        """End what has stalled; called twice a second."""
        super().service_actions()
        self._limits.end_stalled()

    def shutdown(self) -> None:
        """Stop listening; pynetdicom's own method is for servers that it started itself."""
        BaseServer.shutdown(self)
        self.server_close()
