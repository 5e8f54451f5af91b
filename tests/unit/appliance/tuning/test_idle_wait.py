"""Readings of the processor time are injected: nothing here depends on what this machine does, or on time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.domain import Note
from appliance.tuning.idle_wait import BUSY, BUSY_SHARE, WINDOW_S, CpuTime, IdleWait, busy_share, parse_cpu_time

# Two cores: the first half busy, the second idle but for 5 of 100 ticks. The guest times, part of user, must not count twice.
STAT = """cpu  55 0 0 145 0 0 0 0 40 0
cpu0 30 5 5 40 10 2 3 5 30 0
cpu1 5 0 0 95 0 0 0 0 0 0
intr 1 2 3
cpufreq 1 2 3 4 5 6 7 8
ctxt 7
"""


class Machine:
    """A machine that is busy to the given share in each window; counts what was slept.

    Jobs of the box run in the windows of ``jobs`` (the first is 1; 0 is before it).
    """

    def __init__(self, *shares: float, jobs: Collection[int] = ()) -> None:
        self._shares, self._now, self.slept, self.jobs = iter(shares), CpuTime(0, 0), list[float](), jobs

    def has_worked(self) -> bool:
        return len(self.slept) in self.jobs

    def wait(self, longest_s: float) -> IdleWait:
        """Return the wait on this machine."""
        return IdleWait(longest_s, self.has_worked, self.read, self.sleep)

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
    idle = machine.wait(180)
    assert (idle.wait(), idle.note, machine.slept) == (WINDOW_S, None, [WINDOW_S])


def test_a_busy_box_waits_until_it_is_idle() -> None:
    machine = Machine(0.9, 0.5, BUSY_SHARE + 0.01, BUSY_SHARE)
    idle = machine.wait(180)
    assert (idle.wait(), idle.note) == (4 * WINDOW_S, None)


@pytest.mark.parametrize(("longest_s", "windows"), [(180.0, 90), (5.0, 2), (4.0, 2)])
def test_a_box_that_never_becomes_idle_is_waited_for_no_longer_than_allowed_and_says_so(longest_s: float, windows: int) -> None:
    machine = Machine(*[0.5] * windows)
    idle = machine.wait(longest_s)
    idle.wait()
    assert idle.note == Note(BUSY, f"50 % > 15 % after {windows * WINDOW_S:.0f} s")
    assert machine.slept == [WINDOW_S] * windows
    assert (idle.wait(), len(machine.slept)) == (0, windows)  # all waits together


@pytest.mark.parametrize("longest_s", [3.9, 0.0, -5.0])
def test_without_time_nothing_waits(longest_s: float) -> None:
    machine = Machine(jobs=range(99))
    idle = machine.wait(longest_s)
    assert (idle.wait(), idle.wait_after_disturbance(), idle.note, machine.slept) == (0, 0, None, [])


def test_jobs_of_the_box_are_waited_for_though_the_processor_is_idle() -> None:
    """A job may use an accelerator alone."""
    machine = Machine(*[0.0] * 9, jobs=range(5))
    idle = machine.wait(180)
    assert (idle.wait(), idle.note) == (5 * WINDOW_S, None)


def test_jobs_are_waited_for_where_the_system_does_not_tell_what_the_processor_does() -> None:
    slept: list[float] = []
    idle = IdleWait(180, lambda: len(slept) < 3, lambda: None, slept.append)
    assert (idle.wait(), idle.note) == (3 * WINDOW_S, None)


def test_jobs_without_end_are_waited_for_no_longer_than_allowed() -> None:
    machine = Machine(*[0.0] * 5, jobs=range(99))
    idle = machine.wait(10)
    assert (idle.wait(), idle.note) == (10, Note(BUSY, "images are analysed after 10 s"))


def test_jobs_that_come_while_it_measures_are_waited_for_with_the_time_that_is_left() -> None:
    machine = Machine(0.5, *[0.0] * 9, jobs={3, 4})
    idle = machine.wait(10)
    assert idle.wait() == 2 * WINDOW_S
    idle.begin_timing()
    assert idle.wait_after_disturbance() == 0  # nothing ran
    machine.jobs = {2, 3, 4, 5, 6}
    assert (idle.wait_after_disturbance(), idle.note) == (3 * WINDOW_S, Note(BUSY, "images are analysed after 10 s"))
    assert idle.wait_after_disturbance() == 0  # the timing counts


def test_a_short_job_during_a_timing_is_seen_where_the_processor_tells_nothing() -> None:
    jobs, slept = [True], list[float]()
    idle = IdleWait(10, lambda: bool(jobs and jobs.pop()), lambda: None, slept.append)
    assert (idle.wait_after_disturbance(), idle.note, slept) == (WINDOW_S, None, [WINDOW_S])


def test_a_timing_that_counts_although_jobs_ran_is_noted() -> None:
    machine = Machine(0.5, 0.0, jobs={2})
    idle = machine.wait(4)
    assert (idle.wait(), idle.note) == (4, Note(BUSY, "images are analysed after 4 s"))
    other = Machine(0.5, 0.0)
    idle = other.wait(4)
    assert (idle.wait(), idle.note) == (4, None)
    other.jobs = {2}
    assert (idle.wait_after_disturbance(), idle.note) == (0, Note(BUSY, "images are analysed after 4 s"))


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
    idle = IdleWait(180, lambda: False, _readings(*values), slept.append)
    idle.wait()
    assert (idle.note, len(slept)) == (None, len(values) - 1)


@given(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_the_share_is_between_none_and_all(first: tuple[int, int], second: tuple[int, int]) -> None:
    share = busy_share(CpuTime(*first), CpuTime(*second))
    assert share is None if second[1] <= first[1] else share is not None and 0.0 <= share <= 1.0
