"""Clinical types and states of the box: frozen dataclasses, DICOM keywords in snake_case. Nothing here reads a file or a database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from enum import Enum
from typing import Any, Literal

from appliance.core.applicable_accuracy import MIXED_AGES, Accuracy, AccuracyBasis
from appliance.core.correction import NOTHING_DECIDED, Correction
from model_sync.bundle import Interval

Status = Literal["analysed", "out_of_scope", "quality_rejected", "rejected", "failed"]
Point = tuple[float, float]
Rate = tuple[float, float, float]
"""A sensitivity or specificity with its 95 % confidence interval: value, low, high."""


class ScanState(str, Enum):
    """The state of an image as people see it; distinct in word and icon (requirement R37)."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    AI_READY = "ai_ready"
    REVIEWING = "reviewing"
    SIGNED = "signed"
    OVERRIDDEN = "overridden"
    QUALITY_REJECTED = "quality_rejected"
    OUT_OF_SCOPE = "out_of_scope"
    NOT_ANALYSED = "not_analysed"
    FAILED = "failed"


PENDING_STATES = (ScanState.WAITING, ScanState.QUEUED, ScanState.RUNNING)
ANALYSED_STATES = (ScanState.AI_READY, ScanState.REVIEWING, ScanState.SIGNED, ScanState.OVERRIDDEN)

# A study of several images shows the state that needs a person most.
STATE_URGENCY = (
    ScanState.FAILED,
    ScanState.NOT_ANALYSED,
    ScanState.RUNNING,
    ScanState.QUEUED,
    ScanState.WAITING,
    ScanState.QUALITY_REJECTED,
    ScanState.OUT_OF_SCOPE,  # before the analysed ones: a study with an image without a result must not look negative
    ScanState.AI_READY,
    ScanState.REVIEWING,
    ScanState.OVERRIDDEN,
    ScanState.SIGNED,
)


class JobState(str, Enum):
    """States of a job; a FAILED job is not retried unless a person asks for it."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class JobKind(str, Enum):
    """INFER runs a model on one image, VOLUME on a series; CHECK only decodes the pixels of an image that no model applies to."""

    INFER = "infer"
    VOLUME = "volume"
    CHECK = "check"


@dataclass(frozen=True)
class Note:
    """A coded remark on a result (assumption, caution, refusal); ``detail`` holds no patient data."""

    code: str
    detail: str = ""

    def to_json(self) -> dict[str, str]:
        """The note as stored, and as printed by ``appliance analyze --json``."""
        return {"code": self.code, "detail": self.detail}

    @classmethod
    def parse(cls, text: str | None) -> Note | None:
        """Parse a stored note; None for an empty column."""
        return cls(**json.loads(text)) if text else None


def notes_json(notes: Iterable[Note]) -> str:
    """Serialise notes for the database: a JSON list without duplicates."""
    return json.dumps([note.to_json() for note in dict.fromkeys(notes)], ensure_ascii=False)


def parse_notes(text: str) -> tuple[Note, ...]:
    """Parse what :func:`notes_json` wrote."""
    return tuple(Note(item["code"], item["detail"]) for item in json.loads(text))


@dataclass(frozen=True)
class Source:
    """Where an image came from: the interface, the account or AE title, and the file name as the person knows it."""

    kind: Literal["upload", "dimse", "cli"]
    actor: str
    name: str = ""


@dataclass(frozen=True)
class Patient:
    """The Patient Module as received, decoded to Unicode; every field may be empty."""

    patient_id: str = ""
    patient_name: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""

    @property
    def key(self) -> str:
        """Distinguishes patients under one Study Instance UID: ID, name without punctuation, and birth date."""
        name = "".join(char for char in self.patient_name.casefold() if char.isalnum())
        return f"{self.patient_id}|{name}|{self.patient_birth_date}"


@dataclass(frozen=True)
class PictureForm:
    """What a person entered about a PNG or JPEG; ``patient_age`` is a DICOM age (``034Y``), ``view`` PA, AP, LL or RL, or both empty.

    Without a view a frontal image is assumed, which the result states.
    """

    patient_id: str = ""
    patient_name: str = ""
    patient_sex: str = ""
    patient_age: str = ""
    view: str = ""
    photographed: bool = False


@dataclass(frozen=True)
class Scan:
    """The attributes of one image that the store indexes and that decide which models apply."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    patient: Patient
    modality: str = ""
    body_part_examined: str = ""
    view_position: str = ""
    patient_age_years: float | None = None
    study_date: str = ""
    study_time: str = ""
    accession_number: str = ""
    study_description: str = ""
    series_description: str = ""
    requested_procedure_priority: str = ""
    rows: int = 0
    columns: int = 0
    number_of_frames: int = 1
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class StoredImage:
    """Row ids of an image that is stored durably."""

    instance_id: int
    series_id: int
    study_id: int
    outcome: Literal["stored", "duplicate", "conflict"]


def rate_of(interval: Interval | None) -> Rate | None:
    """A measured fraction of a manifest as a finding stores it; None for None."""
    return (interval.value, interval.low, interval.high) if interval else None


