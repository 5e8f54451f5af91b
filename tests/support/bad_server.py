"""A real HTTP server on 127.0.0.1 that misbehaves on request: raw sockets, so that it can lie about anything.

It behaves well (keep-alive, strong ETag, Last-Modified, If-Range, single ranges, 416) until it is told otherwise::

    with BadServer({"/targets/a.bin": data}) as server:
        server.script("/targets/a.bin", Reply(cut_after=1_500_000), Reply(status=503), Reply(content_range="bytes 5-9/10"))
        server.always("/metadata/timestamp.json", CAPTIVE_PORTAL)
        ... requests to f"{server.url}/targets/a.bin" ...
        assert server.sent_bytes < 1.02 * len(data)

``script`` uses up one Reply per request and then behaves well again; ``always`` answers every request so. The path ``"*"`` is for
every path that has no script of its own. Instead of a Reply a function ``Request -> Reply`` may be given. Every request is in
``server.log``, with the bytes that went out for it, headers included. ``put`` changes a file, and with it its ETag. ``stop`` and
``start`` take the server down and up again on the same port.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import TypeAlias

LOGIN_PAGE = b"<!DOCTYPE html><html><head><title>Wi-Fi login</title></head><body>Please log in.</body></html>"
_PIECE_BYTES = 16 * 1024


@dataclass
class Request:
    """One request as it came, and what went out for it.

    Attributes:
        path: The path with its query, as sent.
        headers: With lower-case names.
        sent_bytes: Bytes of the answer handed to the kernel, headers included.
        body_bytes: Those of the body alone.
        received_bytes: Bytes of the request.
    """

    method: str
    path: str
    headers: dict[str, str]
    received_bytes: int = 0
    sent_bytes: int = 0
    body_bytes: int = 0


@dataclass(frozen=True)
class Reply:
    """One answer; every field that is left alone behaves well.

    Attributes:
        status: Another status, with ``body`` (empty if None) instead of the file.
        body: Another body, with whatever status is right.
        headers: Headers to add or to replace; None leaves one out.
        content_range: Another Content-Range for a 206; an empty string leaves it out.
        shift: A range is answered with the bytes that lie so much later (or earlier) in the file, and says so.
        ignore_range: Answer 200 with the whole file to a range.
        ignore_if_range: Answer 206 although the validator is an old one.
        garble: Flip every bit of each body byte from this offset of the body on.
        cut_after: Close the connection after so many bytes of the body.
        reset: Close by RST instead of FIN; what the kernel still held back never goes out, although it is counted as sent.
        stall_after: Say nothing more after so many bytes of the body, until the client goes away.
        drip: (bytes, seconds): send so many bytes, wait so long, and so on.
        drip_headers: Send the headers so too.
        endless: The body never ends.
        chunked: Send the body with chunked transfer coding, without Content-Length.
        hang_up: Close without any answer.
        raw: Send exactly these bytes and close.
        wait: Do not answer before this event is set.
    """

    status: int | None = None
    body: bytes | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    content_range: str | None = None
    shift: int = 0
    ignore_range: bool = False
    ignore_if_range: bool = False
    garble: int | None = None
    cut_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    drip: tuple[int, float] | None = None
    drip_headers: bool = False
    endless: bool = False
    chunked: bool = False
    hang_up: bool = False
    raw: bytes | None = None
    wait: threading.Event | None = None


Script: TypeAlias = "Reply | Callable[[Request], Reply]"

GOOD = Reply()
CAPTIVE_PORTAL = Reply(status=200, body=LOGIN_PAGE, headers={"Content-Type": "text/html; charset=utf-8"})
CAPTIVE_REDIRECT = Reply(status=302, headers={"Location": "http://login.invalid/"})
CAPTIVE_FORBIDDEN = Reply(status=403, body=LOGIN_PAGE, headers={"Content-Type": "text/html"})
DOWN = Reply(status=503)
GZIP = Reply(headers={"Content-Encoding": "gzip"})
HUGE_HEADERS = Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 60_000) for n in range(120)) + b"\r\n")


class BadServer:
    """The server; a context manager. ``files`` maps paths to bytes, ``directory`` serves a tree besides, and
    ``send_buffer`` bounds what the kernel holds back of an answer, so that ``sent_bytes`` is what the client has taken.

    Attributes:
        url: Base URL, without a slash at the end.
        log: Every request so far, in order.
        connections: How many connections there were so far.
    """

    def __init__(
        self,
        files: dict[str, bytes] | None = None,
        *,
        directory: Path | None = None,
        tls: ssl.SSLContext | None = None,
        send_buffer: int = 0,
    ) -> None:
        self._files = dict(files or {})
        self._directory = directory
        self._tls = tls
        self._send_buffer = send_buffer
        self._lock = threading.Lock()
        self._queues: dict[str, list[Script]] = {}
        self._always: dict[str, Script] = {}
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.log: list[Request] = []
        self.connections = 0
        self.port = 0

    def __enter__(self) -> BadServer:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def sent_bytes(self) -> int:
        """Bytes sent in all answers so far, headers included."""
        return sum(request.sent_bytes for request in list(self.log))

    @property
    def wire_bytes(self) -> int:
        """Bytes of all requests and answers so far, above TCP."""
        return sum(request.sent_bytes + request.received_bytes for request in list(self.log))

    @property
    def idle(self) -> bool:
        """Whether no connection is open."""
        with self._lock:
            return not self._connections

    def put(self, path: str, data: bytes) -> None:
        """Serve other bytes under a path from now on, with another ETag."""
        self._files[path] = data

    def script(self, path: str, *replies: Script) -> None:
        """Answer the next requests for a path so, one after the other."""
        with self._lock:
            self._queues.setdefault(path, []).extend(replies)

    def always(self, path: str, reply: Script) -> None:
        """Answer every request for a path so, once its script is used up."""
        with self._lock:
            self._always[path] = reply

    def requests(self, path: str) -> list[Request]:
        """Return the requests for one path."""
        return [request for request in list(self.log) if request.path == path]

    def start(self) -> None:
        """Listen; on the same port as before, if there was one."""
        self._stopping.clear()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def stop(self) -> None:
        """Refuse connections and break those that are open."""
        self._stopping.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(timeout=10)

    # -- connections -------------------------------------------------------------------------------------------------

    def _spawn(self, target: Callable[[socket.socket], None], argument: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(argument,), daemon=True)
        with self._lock:
            self._threads = [old for old in self._threads if old.is_alive()]
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._send_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        raw = connection
        with self._lock:
            self._connections.add(connection)
        try:
            if self._tls is not None:
                connection.settimeout(5)
                connection = self._tls.wrap_socket(connection, server_side=True)
                connection.settimeout(None)
                with self._lock:
                    self._connections.add(connection)
            with connection, connection.makefile("rb") as reader:
                while not self._stopping.is_set() and self._answer(connection, reader):
                    pass
        except (OSError, ValueError, ssl.SSLError):
            connection.close()  # the client went away: that is its right
        finally:
            with self._lock:
                self._connections -= {raw, connection}

    def _answer(self, connection: socket.socket, reader) -> bool:  # type: ignore[no-untyped-def]
        """Answer one request; return whether the connection stays open."""
        lines = []
        while line := reader.readline(65536):
            lines.append(line)
            if line in (b"\r\n", b"\n"):
                break
        if len(lines) < 2:
            return False
        method, path, _ = lines[0].decode("latin-1").split(" ", 2)
        headers = {}
        for line in lines[1:-1]:
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        request = Request(method, path, headers, received_bytes=sum(map(len, lines)))
        with self._lock:
            self.log.append(request)
        return self._send(connection, request, self._next(request))

    def _next(self, request: Request) -> Reply:
        with self._lock:
            script: Script = GOOD
            for path in (request.path, "*"):
                if self._queues.get(path):
                    script = self._queues[path].pop(0)
                    break
                if path in self._always:
                    script = self._always[path]
                    break
        return script if isinstance(script, Reply) else script(request)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _content(self, path: str) -> bytes | None:
        if path in self._files:
            return self._files[path]
        if self._directory is not None:
            file = self._directory / path.lstrip("/")
            if ".." not in path and file.is_file():
                return file.read_bytes()
        return None

    def _send(self, connection: socket.socket, request: Request, reply: Reply) -> bool:
        if reply.wait is not None:
            while not reply.wait.wait(0.05):
                if self._stopping.is_set():
                    return False
        if reply.hang_up or reply.raw is not None:
            self._put(connection, request, reply.raw or b"")
            return self._close(connection, reset=reply.reset)
        status, headers, body = self._right(request, reply)
        if reply.garble is not None:
            body = body[: reply.garble] + bytes(byte ^ 0xFF for byte in body[reply.garble :])
        if reply.chunked or reply.endless:
            headers.pop("Content-Length", None)
        if reply.chunked:
            headers["Transfer-Encoding"] = "chunked"
        if reply.endless:
            headers["Connection"] = "close"
        for name, value in reply.headers.items():
            headers.pop(name, None)
            if value is not None:
                headers[name] = value
        head = f"HTTP/1.1 {status} Reply\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        raw = head.encode("latin-1")
        for piece in _pieces(raw, reply.drip[0]) if reply.drip and reply.drip_headers else [raw]:
            self._put(connection, request, piece)
            if reply.drip and reply.drip_headers and self._stopping.wait(reply.drip[1]):
                return False
        return self._send_body(connection, request, reply, body)

    def _right(self, request: Request, reply: Reply) -> tuple[int, dict[str, str], bytes]:
        """Return the right answer, but for what the reply says about status, body and range."""
        headers = {"Date": formatdate(usegmt=True)}
        data = reply.body if reply.body is not None else self._content(request.path)
        if reply.status is not None or data is None:
            body = reply.body or b""
            return reply.status or 404, headers | {"Content-Length": str(len(body))}, body
        etag = etag_of(data)
        headers |= {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        known = request.headers.get("if-range")
        if asked is None or reply.ignore_range or (known not in (None, etag, headers["Last-Modified"]) and not reply.ignore_if_range):
            return 200, headers | {"Content-Length": str(len(data))}, data
        start = int(asked[1]) + reply.shift
        if start >= len(data):
            return 416, headers | {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, b""
        end = min(int(asked[2]) if asked[2] else len(data) - 1, len(data) - 1)
        said = reply.content_range if reply.content_range is not None else f"bytes {start}-{end}/{len(data)}"
        if said:
            headers["Content-Range"] = said
        body = data[max(0, start) : end + 1]
        return 206, headers | {"Content-Length": str(len(body))}, body

    def _send_body(self, connection: socket.socket, request: Request, reply: Reply, body: bytes) -> bool:
        size, pause = reply.drip or (_PIECE_BYTES, 0.0)
        limits = [limit for limit in (reply.cut_after, reply.stall_after) if limit is not None]
        limit = min(limits, default=None)
        for piece in _endless(body, size) if reply.endless else _pieces(body if limit is None else body[:limit], size):
            if limit is not None:
                piece = piece[: limit - request.body_bytes]
            if not piece:
                break
            self._put(connection, request, b"%x\r\n%s\r\n" % (len(piece), piece) if reply.chunked else piece)
            request.body_bytes += len(piece)
            if pause and self._stopping.wait(pause):
                return False
        if reply.stall_after is not None:
            connection.settimeout(0.05)
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1):
                        return False
            return False
        if reply.cut_after is not None and reply.cut_after < len(body):
            return self._close(connection, reset=reply.reset)
        if reply.chunked:
            self._put(connection, request, b"0\r\n\r\n")
        return not reply.endless and "close" not in (reply.headers.get("Connection") or "") and not reply.reset

    @staticmethod
    def _put(connection: socket.socket, request: Request, data: bytes) -> None:
        connection.sendall(data)
        request.sent_bytes += len(data)

    @staticmethod
    def _close(connection: socket.socket, *, reset: bool) -> bool:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_WR)
        connection.close()
        return False


def etag_of(data: bytes) -> str:
    """Return the strong ETag that the server gives these bytes."""
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _endless(data: bytes, size: int) -> Iterator[bytes]:
    while True:
        yield from _pieces(data or b"x" * size, size)
