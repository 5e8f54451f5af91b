"""Two checks of a volume before inference: does it fit into memory with the output of the model, and was tissue cropped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from appliance.core.domain import Note
from appliance.core.errors import VolumeError
from appliance.imaging.volumes.resampling import resample_nearest
from appliance.imaging.volumes.segmentation import logits_of
from model_sync.bundle import CropPad, SlidingWindow

if TYPE_CHECKING:
    from appliance.imaging.volumes.volume import PreparedVolume, Series
    from model_sync.bundle import Manifest, VolumeSpec

# The rest of the memory is for the interpreter, the runtime and the model.
_SHARE: Final = 0.6
_FLOAT: Final = 4
# Voxels above this share of the range from the darkest to the brightest are tissue; the others are background noise.
_TISSUE: Final = 0.1
_BRIGHT: Final = 99.0
# Less than this is noise, and would be shown as "0.0 ml".
_LEAST_ML: Final = 0.05


def needed_bytes(shape: tuple[int, int, int], manifest: Manifest, batch: int) -> int:
    """The peak memory of a prepared volume and the output of the model, in bytes."""
    spec, classes = manifest.volume_input, len(logits_of(manifest).classes or ())
    window = math.prod(spec.shape[1:])
    answer = batch * window * _FLOAT * (classes + 1)
    if not isinstance(spec.pipeline[-1], SlidingWindow):
        return math.prod(shape) * (_FLOAT + 1) + answer
    padded = math.prod(max(size, side) for size, side in zip(shape, spec.shape[1:], strict=True))
    # The volume, the sum of logits per class, the weights and the mask; the output of a window, and one weighted class of it.
    return padded * (_FLOAT * (classes + 2) + 1) + answer + window * _FLOAT


def check_memory(shape: tuple[int, int, int], manifest: Manifest, batch: int, memory_bytes: int) -> None:
    """Refuse a prepared volume that, with the output of the model, exceeds the memory limit of this process.

    Raises:
        VolumeError: ``volume.too_large``.
    """
    needed, room = needed_bytes(shape, manifest, batch), int(_SHARE * memory_bytes)
    if needed > room:
        classes = len(logits_of(manifest).classes or ())
        size = " x ".join(map(str, shape))
        raise VolumeError("volume.too_large", f"{size} voxels, {classes} classes: {needed >> 20} MiB, at most {room >> 20} MiB")


def cropped_tissue_note(series: Series, prepared: PreparedVolume, spec: VolumeSpec) -> Note | None:
    """Return a note with the volume of the tissue (ml) that ``crop_pad`` removed; None where it removed only background."""
    if not any(isinstance(step, CropPad) for step in spec.pipeline):
        return None
    seen = resample_nearest(np.ones(prepared.grid.shape, np.uint8), prepared.grid, series.grid)
    if seen.all():
        return None
    sign = 1.0 if series.slope > 0 else -1.0
    sample = sign * series.values[:: max(1, len(series.values) // 64), ::4, ::4].astype(np.float32)
    low, high = float(sample.min()), float(np.percentile(sample, _BRIGHT))
    tissue = low + _TISSUE * (high - low)
    voxels = sum(
        int((sign * plane[inside == 0].astype(np.float32) > tissue).sum()) for plane, inside in zip(series.values, seen, strict=True)
    )
    ml = voxels * series.grid.voxel_ml
    return Note("caution.cropped", f"{ml:.1f} ml") if ml >= _LEAST_ML else None
