"""Convert the images of a series to the volume that a model takes, by the steps of the manifest's ``VolumeSpec``. Pure functions.

An image contains one slice or many (enhanced multi-frame, PS3.3 C.7.6.16). All headers are read first. If they form one volume that fits
into memory, the pixels are decoded, slice by slice, into one array of the stored type. Rescaling to modality units (HU) commutes with
linear interpolation and is applied after it, so that 400 slices of a CT take 210 MB and not 840.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from appliance.core.domain import Note
from appliance.core.errors import InferenceError, VolumeError
from appliance.imaging.pixels import iter_frames
from appliance.imaging.volumes.geometry import Grid, reorient, stack
from appliance.imaging.volumes.resampling import rectangular_grid, resample_linear
from appliance.imaging.volumes.slice_headers import (
    MAX_FRAMES,
    ImageCount,
    SliceHeader,
    check_contrast,
    check_units,
    image_count,
    missing_images_note,
    slice_headers,
)
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

    from appliance.imaging.greyscale import GreyHeader, Lut
    from model_sync.bundle import VolumeSpec, VolumeStep

    Values: TypeAlias = NDArray[np.float32]

Source: TypeAlias = "Callable[[], Dataset]"
Shape: TypeAlias = "tuple[int, int, int]"

# Together with the volume for the model this fits below the memory limit of a process.
MAX_STACK_BYTES: Final = 384 * 2**20
MAX_VOXELS: Final = 24 * 2**20
_FLOAT: Final = 4


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one series in order, as stored.

    Attributes:
        values: [slices, rows, columns]; ``values * slope + intercept`` is in modality units.
        slope: Rescale Slope; 1 where the values are in modality units already.
        intercept: Rescale Intercept; 0 in that case.
        grid: their position in the patient.
        frames: for each slice the index of its source and the frame in that.
        tilt: the angle (degrees) by which the gantry sheared the stack.
        notes: remarks that a person must see.
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
    """A volume prepared for a model: float32 [depth, height, width], its position in the patient, a description of the steps."""

    values: Values
    grid: Grid
    steps: tuple[str, ...]


def read_series(
    sources: Sequence[Source],
    spec: VolumeSpec,
    on_step: Callable[[], object] = lambda: None,
    check_shape: Callable[[Shape], object] = lambda _shape: None,
) -> Series:
    """Read the slices of a series, in any order.

    Args:
        sources: each reads one image of the series; called twice, for the header and for the pixels.
        spec: the manifest's pipeline; its first step states what a volume needs.
        on_step: called after each decoded frame, of which an image may have hundreds.
        check_shape: called with the shape of the prepared volume before any pixel is decoded; raises VolumeError where that is too
            large.

    Raises:
        VolumeError: ``volume.*``: the series is not a volume; ``quality.blank``: it contains only padding.
        PixelError: a frame cannot be decoded.
    """
    rule = spec.pipeline[0]
    if not isinstance(rule, Stack):
        raise InferenceError("job.error", "the model's pipeline must begin with stack")
    slices, images = _headers(sources)
    volume = [item for item in slices if not item.plane.is_localizer]
    if len(volume) >= rule.min_slices:
        check_contrast(volume)
    stacked = stack([item.plane for item in volume], rule.min_slices, rule.max_slice_spacing_mm)
    ordered = [volume[place] for place in stacked.order]
    check_units(ordered)
    _check_stack(stacked.grid.shape, max(item.least_bytes for item in ordered) if _one_rescale(ordered) else _FLOAT)
    check_shape(prepared_shape(stacked.grid, spec))
    values, slope, intercept = _decode(sources, ordered, stacked.grid, on_step)
    scouts = len(slices) - len(volume)
    notes = (
        Note("volume.localizer", str(scouts)) if scouts else None,
        Note("volume.straightened", f"{stacked.tilt:.1f}") if stacked.tilt else None,
        missing_images_note(images),
    )
    return Series(
        values, slope, intercept, stacked.grid, tuple(item.frame for item in ordered), stacked.tilt, tuple(note for note in notes if note)
    )


def prepared_shape(grid: Grid, spec: VolumeSpec) -> Shape:
    """The shape of the volume that :func:`prepare` makes of slices on this grid; raises VolumeError ``volume.too_large``."""
    for step in spec.pipeline[2:]:
        if isinstance(step, Orient):
            grid = reorient(np.broadcast_to(np.uint8(0), grid.shape), grid, step.axes)[1]  # an array that takes no memory
        elif isinstance(step, Resample):
            grid = _resampled_grid(grid, step)
        elif isinstance(step, CropPad):
            grid = Grid((step.depth, step.height, step.width), grid.affine, grid.through)  # a further step may crop more
    return grid.shape


def _headers(sources: Sequence[Source]) -> tuple[list[SliceHeader], list[ImageCount]]:
    """Read the headers of all frames, and the image count of each image."""
    slices: list[SliceHeader] = []
    images = []
    luts: dict[bytes, Lut] = {}
    for number, source in enumerate(sources):
        ds = source()
        slices += slice_headers(number, ds, luts)
        images.append(image_count(ds))
        if len(slices) > MAX_FRAMES:
            raise VolumeError("volume.too_large", f"more than {MAX_FRAMES} slices")
    return slices, images


def _decode(
    sources: Sequence[Source], slices: Sequence[SliceHeader], grid: Grid, on_step: Callable[[], object]
) -> tuple[NDArray[Any], float, float]:
    """Decode all slices into one array: of the stored type where all have the same rescale, else float32 in modality units."""
    first, same = slices[0].grey, _one_rescale(slices)
    indices: dict[int, dict[int, int]] = defaultdict(dict)
    for place, item in enumerate(slices):
        indices[item.frame[0]][item.frame[1]] = place
    values: NDArray[Any] | None = None
    empty = np.zeros(len(slices), bool)
    for number, places in indices.items():
        for frame, pixels in enumerate(iter_frames(sources[number]())):
            if frame not in places:
                continue
            if values is None:
                dtype = pixels.dtype if same else np.dtype(np.float32)
                _check_stack(grid.shape, dtype.itemsize)  # again: a decoder may return a larger type than the header implies
                values = np.empty(grid.shape, dtype)
            place = places[frame]
            stored, empty[place] = _replace_padding(pixels, slices[place])
            if same and stored.dtype != values.dtype:
                raise VolumeError("volume.mixed_units", "slices of different types of numbers")
            values[place] = stored if same else _modality(slices[place].grey, stored.astype(np.float64))
            on_step()
    if values is None:
        raise VolumeError("volume.too_few_slices", "no slice could be read")
    _fill_empty(values, empty, least=not same or first.slope > 0)
    if same and values.dtype.kind in "iu":
        return values, first.slope, first.intercept
    return _modality(first, values) if same else values, 1.0, 0.0


def _one_rescale(slices: Sequence[SliceHeader]) -> bool:
    """Whether all slices have the same rescale, so that the array can hold stored values."""
    first = slices[0].grey
    return all(
        item.grey.modality_lut is None and (item.grey.slope, item.grey.intercept) == (first.slope, first.intercept) for item in slices
    )


def _check_stack(shape: Shape, voxel_bytes: int) -> None:
    if math.prod(shape) * voxel_bytes > MAX_STACK_BYTES:
        raise VolumeError("volume.too_large", f"{shape[0]} slices of {shape[2]} x {shape[1]} pixels")


def _modality(grey: GreyHeader, stored: NDArray[Any]) -> Values:
    """Convert to modality units as float32; raises VolumeError where a value is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.asarray(grey.modality(stored), np.float32)
    if not np.isfinite(result).all():
        raise VolumeError("volume.bad_values", "values that are no numbers")
    return result


