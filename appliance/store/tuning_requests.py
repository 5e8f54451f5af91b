"""Requests to tune an active model again: who requested it, its progress, and the one transaction that stores the result.

Tuning does not change the version of a model: there is no entry in the journal of activations, and a trial continues. The request of a
model is stored in ``meta`` under ``tuning:<digest>``, its result in the ``self_test`` of the model, and both are audited.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from appliance.core import device_profile
from appliance.core.attempts import MAX_ATTEMPTS, MAX_INTERRUPTED, Attempts
from appliance.core.domain import Note, utc_now
from appliance.core.states import TuningState
from appliance.store import database as db
from appliance.store.database import Database

# A request of the worker waits until no job is queued, but not for longer than this: a box may never be idle.
_MAX_WAIT: Final = timedelta(minutes=10)
_KEY: Final = "tuning:"
_DETAIL: Final = 200
# The keys of ``Runtime.describe`` that people are shown; see :class:`appliance.core.run_summary.RunSummary`.
_SHOWN_KEYS: Final = ("runtime", "version", "provider", "precision", "ran")


@dataclass(frozen=True)
class TuningRequest:
    """One request; ``state`` is a value of TuningState, ``step`` and ``progress`` (0 to 1) show how far it is."""

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
    interrupted: int = 0
    boot_id: str = ""

    @property
    def open(self) -> bool:
        """Whether tuning has not ended."""
        return self.state in (TuningState.REQUESTED, TuningState.MEASURING)

    @property
    def counted(self) -> Attempts:
        """Its attempts so far."""
        return Attempts(self.attempts, self.interrupted, self.boot_id)

    def with_attempts(self, counted: Attempts) -> TuningRequest:
        """The same request after other attempts."""
        return replace(self, attempts=counted.begun, interrupted=counted.interrupted, boot_id=counted.boot_id)

    @classmethod
    def from_json(cls, digest: str, text: str) -> TuningRequest:
        """Parse what :meth:`to_json` wrote; fields of a newer appliance are ignored.

        A text that cannot be parsed gives a failed request with that reason: people see it, and the next request replaces it.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.get("digest") != digest:
                raise ValueError("it belongs to another model or to none")
            known = {item.name: values[item.name] for item in fields(cls) if item.name in values and item.name != "reason"}
            reason = values.get("reason")
            request = cls(**known, reason=None if reason is None else Note(str(reason["code"]), str(reason["detail"])))
            request._check()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            note = Note("tune.unreadable", f"{type(error).__name__}: {str(error)[:_DETAIL]}")
            return cls(digest, "", TuningState.FAILED.value, "worker", "", "", reason=note)
        return request

    def _check(self) -> None:
        """Raise ValueError or TypeError where a field has an invalid value."""
        texts = (self.name, self.actor, self.updated_at, self.step, self.profile, self.boot_id)
        if not all(isinstance(text, str) for text in (TuningState(self.state), *texts)):
            raise ValueError("a field has an invalid value")
        if datetime.fromisoformat(self.asked_at).tzinfo is None:
            raise ValueError("a time without a zone")
        if type(self.attempts) is not int or type(self.interrupted) is not int or not 0 <= self.progress <= 1:
            raise ValueError("a number is out of range")

    def to_json(self) -> str:
        """Serialise for the database."""
        return json.dumps(asdict(self), ensure_ascii=False)


