"""The journal of models (table ``activations``): staged, building, self-test, trial, good; or failed, rolled back, withdrawn.

Every change is one durable transaction with its audit entry, so that a box that is switched off at any moment finds either the
state before or the one after. Which model reads patients changes in the same transaction as the state that says so.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from appliance.core.domain import Note, utc_now
from appliance.core.errors import ActivationError
from appliance.lifecycle.journal_queries import PROVING, Ledger, code_of, older
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.bundle import Manifest

Source = Literal["library", "usb", "hand", "embedded"]

MAX_ATTEMPTS: Final = 3
MARK_AT_ONCE: Final = 500
REFUSALS_AN_HOUR: Final = 8
_CONFIGURATION: Final[dict[str, Any]] = {"type": "110131", "type_meaning": "Software Configuration"}
_TRIAL_START: Final = {"cases": 0, "failures": 0, "latency_ms": None, "drift": None}


@dataclass(frozen=True)
class Wanted:
    """A model that is to be put to work: which, from where, on whose word."""

    name: str
    version: str
    digest: str
    source: Source
    origin: Path
    actor: str
    precision: str | None = None
    purpose: Literal["activate", "rollback"] = "activate"


class Journal(Ledger):
    """The journal over one store; what it says without changing anything is in :class:`appliance.lifecycle.journal_queries.Ledger`.

    Args:
        store: the box's store; its thread's connection is used.

    Attributes:
        changes: counts what was changed by this object, for whoever reports it.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store.database)
        self._store = store
        self.changes = 0

    # -- before the switch -------------------------------------------------------------------------------------------

    def enter(self, wanted: Wanted) -> int:
        """Begin an activation: staged. Another one of the line that is not at the switch yet gives way.

        Returns:
            The number of the activation.
        """
        with self._db.transaction() as tx:
            other = tx.execute(
                "SELECT * FROM activations WHERE name = ? AND state IN ('staged', 'building', 'self-test')", (wanted.name,)
            ).fetchone()
            if other is not None:
                self._end(tx, other, "failed", Note("activation.superseded", f"by {wanted.version}"))
            number = self._insert(tx, wanted, "staged")
            self._audit(tx, wanted.actor, wanted.name, wanted.version, wanted.digest, "staged", source=wanted.source)
        return number

    def refuse(self, wanted: Wanted, note: Note) -> None:
        """Write down that a model is wanted and why it was not begun.

        Once, however often it is wanted for the same reason; and some an hour for one line, whatever names a broken agent invents.
        """
        last = self._db.one("SELECT * FROM activations WHERE digest = ? AND device = ? ORDER BY id DESC", wanted.digest, self.device)
        if last is not None and last["state"] in ("failed", "withdrawn") and code_of(last) == note.code:
            return
        if self.refused_lately(wanted.name) >= REFUSALS_AN_HOUR:
            return
        with self._db.transaction() as tx:
            number = self._insert(tx, wanted, "failed", reason=json.dumps(note.to_json(), ensure_ascii=False), ended_at=utc_now())
            self._audit(tx, wanted.actor, wanted.name, wanted.version, wanted.digest, "failed", 8, code=note.code, activation=number)

    def begin(self, number: int) -> bool:
        """Count an attempt at the proof, from the start; after three that ended in silence it has failed. Returns whether to go on."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, PROVING)
            if row["attempts"] >= MAX_ATTEMPTS:
                self._end(tx, row, "failed", Note("activation.crash_loop", f"{row['attempts']} attempts, last in {row['state']}"))
                return False
            self._set(tx, number, state="staged", attempts=row["attempts"] + 1, progress=0.0, self_test=None)
            self._audit_row(tx, row, "staged", attempt=row["attempts"] + 1)
        return True

    def advance(self, number: int, state: str) -> None:
        """The proof has come to its next state."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, PROVING)
            self._set(tx, number, state=state, progress=0.0)
            self._audit_row(tx, row, state)

    def progress(self, number: int, progress: float) -> None:
        """How far the state is; only shown, so a power cut may forget it."""
        with self._db.transaction(durable=False) as tx:
            tx.execute("UPDATE activations SET progress = ?, updated_at = ? WHERE id = ?", (progress, utc_now(), number))

    def proved(self, number: int, report: dict[str, Any]) -> None:
        """The self-test was passed: keep what was measured."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, PROVING)
            self._set(tx, number, state="self-test", progress=1.0, self_test=json.dumps(report))
            self._audit_row(tx, row, "self-test", passed=True)

    def fail(self, number: int, note: Note) -> None:
        """The model was not put to work; the one before it goes on reading."""
        with self._db.transaction() as tx:
            self._end(tx, self._expect(tx, number, PROVING), "failed", note)

    def pause(self, numbers: list[int]) -> None:
        """These proofs were broken off for what was no fault of theirs: no failed attempts."""
        if coming := [number for number in numbers if self.row(number)["state"] in PROVING]:
            with self._db.transaction() as tx:
                tx.execute(
                    "UPDATE activations SET attempts = max(0, attempts - 1) WHERE id IN (SELECT value FROM json_each(?))",
                    (json.dumps(coming),),
                )

    # -- the switch and after ----------------------------------------------------------------------------------------

    def switch(self, number: int, manifest: Manifest) -> None:
        """Put a proven model to work: pointer, the one before it, the state, and audit in one transaction.

        A model with one before it is on trial from now on. One without, or one that a person goes back to, is good; the first of
        a line is watched all the same, to raise the alarm where nothing can be fallen back to.

        Raises:
            ActivationError: the index of the line forbids this version, or the activation ended meanwhile; nothing was changed.
        """
        with self._db.transaction() as tx:
            row = self._expect(tx, number, ("self-test",))
            if barred := self.barred(row["name"], row["version"]):
                raise ActivationError(barred.code, barred.detail)
            report = json.loads(row["self_test"])
            current = tx.execute("SELECT * FROM models WHERE name = ? AND state = 'active'", (row["name"],)).fetchone()
            replaces = current is not None and current["digest"] != row["digest"]
            unproven = self._leave(tx, row, current) if replaces else False
            values = {
                "digest": row["digest"], "name": row["name"], "version": row["version"], "directory": f"models/{row['digest']}",
                "manifest": manifest.to_json().decode(), "precision": report["precision"], "runtime": report["runtime"],
                "self_test": row["self_test"],
            }  # fmt: skip
            self._store.switch_within(tx, values, row["actor"], keep_previous=unproven)
            state = "trial" if replaces and row["purpose"] == "activate" else "good"
            start = _TRIAL_START | {"since": utc_now(), "after_job": _last_job(tx), "watching": current is None}
            ended = None if state == "trial" else utc_now()
            self._set(tx, number, state=state, attempts=0, progress=0.0, trial=json.dumps(start), ended_at=ended)
            if replaces and row["purpose"] == "rollback":
                self._store.planner.hand_over(tx, current["digest"], row["digest"], Note("activation.by_hand"))

    def _leave(self, tx: sqlite3.Connection, row: sqlite3.Row, current: sqlite3.Row) -> bool:
        """What becomes of the model that is replaced; returns whether it must not be fallen back to."""
        trial = tx.execute("SELECT * FROM activations WHERE name = ? AND state = 'trial'", (row["name"],)).fetchone()
        if row["purpose"] == "rollback":
            last = trial or self._entry(tx, current)
            self._end(tx, last, "rolled-back", Note("activation.by_hand", row["actor"]), marked=0)
            self._mark(tx, last["id"], current["digest"], "rolled-back", Note("activation.by_hand"))
            return True
        if trial is not None:
            self._end(tx, trial, "rolled-back", Note("activation.superseded", f"by {row['version']} while on trial"))
        return trial is not None

    def worker_fell(self, at_work: Collection[str]) -> list[sqlite3.Row]:
        """Count a fall of the worker against the trials it may have fallen of; returns those it fell of too often without a finished case.

        Args:
            at_work: digests of the models that it was reading with, or loading, when it fell. A power cut while nothing is read, or a
                film that no model reads, is no model's fault.
        """
        fallen = [row["id"] for row in self.watched() if row["state"] == "trial" and row["digest"] in at_work]
        if fallen:
            with self._db.transaction() as tx:
                tx.execute(
                    "UPDATE activations SET attempts = attempts + 1 WHERE state = 'trial' AND id IN (SELECT value FROM json_each(?))",
                    (json.dumps(fallen),),
                )
        return self._db.query("SELECT * FROM activations WHERE state = 'trial' AND attempts >= ?", MAX_ATTEMPTS)

    def loading(self, digests: Collection[str]) -> list[str]:
        """Note which models a worker is about to load, none once it has; returns what was noted before: what it fell over."""
        known = self._db.one("SELECT value FROM meta WHERE key = 'worker_loading'")
        before: list[str] = json.loads(known["value"]) if known else []
        if before != sorted(digests):
            with self._db.transaction() as tx:
                tx.execute("INSERT OR REPLACE INTO meta VALUES ('worker_loading', ?)", (json.dumps(sorted(digests)),))
        return before

    def observed(self, number: int, trial: dict[str, Any], *, case_finished: bool) -> None:
        """Keep what was counted on trial; a finished case shows that the worker lives with this model."""
        with self._db.transaction(durable=False) as tx:
            tx.execute(
                "UPDATE activations SET trial = ?, updated_at = ?, attempts = CASE WHEN ? THEN 0 ELSE attempts END WHERE id = ?",
                (json.dumps(trial), utc_now(), case_finished, number),
            )

    def passed(self, number: int, trial: dict[str, Any]) -> None:
        """The trial, or the watch over the first model of a line, ended well."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, ("trial", "good"))
            self._set(tx, number, state="good", progress=1.0, trial=json.dumps(trial | {"watching": False}), ended_at=utc_now())
            self._audit_row(tx, row, "good")

    def alarmed(self, number: int, trial: dict[str, Any], note: Note) -> None:
        """The only model of its line is out of its bounds: it goes on reading, since there is none to fall back to, and that is said."""
        with self._db.transaction() as tx:
            row = self._expect(tx, number, ("good",))
            self._set(tx, number, trial=json.dumps(trial | {"watching": False}), reason=json.dumps(note.to_json(), ensure_ascii=False))
            self._audit_row(tx, row, "good", 8, code=note.code)

    def roll_back(self, number: int, note: Note, successor: str | None) -> None:
        """A model on trial is taken back: the one before it reads again, or none does, in one transaction.

        What still waits for it, or failed under it, goes to its successor; what it found stays and gets a note.
        """
        with self._db.transaction() as tx:
            row = self._expect(tx, number, ("trial",))
            self._end(tx, row, "rolled-back", note, marked=0)
            self._replace(tx, row["name"], row["digest"], successor, note)
            self._mark(tx, number, row["digest"], "rolled-back", note)

    def withdraw(self, digest: str, note: Note, successor: str | None) -> None:
        """The library withdrew a version: it reads no more, in one transaction; what it found gets a note with the reason."""
        with self._db.transaction() as tx:
            model = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            row = self._entry(tx, model)
            self._end(tx, row, "withdrawn", note, marked=0)
            if model["state"] != "active":  # its successor reads already
                now = tx.execute("SELECT digest FROM models WHERE name = ? AND state = 'active'", (model["name"],)).fetchone()
                self._store.planner.hand_over(tx, digest, now["digest"] if now else None, note)
                tx.execute("UPDATE models SET state = 'retired' WHERE digest = ?", (digest,))
            else:
                self._replace(tx, model["name"], digest, successor, note)
            self._mark(tx, row["id"], digest, "withdrawn", note)

    def mark_findings(self) -> bool:
        """Go on with the notes on what a version found that was taken back; returns whether there is more to do."""
        row = self._db.one("SELECT * FROM activations WHERE marked = 0 ORDER BY id LIMIT 1")
        if row is None:
            return False
        with self._db.transaction() as tx:
            self._mark(tx, row["id"], row["digest"], row["state"], Note(**json.loads(row["reason"])))
        return True

    def restrict(self, name: str, minimum_version: str, withdrawn: dict[str, str]) -> bool:
        """Take over what the signed index of a line forbids; the minimum only rises, the withdrawn only become more.

        Returns whether that changed anything.
        """
        with self._db.transaction() as tx:
            line = tx.execute("SELECT * FROM model_lines WHERE name = ?", (name,)).fetchone()
            known = json.loads(line["withdrawn"]) if line else {}
            minimum = line["minimum_version"] if line and older(minimum_version, line["minimum_version"]) else minimum_version
            more = withdrawn | known
            if line is not None and (minimum, more) == (line["minimum_version"], known):
                return False
            Database.insert(
                tx, "model_lines", "ON CONFLICT (name) DO UPDATE SET minimum_version = excluded.minimum_version,"
                " withdrawn = excluded.withdrawn, updated_at = excluded.updated_at",
                name=name, minimum_version=minimum, withdrawn=json.dumps(more, ensure_ascii=False), updated_at=utc_now(),
            )  # fmt: skip
            Database.audit(tx, db.SECURITY_ALERT, "worker", "U", f"line:{name}", **_CONFIGURATION, minimum=minimum, withdrawn=sorted(more))
        self.changes += 1
        return True

    # -- inside a transaction ----------------------------------------------------------------------------------------

    def _replace(self, tx: sqlite3.Connection, name: str, digest: str, successor: str | None, note: Note) -> None:
        tx.execute("UPDATE models SET state = 'retired' WHERE digest = ?", (digest,))
        if successor is not None:
            self._store.resume_within(tx, successor)
        else:
            Database.audit(tx, db.SECURITY_ALERT, "worker", "U", f"line:{name}", 12, **_CONFIGURATION, code=note.code, model="none")
        self._store.planner.hand_over(tx, digest, successor, note)

    def _mark(self, tx: sqlite3.Connection, number: int, digest: str, state: str, note: Note) -> None:
        """Notes on findings, as many as one transaction may take without keeping a scan waiting."""
        what = note if state == "withdrawn" else Note("activation.rolled_back", note.code)
        if self._store.planner.note_findings(tx, digest, what, MARK_AT_ONCE) < MARK_AT_ONCE:
            tx.execute("UPDATE activations SET marked = 1 WHERE id = ?", (number,))

    def _entry(self, tx: sqlite3.Connection, model: sqlite3.Row) -> sqlite3.Row:
        """The last entry of a model that read patients; made now for one that is older than the journal."""
        row: sqlite3.Row | None = tx.execute(
            "SELECT * FROM activations WHERE digest = ? AND state NOT IN ('failed', 'staged', 'building', 'self-test') ORDER BY id DESC",
            (model["digest"],),
        ).fetchone()
        if row is not None:
            return row
        origin = self._store.settings.data_dir / model["directory"]
        number = self._insert(tx, Wanted(model["name"], model["version"], model["digest"], "hand", origin, "worker"), "good")
        entry: sqlite3.Row = tx.execute("SELECT * FROM activations WHERE id = ?", (number,)).fetchone()
        return entry

    def _insert(self, tx: sqlite3.Connection, wanted: Wanted, state: str, **values: Any) -> int:
        now = utc_now()
        self.changes += 1
        return Database.insert(
            tx, "activations", name=wanted.name, version=wanted.version, digest=wanted.digest, device=self.device, source=wanted.source,
            origin=str(wanted.origin), precision=wanted.precision, purpose=wanted.purpose, state=state, actor=wanted.actor,
            started_at=now, updated_at=now, **values,
        )  # fmt: skip

    def _end(self, tx: sqlite3.Connection, row: sqlite3.Row, state: str, note: Note, **values: Any) -> None:
        reason = json.dumps(note.to_json(), ensure_ascii=False)
        self._set(tx, row["id"], state=state, reason=reason, ended_at=utc_now(), **values)
        self._audit_row(tx, row, state, 8, code=note.code)

    def _set(self, tx: sqlite3.Connection, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = :{name}" for name in values)
        tx.execute(f"UPDATE activations SET {columns}, updated_at = :now WHERE id = :id", values | {"now": utc_now(), "id": number})  # noqa: S608
        self.changes += 1

    @staticmethod
    def _expect(tx: sqlite3.Connection, number: int, states: tuple[str, ...]) -> sqlite3.Row:
        """The row, when it is still in one of these states; raises ActivationError ``activation.ended``."""
        row: sqlite3.Row | None = tx.execute("SELECT * FROM activations WHERE id = ?", (number,)).fetchone()
        if row is None or row["state"] not in states:
            raise ActivationError("activation.ended", f"activation {number} is {row['state'] if row else 'gone'}")
        return row

    def _audit_row(self, tx: sqlite3.Connection, row: sqlite3.Row, state: str, outcome: int = 0, **detail: Any) -> None:
        self._audit(tx, row["actor"], row["name"], row["version"], row["digest"], state, outcome, **detail)

    @staticmethod
    def _audit(
        tx: sqlite3.Connection, actor: str, name: str, version: str, digest: str, state: str, outcome: int = 0, **detail: Any
    ) -> None:
        event = db.APPLICATION_ACTIVITY if state in PROVING else db.SECURITY_ALERT
        kind: dict[str, Any] = {} if state in PROVING else _CONFIGURATION
        Database.audit(tx, event, actor, "U", f"model:{digest[:12]}", outcome, **kind, name=name, version=version, state=state, **detail)


def _last_job(tx: sqlite3.Connection) -> int:
    return int(tx.execute("SELECT coalesce(max(id), 0) FROM jobs").fetchone()[0])
