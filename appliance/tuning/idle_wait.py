"""Waits until other work on this box leaves the processor to the measurement, for a bounded time.

The share of processor time is read from ``/proc/stat`` (proc_stat(5)), for the cores that this process may use: in a container that file
counts the work of the whole machine, which is what slows a measurement there too. Where the file is missing or has no such cores nothing is
known of the processor, and only the jobs of this box are waited for: those that the worker runs or is about to run, which may use an
accelerator alone. Jobs that wait for something else, such as the model that is being measured, are not waited for.
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

_JOBS: Final = "images are analysed"
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


class IdleWait:
    """Waits until the box is idle, before and between timings; all waits together last ``longest_s`` seconds at most.

    Args:
        longest_s: seconds; below two windows nothing ever waits.
        has_worked: whether jobs of this box run, or ran since the last call; :meth:`JobWatch.has_worked`.
        read: returns the processor time now.
        sleep: waits for some seconds.

    Attributes:
        note: ``tune.busy`` with the reason, once other work went on to the end of the waiting time; else None.
    """

    def __init__(
        self, longest_s: float, has_worked: Callable[[], bool], read: Callable[[], CpuTime | None] = read_cpu_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._windows = 0 if longest_s < _SHORTEST_WAIT_S else int(longest_s / WINDOW_S)
        self._longest_s = self._windows * WINDOW_S
        self._has_worked, self._read, self._sleep = has_worked, read, sleep
        self.note: Note | None = None

    def wait(self) -> float:
        """Wait until no job ran in a window and the processor was idle in it; returns the seconds."""
        return self._wait(self._has_worked())

    def begin_timing(self) -> None:
        """Forget the jobs that ran before."""
        self._has_worked()

    def wait_after_disturbance(self) -> float:
        """Wait where jobs ran since :meth:`begin_timing` or the last call; returns the seconds, 0 where the timing counts."""
        if self._longest_s == 0 or not self._has_worked():
            return 0.0
        if self._windows == 0:
            self._set_note(_JOBS)
            return 0.0
        return self._wait(works=True)

    def _wait(self, works: bool) -> float:
        """Wait as :meth:`wait` does; ``works``: whether jobs ran just now, which are waited for where nothing is known of the processor."""
        waited, before, reason = 0, self._read(), ""
        while waited < self._windows and (before is not None or works):
            self._sleep(WINDOW_S)
            waited += 1
            after = self._read()
            reason = self._reason(busy_share(before, after))
            if not reason:
                break
            before, works = after, True
        self._windows -= waited
        if reason:
            self._set_note(reason)
        return waited * WINDOW_S

    def _reason(self, share: float | None) -> str:
        """Say what goes on besides the measuring; empty where nothing does, or nothing is known."""
        if self._has_worked():
            return _JOBS
        return f"{share * 100:.0f} % > {BUSY_SHARE * 100:.0f} %" if share is not None and share > BUSY_SHARE else ""

    def _set_note(self, reason: str) -> None:
        self.note = Note(BUSY, f"{reason} after {self._longest_s:.0f} s")
