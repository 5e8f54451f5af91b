"""The limits of downloads: bytes per second, bytes per day, minimum speed, attempts.

Clocks, sleeps and the date are parameters, so that each rule can be tested without waiting.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from secrets import SystemRandom

from model_sync import atomic_files
from model_sync.transport.errors import BudgetExhausted, DiskFull, TooSlow

MAX_CHUNK_BYTES = 64 * 1024
# An attempt counts as progress when it received this much.
PROGRESS_BYTES = 64 * 1024
# Bytes that may be received before the count is written; a killed process has counted at most this too little.
UNCOUNTED_BYTES = 256 * 1024
# The last tenth of a day's budget is for metadata and small documents: a withdrawal must arrive even when a model used up the rest.
SMALL_SHARE = 10
_RANDOM = SystemRandom()


class TokenBucket:
    """A bandwidth limit: over any time t at most ``rate * t + burst`` bytes pass, for all threads together.

    Attributes:
        rate: Bytes per second; None lets everything through.
        burst: Bytes that may pass at once; a tenth of a second's worth, at least one byte.
        chunk: Bytes to ask for at a time, so that a small rate flows evenly.
    """

    def __init__(self, rate: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.rate = rate
        self.chunk = MAX_CHUNK_BYTES if rate is None else max(1, min(MAX_CHUNK_BYTES, int(rate / 10)))
        self.burst = 0.0 if rate is None else max(self.chunk, rate / 10)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = self.burst
        self._filled_at = clock()

    def take(self, wanted: int) -> int:
        """Wait until some bytes may pass, and return their number: at most ``wanted`` and ``chunk``, at least one."""
        amount = max(1, min(wanted, self.chunk))
        if self.rate is None:
            return amount
        with self._lock:
            now = self._clock()
            self._tokens = min(self.burst, self._tokens + max(0.0, now - self._filled_at) * self.rate)
            self._filled_at = now
            self._tokens -= amount
            wait = -self._tokens / self.rate
        if wait > 0:
            self._sleep(wait)
        return amount

    def give_back(self, amount: int) -> None:
        """Return tokens that were taken and not used."""
        with self._lock:
            self._tokens = min(self.burst, self._tokens + amount)


@functools.cache
def shared_bucket(rate: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> TokenBucket:
    """Return the bucket that all transfers of this process share."""
    return TokenBucket(rate, clock, sleep)


class DayBudget:
    """Bytes received per UTC day, stored in a file so that a restart does not reset the count.

    The file is read again at each transfer: the agent and a manual ``pull`` alternate, and each adds to the count of the other.

    Args:
        path: The file of the count.
        limit: Bytes per day; None sets no limit.
        now: The wall clock.
    """

    def __init__(self, path: Path, limit: int | None, now: Callable[[], datetime]) -> None:
        self._path = path
        self._limit = limit
        self._now = now
        self._lock = threading.Lock()
        self._day = self._today()
        self._written = self._read()
        self._uncounted = 0

    @property
    def received_bytes(self) -> int:
        """Bytes received today."""
        with self._lock:
            self._start_new_day()
            return self._written + self._uncounted

    def remaining_bytes(self, *, small: bool) -> int | None:
        """Return how many bytes may still be received today, or None without a limit.

        Args:
            small: Metadata and small documents may use the last tenth of the budget, bundles may not.

        Raises:
            BudgetExhausted: none may be received.
            DiskFull: the count cannot be written.
        """
        if self._limit is None:
            return None
        with self._lock:
            error = self._write() if self._uncounted >= UNCOUNTED_BYTES else None
        if error is not None:
            raise DiskFull(f"{self._path}: {error.strerror}: the day's bytes cannot be counted, so no more are received") from error
        limit = self._limit if small else self._limit - self._limit // SMALL_SHARE
        left = limit - self.received_bytes
        if left <= 0:
            raise BudgetExhausted(f"today's budget of {self._limit} bytes is used up; a new one begins at midnight UTC")
        return left

    def reload(self) -> None:
        """Read the count of other processes before a transfer."""
        if self._limit is not None:
            with self._lock:
                self._start_new_day()
                self._written = self._read()

    def add(self, amount: int) -> None:
        """Count received bytes."""
        with self._lock:
            self._start_new_day()
            self._uncounted += amount
            if self._uncounted >= UNCOUNTED_BYTES:
                self._write()

    def save(self) -> None:
        """Write the count; called at the end of each transfer."""
        with self._lock:
            if self._uncounted:
                self._write()

    def _start_new_day(self) -> None:
        if (today := self._today()) != self._day:
            self._day, self._written, self._uncounted = today, 0, 0

    def _today(self) -> str:
        return self._now().astimezone(timezone.utc).date().isoformat()

    def _read(self) -> int:
        """Return the stored count; 0 when it is missing or damaged, so that this file never stops updates."""
        try:
            stored = json.loads(self._path.read_bytes())
            day, received = stored["day"], stored["received_bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return received if day == self._day and type(received) is int and received >= 0 else 0

    def _write(self) -> OSError | None:
        """Write the count; return the error of a full disk, with which the count continues in memory."""
        if self._limit is None:
            return None
        total = self._written + self._uncounted
        try:
            atomic_files.write_json(self._path, {"schema": 1, "day": self._day, "received_bytes": total})
        except OSError as error:
            return error
        self._written, self._uncounted = total, 0
        return None


@dataclass
class SpeedCheck:
    """Ends an attempt that is slower than the settings allow; only time spent waiting for the server counts.

    Attributes:
        minimum: Bytes per second.
        window_s: Time over which the speed is measured, in seconds.
        clock: A monotonic clock.
        host: The server, for the message.
    """

    minimum: float
    window_s: float
    clock: Callable[[], float]
    host: str
    _waited_s: float = field(default=0.0, init=False)
    _received: int = field(default=0, init=False)
    _since: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Start a wait for the server."""
        self._since = self.clock()

    def stop(self, received: int) -> None:
        """End a wait that brought ``received`` bytes.

        Raises:
            TooSlow: over a complete window the speed was below the minimum.
        """
        self._waited_s += self.clock() - self._since
        self._received += received
        if self._waited_s >= self.window_s:
            speed = self._received / self._waited_s
            if speed < self.minimum:
                raise TooSlow(f"{self.host} sends {speed:.0f} bytes/s, less than the minimum of {self.minimum:.0f}")
            self._waited_s, self._received = 0.0, 0


