"""The queue: which model reads which image, who does it under a lease, and what a finished job leaves behind.

One job per (image, model), so that a repeat can add nothing; a lease that runs out gives the job back; after
``job_max_attempts`` it is poisoned and shown as failed, and never blocks the ones behind it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable
from dataclasses import fields

from appliance import database as db
from appliance import series_jobs
from appliance.database import Database
from appliance.domain import Finding, Job, JobKind, JobResult, JobState, Note, Patient, Scan, ScanState, utc_now
from appliance.errors import StoreError
from appliance.scope import applies, reads_volumes
from appliance.settings import Settings
from model_sync.bundle import Manifest

# Of several jobs on one image, the outcome that needs a person most is the image's state.
_WORST_FIRST = (ScanState.FAILED, ScanState.NOT_ANALYSED, ScanState.QUALITY_REJECTED, ScanState.AI_READY, ScanState.OUT_OF_SCOPE)


class JobQueue:
    """Planning, leasing and ending of jobs over one database; :class:`appliance.store.Store` is the whole."""

    settings: Settings
    database: Database
    _manifests: dict[str, Manifest]

    # -- planning ----------------------------------------------------------------------------------------------------

    def close_series(self, series_ids: Iterable[int]) -> int:
        """The sender says these series are complete: plan their jobs. Returns the number of jobs queued.

        Every active model whose manifest applies gets a job per image, or per series where it reads volumes; an image no model
        applies to gets a check of its pixels, after which it is OUT_OF_SCOPE with the reason. Safe to repeat.
        """
        planned = 0
        with self.database.transaction() as tx:
            manifests = self._active_manifests(tx)
            for series_id in series_ids:
                tx.execute("UPDATE series SET open = 0 WHERE id = ?", (series_id,))
                waiting = [row for row in series_jobs.images(tx, series_id) if row["state"] == ScanState.WAITING.value]
                refusals = self._plan_volumes(tx, series_id, manifests) if waiting else {}
                planned += sum(refusal is None for refusal in refusals.values())
                for row in waiting:
                    planned += self._plan(tx, row, manifests, refusals)
        return planned

    def close_idle_series(self) -> int:
        """Plan every open series that has been silent for ``series_idle_s``. Returns the number of jobs queued."""
        limit = time.time() - self.settings.series_idle_s
        rows = self.database.query(
            "SELECT id FROM series WHERE open = 1 AND (last_received_at < ? OR last_received_at > ?)", limit, time.time() + 1
        )
        return self.close_series([row["id"] for row in rows]) if rows else 0

    def _replan_unread(self, tx: sqlite3.Connection, digest: str) -> None:
        """A model came: what was not, or would not be, analysed for want of any goes back to planning (the idle rule picks it up).

        What was left by a model that was taken from its line waits for one that reads it, and says so until then.
        """
        came = self._active_manifests(tx)[digest]
        rows = tx.execute("SELECT * FROM jobs WHERE scope_code = 'scope.no_model' AND state IN ('done', 'queued')").fetchall()
        for row in rows:
            image = tx.execute("SELECT * FROM instances WHERE id = ?", (row["instance_id"],)).fetchone()
            if row["model_digest"] and applies(came.applies_to, _scan_of(image), frames=reads_volumes(came)).refusal is not None:
                continue
            unread = series_jobs.concerned(tx, row["instance_id"]) if row["series_id"] is not None else [row["instance_id"]]
            tx.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))
            for instance_id in unread:
                tx.execute("UPDATE instances SET state = ?, reason = NULL WHERE id = ?", (ScanState.WAITING.value, instance_id))
            tx.execute("UPDATE series SET open = 1 WHERE id = (SELECT series_id FROM instances WHERE id = ?)", (row["instance_id"],))
            touch_study(tx, row["instance_id"])

    @staticmethod
    def _plan_volumes(tx: sqlite3.Connection, series_id: int, manifests: dict[str, Manifest]) -> dict[str, Note | None]:
        """One job per series for each model of volumes that may read it; for each such model why it may not, None where it may."""
        volumes = {digest: manifest for digest, manifest in manifests.items() if reads_volumes(manifest)}
        scans = [_scan_of(row) for row in series_jobs.images(tx, series_id)] if volumes else []
        verdicts = {digest: series_jobs.verdict_of(manifest, scans) for digest, manifest in volumes.items()}
        for digest, verdict in verdicts.items():
            if verdict.refusal is None:
                series_jobs.add(tx, series_id, digest, verdict.notes)
        return {digest: verdict.refusal for digest, verdict in verdicts.items()}

    def _plan(self, tx: sqlite3.Connection, row: sqlite3.Row, manifests: dict[str, Manifest], refusals: dict[str, Note | None]) -> int:
        """The jobs of one image; ``refusals`` says for each model of volumes why it may not read the image's series."""
        scan = _scan_of(row)
        verdicts = {digest: applies(manifest.applies_to, scan) for digest, manifest in manifests.items() if digest not in refusals}
        fitting = {digest: verdict.notes for digest, verdict in verdicts.items() if verdict.refusal is None}
        for digest, notes in fitting.items():
            self._add_job(tx, JobKind.INFER, row["id"], digest, notes, "")
        read = len(fitting) + sum(refusal is None for refusal in refusals.values())
        if not read:
            whys = [verdict.refusal for verdict in verdicts.values()] + list(refusals.values())
            refusal = next((why for why in whys if why), Note("scope.no_model"))
            self._add_job(tx, JobKind.CHECK, row["id"], "", (refusal,), refusal.code)
        self._settle(tx, row["id"])
        return len(fitting) if read else 1

    def hand_over(self, tx: sqlite3.Connection, digest: str, successor: str | None, reason: Note) -> None:
        """A model reads no more: what still waits for it, or failed under it, goes to its successor, or is not analysed and says why.

        Args:
            tx: the caller's transaction, in which the models at work have changed already.
            digest: the model that reads no more.
            successor: the model of its line that reads now, if there is one.
            reason: why it reads no more; what is not analysed for it is planned again when a model comes.
        """
        manifest = self._active_manifests(tx).get(successor or "")
        waiting = tx.execute("SELECT * FROM jobs WHERE model_digest = ? AND state IN ('queued', 'running', 'failed')", (digest,)).fetchall()
        for job in waiting:
            image = tx.execute("SELECT * FROM instances WHERE id = ?", (job["instance_id"],)).fetchone()
            if job["series_id"] is not None:
                if self._hand_over_series(tx, job, successor, manifest):
                    continue
                verdict = None
            else:
                verdict = applies(manifest.applies_to, _scan_of(image)) if manifest and not reads_volumes(manifest) else None
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
            self._settle(tx, image["id"])

    def _hand_over_series(self, tx: sqlite3.Connection, job: sqlite3.Row, successor: str | None, manifest: Manifest | None) -> bool:
        """A series that waits for a model that reads no more goes to its successor; returns whether that may read it."""
        if successor is None or manifest is None or not reads_volumes(manifest):
            return False
        verdict = series_jobs.verdict_of(manifest, [_scan_of(row) for row in series_jobs.images(tx, job["series_id"])])
        if verdict.refusal is not None:
            return False
        tx.execute("DELETE FROM jobs WHERE id = ?", (job["id"],))
        series_jobs.add(tx, job["series_id"], successor, verdict.notes)
        tx.execute(
            "UPDATE jobs SET priority = max(priority, ?) WHERE series_id = ? AND model_digest = ?",
            (job["priority"], job["series_id"], successor),
        )
        self._settle(tx, job["instance_id"])
        return True

    @staticmethod
    def note_findings(tx: sqlite3.Connection, digest: str, note: Note, limit: int) -> int:
        """Put a note on what a model found, at most ``limit`` jobs at a time; returns how many got it. Safe to repeat."""
        jobs = tx.execute(
            "SELECT id, instance_id, notes FROM jobs WHERE model_digest = ? AND outcome = ? AND notes NOT LIKE ? LIMIT ?",
            (digest, ScanState.AI_READY.value, f'%"code": "{note.code}"%', limit),
        ).fetchall()
        for job in jobs:
            tx.execute("UPDATE jobs SET notes = ? WHERE id = ?", (notes_json((*_notes(job["notes"]), note)), job["id"]))
            touch_study(tx, job["instance_id"])
        return len(jobs)

    @staticmethod
    def _add_job(tx: sqlite3.Connection, kind: JobKind, instance_id: int, digest: str, notes: tuple[Note, ...], scope_code: str) -> None:
        tx.execute(
            "INSERT INTO jobs (kind, instance_id, model_digest, state, scope_code, created_at, notes) VALUES (?,?,?,?,?,?,?)"
            " ON CONFLICT (instance_id, kind, model_digest) DO NOTHING",
            (kind.value, instance_id, digest, JobState.QUEUED.value, scope_code, utc_now(), notes_json(notes)),
        )

    # -- jobs --------------------------------------------------------------------------------------------------------

    def claim_job(self, owner: str, lease_s: float, held: Collection[str] = (), *, urgent: bool = False) -> Job | None:
        """Take the next job under a lease: urgent first, then oldest. Expired leases go back to the queue before.

        Args:
            owner: who takes it.
            lease_s: for how long.
            held: digests of models that must not read now; their jobs wait.
            urgent: take an urgent one or none; expired leases are left alone.

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
                "SELECT * FROM jobs WHERE state = 'queued' AND priority > ? AND model_digest NOT IN (SELECT value FROM json_each(?))"
                " ORDER BY priority DESC, id LIMIT 1",
                (0 if urgent else -1, json.dumps(list(held))),
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
            _notes(row["notes"]),
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

    def make_urgent(self, study_id: int, actor: str) -> int:
        """STAT: what waits of a study is read before everything else, and waits for no batch. Returns how many jobs that concerns.

        Images of the study that are not planned yet are planned at once.
        """
        self.close_series([row["id"] for row in self.database.query("SELECT id FROM series WHERE study_id = ? AND open = 1", study_id)])
        with self.database.transaction() as tx:
            changed = tx.execute(
                "UPDATE jobs SET priority = 1 WHERE state = 'queued' AND priority < 1 AND instance_id IN"
                " (SELECT i.id FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?)",
                (study_id,),
            ).rowcount
            if changed:
                Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", urgent=changed)
                tx.execute("UPDATE studies SET revision = ? WHERE id = ?", (next_revision(tx), study_id))
        return changed

    def recover_jobs(self) -> int:
        """Give back every running job, whatever its lease: for the one worker that holds the worker lock, at its start."""
        rows = self.database.query("SELECT * FROM jobs WHERE state = 'running'")
        if rows:
            with self.database.transaction() as tx:
                self._release(tx, tx.execute("SELECT * FROM jobs WHERE state = 'running'").fetchall(), time.time())
        return len(rows)

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
        """A person asks for another try of an image's failed jobs. Returns whether there was one."""
        with self.database.transaction() as tx:
            changed = tx.execute(
                "UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, finished_at = NULL"
                " WHERE instance_id = ? AND state = 'failed'",
                (instance_id,),
            ).rowcount
            if changed:
                Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"instance:{instance_id}", retried=changed)
                self._settle(tx, instance_id)
        return changed > 0

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

    def _settle(self, tx: sqlite3.Connection, instance_id: int) -> None:
        """Derive the state of an image, and of its series where a job on it reads that, from the jobs."""
        for concerned in series_jobs.concerned(tx, instance_id):
            self._settle_image(tx, concerned)

    def _settle_image(self, tx: sqlite3.Connection, instance_id: int) -> None:
        """Derive an image's state from its jobs and its series': what still runs, then what failed, then what was found."""
        jobs = tx.execute(
            "SELECT state, outcome, reason FROM jobs WHERE instance_id = ?1 OR series_id = (SELECT series_id FROM instances WHERE id = ?1)",
            (instance_id,),
        ).fetchall()
        if not jobs:  # an image that came after its series was read: planned when the series is complete again
            return
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


