"""The journal of models (table ``activations``): staged, building, self-test, trial, good; or failed, rolled back, withdrawn.

Every change is one durable transaction with its audit entry: after a power cut at any moment the box finds the state before the
change or the state after it. The active model changes in the same transaction as the state of its activation.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from appliance.core.attempts import MAX_ATTEMPTS, MAX_INTERRUPTED, Attempts
from appliance.core.domain import Note, utc_now
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import IN_USE_STATES, PENDING_STATES, ActivationState, ModelState
from appliance.lifecycle.journal_queries import INTERRUPTED, PENDING_JSON, JournalQueries, is_older, reason_code, reason_of
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.atomic_files import boot_id
from model_sync.bundle import Manifest

Source = Literal["library", "usb", "hand", "embedded"]
_States: TypeAlias = tuple[ActivationState, ...]

FINDINGS_PER_STEP: Final = 500
REFUSALS_PER_HOUR: Final = 8
CONFIGURATION: Final[dict[str, Any]] = {"type": "110131", "type_meaning": "Software Configuration"}
_TRIAL_START: Final = {"cases": 0, "failures": 0, "latency_ms": None, "drift": None}
_NEVER_USED_JSON: Final = json.dumps((ActivationState.FAILED, *PENDING_STATES))


@dataclass(frozen=True)
class ActivationRequest:
    """A model that is to be activated: which, from where (``origin``, a bundle directory), requested by whom (``source``, ``actor``)."""

    name: str
    version: str
    digest: str
    source: Source
    origin: Path
    actor: str
    precision: str | None = None
    purpose: Literal["activate", "rollback"] = "activate"


class Journal(JournalQueries):
    """The journal of one store.

    Args:
        store: of the box; the connection of the calling thread is used.

    Attributes:
        changes: how many changes this object made; after an increase a new report is written.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store.database)
        self._store = store
        self.changes = 0

    def start(self, request: ActivationRequest) -> int:
        """Begin an activation in state ``staged``; a pending activation of the same model line is superseded.

        Returns:
            The number of the activation.
        """
        with self._db.transaction() as tx:
            other = tx.execute(
                "SELECT * FROM activations WHERE name = ? AND state IN (SELECT value FROM json_each(?))", (request.name, PENDING_JSON)
            ).fetchone()
            if other is not None:
                self._end(tx, other, ActivationState.FAILED, Note("activation.superseded", f"by {request.version}"))
            number = self._insert(tx, request, ActivationState.STAGED)
            self._audit(tx, request.actor, request, ActivationState.STAGED, source=request.source)
        return number

    def record_refusal(self, request: ActivationRequest, note: Note) -> None:
        """Record that a model was requested and why its activation was not begun.

        The same reason is recorded once however often the model is requested, and only some refusals per hour and model line: a
        faulty sync agent could invent names.
        """
        last = self._db.one("SELECT * FROM activations WHERE digest = ? AND device = ? ORDER BY id DESC", request.digest, self.device)
        ended = (ActivationState.FAILED, ActivationState.WITHDRAWN)
        if last is not None and last["state"] in ended and reason_code(last) == note.code:
            return
        if self.count_recent_refusals(request.name) >= REFUSALS_PER_HOUR:
            return
        with self._db.transaction() as tx:
            number = self._insert(tx, request, ActivationState.FAILED, reason=_stored(note), ended_at=utc_now())
            self._audit(tx, request.actor, request, ActivationState.FAILED, 8, code=note.code, activation=number)

    def begin_attempt(self, number: int) -> bool:
        """Count an attempt at the self-test. Returns whether to run it.

        After three that crashed the activation fails for good on this device. Attempts that a new boot ended do not count among them; after
        ten it fails for now. A later activation of the same model then fails with the first one: no model takes a machine down again and
        again.
        """
        with self._db.transaction() as tx:
            row = self._expect(tx, number, PENDING_STATES)
            attempts = _attempts(row).since_boot()
            most = 1 if self.was_interrupted_before(row["digest"]) else MAX_INTERRUPTED
            if attempts.begun >= MAX_ATTEMPTS or attempts.interrupted >= most:
                is_crash = attempts.begun >= MAX_ATTEMPTS
                count = attempts.begun if is_crash else attempts.interrupted
                note = Note("activation.crash_loop" if is_crash else INTERRUPTED, f"{count} attempts, last in {row['state']}")
                self._end(tx, row, ActivationState.FAILED, note)
                return False
            attempts = attempts.begin()
            self._set(tx, number, state=ActivationState.STAGED.value, progress=0.0, self_test=None, **_columns(attempts))
            self._audit(tx, row["actor"], row, ActivationState.STAGED, attempt=attempts.begun)
        return True

    def set_state(self, number: int, state: ActivationState) -> None:
        """Record that the self-test reached its next phase."""
        self._advance(number, PENDING_STATES, state, {"progress": 0.0})

    def set_progress(self, number: int, progress: float) -> None:
        """Record the progress (0 to 1) of the current phase; not durable, as it is only displayed."""
        with self._db.transaction(durable=False) as tx:
            tx.execute("UPDATE activations SET progress = ?, updated_at = ? WHERE id = ?", (progress, utc_now(), number))

    def record_self_test(self, number: int, report: SelfTestReport) -> None:
        """Record that the self-test was passed, with its report."""
        values = {"progress": 1.0, "self_test": json.dumps(report.to_json())}
        self._advance(number, PENDING_STATES, ActivationState.SELF_TEST, values, passed=True)

    def fail(self, number: int, note: Note) -> None:
        """Record that the model was not activated; the active model of the line stays active."""
        with self._db.transaction() as tx:
            self._end(tx, self._expect(tx, number, PENDING_STATES), ActivationState.FAILED, note)

    def cancel_attempts(self, numbers: list[int]) -> None:
        """Take back the current attempt of activations whose self-test was stopped for a reason that is not the model's fault."""
        if pending := [row for number in numbers if (row := self.row(number))["state"] in PENDING_STATES]:
            with self._db.transaction() as tx:
                for row in pending:
                    self._set(tx, row["id"], **_columns(_attempts(row).take_back()))

    def switch(self, number: int, manifest: Manifest) -> None:
        """Activate a tested model: active model, previous model, state and audit entry change in one transaction.

        A model that replaces another one is on trial from now on. The first model of its line, and one that a person rolled back to, is
        good at once; the first of a line is monitored all the same, so that an alarm is raised though there is nothing to roll back to.

        Raises:
            ActivationError: the index of the model line forbids this version, or the activation ended meanwhile; nothing has changed.
        """
        with self._db.transaction() as tx:
            row = self._expect(tx, number, (ActivationState.SELF_TEST,))
            if restriction := self.find_restriction(row["name"], row["version"]):
                raise ActivationError(restriction.code, restriction.detail)
            report = SelfTestReport.from_json(row["self_test"])
            current = self.active(row["name"])
            replaces = current is not None and current["digest"] != row["digest"]
            keep_previous = self._end_previous(tx, row, current) if current is not None and replaces else False
            values = {
                "digest": row["digest"], "name": row["name"], "version": row["version"], "directory": f"models/{row['digest']}",
                "manifest": manifest.to_json().decode(), "precision": report.precision, "runtime": report.runtime,
                "self_test": row["self_test"],
            }  # fmt: skip
            self._store.switch_within(tx, values, row["actor"], keep_previous=keep_previous)
            is_trial = replaces and row["purpose"] == "activate"
            state = ActivationState.TRIAL if is_trial else ActivationState.GOOD
            (last_job,) = tx.execute("SELECT coalesce(max(id), 0) FROM jobs").fetchone()
            trial = _TRIAL_START | {"since": utc_now(), "after_job": last_job, "watching": current is None}
            ended = None if is_trial else utc_now()
            self._set(
                tx, number, state=state.value, progress=0.0, trial=json.dumps(trial), ended_at=ended, **_columns(Attempts(0, 0, boot_id()))
            )
            if current is not None and replaces and row["purpose"] == "rollback":
                self._store.planner.hand_over(tx, current["digest"], row["digest"], Note("activation.by_hand"))

    def _end_previous(self, tx: sqlite3.Connection, row: sqlite3.Row, current: sqlite3.Row) -> bool:
        """End the activation of the model that is replaced; returns True if nobody may roll back to that model."""
        trial = tx.execute(
            "SELECT * FROM activations WHERE name = ? AND state = ?", (row["name"], ActivationState.TRIAL.value)
        ).fetchone()  # fmt: skip
        if row["purpose"] == "rollback":
            last = trial or self._last_use(tx, current)
            self._end(tx, last, ActivationState.ROLLED_BACK, Note("activation.by_hand", row["actor"]), marked=0)
            self._annotate(tx, last["id"], current["digest"], ActivationState.ROLLED_BACK, Note("activation.by_hand"))
            return True
        if trial is not None:
            self._end(tx, trial, ActivationState.ROLLED_BACK, Note("activation.superseded", f"by {row['version']} while on trial"))
        return trial is not None

    def count_worker_crash(self, suspects: Collection[str]) -> list[sqlite3.Row]:
        """Count a crash of the worker for every suspect that is on trial; called once when a worker starts.

        Where the machine booted since the last worker started it is no crash: the attempt counts as interrupted.

        Args:
            suspects: digests of the models that analysed scans, or were being loaded, when the worker crashed. After a power cut of an
                idle box, or a crash while an image was only decoded, there are none.

        Returns:
            The activations that reached a limit without a finished case.
        """
        trial = ActivationState.TRIAL.value
        for row in self.monitored():
            before = _attempts(row)
            after = Attempts(before.begun + 1, before.interrupted, before.boot_id).since_boot() if row["digest"] in suspects else before
            after = after._replace(boot_id=boot_id())
            if row["state"] == trial and after != before:
                with self._db.transaction() as tx:
                    tx.execute(
                        "UPDATE activations SET attempts = :attempts, interrupted = :interrupted, boot_id = :boot_id WHERE id = :id",
                        _columns(after) | {"id": row["id"]},
                    )
        return self._db.query(
            "SELECT * FROM activations WHERE state = ? AND (attempts >= ? OR interrupted >= ?)", trial, MAX_ATTEMPTS, MAX_INTERRUPTED
        )

    def replace_loading_marker(self, digests: Collection[str]) -> list[str]:
        """Store which models the worker is about to load (none once it has loaded them); returns what was stored before."""
        known = self._db.one("SELECT value FROM meta WHERE key = 'worker_loading'")
        before: list[str] = json.loads(known["value"]) if known else []
        if before != sorted(digests):
            with self._db.transaction() as tx:
                tx.execute("INSERT OR REPLACE INTO meta VALUES ('worker_loading', ?)", (json.dumps(sorted(digests)),))
        return before

    def record_statistics(self, number: int, trial: dict[str, Any], *, case_finished: bool) -> None:
        """Store the statistics of a trial; a finished case resets the count of crashes."""
        with self._db.transaction(durable=False) as tx:
            tx.execute(
                "UPDATE activations SET trial = ?1, updated_at = ?2, attempts = CASE WHEN ?3 THEN 0 ELSE attempts END,"
                " interrupted = CASE WHEN ?3 THEN 0 ELSE interrupted END WHERE id = ?4",
                (json.dumps(trial), utc_now(), case_finished, number),
            )

    def complete_trial(self, number: int, trial: dict[str, Any]) -> None:
        """End the trial, or the monitoring of the first model of a line, as good."""
        values = {"progress": 1.0, "trial": json.dumps(trial | {"watching": False}), "ended_at": utc_now()}
        self._advance(number, IN_USE_STATES, ActivationState.GOOD, values)

    def record_alarm(self, number: int, trial: dict[str, Any], note: Note) -> None:
        """Raise the alarm for the only model of its line: it exceeds its limits, and there is none to roll back to."""
        values = {"trial": json.dumps(trial | {"watching": False}), "reason": _stored(note)}
        self._advance(number, (ActivationState.GOOD,), ActivationState.GOOD, values, 8, code=note.code)

    def roll_back(self, number: int, note: Note, successor: str | None) -> None:
        """Replace a model on trial by its successor, or by none, in one transaction.

        Its waiting and failed jobs go to the successor; its findings stay and are annotated.
        """
        with self._db.transaction() as tx:
            row = self._expect(tx, number, (ActivationState.TRIAL,))
            self._end(tx, row, ActivationState.ROLLED_BACK, note, marked=0)
            self._replace(tx, row["name"], row["digest"], successor, note)
            self._annotate(tx, number, row["digest"], ActivationState.ROLLED_BACK, note)

    def withdraw(self, digest: str, note: Note, successor: str | None) -> None:
        """Retire a version that the library withdrew, in one transaction; its findings are annotated with the reason."""
        with self._db.transaction() as tx:
            model = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            row = self._last_use(tx, model)
            self._end(tx, row, ActivationState.WITHDRAWN, note, marked=0)
            if model["state"] != ModelState.ACTIVE:  # its successor is active already
                now = self.active(model["name"])
                self._store.planner.hand_over(tx, digest, now["digest"] if now else None, note)
                _retire(tx, digest)
            else:
                self._replace(tx, model["name"], digest, successor, note)
            self._annotate(tx, row["id"], digest, ActivationState.WITHDRAWN, note)

    def annotate_findings(self) -> bool:
        """Continue to annotate the findings of versions that were replaced; returns whether there may be more to do."""
        row = self._db.one("SELECT * FROM activations WHERE marked = 0 ORDER BY id LIMIT 1")
        if row is None:
            return False
        with self._db.transaction() as tx:
            self._annotate(tx, row["id"], row["digest"], row["state"], reason_of(row))
        return True

    def record_restrictions(self, name: str, minimum_version: str, withdrawn: dict[str, str]) -> bool:
        """Store what the signed index of a model line forbids; the minimum version only rises, withdrawn versions are only added.

        Returns:
            Whether that changed anything.
        """
        with self._db.transaction() as tx:
            line = tx.execute("SELECT * FROM model_lines WHERE name = ?", (name,)).fetchone()
            known = json.loads(line["withdrawn"]) if line else {}
            minimum = line["minimum_version"] if line and is_older(minimum_version, line["minimum_version"]) else minimum_version
            more = withdrawn | known
            if line is not None and (minimum, more) == (line["minimum_version"], known):
                return False
            Database.insert(
                tx, "model_lines", "ON CONFLICT (name) DO UPDATE SET minimum_version = excluded.minimum_version,"
                " withdrawn = excluded.withdrawn, updated_at = excluded.updated_at",
                name=name, minimum_version=minimum, withdrawn=json.dumps(more, ensure_ascii=False), updated_at=utc_now(),
            )  # fmt: skip
            Database.audit(tx, db.SECURITY_ALERT, "worker", "U", f"line:{name}", **CONFIGURATION, minimum=minimum, withdrawn=sorted(more))
        self.changes += 1
        return True

    def _advance(
        self, number: int, expected: _States, state: ActivationState, values: dict[str, Any], outcome: int = 0, **detail: Any
    ) -> None:
        """Change the state and other columns of an activation in a transaction of its own."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, expected)
            self._set(tx, number, state=state.value, **values)
            self._audit(tx, row["actor"], row, state, outcome, **detail)

    def _replace(self, tx: sqlite3.Connection, name: str, digest: str, successor: str | None, note: Note) -> None:
        _retire(tx, digest)
        if successor is not None:
            self._store.resume_within(tx, successor)
        else:
            Database.audit(tx, db.SECURITY_ALERT, "worker", "U", f"line:{name}", 12, **CONFIGURATION, code=note.code, model="none")
        self._store.planner.hand_over(tx, digest, successor, note)

    def _annotate(self, tx: sqlite3.Connection, number: int, digest: str, state: str, note: Note) -> None:
        """Annotate as many findings as one transaction may change without delaying the ingest of scans."""
        annotation = note if state == ActivationState.WITHDRAWN else Note("activation.rolled_back", note.code)
        if self._store.planner.note_findings(tx, digest, annotation, FINDINGS_PER_STEP) < FINDINGS_PER_STEP:
            tx.execute("UPDATE activations SET marked = 1 WHERE id = ?", (number,))

    def _last_use(self, tx: sqlite3.Connection, model: sqlite3.Row) -> sqlite3.Row:
        """Return the last activation that put a model to work; it is created for a model that is older than the journal."""
        row: sqlite3.Row | None = tx.execute(
            "SELECT * FROM activations WHERE digest = ? AND state NOT IN (SELECT value FROM json_each(?)) ORDER BY id DESC",
            (model["digest"], _NEVER_USED_JSON),
        ).fetchone()
        if row is not None:
            return row
        origin = self._store.settings.data_dir / model["directory"]
        request = ActivationRequest(model["name"], model["version"], model["digest"], "hand", origin, "worker")
        number = self._insert(tx, request, ActivationState.GOOD)
        created: sqlite3.Row = tx.execute("SELECT * FROM activations WHERE id = ?", (number,)).fetchone()
        return created

    def _insert(self, tx: sqlite3.Connection, request: ActivationRequest, state: ActivationState, **values: Any) -> int:
        now = utc_now()
        self.changes += 1
        return Database.insert(
            tx, "activations", name=request.name, version=request.version, digest=request.digest, device=self.device,
            source=request.source, origin=str(request.origin), precision=request.precision, purpose=request.purpose, state=state.value,
            actor=request.actor, started_at=now, updated_at=now, **values,
        )  # fmt: skip

    def _end(self, tx: sqlite3.Connection, row: sqlite3.Row, state: ActivationState, note: Note, **values: Any) -> None:
        self._set(tx, row["id"], state=state.value, reason=_stored(note), ended_at=utc_now(), **values)
        self._audit(tx, row["actor"], row, state, 8, code=note.code)

    def _set(self, tx: sqlite3.Connection, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = :{name}" for name in values)
        tx.execute(f"UPDATE activations SET {columns}, updated_at = :now WHERE id = :id", values | {"now": utc_now(), "id": number})  # noqa: S608
        self.changes += 1

    @staticmethod
    def _expect(tx: sqlite3.Connection, number: int, states: _States) -> sqlite3.Row:
        """Return an activation that is still in one of these states; raises ActivationError ``activation.ended``."""
        row: sqlite3.Row | None = tx.execute("SELECT * FROM activations WHERE id = ?", (number,)).fetchone()
        if row is None or row["state"] not in states:
            raise ActivationError("activation.ended", f"activation {number} is {row['state'] if row else 'gone'}")
        return row

    @staticmethod
    def _audit(
        tx: sqlite3.Connection, actor: str, model: sqlite3.Row | ActivationRequest, state: ActivationState, outcome: int = 0, **detail: Any
    ) -> None:
        """Write the audit entry of a change; ``outcome`` as in DICOM PS3.15 A.5 (0 success, 4 minor, 8 serious, 12 major failure)."""
        value = vars(model) if isinstance(model, ActivationRequest) else model
        event = db.APPLICATION_ACTIVITY if state in PENDING_STATES else db.SECURITY_ALERT
        kind: dict[str, Any] = {} if state in PENDING_STATES else CONFIGURATION
        Database.audit(
            tx, event, actor, "U", f"model:{value['digest'][:12]}", outcome, **kind, name=value["name"], version=value["version"],
            state=state.value, **detail,
        )  # fmt: skip


def _stored(note: Note) -> str:
    return json.dumps(note.to_json(), ensure_ascii=False)


def _attempts(row: sqlite3.Row) -> Attempts:
    return Attempts(row["attempts"], row["interrupted"], row["boot_id"])


def _columns(attempts: Attempts) -> dict[str, Any]:
    return {"attempts": attempts.begun, "interrupted": attempts.interrupted, "boot_id": attempts.boot_id}


def _retire(tx: sqlite3.Connection, digest: str) -> None:
    tx.execute("UPDATE models SET state = ? WHERE digest = ?", (ModelState.RETIRED.value, digest))
