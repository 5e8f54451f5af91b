"""The input check: a small network in the bundle that looks at each image before the model analyses it (manifest schema 2)."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import InputSpec
from model_sync.bundle.output_spec import Interval
from model_sync.field_types import NonEmpty, RelativePath, Sha256, Strict

UPRIGHT: Final = "upright"
# ``turned_90``: the content is turned by 90 degrees clockwise; turned by 90 degrees counter-clockwise it is upright.
InputClass: TypeAlias = Literal["upright", "turned_90", "turned_180", "turned_270", "negative", "other"]
MAX_INPUT_CHECK_BYTES: Final = 4 << 20


class MeasuredShare(Strict):
    """What part of the held-out images of one source and kind the check stopped."""

    source: NonEmpty
    kind: InputClass
    n: Annotated[int, Field(gt=0)]
    stopped: Interval


class InputCheck(Strict):
    """A classifier of the displayed image: is this what the model was made for?

    An image is analysed where the probability of ``upright`` is at least ``min_upright``; any other is quality-rejected with the most
    probable other class as its reason. It is never corrected silently.

    Attributes:
        file: the ONNX file; output ``output`` is float32 [n, classes], probabilities that add up to 1.
        sha256: its digest.
        input: its input tensor and pixel pipeline.
        classes: what each probability is of; contains ``upright`` and at least one other class.
        measured_on: the images that the figures were measured on.
        figures: the shares that were stopped, per source and kind.
    """

    file: RelativePath
    sha256: Sha256
    input: InputSpec
    output: NonEmpty
    classes: Annotated[list[InputClass], Field(min_length=2)]
    min_upright: Annotated[float, Field(gt=0, lt=1)]
    measured_on: NonEmpty
    figures: list[MeasuredShare]

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if UPRIGHT not in self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must contain upright and must not repeat")
        if unknown := sorted({figure.kind for figure in self.figures} - set(self.classes)):
            raise ValueError(f"figures of {', '.join(unknown)}, which is none of the classes")
        return self
