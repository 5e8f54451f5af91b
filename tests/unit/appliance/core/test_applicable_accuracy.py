"""The accuracy that applies to a patient: never that of other patients."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.applicable_accuracy import MIXED_AGES, Accuracy, AccuracyBasis, accuracy_for
from model_sync.bundle import AgeRange, Group, Interval, OperatingPoint
from tests.support.stored_scans import RULE


def interval(value: float) -> Interval:
    return Interval(value=value, low=max(0.0, value - 0.05), high=min(1.0, value + 0.05))


def group(population: Any, ages: tuple[float, float], rate: float, n: tuple[int, int] = (50, 50)) -> Group:
    return Group(
        population=population, min_years=ages[0], max_years=ages[1], sources=["A hospital"], n_positive=n[0], n_negative=n[1],
        sensitivity=interval(rate) if n[0] else None, specificity=interval(rate) if n[1] else None,
    )  # fmt: skip


CHILDREN, ADULTS = group("child", (1, 5), 0.96), group("adult", (18, 120), 0.86)


def point(*groups: Group) -> OperatingPoint:
    return OperatingPoint(
        label="pneumonia", threshold=0.4, sensitivity=interval(0.952), specificity=interval(0.932), measured_on="a set", per_source=[],
        groups=list(groups),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("age", "basis", "own"),
    [
        (4.0, "group", CHILDREN),
        (5.9, "group", CHILDREN),
        (72.0, "group", ADULTS),
        (0.5, "not_measured", None),
        (6.0, "not_measured", None),
        (17.9, "not_measured", None),
        (None, "age_unknown", None),
    ],
)
def test_a_patient_gets_the_figures_of_the_own_group(age: float | None, basis: str, own: Group | None) -> None:
    accuracy = accuracy_for(point(CHILDREN, ADULTS), RULE.age, age)
    assert accuracy == Accuracy(basis=AccuracyBasis(basis), group=own, other_groups=[g for g in (CHILDREN, ADULTS) if g is not own])


@pytest.mark.parametrize(("age", "basis"), [(4.0, "mixed"), (72.0, "not_measured"), (0.9, "not_measured"), (None, "age_unknown")])
def test_without_groups_the_figures_of_all_images_are_for_the_ages_of_the_model_only(age: float | None, basis: str) -> None:
    assert accuracy_for(point(), RULE.age, age) == Accuracy(basis=AccuracyBasis(basis))


def test_a_group_without_images_was_not_measured() -> None:
    assert accuracy_for(point(group("child", (1, 5), 0.9, (0, 0))), RULE.age, 4.0).basis is AccuracyBasis.NOT_MEASURED


@given(st.none() | st.floats(0, 130), st.booleans(), st.booleans())
def test_no_patient_gets_the_figures_of_other_patients(age: float | None, has_children: bool, has_adults: bool) -> None:
    groups = [item for item, is_there in ((CHILDREN, has_children), (ADULTS, has_adults)) if is_there]
    model_age = AgeRange(min_years=1, max_years=5, outside="caution", absent="caution", note=RULE.age.note)
    accuracy = accuracy_for(point(*groups), model_age, age)
    if accuracy.group is not None:
        assert age is not None
        assert accuracy.group.includes(age)
    if accuracy == MIXED_AGES:
        assert age is not None
        assert not groups
        assert model_age.includes(age)
    assert accuracy.group not in accuracy.other_groups
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy
