"""The acquisitions that a model of volumes may analyse, beyond modality and body part: a T1 model must not analyse a FLAIR.

Everything here is optional: a manifest without it has the same bytes as before these fields existed.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import require_low_below_high
from model_sync.field_types import Strict

ImageTypeValue: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_ ]{1,16}$")]
Missing: TypeAlias = Literal["assume", "out_of_scope"]


class Milliseconds(Strict):
    """A range of times, including both ends."""

    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(gt=0)]

    _ordered = model_validator(mode="after")(require_low_below_high)


class SequenceRule(Strict):
    """The required acquisition attributes of every image (or frame) of a series (PS3.3 C.8.3.1, C.8.13.5; C.7.6.1.1.2).

    Attributes:
        echo_time_ms: Echo Time, of enhanced images Effective Echo Time.
        repetition_time_ms: Repetition Time.
        scanning_sequence: the only values that Scanning Sequence may have: SE, IR, GR, EP, RM; none given: any.
        image_type_not: values that Image Type (and Frame Type) must not have: DERIVED, MPR, MIP, ADC.
        contrast_agent: what to do with a series that names a contrast agent; None: nothing.
        when_absent: what to do when a required attribute is absent.
    """

    echo_time_ms: Milliseconds | None = None
    repetition_time_ms: Milliseconds | None = None
    scanning_sequence: list[Literal["SE", "IR", "GR", "EP", "RM"]] = Field(default_factory=list)
    image_type_not: list[ImageTypeValue] = Field(default_factory=list)
    contrast_agent: Literal["caution", "out_of_scope"] | None = None
    when_absent: Missing = "out_of_scope"

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not any((self.echo_time_ms, self.repetition_time_ms, self.scanning_sequence, self.image_type_not, self.contrast_agent)):
            raise ValueError("sequence must require something, or be absent")
        return self