@dataclass(frozen=True)
class Contour:
    """Closed polygons (x, y) around the area where a map of evidence is above ``level`` times its maximum on the body."""

    level: float
    polygons: tuple[tuple[Point, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The contour as it is stored, printed and sent to the viewer."""
        return {"level": self.level, "polygons": [[list(point) for point in polygon] for polygon in self.polygons]}

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Contour:
        """Read what :meth:`to_json` returns."""
        return cls(float(value["level"]), tuple(tuple((x, y) for x, y in polygon) for polygon in value["polygons"]))


@dataclass(frozen=True)
class Finding:
    """The result of one model for one label of one image (requirement R38).

    ``sensitivity`` and ``specificity`` are what the manifest states. They may be shown only with ``has_verified_accuracy``: they were
    measured on the weights that made the finding, at ``threshold``; and only with the patients that they were measured on.

    ``outline`` and ``inner_contours`` enclose the region that contributed most to the score; findings of older versions have the outline
    alone.

    Attributes:
        sensitivity: on all test images together.
        specificity: on all test images together.
        measured_on: what the test images are.
        accuracy: which figures apply to the patient; those of all test images only where it says so.
    """

    label: str
    code: str
    title_zh: str
    title_en: str
    score: float
    threshold: float
    positive: bool
    sensitivity: Rate
    specificity: Rate
    measured_on: str
    model: str
    model_version: str
    model_digest: str
    precision: str
    runtime: str
    peak: Point | None = None
    outline: tuple[tuple[Point, ...], ...] = ()
    heatmap_png: bytes = field(default=b"", repr=False)
    has_verified_accuracy: bool = False
    inner_contours: tuple[Contour, ...] = ()
    accuracy: Accuracy = MIXED_AGES
    id: int = 0
    job_id: int = 0

    @property
    def own_rates(self) -> tuple[Rate | None, Rate | None]:
        """Sensitivity and specificity that apply to the patient; None where none was measured for such patients, or none is verified."""
        if not self.has_verified_accuracy:
            return None, None
        if self.accuracy.basis is AccuracyBasis.MIXED:
            return self.sensitivity, self.specificity
        group = self.accuracy.group
        return (rate_of(group.sensitivity), rate_of(group.specificity)) if group else (None, None)

    def to_json(self) -> dict[str, Any]:
        """The finding as ``appliance analyze --json`` prints it (the heat map stays in the store).

        ``sensitivity`` and ``specificity`` are those that apply to the patient, or null; ``accuracy`` has the others, if they are verified.
        """
        sensitivity, specificity = self.own_rates
        names = ("label", "code", "score", "threshold", "positive", "model", "model_version", "model_digest", "precision", "runtime")
        return {name: getattr(self, name) for name in names} | {
            "has_verified_accuracy": self.has_verified_accuracy,
            "sensitivity": list(sensitivity) if sensitivity else None,
            "specificity": list(specificity) if specificity else None,
            "accuracy": self._accuracy_json() if self.has_verified_accuracy else None,
            "peak": list(self.peak) if self.peak else None,
            "outline": [[list(point) for point in polygon] for polygon in self.outline],
            "inner_contours": [contour.to_json() for contour in self.inner_contours],
        }

    def _accuracy_json(self) -> dict[str, Any]:
        whole = {"sensitivity": list(self.sensitivity), "specificity": list(self.specificity), "measured_on": self.measured_on}
        return self.accuracy.model_dump(mode="json") | {"all_test_images": whole}


Plane = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True)
class Measurement:
    """The volume of one label in a series."""

    label: str
    code: str
    title_zh: str
    title_en: str
    value: float
    unit: str = "ml"

    def to_json(self) -> dict[str, Any]:
        """The measurement as ``appliance analyze --json`` prints it."""
        return {"label": self.label, "code": self.code, "value": round(self.value, 2), "unit": self.unit}


@dataclass(frozen=True)
class VolumeResult:
    """The segmentation of one series by one model.

    Attributes:
        measurements: one per label of the model, in its order.
        pictures: one PNG per plane, with the outlines.
        mask: zlib-compressed uint8 [slices, rows, columns] in the pixel grid of the series.
        geometry: affine of the mask, image and frame of each slice, names of the classes; JSON types.
    """

    measurements: tuple[Measurement, ...]
    model: str
    model_version: str
    model_digest: str
    precision: str
    runtime: str
    pictures: dict[Plane, bytes] = field(default_factory=dict, repr=False)
    mask: bytes = field(default=b"", repr=False)
    geometry: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Job:
    """A job that is leased to a worker.

    Attributes:
        priority: above 0 is urgent.
        tried: whether an earlier attempt failed or was abandoned.
        correction: what a person decided to do with the image before the analysis.
        patient_age_years: of the patient when the image was taken; None where it is not known.
    """

    id: int
    kind: JobKind
    instance_id: int
    model_digest: str
    attempts: int
    lease_owner: str
    notes: tuple[Note, ...]
    scope_code: str = ""
    priority: int = 0
    tried: bool = False
    correction: Correction = NOTHING_DECIDED
    patient_age_years: float | None = None


@dataclass(frozen=True)
class JobResult:
    """The result of a job: the state of the image and its reason, findings, what ran, and the duration of each part in ms.

    ``correction`` is stored with the image where nobody has decided one.
    """

    state: ScanState
    reason: Note | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[Note, ...] = ()
    timing_ms: dict[str, float] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    volume: VolumeResult | None = None
    correction: Correction = NOTHING_DECIDED


def utc_now() -> str:
    """The current time as ISO 8601 in UTC with zone and milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


_AGE_UNIT_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def age_years(patient_age: str, birth_date: str, study_date: str) -> float | None:
    """Age in years from Patient's Age (VR AS, PS3.5 6.2: ``nnnD|W|M|Y``), else from the two dates; None where unknown."""
    if match := re.fullmatch(r"(\d{1,3})([DWMY])", patient_age.strip().upper()):
        return int(match[1]) * _AGE_UNIT_YEARS[match[2]]
    born, taken = _date(birth_date), _date(study_date)
    if born is None or taken is None or taken < born:
        return None
    return (taken - born).days / 365.25


def _date(value: str) -> date | None:
    """Parse a DICOM DA value; None where it is empty or invalid."""
    try:
        return datetime.strptime(value.strip(), "%Y%m%d").date()
    except ValueError:
        return None
