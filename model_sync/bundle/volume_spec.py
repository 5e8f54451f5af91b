"""The input of a model of volumes: its tensor, and the pipeline that builds it from the images of one series.

The appliance executes only these steps, in their order. The axes of a tensor are depth, height, width; ``orient`` gives the patient
direction of each.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import ModalityLut, Normalise, Scale, require_low_below_high
from model_sync.field_types import NonEmpty, Positive, Strict

# Where an axis may point: left or right, anterior or posterior, superior or inferior.
_DIRECTIONS = ({"L", "R"}, {"A", "P"}, {"S", "I"})
Millimetres: TypeAlias = Annotated[float, Field(ge=0.1, le=20)]
Quantile: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Orientation: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[LRAPSI]{3}$")]


class Stack(Strict):
    """Sort the slices by their positions along the normal (PS3.3 C.7.6.2.1.1), never by their numbers.

    Attributes:
        min_slices: a series of fewer is refused.
        max_slice_spacing_mm: a series with a larger slice spacing is refused: the model was not trained on it.
    """

    step: Literal["stack"]
    by: Literal["position"]
    min_slices: Annotated[int, Field(ge=2)]
    max_slice_spacing_mm: Millimetres


class Orient(Strict):
    """Turn the volume so that depth, height and width point to these sides of the patient, such as LIA or RAS."""

    step: Literal["orient"]
    axes: Orientation

    @model_validator(mode="after")
    def _each_axis_once(self) -> Self:
        if not all(len(pair & set(self.axes)) == 1 for pair in _DIRECTIONS):
            raise ValueError(f"{self.axes} must name one of L and R, one of A and P, one of S and I")
        return self


class Resample(Strict):
    """Interpolate linearly to voxels of this size along depth, height and width; the shear of a tilted gantry is corrected."""

    step: Literal["resample"]
    spacing_mm: Annotated[list[Millimetres], Field(min_length=3, max_length=3)]
    interpolation: Literal["linear"]


class Clip(Strict):
    """Clip values to ``low`` and ``high``, in modality units."""

    step: Literal["clip"]
    low: float
    high: float
    _ordered = model_validator(mode="after")(require_low_below_high)


class ClipQuantile(Strict):
    """Clip values to the ``low`` and ``high`` quantile (0 to 1) of the volume."""

    step: Literal["clip_quantile"]
    low: Quantile
    high: Quantile
    _ordered = model_validator(mode="after")(require_low_below_high)


class MinMax(Strict):
    """Scale the volume so that its least value becomes ``low`` and its greatest ``high``; with ``round`` to integers."""

    step: Literal["min_max"]
    low: float
    high: float
    round: bool
    _ordered = model_validator(mode="after")(require_low_below_high)


class QuantileScale(Strict):
    """Scale so that the ``low`` quantile of the volume becomes 0 and the ``high`` one 1, without clipping."""

    step: Literal["quantile_scale"]
    low: Quantile
    high: Quantile
    _ordered = model_validator(mode="after")(require_low_below_high)


class CropPad(Strict):
    """Crop or pad every axis to this many voxels; the volume is centred, and new voxels have the value ``fill``."""

    step: Literal["crop_pad"]
    depth: Positive
    height: Positive
    width: Positive
    fill: float
    align: Literal["center"]


class SlidingWindow(Strict):
    """Analyse the volume in overlapping windows of the model's size and blend them; a smaller volume is padded with ``fill``.

    Attributes:
        overlap: the share of a window that the next one also covers.
        weight: the weight of a voxel by its distance from the centre of the window.
        fill: value of the voxels outside the volume.
    """

    step: Literal["sliding_window"]
    overlap: Annotated[float, Field(ge=0, le=0.9)]
    weight: Literal["gaussian", "linear"]
    fill: float


_AnyVolumeStep: TypeAlias = (
    Stack | ModalityLut | Orient | Resample | Clip | ClipQuantile | MinMax | QuantileScale | Scale | Normalise | CropPad | SlidingWindow
)
VolumeStep: TypeAlias = Annotated[_AnyVolumeStep, Field(discriminator="step")]


class VolumeSpec(Strict):
    """The input tensor of a model of volumes, and the pipeline that builds it from one series.

    ``depth`` x ``height`` x ``width`` is the input of one inference: the complete volume, or one window.
    """

    name: NonEmpty
    layout: Literal["NCDHW"]
    dtype: Literal["float32"]
    channels: Literal[1]
    depth: Positive
    height: Positive
    width: Positive
    pipeline: Annotated[list[VolumeStep], Field(min_length=1)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of one tensor: channels, depth, height, width."""
        return self.channels, self.depth, self.height, self.width

    @model_validator(mode="after")
    def _pipeline_fits(self) -> Self:
        match self.pipeline[:4]:
            case [Stack(), ModalityLut(), Orient(), Resample()]:
                pass
            case _:
                raise ValueError("the pipeline must begin with stack, modality_lut, orient and resample")
        for step in self.pipeline[4:]:
            if isinstance(step, (Stack, ModalityLut, Orient, Resample)):
                raise ValueError(f"the pipeline must have {step.step} once, at its beginning")
            if isinstance(step, Normalise) and not len(step.mean) == len(step.std) == self.channels:
                raise ValueError("normalise needs one mean and one std per channel")
        if any(isinstance(step, SlidingWindow) for step in self.pipeline[:-1]):
            raise ValueError("sliding_window must be the last step")
        if not isinstance(self.pipeline[-1], SlidingWindow):
            sizes = [(step.depth, step.height, step.width) for step in self.pipeline if isinstance(step, CropPad)]
            if sizes[-1:] != [self.shape[1:]]:
                raise ValueError("without a sliding_window the pipeline must crop_pad to depth, height and width")
        return self
