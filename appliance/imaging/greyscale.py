"""Convert stored values to the display image: 8 bits, low is black (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2).

Stored values pass the Modality LUT (or rescale), the VOI LUT (or the first window) and, for MONOCHROME1, one inversion. The result is
computed once for each value that can occur and then looked up, which takes 3 ms instead of 60 for 2048 x 2048 pixels.

pydicom's functions for windows and LUTs are not used: they take the range of the result from header fields that are often wrong (here it
is 0 to 1), and their lookup wraps around in 8-bit LUTs of more than 256 entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
from pydicom.uid import ExplicitVRBigEndian

from appliance.core.domain import Note
from appliance.core.errors import PixelError
from appliance.imaging.pixel_checks import VALUE_ERRORS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    Values: TypeAlias = NDArray[np.float64]

_T = TypeVar("_T", np.uint8, np.uint16)

VoiFunction: TypeAlias = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
VoiDefault: TypeAlias = Literal["minmax", "percentile"]

# Rows processed at a time: few enough for the processor's cache, which makes the lookup twice as fast.
_ROWS: Final = 32
LUT_TOP: Final = 65535.0
_DECIMAL_COMMA: Final = re.compile(r"\s*[+-]?\d+,\d+([eE][+-]?\d+)?\s*")
_NUMBERS: Final = (
    "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing",
)  # fmt: skip
# A LUT that lacks no more than this share of its entries is completed by its last one.
_LUT_TOLERANCE: Final = 0.01
_PERCENTILES: Final = (1.0, 99.0)
_PERCENTILE_SAMPLES: Final = 1_000_000


@dataclass(frozen=True)
class Window:
    """One window: centre and width in modality units, and its function (PS3.3 C.11.2.1.2, C.11.2.1.3)."""

    center: float
    width: float
    function: VoiFunction = "LINEAR"

    def apply(self, values: Values) -> Values:
        """Map modality values to 0..1."""
        if self.function == "SIGMOID":
            exponent: Values = np.clip(-4.0 * (values - self.center) / self.width, -700.0, 700.0)
            return np.asarray(1.0 / (1.0 + np.exp(exponent)))
        center, width = (self.center, self.width) if self.function == "LINEAR_EXACT" else (self.center - 0.5, self.width - 1.0)
        if width <= 0:  # LINEAR of width 1 is a step
            return (values > center).astype(np.float64)
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Lut:
    """A lookup table: ``first`` is the input of its first entry; inputs outside take the nearest entry (PS3.3 C.11.1.1.1)."""

    first: int
    entries: Values

    def apply(self, values: Values) -> Values:
        """Look values up."""
        index = np.clip(np.nan_to_num(np.rint(values)) - self.first, 0, len(self.entries) - 1)
        result: Values = self.entries[index.astype(np.intp)]
        return result

    def apply_unit(self, values: Values) -> Values:
        """Look values up, scaled to 0..1 by the bits the entries use: the number of bits in the descriptor is often wrong."""
        return self.apply(values) / float((1 << int(self.entries.max()).bit_length()) - 1 or 1)


@dataclass(frozen=True)
class GreyHeader:
    """The attributes of the header that define the meaning of grey values.

    Attributes:
        slope: Rescale Slope; ignored where there is a ``modality_lut``.
        intercept: Rescale Intercept; ignored where there is a ``modality_lut``.
        windows: the usable windows, in the order of the header.
        padding: lowest and highest stored value of the padding (Pixel Padding Value, PS3.3 C.7.5.1.1.2), or None.
        inverse: low values are white (MONOCHROME1 or Presentation LUT Shape INVERSE; both together invert only once).
        modality_lut: the first item of the Modality LUT Sequence, or None.
        voi_lut: the first item of the VOI LUT Sequence, or None.
        notes: what was repaired or ignored.
    """

    slope: float = 1.0
    intercept: float = 0.0
    windows: tuple[Window, ...] = ()
    padding: tuple[float, float] | None = None
    inverse: bool = False
    modality_lut: Lut | None = None
    voi_lut: Lut | None = None
    notes: tuple[Note, ...] = ()

    def modality(self, stored: Values) -> Values:
        """Convert stored values to modality units."""
        if self.modality_lut is not None:
            return self.modality_lut.apply(stored)
        return stored * self.slope + self.intercept


def frame_value(ds: Dataset, frame: int, group: str, keyword: str) -> Any:
    """Read a value from the functional groups of an enhanced image (PS3.3 C.7.6.16), else from the top level."""
    per_frame, shared = ds.get("PerFrameFunctionalGroupsSequence") or [], ds.get("SharedFunctionalGroupsSequence") or []
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        for inner in (item.get(group) or [])[:1]:
            if keyword in inner:
                return inner.get(keyword)
    return ds.get(keyword)


def words(value: Any) -> tuple[str, ...]:
    """Convert a value of any multiplicity to texts in capitals; none where it is absent."""
    several = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [] if value is None else [value]
    return tuple("" if item is None else str(item).strip().upper() for item in several)


def frame_type(ds: Dataset, frame: int) -> tuple[str, ...]:
    """Frame Type of an enhanced image (PS3.3 C.8.16.1); empty for other images."""
    groups = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
    return next((words(value) for group in groups if (value := frame_value(ds, frame, group, "FrameType"))), ())


def _items(value: Any) -> list[Any]:
    """The values of an element of any multiplicity."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)


