"""Small DICOM files made for tests: a plain CR by default, any attribute changed or dropped by keyword."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

if TYPE_CHECKING:
    from appliance.imaging.preprocessing import Geometry


def dataset(**changes: Any) -> FileDataset:
    """A valid 64 x 48 16-bit CR of a chest; ``None`` removes an attribute."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = changes.pop("transfer_syntax_uid", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    rows, columns = changes.get("Rows") or 64, changes.get("Columns") or 48
    ramp = (np.arange(64)[:, None] * 40 + np.arange(48)[None, :] * 11).astype("<u2")
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192", "SOPClassUID": ComputedRadiographyImageStorage, "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), "PatientID": "P-1", "PatientName": "测试^一",
        "PatientBirthDate": "20200101", "PatientSex": "F", "StudyDate": "20240101", "StudyTime": "080000", "AccessionNumber": "A1",
        "StudyID": "1", "SeriesNumber": 1, "InstanceNumber": 1, "Modality": "CR", "BodyPartExamined": "CHEST", "ViewPosition": "PA",
        "PatientAge": "004Y", "Rows": rows, "Columns": columns, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "PixelData": ramp.tobytes(),
    }  # fmt: skip
    for name, value in (values | changes).items():
        if value is not None:
            setattr(made, name, value)
    meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID", "1.2.3")
    return made


def encode(made: Dataset) -> bytes:
    """The dataset as a PS3.10 file."""
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def scan_bytes(**changes: Any) -> bytes:
    """A file of ``dataset(**changes)``."""
    return encode(dataset(**changes))


def to_image(geometry: Geometry, x: float, y: float) -> tuple[float, float]:
    """Map a point of a model's input to the image; a point of the padding lies outside the image."""
    return (x - geometry.pad_x) / geometry.scale_x, (y - geometry.pad_y) / geometry.scale_y
