"""The alarm for shifted scores, one per label and model version (table ``score_monitors``): stored evidence, alarm, acknowledgement.

The evidence is computed by :mod:`appliance.lifecycle.score_monitor`; here it is text. No value belongs to a patient. The alarm informs
people: it switches nothing off.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, replace
from typing import Final

from appliance.core.domain import Note, utc_now
from appliance.core.states import IN_USE_STATES, ModelState
from appliance.store import database as db
from appliance.store.database import Database

SCORE_SHIFT: Final = "scores.shifted"
_SCORES_PER_STEP: Final = 500
_EMPTY: Final = "{}"


@dataclass(frozen=True)
class ScoreMonitor:
    """What is stored of one label of a model version; see table ``score_monitors``."""

    digest: str
    label: str
    last_finding: int = 0
    first_finding: int = 0
    studies: int = 0
    compares_reference: bool = True
    evidence: str = _EMPTY


@dataclass(frozen=True)
class ScoreAlarm:
    """An alarm that nobody acknowledged; ``at`` is when it was raised."""

    name: str
    version: str
    digest: str
    label: str
    note: Note
    at: str


class ScoreAlarms:
    """The score monitors of one box."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def monitor(self, digest: str, label: str) -> ScoreMonitor | None:
        """Return what is stored; None while an alarm waits for its acknowledgement, a new one when nothing is stored yet."""
        row = self._db.one("SELECT * FROM score_monitors WHERE digest = ? AND label = ?", digest, label)
        if row is None:
            return ScoreMonitor(digest, label)
        values = {name: row[name] for name in ("digest", "label", "last_finding", "first_finding", "studies", "evidence")}
        return None if row["alarm"] is not None else ScoreMonitor(**values, compares_reference=bool(row["compares_reference"]))

    def next_scores(self, monitor: ScoreMonitor) -> list[sqlite3.Row]:
        """List some of the findings that were not taken into account, oldest first: ``id``, ``score``, and whether it is ``first``.

        Only the first finding of a study counts: several images of one patient, or a repeated analysis, are no independent scores.
        """
        return self._db.query(
            "SELECT f.id, f.score, NOT EXISTS (SELECT 1 FROM series t JOIN instances k ON k.series_id = t.id"
            "  JOIN findings g ON g.instance_id = k.id"
            "  WHERE t.study_id = s.study_id AND g.model_digest = f.model_digest AND g.label = f.label"
            "  AND g.id > ?4 AND g.id < f.id) AS first"
            " FROM findings f JOIN instances i ON i.id = f.instance_id JOIN series s ON s.id = i.series_id"
            " WHERE f.id > ?1 AND f.model_digest = ?2 AND f.label = ?3 ORDER BY f.id LIMIT ?5",
            monitor.last_finding, monitor.digest, monitor.label, monitor.first_finding, _SCORES_PER_STEP,
        )  # fmt: skip

    def last_scores(self, monitor: ScoreMonitor) -> list[float]:
        """List the last scores since the comparison began, newest first."""
        rows = self._db.query(
            "SELECT score FROM findings WHERE id > ? AND id <= ? AND model_digest = ? AND label = ? ORDER BY id DESC LIMIT ?",
            monitor.first_finding, monitor.last_finding, monitor.digest, monitor.label, _SCORES_PER_STEP,
        )  # fmt: skip
        return [row["score"] for row in rows]

    def record(self, monitor: ScoreMonitor, alarm: Note | None = None, model: str = "") -> None:
        """Store the evidence, and raise an alarm with its audit entry; the evidence alone is not durable: it can be computed again."""
        stored = json.dumps(alarm.to_json() | {"at": utc_now()}, ensure_ascii=False) if alarm else None
        with self._db.transaction(durable=alarm is not None) as tx:
            Database.insert(
                tx, "score_monitors", "ON CONFLICT (digest, label) DO UPDATE SET last_finding = excluded.last_finding,"
                " first_finding = excluded.first_finding, studies = excluded.studies, compares_reference = excluded.compares_reference,"
                " evidence = excluded.evidence, alarm = excluded.alarm",
                **vars(monitor) | {"compares_reference": int(monitor.compares_reference)}, alarm=stored,
            )  # fmt: skip
            if alarm is not None:
                Database.audit(
                    tx, db.SECURITY_ALERT, "worker", "E", f"model:{monitor.digest[:12]}", 4, model=model, code=alarm.code,
                    measured=alarm.detail,
                )  # fmt: skip
                _touch_activation(tx, monitor.digest)

    def active(self) -> list[ScoreAlarm]:
        """List the alarms of the active models that nobody acknowledged."""
        rows = self._db.query(
            "SELECT s.*, m.name, m.version FROM score_monitors s JOIN models m ON m.digest = s.digest"
            " WHERE s.alarm IS NOT NULL AND m.state = ? ORDER BY m.name, s.label",
            ModelState.ACTIVE.value,
        )  # fmt: skip
        return [_alarm(row) for row in rows]

    def acknowledge(self, name: str, actor: str) -> int:
        """Acknowledge the alarms of the active version of a model line, with an audit entry each; returns how many there were.

        The scores from now on are compared with each other: what an administrator looked at is usual. The manifest's histogram is not
        used any more.
        """
        alarms = [alarm for alarm in self.active() if alarm.name == name]
        if not alarms:
            return 0
        with self._db.transaction() as tx:
            (last,) = tx.execute("SELECT coalesce(max(id), 0) FROM findings").fetchone()
            for alarm in alarms:
                tx.execute(
                    "UPDATE score_monitors SET alarm = NULL, evidence = ?, studies = 0, compares_reference = 0, last_finding = ?,"
                    " first_finding = ? WHERE digest = ? AND label = ?",
                    (_EMPTY, last, last, alarm.digest, alarm.label),
                )
                Database.audit(
                    tx, db.SECURITY_ALERT, actor, "U", f"model:{alarm.digest[:12]}", 0, name=alarm.name, version=alarm.version,
                    label=alarm.label, acknowledged=alarm.note.code, raised_at=alarm.at,
                )  # fmt: skip
                _touch_activation(tx, alarm.digest)
        return len(alarms)


def _touch_activation(tx: sqlite3.Connection, digest: str) -> None:
    """Give the activation that put a version to work the present time, by which the central server knows that its code changed."""
    tx.execute(
        "UPDATE activations SET updated_at = ? WHERE id = (SELECT max(id) FROM activations WHERE digest = ? AND state IN (?, ?))",
        (utc_now(), digest, *map(str, IN_USE_STATES)),
    )


def _alarm(row: sqlite3.Row) -> ScoreAlarm:
    """Read a stored alarm; one that cannot be read is still an alarm."""
    alarm = ScoreAlarm(row["name"], row["version"], row["digest"], row["label"], Note(SCORE_SHIFT), "")
    try:
        value = json.loads(row["alarm"])
        return replace(alarm, note=Note(str(value["code"]), str(value["detail"])), at=str(value["at"]))
    except (ValueError, TypeError, KeyError):
        return alarm
