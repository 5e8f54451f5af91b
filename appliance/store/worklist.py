"""Queries over the store for the pages and the JSON of ``appliance analyze``; their results are frozen dataclasses."""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from pydantic import ValidationError

from appliance.core.applicable_accuracy import Accuracy, AccuracyBasis, accuracy_for
from appliance.core.clinical_terms import view_of
from appliance.core.correction import NOTHING_DECIDED, Correction
from appliance.core.domain import PENDING_STATES, STATE_URGENCY, Contour, Finding, JobKind, Note, ScanState, Status, parse_notes
from appliance.core.run_summary import RunSummary
from appliance.store.priority import Urgency
from appliance.store.series_jobs import CLAIMABLE
from appliance.store.store import Store
from appliance.store.study_summary import RECALLED, StudySummary, study_summaries
from appliance.store.taken_back import SupersededFinding, superseded
from model_sync.bundle import AgeRange, OperatingPoint

PAGE_SIZE: Final = 50


@dataclass(frozen=True)
class ImageGroup:
    """Images of one study with the same view and state.

    Attributes:
        view: as :func:`appliance.core.clinical_terms.view_of` names it; empty where it is unknown.
        state: of each of these images.
        images: how many there are.
    """

    view: str
    state: ScanState
    images: int


@dataclass(frozen=True)
class StudyRow:
    """One row of the worklist.

    Attributes:
        position: place in the queue of a queued study, 1 = next.
        positive: title (zh, en) and highest score of each label above its threshold.
        scored: whether any label was compared with a threshold.
        measured: title (zh, en) and volume (ml) of each label of a volume model.
        recalled: whether a model version that was withdrawn or rolled back made one of its findings.
        ran: what ran its models.
        pending: whether any of its images waits.
        urgent: who made it urgent.
        groups: its images by view and state, in the order of arrival; a study is never described by its worst image alone.
    """

    id: int
    revision: int
    patient_id: str
    patient_name: str
    patient_birth_date: str
    patient_sex: str
    patient_age_years: float | None
    study_date: str
    study_time: str
    accession_number: str
    study_description: str
    modalities: str
    received_at: str
    images: int
    state: ScanState
    reason: Note | None
    position: int | None
    positive: tuple[tuple[str, str, float], ...]
    scored: bool
    measured: tuple[tuple[str, str, float], ...]
    patient_mismatch: bool
    conflict: bool
    recalled: bool
    ran: tuple[RunSummary, ...] = ()
    pending: bool = False
    urgent: Urgency | None = None
    groups: tuple[ImageGroup, ...] = ()


@dataclass(frozen=True)
class JobView:
    """One job, for the study page and the JSON output."""

    id: int
    state: str
    outcome: ScanState | None
    reason: Note | None
    notes: tuple[Note, ...]
    model_digest: str
    timing_ms: dict[str, float]
    runtime: dict[str, Any]
    kind: str = "infer"


@dataclass(frozen=True)
class InstanceView:
    """One image with its jobs and findings."""

    id: int
    series_id: int
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    modality: str
    body_part_examined: str
    view_position: str
    rows: int
    columns: int
    number_of_frames: int
    bytes: int
    received_at: str
    source_kind: str
    conflict: bool
    state: ScanState
    reason: Note | None
    notes: tuple[Note, ...]
    ingest_ms: float
    jobs: tuple[JobView, ...]
    findings: tuple[Finding, ...]
    correction: Correction = NOTHING_DECIDED
    superseded: tuple[SupersededFinding, ...] = ()

    def recall(self, finding: Finding) -> Note | None:
        """Why the model version of this finding was withdrawn or rolled back; None where it was not."""
        notes = (note for job in self.jobs if job.id == finding.job_id for note in job.notes)
        return next((note for note in notes if note.code in RECALLED), None)

    @property
    def measured(self) -> bool:
        """Whether a volume model analysed the series of this image."""
        return any(job.kind == JobKind.VOLUME.value and job.outcome is ScanState.AI_READY for job in self.jobs)

    def ran(self, finding: Finding) -> RunSummary | None:
        """What ran the model that made this finding."""
        return next((RunSummary.of(job.runtime) for job in self.jobs if job.id == finding.job_id), None)

    @property
    def status(self) -> Status:
        """The state in the words of ``appliance analyze``; a pending image counts as failed, since it has no result."""
        words: dict[ScanState, Status] = {
            ScanState.AI_READY: "analysed",
            ScanState.OUT_OF_SCOPE: "out_of_scope",
            ScanState.QUALITY_REJECTED: "quality_rejected",
            ScanState.NOT_ANALYSED: "rejected",
        }
        return words.get(self.state, "failed")


