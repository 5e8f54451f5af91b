"""The sequential test for shifted scores: its limits hold in simulations with fixed seeds, far from where chance could decide."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.lifecycle import score_shift
from appliance.lifecycle.score_shift import HISTORY_LIMIT, STUDIES_PER_YEAR, Reference, ShiftEvidence, limits
from model_sync.bundle import Interval, OperatingPoint, ScoreHistogram, SourceMeasure
from tests.bench.drift import AFTER, BEFORE, find_alarm, reference_of, sample

EDGES = [number / 20 for number in range(21)]


def histogram(counts: list[int]) -> ScoreHistogram:
    return ScoreHistogram(label="x", edges=EDGES, counts=counts, measured_on="x")


def point(ill: int, others: int) -> OperatingPoint:
    source = SourceMeasure(source="x", n_positive=ill, n_negative=others, sensitivity=None, specificity=None, auc=None)
    any_value = Interval(value=0.9, low=0.8, high=1.0)
    return OperatingPoint(
        label="x", threshold=0.5, sensitivity=any_value, specificity=any_value, measured_on="x", per_source=[source]
    )  # fmt: skip


@pytest.mark.parametrize("earlier", [100, 500])
def test_r44_a_shift_of_the_median_is_found_within_50_studies(earlier: int) -> None:
    rng = random.Random(44)
    runs = 30
    alarms = [find_alarm([*sample(rng, BEFORE, earlier), *sample(rng, AFTER, 50)]) for _ in range(runs)]
    found = sum(alarm is not None and alarm >= earlier for alarm in alarms)
    assert found >= 0.85 * runs  # 98 % of the runs of the benchmark


def test_r44_a_shift_against_the_reference_is_found_without_any_history() -> None:
    rng = random.Random(45)
    alarms = [find_alarm(sample(rng, AFTER, 50), reference_of(rng, BEFORE)) for _ in range(30)]
    assert sum(alarm is not None for alarm in alarms) >= 25


def test_r44_less_than_one_false_alarm_per_box_and_year() -> None:
    rng = random.Random(46)
    years = 4
    alarms = [find_alarm([rng.random() for _ in range(STUDIES_PER_YEAR)]) for _ in range(years)]
    assert sum(alarm is None for alarm in alarms) >= 1  # 0.2 alarms a year in the benchmark: an alarm in each year is not chance


def test_a_clinic_with_fewer_ill_patients_than_the_test_set_is_no_shift_against_the_reference() -> None:
    rng = random.Random(47)
    reference = Reference.of(histogram([400, *[10] * 18, 420]), point(500, 500))
    for ill in (0.02, 0.3, 0.5):
        scores = [rng.choice((0.97, 0.98)) if rng.random() < ill else rng.choice((0.01, 0.02, 0.3)) for _ in range(400)]
        evidence = ShiftEvidence()
        for score in scores:
            evidence.add(score, reference)
        assert math.fsum(evidence.against_reference) / len(evidence.against_reference) < limits(1)[1]


def test_what_the_reference_can_never_give_is_found_in_both_directions() -> None:
    # A screening set: nearly everybody is well, and half of the scores lie in the middle.
    reference = Reference.of(histogram([0] * 8 + [250] * 4 + [0] * 8), point(50, 950))
    for score in (0.02, 0.97):
        evidence = ShiftEvidence()
        for _ in range(40):
            evidence.add(score, reference)
        assert evidence.exceeds(1)
        assert math.fsum(evidence.own) / len(evidence.own) < limits(1)[0]  # the same score all the time is no shift of its own


def test_more_labels_raise_the_limits_and_the_parts_add_up() -> None:
    own, reference = limits(1)
    assert STUDIES_PER_YEAR / own + STUDIES_PER_YEAR / reference == pytest.approx(1.0)
    assert limits(14) == pytest.approx((14 * own, 14 * reference))
    assert limits(0) == limits(1)


@given(st.integers(1, 400))
def test_the_mean_of_the_bets_over_all_ranks_is_at_most_one(size: int) -> None:
    for number in range(len(score_shift._BETS)):
        bets = [score_shift._bets_of_rank(rank, rank + 1, size)[number] for rank in range(size)]
        assert math.fsum(bets) / size <= 1.0 + 1e-9


@given(st.integers(1, 200), st.data())
def test_equal_scores_share_the_bets_of_their_ranks(size: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low + 1, size))
    tolerated = [score_shift._mass(*ends(rank, size)) for rank in range(low, high)]
    single = [score_shift._bets_of_rank(rank, rank + 1, size)[0] for rank in range(low, high)]
    joint = score_shift._bets_of_rank(low, high, size)[0]
    assert joint == pytest.approx(math.fsum(map(math.prod, zip(single, tolerated, strict=True))) / math.fsum(tolerated), rel=1e-6)


def ends(rank: int, size: int) -> tuple[float, float]:
    """The interval of normal scores of a rank, less the tolerated shift of the first bet."""
    tolerated = math.copysign(score_shift._TOLERANCE, score_shift._BETS[0])
    return score_shift._quantile(rank / size) - tolerated, score_shift._quantile((rank + 1) / size) - tolerated


@given(st.lists(st.floats(0, 1), max_size=60), st.lists(st.integers(0, 50), min_size=20, max_size=20), st.integers(0, 9), st.integers(0, 9))
def test_no_scores_and_no_histogram_break_it(scores: list[float], counts: list[int], ill: int, others: int) -> None:
    reference = Reference.of(histogram([counts[0] + 1, *counts[1:]]), point(ill, others))
    assert all(low <= high + 1e-12 for low, high in zip(reference.highest, reference.lowest, strict=True))
    evidence = ShiftEvidence()
    for score in scores:
        evidence.add(score, reference)
        assert evidence.is_valid()


def test_the_history_is_bounded_and_keeps_the_first_scores() -> None:
    evidence = ShiftEvidence()
    for number in range(HISTORY_LIMIT + 10):
        evidence.add(number % 100 / 100, None)
    evidence.add(0.123456, None)
    assert len(evidence.history) == HISTORY_LIMIT
    assert 0.123456 not in evidence.history
