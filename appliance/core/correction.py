"""What a person decided to do with an image that the input check doubts: turn it, invert its grey levels, or analyse it as it is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final


@dataclass(frozen=True)
class Correction:
    """A person's decision about one image; it is applied before every analysis of the image, and on the page.

    Attributes:
        degrees: clockwise turn of the displayed image: 0, 90, 180 or 270.
        inverts: dark becomes bright.
        is_confirmed: a person decided, so that the input check warns and does not stop the image; False: nobody has decided anything.
    """

    degrees: int = 0
    inverts: bool = False
    is_confirmed: bool = False

    def to_text(self) -> str:
        """The correction as stored: ``turn_90``, ``turn_180+invert``, ``invert``; ``as_is``; empty where nobody has decided."""
        parts = [*([f"turn_{self.degrees}"] if self.degrees else []), *(["invert"] if self.inverts else [])]
        return "+".join(parts) or ("as_is" if self.is_confirmed else "")

    @classmethod
    def parse(cls, text: str) -> Correction:
        """Read what :meth:`to_text` wrote; raises ValueError for anything else."""
        if text not in _BY_TEXT:
            raise ValueError("not a correction")
        return _BY_TEXT[text]


NOTHING_DECIDED: Final = Correction()
_DECISIONS: Final = [Correction(degrees, inverts, True) for degrees, inverts in product((0, 90, 180, 270), (False, True))]
_BY_TEXT: Final = {correction.to_text(): correction for correction in (NOTHING_DECIDED, *_DECISIONS)}
