"""Waits until other work on this box leaves the processor to the measurement, for a bounded time.

The share of processor time is read from ``/proc/stat`` (proc_stat(5)), for the cores that this process may use: in a container that file
counts the work of the whole machine, which is what slows a measurement there too. A waiting or running job of the box is such work. Where
the file is missing or has no such cores nothing is known, and nothing waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, NamedTuple

from appliance.core.domain import Note

BUSY: Final = "tune.busy"
BUSY_SHARE: Final = 0.15
"""Above this share of the processor time of its cores the box is busy. An idle box with all its services is below 0.05."""

WINDOW_S: Final = 2.0
"""The time over which the share is taken."""

_STAT: Final = Path("/proc/stat")
# user, nice, system, idle, iowait, irq, softirq, steal; the guest times after them are part of user and nice.
_FIELDS: Final = 8
_IDLE_FIELDS: Final = (3, 4)
_SHORTEST_WAIT_S: Final = 2 * WINDOW_S


class CpuTime(NamedTuple):
    """Processor time since the start of the machine, in clock ticks: spent on work, and in all."""

    busy: int
    total: int


def parse_cpu_time(text: str, cores: Collection[int]) -> CpuTime | None:
    """Add up the time of these cores in the text of ``/proc/stat``; None where it has none of them, or is not of this form."""
    busy = total = 0
    for line in text.splitlines():
        name, *values = line.split()[: 1 + _FIELDS] or [""]
        number = name.removeprefix("cpu")
        if name == number or not number.isdecimal() or int(number) not in cores:
            continue
        if len(values) < _FIELDS or not all(value.isdecimal() for value in values):
            return None
        ticks = [int(value) for value in values]
        total += sum(ticks)
        busy += sum(ticks) - sum(ticks[index] for index in _IDLE_FIELDS)
    return CpuTime(busy, total) if total else None


def read_cpu_time() -> CpuTime | None:
    """Read the processor time of the cores that this process may use; None where the system does not tell."""
    try:
        return parse_cpu_time(_STAT.read_text(), os.sched_getaffinity(0))
    except (OSError, ValueError):
        return None


def busy_share(before: CpuTime | None, after: CpuTime | None) -> float | None:
    """Compute the share (0 to 1) of the time between two readings that was spent on work; None where it is not known."""
    if before is None or after is None or after.total <= before.total:
        return None
    return min(1.0, max(0.0, (after.busy - before.busy) / (after.total - before.total)))


def wait_until_idle(
    longest_s: float, read: Callable[[], CpuTime | None] = read_cpu_time, sleep: Callable[[float], None] = time.sleep
) -> Note | None:
    """Wait until a window is not busy, for ``longest_s`` seconds at most; below two windows nothing waits.

    Args:
        longest_s: seconds.
        read: returns the processor time now.
        sleep: waits for some seconds.

    Returns:
        ``tune.busy`` with the share in the last window, when the box was busy to the end; else None.
    """
    if longest_s < _SHORTEST_WAIT_S:
        return None
    before, share = read(), 0.0
    windows = int(longest_s / WINDOW_S)
    for _ in range(windows):
        if before is None:
            return None
        sleep(WINDOW_S)
        after = read()
        now = busy_share(before, after)
        if now is None or now <= BUSY_SHARE:
            return None
        before, share = after, now
    return Note(BUSY, f"{share * 100:.0f} % > {BUSY_SHARE * 100:.0f} % after {windows * WINDOW_S:.0f} s")
