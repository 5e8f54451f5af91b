"""The images of one series as the volume that a model takes: pure, driven step by step by the manifest's ``VolumeSpec``.

Slices may come one to an image or many (enhanced multi-frame, PS3.3 C.7.6.16). Headers are read first, all of them; only when they
make one volume, and one that memory holds, are pixels decoded, slice by slice, into one array of the stored type: rescaling to modality
units (HU) commutes with linear interpolation and is done on its result, so that 400 slices of a CT take 210 MB and not 840.
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
from appliance.imaging.volumes.geometry import Grid, stack, turned
from appliance.imaging.volumes.resampling import linear, nearest, straight_grid
from appliance.imaging.volumes.slice_headers import (
    MAX_FRAMES,
    Counted,
    SliceHeader,
    check_contrast,
    check_units,
    counted,
    incomplete,
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

# With the model's own volume beside it, what fits below the memory cap of a process of the box.
MAX_STACK_BYTES: Final = 384 * 2**20
MAX_VOXELS: Final = 24 * 2**20
_FLOAT: Final = 4


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


def read_series(
    sources: Sequence[Source],
    spec: VolumeSpec,
    told: Callable[[], object] = lambda: None,
    fits: Callable[[Shape], object] = lambda _shape: None,
) -> Series:
    """Read the slices of a series, in whatever order they come.

    Args:
        sources: each gives one image of the series; it is asked twice, once for its header and once for its pixels.
        spec: the manifest's pipeline, whose first step says what a volume needs.
        told: called after each frame that was decoded, of which an image may have hundreds.
        fits: given the shape that the prepared volume will have, before any pixel is decoded; raises VolumeError where that is too large.

    Raises:
        VolumeError: the series is no volume; ``volume.*``, or ``quality.blank``: there is nothing but padding.
        PixelError: a frame cannot be decoded.
    """
    rule = spec.pipeline[0]
    if not isinstance(rule, Stack):
        raise InferenceError("job.error", "the model's pipeline must begin with stack")
    slices, images = _headers(sources)
    volume = [item for item in slices if not item.plane.localizer]
    if len(volume) >= rule.min_slices:
        check_contrast(volume)
    stacked = stack([item.plane for item in volume], rule.min_slices, rule.max_slice_spacing_mm)
    ordered = [volume[place] for place in stacked.order]
    check_units(ordered)
    _check_stack(stacked.grid.shape, max(item.least_bytes for item in ordered) if _one_rescale(ordered) else _FLOAT)
    fits(prepared_shape(stacked.grid, spec))
    values, slope, intercept = _decode(sources, ordered, stacked.grid, told)
    scouts = len(slices) - len(volume)
    notes = (
        Note("volume.localizer", str(scouts)) if scouts else None,
        Note("volume.straightened", f"{stacked.tilt:.1f}") if stacked.tilt else None,
        incomplete(images),
    )
    return Series(
        values, slope, intercept, stacked.grid, tuple(item.frame for item in ordered), stacked.tilt, tuple(note for note in notes if note)
    )


def prepared_shape(grid: Grid, spec: VolumeSpec) -> Shape:
    """The shape of the volume that :func:`prepare` makes of slices that lie like this, which headers alone tell.

    Raises:
        VolumeError: ``volume.too_large``, as ``prepare``.
    """
    for step in spec.pipeline[2:]:
        if isinstance(step, Orient):
            grid = turned(np.broadcast_to(np.uint8(0), grid.shape), grid, step.axes)[1]  # an array that takes no room
        elif isinstance(step, Resample):
            grid = _resampled_grid(grid, step)
        elif isinstance(step, CropPad):
            grid = Grid((step.depth, step.height, step.width), grid.affine, grid.through)  # a second one may cut more
    return grid.shape


def _headers(sources: Sequence[Source]) -> tuple[list[SliceHeader], list[Counted]]:
    """The headers of all frames, and what each image says of how many there are."""
    slices: list[SliceHeader] = []
    images = []
    luts: dict[bytes, Lut] = {}
    for number, source in enumerate(sources):
        ds = source()
        slices += slice_headers(number, ds, luts)
        images.append(counted(ds))
        if len(slices) > MAX_FRAMES:
            raise VolumeError("volume.too_large", f"more than {MAX_FRAMES} slices")
    return slices, images


def _decode(
    sources: Sequence[Source], slices: Sequence[SliceHeader], grid: Grid, told: Callable[[], object]
) -> tuple[NDArray[Any], float, float]:
    """All slices in one array: of the stored type when one rescale holds for all, else float32 in modality units."""
    first, same = slices[0].grey, _one_rescale(slices)
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for place, item in enumerate(slices):
        wanted[item.frame[0]][item.frame[1]] = place
    values: NDArray[Any] | None = None
    empty = np.zeros(len(slices), bool)
    for number, places in wanted.items():
        for frame, pixels in enumerate(iter_frames(sources[number]())):
            if frame not in places:
                continue
            if values is None:
                values = _room(grid.shape, pixels.dtype if same else np.dtype(np.float32))
            place = places[frame]
            stored, empty[place] = _shown(pixels, slices[place])
            if same and stored.dtype != values.dtype:
                raise VolumeError("volume.mixed_units", "slices of different types of numbers")
            values[place] = stored if same else _modality(slices[place].grey, stored.astype(np.float64))
            told()
    if values is None:
        raise VolumeError("volume.too_few_slices", "no slice could be read")
    _fill_empty(values, empty, least=not same or first.slope > 0)
    if same and values.dtype.kind in "iu":
        return values, first.slope, first.intercept
    return _modality(first, values) if same else values, 1.0, 0.0


def _one_rescale(slices: Sequence[SliceHeader]) -> bool:
    """Whether the slices can be held as stored, with one rescale for all of them."""
    first = slices[0].grey
    return all(
        item.grey.modality_lut is None and (item.grey.slope, item.grey.intercept) == (first.slope, first.intercept) for item in slices
    )


def _check_stack(shape: Shape, voxel_bytes: int) -> None:
    if math.prod(shape) * voxel_bytes > MAX_STACK_BYTES:
        raise VolumeError("volume.too_large", f"{shape[0]} slices of {shape[2]} x {shape[1]} pixels")


def _room(shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
    _check_stack(shape, dtype.itemsize)  # once more: what a decoder makes of a pixel may take more than its header says
    return np.empty(shape, dtype)


def _modality(grey: GreyHeader, stored: NDArray[Any]) -> Values:
    """Values in modality units as float32, none of them infinite or no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.asarray(grey.modality(stored), np.float32)
    if not np.isfinite(result).all():
        raise VolumeError("volume.bad_values", "values that are no numbers")
    return result


