"""Readings of the processor time are injected: nothing here depends on what this machine does, or on time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.domain import Note
from appliance.tuning.idle_wait import BUSY, BUSY_SHARE, WINDOW_S, CpuTime, busy_share, parse_cpu_time, wait_until_idle

# Two cores: the first half busy, the second idle but for 5 of 100 ticks. The guest times, part of user, must not count twice.
STAT = """cpu  55 0 0 145 0 0 0 0 40 0
cpu0 30 5 5 40 10 2 3 5 30 0
cpu1 5 0 0 95 0 0 0 0 0 0
intr 1 2 3
cpufreq 1 2 3 4 5 6 7 8
ctxt 7
"""


class Machine:
    """A machine that is busy to the given share in each window; counts what was slept."""

    def __init__(self, *shares: float) -> None:
        self._shares, self._now, self.slept = iter(shares), CpuTime(0, 0), list[float]()

    def read(self) -> CpuTime:
        return self._now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now = CpuTime(self._now.busy + round(next(self._shares) * 1000), self._now.total + 1000)


def test_the_cores_that_this_process_may_use_count() -> None:
    assert parse_cpu_time(STAT, {0, 1}) == CpuTime(55, 200)
    assert parse_cpu_time(STAT, {0}) == CpuTime(50, 100)
    assert parse_cpu_time(STAT, {1, 7}) == CpuTime(5, 100)


@pytest.mark.parametrize("text", ["", "cpu  1 2 3 4 5 6 7 8", "cpu0", "cpu0 1 2 3", "cpu0 a b c d e f g h", "cpu0 -1 2 3 4 5 6 7 8", "\0"])
def test_what_is_not_of_this_form_tells_nothing(text: str) -> None:
    assert parse_cpu_time(text, {0}) is None


@given(st.text(), st.sets(st.integers(0, 9)))
def test_any_text_gives_a_time_or_nothing(text: str, cores: set[int]) -> None:
    found = parse_cpu_time(text, cores)
    assert found is None or 0 <= found.busy <= found.total


def test_an_idle_box_waits_one_window() -> None:
    machine = Machine(0.05)
    assert wait_until_idle(180, machine.read, machine.sleep) is None
    assert machine.slept == [WINDOW_S]


def test_a_busy_box_waits_until_it_is_idle() -> None:
    machine = Machine(0.9, 0.5, BUSY_SHARE + 0.01, BUSY_SHARE)
    assert wait_until_idle(180, machine.read, machine.sleep) is None
    assert len(machine.slept) == 4


@pytest.mark.parametrize(("longest_s", "windows"), [(180.0, 90), (5.0, 2), (4.0, 2)])
def test_a_box_that_never_becomes_idle_is_waited_for_no_longer_than_allowed_and_says_so(longest_s: float, windows: int) -> None:
    machine = Machine(*[0.5] * windows)
    assert wait_until_idle(longest_s, machine.read, machine.sleep) == Note(BUSY, f"50 % > 15 % after {windows * WINDOW_S:.0f} s")
    assert machine.slept == [WINDOW_S] * windows


@pytest.mark.parametrize("longest_s", [3.9, 0.0, -5.0])
def test_without_time_nothing_waits(longest_s: float) -> None:
    machine = Machine()
    assert wait_until_idle(longest_s, machine.read, machine.sleep) is None
    assert machine.slept == []


def _readings(*values: CpuTime | None) -> Callable[[], CpuTime | None]:
    rest: Iterator[CpuTime | None] = iter(values)
    return lambda: next(rest)


@pytest.mark.parametrize(
    "values",
    [(None,), (CpuTime(9, 10), None), (CpuTime(9, 10), CpuTime(9, 10)), (CpuTime(9, 10), CpuTime(1, 5))],
    ids=["no file", "file gone", "time stands still", "time runs back"],
)
def test_where_the_system_does_not_tell_nothing_waits(values: tuple[CpuTime | None, ...]) -> None:
    slept: list[float] = []
    assert wait_until_idle(180, _readings(*values), slept.append) is None
    assert len(slept) == len(values) - 1


@given(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_the_share_is_between_none_and_all(first: tuple[int, int], second: tuple[int, int]) -> None:
    share = busy_share(CpuTime(*first), CpuTime(*second))
    assert share is None if second[1] <= first[1] else share is not None and 0.0 <= share <= 1.0
