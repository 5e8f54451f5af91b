"""Decode the pixels of an image, one frame at a time, after checks; compressed frames in a process of their own.

The values are those of pydicom's ``pixel_array``: stored values (before any modality or VOI transformation) for grey and palette images;
YBR_FULL and YBR_FULL_422 converted to RGB. Nothing large is imported before the first frame is decoded: the web process mostly reads
headers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder

from appliance.core.errors import IngestError, PixelError
from appliance.imaging.codestream import check_frame
from appliance.imaging.decoder_process import decode_coded_frame
from appliance.imaging.decoders import last_line
from appliance.imaging.pixel_checks import (
    NATIVE,
    PIXEL_KEYWORDS,
    VALUE_ERRORS,
    Layout,
    PixelCaps,
    check_structure,
    read_layout,
    transfer_syntax,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import UID

__all__ = ["PixelCaps", "check_structure", "decode_frame", "frame_count", "iter_frames"]

Frame: TypeAlias = "NDArray[Any]"
_P = ParamSpec("_P")
_T = TypeVar("_T")

# One frame at a time per process: it limits the memory, and warnings are silenced through process-wide state.
_LOCK: Final = threading.Lock()


def frame_count(ds: Dataset) -> int:
    """The number of frames in the header, which the pixel data was checked against."""
    return int(ds.get("NumberOfFrames") or 1)


def decode_frame(ds: Dataset, index: int = 0) -> Frame:
    """Decode one frame of an image that has its file meta group.

    Returns:
        [rows, columns] or [rows, columns, 3] in native byte order, of the type that the header implies; read-only when it is a
        view of uncompressed pixel data.

    Raises:
        PixelError: ``pixel.corrupt`` when the coded data is damaged, ``pixel.undecodable`` when no decoder supports it,
            ``pixel.decoder_*`` when the decoder crashed or exceeded its limits, or an error of ``check_structure``.
        MemoryError: the machine is short of memory.
        IndexError: there is no such frame.
    """
    if not 0 <= index < frame_count(ds):
        raise IndexError(f"frame {index} of {frame_count(ds)}")
    return next(iter_frames(ds, only=index))


def iter_frames(ds: Dataset, *, only: int | None = None) -> Iterator[Frame]:
    """Decode all frames, or ``only`` that one, with one frame in memory at a time.

    Raises:
        PixelError: as ``decode_frame``, or when frames are missing.
    """
    layout, syntax = _layout(ds)
    frames = _native_frames(ds, syntax, layout, only) if syntax in NATIVE else _compressed_frames(ds, syntax, layout, only)
    count = 0
    for frame in frames:
        yield frame
        count += 1
    if count != (layout.frames if only is None else 1):
        raise PixelError("pixel.corrupt", f"{count} of {layout.frames} frames")


def _layout(ds: Dataset) -> tuple[Layout, UID]:
    """Read the header and check it again: an older version with other rules may have stored the image."""
    keyword = next((keyword for keyword in PIXEL_KEYWORDS if keyword in ds), None)
    if keyword is None:
        raise PixelError("ingest.no_pixel_data")
    try:
        return read_layout(ds, keyword, PixelCaps()), transfer_syntax(ds)
    except IngestError as error:
        raise PixelError(error.code, error.detail) from error


def _native_frames(ds: Dataset, syntax: UID, layout: Layout, only: int | None) -> Iterator[Frame]:
    decoder = get_decoder(syntax)
    for index in range(layout.frames) if only is None else (only,):
        frame = _guarded(_view, decoder, ds, layout, index)
        yield _guarded(_decode, decoder, ds, index=index, allow_excess_frames=False) if frame is None else frame


def _view(decoder: Decoder, ds: Dataset, layout: Layout, index: int) -> Frame | None:
    """Return the grey pixels of the file without a copy; None where bits above Bits Stored hold other data (overlays)."""
    if layout.samples != 1 or layout.bits_allocated < 8 or layout.keyword != "PixelData":
        return None
    frame = _decode(decoder, ds, index=index, allow_excess_frames=False, view_only=True, correct_unused_bits=False)
    low, high = (0, (1 << ds.BitsStored) - 1) if frame.dtype.kind == "u" else (-(1 << ds.BitsStored - 1), (1 << ds.BitsStored - 1) - 1)
    return frame if low <= frame.min() and frame.max() <= high else None


def _compressed_frames(ds: Dataset, syntax: UID, layout: Layout, only: int | None) -> Iterator[Frame]:
    """Check each coded frame, then let the decoder process decode it."""
    options = _options(ds, layout)
    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    coded_frames = generate_frames(ds.PixelData, number_of_frames=layout.frames, extended_offsets=offsets)
    for index in range(layout.frames):
        coded = _guarded(next, coded_frames, None)
        if coded is None:
            return
        if only in (None, index):
            check_frame(syntax, coded, layout)
            frame = decode_coded_frame(syntax, coded, options)
            if frame.shape[:2] != (layout.rows, layout.columns) or frame.shape[2:] not in ((), (3,)):
                raise PixelError("pixel.decoder_crashed", f"an array of {frame.shape}")
            yield frame


def _options(ds: Dataset, layout: Layout) -> dict[str, Any]:
    """Options for pydicom to decode a frame without its data set."""
    return {
        "rows": layout.rows, "columns": layout.columns, "number_of_frames": 1, "samples_per_pixel": layout.samples,
        "photometric_interpretation": layout.photometric, "planar_configuration": int(ds.get("PlanarConfiguration") or 0),
        "pixel_representation": int(ds.PixelRepresentation), "bits_allocated": layout.bits_allocated, "bits_stored": int(ds.BitsStored),
    }  # fmt: skip


def _decode(decoder: Decoder, source: Dataset | bytes, **options: Any) -> Frame:
    array: Frame = decoder.as_array(source, **options)[0]
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _guarded(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call pydicom or a decoder without warnings; every error becomes a PixelError."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except (*VALUE_ERRORS, RuntimeError) as error:
            raise PixelError("pixel.corrupt", last_line(error)) from error
