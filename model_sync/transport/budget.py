"""What a download may cost: bytes per second, bytes per day, seconds of silence, attempts.

Clocks, sleeps and the date come from outside, so that each rule can be proved without waiting.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from secrets import SystemRandom

from model_sync.transport.errors import BudgetExhausted, DiskFull, TooSlow

MAX_CHUNK_BYTES = 64 * 1024
# An attempt counts as progress when it brought this much: a server that gives one byte per connection does not.
PROGRESS_BYTES = 64 * 1024
# What may be received without being written down yet; a process killed in between has counted too little by at most this.
UNCOUNTED_BYTES = 256 * 1024
# The last tenth of a day's budget is for metadata and small documents: a withdrawal must arrive even when a model used up the rest.
SMALL_SHARE = 10
_RANDOM = SystemRandom()


class TokenBucket:
    """A bandwidth cap: over any time t no more than ``rate * t + burst`` bytes are let through, by all threads together.

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
        """Wait until some bytes may pass, and return how many: at most ``wanted`` and at most ``chunk``, at least one."""
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
        """Return what was taken and not used."""
        with self._lock:
            self._tokens = min(self.burst, self._tokens + amount)


@functools.cache
def shared_bucket(rate: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> TokenBucket:
    """Return the bucket that all transfers of this process share."""
    return TokenBucket(rate, clock, sleep)


class DayBudget:
    """Bytes received per UTC day, kept in a file so that a restart does not begin anew.

    The file is read again at each transfer: the agent and a `pull` by hand take turns, and each adds to what the other counted.

    Args:
        path: Where the count is kept.
        limit: Bytes per day; None neither counts nor refuses.
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
        """Return how many bytes may still be received today, or None when nobody counts.

        Args:
            small: Metadata and small documents may use the last tenth of the budget, bundles may not.

        Raises:
            BudgetExhausted: none.
            DiskFull: the count cannot be written down.
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
            raise BudgetExhausted(
                f"today's budget of {self._limit} bytes is used up", hint="the download goes on after midnight UTC, from where it stopped"
            )
        return left

    def reload(self) -> None:
        """A transfer begins: take in what another process has counted."""
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
        """Write the count down; called at the end of each transfer."""
        with self._lock:
            if self._uncounted:
                self._write()

    def _start_new_day(self) -> None:
        if (today := self._today()) != self._day:
            self._day, self._written, self._uncounted = today, 0, 0

    def _today(self) -> str:
        return self._now().astimezone(timezone.utc).date().isoformat()

    def _read(self) -> int:
        """A missing or damaged count begins the day anew: a box must never stop updating because of this file."""
        try:
            kept = json.loads(self._path.read_bytes())
            day, received = kept["day"], kept["received_bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return received if day == self._day and type(received) is int and received >= 0 else 0

    def _write(self) -> OSError | None:
        """Write the count down; a full disk must not break a transfer, the count goes on in memory."""
        if self._limit is None:
            return None
        total = self._written + self._uncounted
        fresh = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps({"schema": 1, "day": self._day, "received_bytes": total}) + "\n", "utf-8")
            os.replace(fresh, self._path)
        except OSError as error:
            return error
        self._written, self._uncounted = total, 0
        return None


class SpeedCheck:
    """Gives up an attempt that is slower than the settings allow; only time spent waiting for the server counts.

    Args:
        minimum: Bytes per second.
        window_s: Time over which the speed is judged, in seconds.
        clock: A monotonic clock.
        host: Who is slow, for the message.
    """

    def __init__(self, minimum: float, window_s: float, clock: Callable[[], float], host: str) -> None:
        self._minimum = minimum
        self._window_s = window_s
        self._clock = clock
        self._host = host
        self._waited_s = 0.0
        self._received = 0
        self._since = 0.0

    def start(self) -> None:
        """A wait for the server begins."""
        self._since = self._clock()

    def stop(self, received: int) -> None:
        """The wait brought some bytes.

        Raises:
            TooSlow: over a whole window the speed was below the minimum.
        """
        self._waited_s += self._clock() - self._since
        self._received += received
        if self._waited_s >= self._window_s:
            speed = self._received / self._waited_s
            if speed < self._minimum:
                raise TooSlow(f"{self._host} sends {speed:.0f} bytes/s, less than the {self._minimum:.0f} that are asked for")
            self._waited_s, self._received = 0.0, 0


class AttemptCounter:
    """The attempts one file may take.

    ``attempts`` in a row may bring nothing; one that brings ``PROGRESS_BYTES`` more than ever before starts the row anew, so
    that a line cut every megabyte still brings a file of any size. In all there are never more than ``attempts`` plus one for
    each ``PROGRESS_BYTES`` of the file.
    """

    def __init__(self, attempts: int, length: int, reached: int = 0) -> None:
        self._attempts = attempts
        self._left = attempts + length // PROGRESS_BYTES
        self._reached = reached
        self.failures_in_a_row = 0

    def may_retry(self, reached: int) -> bool:
        """Count a failed attempt that got as far as ``reached`` bytes; return whether there may be another."""
        self._left -= 1
        if reached - self._reached >= PROGRESS_BYTES:
            self._reached, self.failures_in_a_row = reached, 0
        else:
            self.failures_in_a_row += 1
        return self.failures_in_a_row < self._attempts and self._left > 0


def pause_s(row: int, first_s: float, longest_s: float, retry_after_s: float) -> float:
    """Return the pause before the next attempt: exponential with full jitter, or what the server asked for; never above ``longest_s``.

    Args:
        row: Attempts in a row that brought nothing.
        first_s: Ceiling of the first pause.
        longest_s: Ceiling of any pause.
        retry_after_s: What the server asked for.

    A fleet that lost its library together must not come back together, hence the jitter.
    """
    ceiling = min(longest_s, first_s * 2.0 ** min(max(0, row - 1), 60))
    return min(longest_s, max(_RANDOM.uniform(0.0, ceiling), retry_after_s))
