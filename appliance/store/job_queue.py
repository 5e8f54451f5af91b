"""The job queue: leases, retries, results and urgent jobs.

An expired lease returns the job to the queue. After ``job_max_attempts`` the job is marked as failed and shown, and never blocks the
jobs behind it. Which jobs exist is decided in :mod:`appliance.store.planning`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection
from dataclasses import fields
from typing import Final

from appliance.core.correction import NOTHING_DECIDED, Correction
from appliance.core.domain import (
    ANALYSED_STATES,
    PENDING_STATES,
    Finding,
    Job,
    JobKind,
    JobResult,
    JobState,
    Note,
    ScanState,
    notes_json,
    parse_notes,
    utc_now,
)  # fmt: skip
from appliance.core.settings import Settings
from appliance.store import database as db
from appliance.store import priority, series_jobs, taken_back
from appliance.store.database import Database
from appliance.store.planning import Planner
from appliance.store.priority import Origin, StudyProgress, Urgency

# The reasons of the input check (appliance/runtime/input_check.py).
STOPPED_BY_INPUT_CHECK: Final = ("quality.turned", "quality.negative", "quality.other_image")


class JobQueue:
    """Leases jobs to workers and commits their results; the planner updates the states of the images."""

    def __init__(self, settings: Settings, database: Database, planner: Planner) -> None:
        self._settings, self._database, self._planner = settings, database, planner

    def claim_job(
        self, owner: str, lease_s: float, held: Collection[str] = (), *, urgent: bool = False, volumes: bool = True
    ) -> Job | None:
        """Lease the next job to the worker ``owner``: urgent jobs first, then the oldest; None when there is none.

        Jobs whose lease expired return to the queue before.

        Args:
            owner: the worker.
            lease_s: duration of the lease.
            held: digests of models whose jobs must wait.
            urgent: only an urgent job; expired leases are not touched.
            volumes: volume jobs too; False inside another volume job, because the memory does not suffice for two.
        """
        now = time.time()
        waiting = self._database.one(
            "SELECT EXISTS (SELECT 1 FROM jobs WHERE state = 'queued' AND priority > ?)"
            " OR EXISTS (SELECT 1 FROM jobs WHERE state = 'running' AND lease_until < ?) AS n",
            0 if urgent else -1,
            0 if urgent else now,
        )
        if waiting is None or not waiting["n"]:
            return None
        with self._database.transaction(durable=False) as tx:  # a claim that a power cut forgets is a job still queued
            if not urgent:
                self._release(tx, tx.execute("SELECT * FROM jobs WHERE state = 'running' AND lease_until < ?", (now,)).fetchall(), now)
            row = tx.execute(
                "SELECT * FROM jobs WHERE state = 'queued' AND priority > ? AND model_digest NOT IN (SELECT value FROM json_each(?))"  # noqa: S608
                f" AND (kind != ? OR ?) AND {series_jobs.CLAIMABLE} ORDER BY priority DESC, id LIMIT 1",
                (0 if urgent else -1, json.dumps(list(held)), JobKind.VOLUME.value, volumes),
            ).fetchone()
            return None if row is None else self._lease(tx, row, owner, now, now + lease_s)

    def claim_batch(self, job: Job, most: int, lease_s: float) -> list[Job]:
        """Lease up to ``most`` jobs of the same model, to run in one batch with a job that was claimed just now; its lease is extended.

        An urgent job runs alone, and so does a job that was tried before: if it crashes the worker, no other job must fail with it. While
        an urgent job waits there are no batches.
        """
        if job.kind is not JobKind.INFER or job.tried or job.priority > 0 or self._settings.job_max_attempts < 2:
            return []
        now = time.time()
        with self._database.transaction(durable=False) as tx:
            if tx.execute("SELECT 1 FROM jobs WHERE state = 'queued' AND priority > 0 LIMIT 1").fetchone():
                return []
            rows = tx.execute(
                "SELECT * FROM jobs WHERE state = 'queued' AND kind = ? AND model_digest = ? AND priority = 0 AND attempts = 0"
                " AND reason IS NULL ORDER BY id LIMIT ?",
                (job.kind.value, job.model_digest, most),
            ).fetchall()
            if rows:
                tx.execute("UPDATE jobs SET lease_until = ? WHERE id = ?", (now + lease_s, job.id))
            return [self._lease(tx, row, job.lease_owner, now, now + lease_s) for row in rows]

    def _lease(self, tx: sqlite3.Connection, row: sqlite3.Row, owner: str, now: float, until: float) -> Job:
        tx.execute(
            "UPDATE jobs SET state = 'running', attempts = attempts + 1, lease_owner = ?, lease_until = ?, claimed_at = ? WHERE id = ?",
            (owner, until, now, row["id"]),
        )
        self._planner.update_state(tx, row["instance_id"])
        same = ("id", "instance_id", "model_digest", "scope_code", "priority")
        image = tx.execute("SELECT correction, patient_age_years FROM instances WHERE id = ?", (row["instance_id"],)).fetchone()
        return Job(
            **{name: row[name] for name in same}, kind=JobKind(row["kind"]), attempts=row["attempts"] + 1, lease_owner=owner,
            notes=parse_notes(row["notes"]), tried=row["attempts"] > 0 or row["reason"] is not None,
            correction=Correction.parse(image["correction"]),
            patient_age_years=image["patient_age_years"],
        )  # fmt: skip

    def find_studies(self, which: str) -> list[int]:
        """Find studies by accession number, Study Instance UID or row number; raises StoreError ``store.missing``."""
        sql = (
            "SELECT id FROM studies WHERE (accession_number != '' AND accession_number = ?1) OR study_instance_uid = ?1"
            " OR CAST(id AS TEXT) = ?1"
        )
        self._database.require("no such study", sql, which)
        return [int(row["id"]) for row in self._database.query(sql, which)]

    def make_urgent(self, study_id: int, actor: str, origin: Origin = "person") -> int:
        """Make a study urgent (STAT): its jobs run before all others and wait for no batch. Returns the number of jobs concerned.

        Jobs in a running batch that have no result yet are included: the batch runs them first. Images of the study that are not planned
        yet are planned at once, and images that arrive later are urgent too. Only a series that is still arriving and that a volume model
        applies to is planned when it is complete. Safe to repeat.

        Raises:
            StoreError: ``store.missing``, there is no such study.
        """
        self._database.require(f"study {study_id}", "SELECT 1 FROM studies WHERE id = ?", study_id)
        self._planner.close_single_images(study_id)
        with self._database.transaction() as tx:
            return priority.mark(tx, study_id, origin, actor)

    def make_routine(self, study_id: int, actor: str, origin: Origin = "person") -> int | None:
        """Undo :meth:`make_urgent`, see :func:`appliance.store.priority.unmark`.

        Returns:
            How many jobs have normal priority again; None where the study was not urgent.

        Raises:
            StoreError: ``store.missing``, there is no such study.
        """
        self._database.require(f"study {study_id}", "SELECT 1 FROM studies WHERE id = ?", study_id)
        with self._database.transaction() as tx:
            return priority.unmark(tx, study_id, origin, actor)

    def study_progress(self, study_id: int) -> StudyProgress:
        """Whether a study waits, is analysed, or ended with an image that failed, was rejected or was not analysed."""
        rows = self._database.query(
            "SELECT DISTINCT i.state FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?", study_id
        )
        states = {ScanState(row["state"]) for row in rows}
        if states & set(PENDING_STATES):
            return "waits"
        return "read" if states and states <= set(ANALYSED_STATES) else "unread"

    def urgency_of(self, study_id: int) -> Urgency | None:
        """Who made a study urgent; None where it is not urgent."""
        row = self._database.one("SELECT urgent FROM studies WHERE id = ?", study_id)
        return Urgency.of(row["urgent"]) if row else None

    def urgent_among(self, jobs: Collection[int]) -> set[int]:
        """Which of these jobs have become urgent since they were claimed."""
        rows = self._database.query(
            "SELECT id FROM jobs WHERE priority > 0 AND id IN (SELECT value FROM json_each(?))", json.dumps(list(jobs))
        )
        return {row["id"] for row in rows}

    def recover_jobs(self) -> int:
        """Return every running job to the queue, whatever its lease: for the worker that holds the worker lock, at its start."""
        with self._database.transaction() as tx:
            rows = tx.execute("SELECT * FROM jobs WHERE state = 'running'").fetchall()
            self._release(tx, rows, time.time())
        return len(rows)

    def return_jobs(self, jobs: Collection[Job]) -> None:
        """Return leased jobs to the queue without counting an attempt. Does nothing for a job whose lease was lost."""
        with self._database.transaction(durable=False) as tx:
            for job in jobs:
                if self._leased(tx, job) is not None:
                    tx.execute(
                        "UPDATE jobs SET state = 'queued', attempts = attempts - 1, lease_owner = '', lease_until = 0 WHERE id = ?",
                        (job.id,),
                    )
                    self._planner.update_state(tx, job.instance_id)

    def _release(self, tx: sqlite3.Connection, rows: list[sqlite3.Row], now: float) -> None:
        """Return abandoned jobs to the queue, or mark those as failed whose attempts are used up."""
        for row in rows:
            late = now - row["claimed_at"] >= self._settings.job_deadline_s
            self._retry_or_fail(tx, row, Note("job.deadline" if late else "job.crashed"))

    def _retry_or_fail(self, tx: sqlite3.Connection, row: sqlite3.Row, reason: Note) -> None:
        is_final = row["attempts"] >= self._settings.job_max_attempts
        state, outcome, finished = (JobState.FAILED, ScanState.FAILED.value, utc_now()) if is_final else (JobState.QUEUED, None, None)
        tx.execute(
            "UPDATE jobs SET state = ?, lease_owner = '', lease_until = 0, reason = ?, outcome = ?, finished_at = ? WHERE id = ?",
            (state.value, json.dumps(reason.to_json()), outcome, finished, row["id"]),
        )
        particulars = {"reason": reason.code, "attempts": row["attempts"]}
        Database.audit(tx, db.APPLICATION_ACTIVITY, "worker", "E", f"job:{row['id']}", 8 if is_final else 4, **particulars)
        self._planner.update_state(tx, row["instance_id"])

    def fail_job(self, job: Job, reason: Note) -> None:
        """Record a failed attempt: the job is retried, or failed after ``job_max_attempts``. Does nothing where the lease was lost."""
        with self._database.transaction() as tx:
            row = self._leased(tx, job)
            if row is not None:
                self._retry_or_fail(tx, row, reason)

    def finish_job(self, job: Job, result: JobResult) -> bool:
        """Commit the result of a job, its findings and the state of its image in one transaction.

        Returns False, and stores nothing, when the lease was lost: the job belongs to another attempt then.
        """
        with self._database.transaction() as tx:
            if self._leased(tx, job) is None:
                return False
            tx.execute(
                "UPDATE jobs SET state = ?, outcome = ?, reason = ?, notes = ?, timing_ms = ?, runtime = ?, finished_at = ?,"
                " lease_owner = '', lease_until = 0 WHERE id = ?",
                (
                    JobState.DONE.value,
                    result.state.value,
                    json.dumps(result.reason.to_json()) if result.reason else None,
                    notes_json((*job.notes, *result.notes)),
                    json.dumps(result.timing_ms),
                    json.dumps(result.runtime),
                    utc_now(),
                    job.id,
                ),
            )
            for finding in result.findings:
                self._insert_finding(tx, job, finding)
            if result.correction != NOTHING_DECIDED:
                text = result.correction.to_text()
                tx.execute("UPDATE instances SET correction = ? WHERE id = ? AND correction = ''", (text, job.instance_id))
            if result.volume is not None:
                series_jobs.save_result(tx, job, result.volume)
            Database.audit(
                tx, db.APPLICATION_ACTIVITY, "worker", "E", f"job:{job.id}", outcome_state=result.state.value, model=job.model_digest[:12]
            )
            self._planner.update_state(tx, job.instance_id)
        return True

    def record_store_time(self, job: Job, timing_ms: dict[str, float]) -> None:
        """Store the durations again, with that of the commit that ended the job."""
        with self._database.transaction(durable=False) as tx:
            tx.execute("UPDATE jobs SET timing_ms = ? WHERE id = ?", (json.dumps(timing_ms), job.id))

    def retry(self, instance_id: int, actor: str) -> bool:
        """Queue the failed jobs of an image and of its series again. Returns whether there was one."""
        with self._database.transaction() as tx:
            failed = tx.execute(
                "SELECT id, instance_id FROM jobs WHERE state = 'failed' AND"
                " (instance_id = ?1 OR series_id = (SELECT series_id FROM instances WHERE id = ?1))",
                (instance_id,),
            ).fetchall()
            for row in failed:
                tx.execute("UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, finished_at = NULL WHERE id = ?", (row["id"],))
                self._planner.update_state(tx, row["instance_id"])
            if failed:
                Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"instance:{instance_id}", retried=len(failed))
        return bool(failed)

    def analyse_corrected(self, instance_id: int, correction: Correction, actor: str) -> bool:
        """Queue an image again that the input check stopped, to be analysed as a person decided.

        Returns whether the input check had stopped it; else nothing is changed.
        """
        with self._database.transaction() as tx:
            stopped = tx.execute(
                "SELECT id FROM jobs WHERE instance_id = ? AND state = 'done' AND outcome = ?"
                " AND json_extract(reason, '$.code') IN (SELECT value FROM json_each(?))",
                (instance_id, ScanState.QUALITY_REJECTED.value, json.dumps(STOPPED_BY_INPUT_CHECK)),
            ).fetchall()
            if not stopped:
                return False
            tx.execute("UPDATE instances SET correction = ? WHERE id = ?", (correction.to_text(), instance_id))
            for row in stopped:
                tx.execute(
                    "UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, reason = NULL, finished_at = NULL WHERE id = ?",
                    (row["id"],),
                )
            self._planner.update_state(tx, instance_id)
            Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"instance:{instance_id}", correction=correction.to_text())
        return True

    def take_back_decision(self, instance_id: int, actor: str) -> bool:
        """Undo :meth:`analyse_corrected`, see :func:`appliance.store.taken_back.take_back`."""
        return taken_back.take_back(self._database, self._planner, instance_id, actor)

    def pending_jobs(self) -> int:
        """How many jobs and unplanned images wait for a result."""
        return self._database.number(
            "SELECT (SELECT count(*) FROM jobs WHERE state IN ('queued', 'running'))"
            " + (SELECT count(*) FROM instances WHERE state = 'waiting')"
        )

    @staticmethod
    def _leased(tx: sqlite3.Connection, job: Job) -> sqlite3.Row | None:
        row: sqlite3.Row | None = tx.execute(
            "SELECT * FROM jobs WHERE id = ? AND state = 'running' AND lease_owner = ? AND attempts = ?",
            (job.id, job.lease_owner, job.attempts),
        ).fetchone()
        return row

    @staticmethod
    def _insert_finding(tx: sqlite3.Connection, job: Job, finding: Finding) -> None:
        values = {item.name: getattr(finding, item.name) for item in fields(finding) if item.name not in ("id", "job_id")}
        for name in ("sensitivity", "specificity", "outline"):
            values[name] = json.dumps(values[name])
        values["inner_contours"] = json.dumps([contour.to_json() for contour in finding.inner_contours])
        values["peak"] = json.dumps(finding.peak) if finding.peak else None
        for name in ("positive", "has_verified_accuracy"):
            values[name] = int(values[name])
        values["accuracy"] = finding.accuracy.model_dump_json()
        Database.insert(tx, "findings", id=taken_back.next_finding_id(tx), job_id=job.id, instance_id=job.instance_id, **values)
