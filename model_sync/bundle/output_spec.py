"""What a model gives back: its output tensors, what its scores mean, and the cases whose answer is known."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import NonEmpty, Positive, Strict

BACKGROUND: Final = "background"
MAX_CLASSES: Final = 256

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "mixed"]
# Each segment starts with a letter or a digit: that alone rules out "..", hidden files and absolute paths.
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
RelativePath: TypeAlias = Annotated[str, StringConstraints(pattern=rf"^{_SEGMENT}(/{_SEGMENT})*$", max_length=200)]
Sha256: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identifier: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class OutputSpec(Strict):
    """One output tensor; a text in ``shape`` is a dimension that varies.

    ``classes`` names what stands along axis 1 of segmentation logits, background first: a voxel belongs to the class whose logit is
    the greatest. A mask keeps a class in one byte, so there are 256 at most.
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
    """A picture or a volume with a known answer.

    ``expected`` is a probability per label; of a volume it is the Dice coefficient against the mask that lies in the file, which is 1
    for the model that drew it. ``tolerance`` is the largest allowed deviation per precision.
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
    """The operating point as measured within one source of pictures; None where a class is missing there."""

    source: NonEmpty
    n_positive: Count
    n_negative: Count
    sensitivity: Interval | None
    specificity: Interval | None
    auc: Fraction | None


class OperatingPoint(Strict):
    """The score from which on a label is called positive. It belongs to this version alone (R29)."""

    label: Identifier
    threshold: Annotated[float, Field(gt=0, lt=1)]
    sensitivity: Interval
    specificity: Interval
    measured_on: NonEmpty
    per_source: list[SourceMeasure]


class ScoreHistogram(Strict):
    """How the scores of a label were distributed when the model was made: what drift is measured against (R31)."""

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
