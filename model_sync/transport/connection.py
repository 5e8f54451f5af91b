"""The connection to the library: one HTTP session, with the limits, counters and deadlines that all responses share.

Every error of `requests`, `urllib3` or the socket, before or during a body, is translated to one of
:mod:`model_sync.transport.errors`; python-tuf's own fetcher does not translate all of them.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from model_sync.settings import SyncSettings
from model_sync.transport.budget import DayBudget, SpeedCheck, TokenBucket
from model_sync.transport.errors import BudgetExhausted, NotTheLibrary, Refused, TooSlow, Unreachable

# The body of an error is read up to this length, so that the connection can be reused; after a longer one it is closed.
_ERROR_BODY_BYTES = 4096
_LOW_LEVEL = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
_WRONG_URL = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)


class Connection:
    """A keep-alive session.

    Attributes:
        received_bytes: Body bytes received so far.
        last_server_date: The Date header of the last response.
    """

    def __init__(
        self,
        settings: SyncSettings,
        bucket: TokenBucket,
        budget: DayBudget,
        clock: Callable[[], float],
        check_stop: Callable[[], None],
    ) -> None:
        self.received_bytes = 0
        self.last_server_date: datetime | None = None
        self._settings = settings
        self._bucket = bucket
        self._budget = budget
        self._clock = clock
        self._check_stop = check_stop
        self._session = _session(settings)

    def close(self) -> None:
        """Close the open connections."""
        self._session.close()

    @contextmanager
    def get(self, url: str, headers: dict[str, str], *, small: bool) -> Iterator[LibraryResponse]:
        """Send one GET; the response is usable inside the block and has a status below 300.

        Args:
            url: An absolute http or https URL.
            headers: Headers beside the usual ones.
            small: Whether the response may use the reserve of the day's budget.

        Raises:
            Unreachable, TooSlow, Refused, NotTheLibrary, BudgetExhausted: see there.
        """
        host = host_of(url)
        self._budget.reload()
        self._budget.remaining_bytes(small=small)
        with _translated_errors(host):
            response = self._session.get(
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(self._settings.connect_timeout_s, self._settings.read_timeout_s),
            )
        try:
            self._note_date(response)
            answer = LibraryResponse(response, host, self._reader(response, host, small))
            self._check_status(answer)
            yield answer
        finally:
            response.close()
            self._budget.save()

    def _reader(self, response: requests.Response, host: str, small: bool) -> Callable[[int], bytes]:
        settings = self._settings
        slowest = settings.min_speed_bytes_per_s
        if self._bucket.rate is not None:
            slowest = min(slowest, self._bucket.rate / 2)
        gate = SpeedCheck(slowest, settings.min_speed_window_s, self._clock, host)

        def read(wanted: int) -> bytes:
            """Return up to ``wanted`` bytes as they come; empty at the end of the body."""
            self._check_stop()
            room = self._budget.remaining_bytes(small=small)
            granted = self._bucket.take(wanted if room is None else min(wanted, room))
            gate.start()
            with _translated_errors(host):
                chunk = bytes(response.raw.read1(granted, decode_content=False) or b"")
            self._bucket.give_back(granted - len(chunk))
            self.received_bytes += len(chunk)
            self._budget.add(len(chunk))
            gate.stop(len(chunk))
            return chunk

        return read

    def _note_date(self, response: requests.Response) -> None:
        try:
            date = parsedate_to_datetime(response.headers.get("Date", ""))
        except (ValueError, TypeError, OverflowError):
            return
        self.last_server_date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)

    def _check_status(self, answer: LibraryResponse) -> None:
        status = answer.status
        if 300 <= status < 400:
            raise NotTheLibrary(f"{answer.host} answered with a redirect ({status}); the library never redirects")
        if status >= 400:
            # A broken error body changes nothing about the error.
            with contextlib.suppress(Unreachable, TooSlow, BudgetExhausted):
                length = answer.content_length()
                if length is not None and length <= _ERROR_BODY_BYTES:
                    while answer.read(_ERROR_BODY_BYTES):
                        pass
            raise Refused(f"{answer.host} answered {status}", status, retry_after_s=_retry_after_s(answer, self.last_server_date))
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise NotTheLibrary(f"{answer.host} sent a body encoded as {encoding!r}, which was not requested")


class LibraryResponse:
    """A response with a valid status and encoding.

    Attributes:
        status: 200, 206 or another status below 300.
        headers: Case-insensitive.
        host: The server, without credentials.
        read: Returns up to so many bytes as they arrive; empty at the end of the body.
    """

    def __init__(self, response: requests.Response, host: str, read: Callable[[int], bytes]) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.host = host
        self.read = read

    @property
    def is_page(self) -> bool:
        """Whether the content type is a web page."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return kind in ("text/html", "application/xhtml+xml")

    @property
    def etag(self) -> str:
        """The strong ETag; empty when there is none (a weak one must not be used for If-Range)."""
        etag = self.headers.get("ETag", "").strip()
        return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else ""

    @property
    def validator(self) -> str:
        """The validator for If-Range: the strong ETag or the Last-Modified; empty when there is neither."""
        return self.etag or self.headers.get("Last-Modified", "").strip()

    def content_length(self) -> int | None:
        """Return the announced length; None when it is absent or not readable. The bytes are counted anyway."""
        text = self.headers.get("Content-Length", "").strip()
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) else None


