"""Read DICOM files that may break the rules of PS3.5, which real files do all the time."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final

import pydicom
from pydicom import config as pydicom_config
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filebase import DicomBytesIO

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

# What pydicom is known to raise on hostile bytes.
PARSE_ERRORS: Final = (
    InvalidDicomError, BytesLengthException, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError,
    NotImplementedError, OverflowError, RecursionError, AssertionError, struct.error, zlib.error,
)  # fmt: skip


def accept_invalid_values() -> None:
    """Make pydicom read values that are invalid for their VR without a warning, in this process.

    What matters is checked by name in :mod:`appliance.ingest.ingest`. pydicom converts values when they are accessed, so this is a
    setting of the process and not of one call.
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE


def read_dataset(data: bytes, *, stop_before_pixels: bool = False) -> FileDataset:
    """Parse a DICOM file (PS3.10) in memory.

    Args:
        data: the file.
        stop_before_pixels: leave out Pixel Data and everything after it.

    Raises:
        Exception: one of ``PARSE_ERRORS``.
    """
    accept_invalid_values()
    return pydicom.dcmread(DicomBytesIO(data), stop_before_pixels=stop_before_pixels)
