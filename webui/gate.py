"""The gate: a connection gets one of the server's threads only when its request is whole, and none is waited for on the loop.

gunicorn's threads read a request's head and body from the line themselves and its loop lingers two seconds over every client that
does not close: a few clients that drip bytes, without any login, then hold the whole page. So here, on top of its ThreadWorker:

* TLS handshake, head and the bodies of forms are read by the loop, without blocking, under one deadline (``HEAD_S``);
* any other body, which is read only from somebody logged in, must keep a minimum speed (``Pace``);
* connections are counted for each machine: beyond ``PER_PEER`` its oldest idle one goes, and it never has every thread;
* a close waits for the client on the loop's poller, not in a sleep.
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

from webui.peers import machine

# From the first byte of silence to the last byte of head (and small body): whoever needs longer is no browser.
HEAD_S: Final = 15.0
PER_PEER: Final = 64
CONNECTIONS: Final = 400
_MAX_HEAD_BYTES: Final = 32 << 10
# Forms; a page refuses a larger body without reading it.
_SMALL_BODY_BYTES: Final = 64 << 10
_PACE_GRACE_S: Final = 15.0
_PACE_BYTES_PER_S: Final = 2048
_LINGER_S: Final = 2.0
_LINGER_BYTES: Final = 256 << 10
_LOOK_EVERY_S: Final = 0.25
_RECV_BYTES: Final = 16 << 10

_LENGTH: Final = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding[ \t]*:", re.IGNORECASE)
_EXPECT: Final = re.compile(rb"\r\nexpect[ \t]*:[ \t]*100-continue", re.IGNORECASE)
_API: Final = re.compile(rb"[A-Z]{3,7} /api/")


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """One connection, with what has arrived of its next request."""

    def __init__(self, worker: Worker, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(worker.cfg, sock, client, server)
        self.worker = worker
        self.peer = machine(str(client[0]) if isinstance(client, tuple) and client else "")
        self.shaken = not self.cfg.is_ssl
        self.arrived = bytearray()
        self.deadline = 0.0
        self.answered = False
        self.continued = False
        self.drained = 0

    def close(self, graceful: bool = False) -> None:
        """Close at once, or, as gunicorn asks after an answer, when the client has read it; the loop goes on meanwhile."""
        if not (graceful and self.worker.linger(self)):
            util.close(self.sock)
            self.worker.forget(self)


class Pace:
    """A socket for reading a body: a sender slower than anybody real, or silent, counts as gone (``ended``), as if it had closed.

    An end and no error, since gunicorn would throw away with an error what it holds of an unfinished read.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._waited_s = 0.0
        self._bytes = 0
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        """Everything but ``recv`` is the socket's own."""
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """Some bytes, waited for no longer than the pace so far allows; none when the sender is gone."""
        left_s = _PACE_GRACE_S + self._bytes / _PACE_BYTES_PER_S - self._waited_s
        data = b"" if self.ended or left_s <= 0 else self._received(size, left_s)
        self._bytes += len(data)
        self.ended = not data
        return data

    def _received(self, size: int, left_s: float) -> bytes:
        own_s, began = self._sock.gettimeout(), time.monotonic()
        self._sock.settimeout(left_s if own_s is None else min(own_s, left_s))
        try:
            return bytes(self._sock.recv(size))
        except TimeoutError:
            return b""
        finally:
            self._waited_s += time.monotonic() - began
            self._sock.settimeout(own_s)


