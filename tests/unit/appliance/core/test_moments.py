"""Durations that nobody can stretch by setting the clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.moments import Clock, moment_utc
from tests.support.clocks import TestClock

YEAR_S = 365 * 86400.0
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 3600)),
        st.tuples(st.just("set"), st.floats(-2 * YEAR_S, 2 * YEAR_S)),
        st.tuples(st.just("restart"), st.just(0.0)),
    ),
    max_size=30,
)


@given(STEPS)
def test_within_one_start_the_age_is_the_time_that_passed_whatever_the_clock_says(steps: list[tuple[str, float]]) -> None:
    clock = TestClock()
    moment, passed = clock.now(), 0.0
    for step, seconds in steps:
        if step == "wait":
            clock.wait(seconds)
            passed += seconds
        elif step == "set":
            clock.set_by(seconds)
    assert clock.age_s(moment) == pytest.approx(passed, abs=0.01)


@given(STEPS, st.floats(60, 86400))
def test_nothing_lasts_longer_than_its_duration_after_the_last_restart_or_change_of_the_clock(
    steps: list[tuple[str, float]], duration_s: float
) -> None:
    clock = TestClock()
    moment = clock.now()
    for step, seconds in steps:
        {"wait": clock.wait, "set": clock.set_by}.get(step, lambda _: clock.restart())(seconds)
    clock.wait(duration_s + 1)
    assert clock.age_s(moment) > duration_s


def test_a_moment_of_a_clock_a_year_ahead_has_ended_after_a_restart_with_the_right_clock() -> None:
    clock = TestClock()
    clock.set_by(YEAR_S)
    moment = clock.now()
    clock.restart()
    assert clock.age_s(moment) == pytest.approx(0, abs=0.01)
    clock.set_by(-YEAR_S)
    assert clock.age_s(moment) == math.inf


@pytest.mark.parametrize("uptime", [101.09375, 100.0006, 100.9999])
def test_a_moment_that_was_just_stored_is_new_although_it_is_rounded_up(uptime: float) -> None:
    clock = TestClock()
    clock.uptime = uptime
    assert clock.age_s(clock.now()) == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("moment", ["", "1800000000", "1 2"])
def test_an_unknown_moment_is_infinitely_old(moment: str) -> None:
    assert TestClock().age_s(moment) == math.inf


def test_the_clock_of_this_machine() -> None:
    clock = Clock()
    moment = clock.now()
    assert 0 <= clock.age_s(moment) < 600
    assert moment_utc(moment).endswith("+00:00")
    assert moment_utc("") == ""


def test_without_an_identity_of_the_start_only_the_wall_clock_counts() -> None:
    times = [1000.0, 50.0]
    clock = Clock(lambda: times[0], lambda: times[1], lambda: "")
    moment = clock.now()
    times[:] = [4600.0, 60.0]  # perhaps a restart, perhaps not
    assert clock.age_s(moment) == 3600.0
    times[:] = [900.0, 3650.0]
    assert clock.age_s(moment) == math.inf