def numbers(value: Any) -> list[float]:
    """Convert a value of any multiplicity to numbers, also with a decimal comma; text that is not a number becomes NaN."""
    result = []
    for item in _items(value):
        try:
            text = item.replace(",", ".") if isinstance(item, str) and _DECIMAL_COMMA.fullmatch(item) else item
            result.append(float(text))
        except VALUE_ERRORS:
            result.append(math.nan)
    return result


def rescale(ds: Dataset, frame: int = 0) -> tuple[float, float]:
    """Rescale Slope and Intercept of a frame; 1 and 0 where there are none.

    Raises:
        PixelError: ``ingest.pixel_attributes``: a rescale that maps everything to one value, or to no number.
    """
    group = "PixelValueTransformationSequence"
    slope = next(iter(numbers(frame_value(ds, frame, group, "RescaleSlope"))), 1.0)
    intercept = next(iter(numbers(frame_value(ds, frame, group, "RescaleIntercept"))), 0.0)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise PixelError("ingest.pixel_attributes", f"rescale by {slope} and {intercept}")
    return slope, intercept


def grey_header(ds: Dataset, frame: int = 0) -> GreyHeader:
    """Read what the header says about a grey frame; raises PixelError as :func:`rescale`."""
    slope, intercept = rescale(ds, frame)
    shape = str(ds.get("PresentationLUTShape") or "").strip().upper()
    windows, is_inverting, window_notes = _windows(ds, frame)
    modality_lut, modality_notes = _lut(ds, "ModalityLUTSequence")
    voi_lut, voi_notes = _lut(ds, "VOILUTSequence")
    commas = tuple(Note("caution.decimal_comma", name) for name in _NUMBERS if _has_decimal_comma(frame_value(ds, frame, "", name)))
    is_inverse = str(ds.get("PhotometricInterpretation")).strip() == "MONOCHROME1" or shape == "INVERSE"
    return GreyHeader(
        slope=slope,
        intercept=intercept,
        windows=windows,
        padding=_padding(ds),
        inverse=is_inverse ^ (is_inverting and voi_lut is None),
        modality_lut=modality_lut,
        voi_lut=voi_lut,
        notes=(*commas, *modality_notes, *voi_notes, *(() if voi_lut else window_notes)),
    )


def _has_decimal_comma(value: Any) -> bool:
    return any(isinstance(item, str) and _DECIMAL_COMMA.fullmatch(item) for item in _items(value))


def _windows(ds: Dataset, frame: int) -> tuple[tuple[Window, ...], bool, tuple[Note, ...]]:
    """The usable windows of the header, whether the first one inverts grey levels, and a note where something was wrong with it.

    A width may not be negative (PS3.3 C.11.2.1.2). Devices that write one mean what its formula then does: high values are dark.
    """
    group = "FrameVOILUTSequence"
    centers = numbers(frame_value(ds, frame, group, "WindowCenter"))
    widths = numbers(frame_value(ds, frame, group, "WindowWidth"))
    name = str(frame_value(ds, frame, group, "VOILUTFunction") or "").strip().upper()
    function: VoiFunction = name if name in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"  # type: ignore[assignment]
    least = 1.0 if function == "LINEAR" else 0.0
    pairs = list(zip(centers, widths, strict=False))
    windows = tuple(
        Window(center, abs(width), function)
        for center, width in pairs
        if math.isfinite(center) and math.isfinite(width) and abs(width) >= least and width != 0
    )
    is_bad = bool(centers or widths) and (not pairs or not windows or (windows[0].center, windows[0].width) != pairs[0])
    stated = "/".join(f"{value:g}" for value in (*centers[:1], *widths[:1]))
    is_inverting = bool(windows) and pairs[0] == (windows[0].center, -windows[0].width)
    return windows, is_inverting, (Note("caution.window", stated),) if is_bad else ()


