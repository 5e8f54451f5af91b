"""Planning: which model analyses which image or series, and the state of an image that follows from its jobs.

There is one job per (image, model), or per (series, model) for a volume model, so that planning twice adds nothing.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Final

from appliance.core.applicability import applies, applies_to_series, is_volume_model
from appliance.core.domain import JobKind, JobState, Note, Patient, Scan, ScanState, notes_json, parse_notes, utc_now
from appliance.core.settings import Settings
from appliance.store import series_jobs
from appliance.store.database import Database
from model_sync.bundle import Manifest

# Of several jobs on one image, the outcome that needs a person most decides the state of the image.
_WORST_FIRST = (ScanState.FAILED, ScanState.NOT_ANALYSED, ScanState.QUALITY_REJECTED, ScanState.AI_READY, ScanState.OUT_OF_SCOPE)

# A series that grew after it was planned as a volume gets this many times the idle time.
_GROWING_FACTOR: Final = 6
_IDLE: Final = (
    "SELECT id FROM series s WHERE open = 1 AND (last_received_at > ?1 OR last_received_at < ?2"
    " - ?3 * EXISTS (SELECT 1 FROM jobs j WHERE j.series_id = s.id))"
    " AND (NOT ?4 OR EXISTS (SELECT 1 FROM studies t WHERE t.id = s.study_id AND t.urgent IS NOT NULL))"
)


class Planner:
    """Creates the jobs of a series and derives the states of its images."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._manifests: dict[str, Manifest] = {}

    def close_series(self, series_ids: Iterable[int]) -> int:
        """Plan the jobs of series that are complete. Returns the number of jobs queued. Safe to repeat.

        Every active model whose manifest applies gets one job per image, or per series for a volume model. An image that no model
        applies to gets a job that checks its pixels, after which it is OUT_OF_SCOPE with the reason.
        """
        with self._database.transaction() as tx:
            return self._close(tx, series_ids)

    def _close(self, tx: sqlite3.Connection, series_ids: Iterable[int]) -> int:
        planned, manifests = 0, self._active_manifests(tx)
        for series_id in series_ids:
            tx.execute("UPDATE series SET open = 0 WHERE id = ?", (series_id,))
            waiting = [row for row in series_jobs.images_of(tx, series_id) if row["state"] == ScanState.WAITING.value]
            refusals = self._plan_volumes(tx, series_id, manifests) if waiting else {}
            planned += sum(refusal is None for refusal in refusals.values())
            for row in waiting:
                planned += self._plan(tx, row, manifests, refusals)
            series_jobs.inherit_urgency(tx, series_id)
            if None in refusals.values():
                self.update_state(tx, series_jobs.images_of(tx, series_id)[0]["id"])  # images that were analysed before wait again too
        return planned

    def close_single_images(self, study_id: int) -> int:
        """Plan the open series of a study at once, except those that a volume model applies to.

        A volume model would analyse an incomplete series as if it were complete, with measurements that look like any other. Such a
        series is planned as usual: when its sender closes the association or has been idle.
        """
        with self._database.transaction() as tx:
            rules = [manifest.applies_to for manifest in self._active_manifests(tx).values() if is_volume_model(manifest)]
            rows = tx.execute("SELECT id FROM series WHERE study_id = ? AND open = 1", (study_id,)).fetchall()
            scans = {row["id"]: [_scan_of(image) for image in series_jobs.images_of(tx, row["id"])] for row in rows}
            volumes = {
                series_id
                for series_id, images in scans.items()
                if any(applies(rule, scan, frames=True).refusal is None for rule in rules for scan in images)
            }
            return self._close(tx, sorted(set(scans) - volumes))

    def close_idle_series(self, *, urgent: bool = False) -> int:
        """Plan every open series that received nothing for ``series_idle_s``. Returns the number of jobs queued.

        A series that was planned as a volume and grew after that has a slow sender. It gets ``_GROWING_FACTOR`` times as long, else a
        series that arrives slice by slice would be analysed from the start after each slice. With ``urgent`` only the series of urgent
        studies are planned.
        """
        idle, now = self._settings.series_idle_s, time.time()
        values = (now + 1, now - idle, idle * (_GROWING_FACTOR - 1), urgent)
        if self._database.one(_IDLE, *values) is None:
            return 0
        with self._database.transaction() as tx:  # queried again: another image may have arrived in between
            return self._close(tx, [row["id"] for row in tx.execute(_IDLE, values).fetchall()])

    def replan_unanalysed(self, tx: sqlite3.Connection, digest: str) -> None:
        """After a model was activated: plan again the images that no model applied to (:meth:`close_idle_series` does it).

        An image whose own model was withdrawn is planned again only when the new model applies to it.
        """
        activated = self._active_manifests(tx)[digest]
        rows = tx.execute("SELECT * FROM jobs WHERE scope_code = 'scope.no_model' AND state IN ('done', 'queued')").fetchall()
        for row in rows:
            image = tx.execute("SELECT * FROM instances WHERE id = ?", (row["instance_id"],)).fetchone()
            verdict = applies(activated.applies_to, _scan_of(image), frames=is_volume_model(activated))
            if row["model_digest"] and verdict.refusal is not None:
                continue
            affected = series_jobs.affected_images(tx, row["instance_id"]) if row["series_id"] is not None else [row["instance_id"]]
            tx.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))
            for instance_id in affected:
                tx.execute("UPDATE instances SET state = ?, reason = NULL WHERE id = ?", (ScanState.WAITING.value, instance_id))
            tx.execute("UPDATE series SET open = 1 WHERE id = (SELECT series_id FROM instances WHERE id = ?)", (row["instance_id"],))
            touch_study(tx, row["instance_id"])

    @staticmethod
    def _plan_volumes(tx: sqlite3.Connection, series_id: int, manifests: dict[str, Manifest]) -> dict[str, Note | None]:
        """Queue a series for each volume model that applies to it; returns for each volume model the refusal, None where it applies."""
        volumes = {digest: manifest for digest, manifest in manifests.items() if is_volume_model(manifest)}
        scans = [_scan_of(row) for row in series_jobs.images_of(tx, series_id)] if volumes else []
        verdicts = {digest: applies_to_series(manifest.applies_to, scans) for digest, manifest in volumes.items()}
        series_jobs.delete_other_models(tx, series_id, [digest for digest, verdict in verdicts.items() if verdict.refusal is None])
        for digest, verdict in verdicts.items():
            if verdict.refusal is None:
                series_jobs.add(tx, series_id, digest, verdict.notes)
        return {digest: verdict.refusal for digest, verdict in verdicts.items()}

    def _plan(self, tx: sqlite3.Connection, row: sqlite3.Row, manifests: dict[str, Manifest], refusals: dict[str, Note | None]) -> int:
        """Queue the jobs of one image; ``refusals`` as returned by :meth:`_plan_volumes`. Returns the number of jobs."""
        scan = _scan_of(row)
        verdicts = {digest: applies(manifest.applies_to, scan) for digest, manifest in manifests.items() if digest not in refusals}
        fitting = {digest: verdict.notes for digest, verdict in verdicts.items() if verdict.refusal is None}
        for digest, notes in fitting.items():
            self._add_job(tx, JobKind.INFER, row["id"], digest, notes, "")
        planned = len(fitting) + sum(refusal is None for refusal in refusals.values())
        if not planned:
            reasons = [verdict.refusal for verdict in verdicts.values()] + list(refusals.values())
            refusal = next((reason for reason in reasons if reason), Note("scope.no_model"))
            self._add_job(tx, JobKind.CHECK, row["id"], "", (refusal,), refusal.code)
        self.update_state(tx, row["id"])
        return len(fitting) if planned else 1

    def hand_over(self, tx: sqlite3.Connection, digest: str, successor: str | None, reason: Note) -> None:
        """Give the open and failed jobs of a model that is not active any more to its successor, or end them as not analysed.

        Args:
            tx: the caller's transaction, in which the active models have changed already.
            digest: the model that is not active any more.
            successor: the active model of the same model line, if there is one.
            reason: why it is not active; stored with the images that are not analysed, which are planned again for the next model.
        """
        manifest = self._active_manifests(tx).get(successor or "")
        jobs = tx.execute("SELECT * FROM jobs WHERE model_digest = ? AND state IN ('queued', 'running', 'failed')", (digest,)).fetchall()
        for job in jobs:
            image = tx.execute("SELECT * FROM instances WHERE id = ?", (job["instance_id"],)).fetchone()
            if job["series_id"] is not None:
                if self._hand_over_series(tx, job, successor, manifest):
                    continue
                verdict = None
            else:
                verdict = applies(manifest.applies_to, _scan_of(image)) if manifest and not is_volume_model(manifest) else None
            if successor is not None and verdict is not None and verdict.refusal is None:
                tx.execute("DELETE FROM jobs WHERE id = ?", (job["id"],))
                self._add_job(tx, JobKind.INFER, image["id"], successor, verdict.notes, "")
                tx.execute(
                    "UPDATE jobs SET priority = ? WHERE instance_id = ? AND model_digest = ? AND priority < ?",
                    (job["priority"], image["id"], successor, job["priority"]),
                )
            else:
                tx.execute(
                    "UPDATE jobs SET state = 'done', outcome = ?, reason = ?, scope_code = 'scope.no_model', finished_at = ?,"
                    " lease_owner = '', lease_until = 0 WHERE id = ?",
                    (ScanState.NOT_ANALYSED.value, json.dumps(reason.to_json(), ensure_ascii=False), utc_now(), job["id"]),
                )
            self.update_state(tx, image["id"])

    def _hand_over_series(self, tx: sqlite3.Connection, job: sqlite3.Row, successor: str | None, manifest: Manifest | None) -> bool:
        """Give the job of a series to the successor of its model; returns whether that applies to the series."""
        if successor is None or manifest is None or not is_volume_model(manifest):
            return False
        scans = [_scan_of(row) for row in series_jobs.images_of(tx, job["series_id"])]
        verdict = applies_to_series(manifest.applies_to, scans)
        if verdict.refusal is not None:
            return False
        tx.execute("DELETE FROM jobs WHERE id = ?", (job["id"],))
        series_jobs.add(tx, job["series_id"], successor, verdict.notes)
        tx.execute(
            "UPDATE jobs SET priority = max(priority, ?) WHERE series_id = ? AND model_digest = ?",
            (job["priority"], job["series_id"], successor),
        )
        self.update_state(tx, job["instance_id"])
        return True

    @staticmethod
    def note_findings(tx: sqlite3.Connection, digest: str, note: Note, limit: int) -> int:
        """Add a note to the results of a model, at most ``limit`` jobs at a time; returns how many got it. Safe to repeat."""
        jobs = tx.execute(
            "SELECT id, instance_id, notes FROM jobs WHERE model_digest = ? AND outcome = ? AND notes NOT LIKE ? LIMIT ?",
            (digest, ScanState.AI_READY.value, f'%"code": "{note.code}"%', limit),
        ).fetchall()
        for job in jobs:
            tx.execute("UPDATE jobs SET notes = ? WHERE id = ?", (notes_json((*parse_notes(job["notes"]), note)), job["id"]))
            touch_study(tx, job["instance_id"])
        return len(jobs)

    @staticmethod
    def _add_job(tx: sqlite3.Connection, kind: JobKind, instance_id: int, digest: str, notes: tuple[Note, ...], scope_code: str) -> None:
        tx.execute(
            "INSERT INTO jobs (kind, instance_id, model_digest, state, scope_code, created_at, notes) VALUES (?,?,?,?,?,?,?)"
            " ON CONFLICT (instance_id, kind, model_digest) DO NOTHING",
            (kind.value, instance_id, digest, JobState.QUEUED.value, scope_code, utc_now(), notes_json(notes)),
        )

    def update_state(self, tx: sqlite3.Connection, instance_id: int) -> None:
        """Derive the state of an image from its jobs, and that of all images of its series where one of its jobs analyses the series."""
        for affected in series_jobs.affected_images(tx, instance_id):
            self._update_image_state(tx, affected)

    def _update_image_state(self, tx: sqlite3.Connection, instance_id: int) -> None:
        """Derive the state of one image from its jobs and its series': running or queued jobs first, then the worst outcome."""
        jobs = tx.execute(
            "SELECT state, outcome, reason FROM jobs WHERE instance_id = ?1 OR series_id = (SELECT series_id FROM instances WHERE id = ?1)",
            (instance_id,),
        ).fetchall()
        unplanned = "SELECT 1 FROM instances i JOIN series s ON s.id = i.series_id WHERE i.id = ? AND i.state = ? AND s.open = 1"
        if not jobs or tx.execute(unplanned, (instance_id, ScanState.WAITING.value)).fetchone():
            return  # planned when its series is complete; the jobs of other images do not matter until then
        states = [JobState(job["state"]) for job in jobs]
        if JobState.RUNNING in states:
            self._set_state(tx, instance_id, ScanState.RUNNING, None)
        elif JobState.QUEUED in states:
            self._set_state(tx, instance_id, ScanState.QUEUED, None)
        else:
            worst = min(jobs, key=lambda job: _WORST_FIRST.index(ScanState(job["outcome"])))
            self._set_state(tx, instance_id, ScanState(worst["outcome"]), worst["reason"])

    def _set_state(self, tx: sqlite3.Connection, instance_id: int, state: ScanState, reason: str | None) -> None:
        tx.execute("UPDATE instances SET state = ?, reason = ? WHERE id = ?", (state.value, reason, instance_id))
        touch_study(tx, instance_id)

    def _active_manifests(self, tx: sqlite3.Connection) -> dict[str, Manifest]:
        rows = tx.execute("SELECT digest, manifest FROM models WHERE state = 'active' ORDER BY name").fetchall()
        for row in rows:
            if row["digest"] not in self._manifests:
                self._manifests[row["digest"]] = Manifest.model_validate_json(row["manifest"])
        return {row["digest"]: self._manifests[row["digest"]] for row in rows}


def _scan_of(row: sqlite3.Row) -> Scan:
    """The attributes of a stored image that decide whether a model applies."""
    same = (
        "sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "modality", "body_part_examined", "view_position",
        "patient_age_years", "number_of_frames",
    )  # fmt: skip
    values = {name: row[name] for name in same}
    return Scan(study_instance_uid="", series_instance_uid="", patient=Patient(), notes=parse_notes(row["notes"]), **values)


def next_revision(tx: sqlite3.Connection) -> int:
    """Increment and return the revision, which numbers every change that a person can see."""
    row = tx.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'revision' RETURNING value").fetchone()
    return int(row["value"])


def touch_study(tx: sqlite3.Connection, instance_id: int) -> None:
    """Give the study of an image a new revision, since something that people can see has changed."""
    tx.execute(
        "UPDATE studies SET revision = ?"
        " WHERE id = (SELECT s.study_id FROM series s JOIN instances i ON i.series_id = s.id WHERE i.id = ?)",
        (next_revision(tx), instance_id),
    )