def _replace_padding(pixels: NDArray[Any], header: SliceHeader) -> tuple[NDArray[Any], bool]:
    """Replace the padding of a slice by its lowest value, and invert MONOCHROME1 where the values have no unit.

    HU stay HU however they are displayed. MR signal has no unit, and models are trained on images where a high signal is bright.

    Returns:
        The slice, and whether it contains only padding.
    """
    padding: NDArray[np.bool_] | None = None
    if header.grey.padding is not None:
        padding = (pixels >= header.grey.padding[0]) & (pixels <= header.grey.padding[1])
    if header.units.inverted_bits and pixels.dtype.kind in "iu":
        top = (1 << header.units.inverted_bits) - 1 if pixels.dtype.kind == "u" else -1
        pixels = (top - pixels).astype(pixels.dtype)
    if padding is None or not padding.any() or padding.all():
        return pixels, padding is not None and bool(padding.all())
    real = pixels[~padding]
    ends = np.array([real.min(), real.max()])  # with a negative slope the highest stored value is the lowest modality value
    return np.where(padding, ends[np.argmin(header.grey.modality(ends.astype(np.float64)))], pixels), False


def _fill_empty(values: NDArray[Any], empty: NDArray[np.bool_], *, least: bool) -> None:
    """Fill slices that contain only padding with the lowest (``least``) or highest value of the others, in place."""
    if empty.all():
        raise VolumeError("quality.blank", "nothing but padding")
    if empty.any():
        real = [values[place].min() if least else values[place].max() for place in np.flatnonzero(~empty)]
        values[empty] = min(real) if least else max(real)


