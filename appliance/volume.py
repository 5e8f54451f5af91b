"""The images of one series as the volume that a model takes: pure, driven step by step by the manifest's ``VolumeSpec``.

Slices may come one to an image or many (enhanced multi-frame, PS3.3 C.7.6.16). Headers are read first, all of them; only when they
make one volume are pixels decoded, slice by slice, into one array of the stored type: rescaling to modality units (HU) commutes with
linear interpolation and is done on its result, so that 400 slices of a CT take 210 MB and not 840.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from appliance.domain import Note
from appliance.errors import InferenceError, VolumeError
from appliance.geometry import Grid, Plane, plane_of, stack, turned
from appliance.greyscale import GreyHeader, grey_header
from appliance.pixels import frame_count, iter_frames
from appliance.resample import linear, nearest, straight_grid
from model_sync.bundle import (
    Clip,
    ClipQuantile,
    CropPad,
    MinMax,
    Normalise,
    Orient,
    QuantileScale,
    Resample,
    Scale,
    SlidingWindow,
    Stack,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from model_sync.bundle import VolumeSpec, VolumeStep

    Values: TypeAlias = NDArray[np.float32]

Source: TypeAlias = "Callable[[], Dataset]"

# With the model's own volume beside it, what fits below the memory cap of a process of the box.
MAX_STACK_BYTES: Final = 384 * 2**20
MAX_VOXELS: Final = 24 * 2**20
_MAX_FRAMES: Final = 4096


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one series in order, as stored.

    Attributes:
        values: [slices, rows, columns]; times ``slope`` plus ``intercept`` they are in modality units.
        slope: Rescale Slope; 1 where the values are in modality units already.
        intercept: Rescale Intercept; 0 in that case.
        grid: where they are in the patient.
        frames: for each slice, which of the sources it is from, and which frame of that.
        tilt: the angle (degrees) by which the gantry sheared the stack.
        notes: what a person must see.
    """

    values: NDArray[Any]
    slope: float
    intercept: float
    grid: Grid
    frames: tuple[tuple[int, int], ...]
    tilt: float = 0.0
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """A volume ready for a model: float32 [depth, height, width], where it is in the patient, and in words what was done."""

    values: Values
    grid: Grid
    steps: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    """What the header of one frame says."""

    frame: tuple[int, int]
    plane: Plane
    grey: GreyHeader
    units: tuple[bool, str, str]


def read_series(sources: Sequence[Source], spec: VolumeSpec) -> Series:
    """Read the slices of a series, in whatever order they come.

    Args:
        sources: each gives one image of the series; it is asked twice, once for its header and once for its pixels.
        spec: the manifest's pipeline, whose first step says what a volume needs.

    Raises:
        VolumeError: the series is no volume; ``volume.*``.
        PixelError: a frame cannot be decoded.
    """
    rule = spec.pipeline[0]
    if not isinstance(rule, Stack):
        raise InferenceError("job.error", "the model's pipeline must begin with stack")
    slices = [item for number, source in enumerate(sources) for item in _slices(number, source())]
    volume = [item for item in slices if not item.plane.localizer]
    scouts = len(slices) - len(volume)
    stacked = stack([item.plane for item in volume], rule.min_slices, rule.max_slice_spacing_mm)
    ordered = [volume[place] for place in stacked.order]
    _check_units(ordered)
    values, slope, intercept = _decode(sources, ordered, stacked.grid)
    notes = ((Note("volume.localizer", str(scouts)),) if scouts else ()) + (
        (Note("volume.straightened", f"{stacked.tilt:.1f}"),) if stacked.tilt else ()
    )
    return Series(values, slope, intercept, stacked.grid, tuple(item.frame for item in ordered), stacked.tilt, notes)


def _slices(number: int, ds: Dataset) -> list[_Slice]:
    """The headers of an image's frames."""
    if int(ds.get("SamplesPerPixel") or 1) != 1 or not str(ds.get("PhotometricInterpretation") or "").startswith("MONOCHROME"):
        raise VolumeError("volume.mixed_units", "an image is not grey")
    frames = frame_count(ds)
    if frames > _MAX_FRAMES:
        raise VolumeError("volume.too_large", f"{frames} frames")
    return [_Slice((number, frame), plane_of(ds, frame), grey_header(ds, frame), _units(ds, frame)) for frame in range(frames)]