def notes_json(notes: Iterable[Note]) -> str:
    """Notes as stored: a JSON list, each once."""
    return json.dumps([note.to_json() for note in dict.fromkeys(notes)], ensure_ascii=False)


def _notes(text: str) -> tuple[Note, ...]:
    return tuple(Note(item["code"], item["detail"]) for item in json.loads(text))


def _scan_of(row: sqlite3.Row) -> Scan:
    """What the scope rule needs of a stored image."""
    return Scan(
        study_instance_uid="",
        series_instance_uid="",
        sop_instance_uid=row["sop_instance_uid"],
        sop_class_uid=row["sop_class_uid"],
        transfer_syntax_uid=row["transfer_syntax_uid"],
        patient=Patient(),
        modality=row["modality"],
        body_part_examined=row["body_part_examined"],
        view_position=row["view_position"],
        patient_age_years=row["patient_age_years"],
        number_of_frames=row["number_of_frames"],
        notes=_notes(row["notes"]),
    )


def next_revision(tx: sqlite3.Connection) -> int:
    """The number of a change that people can see."""
    row = tx.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'revision' RETURNING value").fetchone()
    return int(row["value"])


def touch_study(tx: sqlite3.Connection, instance_id: int) -> None:
    """Give an image's study a new revision: something that people can see has changed."""
    tx.execute(
        "UPDATE studies SET revision = ?"
        " WHERE id = (SELECT s.study_id FROM series s JOIN instances i ON i.series_id = s.id WHERE i.id = ?)",
        (next_revision(tx), instance_id),
    )
