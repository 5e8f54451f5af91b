"""The HTTP fetcher: python-tuf's ``FetcherInterface`` for slow links that break often.

A file is requested from each base URL in turn, then again after a pause, until it is complete or the attempts are used up. Received
parts of targets survive a kill and a reboot (:mod:`model_sync.transport.parts`); metadata is small and held in memory. python-tuf
verifies signatures and hashes; wrong files are deleted and fetched again.

``download_bytes`` fetches metadata, ``download_file`` a target of exactly ``max_length`` bytes, as ``tuf.ngclient.Updater`` calls
them; a URL ``library:metadata/...`` is metadata in both. The errors are those of :mod:`model_sync.transport.errors`.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TypeVar

from tuf.ngclient.fetcher import FetcherInterface

from model_sync.settings import SyncSettings
from model_sync.transport.budget import AttemptCounter, DayBudget, pause_s, shared_bucket
from model_sync.transport.connection import Connection, host_of
from model_sync.transport.directory_fetcher import LIBRARY_SCHEME
from model_sync.transport.errors import (
    BudgetExhausted,
    DiskFull,
    DownloadFailure,
    RangeViolation,
    Refused,
    TooLong,
    Unreachable,
)
from model_sync.transport.parts import SYNC_BYTES, Part, open_part, require_free_space
from model_sync.transport.transfer import fetch_metadata, fetch_target

_METADATA = f"{LIBRARY_SCHEME}metadata/"
BUDGET_NAME = "budget.json"
# The most bytes received for a file, as a multiple of its length: some servers have no ranges.
MAX_COST = 3
_SPARE_BYTES = 1024 * 1024
PROGRESS_S = 0.5
_STOP_CHECK_S = 1.0
_ATTEMPTS_ON_OTHER_MIRRORS = 3
_Result = TypeVar("_Result")


class Fetcher(FetcherInterface):
    """Downloads from the library over HTTP.

    Args:
        settings: Timeouts, caps and budgets.
        parts_dir: Directory of unfinished targets; the same after a restart, on the same disk as the finished files.
        on_progress: Called about twice a second with the received bytes of a target.
        check_stop: Called between chunks, before each attempt and during pauses; raises to stop, and the part is kept.
        clock: A monotonic clock in seconds.
        sleep: Waits some seconds.
        now: The wall clock, for the day's budget.
        on_retry: Called before each pause with the error and the seconds of the pause.

    Attributes:
        restarts: How often a download restarted from its first byte.
    """

    def __init__(
        self,
        settings: SyncSettings,
        parts_dir: Path,
        *,
        on_progress: Callable[[int], None] | None = None,
        check_stop: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        on_retry: Callable[[DownloadFailure, float], None] | None = None,
    ) -> None:
        self.restarts = 0
        self._excluded: set[str] = set()
        self._settings = settings
        self._parts_dir = parts_dir
        self._bases = [url if url.endswith("/") else f"{url}/" for url in settings.urls]
        self._on_progress = on_progress
        self._on_retry = on_retry
        self._check_stop = check_stop or (lambda: None)
        self._clock = clock
        self._sleep = sleep
        bucket = shared_bucket(settings.rate_limit_bytes_per_s, clock, sleep)
        budget = DayBudget(settings.state_dir / BUDGET_NAME, settings.day_budget_bytes, now)
        self._connection = Connection(settings, bucket, budget, clock, self._check_stop)
        self._metadata_cache: _MetadataCache | None = None

    @property
    def received_bytes(self) -> int:
        """All body bytes received by this fetcher."""
        return self._connection.received_bytes

    @property
    def last_server_date(self) -> datetime | None:
        """The Date header of the last response: an unsigned hint about the time."""
        return self._connection.last_server_date

    def close(self) -> None:
        """Close the open connections; the fetcher can still be used."""
        self._connection.close()

    def exclude_last_mirror(self) -> bool:
        """Exclude the base URL that answered last, because its files were wrongly signed or old; forget its metadata.

        Returns False, and includes all base URLs again, when no other is left.
        """
        self._excluded.update(self._bases[:1])
        if self._metadata_cache is not None:
            self._metadata_cache = _MetadataCache(self._metadata_cache.ttl_s, self._clock)
        if all(base in self._excluded for base in self._bases):
            self._excluded.clear()
            return False
        return True

    def include_all_mirrors(self) -> None:
        """Use every base URL again."""
        self._excluded.clear()

    @contextmanager
    def cached_metadata(self, ttl_s: float = 300.0) -> Iterator[None]:
        """Cache metadata inside the block, so that a new Updater per target downloads nothing again.

        Bodies and "there is none" (403, 404) are cached for ``ttl_s`` seconds, other failures are not. A nested block uses the cache
        of the outer one.
        """
        if self._metadata_cache is not None:
            yield
            return
        self._metadata_cache = _MetadataCache(ttl_s, self._clock)
        try:
            yield
        finally:
            self._metadata_cache = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        """Refuse: a download needs the length, which this method does not receive."""
        raise Unreachable(f"{host_of(url)}: a download without a length is not supported", final=True)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return one metadata file of at most ``max_length`` bytes.

        Raises:
            Refused, NotTheLibrary, TooLong, TooSlow, Unreachable, BudgetExhausted: all of them tuf's ``DownloadError``.
        """
        if self._metadata_cache is not None and (known := self._metadata_cache.get(url)) is not None:
            if len(known) > max_length:
                raise TooLong(f"{url} has more than {max_length} bytes")
            return known

        def attempt(address: str, _base: str) -> bytes:
            return fetch_metadata(self._connection, address, max_length)

        try:
            body = self._try_all_mirrors(url, self._attempt_counter(), attempt)
        except Refused as error:
            if self._metadata_cache is not None and error.status_code in (403, 404):
                self._metadata_cache.put(url, error)
            raise
        if self._metadata_cache is not None:
            self._metadata_cache.put(url, body)
        return body

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Yield one target of exactly ``max_length`` bytes, as an open file.

        The part is deleted after the block, when the caller has copied or rejected its bytes. It is kept when the download failed, when
        the process is stopped, and when the caller had no disk space for the copy.

        Raises:
            Refused, NotTheLibrary, RangeViolation, TooSlow, Unreachable, BudgetExhausted, DiskFull: all tuf's ``DownloadError``.
        """
        if url.startswith(_METADATA):
            yield io.BytesIO(self.download_bytes(url, max_length))
            return
        path = url.removeprefix(LIBRARY_SCHEME)
        with open_part(self._parts_dir, path, max_length, self._clock) as part:
            if not part.is_complete:
                self._receive_rest(url, part)
            part.stream.seek(0)
            try:
                yield part.stream
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    part.delete()
                raise
            except Exception:
                part.delete()
                raise
            part.delete()

    def _receive_rest(self, url: str, part: Part) -> None:
        """Receive the missing bytes of a part from any base URL that has them."""
        self._require_free_space(part)
        reporter = _ProgressReporter(part, self._on_progress, self._clock)
        without_range: set[str] = set()
        limit = self.received_bytes + MAX_COST * part.length + _SPARE_BYTES
        reached = checked = part.size

        def on_chunk_received() -> None:
            nonlocal checked
            reporter.report()
            if part.size - checked >= SYNC_BYTES:  # another program may be filling the disk
                checked = part.size
                self._require_free_space(part)

        def attempt(address: str, base: str) -> None:
            nonlocal reached
            if self.received_bytes > limit:
                raise BudgetExhausted(
                    f"more than {MAX_COST} times the length of {part.name} was received, and it is still not complete",
                    hint="the link breaks and the server has no ranges: check the web server; the next poll tries again",
                )
            try:
                fetch_target(self._connection, address, part, without_range=base in without_range, on_chunk=on_chunk_received)
            except RangeViolation:
                without_range.add(base)
                raise
            finally:
                reached = max(reached, part.size)

        reporter.report(force=True)
        try:
            self._try_all_mirrors(url, self._attempt_counter(part.length - part.size, reached), attempt, lambda: reached)
        finally:
            self.restarts += part.restarts
        part.sync()
        reporter.report(force=True)

    def _require_free_space(self, part: Part) -> None:
        require_free_space(self._parts_dir, part.length - part.size, self._settings.disk_reserve_bytes)

    def _try_all_mirrors(
        self, url: str, attempts_left: AttemptCounter, attempt: Callable[[str, str], _Result], reached: Callable[[], int] | None = None
    ) -> _Result:
        """Try each base URL in turn, and all of them again after a pause; one that gave a final response is not tried again.

        For metadata (without ``reached``) a final response ends the loop: "there is no newer root" must not wait for a mirror that does
        not answer. For a target the fetcher waits as long as any mirror may still have it.
        """
        answers: dict[str, DownloadFailure] = {}
        while True:
            failures: list[DownloadFailure] = []
            for base in [base for base in self._order(url) if base not in answers]:
                self._check_stop()
                try:
                    result = attempt(base + url.removeprefix(LIBRARY_SCHEME) if base else url, base)
                except (BudgetExhausted, DiskFull):
                    raise
                except DownloadFailure as error:
                    if error.final:
                        answers[base] = error
                    else:
                        failures.append(error)
                else:
                    self._move_to_front(base)
                    return result
            again = attempts_left.may_retry(reached() if reached else 0)
            if not failures or not again or (answers and reached is None):
                raise _most_informative([*failures, *answers.values()])
            retry_after_s = max(error.retry_after_s for error in failures)
            pause = pause_s(attempts_left.failures_in_a_row, self._settings.backoff_s, self._settings.max_backoff_s, retry_after_s)
            if self._on_retry is not None:
                self._on_retry(failures[-1], pause)
            self._pause(pause)

    def _order(self, url: str) -> list[str]:
        """Return the base URLs for a URL; an absolute URL has one empty base."""
        if not url.startswith(LIBRARY_SCHEME):
            return [""]
        if not self._bases:
            raise Unreachable("no library URL is set", code="sync.no_url", final=True)
        return [base for base in self._bases if base not in self._excluded]

    def _attempt_counter(self, length: int = 0, reached: int = 0) -> AttemptCounter:
        # After a mirror with wrong files the others are tried a few times only, so that the alarm is not late.
        attempts = min(self._settings.attempts, _ATTEMPTS_ON_OTHER_MIRRORS) if self._excluded else self._settings.attempts
        return AttemptCounter(attempts, length, reached)

    def _move_to_front(self, base: str) -> None:
        """Try the base URL that worked first from now on."""
        if base in self._bases:
            self._bases.remove(base)
            self._bases.insert(0, base)

    def _pause(self, seconds: float) -> None:
        while seconds > 0:
            self._check_stop()
            nap = min(_STOP_CHECK_S, seconds)
            self._sleep(nap)
            seconds -= nap


class _MetadataCache:
    """The metadata cached in one ``cached_metadata`` block."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._known: dict[str, tuple[float, bytes | Refused]] = {}

    def get(self, url: str) -> bytes | None:
        """Return cached bytes, or None; a cached 403 or 404 is raised again."""
        at, known = self._known.get(url, (float("-inf"), b""))
        if self._clock() - at > self.ttl_s:
            return None
        if isinstance(known, Refused):
            raise Refused(known.message, known.status_code)
        return known

    def put(self, url: str, answer: bytes | Refused) -> None:
        """Cache a response."""
        self._known[url] = (self._clock(), answer)


class _ProgressReporter:
    """Reports the received bytes of a part, at most every ``PROGRESS_S`` seconds."""

    def __init__(self, part: Part, on_progress: Callable[[int], None] | None, clock: Callable[[], float]) -> None:
        self._part = part
        self._on_progress = on_progress
        self._clock = clock
        self._reported_at = clock()

    def report(self, *, force: bool = False) -> None:
        """Report when it is time, or always with ``force``."""
        now = self._clock()
        if self._on_progress is None or (not force and now - self._reported_at < PROGRESS_S):
            return
        self._reported_at = now
        self._on_progress(self._part.size)


def _most_informative(failures: list[DownloadFailure]) -> DownloadFailure:
    """Return the most informative failure: a final HTTP response first, since python-tuf needs its status."""
    return next((error for error in failures if isinstance(error, Refused) and error.final), failures[-1])