def _units(ds: Dataset, frame: int) -> tuple[bool, str, str]:
    """Whether values are rescaled, to what (Rescale Type), and which of them are white: the same for all slices of one volume."""
    from appliance.greyscale import frame_value

    group = "PixelValueTransformationSequence"
    rescaled = frame_value(ds, frame, group, "RescaleSlope") is not None or "ModalityLUTSequence" in ds
    return rescaled, str(frame_value(ds, frame, group, "RescaleType") or "").strip().upper(), str(ds.PhotometricInterpretation).strip()


def _check_units(slices: Sequence[_Slice]) -> None:
    if len({item.units for item in slices}) > 1:
        raise VolumeError("volume.mixed_units", "slices differ in rescale, units or photometric interpretation")


def _decode(sources: Sequence[Source], slices: Sequence[_Slice], grid: Grid) -> tuple[NDArray[Any], float, float]:
    """All slices in one array: of the stored type when one rescale holds for all, else float32 in modality units."""
    greys = [item.grey for item in slices]
    same = all(grey.modality_lut is None and (grey.slope, grey.intercept) == (greys[0].slope, greys[0].intercept) for grey in greys)
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for place, item in enumerate(slices):
        wanted[item.frame[0]][item.frame[1]] = place
    values: NDArray[Any] | None = None
    for number, places in wanted.items():
        ds = sources[number]()
        for frame, pixels in enumerate(iter_frames(ds)):
            if frame not in places:
                continue
            if values is None:
                values = _room(grid.shape, pixels.dtype if same else np.dtype(np.float32))
            grey = greys[places[frame]]
            stored = _shown(pixels, ds, grey)
            if same and stored.dtype != values.dtype:
                raise VolumeError("volume.mixed_units", "slices of different types of numbers")
            values[places[frame]] = stored if same else grey.modality(stored.astype(np.float64))
    if values is None:
        raise VolumeError("volume.too_few_slices", "no slice could be read")
    return (
        (values, greys[0].slope, greys[0].intercept) if same and values.dtype.kind in "iu" else (_modality(values, greys, same), 1.0, 0.0)
    )