def _shown(pixels: NDArray[Any], header: SliceHeader) -> tuple[NDArray[Any], bool]:
    """A slice with its padding replaced by its least real value, and MONOCHROME1 turned round where values have no unit of their own.

    HU stay HU however they are to be displayed; the signal of MR has no scale, and what a model learned from is bright where it is high.

    Returns:
        The slice, and whether there is nothing but padding.
    """
    padding: NDArray[np.bool_] | None = None
    if header.grey.padding is not None:
        padding = (pixels >= header.grey.padding[0]) & (pixels <= header.grey.padding[1])
    if header.units.turned_in and pixels.dtype.kind in "iu":
        top = (1 << header.units.turned_in) - 1 if pixels.dtype.kind == "u" else -1
        pixels = (top - pixels).astype(pixels.dtype)
    if padding is None or not padding.any() or padding.all():
        return pixels, padding is not None and bool(padding.all())
    real = pixels[~padding]
    ends = np.array([real.min(), real.max()])  # the least after rescale is the greatest before a negative slope
    return np.where(padding, ends[np.argmin(header.grey.modality(ends.astype(np.float64)))], pixels), False


def _fill_empty(values: NDArray[Any], empty: NDArray[np.bool_], *, least: bool) -> None:
    """Give slices of nothing but padding the least value of the others, or the greatest, in place: what padding holds means nothing."""
    if empty.all():
        raise VolumeError("quality.blank", "nothing but padding")
    if empty.any():
        real = [values[place].min() if least else values[place].max() for place in np.flatnonzero(~empty)]
        values[empty] = min(real) if least else max(real)


def prepare(series: Series, spec: VolumeSpec) -> PreparedVolume:
    """Make the volume that the model takes: turned, resampled, its values scaled; all but the sliding window.

    Raises:
        VolumeError: ``volume.too_large``, ``volume.bad_values``, or ``quality.blank``: every voxel has the same value.
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
    target = _resampled_grid(grid, step)
    least, greatest = float(values.min()), float(values.max())
    if least == greatest:
        raise VolumeError("quality.blank")
    _check_rescale(least, greatest, series)
    shaped = linear(values, grid, target, fill=least if series.slope > 0 else greatest)
    if (series.slope, series.intercept) != (1.0, 0.0):
        shaped *= np.float32(series.slope)
        shaped += np.float32(series.intercept)
    return shaped, target


def _resampled_grid(grid: Grid, step: Resample) -> Grid:
    target = straight_grid(grid, (step.spacing_mm[0], step.spacing_mm[1], step.spacing_mm[2]))
    if math.prod(target.shape) > MAX_VOXELS:
        raise VolumeError("volume.too_large", f"{' x '.join(map(str, target.shape))} voxels after resampling")
    return target


def _check_rescale(least: float, greatest: float, series: Series) -> None:
    """A rescale by 1e300 leaves float32, one by 1e-300 leaves no difference between values."""
    with np.errstate(over="ignore", invalid="ignore"):
        # In the order in which the volume is rescaled: an intercept does not bring back what the slope has made infinite.
        ends = np.array([least, greatest]).astype(np.float32) * np.float32(series.slope)
        ends = ends + np.float32(series.intercept)
    if not np.isfinite(ends).all() or ends[0] == ends[1]:
        raise VolumeError("volume.bad_values", f"rescale by {series.slope:g} and {series.intercept:g}")


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
    return result, Grid(shape, affine, grid.through)


def mask_on_slices(mask: NDArray[np.uint8], grid: Grid, series: Grid) -> NDArray[np.uint8]:
    """A mask on the series' own pixels, uint8 [slices, rows, columns] in the order of their positions: the nearest voxel's class."""
    return nearest(mask, grid, series)