class AttemptCounter:
    """Counts the attempts for one file.

    ``attempts`` in a row may receive nothing; one that gets ``PROGRESS_BYTES`` further than any before resets the count, so that a file
    of any size arrives over a link that breaks every megabyte. In all there are at most ``attempts`` plus one for each
    ``PROGRESS_BYTES`` of the file.
    """

    def __init__(self, attempts: int, length: int, reached: int = 0) -> None:
        self._attempts = attempts
        self._left = attempts + length // PROGRESS_BYTES
        self._reached = reached
        self.failures_in_a_row = 0

    def may_retry(self, reached: int) -> bool:
        """Count a failed attempt that reached ``reached`` bytes; return whether another one is allowed."""
        self._left -= 1
        if reached - self._reached >= PROGRESS_BYTES:
            self._reached, self.failures_in_a_row = reached, 0
        else:
            self.failures_in_a_row += 1
        return self.failures_in_a_row < self._attempts and self._left > 0


def pause_s(row: int, first_s: float, longest_s: float, retry_after_s: float) -> float:
    """Return the pause before the next attempt: exponential with full jitter, which spreads boxes that lost the library together.

    Args:
        row: Attempts in a row that received nothing.
        first_s: Longest first pause.
        longest_s: Longest pause of all.
        retry_after_s: The pause that the server asked for.
    """
    ceiling = min(longest_s, first_s * 2.0 ** min(max(0, row - 1), 60))
    return min(longest_s, max(_RANDOM.uniform(0.0, ceiling), retry_after_s))