def _retry_after_s(answer: LibraryResponse, server_date: datetime | None) -> float:
    """Return the seconds of Retry-After, given as a number or as a date; 0 when there is none that can be read."""
    text = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - (server_date or datetime.now(timezone.utc))).total_seconds())


def host_of(url: str) -> str:
    """Return the host and port of a URL, without user name and password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "the library", parts.port
    except ValueError:
        return "the library"
    return f"{host}:{port}" if port else host


@contextmanager
def _translated_errors(host: str) -> Iterator[None]:
    """Translate the errors of the network libraries to errors of this package."""
    try:
        yield
    except _WRONG_URL as error:
        raise Unreachable(f"{host}: the URL is not valid", code="sync.url", final=True) from error
    except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError) as error:
        raise TooSlow(f"{host} was silent for too long") from error
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        raise Unreachable(f"{host}: no secure connection ({_cause(error)})", code="sync.tls") from error
    except _LOW_LEVEL as error:
        raise Unreachable(f"{host}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return the innermost reason in one line; the outer errors repeat the URL, which may contain a password."""
    innermost: BaseException = error
    for _ in range(10):
        inner = getattr(innermost, "reason", None) or innermost.__cause__ or innermost.__context__
        if not isinstance(inner, BaseException):
            break
        innermost = inner
    text = innermost.strerror if isinstance(innermost, OSError) and innermost.strerror else str(innermost)
    return f"{type(innermost).__name__}: {text.splitlines()[0][:200] if text else 'no reason given'}"


class _HeaderDeadline:
    """Limits the time for the headers of a response to twice the read timeout, even when single bytes arrive."""

    sock: socket.socket | None
    timeout: float | None

    def getresponse(self) -> Any:
        connection, silence = self.sock, self.timeout
        if connection is None or silence is None:
            return super().getresponse()  # type: ignore[misc]
        timer = threading.Timer(2 * silence, _hang_up, (connection,))
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Connection(_HeaderDeadline, urllib3.connection.HTTPConnection):
    pass


class _SecureConnection(_HeaderDeadline, urllib3.connection.HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    """Connections with a deadline for headers, and with a receive buffer that fits the bandwidth limit.

    With a larger buffer the kernel would receive the first megabytes at full speed.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        super().__init__(max_retries=0)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        sockets = list(urllib3.connection.HTTPConnection.default_socket_options)
        if self._rate is not None:
            sockets.append((socket.SOL_SOCKET, socket.SO_RCVBUF, max(8192, min(1 << 20, int(self._rate / 2)))))
        super().init_poolmanager(*arguments, socket_options=sockets, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


def _session(settings: SyncSettings) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy, netrc or CA bundle that was set for another program
    session.headers.clear()
    session.headers.update({"User-Agent": f"model-sync/{installed_version()}", "Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.verify = str(settings.ca_certificate) if settings.ca_certificate else True
    adapter = _Adapter(settings.rate_limit_bytes_per_s)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def installed_version() -> str:
    """Return the version of the installed package; 0 when it runs from its source."""
    try:
        return version("clinic-edge-appliance")
    except PackageNotFoundError:
        return "0"
