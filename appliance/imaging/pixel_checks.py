"""Check the pixel data of an image at ingest without decoding it: is the header valid, and is the data complete.

An image that passes can be decoded within the memory limit: sizes are within ``PixelCaps``, uncompressed pixel data has exactly the
length that its header implies, and the header of the first compressed frame agrees with the DICOM header (the other frames are
checked when they are decoded). Attributes: Image Pixel Module, PS3.3 C.7.6.3; encapsulation: PS3.5 A.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydicom.encaps import parse_basic_offsets, parse_fragments
from pydicom.errors import BytesLengthException
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from appliance.core.errors import IngestError, PixelError
from appliance.imaging.codestream import COMPRESSED, FrameShape, check_header

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

NATIVE: Final = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian})
PIXEL_KEYWORDS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# The exceptions of pydicom for damaged values of data elements.
VALUE_ERRORS: Final = (
    ValueError, TypeError, AttributeError, LookupError, NotImplementedError, OverflowError, EOFError, struct.error,
    OSError, BytesLengthException,
)  # fmt: skip

_PHOTOMETRIC: Final = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
_BITS_ALLOCATED: Final = {"PixelData": (1, 8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}
# Some devices pad the end of the pixel data; a complete extra row means that Rows or Columns are wrong.
_MAX_PADDING_BYTES: Final = 1024
_HEADER_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class PixelCaps:
    """The largest image that is accepted.

    The largest real frames are those of stitched spines and of mammography, some 60 MB. Frames of ``max_frame_bytes`` were
    decoded and prepared for a model in a process of their own, which then took at most 1.1 GB (RGB in JPEG 2000, or YBR).
    """

    max_frame_bytes: int = 96 * 1024 * 1024
    max_frames: int = 10_000
    max_dimension: int = 30_000


@dataclass(frozen=True)
class Layout(FrameShape):
    """The checked Image Pixel Module of an image."""

    keyword: str
    frames: int
    photometric: str

    @property
    def row_bits(self) -> int:
        """Bits of one uncompressed row; YBR_FULL_422 shares its chroma between two pixels (PS3.3 C.7.6.3.1.2)."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.columns * samples * self.bits_allocated


def check_structure(ds: Dataset, caps: PixelCaps | None = None) -> None:
    """Raise an error where the pixel data of an image contradicts its header; decodes no pixel and uses little memory.

    Raises:
        IngestError: ``ingest.no_pixel_data``, ``ingest.unsupported_syntax``, ``ingest.absurd_dimensions``,
            ``ingest.truncated``, ``ingest.pixel_representation`` or ``ingest.pixel_attributes``.
        PixelError: ``pixel.corrupt``: the encapsulation or the header of the first frame is invalid.
    """
    keywords = [keyword for keyword in PIXEL_KEYWORDS if keyword in ds]
    if not keywords:
        raise IngestError("ingest.no_pixel_data")
    if len(keywords) > 1:
        raise IngestError("ingest.pixel_attributes", " and ".join(keywords))
    syntax = transfer_syntax(ds)
    layout = read_layout(ds, keywords[0], caps or PixelCaps())
    data = _pixel_bytes(ds, layout.keyword)
    if syntax in NATIVE:
        _check_native(layout, data)
    elif layout.keyword == "PixelData":
        _check_encapsulated(ds, syntax, layout, data)
    else:
        raise IngestError("ingest.unsupported_syntax", f"{layout.keyword} in {syntax}")


def transfer_syntax(ds: Dataset) -> UID:
    """The image's transfer syntax, one that the box can decode.

    Raises:
        IngestError: ``ingest.unsupported_syntax`` (video, private, unknown, or none stated).
    """
    uid = UID(str(getattr(ds, "file_meta", {}).get("TransferSyntaxUID") or ""))
    if uid not in NATIVE and uid not in COMPRESSED:
        raise IngestError("ingest.unsupported_syntax", uid.name if uid and not uid.is_private else "private or absent")
    return uid


def read_layout(ds: Dataset, keyword: str, caps: PixelCaps) -> Layout:
    """Read and check the Image Pixel Module.

    Raises:
        IngestError: ``ingest.absurd_dimensions``, ``ingest.pixel_representation`` or ``ingest.pixel_attributes``.
    """
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    frames = _integer(ds, "NumberOfFrames", 1) or 1  # some devices write 0 for "one"
    if not (0 < rows <= caps.max_dimension and 0 < columns <= caps.max_dimension and 0 < frames <= caps.max_frames):
        raise IngestError("ingest.absurd_dimensions", f"{columns} x {rows} x {frames}")
    samples, bits_allocated = _integer(ds, "SamplesPerPixel"), _integer(ds, "BitsAllocated")
    photometric = str(ds.get("PhotometricInterpretation") or "").strip()
    if photometric not in _PHOTOMETRIC.get(samples, ()):
        raise IngestError("ingest.pixel_attributes", f"{samples} samples of {photometric or 'unknown'}")
    if bits_allocated not in _BITS_ALLOCATED[keyword] or (bits_allocated == 1 and samples != 1):
        raise IngestError("ingest.pixel_attributes", f"Bits Allocated {bits_allocated}")
    if keyword == "PixelData":
        _check_sample(ds, bits_allocated)
    layout = Layout(rows, columns, samples, bits_allocated, keyword, frames, photometric)
    if rows * columns * samples * max(bits_allocated, 8) // 8 > caps.max_frame_bytes:
        raise IngestError("ingest.absurd_dimensions", f"{columns} x {rows} pixels in one frame")
    return layout


