"""The outputs of a model: tensors, operating points, and golden cases."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from model_sync.field_types import Identifier, NonEmpty, Positive, Precision, RelativePath, Sha256, Strict

BACKGROUND: Final = "background"
MAX_CLASSES: Final = 256

Count: TypeAlias = Annotated[int, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class OutputSpec(Strict):
    """One output tensor; a text in ``shape`` is a variable dimension.

    ``classes`` names axis 1 of segmentation logits, background first: a voxel belongs to the class with the largest logit. A mask
    stores a class in one byte, so there are at most 256.
    """

    name: NonEmpty
    kind: Literal["probability", "cam", "segmentation_logits"]
    shape: Annotated[list[Positive | NonEmpty], Field(min_length=1)]
    classes: Annotated[list[Identifier], Field(min_length=2, max_length=MAX_CLASSES)] | None = None

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if (self.classes is not None) != (self.kind == "segmentation_logits"):
            raise ValueError("classes belong to an output of kind segmentation_logits, and to no other")
        if self.classes is not None:
            if self.classes[0] != BACKGROUND or len(set(self.classes)) != len(self.classes):
                raise ValueError(f"classes must begin with {BACKGROUND} and must not repeat")
            if len(self.shape) != 5 or self.shape[1] not in (len(self.classes), "c"):
                raise ValueError("segmentation_logits need the shape [n, classes, d, h, w]")
        return self


class Explain(Strict):
    """The output that carries the class activation map."""

    output: NonEmpty
    kind: Literal["cam"]


class Golden(Strict):
    """A golden case: an image or a volume with a known result.

    ``expected`` is a probability per label; for a volume it is the Dice coefficient against the mask in the file, which is 1 for the
    model that made it. ``tolerance`` is the largest allowed deviation per precision.
    """

    input: RelativePath
    sha256: Sha256
    expected: dict[str, Fraction]
    tolerance: dict[Precision, Annotated[float, Field(gt=0, le=1)]]


class Interval(Strict):
    """A measured fraction with its 95 % confidence interval (Wilson)."""

    value: Fraction
    low: Fraction
    high: Fraction

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("an interval needs low <= value <= high")
        return self


class SourceMeasure(Strict):
    """The operating point as measured within one source of images; None where a class is missing."""

    source: NonEmpty
    n_positive: Count
    n_negative: Count
    sensitivity: Interval | None
    specificity: Interval | None
    auc: Fraction | None


class Group(Strict):
    """The operating point as measured on one group of patients (schema 2); None where a class is missing.

    Attributes:
        population: the group as the sources state it.
        min_years: youngest patients of the group, as the sources state it.
        max_years: oldest patients of the group; a patient of this age in completed years belongs to it.
        sources: where the images of the group come from.
        n_positive: images with the finding.
        n_negative: images without it.
        sensitivity: at the threshold of the operating point.
        specificity: at the threshold of the operating point.
    """

    population: Literal["child", "adult"]
    min_years: Annotated[float, Field(ge=0)]
    max_years: Annotated[float, Field(gt=0, le=150)]
    sources: Annotated[list[NonEmpty], Field(min_length=1)]
    n_positive: Count
    n_negative: Count
    sensitivity: Interval | None
    specificity: Interval | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_years >= self.max_years:
            raise ValueError("min_years must be below max_years")
        if (self.sensitivity is None) != (self.n_positive == 0) or (self.specificity is None) != (self.n_negative == 0):
            raise ValueError("sensitivity needs images with the finding, and specificity images without it")
        return self

    def includes(self, age_years: float) -> bool:
        """Whether a patient of this age belongs to the group."""
        return self.min_years <= age_years < self.max_years + 1


class OperatingPoint(Strict):
    """The threshold from which a label is positive. It is valid for this version only (R29).

    ``groups`` (schema 2) must not overlap in age, so that a patient belongs to one group at most.
    """

    label: Identifier
    threshold: Annotated[float, Field(gt=0, lt=1)]
    sensitivity: Interval
    specificity: Interval
    measured_on: NonEmpty
    per_source: list[SourceMeasure]
    groups: list[Group] = Field(default_factory=list)

    @model_validator(mode="after")
    def _groups_are_apart(self) -> Self:
        ordered = sorted(self.groups, key=lambda group: group.min_years)
        if any(group.max_years + 1 > after.min_years for group, after in pairwise(ordered)):
            raise ValueError(f"the groups of {self.label} must not overlap in age")
        return self

    def group_of(self, age_years: float | None) -> Group | None:
        """The group that a patient belongs to; None where the age is not known, or nobody of this age was measured."""
        return None if age_years is None else next((group for group in self.groups if group.includes(age_years)), None)


class ScoreHistogram(Strict):
    """The distribution of a label's scores when the model was made: the reference for drift (R31)."""

    label: Identifier
    edges: Annotated[list[float], Field(min_length=2)]
    counts: Annotated[list[Count], Field(min_length=1)]
    measured_on: NonEmpty

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.edges) != len(self.counts) + 1 or not sum(self.counts):
            raise ValueError("a histogram needs one more edge than counts, and at least one count")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("the edges of a histogram must rise")
        return self
