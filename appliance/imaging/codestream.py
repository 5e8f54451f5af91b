"""Check compressed frames before they are decoded: the headers of all syntaxes, and all codes of JPEG.

A decoder allocates memory by the header of the codestream, whatever the DICOM header says: a forged header is refused here, before that.
libjpeg only warns about damaged data and fills the rest with grey, which a model would score. So each JPEG frame is decoded once by
simplejpeg, whose strict mode turns libjpeg's warnings into errors. simplejpeg supports 8 bits only, but Huffman codes are the same for
every sample precision (ITU-T T.81 F.1.2, H.1.2.2), so the check decodes a copy whose header says 8 bits. It detects 98 of 100 chest X-ray
frames with 340 bytes overwritten, and every truncated frame. JPEG-LS decoders check the data themselves; JPEG 2000 and RLE contain no
redundancy, so that only truncated or unparsable data is detected.

The headers are parsed here because pydicom reads precision and component identifiers but not the sizes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from appliance.core.errors import PixelError

JPEG: Final = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1})
JPEG_LS: Final = frozenset({JPEGLSLossless, JPEGLSNearLossless})
JPEG_2000: Final = frozenset({JPEG2000Lossless, JPEG2000})
HT_JPEG_2000: Final = frozenset({HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K})
COMPRESSED: Final = JPEG | JPEG_LS | JPEG_2000 | HT_JPEG_2000 | {RLELossless}

_SOF_SEQUENTIAL: Final = (0xC0, 0xC1)
_SOF_LOSSLESS: Final = 0xC3
_SOF_JPEG_LS: Final = 0xF7
_SOF_ALL: Final = frozenset({*range(0xC0, 0xD0), _SOF_JPEG_LS} - {0xC4, 0xC8, 0xCC})
_SOS: Final = 0xDA
_EOI: Final = 0xD9
# Each JPEG scan costs a pass over the image but only a dozen bytes in the file; three components need three scans.
_MAX_SCANS: Final = 16
# OpenJPEG allocates about 9 KB per tile before it decodes the first; 8192 x 8192 pixels in tiles of 128 are 4096 tiles.
_MAX_TILES: Final = 4096
_SIZ: Final = struct.Struct(">HHIIIIIIIIH")


@dataclass(frozen=True)
class FrameShape:
    """The size and sample format of a frame by the DICOM header."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int


@dataclass(frozen=True)
class _Header:
    """The header of a codestream; ``precision_at`` is the offset of the sample precision in a JPEG header."""

    rows: int
    columns: int
    samples: int
    precision: int
    precision_at: int = 0


def check_header(syntax: UID, data: bytes, shape: FrameShape) -> None:
    """Compare the header at the start of one compressed frame with the DICOM header; nothing is decoded.

    Args:
        syntax: the transfer syntax, one of ``COMPRESSED``.
        data: the frame, or at least its first 64 KiB.
        shape: the expected size and format.

    Raises:
        PixelError: ``pixel.corrupt`` when there is no valid header, ``ingest.absurd_dimensions`` or
            ``ingest.pixel_attributes`` when it contradicts the DICOM header.
    """
    if syntax == RLELossless:
        _check_rle(data, shape)
        return
    header = _jpeg_2000_header(data) if syntax in JPEG_2000 | HT_JPEG_2000 else _jpeg_header(data)
    if (header.rows, header.columns) != (shape.rows, shape.columns):
        raise PixelError(
            "ingest.absurd_dimensions",
            f"the compressed frame is {header.columns} x {header.rows}, the header says {shape.columns} x {shape.rows}",
        )
    if header.samples != shape.samples or header.precision > shape.bits_allocated:
        raise PixelError(
            "ingest.pixel_attributes",
            f"the compressed frame has {header.samples} x {header.precision} bits, "
            f"the header says {shape.samples} x {shape.bits_allocated}",
        )


def check_frame(syntax: UID, data: bytes, shape: FrameShape) -> None:
    """Check one complete compressed frame: its header, and for JPEG all codes.

    Raises:
        PixelError: as ``check_header``; ``pixel.corrupt`` too when the coded data is damaged or truncated.
    """
    check_header(syntax, data, shape)
    if syntax in JPEG:
        _check_jpeg_codes(data)


def _corrupt(detail: str) -> PixelError:
    return PixelError("pixel.corrupt", detail)


