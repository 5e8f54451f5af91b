"""Moments whose age does not depend on somebody setting the clock: what lasts 15 minutes never lasts a year (ADR 0040).

The wall clock of a box without a network may be a year ahead and be set back while sessions and one-time passwords exist. A moment is
therefore stored with the time since the machine started and the identity of that start. Within one run of the machine only the time since
its start counts. Across a restart there is only the wall clock; where it is earlier than the moment, the age is infinite, so that
what the moment began has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Final

from model_sync.atomic_files import boot_id

# A moment is stored in milliseconds: read at once, it may seem to lie so far in the future.
_ROUNDING_S: Final = 0.001


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # counts while the machine sleeps, and is the same for all processes


class Clock:
    """The time as moments.

    Args:
        wall_s: seconds since the epoch, which a person may set.
        uptime_s: seconds since the machine started, which nobody can set.
        boot_id: identity of this start of the machine; empty where the system has none, and then only the wall clock counts.
    """

    def __init__(
        self,
        wall_s: Callable[[], float] = time.time,
        uptime_s: Callable[[], float] = _uptime_s,
        boot_id: Callable[[], str] = boot_id,
    ) -> None:
        self.wall_s, self.uptime_s, self._boot_id = wall_s, uptime_s, boot_id

    def now(self) -> str:
        """The present moment, as it is stored: wall clock, time since the start, identity of the start."""
        return f"{self.wall_s():.3f} {self.uptime_s():.3f} {self._boot_id()}"

    def age_s(self, moment: str) -> float:
        """Seconds since a moment; infinite where the moment is unknown, or lies in the future after a restart."""
        parts = moment.split(" ")
        if len(parts) != 3:
            return math.inf
        wall, uptime, boot_id = parts
        same_start = bool(boot_id) and boot_id == self._boot_id()
        age = self.uptime_s() - float(uptime) if same_start else self.wall_s() - float(wall)
        return max(age, 0.0) if age > -_ROUNDING_S else math.inf


def moment_utc(moment: str) -> str:
    """The wall clock of a moment as ISO 8601 in UTC, as it was when the moment was stored; empty for an unknown moment."""
    wall = moment.partition(" ")[0]
    return datetime.fromtimestamp(float(wall), timezone.utc).isoformat(timespec="milliseconds") if wall else ""
