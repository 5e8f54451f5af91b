"""Planning: which model reads which image or series, and what an image's state is by what became of that.

One job per (image, model), or per (series, model) where it reads volumes, so that a repeat can add nothing.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Final

from appliance.core.applicability import applies, reads_volumes
from appliance.core.domain import JobKind, JobState, Note, Patient, Scan, ScanState, utc_now
from appliance.core.settings import Settings
from appliance.store import series_jobs
from appliance.store.database import Database
from model_sync.bundle import Manifest

# Of several jobs on one image, the outcome that needs a person most is the image's state.
_WORST_FIRST = (ScanState.FAILED, ScanState.NOT_ANALYSED, ScanState.QUALITY_REJECTED, ScanState.AI_READY, ScanState.OUT_OF_SCOPE)

_GROWING: Final = 6
_IDLE: Final = (
    "SELECT id FROM series s WHERE open = 1 AND (last_received_at > ?1 OR last_received_at < ?2"
    " - ?3 * EXISTS (SELECT 1 FROM jobs j WHERE j.series_id = s.id))"
    " AND (NOT ?4 OR EXISTS (SELECT 1 FROM studies t WHERE t.id = s.study_id AND t.urgent IS NOT NULL))"
)


class Planning:
    """:class:`appliance.store.job_queue.JobQueue` adds leases, :class:`appliance.store.store.Store` all else."""

    settings: Settings
    database: Database
    _manifests: dict[str, Manifest]

    def close_series(self, series_ids: Iterable[int]) -> int:
        """The sender says these series are complete: plan their jobs. Returns the number of jobs queued.

        Every active model whose manifest applies gets a job per image, or per series where it reads volumes; an image no model
        applies to gets a check of its pixels, after which it is OUT_OF_SCOPE with the reason. Safe to repeat.
        """
        with self.database.transaction() as tx:
            return self._close(tx, series_ids)

    def _close(self, tx: sqlite3.Connection, series_ids: Iterable[int]) -> int:
        planned, manifests = 0, self._active_manifests(tx)
        for series_id in series_ids:
            tx.execute("UPDATE series SET open = 0 WHERE id = ?", (series_id,))
            waiting = [row for row in series_jobs.images(tx, series_id) if row["state"] == ScanState.WAITING.value]
            refusals = self._plan_volumes(tx, series_id, manifests) if waiting else {}
            planned += sum(refusal is None for refusal in refusals.values())
            for row in waiting:
                planned += self._plan(tx, row, manifests, refusals)
            series_jobs.inherit_urgency(tx, series_id)
            if None in refusals.values():
                self._settle(tx, series_jobs.images(tx, series_id)[0]["id"])  # those that were read before wait again too
        return planned

    def close_single_images(self, study_id: int) -> int:
        """Plan at once what of a study needs no more images: every open series but those that a model of volumes reads whole.

        Half of such a series would be read as if it were all of it, with measurements that look like any other. It is complete when its
        sender says so or is silent, as ever.
        """
        with self.database.transaction() as tx:
            rules = [manifest.applies_to for manifest in self._active_manifests(tx).values() if reads_volumes(manifest)]
            rows = tx.execute("SELECT id FROM series WHERE study_id = ? AND open = 1", (study_id,)).fetchall()
            scans = {row["id"]: [_scan_of(image) for image in series_jobs.images(tx, row["id"])] for row in rows}
            whole = {
                series_id
                for series_id, made in scans.items()
                if any(applies(rule, scan, frames=True).refusal is None for rule in rules for scan in made)
            }
            return self._close(tx, sorted(set(scans) - whole))

    def close_idle_series(self, *, urgent: bool = False) -> int:
        """Plan every open series that has been silent for ``series_idle_s``, or those of urgent studies. Returns the number of jobs queued.

        One that was planned as a volume and grew after that has a slow sender: it is given ``_GROWING`` times as long, or a scan that
        comes slice by slice would be read from its beginning after each of them.
        """
        idle, now = self.settings.series_idle_s, time.time()
        values = (now + 1, now - idle, idle * (_GROWING - 1), urgent)
        if self.database.one(_IDLE, *values) is None:
            return 0
        with self.database.transaction() as tx:  # asked again: one more image may have come in between
            return self._close(tx, [row["id"] for row in tx.execute(_IDLE, values).fetchall()])

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
        series_jobs.keep_only(tx, series_id, [digest for digest, verdict in verdicts.items() if verdict.refusal is None])
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
            tx.execute("UPDATE jobs SET notes = ? WHERE id = ?", (notes_json((*read_notes(job["notes"]), note)), job["id"]))
            touch_study(tx, job["instance_id"])
        return len(jobs)

    @staticmethod
    def _add_job(tx: sqlite3.Connection, kind: JobKind, instance_id: int, digest: str, notes: tuple[Note, ...], scope_code: str) -> None:
        tx.execute(
            "INSERT INTO jobs (kind, instance_id, model_digest, state, scope_code, created_at, notes) VALUES (?,?,?,?,?,?,?)"
            " ON CONFLICT (instance_id, kind, model_digest) DO NOTHING",
            (kind.value, instance_id, digest, JobState.QUEUED.value, scope_code, utc_now(), notes_json(notes)),
        )

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
        unplanned = "SELECT 1 FROM instances i JOIN series s ON s.id = i.series_id WHERE i.id = ? AND i.state = ? AND s.open = 1"
        if not jobs or tx.execute(unplanned, (instance_id, ScanState.WAITING.value)).fetchone():
            return  # planned when its series is complete; whatever becomes of other images until then says nothing of it
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


def read_notes(text: str) -> tuple[Note, ...]:
    """Notes as ``notes_json`` wrote them."""
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
        notes=read_notes(row["notes"]),
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