def _check_sample(ds: Dataset, bits_allocated: int) -> None:
    stored = _integer(ds, "BitsStored")
    high = _integer(ds, "HighBit", stored - 1)
    if not 1 <= stored <= bits_allocated or high != stored - 1:  # PS3.5 8.1.1
        raise IngestError("ingest.pixel_attributes", f"Bits Stored {stored} of {bits_allocated}, High Bit {high}")
    if _integer(ds, "PixelRepresentation", -1) not in (0, 1):
        raise IngestError("ingest.pixel_representation")


def _integer(ds: Dataset, keyword: str, default: int | None = None) -> int:
    """Read a value that must be one integer; ``default`` where it is absent or empty."""
    try:
        value = ds.get(keyword)
        if value is None or value == "":
            if default is None:
                raise IngestError("ingest.pixel_attributes", f"{keyword} is absent")
            return default
        if int(value) == value:
            return int(value)
    except VALUE_ERRORS as error:
        raise IngestError("ingest.pixel_attributes", f"{keyword} is no integer") from error
    raise IngestError("ingest.pixel_attributes", f"{keyword} is no integer")


def _pixel_bytes(ds: Dataset, keyword: str) -> bytes:
    try:
        data = ds[keyword].value
    except VALUE_ERRORS as error:
        raise IngestError("ingest.truncated", "pixel data unreadable") from error
    if not isinstance(data, (bytes, bytearray)) or not data:
        raise IngestError("ingest.no_pixel_data")
    return bytes(data)


def _check_native(layout: Layout, data: bytes) -> None:
    """Check that uncompressed pixel data has the length that the header implies, apart from a little padding."""
    expected = -(-layout.rows * layout.row_bits * layout.frames // 8)
    if len(data) < expected:
        code = "ingest.truncated" if len(data) * 8 > expected else "ingest.absurd_dimensions"
        raise IngestError(code, f"{len(data)} bytes of pixel data, {expected} expected")
    padding = len(data) - expected
    if padding > 1 and padding >= min(_MAX_PADDING_BYTES, layout.row_bits // 8):
        raise IngestError("ingest.pixel_attributes", f"{len(data)} bytes of pixel data, {expected} expected")


def _check_encapsulated(ds: Dataset, syntax: UID, layout: Layout, data: bytes) -> None:
    if layout.bits_allocated == 1 or (syntax != RLELossless and layout.bits_allocated == 32):
        raise IngestError("ingest.unsupported_syntax", f"{layout.bits_allocated} bits per sample in {syntax.name}")
    try:
        offsets = parse_basic_offsets(data)
        _, starts = parse_fragments(data)
    except VALUE_ERRORS as error:
        raise PixelError("pixel.corrupt", "encapsulated frames") from error
    spans = [(start + 8, start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")) for start in starts[1:]]
    if any(end > len(data) for _, end in spans):
        raise IngestError("ingest.truncated", "a compressed frame is cut short")
    if len(spans) < layout.frames or (offsets and len(offsets) != layout.frames):
        raise IngestError("ingest.absurd_dimensions", f"{layout.frames} frames, {len(spans)} fragments, {len(offsets)} offsets")
    _check_offsets(ds, layout, offsets, [start - 8 - starts[1] for start, _ in spans])
    check_header(syntax, b"".join(data[start:end] for start, end in spans[:8])[:_HEADER_BYTES], layout)


def _check_offsets(ds: Dataset, layout: Layout, offsets: list[int], fragments: list[int]) -> None:
    """Check that offset tables point to fragments in order: decoders do not check them."""
    tables = [offsets]
    if "ExtendedOffsetTable" in ds:
        extended, lengths = bytes(ds.ExtendedOffsetTable), bytes(ds.get("ExtendedOffsetTableLengths") or b"")
        if not len(extended) == len(lengths) == 8 * layout.frames:
            raise PixelError("pixel.corrupt", "Extended Offset Table")
        tables.append(list(struct.unpack(f"<{layout.frames}Q", extended)))
    known = set(fragments)
    for table in tables:
        if table and (not known.issuperset(table) or table != sorted(set(table)) or table[0] != 0):
            raise PixelError("pixel.corrupt", "offset table")