def without_windows_outside(header: GreyHeader, frame: NDArray[Any]) -> GreyHeader:
    """Drop the windows that would show a frame all black or all white; ``frame`` holds stored values [rows, columns]."""
    if header.voi_lut is not None or not header.windows:
        return header
    for step in (16, 1):  # a sample of the pixels is enough where it proves that the first window shows something
        values = np.asarray(frame[::step, ::step], np.float64)
        shown = header.modality(values[np.isfinite(values)])
        low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 0.0)
        windows = tuple(window for window in header.windows if _overlaps(window, low, high))
        if windows[:1] == header.windows[:1]:
            return header
    first = header.windows[0]
    return replace(header, windows=windows, notes=(*header.notes, Note("caution.window", f"{first.center:g}/{first.width:g}")))


def _overlaps(window: Window, low: float, high: float) -> bool:
    """Whether a window distinguishes some of the values from ``low`` to ``high``; one value alone is distinguished by none."""
    half = window.width / 2
    return window.function == "SIGMOID" or low == high or (window.center - half < high and window.center + half > low)


def _padding(ds: Dataset) -> tuple[float, float] | None:
    value = numbers(ds.get("PixelPaddingValue"))
    if not value or not math.isfinite(value[0]):
        return None
    limit = numbers(ds.get("PixelPaddingRangeLimit"))
    ends = [value[0], limit[0] if limit and math.isfinite(limit[0]) else value[0]]
    if ds.get("PixelRepresentation") == 1:  # often written unsigned although the pixels are signed
        half = 1 << (int(ds.BitsAllocated) - 1)
        ends = [end - 2 * half if end >= half else end for end in ends]
    return min(ends), max(ends)


def _lut(ds: Dataset, keyword: str) -> tuple[Lut | None, tuple[Note, ...]]:
    """The first LUT of a sequence, and a note where its last entries were missing (PS3.3 C.11.1.1).

    Entries of more than 8 bits are words. Entries of 8 bits are words or, where the data is half as long, packed into words.
    """
    items = ds.get(keyword)
    if not items:
        return None, ()
    try:
        count, first, bits = (int(value) for value in items[0].LUTDescriptor)
        count = count or 1 << 16
        entries = _lut_entries(ds, items[0].LUTData, count, bits)
        missing = count - len(entries)
        if missing > _LUT_TOLERANCE * count or entries.min() < 0:
            raise ValueError("LUT data too short")
    except VALUE_ERRORS as error:
        raise PixelError("ingest.pixel_attributes", f"{keyword} unreadable") from error
    if ds.get("PixelRepresentation") == 1 and first >= 1 << 15:
        first -= 1 << 16  # signed, though read as US
    notes = (Note("caution.lut_short", f"{keyword}, {missing} of {count}"),) if missing else ()
    return Lut(first, np.concatenate((entries, np.repeat(entries[-1:], missing)))), notes