def prepare(series: Series, spec: VolumeSpec) -> PreparedVolume:
    """Make the volume that the model takes: reoriented, resampled and scaled, but not yet divided into windows.

    Raises:
        VolumeError: ``volume.too_large``, ``volume.bad_values``, or ``quality.blank``: every voxel has the same value.
    """
    values, grid, steps = series.values, series.grid, []
    shaped: Values | None = None
    for step in spec.pipeline[2:]:
        if isinstance(step, Orient):
            values, grid = reorient(values, grid, step.axes)
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
    target = _resampled_grid(grid, step)
    least, greatest = float(values.min()), float(values.max())
    if least == greatest:
        raise VolumeError("quality.blank")
    _check_rescale(least, greatest, series)
    shaped = resample_linear(values, grid, target, fill=least if series.slope > 0 else greatest)
    if (series.slope, series.intercept) != (1.0, 0.0):
        shaped *= np.float32(series.slope)
        shaped += np.float32(series.intercept)
    return shaped, target


def _resampled_grid(grid: Grid, step: Resample) -> Grid:
    target = rectangular_grid(grid, (step.spacing_mm[0], step.spacing_mm[1], step.spacing_mm[2]))
    if math.prod(target.shape) > MAX_VOXELS:
        raise VolumeError("volume.too_large", f"{' x '.join(map(str, target.shape))} voxels after resampling")
    return target


def _check_rescale(least: float, greatest: float, series: Series) -> None:
    """Raise VolumeError where the rescale overflows float32 (1e300) or makes all values equal (1e-300)."""
    with np.errstate(over="ignore", invalid="ignore"):
        # In the order of the rescale of the volume: the intercept does not undo an overflow by the slope.
        ends = np.array([least, greatest]).astype(np.float32) * np.float32(series.slope)
        ends = ends + np.float32(series.intercept)
    if not np.isfinite(ends).all() or ends[0] == ends[1]:
        raise VolumeError("volume.bad_values", f"rescale by {series.slope:g} and {series.intercept:g}")


def _scaled(values: Values, step: VolumeStep) -> Values:
    """Apply one step that changes values only, possibly in place."""
    if isinstance(step, Clip):
        np.clip(values, step.low, step.high, out=values)
    elif isinstance(step, ClipQuantile):
        low, high = np.quantile(values, (step.low, step.high)).astype(np.float32)
        np.clip(values, low, high, out=values)
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
    """Crop or pad every axis to ``shape`` around the centre (with an odd difference one voxel more at the end)."""
    starts = [(have - want) // 2 for have, want in zip(values.shape, shape, strict=True)]
    if values.shape == shape:
        return values, grid
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_patient(starts)
    result = np.full(shape, fill, np.float32)
    into, out_of = (
        tuple(slice(max(0, at), max(0, at) + min(have, want)) for at, have, want in zip(begin, values.shape, shape, strict=True))
        for begin in ([-start for start in starts], starts)
    )
    result[into] = values[out_of]
    return result, Grid(shape, affine, grid.through)