@dataclass(frozen=True)
class StudyView:
    """A study with all of its images."""

    row: StudyRow
    study_instance_uid: str
    instances: tuple[InstanceView, ...]


class Worklist:
    """Queries over one store."""

    def __init__(self, store: Store) -> None:
        self._db = store.database

    def revision(self) -> int:
        """The number of the last change that a person can see; increases with each."""
        return self._db.number("SELECT value FROM meta WHERE key = 'revision'")

    def page(self, *, before: int | None = None, search: str = "", limit: int = PAGE_SIZE) -> list[StudyRow]:
        """Studies, newest first.

        Args:
            before: only studies with a smaller id (the last id of the page before).
            search: parts of the patient's name, ID or the accession number, in any order. Case, character width, blanks and the
                delimiters of DICOM names are ignored.
            limit: maximum number of rows.
        """
        condition, values = self._search_condition(search) if search.strip() else ("1", [])
        sql = f"SELECT * FROM studies WHERE {condition} AND id < ? ORDER BY id DESC LIMIT ?"  # noqa: S608
        return self._rows(self._db.query(sql, *values, 2**63 - 1 if before is None else before, limit))

    def _search_condition(self, search: str) -> tuple[str, list[str]]:
        """The SQL condition of a search and its values."""
        parts = [part for word in search.split() if (part := _folded(word)).strip(_SEPARATOR)]
        if not parts:  # only punctuation: searched literally
            pattern = "%" + search.strip().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            return "(patient_name LIKE ?1 ESCAPE '\\' OR patient_id LIKE ?1 ESCAPE '\\' OR accession_number LIKE ?1 ESCAPE '\\')", [pattern]

        def fits(*columns: str) -> bool:
            known = _SEPARATOR.join(map(_folded, columns))
            return all(part in known for part in parts)

        with self._db.snapshot() as connection:
            connection.create_function("fits", 3, fits, deterministic=True)
        return "fits(patient_name, patient_id, accession_number)", []

    def count(self) -> int:
        """How many studies are stored."""
        return self._db.number("SELECT count(*) FROM studies")

    def queue_length(self) -> int:
        """The number of queued and running jobs."""
        return self._db.number("SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')")

    def audit_entries(self) -> int:
        """How many entries the audit holds."""
        return self._db.number("SELECT max(seq) FROM audit")

    def study(self, study_id: int) -> StudyView:
        """One study with its images, in the order received; raises StoreError ``store.missing``."""
        row = self._db.require(f"study {study_id}", "SELECT * FROM studies WHERE id = ?", study_id)
        instances = self._db.query(f"{_INSTANCES} WHERE s.study_id = ? ORDER BY i.id", study_id)
        return StudyView(self._rows([row])[0], row["study_instance_uid"], tuple(self._instance(item) for item in instances))

    def instance(self, instance_id: int) -> InstanceView:
        """One image; raises StoreError ``store.missing``."""
        return self._instance(self._db.require(f"instance {instance_id}", f"{_INSTANCES} WHERE i.id = ?", instance_id))

    def study_of(self, instance_id: int) -> int:
        """The study an image belongs to; raises StoreError ``store.missing``."""
        sql = "SELECT s.study_id FROM instances i JOIN series s ON s.id = i.series_id WHERE i.id = ?"
        return int(self._db.require(f"instance {instance_id}", sql, instance_id)["study_id"])

    def study_of_finding(self, finding_id: int) -> int:
        """The study a finding belongs to; raises StoreError ``store.missing``."""
        sql = "SELECT instance_id FROM findings WHERE id = ?"
        return self.study_of(self._db.require(f"finding {finding_id}", sql, finding_id)["instance_id"])

    def heatmap(self, finding_id: int) -> bytes:
        """The heat map of a finding: 8-bit grey PNG that covers exactly the image; raises StoreError ``store.missing``."""
        sql = "SELECT heatmap_png FROM findings WHERE id = ? AND length(heatmap_png) > 0"
        return bytes(self._db.require(f"heat map {finding_id}", sql, finding_id)["heatmap_png"])

    def rejections(self, limit: int = PAGE_SIZE) -> list[dict[str, Any]]:
        """Files that were refused, newest first: at, source_kind, source_actor, name, bytes, code, detail."""
        return [dict(row) for row in self._db.query("SELECT * FROM rejections ORDER BY id DESC LIMIT ?", limit)]

    # -- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, studies: list[sqlite3.Row]) -> list[StudyRow]:
        ids = json.dumps([row["id"] for row in studies])
        instances = self._db.query(
            "SELECT s.study_id, i.id, i.state, i.reason, i.conflict, i.view_position, s.modality"
            " FROM instances i JOIN series s ON s.id = i.series_id"
            " WHERE s.study_id IN (SELECT value FROM json_each(?)) ORDER BY i.id",
            ids,
        )
        positive = self._db.query(
            "SELECT s.study_id, f.title_zh, f.title_en, max(f.score) AS score FROM findings f JOIN instances i ON i.id = f.instance_id"
            " JOIN series s ON s.id = i.series_id WHERE f.positive = 1 AND s.study_id IN (SELECT value FROM json_each(?))"
            " GROUP BY s.study_id, f.label, f.title_zh, f.title_en ORDER BY score DESC",
            ids,
        )
        summaries = study_summaries(self._db, ids)
        queue = self._queue_positions() if any(row["state"] == ScanState.QUEUED.value for row in instances) else {}
        return [
            _study_row(
                row,
                [i for i in instances if i["study_id"] == row["id"]],
                [p for p in positive if p["study_id"] == row["id"]],
                queue,
                summaries.get(row["id"], StudySummary()),
            )
            for row in studies
        ]

    def _queue_positions(self) -> dict[int, int]:
        """Place in the queue of every queued image, 1 = next."""
        rows = self._db.query(
            f"SELECT instance_id FROM jobs WHERE state = 'queued' AND {CLAIMABLE} ORDER BY priority DESC, id LIMIT 10000"  # noqa: S608
        )
        return {row["instance_id"]: place for place, row in reversed(list(enumerate(rows, start=1)))}

    def _instance(self, row: sqlite3.Row) -> InstanceView:
        jobs = self._db.query("SELECT * FROM jobs WHERE instance_id = ? OR series_id = ? ORDER BY id", row["id"], row["series_id"])
        findings = self._db.query(
            "SELECT f.*, m.manifest FROM findings f LEFT JOIN models m ON m.digest = f.model_digest AND f.accuracy IS NULL"
            " WHERE f.instance_id = ? ORDER BY f.id",
            row["id"],
        )
        same = (
            "id", "series_id", "series_instance_uid", "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "modality",
            "body_part_examined", "view_position", "number_of_frames", "bytes", "received_at", "source_kind", "ingest_ms",
        )  # fmt: skip
        return InstanceView(
            **{name: row[name] for name in same},
            rows=row["image_rows"],
            columns=row["image_columns"],
            conflict=bool(row["conflict"]),
            state=ScanState(row["state"]),
            reason=Note.parse(row["reason"]),
            notes=(*parse_notes(row["notes"]), *((Note("ingest.conflict"),) if row["conflict"] else ())),
            jobs=tuple(_job_view(job) for job in jobs),
            correction=Correction.parse(row["correction"]),
            findings=tuple(_finding(item, row["patient_age_years"]) for item in findings),
            superseded=superseded(self._db, row["id"]),
        )


