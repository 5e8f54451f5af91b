"""Urgent studies (STAT), requested by a person, by the command line, or by the sender in the header of an image.

The jobs of an urgent study run first, and so do those of its images that arrive later. Among urgent jobs the oldest runs first, so that a
sender that marks everything urgent gains nothing; a job does not become more urgent by waiting.
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

# Progress of a study: images wait, all are analysed, or none waits and some are not analysed. The values are part of the API.
StudyProgress = Literal["waits", "read", "unread"]

# The urgent ones of the defined terms of Requested Procedure Priority (0040,1003), PS3.3 Table C.4-11.
URGENT_TERMS: Final = ("STAT", "HIGH")


@dataclass(frozen=True)
class Urgency:
    """Who made a study urgent.

    Attributes:
        origin: a person (by page or API), the command line of the box, or the sender in the header of an image.
        actor: the account, program or AE title.
        at: when, ISO 8601 in UTC; empty where it was not recorded.
        term: for a sender, the Requested Procedure Priority of the image.
    """

    origin: Origin
    actor: str
    at: str
    term: str = ""

    @classmethod
    def of(cls, text: str | None) -> Urgency | None:
        """Parse the stored JSON; None for a study that is not urgent."""
        return cls(**json.loads(text)) if text else None


def mark(tx: sqlite3.Connection, study_id: int, origin: Origin, actor: str, term: str = "") -> int:
    """Make a study urgent, inside the caller's transaction; the first request stays on record.

    Done and failed jobs are marked too, so that a retry is urgent as well.

    Returns:
        The number of queued and running jobs concerned; 0 where the study was urgent already.
    """
    known = tx.execute("SELECT urgent, not_urgent FROM studies WHERE id = ?", (study_id,)).fetchone()
    if known["urgent"] is not None or (origin == "sender" and known["not_urgent"] is not None):
        return 0
    waiting = _set_priority(tx, study_id, 1, urgent=_urgency_json(origin, actor, term), not_urgent=None)
    detail: dict[str, Any] = {"term": term} if term else {}
    Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", urgent=waiting, origin=origin, **detail)
    return waiting


def unmark(tx: sqlite3.Connection, study_id: int, origin: Origin, actor: str) -> int | None:
    """Make a study routine again, inside the caller's transaction.

    From then on requests of its sender are ignored: a modality that sends STAT with every image would undo the decision of a person with
    the next image. A person or the command line may make the study urgent again; then they count again.

    Returns:
        The number of queued and running jobs concerned; None where the study was not urgent.
    """
    if tx.execute("SELECT 1 FROM studies WHERE id = ? AND urgent IS NOT NULL", (study_id,)).fetchone() is None:
        return None
    waiting = _set_priority(tx, study_id, 0, urgent=None, not_urgent=_urgency_json(origin, actor))
    Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", not_urgent=waiting, origin=origin)
    return waiting


def _urgency_json(origin: Origin, actor: str, term: str = "") -> str:
    return json.dumps(asdict(Urgency(origin, actor, utc_now(), term)), ensure_ascii=False)


def _set_priority(tx: sqlite3.Connection, study_id: int, priority: int, *, urgent: str | None, not_urgent: str | None) -> int:
    """Set the priority of a study and its jobs; returns how many of these are queued or running."""
    tx.execute(
        "UPDATE studies SET urgent = ?, not_urgent = ?, revision = ? WHERE id = ?", (urgent, not_urgent, next_revision(tx), study_id)
    )
    changed = tx.execute(
        "UPDATE jobs SET priority = ?1 WHERE priority != ?1 AND instance_id IN"
        " (SELECT i.id FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?2) RETURNING state",
        (priority, study_id),
    ).fetchall()
    return sum(row["state"] in (JobState.QUEUED.value, JobState.RUNNING.value) for row in changed)
