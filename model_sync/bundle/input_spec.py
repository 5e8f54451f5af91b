"""The input of a model of images: its tensor, and the pixel pipeline of the manifest.

The appliance executes only these steps, in their order, so that a model gets the same input as in training.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator
from typing_extensions import Self

from model_sync.field_types import NonEmpty, Positive, Strict


class ModalityLut(Strict):
    """Apply the Modality LUT or Rescale Slope and Intercept (PS3.3 C.11.1)."""

    step: Literal["modality_lut"]


class Voi(Strict):
    """Apply the VOI LUT or the first window (PS3.3 C.11.2); ``default`` is used where the file carries neither."""

    step: Literal["voi"]
    default: Literal["minmax", "percentile"]


class Monochrome2(Strict):
    """Make low values black: inverts MONOCHROME1, exactly once; colour becomes luminance."""

    step: Literal["monochrome2"]


class ToUint8(Strict):
    """Quantize the displayed range to 0..255."""

    step: Literal["to_uint8"]


class Letterbox(Strict):
    """Pad with ``fill`` to the aspect ratio of the input; the image is centred."""

    step: Literal["letterbox"]
    fill: Annotated[int, Field(ge=0, le=255)]
    align: Literal["center"]


class Resize(Strict):
    """Resize to ``height`` x ``width`` pixels with an antialiasing filter."""

    step: Literal["resize"]
    height: Positive
    width: Positive
    filter: Literal["antialias_bilinear", "antialias_bicubic", "area"]


class Scale(Strict):
    """Divide by ``divide_by``: 255 gives 0..1."""

    step: Literal["scale"]
    divide_by: Annotated[float, Field(gt=0)]


class Normalise(Strict):
    """Subtract ``mean`` and divide by ``std``, one value per channel."""

    step: Literal["normalise"]
    mean: Annotated[list[float], Field(min_length=1)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


_AnyStep: TypeAlias = ModalityLut | Voi | Monochrome2 | ToUint8 | Letterbox | Resize | Scale | Normalise
Step: TypeAlias = Annotated[_AnyStep, Field(discriminator="step")]


def require_low_below_high(span: Any) -> Any:
    """Raise ValueError when ``low`` is not below ``high``: the validator of every range in the manifest."""
    if span.low >= span.high:
        raise ValueError(f"{getattr(span, 'step', 'a range')} needs low < high")
    return span


class InputSpec(Strict):
    """The input tensor of the model, and the pixel pipeline that produces it."""

    name: NonEmpty
    layout: Literal["NCHW"]
    dtype: Literal["float32"]
    channels: Literal[1, 3]
    height: Positive
    width: Positive
    pipeline: Annotated[list[Step], Field(min_length=1)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image's tensor: channels, height, width."""
        return self.channels, self.height, self.width

    @model_validator(mode="after")
    def _pipeline_fits(self) -> Self:
        sizes = [(step.height, step.width) for step in self.pipeline if isinstance(step, Resize)]
        if sizes != [(self.height, self.width)]:
            raise ValueError(f"the pipeline must resize exactly once, to {self.height} x {self.width}")
        for step in self.pipeline:
            if isinstance(step, Normalise) and not len(step.mean) == len(step.std) == self.channels:
                raise ValueError("normalise needs one mean and one std per channel")
        return self