# Separates texts that are searched together; no folded text contains it.
_SEPARATOR: Final = "|"


@lru_cache(maxsize=1 << 16)
def _folded(text: str) -> str:
    """Normalise a text for searches: NFKC, one case, letters and digits only; the groups of a name stay separate."""
    return _SEPARATOR.join("".join(filter(str.isalnum, unicodedata.normalize("NFKC", group).casefold())) for group in text.split("="))


_INSTANCES: Final = "SELECT i.*, s.series_instance_uid FROM instances i JOIN series s ON s.id = i.series_id"


def _study_row(
    row: sqlite3.Row, instances: list[sqlite3.Row], positive: list[sqlite3.Row], queue: dict[int, int], summary: StudySummary
) -> StudyRow:
    worst = min(instances, key=lambda item: STATE_URGENCY.index(ScanState(item["state"])))
    places = [queue[item["id"]] for item in instances if item["id"] in queue]
    groups = Counter((view_of(item["view_position"]), ScanState(item["state"])) for item in instances)
    same = (
        "id", "revision", "patient_id", "patient_name", "patient_birth_date", "patient_sex", "patient_age_years", "study_date",
        "study_time", "accession_number", "study_description", "received_at",
    )  # fmt: skip
    return StudyRow(
        **{name: row[name] for name in same},
        modalities=", ".join(sorted({item["modality"] for item in instances if item["modality"]})),
        images=len(instances),
        state=ScanState(worst["state"]),
        reason=Note.parse(worst["reason"]),
        position=min(places, default=None),
        positive=tuple((item["title_zh"], item["title_en"], item["score"]) for item in positive),
        patient_mismatch=bool(row["patient_mismatch"]),
        conflict=any(item["conflict"] for item in instances),
        **vars(summary),
        pending=any(ScanState(item["state"]) in PENDING_STATES for item in instances),
        urgent=Urgency.of(row["urgent"]),
        groups=tuple(ImageGroup(view, state, count) for (view, state), count in groups.items()),
    )


