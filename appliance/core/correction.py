"""How an image that the input check doubts is corrected: turned, inverted, or analysed as it is, by a person's decision.

The one correction that the box makes itself is :data:`OTHER_QUARTER_TURN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final


@dataclass(frozen=True)
class Correction:
    """The correction of one image; it is applied before every analysis of the image, and on the page.

    Attributes:
        degrees: clockwise turn of the displayed image: 0, 90, 180 or 270.
        inverts: dark becomes bright.
        is_confirmed: a person decided, so that the input check warns and does not stop the image.
    """

    degrees: int = 0
    inverts: bool = False
    is_confirmed: bool = False

    def to_text(self) -> str:
        """The correction as stored: ``turn_90``, ``turn_180+invert``, ``invert``; ``as_is``; empty where nobody has decided."""
        if self == OTHER_QUARTER_TURN:
            return "header_reversed"
        parts = [*([f"turn_{self.degrees}"] if self.degrees else []), *(["invert"] if self.inverts else [])]
        return "+".join(parts) or ("as_is" if self.is_confirmed else "")

    @classmethod
    def parse(cls, text: str) -> Correction:
        """Read what :meth:`to_text` wrote; raises ValueError for anything else."""
        if text not in _BY_TEXT:
            raise ValueError("not a correction")
        return _BY_TEXT[text]


NOTHING_DECIDED: Final = Correction()
# Patient Orientation states that the film lies on its side, and it does, but on the other one: some senders name the direction that rows
# come from, not the one they run to (PS3.3 C.7.6.1.1.1). The box turns such a film upright by the picture and says so.
OTHER_QUARTER_TURN: Final = Correction(180)
_DECISIONS: Final = [Correction(degrees, inverts, True) for degrees, inverts in product((0, 90, 180, 270), (False, True))]
_BY_TEXT: Final = {correction.to_text(): correction for correction in (NOTHING_DECIDED, OTHER_QUARTER_TURN, *_DECISIONS)}
