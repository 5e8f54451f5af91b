"""The time and memory of one measuring: how much is left, and how long one call to one candidate may take of it.

A candidate that hangs costs its own call and no more. What builds no engine gets its deadlines out of the time for measuring, or as a
multiple of what another needed; only an engine's build may take long. Nothing is begun, and no call outlives, the end of it all.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.tuning.subject import Limits

LEAST_CALL_S: Final = 10.0
"""What a candidate is given at least for its load, and for each call after it."""

_CALL_SHARE: Final = 0.25
_BUILD_SHARE: Final = 0.5
_PATIENCE: Final = 4.0
_SHORTEST_S: Final = 0.5
_FREE_SHARE: Final = 3
_FREE_UNKNOWN: Final = 1 << 30


class Budget:
    """What is left of the limits.

    Args:
        limits: of the whole measuring, which begins now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self._built_s = 0.0
        self.memory_bytes = limits.memory_bytes
        self.held_bytes = _free_bytes() // _FREE_SHARE if limits.held_bytes is None else limits.held_bytes

    def built(self, seconds: float) -> None:
        """An engine was built: minutes that are no measuring."""
        self._built_s += seconds

    def left_s(self) -> float:
        """Until the end of it all."""
        return self._limits.seconds - (time.monotonic() - self._started)

    def measuring_left_s(self) -> float:
        """Until only what was never tried gets its one quick timing."""
        return min(self.left_s(), self._limits.measuring_s - (time.monotonic() - self._started - self._built_s))

    def over(self) -> bool:
        """Whether nothing at all is begun any more."""
        return self.left_s() <= 0

    def spent(self) -> bool:
        """Whether the time for measuring more exactly is over."""
        return self.measuring_left_s() <= 0

    def load_s(self, known_s: float, *, builds: bool) -> float:
        """What a candidate gets for its load, and at least for each call after it.

        Args:
            known_s: the longest that another needed, which was right; 0 when there is none.
            builds: whether it builds an engine first.
        """
        if builds:
            return max(LEAST_CALL_S, _BUILD_SHARE * self.left_s())
        return max(LEAST_CALL_S, _CALL_SHARE * self.measuring_left_s(), _PATIENCE * known_s)

    def call_s(self, allowed_s: float, expected_s: float = 0.0) -> float:
        """The deadline of one call: what its candidate was allowed, or some times what it should take, and never past the end."""
        return max(_SHORTEST_S, min(max(allowed_s, _PATIENCE * expected_s), self.left_s()))


def _free_bytes() -> int:
    """Memory that the system has to give without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _FREE_UNKNOWN