class Worker(ThreadWorker):  # type: ignore[misc]
    """Gunicorn's threads behind the gate; every method below runs on the loop except ``handle``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: dict[Connection, None] = {}
        self._arriving: dict[Connection, None] = {}
        self._lingering: dict[Connection, None] = {}
        self._queued: deque[Connection] = deque()
        self._busy: Counter[str] = Counter()
        self._looked_at = 0.0
        # One machine, however it behaves, leaves a quarter of the threads to the others.
        self._threads_per_peer = max(2, self.cfg.threads * 3 // 4)

    # -- arriving ----------------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Take a new connection and wait for its request on the poller."""
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        connection = Connection(self, sock, client, listener.getsockname())
        self._open[connection] = None
        self._make_room(connection)
        if connection in self._open:
            self.enqueue_req(connection)

    def _make_room(self, fresh: Connection) -> None:
        """Let the oldest idle connection go where there are too many: of the same machine, or of the one that has most."""
        if sum(1 for item in self._open if item.peer == fresh.peer) > PER_PEER:
            self._evict(fresh.peer, fresh)
        elif self.nr_conns >= self.worker_connections:
            [(crowd, _)] = Counter(item.peer for item in self._open).most_common(1)
            self._evict(crowd, fresh)

    def _evict(self, peer: str, fresh: Connection) -> None:
        idle = (item for item in self._open if item.peer == peer and item is not fresh and self._is_idle(item))
        self._drop(next(idle, fresh))

    def _is_idle(self, connection: Connection) -> bool:
        return connection in self._arriving or connection in self._lingering or connection in self.keepalived_conns

    def _drop(self, connection: Connection) -> None:
        """End a connection that no thread works on."""
        self._unwatch(connection)
        if connection in self.keepalived_conns:
            self.keepalived_conns.remove(connection)
        self._arriving.pop(connection, None)
        if self._lingering.pop(connection, self) is self:
            self.nr_conns -= 1  # one that lingers was taken off by gunicorn when its answer was done
        connection.close()

    def _unwatch(self, connection: Connection) -> None:
        try:
            self.poller.unregister(connection.sock)
        except (KeyError, ValueError, OSError):
            return  # not watched

    def forget(self, connection: Connection) -> None:
        """A connection is closed for good."""
        self._open.pop(connection, None)
        self._lingering.pop(connection, None)

    def on_client_socket_readable(self, conn: Connection, client: Any) -> None:
        """A kept connection begins its next request."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self.enqueue_req(conn)

    def enqueue_req(self, conn: Connection) -> None:
        """Wait for a whole request; gunicorn calls this where it would give the connection to a thread."""
        try:
            self._prepare(conn)
        except (OSError, ValueError):  # gone already
            self.nr_conns -= 1
            conn.close()
            return
        self._arriving[conn] = None
        if self._whole(conn):  # pipelined behind the last one
            self._dispatch(conn)
        elif conn in self._arriving:
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._readable, conn))
            self._readable(conn, conn.sock)  # what TLS holds already makes no socket readable

    def _prepare(self, conn: Connection) -> None:
        if not conn.initialized:
            if self.cfg.is_ssl:
                conn.sock = gunicorn_sock.ssl_wrap_socket(conn.sock, self.cfg)
            conn.parser = get_parser(self.cfg, conn.sock, conn.client)
            conn.initialized = True
        conn.sock.setblocking(False)
        conn.deadline = time.monotonic() + HEAD_S
        conn.continued = False
        unreader = conn.parser.unreader
        conn.arrived, unreader.buf = bytearray(unreader.buf.getvalue()), BytesIO()

    def _readable(self, conn: Connection, _sock: Any) -> None:
        """Take what the line has, until the request is whole."""
        try:
            if not conn.shaken:
                conn.sock.do_handshake()
                conn.shaken = True
            while conn in self._arriving and not self._whole(conn):
                data = conn.sock.recv(_RECV_BYTES)
                if not data:
                    self._drop(conn)
                    return
                conn.arrived += data
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:
            self.poller.modify(conn.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, partial(self._readable, conn))
            return
        except (OSError, ValueError):
            self._drop(conn)
            return
        if conn in self._arriving:
            self._unwatch(conn)
            self._dispatch(conn)

    def _whole(self, conn: Connection) -> bool:
        """Whether a thread can go on with the request without waiting for what a stranger sends."""
        end = conn.arrived.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES)
        if end < 0:
            if len(conn.arrived) >= _MAX_HEAD_BYTES:
                self._refuse(conn, "431 Request Header Fields Too Large")
            return False
        head = bytes(conn.arrived[: end + 4])
        if _API.match(head):  # the application reads these bodies only when it knows the sender, and keeps what came of an upload
            return True
        if _CHUNKED.search(head):  # of unknown length, and nothing but an upload has a use for that
            self._refuse(conn, "411 Length Required")
            return False
        length = int(match[1]) if (match := _LENGTH.search(head)) else 0
        if length > _SMALL_BODY_BYTES or len(conn.arrived) >= end + 4 + length:
            return True
        if not conn.continued and _EXPECT.search(head):
            conn.continued = True
            self._tell(conn, b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    def _tell(self, conn: Connection, answer: bytes) -> None:
        try:
            conn.sock.send(answer)
        except (OSError, ValueError):
            self.log.debug("a client was gone before its answer")

    def _refuse(self, conn: Connection, status: str) -> None:
        """Answer what no thread shall see, and close."""
        self._tell(conn, f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
        self._unwatch(conn)
        self._arriving.pop(conn, None)
        self.nr_conns -= 1
        conn.close(graceful=True)

    # -- threads -----------------------------------------------------------------------------------------------------

    def _dispatch(self, conn: Connection) -> None:
        """Give a whole request to a thread, unless its machine has its share of them already."""
        self._arriving.pop(conn, None)
        if self._busy[conn.peer] >= self._threads_per_peer:
            self._queued.append(conn)
            return
        self._busy[conn.peer] += 1
        conn.parser.unreader.unread(bytes(conn.arrived))
        conn.arrived.clear()
        super().enqueue_req(conn)

    def handle(self, conn: Connection) -> Any:
        """Answer a request (in a thread); its body keeps the pace."""
        conn.parser.unreader.sock = Pace(conn.sock)
        return super().handle(conn)

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """A body that nobody read, or that broke off, ends the connection: no thread waits for the rest of it."""
        whole = keepalive and conn.parser.finish_body(deadline=time.monotonic() + 0.05)
        return bool(whole and not conn.parser.unreader.sock.ended)

    def finish_request(self, conn: Connection, fs: Any) -> None:
        """A thread is done: the next of those that waited for their machine's share takes its place."""
        self._busy[conn.peer] -= 1
        if not self._busy[conn.peer]:
            del self._busy[conn.peer]
        super().finish_request(conn, fs)
        if conn in self.keepalived_conns and isinstance(conn.sock, ssl.SSLSocket) and conn.sock.pending():
            self.on_client_socket_readable(conn, conn.sock)
        for waiting in list(self._queued):
            if self._busy[waiting.peer] < self._threads_per_peer:
                self._queued.remove(waiting)
                self._dispatch(waiting)
                break

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Refuse what is no request, quoting nothing of it (gunicorn's own would, in the log and in the answer)."""
        del req, addr
        invalid = isinstance(exc, ParseException | ssl.SSLError)
        if invalid:
            self.log.warning("not a request: %s", type(exc).__name__)
        else:
            self.log.error("request crashed", exc_info=exc)
        try:
            util.write_error(client, *((400, "Bad Request") if invalid else (500, "Internal Server Error")), "")
        except OSError:
            self.log.debug("a client was gone before its answer")

    # -- leaving -----------------------------------------------------------------------------------------------------

    def linger(self, conn: Connection) -> bool:
        """Half-close and drain what still comes, so that no reset cuts the answer off (RFC 9112 9.6); False when it is gone."""
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
        """Called in every round of the loop: end what is past its deadline, and when stopping, what has sent nothing yet."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        for conn in [item for item in (*self._arriving, *self._lingering) if item.deadline <= now or self._is_silent(item)]:
            if conn in self._arriving and conn.arrived:
                self._refuse(conn, "408 Request Timeout")
            else:
                self._drop(conn)

    def _is_silent(self, conn: Connection) -> bool:
        return not self.alive and conn in self._arriving and not conn.arrived
