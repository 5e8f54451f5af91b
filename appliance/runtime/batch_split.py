"""A batch in pieces, for a runtime that takes fewer images at once, or always the same number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = Callable[["NDArray[np.float32]"], "dict[str, NDArray[Any]]"]


def in_pieces(value: NDArray[np.float32], largest: int, dynamic: bool, run: Run) -> dict[str, NDArray[Any]]:
    """Run a batch of any size.

    Args:
        value: float32 [n, ...].
        largest: how many images ``run`` takes at once.
        dynamic: whether it takes fewer as well; else the last piece is filled up with zeros, whose answers are dropped.
        run: runs one piece; gives every output as [number of images in the piece, ...].
    """
    n = len(value)
    if n == largest or (dynamic and n < largest):
        return run(value)
    pieces = []
    for start in range(0, n, largest):
        piece = value[start : start + largest]
        if len(piece) < largest and not dynamic:
            filled = np.zeros((largest, *value.shape[1:]), value.dtype)
            filled[: len(piece)] = piece
            piece = filled
        pieces.append(run(piece))
    return {name: np.concatenate([piece[name] for piece in pieces])[:n] for name in pieces[0]}
