"""Runs a batch in smaller batches, for a runtime with a smaller limit or a fixed batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = Callable[["NDArray[np.float32]"], "dict[str, NDArray[Any]]"]


def run_in_pieces(value: NDArray[np.float32], largest: int, dynamic: bool, run: Run) -> dict[str, NDArray[Any]]:
    """Run a batch of any size.

    Args:
        value: float32 [n, ...].
        largest: largest batch that ``run`` takes.
        dynamic: whether ``run`` takes smaller batches too; else the last batch is padded with zeros, whose outputs are dropped.
        run: runs one batch [m, ...]; returns output name -> array [m, ...].
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