def _check_jpeg_codes(data: bytes) -> None:
    from simplejpeg import decode_jpeg  # type: ignore[import-untyped]

    header = _jpeg_header(data)
    if data.count(b"\xff\xda") > _MAX_SCANS:  # never part of coded data, where 00 follows each FF
        raise _corrupt("too many scans")
    at = header.precision_at
    copy = data if header.precision == 8 else b"".join((data[:at], b"\x08", data[at + 1 :]))
    try:
        decode_jpeg(copy, colorspace="GRAY" if header.samples == 1 else "RGB", strict=True)
    except ValueError as error:
        raise _corrupt(str(error)) from error


def _jpeg_header(data: bytes) -> _Header:
    """The frame header of a JPEG or JPEG-LS codestream (ITU-T T.81 B.2, T.87 C.2), from SOI to the first scan."""
    if data[:2] != b"\xff\xd8":
        raise _corrupt("no JPEG start of image")
    header: _Header | None = None
    frame_marker, position = 0, 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise _corrupt(f"no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker == _SOS:
            return _checked_scan(header, frame_marker, segment)
        if marker == _EOI or length < 2 or len(segment) != length - 2:
            break
        if marker in _SOF_ALL:
            header, frame_marker = _sof(marker, segment, position + 4), marker
        position += 2 + length
    raise _corrupt("the JPEG header ends before its first scan")


def _sof(marker: int, segment: bytes, at: int) -> _Header:
    if marker not in (*_SOF_SEQUENTIAL, _SOF_LOSSLESS, _SOF_JPEG_LS):
        raise _corrupt(f"JPEG process 0x{marker:02X} is not part of this transfer syntax")
    if len(segment) < 6:
        raise _corrupt("JPEG frame header cut short")
    precision, rows, columns, samples = struct.unpack(">BHHB", segment[:6])
    if len(segment) != 6 + 3 * samples or not 2 <= precision <= 16:
        raise _corrupt("JPEG frame header inconsistent")
    return _Header(rows, columns, samples, precision, at)


def _checked_scan(header: _Header | None, marker: int, segment: bytes) -> _Header:
    """Refuse scans that are invalid for their JPEG process, since decoders handle them differently (T.81 B.2.3)."""
    if header is None:
        raise _corrupt("JPEG scan without a frame header")
    if len(segment) < 4 or len(segment) != 4 + 2 * segment[0]:
        raise _corrupt("JPEG scan header inconsistent")
    start, end = segment[-3], segment[-2]
    if marker in _SOF_SEQUENTIAL and (start, end) != (0, 63):
        raise _corrupt(f"a sequential JPEG scan of coefficients {start} to {end}")
    if marker == _SOF_LOSSLESS and not 1 <= start <= 7:
        raise _corrupt(f"lossless JPEG predictor {start}")
    return header


def _jpeg_2000_header(data: bytes) -> _Header:
    """The SIZ segment of a JPEG 2000 codestream (ITU-T T.800 A.5.1), bare or inside a JP2 file."""
    start = data.find(b"\xff\x4f\xff\x51") if data[4:8] == b"jP  " else 0
    if start < 0 or data[start : start + 4] != b"\xff\x4f\xff\x51" or len(data) < start + 4 + _SIZ.size + 3:
        raise _corrupt("no JPEG 2000 image size")
    length, _, x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y, samples = _SIZ.unpack_from(data, start + 4)
    components = data[start + 4 + _SIZ.size : start + 4 + length]
    if length != _SIZ.size + 3 * samples or len(components) != 3 * samples or not samples:
        raise _corrupt("JPEG 2000 image size inconsistent")
    if not (x0 < x1 and y0 < y1 and tile_w and tile_h and tile_x <= x0 and tile_y <= y0):
        raise _corrupt("JPEG 2000 image or tile size inconsistent")
    if -(-(x1 - tile_x) // tile_w) * -(-(y1 - tile_y) // tile_h) > _MAX_TILES:
        raise _corrupt("too many JPEG 2000 tiles")
    if any(step != 1 for index, step in enumerate(components) if index % 3):
        raise _corrupt("subsampled JPEG 2000 components")
    return _Header(y1 - y0, x1 - x0, samples, max(depth & 0x7F for depth in components[::3]) + 1)


def _check_rle(data: bytes, shape: FrameShape) -> None:
    """Check that the RLE header has one segment per byte of a pixel, in ascending order (PS3.5 G.5)."""
    if len(data) < 64:
        raise _corrupt("RLE header cut short")
    count, *offsets = struct.unpack("<16I", data[:64])
    if count != shape.samples * shape.bits_allocated // 8:
        raise _corrupt(f"{count} RLE segments")
    used = offsets[:count]
    if used[0] != 64 or any(low >= high for low, high in pairwise(used)):
        raise _corrupt("RLE segments out of order")
