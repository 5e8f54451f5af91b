"""Sliding-window inference: overlapping windows of the model's size, and a weighted mean of the outputs.

The output at the border of a window lacks context; the weights make it count little where another window has the voxel near its centre.
If a fully convolutional network has windows that overlap by twice its receptive field, voxels farther from all borders than the receptive
field get the same output as from one pass over the complete volume.
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
OnProgress: TypeAlias = "Callable[[float], object]"

# The standard deviation of the Gaussian as a share of the window, as in nnU-Net (Isensee et al., Nature Methods 18, 2021): 1/8.
_SIGMA: Final = 0.125
# The lowest weight: far from the centre the Gaussian is 0, and sums of weights are divided by.
_LEAST: Final = 1e-3


def starts(size: int, window: int, overlap: float) -> list[int]:
    """Start positions of windows on an axis: evenly spaced, from 0 to the end, overlapping by at least ``overlap``."""
    if size <= window:
        return [0]
    step = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(number * (size - window) / (count - 1)) for number in range(count)]


def weights(window: Sequence[int], kind: Weight) -> Values:
    """The weight of each voxel of a window: float32 [depth, height, width], above 0 and at most 1."""
    result = np.ones((), np.float32)
    for side in window:
        middle = (side - 1) / 2
        away = np.abs(np.arange(side) - middle)
        part = np.exp(-0.5 * (away / (side * _SIGMA)) ** 2) if kind == "gaussian" else 1 - away / (middle + 1)
        result = result[..., None] * np.maximum(part, _LEAST).astype(np.float32)
    return result


def windows(shape: Sequence[int], window: Sequence[int], overlap: float) -> Iterator[tuple[int, int, int]]:
    """The first voxel of every window, in memory order."""
    depth, height, width = (starts(size, side, overlap) for size, side in zip(shape, window, strict=True))
    yield from product(depth, height, width)


def slide(
    volume: Values, window: tuple[int, int, int], infer: Infer, *, classes: int, overlap: float = 0.5, weight: Weight = "gaussian",
    fill: float = 0.0, batch: int = 1, on_progress: OnProgress | None = None,
) -> Values:  # fmt: skip
    """Run a model over a volume of any size.

    Args:
        volume: float32 [depth, height, width].
        window: input size of the model.
        infer: takes float32 [n, 1, *window], n at most ``batch``; returns float32 [n, classes, *window].
        classes: number of classes.
        overlap: minimum share of a window that its neighbour covers too.
        weight: weighting of the voxels of a window.
        fill: value around a volume that is smaller than the window.
        batch: number of windows per inference.
        on_progress: called with the completed share (0 to 1).

    Returns:
        float32 [classes, depth, height, width]: the weighted mean of the outputs of the windows.

    Raises:
        InferenceError: ``job.error``: the output has another shape; or what ``infer`` raises.
    """
    shape = volume.shape
    padded = pad(volume, window, fill)
    places = list(windows(padded.shape, window, overlap))
    counts = weights(window, weight)
    total = np.zeros((classes, *padded.shape), np.float32)
    norm = np.zeros(padded.shape, np.float32)
    for first in range(0, len(places), batch):
        group = [_cut(place, window) for place in places[first : first + batch]]
        answer = infer(np.stack([padded[cut] for cut in group])[:, None])
        if answer.shape != (len(group), classes, *window):
            raise InferenceError("job.error", f"the model gave the shape {answer.shape} for a window")
        for cut, logits in zip(group, answer, strict=True):
            for number in range(classes):
                total[number][cut] += logits[number] * counts
            norm[cut] += counts
        if on_progress is not None:
            on_progress(min(1.0, (first + len(group)) / len(places)))
    total /= norm
    return crop(total, shape)


def _cut(place: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + side) for start, side in zip(place, size, strict=True))


def pad(volume: Values, window: Sequence[int], fill: float) -> Values:
    """Pad a volume [depth, height, width] with ``fill`` where it is smaller than a window."""
    if all(size >= side for size, side in zip(volume.shape, window, strict=True)):
        return volume
    shape = [max(size, side) for size, side in zip(volume.shape, window, strict=True)]
    result = np.full(shape, fill, np.float32)
    crop(result[None], volume.shape)[0] = volume
    return result


def crop(logits: Values, shape: Sequence[int]) -> Values:
    """Remove the padding from the logits [classes, ...] of a padded volume; a view."""
    places = [(size - side) // 2 for size, side in zip(logits.shape[1:], shape, strict=True)]
    every: tuple[slice, ...] = (slice(None),)
    return logits[every + _cut(places, shape)]