def _lut_entries(ds: Dataset, data: Any, count: int, bits: int) -> Values:
    if not isinstance(data, bytes):
        return np.asarray(data, dtype=np.int64)[:count].astype(np.float64)
    order = ">" if getattr(ds, "file_meta", {}).get("TransferSyntaxUID") == ExplicitVRBigEndian else "<"
    is_packed = bits <= 8 and len(data) < 2 * count
    words = np.frombuffer(data, np.uint8) if is_packed else np.frombuffer(data, f"{order}u2", min(count, len(data) // 2))
    return words[:count].astype(np.float64)


def voi_lut_output(frame: NDArray[Any], header: GreyHeader) -> NDArray[np.uint16]:
    """A frame behind Modality and VOI LUT: 0 to ``LUT_TOP``, before any inversion; stored values that are not finite become 0."""
    assert header.voi_lut is not None
    lut = header.voi_lut

    def convert(stored: Values) -> NDArray[np.uint16]:
        return np.rint(LUT_TOP * lut.apply_unit(header.modality(stored))).astype(np.uint16)

    return _apply(frame, convert, np.uint16)


def display_grey(frame: NDArray[Any], header: GreyHeader, default: VoiDefault, bits_stored: int = 16) -> tuple[NDArray[np.uint8], str]:
    """Convert a frame to the display image: 8 bits, low is black, padding is black.

    Args:
        frame: stored values [rows, columns], integers of up to 32 bits or floats.
        header: meaning of the values.
        default: the range to show where the header has neither VOI LUT nor window. Images of up to 8 bits without either are
            ready for display and are shown as they are.
        bits_stored: Bits Stored.

    Returns:
        uint8 [rows, columns], and a description of the VOI transformation.
    """
    voi, description = _voi(frame, header, default, bits_stored)

    def convert(stored: Values) -> NDArray[np.uint8]:
        unit = voi(header.modality(stored))
        if header.inverse:
            unit = 1.0 - unit
        is_black = ~np.isfinite(stored)
        if header.padding is not None:
            is_black |= (stored >= header.padding[0]) & (stored <= header.padding[1])
        return np.where(is_black, 0.0, np.rint(255.0 * unit)).astype(np.uint8)

    with np.errstate(invalid="ignore", over="ignore"):
        return _apply(frame, convert, np.uint8), description


def _voi(frame: NDArray[Any], header: GreyHeader, default: VoiDefault, bits_stored: int) -> tuple[Callable[[Values], Values], str]:
    """The function from modality values to 0..1, and its description."""
    if header.voi_lut is not None:
        return header.voi_lut.apply_unit, "VOI LUT"
    if header.windows:
        window = header.windows[0]
        return window.apply, f"window {window.center:g}/{window.width:g} {window.function}"
    rescaled = header.modality_lut is not None or (header.slope, header.intercept) != (1.0, 0.0)
    if bits_stored <= 8 and frame.dtype.kind == "u" and not rescaled:
        top = float((1 << bits_stored) - 1)
        return Window(top / 2, top, "LINEAR_EXACT").apply, f"{bits_stored} bits as they are"
    low, high = display_extent(frame, header, default)
    return Window((low + high) / 2, max(high - low, 1e-12), "LINEAR_EXACT").apply, f"{default} {low:g} to {high:g}"


def display_extent(frame: NDArray[Any], header: GreyHeader, default: VoiDefault) -> tuple[float, float]:
    """The range of modality values to display where the header has no window, without padding; (0, 0) where all is padding."""
    values = frame
    if default == "percentile":
        step = max(1, math.isqrt(frame.size // _PERCENTILE_SAMPLES))
        values = frame[::step, ::step]
    if header.padding is not None:
        values = values[(values < header.padding[0]) | (values > header.padding[1])]
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0
    stored = np.percentile(values, _PERCENTILES) if default == "percentile" else np.array([values.min(), values.max()], np.float64)
    if header.modality_lut is not None:  # it may not be monotonic: convert every value in between
        stored = np.arange(stored[0], stored[1] + 1)
    values = header.modality(np.asarray(stored, np.float64))
    return float(values.min()), float(values.max())


def _apply(frame: NDArray[Any], function: Callable[[Values], NDArray[_T]], dtype: type[_T]) -> NDArray[_T]:
    """Apply a function of single values to a frame: by a lookup table where few values can occur, else block by block."""
    result = np.empty(frame.shape, dtype)
    table = None
    if frame.dtype.kind in "iu" and frame.dtype.itemsize <= 2:
        index_type = np.dtype(f"u{frame.dtype.itemsize}")
        table = function(np.arange(1 << 8 * frame.dtype.itemsize).astype(index_type).view(frame.dtype).astype(np.float64))
        frame = np.ascontiguousarray(frame).view(index_type)
    for start in range(0, len(frame), _ROWS):
        rows = frame[start : start + _ROWS]
        if table is None:
            result[start : start + _ROWS] = function(rows.astype(np.float64))
        else:
            np.take(table, rows, out=result[start : start + _ROWS], mode="clip")
    return result


def pixel_spacing(ds: Dataset, frame: int = 0) -> tuple[float, float] | None:
    """The distance between rows and between columns in mm; None where the header has no valid value (0 is invalid)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        values = numbers(frame_value(ds, frame, "PixelMeasuresSequence", keyword))
        if len(values) == 2 and all(math.isfinite(value) and 1e-4 <= value <= 1e3 for value in values):
            return values[0], values[1]
    return None


def pixel_aspect(ds: Dataset, frame: int = 0) -> float:
    """Height of a pixel divided by its width: from the spacing, else Pixel Aspect Ratio, else 1 (square)."""
    spacing = pixel_spacing(ds, frame)
    if spacing is None:
        ratio = numbers(ds.get("PixelAspectRatio"))  # vertical, then horizontal; PS3.3 C.7.6.3.1.7
        spacing = (ratio[0], ratio[1]) if len(ratio) == 2 and all(math.isfinite(v) and v > 0 for v in ratio) else (1.0, 1.0)
    aspect = spacing[0] / spacing[1]
    return aspect if 0.2 <= aspect <= 5 else 1.0  # beyond that the header is wrong
