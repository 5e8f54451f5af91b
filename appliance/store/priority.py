"""What is urgent (STAT) and who said so: a person, the command line, or the sender in the image's header.

A study is urgent until somebody takes that back: what waits of it is read first, and so is what comes later. Among what is urgent the
oldest goes first, so that a sender that marks everything loses nothing but its privilege; nothing grows more urgent by waiting.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from appliance.core.domain import JobState, utc_now
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.planning import next_revision

Origin = Literal["person", "cli", "sender"]

# What becomes of the images of a study: some wait, all have a result of a model, or nothing waits and some have none.
StudyProgress = Literal["waits", "read", "unread"]

# Of the defined terms of Requested Procedure Priority (0040,1003), PS3.3 Table C.4-11.
URGENT_TERMS: Final = ("STAT", "HIGH")


@dataclass(frozen=True)
class Urgency:
    """Why a study is read first.

    Attributes:
        origin: whether a person asked (by page or API), somebody at the box's command line, or the sender did in the header.
        actor: the account, program or AE title.
        at: when, ISO 8601 in UTC; empty where nobody wrote that down.
        term: of a sender, the Requested Procedure Priority that the image carries.
    """

    origin: Origin
    actor: str
    at: str
    term: str = ""

    @classmethod
    def of(cls, text: str | None) -> Urgency | None:
        """As the store keeps it (JSON); None of a study that is not urgent."""
        return cls(**json.loads(text)) if text else None


def mark(tx: sqlite3.Connection, study_id: int, origin: Origin, actor: str, term: str = "") -> int:
    """Make a study urgent, inside the caller's transaction; who said so first stays on record.

    Done and failed jobs are marked too: one that is begun anew is as urgent as what waits.

    Returns:
        How many jobs that wait, or are taken and have no result yet, it concerned; 0 where the study was urgent already, for planning
        makes every job of such a study urgent.
    """
    known = tx.execute("SELECT urgent, not_urgent FROM studies WHERE id = ?", (study_id,)).fetchone()
    if known["urgent"] is not None or (origin == "sender" and known["not_urgent"] is not None):
        return 0
    waiting = _put(tx, study_id, 1, urgent=_why(origin, actor, term), not_urgent=None)
    told: dict[str, Any] = {"term": term} if term else {}
    Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", urgent=waiting, origin=origin, **told)
    return waiting


def unmark(tx: sqlite3.Connection, study_id: int, origin: Origin, actor: str) -> int | None:
    """Take it back that a study is urgent, inside the caller's transaction: what waits of it waits in its turn again.

    Its sender is not heard any more in this study: a machine that says STAT with every image would undo with the next one what a person
    decided. A person, or the command line, may make it urgent again, which forgets this.

    Returns:
        How many jobs that wait, or are taken and have no result yet, go back; None where the study was not urgent.
    """
    if tx.execute("SELECT 1 FROM studies WHERE id = ? AND urgent IS NOT NULL", (study_id,)).fetchone() is None:
        return None
    waiting = _put(tx, study_id, 0, urgent=None, not_urgent=_why(origin, actor))
    Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", not_urgent=waiting, origin=origin)
    return waiting


def _why(origin: Origin, actor: str, term: str = "") -> str:
    return json.dumps(asdict(Urgency(origin, actor, utc_now(), term)), ensure_ascii=False)


def _put(tx: sqlite3.Connection, study_id: int, priority: int, *, urgent: str | None, not_urgent: str | None) -> int:
    """Write down what a study is, and its jobs with it; returns how many of these have no result yet."""
    tx.execute(
        "UPDATE studies SET urgent = ?, not_urgent = ?, revision = ? WHERE id = ?", (urgent, not_urgent, next_revision(tx), study_id)
    )
    changed = tx.execute(
        "UPDATE jobs SET priority = ?1 WHERE priority != ?1 AND instance_id IN"
        " (SELECT i.id FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?2) RETURNING state",
        (priority, study_id),
    ).fetchall()
    return sum(row["state"] in (JobState.QUEUED.value, JobState.RUNNING.value) for row in changed)
