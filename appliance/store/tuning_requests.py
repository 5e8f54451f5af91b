"""Measuring a model at work again: who asked, how far it is, and the one transaction in which another way of running it is taken.

A measuring is not a version: it has no entry in the journal of activations, and a trial goes on counting through it. What is under way
stands in ``meta`` under ``tuning:<digest>``, one for each model; what came of it in the model's ``self_test``, and all of it in the audit.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note, utc_now
from appliance.store import database as db
from appliance.store.database import Database

MAX_ATTEMPTS: Final = 3
# One that nobody waits for begins when no scan does; a box that is never idle does it all the same, at some time.
_PATIENCE: Final = timedelta(minutes=10)
_KEY: Final = "tuning:"
_STATES: Final = ("asked", "measuring", "done", "failed")
_DETAIL: Final = 200
# Of what a runtime says of itself, what a person is told; see :class:`appliance.core.run_summary.Ran`.
_RAN: Final = ("runtime", "version", "provider", "precision", "ran")
_CONFIGURATION: Final[dict[str, Any]] = {"type": "110131", "type_meaning": "Software Configuration"}


@dataclass(frozen=True)
class Tuning:
    """One measuring; ``state`` is asked, measuring, done or failed, ``step`` and ``progress`` (0 to 1) how far it is."""

    digest: str
    name: str
    state: str
    actor: str
    asked_at: str
    updated_at: str
    step: str = ""
    progress: float = 0.0
    attempts: int = 0
    reason: Note | None = None
    profile: str = ""

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("asked", "measuring")

    @classmethod
    def from_json(cls, digest: str, text: str) -> Tuning:
        """Read what :meth:`to_json` wrote, here or in a newer appliance, whose further fields are left out.

        What cannot be read is one that has failed, and says that: it stops nothing, is shown, and gives way to the next that is asked for.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.get("digest") != digest:
                raise ValueError("it is of no model or of another")
            known = {item.name: values[item.name] for item in fields(cls) if item.name in values and item.name != "reason"}
            reason = values.get("reason")
            read = cls(**known, reason=None if reason is None else Note(str(reason["code"]), str(reason["detail"])))
            read._check()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            note = Note("tune.unreadable", f"{type(error).__name__}: {str(error)[:_DETAIL]}")
            return cls(digest, "", "failed", "worker", "", "", reason=note)
        return read

    def _check(self) -> None:
        """Raise ValueError or TypeError where a field is not what it must be."""
        texts = (self.name, self.actor, self.updated_at, self.step, self.profile)
        if self.state not in _STATES or not all(isinstance(text, str) for text in texts):
            raise ValueError("a field is none of ours")
        if datetime.fromisoformat(self.asked_at).tzinfo is None:
            raise ValueError("a time without a zone")
        if type(self.attempts) is not int or not 0 <= self.progress <= 1:
            raise ValueError("a number is none of ours")

    def to_json(self) -> str:
        """As stored."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Tunings:
    """The measurings of one box.

    Args:
        database: the box's database; the connection of the thread that asks is used.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, digest: str) -> Tuning | None:
        """The last measuring of a model since it was put to work, if there was one."""
        row = self._db.one("SELECT value FROM meta WHERE key = ?", _KEY + digest)
        return Tuning.from_json(digest, row["value"]) if row else None

    def next(self) -> Tuning | None:
        """The one to go on with: what is under way, then what was asked for first; what nobody waits for lets scans go first."""
        rows = self._db.query("SELECT key, value FROM meta WHERE key GLOB ?", f"{_KEY}*")
        known = [item for item in (Tuning.from_json(row["key"].removeprefix(_KEY), row["value"]) for row in rows) if item.open]
        ready = [item for item in known if item.actor != "worker" or item.state == "measuring" or self._may_begin(item)]
        return min(ready, key=lambda item: (item.state != "measuring", item.actor == "worker", item.asked_at), default=None)

    def ask(self, digest: str, name: str, actor: str) -> Tuning:
        """Ask for a measuring; one that is under way already is the answer."""
        with self._db.transaction() as tx:
            row = tx.execute("SELECT value FROM meta WHERE key = ?", (_KEY + digest,)).fetchone()
            known = Tuning.from_json(digest, row["value"]) if row else None
            if known is not None and known.open and (known.actor != "worker" or actor == "worker"):
                return known
            fresh = Tuning(digest, name, "asked", actor, utc_now(), utc_now())
            asked = replace(known, actor=actor) if known is not None and known.open else fresh
            self._keep(tx, asked)
            Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "U", f"model:{digest[:12]}", name=name, tuning="asked")
        return asked

    def begin(self, tuning: Tuning) -> bool:
        """Count an attempt; after three that ended in silence it has failed. Returns whether to go on."""
        if tuning.attempts >= MAX_ATTEMPTS:
            self.fail(tuning, Note("activation.crash_loop", f"{tuning.attempts} attempts"))
            return False
        with self._db.transaction() as tx:
            self._keep(tx, replace(tuning, state="measuring", attempts=tuning.attempts + 1, step="staged", progress=0.0))
        return True

    def progress(self, tuning: Tuning, step: str, part: float) -> None:
        """How far it is; only shown, so a power cut may forget it."""
        with self._db.transaction(durable=False) as tx:
            self._keep(tx, replace(tuning, step=step, progress=part))

    def pause(self, tuning: Tuning) -> None:
        """It makes way for something that matters more: begun again later, no failed attempt."""
        with self._db.transaction() as tx:
            self._keep(tx, replace(tuning, state="asked", attempts=max(0, tuning.attempts - 1), step="", progress=0.0))

    def fail(self, tuning: Tuning, note: Note) -> None:
        """The model goes on being run as it was."""
        with self._db.transaction() as tx:
            self._keep(tx, replace(tuning, state="failed", reason=note, profile=device_profile.profile()))
            Database.audit(
                tx, db.APPLICATION_ACTIVITY, tuning.actor, "E", f"model:{tuning.digest[:12]}", 8, name=tuning.name, tuning="failed",
                code=note.code,
            )  # fmt: skip

    def done(self, tuning: Tuning, report: Mapping[str, Any]) -> None:
        """Take what was measured: how the model is run, the table, and the end of the measuring in one transaction.

        The trial of the model, its state and its place in the line stay as they are; what it took to read until now was the old
        way's, and is not held against the new one's self-test.
        """
        with self._db.transaction() as tx:
            tx.execute(
                "UPDATE models SET self_test = ?, precision = ?, runtime = ? WHERE digest = ?",
                (json.dumps(report), report["precision"], report["runtime"], tuning.digest),
            )
            self._other_way(tx, tuning.digest, report)
            self._keep(tx, replace(tuning, state="done", progress=1.0, reason=None, profile=str(report.get("profile", ""))))
            Database.audit(
                tx, db.SECURITY_ALERT, tuning.actor, "U", f"model:{tuning.digest[:12]}", **_CONFIGURATION, name=tuning.name,
                tuning="done", choice=report.get("choice"),
            )  # fmt: skip

    # -- what runs, which only the worker knows ----------------------------------------------------------------------

    def fell_back(self, digest: str, note: Note, ran: Mapping[str, Any]) -> None:
        """What was chosen could not be loaded, and the plain way reads in its place: kept with the model and shown, once.

        Args:
            digest: the model.
            note: what happened.
            ran: what runs now and why, as a result says.
        """
        with self._db.transaction() as tx:
            row = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            report = json.loads(row["self_test"])
            known, changed = (report.get("fallback") or {}).get("detail") == note.detail, self._runs(report, ran)
            if not known:
                report["fallback"] = note.to_json() | {"at": utc_now()}
            if changed or not known:
                tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))
            if known:
                return
            slowest = max((item["median_ms"] or 0.0 for item in report.get("table", [])), default=0.0)
            self._bound(tx, digest, report | {"watch_ms": slowest})
            Database.audit(
                tx, db.SECURITY_ALERT, "worker", "E", f"model:{digest[:12]}", 4, **_CONFIGURATION, name=row["name"], code=note.code,
                message=note.detail,
            )  # fmt: skip

    def runs_as_chosen(self, digest: str, ran: Mapping[str, Any]) -> None:
        """What was chosen runs, perhaps again; ``ran`` as in :meth:`fell_back`, whose reason may be another than when it was chosen."""
        with self._db.transaction() as tx:
            report = json.loads(tx.execute("SELECT self_test FROM models WHERE digest = ?", (digest,)).fetchone()["self_test"])
            fallback = report.pop("fallback", None)
            if self._runs(report, ran) or fallback is not None:
                tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))

    def cannot_run(self, digest: str, note: Note) -> None:
        """Nothing can run the model, the plain way neither: what it should read fails, which the status page has to say."""
        with self._db.transaction() as tx:
            row = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            report = json.loads(row["self_test"])
            report.pop("fallback", None)
            if not self._runs(report, {"reason": note.to_json()}):
                return
            tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))
            Database.audit(
                tx, db.SECURITY_ALERT, "worker", "E", f"model:{digest[:12]}", 8, **_CONFIGURATION, name=row["name"], code=note.code,
                message=note.detail,
            )  # fmt: skip

    @staticmethod
    def _runs(report: dict[str, Any], ran: Mapping[str, Any]) -> bool:
        """Write what runs now into a self-test, and since when; returns whether that is news."""
        now = {name: str(ran.get(name) or "") for name in _RAN} | {"reason": dict(ran.get("reason") or {})}
        if now | {"at": ""} == (report.get("runs") or {}) | {"at": ""}:
            return False
        report["runs"] = now | {"at": utc_now()}
        return True

    # -- inside a transaction ----------------------------------------------------------------------------------------

    @staticmethod
    def _watched(tx: sqlite3.Connection, digest: str) -> sqlite3.Row | None:
        """The entry of the journal whose model is watched, or was."""
        row: sqlite3.Row | None = tx.execute(
            "SELECT id, self_test, trial FROM activations WHERE digest = ? AND state IN ('trial', 'good') ORDER BY id DESC", (digest,)
        ).fetchone()
        return row

    @classmethod
    def _other_way(cls, tx: sqlite3.Connection, digest: str, report: Mapping[str, Any]) -> None:
        """The watch goes by the new way's figures, and takes no time that is older."""
        row = cls._watched(tx, digest)
        if row is None:
            return
        last = int(tx.execute("SELECT coalesce(max(id), 0) FROM jobs").fetchone()[0])
        trial = json.dumps(json.loads(row["trial"] or "{}") | {"way_after_job": last, "latency_ms": None}) if row["trial"] else None
        tx.execute("UPDATE activations SET self_test = ?, trial = ? WHERE id = ?", (json.dumps(report), trial, row["id"]))

    @classmethod
    def _bound(cls, tx: sqlite3.Connection, digest: str, report: Mapping[str, Any]) -> None:
        """The entry whose model is watched gets the new figures, and never a stricter bound than it had."""
        row = cls._watched(tx, digest)
        if row is None:
            return
        before = json.loads(row["self_test"] or "{}")
        slowest = max(values.get(key) or 0.0 for values in (before, report) for key in ("median_ms", "watch_ms"))
        tx.execute("UPDATE activations SET self_test = ? WHERE id = ?", (json.dumps({**report, "watch_ms": slowest}), row["id"]))

    @staticmethod
    def _keep(tx: sqlite3.Connection, tuning: Tuning) -> None:
        text = replace(tuning, updated_at=utc_now()).to_json()
        tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY + tuning.digest, text))

    def _may_begin(self, tuning: Tuning) -> bool:
        if datetime.now(timezone.utc) - datetime.fromisoformat(tuning.asked_at) > _PATIENCE:
            return True
        return not self._db.query("SELECT 1 FROM jobs WHERE state IN ('queued', 'running') LIMIT 1")
