"""What the door refuses by looking at the header alone."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    MPEG2MPML,
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from appliance.core.errors import IngestError, PixelError
from appliance.imaging.codestream import COMPRESSED, FrameShape, check_frame, check_header
from appliance.imaging.pixel_checks import PixelCaps, check_structure
from tests.support.scans import dataset

CAPS = PixelCaps()


def code_of(ds: Dataset) -> str:
    with pytest.raises(IngestError) as caught:
        check_structure(ds)
    return caught.value.code


def test_plain_scan_passes() -> None:
    check_structure(dataset())
    check_structure(dataset(), CAPS)
    check_structure(dataset(NumberOfFrames=0))
    check_structure(dataset(NumberOfFrames=""))
    check_structure(dataset(HighBit=None))


ABSURD = "ingest.absurd_dimensions"
ATTRIBUTES = "ingest.pixel_attributes"
REPRESENTATION = "ingest.pixel_representation"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"PixelData": None}, "ingest.no_pixel_data"),
        ({"PixelData": b""}, "ingest.no_pixel_data"),
        ({"Rows": 65535, "Columns": 65535}, ABSURD),
        ({"Rows": 30000, "Columns": 30000}, ABSURD),
        ({"Rows": 0}, ABSURD),
        ({"Columns": 0}, ABSURD),
        ({"Rows": 20000}, ABSURD),
        ({"Rows": None}, ATTRIBUTES),
        ({"Columns": None}, ATTRIBUTES),
        ({"Rows": [64, 48]}, ATTRIBUTES),
        ({"Rows": 65}, "ingest.truncated"),
        ({"Rows": 60}, ATTRIBUTES),
        ({"Columns": 47}, ATTRIBUTES),
        ({"NumberOfFrames": 1_000_000}, ABSURD),
        ({"NumberOfFrames": -1}, ABSURD),
        ({"NumberOfFrames": 9_999}, ABSURD),
        ({"NumberOfFrames": 2}, "ingest.truncated"),
        ({"PixelRepresentation": 2}, REPRESENTATION),
        ({"PixelRepresentation": None}, REPRESENTATION),
        ({"BitsAllocated": 12}, ATTRIBUTES),
        ({"BitsAllocated": None}, ATTRIBUTES),
        ({"BitsAllocated": 64, "BitsStored": 64, "HighBit": 63}, ATTRIBUTES),
        ({"BitsStored": 17}, ATTRIBUTES),
        ({"BitsStored": 0}, ATTRIBUTES),
        ({"BitsStored": None}, ATTRIBUTES),
        ({"HighBit": 15}, ATTRIBUTES),
        ({"SamplesPerPixel": 3}, ATTRIBUTES),
        ({"SamplesPerPixel": 4}, ATTRIBUTES),
        ({"SamplesPerPixel": None}, ATTRIBUTES),
        ({"PhotometricInterpretation": "RGB"}, ATTRIBUTES),
        ({"PhotometricInterpretation": "CMYK"}, ATTRIBUTES),
        ({"PhotometricInterpretation": None}, ATTRIBUTES),
        ({"FloatPixelData": b"\0" * 16}, ATTRIBUTES),
        ({"transfer_syntax_uid": UID(MPEG2MPML)}, "ingest.unsupported_syntax"),
        ({"transfer_syntax_uid": UID("1.3.6.1.4.1.1")}, "ingest.unsupported_syntax"),
        ({"transfer_syntax_uid": UID(RLELossless)}, "pixel.corrupt"),
    ],
)
def test_refused(changes: dict[str, Any], code: str) -> None:
    assert code_of(dataset(**changes)) == code


def test_without_file_meta() -> None:
    ds = dataset()
    del ds.file_meta.TransferSyntaxUID
    assert code_of(ds) == "ingest.unsupported_syntax"
    del ds.file_meta
    assert code_of(ds) == "ingest.unsupported_syntax"


@pytest.mark.parametrize("padding", [1, 2, 40])
def test_little_padding_is_no_fault(padding: int) -> None:
    ds = dataset()
    ds.PixelData += b"\0" * padding
    check_structure(ds)


def test_damaged_values_are_refused() -> None:
    ds = dataset()
    ds[Tag("Rows")] = RawDataElement(Tag("Rows"), "US", 1, b"\x40", 0, False, True)
    assert code_of(ds) == ATTRIBUTES
    ds = dataset()
    ds[Tag("NumberOfFrames")] = RawDataElement(Tag("NumberOfFrames"), "IS", 2, b"1A", 0, False, True)
    assert code_of(ds) == ATTRIBUTES


def test_values_that_are_no_numbers() -> None:
    ds = dataset()
    ds.add_new("NumberOfFrames", "DS", "1.5")
    assert code_of(ds) == ATTRIBUTES
    ds = dataset()
    ds[Tag("PixelData")] = RawDataElement(Tag("PixelData"), "SQ", 4, b"abcd", 0, False, True)
    assert code_of(ds) in ("ingest.truncated", "ingest.no_pixel_data")


def test_float_pixels() -> None:
    values = np.zeros((64, 48), np.float32)
    ds = dataset(PixelData=None, FloatPixelData=values.tobytes(), BitsAllocated=32, BitsStored=None, HighBit=None, PixelRepresentation=None)
    check_structure(ds)
    ds.BitsAllocated = 16
    assert code_of(ds) == ATTRIBUTES
    ds.BitsAllocated = 32
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    assert code_of(ds) == "ingest.unsupported_syntax"


def test_single_bit_pixels() -> None:
    check_structure(dataset(BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\0" * (64 * 48 // 8)))
    one = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    assert code_of(dataset(transfer_syntax_uid=UID(RLELossless), PixelData=encapsulate([b"ab"]), **one)) == "ingest.unsupported_syntax"
    wide = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}
    assert code_of(dataset(transfer_syntax_uid=UID(JPEGLSLossless), PixelData=encapsulate([b"ab"]), **wide)) == "ingest.unsupported_syntax"


def test_colour_shares_chroma() -> None:
    colour = {"SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PlanarConfiguration": 0}
    check_structure(dataset(PhotometricInterpretation="YBR_FULL_422", PixelData=b"\0" * (64 * 48 * 2), **colour))
    check_structure(dataset(PhotometricInterpretation="YBR_FULL", PixelData=b"\0" * (64 * 48 * 3), **colour))


def jpeg_ls(rows: int = 64, columns: int = 48) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpegls_encode(np.zeros((rows, columns), np.uint16)))


def encapsulated(data: bytes, **changes: Any) -> Dataset:
    ds = dataset(transfer_syntax_uid=UID(JPEGLSLossless), PixelData=data, **changes)
    ds["PixelData"].is_undefined_length = True
    return ds


def test_encapsulation() -> None:
    frame = jpeg_ls()
    check_structure(encapsulated(encapsulate([frame])))
    check_structure(encapsulated(encapsulate([frame, frame]), NumberOfFrames=2))
    check_structure(encapsulated(encapsulate([frame], fragments_per_frame=3)))
    assert code_of(encapsulated(encapsulate([frame]), NumberOfFrames=2)) == ABSURD
    assert code_of(encapsulated(encapsulate([frame, frame, frame]), NumberOfFrames=2)) == ABSURD
    assert code_of(encapsulated(encapsulate([frame]), NumberOfFrames=5_000)) == ABSURD
    assert code_of(encapsulated(encapsulate([frame]), Rows=63)) == ABSURD
    assert code_of(encapsulated(encapsulate([frame])[:-30])) == "ingest.truncated"
    assert code_of(encapsulated(b"\xfe\xff\x00\xe0\0\0\0\0")) == ABSURD
    assert code_of(encapsulated(b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\0\0\0\0")) == "pixel.corrupt"
    assert code_of(encapsulated(b"not encapsulated")) == "pixel.corrupt"
    wrong_table = b"\xfe\xff\x00\xe0\x08\0\0\0" + struct.pack("<2I", 0, 3) + encapsulate([frame, frame], has_bot=False)[8:]
    assert code_of(encapsulated(wrong_table, NumberOfFrames=2)) == "pixel.corrupt"


SHAPE = FrameShape(64, 48, 1, 16)


def header_code(syntax: str, data: bytes, shape: FrameShape = SHAPE) -> str:
    with pytest.raises(PixelError) as caught:
        check_header(UID(syntax), data, shape)
    return caught.value.code


def sof(marker: int = 0xC0, rows: int = 64, columns: int = 48, precision: int = 8, samples: int = 1) -> bytes:
    length = 8 + 3 * samples
    return struct.pack(">BBHBHHB", 0xFF, marker, length, precision, rows, columns, samples) + b"\1\x11\0" * samples


def sos(start: int = 0, end: int = 63, samples: int = 1) -> bytes:
    return struct.pack(">BBHB", 0xFF, 0xDA, 6 + 2 * samples, samples) + b"\1\0" * samples + bytes((start, end, 0))


START = b"\xff\xd8"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        START,
        START + b"\0\0\0\0",
        START + sof(),
        START + sos(),
        START + b"\xff\xd9\0\0",
        START + b"\xff\xe0\0\1\0",
        START + b"\xff\xe0\xff\xff\0",
        START + sof(0xC2) + sos(),
        START + sof(0xC9) + sos(),
        START + b"\xff\xc0\0\5\0\0\0",
        START + sof() + b"\0" + sos(),
        START + sof(precision=99) + sos(),
        START + sof() + sos(end=0),
        START + sof(0xC3) + sos(0, 0),
        START + sof() + b"\xff\xda\0\3\1",
        START + sof() + b"\xff\xda\0\x0a\7" + b"\0" * 7,
    ],
)
def test_senseless_jpeg_headers(data: bytes) -> None:
    assert header_code(JPEGBaseline8Bit, data) == "pixel.corrupt"


def test_jpeg_headers() -> None:
    check_header(UID(JPEGBaseline8Bit), START + b"\xff\xff\xe0\0\4ab" + sof() + sos(), SHAPE)
    check_header(UID(JPEGLosslessSV1), START + sof(0xC3, precision=16) + sos(1, 0), SHAPE)
    assert header_code(JPEGBaseline8Bit, START + sof(rows=0) + sos()) == ABSURD
    assert header_code(JPEGBaseline8Bit, START + sof(samples=3) + sos(samples=3)) == ATTRIBUTES
    assert header_code(JPEGLosslessSV1, START + sof(0xC3, precision=16) + sos(1, 0), FrameShape(64, 48, 1, 8)) == ATTRIBUTES


def test_many_scans_are_refused() -> None:
    with pytest.raises(PixelError, match="too many scans"):
        check_frame(UID(JPEGBaseline8Bit), START + sof() + sos() * 20, SHAPE)


def siz(rows: int = 64, columns: int = 48, samples: int = 1, **changes: Any) -> bytes:
    values = {"length": 38 + 3 * samples, "x0": 0, "y0": 0, "tile_w": columns, "tile_h": rows, "depth": 15, "step": 1} | changes
    head = struct.pack(
        ">HHIIIIIIIIH", values["length"], 0, columns, rows, values["x0"], values["y0"], values["tile_w"], values["tile_h"], 0, 0, samples
    )
    return b"\xff\x4f\xff\x51" + head + bytes((values["depth"], values["step"], 1)) * samples


@pytest.mark.parametrize(
    "data",
    [
        b"",
        siz()[:30],
        siz(length=50),
        siz(samples=0),
        siz(x0=48),
        siz(tile_w=0),
        siz(step=2),
        siz(64, 48_000, tile_w=1),
        b"\0\0\0\x0cjP  \r\n\x87\n",
    ],
)
def test_senseless_jpeg_2000_headers(data: bytes) -> None:
    assert header_code(JPEG2000Lossless, data) == "pixel.corrupt"


def test_jpeg_2000_headers() -> None:
    check_header(UID(HTJ2KLossless), siz(), SHAPE)
    check_header(UID(JPEG2000Lossless), b"\0\0\0\x0cjP  \r\n\x87\n" + b"boxes" + siz(), SHAPE)
    check_header(UID(JPEG2000Lossless), siz(depth=0x8B), SHAPE)
    assert header_code(JPEG2000Lossless, siz(rows=65)) == ABSURD
    assert header_code(JPEG2000Lossless, siz(samples=3)) == ATTRIBUTES


@pytest.mark.parametrize("offsets", [(3, 64, 70, 80), (2, 60, 70), (2, 64, 64), (0,), (99,)])
def test_senseless_rle_headers(offsets: tuple[int, ...]) -> None:
    assert header_code(RLELossless, struct.pack(f"<{len(offsets)}I", *offsets).ljust(64, b"\0")) == "pixel.corrupt"
    assert header_code(RLELossless, b"\0" * 60) == "pixel.corrupt"


@given(syntax=st.sampled_from(sorted(COMPRESSED)), data=st.binary(max_size=200), start=st.sampled_from([b"", START, START + sof(), siz()]))
def test_any_bytes_are_refused_with_a_code_or_pass(syntax: str, data: bytes, start: bytes) -> None:
    try:
        check_frame(UID(syntax), start + data, SHAPE)
    except PixelError as error:
        assert error.code in ("pixel.corrupt", ABSURD, ATTRIBUTES)


@given(data=st.binary(max_size=300), frames=st.integers(1, 5), table=st.booleans())
def test_any_encapsulation_is_refused_with_a_code_or_passes(data: bytes, frames: int, table: bool) -> None:
    start = b"\xfe\xff\x00\xe0\0\0\0\0" if table else b""
    ds = encapsulated(start + data + b"\0", NumberOfFrames=frames)
    try:
        check_structure(ds)
    except IngestError as error:
        assert error.code in ("pixel.corrupt", "ingest.truncated", ABSURD, ATTRIBUTES)
