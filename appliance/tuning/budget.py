"""The limits of one measurement in time and memory: how much remains, and the deadline of each call to a candidate.

A candidate that hangs only costs the time of its own call. The deadlines of candidates that build no engine are a share of the
measuring time, or a multiple of what another candidate needed; only building an engine may take long. Nothing begins or continues after
the end of the total time.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from appliance.tuning.idle_wait import IdleWait

LEAST_CALL_S: Final = 10.0
"""The shortest deadline of a load, and of each call after it."""

_CALL_SHARE: Final = 0.25
_BUILD_SHARE: Final = 0.5
_PATIENCE: Final = 4.0
_SHORTEST_S: Final = 0.5
_FREE_SHARE: Final = 3
_FREE_UNKNOWN: Final = 1 << 30


@dataclass(frozen=True)
class Limits:
    """The limits of one measurement.

    Attributes:
        seconds: total time; after it nothing new is tried and the best candidate so far is taken. A candidate that hangs is ended before.
        measuring_s: the part of it for everything but building engines. After it each candidate that was not tried gets one quick
            timing, so that a slow model does not exclude the fast candidates; candidates that were not reached are marked.
        memory_bytes: limit of the private memory of each candidate.
        held_bytes: limit of the memory of all candidates that stay loaded for comparison, besides the one under test; a third of the
            free memory when None. The fastest always stays loaded.
    """

    seconds: float = 900.0
    measuring_s: float = 60.0
    memory_bytes: int | None = None
    held_bytes: int | None = None


class Budget:
    """The remaining part of the limits; the time starts with the construction. ``idle`` waits where jobs of the box disturb a timing."""

    def __init__(self, limits: Limits, idle: IdleWait | None = None) -> None:
        self._limits, self._idle = limits, idle
        self._started = time.monotonic()
        self._uncounted_s = 0.0
        self.memory_bytes = limits.memory_bytes
        self.held_bytes = _free_bytes() // _FREE_SHARE if limits.held_bytes is None else limits.held_bytes

    def add_build_time(self, seconds: float) -> None:
        """Do not count the time of building an engine as measuring time."""
        self._uncounted_s += seconds

    def begin_timing(self) -> None:
        """Begin a timing that :meth:`was_disturbed` is asked about."""
        if self._idle is not None:
            self._idle.begin_timing()

    def was_disturbed(self) -> bool:
        """Whether jobs of the box ran during the timing, which is to be repeated: they were waited for, within bounds.

        The wait does not count as measuring time. Once the waiting time is used up every timing counts.
        """
        waited_s = self._idle.wait_after_disturbance() if self._idle is not None else 0.0
        self._uncounted_s += waited_s
        return waited_s > 0 and not self.is_over()

    def remaining_s(self) -> float:
        """Return the seconds until the end of the total time."""
        return self._limits.seconds - (time.monotonic() - self._started)

    def measuring_remaining_s(self) -> float:
        """Return the seconds of measuring time; after it only untried candidates get one quick timing."""
        return min(self.remaining_s(), self._limits.measuring_s - (time.monotonic() - self._started - self._uncounted_s))

    def is_over(self) -> bool:
        """Whether the total time is over."""
        return self.remaining_s() <= 0

    def is_measuring_over(self) -> bool:
        """Whether the measuring time is over."""
        return self.measuring_remaining_s() <= 0

    def load_deadline_s(self, known_s: float, *, builds_engine: bool) -> float:
        """Compute the time limit of a candidate's load, which is also the lower bound of the limit of each later call.

        ``known_s`` is the longest load of a correct candidate, 0 when there is none.
        """
        if builds_engine:
            return max(LEAST_CALL_S, _BUILD_SHARE * self.remaining_s())
        return max(LEAST_CALL_S, _CALL_SHARE * self.measuring_remaining_s(), _PATIENCE * known_s)

    def call_deadline_s(self, allowed_s: float, expected_s: float = 0.0) -> float:
        """Compute the time limit of one call: the candidate's limit or a multiple of the expected time, never past the total time."""
        return max(_SHORTEST_S, min(max(allowed_s, _PATIENCE * expected_s), self.remaining_s()))


def _free_bytes() -> int:
    """Return the memory that is available without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _FREE_UNKNOWN
