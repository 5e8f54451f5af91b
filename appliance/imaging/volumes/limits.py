"""Two looks at a prepared volume before a model is asked: does its answer fit into the process's memory, and was tissue cut off."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from appliance.core.domain import Note
from appliance.core.errors import VolumeError
from appliance.imaging.volumes.resampling import nearest
from appliance.imaging.volumes.segmentation import logits_of
from model_sync.bundle import CropPad, SlidingWindow

if TYPE_CHECKING:
    from appliance.imaging.volumes.volume import PreparedVolume, Series
    from model_sync.bundle import Manifest, VolumeSpec

# The rest of a process's memory is the interpreter's, the runtime's and the model's.
_SHARE: Final = 0.6
_FLOAT: Final = 4
# What is brighter than the darkest voxel by this share of the way to the brightest is tissue and no noise of the background.
_TISSUE: Final = 0.1
_BRIGHT: Final = 99.0
# Less than this is noise, and would read "0.0 ml".
_LEAST_ML: Final = 0.05


def needed_bytes(shape: tuple[int, int, int], manifest: Manifest, batch: int) -> int:
    """What a prepared volume and the model's answer to it take at their most, in bytes."""
    spec, classes = manifest.volume_input, len(logits_of(manifest).classes or ())
    window = math.prod(spec.shape[1:])
    answer = batch * window * _FLOAT * (classes + 1)
    if not isinstance(spec.pipeline[-1], SlidingWindow):
        return math.prod(shape) * (_FLOAT + 1) + answer
    whole = math.prod(max(size, side) for size, side in zip(shape, spec.shape[1:], strict=True))
    # The volume, a sum of logits per class, the weights and the mask; a window's answer, and one class of that weighed.
    return whole * (_FLOAT * (classes + 2) + 1) + answer + window * _FLOAT


def check_room(shape: tuple[int, int, int], manifest: Manifest, batch: int, memory_bytes: int) -> None:
    """Refuse a volume that this process cannot hold with the model's answer to it: trying would only end it, three times.

    Args:
        shape: of the prepared volume.
        manifest: of the model.
        batch: how many windows it takes at a time.
        memory_bytes: the cap of this process.

    Raises:
        VolumeError: ``volume.too_large``.
    """
    needed, room = needed_bytes(shape, manifest, batch), int(_SHARE * memory_bytes)
    if needed > room:
        classes = len(logits_of(manifest).classes or ())
        size = " x ".join(map(str, shape))
        raise VolumeError("volume.too_large", f"{size} voxels, {classes} classes: {needed >> 20} MiB, at most {room >> 20} MiB")


def cut_off(series: Series, prepared: PreparedVolume, spec: VolumeSpec) -> Note | None:
    """A note with the millilitres of tissue that ``crop_pad`` cut off; None where it cut nothing but background.

    Args:
        series: with its values.
        prepared: the same, as the model is given it.
        spec: the model's pipeline.
    """
    if not any(isinstance(step, CropPad) for step in spec.pipeline):
        return None
    seen = nearest(np.ones(prepared.grid.shape, np.uint8), prepared.grid, series.grid)
    if seen.all():
        return None
    sign = 1.0 if series.slope > 0 else -1.0
    some = sign * series.values[:: max(1, len(series.values) // 64), ::4, ::4].astype(np.float32)
    low, high = float(some.min()), float(np.percentile(some, _BRIGHT))
    tissue = low + _TISSUE * (high - low)
    voxels = sum(
        int((sign * plane[inside == 0].astype(np.float32) > tissue).sum()) for plane, inside in zip(series.values, seen, strict=True)
    )
    ml = voxels * series.grid.voxel_ml
    return Note("caution.cropped", f"{ml:.1f} ml") if ml >= _LEAST_ML else None
