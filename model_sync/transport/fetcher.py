"""How the agent gets files from the library: python-tuf's port for downloads, with everything that slow, cut-prone lines need.

A file is asked for at each base URL in turn, then again after a pause, until it is there or its budget of attempts is used up.
Targets survive process death and reboot as parts (:mod:`model_sync.transport.parts`); metadata is small and held in memory. Nothing here
judges signatures: that is python-tuf's work, and what it finds wrong is dropped and fetched anew.

``download_bytes`` asks for metadata, ``download_file`` for a target of exactly ``max_length`` bytes, as ``tuf.ngclient.Updater``
does it; a URL ``library:metadata/...`` is metadata either way. The errors are those of :mod:`model_sync.transport.errors`.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TypeVar

from tuf.ngclient.fetcher import FetcherInterface

from model_sync.settings import SyncSettings
from model_sync.transport.budget import DayBudget, Tries, pause_s, process_bucket
from model_sync.transport.connection import Connection, host_of
from model_sync.transport.directory_fetcher import LIBRARY_SCHEME, DirectoryFetcher
from model_sync.transport.errors import (
    BudgetExhausted,
    DiskFull,
    Failure,
    NotTheLibrary,
    RangeViolation,
    Refused,
    TooLong,
    TooSlow,
    Unreachable,
)
from model_sync.transport.parts import SYNC_BYTES, Part, check_room, open_part
from model_sync.transport.transfer import fetch_metadata, fetch_target

__all__ = [
    "LIBRARY_SCHEME",
    "BudgetExhausted",
    "DirectoryFetcher",
    "DiskFull",
    "Failure",
    "Fetcher",
    "NotTheLibrary",
    "Progress",
    "RangeViolation",
    "Refused",
    "TooLong",
    "TooSlow",
    "Unreachable",
]

_METADATA = f"{LIBRARY_SCHEME}metadata/"
BUDGET_NAME = "budget.json"
# One file may cost this many times its length before the pull gives up until the next look: servers without ranges exist.
MAX_COST = 3
_SPARE_BYTES = 1024 * 1024
PROGRESS_S = 0.5
_NAP_S = 1.0
_ELSEWHERE_ATTEMPTS = 3
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Progress:
    """How far one file has come; ``rate_bytes_per_s`` is the mean since this download began."""

    file: str
    done_bytes: int
    total_bytes: int
    rate_bytes_per_s: float


class Fetcher(FetcherInterface):
    """Downloads from the library over HTTP.

    Args:
        settings: Timeouts, caps and budgets.
        parts_dir: Where unfinished targets lie; the same after a restart, and on the same disk as what they become.
        urls: Base URLs in order, instead of those of the settings.
        on_progress: Told about twice a second how far a target has come.
        may_continue: Called between chunks, before each attempt and during pauses; raises to stop, and the part is kept.
        clock: A monotonic clock in seconds.
        sleep: Waits some seconds.
        client_certificate: Certificate and key, as PEM files, for libraries that ask for them.
        now: The wall clock, for the day's budget.
        on_trouble: Told before each pause what went wrong and how many seconds the pause is, for a status that says so.

    Attributes:
        restarts: How often a download had to begin again from its first byte.
    """

    def __init__(
        self,
        settings: SyncSettings,
        parts_dir: Path,
        *,
        urls: Sequence[str] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        may_continue: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        client_certificate: tuple[Path, Path] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        on_trouble: Callable[[Failure, float], None] | None = None,
    ) -> None:
        self.restarts = 0
        self._passed_over: set[str] = set()
        self._settings = settings
        self._parts_dir = parts_dir
        self._bases = [url if url.endswith("/") else f"{url}/" for url in (settings.urls if urls is None else urls)]
        self._on_progress = on_progress
        self._on_trouble = on_trouble
        self._may_continue = may_continue or (lambda: None)
        self._clock = clock
        self._sleep = sleep
        bucket = process_bucket(settings.rate_limit_bytes_per_s, clock, sleep)
        budget = DayBudget(settings.state_dir / BUDGET_NAME, settings.day_budget_bytes, now)
        self._connection = Connection(settings, bucket, budget, clock, self._may_continue, client_certificate)
        self._memo: _Memo | None = None

    @property
    def received_bytes(self) -> int:
        """All body bytes received by this fetcher."""
        return self._connection.received_bytes

    @property
    def last_server_date(self) -> datetime | None:
        """The Date of the last answer, whoever gave it: a hint about the clock, no proof."""
        return self._connection.last_server_date

    def close(self) -> None:
        """Close the kept connections; the fetcher can still be used."""
        self._connection.close()

    def pass_over(self) -> bool:
        """Leave out the base URL that answered last, because its answers were signed wrongly or are old; forget what it said.

        Returns False, leaving none out, when no other is left: then it was not the mirror.
        """
        self._passed_over.update(self._bases[:1])
        if self._memo is not None:
            self._memo = _Memo(self._memo.ttl_s, self._clock)
        if all(base in self._passed_over for base in self._bases):
            self._passed_over.clear()
            return False
        return True

    def ask_all(self) -> None:
        """Ask every base URL again."""
        self._passed_over.clear()

    @contextmanager
    def view(self, ttl_s: float = 300.0) -> Iterator[None]:
        """Remember metadata answers inside the block, so that a fresh Updater per target costs nothing on the wire.

        Bodies and "there is none" (403, 404) are remembered for ``ttl_s`` seconds, failures are not. A view inside a view is
        the outer one.
        """
        if self._memo is not None:
            yield
            return
        self._memo = _Memo(ttl_s, self._clock)
        try:
            yield
        finally:
            self._memo = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        """Not used: both downloads below know the length, which this door does not pass on."""
        raise Unreachable(f"{host_of(url)}: a download without a length is not supported", hint="use download_file", final=True)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return one metadata file of at most ``max_length`` bytes.

        Raises:
            Refused, NotTheLibrary, TooLong, TooSlow, Unreachable, BudgetExhausted: all of them tuf's ``DownloadError``.
        """
        if self._memo is not None and (known := self._memo.get(url)) is not None:
            return _at_most(known, max_length, url)

        def attempt(address: str, _base: str) -> bytes:
            return fetch_metadata(self._connection, address, max_length)

        try:
            body = self._repeat(url, self._tries(), attempt)
        except Refused as error:
            if self._memo is not None and error.status_code in (403, 404):
                self._memo.put(url, error)
            raise
        if self._memo is not None:
            self._memo.put(url, body)
        return body

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Yield one target of exactly ``max_length`` bytes, as an open file.

        The part is gone after the block: its bytes are the caller's, or the caller found them wrong. It is kept when the download
        itself failed, when the process is stopped, and when the caller had no disk space for his copy.

        Raises:
            Refused, NotTheLibrary, RangeViolation, TooSlow, Unreachable, BudgetExhausted, DiskFull: all tuf's ``DownloadError``.
        """
        if url.startswith(_METADATA):
            yield io.BytesIO(self.download_bytes(url, max_length))
            return
        path = url.removeprefix(LIBRARY_SCHEME)
        with open_part(self._parts_dir, path, max_length, self._clock) as part:
            if not part.complete:
                self._complete(url, part)
            part.stream.seek(0)
            try:
                yield part.stream
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    part.drop()
                raise
            except Exception:
                part.drop()
                raise
            part.drop()

    def _complete(self, url: str, part: Part) -> None:
        """Receive what a part lacks, from whichever base URL has it."""
        self._check_room(part)
        watch = _Watch(part, self._on_progress, self._clock)
        whole_only: set[str] = set()
        limit = self.received_bytes + MAX_COST * part.length + _SPARE_BYTES
        reached = checked = part.size

        def arrived() -> None:
            nonlocal checked
            watch.tell()
            if part.size - checked >= SYNC_BYTES:  # somebody else may fill the disk meanwhile
                checked = part.size
                self._check_room(part)

        def attempt(address: str, base: str) -> None:
            nonlocal reached
            if self.received_bytes > limit:
                raise BudgetExhausted(
                    f"{part.name} has cost more than {MAX_COST} times its length and is still not here",
                    hint="the line is cut and the server gives no ranges: look at the web server; the next look tries again",
                )
            try:
                fetch_target(self._connection, address, part, whole=base in whole_only, on_chunk=arrived)
            except RangeViolation:
                whole_only.add(base)
                raise
            finally:
                reached = max(reached, part.size)

        watch.tell(force=True)
        try:
            self._repeat(url, self._tries(part.length - part.size, reached), attempt, lambda: reached)
        finally:
            self.restarts += part.restarts
        part.sync()
        watch.tell(force=True)

    def _check_room(self, part: Part) -> None:
        check_room(self._parts_dir, part.length - part.size, self._settings.disk_reserve_bytes)

    def _repeat(self, url: str, tries: Tries, attempt: Callable[[str, str], _Result], reached: Callable[[], int] | None = None) -> _Result:
        """Try each base URL in turn, and all of them again after a pause; one that gave a final answer is not asked again.

        For metadata (nothing is ``reached`` there) a final answer stands: "there is no newer root" must not wait for a mirror that
        is down. A target is worth waiting for as long as any mirror may still have it.
        """
        answers: dict[str, Failure] = {}
        while True:
            failures: list[Failure] = []
            for base in [base for base in self._order(url) if base not in answers]:
                self._may_continue()
                try:
                    result = attempt(base + url.removeprefix(LIBRARY_SCHEME) if base else url, base)
                except (BudgetExhausted, DiskFull):
                    raise
                except Failure as error:
                    if error.final:
                        answers[base] = error
                    else:
                        failures.append(error)
                else:
                    self._prefer(base)
                    return result
            again = tries.failed(reached() if reached else 0)
            if not failures or not again or (answers and reached is None):
                raise _telling([*failures, *answers.values()])
            asked = max(error.retry_after_s for error in failures)
            pause = pause_s(tries.row, self._settings.backoff_s, self._settings.max_backoff_s, asked)
            if self._on_trouble is not None:
                self._on_trouble(failures[-1], pause)
            self._pause(pause)

    def _order(self, url: str) -> list[str]:
        """Return the base URLs for a URL; a plain one is its own (an empty base)."""
        if not url.startswith(LIBRARY_SCHEME):
            return [""]
        if not self._bases:
            raise Unreachable("no library URL is set", hint="set `urls` in sync.toml, or import from USB", code="sync.no_url", final=True)
        return [base for base in self._bases if base not in self._passed_over]

    def _tries(self, length: int = 0, reached: int = 0) -> Tries:
        # Those beside a mirror that cannot be believed are asked now, not for half an hour: the alarm must not wait for them.
        attempts = min(self._settings.attempts, _ELSEWHERE_ATTEMPTS) if self._passed_over else self._settings.attempts
        return Tries(attempts, length, reached)

    def _prefer(self, base: str) -> None:
        """Ask the base URL that worked first from now on."""
        if base in self._bases:
            self._bases.remove(base)
            self._bases.insert(0, base)

    def _pause(self, seconds: float) -> None:
        while seconds > 0:
            self._may_continue()
            nap = min(_NAP_S, seconds)
            self._sleep(nap)
            seconds -= nap


class _Memo:
    """Metadata answers of one view."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._known: dict[str, tuple[float, bytes | Refused]] = {}

    def get(self, url: str) -> bytes | None:
        """Return what is remembered, or None; a remembered 403 or 404 is raised again."""
        at, known = self._known.get(url, (float("-inf"), b""))
        if self._clock() - at > self.ttl_s:
            return None
        if isinstance(known, Refused):
            raise Refused(known.message, known.status_code)
        return known

    def put(self, url: str, answer: bytes | Refused) -> None:
        """Remember an answer."""
        self._known[url] = (self._clock(), answer)


class _Watch:
    """Tells the caller how far a part has come, not more often than every ``PROGRESS_S`` seconds."""

    def __init__(self, part: Part, on_progress: Callable[[Progress], None] | None, clock: Callable[[], float]) -> None:
        self._part = part
        self._on_progress = on_progress
        self._clock = clock
        self._began = self._told = clock()
        self._size = part.size

    def tell(self, *, force: bool = False) -> None:
        """Report, if it is time to."""
        now = self._clock()
        if self._on_progress is None or (not force and now - self._told < PROGRESS_S):
            return
        self._told = now
        rate = max(0, self._part.size - self._size) / max(now - self._began, 1e-9)
        self._on_progress(Progress(self._part.name, self._part.size, self._part.length, rate if now > self._began else 0.0))


def _telling(failures: list[Failure]) -> Failure:
    """Return the failure that says most: an HTTP answer before anything else, since python-tuf needs its status."""
    return next((error for error in failures if isinstance(error, Refused) and error.final), failures[-1])


def _at_most(body: bytes, max_length: int, url: str) -> bytes:
    if len(body) > max_length:
        raise TooLong(f"{url} has more than {max_length} bytes")
    return body
