"""Key images: three planes through the centre of a segmentation, with its outline.

They have the usual orientation: the patient's right on the left of the image, anterior or head at the top. Letters at the edges state it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw

from appliance.imaging.volumes.geometry import Grid, reorient
from appliance.store.volume_results import COLOURS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.core.domain import Plane

# Directions of the axes of a plane: through it, down, to the right; and the letters at its left, right, top and bottom edge.
_PLANES: Final[dict[Plane, tuple[str, str]]] = {"axial": ("SPL", "RLAP"), "coronal": ("PIL", "RLSI"), "sagittal": ("LIP", "APSI")}
PICTURE_SIDE: Final = 480
_LETTER: Final = "#ffffff"


def draw_key_images(values: NDArray[np.float32], mask: NDArray[np.uint8], grid: Grid) -> dict[Plane, bytes]:
    """Draw the three planes.

    Args:
        values: [depth, height, width], the input volume of the model.
        mask: uint8 of the same shape; class n has the colour ``COLOURS[n - 1]``.
        grid: of both.

    Returns:
        Plane -> PNG, its longer side ``PICTURE_SIDE``.
    """
    low, high = (float(value) for value in np.percentile(values[::2, ::2, ::2], (1, 99.5)))
    grey = np.clip((values - low) * np.float32(255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
    middle = _centre(mask)
    return {plane: _draw(grey, mask, grid, middle, axes, letters) for plane, (axes, letters) in _PLANES.items()}


def _centre(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The index of the centre of the segmentation; the centre of the volume where it is empty."""
    is_labelled = mask > 0
    if not is_labelled.any():
        return (np.array(mask.shape) - 1) / 2
    sums = [is_labelled.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return np.array([float(np.average(np.arange(len(counts)), weights=counts)) for counts in sums])


def _draw(grey: NDArray[np.uint8], mask: NDArray[np.uint8], grid: Grid, middle: NDArray[np.float64], axes: str, letters: str) -> bytes:
    pictured, at = reorient(grey, grid, axes)
    labels, _ = reorient(mask, grid, axes)
    place = int(np.clip(np.rint(at.to_index(grid.to_patient(middle))[0]), 0, len(pictured) - 1))
    height, width = np.array(pictured.shape[1:]) * at.spacing[1:]
    scale = PICTURE_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(pictured[place])).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    shown = np.asarray(picture).copy()
    classes = np.asarray(Image.fromarray(np.ascontiguousarray(labels[place])).resize(size, Image.Resampling.NEAREST))
    for value in np.unique(classes[classes > 0]):
        colour = COLOURS[(int(value) - 1) % len(COLOURS)]
        shown[_border(classes == value)] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return _png(Image.fromarray(shown), letters)


def _border(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a region that have a neighbour outside it."""
    framed = np.pad(inside, 1)
    core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return inside & ~core


def _png(picture: Image.Image, letters: str) -> bytes:
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    places = ((12, height // 2), (width - 12, height // 2), (width // 2, 12), (width // 2, height - 12))
    for letter, place in zip(letters, places, strict=True):
        draw.text(place, letter, fill=_LETTER, anchor="mm", font_size=18, stroke_width=2, stroke_fill="#000000")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
