"""The queue: which model reads which image, who does it under a lease, and what a finished job leaves behind.

A lease that runs out gives the job back; after ``job_max_attempts`` it is poisoned and shown as failed, and never blocks the ones
behind it. What is queued at all is decided in :mod:`appliance.store.planning`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection
from dataclasses import fields

from appliance.core.domain import PENDING_STATES, READ_STATES, Finding, Job, JobKind, JobResult, JobState, Note, ScanState, utc_now
from appliance.core.errors import StoreError
from appliance.store import database as db
from appliance.store import priority, series_jobs
from appliance.store.database import Database
from appliance.store.planning import Planning, notes_json, read_notes
from appliance.store.priority import Origin, Standing, Urgency


class JobQueue(Planning):
    """Leasing and ending of jobs over one database; :class:`appliance.store.store.Store` is the whole."""

    def claim_job(
        self, owner: str, lease_s: float, held: Collection[str] = (), *, urgent: bool = False, volumes: bool = True
    ) -> Job | None:
        """Take the next job under a lease: urgent first, then oldest. Expired leases go back to the queue before.

        Args:
            owner: who takes it.
            lease_s: for how long.
            held: digests of models that must not read now; their jobs wait.
            urgent: take an urgent one or none; expired leases are left alone.
            volumes: take series too; not in the middle of another one, two of which no process can hold.

        Returns:
            None when the queue is empty.
        """
        now = time.time()
        waiting = self.database.one(
            "SELECT EXISTS (SELECT 1 FROM jobs WHERE state = 'queued' AND priority > ?)"
            " OR EXISTS (SELECT 1 FROM jobs WHERE state = 'running' AND lease_until < ?) AS n",
            0 if urgent else -1,
            0 if urgent else now,
        )
        if waiting is None or not waiting["n"]:
            return None
        with self.database.transaction(durable=False) as tx:  # a claim that a power cut forgets is a job still queued
            if not urgent:
                self._release(tx, tx.execute("SELECT * FROM jobs WHERE state = 'running' AND lease_until < ?", (now,)).fetchall(), now)
            row = tx.execute(
                "SELECT * FROM jobs WHERE state = 'queued' AND priority > ? AND model_digest NOT IN (SELECT value FROM json_each(?))"  # noqa: S608
                f" AND (kind != ? OR ?) AND {series_jobs.TAKEABLE} ORDER BY priority DESC, id LIMIT 1",
                (0 if urgent else -1, json.dumps(list(held)), JobKind.VOLUME.value, volumes),
            ).fetchone()
            return None if row is None else self._lease(tx, row, owner, now, now + lease_s)

    def claim_company(self, job: Job, most: int, lease_s: float) -> list[Job]:
        """Take more jobs of the model of a claimed one, to be read together with it; its own lease becomes theirs.

        Only what is queued now is taken, never waited for. What is urgent, or was tried before (whoever may have ended the worker must
        not do so to others), is read alone; and while something urgent waits, nobody gathers company.

        Args:
            job: a job claimed just now.
            most: how many more at most.
            lease_s: for how long, for all of them.
        """
        if job.kind is not JobKind.INFER or job.tried or job.priority > 0 or self.settings.job_max_attempts < 2:
            return []
        now = time.time()
        with self.database.transaction(durable=False) as tx:
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
        self._settle(tx, row["instance_id"])
        return Job(
            row["id"],
            JobKind(row["kind"]),
            row["instance_id"],
            row["model_digest"],
            row["attempts"] + 1,
            owner,
            read_notes(row["notes"]),
            row["scope_code"],
            row["priority"],
            row["attempts"] > 0 or row["reason"] is not None,
        )

    def studies_named(self, which: str) -> list[int]:
        """The studies that a person means: by accession number, Study Instance UID or number; raises StoreError ``store.missing``."""
        rows = self.database.query(
            "SELECT id FROM studies WHERE (accession_number != '' AND accession_number = ?1) OR study_instance_uid = ?1"
            " OR CAST(id AS TEXT) = ?1",
            which,
        )
        if not rows:
            raise StoreError("store.missing", "no such study")
        return [int(row["id"]) for row in rows]

    def make_urgent(self, study_id: int, actor: str, origin: Origin = "person") -> int:
        """STAT: what waits of a study is read before everything else, and waits for no batch. Returns how many jobs that concerns.

        What was taken into a batch already and has no result yet is among them: the batch brings it forward. Images of the study that are
        not planned yet are planned at once, and those that come later are as urgent. A series that is still coming, and that a model of
        volumes reads whole, is never cut short: it is read first as soon as it is complete. Safe to repeat.

        Raises:
            StoreError: ``store.missing``, there is no such study.
        """
        if self.database.one("SELECT 1 FROM studies WHERE id = ?", study_id) is None:
            raise StoreError("store.missing", f"study {study_id}")
        self.close_single_images(study_id)
        with self.database.transaction() as tx:
            return priority.mark(tx, study_id, origin, actor)

    def make_routine(self, study_id: int, actor: str, origin: Origin = "person") -> int | None:
        """Take back what :meth:`make_urgent` did, see :func:`appliance.store.priority.unmark`.

        Returns:
            How many jobs wait in their turn again; None where the study was not urgent.

        Raises:
            StoreError: ``store.missing``, there is no such study.
        """
        if self.database.one("SELECT 1 FROM studies WHERE id = ?", study_id) is None:
            raise StoreError("store.missing", f"study {study_id}")
        with self.database.transaction() as tx:
            return priority.unmark(tx, study_id, origin, actor)

    def standing_of(self, study_id: int) -> Standing:
        """What becomes of a study's images. One that failed, was rejected or was not analysed is not read, though nothing of it waits."""
        rows = self.database.query(
            "SELECT DISTINCT i.state FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?", study_id
        )
        states = {ScanState(row["state"]) for row in rows}
        if states & set(PENDING_STATES):
            return "waits"
        return "read" if states and states <= set(READ_STATES) else "unread"

    def urgency_of(self, study_id: int) -> Urgency | None:
        """Who wanted a study read first; None of one that is not urgent."""
        row = self.database.one("SELECT urgent FROM studies WHERE id = ?", study_id)
        return Urgency.of(row["urgent"]) if row else None

    def urgent_among(self, jobs: Collection[int]) -> set[int]:
        """Which of these jobs have become urgent since they were taken."""
        rows = self.database.query(
            "SELECT id FROM jobs WHERE priority > 0 AND id IN (SELECT value FROM json_each(?))", json.dumps(list(jobs))
        )
        return {row["id"] for row in rows}

    def recover_jobs(self) -> int:
        """Give back every running job, whatever its lease: for the one worker that holds the worker lock, at its start."""
        rows = self.database.query("SELECT * FROM jobs WHERE state = 'running'")
        if rows:
            with self.database.transaction() as tx:
                self._release(tx, tx.execute("SELECT * FROM jobs WHERE state = 'running'").fetchall(), time.time())
        return len(rows)

    def give_back(self, jobs: Collection[Job]) -> None:
        """Put jobs that were taken, and that nothing was wrong with, back as if they never had been. A lost lease changes nothing."""
        with self.database.transaction(durable=False) as tx:
            for job in jobs:
                if self._leased(tx, job) is not None:
                    tx.execute(
                        "UPDATE jobs SET state = 'queued', attempts = attempts - 1, lease_owner = '', lease_until = 0 WHERE id = ?",
                        (job.id,),
                    )
                    self._settle(tx, job.instance_id)

    def _release(self, tx: sqlite3.Connection, rows: list[sqlite3.Row], now: float) -> None:
        """Put abandoned jobs back, or poison those whose attempts are used up."""
        for row in rows:
            late = now - row["claimed_at"] >= self.settings.job_deadline_s
            self._retry_or_poison(tx, row, Note("job.deadline" if late else "job.crashed"))

    def _retry_or_poison(self, tx: sqlite3.Connection, row: sqlite3.Row, reason: Note) -> None:
        poisoned = row["attempts"] >= self.settings.job_max_attempts
        state = JobState.FAILED if poisoned else JobState.QUEUED
        tx.execute(
            "UPDATE jobs SET state = ?, lease_owner = '', lease_until = 0, reason = ?, outcome = ?, finished_at = ? WHERE id = ?",
            (
                state.value,
                json.dumps(reason.to_json()),
                ScanState.FAILED.value if poisoned else None,
                utc_now() if poisoned else None,
                row["id"],
            ),
        )
        Database.audit(
            tx,
            db.APPLICATION_ACTIVITY,
            "worker",
            "E",
            f"job:{row['id']}",
            8 if poisoned else 4,
            reason=reason.code,
            attempts=row["attempts"],
        )
        self._settle(tx, row["instance_id"])

    def fail_job(self, job: Job, reason: Note) -> None:
        """An attempt failed: back to the queue, or poisoned after ``job_max_attempts``. A lost lease changes nothing."""
        with self.database.transaction() as tx:
            row = self._leased(tx, job)
            if row is not None:
                self._retry_or_poison(tx, row, reason)

    def finish_job(self, job: Job, result: JobResult) -> bool:
        """Commit a job's outcome, its findings and the image's state at once.

        Returns False, keeping nothing, when the lease was lost meanwhile: another attempt owns the job then.
        """
        with self.database.transaction() as tx:
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
            if result.volume is not None:
                series_jobs.keep(tx, job, result.volume)
            Database.audit(
                tx, db.APPLICATION_ACTIVITY, "worker", "E", f"job:{job.id}", outcome_state=result.state.value, model=job.model_digest[:12]
            )
            self._settle(tx, job.instance_id)
        return True

    def record_store_time(self, job: Job, timing_ms: dict[str, float]) -> None:
        """Write the times again once the commit that ended the job has been measured too."""
        with self.database.transaction(durable=False) as tx:
            tx.execute("UPDATE jobs SET timing_ms = ? WHERE id = ?", (json.dumps(timing_ms), job.id))

    def retry(self, instance_id: int, actor: str) -> bool:
        """A person asks for another try of an image's failed jobs, its series' among them. Returns whether there was one."""
        with self.database.transaction() as tx:
            failed = tx.execute(
                "SELECT id, instance_id FROM jobs WHERE state = 'failed' AND"
                " (instance_id = ?1 OR series_id = (SELECT series_id FROM instances WHERE id = ?1))",
                (instance_id,),
            ).fetchall()
            for row in failed:
                tx.execute("UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, finished_at = NULL WHERE id = ?", (row["id"],))
                self._settle(tx, row["instance_id"])
            if failed:
                Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"instance:{instance_id}", retried=len(failed))
        return bool(failed)

    def pending_jobs(self) -> int:
        """How many images still wait for their result."""
        row = self.database.one(
            "SELECT (SELECT count(*) FROM jobs WHERE state = 'queued') + (SELECT count(*) FROM jobs WHERE state = 'running')"
            " + (SELECT count(*) FROM instances WHERE state = 'waiting') AS n"
        )
        return int(row["n"]) if row else 0

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
        values["peak"] = json.dumps(finding.peak) if finding.peak else None
        values["positive"] = int(finding.positive)
        Database.insert(tx, "findings", job_id=job.id, instance_id=job.instance_id, **values)