def _room(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    if math.prod(shape) * dtype.itemsize > MAX_STACK_BYTES:
        raise VolumeError("volume.too_large", f"{shape[0]} slices of {shape[2]} x {shape[1]} pixels")
    return np.empty(shape, dtype)


def _modality(values: NDArray[Any], greys: Sequence[GreyHeader], same: bool) -> Values:
    """Values of floating point in modality units, none of them infinite or no number."""
    result = np.asarray(values * greys[0].slope + greys[0].intercept if same else values, np.float32)
    if not np.isfinite(result).all():
        raise VolumeError("volume.mixed_units", "values that are no numbers")
    return result


def _shown(pixels: NDArray[Any], ds: Dataset, grey: GreyHeader) -> NDArray[Any]:
    """A slice with its padding replaced by its least real value, and MONOCHROME1 turned round where values have no unit of their own.

    HU stay HU however they are to be displayed; the signal of MR has no scale, and what a model learned from is bright where it is high.
    """
    if grey.padding is not None:
        padding = (pixels >= grey.padding[0]) & (pixels <= grey.padding[1])
        if padding.any() and not padding.all():
            pixels = np.where(padding, pixels[~padding].min(), pixels)
    if grey.inverse and ds.get("Modality") != "CT" and pixels.dtype.kind in "iu":
        stored = int(ds.BitsStored)
        top = (1 << stored) - 1 if pixels.dtype.kind == "u" else -1
        pixels = (top - pixels).astype(pixels.dtype)
    return pixels


def prepare(series: Series, spec: VolumeSpec) -> PreparedVolume:
    """Make the volume that the model takes: turned, resampled, its values scaled; all but the sliding window.

    Raises:
        VolumeError: ``volume.too_large``, or ``quality.blank``: every voxel has the same value.
    """
    values, grid, steps = series.values, series.grid, []
    shaped: Values | None = None
    for step in spec.pipeline[2:]:
        if isinstance(step, Orient):
            values, grid = turned(values, grid, step.axes)
        elif isinstance(step, Resample):
            shaped, grid = _resampled(values, grid, step, series)
        elif shaped is None:
            raise InferenceError("job.error", f"the model's pipeline has {step.step} before resample")
        elif isinstance(step, CropPad):
            shaped, grid = crop_pad(shaped, grid, (step.depth, step.height, step.width), step.fill)
        else:
            shaped = _scaled(shaped, step)
        steps.append(f"{step.step} {'x'.join(map(str, grid.shape))}")
    if shaped is None:
        raise InferenceError("job.error", "the model's pipeline does not resample")
    return PreparedVolume(np.ascontiguousarray(shaped), grid, tuple(steps))


def _resampled(values: NDArray[Any], grid: Grid, step: Resample, series: Series) -> tuple[Values, Grid]:
    target = straight_grid(grid, (step.spacing_mm[0], step.spacing_mm[1], step.spacing_mm[2]))
    if math.prod(target.shape) > MAX_VOXELS:
        raise VolumeError("volume.too_large", f"{' x '.join(map(str, target.shape))} voxels after resampling")
    least, greatest = float(values.min()), float(values.max())
    if least == greatest:
        raise VolumeError("quality.blank")
    shaped = linear(values, grid, target, fill=least if series.slope > 0 else greatest)
    if (series.slope, series.intercept) != (1.0, 0.0):
        shaped *= np.float32(series.slope)
        shaped += np.float32(series.intercept)
    return shaped, target


def _scaled(values: Values, step: VolumeStep) -> Values:
    """One step on the values alone; they may be changed in place."""
    if isinstance(step, Clip):
        np.clip(values, step.low, step.high, out=values)
    elif isinstance(step, ClipQuantile):
        np.clip(values, *np.quantile(values, (step.low, step.high)).astype(np.float32), out=values)
    elif isinstance(step, MinMax):
        _spread(values, values.min(), values.max())
        values *= np.float32(step.high - step.low)
        values += np.float32(step.low)
        if step.round:
            np.rint(values, out=values)
    elif isinstance(step, QuantileScale):
        _spread(values, *np.quantile(values, (step.low, step.high)).astype(np.float32))
    elif isinstance(step, Scale):
        values /= np.float32(step.divide_by)
    elif isinstance(step, Normalise):
        values -= np.float32(step.mean[0])
        values /= np.float32(step.std[0])
    elif not isinstance(step, SlidingWindow):
        raise InferenceError("job.error", f"the model's pipeline has {step.step} after resample")
    return values


def _spread(values: Values, low: np.float32, high: np.float32) -> None:
    """Map ``low`` to 0 and ``high`` to 1, in place."""
    if not high > low:
        raise VolumeError("quality.blank")
    values -= low
    values /= high - low


def crop_pad(values: Values, grid: Grid, shape: tuple[int, int, int], fill: float) -> tuple[Values, Grid]:
    """Cut or pad every axis to ``shape``, the volume in the middle (one voxel more behind it where it cannot be)."""
    starts = [(have - want) // 2 for have, want in zip(values.shape, shape, strict=True)]
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_patient(starts)
    if values.shape == shape:
        return values, grid
    result = np.full(shape, fill, np.float32)
    into, out_of = (
        tuple(slice(max(0, at), max(0, at) + min(have, want)) for at, have, want in zip(begin, values.shape, shape, strict=True))
        for begin in ([-start for start in starts], starts)
    )
    result[into] = values[out_of]
    return result, Grid(shape, affine)


def mask_on_slices(mask: NDArray[np.uint8], grid: Grid, series: Grid) -> NDArray[np.uint8]:
    """A mask on the series' own pixels, uint8 [slices, rows, columns] in the order of their positions: the nearest voxel's class."""
    return nearest(mask, grid, series)
