"""A rate limit per client address."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """A token bucket per address: ``burst`` tokens, refilled by ``per_minute``; in memory, for at most ``most`` addresses."""

    def __init__(self, per_minute: float, burst: int, *, clock: Callable[[], float] = time.monotonic, most: int = 50_000) -> None:
        self._per_s, self._burst, self._clock, self._most = per_minute / 60, burst, clock, most
        self._left: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allow(self, who: str) -> bool:
        """Take one token of ``who``; return False when there is none."""
        now = self._clock()
        with self._lock:
            left, at = self._left.pop(who, (float(self._burst), now))
            left = min(self._burst, left + (now - at) * self._per_s)
            self._left[who] = (left - 1 if left >= 1 else left, now)
            while len(self._left) > self._most:
                del self._left[next(iter(self._left))]
        return left >= 1
