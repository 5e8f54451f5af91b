"""Which images a model may analyse: the part ``applies_to`` of the manifest."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.sequence_spec import Missing, SequenceRule
from model_sync.field_types import NonEmpty, Strict

Uid: TypeAlias = Annotated[str, StringConstraints(pattern=r"^(0|[1-9]\d*)(\.(0|[1-9]\d*))+$", max_length=64)]
CodeString: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_ ]{1,16}$")]
Outside: TypeAlias = Literal["caution", "out_of_scope"]
Words: TypeAlias = Annotated[list[NonEmpty], Field(min_length=1, max_length=64)]


class Text(Strict):
    """A text for people, in both languages of the product."""

    zh: NonEmpty
    en: NonEmpty


class Synonyms(Strict):
    """Words that senders use for a body part or a view, by the defined term that they mean (``CHEST``: ``["RTG KLP"]``).

    A word matches where it is the whole value, without regard to case and spaces at its ends.
    """

    body_part: dict[CodeString, Words] = Field(default_factory=dict)
    view: dict[CodeString, Words] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _words_are_unique(self) -> Self:
        for name in ("body_part", "view"):
            words = [" ".join(word.upper().split()) for terms in getattr(self, name).values() for word in terms]
            if twice := sorted({word for word in words if words.count(word) > 1}):
                raise ValueError(f"{name} must not give a word two meanings: {', '.join(twice)}")
        return self


class AgeRange(Strict):
    """The ages in years that the training data supports, and what to do outside them."""

    min_years: Annotated[float, Field(ge=0)]
    max_years: Annotated[float, Field(gt=0, le=150)]
    outside: Outside
    absent: Outside
    note: Text

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_years >= self.max_years:
            raise ValueError("min_years must be below max_years")
        return self

    def includes(self, age_years: float) -> bool:
        """Whether a patient of this age is within the range; ``max_years`` is an age in completed years."""
        return self.min_years <= age_years < self.max_years + 1


class AppliesTo(Strict):
    """The images that the model may analyse, by DICOM attributes, and the assumption when an attribute is absent.

    ``sequence`` is for models of volumes only: how their series must have been acquired. ``synonyms`` (schema 2) are words of senders that
    the box does not know by itself.
    """

    modality: Annotated[list[CodeString], Field(min_length=1)]
    sop_class_uid: Annotated[list[Uid], Field(min_length=1)]
    body_part: Annotated[list[CodeString], Field(min_length=1)]
    view_position: list[CodeString]
    when_body_part_absent: Missing
    assumed_body_part: str
    when_view_absent: Missing
    assumed_view: str
    age: AgeRange
    sequence: SequenceRule | None = None
    synonyms: Synonyms | None = None

    @model_validator(mode="after")
    def _assumptions_are_in_scope(self) -> Self:
        if self.when_body_part_absent == "assume" and self.assumed_body_part not in self.body_part:
            raise ValueError("assumed_body_part must be one of body_part")
        has_no_views = not self.view_position and not self.assumed_view  # slices have no view
        if self.when_view_absent == "assume" and not has_no_views and self.assumed_view not in self.view_position:
            raise ValueError("assumed_view must be one of view_position")
        return self
