"""Which acquisitions a model of volumes may read, beyond what modality and body part say: a T1 model must not read a FLAIR.

Everything here is optional; a manifest without it is the same bytes as before there was any of it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import Strict

ImageTypeValue: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_ ]{1,16}$")]
Missing: TypeAlias = Literal["assume", "out_of_scope"]


class Milliseconds(Strict):
    """A span of time, both ends within it."""

    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("a span needs low < high")
        return self


class SequenceRule(Strict):
    """What every image (or frame) of a series must say about how it was acquired (PS3.3 C.8.3.1, C.8.13.5; C.7.6.1.1.2).

    Attributes:
        echo_time_ms: Echo Time, of enhanced images Effective Echo Time.
        repetition_time_ms: Repetition Time.
        scanning_sequence: the only values that Scanning Sequence may have: SE, IR, GR, EP, RM; none given: any.
        image_type_not: values that Image Type (and Frame Type) must not have: DERIVED, MPR, MIP, ADC.
        contrast_agent: what to do with a series in which a contrast agent is named; None: nothing.
        when_absent: what to do where an attribute that is asked for is not in the header.
    """

    echo_time_ms: Milliseconds | None = None
    repetition_time_ms: Milliseconds | None = None
    scanning_sequence: list[Literal["SE", "IR", "GR", "EP", "RM"]] = Field(default_factory=list)
    image_type_not: list[ImageTypeValue] = Field(default_factory=list)
    contrast_agent: Literal["caution", "out_of_scope"] | None = None
    when_absent: Missing = "out_of_scope"

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not any((self.echo_time_ms, self.repetition_time_ms, self.scanning_sequence, self.image_type_not, self.contrast_agent)):
            raise ValueError("sequence must ask for something, or not be there")
        return self
