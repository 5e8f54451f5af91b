"""Convert a PNG or JPEG to a DICOM Secondary Capture (PS3.3 A.8) with highdicom."""

from __future__ import annotations

import hashlib
import uuid
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from appliance.imaging.decoder_process import decode_picture

if TYPE_CHECKING:
    from appliance.core.domain import PictureForm

_SEXES: Final = ("M", "F", "O")


def secondary_capture(data: bytes, form: PictureForm) -> bytes:
    """Convert to a complete DICOM file, MONOCHROME2 with 8 or 16 bits, upright by the EXIF orientation.

    The UIDs derive from file and form (2.25 + UUID, PS3.5 B.2), so that a repeated upload is the same image. Each file is a study of its
    own, so that two files never become images of one patient by accident.

    Raises:
        IngestError: ``ingest.unsupported_image``, ``ingest.absurd_dimensions``, ``ingest.decoder``.
        MemoryError: the machine is short of memory.
    """
    from highdicom.sc import ConversionTypeValues, SCImage

    pixels = decode_picture(data)
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


def _uid(seed: bytes, role: str) -> str:
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(seed + role.encode()).digest()[:16]).int}"
