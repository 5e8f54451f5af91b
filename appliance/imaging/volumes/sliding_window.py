"""A volume read in overlapping windows of the model's size, and the answers blended.

A window's rim was computed without what lies beyond it; the weights make its voxels count little where another window has them in its
middle. Where a network is fully convolutional and its windows overlap by twice its reach, the voxels farther from every rim than that
reach are those of one pass over the whole volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values: TypeAlias = NDArray[np.float32]

Infer: TypeAlias = "Callable[[Values], Values]"
Weight: TypeAlias = Literal["gaussian", "linear"]
Told: TypeAlias = "Callable[[float], object]"

# The width of the bell as a share of the window, as in nnU-Net (Isensee et al., Nature Methods 18, 2021): 1/8.
_SIGMA: Final = 0.125
# Far out the bell is nothing at all: no voxel may be divided by that.
_LEAST: Final = 1e-3


def starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly spread, the first at 0, the last at the end, overlapping by at least ``overlap``."""
    if size <= window:
        return [0]
    step = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(number * (size - window) / (count - 1)) for number in range(count)]


def weights(window: Sequence[int], kind: Weight) -> Values:
    """What each voxel of a window counts: float32 [depth, height, width], above 0 and at most 1."""
    result = np.ones((), np.float32)
    for side in window:
        middle = (side - 1) / 2
        away = np.abs(np.arange(side) - middle)
        part = np.exp(-0.5 * (away / (side * _SIGMA)) ** 2) if kind == "gaussian" else 1 - away / (middle + 1)
        result = result[..., None] * np.maximum(part, _LEAST).astype(np.float32)
    return result


def windows(shape: Sequence[int], window: Sequence[int], overlap: float) -> Iterator[tuple[int, int, int]]:
    """The first voxel of every window, in the order of memory."""
    depth, height, width = (starts(size, side, overlap) for size, side in zip(shape, window, strict=True))
    yield from product(depth, height, width)


def slide(
    volume: Values, window: tuple[int, int, int], infer: Infer, *, classes: int, overlap: float = 0.5, weight: Weight = "gaussian",
    fill: float = 0.0, batch: int = 1, told: Told | None = None,
) -> Values:  # fmt: skip
    """Run a model over a volume of any size.

    Args:
        volume: float32 [depth, height, width].
        window: the size that the model takes.
        infer: takes float32 [n, 1, *window], n at most ``batch``; gives float32 [n, classes, *window].
        classes: how many values a voxel gets.
        overlap: the least share of a window that its neighbour covers too.
        weight: how a window's voxels count.
        fill: value around a volume that is smaller than the window.
        batch: how many windows at a time.
        told: called with the part (0 to 1) that is done.

    Returns:
        float32 [classes, depth, height, width]: the weighted mean of the windows' answers.

    Raises:
        InferenceError: ``job.error``: the model's answer has another shape; or what ``infer`` raises.
    """
    shape = volume.shape
    whole = padded(volume, window, fill)
    places = list(windows(whole.shape, window, overlap))
    counts = weights(window, weight)
    total = np.zeros((classes, *whole.shape), np.float32)
    norm = np.zeros(whole.shape, np.float32)
    for first in range(0, len(places), batch):
        group = [_cut(place, window) for place in places[first : first + batch]]
        answer = infer(np.stack([whole[cut] for cut in group])[:, None])
        if answer.shape != (len(group), classes, *window):
            raise InferenceError("job.error", f"the model gave the shape {answer.shape} for a window")
        for cut, logits in zip(group, answer, strict=True):
            for number in range(classes):
                total[number][cut] += logits[number] * counts
            norm[cut] += counts
        if told is not None:
            told(min(1.0, (first + len(group)) / len(places)))
    total /= norm
    return unpadded(total, shape)


def _cut(place: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + side) for start, side in zip(place, size, strict=True))


def padded(volume: Values, window: Sequence[int], fill: float) -> Values:
    """The volume, [depth, height, width], with ``fill`` around it where it is smaller than a window."""
    if all(size >= side for size, side in zip(volume.shape, window, strict=True)):
        return volume
    shape = [max(size, side) for size, side in zip(volume.shape, window, strict=True)]
    result = np.full(shape, fill, np.float32)
    unpadded(result[None], volume.shape)[0] = volume
    return result


def unpadded(logits: Values, shape: Sequence[int]) -> Values:
    """The part of a padded volume's logits, [classes, ...], that is the volume's own; a view."""
    places = [(size - side) // 2 for size, side in zip(logits.shape[1:], shape, strict=True)]
    every: tuple[slice, ...] = (slice(None),)
    return logits[every + _cut(places, shape)]
