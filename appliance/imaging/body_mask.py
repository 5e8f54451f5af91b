"""Separate the body from the background of a projection image, so that nothing is marked outside the body.

Background is dark, flat, and reaches the edge of the image: air beside the body and collimated areas. A lung field is dark too,
but the chest wall separates it from the edge, or where the image is cropped, its texture does. Doubt is decided for the body, because a
mark that is missing costs more than one beside the body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Flags = NDArray[np.bool_]

_SIDE: Final = 128
# Background lies in the lowest part of the range between the 1st and the 99th percentile of the image, at most this bright.
_DARK_SHARE: Final = 0.12
# Background is flat: neighbours differ by at most this share of the range.
_FLAT_SHARE: Final = 0.06
# A body that covers less than this share of the image is not trusted: everything counts as body then.
_MIN_BODY: Final = 0.2


def body_mask(display: NDArray[np.uint8]) -> Flags:
    """Find the body in an image as displayed.

    Args:
        display: uint8 [rows, columns], MONOCHROME2 (air is dark).

    Returns:
        bool [h, w] that covers exactly the image, the longer side at most ``_SIDE``; True is body. All True where no background is
        found, or where so much would be background that the threshold must be wrong.
    """
    small = _reduced(display)
    low, high = np.percentile(small, (1, 99))
    span = float(high - low)
    if span <= 0:
        return np.ones(small.shape, np.bool_)
    dark = small <= low + _DARK_SHARE * span
    background = _connected(dark & (_roughness(small) <= _FLAT_SHARE * span), _frame(small.shape))
    background |= dark & ~shrink(~background)  # beside the body nothing is flat
    body = _largest_part(~background)
    return body if body.mean() >= _MIN_BODY else np.ones(small.shape, np.bool_)


def shrink(mask: Flags, steps: int = 1) -> Flags:
    """Take away the pixels of a mask with a neighbour outside it, ``steps`` times; the edge of the image is no such neighbour."""
    for _ in range(steps):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def resample(mask: Flags, height: int, width: int) -> Flags:
    """Sample a mask on a grid of another size over the same extent; a pixel is True where all it touches is."""
    rows, columns = (np.arange(count + 1) * length / count for count, length in ((height, mask.shape[0]), (width, mask.shape[1])))
    outside = np.pad(np.cumsum(np.cumsum(~mask, axis=0), axis=1), ((1, 0), (1, 0)))
    top, left = np.floor(rows[:-1]).astype(int), np.floor(columns[:-1]).astype(int)
    bottom, right = np.ceil(rows[1:]).astype(int), np.ceil(columns[1:]).astype(int)
    count = outside[np.ix_(bottom, right)] - outside[np.ix_(top, right)] - outside[np.ix_(bottom, left)] + outside[np.ix_(top, left)]
    return np.asarray(count == 0)


def _reduced(display: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reduce by averaging until the longer side has at most ``_SIDE`` pixels."""
    return np.asarray(Image.fromarray(display).reduce(-(-max(display.shape) // _SIDE)), np.float32)


def _roughness(small: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest difference to one of the four neighbours."""
    padded = np.pad(small, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray(np.max([np.abs(small - other) for other in neighbours], axis=0))


def _frame(shape: tuple[int, ...]) -> Flags:
    """The outermost pixels."""
    frame = np.ones(shape, np.bool_)
    frame[1:-1, 1:-1] = False
    return frame


def _connected(passable: Flags, seeds: Flags) -> Flags:
    """The pixels of ``passable`` that are connected with one of ``seeds`` by an edge."""
    reached = passable & seeds
    while True:
        before = int(reached.sum())
        for transposed in (False, True):
            for reverse in (False, True):
                view, open_ = (np.swapaxes(array, 0, 1) if transposed else array for array in (reached, passable))
                view, open_ = (array[:, ::-1] if reverse else array for array in (view, open_))
                view |= _swept(view, open_)
        if int(reached.sum()) == before:
            return reached


def _swept(reached: Flags, passable: Flags) -> Flags:
    """What is reached along the rows, to the right."""
    index = np.arange(reached.shape[1])
    last_reached = np.maximum.accumulate(np.where(reached, index, -1), axis=1)
    last_closed = np.maximum.accumulate(np.where(passable, -1, index), axis=1)
    return np.asarray(last_reached > last_closed)


def _largest_part(mask: Flags) -> Flags:
    """The largest connected part of a mask: letters and markers in the background are no body."""
    rest, largest = mask.copy(), np.zeros_like(mask)
    while int(rest.sum()) > int(largest.sum()):
        seed = np.zeros_like(mask)
        seed.flat[int(np.argmax(rest))] = True
        part = _connected(rest, seed)
        rest &= ~part
        if part.sum() > largest.sum():
            largest = part
    return largest
