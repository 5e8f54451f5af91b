"""Repair files that break PS3.10 or PS3.5 A.4 but hold their complete pixels: their wrapping changes, their pixels do not.

The store gets the repaired file, so that every later reader can read it; a note says that it was repaired. What is not provably complete
stays as it is, and is refused with its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from appliance.core.domain import Note
from appliance.core.errors import IngestError
from appliance.imaging.codestream import COMPRESSED
from appliance.imaging.dicom_files import PARSE_ERRORS

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

REPAIRED_WRAPPING: Final = Note("caution.repaired", "preamble")
REPAIRED_PIXEL_DATA: Final = Note("caution.repaired", "pixel data")
# Pixel Data (7FE0,0010), OB, of undefined length, in Explicit VR Little Endian.
UNCLOSED_PIXEL_DATA: Final = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
PREAMBLE_BYTES: Final = 132
_LONG_VRS: Final = (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL", b"OV", b"SV", b"UV")
_ITEM: Final = b"\xfe\xff\x00\xe0"
_DELIMITER: Final = b"\xfe\xff\xdd\xe0\0\0\0\0"
_PREAMBLE: Final = b"\0" * 128 + b"DICM"
_END_MARKERS: Final = (b"\xff\xd9",)  # EOI of JPEG and JPEG-LS, EOC of JPEG 2000


def repair_wrapping(data: bytes) -> tuple[bytes, tuple[Note, ...]]:
    """Add the preamble, and the file meta group, to a file that begins with its first element (PS3.10 7.1).

    Args:
        data: the file as it came.

    Returns:
        The file, and a note where it was repaired; a file that is no DICOM is returned as it is.
    """
    if data[128:132] == b"DICM":
        return data, ()
    if data[:4] == b"\x02\0\0\0" and data[4:6] == b"UL":
        return _PREAMBLE + data, (REPAIRED_WRAPPING,)
    # The identifying group comes first in a data set without any meta group; its first elements have small numbers.
    if data[:2] == b"\x08\0" and data[2:4] in (b"\0\0", b"\x05\0", b"\x08\0", b"\x12\0", b"\x16\0", b"\x18\0"):
        syntax = ExplicitVRLittleEndian if data[4:6].isalpha() and data[4:6].isupper() else ImplicitVRLittleEndian
        return _PREAMBLE + _meta_group(syntax) + data, (REPAIRED_WRAPPING,)
    return data, ()


def repair_pixel_data(dataset: FileDataset, data: bytes) -> bytes | None:
    """Repair a compressed image that is not closed, or whose pixels are not compressed at all.

    Args:
        dataset: the parsed file.
        data: the file.

    Returns:
        The repaired file; None where there is nothing to repair, or where the pixels are not provably complete.
    """
    if str(dataset.file_meta.get("TransferSyntaxUID")) not in COMPRESSED:
        return None
    if "PixelData" not in dataset:
        return _closed(data)
    try:
        return _labelled_native(dataset, data)
    except PARSE_ERRORS:  # the checks of the header report what is wrong with it
        return None


def _closed(data: bytes) -> bytes | None:
    """Close the items of the last element with a sequence delimiter (PS3.5 A.4) in place of nothing, or of zeros."""
    start = data.rfind(UNCLOSED_PIXEL_DATA)
    position = start + len(UNCLOSED_PIXEL_DATA)
    last = b""
    while start >= 0 and data[position : position + 4] == _ITEM:
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        last = data[position + 8 : position + 8 + length]
        position += 8 + length
    is_whole = position <= len(data) and not data[position:].strip(b"\0")
    if start < 0 or not is_whole or not last.rstrip(b"\0").endswith(_END_MARKERS):
        return None
    return data[:position] + _DELIMITER


def _labelled_native(dataset: FileDataset, data: bytes) -> bytes | None:
    """State the true transfer syntax where Pixel Data has a length and it is exactly that of uncompressed pixels."""
    element = dataset.get_item("PixelData")
    if not isinstance(element, RawDataElement) or element.length == 0xFFFFFFFF or element.is_implicit_VR:
        return None
    samples, frames = int(dataset.get("SamplesPerPixel") or 1), int(dataset.get("NumberOfFrames") or 1)
    bits = int(dataset.Rows) * int(dataset.Columns) * samples * frames * int(dataset.BitsAllocated)
    size = -(-bits // 8)
    if element.length != size + size % 2:
        return None
    meta = FileMetaDataset()
    meta.update(dataset.file_meta)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta, enforce_standard=False)
    return data[:132] + buffer.getvalue() + data[meta_end(data) :]


def _meta_group(syntax: UID) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.FileMetaInformationVersion = b"\0\1"
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta, enforce_standard=False)
    return buffer.getvalue()


def meta_end(data: bytes) -> int:
    """The offset of the data set: the end of group 0002, which is always Explicit VR Little Endian (PS3.10 7.1).

    A group in another encoding counts as part of the data set. The data set decides whether two images are the same, so nothing of it
    may be hidden in the group.

    Raises:
        IngestError: an element of the group has undefined length, or extends beyond the file.
    """
    position = PREAMBLE_BYTES
    while data[position : position + 2] == b"\x02\x00":
        representation = data[position + 4 : position + 6]
        if not (representation.isalpha() and representation.isupper()):
            return PREAMBLE_BYTES
        if representation in _LONG_VRS:
            length, header = int.from_bytes(data[position + 8 : position + 12], "little"), 12
        else:
            length, header = int.from_bytes(data[position + 6 : position + 8], "little"), 8
        position += header + length
        if length == 0xFFFFFFFF or position >= len(data):
            raise IngestError("ingest.truncated" if length != 0xFFFFFFFF else "ingest.unreadable", "file meta group")
    return position
