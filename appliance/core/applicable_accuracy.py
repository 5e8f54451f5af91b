"""Which measured accuracy applies to a patient: that of the patient's own group, or none.

A model that was measured on children has no known accuracy for an adult of 72 years. Its sensitivity and specificity must not be shown
with the adult's result as if they were the adult's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeAlias

from pydantic import Field

from model_sync.bundle import AgeRange, Group, OperatingPoint, Strict

PatientGroup: TypeAlias = Group
"""A group of patients with its measured accuracy, for packages that do not import the manifest."""


class AccuracyBasis(str, Enum):
    """Which figures apply to the patient of a result.

    GROUP: those of the patient's own group. MIXED: those of all test images together, whose patients were of several ages, since the model
    names no groups. AGE_UNKNOWN and NOT_MEASURED: none.
    """

    GROUP = "group"
    MIXED = "mixed"
    AGE_UNKNOWN = "age_unknown"
    NOT_MEASURED = "not_measured"


class Accuracy(Strict):
    """The accuracy that applies to the patient of a result, as stored with it.

    Attributes:
        basis: which figures apply.
        group: the patient's group; None unless ``basis`` is GROUP.
        other_groups: the groups that the patient does not belong to.
    """

    basis: AccuracyBasis
    group: Group | None = None
    other_groups: list[Group] = Field(default_factory=list)


# Of a result that says nothing about groups.
MIXED_AGES: Final = Accuracy(basis=AccuracyBasis.MIXED)


def accuracy_for(point: OperatingPoint, model_age: AgeRange, age_years: float | None) -> Accuracy:
    """Determine which measured accuracy applies to a patient.

    Args:
        point: the operating point, with its groups where the manifest has them (schema 2).
        model_age: the ages that the model is for. Without groups the figures of all test images count as measured for these ages only.
        age_years: of the patient; None where it is not known.
    """
    own = point.group_of(age_years)
    others = [group for group in point.groups if group is not own]
    if age_years is None:
        return Accuracy(basis=AccuracyBasis.AGE_UNKNOWN, other_groups=others)
    if own is not None and own.n_positive + own.n_negative > 0:
        return Accuracy(basis=AccuracyBasis.GROUP, group=own, other_groups=others)
    if not point.groups and model_age.includes(age_years):
        return MIXED_AGES
    return Accuracy(basis=AccuracyBasis.NOT_MEASURED, other_groups=others)
