"""The arithmetic of the watch: shares, medians, the population stability index, and the end of a trial."""

from __future__ import annotations

import math
import random
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.self_test_report import LATENCY_FLOOR_MS
from appliance.lifecycle.trial_monitor import Statistics, find_violation, is_over, stability_index
from model_sync.bundle import ScoreHistogram, Watch

EDGES = [number / 10 for number in range(11)]
SINCE = datetime(2026, 1, 1, tzinfo=timezone.utc)
REFERENCE = ScoreHistogram(label="pneumonia", edges=EDGES, counts=[300, 20, 10, 5, 5, 5, 5, 10, 40, 300], measured_on="x")


def seen(cases: int = 100, failures: int = 0, latency_ms: float | None = 1.0, drift: float | None = None) -> Statistics:
    return Statistics(cases, failures, latency_ms, drift)


@pytest.mark.parametrize(
    ("statistics", "code"),
    [
        (seen(), None),
        (seen(0, 2), None),
        (seen(0, 3), "activation.failures"),
        (seen(27, 3), None),
        (seen(26, 3), "activation.failures"),
        (seen(latency_ms=5 * LATENCY_FLOOR_MS), None),
        (seen(latency_ms=5 * LATENCY_FLOOR_MS + 1), "activation.latency"),
        (seen(4, latency_ms=1e6), None),
        (seen(0, 0, None), None),
        (seen(drift=3.0), None),
        (seen(drift=3.1), "activation.drift"),
    ],
)
def test_bounds_of_the_manifest(statistics: Statistics, code: str | None) -> None:
    note = find_violation(statistics, Watch(), 1.0)
    assert (note.code if note else None) == code


def test_latency_is_a_multiple_of_the_self_tests() -> None:
    assert find_violation(seen(latency_ms=499), Watch(), 100.0) is None
    assert find_violation(seen(latency_ms=501), Watch(), 100.0)


def test_no_drift_is_judged_where_the_manifest_says_so() -> None:
    assert find_violation(seen(drift=99.0), Watch(max_score_drift=None), 1.0) is None


@pytest.mark.parametrize(
    ("cases", "hours", "over"), [(199, 1, False), (200, 0, True), (0, 1000, False), (1, 71.9, False), (1, 72.1, True), (1, -500, False)]
)
def test_the_end_of_a_trial(cases: int, hours: float, over: bool) -> None:
    assert is_over(seen(cases), Watch(), SINCE.isoformat(), SINCE + timedelta(hours=hours)) is over


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_the_index_is_never_negative_and_always_finite(scores: list[float]) -> None:
    value = stability_index(scores, REFERENCE)
    assert value >= 0
    assert math.isfinite(value)


def test_the_same_shape_has_next_to_no_drift_and_a_lost_shape_has_much() -> None:
    rng = random.Random(1)
    middles = [(low + high) / 2 for low, high in pairwise(EDGES)]
    same = [stability_index(rng.choices(middles, REFERENCE.counts, k=100), REFERENCE) - 9 / 100 for _ in range(200)]
    assert abs(sum(same) / len(same)) < 0.1  # what chance alone gives is taken off
    assert max(same) < 1.0
    fewer_ill = [0.05] * 95 + [0.95] * 5  # another clinic, not another model
    assert stability_index(fewer_ill, REFERENCE) - 0.09 < 3.0
    assert stability_index([0.5] * 100, REFERENCE) - 0.09 > 3.0
    assert stability_index([rng.random() for _ in range(100)], REFERENCE) > 1.0


def test_a_score_beyond_the_edges_belongs_to_the_outermost_bin() -> None:
    assert stability_index([-1.0, 2.0], REFERENCE) == stability_index([0.0, 1.0], REFERENCE)


def test_a_trial_does_not_end_well_while_too_much_of_it_failed() -> None:
    bounds = Watch(trial_cases=3, trial_hours=72.0)
    later = SINCE + timedelta(hours=73)
    assert not is_over(Statistics(1, 2, None, None), bounds, SINCE.isoformat(), later)  # too few to be taken back, too bad to be good
    assert is_over(Statistics(1, 0, None, None), bounds, SINCE.isoformat(), later)
    assert not is_over(Statistics(3, 2, None, None), bounds, SINCE.isoformat())
