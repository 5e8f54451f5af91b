r"""Turn a projection image upright by Patient Orientation (0020,0020), and map points back to the pixels of the file.

PS3.3 C.7.6.1.1.1: the first value is the direction of the rows (to the right), the second that of the columns (downwards), each
one to three letters with the main direction first. A frontal image is upright with ``L\\F``; a lateral one with its head up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from appliance.core.domain import Note

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

_DIRECTIONS: Final = "ALPRHF"
_OPPOSITE: Final = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}


@dataclass(frozen=True)
class Orientation:
    """How an image is turned upright: transposed first, then mirrored.

    Attributes:
        transpose: rows become columns.
        flip_rows: the last row comes first, after the transposition.
        flip_columns: the last column comes first, after the transposition.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def is_upright(self) -> bool:
        """Whether nothing has to be done."""
        return self == UPRIGHT

    @property
    def description(self) -> str:
        """Clockwise turn in degrees that was applied, after a left-right mirroring where the text says so; ``0`` for none."""
        is_mirrored = self.transpose ^ self.flip_rows ^ self.flip_columns
        half = 180 if self.flip_rows else 0
        # A transposition with flipped columns is a clockwise quarter turn, without it one to the left.
        degrees = (90 if self.flip_columns else 270) if self.transpose else half
        return f"{'mirrored ' if is_mirrored else ''}{degrees}"

    def then_turn(self, degrees: int) -> Orientation:
        """This orientation, then a clockwise turn by 0, 90, 180 or 270 degrees."""
        transpose, flip_rows, flip_columns = _TURNS[degrees]
        rows, columns = (self.flip_columns, self.flip_rows) if transpose else (self.flip_rows, self.flip_columns)
        return Orientation(self.transpose ^ transpose, rows ^ flip_rows, columns ^ flip_columns)

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """A view of [rows, columns, ...] that is upright."""
        turned = pixels.swapaxes(0, 1) if self.transpose else pixels
        return turned[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def restore(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The opposite of :meth:`apply`."""
        turned = pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return turned.swapaxes(0, 1) if self.transpose else turned

    def restore_point(self, x: float, y: float, rows: int, columns: int) -> tuple[float, float]:
        """Map a point of the upright image, which has ``rows`` x ``columns`` pixels, to the image of the file."""
        x = columns - x if self.flip_columns else x
        y = rows - y if self.flip_rows else y
        return (y, x) if self.transpose else (x, y)

    def to_note(self) -> Note:
        """The note about an image that was turned."""
        return Note("caution.turned", self.description)


UPRIGHT: Final = Orientation()
# Clockwise turns as transposition and flips.
_TURNS: Final = {0: (False, False, False), 90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}


def orientation_of(ds: Dataset) -> Orientation:
    """How to turn an image upright; ``UPRIGHT`` where the header says nothing, something invalid, or describes a section.

    A frontal image is turned and mirrored. A lateral one is only turned, since either side may be shown.
    """
    rows, columns = _main_directions(ds.get("PatientOrientation"))
    axes = {frozenset(axis) for axis in ("LR", "AP", "HF") if rows in axis or columns in axis}
    if not rows or not columns or frozenset("HF") not in axes or len(axes) != 2:
        return UPRIGHT
    transpose = rows in "HF"
    if transpose:
        rows, columns = columns, rows
    flip_rows = columns == "H"
    if frozenset("LR") in axes:
        return Orientation(transpose, flip_rows, rows == "R")
    return Orientation(transpose, flip_rows, flip_rows ^ transpose)


def _main_directions(value: Any) -> tuple[str, str]:
    """The main directions of rows and columns, or two empty texts."""
    values = [value] if isinstance(value, str) else list(value or [])
    if len(values) == 1:
        values = str(values[0]).split("\\")
    letters = [str(item).strip().upper() for item in values]
    if len(letters) != 2 or not all(map(_is_direction, letters)):
        return "", ""
    return letters[0][0], letters[1][0]


def _is_direction(text: str) -> bool:
    """One to three letters, no two of one axis."""
    is_known = 1 <= len(text) <= 3 and all(letter in _DIRECTIONS for letter in text)
    return is_known and all(_OPPOSITE[letter] not in text and text.count(letter) == 1 for letter in text)
