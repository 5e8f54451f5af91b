"""One frame for the web viewer: the values that a window is applied to, and how to apply it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from appliance.core.correction import NOTHING_DECIDED, Correction
from appliance.core.errors import PixelError
from appliance.imaging.greyscale import (
    LUT_TOP,
    GreyHeader,
    Window,
    display_extent,
    grey_header,
    pixel_spacing,
    voi_lut_output,
    without_windows_outside,
)
from appliance.imaging.orientation import UPRIGHT, Orientation, orientation_of
from appliance.imaging.pixel_checks import VALUE_ERRORS
from appliance.imaging.pixels import decode_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset


@dataclass(frozen=True)
class DisplayFrame:
    """A frame for the viewer.

    Attributes:
        pixels: grey: [rows, columns], stored values as (u)int8, (u)int16 or float32 (modality values where the header has a
            Modality LUT, values behind the VOI LUT where it has one of those); colour: uint8 RGB [rows, columns, 3].
        photometric: MONOCHROME1 (low is white), MONOCHROME2 or RGB.
        slope: factor for stored values before the window is applied; ``intercept`` is added after it.
        windows: the windows to choose from, the default first; at least one for grey, none for colour.
        bits_stored: Bits Stored.
        signed: stored values can be negative.
        spacing: mm between rows and between columns; None: the viewer measures in pixels.
        minimum: the lowest stored value in the frame; ``maximum`` the highest.
    """

    pixels: NDArray[Any]
    photometric: Literal["MONOCHROME1", "MONOCHROME2", "RGB"]
    slope: float
    intercept: float
    windows: tuple[Window, ...]
    bits_stored: int
    signed: bool
    spacing: tuple[float, float] | None
    minimum: float
    maximum: float
    orientation: Orientation = UPRIGHT


def display_frame(ds: Dataset, index: int = 0, correction: Correction = NOTHING_DECIDED) -> DisplayFrame:
    """Decode one frame for the viewer, upright; palette colour becomes RGB, more than 8 bits per colour become 8.

    It is turned by its header, then corrected as a person decided: the page shows what the model analysed.

    Raises:
        PixelError: the frame cannot be decoded or its header is invalid.
        IndexError: there is no such frame.
    """
    orientation = orientation_of(ds).then_turn(correction.degrees)
    pixels = np.ascontiguousarray(orientation.apply(decode_frame(ds, index)))
    spacing = pixel_spacing(ds, index)
    if spacing is not None and orientation.transpose:
        spacing = (spacing[1], spacing[0])
    if str(ds.get("PhotometricInterpretation")).strip() == "PALETTE COLOR":
        pixels = palette_rgb(ds, pixels)
    if pixels.ndim == 3:
        colour = eight_bits(pixels, pixels.dtype.itemsize * 8 if "RedPaletteColorLookupTableDescriptor" in ds else int(ds.BitsStored))
        colour = 255 - colour if correction.inverts else colour
        return DisplayFrame(colour, "RGB", 1.0, 0.0, (), 8, False, spacing, float(colour.min()), float(colour.max()), orientation)
    header = without_windows_outside(grey_header(ds, index), pixels)
    header = replace(header, inverse=header.inverse ^ correction.inverts)
    if header.voi_lut is not None:
        return _lut_frame(pixels, header, spacing, orientation)
    windows = header.windows or (_default_window(pixels, header, int(ds.get("BitsStored") or 32)),)
    slope, intercept = header.slope, header.intercept
    if header.modality_lut is not None:
        pixels, slope, intercept = header.modality(pixels.astype(np.float64)), 1.0, 0.0
    if pixels.dtype.itemsize > 2 or pixels.dtype.kind == "f":  # supported by WebGL textures and typed arrays
        pixels = pixels.astype(np.float32)
    return DisplayFrame(
        pixels, "MONOCHROME1" if header.inverse else "MONOCHROME2", slope, intercept, windows,
        int(ds.get("BitsStored") or 32), pixels.dtype.kind != "u", spacing, *_extremes(pixels), orientation,
    )  # fmt: skip


def _lut_frame(pixels: NDArray[Any], header: GreyHeader, spacing: tuple[float, float] | None, orientation: Orientation) -> DisplayFrame:
    """A frame behind its VOI LUT, with the window that shows all of it: the very grey levels that the model gets."""
    shown = voi_lut_output(pixels, header)
    window = Window(LUT_TOP / 2, LUT_TOP, "LINEAR_EXACT")
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME1" if header.inverse else "MONOCHROME2"
    return DisplayFrame(shown, photometric, 1.0, 0.0, (window,), 16, False, spacing, *_extremes(shown), orientation)


def _extremes(pixels: NDArray[Any]) -> tuple[float, float]:
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _default_window(pixels: NDArray[Any], header: GreyHeader, bits_stored: int) -> Window:
    if bits_stored == 1:
        low, high = 0.0, 1.0
    else:
        low, high = display_extent(pixels, header, "percentile")
    return Window((low + high) / 2, max(high - low, 1.0 if pixels.dtype.kind != "f" else 1e-6), "LINEAR_EXACT")


def palette_rgb(ds: Dataset, values: NDArray[Any]) -> NDArray[Any]:
    """Convert palette indices to RGB of 8 or 16 bits (PS3.3 C.7.9).

    Raises:
        PixelError: ``ingest.pixel_attributes``: the palette cannot be read.
    """
    from pydicom.pixels.processing import apply_color_lut

    try:
        return apply_color_lut(values, ds)
    except VALUE_ERRORS as error:
        raise PixelError("ingest.pixel_attributes", "palette unreadable") from error


def eight_bits(colour: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Reduce RGB of ``bits`` bits to 8 bits."""
    if colour.dtype == np.uint8:
        return colour
    reduced: NDArray[np.uint8] = (np.clip(colour, 0, None) >> max(bits - 8, 0)).clip(0, 255).astype(np.uint8)
    return reduced
