"""Describe an image: the attributes of its header that the store indexes and that decide which models apply.

What senders write is taken as it is where it is right, and otherwise as its bytes and its other attributes show; each such case leaves
a note. A value that is doubtful is flagged and not guessed.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue

from appliance.core.clinical_terms import LATERAL, body_parts_of, is_human, view_of
from appliance.core.domain import Note, Patient, Scan, age_years
from appliance.core.errors import IngestError
from appliance.imaging.orientation import orientation_of
from appliance.ingest.text_encoding import decode_text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset

MAX_TEXT_BYTES: Final = 65_536
# PS3.5 9.1 allows 64 characters; some senders exceed that a little, and every peer accepts such UIDs.
_MAX_UID_CHARS, _LONGEST_UID_CHARS = 64, 128
_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
_PRIORITY: Final = 0x00401003
_PRIORITIES: Final = ("STAT", "HIGH", "ROUTINE", "MEDIUM", "LOW")
_MAX_SHORT_BYTES: Final = 64  # a SH of 16 characters in any character set
_DESCRIPTIONS: Final = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription", "StudyDescription")


def describe(dataset: FileDataset, notes: tuple[Note, ...] = ()) -> Scan:
    """Extract the attributes that the store indexes and that decide which models apply.

    An image without Study or Series Instance UID gets UIDs derived from its own (2.25 + UUID, PS3.5 B.2) and a note about it, so that it
    is neither lost nor assigned to another study.

    Args:
        dataset: the parsed file.
        notes: what is known about it already.

    Raises:
        IngestError: no SOP Instance UID, an invalid UID, or no Transfer Syntax UID.
    """
    return _Header(dataset, notes).scan()


class _Header:
    """The header of one image, and what there is to say about it."""

    def __init__(self, dataset: FileDataset, notes: tuple[Note, ...]) -> None:
        self._ds = dataset
        self._notes = dict.fromkeys(notes)  # in order, each once

    def scan(self) -> Scan:
        """Describe the image."""
        ds, meta = self._ds, self._ds.file_meta
        if not meta.get("TransferSyntaxUID"):
            raise IngestError("ingest.unreadable", "no Transfer Syntax UID")
        frames = self.text("NumberOfFrames") or "1"
        if not re.fullmatch(r"[+]?\d{1,9}", frames):
            raise IngestError("ingest.pixel_attributes", "NumberOfFrames is no integer")
        transfer_syntax = self._uid("TransferSyntaxUID", meta.TransferSyntaxUID)
        instance = self._uid("SOPInstanceUID", ds.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID"))
        study, series = (self._uid_or_derived(name, instance) for name in ("StudyInstanceUID", "SeriesInstanceUID"))
        return Scan(
            study_instance_uid=study,
            series_instance_uid=series,
            sop_instance_uid=instance,
            sop_class_uid=self._uid("SOPClassUID", ds.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")),
            transfer_syntax_uid=transfer_syntax,
            patient=Patient(*(self.text(name) for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"))),
            modality=self.text("Modality").upper(),
            body_part_examined=self._body_part(),
            view_position=self._view(),
            patient_age_years=age_years(*(self.text(name) for name in ("PatientAge", "PatientBirthDate", "StudyDate"))),
            study_date=self.text("StudyDate"),
            study_time=self.text("StudyTime"),
            accession_number=self.text("AccessionNumber"),
            study_description=self.text("StudyDescription"),
            series_description=self.text("SeriesDescription"),
            requested_procedure_priority=_priority(ds),
            rows=int(ds.get("Rows") or 0),
            columns=int(ds.get("Columns") or 0),
            number_of_frames=int(frames),
            notes=self._complete_notes(),  # the last: the others add to them
        )

    def text(self, keyword: str, item: Dataset | None = None) -> str:
        """A text value as one line of Unicode without control characters; empty where absent.

        Args:
            keyword: of the attribute.
            item: the item of a sequence that holds it; default the data set.

        Raises:
            IngestError: the value is too long (splitting it would take minutes).
        """
        dataset = self._ds if item is None else item
        if keyword not in dataset:
            return ""
        raw = dataset.get_item(keyword)
        if isinstance(raw, RawDataElement) and isinstance(raw.value, bytes):
            if len(raw.value) > MAX_TEXT_BYTES:
                raise IngestError("ingest.unreadable", f"{keyword} too long")
            text = self._decoded(keyword, raw.value, dataset).replace("\\", " ")
        else:
            value = dataset.get(keyword)
            values = [str(part) for part in value] if isinstance(value, (list, MultiValue)) else [str(value)]
            text = "" if value is None else " ".join(values)
        # Chinese names contain the ideographic space, which Python does not count as printable.
        return "".join(char for char in text if char.isprintable() or char == "\u3000").strip()[:256]

    def _decoded(self, keyword: str, value: bytes, dataset: Dataset) -> str:
        declared = dataset.get("SpecificCharacterSet") or self._ds.get("SpecificCharacterSet") or ()
        decoded = decode_text(value, [declared] if isinstance(declared, str) else [str(name or "") for name in declared])
        if decoded.encoding:
            self._add("caution.text_encoding", decoded.encoding)
        if decoded.is_doubtful:
            self._add("caution.text_doubtful", keyword)
        return decoded.text

    def _add(self, code: str, detail: str = "") -> None:
        self._notes[Note(code, detail)] = None

    def _uid(self, keyword: str, value: object) -> str:
        """Validate a UID by PS3.5 9.1: digits and dots, at most 64 characters; a longer one is accepted with a caution."""
        text = str(value or "").strip("\0 ")
        if not text:
            raise IngestError("ingest.missing_uid", keyword)
        if len(text) > _LONGEST_UID_CHARS or not _UID.fullmatch(text):
            raise IngestError("ingest.invalid_uid", keyword)
        if len(text) > _MAX_UID_CHARS:
            self._add("caution.long_uid", f"{keyword}, {len(text)}")
        return text

    def _uid_or_derived(self, keyword: str, instance: str) -> str:
        if self._ds.get(keyword):
            return self._uid(keyword, self._ds.get(keyword))
        self._add("caution.missing_uid", keyword)
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{keyword} {instance}').int}"

    def _body_part(self) -> str:
        """Body Part Examined, else the Anatomic Region Sequence, else the parts that a description names; in capitals."""
        stated = self.text("BodyPartExamined").upper() or self._coded("AnatomicRegionSequence", "cid4031").upper()
        described = next(filter(None, (body_parts_of(self.text(name)) for name in _DESCRIPTIONS)), frozenset[str]())
        if not stated and described:
            stated = " ".join(sorted(described))
            self._add("assume.body_part_described", stated)
        elif described and body_parts_of(stated) and not described & body_parts_of(stated):
            self._add("caution.body_part_conflict", ", ".join(sorted(described)))
        return stated

    def _view(self) -> str:
        """View Position; else the View Code Sequence, Patient Orientation, or a description."""
        stated = self.text("ViewPosition").upper() or view_of(self._coded("ViewCodeSequence", "cid4010"))
        if stated:
            return stated
        directions = {value[:1] for value in self.text("PatientOrientation").upper().split()}
        if directions & {"A", "P"}:
            return LATERAL
        *of_series, of_study = (view_of(self.text(name)) for name in _DESCRIPTIONS)
        # A study has frontal and lateral images; what its description says of all of them is a caution only where it excludes a model.
        return next(filter(None, of_series), "") or ("" if of_study in ("PA", "AP", "FRONTAL") else of_study)

    def _coded(self, keyword: str, context_group: str) -> str:
        """The meaning of the first code of a sequence: that of DICOM's context group (PS3.16), else as the sender wrote it."""
        items: Sequence[Dataset] = self._ds.get(keyword) or []
        if not items:
            return ""
        from pydicom.sr.codedict import codes  # takes a second, and few images have these sequences without the plain attribute

        value = self.text("CodeValue", items[0])
        group = getattr(codes, context_group)
        known = next((code.meaning for name in group.dir() if value in ((code := getattr(group, name)).value, *_former(code))), "")
        return known or self.text("CodeMeaning", items[0])

    def _complete_notes(self) -> tuple[Note, ...]:
        """All notes: also what no model is made for (animals, test images, images that are not for people to look at), and turns."""
        items: Sequence[Dataset] = self._ds.get("PatientSpeciesCodeSequence") or []
        code = self.text("CodeValue", items[0]) if items else ""
        is_quadruped = self.text("AnatomicalOrientationType").upper() == "QUADRUPED"
        if is_quadruped or not is_human(self.text("PatientSpeciesDescription"), code):
            self._add("scope.species")
        if self.text("QualityControlImage").upper() == "YES":
            self._add("scope.quality_control")
        if self.text("PresentationIntentType").upper() == "FOR PROCESSING":
            self._add("scope.for_processing")
        kind = self.text("ConversionType").upper()  # PS3.3 C.8.6.1: digitised film and captures are less exact than the original
        if kind in ("DF", "SI", "SD", "DV", "WSD"):
            self._add("caution.photograph", kind)
        orientation = orientation_of(self._ds)
        if not orientation.is_upright:
            self._notes[orientation.to_note()] = None
        return tuple(self._notes)


def _former(code: object) -> tuple[str, ...]:
    """The identifier that a SNOMED CT concept had before (SRT), as older devices write it."""
    from pydicom.sr._snomed_dict import mapping

    former = mapping["SCT"].get(getattr(code, "value", ""))
    return (former,) if former else ()


def _priority(dataset: Dataset) -> str:
    """Requested Procedure Priority (0040,1003) as one of its defined terms (PS3.3 Table C.4-11); empty for anything else.

    The attribute belongs to the modality worklist: no image IOD contains it, nor does the Request Attributes Macro (PS3.3 10.6). Modalities
    that copy it put it at the top level of the image, as a Standard Extended SOP Class may (PS3.2). Priority (0000,0700) of a C-STORE
    request concerns the transfer (PS3.7 9.1.1.1), not the patient. An unknown value is ignored.
    """
    item = dataset.get_item(_PRIORITY) if _PRIORITY in dataset else None
    value = item.value if item is not None else None
    if not isinstance(value, (bytes, str)) or len(value) > _MAX_SHORT_BYTES:
        return ""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    term = text.strip(" \0").upper()
    return term if term in _PRIORITIES else ""
