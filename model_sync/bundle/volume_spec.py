"""How the images of one series become the volume that a model takes, step by step.

``appliance.imaging.volumes.volume`` follows these steps in their order and knows no other. Axes of a tensor are depth, height, width;
``orient`` says which way of the patient each of them points.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import ModalityLut, NonEmpty, Normalise, Positive, Scale, Strict

# Where an axis may point: left or right, anterior or posterior, superior or inferior.
_DIRECTIONS = ({"L", "R"}, {"A", "P"}, {"S", "I"})
Millimetres: TypeAlias = Annotated[float, Field(ge=0.1, le=20)]
Quantile: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Orientation: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[LRAPSI]{3}$")]


class Stack(Strict):
    """Put the slices in the order of their positions along the normal (PS3.3 C.7.6.2.1.1), never of their numbers.

    Attributes:
        min_slices: a series of fewer is refused.
        max_slice_spacing_mm: a series with its slices farther apart is refused: the model never saw so coarse a volume.
    """

    step: Literal["stack"]
    by: Literal["position"]
    min_slices: Annotated[int, Field(ge=2)]
    max_slice_spacing_mm: Millimetres


class Orient(Strict):
    """Turn the volume so that depth, height and width run towards these sides of the patient: LIA, RAS."""

    step: Literal["orient"]
    axes: Orientation

    @model_validator(mode="after")
    def _each_axis_once(self) -> Self:
        if not all(len(pair & set(self.axes)) == 1 for pair in _DIRECTIONS):
            raise ValueError(f"{self.axes} must name one of L and R, one of A and P, one of S and I")
        return self


class Resample(Strict):
    """Interpolate linearly to voxels of this size along depth, height and width; a volume sheared by a tilted gantry is straightened."""

    step: Literal["resample"]
    spacing_mm: Annotated[list[Millimetres], Field(min_length=3, max_length=3)]
    interpolation: Literal["linear"]


class Clip(Strict):
    """Cut values off below ``low`` and above ``high``: a window in modality units."""

    step: Literal["clip"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("clip needs low < high")
        return self


class ClipQuantile(Strict):
    """Cut values off below the ``low`` and above the ``high`` quantile (0 to 1) of the volume."""

    step: Literal["clip_quantile"]
    low: Quantile
    high: Quantile

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("clip_quantile needs low < high")
        return self


class MinMax(Strict):
    """Scale the volume so that its least value becomes ``low`` and its greatest ``high``; rounded to whole numbers if asked."""

    step: Literal["min_max"]
    low: float
    high: float
    round: bool

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("min_max needs low < high")
        return self


class QuantileScale(Strict):
    """Scale so that the ``low`` quantile of the volume becomes 0 and the ``high`` one 1, without cutting anything off."""

    step: Literal["quantile_scale"]
    low: Quantile
    high: Quantile

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("quantile_scale needs low < high")
        return self


class CropPad(Strict):
    """Cut or pad every axis to this many voxels, the volume in the middle; new voxels hold ``fill``."""

    step: Literal["crop_pad"]
    depth: Positive
    height: Positive
    width: Positive
    fill: float
    align: Literal["center"]


class SlidingWindow(Strict):
    """Read the volume in overlapping windows of the model's size and blend them; a smaller volume is padded with ``fill``.

    Attributes:
        overlap: the share of a window that the next one covers too.
        weight: what a voxel of a window counts by its distance from the window's middle.
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
    """The tensor that a model of volumes takes, and the pipeline that makes it from one series.

    ``depth`` x ``height`` x ``width`` is what the model is given at a time: the whole volume, or one window of it.
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
