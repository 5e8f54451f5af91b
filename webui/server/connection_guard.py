"""A gunicorn worker that slow clients cannot block: a connection gets a thread only when its request has been received.

gunicorn's threads read a request's head and body from the socket themselves, and its event loop waits two seconds for every client that
does not close. A few clients that send one byte at a time, without any login, would block all pages. So this subclass of its
ThreadWorker changes four things:

* The event loop reads TLS handshake, head and the bodies of forms, without blocking, under one deadline (``HEAD_S``).
* Any other body, which is read only from somebody logged in, must keep a minimum speed (``PacedSocket``).
* Connections are counted per machine: beyond ``MAX_CONNECTIONS_PER_MACHINE`` its oldest idle one is closed, and one machine never gets
  every thread.
* A closing connection waits for its client on the loop's poller, not in a sleep.
"""

from __future__ import annotations

import re
import selectors
import socket
import ssl
import time
from collections import Counter, deque
from functools import partial
from io import BytesIO
from typing import Any, Final

from gunicorn import sock as gunicorn_sock
from gunicorn import util
from gunicorn.http import get_parser
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import TConn, ThreadWorker

from model_sync.login_throttle import machine_of

# From the accepted connection, or the previous answer, to the last byte of head and small body; no browser needs longer.
HEAD_S: Final = 15.0
MAX_CONNECTIONS_PER_MACHINE: Final = 64
MAX_CONNECTIONS: Final = 400
_MAX_HEAD_BYTES: Final = 32 << 10
# Forms; a page refuses a larger body without reading it.
_SMALL_BODY_BYTES: Final = 64 << 10
_PACE_GRACE_S: Final = 15.0
_PACE_BYTES_PER_S: Final = 2048
_LINGER_S: Final = 2.0
_LINGER_BYTES: Final = 256 << 10
_CHECK_EVERY_S: Final = 0.25
_RECV_BYTES: Final = 16 << 10

