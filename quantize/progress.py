"""Progress of a run: a bar with the estimated time left on a terminal, lines of text in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TextIO, TypeAlias

_WIDTH: Final = 24
_REDRAW_S: Final = 0.2
_LINE_S: Final = 15.0

OnProgress: TypeAlias = Callable[[float], None]
"""Called with the fraction (0 to 1) of a step that is done."""


def no_progress(_: float) -> None:
    """Show nothing: the default of every step."""


def part_of(on_progress: OnProgress, start: float, end: float) -> OnProgress:
    """Return the callback for a step that covers the fractions ``start`` to ``end`` of its parent."""
    return lambda part: on_progress(start + (end - start) * part)


class Progress:
    """Steps of known weight, one after the other.

    Hand-written because it is 60 lines, and a library would serve nothing else.

    Args:
        weights: roughly how long each step takes, in any unit.
        stream: where to write; standard error by default, because standard output is for results.
    """

    def __init__(self, weights: dict[str, float], stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._weights, self._done = dict(weights), 0.0
        self._now = ""
        self._weight = 0.0
        self._started = time.monotonic()
        self._shown = 0.0
        self._terminal = self._stream.isatty()

    def begin(self, step: str, title: str) -> OnProgress:
        """Begin a step; return its callback."""
        self._done += self._weight
        self._weight = self._weights.pop(step, 0.0)
        self._now = title
        self._show(0.0, force=True)
        return self._show

    def expect(self, weights: dict[str, float]) -> None:
        """Add steps that were not known at the start."""
        self._weights |= weights

    def end(self) -> None:
        """Show that all steps are done."""
        self._weights.clear()
        self._now = "done"
        self._show(1.0, force=True)
        if self._terminal:
            self._stream.write("\n")

    def _show(self, part: float, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._shown < (_REDRAW_S if self._terminal else _LINE_S):
            return
        self._shown = now
        total = self._done + self._weight + sum(self._weights.values())
        share = min(1.0, (self._done + part * self._weight) / total) if total else 1.0
        line = f"{share:4.0%}  {self._now}{self._rest(share, now)}"
        if self._terminal:
            filled = round(share * _WIDTH)
            self._stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {line}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _rest(self, share: float, now: float) -> str:
        if not 0.05 < share < 1:
            return ""
        rest_s = (now - self._started) * (1 - share) / share
        return f"  (about {rest_s / 60:.0f} min left)" if rest_s > 90 else f"  (about {rest_s:.0f} s left)"