class TuningRequests:
    """The requests of one box."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, digest: str) -> TuningRequest | None:
        """The last request for a model since it was activated, if there is one."""
        row = self._db.one("SELECT value FROM meta WHERE key = ?", _KEY + digest)
        return TuningRequest.from_json(digest, row["value"]) if row else None

    def next(self) -> TuningRequest | None:
        """The request to work on: the running one, then the oldest; a request of the worker waits until no job is queued."""
        rows = self._db.query("SELECT key, value FROM meta WHERE key GLOB ?", f"{_KEY}*")
        requests = [item for item in (TuningRequest.from_json(row["key"].removeprefix(_KEY), row["value"]) for row in rows) if item.open]
        ready = [item for item in requests if item.actor != "worker" or item.state == TuningState.MEASURING or self._may_begin(item)]
        return min(ready, key=lambda item: (item.state != TuningState.MEASURING, item.actor == "worker", item.asked_at), default=None)

    def ask(self, digest: str, name: str, actor: str) -> TuningRequest:
        """Request tuning of a model; returns the open request where there is one already."""
        with self._db.transaction() as tx:
            row = tx.execute("SELECT value FROM meta WHERE key = ?", (_KEY + digest,)).fetchone()
            known = TuningRequest.from_json(digest, row["value"]) if row else None
            if known is not None and known.open and (known.actor != "worker" or actor == "worker"):
                return known
            fresh = TuningRequest(digest, name, TuningState.REQUESTED.value, actor, utc_now(), utc_now())
            request = replace(known, actor=actor) if known is not None and known.open else fresh
            self._store(tx, request)
            Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "U", f"model:{digest[:12]}", name=name, tuning="asked")
        return request

    def begin(self, tuning: TuningRequest) -> TuningRequest | None:
        """Count an attempt; after three that crashed, or ten that a new boot ended, the request has failed.

        Returns:
            The request with the attempt, to be worked on; None when it failed.
        """
        attempts = tuning.counted.since_boot()
        if attempts.begun >= MAX_ATTEMPTS:
            self.fail(tuning, Note("activation.crash_loop", f"{attempts.begun} attempts"))
            return None
        if attempts.interrupted >= MAX_INTERRUPTED:
            self.fail(tuning, Note("activation.interrupted", f"{attempts.interrupted} attempts"))
            return None
        begun = replace(tuning.with_attempts(attempts.begin()), state=TuningState.MEASURING.value, step="staged", progress=0.0)
        with self._db.transaction() as tx:
            self._store(tx, begun)
        return begun

    def progress(self, tuning: TuningRequest, step: str, part: float) -> None:
        """Store the progress; it is only shown, so a power cut may lose it."""
        with self._db.transaction(durable=False) as tx:
            self._store(tx, replace(tuning, step=step, progress=part))

    def pause(self, tuning: TuningRequest) -> None:
        """Interrupt tuning for something more important: it starts again later, and the attempt does not count."""
        with self._db.transaction() as tx:
            paused = tuning.with_attempts(tuning.counted.take_back())
            self._store(tx, replace(paused, state=TuningState.REQUESTED.value, step="", progress=0.0))

    def fail(self, tuning: TuningRequest, note: Note) -> None:
        """End a request without a result; the model runs as before."""
        with self._db.transaction() as tx:
            self._store(tx, replace(tuning, state=TuningState.FAILED.value, reason=note, profile=device_profile.profile()))
            Database.audit(
                tx, db.APPLICATION_ACTIVITY, tuning.actor, "E", f"model:{tuning.digest[:12]}", 8, name=tuning.name, tuning="failed",
                code=note.code,
            )  # fmt: skip

    def done(self, tuning: TuningRequest, report: Mapping[str, Any]) -> None:
        """Store the result: the chosen candidate, the table of all candidates and the end of the request, in one transaction.

        The state and the trial of the model do not change. The durations of earlier jobs belong to the previous candidate and are not
        compared with the self-test of the new one.
        """
        with self._db.transaction() as tx:
            tx.execute(
                "UPDATE models SET self_test = ?, precision = ?, runtime = ? WHERE digest = ?",
                (json.dumps(report), report["precision"], report["runtime"], tuning.digest),
            )
            self._reset_trial_latency(tx, tuning.digest, report)
            self._store(
                tx, replace(tuning, state=TuningState.DONE.value, progress=1.0, reason=None, profile=str(report.get("profile", "")))
            )
            Database.audit(
                tx, db.SECURITY_ALERT, tuning.actor, "U", f"model:{tuning.digest[:12]}", **db.SOFTWARE_CONFIGURATION, name=tuning.name,
                tuning="done", choice=report.get("choice"),
            )  # fmt: skip

    # -- what runs now: only the worker can say -------------------------------------------------------------------------

    def record_fallback(self, digest: str, note: Note, ran: Mapping[str, Any]) -> None:
        """Record that the baseline runs in place of the chosen candidate, because of ``note``; audited once per reason.

        ``ran`` is what runs now and why, as in a result.
        """
        with self._db.transaction() as tx:
            row = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            report = json.loads(row["self_test"])
            is_known, has_changed = (report.get("fallback") or {}).get("detail") == note.detail, self._set_runs(report, ran)
            if not is_known:
                report["fallback"] = note.to_json() | {"at": utc_now()}
            if has_changed or not is_known:
                tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))
            if is_known:
                return
            slowest = max((item["median_ms"] or 0.0 for item in report.get("table", [])), default=0.0)
            self._relax_latency_bound(tx, digest, report | {"watch_ms": slowest})
            Database.audit(
                tx, db.SECURITY_ALERT, "worker", "E", f"model:{digest[:12]}", 4, **db.SOFTWARE_CONFIGURATION, name=row["name"],
                code=note.code, message=note.detail,
            )  # fmt: skip

    def record_chosen(self, digest: str, ran: Mapping[str, Any]) -> None:
        """Record that the chosen candidate runs (again); ``ran`` as in :meth:`record_fallback`, with the current reason."""
        with self._db.transaction() as tx:
            report = json.loads(tx.execute("SELECT self_test FROM models WHERE digest = ?", (digest,)).fetchone()["self_test"])
            fallback = report.pop("fallback", None)
            if self._set_runs(report, ran) or fallback is not None:
                tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))

    def record_cannot_run(self, digest: str, note: Note) -> None:
        """Record that neither the chosen candidate nor the baseline can run the model, so that its jobs fail and pages say why."""
        with self._db.transaction() as tx:
            row = tx.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
            report = json.loads(row["self_test"])
            report.pop("fallback", None)
            if not self._set_runs(report, {"reason": note.to_json()}):
                return
            tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))
            Database.audit(
                tx, db.SECURITY_ALERT, "worker", "E", f"model:{digest[:12]}", 8, **db.SOFTWARE_CONFIGURATION, name=row["name"],
                code=note.code, message=note.detail,
            )  # fmt: skip

    @staticmethod
    def _set_runs(report: dict[str, Any], ran: Mapping[str, Any]) -> bool:
        """Write what runs now, and since when, into a self-test report; returns whether it changed."""
        now = {name: str(ran.get(name) or "") for name in _SHOWN_KEYS} | {"reason": dict(ran.get("reason") or {})}
        if now | {"at": ""} == (report.get("runs") or {}) | {"at": ""}:
            return False
        report["runs"] = now | {"at": utc_now()}
        return True

    # -- inside a transaction ----------------------------------------------------------------------------------------

    @staticmethod
    def _trial_entry(tx: sqlite3.Connection, digest: str) -> sqlite3.Row | None:
        """The journal entry of the model's trial, running or passed."""
        row: sqlite3.Row | None = tx.execute(
            "SELECT id, self_test, trial FROM activations WHERE digest = ? AND state IN ('trial', 'good') ORDER BY id DESC", (digest,)
        ).fetchone()
        return row

    @classmethod
    def _reset_trial_latency(cls, tx: sqlite3.Connection, digest: str, report: Mapping[str, Any]) -> None:
        """Compare the trial with the new self-test, and ignore the durations of jobs before it."""
        row = cls._trial_entry(tx, digest)
        if row is None:
            return
        last = int(tx.execute("SELECT coalesce(max(id), 0) FROM jobs").fetchone()[0])
        trial = json.dumps(json.loads(row["trial"] or "{}") | {"way_after_job": last, "latency_ms": None}) if row["trial"] else None
        tx.execute("UPDATE activations SET self_test = ?, trial = ? WHERE id = ?", (json.dumps(report), trial, row["id"]))

    @classmethod
    def _relax_latency_bound(cls, tx: sqlite3.Connection, digest: str, report: Mapping[str, Any]) -> None:
        """Update the latency bound of the trial; it never becomes stricter than before."""
        row = cls._trial_entry(tx, digest)
        if row is None:
            return
        before = json.loads(row["self_test"] or "{}")
        slowest = max(values.get(key) or 0.0 for values in (before, report) for key in ("median_ms", "watch_ms"))
        tx.execute("UPDATE activations SET self_test = ? WHERE id = ?", (json.dumps({**report, "watch_ms": slowest}), row["id"]))

    @staticmethod
    def _store(tx: sqlite3.Connection, tuning: TuningRequest) -> None:
        text = replace(tuning, updated_at=utc_now()).to_json()
        tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY + tuning.digest, text))

    def _may_begin(self, tuning: TuningRequest) -> bool:
        if datetime.now(timezone.utc) - datetime.fromisoformat(tuning.asked_at) > _MAX_WAIT:
            return True
        return not self._db.query("SELECT 1 FROM jobs WHERE state IN ('queued', 'running') LIMIT 1")
