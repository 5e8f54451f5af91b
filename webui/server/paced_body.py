"""Bodies that must keep a minimum speed: a sender that is silent or too slow counts as gone, as if it had closed its connection.

nginx limits the pause between two pieces of a body, and an upload passes through it as it comes. Without this, somebody logged in who
sends one byte now and then would hold a thread for days.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from gunicorn.http.errors import ParseException
from werkzeug.wsgi import ClosingIterator

SILENCE_S: Final = 20.0
GRACE_S: Final = 15.0
BYTES_PER_S: Final = 2048
_PIECE_BYTES: Final = 8 << 10
_CHECK_EVERY_S: Final = 0.5
# What is read of a body that the application answered without reading it.
_MAX_REST_BYTES: Final = 64 << 20
_MAX_REST_S: Final = 5.0

WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


class PacedBody(io.RawIOBase):
    """A request's body; the end of the stream also where the sender was cut off, so that what it sent before is kept.

    Args:
        body: the server's body.
        connection: the socket below it.
        guard: cuts slow senders off.
    """

    def __init__(self, body: Any, connection: socket.socket, guard: SpeedGuard) -> None:
        super().__init__()
        self._body, self._connection, self._guard = body, connection, guard
        self._bytes, self._waited_s, self._piece_began = 0, 0.0, 0.0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or its beginning at the end of the body; only the time within this call counts against the sender."""
        view, filled = memoryview(buffer), 0
        with self._guard.watch(self):
            while filled < len(view):
                self._piece_began = time.monotonic()
                piece = self._body.read(min(_PIECE_BYTES, len(view) - filled))
                self._waited_s += time.monotonic() - self._piece_began
                if not piece:
                    break
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
                self._bytes += len(piece)
        return filled

    def cut_off_if_slow(self, now: float) -> None:
        """End the stream when the sender is too slow; the guard calls this from its own thread while the body is read."""
        pause_s = now - self._piece_began
        if pause_s > SILENCE_S or self._waited_s + pause_s > GRACE_S + self._bytes / BYTES_PER_S:
            try:
                self._connection.shutdown(socket.SHUT_RD)
            except OSError:
                return  # closed already

    def read_rest(self) -> None:
        """Read and forget what is left, bounded, after the answer was sent.

        A connection that is closed with unread bytes is reset: nginx, which is still sending, would report that instead of the answer.
        """
        limit, started = self._bytes + _MAX_REST_BYTES, time.monotonic()
        with suppress(OSError, ParseException):
            while self._bytes < limit and time.monotonic() - started < _MAX_REST_S and self.read(_PIECE_BYTES):
                continue


class SpeedGuard:
    """Looks at the bodies that are being read, twice a second, in one thread of its own."""

    def __init__(self) -> None:
        self._reading: set[PacedBody] = set()
        self._changed = threading.Condition()
        self._has_thread = False

    @contextmanager
    def watch(self, body: PacedBody) -> Iterator[None]:
        """Watch a body while the ``with`` block runs."""
        with self._changed:
            if not self._has_thread:
                threading.Thread(target=self._run, name="speed-guard", daemon=True).start()
                self._has_thread = True
            self._reading.add(body)
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._reading.discard(body)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reading)
                now = time.monotonic()
                for body in self._reading:
                    body.cut_off_if_slow(now)
            time.sleep(_CHECK_EVERY_S)


def pace_bodies(app: WsgiApp, silence_s: float) -> WsgiApp:
    """Wrap an application: its bodies keep the minimum speed, and a reader that does not take a chunk within ``silence_s`` is cut off."""
    guard = SpeedGuard()

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            connection.settimeout(silence_s)
            environ["wsgi.input"] = body = PacedBody(environ["wsgi.input"], connection, guard)
            if environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
                return ClosingIterator(app(environ, start_response), body.read_rest)
        return app(environ, start_response)

    return call
