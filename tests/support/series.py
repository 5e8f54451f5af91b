"""Series made for tests: slices of a head that looks different from every side, in any place and orientation of the patient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from tests.support.scans import dataset

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
OBLIQUE = (
    (math.cos(0.3), math.sin(0.3) * math.cos(0.2), math.sin(0.3) * math.sin(0.2)),
    (-math.sin(0.3), math.cos(0.3) * math.cos(0.2), math.cos(0.3) * math.sin(0.2)),
)


def head(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The phantom at LPS millimetres [..., 3]: a slope in each direction inside a ball, and a bright mark at the left front, high up."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    inside = x**2 + y**2 + z**2 < 40**2
    mark = (x - 18) ** 2 + (y + 14) ** 2 + (z - 10) ** 2 < 8**2
    return np.where(mark, 900, np.where(inside, 300 + 3 * x + 2 * y + z, 0))


def slices(
    count: int = 20, *, rows: int = 24, columns: int = 28, spacing: tuple[float, float] = (3.0, 2.5), apart: float = 3.0,
    orientation: Sequence[Sequence[float]] = AXIAL, shear: Sequence[float] = (0.0, 0.0, 0.0), middle: Sequence[float] = (0.0, 0.0, 0.0),
    **attributes: Any,
) -> list[FileDataset]:  # fmt: skip
    """``count`` MR slices around ``middle``; ``shear`` (mm) is added to the place of each slice for every step along the normal."""
    row, column = np.array(orientation[0]), np.array(orientation[1])
    step = np.cross(row, column) * apart + np.array(shear)
    series, frame = generate_uid(), generate_uid()
    made = []
    for number in range(count):
        centre = np.array(middle) + step * (number - (count - 1) / 2)
        origin = centre - row * spacing[1] * (columns - 1) / 2 - column * spacing[0] * (rows - 1) / 2
        at = origin + np.arange(rows)[:, None, None] * column * spacing[0] + np.arange(columns)[None, :, None] * row * spacing[1]
        values = {
            "SOPClassUID": MRImageStorage, "Modality": "MR", "BodyPartExamined": "HEAD", "ViewPosition": None, "PatientAge": "030Y",
            "SeriesInstanceUID": series, "StudyInstanceUID": series, "FrameOfReferenceUID": frame, "Rows": rows, "Columns": columns,
            "ImagePositionPatient": [round(float(value), 4) for value in origin],
            "ImageOrientationPatient": [float(value) for value in (*row, *column)], "PixelSpacing": list(spacing),
            "InstanceNumber": 99 - number, "ImageType": ["ORIGINAL", "PRIMARY", "M"], "PixelData": head(at).round().astype("<u2").tobytes(),
        } | attributes  # fmt: skip
        made.append(dataset(**values))
    return made


def ct(made: list[FileDataset], slope: float = 1.0, intercept: float = -1024.0) -> list[FileDataset]:
    """The same slices as CT, in HU by rescale."""
    for one in made:
        one.SOPClassUID, one.Modality, one.ImageType = CTImageStorage, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = slope, intercept, "HU"
    return made


def enhanced(made: list[FileDataset]) -> FileDataset:
    """The same slices as frames of one Enhanced MR image, each with its functional groups (PS3.3 C.7.6.16)."""
    first = made[0]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    image = copy.deepcopy(first)
    image.file_meta = meta
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del image[keyword]
    image.SOPClassUID, image.SOPInstanceUID = EnhancedMRImageStorage, generate_uid()
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.NumberOfFrames = len(made)
    image.PixelData = b"".join(one.PixelData for one in made)
    image.SharedFunctionalGroupsSequence = Items([
        _group(PlaneOrientationSequence={"ImageOrientationPatient": list(first.ImageOrientationPatient)},
               PixelMeasuresSequence={"PixelSpacing": list(first.PixelSpacing)}),
    ])  # fmt: skip
    image.PerFrameFunctionalGroupsSequence = Items(
        [_group(PlanePositionSequence={"ImagePositionPatient": list(one.ImagePositionPatient)}) for one in made]
    )
    return image


def _group(**groups: dict[str, Any]) -> Dataset:
    item = Dataset()
    for keyword, values in groups.items():
        inner = Dataset()
        for name, value in values.items():
            setattr(inner, name, value)
        setattr(item, keyword, Items([inner]))
    return item


def sources(made: Sequence[FileDataset]) -> list[Callable[[], FileDataset]]:
    """As ``appliance.imaging.volumes.volume.read_series`` takes them."""
    return [lambda one=one: one for one in made]