_LENGTH: Final = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding[ \t]*:", re.IGNORECASE)
_EXPECT: Final = re.compile(rb"\r\nexpect[ \t]*:[ \t]*100-continue", re.IGNORECASE)
_API: Final = re.compile(rb"[A-Z]{3,7} /api/")


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """One connection, with the bytes received of its next request."""

    def __init__(self, worker: GuardedWorker, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(worker.cfg, sock, client, server)
        self.worker = worker
        self.machine = machine_of(str(client[0]) if isinstance(client, tuple) and client else "")
        self.is_handshake_done = not self.cfg.is_ssl
        self.received = bytearray()
        self.deadline = 0.0
        self.has_continued = False
        self.drained = 0

    def close(self, graceful: bool = False) -> None:
        """Close at once, or, if ``graceful`` (gunicorn's choice after an answer), when the client has read the answer."""
        if not (graceful and self.worker.linger(self)):
            util.close(self.sock)
            self.worker.remove(self)


class PacedSocket:
    """A socket for reading a body: a sender that is silent or too slow counts as gone (``ended``), as if it had closed.

    It reports an end of the stream and raises no error, because gunicorn discards what it has of an unfinished read after an error.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._waited_s = 0.0
        self._bytes = 0
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        """Everything but ``recv`` is the attribute of the socket."""
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """Receive some bytes, waiting no longer than the minimum speed allows; no bytes when the sender is gone."""
        left_s = _PACE_GRACE_S + self._bytes / _PACE_BYTES_PER_S - self._waited_s
        data = b"" if self.ended or left_s <= 0 else self._receive(size, left_s)
        self._bytes += len(data)
        self.ended = not data
        return data

    def _receive(self, size: int, left_s: float) -> bytes:
        own_s, began = self._sock.gettimeout(), time.monotonic()
        self._sock.settimeout(left_s if own_s is None else min(own_s, left_s))
        try:
            return bytes(self._sock.recv(size))
        except TimeoutError:
            return b""
        finally:
            self._waited_s += time.monotonic() - began
            self._sock.settimeout(own_s)


class GuardedWorker(ThreadWorker):  # type: ignore[misc]
    """Gunicorn's threaded worker with the rules above; every method runs on the event loop except ``handle``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: dict[Connection, None] = {}
        self._receiving: dict[Connection, None] = {}
        self._lingering: dict[Connection, None] = {}
        self._queued: deque[Connection] = deque()
        self._active: Counter[str] = Counter()
        self._checked_at = 0.0
        # One machine never gets the last quarter of the threads.
        self._threads_per_machine = max(2, self.cfg.threads * 3 // 4)

    # -- receiving --------------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Take a new connection and wait for its request on the poller."""
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        connection = Connection(self, sock, client, listener.getsockname())
        self._open[connection] = None
        self._enforce_limits(connection)
        if connection in self._open:
            self.enqueue_req(connection)

    def _enforce_limits(self, new: Connection) -> None:
        """Close the oldest idle connection where there are too many: of the same machine, or of the machine that has most."""
        if sum(1 for item in self._open if item.machine == new.machine) > MAX_CONNECTIONS_PER_MACHINE:
            self._evict(new.machine, new)
        elif self.nr_conns >= self.worker_connections:
            [(largest, _)] = Counter(item.machine for item in self._open).most_common(1)
            self._evict(largest, new)

    def _evict(self, machine: str, new: Connection) -> None:
        idle = (item for item in self._open if item.machine == machine and item is not new and self._is_idle(item))
        self._drop(next(idle, new))

    def _is_idle(self, connection: Connection) -> bool:
        return connection in self._receiving or connection in self._lingering or connection in self.keepalived_conns

    def _drop(self, connection: Connection) -> None:
        """Close a connection that no thread works on."""
        self._unwatch(connection)
        if connection in self.keepalived_conns:
            self.keepalived_conns.remove(connection)
        self._receiving.pop(connection, None)
        if self._lingering.pop(connection, self) is self:
            self.nr_conns -= 1  # gunicorn no longer counts a connection once its answer is complete
        connection.close()

    def _unwatch(self, connection: Connection) -> None:
        try:
            self.poller.unregister(connection.sock)
        except (KeyError, ValueError, OSError):
            return  # not watched

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._open.pop(connection, None)
        self._lingering.pop(connection, None)

    def on_client_socket_readable(self, conn: Connection, client: Any) -> None:
        """Read the next request of a kept-alive connection."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self.enqueue_req(conn)

    def enqueue_req(self, conn: Connection) -> None:
        """Wait for a complete request; gunicorn calls this where it would give the connection to a thread."""
        try:
            self._prepare(conn)
        except (OSError, ValueError):  # the client has closed it
            self.nr_conns -= 1
            conn.close()
            return
        self._receiving[conn] = None
        if self._is_complete(conn):  # pipelined behind the last one
            self._dispatch(conn)
        elif conn in self._receiving:
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._readable, conn))
            self._readable(conn, conn.sock)  # bytes that TLS has buffered do not make the socket readable

    def _prepare(self, conn: Connection) -> None:
        if not conn.initialized:
            if self.cfg.is_ssl:
                conn.sock = gunicorn_sock.ssl_wrap_socket(conn.sock, self.cfg)
            conn.parser = get_parser(self.cfg, conn.sock, conn.client)
            conn.initialized = True
        conn.sock.setblocking(False)
        conn.deadline = time.monotonic() + HEAD_S
        conn.has_continued = False
        unreader = conn.parser.unreader
        conn.received, unreader.buf = bytearray(unreader.buf.getvalue()), BytesIO()

    def _readable(self, conn: Connection, _sock: Any) -> None:
        """Read what the socket has, until the request is complete."""
        try:
            if not conn.is_handshake_done:
                conn.sock.do_handshake()
                conn.is_handshake_done = True
            while conn in self._receiving and not self._is_complete(conn):
                data = conn.sock.recv(_RECV_BYTES)
                if not data:
                    self._drop(conn)
                    return
                conn.received += data
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:
            self.poller.modify(conn.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, partial(self._readable, conn))
            return
        except (OSError, ValueError):
            self._drop(conn)
            return
        if conn in self._receiving:
            self._unwatch(conn)
            self._dispatch(conn)

    def _is_complete(self, conn: Connection) -> bool:
        """Whether a thread can handle the request without waiting for a client that has not logged in."""
        end = conn.received.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
        if end < 0:
            if len(conn.received) >= _MAX_HEAD_BYTES:
                self._refuse(conn, "431 Request Header Fields Too Large")
            return False
        head = bytes(conn.received[: end + 4])
        if _API.match(head):  # the application reads these bodies only after a login, and keeps the received part of an upload
            return True
        if _CHUNKED.search(head):  # of unknown length, which only an upload needs
            self._refuse(conn, "411 Length Required")
            return False
        length = int(match[1]) if (match := _LENGTH.search(head)) else 0
        if length > _SMALL_BODY_BYTES or len(conn.received) >= end + 4 + length:
            return True
        if not conn.has_continued and _EXPECT.search(head):
            conn.has_continued = True
            self._send(conn, b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    def _send(self, conn: Connection, answer: bytes) -> None:
        try:
            conn.sock.send(answer)
        except (OSError, ValueError):
            self.log.debug("client closed before its answer")

    def _refuse(self, conn: Connection, status: str) -> None:
        """Answer a request that gets no thread, and close."""
        self._send(conn, f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        self._unwatch(conn)
        self._receiving.pop(conn, None)
        self.nr_conns -= 1
        conn.close(graceful=True)

    # -- threads -----------------------------------------------------------------------------------------------------

    def _dispatch(self, conn: Connection) -> None:
        """Give a complete request to a thread, unless its machine uses its share of threads already."""
        self._receiving.pop(conn, None)
        if self._active[conn.machine] >= self._threads_per_machine:
            self._queued.append(conn)
            return
        self._active[conn.machine] += 1
        conn.parser.unreader.unread(bytes(conn.received))
        conn.received.clear()
        super().enqueue_req(conn)

    def handle(self, conn: Connection) -> Any:
        """Answer a request, in a thread; its body must keep the minimum speed."""
        conn.parser.unreader.sock = PacedSocket(conn.sock)
        return super().handle(conn)

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """Whether to keep the connection: not after a body that was not read or is incomplete, so that no thread waits for the rest."""
        complete = keepalive and conn.parser.finish_body(deadline=time.monotonic() + 0.05)
        return bool(complete and not conn.parser.unreader.sock.ended)

    def finish_request(self, conn: Connection, fs: Any) -> None:
        """Give the free thread to the next connection that waits for its machine's share."""
        self._active[conn.machine] -= 1
        if not self._active[conn.machine]:
            del self._active[conn.machine]
        super().finish_request(conn, fs)
        if conn in self.keepalived_conns and isinstance(conn.sock, ssl.SSLSocket) and conn.sock.pending():
            self.on_client_socket_readable(conn, conn.sock)
        for waiting in list(self._queued):
            if self._active[waiting.machine] < self._threads_per_machine:
                self._queued.remove(waiting)
                self._dispatch(waiting)
                break

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Refuse an invalid request without quoting it (gunicorn quotes it in the log and in the answer)."""
        del req, addr
        invalid = isinstance(exc, ParseException | ssl.SSLError)
        if invalid:
            self.log.warning("invalid request: %s", type(exc).__name__)
        else:
            self.log.error("request crashed", exc_info=exc)
        try:
            util.write_error(client, *((400, "Bad Request") if invalid else (500, "Internal Server Error")), "")
        except OSError:
            self.log.debug("client closed before its answer")

    # -- closing -----------------------------------------------------------------------------------------------------

    def linger(self, conn: Connection) -> bool:
        """Half-close and drain the input, so that no reset cuts the answer off (RFC 9112 9.6); False when the client is gone."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._drain, conn))
        except (OSError, ValueError, KeyError):
            return False
        conn.deadline, conn.drained = time.monotonic() + _LINGER_S, 0
        self._lingering[conn] = None
        return True

    def _drain(self, conn: Connection, _sock: Any) -> None:
        try:
            data = conn.sock.recv(_RECV_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, ValueError):
            data = b""
        conn.drained += len(data)
        if not data or conn.drained > _LINGER_BYTES:
            self._drop(conn)

    def murder_pending(self) -> None:
        """Close connections past their deadline, and when stopping, those that have sent nothing; gunicorn calls this in every round."""
        now = time.monotonic()
        if now - self._checked_at < _CHECK_EVERY_S:
            return
        self._checked_at = now
        for conn in [item for item in (*self._receiving, *self._lingering) if item.deadline <= now or self._is_silent(item)]:
            if conn in self._receiving and conn.received:
                self._refuse(conn, "408 Request Timeout")
            else:
                self._drop(conn)

    def _is_silent(self, conn: Connection) -> bool:
        return not self.alive and conn in self._receiving and not conn.received
