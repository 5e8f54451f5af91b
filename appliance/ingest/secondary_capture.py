"""Convert a PNG or JPEG to a DICOM Secondary Capture (PS3.3 A.8) with highdicom."""

from __future__ import annotations

import hashlib
import struct
import uuid
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from appliance.core.errors import IngestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.core.domain import PictureForm

MAX_PIXELS: Final = 100_000_000
MAX_SIDE: Final = 0xFFFF  # Rows and Columns are unsigned shorts
_FORMATS: Final = ("PNG", "JPEG")
_SEXES: Final = ("M", "F", "O")
# The exceptions of Pillow for damaged files and damaged EXIF.
_PICTURE_ERRORS: Final = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError,
    struct.error,
)  # fmt: skip


def secondary_capture(data: bytes, form: PictureForm) -> bytes:
    """Convert to a complete DICOM file, MONOCHROME2 with 8 or 16 bits, upright by the EXIF orientation.

    The UIDs derive from file and form (2.25 + UUID, PS3.5 B.2), so that a repeated upload is the same image. Each file is a study of its
    own, so that two files never become images of one patient by accident.

    Raises:
        IngestError: ``ingest.unsupported_image``, ``ingest.absurd_dimensions``.
    """
    from highdicom.sc import ConversionTypeValues, SCImage

    pixels = grey_values(data)
    seed = hashlib.sha256(repr(form).encode() + b"\0" + data).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom warns about names of one component, which people do type
        image = SCImage(
            pixel_array=pixels, photometric_interpretation="MONOCHROME2", bits_allocated=pixels.itemsize * 8, coordinate_system="PATIENT",
            study_instance_uid=_uid(seed, "study"), series_instance_uid=_uid(seed, "series"), sop_instance_uid=_uid(seed, "instance"),
            series_number=1, instance_number=1, manufacturer="clinic-edge-appliance", patient_id=form.patient_id[:64] or None,
            patient_name=form.patient_name[:64] or None, patient_sex=form.patient_sex if form.patient_sex in _SEXES else None,
            patient_orientation=("L", "F"), specific_character_set="ISO_IR 192",
        )  # fmt: skip
    _describe(image, form, ConversionTypeValues)
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _describe(image: Any, form: PictureForm, conversion: Any) -> None:
    """Add the values of the form; a photographed film is RG/DF, an image exported from a workstation CR/WSD."""
    image.Modality = "RG" if form.photographed else "CR"
    image.ConversionType = (conversion.DF if form.photographed else conversion.WSD).value
    image.BodyPartExamined = "CHEST"
    image.PatientAge = form.patient_age
    if form.view:
        image.ViewPosition = form.view
        if form.view in ("LL", "RL"):
            image.PatientOrientation = ["A", "F"]
    clocks = ("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime", "SeriesDate", "SeriesTime")
    # With a time in the object a repeated upload would have another content.
    for name in (*clocks, "DateOfSecondaryCapture", "TimeOfSecondaryCapture"):
        if name in image:
            del image[name]
    for equipment in image.get("ContributingEquipmentSequence", []):
        del equipment.ContributionDateTime


def grey_values(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode a PNG or JPEG to grey values [rows, columns], upright; a 16-bit PNG keeps its depth.

    Raises:
        IngestError: ``ingest.unsupported_image``, ``ingest.absurd_dimensions``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about damaged EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE:
                raise IngestError("ingest.absurd_dimensions", f"{picture.width}x{picture.height}")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):
                return np.asarray(upright).astype(np.uint16)
            return np.asarray(_flatten(upright))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IngestError("ingest.absurd_dimensions", "too many pixels") from error
    except _PICTURE_ERRORS as error:
        is_truncated = isinstance(error, OSError) and "truncated" in str(error)  # Pillow has no exception of its own for it
        detail = "not enough memory" if isinstance(error, MemoryError) else "cut short" if is_truncated else "damaged"
        raise IngestError("ingest.unsupported_image", detail) from error


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert colour to grey by luminance; transparent pixels become black, like the border of a film."""
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L")
    return picture.convert("L")


def _uid(seed: bytes, role: str) -> str:
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(seed + role.encode()).digest()[:16]).int}"