def _job_view(row: sqlite3.Row) -> JobView:
    return JobView(
        **{name: row[name] for name in ("id", "state", "model_digest", "kind")},
        outcome=ScanState(row["outcome"]) if row["outcome"] else None,
        reason=Note.parse(row["reason"]),
        notes=parse_notes(row["notes"]),
        timing_ms=json.loads(row["timing_ms"] or "{}"),
        runtime=json.loads(row["runtime"] or "{}"),
    )


def _finding(row: sqlite3.Row, age_years: float | None) -> Finding:
    same = (
        "id", "job_id", "label", "code", "title_zh", "title_en", "score", "threshold", "measured_on", "model", "model_version",
        "model_digest", "precision", "runtime",
    )  # fmt: skip
    outline = tuple(tuple((x, y) for x, y in polygon) for polygon in json.loads(row["outline"]))
    return Finding(
        **{name: row[name] for name in same},
        positive=bool(row["positive"]),
        has_verified_accuracy=bool(row["has_verified_accuracy"]),
        sensitivity=tuple(json.loads(row["sensitivity"])),
        specificity=tuple(json.loads(row["specificity"])),
        peak=tuple(json.loads(row["peak"])) if row["peak"] else None,
        outline=outline,
        inner_contours=tuple(map(Contour.parse, json.loads(row["inner_contours"]))),
        accuracy=_accuracy(row, age_years),
    )


def _accuracy(row: sqlite3.Row, age_years: float | None) -> Accuracy:
    """The accuracy as stored; for a finding of an earlier version as the model's manifest and the patient's age determine it."""
    if row["accuracy"]:
        return Accuracy.model_validate_json(row["accuracy"])
    manifest = json.loads(row["manifest"]) if row["manifest"] else {"operating_points": []}
    point = next((item for item in manifest["operating_points"] if item["label"] == row["label"]), None)
    if point is None:
        return Accuracy(basis=AccuracyBasis.NOT_MEASURED)
    try:
        return accuracy_for(OperatingPoint.model_validate(point), AgeRange.model_validate(manifest["applies_to"]["age"]), age_years)
    except ValidationError:  # a manifest of a newer format
        return Accuracy(basis=AccuracyBasis.NOT_MEASURED)
